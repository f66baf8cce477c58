"""Added views: those that came while a cluster ran, as its registry keeps them, and how far their backfill is.

A view is written down before any shard hears of it, and keeps its number: its table has the same place everywhere. It
is `backfilling` until all shards have it whole, then `live`; or it has `failed`, and keeps only its place until the
cluster is started anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from millpond.feature_actors.backfill import ViewState
from millpond.models.index import Change, Index

__all__ = ["AddedViewRecord", "AddedViews", "Progress"]

_VIEW, _PROGRESS = "view/", "backfill/"


@dataclass(frozen=True)
class AddedViewRecord:
    """What the index has of a view.

    identity: its name and a digest of what is kept for it, see `layout.identity_of`. number: its place among the added
    views. file_name, text: the definition that declares it. why: it has failed. history_since_ms: since when it has
    everything, where retention had taken what was before. superseded: the cluster has started with a newer version.
    """

    identity: str
    number: int
    file_name: str
    text: str
    state: ViewState = "backfilling"
    why: str = ""
    history_since_ms: int | None = None
    superseded: bool = False

    @property
    def name(self) -> str:
        return self.identity.partition("#")[0]


@dataclass(frozen=True)
class Progress:
    """How far a backfill is: records read, of how many, of all shards together; shards that have the view whole."""

    read: int
    of: int
    whole: int
    shards: int

    def __str__(self) -> str:
        share = f"{100 * self.read / self.of:.0f} %" if self.of else "all"
        return f"{share} of {self.of:,} records, {self.whole} of {self.shards} shards"


class AddedViews:
    """Of a registry. Each change of theirs is one of its generation; progress is none."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def all(self) -> list[AddedViewRecord]:
        """Return them in the order of their numbers."""
        return sorted(self._index.under(_VIEW, AddedViewRecord).values(), key=lambda one: one.number)

    def add(self, file_name: str, text: str, identities: Iterable[str]) -> int:
        """Add views that a definition declares; those that are there stay as they are. Return the generation."""
        with self._index.change() as change:
            known = {one.identity for one in self.all()}
            new = [identity for identity in identities if identity not in known]
            for number, identity in enumerate(new, len(known)):
                change.set(_VIEW + identity, AddedViewRecord(identity, number, file_name, text))
        return change.generation

    def settle(self, identity: str, state: ViewState, why: str = "", history_since_ms: int | None = None) -> None:
        """Say what has become of a view that was backfilling."""
        with self._index.change() as change:
            one = self._index.get(_VIEW + identity, AddedViewRecord)
            if one is not None and one.state == "backfilling":
                self._set(change, replace(one, state=state, why=why, history_since_ms=history_since_ms))
            self._index.delete(_PROGRESS + identity)

    def supersede(self, identity: str) -> None:
        """Say that what is asked for by the name of a view is a newer version of it."""
        with self._index.change() as change:
            if (one := self._index.get(_VIEW + identity, AddedViewRecord)) is not None:
                self._set(change, replace(one, superseded=True))

    def drop(self, identities: Iterable[str]) -> None:
        """Forget views, while no cluster runs: the numbers of the others close up."""
        with self._index.change() as change:
            gone = set(identities)
            for identity in gone:
                change.delete(_VIEW + identity)
            for number, one in enumerate(one for one in self.all() if one.identity not in gone):
                self._set(change, replace(one, number=number))

    def note(self, identity: str, progress: Progress) -> None:
        """Write down how far a backfill is."""
        self._index.set(_PROGRESS + identity, progress)

    def progress(self) -> Mapping[str, Progress]:
        """Return how far the backfills that are under way are, by identity."""
        return self._index.under(_PROGRESS, Progress)

    def check(self) -> list[str]:
        """Return what is wrong: numbers with gaps."""
        numbers = [one.number for one in self.all()]
        return [] if numbers == [*range(len(numbers))] else [f"added views: they have the numbers {numbers}"]

    def _set(self, change: Change, one: AddedViewRecord) -> None:
        change.set(_VIEW + one.identity, one)
