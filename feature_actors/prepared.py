"""Prepared: what a shard has judged of a request and found for its tables, on its way by the log into the tiles.

`Shard.prepare_*` makes it; it is in memory of the process alone until its record is in the log. Then `Shard.commit`
applies it, or keeps it as an offer that waits to be taken; or `Shard.undo` forgets it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.dedupe import IdFilter
from millpond.feature_actors.events import ALL_KEYS
from millpond.feature_actors.layout import Table
from millpond.feature_actors.log.record import EventsRecord, HomeRecord, OfferRecord, TakeRecord

__all__ = ["NO_VERDICTS", "Offer", "Prepared", "Queued", "Route"]

Ints = npt.NDArray[np.int64]

NO_VERDICTS = np.empty(0, np.uint8)


@dataclass(frozen=True)
class Route:
    """What of a batch goes to one table: hashes int64 [n, 2] of all keys and their slots int64 [n], the rows that are
    of this shard, inputs float64 [fields, n], masks bool [wheres, n]."""

    table: Table
    hashes: Ints
    slots: Ints
    rows: Ints
    inputs: npt.NDArray[np.float64]
    masks: npt.NDArray[np.bool_]


@dataclass(slots=True)
class Offer:
    """Events that wait to be taken: what is to be applied of them, and what has been logged of them.

    home int64 [n]: the shard that each event's id is at home at. kept int64 [k]: which of the events are in the record.
    since_s: when it was made, as its caller measures time. offset: of its record, -1 until that is in the log.
    """

    prepared: Prepared
    home: Ints
    kept: Ints
    since_s: float
    offset: int = -1


@dataclass(slots=True, eq=False)
class Prepared:
    """What a shard has judged and remembered of a request, and will apply when it is in the log.

    record: for the log, None if there is nothing new. verdicts uint8 [n], as of `Receipt`. routes: what goes to each
    table, and which rows. heard: arrival stamps that move time, None for all: those of what is in the log, so that a
    replay hears the same. remembered: ids that were new. homes: of whose records it applies the part of this shard.
    keys_known: as of `Events`.
    """

    received_ms: int
    record: EventsRecord | OfferRecord | TakeRecord | None = None
    verdicts: npt.NDArray[np.uint8] = field(default_factory=lambda: NO_VERDICTS)
    routes: list[tuple[Route, Ints]] = field(default_factory=list)
    times: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    arrivals: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    heard: Ints | None = None
    remembered: list[tuple[IdFilter, Ints, Ints, Ints]] = field(default_factory=list)
    homes: tuple[HomeRecord, ...] = ()
    keys_known: int = ALL_KEYS
    promised_words: int = 0
    offer: tuple[bytes, Offer] | None = None

    @property
    def record_bytes(self) -> int:
        """About how large the record is."""
        if self.record is None:
            return 0
        return self.record.rows.nbytes if isinstance(self.record, TakeRecord) else self.record.batch.nbytes


@dataclass(frozen=True, slots=True)
class Queued:
    """What of a commit is for a table that is behind: of a route the rows; times, arrivals int64 [n]; base as of
    `TileStore.apply`."""

    route: Route
    rows: Ints
    times: Ints
    arrivals: Ints
    base: int
