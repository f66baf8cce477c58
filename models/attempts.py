"""Attempts: what a process is about to do with a version and may not live to tell.

A process notes that it loads a version, and takes the note back when that is over. A note whose process has died says
what may have ended it: once may be chance, or another version that was loaded beside; twice is the version. A process
that has to end itself because a version does not give its event loop back notes that, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from millpond.models.index import Change, Index
from millpond.models.version import Version

__all__ = ["Attempt", "Attempts"]

_PREFIX = "attempt/"


@dataclass(frozen=True)
class Attempt:
    """hung: it is over, and has held up the event loop of a process; else it is a load that is under way.
    started_ticks: by which a process is told from another that has got its number."""

    model: str
    version: str
    pid: int
    started_ticks: int
    hung: bool = False


class Attempts:
    """Of a registry. They are no part of its generation, but that it rises when some of a version are forgotten."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def begin(self, replica: str, attempts: Sequence[Attempt]) -> None:
        """Note what a replica is about to do, or that it has hung."""
        with self._index.change():
            for one in attempts:
                self._index.set(_key(replica, one), one)

    def end(self, replica: str, attempts: Sequence[Attempt]) -> None:
        """Take back what a replica noted."""
        with self._index.change():
            for one in attempts:
                self._index.delete(_key(replica, one))

    def all(self) -> list[Attempt]:
        return list(self._index.under(_PREFIX, Attempt).values())

    def forget(self, change: Change, versions: Sequence[Version]) -> None:
        """Give versions another chance: forget, as part of a change, whatever was noted of them."""
        ids = {(v.model, v.version) for v in versions}
        for key, one in self._index.under(_PREFIX, Attempt).items():
            if (one.model, one.version) in ids:
                change.delete(_PREFIX + key)


def _key(replica: str, attempt: Attempt) -> str:
    return f"{_PREFIX}{replica}/{'hung' if attempt.hung else 'load'}/{attempt.model}/{attempt.version}"
