"""Training sets: labels joined to features as of the label's time, by the shards that also serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.decode import Decoder
from millpond.feature_actors.dedupe import NEW
from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.plan import Answer, FeatureRows, Question, ReadPlan
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import Feature

__all__ = ["training_set"]

Ints = npt.NDArray[np.int64]


def training_set(
    features: Sequence[Feature],
    events: Mapping[str, pa.Table],
    labels: pa.Table,
    *,
    as_of: str = "as_of",
    n_shards: int = 1,
) -> FeatureRows:
    """Return the features of each label row as the cluster would have served them at its time.

    events: raw events by source name, in order of arrival; each arrives at its event time. They are
        taken as the events app takes them: checked, defaults filled, duplicates and conflicts dropped.
    labels: the key fields of the features and the column `as_of`, a timestamp; any order.

    This is the point-in-time join: a row sees every event up to and at its as-of, and none after.
    Raises `BadRequest` if a column is missing, a value does not fit or events are not in time order.
    """
    layout = compile_layout([], {f.view.name: f.view for f in features}.values())
    plan = ReadPlan(layout, features, "training set")
    for column in (*plan.key_fields, as_of):
        if column not in labels.column_names:
            raise BadRequest(f"training set: labels have no column `{column}`; they have {labels.column_names}")
        if labels[column].null_count:
            row = pc.index(labels[column].is_null(), True).as_py()
            raise BadRequest(f"training set: label without `{column}`", path=f"$[{row}].{column}")
    batches = {name: _admitted(layout, *_in_order(layout, source, events)) for name, source in layout.sources.items()}
    label_times = _label_times(labels[as_of], as_of)
    order = np.argsort(label_times, kind="stable")
    sorted_labels = labels.take(pa.array(order))
    keys: dict[str, Any] = {
        name: _label_keys(sorted_labels[name], name, kind) for name, kind in plan.key_fields.items()
    }
    shard_map = ShardMap.even(64, n_shards)
    times = label_times[order]
    question = plan.question(keys, labels.num_rows, None, times)
    rows = plan.rows(_joined(layout, shard_map, question, batches))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    places = back.tolist()
    texts = {name: [column[i] for i in places] for name, column in rows.texts.items()}
    return FeatureRows(rows.matrix[back], times[back], [rows.unknown[i] for i in places], texts)


def _joined(
    layout: Layout, shard_map: ShardMap, question: Question, batches: Mapping[str, tuple[pa.RecordBatch, Ints]]
) -> Answer:
    """Answer a question by one shard after the other, each of which fills in what is its own."""
    whole: Answer | None = None
    for number in range(shard_map.n_shards):
        whole = Shard(layout, shard_map, number).join(question, batches, whole)
    assert whole is not None
    return whole


def _label_times(column: pa.ChunkedArray, name: str) -> Ints:
    """Return the as-of of the labels, int64 [n] milliseconds; refuse what is none or would be cut."""
    if not pa.types.is_timestamp(column.type):
        raise BadRequest(f"training set: column `{name}` of the labels is `{column.type}`; expected a timestamp")
    given = column.combine_chunks()
    try:
        times = given.cast(pa.timestamp("ms", given.type.tz))
    except pa.ArrowInvalid:
        cut = given.cast(pa.timestamp("ms", given.type.tz), safe=False).cast(given.type, safe=False)
        row = pc.index(pc.equal(cut, given), False).as_py()
        raise BadRequest(
            f"training set: label with `{name}` {given[row].value} {given.type.unit}, which is not of whole "
            "milliseconds; round it",
            path=f"$[{row}].{name}",
        ) from None
    return times.cast(pa.int64()).to_numpy()  # type: ignore[no-any-return]


def _label_keys(column: pa.ChunkedArray, name: str, kind: str) -> pa.Array:
    """Return a key field of the labels as the type that it has in the events."""
    given = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    texts = pa.types.is_string(given) or pa.types.is_large_string(given) or pa.types.is_string_view(given)
    if not (texts if kind == "string" else pa.types.is_integer(given)) and len(column):
        raise BadRequest(f"training set: column `{name}` of the labels is `{column.type}`; expected `{kind}`")
    try:
        return column.cast(given).cast(pa.string() if kind == "string" else pa.int64()).combine_chunks()
    except pa.ArrowInvalid as error:
        raise BadRequest(f"training set: column `{name}` of the labels does not fit `{kind}`: {error}") from None


def _in_order(layout: Layout, source: Source, events: Mapping[str, pa.Table]) -> tuple[Source, pa.RecordBatch, Ints]:
    """Return a source, its events as one batch of its schema and their arrival stamps."""
    if source.name not in events:
        raise BadRequest(f"training set: no events of source `{source.name}`; given are {sorted(events)}")
    given = events[source.name]
    for name, field in source.fields.items():
        if name not in given.column_names and not field.optional and field.default is None:
            raise BadRequest(
                f"training set: events of `{source.name}` have no column `{name}`; they have {given.column_names}"
            )
    key_fields = {name for table in layout.tables_of(source.name) for name in table.key}
    batch = Decoder(source, key_fields=key_fields).from_table(given)
    times = batch.column(source.event_time).cast(pa.int64()).to_numpy()
    if (backwards := np.flatnonzero(np.diff(times) < 0)).size:
        raise BadRequest(
            f"training set: events of `{source.name}` are not in time order; sort them by `{source.event_time}`",
            path=f"$[{int(backwards[0]) + 1}].{source.event_time}",
        )
    return source, batch, times


def _admitted(layout: Layout, source: Source, batch: pa.RecordBatch, times: Ints) -> tuple[pa.RecordBatch, Ints]:
    """Return the first event of each event id: what the ids' homes let through, whatever the keys are."""
    n = batch.num_rows
    if source.event_id is None or n == 0:
        return batch, times
    ids = hash_columns([batch.column(source.event_id)], n)
    contents = hash_columns(batch.columns, n)[:, 0].view(np.int64)
    verdicts = Shard(layout, ShardMap.even(1, 1), 0).admit(source.name, ids, contents, 0)
    if (verdicts == NEW).all():
        return batch, times
    first = np.flatnonzero(verdicts == NEW)
    return batch.take(pa.array(first)), times[first]
