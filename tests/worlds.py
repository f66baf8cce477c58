"""Random worlds: declarations, events in the order of the log, times to read at. For Hypothesis."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import strategies as st

from millpond.feature_actors import Derived, FeatureView, Field, Ratio, Source
from millpond.feature_actors.aggregations import AGGREGATIONS, Aggregation
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
#: In so long the 32 bits of the number of a 10 ms tile have come round.
ROUND_MS = 10 * 2**32
KEYS = (["user"], ["code"], ["user", "code"], ["code", "small", "user"], ["small"])
WINDOWS = ("1s", "1500ms", "59s", "60s", "90s", "5m", "1h", "24h", "7d", "30d", "90d")
TTLS = ("1s", "60500ms", "1h", "2d", "90d")
NUMERIC = ("v", "i", "f32", "flag")
TEXTS = ("code", "id")
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
    0, 0, 0, 0, 0, 0, 1, 2, 999, 1000, 1700, 59_000, 60_000, 110_000, HOUR, HOUR + 1, 100 * 60_000, DAY, 7 * DAY,
    90 * DAY, 120 * DAY, ROUND_MS, 5 * 365 * DAY, -1, -AHEAD_MS_MAX, -AHEAD_MS_MAX, -AHEAD_MS_MAX,
)
GAPS_MS = (
    0, 0, 0, 0, 1, 700, 61_000, HOUR, HOUR + 3_000_000, DAY, DAY + 1, DAY + 3_000_000, 2 * DAY, 31 * DAY, 91 * DAY,
    ROUND_MS, 12 * 365 * DAY,
)
# fmt: on


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
    """views: the declarations. batches: (source name, now_ms, events), events with `arrival_ms`. reclaims: after which
    batches everything is reclaimed that is out of sight. n_slots: few, so that entities share them."""

    views: list[FeatureView]
    batches: list[tuple[str, int, list[dict[str, Any]]]]
    reclaims: frozenset[int] = frozenset()
    n_slots: int = 16

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
    margin = AHEAD_MS_MAX + 60_000
    shards = [Shard(layout, shard_map, i, seed=seed, reclaim_margin_ms=margin) for i in range(n_shards)]
    client = FeatureClient(
        layout, shard_map, LocalIngest(shards), LocalRead(shards), clock or ManualClock(0), TimeLimits()
    )
    return client, shards


# -- strategies


_OF_ALL = {field.name for field in dataclasses.fields(Aggregation)}
#: How an aggregation's own settings are drawn, by their name, with its own before it or without, or by their type.
_SETTINGS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(1, 6),
    float: st.sampled_from((0.1, 0.5, 0.99)),
    bool: st.booleans(),
    "by": st.just("code"),
    "categories": st.sampled_from((("a",), ("ü", "", "a"), ("never", "eight888", "x" * 300))),
    "error": st.sampled_from((0.01, 0.05)),
    "gap": st.sampled_from(("1s", "59s", "1h", "2d")),
    "half_life": st.sampled_from(("1s", "90s", "1h", "30d")),
    "Distinct.m": st.sampled_from((8, 16, 128)),
    "Quantile.m": (_BUCKETS := st.sampled_from((8, 9, 12, 128))),
    "Median.m": _BUCKETS,
    "q": st.sampled_from((0, 0.000001, 0.25, 0.3, 0.99, 1)),
    "of": st.sampled_from(WHERES),
}


_WINDOWS, _WINDOWS_OR_NONE = st.sampled_from(WINDOWS), st.sampled_from((*WINDOWS, None, None))
_TTLS, _WHERES, _BOOLEANS = st.sampled_from((None, *TTLS)), st.sampled_from((None, None, *WHERES)), st.booleans()
_FIELDS = {
    "number": st.sampled_from(NUMERIC),
    "value": st.sampled_from(NUMERIC + TEXTS),
    "event": st.none(),
    "category": st.just("code"),
}


@cache
def _own_settings(kind: type[Aggregation]) -> dict[str, st.SearchStrategy[Any]]:
    types = typing.get_type_hints(kind)
    return {
        f.name: next(_SETTINGS[by] for by in (f"{kind.__name__}.{f.name}", f.name, types[f.name]) if by in _SETTINGS)
        for f in dataclasses.fields(kind)
        if f.init and f.name not in _OF_ALL
    }


def example(kind: type[Aggregation], window: str | None = None) -> Aggregation:
    """One of each kind, with the settings that it must have."""
    needed = {
        "by": "code",
        "categories": ("a", "ü"),
        "gap": "1h",
        "half_life": "1h",
        "of": pc.field("v") > 0.5,
        "q": 0.9,
    }
    field = {"number": "v", "value": "v", "category": "code", "event": None}[kind.takes]
    own = {f.name for f in dataclasses.fields(kind) if f.init} - _OF_ALL
    return kind(field, window=window, **{name: one for name, one in needed.items() if name in own})


@st.composite
def aggregations(draw: st.DrawFn, kind: type[Aggregation] | None = None) -> Aggregation:
    """Any aggregation: what there is, and what each takes, is asked of the classes."""
    kind = kind or draw(st.sampled_from(AGGREGATIONS))
    window = draw(_WINDOWS if kind.needs_window else _WINDOWS_OR_NONE)
    own = {name: draw(setting) for name, setting in _own_settings(kind).items()}
    # One that has two sizes, such as a k out of m, names the smaller one first.
    sizes = iter(sorted(size for size in own.values() if type(size) is int))
    return kind(
        draw(_FIELDS[kind.takes]),
        window=window,
        ttl=draw(_TTLS) if window is None else None,
        where=draw(_WHERES),
        exact=window is not None and draw(_BOOLEANS),
        **{name: next(sizes) if type(one) is int else one for name, one in own.items()},
    )


def _last_column(values: np.ndarray) -> np.ndarray:
    return values if values.ndim == 1 else values[:, -1]


def _largest(*columns: np.ndarray) -> np.ndarray:
    return np.max([c if c.ndim == 1 else c.max(axis=1) for c in columns], axis=0)


#: Functions of derived features, how many features they take, and whether of several columns.
FUNCTIONS: tuple[tuple[Callable[..., Any], int, bool], ...] = (
    (np.log1p, 1, False), (np.sqrt, 1, False), (np.isnan, 1, False), (np.nan_to_num, 1, False), (np.tanh, 1, False),
    (np.subtract, 2, False), (np.hypot, 2, False), (np.greater, 2, False), (lambda a, b: a * 1e-3 + b**2, 2, False),
    (_last_column, 1, True), (_largest, 2, True), (_largest, 3, True),
)  # fmt: skip


@st.composite
def derived(draw: st.DrawFn, numbers: list[str], wide: list[str]) -> Derived:
    """A feature of others: numbers have one column, wide ones several."""
    if numbers and draw(st.booleans()):
        return Ratio(draw(st.sampled_from(numbers)), draw(st.sampled_from(numbers)))
    function, n, takes_wide = draw(st.sampled_from([f for f in FUNCTIONS if numbers or f[2]]))
    return Derived(function, *(draw(st.sampled_from(numbers + wide * takes_wide)) for _ in range(n)))


@st.composite
def views(draw: st.DrawFn, name: str, of: Source) -> FeatureView:
    features: dict[str, Aggregation | Derived] = {f"f{i}": draw(aggregations()) for i in range(draw(st.integers(1, 5)))}
    of_numbers = {f: a for f, a in features.items() if a.field not in TEXTS or a.gives_numbers}
    numbers = [f for f, a in of_numbers.items() if a.width == 1]
    wide = [f for f, a in of_numbers.items() if a.width > 1]
    for i in range(draw(st.integers(0, 2)) if numbers or wide else 0):
        features[f"d{i}"] = draw(derived(numbers, wide))
        numbers.append(f"d{i}")
    return FeatureView(
        name,
        owner="tests",
        source=of,
        key=list(draw(st.sampled_from(KEYS))),
        features=features,
        where=draw(_WHERES),
    )


@st.composite
def declarations(draw: st.DrawFn) -> list[FeatureView]:
    names = ("first", "second")[: draw(st.integers(1, 2))]
    sources = [source(name, draw(st.sampled_from(["id", "num", None]))) for name in names]
    return [draw(views(f"view{i}", draw(st.sampled_from(sources)))) for i in range(draw(st.integers(1, 3)))]


_FLAGS, _FLOAT32S = (False, True), (0.0, 0.1, -2.5, 3e38, 1e-45, None)
_SMALL = (-32768, 0, 2, 3, 32767)
#: What an event is drawn from, a byte each; an edge: its time is snapped down to an edge of this width, or is not.
_CHOICES: tuple[Sequence[Any], ...] = (
    LAGS_MS, tuple(e for width in LADDER_MS for e in (0, width)), (0, 0, -1), USERS, CODES, _SMALL, FLOATS, INTS,
    _FLOAT32S, _FLAGS, ("new", "new", "new", "new", "again", "conflict"), range(150),
)  # fmt: skip


@st.composite
def worlds(draw: st.DrawFn, *, events_max: int = 150) -> World:
    declared = draw(declarations())
    sources = {v.source.name: v.source for v in declared}
    now_ms = draw(st.sampled_from((0, -5_000_000_007, 1_700_000_000_000, 1_700_000_006_543)))
    sent: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    batches = []
    n = min(draw(st.sampled_from((0, 3, 12, 40, 90, 150))), events_max)
    # All events in one draw: a draw for each of their fields takes longer than all that is tested.
    drawn = draw(st.binary(min_size=n * len(_CHOICES), max_size=n * len(_CHOICES)))
    points = [drawn[i : i + len(_CHOICES)] for i in range(0, len(drawn), len(_CHOICES))]
    while points:
        size = draw(st.integers(1 + len(points) // 4, len(points)))
        now_ms += draw(st.sampled_from(GAPS_MS))
        name = draw(st.sampled_from(sorted(sources)))
        batches.append((name, now_ms, [_event(p, now_ms, sent[name]) for p in points[:size]]))
        points = points[size:]
    reclaims = frozenset(i for i in range(len(batches)) if draw(st.booleans()))
    return World(declared, batches, reclaims, draw(st.sampled_from((4, 16))))


def _event(point: bytes, now_ms: int, sent: list[dict[str, Any]]) -> dict[str, Any]:
    lag, edge, step, user, code, small, v, i, f32, flag, what, which = (
        choices[byte % len(choices)] for byte, choices in zip(point, _CHOICES, strict=True)
    )
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
