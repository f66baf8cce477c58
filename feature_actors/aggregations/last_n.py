"""LastN: the most recent values of a field, in order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from millpond.feature_actors.aggregations.aggregation import NEVER, Aggregation, Column, Part, Seen
from millpond.feature_actors.aggregations.input import Input
from millpond.feature_actors.errors import DeclarationError

LAST_N_MAX = 64


class Recent(Part):
    """Times and values of the n newest events that have one, the newest first."""

    words, value_words = 2, (1,)

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        for k in range(n):
            p[at + 2 * k] = NEVER
            f[at + 2 * k + 1] = math.nan

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        place = 0
        while place < n and p[at + 2 * place] > time:
            place += 1
        if place < n:
            for k in range(n - 1, place, -1):
                p[at + 2 * k] = p[at + 2 * k - 2]
                f[at + 2 * k + 1] = f[at + 2 * k - 1]
            p[at + 2 * place] = time
            f[at + 2 * place + 1] = value

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        count = 0
        while count < n and newer_p[newer + 2 * count] != NEVER:
            count += 1
        for k in range(n - 1, count - 1, -1):
            p[at + 2 * k] = p[at + 2 * (k - count)]
            f[at + 2 * k + 1] = f[at + 2 * (k - count) + 1]
        for k in range(count):
            p[at + 2 * k] = newer_p[newer + 2 * k]
            f[at + 2 * k + 1] = newer_f[newer + 2 * k + 1]


@dataclass(frozen=True, eq=False)
class LastN(Aggregation):
    """The n most recent values of a field, numbers or strings, the newest first: n columns of the matrix.

    Of two at one millisecond the one applied later is the newer. Where fewer than n have a value, the rest is empty.
    """

    n: int = 5

    parts, takes = (Recent,), "value"
    formula, empty = "x of the n largest t, descending", "NaN; None for strings"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.n) is not int or not 1 <= self.n <= LAST_N_MAX:
            raise DeclarationError(f"LastN: n is a number from 1 to {LAST_N_MAX}, got {self.n!r}")

    @property
    def width(self) -> int:
        return self.n

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(Recent, Input(self.field or ""), self.n),)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "n": self.n}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return f[a + 2 * k + 1]

    def plain(self, seen: Seen, as_of_ms: int) -> list[Any]:
        newest_first = [x for _, x in sorted(seen, key=lambda event: event[0])][::-1]
        return (newest_first + [math.nan] * self.n)[: self.n]
