"""The ports to Ray actors keep the same contract as those to shards in this process."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from port_contract import LAYOUT, NOW, Cluster, PortContract, Run, by_user
from served_contract import Served

from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.ports import IngestPort, ReadPort
from millpond.feature_actors.shard_map import ShardMap

SHARDS_MAX = 5
NAME = "ports"


def spec(layout: Layout, shard_map: ShardMap, data_dir: Path, durability: str = "process") -> Any:
    from millpond.feature_actors.manifest import Manifest, make_shards
    from millpond.feature_actors.server import ShardSpec

    make_shards(data_dir, Manifest(NAME, NAME, shard_map.n_slots, 7), shard_map.n_shards)
    return ShardSpec(
        cluster_name=NAME, namespace="millpond",
        run_id=uuid.uuid4().hex, data_dir=str(data_dir), sources=tuple(layout.sources.values()),
        views=tuple(layout.views.values()), shard_map=shard_map, hash_seed=7, dedupe_horizon_ms=86_400_000,
        memory_dir=str(data_dir), memory_bytes_max=1 << 30, strings_max=1_000, reclaim_margin_ms=660_000,
        durability=durability, cluster_id="ports", history_uri=None, history_part_bytes=1 << 30, snapshot_bytes=1 << 30,
        disk_free_bytes_min=0, queue_bytes_max=1 << 30,
    )  # fmt: skip


@pytest.fixture(scope="module")
def actors(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Any], Path]]:
    """Actors for as many shards as any test has, started once: each is a process."""
    import ray

    from millpond.feature_actors.actor import find_actors, start_actors, wait_for_actors

    data_dir = tmp_path_factory.mktemp("ports")
    started = start_actors(spec(LAYOUT, ShardMap.even(16, SHARDS_MAX), data_dir), "millpond", num_cpus=0.01)
    wait_for_actors(started)
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

    from millpond.feature_actors.actor import ActorCalls
    from millpond.feature_actors.calls import CallIngest, CallRead

    handles, data_dir = actors
    in_use: list[Any] = []

    def close(actor: Any) -> None:
        if hasattr(actor, "server"):
            actor.server.close()
            del actor.server

    def make(layout: Layout, shard_map: ShardMap) -> tuple[IngestPort, ReadPort, Run]:
        # Every actor is made anew within its process, as a start of the cluster makes it.
        fresh = spec(layout, shard_map, new_folder(data_dir))
        in_use[:] = handles[: shard_map.n_shards]
        # The others are of the cluster before, and may still owe it something: which they would deliver to this one.
        ray.get([a.__ray_call__.remote(close) for a in handles[shard_map.n_shards :]])
        start(in_use, fresh)
        calls = ActorCalls(in_use)
        return CallIngest(calls), CallRead(calls, shard_map), runner.run

    yield make
    assert in_use
    assert ray.get([a.call.remote("check", []) for a in in_use]) == [[]] * len(in_use)


def new_folder(data_dir: Path) -> Path:
    folder = data_dir / uuid.uuid4().hex
    folder.mkdir()
    return folder


def start(handles: list[Any], fresh: Any) -> None:
    """Make shards anew within their processes, as a start of the cluster makes them."""
    import ray

    def anew(actor: Any, number: int) -> None:
        if hasattr(actor, "server"):
            actor.server.close()
        actor.__init__(fresh, number)

    ray.get([a.__ray_call__.remote(anew, i) for i, a in enumerate(handles)])
    ray.get([a.call.remote("ready", []) for a in handles])


class TestActorPorts(PortContract):
    pass


def test_an_error_of_a_shard_arrives_as_it_was_raised(make: Any) -> None:
    from millpond.feature_actors.errors import AsOfInPast

    cluster = Cluster(make, 2, ManualClock(NOW))
    with pytest.raises(AsOfInPast) as caught:
        cluster.read([by_user], {"user": 1}, as_of=NOW - 1)
    assert (type(caught.value), caught.value.code, caught.value.path) == (AsOfInPast, "as_of_in_past", "as_of")


def test_an_actor_that_does_not_answer_in_time_is_unavailable(
    make: Any, actors: tuple[list[Any], Path], runner: asyncio.Runner
) -> None:
    import threading

    import ray

    from millpond.feature_actors.actor import ActorCalls

    Cluster(make, 1, ManualClock(NOW))

    def hold_up(actor: Any) -> None:
        actor.server._loop.call_soon_threadsafe(threading.Event().wait, 1)

    async def asked() -> Any:
        return await ActorCalls(actors[0][:1], 0.05).call(0, "status")

    ray.get(actors[0][0].__ray_call__.remote(hold_up))
    with pytest.raises(Unavailable) as caught:
        runner.run(asked())
    assert (str(caught.value), caught.value.retry_after_ms) == ("shard 0 of 1 did not answer within 0.05 s", 1_000)
