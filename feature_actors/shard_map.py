"""The shard map: which shard owns which slot. Data with a version, the one place of routing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.keys import Hashes, slots_of

__all__ = ["ShardMap"]


@dataclass(frozen=True)
class ShardMap:
    """owners[slot] is the number of the shard that owns the slot."""

    owners: tuple[int, ...]
    version: int = 1

    @classmethod
    def even(cls, n_slots: int, n_shards: int) -> ShardMap:
        """Deal `n_slots` slots to `n_shards` shards in equal runs."""
        if not 1 <= n_shards <= n_slots:
            raise ValueError(f"{n_shards} shards of {n_slots} slots: a shard needs a slot at least")
        return cls(tuple(slot * n_shards // n_slots for slot in range(n_slots)))

    @property
    def n_slots(self) -> int:
        return len(self.owners)

    @property
    def n_shards(self) -> int:
        return max(self.owners) + 1

    @cached_property
    def _owner_array(self) -> npt.NDArray[np.int64]:
        return np.array(self.owners, np.int64)

    def shards_of(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """Return the shard of each key hash, int64 [n]."""
        return self._owner_array[slots_of(hashes, self.n_slots)]
