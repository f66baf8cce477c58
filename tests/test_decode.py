"""Decoding: four body forms, one batch; anything else is refused with a path, and never with a crash."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.feature_actors.decode import CONTENT_TYPES, TIME_MAX_MS, BodyLimits, Decoder
from millpond.feature_actors.errors import BadRequest, MillpondError, TooLarge, UnsupportedMediaType
from millpond.feature_actors.source import Field, Source

ARROW = "application/vnd.apache.arrow.stream"
TIME = pa.timestamp("ms", tz="UTC")
TIME_ALLOWED = "; allowed is ISO 8601 with a zone, or epoch milliseconds, from 1970-01-01 to 2200-01-01"

PAYMENTS = Source(
    "payments",
    owner="checkout",
    fields={
        "id": "string",
        "user": "int64",
        "amount": "float64",
        "ratio": Field("float32", optional=True),
        "items": Field("uint8", default=1),
        "gift": Field("bool", optional=True),
        "from": Field("string", optional=True, default="web"),
        "at": "timestamp[ms, UTC]",
    },
    event_id="id",
    event_time="at",
)
DECODER = Decoder(PAYMENTS, key_fields=["user", "from"], key_bytes_max=20)
GOOD: dict[str, Any] = {"id": "p1", "user": 42, "amount": 1.5, "at": 1_700_000_000_000}
REPLACED = {"ratio": None, "items": 1, "gift": None, "from": "web"}


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows).encode()


def as_ndjson(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def as_arrow(*batches: pa.RecordBatch, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def columns(rows: int = 3, **replaced: Any) -> dict[str, Any]:
    """Return the required columns of `rows` good rows, some replaced; None leaves a column out."""
    good = {
        "id": pa.array([f"p{i}" for i in range(rows)], pa.string()),
        "user": pa.array(range(rows), pa.int64()),
        "amount": pa.array([i * 0.5 for i in range(rows)], pa.float64()),
        "at": pa.array([1_700_000_000_000 + i for i in range(rows)], TIME),
    }
    return {n: a for n, a in {**good, **replaced}.items() if a is not None}


def arrow_body(rows: int = 3, **replaced: Any) -> bytes:
    return as_arrow(pa.RecordBatch.from_pydict(columns(rows, **replaced)))


def refused(body: bytes, content_type: str | None = None, decoder: Decoder = DECODER) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        decoder.decode(body, content_type)
    assert caught.value.code == "invalid_events"
    assert caught.value.problems[0] == (caught.value.message, caught.value.path)
    json.dumps(caught.value.as_json(), ensure_ascii=False).encode()
    check_good()
    return caught.value


def check_good() -> None:
    """The next body decodes, whatever came before it."""
    assert DECODER.decode(as_json([GOOD]), None).num_rows == 1


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "id": TEXT,
            "user": st.integers(-(2**63), 2**63 - 1),
            "amount": st.floats(allow_nan=False, allow_infinity=False),
            "at": st.integers(0, TIME_MAX_MS),
        },
        optional={
            "ratio": st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32),
            "items": st.none() | st.integers(0, 255),
            "gift": st.none() | st.booleans(),
            "from": st.none() | TEXT,
        },
    ),
    max_size=20,
)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 20))
def test_all_forms_of_the_same_events_decode_to_the_same_batch(rows: list[dict[str, Any]], cut: int) -> None:
    filled = [{n: REPLACED.get(n) if row.get(n) is None else row[n] for n in PAYMENTS.fields} for row in rows]
    expected = pa.RecordBatch.from_arrays(
        [pa.array([r[n] for r in filled], f.arrow_type) for n, f in PAYMENTS.fields.items()],
        schema=PAYMENTS.schema,
    )
    batch = DECODER.decode(as_json(rows), "application/json; charset=utf-8")
    assert batch.equals(expected)
    assert batch.schema.equals(PAYMENTS.schema, check_metadata=True)
    batch.validate(full=True)
    reversed_columns = expected.select(expected.schema.names[::-1])
    assert DECODER.decode(as_arrow(reversed_columns), ARROW).equals(expected)
    assert DECODER.decode(as_arrow(expected[:cut], expected[cut:]), ARROW).equals(expected)
    if rows:
        assert DECODER.decode(as_ndjson(rows), "application/x-ndjson").equals(expected)
        assert DECODER.decode(json.dumps(rows[0]).encode(), None).equals(expected[:1])
    strings = [{**row, "user": str(row["user"])} for row in rows]
    assert DECODER.decode(as_json(strings), None).equals(expected)


def test_every_content_type_is_read_with_parameters_and_in_any_case() -> None:
    bodies = {"json": as_json([GOOD]), "ndjson": as_ndjson([GOOD]), "arrow": arrow_body(1)}
    for content_type, form in CONTENT_TYPES.items():
        assert DECODER.decode(bodies[form], content_type.upper() + " ; charset=utf-8").num_rows == 1


def test_another_content_type_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        DECODER.decode(as_json([GOOD]), "text/csv")
    assert caught.value.message == (
        "body of `payments`: content type `text/csv`; allowed are `application/json`, "
        "`application/x-ndjson`, `application/ndjson`, `application/jsonl`, "
        "`application/vnd.apache.arrow.stream`"
    )


def test_times_are_iso_with_a_zone_or_epoch_milliseconds() -> None:
    times = [
        "2024-05-01T12:00:00Z",
        "2024-05-01T14:00:00.000999+02:00",
        1_714_564_800_000,
        "2200-01-01T00:00:00Z",
    ]
    batch = DECODER.decode(as_json([{**GOOD, "at": t} for t in times]), None)
    noon = datetime(2024, 5, 1, 12, tzinfo=UTC)
    assert batch["at"].to_pylist() == [noon, noon, noon, datetime(2200, 1, 1, tzinfo=UTC)]


def test_an_empty_array_and_an_empty_stream_are_batches_of_no_rows() -> None:
    for body, content_type in ((b" [ ] ", None), (b"\n", "application/jsonl"), (arrow_body(0), ARROW)):
        batch = DECODER.decode(body, content_type)
        assert batch.num_rows == 0
        assert batch.schema == PAYMENTS.schema


def test_integers_are_floats_and_the_last_of_repeated_keys_counts() -> None:
    body = b'{"id":"a","user":1,"amount":1,"amount":9007199254740993,"at":0}'
    assert DECODER.decode(body, None)["amount"].to_pylist() == [2.0**53]


VALUES: list[tuple[str, str, str]] = [
    ("amount", '"abc"', 'expected `float64`, got `"abc"`'),
    ("amount", '"1.5"', 'expected `float64`, got `"1.5"`'),
    ("amount", "true", "expected `float64`, got `true`"),
    ("amount", "null", "expected `float64`, got `null`"),
    ("amount", "{}", "expected `float64`, got an object"),
    ("amount", "[[1]]", "expected `float64`, got an array"),
    ("amount", "NaN", "expected `float64`, got `NaN`; allowed are finite numbers"),
    ("amount", "-Infinity", "expected `float64`, got `-Infinity`; allowed are finite numbers"),
    ("amount", "1e999", "expected `float64`, got `Infinity`; allowed are finite numbers"),
    ("amount", "1" * 5000, "expected `float64`, got `Infinity`; allowed are finite numbers"),
    ("ratio", "1e39", "expected `float32`, got `1e+39`; it does not fit without loss"),
    ("user", "true", "expected `int64`, got `true`"),
    ("user", "1.0", "expected `int64`, got `1.0`"),
    ("user", '"042"', 'expected `int64`, got `"042"`'),
    ("user", '"0x1f"', 'expected `int64`, got `"0x1f"`'),
    ("user", '"٤٢"', 'expected `int64`, got `"٤٢"`'),
    ("user", '""', 'expected `int64`, got `""`'),
    ("user", '"9223372036854775808"', 'expected `int64`, got `"9223372036854775808"`'),
    (
        "user",
        "9223372036854775808",
        "expected `int64`, got `9223372036854775808`; allowed is -9223372036854775808 to 9223372036854775807",
    ),
    ("items", "256", "expected `uint8`, got `256`; allowed is 0 to 255"),
    ("items", "-1", "expected `uint8`, got `-1`; allowed is 0 to 255"),
    ("items", '"1"', 'expected `uint8`, got `"1"`'),
    ("gift", "1", "expected `bool`, got `1`"),
    ("from", "7", "expected `string`, got `7`"),
    ("from", '"' + "ä" * 11 + '"', "expected `string`, got 22 bytes; allowed are 20"),
    ("id", '"' + "x" * 1025 + '"', "expected `string`, got 1025 bytes; allowed are 1024"),
    ("id", r'"\ud800"', r'expected `string`, got `"\ud800"`; allowed is valid UTF-8'),
    (
        "at",
        '"2024-05-01T12:00:00"',
        'expected `timestamp[ms, UTC]`, got `"2024-05-01T12:00:00"`' + TIME_ALLOWED,
    ),
    ("at", '"yesterday"', 'expected `timestamp[ms, UTC]`, got `"yesterday"`' + TIME_ALLOWED),
    ("at", "-1", "expected `timestamp[ms, UTC]`, got `-1`" + TIME_ALLOWED),
    ("at", "1.5", "expected `timestamp[ms, UTC]`, got `1.5`" + TIME_ALLOWED),
    ("at", str(TIME_MAX_MS + 1), f"expected `timestamp[ms, UTC]`, got `{TIME_MAX_MS + 1}`" + TIME_ALLOWED),
    (
        "at",
        '"0001-01-01T00:00:00+14:00"',
        'expected `timestamp[ms, UTC]`, got `"0001-01-01T00:00:00+14:00"`' + TIME_ALLOWED,
    ),
    ("at", "true", "expected `timestamp[ms, UTC]`, got `true`"),
]


@pytest.mark.parametrize(("field", "value", "message"), VALUES)
def test_a_bad_json_value_refuses_the_batch_and_is_named(field: str, value: str, message: str) -> None:
    good = json.dumps(GOOD)
    bad = json.dumps({**GOOD, field: "@"}).replace('"@"', value)
    for body, content_type, path in (
        (bad, None, f"$.{field}"),
        (f"[{good}, {good}, {good}, {bad}]", "application/json", f"$[3].{field}"),
        (f"{good}\n\n{good}\r\n{good}\n{bad}\n", "application/x-ndjson", f"$[3].{field}"),
    ):
        error = refused(body.encode(), content_type)
        assert error.message == f"event of `payments`: {message}"
        assert error.path == path


NO_SECONDS = Decoder(PAYMENTS, refuse_seconds=True)
#: At the edges of what reads as seconds, as epoch milliseconds.
EDGES = [0, 10**9 - 1, 10**9, 1_700_000_000, 2**32 - 1, 2**32, 1_700_000_000_000, TIME_MAX_MS]


@given(st.lists(st.tuples(st.sampled_from(EDGES), st.sampled_from(["number", "text"])), max_size=100))
def test_epoch_seconds_are_refused_where_they_stand_and_the_same_time_in_words_is_taken(
    times: list[tuple[int, str]],
) -> None:
    texts = [datetime.fromtimestamp(t / 1000, UTC).isoformat() for t, _ in times]
    rows = [{**GOOD, "at": t if form == "number" else text} for (t, form), text in zip(times, texts, strict=True)]
    numbers = [{**GOOD, "at": t} for t, _ in times]
    seconds = [i for i, (t, form) in enumerate(times) if form == "number" and 10**9 <= t < 2**32]
    for body, content_type in ((as_json(rows), None), (as_ndjson(rows), "application/x-ndjson")):
        if not rows and content_type:
            continue
        if seconds:
            error = refused(body, content_type, NO_SECONDS)
            paths = [f"$[{i}].at" for i in seconds[:10]]
            assert [path for _, path in error.problems] == paths
        else:
            assert NO_SECONDS.decode(body, content_type).equals(DECODER.decode(as_json(numbers), None))


def test_epoch_seconds_are_told_as_what_they_are() -> None:
    message = (
        "event of `payments`: expected `timestamp[ms, UTC]`, got `1700000000`, which is 2023-11-14 in epoch seconds; "
        "allowed are milliseconds: send 1700000000000, or if it happened in 1970 its time as ISO 8601"
    )
    body = as_json([{**GOOD, "at": 1_700_000_000}])
    arrow = arrow_body(at=pa.array([1_700_000_000_000, 1_700_000_000, 5], pa.int64()))
    for error, path in ((refused(body, None, NO_SECONDS), "$[0].at"), (refused(arrow, ARROW, NO_SECONDS), "$[1].at")):
        assert (error.message, error.path, len(error.problems)) == (message, path, 1)
    as_float = refused(as_json([{**GOOD, "at": 1_700_000_000.0}]), None, NO_SECONDS)
    assert as_float.message == message.replace("`1700000000`", "`1700000000.0`")
    # Arrow's times say their unit; and where it is not asked for, numbers of 1970 are taken.
    of_1970 = arrow_body(at=pa.array([1_700_000_000] * 3, TIME))
    assert NO_SECONDS.decode(of_1970, ARROW).equals(DECODER.decode(of_1970, ARROW))
    in_seconds = arrow_body(at=pa.array([1_700_000_000] * 3, pa.timestamp("s", "UTC")))
    assert NO_SECONDS.decode(in_seconds, ARROW)["at"].cast(pa.int64()).to_pylist() == [1_700_000_000_000] * 3
    assert DECODER.decode(body, None).num_rows == 1


def test_the_error_reads_as_the_design_says() -> None:
    error = refused(as_json([GOOD, GOOD, GOOD, {**GOOD, "amount": "abc"}]))
    assert str(error) == 'event of `payments`: expected `float64`, got `"abc"` - at `$[3].amount`'


def test_a_string_as_long_as_a_whole_body_of_others_is_allowed_up_to_its_limit() -> None:
    rows = [{**GOOD, "id": "x" * 1024}] * 3
    assert DECODER.decode(as_json(rows), None).num_rows == 3
    error = refused(as_json([*rows, {**GOOD, "id": "x" * 1025}]))
    assert error.path == "$[3].id"


def test_unknown_and_missing_fields_are_named() -> None:
    error = refused(as_json([{**GOOD, "amuont": 1}]))
    assert error.message == (
        "event of `payments`: unknown field `amuont`; known: `amount`, `at`, `from`, `gift`, `id`, `items`, "
        "`ratio`, `user`; did you mean `amount`?"
    )
    assert error.path == "$[0].amuont"
    error = refused(b'{"id": "a", "user": 1, "at": 0}')
    assert str(error) == "event of `payments`: expected `float64`, got nothing - at `$.amount`"
    assert refused(as_json([{**GOOD, "a b\ud800": 1}])).path == r'$[0]["a b\ud800"]'
    assert refused(as_json([{**GOOD, "x" * 100_000: 1}])).message.startswith("event of `payments`: unknown field `xxx")


@pytest.mark.parametrize("value", ["3", "null", '"a"', "true"])
def test_an_event_is_an_object(value: str) -> None:
    assert refused(value.encode()).message == f"event of `payments`: expected an object, got `{value}`"
    assert refused(f"[{value}]".encode()).path == "$[0]"
    assert refused(value.encode(), "application/jsonl").path == "$[0]"


def test_the_first_ten_problems_are_named_in_order() -> None:
    rows = [{**GOOD, "amount": "x", "user": None} if i % 100 == 50 else GOOD for i in range(3_000)]
    error = refused(as_json(rows))
    expected = [f"$[{i}].{field}" for i in range(50, 550, 100) for field in ("user", "amount")]
    assert [path for _, path in error.problems] == expected


@pytest.mark.parametrize(
    ("body", "message", "path"),
    [
        (b"", "body of `payments`: empty; allowed are events, or `[]`", "$"),
        (b"  ", "body of `payments`: not JSON: expecting value at byte 2", "$"),
        (b"hello", "body of `payments`: not JSON: expecting value at byte 0", "$"),
        (b"\xef\xbb\xbf[]", "body of `payments`: not JSON: expecting value at byte 0", "$"),
        (b"[] x", "body of `payments`: not JSON: bytes after the end at byte 3", "$[0]"),
        (b"[1", "event of `payments`: expected an object, got `1`", "$[0]"),
        (
            b"[" + json.dumps(GOOD).encode(),
            "body of `payments`: not JSON: expected `,` or `]` at byte 61",
            "$[1]",
        ),
        (
            b"[" + json.dumps(GOOD).encode() + b",]",
            "body of `payments`: not JSON: expecting value at byte 62",
            "$[1]",
        ),
        (b"[" * 10_000, "body of `payments`: not JSON: nested too deeply at byte 1", "$[0]"),
        (b'{"amount":' * 10_000, "body of `payments`: not JSON: nested too deeply at byte 0", "$"),
        (
            b'{"id": "\xff"}',
            'event of `payments`: expected `string`, got `"\\udcff"`; allowed is valid UTF-8',
            "$.id",
        ),
        (b'{"\xff": 1}', None, r'$["\udcff"]'),
        (b'{"id": "a\nb"}', "body of `payments`: not JSON: invalid control character at byte 9", "$"),
    ],
)
def test_what_is_not_json_is_refused(body: bytes, message: str | None, path: str) -> None:
    error = refused(body)
    assert message is None or error.message == message
    assert error.path == path


def test_a_line_that_is_not_json_is_named() -> None:
    good = json.dumps(GOOD)
    error = refused(f"{good}\n\n{good}\noops\n{good}".encode(), "application/x-ndjson")
    assert error.message == "body of `payments`: line 4 is not JSON: expecting value at its byte 0"
    assert error.path == "$[2]"


def test_limits_are_named() -> None:
    tight = Decoder(PAYMENTS, BodyLimits(body_bytes_max=2_000, rows_max=3, arrow_bytes_max=400, batches_max=2))
    for body, content_type, message in (
        (b" " * 2_001, None, "2001 bytes; `body_bytes_max` is 2000"),
        (as_json([GOOD] * 4), None, "more than 3 events; `rows_max` is 3"),
        (as_ndjson([GOOD] * 4), "application/jsonl", "more than 3 events; `rows_max` is 3"),
        (as_json([{**GOOD, "user": True}] * 4), None, "more than 3 events; `rows_max` is 3"),
        (arrow_body(4), ARROW, "more than 3 events; `rows_max` is 3"),
        (
            as_arrow(*[pa.RecordBatch.from_pydict(columns(0))] * 3),
            ARROW,
            "more than 2 Arrow batches; `batches_max` is 2",
        ),
        (arrow_body(3, id=pa.array(["x" * 500] * 3)), ARROW, None),
    ):
        with pytest.raises(TooLarge) as caught:
            tight.decode(body, content_type)
        assert caught.value.code == "too_large"
        if message:
            assert caught.value.message == f"body of `payments`: {message}; send fewer events at a time"


@pytest.mark.parametrize(
    ("field", "array"),
    [
        ("user", pa.array([0, 1, 2], pa.int8())),
        ("user", pa.array([0, 1, 2], pa.uint64())),
        ("items", pa.array([0, 1, 255], pa.int64())),
        ("items", pa.nulls(3)),
        ("amount", pa.array([0, 1, 2**53], pa.int64())),
        ("amount", pa.array([0.1, 1, 2], pa.float32())),
        ("ratio", pa.array([0.5, None, 2], pa.float64())),
        ("id", pa.array(["a", "b", "ä"], pa.large_string())),
        ("id", pa.array(["a", "b", "a"]).dictionary_encode()),
        ("from", pa.array(["a", None, "a"], pa.large_string()).dictionary_encode()),
        ("at", pa.array([0, 1, 2], pa.int64())),
        ("at", pa.array([0, 1, 2], pa.timestamp("s", "Europe/Berlin"))),
        ("at", pa.array([0, 1000, 2000], pa.timestamp("us", "+02:00"))),
        ("at", pa.array([0, 1_000_000, 2_000_000], pa.timestamp("ns", "UTC"))),
    ],
    ids=lambda a: a if isinstance(a, str) else str(a.type),
)
def test_arrow_columns_convert_without_loss(field: str, array: pa.Array) -> None:
    batch = DECODER.decode(arrow_body(3, **{field: array}), ARROW)
    batch.validate(full=True)
    assert batch.schema == PAYMENTS.schema
    plain = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    expected = plain.cast(PAYMENTS.fields[field].arrow_type)
    if REPLACED.get(field) is not None:
        expected = expected.fill_null(REPLACED[field])
    assert batch[field].equals(expected)


def test_batches_with_their_own_dictionaries_are_joined() -> None:
    one, two = (
        pa.RecordBatch.from_pydict(columns(2, id=pa.array(v).dictionary_encode())) for v in (["a", "b"], ["c", "a"])
    )
    assert DECODER.decode(as_arrow(one, two), ARROW)["id"].to_pylist() == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("field", "array", "message", "path"),
    [
        ("items", pa.array([1, 256, -1]), "expected `uint8`, got `256`; allowed is 0 to 255", "$[1].items"),
        (
            "user",
            pa.array([1, 2, 2**63], pa.uint64()),
            f"expected `int64`, got `{2**63}`; allowed is {-(2**63)} to {2**63 - 1}",
            "$[2].user",
        ),
        ("user", pa.array([1.0, 2, 3]), "expected `int64`, got a column of `double`", "$[*].user"),
        ("user", pa.array([1, None, 3]), "expected `int64`, got `null`", "$[1].user"),
        ("user", pa.nulls(3), "expected `int64`, got a column of `null`", "$[*].user"),
        ("user", None, "expected `int64`, got nothing", "$[*].user"),
        (
            "amount",
            pa.array([1, math.nan, 3]),
            "expected `float64`, got `NaN`; allowed are finite numbers",
            "$[1].amount",
        ),
        (
            "amount",
            pa.array([1, math.inf, 3], pa.float32()),
            "expected `float64`, got `Infinity`; allowed are finite numbers",
            "$[1].amount",
        ),
        (
            "amount",
            pa.array([1, 2, 2**53 + 1]),
            "expected `float64`, got `9007199254740993`; it does not fit without loss",
            "$[2].amount",
        ),
        (
            "ratio",
            pa.array([0.5, 0.1, None]),
            "expected `float32`, got `0.1`; it does not fit without loss",
            "$[1].ratio",
        ),
        (
            "ratio",
            pa.array([None, 1, math.nan], pa.float32()),
            "expected `float32`, got `NaN`; allowed are finite numbers",
            "$[2].ratio",
        ),
        (
            "at",
            pa.array([0, 1, 2], pa.timestamp("ms")),
            "expected `timestamp[ms, UTC]`, got a column of `timestamp[ms]`",
            "$[*].at",
        ),
        (
            "at",
            pa.array([0, 1, 2], pa.date64()),
            "expected `timestamp[ms, UTC]`, got a column of `date64[ms]`",
            "$[*].at",
        ),
        (
            "at",
            pa.array([0, 1, 2], pa.timestamp("us", "UTC")),
            "expected `timestamp[ms, UTC]`, got `1 us`" + TIME_ALLOWED,
            "$[1].at",
        ),
        (
            "at",
            pa.array([0, 1, 2**62], pa.timestamp("s", "UTC")),
            f"expected `timestamp[ms, UTC]`, got `{2**62} s`" + TIME_ALLOWED,
            "$[2].at",
        ),
        (
            "at",
            pa.array([0, -1, 2], TIME),
            "expected `timestamp[ms, UTC]`, got `-1 ms`" + TIME_ALLOWED,
            "$[1].at",
        ),
        ("id", pa.array([b"a", b"b", b"c"]), "expected `string`, got a column of `binary`", "$[*].id"),
        (
            "id",
            pa.array(["a", "b", "x" * 1025]),
            "expected `string`, got 1025 bytes; allowed are 1024",
            "$[2].id",
        ),
        ("id", pa.array([["a"]] * 3), "expected `string`, got a column of `list<item: string>`", "$[*].id"),
        ("gift", pa.array([0, 1, 0]), "expected `bool`, got a column of `int64`", "$[*].gift"),
        ("user", pa.array([1, 1, 1]).dictionary_encode(), None, "$[*].user"),
        ("extra", pa.array([1, 2, 3]), None, "$[*].extra"),
    ],
)
def test_bad_arrow_columns_and_values_are_named(field: str, array: Any, message: str | None, path: str) -> None:
    error = refused(arrow_body(3, **{field: array}), ARROW)
    assert message is None or error.message == f"event of `payments`: {message}"
    assert error.path == path


def test_the_first_bad_row_of_any_arrow_column_comes_first() -> None:
    body = arrow_body(3, amount=pa.array([1, 2, math.nan]), user=pa.array([1, None, None]))
    assert [path for _, path in refused(body, ARROW).problems] == ["$[1].user", "$[2].user", "$[2].amount"]


def test_a_column_that_comes_twice_is_refused() -> None:
    good = columns()
    batch = pa.RecordBatch.from_arrays([*good.values(), good["user"]], names=[*good, "user"])
    assert refused(as_arrow(batch), ARROW).message == "event of `payments`: column `user` comes twice; allowed is once"


def test_invalid_utf8_in_arrow_is_refused() -> None:
    body = arrow_body(3, id=pa.array(["aaaaaaaa", "bbbbbbbb", "cccccccc"]))
    error = refused(body.replace(b"bbbbbbbb", b"bbb\xffbbbb"), ARROW)
    assert error.message.startswith("body of `payments`: not an Arrow IPC stream that can be read: ")
    assert "UTF8" in error.message


def test_compressed_arrow_is_refused_before_it_is_expanded() -> None:
    bomb = pa.RecordBatch.from_pydict(columns(1000, id=pa.array(["x" * 60_000] * 1000)))
    for codec in ("lz4", "zstd"):
        error = refused(as_arrow(bomb, compression=codec), ARROW)
        assert error.message == (
            "body of `payments`: not an Arrow IPC stream that can be read: "
            "compressed batches are not read; write them without compression"
        )
    small = pa.RecordBatch.from_pydict(columns(3, id=pa.array(["a", "b", "a"]).dictionary_encode()))
    assert "compressed" in refused(as_arrow(small, compression="zstd"), ARROW).message


def test_a_dictionary_that_expands_beyond_the_limit_is_refused() -> None:
    indices = pa.array([0] * 100_000, pa.int8())
    bomb = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 60_000]))
    body = arrow_body(100_000, id=bomb)
    assert len(body) < 4_000_000
    with pytest.raises(TooLarge, match="`arrow_bytes_max` is 67108864"):
        DECODER.decode(body, ARROW)


def test_dictionary_deltas_are_refused() -> None:
    one, two = (
        pa.RecordBatch.from_pydict(columns(2, id=pa.array(v).dictionary_encode())) for v in (["a", "b"], ["a", "b"])
    )
    two = two.set_column(0, "id", pa.DictionaryArray.from_arrays([0, 2], ["a", "b", "c"]))
    one = one.set_column(0, "id", pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int64()), ["a", "b"]))
    assert "deltas" in refused(as_arrow(one, two, emit_dictionary_deltas=True), ARROW).message


def test_every_cut_of_an_arrow_stream_is_refused() -> None:
    batch = pa.RecordBatch.from_pydict(columns())
    body = as_arrow(batch, batch)
    for size in range(len(body)):
        with pytest.raises(BadRequest):
            DECODER.decode(body[:size], ARROW)
    refused(body + b"x", ARROW)
    refused(body + body, ARROW)
    check_good()


def decode_or_refuse(body: bytes, content_type: str | None) -> None:
    try:
        batch = DECODER.decode(body, content_type)
    except MillpondError as error:
        json.dumps(error.as_json(), ensure_ascii=False).encode()
    else:
        batch.validate(full=True)
        assert batch.schema == PAYMENTS.schema
        assert all(batch.column(i).null_count == 0 for i, f in enumerate(batch.schema) if not f.nullable)
        assert all(math.isfinite(v) for v in batch["amount"].to_pylist())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([None, *CONTENT_TYPES, "x/y"]))
def test_random_bytes_raise_only_our_errors(body: bytes, content_type: str | None) -> None:
    decode_or_refuse(body, content_type)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["2024-05-01T12:00:00Z"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*PAYMENTS.fields, "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys([*PAYMENTS.fields, "y"], JSON_VALUES)), max_size=3))
def test_random_json_raises_only_our_errors(rows: list[dict[str, Any]]) -> None:
    rows = [{**GOOD, **row} for row in rows]
    decode_or_refuse(as_json(rows), None)
    decode_or_refuse(as_ndjson(rows), "application/jsonl")


def test_flipped_bits_raise_only_our_errors() -> None:
    seed = 20_260_501
    choose = random.Random(seed)
    encoded = columns(
        5,
        id=pa.array(["a", "b", "a", "c", "a"]).dictionary_encode(),
        gift=pa.array([True, None] * 2 + [False]),
    )
    batch = pa.RecordBatch.from_pydict(encoded)
    bodies = [
        (arrow_body(5), ARROW),
        (as_arrow(batch, batch), ARROW),
        (as_arrow(batch, compression="lz4"), ARROW),
        (as_json([{**GOOD, "from": "é", "gift": None}] * 3), None),
        (as_ndjson([GOOD] * 3), "application/x-ndjson"),
    ]
    for trial in range(6_000):
        body, content_type = bodies[trial % len(bodies)]
        damaged = bytearray(body)
        for _ in range(choose.choice((1, 1, 2, 8))):
            damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
        try:
            decode_or_refuse(bytes(damaged), content_type)
        except BaseException:
            pytest.fail(f"seed {seed}, trial {trial}: {bytes(damaged)!r}")
    check_good()
