"""Training sets by workers on Ray: those of threads, bit for bit; workers that are killed; and who breaks off."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apps import DEFINITION, NOW, purchase, purchases
from processes import processes_of, shelter_of
from served_contract import Served
from terminal import run, until

from millpond.cluster.ray_workers import RayWorkers
from millpond.feature_actors.errors import Unavailable
from millpond.models.definition import Definition
from millpond.models.training import Room, Threads, write_training_set
from millpond.models.training.making import Stage
from millpond.models.training.workers import Workers

TINY = Room(run_rows=200, block_rows=20, piece_rows=60)
USERS, BOOKS = 20, 7
TASTE = """
from millpond.feature_actors import LastN
taste = FeatureView("taste", owner="shelf", source=purchases, key=["user_id"],
                    features={"books": LastN("book_id", n=3), "first": Last("book_id")})
mixed = Model("mixed", owner="tests", features=[*taste, *book_sales, *user_book, user_spend["last_price"]],
              predictor=Total)
"""
MIXED = Definition("mixed.py", DEFINITION + TASTE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels and events, of several pieces of a `TINY` room."""
    folder, draw = tmp_path_factory.mktemp("train"), np.random.default_rng(0)
    drawn = zip(draw.integers(0, USERS, 600).tolist(), draw.random(600), draw.integers(0, BOOKS, 600), strict=True)
    events = [
        purchase(f"o{n}", user, price, NOW + n * 1_000, book_id=f"b{book}")
        for n, (user, price, book) in enumerate(drawn)
    ]
    pq.write_table(pa.Table.from_pylist(events, purchases.schema), folder / "purchases.parquet")
    labels = {
        "user_id": draw.integers(0, USERS + 2, 300),
        "book_id": [f"b{n}" for n in draw.integers(0, BOOKS + 1, 300)],
        "as_of": pa.array(NOW + draw.integers(0, 600_000, 300), pa.timestamp("ms", "UTC")),
    }
    pq.write_table(pa.table(labels), folder / "labels.parquet")
    (folder / MIXED.file_name).write_text(MIXED.text)
    return folder


def make(folder: Path, out: str, workers: Workers, told: Callable[[int], None] = lambda done: None) -> bytes:
    """Make a training set here; told: called after each piece, with how much is joined."""

    def progress(stage: Stage, done: int, of: int | None) -> None:
        if stage == "features":
            told(done)

    (model,) = (model for model in MIXED.declared().models if model.name == "mixed")
    events = {"purchases": folder / "purchases.parquet"}
    write_training_set(
        model, folder / "labels.parquet", events, folder / out, workers=workers, room=TINY, progress=progress
    )
    return (folder / out).read_bytes()


def pids(served: Served) -> list[int]:
    running = processes_of(shelter_of(served.directory))
    return [pid for pid, line in running.items() if line.startswith("ray::JoinWorker")]


def kill_one(served: Served) -> None:
    for pid in pids(served)[:1]:
        os.kill(pid, signal.SIGKILL)


def test_the_command_makes_the_same_file_by_workers_of_the_running_cluster(served: Served, folder: Path) -> None:
    command = ["train-set", "mixed.py", "--model", "mixed", "--labels", "labels.parquet", "--json"]
    command += ["--events", "purchases=purchases.parquet", "--threads", "2"]
    cluster = ["--name", served.directory.name, "--data-dir", str(served.directory.parent)]
    made = []
    for out, where in (("one.parquet", []), ("other.parquet", ["--ray", "up", *cluster])):
        done = run(folder, *command, "-o", out, *where)
        assert done.returncode == 0, done.stderr
        assert "join them in time" in done.stderr
        made.append((json.loads(done.stdout), (folder / out).read_bytes()))
    assert made[0] == made[1]
    until(lambda: not pids(served), "the workers to end")


def test_a_worker_that_is_killed_makes_the_join_begin_again_and_nothing_is_answered_twice(
    served: Served, folder: Path
) -> None:
    by_threads: list[int] = []
    expected = make(folder, "threads.parquet", Threads(3), by_threads.append)
    joined: list[int] = []

    def told(done: int) -> None:
        joined.append(done)
        if len(joined) == 1:
            kill_one(served)

    assert make(folder, "killed.parquet", RayWorkers(MIXED, "mixed", 2), told) == expected
    assert joined == by_threads
    assert len(joined) > 10


def test_workers_that_are_killed_again_and_again_are_an_error_and_no_file_is_there(
    served: Served, folder: Path
) -> None:
    with pytest.raises(Unavailable, match="a worker of Ray was lost, in each of 3 tries: "):
        make(folder, "lost.parquet", RayWorkers(MIXED, "mixed", 1), lambda done: kill_one(served))
    assert not (folder / "lost.parquet").exists()


def test_who_breaks_off_ends_the_workers(served: Served, folder: Path, request: pytest.FixtureRequest) -> None:
    # A process of pytest-xdist ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def break_off(done: int) -> None:
        assert len(pids(served)) == 1
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(folder, "broken.parquet", RayWorkers(MIXED, "mixed", 1), break_off)
    assert not (folder / "broken.parquet").exists()
    until(lambda: not pids(served), "the workers to end")
