"""Quantile: the value below which a share of a field's values lies, by a sketch of fixed size."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from numba.extending import register_jitable

from millpond.feature_actors.aggregations.aggregation import Aggregation, Column, Part, Seen
from millpond.feature_actors.aggregations.input import Input
from millpond.feature_actors.errors import DeclarationError

M_MIN, M_MAX = 8, 4_096
ERROR_MIN, ERROR_MAX = 0.0001, 0.25
#: q and error are kept as integers, in millionths.
MILLION = 1_000_000
#: What a quantile is told is the error times this, and q.
_ERROR = 10 * MILLION

_COUNT_MAX = (1 << 32) - 1
#: The ordinal of the bucket of (1 / gamma, 1]: those of all numbers lie around it, and are above 0 at every level.
_OF_ONE = 1 << 30
#: A level at which all numbers fall into five buckets, whatever the error.
LEVEL_MAX = 30
_LARGEST = sys.float_info.max
_LOG_MAX = math.log(_LARGEST)


class Buckets(Part):
    """How many values fall into each bucket that is not empty, n at most, by value: a DDSketch that collapses evenly.

    The bucket of x has the ordinal b = ceil(log(x) / log(gamma)), gamma = (1 + error) / (1 - error), and the same below
    0, where it is counted backwards; the setting is the error in millionths. When they are more than n, buckets 2 b - 1
    and 2 b become one: that is one level up, gamma squared. A level is the lowest at which what was seen fits, so that
    all is a function of the values, whatever their order. A bucket counts to 2^32 - 1.

    Source: Masson, Rim and Lee, DDSketch (2019); Epicoco et al., UDDSketch (2020).
    """

    head_words, words = 1, 1  # level and number of buckets; each an ordinal and a count, in the halves of a word
    is_large = True

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        for word in range(at, at + 1 + n):
            p[word] = 0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        lowest = ordinal_of(value, s)
        while True:
            count = p[at] & _COUNT_MAX
            ordinal = up(lowest, p[at] >> 32)
            low, end = at + 1, at + 1 + count
            high = end
            while low < high:
                middle = (low + high) >> 1
                if p[middle] >> 32 < ordinal:
                    low = middle + 1
                else:
                    high = middle
            if low < end and p[low] >> 32 == ordinal:
                p[low] += p[low] & _COUNT_MAX < _COUNT_MAX
                return
            if count < n:
                for word in range(end, low, -1):
                    p[word] = p[word - 1]
                p[low] = (ordinal << 32) + 1
                p[at] += 1
                return
            if p[at] >> 32 >= LEVEL_MAX:
                return
            _collapse(p, at, 1)

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        level = min(max(newer_p[newer] >> 32, 0), LEVEL_MAX)  # which may be torn, as all of the newer one
        count = min(newer_p[newer] & _COUNT_MAX, n)
        if p[at] == 0:
            p[at] = (level << 32) | count
            for word in range(1, 1 + n):
                p[at + word] = newer_p[newer + word]
            return
        if level > p[at] >> 32:
            _collapse(p, at, level - (p[at] >> 32))
        union = _union(p, at, newer_p, newer, count, (p[at] >> 32) - level)
        while union > n and p[at] >> 32 < LEVEL_MAX:
            _collapse(p, at, 1)
            union = _union(p, at, newer_p, newer, count, (p[at] >> 32) - level)
        _merge(p, at, min(union, n), newer_p, newer, count, (p[at] >> 32) - level)


@register_jitable
def ordinal_of(value: Any, s: Any) -> Any:
    """Return the ordinal of a value's bucket at level 0, its sign before it."""
    if value == 0:
        return 0
    ordinal = _OF_ONE + math.ceil(math.log(abs(value)) / log_gamma(s))
    return ordinal if value > 0 else -ordinal


@register_jitable
def log_gamma(s: Any) -> Any:
    return 2 * math.atanh(s / MILLION)


@register_jitable
def up(ordinal: Any, levels: Any) -> Any:
    """Return the ordinal of the bucket so many levels up."""
    half = (1 << levels) - 1
    return (ordinal + half) >> levels if ordinal > 0 else -((half - ordinal) >> levels)


@register_jitable
def _collapse(p: Any, at: Any, levels: Any) -> None:
    """Go so many levels up."""
    end, place, before = at + 1 + (p[at] & _COUNT_MAX), at, 0
    for word in range(at + 1, end):
        ordinal, count = up(p[word] >> 32, levels), p[word] & _COUNT_MAX
        if place > at and ordinal == before:
            p[place] = (ordinal << 32) | min((p[place] & _COUNT_MAX) + count, _COUNT_MAX)
        else:
            place += 1
            p[place] = (ordinal << 32) | count
            before = ordinal
    for word in range(place + 1, end):
        p[word] = 0
    p[at] = (((p[at] >> 32) + levels) << 32) | (place - at)


@register_jitable
def _union(p: Any, at: Any, newer_p: Any, newer: Any, count: Any, levels: Any) -> Any:
    """Return how many buckets there are with those of the newer one, so many levels up."""
    union = p[at] & _COUNT_MAX
    ours, end, before = at + 1, at + 1 + union, _OF_ONE << 2  # an ordinal that is none
    for word in range(newer + 1, newer + 1 + count):
        ordinal = up(newer_p[word] >> 32, levels)
        if ordinal != before:
            while ours < end and p[ours] >> 32 < ordinal:
                ours += 1
            union += ours == end or p[ours] >> 32 != ordinal
            before = ordinal
    return union


@register_jitable
def _merge(p: Any, at: Any, union: Any, newer_p: Any, newer: Any, count: Any, levels: Any) -> None:
    """Merge the newer buckets, so many levels up, from the end, where there is room: `union` are they all."""
    ours, theirs, place = at + (p[at] & _COUNT_MAX), newer + count, at + union
    while theirs > newer and place > at:
        ordinal = up(newer_p[theirs] >> 32, levels)
        if ours > at and p[ours] >> 32 > ordinal:
            p[place] = p[ours]
            ours -= 1
        else:
            total = 0
            if ours > at and p[ours] >> 32 == ordinal:
                total = p[ours] & _COUNT_MAX
                ours -= 1
            while theirs > newer and up(newer_p[theirs] >> 32, levels) == ordinal:
                total += newer_p[theirs] & _COUNT_MAX
                theirs -= 1
            p[place] = (ordinal << 32) | min(total, _COUNT_MAX)
        place -= 1
    p[at] = (p[at] >> 32 << 32) | union


@register_jitable
def _value_of(ordinal: Any, level: Any, s: Any) -> Any:
    """Return the value as far from either end of a bucket, as a share of that."""
    if ordinal == 0:
        return 0.0
    width = log_gamma(s) * float(1 << level)
    below = (float(abs(ordinal) - (_OF_ONE >> level)) - 1) * width
    value = min(math.exp(min(below, _LOG_MAX)) * (2 / (1 + math.exp(-width))), _LARGEST)
    return value if ordinal > 0 else -value


@register_jitable
def _quantile(p: Any, at: Any, n: Any, s: Any, q: Any) -> Any:
    """Return the quantile, q and the error s in millionths."""
    count, level = min(p[at] & _COUNT_MAX, n), p[at] >> 32
    total = 0
    for word in range(at + 1, at + 1 + count):
        total += p[word] & _COUNT_MAX
    if total == 0:
        return math.nan
    place = (total - 1) * q
    rank, share = place // MILLION, (place % MILLION) / MILLION
    word, reached = at + 1, p[at + 1] & _COUNT_MAX
    while reached <= rank and word < at + count:
        word += 1
        reached += p[word] & _COUNT_MAX
    value = _value_of(p[word] >> 32, level, s)
    if share > 0 and reached == rank + 1 and word < at + count:
        value = value * (1 - share) + _value_of(p[word + 1] >> 32, level, s) * share
    return value


@dataclass(frozen=True, eq=False)
class Quantile(Aggregation):
    """The value below which the share q of a field's values lies, between two of them by linear interpolation (as
    NumPy's), each of them to a relative error.

    q: 0 to 1; error: of a value, 0.0001 to 0.25, both with six decimals at most. m: how many buckets are kept, 8 to
    4,096. The error of a value x is error |x| (1 % unless told) while the values fill at most m buckets: those from 1
    to 12 fill fewer than 128. Then every two buckets become one, and an error e becomes 2 e / (1 + e^2); and so on. Any
    finite numbers will do; those below 1e-307 may be off by another 1e-323.

    Its tiles are large, and so they are wider: a window of length W has 12 or more.
    """

    q: float = math.nan
    error: float = 0.01
    m: int = 128

    parts, tiles_min = (Buckets,), 12
    is_large = True
    formula, empty = "x of place q (n - 1) in order, or between two", "NaN"
    error_text = "error |x| of each x while they fill at most m buckets; then 2 e / (1 + e^2) of e, and so on"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not _is_in_millionths(self.q, 0, 1):
            raise DeclarationError(f"{name}: q is a share from 0 to 1 with six decimals at most, got {self.q!r}")
        if not _is_in_millionths(self.error, ERROR_MIN, ERROR_MAX):
            raise DeclarationError(
                f"{name}: error, of a value, is a number from {ERROR_MIN} to {ERROR_MAX} with six decimals at most, "
                f"got {self.error!r}"
            )
        if type(self.m) is not int or not M_MIN <= self.m <= M_MAX:
            raise DeclarationError(
                f"{name}: m, how many buckets are kept, is a number from {M_MIN} to {M_MAX}, got {self.m!r}"
            )

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(Buckets, Input(self.field or ""), self.m, setting=round(self.error * MILLION)),)

    @property
    def setting(self) -> int:
        return self.columns[0].setting * _ERROR + round(self.q * MILLION)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "q": float(self.q), "error": float(self.error), "m": self.m}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return _quantile(p, a, n, s // _ERROR, s % _ERROR)

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        low, high, share = self._between(seen)
        return float(low + (high - low) * share) if seen else math.nan

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        low, high, share = (abs(float(one)) for one in self._between(seen))
        return (self.error_of(x for _, x in seen) + 1e-12) * ((1 - share) * low + share * high) + 2e-323

    def _between(self, seen: Seen) -> tuple[Fraction, Fraction, Fraction]:
        """Return the values on both sides of the quantile, and the share of the way from one to the other."""
        values = sorted(x for _, x in seen) or [0.0]
        place = Fraction(round(self.q * MILLION), MILLION) * (len(values) - 1)
        return Fraction(values[math.floor(place)]), Fraction(values[math.ceil(place)]), place % 1

    def error_of(self, values: Iterable[float]) -> float:
        """Return the relative error of each of some values: that of the lowest level where they fit into m buckets."""
        level, ordinals = 0, {ordinal_of(x, round(self.error * MILLION)) for x in set(values)}
        while len(ordinals) > self.m:
            level, ordinals = level + 1, {up(ordinal, 1) for ordinal in ordinals}
        return math.tanh(math.atanh(self.error) * 2**level)


def _is_in_millionths(number: Any, least: float, most: float) -> bool:
    return type(number) in (int, float) and least <= number <= most and round(number * MILLION) / MILLION == number
