"""A shard in a process of its own: recovery, what it is asked, and what it owes other shards. No Ray.

Everything about the shard happens on one event loop, in a thread of this server's, one thing at a time. What works on
it beside the calls has files of its own: `workshop` (its threads, and the queue to its log), `view_follower` (views
that come), `shard_forgetter` (entities that are forgotten), `housekeeper` (snapshots, history, retention).

It is called by a method's name (`METHODS`) and what `wire` makes of its arguments: over a Unix socket by who is on the
same node, and through the Ray actor that holds it by others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from millpond.feature_actors.calls import CallIngest, Calls
from millpond.feature_actors.durable import DurableShard, ShardFolder, VolatileLog
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.events import Events
from millpond.feature_actors.housekeeper import Housekeeper
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.record import HomeRecord, LogDamaged
from millpond.feature_actors.log.snapshot import begin_of, newest_snapshots
from millpond.feature_actors.manifest import lock_shard, note_log, open_shard
from millpond.feature_actors.ports import all_of
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_forgetter import ShardForgetter
from millpond.feature_actors.shard_spec import ScoreEraser, ShardSpec
from millpond.feature_actors.socket_calls import Caller, caller, serve_socket, socket_path
from millpond.feature_actors.spread import brought_before, note_brought
from millpond.feature_actors.tiles.memory import Control, Memory
from millpond.feature_actors.tiles.store import SPARE_SLOT_WORDS
from millpond.feature_actors.tombstones import forget_secret
from millpond.feature_actors.view_follower import ViewFollower
from millpond.feature_actors.wire import decode_events, encode_answer, encode_receipt
from millpond.feature_actors.workshop import Workshop

__all__ = ["ScoreEraser", "ShardServer", "ShardSpec"]

#: What is owed for so long, and nobody is about to have it taken, is delivered by its home; sooner if someone waits for
#: it.
_DELIVER_AFTER_S, _DELIVER_SOON_S = 2.0, 0.2
#: How long a round of deliveries may fail before the next one is tried.
_DELIVER_AGAIN_S, _DELIVER_AT_ONCE = 0.5, 256
_TICK_S = 0.05
_RECOVER_AGAIN_S = 2.0
#: How long a duplicate waits until all shards have what it is a duplicate of.
_SETTLE_S_MAX = 5.0
#: How long an offer waits to be taken.
OFFER_S_MAX = 60.0

logger = logging.getLogger("millpond.shard")


class ShardServer:
    """Serve shard `number`, from now until the process ends or `close`.

    peers: how it reaches the other shards. While it lives it holds the shard's folder: a predecessor that has not ended
    is waited for. Raises `Unavailable` if that does not end, `ManifestError` if what the shard had is not there.
    """

    #: What may be called.
    METHODS = frozenset(
        (
            "ingest",
            "offer",
            "take",
            "deliver",
            "settle",
            "cut",
            "ready",
            "read",
            "status",
            "check",
            "snapshot",
            "drain",
            "forget",
            "entomb",
            "forgotten",
            "entombed",
        )
    )

    def __init__(self, spec: ShardSpec, number: int, peers: Callable[[], Calls]) -> None:
        self._spec, self._number, self._of = spec, number, spec.shard_map.n_shards
        self._layout_at_start = compile_layout(spec.sources, spec.views)
        self._peers = peers
        logged = spec.durability != "none"
        self._lock = lock_shard(Path(spec.data_dir), number, spec.cluster_name, logged=logged)
        try:
            self._open(logged)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, logged: bool) -> None:
        spec, number = self._spec, self._number
        self._opening = open_shard(Path(spec.data_dir), number, spec.run_id, spec.cluster_id, logged=logged)
        self._control = Control(Path(spec.memory_dir), number, writable=True)
        self._progress = (0, 0)
        self._deliver_soon = False
        #: By offset of what is owed, who has offered it and is to have it taken.
        self._offered_by: dict[int, Caller] = {}
        self._at = Workshop(spec, number, self._new_shard())
        self._views = ViewFollower(self._at, self._layout_at_start, self._peers)
        self._house = Housekeeper(self._at)
        self._forgetter = ShardForgetter(self._at, self._house, self._peers)
        self._loop = asyncio.new_event_loop()
        self._life = asyncio.run_coroutine_threadsafe(self._live(), self._loop)
        self._life.add_done_callback(self._ended)
        Thread(target=self._loop.run_forever, name="shard", daemon=True).start()

    def _ended(self, life: Future[None]) -> None:
        if not life.cancelled() and life.exception() is not None:
            logger.error("shard %d has failed; its process ends", self._number, exc_info=life.exception())
            os._exit(70)

    def _new_shard(self) -> Shard:
        """Return an empty shard; its memory is not published yet."""
        spec, tiles = self._spec, self._control.tiles_path(self._opening.epoch)
        tiles.unlink(missing_ok=True)
        return Shard(
            self._layout_at_start,
            spec.shard_map,
            self._number,
            seed=spec.hash_seed,
            dedupe_horizon_ms=spec.dedupe_horizon_ms,
            dedupe_horizon_ms_min=spec.dedupe_horizon_ms_min,
            dedupe_bytes_max=spec.dedupe_bytes_max,
            memory=Memory.create(tiles, spec.memory_bytes_max),
            strings_max=spec.strings_max,
            reclaim_margin_ms=spec.reclaim_margin_ms,
            spare_slot_words=SPARE_SLOT_WORDS if spec.added_views is not None else 0,
        )

    # -- life

    async def _live(self) -> None:
        """Let callers in, who are told to wait; recover, and let readers in; deliver what is owed, for ever."""
        path = socket_path(Path(self._spec.memory_dir), self._number)
        server = await serve_socket(path, self.call)
        try:
            durable = await self._recovered_at_last()
            self._control.publish(self._opening.epoch)
            self._at.durable, self._at.refuses = durable, ""
            await asyncio.gather(
                self._deliver_forever(),
                self._views.follow(),
                self._house.keep(),
                self._house.keep_at(lambda: self._forgetter.is_due, self._forgetter.erase),
            )
        finally:
            server.close()
            path.unlink(missing_ok=True)

    async def _recovered_at_last(self) -> DurableShard:
        """Recover. What cannot be recovered is refused, not begun anew; what may be another time is tried again."""
        while True:
            try:
                durable: DurableShard | None = await self._at.in_thread("log", self._recovered)
                if durable is not None:
                    return durable
                break
            except (Unavailable, OSError) as error:  # a full disk, a history that is away
                logger.warning("shard %d cannot recover yet: %s", self._number, error)
                self._at.refuse(f"cannot recover yet: {error}", "unavailable", 5_000)
                await asyncio.sleep(_RECOVER_AGAIN_S)
                self._at.shard = self._new_shard()
            except Exception as error:
                logger.exception("shard %d cannot recover", self._number)
                self._at.refuse(f"cannot recover: {error}")
                break
        await asyncio.Event().wait()
        raise AssertionError

    def _recovered(self) -> DurableShard | None:
        """Return the shard with its log, replayed; None if there is no log, and it had been opened before."""
        self._at.call_in_thread("views", self._views.add_views)
        if self._spec.durability == "none":
            if self._opening.again:
                # It would answer with empty features, as if nobody had ever done anything. Readers of this node go on
                # with the memory that its predecessor left.
                self._at.refuse(
                    "was restarted and its features are gone; start the cluster anew and load the events again"
                )
                return None
            return DurableShard(self._views.layout, self._at.shard, VolatileLog())
        spec = self._spec
        durability: Any = spec.durability
        folder = ShardFolder(
            self._at.folder, spec.cluster_id, self._opening.epoch, spec.history_uri,
            forget_secret(Path(spec.data_dir)),
        )  # fmt: skip
        log = Log(folder.log, durability, spec.disk_free_bytes_min)
        sure_to = log.next if durability == "sync" else 0  # the rest may go with the power
        note_log(Path(spec.data_dir), self._number, spec.cluster_id, log.next, sure_to=sure_to)
        durable = DurableShard(self._views.layout, self._at.shard, log, folder)
        self._at.brought = brought_before(folder.path, log, self._views.layout.added_keys)
        note_brought(folder.path, self._at.brought, log.next)
        self._views.cuts = dict.fromkeys(range(1, self._views.keys_required + 1), log.next)
        if durable.history is not None and durable.history.done_to > log.next:
            raise LogDamaged(
                f"log: it ends at offset {log.next}, and the history goes to {durable.history.done_to}; restore both "
                "from one copy"
            )
        durable.recover(self._note_progress)
        if durable.history is not None:
            self._at.bytes_since_history = log.bytes_from(durable.history.done_to)
        if kept := newest_snapshots(folder.snapshots):
            self._house.last_snapshot = {"snapshot_bytes": kept[0].stat().st_size}
        self._at.bytes_since_snapshot = log.bytes_from(begin_of(kept[0]) if kept else log.first)
        return durable

    def _note_progress(self, at: int, end: int) -> None:
        self._progress = (at, end)
        self._at.refuse(f"is replaying its log (offset {at} of {end})", "recovering", 200)

    def close(self) -> None:
        """Stop serving, at once. What has been acknowledged is in the log."""
        self._life.cancel()
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._at.close()
        self._lock.release()

    # -- calls

    def called(self, method: str, arguments: Sequence[Any]) -> Future[Any]:
        """Call a method from another thread."""
        return asyncio.run_coroutine_threadsafe(self.call(method, arguments), self._loop)

    def call(self, method: str, arguments: Sequence[Any]) -> Coroutine[Any, Any, Any]:
        """Call a method by its name; on the loop of this server."""
        if method not in self.METHODS:
            raise Unavailable(f"shard {self._number} of {self._of} has no `{method}`; it is of another version")
        return getattr(self, method)(*arguments)  # type: ignore[no-any-return]

    # -- writes

    async def ingest(self, events: Any, settled: Sequence[int]) -> Any:
        self._at.check()
        self._at.shard.deliveries.settle(settled)
        self._at.check_queue()
        return encode_receipt(await self._at.written(self._at.shard.prepare_ingest(self._decoded(events))))

    async def offer(self, request: bytes, events: Any, settled: Sequence[int]) -> Any:
        self._at.check()
        self._at.shard.deliveries.settle(settled)
        self._at.check_queue()
        decoded = self._decoded(events)
        receipt = await self._at.written(self._at.shard.prepare_offer(request, decoded, time.monotonic()))
        if (who := caller.get()) is not None and receipt.offset >= 0:
            self._offered_by[receipt.offset] = who
        return encode_receipt(receipt)

    def _decoded(self, wire: Any) -> Events:
        events = decode_events(wire, self._views.layout)
        if events.keys_known < self._views.keys_required:
            raise Unavailable(
                f"shard {self._number} of {self._of}: the process that sends these events has not heard of a key that "
                "came; send them again",
                code="stale_routes",
                retry_after_ms=200,
            )
        return events

    async def take(self, request: bytes, accepted: bytes, homes: Sequence[Sequence[int]]) -> None:
        self._at.check()
        records = [HomeRecord(*home) for home in homes]
        await self._at.written(self._at.shard.prepare_take(request, np.frombuffer(accepted, np.bool_), records))

    async def deliver(self, home: Sequence[int], events: Any) -> None:
        self._at.check()
        await self._at.written(
            self._at.shard.prepare_deliver(HomeRecord(*home), decode_events(events, self._views.layout))
        )

    async def settle(self, settled: Sequence[int], wait_before: int, left: Sequence[int] = ()) -> None:
        """Return when what is owed of records before an offset has been applied everywhere."""
        self._at.check()
        deliveries, until_s = self._at.shard.deliveries, time.monotonic() + _SETTLE_S_MAX
        deliveries.settle(settled)
        for offset in left:
            self._offered_by.pop(offset, None)
        while any(offset < wait_before for offset in deliveries.owed):
            if time.monotonic() > until_s:
                raise Unavailable(
                    f"shard {self._number} of {self._of} has had these events before, other shards do not have them "
                    "yet; send them again later",
                    code="unsettled",
                    retry_after_ms=1_000,
                )
            self._deliver_soon = True
            await asyncio.sleep(_TICK_S / 10)
            self._at.check()

    # -- what is owed

    async def _deliver_forever(self) -> None:
        """Bring to the other shards what they have not had of this one's records; forget offers that nobody takes."""
        again_s: dict[int, float] = {}
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            self._at.shard.drop_offers(now_s - OFFER_S_MAX)
            if self._at.refuses:  # it is stopping
                continue
            patience_s = _DELIVER_SOON_S if self._deliver_soon else _DELIVER_AFTER_S
            self._deliver_soon = False
            owed = self._at.shard.deliveries.owed
            again_s = {offset: at_s for offset, at_s in again_s.items() if offset in owed}
            # Events of one request are applied in its order only if they are taken together: whoever is slow, and there
            # still, is waited for.
            self._offered_by = {o: who for o, who in self._offered_by.items() if o in owed and not who.gone}
            before_s = {o: now_s - (OFFER_S_MAX if o in self._offered_by else patience_s) for o in owed}
            due = [o for o, since_s in owed.items() if since_s < before_s[o] and again_s.get(o, 0) < now_s]
            for offset in due[:_DELIVER_AT_ONCE]:
                try:
                    if offset in owed:
                        await self._deliver(offset)
                except Exception as error:  # a shard that is away: what others are owed is delivered all the same
                    again_s[offset] = time.monotonic() + _DELIVER_AGAIN_S
                    if not isinstance(error, Unavailable):
                        logger.exception("shard %d cannot deliver its record %d", self._number, offset)

    async def _deliver(self, offset: int) -> None:
        assert self._at.durable is not None
        settled = self._at.shard.deliveries.settled(self._at.shard.next_offset)
        home, events, concerned = await self._at.in_thread("log", self._at.durable.owed_events, offset, settled)
        peers = CallIngest(self._peers())
        started: dict[int, asyncio.Future[Any]] = {}
        for shard in np.flatnonzero(concerned.any(axis=1)).tolist():
            part = events.of_rows(np.flatnonzero(concerned[shard]), events.arrivals[:0])
            if shard == self._number:
                started[shard] = self._at.written(self._at.shard.prepare_deliver(home, part))
            else:
                started[shard] = asyncio.ensure_future(peers.deliver(shard, home, part))
        await all_of(started)
        self._at.shard.deliveries.settle([offset])

    # -- what others do, see there

    async def cut(self, key_number: int) -> int:
        return await self._views.cut(key_number)

    async def forget(self, field: str, value: int | str, at_ms: int) -> dict[str, Any]:
        return await self._forgetter.forget(field, value, at_ms)

    async def entomb(self, wire: Mapping[str, Any]) -> None:
        await self._forgetter.entomb(wire)

    async def forgotten(self, field: str, value: int | str) -> dict[str, Any] | None:
        return await self._forgetter.forgotten(field, value)

    async def entombed(self, field: str, mark: str) -> dict[str, Any] | None:
        return await self._forgetter.entombed(field, mark)

    async def snapshot(self) -> dict[str, Any]:
        self._at.check()
        return await self._house.snapshot()

    async def drain(self) -> None:
        """Take nothing more, finish what is under way, and take a snapshot: a start after it replays nothing."""
        durable = self._at.durable
        if durable is None:
            return
        self._at.refuse("is stopping", "stopping", 5_000)
        for broken_off in (self._views.backfilling, self._forgetter.erasing):  # the next start begins it anew
            if broken_off is not None:
                broken_off.cancel()
                await asyncio.wait([broken_off])
        if isinstance(durable.log, Log):
            await self._house.leave(durable)

    # -- the rest

    async def ready(self) -> None:
        """Return when it has recovered. Raises `Unavailable` if it cannot."""
        while self._at.code == "recovering" and self._at.refuses:
            await asyncio.sleep(_TICK_S / 10)
        self._at.check()

    async def read(self, question: Any) -> Any:
        self._at.check()
        return encode_answer(self._at.shard.read(self._views.decoder.decode(question)))

    async def status(self) -> dict[str, Any]:
        """Return what it holds, or how far its recovery has come."""
        state = "ready" if not self._at.refuses else self._at.code
        at, end = self._progress
        about = {
            "shard": self._number,
            "state": state,
            "epoch": self._opening.epoch,
            "replayed": at,
            "log_end": max(end, self._at.shard.next_offset),
        }
        if self._at.refuses:
            return {**about, "why": self._at.refuses}
        log = self._at.durable.log if self._at.durable is not None else None
        first = log.first if isinstance(log, Log) else 0
        done_to = self._at.durable.history.done_to if self._at.durable is not None and self._at.durable.history else 0
        status = asdict(self._at.shard.status())
        added = {name: one.as_json() for name, one in self._views.added.items()}
        about |= {"views": added, "views_failure": self._views.failure}
        return {**about, **status, "log_first": first, "history_to": done_to, **self._house.last_snapshot}

    async def check(self) -> list[str]:
        self._at.check()
        return self._at.shard.check()


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
