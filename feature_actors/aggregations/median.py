"""Median: the value in the middle of a field's values, by the sketch of `Quantile`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from millpond.feature_actors.aggregations.quantile import Quantile


@dataclass(frozen=True, eq=False)
class Median(Quantile):
    """The value in the middle of a field's values, or half-way between the two there, each to a relative error.

    It is the `Quantile` of q = 0.5, with the same error, m and memory.
    """

    q: float = dataclasses.field(default=0.5, init=False)
