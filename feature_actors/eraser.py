"""Forgetting entities in one shard: what tombstones ask for, step by step, on what the shard has and keeps.

    1. learn      which rows are theirs, and where else their events went, from history and log; in a thread
    2. remove     their rows, between two commits; then a snapshot is taken without them, and the older ones go
    3. log        records get tokens, a few in each transaction; in the thread of the log
    4. history    parts get tokens; in the thread that writes them
    5. others     rows of others that had values which are tokens now are made anew, beside, in a thread; then put in
                  place, between two commits, and strings go that no row names any more; another snapshot is taken
    6. scrub      what was there before is overwritten on the disk; in the thread of the log
    7. finish     the tombstones say that it is done, and name nobody any more

Tombstones hold from before 1. on, so nothing comes after it that would have to be forgotten. After a crash at any step
all of it is done again: what is done already is not found any more. Until the snapshot of 2. is there nothing is
rewritten, so what 1. learns is learned again; from then on a recovery has not the rows.

Pure, but for files: `shard_forgetter` takes the steps. No other snapshot, truncation or backfill is under way
meanwhile.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.durable import DurableShard
from millpond.feature_actors.erasure import Erasure, replaced_fields
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Table
from millpond.feature_actors.log.history_rewriter import rewrite_history
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.record import Decoded, EventsRecord, OfferRecord
from millpond.feature_actors.log.snapshot import newest_snapshots
from millpond.feature_actors.routes import key_validity
from millpond.feature_actors.steps import In, Rest, Steps
from millpond.feature_actors.tombstones import Tombstone

__all__ = ["Eraser"]

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Key = tuple[int, int]

#: So many records are looked at in a step, and so many bytes rewritten: some milliseconds.
_RECORDS, _BYTES = 64, 1 << 20
#: How long appends have the log to themselves between two; how long it is waited for who reads it just now.
_BREATH_S, _READS_S = 0.001, 0.05


class Eraser:
    """Forget the entities of all tombstones of a shard that wait."""

    def __init__(self, durable: DurableShard) -> None:
        self._durable, self._shard = durable, durable.shard
        # Those that are behind are given what is left, later.
        self._tables = self._shard.parts.tables
        # What comes meanwhile is forgotten the next time: its rows are learned of before its events show tokens.
        tombstones = self._shard.tombstones.as_of_now()
        self.waiting = tombstones.waiting
        self._erasure = Erasure(tombstones, self._shard.layout.sources)
        assert isinstance(durable.log, Log)
        self._log = durable.log
        self._log_at, self._log_end = self._log.first, self._log.next
        #: Of each, rows that are theirs and how many events were counted there, by number of the table. What is of
        #: several is counted once.
        self._rows: dict[Tombstone, dict[int, set[Key]]] = {one: defaultdict(set) for one in self.waiting}
        self._counted: dict[Tombstone, Counter[int]] = {one: Counter() for one in self.waiting}
        #: What of them came later, and begins afresh: table, record, its offset and which of its events.
        self._later: list[tuple[Table, EventsRecord, int, Bools]] = []
        self._past = durable.past(whole=durable.shard_folder.history_uri is not None)
        #: Records of their events at home here: before and after.
        self._homes: list[tuple[EventsRecord, EventsRecord]] = []
        #: What was removed of each: events by their home; a row of several by whichever is first.
        self.removed: dict[Tombstone, Counter[str]] = {one: Counter() for one in self.waiting}
        self._erasing = durable.erasing
        self._beside = self._shard.alike()
        self._anew: set[Table] = set()
        self._vacuumed = False

    def steps(self, snapshot: Callable[[], Steps[Any]], say: Callable[[str], None]) -> Steps[None]:
        """Yield 1. to 6. as steps. snapshot: yields those of one, and of truncating the log. say: told what is done."""
        say("reading its past")
        yield In("views", self.learn)
        self.remove()
        say("taking a snapshot")
        yield from snapshot()
        yield In("house", self.remove_snapshots)
        say("rewriting its log")
        while (yield In("log", self.rewrite_log)):
            yield Rest(_BREATH_S)
        say("rewriting its history")
        yield In("history", self.rewrite_history)
        say("making rows of others anew")
        if (yield In("views", self.make_beside)):
            self.put_in_place()
            yield from snapshot()
            yield In("house", self.remove_snapshots)
        say("scrubbing its log")
        while not (yield In("log", self.scrub)):
            yield Rest(_READS_S)

    # -- 1.

    def learn(self) -> None:
        """Raises `LogDamaged`, `HistoryDamaged`, `HistoryUnavailable`."""
        for one in self.waiting:
            for table in self._tables:
                if table.key == (one.field,) and one.hash is not None:
                    self._rows[one][table.number].add(one.hash)
        self._read_on()

    def _read_on(self) -> None:
        for offset, record in self._committed():
            counted: dict[int, Bools] = {}
            forgotten = self._erasure.forgotten(record.source, record.batch, record.arrivals)
            # First those whose events the shard does not count any more.
            for one in sorted(forgotten, key=lambda one: _named(one.tombstone) not in self._erasing.removed):
                self._learn(record, one.tombstone, one.rows, counted)
            for one in self._erasure.forgotten(record.source, record.batch, record.arrivals, later=True):
                if not one.tombstone.done:
                    for table, applied in self._applied(record, one.tombstone, one.rows):
                        # Of a row that is another's, too, what is forgotten of that one does not come back.
                        if (left := applied & ~counted.get(table.number, np.False_)).any():
                            self._later.append((table, record, offset, left))

    def _committed(self) -> Iterator[tuple[int, EventsRecord]]:
        """Yield what has been committed since the last time. What is in the log alone is to come after it: applied now,
        with rows numbered as the log has them, it would be applied once more by its commit, which numbers them as sent.
        """
        return self._past.read_on(self._shard.next_offset)

    def _applied(self, record: EventsRecord, tombstone: Tombstone, rows: Bools) -> Iterator[tuple[Table, Bools]]:
        """Yield the tables that have the forgotten field in their key, and which of some events were applied there."""
        for table in self._tables:
            if table.source.name == record.source and table.key in record.tables and tombstone.field in table.key:
                applied = rows & ((record.routes & np.uint32(2 << record.tables.index(table.key))) != 0)
                # Of an offer the routes are as they were, also where another field of the key shows a token.
                applied &= key_validity([record.batch.column(name) for name in table.key], record.batch.num_rows)
                if applied.any():
                    yield table, applied

    def _learn(self, record: EventsRecord, tombstone: Tombstone, rows: Bools, counted: dict[int, Bools]) -> None:
        """counted: which events of the record are so of others, by number of the table, bool [n]."""
        if tombstone.done:
            return
        for table, applied in self._applied(record, tombstone, rows):
            hashes = _hashes(table, record)[applied]
            self._rows[tombstone][table.number].update(map(tuple, hashes.tolist()))
            others = counted.get(table.number, np.zeros(len(applied), np.bool_))
            self._counted[tombstone][table.number] += int(np.count_nonzero(applied & ~others))
            counted[table.number] = others | applied
        self._learn_others(record, tombstone, rows)
        home = np.flatnonzero(rows & ((record.routes & 1) != 0))
        if len(home):
            self.removed[tombstone]["events"] += len(home)
            before = replace(
                record,
                arrivals=record.arrivals[home],
                routes=np.ones(len(home), np.uint32),
                batch=record.batch.take(pa.array(home)),
                ids=None if record.ids is None else record.ids[home],
                homes=(),
            )
            forgotten = self._erasure.forgotten(before.source, before.batch, before.arrivals)
            self._homes.append((before, self._erasure.record(before, forgotten)))

    def _learn_others(self, record: EventsRecord, tombstone: Tombstone, rows: Bools) -> None:
        """Note rows of others that have seen values which are replaced, and the strings among these."""
        for table in self._tables:
            if table.source.name != record.source or table.key not in record.tables or tombstone.field in table.key:
                continue
            if table.reads & set(replaced_fields(table.source, tombstone.field)):
                applied = rows & ((record.routes & np.uint32(2 << record.tables.index(table.key))) != 0)
                hashes = _hashes(table, record)[applied]
                self._erasing.stale.setdefault(table.name, set()).update(map(tuple, hashes.tolist()))
        for table in self._shard.layout.tables:  # also one that has failed, and has given up its rows
            if table.source.name == record.source:
                self._note_texts(record, rows, table.reads & set(replaced_fields(table.source, tombstone.field)))

    def _note_texts(self, record: EventsRecord, rows: Bools, fields: Collection[str]) -> None:
        for name in fields:
            if name in record.batch.schema.names and pa.types.is_string(record.batch.column(name).type):
                self._erasing.texts.update(filter(None, record.batch.column(name).filter(pa.array(rows)).to_pylist()))

    # -- 2.

    def remove(self) -> None:
        """Then a snapshot is to be taken, and `remove_snapshots` called. Raises `MemoryFull`."""
        self._read_on()  # what came meanwhile
        for one in self.waiting:
            keys = {number: np.array(sorted(of), np.int64).reshape(-1, 2) for number, of in self._rows[one].items()}
            # Those that the snapshot has counted out are not counted again.
            events = {} if _named(one) in self._erasing.removed else self._counted[one]
            self.removed[one]["rows"] += self._shard.remove(keys, events)
        for table, record, offset, rows in self._later:
            self._shard.apply_again(table, record, offset, rows)
        for before, after in self._homes:
            self._shard.other_ids(before, after)
        self._erasing.removed |= {_named(one) for one in self.waiting}

    def remove_snapshots(self) -> None:
        """Remove all snapshots but the newest, damaged ones, too: they have the rows; and what a `millpond check --fix`
        that was broken off has left of the log."""
        shutil.rmtree(self._durable.shard_folder.path / "log.new", ignore_errors=True)
        folder = self._durable.shard_folder.snapshots
        newest = newest_snapshots(folder)[:1]
        for path in folder.iterdir():
            if path not in newest:
                path.unlink(missing_ok=True)

    # -- 3.

    def rewrite_log(self) -> bool:
        """Rewrite some records; return whether there are more. Raises `LogFull`, `LogDamaged`."""
        some: list[tuple[int, Decoded]] = []
        self._log_at = max(self._log_at, self._log.first)  # it may have been truncated
        end, size = min(self._log_at + _RECORDS, self._log_end), 0
        while self._log_at < end and size < _BYTES:
            record, settled = self._log.get(self._log_at)
            if isinstance(record, EventsRecord | OfferRecord) and (
                forgotten := self._erasure.forgotten(record.source, record.batch, record.arrivals)
            ):
                some.append((self._log_at, Decoded(self._erasure.record(record, forgotten), settled)))
                size += record.batch.nbytes
            self._log_at += 1
        if some:
            self._log.rewrite(some)
        return self._log_at < self._log_end

    # -- 4.

    def rewrite_history(self) -> None:
        """Raises `HistoryUnavailable`, `HistoryDamaged`."""
        folder = self._durable.shard_folder
        if folder.history_uri is not None:
            rewrite_history(folder.history_uri, self._shard.number, self._erasure, folder.path)

    # -- 5.

    def make_beside(self) -> bool:
        """Make rows of others anew, if all their events are known still; return whether there are any, or strings that
        may go. Raises as `learn`; and `MemoryFull`."""
        self._past = self._durable.past(whole=self._durable.shard_folder.history_uri is not None)
        stale = [table for table in self._tables if table.name in self._erasing.stale]
        self._anew = {table for table in stale if self._durable.has_whole_past(table.source.name)}
        if self._anew:
            self._apply_beside()
        return bool(self._erasing.stale or self._erasing.texts)

    def _apply_beside(self) -> None:
        lows = {table: np.unique([lo for lo, _ in self._erasing.stale[table.name]]) for table in self._anew}
        for offset, record in self._committed():
            for table in lows:
                if table.source.name == record.source and table.key in record.tables:
                    rows = np.isin(_hashes(table, record)[:, 0], lows[table])
                    rows &= (record.routes & np.uint32(2 << record.tables.index(table.key))) != 0
                    if rows.any():
                        self._beside.apply_again(table, record, offset, rows)

    def put_in_place(self) -> None:
        """Then a snapshot is to be taken, and `remove_snapshots` called. Raises `MemoryFull`.

        Where not all events of a row are known any more, only its features of the fields in question begin anew.
        """
        stale = {
            table: np.array(sorted(self._erasing.stale[table.name]), np.int64).reshape(-1, 2)
            for table in self._tables
            if table.name in self._erasing.stale
        }
        if self._anew:
            self._apply_beside()  # what came meanwhile
            self._shard.transplant(self._beside, {table.number: stale[table] for table in self._anew})
        for table, keys in stale.items():
            if table not in self._anew:
                fields = {n for one in self.waiting for n in replaced_fields(table.source, one.field)}
                self._shard.clear(table.number, keys, fields)
        self._shard.remove_texts(self._erasing.texts)
        self._erasing.stale, self._erasing.texts = {}, set()

    # -- 6.

    def scrub(self) -> bool:
        """Return whether nothing is left on the disk; else something reads the log, and it is to be called again.
        Raises `LogFull`."""
        if not self._vacuumed:
            self._log.vacuum()
            self._vacuumed = True
        return self._log.empty_write_ahead()

    # -- 7.

    def finish(self, now_ms: int) -> None:
        """now_ms: by the cluster's clock. Raises `OSError`."""
        tombstones = self._shard.tombstones
        done = [_done(one, dict(self.removed[one]), now_ms) for one in self.waiting if tombstones.get(one.name) == one]
        self._shard.tombstones.write(done)
        self._erasing.removed -= {_named(one) for one in self.waiting}
        self._shard.tombstones.take(done)


def _hashes(table: Table, record: EventsRecord) -> Ints:
    """Return the hashes of the keys of a record's events, int64 [n, 2]."""
    columns = [record.batch.column(name) for name in table.key]
    return hash_columns(columns, record.batch.num_rows).view(np.int64)


def _done(tombstone: Tombstone, removed: dict[str, int], now_ms: int) -> Tombstone:
    return msgspec.structs.replace(tombstone, hash=None, removed=removed, done_ms=now_ms)


def _named(tombstone: Tombstone) -> str:
    return f"{tombstone.mark}@{tombstone.at_ms}"
