"""The processes of a cluster that this process started: how much of the machine they take.

Processor time does not depend on what else runs on the machine, as requests/s do. Memory is the proportional share
(PSS): a page that several processes map counts in each in part, so the sum over processes counts it once.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["MemorySamples", "cpu_seconds", "memory_mb", "niceness"]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds(titles: Sequence[str]) -> float:
    """Return the processor time so far of our descendants whose command line begins with a title."""
    return sum(_descendants(titles).values())


def niceness(titles: Sequence[str]) -> int | None:
    """Return the niceness of our descendants of those titles, the largest; None if there is none."""
    found = [os.getpriority(os.PRIO_PROCESS, pid) for pid in _descendants(titles)]
    return max(found, default=None)


def memory_mb(titles: Sequence[str], kind: str = "Pss") -> dict[int, float]:
    """Return the memory of our descendants whose command line begins with a title, in MB (10**6 bytes) by process.

    kind: of `/proc/PID/smaps_rollup`, such as `Pss_Anon`, the part that is of no file; several, added up, as
        `Pss_Anon|Pss_Shmem`.
    """
    found = {}
    for pid in _descendants(titles):
        with contextlib.suppress(OSError):  # it has ended since
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            if kilobytes := re.findall(rf"^(?:{kind}):\s+(\d+) kB", rollup, re.MULTILINE):
                found[pid] = sum(map(int, kilobytes)) * 1024 / 1e6
    return found


class MemorySamples(threading.Thread):
    """Takes the memory of groups of processes again and again, until `stop`.

    groups: name to titles. kind: of memory, see `memory_mb`. times_s: since the first sample. mb: of each group, all
    its processes together. processes: every process that was ever seen in a group.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]], every_s: float, kind: str = "Pss") -> None:
        super().__init__(name="memory samples", daemon=True)
        self._groups, self._every_s, self._kind = groups, every_s, kind
        self._over = threading.Event()
        self.times_s: list[float] = []
        self.mb: dict[str, list[float]] = {group: [] for group in groups}
        self.processes: dict[str, set[int]] = {group: set() for group in groups}

    def run(self) -> None:
        begun = time.monotonic()
        while True:
            found = {group: memory_mb(titles, self._kind) for group, titles in self._groups.items()}
            self.times_s.append(time.monotonic() - begun)
            for group, of_process in found.items():
                self.mb[group].append(sum(of_process.values()))
                self.processes[group] |= set(of_process)
            if self._over.wait(self._every_s):
                return

    def stop(self) -> None:
        self._over.set()
        self.join()


def _descendants(titles: Sequence[str]) -> dict[int, float]:
    """Return our descendants whose command line begins with a title: process to processor seconds."""
    wanted = tuple(titles)
    found = {pid: (parent, seconds) for pid, parent, seconds in _processes()}
    ours = {}
    for pid, (parent, seconds) in found.items():
        while parent in found and parent != os.getpid():
            parent = found[parent][0]
        if parent == os.getpid():
            with contextlib.suppress(OSError):  # it has ended since
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                if line.decode(errors="replace").startswith(wanted):
                    ours[pid] = seconds
    return ours


def _processes() -> Iterator[tuple[int, int, float]]:
    """Yield process, parent and processor seconds of each process of the machine."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                # The second field is the name in parentheses, which may hold anything.
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                yield int(name), int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
