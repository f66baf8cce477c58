"""A lock file: one process at a time holds it, and who comes too late is told which.

The kernel gives the lock back however its holder ends, also when it is killed; what the file says is for messages only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["FileLock", "LockHeld", "is_held", "is_lock_text"]

_POLL_S = 0.02
_BYTES_MAX = 4_096


class LockHeld(Exception):
    """Another process holds the lock. holder: what it says of itself, {} if that cannot be read."""

    def __init__(self, holder: dict[str, Any]) -> None:
        super().__init__("held")
        self.holder = holder

    @property
    def who(self) -> str:
        """Which process it is, and since when."""
        if not self.holder:
            return "a process that does not say which"
        return f"process {self.holder['pid']}, since {self.holder.get('since', 'a time that it does not say')}"


class FileLock:
    """Hold the file `path`, which is made, until `release` or the end of this process.

    about: what others are told of the holder, besides its process id. wait_s: how long to wait for it.
    Raises `LockHeld`, or `OSError` if there cannot be such a file.
    """

    def __init__(self, path: Path, wait_s: float = 0.0, **about: Any) -> None:
        self.path = path
        self._about = {"pid": os.getpid(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", **about}
        deadline = time.monotonic() + wait_s
        while (fd := self._taken(last=time.monotonic() >= deadline)) is None:
            time.sleep(_POLL_S)
        self._fd: int | None = fd
        self.say()

    def _taken(self, *, last: bool) -> int | None:
        """Return the locked file, or None if another has it, or had it and took it away just now."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == self.path.stat().st_ino:
                return fd
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if last:
                holder = _holder(os.pread(fd, _BYTES_MAX, 0)) or {}
                os.close(fd)
                raise LockHeld(holder) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def say(self, **about: Any) -> None:
        """Tell others more of the holder."""
        assert self._fd is not None
        self._about |= about
        text = json.dumps(self._about).encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))

    def release(self, *, keep: bool = False) -> None:
        """Take the file away, or `keep` it, and let others have it. Harmless when it has been released."""
        if self._fd is not None:
            if not keep:
                with contextlib.suppress(OSError):  # it stays then, and says who had it
                    self.path.unlink()
            os.close(self._fd)
            self._fd = None


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file of this path, which is not made."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def is_lock_text(text: bytes) -> bool:
    """Whether that is what a lock of ours holds, or one that was taken just now."""
    return not text or _holder(text) is not None


def _holder(text: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(text)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and "pid" in holder else None
