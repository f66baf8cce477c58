"""The workshop: a shard that runs, its threads and the queue to its log: what all who work on it share.

Everything about the shard happens on one event loop, one thing at a time; but for the log, which a thread writes to,
syncs and reads, and long work, of which the steps in between are done in threads (see `steps`). Writes that wait
together travel to the log together: while one group is being synced, the next one gathers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, get_args

from millpond.feature_actors.durable import DurableShard
from millpond.feature_actors.errors import TooMany, Unavailable
from millpond.feature_actors.events import Receipt
from millpond.feature_actors.log.log import LogFull
from millpond.feature_actors.manifest import shard_dir
from millpond.feature_actors.shard import Prepared, Shard
from millpond.feature_actors.shard_spec import ShardSpec
from millpond.feature_actors.spread import BroughtBefore, take_down
from millpond.feature_actors.steps import Cut, In, Rest, Step, Steps, Where, Write

__all__ = ["Workshop"]

T = TypeVar("T")

#: A smaller group is synced quicker than another thread is asked to do it.
_APPEND_HERE_BYTES = 64 << 10
#: How long work rests for the time that it takes.
_REST = 1.0

logger = logging.getLogger("millpond.shard")


class Workshop:
    """Of shard `number`; all of it is used on its event loop. shard: empty, to be recovered."""

    def __init__(self, spec: ShardSpec, number: int, shard: Shard) -> None:
        self.spec, self.number, self.of = spec, number, spec.shard_map.n_shards
        self.folder = shard_dir(Path(spec.data_dir), number)
        self.shard = shard
        #: With its log, when it has been recovered.
        self.durable: DurableShard | None = None
        #: Why it refuses everything, for now or for good; "" if it does not.
        self.refuses, self.code, self.retry_after_ms = "is about to replay its log", "recovering", 200
        #: What has been brought to it by keys that came, see `spread`.
        self.brought: BroughtBefore = {}
        self.waiting: list[tuple[Prepared, asyncio.Future[Receipt]]] = []
        self.waiting_bytes = 0
        self._committer: asyncio.Task[None] | None = None
        #: Bytes of the log since the last snapshot was begun, and since the last part of the history.
        self.bytes_since_snapshot = self.bytes_since_history = 0
        self.snapshot_wanted = False
        #: Held while a snapshot is taken and the log truncated, or a view is backfilled, which needs all of the log.
        self.housekeeping = asyncio.Lock()
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in get_args(Where)}

    def close(self) -> None:
        """What is under way in threads ends first, but for the history, which may hang."""
        for name, thread in self._threads.items():
            thread.shutdown(wait=name != "history", cancel_futures=name == "history")

    # -- refusing

    def refuse(self, why: str, code: str = "shard_lost", retry_after_ms: int = 10_000) -> None:
        self.code, self.retry_after_ms, self.refuses = code, retry_after_ms, why

    def check(self) -> None:
        if self.refuses:
            retry = f"; retry after {self.retry_after_ms} ms" if self.code == "recovering" else ""
            raise Unavailable(
                f"shard {self.number} of {self.of} {self.refuses}{retry}",
                code=self.code,
                retry_after_ms=self.retry_after_ms,
            )

    # -- writes

    def written(self, prepared: Prepared) -> asyncio.Future[Receipt]:
        """Return what is done when what was prepared is in the log and applied, after all that was prepared before.
        What has nothing new waits for that, by which it may have been judged."""
        done: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self.waiting.append((prepared, done))
        self.waiting_bytes += prepared.record_bytes
        if self._committer is None:
            self._committer = asyncio.ensure_future(self._commit_waiting())
        return done

    def check_queue(self) -> None:
        """Refuse more events when too many wait for the log. What is owed or was offered already is not held up."""
        if self.waiting_bytes > self.spec.queue_bytes_max:
            raise TooMany(
                f"shard {self.number} of {self.of}: {self.waiting_bytes} bytes of events wait for its log; allowed "
                f"are {self.spec.queue_bytes_max}; send again later, or raise `queue_mb_max`",
                code="queue_full",
                retry_after_ms=1_000,
            )

    async def _commit_waiting(self) -> None:
        """Write what waits, group after group, until nothing waits."""
        durable = self.durable
        assert durable is not None
        try:
            while self.waiting:
                group, self.waiting, self.waiting_bytes = self.waiting, [], 0
                prepared = [p for p, _ in group]
                size = sum(p.record_bytes for p in prepared)
                offsets: list[int | None] = [None] * len(prepared)
                try:
                    if any(p.record is not None for p in prepared):
                        settled = self.shard.deliveries.settled(durable.log.next)
                        if size < _APPEND_HERE_BYTES:
                            offsets = durable.append(prepared, settled)
                        else:
                            offsets = await self.in_thread("log", durable.append, prepared, settled)
                except LogFull as full:
                    group, self.waiting = group + self.waiting, []
                    self.waiting_bytes = 0
                    for p, _ in reversed(group):
                        durable.undo(p)
                    for _, done in group:
                        if not done.done():  # its caller has not gone
                            done.set_exception(full)
                    continue
                self.bytes_since_snapshot += size
                self.bytes_since_history += size
                now_s = time.monotonic()
                receipts = [self.shard.commit(p, at, now_s) for p, at in zip(prepared, offsets, strict=True)]
                for p in prepared:
                    take_down(self.brought, p.record)
                for (_, done), receipt in zip(group, receipts, strict=True):
                    if not done.done():
                        done.set_result(receipt)
        except Exception:
            # What is on disk, or in the tiles, is not known: a new process finds out.
            logger.exception("shard %d failed while it wrote; its process ends and recovers", self.number)
            os._exit(70)
        finally:
            self._committer = None

    # -- work

    def in_thread(self, where: Where, do: Callable[..., Any], *arguments: Any) -> Any:
        return asyncio.get_running_loop().run_in_executor(self._threads[where], do, *arguments)

    def call_in_thread(self, where: Where, do: Callable[[], T]) -> T:
        """Call it in a thread from one that may wait, such as that of the log."""
        return self._threads[where].submit(do).result()

    async def take(self, steps: Steps[T], cut_of: Callable[[int, int], Awaitable[int]] | None = None) -> T:
        """Take all steps of some work; return what comes of it. cut_of: answers `Cut`. Raises what they raise."""
        answer: Any = None
        try:
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as stop:
                    return stop.value  # type: ignore[no-any-return]
                answer = await self._taken(step, cut_of)
        finally:
            steps.close()

    async def _taken(self, step: Step, cut_of: Callable[[int, int], Awaitable[int]] | None) -> Any:
        match step:
            case In(where, do):
                called = self.in_thread(where, do)
                try:
                    return await asyncio.shield(called)
                except asyncio.CancelledError:
                    await asyncio.wait([called])  # what it works with is to be left alone before it is put away
                    raise
            case Write(prepared):
                await asyncio.gather(*(self.written(one) for one in prepared or [Prepared(0)]))
            case Cut(home, key_number):
                assert cut_of is not None
                return await cut_of(home, key_number)
            case Rest(work_s):
                await asyncio.sleep(work_s * _REST)
        return None

    def now_ms(self) -> int:
        """Return the time of the cluster's clock."""
        newest_ms = self.shard.status().newest_arrival_ms or 0
        return max(newest_ms, time.time_ns() // 1_000_000) if self.spec.wall_clock else newest_ms
