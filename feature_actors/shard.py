"""A shard: the features of all entities whose keys fall into its slots. A plain class.

No Ray, no threads, no clock: time comes with the events and with the reads. The actor in `actor`
holds one of these; so does a unit test, and a training set.

A shard is the home of the event ids that fall into its slots, and keeps the tiles of the keys that do. What it is asked
to do with events:

    ingest    it is the home of all of them, and no other shard has a key of them: judge ids, log, apply
    offer     several shards have a part: judge the ids at home here, log, keep what has a key here waiting
    take      the homes have judged: apply what is new of an offer
    deliver   apply the part of a record of another home that never got here by a take

The home of an id says new, duplicate or conflict (same id, other content), and owes what is new until it has been
applied everywhere, see `deliveries`. So a request that failed halfway can be sent again, or not: in the end it is in
every table or in none.

Each of the four is made in three: `prepare` judges and remembers, in memory of the process; then what is new goes into
the log (see `durable`); then `commit` applies it to the tiles, which readers see. So nothing is seen that is not in the
log.

A table that was added is behind, and commits pass it by or queue for it, until it has caught up with the others; see
`behind`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.aggregations import Input
from millpond.feature_actors.behind import Behind
from millpond.feature_actors.dedupe import DUPLICATE, NEW, IdFilter, IdMemory
from millpond.feature_actors.deliveries import Deliveries
from millpond.feature_actors.erasure import Erasure
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.events import ELSEWHERE, FORGOTTEN, Events, PastEvents, Receipt
from millpond.feature_actors.keys import Hashes, hash_columns, owned, slots_of
from millpond.feature_actors.layout import Layout, Table
from millpond.feature_actors.log.record import (
    BROUGHT_LATER,
    Brought,
    EventsRecord,
    HomeRecord,
    OfferRecord,
    TakeRecord,
)
from millpond.feature_actors.plan import Answer, Question
from millpond.feature_actors.prepared import NO_VERDICTS, Offer, Prepared, Queued
from millpond.feature_actors.prepared import Route as _Route
from millpond.feature_actors.reader import MemoryReader
from millpond.feature_actors.routes import key_validity
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.image import Texts, keys_of
from millpond.feature_actors.tiles.memory import Memory
from millpond.feature_actors.tiles.read import NO_CLOCK
from millpond.feature_actors.tiles.shape import fit_of, shape_of
from millpond.feature_actors.tiles.store import TileStore
from millpond.feature_actors.tiles.strings import Strings
from millpond.feature_actors.tiles.structure import SEQUENCE_ROW_BITS
from millpond.feature_actors.tombstones import Tombstone, Tombstones
from millpond.feature_actors.view import holds

__all__ = ["Prepared", "Shard", "ShardStatus"]

Ints = npt.NDArray[np.int64]


#: Address space of a memory that only this process has.
_OWN_MEMORY_BYTES_MAX = 1 << 34
_NEVER_RECLAIM_MS = 1 << 50
_NO_INPUTS, _NO_MASKS = np.empty((0, 0)), np.empty((0, 0), np.bool_)


class ShardParts(NamedTuple):
    """What a shard consists of, for its image; tables: those that are not behind; homes: of ids, by source; events
    applied by table."""

    layout: Layout
    tables: list[Table]
    store: TileStore
    strings: Strings
    homes: dict[str, IdFilter]
    events: dict[str, int]


@dataclass(frozen=True)
class ShardStatus:
    """What a shard holds: events applied and entities kept by table, tiles, bytes allocated for tiles and filters,
    distinct strings, and how often a string was one of too many. ids: in the filters. dedupe_held_ms: an id received at
    most so long before the newest request is known, `dedupe_horizon_ms` unless memory does not allow it."""

    shard: int
    slots: int
    events: dict[str, int]
    entities: dict[str, int]
    tiles: int
    tile_bytes: int
    filter_bytes: int
    ids: int
    dedupe_horizon_ms: int
    dedupe_held_ms: int
    strings: int
    strings_refused: int
    newest_arrival_ms: int | None
    offers: int
    owed: int


class Shard:
    """Number `number` of the shards in `shard_map`.

    seed: the cluster's own seed of the index.
    dedupe_horizon_ms: how long an event id is remembered after it was received, if ids take `dedupe_bytes_max` at most
    (None is no limit); for `dedupe_horizon_ms_min` at least.
    memory: where its tiles go; by default of this process alone. strings_max: distinct strings kept.
    reclaim_margin_ms: how far behind the newest arrival stamp a live read may be as of, see `TileStore`.
    spare_slot_words: room for tables that are added, see there, too.
    """

    def __init__(
        self,
        layout: Layout,
        shard_map: ShardMap,
        number: int,
        *,
        seed: int = 0,
        dedupe_horizon_ms: int = 86_400_000,
        dedupe_horizon_ms_min: int = 3_600_000,
        dedupe_bytes_max: int | None = None,
        memory: Memory | None = None,
        strings_max: int = 1_000_000,
        reclaim_margin_ms: int = 660_000,
        spare_slot_words: int = 0,
    ) -> None:
        self._layout = layout
        self.shard_map = shard_map
        self.number = number
        self._owned = np.array([owner == number for owner in shard_map.owners], np.bool_)
        self.memory = memory or Memory.create(None, _OWN_MEMORY_BYTES_MAX)
        self._store = TileStore(layout, shard_map.n_slots, self.memory, seed, reclaim_margin_ms, spare_slot_words)
        self._strings = Strings(self.memory, strings_max)
        self._ids = IdMemory(
            dedupe_horizon_ms,
            horizon_ms_min=dedupe_horizon_ms_min,
            bytes_max=dedupe_bytes_max,
            n_slots=int(self._owned.sum()),
            seed=seed,
            shard=number,
        )
        self._homes = {name: IdFilter(self._ids, shard_map.n_slots) for name in layout.sources}
        self.deliveries = Deliveries()
        self._offers: dict[bytes, Offer] = {}
        #: Offsets of offers that are being taken: their take has been prepared, and is not in the log yet.
        self._taking: set[int] = set()
        #: What has been prepared for tables and is not applied yet: offers, and what is about to be committed.
        self._under_way: set[Prepared] = set()
        self._events = {t.name: 0 for t in layout.tables}
        #: Of entities that were forgotten: what happened before that is not taken any more.
        self.tombstones = Tombstones()
        self._behind = Behind(self._store)
        #: Where the next record goes that is committed without saying so.
        self.next_offset = 0
        self._reader = MemoryReader(shard_map, [number])
        self._reader.attach(number, self.memory)

    @property
    def layout(self) -> Layout:
        return self._layout

    # -- events: prepare, log, commit

    def prepare_ingest(self, events: Events) -> Prepared:
        """Judge events whose home is here, all of them, and prepare to apply what is new.

        Raises `MemoryFull` or `DedupeFull` before anything is remembered, as all that prepares.
        """
        prepared = Prepared(events.received_ms)
        try:
            new = self._judge(prepared, events, self._forgotten(events))
            self._route(prepared, events, new)
            bits = self._bits(prepared, events.n, new)
            if bits.any():
                prepared.record = EventsRecord(*self._fields(prepared, events, bits, np.flatnonzero(bits)))
        except BaseException:
            self.undo(prepared)
            raise
        return prepared

    def prepare_offer(self, request: bytes, events: Events, since_s: float = 0.0) -> Prepared:
        """Judge the events whose home is here, and prepare to keep waiting what has a key here.

        request: by which `prepare_take` names it.
        """
        prepared = Prepared(events.received_ms)
        try:
            forgotten = self._forgotten(events)
            new = self._judge(prepared, events, forgotten)
            likely = np.flatnonzero((prepared.verdicts == NEW) | (prepared.verdicts == ELSEWHERE))
            if forgotten is not None:  # its home may take it still, which has not heard of it
                events = self._erased(events)
            self._route(prepared, events, likely)
            bits = self._bits(prepared, events.n, new)
            if bits.any():
                kept = np.flatnonzero(bits)
                if len(kept) * 4 > events.n * 3:  # a few rows that are nobody's here are cheaper than to take them out
                    kept = np.arange(events.n)
                prepared.record = OfferRecord(*self._fields(prepared, events, bits, kept))
                if (bits > 1).any():
                    home = self.shard_map.shards_of(events.ids)
                    prepared.offer = request, Offer(prepared, home, kept, since_s)
        except BaseException:
            self.undo(prepared)
            raise
        return prepared

    def prepare_take(self, request: bytes, accepted: npt.NDArray[np.bool_], homes: Sequence[HomeRecord]) -> Prepared:
        """Prepare to apply what is accepted of an offer, bool [n]; homes: the records of all that is.

        What of it has been delivered by its home meanwhile is passed over. Raises `Unavailable` if there is no such
        offer (any more): then the homes deliver it.
        """
        offer = self._offers.pop(request, None)
        if offer is None:
            raise Unavailable(
                f"shard {self.number} of {self.shard_map.n_shards} has no such offer any more; send the events again",
                code="offer_lost",
                retry_after_ms=1_000,
            )
        if had := [home.shard for home in homes if self.deliveries.has_had(home)]:
            accepted = accepted & ~np.isin(offer.home, had)
        prepared = offer.prepared
        rows = np.flatnonzero(accepted[offer.kept])
        assert isinstance(prepared.record, OfferRecord)
        offered = [route.table for route, _ in prepared.routes]
        now = self._routed(prepared.record.source, prepared.keys_known)
        if any(table not in offered for table in now):  # added since
            try:
                self._route_anew(prepared, rows)
            except BaseException:
                # It is as if it had been dropped before. Its ids are in the log.
                self._end(prepared)
                raise
        else:
            prepared.routes = [(route, of[accepted[of]]) for route, of in prepared.routes]
        self._have(prepared, homes)
        prepared.record = TakeRecord(offer.offset, rows, prepared.homes)
        prepared.offer, prepared.remembered, prepared.verdicts = None, [], NO_VERDICTS
        self._taking.add(offer.offset)
        return prepared

    def prepare_deliver(self, home: HomeRecord, events: Events) -> Prepared:
        """Prepare to apply this shard's part of a record of its home, unless it has had it."""
        prepared = Prepared(events.received_ms)
        if self.deliveries.has_had(home):
            return prepared
        self._have(prepared, [home])
        try:
            if self._forgotten(events) is not None:
                events = self._erased(events)
            everything = np.arange(events.n)
            self._route(prepared, events, everything)
            bits = self._bits(prepared, events.n, everything[:0])
            prepared.record = record = EventsRecord(*self._fields(prepared, events, bits, np.flatnonzero(bits)))
            record.homes = prepared.homes
        except BaseException:
            self.undo(prepared)
            raise
        return prepared

    def prepare_brought(self, record: EventsRecord, key: tuple[str, ...], brought: Brought) -> Prepared:
        """Prepare to log what of a home's record is of this shard's by a key that came later; no table is given it yet.

        record: without that key among its `tables`. The rest of the record is passed over.
        """
        prepared = Prepared(record.received_ms)
        if forgotten := self.erasure.forgotten(record.source, record.batch, record.arrivals):
            record = self.erasure.record(record, forgotten)  # its home may not be so far with it yet
        batch = self._layout.source(record.source).upgraded(record.batch)
        keys = [batch.column(name) for name in key]
        slots = slots_of(hash_columns(keys, batch.num_rows), self.shard_map.n_slots)
        mine = key_validity(keys, batch.num_rows) & self._owned[slots] & ((record.routes & np.uint32(1)) != 0)
        rows = np.flatnonzero(mine)
        prepared.heard = prepared.arrivals  # time has been told of them
        if not len(rows):
            return prepared
        prepared.record = EventsRecord(
            record.source, record.version, record.received_ms, (key, BROUGHT_LATER), record.arrivals[rows],
            np.full(len(rows), 2, np.uint32), record.batch.take(pa.array(rows)), brought=brought,
        )  # fmt: skip
        return prepared

    def commit(self, prepared: Prepared, offset: int | None = None, since_s: float = 0.0) -> Receipt:
        """Apply what was prepared, when it is in the log at an offset; in the order of the log.

        offset: None if there is no log, or nothing new. since_s: now, as the caller measures time.
        """
        if prepared.record is None:
            offset = -1
        else:
            offset = self.next_offset if offset is None else offset
            self.next_offset = offset + 1
        if isinstance(prepared.record, TakeRecord):
            self._taking.discard(prepared.record.offer)
        if isinstance(prepared.record, OfferRecord) and (prepared.verdicts == NEW).any():
            self.deliveries.owe(offset, since_s)
        duplicates = bool((prepared.verdicts == DUPLICATE).any())
        receipt = Receipt(
            prepared.verdicts,
            offset,
            self.deliveries.settled(self.next_offset),
            self.next_offset if duplicates and self.deliveries.owed else 0,
            prepared.offer is not None,
        )
        if prepared.offer is not None:
            request, offer = prepared.offer
            offer.offset = offset
            self._offers[request] = offer
            if self.tombstones.fields:
                self._drop_forgotten({request: offer})
        else:
            self._apply(prepared, offset)
        return receipt

    def undo(self, prepared: Prepared) -> None:
        """Forget what was prepared: it did not get into the log."""
        if isinstance(prepared.record, TakeRecord):
            self._taking.discard(prepared.record.offer)
        for seen, rows, slots, ids in prepared.remembered:
            seen.forget(rows, slots, ids)
        for home in prepared.homes:
            self.deliveries.have_not(home)
        self._end(prepared)

    def drop_offers(self, before_s: float) -> int:
        """Forget offers that were made before a time and not taken; return how many. Their homes deliver them."""
        old = [request for request, offer in self._offers.items() if offer.since_s < before_s]
        for request in old:
            self._end(self._offers.pop(request).prepared)
        return len(old)

    @property
    def offers(self) -> list[int]:
        """Offsets of the offers of which no take is in the log: a replay from here on needs them."""
        return [*(offer.offset for offer in self._offers.values()), *self._taking]

    # -- entities that were forgotten

    def forget(self, tombstones: Sequence[Tombstone]) -> None:
        """Take no events any more that are before these tombstones, which have been written. What was prepared before
        may still get into the log, and what others have taken gets there with tokens."""
        self.tombstones.take(tombstones)
        self._drop_forgotten(dict(self._offers))

    def _drop_forgotten(self, offers: Mapping[bytes, Offer]) -> None:
        """Drop those offers that have something which has been forgotten since: their homes deliver them, with tokens.
        So of what was forgotten before a record says exactly what was applied."""
        for request, offer in offers.items():
            record = offer.prepared.record
            assert isinstance(record, OfferRecord)
            if self.erasure.forgotten(record.source, record.batch, record.arrivals):
                self._end(self._offers.pop(request).prepared)

    def remove(self, keys: Mapping[int, Ints], events: Mapping[int, int]) -> int:
        """Remove rows by the number of their table, int64 [n, 2] hashes of keys, and so many events from what is
        counted; return how many rows there were."""
        tables = self._layout.tables
        for number, n in events.items():
            self._events[tables[number].name] -= n
        return sum(self._store.remove(tables[number], hashes) for number, hashes in keys.items())

    def apply_again(self, table: Table, record: EventsRecord, offset: int, rows: npt.NDArray[np.bool_]) -> None:
        """Apply to a table some events of a record, bool [n], that it has had: their rows have been removed since.
        Raises `MemoryFull`."""
        if table not in self._behind:
            self._events[table.name] -= int(np.count_nonzero(rows))
            self._apply_to(table, record, offset, 0, rows)

    def other_ids(self, before: EventsRecord, after: EventsRecord) -> None:
        """Remember the ids of a record as a replay of another would, of the same events with tokens."""
        if before.received_ms < self._ids.oldest_ms or (source := self._layout.sources.get(before.source)) is None:
            return
        if (name := source.event_id) is not None and not before.batch.column(name).equals(after.batch.column(name)):
            home = np.flatnonzero(before.routes & 1)
            ids = hash_columns([before.batch.column(name)], before.batch.num_rows)
            slots = slots_of(ids, self.shard_map.n_slots)
            self._homes[before.source].forget(home, slots, ids.view(np.int64))
        self.remember(after)

    def transplant(self, other: Shard, keys: Mapping[int, Ints]) -> None:
        """Put rows of another shard of the same layout in place of those here, by the number of their table: all that
        it has there, and nothing for keys that it has not. Readers find each as it was, or as it is then. Raises
        `MemoryFull`."""
        before, now = [np.empty(0)], [np.empty(0)]
        for addresses, texts in other._strings.image():
            before.append(addresses)
            now.append(self._strings.load(texts))
        of_all = np.concatenate(before)
        order = np.argsort(of_all, kind="stable")
        moved = Texts(of_all[order], np.concatenate(now)[order])
        for number, hashes in keys.items():
            table, gone = self._layout.tables[number], set(map(tuple, hashes.tolist()))
            fit = fit_of(shape_of(table), table)
            for slot, rows, image in other._store.image(table):
                self._store.load(table, fit, slot, rows, image, moved, replaces=True)
                gone -= set(map(tuple, keys_of(image).tolist()))
            self._store.remove(table, np.array(sorted(gone), np.int64).reshape(-1, 2))

    def clear(self, number: int, keys: Ints, fields: Collection[str]) -> None:
        """Begin anew with the features of some fields, for rows of the table of a number; keys int64 [n, 2]."""
        self._store.clear(self._layout.tables[number], keys, fields)

    def remove_texts(self, texts: Iterable[str]) -> None:
        """Remove those strings that no row names any more, nor will by what is under way."""
        kept = sorted(
            (text for text in texts if text in self._strings), key=lambda t: self._strings.addresses_of([t])[0]
        )
        if kept:
            addresses = self._strings.addresses_of(kept)
            used = self._store.texts_in_use(addresses) | np.isin(addresses, self._addresses_under_way())
            self._strings.remove([text for text, is_used in zip(kept, used.tolist(), strict=True) if not is_used])

    def _addresses_under_way(self) -> npt.NDArray[np.float64]:
        """Return the addresses of strings that rows are to name by what has been prepared, float64 [n]."""
        routes = [route for prepared in self._under_way for route, _ in prepared.routes if len(route.inputs)]
        named = [
            values
            for route in routes
            for one, values in zip(route.table.inputs, route.inputs, strict=True)
            if _is_text(one, route.table.source.schema)
        ]
        return np.concatenate([np.empty(0), *named])

    def alike(self) -> Shard:
        """Return an empty shard of the same layout and slots, in memory of this process alone."""
        return Shard(self._layout, self.shard_map, self.number, reclaim_margin_ms=_NEVER_RECLAIM_MS)

    @property
    def erasure(self) -> Erasure:
        """What the tombstones say of events."""
        return Erasure(self.tombstones, self._layout.sources)

    def _forgotten(self, events: Events) -> npt.NDArray[np.bool_] | None:
        """Return which events are of entities that were forgotten after them, bool [n]; None if none is."""
        forgotten = self.erasure.forgotten(events.source, events.batch, events.arrivals[: events.n])
        if not forgotten:
            return None
        rows: npt.NDArray[np.bool_] = np.logical_or.reduce([one.rows for one in forgotten])
        return rows

    def _erased(self, events: Events) -> Events:
        """Return events as they are kept, with tokens for what was forgotten."""
        erasure = self.erasure
        forgotten = erasure.forgotten(events.source, events.batch, events.arrivals[: events.n])
        return replace(events, batch=erasure.batch(events.source, events.batch, forgotten))

    # -- tables that were added

    def extend(self, layout: Layout) -> list[Table]:
        """Have the tables that an extended layout has added, and return them; they are behind.

        Raises `MemoryFull`, and nothing has changed.
        """
        added = layout.tables[len(self._layout.tables) :]
        self._store.extend(layout)
        self._layout = layout
        self._events |= {table.name: 0 for table in added}
        for table in added:
            self.fall_behind(table)
        return added

    @property
    def behind(self) -> list[Table]:
        """The tables that are behind."""
        return self._behind.tables

    def fall_behind(self, table: Table) -> None:
        """Let commits and replays pass by a table, which is empty."""
        self._behind.add(table)

    def keep_up(self, table: Table) -> None:
        """Apply to a table that is empty whatever comes: a recovery brings it all that was before."""
        self._behind.remove(table)

    def catch_up(self, table: Table, record: EventsRecord, offset: int, start: int = 0, end: int | None = None) -> None:
        """Apply to a table that is behind its part of the events `start` to `end` of a record; in the order of the log.

        Raises `MemoryFull`, and nothing of them has been applied.
        """
        self._behind.hear_for(table, owned(record.arrivals[start:end]))
        if record.source != table.source.name or table.key not in record.tables:
            return
        chosen = (record.routes[start:end] & np.uint32(2 << record.tables.index(table.key))) != 0
        if chosen.any():
            self._apply_to(table, record, offset, start, chosen)

    def _apply_to(
        self, table: Table, record: EventsRecord, offset: int, start: int, chosen: npt.NDArray[np.bool_]
    ) -> None:
        """Apply to a table those events of a record from `start` on that are chosen, bool [n]."""
        arrivals = owned(record.arrivals[start : start + len(chosen)])
        batch = table.source.upgraded(record.batch.slice(start, len(chosen)))
        prepared = Prepared(record.received_ms)
        try:
            (route,) = self._routes(prepared, record.source, batch, arrivals, chosen, [table])
            base = (offset << SEQUENCE_ROW_BITS) + start
            self._apply_route(Queued(route, route.rows, self._times(record.source, batch), arrivals, base))
        finally:
            self._store.keep_promise(prepared.promised_words)

    def route_to(self, table: Table) -> None:
        """Prepare for a table that is behind, too, from now on; what is committed of that queues."""
        self._behind.queue_for(table)

    def queue_from_here(self, table: Table) -> int:
        """Return an offset: the table is to be given all of the log before that, and the queue has the rest.

        All that was prepared before `route_to` has been committed, or undone.
        """
        self._behind.queue_for(table)
        return self.next_offset

    def catch_up_queued(self, table: Table) -> bool:
        """Apply to a table the oldest commit that queues for it. If none does, it is not behind any more: return True.

        Raises `MemoryFull`.
        """
        return self._behind.catch_up_queued(table, self._apply_route)

    def give_up(self, table: Table) -> Iterator[None]:
        """Let commits pass by a table that is behind, at once, and remove its rows, step by step: nobody reads them,
        nor would anybody remove an entity from there that is forgotten. Then it may be begun anew."""
        self._events[table.name] = 0
        return self._behind.begin_anew(table)

    # -- the same at once, without a log

    def ingest(self, events: Events) -> Receipt:
        return self.commit(self.prepare_ingest(events))

    def offer(self, request: bytes, events: Events) -> Receipt:
        return self.commit(self.prepare_offer(request, events))

    def take(self, request: bytes, accepted: npt.NDArray[np.bool_], homes: Sequence[HomeRecord]) -> Receipt:
        return self.commit(self.prepare_take(request, accepted, homes))

    def deliver(self, home: HomeRecord, events: Events) -> Receipt:
        return self.commit(self.prepare_deliver(home, events))

    def apply(self, source: str, batch: pa.RecordBatch, arrivals: Ints, received_ms: int) -> None:
        """Apply those routes of events that are of this shard, whatever their ids; shapes as of `Events`."""
        prepared = Prepared(received_ms)
        self._route(prepared, Events.judged(source, batch, arrivals, received_ms), np.arange(batch.num_rows))
        prepared.heard = None
        self._apply(prepared, self.next_offset)
        self.next_offset += 1

    def admit(self, source: str, ids: Hashes, contents: Ints, received_ms: int) -> npt.NDArray[np.uint8]:
        """Judge event ids whose home is here and remember the new ones; return their verdicts, uint8 [n]."""
        prepared = Prepared(received_ms)
        self._judge_ids(prepared, source, ids, contents, np.arange(len(ids)))
        return prepared.verdicts

    # -- replay: doing again what a record of the log says. It was judged when it was written.

    def replay_events(self, record: EventsRecord, offset: int) -> None:
        """Apply what a record says, and remember the ids that were new here.

        What is of a source or a table that is not declared any more is passed over.
        """
        self.remember(record)
        self.deliveries.have_all(record.homes)
        self._replay(record, offset, record.routes)

    def replay_in_steps(self, record: EventsRecord, offset: int, ends: Iterable[int]) -> Iterator[int]:
        """Apply what a record says up to its row `end`, for each of `ends`, which ascend; yield it when that is done.
        Then apply the rest. Ids are not remembered."""
        prepared = self._replayed(record, offset, record.routes)
        whole, promised, begin = prepared.routes, prepared.promised_words, 0
        prepared.promised_words = 0
        for end in (*ends, len(record.routes)):
            between = [(route, rows, *np.searchsorted(rows, [begin, end]).tolist()) for route, rows in whole]
            prepared.routes = [(route, rows[first:last]) for route, rows, first, last in between]
            self._apply(prepared, offset)
            yield end
            begin = end
        self._store.keep_promise(promised)

    def replay_offer(self, record: OfferRecord, offset: int) -> None:
        """Remember the ids of an offer that were new here, and owe them."""
        self.remember(record)
        self.next_offset = offset + 1
        if len(record.arrivals) and not (record.routes > 1).any():  # of the others it hears when they are taken
            self._store.hear_of(int(record.arrivals.max()), record.received_ms)
        if record.source in self._layout.sources and (record.routes & 1).any():
            self.deliveries.owe(offset)

    def replay_take(self, record: TakeRecord, offer: OfferRecord, offset: int) -> None:
        """Apply what was taken of an offer."""
        self.deliveries.have_all(record.homes)
        taken = np.zeros(len(offer.routes), np.uint32)
        taken[record.rows] = offer.routes[record.rows] & ~np.uint32(1)
        self._replay(offer, offset, taken)

    def remember(self, record: EventsRecord | OfferRecord) -> None:
        """Remember the ids of a record that were new here."""
        home = np.flatnonzero(record.routes & 1)
        declared = self._layout.sources.get(record.source)
        if declared is None or len(home) == 0 or (declared.event_id is None and record.ids is None):
            return
        batch = declared.upgraded(record.batch)
        ids = record.ids
        if declared.event_id is not None:
            ids = hash_columns([batch.column(declared.event_id)], batch.num_rows)
        contents = hash_columns(batch.columns, batch.num_rows)[:, 0].view(np.int64)
        assert ids is not None
        slots, ids = slots_of(ids, self.shard_map.n_slots), owned(ids)
        self._homes[record.source].remember(home, slots, ids.view(np.int64), contents, record.received_ms)

    def _replay(self, record: EventsRecord | OfferRecord, offset: int, routes: npt.NDArray[np.uint32]) -> None:
        if record.source in self._layout.sources:
            self._apply(self._replayed(record, offset, routes), offset)

    def _replayed(self, record: EventsRecord | OfferRecord, offset: int, routes: npt.NDArray[np.uint32]) -> Prepared:
        """Return what a record says, to be applied."""
        batch = self._layout.source(record.source).upgraded(record.batch)
        prepared = Prepared(record.received_ms)
        events = Events.judged(record.source, batch, record.arrivals, record.received_ms)
        self._route(prepared, events, np.arange(len(routes)))
        prepared.heard = None
        self.next_offset = offset + 1
        bits = {key: np.uint32(2 << number) for number, key in enumerate(record.tables)}
        for number, (route, possible) in enumerate(prepared.routes):
            said = np.zeros(len(routes), np.bool_)
            said[possible] = True  # what has become a token since is no key any more
            said &= (routes & bits.get(route.table.key, np.uint32(0))) != 0
            prepared.routes[number] = route, np.flatnonzero(said)
        return prepared

    # -- steps of prepare and commit

    def _judge(self, prepared: Prepared, events: Events, forgotten: npt.NDArray[np.bool_] | None) -> Ints:
        """Judge the ids at home here into `prepared.verdicts`, and remember them; return the rows that are new.

        forgotten bool [n]: which are not taken any more; None if all may be."""
        mine = home = np.flatnonzero(self._owned[slots_of(events.ids, self.shard_map.n_slots)])
        if forgotten is not None:
            mine = home[~forgotten[home]]
        if events.ids_given:
            new = self._judge_ids(prepared, events.source, owned(events.ids), owned(events.contents), mine)
        else:  # chosen for this very request, they cannot come again
            prepared.verdicts = np.full(events.n, ELSEWHERE, np.uint8)
            prepared.verdicts[mine] = NEW
            new = mine
        if forgotten is not None:
            prepared.verdicts[home[forgotten[home]]] = FORGOTTEN
        return new

    def _judge_ids(self, prepared: Prepared, source: str, ids: Hashes, contents: Ints, rows: Ints) -> Ints:
        prepared.verdicts = np.full(len(ids), ELSEWHERE, np.uint8)
        slots, seen = slots_of(ids, self.shard_map.n_slots), self._homes[source]
        # Of clocks that are apart the latest counts, in the log too: else a late id would be forgotten too early.
        prepared.received_ms = max(prepared.received_ms, self._ids.newest_ms)
        seen.admit(rows, slots, ids.view(np.int64), contents, prepared.received_ms, prepared.verdicts)
        new: Ints = rows[prepared.verdicts[rows] == NEW]
        prepared.remembered.append((seen, new, slots, ids.view(np.int64)))
        return new

    def _route(self, prepared: Prepared, events: Events, rows: Ints) -> None:
        """Find which of the events `rows` go to which table here, and have room for them."""
        chosen = np.zeros(events.n, np.bool_)
        chosen[rows] = True
        prepared.heard = events.arrivals[events.n :]
        prepared.times, prepared.arrivals = self._times(events.source, events.batch), owned(events.arrivals)
        prepared.keys_known = events.keys_known
        tables = None
        if events.keys is not None:
            tables = [t for t in self._routed(events.source, events.keys_known) if t.key in events.keys]
        for route in self._routes(prepared, events.source, events.batch, events.arrivals, chosen, tables):
            prepared.routes.append((route, route.rows))
        self._under_way.add(prepared)

    def _bits(self, prepared: Prepared, n: int, home: Ints) -> npt.NDArray[np.uint32]:
        """Return the routes of n events as a record has them; home: those that are new here."""
        bits = np.zeros(n, np.uint32)
        bits[home] = 1
        routed = ((route, rows) for route, rows in prepared.routes if route.table.routed)
        for number, (_, rows) in enumerate(routed):
            bits[rows] |= np.uint32(2 << number)
        return bits

    def _fields(self, prepared: Prepared, events: Events, bits: npt.NDArray[np.uint32], kept: Ints) -> Any:
        """Return what records of events have in common, of the events `kept`."""
        batch, stamps, clock = events.batch, prepared.arrivals[: events.n], prepared.arrivals[events.n :]
        if len(kept) < events.n:
            batch, stamps, bits = batch.take(pa.array(kept)), stamps[kept], bits[kept]
        source = self._layout.source(events.source)
        ids = events.ids[kept] if events.ids_given and source.event_id is None else None
        tables = tuple(route.table.key for route, _ in prepared.routes if route.table.routed)
        prepared.heard = np.concatenate([stamps, clock])
        return source.name, source.version, prepared.received_ms, tables, stamps, bits, batch, ids

    def _have(self, prepared: Prepared, homes: Sequence[HomeRecord]) -> None:
        """Take down whose records these are. What it had before is not taken back by `undo`."""
        prepared.homes = tuple(home for home in homes if not self.deliveries.has_had(home))
        for home in prepared.homes:
            self.deliveries.have(home)

    def _apply(self, prepared: Prepared, offset: int) -> None:
        heard = prepared.heard if prepared.heard is not None else prepared.arrivals
        if len(heard):
            self._store.hear_of(int(heard.max()), prepared.received_ms)
        base = offset << SEQUENCE_ROW_BITS
        for route, rows in prepared.routes:
            one = Queued(route, rows, prepared.times, prepared.arrivals, base)
            if not self._behind.has_put_off(one):
                self._apply_route(one)
        self._end(prepared)

    def _end(self, prepared: Prepared) -> None:
        """Have done with what was prepared: it has been applied, or will not be."""
        self._store.keep_promise(prepared.promised_words)
        self._under_way.discard(prepared)

    def _apply_route(self, one: Queued) -> None:
        route = one.route
        self._store.apply(
            route.table, one.rows, route.hashes, one.times, one.arrivals, route.inputs, route.masks, one.base
        )
        self._events[route.table.name] += len(one.rows)

    def _routed(self, source: str, keys_known: int) -> list[Table]:
        """Return the tables of a source that events are prepared for: also one that commits pass by, if it is for that
        one that they are brought here."""
        return [
            t for t in self._layout.tables_of(source)
            if t.key_number <= keys_known and (t.routed or not self._behind.passes_by(t))
        ]  # fmt: skip

    def _route_anew(self, prepared: Prepared, rows: Ints) -> None:
        """Find for an offer that was made before tables were added which of its events go to which table here, these,
        too; rows: of its record, those that are taken."""
        record = prepared.record
        assert isinstance(record, OfferRecord)
        self._store.keep_promise(prepared.promised_words)
        heard, prepared.promised_words, prepared.routes = prepared.heard, 0, []
        batch = self._layout.source(record.source).upgraded(record.batch)
        known = prepared.keys_known
        events = Events.judged(record.source, batch, record.arrivals, record.received_ms, known)
        self._route(prepared, events, rows)
        prepared.heard = heard

    def _times(self, source: str, batch: pa.RecordBatch) -> Ints:
        times: Ints = owned(self._layout.source(source).times_ms(batch))
        return times

    def _routes(
        self,
        prepared: Prepared,
        source: str,
        batch: pa.RecordBatch,
        arrivals: Ints,
        chosen: npt.NDArray[np.bool_] | None = None,
        tables: Sequence[Table] | None = None,
    ) -> list[_Route]:
        """Return what of a batch, or of its `chosen` rows, goes to this shard's slots of the tables of its source, or
        of some, and make room for it.

        What an event can make fail is here, before the filters, which take an event for applied once they have seen it.
        """
        n = batch.num_rows
        if tables is None:
            tables = self._routed(source, prepared.keys_known)
        of_keys: dict[tuple[str, ...], tuple[Ints, Ints, Ints]] = {}
        for key in (table.key for table in tables):
            if key not in of_keys:
                keys = [batch.column(name) for name in key]
                hashes = hash_columns(keys, n)
                slots = slots_of(hashes, self.shard_map.n_slots)
                mine = key_validity(keys, n) & self._owned[slots]
                rows = np.flatnonzero(mine if chosen is None else mine & chosen)
                of_keys[key] = hashes.view(np.int64), slots, rows
        hashed = [of_keys[table.key] for table in tables]
        applied = [t for t, (*_, rows) in zip(tables, hashed, strict=True) if len(rows)]
        inputs = dict.fromkeys(one for t in applied for one in t.inputs)
        of_strings = sum(
            self._strings.words_for(batch.column(one.field)) for one in inputs if _is_text(one, batch.schema)
        )
        events = [(table, slots[rows]) for table, (_, slots, rows) in zip(tables, hashed, strict=True)]
        arrival_ms = int(arrivals.max()) if len(arrivals) else NO_CLOCK
        prepared.promised_words += self._store.promise_room(events, arrival_ms, of_strings)
        concerned = np.zeros(n, np.bool_)
        for _, _, rows in hashed:
            concerned[rows] = True
        here = np.flatnonzero(concerned)
        values = {one: self._values(one, batch, here) for one in inputs}
        return [
            _Route(
                table, hashes, slots, rows,
                np.array([values[one] for one in table.inputs]).reshape(-1, n) if len(rows) else _NO_INPUTS,
                _masks(table, batch) if len(rows) else _NO_MASKS,
            )
            for table, (hashes, slots, rows) in zip(tables, hashed, strict=True)
        ]  # fmt: skip

    def _values(self, of: Input, batch: pa.RecordBatch, rows: Ints) -> npt.NDArray[np.float64]:
        """Return an input of each event, float64 [n], NaN for null; strings by address, those of `rows` only: the
        others are another shard's to keep."""
        if of.condition is not None:
            return holds(of.condition, batch).astype(np.float64)
        column = batch.column(of.field)
        if not _is_text(of, batch.schema):
            return of.numbers(column)
        if len(rows) == len(column):
            return self._strings.addresses(column)
        addresses = np.full(len(column), np.nan)
        addresses[rows] = self._strings.addresses(column.take(pa.array(rows)))
        return addresses

    # -- reads

    def read(self, question: Question) -> Answer:
        """Read what this shard has of the asked entities; what it has not is left out.

        Raises `AsOfInPast` if an explicit as-of lies before an event applied to the rows read, or
        before the cluster's clock.
        """
        return self._reader.read(question)

    def join(self, question: Question, events: Mapping[str, PastEvents], answer: Answer) -> None:
        """Answer a question while events come in: a piece of the point-in-time join of a training set.

        question.clock: int64 [n], ascending. Row i is read, as of question.as_of[i], when every event known up to
        clock[i] is applied and none after. events: by source, for every source. answer: made for the question, gets
        what is this shard's. The state is left as after all the events; the next piece is of what is known later.
        Raises `MemoryFull`.
        """
        assert question.as_of is not None
        program, base = question.program, self.next_offset << SEQUENCE_ROW_BITS
        self.next_offset += 1
        for name, past in events.items():
            times, prepared = self._times(name, past.batch), Prepared(0)
            for place, route in enumerate(self._routes(prepared, name, past.batch, past.arrivals)):
                if route.table not in program.tables:
                    continue
                rows = route.rows[past.routes[route.rows] >> np.uint32(place) & np.uint32(1) != 0]
                keys = question.hashes[program.keys.index(route.table.key)]
                asked = np.flatnonzero(self._owned[slots_of(keys.view(np.uint64), self.shard_map.n_slots)])
                # A stable sort of events before questions: an event at the very moment is seen.
                order = np.argsort(np.concatenate([past.known[rows], question.clock[asked]]), kind="stable")
                steps = np.concatenate([rows, ~asked])[order]
                self._store.join(
                    route.table, program, steps, route.hashes, times, owned(past.arrivals), route.inputs, route.masks,
                    keys, question.as_of, answer.values, answer.known, base,
                )  # fmt: skip
                self._events[route.table.name] += len(rows)
            self._store.keep_promise(prepared.promised_words)
        for past in events.values():  # what they push out of sight is of no question any more
            if len(past.arrivals):
                self._store.hear_of(int(past.arrivals.max()), NO_CLOCK)
        self._reader.read_texts(question, answer)

    # -- what it holds

    @property
    def parts(self) -> ShardParts:
        tables = [table for table in self._layout.tables if table not in self._behind]
        return ShardParts(self._layout, tables, self._store, self._strings, self._homes, self._events)

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
            filter_bytes=self._ids.allocated_bytes,
            ids=self._ids.ids,
            dedupe_horizon_ms=self._ids.horizon_ms,
            dedupe_held_ms=self._ids.held_ms,
            strings=len(self._strings),
            strings_refused=self._strings.refused,
            newest_arrival_ms=None if newest_ms == NO_CLOCK else newest_ms,
            offers=len(self._offers),
            owed=len(self.deliveries.owed),
        )

    def reclaim(self) -> int:
        """Free all that no window can see any more, at once rather than in steps; return how many entities."""
        return sum(self._store.reclaim_all(table) for table in self._layout.tables)

    def check(self) -> list[str]:
        """Return what is wrong with the state: an empty list if every invariant holds."""
        return self._store.check()


def _is_text(of: Input, schema: pa.Schema) -> bool:
    """Whether an input is the address of a string."""
    return of.kind == "value" and pa.types.is_string(schema.field(of.field).type)


def _masks(table: Table, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Return which events satisfy which of the table's conditions, bool [wheres, n], see `holds`."""
    masks = np.ones((len(table.wheres), batch.num_rows), np.bool_)
    for number, where in enumerate(table.wheres):
        if where is not None:
            masks[number] = holds(where, batch)
    return masks
