"""The log of a stopped shard, read without changing a byte of it, whatever state it is in.

SQLite makes files as it reads, and what a crash left behind in the write-ahead file belongs to the log: so where that
has something, it is read with SQLite's index of it in memory, or, where that cannot be, from a copy elsewhere.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import numpy as np
from diskcache.core import MODE_RAW

from millpond.feature_actors.log.log import PAGE_BYTES, Log
from millpond.feature_actors.log.record import MAGIC, Decoded, LogDamaged, Record, decode
from millpond.feature_actors.log.schemas import Schemas
from millpond.feature_actors.tiles.compiled import kernel

__all__ = ["StoppedLog", "WriteAhead", "read_write_ahead"]

#: Bytes of a database's header that are the same in every log: its kind, and what SQLite makes of it.
_FIXED_HEADER = (slice(0, 24), slice(44, 48), slice(52, 60), slice(64, 92))
#: Settings of diskcache that say what it has counted.
_COUNTED = ("count", "size", "hits", "misses")
_ROWS = "SELECT key, raw, typeof(key), typeof(value), substr(value, 9, 8) FROM Cache WHERE "
_INTEGRITY_LINES_MAX = 3
#: What a damaged database makes of any statement; the second where SQLite quotes what is damaged.
_ERRORS = (sqlite3.Error, UnicodeDecodeError)


class StoppedLog(Log):
    """The log in `directory`; nobody writes to it meanwhile. scratch: an empty directory for what has to be copied.

    problems: what is wrong with the database as such. first, next: as of `Log`, by what the records say; where single
    ones are missing, reading them raises.
    """

    def __init__(self, directory: Path, scratch: Path) -> None:
        self._directory = directory
        self._schemas = Schemas(directory / "schemas")
        self.problems: list[str] = []
        #: Keys that hold a record of another offset, or nothing that is a record at all.
        self.misplaced: dict[Any, str] = {}
        self._offsets: set[int] = set()
        self.first = self.next = 0
        path = directory / "cache.db"
        self._database: sqlite3.Connection | None = None
        if not path.is_file():
            self.problems.append("there is no such file")
            return
        try:
            self._database = _opened(path, scratch)
            self.problems += self._structure(scratch)
        except _ERRORS as error:
            self.problems.append(f"cannot be read: {error}")
        self._find()

    # -- records

    @property
    def offsets(self) -> set[int]:
        """Offsets under which there is something."""
        return self._offsets

    def content(self, offset: int) -> bytes:
        """Return the bytes of a record as a shard would find them. Raises `LogDamaged` with what is wrong."""
        if self._database is None:
            raise LogDamaged("cannot be read")
        try:
            row = self._database.execute(
                "SELECT expire_time, mode, filename, value FROM Cache WHERE key = ? AND raw = 1", (offset,)
            ).fetchone()
        except _ERRORS as error:
            raise LogDamaged(f"cannot be read: {error}") from None
        if row is None:
            raise LogDamaged("is missing")
        expires, mode, file, value = row
        if expires is not None or mode != MODE_RAW or file is not None or not isinstance(value, bytes):
            raise LogDamaged("is not stored as raw bytes for ever")
        return value

    def get(self, offset: int) -> Decoded:
        return decode(self.content(offset), offset, self._schemas.get)

    def bytes_from(self, offset: int) -> NoReturn:
        raise NotImplementedError

    def append(self, records: Sequence[Record], settled: int = 0) -> NoReturn:
        raise NotImplementedError

    def truncate(self, before: int) -> NoReturn:
        raise NotImplementedError

    def close(self) -> None:
        if self._database is not None:
            self._database.close()

    # -- the database

    def _structure(self, scratch: Path) -> list[str]:
        """Return what is wrong with the database, whatever its records are."""
        assert self._database is not None
        execute, problems = self._database.execute, []
        for (line,) in execute(f"PRAGMA integrity_check({_INTEGRITY_LINES_MAX})"):
            problems += [str(text) for text in str(line).splitlines() if text != "ok" and not text.startswith("***")]
        empty = scratch / "empty"
        Log(empty, "process").close()
        with closing(sqlite3.connect(empty / "cache.db")) as other:
            for what, query in (
                ("tables, indexes and triggers", "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY 1, 2"),
                ("settings", "SELECT key FROM Settings ORDER BY 1"),
            ):
                if execute(query).fetchall() != other.execute(query).fetchall():
                    problems.append(f"its {what} are not those of a log")
        ours, theirs = ((folder / "cache.db").open("rb") for folder in (self._directory, empty))
        with ours, theirs:
            header, wanted = ours.read(100), theirs.read(100)
        if any(header[part] != wanted[part] for part in _FIXED_HEADER if len(header) == 100):
            problems.append("its header is not that of a log")
        counted = dict(execute(f"SELECT key, value FROM Settings WHERE key IN {_COUNTED}").fetchall())
        ((rows,),) = execute("SELECT COUNT(*) FROM Cache").fetchall()
        if counted.get("count") != rows:
            problems.append(f"it holds {rows} records and says that there are {counted.get('count')!r}")
        if not all(isinstance(counted.get(name), int) for name in _COUNTED):
            problems.append("what it says that it has counted are no numbers")
        return problems

    def _find(self) -> None:
        """Find the keys, and where the log begins and ends."""
        agreeing = set()
        for key, raw, kind, of_value, says in self._rows():
            if kind != "integer" or raw != 1 or key < 0:
                self.misplaced[key] = "is no offset"
                continue
            self._offsets.add(key)
            if of_value == "blob" and int.from_bytes(says or b"", "little") == key:
                agreeing.add(key)
        if not agreeing:
            agreeing = self._offsets
        if agreeing:
            self.first, self.next = min(agreeing), max(agreeing) + 1
        while self.next in self._offsets:
            self.next += 1
        while self.first - 1 in self._offsets:
            self.first -= 1
        for key in sorted(k for k in self._offsets if not self.first <= k < self.next):
            self.misplaced[key] = f"lies outside of the log, which goes from {self.first} to {self.next}"

    def _rows(self) -> Iterable[tuple[Any, ...]]:
        if self._database is None:
            return []
        with suppress(*_ERRORS):
            return list(self._database.execute(_ROWS + "1"))
        return list(self._rows_one_by_one())

    def _rows_one_by_one(self) -> Iterator[tuple[Any, ...]]:
        """Yield the rows that can be read of a database that is damaged."""
        assert self._database is not None
        try:
            ((low,),) = self._database.execute("SELECT MIN(rowid) FROM Cache NOT INDEXED").fetchall()
            ((high,),) = self._database.execute("SELECT MAX(rowid) FROM Cache NOT INDEXED").fetchall()
        except _ERRORS:
            return
        if low is None or high - low > 1 << 24:
            return
        for number in range(low, high + 1):
            with suppress(*_ERRORS):
                yield from self._database.execute(_ROWS + "rowid = ?", (number,)).fetchall()

    def carved(self) -> Iterator[bytes]:
        """Yield what looks like records in the pages of the database and of what was written ahead, whatever leads to
        them, or does not any more: which of it is whole its own checksums say."""
        path = self._directory / "cache.db"
        if path.exists():
            yield from _carved(path, path.with_name("cache.db-wal"))


def _opened(path: Path, scratch: Path) -> sqlite3.Connection:
    """Open a database that nobody writes to, without a change to any file."""
    ahead, index = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
    if not ahead.exists() or ahead.stat().st_size == 0:
        options = "mode=ro&immutable=1"
    elif index.exists():
        options = "mode=ro&readonly_shm=1"
    else:
        path = Path(shutil.copy(path, scratch / path.name))
        shutil.copy(ahead, scratch / ahead.name)
        options = "mode=ro"
    database = sqlite3.connect(f"file:{quote(str(path))}?{options}", uri=True, isolation_level=None)
    database.text_factory = lambda text: text.decode(errors="replace")
    try:
        database.execute("SELECT COUNT(*) FROM sqlite_master").fetchall()
    except _ERRORS:
        database.close()
        raise
    return database


# -- the write-ahead file


class WriteAhead:
    """What the write-ahead file of a log says. whole: bytes up to the end of the last append that is whole. problem:
    that more was appended, which is damaged; "" if nothing is wrong. unfinished: whether an append was cut off."""

    def __init__(self, whole: int, problem: str = "", unfinished: bool = False) -> None:
        self.whole, self.problem, self.unfinished = whole, problem, unfinished


_WAL_HEADER, _FRAME_HEADER = 32, 24
_WAL_MAGIC = 0x377F0682
_TABLE_LEAF = 0x0D


@kernel
def _sums(words: Any, s0: Any, s1: Any) -> Any:
    """Go on with SQLite's checksum, uint32 pairs, over words uint32 [2 k]."""
    a, b = np.uint32(s0), np.uint32(s1)
    for i in range(0, len(words), 2):
        a = np.uint32(a + words[i] + b)
        b = np.uint32(b + words[i + 1] + a)
    return a, b


def read_write_ahead(path: Path) -> WriteAhead:
    """Look at every frame of a write-ahead file.

    SQLite passes over what comes after the first frame that fails its checksum, as it has to: an append that a crash
    cut off looks like that. An append that is followed by others was whole, so what is in it or after it is lost.
    """
    try:
        content = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        return WriteAhead(0)
    if len(content) < _WAL_HEADER:
        return WriteAhead(0, unfinished=len(content) > 0)
    magic, _, page, _, *salts_and_sums = (int(n) for n in content[:_WAL_HEADER].view(">u4"))
    order = ">u4" if magic & 1 else "<u4"

    def sums(part: np.ndarray, before: tuple[int, int]) -> tuple[int, int]:
        words = part.view(order).astype(np.uint32)
        one, other = _sums(words, np.uint32(before[0]), np.uint32(before[1]))
        return int(one), int(other)

    before = sums(content[:24], (0, 0))
    if magic & ~1 != _WAL_MAGIC or before != tuple(salts_and_sums[2:]) or not 512 <= page <= 65_536:
        return WriteAhead(0, f"its header is damaged: {len(content)} bytes that it has are passed over")
    salts, whole, size = tuple(salts_and_sums[:2]), _WAL_HEADER, _FRAME_HEADER + page
    at, more = _WAL_HEADER, False
    while at + size <= len(content):
        frame = content[at : at + size]
        number, of_commit, salt_0, salt_1, *says = (int(n) for n in frame[:_FRAME_HEADER].view(">u4"))
        after = sums(np.concatenate([frame[:8], frame[_FRAME_HEADER:]]), before)
        if after != tuple(says) or (salt_0, salt_1) != salts or number == 0:
            if after == tuple(says) and number:
                return WriteAhead(whole, _damaged_at(at))
            break
        before, at, more = after, at + size, True
        if of_commit:
            whole, more = at, False
    for later in range(at, len(content) - size + 1, size):
        if tuple(int(n) for n in content[later + 8 : later + 16].view(">u4")) == salts:
            return WriteAhead(whole, _damaged_at(at))
    return WriteAhead(whole, unfinished=more)


def _damaged_at(at: int) -> str:
    return f"its frame at byte {at} fails its checksum: this append and what was appended after it are passed over"


# -- pages


def _carved(path: Path, ahead: Path) -> Iterator[bytes]:
    """Yield what begins like a record in cells of the leaves of tables. Source: https://sqlite.org/fileformat2.html"""
    content = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    written = np.fromfile(ahead, np.uint8) if ahead.exists() else np.empty(0, np.uint8)
    size = int.from_bytes(content[16:18].tobytes(), "big")
    if len(written) >= _WAL_HEADER:
        size = int.from_bytes(written[8:12].tobytes(), "big")
    size = 65_536 if size == 1 else size
    if size < 512 or size & (size - 1):
        size = PAGE_BYTES
    pages = {n + 1: content[at : at + size] for n, at in enumerate(range(0, len(content) - size + 1, size))}
    salts = written[16:24].tobytes()
    for at in range(_WAL_HEADER, len(written) - _FRAME_HEADER - size + 1, _FRAME_HEADER + size):
        if written[at + 8 : at + 16].tobytes() == salts:
            number = int.from_bytes(written[at : at + 4].tobytes(), "big")
            pages[number] = written[at + _FRAME_HEADER : at + _FRAME_HEADER + size]
    for number in sorted(pages):
        page = pages[number].tobytes()
        header = 100 if number == 1 else 0
        if page[header] != _TABLE_LEAF:
            continue
        cells = int.from_bytes(page[header + 3 : header + 5], "big")
        for cell in range(min(cells, size // 4)):
            at = int.from_bytes(page[header + 8 + 2 * cell : header + 10 + 2 * cell], "big")
            payload = _payload(pages, page, at, size)
            if (start := payload.find(MAGIC)) >= 0:
                yield payload[start:]


def _payload(pages: dict[int, Any], page: bytes, at: int, size: int) -> bytes:
    """Return the payload of a cell, with what overflows its page."""
    length, at = _varint(page, at)
    _, at = _varint(page, at)
    local, least = length, (size - 12) * 32 // 255 - 23
    if length > size - 35:
        local = least + (length - least) % (size - 4)
        local = local if local <= size - 35 else least
    parts = [page[at : at + local]]
    following = int.from_bytes(page[at + local : at + local + 4], "big") if local < length else 0
    left = min(length - local, size * len(pages))
    while left > 0 and following in pages:
        content = pages[following].tobytes()
        parts.append(content[4 : 4 + left])
        left -= size - 4
        following = int.from_bytes(content[:4], "big")
    return b"".join(parts)


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """Return a number of up to 8 times 7 bits, and what comes after it."""
    value = 0
    for byte in page[at : at + 8]:
        value, at = value << 7 | byte & 0x7F, at + 1
        if byte < 0x80:
            break
    return value, at
