"""Filling: the steps by which tables that were added, and are behind, get to where the others of their shard are.

    1. bring   for a key that came: what is of this shard by it, from the logs of all, into its own log, see `spread`
    2. read    all that is in history and log by now, slice by slice, see `backfill`
    3. route   from here on events are prepared for the tables, too; what was prepared before gets into the log
    4. read    what got into the log meanwhile, then what queued

Then they are whole, which is written down. Broken off anywhere, what was brought stays; the tables are begun anew when
they have given up what they had (`Shard.give_up`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from millpond.feature_actors.backfill import apply_slices, note_whole, slices_of
from millpond.feature_actors.durable import DurableShard
from millpond.feature_actors.layout import Table
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.past import Past
from millpond.feature_actors.shard_past import NoPast, ShardPast
from millpond.feature_actors.spread import BroughtBefore, batched, lacking, note_brought
from millpond.feature_actors.steps import Cut, In, Rest, Steps, Write

__all__ = ["AddedTable", "Filling", "SliceSizes"]


@dataclass
class AddedTable:
    """How far a table that was added is: of its view the state, and up to which offset of which it has been read."""

    table: Table
    state: str
    read: int = 0
    of: int = 0
    why: str = ""
    history_since_ms: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("state", "read", "of", "why", "history_since_ms")}


@dataclass(frozen=True)
class SliceSizes:
    """How much at a time: events that are applied between two commits, some milliseconds; records of them, which cost
    more than their few events; records that are brought together."""

    events_max: int = 4_096
    records_max: int = 32
    brought_max: int = 32


class Filling:
    """Of some tables of a shard, one try. past: of the cluster, None if it has none. n_homes: how many shards it has.
    brought: what has been brought to the shard; goes on with it."""

    def __init__(
        self,
        durable: DurableShard,
        past: Past | None,
        n_homes: int,
        brought: BroughtBefore,
        added: Sequence[AddedTable],
        sizes: SliceSizes = SliceSizes(),
    ) -> None:
        self._durable, self._shard = durable, durable.shard
        self._past, self._n_homes, self._brought = past, n_homes, brought
        self._added, self._tables, self._sizes = added, [one.table for one in added], sizes

    def steps(self) -> Steps[None]:
        """Raises `NoPast`, `LogFull`, `LogDamaged`, `MemoryFull` and what reading the history does."""
        durable, shard, tables = self._durable, self._shard, self._tables
        if not isinstance(durable.log, Log):
            raise NoPast('without a log (`durability = "none"`) nothing is known of what was before the view')
        # 1.
        for number in sorted({table.key_number for table in tables} - {0}):
            yield from self._bring(number)
        # 2.
        past = durable.past()
        yield from self._read_on(past)
        # 3.
        for table in tables:
            shard.route_to(table)
        yield Write()
        (end,) = {shard.queue_from_here(table) for table in tables}
        # 4.
        yield from self._read_on(past, end)
        for table in tables:
            while not shard.catch_up_queued(table):
                yield Rest()
        yield In("views", partial(note_whole, durable.shard_folder.path, tables))
        for one in self._added:
            one.state, one.why = "whole", ""

    def _bring(self, key_number: int) -> Steps[None]:
        """Write to the log what is of this shard by a key that came, and lies in the logs of others, or here, where
        nobody had meant it for that key."""
        assert self._past is not None
        key = self._shard.layout.added_keys[key_number - 1]
        of = self._brought.setdefault(key, {})
        yield self._noted()
        for home in range(self._n_homes):
            cut = yield Cut(home, key_number)
            if of.get(home, 0) >= cut:
                continue
            records = self._past.home_records(home, of.get(home, 0), cut)
            some = batched(lacking(records, home, key), self._sizes.brought_max)
            while lacks := (yield In("views", partial(next, some, None))):
                begun = time.perf_counter()
                prepared = [self._shard.prepare_brought(one.record, key[1], one.brought) for one in lacks]
                yield Write([one for one in prepared if one.record is not None])
                for view in self._added:
                    view.read, view.of = lacks[-1].brought.before, cut
                yield Rest(time.perf_counter() - begun)
            of[home] = cut
        yield self._noted()

    def _noted(self) -> In:
        folder, end = self._durable.shard_folder.path, self._shard.next_offset
        return In("views", partial(note_brought, folder, self._brought, end))

    def _read_on(self, past: ShardPast, until: int | None = None) -> Steps[None]:
        """Apply what is in the past to the tables; a thread reads the next slices when these are done."""
        slices = slices_of(past.read_on(until), self._sizes.events_max, self._sizes.records_max)
        while True:
            begun = time.perf_counter()
            if not (some := (yield In("views", partial(next, slices, None)))):
                break
            apply_slices(self._shard, self._tables, some)
            for one in self._added:
                one.read, one.of = some[-1].offset, past.end
            # Scores and events are what the processors are for.
            yield Rest(time.perf_counter() - begun)
        yield In("views", partial(past.note_expired, {table.source.name for table in self._tables}))
        for one in self._added:
            one.read = one.of = past.end
            one.history_since_ms = past.history_since.get(one.table.source.name)
