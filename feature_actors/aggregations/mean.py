"""Mean: the arithmetic mean of a field."""

from __future__ import annotations

import math
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Part, Seen
from millpond.feature_actors.aggregations.sum import Total


class Values(Part):
    """Number of values, nulls not counted."""

    words = 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at] = 0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        p[at] += 1

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        p[at] += newer_p[newer]


class Mean(Aggregation):
    """Arithmetic mean of a field's values."""

    parts = (Total, Values)
    formula, empty, error_text = "sum x / n", "NaN", "1e-12 sum |x| / n"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return f[a] / p[b] if p[b] > 0 else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return math.fsum(x for _, x in seen) / len(seen) if seen else math.nan

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return 1e-12 * math.fsum(abs(x) for _, x in seen) / len(seen) if seen else 0.0
