"""The tile store: the state of all tables of a shard, in one memory, with one writer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.tiles.apply import DONE, apply_events, clear_columns, mark_texts, reclaim_rows, remove_rows
from millpond.feature_actors.tiles.check import check_table
from millpond.feature_actors.tiles.image import (
    ALL_MARKS,
    LOADED,
    NO_ROOM,
    ImageDamaged,
    Texts,
    export_rows,
    import_rows,
    make_places,
)
from millpond.feature_actors.tiles.memory import (
    M_LAYOUT,
    M_LIMIT,
    M_MAGIC,
    M_NEWEST_ARRIVAL,
    M_NEWEST_RECEIVED,
    M_SEED,
    M_SLOTS,
    M_USED,
    MEMORY_HEADER_WORDS,
    MEMORY_MAGIC,
    Memory,
    MemoryFull,
)
from millpond.feature_actors.tiles.program import FOR_EVER
from millpond.feature_actors.tiles.read import NO_CLOCK, join_features
from millpond.feature_actors.tiles.shape import Fit, shape_of
from millpond.feature_actors.tiles.structure import (
    BLOCK_ITEMS_MIN,
    BLOCK_WORDS_MAX,
    H_PLACES,
    H_POOLS,
    H_ROWS,
    LINE_WORDS,
    POOL_END,
    POOL_FREED,
    POOL_ITEMS,
    POOL_NEXT,
    POOL_WORDS,
)
from millpond.feature_actors.view import fields_in, fields_of

if TYPE_CHECKING:
    from millpond.feature_actors.layout import Layout, PlanProgram, Table

__all__ = ["SPARE_SLOT_WORDS", "TileStore"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: Events are applied in chunks of so many; after each, what is out of sight is looked for.
_CHUNK = 1_024
#: Places of an index that one step of reclaim looks at, at most: about a millisecond.
RECLAIM_PLACES_MAX = 2_048
#: Places looked at for each event, and for each new row: so garbage stays a fraction of what is in use.
#: A memory that is full is looked through as a whole, but not for every batch that it refuses.
_RECLAIM_EVERYTHING_EVERY_MS = 10_000
_RECLAIM_PER_EVENT, _RECLAIM_PER_NEW_ROW = 1 / 16, 4

#: A step of an image ends after so many words or places of an index: a millisecond or so.
IMAGE_WORDS_MAX, IMAGE_PLACES_MAX = 1 << 15, 1 << 13

#: Words of a slot's headers that are kept free for tables that are added: five and five more for each pool, see
#: `structure`, so about eight views of ten series. It takes 4 KB a slot.
SPARE_SLOT_WORDS = 512


@dataclass
class _Sweep:
    """How far reclaim has come in a table: slot and place; how many places are still to be looked at.

    newest_ms: the newest arrival stamp of what has been applied to the table, while that is less than the shard has
    heard of.
    """

    cursor: Ints = field(default_factory=lambda: np.zeros(2, np.int64))
    due: float = 0.0
    newest_ms: int | None = None


class TileStore:
    """All tables of one shard.

    memory: empty; it belongs to the store from now on. seed: the cluster's own seed of the index.
    reclaim_margin_ms: reclaim keeps what a read could see that is as of so long before the newest arrival stamp.
    spare_slot_words: room for the headers of tables that are added.
    """

    def __init__(
        self,
        layout: Layout,
        n_slots: int,
        memory: Memory,
        seed: int = 0,
        reclaim_margin_ms: int = 660_000,
        spare_slot_words: int = 0,
    ) -> None:
        self.memory = memory
        self._layout = layout
        self._n_slots = n_slots
        self._margin_ms = reclaim_margin_ms
        self._reclaimed_ms = NO_CLOCK
        self._promised_words = 0
        self._sweeps = [_Sweep() for _ in layout.tables]
        self._slot_words_max = layout.slot_words + spare_slot_words
        header = MEMORY_HEADER_WORDS + n_slots * self._slot_words_max
        words = memory.words
        memory.grow(header)
        words[M_USED] = header
        words[M_SLOTS], words[M_SEED] = n_slots, np.uint64(seed).astype(np.int64)
        words[M_NEWEST_ARRIVAL] = words[M_NEWEST_RECEIVED] = NO_CLOCK
        words[M_LAYOUT] = layout.digest
        words[M_MAGIC] = MEMORY_MAGIC

    def extend(self, layout: Layout) -> None:
        """Have room for the tables that an extended layout has added. Raises `MemoryFull`, and nothing has changed."""
        if layout.slot_words > self._slot_words_max:
            raise MemoryFull(
                f"tiles: the headers of {len(layout.tables)} tables take {layout.slot_words} words a slot, and there "
                f"is room for {self._slot_words_max}; start the cluster again, which makes room"
            )
        self._layout = layout
        self._sweeps += [_Sweep() for _ in layout.tables[len(self._sweeps) :]]

    def hear_for(self, table: Table, arrival_ms: int | None) -> None:
        """Say that a table is behind, and which arrival stamps it has had: nothing is out of its sight that is not as
        of then. None: that it is not behind any more."""
        sweep = self._sweeps[table.number]
        if arrival_ms is not None and sweep.newest_ms is not None:
            arrival_ms = max(arrival_ms, sweep.newest_ms)
        sweep.newest_ms = arrival_ms

    @property
    def newest_arrival_ms(self) -> int:
        """The newest arrival stamp that the shard has heard of, `NO_CLOCK` before the first."""
        return int(self.memory.words[M_NEWEST_ARRIVAL])

    @property
    def newest_received_ms(self) -> int:
        """When the newest request was received that the shard has heard of, `NO_CLOCK` before the first."""
        return int(self.memory.words[M_NEWEST_RECEIVED])

    def hear_of(self, arrival_ms: int, received_ms: int) -> None:
        """Move time on, before events with that arrival stamp are applied: what they push out of sight is only ever
        missing from reads as of later."""
        words = self.memory.words
        words[M_NEWEST_ARRIVAL] = max(self.newest_arrival_ms, arrival_ms)
        words[M_NEWEST_RECEIVED] = max(self.newest_received_ms, received_ms)

    def apply(
        self,
        table: Table,
        rows: Ints,
        hashes: Ints,
        times: Ints,
        arrivals: Ints,
        inputs: Floats,
        masks: Bools,
        base: int,
    ) -> None:
        """Apply the events `rows` of a batch in that order; shapes as `apply_events`; `promise_room` comes first.

        base: sequence of event 0 of the batch, see `structure`; what a row has by its own sequence is passed over.
        """
        memory, program = self.memory, table.program(self._n_slots)
        for first in range(0, len(rows), _CHUNK):
            chunk, start = rows[first : first + _CHUNK], 0
            before = self._rows(table)
            while True:
                start = apply_events(
                    memory.words, memory.floats, memory.halves, program, chunk, start, hashes, times, arrivals, inputs,
                    masks, base,
                )  # fmt: skip
                if start == DONE:
                    break
                self._grow(table)
            self._reclaim(table, len(chunk) * _RECLAIM_PER_EVENT + (self._rows(table) - before) * _RECLAIM_PER_NEW_ROW)

    def promise_room(
        self, events: Sequence[tuple[Table, Ints]], arrival_ms: int = NO_CLOCK, more_words: int = 0
    ) -> int:
        """Have room for events, or be sure of it, so that applying them cannot fail halfway; return how many words.

        What was promised before and not kept yet is counted in. events: per table the slot of each event's key, int64
        [n]; arrival_ms: their newest arrival stamp, as of which what is out of sight is freed if there is no room
        otherwise. What events need at most is far more than what they
        usually need, so it is looked at closely, and allocated, only where memory is short. Raises `MemoryFull`.
        """
        room = int(self.memory.words[M_LIMIT] - self.memory.words[M_USED]) - self._promised_words
        wanted = more_words + sum(self._at_most(table, len(slots)) for table, slots in events)
        if room < wanted and not self.memory.has_room_for(wanted - room):
            try:
                wanted = self._make_just_enough_room(events, more_words)
            except MemoryFull:
                self.hear_of(arrival_ms, NO_CLOCK)
                if not self._reclaim_everything():
                    raise
                wanted = self._make_just_enough_room(events, more_words)
        self._promised_words += wanted
        return wanted

    def keep_promise(self, words: int) -> None:
        """Say that events have been applied, or will not be, for which so many words were promised."""
        self._promised_words -= words

    def _make_just_enough_room(self, events: Sequence[tuple[Table, Ints]], more_words: int) -> int:
        room = int(self.memory.words[M_LIMIT] - self.memory.words[M_USED]) - self._promised_words
        wanted = more_words + sum(self._words_for(table, slots) for table, slots in events)
        if room < wanted:
            self.memory.grow(wanted - room)
        return wanted

    def _reclaim_everything(self) -> bool:
        """Free all that is out of sight, unless that was done just now; return whether it was not."""
        if self.newest_arrival_ms < self._reclaimed_ms + _RECLAIM_EVERYTHING_EVERY_MS:
            return False
        self._reclaimed_ms = self.newest_arrival_ms
        for table in self._layout.tables:
            self.reclaim_all(table)
        return True

    def _at_most(self, table: Table, n: int) -> int:
        """Return more words than n events of a table can need, wherever their keys fall."""
        if n == 0:
            return 0
        rows = self._rows(table) + n
        return (min(n, self._n_slots) + 2) * table.reserve_words + n * sum(table.pool_items) + 16 * rows

    def _words_for(self, table: Table, slots: Ints) -> int:
        """Return how many words events may need at most that fall into these slots."""
        if len(slots) == 0:
            return 0
        headers = self._headers(table)
        events = np.bincount(slots, minlength=self._n_slots)
        rows = headers[:, H_ROWS] + events
        growing = rows * 4 > headers[:, H_PLACES] * 3 - 4
        wanted = 2 * table.reserve_words + int((rows[growing] * 8 + 64).sum())
        for number, item_words in enumerate(table.pool_items):
            pool = headers[:, H_POOLS + POOL_WORDS * number :]
            free = pool[:, POOL_FREED] + (pool[:, POOL_END] - pool[:, POOL_NEXT]) // item_words
            # A slot that needs more than it has free takes a block, which is larger than what is missing.
            missing = np.maximum(events - free, 0)
            blocks = (pool[:, POOL_ITEMS] + events) // 8
            blocks = np.clip(blocks, BLOCK_ITEMS_MIN, max(BLOCK_WORDS_MAX // item_words, BLOCK_ITEMS_MIN))
            wanted += int(((blocks + missing) * item_words + LINE_WORDS)[missing > 0].sum())
        return wanted

    def _grow(self, table: Table) -> None:
        # Besides blocks for its pools, an event may need a larger index.
        wanted = table.reserve_words + 2 * int(self._headers(table)[:, H_PLACES].max()) + 64
        room = int(self.memory.words[M_LIMIT] - self.memory.words[M_USED])
        try:
            self.memory.grow(max(wanted - room, 1))
        except MemoryFull as full:
            # Room was promised, and someone else has taken it: part of the events may have been applied.
            raise RuntimeError(f"tiles: the file system has filled while events were applied: {full}") from full

    def join(
        self,
        table: Table,
        plan: PlanProgram,
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
        base: int,
    ) -> None:
        """Apply events and read features in the order of `steps`; see `join_features`."""
        memory, start, part, before = self.memory, 0, plan.tables.index(table), self._rows(table)
        while True:
            start = join_features(
                memory.words, memory.floats, memory.halves, table.program(self._n_slots), steps, start, hashes, times,
                arrivals, inputs, masks, base, plan.packed(self._n_slots).program, part, asked, as_of, out, known,
            )  # fmt: skip
            if start == DONE:
                break
            self._grow(table)
        new_rows = self._rows(table) - before
        self.reclaim(table, int(len(steps) * _RECLAIM_PER_EVENT) + new_rows * _RECLAIM_PER_NEW_ROW)

    # -- images

    def image(self, table: Table) -> Iterator[tuple[int, int, Ints]]:
        """Yield the rows of a table in steps of bounded size: slot, how many rows that has now, and an image of some of
        them, see `image`.

        Events may be applied between two steps. What has come to be since the first need not be in any of them.
        """
        program = table.program(self._n_slots)
        out = np.empty(2 * IMAGE_WORDS_MAX, np.int64)
        for slot in np.flatnonzero(self._headers(table)[:, H_ROWS]).tolist():
            mark = 0
            while mark < ALL_MARKS:
                before, rows = mark, int(self._headers(table)[slot, H_ROWS])
                size, mark = export_rows(
                    self.memory.words, self.memory.halves, program, slot, mark, out, IMAGE_WORDS_MAX, IMAGE_PLACES_MAX
                )
                if size:
                    yield slot, rows, out[:size].copy()
                elif mark == before:
                    out = np.empty(2 * len(out), np.int64)

    def load(
        self, table: Table, fit: Fit, slot: int, rows: int, image: Ints, texts: Texts, *, replaces: bool = False
    ) -> int:
        """Load an image of some rows of a slot, which are not there yet; return the newest sequence among them.

        rows: how many the slot is going to have. replaces: whether those that are there give way instead. Raises
        `MemoryFull`, `ImageDamaged`: the store is not to be used then.
        """
        program = table.program(self._n_slots)
        # As full as one that grows is in the middle between two sizes.
        places = (max(rows, int(self._headers(table)[slot, H_ROWS])) * 3 // 2 + 2 * LINE_WORDS) // LINE_WORDS
        places *= LINE_WORDS
        if self._headers(table)[slot, H_PLACES] < places:
            self._have_room(places)
            make_places(self.memory.words, program, slot, places)
        at, newest = 0, -1
        while True:
            at, outcome, of_these = import_rows(
                self.memory.words, self.memory.floats, self.memory.halves, program, fit, slot, image, at, texts,
                replaces,
            )  # fmt: skip
            newest = max(newest, int(of_these))
            if outcome == LOADED:
                return newest
            if outcome != NO_ROOM:
                raise ImageDamaged(slot, at, outcome)
            # Besides its tiles, a row may need a larger index.
            more = 2 * int(image[at]) + 2 * int(self._headers(table)[slot, H_PLACES]) + 64
            self._have_room(table.reserve_words + more)

    def _have_room(self, words: int) -> None:
        room = int(self.memory.words[M_LIMIT] - self.memory.words[M_USED])
        if room < words:
            self.memory.grow(words - room)

    # -- reclaim

    def _reclaim(self, table: Table, places: float) -> None:
        sweep = self._sweeps[table.number]
        # What is due and cannot be looked at now is looked at later: a step is short.
        sweep.due = min(sweep.due + places, float(self._places(table)))
        if (budget := min(int(sweep.due), RECLAIM_PLACES_MAX)) > 0:
            sweep.due -= budget
            self.reclaim(table, budget)

    def reclaim(self, table: Table, places: int) -> int:
        """Look at so many places of a table's indexes and free what no window can see; return rows freed."""
        sweep = self._sweeps[table.number]
        newest_ms = self.newest_arrival_ms if sweep.newest_ms is None else sweep.newest_ms
        if newest_ms == NO_CLOCK or (table.views_keep_ms == FOR_EVER and not table.tiled):
            return 0
        floor = newest_ms - self._margin_ms
        keep = 1 << 61 if table.views_keep_ms == FOR_EVER else table.views_keep_ms
        return int(
            reclaim_rows(
                self.memory.words, self.memory.halves, table.program(self._n_slots), sweep.cursor, places, floor, keep,
            )
        )  # fmt: skip

    def reclaim_all(self, table: Table) -> int:
        """Look at everything of a table, see `reclaim`."""
        return self.reclaim(table, 2 * self._places(table))

    def remove(self, table: Table, hashes: Ints) -> int:
        """Remove the rows of some keys, int64 [n, 2], and overwrite what they had; return how many there were."""
        return int(remove_rows(self.memory.words, self.memory.halves, table.program(self._n_slots), hashes))

    def clear(self, table: Table, hashes: Ints, fields: Collection[str]) -> None:
        """Have nothing in the columns that look at some fields, their conditions included, of the rows of some keys,
        int64 [n, 2]."""
        looked_at = [
            fields_of(table.source, c.inputs) | fields_in(table.source, [table.wheres[s.where]])
            for s in table.series
            for c in s.columns
        ]
        chosen = np.array([not its.isdisjoint(fields) for its in looked_at], np.bool_)
        memory, program = self.memory, table.program(self._n_slots)
        clear_columns(memory.words, memory.floats, memory.halves, program, hashes, chosen)

    def texts_in_use(self, addresses: Floats) -> Bools:
        """Return which of the strings at addresses, float64 [n], ascending, some row names, bool [n]. Looks at all."""
        used = np.zeros(len(addresses), np.bool_)
        for table in self._layout.tables:
            firsts, text_words = [0], []
            for series in shape_of(table).series:
                at = 0
                for column in series.columns:
                    text_words += [at + word for word in column.texts]
                    at += column.words
                firsts.append(len(text_words))
            if text_words:
                memory, program = self.memory, table.program(self._n_slots)
                mark_texts(
                    memory.words, memory.floats, memory.halves, program, np.array(firsts), np.array(text_words),
                    addresses, used,
                )  # fmt: skip
        return used

    # -- what it holds

    def _headers(self, table: Table) -> Ints:
        """Return the slot headers of a table, int64 [slots, words]."""
        at = table.slots_at(self._n_slots)
        return self.memory.words[at : at + self._n_slots * table.slot_words].reshape(self._n_slots, table.slot_words)

    def _rows(self, table: Table) -> int:
        return int(self._headers(table)[:, H_ROWS].sum())

    def _places(self, table: Table) -> int:
        return int(self._headers(table)[:, H_PLACES].sum()) + self._n_slots

    def entities(self, table: Table) -> int:
        """Return how many entities of a table have something that is kept."""
        return self._rows(table)

    def tiles(self, table: Table) -> int:
        """Return how many tiles are in use, fine ones included."""
        headers = self._headers(table)
        pools = range(H_POOLS + POOL_WORDS, H_POOLS + POOL_WORDS * (1 + table.pools), POOL_WORDS)
        return int(sum((headers[:, p + POOL_ITEMS] - headers[:, p + POOL_FREED]).sum() for p in pools))

    @property
    def used_bytes(self) -> int:
        """Bytes in blocks, of those that are allocated."""
        return int(self.memory.words[M_USED]) * 8

    def check(self, tables: Sequence[Table] | None = None) -> list[str]:
        """Return what is wrong with the structure: an empty list if every invariant holds."""
        return [
            f"table {table.number}: {problem}"
            for table in tables or self._layout.tables
            for problem in check_table(self.memory, table, self._n_slots)
        ]
