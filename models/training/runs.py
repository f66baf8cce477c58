"""Rows in the order of one of their columns, however many: sorted in parts that fit into memory, merged when read.

A part is a run of blocks. All runs but the last lie in one file without a name, which is gone with this process; what
fits into one run touches no disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["Room", "Runs", "bounds"]

Ints = npt.NDArray[np.int64]

_CODEC = "lz4"


@dataclass(frozen=True)
class Room:
    """How much is in memory at once, and where the rest lies; what is computed does not depend on it.

    run_rows, run_bytes: so much is sorted, then written. block_rows: of each run that overlaps others so much is read
    at once. piece_rows, piece_bytes: so much is taken of everything together, about.
    folder: where the files without a name lie; by default where the system keeps such.
    """

    run_rows: int = 262_144
    run_bytes: int = 64 << 20
    block_rows: int = 4_096
    piece_rows: int = 131_072
    piece_bytes: int = 32 << 20
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a run. first: the value of the first one. size: of the block in memory, in bytes. where: the rows, or
    place and length in the file."""

    first: int
    rows: int
    size: int
    where: pa.RecordBatch | tuple[int, int]


@dataclass(slots=True)
class _Run:
    """next: the block that is read next. rest: rows that have been read and not taken."""

    blocks: list[_Block]
    next: int = 0
    rest: pa.RecordBatch | None = None


class Runs:
    """Rows of a schema, ascending by the int64 column `by`; those of one value in the order in which they were added.

    First everything is added, then everything is taken; after `rewind` it is taken once more.
    """

    def __init__(self, schema: pa.Schema, by: str, room: Room) -> None:
        self.schema = schema
        self.rows = 0
        self._by, self._room = by, room
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_rows = self._waiting_bytes = 0
        self._runs: list[_Run] = []
        self._file: BinaryIO | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Add rows, in any order."""
        if not batch.num_rows:
            return
        if self._waiting and (
            self._waiting_rows + batch.num_rows > self._room.run_rows
            or self._waiting_bytes + batch.nbytes > self._room.run_bytes
        ):
            self._end_run(spill=True)
        self._waiting.append(batch)
        self._waiting_rows += batch.num_rows
        self._waiting_bytes += batch.nbytes
        self.rows += batch.num_rows

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield the first value of each block, its rows, and its bytes. Nothing is added after that."""
        self._end_run(spill=False)
        for run in self._runs:
            for block in run.blocks:
                yield block.first, block.rows, block.size

    def rewind(self) -> None:
        """Begin to take from the first row on."""
        for run in self._runs:
            run.next, run.rest = 0, None

    def take_until(self, bound: int | None) -> pa.RecordBatch:
        """Take the rows below `bound` that have not been taken, or all if it is None."""
        self._end_run(spill=False)
        taken: list[pa.RecordBatch] = []
        runs = 0
        for run in self._runs:
            before = len(taken)
            while True:
                rest = run.rest
                if rest is not None:
                    at = rest.num_rows if bound is None else int(np.searchsorted(self._values(rest), bound))
                    if at:
                        taken.append(rest.slice(0, at))
                    if at < rest.num_rows:
                        run.rest = rest.slice(at)
                        break
                    run.rest = None
                if run.next == len(run.blocks) or (bound is not None and run.blocks[run.next].first >= bound):
                    break
                run.rest = self._read(run.blocks[run.next])
                run.next += 1
            runs += len(taken) > before
        batch = _one(taken, self.schema)
        return self._sorted(batch) if runs > 1 else batch

    # -- steps

    def _values(self, batch: pa.RecordBatch) -> Ints:
        values: Ints = batch.column(self._by).to_numpy()
        return values

    def _sorted(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        values = self._values(batch)
        if (np.diff(values) >= 0).all():
            return batch
        return batch.take(pa.array(np.argsort(values, kind="stable")))

    def _end_run(self, *, spill: bool) -> None:
        if not self._waiting:
            return
        batch = self._sorted(_one(self._waiting, self.schema))
        self._waiting, self._waiting_rows, self._waiting_bytes = [], 0, 0
        values, blocks = self._values(batch), []
        for at in range(0, batch.num_rows, self._room.block_rows):
            rows = batch.slice(at, self._room.block_rows)
            where = self._write(rows) if spill else rows
            blocks.append(_Block(int(values[at]), rows.num_rows, rows.nbytes, where))
        self._runs.append(_Run(blocks))

    def _write(self, batch: pa.RecordBatch) -> tuple[int, int]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._room.folder)  # noqa: SIM115  closed when it is let go of
        content = pa.BufferOutputStream()
        with pa.ipc.new_stream(content, batch.schema, options=pa.ipc.IpcWriteOptions(compression=_CODEC)) as writer:
            writer.write_batch(batch)
        at = self._file.tell()
        return at, self._file.write(content.getvalue())

    def _read(self, block: _Block) -> pa.RecordBatch:
        if not isinstance(block.where, tuple):
            return block.where
        assert self._file is not None
        at, length = block.where
        self._file.seek(at)
        return pa.ipc.open_stream(self._file.read(length)).read_next_batch()


def bounds(of: Iterable[Runs], room: Room) -> Iterator[int | None]:
    """Yield values up to which `Runs` are taken together, so that each time a piece is; the last is None.

    Rows of one value are never parted.
    """
    blocks = sorted(block for runs in of for block in runs.blocks())
    had_rows = had_size = 0
    for first, block_rows, block_size in blocks:
        if had_rows >= room.piece_rows or had_size >= room.piece_bytes:
            yield first
            had_rows = had_size = 0
        had_rows, had_size = had_rows + block_rows, had_size + block_size
    yield None


def _one(batches: list[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    table = pa.Table.from_batches(batches, schema).combine_chunks()
    (batch,) = table.to_batches() or [_empty(schema)]
    return batch


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
