"""Rate: events per second."""

from __future__ import annotations

from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Seen
from millpond.feature_actors.aggregations.count import Events


class Rate(Aggregation):
    """Events per second: their number divided by the length of the window, whenever the first one came."""

    parts, takes, needs_window = (Events,), "event", True
    formula, empty = "n / (window / 1000)", "0"

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return p[a] / (window / 1000.0)

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        assert self.window_ms is not None
        return len(seen) / (self.window_ms / 1000)
