"""The `millpond` command, as from a terminal: commands that are run to their end, and a cluster that is up."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MILLPOND = [sys.executable, "-m", "millpond.cluster.cli"]


def run(folder: Path, *arguments: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    """Run a command of `millpond` to its end, as from a terminal in `folder`."""
    return subprocess.run(
        [*MILLPOND, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        check=False,
    )


class Up:
    """`millpond up`, in a process group of its own, as a terminal starts it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.errors = (folder / "stderr.txt").open("a+")
        self.process = subprocess.Popen(
            [*MILLPOND, "up", *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said = [self.process.stdout.readline()]
        match = re.match(
            r"serving (http://127\.0\.0\.1:\d+)  \(calls: \1/docs; stop: Ctrl-C or `millpond down --name [a-z]+`\)$",
            self.said[0],
        )
        assert match, (self.said, (folder / "stderr.txt").read_text())
        self.url = match[1]

    def wait(self) -> int:
        assert self.process.stdout is not None
        self.said += self.process.stdout.readlines()
        return self.process.wait(60)

    def end(self) -> None:
        """Clear away what a failed test has left: only what this object has started."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)
    return found
