"""Trend: how fast a field rises or falls."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Part, Seen

DAY_MS = 86_400_000


class Line(Part):
    """Number of values, time of one of them, means of the days since then and of the values, and sums of the squared
    deviations of the days and of the products of both deviations, by Welford's update and the merge of Chan, Golub and
    LeVeque (1979): times are only ever subtracted as integers, and no difference of two large sums is taken.

    Source: Pebay, Formulas for robust, one-pass parallel computation of covariances (2008).
    """

    words = 6

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at] = 0
        p[at + 1] = 0
        for word in range(2, 6):
            f[at + word] = 0.0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        if p[at] == 0:
            p[at] = 1
            p[at + 1] = time
            f[at + 3] = value
            return
        p[at] += 1
        days = (time - p[at + 1]) / DAY_MS
        before = days - f[at + 2]
        f[at + 2] += before / p[at]
        f[at + 3] += (value - f[at + 3]) / p[at]
        f[at + 4] += before * (days - f[at + 2])
        f[at + 5] += before * (value - f[at + 3])

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        older_n, newer_n = p[at], newer_p[newer]
        if older_n == 0:
            p[at] = newer_n
            p[at + 1] = newer_p[newer + 1]
            for word in range(2, 6):
                f[at + word] = newer_f[newer + word]
        elif newer_n > 0:
            share = newer_n / (older_n + newer_n)
            days = (newer_p[newer + 1] - p[at + 1]) / DAY_MS + newer_f[newer + 2] - f[at + 2]
            apart = newer_f[newer + 3] - f[at + 3]
            p[at] = older_n + newer_n
            f[at + 2] += days * share
            f[at + 3] += apart * share
            f[at + 4] += newer_f[newer + 4] + days * days * share * older_n
            f[at + 5] += newer_f[newer + 5] + days * apart * share * older_n


class Trend(Aggregation):
    """Slope per day of the line of least squares through a field's values over event time; NaN where there are not two
    different times.

    Of values of which sum |x|, times the days between the first and the last, is above 1e307, a product can overflow
    (the answer is then null); a slope below 1e-300 vanishes.
    """

    parts = (Line,)
    formula, empty = "sum (t - mean t)(x - mean x) / sum (t - mean t)^2, t in days", "NaN"
    error_text = "1e-12 sqrt(sum x^2 / sum (t - mean t)^2)"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return f[a + 5] / f[a + 4] if p[a] > 1 and f[a + 4] > 0.0 else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        if len({t for t, _ in seen}) < 2:
            return math.nan
        mean = Fraction(sum(t for t, _ in seen), len(seen))
        squares = sum(((t - mean) ** 2 for t, _ in seen), Fraction())
        return float(sum(((t - mean) * Fraction(x) for t, x in seen), Fraction()) / squares * DAY_MS)

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        times = [t - seen[0][0] for t, _ in seen]
        squares = len(times) * sum(t * t for t in times) - sum(times) ** 2
        if squares == 0:
            return 0.0
        days = (max(times) - min(times)) / DAY_MS
        if math.fsum(abs(x) / 1e307 for _, x in seen) * max(days, 1) > 1:
            return math.inf
        return 1e-12 * math.hypot(*(x for _, x in seen)) / (math.sqrt(squares / len(times)) / DAY_MS) + 1e-300
