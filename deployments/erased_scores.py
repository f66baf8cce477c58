"""Removing what is kept of scores while others are being served: a notice in the registry, which every replica heeds.

    1. a notice is written: whose scores are not to be there
    2. every replica that lives takes them out of the file that it fills, and of what waits, drops the examples of its
       shadows, and reports without those that it has
    3. all files are rewritten that have some
    4. the notice goes, and the reports of replicas that have ended; the registry's index is scrubbed

A replica goes on leaving them out until it ends. One that begins later has none: the features are gone by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millpond.feature_actors.errors import Unavailable

if TYPE_CHECKING:
    from millpond.models.registry import Registry

__all__ = ["ScoreEraser"]

_LOOK_S = 0.05


@dataclass(frozen=True)
class ScoreEraser:
    """See `feature_actors.server.ScoreEraser`. history_uri: where scores are logged, or were; None if there is no
    history. registry_dir: where replicas report what they do. wait_s_max: how long a call waits for them."""

    history_uri: str | None
    registry_dir: str
    wait_s_max: float = 60.0

    def forget(self, name: str, field: str, hash: tuple[int, int], as_of_ms: int) -> int:
        # Imported here, for a shard's process needs none of it before.
        from millpond.models.erasures import ForgottenScores
        from millpond.models.registry import Registry
        from millpond.models.score_log import erase_scores

        forgotten = ForgottenScores(field, hash, as_of_ms)
        with closing(Registry(Path(self.registry_dir))) as registry:
            registry.erasures.begin(name, forgotten)
            asked = _alive(registry)

            def left() -> str:
                """Return who lives still and has not heeded the notice."""
                names = [n for n, one in _alive(registry).items() if n in asked and name not in one.get("heeded", {})]
                return ", ".join(f"`{one}`" for one in sorted(names))

            self._wait(
                left,
                "logged scores: {} may log or show scores still of an entity that is to be forgotten: no report that "
                "it does not came within {:g} s; see what it does, or end it",
            )
            n: int = sum(one.get("heeded", {}).get(name, 0) for one in registry.reports().values())
            if self.history_uri is not None:
                n += erase_scores(self.history_uri, [forgotten], asked)
            registry.erasures.end()
            for replica in registry.reports().keys() - _alive(registry).keys():
                registry.forget_report(replica)
            self._wait(
                lambda: "" if registry.scrub() else f"`{self.registry_dir}`",
                "registry: {} may have an entity still that is to be forgotten: its index has been read all the time "
                "for {:g} s; see by whom, and end that",
            )
        return n

    def _wait(self, left: Callable[[], str], otherwise: str) -> None:
        """Wait until nothing is left. Raises `Unavailable`, with what is and for how long it was waited."""
        until_s = time.monotonic() + self.wait_s_max
        while what := left():
            if time.monotonic() > until_s:
                raise Unavailable(otherwise.format(what, self.wait_s_max))
            time.sleep(_LOOK_S)


def _alive(registry: Registry) -> dict[str, dict[str, Any]]:
    """Return the reports of the replicas that live."""
    from millpond.deployments.host import is_alive

    return {name: report for name, report in registry.reports().items() if is_alive(report)}
