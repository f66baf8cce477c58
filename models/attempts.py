"""Attempts: what a process is about to do with a version and may not live to tell.

A process notes that it loads a version, and takes the note back when that is over. A note whose process has died says
what may have ended it: once may be chance, or another version that was loaded beside; twice, and once of them alone, is
the version. Once it has been loaded by another process, or when a cluster that has stopped ended the process itself,
such a note says nothing any more, and is taken back. A process that has to end itself because a version does not give
its event loop back notes that, too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from millpond.models.index import Change, Index
from millpond.models.version import Version

__all__ = ["Attempt", "Attempts"]

_PREFIX = "attempt/"


@dataclass(frozen=True)
class Attempt:
    """hung: it is over, and has held up the event loop of a process; else it is a load that is under way.
    started_ticks: by which a process is told from another that has got its number. alone: nothing else is noted of its
    process, or was since it began: so says `begin`."""

    model: str
    version: str
    pid: int
    started_ticks: int
    hung: bool = False
    alone: bool = False


class Attempts:
    """Of a registry. They are no part of its generation, but that it rises when some of a version are forgotten."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def begin(self, replica: str, attempts: Sequence[Attempt]) -> None:
        """Note what a replica is about to do, or that it has hung."""
        with self._index.change():
            beside = self._index.under(f"{_PREFIX}{replica}/", Attempt).values()
            alone = len(beside) + len(attempts) == 1
            not_alone_now = [replace(one, alone=False) for one in beside if one.alone]
            for one in (*not_alone_now, *(replace(one, alone=alone) for one in attempts)):
                self._index.set(_key(replica, one), one)

    def end(self, replica: str, attempts: Sequence[Attempt]) -> None:
        """Take back what a replica noted."""
        with self._index.change():
            for one in attempts:
                self._index.delete(_key(replica, one))

    def take_back(self, attempts: Collection[Attempt]) -> None:
        """Take back what any replicas noted."""
        with self._index.change():
            for key, one in self._index.under(_PREFIX, Attempt).items():
                if one in attempts:
                    self._index.delete(_PREFIX + key)

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
