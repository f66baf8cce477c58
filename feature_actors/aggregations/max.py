"""Max: the largest value of a field."""

from __future__ import annotations

import math
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Part, Seen


class Largest(Part):
    """Largest value; NaN before there is one."""

    words = 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        f[at] = math.nan

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        if not f[at] >= value:
            f[at] = value

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        if not f[at] >= newer_f[newer] and not math.isnan(newer_f[newer]):
            f[at] = newer_f[newer]


class Max(Aggregation):
    """Largest value of a field, as float64."""

    parts = (Largest,)
    formula, empty = "max x", "NaN"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return f[a]

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return max((x for _, x in seen), default=math.nan)
