"""Min: the smallest value of a field."""

from __future__ import annotations

import math
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Part, Seen


class Smallest(Part):
    """Smallest value; NaN before there is one."""

    words = 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        f[at] = math.nan

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        if not f[at] <= value:
            f[at] = value

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        if not f[at] <= newer_f[newer] and not math.isnan(newer_f[newer]):
            f[at] = newer_f[newer]


class Min(Aggregation):
    """Smallest value of a field, as float64."""

    parts = (Smallest,)
    formula, empty = "min x", "NaN"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return f[a]

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return min((x for _, x in seen), default=math.nan)
