"""Tokens: what stands in events for a value that has been forgotten.

A token is a random number of 32 bits, shown as a value of the field's type. Those of keys are told from keys by where
they lie, on every cluster that such an event comes to, so that no entity is ever made of one:

    string           `~forgotten-` and 8 hex digits
    64-bit integers  the 2**32 values from -2**63 + 2**32 on; of an unsigned one, those up to 2**64 - 1 - 2**32
    32-bit integers  the 256 values from -2**31 + 256 on; of an unsigned one, those up to 2**32 - 1 - 256

Narrower integers have no room for that: theirs is the least value, or the largest of an unsigned one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["is_token", "token_of"]

Bools = npt.NDArray[np.bool_]

_PREFIX = "~forgotten-"
#: By width in bits: how many values are tokens, and how far they lie from the end of the type.
_RESERVED = {64: 1 << 32, 32: 1 << 8}


def token_of(kind: pa.DataType, number: int) -> Any:
    """Return the token of a number of 32 bits as a value of a type; None if the type is neither integer nor string.

    >>> token_of(pa.string(), 255), token_of(pa.int64(), 5), token_of(pa.uint8(), 5), token_of(pa.float64(), 5)
    ('~forgotten-000000ff', -9223372032559808507, 255, None)
    """
    if pa.types.is_string(kind):
        return f"{_PREFIX}{number:08x}"
    if not pa.types.is_integer(kind):
        return None
    bits, signed = kind.bit_width, pa.types.is_signed_integer(kind)
    count = _RESERVED.get(bits, 0)
    offset = count + number % count if count else 0
    return -(1 << bits - 1) + offset if signed else (1 << bits) - 1 - offset


def is_token(column: pa.Array) -> Bools | None:
    """Return which values of a column are tokens, bool [n]; None if none is."""
    if pa.types.is_string(column.type):
        found = pc.starts_with(column, _PREFIX).fill_null(False).to_numpy(zero_copy_only=False)
    elif pa.types.is_integer(column.type) and (count := _RESERVED.get(column.type.bit_width)):
        values = column.fill_null(0).to_numpy(zero_copy_only=False) if column.null_count else column.to_numpy()
        first, last = sorted((int(token_of(column.type, 0)), int(token_of(column.type, count - 1))))
        found = (values >= first) & (values <= last)
    else:
        return None
    return found if found.any() else None
