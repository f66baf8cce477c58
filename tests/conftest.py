"""Hypothesis: random examples, whose seed and blob are printed when one fails, so that it replays. And which
tests run side by side: two files at a time, if all of them are to run. And where their files are: in memory.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Tests share `worlds`, `apps` and the contracts, which stand beside them.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("apps", "http_server", "port_contract", "served_contract")

#: With less than that free, files are where those of other programs are.
MEMORY_FREE_BYTES_MIN = 2 << 30


def keep_files_in_memory() -> None:
    """Have temporary files in memory, of child processes as well, unless TMPDIR is set.

    Half of the suite's time was that of a disk. A process that is killed leaves the same on both; no test ends the
    machine. The folder goes with this process, or if that is killed with the next one of the user: to look at what a
    test has left, set TMPDIR.
    """
    shared = Path("/dev/shm")
    if "TMPDIR" in os.environ or not shared.is_dir() or shutil.disk_usage(shared).free < MEMORY_FREE_BYTES_MIN:
        return
    for left in shared.glob("mp-*"):
        pid = left.name.removeprefix("mp-")
        if pid.isdigit() and left.lstat().st_uid == os.getuid() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    mine = os.getpid()
    folder = shared / f"mp-{mine}"  # no longer: below it are sockets, whose paths have 107 bytes at most
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:  # somebody else's
        return
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    atexit.register(lambda: os.getpid() == mine and shutil.rmtree(folder, ignore_errors=True))


keep_files_in_memory()
# Each process that a test starts would compile all of Millpond otherwise.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

#: Examples per property, as a multiple of what is moderate on two cores.
EXAMPLES = float(os.environ.get("MILLPOND_EXAMPLES", "1"))

for name, base in (("millpond", 30), ("thorough", 400)):
    settings.register_profile(
        name,
        deadline=None,
        derandomize=False,
        print_blob=True,
        max_examples=max(1, round(base * EXAMPLES)),
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "millpond"))

#: The tests of the session's cluster, in one process.
SHARED = tuple(
    f"tests/cluster/test_{name}.py" for name in ("actor_ports", "forget", "packs", "score_log", "served", "train_set")
)

#: The first of the files that take about as long together.
FOLLOWS_SHARED = "tests/test_sh"


def pytest_collection_finish() -> None:
    """Keep what was imported out of every collection of garbage to come: that is most of what there is, for ever."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests of the session's cluster come last: once started, it would be in the way of others.

    Of several processes the one that has it does nothing after it. What follows keeps the others at work meanwhile.
    """
    several = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1

    def place(item: pytest.Item) -> int:
        return 1 if item.nodeid.startswith(SHARED) else 2 if several and item.nodeid >= FOLLOWS_SHARED else 0

    items.sort(key=place)
    for item in items:
        served = item._fixtureinfo.name2fixturedefs.get("served", ())  # type: ignore[attr-defined]
        if any(fixture.scope == "session" for fixture in served[-1:]) and not item.nodeid.startswith(SHARED):
            raise pytest.UsageError(f"{item.nodeid} has the session's cluster: its file belongs to `SHARED`")


@pytest.fixture(autouse=True, scope="module")
def nothing_left_open() -> Iterator[None]:
    """Close the files of servers that a test has let go of as if they had crashed: they lie in cycles."""
    yield
    gc.collect()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite in three processes, of however many cores: many tests wait, those of clusters above all.

    Chosen files run in this one: to start others takes longer than most files do, and a debugger wants the terminal.
    """
    return 3 if [Path(a).resolve() for a in config.args] == [Path(__file__).parent] else 0


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process a file at a time, in the order of collection: clusters take longest and come first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "shared" if nodeid.startswith(SHARED) else nodeid.partition("::")[0]

        def _reschedule(self, node: Any) -> None:
            if "shared" not in self.assigned_work[node] or len(self.nodes) == 1:
                super()._reschedule(node)
            elif not node.shutting_down:
                node.shutdown()  # when it has done what it has

    config.option.loadscopereorder = False
    return ByFile(config, log)
