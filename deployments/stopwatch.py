"""How long a call takes by itself."""

from __future__ import annotations

import resource
import time

__all__ = ["Stopwatch"]


class Stopwatch:
    """Time a call in the thread that makes it, without what the thread waited for a processor that others had.

    Whether it waited for anything else, such as a sleep or a disk, is asked of the kernel, which takes a microsecond.
    """

    __slots__ = ("_begun_s", "_cpu_s", "_waits")

    def __init__(self) -> None:
        self._waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        self._cpu_s, self._begun_s = time.thread_time(), time.perf_counter()

    @property
    def seconds(self) -> float:
        """What has passed since it was made."""
        passed_s = time.perf_counter() - self._begun_s
        if resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw != self._waits:
            return passed_s
        return time.thread_time() - self._cpu_s
