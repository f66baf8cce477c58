"""A file mapped where huge pages fit: at a multiple of their size, which Python's own `mmap` cannot ask for.

One translation of addresses then covers 2 MB instead of 4 kB. Entities lie anywhere in memory, so a read or an event of
a random one would spend most of its time on looking translations up. It is the kernel's business whether it has huge
pages to give (Linux 6.1 or later; a file system with `huge=deny` has none): without, everything works, slower.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["HUGE_BYTES", "MADV_COLLAPSE", "Mapping"]

#: The size of a huge page, where pages have 4 kB.
HUGE_BYTES = 2 << 20

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
MADV_COLLAPSE = 25
_FAILED = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Mapping:
    """All of a file, shared with whoever has it mapped too, for as long as this object or an array over it lives.

    Raises `OSError` if there is no address space for it.
    """

    def __init__(self, descriptor: int, *, writable: bool) -> None:
        self._end = 0  # nothing to unmap yet
        self.length = os.fstat(descriptor).st_size
        self._writable = writable
        reserved = self.length + HUGE_BYTES
        self._begin = _mapped(None, reserved, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        self._end = self._begin + reserved
        self.address = -(-self._begin // HUGE_BYTES) * HUGE_BYTES
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        _mapped(self.address, self.length, access, mmap.MAP_SHARED | _MAP_FIXED, descriptor)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": (self.length // 8,),
            "typestr": "<i8",
            "data": (self.address, not self._writable),
        }

    @property
    def words(self) -> npt.NDArray[np.int64]:
        """Its words, int64; they keep the mapping alive."""
        return np.asarray(self)

    def huge(self, start: int, end: int) -> bool:
        """Have whole huge pages from `start` to `end` if they can be had; return whether they are there.

        What is allocated of the file between them stays, what is not is allocated along with it.
        """
        assert start % HUGE_BYTES == end % HUGE_BYTES == 0
        return self._advise(MADV_COLLAPSE, start, end)

    def populate(self, start: int, end: int) -> None:
        """Map the pages from `start` to `end` now. (A kernel before 5.14 maps each when it is touched.)"""
        self._advise(_MADV_POPULATE_WRITE if self._writable else _MADV_POPULATE_READ, start, end)

    def _advise(self, advice: int, start: int, end: int) -> bool:
        return bool(_libc.madvise(self.address + start, end - start, advice) == 0)

    def __del__(self) -> None:
        if self._end:
            _libc.munmap(self._begin, self._end - self._begin)


def _mapped(address: int | None, length: int, access: int, flags: int, descriptor: int) -> int:
    got = _libc.mmap(address, length, access, flags, descriptor, 0)
    if got is None or got == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"no address space for {length} bytes: {os.strerror(number)}")
    return int(got)
