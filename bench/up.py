"""`millpond up` as a child process, and its processes by kind: what `bench faults` kills and starts again.

A process is killed only if it belongs to the cluster that was started here: it lives in that cluster's shelter, or is
the child itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from millpond.bench import accounts
from millpond.cluster.config import Config
from millpond.cluster.embedded import _processes_of
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.memory_folder import MemoryFolder

__all__ = ["KINDS", "Up", "Victim", "kind_of", "until"]

#: What is killed; all of "cluster" at once, `millpond up` itself among them. A "worker" is any other of the raylet's:
#: Serve's controller, its proxy of last resort, one that waits for work.
KINDS = ("shard", "events_replica", "score_replica", "haproxy_manager", "haproxy", "worker", "raylet", "cluster")
#: After these nothing is restarted by the cluster itself.
NEEDS_NEW_START = frozenset({"raylet", "cluster"})
#: Two agents share the raylet's fate: one kind of death is enough.
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
#: A worker that is not started again, because nobody misses it.
_UNMISSED = "ray::IDLE"

_START_S_MAX = 180.0
_STOP_S_MAX = 90.0


def until(condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
    """Return the first true value of a condition. Raises `Unavailable` that says what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise Unavailable(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.02)
    return found


@dataclass(frozen=True)
class Victim:
    """A process, the kind that it is of, and the shard, if it is one's."""

    pid: int
    kind: str
    title: str
    shard: int | None = None

    @property
    def actor(self) -> str:
        """The actor that it runs; its title may name the method that is being called, too."""
        return self.title.partition(" ")[0].partition(".")[0]

    @property
    def missed(self) -> bool:
        """Whether the cluster starts another in its place."""
        return not self.title.startswith(_UNMISSED)

    def replaced_by(self, other: Victim) -> bool:
        """Return whether another process does what this one did."""
        alike = other.kind == self.kind and (self.kind != "worker" or other.actor == self.actor)
        return alike and other.shard == self.shard and other.pid != self.pid


def kind_of(title: str, program: str, cluster_name: str) -> str | None:
    """Return the kind of a process of a cluster by its command line and program; None if it is not killed by itself.

    >>> kind_of("ray::ServeReplica:dev-score:Score", "python3.12", "dev"), kind_of("/x/raylet --a", "raylet", "dev")
    ('score_replica', 'raylet')
    """
    if program in ("raylet", "haproxy"):
        return program
    if title.startswith(_AGENTS):
        return None
    for start, kind in (
        ("ray::FeatureActor", "shard"),
        (f"ray::ServeReplica:{cluster_name}-events:", "events_replica"),
        (f"ray::ServeReplica:{cluster_name}-score:", "score_replica"),
        ("ray::HAProxyManager", "haproxy_manager"),
        ("ray::", "worker"),
    ):
        if title.startswith(start):
            return kind
    return None


class Up:
    """`millpond up` on the definition of `accounts`; may be started again on the same data directory."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self._folder = config, folder
        self._errors = (folder / "up-errors.txt").open("a+")
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.starts = 0

    # -- start and stop

    def start(self) -> None:
        """Start it and return when requests are answered. Raises `Unavailable` with what it said if it ends."""
        settings = [f"--{f.name.replace('_', '-')}={getattr(self.config, f.name)}" for f in fields(Config)]
        self._reap()
        output = self._folder / "up-output.txt"
        with output.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "millpond.cluster.cli", "up", str(accounts.__file__), *settings],
                cwd=self._folder, stdin=subprocess.DEVNULL, stdout=file, stderr=self._errors, start_new_session=True,
            )  # fmt: skip

        def serving() -> re.Match[str] | None:
            if self.ended:
                raise Unavailable(f"`millpond up` ended before it served: {self.errors()}")
            return re.search(r"^serving (http://\S+) ", output.read_text(), re.MULTILINE)

        self.url = until(serving, "`millpond up` to serve", _START_S_MAX)[1]
        self.starts += 1

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def stop(self) -> int:
        """Stop it cleanly; return its exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(_STOP_S_MAX)

    def errors(self) -> str:
        """Return the last of what it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read()[-2_000:].strip()

    def close(self) -> None:
        """End whatever is left of it, and clear away what a killed one leaves."""
        if not self.ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        for pid in self.pids():
            _kill(pid)
        self._reap()
        shelter = self._shelter()
        if shelter is not None:
            shutil.rmtree(shelter, ignore_errors=True)
        manifest = self.config.directory / "manifest.json"
        if manifest.exists():
            cluster_id = json.loads(manifest.read_bytes())["cluster_id"]
            MemoryFolder(cluster_id, self.config.directory, self.config.memory_dir).remove()
        self._errors.close()

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait(_STOP_S_MAX)

    # -- its processes

    def _shelter(self) -> Path | None:
        try:
            return Path(json.loads((self.config.directory / "run" / "embedded.json").read_bytes())["shelter"])
        except (OSError, ValueError, KeyError):
            return None

    def pids(self) -> list[int]:
        """Return the processes of the cluster, `millpond up` itself among them."""
        shelter = self._shelter()
        found = [] if shelter is None else _processes_of(shelter)
        if self._process is not None and not self.ended and self._process.pid not in found:
            found.append(self._process.pid)
        return found

    def victims(self) -> list[Victim]:
        """Return those processes that are killed one by one."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):  # it has ended since
                title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
                program = Path(os.readlink(f"/proc/{pid}/exe")).name
                kind = kind_of(title, program, self.config.name)
                shard = self._shard_of(pid) if kind == "shard" else None
                if kind is not None and (kind != "shard" or shard is not None):
                    found.append(Victim(pid, kind, title, shard))
        return found

    def _shard_of(self, pid: int) -> int | None:
        """Return the shard whose files a process has open; None while it has not opened them yet."""
        inside = re.compile(re.escape(str(self.config.directory / "shards")) + r"/(\d+)/")
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if match := inside.match(os.readlink(file)):
                    return int(match[1])
        return None

    def kill(self, victim: Victim) -> float:
        """Kill a victim, or all of the cluster if it is of that kind; return when, of the monotonic clock."""
        at = time.monotonic()
        if victim.kind == "cluster":
            while pids := self.pids():
                for pid in pids:
                    _kill(pid)
                if self._process is not None:
                    self._process.wait(_STOP_S_MAX)
        else:
            _kill(victim.pid)
        return at


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
