"""An entity that is forgotten is gone wherever it was, whatever ends meanwhile; everybody else's features stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from durable_cluster import SECRET, STEPS, Crash, DurableCluster, Fault
from folders import folder
from hypothesis import given
from hypothesis import strategies as st
from test_engine_vs_oracle import plan_of, read

from millpond.feature_actors import Count, FeatureView, Field, First, LastN, Max, Source, Sum
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.log.history_reader import read_history
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.record import EventsRecord, OfferRecord
from millpond.feature_actors.replays import ReplayOptions, differences
from millpond.feature_actors.tombstones import tombstone_of

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
            with suppress(Crash):
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
            send(draw(st.sampled_from([0, 3])))  # the one after it has not heard of it yet
            cluster.fault = None
            cluster.forget(shard, tombstone)
        at_ms = tombstone.at_ms
        gone = {i for i, e in sent.items() if e["user"] == 42 and min(e["at"], now) <= at_ms}
        for _ in range(draw(st.integers(0, 8))):
            what = draw(st.sampled_from(["erase", "erase", "send", "again", "restart", "owed", "house"]))
            shard = draw(st.integers(0, n_shards - 1))
            if what == "erase":
                cluster.erase_steps(shard, draw(st.integers(1, 12)))
            elif what == "send":
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
