"""Random programs for streaks and sessions: events as they arrive, and how far from its definition an answer is.

They are near the edges: breaks of a gap and of a millisecond more, days that are missing one by one, events at one
millisecond, and orders of arrival from none late to all in reverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from millpond.bench.program import Program
from millpond.feature_actors import Sessions, SessionSeconds, Streak, StreakDays
from millpond.feature_actors.aggregations import Aggregation

__all__ = ["programs"]

_DAY, _NOW = 86_400_000, 1_700_000_000_000
_EVENTS_MAX = 600


def programs(random: np.random.Generator) -> Iterator[Program]:
    """Yield programs for ever, of one aggregation after the other: the same ones for the same seed."""
    while True:
        for make in (_streak_days, _streak, _sessions):
            times, aggregation = make(random)
            as_of = int(times.max(initial=_NOW)) + int(random.choice([0, 1, 1_000, _DAY // 2, _DAY]))
            if aggregation.window_ms is not None:
                times = times[times > as_of - aggregation.window_ms]
            times = _as_they_arrive(times, random)
            share = random.choice([0.3, 0.9, 0.99])
            values = [bool(v) if aggregation.inputs else None for v in random.random(len(times)) < share]
            yield Program(aggregation, list(zip(times.tolist(), values, strict=True)), as_of)


_Times = npt.NDArray[np.int64]


def _as_they_arrive(times: _Times, random: np.random.Generator) -> _Times:
    """Put times in an order of arrival: in time, some late, in reverse, or any."""
    times = np.sort(times)[-_EVENTS_MAX:]
    match random.integers(5):
        case 0:
            return times
        case 1:
            return times[::-1]
        case 2:
            return random.permutation(times)
        case _:
            late = random.random(len(times)) < random.choice([0.02, 0.3])
            behind = np.where(late, random.exponential(random.choice([2.0, 50.0]), len(times)), 0)
            return times[np.argsort(np.arange(len(times)) + behind, kind="stable")]


def _streak_days(random: np.random.Generator) -> tuple[_Times, Aggregation]:
    n = int(random.choice([1, 7, 63, 64, 366]))
    days = np.flatnonzero(random.random(random.integers(2 * n + 10)) < random.choice([0.8, 0.98, 0.998]))
    at = np.repeat(days, random.integers(1, 3, len(days))) * _DAY
    times = at + random.integers(_DAY, size=len(at)) + _NOW // _DAY * _DAY
    return times, StreakDays(n=n, **_over(random, ["30d", "90d", "730d"]))


def _streak(random: np.random.Generator) -> tuple[_Times, Aggregation]:
    n = int(random.choice([1, 8, 32, 256]))
    steps = random.choice([0, 1, 50, 60_000], random.integers(2 * n + 20))
    return _NOW + np.cumsum(steps), Streak(of=pc.field("holds"), n=n, **_over(random, ["1s", "1h", "24h"]))


def _sessions(random: np.random.Generator) -> tuple[_Times, Aggregation]:
    gap = str(random.choice(["1s", "30m", "2d"]))
    kind = (Sessions, SessionSeconds)[int(random.integers(2))]
    made = kind(gap=gap, n=int(random.choice([1, 2, 8, 32])), **_over(random, ["60s", "24h", "30d"]))
    size = random.integers(200)
    within = random.choice([1, made.gap_ms // 3, made.gap_ms], size)
    breaks = made.gap_ms + random.choice([1, 2, made.gap_ms], size)
    steps = np.where(random.random(size) < random.choice([0.1, 0.5, 0.9]), breaks, within)
    return _NOW + np.cumsum(steps), made


def _over(random: np.random.Generator, windows: list[str]) -> dict[str, Any]:
    """Draw over what: a lifetime, or a window, which may be exact."""
    if random.integers(2):
        return {}
    return {"window": str(random.choice(windows)), "exact": bool(random.integers(2))}
