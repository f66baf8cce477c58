"""SumBy: the sum of a field over the events of each of some categories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Column, Part, Seen
from millpond.feature_actors.aggregations.count_by import check_categories
from millpond.feature_actors.aggregations.input import Input
from millpond.feature_actors.errors import DeclarationError


class TotalOfEach(Part):
    """Sum of the values of each of n categories; `by` is the place of one."""

    words = 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        for k in range(n):
            f[at + k] = 0.0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        f[at + int(by)] += value

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        for k in range(n):
            f[at + k] += newer_f[newer + k]


@dataclass(frozen=True, eq=False)
class SumBy(Aggregation):
    """Sum of a field over the events of each of some categories, and of all others together: one column more than
    categories.

    by: the field of the categories. categories: values of it, strings or integers, in the order of the columns; the
    last column is of others. Events in which one of the two fields is null are not counted.
    """

    by: str = ""
    categories: Sequence[str | int] = ()

    parts = (TotalOfEach,)
    formula, empty, error_text = "sum x(c) of each category c, then of others", "0", "1e-12 sum |x|"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.by, str) or not self.by:
            raise DeclarationError(f'SumBy: by is the field of the categories, such as by="kind", got {self.by!r}')
        object.__setattr__(self, "categories", check_categories("SumBy", self.by, self.categories))

    @property
    def width(self) -> int:
        return len(self.categories) + 1

    @property
    def columns(self) -> tuple[Column, ...]:
        by = Input(self.by, "category", tuple(self.categories))
        return (Column(TotalOfEach, Input(self.field or ""), len(self.categories) + 1, by),)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "by": self.by, "categories": list(self.categories)}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return f[a + k]

    def plain(self, seen: Seen, as_of_ms: int) -> list[float]:
        of = {category: [x for _, (x, c) in seen if c == category] for category in self.categories}
        others = [x for _, (x, c) in seen if c not in of]
        return [math.fsum(values) for values in (*of.values(), others)]

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        return 1e-12 * math.fsum(abs(x) for _, (x, _) in seen)
