"""The routes of events: which shards keep something of them, by their keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Table
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tokens import is_token

__all__ = ["key_validity", "shards_of_keys"]

Bools = npt.NDArray[np.bool_]


def key_validity(keys: Sequence[pa.Array], n: int) -> Bools:
    """Return which of n rows have all their key fields, bool [n]: a null is none, nor is what stands for a forgotten
    one, so that no entity is kept for that."""
    valid = np.ones(n, np.bool_)
    for key in keys:
        if (tokens := is_token(key)) is not None:
            valid &= ~tokens
        if key.null_count:
            valid &= key.is_valid().to_numpy(zero_copy_only=False)
    return valid


def shards_of_keys(tables: Iterable[Table], shard_map: ShardMap, batch: pa.RecordBatch) -> tuple[Bools, Bools]:
    """Return which shards keep something of which events, bool [shards, n], and which events lack the key of some
    view, bool [n]. tables: those that the events are for; one of each key that is routed is enough."""
    n = batch.num_rows
    concerned, unkeyed = np.zeros((shard_map.n_shards, n), np.bool_), np.zeros(n, np.bool_)
    for table in tables:
        if not table.routed:
            continue
        keys = [batch.column(name) for name in table.key]
        valid = key_validity(keys, n)
        unkeyed |= ~valid
        if shard_map.n_shards == 1:
            concerned[0] |= valid
        else:
            rows = np.flatnonzero(valid)
            concerned[shard_map.shards_of(hash_columns(keys, n))[rows], rows] = True
    return concerned, unkeyed
