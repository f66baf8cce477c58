"""The tile store in its memory: growth, reclaim, strings, and readers that nothing they find can harm."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from port_contract import in_files
from worlds import DAY, HOUR, batch, source

from millpond.feature_actors import Count, FeatureView, Last, LastN, Max, SecondsSince, Sum
from millpond.feature_actors.errors import AsOfInPast, Unavailable
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.plan import FeatureRows, Question, ReadPlan
from millpond.feature_actors.ports import complete
from millpond.feature_actors.reader import MemoryRead, SlotBusy, _Busy
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import C_PID, M_LIMIT, Control, Memory, MemoryFull
from millpond.feature_actors.tiles.store import RECLAIM_PLACES_MAX, TileStore
from millpond.feature_actors.tiles.structure import H_SEQUENCE

NOW = 1_700_000_000_000
SOURCE = source("first", "id")
MB = 1 << 20


def view(**features: Any) -> FeatureView:
    return FeatureView("v", owner="tests", source=SOURCE, key=["user"], features=features)


def event(number: int, at: int, **changes: Any) -> dict[str, Any]:
    made = {"id": f"e{number}", "num": number, "at": at, "user": number, "code": "a", "small": 0}
    return {**made, "v": 1.0, "i": 1, "f32": 0.0, "flag": True, **changes}


def shard_of(*views: FeatureView, bytes_max: int = 1 << 28, n_slots: int = 4, **options: Any) -> Shard:
    memory = Memory.create(None, bytes_max)
    return Shard(compile_layout([], views), ShardMap.even(n_slots, 1), 0, memory=memory, **options)


def apply(shard: Shard, events: list[dict[str, Any]], received_ms: int = NOW) -> None:
    shard.apply("first", batch(SOURCE, events), np.array([e["at"] for e in events], np.int64), received_ms)


def ask(of: FeatureView, users: list[int], now: int = NOW, layout: Layout | None = None) -> tuple[ReadPlan, Question]:
    plan = ReadPlan(layout or compile_layout([], [of]), list(of), "the test")
    return plan, plan.question({"user": users}, len(users), now, None)


def read(shard: Shard, of: FeatureView, users: list[int], now: int = NOW) -> FeatureRows:
    plan, question = ask(of, users, now, shard._layout)
    return plan.rows(shard.read(question))


# -- growth


def test_a_memory_grows_with_what_it_holds_and_every_address_stays() -> None:
    declared = view(n=Count(window="1h"), total=Sum("i"))
    shard = shard_of(declared, bytes_max=64 * MB)
    at_first = shard.memory.allocated_bytes
    for start in range(0, 60_000, 5_000):
        apply(shard, [event(u, NOW, i=u) for u in range(start, start + 5_000)])
        assert shard.memory.allocated_bytes == shard.status().tile_bytes <= shard.memory.bytes_max
        np.testing.assert_array_equal(read(shard, declared, [0, start]).matrix, [[1, 0], [1, start]])
    assert at_first < MB < shard.memory.allocated_bytes
    assert shard._store.used_bytes <= shard.memory.limit_words * 8 <= shard.memory.allocated_bytes
    assert shard.check() == []


def test_what_does_not_fit_is_refused_before_anything_is_applied() -> None:
    declared = view(n=Count(window="1h"), code=Last("code"))
    small, large = shard_of(declared, bytes_max=MB), shard_of(declared)
    few = [event(u, NOW) for u in range(100)]
    many = [event(100_000 + u, NOW + 1, user=u, code=f"c{u}") for u in range(50, 50_000)]
    apply(small, few)
    apply(large, few)
    status, used = small.status(), small._store.used_bytes
    for _ in range(2):
        with pytest.raises(MemoryFull, match=r"^tiles: \d+ bytes are in use in `memory of this process`") as caught:
            apply(small, many)
        assert (caught.value.code, caught.value.status, caught.value.retry_after_ms) == ("memory_full", 503, 10_000)
        assert f"allowed are {MB}; raise `memory_" in str(caught.value)
        after = small.status()
        # (The file may have grown for the tables whose turn came first: that is room, not state. And time has moved on
        # to the newest arrival, as of which room was looked for.)
        status = dataclasses.replace(status, tile_bytes=after.tile_bytes, newest_arrival_ms=NOW + 1)
        assert after == status
        assert small._store.used_bytes == used
        assert read(small, declared, [99, 100]).matrix.tolist() == [[1], [0]]
        assert small.check() == []
    # No id was taken for applied: a part that fits is new, here and where there is more room.
    apply(small, many[:60])
    apply(large, many)
    rows = read(small, declared, [99, 100, 200], NOW + 1)
    assert (rows.matrix.tolist(), rows.texts["v.code"]) == ([[2], [1], [0]], ["c99", "c100", None])
    rows = read(large, declared, [49, 99, 49_999], NOW + 1)
    assert (rows.matrix.tolist(), rows.texts["v.code"]) == ([[1], [2], [1]], ["a", "c99", "c49999"])


@pytest.mark.parametrize("texts", [False, True])
def test_wherever_the_limit_lies_a_batch_is_applied_whole_or_not_at_all(texts: bool) -> None:
    declared = view(n=Count(window="1h"), **({"code": Last("code")} if texts else {}))
    full = 0
    for pages in range(120, 400, 14):
        shard = shard_of(declared, bytes_max=pages * 4096)
        applied = 0
        for size in (1_000, 3_000, 10_000, 2_000, 500, 100, 100):
            users = range(applied, applied + size)
            try:
                apply(shard, [event(u, NOW, code=f"code{u}") for u in users])
                applied += size
            except MemoryFull:
                full += 1
            status = shard.status()
            assert (status.events, status.entities) == ({"first[user]": applied},) * 2, pages
        assert shard.check() == []
        assert read(shard, declared, list(range(applied + 1))).matrix[:, 0].tolist() == [1.0] * applied + [0.0]
    assert full > 15


def test_a_memory_that_was_full_takes_events_again_when_what_it_held_is_out_of_sight() -> None:
    declared = view(n=Count(window="1h"), exact=Count(window="1m", exact=True))
    shard = shard_of(declared, bytes_max=4 * MB, n_slots=16)
    number = 0
    with contextlib.suppress(MemoryFull):
        for number in range(0, 1_000_000, 500):
            apply(shard, [event(number + k, NOW) for k in range(500)])
    assert 5_000 < number < 999_500
    with pytest.raises(MemoryFull):
        apply(shard, [event(number + k, NOW + 1) for k in range(500)])
    later = NOW + DAY
    for batch_number in range(20):
        first = number + 500 * batch_number
        apply(shard, [event(first + k, later + batch_number * HOUR) for k in range(500)])
    assert shard.status().entities["first[user]"] < number
    assert shard.check() == []


def test_a_memory_too_small_for_the_slots_is_refused_when_it_is_made() -> None:
    with pytest.raises(MemoryFull):
        shard_of(view(n=Count(window="1h")), bytes_max=64 * 1024, n_slots=4_096)


# -- reclaim


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from((0, 0, 1, 500, 20_000, 70_000))), max_size=120),
    st.integers(0, 2**64 - 1),
)
def test_entities_come_and_go_and_the_others_are_found(steps: list[tuple[int, int]], seed: int) -> None:
    """Every entry taken out of an index closes its gap, whatever the order."""
    window, width, past = 60_000, 1_000, 10_000  # an exact window may be read as of a window ago
    declared = view(n=Count(window="60s"), fine=Max("v", window="10s", exact=True))
    shard = shard_of(declared, n_slots=1, seed=seed, reclaim_margin_ms=0)
    now, seen = NOW, dict[int, int]()
    for number, (user, gap) in enumerate(steps):
        now += gap
        seen[user] = now
        apply(shard, [event(number, now, user=user)], now)
        shard.reclaim()
        assert shard.check() == []
        (kept,) = shard.status().entities.values()
        visible = sum(at >= (now - window) // width * width for at in seen.values())
        assert visible <= kept <= sum(at >= now - window - past - 2 * width for at in seen.values())
        rows = read(shard, declared, [*seen, 99], now)
        assert [u == [] for u in rows.unknown] == [*((now - at) <= window + now % width for at in seen.values()), False]
        assert (rows.matrix[:, 0] > 0).tolist() == [not u for u in rows.unknown]


def test_memory_is_flat_while_short_lived_entities_come_and_go() -> None:
    declared = view(n=Count(window="60s"), fine=Sum("v", window="10s", exact=True), last=Last("v", ttl="60s"))
    shard = shard_of(declared, reclaim_margin_ms=0)
    used, entities = [], []
    for generation in range(800):
        now = NOW + generation * 5_000
        apply(shard, [event(u, now) for u in range(generation * 100, (generation + 1) * 100)], now)
        used.append(shard._store.used_bytes)
        entities.append(sum(shard.status().entities.values()))
    assert max(used[400:]) <= 1.02 * max(used[:400]), "it grows without end"
    assert shard.check() == []
    shard.reclaim()
    # (One with a ttl is kept for twice as long: 120 s are 24 generations.)
    left = sum(shard.status().entities.values())
    assert 2_400 <= left <= 2_600
    assert max(entities) <= 2 * left, "what is out of sight is a fraction of what is in use"
    assert shard.check() == []


def test_a_step_of_reclaim_looks_at_a_bounded_number_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[tuple[int, int]] = []
    whole = TileStore.reclaim

    def spy(self: TileStore, table: Any, places: int) -> int:
        looked.append((places, whole(self, table, places)))
        return looked[-1][1]

    declared = view(n=Count(window="60s"))
    shard = shard_of(declared)
    apply(shard, [event(u, NOW) for u in range(30_000)])
    monkeypatch.setattr(TileStore, "reclaim", spy)
    apply(shard, [event(40_000 + u, NOW + DAY) for u in range(5_000)], NOW + DAY)
    assert sum(freed for _, freed in looked) > 1_000, "all of them are out of sight"
    assert len(looked) == 5, "one step per chunk of events"
    assert all(freed <= places <= RECLAIM_PLACES_MAX for places, freed in looked)


@pytest.mark.parametrize("exact", [False, True])
def test_a_ring_never_has_more_tiles_than_a_window(exact: bool) -> None:
    window, width = 60_000, 1_000
    declared = view(n=Count(window="60s", exact=exact))
    shard = shard_of(declared, n_slots=1)
    most = (2 * window if exact else window) // width + 2  # an exact window may be read as of a window ago
    for second in range(500):
        at = NOW + second * width
        apply(shard, [event(second, at, user=1)], at)
        assert shard.status().tiles <= most * (1 + exact)
        assert read(shard, declared, [1], at).matrix.tolist() == [[min(second + 1, 60 if exact else 61)]]
    assert shard.check() == []


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-200_000, 200_000)), max_size=150))
def test_rings_stay_whole_whatever_the_order_of_events(steps: list[tuple[int, int]]) -> None:
    shard = shard_of(
        view(n=Count(window="60s"), e=Sum("v", window="5s", exact=True), last=LastN("v", window="1h")), n_slots=1
    )
    apply(shard, [event(k, NOW + at, user=user) for k, (user, at) in enumerate(steps)])
    assert shard.check() == []
    shard.reclaim()
    assert shard.check() == []


# -- strings


def test_strings_beyond_the_limit_read_as_none_and_are_counted() -> None:
    declared = view(last=Last("code"), both=LastN("code", n=2))
    shard = shard_of(declared, strings_max=2)
    apply(shard, [event(k, NOW + k, user=k // 2, code=code) for k, code in enumerate(["a", "ü", "日本語🐟", "a", "b"])])
    rows = read(shard, declared, [0, 1, 2, 3], NOW + 9)
    assert rows.texts == {
        "v.last": ["ü", "a", None, None],
        "v.both": [("ü", "a"), ("a", None), (None, None), (None, None)],
    }
    assert rows.unknown == [[], [], [], ["v"]]
    status = shard.status()
    assert (status.strings, status.strings_refused) == (2, 2)


# -- readers of other processes


def started(folder: Path, of: FeatureView, events: list[dict[str, Any]], **options: Any) -> tuple[Shard, MemoryRead]:
    layout, shard_map = compile_layout([], [of]), ShardMap.even(4, 1)
    shard = in_files(folder, layout, shard_map, 0, **options)
    apply(shard, events)
    return shard, MemoryRead(shard_map, folder)


COUNTED = view(n=Count(window="1h"), code=Last("code"))


def test_nobody_else_can_read_the_files(tmp_path: Path) -> None:
    started(tmp_path, COUNTED, [])
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "000.control": 0o600, "000-1.tiles": 0o600,
    }  # fmt: skip


def test_a_file_that_is_there_already_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "000-1.tiles").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        started(tmp_path, COUNTED, [])


def test_a_reader_follows_growth_and_never_writes(tmp_path: Path) -> None:
    shard, port = started(tmp_path, COUNTED, [])
    for start in range(0, 40_000, 10_000):
        apply(shard, [event(u, NOW, code=f"c{u % 10}") for u in range(start, start + 10_000)])
        plan, question = ask(COUNTED, [start, start + 9_999, start + 10_000])
        rows = plan.rows(complete(port.read(question)))
        assert (rows.matrix.tolist(), rows.texts["v.code"]) == ([[1], [1], [0]], ["c0", "c9", None])
    memory, _ = port._reader._memories[0]
    with pytest.raises(ValueError, match="read-only"):
        memory.words[M_LIMIT] = 0


def test_a_shard_that_published_nothing_is_unavailable(tmp_path: Path) -> None:
    message = "^shard 0 of 1 has not published its memory yet; retry$"
    with pytest.raises(Unavailable, match=message):
        MemoryRead(ShardMap.even(4, 1), tmp_path)
    control = Control(tmp_path, 0, writable=True)
    Memory.create(control.tiles_path(1), MB)
    with pytest.raises(Unavailable, match=message):
        MemoryRead(ShardMap.even(4, 1), tmp_path)


def test_a_memory_of_another_layout_is_refused(tmp_path: Path) -> None:
    _, port = started(tmp_path, COUNTED, [event(1, NOW)])
    _, question = ask(view(n=Count(window="2h")), [1])
    with pytest.raises(Unavailable, match="shard 0 of 1 keeps other features than this process reads"):
        complete(port.read(question))
    assert complete(port.read(ask(COUNTED, [1])[1])).known.all()


def test_a_half_written_slot_is_busy_and_the_others_are_read(tmp_path: Path) -> None:
    users = list(range(40))
    shard, port = started(tmp_path, COUNTED, [event(u, NOW) for u in users])
    (table,) = shard._layout.tables
    broken = 2
    shard.memory.words[table.slots_at(4) + broken * table.slot_words + H_SEQUENCE] += 1
    plan, question = ask(COUNTED, users)
    slots = question.hashes[0, :, 1].view(np.uint64) % np.uint64(4)
    whole, torn = ([u for u in users if (slots[u] == broken) == is_torn] for is_torn in (False, True))
    assert whole
    assert torn
    message = "^shard 0 of 1: the slot of an entity is half-written; retry when the shard has recovered$"
    # While its writer lives it may only have no core just now; it is waited for, and not for long.
    for users_asked in (torn[:1], users):
        with pytest.raises(SlotBusy, match=message) as caught:
            asyncio.run(asyncio.wait_for(port.read(ask(COUNTED, users_asked)[1]), 5))
        assert (caught.value.code, caught.value.status, caught.value.retry_after_ms) == ("slot_busy", 503, 1_000)
    assert plan.rows(complete(port.read(ask(COUNTED, whole)[1]))).matrix.tolist() == [[1.0]] * len(whole)
    # Nobody will ever finish what a dead one began.
    Control(tmp_path, 0, writable=True).words[C_PID] = 0
    with pytest.raises(SlotBusy, match=message):
        complete(port.read(ask(COUNTED, torn[:1])[1]))
    assert complete(port.read(ask(COUNTED, whole)[1])).known.all()


def test_a_read_goes_on_when_the_slot_is_whole_again(tmp_path: Path) -> None:
    shard, port = started(tmp_path, COUNTED, [event(u, NOW) for u in range(40)])
    (table,) = shard._layout.tables
    sequence = table.slots_at(4) + H_SEQUENCE

    async def write_meanwhile() -> Any:
        shard.memory.words[sequence] += 1
        reading = asyncio.create_task(port.read(ask(COUNTED, list(range(40)))[1]))
        await asyncio.sleep(0.01)
        assert not reading.done()
        shard.memory.words[sequence] += 1
        return await reading

    answer = asyncio.run(write_meanwhile())
    assert answer.values[:, 0].tolist() == [1.0] * 40
    assert answer.texts == {1: ["a"] * 40}


def test_a_read_that_waits_while_another_one_moves_is_of_one_epoch(tmp_path: Path) -> None:
    """The addresses of its strings would be those of another memory."""
    users = list(range(40))
    shard, port = started(tmp_path, COUNTED, [event(u, NOW, code=f"old{u}") for u in users])
    (table,) = shard._layout.tables
    control = Control(tmp_path, 0, writable=True)
    memory = Memory.create(control.tiles_path(2), 1 << 26)
    successor = Shard(compile_layout([], [COUNTED]), ShardMap.even(4, 1), 0, memory=memory)
    apply(successor, [event(u, NOW, code=f"and new{u}") for u in reversed(users)])

    async def move_meanwhile() -> Any:
        shard.memory.words[table.slots_at(4) + 3 * table.slot_words + H_SEQUENCE] += 1
        reading = asyncio.create_task(port.read(ask(COUNTED, users)[1]))
        await asyncio.sleep(0.01)
        assert not reading.done()
        control.publish(2)
        await port.read(ask(COUNTED, users[:1])[1])
        return await reading

    assert asyncio.run(move_meanwhile()).texts == {1: [f"and new{u}" for u in users]}


def test_a_reader_goes_on_with_a_dead_memory_and_moves_to_the_successors(tmp_path: Path) -> None:
    shard, port = started(tmp_path, COUNTED, [event(1, NOW, code="old")])
    plan, question = ask(COUNTED, [1])

    def answer() -> tuple[Any, Any]:
        rows = plan.rows(complete(port.read(question)))
        return rows.matrix.tolist(), rows.texts["v.code"]

    assert answer() == ([[1]], ["old"])
    control = Control(tmp_path, 0, writable=True)
    control.words[C_PID] = 0
    del shard
    assert not port._reader.writer_lives(0)
    assert answer() == ([[1]], ["old"])
    # Its successor makes its memory anew, and nobody reads from it before it is published.
    memory = Memory.create(control.tiles_path(2), 1 << 26)
    successor = Shard(compile_layout([], [COUNTED]), ShardMap.even(4, 1), 0, memory=memory, seed=99)
    apply(successor, [event(1, NOW, code="new"), event(2, NOW, user=1, code="newer")])
    assert answer() == ([[1]], ["old"])
    control.publish(2)
    assert answer() == ([[2]], ["newer"])
    assert port._reader.writer_lives(0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000-2.tiles", "000.control"]


# -- garbage


def read_garbage(first: int, seeds: int, headers: bool) -> None:
    """Read memories with random words in rows, tiles and indexes, in a process of its own: it may die of it."""
    declared = view(
        n=Count(window="1h"), fine=Sum("v", window="10s", exact=True), recent=LastN("v", n=5, window="24h"),
        last=Last("code"), ttl=Max("v", ttl="1d"), since=SecondsSince(window="7d"),
    )  # fmt: skip
    shard = shard_of(declared, bytes_max=8 * MB)
    users = list(range(50))
    apply(shard, [event(k, NOW + k * 997, user=users[k % 50], code=f"c{k % 7}") for k in range(2_000)])
    words, halves = shard.memory.words, shard.memory.halves
    (table,) = shard._layout.tables
    used = shard._store.used_bytes // 8
    start = table.slots_at(4) + (0 if headers else 4 * table.slot_words)
    good = words[:used].copy()
    _, question = ask(declared, users, NOW + HOUR, shard._layout)
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + seeds):
        random = np.random.default_rng(seed)
        words[:used] = good
        many = int(random.choice([1, 10, 100, 5_000]))
        places = random.integers(start, used, many)
        kind = seed % 4
        if kind == 0:
            words[places] = random.integers(-(2**63), 2**63 - 1, many)
        elif kind == 1:  # addresses that lie in the memory, most of them
            halves[2 * places + random.integers(0, 2, many)] = random.integers(0, used + 100, many)
        elif kind == 2:
            words[places] ^= np.int64(1) << random.integers(0, 63, many)
        else:  # what is elsewhere, as in a row that is half of one and half of another
            words[places] = good[random.integers(start, used, many)]
        try:
            answer = shard.read(question)
        except (Unavailable, AsOfInPast, _Busy) as error:
            outcomes[type(error).__name__] += 1
        else:
            assert answer.values.shape == (50, 10)
            outcomes["read"] += 1
    print(dict(outcomes))  # noqa: T201


@pytest.mark.parametrize("headers", [False, True])
def test_garbage_in_the_memory_never_harms_a_reader(headers: bool) -> None:
    code = f"import test_tiles; test_tiles.read_garbage(0, 400, {headers})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "read" in done.stdout
