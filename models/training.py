"""Training sets: labels joined to features as of the label's time, by the shards that also serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import Feature

__all__ = ["training_set"]


def training_set(
    features: Sequence[Feature],
    events: Mapping[str, pa.Table],
    labels: pa.Table,
    *,
    as_of: str = "as_of",
    n_shards: int = 1,
) -> FeatureRows:
    """Return the features of each label row as the cluster would have served them at its time.

    events: raw events by source name, in order of arrival; each arrives at its event time.
    labels: the key fields of the features and the column `as_of`, a timestamp; any order.

    This is the point-in-time join: a row sees every event up to and at its as-of, and none after.
    Raises `BadRequest` if a column is missing or events are not in time order.
    """
    layout = compile_layout([], {f.view.name: f.view for f in features}.values())
    plan = ReadPlan(layout, features, "training set")
    for column in (*plan.key_fields, as_of):
        if column not in labels.column_names:
            raise BadRequest(f"training set: labels have no column `{column}`; they have {labels.column_names}")
        _check_no_null("label", labels[column], column)
    batches = {name: _in_order(layout.source(name), events) for name in layout.sources}
    label_times = _plain(labels[as_of].cast(pa.timestamp("ms", "UTC")), pa.int64()).to_numpy()
    order = np.argsort(label_times, kind="stable")
    sorted_labels = labels.take(pa.array(order))
    keys: dict[str, Any] = {
        name: _plain(sorted_labels[name], pa.string() if kind == "string" else pa.int64())
        for name, kind in plan.key_fields.items()
    }
    shard_map = ShardMap.even(64, n_shards)
    times = label_times[order]
    questions = plan.questions(keys, labels.num_rows, shard_map, None, times)
    answers = {
        number: Shard(layout, shard_map, number).join(question, batches) for number, question in questions.items()
    }
    rows = plan.assemble(labels.num_rows, questions, answers, times)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return FeatureRows(rows.matrix[back], times[back], [rows.unknown[i] for i in back.tolist()])


def _check_no_null(what: str, column: pa.ChunkedArray, name: str) -> None:
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise BadRequest(f"training set: {what} without `{name}`", path=f"$[{row}].{name}")


def _in_order(source: Source, events: Mapping[str, pa.Table]) -> tuple[pa.RecordBatch, npt.NDArray[np.int64]]:
    """Return a source's events as one batch of its schema and their arrival stamps."""
    if source.name not in events:
        raise BadRequest(f"training set: no events of source `{source.name}`; given are {sorted(events)}")
    given = events[source.name]
    for name, field in source.fields.items():
        if name not in given.column_names:
            raise BadRequest(
                f"training set: events of `{source.name}` have no column `{name}`; they have {given.column_names}"
            )
        if not field.optional:
            _check_no_null(f"event of `{source.name}`", given[name], name)
    table = given.select(list(source.fields)).cast(source.schema)
    batch = pa.record_batch([_plain(c, c.type) for c in table.columns], schema=source.schema)
    times = batch.column(source.event_time).cast(pa.int64()).to_numpy()
    if (backwards := np.flatnonzero(np.diff(times) < 0)).size:
        raise BadRequest(
            f"training set: events of `{source.name}` are not in time order; sort them by `{source.event_time}`",
            path=f"$[{int(backwards[0]) + 1}].{source.event_time}",
        )
    return batch, times


def _plain(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return pc.cast(array, kind)
