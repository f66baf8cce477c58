"""A part of a shard's history: its range of offsets, its files and their names, and the marker that says it is whole.

The layout is in FORMAT.md. A part is seen by its marker, which is written when all of its files are there.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zlib
from typing import TypeVar

import msgspec
import numpy as np
import pyarrow as pa

from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.log.folder import Folder

__all__ = [
    "DAY_MS",
    "HOME",
    "OWN_COLUMNS",
    "Expired",
    "HistoryDamaged",
    "Key",
    "Part",
    "PartFile",
    "day_of",
    "day_text",
    "part_of",
    "expired",
    "parts_of",
    "read_part",
    "route_name",
    "source_folder",
    "write_expired",
    "write_part",
]

Key = tuple[str, ...]

T = TypeVar("T")

FORMAT = 1
DAY_MS = 86_400_000
#: The route of the events that were new at their home, which is no key.
HOME: Key = ()
#: Columns that are not fields of the source; a field cannot have such a name.
OWN_COLUMNS = pa.schema(
    [
        pa.field("_offset", pa.int64(), nullable=False),
        pa.field("_row", pa.int32(), nullable=False),
        pa.field("_arrival_ms", pa.int64(), nullable=False),
        pa.field("_received_ms", pa.int64(), nullable=False),
        pa.field("_version", pa.int32(), nullable=False),
    ]
)
_PARTS = "_parts"
_STEM = re.compile(r"([0-9]{3,})-([0-9]+)-([0-9]{20,})-([0-9]{20,})(?:-r([0-9]+))?")
#: A folder's name has 255 bytes at most, everywhere.
_ROUTE_CHARS_MAX = 160


class HistoryDamaged(MillpondError):
    """A file of the history is not what was written, or is missing."""

    code, status = "history_damaged", 500


class PartFile(msgspec.Struct, frozen=True):
    """One Parquet file. number: tells apart schemas of the source in this part, 0 the first. route: a key, or `HOME`.
    day: of the arrival stamps, since the epoch. bytes and crc32 are of the whole file. revision: of the part, in which
    the file was written."""

    source: str
    version: int
    number: int
    route: Key
    day: int
    rows: int
    bytes: int
    crc32: int
    revision: int = 0


class Part(msgspec.Struct, frozen=True):
    """Offsets [from_offset, to_offset) of a shard, as they were planned by its opening number `epoch`.

    files: all of them. tables: by source, from which offset on a record had which keys of tables. revision: how often
    it was rewritten; of two revisions the later one is the part. lost: what these offsets had is not known any more: it
    had left the log while there was no history.
    """

    shard: int
    epoch: int
    from_offset: int
    to_offset: int
    files: tuple[PartFile, ...] = ()
    tables: dict[str, tuple[tuple[int, tuple[Key, ...]], ...]] = {}
    format: int = FORMAT
    revision: int = 0
    lost: bool = False

    @property
    def stem(self) -> str:
        return self._stem(self.revision)

    def _stem(self, revision: int) -> str:
        stem = f"{self.shard:03d}-{self.epoch}-{self.from_offset:020d}-{self.to_offset:020d}"
        return f"{stem}-r{revision}" if revision else stem

    @property
    def range(self) -> tuple[int, int, int, int]:
        """What all revisions of a part have in common."""
        return self.shard, self.from_offset, self.to_offset, self.epoch

    @property
    def marker(self) -> str:
        return f"{_PARTS}/{self.shard:03d}/{self.stem}.json"

    def path(self, file: PartFile) -> str:
        number = f".{file.number}" if file.number else ""
        folder = f"{source_folder(file.source)}/route={route_name(file.route)}/date={day_text(file.day)}"
        return f"{folder}/{self._stem(file.revision)}{number}.parquet"


def source_folder(source: str) -> str:
    return f"source={source}"


def route_name(key: Key) -> str:
    """Return the name of a route; the key of one field `home` is not the home.

    >>> route_name(HOME), route_name(("user_id", "book")), route_name(("home",))
    ('home', 'user_id+book', 'home+')
    """
    name = "+".join(key) + "+" * (key == ("home",)) or "home"
    if len(name) > _ROUTE_CHARS_MAX:
        name = f"{name[:_ROUTE_CHARS_MAX]}+{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name


def day_text(day: int) -> str:
    """
    >>> day_text(0), day_text(-1), day_text(84_005)
    ('1970-01-01', '1969-12-31', '2199-12-31')
    """
    return str(np.datetime64(day, "D"))


def day_of(path: str) -> int | None:
    """Return the day that a path names with `date=`, None if it names none."""
    match = re.search(r"(?:^|/)date=([+-]?[0-9]+-[0-9]{2}-[0-9]{2})(?:/|$)", path)
    try:
        return int(np.datetime64(match[1], "D").astype(np.int64)) if match else None
    except ValueError:
        return None


def part_of(path: str) -> Part | None:
    """Return the range of the part that a file belongs to by its name, None if it has another name."""
    match = re.fullmatch(rf"{_STEM.pattern}(?:(?:\.[0-9]+)?\.parquet|\.json)", path.rpartition("/")[2])
    if match is None:
        return None
    return Part(int(match[1]), int(match[2]), int(match[3]), int(match[4]), revision=int(match[5] or 0))


def parts_of(folder: Folder, shard: int | None = None) -> list[Part]:
    """Return the ranges of the whole parts of a shard, or of all, in order: what the names of their markers say. Of a
    part that is being rewritten it is the later revision."""
    paths = folder.files(_PARTS if shard is None else f"{_PARTS}/{shard:03d}", recursive=shard is None)
    parts = [part for path in paths if (part := part_of(path)) is not None]
    latest: dict[tuple[int, int, int, int], Part] = {}
    for part in sorted(parts, key=lambda p: (p.shard, p.from_offset, p.to_offset, p.epoch, p.revision)):
        latest[part.range] = part
    return list(latest.values())


def write_part(folder: Folder, part: Part, tag: str) -> None:
    """Write the marker of a part, all of whose files are there."""
    _write_checked(folder, part.marker, msgspec.json.encode(part), tag)


def read_part(folder: Folder, of: Part) -> Part:
    """Return what the marker of a part says. Raises `HistoryDamaged`."""
    part = _read_checked(folder, of.marker, Part)
    if part.format != FORMAT:
        raise HistoryDamaged(f"history: `{of.marker}` has format {part.format}; this version reads {FORMAT}")
    if part.stem != of.stem:
        raise HistoryDamaged(f"history: `{of.marker}` says that it is `{part.stem}`; restore it from a copy")
    return part


class Expired(msgspec.Struct, frozen=True):
    """What retention has taken from a source: a file of before `before_day` may be missing; `deleting`: days that go
    right now, whose files nobody reads."""

    before_day: int = -(2**63)
    deleting: tuple[int, ...] = ()


def expired(folder: Folder, source: str) -> Expired:
    """Return what is written down of a source. Raises `HistoryDamaged`."""
    path = f"{source_folder(source)}/_expired.json"
    return _read_checked(folder, path, Expired) if path in folder.files(source_folder(source)) else Expired()


def write_expired(folder: Folder, source: str, what: Expired) -> None:
    _write_checked(folder, f"{source_folder(source)}/_expired.json", msgspec.json.encode(what), str(os.getpid()))


# Small files are one line of JSON and a line with its CRC-32.


def _write_checked(folder: Folder, path: str, content: bytes, tag: str) -> None:
    folder.write(path, io.BytesIO(content + b"\n%08x\n" % zlib.crc32(content)), tag)


def _read_checked(folder: Folder, path: str, kind: type[T]) -> T:
    content, _, checksum = folder.read(path).removesuffix(b"\n").rpartition(b"\n")
    if checksum != b"%08x" % zlib.crc32(content):
        raise HistoryDamaged(f"history: `{path}` fails its checksum; restore it from a copy")
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise HistoryDamaged(f"history: `{path}` is damaged: {error}; restore it from a copy") from None
