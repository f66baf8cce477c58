"""The memory of a shard: a file of mode 0600 that its one writer and all readers of the node have mapped.

A file is as long as the shard may ever grow (its address space) and holds blocks for what is used, allocated before
they are touched: writing to a hole of a full tmpfs would kill the process. It is never truncated and never shrinks, so
whatever address a reader takes from it, however old or torn, lies in mapped memory once it is below `limit`. From 2 MB
on it grows by huge pages, where the kernel has them.

    <folder>/<shard>.control       one page: which epoch's tiles to read, and the process that writes them
    <folder>/<shard>-<epoch>.tiles

A reader looks at the control page on each read. The tiles of a dead writer stay readable until its successor has
published its own.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.tiles.mapping import HUGE_BYTES, Mapping

__all__ = ["Control", "Memory", "MemoryFull"]

Words = npt.NDArray[np.int64]

WORD_BYTES = 8
#: Tiles name each other by 32-bit word addresses.
WORDS_MAX = 1 << 32
MEMORY_BYTES_MAX = WORDS_MAX * WORD_BYTES

# Words of a memory's header; the slots of the tables follow, see `structure`.
M_MAGIC, M_LIMIT, M_USED, M_SPARE, M_NEWEST_ARRIVAL, M_NEWEST_RECEIVED, M_SLOTS, M_SEED, M_LAYOUT = range(9)
MEMORY_HEADER_WORDS = 16
MEMORY_MAGIC = int.from_bytes(b"millp_01", "little")

# Words of a control page.
C_MAGIC, C_EPOCH, C_PID, C_PID_TICKS = range(4)
CONTROL_MAGIC = int.from_bytes(b"millc_01", "little")
_PAGE = 4096

_GROWTH_MIN_BYTES, _GROWTH_MAX_BYTES = 256 << 10, 8 << 20
#: With less than that to spare on the file system, room is made before events are applied, not meanwhile.
_SPARE_BYTES_MIN = 256 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG)


class MemoryFull(Unavailable):
    """No memory is left for tiles: the limit of the configuration, or the file system's."""

    code = "memory_full"


class Memory:
    """A mapped file of words. `address` is where it begins in this process."""

    def __init__(self, descriptor: int, *, writable: bool, name: str) -> None:
        self.name = name
        self._descriptor = descriptor
        self._map = Mapping(descriptor, writable=writable)
        self._populated = 0
        #: All words, int64; what lies above `limit_words` must not be touched.
        self.words: Words = self._map.words
        self.floats: npt.NDArray[np.float64] = self.words.view(np.float64)
        self.halves: npt.NDArray[np.uint32] = self.words.view(np.uint32)
        self.address = self._map.address

    @classmethod
    def create(cls, path: Path | None, bytes_max: int) -> Memory:
        """Make an empty memory: a new file at `path`, or one without a name that goes with this process."""
        length = min(bytes_max, MEMORY_BYTES_MAX) // _PAGE * _PAGE
        if path is None:
            descriptor = os.memfd_create("millpond-tiles", os.MFD_CLOEXEC)
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o600)
        try:
            os.ftruncate(descriptor, length)
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor, writable=True, name=str(path or "memory of this process"))

    @classmethod
    def open(cls, path: Path) -> Memory:
        """Map the memory at `path` to read from it."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), writable=False, name=str(path))

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", -1)
        if descriptor >= 0:
            os.close(descriptor)
            self._descriptor = -1

    @property
    def limit_words(self) -> int:
        return int(self.words[M_LIMIT])

    @property
    def bytes_max(self) -> int:
        return self._map.length

    @property
    def allocated_bytes(self) -> int:
        """What the file takes of its file system."""
        return os.fstat(self._descriptor).st_blocks * 512

    def has_room_for(self, words: int) -> bool:
        """Say whether the memory could grow by so many words, with some to spare."""
        system = os.fstatvfs(self._descriptor)
        free = system.f_bavail * system.f_frsize if system.f_blocks else self.bytes_max
        wanted = words * WORD_BYTES
        return self.limit_words * WORD_BYTES + wanted <= self.bytes_max and free >= wanted + _SPARE_BYTES_MIN

    def grow(self, words: int) -> None:
        """Allocate room for so many words more, and some ahead.

        Raises `MemoryFull`; nothing has changed then.
        """
        limit = self.limit_words * WORD_BYTES
        ahead = min(max(limit // 32, _GROWTH_MIN_BYTES), _GROWTH_MAX_BYTES)
        wanted = limit + max(words * WORD_BYTES, ahead)
        if wanted >= HUGE_BYTES:
            wanted = -(-wanted // HUGE_BYTES) * HUGE_BYTES
        least, end = (min(-(-w // _PAGE) * _PAGE, self.bytes_max) for w in (limit + words * WORD_BYTES, wanted))
        if least < limit + words * WORD_BYTES:
            raise MemoryFull(
                f"tiles: {limit} bytes are in use in `{self.name}`; allowed are {self.bytes_max}; raise "
                "`memory_mb_max`, or add shards",
                retry_after_ms=10_000,
            )
        try:
            end = self._allocate(limit, (end, least))
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise MemoryFull(
                f"tiles: no room for {least - limit} more bytes in `{self.name}`: {error.strerror}; free some, or set "
                "`memory_dir` to a larger file system",
                retry_after_ms=10_000,
            ) from None
        self._populate(end // WORD_BYTES)
        self.words[M_LIMIT] = end // WORD_BYTES

    def _allocate(self, limit: int, ends: tuple[int, int]) -> int:
        """Allocate from `limit` to the first of `ends` for which there is room; return it."""
        start, end = (at // HUGE_BYTES * HUGE_BYTES for at in (limit, ends[0]))
        if start < end:
            self._take_huge_pages(start, end)
        for end in ends:
            try:
                os.posix_fallocate(self._descriptor, limit, end - limit)
                return end
            except OSError as error:
                if error.errno not in _NO_ROOM or end == ends[-1]:
                    raise
        raise AssertionError

    def _take_huge_pages(self, start: int, end: int) -> None:
        """Allocate huge pages, if there are some; each has to have a page of the file in it before it can be made."""
        with contextlib.suppress(OSError):  # there is no room: so it will be told of small pages
            for at in range(start, end, HUGE_BYTES):
                os.posix_fallocate(self._descriptor, at, _PAGE)
            self._map.huge(start, end)

    def populate(self) -> None:
        """Map what has been allocated since the last call, so that no read waits for a page."""
        if self._populated < (limit := self.limit_words):
            self._populate(limit)

    def _populate(self, limit_words: int) -> None:
        start, end = self._populated * WORD_BYTES // _PAGE * _PAGE, limit_words * WORD_BYTES // _PAGE * _PAGE
        if end > start:
            self._map.populate(start, end)
        self._populated = limit_words


class Control:
    """The control page of one shard."""

    def __init__(self, folder: Path, shard: int, *, writable: bool = False) -> None:
        self._folder, self._shard = folder, shard
        path = folder / f"{shard:03d}.control"
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if writable and os.fstat(descriptor).st_size < _PAGE:
                os.posix_fallocate(descriptor, 0, _PAGE)
            if os.fstat(descriptor).st_size < _PAGE:
                raise FileNotFoundError(f"{path} is not written yet")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self.words: Words = np.frombuffer(mmap.mmap(descriptor, _PAGE, mmap.MAP_SHARED, access), np.int64)
        finally:
            os.close(descriptor)
        self.address = self.words.ctypes.data

    @property
    def epoch(self) -> int:
        """The epoch whose tiles are to be read; 0 before the first."""
        return int(self.words[C_EPOCH]) if self.words[C_MAGIC] == CONTROL_MAGIC else 0

    @property
    def writer_lives(self) -> bool:
        """Whether the process that wrote the tiles is still there."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return started_ticks(int(self.words[C_PID])) == int(self.words[C_PID_TICKS])
        return False

    def tiles_path(self, epoch: int) -> Path:
        return self._folder / f"{self._shard:03d}-{epoch}.tiles"

    def publish(self, epoch: int) -> None:
        """Let readers read the tiles of this process from now on, and take away those of its predecessors.

        Who has them mapped keeps them until it has moved.
        """
        pid = os.getpid()
        self.words[C_PID], self.words[C_PID_TICKS] = pid, started_ticks(pid)
        self.words[C_MAGIC] = CONTROL_MAGIC
        self.words[C_EPOCH] = epoch  # the last: whoever sees it sees the rest
        for path in self._folder.glob(f"{self._shard:03d}-*.tiles"):
            if path != self.tiles_path(epoch):
                path.unlink(missing_ok=True)


def started_ticks(pid: int) -> int:
    """Return when a process started: a number that is used again does not make another process the same.

    Raises `OSError` if there is no such process, or if it is dead and only waits to be asked how it ended.
    """
    # The second field is the program's name in brackets, which may hold anything.
    state, *fields = Path(f"/proc/{pid:d}/stat").read_text().rpartition(")")[2].split()
    if state in "ZX":
        raise ProcessLookupError(f"process {pid} is dead")
    return int(fields[18])
