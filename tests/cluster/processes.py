"""What a cluster is made of, seen from outside: processes, sockets, files. Reads /proc; signals nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from millpond.cluster.embedded import _processes_of


def shelter_of(directory: Path) -> Path:
    """Where a running cluster with that data directory keeps its sockets and logs."""
    record: dict[str, Any] = json.loads((directory / "run" / "embedded.json").read_text())
    return Path(record["shelter"])


def processes_of(shelter: Path) -> dict[int, str]:
    """The processes of a cluster but for its driver: id to command line."""
    found = {}
    for pid in _processes_of(shelter):
        try:
            found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it has just ended
    return found


def shard_pids(shelter: Path) -> list[int]:
    """The processes of the shard actors; Ray gives them the name of their class."""
    return [pid for pid, line in processes_of(shelter).items() if line.startswith("ray::FeatureActor")]


def listening(pids: list[int]) -> dict[str, set[str]]:
    """Every local address that one of the processes listens on, with the commands behind it."""
    inodes: dict[str, str] = {}
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:60]
            for file in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(file)
                if target.startswith("socket:["):
                    inodes[target[8:-1]] = command
        except OSError:
            continue
    addresses: dict[str, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.setdefault(fields[1], set()).add(inodes[fields[9]])
    return addresses


#: 127.0.0.1, ::1 and ::ffff:127.0.0.1 as /proc writes them.
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def shared_memory() -> dict[str, int]:
    """Entries of /dev/shm, and their sizes."""
    found = {}
    for entry in Path("/dev/shm").iterdir():
        try:
            found[entry.name] = entry.stat().st_size
        except OSError:
            continue
    return found


def unheld(names: set[str]) -> set[str]:
    """Those entries of /dev/shm that no living process has mapped or open: they are left for ever."""
    held = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                held |= {n for n in names if f"/dev/shm/{n}" in (process / "maps").read_text()}
                for file in (process / "fd").iterdir():
                    held.add(Path(os.readlink(file)).name)
            except OSError:
                continue
    return {n for n in names - held if (Path("/dev/shm") / n).exists()}
