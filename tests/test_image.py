"""A snapshot taken while events went on, and the log from its beginning on, are the shard that never stopped."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_vs_oracle import everything
from test_tiles import NOW, SOURCE, apply, event, read, shard_of, view
from worlds import AHEAD_MS_MAX, World, batch, source, worlds

from millpond.feature_actors import Count, FeatureView, First, Last, LastN, Max, Mean, Sum, TopK, dedupe
from millpond.feature_actors.client import FeatureClient, TimeLimits
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.events import Events, Receipt
from millpond.feature_actors.image import ForeignSnapshot, load_shard, shard_chunks
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.log.record import EventsRecord, HomeRecord, OfferRecord, TakeRecord
from millpond.feature_actors.log.snapshot import (
    Chunk,
    Ids,
    Rows,
    ShardHeader,
    SnapshotDamaged,
    StringsHeader,
    write_snapshot,
)
from millpond.feature_actors.ports import LocalRead, complete
from millpond.feature_actors.shard import Prepared, Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles import store, strings
from millpond.feature_actors.tiles.memory import MemoryFull
from millpond.feature_actors.tiles.structure import H_INDEX_AT, H_PLACES

HOUR, DAY = 3_600_000, 86_400_000
Record = EventsRecord | OfferRecord | TakeRecord


class Logged:
    """Shards in this process, each with a log in memory; an ingest port."""

    def __init__(self, layout: Layout, n_slots: int, n_shards: int, seed: int = 0) -> None:
        shard_map, margin = ShardMap.even(n_slots, n_shards), AHEAD_MS_MAX + 60_000
        self.shards = [Shard(layout, shard_map, i, seed=seed, reclaim_margin_ms=margin) for i in range(n_shards)]
        self.logs: list[list[Record]] = [[] for _ in self.shards]
        self.clock = ManualClock(0)
        self.client = FeatureClient(
            layout, shard_map, self, LocalRead(self.shards), self.clock, TimeLimits(ahead_ms_max=AHEAD_MS_MAX)
        )

    async def ingest(self, shard: int, events: Events, settled: Sequence[int]) -> Receipt:
        return self._write(shard, self.shards[shard].prepare_ingest(events))

    async def offer(self, shard: int, request: bytes, events: Events, settled: Sequence[int]) -> Receipt:
        return self._write(shard, self.shards[shard].prepare_offer(request, events))

    async def take(self, shard: int, request: bytes, accepted: Any, homes: Sequence[HomeRecord]) -> None:
        self._write(shard, self.shards[shard].prepare_take(request, accepted, homes))

    async def settle(self, shard: int, settled: Sequence[int], wait_before: int, left: Sequence[int] = ()) -> None:
        pass

    def _write(self, shard: int, prepared: Prepared) -> Receipt:
        offset = len(self.logs[shard])
        if prepared.record is not None:
            self.logs[shard].append(prepared.record)
        return self.shards[shard].commit(prepared, offset)

    def send(self, world: World, number: int) -> Any:
        name, self.clock.ms, events = world.batches[number]
        done = complete(self.client.ingest(name, batch(self.client.layout.source(name), events)))
        if number in world.reclaims:
            for shard in self.shards:
                shard.reclaim()
        return done


def replay(shard: Shard, log: Sequence[Record], begin: int) -> None:
    for offset, record in enumerate(log):
        if offset < begin:
            continue
        if isinstance(record, EventsRecord):
            shard.replay_events(record, offset)
        elif isinstance(record, OfferRecord):
            shard.replay_offer(record, offset)
        else:
            offer = log[record.offer]
            assert isinstance(offer, OfferRecord)
            shard.replay_take(record, offer, offset)


def same_reads(loaded: Logged, live: Logged, world: World) -> None:
    loaded.clock.ms = live.clock.ms
    assert everything(loaded.client, world) == everything(live.client, world)
    assert [s.check() for s in (*loaded.shards, *live.shards)] == [[]] * 2 * len(live.shards)


def same(loaded: Logged, live: Logged, world: World) -> None:
    """Assert that no read tells two clusters apart, nor what they hold when all that is out of sight is gone."""
    same_reads(loaded, live, world)
    for one, other in zip(loaded.shards, live.shards, strict=True):
        one.reclaim()
        other.reclaim()
        a, b = one.status(), other.status()
        assert (a.events, a.entities, a.newest_arrival_ms) == (b.events, b.entities, b.newest_arrival_ms)


@settings(max_examples=15)  # each takes a world, a snapshot and another world
@given(
    world=worlds(),
    n_shards=st.sampled_from([1, 1, 2]),
    sizes=st.sampled_from([(1, 1, 1, 1), (40, 3, 2, 5), (1 << 15, 1 << 13, 4_096, 1 << 15)]),
    begins=st.floats(0, 1),
    pauses=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_snapshot_and_the_log_from_its_beginning_are_the_shard_that_never_stopped(
    world: World, n_shards: int, sizes: tuple[int, int, int, int], begins: float, pauses: list[int], seed: int
) -> None:
    """sizes: of steps. begins: how much of the world comes before; pauses: how many steps are taken between batches."""
    live = Logged(world.layout, world.n_slots, n_shards)
    number = round(begins * len(world.batches))
    for before in range(number):
        live.send(world, before)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for module, name, size in (
            (store, "IMAGE_WORDS_MAX", sizes[0]), (store, "IMAGE_PLACES_MAX", sizes[1]),
            (strings, "IMAGE_STRINGS_MAX", sizes[2]), (dedupe, "_IMAGE_ENTRIES_MAX", sizes[3]),
        ):  # fmt: skip
            patch.setattr(module, name, size)
        chunks: list[list[Chunk]] = [[] for _ in live.shards]
        begun, steps = [0] * n_shards, 0
        for place, shard in enumerate(live.shards):
            begun[place] = len(live.logs[place])
            for chunk in shard_chunks(shard, cluster_id="c", epoch=1, begin=begun[place], state={"place": place}):
                chunks[place].append(chunk)
                steps += 1
                if steps > pauses[number % len(pauses)] and number < len(world.batches):
                    live.send(world, number)
                    number, steps = number + 1, 0
        for after in range(number, len(world.batches)):
            live.send(world, after)
        again = Logged(world.layout, world.n_slots, n_shards, seed)
        for place, shard in enumerate(again.shards):
            path = write_snapshot(Path(folder) / str(place), chunks[place])
            loaded = load_shard(shard, path, cluster_id="c")
            assert (loaded.begin, loaded.epoch, loaded.state) == (begun[place], 1, {"place": place})
            assert loaded.newest_offset < len(live.logs[place])
            assert shard.check() == []
            replay(shard, live.logs[place], loaded.begin)
        again.logs = [list(log) for log in live.logs]
    same(again, live, world)
    if world.batches:  # and they know the same ids
        last = len(world.batches) - 1
        assert again.send(world, last) == live.send(world, last)
        # (Which shards are homes of events without ids, and hear of their time, is left to chance.)
        same_reads(again, live, world)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from((0, 0, 0, 1, 500, 20_000, 70_000))), max_size=150),
    st.integers(0, 2**64 - 1),
    st.integers(0, 150),
    st.integers(1, 40),
)
def test_every_row_that_stays_is_in_the_image_once_though_others_come_and_go(
    steps: list[tuple[int, int]], seed: int, first: int, words_max: int
) -> None:
    """One small index, in which entries stand behind their homes, some round its end, and move as others leave."""
    shard = shard_of(view(n=Count(window="60s")), n_slots=1, seed=seed, reclaim_margin_ms=0)
    (table,) = shard._layout.tables
    now = NOW
    for number, (user, gap) in enumerate(steps[:first]):
        now += gap
        apply(shard, [event(number, now, user=user)], now)
    stayed, imaged = keys_of_rows(shard), Counter[tuple[int, int]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "IMAGE_WORDS_MAX", words_max)
        number = first
        for slot, rows, image in shard.parts.store.image(table):
            assert (slot, rows) == (0, shard.status().entities["first[user]"])
            at = 0
            while at < len(image):
                imaged[int(image[at + 1]), int(image[at + 2])] += 1
                at += int(image[at])
            assert at == len(image)
            if number < len(steps):
                user, gap = steps[number]
                now += gap
                apply(shard, [event(number, now, user=user)], now)
                shard.reclaim()
                number += 1
                stayed &= keys_of_rows(shard)
    assert stayed <= set(imaged)
    # (One that left and came back behind the range may be in it anew; none is there that stayed.)
    assert all(imaged[key] == 1 for key in stayed)


def keys_of_rows(shard: Shard) -> set[tuple[int, int]]:
    """The hashes of the keys that a shard of one table and slot has rows of."""
    (table,) = shard._layout.tables
    header, words = shard.parts.store._headers(table)[0], shard.memory.words
    index = words[header[H_INDEX_AT] : header[H_INDEX_AT] + header[H_PLACES]]
    return {(int(words[row]), int(words[row + 1])) for row in (int(entry) & 0xFFFFFFFF for entry in index if entry)}


def test_a_table_is_taken_in_bounded_steps_while_its_index_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = view(n=Count(window="1h"), last=Last("code"), exact=Sum("i", window="1m", exact=True))
    live = shard_of(declared, n_slots=1)
    users, more, number = 4_000, 500, 0
    apply(live, [event(u, NOW, code=f"c{u % 5000}") for u in range(users)])
    begin, log, chunks = live.next_offset, list[Record](), []
    monkeypatch.setattr(store, "IMAGE_WORDS_MAX", 1 << 11)
    for chunk in shard_chunks(live, cluster_id="c", epoch=1, begin=begin):
        chunks.append(chunk)
        if isinstance(chunk.header, Rows):
            assert len(chunk.words) < 2 * store.IMAGE_WORDS_MAX
            first = users + more * number
            events = batch(SOURCE, [event(first + k, NOW + 5, user=first + k - 100 * (k % 3)) for k in range(more)])
            prepared = live.prepare_ingest(Events.judged("first", events, np.full(more, NOW + 5), NOW))
            assert isinstance(prepared.record, EventsRecord)
            live.commit(prepared, begin + number)
            log.append(prepared.record)
            number += 1
    assert number > 20
    assert live.status().entities["first[user]"] > 4 * users, "its index has grown several times"
    again = shard_of(declared, n_slots=1)
    loaded = load_shard(again, write_snapshot(tmp_path, chunks), cluster_id="c")
    assert loaded.newest_offset > begin
    assert again.check() == []
    for number, record in enumerate(log):
        assert isinstance(record, EventsRecord)
        again.replay_events(record, begin + number)
    assert again.check() == []
    assert again.status().entities == live.status().entities
    everyone = list(range(users + more * len(log) + 1))
    one, other = (read(shard, declared, everyone, NOW + 9) for shard in (again, live))
    np.testing.assert_array_equal(one.matrix, other.matrix)
    assert one.texts == other.texts


def test_a_row_that_is_longer_than_a_step_is_taken_whole(tmp_path: Path) -> None:
    declared = view(n=Sum("i", window="1h", exact=True))
    live = shard_of(declared, n_slots=1)
    apply(live, [event(k, NOW + k, user=k % 2, i=k) for k in range(60_000)])
    chunks = list(shard_chunks(live, cluster_id="c", epoch=1, begin=live.next_offset))
    assert max(len(chunk.words) for chunk in chunks) > 60_000
    again = shard_of(declared, n_slots=1)
    load_shard(again, write_snapshot(tmp_path, chunks), cluster_id="c")
    rows = [read(shard, declared, [0, 1, 2], NOW + HOUR) for shard in (live, again)]
    np.testing.assert_array_equal(rows[0].matrix, rows[1].matrix)
    assert (rows[0].matrix[:2] > 0).all()
    assert again.check() == []


@pytest.mark.parametrize("pages", [64, 600, 1_200])
def test_what_does_not_fit_into_the_memory_is_an_error(pages: int, tmp_path: Path) -> None:
    declared = view(n=Count(window="1h"), code=Last("code"))
    live = shard_of(declared, bytes_max=1 << 26)
    apply(live, [event(u, NOW, code=f"c{u}") for u in range(50_000)])
    path = write_snapshot(tmp_path, shard_chunks(live, cluster_id="c", epoch=1, begin=1))
    with pytest.raises(MemoryFull, match=r"^tiles: \d+ bytes are in use"):
        load_shard(shard_of(declared, bytes_max=pages * 4096), path, cluster_id="c")
    enough = shard_of(declared, bytes_max=live.memory.limit_words * 8 + (1 << 19))
    load_shard(enough, path, cluster_id="c")
    assert enough.check() == []


def test_of_a_string_that_was_one_of_too_many_nothing_more_is_known(tmp_path: Path) -> None:
    declared = view(last=Last("code"), both=LastN("code", n=2), oldest=First("code"))
    live = shard_of(declared, strings_max=2)
    apply(live, [event(k, NOW + k, user=k // 2, code=code) for k, code in enumerate(["a", "ü", "日本語🐟", "a", "b"])])
    path = write_snapshot(tmp_path, shard_chunks(live, cluster_id="c", epoch=1, begin=1))
    users = [0, 1, 2, 3]
    for strings_max, first in ((2, "ü"), (9, "ü"), (1, None)):
        again = shard_of(declared, strings_max=strings_max, seed=7)
        load_shard(again, path, cluster_id="c")
        texts = read(again, declared, users, NOW + 9).texts
        assert texts["v.last"] == [first, "a", None, None]
        assert texts["v.oldest"] == ["a", None, None, None]
        assert again.status().strings_refused == 2
        assert again.status().strings == min(2, strings_max)
    assert read(live, declared, users, NOW + 9).texts["v.last"] == ["ü", "a", None, None]


# -- layouts


WHERE = pc.field("v") > 0.5
FULL = {
    "n": Count(window="30d"), "dear": Count(window="30d", where=WHERE), "mean": Mean("v", window="30d"),
    "fine": Sum("i", window="1h", exact=True), "recent": LastN("code", n=3, window="7d"), "last": Last("code"),
    "ttl": Max("v", ttl="7d"), "ever": Count(), "top": TopK("code", k=4, m=6), "top_7d": TopK("code", k=4, window="7d"),
}  # fmt: skip


def declared_as(features: dict[str, Any], name: str = "v", **changes: Any) -> FeatureView:
    return FeatureView(name, **{"owner": "tests", "source": SOURCE, "key": ["user"], "features": features, **changes})


def snapshot_of(folder: Path, *views: FeatureView) -> tuple[Path, list[list[dict[str, Any]]]]:
    live = shard_of(*views)
    log = [
        [event(100 * b + k, NOW + 7_919 * (100 * b + k), user=k % 7, v=k / 50, i=k, code=f"c{k % 11}")
         for k in range(100)] for b in range(8)
    ]  # fmt: skip
    for events in log:
        apply(live, events, NOW)
    return write_snapshot(folder, shard_chunks(live, cluster_id="c", epoch=1, begin=live.next_offset)), log


@pytest.mark.parametrize("kept", [[name] for name in FULL] + [list(FULL)[::-1], ["n", "ttl", "last"]])
def test_features_that_are_not_declared_any_more_are_passed_over(kept: list[str], tmp_path: Path) -> None:
    path, log = snapshot_of(tmp_path, declared_as(FULL), declared_as({"n": Count()}, "codes", key=["code"]))
    fewer = declared_as({name: FULL[name] for name in kept})
    again, fresh = shard_of(fewer), shard_of(fewer)
    load_shard(again, path, cluster_id="c")
    for events in log:
        apply(fresh, events, NOW)
    more = [event(10_000 + k, NOW + 8_000_000 + k, user=k % 8, v=0.7, code="new") for k in range(50)]
    for shard in (again, fresh):
        apply(shard, more, NOW)
    rows = [read(shard, fewer, list(range(9)), NOW + 9_000_000) for shard in (again, fresh)]
    np.testing.assert_array_equal(rows[0].matrix, rows[1].matrix)
    assert (rows[0].texts, rows[0].unknown) == (rows[1].texts, rows[1].unknown)
    assert again.check() == []


def test_tiles_that_a_shorter_window_does_not_see_are_left_out(tmp_path: Path) -> None:
    path, _ = snapshot_of(tmp_path, declared_as({"n": Count(window="90s"), "e": Count(window="80s", exact=True)}))
    shorter = declared_as({"n": Count(window="60s"), "e": Count(window="60s", exact=True)})
    again = shard_of(shorter)
    load_shard(again, path, cluster_id="c")
    assert again.check() == []  # which knows how many tiles a window has


@pytest.mark.parametrize(
    ("had", "wanted", "named"),
    [
        ({"n": Count()}, {"n": Count(), "mean": Mean("v"), "last": Last("v")}, "`v.mean`, `v.last`"),
        ({"n": Sum("v", window="30d")}, {"n": Mean("v", window="30d")}, "`v.n`"),
        ({"n": Count(window="30d")}, {"n": Count(window="31d"), "m": Count(window="30d")}, "`v.n`"),
        ({"n": Count(window="30d")}, {"n": Count(window="30d", exact=True)}, "`v.n`"),
        ({"n": Count(window="30d")}, {"n": Count(window="29d")}, "`v.n`"),  # whose tiles are narrower
        ({"n": Count()}, {"n": Count(where=WHERE)}, "`v.n`"),
        ({"n": Count(ttl="1d")}, {"n": Count(ttl="2d")}, "`v.n`"),
        ({"n": LastN("v", n=3)}, {"n": LastN("v", n=2)}, "`v.n`"),
        ({"n": Last("v")}, {"n": Last("i")}, "`v.n`"),
    ],
)
def test_a_table_of_features_that_a_snapshot_knows_nothing_of_stays_empty_and_they_are_named(
    had: dict[str, Any], wanted: dict[str, Any], named: str, tmp_path: Path
) -> None:
    beside = declared_as({"n": Count()}, "b", key=["small"])
    path, _ = snapshot_of(tmp_path, declared_as(had), beside)
    shard = shard_of(declared_as(wanted), beside)
    loaded = load_shard(shard, path, cluster_id="c")
    ((table, names),) = loaded.incomplete.items()
    assert (table.name, ", ".join(names), loaded.lacks) == ("first[user]", named, ())
    status = shard.status()
    assert (status.entities["first[user]"], status.events["first[user]"]) == (0, 0)
    assert status.events["first[small]"] == 800
    assert status.entities["first[small]"] > 0
    assert shard.check() == []


def test_a_condition_of_a_view_alone_is_lacking_too(tmp_path: Path) -> None:
    """Which entities the view knows is told by its events."""
    path, _ = snapshot_of(tmp_path, declared_as({"n": Count()}))
    shard = shard_of(declared_as({"n": Count()}), declared_as({"n": Count(where=WHERE)}, "w", where=WHERE))
    (names,) = load_shard(shard, path, cluster_id="c").incomplete.values()
    assert names == ["`w.n`", "the condition of view `w`"]


def test_a_field_that_is_of_strings_now_is_another(tmp_path: Path) -> None:
    path, _ = snapshot_of(tmp_path, declared_as({"n": Last("i")}))
    fields = {**SOURCE.fields, "i": SOURCE.fields["code"]}
    retyped = source("first", "id").__class__("first", owner="t", fields=fields, event_time="at", event_id="id")
    loaded = load_shard(shard_of(declared_as({"n": Last("i")}, source=retyped)), path, cluster_id="c")
    assert list(loaded.incomplete.values()) == [["`v.n`"]]


def test_a_table_that_is_new_begins_empty_and_one_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    path, _ = snapshot_of(tmp_path, declared_as({"n": Count()}), declared_as({"n": Last("code")}, "b", key=["small"]))
    new = declared_as({"n": Count()}, "codes", key=["code"])
    shard = shard_of(declared_as({"n": Count()}), new)
    load_shard(shard, path, cluster_id="c")
    status = shard.status()
    assert status.entities == {"first[user]": 7, "first[code]": 0}
    assert status.events == {"first[user]": 800, "first[code]": 0}
    assert shard.check() == []


# -- what is no snapshot of this shard


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster_id": "d"}, "is of cluster 'd', this is 'c'"),
        ({"shard": 1}, "is of shard 1, this is 0"),
        ({"n_slots": 8}, "is of number of slots 8, this is 4"),
        ({"key_hash_version": 2}, "is of key hash version 2, this is 1"),
    ],
)
def test_a_foreign_snapshot_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    shard = shard_of(declared_as(FULL))
    first, *rest = shard_chunks(shard, cluster_id="c", epoch=1, begin=0)
    assert isinstance(first.header, ShardHeader)
    path = write_snapshot(tmp_path, [Chunk(msgspec.structs.replace(first.header, **change)), *rest])
    with pytest.raises(ForeignSnapshot, match=message):
        load_shard(shard, path, cluster_id="c")


def load_forged(first: int, seeds: int) -> None:
    """Load snapshots with good checksums and bad words, in a process of its own: it may die of it."""
    declared = [declared_as(FULL), declared_as({"n": Count(), "last": Last("id")}, "codes", key=["code"])]
    live = shard_of(*declared)
    apply(live, [event(k, NOW + k * 997, user=k % 20, code=f"c{k % 7}") for k in range(1_000)])
    good = list(shard_chunks(live, cluster_id="c", epoch=1, begin=live.next_offset))
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + seeds):
            random = np.random.default_rng(seed)
            again = shard_of(*declared, bytes_max=1 << 23)
            try:
                load_shard(again, write_snapshot(Path(folder), _forged(good, random)), cluster_id="c")
            except (SnapshotDamaged, MemoryFull) as error:
                outcomes[type(error).__name__] += 1
            else:
                outcomes["loaded"] += 1
                assert again.check() == []  # whatever it means, it is a store
                for of in declared[:1]:
                    read(again, of, list(range(20)), NOW + HOUR)
    print(dict(outcomes))  # noqa: T201


def _forged(good: list[Chunk], random: np.random.Generator) -> Iterator[Chunk]:
    """Change a few words of some chunks, or what their headers say."""
    bad = int(random.integers(1, len(good)))
    for number, chunk in enumerate(good):
        words, header = chunk.words.copy(), chunk.header
        if number == bad and len(words):
            kind, many = random.integers(6), int(random.choice([1, 1, 3, 50]))
            places = random.integers(0, len(words), many)
            if kind == 0:
                words[places] = random.integers(-(2**63), 2**63 - 1, many)
            elif kind == 1:
                words[places] += random.integers(-3, 4, many)
            elif kind == 2:
                words[places] = random.choice([0, 1, -1, len(words), 2**62, -(2**63), 2**63 - 1, 1 << 32], many)
            elif kind == 3:
                words = words[: int(places[0])]
            elif kind == 4:
                words = np.concatenate([words, words])
            elif isinstance(header, Rows):
                changed = {"slot": int(random.integers(0, 6)), "table": int(random.integers(0, 3)), "rows": 2}
                header = msgspec.structs.replace(header, **changed)
            elif isinstance(header, Ids):
                header = msgspec.structs.replace(header, slot=int(random.integers(0, 6)), source="other")
            elif isinstance(header, StringsHeader):
                header = msgspec.structs.replace(header, count=int(random.integers(0, 2**40)))
        yield Chunk(header, words)


def test_forged_words_never_harm_the_process() -> None:
    code = "import test_image; test_image.load_forged(0, 200)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "loaded" in done.stdout
    assert "SnapshotDamaged" in done.stdout
