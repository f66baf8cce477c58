"""A shard in a process of its own: recovery, group commit, and what it owes other shards. No Ray.

Everything about the shard happens on one event loop, in a thread of this server's, one thing at a time; but for the
log, which a second thread writes to, syncs and reads. Writes that wait together travel to the log together: while one
group is being synced, the next one gathers.

It is called by a method's name (`METHODS`) and what `wire` makes of its arguments: over a Unix socket by who is on the
same node, and through the Ray actor that holds it by others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from millpond.feature_actors.allocators import give_back
from millpond.feature_actors.backfill import (
    AddedView,
    ViewsPort,
    apply_slices,
    forget_whole,
    note_whole,
    slices_of,
    whole_tables,
)
from millpond.feature_actors.calls import CallIngest, Calls
from millpond.feature_actors.durable import DurableShard, ShardFolder, VolatileLog
from millpond.feature_actors.eraser import Eraser
from millpond.feature_actors.errors import MillpondError, TooMany, Unavailable
from millpond.feature_actors.events import Events, Receipt
from millpond.feature_actors.layout import Layout, Table, compile_layout, identity_of
from millpond.feature_actors.log.history import delete_expired
from millpond.feature_actors.log.log import Durability, Log, LogFull
from millpond.feature_actors.log.record import HomeRecord, LogDamaged
from millpond.feature_actors.log.snapshot import (
    SnapshotWriter,
    begin_of,
    newest_snapshots,
    remove_old_snapshots,
)
from millpond.feature_actors.manifest import lock_shard, note_log, open_shard, shard_dir
from millpond.feature_actors.past import Past
from millpond.feature_actors.ports import all_of
from millpond.feature_actors.shard import Prepared, Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.shard_past import NoPast, ShardPast
from millpond.feature_actors.socket_calls import serve_socket, socket_path
from millpond.feature_actors.source import Source
from millpond.feature_actors.spread import BroughtBefore, batched, brought_before, lacking, note_brought, take_down
from millpond.feature_actors.tiles.memory import Control, Memory, MemoryFull
from millpond.feature_actors.tiles.store import SPARE_SLOT_WORDS
from millpond.feature_actors.tombstones import Tombstone, forget_secret, tombstone_of
from millpond.feature_actors.view import FeatureView
from millpond.feature_actors.wire import QuestionDecoder, decode_events, encode_answer, encode_receipt

__all__ = ["ScoreEraser", "ShardServer", "ShardSpec"]

Bools = npt.NDArray[np.bool_]

#: A smaller group is synced quicker than another thread is asked to do it.
_APPEND_HERE_BYTES = 64 << 10
#: What is owed for so long is delivered by its home; sooner if someone waits for it.
_DELIVER_AFTER_S, _DELIVER_SOON_S = 2.0, 0.2
#: How long a round of deliveries may fail before the next one is tried.
_DELIVER_AGAIN_S, _DELIVER_AT_ONCE = 0.5, 256
_TICK_S = 0.05
_RECOVER_AGAIN_S = 2.0
#: How long a duplicate waits until all shards have what it is a duplicate of.
_SETTLE_S_MAX = 5.0
_HOUSE_S, _HOUSE_AGAIN_S = 0.25, 5.0
#: How often it is asked whether views have come; how long a backfill rests for the time that it works.
_VIEWS_S, _REST = 0.2, 1.0
#: How long it is waited for another shard to say up to where events are to be brought to a key.
_CUT_S_MAX = 60.0
#: How long an offer waits to be taken.
OFFER_S_MAX = 60.0
#: How often it is looked what retention has to take, and by how much it may be late: history is deleted by whole days.
_EXPIRE_S, _DAY_MS = 3_600.0, 86_400_000

logger = logging.getLogger("millpond.shard")


class ScoreEraser(Protocol):
    """What removes logged scores, from the history and from who writes them."""

    def forget(self, name: str, field: str, hash: tuple[int, int], as_of_ms: int) -> int:
        """Remove the scores of the key whose field has a value of that hash; return how many there were in files.

        name: of what is asked for; asked again by the same it goes on with that. as_of_ms: what was read as of then or
        before is not logged any more either. Waits until that is so; raises `Unavailable` if somebody does not do so
        for too long, and says who. Raises `HistoryUnavailable`, `HistoryDamaged`.
        """


@dataclass(frozen=True)
class ShardSpec:
    """What every shard of a cluster is made from."""

    cluster_name: str
    namespace: str
    run_id: str
    data_dir: str
    sources: tuple[Source, ...]
    views: tuple[FeatureView, ...]
    shard_map: ShardMap
    hash_seed: int
    dedupe_horizon_ms: int
    memory_dir: str
    memory_bytes_max: int
    strings_max: int
    reclaim_margin_ms: int
    durability: Durability
    cluster_id: str
    history_uri: str | None
    history_part_bytes: int
    snapshot_bytes: int
    disk_free_bytes_min: int
    queue_bytes_max: int
    dedupe_horizon_ms_min: int = 3_600_000
    dedupe_bytes_max: int | None = None
    wall_clock: bool = False
    scores: ScoreEraser | None = None
    added_views: ViewsPort | None = None


@dataclass
class _Added:
    """How far a table that was added is: of its view the state, and up to which offset of which it has been read."""

    table: Table
    state: str
    read: int = 0
    of: int = 0
    why: str = ""
    history_since_ms: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("state", "read", "of", "why", "history_since_ms")}


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
        self._layout = self._layout_at_start = compile_layout(spec.sources, spec.views)
        self._decoder = QuestionDecoder(self._layout)
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
        self._shard = self._new_shard()
        self._durable: DurableShard | None = None
        #: Why it refuses everything, for now or for good; "" if it does not.
        self._refuses, self._code, self._retry_after_ms = "is about to replay its log", "recovering", 200
        self._progress = (0, 0)
        self._waiting: list[tuple[Prepared, asyncio.Future[Receipt]]] = []
        self._waiting_bytes = 0
        self._committer: asyncio.Task[None] | None = None
        self._deliver_soon = False
        #: Bytes of the log since the last snapshot was begun, and since the last part of the history.
        self._bytes_since_snapshot = self._bytes_since_history = 0
        self._last_snapshot: dict[str, Any] = {}
        #: Held while a snapshot is taken and the log truncated, or a view is backfilled, which needs all of the log.
        self._housekeeping = asyncio.Lock()
        #: By the identities of their views.
        self._added: dict[str, _Added] = {}
        #: Keys up to this number are known by all who send events, see `spread`; from which offsets on each has been.
        self._keys_required = 0
        self._cuts: dict[int, int] = {}
        self._brought: BroughtBefore = {}
        self._views_generation = -1
        #: Why it cannot take in views that came, "" if it can.
        self._views_failure = ""
        self._backfilling: asyncio.Task[None] | None = None
        #: Held while tombstones are written. By name, how far the shard is with those that wait.
        self._entombing = asyncio.Lock()
        self._forgetting: dict[tuple[str, str], str] = {}
        self._erasing: asyncio.Task[None] | None = None
        self._expired_s = -_EXPIRE_S
        self._snapshot_wanted = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._house = ThreadPoolExecutor(1, thread_name_prefix="house")
        self._history = ThreadPoolExecutor(1, thread_name_prefix="history")
        self._views = ThreadPoolExecutor(1, thread_name_prefix="views")
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
            self._durable, self._refuses = durable, ""
            await asyncio.gather(
                self._deliver_forever(),
                # Apart: a history that cannot be reached, or hangs, keeps no snapshot from being taken.
                self._keep_house(self._snapshot_is_due, self._take_snapshot),
                self._keep_house(self._history_is_due, self._write_history),
                self._follow_views(),
                self._keep_house(lambda: bool(self._shard.tombstones.waiting) and not self._refuses, self._erase),
                self._keep_house(self._retention_is_due, self._expire),
            )
        finally:
            server.close()
            path.unlink(missing_ok=True)

    async def _recovered_at_last(self) -> DurableShard:
        """Recover. What cannot be recovered is refused, not begun anew; what may be another time is tried again."""
        while True:
            try:
                durable: DurableShard | None = await self._in_thread(self._recovered)
                if durable is not None:
                    return durable
                break
            except (Unavailable, OSError) as error:  # a full disk, a history that is away
                logger.warning("shard %d cannot recover yet: %s", self._number, error)
                self._refuse(f"cannot recover yet: {error}", "unavailable", 5_000)
                await asyncio.sleep(_RECOVER_AGAIN_S)
                self._shard = self._new_shard()
            except Exception as error:
                logger.exception("shard %d cannot recover", self._number)
                self._refuse(f"cannot recover: {error}")
                break
        await asyncio.Event().wait()
        raise AssertionError

    def _recovered(self) -> DurableShard | None:
        """Return the shard with its log, replayed; None if there is no log, and it had been opened before."""
        self._views.submit(self._add_views).result()
        if self._spec.durability == "none":
            if self._opening.again:
                # It would answer with empty features, as if nobody had ever done anything. Readers of this node go on
                # with the memory that its predecessor left.
                self._refuse(
                    "was restarted and its features are gone; start the cluster anew and load the events again"
                )
                return None
            return DurableShard(self._layout, self._shard, VolatileLog())
        spec = self._spec
        durability: Any = spec.durability
        folder = ShardFolder(
            shard_dir(Path(spec.data_dir), self._number), spec.cluster_id, self._opening.epoch, spec.history_uri,
            forget_secret(Path(spec.data_dir)),
        )  # fmt: skip
        log = Log(folder.log, durability, spec.disk_free_bytes_min)
        sure_to = log.next if durability == "sync" else 0  # the rest may go with the power
        note_log(Path(spec.data_dir), self._number, spec.cluster_id, log.next, sure_to=sure_to)
        durable = DurableShard(self._layout, self._shard, log, folder)
        self._brought = brought_before(folder.path, log, self._layout.added_keys)
        note_brought(folder.path, self._brought, log.next)
        self._cuts = dict.fromkeys(range(1, self._keys_required + 1), log.next)
        if durable.history is not None and durable.history.done_to > log.next:
            raise LogDamaged(
                f"log: it ends at offset {log.next}, and the history goes to {durable.history.done_to}; restore both "
                "from one copy"
            )
        durable.recover(self._note_progress)
        if durable.history is not None:
            self._bytes_since_history = log.bytes_from(durable.history.done_to)
        if kept := newest_snapshots(folder.snapshots):
            self._last_snapshot = {"snapshot_bytes": kept[0].stat().st_size}
        self._bytes_since_snapshot = log.bytes_from(begin_of(kept[0]) if kept else log.first)
        return durable

    def _note_progress(self, at: int, end: int) -> None:
        self._progress = (at, end)
        self._refuse(f"is replaying its log (offset {at} of {end})", "recovering", 200)

    def close(self) -> None:
        """Stop serving, at once. What has been acknowledged is in the log."""
        self._life.cancel()
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.shutdown()
        self._house.shutdown()
        self._history.shutdown(wait=False, cancel_futures=True)
        self._views.shutdown()
        self._lock.release()

    def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # -- calls

    def called(self, method: str, arguments: Sequence[Any]) -> Future[Any]:
        """Call a method from another thread."""
        return asyncio.run_coroutine_threadsafe(self.call(method, arguments), self._loop)

    def call(self, method: str, arguments: Sequence[Any]) -> Coroutine[Any, Any, Any]:
        """Call a method by its name; on the loop of this server."""
        if method not in self.METHODS:
            raise Unavailable(f"shard {self._number} of {self._of} has no `{method}`; it is of another version")
        return getattr(self, method)(*arguments)  # type: ignore[no-any-return]

    def _refuse(self, why: str, code: str = "shard_lost", retry_after_ms: int = 10_000) -> None:
        self._code, self._retry_after_ms, self._refuses = code, retry_after_ms, why

    def _check(self) -> None:
        if self._refuses:
            retry = f"; retry after {self._retry_after_ms} ms" if self._code == "recovering" else ""
            raise Unavailable(
                f"shard {self._number} of {self._of} {self._refuses}{retry}",
                code=self._code,
                retry_after_ms=self._retry_after_ms,
            )

    # -- writes

    async def ingest(self, events: Any, settled: Sequence[int]) -> Any:
        self._check()
        self._shard.deliveries.settle(settled)
        self._check_queue()
        return encode_receipt(await self._written(self._shard.prepare_ingest(self._decoded(events))))

    async def offer(self, request: bytes, events: Any, settled: Sequence[int]) -> Any:
        self._check()
        self._shard.deliveries.settle(settled)
        self._check_queue()
        decoded = self._decoded(events)
        return encode_receipt(await self._written(self._shard.prepare_offer(request, decoded, time.monotonic())))

    def _decoded(self, wire: Any) -> Events:
        events = decode_events(wire, self._layout)
        if events.keys_known < self._keys_required:
            raise Unavailable(
                f"shard {self._number} of {self._of}: the process that sends these events has not heard of a key that "
                "came; send them again",
                code="stale_routes",
                retry_after_ms=200,
            )
        return events

    async def take(self, request: bytes, accepted: bytes, homes: Sequence[Sequence[int]]) -> None:
        self._check()
        records = [HomeRecord(*home) for home in homes]
        await self._written(self._shard.prepare_take(request, np.frombuffer(accepted, np.bool_), records))

    async def deliver(self, home: Sequence[int], events: Any) -> None:
        self._check()
        await self._written(self._shard.prepare_deliver(HomeRecord(*home), decode_events(events, self._layout)))

    async def settle(self, settled: Sequence[int], wait_before: int) -> None:
        """Return when what is owed of records before an offset has been applied everywhere."""
        self._check()
        deliveries, until_s = self._shard.deliveries, time.monotonic() + _SETTLE_S_MAX
        deliveries.settle(settled)
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
            self._check()

    def _written(self, prepared: Prepared) -> asyncio.Future[Receipt]:
        """Return what is done when what was prepared is in the log and applied, after all that was prepared before.
        What has nothing new waits for that, by which it may have been judged."""
        done: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._waiting.append((prepared, done))
        self._waiting_bytes += prepared.record_bytes
        if self._committer is None:
            self._committer = asyncio.ensure_future(self._commit_waiting())
        return done

    def _check_queue(self) -> None:
        """Refuse more events when too many wait for the log. What is owed or was offered already is not held up."""
        if self._waiting_bytes > self._spec.queue_bytes_max:
            raise TooMany(
                f"shard {self._number} of {self._of}: {self._waiting_bytes} bytes of events wait for its log; allowed "
                f"are {self._spec.queue_bytes_max}; send again later, or raise `queue_mb_max`",
                code="queue_full",
                retry_after_ms=1_000,
            )

    async def _commit_waiting(self) -> None:
        """Write what waits, group after group, until nothing waits."""
        durable = self._durable
        assert durable is not None
        try:
            while self._waiting:
                group, self._waiting, self._waiting_bytes = self._waiting, [], 0
                prepared = [p for p, _ in group]
                size = sum(p.record_bytes for p in prepared)
                offsets: list[int | None] = [None] * len(prepared)
                try:
                    if any(p.record is not None for p in prepared):
                        settled = self._shard.deliveries.settled(durable.log.next)
                        if size < _APPEND_HERE_BYTES:
                            offsets = durable.append(prepared, settled)
                        else:
                            offsets = await self._in_thread(durable.append, prepared, settled)
                except LogFull as full:
                    group, self._waiting = group + self._waiting, []
                    self._waiting_bytes = 0
                    for p, _ in reversed(group):
                        durable.undo(p)
                    for _, done in group:
                        if not done.done():  # its caller has not gone
                            done.set_exception(full)
                    continue
                self._bytes_since_snapshot += size
                self._bytes_since_history += size
                now_s = time.monotonic()
                receipts = [self._shard.commit(p, at, now_s) for p, at in zip(prepared, offsets, strict=True)]
                for p in prepared:
                    take_down(self._brought, p.record)
                for (_, done), receipt in zip(group, receipts, strict=True):
                    if not done.done():
                        done.set_result(receipt)
        except Exception:
            # What is on disk, or in the tiles, is not known: a new process finds out.
            logger.exception("shard %d failed while it wrote; its process ends and recovers", self._number)
            os._exit(70)
        finally:
            self._committer = None

    # -- what is owed

    async def _deliver_forever(self) -> None:
        """Bring to the other shards what they have not had of this one's records; forget offers that nobody takes."""
        again_s: dict[int, float] = {}
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            self._shard.drop_offers(now_s - OFFER_S_MAX)
            if self._refuses:  # it is stopping
                continue
            patience_s = _DELIVER_SOON_S if self._deliver_soon else _DELIVER_AFTER_S
            self._deliver_soon = False
            owed = self._shard.deliveries.owed
            again_s = {offset: at_s for offset, at_s in again_s.items() if offset in owed}
            due = [o for o, since_s in owed.items() if since_s < now_s - patience_s and again_s.get(o, 0) < now_s]
            for offset in due[:_DELIVER_AT_ONCE]:
                try:
                    if offset in owed:
                        await self._deliver(offset)
                except Exception as error:  # a shard that is away: what others are owed is delivered all the same
                    again_s[offset] = time.monotonic() + _DELIVER_AGAIN_S
                    if not isinstance(error, Unavailable):
                        logger.exception("shard %d cannot deliver its record %d", self._number, offset)

    async def _deliver(self, offset: int) -> None:
        assert self._durable is not None
        settled = self._shard.deliveries.settled(self._shard.next_offset)
        home, events, concerned = await self._in_thread(self._durable.owed_events, offset, settled)
        peers = CallIngest(self._peers())
        started: dict[int, asyncio.Future[Any]] = {}
        for shard in np.flatnonzero(concerned.any(axis=1)).tolist():
            part = events.of_rows(np.flatnonzero(concerned[shard]), events.arrivals[:0])
            if shard == self._number:
                started[shard] = self._written(self._shard.prepare_deliver(home, part))
            else:
                started[shard] = asyncio.ensure_future(peers.deliver(shard, home, part))
        await all_of(started)
        self._shard.deliveries.settle([offset])

    # -- views that come while it runs, see `backfill`

    def _add_views(self) -> None:
        """Have tables for all views that came while a cluster ran, before anything is recovered. What has been whole is
        to be whole again; without a log, nothing was before."""
        if (port := self._spec.added_views) is None:
            return
        self._views_generation, views = port.generation(), port.added()
        folder = shard_dir(Path(self._spec.data_dir), self._number)
        forget_whole(folder, {identity_of(one.view) for one in views})
        whole = whole_tables(folder)
        failed = {identity_of(one.view) for one in views if one.state == "failed"}
        layout = self._layout_at_start.extended([one.view for one in views], failed)
        self._added = {}
        self._keys_required = _required(layout, views)
        for table, one in zip(self._shard.extend(layout), views, strict=True):
            self._added[table.added] = _Added(table, one.state)
            was_whole = one.state == "live" or table.added in whole or self._spec.durability == "none"
            if was_whole and one.state != "failed":
                self._shard.keep_up(table)
                self._added[table.added].state = "whole"
        self._layout, self._decoder = layout, QuestionDecoder(layout)

    async def _follow_views(self) -> None:
        """Take in views that come, and backfill those that are not whole, for ever."""
        if (port := self._spec.added_views) is None:
            return
        loop = asyncio.get_running_loop()
        while True:
            try:
                generation = await loop.run_in_executor(self._views, port.generation)
                if generation != self._views_generation and not self._refuses:
                    views = await loop.run_in_executor(self._views, port.added)
                    new = views[len(self._added) :]
                    layout = self._layout.extended([one.view for one in new])
                    for table, one in zip(self._shard.extend(layout), new, strict=True):
                        self._added[table.added] = _Added(table, one.state)
                    self._layout, self._decoder = layout, QuestionDecoder(layout)
                    await self._follow_states(views)
                    self._views_generation, self._views_failure = generation, ""
                waiting = [
                    one
                    for one in self._added.values()
                    if one.state == "backfilling" and one.table.key_number <= self._keys_required
                ]
                if waiting and not self._refuses:
                    self._backfilling = asyncio.ensure_future(self._backfill(waiting))
                    await asyncio.wait([self._backfilling])
            except Exception as error:  # a registry that cannot be read now
                logger.exception("shard %d cannot follow the views", self._number)
                self._views_failure = error.message if isinstance(error, MillpondError) else repr(error)
                await asyncio.sleep(_HOUSE_AGAIN_S)
            await asyncio.sleep(_VIEWS_S)

    async def _follow_states(self, views: Sequence[AddedView]) -> None:
        """Take down who knows of keys that came by now."""
        for mine, one in zip(self._added.values(), views, strict=True):
            if mine.state in ("added", "routing"):
                mine.state = one.state
        self._keys_required = max(self._keys_required, _required(self._layout, views))
        if new := range(len(self._cuts) + 1, self._keys_required + 1):
            await self._written(Prepared(0))  # what was taken of others gets into the log
            self._cuts |= dict.fromkeys(new, self._shard.next_offset)

    async def cut(self, key_number: int) -> int:
        """Return an offset: in this shard's log all from there on is of who knows a key. Raises `Unavailable`."""
        self._check()
        if key_number not in self._cuts:
            raise Unavailable(
                f"shard {self._number} of {self._of} has not heard yet that all know of key {key_number}",
                code="key_unknown", retry_after_ms=200,
            )  # fmt: skip
        return self._cuts[key_number]

    async def _bring(self, key_number: int, added: Sequence[_Added]) -> None:
        """Write to the log what is of this shard by a key that came, and lies in the logs of others, or here, where
        nobody had meant it for that key. added: the views that wait for it."""
        key, spec, loop = self._layout.added_keys[key_number - 1], self._spec, asyncio.get_running_loop()
        past, of = Past(Path(spec.data_dir), spec.history_uri), self._brought.setdefault(key, {})
        await self._note_brought()
        for home in range(self._of):
            cut = await self._cut_of(home, key_number)
            if of.get(home, 0) >= cut:
                continue
            some = batched(lacking(past.home_records(home, of.get(home, 0), cut), home, key))
            while lacks := await loop.run_in_executor(self._views, next, some, None):
                begun = time.perf_counter()
                prepared = [self._shard.prepare_brought(one.record, key[1], one.brought) for one in lacks]
                await asyncio.gather(*(self._written(one) for one in prepared if one.record is not None))
                for view in added:
                    view.read, view.of = lacks[-1].brought.before, cut
                await asyncio.sleep((time.perf_counter() - begun) * _REST)
            of[home] = cut
        await self._note_brought()

    async def _note_brought(self) -> None:
        """Called where nothing is being brought."""
        folder = shard_dir(Path(self._spec.data_dir), self._number)
        loop, end = asyncio.get_running_loop(), self._shard.next_offset
        await loop.run_in_executor(self._views, note_brought, folder, self._brought, end)

    async def _cut_of(self, home: int, key_number: int) -> int:
        until_s = time.monotonic() + _CUT_S_MAX
        while True:
            try:
                if home == self._number:
                    return await self.cut(key_number)
                return int(await self._peers().call(home, "cut", key_number))
            except Unavailable as error:  # it will have heard, or is being restarted
                if time.monotonic() > until_s:
                    raise Unavailable(
                        f"shard {home} of {self._of} has not said within {_CUT_S_MAX:g} s up to where events are to be "
                        f"brought to key {key_number}: {error.message}"
                    ) from None
                await asyncio.sleep(_VIEWS_S)

    async def _backfill(self, added: Sequence[_Added]) -> None:
        """Bring tables to where the others are. What cannot be for now is said, and tried again after a while; what
        cannot be at all is said to have failed, and events pass it by."""
        tables = [one.table for one in added]
        try:
            async with self._housekeeping:
                try:
                    await self._backfill_tables(added, tables)
                except Exception:
                    for table in tables:
                        for _ in self._shard.give_up(table):
                            await asyncio.sleep(0)
                    raise
        except Exception as error:
            why = error.message if isinstance(error, MillpondError) else f"{type(error).__name__}: {error}"
            logger.warning("shard %d cannot backfill: %s", self._number, why, exc_info=error)
            # A disk that is full, a history or a shard that is away; with tiles it would fill the memory once more.
            again = isinstance(error, Unavailable) and not isinstance(error, NoPast | MemoryFull)
            for one in added:
                one.why = f"{why}; it is tried again" if again else why
                one.state = one.state if again else "failed"
            if again:
                await asyncio.sleep(_HOUSE_AGAIN_S)

    async def _backfill_tables(self, added: Sequence[_Added], tables: Sequence[Table]) -> None:
        durable, begun, loop = self._durable, time.monotonic(), asyncio.get_running_loop()
        assert durable is not None
        if not isinstance(durable.log, Log):
            raise NoPast('without a log (`durability = "none"`) nothing is known of what was before the view')
        for number in sorted({table.key_number for table in tables} - {0}):
            await self._bring(number, added)
        past = durable.past()
        # 1. All that is in history and log by now.
        await self._read_on(past, added)
        # 2. From here on events are prepared for the tables, too; what was prepared before gets into the log.
        for table in tables:
            self._shard.route_to(table)
        await self._written(Prepared(0))
        (end,) = {self._shard.queue_from_here(table) for table in tables}
        # 3. What got into the log meanwhile, then what queued.
        await self._read_on(past, added, end)
        folder = shard_dir(Path(self._spec.data_dir), self._number)
        for table in tables:
            while not self._shard.catch_up_queued(table):
                await asyncio.sleep(0)
        await loop.run_in_executor(self._views, note_whole, folder, tables)
        self._snapshot_wanted = True
        for one in added:
            one.state, one.why = "whole", ""
        logger.info("shard %d: %d views up to %d in %.1f s", self._number, len(tables), end, time.monotonic() - begun)

    async def _read_on(self, past: ShardPast, added: Sequence[_Added], until: int | None = None) -> None:
        """Apply what is in the past to tables, slice by slice; a thread reads the next one when this one is done."""
        loop, tables = asyncio.get_running_loop(), [one.table for one in added]
        slices = slices_of(past.read_on(until))
        try:
            while True:
                begun = time.perf_counter()
                if not (some := await loop.run_in_executor(self._views, next, slices, None)):
                    break
                apply_slices(self._shard, tables, some)
                for one in added:
                    one.read, one.of = some[-1].offset, past.end
                # Scores and events are what the processors are for.
                await asyncio.sleep((time.perf_counter() - begun) * _REST)
        finally:
            await loop.run_in_executor(self._views, slices.close)  # type: ignore[attr-defined]
        await loop.run_in_executor(self._views, past.note_expired, {table.source.name for table in tables})
        for one in added:
            one.read = one.of = past.end
            one.history_since_ms = past.history_since.get(one.table.source.name)

    # -- entities that are to be forgotten, see `eraser`

    async def forget(self, field: str, value: int | str, at_ms: int) -> dict[str, Any]:
        """Have a tombstone of an entity, or that which waits already; return it for the other shards. What it asks for
        is done in the background, on all of them."""
        self._check_keeps()
        tombstone = tombstone_of(forget_secret(Path(self._spec.data_dir)), field, value, at_ms)
        async with self._entombing:
            known = self._shard.tombstones.get(tombstone.name)
            if known is not None and not known.done:
                tombstone = known
            else:
                await self._entomb(tombstone)
        await self._written(Prepared(0))
        wire: dict[str, Any] = msgspec.to_builtins(tombstone)
        return wire

    async def entomb(self, wire: Mapping[str, Any]) -> None:
        """Have a tombstone that another shard has."""
        self._check_keeps()
        tombstone = msgspec.convert(wire, Tombstone)
        async with self._entombing:
            known = self._shard.tombstones.get(tombstone.name)
            again = known is not None and known.done and known.token != tombstone.token
            if known is None or known.at_ms < tombstone.at_ms or (again and known.at_ms == tombstone.at_ms):
                await self._entomb(tombstone)
        # What was prepared before gets into the log before it is looked through.
        await self._written(Prepared(0))

    async def _entomb(self, tombstone: Tombstone) -> None:
        """From now on nothing that is before the tombstone gets into the log but with tokens."""
        loop, tombstones = asyncio.get_running_loop(), self._shard.tombstones
        await loop.run_in_executor(self._house, tombstones.write, [tombstone])
        self._shard.forget([tombstone])

    def _check_keeps(self) -> None:
        self._check()
        if self._durable is None or not isinstance(self._durable.log, Log):
            raise Unavailable(
                f'shard {self._number} of {self._of} keeps nothing on disk (`durability = "none"`), so nothing is '
                "known of what was; stop the cluster, and everything is forgotten"
            )

    async def forgotten(self, field: str, value: int | str) -> dict[str, Any] | None:
        """Return how far the shard is with an entity, None if it has no tombstone of it."""
        return await self.entombed(field, tombstone_of(forget_secret(Path(self._spec.data_dir)), field, value, 0).mark)

    async def entombed(self, field: str, mark: str) -> dict[str, Any] | None:
        """Return the same of an entity of which the mark is known."""
        self._check()
        known = self._shard.tombstones.get((field, mark))
        if known is None:
            return None
        state = "done" if known.done else self._forgetting.get(known.name, "waiting")
        return {"shard": self._number, "state": state, "at_ms": known.at_ms, "removed": known.removed or {}}

    async def _erase(self, durable: DurableShard) -> None:
        self._erasing = asyncio.ensure_future(self._erase_waiting(durable))
        await asyncio.wait([self._erasing])
        if not self._erasing.cancelled():
            self._erasing.result()

    async def _erase_waiting(self, durable: DurableShard) -> None:
        """Do what tombstones ask for: the steps of `eraser`, each where it belongs. Broken off it begins anew."""
        loop, begun = asyncio.get_running_loop(), time.monotonic()
        waiting, others = self._shard.tombstones.waiting, [n for n in range(self._of) if n != self._number]
        # Whoever asked for it may have gone: every shard sees to it that all have it.
        wires, peers = [msgspec.to_builtins(one) for one in waiting], self._peers()
        await all_of({(n, i): peers.call(n, "entomb", w) for n in others for i, w in enumerate(wires)})
        await self._written(Prepared(0))

        def say(state: str) -> None:
            self._forgetting = {one.name: state for one in waiting}

        async with self._housekeeping:
            eraser = Eraser(durable)
            say("reading its past")
            await loop.run_in_executor(self._views, eraser.learn)
            eraser.remove()
            say("taking a snapshot")
            await self._snapshot_and_truncate(durable)
            await loop.run_in_executor(self._house, eraser.remove_snapshots)
            say("rewriting its log")
            while await self._in_thread(eraser.rewrite_log):
                await asyncio.sleep(0.001)
            say("rewriting its history")
            await loop.run_in_executor(self._history, eraser.rewrite_history)
            say("making rows of others anew")
            if await loop.run_in_executor(self._views, eraser.make_beside):
                eraser.put_in_place()
                await self._snapshot_and_truncate(durable)
                await loop.run_in_executor(self._house, eraser.remove_snapshots)
            say("scrubbing its log")
            while not await self._in_thread(eraser.scrub):
                await asyncio.sleep(_TICK_S)
        if self._number == 0 and self._spec.scores is not None:
            say("removing logged scores")
            await self._erase_scores(waiting, others, eraser, self._spec.scores)
        async with self._entombing:
            await loop.run_in_executor(self._house, eraser.finish, self._now_ms())
        logger.info("shard %d: %d entities forgotten in %.1f s", self._number, len(waiting), time.monotonic() - begun)

    async def _erase_scores(
        self, waiting: Sequence[Tombstone], others: Sequence[int], eraser: Eraser, scores: ScoreEraser
    ) -> None:
        """Remove the logged scores, when no shard has anything any more by which one could be made."""
        loop, peers = asyncio.get_running_loop(), self._peers()
        for one in waiting:
            name, as_of_ms = secrets.token_hex(8), 0
            while True:
                try:
                    for n in others:
                        while (await peers.call(n, "entombed", one.field, one.mark))["state"] != "done":
                            await asyncio.sleep(_TICK_S)
                    assert one.hash is not None
                    as_of_ms = as_of_ms or max(self._now_ms(), one.at_ms)
                    # In a thread of its own: it waits for whoever writes them.
                    n = await loop.run_in_executor(None, scores.forget, name, one.field, one.hash, as_of_ms)
                    break
                except Unavailable as error:  # all else is done, and what was counted would be lost
                    logger.warning("shard %d: %s", self._number, error)
                    self._forgetting[one.name] = f"removing logged scores ({error.message}; it is tried again)"
                    await asyncio.sleep(_HOUSE_AGAIN_S)
            eraser.removed[one]["scores"] += n

    def _now_ms(self) -> int:
        """Return the time of the cluster's clock."""
        newest_ms = self._shard.status().newest_arrival_ms or 0
        return max(newest_ms, time.time_ns() // 1_000_000) if self._spec.wall_clock else newest_ms

    # -- retention

    def _retention_is_due(self) -> bool:
        return (
            self._spec.history_uri is not None
            and any(source.retention_ms is not None for source in self._spec.sources)
            and time.monotonic() - self._expired_s >= _EXPIRE_S
        )

    async def _expire(self, durable: DurableShard) -> None:
        """Delete of the history what is older than its source keeps it. What has been in the log for a day goes to the
        history, and leaves the log with the next snapshots, that it can be deleted at all."""
        uri, sources, now_ms = self._spec.history_uri, self._spec.sources, self._now_ms()
        assert durable.history is not None
        assert uri is not None
        if await self._in_thread(durable.oldest_ms, durable.history.done_to) <= now_ms - _DAY_MS:
            await self._write_history(durable)
        if self._bytes_since_snapshot and await self._in_thread(durable.oldest_ms, 0) <= now_ms - _DAY_MS:
            self._snapshot_wanted = True
        await asyncio.get_running_loop().run_in_executor(self._history, delete_expired, uri, sources, now_ms)
        self._expired_s = time.monotonic()

    # -- snapshots, history, truncation

    async def _keep_house(self, is_due: Callable[[], bool], keep: Callable[[DurableShard], Awaitable[None]]) -> None:
        """Take snapshots, or write history, whenever it is due. What fails is tried again; events go on."""
        assert self._durable is not None
        if not isinstance(self._durable.log, Log):
            return
        while True:
            await asyncio.sleep(_HOUSE_S)
            try:
                if is_due():
                    await keep(self._durable)
            except MillpondError as error:  # a full disk, a history that is away
                logger.warning("shard %d: %s", self._number, error)
                await asyncio.sleep(_HOUSE_AGAIN_S)
            except Exception:
                logger.exception("shard %d cannot keep house", self._number)
                await asyncio.sleep(_HOUSE_AGAIN_S)

    def _snapshot_is_due(self) -> bool:
        # A large snapshot is worth a longer replay: it is not written again for every little.
        least = max(self._spec.snapshot_bytes, int(self._last_snapshot.get("snapshot_bytes", 0)))
        return self._snapshot_wanted or self._bytes_since_snapshot >= least

    def _history_is_due(self) -> bool:
        return self._spec.history_uri is not None and self._bytes_since_history >= self._spec.history_part_bytes

    async def _write_history(self, durable: DurableShard) -> None:
        assert self._spec.history_uri is not None
        begun, end, undone = time.monotonic(), self._shard.next_offset, durable.undone
        size, self._bytes_since_history = self._bytes_since_history, 0
        loop, deliveries = asyncio.get_running_loop(), self._shard.deliveries.state()
        try:
            await self._written(Prepared(0))  # as for a snapshot: what the deliveries have is to be in the log
            if durable.undone != undone:
                raise Unavailable("a part of the history is begun again: something was not written to the log")
            await loop.run_in_executor(self._history, durable.write_history, end, deliveries)
            self._expired_s = -_EXPIRE_S  # there may be something that is older than it is kept
            await loop.run_in_executor(self._history, give_back)
        except BaseException:
            self._bytes_since_history += size
            raise
        logger.info("shard %d: history up to %d in %.1f s", self._number, end, time.monotonic() - begun)

    async def _take_snapshot(self, durable: DurableShard) -> None:
        """Take a snapshot while events go on, step by step; then truncate the log."""
        async with self._housekeeping:
            await self._snapshot_and_truncate(durable)

    async def _snapshot_and_truncate(self, durable: DurableShard) -> None:
        begun, undone, before = time.monotonic(), durable.undone, self._bytes_since_snapshot
        loop, self._bytes_since_snapshot = asyncio.get_running_loop(), 0
        wanted, self._snapshot_wanted = self._snapshot_wanted, False
        begin, longest_s = self._shard.next_offset, 0.0
        writer = SnapshotWriter(shard_dir(Path(self._spec.data_dir), self._number) / "snapshots")
        try:
            chunks = durable.snapshot_chunks()
            while True:
                step_s = time.perf_counter()
                chunk = next(chunks, None)
                longest_s = max(longest_s, time.perf_counter() - step_s)
                if chunk is None:
                    break
                await loop.run_in_executor(self._house, writer.write, chunk)
            # What had been prepared by the last step is to be in the log before the snapshot gets its name: it may have
            # ids of it.
            await self._written(Prepared(0))
            if durable.undone != undone:
                raise Unavailable("a snapshot is begun again: something in it was not written to the log")
            path = await loop.run_in_executor(self._house, writer.finish)
        except BaseException:
            self._bytes_since_snapshot += before
            self._snapshot_wanted = self._snapshot_wanted or wanted
            await loop.run_in_executor(self._house, writer.abandon)
            raise
        self._last_snapshot = {
            "snapshot_offset": begin,
            "snapshot_s": round(time.monotonic() - begun, 3),
            "snapshot_step_ms": round(longest_s * 1000, 3),
            "snapshot_bytes": path.stat().st_size,
        }
        await loop.run_in_executor(self._house, remove_old_snapshots, path.parent)
        await loop.run_in_executor(self._house, give_back)
        await self._truncate(durable)

    async def _truncate(self, durable: DurableShard) -> None:
        assert isinstance(durable.log, Log)
        needed = [*self._shard.offers, *self._shard.deliveries.owed]
        before = await asyncio.get_running_loop().run_in_executor(self._house, durable.truncatable, needed)
        await self._note_brought()  # also of what was broken off
        while await self._in_thread(durable.log.truncate, before):
            await asyncio.sleep(0.001)

    async def snapshot(self) -> dict[str, Any]:
        """Take a snapshot now; return what there is to say of it."""
        self._check()
        assert self._durable is not None
        if isinstance(self._durable.log, Log):
            await self._take_snapshot(self._durable)
        return self._last_snapshot

    async def drain(self) -> None:
        """Take nothing more, finish what is under way, and take a snapshot: a start after it replays nothing."""
        durable = self._durable
        if durable is None:
            return
        self._refuse("is stopping", "stopping", 5_000)
        for broken_off in (self._backfilling, self._erasing):  # the next start begins it anew
            if broken_off is not None:
                broken_off.cancel()
                await asyncio.wait([broken_off])
        if not isinstance(durable.log, Log):
            return
        async with self._housekeeping:
            await self._written(Prepared(0))
            kept = newest_snapshots(shard_dir(Path(self._spec.data_dir), self._number) / "snapshots")
            if not kept or begin_of(kept[0]) < self._shard.next_offset or self._snapshot_wanted:
                await self._snapshot_and_truncate(durable)

    # -- the rest

    async def ready(self) -> None:
        """Return when it has recovered. Raises `Unavailable` if it cannot."""
        while self._code == "recovering" and self._refuses:
            await asyncio.sleep(_TICK_S / 10)
        self._check()

    async def read(self, question: Any) -> Any:
        self._check()
        return encode_answer(self._shard.read(self._decoder.decode(question)))

    async def status(self) -> dict[str, Any]:
        """Return what it holds, or how far its recovery has come."""
        state = "ready" if not self._refuses else self._code
        at, end = self._progress
        about = {
            "shard": self._number,
            "state": state,
            "epoch": self._opening.epoch,
            "replayed": at,
            "log_end": max(end, self._shard.next_offset),
        }
        if self._refuses:
            return {**about, "why": self._refuses}
        log = self._durable.log if self._durable is not None else None
        first = log.first if isinstance(log, Log) else 0
        done_to = self._durable.history.done_to if self._durable is not None and self._durable.history else 0
        status = asdict(self._shard.status())
        added = {name: one.as_json() for name, one in self._added.items()}
        about |= {"views": added, "views_failure": self._views_failure}
        return {**about, **status, "log_first": first, "history_to": done_to, **self._last_snapshot}

    async def check(self) -> list[str]:
        self._check()
        return self._shard.check()


def _required(layout: Layout, views: Sequence[AddedView]) -> int:
    """Return up to which number all who send events know the keys that came: the first view of a key says it."""
    states = {identity_of(one.view): one.state for one in views}
    known = ("backfilling", "live", "failed")
    return max(
        (t.key_number for t in layout.tables if t.added and t.routed and states.get(t.added) in known), default=0
    )


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
