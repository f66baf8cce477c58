"""Random worlds: declarations, events in the order of the log, times to read at. For Hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import strategies as st

from millpond.feature_actors import Count, FeatureView, Field, Last, Max, Mean, Min, SecondsSince, Source, Sum
from millpond.feature_actors.client import FeatureClient, TimeLimits
from millpond.feature_actors.clock import Clock, ManualClock
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.ports import LocalIngest, LocalRead
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.windows import LADDER_MS

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
HOUR, DAY = 3_600_000, 86_400_000
AHEAD_MS_MAX = 600_000
KEYS = (["user"], ["code"], ["user", "code"], ["code", "small", "user"], ["small"])
WINDOWS = ("1s", "1500ms", "59s", "60s", "90s", "5m", "1h", "24h", "7d", "30d", "90d")
TTLS = ("1s", "60500ms", "1h", "2d", "90d")
NUMERIC = ("v", "i", "f32", "flag")
WHERES = (
    pc.field("v") > 0.5,
    pc.field("code") == "a",
    pc.field("flag") & (pc.field("i") > 0),
    pc.field("code").isin(["", "a", "ü"]),
    pc.field("i").is_valid(),
    pc.field("small") / 2 > 1,
    pc.field("small") / 2.0 > 1,
)
USERS = (0, 0, 0, 0, 1, 1, -1, 7, INT64_MIN, INT64_MAX, None)
CODES = ("", "a", "a", "a", "ü", "日本語🐟", "x" * 300, "eight888", "nine99999", None)
FLOATS = (0.0, -0.0, 1.0, 0.1, 0.5, 0.7, -3.25, 1e300, -1e300, 5e-324, 1e-300, 123456789.123, None)
INTS = (0, 1, -1, 3, INT64_MIN, INT64_MAX, None)
# fmt: off
LAGS_MS = (
    0, 0, 0, 0, 0, 0, 1, 2, 999, 1000, 59_000, 60_000, HOUR, HOUR + 1, DAY, 7 * DAY, 90 * DAY, 120 * DAY,
    -1, -AHEAD_MS_MAX, -AHEAD_MS_MAX, -AHEAD_MS_MAX,
)
# fmt: on
GAPS_MS = (0, 0, 0, 0, 1, 700, 61_000, HOUR, DAY, DAY + 1, 2 * DAY, 31 * DAY, 91 * DAY)


def source(name: str, event_id: str | None, version: int = 1) -> Source:
    return Source(
        name,
        owner="tests",
        fields={
            "id": "string",
            "num": "int64",
            "at": "timestamp[ms, UTC]",
            "user": Field("int64", optional=True),
            "code": Field("string", optional=True),
            "small": "int16",
            "v": Field("float64", optional=True),
            "i": Field("int64", optional=True),
            "f32": Field("float32", optional=True),
            "flag": "bool",
        },
        event_time="at",
        event_id=event_id,
        version=version,
    )


@dataclass
class World:
    """views: the declarations. batches: (source name, now_ms, events), events with `arrival_ms`."""

    views: list[FeatureView]
    batches: list[tuple[str, int, list[dict[str, Any]]]]

    @property
    def layout(self) -> Layout:
        return compile_layout([], self.views)

    def events(self, source_name: str) -> list[dict[str, Any]]:
        return [e for name, _, events in self.batches for e in events if name == source_name]

    @property
    def now_ms(self) -> int:
        return self.batches[-1][1] if self.batches else 0


def batch(of: Source, events: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    rows = [{name: e[name] for name in of.fields} for e in events]
    return pa.RecordBatch.from_pylist(rows, schema=of.schema)


def cluster(
    layout: Layout, n_shards: int = 1, clock: Clock | None = None, *, n_slots: int = 16, seed: int = 0
) -> tuple[FeatureClient, list[Shard]]:
    """N plain shards in this process, and a client of them."""
    shard_map = ShardMap.even(n_slots, n_shards)
    shards = [Shard(layout, shard_map, i, seed=seed) for i in range(n_shards)]
    client = FeatureClient(
        layout, shard_map, LocalIngest(shards), LocalRead(shards), clock or ManualClock(0), TimeLimits()
    )
    return client, shards


# -- strategies


@st.composite
def aggregations(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from([Count, Sum, Mean, Min, Max, Last, SecondsSince]))
    length = draw(st.one_of(st.sampled_from(WINDOWS), st.none()))
    ttl = draw(st.one_of(st.none(), st.sampled_from(TTLS))) if length is None else None
    where = draw(st.one_of(st.none(), st.sampled_from(WHERES)))
    args = (draw(st.sampled_from(NUMERIC)),) if kind.takes_field else ()
    return kind(*args, window=length, ttl=ttl, where=where)


@st.composite
def declarations(draw: st.DrawFn) -> list[FeatureView]:
    sources = [
        source(name, draw(st.sampled_from(["id", "num", None])))
        for name in ("first", "second")[: draw(st.integers(1, 2))]
    ]
    return [
        FeatureView(
            f"view{number}",
            owner="tests",
            source=draw(st.sampled_from(sources)),
            key=list(draw(st.sampled_from(KEYS))),
            features={f"f{i}": draw(aggregations()) for i in range(draw(st.integers(1, 5)))},
            where=draw(st.one_of(st.none(), st.sampled_from(WHERES))),
        )
        for number in range(draw(st.integers(1, 3)))
    ]


_POINTS = st.tuples(
    st.sampled_from(LAGS_MS),
    st.one_of(st.just(0), st.just(0), st.sampled_from(LADDER_MS)),  # snapped down to an edge of this width, or not
    st.sampled_from((0, 0, -1)),
    st.sampled_from(USERS),
    st.sampled_from(CODES),
    st.sampled_from((-32768, 0, 2, 3, 32767)),
    st.sampled_from(FLOATS),
    st.sampled_from(INTS),
    st.sampled_from((0.0, 0.1, -2.5, 3e38, 1e-45, None)),
    st.booleans(),
    st.sampled_from(("new", "new", "new", "new", "again", "conflict")),
    st.integers(0, 149),
)


@st.composite
def worlds(draw: st.DrawFn, *, events_max: int = 150) -> World:
    views = draw(declarations())
    sources = {v.source.name: v.source for v in views}
    now_ms = draw(st.sampled_from((0, -5_000_000_007, 1_700_000_000_000, 1_700_000_006_543)))
    sent: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    batches = []
    # A list of any size is a short one, by Hypothesis' own lights: say the size.
    n = min(draw(st.sampled_from((0, 3, 12, 40, 90, 150))), events_max)
    points = draw(st.lists(_POINTS, min_size=n, max_size=n))
    while points:
        size = draw(st.integers(1 + len(points) // 4, len(points)))
        now_ms += draw(st.sampled_from(GAPS_MS))
        name = draw(st.sampled_from(sorted(sources)))
        batches.append((name, now_ms, [_event(p, now_ms, sent[name]) for p in points[:size]]))
        points = points[size:]
    return World(views, batches)


def _event(point: tuple[Any, ...], now_ms: int, sent: list[dict[str, Any]]) -> dict[str, Any]:
    lag, edge, step, user, code, small, v, i, f32, flag, what, which = point
    at = now_ms - lag
    if edge:
        at = at // edge * edge + step
    number = len(sent)
    event = {
        "id": f"e{number}", "num": number, "at": at, "user": user, "code": code, "small": small,
        "v": v, "i": i, "f32": None if f32 is None else _float32(f32), "flag": flag,
    }  # fmt: skip
    if what != "new" and sent:
        old = sent[which % len(sent)]
        event = dict(old) if what == "again" else {**event, "id": old["id"], "num": old["num"]}
    event["arrival_ms"] = now_ms
    sent.append(event)
    return event


def _float32(value: float) -> float:
    return pa.scalar(value, pa.float32()).as_py()  # type: ignore[no-any-return]
