"""`millpond bench users`: whether a score costs more among ten million users than among ten thousand.

1. Start one cluster with four sources and views of the reference shape. Load two events of each user, in the last seven
   days, over HTTP: 10,000 users, 100,000, 1 M and 10 M. Nothing is logged (`durability = "none"`): what is measured is
   reading, and a log would only make the loading longer.
2. Rounds, in which the four take turns, each round beginning with another: scores at 32 connections.
3. Check: every answer was good; the number of entities is that of the users; scores of a sample of each are what their
   features give.

One cluster for all four, so that they are compared in turns, on the same processes and the same minute of the machine.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millpond.bench import populations, reference
from millpond.bench.options import Options
from millpond.bench.populations import SIZES, name_of
from millpond.bench.processes import memory_mb
from millpond.bench.recompute import recomputed_scores
from millpond.bench.store import turned
from millpond.bench.testbed import SETTING_MEANINGS, SHARDS, Testbed, id_bodies, latency_figures
from millpond.bench.workload import Evidence, Steps, median_of, ratio
from millpond.cluster.config import Config

__all__ = ["UsersWorkload", "events_of_each", "make"]

_EVENTS_EACH = 2
_ROWS, _CONNECTIONS = 50_000, 2
_BODIES = 50_000
_SAMPLE_USERS = 50
_QUICK = {"10k": 100, "100k": 200, "1m": 400, "10m": 800}

MEANINGS = {
    **{f"users_{size}_requests_per_s": "" for size in SIZES},
    **{f"users_{size}_vs_10k_ratio": "" for size in list(SIZES)[1:]},
    **{f"users_{size}_{q}_ms": "" for size in SIZES for q in ("p50", "p99")},
    "load_events_per_s": "Arrow over HTTP, two connections, all sizes",
    "events": "two of each user",
    "shard_mb": "memory (PSS) of the shards, all sizes",
    "answers_checked": "status, model and unknown views of each",
    "scores_recomputed": "from /v1/features",
    **SETTING_MEANINGS,
}
MEANINGS["users_10k_requests_per_s"] = "scores of one id among 10,000 users, 32 connections"
MEANINGS["users_1m_vs_10k_ratio"] = "requests/s, among 1 M users / 10,000"
MEANINGS["users_10m_vs_10k_ratio"] = "requests/s, among 10 M users / 10,000"


def events_of_each(users: int, times: int, seed: int, now_ms: int) -> Iterator[pa.Table]:
    """Yield so many events of each user: once through all users in a random order in the older half of seven days, and
    so on; in time order."""
    draw = np.random.default_rng(seed)
    span_ms = reference.SPAN_MS // times
    for n in range(times):
        order = draw.permutation(users)
        first_ms = now_ms - reference.SPAN_MS + n * span_ms
        for at in range(0, users, _ROWS):
            ids = order[at : at + _ROWS]
            when = first_ms + (at + np.arange(len(ids))) * (span_ms - reference.GAP_MS) // users
            item = draw.integers(0, 10_000, len(ids))
            yield pa.table(
                {
                    "event_id": pa.array(at + np.arange(len(ids))).cast(pa.string()),
                    "user_id": pa.array(ids),
                    "item_id": pc.binary_join_element_wise("item", pa.array(item).cast(pa.string()), "-"),
                    "category": pc.binary_join_element_wise("category", pa.array(item % 20).cast(pa.string()), "-"),
                    "amount": pa.array(draw.integers(1, 10_000, len(ids)) / 100),
                    "event_time": pa.array(when).cast(pa.timestamp("ms", tz="UTC")),
                }
            )


class UsersWorkload:
    """Scores among four numbers of users, in one cluster."""

    name = "users"
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, options: Options) -> None:
        self._options, self.seed = options, options.seed or 0
        self._sizes = _QUICK if options.quick else SIZES
        self._bed = Testbed(config, [Path(populations.__file__)], durability="none")
        self._draws = itertools.count(self.seed * 1_000_003)
        self._figures: dict[str, Any] = {
            "measured_seconds": options.measured_seconds,
            "rounds": options.measured_rounds,
            "ids": str(options.ids),
            "scores_recomputed": _SAMPLE_USERS * len(self._sizes),
        }

    def setup(self, steps: Steps) -> None:
        self._bed.start(steps)
        begun, now_ms, events = time.perf_counter(), int(time.time() * 1000), 0
        for size, users in self._sizes.items():
            tables = events_of_each(users, _EVENTS_EACH, self.seed, now_ms)
            n = users * _EVENTS_EACH
            # Users come once in each half, so the order of two connections changes nothing but ties.
            self._bed.post_tables(steps, f"load {size} users", name_of(size), tables, n, connections=_CONNECTIONS)
            events += n
        self._figures |= {"events": events, "load_events_per_s": round(events / (time.perf_counter() - begun))}
        self._figures["shard_mb"] = round(sum(memory_mb(SHARDS).values()))

    def start(self, steps: Steps) -> None:
        rounds = self._options.measured_rounds
        for size in self._sizes:
            self._run(size, min(1.0, self._options.measured_seconds), None)
        with steps.step("measure", rounds * len(self._sizes)) as advance:
            for r in range(rounds):
                for size in turned(list(self._sizes), r):
                    advance(0, f"{size} ...")
                    outcome = self._run(size, self._options.measured_seconds, f"users_{size}")
                    advance(1, size)
                    self._bed.say(steps, f"{size} users", outcome)

    def _run(self, size: str, seconds: float, name: str | None) -> Any:
        ids = self._options.ids.draw(next(self._draws), self._sizes[size], _BODIES)
        load = self._bed.load(
            f"/v1/score/{name_of(size)}", id_bodies(ids), connections=32, seconds=seconds,
            texts=[(b'"model":"%s"' % name_of(size).encode(), 1), (b'"unknown":[]', 1)],
        )  # fmt: skip
        return self._bed.run(load, name)

    def check(self, steps: Steps) -> list[str]:
        wrong = self._bed.wrong + self._counts()
        with steps.step("check", _SAMPLE_USERS * len(self._sizes)) as advance:
            for model, users in zip(populations.models, self._sizes.values(), strict=True):
                keys = [
                    {"user_id": u} for u in self._options.ids.draw(next(self._draws), users, _SAMPLE_USERS).tolist()
                ]
                wrong += recomputed_scores(
                    self._bed.url, model, reference.reference.predictor(), keys, lambda n: advance(n, "")
                )
        return wrong

    def _counts(self) -> list[str]:
        """Return where the shards do not have the users and events that were loaded."""
        cluster = self._bed.cluster
        assert cluster is not None
        answer = httpx.get(
            self._bed.url + "/v1/status", headers={"authorization": f"Bearer {cluster.admin_token}"}, timeout=30,
            trust_env=False,
        )  # fmt: skip
        if answer.status_code != 200:
            return [f"the cluster tells what it holds: {answer.status_code} {answer.text[:300]}"]
        shards, wrong = answer.json()["shards"], []
        for size, users in self._sizes.items():
            name = f"{name_of(size)}[user_id]"
            found = tuple(sum(s[what].get(name, 0) for s in shards) for what in ("entities", "events"))
            if found != (users, users * _EVENTS_EACH):
                wrong.append(
                    f"each of {users} users has {_EVENTS_EACH} events: `{name}` has {found} entities and events"
                )
        return wrong

    def metrics(self) -> dict[str, Any]:
        figures = {**self._figures, **self._bed.settings, "answers_checked": self._bed.checked}
        for size in self._sizes:
            runs = self._bed.outcomes[f"users_{size}"]
            figures |= latency_figures(f"users_{size}", runs)
            figures[f"users_{size}_requests_per_s"] = median_of([o.requests_per_s for o in runs], 1)
        for size in list(self._sizes)[1:]:
            figures[f"users_{size}_vs_10k_ratio"] = ratio(
                figures, f"users_{size}_requests_per_s", "users_10k_requests_per_s"
            )
        return {name: figures[name] for name in MEANINGS if name in figures}

    @property
    def evidence(self) -> Evidence:
        return self._bed.evidence()

    def close(self) -> None:
        self._bed.close()


def make(config: Config, options: Options) -> UsersWorkload:
    return UsersWorkload(config, options)
