"""Random programs for what counts by value: tops of few and of many different values, counts and sums by category."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from millpond.bench.program import Program
from millpond.feature_actors import CountBy, SumBy, TopK, TopKCounts
from millpond.feature_actors.aggregations import Aggregation

__all__ = ["programs"]

_NOW, _DAY = 1_700_000_000_000, 86_400_000
_KINDS = ("food", "travel", "books", "games", "")


def programs(random: np.random.Generator, n_max: int = 3_000) -> Iterator[Program]:
    """Yield programs for ever, of one aggregation after the other: the same ones for the same seed."""
    while True:
        for kind in (TopK, TopKCounts, CountBy, SumBy):
            n = int(10 ** random.uniform(0, math.log10(n_max)))
            times = random.permutation(_NOW + np.sort(random.integers(0, _DAY, n))).tolist()
            as_of = _NOW + _DAY
            window = str(random.choice(["30d", "24h"])) if random.integers(2) else None
            if kind in (TopK, TopKCounts):
                k = int(random.integers(1, 12))
                made: Aggregation = kind("v", k=k, m=k + int(random.integers(0, 40)), window=window)
                values = (random.zipf(random.uniform(1.05, 3), n) % 1_000_000).astype(np.float64).tolist()
            else:
                named = [str(one) for one in random.permutation(_KINDS)[: random.integers(1, 5)]]
                kinds = random.choice([*_KINDS, "else"], n, p=random.dirichlet([0.5] * 6)).tolist()
                if kind is CountBy:
                    made, values = CountBy("kind", categories=named, window=window), kinds
                else:
                    amounts = random.choice([-1, 1], n) * 10.0 ** random.uniform(-3, 12, n)
                    made = SumBy("v", by="kind", categories=named, window=window)
                    values = list(zip(amounts.tolist(), kinds, strict=True))
            yield Program(made, list(zip(times, values, strict=True)), as_of)
