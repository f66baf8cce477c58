"""Durable shards in this process, in folders, with faults: what a test does to a cluster without Ray.

A write on a shard has steps, at each of which someone can die: the shard, the ingress that sent it, or everyone. What
is on disk then is what a successor finds; what was in memory is gone, and nothing is closed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from worlds import AHEAD_MS_MAX, batch

from millpond.feature_actors.backfill import whole_tables
from millpond.feature_actors.client import FeatureClient, TimeLimits
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.durable import DurableShard, ShardFolder
from millpond.feature_actors.eraser import Eraser
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.events import Events, Receipt
from millpond.feature_actors.filling import AddedTable, Filling, SliceSizes
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.log.log import Log, LogFull
from millpond.feature_actors.log.record import EventsRecord, HomeRecord, OfferRecord, TakeRecord
from millpond.feature_actors.manifest import Manifest
from millpond.feature_actors.past import Past
from millpond.feature_actors.ports import LocalRead, complete
from millpond.feature_actors.shard import Prepared, Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.spread import brought_before, note_brought, take_down
from millpond.feature_actors.steps import Cut, In, Steps, Write
from millpond.feature_actors.tiles.store import SPARE_SLOT_WORDS
from millpond.feature_actors.tombstones import Tombstone
from millpond.feature_actors.view import FeatureView

#: Where a crash can come: before the log is written, in the middle of it, after it but before the tiles, after both but
#: before the answer.
STEPS = ("before append", "torn append", "after append", "after commit")
_WAL = "cache.db-wal"
SECRET = (7, 9)
Who = Literal["shard", "ingress", "all"]


class Crash(Unavailable):
    """Somebody ended here; to whoever waited it looks as if a shard were away."""


@dataclass
class Fault:
    """The next write but `skip` fails at a step; torn: bytes that are missing at the end of a torn append, at most."""

    step: str
    who: Who = "all"
    skip: int = 0
    torn: int = 1


class DurableCluster:
    """An ingest port, and a client over it. `fault` says how the next write fails; `full` that the disk is."""

    def __init__(
        self, layout: Layout, n_shards: int, folder: Path, n_slots: int = 16, *, history: bool = False
    ) -> None:
        self.layout, self.folder = layout, folder
        #: Views that came since the start.
        self.added: list[FeatureView] = []
        #: So many of them the ingress knows; and so many keys that came does every ingress know.
        self.routed_views = self.keys_required = 0
        self._backfills: dict[int, Iterator[None]] = {}
        self._erasures: dict[int, Iterator[None]] = {}
        #: What a shard says that it is at.
        self.erasing: dict[int, str] = {}
        #: What a shard hears of when the next take comes, after its offer.
        self.entomb_at_take: Tombstone | None = None
        #: Whether takes are in the log alone when they are answered here, until something waits for them.
        self.hold_takes = False
        self._held: dict[int, list[tuple[Prepared, int | None]]] = {}
        #: Whether a shard does all that its tombstones ask for when a take comes, after its offer.
        self.erase_at_take = False
        #: Whether a backfill goes on when the next take comes, after its offer.
        self.backfill_at_take = 0
        self._history = str(folder / "history") if history else None
        self._epochs = itertools.count(1)
        self._snapshots: dict[int, Iterator[None]] = {}
        self._logged: dict[tuple[int, int], tuple[str, list[dict[str, Any]]]] = {}
        self.shard_map = ShardMap.even(n_slots, n_shards)
        self.clock = ManualClock(0)
        self.fault: Fault | None = None
        self.full = False
        #: Whether a snapshot begins, or goes on, when the next take has been prepared, and is not in the log yet.
        self.snapshot_at_take = False
        self._copies = itertools.count()
        self._data = folder / "past"
        (self._data / "shards").mkdir(parents=True, exist_ok=True)
        Manifest("dev", "tests", n_slots, 5, log_shards=n_shards).write(self._data)
        self.shards: list[DurableShard] = [self._opened(n, folder / f"{n}") for n in range(n_shards)]
        self._connect()

    # -- deaths

    def _opened(self, number: int, folder: Path) -> DurableShard:
        margin_ms = AHEAD_MS_MAX + 60_000
        shard = Shard(
            self.layout, self.shard_map, number, reclaim_margin_ms=margin_ms, spare_slot_words=SPARE_SLOT_WORDS
        )
        whole = whole_tables(folder)
        for table in shard.extend(self.layout.extended(self.added)):
            if table.added in whole:
                shard.keep_up(table)
        of = ShardFolder(folder, "tests", next(self._epochs), self._history, SECRET)
        folder.mkdir(parents=True, exist_ok=True)
        durable = DurableShard(self.layout, shard, Log(of.log, "process"), of)
        durable.folder = folder  # type: ignore[attr-defined]
        durable.brought = brought_before(folder, durable.log, shard.layout.added_keys)  # type: ignore[attr-defined]
        note_brought(folder, durable.brought, durable.log.next)  # type: ignore[attr-defined]
        durable.recover()
        # Whoever reads the past of this shard, now or since before it died, finds it where it always was.
        link, new = self._data / "shards" / f"{number:03d}", self._data / f"{number:03d}"
        new.symlink_to(folder)
        new.replace(link)
        return durable

    def _connect(self) -> None:
        """Start a new ingress: what the last one had not told the homes, nobody tells them."""
        read = LocalRead([d.shard for d in self.shards])
        limits = TimeLimits(ahead_ms_max=AHEAD_MS_MAX)
        layout = self.layout.extended(self.added[: self.routed_views])
        self.client = FeatureClient(layout, self.shard_map, self, read, self.clock, limits)

    def restart(self, number: int, wal_bytes_max: int | None = None) -> None:
        """Let a successor recover a shard from what is on disk; wal_bytes_max: where the write-ahead file ends."""
        old = self.shards[number].folder  # type: ignore[attr-defined]
        new = self.folder / f"{number}-{next(self._copies)}"
        # A copy, without SQLite's memory of it that its old connection in this process still has.
        shutil.copytree(old, new, ignore=shutil.ignore_patterns("*-shm"))
        if wal_bytes_max is not None:
            os.truncate(new / "log" / _WAL, wal_bytes_max)
        self._snapshots.pop(number, None)
        self._backfills.pop(number, None)
        self._erasures.pop(number, None)
        self._held.pop(number, None)
        self.shards[number] = self._opened(number, new)
        self._connect()

    def restart_all(self) -> None:
        for number in range(len(self.shards)):
            self.restart(number)

    def _wal_bytes(self, number: int) -> int:
        return int((self.shards[number].folder / "log" / _WAL).stat().st_size)  # type: ignore[attr-defined]

    def _step(self, step: str, number: int, wal_bytes: int = 0) -> None:
        fault = self.fault
        if fault is None or fault.step != step:
            return
        if fault.skip > 0:
            fault.skip -= 1
            return
        if fault.who == "ingress":  # the shard goes on without it
            fault.step = "after commit"
        if step != fault.step:
            return
        self.fault = None
        if fault.who == "ingress":
            self._connect()
        else:
            torn = max(self._wal_bytes(number) - fault.torn, wal_bytes) if step == "torn append" else None
            for other in range(len(self.shards)) if fault.who == "all" else [number]:
                self.restart(other, torn if other == number else None)
        raise Crash(f"{fault.who} ended {step}")

    # -- the ingest port

    async def ingest(self, shard: int, events: Events, settled: Sequence[int]) -> Receipt:
        self.shards[shard].shard.deliveries.settle(settled)
        return await self._write(shard, self.shards[shard].shard.prepare_ingest(events))

    async def offer(self, shard: int, request: bytes, events: Events, settled: Sequence[int]) -> Receipt:
        self.shards[shard].shard.deliveries.settle(settled)
        return await self._write(shard, self.shards[shard].shard.prepare_offer(request, events))

    async def take(self, shard: int, request: bytes, accepted: Any, homes: Sequence[HomeRecord]) -> None:
        self.backfill_steps(shard, self.backfill_at_take)
        if self.entomb_at_take is not None:
            self.forget(shard, self.entomb_at_take)
        if self.erase_at_take:
            self.erase_all(shard)
        await self._write(shard, self.shards[shard].shard.prepare_take(request, accepted, homes))

    async def settle(self, shard: int, settled: Sequence[int], wait_before: int, left: Sequence[int] = ()) -> None:
        deliveries = self.shards[shard].shard.deliveries
        deliveries.settle(settled)
        for offset in [o for o in deliveries.owed if o < wait_before]:
            await self.deliver(shard, offset)

    async def deliver(self, home: int, offset: int) -> None:
        """Bring a record that a home owes to every shard that keeps something of it."""
        durable = self.shards[home]
        settled = durable.shard.deliveries.settled(durable.shard.next_offset)
        record, events, concerned = durable.owed_events(offset, settled)
        for shard in np.flatnonzero(concerned.any(axis=1)).tolist():
            part = events.of_rows(np.flatnonzero(concerned[shard]), events.arrivals[:0])
            await self._write(shard, self.shards[shard].shard.prepare_deliver(record, part))
        self.shards[home].shard.deliveries.settle([offset])

    async def _write(self, number: int, prepared: Prepared) -> Receipt:
        durable = self.shards[number]
        if self.full:
            self.full = False
            durable.undo(prepared)
            raise LogFull("log: no room")
        if self.snapshot_at_take and isinstance(prepared.record, TakeRecord):
            self.snapshot_at_take = False
            self.snapshot_steps(number, 1)
        self._step("before append", number)
        settled = durable.shard.deliveries.settled(durable.log.next)
        wal_bytes = self._wal_bytes(number)
        (offset,) = durable.append([prepared], settled)
        if prepared.record is not None:
            self._step("torn append", number, wal_bytes)
        self._step("after append", number)
        if self.hold_takes and isinstance(prepared.record, TakeRecord):
            self._held.setdefault(number, []).append((prepared, offset))
            return Receipt(prepared.verdicts, -1, 0, 0, False)
        self.commit_held(number)
        receipt = durable.shard.commit(prepared, offset)
        self._step("after commit", number)
        return receipt

    def commit_held(self, number: int) -> None:
        """Commit what is in the log of a shard alone."""
        for prepared, offset in self._held.pop(number, []):
            self.shards[number].shard.commit(prepared, offset)

    # -- what a test does

    def send(self, name: str, now_ms: int, events: Sequence[dict[str, Any]], key: str | None = None) -> Any:
        self.clock.ms = now_ms
        rows = batch(self.layout.source(name), list(events))
        return complete(self.client.ingest(name, rows, idempotency_key=key))

    def deliver_owed(self) -> None:
        for shard, durable in enumerate(self.shards):
            for offset in list(durable.shard.deliveries.owed):
                complete(self.deliver(shard, offset))

    def snapshot_steps(self, number: int, steps: int) -> None:
        """Go on with the snapshot of a shard, or begin one; when it is whole, remove old ones and truncate the log."""
        if number in self._backfills or number in self._erasures:
            return
        if number not in self._snapshots:
            self._snapshots[number] = self._driven(number, self._snapshot(number))
        with suppress(Unavailable):  # something in it was undone
            for _ in range(steps):
                if next(self._snapshots[number], self) is self:
                    break
            else:
                return
        del self._snapshots[number]

    def leave(self, directory: Path) -> Path:
        """Copy what is on disk as the data directory of a cluster, which others may read."""
        for number, durable in enumerate(self.shards):
            shard = directory / "shards" / f"{number:03d}"
            folder = durable.folder  # type: ignore[attr-defined]
            shutil.copytree(folder, shard, ignore=shutil.ignore_patterns("*-shm"))
            opened = {"cluster_id": "tests", "shard": number, "epoch": 9, "run": "r", "log_end": 0}
            (shard / "epoch.json").write_text(json.dumps(opened))
        if self._history is not None and Path(self._history).exists():
            shutil.copytree(self._history, directory / "history")
        manifest = {
            "cluster_name": "dev", "cluster_id": "tests", "n_slots": self.shard_map.n_slots, "hash_seed": 5,
            "key_hash_version": 1, "format": 1, "log_shards": len(self.shards),
        }  # fmt: skip
        (directory / "manifest.json").write_text(json.dumps(manifest))
        return directory

    def add_view(self, view: FeatureView, *, routed: bool = True) -> None:
        """Have a view from now on; `backfill_steps` brings it what was before. routed: the ingress knows it, too."""
        self.added.append(view)
        layout = self.layout.extended(self.added)
        for durable in self.shards:
            durable.shard.extend(layout)
        self._backfills.clear()
        if routed:
            self.route_views()

    def route_views(self) -> None:
        """Have an ingress that knows all views, and no other from now on."""
        self.routed_views = len(self.added)
        self._connect()
        self.keys_required = len(self.client.layout.added_keys)

    def define_views(self) -> None:
        """Start anew with the views that came among the definitions."""
        self.layout = compile_layout([*self.layout.sources.values()], [*self.layout.views.values(), *self.added])
        self.added = []
        self.routed_views = self.keys_required = 0
        self.restart_all()

    def backfill_steps(self, number: int, steps: int) -> bool:
        """Go on with the backfill of a shard, or begin it; return whether nothing is left to do. No snapshot is under
        way meanwhile."""
        if number not in self._backfills:
            if not self.shards[number].shard.behind or number in self._snapshots:
                return not self.shards[number].shard.behind
            self._backfills[number] = self._driven(number, self._filling(self.shards[number]))
        for _ in range(steps):
            if next(self._backfills[number], self) is self:
                del self._backfills[number]
                return True
        return False

    def fail_backfill(self, number: int) -> None:
        """Have the backfill of a shard fail where it is; it may be begun anew."""
        if self._backfills.pop(number, None) is not None:
            shard = self.shards[number].shard
            for table in shard.behind:
                for _ in shard.give_up(table):
                    pass

    def _driven(self, number: int, steps: Steps[Any]) -> Iterator[None]:
        """Take the steps of some work on a shard; yield before and after each."""
        answer = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration:
                return
            yield
            durable = self.shards[number]
            if isinstance(step, In):
                answer = step.do()
            elif isinstance(step, Write):
                self.commit_held(number)
                for prepared in step.prepared:
                    self._append(durable, prepared)
            elif isinstance(step, Cut):
                while step.key_number > self.keys_required:
                    yield
                answer = self.shards[step.home].shard.next_offset
            yield

    def _append(self, durable: DurableShard, prepared: Prepared) -> None:
        (offset,) = durable.append([prepared], 0)
        durable.shard.commit(prepared, offset)
        take_down(durable.brought, prepared.record)  # type: ignore[attr-defined]

    def _filling(self, durable: DurableShard) -> Steps[None]:
        added = [AddedTable(table, "backfilling") for table in durable.shard.behind]
        brought = durable.brought  # type: ignore[attr-defined]
        return Filling(durable, self.past(), len(self.shards), brought, added, SliceSizes(3, 2, 2)).steps()

    def forget(self, number: int, tombstone: Tombstone) -> None:
        """Have a tombstone on a shard; `erase_steps` does what it asks for."""
        shard = self.shards[number].shard
        shard.tombstones.write([tombstone])
        shard.forget([tombstone])

    def erase_steps(self, number: int, steps: int) -> bool:
        """Go on with what the tombstones of a shard ask for, or begin it; return whether nothing is left to do."""
        if number not in self._erasures:
            if number in self._backfills or not self.shards[number].shard.tombstones.waiting:
                return not self.shards[number].shard.tombstones.waiting
            self._snapshots.pop(number, None)
            self._erasures[number] = self._driven(number, self._erase(number))
        for _ in range(steps):
            if next(self._erasures[number], self) is self:
                del self._erasures[number]
                return True
        return False

    def erase_all(self, number: int) -> None:
        while not self.erase_steps(number, 1_000):
            pass

    def _erase(self, number: int) -> Steps[None]:
        self.commit_held(number)  # what was prepared before is in the log
        eraser = Eraser(self.shards[number])
        yield from eraser.steps(lambda: self._snapshot(number), lambda state: self.erasing.update({number: state}))
        eraser.finish(self.clock.ms)

    def _snapshot(self, number: int) -> Steps[Any]:
        def note() -> None:
            self._note(number)
            durable = self.shards[number]
            note_brought(durable.folder, durable.brought, durable.log.next)  # type: ignore[attr-defined]

        return self.shards[number].snapshot_steps(note)

    def write_history(self, number: int) -> None:
        shard = self.shards[number].shard
        end, deliveries = shard.next_offset, shard.deliveries.state()
        self.commit_held(number)
        self.shards[number].write_history(end, deliveries, shard.offers)

    def past(self) -> Past:
        """Return the past of the shards, from a directory such as clusters have."""
        return Past(self._data, self._history)

    def _note(self, number: int) -> None:
        """Note which events are in the log of their home: later it may have been truncated."""
        log = self.shards[number].log
        assert isinstance(log, Log)
        for offset, (record, _) in log.read():
            if isinstance(record, EventsRecord | OfferRecord):
                rows = np.flatnonzero(record.routes & 1)
                self._logged[number, offset] = record.source, record.batch.take(rows).to_pylist()

    def logged(self, field: str) -> list[Any]:
        """Return a field of every event that is or was in the log of its home."""
        return [event[field] for event in self.logged_events()]

    def logged_events(self, source: str | None = None) -> list[dict[str, Any]]:
        """Return every event, of a source or of all, that is or was in the log of its home."""
        for number in range(len(self.shards)):
            self._note(number)
        return [event for of, events in self._logged.values() for event in events if source in (None, of)]
