"""Read an Arrow IPC stream that came from outside: within its limits and whole, or not at all.

Promises: nothing of a stream is read, or costs memory, before its messages' metadata say that it is within the limits,
and nothing of a batch is touched before it is validated. Does not: judge whether its columns are those that are wanted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["ArrowStream", "StreamLimits"]

#: The two spellings of the end of a stream.
_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")


class StreamLimits(Protocol):
    """What one stream may hold: rows, record batches and dictionaries, bytes when decoded."""

    @property
    def rows_max(self) -> int: ...

    @property
    def batches_max(self) -> int: ...

    @property
    def arrow_bytes_max(self) -> int: ...


class ArrowStream:
    """A stream whose messages are within the limits.

    rows_are: what its rows are called, such as "events".
    too_large: called with the name of the limit that is exceeded, and with what there is; raises.

    Raises what PyArrow does, `ValueError` or `struct.error` if it is no stream that can be read.
    """

    def __init__(
        self, body: bytes, limits: StreamLimits, rows_are: str, too_large: Callable[[str, str], NoReturn]
    ) -> None:
        self._limits = limits
        self._rows_are = rows_are
        self._too_large = too_large
        self._check_messages(body)
        self._reader = pa.ipc.open_stream(pa.BufferReader(body))
        self.schema: pa.Schema = self._reader.schema

    def _check_messages(self, body: bytes) -> None:
        """Refuse what must not be read: what says so in its messages' metadata, before it costs memory."""
        stream = pa.BufferReader(body)
        rows = count = end = 0
        for message in pa.ipc.MessageReader.open_stream(stream):
            end = stream.tell()
            count += 1
            if count - 1 > self._limits.batches_max:
                self._too_large("batches_max", f"more than {self._limits.batches_max} Arrow batches")
            if message.type == "schema" and count == 1:
                continue
            if message.type not in ("record batch", "dictionary"):
                raise ValueError(f"unexpected {message.type} message")
            head = _BatchHead.of(message)
            if head.compressed:
                raise ValueError("compressed batches are not read; write them without compression")
            if head.delta:
                raise ValueError("dictionary deltas are not read; write whole dictionaries")
            # Buffers start at multiples of 8 within the message: aligned if it is.
            if head.rows < 0 or (message.body.size and message.body.address % 8):
                raise ValueError("damaged message")
            rows += 0 if message.type == "dictionary" else head.rows
            if rows > self._limits.rows_max:
                self._too_large("rows_max", f"more than {self._limits.rows_max} {self._rows_are}")
        if body[end:] not in _ENDS:
            raise ValueError("cut off, or bytes after its end; close the stream writer before sending")

    def columns(self) -> tuple[dict[str, pa.Array], int]:
        """Return the columns, batches joined and dictionaries (of strings) decoded, and the number of rows.

        Call it once, and only when the types of `schema` have been found to be wanted ones.
        """
        columns: dict[str, list[pa.Array]] = {name: [] for name in self.schema.names}
        spent = rows = 0
        for batch in self._reader:
            spent += batch.get_total_buffer_size()
            self._check_bytes(spent)
            # Nothing of a batch may be touched before this: its offsets and indices may point anywhere.
            batch.validate(full=True)
            rows += batch.num_rows
            for name, array in zip(batch.schema.names, batch.columns, strict=True):
                if pa.types.is_dictionary(array.type):
                    spent += pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0
                    self._check_bytes(spent)
                    array = array.dictionary_decode()
                columns[name].append(array)
        if not rows:
            return {f.name: pa.nulls(0, getattr(f.type, "value_type", f.type)) for f in self.schema}, 0
        return {n: a[0] if len(a) == 1 else pa.concat_arrays(a) for n, a in columns.items()}, rows

    def _check_bytes(self, size: int) -> None:
        if size > self._limits.arrow_bytes_max:
            self._too_large("arrow_bytes_max", f"{size} bytes when decoded")


@dataclass(frozen=True)
class _BatchHead:
    """What the metadata of a record batch or dictionary message says, read from its flatbuffer.

    Source: Message.fbs, https://github.com/apache/arrow/blob/main/format/Message.fbs. PyArrow verifies
    the flatbuffer but shows none of this before it has read, and decompressed, the batch.
    """

    rows: int
    compressed: bool
    delta: bool

    @classmethod
    def of(cls, message: pa.ipc.Message) -> _BatchHead:
        """Raises `ValueError` or `struct.error` if the metadata is damaged."""
        table = memoryview(message.metadata)
        batch = _child(table, struct.unpack_from("<I", table, 0)[0], 2)
        delta = False
        if message.type == "dictionary":
            is_delta = _member_at(table, batch, 2)
            delta = bool(is_delta and table[is_delta])
            batch = _child(table, batch, 1)
        length = _member_at(table, batch, 0)
        rows = struct.unpack_from("<q", table, length)[0] if length else 0
        return cls(rows, bool(_member_at(table, batch, 3)), delta)


def _member_at(buffer: memoryview, table: int, member: int) -> int:
    """Return where a member of a flatbuffer table lies, 0 if it is absent."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    if not 0 <= vtable < len(buffer):
        raise ValueError("damaged message")
    entry = 4 + 2 * member
    if entry >= struct.unpack_from("<H", buffer, vtable)[0]:
        return 0
    offset: int = struct.unpack_from("<H", buffer, vtable + entry)[0]
    return table + offset if offset else 0


def _child(buffer: memoryview, table: int, member: int) -> int:
    """Return where the table lies that a member points to."""
    at = _member_at(buffer, table, member)
    if not at:
        raise ValueError("damaged message")
    return at + int(struct.unpack_from("<I", buffer, at)[0])
