"""Records of the log, as FORMAT.md has them: to bytes and back, with a checksum and no pickle."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.errors import MillpondError

__all__ = ["EventsRecord", "IdsRecord", "LogDamaged", "Record", "SchemaRecord", "decode", "encode"]

Ints = npt.NDArray[np.int64]

_MAGIC = b"MPL1"
_FIXED_BYTES = 20


class LogDamaged(MillpondError):
    """A record of a log is not what was written."""

    code, status = "log_damaged", 500


@dataclass(slots=True)
class SchemaRecord:
    """The schema of a version of a source."""

    source: str
    version: int
    schema: pa.Schema


@dataclass(slots=True)
class EventsRecord:
    """Events that were applied: arrivals int64 [n]; routes uint32 [n], bit 0 for "new at its home", bit 1 + t for
    "applied to table t" of `tables`, which are keys."""

    source: str
    version: int
    received_ms: int
    tables: tuple[tuple[str, ...], ...]
    arrivals: Ints
    routes: npt.NDArray[np.uint32]
    batch: pa.RecordBatch


@dataclass(slots=True)
class IdsRecord:
    """Event ids that were new at their home: ids uint64 [n, 2] and hashes of the contents int64 [n]."""

    source: str
    received_ms: int
    ids: npt.NDArray[np.uint64]
    contents: Ints


Record = SchemaRecord | EventsRecord | IdsRecord


def encode(record: Record, offset: int) -> bytes:
    """Return the bytes of a record at an offset."""
    header: dict[str, Any] = {"source": record.source}
    blocks: dict[str, Any]
    if isinstance(record, SchemaRecord):
        header |= {"kind": "schema", "version": record.version}
        blocks = {"schema": record.schema.serialize()}
    elif isinstance(record, EventsRecord):
        header |= {
            "kind": "events",
            "version": record.version,
            "received_ms": record.received_ms,
            "tables": record.tables,
        }
        blocks = {"arrivals": record.arrivals, "routes": record.routes, "batch": record.batch.serialize()}
    else:
        header |= {"kind": "ids", "received_ms": record.received_ms}
        blocks = {"ids": record.ids, "contents": record.contents}
    contents = [block.tobytes() if isinstance(block, np.ndarray) else block.to_pybytes() for block in blocks.values()]
    header["blocks"] = [[name, len(content)] for name, content in zip(blocks, contents, strict=True)]
    head = msgspec.msgpack.encode(header)
    parts = [offset.to_bytes(8, "little"), len(head).to_bytes(4, "little"), head]
    parts += [content.ljust(_padded(len(content)), b"\0") for content in contents]
    body = b"".join(parts)
    return b"".join([_MAGIC, zlib.crc32(body).to_bytes(4, "little"), body])


def decode(content: bytes, offset: int, schemas: dict[tuple[str, int], pa.Schema]) -> Record:
    """Return the record that was written at an offset; schemas: those of the records before it.

    Raises `LogDamaged` that says at which offset, and what is wrong with it.
    """

    def damaged(what: str) -> LogDamaged:
        return LogDamaged(f"log: the record at offset {offset} {what}; restore it from a copy", path=f"offset {offset}")

    if content[:4] != _MAGIC:
        raise damaged(f"begins with {content[:4]!r}; this version reads {_MAGIC!r}")
    if zlib.crc32(content[8:]) != int.from_bytes(content[4:8], "little"):
        raise damaged("fails its checksum")
    if (says := int.from_bytes(content[8:16], "little")) != offset:
        raise damaged(f"says that it is at offset {says}")
    try:
        length = int.from_bytes(content[16:_FIXED_BYTES], "little")
        header = msgspec.msgpack.decode(content[_FIXED_BYTES : _FIXED_BYTES + length])
        blocks, at = {}, _FIXED_BYTES + length
        for name, size in header["blocks"]:
            blocks[name] = content[at : at + size]
            at += _padded(size)
        source = header["source"]
        if header["kind"] == "schema":
            schema = pa.ipc.read_schema(pa.py_buffer(blocks["schema"]))
            return SchemaRecord(source, header["version"], schema)
        if header["kind"] == "events":
            schema = schemas[source, header["version"]]
            return EventsRecord(
                source,
                header["version"],
                header["received_ms"],
                tuple(tuple(key) for key in header["tables"]),
                np.frombuffer(blocks["arrivals"], np.int64),
                np.frombuffer(blocks["routes"], np.uint32),
                pa.ipc.read_record_batch(pa.py_buffer(blocks["batch"]), schema),
            )
        if header["kind"] == "ids":
            ids = np.frombuffer(blocks["ids"], np.uint64).reshape(-1, 2)
            return IdsRecord(source, header["received_ms"], ids, np.frombuffer(blocks["contents"], np.int64))
        raise damaged(f"is of unknown kind {header['kind']!r}")
    except (KeyError, TypeError, ValueError, msgspec.DecodeError, pa.ArrowException) as error:
        raise damaged(f"cannot be read: {type(error).__name__}: {error}") from None


def _padded(size: int) -> int:
    return (size + 7) // 8 * 8
