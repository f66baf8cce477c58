"""`millpond bench backfill`: a view that is deployed on a running cluster, under a load of scores.

1. Start a cluster of its own with the reference view and model; load 10 M events of the last seven days, synced, of
   which by then most are in the history, the rest in the log.
2. Rounds: an open loop of scores, alone; then the same while `millpond deploy` adds a view of the eleven features of
   the reference view, until it is live.
3. Check: no request failed; of a sample of users the features of each new view are bit for bit those of the view that
   was there all the time.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pyarrow as pa

from millpond.bench import reference
from millpond.bench.load import Load
from millpond.bench.options import Options
from millpond.bench.testbed import SETTING_MEANINGS, Testbed, id_bodies, latency_figures
from millpond.bench.workload import Evidence, Steps, median_of, ratio
from millpond.cluster.config import Config
from millpond.feature_actors.errors import Unavailable

__all__ = ["BackfillWorkload", "make"]

_PATH = f"/v1/score/{reference.reference.name}"
_TEXTS = [(b'"model":"reference"', 1), (b'"unknown":[]', 1)]
_EVENTS, _QUICK_EVENTS, _QUICK_USERS = 10_000_000, 20_000, 200
_POST_ROWS, _BODIES, _SAMPLE_USERS = 50_000, 50_000, 200
#: Scores a second, and how long a backfill may take.
_RATE, _BACKFILL_S_MAX = 1_000.0, 600.0

_VIEW = """from millpond.bench import reference
from millpond.feature_actors import FeatureView

view = FeatureView({name!r}, owner="bench", source=reference.activity, key=["user_id"],
                   features=dict(reference.user_activity.features))
"""

MEANINGS = {
    "events_per_s": "of the past that a view is computed from, from the deploy until it is live",
    "backfill_s": "",
    "score_p99_ratio": "p99 of scores while a view is computed / alone",
    "failed_requests": "",
    **{f"alone_{q}_ms": "" for q in ("p50", "p90", "p99", "p999", "max")},
    **{f"backfill_{q}_ms": "" for q in ("p50", "p90", "p99", "p999", "max")},
    "score_rate_per_s": "open loop of scores",
    "events": "loaded before",
    "load_events_per_s": "Arrow over HTTP, synced",
    "answers_checked": "status, model and unknown views of each",
    "features_compared": "of the new views with the view that was there all the time",
    "users": "",
    **SETTING_MEANINGS,
}
MEANINGS["alone_p50_ms"] = "scores alone, since they were due"
MEANINGS["backfill_p50_ms"] = "scores while a view is computed"


class BackfillWorkload:
    """Views that come while a cluster runs."""

    name = "backfill"
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, options: Options) -> None:
        self._options, self.seed = options, options.seed or 0
        self._events, self._users = (_QUICK_EVENTS, _QUICK_USERS) if options.quick else (_EVENTS, reference.USERS)
        self._bed = Testbed(config, [Path(reference.__file__)])
        self._draws = itertools.count(self.seed * 1_000_003)
        self._views: list[str] = []
        self._seconds: list[float] = []
        self._figures: dict[str, Any] = {
            "measured_seconds": options.measured_seconds,
            "rounds": options.measured_rounds,
            "ids": str(options.ids),
            "events": self._events,
            "users": self._users,
            "score_rate_per_s": options.rate or _RATE,
        }

    def setup(self, steps: Steps) -> None:
        self._bed.start(steps)
        table = reference.reference_events(
            self.seed, int(time.time() * 1000), users=self._users, events=self._events
        )  # fmt: skip
        rate = self._bed.post_tables(steps, "load events", "activity", _pieces(table), self._events)
        self._figures["load_events_per_s"] = round(rate)

    def start(self, steps: Steps) -> None:
        rounds = self._options.measured_rounds
        self._bed.run(self._scores(1.0))
        with steps.step("measure", 2 * rounds) as advance:
            for number in range(rounds):
                alone = self._bed.run(self._scores(self._options.measured_seconds), "alone")
                advance(1, "alone")
                self._bed.say(steps, "scores alone", alone)
                load = self._scores(_BACKFILL_S_MAX)
                with self._bed.running(load, "backfill") as outcomes:
                    self._seconds.append(self._backfill(f"again_{number}"))
                advance(1, f"view {number} live after {self._seconds[-1]:.2f} s")
                self._bed.say(steps, "scores beside", outcomes[0])

    def _scores(self, seconds: float) -> Load:
        bodies = id_bodies(self._options.ids.draw(next(self._draws), self._users, _BODIES))
        return self._bed.load(
            _PATH, bodies, connections=32, seconds=seconds, texts=_TEXTS, rate=self._options.rate or _RATE,
            arrivals=self._options.arrivals, seed=next(self._draws),
        )  # fmt: skip

    def _backfill(self, name: str) -> float:
        """Deploy a view by the command; return how long it took to be live, once the deploy had been checked."""
        path, config = self._bed.folder / f"{name}.py", self._bed.config
        path.write_text(_VIEW.format(name=name))
        command = [sys.executable, "-m", "millpond.cluster.cli", "deploy", str(path), "--json", "--name", config.name,
                   "--data-dir", str(config.data_dir)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BACKFILL_S_MAX, check=False)
        if done.returncode != 0:
            raise Unavailable(
                f"`millpond deploy` of `{name}` ended with {done.returncode}: {done.stderr.strip()[-500:]}"
            )
        self._views.append(name)
        return float(json.loads(done.stdout)["backfill_s"])

    # -- check

    def check(self, steps: Steps) -> list[str]:
        wrong = list(self._bed.wrong)
        users = self._options.ids.draw(next(self._draws), self._users, _SAMPLE_USERS).tolist()
        as_of = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
        with steps.step("check", len(users)) as advance, httpx.Client(base_url=self._bed.url, trust_env=False) as http:
            for user in users:
                of_each = [
                    http.get(f"/v1/features/{view}", params={"user_id": user, "as_of": as_of})
                    for view in (reference.user_activity.name, *self._views)
                ]
                if bad := [one.text for one in of_each if one.status_code != 200]:
                    return [*wrong, f"features of user {user} are answered: {bad[0][:300]}"]
                first, *others = [msgspec.json.decode(one.content)["features"] for one in of_each]
                wrong += [
                    f"`{view}` of user {user} is what the view is that was there all the time: {other}, not {first}"
                    for view, other in zip(self._views, others, strict=True)
                    if other != first
                ]
                advance(1, "")
        self._figures["features_compared"] = len(users) * len(self._views) * len(reference.user_activity.features)
        return wrong

    def metrics(self) -> dict[str, Any]:
        outcomes = self._bed.outcomes
        figures = {
            **self._figures,
            **self._bed.settings,
            **latency_figures("alone", outcomes["alone"]),
            **latency_figures("backfill", outcomes["backfill"]),
            "answers_checked": self._bed.checked,
            "failed_requests": self._bed.failed,
            "backfill_s": median_of(self._seconds, 2),
            "events_per_s": round(self._events / float(np.median(self._seconds))),
        }
        figures["score_p99_ratio"] = ratio(figures, "backfill_p99_ms", "alone_p99_ms")
        return {name: figures[name] for name in MEANINGS if name in figures}

    @property
    def evidence(self) -> Evidence:
        return self._bed.evidence()

    def close(self) -> None:
        self._bed.close()


def _pieces(table: pa.Table) -> Iterator[pa.Table]:
    return (table.slice(at, _POST_ROWS) for at in range(0, len(table), _POST_ROWS))


def make(config: Config, options: Options) -> BackfillWorkload:
    return BackfillWorkload(config, options)
