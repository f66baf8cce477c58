"""The tile store: the state of one table in one slot.

It lies in a single int64 array, the arena, so that it can be locked, grown, copied and moved as one:

    header   rows used and room for, index, where each part begins, a pool per series
    index    open addressing, linear probing, at most 2/3 full; a place holds a row's offset or -1
    rows     per entity: hash of the key (2 words), newest event time per `where`, then per series
             the newest tile's number in its pool, or the lifetime partial behind its newest time
    pools    per series: tiles of equal size: tile number, next older tile, the partial's columns

Tiles of an entity form a chain per series, newest first; only tiles with events exist. There is one
writer. Nothing here knows of time zones, clocks, threads or Ray.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.kernels import (
    DONE,
    H_INDEX_AT,
    H_INDEX_MASK,
    H_POOLS,
    H_ROWS_AT,
    H_ROWS_MAX,
    H_ROWS_USED,
    NONE,
    P_AT,
    P_MAX,
    P_USED,
    POOL_WORDS,
    apply_events,
    copy_arena,
    find_rows,
    join_features,
    read_features,
)
from millpond.feature_actors.layout import (
    ROW_HEADER_WORDS,
    S_LIFETIME,
    S_ROW_OFFSET,
    S_TILE_WORDS,
    ReadProgram,
    Table,
)

__all__ = ["SlotTiles"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_ROWS_AT_FIRST = 4
_TILES_AT_FIRST = 8


class SlotTiles:
    """Entities of one table whose keys fall into one slot."""

    def __init__(self, table: Table, seed: int) -> None:
        self._table = table
        self._seed = np.uint64(seed)
        self._arena = self._lay_out(_ROWS_AT_FIRST, [0 if s.lifetime else _TILES_AT_FIRST for s in table.series])
        self._floats: Floats = self._arena.view(np.float64)

    def _lay_out(self, rows_max: int, tiles_max: list[int]) -> Ints:
        table = self._table
        index = 4
        while index * 2 < rows_max * 3:
            index *= 2
        at = H_POOLS + POOL_WORDS * len(tiles_max)
        index_at, rows_at = at, at + index
        at = rows_at + rows_max * table.row_words
        pools = []
        for tiles, words in zip(tiles_max, table.series_program[:, S_TILE_WORDS].tolist(), strict=True):
            pools += [0, tiles, at]
            at += tiles * words
        arena: Ints = np.zeros(at, np.int64)
        arena[:H_POOLS] = [0, rows_max, index - 1, index_at, rows_at]
        arena[H_POOLS : H_POOLS + len(pools)] = pools
        arena[index_at:rows_at] = NONE
        return arena

    def apply(self, rows: Ints, hashes: Ints, times: Ints, arrivals: Ints, inputs: Floats, masks: Bools) -> None:
        """Apply the events `rows` of a batch in that order; shapes as `kernels.apply_events`."""
        table, start = self._table, 0
        while True:
            start = apply_events(
                self._arena, self._floats, self._seed, table.series_program, table.column_program,
                table.row_words, rows, start, hashes, times, arrivals, inputs, masks,
            )  # fmt: skip
            if start == DONE:
                return
            self._grow()

    def _grow(self) -> None:
        """Give every part that is nearly full half as much again, at least."""
        old = self._arena

        def larger(used: int, room: int) -> int:
            return room if used * 8 < room * 7 else room + max(room // 2, 4)

        tiles = []
        for s, series in enumerate(self._table.series):
            pool = H_POOLS + POOL_WORDS * s
            tiles.append(0 if series.lifetime else larger(int(old[pool + P_USED]), int(old[pool + P_MAX])))
        new = self._lay_out(larger(int(old[H_ROWS_USED]), int(old[H_ROWS_MAX])), tiles)
        copy_arena(old, new, self._seed, self._table.series_program, self._table.row_words)
        self._arena, self._floats = new, new.view(np.float64)

    def find(self, hashes: Ints, which: Ints, rows: Ints, newest: Ints) -> None:
        """Find the keys `hashes[which]`; see `kernels.find_rows`."""
        find_rows(self._arena, self._seed, hashes, which, len(self._table.wheres), rows, newest)

    def read(self, program: ReadProgram, which: Ints, rows: Ints, as_of: Ints, out: Floats, known: Bools) -> None:
        """Read features of rows found by `find`; see `kernels.read_features`."""
        table = self._table
        read_features(
            self._arena, self._floats, table.series_program, table.column_program, program.scans,
            program.features, program.views, which, rows, as_of, out, known,
        )  # fmt: skip

    def join(
        self,
        program: ReadProgram,
        steps: Ints,
        hashes: Ints,
        times: Ints,
        arrivals: Ints,
        inputs: Floats,
        masks: Bools,
        asked: Ints,
        as_of: Ints,
        out: Floats,
        known: Bools,
    ) -> None:
        """Apply events and read features in the order of `steps`; see `kernels.join_features`."""
        table, start = self._table, 0
        while True:
            start = join_features(
                self._arena, self._floats, self._seed, table.series_program, table.column_program,
                table.row_words, steps, start, hashes, times, arrivals, inputs, masks, program.scans,
                program.features, program.views, asked, as_of, out, known,
            )  # fmt: skip
            if start == DONE:
                return
            self._grow()

    @property
    def entities(self) -> int:
        return int(self._arena[H_ROWS_USED])

    @property
    def tiles(self) -> int:
        return int(sum(self._arena[H_POOLS + POOL_WORDS * s] for s in range(len(self._table.series))))

    @property
    def allocated_bytes(self) -> int:
        return int(self._arena.nbytes)

    def check(self) -> list[str]:
        """Return what is wrong with the structure: an empty list if every invariant holds."""
        arena, table, wrong = self._arena, self._table, []
        rows_at, used = int(arena[H_ROWS_AT]), int(arena[H_ROWS_USED])
        index = arena[arena[H_INDEX_AT] : arena[H_INDEX_AT] + arena[H_INDEX_MASK] + 1]
        indexed = sorted(index[index != NONE].tolist())
        row_offsets = [rows_at + r * table.row_words for r in range(used)]
        if indexed != row_offsets:
            wrong.append(f"index holds {len(indexed)} rows, the table {used}")
        keys = {tuple(arena[at : at + ROW_HEADER_WORDS].tolist()) for at in row_offsets}
        if len(keys) != used:
            wrong.append(f"{used - len(keys)} keys stand in two rows")
        found = np.full(used, NONE, np.int64)
        hashes = np.array([arena[at : at + ROW_HEADER_WORDS] for at in row_offsets], np.int64).reshape(-1, 2)
        self.find(hashes, np.arange(used), found, np.zeros(used, np.int64))
        if found.tolist() != row_offsets:
            wrong.append(f"{np.count_nonzero(found != row_offsets)} rows are not found by their key")
        for s, program in enumerate(table.series_program):
            if program[S_LIFETIME]:
                continue
            pool = H_POOLS + POOL_WORDS * s
            words, base = int(program[S_TILE_WORDS]), int(arena[pool + P_AT])
            seen: set[int] = set()
            for at in row_offsets:
                link, newer = int(arena[at + program[S_ROW_OFFSET]]), np.iinfo(np.int64).max
                while link != NONE:
                    linked = link not in seen and 0 <= link < arena[pool + P_USED]
                    if not linked or (number := int(arena[base + link * words])) >= newer:
                        wrong.append(f"series {s}: chain of row {at} is broken at tile {link}")
                        break
                    seen.add(link)
                    newer, link = number, int(arena[base + link * words + 1])
            if len(seen) != arena[pool + P_USED]:
                wrong.append(f"series {s}: {arena[pool + P_USED]} tiles used, {len(seen)} linked")
        return wrong
