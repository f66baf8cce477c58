"""Processes that warm the kernels at the same time divide the compiling, and none goes on before all are there."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from millpond.feature_actors import warm
from millpond.feature_actors.tiles.read import read_rows

WARMS = """
import functools
from millpond.feature_actors import warm

def told(part):
    @functools.wraps(part)
    def telling(self):
        print(part.__name__, flush=True)
        return part(self)
    return telling

for name in ("write", "read", "join"):
    setattr(warm._Warmth, name, told(getattr(warm._Warmth, name)))
warm.warm_kernels()
print("warm", flush=True)
"""


def test_what_another_process_compiles_is_waited_for_at_last() -> None:
    folder = Path(read_rows._cache.cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "warm-read.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen([sys.executable, "-c", WARMS], stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stdout is not None
            before = [process.stdout.readline() for _ in range(3)]
            # The second time, what has been compiled is loaded; but for what another is at.
            assert before == ["write\n", "join\n", "write\n"]
            assert process.poll() is None
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert process.stdout.read() == "read\njoin\nwarm\n"
    assert process.returncode == 0


def test_to_lock_a_part_nobody_has_to_be_allowed_to_write_its_file() -> None:
    """Somebody else may have made it: root, or another user of the same folder."""
    path = Path(read_rows._cache.cache_path) / "warm-test.lock"
    with warm._alone("test", wait=False) as alone:
        assert alone
        (mine,) = [
            fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and fd.resolve() == path.resolve()
        ]  # fmt: skip
        flags = Path(f"/proc/self/fdinfo/{mine.name}").read_text().splitlines()[1]
        assert int(flags.split()[1], 8) & os.O_ACCMODE == os.O_RDONLY
        with warm._alone("test", wait=False) as again:
            assert not again
    path.unlink()
