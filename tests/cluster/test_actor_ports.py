"""The ports to Ray actors keep the same contract as those to shards in this process."""

from __future__ import annotations

import asyncio
import operator
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from port_contract import LAYOUT, NOW, Cluster, PortContract, Run, by_user, order
from served_contract import Served

from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.ports import IngestPort, ReadPort
from millpond.feature_actors.shard_map import ShardMap

SHARDS_MAX = 5
NAME = "ports"


def spec(layout: Layout, shard_map: ShardMap, data_dir: Path, durability: str = "process") -> Any:
    from millpond.feature_actors.actor import ShardSpec

    return ShardSpec(
        cluster_name=NAME, namespace="millpond",
        run_id=uuid.uuid4().hex, data_dir=str(data_dir), sources=tuple(layout.sources.values()),
        views=tuple(layout.views.values()), shard_map=shard_map, hash_seed=7, dedupe_horizon_ms=86_400_000,
        memory_dir=str(data_dir), memory_bytes_max=1 << 30, strings_max=1_000, reclaim_margin_ms=660_000,
        durability=durability,
    )  # fmt: skip


@pytest.fixture(scope="module")
def actors(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Any], Path]]:
    """Actors for as many shards as any test has, started once: each is a process."""
    import ray

    from millpond.feature_actors.actor import find_actors, start_actors

    data_dir = tmp_path_factory.mktemp("ports")
    started = start_actors(spec(LAYOUT, ShardMap.even(16, SHARDS_MAX), data_dir), "millpond", num_cpus=0.01)
    assert len(find_actors(NAME, SHARDS_MAX, "millpond")) == SHARDS_MAX
    yield started, data_dir
    for actor in started:
        ray.kill(actor)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def make(actors: tuple[list[Any], Path], runner: asyncio.Runner) -> Iterator[Any]:
    import ray

    from millpond.feature_actors.actor import ActorIngest, ActorRead

    handles, data_dir = actors
    in_use: list[Any] = []

    def make(layout: Layout, shard_map: ShardMap) -> tuple[IngestPort, ReadPort, Run]:
        # Every actor is made anew within its process, as a start of the cluster makes it.
        fresh = spec(layout, shard_map, new_folder(data_dir))
        in_use[:] = handles[: shard_map.n_shards]
        start(in_use, fresh)
        return ActorIngest(in_use, 30.0), ActorRead(in_use, shard_map, 30.0), runner.run

    yield make
    assert in_use
    assert ray.get([a.check.remote() for a in in_use]) == [[]] * len(in_use)


def new_folder(data_dir: Path) -> Path:
    folder = data_dir / uuid.uuid4().hex
    folder.mkdir()
    return folder


def start(handles: list[Any], fresh: Any) -> None:
    """Make actors anew within their processes, as a start of the cluster or of a process makes them."""
    import ray

    ray.get([a.__ray_call__.remote(operator.methodcaller("__init__", fresh, i)) for i, a in enumerate(handles)])
    ray.get([a.ready.remote() for a in handles])


class TestActorPorts(PortContract):
    pass


def test_an_error_of_a_shard_arrives_as_it_was_raised(make: Any) -> None:
    from millpond.feature_actors.errors import AsOfInPast

    cluster = Cluster(make, 2, ManualClock(NOW))
    with pytest.raises(AsOfInPast) as caught:
        cluster.read([by_user], {"user": 1}, as_of=NOW - 1)
    assert (type(caught.value), caught.value.code, caught.value.path) == (AsOfInPast, "as_of_in_past", "as_of")


def test_without_a_log_a_shard_that_was_restarted_refuses_everything(make: Any, actors: tuple[list[Any], Path]) -> None:
    """Its features are gone; an answer from what is left would say that nobody ever did anything."""
    import ray

    cluster = Cluster(make, 2, ManualClock(NOW))
    handles, data_dir = actors
    again = spec(LAYOUT, ShardMap.even(16, 2), new_folder(data_dir), "none")
    start(handles[:2], again)
    cluster.ingest(*(order(user=u) for u in range(20)))
    ray.get(handles[1].__ray_call__.remote(operator.methodcaller("__init__", again, 1)))
    message = "shard 1 of 2 was restarted and its features are gone; start the cluster anew and load the events again"
    for attempt in (
        lambda: cluster.read([by_user], *({"user": u} for u in range(20))),
        lambda: cluster.ingest(*(order(user=u) for u in range(20))),
    ):
        with pytest.raises(Unavailable) as caught:
            attempt()
        assert (str(caught.value), caught.value.code, caught.value.retry_after_ms) == (message, "shard_lost", 10_000)
    start(handles[:2], spec(LAYOUT, ShardMap.even(16, 2), new_folder(data_dir)))


@pytest.mark.parametrize("durability", ["sync", "process"])
def test_with_a_log_a_shard_that_was_restarted_has_all_that_it_acknowledged(
    durability: str, make: Any, actors: tuple[list[Any], Path]
) -> None:
    cluster = Cluster(make, 2, ManualClock(NOW))
    handles, data_dir = actors
    again = spec(LAYOUT, ShardMap.even(16, 2), new_folder(data_dir), durability)
    start(handles[:2], again)
    users = [{"user": u} for u in range(20)]
    for _ in range(3):
        cluster.ingest(*(order(user=u) for u in range(20)))
        before = cluster.read([by_user], *users).matrix
        start(handles[:2], again)
        assert cluster.read([by_user], *users).matrix.tobytes() == before.tobytes()


def test_a_damaged_log_is_refused_and_says_where(make: Any, actors: tuple[list[Any], Path]) -> None:
    import sqlite3

    import ray

    cluster = Cluster(make, 1, ManualClock(NOW))
    handles, data_dir = actors
    again = spec(LAYOUT, ShardMap.even(16, 1), new_folder(data_dir))
    start(handles[:1], again)
    for user in range(5):
        cluster.ingest(order(user=user))
    log = Path(again.data_dir) / "shards" / "000" / "log" / "cache.db"
    with sqlite3.connect(log) as database:
        ((value,),) = database.execute("SELECT value FROM Cache WHERE key = 3")
        database.execute("UPDATE Cache SET value = ? WHERE key = 3", (value[:-9] + b"\xff" + value[-8:],))
    database.close()
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        start(handles[:1], again)
    assert isinstance(caught.value.cause, Unavailable)
    message = "shard 0 of 1 cannot recover: log: the record at offset 3 fails its checksum; run `millpond"
    assert str(caught.value.cause).startswith(message)
    start(handles[:1], spec(LAYOUT, ShardMap.even(16, 1), new_folder(data_dir)))


def test_a_shard_that_does_not_answer_in_time_is_unavailable(
    make: Any, actors: tuple[list[Any], Path], runner: asyncio.Runner
) -> None:
    import threading

    from millpond.feature_actors.actor import ActorRead

    Cluster(make, 1, ManualClock(NOW))
    read = ActorRead(actors[0][:1], ShardMap.even(16, 1), 0.05)
    busy = actors[0][0].__ray_call__.remote(lambda _: threading.Event().wait(1))
    with pytest.raises(Unavailable) as caught:
        runner.run(read.status())
    assert (str(caught.value), caught.value.retry_after_ms) == ("shard 0 of 1 did not answer within 0.05 s", 1_000)
    del busy


def asked_of(clocks: list[list[int]], runner: asyncio.Runner) -> tuple[Any, list[tuple[int, int]]]:
    """Read two keys from two shards that answer as of these times, one after the other; return answer and calls."""
    from port_contract import by_book

    from millpond.feature_actors.actor import ActorRead
    from millpond.feature_actors.plan import Answer, Question, ReadPlan

    plan, shard_map = ReadPlan(LAYOUT, [*by_user, *by_book], "the test"), ShardMap.even(16, 2)
    calls: list[tuple[int, int]] = []

    class Scripted(ActorRead):
        """Two shards whose time runs as the script says; only the calls to them are left out."""

        async def _ask(self, shard: int, question: Question) -> Answer:
            answer = Answer.empty(question)
            clock = clocks[shard]
            answer.as_of[:] = max(int(question.clock[0]), clock.pop(0) if len(clock) > 1 else clock[0])
            answer.values[:], answer.known[:] = shard, True
            calls.append((shard, int(answer.as_of[0])))
            return answer

    for user in range(1_000):
        question = plan.question({"user": [user], "book": ["x"]}, 1, NOW, None)
        if len({int(s) for key in question.hashes for s in shard_map.shards_of(key.view("uint64"))}) == 2:
            return runner.run(Scripted([None, None], shard_map).read(question)), calls
    raise AssertionError("no two keys on two shards")


def test_shards_that_lag_behind_are_asked_again_until_all_is_as_of_one_time(runner: asyncio.Runner) -> None:
    answer, calls = asked_of([[NOW], [NOW + 5]], runner)
    assert answer.as_of.tolist() == [NOW + 5]
    assert calls == [(0, NOW), (1, NOW + 5), (0, NOW + 5)]


def test_a_read_that_time_runs_away_from_is_given_up(runner: asyncio.Runner) -> None:
    with pytest.raises(Unavailable, match="faster than it can be read") as caught:
        asked_of([list(range(NOW, NOW + 1_000, 2)), list(range(NOW + 1, NOW + 1_000, 2))], runner)
    assert caught.value.retry_after_ms == 100
