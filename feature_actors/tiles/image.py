"""The image of a table: its rows with their tiles as flat arrays of words, taken while events go on, and loaded again.

An image is taken in steps, each between two applications of events and each of bounded size. A step takes the rows of
one slot whose marks lie in a range, and says where the next range begins. A row is found by its mark whatever happens
between two steps: an index that grows keeps the order of marks, and rows that come and go move others only behind
their homes. Every row that is there from the first step to the last is in the image once, as it is at its own step; its
sequence says when that was. What comes later is in the log.

    row      words of the row, this one included; hash of the key (2 words); sequence; newest event time per `where`;
             then what each series has, in the order of the table's shape
    lifetime newest event time, if it has a ttl; the partial
    tiles    how many, then for each, oldest first: its whole number; for exact series how many fine tiles it has; the
             partial; the fine tiles: millisecond within the tile, and the partial

What of it a table of now keeps is told by a `Fit`, see `shape`. Strings are named by address, and those of the image by
the addresses that they had then, so the strings come first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.tiles.apply import new_row, remove_row
from millpond.feature_actors.tiles.compiled import inner, kernel, prefetch
from millpond.feature_actors.tiles.memory import M_SLOTS
from millpond.feature_actors.tiles.program import (
    FOR_EVER,
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
from millpond.feature_actors.tiles.shape import (
    FIT_EXACT,
    FIT_LIFETIME,
    FIT_MOVE,
    FIT_MOVES,
    FIT_SERIES,
    FIT_TEXT,
    FIT_TEXTS,
    FIT_TTL,
    FIT_WORDS,
)
from millpond.feature_actors.tiles.strings import ONE_OF_TOO_MANY
from millpond.feature_actors.tiles.structure import (
    EXACT_TILE_HEADER_WORDS,
    H_INDEX_AT,
    H_PLACES,
    NUMBER_MASK,
    ROW_HEADER_WORDS,
    ROW_SEQUENCE,
    TILE_HEADER_WORDS,
    begin_write,
    end_write,
    find,
    first_mark_of,
    grow_index,
    index_is_full,
    index_words_wanted,
    mark_of,
    next_of,
    number_of,
    place_of,
    room,
    take,
)

__all__ = [
    "ALL_MARKS",
    "LOADED",
    "NO_ROOM",
    "ImageDamaged",
    "Texts",
    "export_rows",
    "import_rows",
    "keys_of",
    "make_places",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Marks are below that.
ALL_MARKS = 1 << 32

#: What `import_rows` returns: the end, no room in the memory for a row, and what may be wrong with one.
LOADED, NO_ROOM, _LENGTH, _SLOT, _TWICE, _TILES, _FINE, _TEXT = range(8)
_WRONG = {
    _LENGTH: "is not as long as it says",
    _SLOT: "is of another slot",
    _TWICE: "is there already",
    _TILES: "has tiles that do not ascend to its newest event",
    _FINE: "has milliseconds that do not ascend within their tile",
    _TEXT: "names a string that is not there",
}

#: Words of a row's image before its times: those of its header, and its length.
_HEADER_WORDS = ROW_HEADER_WORDS + 1
#: So many places of the index are looked at ahead of the row that is copied; its tiles are asked for in between.
_AHEAD = 24


class ImageDamaged(ValueError):
    """An image is not what was taken; what has been loaded of it so far is not to be used."""

    def __init__(self, slot: int, word: int, outcome: int) -> None:
        super().__init__(f"the row at word {word} of slot {slot} {_WRONG[outcome]}")


class Texts(NamedTuple):
    """Addresses of strings in an image, ascending float64 [n], and those that they have now."""

    before: Floats
    now: Floats


# -- taking it


@inner
def _copy(out: Any, to: Any, words: Any, at: Any, count: Any) -> Any:
    for w in range(count):
        out[to + w] = words[at + w]
    return to + count


@inner
def _export_row(words: Any, halves: Any, table: Any, series: Any, row: Any, out: Any, start: Any) -> Any:
    """Write the image of a row; return its end, or -1 if `out` is too short for it."""
    end = out.shape[0]
    fixed = _HEADER_WORDS + table[T_WHERES]
    # A row is never shorter than what it keeps beside its tiles.
    if start + table[T_ROW_WORDS] + fixed + series.shape[0] > end:
        return -1
    times = row + ROW_HEADER_WORDS
    at = _copy(out, start + 1, words, row, ROW_HEADER_WORDS + table[T_WHERES])
    for s in range(series.shape[0]):
        partial = series[s, S_TILE_WORDS] - (EXACT_TILE_HEADER_WORDS if series[s, S_EXACT] else TILE_HEADER_WORDS)
        if series[s, S_LIFETIME]:
            if at + 1 + partial > end:
                return -1
            ttl = 0 if series[s, S_KEEP_MS] == FOR_EVER else 1
            at = _copy(out, at, words, row + series[s, S_ROW_AT], ttl + partial)
            continue
        if at == end:
            return -1
        count_at = at
        at += 1
        count = 0
        head = np.int64(halves[2 * row + series[s, S_ROW_AT]])
        if head != 0:
            anchor = words[times + series[s, S_WHERE]] // series[s, S_WIDTH_MS]
            tile = head
            while True:
                tile = next_of(halves, tile)
                if at + 2 + partial > end:
                    return -1
                out[at] = number_of(halves, tile, anchor)
                at += 1
                count += 1
                if series[s, S_EXACT]:
                    fine_at = at
                    at = _copy(out, at + 1, words, tile + EXACT_TILE_HEADER_WORDS, partial)
                    fine_head = np.int64(halves[2 * (tile + 1)])
                    fine = fine_head
                    fines = 0
                    while True:
                        fine = next_of(halves, fine)
                        if at + 1 + partial > end:
                            return -1
                        out[at] = np.int64(halves[2 * fine])
                        at = _copy(out, at + 1, words, fine + TILE_HEADER_WORDS, partial)
                        fines += 1
                        if fine == fine_head:
                            break
                    out[fine_at] = fines
                else:
                    at = _copy(out, at, words, tile + TILE_HEADER_WORDS, partial)
                if tile == head:
                    break
        out[count_at] = count
    out[start] = at - start
    return at


@kernel
def export_rows(
    words: Any, halves: Any, program: Any, slot_number: Any, mark: Any, out: Any, words_max: Any, places_max: Any
) -> Any:
    """Write the rows of a slot to `out`, int64, from a mark on: until about `words_max` words, or so many places.

    Returns how many words, and the mark to go on from: `ALL_MARKS` at the end, the same mark if `out` is too short.
    """
    table, series, _ = program
    slot = table[T_SLOTS_AT] + slot_number * table[T_SLOT_WORDS]
    index, places = words[slot + H_INDEX_AT], words[slot + H_PLACES]
    at = whole = 0
    next_mark = np.int64(mark)
    if places == 0:
        return whole, np.int64(ALL_MARKS)
    first = place_of(mark, places)
    for number in range(first, 2 * places):
        place = number if number < places else number - places
        if number % 2 == 0:
            _ask_for(words, halves, series, index, places, place)
        entry = np.uint64(words[index + place])
        if entry == 0:
            # Whatever has its home before an empty place stands before it: of the marks up to here none is left.
            if number >= places:
                return at, np.int64(ALL_MARKS)
            whole, next_mark = at, first_mark_of(place + 1, places)
            if next_mark == ALL_MARKS or whole >= words_max or number - first >= places_max:
                return whole, next_mark
            continue
        # What stands before its home has gone round the end of the index, and is the last.
        its_mark = entry >> np.uint64(32)
        if its_mark < np.uint64(mark) or (place_of(its_mark, places) > place) != (number >= places):
            continue
        at = _export_row(words, halves, table, series, np.int64(entry & np.uint64(NUMBER_MASK)), out, at)
        if at < 0:
            return whole, next_mark
    return at, np.int64(ALL_MARKS)


@inner
def _ask_for(words: Any, halves: Any, series: Any, index: Any, places: Any, place: Any) -> None:
    """Have the memory of the rows of the next places on its way: rows far ahead, their newest tiles, their oldest."""
    for k in range(2):
        ahead = place + 3 * _AHEAD + k
        if ahead < places:
            row = words[index + ahead] & NUMBER_MASK
            if row != 0:
                prefetch(words, row)
                prefetch(words, row + ROW_HEADER_WORDS + 6)
        for step in range(1, 3):
            ahead = place + step * _AHEAD + k
            if ahead >= places:
                continue
            row = words[index + ahead] & NUMBER_MASK
            if row == 0:
                continue
            for s in range(series.shape[0]):
                if not series[s, S_LIFETIME]:
                    tile = np.int64(halves[2 * row + series[s, S_ROW_AT]])
                    if tile != 0:
                        prefetch(words, tile if step == 2 else next_of(halves, tile))


# -- loading it


@inner
def _load_partial(words: Any, floats: Any, to: Any, image: Any, at: Any, fit: Any, s: Any, texts: Any) -> Any:
    """Write the columns of a partial that the table has; return False if it names a string that is not there."""
    _, _, of_series, moves, text_words = fit
    for m in range(of_series[s, FIT_MOVE], of_series[s, FIT_MOVE] + of_series[s, FIT_MOVES]):
        _copy(words, to + moves[m, 1], image, at + moves[m, 0], moves[m, 2])
    for t in range(of_series[s, FIT_TEXT], of_series[s, FIT_TEXT] + of_series[s, FIT_TEXTS]):
        value = floats[to + text_words[t]]
        if np.isnan(value) or value == ONE_OF_TOO_MANY:
            continue
        place = np.searchsorted(texts.before, value)
        if place == texts.before.shape[0] or texts.before[place] != value:
            return False
        floats[to + text_words[t]] = texts.now[place]
    return True


@inner
def _append(words: Any, halves: Any, tile: Any, head: Any, number: Any) -> None:
    """Put a tile into a ring as its newest."""
    halves[2 * tile] = np.int64(number) & NUMBER_MASK
    if head == 0:
        halves[2 * tile + 1] = tile
    else:
        halves[2 * tile + 1] = halves[2 * head + 1]
        halves[2 * head + 1] = tile


@inner
def _load_tiles(
    words: Any, floats: Any, halves: Any, slot: Any, series: Any, fit: Any, s: Any, row: Any, anchor: Any,
    oldest_kept: Any, image: Any, start: Any, end: Any, texts: Any,
) -> Any:  # fmt: skip
    """Load the tiles of an image's series s from word `start`; return where they end, and what is wrong with them.

    Those before `oldest_kept` are out of sight.
    """
    of_series = fit.series
    partial, exact, number_in_table = of_series[s, FIT_WORDS], of_series[s, FIT_EXACT], of_series[s, FIT_SERIES]
    at = start
    if at >= end or image[at] < 0 or image[at] > end - at:
        return at, _LENGTH
    count = image[at]
    at += 1
    before = anchor - NUMBER_MASK - 1
    head = np.int64(0)
    for _ in range(count):
        if 1 + exact + partial > end - at:
            return at, _LENGTH
        number = image[at]
        at += 1
        kept = number_in_table >= 0 and number >= oldest_kept
        fines = np.int64(0)
        if exact:
            fines = image[at]
            at += 1
            if fines < 1 or fines > (end - at) // (1 + partial):
                return at, _LENGTH
        tile = np.int64(0)
        if number_in_table >= 0:
            if number <= before or number > anchor:
                return at, _TILES
            before = number
        if kept:
            tile = take(words, halves, slot + series[number_in_table, S_POOL], series[number_in_table, S_TILE_WORDS])
            header = EXACT_TILE_HEADER_WORDS if exact else TILE_HEADER_WORDS
            if exact:
                words[tile + 1] = 0
            if not _load_partial(words, floats, tile + header, image, at, fit, s, texts):
                return at, _TEXT
            _append(words, halves, tile, head, number)
            head = tile
            halves[2 * row + series[number_in_table, S_ROW_AT]] = tile
        at += partial
        if not exact:
            continue
        if fines > (end - at) // (1 + partial):
            return at, _LENGTH
        ms_before, fine_head = np.int64(-1), np.int64(0)
        for _ in range(fines):
            ms = image[at]
            at += 1
            if kept:
                if ms <= ms_before or ms >= series[number_in_table, S_WIDTH_MS]:
                    return at, _FINE
                ms_before = ms
                fine = take(
                    words, halves, slot + series[number_in_table, S_FINE_POOL],
                    series[number_in_table, S_TILE_WORDS] - EXACT_TILE_HEADER_WORDS + TILE_HEADER_WORDS,
                )  # fmt: skip
                if not _load_partial(words, floats, fine + TILE_HEADER_WORDS, image, at, fit, s, texts):
                    return at, _TEXT
                _append(words, halves, fine, fine_head, ms)
                fine_head = fine
                halves[2 * (tile + 1)] = fine
            at += partial
    return at, LOADED


@inner
def _load_row(
    words: Any, floats: Any, halves: Any, table: Any, series: Any, slot: Any, fit: Any, row: Any, image: Any,
    start: Any, end: Any, texts: Any,
) -> Any:  # fmt: skip
    """Fill a new row from its image; return what is wrong with that."""
    image_wheres, wheres, of_series, _, _ = fit
    times = row + ROW_HEADER_WORDS
    for w in range(table[T_WHERES]):
        words[times + w] = image[start + _HEADER_WORDS + wheres[w]]
    at = start + _HEADER_WORDS + image_wheres
    for s in range(of_series.shape[0]):
        number = of_series[s, FIT_SERIES]
        if of_series[s, FIT_LIFETIME]:
            size = of_series[s, FIT_TTL] + of_series[s, FIT_WORDS]
            if size > end - at:
                return _LENGTH
            if number >= 0:
                to = row + series[number, S_ROW_AT]
                if of_series[s, FIT_TTL]:
                    words[to] = image[at]
                to += of_series[s, FIT_TTL]
                if not _load_partial(words, floats, to, image, at + of_series[s, FIT_TTL], fit, s, texts):
                    return _TEXT
            at += size
            continue
        anchor = oldest_kept = np.int64(0)
        if number >= 0:
            width = series[number, S_WIDTH_MS]
            anchor = words[times + series[number, S_WHERE]] // width
            # No read is as of a time before the row's newest event.
            oldest_kept = (words[times] - series[number, S_KEEP_MS]) // width
        at, wrong = _load_tiles(
            words, floats, halves, slot, series, fit, s, row, anchor, oldest_kept, image, at, end, texts
        )  # fmt: skip
        if wrong != LOADED:
            return wrong
    return LOADED if at == end else _LENGTH


@kernel
def import_rows(
    words: Any, floats: Any, halves: Any, program: Any, fit: Any, slot_number: Any, image: Any, start: Any, texts: Any,
    replaces: Any,
) -> Any:  # fmt: skip
    """Load the rows of a slot from an image, int64, from word `start` on.

    replaces: whether one that is there already gives way, in one write, so that readers find the one or the other.
    Returns where it ended: `LOADED`; `NO_ROOM`, when that row is not begun, so that the caller lets the memory grow and
    goes on from there; or one of `_WRONG`, when the store is not to be used. And the newest sequence loaded.
    """
    table, series, columns = program
    slot = table[T_SLOTS_AT] + slot_number * table[T_SLOT_WORDS]
    image_wheres = fit.image_wheres
    newest = np.int64(-1)
    at = np.int64(start)
    while at < image.shape[0]:
        length = image[at]
        if length < _HEADER_WORDS + image_wheres or length > image.shape[0] - at:
            return at, _LENGTH, newest
        lo, hi, sequence = image[at + 1], image[at + 2], image[at + 1 + ROW_SEQUENCE]
        if np.int64(np.uint64(hi) % np.uint64(words[M_SLOTS])) != slot_number:
            return at, _SLOT, newest
        mark = mark_of(words, lo)
        old = find(words, slot, lo, hi, mark, np.int64(ALL_MARKS), table[T_ROW_WORDS])
        if old != 0 and not replaces:
            return at, _TWICE, newest
        if room(words) < row_room(words, table, slot, length):
            return at, NO_ROOM, newest
        if index_is_full(words, slot):
            grow_index(words, slot, index_words_wanted(words, slot))
        begin_write(words, slot)
        if old != 0:
            remove_row(words, halves, table, series, slot, old, mark)
        row = new_row(words, floats, halves, slot, table, series, columns, lo, hi, mark)
        words[row + ROW_SEQUENCE] = sequence
        wrong = _load_row(words, floats, halves, table, series, slot, fit, row, image, at, at + length, texts)
        end_write(words, slot)
        if wrong != LOADED:
            return at, wrong, newest
        newest = max(newest, sequence)
        at += length
    return at, LOADED, newest


@inner
def row_room(words: Any, table: Any, slot: Any, length: Any) -> Any:
    """Return how many words a row may need at most whose image has so many.

    No tile takes more words than its image does, and of a block of a pool at most a quarter is left over.
    """
    more = index_words_wanted(words, slot) if index_is_full(words, slot) else 0
    return table[T_RESERVE_WORDS] + 2 * length + more


@kernel
def make_places(words: Any, program: Any, slot_number: Any, places: Any) -> None:
    """Make a slot's index as large as `places`, whole lines for which there is room.

    Rows of an image come in the order of their marks. Loaded into an index that grows with them they would all stand in
    its first part, one behind the other.
    """
    table, _, _ = program
    slot = table[T_SLOTS_AT] + slot_number * table[T_SLOT_WORDS]
    if words[slot + H_PLACES] < places:
        grow_index(words, slot, places)


def keys_of(image: Ints) -> Ints:
    """Return the hashes of the keys of the rows of an image, int64 [n, 2]."""
    keys, at = [], 0
    while at < len(image):
        keys.append(image[at + 1 : at + 3])
        at += int(image[at])
    return np.array(keys, np.int64).reshape(-1, 2)
