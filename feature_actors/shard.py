"""A shard: the features of all entities whose keys fall into its slots. A plain class.

No Ray, no threads, no clock: time comes with the events and with the reads. The actor in `actor`
holds one of these; so does a unit test, and a training set.

An event passes a shard in two steps, each safe to repeat:

    admit   at the event id's home slot: new, duplicate, or conflict (same id, other content)
    apply   at the slot of each view's entity key: dropped if this slot has it, else into the tiles

so a request that failed halfway can be sent again: what was applied is a duplicate there, and what
was not is applied.

Each step is made in three: `prepare` judges and remembers, in memory of the process; then what is new goes into the log
(see `durable`); then `commit` applies it to the tiles, which readers see. So nothing is seen that is not in the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.dedupe import CONFLICT, NEW, IdFilter
from millpond.feature_actors.keys import Hashes, hash_columns, owned, slots_of
from millpond.feature_actors.layout import Layout, Table
from millpond.feature_actors.log.record import EventsRecord, IdsRecord
from millpond.feature_actors.plan import Answer, Question
from millpond.feature_actors.reader import MemoryReader
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import Memory
from millpond.feature_actors.tiles.read import NO_CLOCK
from millpond.feature_actors.tiles.store import TileStore
from millpond.feature_actors.tiles.strings import Strings
from millpond.feature_actors.tiles.structure import SEQUENCE_ROW_BITS
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


@dataclass(slots=True)
class Prepared:
    """What a shard has judged and remembered of a request, and will apply when it is in the log.

    record: for the log, None if there is nothing new. verdicts uint8 [n]: of event ids whose home is here.
    """

    received_ms: int
    record: EventsRecord | IdsRecord | None = None
    verdicts: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    routes: list[tuple[_Route, Ints]] = field(default_factory=list)
    times: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    arrivals: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    remembered: list[tuple[IdFilter, Ints, Ints, Ints]] = field(default_factory=list)
    promised_words: int = 0


class ShardParts(NamedTuple):
    """What a shard consists of: for its image. filters by table; events applied by table."""

    layout: Layout
    store: TileStore
    strings: Strings
    homes: dict[str, IdFilter]
    filters: list[IdFilter]
    events: dict[str, int]


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
        #: Where in the log the next record will be that is committed without saying so.
        self.next_offset = 0
        self._reader = MemoryReader(shard_map, [number])
        self._reader.attach(number, self.memory)

    # -- events: prepare, log, commit

    def prepare_admit(self, source: str, ids: Hashes, contents: Ints, received_ms: int) -> Prepared:
        """Judge event ids whose home is here; `verdicts` uint8 [n] of `NEW`, `DUPLICATE`, `CONFLICT`.

        ids uint64 [n, 2]: hashes of the event ids; contents int64 [n]: hashes of the whole events;
        received_ms: when the request came, by which ids are remembered.
        """
        prepared = Prepared(received_ms)
        new = self._judge(prepared, source, owned(ids), owned(contents))
        if len(new):
            prepared.record = IdsRecord(source, received_ms, ids[new], contents[new])
        return prepared

    def prepare_ingest(
        self, source: str, ids: Hashes, contents: Ints, batch: pa.RecordBatch, arrivals: Ints, received_ms: int
    ) -> Prepared:
        """Judge events whose home is here, all of them, and prepare to apply what is no conflict: both in one."""
        prepared = Prepared(received_ms)
        try:
            home = np.zeros(len(ids), np.bool_)
            home[self._judge(prepared, source, owned(ids), owned(contents))] = True
            if (conflicts := prepared.verdicts == CONFLICT).any():
                kept = np.flatnonzero(~conflicts)
                batch, arrivals, home = batch.take(pa.array(kept)), arrivals[kept], home[kept]
            self._prepare(prepared, source, batch, arrivals, home)
        except BaseException:
            self.undo(prepared)
            raise
        return prepared

    def prepare_apply(self, source: str, batch: pa.RecordBatch, arrivals: Ints, received_ms: int) -> Prepared:
        """Prepare to apply those routes of the events that are of this shard, in the order of the batch.

        batch: of the source's schema; arrivals int64 [n], or one more, which only moves the clock;
        received_ms as in `prepare_admit`. Raises `MemoryFull` before anything is remembered.
        """
        prepared = Prepared(received_ms)
        try:
            self._prepare(prepared, source, batch, arrivals, np.zeros(batch.num_rows, np.bool_))
        except BaseException:
            self.undo(prepared)
            raise
        return prepared

    def commit(self, prepared: Prepared, offset: int | None = None) -> None:
        """Apply what was prepared, when it is in the log at that offset; in the order of the log.

        Rows that have it already, having been loaded from a snapshot, pass it over. Without an offset it is the next.
        """
        offset = self.next_offset if offset is None else offset
        self.next_offset = offset + 1
        if len(prepared.arrivals):
            self._store.hear_of(int(prepared.arrivals.max()), prepared.received_ms)
        for route, rows in prepared.routes:
            self._store.apply(
                route.table,
                rows,
                route.hashes,
                prepared.times,
                prepared.arrivals,
                route.inputs,
                route.masks,
                offset << SEQUENCE_ROW_BITS,
            )
            self._events[route.table.name] += len(rows)
        self._store.keep_promise(prepared.promised_words)

    def undo(self, prepared: Prepared) -> None:
        """Forget what was prepared: it did not get into the log."""
        for seen, rows, slots, ids in prepared.remembered:
            seen.forget(rows, slots, ids)
        self._store.keep_promise(prepared.promised_words)

    def replay(self, record: IdsRecord | EventsRecord, offset: int | None = None) -> None:
        """Do again what a record of the log says, as part of recovery: it was judged when it was written.

        What is of a source or a table that is not declared any more is passed over.
        """
        if record.source not in self._layout.sources:
            return
        if isinstance(record, IdsRecord):
            self._judge(Prepared(record.received_ms), record.source, owned(record.ids), owned(record.contents))
            return
        declared = self._layout.source(record.source)
        batch = declared.upgraded(record.batch)
        n, prepared = batch.num_rows, Prepared(record.received_ms)
        ids = self._ids(record.source, batch)
        home = np.flatnonzero(record.routes & 1)
        if ids is not None and len(home):
            contents = hash_columns(batch.columns, n)[:, 0].view(np.int64)
            self._judge(prepared, record.source, ids[home], contents[home])
        bits = {key: np.uint32(2 << number) for number, key in enumerate(record.tables)}
        for route in self._routes(prepared, record.source, batch, record.arrivals):
            rows = np.flatnonzero(record.routes & bits.get(route.table.key, np.uint32(0)))
            if ids is not None and len(rows):
                self._remember(prepared, route, rows, ids)
            prepared.routes.append((route, rows))
        prepared.times, prepared.arrivals = self._times(record.source, batch), owned(record.arrivals)
        self.commit(prepared, offset)

    def admit(self, source: str, ids: Hashes, contents: Ints, received_ms: int) -> npt.NDArray[np.uint8]:
        """Judge event ids at once, without a log; see `prepare_admit`."""
        return self.prepare_admit(source, ids, contents, received_ms).verdicts

    def ingest(
        self, source: str, ids: Hashes, contents: Ints, batch: pa.RecordBatch, arrivals: Ints, received_ms: int
    ) -> npt.NDArray[np.uint8]:
        """Judge and apply events at once, without a log; see `prepare_ingest`."""
        prepared = self.prepare_ingest(source, ids, contents, batch, arrivals, received_ms)
        self.commit(prepared)
        return prepared.verdicts

    def apply(self, source: str, batch: pa.RecordBatch, arrivals: Ints, received_ms: int) -> None:
        """Apply events at once, without a log; see `prepare_apply`."""
        self.commit(self.prepare_apply(source, batch, arrivals, received_ms))

    # -- steps of prepare

    def _judge(self, prepared: Prepared, source: str, ids: Hashes, contents: Ints) -> Ints:
        """Judge event ids into `prepared.verdicts` and remember the new ones; return their rows."""
        prepared.verdicts = np.zeros(len(ids), np.uint8)
        slots, seen = slots_of(ids, self.shard_map.n_slots), self._homes[source]
        mine = np.flatnonzero(self._owned[slots])
        seen.admit(mine, slots, ids.view(np.int64), contents, prepared.received_ms, prepared.verdicts)
        new: Ints = mine[prepared.verdicts[mine] == NEW]
        prepared.remembered.append((seen, new, slots, ids.view(np.int64)))
        return new

    def _prepare(
        self, prepared: Prepared, source: str, batch: pa.RecordBatch, arrivals: Ints, home: npt.NDArray[np.bool_]
    ) -> None:
        """Add to `prepared` what is to be applied, and the record of it; home bool [n]: events that are new here."""
        n = batch.num_rows
        bits = home.astype(np.uint32)
        tables = []
        ids = self._ids(source, batch)
        for number, route in enumerate(self._routes(prepared, source, batch, arrivals)):
            rows = route.rows if ids is None else self._remember(prepared, route, route.rows, ids)
            bits[rows] |= np.uint32(2 << number)
            tables.append(route.table.key)
            prepared.routes.append((route, rows))
        prepared.times, prepared.arrivals = self._times(source, batch), owned(arrivals)
        if bits.any():
            kept, stamps = np.flatnonzero(bits), prepared.arrivals[:n]
            if len(kept) < n:
                batch, stamps, bits = batch.take(pa.array(kept)), stamps[kept], bits[kept]
            prepared.record = EventsRecord(
                source, self._layout.source(source).version, prepared.received_ms, tuple(tables), stamps, bits, batch
            )

    def _remember(self, prepared: Prepared, route: _Route, rows: Ints, ids: Hashes) -> Ints:
        """Remember the events of a route; return those rows that its slots have not seen."""
        if len(rows) == 0:
            return rows
        route_ids = (ids + route.hashes[:, ::-1].view(np.uint64)).view(np.int64)
        verdicts = np.zeros(len(ids), np.uint8)
        seen = self._filters[route.table.number]
        no_contents = np.zeros(len(ids), np.int64)
        seen.admit(rows, route.slots, route_ids, no_contents, prepared.received_ms, verdicts)
        new: Ints = rows[verdicts[rows] == NEW]
        prepared.remembered.append((seen, new, route.slots, route_ids))
        return new

    def _ids(self, source: str, batch: pa.RecordBatch) -> Hashes | None:
        event_id = self._layout.source(source).event_id
        return hash_columns([batch.column(event_id)], batch.num_rows) if event_id and batch.num_rows else None

    def _times(self, source: str, batch: pa.RecordBatch) -> Ints:
        times: Ints = owned(batch.column(self._layout.source(source).event_time).cast(pa.int64()).to_numpy())
        return times

    def _routes(self, prepared: Prepared, source: str, batch: pa.RecordBatch, arrivals: Ints) -> list[_Route]:
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
        arrival_ms = int(arrivals.max()) if len(arrivals) else NO_CLOCK
        prepared.promised_words += self._store.promise_room(events, arrival_ms, of_strings)
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
        base = self.next_offset << SEQUENCE_ROW_BITS
        self.next_offset += 1
        for name, (batch, arrivals) in events.items():
            times, ids, prepared = self._times(name, batch), self._ids(name, batch), Prepared(0)
            for route in self._routes(prepared, name, batch, arrivals):
                # Received at one moment: every id counts once.
                rows = route.rows if ids is None else self._remember(prepared, route, route.rows, ids)
                if route.table not in program.tables:
                    continue
                keys = question.hashes[program.keys.index(route.table.key)]
                asked = np.flatnonzero(self._owned[slots_of(keys.view(np.uint64), self.shard_map.n_slots)])
                # A stable sort of events before questions: an event at the very as-of is seen.
                order = np.argsort(np.concatenate([times[rows], question.as_of[asked]]), kind="stable")
                steps = np.concatenate([rows, ~asked])[order]
                self._store.join(
                    route.table, program, steps, route.hashes, times, owned(arrivals), route.inputs, route.masks, keys,
                    question.as_of, answer.values, answer.known, base,
                )  # fmt: skip
        self._reader.read_texts(question, answer)
        return answer

    # -- what it holds

    @property
    def parts(self) -> ShardParts:
        return ShardParts(self._layout, self._store, self._strings, self._homes, self._filters, self._events)

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
