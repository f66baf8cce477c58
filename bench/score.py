"""`millpond bench score`: what a score costs above an endpoint that does nothing.

1. Start a cluster of its own in a temporary directory; load the reference events in bulk over HTTP; run
   the no-op and the bare endpoint beside the score app.
2. Rounds, in each of which the endpoints take turns, every round beginning with another: at 32
   connections, at 1, and batches of 1,000 ids. Then rounds in turns of
   - one model against four by `POST /v1/score`, at 32 connections and at 1;
   - scores at a fixed rate while nothing else happens, and while 8 MB bodies of events are posted one after the other.
   Then scores at half of the rate that 32 connections reached.
3. Check: every answer was good, and scores are what the raw events say.
4. Report medians of the rounds, and ratios of the medians.

Client, proxy, replica and shards share the cores of one machine: the requests/s are of all together, and
only compare within a run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pyarrow as pa

from millpond.bench import four_models, reference
from millpond.bench.events import EventBodies, json_bodies
from millpond.bench.load import Load, LoadFailed, Outcome
from millpond.bench.noop import BARE_PREFIX, NOOP_PREFIX, run_noops
from millpond.bench.options import Options
from millpond.bench.poster import Poster
from millpond.bench.processes import cpu_seconds
from millpond.bench.recompute import features_of, recomputed_scores, soon_ms
from millpond.bench.testbed import SETTING_MEANINGS, SHARDS, Testbed, id_bodies, latency_figures
from millpond.bench.workload import Evidence, Steps, median_of, ratio
from millpond.bench.wrk import run_wrk
from millpond.cluster.config import Config
from millpond.cluster.demo.stage import judge
from millpond.feature_actors.errors import Unavailable

__all__ = ["Measurement", "ScoreWorkload", "figures_of", "make", "turns"]

BATCH_IDS = 1_000
BATCH_CONNECTIONS = 4
_POST_ROWS = 20_000
#: Requests prepared for a measurement; a longer one sends them again.
_BODIES, _BATCH_BODIES = 50_000, 100
_SAMPLE_USERS, _ORACLE_USERS = 200, 20
_MODEL = reference.reference.name
_FOUR = [model.name for model in four_models.FOUR]
#: Scores a second while large bodies are posted: far below what is possible, so that only the posts are in the way.
_BUSY_RATE = 500.0
_LARGE_BODY_BYTES = 8_000_000
#: Bodies made beforehand, so many times as many as the first ones' pace asks for.
_SPARE = 1.5
_TEXTS = [(f'"model":"{_MODEL}"'.encode(), 1), (b'"unknown":[]', 1)]

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
    "score_32_p90_ms": "",
    "score_32_p99_ms": "99 of 100 took at most",
    "score_32_p999_ms": "",
    "score_32_max_ms": "",
    "noop_32_p50_ms": "",
    "noop_32_p99_ms": "",
    "bare_32_p50_ms": "",
    "bare_32_p99_ms": "",
    "wrk_32_requests_per_s": "the same scores by wrk, one thread",
    "wrk_32_p50_ms": "",
    "wrk_32_p99_ms": "",
    "score_1_p50_ms": "score of one id, 1 connection",
    "score_1_p99_ms": "",
    "noop_1_p50_ms": "",
    "noop_1_p99_ms": "",
    "p50_vs_noop_ratio": "p50 at 1 connection, score / no-op",
    "batch_1000_ids_per_s": f"scores of 1,000 ids a request, {BATCH_CONNECTIONS} connections",
    "batch_1000_p50_ms": "",
    "four_models_cost_ratio": "time of four models in a request / of one by the same call: the larger of the two below",
    "four_models_32_cost_ratio": "by requests/s at 32 connections",
    "four_models_1_cost_ratio": "by p50 at 1 connection",
    "one_model_32_requests_per_s": "one model by POST /v1/score",
    "four_models_32_requests_per_s": "",
    "one_model_1_p50_ms": "",
    "four_models_1_p50_ms": "",
    "score_p99_during_8mb_posts_ratio": "p99 of scores in an open loop, while 8 MB of events are posted / idle",
    "score_idle_p50_ms": "idle; latency since a request was due, as in all open loops",
    "score_idle_p99_ms": "",
    "score_busy_p50_ms": "while 8 MB JSON bodies of events are posted one after the other",
    "score_busy_p99_ms": "",
    "busy_rate_per_s": "scores a second meanwhile",
    "posts_8mb_events_per_s": "events that were posted meanwhile",
    "posts_8mb_p50_ms": "one body",
    "open_rate_per_s": "open loop at half of score_32_requests_per_s, or as asked for",
    "open_answers_per_s": "what came of it",
    "open_p50_ms": "",
    "open_p90_ms": "",
    "open_p99_ms": "",
    "open_p999_ms": "",
    "open_max_ms": "",
    "open_late_p99_ms": "by how much the load generator sent later than it should, included above",
    "load_cores_32": "cores that the load generator took at the no-op, 32 connections",
    "events": "of the reference load",
    "users": "",
    "load_events_per_s": "one connection, Arrow streams over HTTP, first requests included",
    "answers_checked": "status, model and unknown views of each",
    "scores_recomputed": "from /v1/features; of some users from the raw events too",
    **SETTING_MEANINGS,
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
        figures |= latency_figures(m.name, runs)
    score, noop = figures["score_32_requests_per_s"], figures["noop_32_requests_per_s"]
    figures["score_vs_noop_ratio"] = ratio(figures, "score_32_requests_per_s", "noop_32_requests_per_s")
    figures["score_vs_bare_ratio"] = ratio(figures, "score_32_requests_per_s", "bare_32_requests_per_s")
    figures["score_cost_us"] = round(1e6 / score - 1e6 / noop, 1)
    figures["p50_vs_noop_ratio"] = ratio(figures, "score_1_p50_ms", "noop_1_p50_ms")
    figures["load_cores_32"] = median_of([o.cpu_seconds / o.wall_seconds for o in outcomes["noop_32"]], 2)
    return figures


def four_models_figures(outcomes: Mapping[str, list[Outcome]]) -> dict[str, Any]:
    """Return what four models in one request cost against one by the same call."""
    figures: dict[str, Any] = {}
    for name in ("one_model", "four_models"):
        rates = [o.requests_per_s for o in outcomes[f"{name}_32"]]
        figures[f"{name}_32_requests_per_s"] = median_of(rates, 1)
        figures[f"{name}_1_p50_ms"] = median_of([o.latency_ms(0.5) for o in outcomes[f"{name}_1"]], 3)
    by_rate = ratio(figures, "one_model_32_requests_per_s", "four_models_32_requests_per_s")
    by_time = ratio(figures, "four_models_1_p50_ms", "one_model_1_p50_ms")
    figures |= {"four_models_32_cost_ratio": by_rate, "four_models_1_cost_ratio": by_time}
    figures["four_models_cost_ratio"] = max(by_rate, by_time)
    return figures


def open_loop_figures(outcomes: Mapping[str, list[Outcome]]) -> dict[str, Any]:
    """Return the latencies of the open loops, and how scores fare beside posts of large bodies."""
    idle, busy, half = outcomes["idle"], outcomes["busy"], outcomes["open"]
    figures = {**latency_figures("score_idle", idle), **latency_figures("score_busy", busy)}
    figures["score_p99_during_8mb_posts_ratio"] = ratio(figures, "score_busy_p99_ms", "score_idle_p99_ms")
    figures["busy_rate_per_s"] = idle[0].rate
    figures |= {"open_rate_per_s": round(half[0].rate, 1), **latency_figures("open", half)}
    figures["open_answers_per_s"] = median_of([o.requests_per_s for o in half], 1)
    figures["open_late_p99_ms"] = median_of([o.late_ms(0.99) for o in half], 3)
    return figures


class ScoreWorkload:
    """The score endpoint beside a no-op, on the reference load."""

    name = "score"
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, options: Options) -> None:
        self._options, self.seed = options, options.seed or 0
        self._users, events = (2_000, 20_000) if options.quick else (reference.USERS, reference.EVENTS)
        self._seconds, self._rounds = options.measured_seconds, options.measured_rounds
        self._bed = Testbed(config, [Path(four_models.__file__)])
        self._event_count = events
        self._events: pa.Table | None = None
        self._cpu_seconds: dict[str, list[float]] = {}
        self._draws = itertools.count(self.seed * 1_000_003)
        self._posters: list[Poster] = []
        self._figures: dict[str, Any] = {
            "measured_seconds": self._seconds,
            "rounds": self._rounds,
            "ids": str(options.ids),
            "users": self._users,
        }

    # -- setup

    def setup(self, steps: Steps) -> None:
        cluster = self._bed.start(steps)
        with steps.step("start the no-ops"):
            assert cluster.spec is not None
            run_noops(cluster.spec)
        now_ms = int(time.time() * 1000)
        self._events = table = reference.reference_events(
            self.seed, now_ms, users=self._users, events=self._event_count
        )
        tables = [table.slice(at, _POST_ROWS) for at in range(0, len(table), _POST_ROWS)]
        rate = self._bed.post_tables(steps, "load the reference events", reference.activity.name, tables, len(table))
        self._figures |= {"events": len(table), "load_events_per_s": round(rate)}

    # -- start

    def start(self, steps: Steps) -> None:
        schedule = turns(self._rounds)
        for path in {m.path for m in schedule[0]}:
            self._bed.run(self._load(Measurement("warm", path, 32), min(1.0, self._seconds)))
        with steps.step("measure", sum(map(len, schedule))) as advance:
            for measurement in (m for turn in schedule for m in turn):
                advance(0, f"{measurement.name} ...")
                titles = (f"ray::ServeReplica:{self._bed.config.name}-{measurement.endpoint}:", *SHARDS)
                before_s = cpu_seconds(titles)
                outcome = self._bed.run(self._load(measurement, self._seconds), measurement.name)
                self._cpu_seconds.setdefault(measurement.name, []).append(cpu_seconds(titles) - before_s)
                unit = "requests/s" if measurement.ids == 1 else "ids/s"
                advance(1, measurement.name)
                self._bed.say(steps, measurement.name, outcome, unit, measurement.ids)
        self._cross_check(steps)
        self._four_models(steps)
        self._beside_posts(steps)
        self._open_loop(steps)

    def _users_drawn(self, count: int) -> Any:
        return self._options.ids.draw(next(self._draws), self._users, count)

    def _load(self, measurement: Measurement, seconds: float) -> Load:
        ids = measurement.ids
        count = _BODIES if ids == 1 else _BATCH_BODIES
        return self._bed.load(
            measurement.path,
            id_bodies(self._users_drawn(count * ids), ids),
            connections=measurement.connections,
            seconds=seconds,
            texts=[(text, ids) for text, _ in _TEXTS],
        )

    def _open(self, rate: float) -> Load:
        return self._bed.load(
            _SCORE_PATH, id_bodies(self._users_drawn(_BODIES)), connections=32, seconds=self._seconds, texts=_TEXTS,
            rate=rate, arrivals=self._options.arrivals, seed=next(self._draws),
        )  # fmt: skip

    def _cross_check(self, steps: Steps) -> None:
        """Measure scores at 32 connections by wrk, too, if it is installed."""
        with steps.step("cross-check by wrk"):
            try:
                found = run_wrk(self._bed.url + _SCORE_PATH, id_bodies(self._users_drawn(_BODIES)), 32, self._seconds)
            except LoadFailed as error:
                raise Unavailable(str(error)) from error
            if found is not None:
                if failed := found.pop("failed"):
                    self._bed.wrong.append(f"every answer is good: {failed:g} of those to wrk were not")
                self._figures |= {f"wrk_32_{name}": value for name, value in found.items()}
                self._bed.settings["load_generator"] += "; wrk for wrk_32_*"

    def _four_models(self, steps: Steps) -> None:
        """Ask for one model and for four, by the same call, in turns."""
        kinds = [("one_model", [_MODEL]), ("four_models", _FOUR)]
        with steps.step("four models", self._rounds * 2 * len(kinds)) as advance:
            for r in range(self._rounds):
                for connections in (32, 1):
                    for name, models in kinds if r % 2 == 0 else kinds[::-1]:
                        head = msgspec.json.encode(models)
                        load = self._bed.load(
                            "/v1/score",
                            [
                                b'{"models":%s,"ids":[%s]}' % (head, one)
                                for one in id_bodies(self._users_drawn(_BODIES))
                            ],
                            connections=connections,
                            seconds=self._seconds,
                            texts=[(b'"unknown":[]', len(models)), (b'"result":', len(models)), (b'"error"', 0)],
                        )
                        outcome = self._bed.run(load, f"{name}_{connections}")
                        advance(1, f"{name}_{connections}")
                        self._bed.say(steps, f"{name}_{connections}", outcome)

    def _beside_posts(self, steps: Steps) -> None:
        """Score at a moderate rate, idle and while large bodies are posted, in turns."""
        rate = min(self._options.rate or _BUSY_RATE, 100.0 if self._options.quick else float("inf"))
        large = self._large_bodies()
        first = self._poster(itertools.islice(large, 2))
        first.start()
        first.join()
        posts = 2 + round(_SPARE * (self._seconds + 1) * 1e3 / max(1.0, first.ms(0.5)))
        with steps.step("scores beside 8 MB posts", 2 * self._rounds) as advance:
            for r in range(self._rounds):
                for name in ("idle", "busy") if r % 2 == 0 else ("busy", "idle"):
                    load = self._open(rate)
                    if name == "idle":
                        outcome = self._bed.run(load, name)
                    else:
                        made = list(itertools.islice(large, posts))
                        poster = self._poster(itertools.chain(made, large))
                        poster.start()
                        try:
                            outcome = self._bed.run(load, name)
                        finally:
                            poster.stop()
                        self._posters.append(poster)
                    advance(1, name)
                    self._bed.say(steps, name, outcome)
        for poster in (first, *self._posters):
            self._bed.wrong += poster.problems

    def _poster(self, bodies: Iterator[bytes]) -> Poster:
        path = f"/v1/events/{reference.activity.name}"
        return Poster(self._bed.url, path, bodies, content_type="application/json")

    def _large_bodies(self) -> Iterator[bytes]:
        """Yield bodies of 8 MB without end, no event id twice; none is of a user whom the raw events are to tell of."""
        made = EventBodies(
            self.seed + 1_000_000, int(time.time() * 1000), users=self._users - _ORACLE_USERS, span_ms=60_000
        )
        events = 1_000 * _LARGE_BODY_BYTES // len(json_bodies(made.table(1_000), 1_000)[0])
        events = events // 100 if self._options.quick else events
        while True:
            yield json_bodies(made.table(events), events)[0]

    def _open_loop(self, steps: Steps) -> None:
        """Score at half of what 32 connections reached."""
        capacity = median_of([o.requests_per_s for o in self._bed.outcomes["score_32"]], 1)
        rate = self._options.rate or round(capacity / 2, 1)
        with steps.step(f"open loop at {rate:,.0f}/s", self._rounds) as advance:
            for _ in range(self._rounds):
                outcome = self._bed.run(self._open(rate), "open")
                advance(1, "")
                self._bed.say(steps, "open", outcome)

    # -- check

    def check(self, steps: Steps) -> list[str]:
        """Compare scores of a sample with what `/v1/features` and the raw events say of it."""
        users = self._users_drawn(_SAMPLE_USERS).tolist()
        with steps.step("check", len(users)) as advance:
            keys = [{"user_id": user} for user in users]
            wrong = recomputed_scores(
                self._bed.url, reference.reference, reference.reference.predictor(), keys, lambda n: advance(n, "")
            )
            self._figures["scores_recomputed"] = len(keys)
            return self._bed.wrong + wrong + self._judged()

    def _judged(self) -> list[str]:
        """Compare features of some users, of whom no events were sent later, with the raw events."""
        assert self._events is not None
        view, as_of_ms, rows = reference.user_activity, soon_ms(), []
        with httpx.Client(base_url=self._bed.url, trust_env=False, timeout=30) as http:
            for user in range(self._users - _ORACLE_USERS, self._users):
                try:
                    features = features_of(http, view, {"user_id": user}, as_of_ms)
                except httpx.HTTPError as error:
                    return [f"every answer is good: {error}"]
                named = {f"{view.name}.{name}": value for name, value in features.items()}
                rows.append(({"user_id": user}, as_of_ms, named, ()))
        agreed = judge([view], {reference.activity.name: self._events}, rows, lambda n: None)
        if agreed != len(rows):
            return [f"features are what the raw events say: {agreed} of {len(rows)} users are right"]
        return []

    # -- metrics and end

    def metrics(self) -> dict[str, Any]:
        outcomes = self._bed.outcomes
        figures = {
            **figures_of(outcomes, self._cpu_seconds),
            **four_models_figures(outcomes),
            **open_loop_figures(outcomes),
            **self._figures,
            **self._bed.settings,
            "answers_checked": self._bed.checked,
            "posts_8mb_p50_ms": median_of([p.ms(0.5) for p in self._posters], 1),
        }
        posted = [p.accepted / (sum(p.took_ms) / 1e3) for p in self._posters]
        figures["posts_8mb_events_per_s"] = round(median_of(posted, 0))
        return {name: figures[name] for name in MEANINGS if name in figures}

    @property
    def evidence(self) -> Evidence:
        return self._bed.evidence(
            {
                "32 connections": ["score_32", "noop_32", "bare_32"],
                "1 connection": ["score_1", "noop_1"],
                "four models in one request": ["one_model_32", "four_models_32", "one_model_1", "four_models_1"],
                "open loops, since due": ["idle", "busy", "open"],
                "batches of 1,000 ids": [f"batch_{BATCH_IDS}"],
            }
        )

    def close(self) -> None:
        for poster in self._posters:
            poster.stop()
        self._bed.close()


def make(config: Config, options: Options) -> ScoreWorkload:
    return ScoreWorkload(config, options)
