"""Nothing acknowledged is lost and nothing is counted twice, whatever is killed: the faults bench, with five kills."""

from __future__ import annotations

from pathlib import Path

from millpond.bench.faults import FaultsWorkload
from millpond.bench.workload import Steps
from millpond.cluster.config import Config


def test_every_acknowledged_event_is_counted_once_while_processes_are_killed(tmp_path: Path) -> None:
    workload = FaultsWorkload(Config(data_dir=str(tmp_path), draining_period_s=0), kills=5, events=20_000)
    print(f"seed {workload.seed}: {workload.schedule}")  # noqa: T201
    with Steps() as steps:
        try:
            workload.setup(steps)
            workload.start(steps)
            wrong = workload.check(steps)
        finally:
            workload.close()
    figures = workload.metrics()
    assert wrong == [], (workload.seed, figures)
    assert {"shard", "raylet", "cluster"} < figures["kills_by_kind"].keys()
    assert (figures["kills"], figures["lost_events"], figures["double_counted_events"]) == (5, 0, 0)
    assert figures["acked_events"] > 20_000
    assert figures["resent_events"] > 0
    assert figures["starts"] == 3  # at first, and after the raylet and the whole cluster had been killed
