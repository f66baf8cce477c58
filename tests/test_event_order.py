"""The order of all events of a cluster: each once, and who replays it has the bits of the cluster that it is of."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from durable_cluster import Crash, DurableCluster, Fault
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_vs_oracle import everything
from worlds import World, cluster, source, worlds

from millpond.feature_actors import Count, FeatureView, Last, Sum, event_order
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.event_order import EventOrder, Run
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.past import Past
from millpond.feature_actors.ports import complete


@contextlib.contextmanager
def durable(layout: Layout, n_shards: int, n_slots: int = 16, **options: Any) -> Iterator[DurableCluster]:
    with tempfile.TemporaryDirectory() as folder:
        yield DurableCluster(layout, n_shards, Path(folder) / "live", max(n_slots, n_shards), **options)


def order_of(live: DurableCluster, **options: Any) -> EventOrder:
    directory = live.folder.parent / "left"
    live.leave(directory)
    history = directory / "history"
    return EventOrder(Past(directory, str(history) if history.exists() else None), live.layout.sources, **options)


def replayed(layout: Layout, runs: list[Run], n_shards: int, end_ms: int) -> FeatureClient:
    """Another cluster, which has had some runs when they arrived, or as soon as time had come so far."""
    clock = ManualClock(-(2**62))
    client, _ = cluster(layout, n_shards, clock)
    for run in runs:
        clock.ms = max(clock.ms, *run.arrivals)
        batch = run.batch.take(pa.array(run.rows))
        ack = complete(client.ingest(run.source, batch, arrivals=np.array(run.arrivals, np.int64)))
        assert ack.accepted == len(run.rows), "an event that was accepted once is accepted"
    clock.ms = end_ms
    return client


@settings(max_examples=max(1, settings().max_examples // 4))
@given(world=worlds(events_max=90), shards=st.integers(1, 4), others=st.integers(1, 4), history=st.booleans())
def test_a_replay_has_the_bits_of_the_cluster_on_any_number_of_shards(
    world: World, shards: int, others: int, history: bool
) -> None:
    with durable(world.layout, shards, world.n_slots, history=history) as live:
        accepted = 0
        for number, (name, now_ms, events) in enumerate(world.batches):
            accepted += live.send(name, now_ms, events).accepted
            if history and number % 2:
                live.deliver_owed()
                for shard in range(shards):
                    live.write_history(shard)
        order = order_of(live)
        runs = list(order.runs())
        assert (sum(len(run.rows) for run in runs), order.disputed) == (accepted, 0)
        again = replayed(world.layout, runs, others, world.now_ms)
        assert everything(again, world) == everything(live.client, world)


@settings(max_examples=max(1, settings().max_examples // 4))
@given(world=worlds(events_max=60), shards=st.integers(2, 4), data=st.data())
def test_what_was_delivered_late_keeps_its_place_among_the_events_of_its_entities(
    world: World, shards: int, data: st.DataObject
) -> None:
    """An ingress that dies between offer and take leaves events that other shards have later than newer ones."""
    with durable(world.layout, shards) as live:
        for name, now_ms, events in world.batches:
            if data.draw(st.booleans()):
                live.fault = Fault("after commit", "ingress", skip=data.draw(st.integers(0, shards)))
            with contextlib.suppress(Crash):
                live.send(name, now_ms, events)
            live.fault = None
            if data.draw(st.integers(0, 3)) == 0:
                live.deliver_owed()
        live.clock.ms = world.now_ms
        live.deliver_owed()
        order = order_of(live)
        runs = list(order.runs())
        sources = {view.source.name: view.source for view in world.views}
        wanted = sorted(event["id"] for of in sources.values() for event in live.logged_events(of.name))
        assert sorted(run.batch["id"][row].as_py() for run in runs for row in run.rows) == wanted
        # An id that was accepted again after its horizon may come within it, if the first one left late.
        if order.disputed == 0 and len(set(wanted)) == len(wanted):
            again = replayed(world.layout, runs, data.draw(st.integers(1, 4)), world.now_ms)
            assert everything(again, world) == everything(live.client, world)


SOURCE = source("first", None)
VIEW = FeatureView(
    "v", owner="tests", source=SOURCE, key=["user"], features={"n": Count(), "sum": Sum("v"), "last": Last("code")}
)
WORLD = World([VIEW], [])


def event(number: int, at: int, **values: Any) -> dict[str, Any]:
    return {"id": f"e{number}", "num": number, "at": at, "user": 1, "code": "a", "small": 0, "v": 0.1 * number, "i": 0,
            "f32": 0.0, "flag": True, "arrival_ms": at} | values  # fmt: skip


def test_events_of_one_millisecond_keep_their_order_whatever_their_homes_are() -> None:
    """They have no ids, so their homes are drawn; floats are added up in another order to another sum."""
    with durable(WORLD.layout, 4) as live:
        live.send("first", 5_000, [event(n, 5_000, v=v) for n, v in enumerate([1e16, 1.0, -1e16, 1.0] * 20)])
        order = order_of(live)
        assert [run.batch["num"][row].as_py() for run in order.runs() for row in run.rows] == list(range(80))


def test_events_that_are_alike_are_as_many_as_they_were() -> None:
    with durable(WORLD.layout, 3) as live:
        for _ in range(3):
            live.send("first", 5_000, [event(1, 5_000)] * 4 + [event(2, 5_000, user=None)])
        numbers = [run.batch["num"][row].as_py() for run in order_of(live).runs() for row in run.rows]
        assert sorted(numbers) == [1] * 12 + [2] * 3


def test_a_stretch_of_time_and_some_rows_are_chosen_by_arrival() -> None:
    with durable(WORLD.layout, 2) as live:
        for at in range(1_000, 21_000, 1_000):
            live.send("first", at, [event(at, at - 500, user=at // 1_000 % 3)])
        for chosen, wanted in (
            ({"since_ms": 5_000, "until_ms": 9_000}, [5_000, 6_000, 7_000, 8_000]),
            ({"until_ms": 3_000}, [1_000, 2_000]),
            ({"since_ms": 20_000}, [20_000]),
            ({"since_ms": 30_000}, []),
            ({"keep": lambda of, batch: batch["user"].to_numpy() == 0, "until_ms": 10_000}, [3_000, 6_000, 9_000]),
        ):
            directory = Path(tempfile.mkdtemp(dir=live.folder.parent))
            past = Past(live.leave(directory / "left"), None)
            runs = list(EventOrder(past, live.layout.sources, **chosen).runs())  # type: ignore[arg-type]
            assert [run.batch["num"][row].as_py() for run in runs for row in run.rows] == wanted
            assert [stamp for run in runs for stamp in run.arrivals] == wanted


def test_a_source_that_is_not_declared_any_more_is_told() -> None:
    with durable(WORLD.layout, 2) as live:
        live.send("first", 5_000, [event(1, 5_000)])
        directory = live.leave(live.folder.parent / "left")
        order = EventOrder(Past(directory, None), {})
        assert (list(order.runs()), order.undeclared) == ([], {"first"})


def test_no_more_wait_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then some leave before they have been seen everywhere, each once all the same."""
    monkeypatch.setattr(event_order, "_WAITING_MAX", 5)
    with durable(WORLD.layout, 3) as live:
        for n in range(40):
            if n % 3 == 0:
                live.fault = Fault("after commit", "ingress")
            with contextlib.suppress(Crash):
                live.send("first", 1_000 * n, [event(4 * n + i, 1_000 * n, user=i) for i in range(4)])
            live.fault = None
        live.deliver_owed()
        wanted = sorted(one["num"] for one in live.logged_events("first"))
        order = order_of(live)
        assert sorted(run.batch["num"][row].as_py() for run in order.runs() for row in run.rows) == wanted
