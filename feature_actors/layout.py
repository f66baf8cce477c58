"""The layout: views compiled to tables of numbers that the kernels read.

    table    one per (source, key): the entities of that key and everything kept about each
    series   one per (where, tile width, exact) of a table, or (where, ttl) for lifetime features:
             the columns of all its features, side by side in one tile
    scan     one per (series, window) that is read: merges the tiles in the window, once for all
             the features over that window

A layout holds only tuples and arrays, no views and no expressions but the `wheres`; the same layout
compiled anywhere is the same (features are ordered by their identity).

A view that comes while the cluster runs gets a table of its own, behind those that are there (`Layout.extended`):
nothing that was compiled before changes, and plans of before and after read the same memories.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from millpond.feature_actors.aggregations import AGGREGATIONS, PARTS, Aggregation, Column, Input, where_text
from millpond.feature_actors.errors import DeclarationError, NotFound, Unavailable, did_you_mean
from millpond.feature_actors.source import Source
from millpond.feature_actors.tiles.memory import MEMORY_HEADER_WORDS
from millpond.feature_actors.tiles.program import (
    FOR_EVER,
    NO,
    P_SLOTS_AT,
    S_COLUMN,
    PackedProgram,
    ReadProgram,
    TableProgram,
)
from millpond.feature_actors.tiles.structure import (
    BLOCK_ITEMS_MIN,
    BLOCK_WORDS_MAX,
    EXACT_TILE_HEADER_WORDS,
    H_POOLS,
    LINE_WORDS,
    POOL_WORDS,
    ROW_HEADER_WORDS,
    TILE_HEADER_WORDS,
)
from millpond.feature_actors.view import Feature, FeatureView, fields_in, fields_of
from millpond.feature_actors.windows import exact_past_ms, tile_width_ms

__all__ = [
    "KEYS_MAX",
    "Layout",
    "PlanProgram",
    "Series",
    "Table",
    "compile_layout",
    "identity_of",
    "same_view",
    "version_name",
]

Words = npt.NDArray[np.int64]

#: How many keys the views of a source may have together: a record says in 32 bits of an event whether it was new at its
#: home, and by which keys it was applied.
KEYS_MAX = 31

#: What makes a series: where, whether lifetime, tile width (or ttl), whether exact.
Spot = tuple[int, bool, int, bool]


@dataclass(frozen=True)
class Series:
    """Tiles of one width (or one lifetime partial) with the columns of several features."""

    where: int
    lifetime: bool
    width_ms: int
    exact: bool
    keep_ms: int
    columns: tuple[Column, ...]

    @property
    def spot(self) -> Spot:
        return self.where, self.lifetime, self.width_ms, self.exact

    def offset(self, column: Column) -> int:
        """Return the place of a column in the partial, in words."""
        return sum(c.words for c in self.columns[: self.columns.index(column)])

    @property
    def words(self) -> int:
        return sum(c.words for c in self.columns)

    @property
    def row_words(self) -> int:
        """Words in an entity's row, of a lifetime series; a ring of tiles has half a word there."""
        return (self.words + (self.keep_ms != FOR_EVER)) if self.lifetime else 0

    @property
    def tile_words(self) -> int:
        return self.words + (EXACT_TILE_HEADER_WORDS if self.exact else TILE_HEADER_WORDS)

    @property
    def fine_words(self) -> int:
        return self.words + TILE_HEADER_WORDS


@dataclass(frozen=True, eq=False)
class Table:
    """Everything kept about the entities of one (source, key).

    wheres: the conditions of its features; wheres[0] is None, "every event".
    inputs: what its columns look at, in the order of the input matrix.
    slot_words: of a slot's header; pool_items: words of an item of each of its pools; reserve_words: what an event may
    need at most.
    views_keep_ms: how long after its last event an entity can be known to a view, or `FOR_EVER`.
    added: identity of the one view that it is of, if that came while the cluster ran; "" if it was there at the start.
    routed: whether events are brought here for its key; else it shares the route of another table of source and key.
    key_number: of a key that came while the cluster ran, counted from 1; 0 if events were brought here from the start.
    """

    number: int
    source: Source
    key: tuple[str, ...]
    wheres: tuple[pc.Expression | None, ...]
    inputs: tuple[Input, ...]
    series: tuple[Series, ...]
    row_words: int
    slot_words: int
    pool_items: tuple[int, ...]
    reserve_words: int
    views_keep_ms: int
    words_before: int
    series_program: Words
    column_program: Words
    added: str = ""
    routed: bool = True
    key_number: int = 0
    _programs: dict[int, TableProgram] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        of_view = f" {self.added}" if self.added else ""
        return f"{self.source.name}[{', '.join(self.key)}]{of_view}"

    @property
    def reads(self) -> set[str]:
        """The fields that it looks at, in its conditions, too."""
        return fields_of(self.source, self.inputs) | fields_in(self.source, self.wheres)

    @property
    def tiled(self) -> bool:
        """Whether any feature has a window."""
        return any(not s.lifetime for s in self.series)

    @property
    def pools(self) -> int:
        """Number of pools of tiles."""
        return sum(0 if s.lifetime else 1 + s.exact for s in self.series)

    def slots_at(self, n_slots: int) -> int:
        """Return the address of the table's first slot header; `words_before` are of tables before it."""
        return MEMORY_HEADER_WORDS + n_slots * self.words_before

    def program(self, n_slots: int) -> TableProgram:
        """Return the arrays for the kernels that write."""
        if n_slots not in self._programs:
            numbers = [self.slots_at(n_slots), self.slot_words, self.row_words, len(self.wheres), self.reserve_words]
            self._programs[n_slots] = TableProgram(
                np.array(numbers, np.int64), self.series_program, self.column_program
            )
        return self._programs[n_slots]


@dataclass(frozen=True, eq=False)
class PlanProgram:
    """How to read some features, of any tables, into one row of a matrix.

    width: columns of the matrix; texts: those of strings, which hold addresses, with the number of their key.
    A part is what is read of one of the `tables`: the number of its key, and which columns and views are its own are in
    key_of_part, columns_of_part, views_of_part. view_names: the views that tell whether they know the entity.
    wire_names: the features, as `Layout.wire_feature` takes them. past_ms: how long ago it may be read as of.
    """

    width: int
    texts: tuple[tuple[int, int], ...]
    key_of_part: tuple[int, ...]
    columns_of_part: tuple[Words, ...]
    views_of_part: tuple[Words, ...]
    past_ms: int
    keys: tuple[tuple[str, ...], ...]
    tables: tuple[Table, ...]
    view_names: tuple[str, ...]
    wire_names: tuple[str, ...]
    layout_digest: int
    _parts: Words
    _rest: tuple[Words, Words, Words, Words, Words, int, int, int, int]

    @cached_property
    def plans(self) -> Words:
        """For the kernels that read: all ids are of this plan."""
        return np.array([[0, self.parts]], np.int64)

    @cached_property
    def parts(self) -> int:
        """How many parts it has; of several plans, most of one."""
        return len(self._parts) - 1

    @cached_property
    def widths(self) -> tuple[int, int, int]:
        """Of an answer to it: columns, views, and what is traced, see `read_rows`."""
        return self.width, len(self.view_names), 1 + self.parts

    _programs: dict[int, PackedProgram] = field(default_factory=dict, repr=False)

    def packed(self, n_slots: int) -> PackedProgram:
        """Return the arrays for the kernels that read."""
        if n_slots not in self._programs:
            parts = self._parts.copy()
            parts[:-1, P_SLOTS_AT] = [table.slots_at(n_slots) for table in self.tables]
            self._programs[n_slots] = PackedProgram(ReadProgram(parts, *self._rest))
        return self._programs[n_slots]


class Layout:
    """All sources and views of a cluster, compiled."""

    def __init__(self, sources: Sequence[Source], views: Sequence[FeatureView]) -> None:
        self.sources = {s.name: s for s in sources}
        #: By name; of those that have changed while the cluster ran, the newest.
        self.views = {v.name: v for v in views}
        #: All of them by what is kept for them, see `identity_of`; of one name there may be several.
        self.kept_views = {identity_of(v): v for v in views}
        self.tables: list[Table] = []
        self._conditions: dict[str, dict[str, pc.Expression]] = {}
        self._table_numbers: dict[tuple[str, tuple[str, ...]], int] = {}
        #: Of the views that have a table of their own, by identity.
        self._added_numbers: dict[str, int] = {}
        #: Source and key of the routes that came while the cluster ran.
        self.added_keys: tuple[tuple[str, tuple[str, ...]], ...] = ()
        grouped: dict[tuple[str, tuple[str, ...]], list[FeatureView]] = {}
        for view in views:
            grouped.setdefault((view.source.name, tuple(view.key)), []).append(view)
        for (source, key), its_views in sorted(grouped.items(), key=lambda item: item[0]):
            self._check_route(source, its_views[0])
            self._table_numbers[source, key] = len(self.tables)
            self.tables.append(_compile_table(len(self.tables), self.sources[source], key, its_views, self.slot_words))
        self._join_programs()

    def _join_programs(self) -> None:
        """Put the series of all tables together, that every plan refers to."""
        self._series_before = np.cumsum([0, *(len(t.series) for t in self.tables)]).tolist()
        series, columns_before = [], 0
        for table in self.tables:
            of_table = table.series_program.copy()
            of_table[:, S_COLUMN] += columns_before
            columns_before += len(table.column_program)
            series.append(of_table)
        columns = [table.column_program for table in self.tables]
        self._series_columns = (
            np.concatenate([_Lines(11).array, *series]),
            np.concatenate([_Lines(7).array, *columns]),
        )

    @property
    def slot_words(self) -> int:
        """Words of the headers that a slot has, of all tables together."""
        return sum(table.slot_words for table in self.tables)

    def extended(
        self, views: Iterable[FeatureView], failed: Container[str] = (), superseded: Container[str] = ()
    ) -> Layout:
        """Return this layout with a table for each of `views` behind its own, which stay what and where they are.

        A view of a name that is taken is a new version of it: plans go on reading the one that they were made of.
        failed: the identities of views whose tables only keep the place of others: nobody reads them. superseded: of
        those that do not go by their name any more.

        Where nothing was kept by its key, events are brought to that from now on, see `added_keys`.

        Raises `DeclarationError` for a view that cannot be added: it is kept already, its source is another here or has
        too many keys, or a field of its key has another type in another key.
        """
        other = copy.copy(self)
        other.views, other.tables, other.kept_views = dict(self.views), list(self.tables), dict(self.kept_views)
        other._added_numbers = dict(self._added_numbers)
        for view in views:
            identity = identity_of(view)
            self._check_addable(view, identity, other.kept_views)
            other._added_numbers[identity] = number = len(other.tables)
            source, key = self.sources[view.source.name], tuple(view.key)
            routed, key_number = other._route_of(source.name, key, view)
            table = _compile_table(number, source, key, [view], other.slot_words, added=identity)
            other.tables.append(replace(table, routed=routed, key_number=key_number))
            if identity not in failed:
                other.kept_views[identity] = view
                if identity not in superseded:
                    other.views[view.name] = view
        other._join_programs()
        return other

    def version_of(self, view: FeatureView, features: Iterable[Feature]) -> FeatureView | None:
        """Return the version of a view, of those that are kept, that some of its features are read from: the very same,
        or the first that has them all. None if there is none."""
        if (same := self.kept_views.get(identity_of(view))) is not None:
            return same
        names = {f.wire_name for f in features if f.derived is None}
        for kept in (one for one in self.kept_views.values() if one.name == view.name):
            alike = (kept.source.name, kept.key) == (view.source.name, view.key)
            if alike and where_text(kept.where) == where_text(view.where) and names <= {f.wire_name for f in kept}:
                return kept
        return None

    def check_alike(self, source: Source, subject: str) -> None:
        """Raise `DeclarationError` about `subject` if another source goes by the name of this one here."""
        if self.sources.get(source.name, source) != source:
            raise DeclarationError(
                f"{subject}: source `{source.name}` is declared otherwise than the cluster has it; declare it word for "
                "word, or start the cluster with the definition"
            )

    def _check_addable(self, view: FeatureView, identity: str, kept: Mapping[str, FeatureView]) -> None:
        if identity in kept:
            raise DeclarationError(f"view `{view.name}`: the cluster keeps it already")
        self.check_alike(view.source, f"view `{view.name}`")
        if view.source.name not in self.sources:
            raise DeclarationError(
                f"view `{view.name}`: the cluster has no source `{view.source.name}`"
                + did_you_mean(view.source.name, self.sources)
                + "; start the cluster with the definition"
            )
        for one in kept.values():
            if one.name == view.name and (one.source.name, one.key) != (view.source.name, view.key):
                raise DeclarationError(
                    f"view `{view.name}`: the cluster keeps it of source `{one.source.name}` by {', '.join(one.key)}; "
                    "of another source or key it is another view: give it another name"
                )
        kinds = {name: (_key_kind(one, name), one) for one in kept.values() for name in one.key}
        for name in view.key:
            kind, one = kinds.get(name, ("", view))
            if kind and kind != _key_kind(view, name):
                raise _two_kinds(name, view, one)

    def _route_of(self, source: str, key: tuple[str, ...], view: FeatureView) -> tuple[bool, int]:
        """Return whether a table brings a new route for its key, which is taken down, and the key's number."""
        if (source, key) in self._table_numbers:
            return False, 0
        if (source, key) in self.added_keys:
            return False, 1 + self.added_keys.index((source, key))
        self._check_route(source, view)
        self.added_keys += ((source, key),)
        return True, len(self.added_keys)

    def _check_route(self, source: str, view: FeatureView) -> None:
        """Raise `DeclarationError` about a view whose key would be one too many for its source."""
        if sum(of == source for of, _ in (*self._table_numbers, *self.added_keys)) >= KEYS_MAX:
            raise DeclarationError(
                f"view `{view.name}`: with {', '.join(view.key)} source `{source}` has more than {KEYS_MAX} keys, "
                "which is as many as its views may have together; give it one of theirs, or another source"
            )

    @cached_property
    def digest(self) -> int:
        """A number that two layouts share only if memories of the one can be read by the other.

        Tables that were added change nothing of it: a memory has room for them, and who reads one makes sure that it
        is there.
        """
        content = [
            (
                t.name,
                [where_text(w) for w in t.wheres],
                [i.text for i in t.inputs],
                t.series_program.tolist(),
                t.column_program.tolist(),
            )
            for t in self.tables
            if not t.added
        ]
        return int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:8], "little") >> 1

    def tables_of(self, source: str) -> list[Table]:
        return [t for t in self.tables if t.source.name == source]

    def table_of(self, view: FeatureView) -> Table:
        number = self._added_numbers.get(identity_of(view)) if self._added_numbers else None
        return self.tables[self._table_numbers[view.source.name, tuple(view.key)] if number is None else number]

    def conditions(self, source: str) -> dict[str, pc.Expression]:
        """Return the conditions of the views and features of a source, by their text: an event for which one of them
        cannot be computed is refused. Those of added tables just do not hold then, see `holds`."""
        if source not in self._conditions:
            tables = [t for t in self.tables_of(source) if not t.added]
            wheres = [w for t in tables for w in (*t.wheres, *(i.condition for i in t.inputs)) if w is not None]
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

    def kept_in(self, feature: Feature) -> tuple[Series, int, int]:
        """Return the series that a feature is read from, its number in the table, and how long the feature needs its
        tiles kept, in ms."""
        series, number = _series_of(self.table_of(feature.view), feature)
        return series, number, _spot(series.where, feature.kept)[1]

    def wire_feature(self, name: str) -> Feature:
        """Return a feature by `view.feature#id`, with `@identity` of the view behind it if that has a table of its own.

        Raises `Unavailable` if it is not kept.
        """
        of_view, _, identity = name.partition("@")
        view, feature = of_view.partition("#")[0].split(".")
        base = (one for i, one in self.kept_views.items() if one.name == view and i not in self._added_numbers)
        known = self.kept_views.get(identity) if identity else next(base, None)
        if known is None or feature not in known.features or known[feature].wire_name != of_view:
            raise Unavailable(f"feature `{view}.{feature}` is defined otherwise on the shard", retry_after_ms=1_000)
        return known[feature]

    def _table_of(self, view: FeatureView, features: Iterable[Feature]) -> Table:
        kept = self.version_of(view, [f for f in features if f.view.name == view.name])
        if kept is None:
            raise DeclarationError(
                f"view `{view.name}`: the cluster keeps no version of it that has the features that are read; deploy "
                "the definition, or start the cluster with it"
            )
        return self.table_of(kept)

    def plan_program(self, features: Sequence[Feature]) -> PlanProgram:
        """Compile the reading of `features`, in the order of the matrix's columns; none of them is derived.

        Raises `DeclarationError` for a view of which no version that is kept has them.
        """
        first = np.cumsum([0, *(f.kept.width for f in features)]).tolist()
        views = {f.view.name: f.view for f in features}
        keys = tuple(dict.fromkeys(tuple(v.key) for v in views.values()))
        table_of = {name: self._table_of(view, features) for name, view in views.items()}
        tables = list({t.number: t for t in table_of.values()}.values())
        parts: list[list[int]] = []
        scan_rows, feature_rows, view_rows = _Lines(2), _Lines(8), _Lines(7)
        for table in tables:
            parts.append([
                0, table.slot_words, table.row_words, keys.index(table.key), len(scan_rows), len(feature_rows),
                len(view_rows),
            ])  # fmt: skip
            series_before, scans_before = self._series_before[table.number], len(scan_rows)
            scans: dict[tuple[int, int], int] = {}
            rows = []
            for feature, out in zip(features, first, strict=False):
                if table_of[feature.view.name] is table:
                    series, number = _series_of(table, feature)
                    window_ms = feature.kept.window_ms
                    pair = (series_before + number, FOR_EVER if window_ms is None else window_ms)
                    scan = scans.setdefault(pair, scans_before + len(scans))
                    offsets = [series.offset(c) for c in feature.kept.columns]
                    number = AGGREGATIONS.index(type(feature.kept))
                    n = feature.kept.columns[0].n
                    rows.append([
                        scan, number, offsets[0], offsets[-1], n, feature.kept.setting, feature.kept.width, out,
                    ])  # fmt: skip
            scan_rows += [list(pair) for pair in scans]
            feature_rows += sorted(rows)  # features of one scan stand together, so that each scan is made once
            for out, view in enumerate(views.values()):
                if table_of[view.name] is table:
                    view_rows.append([*_view_row(table, view, series_before), out])
        parts.append([0, 0, 0, 0, len(scan_rows), len(feature_rows), len(view_rows)])
        exact = all(f.kept.exact for f in features)
        past_ms = min((exact_past_ms(f.kept.window_ms or 0) for f in features), default=0) if exact else 0
        words = max((s.words for t in tables for s in t.series), default=0) + 2
        columns = [(out + k, f) for f, out in zip(features, first, strict=False) for k in range(f.width)]
        return PlanProgram(
            width=first[-1],
            texts=tuple((column, keys.index(tuple(f.view.key))) for column, f in columns if f.is_text),
            key_of_part=tuple(keys.index(table.key) for table in tables),
            columns_of_part=tuple(
                np.array([column for column, f in columns if table_of[f.view.name] is table]) for table in tables
            ),
            views_of_part=tuple(
                np.array([v for v, of in enumerate(table_of.values()) if of is table]) for table in tables
            ),
            past_ms=past_ms,
            keys=keys,
            tables=tuple(tables),
            view_names=tuple(views),
            wire_names=tuple(_wire_name(f, table_of[f.view.name]) for f in features),
            layout_digest=self.digest,
            _parts=np.array(parts, np.int64),
            _rest=(
                *self._series_columns, scan_rows.array, feature_rows.array, view_rows.array, past_ms, words,
                len(parts) - 1, len(scan_rows),
            ),
        )  # fmt: skip


class _Lines(list[list[int]]):
    """Lines of a program, all of one length."""

    def __init__(self, length: int) -> None:
        self._length = length

    @property
    def array(self) -> Words:
        return np.array(self, np.int64).reshape(-1, self._length)


def _compile_table(
    number: int,
    source: Source,
    key: tuple[str, ...],
    views: Sequence[FeatureView],
    words_before: int,
    added: str = "",
) -> Table:
    # A feature stands for all of its identity; the views of one may have other conditions of their own.
    by_id = {f.id: f for v in views for f in v if f.derived is None}
    features = [by_id[i] for i in sorted(by_id)]
    wheres: dict[str, pc.Expression | None] = {"": None}
    for feature in features:
        wheres.setdefault(where_text(feature.where), feature.where)
    of_views = {where_text(v.where): v.where for v in views}
    for text in sorted(of_views):
        wheres.setdefault(text, of_views[text])
    where_numbers = {text: i for i, text in enumerate(wheres)}

    columns: dict[Spot, dict[Column, None]] = {}
    keep: dict[Spot, int] = {}
    for feature in features:
        spot, keep_ms = _spot(where_numbers[where_text(feature.where)], feature.kept)
        columns.setdefault(spot, {}).update(dict.fromkeys(feature.kept.columns))
        keep[spot] = max(keep.get(spot, keep_ms), keep_ms)
    # Whether a view knew an entity at a time before its newest event is asked of exact tiles of all its events.
    for where, longest in sorted({(where_text(v.where), e) for v in views if (e := _longest_exact(v)) is not None}):
        spot = (where_numbers[where], False, tile_width_ms(longest), True)
        columns.setdefault(spot, {})
        keep[spot] = max(keep.get(spot, 0), longest + exact_past_ms(longest))
    series = tuple(Series(*spot, keep[spot], tuple(columns[spot])) for spot in columns)
    inputs = tuple(dict.fromkeys(one for s in series for c in s.columns for one in c.inputs))

    series_rows, column_rows = _Lines(11), _Lines(7)
    halves_at = 2 * (ROW_HEADER_WORDS + len(wheres))
    row_words = ROW_HEADER_WORDS + len(wheres) + (sum(not s.lifetime for s in series) + 1) // 2
    pool = H_POOLS + POOL_WORDS
    item_words = []
    for one in series:
        pool_at, fine_pool_at = pool, pool + POOL_WORDS if one.exact else NO
        if one.lifetime:
            row_at, pool_at = row_words, NO
            row_words += one.row_words
        else:
            row_at = halves_at
            halves_at += 1
            item_words += [one.tile_words, *([one.fine_words] if one.exact else [])]
            pool += POOL_WORDS * (1 + one.exact)
        series_rows.append([
            one.lifetime, one.exact, one.where, one.width_ms, one.keep_ms, row_at, one.tile_words, pool_at,
            fine_pool_at, len(column_rows), len(one.columns),
        ])  # fmt: skip
        for column in one.columns:
            of = 0 if column.input is None else inputs.index(column.input)
            by = NO if column.by is None else inputs.index(column.by)
            column_rows.append([
                PARTS.index(column.part), column.part.takes_input, of, by, one.offset(column), column.n, column.setting,
            ])  # fmt: skip
    item_words.insert(0, row_words)
    return Table(
        number=number,
        source=source,
        key=key,
        wheres=tuple(wheres.values()),
        inputs=inputs,
        series=series,
        row_words=row_words,
        slot_words=(pool + LINE_WORDS - 1) // LINE_WORDS * LINE_WORDS,
        pool_items=tuple(item_words),
        reserve_words=sum(max(BLOCK_WORDS_MAX, BLOCK_ITEMS_MIN * words) + LINE_WORDS for words in item_words),
        views_keep_ms=_views_keep_ms(views),
        words_before=words_before,
        series_program=series_rows.array,
        column_program=column_rows.array,
        added=added,
    )


def _spot(where: int, aggregation: Aggregation) -> tuple[Spot, int]:
    """Return the series that an aggregation belongs to, and how long it wants its tiles kept."""
    window_ms, ttl_ms, exact = aggregation.window_ms, aggregation.ttl_ms, aggregation.exact
    if window_ms is not None:
        past_ms = exact_past_ms(window_ms) if exact else 0
        assert aggregation.tile_width_ms is not None
        return (where, False, aggregation.tile_width_ms, exact), window_ms + past_ms
    # A partial with a ttl starts anew when it has expired, so each ttl has a partial of its own.
    kept = FOR_EVER if ttl_ms is None else ttl_ms
    return (where, True, kept, False), kept


def _series_of(table: Table, feature: Feature) -> tuple[Series, int]:
    texts = [where_text(w) for w in table.wheres]
    spot, _ = _spot(texts.index(where_text(feature.where)), feature.kept)
    for number, series in enumerate(table.series):
        if series.spot == spot:
            return series, number
    raise AssertionError(f"{feature.full_name} is not of table {table.name}")


def _longest_exact(view: FeatureView) -> int | None:
    """Return the longest exact window of a view, in ms."""
    windows = [f.kept.window_ms for f in view if f.derived is None and f.kept.exact]
    return max((w for w in windows if w is not None), default=None)


def _longest(view: FeatureView) -> tuple[int, int, int]:
    """Return the longest window of a view that is not exact, the widest tiles that it is kept in, and the view's
    longest ttl; `NO` where there is none."""
    kept = [f.kept for f in view if f.derived is None]
    windows = [(a.window_ms, a.tile_width_ms or 1) for a in kept if a.window_ms is not None and not a.exact]
    ttls = [FOR_EVER if a.ttl_ms is None else a.ttl_ms for a in kept if a.window_ms is None]
    return *max(windows, default=(NO, 1)), FOR_EVER if FOR_EVER in ttls else max(ttls, default=NO)


def _view_row(table: Table, view: FeatureView, series_before: int) -> list[int]:
    """Return where an entity must have an event to be known to a view, see `program`."""
    where = [where_text(w) for w in table.wheres].index(where_text(view.where))
    window_ms, width_ms, ttl_ms = _longest(view)
    exact_ms = _longest_exact(view)
    if exact_ms is None:
        return [where, window_ms, width_ms, NO, NO, ttl_ms]
    spot = (where, False, tile_width_ms(exact_ms), True)
    exact_series = [s.spot for s in table.series].index(spot)
    return [where, window_ms, width_ms, exact_ms, series_before + exact_series, ttl_ms]


def _views_keep_ms(views: Sequence[FeatureView]) -> int:
    """Return how long after its last event an entity can be known to one of the views, also when asked of the past."""
    keep = [0]
    for view in views:
        (window_ms, width_ms, ttl_ms), exact_ms = _longest(view), _longest_exact(view) or 0
        if ttl_ms == FOR_EVER:
            return FOR_EVER
        past_ms = exact_past_ms(exact_ms)
        keep += [ttl_ms + past_ms, exact_ms + past_ms]
        if window_ms != NO:
            keep.append(window_ms + width_ms + past_ms)
    return max(keep)


def identity_of(view: FeatureView) -> str:
    """Return the name of a view and a digest of what is kept for it, `name#digest`."""
    content = [sorted(f.id for f in view if f.derived is None), where_text(view.where)]
    return f"{view.name}#{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}"


def version_name(view: FeatureView) -> str:
    """Return what tells a version of a view from the others of its name."""
    return identity_of(view).partition("#")[2]


def _wire_name(feature: Feature, table: Table) -> str:
    return f"{feature.wire_name}@{table.added}" if table.added else feature.wire_name


def same_view(one: FeatureView, other: FeatureView) -> bool:
    """Return whether two views are one: the same object, or declared alike in two files."""

    def content(view: FeatureView) -> list[object]:
        features = [(f.wire_name, f.derived and f.derived.of) for f in view]
        return [view.owner, view.source, tuple(view.key), where_text(view.where), features]

    return one is other or content(one) == content(other)


def compile_layout(sources: Iterable[Source], views: Iterable[FeatureView]) -> Layout:
    """Compile sources and views (and the sources of the views) to a layout.

    Raises `DeclarationError` if two share a name, a source has more than `KEYS_MAX` keys, or a key field has two types
    in the cluster.
    """
    by_name: dict[str, Source] = {}
    all_views = list(views)
    for source in [*sources, *(v.source for v in all_views)]:
        other = by_name.setdefault(source.name, source)
        if other is not source and other != source:
            raise DeclarationError(f"two different sources are named `{source.name}`")
    names: dict[str, FeatureView] = {}
    key_types: dict[str, FeatureView] = {}
    for view in all_views:
        other_view = names.setdefault(view.name, view)
        if not same_view(view, other_view):
            raise DeclarationError(
                f"two different views are named `{view.name}`; files that share a view declare it word for word"
            )
        for name in view.key:
            known = key_types.setdefault(name, view)
            if _key_kind(known, name) != _key_kind(view, name):
                raise _two_kinds(name, view, known)
    return Layout(list(by_name.values()), list(names.values()))


def _key_kind(view: FeatureView, name: str) -> str:
    return "string" if view.source.fields[name].type == "string" else "int64"


def _two_kinds(name: str, view: FeatureView, other: FeatureView) -> DeclarationError:
    return DeclarationError(
        f"key field `{name}` is {_key_kind(view, name)} in view `{view.name}` and {_key_kind(other, name)} in view "
        f"`{other.name}`; a key field has one type in a cluster"
    )
