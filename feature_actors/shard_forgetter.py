"""Entities that are to be forgotten by a shard that runs: it has tombstones, and does what they ask for.

See `tombstones`, and `eraser` for the steps of it. Whoever asked may go: every shard sees to it that all have it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from millpond.feature_actors.calls import Calls
from millpond.feature_actors.durable import DurableShard
from millpond.feature_actors.eraser import Eraser
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.housekeeper import Housekeeper
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.ports import all_of
from millpond.feature_actors.shard import Prepared
from millpond.feature_actors.shard_spec import ScoreEraser
from millpond.feature_actors.tombstones import Tombstone, forget_secret, tombstone_of
from millpond.feature_actors.workshop import Workshop

__all__ = ["ShardForgetter"]

_TICK_S, _AGAIN_S = 0.05, 5.0

logger = logging.getLogger("millpond.shard")


class ShardForgetter:
    """Forget entities in a shard's workshop. peers: the other shards."""

    def __init__(self, workshop: Workshop, housekeeper: Housekeeper, peers: Callable[[], Calls]) -> None:
        self._at, self._housekeeper, self._peers = workshop, housekeeper, peers
        #: Held while tombstones are written. By name, how far the shard is with those that wait.
        self._entombing = asyncio.Lock()
        self._forgetting: dict[tuple[str, str], str] = {}
        self.erasing: asyncio.Task[None] | None = None

    @property
    def is_due(self) -> bool:
        return bool(self._at.shard.tombstones.waiting) and not self._at.refuses

    async def forget(self, field: str, value: int | str, at_ms: int) -> dict[str, Any]:
        """Have a tombstone of an entity, or that which waits already; return it for the other shards. What it asks for
        is done in the background, on all of them."""
        self._check_keeps()
        tombstone = tombstone_of(forget_secret(Path(self._at.spec.data_dir)), field, value, at_ms)
        async with self._entombing:
            known = self._at.shard.tombstones.get(tombstone.name)
            if known is not None and not known.done:
                tombstone = known
            else:
                await self._entomb(tombstone)
        await self._at.written(Prepared(0))
        wire: dict[str, Any] = msgspec.to_builtins(tombstone)
        return wire

    async def entomb(self, wire: Mapping[str, Any]) -> None:
        """Have a tombstone that another shard has."""
        self._check_keeps()
        tombstone = msgspec.convert(wire, Tombstone)
        async with self._entombing:
            known = self._at.shard.tombstones.get(tombstone.name)
            again = known is not None and known.done and known.token != tombstone.token
            if known is None or known.at_ms < tombstone.at_ms or (again and known.at_ms == tombstone.at_ms):
                await self._entomb(tombstone)
        # What was prepared before gets into the log before it is looked through.
        await self._at.written(Prepared(0))

    async def _entomb(self, tombstone: Tombstone) -> None:
        """From now on nothing that is before the tombstone gets into the log but with tokens."""
        tombstones = self._at.shard.tombstones
        await self._at.in_thread("house", tombstones.write, [tombstone])
        self._at.shard.forget([tombstone])

    def _check_keeps(self) -> None:
        self._at.check()
        if self._at.durable is None or not isinstance(self._at.durable.log, Log):
            raise Unavailable(
                f'shard {self._at.number} of {self._at.of} keeps nothing on disk (`durability = "none"`), so nothing '
                "is known of what was; stop the cluster, and everything is forgotten"
            )

    async def forgotten(self, field: str, value: int | str) -> dict[str, Any] | None:
        """Return how far the shard is with an entity, None if it has no tombstone of it."""
        return await self.entombed(
            field, tombstone_of(forget_secret(Path(self._at.spec.data_dir)), field, value, 0).mark
        )

    async def entombed(self, field: str, mark: str) -> dict[str, Any] | None:
        """Return the same of an entity of which the mark is known."""
        self._at.check()
        known = self._at.shard.tombstones.get((field, mark))
        if known is None:
            return None
        state = "done" if known.done else self._forgetting.get(known.name, "waiting")
        return {"shard": self._at.number, "state": state, "at_ms": known.at_ms, "removed": known.removed or {}}

    async def erase(self, durable: DurableShard) -> None:
        self.erasing = asyncio.ensure_future(self._erase_waiting(durable))
        await asyncio.wait([self.erasing])
        if not self.erasing.cancelled():
            self.erasing.result()

    async def _erase_waiting(self, durable: DurableShard) -> None:
        """Do what tombstones ask for: the steps of `eraser`, each where it belongs. Broken off it begins anew."""
        begun = time.monotonic()
        others, eraser = [n for n in range(self._at.of) if n != self._at.number], None
        while eraser is None:
            waiting = self._at.shard.tombstones.waiting
            # Whoever asked for it may have gone: every shard sees to it that all have it.
            wires, peers = [msgspec.to_builtins(one) for one in waiting], self._peers()
            await all_of({(n, i): peers.call(n, "entomb", w) for n in others for i, w in enumerate(wires)})
            await self._at.written(Prepared(0))
            async with self._at.housekeeping:
                if self._at.shard.tombstones.waiting == waiting:  # else the others have not heard of all that wait
                    eraser = Eraser(durable)
                    say = partial(self._say, waiting)
                    await self._at.take(eraser.steps(lambda: self._housekeeper.snapshot_steps(durable), say))
        if self._at.number == 0 and self._at.spec.scores is not None:
            self._say(waiting, "removing logged scores")
            await self._erase_scores(waiting, others, eraser, self._at.spec.scores)
        async with self._entombing:
            await self._at.in_thread("house", eraser.finish, self._at.now_ms())
        logger.info(
            "shard %d: %d entities forgotten in %.1f s", self._at.number, len(waiting), time.monotonic() - begun
        )

    def _say(self, waiting: Sequence[Tombstone], state: str) -> None:
        self._forgetting = {one.name: state for one in waiting}

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
                    as_of_ms = as_of_ms or max(self._at.now_ms(), one.at_ms)
                    # In a thread of its own: it waits for whoever writes them.
                    n = await loop.run_in_executor(None, scores.forget, name, one.field, one.hash, as_of_ms)
                    break
                except Unavailable as error:  # all else is done, and what was counted would be lost
                    logger.warning("shard %d: %s", self._at.number, error)
                    self._forgetting[one.name] = f"removing logged scores ({error.message}; it is tried again)"
                    await asyncio.sleep(_AGAIN_S)
            eraser.removed[one]["scores"] += n
