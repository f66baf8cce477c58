"""SessionSeconds: how long sessions are."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Seen
from millpond.feature_actors.aggregations.sessions import COUNT, TOTAL, Sessions


class SessionSeconds(Sessions):
    """Mean length of the sessions in seconds, from first to last event: 0 for one of a single event.

    They are those of `Sessions` of the same gap and n, from the same memory. Each event that is not looked at leaves
    their total too short by no more than twice the gap.
    """

    formula, empty = "sum(t[i + 1] - t[i] <= gap) / 1000 / sessions", "NaN"
    error_text = "none; 2 gap of the sum and 1 of sessions for each such event"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return p[a + TOTAL] / p[a + COUNT] / 1000.0 if p[a + COUNT] > 0 else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        times = sorted(t for t, _ in seen)
        total = sum(b - a for a, b in pairwise(times) if b - a <= self.gap_ms)
        return total / super().plain(seen, as_of_ms) / 1000 if times else math.nan

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        missed = self.missed(seen)
        if missed == 0:
            return 0.0
        n, mean = super().plain(seen, as_of_ms), self.plain(seen, as_of_ms)
        total = n * mean
        least = max(total - 2 * missed * self.gap_ms / 1000, 0.0) / (n + missed)
        return max(mean - least, total / max(n - missed, 1) - mean) + 1e-12 * total
