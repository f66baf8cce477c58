"""Memory that was used for a while and is free again, given back to the system by those who keep it for later."""

from __future__ import annotations

import contextlib
import ctypes

import pyarrow as pa

__all__ = ["give_back"]


def give_back() -> None:
    """Have Arrow's pool and the C library let go of what is free: after work that took much and is seldom done.

    It takes some ms, in which other threads may wait for memory; the interpreter goes on.
    """
    pool = pa.default_memory_pool()
    if pool.backend_name != "system":  # else it is the C library's, which need not be asked twice
        pool.release_unused()
    with contextlib.suppress(AttributeError):  # of another C library, which has no such call
        ctypes.CDLL(None).malloc_trim(0)
