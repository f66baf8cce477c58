"""Applying events to tiles, and taking away what no window can see any more: what the one writer does."""

from __future__ import annotations

from typing import Any

import numpy as np

from millpond.feature_actors.aggregations import dispatch
from millpond.feature_actors.aggregations.aggregation import NEVER
from millpond.feature_actors.tiles.compiled import inner, kernel, prefetch_to_write
from millpond.feature_actors.tiles.memory import M_SLOTS
from millpond.feature_actors.tiles.program import (
    C_BY,
    C_INPUT,
    C_N,
    C_OFFSET,
    C_PART,
    C_SETTING,
    C_TAKES_INPUT,
    FOR_EVER,
    NO,
    S_COLUMN,
    S_COLUMNS,
    S_EXACT,
    S_FINE_POOL,
    S_KEEP_MS,
    S_LIFETIME,
    S_POOL,
    S_ROW_AT,
    S_TILE_WORDS,
    S_WHERE,
    S_WIDTH_MS,
    T_RESERVE_WORDS,
    T_ROW_WORDS,
    T_SLOT_WORDS,
    T_SLOTS_AT,
    T_WHERES,
)
from millpond.feature_actors.tiles.structure import (
    EXACT_TILE_HEADER_WORDS,
    H_INDEX_AT,
    H_PLACES,
    H_POOLS,
    H_ROWS,
    NUMBER_MASK,
    ROW_HEADER_WORDS,
    ROW_SEQUENCE,
    TILE_HEADER_WORDS,
    begin_write,
    end_write,
    find,
    give,
    grow_index,
    index_is_full,
    index_words_wanted,
    mark_of,
    next_of,
    number_of,
    place_of,
    put,
    room,
    take,
    take_out,
)

__all__ = [
    "DONE",
    "apply_events",
    "apply_one",
    "clear_columns",
    "has_room",
    "mark_texts",
    "new_row",
    "reclaim_rows",
    "remove_row",
    "remove_rows",
]

#: What `apply_events` returns when it has come to the end.
DONE = -1

_NO_LIMIT = np.int64(1) << 32
#: So many events are looked up before they are applied, so that their memory is on its way meanwhile.
_AHEAD = 16


@inner
def init_columns(words: Any, floats: Any, at: Any, columns: Any, first: Any, count: Any) -> None:
    for c in range(first, first + count):
        dispatch.init(columns[c, C_PART], words, floats, at + columns[c, C_OFFSET], columns[c, C_N])


@inner
def merge_columns(
    to: Any, to_floats: Any, words: Any, floats: Any, at: Any, columns: Any, first: Any, count: Any
) -> None:
    """Merge the newer partial at `at` into the older one at the beginning of `to`."""
    for c in range(first, first + count):
        offset = columns[c, C_OFFSET]
        dispatch.merge(
            columns[c, C_PART], to, to_floats, offset, columns[c, C_N], columns[c, C_SETTING], words, floats,
            at + offset,
        )  # fmt: skip


@inner
def _update_columns(
    words: Any, floats: Any, at: Any, columns: Any, first: Any, count: Any, time: Any, inputs: Any, i: Any
) -> None:
    for c in range(first, first + count):
        value = by = 0.0
        if columns[c, C_TAKES_INPUT]:
            value = inputs[columns[c, C_INPUT], i]
            if np.isnan(value):  # null: numbers that are not finite never get here
                continue
            if columns[c, C_BY] != NO:
                by = inputs[columns[c, C_BY], i]
                if np.isnan(by):
                    continue
        dispatch.update(
            columns[c, C_PART], words, floats, at + columns[c, C_OFFSET], columns[c, C_N], columns[c, C_SETTING],
            value, by, time,
        )  # fmt: skip


# -- tiles


@inner
def _fine_words(series: Any, s: Any) -> Any:
    return series[s, S_TILE_WORDS] - EXACT_TILE_HEADER_WORDS + TILE_HEADER_WORDS


@inner
def _free_ring(words: Any, halves: Any, pool: Any, head_half: Any) -> Any:
    """Free all tiles of a ring without rings of their own; return how many."""
    head = np.int64(halves[head_half])
    freed = 0
    if head != 0:
        tile = next_of(halves, head)
        while True:
            after = next_of(halves, tile)
            give(words, halves, pool, tile)
            freed += 1
            if tile == head:
                break
            tile = after
        halves[head_half] = 0
    return freed


@inner
def _free_tiles(words: Any, halves: Any, slot: Any, series: Any, s: Any, head_half: Any) -> Any:
    """Free all tiles of a row's series; return how many."""
    if series[s, S_EXACT]:
        head = np.int64(halves[head_half])
        if head != 0:
            tile = next_of(halves, head)
            while True:
                _free_ring(words, halves, slot + series[s, S_FINE_POOL], 2 * (tile + 1))
                if tile == head:
                    break
                tile = next_of(halves, tile)
    return _free_ring(words, halves, slot + series[s, S_POOL], head_half)


@inner
def _tile(
    words: Any, floats: Any, halves: Any, slot: Any, series: Any, s: Any, columns: Any, head_half: Any, number: Any,
    anchor: Any, oldest_kept: Any,
) -> Any:  # fmt: skip
    """Return the tile `number` of a row's series, made if it was not there.

    Where the oldest tile is out of sight it is taken for the new one, so a ring never has more tiles than a window.
    """
    pool = slot + series[s, S_POOL]
    head: Any = np.int64(halves[head_half])
    newest = number
    if head != 0:
        newest = number_of(halves, head, anchor)
        if newest == number:
            return head
        if newest < oldest_kept:
            _free_tiles(words, halves, slot, series, s, head_half)
            head = 0
    if head == 0:
        tile = take(words, halves, pool, series[s, S_TILE_WORDS])
        halves[2 * tile + 1] = tile
        halves[head_half] = tile
    else:
        before, after = head, next_of(halves, head)
        oldest = after
        if number < newest:
            while True:  # the head is newer, so this ends before it comes round
                here = number_of(halves, after, anchor)
                if here == number:
                    return after
                if here > number:
                    break
                before = after
                after = next_of(halves, after)
        if oldest != head and number_of(halves, oldest, anchor) < oldest_kept:
            tile = oldest
            if before == oldest:
                before = head
            if after == oldest:
                after = next_of(halves, oldest)
            halves[2 * head + 1] = next_of(halves, oldest)
            if series[s, S_EXACT]:
                _free_ring(words, halves, slot + series[s, S_FINE_POOL], 2 * (tile + 1))
        else:
            tile = take(words, halves, pool, series[s, S_TILE_WORDS])
        halves[2 * tile + 1] = after
        halves[2 * before + 1] = tile
        if number > newest:
            halves[head_half] = tile
    halves[2 * tile] = number & NUMBER_MASK
    header = TILE_HEADER_WORDS
    if series[s, S_EXACT]:
        words[tile + 1] = 0
        header = EXACT_TILE_HEADER_WORDS
    init_columns(words, floats, tile + header, columns, series[s, S_COLUMN], series[s, S_COLUMNS])
    return tile


@inner
def _fine_tile(
    words: Any, floats: Any, halves: Any, slot: Any, series: Any, s: Any, columns: Any, tile: Any, number: Any
) -> Any:
    """Return the fine tile of millisecond `number`, counted from the start of its tile, made if it was not there."""
    head_half = 2 * (tile + 1)
    head = np.int64(halves[head_half])
    pool = slot + series[s, S_FINE_POOL]
    if head != 0 and np.int64(halves[2 * head]) == number:
        return head
    newer = head == 0 or np.int64(halves[2 * head]) < number
    before, after = head, head
    if head != 0:
        after = next_of(halves, head)
        if not newer:
            while np.int64(halves[2 * after]) < number:
                before = after
                after = next_of(halves, after)
            if np.int64(halves[2 * after]) == number:
                return after
    fine = take(words, halves, pool, _fine_words(series, s))
    halves[2 * fine] = number
    if head == 0:
        halves[2 * fine + 1] = fine
    else:
        halves[2 * fine + 1] = after
        halves[2 * before + 1] = fine
    if newer:
        halves[head_half] = fine
    init_columns(words, floats, fine + TILE_HEADER_WORDS, columns, series[s, S_COLUMN], series[s, S_COLUMNS])
    return fine


# -- events


@inner
def new_row(
    words: Any, floats: Any, halves: Any, slot: Any, table: Any, series: Any, columns: Any, lo: Any, hi: Any, mark: Any
) -> Any:
    row = take(words, halves, slot + H_POOLS, table[T_ROW_WORDS])
    words[row] = lo
    words[row + 1] = hi
    words[row + ROW_SEQUENCE] = -1
    times = row + ROW_HEADER_WORDS
    for w in range(table[T_WHERES]):
        words[times + w] = NEVER
    for word in range(times + table[T_WHERES], row + table[T_ROW_WORDS]):
        words[word] = 0  # heads of rings without a tile
    for s in range(series.shape[0]):
        if series[s, S_LIFETIME]:
            at = row + series[s, S_ROW_AT]
            if series[s, S_KEEP_MS] != FOR_EVER:
                words[at] = NEVER
                at += 1
            init_columns(words, floats, at, columns, series[s, S_COLUMN], series[s, S_COLUMNS])
    words[slot + H_ROWS] += 1
    put(words, words[slot + H_INDEX_AT], words[slot + H_PLACES], np.int64(mark << np.uint64(32)) | row)
    return row


@inner
def has_room(words: Any, table: Any) -> Any:
    """Say whether any event can be applied, whatever it needs, but for a larger index."""
    return room(words) >= table[T_RESERVE_WORDS]


@inner
def apply_one(
    words: Any, floats: Any, halves: Any, table: Any, series: Any, columns: Any, slot: Any, row: Any, mark: Any,
    lo: Any, hi: Any, time: Any, arrival: Any, inputs: Any, masks: Any, i: Any, sequence: Any,
) -> Any:  # fmt: skip
    """Apply event i to its row, or to a new one if `row` is 0; return False, and change nothing, without room.

    A row that has been brought as far as `sequence` has the event already.
    """
    if row == 0:
        row = find(words, slot, lo, hi, mark, _NO_LIMIT, table[T_ROW_WORDS])
    if row != 0 and words[row + ROW_SEQUENCE] >= sequence:
        return True
    if row == 0 and index_is_full(words, slot):
        if room(words) < table[T_RESERVE_WORDS] + index_words_wanted(words, slot):
            return False
        grow_index(words, slot, index_words_wanted(words, slot))
    begin_write(words, slot)
    if row == 0:
        row = new_row(words, floats, halves, slot, table, series, columns, lo, hi, mark)
    times = row + ROW_HEADER_WORDS
    now = max(arrival, time, words[times])  # the first `where` is every event
    for s in range(series.shape[0]):
        where = series[s, S_WHERE]
        if not masks[where, i]:
            continue
        first, count, keep = series[s, S_COLUMN], series[s, S_COLUMNS], series[s, S_KEEP_MS]
        if series[s, S_LIFETIME]:
            at = row + series[s, S_ROW_AT]
            if keep != FOR_EVER:
                if time < arrival - keep:
                    continue  # too late
                if words[at] != NEVER and words[at] < arrival - keep:
                    init_columns(words, floats, at + 1, columns, first, count)
                words[at] = max(words[at], time)
                at += 1
            _update_columns(words, floats, at, columns, first, count, time, inputs, i)
            continue
        width = series[s, S_WIDTH_MS]
        number, oldest_kept = time // width, (now - keep) // width
        head_half = 2 * row + series[s, S_ROW_AT]
        anchor = words[times + where] // width
        if number < oldest_kept:
            # Too late: no window that is still to be read covers this tile, since no read is as of a time before the
            # row's newest event. A ring that lies as far back must not be read relative to this event either.
            if halves[head_half] != 0 and number_of(halves, np.int64(halves[head_half]), anchor) < oldest_kept:
                _free_tiles(words, halves, slot, series, s, head_half)
            continue
        tile = _tile(words, floats, halves, slot, series, s, columns, head_half, number, anchor, oldest_kept)
        if series[s, S_EXACT]:
            _update_columns(words, floats, tile + EXACT_TILE_HEADER_WORDS, columns, first, count, time, inputs, i)
            fine = _fine_tile(words, floats, halves, slot, series, s, columns, tile, time - number * width)
            _update_columns(words, floats, fine + TILE_HEADER_WORDS, columns, first, count, time, inputs, i)
        else:
            _update_columns(words, floats, tile + TILE_HEADER_WORDS, columns, first, count, time, inputs, i)
    for w in range(masks.shape[0]):
        if masks[w, i]:
            words[times + w] = max(words[times + w], time)
    words[row + ROW_SEQUENCE] = sequence
    end_write(words, slot)
    return True


@kernel
def apply_events(
    words: Any, floats: Any, halves: Any, program: Any, rows: Any, start: Any, hashes: Any, times: Any, arrivals: Any,
    inputs: Any, masks: Any, base: Any,
) -> Any:  # fmt: skip
    """Apply the events `rows[start:]` of a batch, in that order, which ascends.

    program: a `TableProgram`; hashes int64 [n, 2]; times, arrivals int64 [n]; inputs float64 [fields, n], NaN for
    null; masks bool [wheres, n]; base: sequence of event 0, so that of event i is base + i. Returns `DONE`, or the
    place in `rows` of the first event for which the memory has no room; that event is not begun, so the caller lets
    the memory grow and goes on from there.
    """
    table, series, columns = program
    slots = np.uint64(words[M_SLOTS])
    found = np.empty(_AHEAD, np.int64)
    slot_of = np.empty(_AHEAD, np.int64)
    marks = np.empty(_AHEAD, np.uint64)
    for block in range(start, rows.shape[0], _AHEAD):
        size = min(_AHEAD, rows.shape[0] - block)
        for b in range(size):
            i = rows[block + b]
            marks[b] = mark_of(words, hashes[i, 0])
            slot_of[b] = table[T_SLOTS_AT] + np.int64(np.uint64(hashes[i, 1]) % slots) * table[T_SLOT_WORDS]
            place = place_of(marks[b], words[slot_of[b] + H_PLACES])
            prefetch_to_write(words, words[slot_of[b] + H_INDEX_AT] + place)
        for b in range(size):
            # A likely row, by the index alone; whose it is, is looked at when it is here.
            index, places = words[slot_of[b] + H_INDEX_AT], words[slot_of[b] + H_PLACES]
            place = place_of(marks[b], places)
            found[b] = 0
            for _ in range(places):
                entry = np.uint64(words[index + place])
                if entry == 0:
                    break
                if entry >> np.uint64(32) == marks[b]:
                    found[b] = np.int64(entry & np.uint64(NUMBER_MASK))
                    prefetch_to_write(words, found[b])
                    prefetch_to_write(words, found[b] + table[T_ROW_WORDS] - 1)
                    break
                place = place + 1 if place + 1 < places else 0
        for b in range(size):
            i = rows[block + b]
            row = found[b]
            if row != 0 and (words[row] != hashes[i, 0] or words[row + 1] != hashes[i, 1]):
                found[b] = row = 0
            if row != 0:
                for s in range(series.shape[0]):
                    if not series[s, S_LIFETIME]:
                        head = np.int64(halves[2 * row + series[s, S_ROW_AT]])
                        if head != 0:
                            prefetch_to_write(words, head)
        for b in range(size):
            if found[b] != 0:
                for s in range(series.shape[0]):
                    if not series[s, S_LIFETIME]:
                        head = np.int64(halves[2 * found[b] + series[s, S_ROW_AT]])
                        if head != 0 and next_of(halves, head) != head:
                            prefetch_to_write(words, next_of(halves, head))
        for b in range(size):
            i = rows[block + b]
            if not has_room(words, table) or not apply_one(
                words, floats, halves, table, series, columns, slot_of[b], found[b], marks[b], hashes[i, 0],
                hashes[i, 1], times[i], arrivals[i], inputs, masks, i, base + i,
            ):  # fmt: skip
                return block + b
    return DONE


# -- reclaim


@inner
def _reclaim_row(
    words: Any, halves: Any, table: Any, series: Any, slot: Any, row: Any, floor: Any, views_keep: Any
) -> Any:
    """Free what of a row no read as of `floor` or later can see; return whether anything is left."""
    times = row + ROW_HEADER_WORDS
    left = words[times] >= floor - views_keep
    for s in range(series.shape[0]):
        keep = series[s, S_KEEP_MS]
        if series[s, S_LIFETIME]:
            # An event that comes late starts a partial anew when this one expired before its arrival, which may lie
            # a ttl behind what is visible: only after that nothing tells a partial from none.
            if keep == FOR_EVER or words[row + series[s, S_ROW_AT]] >= floor - 2 * keep:
                left = True
            continue
        width = series[s, S_WIDTH_MS]
        oldest_kept = (floor - keep) // width
        head_half = 2 * row + series[s, S_ROW_AT]
        head = np.int64(halves[head_half])
        if head == 0:
            continue
        anchor = words[times + series[s, S_WHERE]] // width
        if number_of(halves, head, anchor) < oldest_kept:
            begin_write(words, slot)
            _free_tiles(words, halves, slot, series, s, head_half)
            end_write(words, slot)
            continue
        left = True
        oldest = next_of(halves, head)
        while number_of(halves, oldest, anchor) < oldest_kept:  # which the head is not
            begin_write(words, slot)
            halves[2 * head + 1] = next_of(halves, oldest)
            if series[s, S_EXACT]:
                _free_ring(words, halves, slot + series[s, S_FINE_POOL], 2 * (oldest + 1))
            give(words, halves, slot + series[s, S_POOL], oldest)
            end_write(words, slot)
            oldest = next_of(halves, head)
    return left


@kernel
def reclaim_rows(words: Any, halves: Any, program: Any, cursor: Any, budget: Any, floor: Any, views_keep: Any) -> Any:
    """Look at `budget` places of the table's indexes, from where the last call ended, and free what is out of sight.

    cursor int64 [2]: slot and place, moved on. floor: no read is as of a time before it; views_keep: how far back
    an event makes an entity known. Returns how many rows were freed.
    """
    table, series, _ = program
    slots = words[M_SLOTS]
    freed = 0
    for _ in range(budget):
        slot = table[T_SLOTS_AT] + cursor[0] * table[T_SLOT_WORDS]
        if cursor[1] >= words[slot + H_PLACES]:
            cursor[0] = (cursor[0] + 1) % slots
            cursor[1] = 0
            continue
        index = words[slot + H_INDEX_AT]
        if cursor[1] + _AHEAD < words[slot + H_PLACES]:
            prefetch_to_write(words, words[index + cursor[1] + _AHEAD] & NUMBER_MASK)
        row = words[index + cursor[1]] & NUMBER_MASK
        if row == 0 or _reclaim_row(words, halves, table, series, slot, row, floor, views_keep):
            cursor[1] += 1
            continue
        begin_write(words, slot)
        take_out(words, slot, cursor[1])  # another entry may stand here now
        words[slot + H_ROWS] -= 1
        words[row], words[row + 1] = 0, 0  # whose it was
        give(words, halves, slot + H_POOLS, row)
        end_write(words, slot)
        freed += 1
    return freed


# -- rows that are to leave nothing behind


@inner
def _wipe_ring(words: Any, halves: Any, pool: Any, head_half: Any, size: Any) -> None:
    """Free all tiles of a ring, each of so many words, and overwrite them."""
    head = np.int64(halves[head_half])
    if head == 0:
        return
    tile = next_of(halves, head)
    while True:
        after = next_of(halves, tile)
        words[tile : tile + size] = 0
        give(words, halves, pool, tile)
        if tile == head:
            break
        tile = after
    halves[head_half] = 0


@inner
def _place_of_row(words: Any, slot: Any, row: Any, mark: Any) -> Any:
    """Return the place in the index at which a row stands."""
    index, places = words[slot + H_INDEX_AT], words[slot + H_PLACES]
    place = place_of(mark, places)
    while np.int64(np.uint64(words[index + place]) & np.uint64(NUMBER_MASK)) != row:
        place = place + 1 if place + 1 < places else 0
    return place


@inner
def _mark(floats: Any, at: Any, text_words: Any, first: Any, end: Any, addresses: Any, used: Any) -> None:
    for t in range(first, end):
        value = floats[at + text_words[t]]
        place = np.searchsorted(addresses, value)
        if place < addresses.shape[0] and addresses[place] == value:
            used[place] = True


@kernel
def mark_texts(
    words: Any, floats: Any, halves: Any, program: Any, firsts: Any, text_words: Any, addresses: Any, used: Any
) -> None:
    """Mark in `used`, bool [k], which of the strings at `addresses`, float64 [k], ascending, a row of the table names.

    firsts int64 [series + 1]: where in text_words int64 [m] those words of a series' partial stand that are addresses.
    """
    table, series, _ = program
    for number in range(words[M_SLOTS]):
        slot = table[T_SLOTS_AT] + number * table[T_SLOT_WORDS]
        index = words[slot + H_INDEX_AT]
        for place in range(words[slot + H_PLACES]):
            row = words[index + place] & NUMBER_MASK
            if row == 0:
                continue
            for s in range(series.shape[0]):
                first, end = firsts[s], firsts[s + 1]
                if first == end:
                    continue
                if series[s, S_LIFETIME]:
                    at = row + series[s, S_ROW_AT] + (0 if series[s, S_KEEP_MS] == FOR_EVER else 1)
                    _mark(floats, at, text_words, first, end, addresses, used)
                    continue
                head = np.int64(halves[2 * row + series[s, S_ROW_AT]])
                tile = head
                while head != 0:
                    header = EXACT_TILE_HEADER_WORDS if series[s, S_EXACT] else TILE_HEADER_WORDS
                    _mark(floats, tile + header, text_words, first, end, addresses, used)
                    fine_head = np.int64(0)
                    if series[s, S_EXACT]:
                        fine_head = np.int64(halves[2 * (tile + 1)])
                    fine = fine_head
                    while fine_head != 0:
                        _mark(floats, fine + TILE_HEADER_WORDS, text_words, first, end, addresses, used)
                        fine = next_of(halves, fine)
                        if fine == fine_head:
                            break
                    tile = next_of(halves, tile)
                    if tile == head:
                        break


@inner
def _clear(words: Any, floats: Any, at: Any, columns: Any, chosen: Any, first: Any, count: Any) -> None:
    for c in range(first, first + count):
        if chosen[c]:
            dispatch.init(columns[c, C_PART], words, floats, at + columns[c, C_OFFSET], columns[c, C_N])


@kernel
def clear_columns(words: Any, floats: Any, halves: Any, program: Any, hashes: Any, chosen: Any) -> None:
    """Have nothing in the chosen columns, bool [columns], of the rows of some keys, int64 [n, 2]."""
    table, series, columns = program
    slots = np.uint64(words[M_SLOTS])
    for i in range(hashes.shape[0]):
        lo, hi = hashes[i, 0], hashes[i, 1]
        slot = table[T_SLOTS_AT] + np.int64(np.uint64(hi) % slots) * table[T_SLOT_WORDS]
        row = find(words, slot, lo, hi, mark_of(words, lo), _NO_LIMIT, table[T_ROW_WORDS])
        if row == 0:
            continue
        begin_write(words, slot)
        for s in range(series.shape[0]):
            first, count = series[s, S_COLUMN], series[s, S_COLUMNS]
            if series[s, S_LIFETIME]:
                at = row + series[s, S_ROW_AT] + (0 if series[s, S_KEEP_MS] == FOR_EVER else 1)
                _clear(words, floats, at, columns, chosen, first, count)
                continue
            head = np.int64(halves[2 * row + series[s, S_ROW_AT]])
            tile = head
            while head != 0:
                header = EXACT_TILE_HEADER_WORDS if series[s, S_EXACT] else TILE_HEADER_WORDS
                _clear(words, floats, tile + header, columns, chosen, first, count)
                fine_head = np.int64(0)
                if series[s, S_EXACT]:
                    fine_head = np.int64(halves[2 * (tile + 1)])
                fine = fine_head
                while fine_head != 0:
                    _clear(words, floats, fine + TILE_HEADER_WORDS, columns, chosen, first, count)
                    fine = next_of(halves, fine)
                    if fine == fine_head:
                        break
                tile = next_of(halves, tile)
                if tile == head:
                    break
        end_write(words, slot)


@inner
def remove_row(words: Any, halves: Any, table: Any, series: Any, slot: Any, row: Any, mark: Any) -> None:
    """Remove a row, and overwrite what it had; between the two steps of a write."""
    for s in range(series.shape[0]):
        if series[s, S_LIFETIME]:
            continue
        head_half = 2 * row + series[s, S_ROW_AT]
        if series[s, S_EXACT]:
            head = np.int64(halves[head_half])
            tile = head
            while head != 0:
                _wipe_ring(words, halves, slot + series[s, S_FINE_POOL], 2 * (tile + 1), _fine_words(series, s))
                tile = next_of(halves, tile)
                if tile == head:
                    break
        _wipe_ring(words, halves, slot + series[s, S_POOL], head_half, series[s, S_TILE_WORDS])
    take_out(words, slot, _place_of_row(words, slot, row, mark))
    words[slot + H_ROWS] -= 1
    words[row : row + table[T_ROW_WORDS]] = 0
    give(words, halves, slot + H_POOLS, row)


@kernel
def remove_rows(words: Any, halves: Any, program: Any, hashes: Any) -> Any:
    """Remove the rows of some keys, int64 [n, 2], those that are there, and overwrite what they had; return how many
    there were."""
    table, series, _ = program
    slots = np.uint64(words[M_SLOTS])
    removed = 0
    for i in range(hashes.shape[0]):
        lo, hi = hashes[i, 0], hashes[i, 1]
        slot = table[T_SLOTS_AT] + np.int64(np.uint64(hi) % slots) * table[T_SLOT_WORDS]
        mark = mark_of(words, lo)
        row = find(words, slot, lo, hi, mark, _NO_LIMIT, table[T_ROW_WORDS])
        if row == 0:
            continue
        begin_write(words, slot)
        remove_row(words, halves, table, series, slot, row, mark)
        end_write(words, slot)
        removed += 1
    return removed
