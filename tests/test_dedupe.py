"""An id is a duplicate if received at most a horizon before the newest request; purging changes nothing."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.feature_actors import dedupe
from millpond.feature_actors.dedupe import CONFLICT, DUPLICATE, NEW, IdFilter

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
    one = IdFilter(HORIZON, 3, seed)
    got = admit(one, numbers[:cut], contents[:cut], stamps[:cut], slots[:cut])
    assert got + admit(one, numbers[cut:], contents[cut:], stamps[cut:], slots[cut:]) == want


def test_the_horizon_is_inclusive() -> None:
    seen = IdFilter(HORIZON, 1)
    assert admit(seen, [1, 1], [0, 0], [0, 100]) == [NEW, DUPLICATE]
    assert admit(seen, [1, 1], [0, 0], [101, 101]) == [NEW, DUPLICATE]


def test_another_event_moves_the_horizon_and_an_older_stamp_never_moves_it_back() -> None:
    seen = IdFilter(HORIZON, 1)
    assert admit(seen, [1, 2, 1], [0, 0, 0], [0, 101, 0]) == [NEW, NEW, NEW]


def test_a_duplicate_does_not_keep_its_id_alive() -> None:
    seen = IdFilter(HORIZON, 1)
    assert admit(seen, [1, 1, 1], [0, 0, 0], [0, 90, 110]) == [NEW, DUPLICATE, NEW]


def test_a_conflict_keeps_the_first_content() -> None:
    seen = IdFilter(HORIZON, 1)
    assert admit(seen, [1, 1, 1, 1], [5, 6, 5, 6], [0, 0, 0, 0]) == [NEW, CONFLICT, DUPLICATE, CONFLICT]


def test_growth_keeps_every_id_within_the_horizon() -> None:
    seen = IdFilter(HORIZON, 1)
    many = list(range(5_000))
    assert set(admit(seen, many, many, [0] * 5_000)) == {NEW}
    assert set(admit(seen, many, many, [HORIZON] * 5_000)) == {DUPLICATE}


def test_growth_keeps_an_id_that_is_just_within_the_horizon() -> None:
    seen = IdFilter(HORIZON, 1)
    many = list(range(1, 100))
    assert admit(seen, [0], [0], [0]) == [NEW]
    assert set(admit(seen, many, many, [HORIZON] * 99)) == {NEW}
    assert admit(seen, [0], [0], [HORIZON]) == [DUPLICATE]


def test_what_is_older_than_the_horizon_takes_no_room() -> None:
    seen = IdFilter(HORIZON, 1)
    for day in range(50):
        admit(seen, list(range(day * 1000, day * 1000 + 1000)), [0] * 1000, [day * 1000] * 1000)
    once = IdFilter(HORIZON, 1)
    admit(once, list(range(1000)), [0] * 1000, [0] * 1000)
    assert seen.allocated_bytes <= 4 * once.allocated_bytes


def test_only_the_rows_asked_for_are_judged() -> None:
    seen = IdFilter(HORIZON, 1)
    verdicts = np.full(4, 9, np.uint8)
    seen.admit(np.array([2, 0]), np.zeros(4, np.int64), ids_of([1, 2, 1, 2]), np.zeros(4, np.int64), 0, verdicts)
    assert verdicts.tolist() == [DUPLICATE, 9, NEW, 9]


def test_a_slot_knows_nothing_of_another_and_grows_by_itself() -> None:
    seen = IdFilter(HORIZON, 4)
    many = list(range(1_000))
    assert set(admit(seen, many, many, [0] * 1_000, [2] * 1_000)) == {NEW}
    alone = seen.allocated_bytes
    assert admit(seen, [7, 7, 7], [7, 7, 7], [0, 0, 0], [1, 2, 1]) == [NEW, DUPLICATE, DUPLICATE]
    assert seen.allocated_bytes - alone < alone / 50


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
    live, loaded = IdFilter(HORIZON, 3, seeds[0]), IdFilter(HORIZON, 3, seeds[1])
    first = at = min(first, len(events))
    admit(live, numbers[:first], contents[:first], stamps[:first], slots[:first])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedupe, "_IMAGE_ENTRIES_MAX", 5)
        image = live.image()
        for number in range(1_000):
            if (step := next(image, None)) is None:
                break
            loaded.load(*step, live.newest_ms)
            loaded.load(*step, live.newest_ms)  # which changes nothing
            end = at + steps[number % len(steps)]
            admit(live, numbers[at:end], contents[at:end], stamps[at:end], slots[at:end])
            at = min(end, len(events))
    admit(loaded, numbers[first:at], contents[first:at], stamps[first:at], slots[first:at])
    now = stamps[at - 1] if at else 0
    ids, of_slots = list(range(31)) * 3, [slot for slot in range(3) for _ in range(31)]
    asked = [admit(one, ids, [0] * 93, [now + later] * 93, of_slots) for one in (live, loaded)]
    assert asked[0] == asked[1]
    assert loaded.allocated_bytes <= 4 * live.allocated_bytes


def test_an_image_has_nothing_of_what_was_taken_back_or_is_too_old() -> None:
    seen = IdFilter(HORIZON, 1)
    admit(seen, [1, 2], [0, 0], [0, 50])
    ids, slots = ids_of([3, 4]), np.zeros(2, np.int64)
    seen.admit(np.arange(2), slots, ids, slots, HORIZON + 20, np.zeros(2, np.uint8))
    seen.forget(np.array([1]), slots, ids)
    ((slot, image),) = seen.image()
    assert (slot, sorted(image[:, 1].tolist())) == (0, [2, 3])
