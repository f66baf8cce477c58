"""`millpond bench score`: what a score costs above an endpoint that does nothing.

1. Start a cluster of its own in a temporary directory; load the reference events in bulk over HTTP; run
   the no-op and the bare endpoint beside the score app.
2. Three rounds, in each of which the endpoints take turns, every round beginning with another: at 32
   connections, at 1, and batches of 1,000 ids.
3. Check: every answer was good, and scores are what the raw events say.
4. Report medians of the rounds, and ratios of the medians.

Client, proxy, replica and shards share the cores of one machine: the requests/s are of all together, and
only compare within a run.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import numpy as np
import pyarrow as pa

from millpond.bench import reference
from millpond.bench.load import Load, LoadFailed, Outcome, run_load
from millpond.bench.noop import BARE_PREFIX, NOOP_PREFIX, run_noops
from millpond.bench.processes import cpu_seconds
from millpond.bench.workload import HISTORY, Advance, Steps, median_of, ratio, run_workload
from millpond.cluster.cluster import Cluster
from millpond.cluster.config import Config
from millpond.cluster.demo.session import ARROW_STREAM, Session, arrow_stream
from millpond.cluster.demo.stage import judge
from millpond.feature_actors.errors import Unavailable
from millpond.models import Features
from millpond.models.definition import Definition

__all__ = ["Measurement", "ScoreWorkload", "figures_of", "run_score_bench", "turns"]

SEED = 0
ROUNDS = 3
BATCH_IDS = 1_000
BATCH_CONNECTIONS = 4
_POST_ROWS = 20_000
#: Requests prepared for a measurement; a longer one sends them again.
_BODIES, _BATCH_BODIES = 50_000, 100
_SAMPLE_USERS, _ORACLE_USERS = 200, 20
_MODEL = reference.reference.name
_VIEW = reference.user_activity.name

MEANINGS = {
    "score_32_requests_per_s": "score of one id, 32 connections",
    "noop_32_requests_per_s": "the score app with the scoring replaced by a constant",
    "bare_32_requests_per_s": "an ASGI application that answers a constant",
    "score_vs_noop_ratio": "requests/s at 32 connections, score / no-op",
    "score_vs_bare_ratio": "requests/s at 32 connections, score / bare",
    "score_cost_us": "a request at 32 connections, score - no-op",
    "score_32_cpu_us": "processor time a request, of its replica and the shards, 32 connections",
    "noop_32_cpu_us": "",
    "bare_32_cpu_us": "",
    "score_32_p50_ms": "half of the scores took at most",
    "score_32_p99_ms": "99 of 100 took at most",
    "noop_32_p50_ms": "",
    "noop_32_p99_ms": "",
    "bare_32_p50_ms": "",
    "bare_32_p99_ms": "",
    "score_1_p50_ms": "score of one id, 1 connection",
    "score_1_p99_ms": "",
    "noop_1_p50_ms": "",
    "noop_1_p99_ms": "",
    "p50_vs_noop_ratio": "p50 at 1 connection, score / no-op",
    "batch_1000_ids_per_s": f"scores of 1,000 ids a request, {BATCH_CONNECTIONS} connections",
    "batch_1000_p50_ms": "",
    "load_cores_32": "cores that the load generator took at the no-op, 32 connections",
    "events": "of the reference load",
    "users": "",
    "load_events_per_s": "one connection, Arrow streams over HTTP, first requests included",
    "answers_checked": "status, model and unknown views of each",
    "scores_recomputed": "from /v1/features, the first of them from the raw events too",
    "measured_seconds": "length of each measurement",
    "rounds": "medians of so many",
    "worker_niceness": "of Ray's workers (Ray's default is 15)",
    "load_niceness": "of the load generator",
    "proxy": "ingress",
    "shards": "",
    "replicas": "",
}


@dataclass(frozen=True)
class Measurement:
    """One kind of measurement: an endpoint, how many ids a request and how many connections."""

    endpoint: str
    path: str
    connections: int
    ids: int = 1

    @property
    def name(self) -> str:
        return f"{self.endpoint}_{self.connections}" if self.ids == 1 else f"batch_{self.ids}"


_SCORE_PATH = f"/v1/score/{_MODEL}"
_NOOP_PATH = f"{NOOP_PREFIX}/{_MODEL}"
MEASUREMENTS = (
    (
        Measurement("noop", _NOOP_PATH, 32),
        Measurement("score", _SCORE_PATH, 32),
        Measurement("bare", f"{BARE_PREFIX}/{_MODEL}", 32),
    ),
    (Measurement("noop", _NOOP_PATH, 1), Measurement("score", _SCORE_PATH, 1)),
    (Measurement("score", _SCORE_PATH, BATCH_CONNECTIONS, BATCH_IDS),),
)


def turns(rounds: int) -> list[list[Measurement]]:
    """Return the measurements of each round: those that are compared stand side by side, and another
    of them comes first in each round, so that none is always measured on a cooler machine."""
    return [
        [m for group in MEASUREMENTS for m in group[r % len(group) :] + group[: r % len(group)]] for r in range(rounds)
    ]


def bodies(draw: random.Random, ids: int, count: int, users: int = reference.USERS) -> list[bytes]:
    """Return request bodies of `ids` ids each, drawn uniformly."""
    encode = msgspec.json.encode
    if ids == 1:
        return [encode({"user_id": draw.randrange(users)}) for _ in range(count)]
    return [encode([{"user_id": draw.randrange(users)} for _ in range(ids)]) for _ in range(count)]


def figures_of(outcomes: Mapping[str, list[Outcome]], cpu_seconds_of: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return medians of the rounds, and ratios of the medians.

    cpu_seconds_of: per measurement and round, what the endpoint's processes took for all its answers.
    """
    figures: dict[str, Any] = {}
    for m in (m for group in MEASUREMENTS for m in group):
        runs = outcomes[m.name]
        rate = median_of([o.requests_per_s * m.ids for o in runs], 1)
        if m.ids > 1:
            figures[f"{m.name}_ids_per_s"] = round(rate)
        elif m.connections > 1:
            figures[f"{m.name}_requests_per_s"] = rate
            cpu = [s / o.checked * 1e6 for s, o in zip(cpu_seconds_of[m.name], runs, strict=True)]
            figures[f"{m.name}_cpu_us"] = median_of(cpu, 1)
        figures[f"{m.name}_p50_ms"] = median_of([o.latency_ms(0.5) for o in runs], 3)
        if m.ids == 1:
            figures[f"{m.name}_p99_ms"] = median_of([o.latency_ms(0.99) for o in runs], 3)
    score, noop = figures["score_32_requests_per_s"], figures["noop_32_requests_per_s"]
    figures["score_vs_noop_ratio"] = ratio(figures, "score_32_requests_per_s", "noop_32_requests_per_s")
    figures["score_vs_bare_ratio"] = ratio(figures, "score_32_requests_per_s", "bare_32_requests_per_s")
    figures["score_cost_us"] = round(1e6 / score - 1e6 / noop, 1)
    figures["p50_vs_noop_ratio"] = ratio(figures, "score_1_p50_ms", "noop_1_p50_ms")
    figures["load_cores_32"] = median_of([o.cpu_seconds / o.wall_seconds for o in outcomes["noop_32"]], 2)
    return figures


class ScoreWorkload:
    """The score endpoint beside a no-op, on the reference load."""

    name = "score"
    seed = SEED
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, seconds: float, *, rounds: int = ROUNDS) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="millpond-bench-")
        self._config = replace(config, name="bench", data_dir=self._home.name, port=0, clock="wall")
        self._seconds = seconds
        self._rounds = rounds
        self._cluster: Cluster | None = None
        self._events: pa.Table | None = None
        self._wrong: list[str] = []
        self._outcomes: dict[str, list[Outcome]] = {}
        self._cpu_seconds: dict[str, list[float]] = {}
        self._figures: dict[str, Any] = {
            "measured_seconds": seconds,
            "rounds": rounds,
            "users": reference.USERS,
            "load_niceness": os.nice(0),
            "proxy": config.proxy,
            "shards": config.shards,
            "replicas": config.replicas,
        }

    @property
    def url(self) -> str:
        assert self._cluster is not None
        return self._cluster.url

    # -- setup

    def setup(self, steps: Steps) -> None:
        with steps.step("start the cluster") as advance:
            self._cluster = Cluster(self._config, [Definition.read(Path(reference.__file__))]).start()
            assert self._cluster.spec is not None
            run_noops(self._cluster.spec)
            advance(1, self.url)
        self._load(steps)
        answer = httpx.get(self.url + NOOP_PREFIX, trust_env=False).raise_for_status()
        self._figures["worker_niceness"] = answer.json()["niceness"]

    def _load(self, steps: Steps) -> None:
        """Post the reference events in bulk; every one must be accepted, none late."""
        self._events = events = reference.reference_events(SEED, int(time.time() * 1000))
        session, counts = Session(self.url), dict[str, int]()
        with steps.step("load the reference events", len(events)) as advance:
            start = time.perf_counter()
            for at in range(0, len(events), _POST_ROWS):
                body = arrow_stream(events.slice(at, _POST_ROWS))
                ack = session.post("/v1/events/activity?arrival=event", body, ARROW_STREAM)
                for outcome, n in (ack or {}).items():
                    counts[outcome] = counts.get(outcome, 0) + n
                seconds = time.perf_counter() - start
                rate = counts.get("accepted", 0) / seconds
                advance(_POST_ROWS, f"{rate:,.0f} events/s")
                if session.failed:
                    break
        session.close()
        self._figures["events"] = counts.get("accepted", 0)
        self._figures["load_events_per_s"] = round(rate)
        if session.first_failure:
            raise Unavailable(f"the reference events cannot be loaded: {session.first_failure}")
        if counts.pop("accepted") != len(events) or any(counts.values()):
            self._wrong.append(f"{len(events)} events were sent, and not each accepted: {counts}")

    # -- start

    def start(self, steps: Steps) -> None:
        draw = random.Random(SEED)
        schedule = turns(self._rounds)
        for path in {m.path for m in schedule[0]}:
            self._run(Measurement("warm", path, 32), 1.0, draw)
        with steps.step("measure", sum(map(len, schedule))) as advance:
            for measurement in (m for turn in schedule for m in turn):
                advance(0, f"{measurement.name} ...")
                titles = (f"ray::ServeReplica:{self._config.name}-{measurement.endpoint}:", "ray::FeatureActor")
                before_s = cpu_seconds(titles)
                outcome = self._run(measurement, self._seconds, draw)
                self._cpu_seconds.setdefault(measurement.name, []).append(cpu_seconds(titles) - before_s)
                self._outcomes.setdefault(measurement.name, []).append(outcome)
                rate = outcome.requests_per_s * measurement.ids
                unit = "requests/s" if measurement.ids == 1 else "ids/s"
                advance(1, f"{measurement.name} {rate:,.0f} {unit}")
                steps.console.print(
                    f"  {measurement.name:10} {rate:10,.0f} {unit:10}  p50 {outcome.latency_ms(0.5):7.3f} ms"
                    f"  p99 {outcome.latency_ms(0.99):7.3f} ms",
                    highlight=False,
                )

    def _run(self, measurement: Measurement, seconds: float, draw: random.Random) -> Outcome:
        address = urlsplit(self.url)
        assert address.hostname is not None
        assert address.port is not None
        load = Load(
            host=address.hostname,
            port=address.port,
            path=measurement.path,
            bodies=bodies(draw, measurement.ids, _BODIES if measurement.ids == 1 else _BATCH_BODIES),
            connections=measurement.connections,
            seconds=seconds,
            texts=[(f'"model":"{_MODEL}"'.encode(), measurement.ids), (b'"unknown":[]', measurement.ids)],
        )
        try:
            outcome = run_load(load)
        except LoadFailed as error:
            raise Unavailable(str(error)) from error
        self._figures["answers_checked"] = self._figures.get("answers_checked", 0) + outcome.checked
        if outcome.failed:
            self._wrong.append(
                f"every answer is good: {outcome.failed} of {outcome.checked} at {measurement.path} "
                f"were not, the first: {outcome.first_failure}"
            )
        if not outcome.answers:
            raise Unavailable(f"no good answer from {measurement.path} in {seconds:g} s: {outcome.first_failure}")
        return outcome

    # -- check

    def check(self, steps: Steps) -> list[str]:
        """Compare scores of a sample with what `/v1/features` and the raw events say of it."""
        users = random.Random(SEED + 1).sample(range(reference.USERS), _SAMPLE_USERS)
        # One time, a little ahead, for every read: otherwise windows slide from answer to answer.
        as_of_ms = int(time.time() * 1000) + 60_000
        with (
            steps.step("check", len(users)) as advance,
            httpx.Client(base_url=self.url, trust_env=False, timeout=30) as http,
        ):
            try:
                return self._wrong + self._recompute(http, users, as_of_ms, advance)
            except httpx.HTTPError as error:
                return [*self._wrong, f"every answer is good: {error}"]

    def _recompute(self, http: httpx.Client, users: list[int], as_of_ms: int, advance: Advance) -> list[str]:
        assert self._events is not None
        model, names = reference.Logistic(), tuple(reference.user_activity.features)
        wrong, rows = [], []
        query = {"as_of": str(as_of_ms)}
        batch = http.post(_SCORE_PATH, params=query, json=[{"user_id": u} for u in users])
        for user, in_batch in zip(users, batch.raise_for_status().json(), strict=True):
            key = {"user_id": user}
            found = http.get(f"/v1/features/{_VIEW}", params={**query, **key}).raise_for_status().json()
            answer = http.post(_SCORE_PATH, params=query, json=key).raise_for_status().json()
            values = [found["features"][name] for name in names]
            matrix = np.array([[np.nan if v is None else v for v in values]])
            expected = model.predict(Features(matrix, names)).tolist()[0]
            if not answer["result"] == in_batch["result"] == expected:
                wrong.append(
                    f"the score of user {user} is what its features give: expected {expected!r}, "
                    f"got {answer['result']!r}, in a batch {in_batch['result']!r}"
                )
            if answer["model"] != _MODEL or answer["unknown"] or found["unknown"]:
                wrong.append(f"user {user} is known and scored by `{_MODEL}`: got {answer}")
            named = {f"{_VIEW}.{name}": value for name, value in found["features"].items()}
            rows.append((key, as_of_ms, named, ()))
            advance(1, "")
        self._figures["scores_recomputed"] = len(rows)
        judged = rows[:_ORACLE_USERS]
        agreed = judge([reference.user_activity], {"activity": self._events}, judged, lambda n: None)
        if agreed != len(judged):
            wrong.append(f"features are what the raw events say: {agreed} of {len(judged)} users are right")
        return wrong

    # -- metrics and end

    def metrics(self) -> dict[str, Any]:
        return {**figures_of(self._outcomes, self._cpu_seconds), **self._figures}

    def close(self) -> None:
        try:
            if self._cluster is not None:
                self._cluster.stop()
        finally:
            self._home.cleanup()


def run_score_bench(
    config: Config, origins: Mapping[str, str], *, as_json: bool, seconds: float, record: bool = False
) -> int:
    """Run the bench; return the exit status.

    record: append the figures to `bench/history.jsonl`, unless an invariant was broken.
    """
    workload = ScoreWorkload(config, seconds)
    return run_workload(workload, as_json=as_json, record_to=HISTORY if record else None)
