"""Std: the standard deviation of a field."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Part, Seen


class Moments(Part):
    """Number, mean and sum of squared deviations from it, by Welford's update and the merge of Chan, Golub and
    LeVeque (1979): no difference of two large sums is ever taken."""

    words = 3

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at] = 0
        f[at + 1] = 0.0
        f[at + 2] = 0.0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        p[at] += 1
        before = value - f[at + 1]
        f[at + 1] += before / p[at]
        f[at + 2] += before * (value - f[at + 1])

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        older_n, newer_n = p[at], newer_p[newer]
        if older_n == 0:  # the square of a huge value would overflow, and 0 times that is NaN
            p[at] = newer_n
            f[at + 1] = newer_f[newer + 1]
            f[at + 2] = newer_f[newer + 2]
        elif newer_n > 0:
            share = newer_n / (older_n + newer_n)
            apart = newer_f[newer + 1] - f[at + 1]
            p[at] = older_n + newer_n
            f[at + 1] += apart * share
            f[at + 2] += newer_f[newer + 2] + apart * apart * share * older_n


class Std(Aggregation):
    """Standard deviation of a field's values, of the population (`ddof=0`, as NumPy's): 0 for a single value.

    Deviations above 1e153 overflow (the answer is then null), and those below 1e-153 vanish.
    """

    parts = (Moments,)
    formula, empty, error_text = "sqrt(sum (x - mean)^2 / n)", "NaN", "1e-12 sum x^2 / n, of the square"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return math.sqrt(f[a + 2] / p[a]) if p[a] > 0 else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        if not seen:
            return math.nan
        values = [Fraction(x) for _, x in seen]
        mean = sum(values, Fraction()) / len(values)
        variance = sum(((x - mean) ** 2 for x in values), Fraction()) / len(values)
        with localcontext() as exact:
            exact.prec = 50
            return float((Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt())

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        if max((abs(x) for _, x in seen), default=0) > 1e153:
            return math.inf
        of_square = 1e-12 * math.fsum(x * x for _, x in seen) / max(len(seen), 1)
        std = self.plain(seen, as_of_ms)
        return 1e-153 + (of_square / std if std**2 > of_square else math.sqrt(of_square))
