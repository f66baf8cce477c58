"""The layout: views compiled to tables of numbers that the kernels read.

    table    one per (source, key): the entities of that key and everything kept about each
    series   one per (where, tile width) of a table, or (where, ttl) for lifetime features:
             the columns of all its features, side by side in one tile
    scan     one per (series, window) that is read: merges the tiles in the window, once for all
             the features over that window

A layout holds only tuples and arrays, no views and no expressions but the `wheres`; the same layout
compiled anywhere is the same (features are ordered by their identity).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from millpond.feature_actors.aggregations import COLUMN_WORDS, Column, where_text
from millpond.feature_actors.errors import DeclarationError, NotFound, did_you_mean
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import Feature, FeatureView
from millpond.feature_actors.windows import tile_width_ms

__all__ = ["Layout", "ReadProgram", "Series", "Table", "compile_layout"]

Words = npt.NDArray[np.int64]

#: Words before the partial in a tile: the tile's number, the next older tile.
TILE_HEADER_WORDS = 2
#: Words before the series in an entity's row: the two halves of its key's hash.
ROW_HEADER_WORDS = 2

# Columns of `Table.series_program`, int64 [series, 8].
S_LIFETIME, S_WHERE, S_WIDTH_MS, S_KEEP_MS, S_ROW_OFFSET, S_TILE_WORDS, S_COLUMN, S_COLUMNS = range(8)
# Columns of `Table.column_program`, int64 [columns, 3].
C_OPERATION, C_INPUT, C_OFFSET = range(3)
# Columns of `ReadProgram.scans`, int64 [scans, 2], of `.features`, int64 [features, 5], of `.views`, int64 [views, 4].
R_SERIES, R_WINDOW_MS = range(2)
F_SCAN, F_READ, F_OFFSET_A, F_OFFSET_B, F_OUT = range(5)
V_WHERE, V_WINDOW_MS, V_WIDTH_MS, V_TTL_MS = range(4)

#: Stands for "kept for ever" in S_KEEP_MS and V_TTL_MS.
FOR_EVER = -1


@dataclass(frozen=True)
class Series:
    """Tiles of one width (or one lifetime partial) with the columns of several features."""

    where: int
    lifetime: bool
    width_ms: int
    keep_ms: int
    columns: tuple[Column, ...]

    def offset(self, column: Column) -> int:
        """Return the place of a column in the partial, in words."""
        at = 0
        for other in self.columns:
            if other == column:
                return at
            at += COLUMN_WORDS[other.operation]
        raise AssertionError(f"{column} is not of this series")

    @property
    def words(self) -> int:
        return sum(COLUMN_WORDS[c.operation] for c in self.columns)


@dataclass(frozen=True, eq=False)
class Table:
    """Everything kept about the entities of one (source, key).

    wheres: the conditions of its features; wheres[0] is None, "every event".
    inputs: the fields that its columns look at, in the order of the input matrix.
    """

    number: int
    source: Source
    key: tuple[str, ...]
    wheres: tuple[pc.Expression | None, ...]
    inputs: tuple[str, ...]
    series: tuple[Series, ...]
    row_words: int
    series_program: Words
    column_program: Words

    @property
    def name(self) -> str:
        return f"{self.source.name}[{', '.join(self.key)}]"


@dataclass(frozen=True, eq=False)
class ReadProgram:
    """How to read some features of one table into one row of a matrix."""

    table: int
    scans: Words
    features: Words
    views: Words
    view_names: tuple[str, ...]
    wire_names: tuple[str, ...]


class Layout:
    """All sources and views of a cluster, compiled."""

    def __init__(self, sources: Sequence[Source], views: Sequence[FeatureView]) -> None:
        self.sources = {s.name: s for s in sources}
        self.views = {v.name: v for v in views}
        self.tables: list[Table] = []
        self._conditions: dict[str, dict[str, pc.Expression]] = {}
        self._table_numbers: dict[tuple[str, tuple[str, ...]], int] = {}
        grouped: dict[tuple[str, tuple[str, ...]], dict[str, Feature]] = {}
        for view in views:
            features = grouped.setdefault((view.source.name, tuple(view.key)), {})
            features.update({f.id: f for f in view})
        for (source, key), by_id in sorted(grouped.items(), key=lambda item: item[0]):
            self._table_numbers[source, key] = len(self.tables)
            # A feature stands for all of its identity, whose views may have other conditions of their own.
            of_views = {where_text(v.where): v.where for v in views if (v.source.name, tuple(v.key)) == (source, key)}
            in_order = [by_id[i] for i in sorted(by_id)]
            self.tables.append(_compile_table(len(self.tables), self.sources[source], key, in_order, of_views))

    def tables_of(self, source: str) -> list[Table]:
        return [t for t in self.tables if t.source.name == source]

    def table_of(self, view: FeatureView) -> Table:
        return self.tables[self._table_numbers[view.source.name, tuple(view.key)]]

    def conditions(self, source: str) -> dict[str, pc.Expression]:
        """Return the conditions of the views and features of a source, by their text."""
        if source not in self._conditions:
            wheres = [w for t in self.tables_of(source) for w in t.wheres if w is not None]
            self._conditions[source] = {where_text(w): w for w in wheres}
        return self._conditions[source]

    def source(self, name: str) -> Source:
        if name not in self.sources:
            raise NotFound(f"no source `{name[:80]}`" + did_you_mean(name[:80], self.sources))
        return self.sources[name]

    def view(self, name: str) -> FeatureView:
        if name not in self.views:
            raise NotFound(f"no view `{name[:80]}`" + did_you_mean(name[:80], self.views))
        return self.views[name]

    def too_late(self, source: str, times: Words, arrivals: Words) -> npt.NDArray[np.bool_]:
        """Return which events, int64 [n] of times and arrival stamps, no feature of a source takes any more."""
        series = {(s.lifetime, s.width_ms, s.keep_ms) for t in self.tables_of(source) for s in t.series}
        too_late = np.full(len(times), bool(series))
        for lifetime, width_ms, keep_ms in series:
            if lifetime:
                too_late &= (times < arrivals - keep_ms) & (keep_ms != FOR_EVER)
            else:
                too_late &= times // width_ms < (arrivals - keep_ms) // width_ms
        return too_late

    def read_program(self, table: Table, features: Sequence[Feature]) -> ReadProgram:
        """Compile the reading of `features`, all of one table, in this order."""
        scans: dict[tuple[int, int], int] = {}
        rows = []
        for out, feature in enumerate(features):
            series, number = _series_of(table, feature)
            window_ms = feature.aggregation.window_ms
            scan = scans.setdefault((number, FOR_EVER if window_ms is None else window_ms), len(scans))
            offsets = [series.offset(c) for c in feature.aggregation.columns]
            rows.append([scan, feature.aggregation.read, offsets[0], offsets[-1], out])
        views = {f.view.name: f.view for f in features}
        return ReadProgram(
            table=table.number,
            scans=np.array(list(scans), np.int64).reshape(-1, 2),
            # Features of one scan stand together, so that each scan is made once.
            features=np.array(sorted(rows), np.int64).reshape(-1, 5),
            views=np.array([_view_row(table, v) for v in views.values()], np.int64).reshape(-1, 4),
            view_names=tuple(views),
            wire_names=tuple(f.wire_name for f in features),
        )


def _compile_table(
    number: int,
    source: Source,
    key: tuple[str, ...],
    features: Sequence[Feature],
    of_views: dict[str, pc.Expression | None],
) -> Table:
    wheres: dict[str, pc.Expression | None] = {"": None}
    for feature in features:
        wheres.setdefault(where_text(feature.where), feature.where)
    for text in sorted(of_views):
        wheres.setdefault(text, of_views[text])
    where_numbers = {text: i for i, text in enumerate(wheres)}

    columns: dict[tuple[int, bool, int], dict[Column, None]] = {}
    keep: dict[tuple[int, bool, int], int] = {}
    for feature in features:
        spot, keep_ms = _spot(where_numbers[where_text(feature.where)], feature)
        columns.setdefault(spot, {}).update(dict.fromkeys(feature.aggregation.columns))
        keep[spot] = max(keep.get(spot, keep_ms), keep_ms)
    series = tuple(
        Series(where, lifetime, width, keep[where, lifetime, width], tuple(cols))
        for (where, lifetime, width), cols in columns.items()
    )
    inputs = tuple(dict.fromkeys(c.field for s in series for c in s.columns if c.field is not None))

    series_rows: list[list[int]] = []
    column_rows: list[list[int]] = []
    row_words = ROW_HEADER_WORDS + len(wheres)
    for one in series:
        tile_words = TILE_HEADER_WORDS + one.words
        series_rows.append(
            [
                one.lifetime,
                one.where,
                one.width_ms,
                one.keep_ms,
                row_words,
                tile_words,
                len(column_rows),
                len(one.columns),
            ]
        )
        # A lifetime partial stands in the row, behind the time of its newest event.
        row_words += 1 + one.words if one.lifetime else 1
        for column in one.columns:
            field = -1 if column.field is None else inputs.index(column.field)
            column_rows.append([column.operation, field, one.offset(column)])
    return Table(
        number=number,
        source=source,
        key=key,
        wheres=tuple(wheres.values()),
        inputs=inputs,
        series=series,
        row_words=row_words,
        series_program=np.array(series_rows, np.int64),
        column_program=np.array(column_rows, np.int64),
    )


def _spot(where: int, feature: Feature) -> tuple[tuple[int, bool, int], int]:
    """Return the series that a feature belongs to, and how long it wants its tiles kept."""
    window_ms, ttl_ms = feature.aggregation.window_ms, feature.aggregation.ttl_ms
    if window_ms is not None:
        return (where, False, tile_width_ms(window_ms)), window_ms
    # A partial with a ttl starts anew when it has expired, so each ttl has a partial of its own.
    kept = FOR_EVER if ttl_ms is None else ttl_ms
    return (where, True, kept), kept


def _series_of(table: Table, feature: Feature) -> tuple[Series, int]:
    texts = [where_text(w) for w in table.wheres]
    spot, _ = _spot(texts.index(where_text(feature.where)), feature)
    for number, series in enumerate(table.series):
        if (series.where, series.lifetime, series.width_ms) == spot:
            return series, number
    raise AssertionError(f"{feature.full_name} is not of table {table.name}")


def _view_row(table: Table, view: FeatureView) -> list[int]:
    """Return the where of a view, its longest window and its longest ttl: where an entity must have an
    event to be known to it."""
    where = [where_text(w) for w in table.wheres].index(where_text(view.where))
    aggregations = [f.aggregation for f in view]
    windows = [a.window_ms for a in aggregations if a.window_ms is not None]
    ttls = [FOR_EVER if a.ttl_ms is None else a.ttl_ms for a in aggregations if a.window_ms is None]
    window_ms = max(windows, default=0)
    ttl_ms = FOR_EVER if FOR_EVER in ttls else max(ttls, default=0)
    return [where, window_ms, tile_width_ms(window_ms) if window_ms else 1, ttl_ms]


def compile_layout(sources: Iterable[Source], views: Iterable[FeatureView]) -> Layout:
    """Compile sources and views (and the sources of the views) to a layout.

    Raises `DeclarationError` if two share a name, or a key field has two types in the cluster.
    """
    by_name: dict[str, Source] = {}
    all_views = list(views)
    for source in [*sources, *(v.source for v in all_views)]:
        other = by_name.setdefault(source.name, source)
        if other is not source and other != source:
            raise DeclarationError(f"two different sources are named `{source.name}`")
    names: dict[str, FeatureView] = {}
    key_types: dict[str, tuple[str, FeatureView]] = {}
    for view in all_views:
        other_view = names.setdefault(view.name, view)
        if other_view is not view:
            raise DeclarationError(f"two views are named `{view.name}`")
        for field in view.key:
            kind = "string" if view.source.fields[field].type == "string" else "int64"
            known = key_types.setdefault(field, (kind, view))
            if known[0] != kind:
                raise DeclarationError(
                    f"key field `{field}` is {kind} in view `{view.name}` and {known[0]} in view "
                    f"`{known[1].name}`; a key field has one type in a cluster"
                )
    return Layout(list(by_name.values()), list(names.values()))
