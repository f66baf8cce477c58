"""The past of a cluster: all events that its shards have had, of the history and then of the log.

What it promises: of each shard the events come in the order in which they were applied there, each once, whether the
cluster runs meanwhile or not; and what was acknowledged before the asking is among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.log.applied import applied_piece, applied_records
from millpond.feature_actors.log.folder import Folder
from millpond.feature_actors.log.history import History
from millpond.feature_actors.log.history_reader import begun_late_ms, read_history
from millpond.feature_actors.log.part import DAY_MS, Expired, expired
from millpond.feature_actors.log.reader import LogReader
from millpond.feature_actors.log.record import EventsRecord, OfferRecord
from millpond.feature_actors.manifest import Manifest, shard_dir
from millpond.feature_actors.shard_past import NoPast
from millpond.feature_actors.tombstones import Tombstone, Tombstones

__all__ = ["Past"]


class Past:
    """Of the cluster in a data directory. history_uri: where its history lies, None if it has none.

    Raises `Unavailable` if it has no logs: then nothing is known of its past.
    """

    def __init__(self, directory: Path, history_uri: str | None) -> None:
        self.directory, self.history_uri = directory, history_uri
        self.manifest = Manifest.read(directory)
        self._folder = Folder(history_uri) if history_uri else None
        #: How many shards have a past.
        self.shards = self.manifest.log_shards
        if not self.shards:
            raise Unavailable(f'past: `{directory}` holds no log; a cluster with `durability = "none"` has no past')

    def since_ms(self, source: str) -> int | None:
        """Return the arrival stamp from which on all events of a source are there; None if all are that ever were.

        Retention deletes the oldest dates, and a history that was begun late lacks what was before it.
        Raises `HistoryDamaged`, `HistoryUnavailable`.
        """
        if self._folder is None:
            return None  # `records` refuses a log that does not begin at its beginning
        since = []
        if (before_day := expired(self._folder, source).before_day) > Expired().before_day:
            since.append(before_day * DAY_MS)
        for shard in range(self.shards):
            assert self.history_uri is not None
            if (late_ms := begun_late_ms(self.history_uri, shard)) is not None:
                since.append(late_ms)
        return max(since, default=None)

    def tombstones(self) -> list[Tombstone]:
        """Return the tombstones of entities that were forgotten, as shards have them; one of several may be done and
        another not. Raises `ManifestError`."""
        folders = (shard_dir(self.directory, shard) for shard in range(self.shards))
        return [one for folder in folders for one in Tombstones(folder / "tombstones.json").every]

    def home_records(self, shard: int, from_offset: int, end: int) -> Iterator[tuple[int, EventsRecord]]:
        """Yield what was new at its home in a shard, at the offsets of its log from one to before another.

        The log is not held open while they are looked at: it is read in pieces of bounded size. What is truncated
        meanwhile comes from the history. Raises as `records`, and `Unavailable` if the log ends before `end`.
        """
        folder, at = shard_dir(self.directory, shard), from_offset
        while at < end:
            done_to = History(self.history_uri, shard, folder, 0).done_to if self.history_uri else 0
            if at < done_to:
                assert self.history_uri is not None
                for offset, record in read_history(self.history_uri, shard, at, min(done_to, end)):
                    if (record.routes & np.uint32(1)).any():
                        yield offset, record
                at = done_to
                continue
            with closing(LogReader(folder / "log")) as log:
                if at < log.first:
                    if self.history_uri and History(self.history_uri, shard, folder, 0).done_to >= log.first:
                        continue  # written and truncated since
                    raise self._missing(shard, log.first)
                if log.next < end:  # else what is not there would count as read
                    raise Unavailable(
                        f"past: the log of shard {shard} ends at offset {log.next}, not at {end}, where its shard "
                        "said; retry when it has started"
                    )
                # Of offers that were made before nothing is new at its home.
                piece, at = applied_piece(log, at, end, {})
            yield from (one for one in piece if (one[1].routes & np.uint32(1)).any())

    def _missing(self, shard: int, first: int) -> NoPast:
        return NoPast(
            f"past: the log of shard {shard} begins at offset {first}, and there is no history of what was before; "
            "name where it is (setting `history`)"
        )

    def records(self, shard: int) -> Iterator[tuple[int, EventsRecord]]:
        """Yield what a shard has applied, and what was new at its home there, at the offsets of its log.

        Bit 0 of `routes` says that an event was new at its home here: over all shards each event has that once. Bit
        1 + t says that it was applied to table t of the record here. Raises `LogDamaged`, `HistoryDamaged`,
        `HistoryUnavailable`, and `NoPast` if events from before the log are in no history.
        """
        folder = shard_dir(self.directory, shard)
        with closing(LogReader(folder / "log")) as log:  # first: what is truncated after this is still read
            done_to = min(History(self.history_uri, shard, folder, 0).done_to, log.next) if self.history_uri else 0
            if done_to < log.first:
                raise self._missing(shard, log.first)
            if done_to:
                assert self.history_uri is not None
                yield from read_history(self.history_uri, shard, 0, done_to)
            # An offer that is taken after the history's end may have been made before.
            open_offers: dict[int, OfferRecord] = {}
            for offset, record in applied_records(log, log.first, log.next, open_offers):
                if offset >= done_to:
                    yield offset, record
