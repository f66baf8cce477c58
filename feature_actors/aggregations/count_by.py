"""CountBy: how many events of each of some categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millpond.feature_actors.aggregations.aggregation import Aggregation, Column, Part, Seen
from millpond.feature_actors.aggregations.input import Input
from millpond.feature_actors.errors import DeclarationError

CATEGORIES_MAX = 256


class EventsOfEach(Part):
    """Number of events of each of n categories; the value is the place of one."""

    words = 1

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        for k in range(n):
            p[at + k] = 0

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        p[at + int(value)] += 1

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        for k in range(n):
            p[at + k] += newer_p[newer + k]


def check_categories(name: str, field: str | None, categories: Any) -> tuple[str | int, ...]:
    """Return declared categories as a tuple; raises `DeclarationError`."""
    if isinstance(categories, str) or not isinstance(categories, tuple | list) or not categories:
        raise DeclarationError(
            f'{name}: categories are a list of the values to tell apart such as {name}("{field}", '
            f'categories=["food", "travel"]), got {categories!r}'
        )
    if len(categories) > CATEGORIES_MAX:
        raise DeclarationError(f"{name}: {len(categories)} categories; allowed are {CATEGORIES_MAX}")
    for category in categories:
        if type(category) not in (str, int):
            raise DeclarationError(f"{name}: a category is a string or an integer, got {category!r}")
        if isinstance(category, str) and not _is_utf8(category):
            raise DeclarationError(f"{name}: category {category!r} is no text that an event can have: it is not UTF-8")
    if len(set(categories)) < len(categories):
        raise DeclarationError(f"{name}: a category is named twice in {list(categories)!r}")
    return tuple(categories)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True, eq=False)
class CountBy(Aggregation):
    """Number of events of each of some categories, and of all others together: one column more than categories.

    categories: values of the field, strings or integers, in the order of the columns; the last column is of others.
    """

    categories: Sequence[str | int] = ()

    parts, takes, gives_numbers = (EventsOfEach,), "category", True
    formula, empty = "n(c) of each category c, then of others", "0"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "categories", check_categories(type(self).__name__, self.field, self.categories))

    @property
    def width(self) -> int:
        return len(self.categories) + 1

    @property
    def columns(self) -> tuple[Column, ...]:
        of = Input(self.field or "", "category", tuple(self.categories))
        return (Column(EventsOfEach, of, len(self.categories) + 1),)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "categories": list(self.categories)}

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        return float(p[a + k])

    def plain(self, seen: Seen, as_of_ms: int) -> list[float]:
        counts = Counter(x for _, x in seen)
        named = [float(counts.pop(category, 0)) for category in self.categories]
        return [*named, float(counts.total())]
