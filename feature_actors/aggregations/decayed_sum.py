"""DecayedSum: the sum of a field of which the past counts ever less."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any, ClassVar

from numba.extending import register_jitable

from millpond.feature_actors.aggregations.aggregation import NEVER, Aggregation, Column, Part, Seen
from millpond.feature_actors.aggregations.input import Input
from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.windows import WINDOW_MAX_MS, WINDOW_MIN_MS, parse_length_ms

# A decayed amount is two words: the amount as of the end of the half-life in which its newest event lies, and the
# number of that half-life since the epoch. From one to the next it is halved, which is exact; so the weight of an
# event is rounded once, however many come after it and in whatever order, and none is above 1.


@register_jitable
def clear_decayed(p: Any, f: Any, at: Any) -> None:
    f[at] = 0.0
    p[at + 1] = NEVER


@register_jitable
def halved(amount: Any, times: Any) -> Any:
    # 4,096 times leave 0 of any amount; less than none are of a number that is torn.
    return math.ldexp(amount, -int(min(max(times, 0), 4_096)))


@register_jitable
def add_decayed(p: Any, f: Any, at: Any, half_life: Any, amount: Any, time: Any) -> None:
    """Add the amount of an event."""
    number = time // half_life
    _join(p, f, at, amount * 2.0 ** ((time - (number + 1) * half_life) / half_life), number)


@register_jitable
def merge_decayed(p: Any, f: Any, at: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
    if newer_p[newer + 1] != NEVER:
        _join(p, f, at, newer_f[newer], newer_p[newer + 1])


@register_jitable
def _join(p: Any, f: Any, at: Any, amount: Any, number: Any) -> None:
    """Add an amount as of the end of half-life `number`."""
    if p[at + 1] == NEVER:
        f[at] = amount
        p[at + 1] = number
    elif p[at + 1] < number:
        f[at] = halved(f[at], number - p[at + 1]) + amount
        p[at + 1] = number
    else:
        f[at] += halved(amount, p[at + 1] - number)


@register_jitable
def decayed(p: Any, f: Any, at: Any, half_life: Any, as_of: Any) -> Any:
    """Return the amount as of a time not before its newest event."""
    if p[at + 1] == NEVER:
        return 0.0
    number = as_of // half_life
    whole = halved(f[at], max(number - p[at + 1], 0))
    return whole * 2.0 ** (((number + 1) * half_life - as_of) / half_life)


class DecayedTotal(Part):
    """Sum of the values, each decayed by its age; the setting is the half-life in ms."""

    words = 2

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        clear_decayed(p, f, at)

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        add_decayed(p, f, at, s, value, time)

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        merge_decayed(p, f, at, newer_p, newer_f, newer)


def check_half_life(name: str, half_life: Any) -> int:
    """Return a half-life in milliseconds; raises `DeclarationError`."""
    length_ms = parse_length_ms(half_life)
    if length_ms is None or not WINDOW_MIN_MS <= length_ms <= WINDOW_MAX_MS:
        raise DeclarationError(
            f'{name}: half_life, in which the past comes to count half, is a length from "1s" to "3660d" such as '
            f'half_life="7d", got {half_life!r}'
        )
    return length_ms


def decayed_sum(amounts: Iterable[tuple[int, float]], as_of_ms: int, half_life_ms: int) -> Decimal:
    """Return the sum of amounts at times, by definition, to 40 digits of the sum of their sizes."""
    with localcontext() as exact:
        exact.prec = 50
        weighted = (Decimal(x) * Decimal(2) ** (Decimal(t - as_of_ms) / half_life_ms) for t, x in amounts)
        return sum(weighted, Decimal())


def decayed_size(amounts: Iterable[tuple[int, float]], as_of_ms: int, half_life_ms: int) -> float:
    """Return the sum of the sizes of amounts, decayed, in floats: a weight may be too small for one where a huge
    amount's product with it is not."""

    def size(time: int, amount: float) -> float:
        share, halvings = math.modf((as_of_ms - time) / half_life_ms)
        return math.ldexp(abs(amount) * 2.0**-share, -int(halvings))

    return math.fsum(size(time, amount) for time, amount in amounts)


@dataclass(frozen=True, eq=False)
class DecayedSum(Aggregation):
    """Sum of a field's values of which each counts the less the older it is: half after one half-life.

    half_life: a length from `"1s"` to `"3660d"`. By event time: the order in which events come makes no difference. A
    sum of huge finite values can overflow to infinity, which is answered as null; what is below 1e-300 vanishes.
    """

    half_life: str = ""

    parts: ClassVar[tuple[type[Part], ...]] = (DecayedTotal,)
    formula, empty = "sum x 2^-((as_of - t) / half_life)", "0"
    error_text = "1e-12 sum |x| 2^-((as_of - t) / half_life)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_half_life(type(self).__name__, self.half_life)

    @property
    def half_life_ms(self) -> int:
        return check_half_life(type(self).__name__, self.half_life)

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(DecayedTotal, Input(self.field or ""), setting=self.half_life_ms),)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "half_life_ms": self.half_life_ms}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return decayed(p, f, a, s, as_of)

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return float(decayed_sum(seen, as_of_ms, self.half_life_ms))

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return 1e-12 * decayed_size(seen, as_of_ms, self.half_life_ms) + 1e-300
