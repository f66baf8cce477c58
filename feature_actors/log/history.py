"""History: closed parts of a shard's log as Parquet files, for training sets, replays and new features.

A part is written in these steps, and after a crash at any of them it is written again, with the same names:

    1. plan     `history.json` in the shard's folder says which offsets, and under which names
    2. split    records are gathered and split by source, schema, route and arrival date, into an unnamed local file
    3. files    one Parquet file for each, each there as a whole or not
    4. marker   says that the part is whole: readers go by it
    5. done     `history.json` says how far the history goes: so far the log may be cut

Nothing but Arrow and files: no thread, no clock. `write_part` may run in a thread of its own: Arrow, zlib and the disk
work without the interpreter's lock, and what is left for a record is to append it to some lists.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from millpond.feature_actors.log.folder import Folder, HistoryUnavailable
from millpond.feature_actors.log.part import (
    DAY_MS,
    HOME,
    OWN_COLUMNS,
    Expired,
    HistoryDamaged,
    Key,
    Part,
    PartFile,
    day_of,
    expired,
    part_of,
    source_folder,
    write_expired,
    write_part,
)
from millpond.feature_actors.log.record import EventsRecord, Record
from millpond.feature_actors.manifest import write_json
from millpond.feature_actors.source import Source

__all__ = [
    "HISTORY_PART_BYTES",
    "History",
    "HistoryDamaged",
    "HistoryUnavailable",
    "delete_expired",
    "parquet_options",
]

#: So much of the log makes a part: see FORMAT.md for what that is in Parquet.
HISTORY_PART_BYTES = 1 << 30

#: A row group holds so much at most, or one chunk.
_GROUP_ROWS, _GROUP_BYTES = 1 << 18, 32 << 20
#: So much is gathered before it is split, which takes some four times as much; a record counts as some KB beside its
#: bytes, for what each of its arrays costs.
_GATHERED_BYTES, _RECORD_BYTES = 4 << 20, 2 << 10
#: Bytes of a row in `OWN_COLUMNS` and its routes.
_ROW_BYTES = 36


class _Progress(msgspec.Struct, frozen=True):
    """`history.json`. from_offset and to_offset: the part that was planned last, which is done if done_to says so."""

    epoch: int
    from_offset: int
    to_offset: int
    done_to: int


class History:
    """The history of one shard: what writes it.

    base_uri: a folder of this cluster alone, on any filesystem of `pyarrow.fs`, or a local path; None for no history.
    shard_dir: the shard's local folder. epoch: how often the shard was opened.
    Raises `HistoryDamaged` if `history.json` is not what was written. The base is not touched before the first part.
    """

    def __init__(self, base_uri: str | None, shard: int, shard_dir: Path, epoch: int) -> None:
        self._base_uri, self._shard, self._shard_dir, self._epoch = base_uri, shard, shard_dir, epoch
        self._folder: Folder | None = None
        self._path = shard_dir / "history.json"
        self._progress = _Progress(epoch, 0, 0, 0)
        if self._path.exists():
            try:
                self._progress = msgspec.json.decode(self._path.read_bytes(), type=_Progress)
            except (OSError, msgspec.DecodeError) as error:
                raise HistoryDamaged(
                    f"history: `{self._path}` cannot be read: {error}; restore it from a copy"
                ) from None

    @property
    def done_to(self) -> int:
        """The offset up to which all records are in the history, synced."""
        return self._progress.done_to

    @property
    def planned_to(self) -> int | None:
        """Where the part ends that was begun and is not done, None if there is none."""
        return self._progress.to_offset if self._progress.to_offset > self.done_to else None

    def write_part(self, to_offset: int, records: Iterable[tuple[int, Record]]) -> Part | None:
        """Write the records from `done_to` up to an offset as a part, move `done_to` there, return what was written.

        A part that was begun before is finished instead, up to where it was planned to go: `done_to` says where.
        records: with their offsets, in order, from `done_to` or before it; those of events are taken. More are not read
        than the part has, which must all be there.
        Returns None if there is nothing to write or no history. Raises `HistoryUnavailable`: call it again then.
        """
        again = self.planned_to is not None
        if not again:
            if to_offset <= self.done_to:
                return None
            self._save(_Progress(self._epoch, self.done_to, to_offset, self.done_to))
        plan = self._progress
        part = None
        if self._base_uri is not None:
            part = self._write(Part(self._shard, plan.epoch, plan.from_offset, plan.to_offset), records, again)
        self._save(msgspec.structs.replace(plan, done_to=plan.to_offset))
        return part

    def skip_to(self, offset: int) -> None:
        """Have what is before an offset, and not in the history yet, as lost: it had left the log while there was no
        history. A part that was begun and lacks some of it is given up. Raises `HistoryUnavailable`."""
        if self._base_uri is None or offset <= self.done_to:
            return
        folder = self._folder = self._folder or Folder(self._base_uri)
        if self.planned_to is not None:
            plan = self._progress
            begun = Part(self._shard, plan.epoch, plan.from_offset, plan.to_offset)
            if folder.exists(begun.marker):
                self._save(msgspec.structs.replace(plan, done_to=plan.to_offset))
            else:
                _sweep(folder, begun)
        if (begin := self.done_to) < offset:
            self._save(_Progress(self._epoch, begin, offset, begin))
            write_part(folder, Part(self._shard, self._epoch, begin, offset, lost=True), str(self._epoch))
            self._save(_Progress(self._epoch, begin, offset, offset))

    # -- steps

    def _write(self, part: Part, records: Iterable[tuple[int, Record]], again: bool) -> Part:
        folder = self._folder = self._folder or Folder(self._base_uri or "")
        files: list[PartFile] = []
        try:
            with tempfile.TemporaryFile(dir=self._shard_dir) as spool:
                split = _Split(spool)
                for offset, record in records:
                    if offset >= part.to_offset:
                        break
                    if offset >= part.from_offset and isinstance(record, EventsRecord):
                        split.add(offset, record)
                split.flush()
                for file in split.files():
                    with tempfile.TemporaryFile(dir=self._shard_dir) as content:
                        split.write(file, content)
                        content.seek(0)
                        size, crc = folder.write(part.path(file), content, str(self._epoch))
                    files.append(msgspec.structs.replace(file, bytes=size, crc32=crc))
        except OSError as error:
            raise HistoryUnavailable(
                f"history: no part can be prepared in `{self._shard_dir}`: {error.strerror or error}; free some room",
                retry_after_ms=10_000,
            ) from None
        part = msgspec.structs.replace(part, files=tuple(files), tables=split.tables)
        if again:
            _sweep(folder, part)
        write_part(folder, part, str(self._epoch))
        return part

    def _save(self, progress: _Progress) -> None:
        try:
            write_json(self._path, msgspec.to_builtins(progress))
        except OSError as error:
            raise HistoryUnavailable(
                f"history: `{self._path}` cannot be written: {error.strerror or error}; free some room",
                retry_after_ms=10_000,
            ) from None
        self._progress = progress


def _sweep(folder: Folder, part: Part) -> None:
    """Remove what attempts at a part have left: their temporaries, and files of the part that it does not have."""
    own = {part.path(file) for file in part.files}
    for path in folder.files(recursive=True):
        of = part_of(path) if path.endswith(".parquet") and path not in own else None
        if path.rpartition("/")[2].startswith(f".{part.shard:03d}-") or (of is not None and of.stem == part.stem):
            folder.delete(path)


@dataclass(slots=True)
class _Gathered:
    """Records of a source in one schema, as they came, until they are split."""

    schema: pa.Schema
    version: int
    number: int
    batches: list[pa.RecordBatch] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    arrivals: list[npt.NDArray[np.int64]] = field(default_factory=list)
    routes: list[npt.NDArray[np.uint32]] = field(default_factory=list)


@dataclass(slots=True)
class _Chunk:
    """Rows of a file to be, at a place in the spool."""

    at: int
    length: int
    rows: int
    bytes: int


class _Split:
    """Records split into what each file gets, which waits in `spool`: files are made one after the other, so that it
    costs neither memory nor open files when there are many of them, as when the events of years are loaded."""

    def __init__(self, spool: BinaryIO) -> None:
        self._spool = spool
        self._sources: dict[str, list[_Gathered]] = {}
        self._chunks: dict[tuple[str, int, Key, int], list[_Chunk]] = {}
        self._bytes = 0
        #: By source, from which offset on a record had which keys of tables.
        self.tables: dict[str, tuple[tuple[int, tuple[Key, ...]], ...]] = {}

    def add(self, offset: int, record: EventsRecord) -> None:
        streams = self._sources.setdefault(record.source, [])
        of_tables = self.tables.get(record.source, ())
        if not of_tables or of_tables[-1][1] != record.tables:
            self.flush()
            self.tables[record.source] = (*of_tables, (offset, record.tables))
        schema, version = record.batch.schema, record.version
        size = record.batch.nbytes + _ROW_BYTES * record.batch.num_rows + _RECORD_BYTES
        if self._bytes and self._bytes + size > _GATHERED_BYTES:
            self.flush()
        stream = next((s for s in streams if s.version == version and s.schema.equals(schema)), None)
        if stream is None:
            streams.append(stream := _Gathered(schema, version, len(streams)))
        stream.batches.append(record.batch)
        stream.offsets.append(offset)
        stream.received.append(record.received_ms)
        stream.arrivals.append(record.arrivals)
        stream.routes.append(record.routes)
        self._bytes += size

    def flush(self) -> None:
        """Split what is gathered."""
        for source, streams in self._sources.items():
            for stream in streams:
                if stream.batches:
                    self._flush(source, stream)
        self._bytes = 0

    def files(self) -> list[PartFile]:
        """Return the files to write, without their lengths and checksums."""
        return [
            PartFile(
                source, self._sources[source][number].version, number, route, day, sum(c.rows for c in chunks), 0, 0
            )
            for (source, number, route, day), chunks in sorted(self._chunks.items(), key=lambda item: item[0])
        ]

    def write(self, file: PartFile, content: BinaryIO) -> None:
        """Write the Parquet file of some rows."""
        schema = _schema(self._sources[file.source][file.number].schema)
        with pq.ParquetWriter(content, schema, **parquet_options(schema)) as writer:
            for group in _groups(self._chunks[file.source, file.number, file.route, file.day]):
                table = pa.concat_tables(map(self._read, group))
                writer.write_table(table, row_group_size=table.num_rows)
                del table  # else it would be there still while the next is read

    def _flush(self, source: str, stream: _Gathered) -> None:
        """Split what is gathered of a stream by route and arrival date."""
        counts = np.array([batch.num_rows for batch in stream.batches])
        arrivals, routes = np.concatenate(stream.arrivals), np.concatenate(stream.routes)
        n, days = len(arrivals), arrivals // DAY_MS
        columns = [
            np.repeat(np.array(stream.offsets, np.int64), counts),
            (np.arange(n) - np.repeat(counts.cumsum() - counts, counts)).astype(np.int32),
            arrivals,
            np.repeat(np.array(stream.received, np.int64), counts),
            np.full(n, stream.version, np.int32),
        ]
        fields = pa.Table.from_batches(stream.batches, stream.schema).combine_chunks().columns
        stream.batches.clear()
        table = pa.Table.from_arrays([*fields, *map(pa.array, columns)], schema=_schema(stream.schema))
        for bit, route in enumerate((HOME, *self.tables[source][-1][1])):
            rows = np.flatnonzero(routes >> np.uint32(bit) & np.uint32(1))
            rows = rows[np.argsort(days[rows], kind="stable")]
            ends = [*(np.flatnonzero(np.diff(days[rows])) + 1), len(rows)] if len(rows) else []
            for begin, end in itertools.pairwise([0, *ends]):
                of_day = rows[begin:end]
                chunk = self._write(table if len(of_day) == n else table.take(pa.array(of_day)))
                self._chunks.setdefault((source, stream.number, route, int(days[of_day[0]])), []).append(chunk)
        for gathered in (stream.batches, stream.offsets, stream.received, stream.arrivals, stream.routes):
            gathered.clear()

    def _write(self, table: pa.Table) -> _Chunk:
        at = self._spool.tell()
        with pa.ipc.new_stream(self._spool, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_table(table)
        return _Chunk(at, self._spool.tell() - at, table.num_rows, table.nbytes)

    def _read(self, chunk: _Chunk) -> pa.Table:
        self._spool.seek(chunk.at)
        return pa.ipc.open_stream(self._spool.read(chunk.length)).read_all()


def _schema(of_source: pa.Schema) -> pa.Schema:
    return pa.schema([*of_source, *OWN_COLUMNS])


def _groups(chunks: Sequence[_Chunk]) -> Iterable[list[_Chunk]]:
    """Put chunks together to row groups."""
    group: list[_Chunk] = []
    rows = size = 0
    for chunk in chunks:
        rows, size = rows + chunk.rows, size + chunk.bytes
        if group and (rows > _GROUP_ROWS or size > _GROUP_BYTES):
            yield group
            group, rows, size = [], chunk.rows, chunk.bytes
        group.append(chunk)
    yield group


def parquet_options(schema: pa.Schema) -> dict[str, object]:
    """Return how the columns of a file are written. Times and offsets go by differences: a third smaller than by
    dictionary, and twice as fast; level 1 of zstd is as small as 6 after that."""
    by_difference = {f.name for f in schema if pa.types.is_timestamp(f.type)} | set(OWN_COLUMNS.names)
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [name for name in schema.names if name not in by_difference],
        "column_encoding": dict.fromkeys(by_difference, "DELTA_BINARY_PACKED"),
        "write_page_checksum": True,
    }


def delete_expired(base_uri: str, sources: Iterable[Source], now_ms: int) -> list[str]:
    """Delete the dates of sources that lie wholly before now less their retention; return the folders deleted.

    now_ms: with `clock = "event"` the newest arrival stamp. What is about to go is written down first, and no reader
    reads it from then on: nothing is seen half-expired, and the next call goes on after a crash. One caller at a time.
    Raises `HistoryUnavailable`, `HistoryDamaged`.
    """
    folder = Folder(base_uri)
    deleted = []
    for source in sources:
        if source.retention_ms is None:
            continue
        before = (now_ms - source.retention_ms) // DAY_MS
        known = expired(folder, source.name)
        dates: dict[int, list[str]] = {}
        for route in folder.folders(source_folder(source.name)):
            for path in folder.folders(route):
                if (day := day_of(path)) is not None and (day < before or day in known.deleting):
                    dates.setdefault(day, []).append(path)
        if not dates and not known.deleting:
            continue
        until = max(known.before_day, before)
        write_expired(folder, source.name, Expired(until, tuple(sorted({*dates, *known.deleting}))))
        for path in itertools.chain.from_iterable(dates[day] for day in sorted(dates)):
            folder.delete(path)
            deleted.append(path)
        write_expired(folder, source.name, Expired(until))
    return deleted
