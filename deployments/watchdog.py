"""A watchdog: ends a replica whose event loop a model does not give back, so that another one takes its place.

Nothing in the process can break off a prediction on the event loop, and Serve takes a minute and a half to find out. It
needs the interpreter for a moment: a model that hangs in code that never lets go of it is found by Serve only.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from millpond.deployments.turns import Turns

__all__ = ["HUNG_STATUS", "Watchdog"]

logger = logging.getLogger("millpond.watchdog")

#: The exit status of a replica that was ended so.
HUNG_STATUS = 71
_LOOKS = 4


class Watchdog(threading.Thread):
    """Look at what lanes do on the event loop, as long as the process lives.

    hang_s: how long a prediction may take there. note: called with model and version of one that took longer, before
    `end` is.
    """

    def __init__(
        self,
        turns: Turns,
        hang_s: float,
        note: Callable[[str, str], None],
        end: Callable[[int], None] = os._exit,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._turns, self._hang_s, self._note, self._end = turns, hang_s, note, end

    def run(self) -> None:
        while True:
            time.sleep(self._hang_s / _LOOKS)
            lane, since_s = self._turns.predicting
            if lane is None or time.perf_counter() - since_s < self._hang_s:
                continue
            model = lane.loaded.model
            logger.critical(
                "%s version `%s` has held up this replica for %g s (setting `hang_timeout_s`); the replica ends, and "
                "that version is called in a thread from now on", model.subject, model.version, self._hang_s,
            )  # fmt: skip
            try:
                self._note(model.name, model.version)
            except Exception:  # the replica ends all the same
                logger.exception("that cannot be noted")
            self._end(HUNG_STATUS)
            return
