"""An input: what a column looks at of an event, as the one number that the kernels get.

    value       the field: a number as it is, a string as the address under which the shard keeps it
    hash        53 bits of the field's fixed hash, `KEY_HASH_VERSION`: the same on every shard and cluster
    category    the place of the field's value among declared categories, their number for any other
    truth       1 where a condition holds, else 0

NaN stands for null, of which only a truth has none.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.keys import hash_columns

__all__ = ["HASH_BITS", "Input", "where_text"]

#: So many bits a double holds exactly.
HASH_BITS = 53


@dataclass(frozen=True)
class Input:
    """field: of the event, "" for a truth; categories: all strings, or all integers; condition: of a truth."""

    field: str
    kind: Literal["value", "hash", "category", "truth"] = "value"
    categories: tuple[str | int, ...] = ()
    text: str = dataclasses.field(default="", init=False)  # what tells it from others
    condition: pc.Expression | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self._text())

    def _text(self) -> str:
        match self.kind:
            case "value":
                return self.field
            case "hash":
                return f"hash({self.field})"
            case "category":
                return f"category({self.field}, {list(self.categories)!r})"
            case _:
                return f"truth({where_text(self.condition)})"

    def numbers(self, column: pa.Array) -> npt.NDArray[np.float64]:
        """Return the numbers of a column of the field, float64 [n]; not of a truth, nor of the value of a string."""
        if self.kind == "value":
            numbers: npt.NDArray[np.float64] = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            return numbers
        if self.kind == "hash":
            numbers = _hashes(column)
        else:
            numbers = _places(column, self.categories)
        if column.null_count:
            numbers[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
        return numbers


def _hashes(column: pa.Array) -> npt.NDArray[np.float64]:
    if pa.types.is_floating(column.type):
        column = pc.add(pc.cast(column, pa.float64()), 0.0)  # -0.0 is 0.0
    halves = hash_columns([column], len(column))[:, 0] >> np.uint64(64 - HASH_BITS)
    return halves.astype(np.float64)


def _places(column: pa.Array, categories: tuple[str | int, ...]) -> npt.NDArray[np.float64]:
    if not pa.types.is_string(column.type):
        column = pc.cast(column, pa.int64())
    known = pa.array(categories, column.type)
    places = pc.fill_null(pc.index_in(column, value_set=known), len(categories))
    numbers: npt.NDArray[np.float64] = pc.cast(places, pa.float64()).to_numpy(zero_copy_only=False).copy()
    return numbers


def where_text(where: pc.Expression | None) -> str:
    """Return a text that two conditions share only if they are the same; "" for none.

    `str` alone elides the middle of a long `isin` and writes `2` and `2.0` alike, which divide differently.
    """
    if where is None:
        return ""
    # An expression pickles as an Arrow file of one row: its literals, with their types, in order.
    literals: Any = pa.ipc.open_file(where.__reduce__()[1][0]).get_batch(0)
    return f"{where} of {[(str(c.type), c.to_pylist()) for c in literals.columns]}"
