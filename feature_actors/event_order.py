"""All events of a cluster in one order, each once: what a replay sends.

Each shard has a log of its own. What the features of an entity are, to the last bit, depends on the order in which its
events were applied where it lives; so that is kept, of every entity of every table. Otherwise the order is that of
arrival. (Of requests that were under way at once, two shards may have applied the same two events in two orders; then
there is no such order. How many events there were of that kind is counted.)

    1. the logs are read side by side, always that which is behind by its arrival stamps
    2. an event is complete when it has been seen at its home, where it is accepted, and wherever it was applied
    3. it is ready when it is the next one of all its entities
    4. what is ready leaves by arrival, once no log can bring an earlier one

So what is held in memory is what was under way at once, and a record of each shard.
"""

from __future__ import annotations

import heapq
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.past import Past
from millpond.feature_actors.routes import key_validity
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.spread import is_brought

__all__ = ["EventOrder", "Run"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

#: So many events wait for others at most; then the oldest goes, whatever it waits for.
_WAITING_MAX = 1_000_000
_NEVER = 1 << 62


class Run(NamedTuple):
    """Events that follow each other: some rows of a batch, which is of the source's schema, and when they arrived."""

    source: str
    batch: pa.RecordBatch
    rows: list[int]
    arrivals: list[int]


@dataclass(slots=True)
class _Part:
    """Of a record of a shard, those events that are wanted: k rows of a batch. tables: of the record. dues int64 [k]:
    the newest arrival stamp up to each in its log."""

    source: Source
    tables: tuple[tuple[str, ...], ...]
    batch: pa.RecordBatch
    rows: Ints
    arrivals: Ints
    routes: npt.NDArray[np.uint32]
    dues: Ints


_Id = tuple[str, int, int]


class _Event:
    """An event that has been seen, by source, content and arrival stamp. seen: the shards that applied it, of
    `expected` so many. blocked: how many events of its entities go first; followers: those that it goes before."""

    __slots__ = ("batch", "blocked", "due", "entities", "expected", "followers", "home", "id", "row", "seen", "sent")

    def __init__(self, id: _Id, batch: pa.RecordBatch, row: int, due: int, expected: int) -> None:
        self.id, self.batch, self.row, self.due, self.expected = id, batch, row, due, expected
        self.home = self.sent = False
        self.seen = self.blocked = 0
        self.entities: list[int] = []
        self.followers: list[_Event] = []

    @property
    def complete(self) -> bool:
        return self.home and self.seen.bit_count() >= self.expected


class EventOrder:
    """The events of `sources` that arrived in [since_ms, until_ms).

    keep: says which rows of a batch are wanted, bool [n]. Raises what `Past.records` does.
    """

    def __init__(
        self,
        past: Past,
        sources: Mapping[str, Source],
        since_ms: int | None = None,
        until_ms: int | None = None,
        keep: Callable[[Source, pa.RecordBatch], Bools] | None = None,
    ) -> None:
        self._past, self._sources, self._keep = past, sources, keep
        self._since = -_NEVER if since_ms is None else since_ms
        self._until = _NEVER if until_ms is None else until_ms
        self._map = ShardMap.even(past.manifest.n_slots, past.shards)
        #: Events whose order two shards did not agree on.
        self.disputed = 0
        #: Sources that have events and are not among `sources`.
        self.undeclared: set[str] = set()
        #: Events that have not left, or have not been seen everywhere.
        self._open: dict[_Id, list[_Event]] = {}
        self._last_of: dict[int, _Event] = {}
        self._ready: list[tuple[int, int, _Event]] = []
        self._numbers = itertools.count()
        self._waiting = 0

    def runs(self) -> Iterator[Run]:
        """Yield all events; what is acknowledged after the beginning may be missing."""
        logs = [self._parts(shard) for shard in range(self._past.shards)]
        if len(logs) == 1:
            for part in logs[0]:
                home = (part.routes & 1) != 0
                if home.any():
                    yield Run(part.source.name, part.batch, part.rows[home].tolist(), part.arrivals[home].tolist())
            return
        # The first part of each is read now, which opens its log: at about one moment.
        firsts = [(shard, next(log, None)) for shard, log in enumerate(logs)]
        heads = [(int(first.dues[0]), shard, first) for shard, first in firsts if first is not None]
        heapq.heapify(heads)
        while heads:
            _, shard, head = heapq.heappop(heads)
            self._see(shard, head)
            if (after := next(logs[shard], None)) is not None:
                heapq.heappush(heads, (int(after.dues[0]), shard, after))
            yield from self._leaving(heads[0][0] if heads else _NEVER)
            while self._waiting > _WAITING_MAX:
                yield from self._oldest()
        yield from self._rest()

    # -- reading

    def _parts(self, shard: int) -> Iterator[_Part]:
        newest = -_NEVER
        for _, record in self._past.records(shard):
            if is_brought(record):
                continue
            source = self._sources.get(record.source)
            if source is None:
                self.undeclared.add(record.source)
                continue
            dues = np.maximum.accumulate(np.maximum(record.arrivals, newest))
            newest = int(dues[-1]) if len(dues) else newest
            wanted = (record.routes != 0) & (record.arrivals >= self._since) & (record.arrivals < self._until)
            batch = source.upgraded(record.batch)
            if self._keep is not None and wanted.any():
                wanted &= self._keep(source, batch)
            at = rows = np.flatnonzero(wanted)
            if len(at) * 2 < batch.num_rows:  # nothing is held for the sake of a few
                batch, rows = batch.take(pa.array(at)), np.arange(len(at))
            if len(at):
                yield _Part(source, record.tables, batch, rows, record.arrivals[at], record.routes[at], dues[at])

    def _see(self, shard: int, part: _Part) -> None:
        """Note where the events of a part have been seen, and which of their entities' came before."""
        source, n = part.source.name, part.batch.num_rows
        contents = hash_columns(part.batch.columns, n)[:, 0]
        concerned = np.zeros((self._map.n_shards, n), np.bool_)
        entities: list[tuple[int, list[int]]] = []
        for table, key in enumerate(part.tables):
            columns = [part.batch.column(name) for name in key]
            hashes, valid = hash_columns(columns, n), np.flatnonzero(key_validity(columns, n))
            concerned[self._map.shards_of(hashes)[valid], valid] = True
            salt = np.uint64(zlib.crc32(f"{source}/{key}".encode()) << 32)
            entities.append((2 << table, (hashes[part.rows, 0] ^ salt).tolist()))
        expected = concerned.sum(axis=0)[part.rows].tolist()
        seen = zip(part.rows.tolist(), contents[part.rows].tolist(), part.arrivals.tolist(), part.routes.tolist(),
                   expected, part.dues.tolist(), strict=True)  # fmt: skip
        for at, (row, content, arrival, bits, shards, due) in enumerate(seen):
            home, applied = bool(bits & 1), (1 << shard) if bits > 1 else 0
            alike = self._open.setdefault((source, content, arrival), [])
            # Events that are alike in everything may stand for each other.
            for event in alike:
                if not (home and event.home) and not (applied & event.seen):
                    break
            else:
                event = _Event((source, content, arrival), part.batch, row, due, shards)
                alike.append(event)
                self._waiting += 1
            event.seen |= applied
            if home:
                event.home, event.due = True, due
            if applied and not event.sent:
                for bit, keys in entities:
                    if bits & bit:
                        self._comes_last(event, keys[at])
            if event.complete:
                self._completed(event)

    def _comes_last(self, event: _Event, entity: int) -> None:
        before = self._last_of.get(entity)
        if before is not event:
            self._last_of[entity] = event
            event.entities.append(entity)
            if before is not None:
                event.blocked += 1
                before.followers.append(event)

    def _completed(self, event: _Event) -> None:
        if event.sent:
            self._close(event)
        elif event.blocked == 0:
            heapq.heappush(self._ready, (event.due, next(self._numbers), event))

    # -- leaving

    def _leaving(self, until_ms: int) -> Iterator[Run]:
        while self._ready and self._ready[0][0] <= until_ms:
            _, _, event = heapq.heappop(self._ready)
            if not event.sent:
                yield self._sent(event)

    def _sent(self, event: _Event) -> Run:
        """Let an event go; who waited for nothing else is ready."""
        event.sent = True
        self._waiting -= 1
        for entity in event.entities:
            if self._last_of.get(entity) is event:
                del self._last_of[entity]
        for follower in event.followers:
            follower.blocked -= 1
            if follower.complete and not follower.sent:
                self._completed(follower)
        event.followers = []
        if event.complete:
            self._close(event)
        source, _, arrival = event.id
        return Run(source, event.batch, [event.row], [arrival])

    def _close(self, event: _Event) -> None:
        alike = self._open[event.id]
        alike.remove(event)
        if not alike:
            del self._open[event.id]

    def _oldest(self) -> Iterator[Run]:
        """Let the event go that waits longest, though others should go first."""
        oldest = next(e for alike in self._open.values() for e in alike if not e.sent)
        self.disputed += 1
        yield self._sent(oldest)

    def _rest(self) -> Iterator[Run]:
        """Yield what is left at the end: what was under way at the beginning, and what is in no order."""
        left = sorted((e for alike in self._open.values() for e in alike if not e.sent), key=lambda e: e.due)
        for event in left:
            event.expected = 0
            if not event.home:  # accepted since
                self._sent(event)
            elif event.blocked == 0:
                self._completed(event)
        for event in left:
            yield from self._leaving(_NEVER)
            if not event.sent:
                self.disputed += 1
                yield self._sent(event)
        yield from self._leaving(_NEVER)
