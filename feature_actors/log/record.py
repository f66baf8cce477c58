"""Records of the log, as FORMAT.md has them: to bytes and back, with a checksum and no pickle."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.errors import MillpondError

__all__ = [
    "BROUGHT_LATER",
    "MAGIC",
    "Brought",
    "Decoded",
    "EventsRecord",
    "HomeRecord",
    "LogDamaged",
    "LostRecord",
    "OfferRecord",
    "Record",
    "TakeRecord",
    "decode",
    "encode",
]

Ints = npt.NDArray[np.int64]

MAGIC = b"MPL2"
_FIXED_BYTES = 20


class LogDamaged(MillpondError):
    """A record of a log is not what was written."""

    code, status = "log_damaged", 500


#: Stands for a key in `tables` of a record whose events had been logged at their homes before they were brought here.
BROUGHT_LATER: tuple[str, ...] = ()


class Brought(NamedTuple):
    """What events were brought here later: those of a home's log before an offset, after what was brought before."""

    home: int
    before: int


class HomeRecord(NamedTuple):
    """A record at the home of its events: which shard that is, the record's offset there, and the offset before which
    all of that home's records have been applied everywhere."""

    shard: int
    offset: int
    settled: int


@dataclass(slots=True)
class EventsRecord:
    """Events that were applied: arrivals int64 [n]; routes uint32 [n], bit 0 for "new at its home", bit 1 + t for
    "applied to table t" of `tables`, which are keys. ids uint64 [n, 2]: hashes by which events are told apart, if they
    have no id of their own. homes: whose records these events are, if their home delivered them. brought: if they were
    brought here later, for a key that came while the cluster ran: `tables` are that key and `BROUGHT_LATER`.
    """

    source: str
    version: int
    received_ms: int
    tables: tuple[tuple[str, ...], ...]
    arrivals: Ints
    routes: npt.NDArray[np.uint32]
    batch: pa.RecordBatch
    ids: npt.NDArray[np.uint64] | None = None
    homes: tuple[HomeRecord, ...] = ()
    brought: Brought | None = None


@dataclass(slots=True)
class OfferRecord:
    """Events of which several shards have a part: as `EventsRecord`, but bit 1 + t says that the key of table t is
    here, and the event is to be applied when it is taken."""

    source: str
    version: int
    received_ms: int
    tables: tuple[tuple[str, ...], ...]
    arrivals: Ints
    routes: npt.NDArray[np.uint32]
    batch: pa.RecordBatch
    ids: npt.NDArray[np.uint64] | None = None


@dataclass(slots=True)
class TakeRecord:
    """What of an offer was applied: offset of the offer; rows int64 [k] of its batch; homes: whose records they are."""

    offer: int
    rows: Ints
    homes: tuple[HomeRecord, ...]


@dataclass(slots=True)
class LostRecord:
    """Stands where a record was that could not be read any more, so that offsets have no gaps: `millpond check --fix`
    has put it there. size: bytes that were there; why: what was wrong with them."""

    size: int
    why: str


Record = EventsRecord | OfferRecord | TakeRecord | LostRecord


class Decoded(NamedTuple):
    """A record, and the offset before which everything whose home is this shard was known to be applied everywhere
    when it was written."""

    record: Record
    settled: int


_KINDS = {EventsRecord: "events", OfferRecord: "offer", TakeRecord: "take", LostRecord: "lost"}


def encode(record: Record, offset: int, settled: int, schema: str) -> bytes:
    """Return the bytes of a record at an offset; settled as of `Decoded`; schema: the name of that of its events."""
    header: dict[str, Any] = {"kind": _KINDS[type(record)], "settled": settled}
    blocks: dict[str, Any]
    if isinstance(record, TakeRecord):
        header |= {"offer": record.offer, "homes": record.homes}
        blocks = {"rows": record.rows}
    elif isinstance(record, LostRecord):
        header |= {"size": record.size, "why": record.why}
        blocks = {}
    else:
        header |= {
            "source": record.source,
            "version": record.version,
            "schema": schema,
            "received_ms": record.received_ms,
            "tables": record.tables,
        }
        if isinstance(record, EventsRecord):
            header["homes"] = record.homes
            if record.brought is not None:
                header["brought"] = record.brought
        blocks = {"arrivals": record.arrivals, "routes": record.routes, "batch": record.batch.serialize()}
        if record.ids is not None:
            blocks["ids"] = record.ids
    contents = [memoryview(block).cast("B") if memoryview(block).nbytes else b"" for block in blocks.values()]
    header["blocks"] = [[name, len(content)] for name, content in zip(blocks, contents, strict=True)]
    head = msgspec.msgpack.encode(header)
    parts: list[Any] = [offset.to_bytes(8, "little"), len(head).to_bytes(4, "little"), head]
    parts.append(b"\0" * (-(_FIXED_BYTES + len(head)) % 8))  # so that numbers are aligned when they are read in place
    for content in contents:
        parts += [content, b"\0" * (-len(content) % 8)]
    body = b"".join(parts)
    return b"".join([MAGIC, zlib.crc32(body).to_bytes(4, "little"), body])


def decode(content: bytes, offset: int, schemas: Callable[[str], pa.Schema]) -> Decoded:
    """Return the record that was written at an offset; schemas: returns that of a name, or raises
    `LogDamaged`.

    Raises `LogDamaged` that says at which offset, and what is wrong with it.
    """

    def damaged(what: str) -> LogDamaged:
        return LogDamaged(
            f"log: the record at offset {offset} {what}; run `millpond check` on the stopped cluster's directory",
            path=f"offset {offset}",
        )

    if content[:4] != MAGIC:
        raise damaged(f"begins with {bytes(content[:4])!r}; this version reads {MAGIC!r}")
    if zlib.crc32(memoryview(content)[8:]) != int.from_bytes(content[4:8], "little"):
        raise damaged("fails its checksum")
    if (says := int.from_bytes(content[8:16], "little")) != offset:
        raise damaged(f"says that it is at offset {says}")
    try:
        length = int.from_bytes(content[16:_FIXED_BYTES], "little")
        header = msgspec.msgpack.decode(content[_FIXED_BYTES : _FIXED_BYTES + length])
        blocks, at = {}, _FIXED_BYTES + length + -(_FIXED_BYTES + length) % 8
        buffer = pa.py_buffer(content)
        for name, size in header["blocks"]:
            blocks[name] = buffer.slice(at, size)
            at += size + -size % 8
        return Decoded(_record(header, blocks, schemas), header["settled"])
    except (KeyError, TypeError, ValueError, IndexError, msgspec.DecodeError, pa.ArrowException) as error:
        raise damaged(f"cannot be read: {type(error).__name__}: {error}") from None


def _record(header: dict[str, Any], blocks: dict[str, pa.Buffer], schemas: Callable[[str], pa.Schema]) -> Record:
    kind = header["kind"]
    if kind == "take":
        return TakeRecord(header["offer"], np.frombuffer(blocks["rows"], np.int64), _homes(header))
    if kind == "lost":
        return LostRecord(header["size"], header["why"])
    if kind not in ("events", "offer"):
        raise ValueError(f"unknown kind {kind!r}")
    fields = (
        header["source"],
        header["version"],
        header["received_ms"],
        tuple(tuple(key) for key in header["tables"]),
        np.frombuffer(blocks["arrivals"], np.int64),
        np.frombuffer(blocks["routes"], np.uint32),
        pa.ipc.read_record_batch(blocks["batch"], schemas(header["schema"])),
        np.frombuffer(blocks["ids"], np.uint64).reshape(-1, 2) if "ids" in blocks else None,
    )
    if kind == "offer":
        return OfferRecord(*fields)
    return EventsRecord(*fields, _homes(header), Brought(*header["brought"]) if "brought" in header else None)


def _homes(header: dict[str, Any]) -> tuple[HomeRecord, ...]:
    return tuple(HomeRecord(*home) for home in header["homes"])
