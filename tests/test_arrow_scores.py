# ruff: noqa: E501  (messages stand whole)
"""Arrow in and out of scores: the same ids and the same answers as in JSON, the same words for what is wrong."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from apps import ARROW, LAYOUT, NOW, VIEWS, Returns, World, churn, make_world, model, offer, purchase, taste
from hypothesis import given
from hypothesis import strategies as st

from millpond.deployments.arrow_scores import arrow_body, keys_of
from millpond.deployments.lane import Lane
from millpond.deployments.served import Models, Served
from millpond.feature_actors.errors import BadRequest, MillpondError, TooLarge
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import KEY_BYTES_MAX, ReadPlan
from millpond.models.model import LoadedModel, PredictionFailed

user_spend, book_sales, user_book, _ = VIEWS
PLANS = {
    "user": ReadPlan(LAYOUT, list(user_spend), "model `churn`"),
    "book": ReadPlan(LAYOUT, list(book_sales), "model `shelf`"),
    "both": ReadPlan(LAYOUT, [*book_sales, *user_spend], "model `offer`"),
}
BOTH = PLANS["both"]


def stream(*batches: pa.RecordBatch, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def columns(**arrays: Any) -> bytes:
    return stream(pa.RecordBatch.from_pydict(arrays))


def told(call: Any, *given: Any, **named: Any) -> tuple[Any, ...]:
    with pytest.raises(MillpondError) as caught:
        call(*given, **named)
    error = caught.value
    return type(error), error.status, error.code, error.message, error.path, error.problems


# -- ids

TYPES = {
    "user_id": [pa.int64(), pa.int32(), pa.uint8(), pa.uint64(), pa.string(), pa.dictionary(pa.int8(), pa.string())],
    "book_id": [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())],
}  # fmt: skip


@st.composite
def good_ids(draw: st.DrawFn) -> tuple[ReadPlan, list[dict[str, Any]], bytes]:
    """Ids, and a stream of the same in some type and number of batches."""
    plan = PLANS[draw(st.sampled_from(sorted(PLANS)))]
    fields = {name: draw(st.sampled_from(TYPES[name])) for name in plan.key_fields}
    n = draw(st.integers(0, 12))
    texts = st.text("aü🐟\0", max_size=4) | st.just("x" * KEY_BYTES_MAX)
    values: dict[str, list[Any]] = {}
    for name, kind in fields.items():
        if name == "book_id":
            values[name] = draw(st.lists(texts, min_size=n, max_size=n))
        else:
            high = 127 if kind == pa.uint8() else 2**31 - 1 if kind == pa.int32() else 2**63 - 1
            low = 0 if kind in (pa.uint8(), pa.uint64()) else -high - 1
            values[name] = draw(st.lists(st.integers(low, high), min_size=n, max_size=n))
    names = draw(st.permutations(sorted(fields)))
    arrays = {
        name: pa.array([str(v) if "string" in str(fields[name]) else v for v in values[name]], fields[name])
        for name in names
    }
    whole = pa.RecordBatch.from_pydict(arrays)
    cuts = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))})
    batches = [whole.slice(a, b - a) for a, b in itertools.pairwise(cuts)] or [whole]
    ids = [{name: values[name][i] for name in fields} for i in range(n)]
    return plan, ids, stream(*batches)


@given(good_ids())
def test_a_stream_of_ids_means_what_they_mean_as_json(made: tuple[ReadPlan, list[dict[str, Any]], bytes]) -> None:
    plan, ids, body = made
    assert keys_of(plan, body, 100) == (plan.key_columns(ids, batch=True), len(ids))
    for column in keys_of(plan, body, 100)[0].values():
        assert {type(value) for value in column} <= {int, str}


WRONG: list[tuple[Mapping[str, Sequence[Any]], dict[str, pa.DataType]]] = [
    ({"user_id": [1, None], "book_id": ["a", "b"]}, {}),
    ({"user_id": [1, 2], "book_id": ["a", None]}, {}),
    ({"user_id": [None, None], "book_id": [None, None]}, {"user_id": pa.null(), "book_id": pa.null()}),
    ({"user_id": [1, 2**63], "book_id": ["a", "b"]}, {"user_id": pa.uint64()}),
    ({"user_id": ["1", "01"], "book_id": ["a", "b"]}, {}),
    ({"user_id": [1, 2], "book_id": [3, 4]}, {}),
    ({"user_id": [1, 2], "book_id": ["a", "ü" * (KEY_BYTES_MAX // 2 + 1)]}, {}),
    ({"user_id": [1, 2], "book_id": ["a", "x" * (KEY_BYTES_MAX + 1)]}, {}),
    ({"user_id": [None] * 20, "book_id": [1] * 20}, {"user_id": pa.int8()}),
]


@pytest.mark.parametrize(("given_columns", "types"), WRONG, ids=range(len(WRONG)))
def test_wrong_values_are_told_with_their_rows_in_the_words_of_json(
    given_columns: Mapping[str, Sequence[Any]], types: dict[str, pa.DataType]
) -> None:
    body = columns(**{name: pa.array(values, types.get(name)) for name, values in given_columns.items()})
    rows = [dict(zip(given_columns, row, strict=True)) for row in zip(*given_columns.values(), strict=True)]
    assert told(keys_of, BOTH, body, 100) == told(BOTH.key_columns, rows, batch=True)


@pytest.mark.parametrize("names", [["user_id"], ["user_id", "book_id", "books"], ["user_id", "book_id", "orders_30d"], ["userid", "book_id"]])  # fmt: skip
def test_wrong_columns_are_told_in_the_words_of_json(names: list[str]) -> None:
    values = {name: "a" if name == "book_id" else 1 for name in names}
    body = columns(**{name: [value] for name, value in values.items()})
    assert told(keys_of, BOTH, body, 100) == told(BOTH.key_columns, [values], batch=True)
    # A stream without rows is told the same.
    empty = columns(**{name: pa.array([], pa.string()) for name in names})
    assert told(keys_of, BOTH, empty, 100) == told(BOTH.key_columns, [values], batch=True)


@pytest.mark.parametrize(
    ("body", "message", "path"),
    [
        (columns(user_id=[1.0]), "model `churn`: expected `user_id` as int64, got a column of double", "$[*].user_id"),
        (columns(user_id=[[1]]), "model `churn`: expected `user_id` as int64, got a column of list<item: int64>", "$[*].user_id"),
        (columns(user_id=pa.array([1]).dictionary_encode()), "model `churn`: expected `user_id` as int64, got a column of dictionary<values=int64, indices=int32, ordered=0>", "$[*].user_id"),
        (stream(pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], names=["user_id", "user_id"])), "model `churn`: column `user_id` comes twice; allowed is once", "$[*].user_id"),
    ],
    ids=["double", "list", "dictionary", "twice"],
)  # fmt: skip
def test_a_column_that_cannot_hold_ids_is_refused_by_its_type(body: bytes, message: str, path: str) -> None:
    assert told(keys_of, PLANS["user"], body, 100) == (BadRequest, 400, "bad_id", message, path, ())


def test_limits_are_told() -> None:
    one = pa.RecordBatch.from_pydict({"user_id": [1]})
    user = PLANS["user"]
    assert keys_of(user, stream(*[one] * 5), 5) == ({"user_id": [1] * 5}, 5)
    assert told(keys_of, user, stream(*[one] * 6), 5)[2:4] == ("too_large", "body: more than 5 ids; allowed are 5 in a request")  # fmt: skip
    message = "body: more than 1000 Arrow batches; `batches_max` is 1000; send fewer ids at a time"
    assert told(keys_of, user, stream(*[one] * 1_001), 5_000)[2:4] == ("too_large", message)
    # A dictionary's strings count with every row that names them: 2 MB of body would become 2 GB.
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000, np.int16)), pa.array(["x" * 1_000_000]))
    with pytest.raises(TooLarge, match=r"200[0-9]{7} bytes when decoded; `arrow_bytes_max` is 67108864"):
        keys_of(PLANS["book"], columns(book_id=many), 5_000)


def test_what_is_no_stream_of_ids_is_refused_and_nothing_else_is_raised() -> None:
    good = stream(*[pa.RecordBatch.from_pydict({"user_id": [1, 2], "book_id": ["a", "bc"]})] * 2)
    expected = keys_of(BOTH, good, 10)
    for bad in (b"", b"{}", good[:-9], good + b"x", stream(pa.RecordBatch.from_pydict({"user_id": [1] * 99, "book_id": ["a"] * 99}), compression="zstd")):  # fmt: skip
        status, code, message = told(keys_of, BOTH, bad, 1_000)[1:4]
        assert (status, code) == (400, "bad_arrow")
        assert message.startswith("body: not an Arrow IPC stream that can be read: ")
    rng = random.Random(4)
    refused = 0
    for _ in range(2_000):
        torn = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            torn[rng.randrange(len(torn))] = rng.randrange(256)
        try:
            keys, n = keys_of(BOTH, bytes(torn), 10)
        except (BadRequest, TooLarge):
            refused += 1
        else:  # a value has become another, or nothing that counts has changed
            assert n == 4
            assert BOTH.key_columns([dict(zip(keys, row, strict=True)) for row in zip(*keys.values(), strict=True)], batch=True) == keys  # fmt: skip
    assert refused > 500
    assert keys_of(BOTH, good, 10) == expected


# -- answers


def opened(results: Sequence[Any], **given: Any) -> pa.Table:
    n = len(results)
    given = {"versions": ["3"] * n, "ids": [f"i{i}" for i in range(n)], "as_of": range(n), "unknown": [[]] * n} | given  # fmt: skip
    table = pa.ipc.open_stream(arrow_body("churn", results=results, **given)).read_all()
    table.validate(full=True)
    return table


@pytest.mark.parametrize(
    ("results", "form"),
    [
        ([], "number"), ([0.5, 1], "number"), ([1, None], "number"), ([2**53], "number"), ([None], "number"),
        ([True], "json"), ([1.0, True], "json"), ([2**53 + 1], "json"), ([2**70], "json"), (["a", 1.5, None], "json"),
        ([[1, {"a": "ü"}], {}], "json"),
    ],
)  # fmt: skip
def test_results_are_numbers_if_they_all_are_and_json_else(results: list[Any], form: str) -> None:
    table = opened(results)
    assert table.schema.metadata == {b"model": b"churn", b"result": form.encode()}
    assert table.schema.field("result").type == (pa.float64() if form == "number" else pa.string())
    got = table.column("result").to_pylist()
    assert (got if form == "number" else [json.loads(text) for text in got]) == results


def test_an_answer_has_what_the_answer_in_json_has() -> None:
    table = opened([0.5, 1.5, 2.5], versions=["3", "4", "3"], as_of=[-1, 0, 1_700_000_000_123], unknown=[["a", "b"], [], ["b"]])  # fmt: skip
    assert table.schema.names == ["id", "version", "result", "as_of", "unknown", "error"]
    assert table.schema.field("version").type == pa.dictionary(pa.int32(), pa.string())
    assert table.schema.field("as_of").type == pa.timestamp("ms", "UTC")
    rows = table.to_pylist()
    assert [row.pop("as_of") and row for row in rows[1:]] == [
        {"id": "i1", "version": "4", "result": 1.5, "unknown": [], "error": None},
        {"id": "i2", "version": "3", "result": 2.5, "unknown": ["b"], "error": None},
    ]
    assert table.column("as_of").cast(pa.int64()).to_pylist() == [None, 0, 1_700_000_000_123]
    assert rows[0]["unknown"] == ["a", "b"]


@pytest.mark.parametrize(("results", "told"), [([1.5, None], [1.5, None]), (["a", None], ['"a"', "null"])], ids=["number", "json"])  # fmt: skip
def test_a_result_that_is_none_is_null_and_says_why(results: list[Any], told: list[Any]) -> None:
    table = opened([*results, PredictionFailed("no luck")])
    assert table.column("result").to_pylist() == [*told, None]
    assert table.column("error").to_pylist() == [None, None, "no luck"]


def test_features_have_the_columns_of_their_kinds_and_null_for_empty() -> None:
    plan = ReadPlan(compile_layout([], [taste]), list(taste), "model `taste`")
    empty = plan.named_values(plan.no_rows())
    types = opened([], features=plan.features, values=empty).schema.field
    assert types("taste.n").type == pa.float64()
    assert types("taste.first_book").type == pa.string()
    assert types("taste.books").type == pa.list_(pa.string())
    assert types("taste.prices").type == pa.list_(pa.float64())
    values = {f.full_name: [None] * f.width if f.width > 1 else None for f in plan.features}
    values |= {"taste.n": 2.0, "taste.mean": math.nan, "taste.first_book": "a", "taste.books": ("b", "a", None), "taste.prices": [1.5, math.nan]}  # fmt: skip
    (row,) = (
        opened([1.0], features=plan.features, values=[values]).select([f.full_name for f in plan.features]).to_pylist()
    )
    assert row == values | {"taste.mean": None, "taste.books": ["b", "a", None], "taste.prices": [1.5, None]}


# -- the call


def scored(world: World, name: str, body: bytes, **headers: str) -> pa.Table:
    reply = world.post_score(name, body, ARROW, headers=headers)
    assert (reply.status, reply.headers["content-type"]) == (200, ARROW), reply.body
    table = pa.ipc.open_stream(reply.body).read_all()
    table.validate(full=True)
    return table


def as_json(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of an answer as the answers in JSON have them."""
    name, number = table.schema.metadata[b"model"].decode(), table.schema.metadata[b"result"] == b"number"
    rows = []
    for row in table.to_pylist():
        row["as_of"] = None if row["as_of"] is None else row["as_of"].isoformat(timespec="milliseconds").replace("+00:00", "Z")  # fmt: skip
        row["result"] = row["result"] if number else json.loads(row["result"])
        assert row.pop("error") is None
        answer = {field: row.pop(field) for field in ("version", "result", "as_of", "unknown")} | {"model": name}
        rows.append(answer | ({"features": {k: v for k, v in row.items() if k != "id"}} if len(row) > 1 else {}))
    return rows


@pytest.mark.parametrize("query", ["", "?features=true", f"?as_of={NOW + 60_000}"])
def test_the_answer_in_arrow_is_the_answer_in_json(query: str) -> None:
    lists = model("lists", [*book_sales, *user_book], lambda: Returns({"top": [1, "a"]}))
    tasted = model("tasted", list(taste))
    world = make_world([churn, offer, lists, tasted], layout=compile_layout([], [*VIEWS, taste]))
    rng = random.Random(6)
    events = [purchase(f"o{i}", i % 7, rng.uniform(1, 9), NOW - i, book_id=f"b{i % 5}") for i in range(60)]
    assert world.post_events("purchases", events).status == 200
    ids = [{"user_id": i % 9, "book_id": f"b{i % 6}"} for i in range(30)]
    for name, fields in (("offer", ("user_id", "book_id")), ("churn", ("user_id",)), ("lists", ("user_id", "book_id")), ("tasted", ("user_id",))):  # fmt: skip
        asked = [{field: one[field] for field in fields} for one in ids]
        want = world.post_score(f"{name}{query}", asked).json
        body = columns(**{field: [one[field] for one in asked] for field in fields})
        table = scored(world, f"{name}{query}", body)
        assert len({*table.column("id").to_pylist(), *(answer.pop("id") for answer in want)}) == 60
        assert as_json(table) == want


def test_either_form_may_be_answered_in_the_other() -> None:
    world = make_world()
    body = columns(user_id=[1, 2])
    want = [{"result": 0.0, "unknown": ["user_spend"]}] * 2
    for name, sent, content_type, accept, form in (
        ("churn", body, ARROW, "*/*", ARROW), ("churn", body, ARROW, "application/json", "application/json"),
        ("churn", b'[{"user_id": 1}, {"user_id": 2}]', "application/json", ARROW, ARROW),
        ("churn", b'[{"user_id": 1}, {"user_id": 2}]', "application/json", "*/*", "application/json"),
    ):  # fmt: skip
        reply = world.post_score(name, sent, content_type, headers={"accept": accept})
        assert (reply.status, reply.headers["content-type"]) == (200, form)
        got = as_json(pa.ipc.open_stream(reply.body).read_all()) if form == ARROW else reply.json
        assert [{field: answer[field] for field in want[0]} for answer in got] == want
    assert scored(world, "churn", columns(user_id=pa.array([], pa.int64()))).num_rows == 0


def test_what_is_wrong_with_a_call_is_told_in_json() -> None:
    world = make_world()
    for body, status, code, path in (
        (columns(user_id=["x"]), 400, "bad_id", "$[0].user_id"), (columns(user_id=[1], orders_30d=[1]), 400, "features_in_request", "$[0].orders_30d"),
        (b"[]", 400, "bad_arrow", "$"), (columns(user_id=range(10_001)), 413, "too_large", None),
    ):  # fmt: skip
        reply = world.post_score("churn", body, ARROW, headers={"accept": ARROW})
        assert (reply.status, reply.error["code"], reply.error["path"]) == (status, code, path)


def test_a_canary_answers_its_share_of_a_stream_and_the_versions_say_so() -> None:
    world = make_world()
    champion = world.score._models.served["churn"].champion
    newer = replace(churn, version="4", features=[user_spend["orders_30d"], user_spend["last_price"]])
    canary = Lane(LoadedModel(newer, LAYOUT, Path()), world.client, ThreadPoolExecutor(1))
    world.score._models = Models({"churn": Served("churn", champion, canary, share=0.5)})
    ids = [{"user_id": i} for i in range(200)]
    want = world.post_score("churn?features=true", ids).json
    table = scored(world, "churn?features=true", columns(user_id=range(200)))
    assert table.column("version").to_pylist() == [answer["version"] for answer in want]
    assert {"3", "4"} == set(table.column("version").to_pylist())
    for answer, row in zip(want, as_json(table), strict=True):
        # A version has no value of a feature that only the other reads.
        assert answer["features"].items() <= row["features"].items()
        assert len(row["features"]) == 4
