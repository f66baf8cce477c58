"""Warm the kernels: compile each once, into Numba's cache, from which other processes load it.

Cold this takes up to a minute of a processor, warm half a second; without it every shard and replica of a first start
would compile the same, at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from millpond.feature_actors.aggregations import Count, Last, Sum
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import EventClock
from millpond.feature_actors.dedupe import DedupeFull
from millpond.feature_actors.events import PastEvents
from millpond.feature_actors.image import load_shard, shard_chunks
from millpond.feature_actors.keys import hash_columns, hash_values
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.log.snapshot import write_snapshot
from millpond.feature_actors.plan import Answer, ReadPlan
from millpond.feature_actors.ports import LocalIngest, LocalRead, complete
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Field, Source
from millpond.feature_actors.tiles.read import read_rows
from millpond.feature_actors.view import FeatureView

__all__ = ["warm_kernels"]

logger = logging.getLogger("millpond.warm")


def warm_kernels() -> None:
    """Run every kernel on a few events in this process. Processes that do so at the same time divide the compiling."""
    warmth = _Warmth()
    # What no other process is at comes first; then what others have compiled is loaded.
    for wait in (False, True):
        for part in (warmth.write, warmth.read, warmth.join):
            with _alone(part.__name__, wait=wait) as alone:
                if alone:
                    part()


@contextlib.contextmanager
def _alone(part: str, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a part, which lies beside the kernels; give whether it is held, which waiting makes sure of."""
    folder = Path(read_rows._cache.cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    held = True
    # To lock it nobody has to write it: somebody else may have made it.
    lock = os.open(folder / f"warm-{part}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:  # a file system without locks: it saves work, no more
            logger.debug("`%s` cannot be locked", folder, exc_info=True)
        yield held
    finally:
        os.close(lock)


class _Warmth:
    """A shard of one view, and its parts: each has kernels that take seconds to compile and that no other part has."""

    def __init__(self) -> None:
        self.source = Source(
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
        features = {
            "count": Count(window="1h"), "exact": Sum("x", window="1h", exact=True), "last": Last("id", ttl="1d"),
        }  # fmt: skip
        view = FeatureView("warm", owner="millpond", source=self.source, key=["n", "id"], features=features)
        self.layout, self.shard_map = compile_layout([], [view]), ShardMap.even(1, 1)
        self.plan = ReadPlan(self.layout, list(view), "warm")
        n = 40  # enough that an index and a filter grow
        rows = [{"at": i * 60_000, "id": str(i), "n": i, "x": None if i % 7 == 0 else i} for i in range(n)]
        self.batch = pa.RecordBatch.from_pylist(rows, schema=self.source.schema)

    def shard(self, dedupe_bytes_max: int | None = None) -> Shard:
        return Shard(self.layout, self.shard_map, 0, dedupe_bytes_max=dedupe_bytes_max)

    def client(self, shard: Shard) -> FeatureClient:
        ports = LocalIngest([shard]), LocalRead([shard])
        return FeatureClient(self.layout, self.shard_map, *ports, EventClock())

    def write(self) -> None:
        shard = self.shard()
        complete(self.client(shard).ingest("warm", self.batch))
        with tempfile.TemporaryDirectory(prefix="millpond-warm-") as folder:
            path = write_snapshot(Path(folder), shard_chunks(shard, cluster_id="warm", epoch=0, begin=0))
            load_shard(self.shard(), path, cluster_id="warm")
        store, (table,) = shard.parts.store, self.layout.tables
        ids = hash_columns([self.batch["id"]], len(self.batch))
        keys = hash_columns([self.batch["n"], self.batch["id"]], len(self.batch)).view(np.int64)
        store.clear(table, keys, {"x"})
        store.texts_in_use(np.ones(1))
        store.remove(table, keys)
        with contextlib.suppress(DedupeFull):
            self.shard(dedupe_bytes_max=0).admit("warm", ids, ids[:, 0].view(np.int64), 0)

    def read(self) -> None:
        complete(self.client(self.shard()).read(self.plan, {"n": [1, 2], "id": ["1", "2"]}, 2))
        hash_values([[1]], 1)

    def join(self) -> None:
        n = len(self.batch)
        as_of = np.full(n, n * 60_000, np.int64)
        question = self.plan.question({"n": self.batch["n"], "id": self.batch["id"]}, n, None, as_of)
        past = PastEvents(self.batch, as_of, as_of, np.ones(n, np.uint32))
        self.shard().join(question, {"warm": past}, Answer.empty(question))
