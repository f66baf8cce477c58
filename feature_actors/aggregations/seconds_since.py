"""SecondsSince: how long ago the newest event was."""

from __future__ import annotations

import math
from typing import Any

from millpond.feature_actors.aggregations.aggregation import NEVER, Aggregation, Part, Seen


class NewestTime(Part):
    """Time of the newest event."""

    takes_input, words = False, 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at] = NEVER

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        p[at] = max(p[at], time)

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        p[at] = max(p[at], newer_p[newer])


class SecondsSince(Aggregation):
    """Seconds from the newest event seen to as-of, to the millisecond."""

    parts, takes = (NewestTime,), "event"
    formula, empty = "(as_of - max t) / 1000", "NaN"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return (as_of - p[a]) / 1000.0 if p[a] != NEVER else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return (as_of_ms - max(t for t, _ in seen)) / 1000 if seen else math.nan
