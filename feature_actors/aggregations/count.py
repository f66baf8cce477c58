"""Count: how many events."""

from __future__ import annotations

from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Part, Seen


class Events(Part):
    """Number of events."""

    takes_input, words = False, 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at] = 0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        p[at] += 1

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        p[at] += newer_p[newer]


class Count(Aggregation):
    """Number of events, whether their fields are null or not."""

    parts, takes = (Events,), "event"
    formula, empty = "n", "0"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return float(p[a])

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return float(len(seen))
