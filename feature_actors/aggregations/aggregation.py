"""What an aggregation is: an algebra of four verbs over a partial of fixed size.

`init` makes an empty partial, `update` adds one event, `merge` joins an older partial with a newer one,
`finalize` reads the value. A partial is made of *parts*, each with the first three verbs, so that features
over the same tiles share what they have in common: `Mean` reads the sum that `Sum` keeps.

The verbs are plain functions over words of memory, p seen as int64 and f as float64, from word `at` on; n and s are
the size of the part and its setting, a number that says how it works, if it has any. They are compiled once, all of
them together (see `dispatch`), and never for a view. Beside them stands `plain`: the definition of the aggregation in
plain Python, by which the oracle judges the verbs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow.compute as pc

from millpond.feature_actors.aggregations.input import Input, where_text
from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.windows import TILES_PER_WINDOW_MIN, parse_window_ms, tile_width_ms

__all__ = [
    "AFTER_ALL",
    "AGGREGATIONS",
    "NEVER",
    "NUMBERS",
    "PARTS",
    "Aggregation",
    "Column",
    "Part",
    "Seen",
    "where_text",
]

#: The time of an event that never was: before all others, and after all others.
NEVER, AFTER_ALL = np.iinfo(np.int64).min, np.iinfo(np.int64).max

NUMBERS = frozenset(
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
) | {"float32", "float64", "double", "bool"}  # fmt: skip

#: Time in ms and value of the events that a feature sees, in the order in which they were applied. Without nulls,
#: for an aggregation of inputs; the value is None for one that looks at events. See `Aggregation.inputs`.
Seen = Sequence[tuple[int, Any]]

#: All parts and all aggregations, in the order of their numbers in the kernels.
PARTS: list[type[Part]] = []
AGGREGATIONS: list[type[Aggregation]] = []


class Part:
    """One part of a partial. Values that reach `update` are never null and always finite.

    The verbs have no self: they are compiled.
    """

    #: Whether it looks at an input; else at events, and `value` means nothing. A column may have a second one, `by`.
    takes_input: ClassVar[bool] = True
    #: Words of memory; for a part with a size `n`, of each of its n items, which stand behind `head_words` of them all.
    words: ClassVar[int]
    head_words: ClassVar[int] = 0
    #: Which of an item's words are values of the field as they came, NaN for none; those of strings are addresses.
    value_words: ClassVar[tuple[int, ...]] = ()
    #: Whether its verbs are long, so that kernels call them and are not made of a copy of them at each place.
    is_large: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        _check_is_ours(cls)
        PARTS.append(cls)

    @staticmethod
    def init(p: Any, f: Any, at: Any, n: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def update(p: Any, f: Any, at: Any, n: Any, s: Any, value: Any, by: Any, time: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def merge(p: Any, f: Any, at: Any, n: Any, s: Any, newer_p: Any, newer_f: Any, newer: Any) -> None:
        """Merge the newer partial at `newer` into the older one at `at`; their times do not overlap."""
        raise NotImplementedError


@dataclass(frozen=True)
class Column:
    """A part in a partial: of which input, if any, and which second one; its size and setting, if it has them."""

    part: type[Part]
    input: Input | None = None
    n: int = 1
    by: Input | None = None
    setting: int = 0

    @property
    def inputs(self) -> tuple[Input, ...]:
        return tuple(one for one in (self.input, self.by) if one is not None)

    @property
    def has_values(self) -> bool:
        """Whether it holds values of a field as they came."""
        return self.input is not None and self.input.kind == "value" and bool(self.part.value_words)

    @property
    def words(self) -> int:
        return self.part.head_words + self.part.words * self.n

    @property
    def value_words(self) -> list[int]:
        """The words of it that are values of the field."""
        part = self.part
        return [part.head_words + k * part.words + word for k in range(self.n) for word in part.value_words]


@dataclass(frozen=True, eq=False)
class Aggregation:
    """Base of all aggregations.

    field: the field that it looks at, for those that look at one.
    window: how far back it looks, `"1s"` and longer; `None` is lifetime.
    where: a `pyarrow.compute` expression; other events are not looked at.
    ttl: for a lifetime aggregation, forget everything when no event came for so long; `None` keeps for ever.
    exact: cut the window at the millisecond, `(as_of - window, as_of]`, at the cost of memory per event.
    """

    field: str | None = None
    _: KW_ONLY
    window: str | None = None
    where: pc.Expression | None = None
    ttl: str | None = None
    exact: bool = False

    #: Its parts, in the order in which `finalize` gets their places.
    parts: ClassVar[tuple[type[Part], ...]]
    #: What it looks at: numbers, anything that has a value (numbers and strings), categories (integers and strings), or
    #: events.
    takes: ClassVar[Literal["number", "value", "category", "event"]] = "number"
    #: Whether its value is a number even of a field of strings: a count of them, say.
    gives_numbers: ClassVar[bool] = False
    #: Its window is kept in so many tiles or more, so that an answer covers at most a window / tiles_min too much. An
    #: aggregation whose partials are of many words may say fewer.
    tiles_min: ClassVar[int] = TILES_PER_WINDOW_MIN
    #: Whether it must have a window.
    needs_window: ClassVar[bool] = False
    #: For people, in tables: its formula over the values x at times t seen, what it is of nothing, how far
    #: from the exact value it may be.
    formula: ClassVar[str]
    empty: ClassVar[str]
    error_text: ClassVar[str] = "none"
    #: Whether `finalize` is long, as a part's verbs may be.
    is_large: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        _check_is_ours(cls)
        assert len(cls.parts) <= 2, f"{cls.__name__}: finalize gets the places of two parts at most"
        AGGREGATIONS.append(cls)

    @staticmethod
    def finalize(p: Any, f: Any, a: Any, b: Any, n: Any, s: Any, k: Any, as_of: Any, window: Any) -> Any:
        """Read value k of a partial whose first part lies at a and second at b; n is the size of the first, s the
        aggregation's `setting`, as_of and window in ms.

        Called for k = 0, 1, ... in this order, of a partial that is the reader's own: it may be put in order.
        """
        raise NotImplementedError

    def plain(self, seen: Seen, as_of_ms: int) -> Any:
        """Return the value over what is seen, by definition: a float, or a list if `width` is above 1."""
        raise NotImplementedError

    def slack(self, seen: Seen, as_of_ms: int) -> float:
        """Return how far from `plain` a value may be: `error_text`, for these events."""
        return 0.0

    def worth(self, value: Any, seen: Seen) -> float:
        """Return what of a value is as near as `slack` to the same of the right one's, where that is not 0: by itself
        the value, which is a number then."""
        return float(value)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if type(self) is Aggregation:
            known = ", ".join(sorted(c.__name__ for c in AGGREGATIONS))
            raise DeclarationError(f"Aggregation: the base of all; say which: {known}")
        if self.takes != "event" and self.field is None:
            raise DeclarationError(f'{name}: of which field? say {name}("amount")')
        if self.takes == "event" and self.field is not None:
            raise DeclarationError(f"{name}: looks at no field")
        if self.field is not None and not isinstance(self.field, str):
            raise DeclarationError(f'{name}: takes the name of a field such as {name}("amount"), got {self.field!r}')
        if self.window is not None and self.ttl is not None:
            raise DeclarationError(f"{name}: a feature has a window or a ttl, not both")
        if self.needs_window and self.window is None:
            raise DeclarationError(f'{name}: needs a window; say {name}(window="1h")')
        if not isinstance(self.exact, bool):
            raise DeclarationError(f"{name}: exact is True or False, got {self.exact!r}")
        if self.exact and self.window is None:
            raise DeclarationError(
                f"{name}: exact=True is about the edge of a window; say which window, or leave it out"
            )
        if self.where is not None and not isinstance(self.where, pc.Expression):
            raise DeclarationError(
                f"{name}: where= takes a pyarrow.compute expression such as `pc.field('amount') > 0`, "
                f"got {self.where!r}"
            )
        for what, text in (("window", self.window), ("ttl", self.ttl)):
            if text is not None:
                parse_window_ms(text, subject=f"{name} {what}")

    @cached_property
    def window_ms(self) -> int | None:
        return None if self.window is None else parse_window_ms(self.window, subject="window")

    @cached_property
    def ttl_ms(self) -> int | None:
        return None if self.ttl is None else parse_window_ms(self.ttl, subject="ttl")

    @cached_property
    def tile_width_ms(self) -> int | None:
        """The width of the tiles in which its window is kept."""
        return None if self.window_ms is None else tile_width_ms(self.window_ms, self.tiles_min)

    @property
    def width(self) -> int:
        """How many columns of a feature matrix its value takes."""
        return 1

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of its partial."""
        of = None if self.field is None else Input(self.field)
        return tuple(Column(part, of if part.takes_input else None) for part in self.parts)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What its columns look at: what of an event is `seen` by `plain`, a tuple if it is more than one."""
        return tuple(dict.fromkeys(one for column in self.columns for one in column.inputs))

    @property
    def setting(self) -> int:
        """What `finalize` gets for s; by default as its first column has it."""
        return self.columns[0].setting

    def identity(self) -> dict[str, Any]:
        """What makes two aggregations the same one: the content of the definition."""
        return {
            "aggregation": type(self).__name__,
            "field": self.field,
            "window_ms": self.window_ms,
            "ttl_ms": self.ttl_ms,
            "where": where_text(self.where),
            **({"exact": True} if self.exact else {}),
        }


def _check_is_ours(cls: type) -> None:
    """Refuse what the kernels, compiled of the files of this folder, would not know."""
    if cls.__module__.rpartition(".")[0] != __package__:
        raise DeclarationError(
            f"{cls.__name__}: an aggregation is a file of feature_actors/aggregations, which the kernels are compiled "
            "of; here, say it as Derived of the features that it is made of"
        )
