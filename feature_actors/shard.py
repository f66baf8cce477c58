"""A shard: the features of all entities whose keys fall into its slots. A plain class.

No Ray, no threads, no clock: time comes with the events and with the reads. The actor in `actor`
holds one of these; so does a unit test, and a training set.

An event passes a shard in two steps, each safe to repeat:

    admit   at the event id's home slot: new, duplicate, or conflict (same id, other content)
    apply   at the slot of each view's entity key: dropped if this slot has it, else into the tiles

so a request that failed halfway can be sent again: what was applied is a duplicate there, and what
was not is applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.dedupe import CONFLICT, NEW, IdFilter
from millpond.feature_actors.kernels import NEVER
from millpond.feature_actors.keys import Hashes, hash_columns, owned, slots_of
from millpond.feature_actors.layout import Layout, Table
from millpond.feature_actors.plan import ShardAnswer, ShardQuestion, as_of_in_past
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles import SlotTiles
from millpond.feature_actors.view import mask_of

__all__ = ["Shard", "ShardStatus"]

Ints = npt.NDArray[np.int64]


#: No slot: its tiles stay empty, to read the features of an unknown entity from.
_NOWHERE = -1
_NO_ROWS = np.empty(0, np.int64)
_NO_INPUTS, _NO_MASKS = np.empty((0, 0)), np.empty((0, 0), np.bool_)


@dataclass(frozen=True)
class _Route:
    """What of a batch goes to one table: hashes int64 [n, 2] of all keys, the rows to apply by slot,
    inputs float64 [fields, n], masks bool [wheres, n]."""

    hashes: Ints
    rows_by_slot: list[tuple[int, Ints]]
    inputs: npt.NDArray[np.float64]
    masks: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardStatus:
    """What a shard holds: events applied and entities known by table, bytes of arrays allocated."""

    shard: int
    slots: int
    events: dict[str, int]
    entities: dict[str, int]
    tiles: int
    tile_bytes: int
    filter_bytes: int
    newest_arrival_ms: int | None


class Shard:
    """Number `number` of the shards in `shard_map`.

    seed: the cluster's own seed of the index.
    dedupe_horizon_ms: how long an event id is remembered after it was received.
    """

    def __init__(
        self,
        layout: Layout,
        shard_map: ShardMap,
        number: int,
        *,
        seed: int = 0,
        dedupe_horizon_ms: int = 86_400_000,
    ) -> None:
        self._layout = layout
        self._map = shard_map
        self._number = number
        self._seed = seed
        self._dedupe_horizon_ms = dedupe_horizon_ms
        self._owned = np.array([owner == number for owner in shard_map.owners], np.bool_)
        self._tiles: dict[tuple[int, int], SlotTiles] = {}
        self._homes: dict[tuple[str, int], IdFilter] = {}
        self._filters: dict[tuple[int, int], IdFilter] = {}
        self._events = {t.name: 0 for t in layout.tables}
        self._newest_arrival_ms = NEVER

    # -- events

    def admit(self, source: str, ids: Hashes, contents: Ints, received_ms: int) -> npt.NDArray[np.uint8]:
        """Judge event ids whose home is here: uint8 [n] of `NEW`, `DUPLICATE`, `CONFLICT`.

        ids uint64 [n, 2]: hashes of the event ids; contents int64 [n]: hashes of the whole events;
        received_ms: when the request came, by which ids are remembered.
        """
        ids, contents = owned(ids), owned(contents)
        verdicts = np.zeros(len(ids), np.uint8)
        for slot, rows in self._by_slot(ids, np.arange(len(ids))):
            home = self._homes.get((source, slot))
            if home is None:
                home = self._homes[source, slot] = IdFilter(self._dedupe_horizon_ms, self._seed)
            home.admit(rows, ids.view(np.int64), contents, received_ms, verdicts)
        return verdicts

    def ingest(
        self, source: str, ids: Hashes, contents: Ints, batch: pa.RecordBatch, arrivals: Ints, received_ms: int
    ) -> npt.NDArray[np.uint8]:
        """Admit events whose home is here, all of them, and apply what is no conflict: both steps in one."""
        verdicts = self.admit(source, ids, contents, received_ms)
        if (conflicts := verdicts == CONFLICT).any():
            kept = np.flatnonzero(~conflicts)
            batch, arrivals = batch.take(pa.array(kept)), arrivals[kept]
        self.apply(source, batch, arrivals, received_ms)
        return verdicts

    def apply(self, source: str, batch: pa.RecordBatch, arrivals: Ints, received_ms: int) -> None:
        """Apply those routes of the events that are of this shard, in the order of the batch.

        batch: of the source's schema; arrivals int64 [n], or one more, which only moves the clock;
        received_ms as in `admit`.
        """
        if len(arrivals):
            self._newest_arrival_ms = max(self._newest_arrival_ms, int(arrivals.max()))
        declared = self._layout.source(source)
        times = owned(batch.column(declared.event_time).cast(pa.int64()).to_numpy())
        arrivals = owned(arrivals)
        ids = None
        if declared.event_id is not None and batch.num_rows:
            ids = hash_columns([batch.column(declared.event_id)], batch.num_rows)
        for table in self._layout.tables_of(source):
            route = self._route(table, batch, received_ms, ids)
            for slot, rows in route.rows_by_slot:
                self._tiles_of(table.number, slot).apply(rows, route.hashes, times, arrivals, route.inputs, route.masks)

    def _route(self, table: Table, batch: pa.RecordBatch, received_ms: int, ids: Hashes | None) -> _Route:
        """Return what of a batch goes to this shard's slots of a table, duplicates dropped."""
        keys = [batch.column(name) for name in table.key]
        hashes = hash_columns(keys, batch.num_rows)
        keyed = np.flatnonzero(key_validity(keys, batch.num_rows))
        route_ids = None if ids is None else (ids + hashes[:, ::-1]).view(np.int64)
        by_slot = list(self._by_slot(hashes, keyed))
        if not by_slot:
            return _Route(hashes.view(np.int64), [], _NO_INPUTS, _NO_MASKS)
        # What an event can make fail comes before the filter, which takes an event for applied once it has
        # seen it. What is left is running out of memory, after which the actor refuses everything.
        inputs, masks = _inputs(table, batch), _masks(table, batch)
        rows_by_slot = []
        for slot, rows in by_slot:
            if route_ids is not None:
                seen = self._filters.get((table.number, slot))
                if seen is None:
                    seen = self._filters[table.number, slot] = IdFilter(self._dedupe_horizon_ms, self._seed)
                verdicts = np.zeros(batch.num_rows, np.uint8)
                seen.admit(rows, route_ids, np.zeros(batch.num_rows, np.int64), received_ms, verdicts)
                rows = rows[verdicts[rows] == NEW]
            self._events[table.name] += len(rows)
            rows_by_slot.append((slot, rows))
        return _Route(hashes.view(np.int64), rows_by_slot, inputs, masks)

    def _tiles_of(self, table: int, slot: int) -> SlotTiles:
        tiles = self._tiles.get((table, slot))
        if tiles is None:
            tiles = self._tiles[table, slot] = SlotTiles(self._layout.tables[table], self._seed)
        return tiles

    def _by_slot(self, hashes: Hashes, rows: Ints) -> Iterator[tuple[int, Ints]]:
        """Yield (slot, rows of it in order) for the slots of this shard."""
        slots = slots_of(hashes, self._map.n_slots)[rows]
        if len(rows) == 1:
            if self._owned[slots[0]]:
                yield int(slots[0]), rows
            return
        mine = self._owned[slots]
        rows, slots = rows[mine], slots[mine]
        order = np.argsort(slots, kind="stable")
        rows, slots = rows[order], slots[order]
        bounds = np.flatnonzero(np.diff(slots, prepend=-1, append=-1))
        for start, stop in pairwise(bounds.tolist()):
            yield int(slots[start]), rows[start:stop]

    # -- reads

    def read(self, question: ShardQuestion) -> ShardAnswer:
        """Read what this shard has of the asked entities; see `plan.ShardQuestion`.

        Raises `AsOfInPast` if an explicit as-of lies before an event applied to the rows read, or
        before the cluster's clock.
        """
        n = question.n
        if question.clock is None:
            as_of = np.full(n, self._newest_arrival_ms, np.int64)
        else:
            as_of = question.clock.copy()
        found: list[Ints] = []
        for part in question.parts:
            rows = np.full(n, -1, np.int64)
            for slot, which in self._by_slot(part.hashes, part.which):
                tiles = self._tiles.get((part.program.table, slot))
                if tiles is not None:
                    tiles.find(part.hashes.view(np.int64), which, rows, as_of)
            found.append(rows)
        if question.as_of is not None:
            if (past := np.flatnonzero(question.as_of < as_of)).size:
                raise as_of_in_past(int(question.as_of[past[0]]), int(as_of[past[0]]))
            as_of = question.as_of
        matrices, knowns = [], []
        for part, rows in zip(question.parts, found, strict=True):
            out = np.empty((n, len(part.program.features)), np.float64)
            known = np.zeros((n, len(part.program.views)), np.bool_)
            for slot, which in self._by_slot(part.hashes, part.which):
                tiles = self._tiles.get((part.program.table, slot)) or self._tiles_of(part.program.table, _NOWHERE)
                tiles.read(part.program, which, rows, as_of, out, known)
            matrices.append(out[part.which])
            knowns.append(known[part.which])
        return ShardAnswer(as_of, tuple(matrices), tuple(knowns))

    def join(self, question: ShardQuestion, events: Mapping[str, tuple[pa.RecordBatch, Ints]]) -> ShardAnswer:
        """Answer a question while the events come in: the point-in-time join of a training set.

        question.as_of: int64 [n], ascending. events: per source a batch in ascending event time and
        its arrival stamps. Row i is read when every event up to as_of[i] is applied and none after.
        The state is left as after all the events.
        """
        assert question.as_of is not None
        matrices, knowns = [], []
        for part in question.parts:
            table = self._layout.tables[part.program.table]
            batch, arrivals = events[table.source.name]
            times = owned(batch.column(table.source.event_time).cast(pa.int64()).to_numpy())
            arrivals = owned(arrivals)
            ids = (
                None
                if table.source.event_id is None
                else hash_columns([batch.column(table.source.event_id)], len(times))
            )
            route = self._route(table, batch, 0, ids)  # at one moment: every id counts once
            applied = dict(route.rows_by_slot)
            asked = dict(self._by_slot(part.hashes, part.which))
            out = np.empty((question.n, len(part.program.features)), np.float64)
            known = np.zeros((question.n, len(part.program.views)), np.bool_)
            for slot in applied.keys() | asked.keys():
                rows, which = applied.get(slot, _NO_ROWS), asked.get(slot, _NO_ROWS)
                # A stable sort of events before questions: an event at the very as-of is seen.
                order = np.argsort(np.concatenate([times[rows], question.as_of[which]]), kind="stable")
                self._tiles_of(table.number, slot).join(
                    part.program, np.concatenate([rows, ~which])[order], route.hashes, times, arrivals, route.inputs,
                    route.masks, part.hashes.view(np.int64), question.as_of, out, known,
                )  # fmt: skip
            matrices.append(out[part.which])
            knowns.append(known[part.which])
        return ShardAnswer(question.as_of, tuple(matrices), tuple(knowns))

    # -- what it holds

    def status(self) -> ShardStatus:
        entities: dict[str, int] = {t.name: 0 for t in self._layout.tables}
        for (table, _), tiles in self._tiles.items():
            entities[self._layout.tables[table].name] += tiles.entities
        filters = [*self._homes.values(), *self._filters.values()]
        return ShardStatus(
            shard=self._number,
            slots=int(self._owned.sum()),
            events=dict(self._events),
            entities=entities,
            tiles=sum(t.tiles for t in self._tiles.values()),
            tile_bytes=sum(t.allocated_bytes for t in self._tiles.values()),
            filter_bytes=sum(f.allocated_bytes for f in filters),
            newest_arrival_ms=None if self._newest_arrival_ms == NEVER else self._newest_arrival_ms,
        )

    def check(self) -> list[str]:
        """Return what is wrong with the state: an empty list if every invariant holds."""
        wrong = [
            f"table {table} slot {slot}: {problem}"
            for (table, slot), tiles in self._tiles.items()
            for problem in tiles.check()
        ]
        wrong += [f"slot {s} is not of shard {self._number}" for _, s in self._tiles if s >= 0 and not self._owned[s]]
        return wrong


def key_validity(keys: Sequence[pa.Array], n: int) -> npt.NDArray[np.bool_]:
    """Return which of n rows have all their key fields, bool [n]."""
    valid = np.ones(n, np.bool_)
    for key in keys:
        if key.null_count:
            valid &= key.is_valid().to_numpy(zero_copy_only=False)
    return valid


def _inputs(table: Table, batch: pa.RecordBatch) -> npt.NDArray[np.float64]:
    """Return the fields that the table's columns look at, float64 [fields, n], NaN for null."""
    inputs = np.empty((len(table.inputs), batch.num_rows), np.float64)
    for number, name in enumerate(table.inputs):
        column = pc.cast(batch.column(name), pa.float64(), safe=False)
        inputs[number] = column.to_numpy(zero_copy_only=False)
    return inputs


def _masks(table: Table, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Return which events satisfy which of the table's conditions, bool [wheres, n]."""
    masks = np.ones((len(table.wheres), batch.num_rows), np.bool_)
    for number, where in enumerate(table.wheres):
        if where is not None:
            masks[number] = mask_of(where, batch).to_numpy(zero_copy_only=False)
    return masks
