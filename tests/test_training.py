"""A training set is what was served: by event time what the oracle says, by arrival the bits of every live read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from check_directory import BY_SHOP, BY_USER, PAYMENTS, Stopped
from durable_cluster import STEPS, Crash, DurableCluster, Fault
from hypothesis import given
from hypothesis import strategies as st
from join_workers import Apart
from worlds import DAY, HOUR, World, batch, source, worlds

from millpond.cluster.train_set import summary
from millpond.feature_actors import Count, FeatureView, Last, LastN, Sum, oracle
from millpond.feature_actors.clock import ClockKind
from millpond.feature_actors.errors import BadRequest, DeclarationError, NotFound
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.log.history import delete_expired
from millpond.feature_actors.log.record import EventsRecord
from millpond.feature_actors.past import Past
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.ports import complete
from millpond.feature_actors.view import Feature
from millpond.models import training_set
from millpond.models.training import Room, Threads, write_training_set
from millpond.models.training import events as training_events
from millpond.models.training.join import _newest
from millpond.models.training.provenance import time_text
from millpond.models.training.runs import Runs, bounds
from millpond.models.training.workers import Workers

#: So little that everything has many runs, blocks and pieces.
TINY = Room(run_rows=7, block_rows=2, piece_rows=9)
ROOMS = st.sampled_from([Room(), TINY, Room(run_rows=1, block_rows=1, piece_rows=1), Room(run_bytes=1, piece_bytes=1)])
WORKERS = st.sampled_from([Threads(1), Threads(3), Apart(1), Apart(2), Apart(3, lost_after=2)])
TIME = pa.timestamp("ms", "UTC")
Key = dict[str, Any]


def labels_of(plan: ReadPlan, asked: Sequence[tuple[Key, int]]) -> pa.Table:
    """Return labels of keys and times, as of a plan."""
    columns: dict[str, pa.Array] = {
        name: pa.array([key[name] for key, _ in asked], pa.string() if kind == "string" else pa.int64())
        for name, kind in plan.key_fields.items()
    }
    return pa.table({**columns, "as_of": pa.array([at for _, at in asked], TIME)})


def features_of(world: World) -> list[Feature]:
    return [feature for view in world.views for feature in view]


def bits(rows: FeatureRows, i: int) -> tuple[Any, ...]:
    # One NaN: its bits are no promise, those of every number are.
    matrix = np.where(np.isnan(rows.matrix[i]), np.nan, rows.matrix[i])
    return (
        matrix.tobytes(),
        int(rows.as_of[i]),
        rows.unknown[i],
        {name: column[i] for name, column in rows.texts.items()},
    )


# -- by event time


@given(world=worlds(events_max=60), workers=WORKERS, room=ROOMS, data=st.data())
def test_by_event_time_every_feature_is_what_the_oracle_says_of_events_that_arrive_when_they_happen(
    world: World, workers: Workers, room: Room, data: st.DataObject
) -> None:
    layout = world.layout
    tables, logs = {}, {}
    # Tables are checked as bodies are: no event is from before 1970.
    later_ms = max([0, *(-e["at"] for _, _, es in world.batches for e in es)])
    for name, declared in layout.sources.items():
        events = [{**e, "at": e["at"] + later_ms} for e in world.events(name)]
        tables[name] = pa.Table.from_batches([batch(declared, events)])
        # Of an id the first one that came; then in the order of time.
        first = oracle.distinct(declared, [{**e, "received_ms": 0} for e in events])
        logs[name] = sorted(({**e, "arrival_ms": e["at"]} for e in first), key=lambda e: e["at"])
    events = [e for log in logs.values() for e in log if None not in (e["user"], e["code"])]
    if not events:
        return
    plan = ReadPlan(layout, features_of(world), "test")
    moments = st.tuples(st.sampled_from(events), st.sampled_from((0, -1, 1, HOUR, DAY)))
    asked = [
        ({f: e[f] for f in plan.key_fields}, max(0, e["at"] + later))
        for e, later in data.draw(st.lists(moments, max_size=6))
    ]
    rows = training_set(plan.features, labels_of(plan, asked), tables, workers=workers, room=room)
    assert rows.as_of.tolist() == [at for _, at in asked]
    for view in world.views:
        for (key_of, as_of), got, unknown in zip(asked, plan.named_values(rows), rows.unknown, strict=True):
            key = tuple(key_of[f] for f in view.key)
            past = [e for e in logs[view.source.name] if e["at"] <= as_of]
            given_here = {f.name: got[f.full_name] for f in view}
            for name, value in given_here.items():
                agreed = oracle.agrees(view, name, past, key, as_of, value, given_here)
                assert agreed, f"{name} {key} as of {as_of}: {value}"
            assert oracle.known(view, past, key, as_of) == (view.name not in unknown)


# -- by arrival


class Lived:
    """A cluster that lives through a world on disk; what was read live on the way: id, moment, and what was served."""

    def __init__(self, world: World, folder: Path, n_shards: int, data: st.DataObject, *, faults: bool) -> None:
        self.layout = world.layout
        self.plan = ReadPlan(self.layout, features_of(world), "test")
        self.cluster = DurableCluster(self.layout, n_shards, folder, max(world.n_slots, n_shards), history=True)
        self.asked: list[tuple[Key, int]] = []
        self.served: list[tuple[Any, ...]] = []
        events = [e for _, _, es in world.batches for e in es if None not in (e["user"], e["code"])]
        ids = [{f: e[f] for f in self.plan.key_fields} for e in events[:40]] + [
            {f: {"user": 12345, "code": "never", "small": 77}[f] for f in self.plan.key_fields}
        ]
        ends = [now_ms for _, now_ms, _ in world.batches[1:]] + [world.now_ms + 100 * DAY]
        for number, ((name, now_ms, sent), end) in enumerate(zip(world.batches, ends, strict=False)):
            fault = data.draw(st.sampled_from([None, None, *STEPS])) if faults else None
            self._send(
                name,
                now_ms,
                sent,
                str(number),
                fault and Fault(fault, data.draw(st.sampled_from(["shard", "all", "ingress"]))),
            )
            if faults:
                self._keep_house(data)
            if end > now_ms:  # else what comes next comes at the very moment of this read
                gaps = [g for g in (0, 1, 999, HOUR, 30 * DAY) if now_ms + g < end]
                for gap in sorted(data.draw(st.sets(st.sampled_from(gaps), max_size=2))):
                    self._read(data.draw(st.sampled_from(ids)), now_ms + gap)

    def _send(self, name: str, now_ms: int, sent: list[dict[str, Any]], key: str, fault: Fault | None) -> None:
        self.cluster.fault = fault
        while True:
            try:
                self.cluster.send(name, now_ms, sent, key)
                break
            except Crash:
                continue
        self.cluster.fault = None
        self.cluster.deliver_owed()

    def _keep_house(self, data: st.DataObject) -> None:
        for shard in range(len(self.cluster.shards)):
            what = data.draw(st.sampled_from(["", "", "history", "snapshot", "restart"]))
            if what == "history":
                self.cluster.write_history(shard)
            elif what == "snapshot":
                self.cluster.snapshot_steps(shard, 10_000)
            elif what == "restart":
                self.cluster.restart(shard)

    def _read(self, key: Key, now_ms: int) -> None:
        self.cluster.clock.ms = now_ms
        columns = self.plan.key_columns([key], batch=True)
        rows = complete(self.cluster.client.read(self.plan, columns, 1))
        self.asked.append((key, now_ms))
        self.served.append(bits(rows, 0))


@given(
    world=worlds(events_max=90), n_shards=st.sampled_from([1, 2, 3]), faults=st.booleans(), room=ROOMS, data=st.data()
)
def test_by_arrival_every_live_read_is_found_again_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, world: World, n_shards: int, faults: bool, room: Room, data: st.DataObject
) -> None:
    lived = Lived(world, tmp_path_factory.mktemp("lived"), n_shards, data, faults=faults)
    workers = data.draw(WORKERS)
    labels = labels_of(lived.plan, lived.asked)
    rows = training_set(
        lived.plan.features, labels, lived.cluster.past(), knowledge="arrival", workers=workers, room=room
    )
    for i, served in enumerate(lived.served):
        assert bits(rows, i) == served, lived.asked[i]
    shutil.rmtree(lived.cluster.folder)


def test_an_event_that_came_late_is_seen_from_its_arrival_on_and_one_ahead_moves_the_as_of(tmp_path: Path) -> None:
    of = source("first", "id")
    view = FeatureView(
        "v", owner="tests", source=of, key=["user"], features={"n": Count(window="24h"), "ever": Count()}
    )
    rest = {"num": 0, "code": "", "small": 0, "v": 0.0, "i": 0, "f32": 0.0, "flag": True, "user": 1}
    t = 100 * DAY
    late, ahead = {**rest, "id": "late", "at": t}, {**rest, "id": "ahead", "at": t + 3 * HOUR + 60_000}
    cluster = DurableCluster(compile_layout([], [view]), 2, tmp_path)
    cluster.send("first", t + 2 * HOUR, [late])
    cluster.send("first", t + 3 * HOUR, [ahead])
    asked = [({"user": 1}, t + hours * HOUR) for hours in (0, 1, 2, 3, 4)]
    plan = ReadPlan(compile_layout([], [view]), list(view), "test")
    past = cluster.past()
    by_arrival = training_set(plan.features, labels_of(plan, asked), past, knowledge="arrival")
    assert by_arrival.matrix.tolist() == [[0, 0], [0, 0], [1, 1], [2, 2], [2, 2]]
    assert [at - t for at in by_arrival.as_of.tolist()] == [0, HOUR, 2 * HOUR, 3 * HOUR + 60_000, 4 * HOUR]
    by_event_time = training_set(plan.features, labels_of(plan, asked), past)
    assert by_event_time.matrix.tolist() == [[1, 1], [1, 1], [1, 1], [1, 1], [2, 2]]
    assert by_event_time.as_of.tolist() == [at for _, at in asked]


def test_stamps_of_clocks_that_are_apart_do_not_change_the_order_of_the_log_and_given_ones_do(tmp_path: Path) -> None:
    """On a wall clock; on an event clock a stamp is always one that was given."""
    of = source("first", None)
    view = FeatureView("v", owner="tests", source=of, key=["user"], features={"last": Last("v"), "n": Count()})
    rest = {"id": "", "num": 0, "code": "", "small": 0, "i": 0, "f32": 0.0, "flag": True, "user": 1}
    t = 100 * DAY
    cluster = DurableCluster(compile_layout([], [view]), 1, tmp_path)
    cluster.send("first", t + 1_000, [{**rest, "at": t, "v": 1.0}])
    cluster.send("first", t + 400, [{**rest, "at": t, "v": 2.0}])  # of an ingress whose clock is behind
    cluster.clock.ms = t + 2_000
    bulk = batch(of, [{**rest, "at": t - DAY, "v": 3.0}])
    complete(cluster.client.ingest("first", bulk, arrival_is_event_time=True))
    asked = [({"user": 1}, at) for at in (t - DAY, t + 500, t + 1_000)]
    plan = ReadPlan(compile_layout([], [view]), list(view), "test")
    past = cluster.past()
    rows = training_set(plan.features, labels_of(plan, asked), past, knowledge="arrival")
    assert rows.matrix.tolist() == [[3, 1], [3, 1], [2, 3]]
    rows = training_set(plan.features, labels_of(plan, asked), past, knowledge="arrival", clock="event")
    assert rows.matrix.tolist() == [[3, 1], [2, 2], [1, 3]]


def test_what_a_shard_missed_is_not_known_before_what_it_had_in_the_meantime(tmp_path: Path) -> None:
    """An ingress died on its way; the homes of its events deliver them minutes later, stamped as they were."""
    layout, now = compile_layout([], [BY_USER, BY_SHOP]), 100 * DAY
    cluster = DurableCluster(layout, 3, tmp_path, 16)

    def send(number: int, at: int) -> None:
        cluster.send("payments", at, [{"id": f"p{number}", "at": at, "user": 1, "shop": "b", "cents": 1}])

    send(0, now)
    for number in range(1, 25):
        cluster.fault = Fault("after append", "ingress")
        with contextlib.suppress(Crash):
            send(number, now + number * 1_000)
        cluster.fault = None
    later = now + 5 * 60_000
    send(25, later)
    plan = ReadPlan(layout, [BY_USER["n"]], "test")

    def live(at: int) -> float:
        cluster.clock.ms = at
        return float(complete(cluster.client.read(plan, {"user": [1]}, 1)).matrix[0, 0])

    served = live(later)
    cluster.clock.ms = later + 60_000
    cluster.deliver_owed()
    assert served < live(later + 60_001) == 26, "some were delivered late"
    labels = labels_of(plan, [({"user": 1}, later - 1), ({"user": 1}, later + 60_001)])
    rows = training_set(plan.features, labels, cluster.past(), knowledge="arrival")
    assert rows.matrix[:, 0].tolist() == [served - 1, 26]


@given(data=st.data())
def test_the_newest_event_of_each_key_at_its_moment(data: st.DataObject) -> None:
    keys, times = st.sampled_from([(1, 2), (1, 3), (4, 2), (0, 0)]), st.integers(-3, 12)
    known = data.draw(st.lists(st.tuples(keys, times, times), max_size=12))
    asked = data.draw(st.lists(st.tuples(keys, times), max_size=12))
    least = np.iinfo(np.int64).min
    want = [max((t for k, at, t in known if k == key and at <= moment), default=least) for key, moment in asked]

    def of(rows: list[Any], shape: tuple[int, ...]) -> Any:
        return np.array(rows, np.int64).reshape(shape)

    got = _newest(
        of([k for k, _, _ in known], (-1, 2)), of([at for _, at, _ in known], (-1,)), of([t for *_, t in known], (-1,)),
        of([k for k, _ in asked], (-1, 2)), of([m for _, m in asked], (-1,)),
    )  # fmt: skip
    assert got.tolist() == want


# -- the past of a cluster


def asked_of_users(times: Sequence[int]) -> list[tuple[Key, int]]:
    return [({"user": user, "shop": shop}, at) for at in times for user in range(7) for shop in "abü"]


def test_a_key_that_the_cluster_did_not_have_yet_is_computed_of_all_events_by_their_homes(tmp_path: Path) -> None:
    stopped = Stopped(tmp_path, n_shards=3, snapshots=(3, 6), history=True)
    both = FeatureView(
        "both", owner="tests", source=PAYMENTS, key=["user", "shop"], features={"n": Count(), "sum": Sum("cents")}
    )
    features = [*both, *BY_USER]
    plan = ReadPlan(compile_layout([], [both, BY_USER]), features, "test")
    labels = labels_of(plan, asked_of_users([0, 200_000, 540_000]))
    past = Past(stopped.path, str(stopped.path / "history"))
    sent = [event for number in range(10) for event in _sent(number)]
    tables = {"payments": pa.Table.from_pylist(sent, PAYMENTS.schema)}
    for room in (None, TINY):
        got = training_set(features, labels, past, room=room)
        assert [bits(got, i) for i in range(len(labels))] == [
            bits(training_set(features, labels, tables), i) for i in range(len(labels))
        ]
    assert got.matrix[:, 0].sum() > 50


def _sent(number: int) -> list[dict[str, Any]]:
    from check_directory import events

    return events(number)


def test_labels_that_look_back_to_what_has_expired_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    stopped = Stopped(tmp_path, n_shards=1, snapshots=(2, 4, 6), history=True)
    # The oldest tile of the window may reach back a minute more, and an event may be ahead of its arrival.
    complete = DAY + HOUR + 60_000 + DAY
    base, plan = str(stopped.path / "history"), ReadPlan(compile_layout([], [BY_USER]), list(BY_USER), "test")
    past = Past(stopped.path, base)
    labels = labels_of(plan, [({"user": 1}, at) for at in (3 * DAY, complete, complete - 1)])
    before = training_set(list(BY_USER), labels, past)
    assert before.matrix[:, 0].tolist() == [8, 8, 8]
    delete_expired(base, [dataclasses.replace(PAYMENTS, retention="1d")], 2 * DAY)
    assert past.since_ms("payments") == DAY
    with pytest.raises(BadRequest) as caught:
        training_set(list(BY_USER), labels, past)
    assert str(caught.value) == (
        "training set: label as of 1970-01-03T01:00:59.999Z, but events of `payments` are kept since "
        "1970-01-02T00:00:00.000Z only, and `by_user.max_1h` sees what arrived 90060000 ms before; "
        "leave labels before 1970-01-03T01:01:00.000Z out, or take them as they are (`incomplete`) - at `$[2].as_of`"
    )
    # What has no window is taken as of then; what the log still has is there.
    assert (training_set(list(BY_USER), labels.slice(0, 2), past).matrix[:, 0] < 8).all()
    allowed = training_set(list(BY_USER), labels, past, incomplete=True)
    assert (allowed.matrix[:, 0] < 8).all()


def test_what_retention_deletes_while_a_training_set_is_made_is_noticed(tmp_path: Path) -> None:
    stopped = Stopped(tmp_path, n_shards=1, snapshots=(2, 4, 6), history=True)
    base = str(stopped.path / "history")
    past = Past(stopped.path, base)

    def progress(stage: str, done: int, of: int | None) -> None:
        if stage == "events":
            delete_expired(base, [dataclasses.replace(PAYMENTS, retention="1d")], 2 * DAY)

    labels = pa.table({"user": [1], "as_of": pa.array([DAY + HOUR], TIME)})
    with pytest.raises(BadRequest, match=r"events of `payments` are kept since 1970-01-02T00:00:00\.000Z only"):
        training_set([BY_USER["max_1h"]], labels, past, progress=progress)


def _labels(**columns: Any) -> pa.Table:
    return pa.table({"user": pa.array([1, 1]), "as_of": pa.array([0, HOUR], TIME), **columns})


_SECONDS = pa.timestamp("s", "UTC")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (_labels(as_of=pa.array([0, 1], pa.timestamp("ms"))), "a timestamp with a time zone, such as"),
        (_labels(as_of=pa.array([0, 2**62], TIME)), r"a time is of 1740 to 2200 - at `\$\[1\].as_of`"),
        (
            _labels(as_of=pa.array([-(2**63), 5], TIME)),
            r"`as_of` -9223372036854775808 ms; a time is of 1740 to 2200 - at `\$\[0\].as_of`",
        ),
        (_labels(as_of=pa.array([0, 2**60], _SECONDS)), r"a time is of 1740 to 2200 - at `\$\[1\].as_of`"),
        (
            _labels(user=pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([1, None], pa.int64()))),
            r"label without `user` - at `\$\[1\].user`",
        ),
        (
            pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([0], TIME)], ["user", "user", "as_of"]),
            "labels have 2 times a column `user`",
        ),
    ],
)
def test_labels_whose_time_or_id_cannot_be_told_are_refused(labels: pa.Table, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        training_set([BY_USER["n"]], labels, {"payments": _payments([])})


def test_knowledge_and_features_that_are_none_are_refused() -> None:
    asked: Any = {"knowledge": "arival"}
    with pytest.raises(BadRequest, match="`knowledge` is 'arival'; allowed is `event-time` or `arrival`"):
        training_set([BY_USER["n"]], _labels(), {"payments": _payments([])}, **asked)
    with pytest.raises(BadRequest, match="column `user` of the labels is a key field"):
        training_set([BY_USER["n"]], _labels(), {"payments": _payments([])}, as_of="user")
    other = FeatureView("by_user", owner="tests", source=PAYMENTS, key=["shop"], features={"m": Count(window="2h")})
    for features in ([BY_USER["n"], other["m"]], [other["m"], BY_USER["n"]]):
        with pytest.raises(DeclarationError, match="two different views are named `by_user`"):
            training_set(features, _labels(shop=pa.array(["a", "a"])), {"payments": _payments([])})


@pytest.mark.parametrize(
    "stamps",
    [
        pa.array([HOUR, 5 * HOUR], pa.timestamp("us", "UTC")),  # taken as its number, it would be another time
        pa.array([float(HOUR), float(5 * HOUR)]),
        pa.array([HOUR, None], pa.int64()),
        pa.array([HOUR, -1]),
        pa.array([HOUR, 2**62]),
    ],
    ids=str,
)
def test_arrival_stamps_that_are_none_are_refused(stamps: pa.Array) -> None:
    events = [{"id": str(i), "at": 0, "user": 1, "shop": "a", "cents": 1} for i in range(2)]
    table = _payments(events).append_column("_arrival_ms", stamps)
    with pytest.raises(BadRequest, match="_arrival_ms"):
        training_set([BY_USER["n"]], _labels(), {"payments": table}, knowledge="arrival")
    assert training_set([BY_USER["n"]], _labels(), {"payments": table}).matrix[:, 0].tolist() == [2, 2]


def test_sources_that_are_not_those_of_the_cluster_are_refused(tmp_path: Path) -> None:
    stopped = Stopped(tmp_path, n_shards=1)
    field = {"type": "int64", "optional": False, "default": None, "personal": False}
    declared = {"version": 1, "event_id": "id", "event_time": "at", "fields": {"cents": field | {"type": "float64"}}}
    sources = {"format": 1, "sources": {"payments": declared}}
    (stopped.path / "sources.json").write_text(json.dumps(sources))
    labels = pa.table({"user": [1], "as_of": pa.array([0], TIME)})
    with pytest.raises(DeclarationError, match=r"^source `payments`: field `cents` was `float64` and is `int64`"):
        training_set(list(BY_USER), labels, Past(stopped.path, None))
    (stopped.path / "sources.json").write_text(json.dumps({"format": 1, "sources": {"payment": declared}}))
    with pytest.raises(NotFound, match=r"^source `payments` is not of the cluster in .*; did you mean `payment`"):
        training_set(list(BY_USER), labels, Past(stopped.path, None))


def test_large_events_are_not_held_by_the_thousand() -> None:
    rows = pa.RecordBatch.from_pylist([{"text": "x" * 65_536}] * 40)
    record = EventsRecord("texts", 1, 0, (), np.zeros(40, np.int64), np.ones(40, np.uint32), rows)
    gathered, held = training_events._Gathered(rows.schema, ()), 0
    while not gathered.full:
        gathered.add(record, 0)
        held += rows.nbytes
    assert held < 100 << 20


# -- files


def _label_file(path: Path, asked: Sequence[tuple[Key, int]], plan: ReadPlan, rows_per_group: int = 1_000) -> pa.Table:
    labels = labels_of(plan, asked)
    labels = labels.append_column("late", pa.array([i % 3 == 0 for i in range(len(labels))]))
    labels = labels.append_column("name", pa.array([None if i % 5 == 0 else f"n{i}" for i in range(len(labels))]))
    pq.write_table(labels.replace_schema_metadata({"team": "odds"}), path, row_group_size=rows_per_group)
    return labels


KINDS = FeatureView(
    "kinds", owner="tests", source=PAYMENTS, key=["user", "shop"],
    features={"n": Count(window="2h"), "recent": LastN("cents", n=2), "shops": LastN("shop", n=2), "last": Last("id")},
)  # fmt: skip


@pytest.mark.parametrize("knowledge", ["event-time", "arrival"])
def test_a_file_of_labels_gets_the_features_of_the_same_rows_in_memory(tmp_path: Path, knowledge: Any) -> None:
    stopped = Stopped(tmp_path, n_shards=2, snapshots=(4,), history=True)
    past = Past(stopped.path, str(stopped.path / "history"))
    features = [KINDS["recent"], BY_USER["sum"], KINDS["shops"], KINDS["n"], KINDS["last"]]
    plan = ReadPlan(compile_layout([], [KINDS, BY_USER]), features, "test")
    asked = asked_of_users([540_000, 0, 600_000, 120_000])
    labels = _label_file(tmp_path / "labels.parquet", asked, plan, rows_per_group=11)
    want = training_set(features, labels, past, knowledge=knowledge)
    folder = tmp_path / "out"
    folder.mkdir()
    seen: dict[str, int] = {}
    kept = 120

    def told(stage: str, done: int, of: int | None) -> None:
        seen[stage] = done
        if stage != "file":
            assert list(folder.iterdir()) == []  # what does not fit into memory has no name

    for room in (None, dataclasses.replace(TINY, folder=folder)):
        out = folder / "set.parquet"
        made = write_training_set(
            features, tmp_path / "labels.parquet", past, out, knowledge=knowledge, room=room, progress=told,
            about={"cluster": "here"},
        )  # fmt: skip
        assert [p.name for p in folder.iterdir()] == ["set.parquet"]
        assert out.stat().st_mode & 0o777 == 0o600
        got = pq.read_table(out)
        assert got.select(labels.column_names).to_pylist() == labels.to_pylist()
        names = ["kinds.recent[0]", "kinds.recent[1]", "by_user.sum", "kinds.n"]
        matrix = np.column_stack([got[name].to_numpy() for name in names])
        np.testing.assert_array_equal(matrix, want.matrix)
        assert got["features_as_of"].cast(pa.int64()).to_pylist() == want.as_of.tolist()
        assert got["unknown"].to_pylist() == want.unknown
        assert got["kinds.last"].to_pylist() == want.texts["kinds.last"]
        assert [None if row is None else tuple(row) for row in got["kinds.shops"].to_pylist()] == want.texts[
            "kinds.shops"
        ]
        assert got.schema.names[len(labels.column_names) :] == [
            "features_as_of", "kinds.recent[0]", "kinds.recent[1]", "by_user.sum", "kinds.shops", "kinds.n",
            "kinds.last", "unknown",
        ]  # fmt: skip
        assert got.schema.metadata[b"team"] == b"odds"
        assert json.loads(got.schema.metadata[b"millpond"]) == made
        assert (seen["labels"], seen["file"]) == (84, 84)
        assert 60 < seen["events"] < 180
        assert seen["features"] == 84 + kept
        out.unlink()
    assert made["labels"] == 84
    assert made["cluster"] == "here"
    assert (made["knowledge"], made["as_of"], made["model"]) == (knowledge, "as_of", None)
    assert made["sources"] == {"payments": {"version": 1, "events": 60, "since": None}}
    assert made["views"]["by_user"]["features"] == {"sum": BY_USER["sum"].id}


@pytest.mark.parametrize(("clock", "late"), [("wall", []), ("event", [0, 2, 5, 6])])
def test_labels_ahead_of_the_clock_are_counted_and_the_first_is_named(
    tmp_path: Path, clock: ClockKind, late: list[int]
) -> None:
    """On an event clock time stands at the newest event."""
    newest = 1_700_000_000_000
    at = [newest + DAY, newest, newest + 1, newest - 1, 0, newest + DAY, newest + 2]
    if clock == "wall":
        at[3] = at[5] = 4_000_000_000_000
        late = [3, 5]
    events = pa.Table.from_pylist([{"id": "a", "at": newest, "user": 1, "shop": "s", "cents": 5}], PAYMENTS.schema)
    pq.write_table(pa.table({"user": [1] * len(at), "as_of": pa.array(at, TIME)}), tmp_path / "labels")
    for room in (None, TINY):
        given: Any = (tmp_path / "labels", {"payments": events}, tmp_path / "out")
        made = write_training_set([BY_USER["n"]], *given, clock=clock, room=room)
        ahead = made["ahead"]
        assert ahead["labels"] == len(late)
        assert ahead["first"] == {"row": late[0], "as_of": time_text(at[late[0]])}
        assert (ahead["now"] == time_text(newest)) == (clock == "event")
        assert pq.read_table(tmp_path / "out")["by_user.n"].to_pylist() == [float(t >= newest) for t in at]
        assert f"warning: {len(late)} of 7 labels lie ahead of {ahead['now']}" in summary({**made, "model": None})
    pq.write_table(pa.table({"user": [1], "as_of": pa.array([newest], TIME)}), tmp_path / "labels")
    assert write_training_set([BY_USER["n"]], *given, clock=clock)["ahead"] is None


def test_the_digest_of_a_view_changes_with_what_it_computes_and_with_nothing_else(tmp_path: Path) -> None:
    from millpond.models.training.provenance import provenance

    def digest(**changes: Any) -> str:
        view = dataclasses.replace(BY_USER, **changes)
        plan = ReadPlan(compile_layout([], [view]), [view["n"]], "test")
        about = provenance(plan.features, plan, "arrival", "as_of", 0, {"payments": 0}, {"payments": None})
        return str(about["views"]["by_user"]["digest"])

    assert digest(owner="others", about="Something.") == digest()
    more = {**BY_USER.features, "more": Count(window="1h")}
    assert len({digest(), digest(features=more), digest(key=["shop"])}) == 3


@pytest.mark.parametrize("column", ["features_as_of", "unknown", "by_user.n"])
def test_a_column_of_the_labels_that_has_the_name_of_ours_is_refused(tmp_path: Path, column: str) -> None:
    pq.write_table(pa.table({"user": [1], column: [1], "as_of": pa.array([0], TIME)}), tmp_path / "labels")
    with pytest.raises(BadRequest) as caught:
        write_training_set([BY_USER["n"]], tmp_path / "labels", {}, tmp_path / "out")
    assert str(caught.value) == f"training set: labels have a column `{column}` already; leave it out or rename it"


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    labels, out = tmp_path / "labels", tmp_path / "out"
    labels.write_text("user,as_of")
    with pytest.raises(BadRequest, match=r"^training set: labels `.*labels` cannot be read as Parquet: "):
        write_training_set([BY_USER["n"]], labels, {}, out)
    with pytest.raises(BadRequest, match=r"^training set: labels `.*none` cannot be read as Parquet: "):
        write_training_set([BY_USER["n"]], tmp_path / "none", {}, out)
    pq.write_table(pa.table({"user": [1], "as_of": pa.array([0], TIME)}), labels)
    with pytest.raises(BadRequest, match=r"^training set: feature `by_user.n` is asked for twice"):
        write_training_set([BY_USER["n"]] * 2, labels, {}, out)
    with pytest.raises(BadRequest, match=r"^training set: events of `payments`: `.*none` cannot be read as Parquet: "):
        write_training_set([BY_USER["n"]], labels, {"payments": tmp_path / "none"}, out)
    with pytest.raises(BadRequest, match=r"^training set: `.*out`: there is no folder `.*no`; make it first$"):
        write_training_set([BY_USER["n"]], labels, {}, tmp_path / "no" / "out")
    # What another process with this number writes, in another container, is left alone.
    other = tmp_path / f".out.{os.getpid()}"
    other.write_text("half of")
    write_training_set([BY_USER["n"]], labels, {"payments": _payments([])}, out)
    assert (other.read_text(), out.stat().st_mode & 0o777) == ("half of", 0o600)
    other.unlink()
    out.unlink()
    out.mkdir()
    with pytest.raises(BadRequest, match=r"^training set: `.*out` cannot be written: Is a directory$"):
        write_training_set([BY_USER["n"]], labels, {"payments": _payments([])}, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels", "out"]


def _payments(events: list[dict[str, Any]], arrivals: list[int] | None = None) -> pa.Table:
    table = pa.Table.from_pylist(events, PAYMENTS.schema)
    return table if arrivals is None else table.append_column("_arrival_ms", pa.array(arrivals, pa.int64()))


def test_tables_and_files_say_when_events_arrived_and_an_error_names_the_row_of_the_whole(tmp_path: Path) -> None:
    event = {"shop": "a", "cents": 5, "user": 1}
    events = [{**event, "id": "1", "at": 0}, {**event, "id": "2", "at": HOUR}, {**event, "id": "1", "at": 2 * HOUR}]
    labels = pa.table({"user": [1] * 4, "as_of": pa.array([0, HOUR, 2 * HOUR, 3 * HOUR], TIME)})
    n = [BY_USER["n"]]
    with pytest.raises(
        BadRequest, match=r"^training set: events of `payments` have no column `_arrival_ms`, which says"
    ):
        training_set(n, labels, {"payments": _payments(events)}, knowledge="arrival")
    table = _payments(events, [3 * HOUR, HOUR, 2 * HOUR])
    pq.write_table(table, tmp_path / "events", row_group_size=1)
    for given_as in (table, tmp_path / "events"):
        rows = training_set(n, labels, {"payments": given_as}, knowledge="arrival")
        assert rows.matrix[:, 0].tolist() == [0, 1, 1, 2]
        assert training_set(n, labels, {"payments": given_as}).matrix[:, 0].tolist() == [1, 2, 2, 2]
    many = pa.concat_tables([_payments([{**event, "id": str(i), "at": i}]) for i in range(3)] * 60_000)
    holed = pa.concat_tables([many, _payments([{**event, "id": "x", "at": 0}])]).replace_schema_metadata()
    nullable = pa.schema([field.with_nullable(True) for field in holed.schema])
    cents = pa.chunked_array([pa.array([5] * 180_000 + [None], pa.int64())])
    holed = holed.cast(nullable).set_column(holed.column_names.index("cents"), nullable.field("cents"), cents)
    with pytest.raises(BadRequest) as caught:
        training_set(n, labels, {"payments": holed})
    assert str(caught.value) == "event of `payments`: expected `int64`, got `null` - at `$[180000].cents`"


def test_numbers_of_a_table_that_read_as_epoch_seconds_are_refused_and_a_column_of_times_is_not() -> None:
    labels = pa.table({"user": [1], "as_of": pa.array([1_700_000_000_000], TIME)})
    n = [BY_USER["n"]]
    typed = _payments([{"id": "1", "at": 1_700_000_000, "user": 1, "shop": "a", "cents": 5}])
    assert training_set(n, labels, {"payments": typed}).matrix.tolist() == [[1.0]]
    numbers = typed.set_column(typed.column_names.index("at"), "at", pa.array([1_700_000_000], pa.int64()))
    with pytest.raises(
        BadRequest, match=r"which is 2023-11-14 in epoch seconds; .* send 1700000000000, .* at `\$\[0\]\.at`$"
    ):
        training_set(n, labels, {"payments": numbers})
    times = pa.array([1_700_000_000_000], pa.int64())
    assert training_set(n, labels, {"payments": numbers.set_column(1, "at", times)}).matrix.tolist() == [[1.0]]


# -- sorted runs


@given(
    batches=st.lists(st.lists(st.integers(-5, 20), max_size=9), max_size=8),
    room=ROOMS,
    steps=st.lists(st.integers(-6, 22), max_size=4),
)
def test_runs_are_a_stable_sort_whatever_is_taken_at_once(
    batches: list[list[int]], room: Room, steps: list[int]
) -> None:
    schema = pa.schema({"key": pa.int64(), "place": pa.int64(), "text": pa.string()})
    runs, rows = Runs(schema, "key", room), []
    for keys in batches:
        new = [{"key": key, "place": len(rows) + i, "text": f"{key}"} for i, key in enumerate(keys)]
        runs.add(pa.RecordBatch.from_pylist(new, schema))
        rows += new
    want = sorted(rows, key=lambda row: row["key"])
    assert runs.rows == sum(size for _, size, _ in runs.blocks()) == len(rows)
    taken: list[dict[str, Any]] = []
    for bound in (*sorted(steps), None):
        part = runs.take_until(bound).to_pylist()
        assert bound is None or all(row["key"] < bound for row in part)
        taken += part
        assert bound is None or len(taken) == sum(row["key"] < bound for row in rows)
    assert taken == want


def test_pieces_are_of_the_size_that_was_asked_for() -> None:
    room = Room(run_rows=100, block_rows=10, piece_rows=50)
    schema = pa.schema({"key": pa.int64()})
    one, other = Runs(schema, "key", room), Runs(schema, "key", room)
    one.add(pa.record_batch([pa.array(range(0, 1_000, 2))], schema=schema))
    for start in range(1_000, 0, -100):
        other.add(pa.record_batch([pa.array(range(start - 99, start, 2))], schema=schema))
    sizes = [one.take_until(b).num_rows + other.take_until(b).num_rows for b in bounds([one, other], room)]
    assert sum(sizes) == 1_000
    assert max(sizes) <= 80
    assert len(sizes) >= 15
