"""The duplicate filter: which event ids the slots of a shard have seen, for as long as horizon and memory say.

An id is a duplicate if it was received at most `horizon_ms` before the newest request, and not before the cutoff. It is
the time of receiving, not the event's arrival stamp: a replay of a year stamps events with 2013, and when a request of
it is sent again its ids have to be known. An id seen again with another content is a conflict: it is not applied and it
is counted.

The cutoff is what limited memory costs. When a table of ids has to grow and may not, first what is too old is taken out
of tables that have not been rebuilt for long; if there is little of that, the cutoff moves on over about a quarter of
the ids, but never so far that less than `horizon_ms_min` is held: rather the request is refused, as if it had never
come. The cutoff then stays, and time goes on, so that the horizon held grows again by itself. One oldest time judges
all ids of the shard, whether they have been taken out yet or not, so taking them out changes no verdict.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.errors import TooMany
from millpond.feature_actors.tiles.compiled import inner, kernel, prefetch_to_write, views_at

__all__ = ["CONFLICT", "DUPLICATE", "NEW", "DedupeFull", "IdFilter", "IdMemory"]

NEW, DUPLICATE, CONFLICT = 0, 1, 2

Ints = npt.NDArray[np.int64]

#: Words of an entry: two halves of the id's hash, when it was received, hash of the content.
_WORDS = 4
_LO, _HI, _RECEIVED, _CONTENT = range(_WORDS)
_ENTRY_BYTES = 8 * _WORDS
_EMPTY = np.iinfo(np.int64).min  # nothing was received then
_FORGOTTEN = _EMPTY + 1  # nor then, but the chain of places goes on
_EVER = _FORGOTTEN + 1
_ENTRIES_AT_FIRST = 16
# Columns of the directory: address of a table's entries, how many there are, how many are used.
_AT, _ENTRIES, _USED = range(3)
_AHEAD = 16
#: A step of an image looks at so many entries: about a millisecond.
_IMAGE_ENTRIES_MAX = 1 << 14
#: A slot has so many tables that none is larger when the memory is full: it is rebuilt in some milliseconds.
_TABLE_BYTES_MAX = 4 << 20
#: So many places are looked at to choose a cutoff; fewer than 1/16 of the ids are not worth one.
_SAMPLE_PLACES = 4_096
_WORTH = 16
#: For one table to grow, so many others are looked at, and so many bytes of them.
_COMPACT_TABLES_MAX, _COMPACT_BYTES_MAX = 64, 2 * _TABLE_BYTES_MAX
#: A table that could be so many times smaller becomes so with the next image.
_MUCH_TOO_LARGE = 4
_RETRY_AFTER_MS_MIN, _RETRY_AFTER_MS_MAX = 1_000, 60_000

logger = logging.getLogger("millpond.shard")


class DedupeFull(TooMany):
    """To remember these ids, others would have to be forgotten that were received within the least horizon."""

    code = "dedupe_full"


# -- kernels


@inner
def _mixed(seed: Any, lo: Any) -> Any:
    return (np.uint64(lo) ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)


@inner
def _table(first: Any, parts: Any, slot: Any, mixed: Any) -> Any:
    """Return the row of the directory where an id of a slot belongs; parts is a power of two."""
    return first + slot * parts + (np.int64(mixed >> np.uint64(8)) & (parts - 1))


@inner
def _first_place(entries: Any, mixed: Any) -> Any:
    """Return where an id is looked for first. In the order of `mixed`, so that a table is copied to another from its
    beginning to its end, whatever their sizes."""
    return np.int64(((mixed >> np.uint64(32)) * np.uint64(entries)) >> np.uint64(32))


@inner
def _place(at: Any, entries: Any, mixed: Any, lo: Any, hi: Any) -> Any:
    """Return the entry that has an id, or is empty for it, as a word from `at` on."""
    words, _, _ = views_at(at)
    place = _first_place(entries, mixed)
    while words[place * _WORDS + _RECEIVED] != _EMPTY and (
        words[place * _WORDS + _LO] != lo or words[place * _WORDS + _HI] != hi
    ):
        place = place + 1 if place + 1 < entries else 0
    return place * _WORDS


@inner
def _is_full(directory: Any, table: Any) -> Any:
    return directory[table, _USED] * 3 >= directory[table, _ENTRIES] * 2


@kernel
def _admit(
    directory: Any, first: Any, parts: Any, seed: Any, oldest: Any, rows: Any, start: Any, slots: Any, ids: Any,
    contents: Any, received: Any, again: Any, verdicts: Any,
) -> Any:  # fmt: skip
    """Judge the ids `rows[start:]`; return the first row that needs room, or len(rows).

    again: they have been judged new before, so one that is there is as of now, unless it was received later.
    """
    for block in range(start, rows.shape[0], _AHEAD):
        end = min(block + _AHEAD, rows.shape[0])
        for k in range(block, end):
            mixed = _mixed(seed, ids[rows[k], 0])
            table = _table(first, parts, slots[rows[k]], mixed)
            entries = directory[table, _ENTRIES]
            if entries > 0:
                words, _, _ = views_at(directory[table, _AT])
                prefetch_to_write(words, _first_place(entries, mixed) * _WORDS)
        for k in range(block, end):
            i = rows[k]
            mixed = _mixed(seed, ids[i, 0])
            table = _table(first, parts, slots[i], mixed)
            entries, used = directory[table, _ENTRIES], directory[table, _USED]
            if entries == 0:
                return k
            words, _, _ = views_at(directory[table, _AT])
            at = _place(directory[table, _AT], entries, mixed, ids[i, 0], ids[i, 1])
            then = words[at + _RECEIVED]
            if then == _EMPTY:
                if used * 3 >= entries * 2:
                    return k
                directory[table, _USED] = used + 1
            elif then >= oldest and not (again and then <= received):
                verdicts[i] = DUPLICATE if words[at + _CONTENT] == contents[i] else CONFLICT
                continue
            words[at + _LO], words[at + _HI] = ids[i, 0], ids[i, 1]
            words[at + _RECEIVED], words[at + _CONTENT] = received, contents[i]
            verdicts[i] = NEW
    return rows.shape[0]


@kernel
def _count(directory: Any, table: Any, oldest: Any) -> Any:
    """Return how many entries of a table are not older than `oldest`."""
    words, _, _ = views_at(directory[table, _AT])
    n = 0
    for entry in range(0, directory[table, _ENTRIES] * _WORDS, _WORDS):
        n += words[entry + _RECEIVED] >= oldest
    return n


@kernel
def _rehash(directory: Any, table: Any, new: Any, seed: Any, oldest: Any) -> Any:
    """Have a table in `new`, with its entries that are not older than `oldest`; return how many it had."""
    old_entries, entries, used = directory[table, _ENTRIES], new.shape[0], 0
    words, _, _ = views_at(directory[table, _AT])
    new_words, _, _ = views_at(new.ctypes.data)
    for place in range(entries):
        new_words[place * _WORDS + _RECEIVED] = _EMPTY
    for entry in range(0, old_entries * _WORDS, _WORDS):
        if words[entry + _RECEIVED] >= oldest:
            lo = words[entry + _LO]
            at = _place(new.ctypes.data, entries, _mixed(seed, lo), lo, words[entry + _HI])
            for w in range(_WORDS):
                new_words[at + w] = words[entry + w]
            used += 1
    directory[table, _AT], directory[table, _ENTRIES], directory[table, _USED] = new.ctypes.data, entries, used
    return old_entries


@kernel
def _forget(directory: Any, first: Any, parts: Any, seed: Any, rows: Any, slots: Any, ids: Any) -> None:
    """Mark the entries of ids that are there as never received."""
    for i in rows:
        mixed = _mixed(seed, ids[i, 0])
        table = _table(first, parts, slots[i], mixed)
        if directory[table, _ENTRIES] == 0:
            continue
        words, _, _ = views_at(directory[table, _AT])
        at = _place(directory[table, _AT], directory[table, _ENTRIES], mixed, ids[i, 0], ids[i, 1])
        if words[at + _RECEIVED] != _EMPTY:
            words[at + _RECEIVED] = _FORGOTTEN


@kernel
def _load(directory: Any, first: Any, parts: Any, seed: Any, slot: Any, image: Any, start: Any) -> Any:
    """Remember the entries `image[start:]`, an id that is there already as it is; return the first whose table is full,
    or len(image)."""
    for k in range(start, image.shape[0]):
        if image[k, _RECEIVED] <= _FORGOTTEN:
            continue
        mixed = _mixed(seed, image[k, _LO])
        table = _table(first, parts, slot, mixed)
        if _is_full(directory, table):
            return k
        words, _, _ = views_at(directory[table, _AT])
        at = _place(directory[table, _AT], directory[table, _ENTRIES], mixed, image[k, _LO], image[k, _HI])
        if words[at + _RECEIVED] == _EMPTY:
            directory[table, _USED] += 1
        elif words[at + _RECEIVED] != _FORGOTTEN:
            continue
        for w in range(_WORDS):
            words[at + w] = image[k, w]
    return image.shape[0]


@kernel
def _table_of(first: Any, parts: Any, seed: Any, slot: Any, lo: Any) -> Any:
    return _table(first, parts, slot, _mixed(seed, lo))


@kernel
def _times_at(directory: Any, tables: Any, places: Any) -> Any:
    """Return when what is at some places of tables was received."""
    times = np.empty(tables.shape[0], np.int64)
    for k in range(tables.shape[0]):
        words, _, _ = views_at(directory[tables[k], _AT])
        times[k] = words[places[k] * _WORDS + _RECEIVED]
    return times


# -- what the filters of a shard share


class IdMemory:
    """The memory of all filters of a shard, and the one time before which ids are too old.

    horizon_ms: how long an id is remembered at most; horizon_ms_min: at least, or requests are refused.
    bytes_max: what all tables may take together, None for no limit. (One table more is there while it is rebuilt.)
    n_slots: among how many slots the ids of a source are spread. seed: the cluster's, as of its tiles. shard: its
    number.
    """

    def __init__(
        self,
        horizon_ms: int,
        *,
        horizon_ms_min: int = 0,
        bytes_max: int | None = None,
        n_slots: int = 1,
        seed: int = 0,
        shard: int = 0,
    ) -> None:
        self.horizon_ms = horizon_ms
        self.horizon_ms_min = min(horizon_ms_min, horizon_ms)
        self.bytes_max = bytes_max
        self.seed = np.uint64(seed)
        #: Tables of a slot, a power of two.
        self.parts = 1
        while bytes_max is not None and bytes_max > _TABLE_BYTES_MAX * n_slots * self.parts:
            self.parts *= 2
        #: When the newest request was received; and what was received before is forgotten, whatever the horizon says.
        self.newest_ms, self.cutoff_ms = _EVER + horizon_ms, _EVER
        self.allocated_bytes = 0
        self.directory: Ints = np.zeros((0, 3), np.int64)
        #: By row of the directory; those come first that have not been rebuilt for long.
        self.tables: dict[int, Ints] = {}
        self._shard = shard

    def add(self, n_slots: int) -> int:
        """Have tables for so many slots more; return the first of them."""
        first = len(self.directory)
        self.directory = np.concatenate([self.directory, np.zeros((n_slots * self.parts, 3), np.int64)])
        return first

    @property
    def oldest_ms(self) -> int:
        """An id that was received before is forgotten."""
        return max(self.newest_ms - self.horizon_ms, self.cutoff_ms)

    @property
    def held_ms(self) -> int:
        """The horizon that is really held: an id received at most so long before the newest request is known."""
        return max(0, self.newest_ms - self.oldest_ms)

    @property
    def ids(self) -> int:
        """How many ids there are in the memory, too old ones that have not been taken out yet included."""
        return int(self.directory[:, _USED].sum())

    def hear_of(self, received_ms: int, cutoff_ms: int = _EVER) -> None:
        """Take note of a request, or of a cutoff that there was before."""
        self.newest_ms = max(self.newest_ms, received_ms)
        self.cutoff_ms = max(self.cutoff_ms, cutoff_ms)

    def make_room(self, table: int, more: int, *, refuse: bool) -> None:
        """Rebuild a table with room for so many ids more, and without those that are too old.

        Raises `DedupeFull` if that would take too much memory and the horizon cannot shrink any more; unless not to
        refuse: then it takes too much.
        """
        while True:
            n = _count(self.directory, table, self.oldest_ms) + more
            size = self._allowed(table, n)
            if size is not None:
                break
            times = self._sample()
            # 1. What is too old already makes room, if there is some of it.
            if _snug(int(np.count_nonzero(times >= self.oldest_ms))) * _WORTH <= len(times) * (_WORTH - 1):
                self._compact(table, n)
                size = self._allowed(table, n)
                if size is not None:
                    break
            # 2. What is oldest makes room.
            if not self._shrink(times):
                size = _snug(n)
                if refuse and size > self.directory[table, _ENTRIES]:
                    raise self._full(times)
                break
        self._rebuild(table, size)

    def tidy(self, table: int) -> None:
        """Rebuild a table that is much too large for what it has that is not too old: after a burst of ids, which grow
        old where nothing makes their table grow."""
        if table in self.tables:
            n = _count(self.directory, table, self.oldest_ms)
            size = self._allowed(table, n) if n else 0
            if size is not None and size * _MUCH_TOO_LARGE <= self.directory[table, _ENTRIES]:
                self._rebuild(table, size)

    def _allowed(self, table: int, n: int) -> int | None:
        """Return how large a table may be for n ids: the roomier, the more memory there is."""
        if self.bytes_max is None:
            return max(3 * n, self._at_first(table))
        now = int(self.directory[table, _ENTRIES])
        for size, bytes_max in (
            (max(3 * n, self._at_first(table)), self.bytes_max // 2),
            (max(2 * n, _ENTRIES_AT_FIRST), self.bytes_max),
            (max(_snug(n), min(2 * n, now)), self.bytes_max),
        ):
            if self.allocated_bytes + (size - now) * _ENTRY_BYTES <= bytes_max:
                return size
        return None

    @staticmethod
    def _at_first(table: int) -> int:
        """Return how large a new table is: not all the same, lest all of them grow at the same time for ever."""
        return _ENTRIES_AT_FIRST + table % _ENTRIES_AT_FIRST

    def _sample(self) -> Ints:
        """Return when what is at places spread over all tables was received, `_EMPTY` if nothing."""
        ends = np.cumsum(self.directory[:, _ENTRIES])
        total = int(ends[-1])
        n = min(total, _SAMPLE_PLACES)
        places = np.arange(n, dtype=np.int64) * total // max(n, 1)
        tables = np.searchsorted(ends, places, side="right").astype(np.int64)
        times: Ints = _times_at(self.directory, tables, places - (ends - self.directory[:, _ENTRIES])[tables])
        return times

    def _compact(self, table: int, n: int) -> None:
        """Take out of other tables what is too old, until this one may have n ids or enough have been looked at."""
        assert self.bytes_max is not None
        now = int(self.directory[table, _ENTRIES])
        wanted = self.allocated_bytes + (_snug(n) - now) * _ENTRY_BYTES - self.bytes_max
        looked = 0
        for other in list(islice(self.tables, _COMPACT_TABLES_MAX)):
            if wanted <= 0 or looked > _COMPACT_BYTES_MAX:
                return
            entries = self.tables[other]
            if other == table:
                continue
            kept = _count(self.directory, other, self.oldest_ms)
            size = _snug(kept + 1) if kept else 0
            won = entries.nbytes - size * _ENTRY_BYTES
            if won * _WORTH >= entries.nbytes or won >= wanted:
                self._rebuild(other, size)
                wanted -= won
            else:
                self.tables[other] = self.tables.pop(other)
            looked += entries.nbytes

    def _shrink(self, times: Ints) -> bool:
        """Move the cutoff on over about a quarter of the ids, or as far as it may; return False if that is too few."""
        times = np.sort(times[times >= self.oldest_ms])
        if len(times) == 0:
            return False
        cutoff = int(times[len(times) // 4])
        if np.searchsorted(times, cutoff) * _WORTH < len(times):
            cutoff += 1  # nearly all of that quarter was received in that millisecond
        cutoff = min(cutoff, self.newest_ms - self.horizon_ms_min)
        if np.searchsorted(times, cutoff) * _WORTH < len(times):
            return False
        self.cutoff_ms = cutoff
        logger.warning(
            "shard %d remembers event ids for the last %s s now instead of %s s: %s bytes are full; raise "
            "`dedupe_mb_max`, or add shards",
            self._shard, f"{self.held_ms / 1000:,.3f}", f"{self.horizon_ms / 1000:,.0f}", f"{self.bytes_max:,}",
        )  # fmt: skip
        return True

    def _full(self, times: Ints) -> DedupeFull:
        times = np.sort(times[times >= self.oldest_ms])
        wait_ms = _RETRY_AFTER_MS_MAX
        if len(times):  # until so many are old enough to be forgotten
            wait_ms = int(times[len(times) // _WORTH]) + self.horizon_ms_min + 1 - self.newest_ms
        return DedupeFull(
            f"event ids of shard {self._shard}: those of the last {self.held_ms / 1000:,.3f} s fill "
            f"{self.allocated_bytes:,} bytes; allowed are {self.bytes_max:,} (`dedupe_mb_max`), and ids of the last "
            f"{self.horizon_ms_min / 1000:,.3f} s (`dedupe_horizon_min`) are never forgotten; send again later, or "
            "raise `dedupe_mb_max`",
            retry_after_ms=min(max(wait_ms, _RETRY_AFTER_MS_MIN), _RETRY_AFTER_MS_MAX),
        )

    def _rebuild(self, table: int, size: int) -> None:
        """Copy what is not too old into a new table of so many entries, 0 for none."""
        new: Ints = np.empty((size, _WORDS), np.int64)
        self.allocated_bytes += (size - _rehash(self.directory, table, new, self.seed, self.oldest_ms)) * _ENTRY_BYTES
        self.tables.pop(table, None)
        if size:
            self.tables[table] = new


def _snug(n: int) -> int:
    """Return the entries of a table that has n ids and is nearly full by it."""
    return max(n * 8 // 5, _ENTRIES_AT_FIRST)


# -- the filter of a source


class IdFilter:
    """Event ids of a source that its slots have seen, in a memory that it shares."""

    def __init__(self, memory: IdMemory, n_slots: int) -> None:
        self.memory = memory
        self._first = memory.add(n_slots)
        self._tables = range(self._first, self._first + n_slots * memory.parts)

    def admit(
        self,
        rows: Ints,
        slots: Ints,
        ids: Ints,
        contents: Ints,
        received_ms: int,
        verdicts: npt.NDArray[np.uint8],
    ) -> None:
        """Judge the ids `rows` in that order into `verdicts` and remember the new ones.

        slots int64 [n], ids int64 [n, 2], contents int64 [n], verdicts uint8 [n]. Raises `DedupeFull`: then none is
        remembered, and the verdicts mean nothing.
        """
        self._judge(rows, slots, ids, contents, received_ms, verdicts, refuse=True)

    def remember(self, rows: Ints, slots: Ints, ids: Ints, contents: Ints, received_ms: int) -> None:
        """Remember ids `rows` that have been judged new when they were received, whatever memory it takes."""
        self._judge(rows, slots, ids, contents, received_ms, np.empty(len(ids), np.uint8), refuse=False)

    def _judge(
        self,
        rows: Ints,
        slots: Ints,
        ids: Ints,
        contents: Ints,
        received_ms: int,
        verdicts: npt.NDArray[np.uint8],
        *,
        refuse: bool,
    ) -> None:
        memory, start = self.memory, 0
        memory.hear_of(received_ms)
        while True:
            start = _admit(
                memory.directory, self._first, memory.parts, memory.seed, memory.oldest_ms, rows, start, slots, ids,
                contents, received_ms, not refuse, verdicts,
            )  # fmt: skip
            if start == len(rows):
                return
            row = rows[start]
            try:
                memory.make_room(self._table_of(int(slots[row]), ids[row, 0]), 1, refuse=refuse)
            except BaseException:
                judged = rows[:start]
                self.forget(judged[verdicts[judged] == NEW], slots, ids)
                raise

    def _table_of(self, slot: int, lo: Any) -> int:
        return int(_table_of(self._first, self.memory.parts, self.memory.seed, slot, lo))

    def forget(self, rows: Ints, slots: Ints, ids: Ints) -> None:
        """Take back that ids `rows` were admitted as new: they are new when they come again."""
        memory = self.memory
        _forget(memory.directory, self._first, memory.parts, memory.seed, rows, slots, ids)

    def image(self) -> Iterator[tuple[int, Ints]]:
        """Yield what is remembered in steps of bounded size: a slot and some of its entries, int64 [k, 4] (two halves
        of the id's hash, when it was received, hash of the content). The last step has none, and so have those that
        found only what is too old. Tables that are much too large by now become smaller on the way.

        Ids may be admitted between two steps. Those that were there before the first, and are not too old by the last,
        are in one of them; of those that come meanwhile some are. An id is not there that was forgotten before the
        step.
        """
        memory, looked = self.memory, 0
        for table in self._tables:
            entries, step = memory.tables.get(table), 0
            while entries is not None and step < (steps := -(-len(entries) // _IMAGE_ENTRIES_MAX)):
                # Entries from everywhere, because those of one region would be too many for that of another table.
                some = entries[step::steps]
                looked += len(some)
                kept = some[some[:, _RECEIVED] >= memory.oldest_ms]
                if len(kept) or looked >= _IMAGE_ENTRIES_MAX:
                    yield (table - self._first) // memory.parts, kept
                    looked = 0
                step += 1
                if step < steps and (now := memory.tables.get(table)) is not entries:
                    entries, step = now, 0  # rebuilt meanwhile: the old one does not know what was forgotten since
            memory.tidy(table)
        # So that whoever loads it hears of the newest request and of the cutoff by which entries were left out.
        yield 0, np.empty((0, _WORDS), np.int64)

    def load(self, slot: int, image: Ints, newest_ms: int, cutoff_ms: int = _EVER) -> None:
        """Remember entries of an image as well, whatever memory it takes; an id that is there already stays as it is.

        newest_ms, cutoff_ms: of the memory that the image is of.
        """
        memory, start = self.memory, 0
        memory.hear_of(newest_ms, cutoff_ms)
        while True:
            start = _load(memory.directory, self._first, memory.parts, memory.seed, slot, image, start)
            if start == len(image):
                return
            more = (len(image) - start) // memory.parts + 1
            memory.make_room(self._table_of(slot, image[start, _LO]), more, refuse=False)
