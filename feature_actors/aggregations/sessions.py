"""Sessions: how many there were, where one ends when no event comes for longer than a gap."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from numba.extending import register_jitable

from millpond.feature_actors.aggregations.aggregation import AFTER_ALL, NEVER, Aggregation, Column, Part, Seen
from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.windows import WINDOW_MAX_MS, parse_length_ms

SESSIONS_N_MAX = 64
#: Words of the head: the number of all sessions, how long they are together, in ms, and when the first began.
COUNT, TOTAL, FIRST, HEAD = range(4)


class NewestSessions(Part):
    """Number and total length of all sessions, when the first began, and of the n newest when each began and ended,
    the newest first. The setting is the gap in ms.

    Those older than the n newest are closed: of an event that would belong among them nobody can tell any more whether
    it lengthens one, joins two or is one by itself. Such an event is not looked at, unless it is older than all others:

        event                                      what it does
        in a session that is kept                  nothing
        up to a gap from one, or from two          lengthens it, or joins them; there is one fewer to keep then
        between two, or after all                  is a session; the oldest that is kept is closed if there were n
        before all that are kept, none is closed   the same as above
        before the first event of all              lengthens the first session or is one, whether kept or closed
        any other before all that are kept         nothing: what is known is exact for the other events

    Of partials that follow each other only the session at their border can be one, which is known of both.
    """

    takes_input, head_words, words = False, HEAD, 2

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at + COUNT] = 0
        p[at + TOTAL] = 0
        p[at + FIRST] = AFTER_ALL
        for word in range(at + HEAD, at + HEAD + 2 * n):
            p[word] = NEVER

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        one, end = at + HEAD, at + HEAD + 2 * n
        while one < end and p[one] > time + s:
            one += 2
        if one < end and p[one] != NEVER:
            if time > p[one + 1] + s:
                _insert(p, at, one, end, time)
            elif time > p[one + 1]:
                p[at + TOTAL] += time - p[one + 1]
                p[one + 1] = time
            elif time < p[one]:
                _begin_earlier(p, at, one, end, s, time)
        elif time < p[at + FIRST]:
            if p[at + FIRST] <= time + s:  # it is of a closed one
                p[at + TOTAL] += p[at + FIRST] - time
            elif p[at + COUNT] == (one - at - HEAD) // 2:  # none is closed
                _insert(p, at, one, end, time)
            else:
                p[at + COUNT] += 1
            p[at + FIRST] = time

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        if newer_p[newer + COUNT] == 0:
            return
        if p[at + COUNT] == 0:
            p[at + FIRST] = newer_p[newer + FIRST]
        else:
            apart = newer_p[newer + FIRST] - p[at + HEAD + 1]
            if apart <= s:
                p[at + COUNT] -= 1
                p[at + TOTAL] += apart
        p[at + COUNT] += newer_p[newer + COUNT]
        p[at + TOTAL] += newer_p[newer + TOTAL]
        # What is merged is not updated any more: of its sessions one asks but for the end of the newest.
        for word in range(HEAD, HEAD + 2 * n):
            p[at + word] = newer_p[newer + word]


@register_jitable
def _insert(p: Any, at: Any, one: Any, end: Any, time: Any) -> None:
    """Begin a session, in the place of `one`, which is the next older one; the last one is closed."""
    p[at + COUNT] += 1
    for word in range(end - 1, one + 1, -1):
        p[word] = p[word - 2]
    if one < end:
        p[one] = time
        p[one + 1] = time


@register_jitable
def _begin_earlier(p: Any, at: Any, one: Any, end: Any, s: Any, time: Any) -> None:
    """Let a session begin at an earlier time, which may join it to the next older one."""
    older = one + 2
    if older < end and p[older] != NEVER:
        if p[older + 1] + s < time:
            p[at + TOTAL] += p[one] - time
            p[one] = time
            return
        p[at + COUNT] -= 1
        p[at + TOTAL] += p[one] - p[older + 1]
        p[one] = p[older]
        for word in range(older, end - 2):
            p[word] = p[word + 2]
        p[end - 2] = NEVER
        p[end - 1] = NEVER
    elif p[one] == p[at + FIRST]:  # none is closed
        p[at + TOTAL] += p[one] - time
        p[one] = time
        p[at + FIRST] = time


@dataclass(frozen=True, eq=False)
class Sessions(Aggregation):
    """Number of sessions, the one under way included: one ends when no event comes for longer than the gap.

    gap: a length such as `"30m"`; it may be longer than the window. n: so many of the newest sessions of each tile can
    be mended by late events. It is exact as long as no event comes that is older than these but not the oldest of all:
    such a one is not looked at, and each makes it one session too many or too few at most.
    """

    gap: str = "30m"
    n: int = 8

    parts, takes = (NewestSessions,), "event"
    formula, empty = "1 + n(t[i + 1] - t[i] > gap)", "0"
    error_text = "none; 1 for each event older than n sessions of its tile"

    def __post_init__(self) -> None:
        super().__post_init__()
        name, gap_ms = type(self).__name__, parse_length_ms(self.gap)
        if gap_ms is None or not 1 <= gap_ms <= WINDOW_MAX_MS:
            raise DeclarationError(
                f"{name}: gap, after how long without an event a session has ended, is a length such as `30m`, from "
                f"`1ms` to `3660d`, got {self.gap!r}"
            )
        if type(self.n) is not int or not 1 <= self.n <= SESSIONS_N_MAX:
            raise DeclarationError(
                f"{name}: n, how many sessions can be mended by late events, is a number from 1 to {SESSIONS_N_MAX}, "
                f"got {self.n!r}"
            )

    @property
    def gap_ms(self) -> int:
        return parse_length_ms(self.gap) or 0

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(NewestSessions, None, self.n, setting=self.gap_ms),)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "gap_ms": self.gap_ms, "n": self.n}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return float(p[a + COUNT])

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        times = sorted(t for t, _ in seen)
        return float(len(times[:1]) + sum(after - before > self.gap_ms for before, after in pairwise(times)))

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return float(self.missed(seen))

    def missed(self, seen: Seen) -> int:
        """Return how many events may not have been looked at: as many as came when n events were there that are newer
        and further than the gap from each other."""
        times: list[int] = []
        missed = set()
        for t, _ in seen:
            newer = len(times)
            for _ in range(self.n):
                if newer == 0:
                    break
                nth = times[newer - 1]
                newer = bisect_left(times, nth - self.gap_ms)
            else:
                if times[0] < t < nth:
                    missed.add(t)
            insort(times, t)
        return len(missed)
