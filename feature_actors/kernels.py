"""The compiled loops over tiles: find a row, apply events, read features.

One slot of one table is one int64 array, the *arena* (see `tiles`): header, index, rows, and a pool
of tiles per series. Floats lie in it by their bits; `floats` below is the same memory seen as
float64. What to do with a word comes from the table's programs (see `layout`), which are data, so
nothing here is compiled for a view.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from millpond.feature_actors.aggregations import (
    COUNT,
    LAST,
    LAST_TIME,
    MAX,
    MIN,
    READ_FLOAT,
    READ_INT,
    READ_LAST,
    READ_RATIO,
    SUM,
    VALUES,
)
from millpond.feature_actors.layout import (
    C_INPUT,
    C_OFFSET,
    C_OPERATION,
    F_OFFSET_A,
    F_OFFSET_B,
    F_OUT,
    F_READ,
    F_SCAN,
    FOR_EVER,
    R_SERIES,
    R_WINDOW_MS,
    ROW_HEADER_WORDS,
    S_COLUMN,
    S_COLUMNS,
    S_KEEP_MS,
    S_LIFETIME,
    S_ROW_OFFSET,
    S_TILE_WORDS,
    S_WHERE,
    S_WIDTH_MS,
    TILE_HEADER_WORDS,
    V_TTL_MS,
    V_WHERE,
    V_WIDTH_MS,
    V_WINDOW_MS,
)

__all__ = ["apply_events", "copy_arena", "find_rows", "join_features", "read_features"]

# Words of an arena's header; the pool of series s has three words from H_POOLS + 3*s.
H_ROWS_USED, H_ROWS_MAX, H_INDEX_MASK, H_INDEX_AT, H_ROWS_AT, H_POOLS = range(6)
P_USED, P_MAX, P_AT = range(3)
POOL_WORDS = 3

#: The time of an event that never was.
NEVER = np.iinfo(np.int64).min
#: Links in a chain of tiles end here; an empty place of the index holds this.
NONE = -1
#: More tiles than any window has: at most 60 times the largest step of the ladder, and one more.
TILES_READ_MAX = 512

DONE = -1

kernel = nb.njit(cache=True, nogil=True, error_model="numpy")


@kernel
def _find(arena: Any, seed: Any, lo: Any, hi: Any) -> Any:
    """Return the arena offset of an entity's row, or `~place` of the index where it would go."""
    mask = arena[H_INDEX_MASK]
    place = np.int64((np.uint64(lo) ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(20)) & mask
    while True:
        row = arena[arena[H_INDEX_AT] + place]
        if row == NONE:
            return ~place
        if arena[row] == lo and arena[row + 1] == hi:
            return row
        place = (place + 1) & mask


@kernel
def _init(arena: Any, floats: Any, at: Any, columns: Any, first: Any, count: Any) -> None:
    for c in range(first, first + count):
        op, word = columns[c, C_OPERATION], at + columns[c, C_OFFSET]
        if op == SUM:
            floats[word] = 0.0
        elif op == MIN or op == MAX:
            floats[word] = np.nan
        elif op == LAST:
            arena[word] = NEVER
            floats[word + 1] = np.nan
        elif op == LAST_TIME:
            arena[word] = NEVER
        else:
            arena[word] = 0


@kernel
def _update(
    arena: Any, floats: Any, at: Any, columns: Any, first: Any, count: Any, time: Any, inputs: Any, i: Any
) -> None:
    for c in range(first, first + count):
        op, word = columns[c, C_OPERATION], at + columns[c, C_OFFSET]
        if op == COUNT:
            arena[word] += 1
            continue
        if op == LAST_TIME:
            arena[word] = max(arena[word], time)
            continue
        value = inputs[columns[c, C_INPUT], i]
        if np.isnan(value):  # null: numbers that are not finite never get here
            continue
        if op == VALUES:
            arena[word] += 1
        elif op == SUM:
            floats[word] += value
        elif op == MIN:
            if not floats[word] <= value:
                floats[word] = value
        elif op == MAX:
            if not floats[word] >= value:
                floats[word] = value
        elif op == LAST and time >= arena[word]:
            arena[word] = time
            floats[word + 1] = value


@kernel
def _merge(
    to: Any, to_floats: Any, older_at: Any, arena: Any, floats: Any, at: Any, columns: Any, first: Any, count: Any
) -> None:
    """Merge the newer partial at `at` into the older one at `older_at` of the scratch array."""
    for c in range(first, first + count):
        op, word, into = columns[c, C_OPERATION], at + columns[c, C_OFFSET], older_at + columns[c, C_OFFSET]
        if op == COUNT or op == VALUES:
            to[into] += arena[word]
        elif op == SUM:
            to_floats[into] += floats[word]
        elif op == MIN:
            if not to_floats[into] <= floats[word]:
                if not np.isnan(floats[word]):
                    to_floats[into] = floats[word]
        elif op == MAX:
            if not to_floats[into] >= floats[word]:
                if not np.isnan(floats[word]):
                    to_floats[into] = floats[word]
        elif op == LAST:
            if arena[word] >= to[into]:
                to[into] = arena[word]
                to_floats[into + 1] = floats[word + 1]
        elif op == LAST_TIME:
            to[into] = max(to[into], arena[word])


@kernel
def _tile(
    arena: Any, floats: Any, pool: Any, head: Any, number: Any, words: Any, columns: Any, first: Any, count: Any
) -> Any:
    """Return the arena offset of tile `number` in the chain of `head`, linked in if it was not there."""
    base = arena[pool + P_AT]
    link = head  # the word that points to the tile looked at
    while arena[link] != NONE:
        at = base + arena[link] * words
        if arena[at] == number:
            return at
        if arena[at] < number:
            break
        link = at + 1
    tile = arena[pool + P_USED]
    arena[pool + P_USED] = tile + 1
    at = base + tile * words
    arena[at] = number
    arena[at + 1] = arena[link]
    _init(arena, floats, at + TILE_HEADER_WORDS, columns, first, count)
    arena[link] = tile
    return at


@kernel
def _new_row(arena: Any, floats: Any, place: Any, lo: Any, hi: Any, row_words: Any, series: Any, columns: Any) -> Any:
    row = arena[H_ROWS_AT] + arena[H_ROWS_USED] * row_words
    arena[H_ROWS_USED] += 1
    arena[row] = lo
    arena[row + 1] = hi
    for word in range(row + ROW_HEADER_WORDS, row + row_words):
        arena[word] = NEVER
    for s in range(series.shape[0]):
        at = row + series[s, S_ROW_OFFSET]
        if series[s, S_LIFETIME]:
            _init(arena, floats, at + 1, columns, series[s, S_COLUMN], series[s, S_COLUMNS])
        else:
            arena[at] = NONE
    arena[arena[H_INDEX_AT] + place] = row
    return row


@kernel
def _has_room(arena: Any, series: Any) -> Any:
    """Say whether any event can be applied, whatever it needs."""
    room = arena[H_ROWS_USED] < arena[H_ROWS_MAX]
    for s in range(series.shape[0]):
        pool = H_POOLS + POOL_WORDS * s
        room = room and (series[s, S_LIFETIME] or arena[pool + P_USED] < arena[pool + P_MAX])
    return room


@kernel
def _apply_one(
    arena: Any,
    floats: Any,
    seed: Any,
    series: Any,
    columns: Any,
    row_words: Any,
    lo: Any,
    hi: Any,
    time: Any,
    arrival: Any,
    inputs: Any,
    masks: Any,
    i: Any,
) -> None:
    row = _find(arena, seed, lo, hi)
    if row < 0:
        row = _new_row(arena, floats, ~row, lo, hi, row_words, series, columns)
    now = arrival
    for w in range(masks.shape[0]):
        if masks[w, i]:
            arena[row + ROW_HEADER_WORDS + w] = max(arena[row + ROW_HEADER_WORDS + w], time)
        now = max(now, arena[row + ROW_HEADER_WORDS + w])
    for s in range(series.shape[0]):
        if not masks[series[s, S_WHERE], i]:
            continue
        first, count = series[s, S_COLUMN], series[s, S_COLUMNS]
        keep, at = series[s, S_KEEP_MS], row + series[s, S_ROW_OFFSET]
        if series[s, S_LIFETIME]:
            if keep != FOR_EVER:
                if time < arrival - keep:
                    continue  # too late
                if arena[at] != NEVER and arena[at] < arrival - keep:
                    _init(arena, floats, at + 1, columns, first, count)
            arena[at] = max(arena[at], time)
            _update(arena, floats, at + 1, columns, first, count, time, inputs, i)
        else:
            width = series[s, S_WIDTH_MS]
            number = time // width
            # Too late: no window that is still to be read covers this tile, since no read is as of a time
            # before the row's newest event. So a chain is never searched for longer than a window.
            if number < (now - keep) // width:
                continue
            tile = _tile(
                arena, floats, H_POOLS + POOL_WORDS * s, at, number, series[s, S_TILE_WORDS], columns, first, count
            )
            _update(arena, floats, tile + TILE_HEADER_WORDS, columns, first, count, time, inputs, i)


@kernel
def apply_events(
    arena: Any,
    floats: Any,
    seed: Any,
    series: Any,
    columns: Any,
    row_words: Any,
    rows: Any,
    start: Any,
    hashes: Any,
    times: Any,
    arrivals: Any,
    inputs: Any,
    masks: Any,
) -> Any:
    """Apply the events `rows[start:]` of a batch, in that order.

    hashes int64 [n, 2]; times, arrivals int64 [n]; inputs float64 [fields, n], NaN for null; masks
    bool [wheres, n]. Returns `DONE`, or the place in `rows` of the first event for which the arena
    has no room; that event is not begun, so the caller grows the arena and goes on from there.
    """
    for k in range(start, rows.shape[0]):
        if not _has_room(arena, series):
            return k
        i = rows[k]
        _apply_one(
            arena, floats, seed, series, columns, row_words, hashes[i, 0], hashes[i, 1], times[i], arrivals[i],
            inputs, masks, i,
        )  # fmt: skip
    return DONE


@kernel
def find_rows(arena: Any, seed: Any, hashes: Any, which: Any, wheres: Any, rows: Any, newest: Any) -> None:
    """Find the rows of the keys `hashes[which]`: arena offsets into `rows`, `NONE` if unknown.

    `newest[which]` is raised to the time of the newest event applied to the row.
    """
    for k in range(which.shape[0]):
        i = which[k]
        row = _find(arena, seed, hashes[i, 0], hashes[i, 1])
        rows[i] = row if row >= 0 else NONE
        if row >= 0:
            for w in range(wheres):
                newest[i] = max(newest[i], arena[row + ROW_HEADER_WORDS + w])


@kernel
def _scan(
    arena: Any,
    floats: Any,
    scratch: Any,
    scratch_floats: Any,
    row: Any,
    series: Any,
    s: Any,
    columns: Any,
    window: Any,
    as_of: Any,
    chain: Any,
) -> None:
    """Merge into `scratch` what series s of a row holds inside the window, oldest tile first."""
    first, count = series[s, S_COLUMN], series[s, S_COLUMNS]
    _init(scratch, scratch_floats, 0, columns, first, count)
    if row == NONE:
        return
    at = row + series[s, S_ROW_OFFSET]
    if series[s, S_LIFETIME]:
        keep = series[s, S_KEEP_MS]
        if arena[at] != NEVER and (keep == FOR_EVER or arena[at] >= as_of - keep):
            _merge(scratch, scratch_floats, 0, arena, floats, at + 1, columns, first, count)
        return
    width, words = series[s, S_WIDTH_MS], series[s, S_TILE_WORDS]
    oldest = (as_of - window) // width
    base = arena[H_POOLS + POOL_WORDS * s + P_AT]
    found = 0
    link = arena[at]
    while link != NONE and found < TILES_READ_MAX:
        tile = base + link * words
        if arena[tile] < oldest:
            break
        chain[found] = tile
        found += 1
        link = arena[tile + 1]
    for k in range(found - 1, -1, -1):
        _merge(scratch, scratch_floats, 0, arena, floats, chain[k] + TILE_HEADER_WORDS, columns, first, count)


@kernel
def _scratch(columns: Any) -> Any:
    """Return room for any partial of a table."""
    words = 2
    for c in range(columns.shape[0]):
        words = max(words, columns[c, C_OFFSET] + 2)
    return np.empty(words, np.int64)


@kernel
def _read_one(
    arena: Any,
    floats: Any,
    series: Any,
    columns: Any,
    scans: Any,
    features: Any,
    views: Any,
    row: Any,
    as_of: Any,
    out: Any,
    known: Any,
    i: Any,
    scratch: Any,
    scratch_floats: Any,
    chain: Any,
) -> None:
    scanned = -1
    for f in range(features.shape[0]):
        scan = features[f, F_SCAN]
        if scan != scanned:
            _scan(
                arena, floats, scratch, scratch_floats, row, series, scans[scan, R_SERIES], columns,
                scans[scan, R_WINDOW_MS], as_of, chain,
            )  # fmt: skip
            scanned = scan
        a, b, how = features[f, F_OFFSET_A], features[f, F_OFFSET_B], features[f, F_READ]
        if how == READ_INT:
            value: Any = np.float64(scratch[a])
        elif how == READ_FLOAT:
            value = scratch_floats[a]
        elif how == READ_RATIO:
            value = scratch_floats[a] / scratch[b] if scratch[b] > 0 else np.nan
        elif how == READ_LAST:
            value = scratch_floats[a + 1]
        else:
            value = (as_of - scratch[a]) / 1000.0 if scratch[a] != NEVER else np.nan
        out[i, features[f, F_OUT]] = value
    for v in range(views.shape[0]):
        seen = NEVER if row == NONE else arena[row + ROW_HEADER_WORDS + views[v, V_WHERE]]
        if seen == NEVER or views[v, V_TTL_MS] == FOR_EVER:
            known[i, v] = seen != NEVER
        else:
            width = views[v, V_WIDTH_MS]
            window_start = (as_of - views[v, V_WINDOW_MS]) // width * width
            known[i, v] = seen >= min(window_start, as_of - views[v, V_TTL_MS])


@kernel
def read_features(
    arena: Any,
    floats: Any,
    series: Any,
    columns: Any,
    scans: Any,
    features: Any,
    views: Any,
    which: Any,
    rows: Any,
    as_of: Any,
    out: Any,
    known: Any,
) -> None:
    """Read the features of the rows `rows[which]` as of `as_of[which]`.

    out float64 [n, features] and known bool [n, views] are filled at `which`; a row of `NONE` reads
    as an entity without events.
    """
    scratch = _scratch(columns)
    scratch_floats = scratch.view(np.float64)
    chain = np.empty(TILES_READ_MAX, np.int64)
    for k in range(which.shape[0]):
        i = which[k]
        _read_one(
            arena, floats, series, columns, scans, features, views, rows[i], as_of[i], out, known, i,
            scratch, scratch_floats, chain,
        )  # fmt: skip


@kernel
def join_features(
    arena: Any,
    floats: Any,
    seed: Any,
    series: Any,
    columns: Any,
    row_words: Any,
    steps: Any,
    start: Any,
    hashes: Any,
    times: Any,
    arrivals: Any,
    inputs: Any,
    masks: Any,
    scans: Any,
    features: Any,
    views: Any,
    asked: Any,
    as_of: Any,
    out: Any,
    known: Any,
) -> Any:
    """Apply events and read features in one order: the point-in-time join of one slot.

    steps int64: i applies event i, ~i reads for key `asked[i]`, int64 [m, 2], as of `as_of[i]`.
    Returns as `apply_events`.
    """
    scratch = _scratch(columns)
    scratch_floats = scratch.view(np.float64)
    chain = np.empty(TILES_READ_MAX, np.int64)
    for k in range(start, steps.shape[0]):
        i = steps[k]
        if i >= 0:
            if not _has_room(arena, series):
                return k
            _apply_one(
                arena, floats, seed, series, columns, row_words, hashes[i, 0], hashes[i, 1], times[i],
                arrivals[i], inputs, masks, i,
            )  # fmt: skip
        else:
            i = ~i
            row = _find(arena, seed, asked[i, 0], asked[i, 1])
            _read_one(
                arena, floats, series, columns, scans, features, views, row if row >= 0 else NONE, as_of[i],
                out, known, i, scratch, scratch_floats, chain,
            )  # fmt: skip
    return DONE


@kernel
def copy_arena(old: Any, new: Any, seed: Any, series: Any, row_words: Any) -> None:
    """Copy rows and tiles into a larger arena, whose header is laid out and whose index is empty."""
    shift = new[H_ROWS_AT] - old[H_ROWS_AT]
    used = old[H_ROWS_USED] * row_words
    new[new[H_ROWS_AT] : new[H_ROWS_AT] + used] = old[old[H_ROWS_AT] : old[H_ROWS_AT] + used]
    new[H_ROWS_USED] = old[H_ROWS_USED]
    for s in range(series.shape[0]):
        pool = H_POOLS + POOL_WORDS * s
        used = old[pool + P_USED] * series[s, S_TILE_WORDS]
        new[new[pool + P_AT] : new[pool + P_AT] + used] = old[old[pool + P_AT] : old[pool + P_AT] + used]
        new[pool + P_USED] = old[pool + P_USED]
    if new[H_INDEX_MASK] == old[H_INDEX_MASK]:
        for place in range(old[H_INDEX_MASK] + 1):
            row = old[old[H_INDEX_AT] + place]
            new[new[H_INDEX_AT] + place] = row + shift if row != NONE else NONE
    else:
        for r in range(new[H_ROWS_USED]):
            row = new[H_ROWS_AT] + r * row_words
            new[new[H_INDEX_AT] + ~_find(new, seed, new[row], new[row + 1])] = row
