"""DecayedMean: the mean of a field in which the past counts ever less."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Column, Part, Seen
from millpond.feature_actors.aggregations.decayed_sum import (
    DecayedSum,
    DecayedTotal,
    add_decayed,
    clear_decayed,
    decayed_size,
    decayed_sum,
    merge_decayed,
)
from millpond.feature_actors.aggregations.input import Input


class DecayedValues(Part):
    """Number of values, nulls not counted, each decayed by its age; the setting is the half-life in ms."""

    words = 2

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        clear_decayed(p, f, at)

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        add_decayed(p, f, at, s, 1.0, time)

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        merge_decayed(p, f, at, newer_p, newer_f, newer)


@dataclass(frozen=True, eq=False)
class DecayedMean(DecayedSum):
    """Mean of a field's values, weighted by age: a value one half-life older than another counts half as much.

    half_life: a length from `"1s"` to `"3660d"`. Between events it stays as it is. A mean of huge finite values can
    overflow, which is answered as null; what is below 1e-300 vanishes.
    """

    parts = (DecayedTotal, DecayedValues)
    formula, empty, error_text = "sum w x / sum w, w = 2^(t / half_life)", "NaN", "1e-12 sum w |x| / sum w"

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(part, Input(self.field or ""), setting=self.half_life_ms) for part in self.parts)

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        # Both are as of one time, that of the newest value, whose own weight is never lost.
        return f[a] / f[b] if f[b] > 0.0 else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        newest = max((t for t, _ in seen), default=0)
        weights = decayed_sum([(t, 1) for t, _ in seen], newest, self.half_life_ms)
        return float(decayed_sum(seen, newest, self.half_life_ms) / weights) if seen else math.nan

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        newest = max((t for t, _ in seen), default=0)
        sizes = decayed_size(seen, newest, self.half_life_ms)
        weights = decayed_size([(t, 1) for t, _ in seen], newest, self.half_life_ms)
        return 1e-12 * sizes / weights + 1e-300 if seen else 0.0
