"""The log of a shard as another process reads it, whether the shard runs meanwhile or not."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from diskcache.core import MODE_RAW

from millpond.feature_actors.log.record import Decoded, LogDamaged, decode
from millpond.feature_actors.log.schemas import Schemas

__all__ = ["LogReader"]

_WAIT_S = 60.0


class LogReader:
    """What the log in `directory` holds at the moment of opening: what is appended or truncated later is not seen.

    first, next: offsets from and to which it goes. It belongs to the thread that made it, and is to be closed soon:
    SQLite cannot write over what it still reads. Raises `LogDamaged` if there is no log.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._schemas = Schemas(directory / "schemas")
        path = directory / "cache.db"
        try:
            if not path.is_file():
                raise sqlite3.OperationalError("there is no such file")
            self._database = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
            self._database.execute("PRAGMA query_only = 1")
            self._database.execute("BEGIN")
            # Two questions, each of which the index answers; both in one look at every record.
            ends = "SELECT (SELECT MIN(key) FROM Cache), (SELECT MAX(key) FROM Cache)"
            ((first, last),) = self._database.execute(ends).fetchall()
        except sqlite3.Error as error:
            raise LogDamaged(f"log: `{directory}` cannot be read: {error}") from None
        self.first, self.next = (0, 0) if first is None else (int(first), int(last) + 1)

    def read(self, first: int | None = None) -> Iterator[tuple[int, Decoded]]:
        """Yield each record from an offset on, in order. Raises `LogDamaged`."""
        begin = self.first if first is None else max(first, self.first)
        try:
            rows = self._database.execute("SELECT key, mode, value FROM Cache WHERE key >= ? ORDER BY key", (begin,))
            for expected, (offset, mode, value) in zip(range(begin, self.next), rows, strict=True):
                if offset != expected or mode != MODE_RAW or not isinstance(value, bytes):
                    raise LogDamaged(
                        f"log: no record at offset {expected}; run `millpond check` on the stopped cluster's directory"
                    )
                yield offset, decode(value, offset, self._schemas.get)
        except (sqlite3.Error, ValueError) as error:
            raise LogDamaged(f"log: `{self._directory}` cannot be read: {error}") from None

    def close(self) -> None:
        self._database.close()
