"""An entity forgotten by shards that serve: nothing of it is in any file, and others notice nothing."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_engine_vs_oracle import plan_of
from test_server import Servers

from millpond.cluster.packs.masking import Mask
from millpond.deployments.erased_scores import ScoreEraser
from millpond.deployments.forgetter import Forgetter
from millpond.feature_actors import Count, FeatureView, Field, Last, LastN, Source, Sum
from millpond.feature_actors.calls import CallIngest, CallRead
from millpond.feature_actors.client import Ack, FeatureClient
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.errors import BadRequest, NotFound, Unavailable
from millpond.feature_actors.keys import hash_values
from millpond.feature_actors.layout import compile_layout
from millpond.models.registry import Registry
from millpond.models.score_log import SCHEMA, ScoreFiles, read_scores

NOW = 1_700_000_000_000
ORDERS = Source(
    "orders",
    owner="tests",
    fields={
        "order": "string", "at": "timestamp[ms, UTC]", "user": "int64", "book": "string", "price": "float64",
        "email": Field("string", optional=True, personal=True),
    },
    event_id="order",
    event_time="at",
)  # fmt: skip
BY_USER = FeatureView(
    "by_user", owner="tests", source=ORDERS, key=["user"],
    features={"n": Count(window="7d"), "sum": Sum("price"), "books": LastN("book", n=3)},
)  # fmt: skip
BY_BOOK = FeatureView(
    "by_book", owner="tests", source=ORDERS, key=["book"],
    features={"n": Count(window="7d"), "sum": Sum("price"), "last": Last("price", ttl="90d")},
)  # fmt: skip
BY_BOTH = FeatureView("by_both", owner="tests", source=ORDERS, key=["user", "book"], features={"n": Count()})
#: What others have of the one who is to be forgotten.
SEEN = FeatureView(
    "seen", owner="tests", source=ORDERS, key=["book"],
    features={"who": LastN("user", n=3), "mails": LastN("email", n=2, window="7d")},
)  # fmt: skip
LAYOUT = compile_layout([], [BY_USER, BY_BOOK, BY_BOTH, SEEN])
WHO, EMAIL = 4_242_424_242_424_242, "who@somewhere.example"
OTHERS = range(1, 30)
BOOKS = ["a", "b", "c"]


@pytest.fixture
def servers() -> Iterator[Servers]:
    folder = Path(tempfile.mkdtemp(prefix="mp-"))  # short: a socket's path is
    servers = Servers(folder)
    yield servers
    servers.stop()
    servers.runner.close()
    shutil.rmtree(folder)


def scan(*folders: Path) -> list[tuple[str, str]]:
    """Let a process of its own look for the key, its hash and its mask in every file; return (file, what)."""
    mask = Mask(b"a key that exports have")
    low, high = hash_values([[WHO]], 1).view(np.int64)[0].tolist()
    masked = int(mask.words(np.array([WHO], np.uint64), 64).view(np.int64)[0])
    as_float = int(np.array([WHO], np.float64).view(np.int64)[0])
    wanted = {"words": [WHO, low, high, masked, as_float], "texts": [EMAIL, mask.text(EMAIL)]}
    script = Path(__file__).parent / "scan_files.py"
    command = [sys.executable, str(script), json.dumps(wanted), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [(file, what) for file, what in json.loads(done.stdout)]


class World:
    """Two shards that serve, with a history, and a client of them."""

    def __init__(self, servers: Servers, history: Path, n_shards: int = 2) -> None:
        self.servers, self.history = servers, history
        servers.start(
            LAYOUT, n_shards, history_uri=str(history), history_part_bytes=20_000,
            scores=ScoreEraser(str(history), str(history.parent / "registry")),
        )  # fmt: skip
        servers.ready()
        self.clock = ManualClock(NOW)
        self.read_port = CallRead(servers, servers.spec.shard_map)
        self.client = FeatureClient(LAYOUT, servers.spec.shard_map, CallIngest(servers), self.read_port, self.clock)
        self.home = Path(servers.spec.data_dir)

    def send(self, events: Sequence[dict[str, Any]]) -> Ack:
        batch = pa.RecordBatch.from_pylist(list(events), schema=ORDERS.schema)
        ack: Ack = self.servers.runner.run(self.client.ingest("orders", batch))
        return ack

    def features(self, view: FeatureView, keys: Sequence[dict[str, Any]]) -> Any:
        plan = plan_of(self.client, view)
        rows = self.servers.runner.run(self.client.read(plan, plan.key_columns(keys, batch=True), len(keys)))
        return rows.matrix.tobytes(), rows.texts, rows.unknown

    def everybody(self) -> Any:
        return [
            self.features(BY_USER, [{"user": u} for u in OTHERS]),
            self.features(BY_BOOK, [{"book": b} for b in BOOKS]),
            self.features(BY_BOTH, [{"user": u, "book": b} for u in OTHERS for b in BOOKS]),
        ]

    def until(self, what: str, condition: Any) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}: {self.statuses()}"
            time.sleep(0.02)

    def statuses(self) -> list[dict[str, Any]]:
        return [s.called("status", []).result(30) for s in self.servers.servers]

    def forget(self) -> None:
        self.servers.runner.run(self.read_port.forget("user", WHO, NOW))

    def forgotten(self) -> list[Any]:
        while True:
            try:
                found: list[Any] = self.servers.runner.run(self.read_port.forgotten("user", WHO))
                return found
            except Unavailable:  # the connection of before a restart
                self.servers.ready()

    def wait_until_forgotten(self) -> None:
        self.until("it to be forgotten", lambda: all(one["state"] == "done" for one in self.forgotten()))


def orders(n: int, who: int | None = None, prefix: str = "o", at: int = NOW) -> list[dict[str, Any]]:
    return [
        {
            "order": f"{prefix}-{i}", "at": at, "user": OTHERS[i % len(OTHERS)] if who is None else who,
            "book": BOOKS[i % 3], "price": 1.0 + i, "email": EMAIL if who == WHO else f"{i}@x",
        }
        for i in range(n)
    ]  # fmt: skip


def planted(world: World) -> list[dict[str, Any]]:
    """Have events of the one who is to be forgotten in log, write-ahead file, snapshots, history and score log."""
    everything = []
    for n in range(3):
        world.send(orders(300, prefix=f"o{n}"))
        own = orders(20, WHO, f"w{n}")
        world.send(own)
        everything += own
        for server in world.servers.servers:
            server.called("snapshot", []).result(30)
    world.until("a history", lambda: min(s["history_to"] for s in world.statuses()) > 0)
    own = orders(5, WHO, "late")
    world.send(own)
    scores = [
        {
            "id": f"s{i}", "served_ms": NOW, "as_of_ms": NOW, "model": "m", "version": "1", "digest": "",
            "role": "champion", "key": json.dumps({"user": user}), "features": [1.0], "texts": "{}", "unknown": [],
            "result": "1", "rows": [],
        }
        for i, user in enumerate([WHO, 1, WHO, 2])
    ]  # fmt: skip
    ScoreFiles(str(world.history), "one", 100).write(pa.Table.from_pylist(scores, SCHEMA))
    # An example of a shadow, in what a replica reported that has ended.
    example = {"id": {"user": WHO}, "champion": 1.0, "shadow": 2.0}
    with closing(Registry(world.history.parent / "registry")) as registry:
        registry.report("ended", {"pid": 1, "started_ticks": -1, "shadows": {"m": {"examples": [example]}}})
    return [*everything, *own]


def kinds(found: Sequence[tuple[str, str]]) -> set[str]:
    """Return of what kind the files are in which something was found."""
    names = {
        "registry/index/cache.db": "registry",
        "cache.db-wal": "wal",
        "cache.db": "log",
        ".snapshot": "snapshot",
        ".tiles": "memory",
    }
    kinds = set()
    for file, _ in found:
        kind = next((kind for end, kind in names.items() if file.endswith(end)), None)
        kinds.add(kind or ("scores" if "_scores" in file else "history" if file.endswith(".parquet") else file))
    return kinds


def test_nothing_of_who_is_forgotten_is_in_any_file_and_others_notice_nothing(servers: Servers, tmp_path: Path) -> None:
    world = World(servers, tmp_path / "history")
    sent = planted(world)
    before = world.everybody()
    found = scan(world.home, tmp_path)
    assert kinds(found) == {"wal", "log", "snapshot", "memory", "history", "scores", "registry"}
    what = {what.partition(" ")[0] for _, what in found}
    assert what == {"word", "digits", "text"}, found  # the key, its hash; in keys of scores; the email
    world.forget()
    # From here on what happened before is refused, wherever the others are with it.
    assert world.send(orders(2, WHO, "new")) == Ack(forgotten=2)
    world.wait_until_forgotten()
    texts = world.features(SEEN, [{"book": book} for book in BOOKS])[1]["seen.mails"]
    assert all(text is not None and text.startswith("~forgotten-") for pair in texts for text in pair)
    removed = [one["removed"] for one in world.forgotten()]
    assert sum(one.get("events", 0) for one in removed) == len(sent)
    assert (sum(one["rows"] for one in removed), removed[0]["scores"]) == (1 + 3, 2)
    assert scan(world.home, tmp_path) == []
    assert world.everybody() == before
    assert world.features(BY_USER, [{"user": WHO}])[2] == [["by_user"]]
    assert world.send(sent[:20]) == Ack(forgotten=20)
    # Asked for again, it is harmless; started again, it is as it was.
    world.forget()
    world.wait_until_forgotten()
    servers.restart()
    servers.ready()
    assert world.everybody() == before
    assert world.features(BY_USER, [{"user": WHO}])[2] == [["by_user"]]
    assert world.send([*sent[:3], *orders(1)]) == Ack(forgotten=3, duplicates=0, accepted=1)
    assert scan(world.home, tmp_path) == []
    assert [one["key"] for table in read_scores(str(world.history)) for one in table.to_pylist()] == [
        '{"user": 1}', '{"user": 2}'
    ]  # fmt: skip
    # What happens later begins afresh.
    world.clock.ms = NOW + 1_000
    assert world.send(orders(2, WHO, "afresh", NOW + 1)) == Ack(accepted=2)
    assert world.features(BY_USER, [{"user": WHO}]) == world.features(BY_USER, [{"user": WHO}])
    assert world.features(BY_BOTH, [{"user": WHO, "book": "a"}])[2] == [[]]
    assert [s.called("check", []).result(30) for s in servers.servers] == [[], []]


def test_shards_that_end_meanwhile_go_on_with_it_by_themselves(servers: Servers, tmp_path: Path) -> None:
    world = World(servers, tmp_path / "history")
    planted(world)
    before = world.everybody()
    world.forget()
    for step in ("reading its past", "taking a snapshot", "rewriting its log", "scrubbing its log"):
        # The steps are short, so one may be over before it is seen.
        world.until(step, lambda step=step: {one["state"] for one in world.forgotten()} & {step, "done"})
        servers.restart(0, 1)
        servers.ready()
    world.wait_until_forgotten()
    assert scan(world.home, tmp_path) == []
    assert world.everybody() == before


def test_who_comes_while_another_is_about_to_be_forgotten_is_forgotten_everywhere(
    servers: Servers, tmp_path: Path
) -> None:
    """Also if whoever asked for it has gone, and has told one shard alone."""
    world = World(servers, tmp_path / "history")
    planted(world)
    shard = servers.servers[0]
    lock = shard._at.housekeeping
    asyncio.run_coroutine_threadsafe(lock.acquire(), shard._loop).result(30)
    shard.called("forget", ["user", 1, NOW]).result(30)
    world.until("the shard to wait for its turn", lambda: lock._waiters)
    shard.called("forget", ["user", WHO, NOW]).result(30)
    shard._loop.call_soon_threadsafe(lock.release)
    world.until("it to be forgotten there", lambda: (world.forgotten()[0] or {})["state"] == "done")
    assert [one and one["state"] for one in world.forgotten()] == ["done", "done"]
    assert world.forgotten()[0]["removed"]["scores"] == 2
    assert [one["key"] for table in read_scores(str(world.history)) for one in table.to_pylist()] == ['{"user": 2}']
    assert scan(world.home, tmp_path) == []


def test_what_is_no_entity_is_refused_and_says_why(servers: Servers, tmp_path: Path) -> None:
    world = World(servers, tmp_path / "history", n_shards=1)
    forgetter = Forgetter(world.read_port, world.client, wall_clock=False)

    def refused(key: Any) -> str:
        with pytest.raises((BadRequest, NotFound)) as caught:
            servers.runner.run(forgetter.forget(key))
        return str(caught.value)

    assert refused({"usr": 1}) == "forget: no view has `usr` in its key; known: `book`, `user`; did you mean `user`?"
    assert refused({"user": "x"}) == "forget: expected `user` as int64, got 'x' - at `$.user`"
    assert refused({"user": 1, "book": "a"}).startswith(
        "forget: got `user`, `book`; an entity is forgotten by one field"
    )
    assert "an object of one key field" in refused([])
    unknown = servers.runner.run(forgetter.status({"user": "7"}))
    assert unknown == {"key": {"user": 7}, "state": "unknown", "up_to": None, "removed": None, "shards": []}
    assert refused({"email": "x"}).startswith("forget: no view has `email` in its key")
    # A view that is deployed later brings a key of its own, and its entities can be forgotten.
    by_email = FeatureView("by_email", owner="tests", source=ORDERS, key=["email"], features={"n": Count()})
    world.client.layout = LAYOUT.extended([by_email])
    assert servers.runner.run(forgetter.status({"email": "x"}))["state"] == "unknown"


def test_a_log_that_is_only_in_memory_has_nothing_to_forget(servers: Servers) -> None:
    servers.start(LAYOUT, 1, "none")
    servers.ready()
    with pytest.raises(Unavailable, match="keeps nothing on disk"):
        servers.runner.run(CallRead(servers, servers.spec.shard_map).forget("user", 1, NOW))
