"""What a shard has acknowledged is there after a crash at any step, exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from durable_cluster import STEPS, Crash, DurableCluster, Fault
from folders import folder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_vs_oracle import keys_of, plan_of, read
from worlds import World, worlds

from millpond.feature_actors import Count, FeatureView, Field, Last, Max, Source, Sum
from millpond.feature_actors.client import Ack, FeatureClient
from millpond.feature_actors.durable import SnapshotLacks
from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.layout import KEYS_MAX, Layout, compile_layout
from millpond.feature_actors.log import history
from millpond.feature_actors.log.applied import applied_records
from millpond.feature_actors.log.folder import Folder, HistoryUnavailable
from millpond.feature_actors.log.history import delete_expired
from millpond.feature_actors.log.history_reader import check_history, read_history
from millpond.feature_actors.log.log import Log, LogFull
from millpond.feature_actors.log.part import DAY_MS, parts_of, read_part, write_part
from millpond.feature_actors.log.record import OfferRecord


def everything(client: FeatureClient, world: World) -> list[Any]:
    answers = []
    for view in world.views:
        rows = read(client, plan_of(client, view), keys_of(view, world.events(view.source.name), most=50))
        matrix = np.where(np.isnan(rows.matrix), np.nan, rows.matrix)
        answers.append((matrix.tobytes(), rows.as_of.tobytes(), rows.unknown, rows.texts))
    return answers


def has_ids(views: Sequence[FeatureView], name: str) -> bool:
    return next(v for v in views if v.source.name == name).source.event_id is not None


@given(world=worlds(events_max=60), data=st.data())
def test_one_shard_after_crashes_at_any_step_and_retries_is_as_if_nothing_had_happened(
    world: World, data: st.DataObject
) -> None:
    """Bit for bit: one shard applies in the order in which it was sent."""
    with folder() as path:
        calm = DurableCluster(world.layout, 1, path / "calm")
        stormy = DurableCluster(world.layout, 1, path / "stormy")
        for name, now_ms, events in world.batches:
            want = calm.send(name, now_ms, events)
            # Without event ids a request that is sent again is counted again where it had got into the log.
            faults = ["restart", *STEPS, "full"] if has_ids(world.views, name) else ["restart"]
            failed = False
            if data.draw(st.booleans()):
                stormy.snapshot_steps(0, data.draw(st.sampled_from([1, 3, 1_000])))
            for fault in data.draw(st.lists(st.sampled_from(faults), min_size=1, max_size=3)):
                failed = failed or fault in STEPS
                if fault == "restart":
                    stormy.restart_all()
                elif fault == "full":
                    stormy.full = True
                    with pytest.raises(LogFull):
                        stormy.send(name, now_ms, events)
                else:
                    stormy.fault = Fault(fault, torn=data.draw(st.integers(1, 5_000)))
                    with suppress(Crash):  # nothing new is not appended, and so not torn
                        stormy.send(name, now_ms, events)
                    stormy.fault = None
            got = stormy.send(name, now_ms, events)
            if not failed:  # else what had got into the log is counted as a duplicate
                assert got == want
        stormy.restart_all()
        stormy.clock.ms = calm.clock.ms
        assert everything(stormy.client, world) == everything(calm.client, world)
        (one,), (other,) = ([d.shard for d in c.shards] for c in (stormy, calm))
        assert one.check() == []
        one.reclaim()
        other.reclaim()  # how far reclaim has come is nobody's to see
        assert one.status().entities == other.status().entities


@settings(max_examples=max(1, settings().max_examples // 2))
@given(world=worlds(events_max=60), data=st.data())
def test_features_that_came_with_a_start_are_as_if_they_had_always_been_there(
    world: World, data: st.DataObject
) -> None:
    """Bit for bit; a snapshot has others of the same table, or tables beside it."""
    draw = data.draw
    with folder() as path:
        calm = DurableCluster(world.layout, 1, path / "calm")
        had = [
            replace(view, features={name: view.features[name] for name in draw(st.sets(of, min_size=1).map(sorted))})
            for view in world.views
            for of in [st.sampled_from([f.name for f in view if f.derived is None])]
        ]
        stormy = DurableCluster(compile_layout([*world.layout.sources.values()], had), 1, path / "s", history=True)
        at = draw(st.integers(0, len(world.batches)))
        for number, (name, now_ms, events) in enumerate(world.batches):
            if number == at:
                stormy.layout = world.layout
                stormy.restart_all()
            calm.send(name, now_ms, events)
            stormy.send(name, now_ms, events)
            for what in draw(st.lists(st.sampled_from(["restart", "snapshot", "snapshot", "history"]), max_size=2)):
                if what == "restart":
                    stormy.restart_all()
                elif what == "history":
                    stormy.write_history(0)
                else:
                    stormy.snapshot_steps(0, draw(st.sampled_from([1, 3, 1_000])))
        stormy.layout = world.layout
        stormy.restart_all()
        stormy.clock.ms = calm.clock.ms
        assert everything(stormy.client, world) == everything(calm.client, world)
        (one,), (other,) = ([d.shard for d in c.shards] for c in (stormy, calm))
        assert one.check() == []
        assert one.status().events == other.status().events


PAYMENTS = Source(
    "payments",
    owner="tests",
    fields={
        "id": "string",
        "at": "timestamp[ms, UTC]",
        "user": Field("int64", optional=True),
        "shop": Field("string", optional=True),
        "cents": "int64",
    },
    event_id="id",
    event_time="at",
)
SUMS = {"n": Count(), "sum": Sum("cents"), "max": Max("cents")}  # exact, in whatever order
BY_USER = FeatureView("by_user", owner="tests", source=PAYMENTS, key=["user"], features=SUMS)
BY_SHOP = FeatureView("by_shop", owner="tests", source=PAYMENTS, key=["shop"], features=SUMS)
USERS, SHOPS = [*range(6), None], ["a", "b", "ü", None]


def totals(cluster: DurableCluster) -> list[Any]:
    """Return n, sum and max of every user and shop."""
    users = read(cluster.client, plan_of(cluster.client, BY_USER), [(u,) for u in USERS if u is not None])
    shops = read(cluster.client, plan_of(cluster.client, BY_SHOP), [(s,) for s in SHOPS if s is not None])
    return [np.nan_to_num(rows.matrix).tolist() for rows in (users, shops)]


def totals_of(events: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the same by plain Python, of events that are all there once."""

    def of(key: str, value: Any) -> list[float]:
        cents = [e["cents"] for e in events if e[key] == value]
        return [len(cents), sum(cents), max(cents, default=0)]

    return [[of("user", u) for u in USERS if u is not None], [of("shop", s) for s in SHOPS if s is not None]]


@given(data=st.data())
def test_on_any_shards_every_event_is_in_the_end_in_every_table_or_never_was(data: st.DataObject) -> None:
    """The client sends again, or gives up; shards, ingress or all of them end at any step of any write."""
    draw = data.draw
    with folder() as path:
        n_shards = draw(st.sampled_from([1, 2, 3]))
        cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP]), n_shards, path, history=draw(st.booleans()))
        sent: dict[str, dict[str, Any]] = {}
        acknowledged: set[str] = set()
        for number in range(draw(st.integers(1, 8))):
            events = [
                {
                    "id": f"{number}-{row}",
                    "at": number,
                    "user": draw(st.sampled_from(USERS)),
                    "shop": draw(st.sampled_from(SHOPS)),
                    "cents": draw(st.integers(1, 1_000)),
                }
                for row in range(draw(st.sampled_from([1, 1, 2, 12])))
            ]
            if sent and draw(st.booleans()):
                events.append(draw(st.sampled_from(list(sent.values()))))
            sent |= {e["id"]: e for e in events}
            for _ in range(draw(st.integers(1, 3))):
                if draw(st.booleans()):
                    who = draw(st.sampled_from(["shard", "ingress", "all"]))
                    torn = draw(st.integers(1, 20_000))
                    cluster.fault = Fault(draw(st.sampled_from(STEPS)), who, draw(st.integers(0, 6)), torn)
                cluster.full = draw(st.sampled_from([False, False, False, True]))
                cluster.snapshot_at_take = draw(st.booleans())
                try:
                    ack = cluster.send("payments", number + 1, events)
                except (Crash, LogFull):
                    if draw(st.booleans()):
                        break  # the client gives up, and nobody sends it again
                else:
                    assert (ack.accepted + ack.duplicates, ack.conflicts) == (len(events), 0)
                    acknowledged |= {e["id"] for e in events}
                    # All that is acknowledged is seen at once.
                    seen = np.array(totals(cluster)[0])[:, 0]
                    assert (seen >= np.array(totals_of([sent[i] for i in acknowledged])[0])[:, 0]).all()
                    break
                finally:
                    cluster.fault, cluster.full = None, False
            if draw(st.booleans()):
                cluster.deliver_owed()
            for _ in range(draw(st.integers(0, 3))):
                shard = draw(st.integers(0, n_shards - 1))
                if cluster._history is not None and draw(st.booleans()):
                    cluster.write_history(shard)
                else:
                    cluster.snapshot_steps(shard, draw(st.sampled_from([1, 5, 1_000])))
        if draw(st.booleans()):
            cluster.restart_all()
        cluster.deliver_owed()
        logged = cluster.logged("id")
        assert len(set(logged)) == len(logged)
        assert acknowledged <= set(logged)
        assert totals(cluster) == totals_of([sent[i] for i in logged])
        cluster.restart_all()
        cluster.deliver_owed()
        assert totals(cluster) == totals_of([sent[i] for i in logged])
        assert [d.shard.check() for d in cluster.shards] == [[]] * len(cluster.shards)


def test_without_event_ids_an_idempotency_key_makes_two_requests_one(tmp_path: Path) -> None:
    source = Source("visits", owner="tests", fields={"at": "timestamp[ms, UTC]", "user": "int64"}, event_time="at")
    view = FeatureView("by_user", owner="tests", source=source, key=["user"], features={"n": Count()})
    cluster = DurableCluster(compile_layout([], [view]), 3, tmp_path)
    events = [{"at": 5, "user": user % 4} for user in range(20)]

    def counts() -> list[float]:
        return read(cluster.client, plan_of(cluster.client, view), [(u,) for u in range(4)]).matrix[:, 0].tolist()

    assert cluster.send("visits", 9, events, key="one") == Ack(accepted=20)
    cluster.restart_all()
    assert cluster.send("visits", 9, events, key="one") == Ack(duplicates=20)
    assert cluster.send("visits", 9, [*events[:19], {"at": 6, "user": 0}], key="one") == Ack(duplicates=19, conflicts=1)
    assert counts() == [5, 5, 5, 5]
    assert cluster.send("visits", 9, events, key="two") == Ack(accepted=20)
    assert cluster.send("visits", 9, events) == Ack(accepted=20)
    cluster.restart_all()
    cluster.deliver_owed()
    assert counts() == [15, 15, 15, 15]


def test_a_snapshot_begun_while_a_take_is_on_its_way_to_the_log_is_one_to_recover_from(tmp_path: Path) -> None:
    """The offer lies before the snapshot, its take behind it, and no offer waits in between."""
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP]), 2, tmp_path)
    events = [{"id": f"{n}", "at": 5, "user": n % 6, "shop": "ab"[n % 2], "cents": n} for n in range(40)]
    cluster.snapshot_at_take = True
    cluster.send("payments", 9, events)
    for shard in range(2):
        cluster.snapshot_steps(shard, 1_000)
    before = totals(cluster)
    cluster.restart_all()
    assert totals(cluster) == before == totals_of(events)


def test_an_offer_that_nobody_takes_any_more_does_not_keep_the_log_from_being_cut(tmp_path: Path) -> None:
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP]), 2, tmp_path, history=True)
    cluster.fault = Fault("before append", "all", skip=2)  # both shards have offers, neither has a take
    sent = [{"id": f"{n}", "at": 5, "user": n % 6, "shop": "ab"[n % 2], "cents": n} for n in range(20)]
    with pytest.raises(Crash):
        cluster.send("payments", 9, sent)
    cluster.deliver_owed()
    assert all(isinstance(d.log.get(0).record, OfferRecord) for d in cluster.shards)
    for number in range(4):
        events = [{"id": f"{number}-{n}", "at": 5, "user": n % 6, "shop": "b", "cents": n} for n in range(20)]
        sent += events
        cluster.send("payments", 9, events)
        for shard in range(2):
            cluster.write_history(shard)
            cluster.snapshot_steps(shard, 1_000)
    assert all(d.log.first > 0 for d in cluster.shards)  # type: ignore[attr-defined]
    cluster.restart_all()
    cluster.deliver_owed()
    assert totals(cluster) == totals_of(sent)


def test_a_part_that_was_begun_before_keeps_offers_that_are_taken_after_its_end(tmp_path: Path) -> None:
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP]), 2, tmp_path, history=True)
    ends: list[int] = []
    take = cluster.take

    async def take_after_history(shard: int, *rest: Any) -> None:
        ends.append(cluster.shards[shard].shard.next_offset)
        (tmp_path / "history").write_text("in the way")
        with pytest.raises(HistoryUnavailable):
            cluster.write_history(shard)
        (tmp_path / "history").unlink()
        await take(shard, *rest)

    cluster.take = take_after_history  # type: ignore[method-assign]
    cluster.send(
        "payments", 9, [{"id": f"{n}", "at": 5, "user": n % 6, "shop": "ab"[n % 2], "cents": n} for n in range(20)]
    )
    base = str(tmp_path / "history")
    for shard in range(2):
        cluster.write_history(shard)
        log = cluster.shards[shard].log
        assert isinstance(log, Log)
        assert [part.to_offset for part in parts_of(Folder(base), shard)] == [ends[shard], log.next]
        assert [(at, r.routes.tolist(), r.batch) for at, r in read_history(base, shard, 0, log.next)] == [
            (at, r.routes.tolist(), r.batch) for at, r in applied_records(log, 0, log.next, {})
        ]


class Switched:
    """One shard, whose history is switched on and off by starts of it. sent: by the number of the request."""

    def __init__(self, path: Path) -> None:
        self.base = str(path / "history")
        self.cluster = DurableCluster(compile_layout([], [BY_USER]), 1, path)
        self.sent: list[str] = []

    def switch(self, *, on: bool) -> None:
        self.cluster._history = self.base if on else None
        self.cluster.restart(0)

    def send(self, times: int = 1) -> None:
        for _ in range(times):
            self.sent.append(f"e{len(self.sent)}")
            self.cluster.send("payments", 9, [{"id": self.sent[-1], "at": 5, "user": 1, "shop": "a", "cents": 1}])
            self.cluster.snapshot_steps(0, 1_000)

    @property
    def log(self) -> Log:
        log = self.cluster.shards[0].log
        assert isinstance(log, Log)
        return log

    def parts(self) -> list[tuple[int, int, bool]]:
        folder = Folder(self.base)
        return [(p.from_offset, p.to_offset, read_part(folder, p).lost) for p in parts_of(folder, 0)]

    def in_history(self) -> list[str]:
        assert check_history(self.base, 0, self.log.next) == []
        return [i for _, r in read_history(self.base, 0, 0) for i in r.batch.column("id").to_pylist()]


def test_a_history_that_is_begun_when_the_log_was_cut_does_not_pass_for_the_whole_past(tmp_path: Path) -> None:
    one = Switched(tmp_path)
    one.send(6)
    cut = one.log.first
    assert cut > 0
    one.switch(on=True)
    one.cluster.write_history(0)
    assert one.parts() == [(0, cut, True), (cut, 6, False)]
    assert one.in_history() == one.sent[cut:]
    durable = one.cluster.shards[0]
    assert not durable.has_whole_past("payments")
    assert one.cluster.past().since_ms("payments") is not None
    past = durable.past()
    list(past.read_on())
    past.note_expired(["payments"])
    assert past.history_since == {"payments": one.cluster.past().since_ms("payments")}
    # Nor is a feature that came since computed from it.
    one.send(6)
    one.cluster.write_history(0)
    one.cluster.layout = compile_layout([], [replace(BY_USER, features={**SUMS, "last": Last("cents")})])
    with pytest.raises(
        SnapshotLacks, match=f"`by_user.last` came .*begins at offset {one.log.first}, and no history has"
    ):
        one.cluster.restart(0)


@pytest.mark.parametrize("begun", ["no part", "a part", "a whole part"])
@pytest.mark.parametrize("requests", [0, 9])
def test_what_left_the_log_while_the_history_was_off_is_said_to_be_lost(
    begun: str, requests: int, tmp_path: Path
) -> None:
    one = Switched(tmp_path)
    one.switch(on=True)
    one.send(3)
    one.cluster.write_history(0)
    done_to, planned_to = 3, 3
    if begun != "no part":
        one.send(4)
        planned_to = one.log.next
        with pytest.MonkeyPatch.context() as patch:
            if begun == "a part":
                patch.setattr(history, "write_part", fail)
            else:
                patch.setattr(history, "write_part", lambda *args: (write_part(*args), fail()))
            with pytest.raises(HistoryUnavailable):
                one.cluster.write_history(0)
        if begun == "a whole part":
            done_to = planned_to
    one.switch(on=False)
    one.send(requests)
    one.cluster.snapshot_steps(0, 1_000)
    one.switch(on=True)
    cut, end = one.log.first, one.log.next
    assert (3 < cut < planned_to) == (requests == 0 and begun != "no part")
    one.cluster.write_history(0)
    lost = one.sent[done_to:cut]
    assert one.in_history() == [i for i in one.sent if i not in lost]
    assert one.parts()[0] == (0, 3, False)
    assert ([p for p in one.parts() if p[2]] == [(done_to, cut, True)]) == bool(lost)
    assert one.cluster.shards[0].has_whole_past("payments") == (not lost)
    assert one.parts()[-1][1] == end


def fail(*args: object) -> None:
    raise HistoryUnavailable("history: it is away")


def test_ids_and_keys_are_known_though_a_feature_was_added_and_the_log_cut(tmp_path: Path) -> None:
    source = Source("visits", owner="tests", fields={"at": "timestamp[ms, UTC]", "user": "int64"}, event_time="at")

    def layout(*names: str) -> Any:
        view = FeatureView("by_user", owner="tests", source=source, key=["user"], features={n: SUM[n] for n in names})
        return compile_layout([], [view]), view

    SUM = {"n": Count(), "largest": Max("user")}
    of, view = layout("n")
    cluster = DurableCluster(of, 1, tmp_path, history=True)
    events = [{"at": 5, "user": user % 4} for user in range(20)]
    for number in range(6):
        assert cluster.send("visits", 9, events, key=f"{number}") == Ack(accepted=20)
        cluster.write_history(0)
        cluster.snapshot_steps(0, 1_000)
    assert cluster.shards[0].log.first > 0  # type: ignore[attr-defined]
    cluster.layout, view = layout("n", "largest")
    cluster.restart_all()
    for number in range(6):
        assert cluster.send("visits", 9, events, key=f"{number}") == Ack(duplicates=20)
    rows = read(cluster.client, plan_of(cluster.client, view), [(u,) for u in range(4)])
    assert rows.matrix.tolist() == [[30, 0], [30, 1], [30, 2], [30, 3]]


@pytest.mark.parametrize(("window", "refused"), [(None, True), ("5d", True), ("2d", False)])
def test_a_start_computes_anew_only_what_got_features_and_not_from_a_past_that_retention_has_thinned(
    window: str | None, refused: bool, tmp_path: Path
) -> None:
    kept = replace(PAYMENTS, retention="3d")

    def layout(**more: Any) -> Layout:
        of = {name: FeatureView(f"by_{name}", owner="tests", source=kept, key=[name], features=f | more.get(name, {}))
              for name, f in (("user", {"n": Count(window=window)}), ("shop", {"n": Count()}))}  # fmt: skip
        return compile_layout([], [*of.values()])

    def counts(view: str, key: Any) -> list[float]:
        of = cluster.client.layout.views[view]
        return read(cluster.client, plan_of(cluster.client, of), [(key,)]).matrix[0].tolist()

    cluster = DurableCluster(layout(), 1, tmp_path, history=True)
    for day in range(10):
        at = day * DAY_MS + 5
        cluster.send("payments", at, [{"id": f"{day}", "at": at, "user": 1, "shop": "a", "cents": 7}])
        cluster.write_history(0)
        cluster.snapshot_steps(0, 1_000)
        delete_expired(str(tmp_path / "history"), [kept], at)
    assert cluster.shards[0].log.first > 0  # type: ignore[attr-defined]
    before = counts("by_user", 1)
    more = {"user": {"last": Sum("cents", window="1d")}}
    cluster.layout = layout(**more)
    if refused:
        with pytest.raises(
            SnapshotLacks,
            match=r"`by_user.last` came .*, so all of payments\[user\] .*arrived before 1970-01-07, .*deploy",
        ):
            cluster.restart(0)
        # As it says:
        cluster.layout = layout()
        cluster.restart(0)
        cluster.add_view(replace(layout(**more).views["by_user"], name="again"))
        assert cluster.backfill_steps(0, 1_000)
        assert counts("again", 1)[1] == 14
    else:
        cluster.restart(0)
        assert counts("by_user", 1) == [*before, 14]
    assert counts("by_user", 1)[:1] == before == ([10] if window is None else [int(window[0]) + 1])
    assert counts("by_shop", "a") == [10]
    cluster.restart(0)
    assert (counts("by_user", 1)[:1], counts("by_shop", "a")) == (before, [10])


def test_a_source_has_at_most_31_keys_and_the_last_is_as_good_as_the_first(tmp_path: Path) -> None:
    fields = {f"f{n:02d}": "int64" for n in range(KEYS_MAX + 1)}
    of = Source("wide", owner="tests", fields={"at": "timestamp[ms, UTC]", **fields}, event_time="at")
    views = [FeatureView(f"v{n}", owner="t", source=of, key=[f], features={"n": Count()}) for n, f in enumerate(fields)]
    again = replace(views[0], name="again", features={"s": Sum("f01")})
    cluster = DurableCluster(compile_layout([], views[: KEYS_MAX - 1]), 2, tmp_path)
    cluster.add_view(views[KEYS_MAX - 1])
    cluster.add_view(again)
    while not all(cluster.backfill_steps(shard, 1_000) for shard in range(2)):
        pass
    cluster.send("wide", 9, [{"at": 5, **{name: 10 * n for n, name in enumerate(fields)}}])
    refused = (
        "view `v31`: with f31 source `wide` has more than 31 keys, which is as many as its views may have together; "
    )
    for add in (
        lambda: compile_layout([], views),
        lambda: cluster.client.layout.extended([views[KEYS_MAX]]),
        lambda: compile_layout([], views[:KEYS_MAX]).extended([again, views[KEYS_MAX]]),
    ):
        with pytest.raises(DeclarationError) as caught:
            add()
        assert caught.value.message.startswith(refused)
    for _ in range(2):
        for n, view in enumerate([*views[:KEYS_MAX], again]):
            rows = read(cluster.client, plan_of(cluster.client, view), [(10 * n % 310,)])
            assert rows.matrix.tolist() == [[10 if view is again else 1]]
        cluster.define_views()


def test_without_any_snapshot_what_was_had_is_not_had_twice(tmp_path: Path) -> None:
    """The home still owes what both shards have applied: nobody has told it."""
    cluster = DurableCluster(compile_layout([], [BY_USER, BY_SHOP]), 2, tmp_path, history=True)
    sent: list[dict[str, Any]] = []
    for number in range(6):
        events = [{"id": f"{number}-{n}", "at": 5, "user": n % 6, "shop": "ab"[n % 2], "cents": n} for n in range(20)]
        sent += events
        cluster.send("payments", 9, events)
        for shard in range(2):
            cluster.write_history(shard)
            cluster.snapshot_steps(shard, 1_000)
    cluster.restart(0)
    assert cluster.shards[0].shard.deliveries.owed
    assert cluster.shards[1].log.first > 0  # type: ignore[attr-defined]
    for snapshot in (cluster.shards[1].folder / "snapshots").iterdir():  # type: ignore[attr-defined]
        snapshot.unlink()
    cluster.restart(1)
    cluster.deliver_owed()
    assert totals(cluster) == totals_of(sent)


def test_events_from_before_a_field_was_added_are_read_with_its_default_or_null(tmp_path: Path) -> None:
    def declared(**more: Any) -> tuple[Source, FeatureView]:
        fields = {"id": "string", "user": "int64", "at": "timestamp[ms, UTC]", **more}
        of = Source("orders", owner="tests", fields=fields, event_id="id", event_time="at")
        features: dict[str, Any] = {"n": Count()}
        if more:
            features |= {"total": Sum("price"), "last": Last("code")}
        return of, FeatureView("v", owner="tests", source=of, key=["user"], features=features)

    for number, more in enumerate(
        ({}, {"price": Field("float64", default=2.5), "code": Field("string", optional=True)})
    ):
        of, view = declared(**more)
        cluster = DurableCluster(compile_layout([], [view]), 1, tmp_path)
        event = {"id": f"e{number}", "user": 1, "at": number, "price": 10.0, "code": "x"}
        cluster.send("orders", 10, [{name: event[name] for name in of.fields}])
    cluster.restart_all()
    rows = read(cluster.client, plan_of(cluster.client, view), [(1,)])
    assert (rows.matrix.tolist(), rows.texts) == ([[2.0, 12.5]], {"v.last": ["x"]})
