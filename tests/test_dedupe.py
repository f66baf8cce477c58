"""An id is a duplicate if received at most a horizon before the newest request, and not before what memory allows."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.feature_actors import dedupe
from millpond.feature_actors.dedupe import CONFLICT, DUPLICATE, NEW, DedupeFull, IdFilter, IdMemory

HORIZON = 100
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 30),  # which id
        st.integers(0, 2),  # slot
        st.integers(0, 1),  # content
        st.sampled_from((0, 0, 0, 1, 7, 50, 99, 100, 101, -30, -99, -100, -101, 1000)),  # stamps go on, and back
    ),
    max_size=250,
)


def filter_of(n_slots: int, seed: int = 0) -> IdFilter:
    return IdFilter(IdMemory(HORIZON, n_slots=n_slots, seed=seed), n_slots)


def ids_of(numbers: list[int]) -> np.ndarray:
    # Few distinct low halves: the places of the table collide, and the high half has to tell ids apart.
    return np.array([(n % 3, n) for n in numbers], np.int64).reshape(-1, 2)


def admit(
    seen: IdFilter, numbers: list[int], contents: list[int], stamps: list[int], slots: list[int] | None = None
) -> list[int]:
    """Send the ids in requests: neighbours with one stamp travel together."""
    verdicts = np.full(len(numbers), 9, np.uint8)
    of_slots = np.array(slots or [0] * len(numbers), np.int64)
    for stamp, run in groupby(range(len(numbers)), key=stamps.__getitem__):
        rows = np.array(list(run))
        seen.admit(rows, of_slots, ids_of(numbers), np.array(contents, np.int64), stamp, verdicts)
    return verdicts.tolist()  # type: ignore[no-any-return]


@given(
    events=EVENTS,
    cut=st.integers(0, 250),
    start=st.sampled_from((0, -5_000, 1_700_000_000_000)),
    seed=st.integers(0, 2**64 - 1),
)
def test_verdicts_are_those_of_a_dict_that_forgets_nothing(
    events: list[tuple[int, int, int, int]], cut: int, start: int, seed: int
) -> None:
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    stamp = newest = start
    stamps, want = [], []
    for number, slot, content, step in events:
        stamp += step
        newest = max(newest, stamp) if stamps else stamp
        stamps.append(stamp)
        if (slot, number) in seen and seen[slot, number][0] >= newest - HORIZON:
            want.append(DUPLICATE if seen[slot, number][1] == content else CONFLICT)
        else:
            seen[slot, number] = (stamp, content)
            want.append(NEW)
    numbers, slots, contents = ([e[k] for e in events] for k in range(3))
    one = filter_of(3, seed)
    got = admit(one, numbers[:cut], contents[:cut], stamps[:cut], slots[:cut])
    assert got + admit(one, numbers[cut:], contents[cut:], stamps[cut:], slots[cut:]) == want


def test_the_horizon_is_inclusive() -> None:
    seen = filter_of(1)
    assert admit(seen, [1, 1], [0, 0], [0, 100]) == [NEW, DUPLICATE]
    assert admit(seen, [1, 1], [0, 0], [101, 101]) == [NEW, DUPLICATE]


def test_another_event_moves_the_horizon_and_an_older_stamp_never_moves_it_back() -> None:
    seen = filter_of(1)
    assert admit(seen, [1, 2, 1], [0, 0, 0], [0, 101, 0]) == [NEW, NEW, NEW]


def test_a_duplicate_does_not_keep_its_id_alive() -> None:
    seen = filter_of(1)
    assert admit(seen, [1, 1, 1], [0, 0, 0], [0, 90, 110]) == [NEW, DUPLICATE, NEW]


def test_a_conflict_keeps_the_first_content() -> None:
    seen = filter_of(1)
    assert admit(seen, [1, 1, 1, 1], [5, 6, 5, 6], [0, 0, 0, 0]) == [NEW, CONFLICT, DUPLICATE, CONFLICT]


def test_growth_keeps_every_id_within_the_horizon() -> None:
    seen = filter_of(1)
    many = list(range(5_000))
    assert set(admit(seen, many, many, [0] * 5_000)) == {NEW}
    assert set(admit(seen, many, many, [HORIZON] * 5_000)) == {DUPLICATE}


def test_growth_keeps_an_id_that_is_just_within_the_horizon() -> None:
    seen = filter_of(1)
    many = list(range(1, 100))
    assert admit(seen, [0], [0], [0]) == [NEW]
    assert set(admit(seen, many, many, [HORIZON] * 99)) == {NEW}
    assert admit(seen, [0], [0], [HORIZON]) == [DUPLICATE]


def test_what_is_older_than_the_horizon_takes_no_room() -> None:
    seen = filter_of(1)
    for day in range(50):
        admit(seen, list(range(day * 1000, day * 1000 + 1000)), [0] * 1000, [day * 1000] * 1000)
    once = filter_of(1)
    admit(once, list(range(1000)), [0] * 1000, [0] * 1000)
    assert seen.memory.allocated_bytes <= 4 * once.memory.allocated_bytes


def test_only_the_rows_asked_for_are_judged() -> None:
    seen = filter_of(1)
    verdicts = np.full(4, 9, np.uint8)
    seen.admit(np.array([2, 0]), np.zeros(4, np.int64), ids_of([1, 2, 1, 2]), np.zeros(4, np.int64), 0, verdicts)
    assert verdicts.tolist() == [DUPLICATE, 9, NEW, 9]


def test_a_slot_knows_nothing_of_another_and_grows_by_itself() -> None:
    seen = filter_of(4)
    many = list(range(1_000))
    assert set(admit(seen, many, many, [0] * 1_000, [2] * 1_000)) == {NEW}
    alone = seen.memory.allocated_bytes
    assert admit(seen, [7, 7, 7], [7, 7, 7], [0, 0, 0], [1, 2, 1]) == [NEW, DUPLICATE, DUPLICATE]
    assert seen.memory.allocated_bytes - alone < alone / 50


# -- images


@given(
    events=EVENTS,
    first=st.integers(0, 250),
    steps=st.lists(st.integers(0, 20), min_size=1, max_size=20),
    seeds=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    later=st.sampled_from((0, HORIZON - 8, HORIZON - 1, HORIZON, HORIZON + 1)),
)
def test_a_filter_loaded_from_an_image_and_told_the_rest_gives_the_same_verdicts(
    events: list[tuple[int, int, int, int]], first: int, steps: list[int], seeds: tuple[int, int], later: int
) -> None:
    """The image is taken step by step while ids come; those that have come since its first step come again."""
    numbers, slots, contents = ([e[k] for e in events] for k in range(3))
    stamps = np.cumsum([abs(e[3]) for e in events]).tolist()
    live, loaded = filter_of(3, seeds[0]), filter_of(3, seeds[1])
    first = at = min(first, len(events))
    admit(live, numbers[:first], contents[:first], stamps[:first], slots[:first])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedupe, "_IMAGE_ENTRIES_MAX", 5)
        image = live.image()
        for number in range(1_000):
            if (step := next(image, None)) is None:
                break
            loaded.load(*step, live.memory.newest_ms)
            loaded.load(*step, live.memory.newest_ms)  # which changes nothing
            end = at + steps[number % len(steps)]
            admit(live, numbers[at:end], contents[at:end], stamps[at:end], slots[at:end])
            at = min(end, len(events))
    admit(loaded, numbers[first:at], contents[first:at], stamps[first:at], slots[first:at])
    now = stamps[at - 1] if at else 0
    ids, of_slots = list(range(31)) * 3, [slot for slot in range(3) for _ in range(31)]
    asked = [admit(one, ids, [0] * 93, [now + later] * 93, of_slots) for one in (live, loaded)]
    assert asked[0] == asked[1]
    assert loaded.memory.allocated_bytes <= 4 * live.memory.allocated_bytes


def test_an_image_has_nothing_of_what_was_taken_back_or_is_too_old() -> None:
    seen = filter_of(1)
    admit(seen, [1, 2], [0, 0], [0, 50])
    ids, slots = ids_of([3, 4]), np.zeros(2, np.int64)
    seen.admit(np.arange(2), slots, ids, slots, HORIZON + 20, np.zeros(2, np.uint8))
    seen.forget(np.array([1]), slots, ids)
    (slot, image), (_, last) = seen.image()
    assert (slot, sorted(image[:, 1].tolist()), len(last)) == (0, [2, 3], 0)


def test_an_image_makes_tables_small_that_a_burst_has_made_large() -> None:
    seen = filter_of(3)
    many = list(range(30_000))
    admit(seen, many, many, [0] * len(many), [n % 2 for n in many])
    admit(seen, [1, 2], [7, 7], [HORIZON, HORIZON], [0, 2])
    burst = seen.memory.allocated_bytes
    assert burst > 30_000 * 32
    list(seen.image())  # the burst is not too old yet
    assert seen.memory.allocated_bytes == burst
    assert admit(seen, [1, 3, 4], [7, 7, 7], [HORIZON + 1] * 3, [0, 2, 2]) == [DUPLICATE, NEW, NEW]
    list(seen.image())
    assert seen.memory.allocated_bytes <= 3 * 2 * 16 * 32
    check(seen.memory)
    ids, slots = [1, 2, 3, 4, 1, 9], [0, 2, 2, 2, 1, 1]
    assert admit(seen, ids, [7] * 6, [HORIZON + 1] * 6, slots) == [DUPLICATE] * 4 + [NEW, NEW]


def test_what_is_too_old_is_passed_over_in_steps_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedupe, "_IMAGE_ENTRIES_MAX", 64)
    seen = filter_of(3)
    many = list(range(2_000))
    admit(seen, many, many, [0] * 2_000, [n % 3 for n in many])
    admit(seen, [1], [7], [2 * HORIZON], [1])
    entries = sum(map(len, seen.memory.tables.values()))
    steps = list(seen.image())
    assert len(steps) >= entries // (2 * 64)
    assert [(slot, some[:, 1].tolist()) for slot, some in steps if len(some)] == [(1, [1])]


# -- limited memory

#: A table of 16 entries, the smallest.
TABLE = 16 * 32
ENTRY = tuple[int, int, int, int, int]  # slot, two halves of the id's hash, when it was received, content


def held(of: Iterable[IdFilter]) -> list[set[ENTRY]]:
    """What filters remember, by their images."""
    return [{(slot, *entry) for slot, some in one.image() for entry in some.tolist()} for one in of]


def check(memory: IdMemory) -> None:
    assert memory.allocated_bytes == sum(entries.nbytes for entries in memory.tables.values())
    for table, entries in memory.tables.items():
        assert memory.directory[table].tolist()[:2] == [entries.ctypes.data, len(entries)]
        assert memory.directory[table, 2] == np.count_nonzero(entries[:, 2] != np.iinfo(np.int64).min)
        assert memory.directory[table, 2] < len(entries)
    assert sorted(memory.tables) == np.flatnonzero(memory.directory[:, 1]).tolist()


def send(seen: IdFilter, numbers: Iterable[int], received_ms: int, slot: int = 0, content: int = 0) -> list[int]:
    """Send ids in one request."""
    ids = ids_of(list(numbers))
    verdicts, n = np.full(len(ids), 9, np.uint8), len(ids)
    seen.admit(np.arange(n), np.full(n, slot), ids, np.full(n, content), received_ms, verdicts)
    return verdicts.tolist()  # type: ignore[no-any-return]


@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 1),  # which filter
            st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=40),
            st.sampled_from((0, 1, 1, 2, 5, 40, 120, -3)),
        ),
        max_size=40,
    ),
    tables=st.integers(1, 40),
    least=st.sampled_from((0, 1, 20, 100)),
    alone=st.booleans(),
)
def test_with_little_memory_verdicts_are_those_of_a_dict_with_the_same_cutoff(
    requests: list[tuple[int, list[tuple[int, int, int]], int]], tables: int, least: int, alone: bool
) -> None:
    """alone: each id is a request of its own, so that there is a cutoff before it."""
    memory = IdMemory(HORIZON, horizon_ms_min=least, bytes_max=tables * TABLE, n_slots=3, seed=5)
    filters = [IdFilter(memory, 3), IdFilter(memory, 3)]
    seen: dict[tuple[int, int, int], tuple[int, int]] = {}
    now, newest = 0, -(10**9)
    for which, whole, step in requests:
        now += step
        for events in [[event] for event in whole] if alone else [whole]:
            newest, before = max(newest, now), memory.cutoff_ms
            verdicts = np.full(len(events), 9, np.uint8)
            numbers, slots, contents = (np.array([e[k] for e in events]) for k in range(3))
            was = held(filters)
            try:
                filters[which].admit(np.arange(len(events)), slots, ids_of(numbers.tolist()), contents, now, verdicts)
            except DedupeFull:
                young = [at for at, _ in seen.values() if at >= memory.oldest_ms]
                assert sum(at < newest - least for at in young) * 16 < len(young) or not young
                kept = [{e for e in one if e[3] >= memory.oldest_ms} for one in was]
                assert held(filters) == kept, "as if it had not come"
            else:
                for (number, slot, content), verdict in zip(events, verdicts.tolist(), strict=True):
                    at, first = seen.get((which, slot, number), (-(10**9), 0))
                    oldest = max(newest - HORIZON, before)
                    young = DUPLICATE if first == content else CONFLICT
                    # Within a request the cutoff may have moved on before this id was judged.
                    maybe = {young if at >= oldest else NEW, young if at >= memory.oldest_ms else NEW}
                    assert verdict in (maybe if not alone else {young if at >= oldest else NEW})
                    if verdict == NEW:
                        seen[which, slot, number] = now, content
            assert before <= memory.cutoff_ms <= max(newest - least, before)
            assert memory.held_ms >= min(least, HORIZON)
            assert memory.allocated_bytes <= memory.bytes_max  # type: ignore[operator]
            check(memory)
    want = {(which, slot, number) for (which, slot, number), (at, _) in seen.items() if at >= memory.oldest_ms}
    assert {(which, e[0], e[2]) for which, one in enumerate(held(filters)) for e in one} == want


def test_the_horizon_shown_is_held_and_nothing_outside_it() -> None:
    memory = IdMemory(10_000, bytes_max=64 * TABLE, n_slots=4)
    seen, now = IdFilter(memory, 4), 0
    while memory.held_ms == 10_000:
        now += 1
        assert send(seen, [now], now, now % 4) == [NEW]
    oldest = memory.newest_ms - memory.held_ms
    assert 0 < oldest < now / 2, "about a quarter is forgotten at once, not all"
    for number in range(oldest, now + 1):
        assert send(seen, [number], now, number % 4) == [DUPLICATE]
    (alone,) = (set(range(now)) - {e[2] for e in held([seen])[0]},)
    assert alone == set(range(oldest)), "and the rest is new, were it to come"
    assert send(seen, [oldest - 1], now, (oldest - 1) % 4) == [NEW]


def test_the_horizon_held_grows_back_as_time_passes() -> None:
    memory = IdMemory(10_000, bytes_max=4 * TABLE, seed=1)
    seen = IdFilter(memory, 1)
    for now in range(200):
        send(seen, [now], now)
    short = memory.held_ms
    assert short < 200
    send(seen, [1_000], 5_000)
    assert memory.held_ms == 5_000 - 199 + short
    send(seen, [1_001], 20_000)
    assert memory.held_ms == 10_000


def test_below_the_least_horizon_a_request_is_refused_as_if_it_had_not_come() -> None:
    memory = IdMemory(86_400_000, horizon_ms_min=3_600_000, bytes_max=4 * TABLE, shard=3)
    seen = IdFilter(memory, 1)
    assert set(send(seen, range(30), 0)) == {NEW}
    was, bytes_before = held([seen]), memory.allocated_bytes
    with pytest.raises(DedupeFull) as caught:
        send(seen, range(20, 200), 1_800_000)
    assert (caught.value.code, caught.value.status, caught.value.retry_after_ms) == ("dedupe_full", 429, 60_000)
    assert str(caught.value) == (
        "event ids of shard 3: those of the last 86,400.000 s fill 1,984 bytes; allowed are 2,048 (`dedupe_mb_max`), "
        "and ids of the last 3,600.000 s (`dedupe_horizon_min`) are never forgotten; send again later, or raise "
        "`dedupe_mb_max`"
    )
    assert held([seen]) == was
    assert bytes_before <= memory.allocated_bytes <= 4 * TABLE
    assert set(send(seen, range(30), 1_800_000)) == {DUPLICATE}, "which takes no memory"
    assert set(send(seen, range(30), 1_800_000, content=1)) == {CONFLICT}
    with pytest.raises(DedupeFull) as caught:
        send(seen, range(100, 200), 3_598_000)
    assert caught.value.retry_after_ms == 2_001
    assert set(send(seen, range(100, 120), 3_600_001)) == {NEW}, "the first ones are older now than must be"
    assert memory.held_ms == 3_600_000
    assert held([seen]) == [{(0, *ids_of([n])[0].tolist(), 3_600_001, 0) for n in range(100, 120)}]


def test_no_memory_at_all_remembers_nothing() -> None:
    seen = IdFilter(IdMemory(HORIZON, bytes_max=0), 1)
    with pytest.raises(DedupeFull):
        send(seen, [1], 0)
    assert held([seen]) == [set()]


def test_sources_share_the_memory_and_one_that_is_quiet_gives_its_own_back() -> None:
    memory = IdMemory(10_000, bytes_max=1 << 18, n_slots=8)
    quiet, busy = IdFilter(memory, 8), IdFilter(memory, 8)
    now = number = 0
    while memory.held_ms == 10_000:
        now, number = now + 1, number + 8
        for slot in range(8):
            send(quiet, [number + slot], now, slot)
    for _ in range(4):
        now, number = now + 400, number + 4_000
        for slot in range(8):
            assert set(send(busy, range(number + slot * 500, number + slot * 500 + 500), now, slot)) == {NEW}
        check(memory)
    by_busy = sum(e.nbytes for table, e in memory.tables.items() if table >= 8)
    assert by_busy > (1 << 18) * 2 / 3
    assert memory.allocated_bytes <= 1 << 18


def test_each_shrink_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    memory = IdMemory(86_400_000, bytes_max=4 * TABLE, shard=3)
    seen, cutoffs = IdFilter(memory, 1), set[int]()
    with caplog.at_level(logging.WARNING, "millpond.shard"):
        for now in range(300):
            send(seen, [now], now * 1_000)
            cutoffs.add(memory.cutoff_ms)
    assert len(caplog.messages) == len(cutoffs) - 1 > 3
    assert caplog.messages[0].startswith("shard 3 remembers event ids for the last ")
    assert "s now instead of 86,400 s: 2,048 bytes are full; raise `dedupe_mb_max`" in caplog.messages[0]


def test_a_replay_is_never_refused_but_a_request_after_it_is() -> None:
    memory = IdMemory(10_000, horizon_ms_min=1_000, bytes_max=4 * TABLE)
    seen = IdFilter(memory, 1)
    rows = np.arange(500)
    for now in (0, 500, 900):
        seen.remember(rows, rows * 0, ids_of((rows + now * 1_000).tolist()), rows * 0, now)
    assert memory.held_ms == 10_000
    assert memory.allocated_bytes > 1_500 * 32
    for now in (0, 500, 900):
        assert set(send(seen, (rows + now * 1_000).tolist(), 900)) == {DUPLICATE}
    with pytest.raises(DedupeFull):
        send(seen, range(2_000_000, 2_001_000), 900)
    assert send(seen, range(4_000_000, 4_000_020), 1_500) == [NEW] * 20, (
        "in the place of those that are older than must be"
    )
    with pytest.raises(DedupeFull):
        send(seen, range(2_000_000, 2_001_000), 1_500)
    for now in range(2_501, 100_000, 50):  # the ids have grown old, and what took too much is given back
        assert send(seen, [3_000_000 + now], now) == [NEW]
    assert memory.allocated_bytes <= 4 * TABLE
    check(memory)


def test_a_replay_knows_an_id_from_when_it_was_last_new() -> None:
    """It was forgotten for want of memory and came again; in the replay there may be memory enough."""
    seen, row = filter_of(1), np.zeros(1, np.int64)
    for now, content in ((0, 1), (60, 2), (30, 3)):
        seen.remember(row, row, ids_of([7]), np.array([content]), now)
    assert send(seen, [7], 160, content=2) == [DUPLICATE]
    assert send(seen, [7], 161, content=2) == [NEW]


def test_a_slot_of_many_ids_has_many_tables_none_of_them_large() -> None:
    memory = IdMemory(HORIZON, bytes_max=1 << 28)
    assert memory.parts == 64
    assert IdMemory(HORIZON, bytes_max=1 << 30, n_slots=256).parts == 1
    seen, rows = IdFilter(memory, 2), np.arange(50_000)
    ids = np.random.default_rng(3).integers(-(2**63), 2**63 - 1, (50_000, 2))
    verdicts = np.empty(50_000, np.uint8)
    for want in (NEW, DUPLICATE):
        seen.admit(rows, rows % 2, ids, rows, 0, verdicts)
        assert set(verdicts.tolist()) == {want}
    assert len(memory.tables) == 128
    assert memory.directory[:, 2].min() > 50_000 / 128 / 2
    again = IdFilter(IdMemory(HORIZON, bytes_max=1 << 22, seed=9), 2)
    for slot, some in seen.image():
        again.load(slot, some, 0)
    assert held([again]) == held([seen])
    check(memory)
    check(again.memory)


# -- images of what was forgotten


def test_an_image_tells_of_the_cutoff_and_the_filter_loaded_from_it_holds_what_it_shows() -> None:
    memory = IdMemory(10_000, bytes_max=16 * TABLE, n_slots=2)
    seen = IdFilter(memory, 2)
    for now in range(600):
        send(seen, [now], now, now % 2)
    assert 0 < memory.held_ms < 500
    loaded = IdFilter(IdMemory(10_000, bytes_max=16 * TABLE, seed=4, n_slots=2), 2)
    for slot, some in seen.image():
        loaded.load(slot, some, memory.newest_ms, memory.cutoff_ms)
    assert loaded.memory.held_ms == memory.held_ms
    assert held([loaded]) == held([seen])
    empty = IdFilter(IdMemory(10_000), 2)
    for slot, some in IdFilter(memory, 2).image():
        empty.load(slot, some, memory.newest_ms, memory.cutoff_ms)
    assert empty.memory.held_ms == memory.held_ms, "though there is no id that says so"


def test_an_image_has_no_id_of_a_request_that_was_refused_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refused request fills the table that the image is being taken of, which is rebuilt, and forgets its ids in
    the new one."""
    monkeypatch.setattr(dedupe, "_IMAGE_ENTRIES_MAX", 2)
    memory = IdMemory(HORIZON, horizon_ms_min=HORIZON, bytes_max=8 * TABLE)
    seen = IdFilter(memory, 1)
    send(seen, range(8), 0)
    image, entries = seen.image(), set[int]()
    entries.update(next(image)[1][:, 1].tolist())
    first = memory.tables[0]
    with pytest.raises(DedupeFull):
        send(seen, range(100, 300), 0)
    assert memory.tables[0] is not first
    for _, some in image:
        entries.update(some[:, 1].tolist())
    assert entries == set(range(8))


def test_what_is_taken_back_may_be_gone_already() -> None:
    memory = IdMemory(HORIZON, bytes_max=4 * TABLE, n_slots=2)
    seen, rows = IdFilter(memory, 2), np.arange(3)
    send(seen, range(3), 0)
    for now in range(1, 400):
        send(seen, [now + 10], now, 1)
    assert 0 not in memory.tables, "a table without ids takes no room"
    seen.forget(rows, rows * 0, ids_of([0, 1, 2]))
    assert send(seen, [0], 400) == [NEW]
