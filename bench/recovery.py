"""`millpond bench recovery`: how long a shard takes to be back after its process was killed, and what snapshots cost.

1. Serve one shard of the reference view in a process of its own, without Ray. Send it events of 1 M users: 4 M, a
   snapshot, 4 M more, a snapshot, and 2 M more.
2. Kill the process with SIGKILL and start another on the same folder: the time until it is ready, its start included.
   Once more with a byte of the newest snapshot changed, so that the older one and 6 M events of the log have to do.
3. Send small loads, one after the other, alternating stretches in which a snapshot is taken after the other and the log
   is truncated, and stretches without: what that adds to the 99.9th percentile.
4. Check: after each recovery every user's events are counted as they were sent; a load sent again is all duplicates.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.bench import reference
from millpond.bench.events import EventBodies
from millpond.bench.home import make_home
from millpond.bench.load import quantile
from millpond.bench.options import Options
from millpond.bench.workload import Advance, Evidence, Steps
from millpond.cluster.config import Config
from millpond.feature_actors import Count, FeatureView
from millpond.feature_actors.calls import CallIngest, CallRead
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import WallClock
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.log.snapshot import newest_snapshots
from millpond.feature_actors.manifest import Manifest, make_shards, shard_dir
from millpond.feature_actors.memory_folder import MemoryFolder
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.server import ShardServer, ShardSpec
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.socket_calls import SocketCalls

__all__ = ["RecoveryWorkload", "make"]

SEED = 0
ENTITIES = 1_000_000
#: Events before the older snapshot, before the newer one, and after it.
EVENTS = (4_000_000, 4_000_000, 2_000_000)
_LOAD_ROWS = 10_000
_SMALL_ROWS = 32
_STRETCHES = 6
_READY_S_MAX = 120.0
_NEVER_BYTES = 1 << 40

account = FeatureView("account", owner="bench", source=reference.activity, key=["user_id"], features={"n": Count()})

MEANINGS = {
    "recover_1m_entities_s": "start of a process after a SIGKILL until it is ready, 2 M events after the snapshot",
    "recover_damaged_snapshot_s": "the same by the older snapshot, 6 M events after it",
    "snapshot_1m_entities_s": "the newer snapshot",
    "snapshot_step_ms": "its longest step between two loads",
    "snapshot_mb": "",
    "ingest_p999_ms": f"loads of {_SMALL_ROWS} events, one after the other",
    "ingest_with_snapshots_p999_ms": "while one snapshot is taken after the other, and the log truncated",
    "ingest_p999_added_ms": "the difference",
    "entities": "",
    "events": "",
    "durability": "",
    "start_s": "of that, until a process that has nothing to recover is ready",
}


def layout_of() -> Layout:
    return compile_layout([], [reference.user_activity, account])


class _Served:
    """A shard in a process of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.begun = time.perf_counter()
        self._child = subprocess.Popen([sys.executable, "-m", "millpond.bench.recovery", json.dumps(settings)])

    def kill(self) -> None:
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()


class RecoveryWorkload:
    """A shard that is killed, on the reference view."""

    name = "recovery"
    seed = SEED
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, seconds: float, *, quick: bool = False) -> None:
        self._home = make_home(config.data_dir)
        self._config = replace(config, name="bench", data_dir=str(self._home.path), shards=1)
        self._seconds = seconds
        self._entities, self._events = (2_000, (20_000, 20_000, 10_000)) if quick else (ENTITIES, EVENTS)
        self._name = "quick" if quick else "1m"
        self._memory = MemoryFolder(uuid.uuid4().hex, self._home.path, config.memory_dir)
        self._made = EventBodies(SEED, int(time.time() * 1000), users=self._entities)
        self._sent = np.zeros(self._entities, np.int64)
        self._last: pa.RecordBatch | None = None
        self._runner = asyncio.Runner()
        self._served: _Served | None = None
        self._wrong: list[str] = []
        self._figures: dict[str, Any] = {
            "entities": self._entities,
            "events": sum(self._events),
            "durability": config.durability,
        }

    # -- a shard, and what it is asked

    def _start(self) -> None:
        """Start a process and connect to its shard."""
        manifest = Manifest.open(self._config.directory, "bench", self._config.slots)
        self._served = _Served(
            {
                "data_dir": str(self._config.directory),
                "memory_dir": str(self._memory.path),
                "durability": self._config.durability,
                "run_id": uuid.uuid4().hex,
                "slots": self._config.slots,
                "cluster_id": manifest.cluster_id,
            }
        )
        self._calls = SocketCalls(self._memory.path, 1, timeout_s=_READY_S_MAX)
        shard_map = ShardMap.even(self._config.slots, 1)
        self._layout = layout_of()
        self._client = FeatureClient(
            self._layout, shard_map, CallIngest(self._calls), CallRead(self._calls, shard_map), WallClock()
        )

    def _call(self, method: str) -> Any:
        async def called() -> Any:
            return await self._calls.call(0, method)

        return self._runner.run(called())

    def _send(self, n: int) -> None:
        table = self._made.table(n)
        (self._last,) = table.cast(reference.activity.schema).combine_chunks().to_batches()
        ack = self._runner.run(self._client.ingest(reference.activity.name, self._last))
        np.add.at(self._sent, self._last.column("user_id").to_numpy(), 1)
        if ack.accepted != n:
            self._wrong.append(f"every event is accepted: {ack} of {n}")

    def _load(self, events: int, advance: Advance) -> None:
        for at in range(0, events, _LOAD_ROWS):
            self._send(min(_LOAD_ROWS, events - at))
            advance(_LOAD_ROWS, "")

    # -- the workload

    def setup(self, steps: Steps) -> None:
        directory = self._config.directory
        make_shards(directory, Manifest.open(directory, "bench", self._config.slots), 1)
        self._start()
        self._figures["start_s"] = round(self._ready(), 2)
        with steps.step("load", sum(self._events)) as advance:
            for number, events in enumerate(self._events):
                self._load(events, advance)
                if number < 2:
                    advance(0, "snapshot ...")
                    taken = self._call("snapshot")
        self._figures[f"snapshot_{self._name}_entities_s"] = taken["snapshot_s"]
        self._figures["snapshot_step_ms"] = taken["snapshot_step_ms"]
        self._figures["snapshot_mb"] = round(taken["snapshot_bytes"] / 1e6)

    def start(self, steps: Steps) -> None:
        with steps.step("recover", 2) as advance:
            for damaged in (False, True):
                if damaged:
                    self._damage_newest()
                self._restart()
                seconds = self._ready()
                name = "recover_damaged_snapshot_s" if damaged else f"recover_{self._name}_entities_s"
                self._figures[name] = round(seconds, 2)
                advance(1, f"{seconds:.1f} s")
                self._wrong += self._differences("after a recovery" + " by the older snapshot" * damaged)
        self._measure_snapshots(steps)

    def _restart(self) -> None:
        assert self._served is not None
        self._served.kill()
        self._runner.run(self._calls.close())
        self._start()

    def _ready(self) -> float:
        served, deadline = self._served, time.monotonic() + _READY_S_MAX
        assert served is not None
        while True:
            try:
                self._call("ready")
                return time.perf_counter() - served.begun
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _damage_newest(self) -> None:
        newest = newest_snapshots(shard_dir(self._config.directory, 0) / "snapshots")[0]
        at = newest.stat().st_size // 2
        with newest.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    def _measure_snapshots(self, steps: Steps) -> None:
        taken: dict[bool, list[float]] = {False: [], True: []}
        with steps.step("snapshots beside loads", _STRETCHES) as advance:
            for stretch in range(_STRETCHES):
                taken[stretch % 2 == 1] += self._runner.run(self._stretch(snapshots=stretch % 2 == 1))
                advance(1, "")
        without, with_ = (quantile(taken[s], 0.999) * 1000 for s in (False, True))
        self._figures["ingest_p999_ms"] = round(without, 2)
        self._figures["ingest_with_snapshots_p999_ms"] = round(with_, 2)
        self._figures["ingest_p999_added_ms"] = round(with_ - without, 2)

    async def _stretch(self, *, snapshots: bool) -> list[float]:
        """Send small loads for a while; return what each took, in seconds."""
        seconds: list[float] = []
        table = self._made.table(_SMALL_ROWS * 4_000).cast(reference.activity.schema).combine_chunks()
        taking = asyncio.ensure_future(self._take_snapshots()) if snapshots else None
        end = time.perf_counter() + self._seconds
        for batch in table.to_batches(_SMALL_ROWS):
            begun = time.perf_counter()
            if begun > end:
                break
            await self._client.ingest(reference.activity.name, batch)
            seconds.append(time.perf_counter() - begun)
            np.add.at(self._sent, batch.column("user_id").to_numpy(), 1)
        if taking is not None:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
        return seconds

    async def _take_snapshots(self) -> None:
        while True:
            await self._calls.call(0, "snapshot")

    def check(self, steps: Steps) -> list[str]:
        with steps.step("check"):
            assert self._last is not None
            ack = self._runner.run(self._client.ingest(reference.activity.name, self._last))
            if ack.duplicates != self._last.num_rows:
                self._wrong.append(f"a load that is sent again is all duplicates: {ack}")
            self._wrong += self._differences("at the end")
        return self._wrong

    def _differences(self, when: str) -> list[str]:
        plan, counts = ReadPlan(self._layout, list(account), "bench"), []
        for at in range(0, self._entities, 100_000):
            ids = list(range(at, min(at + 100_000, self._entities)))
            rows = self._runner.run(self._client.read(plan, {"user_id": ids}, len(ids)))
            counts.append(rows.matrix[:, 0])
        found: npt.NDArray[np.float64] = np.concatenate(counts)
        different = int((found != self._sent).sum())
        return [f"every event is counted once {when}: {different} users differ"] if different else []

    def metrics(self) -> dict[str, Any]:
        return self._figures

    @property
    def evidence(self) -> Evidence:
        return Evidence()

    def close(self) -> None:
        if self._served is not None:
            self._served.kill()
        self._runner.close()
        self._memory.remove()
        self._home.remove()


def make(config: Config, options: Options) -> RecoveryWorkload:
    return RecoveryWorkload(config, options.measured_seconds, quick=options.quick)


def main() -> None:
    """Serve a shard until the process is killed, or who started it has gone."""
    settings = json.loads(sys.argv[1])
    layout = layout_of()
    spec = ShardSpec(
        cluster_name="bench",
        namespace="",
        run_id=settings["run_id"],
        data_dir=settings["data_dir"],
        sources=tuple(layout.sources.values()),
        views=tuple(layout.views.values()),
        shard_map=ShardMap.even(settings["slots"], 1),
        hash_seed=SEED,
        dedupe_horizon_ms=86_400_000,
        memory_dir=settings["memory_dir"],
        memory_bytes_max=16 << 30,
        strings_max=1_000_000,
        reclaim_margin_ms=660_000,
        durability=settings["durability"],
        cluster_id=settings["cluster_id"],
        history_uri=None,
        history_part_bytes=_NEVER_BYTES,
        snapshot_bytes=_NEVER_BYTES,
        disk_free_bytes_min=0,
        queue_bytes_max=1 << 30,
    )
    ShardServer(spec, 0, lambda: SocketCalls(Path(settings["memory_dir"]), 1))
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.2)


if __name__ == "__main__":
    main()
