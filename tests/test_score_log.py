"""The score log holds what was served, bit by bit; whose scores those are is up to the id; its queue is finite."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apps import (
    ARROW,
    LAYOUT,
    NOW,
    Returns,
    call,
    churn,
    make_world,
    mean_price,
    model,
    offer,
    purchase,
    taste,
    user_spend,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import SPEND, client_over, lane_of, run, shards_with_spend, turn, until

from millpond.deployments.answers import Answers
from millpond.deployments.erased_scores import ScoreEraser
from millpond.deployments.score_log import ScoreLog, ScoreLogSettings
from millpond.deployments.served import Served, Shadow
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.keys import hash_keys
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.log.part import DAY_MS, HistoryDamaged, day_text
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import started_ticks
from millpond.feature_actors.tiles.structure import SEQUENCE_ROW_BITS
from millpond.models import Features
from millpond.models.registry import Registry
from millpond.models.score_log import ScoreFiles, Scorer, read_scores, scores_table

BITS = st.integers(0, 2**64 - 1)
USERS = list(range(1, 201))


def bits(value: float) -> int:
    return int(struct.unpack("<Q", struct.pack("<d", value))[0])


def logs_to(folder: Path, **settings: Any) -> Callable[[ShardMap], ScoreLog]:
    of = ScoreLogSettings(str(folder), **{"share": 1.0, "flush_s": 60.0, **settings})
    return lambda shard_map: ScoreLog(of, shard_map, "tested")


def logged(folder: Path, **which: Any) -> list[dict[str, Any]]:
    return [one for table in read_scores(str(folder), **which) for one in table.to_pylist()]


def wait_until_written(log: ScoreLog, n: int) -> None:
    deadline = time.monotonic() + 60
    while log.counts["written"] < n:
        assert time.monotonic() < deadline
        time.sleep(0.005)  # the thread that writes wants the processor


def some_scores(n: int, served_ms: int, first: int = 0) -> pa.Table:
    plan = ReadPlan(LAYOUT, list(user_spend), "the test")
    rows = FeatureRows(np.zeros((n, 4)), np.zeros(n, np.int64), [[]] * n, {}, np.zeros((n, 2), np.int64))
    ids = [str(first + i) for i in range(n)]
    return scores_table(
        Scorer("m", "1", "d", "champion"), plan, ShardMap.even(4, 1), ids, [served_ms] * n, {"user_id": range(n)}, rows,
        [0.0] * n,
    )  # fmt: skip


@settings(max_examples=30)
@given(
    matrix=st.lists(st.lists(BITS, min_size=8, max_size=8), min_size=1, max_size=5),
    texts=st.lists(st.tuples(st.none() | st.text(), st.text()), min_size=5, max_size=5),
    results=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text()
            | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=5,
        ),
        min_size=5, max_size=5,
    ),
    user=st.integers(-(2**63), 2**63 - 1),
    sequence=st.integers(-1, 2**62),
)  # fmt: skip
def test_every_bit_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    matrix: list[list[int]],
    texts: list[tuple[str | None, str]],
    results: list[Any],
    user: int,
    sequence: int,
) -> None:
    folder, n = tmp_path_factory.mktemp("scores"), len(matrix)
    plan = ReadPlan(compile_layout([], [taste]), list(taste), "the test")
    words = np.array(matrix, np.uint64)
    trace = np.array([[7, sequence]] * n, np.int64)
    rows = FeatureRows(
        words.view(np.float64), np.array([-(2**63), *range(n - 1)], np.int64), [["taste"]] * n,
        {"taste.first_book": [a for a, _ in texts[:n]], "taste.books": [(a, b, None) for a, b in texts[:n]]}, trace,
    )  # fmt: skip
    scorer = Scorer("m", "1", "abc", "canary")
    made = scores_table(
        scorer, plan, ShardMap.even(16, 3), ["id"] * n, [NOW] * n, {"user_id": [user] * n}, rows, results[:n]
    )
    ScoreFiles(str(folder), "w", 100).write(made)
    shard = int(ShardMap.even(16, 3).shards_of(hash_keys([[user]], 1))[0])
    place = {"offset": -1, "row": -1} if sequence < 0 else {
        "offset": sequence >> SEQUENCE_ROW_BITS, "row": sequence & ((1 << SEQUENCE_ROW_BITS) - 1)
    }  # fmt: skip
    for i, one in enumerate(logged(folder)):
        assert [bits(value) for value in one["features"]] == matrix[i]
        assert json.loads(one["key"]) == {"user_id": user}
        assert json.loads(one["texts"]) == {
            "taste.first_book": texts[i][0], "taste.books": [texts[i][0], texts[i][1], None]
        }  # fmt: skip
        assert json.loads(one["result"]) == results[i]
        assert one["rows"] == [{"table": "purchases[user_id]", "shard": shard, **place}]
        assert one["as_of_ms"] == rows.as_of[i]
        assert {name: one[name] for name in ("model", "version", "digest", "role", "served_ms", "unknown")} == {
            **dataclasses.asdict(scorer), "served_ms": NOW, "unknown": ["taste"],
        }  # fmt: skip


def test_a_file_grows_until_it_is_full_and_a_day_has_files_of_its_own(tmp_path: Path) -> None:
    files, number = ScoreFiles(str(tmp_path), "w", 10), 0
    for n, day in ((4, 0), (5, 0), (2, 0), (1, 1), (25, 1), (1, 0)):
        files.write(some_scores(n, day * DAY_MS + 5, number))
        number += n
        assert len(logged(tmp_path)) == number
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "_scores/date=1970-01-01/w-00000000.parquet", "_scores/date=1970-01-01/w-00000001.parquet",
        "_scores/date=1970-01-01/w-00000006.parquet", "_scores/date=1970-01-02/w-00000002.parquet",
        "_scores/date=1970-01-02/w-00000003.parquet", "_scores/date=1970-01-02/w-00000004.parquet",
        "_scores/date=1970-01-02/w-00000005.parquet",
    ]  # fmt: skip
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()} == {0o600}
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_dir()} == {0o700}
    assert sorted(int(one["id"]) for one in logged(tmp_path)) == list(range(number))
    assert [int(one["id"]) for one in logged(tmp_path, since_ms=DAY_MS)] == list(range(11, 37))
    assert len(logged(tmp_path, until_ms=6)) == 12
    assert logged(tmp_path, until_ms=5) == logged(tmp_path, model="n") == logged(tmp_path, version="2") == []
    assert int(logged(tmp_path, newest_first=True)[-1]["id"]) < 11


def test_a_file_is_not_replaced_for_ever_however_little_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millpond.models.score_log._WRITES_MAX", 3)
    files = ScoreFiles(str(tmp_path), "w", 1_000)
    for number in range(7):
        files.write(some_scores(1, 5, number))
    sizes = [pq.read_metadata(path).num_rows for path in sorted(tmp_path.rglob("*.parquet"))]
    assert sizes == [3, 3, 1]
    assert sorted(int(one["id"]) for one in logged(tmp_path)) == list(range(7))


def test_dates_older_than_is_kept_are_deleted(tmp_path: Path) -> None:
    files = ScoreFiles(str(tmp_path), "w", 10)
    for day in range(4):
        files.write(some_scores(1, day * DAY_MS))
    assert files.delete_before(3 * DAY_MS - 1) == ["_scores/date=1970-01-01", "_scores/date=1970-01-02"]
    assert [one["served_ms"] for one in logged(tmp_path)] == [2 * DAY_MS, 3 * DAY_MS]


def test_what_is_no_file_of_a_score_log_is_said(tmp_path: Path) -> None:
    ScoreFiles(str(tmp_path), "w", 10).write(some_scores(3, 5))
    (path,) = tmp_path.rglob("*.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(HistoryDamaged, match=r"^history: `_scores/date=1970-01-01/w-00000000.parquet` cannot be read"):
        logged(tmp_path)
    retyped = pa.parquet.read_table(pa.BufferReader(whole))
    retyped = retyped.set_column(1, "served_ms", pa.array(["then"] * 3))
    for other in (pa.table({"x": [1]}), retyped):
        pa.parquet.write_table(other, path)
        with pytest.raises(HistoryDamaged, match="is no file of a score log: its columns are others; remove it"):
            logged(tmp_path)


# -- what is served


class Spoils:
    """Writes into its features before it returns them."""

    def predict(self, features: Features) -> Any:
        before = np.nansum(features.matrix, axis=1)
        features.matrix[:] = -1.0
        return before


def test_each_form_of_a_score_is_logged_with_the_id_of_its_answer(tmp_path: Path) -> None:
    world = make_world([model("churn", list(user_spend), Spoils), offer], score_log=logs_to(tmp_path))
    world.post_events("purchases", [purchase(f"o{u}", u, float(u), book_id="b") for u in USERS[:9]])
    answers = [world.post_score("churn", {"user_id": 1}).json]
    answers += world.post_score("churn", [{"user_id": 2}, {"user_id": 999}, {"user_id": 3}]).json
    answers += world.post_score("churn?features=true", [{"user_id": 4}]).json
    table = pa.ipc.open_stream(
        world.post_score("churn", [{"user_id": 5}], headers={"accept": ARROW}).body
    ).read_all()  # fmt: skip
    answers.append({"id": table["id"][0].as_py(), "model": "churn"})
    both = {"models": ["churn", "offer"], "ids": [{"user_id": 6, "book_id": "b"}]}
    several = call(world.score, "POST", "/v1/score", both)
    assert several.status == 200, several.body
    answers += [one for row in several.json for one in row.values()]
    log = world.score._answers._score_log
    assert log is not None
    assert logged(tmp_path) == []
    log.close()
    assert log.counts == {"written": len(answers), "dropped": 0, "waiting": 0}
    found = {one["id"]: one for one in logged(tmp_path)}
    assert found.keys() == {answer["id"] for answer in answers}
    assert [found[a["id"]]["model"] for a in answers] == [a["model"] for a in answers]
    one = found[answers[1]["id"]]
    assert (json.loads(one["key"]), one["features"], one["result"]) == ({"user_id": 2}, [1.0, 2.0, 2.0, 0.0], "5.0")
    assert (one["as_of_ms"], one["unknown"], one["role"]) == (NOW, [], "champion")
    assert [row["offset"] >= 0 for row in one["rows"]] == [True]
    unknown = found[answers[2]["id"]]
    assert (unknown["unknown"], [row["offset"] for row in unknown["rows"]]) == (["user_spend"], [-1])
    of_offer = next(one for one in found.values() if one["model"] == "offer")
    assert [row["table"] for row in of_offer["rows"]] == [
        "purchases[book_id]", "purchases[user_id]", "purchases[user_id, book_id]"
    ]  # fmt: skip
    assert json.loads(of_offer["key"]) == {"book_id": "b", "user_id": 6}


def test_an_id_without_a_result_is_not_logged(tmp_path: Path) -> None:
    world = make_world([model("mean", list(user_spend), lambda: Returns(mean_price))], score_log=logs_to(tmp_path))
    world.post_events("purchases", [purchase(f"o{u}", u, float(u)) for u in (1, 3)])
    world.post_score("mean", [{"user_id": u} for u in (1, 2, 3)])
    world.post_score("mean", [{"user_id": u} for u in (2, 3)], headers={"accept": ARROW})
    assert world.post_score("mean", {"user_id": 2}).status == 500
    log = world.score._answers._score_log
    assert log is not None
    log.close()
    assert log.counts == {"written": 3, "dropped": 0, "waiting": 0}
    assert sorted((one["key"], one["result"]) for one in logged(tmp_path)) == [
        ('{"user_id":1}', "1.0"), ('{"user_id":3}', "3.0"), ('{"user_id":3}', "3.0")
    ]  # fmt: skip


@contextmanager
def reporting(registry: Registry, log: ScoreLog) -> Iterator[None]:
    """Have the replica `tested` live, and report now and then what its score log heeds, as `ModelHost` does."""
    pid, ended = os.getpid(), threading.Event()

    def report() -> None:
        heeded = log.heed(registry.erasures.notices())
        registry.report("tested", {"pid": pid, "started_ticks": started_ticks(pid), "heeded": heeded})

    def live() -> None:
        while not ended.wait(0.01):
            report()

    report()
    thread = threading.Thread(target=live)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_who_is_forgotten_leaves_every_file_and_what_waits_and_is_not_logged_again(tmp_path: Path) -> None:
    """As a cluster has it: one writer that lives and says so in the registry, and files of one that has ended."""
    registry, pid = Registry(tmp_path / "registry"), os.getpid()
    registry.report("ended", {"pid": pid, "started_ticks": -1})
    ScoreFiles(str(tmp_path), "ended", 100).write(some_scores(4, NOW))
    cut_off = tmp_path / "_scores" / f"date={day_text(NOW // DAY_MS)}" / ".ended-00000009.parquet.new"
    cut_off.write_bytes(b"not written to its end")
    world = make_world([model("churn", list(user_spend))], score_log=logs_to(tmp_path, flush_s=0.02))
    log = world.score._answers._score_log
    assert log is not None
    for user in (1, 2, 1):
        world.post_score("churn", {"user_id": user})
    wait_until_written(log, 3)
    low, high = hash_keys([[1]], 1).view(np.int64)[0].tolist()
    eraser = ScoreEraser(str(tmp_path), str(tmp_path / "registry"))
    # One that does not hear of it is named, and it goes on from there when that has ended.
    registry.report("deaf", {"pid": pid, "started_ticks": started_ticks(pid)})
    with reporting(registry, log):
        with pytest.raises(Unavailable, match=r"^logged scores: `deaf` may log or show .* within 0\.5 s"):
            dataclasses.replace(eraser, wait_s_max=0.5).forget("one", "user_id", (low, high), NOW)
        registry.report("deaf", {"pid": pid, "started_ticks": -1})
        assert eraser.forget("one", "user_id", (low, high), NOW) == 3
    assert registry.reports().keys() == {"tested"}
    # What was read before is not logged any more, whoever was asked then; what is read later is.
    for user in (1, 2):
        world.post_score("churn", {"user_id": user})
    world.clock.ms = NOW + 1
    world.post_score("churn", {"user_id": 1})
    log.close()
    found = sorted((one["key"], one["as_of_ms"]) for one in logged(tmp_path))
    assert found == [
        ('{"user_id":0}', 0), ('{"user_id":1}', NOW + 1), ('{"user_id":2}', 0), ('{"user_id":2}', NOW),
        ('{"user_id":2}', NOW), ('{"user_id":3}', 0),
    ]  # fmt: skip
    assert not cut_off.exists()
    assert registry.erasures.notices() == {}
    registry.close()


def test_a_writer_that_could_not_forget_tries_again(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    world = make_world([model("churn", list(user_spend))], score_log=logs_to(tmp_path, flush_s=0.02))
    log = world.score._answers._score_log
    assert log is not None
    for user in (1, 2):
        world.post_score("churn", {"user_id": user})
    wait_until_written(log, 2)
    low, high = hash_keys([[1]], 1).view(np.int64)[0].tolist()
    eraser = ScoreEraser(str(tmp_path), str(tmp_path / "registry"))
    (date,) = (tmp_path / "_scores").glob("date=*")
    date.rename(tmp_path / "away")
    date.write_text("no folder")
    with reporting(registry, log):
        with pytest.raises(Unavailable, match=r"^logged scores: `tested` may log or show scores still"):
            dataclasses.replace(eraser, wait_s_max=0.5).forget("one", "user_id", (low, high), NOW)
        date.unlink()
        (tmp_path / "away").rename(date)
        assert eraser.forget("one", "user_id", (low, high), NOW) == 1
    log.close()
    registry.close()
    assert [one["key"] for one in logged(tmp_path)] == ['{"user_id":2}']


def test_whose_scores_are_logged_is_a_matter_of_the_id_alone(tmp_path: Path) -> None:
    hashes = hash_keys([USERS], len(USERS))[:, 0]
    chosen = {user for user, h in zip(USERS, hashes.tolist(), strict=True) if h < 2**62}
    assert 20 < len(chosen) < 80
    for number, n_shards in enumerate((1, 3)):
        folder = tmp_path / f"{number}"
        world = make_world([churn], n_shards=n_shards, score_log=logs_to(folder, share=0.25))
        world.post_score("churn", [{"user_id": u} for u in USERS])
        for user in USERS[:50]:
            world.post_score("churn", {"user_id": user})
        log = world.score._answers._score_log
        assert log is not None
        log.close()
        users = [json.loads(one["key"])["user_id"] for one in logged(folder)]
        assert sorted(users) == sorted([*chosen, *(u for u in USERS[:50] if u in chosen)])


def test_what_comes_above_the_limit_is_dropped_and_counted(tmp_path: Path) -> None:
    world = make_world([churn], score_log=logs_to(tmp_path, waiting_max=5))
    assert len(world.post_score("churn", [{"user_id": u} for u in USERS]).json) == len(USERS)
    log = world.score._answers._score_log
    assert log is not None
    assert log.counts == {"written": 0, "dropped": len(USERS) - 5, "waiting": 5}
    log.close()
    assert log.counts == {"written": 5, "dropped": len(USERS) - 5, "waiting": 0}
    assert len(logged(tmp_path)) == 5


def test_scores_are_served_where_they_cannot_be_logged(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    world = make_world([churn], score_log=logs_to(tmp_path / "file"))
    assert world.post_score("churn", {"user_id": 1}).status == 200
    log = world.score._answers._score_log
    assert log is not None
    log.close()
    assert log.counts == {"written": 0, "dropped": 1, "waiting": 0}


def test_it_is_written_when_so_many_wait_or_after_some_time(tmp_path: Path) -> None:
    async def story() -> None:
        for number, of in enumerate(({"flush_rows": 3}, {"flush_s": 0.01})):
            folder = tmp_path / f"{number}"
            world = make_world([churn], score_log=logs_to(folder, **of))
            log = world.score._answers._score_log
            assert log is not None
            await asyncio.to_thread(world.post_score, "churn", [{"user_id": u} for u in (1, 2, 3)])
            await until(lambda log=log: log.written == 3, "what waits to be written")  # type: ignore[misc]
            assert len(logged(folder)) == 3
            log.close()

    run(story)


def test_nothing_is_taken_of_rows_that_nobody_has_traced(tmp_path: Path) -> None:
    log = logs_to(tmp_path)(ShardMap.even(4, 1))
    assert log.take({"user_id": [1]}, FeatureRows(np.zeros((1, 2)), np.zeros(1, np.int64), [[]])) is None
    log.close()


@pytest.mark.parametrize("n", [1, 2, 16, 17, 200])
def test_who_is_taken_is_a_matter_of_the_id_alone_however_many_come_together(tmp_path: Path, n: int) -> None:
    log = logs_to(tmp_path, share=0.3)(ShardMap.even(4, 1))
    hashed = hash_keys([list(range(n))], n).view(np.int64)[:, 0]
    rows = FeatureRows(np.arange(2.0 * n).reshape(n, 2), np.arange(n), [[]] * n, {}, np.stack([hashed, hashed], axis=1))
    taken = log.take({"user_id": list(range(n))}, rows)
    want = [row for row in range(n) if int(hashed[row]) % 2**64 < 0.3 * 2.0**64]
    assert (list(taken.places) if taken else []) == want
    assert taken is None or taken.rows.matrix[:, 0].tolist() == [2.0 * row for row in want]
    log.close()


def test_canary_and_shadow_are_logged_as_such(tmp_path: Path) -> None:
    shard_map, shards = shards_with_spend()

    async def story() -> None:
        client, _ = client_over((shard_map, shards))
        log = logs_to(tmp_path)(shard_map)
        champion, canary, shadow, other = (
            lane_of(Spoils(), client, version=version, features=features)
            for version, features in (("1", SPEND), ("2", SPEND), ("3", SPEND), ("4", SPEND[:1]))
        )
        for lane, role in ((champion, "champion"), (canary, "canary"), (shadow, "shadow"), (other, "shadow")):
            lane.role, lane.score_log = role, log  # type: ignore[assignment]
        answers, users = Answers(log), list(range(1, 30))
        for beside in (shadow, other):
            champion.compare = compare = Shadow(champion, beside, client)
            served = Served("m", champion, canary, 0.5, compare)
            answered = await served.ask({"user_id": users}, len(users))
            answers.list(answered)
            n = sum(lane is champion for lane, _, _ in answered)
            await until(lambda compare=compare, n=n: compare.disagreement.compared == n, "the shadow")  # type: ignore[misc]
        log.close()
        by_version: dict[str, list[dict[str, Any]]] = {}
        for one in logged(tmp_path):
            by_version.setdefault(one["version"], []).append(one)
        assert {version: {one["role"] for one in of} for version, of in by_version.items()} == {
            "1": {"champion"}, "2": {"canary"}, "3": {"shadow"}, "4": {"shadow"}
        }  # fmt: skip
        assert n > 5
        assert len(by_version["1"]) == 2 * n
        assert len(by_version["1"]) + len(by_version["2"]) == 2 * len(users)
        assert len(by_version["3"]) == len(by_version["4"]) == n
        assert {one["id"] for one in by_version["3"]} == {""}
        assert {len(one["features"]) for one in by_version["4"]} == {1}
        of_user = {one["key"]: one for one in by_version["1"]}
        for one in by_version["3"]:
            same = of_user[one["key"]]
            assert (one["features"], one["rows"], one["as_of_ms"]) == (same["features"], same["rows"], same["as_of_ms"])
        await turn()

    run(story)


def test_an_unwritable_place_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable):
        ScoreFiles(str(tmp_path / "file"), "w", 5).write(some_scores(1, 0))
