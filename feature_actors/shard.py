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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.dedupe import CONFLICT, NEW, IdFilter
from millpond.feature_actors.keys import Hashes, hash_columns, owned, slots_of
from millpond.feature_actors.layout import Layout, Table
from millpond.feature_actors.plan import Answer, Question
from millpond.feature_actors.reader import MemoryReader
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import Memory
from millpond.feature_actors.tiles.read import NO_CLOCK
from millpond.feature_actors.tiles.store import TileStore
from millpond.feature_actors.tiles.strings import Strings
from millpond.feature_actors.view import mask_of

__all__ = ["Shard", "ShardStatus"]

Ints = npt.NDArray[np.int64]


#: Address space of a memory that only this process has.
_OWN_MEMORY_BYTES_MAX = 1 << 34
_NO_ROWS = np.empty(0, np.int64)
_NO_INPUTS, _NO_MASKS = np.empty((0, 0)), np.empty((0, 0), np.bool_)


@dataclass(frozen=True)
class _Route:
    """What of a batch goes to one table: hashes int64 [n, 2] of all keys and their slots int64 [n], the rows that are
    of this shard, inputs float64 [fields, n], masks bool [wheres, n]."""

    table: Table
    hashes: Ints
    slots: Ints
    rows: Ints
    inputs: npt.NDArray[np.float64]
    masks: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardStatus:
    """What a shard holds: events applied and entities kept by table, tiles, bytes allocated for tiles and filters,
    distinct strings, and how often a string was one of too many."""

    shard: int
    slots: int
    events: dict[str, int]
    entities: dict[str, int]
    tiles: int
    tile_bytes: int
    filter_bytes: int
    strings: int
    strings_refused: int
    newest_arrival_ms: int | None


class Shard:
    """Number `number` of the shards in `shard_map`.

    seed: the cluster's own seed of the index.
    dedupe_horizon_ms: how long an event id is remembered after it was received.
    memory: where its tiles go; by default of this process alone. strings_max: distinct strings kept.
    reclaim_margin_ms: how far behind the newest arrival stamp a live read may be as of, see `TileStore`.
    """

    def __init__(
        self,
        layout: Layout,
        shard_map: ShardMap,
        number: int,
        *,
        seed: int = 0,
        dedupe_horizon_ms: int = 86_400_000,
        memory: Memory | None = None,
        strings_max: int = 1_000_000,
        reclaim_margin_ms: int = 660_000,
    ) -> None:
        self._layout = layout
        self.shard_map = shard_map
        self.number = number
        self._owned = np.array([owner == number for owner in shard_map.owners], np.bool_)
        self.memory = memory or Memory.create(None, _OWN_MEMORY_BYTES_MAX)
        self._store = TileStore(layout, shard_map.n_slots, self.memory, seed, reclaim_margin_ms)
        self._strings = Strings(self.memory, strings_max)
        self._homes = {name: IdFilter(dedupe_horizon_ms, shard_map.n_slots, seed) for name in layout.sources}
        self._filters = [IdFilter(dedupe_horizon_ms, shard_map.n_slots, seed) for _ in layout.tables]
        self._events = {t.name: 0 for t in layout.tables}
        self._reader = MemoryReader(shard_map, [number])
        self._reader.attach(number, self.memory)

    # -- events

    def admit(self, source: str, ids: Hashes, contents: Ints, received_ms: int) -> npt.NDArray[np.uint8]:
        """Judge event ids whose home is here: uint8 [n] of `NEW`, `DUPLICATE`, `CONFLICT`.

        ids uint64 [n, 2]: hashes of the event ids; contents int64 [n]: hashes of the whole events;
        received_ms: when the request came, by which ids are remembered.
        """
        ids, contents = owned(ids), owned(contents)
        verdicts = np.zeros(len(ids), np.uint8)
        slots = slots_of(ids, self.shard_map.n_slots)
        self._homes[source].admit(
            np.flatnonzero(self._owned[slots]), slots, ids.view(np.int64), contents, received_ms, verdicts
        )
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
        received_ms as in `admit`. Raises `MemoryFull` before anything is applied.
        """
        declared = self._layout.source(source)
        times = owned(batch.column(declared.event_time).cast(pa.int64()).to_numpy())
        arrivals = owned(arrivals)
        routes = self._routes(source, batch, arrivals)
        ids = None
        if declared.event_id is not None and batch.num_rows:
            ids = hash_columns([batch.column(declared.event_id)], batch.num_rows)
        if len(arrivals):
            self._store.hear_of(int(arrivals.max()), received_ms)
        for route in routes:
            rows = self._new_rows(route, ids, received_ms)
            self._store.apply(route.table, rows, route.hashes, times, arrivals, route.inputs, route.masks)

    def _routes(self, source: str, batch: pa.RecordBatch, arrivals: Ints) -> list[_Route]:
        """Return what of a batch goes to this shard's slots of the tables of its source, and make room for it.

        What an event can make fail is here, before the filters, which take an event for applied once they have seen it.
        """
        n = batch.num_rows
        tables = self._layout.tables_of(source)
        hashed = []
        for table in tables:
            keys = [batch.column(name) for name in table.key]
            hashes = hash_columns(keys, n)
            slots = slots_of(hashes, self.shard_map.n_slots)
            rows = np.flatnonzero(key_validity(keys, n) & self._owned[slots])
            hashed.append((hashes.view(np.int64), slots, rows))
        fields = {name: batch.column(name) for t, (*_, rows) in zip(tables, hashed, strict=True) if len(rows)
                  for name in t.inputs}  # fmt: skip
        of_strings = sum(self._strings.words_for(c) for c in fields.values() if pa.types.is_string(c.type))
        events = [(table, slots[rows]) for table, (_, slots, rows) in zip(tables, hashed, strict=True)]
        self._store.make_room(events, int(arrivals.max()) if len(arrivals) else NO_CLOCK, of_strings)
        concerned = np.unique(np.concatenate([rows for _, _, rows in hashed])) if fields else _NO_ROWS
        values = {name: self._values(column, concerned) for name, column in fields.items()}
        return [
            _Route(
                table, hashes, slots, rows,
                np.array([values[name] for name in table.inputs]).reshape(-1, n) if len(rows) else _NO_INPUTS,
                _masks(table, batch) if len(rows) else _NO_MASKS,
            )
            for table, (hashes, slots, rows) in zip(tables, hashed, strict=True)
        ]  # fmt: skip

    def _new_rows(self, route: _Route, ids: Hashes | None, received_ms: int) -> Ints:
        """Return the rows of a route that its slots have not seen."""
        rows = route.rows
        if ids is not None and len(rows):
            n = len(ids)
            route_ids = (ids + route.hashes[:, ::-1].view(np.uint64)).view(np.int64)
            verdicts = np.zeros(n, np.uint8)
            seen = self._filters[route.table.number]
            seen.admit(rows, route.slots, route_ids, np.zeros(n, np.int64), received_ms, verdicts)
            rows = rows[verdicts[rows] == NEW]
        self._events[route.table.name] += len(rows)
        return rows

    def _values(self, column: pa.Array, rows: Ints) -> npt.NDArray[np.float64]:
        """Return the values of a field as the kernels take them, float64 [n], NaN for null; strings by address, those
        of `rows` only: the others are another shard's to keep."""
        if pa.types.is_string(column.type):
            if len(rows) == len(column):
                return self._strings.addresses(column)
            addresses = np.full(len(column), np.nan)
            addresses[rows] = self._strings.addresses(column.take(pa.array(rows)))
            return addresses
        values: npt.NDArray[np.float64] = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return values

    # -- reads

    def read(self, question: Question) -> Answer:
        """Read what this shard has of the asked entities; what it has not is left out.

        Raises `AsOfInPast` if an explicit as-of lies before an event applied to the rows read, or
        before the cluster's clock.
        """
        return self._reader.read(question)

    def join(
        self, question: Question, events: Mapping[str, tuple[pa.RecordBatch, Ints]], answer: Answer | None = None
    ) -> Answer:
        """Answer a question while the events come in: the point-in-time join of a training set.

        question.as_of: int64 [n], ascending. events: per source a batch in ascending event time and
        its arrival stamps. Row i is read when every event up to as_of[i] is applied and none after.
        The state is left as after all the events. answer: where other shards have put their part already.
        """
        assert question.as_of is not None
        answer, program = answer or Answer.empty(question), question.program
        for name, (batch, arrivals) in events.items():
            event_id = self._layout.source(name).event_id
            times = owned(batch.column(self._layout.source(name).event_time).cast(pa.int64()).to_numpy())
            ids = None if event_id is None else hash_columns([batch.column(event_id)], len(times))
            for route in self._routes(name, batch, arrivals):
                rows = self._new_rows(route, ids, 0)  # at one moment: every id counts once
                if route.table not in program.tables:
                    continue
                keys = question.hashes[program.keys.index(route.table.key)]
                asked = np.flatnonzero(self._owned[slots_of(keys.view(np.uint64), self.shard_map.n_slots)])
                # A stable sort of events before questions: an event at the very as-of is seen.
                order = np.argsort(np.concatenate([times[rows], question.as_of[asked]]), kind="stable")
                steps = np.concatenate([rows, ~asked])[order]
                self._store.join(
                    route.table, program, steps, route.hashes, times, owned(arrivals), route.inputs, route.masks, keys,
                    question.as_of, answer.values, answer.known,
                )  # fmt: skip
        self._reader.read_texts(question, answer)
        return answer

    # -- what it holds

    def status(self) -> ShardStatus:
        tables, store = self._layout.tables, self._store
        newest_ms = store.newest_arrival_ms
        return ShardStatus(
            shard=self.number,
            slots=int(self._owned.sum()),
            events=dict(self._events),
            entities={t.name: store.entities(t) for t in tables},
            tiles=sum(store.tiles(t) for t in tables),
            tile_bytes=self.memory.allocated_bytes,
            filter_bytes=sum(f.allocated_bytes for f in [*self._homes.values(), *self._filters]),
            strings=len(self._strings),
            strings_refused=self._strings.refused,
            newest_arrival_ms=None if newest_ms == NO_CLOCK else newest_ms,
        )

    def reclaim(self) -> int:
        """Free all that no window can see any more, at once rather than in steps; return how many entities."""
        return sum(self._store.reclaim_all(table) for table in self._layout.tables)

    def check(self) -> list[str]:
        """Return what is wrong with the state: an empty list if every invariant holds."""
        return self._store.check()


def key_validity(keys: Sequence[pa.Array], n: int) -> npt.NDArray[np.bool_]:
    """Return which of n rows have all their key fields, bool [n]."""
    valid = np.ones(n, np.bool_)
    for key in keys:
        if key.null_count:
            valid &= key.is_valid().to_numpy(zero_copy_only=False)
    return valid


def _masks(table: Table, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Return which events satisfy which of the table's conditions, bool [wheres, n]."""
    masks = np.ones((len(table.wheres), batch.num_rows), np.bool_)
    for number, where in enumerate(table.wheres):
        if where is not None:
            masks[number] = mask_of(where, batch).to_numpy(zero_copy_only=False)
    return masks
