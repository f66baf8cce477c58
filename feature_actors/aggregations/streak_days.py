"""StreakDays: how many days in a row have an event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numba.extending import register_jitable

from millpond.feature_actors.aggregations.aggregation import NEVER, Aggregation, Column, Part, Seen
from millpond.feature_actors.errors import DeclarationError

DAY_MS = 86_400_000
STREAK_DAYS_MAX = 3_660
#: So many days a word holds: its sign is in nobody's way.
DAYS_PER_WORD = 63


class Days(Part):
    """The newest day with an event, and which of the last 63 n days up to it have one.

    Day d is always the same bit of the same word, of n words that are used in turn: when a newer day comes, those
    after the newest one so far are cleared, and nothing is shifted.
    """

    takes_input, head_words, words = False, 1, 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at] = NEVER
        for word in range(at + 1, at + 1 + n):
            p[word] = 0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        day = time // DAY_MS
        if day > p[at]:
            _advance(p, at, n, day)
        if p[at] - day < DAYS_PER_WORD * n:
            p[_word(at, n, day)] |= 1 << day % DAYS_PER_WORD

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        if newer_p[newer] > p[at]:
            _advance(p, at, n, newer_p[newer])
        for word in range(1, n + 1):
            p[at + word] |= newer_p[newer + word]


@register_jitable
def _word(at: Any, n: Any, day: Any) -> Any:
    return at + 1 + day // DAYS_PER_WORD % n


@register_jitable
def _advance(p: Any, at: Any, n: Any, day: Any) -> None:
    """Let the newest day be a newer one: no day after the newest so far has an event."""
    days = day - p[at] if p[at] != NEVER else DAYS_PER_WORD * n
    if 0 < days < DAYS_PER_WORD * n:  # of torn memory it may be anything
        for k in range(days):
            p[_word(at, n, day - k)] &= ~(1 << (day - k) % DAYS_PER_WORD)
    else:
        for word in range(at + 1, at + 1 + n):
            p[word] = 0
    p[at] = day


@dataclass(frozen=True, eq=False)
class StreakDays(Aggregation):
    """Number of UTC days in a row with an event, up to the newest, which is as-of's day or the one before: today's is
    not over.

    It is 0 if neither has one; n, if there are n or more. Exact, whatever the order in which events come.
    """

    n: int = 366

    parts, takes = (Days,), "event"
    formula, empty = "min(n, days in a row up to max t)", "0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.n) is not int or not 1 <= self.n <= STREAK_DAYS_MAX:
            raise DeclarationError(
                f"StreakDays: n, the longest streak that is told, is a number of days from 1 to {STREAK_DAYS_MAX}, "
                f"got {self.n!r}"
            )

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(Days, None, -(-self.n // DAYS_PER_WORD)),)

    @property
    def setting(self) -> int:
        return self.n

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "n": self.n}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        newest, streak = p[a], 0
        if newest < as_of // DAY_MS - 1:
            return 0.0
        while streak < s and p[_word(a, n, newest - streak)] >> (newest - streak) % DAYS_PER_WORD & 1:
            streak += 1
        return float(streak)

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        days = {t // DAY_MS for t, _ in seen}
        newest, streak = max(days, default=0), 0
        if newest >= as_of_ms // DAY_MS - 1:
            while streak < self.n and newest - streak in days:
                streak += 1
        return float(streak)
