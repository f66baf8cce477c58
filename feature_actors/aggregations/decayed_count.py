"""DecayedCount: how many events, of which the past count ever less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Column, Part, Seen
from millpond.feature_actors.aggregations.decayed_sum import (
    DecayedSum,
    add_decayed,
    clear_decayed,
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
class DecayedCount(DecayedSum):
    """Number of events of which each counts the less the older it is: half after one half-life.

    half_life: a length from `"1s"` to `"3660d"`. What is below 1e-300 vanishes.
    """

    parts, takes = (DecayedEvents,), "event"
    formula, empty = "sum 2^-((as_of - t) / half_life)", "0"
    error_text = "1e-12 of itself"

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(DecayedEvents, setting=self.half_life_ms),)

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return super().plain([(t, 1) for t, _ in seen], as_of_ms)

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return super().slack([(t, 1) for t, _ in seen], as_of_ms)
