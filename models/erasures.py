"""Erasures: whose scores are to be forgotten just now, which every replica heeds and says so in its report."""

from __future__ import annotations

import msgspec

from millpond.models.index import Index

__all__ = ["Erasures", "ForgottenScores"]

_PREFIX = "forget/"


class ForgottenScores(msgspec.Struct, frozen=True):
    """Scores that are not to be there: of the key whose `field` has a value of that hash, read as of then or before."""

    field: str
    hash: tuple[int, int]
    as_of_ms: int


class Erasures:
    """Of a registry, and no part of its generation: what replicas serve does not change."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def begin(self, name: str, forgotten: ForgottenScores) -> None:
        """Give notice of an erasure, under a name of its own; once more is harmless."""
        self._index.set(_PREFIX + name, forgotten)

    def notices(self) -> dict[str, ForgottenScores]:
        """Return what is to be forgotten, by name."""
        return self._index.under(_PREFIX, ForgottenScores)

    def end(self) -> None:
        """Take all notices back: there is one at a time, and whoever ended before doing so begins again by another."""
        with self._index.change():
            for name in self.notices():
                self._index.delete(_PREFIX + name)
