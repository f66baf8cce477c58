"""A program: an aggregation, the events that it sees, and the time to read it at; and how near the engine comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from millpond.feature_actors import FeatureView, Field, Source
from millpond.feature_actors.aggregations import Aggregation
from millpond.feature_actors.client import FeatureClient, TimeLimits
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.ports import LocalIngest, LocalRead, complete
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap

__all__ = ["Program", "error_of", "share_of"]

_source = Source(
    "programs",
    owner="bench",
    fields={
        "of": "int64",
        "v": Field("float64", optional=True),
        "kind": Field("string", optional=True),
        "holds": "bool",
        "at": "timestamp[ms, UTC]",
    },
    event_time="at",
)
_INPUTS = {"value": "v", "hash": "v", "category": "kind", "truth": "holds"}


class Program(NamedTuple):
    """seen: time in ms and value of the events that the feature sees, as they arrive, all by as_of_ms; the value is as
    `plain` gets it. The aggregation is of field `v`, by `kind`, or of the condition `holds`."""

    aggregation: Aggregation
    seen: Sequence[tuple[int, Any]]
    as_of_ms: int

    def __str__(self) -> str:
        kind = self.aggregation
        own = [(one.name, getattr(kind, one.name)) for one in fields(kind)]
        settings = ", ".join(f"{name}={value}" for name, value in own if value is not None and value is not False)
        return f"{type(kind).__name__}({settings}) of {len(self.seen):,} events"


def error_of(program: Program) -> tuple[float, float]:
    """Return how far the engine's answer is from the definition, and how far it may be; of several columns, that which
    is furthest."""
    aggregation, seen, as_of = program
    view = FeatureView("program", owner="bench", source=_source, key=["of"], features={"f": aggregation})
    layout, shard_map = compile_layout([], [view]), ShardMap.even(4, 1)
    shard = Shard(layout, shard_map, 0)
    client = FeatureClient(
        layout, shard_map, LocalIngest([shard]), LocalRead([shard]), ManualClock(as_of), TimeLimits()
    )
    shard.apply(_source.name, _batch(program), np.full(len(seen), as_of), as_of)
    plan = ReadPlan(layout, list(view), "a program")
    got = complete(client.read(plan, plan.key_columns([{"of": 1}], batch=False), 1, as_of)).matrix[0].tolist()
    want = aggregation.plain(seen, as_of)
    slack, furthest = aggregation.slack(seen, as_of), 0.0
    for g, w in zip(got, want if isinstance(want, list) else [want], strict=True):
        furthest = max(furthest, _distance(aggregation, g, w, seen) if slack else _differs(g, w))
    return furthest, slack


def share_of(program: Program) -> float:
    """Return the error as a share of what is stated: above 1 is wrong; NaN where nothing is stated."""
    error, bound = error_of(program)
    if math.isinf(bound):
        return math.nan
    return 0.0 if error == 0 else error / bound if bound else math.inf


def _differs(got: float, want: float) -> float:
    return 0.0 if got == want or (math.isnan(got) and math.isnan(want)) else abs(got - want) or math.inf


def _distance(aggregation: Aggregation, got: float, want: float, seen: Sequence[tuple[int, Any]]) -> float:
    if _differs(got, want) == 0:
        return 0.0
    distance = abs(aggregation.worth(got, seen) - aggregation.worth(want, seen))
    return math.inf if math.isnan(distance) else distance


def _batch(program: Program) -> pa.RecordBatch:
    n, inputs = len(program.seen), program.aggregation.inputs
    columns: dict[str, Any] = {"of": [1] * n, "v": [None] * n, "kind": [None] * n, "holds": [False] * n}
    for place, one in enumerate(inputs):
        columns[_INPUTS[one.kind]] = [x[place] if len(inputs) > 1 else x for _, x in program.seen]
    columns["at"] = [time for time, _ in program.seen]
    return pa.RecordBatch.from_pydict(columns, schema=_source.schema)
