"""Reading features: by the writer itself, and by readers who share nothing with it but its memory.

A reader's loops must end, and stay in mapped memory, whatever they find: every address is held against the memory's
limit, every ring is left where it does not ascend, or when its slot has changed. What was read is used only if it has
not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from millpond.feature_actors.aggregations import dispatch
from millpond.feature_actors.aggregations.aggregation import NEVER
from millpond.feature_actors.keys import hash_word
from millpond.feature_actors.tiles.apply import DONE, apply_one, has_room, init_columns, merge_columns
from millpond.feature_actors.tiles.compiled import (
    bools_at,
    floats_at,
    inner,
    kernel,
    load_acquire,
    prefetch,
    unpacked,
    views_at,
    words_at,
)
from millpond.feature_actors.tiles.memory import (
    C_EPOCH,
    M_LAYOUT,
    M_LIMIT,
    M_NEWEST_ARRIVAL,
    M_NEWEST_RECEIVED,
    M_SLOTS,
)
from millpond.feature_actors.tiles.program import (
    F_AGGREGATION,
    F_N,
    F_OFFSET_A,
    F_OFFSET_B,
    F_OUT,
    F_SCAN,
    F_SETTING,
    F_WIDTH,
    FOR_EVER,
    NO,
    P_FEATURE,
    P_KEY,
    P_ROW_WORDS,
    P_SCAN,
    P_SLOT_WORDS,
    P_SLOTS_AT,
    P_VIEW,
    R_SERIES,
    R_WINDOW_MS,
    S_COLUMN,
    S_COLUMNS,
    S_EXACT,
    S_KEEP_MS,
    S_LIFETIME,
    S_ROW_AT,
    S_TILE_WORDS,
    S_WHERE,
    S_WIDTH_MS,
    T_SLOT_WORDS,
    T_SLOTS_AT,
    V_EXACT_SERIES,
    V_EXACT_WINDOW_MS,
    V_OUT,
    V_TTL_MS,
    V_WHERE,
    V_WIDTH_MS,
    V_WINDOW_MS,
)
from millpond.feature_actors.tiles.structure import (
    EXACT_TILE_HEADER_WORDS,
    H_INDEX_AT,
    H_PLACES,
    H_SEQUENCE,
    NUMBER_MASK,
    ROW_HEADER_WORDS,
    ROW_SEQUENCE,
    TILE_HEADER_WORDS,
    find,
    mark_of,
    next_of,
    number_of,
    place_of,
    unchanged,
)

__all__ = [
    "BASE", "BUSY", "CONTROL", "DONE", "EPOCH", "FOREIGN", "MOVED", "NO_CLOCK", "PAST", "join_features", "read_rows",
]  # fmt: skip

#: What `read_rows` returns when it did not come to the end: a slot is being written, or was left half-written; a
#: shard has another epoch; as-of lies in the past; the memory is of another layout.
BUSY, MOVED, PAST, FOREIGN = 1, 2, 3, 4
#: Words of a call of `read_rows`: addresses of arrays, their sizes, numbers; row and detail are written by it.
(
    A_SHARDS, A_SHARDS_N, A_OWNERS, A_SLOTS, A_LAYOUT, A_PROGRAM, A_PLANS, A_PLANS_N, A_IDS, A_IDS_N, A_HASHES, A_KEYS,
    A_N, A_START, A_CLOCK, A_EVENT_CLOCK, A_ASKED, A_AS_OF, A_OUT, A_COLUMNS, A_KNOWN, A_VIEWS, A_TRACE, A_TRACED,
    A_ROW, A_DETAIL,
) = range(26)  # fmt: skip
#: Lines of what it is told of shards.
BASE, CONTROL, EPOCH = range(3)
#: In place of a clock, where there is none.
NO_CLOCK = np.iinfo(np.int64).min

#: How often a row is read anew when it was written meanwhile.
_TRIES = 64
#: How often a slot is looked at that is being written: some microseconds.
_SPINS = 2_000
#: A ring's slot is looked at after so many tiles, in case that the ring has no end.
_LOOK_EVERY = 1_024
#: So many ids are looked up ahead of reading them, in so many steps if there are several.
_AHEAD = 16
_STEPS_AHEAD = 64


@inner
def _merge_fine(
    scratch: Any, scratch_floats: Any, words: Any, floats: Any, halves: Any, limit: Any, slot: Any, sequence: Any,
    tile: Any, fine_words: Any, columns: Any, first: Any, count: Any, oldest: Any, newest: Any,
) -> Any:  # fmt: skip
    """Merge the fine tiles of the milliseconds from oldest to newest; return how many, or -1 if the data is torn."""
    head = np.int64(halves[2 * (tile + 1)])
    merged, steps, before = 0, 0, np.int64(-1)
    if head == 0:
        return 0
    fine = head
    while True:
        if fine <= 0 or fine + fine_words > limit:
            return -1
        fine = next_of(halves, fine)
        if fine <= 0 or fine + fine_words > limit:
            return -1
        at = np.int64(halves[2 * fine])
        if at <= before:
            return -1
        before = at
        if at > newest:
            break
        if at >= oldest:
            merge_columns(
                scratch, scratch_floats, words, floats, fine + TILE_HEADER_WORDS, columns, first, count
            )  # fmt: skip
            merged += 1
        if fine == head:
            break
        steps += 1
        if steps % _LOOK_EVERY == 0 and not unchanged(words, slot, sequence):
            return -1
    return merged


@inner
def _scan(
    scratch: Any, scratch_floats: Any, words: Any, floats: Any, halves: Any, limit: Any, slot: Any, sequence: Any,
    row: Any, series: Any, s: Any, columns: Any, window: Any, as_of: Any,
) -> Any:  # fmt: skip
    """Merge into `scratch` what a row's series holds inside the window, oldest first.

    Returns how many tiles that was, or -1 if the data is torn.
    """
    first, count = series[s, S_COLUMN], series[s, S_COLUMNS]
    init_columns(scratch, scratch_floats, 0, columns, first, count)
    if row == 0:
        return 0
    if series[s, S_LIFETIME]:
        at, keep = row + series[s, S_ROW_AT], series[s, S_KEEP_MS]
        if keep != FOR_EVER:
            if words[at] == NEVER or words[at] < as_of - keep:
                return 0
            at += 1
        merge_columns(scratch, scratch_floats, words, floats, at, columns, first, count)
        return 1
    head = np.int64(halves[2 * row + series[s, S_ROW_AT]])
    if head == 0:
        return 0
    width, tile_words, exact = series[s, S_WIDTH_MS], series[s, S_TILE_WORDS], series[s, S_EXACT]
    seen_until = words[row + ROW_HEADER_WORDS + series[s, S_WHERE]]
    anchor = seen_until // width
    start = as_of - window + exact  # an exact window begins after as_of - window
    oldest, newest = start // width, as_of // width
    header = EXACT_TILE_HEADER_WORDS if exact else TILE_HEADER_WORDS
    merged, steps, before = 0, 0, np.int64(NEVER)
    tile = head
    if tile + tile_words > limit:
        return -1
    while True:
        tile = next_of(halves, tile)
        if tile <= 0 or tile + tile_words > limit:
            return -1
        number = number_of(halves, tile, anchor)
        if number <= before:
            return -1
        before = number
        if number > newest:
            break
        if number >= oldest:
            begin = number * width
            if exact and (begin < start or (begin + width - 1 > as_of and seen_until > as_of)):
                fine = _merge_fine(
                    scratch, scratch_floats, words, floats, halves, limit, slot, sequence, tile,
                    tile_words - header + TILE_HEADER_WORDS, columns, first, count, start - begin, as_of - begin,
                )  # fmt: skip
                if fine < 0:
                    return -1
                merged += fine
            else:
                merge_columns(scratch, scratch_floats, words, floats, tile + header, columns, first, count)
                merged += 1
        if tile == head:
            break
        steps += 1
        if steps % _LOOK_EVERY == 0 and not unchanged(words, slot, sequence):
            return -1
    return merged


@inner
def _read_row(
    scratch: Any, scratch_floats: Any, words: Any, floats: Any, halves: Any, limit: Any, slot: Any, sequence: Any,
    row: Any, program: Any, part: Any, as_of: Any, out: Any, known: Any, i: Any,
) -> Any:  # fmt: skip
    """Read part of a plan from a row, 0 if there is none, into line i; return False if the data is torn."""
    parts, series, columns, scans, features, views, _, _, _, _ = program
    scanned = -1
    window = np.int64(0)
    for feature in range(parts[part, P_FEATURE], parts[part + 1, P_FEATURE]):
        scan = features[feature, F_SCAN]
        if scan != scanned:
            window = scans[scan, R_WINDOW_MS]
            merged = _scan(
                scratch, scratch_floats, words, floats, halves, limit, slot, sequence, row, series,
                scans[scan, R_SERIES], columns, window, as_of,
            )  # fmt: skip
            if merged < 0:
                return False
            scanned = scan
        for k in range(features[feature, F_WIDTH]):
            out[i, features[feature, F_OUT] + k] = dispatch.finalize(
                features[feature, F_AGGREGATION], scratch, scratch_floats, features[feature, F_OFFSET_A],
                features[feature, F_OFFSET_B], features[feature, F_N], features[feature, F_SETTING], k, as_of, window,
            )  # fmt: skip
    for v in range(parts[part, P_VIEW], parts[part + 1, P_VIEW]):
        seen = NEVER if row == 0 else words[row + ROW_HEADER_WORDS + views[v, V_WHERE]]
        known[i, views[v, V_OUT]] = False
        if seen == NEVER:
            continue
        exact_window = views[v, V_EXACT_WINDOW_MS]
        if seen > as_of:  # a time before the newest event: only what is exact can tell
            if views[v, V_EXACT_SERIES] == NO:
                continue
            merged = _scan(
                scratch, scratch_floats, words, floats, halves, limit, slot, sequence, row, series,
                views[v, V_EXACT_SERIES], columns, exact_window, as_of,
            )  # fmt: skip
            if merged < 0:
                return False
            known[i, views[v, V_OUT]] = merged > 0
            continue
        ttl, view_window, width = views[v, V_TTL_MS], views[v, V_WINDOW_MS], views[v, V_WIDTH_MS]
        known[i, views[v, V_OUT]] = (
            ttl == FOR_EVER
            or (ttl != NO and seen >= as_of - ttl)
            or (view_window != NO and seen >= (as_of - view_window) // width * width)
            or (exact_window != NO and seen > as_of - exact_window)
        )
    return True


@inner
def _newest(words: Any, row: Any) -> Any:
    """Return the time of a row's newest event: the first `where` is every event."""
    return NEVER if row == 0 else words[row + ROW_HEADER_WORDS]


@inner
def _read_part(
    scratch: Any, scratch_floats: Any, base: Any, program: Any, part: Any, lo: Any, hi: Any, as_of: Any, asked: Any,
    out: Any, known: Any, trace: Any, at_trace: Any, i: Any,
) -> Any:  # fmt: skip
    """Read part of a plan for one key, as of `as_of` or of its newest event if that is later.

    asked: whether `as_of` was asked for and stands whatever the newest event is. at_trace: the column of `trace` that
    gets the sequence of the row. Returns the time it was read as of, or if that was asked the newest event's; and
    whether the slot could be read.
    """
    words, floats, halves = views_at(base)
    parts = program.parts
    mark = mark_of(words, lo)
    slot_number = np.int64(np.uint64(hi) % np.uint64(words[M_SLOTS]))
    slot = parts[part, P_SLOTS_AT] + slot_number * parts[part, P_SLOT_WORDS]
    spins = 0
    for _ in range(_TRIES):
        sequence = load_acquire(words, slot + H_SEQUENCE)
        while sequence & 1:
            spins += 1
            if spins > _SPINS:
                return as_of, False
            sequence = load_acquire(words, slot + H_SEQUENCE)
        limit = words[M_LIMIT]
        row = find(words, slot, lo, hi, mark, limit, parts[part, P_ROW_WORDS])
        newest = _newest(words, row)
        trace[i, at_trace] = -1 if row == 0 else words[row + ROW_SEQUENCE]
        at = as_of if asked else max(as_of, newest)
        whole = _read_row(
            scratch, scratch_floats, words, floats, halves, limit, slot, sequence, row, program, part, at, out, known, i
        )
        if unchanged(words, slot, sequence) and whole:
            return newest if asked else at, True
    return as_of, False


@inner
def _shards_time(shards: Any, event_clock: Any) -> Any:
    """Return what time it is by the shards: their newest arrival stamp, or when they last received events."""
    word = M_NEWEST_ARRIVAL if event_clock else M_NEWEST_RECEIVED
    newest = np.int64(NO_CLOCK)
    for shard in range(shards.shape[1]):
        if shards[BASE, shard] != 0:
            words, _, _ = views_at(shards[BASE, shard])
            newest = max(newest, load_acquire(words, word))
    return newest


@inner
def _look_ahead(
    shards: Any, owners: Any, program: Any, plans: Any, hashes: Any, start: Any, end: Any, rows: Any, tiles: Any
) -> None:
    """Ask for the memory of the ids from start to end, so that it is on its way while the first of them are read.

    What is asked for in one step does not wait for each other: indexes, rows, newest tiles, oldest tiles, and for
    several ids the tiles after those. rows int64 [parts, ids], tiles int64 [scans, ids]: room for what was found.
    """
    parts, series = program.parts, program.series
    slots = np.uint64(owners.shape[0])
    steps = 4 if end - start == 1 else _STEPS_AHEAD
    for step in range(steps):
        under_way = step < 4
        for i in range(start, end):
            plan = i if plans.shape[0] > 1 else 0
            first = plans[plan, 0]
            first_scan = parts[first, P_SCAN]
            for part in range(first, plans[plan, 1]):
                hi = hashes[parts[part, P_KEY], i, 1]
                slot_number = np.int64(np.uint64(hi) % slots)
                if owners[slot_number] < 0:
                    continue
                words, _, halves = views_at(shards[BASE, owners[slot_number]])
                limit = words[M_LIMIT]
                if step >= 2:
                    row = rows[part - first, i - start]
                    if row == 0:
                        continue
                    for scan in range(parts[part, P_SCAN], parts[part + 1, P_SCAN]):
                        s = program.scans[scan, R_SERIES]
                        if not series[s, S_LIFETIME]:
                            if step == 2:
                                tile: Any = np.int64(halves[2 * row + series[s, S_ROW_AT]])
                            else:
                                tile = tiles[scan - first_scan, i - start]
                                if tile <= 0 or tile >= limit:
                                    continue
                                tile = next_of(halves, tile)
                                if step > 3 and tile == np.int64(halves[2 * row + series[s, S_ROW_AT]]):
                                    tile = 0  # round
                                under_way = True
                            tiles[scan - first_scan, i - start] = tile
                            prefetch(words, tile)
                    continue
                slot = parts[part, P_SLOTS_AT] + slot_number * parts[part, P_SLOT_WORDS]
                index, places = words[slot + H_INDEX_AT], words[slot + H_PLACES]
                rows[part - first, i - start] = 0
                if places <= 0 or index <= 0 or places > limit or index > limit - places:
                    continue
                mark = mark_of(words, hashes[parts[part, P_KEY], i, 0])
                place = place_of(mark, places)
                if step == 0:
                    prefetch(words, index + place)
                    continue
                for _ in range(_AHEAD):
                    entry = np.uint64(words[index + place])
                    if entry == 0:
                        break
                    if entry >> np.uint64(32) == mark:
                        row = np.int64(entry & np.uint64(NUMBER_MASK))
                        if row + parts[part, P_ROW_WORDS] <= limit:
                            rows[part - first, i - start] = row
                            prefetch(words, row)
                            prefetch(words, row + parts[part, P_ROW_WORDS] - 1)
                        break
                    place = place + 1 if place + 1 < places else 0
        if not under_way:
            break


@inner
def _stopped(call: Any, code: Any, row: Any, detail: Any) -> Any:
    """Say in a call with which id what is wrong; return which code says what."""
    words, _, _ = views_at(call)
    words[A_ROW], words[A_DETAIL] = row, detail
    return -np.int64(code)


@kernel
def read_rows(call: Any) -> Any:
    """Read a plan's features of n ids: everything about one id as of one time.

    call: the address of the words `A_...`. They say where arrays are, and how large:

    shards int64 [3, shards]: where the shard's memory and control page lie (0: there is none), and the epoch of that
    memory; owners int64 [slots]: the shard of each slot, -1 to leave it out; layout: digest that the memories must
    bear. program: a `PackedProgram`. plans int64 [n, 2], or [1, 2] for all ids: from where to where the parts of an
    id's plan stand. ids int64 [n] of one key field, for which `hashes` is to be filled, or [0] if it is. hashes int64
    [keys, n, 2]. start: the first id to read. clock int64 [n]: now in ms, or `NO_CLOCK`; event_clock: whether the
    shards have the newest arrival for time. asked: whether to read as of `as_of` as given; else it is set to the latest
    of the clock, the shards' time, and the newest event of the rows read. as_of int64 [n]; out float64 [n, columns];
    known bool [n, views]. trace int64 [n, traced]: the sum of the hashes of an id's keys (of their low halves), and for
    each part of its plan up to which event the row has been brought that was read, by its sequence; -1 if there is
    none.

    Returns how often a view did not know an id; or below 0 what is wrong, `-BUSY` and so on: then `row` says with which
    id, and `detail` with which shard, or since which time.
    """
    words, _, _ = views_at(call)
    n, start, n_shards, n_slots = words[A_N], words[A_START], words[A_SHARDS_N], words[A_SLOTS]
    layout, event_clock, asked = words[A_LAYOUT], words[A_EVENT_CLOCK] != 0, words[A_ASKED] != 0
    program = unpacked(words[A_PROGRAM])
    shards, owners = words_at(words[A_SHARDS], (3, n_shards)), words_at(words[A_OWNERS], n_slots)
    plans, ids = words_at(words[A_PLANS], (words[A_PLANS_N], 2)), words_at(words[A_IDS], words[A_IDS_N])
    hashes = words_at(words[A_HASHES], (words[A_KEYS], n, 2))
    clock, as_of = words_at(words[A_CLOCK], n), words_at(words[A_AS_OF], n)
    out, known = floats_at(words[A_OUT], (n, words[A_COLUMNS])), bools_at(words[A_KNOWN], (n, words[A_VIEWS]))
    trace = words_at(words[A_TRACE], (n, words[A_TRACED]))
    for shard in range(shards.shape[1]):
        if shards[BASE, shard] == 0:
            continue
        memory, _, _ = views_at(shards[BASE, shard])
        if shards[CONTROL, shard] != 0:
            control, _, _ = views_at(shards[CONTROL, shard])
            if load_acquire(control, C_EPOCH) != shards[EPOCH, shard]:
                return _stopped(call, MOVED, start, shard)
        if memory[M_LAYOUT] != layout or memory[M_SLOTS] != n_slots:
            return _stopped(call, FOREIGN, start, shard)
    scratch = np.empty(program.words, np.int64)
    scratch_floats = scratch.view(np.float64)
    rows = np.empty((program.parts_max, _AHEAD), np.int64)
    tiles = np.empty((program.scans_max, _AHEAD), np.int64)
    slots = np.uint64(owners.shape[0])
    unknown = 0
    for i in range(ids.shape[0]):
        lo, hi = hash_word(ids[i])
        hashes[0, i, 0], hashes[0, i, 1] = np.int64(lo), np.int64(hi)
    for i in range(start, as_of.shape[0]):
        if (i - start) % _AHEAD == 0:
            _look_ahead(shards, owners, program, plans, hashes, i, min(i + _AHEAD, as_of.shape[0]), rows, tiles)
        live = max(clock[i], _shards_time(shards, event_clock))
        at = as_of[i] if asked else live
        plan = i if plans.shape[0] > 1 else 0
        first, last = plans[plan, 0], plans[plan, 1]
        of_keys = np.uint64(0)
        for key in range(hashes.shape[0]):
            of_keys += np.uint64(hashes[key, i, 0])
        trace[i, 0] = np.int64(of_keys)
        part, again = first, 0
        while True:
            if part == last:
                # Events that arrived meanwhile may have pushed out of sight what a read as of before them still sees.
                live = max(live, _shards_time(shards, event_clock))
                if asked or live <= at:
                    break
                at = live
                part = first
                again += 1
                if again > _TRIES:
                    return _stopped(call, BUSY, i, 0)
            key = program.parts[part, P_KEY]
            lo, hi = hashes[key, i, 0], hashes[key, i, 1]
            shard = owners[np.int64(np.uint64(hi) % slots)]
            if shard < 0:
                trace[i, 1 + part - first] = -1
                part += 1
                continue
            read_at, done = _read_part(
                scratch, scratch_floats, shards[BASE, shard], program, part, lo, hi, at, asked, out, known, trace,
                1 + part - first, i,
            )  # fmt: skip
            if not done:
                return _stopped(call, BUSY, i, shard)
            live = max(live, read_at)
            part += 1
            if not asked and read_at > at:
                # Events of this key are newer than the clock: what was read before is read anew as of then.
                at = read_at
                if part > first + 1:
                    again += 1
                    if again > _TRIES:
                        return _stopped(call, BUSY, i, shard)
                    part = first
        if asked and at + program.past_ms < live:  # not the other way round: there may be no clock
            return _stopped(call, PAST, i, live)
        as_of[i] = at
        for v in range(program.parts[last, P_VIEW] - program.parts[first, P_VIEW]):
            unknown += not known[i, v]
    return unknown


@kernel
def join_features(
    words: Any, floats: Any, halves: Any, table_program: Any, steps: Any, start: Any, hashes: Any, times: Any,
    arrivals: Any, inputs: Any, masks: Any, base: Any, program: Any, part: Any, asked: Any, as_of: Any, out: Any,
    known: Any,
) -> Any:  # fmt: skip
    """Apply events and read features in one order: the point-in-time join of one table.

    steps int64: i applies event i, ~i reads part `part` of a plan for key `asked[i]`, int64 [m, 2], as of `as_of[i]`.
    The other arguments as of `apply_events` and `read_rows`; returns as the former.
    """
    table, series, columns = table_program
    slots = np.uint64(words[M_SLOTS])
    scratch = np.empty(program.words, np.int64)
    scratch_floats = scratch.view(np.float64)
    for k in range(start, steps.shape[0]):
        i = steps[k]
        lo, hi = (hashes[i, 0], hashes[i, 1]) if i >= 0 else (asked[~i, 0], asked[~i, 1])
        slot = table[T_SLOTS_AT] + np.int64(np.uint64(hi) % slots) * table[T_SLOT_WORDS]
        mark = mark_of(words, lo)
        if i >= 0:
            if not has_room(words, table) or not apply_one(
                words, floats, halves, table, series, columns, slot, 0, mark, lo, hi, times[i], arrivals[i], inputs,
                masks, i, base + i,
            ):  # fmt: skip
                return k
        else:
            i = ~i
            limit = words[M_LIMIT]
            row = find(words, slot, lo, hi, mark, limit, program.parts[part, P_ROW_WORDS])
            _read_row(
                scratch, scratch_floats, words, floats, halves, limit, slot, words[slot + H_SEQUENCE], row, program,
                part, as_of[i], out, known, i,
            )  # fmt: skip
    return DONE
