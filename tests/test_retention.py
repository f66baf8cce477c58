"""Retention deletes what is older than its source keeps it by itself, also on a cluster to which little comes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from test_forget_served import LAYOUT, NOW, ORDERS, orders
from test_server import Servers

from millpond.feature_actors import housekeeper
from millpond.feature_actors.calls import CallIngest, CallRead
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.past import Past

DAY = 86_400_000


@pytest.fixture
def servers() -> Iterator[Servers]:
    folder = Path(tempfile.mkdtemp(prefix="mp-"))  # short: a socket's path is
    servers = Servers(folder)
    yield servers
    servers.stop()
    servers.runner.close()
    shutil.rmtree(folder)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_of_a_history_that_is_of_all_shards_one_deletes(servers: Servers, tmp_path: Path) -> None:
    kept = replace(ORDERS, retention="1d")
    layout = compile_layout([], [replace(view, source=kept) for view in LAYOUT.views.values()])
    servers.start(layout, 2, history_uri=str(tmp_path / "history"))
    servers.ready()
    until(lambda: all(server._house._expired_s > 0 for server in servers.servers))  # for an hour they look no more
    clock = ManualClock(NOW)
    calls = CallRead(servers, servers.spec.shard_map)
    client = FeatureClient(layout, servers.spec.shard_map, CallIngest(servers), calls, clock)
    for day in (0, 3):
        clock.ms = NOW + day * DAY
        events = orders(50, prefix=f"{day}", at=clock.ms)
        servers.runner.run(client.ingest("orders", pa.RecordBatch.from_pylist(events, schema=kept.schema)))

    def expire(shard: int) -> set[str]:
        server = servers.servers[shard]
        assert server._at.durable is not None
        asyncio.run_coroutine_threadsafe(server._house._expire(server._at.durable), server._loop).result(60)
        return {p.name for p in (tmp_path / "history").glob("source=orders/route=home/date=*")}

    assert expire(1) == {"date=2023-11-14", "date=2023-11-17"}
    assert expire(0) == {"date=2023-11-17"}


def test_old_events_leave_log_and_history_though_little_comes(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeper, "_EXPIRE_S", 0.1)
    kept = replace(ORDERS, retention="1d")
    views = [replace(view, source=kept) for view in LAYOUT.views.values()]
    layout = compile_layout([], views)
    servers.start(layout, 1, history_uri=str(tmp_path / "history"))  # a part is made of 1 GB
    servers.ready()
    clock = ManualClock(NOW)
    calls = CallRead(servers, servers.spec.shard_map)
    client = FeatureClient(layout, servers.spec.shard_map, CallIngest(servers), calls, clock)

    def send(n: int, prefix: str, day: int) -> None:
        clock.ms = NOW + day * DAY
        events = orders(n, prefix=prefix, at=clock.ms)
        servers.runner.run(client.ingest("orders", pa.RecordBatch.from_pylist(events, schema=kept.schema)))

    def status() -> dict[str, int]:
        (one,) = (s.called("status", []).result(30) for s in servers.servers)
        return dict(one)

    dates = lambda: {p.name for p in (tmp_path / "history").glob("source=orders/route=home/date=*")}  # noqa: E731
    send(50, "old", 0)
    send(5, "new", 3)
    until(lambda: dates() == {"date=2023-11-17"})
    # Two snapshots after it the log has nothing of it either.
    for number in range(3):
        send(2, f"later-{number}", 4 + number)
        end = status()["log_end"]
        until(lambda end=end: status().get("snapshot_offset", 0) >= end)
    until(lambda: status()["log_first"] >= 1)
    data = Path(servers.spec.data_dir)
    ids = [i for _, r in Past(data, str(tmp_path / "history")).records(0) for i in r.batch.column("order").to_pylist()]
    assert {i.partition("-")[0] for i in ids} == {"later"}
