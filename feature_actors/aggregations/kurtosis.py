"""Kurtosis: how heavy the tails of a field's values are."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Seen
from millpond.feature_actors.aggregations.skew import CentralMoments, deviations_of, slack_of


class Kurtosis(Aggregation):
    """Excess kurtosis of a field's values, of the population, as `scipy.stats.kurtosis`: 0 for a normal distribution,
    NaN where all of them are the same.

    Its limits are those of `Skew`, with which it shares all that is kept.
    """

    parts = (CentralMoments,)
    formula, empty = "m_4 / m_2^2 - 3, m_k = sum (x - mean)^k / n", "NaN"
    error_text = "1e-12 sqrt(sum x^2 / n / m_2) m_4 / m_2^2"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return p[a] * (f[a + 4] / f[a + 2] / f[a + 2]) - 3.0 if p[a] > 0 and f[a + 2] > 0.0 else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        _, deviations = deviations_of(seen)
        squares = sum(d**2 for d in deviations)
        return float(Fraction(len(seen) * sum(d**4 for d in deviations), squares**2) - 3) if squares else math.nan

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return slack_of(seen)
