"""Random programs of each aggregation that is large, or near: how far its value is from the exact one.

    sketch_programs     distinct values, quantiles
    moment_programs     decays, trends, moments, entropies
    run_programs        streaks, sessions
    count_programs      tops, counts and sums by category

The last two go through the engine, the others through the verbs by themselves, tile by tile: of up to 10,000 values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from millpond.bench import count_programs, moment_programs, run_programs
from millpond.bench.program import Program, share_of
from millpond.bench.sketch_programs import Sketch, draw_program, judge
from millpond.feature_actors import Distinct, Median, Quantile

__all__ = ["Worst", "judged_programs"]

_VALUES_MAX = 10_000
_SKETCHES = (
    Distinct("v"), Distinct("v", m=16), Distinct("v", m=1_024), Quantile("v", q=0.5), Quantile("v", q=0.99),
    Quantile("v", q=0.95, error=0.001, m=512), Median("v"),
)  # fmt: skip


@dataclass
class Worst:
    """The worst of so many programs: its error as a share of what is stated, and what it was; `unbounded`: programs for
    whose values no error is stated."""

    share: float = 0.0
    program: str = "all exact"
    programs: int = 0
    unbounded: int = 0

    def note(self, share: float, program: str) -> None:
        self.programs += 1
        if math.isnan(share):
            self.unbounded += 1
        elif share > self.share:
            self.share, self.program = share, program

    @property
    def wrong(self) -> bool:
        return self.share > 1


def judged_programs(programs: int, seed: int) -> Iterator[tuple[str, Worst]]:
    """Yield each aggregation, by name, and the worst of so many programs."""
    for name in dict.fromkeys(type(one).__name__ for one in _SKETCHES):
        kinds = [Sketch(one) for one in _SKETCHES if type(one).__name__ == name]
        draw, worst = np.random.default_rng([seed, len(name)]), Worst()
        for number in range(programs):
            sketch = kinds[number % len(kinds)]
            judged = judge(sketch, draw_program(draw, values_max=_VALUES_MAX))
            worst.note(judged.share, _told(sketch, len(judged.program.values), judged.program.shape))
        yield name, worst
    moments = moment_programs.programs(np.random.default_rng(seed), 1_000)
    yield from _of_each(moments, len(moment_programs.SETTINGS), programs, cuts_seed=seed)
    counts = count_programs.programs(np.random.default_rng(seed))
    yield from _of_each(counts, 4, programs)
    runs = run_programs.programs(np.random.default_rng(seed))
    yield from _of_each(runs, 6, programs)  # sessions are half of a third


def _of_each(
    drawn: Iterator[Program], kinds: int, programs: int, cuts_seed: int | None = None
) -> Iterator[tuple[str, Worst]]:
    found: dict[str, Worst] = {}
    draw = np.random.default_rng(cuts_seed)
    for _, program in zip(range(kinds * programs), drawn, strict=False):
        if cuts_seed is None:
            share = share_of(program)
        else:
            times = [time for time, _ in program.seen]
            share = moment_programs.share_of_bound(program, draw.choice(times, draw.integers(0, 61)).tolist())
        found.setdefault(type(program.aggregation).__name__, Worst()).note(share, str(program))
    yield from found.items()


def _told(sketch: Sketch, n: int, shape: str) -> str:
    return f"{Program(sketch.aggregation, [], 0)}".replace("of 0 events", f"of {n:,} values, {shape}")
