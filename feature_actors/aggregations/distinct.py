"""Distinct: how many different values a field has, by a sketch of fixed size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numba.extending import register_jitable

from millpond.feature_actors.aggregations.aggregation import Aggregation, Column, Part, Seen
from millpond.feature_actors.aggregations.input import HASH_BITS, Input
from millpond.feature_actors.errors import DeclarationError

M_MIN, M_MAX = 8, 4_096

_HASHES = (1 << HASH_BITS) - 1
_RANKS = 0x3F  # of a register: 6 of its 8 bits
_EIGHT_RANKS, _GUARDS = 0x3F3F_3F3F_3F3F_3F3F, 0x4040_4040_4040_4040
_LN_2 = math.log(2)
_MARK, _UNMARKED = -(1 << 63), (1 << 63) - 1


class Hashes(Part):
    """The hashes seen, in order, while there are n at most; beyond, 8 n registers of a HyperLogLog in the same words.

    Both are functions of the set of hashes, so that neither order nor tiles change a bit. The setting is how many of a
    hash's low bits give its rank, the place of the lowest that is 1; those above say which register keeps the largest.

    Source: Flajolet et al., HyperLogLog (2007); Heule, Nunkesser and Hall, HyperLogLog in practice (2013).
    """

    head_words, words = 1, 1  # how many hashes there are, n + 1 for registers; each a hash, or eight registers
    is_large = True

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        for word in range(at, at + 1 + n):
            p[word] = 0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        _add(p, at, n, s, int(value))

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        count = min(max(newer_p[newer], 0), n + 1)  # which may be torn, as all of the newer one
        if p[at] == 0:
            p[at] = count
            for word in range(1, 1 + n):
                p[at + word] = newer_p[newer + word]
        elif count <= n:
            if p[at] > n or not _merge_lists(p, at, n, newer_p, newer, count):
                for word in range(newer + 1, newer + 1 + count):
                    _add(p, at, n, s, newer_p[word])
        else:
            if p[at] <= n:
                _to_registers(p, at, n, s)
            for word in range(1, 1 + n):
                ours, theirs = p[at + word], newer_p[newer + word]
                larger = ((ours | _GUARDS) - theirs) & _GUARDS  # the guards of registers of which ours is not smaller
                kept = larger - (larger >> 6)
                p[at + word] = (ours & kept) | (theirs & ~kept & _EIGHT_RANKS)


@register_jitable
def _add(p: Any, at: Any, n: Any, s: Any, hashed: Any) -> None:
    count = p[at]
    if count <= n:
        low, high = at + 1, at + 1 + count
        while low < high:
            middle = (low + high) >> 1
            if p[middle] < hashed:
                low = middle + 1
            else:
                high = middle
        if low < at + 1 + count and p[low] == hashed:
            return
        if count < n:
            for word in range(at + 1 + count, low, -1):
                p[word] = p[word - 1]
            p[low] = hashed
            p[at] = count + 1
            return
        _to_registers(p, at, n, s)
    _raise(p, at, s, hashed)


@register_jitable
def _raise(p: Any, at: Any, s: Any, hashed: Any) -> None:
    """Let the register of a hash be its rank or more."""
    rest, rank = hashed, 1
    while rank <= s and rest & 1 == 0:
        rest >>= 1
        rank += 1
    register = (hashed & _HASHES) >> s
    word, shift = at + 1 + (register >> 3), 8 * (register & 7)
    before = (p[word] >> shift) & _RANKS
    if rank > before:
        p[word] += (rank - before) << shift


@register_jitable
def _to_registers(p: Any, at: Any, n: Any, s: Any) -> None:
    """Make registers of the list, in its words: a hash that stands where a register belongs is taken out, and is the
    next one. Words that are registers already bear the mark."""
    for word in range(at + 1 + p[at], at + 1 + n):
        p[word] = _MARK
    p[at] = n + 1
    for word in range(at + 1, at + 1 + n):
        hashed = p[word]
        if hashed >= 0:
            p[word] = _MARK
        while hashed >= 0:
            place = at + 1 + ((hashed & _HASHES) >> (s + 3))
            out = p[place]
            if out >= 0:
                p[place] = _MARK
            _raise(p, at, s, hashed)
            hashed = out
    for word in range(at + 1, at + 1 + n):
        p[word] &= _UNMARKED


@register_jitable
def _merge_lists(p: Any, at: Any, n: Any, newer_p: Any, newer: Any, count: Any) -> Any:
    """Merge `count` newer hashes into the list, if there is room for all; return whether there is."""
    ours, theirs, both = at + 1, newer + 1, 0
    ours_end, theirs_end = ours + p[at], theirs + count
    while ours < ours_end and theirs < theirs_end:
        left, right = p[ours], newer_p[theirs]
        ours += left <= right
        theirs += right <= left
        both += left == right
    union = p[at] + count - both
    if union > n:
        return False
    ours, theirs, place = at + p[at], newer + count, at + union
    while theirs > newer and place > at:  # from the end, where there is room
        left, right = p[ours] if ours > at else -1, newer_p[theirs]
        p[place] = max(left, right)
        ours -= left >= right
        theirs -= right >= left
        place -= 1
    p[at] = union
    return True


@register_jitable
def _estimate(p: Any, at: Any, n: Any, s: Any) -> Any:
    """Return the estimate of 8 n registers.

    Their sum is one of integers, and the rest is multiplied, divided and rooted: the same bits on every machine.

    Source: Ertl, New cardinality estimation algorithms for HyperLogLog sketches (2017), the improved raw estimator.
    """
    registers, total, empty, full = 8 * n, 0, 0, 0
    for word in range(at + 1, at + 1 + n):
        ranks = p[word]
        for shift in range(0, 64, 8):
            rank = min((ranks >> shift) & _RANKS, s + 1)
            empty += rank == 0
            full += rank > s
            if 0 < rank <= s:
                total += 1 << (s - rank)
    x, y = empty / registers, 1.0
    sigma, before = x, -1.0
    while sigma != before and x < 1:
        x *= x
        before = sigma
        sigma += x * y
        y += y
    x, y = 1 - full / registers, 1.0
    tau, before = 1 - x, -1.0
    while tau != before and 0 < x < 1:
        x = math.sqrt(x)
        before = tau
        y *= 0.5
        tau -= (1 - x) * (1 - x) * y
    scale = float(1 << s)
    return registers / (2 * _LN_2) * registers / (registers * sigma + (total + registers * tau / 3) / scale)


@dataclass(frozen=True, eq=False)
class Distinct(Aggregation):
    """Number of different values of a field, numbers or strings: exact up to m of them, an estimate beyond.

    m: a power of two from 8 to 4,096. Beyond m values it is a HyperLogLog of 8 m registers, of standard error
    1.04 / sqrt(8 m) of the number: 3.3 % of the 128 that it is unless told. It works with a fixed hash, so that the
    same events give the same answer on every cluster.

    Its tiles are large, and so they are wider: a window of length W has 12 or more.
    """

    m: int = 128

    parts, takes, gives_numbers, tiles_min = (Hashes,), "value", True, 12
    is_large = True
    formula, empty = "number of distinct x", "0"
    error_text = "none up to m; 1.04 / sqrt(8 m) of it, standard"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.m) is not int or not M_MIN <= self.m <= M_MAX or self.m & (self.m - 1):
            raise DeclarationError(
                f"Distinct: m, up to how many values it is exact, is a power of two from {M_MIN} to {M_MAX}, "
                f"got {self.m!r}"
            )

    @property
    def columns(self) -> tuple[Column, ...]:
        registers = 8 * self.m
        return (
            Column(Hashes, Input(self.field or "", "hash"), self.m, setting=HASH_BITS - registers.bit_length() + 1),
        )

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "m": self.m}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return float(p[a]) if p[a] <= n else _estimate(p, a, n, s)

    def plain(self, seen: Seen, as_of_ms: int) -> float:
        return float(len({x for _, x in seen}))

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        """Five standard errors, as a factor: of few registers, estimates lie further above the truth than below it."""
        distinct = self.plain(seen, as_of_ms)
        return 0.0 if distinct <= self.m else math.expm1(5 * 1.04 / math.sqrt(8 * self.m)) * distinct
