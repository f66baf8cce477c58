"""A shard with its log: what is acknowledged is on disk first, and is there again after whatever happened.

Pure: no Ray, no threads. The actor gathers what waits, appends it at once, and commits it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.events import Events, Receipt
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.record import Decoded, EventsRecord, HomeRecord, LogDamaged, OfferRecord, Record
from millpond.feature_actors.routes import shards_of_keys
from millpond.feature_actors.shard import Prepared, Shard

__all__ = ["DurableShard", "RecordLog", "VolatileLog"]

#: Called with the offset that was replayed and the one where the log ends.
Progress = Callable[[int, int], None]
Bools = npt.NDArray[np.bool_]

_PROGRESS_S = 0.1


class RecordLog(Protocol):
    """Where records go: `log.Log`, or a `VolatileLog`."""

    next: int

    def append(self, records: Sequence[Record], settled: int = 0) -> list[int]: ...

    def get(self, offset: int) -> Decoded: ...


class VolatileLog:
    """A log in memory, for `durability = "none"`: keeps what is owed, for as long as it is."""

    def __init__(self) -> None:
        self.next = 0
        self._kept: dict[int, OfferRecord] = {}

    def append(self, records: Sequence[Record], settled: int = 0) -> list[int]:
        offsets = list(range(self.next, self.next + len(records)))
        self.next += len(records)
        for old in [offset for offset in self._kept if offset < settled]:
            del self._kept[old]
        self._kept |= {at: r for at, r in zip(offsets, records, strict=True) if isinstance(r, OfferRecord)}
        return offsets

    def get(self, offset: int) -> Decoded:
        return Decoded(self._kept[offset], 0)


class DurableShard:
    """A shard whose `Prepared` goes to a log before it is committed. `recover` comes before all else."""

    def __init__(self, layout: Layout, shard: Shard, log: RecordLog) -> None:
        self.shard = shard
        self.log = log
        self._layout = layout

    def recover(self, progress: Progress = lambda at, end: None) -> None:
        """Replay the log into the shard, which is empty. Raises `LogDamaged`, `MemoryFull`."""
        told = time.monotonic()
        offers: dict[int, OfferRecord] = {}
        assert isinstance(self.log, Log)
        for offset, (record, settled) in self.log.read():
            if isinstance(record, EventsRecord):
                self.shard.replay_events(record, offset)
            elif isinstance(record, OfferRecord):
                self.shard.replay_offer(record, offset)
                if (record.routes > 1).any():
                    offers[offset] = record
            elif (offer := offers.pop(record.offer, None)) is not None:
                self.shard.replay_take(record, offer, offset)
            else:
                raise LogDamaged(
                    f"log: the record at offset {offset} takes an offer at {record.offer}, which is not there; run "
                    "`millpond check` on the stopped cluster's directory",
                    path=f"offset {offset}",
                )
            self.shard.deliveries.settle_before(settled)
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                progress(offset, self.log.next)
        progress(self.log.next, self.log.next)

    def append(self, prepared: Sequence[Prepared], settled: int) -> list[int | None]:
        """Write what is new of it to the log and sync, in one transaction; return the offset of each.

        settled: of the shard's deliveries. Raises `LogFull`: then the shard has to undo it, and all that was prepared
        since, which may have been judged by it.
        """
        records: list[Record] = [p.record for p in prepared if p.record is not None]
        offsets = iter(self.log.append(records, settled) if records else [])
        return [None if p.record is None else next(offsets) for p in prepared]

    def write(self, prepared: Prepared) -> Receipt:
        """Append and commit at once."""
        try:
            (offset,) = self.append([prepared], self.shard.deliveries.settled(self.log.next))
        except BaseException:
            self.shard.undo(prepared)
            raise
        return self.shard.commit(prepared, offset)

    def owed_events(self, offset: int) -> tuple[HomeRecord, Events, Bools]:
        """Return a record that is owed, its events, and which shards keep something of which, bool [shards, n]."""
        record = self.log.get(offset).record
        assert isinstance(record, OfferRecord)
        home = HomeRecord(self.shard.number, offset, self.shard.deliveries.settled(self.log.next))
        rows = np.flatnonzero(record.routes & 1)
        declared = self._layout.source(record.source)
        batch = declared.upgraded(record.batch)
        everything = Events.judged(record.source, batch, record.arrivals, record.received_ms)
        events = everything.of_rows(rows, record.arrivals[:0])
        concerned, _ = shards_of_keys(self._layout, self.shard.shard_map, record.source, events.batch)
        return home, events, concerned
