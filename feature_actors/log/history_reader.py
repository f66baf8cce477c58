"""What reads the history: a shard its own records again, a training set the events of a source, `check` all of it."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millpond.feature_actors.errors import MillpondError
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
    parts_of,
    read_part,
    route_name,
    source_folder,
)
from millpond.feature_actors.log.record import EventsRecord
from millpond.feature_actors.source import Source

__all__ = [
    "begun_late_ms",
    "check_history",
    "is_there",
    "opened_file",
    "read_history",
    "row_group",
    "scan_history",
    "whole_from",
]

Ints = npt.NDArray[np.int64]

_NEVER = 1 << 62


def read_history(
    base_uri: str, shard: int, from_offset: int = 0, until_offset: int | None = None
) -> Iterator[tuple[int, EventsRecord]]:
    """Yield the events of a shard's log in [from_offset, until_offset), record by record, as they were written.

    until_offset: what the shard knows to be in its history (`History.done_to`), so that one which ends earlier is
    incomplete; None for what there is. It may begin later than `from_offset`: with the first part.
    What has expired is missing: single rows of a record, or all of it. Versions are as they were logged; see
    `Source.upgraded`. A few row groups are held at a time.
    Raises `HistoryUnavailable`, `HistoryDamaged`.
    """
    folder = Folder(base_uri)
    parts = parts_of(folder, shard)
    if problems := _gaps(parts, shard):
        raise HistoryDamaged(f"history: {problems[0]}; restore it from a copy")
    _check_end(folder, parts, shard, until_offset)
    expired_of: dict[str, Expired] = {}
    for part in parts:
        if part.to_offset > from_offset:
            for offset, record in _records(folder, read_part(folder, part), from_offset, expired_of):
                if until_offset is not None and offset >= until_offset:
                    return
                yield offset, record


def whole_from(folder: Folder, shard: int) -> int | None:
    """Return the offset from which on a history has all of a shard but for what has expired; None if it has nothing.
    Raises `HistoryUnavailable`, `HistoryDamaged`."""
    parts = parts_of(folder, shard)
    if not parts:
        return None
    return max([parts[0].from_offset, *(part.to_offset for part in parts if read_part(folder, part).lost)])


def begun_late_ms(base_uri: str, shard: int) -> int | None:
    """Return when the first record was received from which on a history has all of a shard; None if that is its first.
    Raises `HistoryUnavailable`, `HistoryDamaged`."""
    if not (begin := whole_from(Folder(base_uri), shard)):
        return None
    return next((record.received_ms for _, record in read_history(base_uri, shard, begin)), None)


def scan_history(
    base_uri: str,
    source: Source,
    route: Key | None = None,
    since_ms: int | None = None,
    until_ms: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the events of a source that arrived in [since_ms, until_ms), over all shards, by arrival date.

    route: None for all events of the source; a key for those that were applied to its table.
    Columns: the fields as `source` has them, then `_arrival_ms`, `_received_ms`, `_offset`. Within a date they come
    shard by shard, each in the order of its log. Raises `HistoryUnavailable`, `HistoryDamaged`.
    """
    folder = Folder(base_uri)
    whole = {of.path(file) for of in (read_part(folder, part) for part in parts_of(folder)) for file in of.files}
    gone = expired(folder, source.name)
    since, until = -_NEVER if since_ms is None else since_ms, _NEVER if until_ms is None else until_ms
    dates = folder.folders(f"{source_folder(source.name)}/route={route_name(route or HOME)}")
    days = sorted((day, path) for path in dates if (day := day_of(path)) is not None)
    for day, date in days:
        if day in gone.deleting or (day + 1) * DAY_MS <= since or day * DAY_MS >= until:
            continue
        for path in folder.files(date):
            if path not in whole:
                continue
            with opened_file(folder, path) as file:
                for number in range(file.num_row_groups):
                    batch = row_group(file, number)
                    arrivals = batch.column("_arrival_ms")
                    asked = pc.and_(pc.greater_equal(arrivals, since), pc.less(arrivals, until))
                    if not pc.all(asked).as_py():
                        batch = batch.filter(asked)
                    if len(batch):
                        yield _scanned(batch, source)


def check_history(base_uri: str, shard: int, until_offset: int | None = None) -> list[str]:
    """Return what is wrong with the history of a shard: an empty list if every byte is as it was written.

    until_offset: as in `read_history`. Reads all files once, a row group at a time. Raises `HistoryUnavailable` if the
    base cannot be read.
    """
    folder = Folder(base_uri)
    parts = parts_of(folder, shard)
    problems = _gaps(parts, shard)
    try:
        _check_end(folder, parts, shard, until_offset)
    except MillpondError as error:
        problems.append(str(error))
    known: set[str] = set()
    expired_of: dict[str, Expired] = {}
    for named in parts:
        try:
            part = read_part(folder, named)
        except HistoryDamaged as error:
            problems.append(str(error))
            continue
        for file in part.files:
            known.add(part.path(file))
            try:
                if is_there(folder, part, file, expired_of):
                    _check_file(folder, part, file)
            except HistoryDamaged as error:
                problems.append(str(error))
    end = parts[-1].to_offset if parts else 0  # what lies after it may be of a part that is being written
    for path in folder.files(recursive=True):
        named_part = part_of(path) if path.endswith(".parquet") and path not in known else None
        if named_part is not None and named_part.shard == shard and named_part.from_offset < end:
            problems.append(f"`{path}` is of no part, nothing reads it")
    return problems


# -- parts


def _gaps(parts: Sequence[Part], shard: int) -> list[str]:
    problems = []
    for one, other in itertools.pairwise(parts):
        if other.from_offset < one.to_offset:
            problems.append(f"`{one.marker}` and `{other.marker}` overlap")
        elif other.from_offset > one.to_offset:
            problems.append(f"shard {shard} has no part of offsets {one.to_offset} to {other.from_offset}")
    return problems


def _check_end(folder: Folder, parts: Sequence[Part], shard: int, until_offset: int | None) -> None:
    end = parts[-1].to_offset if parts else 0
    if until_offset is not None and end < until_offset:
        if not parts:
            raise HistoryUnavailable(
                f"history: `{folder.name}` holds nothing of shard {shard}, which has written up to offset "
                f"{until_offset}; see that it is the right place, and mounted"
            )
        raise HistoryDamaged(
            f"history: shard {shard} has written up to offset {until_offset}, `{folder.name}` ends at {end}; restore "
            "it from a copy"
        )


def is_there(folder: Folder, part: Part, file: PartFile, expired_of: dict[str, Expired]) -> bool:
    """Return whether a file is to be read: not if it has expired. Raises `HistoryDamaged` if it is missing, or not
    what was written."""
    if file.source not in expired_of:
        expired_of[file.source] = expired(folder, file.source)
    gone = expired_of[file.source]
    if file.day in gone.deleting:
        return False
    path = part.path(file)
    if folder.exists(path):
        if folder.checksum(path) != (file.bytes, file.crc32):
            raise HistoryDamaged(f"history: `{path}` fails its checksum; restore it from a copy")
        return True
    if file.day < gone.before_day:
        return False
    if any(part.range == now.range and part.revision < now.revision for now in parts_of(folder, part.shard)):
        raise HistoryUnavailable(
            f"history: `{part.marker}` has just been rewritten, for an entity is being forgotten; read it again",
            retry_after_ms=1_000,
        )
    raise HistoryDamaged(f"history: `{path}` is missing; restore it from a copy")


# -- files


@contextmanager
def opened_file(folder: Folder, path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of the history, and say so if what is done with it shows that it is none."""
    try:
        with folder.open(path) as content, pq.ParquetFile(content, page_checksum_verification=True) as opened:
            if not pa.schema(list(opened.schema_arrow)[-len(OWN_COLUMNS) :]).equals(OWN_COLUMNS):
                raise HistoryDamaged(f"history: `{path}` is no file of a history: its columns are others; remove it")
            yield opened
    except (OSError, pa.ArrowException) as error:
        folder.checksum(path)  # where not even its bytes can be had it is unavailable, not damaged
        text = str(error).partition("\n")[0][:300]
        raise HistoryDamaged(f"history: `{path}` cannot be read: {text}; restore it from a copy") from None


def row_group(file: pq.ParquetFile, number: int) -> pa.RecordBatch:
    table = file.read_row_group(number, use_threads=False)
    # Parquet numbers the fields, in metadata that the schema of a source does not have.
    schema = pa.schema([field.remove_metadata() for field in table.schema])
    (batch,) = table.cast(schema).combine_chunks().to_batches()
    return batch


def _ints(batch: pa.RecordBatch, name: str) -> Ints:
    values: Ints = batch.column(name).to_numpy()
    return values


def _scanned(batch: pa.RecordBatch, source: Source) -> pa.RecordBatch:
    fields = source.upgraded(batch.select(batch.schema.names[: -len(OWN_COLUMNS)]))
    own = ["_arrival_ms", "_received_ms", "_offset"]
    schema = pa.schema([*fields.schema, *(OWN_COLUMNS.field(name) for name in own)])
    return pa.RecordBatch.from_arrays([*fields.columns, *(batch.column(name) for name in own)], schema=schema)


def _check_file(folder: Folder, part: Part, file: PartFile) -> None:
    path = part.path(file)
    last, n = (-1, -1), 0
    with opened_file(folder, path) as opened:
        for number in range(opened.num_row_groups):
            batch = row_group(opened, number)
            offsets, rows, days = _ints(batch, "_offset"), _ints(batch, "_row"), _ints(batch, "_arrival_ms") // DAY_MS
            steps = np.diff(offsets)
            ascending = ((steps > 0) | ((steps == 0) & (np.diff(rows) > 0))).all()
            if not (ascending and last < (offsets[0], rows[0])):
                raise HistoryDamaged(f"history: `{path}` is not in the order of the log; restore it from a copy")
            if not (part.from_offset <= offsets[0] and offsets[-1] < part.to_offset and (days == file.day).all()):
                raise HistoryDamaged(f"history: `{path}` holds what its name does not say; restore it from a copy")
            last, n = (offsets[-1], rows[-1]), n + len(rows)
    if n != file.rows:
        raise HistoryDamaged(f"history: `{path}` has {n} rows, {file.rows} were written; restore it from a copy")


# -- records: row groups merged by offset


@dataclass(frozen=True)
class _Rows:
    """Rows of one file, in the order of the log."""

    file: PartFile
    batch: pa.RecordBatch
    offsets: Ints

    def cut(self, upto: int) -> tuple[_Rows, _Rows]:
        """Return the rows before an offset, and the others."""
        at = int(np.searchsorted(self.offsets, upto))
        return (
            _Rows(self.file, self.batch.slice(0, at), self.offsets[:at]),
            _Rows(self.file, self.batch.slice(at), self.offsets[at:]),
        )


def _records(
    folder: Folder, part: Part, from_offset: int, expired_of: dict[str, Expired]
) -> Iterator[tuple[int, EventsRecord]]:
    """Yield the records of a part.

    1. the row groups of all files, each compared with its checksum, by their first offset, which the files' ends say
    2. read the next one; what lies before the one after it is complete
    3. put the rows of an offset together, and the routes that they came by
    """
    groups = []
    for file in part.files:
        if is_there(folder, part, file, expired_of):
            path = part.path(file)
            with opened_file(folder, path) as opened:
                for number in range(opened.num_row_groups):
                    first, last = _bounds(opened, number)
                    if last >= from_offset:
                        groups.append((first, path, number, file))
    groups.sort(key=lambda group: group[:3])
    waiting: list[_Rows] = []
    for group, after in itertools.zip_longest(groups, groups[1:]):
        _, path, number, file = group
        with opened_file(folder, path) as opened:
            batch = row_group(opened, number)
        waiting.append(_Rows(file, batch, _ints(batch, "_offset")).cut(from_offset)[1])
        upto = _NEVER if after is None else after[0]
        complete: dict[tuple[str, int], list[_Rows]] = {}
        rest = []
        for rows in waiting:
            before, later = rows.cut(upto)
            if len(before.offsets):
                complete.setdefault((rows.file.source, rows.file.number), []).append(before)
            if len(later.offsets):
                rest.append(later)
        waiting = rest
        yield from heapq.merge(*(_merged(part, rows) for rows in complete.values()), key=lambda record: record[0])


def _bounds(file: pq.ParquetFile, number: int) -> tuple[int, int]:
    """Return the first and the last offset of a row group."""
    column = file.schema_arrow.names.index("_offset")
    statistics = file.metadata.row_group(number).column(column).statistics
    if statistics is None or not statistics.has_min_max:
        raise pa.ArrowInvalid("it does not say its offsets")
    return statistics.min, statistics.max


def _merged(part: Part, parts: Sequence[_Rows]) -> Iterator[tuple[int, EventsRecord]]:
    """Yield the records that rows of the files of one stream, one source in one schema, make up."""
    file = parts[0].file
    tables = part.tables[file.source]
    begins = [begin for begin, _ in tables]
    offsets = np.concatenate([rows.offsets for rows in parts])
    numbers = np.concatenate([_ints(rows.batch, "_row") for rows in parts])
    bits = np.concatenate([_bits(rows, tables) for rows in parts])
    batch = pa.Table.from_batches([rows.batch for rows in parts]).combine_chunks().to_batches()[0]
    if len(parts) > 1:
        order = np.lexsort((numbers, offsets))
        offsets, numbers, bits = offsets[order], numbers[order], bits[order]
        first = np.flatnonzero(np.diff(offsets, prepend=-1) | np.diff(numbers, prepend=-1))
        offsets, bits = offsets[first], np.bitwise_or.reduceat(bits, first)
        batch = batch.take(pa.array(order[first]))
    fields = batch.select(batch.schema.names[: -len(OWN_COLUMNS)])
    arrivals, received = _ints(batch, "_arrival_ms"), _ints(batch, "_received_ms")
    ends = [*(np.flatnonzero(np.diff(offsets)) + 1).tolist(), len(offsets)]
    for begin, end in itertools.pairwise([0, *ends]):
        offset = int(offsets[begin])
        yield (
            offset,
            EventsRecord(
                source=file.source,
                version=file.version,
                received_ms=int(received[begin]),
                tables=tables[bisect_right(begins, offset) - 1][1],
                arrivals=arrivals[begin:end],
                routes=bits[begin:end],
                batch=fields.slice(begin, end - begin),
            ),
        )


def _bits(rows: _Rows, tables: Sequence[tuple[int, tuple[Key, ...]]]) -> npt.NDArray[np.uint32]:
    """Return the bit of the route that rows came by, in the numbering of their records' tables, uint32 [n]."""
    bits = np.ones(len(rows.offsets), np.uint32)
    if rows.file.route != HOME:
        begins = np.searchsorted(rows.offsets, [begin for begin, _ in tables])
        for (_, keys), begin, end in zip(tables, begins, [*begins[1:], len(bits)], strict=True):
            if begin < end:
                bits[begin:end] = 2 << keys.index(rows.file.route)
    return bits
