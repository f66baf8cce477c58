"""`millpond bench mixed`: scores and events together.

1. Start a cluster of its own with views of two keys; load events of every user.
2. Measure what 32 connections reach of scores alone. Then rounds of an open loop of scores at half of that (or at
   `--rate`), in turns alone and while events are posted: bodies of 500 events, 20 a second.
3. Check: no request failed; the events of all users, and of all items, are in sum those acknowledged; scores of a
   sample are what their features give.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.bench import mixed_load, reference
from millpond.bench.events import EventBodies, json_bodies
from millpond.bench.ledger import read_accounts
from millpond.bench.load import Load
from millpond.bench.options import Options
from millpond.bench.poster import Poster
from millpond.bench.recompute import recomputed_scores
from millpond.bench.testbed import SETTING_MEANINGS, Testbed, id_bodies, latency_figures
from millpond.bench.workload import Evidence, Steps, median_of, ratio
from millpond.cluster.config import Config

__all__ = ["MixedLoad", "MixedWorkload", "make"]

_PATH, _EVENTS_PATH = f"/v1/score/{reference.reference.name}", f"/v1/events/{reference.activity.name}"
_TEXTS = [(b'"model":"reference"', 1), (b'"unknown":[]', 1)]
_BODIES = 50_000
_POST_ROWS = 20_000
_SAMPLE_USERS = 100
#: Bodies a second beside the scores, and events of a body.
_POSTS_PER_S, _POST_EVENTS = 20.0, 500

MEANINGS = {
    "capacity_requests_per_s": "scores alone, closed loop, 32 connections",
    "score_rate_per_s": "open loop of scores",
    "score_p99_mixed_vs_alone_ratio": "p99 of scores while events are posted / alone",
    **{f"alone_{q}_ms": "" for q in ("p50", "p90", "p99", "p999", "max")},
    **{f"mixed_{q}_ms": "" for q in ("p50", "p90", "p99", "p999", "max")},
    "events_per_s": "posted meanwhile, acknowledged",
    "events_p50_ms": "a body of events, since it was due",
    "events_p99_ms": "",
    "acked_events": "all events of the run; as many are in the views of either key",
    "failed_requests": "of scores and of bodies of events",
    "answers_checked": "status, model and unknown views of each",
    "scores_recomputed": "from /v1/features",
    "users": "",
    "items": "",
    **SETTING_MEANINGS,
}
MEANINGS["alone_p50_ms"] = "scores alone, since they were due"
MEANINGS["mixed_p50_ms"] = "scores while events are posted"


class MixedLoad:
    """Events and scores of fixed users and items, on a testbed with the definition `mixed_load`; counts what was
    acknowledged. Used by `soak`, too."""

    def __init__(self, bed: Testbed, options: Options, users: int, items: int) -> None:
        self.bed, self._options, self.users, self.items = bed, options, users, items
        self._seed = options.seed or 0
        self._draws = itertools.count(self._seed * 1_000_003)
        self.posters: list[Poster] = []
        self.loaded_events = 0

    def post_tables(self, steps: Steps, tables: Iterator[pa.Table], events: int) -> None:
        """Load events in bulk, in their order."""
        self.bed.post_tables(steps, "load events", reference.activity.name, tables, events)
        self.loaded_events += events

    def scores(self, **settings: Any) -> Load:
        ids = self._options.ids.draw(next(self._draws), self.users, _BODIES)
        if "rate" in settings:  # it ends by time, however long that is
            due = settings["rate"] * (settings["seconds"] + settings.get("warm_seconds", 0.0))
            settings["answers_max"] = 1_000 + 2 * int(due)
        return self.bed.load(
            _PATH, id_bodies(ids), connections=32, texts=_TEXTS, arrivals=self._options.arrivals,
            seed=next(self._draws), **settings,
        )  # fmt: skip

    def poster(self, per_s: float, events: int) -> Poster:
        """Return a poster of bodies of so many events of now."""
        bodies = self._bodies_of_now(len(self.posters), events)
        poster = Poster(self.bed.url, _EVENTS_PATH, bodies, content_type="application/json", per_s=per_s)
        self.posters.append(poster)
        return poster

    def _bodies_of_now(self, number: int, events: int) -> Iterator[bytes]:
        draw = np.random.default_rng([self._seed, number])
        for body in itertools.count():
            ids = [f"now-{number}-{body}-{n}" for n in range(events)]
            now_ms = int(time.time() * 1000)
            yield json_bodies(event_table(draw, ids, self.users, self.items, np.full(events, now_ms - 1)), events)[0]

    # -- check

    @property
    def acked(self) -> int:
        return self.loaded_events + sum(poster.accepted for poster in self.posters)

    @property
    def failed_requests(self) -> int:
        return self.bed.failed + sum(poster.failed for poster in self.posters)

    def problems(self, steps: Steps) -> list[str]:
        """Return what is wrong: with requests, with what the accounts count, and with scores of a sample."""
        wrong = [*self.bed.wrong, *(problem for poster in self.posters for problem in poster.problems)]
        with steps.step("check", self.users + self.items + _SAMPLE_USERS) as advance:
            items = [f"item-{i}" for i in range(self.items)]
            for model, key, ids in (
                ("user_account", "user_id", list(range(self.users))),
                ("item_account", "item_id", items),
            ):
                found = read_accounts(self.bed.url, model, key, ids, lambda n: advance(n, ""))
                if (events := int(found[:, 0].sum())) != self.acked:
                    wrong.append(
                        f"every acknowledged event is counted once: {self.acked} were acknowledged, `{model}` counts "
                        f"{events}"
                    )
            keys = [
                {"user_id": u} for u in self._options.ids.draw(next(self._draws), self.users, _SAMPLE_USERS).tolist()
            ]
            wrong += recomputed_scores(
                self.bed.url, reference.reference, reference.reference.predictor(), keys, lambda n: advance(n, "")
            )
        return wrong

    def figures(self) -> dict[str, Any]:
        took = [ms for poster in self.posters for ms in poster.took_ms]
        return {
            "acked_events": self.acked,
            "failed_requests": self.failed_requests,
            "answers_checked": self.bed.checked,
            "scores_recomputed": _SAMPLE_USERS,
            "users": self.users,
            "items": self.items,
            "events_p50_ms": round(float(np.quantile(took, 0.5, method="inverted_cdf")), 3),
            "events_p99_ms": round(float(np.quantile(took, 0.99, method="inverted_cdf")), 3),
            "ids": str(self._options.ids),
            **self.bed.settings,
        }

    def close(self) -> None:
        for poster in self.posters:
            poster.stop()
        self.bed.close()


def event_table(
    draw: np.random.Generator, ids: list[str], users: int, items: int, times_ms: npt.NDArray[np.int64]
) -> pa.Table:
    """Return events at these times, of users and items drawn uniformly, as the columns of the source."""
    n = len(ids)
    item = draw.integers(0, items, n)
    return pa.table(
        {
            "event_id": pa.array(ids),
            "user_id": pa.array(draw.integers(0, users, n)),
            "item_id": pa.array([f"item-{i}" for i in item.tolist()]),
            "category": pa.array([f"category-{i % 20:02d}" for i in item.tolist()]),
            "amount": pa.array(draw.integers(1, 100, n).astype(np.float64)),
            "event_time": pa.array(times_ms).cast(pa.timestamp("ms", tz="UTC")),
        }
    )


class MixedWorkload:
    """Scores and events together, and scores alone."""

    name = "mixed"
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, options: Options) -> None:
        self._options, self.seed = options, options.seed or 0
        users, self._events = (2_000, 20_000) if options.quick else (reference.USERS, reference.EVENTS)
        items = 100 if options.quick else 10_000
        self._mixed = MixedLoad(Testbed(config, [Path(mixed_load.__file__)]), options, users, items)
        self._rate = 0.0

    def setup(self, steps: Steps) -> None:
        mixed = self._mixed
        mixed.bed.start(steps)
        mixed.post_tables(steps, self._tables(), self._events)

    def _tables(self) -> Iterator[pa.Table]:
        """Yield events of every user, in the last seven days."""
        users = self._mixed.users
        made = EventBodies(self.seed, int(time.time() * 1000), users=users, items=self._mixed.items)
        for at in range(0, self._events, _POST_ROWS):
            table = made.table(min(_POST_ROWS, self._events - at))
            if at < users:  # every user has one at least
                ids = (np.arange(at, at + len(table)) % users).astype(np.int64)
                table = table.set_column(table.column_names.index("user_id"), "user_id", pa.array(ids))
            yield table

    def start(self, steps: Steps) -> None:
        mixed, bed, options = self._mixed, self._mixed.bed, self._options
        seconds = options.measured_seconds
        with steps.step("scores alone, closed loop"):
            bed.run(mixed.scores(seconds=min(1.0, seconds)))
            capacity = bed.run(mixed.scores(seconds=seconds), "closed")
            bed.say(steps, "closed", capacity)
        self._rate = options.rate or round(capacity.requests_per_s / 2, 1)
        with steps.step(f"open loop at {self._rate:,.0f}/s", 2 * options.measured_rounds) as advance:
            for r in range(options.measured_rounds):
                for name in ("alone", "mixed") if r % 2 == 0 else ("mixed", "alone"):
                    load = mixed.scores(seconds=seconds, rate=self._rate)
                    poster = None
                    if name == "mixed":
                        poster = mixed.poster(_POSTS_PER_S, _POST_EVENTS)
                        poster.start()
                    try:
                        outcome = bed.run(load, name)
                    finally:
                        if poster is not None:
                            poster.stop()
                    advance(1, name)
                    bed.say(steps, name, outcome)

    def check(self, steps: Steps) -> list[str]:
        return self._mixed.problems(steps)

    def metrics(self) -> dict[str, Any]:
        outcomes = self._mixed.bed.outcomes
        figures = {
            **latency_figures("alone", outcomes["alone"]),
            **latency_figures("mixed", outcomes["mixed"]),
            **self._mixed.figures(),
            "capacity_requests_per_s": median_of([o.requests_per_s for o in outcomes["closed"]], 1),
            "score_rate_per_s": self._rate,
            "measured_seconds": self._options.measured_seconds,
            "rounds": self._options.measured_rounds,
        }
        rates = [p.accepted / o.wall_seconds for p, o in zip(self._mixed.posters, outcomes["mixed"], strict=True)]
        figures["events_per_s"] = round(median_of(rates, 0))
        figures["score_p99_mixed_vs_alone_ratio"] = ratio(figures, "mixed_p99_ms", "alone_p99_ms")
        return {name: figures[name] for name in MEANINGS if name in figures}

    @property
    def evidence(self) -> Evidence:
        return self._mixed.bed.evidence({"open loop, since due": ["alone", "mixed"], "closed loop": ["closed"]})

    def close(self) -> None:
        self._mixed.close()


def make(config: Config, options: Options) -> MixedWorkload:
    return MixedWorkload(config, options)
