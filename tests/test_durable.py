"""What a shard has acknowledged is there after a crash at any step, exactly once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine_vs_oracle import keys_of, plan_of, read
from worlds import AHEAD_MS_MAX, World, batch, worlds

from millpond.feature_actors import Count, FeatureView, Field, Last, Source, Sum
from millpond.feature_actors.client import FeatureClient, TimeLimits
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.durable import DurableShard
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.log.log import Log, LogFull
from millpond.feature_actors.ports import LocalRead, complete
from millpond.feature_actors.shard import Prepared, Shard
from millpond.feature_actors.shard_map import ShardMap

#: Where a crash can come: before the log is written, after it but before the tiles, after both but before the ack.
STEPS = ("before append", "after append", "after commit")


class Crash(Exception):
    """The process of a shard ends here."""


class Cluster:
    """Durable shards in this process, in folders; `crash` and `full` say at which step the next write fails."""

    def __init__(self, layout: Layout, n_shards: int, folder: Path, n_slots: int = 16) -> None:
        self.layout, self.folder = layout, folder
        self.shard_map = ShardMap.even(n_slots, n_shards)
        self.clock = ManualClock(0)
        self.crash: str | None = None
        self.full = False
        self.open()

    def open(self) -> None:
        """Start every shard anew from its log; what was in memory is gone, and nothing was closed."""
        self.shards = []
        for number in range(self.shard_map.n_shards):
            log = Log(self.folder / str(number), "process")
            shard = Shard(self.layout, self.shard_map, number, reclaim_margin_ms=AHEAD_MS_MAX + 60_000)
            self.shards.append(DurableShard(self.layout, shard, log))
            self.shards[-1].recover()
        plain = [d.shard for d in self.shards]
        self.client = FeatureClient(
            self.layout, self.shard_map, self, LocalRead(plain), self.clock, TimeLimits(ahead_ms_max=AHEAD_MS_MAX)
        )

    # -- the ingest port

    def admit(self, shard: int, *request: Any) -> Awaitable[Any]:
        return self._write(shard, self.shards[shard].shard.prepare_admit(*request))

    def apply(self, shard: int, *request: Any) -> Awaitable[Any]:
        return self._write(shard, self.shards[shard].shard.prepare_apply(*request))

    def ingest(self, shard: int, *request: Any) -> Awaitable[Any]:
        return self._write(shard, self.shards[shard].shard.prepare_ingest(*request))

    async def _write(self, shard: int, prepared: Prepared) -> Any:
        durable = self.shards[shard]
        if self.full:
            self.full = False
            durable.shard.undo(prepared)
            raise LogFull("log: no room")
        self._step("before append")
        durable.append([prepared])
        self._step("after append")
        durable.shard.commit(prepared)
        self._step("after commit")
        return prepared.verdicts

    def _step(self, name: str) -> None:
        if self.crash == name:
            self.crash = None
            raise Crash(name)

    def send(self, name: str, now_ms: int, events: Sequence[dict[str, Any]]) -> Any:
        self.clock.ms = now_ms
        return complete(self.client.ingest(name, batch(self.client.layout.source(name), list(events))))


def everything(client: FeatureClient, world: World) -> list[Any]:
    answers = []
    for view in world.views:
        rows = read(client, plan_of(client, view), keys_of(view, world.events(view.source.name), most=50))
        matrix = np.where(np.isnan(rows.matrix), np.nan, rows.matrix)
        answers.append((matrix.tobytes(), rows.as_of.tobytes(), rows.unknown, rows.texts))
    return answers


def has_ids(views: Sequence[FeatureView], name: str) -> bool:
    return next(v for v in views if v.source.name == name).source.event_id is not None


@given(world=worlds(events_max=60), data=st.data())
def test_after_crashes_at_any_step_and_retries_all_is_as_if_nothing_had_happened(
    world: World, data: st.DataObject
) -> None:
    n_shards = data.draw(st.sampled_from([1, 1, 3]))
    folder = Path(tempfile.mkdtemp())
    try:
        calm = Cluster(world.layout, n_shards, folder / "calm")
        stormy = Cluster(world.layout, n_shards, folder / "stormy")
        for name, now_ms, events in world.batches:
            want = calm.send(name, now_ms, events)
            # Without event ids a request that is sent again is counted again where it had got into the log.
            faults = ["restart", *STEPS, "full"] if has_ids(world.views, name) else ["restart"]
            failed = False
            for fault in data.draw(st.lists(st.sampled_from(faults), min_size=1, max_size=3)):
                failed = failed or fault in STEPS or (fault == "full" and n_shards > 1)
                if fault == "restart":
                    stormy.open()
                elif fault == "full":
                    stormy.full = True
                    with pytest.raises(LogFull):
                        stormy.send(name, now_ms, events)
                elif fault:
                    stormy.crash = fault
                    with pytest.raises(Crash):
                        stormy.send(name, now_ms, events)
                    stormy.open()
            got = stormy.send(name, now_ms, events)
            if not failed:  # else what had got into the log is counted as a duplicate
                assert got == want
        stormy.open()
        stormy.clock.ms = calm.clock.ms
        assert everything(stormy.client, world) == everything(calm.client, world)
        assert [d.shard.check() for d in stormy.shards] == [[]] * n_shards
        assert [d.shard.status().entities for d in stormy.shards] == [d.shard.status().entities for d in calm.shards]
    finally:
        shutil.rmtree(folder)


def test_events_from_before_a_field_was_added_are_read_with_its_default_or_null(tmp_path: Path) -> None:
    def declared(**more: Any) -> tuple[Source, FeatureView]:
        fields = {"id": "string", "user": "int64", "at": "timestamp[ms, UTC]", **more}
        of = Source("orders", owner="tests", fields=fields, event_id="id", event_time="at")
        features: dict[str, Any] = {"n": Count()}
        if more:
            features |= {"total": Sum("price"), "last": Last("code")}
        return of, FeatureView("v", owner="tests", source=of, key=["user"], features=features)

    for number, more in enumerate(
        ({}, {"price": Field("float64", default=2.5), "code": Field("string", optional=True)})
    ):
        of, view = declared(**more)
        cluster = Cluster(compile_layout([], [view]), 1, tmp_path)
        event = {"id": f"e{number}", "user": 1, "at": number, "price": 10.0, "code": "x"}
        cluster.send("orders", 10, [{name: event[name] for name in of.fields}])
        cluster.open()
    rows = read(cluster.client, plan_of(cluster.client, view), [(1,)])
    assert (rows.matrix.tolist(), rows.texts) == ([[2.0, 12.5]], {"v.last": ["x"]})
