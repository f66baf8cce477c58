"""A shard with its log, snapshots and history: what is acknowledged is on disk first, and is there again after whatever
happened.

Pure: no Ray, no threads. `workshop` gathers what waits, appends it at once, and commits it; `housekeeper` decides when
a snapshot is taken, a part of the history written, and the log truncated. The steps of each are here.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from millpond.feature_actors.allocators import give_back
from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.events import Events
from millpond.feature_actors.image import Loaded, load_shard, shard_chunks
from millpond.feature_actors.layout import Layout, Table
from millpond.feature_actors.log.applied import applied_records
from millpond.feature_actors.log.folder import Folder
from millpond.feature_actors.log.history import History
from millpond.feature_actors.log.history_reader import read_history, whole_from
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.part import DAY_MS, Expired, day_text, expired
from millpond.feature_actors.log.record import (
    Decoded,
    EventsRecord,
    HomeRecord,
    LogDamaged,
    LostRecord,
    OfferRecord,
    Record,
    TakeRecord,
)
from millpond.feature_actors.log.snapshot import (
    Chunk,
    ShardHeader,
    SnapshotDamaged,
    SnapshotWriter,
    begin_of,
    newest_snapshots,
    read_snapshot,
    remove_old_snapshots,
)
from millpond.feature_actors.manifest import write_json
from millpond.feature_actors.routes import shards_of_keys
from millpond.feature_actors.shard import Prepared, Shard
from millpond.feature_actors.shard_past import ShardPast
from millpond.feature_actors.spread import brought_keys
from millpond.feature_actors.steps import In, Rest, Steps, Write
from millpond.feature_actors.tombstones import Secret, Tombstones

__all__ = ["DurableShard", "Erasing", "RecordLog", "ShardFolder", "SnapshotLacks", "VolatileLog", "applied_records"]

#: Called with the offset that was replayed and the one where the log ends.
Progress = Callable[[int, int], None]
Bools = npt.NDArray[np.bool_]

_PROGRESS_S = 0.1
#: How long appends have the log to themselves between two steps of a truncation.
_BREATH_S = 0.001
NEVER_MS = 1 << 62
_NAMED_MAX = 10

logger = logging.getLogger("millpond.shard")


class RecordLog(Protocol):
    """Where records go: `log.Log`, or a `VolatileLog`."""

    next: int

    def append(self, records: Sequence[Record], settled: int = 0) -> list[int]: ...

    def get(self, offset: int) -> Decoded: ...


class VolatileLog:
    """A log in memory, for `durability = "none"`: keeps what is owed, for as long as it is."""

    def __init__(self) -> None:
        self.next = 0
        self._kept: dict[int, OfferRecord] = {}

    def append(self, records: Sequence[Record], settled: int = 0) -> list[int]:
        offsets = list(range(self.next, self.next + len(records)))
        self.next += len(records)
        for old in [offset for offset in self._kept if offset < settled]:
            del self._kept[old]
        self._kept |= {at: r for at, r in zip(offsets, records, strict=True) if isinstance(r, OfferRecord)}
        return offsets

    def get(self, offset: int) -> Decoded:
        return Decoded(self._kept[offset], 0)


class ShardFolder:
    """Where a shard keeps what it has acknowledged: `log/`, `snapshots/`, and its part of the cluster's history.

    history_uri: base of the history, None for none. epoch: how often the shard was opened. secret: of the cluster, for
    its tombstones; None to take nothing in, but to look at what there is.
    """

    def __init__(
        self, path: Path, cluster_id: str, epoch: int, history_uri: str | None, secret: Secret | None = None
    ) -> None:
        self.path, self.cluster_id, self.epoch, self.history_uri = path, cluster_id, epoch, history_uri
        self.tombstones = Tombstones(path / "tombstones.json", secret)
        self.log = path / "log"
        self.snapshots = path / "snapshots"


class SnapshotLacks(MillpondError):
    """The declarations have features that a snapshot knows nothing of, and log and history cannot give them."""

    code, status = "snapshot_lacks", 500


class Erasing(msgspec.Struct):
    """How far a shard is with what it erases, see `eraser`.

    removed: tombstones whose rows are gone, and are not counted any more. stale: by table, the keys (two words) of rows
    of others that may have seen their values; texts: the strings among these.
    """

    removed: set[str] = msgspec.field(default_factory=set)
    stale: dict[str, set[tuple[int, int]]] = msgspec.field(default_factory=dict)
    texts: set[str] = msgspec.field(default_factory=set)


class DurableShard:
    """A shard whose `Prepared` goes to a log before it is committed. `recover` comes before all else."""

    def __init__(self, layout: Layout, shard: Shard, log: RecordLog, folder: ShardFolder | None = None) -> None:
        self.shard = shard
        self.log = log
        self._layout = layout
        self._folder = folder
        self.history: History | None = None
        if folder is not None:
            self.history = History(folder.history_uri, shard.number, folder.path, folder.epoch)
            shard.tombstones = folder.tombstones
        #: What the shard has begun to erase, as its snapshots say.
        self.erasing = Erasing()
        #: How often something that was prepared was undone: a snapshot that was begun before is not to be finished.
        self.undone = 0
        #: Tables of which the snapshot has nothing, and those that have features it knows nothing of, with their names.
        self._lacks: list[Table] = []
        self._incomplete: Mapping[Table, Sequence[str]] = {}
        #: The log from here on is needed to finish the part of the history after the last.
        self._history_keeps = 0

    # -- recovery

    def recover(self, progress: Progress = lambda at, end: None) -> None:
        """Bring the shard, which is empty, to where it was: by the newest usable snapshot, and the log after it.

        A damaged snapshot is passed over for an older one, with a warning. Without any everything is replayed: the
        history, then the log. A table that was added while the cluster ran and is not in the snapshot, or one that has
        features which were added since, is filled from both, after the others. Raises `LogDamaged`, or `SnapshotLacks`,
        if that is not possible, and what the snapshots and the history raise; `MemoryFull`.
        """
        log = self.log
        assert isinstance(log, Log)
        offers: dict[int, OfferRecord] = {}
        loaded = self._load_snapshot(log)
        if loaded is None:
            if log.first > 0:
                self.shard.deliveries.load(self._kept_deliveries())
            self._replay_log(log, log.first, self._replay_history(log), offers, progress)
        else:
            self.shard.deliveries.load(loaded.state["deliveries"])
            self.erasing = msgspec.convert(loaded.state.get("erasing", {}), Erasing)
            for offset in loaded.state["offers"]:
                record = log.get(offset).record
                if isinstance(record, OfferRecord):  # else it was lost
                    offers[offset] = record
            self._replay_log(log, loaded.begin, loaded.begin, offers, progress)
        deliveries = self.shard.deliveries
        # What was lost, or is of a source that is not declared any more, cannot be delivered.
        deliveries.settle([at for at in deliveries.owed if not self._deliverable(log, at)])
        self.shard.next_offset = log.next
        for table, names in self._incomplete.items():
            self._check_past(log, table, names)
        self._catch_up([*self._lacks, *self._incomplete])

    def _check_past(self, log: Log, table: Table, names: Sequence[str]) -> None:
        """Raise `SnapshotLacks` if what is known of the past is too little for a table that is to be computed anew, for
        the sake of features with these names."""
        if log.first == 0:
            return
        named = ", ".join(names[:_NAMED_MAX]) + (f" and {len(names) - _NAMED_MAX} more" if names[_NAMED_MAX:] else "")
        if self._complete_from is None:
            why = f"the log begins at offset {log.first}, and no history has all that was before"
        else:
            uri = self.shard_folder.history_uri
            assert uri is not None
            before_day = expired(Folder(uri), table.source.name).before_day
            if before_day == Expired().before_day:
                return
            kept_ms = (self.shard.status().newest_arrival_ms or 0) - before_day * DAY_MS
            # A window has all of its length then, if not all of the tile that it may be longer by.
            if all(not series.lifetime and series.keep_ms <= kept_ms for series in table.series):
                return
            why = f"retention has taken what arrived before {day_text(before_day)}, which its features go back behind"
        raise SnapshotLacks(
            f"shard {self.shard.number}: {named} came with this start, so all of {table.name} is to be computed anew, "
            f"and {why}; start without what came, and deploy that while the cluster runs (`millpond deploy`): it is "
            "computed beside what there is"
        )

    def _catch_up(self, tables: Sequence[Table]) -> None:
        """Bring tables that are behind to the end of the log."""
        if not tables:
            return
        assert isinstance(self.log, Log)
        for offset, record in self.past(log=self.log).read_on():
            for table in tables:
                self.shard.catch_up(table, record, offset)
        for table in tables:
            self.shard.route_to(table)
            while not self.shard.catch_up_queued(table):
                pass

    def has_whole_past(self, source: str) -> bool:
        """Return whether all events of a source are in history and log that the shard ever had. Raises what reading the
        history does."""
        assert isinstance(self.log, Log)
        if self.log.first == 0:
            return True
        if (uri := self.shard_folder.history_uri) is None:
            return False
        folder = Folder(uri)
        return whole_from(folder, self.shard.number) == 0 and expired(folder, source) == Expired()

    def past(self, *, whole: bool = True, log: Log | None = None) -> ShardPast:
        """Return the past of the shard, from its beginning on; whole, log: as of `ShardPast`."""
        assert self._folder is not None
        return ShardPast(self._folder.path, self._folder.history_uri, self.shard.number, whole=whole, log=log)

    @property
    def shard_folder(self) -> ShardFolder:
        assert self._folder is not None
        return self._folder

    def _deliverable(self, log: Log, offset: int) -> bool:
        record = log.get(offset).record if offset >= log.first else None
        return isinstance(record, OfferRecord) and record.source in self._layout.sources

    def _kept_deliveries(self) -> dict[str, Any]:
        """Return the deliveries as of the end of the history, for when no snapshot has them."""
        assert self._folder is not None
        try:
            state = json.loads((self._folder.path / "deliveries.json").read_bytes())
        except (OSError, ValueError) as error:
            raise LogDamaged(
                f"log: without a snapshot `{self._folder.path / 'deliveries.json'}` is needed, and cannot be read: "
                f"{error}; restore it from a copy"
            ) from None
        return dict(state)

    def _load_snapshot(self, log: Log) -> Loaded | None:
        """Load the newest usable snapshot, if there is one."""
        folder = self._folder
        if folder is None:
            return None
        paths = newest_snapshots(folder.snapshots)
        for path in paths:
            if not log.first <= begin_of(path) <= log.next:
                raise LogDamaged(
                    f"log: it goes from offset {log.first} to {log.next}, and the snapshot `{path}` was taken at "
                    f"{begin_of(path)}; restore both from one copy"
                )
            try:
                loaded = load_shard(self.shard, path, cluster_id=folder.cluster_id)
                if loaded.newest_offset >= log.next:
                    raise LogDamaged(
                        f"log: it ends at offset {log.next}, and the snapshot `{path}` has events of "
                        f"{loaded.newest_offset}; restore both from one copy"
                    )
                # Those that are behind anyway are backfilled later. Of a key of the definitions that is new nothing was
                # meant for it before, unless that has been brought to it while the cluster ran.
                brought = brought_keys(folder.path)
                self._lacks = [
                    table
                    for table in loaded.lacks
                    if table not in self.shard.behind and (table.added or (table.source.name, table.key) in brought)
                ]
                for table in self._lacks:
                    logger.warning("shard %d: `%s` has nothing of %s", self.shard.number, path, table.name)
                    self.shard.fall_behind(table)
                behind = self.shard.behind
                self._incomplete = {table: names for table, names in loaded.incomplete.items() if table not in behind}
                for table, names in self._incomplete.items():
                    logger.warning("shard %d: `%s` lacks %s", self.shard.number, path, ", ".join(names))
                    self.shard.fall_behind(table)
                return loaded
            except SnapshotDamaged as error:
                # Out of the way: of the snapshots that are kept, each is to be good.
                path.rename(path.with_name(f"{path.name}.damaged"))
                logger.warning("shard %d: %s", self.shard.number, error)
                status = self.shard.status()
                if status.ids or any(status.entities.values()):
                    raise Unavailable(f"{error.message}; the shard begins again without it") from None
        if paths and self._complete_from is None:
            raise LogDamaged(
                f"log: it begins at offset {log.first}, and no snapshot in `{folder.snapshots}` can be read; run "
                "`millpond check` on the stopped cluster's directory"
            )
        return None

    @property
    def _complete_from(self) -> int | None:
        """Where a replay of everything begins: 0, or None if what was before the log is nowhere. Raises what reading
        the history does."""
        assert isinstance(self.log, Log)
        if self.log.first == 0:
            return 0
        uri = None if self._folder is None else self._folder.history_uri
        if uri is None or self.history is None or self.history.done_to < self.log.first:
            return None
        # Where there is nothing at all the place is not the right one, which the replay says.
        return None if whole_from(Folder(uri), self.shard.number) else 0

    def _replay_history(self, log: Log) -> int:
        """Replay what is in the history; return the offset from which the log goes on."""
        if self._complete_from is None:
            raise LogDamaged(
                f"log: it begins at offset {log.first}, and what was before it is in no snapshot that can be used, nor "
                "in a history; restore it from a copy"
            )
        if log.first == 0:
            return 0
        assert self._folder is not None
        assert self._folder.history_uri is not None
        assert self.history is not None
        end = self.history.done_to
        for offset, record in read_history(self._folder.history_uri, self.shard.number, 0, end):
            self.shard.replay_events(record, offset)
        return end

    def _replay_log(
        self, log: Log, begin: int, apply_from: int, offers: dict[int, OfferRecord], progress: Progress
    ) -> None:
        """Replay the log from `begin` on. What is before `apply_from` has been applied: it only says what is offered,
        owed and had. offers: those that are open at `begin`."""
        told = time.monotonic()
        for offset, (record, settled) in log.read(begin):
            if isinstance(record, LostRecord):
                continue
            if isinstance(record, OfferRecord):
                self.shard.replay_offer(record, offset)
                if (record.routes > 1).any():
                    offers[offset] = record
            elif offset < apply_from:
                self.shard.deliveries.have_all(record.homes)
                if isinstance(record, TakeRecord):
                    offers.pop(record.offer, None)
                else:
                    self.shard.remember(record)
            elif isinstance(record, EventsRecord):
                self.shard.replay_events(record, offset)
            elif (offer := offers.pop(record.offer, None)) is not None:
                self.shard.replay_take(record, offer, offset)
            else:
                raise LogDamaged(
                    f"log: the record at offset {offset} takes an offer at {record.offer}, which is not there; run "
                    "`millpond check` on the stopped cluster's directory",
                    path=f"offset {offset}",
                )
            self.shard.deliveries.settle_before(settled)
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                progress(offset, log.next)
        progress(log.next, log.next)

    # -- writes

    def append(self, prepared: Sequence[Prepared], settled: int) -> list[int | None]:
        """Write what is new of it to the log and sync, in one transaction; return the offset of each.

        settled: of the shard's deliveries. Raises `LogFull`: then the shard has to undo it, and all that was prepared
        since, which may have been judged by it.
        """
        records: list[Record] = [p.record for p in prepared if p.record is not None]
        offsets = iter(self.log.append(records, settled) if records else [])
        return [None if p.record is None else next(offsets) for p in prepared]

    def undo(self, prepared: Prepared) -> None:
        self.undone += 1
        self.shard.undo(prepared)

    def owed_events(self, offset: int, settled: int) -> tuple[HomeRecord, Events, Bools]:
        """Return a record that is owed, its events, and which shards keep something of which, bool [shards, n].

        settled: of the shard's deliveries.
        """
        record = self.log.get(offset).record
        assert isinstance(record, OfferRecord)
        home = HomeRecord(self.shard.number, offset, settled)
        rows = np.flatnonzero(record.routes & 1)
        layout = self.shard.layout
        batch = layout.source(record.source).upgraded(record.batch)
        # They go to those keys that they were meant for then: what is of a later one is brought there by `spread`, also
        # if a start has it in its definitions since.
        keys = record.tables
        everything = Events.judged(record.source, batch, record.arrivals, record.received_ms, keys=keys)
        events = everything.of_rows(rows, record.arrivals[:0])
        tables = [table for table in layout.tables_of(record.source) if table.key in keys]
        concerned, _ = shards_of_keys(tables, self.shard.shard_map, events.batch)
        return home, events, concerned

    # -- snapshots, history, truncation

    def snapshot_chunks(self) -> Iterator[Chunk]:
        """Yield the chunks of a snapshot, each a short step between two commits; see `image.shard_chunks`."""
        assert self._folder is not None
        state = {
            "deliveries": self.shard.deliveries.state(),
            "offers": self.shard.offers,
            "erasing": msgspec.to_builtins(self.erasing),
        }
        return shard_chunks(
            self.shard,
            cluster_id=self._folder.cluster_id,
            epoch=self._folder.epoch,
            begin=self.shard.next_offset,
            state=state,
        )

    def snapshot_steps(self, note: Callable[[], None] = lambda: None) -> Steps[dict[str, Any]]:
        """Take a snapshot while events go on, then truncate the log; return what there is to say of the snapshot.

        note: writes down what the log would not say any more. Raises `SnapshotFull`, `Unavailable`.
        """
        begun, undone, begin, longest_s = time.monotonic(), self.undone, self.shard.next_offset, 0.0
        writer = SnapshotWriter(self.shard_folder.snapshots)
        try:
            chunks = self.snapshot_chunks()
            while True:
                step_s = time.perf_counter()
                chunk = next(chunks, None)
                longest_s = max(longest_s, time.perf_counter() - step_s)
                if chunk is None:
                    break
                yield In("house", partial(writer.write, chunk))
            # What had been prepared by the last step is to be in the log before the snapshot gets its name: it may have
            # ids of it.
            yield Write()
            if self.undone != undone:
                raise Unavailable("a snapshot is begun again: something in it was not written to the log")
            path = yield In("house", writer.finish)
        except BaseException:
            writer.abandon()
            raise
        told = {
            "snapshot_offset": begin,
            "snapshot_s": round(time.monotonic() - begun, 3),
            "snapshot_step_ms": round(longest_s * 1000, 3),
            "snapshot_bytes": path.stat().st_size,
        }
        yield In("house", partial(remove_old_snapshots, path.parent))
        yield In("house", give_back)
        yield from self.truncation_steps(note)
        return told

    def truncation_steps(self, note: Callable[[], None] = lambda: None) -> Steps[None]:
        """Truncate the log of what nothing needs any more."""
        assert isinstance(self.log, Log)
        needed = [*self.shard.offers, *self.shard.deliveries.owed]
        before = yield In("house", partial(self.truncatable, needed))
        yield In("views", note)
        while (yield In("log", partial(self.log.truncate, before))):
            yield Rest(_BREATH_S)

    def write_history(self, to_offset: int, deliveries: Mapping[str, Any], offers: Collection[int]) -> None:
        """Write the log up to an offset to the history: as a part, after the one that was begun before, if any. Raises
        `HistoryUnavailable`: try again later.

        deliveries: their state as of that offset, or later; all of it is in the log. offers: of the shard, as of that
        offset; no other one from before it is taken after it. What this reads and writes is settled, so it may run in a
        thread of its own.
        """
        assert self._folder is not None
        write_json(self._folder.path / "deliveries.json", dict(deliveries))
        assert self.history is not None
        assert isinstance(self.log, Log)
        self.history.skip_to(self.log.first)
        while self.history.done_to < to_offset:
            open_offers: dict[int, OfferRecord] = {}
            first = min(self.history.done_to, self._history_keeps) if self._history_keeps else self.log.first
            end = self.history.planned_to or to_offset
            self.history.write_part(end, applied_records(self.log, first, end, open_offers))
            wanted = [at for at in open_offers if at in offers or end < to_offset]
            self._history_keeps = min([self.history.done_to, *wanted])

    def oldest_ms(self, first: int) -> int:
        """Return the oldest arrival stamp of the first record with events from an offset of the log on, or `NEVER_MS`
        if there is none."""
        assert isinstance(self.log, Log)
        for _, (record, _) in self.log.read(first):
            if isinstance(record, EventsRecord | OfferRecord) and len(record.arrivals):
                return int(record.arrivals.min())
        return NEVER_MS

    def truncatable(self, needed: Sequence[int]) -> int:
        """Return the offset before which the log is needed by nothing any more.

        needed: what the shard itself needs, its `offers` and what it owes.
        """
        log, folder = self.log, self._folder
        assert isinstance(log, Log)
        assert folder is not None
        kept = newest_snapshots(folder.snapshots)[:2]
        if len(kept) < 2:
            return log.first
        needs = [self._history_keeps if self._folder and self._folder.history_uri else log.next]
        for path in kept:
            state = snapshot_state(path)
            needs += [begin_of(path), *state["offers"], *state["deliveries"]["owed"]]
        return min(*needs, *needed, log.next)


def snapshot_state(path: Path) -> dict[str, Any]:
    """Return what a snapshot has of the shard's deliveries and offers. Raises `SnapshotDamaged`."""
    header = next(iter(read_snapshot(path, (ShardHeader,)))).header
    assert isinstance(header, ShardHeader)
    return header.state
