"""Checking the structure of a memory, slowly and with no code of the kernels: every entity, ring and pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from millpond.feature_actors.tiles.memory import M_LIMIT, M_SEED, M_USED, Memory
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
)
from millpond.feature_actors.tiles.structure import (
    H_INDEX_AT,
    H_PLACES,
    H_POOLS,
    H_ROWS,
    H_SEQUENCE,
    POOL_FREE,
    POOL_FREED,
    POOL_ITEMS,
    ROW_HEADER_WORDS,
)

if TYPE_CHECKING:
    from millpond.feature_actors.layout import Table

__all__ = ["check_table"]

_LOW = 0xFFFFFFFF


def check_table(memory: Memory, table: Table, n_slots: int) -> list[str]:
    """Return what is wrong with a table in a memory that nobody writes to now."""
    wrong: list[str] = []
    blocks: dict[int, int] = {}  # address of each row and tile in use or free, and its words
    words = memory.words
    used = int(words[M_USED])
    if used > words[M_LIMIT]:
        wrong.append(f"{used} words used of {words[M_LIMIT]}")
    for number in range(n_slots):
        slot = table.slots_at(n_slots) + number * table.slot_words
        wrong += [f"slot {number}: {w}" for w in _check_slot(memory, table, slot, number, n_slots, blocks)]
    end = 0
    for at, size in sorted(blocks.items()):
        if at < end:
            wrong.append(f"what lies at {at} overlaps with what lies before it")
        end = at + size
    if end > used:
        wrong.append(f"something lies at {end}, behind the {used} words used")
    return wrong


def _check_slot(
    memory: Memory, table: Table, slot: int, number: int, n_slots: int, blocks: dict[int, int]
) -> list[str]:
    words, wrong = memory.words, []
    if words[slot + H_SEQUENCE] % 2:
        wrong.append("is half-written")
    index_at, places = int(words[slot + H_INDEX_AT]), int(words[slot + H_PLACES])
    index = [int(e) & (1 << 64) - 1 for e in words[index_at : index_at + places]]
    rows = [e & _LOW for e in index if e]
    if len(rows) != words[slot + H_ROWS]:
        wrong.append(f"index holds {len(rows)} rows, {words[slot + H_ROWS]} are counted")
    if places and 4 * len(rows) > 3 * places:
        wrong.append(f"index of {places} places holds {len(rows)} rows")
    keys = set()
    for place, entry in enumerate(index):
        if entry:
            lo, hi = (int(w) & (1 << 64) - 1 for w in words[(entry & _LOW) : (entry & _LOW) + 2])
            keys.add((lo, hi))
            mark = ((lo ^ int(words[M_SEED]) & (1 << 64) - 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 32
            home = mark * places >> 32
            between = range(home, place) if home <= place else [*range(home, places), *range(place)]
            if mark != entry >> 32 or not all(index[p] for p in between):
                wrong.append(f"the row at {entry & _LOW} is not found by its key")
            if hi % n_slots != number:
                wrong.append(f"the row at {entry & _LOW} is of slot {hi % n_slots}")
    if len(keys) != len(rows):
        wrong.append(f"{len(rows) - len(keys)} keys stand in two rows")
    _own(blocks, rows, table.row_words, wrong)
    wrong += _check_pool(memory, slot + H_POOLS, len(rows), table.row_words, blocks)
    for s, series in enumerate(table.program(n_slots).series):
        if not series[S_LIFETIME]:
            wrong += [f"series {s}: {w}" for w in _check_series(memory, slot, series, rows, blocks)]
    return wrong


def _check_series(memory: Memory, slot: int, series: Any, rows: list[int], blocks: dict[int, int]) -> list[str]:
    words, halves, wrong = memory.words, memory.halves, []
    width, tile_words = int(series[S_WIDTH_MS]), int(series[S_TILE_WORDS])
    tiles: list[int] = []
    fine: list[int] = []
    for row in rows:
        ring, problem = _ring(halves, int(halves[2 * row + series[S_ROW_AT]]))
        anchor = int(words[row + ROW_HEADER_WORDS + series[S_WHERE]]) // width
        numbers = [anchor - ((anchor - int(halves[2 * t])) & _LOW) for t in ring]
        if problem or any(np.diff(numbers) <= 0):
            wrong.append(f"ring of row {row}: {problem or 'not ascending'}")
        most = int(series[S_KEEP_MS]) // width + 3
        if series[S_KEEP_MS] != FOR_EVER and len(ring) > most:
            wrong.append(f"ring of row {row} has {len(ring)} tiles; a window has at most {most}")
        tiles += ring
        if series[S_EXACT]:
            for tile in ring:
                fine_ring, problem = _ring(halves, int(halves[2 * tile + 2]))
                times = [int(halves[2 * t]) for t in fine_ring]
                if problem or not times or any(np.diff(times) <= 0) or times[-1] >= width:
                    wrong.append(f"fine ring of tile {tile}: {problem or 'not ascending, or empty'}")
                fine += fine_ring
    _own(blocks, tiles, tile_words, wrong)
    wrong += _check_pool(memory, slot + int(series[S_POOL]), len(tiles), tile_words, blocks)
    if series[S_EXACT]:
        _own(blocks, fine, tile_words - 1, wrong)
        wrong += _check_pool(memory, slot + int(series[S_FINE_POOL]), len(fine), tile_words - 1, blocks)
    return wrong


def _ring(halves: Any, head: int) -> tuple[list[int], str]:
    """Return the tiles of a ring, oldest first, and what is wrong with it."""
    if head == 0:
        return [], ""
    ring, seen = [], set()
    tile = int(halves[2 * head + 1])
    while tile not in seen and tile != 0:
        seen.add(tile)
        ring.append(tile)
        tile = int(halves[2 * tile + 1])
    return ring, "" if ring and ring[-1] == head and tile == ring[0] else "does not come back to its head"


def _check_pool(memory: Memory, pool: int, used: int, item_words: int, blocks: dict[int, int]) -> list[str]:
    words, halves, wrong = memory.words, memory.halves, []
    free: list[int] = []
    at = int(words[pool + POOL_FREE])
    while at and len(free) <= words[pool + POOL_ITEMS]:
        free.append(at)
        at = int(halves[2 * at + 1])
    if len(free) != words[pool + POOL_FREED] or used + len(free) != words[pool + POOL_ITEMS]:
        wrong.append(
            f"pool at {pool}: {words[pool + POOL_ITEMS]} items, {words[pool + POOL_FREED]} of them free; found "
            f"{used} and {len(free)}"
        )
    _own(blocks, free, item_words, wrong)
    return wrong


def _own(blocks: dict[int, int], items: list[int], size: int, wrong: list[str]) -> None:
    for at in items:
        if at in blocks:
            wrong.append(f"two things lie at {at}")
        blocks[at] = size
