"""Random programs for decays, trends, moments and entropies, and how near to its stated error each of them comes.

A program is an aggregation, the events that it sees in the order in which they came, and the time to read it at. Values
are of the shapes that are hard on sums: far from 0, of mixed signs and sizes, nearly the same; and so are times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.bench.program import Program
from millpond.feature_actors.aggregations import (
    Aggregation,
    DecayedCount,
    DecayedMean,
    DecayedSum,
    Entropy,
    Kurtosis,
    Skew,
    Trend,
)

__all__ = ["SETTINGS", "programs", "share_of_bound"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

T, DAY, YEAR = 1_700_000_000_000, 86_400_000, 365 * 86_400_000
CATEGORIES = ("food", "travel", "books", "games")

VALUES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "lognormal": lambda rng, n: rng.lognormal(3, 2, n),
    "constant": lambda rng, n: np.full(n, rng.choice([0.1, -7.3, 1e300])),
    "constant and noise": lambda rng, n: 0.1 + 1e-6 * rng.standard_normal(n),
    "offset": lambda rng, n: 10.0 ** rng.uniform(3, 12) + rng.standard_normal(n),
    "neighbours": lambda rng, n: np.nextafter(rng.uniform(1, 2), rng.choice([0.0, 3.0], n)),
    "mixed signs and sizes": lambda rng, n: rng.choice([-1, 1], n) * 10.0 ** rng.uniform(-30, 30, n),
    "one apart": lambda rng, n: np.where(np.arange(n) == rng.integers(n), 1e9, rng.standard_normal(n)),
    "cancelling": lambda rng, n: np.where(np.arange(n) % 2, -1e15, 1e15) + rng.standard_normal(n),
}

TIMES: dict[str, Callable[[np.random.Generator, int], Ints]] = {
    "equal": lambda rng, n: np.full(n, T),
    "milliseconds apart": lambda rng, n: T + np.arange(n),
    "milliseconds apart, years after the first": lambda rng, n: T + np.arange(n) - 5 * YEAR * (np.arange(n) == 0),
    "milliseconds apart, shuffled": lambda rng, n: T + rng.permutation(n),
    "a day, shuffled": lambda rng, n: T + rng.integers(0, DAY, n),
    "years, in order": lambda rng, n: T + np.sort(rng.integers(-10 * YEAR, 10 * YEAR, n)),
    "years, shuffled": lambda rng, n: T + rng.integers(-10 * YEAR, 10 * YEAR, n),
    "bursts, years apart": lambda rng, n: T + rng.integers(0, 4, n) * YEAR + rng.integers(0, 5, n),
}

SETTINGS: tuple[Callable[[np.random.Generator], Aggregation], ...] = (
    lambda rng: DecayedSum("v", half_life=_half_life(rng)),
    lambda rng: DecayedCount(half_life=_half_life(rng)),
    lambda rng: DecayedMean("v", half_life=_half_life(rng)),
    lambda rng: Trend("v"),
    lambda rng: Skew("v"),
    lambda rng: Kurtosis("v"),
    lambda rng: Entropy("kind", categories=CATEGORIES[: rng.integers(1, 5)]),
)


def _half_life(rng: np.random.Generator) -> str:
    return str(rng.choice(["1s", "1001ms", "90s", "1h", "7d", "365d"]))


def programs(rng: np.random.Generator, n_max: int = 1_000) -> Iterator[Program]:
    """Yield programs without end, of each aggregation in turn, of up to `n_max` events."""
    while True:
        for setting in SETTINGS:
            aggregation = setting(rng)
            n = int(10 ** rng.uniform(0, math.log10(n_max)))
            times = TIMES[rng.choice(list(TIMES))](rng, n).tolist()
            values: Sequence[Any] = VALUES[rng.choice(list(VALUES))](rng, n).tolist()
            if isinstance(aggregation, Entropy):
                values = rng.choice([*CATEGORIES, "other", "else"], n, p=rng.dirichlet([0.3] * 6)).tolist()
            elif not aggregation.inputs:
                values = [None] * n
            as_of = max(times) + int(rng.choice([0, 1, 999, DAY, YEAR]))
            yield Program(aggregation, list(zip(times, values, strict=True)), as_of)


def share_of_bound(program: Program, cuts: Iterable[int] = ()) -> float:
    """Return how far the verbs are from the definition, as a share of the error stated; NaN where none is.

    cuts: the times at which tiles begin, which are merged oldest first. An answer that is right to the bit is 0 of any.
    """
    aggregation, seen, as_of = program
    want, slack = float(aggregation.plain(seen, as_of)), aggregation.slack(seen, as_of)
    got = _answer(aggregation, seen, as_of, sorted(cuts))
    if math.isinf(slack):
        return math.nan
    if got == want or (math.isnan(got) and math.isnan(want)):
        return 0.0
    return abs(got - want) / slack if slack and not math.isnan(got - want) else math.inf


def _answer(aggregation: Aggregation, seen: Sequence[tuple[int, Any]], as_of: int, cuts: Sequence[int]) -> float:
    numbers = np.zeros(len(seen))
    for one in aggregation.inputs:
        numbers = one.numbers(pa.array([x for _, x in seen]))
    tiles = np.searchsorted(cuts, [t for t, _ in seen], side="right")
    places = np.cumsum([0, *(c.words for c in aggregation.columns)]).tolist()
    with np.errstate(all="ignore"):
        merged = np.zeros(places[-1], np.int64)
        for column, at in zip(aggregation.columns, places, strict=False):
            column.part.init(merged, merged.view(np.float64), at, column.n)
        for number in np.unique(tiles).tolist():
            tile = np.zeros(places[-1], np.int64)
            mine = [(x, t) for x, (t, _), of in zip(numbers, seen, tiles, strict=True) if of == number]
            for column, at in zip(aggregation.columns, places, strict=False):
                n, setting, f, into = column.n, column.setting, tile.view(np.float64), merged.view(np.float64)
                column.part.init(tile, f, at, n)
                for x, t in mine:
                    column.part.update(tile, f, at, n, setting, x, 0.0, t)
                column.part.merge(merged, into, at, n, setting, tile, f, at)
        a, b, n, s = places[0], places[len(aggregation.columns) - 1], aggregation.columns[0].n, aggregation.setting
        return float(aggregation.finalize(merged, merged.view(np.float64), a, b, n, s, 0, as_of, 0))
