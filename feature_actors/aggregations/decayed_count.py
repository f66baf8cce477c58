"""DecayedCount: how many events, of which the past count ever less."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Column, Part, Seen
from millpond.feature_actors.aggregations.decayed_sum import (
    add_decayed,
    check_half_life,
    clear_decayed,
    decayed,
    decayed_sum,
    merge_decayed,
)


class DecayedEvents(Part):
    """Number of events, each decayed by its age; the setting is the half-life in ms."""

    takes_input, words = False, 2

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
class DecayedCount(Aggregation):
    """Number of events of which each counts the less the older it is: half after one half-life.

    half_life: a length from `"1s"` to `"3660d"`. What is below 1e-300 vanishes.
    """

    half_life: str = ""

    parts, takes = (DecayedEvents,), "event"
    formula, empty = "sum 2^-((as_of - t) / half_life)", "0"
    error_text = "1e-12 of itself"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_half_life(type(self).__name__, self.half_life)

    @property
    def half_life_ms(self) -> int:
        return check_half_life(type(self).__name__, self.half_life)

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(DecayedEvents, setting=self.half_life_ms),)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "half_life_ms": self.half_life_ms}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return decayed(p, f, a, s, as_of)

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return float(decayed_sum([(t, 1) for t, _ in seen], as_of_ms, self.half_life_ms))

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return 1e-12 * math.fsum(2.0 ** ((t - as_of_ms) / self.half_life_ms) for t, _ in seen) + 1e-300
