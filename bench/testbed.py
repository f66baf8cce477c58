"""A cluster of its own in a temporary directory, the loads sent to it, and what was wrong with their answers."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.bench.home import make_home
from millpond.bench.load import Load, LoadFailed, Outcome, RunningLoad, run_load
from millpond.bench.poster import post_tables
from millpond.bench.processes import niceness
from millpond.bench.workload import Evidence, Steps, median_of
from millpond.cluster.cluster import Cluster
from millpond.cluster.config import Config
from millpond.feature_actors.errors import Unavailable
from millpond.models.definition import Definition

__all__ = ["REPLICAS", "SETTING_MEANINGS", "SHARDS", "Testbed", "id_bodies", "latency_figures"]

#: The titles of a testbed's processes.
SHARDS = ("ray::FeatureActor",)
REPLICAS = ("ray::ServeReplica:bench-score:", "ray::ServeReplica:bench-events:")
#: What `load_generator` says.
LOAD_GENERATOR = "millpond.bench.load, one process"
#: Of every workload on a testbed.
SETTING_MEANINGS = {
    "ids": "which ids are asked for",
    "measured_seconds": "length of each measurement",
    "rounds": "medians of so many",
    "load_generator": "closed loop where nothing else is said",
    "worker_niceness": "of Ray's workers (Ray's default is 15)",
    "load_niceness": "of the load generator",
    "durability": "",
    "proxy": "ingress",
    "shards": "",
    "replicas": "",
}
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}


def latency_figures(name: str, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return `NAME_p50_ms` and so on up to the largest, medians of the rounds."""
    return {f"{name}_{q}_ms": median_of([o.latency_ms(at) for o in outcomes], 3) for q, at in _QUANTILES.items()}


def id_bodies(ids: npt.NDArray[np.int64], each: int = 1) -> list[bytes]:
    """Return the bodies of score requests for so many users each."""
    users = ids.tolist()
    if each == 1:
        return [b'{"user_id":%d}' % user for user in users]
    return [
        b"[" + b",".join(b'{"user_id":%d}' % user for user in users[at : at + each]) + b"]"
        for at in range(0, len(users), each)
    ]


class Testbed:
    """One cluster, from start to stop; keeps every outcome by the name of its measurement, for the report.

    wrong: the invariants that did not hold. checked: answers that were judged. settings: what was measured, as figures.
    changes: settings of the cluster, over those of `config`.
    """

    __test__ = False  # pytest, it is none

    def __init__(self, config: Config, definitions: Sequence[Path], **changes: Any) -> None:
        self._home = make_home(config.data_dir)
        self.folder = self._home.path
        self.config = replace(
            config, **{"name": "bench", "data_dir": str(self._home.path), "port": 0, "clock": "wall", **changes}
        )
        self.definitions = [Definition.read(path) for path in definitions]
        self.cluster: Cluster | None = None
        self.wrong: list[str] = []
        self.checked = self.failed = 0
        self.outcomes: dict[str, list[Outcome]] = {}
        self.settings: dict[str, Any] = {"load_generator": LOAD_GENERATOR}

    # -- start and stop

    def start(self, steps: Steps) -> Cluster:
        with steps.step("start the cluster") as advance:
            self.cluster = Cluster(self.config, self.definitions).start()
            advance(1, self.url)
        names = ("durability", "proxy", "shards", "replicas")
        self.settings |= {name: getattr(self.config, name) for name in names}
        self.settings |= {"worker_niceness": niceness(REPLICAS), "load_niceness": os.nice(0)}
        return self.cluster

    @property
    def url(self) -> str:
        assert self.cluster is not None
        return self.cluster.url

    def stop(self) -> None:
        """Stop the cluster; what it has left stays until `close`."""
        cluster, self.cluster = self.cluster, None
        if cluster is not None:
            cluster.stop()

    def keep(self, folder: Path) -> None:
        """Copy what the cluster, which is stopped, has left, to a folder that is not there yet."""
        shutil.copytree(self.folder, folder, symlinks=True, ignore=shutil.ignore_patterns("*.socket"))

    def close(self) -> None:
        try:
            self.stop()
        finally:
            self._home.remove()

    # -- events

    def post_tables(
        self, steps: Steps, what: str, source: str, tables: Iterable[pa.Table], events: int, *, connections: int = 1
    ) -> float:
        """Post events in bulk; every one must be accepted, none late. Return events/s."""
        with steps.step(what, events) as advance:
            begun = time.perf_counter()
            try:
                counts = post_tables(self.url, source, tables, connections, lambda n: advance(n, ""))
            except OSError as error:
                raise Unavailable(f"{what}: {error}") from error
            rate = events / (time.perf_counter() - begun)
            advance(0, f"{rate:,.0f} events/s")
        if counts.pop("accepted", 0) != events or any(counts.values()):
            self.wrong.append(f"{what}: {events} events were sent, and not each accepted: {counts}")
        return rate

    # -- loads

    def load(self, path: str, bodies: list[bytes], **settings: Any) -> Load:
        """Return a load on this cluster; settings: of `Load`."""
        address = urlsplit(self.url)
        assert address.hostname is not None
        assert address.port is not None
        return Load(host=address.hostname, port=address.port, path=path, bodies=bodies, **settings)

    def run(self, load: Load, name: str | None = None, *, none_is_fine: bool = False) -> Outcome:
        """Send a load and judge it; with a name it is kept.

        Raises `Unavailable` if nothing good came back within the time, or, if that is fine, nothing at all.
        """
        try:
            outcome = run_load(load)
        except LoadFailed as error:
            raise Unavailable(str(error)) from error
        return self._judged(load, outcome, name, none_is_fine=none_is_fine)

    @contextlib.contextmanager
    def running(self, load: Load, name: str) -> Iterator[list[Outcome]]:
        """Send a load while the body runs, and stop it then; its outcome is in the list that is yielded, after that."""
        outcomes: list[Outcome] = []
        try:
            sending = RunningLoad(load)
            try:
                yield outcomes
            finally:
                sending.stop()
                outcome = sending.result()
        except LoadFailed as error:
            raise Unavailable(str(error)) from error
        outcomes.append(self._judged(load, outcome, name))

    def _judged(self, load: Load, outcome: Outcome, name: str | None, *, none_is_fine: bool = False) -> Outcome:
        self.checked += outcome.checked
        self.failed += outcome.failed
        if outcome.failed:
            self.wrong.append(
                f"every answer is good: {outcome.failed} of {outcome.checked} at {load.path} were not, the first: "
                f"{outcome.first_failure}"
            )
        if not outcome.answers and not (none_is_fine and outcome.checked):
            raise Unavailable(f"no good answer from {load.path} in {load.seconds:g} s: {outcome.first_failure}")
        if name is not None:
            self.outcomes.setdefault(name, []).append(outcome)
        return outcome

    def say(self, steps: Steps, name: str, outcome: Outcome, unit: str = "requests/s", each: int = 1) -> None:
        """Write a line about a measurement, and one more if the load generator could not keep its rate."""
        line = f"  {name:22} {outcome.requests_per_s * each:10,.0f} {unit:10}"
        line += "".join(f"  {q} {outcome.latency_ms(at):8.3f}" for q, at in _QUANTILES.items()) + " ms"
        steps.console.print(line, highlight=False, soft_wrap=True)
        if not outcome.kept_rate:
            steps.console.print(
                f"  [yellow]{name}: the load generator was late, 1 of 100 requests by {outcome.late_ms(0.99):.2f} ms "
                f"or more, at most {outcome.late_ms(1.0):.2f} ms, which its latencies include[/yellow]",
                highlight=False, soft_wrap=True,
            )  # fmt: skip

    def evidence(self, groups: Mapping[str, Sequence[str]] | None = None) -> Evidence:
        return Evidence(outcomes=self.outcomes, groups=groups or {})
