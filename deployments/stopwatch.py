"""How long a call takes by itself."""

from __future__ import annotations

import resource
import time

__all__ = ["Stopwatch"]


class Stopwatch:
    """Time a call in the thread that makes it.

    precise: leave out what the thread waited for a processor that others had. Whether it waited for anything else,
    such as a sleep or a disk, is asked of the kernel, which takes a microsecond; otherwise the time is all that passed.
    """

    __slots__ = ("_cpu_s", "_waits", "begun_s", "precise")

    def __init__(self, *, precise: bool) -> None:
        self.precise = precise
        self._waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw if precise else 0
        self._cpu_s = time.thread_time() if precise else 0.0
        self.begun_s = time.perf_counter()

    @property
    def seconds(self) -> float:
        """What has passed since it was made."""
        passed_s = time.perf_counter() - self.begun_s
        if not self.precise or resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw != self._waits:
            return passed_s
        return time.thread_time() - self._cpu_s
