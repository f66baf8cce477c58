"""Random programs for the sketches: values of some distribution, put into tiles and merged, and the exact answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.aggregations import Aggregation, Part

__all__ = ["SHAPES", "VALUES_MAX", "Judged", "Program", "Sketch", "draw_program", "judge", "worst_of"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Draw = np.random.Generator

VALUES_MAX = 100_000
_TILES_MAX = 13


def _huge(draw: Draw, n: int) -> Floats:
    """Draw numbers of both signs from 1e-323 to 1e308, the same share of each power of ten."""
    return np.asarray(draw.choice([-1.0, 1.0], n) * 10.0 ** draw.uniform(-323, 308, n))


#: How values are distributed: n of them.
SHAPES: dict[str, Callable[[Draw, int], Floats]] = {
    "uniform": lambda draw, n: draw.uniform(0, 1_000, n),
    "lognormal": lambda draw, n: draw.lognormal(3, draw.uniform(0.1, 3), n),
    "zipf": lambda draw, n: draw.zipf(draw.uniform(1.05, 3), n).astype(np.float64),
    "negative": lambda draw, n: -draw.lognormal(0, 1, n),
    "both signs": lambda draw, n: draw.normal(0, 100, n).round(1),
    "constant": lambda draw, n: np.full(n, draw.normal()),
    "huge range": _huge,
}


@dataclass(frozen=True)
class Program:
    """shape: of `SHAPES`; tiles: the values of each tile, in time order."""

    shape: str
    tiles: Sequence[Floats]

    @property
    def values(self) -> Floats:
        return np.concatenate(self.tiles)


def draw_program(draw: Draw, shape: str | None = None, values_max: int = VALUES_MAX) -> Program:
    """Draw a program: how many values, up to `values_max`, is as likely of each power of ten."""
    shape = shape or str(draw.choice(list(SHAPES)))
    n = int(values_max ** draw.random())
    cuts = np.sort(draw.integers(0, n + 1, draw.integers(0, _TILES_MAX)))
    return Program(shape, np.split(SHAPES[shape](draw, n), cuts))


class Sketch:
    """The verbs of an aggregation of one column, compiled; a partial is int64 [words]."""

    def __init__(self, aggregation: Aggregation) -> None:
        self.aggregation, (self.column,) = aggregation, aggregation.columns
        self._init, self._fill, self._merge = _compiled(self.column.part)  # type: ignore[arg-type]
        self._finalize = _finalize_of(type(aggregation))  # type: ignore[arg-type]

    def of(self, values: Floats | pa.Array) -> Ints:
        """Return the partial of some values; strings only of a sketch of hashes."""
        column = values if isinstance(values, pa.Array) else pa.array(values)
        words = np.zeros(self.column.words, np.int64)
        floats = words.view(np.float64)
        self._init(words, floats, 0, self.column.n)
        assert self.column.input is not None
        self._fill(words, floats, self.column.n, self.column.setting, self.column.input.numbers(column))
        return words

    def merge(self, older: Ints, newer: Ints) -> None:
        """Merge a newer partial into an older one."""
        n, s = self.column.n, self.column.setting
        self._merge(older, older.view(np.float64), 0, n, s, newer, newer.view(np.float64), 0)

    def merged(self, tiles: Iterable[Floats]) -> Ints:
        """Return what a read makes of tiles."""
        whole = self.of(np.empty(0))
        for values in tiles:
            self.merge(whole, self.of(values))
        return whole

    def value(self, words: Ints) -> float:
        words, n, setting = words.copy(), self.column.n, self.aggregation.setting
        return float(self._finalize(words, words.view(np.float64), 0, 0, n, setting, 0, 0, 0))


@cache
def _compiled(part: type[Part]) -> tuple[Any, Any, Any]:
    """Return `init`, a loop of `update`, and `merge`."""
    init, update, merge = (
        nb.njit(nogil=True, error_model="numpy")(verb) for verb in (part.init, part.update, part.merge)
    )

    @nb.njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def fill(p: Any, f: Any, n: Any, s: Any, values: Any) -> None:
        for i in range(values.shape[0]):
            update(p, f, 0, n, s, values[i], 0.0, i)

    return init, fill, merge


@cache
def _finalize_of(kind: type[Aggregation]) -> Any:
    return nb.njit(nogil=True, error_model="numpy")(kind.finalize)


@dataclass(frozen=True)
class Judged:
    """What a sketch said of a program, the exact answer, and how far from it the sketch may be."""

    program: Program
    got: float
    exact: float
    bound: float

    @property
    def share(self) -> float:
        """The error as a share of the bound: above 1 is wrong, and so is no number, for there is always a value."""
        if self.got == self.exact:
            return 0.0
        if math.isnan(self.got):
            return math.inf
        return abs(self.got - self.exact) / self.bound if self.bound else math.inf


def judge(sketch: Sketch, program: Program) -> Judged:
    seen = [(0, value) for value in program.values.tolist()]
    exact, bound = sketch.aggregation.plain(seen, 0), sketch.aggregation.slack(seen, 0)
    return Judged(program, sketch.value(sketch.merged(program.tiles)), exact, bound)


def worst_of(sketch: Sketch, draw: Draw, programs: int) -> Judged:
    """Return the worst of so many random programs."""
    return max((judge(sketch, draw_program(draw)) for _ in range(programs)), key=lambda judged: judged.share)
