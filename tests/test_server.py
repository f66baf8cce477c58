"""Shards served over their sockets, each with its log: the port contract, restarts, errors and limits. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from port_contract import LAYOUT, N_SLOTS, NOW, Cluster, PortContract, Run, by_book, by_user, order, orders
from worlds import batch

from millpond.feature_actors import Count, FeatureView, Sum, housekeeper, manifest, view_follower
from millpond.feature_actors import server as server_module
from millpond.feature_actors.backfill import AddedView, ViewState
from millpond.feature_actors.calls import CallIngest, CallRead
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.errors import AsOfInPast, TooMany, Unavailable
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Layout, compile_layout, identity_of
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.manifest import Manifest, ManifestError, make_shards
from millpond.feature_actors.past import Past
from millpond.feature_actors.plan import Answer, Question, ReadPlan
from millpond.feature_actors.ports import IngestPort, ReadPort
from millpond.feature_actors.server import ShardServer, ShardSpec
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.socket_calls import SocketCalls


class Servers:
    """The servers of one cluster after the other, in this process."""

    def __init__(self, folder: Path) -> None:
        self.runner = asyncio.Runner()
        self._folder = folder
        self._numbers = itertools.count()
        self.servers: list[ShardServer] = []
        self.spec: Any = None
        self.calls: Any = None

    def start(self, layout: Layout, n_shards: int, durability: Any = "process", **options: Any) -> None:
        """Start a new cluster in a new directory."""
        home = self._folder / f"{next(self._numbers)}"
        (home / "memory").mkdir(parents=True)
        defaults = {"history_part_bytes": 1 << 30, "snapshot_bytes": 1 << 30, "queue_bytes_max": 1 << 30}
        options = {**defaults, "disk_free_bytes_min": 0, "history_uri": None, **options}
        self.spec = ShardSpec(
            cluster_name="served", namespace="none", run_id=uuid.uuid4().hex, data_dir=str(home),
            sources=tuple(layout.sources.values()), views=tuple(layout.views.values()),
            shard_map=ShardMap.even(N_SLOTS, n_shards), hash_seed=7, dedupe_horizon_ms=86_400_000,
            memory_dir=str(home / "memory"), memory_bytes_max=1 << 28, strings_max=1_000, reclaim_margin_ms=660_000,
            durability=durability, cluster_id="served", **options,
        )  # fmt: skip
        if durability != "none":
            make_shards(home, Manifest("served", "served", N_SLOTS, 7), n_shards)
        self.restart()

    def restart(self, *shards: int) -> None:
        """End these shards at once (or all), and start their successors."""
        for shard in shards:
            self.servers[shard].close()
            self.servers[shard] = self._serve(shard)
        if not shards:
            self.stop()
            self.servers = [self._serve(shard) for shard in range(self.spec.shard_map.n_shards)]
            self.calls = SocketCalls(Path(self.spec.memory_dir), len(self.servers))

    def _serve(self, shard: int) -> ShardServer:
        folder, n_shards = Path(self.spec.memory_dir), self.spec.shard_map.n_shards
        return ShardServer(self.spec, shard, cache(lambda: SocketCalls(folder, n_shards)))

    def ready(self) -> None:
        for server in self.servers:
            server.called("ready", []).result(30)

    def stop(self) -> None:
        if self.calls is not None:
            self.runner.run(self.calls.close())
            self.calls = None
        for server in self.servers:
            server.close()
        self.servers = []

    def cluster(self, n_shards: int, durability: Any = "process", **options: Any) -> Cluster:
        def make(layout: Layout, shard_map: ShardMap) -> tuple[IngestPort, ReadPort, Run]:
            self.start(layout, shard_map.n_shards, durability, **options)
            self.ready()
            return CallIngest(self), CallRead(self, shard_map), self.runner.run

        return Cluster(make, n_shards, ManualClock(NOW))

    def served(self) -> Cluster:
        """A client of the servers that there are now."""
        return Cluster(lambda _, shard_map: (CallIngest(self), CallRead(self, shard_map), self.runner.run),
                       len(self.servers), ManualClock(NOW))  # fmt: skip

    # -- a transport, to whatever servers there are now

    @property
    def n_shards(self) -> int:
        return len(self.servers)

    def call(self, shard: int, method: str, *arguments: Any) -> Any:
        return self.calls.call(shard, method, *arguments)


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    folder = Path(tempfile.mkdtemp(prefix="mp-"))  # short: a socket's path is
    servers = Servers(folder)
    yield servers
    servers.stop()
    servers.runner.close()
    shutil.rmtree(folder)


@pytest.fixture
def runner(servers: Servers) -> asyncio.Runner:
    return servers.runner


class TestSocketPorts(PortContract):
    @pytest.fixture
    def make(self, servers: Servers) -> Iterator[Any]:
        def make(layout: Layout, shard_map: ShardMap) -> tuple[IngestPort, ReadPort, Run]:
            servers.start(layout, shard_map.n_shards)
            servers.ready()
            return CallIngest(servers), CallRead(servers, shard_map), servers.runner.run

        yield make
        assert [s.called("check", []).result(30) for s in servers.servers] == [[]] * servers.n_shards


def test_an_error_of_a_shard_arrives_as_it_was_raised(servers: Servers) -> None:
    cluster = servers.cluster(2)
    with pytest.raises(AsOfInPast) as caught:
        cluster.read([by_user], {"user": 1}, as_of=NOW - 1)
    assert (type(caught.value), caught.value.code, caught.value.path) == (AsOfInPast, "as_of_in_past", "as_of")


def test_without_a_log_a_shard_that_was_restarted_refuses_everything(servers: Servers) -> None:
    """Its features are gone; an answer from what is left would say that nobody ever did anything."""
    cluster = servers.cluster(2, "none")
    cluster.ingest(*(order(user=u) for u in range(20)))
    servers.restart(1)
    with pytest.raises(Unavailable):
        servers.servers[1].called("ready", []).result(30)
    message = "shard 1 of 2 was restarted and its features are gone; start the cluster anew and load the events again"
    for attempt in (
        lambda: cluster.read([by_user], *({"user": u} for u in range(20))),
        lambda: cluster.ingest(*(order(user=u) for u in range(20))),
    ):
        with pytest.raises(Unavailable) as caught:
            attempt()
        assert (str(caught.value), caught.value.code, caught.value.retry_after_ms) == (message, "shard_lost", 10_000)


@pytest.mark.parametrize("durability", ["sync", "process"])
@pytest.mark.parametrize("restarted", [(), (1,)])
def test_with_a_log_a_shard_that_was_restarted_has_all_that_it_acknowledged(
    durability: str, restarted: tuple[int, ...], servers: Servers
) -> None:
    cluster = servers.cluster(2, durability)
    users = [{"user": u} for u in range(20)]
    for _ in range(3):
        cluster.ingest(*(order(user=u) for u in range(20)))
        before = cluster.read([by_user], *users).matrix
        servers.restart(*restarted)
        servers.ready()
        assert cluster.read([by_user], *users).matrix.tobytes() == before.tobytes()


def test_a_damaged_log_is_refused_and_says_where(servers: Servers) -> None:
    cluster = servers.cluster(1)
    for user in range(5):
        cluster.ingest(order(user=user))
    servers.stop()
    log = Path(servers.spec.data_dir) / "shards" / "000" / "log" / "cache.db"
    with sqlite3.connect(log) as database:
        ((value,),) = database.execute("SELECT value FROM Cache WHERE key = 3")
        database.execute("UPDATE Cache SET value = ? WHERE key = 3", (value[:-9] + b"\xff" + value[-8:],))
    database.close()
    servers.restart()
    message = "^shard 0 of 1 cannot recover: log: the record at offset 3 fails its checksum; run `millpond check`"
    with pytest.raises(Unavailable, match=message):
        servers.ready()
    with pytest.raises(Unavailable, match=message):
        cluster.ingest(order())
    (status,) = servers.runner.run(CallRead(servers, ShardMap.even(N_SLOTS, 1)).status())
    assert (status["state"], status["why"][:14]) == ("shard_lost", "cannot recover")


def test_a_shard_that_is_not_there_or_does_not_answer_in_time_is_unavailable(servers: Servers) -> None:
    servers.cluster(1)
    folder = Path(servers.spec.memory_dir)
    hasty = SocketCalls(folder, 1, timeout_s=0.05)
    busy = threading.Event()
    servers.servers[0]._loop.call_soon_threadsafe(busy.wait, 10)
    with pytest.raises(Unavailable) as caught:
        servers.runner.run(one_call(hasty, "status"))
    busy.set()
    assert (str(caught.value), caught.value.retry_after_ms) == ("shard 0 of 1 did not answer within 0.05 s", 1_000)
    servers.stop()
    with pytest.raises(Unavailable, match=r"^shard 0 of 1 is not running; it is being restarted$"):
        servers.runner.run(one_call(SocketCalls(folder, 1), "status"))


async def one_call(calls: SocketCalls, method: str, *arguments: Any) -> Any:
    try:
        return await calls.call(0, method, *arguments)
    finally:
        await calls.close()


def test_calls_that_a_shard_leaves_unanswered_when_it_ends_are_unavailable(servers: Servers) -> None:
    servers.cluster(1)
    calls = SocketCalls(Path(servers.spec.memory_dir), 1)

    async def end_meanwhile() -> Any:
        waiting = calls.call(0, "status"), calls.call(0, "no such method")
        await asyncio.wait(waiting)
        return [w.exception() for w in waiting]

    fine, unknown = servers.runner.run(end_meanwhile())
    assert fine is None
    assert str(unknown) == "shard 0 of 1 has no `no such method`; it is of another version"
    servers.runner.run(calls.close())


class NoCalls:
    n_shards = 2

    def call(self, shard: int, method: str, *arguments: Any) -> Any:
        raise AssertionError


def asked_of(clocks: list[list[int]], runner: asyncio.Runner) -> tuple[Any, list[tuple[int, int]]]:
    """Read two keys from two shards that answer as of these times, one after the other; return answer and calls."""
    plan, shard_map = ReadPlan(LAYOUT, [*by_user, *by_book], "the test"), ShardMap.even(16, 2)
    calls: list[tuple[int, int]] = []

    class Scripted(CallRead):
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
            return runner.run(Scripted(NoCalls(), shard_map).read(question)), calls
    raise AssertionError("no two keys on two shards")


def test_shards_that_lag_behind_are_asked_again_until_all_is_as_of_one_time(runner: asyncio.Runner) -> None:
    answer, calls = asked_of([[NOW], [NOW + 5]], runner)
    assert answer.as_of.tolist() == [NOW + 5]
    assert calls == [(0, NOW), (1, NOW + 5), (0, NOW + 5)]


def test_a_read_that_time_runs_away_from_is_given_up(runner: asyncio.Runner) -> None:
    with pytest.raises(Unavailable, match="faster than it can be read") as caught:
        asked_of([list(range(NOW, NOW + 1_000, 2)), list(range(NOW + 1, NOW + 1_000, 2))], runner)
    assert caught.value.retry_after_ms == 100


# -- snapshots, history, truncation, drain


def status_of(servers: Servers) -> list[dict[str, Any]]:
    return [s.called("status", []).result(30) for s in servers.servers]


def until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_after_a_drain_a_start_replays_nothing_and_all_is_there(servers: Servers) -> None:
    cluster = servers.cluster(2)
    cluster.ingest(*(order(user=u, book=f"b{u}") for u in range(200)))
    users = [{"user": u, "book": f"b{u}"} for u in range(200)]
    before = cluster.read([by_user, by_book], *users)
    for server in servers.servers:
        server.called("drain", []).result(30)
    with pytest.raises(Unavailable, match="is stopping"):
        cluster.ingest(order())
    replayed: list[int] = []
    servers.restart()
    servers.ready()
    for number, s in enumerate(status_of(servers)):
        assert (s["state"], s["log_end"] > 0, s["replayed"]) == ("ready", True, s["log_end"])
        snapshots = Path(servers.spec.data_dir) / "shards" / f"{number:03d}" / "snapshots"
        replayed += [s["log_end"] - int(path.name[:20]) for path in snapshots.iterdir()]
    assert replayed == [0, 0]
    after = cluster.read([by_user, by_book], *users)
    assert (after.matrix.tobytes(), after.unknown) == (before.matrix.tobytes(), before.unknown)


def test_snapshots_are_taken_and_the_log_is_truncated_while_events_go_on(servers: Servers) -> None:
    cluster = servers.cluster(2, snapshot_bytes=30_000)
    n = 0
    while min(s["log_first"] for s in status_of(servers)) == 0:
        assert n < 50_000
        cluster.ingest(*(order(user=u % 50, book=f"b{u % 7}", price=1.0) for u in range(100)))
        n += 100
    users = [{"user": u} for u in range(50)]
    counts = cluster.read([by_user], *users).matrix[:, 0]
    assert counts.sum() == n
    servers.restart()
    servers.ready()
    assert cluster.read([by_user], *users).matrix[:, 0].tolist() == counts.tolist()
    shards = Path(servers.spec.data_dir) / "shards"
    assert {len(list((shard / "snapshots").iterdir())) for shard in shards.glob("0*")} == {2}


@pytest.mark.parametrize("durability", ["process", "none"])
def test_memory_that_is_free_is_given_back(durability: str, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeper, "_GIVE_BACK_S", 0.05)
    cluster = servers.cluster(1, durability=durability)
    cluster.ingest(order())  # loads what a first event needs
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size = 64_000
    blocks = [libc.malloc(size) for _ in range(1_000)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    used, last = resident(), max(blocks)  # what is free at the end of the memory is given back without being asked
    for block in blocks:
        if block != last:
            libc.free(block)
    until(lambda: resident() < used - 40_000_000)
    libc.free(last)


@pytest.mark.parametrize("broken", ["damaged", "cut", "deleted"])
def test_without_the_newest_snapshot_an_older_one_and_more_of_the_log_do(broken: str, servers: Servers) -> None:
    cluster = servers.cluster(1)
    snapshots = Path(servers.spec.data_dir) / "shards" / "000" / "snapshots"
    for n in range(3):
        cluster.ingest(*(order(user=u) for u in range(30)))
        servers.servers[0].called("drain", []).result(30)
        servers.restart()
        servers.ready()
        assert len(list(snapshots.iterdir())) == min(n + 1, 2)
    newest = max(snapshots.iterdir())
    if broken == "deleted":
        newest.unlink()
    else:
        content = newest.read_bytes()
        cut, at = content[: len(content) // 2], len(content) // 2
        newest.write_bytes(cut if broken == "cut" else content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    servers.restart()
    servers.ready()
    assert cluster.read([by_user], *({"user": u} for u in range(30))).matrix[:, 0].tolist() == [3.0] * 30


def test_a_feature_that_is_added_is_computed_from_the_history_and_the_log(servers: Servers, tmp_path: Path) -> None:
    """The log begins later, and the snapshots know nothing of the feature."""
    cluster = servers.cluster(
        1, history_uri=str(tmp_path / "history"), history_part_bytes=20_000, snapshot_bytes=20_000
    )
    n = 0
    while status_of(servers)[0]["log_first"] == 0:
        assert n < 50_000
        cluster.ingest(*(order(user=u % 10, price=2.0) for u in range(100)))
        n += 100
    more = FeatureView("more", owner="ml", source=orders, key=["user"], features={"total": Sum("price"), "n": Count()})
    servers.spec = dataclasses.replace(servers.spec, views=(*servers.spec.views, more))
    servers.restart()
    servers.ready()
    layout = compile_layout([orders], servers.spec.views)
    plan = ReadPlan(layout, list(more), "test")
    read = CallRead(servers, ShardMap.even(N_SLOTS, 1))
    client = FeatureClient(layout, ShardMap.even(N_SLOTS, 1), CallIngest(servers), read, ManualClock(NOW))
    rows = servers.runner.run(client.read(plan, {"user": list(range(10))}, 10))
    assert rows.matrix.tolist() == [[2.0 * n / 10, n / 10]] * 10


class Coming:
    """The views that come while a cluster of the tests runs."""

    def __init__(self) -> None:
        self.views: list[AddedView] = []
        self._changes = 0

    def come(self, view: FeatureView, state: ViewState) -> None:
        """Have a view, or have it in another state."""
        others = {identity_of(one.view): one for one in self.views}
        self.views = list({**others, identity_of(view): AddedView(view, state)}.values())
        self._changes += 1

    def drop_all(self) -> None:
        """Have none any more, as a start that cannot keep them."""
        self.views = []
        self._changes += 1

    def generation(self) -> int:
        return self._changes

    def added(self) -> list[AddedView]:
        return list(self.views)


LATER = FeatureView("later", owner="tests", source=by_user.source, key=by_user.key,
                    features={"n": Count(), "sum": Sum("price")})  # fmt: skip


def later(servers: Servers, view: FeatureView = LATER, states: Sequence[str] = ("whole", "failed")) -> list[Any]:
    """What the shards say of the view, when it is in one of some states on each."""
    for _ in range(3_000):
        says = [
            server.called("status", []).result(30).get("views", {}).get(identity_of(view)) for server in servers.servers
        ]
        if all(one is not None and one["state"] in states for one in says):
            return says
        time.sleep(0.01)
    raise AssertionError(says)


def test_a_view_that_comes_is_computed_while_events_go_on_and_is_there_after_any_restart(servers: Servers) -> None:
    coming = Coming()
    cluster = servers.cluster(2, "process", added_views=coming)
    users = [{"user": u} for u in range(20)]

    def send(times: int) -> None:
        for _ in range(times):
            cluster.ingest(*(order(user=u) for u in range(20)))

    send(30)
    coming.come(LATER, "backfilling")
    send(30)
    assert [one["state"] for one in later(servers)] == ["whole", "whole"]
    send(1)
    layout = LAYOUT.extended([LATER])

    def counts() -> Any:
        reads = CallRead(servers, servers.spec.shard_map)
        client = FeatureClient(layout, servers.spec.shard_map, CallIngest(servers), reads, ManualClock(NOW))
        plan = ReadPlan(layout, [LATER["n"]], "the test")
        keys = plan.key_columns(users, batch=True)
        return servers.runner.run(client.read(plan, keys, len(users))).matrix[:, 0].tolist()

    assert counts() == [61.0] * 20
    servers.restart(0)  # its successor has it before it lets anybody in, though nobody has said that it is live
    servers.ready()
    assert counts() == [61.0] * 20
    for server in servers.servers:
        server.called("drain", []).result(30)
    coming.come(LATER, "live")
    servers.restart()
    servers.ready()
    assert counts() == [61.0] * 20
    send(1)
    assert counts() == [62.0] * 20


def test_a_view_with_a_key_of_its_own_gets_all_and_nothing_of_who_does_not_know_it(
    servers: Servers,
) -> None:
    coming = Coming()
    cluster = servers.cluster(2, "process", added_views=coming)
    reads_of = FeatureView("reads", owner="tests", source=by_user.source, key=["book", "user"], features={"n": Count()})
    layout = LAYOUT.extended([reads_of])
    cluster.ingest(*(order(user=u % 3) for u in range(30)))
    coming.come(reads_of, "added")
    later(servers, reads_of, ["added"])
    cluster.ingest(*(order(user=u % 3) for u in range(30)))

    async def cut() -> Any:
        return await servers.call(0, "cut", 1)

    with pytest.raises(Unavailable, match="has not heard yet that all know of key 1"):
        servers.runner.run(cut())

    def client_of() -> FeatureClient:
        reads = CallRead(servers, servers.spec.shard_map)
        return FeatureClient(layout, servers.spec.shard_map, CallIngest(servers), reads, ManualClock(NOW))

    knows = client_of()
    events = [order(user=u % 3) for u in range(30)]
    servers.runner.run(knows.ingest("orders", batch(layout.source("orders"), events)))
    coming.come(reads_of, "backfilling")
    servers.restart(1)
    servers.ready()
    assert [one["state"] for one in later(servers, reads_of)] == ["whole", "whole"]
    late = order(user=1)
    with pytest.raises(Unavailable, match="has not heard of a key that came; send them again") as refused:
        cluster.ingest(late)
    assert refused.value.code == "stale_routes"
    servers.runner.run(knows.ingest("orders", batch(layout.source("orders"), [late])))

    def counts() -> Any:
        plan = ReadPlan(layout, [reads_of["n"]], "the test")
        keys = plan.key_columns([{"book": "b", "user": n} for n in range(3)], batch=True)
        return servers.runner.run(client_of().read(plan, keys, 3)).matrix[:, 0].tolist()

    assert counts() == [30.0, 31.0, 30.0]
    coming.come(reads_of, "live")
    servers.restart()
    servers.ready()
    assert counts() == [30.0, 31.0, 30.0]


OF_BOOKS = FeatureView("reads", owner="tests", source=by_user.source, key=["book", "user"], features={"n": Count()})
OF_BOOKS_TOO = FeatureView(
    "reads_too", owner="tests", source=by_user.source, key=["book", "user"], features={"sum": Sum("price")}
)


def knowing(servers: Servers, *views: FeatureView) -> FeatureClient:
    """A client that brings events to the keys of these views, too."""
    reads = CallRead(servers, servers.spec.shard_map)
    return FeatureClient(
        LAYOUT.extended(views), servers.spec.shard_map, CallIngest(servers), reads, ManualClock(NOW)
    )  # fmt: skip


def reads_of_users(servers: Servers, users: int) -> list[float]:
    client = knowing(servers, OF_BOOKS)
    plan = ReadPlan(client.layout, [OF_BOOKS["n"]], "the test")
    keys = plan.key_columns([{"book": "b", "user": n} for n in range(users)], batch=True)
    found: list[float] = servers.runner.run(client.read(plan, keys, users)).matrix[:, 0].tolist()
    return found


def test_two_views_of_a_key_that_comes_wait_for_it_together(servers: Servers) -> None:
    """Only the first of them is said to wait for whoever takes events in."""
    coming = Coming()
    cluster = servers.cluster(2, "process", added_views=coming)
    coming.come(OF_BOOKS, "added")
    coming.come(OF_BOOKS_TOO, "backfilling")
    coming.come(LATER, "backfilling")
    assert [one["state"] for one in later(servers, LATER)] == ["whole", "whole"]
    cluster.ingest(*(order(user=u % 3) for u in range(30)))  # nobody knows the key yet
    coming.come(OF_BOOKS, "backfilling")
    for view in (OF_BOOKS, OF_BOOKS_TOO):
        assert [one["state"] for one in later(servers, view)] == ["whole", "whole"]
    assert reads_of_users(servers, 3) == [10.0] * 3


def test_what_a_backfill_that_failed_had_brought_is_not_brought_again(servers: Servers) -> None:
    """Its view is dropped by a start, and deployed again later."""
    coming = Coming()
    cluster = servers.cluster(2, "process", added_views=coming)
    cluster.ingest(*(order(user=u % 8) for u in range(80)))
    cluster.ingest(*(order(user=u % 8) for u in range(80)))
    whole = stored(servers, 1)
    store(servers, whole[:-9] + b"\xff" + whole[-8:], 1)
    coming.come(OF_BOOKS, "backfilling")
    assert [one["state"] for one in later(servers, OF_BOOKS)] == ["failed", "failed"]
    store(servers, whole, 1)
    coming.drop_all()
    servers.restart()
    servers.ready()
    coming.come(OF_BOOKS, "backfilling")
    assert [one["state"] for one in later(servers, OF_BOOKS)] == ["whole", "whole"]
    assert reads_of_users(servers, 8) == [20.0] * 8


def test_that_a_view_was_whole_is_forgotten_by_a_start_without_it(servers: Servers) -> None:
    coming = Coming()
    cluster = servers.cluster(2, "process", added_views=coming)
    cluster.ingest(*(order(user=u % 8) for u in range(80)))
    coming.come(OF_BOOKS, "backfilling")
    assert [one["state"] for one in later(servers, OF_BOOKS)] == ["whole", "whole"]
    coming.drop_all()
    servers.restart()
    servers.ready()
    cluster.ingest(*(order(user=u % 8) for u in range(80)))  # nobody brings these to its key
    coming.come(OF_BOOKS, "added")
    later(servers, OF_BOOKS, ["added"])
    servers.restart()
    servers.ready()
    assert [one["state"] for one in later(servers, OF_BOOKS, ["added", "whole"])] == ["added", "added"]
    coming.come(OF_BOOKS, "backfilling")
    assert [one["state"] for one in later(servers, OF_BOOKS)] == ["whole", "whole"]
    assert reads_of_users(servers, 8) == [20.0] * 8


def test_a_disk_that_is_full_for_a_moment_holds_no_key_up(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    coming = Coming()
    cluster = servers.cluster(1, "process", added_views=coming, disk_free_bytes_min=1)
    cluster.ingest(*(order(user=u % 3) for u in range(30)))
    coming.come(OF_BOOKS, "added")
    later(servers, OF_BOOKS, ["added"])
    asked, go_on = threading.Event(), threading.Event()

    class Full:
        f_bavail = f_frsize = 0

    def statvfs(path: Any) -> Any:
        asked.set()
        assert go_on.wait(30)
        return Full

    monkeypatch.setattr(view_follower, "_AGAIN_S", 0.05)
    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as thread:
        patched.setattr("millpond.feature_actors.log.log.os.statvfs", statvfs)
        sent = thread.submit(cluster.ingest, *(order(user=u % 3) for u in range(3_000)))
        assert asked.wait(30)
        coming.come(OF_BOOKS, "backfilling")
        until(lambda: servers.servers[0]._at.waiting)  # it waits for what was taken before
        go_on.set()
        with pytest.raises(Unavailable, match="MB are left on the disk"):
            sent.result(30)
    assert [one["state"] for one in later(servers, OF_BOOKS)] == ["whole"]
    assert reads_of_users(servers, 3) == [10.0] * 3


def test_a_backfill_that_a_full_disk_breaks_off_is_tried_again_by_itself(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming = Coming()
    cluster = servers.cluster(2, "process", added_views=coming, disk_free_bytes_min=1)
    for _ in range(20):
        cluster.ingest(*(order(user=u % 8) for u in range(80)))
    full = threading.Event()

    class Full:
        f_bavail = f_frsize = 0

    def statvfs(path: Any) -> Any:
        return Full if full.is_set() else os.statvfs_result([1 << 20] * 10)

    monkeypatch.setattr(view_follower, "_AGAIN_S", 0.05)
    monkeypatch.setattr("millpond.feature_actors.log.log.os.statvfs", statvfs)
    full.set()
    coming.come(OF_BOOKS, "backfilling")
    for number in range(2):
        until(lambda n=number: "it is tried again" in later(servers, OF_BOOKS, ["backfilling"])[n]["why"])
    said = later(servers, OF_BOOKS, ["backfilling"])
    assert all(one["why"].startswith("log: 0 MB are left on the disk") for one in said)
    full.clear()
    assert [(one["state"], one["why"]) for one in later(servers, OF_BOOKS)] == [("whole", "")] * 2
    assert reads_of_users(servers, 8) == [200.0] * 8


def test_a_shard_that_is_away_is_named_by_a_backfill_that_waits_for_it_and_goes_on_when_it_is_back(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming = Coming()
    cluster = servers.cluster(2, "process", added_views=coming)
    cluster.ingest(*(order(user=u % 8) for u in range(80)))
    monkeypatch.setattr(view_follower, "_AGAIN_S", 0.05)
    monkeypatch.setattr(view_follower, "_CUT_S_MAX", 0.3)
    servers.servers[1].close()
    coming.come(OF_BOOKS, "backfilling")

    def why() -> str:
        views = servers.servers[0].called("status", []).result(30)["views"]
        return str(views.get(identity_of(OF_BOOKS), {}).get("why", ""))

    until(why)
    assert why() == (
        "shard 1 of 2 has not said within 0.3 s up to where events are to be brought to key 1: shard 1 of 2 is not "
        "running; it is being restarted; it is tried again"
    )
    servers.servers[1] = servers._serve(1)
    servers.ready()
    assert [one["state"] for one in later(servers, OF_BOOKS)] == ["whole", "whole"]
    assert reads_of_users(servers, 8) == [10.0] * 8


def test_without_a_log_a_view_that_comes_fails_and_says_why(servers: Servers) -> None:
    coming = Coming()
    cluster = servers.cluster(1, "none", added_views=coming)
    cluster.ingest(order(user=1))
    coming.come(LATER, "backfilling")
    (one,) = later(servers)
    assert (one["state"], one["why"]) == (
        "failed", 'without a log (`durability = "none"`) nothing is known of what was before the view'
    )  # fmt: skip
    cluster.ingest(order(user=1))


def test_with_too_little_room_left_on_the_disk_events_are_refused_and_reads_go_on(servers: Servers) -> None:
    cluster = servers.cluster(1)
    cluster.ingest(order(user=5))
    servers.spec = dataclasses.replace(servers.spec, disk_free_bytes_min=1 << 60)
    servers.restart()
    servers.ready()
    first = order(user=5)
    with pytest.raises(Unavailable, match="MB are left on the disk; events are taken with at least") as caught:
        cluster.ingest(first)
    assert (caught.value.code, caught.value.retry_after_ms) == ("log_full", 10_000)
    assert cluster.read([by_user], {"user": 5}).matrix[0, 0] == 1.0
    servers.spec = dataclasses.replace(servers.spec, disk_free_bytes_min=0)
    servers.restart()
    servers.ready()
    assert cluster.ingest(first).accepted == 1


def test_more_than_may_wait_for_the_log_is_refused(servers: Servers) -> None:
    cluster = servers.cluster(1, queue_bytes_max=-1)
    with pytest.raises(TooMany, match="bytes of events wait for its log") as caught:
        cluster.ingest(order())
    assert (caught.value.status, caught.value.code) == (429, "queue_full")


# -- a shard and its folder


def folder_of(servers: Servers, shard: int = 0) -> Path:
    return Path(servers.spec.data_dir) / "shards" / f"{shard:03d}"


def test_two_processes_never_write_to_one_shard(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits, and is refused; when the first ends, a third that waits for it has the shard."""
    cluster = servers.cluster(1)
    cluster.ingest(order(user=1))
    epoch = (folder_of(servers) / "epoch.json").read_bytes()
    monkeypatch.setattr(manifest, "SHARD_WAIT_S", 0.1)
    message = rf"^shard 000: `{folder_of(servers)}` is still in use by cluster `served` \(process {os.getpid()}, since "
    with pytest.raises(Unavailable, match=message):
        servers._serve(0)
    assert (folder_of(servers) / "epoch.json").read_bytes() == epoch
    assert cluster.ingest(order(user=1)).accepted == 1
    monkeypatch.setattr(manifest, "SHARD_WAIT_S", 30.0)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(servers._serve, 0)
        assert not waits.done()
        servers.servers[0].close()
        servers.servers[0] = waits.result(30)
    servers.ready()
    assert cluster.read([by_user], {"user": 1}).matrix[0, 0] == 2.0


def test_a_shard_that_could_not_be_opened_holds_nothing(servers: Servers) -> None:
    servers.cluster(1)
    servers.stop()
    epoch = folder_of(servers) / "epoch.json"
    whole = epoch.read_text()
    epoch.write_text("{}")
    with pytest.raises(ManifestError, match=r"is damaged: its `cluster_id` is missing or wrong"):
        servers._serve(0)
    assert not (folder_of(servers) / "lock").exists()
    epoch.write_text(whole)
    servers.restart()
    servers.ready()


@pytest.mark.parametrize("lost", ["log", "."])
@pytest.mark.parametrize("durability", ["sync", "process"])
def test_a_shard_whose_log_is_gone_does_not_begin_empty(lost: str, durability: str, servers: Servers) -> None:
    """Not even within the run of the cluster; and what it was goes on when the disk is back."""
    cluster = servers.cluster(1, durability)
    cluster.ingest(order(user=5))
    servers.stop()
    there, aside = folder_of(servers) / lost, Path(servers.spec.data_dir) / "aside"
    there.rename(aside)
    with pytest.raises(
        ManifestError, match=r"^data directory: .* missing.*is the right disk there\? Otherwise restore"
    ):
        servers._serve(0)
    assert not there.exists()
    aside.rename(there)
    servers.restart()
    servers.ready()
    assert cluster.read([by_user], {"user": 5}).matrix[0, 0] == 1.0


@pytest.mark.parametrize("known_by", ["epoch", "history"])
def test_an_empty_log_in_place_of_the_one_that_was_there_is_refused(
    known_by: str, servers: Servers, tmp_path: Path
) -> None:
    cluster = servers.cluster(1, "sync", history_uri=str(tmp_path / "history"), history_part_bytes=100)
    for user in range(30):
        cluster.ingest(order(user=user))
    if known_by == "epoch":
        servers.restart()
        servers.ready()
    else:
        until(lambda: status_of(servers)[0]["history_to"] > 0)
    servers.stop()
    log, aside = folder_of(servers) / "log", Path(servers.spec.data_dir) / "aside"
    log.rename(aside)
    Log(log).close()
    servers.restart()
    went = "it went to 30 at least; restore the directory" if known_by == "epoch" else "the history goes to"
    with pytest.raises(Unavailable, match=f"^shard 0 of 1 cannot recover: .* ends at offset 0, and {went}"):
        servers.ready()
    servers.stop()
    shutil.rmtree(log)
    aside.rename(log)
    servers.restart()
    servers.ready()
    assert cluster.read([by_user], {"user": 29}).matrix[0, 0] == 1.0


@pytest.mark.parametrize("what", ["log", "snapshot"])
def test_what_a_later_version_wrote_is_refused_and_left_as_it_is(what: str, servers: Servers) -> None:
    cluster = servers.cluster(1)
    cluster.ingest(order(user=5))
    if what == "snapshot":
        servers.servers[0].called("drain", []).result(30)
    servers.stop()
    if what == "snapshot":
        (path,) = (folder_of(servers) / "snapshots").iterdir()
        whole = path.read_bytes()
        later = whole[:6] + (int.from_bytes(whole[6:8], "little") + 1).to_bytes(2, "little") + whole[8:]
        path.write_bytes(later)
        message = rf"^shard 0 of 1 cannot recover: snapshot: `{path}` is of format \d+; this version reads \d+; start"
    else:
        whole = stored(servers)
        later = b"MPL9" + whole[4:]
        store(servers, later)
        message = (
            "^shard 0 of 1 cannot recover: log: the record at offset 0 begins with b'MPL9'; this version reads b'MPL"
        )
    servers.restart()
    with pytest.raises(Unavailable, match=message):
        servers.ready()
    servers.stop()
    if what == "snapshot":
        assert path.read_bytes() == later
        path.write_bytes(whole)
    else:
        assert stored(servers) == later
        store(servers, whole)
    servers.restart()
    servers.ready()
    assert cluster.read([by_user], {"user": 5}).matrix[0, 0] == 1.0


def stored(servers: Servers, shard: int = 0) -> bytes:
    with closing(sqlite3.connect(folder_of(servers, shard) / "log" / "cache.db")) as database:
        ((value,),) = database.execute("SELECT value FROM Cache WHERE key = 0")
    return bytes(value)


def store(servers: Servers, value: bytes, shard: int = 0) -> None:
    with closing(sqlite3.connect(folder_of(servers, shard) / "log" / "cache.db")) as database, database:
        database.execute("UPDATE Cache SET value = ? WHERE key = 0", (value,))


# -- requests that are slow, or end halfway


class Held(CallIngest):
    """Of an ingress that is slow: its takes leave when they are let `go`; `held` says that they would."""

    def __init__(self, calls: Any) -> None:
        super().__init__(calls)
        self.held, self.go = asyncio.Event(), asyncio.Event()

    def take(self, *arguments: Any) -> Any:
        return asyncio.ensure_future(self._take(*arguments))

    async def _take(self, *arguments: Any) -> None:
        self.held.set()
        await self.go.wait()
        await super().take(*arguments)

    def client(self, servers: Servers) -> FeatureClient:
        shard_map = ShardMap.even(N_SLOTS, servers.n_shards)
        return FeatureClient(LAYOUT, shard_map, self, CallRead(servers, shard_map), ManualClock(NOW))


def mixed(n: int = 200) -> list[dict[str, Any]]:
    """Events of one time, the k-th with price k, whose homes and keys are on all shards."""
    return [order(user=k % 7, book=f"b{k % 5}", price=float(k), order=f"mixed-{k}") for k in range(n)]


def applied(servers: Servers) -> dict[tuple[Any, ...], list[float]]:
    """Return the prices of the events of each entity, in the order in which they were applied to its row."""
    prices: dict[tuple[Any, ...], list[float]] = {}
    past = Past(Path(servers.spec.data_dir), None)
    for shard in range(past.shards):
        for _, record in past.records(shard):
            for bits, event in zip(record.routes.tolist(), record.batch.to_pylist(), strict=True):
                for number, key in enumerate(record.tables):
                    if bits >> (number + 1) & 1:
                        prices.setdefault(tuple((name, event[name]) for name in key), []).append(event["price"])
    return prices


def by_entity(events: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], list[float]]:
    prices: dict[tuple[Any, ...], list[float]] = {}
    for event in events:
        for key in (("user",), ("book",), ("user", "book")):
            prices.setdefault(tuple((name, event[name]) for name in key), []).append(event["price"])
    return prices


def owed(servers: Servers) -> int:
    return sum(s["owed"] for s in status_of(servers))


def test_a_slow_request_is_applied_in_its_order_also_if_it_is_sent_again_meanwhile(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What homes deliver comes home by home: the last bits of sums would depend on how busy a machine is."""
    monkeypatch.setattr(server_module, "_DELIVER_AFTER_S", 0.2)
    monkeypatch.setattr(server_module, "_SETTLE_S_MAX", 0.5)
    other, events = servers.cluster(3).client, batch(LAYOUT.source("orders"), mixed())

    async def send_twice() -> Any:
        held = Held(servers)
        slow = held.client(servers)
        first = asyncio.ensure_future(slow.ingest("orders", events))
        await held.held.wait()
        with contextlib.suppress(Unavailable):  # it is a duplicate of what cannot be seen yet
            await other.ingest("orders", events)
        held.go.set()
        ack = await first
        await slow.settle()
        return ack

    assert servers.runner.run(send_twice()).accepted == 200
    assert applied(servers) == by_entity(mixed())
    assert servers.runner.run(other.ingest("orders", events)).duplicates == 200
    assert applied(servers) == by_entity(mixed())
    assert owed(servers) == 0


def test_what_an_ingress_has_offered_that_ends_is_delivered(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_DELIVER_AFTER_S", 0.1)
    servers.cluster(3)

    async def end_halfway() -> None:
        calls = SocketCalls(Path(servers.spec.memory_dir), 3)
        ends = Held(calls)
        request = asyncio.ensure_future(ends.client(servers).ingest("orders", batch(LAYOUT.source("orders"), mixed())))
        await ends.held.wait()
        request.cancel()
        await calls.close()

    servers.runner.run(end_halfway())
    until(lambda: owed(servers) == 0)
    assert {key: sorted(prices) for key, prices in applied(servers).items()} == by_entity(mixed())


def test_what_of_a_request_was_accepted_that_failed_is_delivered_though_its_ingress_goes_on(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_DELIVER_AFTER_S", 0.1)
    cluster = servers.cluster(2)
    servers.servers[1].close()
    with pytest.raises(Unavailable):
        cluster.ingest(*mixed())
    servers.servers[1] = servers._serve(1)
    servers.ready()
    until(lambda: owed(servers) == 0)
    homes = ShardMap.even(N_SLOTS, 2).shards_of(hash_columns([pa.array([e["order"] for e in mixed()])], 200))
    accepted = [event for event, home in zip(mixed(), homes.tolist(), strict=True) if home == 0]
    assert applied(servers) == by_entity(accepted)
    assert cluster.ingest(*mixed()).duplicates == len(accepted)
    assert {key: sorted(prices) for key, prices in applied(servers).items()} == by_entity(mixed())


# -- a log that fails

FAILS = """
import sqlite3, sys
from pathlib import Path
from port_contract import order
from millpond.feature_actors.log.log import Log
from test_server import Servers

servers = Servers(Path(sys.argv[1]))
cluster = servers.cluster({n_shards}, "sync")
cluster.ingest(*(order(user=u, order=f"before-{{u}}") for u in range(20)))
print(servers.spec.data_dir, flush=True)
append = Log.append

def fails(self, records, settled=0):
    if {late}:
        append(self, records, settled)
    raise sqlite3.OperationalError("disk I/O error")

Log.append = fails
cluster.ingest(*(order(user=u, order=f"{{u}}") for u in range({n})))
print("acknowledged", flush=True)
"""


@pytest.mark.parametrize("late", [False, True], ids=["nothing written", "written, but who knows"])
@pytest.mark.parametrize("n", [1, 2_000], ids=["small", "large"])
def test_a_log_that_fails_ends_the_process_and_a_retry_counts_once(n: int, late: bool, servers: Servers) -> None:
    """fsync says once that something is lost, and that all is well the next time: what is on disk is read again."""
    servers.cluster(1, "sync")  # for its layout; the data are those of the other process
    servers.stop()
    with tempfile.TemporaryDirectory(prefix="mp-") as home:
        code = FAILS.format(n_shards=1, n=n, late=late)
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", code, home], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        (said,) = done.stdout.splitlines()
        assert done.returncode == 70, done.stderr
        assert "failed while it wrote; its process ends and recovers" in done.stderr
        servers.spec = dataclasses.replace(servers.spec, data_dir=said, run_id="next")
        log = Log(folder_of(servers) / "log")
        ids = [i for _, (record, _) in log.read() for i in record.batch["order"].to_pylist()]
        log.close()
        assert ids == [f"before-{u}" for u in range(20)] + [f"{u}" for u in range(n) if late]
        servers.restart()
        servers.ready()
        cluster = servers.served()
        retried = [order(user=u, order=f"{u}") for u in range(n)]
        for ack in (cluster.ingest(*retried), cluster.ingest(*retried)):
            assert (ack.accepted, ack.duplicates) == ((0, n) if late else (n, 0))
            late = True
        users = [{"user": u} for u in range(max(n, 20))]
        expected = [float((u < 20) + (u < n)) for u in range(max(n, 20))]
        assert cluster.read([by_user], *users).matrix[:, 0].tolist() == expected
        servers.stop()
