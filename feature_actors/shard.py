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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.dedupe import NEW, IdFilter
from millpond.feature_actors.kernels import NEVER
from millpond.feature_actors.keys import Hashes, hash_columns, slots_of
from millpond.feature_actors.layout import Layout, ReadProgram, Table
from millpond.feature_actors.plan import ShardAnswer, ShardQuestion, as_of_in_past
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles import SlotTiles
from millpond.feature_actors.view import mask_of

__all__ = ["Shard", "ShardStatus"]

Ints = npt.NDArray[np.int64]


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
    dedupe_horizon_ms: how long an event id is remembered, by arrival stamps.
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

    def admit(self, source: str, ids: Hashes, contents: Ints, arrivals: Ints) -> npt.NDArray[np.uint8]:
        """Judge event ids whose home is here: uint8 [n] of `NEW`, `DUPLICATE`, `CONFLICT`.

        ids uint64 [n, 2]: hashes of the event ids; contents int64 [n]: hashes of the whole events.
        """
        verdicts = np.zeros(len(ids), np.uint8)
        for slot, rows in self._by_slot(ids, np.arange(len(ids))):
            home = self._homes.get((source, slot))
            if home is None:
                home = self._homes[source, slot] = IdFilter(self._dedupe_horizon_ms)
            home.admit(rows, ids.view(np.int64), contents, arrivals, verdicts)
        return verdicts

    def apply(self, source: str, batch: pa.RecordBatch, arrivals: Ints) -> None:
        """Apply those routes of the events that are of this shard, in the order of the batch.

        batch: of the source's schema; arrivals int64 [n]. An empty batch only moves the clock.
        """
        if len(arrivals):
            self._newest_arrival_ms = max(self._newest_arrival_ms, int(arrivals.max()))
        declared = self._layout.source(source)
        times = batch.column(declared.event_time).cast(pa.int64()).to_numpy()
        ids = None
        if declared.event_id is not None and batch.num_rows:
            ids = hash_columns([batch.column(declared.event_id)], batch.num_rows)
        for table in self._layout.tables_of(source):
            self._apply_table(table, batch, times, arrivals, ids)

    def _apply_table(
        self, table: Table, batch: pa.RecordBatch, times: Ints, arrivals: Ints, ids: Hashes | None
    ) -> None:
        keys = [batch.column(name) for name in table.key]
        hashes = hash_columns(keys, batch.num_rows)
        keyed = np.flatnonzero(key_validity(keys, batch.num_rows))
        inputs = _inputs(table, batch)
        masks = _masks(table, batch)
        route_ids = None if ids is None else (ids + hashes[:, ::-1]).view(np.int64)
        for slot, rows in self._by_slot(hashes, keyed):
            if route_ids is not None:
                seen = self._filters.get((table.number, slot))
                if seen is None:
                    seen = self._filters[table.number, slot] = IdFilter(self._dedupe_horizon_ms)
                verdicts = np.zeros(batch.num_rows, np.uint8)
                seen.admit(rows, route_ids, np.zeros(batch.num_rows, np.int64), arrivals, verdicts)
                rows = rows[verdicts[rows] == NEW]
            tiles = self._tiles.get((table.number, slot))
            if tiles is None:
                tiles = self._tiles[table.number, slot] = SlotTiles(table, self._seed)
            self._events[table.name] += len(rows)
            tiles.apply(rows, hashes.view(np.int64), times, arrivals, inputs, masks)

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
        bounds = np.flatnonzero(np.diff(slots, prepend=-1, append=-1)) if len(slots) else []
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
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
                tiles = self._tiles.get((part.program.table, slot)) or self._nothing(part.program)
                tiles.read(part.program, which, rows, as_of, out, known)
            matrices.append(out[part.which])
            knowns.append(known[part.which])
        return ShardAnswer(as_of, tuple(matrices), tuple(knowns))

    def _nothing(self, program: ReadProgram) -> SlotTiles:
        """Return tiles without entities, to read the features of an unknown one from."""
        empty = self._tiles.get((program.table, -1))
        if empty is None:
            empty = self._tiles[program.table, -1] = SlotTiles(self._layout.tables[program.table], self._seed)
        return empty

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
