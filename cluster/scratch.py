"""Temporary folders that live as long as the process that made them. The kernel gives the lock of a killed one back: by
that what it left is found, and taken away by whoever makes such a folder next."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.lock import FileLock, LockHeld

__all__ = ["Scratch", "remove_abandoned"]

_LOG = logging.getLogger("millpond.cluster")
#: A name that nobody else's folders have in them.
_LOCK = ".millpond-lock"
_TRIES = 100


class Scratch:
    """Make a folder, of this user alone, whose name begins with `prefix`; hold it until `remove`, or the process ends.

    root: where; the system's folder for temporaries if None.
    """

    def __init__(self, prefix: str, root: Path | None = None) -> None:
        for _ in range(_TRIES):
            # mkdtemp makes it with mode 0700 and a name that nobody can guess beforehand.
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=root)).resolve()
            try:
                self._lock = FileLock(self.path / _LOCK)
                return
            except (LockHeld, FileNotFoundError):  # taken for one that was left, just now
                continue
        raise Unavailable(f"scratch: `{self.path.parent}` is cleared all the time; is another process stuck?")

    def remove(self) -> None:
        """Take the folder away. Harmless when it is gone."""
        _remove(self.path, self._lock)


def remove_abandoned(
    root: Path,
    prefix: str,
    is_wanted: Callable[[Path], bool] = lambda _: False,
    before: Callable[[Path], None] = lambda _: None,
) -> None:
    """Take away what `Scratch` of processes that have ended has left in `root`.

    is_wanted: whether one is to stay all the same. before: what is to be done with one first.
    """
    for folder in root.glob(f"{prefix}*"):
        try:
            if folder.is_symlink() or folder.lstat().st_uid != os.getuid() or not (folder / _LOCK).is_file():
                continue
            if is_wanted(folder):
                continue
            lock = FileLock(folder / _LOCK)
        except (LockHeld, OSError):  # in use, or gone
            continue
        _LOG.warning("clearing away what a killed process left in %s", folder)
        before(folder)
        _remove(folder, lock)


def _remove(folder: Path, lock: FileLock) -> None:
    """Remove a folder, its lock last: what is left when that is broken off, or fails, is found again by it."""
    try:
        for path in folder.iterdir():
            if path.name == _LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        is_empty = [path.name for path in folder.iterdir()] == [_LOCK]
    except OSError:
        is_empty = False
    lock.release(keep=not is_empty)
    if is_empty:
        with contextlib.suppress(OSError):  # something came into it just now
            folder.rmdir()
