"""Streak: how many of the newest events in a row satisfy a condition."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import pyarrow.compute as pc

from millpond.feature_actors.aggregations.aggregation import NEVER, Aggregation, Column, Part, Seen
from millpond.feature_actors.aggregations.input import Input
from millpond.feature_actors.errors import DeclarationError

STREAK_MAX = 256


class Run(Part):
    """Time of the newest event whose value is 0, then of the n newest events after it, the newest first.

    Those are the run: an event of value 0 that comes late cuts it where it belongs, by its time.
    """

    head_words, words = 1, 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        for word in range(at, at + 1 + n):
            p[word] = NEVER

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        if value == 0:
            p[at] = max(p[at], time)
            for word in range(at + 1, at + 1 + n):
                if p[word] <= time:
                    p[word] = NEVER
        elif time >= p[at]:
            place, end = at + 1, at + 1 + n
            while place < end and p[place] > time:
                place += 1
            for word in range(end - 1, place, -1):
                p[word] = p[word - 1]
            if place < end:
                p[place] = time

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        count = 0
        while count < n and newer_p[newer + 1 + count] != NEVER:
            count += 1
        if newer_p[newer] != NEVER:  # the run began there
            p[at] = newer_p[newer]
            for word in range(at + 1, at + 1 + n):
                p[word] = NEVER
        for word in range(n, count, -1):
            p[at + word] = p[at + word - count]
        for word in range(1, count + 1):
            p[at + word] = newer_p[newer + word]


@dataclass(frozen=True, eq=False)
class Streak(Aggregation):
    """Number of the newest events in a row that satisfy a condition, as in `Streak(of=pc.field("amount") > 100)`.

    of: a `pyarrow.compute` expression; one that is null is not satisfied. n: what is answered for n or more. Of two
    events at one millisecond the one applied later is the newer. Exact, whatever the order in which events come.
    """

    of: pc.Expression | None = None
    n: int = 32

    parts, takes = (Run,), "event"
    formula, empty = "min(n, events after the newest that is not)", "0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.of, pc.Expression):
            raise DeclarationError(
                "Streak: of=, what the events of a streak satisfy, is a pyarrow.compute expression such as "
                f"`pc.field('amount') > 100`, got {self.of!r}"
            )
        if type(self.n) is not int or not 1 <= self.n <= STREAK_MAX:
            raise DeclarationError(
                f"Streak: n, the longest streak that is told, is a number from 1 to {STREAK_MAX}, got {self.n!r}"
            )

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(Run, self._truth, self.n),)

    @property
    def _truth(self) -> Input:
        return Input("", "truth", condition=self.of)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "of": self._truth.text, "n": self.n}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        streak = 0
        while streak < n and p[a + 1 + streak] != NEVER:
            streak += 1
        return float(streak)

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        newest_first = [holds for _, holds in sorted(seen, key=lambda event: event[0])][::-1]
        return float(min(self.n, len(list(takewhile(bool, newest_first)))))
