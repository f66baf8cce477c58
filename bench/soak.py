"""`millpond bench soak`: many minutes of scores and events on a fixed set of entities, and whether memory grows.

1. Start a cluster of its own. Load so many events of every user and item that each tile of each window has one, and
   older ones beyond: from then on a new tile comes only where an old one goes, and the state is as large as it gets.
   Event ids are remembered for a minute instead of a day, snapshots and parts of the history are small, so that a run
   sees all of them come and go many times.
2. Warm up under the very load that follows: longer than ids are remembered.
3. So many minutes of scores in an open loop and of bodies of events at a rate, of the same users and items. Every
   second take the memory of the replicas and of the shards (PSS, without the pages of programs and libraries on disk:
   how many processes of the machine share those comes and goes).
4. Check: no request failed; no process was restarted; the events of all users, and of all items, are in sum those
   acknowledged; scores went on to the end; those of a sample are what their features give.

Growth: the upper end of the 95 % interval of the slope of a straight line, see `growth`, through the median of each
minute. A snapshot or a part of the history takes some MB for a few seconds every few minutes: by chance there are more
of them in one half of a run, and that is no growth. What is taken at most is said beside.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from millpond.bench import mixed_load
from millpond.bench.growth import Growth, growth, medians
from millpond.bench.mixed import MixedLoad, event_table
from millpond.bench.options import Options
from millpond.bench.processes import MemorySamples
from millpond.bench.testbed import REPLICAS, SETTING_MEANINGS, SHARDS, Testbed, latency_figures
from millpond.bench.workload import Evidence, Series, Steps
from millpond.cluster.config import Config

__all__ = ["SoakWorkload", "filling_times_ms", "make"]

_MINUTE_MS, _HOUR_MS, _DAY_MS = 60_000, 3_600_000, 86_400_000
#: The widths of the tiles of windows of 1 h, 24 h and 7 d, how far back each is filled, a margin included.
_FILLED = ((_MINUTE_MS, 2 * _HOUR_MS), (20 * _MINUTE_MS, 2 * _DAY_MS), (2 * _HOUR_MS, 8 * _DAY_MS))
_SCORES_PER_S = 400.0
_POSTS_PER_S, _POST_EVENTS = 10.0, 100
_ROWS = 20_000
#: Arrivals are at random, and a short run has few of them.
_ANSWERED_MIN = 0.8
#: Into so many spans a run of fewer minutes is divided.
_SPANS_MIN = 20
_CHANGES = {
    "dedupe_horizon": "1m", "dedupe_horizon_min": "1m", "snapshot_mb": 16, "history_part_mb": 16,
}  # fmt: skip

MEANINGS = {
    "minutes": "under load, after the warm-up",
    "replica_growth_mb_per_h": "of the replicas' memory at most: upper end of the 95 % interval of the slope",
    "replica_slope_mb_per_h": "the slope itself",
    "replica_mb": "memory of the replicas: median of the last minute, or twentieth of the run",
    "replica_peak_mb": "at most in a second",
    "shard_growth_mb_per_h": "of the shards' memory at most",
    "shard_slope_mb_per_h": "",
    "shard_mb": "",
    "shard_peak_mb": "",
    "samples": "of memory",
    "score_p50_ms": "since it was due",
    "score_p90_ms": "",
    "score_p99_ms": "",
    "score_p999_ms": "",
    "score_max_ms": "",
    "failed_requests": "of scores and of bodies of events",
    "scores_per_s": "open loop",
    "scores": "answered",
    "events_per_s": "posted, acknowledged",
    "events_p50_ms": "a body of events, since it was due",
    "events_p99_ms": "",
    "acked_events": "all events of the run; as many are in the views of either key",
    "scores_recomputed": "from /v1/features",
    "warm_minutes": "before, under the same load",
    "users": "",
    "items": "",
    **SETTING_MEANINGS,
}


def filling_times_ms(now_ms: int) -> list[int]:
    """Return times, oldest first, of which every tile of every window has one, up to now."""
    times: set[int] = set()
    for width_ms, back_ms in _FILLED:
        first = (now_ms - back_ms) // width_ms
        times |= {n * width_ms for n in range(first, now_ms // width_ms + 1)}
    return sorted(times)


class SoakWorkload:
    """Many minutes of scores and events on a fixed set of entities."""

    name = "soak"
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, options: Options) -> None:
        self._options, self.seed = options, options.seed or 0
        self._minutes, self._warm_minutes = (0.05, 0.02) if options.quick else (options.minutes, 8.0)
        users, items = (100, 20) if options.quick else (2_000, 500)
        self._mixed = MixedLoad(Testbed(config, [Path(mixed_load.__file__)], **_CHANGES), options, users, items)
        self._rate = options.rate or _SCORES_PER_S
        groups = {"replicas": REPLICAS, "shards": SHARDS}
        self._samples = MemorySamples(groups, 0.1 if options.quick else 1.0, "Pss_Anon|Pss_Shmem")
        self._events_per_s = 0.0

    def setup(self, steps: Steps) -> None:
        self._mixed.bed.start(steps)
        times = filling_times_ms(int(time.time() * 1000) - 1_000)
        self._mixed.post_tables(steps, self._filling(times), len(times) * self._mixed.users)

    def _filling(self, times_ms: list[int]) -> Iterator[pa.Table]:
        """Yield an event of each user at each time, in their order; each item has some at each time, too."""
        mixed, draw = self._mixed, np.random.default_rng(self.seed)
        each = max(1, _ROWS // mixed.users)
        for at in range(0, len(times_ms), each):
            part = times_ms[at : at + each]
            n = len(part) * mixed.users
            table = event_table(
                draw, [f"fill-{at}-{i}" for i in range(n)], mixed.users, mixed.items, np.repeat(part, mixed.users)
            )
            users = np.tile(np.arange(mixed.users), len(part))
            table = table.set_column(1, "user_id", pa.array(users))
            table = table.set_column(2, "item_id", pa.array([f"item-{u % mixed.items}" for u in users.tolist()]))
            yield table

    def start(self, steps: Steps) -> None:
        mixed, bed = self._mixed, self._mixed.bed
        warm_s, seconds = self._warm_minutes * 60, self._minutes * 60
        poster = mixed.poster(_POSTS_PER_S, _POST_EVENTS)
        poster.start()
        try:
            with (
                steps.step("soak", warm_s + seconds) as advance,
                bed.running(mixed.scores(seconds=seconds, warm_seconds=warm_s, rate=self._rate), "scores") as outcomes,
            ):
                self._wait(warm_s, "warm", advance)
                accepted = poster.accepted
                self._samples.start()
                self._wait(seconds, "", advance)
                self._events_per_s = (poster.accepted - accepted) / seconds
                self._samples.stop()
        finally:
            if self._samples.is_alive():
                self._samples.stop()
            poster.stop()
        bed.say(steps, "scores", outcomes[0])

    def _wait(self, seconds: float, what: str, advance: Any) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
            last = {group: mb[-1] for group, mb in self._samples.mb.items() if mb}
            advance(min(1.0, left), what or ", ".join(f"{group} {mb:,.1f} MB" for group, mb in last.items()))

    def check(self, steps: Steps) -> list[str]:
        wrong = self._mixed.problems(steps)
        for group, pids in self._samples.processes.items():
            config = self._mixed.bed.config
            expected = config.shards if group == "shards" else 2 * config.replicas
            if len(pids) != expected:
                wrong.append(f"no process is started anew: {expected} {group} are expected, {len(pids)} were seen")
        (outcome,) = self._mixed.bed.outcomes["scores"]
        if outcome.answers < (due := self._rate * self._minutes * 60) * _ANSWERED_MIN:
            wrong.append(f"scores go on to the end: {due:,.0f} were due, {outcome.answers:,} were answered")
        return wrong

    def _minutes_of(self, group: str) -> tuple[list[float], list[float]]:
        """Return the memory of a group in each minute of the run: hours since the first sample, MB."""
        hours = [t / 3_600 for t in self._samples.times_s]
        return medians(hours, self._samples.mb[group], max(_SPANS_MIN, round(self._minutes)))

    def _growth(self, group: str) -> Growth:
        return growth(*self._minutes_of(group))

    def metrics(self) -> dict[str, Any]:
        (outcome,) = self._mixed.bed.outcomes["scores"]
        figures: dict[str, Any] = {
            **self._mixed.figures(),
            **latency_figures("score", [outcome]),
            "minutes": self._minutes,
            "warm_minutes": self._warm_minutes,
            "samples": len(self._samples.times_s),
            "scores_per_s": self._rate,
            "scores": outcome.answers,
            "events_per_s": round(self._events_per_s, 1),
        }
        for group, name in (("replicas", "replica"), ("shards", "shard")):
            found = self._growth(group)
            figures[f"{name}_growth_mb_per_h"] = round(found.upper, 2)
            figures[f"{name}_slope_mb_per_h"] = round(found.slope, 2)
            figures[f"{name}_mb"] = round(self._minutes_of(group)[1][-1], 1)
            figures[f"{name}_peak_mb"] = round(max(self._samples.mb[group]), 1)
        return {name: figures[name] for name in MEANINGS if name in figures}

    @property
    def evidence(self) -> Evidence:
        series = {
            f"Memory of the {group}": Series(self._samples.times_s, mb, "MB", self._growth(group).slope)
            for group, mb in self._samples.mb.items()
        }
        return Evidence(outcomes=self._mixed.bed.outcomes, series=series)

    def close(self) -> None:
        self._mixed.close()


def make(config: Config, options: Options) -> SoakWorkload:
    return SoakWorkload(config, options)
