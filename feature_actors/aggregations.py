"""The aggregations: what a feature computes over the events of its window.

Each is an algebra of four verbs over a fixed-size partial: `init` makes an empty one, `update` adds
one event, `merge` joins an older with a newer one, `finalize` reads the value. A partial is a tuple
of *columns*, and a column is one of the few operations below; the kernels know the operations, never
the aggregations, so that no kernel is compiled for a view.

    operation     words  init        update by an event            merge older, newer
    COUNT         1      0           += 1                          sum
    VALUES        1      0           += 1 if the field is not null sum
    SUM           1      0.0         += value                      older + newer
    MIN, MAX      1      NaN         smaller, larger value         smaller, larger
    LAST          2      never, NaN  time, value if time >= last   the newer if its time >= last
    LAST_TIME     1      never       larger of the times           larger

Nulls are skipped by every operation but COUNT and LAST_TIME, which look at no field. Values are
float64: an integer above 2**53 is rounded.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.windows import parse_window_ms

__all__ = ["Aggregation", "Column", "Count", "Last", "Max", "Mean", "Min", "SecondsSince", "Sum", "where_text"]

# Operations on a column of a partial.
COUNT, VALUES, SUM, MIN, MAX, LAST, LAST_TIME = range(7)
#: int64 words that a column takes, by operation.
COLUMN_WORDS = (1, 1, 1, 1, 1, 2, 1)

# Ways to read a value from a merged partial.
READ_INT, READ_FLOAT, READ_RATIO, READ_LAST, READ_SECONDS_SINCE = range(5)

NUMBERS = frozenset(
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
) | {"float32", "float64", "double", "bool"}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One column of a partial: an operation and the field that it looks at, if any."""

    operation: int
    field: str | None = None


@dataclass(frozen=True, eq=False)
class Aggregation:
    """Base of all aggregations.

    field: the field that it looks at, for those that look at one.
    window: how far back it looks, `"1s"` and longer; `None` is lifetime.
    where: a `pyarrow.compute` expression; other events are not looked at.
    ttl: for a lifetime aggregation, forget everything when no event came for so long; `None` keeps for ever.
    """

    field: str | None = None
    _: KW_ONLY
    window: str | None = None
    where: pc.Expression | None = None
    ttl: str | None = None

    #: The columns of the partial are these operations ...
    operations: ClassVar[tuple[int, ...]]
    #: ... from which this one of the `READ_*` gives the value.
    read: ClassVar[int]
    #: Whether it looks at a field.
    takes_field: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if type(self) is Aggregation:
            raise DeclarationError(
                "Aggregation: the base of all; say which: Count, Last, Max, Mean, Min, SecondsSince or Sum"
            )
        if self.takes_field and self.field is None:
            raise DeclarationError(f'{name}: of which field? say {name}("amount")')
        if not self.takes_field and self.field is not None:
            raise DeclarationError(f"{name}: looks at no field")
        if self.field is not None and not isinstance(self.field, str):
            raise DeclarationError(f'{name}: takes the name of a field such as {name}("amount"), got {self.field!r}')
        if self.window is not None and self.ttl is not None:
            raise DeclarationError(f"{name}: a feature has a window or a ttl, not both")
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

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of this aggregation's partial."""
        return tuple(Column(op, None if op in (COUNT, LAST_TIME) else self.field) for op in self.operations)

    def identity(self) -> dict[str, Any]:
        """What makes two aggregations the same one: the content of the definition."""
        return {
            "aggregation": type(self).__name__,
            "field": self.field,
            "window_ms": self.window_ms,
            "ttl_ms": self.ttl_ms,
            "where": where_text(self.where),
        }


def where_text(where: pc.Expression | None) -> str:
    """Return a text that two conditions share only if they are the same; "" for none.

    `str` alone elides the middle of a long `isin` and writes `2` and `2.0` alike, which divide differently.
    """
    if where is None:
        return ""
    # An expression pickles as an Arrow file of one row: its literals, with their types, in order.
    literals = pa.ipc.open_file(where.__reduce__()[1][0]).get_batch(0)
    return f"{where} of {[(str(c.type), c.to_pylist()) for c in literals.columns]}"


class Count(Aggregation):
    """Number of events. Empty: 0. Exact. One word."""

    operations, read, takes_field = (COUNT,), READ_INT, False


class Sum(Aggregation):
    """Sum of a field: float64, added in time order of the tiles. Empty: 0. One word.

    A sum of huge finite values can overflow to infinity, which is answered as null.
    """

    operations, read = (SUM,), READ_FLOAT


class Mean(Aggregation):
    """Arithmetic mean of a field's values: Sum / number of values. Empty: NaN. Two words."""

    operations, read = (SUM, VALUES), READ_RATIO


class Min(Aggregation):
    """Smallest value of a field. Empty: NaN. Exact, as float64. One word."""

    operations, read = (MIN,), READ_FLOAT


class Max(Aggregation):
    """Largest value of a field. Empty: NaN. Exact, as float64. One word."""

    operations, read = (MAX,), READ_FLOAT


class Last(Aggregation):
    """Value of the newest event that has one; of two at one millisecond, the one applied later.

    Empty: NaN. Exact, as float64. Two words.
    """

    operations, read = (LAST,), READ_LAST


class SecondsSince(Aggregation):
    """Seconds from the newest event to as-of. Empty: NaN. Exact to the millisecond. One word."""

    operations, read, takes_field = (LAST_TIME,), READ_SECONDS_SINCE, False
