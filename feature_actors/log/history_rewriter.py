"""The history of a shard rewritten so that events show tokens for what has been forgotten, and only for that.

A part becomes a part of the next revision, in these steps; after a crash at any of them the call is made again:

    1. sweep     what no marker names goes: of attempts at a part, of revisions that were replaced
    2. files     those that have something forgotten are written anew, under the name of the next revision; of a route
                 that has the forgotten field in its key such rows are left out
    3. marker    of the next revision: from now on readers go by it; the files without any of it stay as they are
    4. sweep     again, with the files and markers that have been replaced
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millpond.feature_actors.erasure import Erasure
from millpond.feature_actors.log.folder import Folder
from millpond.feature_actors.log.history import parquet_options
from millpond.feature_actors.log.history_reader import is_there, opened_file, row_group
from millpond.feature_actors.log.part import (
    OWN_COLUMNS,
    Expired,
    Part,
    PartFile,
    part_of,
    parts_of,
    read_part,
    write_part,
)

__all__ = ["rewrite_history"]


def rewrite_history(base_uri: str, shard: int, erasure: Erasure, scratch: Path) -> int:
    """Rewrite the history of a shard; return how many rows were. No part of it is written meanwhile.

    scratch: a local folder for files without names. Raises `HistoryUnavailable`, `HistoryDamaged`: call it again then.
    """
    folder = Folder(base_uri)
    _sweep(folder, shard)
    rows = 0
    for named in parts_of(folder, shard):
        rows += _rewrite(folder, read_part(folder, named), erasure, scratch)
    if rows:
        _sweep(folder, shard)
    return rows


def _rewrite(folder: Folder, part: Part, erasure: Erasure, scratch: Path) -> int:
    expired_of: dict[str, Expired] = {}
    revision, rows = part.revision + 1, 0
    files: list[PartFile] = []
    for file in part.files:
        if not is_there(folder, part, file, expired_of) or not (found := _forgotten_rows(folder, part, file, erasure)):
            files.append(file)
            continue
        rows += found
        with tempfile.TemporaryFile(dir=scratch) as content:
            kept = _write(folder, part, file, erasure, content)
            if not kept:
                continue
            content.seek(0)
            new = msgspec.structs.replace(file, rows=kept, revision=revision)
            size, crc = folder.write(part.path(new), content, f"r{revision}")
        files.append(msgspec.structs.replace(new, bytes=size, crc32=crc))
    if rows:
        write_part(folder, msgspec.structs.replace(part, files=tuple(files), revision=revision), f"r{revision}")
    return rows


def _forgotten_rows(folder: Folder, part: Part, file: PartFile, erasure: Erasure) -> int:
    rows = 0
    with opened_file(folder, part.path(file)) as opened:
        wanted = [name for name in opened.schema_arrow.names if name in erasure.looks_at(file.source)]
        for number in range(opened.num_row_groups):
            table = opened.read_row_group(number, [*wanted, "_arrival_ms"], use_threads=False).combine_chunks()
            for batch in table.to_batches():
                found = erasure.forgotten(file.source, batch, batch.column("_arrival_ms").to_numpy())
                rows += sum(int(np.count_nonzero(one.rows)) for one in found)
    return rows


def _write(folder: Folder, part: Part, file: PartFile, erasure: Erasure, content: object) -> int:
    """Write the other file; return how many rows it has."""
    kept = 0
    with opened_file(folder, part.path(file)) as opened:
        schema = row_group(opened, 0).schema
        with pq.ParquetWriter(content, schema, **parquet_options(schema)) as writer:
            for number in range(opened.num_row_groups):
                batch = _erased(row_group(opened, number), file, erasure)
                if batch.num_rows:
                    writer.write_table(pa.Table.from_batches([batch]), row_group_size=batch.num_rows)
                kept += batch.num_rows
    return kept


def _erased(batch: pa.RecordBatch, file: PartFile, erasure: Erasure) -> pa.RecordBatch:
    own = len(OWN_COLUMNS)
    fields = batch.select(batch.schema.names[:-own])
    forgotten = erasure.forgotten(file.source, fields, batch.column("_arrival_ms").to_numpy())
    columns = [*erasure.batch(file.source, fields, forgotten).columns, *batch.columns[-own:]]
    kept = np.ones(batch.num_rows, np.bool_)
    for one in forgotten:
        if one.tombstone.field in file.route:
            kept &= ~one.rows
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema).filter(pa.array(kept))


def _sweep(folder: Folder, shard: int) -> None:
    """Remove the files of a shard that no marker names, and markers and files of revisions that were replaced."""
    markers = parts_of(folder, shard)
    own = {part.marker for part in markers}
    own |= {read_part(folder, part).path(file) for part in markers for file in read_part(folder, part).files}
    for path in folder.files(recursive=True):
        named = part_of(path)
        if path.rpartition("/")[2].startswith(f".{shard:03d}-") or (
            named is not None and named.shard == shard and path not in own
        ):
            folder.delete(path)
