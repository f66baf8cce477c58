"""What kernels are told about tables and plans: arrays of numbers, made by `layout`.

A row here is a line of a program, and the constants name its columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["PackedProgram", "ReadProgram", "TableProgram"]

#: Stands for "kept for ever" in S_KEEP_MS and V_TTL_MS; "there is none" in C_BY, V_TTL_MS, V_WINDOW_MS and V_EXACT_*.
FOR_EVER, NO = -1, -2

# Tables: where the slots of the table are in a memory, how large their headers are, what a row is made of, how many
# words an event may need at most.
T_SLOTS_AT, T_SLOT_WORDS, T_ROW_WORDS, T_WHERES, T_RESERVE_WORDS = range(5)

# Series: tiles of one width, or one lifetime partial. S_ROW_AT is the word of the partial in a row, or for tiles the
# half word (32 bits) of the ring's head; the pools are words of a slot's header.
(
    S_LIFETIME, S_EXACT, S_WHERE, S_WIDTH_MS, S_KEEP_MS, S_ROW_AT, S_TILE_WORDS, S_POOL, S_FINE_POOL, S_COLUMN,
    S_COLUMNS,
) = range(11)  # fmt: skip

# Columns of partials: which part, whether it looks at an input, rows of it and of the second one among the inputs (or
# `NO`), offset in the partial, its size and setting.
C_PART, C_TAKES_INPUT, C_INPUT, C_BY, C_OFFSET, C_N, C_SETTING = range(7)

# Parts of a plan, one per table: the table's slots and row (as above), which row of the hashes has its keys, and from
# where to where its scans, features and views stand.
P_SLOTS_AT, P_SLOT_WORDS, P_ROW_WORDS, P_KEY, P_SCAN, P_FEATURE, P_VIEW = range(7)

# Scans: a series over a window. Features of a scan, from first to last.
R_SERIES, R_WINDOW_MS = range(2)

# Features: how their value is read from the merged partial of a scan, and into which columns of the matrix.
F_SCAN, F_AGGREGATION, F_OFFSET_A, F_OFFSET_B, F_N, F_SETTING, F_WIDTH, F_OUT = range(8)

# Views: where an entity must have an event to be known to it. V_EXACT_SERIES is for times before the newest event.
V_WHERE, V_WINDOW_MS, V_WIDTH_MS, V_EXACT_WINDOW_MS, V_EXACT_SERIES, V_TTL_MS, V_OUT = range(7)


class TableProgram(NamedTuple):
    """How to apply events to one table: table int64 [5], series int64 [series, 11], columns int64 [columns, 7]."""

    table: Any
    series: Any
    columns: Any


class ReadProgram(NamedTuple):
    """How to read features of one plan, over all its tables, or of several plans.

    parts int64 [tables + 1, 7], plan after plan: the last line of each only says where its scans, features and views
    end; series and columns as in `TableProgram`, of all tables of the layout; scans int64 [scans, 2], features int64
    [features, 8], views int64 [views, 7]; past_ms: how long ago the plan may be read as of, 0 if it is not exact;
    words: room for any partial; parts_max, scans_max: most of one plan.
    """

    parts: Any
    series: Any
    columns: Any
    scans: Any
    features: Any
    views: Any
    past_ms: Any
    words: Any
    parts_max: Any
    scans_max: Any


class PackedProgram:
    """A `ReadProgram` in one piece of memory, at `address`: a kernel takes over a number faster than six arrays, by a
    microsecond, which is as long as it takes to read an entity.

    The memory is two words of each array, where it begins behind them and how many lines it has, then the four numbers,
    then the lines of all arrays; `tiles.compiled.unpacked` is the other way.
    """

    def __init__(self, program: ReadProgram) -> None:
        self.program = program
        arrays, numbers = program[:6], [int(number) for number in program[6:]]
        begins = np.cumsum([2 * len(arrays) + len(numbers), *(array.size for array in arrays)]).tolist()
        heads = [word for begin, array in zip(begins, arrays, strict=False) for word in (begin, len(array))]
        self._words = np.concatenate([np.array([*heads, *numbers], np.int64), *(array.ravel() for array in arrays)])
        self.address = int(self._words.ctypes.data)
