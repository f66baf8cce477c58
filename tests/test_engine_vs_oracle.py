"""The engine gives what the oracle recomputes from the raw events, for any declaration and any events."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import World, batch, cluster, worlds

from millpond.feature_actors import FeatureView, oracle
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.ports import complete
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.windows import LADDER_MS

_UNSEEN = {"user": 12345, "code": "never", "small": 77}


def replay(world: World, n_shards: int = 1, seed: int = 0) -> tuple[FeatureClient, list[Shard], ManualClock]:
    clock = ManualClock(0)
    client, shards = cluster(world.layout, n_shards, clock, seed=seed)
    for name, now_ms, events in world.batches:
        clock.ms = now_ms
        complete(client.ingest(name, batch(client.layout.source(name), events)))
    return client, shards, clock


def keys_of(view: FeatureView, events: list[dict[str, Any]], most: int = 6) -> list[tuple[Any, ...]]:
    keys = dict.fromkeys(tuple(e[f] for f in view.key) for e in events)
    return [*[k for k in keys if None not in k][:most], tuple(_UNSEEN[f] for f in view.key)]


def telling_times(view: FeatureView, events: list[dict[str, Any]]) -> list[int]:
    """The times at which an event of the view is about to leave a window or a ttl, and just has."""
    times = set()
    for aggregation in view.features.values():
        for at in {e["at"] for e in events}:
            if (window := aggregation.window_ms) is not None:
                width = max(w for w in LADDER_MS if 60 * w <= window)
                gone = at // width * width + width + window
                times |= {at + window, gone - 1, gone}
            elif aggregation.ttl_ms is not None:
                times |= {at + aggregation.ttl_ms, at + aggregation.ttl_ms + 1}
    return sorted(times)


def read(client: FeatureClient, view: FeatureView, keys: list[tuple[Any, ...]], as_of: int | None) -> FeatureRows:
    plan = ReadPlan(client.layout, list(view), "the test")
    columns = plan.key_columns([dict(zip(view.key, k, strict=True)) for k in keys], batch=True)
    return complete(client.read(plan, columns, len(keys), as_of))


def assert_parity(view: FeatureView, log: list[Any], keys: list[tuple[Any, ...]], rows: FeatureRows) -> None:
    for key, values, as_of, unknown in zip(keys, rows.matrix, rows.as_of.tolist(), rows.unknown, strict=True):
        mine = [e for e in log if tuple(e[f] for f in view.key) == key]
        where = f"{view.name} of {key!r} as of {as_of}"
        for name, got in zip(view.features, values.tolist(), strict=True):
            assert oracle.agrees(view, name, mine, key, as_of, got), (
                f"{name} {view.features[name].identity()} of {where}: "
                f"got {got!r}, of {oracle.seen_by(view, name, mine, key, as_of)}"
            )
        assert (unknown == []) == oracle.known(view, mine, key, as_of), f"{where}: unknown {unknown}"


@settings(max_examples=round(1.5 * settings().max_examples))
@given(world=worlds(), data=st.data())
def test_every_feature_of_every_entity_is_what_the_oracle_says(world: World, data: st.DataObject) -> None:
    client, shards, _ = replay(world, n_shards=data.draw(st.sampled_from([1, 1, 3])))
    for view in world.views:
        events = world.events(view.source.name)
        log = oracle.distinct(view.source, events)
        keys = keys_of(view, events)
        live = read(client, view, keys, None)
        for key, as_of in zip(keys, live.as_of.tolist(), strict=True):
            assert as_of == oracle.live_as_of_ms([(view, key)], log, world.now_ms)
        assert_parity(view, log, keys, live)
        if later := [t for t in telling_times(view, events) if t >= live.as_of.max()]:
            for as_of in data.draw(st.lists(st.sampled_from(later), min_size=1, max_size=5, unique=True)):
                assert_parity(view, log, keys, read(client, view, keys, as_of))
    assert [s.check() for s in shards] == [[]] * len(shards)


@given(world=worlds(events_max=80), data=st.data())
def test_views_of_different_keys_are_read_as_of_one_time(world: World, data: st.DataObject) -> None:
    client, _, _ = replay(world, n_shards=data.draw(st.sampled_from([1, 2, 4])))
    plan = ReadPlan(client.layout, [f for v in world.views for f in v], "the test")
    events = [e for _, _, es in world.batches for e in es if None not in (e["user"], e["code"])] or [_UNSEEN]
    ids = [{f: e[f] for f in plan.key_fields} for e in events[-5:]]
    rows = complete(client.read(plan, plan.key_columns(ids, batch=True), len(ids)))
    logs = {v.source.name: oracle.distinct(v.source, world.events(v.source.name)) for v in world.views}
    column = 0
    for view in world.views:
        keys = [tuple(one[f] for f in view.key) for one in ids]
        end = column + len(view.features)
        part = FeatureRows(
            rows.matrix[:, column:end], rows.as_of, [[n for n in u if n == view.name] for u in rows.unknown]
        )
        assert_parity(view, logs[view.source.name], keys, part)
        column = end
    for one, as_of in zip(ids, rows.as_of.tolist(), strict=True):
        newest = [
            oracle.live_as_of_ms([(v, tuple(one[f] for f in v.key))], logs[v.source.name], world.now_ms)
            for v in world.views
        ]
        assert as_of == max(newest)


# -- laws


def _bits(rows: FeatureRows) -> tuple[Any, ...]:
    # One NaN: its bits are no promise, those of every number are.
    matrix = np.where(np.isnan(rows.matrix), np.nan, rows.matrix)
    return matrix.tobytes(), rows.as_of.tobytes(), rows.unknown


def _everything(client: FeatureClient, world: World) -> list[tuple[Any, ...]]:
    return [
        _bits(read(client, view, keys_of(view, world.events(view.source.name), most=50), None)) for view in world.views
    ]


@given(world=worlds(), n_shards=st.integers(2, 16))
def test_n_shards_give_the_bits_of_one(world: World, n_shards: int) -> None:
    one, _, _ = replay(world)
    many, shards, _ = replay(world, n_shards)
    assert _everything(many, world) == _everything(one, world)
    assert sum(s.status().tiles for s in shards) == sum(s.status().tiles for s in replay(world)[1])
    assert [s.check() for s in shards] == [[]] * n_shards


@given(world=worlds(), seed=st.integers(1, 2**64 - 1))
def test_the_seed_of_the_index_changes_no_answer(world: World, seed: int) -> None:
    seeded, shards, _ = replay(world, seed=seed)
    assert _everything(seeded, world) == _everything(replay(world)[0], world)
    assert shards[0].check() == []


@given(world=worlds(), data=st.data())
def test_any_split_of_a_batch_gives_the_bits_of_the_whole(world: World, data: st.DataObject) -> None:
    pieces: list[Any] = []
    for name, now_ms, events in world.batches:
        rest = events
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            pieces.append((name, now_ms, rest[:size]))
            rest = rest[size:]
    split, shards, _ = replay(World(world.views, pieces))
    assert _everything(split, world) == _everything(replay(world)[0], world)
    assert shards[0].check() == []


@given(world=worlds())
def test_the_same_batch_twice_is_the_batch_once_where_events_have_ids(world: World) -> None:
    batches = []
    for one in world.batches:
        batches.append(one)
        if next(v for v in world.views if v.source.name == one[0]).source.event_id is not None:
            batches.append(one)
    twice, shards, _ = replay(World(world.views, batches), 2)
    assert _everything(twice, world) == _everything(replay(world)[0], world)
    assert [s.check() for s in shards] == [[], []]


@pytest.mark.parametrize("n_shards", [1, 3])
def test_an_empty_cluster_answers_the_value_of_nothing(n_shards: int) -> None:
    from worlds import source

    from millpond.feature_actors import Count, Last, Max, Mean, Min, SecondsSince, Sum

    view = FeatureView(
        "nothing", owner="tests", source=source("first", "id"), key=["user"],
        features={"c": Count(window="1h"), "s": Sum("v"), "m": Mean("v"), "lo": Min("v"), "hi": Max("v"),
                  "last": Last("v"), "since": SecondsSince(ttl="1d")},
    )  # fmt: skip
    client, _, _ = replay(World([view], []), n_shards)
    rows = read(client, view, [(1,), (2,)], None)
    nan = np.nan
    np.testing.assert_array_equal(rows.matrix, [[0, 0, nan, nan, nan, nan, nan]] * 2)
    assert rows.unknown == [["nothing"]] * 2
