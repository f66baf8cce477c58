"""How entities and tiles lie in a shard's memory, and how room for them is found.

    memory   header, then per table and slot a slot header, then blocks in the order in which they were needed
    slot     sequence number, index, number of rows, a pool of rows and a pool of tiles per series
    index    open addressing with linear probing; an entry is 32 bits of the key's hash and the row's address
    row      hash of the key (2 words), sequence of the last event applied, newest event time per `where`, heads of
             rings of tiles (half a word each), lifetime partials
    tile     number (32 bits) and address of the next one (32 bits); for exact series the head of the tile's own ring
             of fine tiles, one per millisecond; the partial

The tiles of a row and series form a ring in ascending time whose head is the newest: the head's next is the oldest.
Only tiles with events exist. A tile's number is stored modulo 2**32, and read relative to the row's newest event.
Addresses are words of the memory and never change while the thing lives: growing copies an index now and then, never
rows or tiles.

The sequence of an event is its place in the log: the record's offset and the event's row in the record. A row says up
to where it has been brought, so an event that is applied again, after a snapshot was loaded, changes nothing that it
already changed.

There is one writer. What it writes to a slot it writes between two steps of the slot's sequence number,
odd in between, so that readers can tell that they have read across a write.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from millpond.feature_actors.tiles.compiled import fence_acquire, fence_release, inner, load_acquire, store_release
from millpond.feature_actors.tiles.memory import M_LIMIT, M_SEED, M_SPARE, M_USED

__all__: list[str] = []

# Words of a slot's header. Pool 0 is of rows, the pools of the series follow.
H_SEQUENCE, H_INDEX_AT, H_PLACES, H_ROWS, H_POOLS = range(5)
POOL_FREE, POOL_NEXT, POOL_END, POOL_ITEMS, POOL_FREED = range(5)
POOL_WORDS = 5

#: Words of a row before its times, and which of them is its sequence; of a tile, and of an exact one, before the
#: partial.
ROW_HEADER_WORDS, ROW_SEQUENCE = 3, 2
TILE_HEADER_WORDS, EXACT_TILE_HEADER_WORDS = 1, 2
#: Bits of a sequence that are the event's row in its record; those above are the record's offset.
SEQUENCE_ROW_BITS = 24

#: A pool takes blocks of an eighth of what it has, up to so many words.
BLOCK_WORDS_MAX = 4_096
BLOCK_ITEMS_MIN = 4
LINE_WORDS = 8
PLACES_MIN = 8
#: How many spare blocks are looked at for one that is large enough.
_SPARE_TRIES = 8

NUMBER_MASK = 0xFFFFFFFF


# -- the sequence number of a slot


@inner
def begin_write(words: Any, slot: Any) -> None:
    words[slot + H_SEQUENCE] += 1
    fence_release()


@inner
def end_write(words: Any, slot: Any) -> None:
    store_release(words, slot + H_SEQUENCE, words[slot + H_SEQUENCE] + 1)


@inner
def unchanged(words: Any, slot: Any, sequence: Any) -> Any:
    """Say whether nothing was written to a slot since its sequence number was read."""
    fence_acquire()
    return load_acquire(words, slot + H_SEQUENCE) == sequence


# -- blocks


@inner
def room(words: Any) -> Any:
    return words[M_LIMIT] - words[M_USED]


@inner
def allocate(words: Any, size: Any) -> Any:
    """Return the address of a block of `size` words, a multiple of a line; there must be `room`."""
    before = M_SPARE
    spare = words[M_SPARE]
    for _ in range(_SPARE_TRIES):
        if spare == 0:
            break
        if words[spare + 1] >= size:
            words[before] = words[spare]
            give_back(words, spare + size, words[spare + 1] - size)
            return spare
        before = spare
        spare = words[spare]
    at = words[M_USED]
    words[M_USED] = at + size
    return at


@inner
def give_back(words: Any, at: Any, size: Any) -> None:
    """Keep a block for another use. Readers that still look at it will find that its slot has changed."""
    if size >= 2 * LINE_WORDS:
        words[at] = words[M_SPARE]
        words[at + 1] = size
        words[M_SPARE] = at


@inner
def whole_lines(size: Any) -> Any:
    return (size + LINE_WORDS - 1) // LINE_WORDS * LINE_WORDS


# -- pools of rows and of tiles


@inner
def take(words: Any, halves: Any, pool: Any, item_words: Any) -> Any:
    """Return the address of an item of a pool; there must be `room` for a block."""
    at = np.int64(words[pool + POOL_FREE])
    if at != 0:
        words[pool + POOL_FREE] = np.int64(halves[2 * at + 1])
        words[pool + POOL_FREED] -= 1
        return at
    at = words[pool + POOL_NEXT]
    if at + item_words > words[pool + POOL_END]:
        items = max(words[pool + POOL_ITEMS] // 8, BLOCK_ITEMS_MIN)
        items = max(min(items, BLOCK_WORDS_MAX // item_words), BLOCK_ITEMS_MIN)
        size = whole_lines(items * item_words)
        at = words[M_SPARE]
        if at != 0 and words[at + 1] >= BLOCK_ITEMS_MIN * item_words:
            # A pool takes a spare block of any size, so that none is left over for long.
            words[M_SPARE] = words[at]
            spare = words[at + 1]
            if spare - size >= 2 * LINE_WORDS:
                give_back(words, at + size, spare - size)
            else:
                size = spare
        else:
            at = allocate(words, size)
        words[pool + POOL_END] = at + size
    words[pool + POOL_NEXT] = at + item_words
    words[pool + POOL_ITEMS] += 1
    return at


@inner
def give(words: Any, halves: Any, pool: Any, at: Any) -> None:
    """Give an item back to its pool."""
    halves[2 * at + 1] = words[pool + POOL_FREE]
    words[pool + POOL_FREE] = at
    words[pool + POOL_FREED] += 1


# -- the index of a slot


@inner
def mark_of(words: Any, lo: Any) -> Any:
    """Return the 32 bits of a key's hash that place it in the index: nobody outside can prepare them."""
    return (np.uint64(lo) ^ np.uint64(words[M_SEED])) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)


@inner
def place_of(mark: Any, places: Any) -> Any:
    return np.int64(np.uint64(mark) * np.uint64(places) >> np.uint64(32))


@inner
def first_mark_of(place: Any, places: Any) -> Any:
    """Return the lowest mark that is placed there, or behind it if there is none."""
    return ((np.int64(place) << 32) + places - 1) // places


@inner
def find(words: Any, slot: Any, lo: Any, hi: Any, mark: Any, limit: Any, row_words: Any) -> Any:
    """Return the address of an entity's row, or 0.

    Safe on torn data: every address is held against `limit`, and no place is looked at twice.
    """
    index, places = words[slot + H_INDEX_AT], words[slot + H_PLACES]
    if places <= 0 or index <= 0 or places > limit or index > limit - places:
        return 0
    place = place_of(mark, places)
    for _ in range(places):
        entry = np.uint64(words[index + place])
        if entry == 0:
            return 0
        if entry >> np.uint64(32) == mark:
            row = np.int64(entry & np.uint64(NUMBER_MASK))
            if row + row_words <= limit and words[row] == lo and words[row + 1] == hi:
                return row
        place += 1
        if place == places:
            place = 0
    return 0


@inner
def index_is_full(words: Any, slot: Any) -> Any:
    return (words[slot + H_ROWS] + 1) * 4 > words[slot + H_PLACES] * 3


@inner
def index_words_wanted(words: Any, slot: Any) -> Any:
    """Return the size of the next index: a third larger, so that it is never much larger than needed."""
    places = words[slot + H_PLACES]
    return whole_lines(max(places * 4 // 3, PLACES_MIN))


@inner
def grow_index(words: Any, slot: Any, places: Any) -> None:
    """Move the index of a slot to a larger one of whole lines; readers go on with the old one until it is there."""
    old, old_places = words[slot + H_INDEX_AT], words[slot + H_PLACES]
    new = allocate(words, places)
    words[new : new + places] = 0
    for p in range(old_places):
        entry = words[old + p]
        if entry != 0:
            put(words, new, places, entry)
    begin_write(words, slot)
    words[slot + H_INDEX_AT] = new
    words[slot + H_PLACES] = places
    end_write(words, slot)
    give_back(words, old, old_places)


@inner
def put(words: Any, index: Any, places: Any, entry: Any) -> None:
    place = place_of(np.uint64(entry) >> np.uint64(32), places)
    while words[index + place] != 0:
        place += 1
        if place == places:
            place = 0
    words[index + place] = entry


@inner
def take_out(words: Any, slot: Any, place: Any) -> None:
    """Take an entry out of the index and close the gap, so that every other is still found."""
    index, places = words[slot + H_INDEX_AT], words[slot + H_PLACES]
    gap = place
    after = place
    while True:
        after = after + 1 if after + 1 < places else 0
        entry = words[index + after]
        if entry == 0:
            break
        home = place_of(np.uint64(entry) >> np.uint64(32), places)
        # It may fill the gap unless its home lies behind the gap, on the way from there to where it is.
        from_home = after - home if after >= home else after - home + places
        from_gap = after - gap if after >= gap else after - gap + places
        if from_home >= from_gap:
            words[index + gap] = entry
            gap = after
    words[index + gap] = 0


# -- rings of tiles


@inner
def number_of(halves: Any, tile: Any, anchor: Any) -> Any:
    """Return the whole number of a tile, which is at most `anchor`, that of the row's newest event."""
    return anchor - ((anchor - np.int64(halves[2 * tile])) & NUMBER_MASK)


@inner
def next_of(halves: Any, tile: Any) -> Any:
    return np.int64(halves[2 * tile + 1])
