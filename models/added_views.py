"""Added views: those that came while a cluster ran, as its registry keeps them, and how far their backfill is.

A view is written down before any shard hears of it, and keeps its number: its table has the same place everywhere. It
is `backfilling` until all shards have it whole, then `live`; or it has `failed`, and keeps only its place until the
cluster is started anew. Before that, one with a key that nothing is kept by yet is `added` until all shards have its
table, and `routing` until all who take events in bring them to its key, see `feature_actors.spread`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from millpond.feature_actors.backfill import ViewState
from millpond.models.index import Change, Index

__all__ = ["AddedViewRecord", "AddedViews", "Ingress", "Progress", "routed_by_now"]

_VIEW, _PROGRESS, _INGRESS = "view/", "backfill/", "ingress/"


@dataclass(frozen=True)
class AddedViewRecord:
    """What the index has of a view.

    identity: its name and a digest of what is kept for it, see `layout.identity_of`. number: its place among the added
    views. file_name, text: the definition that declares it. why: it has failed. history_since_ms: since when it has
    everything, where retention had taken what was before. superseded: the cluster has started with a newer version.
    new_key: nothing was kept by its key before.
    """

    identity: str
    number: int
    file_name: str
    text: str
    state: ViewState = "backfilling"
    why: str = ""
    history_since_ms: int | None = None
    superseded: bool = False
    new_key: bool = False

    @property
    def name(self) -> str:
        return self.identity.partition("#")[0]

    @property
    def version(self) -> str:
        return self.identity.partition("#")[2]

    @property
    def settled(self) -> bool:
        return self.state in ("live", "failed")


@dataclass(frozen=True)
class Progress:
    """How far a backfill is: records read, of how many, of all shards together; shards that have the view whole. why: a
    shard cannot go on now."""

    read: int
    of: int
    whole: int
    shards: int
    why: str = ""

    def __str__(self) -> str:
        share = f"{100 * self.read / self.of:.0f} % of {self.of:,} records" if self.of else "about to begin"
        return f"{share}, {self.whole} of {self.shards} shards" + (f"; {self.why}" if self.why else "")


@dataclass(frozen=True)
class Ingress:
    """A process that takes events in. generation: of which no request is under way that was routed by an older one."""

    pid: int
    started_ticks: int
    generation: int


def routed_by_now(records: Sequence[AddedViewRecord]) -> Sequence[AddedViewRecord]:
    """Return the views that who takes events in goes by: those before the first that not all shards have yet."""
    return list(itertools.takewhile(lambda one: one.state != "added", records))


class AddedViews:
    """Of a registry. Each change of theirs is one of its generation; progress is none."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def all(self) -> list[AddedViewRecord]:
        """Return them in the order of their numbers."""
        return sorted(self._index.under(_VIEW, AddedViewRecord).values(), key=lambda one: one.number)

    def add(self, file_name: str, text: str, identities: Iterable[str], new_keys: Collection[str] = ()) -> int:
        """Add views that a definition declares; those that are there stay as they are. Return the generation.

        new_keys: those of them with a key that nothing is kept by yet.
        """
        with self._index.change() as change:
            known = {one.identity for one in self.all()}
            new = [identity for identity in identities if identity not in known]
            for number, identity in enumerate(new, len(known)):
                first = identity in new_keys
                state: ViewState = "added" if first else "backfilling"
                one = AddedViewRecord(identity, number, file_name, text, state, new_key=first)
                change.set(_VIEW + identity, one)
        return change.generation

    def advance(self, identity: str, state: ViewState) -> None:
        """Say that a view has come to its next state, which is none of its last."""
        with self._index.change() as change:
            if (one := self._index.get(_VIEW + identity, AddedViewRecord)) is not None and not one.settled:
                self._set(change, replace(one, state=state))

    def settle(self, identity: str, state: ViewState, why: str = "", history_since_ms: int | None = None) -> None:
        """Say what has become of a view."""
        with self._index.change() as change:
            one = self._index.get(_VIEW + identity, AddedViewRecord)
            if one is not None and not one.settled:
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

    # -- who takes events in

    def say_known(self, ingress: str, pid: int, ticks: int, generation: int) -> None:
        """Write down that a process brings events to all keys that were `routing` in a generation."""
        self._index.set(_INGRESS + ingress, Ingress(pid, ticks, generation))

    def ingresses(self) -> Mapping[str, Ingress]:
        return self._index.under(_INGRESS, Ingress)

    def forget_ingresses(self) -> None:
        for ingress in self.ingresses():
            self._index.delete(_INGRESS + ingress)

    def check(self) -> list[str]:
        """Return what is wrong: numbers with gaps."""
        numbers = [one.number for one in self.all()]
        return [] if numbers == [*range(len(numbers))] else [f"added views: they have the numbers {numbers}"]

    def _set(self, change: Change, one: AddedViewRecord) -> None:
        change.set(_VIEW + one.identity, one)
