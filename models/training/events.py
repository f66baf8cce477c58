"""The events that a training set is computed from, in the order in which they became known.

They come from the past of a cluster or from tables and files. Of each source only the fields are kept that the plan
needs, and what becomes known after the last label is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from millpond.feature_actors.clock import ClockKind
from millpond.feature_actors.decode import ARRIVAL_COLUMN, Decoder
from millpond.feature_actors.dedupe import NEW
from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.events import PastEvents
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Layout, Table
from millpond.feature_actors.log.record import EventsRecord
from millpond.feature_actors.past import Past
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.spread import is_brought
from millpond.feature_actors.view import fields_of, mask_of
from millpond.models.training.runs import Room, Runs

__all__ = ["EventsBySource", "Knowledge", "Read", "read_past", "read_tables"]

Ints = npt.NDArray[np.int64]
Routes = npt.NDArray[np.uint32]

#: When a label knows of an event: when it happened, or when it had arrived.
Knowledge = Literal["event-time", "arrival"]
#: Called with how many events have been read.
Read = Callable[[int], None]

_KNOWN, _ROUTES = "_known", "_routes"
#: Records are put together to so many events, since a record may be of one, or so many bytes.
_GATHERED_ROWS, _GATHERED_RECORDS, _GATHERED_BYTES = 131_072, 4_096, 64 << 20
#: To ask for the size of a smaller record takes longer than it is worth; their number is limited.
_SIZED_ROWS = 32
#: On a wall clock a stamp that is so near the time of receiving was not given.
_NATURAL_MS = 60_000
_ROW_OF_PATH = re.compile(r"^\$\[(\d+)\]")


class EventsBySource:
    """Events of the sources of a layout, sorted by when they became known.

    until_ms: the newest label.
    """

    def __init__(
        self,
        layout: Layout,
        knowledge: Knowledge,
        until_ms: int,
        room: Room,
    ) -> None:
        self.layout, self.knowledge = layout, knowledge
        self._until_ms = until_ms
        self._fields = {name: _fields(source, layout.tables_of(name)) for name, source in layout.sources.items()}
        own = [pa.field(_KNOWN, pa.int64()), pa.field(ARRIVAL_COLUMN, pa.int64()), pa.field(_ROUTES, pa.uint32())]
        self._runs = {
            name: Runs(pa.schema([*(source.schema.field(f) for f in self._fields[name]), *own]), _KNOWN, room)
            for name, source in layout.sources.items()
        }
        #: By source, how many events there were; each counts once, however many tables it goes to.
        self.events = dict.fromkeys(layout.sources, 0)
        #: The newest arrival stamp, or with knowledge by event time the newest event; None before the first.
        self.newest_ms: int | None = None

    @property
    def runs(self) -> list[Runs]:
        return list(self._runs.values())

    def add(self, source: Source, batch: pa.RecordBatch, arrivals: Ints, known: Ints, routes: Routes) -> None:
        """Add events of a source; known int64 [n]: when by their arrival; arrivals, routes: as of `PastEvents`."""
        if self.knowledge == "event-time":
            known = arrivals = source.times_ms(batch)
        if len(arrivals):
            newest_ms = int(arrivals.max())
            self.newest_ms = newest_ms if self.newest_ms is None else max(self.newest_ms, newest_ms)
        rows = np.flatnonzero((routes != 0) & (known <= self._until_ms))
        columns = [*batch.select(self._fields[source.name]).columns, *map(pa.array, (known, arrivals, routes))]
        runs = self._runs[source.name]
        kept = pa.RecordBatch.from_arrays(columns, schema=runs.schema)
        runs.add(kept if len(rows) == batch.num_rows else kept.take(pa.array(rows)))

    def take_until(self, bound: int | None) -> dict[str, PastEvents]:
        """Take the events that became known before `bound`, see `Runs`."""
        taken = {}
        for name, runs in self._runs.items():
            batch = runs.take_until(bound)
            known, arrivals, routes = (batch.column(own).to_numpy() for own in (_KNOWN, ARRIVAL_COLUMN, _ROUTES))
            taken[name] = PastEvents(batch.select(self._fields[name]), known, arrivals, routes)
        return taken


def _fields(source: Source, tables: list[Table]) -> list[str]:
    """Return the fields of a source that its tables need, in the order of its schema."""
    needed = {source.event_time, *(name for t in tables for name in (*t.key, *fields_of(source, t.inputs)))}
    empty = pa.RecordBatch.from_pylist([], schema=source.schema)
    for name in source.fields:
        if name not in needed and any(_reads(w, empty, name) for t in tables for w in t.wheres if w is not None):
            needed.add(name)
    return [name for name in source.fields if name in needed]


def _reads(where: pa.compute.Expression, empty: pa.RecordBatch, name: str) -> bool:
    """Return whether a condition needs a field: an expression does not say so, but fails without."""
    try:
        mask_of(where, empty.select([other for other in empty.schema.names if other != name]))
        return False
    except (pa.ArrowException, LookupError):
        return True


# -- the past of a cluster


@dataclass(slots=True)
class _Gathered:
    """Records of a source, in one schema and with the same tables, as they came.

    received: by record, when its request had been received, and when the newest request had been by then.
    """

    schema: pa.Schema
    tables: tuple[tuple[str, ...], ...]
    batches: list[pa.RecordBatch] = field(default_factory=list)
    arrivals: list[Ints] = field(default_factory=list)
    routes: list[Routes] = field(default_factory=list)
    received: list[tuple[int, int]] = field(default_factory=list)
    rows: int = 0
    size: int = 0

    def add(self, record: EventsRecord, newest_ms: int) -> None:
        self.batches.append(record.batch)
        self.arrivals.append(record.arrivals)
        self.routes.append(record.routes)
        self.received.append((record.received_ms, newest_ms))
        self.rows += record.batch.num_rows
        self.size += record.batch.nbytes if record.batch.num_rows >= _SIZED_ROWS else 0

    @property
    def full(self) -> bool:
        return self.rows >= _GATHERED_ROWS or len(self.received) >= _GATHERED_RECORDS or self.size >= _GATHERED_BYTES


def read_past(past: Past, events: EventsBySource, clock: ClockKind = "wall", told: Read = lambda n: None) -> None:
    """Add what the shards of a cluster have applied.

    clock: of the cluster. An event is known from its arrival stamp on. On a wall clock that is when it was received,
    unless it came with a stamp of its own, and what stands later in the log of a shard was not known earlier: clocks of
    those who stamp are apart, and what a shard has missed is delivered by its home when it is back.
    A table that was not declared yet when an event came gets it by its home. Raises what `Past.records` does.
    """
    read = 0
    for shard in range(past.shards):
        gathered: dict[str, _Gathered] = {}
        newest_ms = -(2**63)
        for _, record in past.records(shard):
            newest_ms = max(newest_ms, record.received_ms)
            source = events.layout.sources.get(record.source)
            if source is None or is_brought(record):
                continue
            one = gathered.get(source.name)
            if one is not None and (
                one.full or one.tables != record.tables or not one.schema.equals(record.batch.schema)
            ):
                _add_gathered(events, source, one, clock)
                told(read)
                one = None
            if one is None:
                one = gathered[source.name] = _Gathered(record.batch.schema, record.tables)
            one.add(record, newest_ms)
            read += record.batch.num_rows
        for name, rest in gathered.items():
            _add_gathered(events, events.layout.sources[name], rest, clock)
        told(read)


def _add_gathered(events: EventsBySource, source: Source, gathered: _Gathered, clock: ClockKind) -> None:
    (batch,) = pa.Table.from_batches(gathered.batches, gathered.schema).combine_chunks().to_batches()
    arrivals, taken = np.concatenate(gathered.arrivals), np.concatenate(gathered.routes)
    known = arrivals
    if clock == "wall":
        counts = [b.num_rows for b in gathered.batches]
        received, newest = np.repeat(np.array(gathered.received, np.int64), counts, axis=0).T
        known = np.where(np.abs(received - arrivals) <= _NATURAL_MS, np.maximum(newest, arrivals), arrivals)
    routes = np.zeros(len(arrivals), np.uint32)
    for place, table in enumerate(events.layout.tables_of(source.name)):
        bit = 1 + gathered.tables.index(table.key) if table.key in gathered.tables else 0
        routes |= (taken >> np.uint32(bit) & np.uint32(1)) << np.uint32(place)
    events.events[source.name] += int(np.count_nonzero(taken & np.uint32(1)))
    events.add(source, source.upgraded(batch), arrivals, known, routes)


# -- tables and files


def read_tables(given: Mapping[str, pa.Table | Path], events: EventsBySource, told: Read = lambda n: None) -> None:
    """Add events from tables, or Parquet files, in order of arrival.

    They are taken as the events app takes them: checked, defaults filled, of each event id the first one. By arrival
    each is known from its `_arrival_ms` on. Raises `BadRequest` if a column is missing or a value does not fit, such as
    a number that reads as epoch seconds.
    """
    layout, read = events.layout, 0
    admit = Shard(layout, ShardMap.even(1, 1), 0)
    for name, source in layout.sources.items():
        if name not in given:
            raise BadRequest(f"training set: no events of source `{name}`; given are {sorted(given)}")
        tables = layout.tables_of(name)
        # Whatever the clock is: of a column, who says that it is of 1970 can say so by its type.
        decoder = Decoder(source, key_fields={f for table in tables for f in table.key}, refuse_seconds=True)
        for first, piece in _pieces(given[name], source, events.knowledge):
            batch, arrivals = _decoded(decoder, piece, first, events.knowledge)
            admitted = _admitted(admit, source, batch)
            routes = np.where(admitted, np.uint32((1 << len(tables)) - 1), np.uint32(0))
            events.events[name] += int(np.count_nonzero(admitted))
            events.add(source, batch, arrivals, arrivals, routes)
            read += batch.num_rows
            told(read)


def _pieces(given: pa.Table | Path, source: Source, knowledge: Knowledge) -> Iterator[tuple[int, pa.Table]]:
    """Yield the rows of a table or a file in pieces, each with the number of its first row."""
    if isinstance(given, pa.Table):
        _check_columns(given.column_names, source, knowledge)
        for first in range(0, given.num_rows, _GATHERED_ROWS):
            yield first, given.slice(first, _GATHERED_ROWS)
        return
    first = 0
    try:
        with pq.ParquetFile(given, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            _check_columns(names, source, knowledge)
            columns = [name for name in names if name in source.fields or name == ARRIVAL_COLUMN]
            for batch in file.iter_batches(_GATHERED_ROWS, columns=columns, use_threads=False):
                yield first, pa.Table.from_batches([batch])
                first += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        text = str(error).partition("\n")[0][:300]
        raise BadRequest(
            f"training set: events of `{source.name}`: `{given}` cannot be read as Parquet: {text}"
        ) from None


def _check_columns(names: Sequence[str], source: Source, knowledge: Knowledge) -> None:
    for name, spec in source.fields.items():
        if name not in names and not spec.optional and spec.default is None:
            raise BadRequest(f"training set: events of `{source.name}` have no column `{name}`; they have {names}")
    if knowledge == "arrival" and ARRIVAL_COLUMN not in names:
        raise BadRequest(
            f"training set: events of `{source.name}` have no column `{ARRIVAL_COLUMN}`, which says when each arrived; "
            "add it, or ask by event time"
        )


def _decoded(decoder: Decoder, piece: pa.Table, first: int, knowledge: Knowledge) -> tuple[pa.RecordBatch, Ints]:
    """Return the rows of a piece as the source has them, and when each arrives; errors name the row of the whole."""
    try:
        batch = decoder.from_table(piece)
        return batch, decoder.arrivals_of(piece) if knowledge == "arrival" else decoder.source.times_ms(batch)
    except BadRequest as error:

        def whole(path: str) -> str:
            return _ROW_OF_PATH.sub(lambda match: f"$[{first + int(match[1])}]", path)

        problems = tuple((message, whole(path)) for message, path in error.problems)
        raise BadRequest(
            error.message, path=error.path and whole(error.path), code=error.code, problems=problems
        ) from None


def _admitted(admit: Shard, source: Source, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Return which events the homes of their ids let through, bool [n], whatever the keys are: the first of an id."""
    n = batch.num_rows
    if source.event_id is None or n == 0:
        return np.ones(n, np.bool_)
    ids = hash_columns([batch.column(source.event_id)], n)
    contents = hash_columns(batch.columns, n)[:, 0].view(np.int64)
    admitted: npt.NDArray[np.bool_] = admit.admit(source.name, ids, contents, 0) == NEW
    return admitted
