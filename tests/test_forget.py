"""An entity that is forgotten is gone wherever it was, whatever ends meanwhile; everybody else's features stay."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from durable_cluster import SECRET, STEPS, Crash, DurableCluster, Fault
from folders import folder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_vs_oracle import plan_of, read

from millpond.feature_actors import Count, Distinct, FeatureView, Field, First, LastN, Max, Source, Streak, Sum, SumBy
from millpond.feature_actors.erasure import Erasure
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.log.history_reader import read_history
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.record import EventsRecord, OfferRecord
from millpond.feature_actors.manifest import ManifestError
from millpond.feature_actors.replays import ReplayOptions, differences
from millpond.feature_actors.tokens import is_token, token_of
from millpond.feature_actors.tombstones import Tombstones, forget_secret, tombstone_of

PAYMENTS = Source(
    "payments",
    owner="tests",
    fields={
        "id": "string",
        "at": "timestamp[ms, UTC]",
        "user": Field("int64", optional=True),
        "shop": Field("string", optional=True),
        "cents": "int64",
        "email": Field("string", optional=True, personal=True),
    },
    event_id="id",
    event_time="at",
)
SUMS = {"n": Count(), "sum": Sum("cents"), "max": Max("cents")}  # exact, in whatever order
BY_USER = FeatureView("by_user", owner="tests", source=PAYMENTS, key=["user"], features=SUMS)
BY_SHOP = FeatureView(
    "by_shop",
    owner="tests",
    source=PAYMENTS,
    key=["shop"],
    features={
        **SUMS,
        "n_1h": Count(window="1h"),
        "who": LastN("user", n=3),
        "emails": LastN("email", n=2, window="1h"),
        "first": First("email", where=pc.field("user") > 7),
    },
)
BY_BOTH = FeatureView(
    "by_both", owner="tests", source=PAYMENTS, key=["user", "shop"],
    features={**SUMS, "recent": Sum("cents", window="1h", exact=True)},
)  # fmt: skip
USERS, SHOPS = [42, 7, 8], ["a", "b", "c"]
KEYS: dict[str, list[tuple[Any, ...]]] = {
    "by_user": [(u,) for u in USERS],
    "by_shop": [(s,) for s in SHOPS],
    "by_both": [(u, s) for u in USERS for s in SHOPS],
}


def found(cluster: DurableCluster) -> dict[str, dict[tuple[Any, ...], list[float]]]:
    """Return count, sum and largest of every key."""
    answers = {}
    for number in range(len(cluster.shards)):
        cluster.commit_held(number)
    for view in cluster.layout.views.values():
        rows = read(cluster.client, plan_of(cluster.client, view), KEYS[view.name])
        answers[view.name] = dict(zip(KEYS[view.name], np.nan_to_num(rows.matrix[:, :3]).tolist(), strict=True))
    return answers


def wanted(
    cluster: DurableCluster, events: Sequence[dict[str, Any]], gone: set[str]
) -> dict[str, dict[tuple[Any, ...], list[float]]]:
    """Return the same by plain Python, of events that are all there once; gone: those of whoever was forgotten."""

    def of(fields: tuple[str, ...], key: tuple[Any, ...]) -> list[float]:
        left = [e for e in events if e["id"] not in gone or "user" not in fields]
        cents = [e["cents"] for e in left if tuple(e[f] for f in fields) == key]
        return [len(cents), sum(cents), max(cents, default=0)]

    return {name: {key: of(tuple(v.key), key) for key in KEYS[name]} for name, v in cluster.layout.views.items()}


def on_disk(cluster: DurableCluster, number: int, path: Path) -> Iterator[EventsRecord | OfferRecord]:
    log = cluster.shards[number].log
    assert isinstance(log, Log)
    yield from (r for _, (r, _) in log.read() if isinstance(r, EventsRecord | OfferRecord))
    if (path / "history").exists():
        yield from (r for _, r in read_history(str(path / "history"), number))


@settings(max_examples=25)
@given(data=st.data())
def test_whatever_ends_at_any_step_the_entity_is_gone_and_everybody_else_stays(data: st.DataObject) -> None:
    """Against a world in which its own rows never were, and its events are there for everybody else."""
    draw = data.draw
    with folder() as path:
        n_shards, with_history = draw(st.sampled_from([1, 2, 3])), draw(st.booleans())
        # Rows of several keys are found by their events, which have to be in a log or in the history for that.
        views = [BY_USER, BY_SHOP, BY_BOTH] if with_history else [BY_USER, BY_SHOP]
        cluster = DurableCluster(compile_layout([], views), n_shards, path, history=with_history)
        sent: dict[str, dict[str, Any]] = {}
        now = 0

        def send(n: int) -> None:
            nonlocal now
            now += draw(st.sampled_from([1, 1_000, 4_000_000]))
            events = [
                {
                    "id": f"{now}-{row}", "at": now - draw(st.sampled_from([0, 0, 5_000])),
                    "user": draw(st.sampled_from([42, 42, *USERS, None])),
                    "shop": draw(st.sampled_from([*SHOPS, None])),
                    "cents": draw(st.integers(1, 1_000)), "email": draw(st.sampled_from(["x@y", None])),
                }
                for row in range(n)
            ]  # fmt: skip
            sent.update({e["id"]: e for e in events})
            with suppress(Unavailable):  # a crash, or an offer that was dropped
                cluster.send("payments", now, events)

        def fail() -> None:
            if draw(st.booleans()):
                who = draw(st.sampled_from(["shard", "ingress", "all"]))
                cluster.fault = Fault(draw(st.sampled_from(STEPS)), who, draw(st.integers(0, 4)), 100)

        def keep_house() -> None:
            for _ in range(draw(st.integers(0, 3))):
                shard = draw(st.integers(0, n_shards - 1))
                if with_history and draw(st.booleans()):
                    cluster.write_history(shard)
                else:
                    cluster.snapshot_steps(shard, draw(st.sampled_from([1, 1_000])))

        for _ in range(draw(st.integers(1, 4))):
            send(draw(st.sampled_from([1, 5, 20])))
            keep_house()
        tombstone = tombstone_of(SECRET, "user", 42, now)
        for shard in draw(st.permutations(range(n_shards))):
            fail()
            cluster.entomb_at_take = draw(st.sampled_from([None, tombstone]))
            send(draw(st.sampled_from([0, 3])))  # the one after it has not heard of it yet
            cluster.fault = cluster.entomb_at_take = None
            cluster.forget(shard, tombstone)
        at_ms = tombstone.at_ms
        gone = {i for i, e in sent.items() if e["user"] == 42 and min(e["at"], now) <= at_ms}
        for _ in range(draw(st.integers(0, 8))):
            what = draw(st.sampled_from(["erase", "erase", "send", "again", "restart", "owed", "house"]))
            shard = draw(st.integers(0, n_shards - 1))
            if what == "erase":
                cluster.erase_steps(shard, draw(st.integers(1, 12)))
            elif what == "send":
                cluster.hold_takes = draw(st.booleans())
                fail()
                send(3)
                cluster.fault = None
            elif what == "again" and sent:
                old = draw(st.sampled_from(list(sent.values())))
                with suppress(Crash):
                    ack = cluster.send("payments", now, [old])
                    forgotten = old["user"] == 42 and old["at"] <= at_ms
                    assert (ack.forgotten, ack.accepted) == (1, 0) if forgotten else ack.forgotten == 0
            elif what == "restart":
                cluster.restart(shard)
            elif what == "owed":
                cluster.deliver_owed()
            else:
                keep_house()
        cluster.deliver_owed()
        for shard in range(n_shards):
            while not cluster.erase_steps(shard, 1_000):
                pass
        gone = {i for i, e in sent.items() if e["user"] == 42 and e["at"] <= at_ms}

        def check() -> None:
            logged = set(cluster.logged("id"))
            events = [e for i, e in sent.items() if i in logged]
            assert found(cluster) == wanted(cluster, events, gone)
            assert [d.shard.check() for d in cluster.shards] == [[]] * n_shards

        check()
        live = [d.shard for d in cluster.shards]
        cluster.restart_all()
        cluster.deliver_owed()
        check()
        for one, other in zip(live, [d.shard for d in cluster.shards], strict=True):
            assert differences(one, other, cluster.layout, ReplayOptions(reclaim_margin_ms=1 << 50)) == []
        if with_history:  # without any snapshot: what the history and the log say is the same
            for durable in cluster.shards:
                for snapshot in (durable.folder / "snapshots").glob("*.snapshot"):  # type: ignore[attr-defined]
                    snapshot.unlink()
            cluster.restart_all()
            cluster.deliver_owed()
            check()
            for one, other in zip(live, [d.shard for d in cluster.shards], strict=True):
                same = differences(
                    one, other, cluster.layout, ReplayOptions(reclaim_margin_ms=1 << 50), from_history=True
                )
                assert same == []
        for number in range(n_shards):
            for record in on_disk(cluster, number, path):
                for event in record.batch.to_pylist():
                    assert event["id"] not in gone or (event["user"] != 42 and event["email"] != "x@y")


def test_an_entity_whose_key_is_a_string_and_events_that_come_with_a_name_twice(tmp_path: Path) -> None:
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP, BY_BOTH]), 2, tmp_path, history=True)
    events = [
        {"id": f"{n}", "at": n, "user": USERS[n % 3], "shop": SHOPS[n % 2], "cents": n, "email": None}
        for n in range(40)
    ]
    cluster.send("payments", 50, events[:30])
    for shard in range(2):
        cluster.write_history(shard)
        cluster.snapshot_steps(shard, 1_000)
    cluster.send("payments", 50, events[30:])
    gone = {e["id"] for e in events if e["shop"] == "a"}
    want = {
        "by_user": wanted(cluster, events, set())["by_user"],
        **{
            name: {
                key: [0.0] * 3 if "a" in key else value for key, value in wanted(cluster, events, set())[name].items()
            }
            for name in ("by_shop", "by_both")
        },
    }
    for _ in range(2):  # asked for twice, it is as if once
        tombstone = tombstone_of(SECRET, "shop", "a", 50)
        for shard in range(2):
            cluster.forget(shard, tombstone)
            while not cluster.erase_steps(shard, 1_000):
                pass
        assert found(cluster) == want
    ack = cluster.send("payments", 51, events)
    assert (ack.forgotten, ack.duplicates) == (20, 20)
    # Several together, some of which had events in common.
    for shard in range(2):
        for field, value in (("user", 7), ("shop", "b")):
            cluster.forget(shard, tombstone_of(SECRET, field, value, 50))
        while not cluster.erase_steps(shard, 1_000):
            pass
    want = {
        name: {key: [0.0] * 3 if {7, "a", "b"} & set(key) else value for key, value in of.items()}
        for name, of in want.items()
    }
    assert found(cluster) == want
    for durable in cluster.shards:
        for snapshot in (durable.folder / "snapshots").glob("*.snapshot"):  # type: ignore[attr-defined]
            snapshot.unlink()
    cluster.restart_all()
    cluster.deliver_owed()
    assert found(cluster) == want
    shops = {
        e["shop"]
        for n in range(2)
        for r in on_disk(cluster, n, tmp_path)
        for e in r.batch.to_pylist()
        if e["id"] in gone
    }
    assert {shop.partition("-")[0] for shop in shops} == {"~forgotten"}


def test_of_several_that_are_forgotten_together_each_says_what_was_removed_of_it(tmp_path: Path) -> None:
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP, BY_BOTH]), 1, tmp_path, history=True)
    cluster.send(
        "payments", 9,
        [{"id": f"{n}", "at": 5, "user": USERS[n % 3], "shop": SHOPS[n % 2], "cents": 1, "email": None}
         for n in range(60)],
    )  # fmt: skip
    ones = [tombstone_of(SECRET, field, value, 9) for field, value in (("user", 42), ("user", 7), ("shop", "a"))]
    for one in ones:
        cluster.forget(0, one)
    while not cluster.erase_steps(0, 1_000):
        pass
    told = [cluster.shards[0].shard.tombstones.get(one.name) for one in ones]
    # A row of two of them is counted by one; an event of two by both.
    assert [one and one.removed and one.removed["events"] for one in told] == [20, 20, 30]
    assert sum(one.removed["rows"] for one in told if one and one.removed) == 3 + 5
    # What is counted is what is left, once for each table.
    assert sorted(cluster.shards[0].shard.status().events.values()) == [10, 20, 30]


@pytest.mark.parametrize("first", ["user", "shop"])
def test_of_two_that_are_forgotten_together_a_row_of_both_begins_with_what_is_later_than_both(
    first: str, tmp_path: Path
) -> None:
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP, BY_BOTH]), 1, tmp_path, history=True)
    events = [
        {"id": f"{at} {user} {shop}", "at": at, "user": user, "shop": shop, "cents": at, "email": None}
        for at in (5, 15, 25) for user in USERS for shop in SHOPS
    ]  # fmt: skip
    for at in (5, 15, 25):
        cluster.send("payments", at, [e for e in events if e["at"] == at])
    until = {"user": 20, "shop": 20, first: 10}
    for field, value in (("user", 42), ("shop", "a")):
        cluster.forget(0, tombstone_of(SECRET, field, value, until[field]))
    while not cluster.erase_steps(0, 1_000):
        pass

    def left(key: Sequence[str], event: dict[str, Any]) -> bool:
        return all(
            field not in key or event[field] != value or event["at"] > until[field]
            for field, value in (("user", 42), ("shop", "a"))
        )

    want = {
        name: wanted(cluster, [e for e in events if left(v.key, e)], set())[name]
        for name, v in cluster.layout.views.items()
    }
    assert want["by_both"][42, "a"] == [1, 25, 25]
    for _ in range(2):
        assert found(cluster) == want
        assert sorted(cluster.shards[0].shard.status().events.values()) == sorted(
            sum(left(v.key, e) for e in events) for v in cluster.layout.views.values()
        )
        cluster.restart_all()


@pytest.mark.parametrize("steps", range(1, 12))
def test_who_is_to_be_forgotten_while_another_is_leaves_no_row_either(steps: int, tmp_path: Path) -> None:
    """Rows of several keys are found by events, which show a token when they have been rewritten."""
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP, BY_BOTH]), 1, tmp_path, history=True)
    events = [
        {"id": f"{n}", "at": 5, "user": USERS[n % 3], "shop": SHOPS[n % 2], "cents": 1, "email": None}
        for n in range(60)
    ]
    cluster.send("payments", 9, events)
    cluster.write_history(0)
    cluster.forget(0, tombstone_of(SECRET, "user", 42, 9))
    cluster.erase_steps(0, steps)
    cluster.forget(0, tombstone_of(SECRET, "user", 7, 9))
    while not (cluster.erase_steps(0, 1_000) and not cluster.shards[0].shard.tombstones.waiting):
        pass
    assert found(cluster) == wanted(cluster, events, {e["id"] for e in events if e["user"] in (42, 7)})


@pytest.mark.parametrize("steps", range(1, 5))
@pytest.mark.parametrize("state", ["reading its past", "making rows of others anew"])
def test_what_is_in_the_log_alone_while_rows_are_put_in_place_counts_once(
    state: str, steps: int, tmp_path: Path
) -> None:
    """The log numbers the events of a take as the shard has them, a commit as they were sent."""
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP, BY_BOTH]), 2, tmp_path, history=True)
    events = [
        {"id": f"{n}", "at": 5, "user": USERS[n % 3], "shop": SHOPS[n % 2], "cents": 1, "email": None}
        for n in range(60)
    ]
    cluster.send("payments", 9, events)
    later = [{**event, "id": f"later {event['id']}", "at": 12} for event in events]
    for shard in range(2):
        cluster.forget(shard, tombstone_of(SECRET, "user", 42, 9))
    for shard in range(2):
        while cluster.erasing.get(shard) != state:
            cluster.erase_steps(shard, 1)
        cluster.erase_steps(shard, steps - 1)
    cluster.hold_takes = True
    cluster.send("payments", 12, [*events, *later])  # those that are known are left out
    for shard in range(2):
        while not cluster.erase_steps(shard, 1_000):
            pass
    assert found(cluster) == wanted(cluster, [*events, *later], {e["id"] for e in events if e["user"] == 42})
    assert [durable.shard.check() for durable in cluster.shards] == [[], []]


@pytest.mark.parametrize("when", ["it is offered", "it is in the log alone"])
def test_a_string_of_who_is_forgotten_stays_if_another_event_names_it_that_is_under_way(
    when: str, tmp_path: Path
) -> None:
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP]), 2, tmp_path, history=True)
    event = {"at": 5, "shop": "a", "cents": 1, "email": "x@y"}
    cluster.send("payments", 9, [{**event, "id": f"{shop}", "user": 42, "shop": shop} for shop in SHOPS])
    for shard in range(2):
        cluster.forget(shard, tombstone_of(SECRET, "user", 42, 9))
    if when == "it is offered":
        cluster.erase_at_take = True
    else:
        for shard in range(2):
            while cluster.erasing.get(shard) != "making rows of others anew":
                cluster.erase_steps(shard, 1)
        cluster.hold_takes = True
    cluster.send("payments", 9, [{**event, "id": f"{shop} 7", "user": 7, "shop": shop} for shop in SHOPS])
    for shard in range(2):
        cluster.erase_all(shard)
        cluster.commit_held(shard)
        cluster.snapshot_steps(shard, 1_000)
        assert not cluster.shards[shard].shard._under_way
    for _ in range(2):
        rows = read(cluster.client, plan_of(cluster.client, BY_SHOP), KEYS["by_shop"])
        pairs = [sorted(pair) for pair in rows.texts["by_shop.emails"]]
        assert [email for email, _ in pairs] == ["x@y"] * 3
        assert all(token.startswith("~forgotten") for _, token in pairs)
        cluster.restart_all()
    assert not [*tmp_path.rglob("*.damaged")]


def test_readers_find_rows_of_others_all_the_while_that_these_are_put_in_place(tmp_path: Path) -> None:
    """Looked at in between any two calls of what puts them there."""
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP]), 1, tmp_path, history=True)
    events = [
        {"id": f"{n}", "at": 5, "user": USERS[n % 3], "shop": SHOPS[n // 3 % 3], "cents": 1, "email": None}
        for n in range(90)
    ]
    cluster.send("payments", 9, events)
    plan = plan_of(cluster.client, BY_SHOP)
    seen: set[tuple[float, ...]] = set()

    def look(*_: Any) -> None:
        seen.add(tuple(read(cluster.client, plan, KEYS["by_shop"]).matrix[:, 0].tolist()))

    for user in (8, 42):  # the kernels are there when it is looked
        cluster.forget(0, tombstone_of(SECRET, "user", user, 9))
        while cluster.erasing.get(0) != "making rows of others anew":
            cluster.erase_steps(0, 1)
        cluster.erase_steps(0, 1)
        assert cluster.shards[0].erasing.stale
        sys.setprofile(look if user == 42 else None)
        try:
            cluster.erase_steps(0, 1)
        finally:
            sys.setprofile(None)
        assert not cluster.shards[0].erasing.stale
        cluster.erase_all(0)
        cluster.erasing.clear()
    assert seen == {(30.0, 30.0, 30.0)}


def test_where_old_events_are_gone_every_feature_that_looks_at_a_replaced_field_begins_anew(tmp_path: Path) -> None:
    """Also one that looks at it in its condition alone: it tells who had that value, too."""
    is_x = pc.field("email") == "x@y"
    features = {
        "n": Count(), "cents": Sum("cents"), "large": Count(where=pc.field("cents") > 0),
        "emails": Distinct("email"), "by": SumBy("cents", by="email", categories=["x@y"]), "row": Streak(of=is_x),
        "of_x": Count(where=is_x), "lately": Sum("cents", where=is_x, window="1h", exact=True),
    }  # fmt: skip
    by_shop = FeatureView("by_shop", owner="tests", source=PAYMENTS, key=["shop"], features=features)
    cluster = DurableCluster(compile_layout([], [BY_USER, by_shop]), 1, tmp_path)
    event = {"at": 5, "user": 42, "shop": "a", "cents": 2, "email": "x@y"}
    for name in ("old", "older than two snapshots", "new"):
        cluster.send("payments", 9, [{**event, "id": name}])
        cluster.snapshot_steps(0, 10_000)

    def read_shop() -> list[float]:
        values: list[float] = read(cluster.client, plan_of(cluster.client, by_shop), [("a",)]).matrix[0].tolist()
        return values

    assert read_shop() == [3, 6, 3, 1, 6, 0, 3, 3, 6]
    cluster.forget(0, tombstone_of(SECRET, "user", 42, 9))
    while not cluster.erase_steps(0, 1_000):
        pass
    assert not cluster.shards[0].has_whole_past("payments")
    for _ in range(2):
        assert read_shop() == [3, 6, 3, 0, 0, 0, 0, 0, 0]
        cluster.restart_all()


def test_tombstones_are_read_with_the_secret_that_they_were_made_with_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "tombstones.json"
    one = tombstone_of(SECRET, "user", 42, 5)
    Tombstones(path, SECRET).write([one])
    assert Tombstones(path, SECRET).every == [one]
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ManifestError, match=r"was written with another `forget\.key`"):
        Tombstones(path, (1, 2))
    path.write_text("{}")
    with pytest.raises(ManifestError, match="cannot be read"):
        Tombstones(path, SECRET)


def test_the_secret_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    secret = forget_secret(tmp_path)
    assert forget_secret(tmp_path) == secret
    assert (tmp_path / "forget.key").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["forget.key"]
    assert tombstone_of(secret, "user", 42, 0).mark != tombstone_of(SECRET, "user", 42, 0).mark


EVERYTHING = Source(
    "everything",
    owner="tests",
    fields={
        "id": Field("string", personal=True), "at": "timestamp[ms, UTC]", "user": "int32",
        "name": Field("string", personal=True),
        "age": Field("int16", personal=True), "height": Field("float64", optional=True, personal=True),
        "weight": Field("float64", personal=True), "born": Field("timestamp[ms, UTC]", personal=True),
        "member": Field("bool", personal=True), "cents": "int64",
    },
    event_id="id",
    event_time="at",
)  # fmt: skip


def test_every_kind_of_field_is_replaced_once_and_nothing_else_is() -> None:
    def event(number: int, user: int, at: int = 5) -> dict[str, Any]:
        return {
            "id": f"e{number}", "at": at, "user": user, "name": "Ann", "age": 40, "height": 1.7, "weight": 60.0,
            "born": 9, "member": True, "cents": number,
        }  # fmt: skip

    batch = pa.RecordBatch.from_pylist(
        [event(0, 42), event(1, 7), event(2, 42), event(3, 42, at=99)], schema=EVERYTHING.schema
    )
    tombstones = Tombstones(None, SECRET)
    one = tombstone_of(SECRET, "user", 42, 10)
    tombstones.take([one])
    erasure = Erasure(tombstones, {"everything": EVERYTHING})
    arrivals = np.array([5, 5, 12, 99])
    forgotten = erasure.forgotten("everything", batch, arrivals)
    assert [f.rows.tolist() for f in forgotten] == [[True, False, True, False]]
    later = erasure.forgotten("everything", batch, arrivals, later=True)
    assert [f.rows.tolist() for f in later] == [[False, False, False, True]]
    erased = erasure.batch("everything", batch, forgotten)
    assert (erased.schema, erased.slice(1, 1), erased.slice(3, 1)) == (
        batch.schema,
        batch.slice(1, 1),
        batch.slice(3, 1),
    )
    first, second = erased.to_pylist()[0], erased.to_pylist()[2]
    token, text = token_of(pa.int32(), one.token), token_of(pa.string(), one.token)
    for event_, cents in ((first, 0), (second, 2)):
        assert (event_["user"], event_["name"], event_["age"]) == (token, text, -(2**15))
        assert (event_["height"], event_["weight"], event_["member"], event_["cents"]) == (None, 0.0, False, cents)
        assert event_["born"].timestamp() == 0
        assert event_["at"] == batch.to_pylist()[cents]["at"]
        assert event_["id"].startswith(text)
    assert first["id"] != second["id"]
    # Done again, by whoever has the same tombstone, it is the same, and then nothing.
    assert erasure.batch("everything", batch, forgotten).equals(erased)
    assert erasure.forgotten("everything", erased, arrivals) == []
    assert is_token(erased.column("user")).tolist() == [True, False, True, False]  # type: ignore[union-attr]


@given(number=st.integers(0, 2**32 - 1), kind=st.sampled_from(["string", "int32", "uint32", "int64", "uint64"]))
def test_a_token_is_known_for_one_and_hardly_any_value_is_taken_for_one(number: int, kind: str) -> None:
    of = getattr(pa, kind)()
    assert is_token(pa.array([token_of(of, number), None], of)).tolist() == [True, False]  # type: ignore[union-attr]
    values = ["", "forgotten", "~"] if kind == "string" else [0, 1, 42, 2**31 - 1]
    if kind.startswith("int"):
        values += [-1, -(2 ** (of.bit_width - 1)), 2 ** (of.bit_width - 1) - 1]
    if kind.startswith("uint"):
        values += [2**of.bit_width - 1]
    assert is_token(pa.array(values, of)) is None
