"""The engine gives what the oracle recomputes from the raw events, for any declaration and any events.

300 random programs of the main test by default; 20,000 on demand:

    MILLPOND_EXAMPLES=66 pytest -q tests/test_engine_vs_oracle.py -k oracle_says
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import DAY, HOUR, World, batch, cluster, example, source, worlds

from millpond.feature_actors import Count, FeatureView, oracle
from millpond.feature_actors import judge as judging
from millpond.feature_actors.aggregations import AGGREGATIONS, Aggregation
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.errors import AsOfInPast
from millpond.feature_actors.events import Events
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.ports import complete
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.windows import LADDER_MS

_UNSEEN = {"user": 12345, "code": "never", "small": 77}
Key = tuple[Any, ...]
Event = dict[str, Any]


def replay(world: World, n_shards: int = 1, seed: int = 0, *, bulk: bool = False) -> tuple[FeatureClient, list[Shard]]:
    """Send a world's batches to a new cluster; bulk: as loads, in which each event arrives when it happens."""
    clock = ManualClock(0)
    client, shards = cluster(world.layout, n_shards, clock, n_slots=max(world.n_slots, n_shards), seed=seed)
    for number, (name, now_ms, events) in enumerate(world.batches):
        clock.ms = now_ms
        complete(client.ingest(name, batch(client.layout.source(name), events), arrival_is_event_time=bulk))
        if number in world.reclaims:
            for shard in shards:
                shard.reclaim()
    return client, shards


def keys_of(view: FeatureView, events: Sequence[Event], most: int) -> list[Key]:
    keys = dict.fromkeys(tuple(e[f] for f in view.key) for e in events)
    return [*[k for k in keys if None not in k][:most], tuple(_UNSEEN[f] for f in view.key)]


def kept_by(view: FeatureView) -> dict[str, Aggregation]:
    return {name: a for name, a in view.features.items() if isinstance(a, Aggregation)}


def telling_times(view: FeatureView, events: Sequence[Event]) -> set[int]:
    """The times at which an event of the view comes, is about to leave a window or a ttl, and just has."""
    times = set()
    for aggregation in kept_by(view).values():
        for at in {e["at"] for e in events}:
            times |= {at, at - 1}
            if (window := aggregation.window_ms) is not None:
                width = 1 if aggregation.exact else max(w for w in LADDER_MS if aggregation.tiles_min * w <= window)
                gone = at // width * width + width + window - aggregation.exact
                times |= {at + window, gone - 1, gone}
            elif aggregation.ttl_ms is not None:
                times |= {at + aggregation.ttl_ms, at + aggregation.ttl_ms + 1}
    return times


def plan_of(client: FeatureClient, view: FeatureView, names: Sequence[str] | None = None) -> ReadPlan:
    return ReadPlan(client.layout, [view[name] for name in names or view.features], "the test")


def read(client: FeatureClient, plan: ReadPlan, keys: Sequence[Key], as_of: int | None = None) -> FeatureRows:
    (view,) = plan.views.values()
    columns = plan.key_columns([dict(zip(view.key, k, strict=True)) for k in keys], batch=True)
    return complete(client.read(plan, columns, len(keys), as_of))


class Judge(judging.Judge):
    """Asserts that what was read is right."""

    def check(self, keys: Sequence[Key], plan: ReadPlan, rows: FeatureRows) -> None:
        assert [str(difference) for difference in self.differences(keys, plan, rows)] == []


@settings(max_examples=round(7.5 * settings().max_examples))
@given(world=worlds(), data=st.data())
def test_every_feature_of_every_entity_is_what_the_oracle_says(world: World, data: st.DataObject) -> None:
    client, shards = replay(world, n_shards=data.draw(st.sampled_from([1, 1, 3])))
    for view in world.views:
        judge, plan = Judge(view, events := world.events(view.source.name)), plan_of(client, view)
        keys = keys_of(view, events, most=4)
        live = read(client, plan, keys)
        assert live.as_of.tolist() == [judge.live_as_of(key, world.now_ms) for key in keys]
        judge.check(keys, plan, live)
        telling = telling_times(view, events)
        if later := sorted(t for t in telling if t >= live.as_of.max()):
            for as_of in data.draw(st.lists(st.sampled_from(later), min_size=1, max_size=2, unique=True)):
                judge.check(keys, plan, read(client, plan, keys, as_of))
        # A time before the newest event, or before the clock: only if all that is read is exact, and not for long.
        exact = [name for name in view.features if oracle.past_ms(view, [name])]
        plan = plan_of(client, view, data.draw(st.sampled_from([exact, exact[:1], list(view.features)])))
        past_ms = oracle.past_ms(view, [f.name for f in plan.features])
        place = data.draw(st.integers(0, len(keys) - 1))
        key, newest = keys[place], int(live.as_of[place])
        oldest = newest - past_ms
        earlier = sorted({t for t in telling if oldest <= t < newest} | {oldest, oldest - 1, newest - 1})
        for as_of in data.draw(st.lists(st.sampled_from(earlier), min_size=1, max_size=3, unique=True)):
            if as_of >= oldest:
                judge.check([key], plan, read(client, plan, [key], as_of))
            else:
                with pytest.raises(AsOfInPast, match=f"as_of {as_of} lies before {newest}"):
                    read(client, plan, [key], as_of)
    assert [s.check() for s in shards] == [[]] * len(shards)


@given(world=worlds(events_max=80), data=st.data())
def test_views_of_different_keys_are_read_as_of_one_time(world: World, data: st.DataObject) -> None:
    client, shards = replay(world, n_shards=data.draw(st.sampled_from([1, 2, 4])))
    plan = ReadPlan(client.layout, data.draw(st.permutations([f for v in world.views for f in v])), "the test")
    events = [e for _, _, es in world.batches for e in es if None not in (e["user"], e["code"])] or [_UNSEEN]
    ids = [{f: e[f] for f in plan.key_fields} for e in events[-5:]]
    rows = complete(client.read(plan, plan.key_columns(ids, batch=True), len(ids)))
    judges = [Judge(view, world.events(view.source.name)) for view in world.views]
    keys = [[tuple(one[f] for f in view.key) for one in ids] for view in world.views]
    for judge, its_keys in zip(judges, keys, strict=True):
        judge.check(its_keys, plan, rows)
    for place, as_of in enumerate(rows.as_of.tolist()):
        assert as_of == max(j.live_as_of(k[place], world.now_ms) for j, k in zip(judges, keys, strict=True))
    assert [s.check() for s in shards] == [[]] * len(shards)


@given(world=worlds(), n_shards=st.sampled_from([1, 3]))
def test_a_bulk_load_is_of_events_that_arrive_when_they_happen(world: World, n_shards: int) -> None:
    client, shards = replay(world, n_shards, bulk=True)
    for view in world.views:
        events = world.events(view.source.name)
        judge = Judge(view, [{**e, "arrival_ms": e["at"], "received_ms": e["arrival_ms"]} for e in events])
        keys = keys_of(view, events, most=4)
        # What expired before the newest arrival is reclaimed; of a ttl, an event that arrives before it would tell.
        if names := [name for name, a in kept_by(view).items() if a.ttl_ms is None]:
            plan = plan_of(client, view, names)
            judge.check(keys, plan, read(client, plan, keys))
    assert [s.check() for s in shards] == [[]] * len(shards)


def test_the_core_of_the_oracle_is_short() -> None:
    core = [oracle.sees, oracle.knows, oracle._start, oracle._width_ms]
    assert sum(len(inspect.getsource(function).splitlines()) for function in core) < 40
    for kind in AGGREGATIONS:
        assert len(inspect.getsource(kind.plain).splitlines()) <= 10


# -- laws


def bits(rows: FeatureRows) -> tuple[Any, ...]:
    # One NaN: its bits are no promise, those of every number are.
    matrix = np.where(np.isnan(rows.matrix), np.nan, rows.matrix)
    return matrix.tobytes(), rows.as_of.tobytes(), rows.unknown, rows.texts


def everything(client: FeatureClient, world: World, as_of: int | None = None) -> list[tuple[Any, ...]]:
    """The bits of all features of all entities, and of what is exact as of the earliest time allowed."""
    found = []
    for view in world.views:
        keys = keys_of(view, world.events(view.source.name), most=50)
        rows = read(client, plan_of(client, view), keys, as_of)
        found.append(bits(rows))
        if as_of is None and (exact := [name for name in view.features if oracle.past_ms(view, [name])]):
            past_ms = oracle.past_ms(view, exact)
            found.append(bits(read(client, plan_of(client, view, exact), keys, int(rows.as_of.max()) - past_ms)))
    return found


@given(world=worlds(), n_shards=st.integers(2, 16))
def test_n_shards_give_the_bits_of_one(world: World, n_shards: int) -> None:
    (one, [alone]), (many, shards) = replay(world), replay(world, n_shards)
    assert everything(many, world) == everything(one, world)
    # Not the tiles: how much of what is out of sight has been freed by now depends on the shard's own events.
    for table, applied in alone.status().events.items():
        assert sum(s.status().events[table] for s in shards) == applied
    assert [s.check() for s in shards] == [[]] * n_shards


@given(world=worlds(), seed=st.integers(1, 2**64 - 1))
def test_the_seed_of_the_index_changes_no_answer(world: World, seed: int) -> None:
    seeded, shards = replay(world, seed=seed)
    assert everything(seeded, world) == everything(replay(world)[0], world)
    assert [s.check() for s in shards] == [[]]


@given(world=worlds(), data=st.data())
def test_any_split_of_a_batch_gives_the_bits_of_the_whole(world: World, data: st.DataObject) -> None:
    pieces: list[Any] = []
    for name, now_ms, events in world.batches:
        rest = events
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            pieces.append((name, now_ms, rest[:size]))
            rest = rest[size:]
    split, shards = replay(World(world.views, pieces))
    assert everything(split, world) == everything(replay(world)[0], world)
    assert [s.check() for s in shards] == [[]]


@given(world=worlds())
def test_the_same_batch_twice_is_the_batch_once_where_events_have_ids(world: World) -> None:
    batches = []
    for one in world.batches:
        batches.append(one)
        if next(v for v in world.views if v.source.name == one[0]).source.event_id is not None:
            batches.append(one)
    twice, shards = replay(World(world.views, batches), 2)
    assert everything(twice, world) == everything(replay(world)[0], world)
    assert [s.check() for s in shards] == [[], []]


@given(world=worlds(), n_shards=st.sampled_from([1, 2]))
def test_reclaim_changes_no_answer_and_leaves_nothing_that_is_out_of_sight(world: World, n_shards: int) -> None:
    always = World(world.views, world.batches, frozenset(range(len(world.batches))), world.n_slots)
    (without, _), (client, shards) = replay(World(world.views, world.batches), n_shards), replay(always, n_shards)
    assert everything(client, world) == everything(without, world)
    # A century later.
    century = 100 * 365 * DAY
    for shard in shards:
        for of in world.layout.sources.values():
            shard.apply(of.name, batch(of, []), np.array([world.now_ms + century]), world.now_ms + century)
        shard.reclaim()
        assert shard.check() == []
    ever = [client.layout.table_of(v).name for v in world.views
            if any(a.window_ms is None and a.ttl_ms is None for a in kept_by(v).values())]  # fmt: skip
    for status in (shard.status() for shard in shards):
        assert status.tiles == 0
        assert {name: n for name, n in status.entities.items() if n and name not in ever} == {}
    later = world.now_ms + century
    assert everything(client, world, later) == everything(without, world, later)


@pytest.mark.parametrize("kept", [Count(window="24h"), Count(ttl="24h")], ids=["window", "ttl"])
def test_reclaim_keeps_what_a_view_knew_as_of_the_earliest_time_allowed(kept: Count) -> None:
    view = FeatureView(
        "v", owner="tests", source=source("first", None), key=["user"],
        features={"kept": kept, "exact": Count(window="1h", exact=True)},
    )  # fmt: skip
    rest = {"id": "", "num": 0, "code": "", "small": 0, "v": 0.0, "i": 0, "f32": 0.0, "flag": True}
    now_ms = DAY + 50 * 60_000
    events = [{**rest, "user": user, "at": at, "arrival_ms": at} for user, at in ((1, 0), (2, now_ms))]
    world = World([view], [("first", e["at"], [e]) for e in events], reclaims=frozenset([0, 1]))
    client, _ = replay(world)
    plan = plan_of(client, view, ["exact"])
    rows = read(client, plan, [(1,)], now_ms - HOUR)
    assert rows.unknown == [[]]
    Judge(view, events).check([(1,)], plan, rows)


@given(world=worlds(), n_shards=st.sampled_from([1, 3]))
def test_a_replay_of_the_log_gives_the_bits_of_the_live_state(world: World, n_shards: int) -> None:
    live, _ = replay(world, n_shards)
    admitted = {id(e) for name, of in live.layout.sources.items() for e in oracle.distinct(of, world.events(name))}
    again, [fresh] = cluster(world.layout, clock=ManualClock(world.now_ms))
    for name, now_ms, events in world.batches:
        log = [e for e in events if id(e) in admitted]
        fresh.apply(name, batch(live.layout.source(name), log), np.full(len(log), now_ms), now_ms)
    assert everything(again, world) == everything(live, world)
    assert fresh.check() == []


@pytest.mark.parametrize("n_shards", [1, 3])
def test_an_empty_cluster_answers_the_value_of_nothing(n_shards: int) -> None:
    features = {kind.__name__.lower(): example(kind, "1h") for kind in AGGREGATIONS}
    view = FeatureView("nothing", owner="tests", source=source("first", "id"), key=["user"], features=features)
    client, _ = replay(World([view], []), n_shards)
    plan = plan_of(client, view)
    rows = read(client, plan, [(1,), (2,)])
    for kind, (name, value) in zip(AGGREGATIONS, plan.named_values(rows)[1].items(), strict=True):
        want = 0.0 if kind.empty == "0" else np.nan
        np.testing.assert_array_equal(value, np.full(np.shape(value), want), err_msg=name)
    assert rows.unknown == [["nothing"]] * 2


@given(world=worlds(), data=st.data())
def test_what_a_row_has_by_its_sequence_is_not_applied_again(world: World, data: st.DataObject) -> None:
    """The log from any earlier offset on, once more: what recovery does with rows that a snapshot took later."""
    without_ids = [name for name, of in world.layout.sources.items() if of.event_id is None]
    live, [shard] = cluster(world.layout, clock=ManualClock(world.now_ms))
    log = [(of, batch(world.layout.source(of), events), now_ms) for of, now_ms, events in world.batches
           if of in without_ids]  # fmt: skip
    again, [other] = cluster(world.layout, clock=ManualClock(world.now_ms))
    for offset, (of, events, now_ms) in enumerate(log):
        stamps = np.full(events.num_rows, now_ms)
        for one in (shard, other):
            one.commit(one.prepare_ingest(Events.judged(of, events, stamps, now_ms)), offset)
        for earlier in range(data.draw(st.integers(0, offset)), offset + 1) if data.draw(st.booleans()) else ():
            of, events, now_ms = log[earlier]
            stamps = np.full(events.num_rows, now_ms)
            other.commit(other.prepare_ingest(Events.judged(of, events, stamps, now_ms)), earlier)
    assert everything(again, world) == everything(live, world)
    assert other.check() == []
