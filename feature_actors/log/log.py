"""The log of one shard: records appended and synced together, read back in order. Storage is a `diskcache.Cache`."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import diskcache

from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.log.record import (
    Decoded,
    EventsRecord,
    LogDamaged,
    LostRecord,
    OfferRecord,
    Record,
    TakeRecord,
    decode,
    encode,
)
from millpond.feature_actors.log.schemas import Schemas
from millpond.feature_actors.raw_disk import NEVER_A_FILE, RawDisk

__all__ = ["Durability", "Log", "LogFull", "mended_log", "write_log"]

#: What an acknowledged event survives: "sync" the loss of power, "process" the end of any process, "none" nothing.
Durability = Literal["sync", "process", "none"]

_SYNCHRONOUS = {"sync": 2, "process": 0}  # SQLite's FULL and OFF
#: Measured: of 4, 8, 16 and 32 KB the one that takes least processor time for records of 2 to 60 KB, and little more
#: than the best for 600 KB.
PAGE_BYTES = 8_192
#: What is appended is not read again soon: a MB of pages for each thread that works with the log is as quick as 8 MB,
#: but for appends of many MB, which take a tenth longer.
_CACHE_PAGES = 128
#: What one step of a truncation deletes: some milliseconds.
_TRUNCATE_RECORDS, _TRUNCATE_BYTES = 64, 1 << 20
#: A checkpoint holds up the append that starts it: small ones, often.
_CHECKPOINT_PAGES = 512


class LogFull(Unavailable):
    """The disk has no room for a record."""

    code = "log_full"


def _is_full(error: BaseException | None) -> bool:
    """Return whether a failure is, or comes of, a disk without room. Where the pages of a large transaction do not
    fit before it ends, SQLite takes it back itself, and diskcache fails at taking it back once more."""
    while error is not None:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__context__
    return False


class _LogDisk(RawDisk):
    key_type, subject, keys_are, damaged = int, "log", "offsets", LogDamaged


def _make_pages(path: Path) -> None:
    """Make an empty database; once it is there, the size of its pages is fixed."""
    if not path.exists():
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            database.execute("VACUUM")


class Log:
    """Open the log in `directory`, or make it. One process writes to a log, one append or truncation at a time.

    free_bytes_min: with less left on the disk nothing is appended.
    Raises `LogDamaged` if what is there is no log, or its offsets have gaps, or it is to be replaced by a mended one.
    """

    def __init__(
        self, directory: Path, durability: Literal["sync", "process"] = "sync", free_bytes_min: int = 0
    ) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory, self._free_bytes_min = directory, free_bytes_min
        if (mended_log(directory) / "cache.db").exists():
            raise LogDamaged(
                f"log: `millpond check --fix` was broken off when it had written `{directory}` anew; run it again"
            )
        try:
            _make_pages(directory / "cache.db")
            self._cache = diskcache.Cache(
                str(directory),
                disk=_LogDisk,
                timeout=60,
                eviction_policy="none",
                cull_limit=0,
                statistics=0,
                size_limit=1 << 62,
                sqlite_auto_vacuum=0,
                sqlite_cache_size=_CACHE_PAGES,
                sqlite_wal_autocheckpoint=_CHECKPOINT_PAGES,
                sqlite_synchronous=_SYNCHRONOUS[durability],
                disk_min_file_size=NEVER_A_FILE,
            )
            first = next(self._cache.iterkeys(), 0)
            last = next(self._cache.iterkeys(reverse=True), -1)
        except (sqlite3.DatabaseError, UnicodeDecodeError, diskcache.Timeout) as error:
            if _is_full(error):
                raise LogFull(
                    f"log: no room on the disk of `{directory}` to open it; free some", retry_after_ms=10_000
                ) from None
            raise LogDamaged(f"log: `{directory}` cannot be opened: {error}; restore it from a copy") from None
        #: Where the log begins, and where the next record goes.
        self.first, self.next = first, last + 1
        if len(self._cache) != self.next - self.first:
            raise LogDamaged(
                f"log: `{directory}` holds {len(self._cache)} records between offsets {first} and {last}; restore it "
                "from a copy"
            )
        self._schemas = Schemas(directory / "schemas")

    def append(self, records: Sequence[Record], settled: int = 0) -> list[int]:
        """Append records in one transaction and sync it; return the offset of each. settled as of `Decoded`.

        Raises `LogFull`; nothing has been written then. Any other failure must end the process: what the disk holds is
        not known.
        """
        offsets = list(range(self.next, self.next + len(records)))
        self._check_room()
        try:
            contents = [
                encode(
                    record,
                    at,
                    settled,
                    "" if isinstance(record, TakeRecord | LostRecord) else self._schemas.name_of(record.batch.schema),
                )
                for record, at in zip(records, offsets, strict=True)
            ]
            with self._cache.transact():
                for at, content in zip(offsets, contents, strict=True):
                    self._cache.set(at, content)
        except (sqlite3.OperationalError, OSError) as error:
            if _is_full(error):
                raise self._full("; events are taken again then") from None
            raise
        self.next += len(records)
        return offsets

    def _full(self, more: str = "") -> LogFull:
        return LogFull(f"log: no room on the disk of `{self._directory}`; free some{more}", retry_after_ms=10_000)

    def _check_room(self) -> None:
        if self._free_bytes_min:
            disk = os.statvfs(self._directory)
            if (free := disk.f_bavail * disk.f_frsize) < self._free_bytes_min:
                raise LogFull(
                    f"log: {free >> 20} MB are left on the disk; events are taken with at least "
                    f"{self._free_bytes_min >> 20} MB (setting `disk_free_mb_min`); free some",
                    retry_after_ms=10_000,
                )

    def get(self, offset: int) -> Decoded:
        """Return the record at an offset. Raises `LogDamaged`."""
        content = self._cache.get(offset)
        if content is None:
            raise LogDamaged(
                f"log: no record at offset {offset}; run `millpond check` on the stopped cluster's directory"
            )
        return decode(content, offset, self._schemas.get)

    def read(self, first: int | None = None) -> Iterator[tuple[int, Decoded]]:
        """Yield each record from an offset on, in order. Raises `LogDamaged`."""
        for offset in range(self.first if first is None else max(first, self.first), self.next):
            yield offset, self.get(offset)

    def bytes_from(self, offset: int) -> int:
        """Return how many bytes the records from an offset on have."""
        ((size,),) = self._cache._sql("SELECT COALESCE(SUM(LENGTH(value)), 0) FROM Cache WHERE key >= ?", (offset,))
        return int(size)

    def rewrite(self, records: Sequence[tuple[int, Decoded]]) -> None:
        """Put other records in place of some, in one transaction, and sync. What they were is overwritten, but for what
        the write-ahead file has, and free pages from before: see `vacuum`. Raises `LogFull`: nothing has been written
        then."""
        self._check_room()
        try:
            self._cache._sql("PRAGMA secure_delete = 1")
            with self._cache.transact():
                for offset, (record, settled) in records:
                    assert isinstance(record, EventsRecord | OfferRecord)
                    schema = self._schemas.name_of(record.batch.schema)
                    self._cache.set(offset, encode(record, offset, settled, schema))
        except (sqlite3.OperationalError, OSError) as error:
            if _is_full(error):
                raise self._full() from None
            raise

    def vacuum(self) -> None:
        """Write the database anew, without what was rewritten or truncated, through the write-ahead file. Appends wait
        meanwhile. Raises `LogFull`."""
        try:
            self._cache._sql("VACUUM")
        except sqlite3.OperationalError as error:
            if _is_full(error):
                raise self._full() from None
            raise

    def empty_write_ahead(self) -> bool:
        """Bring all that was written ahead to its place, and leave nothing of it in that file. Returns False if another
        process reads the log just now, which is not waited for: appends would have to wait, too. Call it again then."""
        ((timeout_ms,),) = self._cache._sql("PRAGMA busy_timeout").fetchall()
        self._cache._sql("PRAGMA busy_timeout = 0")
        try:
            ((busy, _, _),) = self._cache._sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            self._cache._sql(f"PRAGMA busy_timeout = {timeout_ms}")
        return not busy

    def truncate(self, before: int) -> bool:
        """Delete some of the records before an offset, so few that an append that waits for it does not wait long.

        The last record always stays: it says where the next one goes. Returns whether there are more.
        """
        end, size, offset = min(before, self.next - 1), 0, self.first
        with self._cache.transact():
            while offset < end and offset - self.first < _TRUNCATE_RECORDS and size < _TRUNCATE_BYTES:
                size += len(self._cache.get(offset, default=b""))
                del self._cache[offset]
                offset += 1
        self.first = offset
        return offset < end

    def close(self) -> None:
        self._cache.close()


def mended_log(directory: Path) -> Path:
    """Return the folder where a log that was written anew, and is whole, waits to be put in the place of another."""
    return directory.with_name(f"{directory.name}.mended")


def write_log(directory: Path, contents: Iterable[tuple[int, bytes]]) -> None:
    """Write a new log of records as they are, each at its offset, and sync it. The schemas stay where they are."""
    log = Log(directory, "sync")
    batch: list[tuple[int, bytes]] = []

    def write() -> None:
        with log._cache.transact():
            for offset, content in batch:
                log._cache.set(offset, content)
        batch.clear()

    for offset, content in contents:
        batch.append((offset, content))
        if len(batch) >= _TRUNCATE_RECORDS or sum(len(c) for _, c in batch) >= _TRUNCATE_BYTES:
            write()
    write()
    log._cache._sql("PRAGMA wal_checkpoint(TRUNCATE)")
    log.close()
