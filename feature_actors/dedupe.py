"""The duplicate filter: which event ids a slot has seen, for as long as the horizon says.

An id is a duplicate if it was received at most `horizon_ms` before the newest request of the slot.
Purging what is older, when the filter has to grow, changes no verdict. It is the time of receiving,
not the event's arrival stamp: a replay of a year stamps events with 2013, and when a request of it is
sent again its ids have to be known. An id seen again with another content is a conflict:
it is not applied and it is counted.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["CONFLICT", "DUPLICATE", "NEW", "IdFilter"]

NEW, DUPLICATE, CONFLICT = 0, 1, 2

#: Words of an entry: two halves of the id's hash, when it was received, hash of the content.
_WORDS = 4
_EMPTY = np.iinfo(np.int64).min  # nothing was received then
_ENTRIES_AT_FIRST = 16


@nb.njit(cache=True, nogil=True)
def _place(entries: Any, seed: Any, lo: Any, hi: Any) -> Any:
    mask = entries.shape[0] - 1
    mixed = (np.uint64(lo) ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    place = np.int64(mixed >> np.uint64(20)) & mask
    while entries[place, 2] != _EMPTY and (entries[place, 0] != lo or entries[place, 1] != hi):
        place = (place + 1) & mask
    return place


@nb.njit(cache=True, nogil=True)
def _admit(
    entries: Any, seed: Any, used: Any, newest: Any, horizon: Any, rows: Any, start: Any, ids: Any, contents: Any,
    received: Any, verdicts: Any,
) -> Any:  # fmt: skip
    """Judge the ids `rows[start:]`; return (next row, used, newest), next < len(rows) when full."""
    newest = max(newest, received)
    for k in range(start, rows.shape[0]):
        if used * 3 >= entries.shape[0] * 2:
            return k, used, newest
        i = rows[k]
        place = _place(entries, seed, ids[i, 0], ids[i, 1])
        if entries[place, 2] == _EMPTY:
            used += 1
        elif entries[place, 2] >= newest - horizon:
            verdicts[i] = DUPLICATE if entries[place, 3] == contents[i] else CONFLICT
            continue
        entries[place, 0], entries[place, 1] = ids[i, 0], ids[i, 1]
        entries[place, 2], entries[place, 3] = received, contents[i]
        verdicts[i] = NEW
    return rows.shape[0], used, newest


@nb.njit(cache=True, nogil=True)
def _rehash(old: Any, new: Any, seed: Any, oldest: Any) -> Any:
    used = 0
    for e in range(old.shape[0]):
        if old[e, 2] != _EMPTY and old[e, 2] >= oldest:
            place = _place(new, seed, old[e, 0], old[e, 1])
            new[place] = old[e]
            used += 1
    return used


class IdFilter:
    """Event ids that one slot has seen within the horizon; the seed is the cluster's, as of its tiles."""

    def __init__(self, horizon_ms: int, seed: int = 0) -> None:
        self._horizon_ms = horizon_ms
        self._seed = np.uint64(seed)
        self._newest = np.int64(_EMPTY + horizon_ms)
        self._used = 0
        self._entries = self._empty(_ENTRIES_AT_FIRST)

    @staticmethod
    def _empty(n: int) -> npt.NDArray[np.int64]:
        entries = np.zeros((n, _WORDS), np.int64)
        entries[:, 2] = _EMPTY
        return entries

    def admit(
        self,
        rows: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int64],
        contents: npt.NDArray[np.int64],
        received_ms: int,
        verdicts: npt.NDArray[np.uint8],
    ) -> None:
        """Judge the ids `rows` in that order into `verdicts` and remember the new ones.

        ids int64 [n, 2], contents int64 [n], verdicts uint8 [n].
        """
        start = 0
        while True:
            start, self._used, self._newest = _admit(
                self._entries, self._seed, self._used, self._newest, self._horizon_ms, rows, start, ids, contents,
                received_ms, verdicts,
            )  # fmt: skip
            if start == len(rows):
                return
            self._make_room()

    def _make_room(self) -> None:
        oldest = self._newest - self._horizon_ms
        kept = int(np.count_nonzero(self._entries[:, 2] >= oldest))
        size = _ENTRIES_AT_FIRST
        while size < kept * 2 + 2:
            size *= 2
        new = self._empty(size)
        self._used = int(_rehash(self._entries, new, self._seed, oldest))
        self._entries = new

    @property
    def allocated_bytes(self) -> int:
        return int(self._entries.nbytes)
