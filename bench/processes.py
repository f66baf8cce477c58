"""The processes of a cluster that this process started: how much of the machine they took.

Processor time does not depend on what else runs on the machine, as requests/s do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["cpu_seconds"]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds(titles: Sequence[str]) -> float:
    """Return the processor time so far of our descendants whose command line begins with a title."""
    wanted = tuple(titles)
    found = {pid: (parent, seconds) for pid, parent, seconds in _processes()}
    total = 0.0
    for pid, (parent, seconds) in found.items():
        while parent in found and parent != os.getpid():
            parent = found[parent][0]
        if parent == os.getpid():
            with contextlib.suppress(OSError):  # it has ended since
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                total += seconds if line.decode(errors="replace").startswith(wanted) else 0.0
    return total


def _processes() -> Iterator[tuple[int, int, float]]:
    """Yield process, parent and processor seconds of each process of the machine."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                # The second field is the name in parentheses, which may hold anything.
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                yield int(name), int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
