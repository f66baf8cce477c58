"""What the `bench` command asks of a workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from millpond.bench.load import Arrivals
from millpond.feature_actors.errors import BadRequest

__all__ = ["Ids", "Options"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ids:
    """Which ids a load asks for: all alike, or some much more often than others.

    Of `zipf`, the k-th most wanted id is drawn in proportion to 1 / k ** exponent; which id that is, is drawn, too, so
    that hot ids lie on any slot. Two draws of one seed agree on it.
    """

    kind: Literal["uniform", "zipf"] = "uniform"
    exponent: float = 1.1

    def __post_init__(self) -> None:
        if not 0 < self.exponent <= 10:
            raise BadRequest(f"bench: Zipf exponent {self.exponent:g}; allowed is more than 0, and 10 at most")

    def draw(self, seed: int, n: int, count: int) -> Ints:
        """Return `count` ids of 0 to n - 1, int64 [count]."""
        draw = np.random.default_rng(seed)
        if self.kind == "uniform":
            uniform: Ints = draw.integers(0, n, count)
            return uniform
        shares = np.arange(1, n + 1, dtype=np.float64) ** -self.exponent
        shares = shares.cumsum()
        ranks = np.searchsorted(shares, draw.random(count) * shares[-1], side="right")
        hot_first = np.random.default_rng(n).permutation(n)
        hot: Ints = hot_first[np.minimum(ranks, n - 1)]
        return hot

    def __str__(self) -> str:
        return self.kind if self.kind == "uniform" else f"zipf {self.exponent:g}"


@dataclass(frozen=True)
class Options:
    """Settings of a bench, apart from those of the cluster.

    seconds: length of each measurement. rounds: medians of so many. quick: tiny, to see that it works.
    rate: of open loops, requests/s; None: each workload's own. minutes: of a soak.
    kills, events: of faults. ray: whether `store` measures what needs Ray.
    """

    seconds: float = 5.0
    rounds: int = 3
    quick: bool = False
    seed: int | None = None
    rate: float | None = None
    arrivals: Arrivals = "poisson"
    ids: Ids = Ids()
    minutes: float = 20.0
    kills: int = 100
    events: int = 1_000_000
    ray: bool = True

    def __post_init__(self) -> None:
        for name in ("seconds", "rounds", "rate", "minutes", "kills"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadRequest(f"bench: --{name} {value:g}; it is more than 0")

    @property
    def measured_seconds(self) -> float:
        return min(self.seconds, 0.5) if self.quick else self.seconds

    @property
    def measured_rounds(self) -> int:
        return 1 if self.quick else self.rounds
