"""Whether something grows: the slope of a series of samples, and how large it may be at most.

A straight line by least squares. Memory goes up and down in waves that are longer than the time between two samples
(collections, snapshots), so neighbouring samples say nearly the same and the usual standard error is far too small. The
error here is Newey and West's, which takes the autocorrelation of the residuals into account, with Bartlett weights
over 1.3 * sqrt(n) neighbours, and the bound uses Kiefer and Vogelsang's critical value for so many neighbours (2.2
errors instead of 1.96).

Sources: Newey and West 1987; Lazarus, Lewis, Stock and Watson 2018; Kiefer and Vogelsang 2005, table 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Growth", "growth"]

_SAMPLES_MIN = 8


@dataclass(frozen=True)
class Growth:
    """Units of the values, per unit of the times. lower, upper: the ends of the 95 % confidence interval."""

    slope: float
    lower: float
    upper: float


def growth(times: Sequence[float], values: Sequence[float]) -> Growth:
    """Return the slope of values over times, with its 95 % confidence interval; NaN of fewer than 8 samples.

    >>> growth(range(100), [3 + 2 * t for t in range(100)]).slope
    2.0
    """
    n = len(times)
    if n < _SAMPLES_MIN:
        return Growth(math.nan, math.nan, math.nan)
    x, y = np.asarray(times, np.float64), np.asarray(values, np.float64)
    x = x - x.mean()
    squares = float(x @ x)
    slope = float(x @ y) / squares
    scores = x * (y - y.mean() - slope * x)
    neighbours = min(n - 1, math.ceil(1.3 * math.sqrt(n)))
    variance = float(scores @ scores)
    for lag in range(1, neighbours):
        variance += 2 * (1 - lag / neighbours) * float(scores[lag:] @ scores[:-lag])
    error = math.sqrt(max(0.0, variance) * n / (n - 2)) / squares
    b = neighbours / n
    half = (1.9600 + 2.9694 * b + 0.4160 * b**2 - 0.5324 * b**3) * error
    return Growth(slope, slope - half, slope + half)
