"""Warm the kernels: compile each once, into Numba's cache, from which other processes load it.

Cold this takes some twenty seconds, warm one; without it every shard and replica of a first start
would compile the same, at the same time.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from millpond.feature_actors.aggregations import Count, Last, Sum
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import EventClock
from millpond.feature_actors.dedupe import DedupeFull
from millpond.feature_actors.events import PastEvents
from millpond.feature_actors.image import load_shard, shard_chunks
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.log.snapshot import write_snapshot
from millpond.feature_actors.plan import Answer, ReadPlan
from millpond.feature_actors.ports import LocalIngest, LocalRead, complete
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Field, Source
from millpond.feature_actors.view import FeatureView

__all__ = ["warm_kernels"]


def warm_kernels() -> None:
    """Run every kernel on a few events in this process."""
    source = Source(
        "warm",
        owner="millpond",
        fields={
            "at": "timestamp[ms, UTC]",
            "id": "string",
            "n": "int64",
            "x": Field("float64", optional=True),
        },
        event_id="id",
        event_time="at",
    )
    features = {"count": Count(window="1h"), "exact": Sum("x", window="1h", exact=True), "last": Last("id", ttl="1d")}
    view = FeatureView("warm", owner="millpond", source=source, key=["n", "id"], features=features)
    layout, shard_map = compile_layout([], [view]), ShardMap.even(1, 1)
    shard = Shard(layout, shard_map, 0)
    client = FeatureClient(layout, shard_map, LocalIngest([shard]), LocalRead([shard]), EventClock())
    n = 40  # enough that an index and a filter grow
    rows = [{"at": i * 60_000, "id": str(i), "n": i, "x": None if i % 7 == 0 else i} for i in range(n)]
    batch = pa.RecordBatch.from_pylist(rows, schema=source.schema)
    complete(client.ingest("warm", batch))
    plan = ReadPlan(layout, list(view), "warm")
    complete(client.read(plan, {"n": [1, 2], "id": ["1", "2"]}, 2))
    as_of = np.full(n, n * 60_000, np.int64)
    question = plan.question({"n": batch["n"], "id": batch["id"]}, n, None, as_of)
    past = PastEvents(batch, as_of, as_of, np.ones(n, np.uint32))
    Shard(layout, shard_map, 0).join(question, {"warm": past}, Answer.empty(question))
    with tempfile.TemporaryDirectory(prefix="millpond-warm-") as folder:
        path = write_snapshot(Path(folder), shard_chunks(shard, cluster_id="warm", epoch=0, begin=0))
        load_shard(Shard(layout, shard_map, 0), path, cluster_id="warm")
    store, (table,) = shard.parts.store, layout.tables
    keys = hash_columns([batch["n"], batch["id"]], n).view(np.int64)
    store.clear(table, keys, {"x"})
    store.texts_in_use(np.ones(1))
    store.remove(table, keys)
    with contextlib.suppress(DedupeFull):
        ids = hash_columns([batch["id"]], n)
        Shard(layout, shard_map, 0, dedupe_bytes_max=0).admit("warm", ids, ids[:, 0].view(np.int64), 0)
