"""The memory of a replica's own objects, once all is loaded: looked through no more, and in huge pages.

Between two requests of a quiet hour a processor forgets what a replica is made of, translations of addresses above all.
With huge pages it has a few dozen to find again instead of thousands.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from pathlib import Path

from millpond.feature_actors.tiles.mapping import HUGE_BYTES, MADV_COLLAPSE

__all__ = ["keep_what_is_there"]

_PAGE = 4096
#: A huge page takes the place of small ones if so many of them are there: it makes up for the others.
_SHARE_MIN = 0.75
#: So many objects more than before, and they are looked through; Python's default is 700, a few requests at once.
_YOUNG_OBJECTS = 10_000
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 +(\[heap\])?$")

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def keep_what_is_there() -> None:
    """Have the garbage collector pass over what has been loaded: it would look through all of it now and then. Put it
    into huge pages, where the kernel has them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)
    for begin in _filled():
        _libc.madvise(begin, HUGE_BYTES, MADV_COLLAPSE)


def _filled() -> Iterator[int]:
    """Yield the addresses of what would make a huge page, and is there for the most part."""
    present = ctypes.create_string_buffer(HUGE_BYTES // _PAGE)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if found := _ANONYMOUS.match(line):
            begin, end = (int(found[i], 16) for i in (1, 2))
            for at in range(-(-begin // HUGE_BYTES) * HUGE_BYTES, end - HUGE_BYTES + 1, HUGE_BYTES):
                if _libc.mincore(at, HUGE_BYTES, present) == 0:
                    there = sum(page & 1 for page in present.raw)
                    if there >= _SHARE_MIN * len(present):
                        yield at
