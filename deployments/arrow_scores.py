"""Arrow in and out of `POST /v1/score/{model}`: key columns in, a column of results out.

Promises: a stream of ids means what the same ids mean as JSON, and what is wrong with them is told in the same words,
with the row; an answer in Arrow says what the answer in JSON says, row by row in the order of the ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millpond.deployments.http import Response
from millpond.deployments.lane import Lane, Scored
from millpond.feature_actors.arrow_stream import ArrowStream
from millpond.feature_actors.errors import BadRequest, TooLarge
from millpond.feature_actors.plan import KEY_BYTES_MAX, ReadPlan
from millpond.feature_actors.view import Feature
from millpond.models.model import PredictionFailed

__all__ = ["ARROW_TYPE", "arrow_answer", "arrow_body", "keys_of", "wants_arrow"]

ARROW_TYPE = "application/vnd.apache.arrow.stream"

_AS_OF_TYPE = pa.timestamp("ms", "UTC")
_encode_json = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class _Limits:
    """Of a stream of ids; its bytes are those of dictionaries that are written out."""

    rows_max: int
    batches_max: int = 1_000
    arrow_bytes_max: int = 64 * 1024 * 1024


def wants_arrow(content_type: str | None, accept: str | None) -> bool:
    """Return whether to answer in Arrow: where `accept` names it; else in the form of the body, if `accept` allows.

    >>> wants_arrow("application/json", ARROW_TYPE), wants_arrow("application/json", "*/*")
    (True, False)
    >>> wants_arrow(ARROW_TYPE, "*/*"), wants_arrow(ARROW_TYPE, "application/json")
    (True, False)
    """
    accepted = {one.partition(";")[0].strip().lower() for one in (accept or "*/*").split(",")}
    return ARROW_TYPE in accepted or (content_type == ARROW_TYPE and "application/json" not in accepted)


def keys_of(plan: ReadPlan, body: bytes, ids_max: int) -> tuple[dict[str, list[Any]], int]:
    """Decode an Arrow IPC stream of ids; return one checked list per key field, as `ReadPlan.key_columns` does, and n.

    An int64 field may come as any integer type or as its digits, a string field as a dictionary.

    Raises `TooLarge`; `BadRequest` with code `bad_arrow` if it is no such stream, and for ids that are wrong as
    `ReadPlan.key_columns` does.
    """

    def too_large(limit: str, got: str) -> NoReturn:
        if limit == "rows_max":
            raise TooLarge(f"body: {got}; allowed are {ids_max} in a request")
        raise TooLarge(f"body: {got}; `{limit}` is {getattr(limits, limit)}; send fewer ids at a time")

    limits = _Limits(ids_max)
    try:
        stream = ArrowStream(body, limits, "ids", too_large)
        _check_columns(plan, stream.schema)
        received, n = stream.columns()
    except (pa.ArrowException, ValueError, TypeError, OSError, MemoryError, struct.error) as error:
        reason = str(error).partition("\n")[0][:200].encode("utf-8", "backslashreplace").decode()
        raise BadRequest(
            f"body: not an Arrow IPC stream that can be read: {reason}", path="$", code="bad_arrow"
        ) from None
    columns = {name: _plain_keys(received[name], kind) for name, kind in plan.key_fields.items()}
    if all(column is not None for column in columns.values()):
        return columns, n  # type: ignore[return-value]
    # What is not plain is judged value by value, in the words that JSON is judged in.
    values = zip(*(array.to_pylist() for array in received.values()), strict=True)
    return plan.key_columns([dict(zip(received, one, strict=True)) for one in values], batch=True), n


def _check_columns(plan: ReadPlan, schema: pa.Schema) -> None:
    """Refuse columns that are no key field, and types that no value of a key field has."""
    named = {name: "" if plan.key_fields.get(name) == "string" else 0 for name in schema.names}
    plan.key_columns([named], batch=True)
    for column in schema:
        path = f"$[*].{column.name}"
        if schema.names.count(column.name) > 1:
            raise BadRequest(
                f"{plan.subject}: column `{column.name}` comes twice; allowed is once", path=path, code="bad_id"
            )
        if not _may_hold_keys(column.type):
            raise BadRequest(
                f"{plan.subject}: expected `{column.name}` as {plan.key_fields[column.name]}, "
                f"got a column of {str(column.type)[:80]}",
                path=path,
                code="bad_id",
            )


def _may_hold_keys(given: pa.DataType) -> bool:
    is_ = pa.types
    text = given.value_type if is_.is_dictionary(given) else given
    return bool(is_.is_string(text) or is_.is_large_string(text) or is_.is_integer(given) or is_.is_null(given))


def _plain_keys(array: pa.Array, kind: str) -> list[Any] | None:
    """Return a column of good keys as a list; None if its values have to be looked at one by one."""
    if array.null_count:
        return None
    if kind == "int64" and pa.types.is_integer(array.type) and not pa.types.is_uint64(array.type):
        return array.to_numpy().tolist()  # type: ignore[no-any-return]
    text = kind == "string" and len(array) > 0 and not pa.types.is_integer(array.type)
    if text and pc.max(pc.binary_length(array)).as_py() <= KEY_BYTES_MAX:
        return array.to_pylist()  # type: ignore[no-any-return]
    return None


def arrow_answer(model: str, answered: Sequence[tuple[Lane, Scored, int]], ids: Sequence[str]) -> Response:
    """Return what `Served.ask` returned as an Arrow IPC stream; ids: of the answers. See `arrow_body`."""
    scored_of = {id(scored): scored for _, scored, _ in answered}
    as_of = {key: scored.rows.as_of.tolist() for key, scored in scored_of.items()}
    values = [scored.values[row] for _, scored, row in answered if scored.values is not None]
    lanes = {id(lane): lane for lane, _, _ in answered} if values else {}
    body = arrow_body(
        model,
        [lane.loaded.model.version for lane, _, _ in answered],
        ids,
        [scored.results[row] for _, scored, row in answered],
        [as_of[id(scored)][row] for _, scored, row in answered],
        [scored.rows.unknown[row] for _, scored, row in answered],
        {f.full_name: f for lane in lanes.values() for f in lane.loaded.plan.features}.values(),
        values,
    )
    return Response(200, body, ARROW_TYPE)


def arrow_body(
    model: str,
    versions: Sequence[str],
    ids: Sequence[str],
    results: Sequence[Any],
    as_of: Sequence[int],
    unknown: Sequence[Sequence[str]],
    features: Iterable[Feature] = (),
    values: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """Return n scores as an Arrow IPC stream: what the answers in JSON have, in columns.

    Columns: `id` string, `version` dictionary of strings, `result`, `as_of` timestamp[ms, UTC], `unknown` list of
    strings, `error` string, why there is no result, which is null then; then each of the `features` by its full name,
    from `values` as `ReadPlan.named_values` returns them, null where it is empty. `result` is float64 if every result
    is a number that float64 holds, or null; else a string, the JSON of the result. The schema's metadata has the
    `model`, and as `result` the word `number` or `json`.
    """
    times = np.array(as_of, np.int64)
    columns: dict[str, pa.Array] = {
        "id": pa.array(ids, pa.string()),
        "version": pa.array(versions, pa.string()).dictionary_encode(),
        "result": _results(results),
        "as_of": pa.array(times, pa.int64(), mask=times < 0).view(_AS_OF_TYPE),
        "unknown": pa.array(unknown, pa.list_(pa.string())),
        "error": pa.array([r.message if type(r) is PredictionFailed else None for r in results], pa.string()),
    }
    for feature in features:
        kind = pa.string() if feature.is_text else pa.float64()
        kind = kind if feature.width == 1 else pa.list_(kind)
        columns[feature.full_name] = pa.array([v.get(feature.full_name) for v in values], kind, from_pandas=True)
    form = "number" if pa.types.is_float64(columns["result"].type) else "json"
    batch = pa.RecordBatch.from_pydict(columns, metadata={"model": model, "result": form})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _results(results: Sequence[Any]) -> pa.Array:
    # `True` would become 1.0, and a number of more than 53 bits loses digits: Arrow refuses that one itself.
    if not any(type(result) is bool for result in results):
        try:
            return pa.array([None if type(r) is PredictionFailed else r for r in results], pa.float64())
        except (pa.ArrowException, TypeError):
            pass
    texts = [None if type(r) is PredictionFailed else _encode_json(r).decode() for r in results]
    return pa.array(texts, pa.string())
