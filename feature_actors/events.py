"""Events of one source on their way to a shard, and what the shard says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.keys import Hashes

__all__ = ["ALL_KEYS", "ELSEWHERE", "FORGOTTEN", "Events", "PastEvents", "Receipt"]

Ints = npt.NDArray[np.int64]

#: The verdict of a shard that is not the home of an event; the others are in `dedupe`.
ELSEWHERE = 3
#: Of an event that its home does not take, for its entity was forgotten after it.
FORGOTTEN = 4
#: More than there are.
ALL_KEYS = 1 << 30


@dataclass(frozen=True, slots=True)
class Events:
    """n events, valid rows of the source's schema.

    ids uint64 [n, 2]: hashes of the event ids, or of the request's key and the row; ids_given: whether the sender chose
    them, so that they may come again. contents int64 [n]: hashes of the whole events. arrivals int64 [n]: stamps, or
    one more, which only moves the clock. received_ms: when the request came, by which ids are remembered. keys_known:
    up to which number they have been brought to the keys that came while the cluster runs, see `Layout.added_keys`.
    keys: which alone they go to, those of the record that their home owes; None for all that are known.
    """

    source: str
    batch: pa.RecordBatch
    ids: Hashes
    contents: Ints
    ids_given: bool
    arrivals: Ints
    received_ms: int
    keys_known: int = ALL_KEYS
    keys: tuple[tuple[str, ...], ...] | None = None

    @classmethod
    def judged(
        cls,
        source: str,
        batch: pa.RecordBatch,
        arrivals: Ints,
        received_ms: int,
        keys_known: int = ALL_KEYS,
        keys: tuple[tuple[str, ...], ...] | None = None,
    ) -> Events:
        """Return events whose ids do not matter any more."""
        n = batch.num_rows
        ids, contents = np.zeros((n, 2), np.uint64), np.zeros(n, np.int64)
        return cls(source, batch, ids, contents, False, arrivals, received_ms, keys_known, keys)

    @property
    def n(self) -> int:
        return int(self.batch.num_rows)

    def with_clock(self, clock: Ints) -> Events:
        """Return all of the events, with a stamp that moves time besides; clock int64 [0 or 1]."""
        return self if len(clock) == 0 else replace(self, arrivals=np.concatenate([self.arrivals, clock]))

    def of_rows(self, rows: Ints, clock: Ints) -> Events:
        """Return some of the events; clock int64 [0 or 1]: a stamp that moves time besides."""
        batch = self.batch.slice(0, 0) if len(rows) == 0 else self.batch.take(pa.array(rows))
        return Events(
            self.source,
            batch,
            self.ids[rows],
            self.contents[rows],
            self.ids_given,
            np.concatenate([self.arrivals[rows], clock]),
            self.received_ms,
            self.keys_known,
            self.keys,
        )


@dataclass(frozen=True, slots=True)
class PastEvents:
    """n events of one source, in the order in which they became known: what a join applies while it is asked.

    batch: rows of the source's schema, or of the part of it that is needed. known int64 [n], ascending: who asks as of
    then or later sees the event. arrivals int64 [n]: stamps. routes uint32 [n]: bit t says that the event goes to the
    table at place t of `Layout.tables_of`.
    """

    batch: pa.RecordBatch
    known: Ints
    arrivals: Ints
    routes: npt.NDArray[np.uint32]


class Receipt(NamedTuple):
    """A shard's answer to events: they are in its log.

    verdicts uint8 [n]: `NEW`, `DUPLICATE`, `CONFLICT` or `FORGOTTEN` of those whose home it is, `ELSEWHERE` of the
    others.
    offset: of their record in its log, -1 if nothing had to be written. settled: the offset before which all that it is
    the home of has been applied everywhere. wait_before: what a duplicate is a duplicate of has been applied everywhere
    when all before this offset has; 0 if there is nothing to wait for. waits: whether something of an offer waits here
    to be taken.
    """

    verdicts: npt.NDArray[np.uint8]
    offset: int
    settled: int
    wait_before: int
    waits: bool
