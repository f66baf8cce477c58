"""Entropy: how evenly events are spread over some categories."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Seen
from millpond.feature_actors.aggregations.count_by import CountBy


@dataclass(frozen=True, eq=False)
class Entropy(CountBy):
    """Shannon entropy in bits of the shares of some categories, and of all others together; NaN without an event.

    categories: values of the field, strings or integers. A `CountBy` of the same ones is kept with it.
    """

    gives_numbers = True
    formula, empty, error_text = "-sum n(c) / n log2(n(c) / n)", "NaN", "1e-12"

    @property
    def width(self) -> int:
        return 1

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        total, bits = 0.0, 0.0
        for place in range(a, a + n):
            total += float(max(p[place], 0))  # which may be torn
        for place in range(a, a + n):
            if p[place] > 0:
                bits -= p[place] / total * math.log2(p[place] / total)
        return bits if total > 0 else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> Any:
        counts = Counter(x if x in self.categories else None for _, x in seen)
        shares = [n / len(seen) for n in counts.values()]
        return math.fsum(-share * math.log2(share) for share in shares) + 0.0 if shares else math.nan

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return 1e-12 if seen else 0.0
