"""The folder of a running cluster's memory on this node: control pages and tiles of its shards.

It lies in /dev/shm, or where that is too small (containers: 64 MB) in the data directory. A lock in it tells whether
its cluster still lives: the kernel gives the lock back however a process ends, so what a crash left behind is found
and removed by the next start of any cluster of the same user.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path
from typing import TextIO

from millpond.feature_actors.errors import Unavailable

__all__ = ["MemoryFolder"]

logger = logging.getLogger("millpond.memory")

_SHARED = Path("/dev/shm")
#: With less than that free, memory goes to the data directory.
SHARED_FREE_BYTES_MIN = 256 << 20
_TRIES = 100


class MemoryFolder:
    """Make the folder of a cluster's memory and hold it until `remove`.

    cluster_id: of the manifest. data_dir: of the cluster, for where /dev/shm is too small. where: "auto", or the
    directory to make it in. Raises `Unavailable` if a running cluster has it.
    """

    def __init__(self, cluster_id: str, data_dir: Path, where: str = "auto") -> None:
        parent = Path(where).absolute() if where != "auto" else _shared_or(data_dir / "memory")
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        prefix = f"millpond-{os.getuid()}-"
        for other in parent.glob(f"{prefix}*"):
            _remove_if_abandoned(other)
        self.path = parent / f"{prefix}{cluster_id[:16]}"
        self._lock = self._hold()

    def _hold(self) -> TextIO:
        for _ in range(_TRIES):
            self.path.mkdir(mode=0o700, exist_ok=True)
            if self.path.lstat().st_uid != os.getuid() or self.path.is_symlink():
                break
            try:
                lock = open(self.path / "lock", "a", opener=_private)  # noqa: SIM115
            except FileNotFoundError:  # taken away just now
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock.fileno()).st_ino == (self.path / "lock").stat().st_ino:
                    return lock
            except (BlockingIOError, FileNotFoundError):
                pass
            lock.close()
        raise Unavailable(f"memory: `{self.path}` is in use by a running cluster, or not ours; stop that one")

    def remove(self) -> None:
        """Take the folder away. Who has its files mapped keeps them."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _shared_or(fallback: Path) -> Path:
    try:
        room = os.statvfs(_SHARED)
        free = room.f_bavail * room.f_frsize
    except OSError:
        free = 0
    if free >= SHARED_FREE_BYTES_MIN and os.access(_SHARED, os.W_OK):
        return _SHARED
    logger.warning(
        "%s has %d MB free, fewer than %d: features go to files in %s, which is slower when memory is short; make it "
        "larger, or set `memory_dir`", _SHARED, free >> 20, SHARED_FREE_BYTES_MIN >> 20, fallback,
    )  # fmt: skip
    return fallback


def _remove_if_abandoned(folder: Path) -> None:
    try:
        if folder.is_symlink() or folder.lstat().st_uid != os.getuid():
            return
        with open(folder / "lock", "a", opener=_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            logger.warning("removing the memory that a killed cluster left in %s", folder)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # in use, or gone, or being made just now
        return


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
