"""Shared memory under stress: real processes, the writer killed again and again, and answers that must be right.

Some seconds by default. For minutes, with the totals:

    MILLPOND_STRESS_S=180 pytest -q -s tests/test_shared_memory_stress.py

`MILLPOND_STRESS_SEED` makes the events and the parent's choices those of another run; what the machine makes of them
differs from run to run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import memory_stress
import pytest
from memory_stress import ACKED, BEGUN, GO, PAGE_WORDS, READERS, READY, STOP, open_page

from millpond.feature_actors.tiles.memory import Control
from millpond.feature_actors.warm import warm_kernels

SECONDS = float(os.environ.get("MILLPOND_STRESS_S", "3"))
SEED = int(os.environ.get("MILLPOND_STRESS_SEED", "3"))
N_READERS = 2
#: How long anything may take that a loaded machine makes slow.
PATIENCE_S = 120.0
ROOM_BYTES_MIN = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for the files of a shard: of shared memory if there is enough."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > ROOM_BYTES_MIN
    path = Path(tempfile.mkdtemp(prefix="millpond-stress-", dir=shm if roomy else tmp_path))
    yield path
    shutil.rmtree(path)


class Cluster:
    """A writer and its readers, as processes of this one."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder
        self._page_path = scratch / "page"
        self._page_path.write_bytes(bytes(8 * PAGE_WORDS))
        self.page = open_page(self._page_path)
        self.control = Control(folder, 0, writable=True)
        self.all: list[subprocess.Popen[str]] = []
        self.running: list[subprocess.Popen[str]] = []
        self.epoch = 0
        self.readers = [self._start("reader", number) for number in range(N_READERS)]
        self._successor = self._start("writer", 1)

    def _start(self, role: str, number: int) -> subprocess.Popen[str]:
        arguments = [memory_stress.__file__, role, str(self.folder), str(self._page_path), str(SEED), str(number)]
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, *arguments], stdout=pipe, stderr=pipe, text=True)
        self.all.append(process)
        self.running.append(process)
        return process

    def start_writer(self) -> None:
        self.wait_for_successor()
        self.epoch += 1
        self.writer = self._successor
        self.page[GO] = self.epoch
        self._successor = self._start("writer", self.epoch + 1)  # is ready when it is needed

    def kill_writer(self) -> None:
        self.running.remove(self.writer)
        self.writer.kill()
        self.writer.communicate()  # and no zombie is left

    def wait(self, what: str, done: Callable[[], bool]) -> None:
        """Wait until something is so, while every process lives."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            for process in self.running:
                if process.poll() is not None:
                    self.result(process)
                    raise AssertionError(f"{process.args} has ended by itself")
            assert time.monotonic() < deadline, f"epoch {self.epoch}: {what} takes more than {PATIENCE_S} s"
            time.sleep(0.005)

    def sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self.wait("sleeping", lambda: time.monotonic() > until)

    def wait_for_readers(self) -> None:
        """Wait until the writer has published and every reader has moved to it by itself."""
        self.wait("publishing", lambda: self.control.epoch == self.epoch)
        self.wait("moving", lambda: (self.page[READERS : READERS + 2 * N_READERS : 2] == self.epoch).all())
        self.wait("unlinking", lambda: self.files() == {"000.control", f"000-{self.epoch}.tiles"})

    def wait_for_successor(self) -> None:
        self.wait("starting a process", lambda: bool(self.page[READY] > self.epoch))

    def wait_for_reads(self, n: int) -> None:
        """Wait until every reader has read n times more."""
        counts = self.page[READERS + 1 : READERS + 2 * N_READERS : 2]
        before = counts.copy()
        self.wait("reading", lambda: bool((counts >= before + n).all()))

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def result(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        out, err = process.communicate(timeout=PATIENCE_S)
        why = " (a read took too long)" if process.returncode == -signal.SIGPROF else ""
        assert process.returncode == 0, f"seed {SEED}: {process.args[2:]} ended with {process.returncode}{why}:\n{err}"
        return dict(json.loads(out))


def test_readers_are_never_told_what_is_not_so(folder: Path, tmp_path: Path) -> None:
    warm_kernels()  # once, rather than in all processes at the same time
    choices, kills, kills_in_replay, acked = random.Random(SEED), 0, 0, 0
    cluster = Cluster(folder, tmp_path)
    try:
        cluster.start_writer()
        cluster.wait_for_readers()
        end = time.monotonic() + SECONDS
        while kills < 2 or time.monotonic() < end:
            cluster.wait_for_successor()
            cluster.wait_for_reads(30)
            cluster.sleep(choices.uniform(0, 1.5))
            cluster.kill_writer()
            kills += 1
            assert not cluster.control.writer_lives
            assert cluster.page[ACKED] >= acked
            acked = int(cluster.page[ACKED])
            assert cluster.files() == {"000.control", f"000-{cluster.epoch}.tiles"}
            cluster.wait_for_reads(30)
            cluster.start_writer()
            if choices.random() < 0.25:
                cluster.sleep(choices.uniform(0, 0.5))
                if cluster.control.epoch < cluster.epoch:
                    cluster.kill_writer()
                    kills_in_replay += 1
                    cluster.wait_for_reads(5)
                    cluster.start_writer()
            cluster.wait_for_readers()
        cluster.wait("writing", lambda: bool(cluster.page[ACKED] > acked))
        cluster.page[STOP] = 1
        results = {process: cluster.result(process) for process in cluster.running}
    finally:
        for process in cluster.all:
            if process.returncode is None:
                process.kill()
                process.communicate()
    written, reads = results[cluster.writer], [results[reader] for reader in cluster.readers]
    totals = Counter[str]()
    for one in reads:
        totals.update({name: value for name, value in one.items() if isinstance(value, int)})
    slowest = max(reads, key=lambda one: float(one["slowest_ms"]))
    sys.stdout.write(
        f"\nseed {SEED}: {kills} kills, {kills_in_replay} more before publishing; last writer: {written}"
        f"\n{N_READERS} readers: {dict(totals)}; slowest read {slowest['slowest_ms']} ms ({slowest['slowest_of']}); "
        f"half-written slots refused within {[one['busy_dead_ms'] for one in reads]} ms\n"
    )
    assert written["problems"] == []
    assert written["events"] == cluster.page[ACKED] <= cluster.page[BEGUN]
    entities = written["entities"]
    assert entities["payments[user_id]"] < 40_000, "entities that no window can see are reclaimed"
    assert entities["payments[user_id, tag]"] > written["events"] // 10, "lifetime entities are kept"
    assert entities["payments[shop_id]"] == memory_stress.SHOPS
    for one in reads:
        assert one["dead_reads"] > 20 * kills
        assert one["reads"] - one["dead_reads"] > 20 * kills
        assert one["epochs"] == sorted(one["epochs"])
        assert len(one["epochs"]) == kills + 1
        assert one.get("busy_live", 0) <= 5 + one["reads"] / 1_000
    assert not any(Path(f"/proc/{process.pid}").exists() for process in cluster.all)
    assert cluster.files() == {"000.control", f"000-{cluster.epoch}.tiles"}
