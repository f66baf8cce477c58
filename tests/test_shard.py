"""The tile store and the shard: laws of what they keep, and that `check` finds damage."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import DAY, HOUR, World, batch, source, worlds

from millpond.feature_actors import Count, FeatureView, Last, Max, Mean, Min, SecondsSince, Streak, Sum, oracle
from millpond.feature_actors.dedupe import DUPLICATE, NEW, DedupeFull
from millpond.feature_actors.events import Events, PastEvents
from millpond.feature_actors.image import load_shard, shard_chunks
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.log.record import EventsRecord
from millpond.feature_actors.log.snapshot import Ids, write_snapshot
from millpond.feature_actors.plan import Answer, Question, ReadPlan
from millpond.feature_actors.reader import MemoryReader
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import M_USED, Memory
from millpond.feature_actors.tiles.program import S_LIFETIME, S_ROW_AT
from millpond.feature_actors.tiles.store import TileStore
from millpond.feature_actors.tiles.structure import H_INDEX_AT, H_PLACES, H_ROWS, H_SEQUENCE
from millpond.feature_actors.view import holds

NOW = 1_700_000_000_000
FIRST = source("first", None)
_EVENT = {
    "id": "e",
    "num": 0,
    "at": NOW,
    "user": 1,
    "code": "a",
    "small": 0,
    "v": 1.0,
    "i": 1,
    "f32": 0.0,
    "flag": True,
}


def view(**features: Any) -> FeatureView:
    return FeatureView("v", owner="tests", source=FIRST, key=["user"], features=features)


def event(at: int, arrival: int | None = None, **changes: Any) -> dict[str, Any]:
    return {**_EVENT, "at": at, "arrival_ms": at if arrival is None else arrival, **changes}


def shard_of(views: list[FeatureView], events: list[dict[str, Any]], n_slots: int = 1) -> Shard:
    shard = Shard(compile_layout([], views), ShardMap.even(n_slots, 1), 0)
    stamps = np.array([e["arrival_ms"] for e in events], np.int64)
    shard.apply(FIRST.name, batch(FIRST, events), stamps, 0)  # received long ago: reads here set the time
    assert shard.check() == []
    return shard


def ask(shard: Shard, of: FeatureView, users: list[int], now: int) -> Answer:
    """Read the features of users on a clock that says `now`."""
    plan = ReadPlan(shard._layout, list(of), "test")
    return shard.read(plan.question({"user": users}, len(users), now, None))


def read(shard: Shard, of: FeatureView, user: int, as_of: int) -> dict[str, float]:
    answer = ask(shard, of, [user], as_of)
    assert answer.as_of.tolist() == [as_of]
    return dict(zip(of.features, answer.values[0].tolist(), strict=True))


# -- too late, by event time and arrival stamp alone


@pytest.mark.parametrize("window", ["1s", "90s", "1h", "24h", "90d"])
def test_a_tile_that_no_window_will_cover_any_more_takes_no_event(window: str) -> None:
    declared = view(n=Count(window=window), total=Sum("v", window=window))
    length = Count(window=window).window_ms
    assert length is not None
    width = max(w for w in (10, 1000, 60_000, 1_200_000, DAY) if 60 * w <= length)
    oldest = (NOW - length) // width * width
    early = [event(at, at) for at in (oldest - width, oldest)]
    late = [event(oldest - width, NOW), event(oldest - 1, NOW), event(oldest, NOW), event(oldest + 1, NOW)]
    shard = shard_of([declared], [*early, *late])
    # As of a time before the arrival: what was not taken is not there, though its tile is in the window.
    assert read(shard, declared, 1, oldest + 1)["n"] == 4
    assert oracle.features(declared, [*early, *late], (1,), oldest + 1) == {"n": 4, "total": 4}
    assert shard.status().tiles == 2


def test_a_tile_is_kept_for_the_longest_window_that_reads_it() -> None:
    declared = view(short=Count(window="60s"), long=Count(window="4m"))
    shard = shard_of([declared], [event(NOW - 200_000, NOW), event(NOW - 300_000, NOW)])
    assert shard.status().tiles == 1
    assert read(shard, declared, 1, NOW) == {"short": 0, "long": 1}


def test_a_lifetime_with_ttl_starts_anew_when_it_had_been_forgotten() -> None:
    declared = view(n=Count(ttl="1h"), last=Last("v", ttl="1h"), ever=Count())
    events = [event(NOW, v=1.0), event(NOW + HOUR, v=2.0), event(NOW + 2 * HOUR + 1, v=3.0)]
    shard = shard_of([declared], events[:2])
    assert read(shard, declared, 1, NOW + 2 * HOUR) == {"n": 2, "last": 2, "ever": 2}
    gone = read(shard, declared, 1, NOW + 2 * HOUR + 1)
    assert (gone["n"], gone["ever"], np.isnan(gone["last"])) == (0, 2, True)
    assert read(shard_of([declared], events), declared, 1, events[2]["at"]) == {"n": 1, "last": 3, "ever": 3}


def test_a_lifetime_with_ttl_takes_no_event_from_before_its_ttl() -> None:
    declared = view(n=Count(ttl="1h"))
    events = [event(NOW), event(NOW - HOUR + 1, NOW + 1), event(NOW - HOUR, NOW + 1)]
    assert read(shard_of([declared], events), declared, 1, NOW + 1) == {"n": 2}


def test_too_late_is_the_same_for_the_count_of_an_ack_and_for_the_tiles() -> None:
    declared = view(n=Count(window="1h"), m=Sum("v", window="2d"), k=Last("v", ttl="1d"))
    layout = compile_layout([], [declared])
    times = NOW + np.arange(-3 * DAY, 1, 599_999)
    too_late = layout.too_late("first", times, np.full(len(times), NOW))
    for at, late in zip(times.tolist(), too_late.tolist(), strict=True):
        shard = shard_of([declared], [event(at, NOW)])
        taken = shard.status().tiles > 0 or read(shard, declared, 1, max(at, NOW - DAY))["k"] == 1
        assert taken is not late
    assert 0 < too_late.sum() < len(times)


def test_nothing_is_too_late_for_a_feature_that_is_kept_for_ever() -> None:
    layout = compile_layout([], [view(n=Count(), m=Count(window="1s"))])
    assert not layout.too_late("first", np.array([0]), np.array([NOW])).any()
    assert not compile_layout([FIRST], []).too_late("first", np.array([0]), np.array([NOW])).any()


# -- known


def test_an_entity_is_known_by_its_longest_window_or_ttl() -> None:
    # A ttl a little longer than a window, whose oldest tile begins before the ttl does.
    declared = view(n=Count(window="60s"), last=Last("v", ttl="60500ms"))
    shard = shard_of([declared], [event(NOW)])
    for as_of, knows in (
        (NOW + 60_500, True),
        (NOW + 60_501, True),
        (NOW + 60_999, True),
        (NOW + 61_000, False),
    ):
        answer = ask(shard, declared, [1], as_of)
        assert answer.known.tolist() == [[knows]]
        assert oracle.known(declared, [event(NOW)], (1,), as_of) is knows
        assert answer.values[0, 0] == knows


# -- order


@given(
    st.lists(
        st.tuples(st.sampled_from((0, 0, 1, 59_999, 60_000, HOUR, -HOUR)), st.sampled_from((1.0, 2.0, -0.5, None))),
        min_size=1,
        max_size=30,
    ),
    st.randoms(),
)
def test_the_order_of_events_changes_only_sums_and_ties(events: list[tuple[int, float | None]], random: Any) -> None:
    declared = view(n=Count(window="24h"), lo=Min("v", window="24h"), hi=Max("v", window="24h"), since=SecondsSince())
    log = [event(NOW + at, NOW, v=v) for at, v in events]
    shuffled = random.sample(log, len(log))
    as_of = NOW + HOUR
    np.testing.assert_equal(
        read(shard_of([declared], log), declared, 1, as_of),
        read(shard_of([declared], shuffled), declared, 1, as_of),
    )


def test_of_two_values_at_one_millisecond_the_one_applied_later_is_the_last() -> None:
    declared = view(in_window=Last("v", window="1h"), ever=Last("v"), ttl=Last("v", ttl="1d"))
    same = [event(NOW, v=1.0), event(NOW, v=2.0), event(NOW, v=None), event(NOW - 1, v=3.0)]
    assert set(read(shard_of([declared], same), declared, 1, NOW).values()) == {2.0}
    assert set(read(shard_of([declared], [same[1], same[0], *same[2:]]), declared, 1, NOW).values()) == {1.0}


def test_windows_merge_their_tiles_oldest_first() -> None:
    # In this order 1e16 swallows each 1.0; in the other the ones would have added up first.
    declared = view(total=Sum("v", window="1h"), mean=Mean("v", window="1h"))
    ones = [event(NOW + 60_000 * (i + 1), NOW + HOUR // 2, v=1.0) for i in range(4)]
    first = event(NOW, NOW + HOUR // 2, v=1e16)
    assert read(shard_of([declared], [*ones, first]), declared, 1, NOW + HOUR // 2) == {
        "total": 1e16,
        "mean": 2e15,
    }


# -- growth


def test_one_slot_holds_many_entities_and_finds_each() -> None:
    declared = view(n=Count(window="24h"), last=Last("i"))
    n = 20_000
    log = [event(NOW + u % 7, NOW + 10, user=u, i=u) for u in range(n)]
    shard = Shard(compile_layout([], [declared]), ShardMap.even(1, 1), 0)
    for start in range(0, n, 7_001):
        piece = log[start : start + 7_001]
        shard.apply("first", batch(FIRST, piece), np.full(len(piece), NOW + 10), NOW + 10)
    values = ask(shard, declared, list(range(n + 5)), NOW + 10).values
    np.testing.assert_array_equal(values[:n, 1], np.arange(n))
    np.testing.assert_array_equal(values[:, 0], [1] * n + [0] * 5)
    assert shard.status().entities == {"first[user]": n}
    assert shard.check() == []


def test_an_entity_holds_the_tiles_of_its_window_and_takes_none_that_no_read_can_see() -> None:
    declared = view(n=Count(window="49999ms"), total=Sum("i", window="49999ms"), ever=Count())
    width, tiles = 500, 200  # 49,999 ms are the most tiles of 500 ms but one
    log = [event(NOW + i * width, NOW, i=i) for i in range(tiles)]
    np.random.default_rng(7).shuffle(log)  # type: ignore[arg-type]
    shard = shard_of([declared], log)
    assert 100 <= shard.status().tiles <= 102  # half of them lie before the window of the newest event
    as_of = NOW + tiles * width - 1
    assert read(shard, declared, 1, as_of) == oracle.features(declared, log, (1,), as_of)
    assert read(shard, declared, 1, as_of)["n"] == 100


@given(st.lists(st.integers(-3, 3), max_size=60), st.integers(0, 2**64 - 1))
def test_entities_whose_places_collide_are_told_apart(users: list[int], seed: int) -> None:
    declared = view(n=Count())
    layout = compile_layout([], [declared])
    memory = Memory.create(None, 1 << 24)
    store = TileStore(layout, 1, memory, seed)
    # All low halves alike: every key falls on one place of the index.
    hashes = np.array([(5, u) for u in users], np.int64).reshape(-1, 2)
    n, nows = len(users), np.full(len(users), NOW)
    store.apply(layout.tables[0], np.arange(n), hashes, nows, nows, np.empty((0, n)), np.ones((1, n), np.bool_), 0)
    assert store.entities(layout.tables[0]) == len(set(users))
    assert store.check() == []
    reader = MemoryReader(ShardMap.even(1, 1), [0])
    reader.attach(0, memory)
    answer = reader.read(Question(layout.plan_program(list(declared)), hashes[np.newaxis], nows, False, None))
    assert answer.values[:, 0].tolist() == [users.count(u) for u in users]


# -- the shard


def test_a_shard_keeps_only_the_slots_it_owns() -> None:
    declared = view(n=Count())
    layout, shard_map = compile_layout([], [declared]), ShardMap((0, 1, 1, 0))
    log = [event(NOW, user=u) for u in range(100)]
    shards = [Shard(layout, shard_map, i) for i in range(2)]
    for shard in shards:
        shard.apply("first", batch(FIRST, log), np.full(100, NOW), NOW)
        assert shard.check() == []
        rows = shard._store._headers(layout.tables[0])[:, H_ROWS]
        assert {shard_map.owners[slot] for slot in np.flatnonzero(rows)} == {shard.number}
    assert sum(s.status().entities["first[user]"] for s in shards) == 100


def test_an_event_for_which_a_condition_cannot_be_computed_does_not_satisfy_it() -> None:
    """Who sends one is refused; what is here is in the log, from before the condition was declared."""
    declared = FeatureView(
        "v", owner="tests", source=source("first", "id"), key=["user"],
        features={"n": Count(), "large": Count(where=(large := pc.field("i") / pc.field("small") > 0)),
                  "row": Streak(of=large), "before": Sum("i")},
    )  # fmt: skip
    shard = Shard(compile_layout([], [declared]), ShardMap.even(1, 1), 0)
    events = [event(NOW + n, id=f"{n}", small=small) for n, small in enumerate([1, 0, 1, 1])]
    shard.apply("first", batch(FIRST, events), np.array([NOW] * 4), NOW)
    got = read(shard, declared, 1, NOW + 3)
    assert (got["n"], got["large"], got["row"]) == (4, 3, 2)
    assert all(oracle.agrees(declared, name, events, (1,), NOW + 3, value) for name, value in got.items())
    with pytest.raises(pa.ArrowInvalid, match="No match for FieldRef"):
        holds(large, batch(FIRST, events).select(["i"]))


def test_admit_judges_by_id_and_content() -> None:
    shard = Shard(compile_layout([FIRST, source("second", None)], []), ShardMap.even(4, 1), 0)
    ids = hash_columns([pa.array(["a", "b", "a", "b"])], 4)
    contents = np.array([1, 2, 1, 3], np.int64)
    assert shard.admit("first", ids, contents, NOW).tolist() == [NEW, NEW, DUPLICATE, 2]
    assert shard.admit("second", ids[:1], contents[:1], NOW).tolist() == [NEW], "ids are of a source"


def test_conditions_are_judged_in_the_order_of_the_batch_however_large_it_is() -> None:
    declared = view(n=Count(where=pc.field("i") == 1), total=Sum("i", where=pc.field("flag")))
    n = 200_000
    users = np.arange(n) % 1000
    ones = (np.arange(n) * 7919 % 13 == 0).astype(np.int64)
    columns = {name: [_EVENT[name]] * n for name in FIRST.fields} | {
        "user": users,
        "i": ones,
        "flag": ones == 1,
    }
    whole = pa.record_batch([pa.array(columns[f.name], f.type) for f in FIRST.schema], schema=FIRST.schema)
    shard = Shard(compile_layout([], [declared]), ShardMap.even(8, 1), 0)
    shard.apply("first", whole, np.full(n, NOW), NOW)
    want = np.bincount(users, weights=ones)
    values = ask(shard, declared, list(range(1000)), NOW).values
    np.testing.assert_array_equal(values, np.column_stack([want, want]))


# -- ids and memory

WITH_IDS = source("first", "id")


def counted(**limits: Any) -> tuple[Shard, FeatureView]:
    declared = FeatureView("v", owner="tests", source=WITH_IDS, key=["user"], features={"n": Count()})
    return Shard(compile_layout([], [declared]), ShardMap.even(4, 1), 0, **limits), declared


def sent(numbers: range, received_ms: int, *, ids_given: bool = True) -> Events:
    records = batch(WITH_IDS, [event(NOW, id=f"e{n}") for n in numbers])
    n = len(numbers)
    ids = hash_columns([records.column("id")], n)
    contents = hash_columns(records.columns, n)[:, 0].view(np.int64)
    return Events("first", records, ids, contents, ids_given, np.full(n, NOW), received_ms)


def state(shard: Shard) -> list[tuple[Any, list[Any]]]:
    """What a snapshot has; ids in any order."""
    return [
        (
            chunk.header,
            sorted(chunk.words.reshape(-1, 4).tolist()) if isinstance(chunk.header, Ids) else list(chunk.words),
        )
        for chunk in shard_chunks(shard, cluster_id="c", epoch=1, begin=0)
    ]


def test_without_ids_events_take_no_memory_for_them() -> None:
    shard, declared = counted(dedupe_bytes_max=0)
    for _ in range(2):
        assert set(shard.ingest(sent(range(100), NOW, ids_given=False)).verdicts.tolist()) == {NEW}
    assert read(shard, declared, 1, NOW) == {"n": 200}
    assert (shard.status().filter_bytes, shard.status().ids) == (0, 0)
    with pytest.raises(DedupeFull):
        shard.ingest(sent(range(1), NOW))


@pytest.mark.parametrize("prepare", [Shard.prepare_ingest, lambda shard, events: shard.prepare_offer(b"r", events)])
def test_a_request_for_whose_ids_there_is_no_memory_changes_nothing(prepare: Callable[[Shard, Events], object]) -> None:
    shard, declared = counted(dedupe_bytes_max=1 << 14)
    shard.ingest(sent(range(100), NOW))
    before, status = state(shard), shard.status()
    assert (status.ids, status.dedupe_horizon_ms, status.dedupe_held_ms) == (100, 86_400_000, 86_400_000)
    for _ in range(3):
        with pytest.raises(DedupeFull):
            prepare(shard, sent(range(50, 1_000), NOW))
        assert state(shard) == before
        assert shard.status().filter_bytes <= 1 << 14
    assert (shard.next_offset, shard.offers, list(shard.deliveries.owed)) == (1, [], [])
    assert set(shard.ingest(sent(range(100), NOW)).verdicts.tolist()) == {DUPLICATE}
    assert set(shard.ingest(sent(range(100, 110), NOW)).verdicts.tolist()) == {NEW}
    assert read(shard, declared, 1, NOW) == {"n": 110}


def test_what_was_held_is_held_after_a_recovery_by_snapshot_or_log(tmp_path: Path) -> None:
    limits = {"dedupe_bytes_max": 1 << 14, "dedupe_horizon_ms_min": 10_000}
    live, _ = counted(**limits)
    records: list[EventsRecord] = []
    for step in range(80):
        prepared = live.prepare_ingest(sent(range(step * 10, step * 10 + 10), NOW + step * 1_000))
        live.commit(prepared)
        assert isinstance(prepared.record, EventsRecord)
        records.append(prepared.record)
        if step == 60:
            path = write_snapshot(tmp_path, shard_chunks(live, cluster_id="c", epoch=1, begin=61))
    now, held_ms = NOW + 79_000, live.status().dedupe_held_ms
    assert 10_000 < held_ms < 70_000
    for snapshot in (True, False):
        again, declared = counted(**limits)
        begin = load_shard(again, path, cluster_id="c").begin if snapshot else 0
        for offset in range(begin, len(records)):
            again.replay_events(records[offset], offset)
        status = again.status()
        assert 10_000 <= status.dedupe_held_ms < 70_000
        first = -(-(79_000 - status.dedupe_held_ms) // 1_000) * 10  # the first id that was received within that
        assert set(again.ingest(sent(range(first, 800), now)).verdicts.tolist()) == {DUPLICATE}
        assert read(again, declared, 1, now) == {"n": 800}
        # With hardly any memory at all it is nevertheless what must be.
        small, declared = counted(dedupe_bytes_max=1, dedupe_horizon_ms_min=10_000)
        begin = load_shard(small, path, cluster_id="c").begin if snapshot else 0
        for offset in range(begin, len(records)):
            small.replay_events(records[offset], offset)
        assert small.status().dedupe_held_ms >= 10_000
        assert set(small.ingest(sent(range(690, 800), now)).verdicts.tolist()) == {DUPLICATE}
        with pytest.raises(DedupeFull):
            small.ingest(sent(range(1_000, 1_500), now))


def test_an_id_that_comes_by_a_clock_that_is_behind_is_remembered_as_long_as_others() -> None:
    shard, declared = counted(dedupe_horizon_ms=10_000)
    shard.ingest(sent(range(1), NOW))
    prepared = shard.prepare_ingest(sent(range(1, 2), NOW - 60_000))
    shard.commit(prepared)
    assert isinstance(prepared.record, EventsRecord)
    assert prepared.record.received_ms == NOW
    assert shard.ingest(sent(range(1, 2), NOW + 10_000)).verdicts.tolist() == [DUPLICATE]
    assert read(shard, declared, 1, NOW + 10_000) == {"n": 2}


# -- the point-in-time join


def _known(layout: Layout, name: str, log: list[dict[str, Any]], start: int, end: int) -> PastEvents:
    events = [e for e in log if start <= e["at"] < end]
    times = np.array([e["at"] for e in events], np.int64)
    routes = np.full(len(events), (1 << len(layout.tables_of(name))) - 1, np.uint32)
    return PastEvents(batch(layout.sources[name], events), times, times, routes)


@given(world=worlds(events_max=60), data=st.data())
def test_a_join_sees_what_had_happened_by_each_as_of(world: World, data: st.DataObject) -> None:
    layout = world.layout
    shard = Shard(layout, ShardMap.even(8, 1), 0, dedupe_horizon_ms=10**12)
    logs: dict[str, list[dict[str, Any]]] = {}
    for name, declared in layout.sources.items():
        events = sorted(world.events(name), key=lambda e: e["at"])
        # One event per id, which arrived when it happened.
        logs[name] = [{**e, "arrival_ms": e["at"], "id": f"e{i}", "num": i} for i, e in enumerate(events)]
        assert oracle.distinct(declared, logs[name]) == logs[name]
    events = [e for log in logs.values() for e in log if None not in (e["user"], e["code"])]
    if not events:
        return
    asked = data.draw(
        st.lists(st.tuples(st.sampled_from(events), st.sampled_from((0, -1, 1, HOUR, DAY))), min_size=1, max_size=6)
    )
    asked.sort(key=lambda one: one[0]["at"] + one[1])
    times = [e["at"] + later for e, later in asked]
    plan = ReadPlan(layout, [f for v in world.views for f in v], "test")
    keys = {f: [e[f] for e, _ in asked] for f in plan.key_fields}
    question = plan.question(keys, len(asked), None, np.array(times, np.int64))
    question.clock = np.array(times, np.int64)
    # In one piece or in several, each of what is known from one time to the next.
    ends = sorted(data.draw(st.lists(st.sampled_from(times), max_size=2)))
    answer = Answer.empty(question)
    for start, end in itertools.pairwise([-(2**62), *ends, 2**62]):
        rows_of = np.flatnonzero((question.clock >= start) & (question.clock < end))
        part = question.of_rows(rows_of, question.clock)
        part_answer = Answer.empty(part)
        shard.join(part, {n: _known(layout, n, log, start, end) for n, log in logs.items()}, part_answer)
        answer.values[rows_of], answer.known[rows_of] = part_answer.values, part_answer.known
        for column, texts in part_answer.texts.items():
            answer.texts.setdefault(column, []).extend(texts)
    rows = plan.rows(answer)
    values = plan.named_values(rows)
    for declared in world.views:
        for (one, _), as_of, got, unknown in zip(asked, times, values, rows.unknown, strict=True):
            key = tuple(one[f] for f in declared.key)
            past = [e for e in logs[declared.source.name] if e["at"] <= as_of]
            given = {f.name: got[f.full_name] for f in declared}
            for name, value in given.items():
                agreed = oracle.agrees(declared, name, past, key, as_of, value, given)
                assert agreed, f"{name} {key} as of {as_of}: {value}"
            assert oracle.known(declared, past, key, as_of) == (declared.name not in unknown)
    assert shard.check() == []


# -- check


def _damaged(damage: str) -> list[str]:
    declared = view(n=Count(window="24h"), ever=Count())
    log = [event(NOW + i * HOUR, NOW, user=u) for u in range(8) for i in range(4)]
    shard = shard_of([declared], log, n_slots=2)
    words, halves, table = shard.memory.words, shard.memory.halves, shard._layout.tables[0]
    slot = next(s for s in (table.slots_at(2), table.slots_at(2) + table.slot_words) if words[s + H_ROWS] > 1)
    places = range(words[slot + H_INDEX_AT], words[slot + H_INDEX_AT] + words[slot + H_PLACES])
    place, other = [p for p in places if words[p] != 0][:2]
    row = int(words[place]) & 0xFFFFFFFF
    (tiled,) = (s for s in table.program(2).series if not s[S_LIFETIME])
    ring = 2 * row + int(tiled[S_ROW_AT])
    head = int(halves[ring])
    oldest = int(halves[2 * head + 1])
    if damage == "a row out of the index":
        words[place] = 0
    elif damage == "two rows of one key":
        again = int(words[other]) & 0xFFFFFFFF
        words[again : again + 2] = words[row : row + 2]
    elif damage == "a key overwritten":
        words[row] ^= 1
    elif damage == "a row of another slot":
        words[row + 1] ^= 1
    elif damage == "a tile lost":
        halves[2 * head + 1] = halves[2 * oldest + 1]
    elif damage == "a ring out of order":
        halves[2 * oldest] = halves[2 * head]
    elif damage == "a ring in a circle":
        halves[2 * oldest + 1] = oldest
    elif damage == "a link to nowhere":
        halves[ring] = words[M_USED] + 5
    elif damage == "a row too many":
        words[slot + H_ROWS] += 1
    elif damage == "a writer that died":
        words[slot + H_SEQUENCE] += 1
    return shard.check()


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        ("a row out of the index", "are counted"),
        ("two rows of one key", "1 keys stand in two rows"),
        ("a key overwritten", "is not found by its key"),
        ("a row of another slot", "is of slot"),
        ("a tile lost", "items, 0 of them free; found"),
        ("a ring out of order", "not ascending"),
        ("a ring in a circle", "does not come back to its head"),
        ("a link to nowhere", "does not come back to its head"),
        ("a row too many", "are counted"),
        ("a writer that died", "is half-written"),
    ],
)
def test_check_finds_planted_damage(damage: str, finding: str) -> None:
    assert any(finding in problem for problem in _damaged(damage)), _damaged(damage)


# -- time of the shards


def test_where_time_is_the_newest_arrival_a_later_time_of_another_shard_is_that_time() -> None:
    """As of when events were received, which is today, a replay of long ago would be empty."""
    declared = view(n=Count(window="1h"))
    shard = Shard(compile_layout([], [declared]), ShardMap.even(1, 1), 0)
    shard.apply(FIRST.name, batch(FIRST, [event(NOW)]), np.array([NOW], np.int64), NOW + 50 * 365 * DAY)
    plan = ReadPlan(shard._layout, list(declared), "test")
    question = plan.question({"user": [1]}, 1, None, None)
    assert shard.read(question).as_of.tolist() == [NOW]
    again = shard.read(question.of_rows(np.zeros(1, np.int64), np.array([NOW + 7], np.int64)))
    assert (again.as_of.tolist(), again.values.tolist(), again.known.tolist()) == ([NOW + 7], [[1.0]], [[True]])


def test_a_read_is_not_as_of_before_what_its_shard_has_received() -> None:
    """What has arrived since may have pushed out of sight what the earlier window still covers."""
    declared = view(n=Count(window="1h"))
    shard = Shard(compile_layout([], [declared]), ShardMap.even(1, 1), 0)
    shard.apply(FIRST.name, batch(FIRST, [event(NOW)]), np.array([NOW], np.int64), NOW)
    answer = ask(shard, declared, [1], NOW - 500)
    assert (answer.as_of.tolist(), answer.values.tolist()) == ([NOW], [[1.0]])


def test_where_there_is_no_clock_yet_exact_features_can_be_asked_as_of_any_time() -> None:
    counted = view(n=Count(window="1h", exact=True))
    shard = shard_of([counted], [])
    plan = ReadPlan(compile_layout([], [counted]), list(counted), "the test")
    answer = shard.read(plan.question({"user": [1]}, 1, None, np.array([5])))
    assert (answer.values.tolist(), answer.as_of.tolist(), answer.known.tolist()) == ([[0.0]], [5], [[False]])
