"""Sum: the sum of a field."""

from __future__ import annotations

import math
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Part, Seen


class Total(Part):
    """Sum of the values."""

    words = 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        f[at] = 0.0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        f[at] += value

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        f[at] += newer_f[newer]


class Sum(Aggregation):
    """Sum of a field's values, added tile by tile in time order.

    A sum of huge finite values can overflow to infinity, which is answered as null.
    """

    parts = (Total,)
    formula, empty, error_text = "sum x", "0", "1e-12 sum |x|"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return f[a]

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return math.fsum(x for _, x in seen)

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return 1e-12 * math.fsum(abs(x) for _, x in seen)
