"""The turns of the event loop in which a replica's lanes are asked: what one turn brings is read together.

The ids of one model are scored in one call anyway; of many models each gets an id or two in a turn, and what a read
costs besides its rows would be paid for each of them.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from millpond.feature_actors.client import FeatureClient

if TYPE_CHECKING:
    from millpond.deployments.lane import Lane

__all__ = ["NOBODY", "Turns"]

logger = logging.getLogger("millpond.turns")


#: In place of a lane that predicts, and since when.
NOBODY: tuple[None, float] = (None, 0.0)


class Turns:
    """Give lanes their turns. As long as each turn of the loop brings one request, that has its turn at once."""

    def __init__(self, client: FeatureClient) -> None:
        #: The plans that can be read together.
        self.plans = client.plan_set([])
        #: Which lane predicts on the event loop just now, if one does, and since when (`time.perf_counter`).
        self.predicting: tuple[Lane | None, float] = NOBODY
        self._client = client
        self._lanes: dict[Lane, None] = {}
        self._asked = 0
        self._alone = True
        self._comes = False

    def ask(self, lane: Lane) -> None:
        """Have a lane, for which something waits, take a turn: now, or when all of this turn of the loop have asked."""
        if self.come_alone():
            try:
                lane.take_turn()
            finally:
                self.gone()
            return
        self._asked += 1
        if not self._comes:
            self._comes = True
            asyncio.get_running_loop().call_soon(self._take)
        elif self._alone:  # the second of this turn of the loop: from now on they go together
            self._alone = False
            asyncio.get_running_loop().call_soon(self._take)
        self._lanes[lane] = None

    def come_alone(self) -> bool:
        """Return whether a request may be answered at once: it is the first of this turn of the loop, and those of late
        brought no other. Then say when it has `gone`, in the same turn, or the next request comes as company."""
        if self._comes or not self._alone:
            return False
        self._comes, self._asked = True, 1
        return True

    def gone(self) -> None:
        """Let the turn of a request end that has come alone."""
        asyncio.get_running_loop().call_soon(self._look_for_company)

    def _look_for_company(self) -> None:
        """End the turn of a request that went at once, unless another one came in it."""
        if self._alone:
            self._comes, self._asked = False, 0

    def _take(self) -> None:
        lanes, self._lanes = self._lanes, {}
        self._comes, self._alone, self._asked = False, self._asked == 1, 0
        if len(lanes) > 1:
            self._read_together([lane for lane in lanes if lane.loaded.plan in self.plans.numbers])
        for lane in lanes:
            lane.take_turn()

    def _read_together(self, lanes: list[Lane]) -> None:
        """Read what waits in the lanes; what cannot be read so, or fails, each reads by itself, and is told why."""
        batches = [(lane.loaded.plan, batch) for lane in lanes if (batch := lane.begin()) is not None]
        if len(batches) < 2:
            return
        try:
            asked = [(plan, next(iter(batch.keys.values()))) for plan, batch in batches]
            rows = self._client.read_together_now(self.plans, asked)
        except Exception:
            logger.debug("reading for %d lanes together failed", len(batches), exc_info=True)
            return
        for (_, batch), of_batch in zip(batches, rows or (), strict=rows is not None):
            batch.rows = of_batch
