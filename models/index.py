"""The index of a registry: named values in one `diskcache.Cache`, shared by processes. Values are JSON, never pickled.

What is read inside `moment` is of one moment; what is written inside `change` is there altogether or not at all,
whenever the process is killed, is synced when it ends, and makes the generation one larger if it changed anything.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diskcache
import msgspec

from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.raw_disk import NEVER_A_FILE, RawDisk

__all__ = ["Change", "Index", "RegistryDamaged"]

T = TypeVar("T")

_FULL = 2  # `synchronous` of SQLite
#: How long a scrub waits for who reads just now: nobody can write meanwhile.
_READERS_MS = 100


class RegistryDamaged(MillpondError):
    """The registry's own files are not what was written: restore them from a copy."""

    code, status = "registry_damaged", 500


class _IndexDisk(RawDisk):
    key_type, subject, keys_are, damaged = str, "registry", "names", RegistryDamaged


class Index:
    """Open the index in a folder, or make it.

    wait_s: how long a change waits for that of another process.
    Raises `RegistryDamaged` if what is there is none, `Unavailable` if it cannot be opened now.
    """

    def __init__(self, folder: Path, wait_s: float = 60.0) -> None:
        self._folder, self._wait_s = folder, wait_s
        folder.mkdir(mode=0o700, exist_ok=True)
        with self._told():
            self._cache = diskcache.Cache(
                str(folder),
                disk=_IndexDisk,
                timeout=wait_s,
                eviction_policy="none",
                cull_limit=0,
                statistics=0,
                size_limit=1 << 62,
                sqlite_auto_vacuum=0,
                sqlite_synchronous=_FULL,
                disk_min_file_size=NEVER_A_FILE,
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in our words what SQLite raises."""
        try:
            yield
        except diskcache.Timeout:
            raise Unavailable(
                f"registry: `{self._folder}` is being changed by another process, or its disk cannot be written; "
                "nothing has been changed; try again",
                retry_after_ms=1_000,
            ) from None
        except sqlite3.OperationalError as error:
            raise Unavailable(
                f"registry: `{self._folder}` cannot be used: {error}; nothing has been changed; mend that, try again",
                retry_after_ms=1_000,
            ) from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise RegistryDamaged(
                f"registry: `{self._folder}` cannot be read: {error}; restore it from a copy, or move the registry "
                "away: `millpond up` with the definition files makes another"
            ) from None

    @contextmanager
    def moment(self) -> Iterator[None]:
        """Read as of one moment, whatever others write meanwhile."""
        with self._told():
            self._cache._sql("BEGIN")
            try:
                yield
            finally:
                self._cache._sql("COMMIT")

    @contextmanager
    def change(self) -> Iterator[Change]:
        """Write all of it or, if an exception leaves, nothing; nobody else writes meanwhile."""
        with self._told():
            try:
                with self._cache.transact():
                    change = Change(self)
                    yield change
                    if change.made:
                        self.set("generation", change.generation)
            finally:
                # A commit that failed, as on a full disk, may have left the transaction open.
                if self._cache._con.in_transaction:
                    self._cache._sql("ROLLBACK")

    def generation(self) -> int:
        """Return the number of changes so far."""
        return self.get("generation", int) or 0

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return the value of a key, or None. Raises `RegistryDamaged`."""
        with self._told():
            content = self._cache.get(key)
        return None if content is None else self._decoded(key, content, kind)

    def under(self, prefix: str, kind: type[T]) -> dict[str, T]:
        """Return the values of all keys that begin with a prefix, by the rest of the key. The prefix ends in `/`."""
        assert prefix.endswith("/")
        disk = self._cache.disk
        with self._told():
            rows = self._cache._sql(
                "SELECT key, raw, mode, filename, value FROM Cache WHERE key >= ? AND key < ? ORDER BY key",
                (prefix, f"{prefix[:-1]}0"),  # `0` comes after `/`
            ).fetchall()
        return {
            str(disk.get(key, raw)).removeprefix(prefix): self._decoded(key, disk.fetch(mode, name, value, False), kind)
            for key, raw, mode, name, value in rows
        }

    def set(self, key: str, value: Any) -> None:
        """Write a value that is not part of a change."""
        with self._told():
            self._cache.set(key, msgspec.json.encode(value))

    def delete(self, key: str) -> None:
        """Delete a value that is not part of a change, if it is there."""
        with self._told():
            self._cache.delete(key)

    def keys(self) -> list[str]:
        """Return every key. Raises `RegistryDamaged` if one is not ours."""
        with self._told():
            return list(self._cache.iterkeys())

    def scrub(self) -> bool:
        """Write the database anew, so that none of its files has what was deleted or replaced. Returns False if another
        process reads it just now: call it again then."""
        with self._told():
            self._cache._sql("VACUUM")
            self._cache._sql(f"PRAGMA busy_timeout = {_READERS_MS}")
            try:
                ((busy, _, _),) = self._cache._sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                self._cache._sql(f"PRAGMA busy_timeout = {int(self._wait_s * 1_000)}")
        return not busy

    def close(self) -> None:
        self._cache.close()

    def _decoded(self, key: str, content: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.DecodeError, MillpondError) as error:
            raise RegistryDamaged(
                f"registry: the value of `{key}` cannot be read: {error}; restore `{self._folder}` from a copy"
            ) from None


class Change:
    """What is being written to an index. generation: the one that it makes, if it is `made`."""

    def __init__(self, index: Index) -> None:
        self._index, self._before = index, index.generation()
        self.made = False

    @property
    def generation(self) -> int:
        return self._before + self.made

    @property
    def next_generation(self) -> int:
        return self._before + 1

    def set(self, key: str, value: Any) -> None:
        """Write a value; it is no change if it is there already."""
        if self._index.get(key, type(value)) != value:
            self._index.set(key, value)
            self.made = True

    def delete(self, key: str) -> None:
        self._index.delete(key)
        self.made = True
