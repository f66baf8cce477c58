"""TopKCounts: how often the most frequent values of a field came."""

from __future__ import annotations

from collections import Counter
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Seen
from millpond.feature_actors.aggregations.top_k import TopK, ranked


class TopKCounts(TopK):
    """How often each of the k most frequent values of a field came, in the order of the `TopK` of the same k and m.

    A count is never above the truth; where more than m values were seen it is up to n / (m + 1) below.
    """

    gives_numbers = True
    formula, empty, error_text = "the k largest n(x), descending", "0", "none up to m distinct x; n / (m + 1)"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        item = ranked(p, f, a, k)
        return float(p[item + 1]) if item >= 0 else 0.0

    def plain(self, seen: Seen, as_of_ms: int) -> list[float]:
        counts = Counter(x for _, x in seen).most_common(self.k)
        return ([float(count) for _, count in counts] + [0.0] * self.k)[: self.k]

    def worth(self, value: Any, seen: Seen) -> float:
        return float(value)
