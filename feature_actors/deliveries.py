"""What a shard owes other shards as the home of events, and what it has had of other homes.

Events of which several shards have a part are offered to all of them. Their home logs them whole, and owes them until
it hears that every shard has applied its part; if it does not hear, it delivers them itself. A shard that has applied
events remembers of which records at their homes they were, until the home says that they are settled: so the same
events offered, taken and delivered again count once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from millpond.feature_actors.log.record import HomeRecord

__all__ = ["Deliveries"]


class Deliveries:
    """Bookkeeping in memory; what is in it follows from the log."""

    def __init__(self) -> None:
        #: Offsets of this shard's records that are owed, ascending, and since when, as their caller measures time.
        self.owed: dict[int, float] = {}
        self._had: dict[int, set[int]] = {}
        self._settled: dict[int, int] = {}
        self._prune_at: dict[int, int] = {}

    # -- as a home

    def owe(self, offset: int, since_s: float = 0.0) -> None:
        self.owed[offset] = since_s

    def settle(self, offsets: Iterable[int]) -> None:
        """Every shard has applied its part of these records."""
        for offset in offsets:
            self.owed.pop(offset, None)

    def settle_before(self, offset: int) -> None:
        self.settle([owed for owed in self.owed if owed < offset])

    def settled(self, end: int) -> int:
        """Return the offset before which everything is settled; end: where the log ends."""
        return min(self.owed, default=end)

    # -- as the shard of a key

    def has_had(self, home: HomeRecord) -> bool:
        return home.offset < self._settled.get(home.shard, 0) or home.offset in self._had.get(home.shard, ())

    def have(self, home: HomeRecord) -> None:
        """Take down that this shard's part of a home's record has been applied."""
        had = self._had.setdefault(home.shard, set())
        had.add(home.offset)
        if home.settled > self._settled.get(home.shard, 0):
            self._settled[home.shard] = home.settled
            if len(had) > self._prune_at.get(home.shard, 64):  # now and then, not for every record
                kept = self._had[home.shard] = {offset for offset in had if offset >= home.settled}
                self._prune_at[home.shard] = max(64, 2 * len(kept))

    def have_all(self, homes: Iterable[HomeRecord]) -> None:
        for home in homes:
            self.have(home)

    def have_not(self, home: HomeRecord) -> None:
        """Take back that it has been applied."""
        self._had.get(home.shard, set()).discard(home.offset)

    # -- as part of a snapshot

    def state(self) -> dict[str, Any]:
        return {
            "owed": list(self.owed),
            "had": [[shard, sorted(had)] for shard, had in self._had.items()],
            "settled": [[shard, offset] for shard, offset in self._settled.items()],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises `KeyError`, `TypeError` or `ValueError` if it is no state."""
        self.owed = dict.fromkeys(state["owed"], 0.0)
        self._had = {shard: set(had) for shard, had in state["had"]}
        self._settled = dict(state["settled"])
