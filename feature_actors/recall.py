"""Recall: what rows held when they had been brought up to an event of the log, read again from the past.

For each shard that has a part:

    1. read what had no event yet from an empty shard
    2. go through its past once, in the order of the log, and look at events of the asked entities alone
    3. apply these, and read each row while it is where it was: after the event, before the next one of its entity

What is read is as of the time that it was read as of. Features come out of the same kernels as when they were served,
from a shard that has nothing but these entities: memory goes with their number, not with the cluster's.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.errors import AsOfInPast
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Layout, PlanProgram, Table
from millpond.feature_actors.log.record import EventsRecord
from millpond.feature_actors.past import Past
from millpond.feature_actors.plan import Answer, Question
from millpond.feature_actors.reader import MemoryReader
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.tiles.read import NO_CLOCK

__all__ = [
    "GONE", "LATER", "NOT_ASKED", "NO_EVENT", "READ", "EntityEvents", "Recalled", "RowReads", "events_of",
    "read_part", "recall",
]  # fmt: skip

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Key = tuple[str, ...]

#: In place of an offset: the row had no event yet; the part is not asked for.
NO_EVENT, NOT_ASKED = -1, -2
#: What became of a part: it was read; the past has no such event; its row has an event that is later than the as-of.
READ, GONE, LATER = range(3)

#: So many rows, records, or bytes of a source are looked at together; to ask a smaller record for its bytes takes long.
_ROWS, _RECORDS, _BYTES = 1 << 16, 1 << 12, 64 << 20
_SIZED_ROWS = 32
#: Nothing is ever out of sight: events are applied ahead of the times that others are read as of.
_NEVER_RECLAIM_MS = 1 << 60
_NO_END = 1 << 62

Progress = Callable[[int], None]


@dataclass(frozen=True)
class RowReads:
    """What n ids were read as of, by one plan, and where the rows stood.

    hashes int64 [keys, n, 2]; as_of int64 [n]; shards and offsets int64 [n, parts]: of the last event that had been
    applied to the row, or `NO_EVENT`, or `NOT_ASKED`. kth int64 [n, parts]: with how many of the record's events of its
    key the row is read, 0 for all of them.
    """

    program: PlanProgram
    hashes: Ints
    as_of: Ints
    shards: Ints
    offsets: Ints
    kth: Ints

    @property
    def n(self) -> int:
        return len(self.as_of)


@dataclass(frozen=True)
class Recalled:
    """What was read: outcome int64 [n, parts], `READ` or why not; events int64 [n, parts]: how many events of its key
    the record at the offset has. Of the answer, what was not read is empty."""

    program: PlanProgram
    answer: Answer
    outcome: Ints
    events: Ints

    @classmethod
    def nothing(cls, reads: RowReads) -> Recalled:
        n, program = reads.n, reads.program
        answer = Answer(
            reads.as_of.copy(),
            np.full((n, program.width), np.nan),
            np.zeros((n, len(program.view_names)), np.bool_),
            np.full((n, 1 + program.parts), -1, np.int64),
            {column: [None] * n for column, _ in program.texts},
        )
        return cls(program, answer, np.full((n, program.parts), GONE), np.zeros((n, program.parts), np.int64))

    def take(self, part: int, rows: Ints, answer: Answer, of: Ints) -> None:
        """Take a part of some rows from the rows `of` of another answer to the same program."""
        columns, views = self.program.columns_of_part[part], self.program.views_of_part[part]
        self.answer.values[np.ix_(rows, columns)] = answer.values[np.ix_(of, columns)]
        self.answer.known[np.ix_(rows, views)] = answer.known[np.ix_(of, views)]
        for column in set(columns.tolist()) & answer.texts.keys():
            for row, other in zip(rows.tolist(), of.tolist(), strict=True):
                self.answer.texts[column][row] = answer.texts[column][other]
        self.outcome[rows, part] = READ


@dataclass(frozen=True, slots=True)
class _Asked:
    """One part of one id: `of` says by which of the `RowReads`."""

    of: int
    row: int
    part: int
    lo: int
    offset: int
    kth: int


def recall(
    past: Past,
    layout: Layout,
    asked: Sequence[RowReads],
    progress: Progress = lambda records: None,
) -> list[Recalled]:
    """Read rows as they were. progress: told how many more records have been looked at.

    layout: that the programs are of, of any views over the sources; it need not be the cluster's. Raises what
    `Past.records` does.
    """
    recalled = [Recalled.nothing(reads) for reads in asked]
    for number in range(past.shards):
        of_shard = [np.argwhere((r.shards == number) & (r.offsets != NOT_ASKED)) for r in asked]
        if any(len(parts) for parts in of_shard):
            _Recall(past, layout, number, asked, recalled).read(of_shard, progress)
    return recalled


class _OfTable:
    """What is asked of one table, by offset. keys int64 [k]: the low halves of their hashes, ascending."""

    def __init__(self, asked: Sequence[_Asked]) -> None:
        self.asked = sorted(asked, key=lambda one: one.offset)
        self.offsets: Ints = np.array([one.offset for one in self.asked], np.int64)
        self.los: Ints = np.array([one.lo for one in self.asked], np.int64)
        self.kths: Ints = np.array([one.kth for one in self.asked], np.int64)
        self.keys: Ints = np.unique(self.los)


class _Recall:
    """Recall from one shard."""

    def __init__(
        self, past: Past, layout: Layout, number: int, asked: Sequence[RowReads], recalled: Sequence[Recalled]
    ) -> None:
        self._past, self._layout, self._number = past, layout, number
        self._asked, self._recalled = asked, recalled
        shard_map = ShardMap.even(past.manifest.n_slots, past.shards)
        self._shard = Shard(
            layout, shard_map, number, seed=past.manifest.hash_seed, reclaim_margin_ms=_NEVER_RECLAIM_MS
        )
        self._reader = MemoryReader(shard_map, [number])
        self._reader.attach(number, self._shard.memory)

    def read(self, of_shard: Sequence[Ints], progress: Progress) -> None:
        """Read (row, part) pairs, int64 [m, 2], of each of the `RowReads`."""
        by_table: dict[int, list[_Asked]] = defaultdict(list)
        unknown = []
        for of, pairs in enumerate(of_shard):
            reads = self._asked[of]
            for row, part in pairs.tolist():
                offset = int(reads.offsets[row, part])
                lo = int(reads.hashes[reads.program.key_of_part[part], row, 0])
                one = _Asked(of, row, part, lo, offset, int(reads.kth[row, part]))
                if offset == NO_EVENT:
                    unknown.append(one)
                else:
                    by_table[reads.program.tables[part].number].append(one)
        self._read(unknown)
        if not by_table:
            return
        of_tables = {number: _OfTable(of) for number, of in by_table.items()}
        last = max(int(of.offsets[-1]) for of in of_tables.values())
        for source, records in _grouped(self._past.records(self._number), last, progress):
            tables = [table for table in self._layout.tables_of(source) if table.number in of_tables]
            if tables:
                self._replay(records, {table: of_tables[table.number] for table in tables})

    def _replay(self, records: Sequence[tuple[int, EventsRecord]], asked: Mapping[Table, _OfTable]) -> None:
        """Apply records of one source, and read on the way what is asked of its tables."""
        events = _Events(self._layout, records, {table: of.keys for table, of in asked.items()})
        if not events.n:
            return
        spans = []
        for table, of in asked.items():
            for one, span in _spans(events, table, of):
                self._recalled[one.of].events[one.row, one.part] = span.events
                spans.append((span, one))
        due = _read_points(spans)
        for end in self._shard.replay_in_steps(events.record, self._shard.next_offset, sorted(due)):
            self._read(due.pop(end, ()))

    def _read(self, some: Sequence[_Asked]) -> None:
        """Read rows as they are now."""
        alike = itertools.groupby(sorted(some, key=lambda one: (one.of, one.part)), lambda one: (one.of, one.part))
        for (of, part), group in alike:
            rows = np.array([one.row for one in group])
            try:
                self._read_part(of, part, rows)
            except AsOfInPast:
                for row in rows.tolist():
                    try:
                        self._read_part(of, part, np.array([row]))
                    except AsOfInPast:
                        self._recalled[of].outcome[row, part] = LATER

    def _read_part(self, of: int, part: int, rows: Ints) -> None:
        reads = self._asked[of]
        answer = read_part(self._reader, reads.program, part, reads.hashes[:, rows], reads.as_of[rows])
        self._recalled[of].take(part, rows, answer, np.arange(len(rows)))


def read_part(reader: MemoryReader, program: PlanProgram, part: int, hashes: Ints, as_of: Ints) -> Answer:
    """Read one part of a program for n ids; the rest of the answer is empty. Raises `AsOfInPast`."""
    # No clock, and no time of the shard's: what counts is the time that it is read as of.
    question = Question(
        program, np.ascontiguousarray(hashes), np.full(len(as_of), NO_CLOCK), False, as_of,
        np.array([[part, part + 1]], np.int64),
    )  # fmt: skip
    answer = Answer.empty(question)
    answer.values.fill(np.nan)
    reader.attempt(question, answer, 0)
    return answer


def _grouped(
    past: Iterator[tuple[int, EventsRecord]], last: int, progress: Progress
) -> Iterator[tuple[str, list[tuple[int, EventsRecord]]]]:
    """Yield the records up to offset `last` source by source, some together, those of a source in order."""
    waiting: dict[str, list[tuple[int, EventsRecord]]] = defaultdict(list)
    rows: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    seen = 0
    for offset, record in past:
        if offset > last:
            break
        seen += 1
        source = record.source
        waiting[source].append((offset, record))
        rows[source] += record.batch.num_rows
        sizes[source] += record.batch.nbytes if record.batch.num_rows >= _SIZED_ROWS else 0
        if rows[source] >= _ROWS or len(waiting[source]) >= _RECORDS or sizes[source] >= _BYTES:
            yield source, waiting.pop(source)
            rows[source] = sizes[source] = 0
            progress(seen)
            seen = 0
    yield from waiting.items()
    progress(seen)


class _Events:
    """Of some records of a source the events of asked entities, as one record; by table the keys of its events.

    wanted: by table the low halves of the hashes of keys, int64 [k], ascending. n events; offsets int64 [n].
    """

    def __init__(
        self, layout: Layout, records: Sequence[tuple[int, EventsRecord]], wanted: Mapping[Table, Ints]
    ) -> None:
        (name,) = {record.source for _, record in records}
        source = layout.source(name)
        batches = [source.upgraded(record.batch) for _, record in records]
        batch = batches[0]
        if len(batches) > 1:
            batch = pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
        sizes = [one.num_rows for one in batches]
        bits = np.zeros(batch.num_rows, np.uint32)
        hashes: dict[Key, Ints] = {}
        routes = tuple(dict.fromkeys(table.key for table in wanted))  # an added table goes by the route of its key
        for number, key in enumerate(routes):
            keys = np.unique(np.concatenate([of for table, of in wanted.items() if table.key == key]))
            mine = np.concatenate([_applied(record, key) for _, record in records])
            columns = [batch.column(field) for field in key]
            hashes[key] = hash_columns(columns, batch.num_rows)[:, 0].view(np.int64)
            mine &= keys[np.searchsorted(keys[:-1], hashes[key])] == hashes[key]
            bits[mine] |= np.uint32(2 << number)
        rows = np.flatnonzero(bits)
        self.n = len(rows)
        self.offsets: Ints = np.repeat([offset for offset, _ in records], sizes)[rows]
        self.record = EventsRecord(
            name, source.version, NO_CLOCK, routes,
            np.concatenate([record.arrivals for _, record in records])[rows], bits[rows], batch.take(pa.array(rows)),
        )  # fmt: skip
        #: By table: its events, int64 [k], and the low halves of their keys' hashes.
        self.of_table: dict[Table, tuple[Ints, Ints]] = {}
        for table in wanted:
            at = np.flatnonzero(bits[rows] & np.uint32(2 << routes.index(table.key)))
            self.of_table[table] = at, hashes[table.key][rows[at]]


def _applied(record: EventsRecord, key: Key) -> Bools:
    """Return which events of a record were applied to the table of a key, bool [n]."""
    if key not in record.tables:
        return np.zeros(len(record.routes), np.bool_)
    return (record.routes & np.uint32(2 << record.tables.index(key))).astype(np.bool_)


class _Span(NamedTuple):
    """Where a row is to be read: when so many events have been applied, from `earliest` to `latest`. events: how many
    the record has of its key."""

    earliest: int
    latest: int
    events: int


def _spans(events: _Events, table: Table, of: _OfTable) -> Iterator[tuple[_Asked, _Span]]:
    """Yield what is asked of a table at the offsets of some events: after the row's event, before its key's next."""
    at, keys = events.of_table[table]
    if not len(at):
        return
    here = slice(*np.searchsorted(of.offsets, [events.offsets[0], events.offsets[-1] + 1]).tolist())
    order = np.lexsort((at, keys))
    at, keys = at[order], keys[order]
    # One number for key and record, so that the events of a key in a record are found in one go.
    distinct, key_numbers = np.unique(keys, return_inverse=True)
    offsets = np.unique(events.offsets)
    numbers = key_numbers * len(offsets) + np.searchsorted(offsets, events.offsets[at])
    wanted_key = np.searchsorted(distinct[:-1], of.los[here])
    wanted_offset = np.searchsorted(offsets[:-1], of.offsets[here])
    there = (distinct[wanted_key] == of.los[here]) & (offsets[wanted_offset] == of.offsets[here])
    wanted = wanted_key * len(offsets) + wanted_offset
    begins, ends = np.searchsorted(numbers, wanted, "left"), np.searchsorted(numbers, wanted, "right")
    counts = ends - begins
    afters = np.where(of.kths[here] > 0, begins + of.kths[here], ends) - 1
    good = np.flatnonzero(there & (counts > 0) & (afters < ends))
    nexts = np.append(at, events.n)
    same_key = np.append(keys[1:] == keys[:-1], [False])
    for i, after in zip(good.tolist(), afters[good].tolist(), strict=True):
        latest = nexts[after + 1] if same_key[after] else events.n
        yield of.asked[here.start + i], _Span(int(at[after]) + 1, int(latest), int(counts[i]))


def _read_points(spans: Sequence[tuple[_Span, _Asked]]) -> dict[int, list[_Asked]]:
    """Return after how many events to read what; together what can be."""
    points: dict[int, list[_Asked]] = defaultdict(list)
    point = -1
    for span, one in sorted(spans, key=lambda item: item[0].latest):
        if point < span.earliest:
            point = span.latest
        points[point].append(one)
    return points


@dataclass(frozen=True)
class EntityEvents:
    """Events of one entity, as they were applied to its row of a table: offsets and arrivals int64 [n]."""

    source: Source
    batch: pa.RecordBatch
    arrivals: Ints
    offsets: Ints

    @property
    def n(self) -> int:
        return len(self.offsets)

    @property
    def times_ms(self) -> Ints:
        return self.source.times_ms(self.batch)

    def first(self, n: int) -> EntityEvents:
        return EntityEvents(self.source, self.batch.slice(0, n), self.arrivals[:n], self.offsets[:n])

    def up_to(self, offset: int) -> EntityEvents:
        """Return those up to an offset, included."""
        return self.first(int(np.searchsorted(self.offsets, offset, "right")))

    def where(self, chosen: Bools) -> EntityEvents:
        batch = self.batch.filter(pa.array(chosen))
        return EntityEvents(self.source, batch, self.arrivals[chosen], self.offsets[chosen])

    def plain(self, i: int) -> dict[str, Any]:
        """Return an event as JSON can hold it: its fields, times in ms, then its `_arrival_ms` and `_offset`."""
        event = {name: column[i].as_py() if not pa.types.is_timestamp(column.type) else column[i].value
                 for name, column in zip(self.batch.schema.names, self.batch.columns, strict=True)}  # fmt: skip
        return {**event, "_arrival_ms": int(self.arrivals[i]), "_offset": int(self.offsets[i])}


def events_of(
    past: Past, layout: Layout, keys: Sequence[tuple[Table, Ints]], progress: Progress = lambda records: None
) -> list[EntityEvents]:
    """Return all events of some entities. keys: of each the table, and the hash, int64 [2], of its key."""
    shard_map = ShardMap.even(past.manifest.n_slots, past.shards)
    parts: dict[tuple[int, int], list[EntityEvents]] = defaultdict(list)
    hashes = np.array([key for _, key in keys], np.int64).reshape(-1, 2)
    owners = shard_map.shards_of(hashes.view(np.uint64))
    for number in np.unique(owners).tolist():
        wanted: dict[Table, set[int]] = defaultdict(set)
        for (table, key), owner in zip(keys, owners.tolist(), strict=True):
            if owner == number:
                wanted[table].add(int(key[0]))
        for source, records in _grouped(past.records(number), _NO_END, progress):
            of_source = {t: np.array(sorted(los)) for t, los in wanted.items() if t.source.name == source}
            if not of_source:
                continue
            events = _Events(layout, records, of_source)
            for table, (at, los) in events.of_table.items():
                for lo in wanted[table] & set(los.tolist()):
                    rows = at[los == lo]
                    parts[table.number, lo].append(
                        EntityEvents(
                            table.source,
                            events.record.batch.take(pa.array(rows)),
                            events.record.arrivals[rows],
                            events.offsets[rows],
                        )
                    )
    return [_together(table, parts[table.number, int(key[0])]) for table, key in keys]


def _together(table: Table, parts: Sequence[EntityEvents]) -> EntityEvents:
    if not parts:
        none = np.empty(0, np.int64)
        return EntityEvents(table.source, pa.RecordBatch.from_pylist([], schema=table.source.schema), none, none)
    batch = pa.Table.from_batches([one.batch for one in parts]).combine_chunks().to_batches()[0]
    return EntityEvents(
        table.source,
        batch,
        np.concatenate([one.arrivals for one in parts]),
        np.concatenate([one.offsets for one in parts]),
    )
