"""The duplicate filter: which event ids the slots of a shard have seen, for as long as the horizon says.

An id is a duplicate if it was received at most `horizon_ms` before the newest request. Purging what is older, when a
slot's filter has to grow, changes no verdict. It is the time of receiving, not the event's arrival stamp: a replay of
a year stamps events with 2013, and when a request of it is sent again its ids have to be known. An id seen again with
another content is a conflict: it is not applied and it is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.tiles.compiled import inner, kernel, prefetch_to_write, views_at

__all__ = ["CONFLICT", "DUPLICATE", "NEW", "IdFilter"]

NEW, DUPLICATE, CONFLICT = 0, 1, 2

Ints = npt.NDArray[np.int64]

#: Words of an entry: two halves of the id's hash, when it was received, hash of the content.
_WORDS = 4
_LO, _HI, _RECEIVED, _CONTENT = range(_WORDS)
_EMPTY = np.iinfo(np.int64).min  # nothing was received then
_FORGOTTEN = _EMPTY + 1  # nor then, but the chain of places goes on
_ENTRIES_AT_FIRST = 16
# Columns of the directory: address of a slot's entries, how many there are, how many are used.
_AT, _ENTRIES, _USED = range(3)
_AHEAD = 16
#: A step of an image looks at so many entries: about a millisecond.
_IMAGE_ENTRIES_MAX = 1 << 14


@inner
def _place(at: Any, entries: Any, seed: Any, lo: Any, hi: Any) -> Any:
    """Return the entry that has an id, or is empty for it, as a word from `at` on."""
    words, _, _ = views_at(at)
    mixed = (np.uint64(lo) ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    place = np.int64(mixed >> np.uint64(20)) & (entries - 1)
    while words[place * _WORDS + _RECEIVED] != _EMPTY and (
        words[place * _WORDS + _LO] != lo or words[place * _WORDS + _HI] != hi
    ):
        place = (place + 1) & (entries - 1)
    return place * _WORDS


@kernel
def _admit(
    directory: Any, seed: Any, oldest: Any, rows: Any, start: Any, slots: Any, ids: Any, contents: Any, received: Any,
    verdicts: Any,
) -> Any:  # fmt: skip
    """Judge the ids `rows[start:]`; return the first row whose slot is full, or len(rows)."""
    for block in range(start, rows.shape[0], _AHEAD):
        end = min(block + _AHEAD, rows.shape[0])
        for k in range(block, end):
            entries = directory[slots[rows[k]], _ENTRIES]
            if entries > 0:
                words, _, _ = views_at(directory[slots[rows[k]], _AT])
                mixed = (np.uint64(ids[rows[k], 0]) ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
                prefetch_to_write(words, (np.int64(mixed >> np.uint64(20)) & (entries - 1)) * _WORDS)
        for k in range(block, end):
            i = rows[k]
            slot = slots[i]
            if directory[slot, _USED] * 3 >= directory[slot, _ENTRIES] * 2:
                return k
            words, _, _ = views_at(directory[slot, _AT])
            at = _place(directory[slot, _AT], directory[slot, _ENTRIES], seed, ids[i, 0], ids[i, 1])
            if words[at + _RECEIVED] == _EMPTY:
                directory[slot, _USED] += 1
            elif words[at + _RECEIVED] > _FORGOTTEN and words[at + _RECEIVED] >= oldest:
                verdicts[i] = DUPLICATE if words[at + _CONTENT] == contents[i] else CONFLICT
                continue
            words[at + _LO], words[at + _HI] = ids[i, 0], ids[i, 1]
            words[at + _RECEIVED], words[at + _CONTENT] = received, contents[i]
            verdicts[i] = NEW
    return rows.shape[0]


@kernel
def _rehash(old: Any, old_entries: Any, new: Any, new_entries: Any, seed: Any, oldest: Any) -> Any:
    """Copy the entries that are not older than `oldest`; return how many."""
    used = 0
    words, _, _ = views_at(old)
    new_words, _, _ = views_at(new)
    for entry in range(0, old_entries * _WORDS, _WORDS):
        if words[entry + _RECEIVED] > _FORGOTTEN and words[entry + _RECEIVED] >= oldest:
            at = _place(new, new_entries, seed, words[entry + _LO], words[entry + _HI])
            for w in range(_WORDS):
                new_words[at + w] = words[entry + w]
            used += 1
    return used


@kernel
def _forget(directory: Any, seed: Any, rows: Any, slots: Any, ids: Any) -> None:
    """Mark the entries of ids that are there as never received."""
    for i in rows:
        words, _, _ = views_at(directory[slots[i], _AT])
        at = _place(directory[slots[i], _AT], directory[slots[i], _ENTRIES], seed, ids[i, 0], ids[i, 1])
        if words[at + _RECEIVED] != _EMPTY:
            words[at + _RECEIVED] = _FORGOTTEN


@kernel
def _load(directory: Any, seed: Any, slot: Any, image: Any) -> None:
    """Put entries into a slot that has room for them; an id that is there already stays as it is."""
    words, _, _ = views_at(directory[slot, _AT])
    for k in range(image.shape[0]):
        if image[k, _RECEIVED] <= _FORGOTTEN:
            continue
        at = _place(directory[slot, _AT], directory[slot, _ENTRIES], seed, image[k, _LO], image[k, _HI])
        if words[at + _RECEIVED] == _EMPTY:
            directory[slot, _USED] += 1
        elif words[at + _RECEIVED] != _FORGOTTEN:
            continue
        for w in range(_WORDS):
            words[at + w] = image[k, w]


class IdFilter:
    """Event ids that the slots have seen within the horizon; the seed is the cluster's, as of its tiles."""

    def __init__(self, horizon_ms: int, n_slots: int, seed: int = 0) -> None:
        self._horizon_ms = horizon_ms
        self._seed = np.uint64(seed)
        self._newest_ms = _EMPTY + horizon_ms
        self._directory: Ints = np.zeros((n_slots, 3), np.int64)
        self._entries: dict[int, Ints] = {}

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

        slots int64 [n], ids int64 [n, 2], contents int64 [n], verdicts uint8 [n].
        """
        self._newest_ms = max(self._newest_ms, received_ms)
        oldest = self._newest_ms - self._horizon_ms
        start = 0
        while True:
            start = _admit(
                self._directory, self._seed, oldest, rows, start, slots, ids, contents, received_ms, verdicts
            )
            if start == len(rows):
                return
            self._make_room(int(slots[rows[start]]), oldest, 1)

    def forget(self, rows: Ints, slots: Ints, ids: Ints) -> None:
        """Take back that ids `rows` were admitted as new: they are new when they come again."""
        _forget(self._directory, self._seed, rows, slots, ids)

    @property
    def newest_ms(self) -> int:
        """When the newest request was received that it has seen."""
        return self._newest_ms

    def image(self) -> Iterator[tuple[int, Ints]]:
        """Yield what is remembered in steps of bounded size: a slot and some of its entries, int64 [k, 4] (two halves
        of the id's hash, when it was received, hash of the content).

        Ids may be admitted between two steps. Those that were there before the first, and are within the horizon, are
        in one of them; of those that come meanwhile some are.
        """
        for slot in list(self._entries):
            # Where the slot is rebuilt meanwhile, this is what it was until then; what comes later is not asked for.
            entries = self._entries[slot]
            for start in range(0, len(entries), _IMAGE_ENTRIES_MAX):
                some = entries[start : start + _IMAGE_ENTRIES_MAX]
                oldest = max(self._newest_ms - self._horizon_ms, _FORGOTTEN + 1)
                if len(kept := some[some[:, _RECEIVED] >= oldest]):
                    yield slot, kept

    def load(self, slot: int, image: Ints, newest_ms: int) -> None:
        """Remember entries of an image as well; an id that is there already stays as it is.

        newest_ms: when the newest request was received of which the filter had heard.
        """
        self._newest_ms = max(self._newest_ms, newest_ms)
        if (self._directory[slot, _USED] + len(image)) * 3 >= self._directory[slot, _ENTRIES] * 2:
            self._make_room(slot, self._newest_ms - self._horizon_ms, len(image))
        _load(self._directory, self._seed, slot, image)

    def _make_room(self, slot: int, oldest: int, more: int) -> None:
        old = self._entries.get(slot)
        kept = 0 if old is None else int(np.count_nonzero(old[:, _RECEIVED] >= max(oldest, _FORGOTTEN + 1)))
        size = _ENTRIES_AT_FIRST
        while size < (kept + more) * 2:
            size *= 2
        new: Ints = np.zeros((size, _WORDS), np.int64)
        new[:, _RECEIVED] = _EMPTY
        used = 0
        if old is not None:
            used = int(_rehash(old.ctypes.data, len(old), new.ctypes.data, size, self._seed, oldest))
        self._entries[slot] = new
        self._directory[slot] = new.ctypes.data, size, used

    @property
    def allocated_bytes(self) -> int:
        return sum(entries.nbytes for entries in self._entries.values())
