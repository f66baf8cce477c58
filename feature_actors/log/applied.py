"""What the records of a log say that was applied, record by record: takes are put together with their offers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.reader import LogReader
from millpond.feature_actors.log.record import EventsRecord, OfferRecord, TakeRecord

__all__ = ["applied_piece", "applied_records"]

#: A piece of a log: so many records, or events, and the record with which there are as many.
PIECE_RECORDS, _PIECE_EVENTS = 256, 1 << 15


def applied_records(
    log: Log | LogReader, first: int, end: int, open_offers: dict[int, OfferRecord]
) -> Iterator[tuple[int, EventsRecord]]:
    """Yield what the log says was new at its home here, and what was applied here, each at the offset of its record.

    open_offers: those of which nothing was taken yet; emptied and filled on the way.
    """
    for offset, (record, _) in log.read(first):
        if offset >= end:
            return
        if isinstance(record, EventsRecord):
            yield offset, record
        elif isinstance(record, OfferRecord):
            if (record.routes > 1).any():
                open_offers[offset] = record
            new = np.flatnonzero(record.routes & 1)
            if len(new):
                yield offset, _events_of(record, new, np.ones(len(new), np.uint32))
        elif isinstance(record, TakeRecord) and (offer := open_offers.pop(record.offer, None)) is not None:
            routes = offer.routes[record.rows] & ~np.uint32(1)
            if (applied := np.flatnonzero(routes)).size:
                yield offset, _events_of(offer, record.rows[applied], routes[applied])


def applied_piece(
    log: Log | LogReader, first: int, end: int, open_offers: dict[int, OfferRecord]
) -> tuple[list[tuple[int, EventsRecord]], int]:
    """Return some of the same, of a bounded size, and the offset from which it goes on."""
    some: list[tuple[int, EventsRecord]] = []
    events = 0
    for offset, record in applied_records(log, first, end, open_offers):
        some.append((offset, record))
        events += len(record.arrivals)
        if len(some) >= PIECE_RECORDS or events >= _PIECE_EVENTS:
            return some, offset + 1
    return some, end


def _events_of(record: OfferRecord, rows: npt.NDArray[np.int64], routes: npt.NDArray[np.uint32]) -> EventsRecord:
    batch = record.batch if len(rows) == record.batch.num_rows else record.batch.take(pa.array(rows))
    ids = None if record.ids is None else record.ids[rows]
    return EventsRecord(
        record.source, record.version, record.received_ms, record.tables, record.arrivals[rows], routes, batch, ids
    )
