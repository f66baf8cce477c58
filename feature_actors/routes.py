"""The routes of events: which shards keep something of them, by their keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.events import ALL_KEYS
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.shard_map import ShardMap

__all__ = ["key_validity", "shards_of_keys"]

Bools = npt.NDArray[np.bool_]


def key_validity(keys: Sequence[pa.Array], n: int) -> Bools:
    """Return which of n rows have all their key fields, bool [n]."""
    valid = np.ones(n, np.bool_)
    for key in keys:
        if key.null_count:
            valid &= key.is_valid().to_numpy(zero_copy_only=False)
    return valid


def shards_of_keys(
    layout: Layout, shard_map: ShardMap, source: str, batch: pa.RecordBatch, keys_known: int = ALL_KEYS
) -> tuple[Bools, Bools]:
    """Return which shards keep something of which events, bool [shards, n], and which events lack the key of some
    view, bool [n]. keys_known: as of `Events`."""
    n = batch.num_rows
    concerned, unkeyed = np.zeros((shard_map.n_shards, n), np.bool_), np.zeros(n, np.bool_)
    for table in layout.tables_of(source):
        if not table.routed or table.key_number > keys_known:
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
