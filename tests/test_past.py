"""The past of a cluster is what its shards had, in their order, wherever its log has been cut, whoever writes to it."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from check_directory import BY_SHOP, BY_USER, LAYOUT, N_SLOTS, Stopped, events
from durable_cluster import DurableCluster
from test_engine_vs_oracle import plan_of, read

from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.reader import LogReader
from millpond.feature_actors.log.record import LogDamaged
from millpond.feature_actors.manifest import Manifest, ManifestError
from millpond.feature_actors.past import Past
from millpond.feature_actors.ports import LocalIngest, LocalRead
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"crashed": True},
    {"n_shards": 1, "snapshots": (4,)},
    {"snapshots": (2, 4, 6), "history": True},
    {"n_shards": 3, "snapshots": (2, 3, 5, 7), "history": True, "crashed": True},
)


def past_of(stopped: Stopped) -> Past:
    history = stopped.path / "history"
    return Past(stopped.path, str(history) if history.exists() else None)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_event_is_told_once_at_its_home_and_a_replay_gives_what_the_shards_had(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    stopped = Stopped(tmp_path, **kind)
    past, before = past_of(stopped), stopped.hashes()
    assert past.shards == stopped.n_shards
    shard_map = ShardMap.even(N_SLOTS, stopped.n_shards)
    shards = [Shard(LAYOUT, shard_map, n) for n in range(past.shards)]
    told: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        last = -1
        for offset, record in past.records(number):
            assert offset > last
            last = offset
            ids = record.batch.column("id").to_pylist()
            told.update(i for i, routes in zip(ids, record.routes, strict=True) if routes & 1)
            shard.replay_events(record, offset)
    assert told == Counter(f"{number}-{i}" for number in range(10) for i in range(6))
    again = FeatureClient(LAYOUT, shard_map, LocalIngest(shards), LocalRead(shards), ManualClock(11 * 60_000))
    recovered = stopped.recovered()
    recovered.clock.ms = 11 * 60_000
    for view, keys in ((BY_USER, [(u,) for u in range(7)]), (BY_SHOP, [(s,) for s in "abü"])):
        (mine, theirs) = (read(client, plan_of(client, view), keys) for client in (again, recovered.client))
        assert mine.matrix.tobytes() == theirs.matrix.tobytes()
        assert mine.texts == theirs.texts
    assert {n: h for n, h in stopped.hashes().items() if "cache.db" not in n} == {
        n: h for n, h in before.items() if "cache.db" not in n
    }


def test_it_goes_on_from_an_offset(tmp_path: Path) -> None:
    stopped = Stopped(tmp_path, n_shards=1, snapshots=(2, 4, 6), history=True)
    past = past_of(stopped)
    offsets = [offset for offset, _ in past.records(0)]
    assert len(offsets) == 10
    assert all(record.routes.all() for _, record in past.records(0))  # all are at home here
    for begin in (0, 3, 7, 8, 10):
        for end in (0, 5, 8, 9, 10):
            told = [offset for offset, _ in past.home_records(0, begin, end)]
            assert told == [o for o in offsets if begin <= o < end]


@pytest.mark.parametrize("history", [False, True])
def test_a_log_that_ends_before_where_its_shard_said_is_not_taken_for_whole(tmp_path: Path, history: bool) -> None:
    past = past_of(Stopped(tmp_path, n_shards=1, snapshots=(2, 4, 6) if history else (), history=history))
    with pytest.raises(Unavailable, match="the log of shard 0 ends at offset 10, not at 11, where its shard said"):
        list(past.home_records(0, 0, 11))


def test_what_is_truncated_while_it_is_read_comes_from_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millpond.feature_actors.log.applied.PIECE_RECORDS", 2)
    cluster = DurableCluster(LAYOUT, 1, tmp_path, history=True)
    for number in range(10):
        cluster.send("payments", (number + 1) * 60_000, events(number))
    told = []
    for offset, _ in cluster.past().home_records(0, 0, 10):
        told.append(offset)
        log = cluster.shards[0].log
        assert isinstance(log, Log)
        assert log.empty_write_ahead()  # nothing is held open
        if offset == 3:
            for number in range(10, 12):
                cluster.write_history(0)
                cluster.snapshot_steps(0, 1_000)
                cluster.send("payments", (number + 1) * 60_000, events(number))
            assert log.first > offset
    assert told == list(range(10))


def test_a_log_is_read_as_of_its_opening_while_its_shard_goes_on(tmp_path: Path) -> None:
    stopped = Stopped(tmp_path, n_shards=1)
    log = Log(stopped.shard(0) / "log", "process")
    (records, n) = ([record for _, (record, _) in log.read()], log.next)
    with closing(LogReader(stopped.shard(0) / "log")) as reader:
        log.append(records[:3])
        log.truncate(5)
        assert log.first == 5
        assert (reader.first, reader.next) == (0, n)
        assert [offset for offset, _ in reader.read()] == list(range(n))
    with closing(LogReader(stopped.shard(0) / "log")) as reader:
        assert (reader.first, reader.next) == (5, n + 3)
        assert [offset for offset, _ in reader.read(7)] == list(range(7, n + 3))
    log.close()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    stopped = Stopped(tmp_path, n_shards=1, snapshots=(2, 4, 6), history=True)
    with pytest.raises(
        Unavailable, match=r"^past: the log of shard 0 begins at offset \d+, and there is no history of"
    ):
        list(Past(stopped.path, None).records(0))
    with pytest.raises(ManifestError, match="is none of a cluster"):
        Past(tmp_path, None)
    Manifest.read(stopped.path)
    with pytest.raises(LogDamaged, match=r"^log: .* cannot be read: there is no such file"):
        LogReader(tmp_path / "no")
