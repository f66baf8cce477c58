"""What was read while events came in is read again from the past, bit by bit, wherever the log has been cut."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from check_directory import BY_SHOP, BY_USER, LAYOUT, events, lay_out
from durable_cluster import STEPS, Crash, DurableCluster, Fault
from folders import folder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_vs_oracle import keys_of
from worlds import World, worlds

from millpond.feature_actors.errors import AsOfInPast
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.past import Past
from millpond.feature_actors.plan import Answer, Question, ReadPlan
from millpond.feature_actors.ports import LocalRead
from millpond.feature_actors.recall import (
    GONE,
    LATER,
    NO_EVENT,
    NOT_ASKED,
    READ,
    Recalled,
    RowReads,
    events_of,
    recall,
)  # fmt: skip
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.tiles.structure import SEQUENCE_ROW_BITS


def reads_of(cluster: DurableCluster, question: Question, answer: Answer) -> RowReads:
    """What a score log would have of an answer."""
    program = question.program
    keys = list(program.key_of_part)
    shards = np.stack([cluster.shard_map.shards_of(question.hashes[k].view(np.uint64)) for k in keys], axis=1)
    offsets = np.where(answer.trace[:, 1:] < 0, NO_EVENT, answer.trace[:, 1:] >> SEQUENCE_ROW_BITS)
    return RowReads(program, question.hashes, answer.as_of.copy(), shards, offsets, np.zeros_like(offsets))


def assert_same(read: Answer, again: Recalled) -> None:
    assert (again.outcome == READ).all()
    assert (read.values.view(np.int64) == again.answer.values.view(np.int64))[~np.isnan(read.values)].all()
    # Addresses of strings differ from memory to memory.
    assert (np.isnan(read.values) == np.isnan(again.answer.values)).all()
    assert read.known.tolist() == again.answer.known.tolist()
    assert read.texts == again.answer.texts


def numbers_only(answer: Answer) -> Answer:
    """Without the addresses of its strings."""
    for column in answer.texts:
        answer.values[:, column] = 0.0
    return answer


def numbers_only_of(recalled: Recalled) -> Recalled:
    numbers_only(recalled.answer)
    return recalled


def past_of(cluster: DurableCluster, path: Path, *, crashed: bool = False) -> Past:
    lay_out(cluster, path, crashed=crashed)
    return Past(path, str(path / "history") if (path / "history").exists() else None)


def plans_of(world: World, layout: Layout, data: st.DataObject) -> list[ReadPlan]:
    plans = []
    for number in range(data.draw(st.integers(1, 2))):
        views = data.draw(st.lists(st.sampled_from(world.views), min_size=1, unique_by=lambda view: view.name))
        features = [feature for view in views for feature in view]
        some = data.draw(st.lists(st.sampled_from(features), min_size=1, unique_by=lambda feature: feature.full_name))
        plans.append(ReadPlan(layout, some, f"plan {number}"))
    return plans


def questions(world: World, plan: ReadPlan, now_ms: int, as_of: int | None, draw: Any) -> Question:
    """Ask for some ids of the world, with keys that events have had."""
    view = draw(st.sampled_from(list(plan.views.values())))
    keys = keys_of(view, world.events(view.source.name), most=6)
    others = {name: (0 if kind == "int64" else "a") for name, kind in plan.key_fields.items()}
    ids = [{**others, **dict(zip(view.key, key, strict=True))} for key in keys]
    columns = plan.key_columns(ids, batch=True)
    times = None if as_of is None else np.full(len(ids), as_of)
    return plan.question(columns, len(ids), now_ms, times)


@settings(max_examples=max(1, settings().max_examples // 2))
@given(world=worlds(events_max=60), data=st.data(), n_shards=st.sampled_from([1, 3]), history=st.booleans())
def test_what_was_read_is_read_again(world: World, data: st.DataObject, n_shards: int, history: bool) -> None:
    layout = world.layout
    with folder() as path:
        cluster = DurableCluster(layout, n_shards, path / "live", world.n_slots, history=history)
        plans, seen = plans_of(world, layout, data), []
        for name, now_ms, batch in world.batches:
            if data.draw(st.booleans()):
                cluster.fault = Fault(data.draw(st.sampled_from(STEPS)), skip=data.draw(st.integers(0, 3)))
                with suppress(Crash):
                    cluster.send(name, now_ms, batch)
                cluster.fault = None
            cluster.send(name, now_ms, batch)
            what = data.draw(st.sampled_from(["", "", "snapshot", "restart", "deliver"]))
            if what == "restart":
                cluster.restart_all()
            elif what == "deliver":
                cluster.deliver_owed()
            elif what == "snapshot" and history:  # else the log is cut, and what was before is nowhere
                for number in range(n_shards):
                    cluster.write_history(number)
                    cluster.snapshot_steps(number, 1_000)
            for plan in plans:
                as_of = data.draw(st.sampled_from([None, None, now_ms + 1, now_ms + 7_200_000, now_ms - 1_000]))
                question = questions(world, plan, now_ms, as_of, data.draw)
                if question.n:
                    with suppress(AsOfInPast):
                        answer = LocalRead([d.shard for d in cluster.shards]).read_now(question)
                        assert answer is not None
                        seen.append((reads_of(cluster, question, answer), answer))
        past = past_of(cluster, path / "data", crashed=data.draw(st.booleans()))
        # In another order: it does not matter when something was read.
        order = data.draw(st.permutations(range(len(seen))))
        again = recall(past, layout, [seen[i][0] for i in order])
        for i, one in zip(order, again, strict=True):
            assert_same(numbers_only(seen[i][1]), numbers_only_of(one))


def user_plan() -> ReadPlan:
    return ReadPlan(LAYOUT, [*BY_USER, *BY_SHOP], "the test")


def halfway(path: Path, k: int) -> tuple[Past, RowReads, Answer]:
    """A cluster of one shard whose last request has four events of user 7, and what was read of that user when k of
    them had been applied, and of a shop that has none."""
    cluster = DurableCluster(LAYOUT, 1, path / "live")
    for number in range(3):
        cluster.send("payments", (number + 1) * 60_000, events(number))
    last = [
        {"id": f"l{i}", "at": 200_000 + i, "user": u, "shop": None, "cents": i}
        for i, u in enumerate([7, 1, 7, 7, 2, 7])
    ]
    cluster.send("payments", 240_000, last)
    past = past_of(cluster, path / "data")
    shard = Shard(LAYOUT, cluster.shard_map, 0)
    *before, (offset, record) = past.records(0)
    for at, one in before:
        shard.replay_events(one, at)
    steps = shard.replay_in_steps(record, offset, [0, 1, 3, 4, 6])
    for _ in range(k + 1):
        next(steps)
    question = user_plan().question({"user": [7], "shop": ["a"]}, 1, 240_000, None)
    answer = shard.read(question)
    return past, reads_of(cluster, question, answer), answer


def test_a_read_within_a_request_is_found_after_the_kth_event_of_its_key(tmp_path: Path) -> None:
    for k in range(5):
        past, reads, answer = halfway(tmp_path / f"{k}", k)
        (whole,) = recall(past, LAYOUT, [reads])
        if k == 0:
            assert reads.offsets[0, 0] == NO_EVENT
            assert whole.events[0, 0] == 0
            assert_same(answer, whole)
            continue
        assert whole.events.tolist() == [[4, 2]]
        assert (whole.answer.values[0, 0], answer.values[0, 0]) == (4, k)
        if k < 4:
            kth = np.array([[k, 0]])
            (part,) = recall(past, LAYOUT, [replace(reads, kth=kth)])
            assert_same(numbers_only(answer), numbers_only_of(part))
            offsets = np.where(kth > 0, reads.offsets, NOT_ASKED)
            (only,) = recall(past, LAYOUT, [replace(reads, kth=kth, offsets=offsets)])
            assert only.outcome.tolist() == [[READ, GONE]]
            assert only.answer.values[0, 0] == k
        else:
            assert_same(numbers_only(answer), numbers_only_of(whole))


def test_what_cannot_be_read_again_is_said(tmp_path: Path) -> None:
    past, reads, _ = halfway(tmp_path, 4)
    (gone,) = recall(past, LAYOUT, [replace(reads, offsets=reads.offsets + 100)])
    assert gone.outcome.tolist() == [[GONE, GONE]]
    assert np.isnan(gone.answer.values).all()
    early = np.concatenate([reads.as_of - 100_000, reads.as_of])
    two = RowReads(
        reads.program, reads.hashes.repeat(2, axis=1), early, reads.shards.repeat(2, axis=0),
        reads.offsets.repeat(2, axis=0), reads.kth.repeat(2, axis=0),
    )  # fmt: skip
    (later,) = recall(past, LAYOUT, [two])
    assert later.outcome.tolist() == [[LATER, READ], [READ, READ]]
    assert later.answer.values[1, 0] == 4


@settings(max_examples=max(1, settings().max_examples // 4))
@given(world=worlds(events_max=60), n_shards=st.sampled_from([1, 2]))
def test_the_events_of_an_entity_are_those_that_its_row_has_had(world: World, n_shards: int) -> None:
    layout = world.layout
    with folder() as path:
        cluster = DurableCluster(layout, n_shards, path / "live", world.n_slots)
        for name, now_ms, batch in world.batches:
            cluster.send(name, now_ms, batch)
        logged: dict[str, set[Any]] = {}
        for view in world.views:
            logged.setdefault(view.source.name, set(cluster.logged("num")))
        past = past_of(cluster, path / "data")
        asked: list[tuple[Any, Any]] = []
        wanted: list[list[tuple[Any, ...]]] = []
        for view in world.views:
            plan = ReadPlan(layout, list(view)[:1], "the test")
            for key in keys_of(view, world.events(view.source.name), most=5):
                ids = plan.key_columns([dict(zip(view.key, key, strict=True))], batch=True)
                asked.append((layout.table_of(view), plan.question(ids, 1, 0, None).hashes[0, 0]))
                wanted.append([key])
        for (table, _), (key,), found in zip(asked, wanted, events_of(past, layout, asked), strict=True):
            rows = list(zip(*(found.batch.column(name).to_pylist() for name in table.key), strict=True))
            assert rows == [key] * found.n
            assert (np.diff(found.offsets) >= 0).all()
            mine = [e for e in all_of(past, layout, table.source.name) if tuple(e[name] for name in table.key) == key]
            assert sorted(found.batch.column("num").to_pylist()) == sorted(e["num"] for e in mine)


def all_of(past: Past, layout: Layout, source: str) -> Sequence[dict[str, Any]]:
    """Every event of a source, as its home has logged it."""
    found = []
    for number in range(past.shards):
        for _, record in past.records(number):
            if record.source == source:
                home = pa.array((record.routes & 1).astype(bool))
                found += layout.source(source).upgraded(record.batch).filter(home).to_pylist()
    return found
