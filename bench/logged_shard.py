"""A shard with its log in a data directory, written in this process: what a cluster of one shard leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import WallClock
from millpond.feature_actors.durable import DurableShard, ShardFolder
from millpond.feature_actors.events import Events, Receipt
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.manifest import Manifest, make_shards, shard_dir
from millpond.feature_actors.ports import LocalIngest, LocalRead, complete
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap

__all__ = ["LoggedShard"]

#: Loads are of events that have ids of their own, once each: to remember them takes only memory.
_HORIZON_MS = 1_000


class LoggedShard:
    """Open the one shard of a new data directory. Event ids are remembered for a second."""

    def __init__(self, directory: Path, name: str, layout: Layout, n_slots: int) -> None:
        manifest = Manifest.open(directory, name, n_slots)
        make_shards(directory, manifest, 1)
        shard_map = ShardMap.even(n_slots, 1)
        shard = Shard(layout, shard_map, 0, dedupe_horizon_ms=_HORIZON_MS, dedupe_horizon_ms_min=_HORIZON_MS)
        folder = ShardFolder(shard_dir(directory, 0), manifest.cluster_id, 1, str(directory / "history"))
        self._log = Log(folder.log, "process")
        self._durable = DurableShard(layout, shard, self._log, folder)
        self._client = FeatureClient(layout, shard_map, _Ingest(self._durable), LocalRead([shard]), WallClock())

    def load(self, source: str, events: pa.RecordBatch) -> int:
        """Take events that each arrive when they happen; return how many were new."""
        return complete(self._client.ingest(source, events, arrival_is_event_time=True)).accepted

    def write_history(self) -> None:
        """Write everything so far as a part of the history."""
        shard = self._durable.shard
        self._durable.write_history(shard.next_offset, shard.deliveries.state(), shard.offers)

    def close(self) -> None:
        self._log.close()


class _Ingest(LocalIngest):
    """An ingest port to a shard that logs. All events are of the one shard, so nothing is offered."""

    def __init__(self, durable: DurableShard) -> None:
        super().__init__([durable.shard])
        self._durable = durable

    async def ingest(self, shard: int, events: Events, settled: Sequence[int]) -> Receipt:
        prepared = self._durable.shard.prepare_ingest(events)
        (offset,) = self._durable.append([prepared], 0)
        return self._durable.shard.commit(prepared, offset)
