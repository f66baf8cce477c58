"""What every shard of a cluster is made from: its specification, which travels to the shards' processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from millpond.feature_actors.backfill import ViewsPort
from millpond.feature_actors.log.log import Durability
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import FeatureView

__all__ = ["ScoreEraser", "ShardSpec"]


class ScoreEraser(Protocol):
    """What removes logged scores, from the history and from who writes them, and what else is kept of scores."""

    def forget(self, name: str, field: str, hash: tuple[int, int], as_of_ms: int) -> int:
        """Remove the scores of the key whose field has a value of that hash; return how many there were in files.

        name: of what is asked for; asked again by the same it goes on with that. as_of_ms: what was read as of then or
        before is not logged any more either. Waits until that is so; raises `Unavailable` if somebody does not do so
        for too long, and says who. Raises `HistoryUnavailable`, `HistoryDamaged`.
        """


@dataclass(frozen=True)
class ShardSpec:
    """What every shard of a cluster is made from."""

    cluster_name: str
    namespace: str
    run_id: str
    data_dir: str
    sources: tuple[Source, ...]
    views: tuple[FeatureView, ...]
    shard_map: ShardMap
    hash_seed: int
    dedupe_horizon_ms: int
    memory_dir: str
    memory_bytes_max: int
    strings_max: int
    reclaim_margin_ms: int
    durability: Durability
    cluster_id: str
    history_uri: str | None
    history_part_bytes: int
    snapshot_bytes: int
    disk_free_bytes_min: int
    queue_bytes_max: int
    dedupe_horizon_ms_min: int = 3_600_000
    dedupe_bytes_max: int | None = None
    wall_clock: bool = False
    scores: ScoreEraser | None = None
    added_views: ViewsPort | None = None
