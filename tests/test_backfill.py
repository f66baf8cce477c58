"""A view that comes while the cluster runs is, once it is whole, what it would be if it had been there all the time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from durable_cluster import STEPS, Crash, DurableCluster, Fault
from hypothesis import given, settings
from hypothesis import strategies as st
from test_durable import BY_SHOP, BY_USER, PAYMENTS, SHOPS, SUMS, USERS, everything, folder, has_ids, totals, totals_of
from test_engine_vs_oracle import Judge, keys_of, plan_of, read
from worlds import World, worlds

from millpond.feature_actors import Count, FeatureView, Field, Last, Mean, Source, Sum
from millpond.feature_actors.errors import BadRequest, DeclarationError, Unavailable
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.log.log import LogFull
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.plan_set import PlanSet
from millpond.feature_actors.tiles.memory import MemoryFull
from millpond.feature_actors.wire import QuestionDecoder, encode_question
from millpond.models import training_set
from millpond.models.training.events import EventsBySource, read_past
from millpond.models.training.runs import Room

#: Some take long for an example.
HALF = max(1, settings().max_examples // 2)


@settings(max_examples=HALF)
@given(world=worlds(events_max=60), data=st.data())
def test_bit_for_bit_what_a_start_with_the_view_gives_and_right_whatever_ends_meanwhile(
    world: World, data: st.DataObject
) -> None:
    draw = data.draw
    added = draw(st.sampled_from(world.views))
    beside = FeatureView("beside", owner="tests", source=added.source, key=added.key, features={"n": Count()})
    at_start = [*(view for view in world.views if view is not added), beside]
    at = draw(st.integers(0, len(world.batches)))
    with folder() as path:
        calm = DurableCluster(compile_layout([], [*at_start, added]), 1, path / "calm")
        stormy = DurableCluster(compile_layout([], at_start), 1, path / "stormy", history=True)
        for number, (name, now_ms, events) in enumerate(world.batches):
            if number == at:
                stormy.add_view(added)
            for _ in range(draw(st.integers(0, 2))):
                what = draw(st.sampled_from(["restart", "snapshot", "history", "backfill", "backfill", "fail"]))
                if what == "restart":
                    stormy.restart_all()
                elif what == "fail":
                    stormy.fail_backfill(0)
                elif what == "snapshot":
                    stormy.snapshot_steps(0, draw(st.sampled_from([1, 3, 1_000])))
                elif what == "history":
                    stormy.write_history(0)
                else:
                    stormy.backfill_steps(0, draw(st.sampled_from([1, 3, 1_000])))
            calm.send(name, now_ms, events)
            if has_ids([*at_start, added], name) and draw(st.booleans()):
                stormy.fault = Fault(draw(st.sampled_from(STEPS)), torn=draw(st.integers(1, 5_000)))
                with suppress(Crash):
                    stormy.send(name, now_ms, events)
                stormy.fault = None
            stormy.send(name, now_ms, events)
        if at == len(world.batches):
            stormy.add_view(added)
        while not stormy.backfill_steps(0, 1_000):  # a snapshot may be under way
            stormy.snapshot_steps(0, 1_000)
        stormy.clock.ms = calm.clock.ms
        assert everything(stormy.client, world) == everything(calm.client, world)
        if draw(st.booleans()):
            stormy.snapshot_steps(0, 1_000)
        stormy.restart_all()
        assert stormy.shards[0].shard.behind == []
        stormy.clock.ms = calm.clock.ms
        assert everything(stormy.client, world) == everything(calm.client, world)
        assert stormy.shards[0].shard.check() == []
        log = world.events(added.source.name)
        keys, plan = keys_of(added, log, most=20), plan_of(stormy.client, added)
        Judge(added, log).check(keys, plan, read(stormy.client, plan, keys))


AGAIN = FeatureView("again", owner="tests", source=PAYMENTS, key=["user"], features={**SUMS, "mean": Mean("cents")})
SHOP_AGAIN = FeatureView("shop_again", owner="tests", source=PAYMENTS, key=["shop"], features={**SUMS, "l": Last("id")})


@settings(max_examples=HALF)
@given(data=st.data())
def test_on_several_shards_it_has_every_event_that_the_others_have(data: st.DataObject) -> None:
    """Offers made before the view came are taken after; requests fail and are sent again, or given up."""
    draw = data.draw
    with folder() as path:
        n_shards = draw(st.sampled_from([1, 2, 3]))
        cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP]), n_shards, path, history=True)
        sent: dict[str, dict[str, Any]] = {}
        coming = [(draw(st.integers(0, 7)), view) for view in (AGAIN, SHOP_AGAIN)]
        for number in range(8):
            for at, view in coming:
                if at == number:
                    cluster.add_view(view)
            events = [
                {"id": f"{number}-{row}", "at": number, "user": draw(st.sampled_from(USERS)),
                 "shop": draw(st.sampled_from(SHOPS)), "cents": draw(st.integers(1, 1_000))}
                for row in range(draw(st.sampled_from([1, 2, 12])))
            ]  # fmt: skip
            sent |= {e["id"]: e for e in events}
            if draw(st.booleans()):
                who = draw(st.sampled_from(["shard", "ingress", "all"]))
                cluster.fault = Fault(draw(st.sampled_from(STEPS)), who, draw(st.integers(0, 6)))
            cluster.backfill_at_take = draw(st.sampled_from([0, 0, 1, 3, 1_000]))
            with suppress(Crash, LogFull):
                cluster.send("payments", number + 1, events)
            cluster.fault = None
            for _ in range(draw(st.integers(0, 3))):
                shard, steps = draw(st.integers(0, n_shards - 1)), draw(st.sampled_from([1, 5, 1_000]))
                what = draw(st.sampled_from(["snapshot", "history", "backfill", "deliver", "fail"]))
                if what == "snapshot":
                    cluster.snapshot_steps(shard, steps)
                elif what == "fail":
                    cluster.fail_backfill(shard)
                elif what == "history":
                    cluster.write_history(shard)
                elif what == "deliver":
                    cluster.deliver_owed()
                else:
                    cluster.backfill_steps(shard, steps)
        for shard in range(n_shards):
            while not cluster.backfill_steps(shard, 1_000):
                cluster.snapshot_steps(shard, 1_000)
        for _ in range(2):
            cluster.deliver_owed()
            expected = totals_of([sent[i] for i in cluster.logged("id")])
            assert totals(cluster) == expected
            users = read(cluster.client, plan_of(cluster.client, AGAIN), [(u,) for u in USERS if u is not None])
            shops = read(cluster.client, plan_of(cluster.client, SHOP_AGAIN), [(s,) for s in SHOPS if s is not None])
            assert [np.nan_to_num(rows.matrix[:, :3]).tolist() for rows in (users, shops)] == expected
            assert [d.shard.check() for d in cluster.shards] == [[]] * n_shards
            cluster.restart_all()


def test_an_offer_made_before_one_backfill_failed_and_another_came_so_far_is_for_the_other(tmp_path: Path) -> None:
    """It is for as many tables as before, but for others."""
    ends: dict[int, int] = {}

    class Between(DurableCluster):
        async def take(self, shard: int, *arguments: Any) -> None:
            of = self.shards[shard].shard
            failing, coming = of.layout.tables[-2:]
            if shard not in ends:
                of.give_up(failing)
                of.route_to(coming)
                ends[shard] = of.queue_from_here(coming)
            await super().take(shard, *arguments)

    cluster = Between(compile_layout([], [BY_USER, BY_SHOP]), 2, tmp_path)
    cluster.add_view(AGAIN)
    cluster.add_view(SHOP_AGAIN)
    for durable in cluster.shards:
        durable.shard.route_to(durable.shard.layout.tables[-2])
        durable.shard.queue_from_here(durable.shard.layout.tables[-2])
    cluster.send(
        "payments", 9,
        [{"id": f"{n}", "at": 5, "user": n, "shop": SHOPS[n % 3], "cents": 1} for n in range(40)],
    )  # fmt: skip
    assert len(ends) == 2
    for durable in cluster.shards:
        while not durable.shard.catch_up_queued(durable.shard.layout.tables[-1]):
            pass
    shops = [(shop,) for shop in SHOPS[:3] if shop is not None]
    counts = [
        read(cluster.client, plan_of(cluster.client, of), shops).matrix[:, 0].tolist() for of in (BY_SHOP, SHOP_AGAIN)
    ]
    assert counts[0] == counts[1]
    assert sum(counts[0]) >= 26


ITEMS = ["a", "b", "c", None]
ITEM = Field("string", optional=True)
SALES = Source("sales", owner="tests", fields={**PAYMENTS.fields, "item": ITEM}, event_id="id", event_time="at")
BY_SELLER = FeatureView("by_seller", owner="tests", source=SALES, key=["user"], features=SUMS)
BY_ITEM = FeatureView("by_item", owner="tests", source=SALES, key=["item"], features={**SUMS, "l": Last("id")})
BY_BOTH = FeatureView("by_both", owner="tests", source=SALES, key=["item", "shop"], features=SUMS)
ITEM_MEAN = FeatureView("item_mean", owner="tests", source=SALES, key=["item"], features={**SUMS, "m": Mean("cents")})


def sums_of(events: Iterable[dict[str, Any]], view: FeatureView) -> dict[Any, list[float]]:
    """By key, what the first three features of a view are."""
    found: dict[Any, list[int]] = {}
    for event in events:
        key = tuple(event[name] for name in view.key)
        if None not in key:
            found.setdefault(key, []).append(event["cents"])
    return {key: [len(of), sum(of), max(of)] for key, of in found.items()}


@settings(max_examples=HALF)
@given(data=st.data())
def test_a_view_with_a_key_of_its_own_has_every_event_once_whatever_ends_meanwhile(data: st.DataObject) -> None:
    """Nothing was brought to its key before; ingresses that know it and that do not send events meanwhile."""
    draw = data.draw
    with folder() as path:
        n_shards = draw(st.sampled_from([1, 2, 3]))
        cluster = DurableCluster(compile_layout([], [BY_SELLER]), n_shards, path, history=True)
        sent: dict[str, dict[str, Any]] = {}
        coming = sorted((draw(st.integers(0, 3)), n, view) for n, view in enumerate((BY_ITEM, BY_BOTH, ITEM_MEAN)))
        for number in range(5):
            for at, _, view in coming:
                if at == number:
                    cluster.add_view(view, routed=draw(st.booleans()))
            if draw(st.booleans()):
                cluster.route_views()
            events = [
                {"id": f"{number}-{row}", "at": number, "user": draw(st.sampled_from(USERS)),
                 "shop": draw(st.sampled_from(SHOPS)), "cents": draw(st.integers(1, 1_000)),
                 "item": draw(st.sampled_from(ITEMS))}
                for row in range(draw(st.sampled_from([1, 2, 12])))
            ]  # fmt: skip
            sent |= {e["id"]: e for e in events}
            if draw(st.booleans()):
                who = draw(st.sampled_from(["shard", "ingress", "all"]))
                cluster.fault = Fault(draw(st.sampled_from(STEPS)), who, draw(st.integers(0, 6)))
            cluster.backfill_at_take = draw(st.sampled_from([0, 0, 1, 3, 1_000]))
            with suppress(Crash, LogFull):
                cluster.send("sales", number + 1, events)
            cluster.fault = None
            for _ in range(draw(st.integers(0, 3))):
                shard, steps = draw(st.integers(0, n_shards - 1)), draw(st.sampled_from([1, 5, 1_000]))
                what = draw(st.sampled_from(["snapshot", "history", "backfill", "deliver", "restart", "fail"]))
                if what == "snapshot":
                    cluster.snapshot_steps(shard, steps)
                elif what == "fail":
                    cluster.fail_backfill(shard)
                elif what == "history":
                    cluster.write_history(shard)
                elif what == "deliver":
                    cluster.deliver_owed()
                elif what == "restart":
                    cluster.restart(shard)
                else:
                    cluster.backfill_steps(shard, steps)
        cluster.route_views()
        for shard in range(n_shards):
            while not cluster.backfill_steps(shard, 1_000):
                cluster.snapshot_steps(shard, 1_000)
        if draw(st.booleans()):  # what is owed still was not meant for their keys
            cluster.define_views()
        for _ in range(2):
            cluster.deliver_owed()
            logged = [sent[i] for i in cluster.logged("id")]
            for view in (BY_SELLER, *(view for _, _, view in coming)):
                expected = sums_of(logged, view)
                keys = sorted(expected)
                rows = read(cluster.client, plan_of(cluster.client, view), keys)
                assert dict(zip(keys, rows.matrix[:, :3].tolist(), strict=True)) == expected, view.name
            assert [d.shard.check() for d in cluster.shards] == [[]] * n_shards
            cluster.restart_all()
        # A training set counts each event once, too, though some are in two logs.
        layout = compile_layout([], [BY_SELLER, BY_ITEM])
        events_of = EventsBySource(layout, "event-time", 99, Room())
        read_past(cluster.past(), events_of)
        past = events_of.take_until(None)["sales"]
        counted = {
            t.key: int(
                (past.batch[t.key[0]].is_valid().to_numpy(zero_copy_only=False) & (past.routes >> place & 1)).sum()
            )
            for place, t in enumerate(layout.tables_of("sales"))
        }
        assert counted == {(of,): sum(e[of] is not None for e in logged) for of in ("item", "user")}


@pytest.mark.parametrize("snapshot", [False, True])
def test_what_is_owed_over_a_whole_backfill_and_a_start_with_its_key_counts_once(
    snapshot: bool, tmp_path: Path
) -> None:
    cluster = DurableCluster(compile_layout([], [BY_SELLER]), 2, tmp_path, history=True)
    cluster.fault = Fault("after commit", "ingress", 1)  # both have logged their offer, and nobody takes
    with suppress(Crash):
        cluster.send("sales", 9, [
            {"id": f"{n}", "at": 5, "user": n, "shop": "a", "cents": 1, "item": "abc"[n % 3]} for n in range(30)
        ])  # fmt: skip
    assert all(durable.shard.deliveries.owed for durable in cluster.shards)
    cluster.add_view(BY_ITEM)
    for shard in range(2):
        assert cluster.backfill_steps(shard, 1_000)
    logged = cluster.logged_events()
    if snapshot:  # of which the table of the definitions has nothing
        for shard in range(2):
            cluster.snapshot_steps(shard, 1_000)
    cluster.define_views()
    for _ in range(2):
        cluster.deliver_owed()
        expected = sums_of(logged, BY_ITEM)
        rows = read(cluster.client, plan_of(cluster.client, BY_ITEM), sorted(expected))
        assert dict(zip(sorted(expected), rows.matrix[:, :3].tolist(), strict=True)) == expected
        cluster.restart_all()


def test_a_plan_of_before_reads_memories_and_stands_in_a_set_with_plans_of_after(tmp_path: Path) -> None:
    by_user = FeatureView("by_user", owner="tests", source=PAYMENTS, key=["user"], features={"n": Count()})
    cluster = DurableCluster(compile_layout([], [by_user]), 1, tmp_path)
    cluster.send("payments", 9, [{"id": f"{n}", "at": 5, "user": n % 2, "shop": None, "cents": n} for n in range(6)])
    before = plan_of(cluster.client, by_user)
    cluster.add_view(AGAIN)
    assert cluster.backfill_steps(0, 1_000)
    after = plan_of(cluster.client, AGAIN)
    assert read(cluster.client, before, [(0,), (1,)]).matrix.tolist() == [[3], [3]]
    assert read(cluster.client, after, [(0,), (1,)]).matrix.tolist() == [[3, 6, 4, 2], [3, 9, 5, 3]]
    plans = PlanSet([before, after], 16)
    together = cluster.client.read_together_now(plans, [(before, [1]), (after, [1, 0])])
    assert together is not None
    assert [rows.matrix.tolist() for rows in together] == [[[3]], [[3, 9, 5, 3], [3, 6, 4, 2]]]


def test_a_view_that_changes_is_there_beside_the_one_that_it_was(tmp_path: Path) -> None:
    """Whoever was made of the one goes on with it: in the shards' memory, over calls, after a restart."""
    first = FeatureView(
        "spend", owner="tests", source=PAYMENTS, key=["user"], features={"n": Count(), "s": Sum("cents")}
    )
    changed = FeatureView(
        "spend", owner="tests", source=PAYMENTS, key=["user"],
        features={"n": Count(), "s": Sum("cents", where=pc.field("cents") > 1), "m": Mean("cents")},
    )  # fmt: skip
    again = FeatureView(
        "spend", owner="tests", source=PAYMENTS, key=["user"], features={"n": Count(), "m": Mean("cents")}
    )
    cluster = DurableCluster(compile_layout([], [first]), 1, tmp_path)
    cluster.send("payments", 9, [{"id": f"{n}", "at": 5, "user": 1, "shop": None, "cents": n} for n in range(4)])
    before = plan_of(cluster.client, first)
    cluster.add_view(changed)
    assert cluster.backfill_steps(0, 1_000)
    cluster.add_view(again)
    assert cluster.backfill_steps(0, 1_000)
    for _ in range(2):
        layout = cluster.client.layout
        assert (layout.view("spend"), len({t.name for t in layout.tables})) == (again, 3)
        of_each = [before, *(ReadPlan(layout, list(v), "the test") for v in (first, changed, again))]
        expected = [[4, 6], [4, 6], [4, 5, 1.5], [4, 1.5]]
        assert [read(cluster.client, plan, [(1,)]).matrix[0].tolist() for plan in of_each] == expected
        decoder = QuestionDecoder(layout)
        for plan in of_each:
            question = plan.question({"user": [1]}, 1, 9, None)
            assert decoder.decode(encode_question(question)).program.tables == plan.program.tables
        cluster.restart_all()
    # One that is there in part only, as what a model was made of before the cluster was started anew.
    less = FeatureView("spend", owner="tests", source=PAYMENTS, key=["user"], features={"m": Mean("cents")})
    assert read(cluster.client, ReadPlan(layout, [less["m"]], "the test"), [(1,)]).matrix[0].tolist() == [1.5]
    other = FeatureView(
        "spend", owner="tests", source=PAYMENTS, key=["user"], features={"m": Mean("cents", window="1d")}
    )
    with pytest.raises(
        DeclarationError, match="view `spend`: the cluster keeps no version of it that has the features"
    ):
        ReadPlan(layout, [other["m"]], "the test")


def test_an_event_for_which_its_condition_cannot_be_computed_does_not_satisfy_it(tmp_path: Path) -> None:
    by_user = FeatureView("by_user", owner="tests", source=PAYMENTS, key=["user"], features={"n": Count()})
    ratio = FeatureView(
        "ratio", owner="tests", source=PAYMENTS, key=["user"],
        features={"n": Count(), "large": Count(where=pc.scalar(100) / pc.field("cents") > 9)},
    )  # fmt: skip
    cluster = DurableCluster(compile_layout([], [by_user]), 1, tmp_path)

    def send(first: int) -> None:
        events = [{"id": f"{first + n}", "at": 5, "user": 1, "shop": None, "cents": n % 20} for n in range(100)]
        assert cluster.send("payments", 9, events).accepted == 100

    send(0)
    cluster.add_view(ratio)
    assert cluster.backfill_steps(0, 1_000)
    send(1_000)
    for _ in range(2):
        assert read(cluster.client, plan_of(cluster.client, ratio), [(1,)]).matrix.tolist() == [[200, 100]]
        cluster.restart_all()
    # Who sends one is refused from now on; what was before is in the log, and in training sets.
    cluster.define_views()
    assert read(cluster.client, plan_of(cluster.client, ratio), [(1,)]).matrix.tolist() == [[200, 100]]
    with pytest.raises(BadRequest, match=r"the condition .* of a view fails: divide by zero"):
        send(2_000)
    labels = pa.table({"user": [1], "as_of": pa.array([9], pa.timestamp("ms", "UTC"))})
    assert training_set(list(ratio), labels, cluster.past()).matrix.tolist() == [[200, 100]]


TYPED = Source("typed", owner="tests", fields={**PAYMENTS.fields, "shop": "int64"}, event_id="id", event_time="at")
OTHER = Source("other", owner="tests", fields=PAYMENTS.fields, event_id="id", event_time="at")


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (
            FeatureView("by_user", owner="tests", source=PAYMENTS, key=["user"], features=dict(BY_USER.features)),
            "view `by_user`: the cluster keeps it already",
        ),
        (
            FeatureView("by_user", owner="tests", source=PAYMENTS, key=["user", "shop"], features={"n": Count()}),
            "view `by_user`: the cluster keeps it of source `payments` by user; of another source or key it is another "
            "view: give it another name",
        ),
        (
            FeatureView("v", owner="tests", source=OTHER, key=["user"], features={"n": Count()}),
            "view `v`: the cluster has no source `other`; known: `payments`, `typed`; start the cluster with the "
            "definition",
        ),
        (
            FeatureView("v", owner="tests", source=TYPED, key=["shop"], features={"n": Count()}),
            "key field `shop` is int64 in view `v` and string in view `by_shop`; a key field has one type in a cluster",
        ),
    ],
)
def test_what_cannot_be_added_is_refused(view: FeatureView, message: str) -> None:
    layout = compile_layout([TYPED], [BY_USER, BY_SHOP])
    with pytest.raises(DeclarationError) as refused:
        layout.extended([view])
    assert str(refused.value) == message
    assert layout.extended([AGAIN]).digest == layout.digest


def test_without_room_for_its_headers_nothing_has_changed(tmp_path: Path) -> None:
    cluster = DurableCluster(compile_layout([], [BY_USER]), 1, tmp_path)
    windows = {f"n{k}": Sum("cents", window=f"{k}h") for k in range(1, 150)}
    many = [FeatureView(f"v{k}", owner="tests", source=PAYMENTS, key=["user"], features=windows) for k in range(40)]
    with pytest.raises(MemoryFull, match=r"the headers of \d+ tables take \d+ words a slot, and there is room for \d+"):
        cluster.shards[0].shard.extend(cluster.layout.extended(many))
    cluster.add_view(AGAIN)
    assert cluster.backfill_steps(0, 1_000)


def test_a_backfill_that_failed_leaves_no_row_and_may_be_begun_anew(tmp_path: Path) -> None:
    """An entity that lives by its ttl alone has all of its past then, though it was out of sight when that failed."""
    hour = 3_600_000
    alive = FeatureView("alive", owner="tests", source=PAYMENTS, key=["user"], features={"n": Count(ttl="1h")})
    cluster = DurableCluster(compile_layout([], [BY_USER]), 1, tmp_path)
    for number in range(20):
        events = [
            {"id": f"{number}-{user}", "at": number * hour // 2, "user": user, "shop": None, "cents": 1}
            for user in range(300)
        ]
        cluster.send("payments", number * hour // 2, events)
    cluster.add_view(alive)
    shard = cluster.shards[0].shard
    for _ in range(3):
        while shard.status().events[shard.behind[0].name] < 5_000:
            cluster.backfill_steps(0, 1)
        assert shard.status().entities[shard.behind[0].name] == 300
        cluster.fail_backfill(0)
        status = shard.status()
        assert (status.entities[shard.behind[0].name], status.events[shard.behind[0].name]) == (0, 0)
        assert shard.check() == []
    assert cluster.backfill_steps(0, 100_000)
    keys = [(user,) for user in range(300)]
    assert read(cluster.client, plan_of(cluster.client, alive), keys).matrix[:, 0].tolist() == [20.0] * 300


def test_a_take_for_which_there_is_no_room_any_more_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view came since the offer; what it takes is promised, and then something else fails."""
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP]), 2, tmp_path)
    cluster.add_view(SHOP_AGAIN)
    full = []

    class Full(DurableCluster):
        async def take(self, shard: int, *arguments: Any) -> None:
            of = self.shards[shard].shard
            of.route_to(of.layout.tables[-1])

            def fails(*arguments: Any) -> Any:
                full.append(shard)
                raise MemoryFull("strings: no room")

            with monkeypatch.context() as patched:
                patched.setattr(of._strings, "addresses", fails)
                await super().take(shard, *arguments)

    cluster.__class__ = Full
    events = [{"id": f"{n}", "at": 5, "user": n, "shop": SHOPS[n % 3], "cents": 1} for n in range(40)]
    with pytest.raises(MemoryFull):
        cluster.send("payments", 9, events)
    assert full
    for shard in full:
        assert cluster.shards[shard].shard._store._promised_words == 0


def test_what_was_before_the_log_and_is_in_no_history_is_missed(tmp_path: Path) -> None:
    cluster = DurableCluster(compile_layout([], [BY_USER]), 1, tmp_path)
    for number in range(3):
        cluster.send("payments", 9, [{"id": f"{number}", "at": 5, "user": 1, "shop": None, "cents": 1}])
        cluster.snapshot_steps(0, 1_000)
    assert cluster.shards[0].log.first > 0  # type: ignore[attr-defined]
    cluster.add_view(AGAIN)
    with pytest.raises(Unavailable, match=r"begins at offset \d, and there is no history of what was before"):
        cluster.backfill_steps(0, 1_000)
