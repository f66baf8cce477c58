"""Housekeeping of a shard that runs: snapshots, history, retention, memory that is free, each whenever it is due.

Events go on meanwhile; what fails is tried again. The steps themselves are those of `durable`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from millpond.feature_actors.allocators import give_back
from millpond.feature_actors.durable import DurableShard
from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.log.history import delete_expired
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.snapshot import begin_of, newest_snapshots
from millpond.feature_actors.shard import Prepared
from millpond.feature_actors.spread import note_brought
from millpond.feature_actors.steps import Steps
from millpond.feature_actors.workshop import Workshop

__all__ = ["Housekeeper"]

_HOUSE_S, _HOUSE_AGAIN_S = 0.25, 5.0
#: How often memory that is free is given back.
_GIVE_BACK_S = 30.0
#: How often it is looked what retention has to take, and by how much it may be late: history is deleted by whole days.
_EXPIRE_S, _DAY_MS = 3_600.0, 86_400_000
#: The shard that deletes.
_DELETES = 0

logger = logging.getLogger("millpond.shard")


class Housekeeper:
    """Keep house in a shard's workshop."""

    def __init__(self, workshop: Workshop) -> None:
        self._at = workshop
        #: What there is to say of it.
        self.last_snapshot: dict[str, Any] = {}
        self._expired_s = -_EXPIRE_S
        self._gave_back_s = time.monotonic()

    async def keep(self) -> None:
        """Do what is due, for ever. Apart: a history that cannot be reached, or hangs, keeps no snapshot from being
        taken."""
        assert self._at.durable is not None
        work = [self.keep_at(self._memory_is_due, self._give_back)]
        if isinstance(self._at.durable.log, Log):
            work += [
                self.keep_at(self._snapshot_is_due, self._take_snapshot),
                self.keep_at(self._history_is_due, self._write_history),
                self.keep_at(self._retention_is_due, self._expire),
            ]
        await asyncio.gather(*work)

    async def keep_at(self, is_due: Callable[[], bool], keep: Callable[[DurableShard], Awaitable[None]]) -> None:
        """Do something whenever it is due, for ever."""
        assert self._at.durable is not None
        while True:
            await asyncio.sleep(_HOUSE_S)
            try:
                if is_due():
                    await keep(self._at.durable)
            except MillpondError as error:  # a full disk, a history that is away
                logger.warning("shard %d: %s", self._at.number, error)
                await asyncio.sleep(_HOUSE_AGAIN_S)
            except Exception:
                logger.exception("shard %d cannot keep house", self._at.number)
                await asyncio.sleep(_HOUSE_AGAIN_S)

    # -- memory

    def _memory_is_due(self) -> bool:
        return time.monotonic() - self._gave_back_s >= _GIVE_BACK_S

    async def _give_back(self, durable: DurableShard) -> None:
        """Snapshots and parts of the history give back what they took when they are done; events take and free little,
        but all the time, and other large work, such as filling a view that was added, is rare."""
        self._gave_back_s = time.monotonic()
        await self._at.in_thread("house", give_back)

    # -- snapshots

    def _snapshot_is_due(self) -> bool:
        # A large snapshot is worth a longer replay: it is not written again for every little.
        least = max(self._at.spec.snapshot_bytes, int(self.last_snapshot.get("snapshot_bytes", 0)))
        return self._at.snapshot_wanted or self._at.bytes_since_snapshot >= least

    async def _take_snapshot(self, durable: DurableShard) -> None:
        async with self._at.housekeeping:
            await self.snapshot_and_truncate(durable)

    async def snapshot_and_truncate(self, durable: DurableShard) -> None:
        """Take a snapshot while events go on, step by step; then truncate the log. The lock is held."""
        await self._at.take(self.snapshot_steps(durable))

    def snapshot_steps(self, durable: DurableShard) -> Steps[None]:
        at = self._at
        before, at.bytes_since_snapshot = at.bytes_since_snapshot, 0
        wanted, at.snapshot_wanted = at.snapshot_wanted, False
        try:
            self.last_snapshot = yield from durable.snapshot_steps(self._note_brought)
        except BaseException:
            at.bytes_since_snapshot += before
            at.snapshot_wanted = at.snapshot_wanted or wanted
            raise

    def _note_brought(self) -> None:
        """Nothing is being brought meanwhile; something may have been broken off."""
        note_brought(self._at.folder, self._at.brought, self._at.shard.next_offset)

    async def snapshot(self) -> dict[str, Any]:
        """Take a snapshot now; return what there is to say of it."""
        assert self._at.durable is not None
        if isinstance(self._at.durable.log, Log):
            await self._take_snapshot(self._at.durable)
        return self.last_snapshot

    async def leave(self, durable: DurableShard) -> None:
        """Take a snapshot of all that there is, unless there is one."""
        async with self._at.housekeeping:
            await self._at.written(Prepared(0))
            kept = newest_snapshots(self._at.folder / "snapshots")
            if not kept or begin_of(kept[0]) < self._at.shard.next_offset or self._at.snapshot_wanted:
                await self.snapshot_and_truncate(durable)

    # -- history

    def _history_is_due(self) -> bool:
        return (
            self._at.spec.history_uri is not None and self._at.bytes_since_history >= self._at.spec.history_part_bytes
        )

    async def _write_history(self, durable: DurableShard) -> None:
        assert self._at.spec.history_uri is not None
        begun, end, undone = time.monotonic(), self._at.shard.next_offset, durable.undone
        size, self._at.bytes_since_history = self._at.bytes_since_history, 0
        deliveries, offers = self._at.shard.deliveries.state(), set(self._at.shard.offers)
        try:
            await self._at.written(Prepared(0))  # as for a snapshot: what the deliveries have is to be in the log
            if durable.undone != undone:
                raise Unavailable("a part of the history is begun again: something was not written to the log")
            await self._at.in_thread("history", durable.write_history, end, deliveries, offers)
            self._expired_s = -_EXPIRE_S  # there may be something that is older than it is kept
            await self._at.in_thread("history", give_back)
        except BaseException:
            self._at.bytes_since_history += size
            raise
        logger.info("shard %d: history up to %d in %.1f s", self._at.number, end, time.monotonic() - begun)

    # -- retention

    def _retention_is_due(self) -> bool:
        return (
            self._at.spec.history_uri is not None
            and any(source.retention_ms is not None for source in self._at.spec.sources)
            and time.monotonic() - self._expired_s >= _EXPIRE_S
        )

    async def _expire(self, durable: DurableShard) -> None:
        """Delete of the history what is older than its source keeps it. What has been in the log for a day goes to the
        history, and leaves the log with the next snapshots, that it can be deleted at all.

        The history is that of all shards: one of them deletes, for what is about to go is written down by source.
        """
        uri, sources, now_ms = self._at.spec.history_uri, self._at.spec.sources, self._at.now_ms()
        assert durable.history is not None
        assert uri is not None
        if await self._at.in_thread("log", durable.oldest_ms, durable.history.done_to) <= now_ms - _DAY_MS:
            await self._write_history(durable)
        if self._at.bytes_since_snapshot and await self._at.in_thread("log", durable.oldest_ms, 0) <= now_ms - _DAY_MS:
            self._at.snapshot_wanted = True
        if self._at.number == _DELETES:
            await self._at.in_thread("history", delete_expired, uri, sources, now_ms)
        self._expired_s = time.monotonic()
