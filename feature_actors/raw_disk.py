"""What a `diskcache.Cache` of ours keeps: raw bytes under keys of one type, all in SQLite, and nothing pickled."""

from __future__ import annotations

import sqlite3
from typing import Any, ClassVar

import diskcache
from diskcache.core import MODE_RAW

from millpond.feature_actors.errors import MillpondError

__all__ = ["NEVER_A_FILE", "RawDisk"]

#: For `disk_min_file_size`: diskcache does not sync the files that it puts large values into.
NEVER_A_FILE = 1 << 40


class RawDisk(diskcache.Disk):  # type: ignore[misc]
    """Values are bytes and keys of `key_type`, stored as they are. diskcache would pickle what is not, and unpickle
    what it finds; here that raises `damaged`."""

    key_type: ClassVar[type] = str
    subject: ClassVar[str]
    keys_are: ClassVar[str]
    damaged: ClassVar[type[MillpondError]]

    def put(self, key: Any) -> tuple[Any, bool]:
        assert type(key) is self.key_type
        return key, True

    def get(self, key: Any, raw: bool) -> Any:
        if not raw or type(key) is not self.key_type:
            raise self.damaged(
                f"{self.subject}: a key is {type(key).__name__}; keys are {self.keys_are}; restore it from a copy"
            )
        return key

    def store(self, value: Any, read: bool, key: Any = None) -> tuple[int, int, None, Any]:
        assert type(value) is bytes
        return 0, MODE_RAW, None, sqlite3.Binary(value)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> bytes:
        if mode != MODE_RAW or not isinstance(value, bytes | memoryview):
            raise self.damaged(
                f"{self.subject}: a value is not of raw bytes; nothing else is read; restore it from a copy"
            )
        return bytes(value)
