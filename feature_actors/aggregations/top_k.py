"""TopK: the most frequent values of a field, by a summary of fixed size."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from numba.extending import register_jitable

from millpond.feature_actors.aggregations.aggregation import NEVER, Aggregation, Column, Part, Seen
from millpond.feature_actors.aggregations.input import Input
from millpond.feature_actors.errors import DeclarationError

K_MAX, M_MAX = 256, 1_024


class Frequent(Part):
    """Values with counts and newest times, n at most, those seen more recently first: a Misra-Gries summary.

    A value that finds no room takes one off the count of each, and what comes to 0 leaves. Each time, n + 1 events are
    no longer counted, so of N events no count is more than N / (n + 1) below the truth, and none is above it; merging
    adds a count at once by the same rule, and keeps the bound. Its place among values of one count is by time, never by
    the value: a string's address is another in each shard.

    Source: Misra and Gries, Finding repeated elements (1982); Agarwal et al., Mergeable summaries (2012).
    """

    head_words, words, value_words = 1, 3, (0,)  # how many there are; of each the value, its count, its newest time
    is_large = True

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        p[at] = 0
        for item in range(at + 1, at + 1 + 3 * n, 3):
            _clear(p, f, item)

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        _add(p, f, at, n, value + 0.0, 1, time)  # -0.0 is 0.0

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        count = min(max(newer_p[newer], 0), n)  # which may be torn
        if p[at] == 0:
            p[at] = count
            for word in range(1, 1 + 3 * n):
                p[at + word] = newer_p[newer + word]
            return
        older = p[at]  # how many of them stand where they did; those of the newer one come behind, the newest last
        for k in range(count - 1, -1, -1):
            item = newer + 1 + 3 * k
            value, n_value = newer_f[item], newer_p[item + 1]
            place, end = at + 1, at + 1 + 3 * older
            while place < end and f[place] != value:
                place += 3
            if place < end:
                n_value += p[place + 1]
                f[place], p[place + 1] = math.nan, 0
            if p[at] == n:
                older = _drop_empty(p, f, at, n, older)
            if p[at] == n:
                n_value -= _take_off(p, f, at, n, n_value)
                older = _drop_empty(p, f, at, n, older)
            if n_value > 0:
                place = at + 1 + 3 * p[at]
                f[place], p[place + 1], p[place + 2] = value, n_value, newer_p[item + 2]
                p[at] += 1
        older = _drop_empty(p, f, at, n, older)
        _reverse(p, f, at + 1, at + 1 + 3 * p[at])
        _reverse(p, f, at + 1 + 3 * (p[at] - older), at + 1 + 3 * p[at])


@register_jitable
def _clear(p: Any, f: Any, item: Any) -> None:
    f[item] = math.nan
    p[item + 1] = 0
    p[item + 2] = NEVER


@register_jitable
def _move(p: Any, f: Any, item: Any, to: Any) -> None:
    f[to] = f[item]
    p[to + 1] = p[item + 1]
    p[to + 2] = p[item + 2]


@register_jitable
def _add(p: Any, f: Any, at: Any, n: Any, value: Any, count: Any, time: Any) -> None:
    """Count a value `count` times, last at `time`."""
    used = p[at]
    item, end = at + 1, at + 1 + 3 * used
    while item < end and f[item] != value:
        item += 3
    if item < end:
        p[item + 1] += count
        if time < p[item + 2]:
            return
        count = p[item + 1]
    else:
        if used == n:
            count -= _take_off(p, f, at, n, count)
            _drop_empty(p, f, at, n, 0)
            if count == 0:
                return
        item = at + 1 + 3 * p[at]
        p[at] += 1
    while item > at + 1 and p[item - 1] <= time:
        _move(p, f, item - 3, item)
        item -= 3
    f[item] = value
    p[item + 1] = count
    p[item + 2] = time


@register_jitable
def _take_off(p: Any, f: Any, at: Any, n: Any, most: Any) -> Any:
    """Take the smallest count, but no more than `most`, off all n of them; return how much that was."""
    taken = most
    for item in range(at + 1, at + 1 + 3 * n, 3):
        taken = min(taken, p[item + 1])
    for item in range(at + 1, at + 1 + 3 * n, 3):
        p[item + 1] -= taken
    return taken


@register_jitable
def _drop_empty(p: Any, f: Any, at: Any, n: Any, first: Any) -> Any:
    """Close up over those whose count is 0; return how many of the first ones are left."""
    left, kept = at + 1, 0
    for k in range(p[at]):
        item = at + 1 + 3 * k
        if p[item + 1] > 0:
            if item != left:
                _move(p, f, item, left)
            left += 3
            kept += k < first
    for item in range(left, at + 1 + 3 * p[at], 3):
        _clear(p, f, item)
    p[at] = (left - at - 1) // 3
    return kept


@register_jitable
def _reverse(p: Any, f: Any, start: Any, end: Any) -> None:
    """Turn the order of the items from one word to another round."""
    low, high = start, end - 3
    while low < high:
        value, count, time = f[low], p[low + 1], p[low + 2]
        _move(p, f, high, low)
        f[high], p[high + 1], p[high + 2] = value, count, time
        low += 3
        high -= 3


@register_jitable
def ranked(p: Any, f: Any, at: Any, k: Any) -> Any:
    """Return the word of the item with the k-th largest count, -1 if there is none; all before it are in their places.

    Of equal counts the one seen more recently comes first.
    """
    if k >= p[at]:
        return -1
    place, end = at + 1 + 3 * k, at + 1 + 3 * p[at]
    best = place
    for item in range(place + 3, end, 3):
        if p[item + 1] > p[best + 1]:
            best = item
    value, count, time = f[best], p[best + 1], p[best + 2]
    while best > place:
        _move(p, f, best - 3, best)
        best -= 3
    f[place] = value
    p[place + 1] = count
    p[place + 2] = time
    return place


@dataclass(frozen=True, eq=False)
class TopK(Aggregation):
    """The k most frequent values of a field, numbers or strings, the most frequent first: k columns of the matrix.

    Of two as frequent, the one seen more recently comes first; of two at one millisecond, the one applied later. Where
    there are fewer than k values, the rest is empty. m values are counted at a time: what is answered is exact as long
    as no more than m were seen, and else the i-th value has come at least as often as the i-th most frequent one, less
    N / (m + 1) of N events. Its counts are those of `TopKCounts` of the same k, m and events, which keeps nothing more.

    Its tiles are large, and so they are wider: a window of length W has 12 or more.
    """

    k: int = 10
    m: int = 32

    parts, takes, tiles_min = (Frequent,), "value", 12
    is_large = True
    formula, empty = "x of the k largest n(x), descending", "NaN; None for strings"
    error_text = "none up to m distinct x; n / (m + 1) of n(x)"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if type(self.k) is not int or not 1 <= self.k <= K_MAX:
            raise DeclarationError(f"{name}: k is a number from 1 to {K_MAX}, got {self.k!r}")
        if type(self.m) is not int or not self.k <= self.m <= M_MAX:
            raise DeclarationError(
                f"{name}: m, how many values are counted at a time, is a number from k = {self.k} to {M_MAX}, "
                f"got {self.m!r}"
            )

    @property
    def width(self) -> int:
        return self.k

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(Frequent, Input(self.field or ""), self.m),)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "k": self.k, "m": self.m}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        item = ranked(p, f, a, k)
        return f[item] if item >= 0 else math.nan

    def plain(self, seen: Seen, as_of_ms: int) -> list[Any]:
        newest_first = [x for _, x in sorted(seen, key=lambda event: event[0])][::-1]
        return ([x for x, _ in Counter(newest_first).most_common(self.k)] + [math.nan] * self.k)[: self.k]

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return 0.0 if len({x for _, x in seen}) <= self.m else len(seen) / (self.m + 1)

    def worth(self, value: Any, seen: Seen) -> float:
        return float(sum(x == value for _, x in seen))
