"""The snapshot file, as FORMAT.md has it: chunks of a header and words, with checksums and no pickle.

It says nothing about how a shard becomes chunks and again a shard: see `image`. What is read was written, or it is an
error that says where; nothing in a file is trusted before its checksum was compared and its lengths held against it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, get_args

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.tiles.shape import TableShape

__all__ = [
    "Chunk",
    "Header",
    "Ids",
    "Rows",
    "ShardHeader",
    "SnapshotDamaged",
    "SnapshotFull",
    "SnapshotTooNew",
    "SnapshotWriter",
    "StringsHeader",
    "begin_of",
    "decode_strings",
    "encode_strings",
    "newest_snapshots",
    "read_snapshot",
    "remove_old_snapshots",
    "write_snapshot",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_MAGIC, _FORMAT = b"MPSNAP", 1
_FIXED_BYTES = 32
_CODEC = "lz4_raw"
_HEADER_BYTES_MAX, _BODY_BYTES_MAX = 1 << 26, 1 << 30
_NAME = re.compile(r"(\d{20})-(\d{1,18})\.snapshot")
_TEMPORARY = ".tmp"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: The disk begins to write after so many bytes, and is waited for after so many, so that syncs of the log in between
#: never wait for more.
_BEGIN_BYTES, _SYNC_BYTES = 4 << 20, 32 << 20


class SnapshotDamaged(MillpondError):
    """A snapshot is not what was written: an older one, and more of the log, has to do."""

    code, status = "snapshot_damaged", 500


class SnapshotTooNew(MillpondError):
    """A snapshot is of a later format."""

    code, status = "snapshot_too_new", 500


class SnapshotFull(Unavailable):
    """The disk has no room for a snapshot."""

    code = "snapshot_full"


# -- chunks

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class ShardHeader(msgspec.Struct, tag_field="kind", tag="shard", frozen=True):
    """Which shard it is of, and what is known of it as of `begin`."""

    cluster_id: str
    shard: Count
    epoch: Count
    begin: Count
    n_slots: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    key_hash_version: int
    newest_arrival_ms: Int64
    newest_received_ms: Int64
    events: dict[str, Count]
    strings_refused: Count
    tables: tuple[TableShape, ...]
    state: dict[str, Any]


class Rows(msgspec.Struct, tag_field="kind", tag="rows", frozen=True):
    """Some rows of a slot of table number `table` of the `ShardHeader`, which has about `rows` of them."""

    table: Count
    slot: Count
    rows: Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]


class Ids(msgspec.Struct, tag_field="kind", tag="ids", frozen=True):
    """Some ids of a source that a slot has seen as their home."""

    source: str
    slot: Count
    newest_ms: Int64
    cutoff_ms: Int64 = -(2**63)


class StringsHeader(msgspec.Struct, tag_field="kind", tag="strings", frozen=True):
    """Some strings, of so many bytes."""

    count: Count
    bytes: Count


class _End(msgspec.Struct, tag_field="kind", tag="end", frozen=True):
    chunks: Count
    crc: Count


Header = ShardHeader | Rows | Ids | StringsHeader


@dataclass(frozen=True)
class Chunk:
    """A part of a snapshot: words int64 [n], writable and this chunk's own; end: the byte of the file that it was read
    up to."""

    header: Header
    words: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    end: int = 0


def encode_strings(addresses: Floats, texts: Sequence[str]) -> Chunk:
    """Return the chunk of some strings and their addresses, float64 [n]."""
    column = pa.array(texts, pa.large_string())
    _, offsets, content = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[: len(texts) + 1]
    size = int(ends[-1])
    words = np.zeros(2 * len(texts) + (size + 7) // 8, np.int64)
    words[: len(texts)] = addresses.view(np.int64)
    words[len(texts) : 2 * len(texts)] = np.diff(ends)
    if size:
        words[2 * len(texts) :].view(np.uint8)[:size] = np.frombuffer(content, np.uint8)[:size]
    return Chunk(StringsHeader(len(texts), size), words)


def decode_strings(chunk: Chunk) -> tuple[Floats, list[str]]:
    """Return addresses float64 [n] and strings of a chunk; raises `ValueError` if they are none."""
    header, words = chunk.header, chunk.words
    assert isinstance(header, StringsHeader)
    n, size = header.count, header.bytes
    if 2 * n > len(words) or len(words) - 2 * n != (size + 7) // 8:
        raise ValueError(f"{len(words)} words are not {n} strings of {size} bytes")
    lengths = words[n : 2 * n]
    if n and (lengths.min() < 0 or lengths.max() > size):
        raise ValueError("a string is longer than all of them")
    ends = np.zeros(n + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    if ends[-1] != size:
        raise ValueError(f"strings of {size} bytes end at {ends[-1]}")
    column = pa.LargeStringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(words[2 * n :]))
    column.validate(full=True)  # that they are UTF-8, too; ArrowInvalid is a ValueError
    return words[:n].view(np.float64), column.to_pylist()


# -- writing


class SnapshotWriter:
    """Write a snapshot into a directory chunk by chunk, and put it in its place when it is whole.

    The first chunk is the shard's. Calls may come from any thread, one at a time. Raises `SnapshotFull` when the disk
    is full; after that or any other failure `abandon` takes away what has been written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        self._chunks = self._crc = 0
        self._size = self._begun = self._synced = 0

    def write(self, chunk: Chunk) -> None:
        """Write one chunk more."""
        header = chunk.header
        with self._told_when_full():
            if self._file is None:
                assert isinstance(header, ShardHeader), "a snapshot begins with its shard"
                self._open(f"{header.begin:020d}-{header.epoch}.snapshot")
            self._append(header, chunk.words)

    def finish(self) -> Path:
        """Write the end, sync, and rename the file into its place; return that."""
        assert self._file is not None
        assert self._path is not None
        with self._told_when_full():
            self._append(_End(self._chunks, self._crc), np.empty(0, np.int64))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            _temporary(self._path).rename(self._path)
            _sync_directory(self._directory)
        return self._path

    def abandon(self) -> None:
        """Take away what has been written, unless it is finished."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is buffered may find no room
                self._file.close()
        if self._path is not None:
            _temporary(self._path).unlink(missing_ok=True)

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def _open(self, name: str) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = self._directory / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(_temporary(self._path), flags, 0o600), "wb")
        self._size = self._file.write(_MAGIC + _FORMAT.to_bytes(2, "little"))

    def _append(self, header: Header | _End, words: Ints) -> None:
        assert self._file is not None
        head = msgspec.msgpack.encode(header)
        body = pa.compress(pa.py_buffer(words), _CODEC, asbytes=True) if len(words) else b""
        assert len(head) <= _HEADER_BYTES_MAX
        assert words.nbytes <= _BODY_BYTES_MAX
        lengths = len(head).to_bytes(4, "little") + b"".join(
            n.to_bytes(8, "little") for n in (self._chunks, len(body), words.nbytes)
        )
        padded = [part.ljust(_whole_words(len(part)), b"\0") for part in (head, body)]
        content = b"".join([lengths, *padded])
        crc = zlib.crc32(content).to_bytes(4, "little")
        self._size += self._file.write(crc) + self._file.write(content)
        self._chunks, self._crc = self._chunks + 1, zlib.crc32(crc, self._crc)
        self._keep_the_disk_busy()

    def _keep_the_disk_busy(self) -> None:
        assert self._file is not None
        if self._size - self._begun >= _BEGIN_BYTES:
            self._file.flush()
            # It begins to write what is not written yet, and does not wait.
            os.posix_fadvise(self._file.fileno(), self._begun, self._size - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = self._size
        if self._size - self._synced >= _SYNC_BYTES:
            os.fdatasync(self._file.fileno())
            self._synced = self._size

    @contextlib.contextmanager
    def _told_when_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise SnapshotFull(
                f"snapshot: no room in `{self._directory}`: {error.strerror}; free some, another is written then",
                retry_after_ms=10_000,
            ) from None


def write_snapshot(directory: Path, chunks: Iterable[Chunk]) -> Path:
    """Write a snapshot; return its path. Raises `SnapshotFull`; nothing is left of it after that or any other error."""
    with SnapshotWriter(directory) as writer:
        for chunk in chunks:
            writer.write(chunk)
        return writer.finish()


# -- reading


def read_snapshot(path: Path, kinds: tuple[type[Header], ...] = get_args(Header)) -> Iterator[Chunk]:
    """Yield those chunks of a snapshot that are of these kinds; all are checked. Whether it is whole is known after the
    last.

    Raises `SnapshotDamaged`, `SnapshotTooNew`.
    """
    try:
        with open(path, "rb") as file:
            yield from _read(path, file, os.fstat(file.fileno()).st_size, kinds)
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from None


_decoder = msgspec.msgpack.Decoder(Header | _End)


def _read(path: Path, file: BinaryIO, size: int, kinds: tuple[type[Header], ...]) -> Iterator[Chunk]:
    magic = file.read(8)
    if magic[:6] != _MAGIC or len(magic) < 8:
        raise _damaged(path, f"begins with {magic!r}")
    if (version := int.from_bytes(magic[6:], "little")) != _FORMAT:
        if version > _FORMAT:
            raise SnapshotTooNew(
                f"snapshot: `{path}` is of format {version}; this version reads {_FORMAT}; start the version that "
                "wrote it, or take the file away",
                path=str(path),
            )
        raise _damaged(path, f"is of format {version}")
    at, of_crcs = 8, 0
    for number in range(size):
        where = f"chunk {number}, at byte {at},"
        if len(fixed := file.read(_FIXED_BYTES)) < _FIXED_BYTES:
            raise _damaged(path, f"{where} is cut off" if fixed else f"ends without an end, before chunk {number}")
        crc, head_bytes = (int.from_bytes(fixed[i : i + 4], "little") for i in (0, 4))
        says, body_bytes, nbytes = (int.from_bytes(fixed[i : i + 8], "little") for i in (8, 16, 24))
        more = _whole_words(head_bytes) + _whole_words(body_bytes)
        if head_bytes > _HEADER_BYTES_MAX or nbytes > _BODY_BYTES_MAX or nbytes % 8 or more > size - at - _FIXED_BYTES:
            raise _damaged(path, f"{where} is cut off, or has impossible lengths")
        content = file.read(more)
        if zlib.crc32(content, zlib.crc32(fixed[4:])) != crc:
            raise _damaged(path, f"{where} fails its checksum")
        if says != number:
            raise _damaged(path, f"{where} says that it is chunk {says}")
        try:
            header = _decoder.decode(content[:head_bytes])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _damaged(path, f"{where} has a header that cannot be read: {error}") from None
        at += _FIXED_BYTES + more
        if isinstance(header, _End):
            if (header.chunks, header.crc, size) != (number, of_crcs, at):
                raise _damaged(path, f"{where} is the end of other chunks, or not the last")
            return
        if isinstance(header, ShardHeader) != (number == 0):
            raise _damaged(path, f"{where} is a `{header.__struct_config__.tag}`, which is not its place")
        of_crcs = zlib.crc32(fixed[:4], of_crcs)
        if not isinstance(header, kinds):
            continue
        start = _whole_words(head_bytes)
        try:
            words = _unpacked(content[start : start + body_bytes], nbytes)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(path, f"{where} has a body that cannot be unpacked: {error}") from None
        yield Chunk(header, words, at)


def _unpacked(body: bytes, nbytes: int) -> Ints:
    if nbytes == 0:
        return np.empty(0, np.int64)
    # (A forged body may unpack to less, and leave words as they happen to be: whoever loads them trusts none.)
    return np.frombuffer(pa.decompress(body, nbytes, _CODEC), np.int64).copy()  # writable, as kernels want it


def _damaged(path: Path, what: str) -> SnapshotDamaged:
    return SnapshotDamaged(f"snapshot: `{path}` {what}; an older one has to do", path=str(path))


def _whole_words(size: int) -> int:
    return (size + 7) // 8 * 8


# -- the directory


def newest_snapshots(directory: Path) -> list[Path]:
    """Return the snapshots in a directory, the newest first, whether they can be read or not."""
    named = [(match, path) for path in directory.glob("*.snapshot") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named, key=lambda n: (int(n[0][1]), int(n[0][2])), reverse=True)]


def begin_of(path: Path) -> int:
    """Return the offset of the log from which a snapshot needs it, by its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def remove_old_snapshots(directory: Path, keep: int = 2) -> None:
    """Remove all snapshots but the newest, and what a crash has left of others. None is being written meanwhile."""
    for path in newest_snapshots(directory)[keep:]:
        path.unlink(missing_ok=True)
    for path in directory.glob(f"*.snapshot{_TEMPORARY}"):
        path.unlink(missing_ok=True)
    if directory.is_dir():
        _sync_directory(directory)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + _TEMPORARY)


def _sync_directory(directory: Path) -> None:
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
