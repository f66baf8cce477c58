"""The past of one shard, read piece by piece while it goes on: what a table is given that was added.

What it promises: every event that the shard has applied comes once, in the order of its log, and what is appended
meanwhile comes later. The log's file is open only while a piece of bounded size is read, not while that is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.log.applied import applied_piece
from millpond.feature_actors.log.folder import Folder
from millpond.feature_actors.log.history import History
from millpond.feature_actors.log.history_reader import begun_late_ms, read_history
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.part import DAY_MS, expired
from millpond.feature_actors.log.reader import LogReader
from millpond.feature_actors.log.record import EventsRecord, OfferRecord

__all__ = ["NoPast", "ShardPast"]


class NoPast(Unavailable):
    """What was before is kept nowhere, so that asking again does not help."""


class ShardPast:
    """Of the shard in a folder, from its beginning on. history_uri: where its history lies, None if it has none.
    whole: whether what was before the log has to be there. log: its log, where nobody writes to it meanwhile; else it
    is opened whenever it is read.

    next: the offset up to which it has been read; end: where the log ended when it was looked at last. The log must not
    be truncated meanwhile.
    """

    def __init__(
        self, folder: Path, history_uri: str | None, shard: int, *, whole: bool = True, log: Log | None = None
    ) -> None:
        self._folder, self._history_uri, self._shard, self._whole, self._log = folder, history_uri, shard, whole, log
        self._open_offers: dict[int, OfferRecord] = {}
        self._read_log_from: int | None = None
        self.next = self.end = 0
        #: Since when the history has everything of a source, where retention has taken what was before, or there was no
        #: history then, in ms.
        self.history_since: dict[str, int] = {}

    def read_on(self, until: int | None = None) -> Iterator[tuple[int, EventsRecord]]:
        """Yield what the shard has applied, and what was new at its home there, at the offsets of its log; up to where
        the log ends now, or before `until`. Bits of `routes` as of `Past.records`.

        The next call goes on from there. To be used by one thread at a time, and to its end. Raises `LogDamaged`,
        `HistoryDamaged`, `HistoryUnavailable`, and `NoPast` if events from before the log are in no history.
        """
        if self._read_log_from is None:
            yield from self._read_history()
        while True:
            with self._opened() as log:
                self.end = log.next if until is None else min(log.next, until)
                if self.next >= self.end:
                    return
                assert self._read_log_from is not None
                piece, at = applied_piece(log, self._read_log_from, self.end, self._open_offers)
            for offset, record in piece:
                # An offer that is taken after the history's end may have been made before.
                if offset >= self.next:
                    yield offset, record
                    self.next = offset + 1
            self._read_log_from = at
            self.next = max(self.next, at)

    def _read_history(self) -> Iterator[tuple[int, EventsRecord]]:
        """Yield what is not in the log any more: what is there is read from there."""
        with self._opened() as log:
            self._read_log_from, self.end = log.first, log.next
        if log.first == 0:
            return
        if self._history_uri is None and not self._whole:
            self.next = log.first
            return
        done_to = History(self._history_uri, self._shard, self._folder, 0).done_to if self._history_uri else 0
        if self._history_uri is None or done_to < log.first:
            raise NoPast(
                f"the log of shard {self._shard} begins at offset {log.first}, and there is no history of what was "
                "before (setting `history`)"
            )
        for offset, record in read_history(self._history_uri, self._shard, 0, done_to):
            yield offset, record
            self.next = offset + 1
        self.next = done_to

    def _opened(self) -> AbstractContextManager[Log | LogReader]:
        return closing(LogReader(self._folder / "log")) if self._log is None else nullcontext(self._log)

    def note_expired(self, sources: Iterable[str]) -> None:
        """Note since when the history has everything of some sources, see `history_since`."""
        if self._history_uri is None or self._read_log_from == 0:
            return
        folder, late_ms = Folder(self._history_uri), begun_late_ms(self._history_uri, self._shard)
        for source in sources:
            since = [] if late_ms is None else [late_ms]
            if (before_day := expired(folder, source).before_day) > -(2**63):
                since.append(before_day * DAY_MS)
            if since:
                self.history_since[source] = max(since)
