"""First: the oldest value of a field."""

from __future__ import annotations

import math
from typing import Any

from millpond.feature_actors.aggregations.aggregation import AFTER_ALL, Aggregation, Part, Seen


class Oldest(Part):
    """Time and value of the oldest event that has one."""

    words, value_words = 2, (1,)

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at] = AFTER_ALL
        f[at + 1] = math.nan

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        if time < p[at]:
            p[at] = time
            f[at + 1] = value

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        if newer_p[newer] < p[at]:
            p[at] = newer_p[newer]
            f[at + 1] = newer_f[newer + 1]


class First(Aggregation):
    """Value of the oldest event that has one, a number or a string; of two at one millisecond, of the one applied
    earlier."""

    parts, takes = (Oldest,), "value"
    formula, empty = "x of the smallest t", "NaN; None for strings"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return f[a + 1]

    def plain(self, seen: Seen, as_of_ms: int) -> Any:
        oldest = min((t for t, _ in seen), default=None)
        return next((x for t, x in seen if t == oldest), math.nan)
