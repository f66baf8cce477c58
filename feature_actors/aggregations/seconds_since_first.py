"""SecondsSinceFirst: how long ago the oldest event was."""

from __future__ import annotations

import math
from typing import Any

from millpond.feature_actors.aggregations.aggregation import AFTER_ALL, Aggregation, Part, Seen


class OldestTime(Part):
    """Time of the oldest event."""

    takes_input, words = False, 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at] = AFTER_ALL

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        p[at] = min(p[at], time)

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        p[at] = min(p[at], newer_p[newer])


class SecondsSinceFirst(Aggregation):
    """Seconds from the oldest event seen to as-of, to the millisecond."""

    parts, takes = (OldestTime,), "event"
    formula, empty = "(as_of - min t) / 1000", "NaN"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return (as_of - p[a]) / 1000.0 if p[a] != AFTER_ALL else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return (as_of_ms - min(t for t, _ in seen)) / 1000 if seen else math.nan
