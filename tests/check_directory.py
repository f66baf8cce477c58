"""Directories of stopped clusters, for the tests of `millpond check`: made without Ray, with all that is in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from durable_cluster import DurableCluster

from millpond.feature_actors import Count, FeatureView, Field, Last, Max, Source, Sum
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.log.log import Log

N_SLOTS = 16
PAYMENTS = Source(
    "payments",
    owner="tests",
    fields={
        "id": "string",
        "at": "timestamp[ms, UTC]",
        "user": Field("int64", optional=True),
        "shop": Field("string", optional=True),
        "cents": "int64",
    },
    event_id="id",
    event_time="at",
)
SUMS: dict[str, Any] = {"n": Count(), "sum": Sum("cents"), "max_1h": Max("cents", window="1h")}
BY_USER = FeatureView("by_user", owner="tests", source=PAYMENTS, key=["user"], features=SUMS)
BY_SHOP = FeatureView(
    "by_shop", owner="tests", source=PAYMENTS, key=["shop"],
    features={"n": Count(), "last": Last("shop"), "n_1h": Count(window="1h", exact=True)},
)  # fmt: skip
LAYOUT = compile_layout([], [BY_USER, BY_SHOP])

#: The same as the file that `millpond check` is given.
DEFINITION = """
from millpond.feature_actors import Count, FeatureView, Field, Last, Max, Source, Sum
PAYMENTS = Source(
    "payments", owner="tests",
    fields={"id": "string", "at": "timestamp[ms, UTC]", "user": Field("int64", optional=True),
            "shop": Field("string", optional=True), "cents": "int64"},
    event_id="id", event_time="at",
)
BY_USER = FeatureView("by_user", owner="tests", source=PAYMENTS, key=["user"],
                      features={"n": Count(), "sum": Sum("cents"), "max_1h": Max("cents", window="1h")})
BY_SHOP = FeatureView("by_shop", owner="tests", source=PAYMENTS, key=["shop"],
                      features={"n": Count(), "last": Last("shop"), "n_1h": Count(window="1h", exact=True)})
"""


def events(number: int, n: int = 6) -> list[dict[str, Any]]:
    return [
        {"id": f"{number}-{i}", "at": number * 60_000, "user": (number + i) % 7, "shop": "abü"[i % 3], "cents": i}
        for i in range(n)
    ]


def lay_out(cluster: DurableCluster, path: Path, *, crashed: bool = False) -> None:
    """Write down what is on disk of a cluster as the data directory of one, which is not used any more then."""
    for shard, durable in enumerate(cluster.shards):
        log, to = durable.log, path / "shards" / f"{shard:03d}"
        assert isinstance(log, Log)
        if not crashed:
            log.close()
        shutil.copytree(durable.folder, to)  # type: ignore[attr-defined]
        opened = {"cluster_id": "tests", "shard": shard, "epoch": 9, "run": "r", "log_end": 0}
        (to / "epoch.json").write_text(json.dumps(opened))
        log.close()
    if (history := cluster.folder / "history").exists():
        shutil.copytree(history, path / "history")
    manifest = {
        "cluster_name": "dev", "cluster_id": "tests", "n_slots": cluster.shard_map.n_slots, "hash_seed": 5,
        "key_hash_version": 1, "format": 1, "log_shards": len(cluster.shards),
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))


class Stopped:
    """A cluster that ran and has stopped: its directory.

    batches: how many of six events it took. snapshots: after which of them each shard took one. history: whether each
    wrote a part of the history then, before it. crashed: whether it was killed, so that the log is partly in the
    write-ahead file.
    """

    def __init__(
        self,
        folder: Path,
        n_shards: int = 2,
        batches: int = 10,
        snapshots: tuple[int, ...] = (),
        history: bool = False,
        crashed: bool = False,
    ) -> None:
        self.path, self.n_shards = folder / "data", n_shards
        cluster = DurableCluster(LAYOUT, n_shards, folder / "live", N_SLOTS, history=history)
        for number in range(batches):
            cluster.send("payments", (number + 1) * 60_000, events(number))
            cluster.deliver_owed()
            if number in snapshots:
                for shard in range(n_shards):
                    if history:
                        cluster.write_history(shard)
                    cluster.snapshot_steps(shard, 1_000)
        lay_out(cluster, self.path, crashed=crashed)
        self.n_events = 6 * batches
        shutil.rmtree(folder / "live")

    def shard(self, number: int) -> Path:
        return self.path / "shards" / f"{number:03d}"

    def snapshots(self, number: int = 0) -> list[Path]:
        return sorted((self.shard(number) / "snapshots").glob("*.snapshot"), reverse=True)

    def hashes(self) -> dict[str, str]:
        """Return the content of every file, and what else there is."""
        return {
            str(p.relative_to(self.path)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in sorted(self.path.rglob("*"))
        }

    def recovered(self) -> DurableCluster:
        """Return a cluster that has been started on a copy of the directory."""
        again = self.path.with_name(f"again-{len(list(self.path.parent.iterdir()))}")
        shutil.copytree(self.path, again, ignore=shutil.ignore_patterns("*-shm"))
        for number in range(self.n_shards):
            (again / "shards" / f"{number:03d}").rename(again / f"{number}")
        return DurableCluster(LAYOUT, self.n_shards, again, N_SLOTS, history=(again / "history").exists())


def flip(path: Path, at: int, bits: int = 1) -> None:
    """Change bits of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
