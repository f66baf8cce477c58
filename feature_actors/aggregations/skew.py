"""Skew: how far a field's values lean to one side."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Part, Seen


class CentralMoments(Part):
    """Number, mean, and sums of the second, third and fourth powers of the deviations from it.

    Values that are all the same have a second one of exactly 0, others have not.

    Source: Pebay, Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical
    moments (Sandia report SAND2008-6212, 2008).
    """

    words = 5

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at] = 0
        for word in range(1, 5):
            f[at + word] = 0.0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        if p[at] == 0:  # powers of a huge value would overflow, and 0 times that is NaN
            p[at] = 1
            f[at + 1] = value
            return
        before = p[at]
        p[at] += 1
        apart = value - f[at + 1]
        step = apart / p[at]
        square = apart * step * before
        f[at + 1] += step
        f[at + 4] += (
            square * (apart * apart * ((before / p[at]) ** 2 - before / p[at] / p[at] + 1.0 / p[at] / p[at]))
            + 6.0 * step * step * f[at + 2]
            - 4.0 * step * f[at + 3]
        )
        f[at + 3] += square * step * (before - 1) - 3.0 * step * f[at + 2]
        f[at + 2] += square

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        older_n, newer_n = p[at], newer_p[newer]
        if older_n == 0:
            p[at] = newer_n
            for word in range(1, 5):
                f[at + word] = newer_f[newer + word]
        elif newer_n > 0:
            older, share = older_n / (older_n + newer_n), newer_n / (older_n + newer_n)
            apart = newer_f[newer + 1] - f[at + 1]
            square = apart * apart * share * older_n
            older_2, newer_2, older_3, newer_3 = f[at + 2], newer_f[newer + 2], f[at + 3], newer_f[newer + 3]
            p[at] = older_n + newer_n
            f[at + 1] += apart * share
            f[at + 2] += newer_2 + square
            f[at + 3] += newer_3 + square * apart * (older - share) + 3.0 * apart * (older * newer_2 - share * older_2)
            f[at + 4] += (
                newer_f[newer + 4]
                + square * (apart * apart * (older * older - older * share + share * share))
                + 6.0 * apart * apart * (older * older * newer_2 + share * share * older_2)
                + 4.0 * apart * (older * newer_3 - share * older_3)
            )


def deviations_of(seen: Seen) -> tuple[list[int], list[int]]:
    """Return n times the values, and n times their deviations from the mean, exactly: in a unit in which all of them
    are whole, and which is of no account in a ratio of moments."""
    values = [Fraction(x) for _, x in seen]
    unit = math.lcm(*(x.denominator for x in values))
    whole = [int(x * unit) for x in values]
    total = sum(whole)
    return [len(whole) * x for x in whole], [len(whole) * x - total for x in whole]


def slack_of(seen: Seen) -> float:
    """Return how far from the exact one a skewness or kurtosis may be."""
    values, deviations = deviations_of(seen)
    if not any(deviations):
        return 0.0
    squares = sum(d**2 for d in deviations)
    condition = math.sqrt(sum(x**2 for x in values) / squares)
    span = max(x for _, x in seen) - min(x for _, x in seen)
    if not 1e-75 <= span <= 1e75 or condition > 1e11:
        return math.inf
    return 1e-12 * condition * (len(seen) * sum(d**4 for d in deviations) / squares**2)


class Skew(Aggregation):
    """Skewness of a field's values, of the population, as `scipy.stats.skew`; NaN where all of them are the same.

    Deviations above 1e75 overflow (the answer is then null), and those below 1e-75 vanish. Of values whose root mean
    square is above 1e11 times their standard deviation, hardly a digit tells them apart, and nothing is promised.
    """

    parts = (CentralMoments,)
    formula, empty = "m_3 / m_2^1.5, m_k = sum (x - mean)^k / n", "NaN"
    error_text = "1e-12 sqrt(sum x^2 / n / m_2) m_4 / m_2^2"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return math.sqrt(p[a] / f[a + 2]) * (f[a + 3] / f[a + 2]) if p[a] > 0 and f[a + 2] > 0.0 else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        _, deviations = deviations_of(seen)
        squares = Decimal(sum(d**2 for d in deviations))
        with localcontext() as exact:
            exact.prec = 50
            cubes = sum(d**3 for d in deviations) * Decimal(len(seen)).sqrt()
            return float(cubes / (squares * squares.sqrt())) if squares else math.nan

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return slack_of(seen)
