"""What `millpond features` shows: each view of a definition file, feature by feature, and what it takes of memory.

Sizes are the layout's own. A part that features share stands in each one's line and once in the table's totals. Blocks
in which the memory of a shard is handed out have some slack besides, up to an eighth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from millpond.feature_actors.layout import Layout, Series, Table, compile_layout
from millpond.feature_actors.tiles.memory import WORD_BYTES
from millpond.feature_actors.view import Feature
from millpond.models.definition import Declared

__all__ = ["FeatureLine", "SeriesLine", "TableLine", "ViewLines", "describe_views", "print_views"]

_HALF_WORD_BYTES = WORD_BYTES // 2
#: Entries / places of an index: it grows by a third when three quarters are taken, see `tiles.structure`.
INDEX_LOAD_MIN, INDEX_LOAD_MAX = 9 / 16, 3 / 4
_UNITS_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}


@dataclass(frozen=True)
class FeatureLine:
    """One feature. What does not apply to it is None: a lifetime feature has no tiles, a derived one keeps nothing.

    aggregation: as it was declared. derived_from: the features that it is computed from when it is read.
    overhang_ms, overhang_percent: how much longer than its window an answer may cover.
    """

    feature: str
    aggregation: str
    where: str
    derived_from: tuple[str, ...]
    window: str | None
    ttl: str | None
    exact: bool
    tile_width_ms: int | None
    bytes_per_entity: int
    bytes_per_tile: int | None
    bytes_per_fine_tile: int | None
    overhang_ms: int
    overhang_percent: float


@dataclass(frozen=True)
class SeriesLine:
    """Tiles of one width and condition, with the columns of all the features over them.

    tiles_max: that an entity has at once. bytes_per_fine_tile: for each millisecond with an event, of exact features.
    """

    where: str
    tile_width_ms: int
    bytes_per_tile: int
    bytes_per_fine_tile: int | None
    tiles_max: int


@dataclass(frozen=True)
class TableLine:
    """What is kept about each entity of a source and key, for all views over them together.

    bytes_per_row: the row with its header. bytes_index_min, bytes_index_max: its entry in the index besides.
    bytes_one_tile: an entity with one active tile in each series; bytes_full: with all tiles of its windows, one event
    in each. Both with the larger index entry.
    """

    table: str
    views: tuple[str, ...]
    bytes_per_row: int
    bytes_index_min: int
    bytes_index_max: int
    series: tuple[SeriesLine, ...]
    bytes_one_tile: int
    bytes_full: int


@dataclass(frozen=True)
class ViewLines:
    """One view: its features, and the table in which they are kept."""

    view: str
    owner: str
    source: str
    key: tuple[str, ...]
    where: str
    features: tuple[FeatureLine, ...]
    kept: TableLine


def describe_views(declared: Declared) -> list[ViewLines]:
    """Return each view of a definition. Raises `DeclarationError` if its views do not go together."""
    layout = compile_layout(declared.sources, declared.views)
    return [
        ViewLines(
            view=view.name,
            owner=view.owner,
            source=view.source.name,
            key=tuple(view.key),
            where="" if view.where is None else str(view.where),
            features=tuple(_feature_line(layout, feature) for feature in view),
            kept=_table_line(layout, layout.table_of(view)),
        )
        for view in layout.views.values()
    ]


# -- sizes


def series_of(layout: Layout, feature: Feature) -> Series:
    """Return the series that is scanned for a feature."""
    series, _, _ = layout.kept_in(feature)
    return series


def row_bytes(series: Series, words: int) -> int:
    """Return what `words` of a series' columns take of a row: themselves, with their time if they can expire; else
    the head of a ring of tiles."""
    if not series.lifetime:
        return _HALF_WORD_BYTES
    return (words + series.row_words - series.words) * WORD_BYTES


def tiles_max(series: Series) -> int:
    """Return how many tiles of a series an entity can have: of those kept, the oldest and the newest are cut."""
    return -(-series.keep_ms // series.width_ms) + 1


def index_bytes(load: float) -> int:
    """Return what an entity's entry takes in an index with so many entries a place."""
    return round(WORD_BYTES / load)


def entity_bytes(table: Table, tiles_of: dict[Series, int]) -> int:
    """Return what an entity takes with so many tiles in each series, one event in each."""
    tiles = sum(n * (s.tile_words + s.exact * s.fine_words) * WORD_BYTES for s, n in tiles_of.items())
    return table.row_words * WORD_BYTES + index_bytes(INDEX_LOAD_MIN) + tiles


# -- lines


def _feature_line(layout: Layout, feature: Feature) -> FeatureLine:
    if feature.derived is not None:
        return FeatureLine(
            feature.name, feature.made_by, "", feature.derived.of, None, None, False, None, 0, None, None, 0, 0.0
        )
    kept, series = feature.kept, series_of(layout, feature)
    words = sum(column.words for column in kept.columns)
    in_tile = None if series.lifetime else words * WORD_BYTES
    overhang_ms = 0 if series.lifetime or series.exact else series.width_ms
    return FeatureLine(
        feature=feature.name,
        aggregation=feature.made_by,
        where="" if kept.where is None else str(kept.where),
        derived_from=(),
        window=kept.window,
        ttl=kept.ttl,
        exact=kept.exact,
        tile_width_ms=None if series.lifetime else series.width_ms,
        bytes_per_entity=row_bytes(series, words),
        bytes_per_tile=in_tile,
        bytes_per_fine_tile=in_tile if series.exact else None,
        overhang_ms=overhang_ms,
        overhang_percent=round(100 * overhang_ms / kept.window_ms, 2) if kept.window_ms else 0.0,
    )


def _table_line(layout: Layout, table: Table) -> TableLine:
    tiled = sorted((s for s in table.series if not s.lifetime), key=lambda s: (s.width_ms, s.where))
    return TableLine(
        table=table.name,
        views=tuple(v.name for v in layout.views.values() if layout.table_of(v) is table),
        bytes_per_row=table.row_words * WORD_BYTES,
        bytes_index_min=index_bytes(INDEX_LOAD_MAX),
        bytes_index_max=index_bytes(INDEX_LOAD_MIN),
        series=tuple(
            SeriesLine(
                where="" if (where := table.wheres[s.where]) is None else str(where),
                tile_width_ms=s.width_ms,
                bytes_per_tile=s.tile_words * WORD_BYTES,
                bytes_per_fine_tile=s.fine_words * WORD_BYTES if s.exact else None,
                tiles_max=tiles_max(s),
            )
            for s in tiled
        ),
        bytes_one_tile=entity_bytes(table, dict.fromkeys(tiled, 1)),
        bytes_full=entity_bytes(table, {s: tiles_max(s) for s in tiled}),
    )


def length_text(ms: int) -> str:
    """Return a length of time as a declaration would have it, in the largest unit that divides it.

    >>> length_text(1_200_000), length_text(86_400_000), length_text(10), length_text(90_000)
    ('20m', '1d', '10ms', '90s')
    """
    unit = next(name for name, length in _UNITS_MS.items() if ms % length == 0)
    return f"{ms // _UNITS_MS[unit]}{unit}"


# -- for people


def print_views(views: Sequence[ViewLines]) -> None:
    """Print the views as tables; plain lines of any length when that is not to a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    for view in views:
        about = f"{view.source}[{', '.join(view.key)}]{_where(view.where)}"
        console.print(f"[bold]{view.view}[/bold]  {escape(about)}  owner {view.owner}", soft_wrap=True)
        console.print(_grid(view, plain=not console.is_terminal))
        for what, text in _totals(view):
            console.print(f"  {what:10}  {escape(text)}", soft_wrap=not console.is_terminal)
        console.print()


_PLAIN_WIDTH = 10_000
_WHERE_MAX = 100


def _grid(view: ViewLines, *, plain: bool) -> Grid:
    grid = Grid(box=None if plain else box.SIMPLE_HEAD, padding=(0, 2, 0, 0) if plain else (0, 1, 0, 0))
    grid.add_column("feature", no_wrap=True)
    grid.add_column("aggregation", overflow="fold")  # the one column that gives way
    for name in ("over", "tiles"):
        grid.add_column(name, no_wrap=True)
    for name in ("B/entity", "B/tile", "overhang"):
        grid.add_column(name, justify="right", no_wrap=True)
    for f in view.features:
        if f.derived_from:
            grid.add_row(f.feature, escape(f.aggregation), "nothing kept")
            continue
        grid.add_row(
            f.feature,
            escape(f.aggregation + _where(f.where)),
            _over(f),
            "" if f.tile_width_ms is None else length_text(f.tile_width_ms),
            str(f.bytes_per_entity),
            _tile_text(f),
            f"{length_text(f.overhang_ms)} {f.overhang_percent:.1f} %" if f.overhang_ms else "0",
        )
    return grid


def _over(line: FeatureLine) -> str:
    if line.window is None:
        return "lifetime" + (f", ttl {line.ttl}" if line.ttl else "")
    return f"{line.window} exact" if line.exact else line.window


def _tile_text(line: FeatureLine) -> str:
    if line.bytes_per_tile is None:
        return ""
    return str(line.bytes_per_tile) + (f" + {line.bytes_per_fine_tile}/ms" if line.exact else "")


def _where(text: str) -> str:
    """Return a condition in one line; Arrow writes each item of an `isin` on a line of its own."""
    line = " ".join(text.split())
    return "" if not line else f" where {line if len(line) <= _WHERE_MAX else line[: _WHERE_MAX - 4] + ' ...'}"


def _totals(view: ViewLines) -> list[tuple[str, str]]:
    kept = view.kept
    others = [name for name in kept.views if name != view.view]
    row = f"{kept.bytes_per_row} bytes, header included, and {kept.bytes_index_min} to {kept.bytes_index_max} of index"
    totals = [("row", row + (f"; shared with {', '.join(others)}" if others else ""))]
    for series in kept.series:
        text = f"of {length_text(series.tile_width_ms)}: {series.bytes_per_tile} bytes"
        if series.bytes_per_fine_tile is not None:
            text += f" and {series.bytes_per_fine_tile} for each millisecond with an event"
        text += f", {series.tiles_max} at most"
        totals.append(("tiles", text + _where(series.where)))
    if kept.series:
        totals.append(("one entity", f"{kept.bytes_one_tile:,} bytes with one active tile in each series"))
        totals.append(("", f"{kept.bytes_full:,} bytes with all tiles of its windows full" + _one_event(kept)))
    else:
        totals.append(("one entity", f"{kept.bytes_full:,} bytes"))
    return totals


def _one_event(kept: TableLine) -> str:
    return ", of one event each" if any(s.bytes_per_fine_tile is not None for s in kept.series) else ""
