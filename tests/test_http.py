# ruff: noqa: E501  (messages stand whole)
"""The HTTP surface: what every call answers, what every wrong call is told, and what attacks achieve: nothing."""

from __future__ import annotations

import asyncio
import html
import json
import math
import random
import re
from typing import Any

import httpx
import jsonschema
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from apps import (
    ARROW,
    LAYOUT,
    NDJSON,
    NOW,
    NOW_ISO,
    TOKEN,
    VIEWS,
    Reply,
    Returns,
    World,
    arrow,
    call,
    churn,
    make_world,
    mean_price,
    model,
    offer,
    purchase,
    purchases,
    taste,
    user_spend,
)

from millpond.deployments.deployment import Deployment
from millpond.deployments.http import App, Request, Response, Route, json_response
from millpond.deployments.score import ScoreLimits
from millpond.feature_actors import Count, Derived, FeatureView, Last, LastN, Sessions, Source, Streak, SumBy
from millpond.feature_actors.clock import EventClock
from millpond.feature_actors.decode import BodyLimits
from millpond.feature_actors.errors import DeclarationError, Unavailable
from millpond.feature_actors.layout import compile_layout, version_name
from millpond.feature_actors.plan import ReadPlan

ACK = {"accepted": 0, "duplicates": 0, "conflicts": 0, "late": 0, "too_late": 0, "unkeyed": 0, "forgotten": 0}
HOUR = 3_600_000


@pytest.fixture
def world() -> World:
    return make_world()


def refused(reply: Reply, status: int, code: str, message: str, path: str | None = None) -> None:
    """Check an error whole."""
    assert reply.error["message"] == message
    assert (reply.status, reply.error["code"], reply.error["path"]) == (status, code, path)


def still_serves(world: World) -> None:
    """Check that nothing was applied, and that the next request of each app works."""
    assert world.applied == 0
    assert world.post_events("purchases", purchase("next", user_id=777)).json == {**ACK, "accepted": 1, "unkeyed": 1}
    assert world.post_score("churn", {"user_id": 777}).json["unknown"] == []


# -- events


TWO = [purchase("a", 1, 10.0, NOW - 1, book_id="x", gift=None), purchase("b", 2, 20.5, NOW, book_id="y", gift=True)]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (json.dumps(TWO).encode(), None),
        (json.dumps(TWO).encode(), "application/json; charset=utf-8"),
        (b"\n".join(json.dumps(e).encode() for e in TWO), NDJSON),
        (arrow(purchases, TWO), ARROW),
    ],
    ids=["array", "array-with-charset", "ndjson", "arrow"],
)
def test_each_body_form_gives_the_same_events(world: World, body: bytes, content_type: str | None) -> None:
    reply = world.post_events("purchases", body, content_type)
    assert (reply.status, reply.json) == (200, {**ACK, "accepted": 2})
    got = world.post_score("churn?features=true", [{"user_id": 1}, {"user_id": 2}]).json
    assert [g["features"] for g in got] == [
        {"user_spend.orders_30d": 1.0, "user_spend.spend_30d": 10.0, "user_spend.last_price": 10.0, "user_spend.recency_s": 0.001},
        {"user_spend.orders_30d": 1.0, "user_spend.spend_30d": 20.5, "user_spend.last_price": 20.5, "user_spend.recency_s": 0.0},
    ]  # fmt: skip


def test_one_object_is_one_event(world: World) -> None:
    assert world.post_events("purchases", TWO[0]).json == {**ACK, "accepted": 1}


@pytest.mark.parametrize(("body", "content_type"), [(b"[]", None), (arrow(purchases, []), ARROW)])
def test_no_events_are_acknowledged_as_none(world: World, body: bytes, content_type: str | None) -> None:
    reply = world.post_events("purchases", body, content_type)
    assert (reply.status, reply.json) == (200, ACK)


def test_the_ack_says_what_became_of_each_event(world: World) -> None:
    batch = [
        purchase("new", book_id="x"),
        purchase("new", book_id="x"),
        purchase("new", price=11.0, book_id="x"),
        purchase("late", paid_at=NOW - HOUR - 1, book_id="x"),
        purchase("unkeyed", book_id=None),
    ]
    assert world.post_events("purchases", batch).json == {
        "accepted": 3, "duplicates": 1, "conflicts": 1, "late": 1, "too_late": 0, "unkeyed": 1,
        "forgotten": 0,
    }  # fmt: skip


def test_a_body_may_come_in_chunks_without_a_length(world: World) -> None:
    body = json.dumps(TWO).encode()
    chunks = [body[i : i + 7] for i in range(0, len(body), 7)]
    reply = world.post_events("purchases", chunks=chunks, body=b"", content_length=False)
    assert reply.json == {**ACK, "accepted": 2}


def test_a_bulk_load_arrives_when_it_happened() -> None:
    old = purchase("old", paid_at=NOW - 20 * 24 * HOUR)
    for query, late in (("", 1), ("?arrival=now", 1), ("?arrival=event", 0)):
        assert make_world().post_events(f"purchases{query}", old).json == {
            **ACK,
            "accepted": 1,
            "late": late,
            "unkeyed": 1,
            "forgotten": 0,
        }


ARRIVING = pa.schema([*purchases.schema, pa.field("_arrival_ms", pa.int64())])
ADMIN = {"authorization": f"Bearer {TOKEN}"}


def arriving(*stamps: Any, schema: pa.Schema = ARRIVING) -> bytes:
    """Purchases of an hour and a half ago, which say when they arrived."""
    old = [purchase(f"a{n}", paid_at=NOW - 3 * HOUR // 2) for n in range(len(stamps))]
    return arrow(purchases, [{**e, "_arrival_ms": s} for e, s in zip(old, stamps, strict=True)], schema)


def test_a_replay_says_when_each_event_arrived() -> None:
    body = arriving(NOW - 3 * HOUR // 2, NOW - HOUR, NOW)
    for world, headers in ((make_world(), ADMIN), (make_world(clock=EventClock()), {})):
        reply = world.post_events("purchases?arrival=given", body, ARROW, headers=headers)
        assert reply.json == {**ACK, "accepted": 3, "late": 1, "unkeyed": 3}
    # An event clock stands at the newest of the stamps.
    assert world.get("/v1/features/user_spend?user_id=1").json["as_of"] == NOW_ISO


def test_a_replay_needs_the_admin_token_where_the_clock_is_the_walls() -> None:
    world = make_world()
    for headers in ({}, {"authorization": "Bearer x"}):
        message = (
            '`?arrival=given` on a cluster with `clock = "wall"` needs the admin token of the cluster: `Authorization: '
            "Bearer ...`; it is in the file `admin_token` of the cluster's data directory"
        )
        reply = world.post_events("purchases?arrival=given", arriving(NOW), ARROW, headers=headers)
        refused(reply, 401, "unauthorized", message)
    assert world.applied == 0


@pytest.mark.parametrize(
    ("body", "content_type", "message", "path"),
    [
        (TWO, None, "body of `purchases`: arrival stamps come with Arrow only, as `_arrival_ms`", "$"),
        (arrow(purchases, []), ARROW,
         "event of `purchases`: expected one column `_arrival_ms` of `int64`, got nothing", "$[*]._arrival_ms"),
        (arriving(1, schema=ARRIVING.set(6, pa.field("_arrival_ms", pa.int32()))), ARROW,
         "event of `purchases`: expected one column `_arrival_ms` of `int64`, got int32", "$[*]._arrival_ms"),
        (arriving(NOW, None), ARROW,
         "event of `purchases`: got the arrival stamp nothing; allowed are epoch milliseconds from 1970-01-01 to "
         "2200-01-01", "$[1]._arrival_ms"),
        (arriving(NOW, -1), ARROW,
         "event of `purchases`: got the arrival stamp -1; allowed are epoch milliseconds from 1970-01-01 to 2200-01-01",
         "$[1]._arrival_ms"),
        (arriving(NOW, NOW + 600_001), ARROW,
         f"event of `purchases`: _arrival_ms {NOW + 600_001} lies 600001 ms ahead of now; allowed is 600000 ms",
         "$[1]._arrival_ms"),
        (arriving(NOW, NOW - 3 * HOUR), ARROW,
         f"event of `purchases`: paid_at {NOW - 3 * HOUR // 2} lies 5400000 ms ahead of its arrival; allowed is 600000 ms",
         "$[1].paid_at"),
    ],
)  # fmt: skip
def test_wrong_arrival_stamps_are_refused(body: Any, content_type: Any, message: str, path: str) -> None:
    world = make_world()
    reply = world.post_events("purchases?arrival=given", body, content_type, headers=ADMIN)
    refused(reply, 400, reply.error["code"], message, path)
    assert reply.error["code"] in ("invalid_events", "event_ahead")
    assert world.applied == 0


def test_arrival_stamps_that_nobody_asked_for_are_no_field(world: World) -> None:
    message = "event of `purchases`: unknown field `_arrival_ms`"
    reply = world.post_events("purchases", arriving(NOW), ARROW, headers=ADMIN)
    assert (reply.status, reply.error["message"][: len(message)]) == (400, message)


@pytest.mark.parametrize(
    ("query", "message", "path"),
    [
        ("?arrival=later", "query: `arrival` is now, event or given, got 'later'", "?arrival"),
        ("?arrival=", "query: `arrival` is now, event or given, got ''", "?arrival"),
        ("?arival=event", "query: no parameter `arival`; known: `arrival`; did you mean `arrival`?", "?arival"),
    ],
)
def test_a_wrong_query_of_events_is_refused(world: World, query: str, message: str, path: str) -> None:
    refused(world.post_events(f"purchases{query}", TWO), 400, "bad_request", message, path)
    still_serves(world)


def test_an_unknown_source_is_told_its_neighbour(world: World) -> None:
    message = "no source `purchase`; known: `logins`, `purchases`; did you mean `purchases`?"
    refused(world.post_events("purchase", TWO), 404, "not_found", message)


def test_one_bad_row_refuses_the_batch_and_says_which(world: World) -> None:
    bad = [*TWO, purchase("c", user_id="x"), purchase("d", price=None)]
    reply = world.post_events("purchases", bad)
    refused(reply, 400, "invalid_events", 'event of `purchases`: expected `int64`, got `"x"`', "$[2].user_id")
    assert reply.error["problems"] == [
        {"message": 'event of `purchases`: expected `int64`, got `"x"`', "path": "$[2].user_id"},
        {"message": "event of `purchases`: expected `float64`, got `null`", "path": "$[3].price"},
    ]
    still_serves(world)


def test_an_event_of_the_future_refuses_the_batch(world: World) -> None:
    ahead = NOW + 600_001
    message = f"event of `purchases`: paid_at {ahead} lies 600001 ms ahead of its arrival; allowed is 600000 ms"
    reply = world.post_events("purchases", [TWO[0], purchase("b", paid_at=ahead)])
    refused(reply, 400, "event_ahead", message, "$[1].paid_at")
    still_serves(world)


def test_a_wrong_content_type_is_told_the_right_ones(world: World) -> None:
    allowed = "`application/json`, `application/x-ndjson`, `application/ndjson`, `application/jsonl`, `application/vnd.apache.arrow.stream`"
    reply = world.post_events("purchases", TWO, "text/csv")
    refused(
        reply, 415, "unsupported_media_type", f"body of `purchases`: content type `text/csv`; allowed are {allowed}"
    )
    reply = world.post_score("churn", {"user_id": 1}, "text/csv")
    refused(
        reply,
        415,
        "unsupported_media_type",
        "body: content type 'text/csv'; allowed are `application/json` and `application/vnd.apache.arrow.stream`",
    )
    still_serves(world)


# -- scores


def test_one_id_gives_one_answer(world: World) -> None:
    world.post_events("purchases", [purchase("a", 1, 10.0, NOW - 5_000), purchase("b", 1, 30.0, NOW)])
    reply = world.post_score("churn", {"user_id": 1})
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    answer = reply.json
    assert len(answer.pop("id")) == 22
    assert answer == {
        "model": "churn", "version": "3", "result": 2 + 40 + 30 + 0.0, "as_of": NOW_ISO, "unknown": [],
    }  # fmt: skip


def test_a_batch_gives_an_answer_per_id_in_its_order(world: World) -> None:
    world.post_events("purchases", [purchase(str(i), i, float(i)) for i in range(50)])
    ids = [{"user_id": i} for i in (7, 49, 7, 999)]
    answers = world.post_score("churn", ids).json
    assert [a["result"] for a in answers] == [15.0, 99.0, 15.0, 0.0]
    assert [a["unknown"] for a in answers] == [[], [], [], ["user_spend"]]
    assert len({a["id"] for a in answers}) == 4


def test_ids_of_answers_differ_between_requests_and_replicas() -> None:
    ids = [make_world().post_score("churn", {"user_id": 1}).json["id"] for _ in range(3)]
    assert len({i[:12] for i in ids}) == 3


def test_no_ids_are_no_answers() -> None:
    # Nor is a predictor asked that could not take no rows.
    world = make_world([model("churn", list(user_spend), lambda: Returns(ValueError("no rows")))])
    reply = world.post_score("churn", b"[]")
    assert (reply.status, reply.json) == (200, [])


def test_a_score_after_the_ack_sees_the_event(world: World) -> None:
    for n in range(1, 4):
        world.post_events("purchases", purchase(str(n)))
        got = world.post_score("churn?features=true", {"user_id": 1}).json
        assert got["features"]["user_spend.orders_30d"] == n


def test_a_model_reads_views_of_different_keys(world: World) -> None:
    world.post_events("purchases", [purchase("a", 1, 10.0, book_id="x"), purchase("b", 2, 30.0, book_id="x")])
    got = world.post_score("offer?features=true", [{"book_id": "x", "user_id": 1}, {"book_id": "y", "user_id": 2}]).json
    assert [list(g["features"].values()) for g in got] == [[2.0, 30.0, 10.0, 1.0], [0.0, None, 30.0, 0.0]]
    assert list(got[0]["features"]) == [
        "book_sales.sold_7d",
        "book_sales.top_price",
        "user_spend.spend_30d",
        "user_book.bought",
    ]
    assert [g["unknown"] for g in got] == [[], ["book_sales", "user_book"]]


def test_an_unknown_entity_is_an_answer(world: World) -> None:
    got = world.post_score("offer?features=true", {"user_id": 5, "book_id": "nowhere"}).json
    assert got["unknown"] == ["book_sales", "user_spend", "user_book"]
    assert got["result"] == 0.0
    assert got["features"]["book_sales.top_price"] is None  # JSON has no NaN


def test_an_int64_may_be_a_string_of_its_digits(world: World) -> None:
    big = 2**63 - 1
    world.post_events("purchases", purchase("a", str(big)))
    assert world.post_score("churn", {"user_id": str(big)}).json["unknown"] == []
    assert world.post_score("churn", {"user_id": big}).json["unknown"] == []
    assert world.get(f"/v1/features/user_spend?user_id={big}").json["key"] == {"user_id": big}


def test_the_features_of_an_answer_are_what_was_read_whatever_the_predictor_does_to_them() -> None:
    def scribbles(features: Any) -> Any:
        features.matrix[:] = -1.0
        return features.matrix[:, 0]

    world = make_world([model("scribbler", list(user_spend), lambda: Returns(scribbles))])
    got = world.post_score("scribbler?features=true", {"user_id": 1}).json
    assert list(got["features"].values()) == [0.0, 0.0, None, None]
    assert got["result"] == -1.0
    assert list(world.get("/v1/features/user_spend?user_id=1").json["features"].values()) == [0.0, 0.0, None, None]


@pytest.mark.parametrize("query", ["?features=false", ""])
def test_features_are_in_the_answer_if_asked_for(world: World, query: str) -> None:
    assert "features" not in world.post_score(f"churn{query}", {"user_id": 1}).json


@pytest.mark.parametrize(
    ("query", "message", "path"),
    [
        ("?features=yes", "query: `features` is true or false, got 'yes'", "?features"),
        ("?features", "query: `features` is true or false, got ''", "?features"),
        ("?asof=5", "query: no parameter `asof`; known: `as_of`, `features`; did you mean `as_of`?", "?asof"),
    ],
)
def test_a_wrong_query_of_a_score_is_refused(world: World, query: str, message: str, path: str) -> None:
    refused(world.post_score(f"churn{query}", {"user_id": 1}), 400, "bad_request", message, path)


WRONG_IDS = [
    ("churn", {}, "bad_id", "model `churn`: key field `user_id` is missing; an id is `user_id`", "$.user_id"),
    ("churn", [{"user_id": 1}, {}], "bad_id", "model `churn`: key field `user_id` is missing; an id is `user_id`", "$[1].user_id"),
    ("offer", {"user_id": 1}, "bad_id", "model `offer`: key field `book_id` is missing; an id is `book_id`, `user_id`", "$.book_id"),
    ("churn", {"user_id": 1, "book_id": "x"}, "bad_id", "model `churn`: unknown field `book_id`; an id is `user_id` and nothing else; known: `user_id`", "$.book_id"),
    ("churn", {"user_id": 1, "userid": 2}, "bad_id", "model `churn`: unknown field `userid`; an id is `user_id` and nothing else; known: `user_id`; did you mean `user_id`?", "$.userid"),
    ("churn", {"user_id": "x"}, "bad_id", "model `churn`: expected `user_id` as int64, got 'x'", "$.user_id"),
    ("churn", {"user_id": 1.0}, "bad_id", "model `churn`: expected `user_id` as int64, got 1.0", "$.user_id"),
    ("churn", {"user_id": True}, "bad_id", "model `churn`: expected `user_id` as int64, got true", "$.user_id"),
    ("churn", {"user_id": 2**63}, "bad_id", "model `churn`: expected `user_id` as int64, got 9223372036854775808", "$.user_id"),
    ("churn", {"user_id": "-9223372036854775809"}, "bad_id", "model `churn`: expected `user_id` as int64, got '-9223372036854775809'", "$.user_id"),
    ("offer", {"user_id": 1, "book_id": 7}, "bad_id", "model `offer`: expected `book_id` as string of at most 1024 bytes, got 7", "$.book_id"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body", "code", "message", "path"), WRONG_IDS)
def test_a_wrong_id_is_refused(world: World, name: str, body: Any, code: str, message: str, path: str) -> None:
    refused(world.post_score(name, body), 400, code, message, path)


@pytest.mark.parametrize("null", [None])
def test_a_null_key_is_no_key(world: World, null: None) -> None:
    reply = world.post_score("churn", {"user_id": null})
    assert (reply.status, reply.error["code"], reply.error["path"]) == (400, "bad_id", "$.user_id")


@pytest.mark.parametrize("field", ["orders_30d", "user_spend.orders_30d"])
def test_feature_values_in_a_request_are_refused_with_the_reason(world: World, field: str) -> None:
    message = (
        f"model `churn`: `{field}` is a feature, and feature values are not taken from a request: Millpond computes "
        "them from raw events, the same for training and serving; send the events to their source and only the "
        "id (`user_id`) here"
    )
    refused(world.post_score("churn", {"user_id": 1, field: 3}), 400, "features_in_request", message, f"$.{field}")


@pytest.mark.parametrize("body", [5, "user 1", None, True])
def test_what_is_no_object_is_no_id(world: World, body: Any) -> None:
    reply = world.post_score("churn", body)
    assert (reply.status, reply.error["code"], reply.error["path"]) == (400, "bad_id", "$")
    assert reply.error["message"].startswith("model `churn`: an id is an object with `user_id`, got ")
    reply = world.post_score("churn", [{"user_id": 1}, body])
    assert (reply.status, reply.error["code"], reply.error["path"]) == (400, "bad_id", "$[1]")


def test_an_unknown_model_is_told_its_neighbour(world: World) -> None:
    reply = world.post_score("churm", {"user_id": 1})
    refused(reply, 404, "not_found", "no model `churm`; known: `churn`, `offer`; did you mean `churn`?")


def test_more_ids_than_the_limit_are_refused() -> None:
    world = make_world(scores=ScoreLimits(ids_max=3))
    assert len(world.post_score("churn", [{"user_id": 1}] * 3).json) == 3
    reply = world.post_score("churn", [{"user_id": 1}] * 4)
    refused(reply, 413, "too_large", "body: 4 ids; allowed are 3 in a request")


def test_at_most_ten_problems_are_named(world: World) -> None:
    reply = world.post_score("churn", [{"user_id": "x"}] * 100)
    assert [p["path"] for p in reply.error["problems"]] == [f"$[{i}].user_id" for i in range(10)]


# -- as of


@pytest.mark.parametrize(
    "text",
    [
        "1700000060000",
        "2023-11-14T22:14:20Z",
        "2023-11-14T22:14:20.000Z",
        "2023-11-14T23:14:20%2B01:00",
        "2023-11-14T23:14:20+01:00",  # a `+` that was not escaped arrives as a blank
        "2023-11-14T17:14:20-05:00",
    ],
)
def test_as_of_takes_iso_8601_with_a_zone_or_milliseconds(world: World, text: str) -> None:
    world.post_events("purchases", purchase("a"))
    got = world.post_score(f"churn?features=true&as_of={text}", {"user_id": 1}).json
    assert got["as_of"] == "2023-11-14T22:14:20.000Z"
    assert got["features"]["user_spend.recency_s"] == 60.0
    got = world.get(f"/v1/features/user_spend?user_id=1&as_of={text}").json
    assert (got["as_of"], got["features"]["recency_s"]) == ("2023-11-14T22:14:20.000Z", 60.0)


@pytest.mark.parametrize(
    "text",
    ["now", "", "-1", "1700000000.5", "2023-11-14T22:14:20", "2023-11-14", "2200-01-01T00:00:00Z", "9" * 15, "9" * 400,
     "\u0661\u0662", "1969-12-31T23:59:59Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"],
)  # fmt: skip
def test_any_other_as_of_is_refused(world: World, text: str) -> None:
    from urllib.parse import quote

    message = (
        "query: `as_of` is a time of 1970 to 2200, ISO 8601 with a zone or milliseconds since the epoch, "
        f"got {text[:80].replace('+', ' ') if '%' in text else text[:80]!r}"
    )
    refused(world.post_score(f"churn?as_of={quote(text)}", {"user_id": 1}), 400, "bad_request", message, "?as_of")


def test_an_as_of_in_the_past_is_a_conflict(world: World) -> None:
    message = (
        f"as_of {NOW - 1} lies before {NOW}, up to which events have been applied, and an open tile cannot be cut in "
        "two (exact features can): ask as of a later time, or leave as_of out"
    )
    refused(world.post_score(f"churn?as_of={NOW - 1}", {"user_id": 1}), 409, "as_of_in_past", message, "as_of")
    refused(world.get(f"/v1/features/user_spend?user_id=1&as_of={NOW - 1}"), 409, "as_of_in_past", message, "as_of")


def test_features_that_are_all_exact_are_answered_as_of_the_past() -> None:
    recent = FeatureView(
        "recent", owner="shelf", source=purchases, key=["user_id"],
        features={"n": Count(window="10m", exact=True), "last": Last("price", window="1h", exact=True)},
    )  # fmt: skip
    world = make_world([model("m", list(recent))], layout=compile_layout([], [recent]))
    minute = 60_000
    world.post_events("purchases", [purchase(str(i), 1, float(i), NOW - i * minute) for i in range(1, 9)])
    for ago, want in ((0, [8, 1]), (3 * minute, [6, 3]), (3 * minute + 1, [5, 4]), (9 * minute, [0, None])):
        got = world.get(f"/v1/features/recent?user_id=1&as_of={NOW - ago}").json
        assert (list(got["features"].values()), got["unknown"]) == (want, want[0] == 0)
        assert world.post_score(f"m?as_of={NOW - ago}", {"user_id": 1}).json["result"] == sum(want[: 1 + (want[0] > 0)])
    message = (
        f"as_of {NOW - 10 * minute - 1} lies before {NOW}, up to which events have been applied, and exact features of "
        "these windows are kept for as_of up to 600000 ms before that: ask as of a later time, or leave as_of out"
    )
    reply = world.post_score(f"m?as_of={NOW - 10 * minute - 1}", {"user_id": 1})
    refused(reply, 409, "as_of_in_past", message, "as_of")


def test_before_any_event_an_event_clock_says_no_time() -> None:
    world = make_world(clock=EventClock())
    assert world.post_score("churn", {"user_id": 1}).json["as_of"] is None
    assert world.get("/v1/features/user_spend?user_id=1").json["as_of"] is None
    world.post_events("purchases", purchase("a", 2))
    assert world.post_score("churn", {"user_id": 1}).json["as_of"] == NOW_ISO


# -- strings, lists and derived features


TASTES = compile_layout([], [taste, user_spend])


class Shelf:
    """What a page would show: the newest book, and whether it was dear."""

    def predict(self, features: Any) -> Any:
        dear = features.matrix[:, features.names.index("taste.mean")] > 3
        features.matrix[:] = -1.0  # a predictor's matrix is its own
        return [{"book": b[0], "dear": d} for b, d in zip(features.texts["taste.books"], dear, strict=True)]


@pytest.mark.parametrize("n_shards", [1, 3])
def test_features_of_every_kind_are_answered_by_their_names(n_shards: int) -> None:
    shelf = model("shelf", [*taste, user_spend["last_price"]], Shelf)
    world = make_world([shelf], n_shards=n_shards, layout=TASTES)
    sold = [("x", 4.0, 30), ("ü", 6.0, 20), (None, 20.0, 10), ("y", -1.0, 5)]
    world.post_events("purchases", [purchase(str(i), 1, p, NOW - ago, book_id=b) for i, (b, p, ago) in enumerate(sold)])
    known = {
        "n": 3.0, "dear": 26.0, "mean": 26 / 3, "first_book": "x", "books": ["ü", "x", None], "prices": [20.0, 6.0],
        "swing": 14.0, "wide": float(np.std([4.0, 6.0, 20.0])),
    }  # fmt: skip
    stranger = {
        "n": 0.0, "dear": 0.0, "mean": None, "first_book": None, "books": [None] * 3, "prices": [None] * 2,
        "swing": None, "wide": None,
    }  # fmt: skip
    for user, want in ((1, known), (2, stranger)):
        answer = world.get(f"/v1/features/taste?user_id={user}").json
        assert list(answer["features"].items()) == list(want.items())
        assert answer["unknown"] == (user == 2)
    answers = world.post_score("shelf?features=true", [{"user_id": 1}, {"user_id": 2}]).json
    assert [a["result"] for a in answers] == [{"book": "ü", "dear": True}, {"book": None, "dear": False}]
    for answer, want, last in zip(answers, (known, stranger), (-1.0, None), strict=True):
        named = {f"taste.{name}": value for name, value in want.items()} | {"user_spend.last_price": last}
        assert list(answer["features"].items()) == list(named.items())
    assert world.post_score("shelf?features=true", []).json == []


def test_a_derived_feature_that_fails_is_named() -> None:
    broken = FeatureView(
        "broken", owner="ml", source=purchases, key=["user_id"],
        features={"n": Count(), "rows": Derived(lambda n: n[:0], "n"), "last": LastN("price", n=2)},
    )  # fmt: skip
    layout = compile_layout([], [broken, user_spend])
    world = make_world([churn, model("m", [broken["rows"]]), model("fine", [broken["n"]])], layout=layout)
    for reply, subject in (
        (world.post_score("m", {"user_id": 1}), "model `m`"),
        (world.get("/v1/features/broken?user_id=1"), "view `broken`"),
    ):
        assert (reply.status, reply.error["code"], reply.error["path"]) == (500, "feature_failed", None)
        assert reply.error["message"].startswith(f"{subject}: the function of feature `broken.rows` raised TypeError;")
    assert world.post_score("fine", {"user_id": 1}).status == world.post_score("churn", {"user_id": 1}).status == 200


# -- predictors that fail


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (ValueError("no luck"), "predict raised ValueError; its text is in the log of the deployment"),
        (Unavailable("busy"), "predict raised Unavailable; its text is in the log of the deployment"),
        (float("nan"), "predict returned the number nan, which JSON cannot hold"),
        ([1.0, -math.inf], "predict returned the number -inf, which JSON cannot hold"),
        (np.float32("inf"), "predict returned the number inf, which JSON cannot hold"),
        ({"rank": [np.array([1.0, np.nan])]}, "predict returned the number nan, which JSON cannot hold"),
        ({1, 2}, "predict returned a value of type `set`, which JSON cannot hold"),
        (2**64, "predict returned an integer of more than 64 bits, which JSON cannot hold"),
        ([-(2**63) - 1], "predict returned an integer of more than 64 bits, which JSON cannot hold"),
        (b"bytes", "predict returned a value of type `bytes`, which JSON cannot hold"),
        (1j, "predict returned a value of type `complex`, which JSON cannot hold"),
        (np.datetime64("2024-01-01", "ms"), "predict returned a value of type `datetime`, which JSON cannot hold"),
        ({"a": {7: 1}}, "predict returned an object with the key 7, which JSON cannot hold"),
        ("\ud800", "predict returned the text '\\ud800', which JSON cannot hold"),
        ({"\ud800": 1}, "predict returned the text '\\ud800', which JSON cannot hold"),
        (lambda f: [1.0] * (len(f.matrix) + 1), "predict returned 2 results for 1 rows"),
        (lambda f: np.empty((0, 3)), "predict returned 0 results for 1 rows"),
        (lambda f: None, "predict raised TypeError; its text is in the log of the deployment"),
        (lambda f: np.array(3.0), "predict raised TypeError; its text is in the log of the deployment"),
        (lambda f: {"score": 0.5}, "predict returned a `dict`; expected a list or an array of one result per row"),
        (lambda f: {0.5}, "predict returned a `set`; expected a list or an array of one result per row"),
        (lambda f: "x", "predict returned a `str`; expected a list or an array of one result per row"),
        (lambda f: b"x", "predict returned a `bytes`; expected a list or an array of one result per row"),
    ],
)
def test_a_predictor_that_fails_is_named(what: Any, message: str) -> None:
    world = make_world([churn, model("broken", list(user_spend), lambda: Returns(what))])
    refused(world.post_score("broken", {"user_id": 1}), 500, "prediction_failed", f"model `broken`: {message}")
    assert world.post_score("churn", {"user_id": 1}).status == 200


def test_of_several_ids_one_whose_result_is_none_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    world = make_world([model("mean", list(user_spend), lambda: Returns(mean_price))])
    world.post_events("purchases", [purchase("a", 1, 10.0), purchase("b", 3, 30.0)])
    good, bad, other, worse = world.post_score("mean", [{"user_id": i} for i in (1, 2, 3, 4)]).json
    message = "model `mean`: predict returned the number nan, which JSON cannot hold"
    error = {"code": "prediction_failed", "message": message, "path": "$[1]", "status": 500}
    assert (bad, worse) == ({"error": error}, {"error": error | {"path": "$[3]"}})
    assert [good["result"], other["result"]] == [10.0, 30.0]
    assert f"2 of 4 ids failed, the first: {message}" in caplog.messages
    refused(world.post_score("mean", {"user_id": 2}), 500, "prediction_failed", message)
    # What is no answer of an id at all is the request's.
    assert world.post_score("mean", [{"user_id": 1}, {"user": 2}]).status == 400


def test_the_exception_of_a_predictor_is_in_the_log_and_not_in_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    error = FileNotFoundError(2, "No such file", "/secret/weights.npy")
    world = make_world([model("broken", list(user_spend), lambda: Returns(error))])
    reply = world.post_score("broken", {"user_id": 1})
    message = "model `broken`: predict raised FileNotFoundError; its text is in the log of the deployment"
    refused(reply, 500, "prediction_failed", message)
    logged = next(r for r in caplog.records if r.name == "millpond.models")
    assert logged.getMessage() == "model `broken`: predict raised FileNotFoundError"
    assert logged.exc_info is not None
    assert logged.exc_info[1] is error


def test_a_result_without_end_is_named() -> None:
    endless: list[Any] = []
    endless.append(endless)
    reply = make_world([model("broken", list(user_spend), lambda: Returns(endless))]).post_score(
        "broken", {"user_id": 1}
    )
    assert (reply.status, reply.error["code"]) == (500, "prediction_failed")


@pytest.mark.parametrize(
    ("what", "result"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (None, None),
        ("yes", "yes"),
        (2**60, 2**60),
        ({"books": [{"id": "x", "p": np.float64(0.25)}], "n": np.arange(2)}, {"books": [{"id": "x", "p": 0.25}], "n": [0, 1]}),
        ((1, 2.5), [1, 2.5]),
    ],
)  # fmt: skip
def test_a_result_is_a_number_or_any_json(what: Any, result: Any) -> None:
    world = make_world([model("any", list(user_spend), lambda: Returns(what))])
    assert [a["result"] for a in world.post_score("any", [{"user_id": 1}, {"user_id": 2}]).json] == [result] * 2


def test_a_matrix_of_results_is_a_list_for_each_id() -> None:
    world = make_world([model("any", list(user_spend), lambda: Returns(lambda f: f.matrix[:, :2] + 0.5))])
    assert world.post_score("any", {"user_id": 1}).json["result"] == [0.5, 0.5]


# -- features of one entity


def test_the_features_of_one_entity(world: World) -> None:
    world.post_events("purchases", purchase("a", 1, 10.0, book_id="b & c"))
    assert world.get("/v1/features/user_book?user_id=1&book_id=b%20%26+c").json == {
        "view": "user_book", "key": {"user_id": 1, "book_id": "b & c"}, "features": {"bought": 1.0},
        "as_of": NOW_ISO, "unknown": False,
    }  # fmt: skip
    unknown = world.get("/v1/features/book_sales?book_id=").json
    assert (unknown["features"], unknown["unknown"]) == ({"sold_7d": 0.0, "top_price": None}, True)


@pytest.mark.parametrize(
    ("target", "status", "code", "message", "path"),
    [
        ("user_spent?user_id=1", 404, "not_found", "no view `user_spent`; known: `book_sales`, `device_logins`, `user_book`, `user_spend`; did you mean `user_spend`?", None),
        ("user_spend", 400, "bad_id", "view `user_spend`: key field `user_id` is missing; an id is `user_id`", "$.user_id"),
        ("user_spend?user_id=x", 400, "bad_id", "view `user_spend`: expected `user_id` as int64, got 'x'", "$.user_id"),
        ("user_spend?user_id=1&color=red", 400, "bad_id", "view `user_spend`: unknown field `color`; an id is `user_id` and nothing else; known: `user_id`", "$.color"),
    ],
)  # fmt: skip
def test_a_wrong_question_for_features_is_refused(
    world: World, target: str, status: int, code: str, message: str, path: str | None
) -> None:
    refused(world.get(f"/v1/features/{target}"), status, code, message, path)


# -- routes, health, administration


@pytest.mark.parametrize(
    ("method", "target", "status", "message"),
    [
        ("GET", "/v1/score/churn", 405, "GET /v1/score/churn: allowed is POST"),
        ("PUT", "/v1/score/churn", 405, "PUT /v1/score/churn: allowed is POST"),
        ("POST", "/v1/features/user_spend", 405, "POST /v1/features/user_spend: allowed is GET"),
        ("DELETE", "/healthz", 405, "DELETE /healthz: allowed is GET"),
        ("GET", "/nope", 404, "no call GET /nope; there are POST /v1/score/{name}, POST /v1/score, GET /v1/features/{name}, GET /healthz, GET /readyz, GET /v1/explain/{name}, POST /v1/forget, GET /v1/forget, GET /v1/status, GET /openapi.json, GET /docs"),
        ("POST", "/v1/score/", 404, "no call POST /v1/score/; there are POST /v1/score/{name}, POST /v1/score, GET /v1/features/{name}, GET /healthz, GET /readyz, GET /v1/explain/{name}, POST /v1/forget, GET /v1/forget, GET /v1/status, GET /openapi.json, GET /docs"),
        ("POST", "/v1/score/churn/2", 404, "no model `churn/2`; known: `churn`, `offer`; did you mean `churn`?"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_told_the_right_ones(world: World, method: str, target: str, status: int, message: str) -> None:
    reply = call(world.score, method, target, b"{}")
    refused(reply, status, {404: "not_found", 405: "method_not_allowed"}[status], message)
    assert reply.headers.get("allow") == (message.rpartition(" ")[2] if status == 405 else None)


@pytest.mark.parametrize(
    ("method", "target", "name"),
    [
        ("GET", "/v1/features/user_spend?user_id=1&user_id=2", "user_id"),
        ("GET", "/v1/features/user_spend?user_id=1&user_id=1", "user_id"),
        ("GET", "/v1/features/user_spend?user_id=1&as_of=1700000060000&as_of=", "as_of"),
        ("POST", "/v1/score/churn?features=true&features=false", "features"),
    ],
)
def test_a_query_parameter_that_comes_twice_is_refused(world: World, method: str, target: str, name: str) -> None:
    reply = call(world.score, method, target, b'{"user_id": 1}')
    refused(reply, 400, "bad_request", f"query: `{name}` comes twice; allowed is once", f"?{name}")


def test_the_events_app_has_one_call(world: World) -> None:
    refused(
        call(world.events, "GET", "/v1/events/purchases"),
        405,
        "method_not_allowed",
        "GET /v1/events/purchases: allowed is POST",
    )
    refused(
        call(world.events, "POST", "/v1/events"),
        404,
        "not_found",
        "no call POST /v1/events; there are POST /v1/events/{name}",
    )


@pytest.mark.parametrize(
    ("path", "root_path"),
    [("/v1/events/purchases", "/v1/events"), ("/purchases", "/v1/events"), ("/v1/events/purchases", "")],
)
def test_an_app_answers_below_its_prefix_whether_the_server_leaves_it_or_not(
    world: World, path: str, root_path: str
) -> None:
    assert call(world.events, "POST", path, TWO, root_path=root_path).json == {**ACK, "accepted": 2}


def test_health(world: World) -> None:
    assert (world.get("/healthz").status, world.get("/healthz").json) == (200, {"status": "ok"})
    assert (world.get("/readyz").status, world.get("/readyz").json) == (
        200,
        {"status": "ready", "shards": 2, "models": ["churn", "offer"], "broken": {}},
    )


def test_a_lost_shard_is_alive_but_not_ready() -> None:
    message = "shard 1 of 2 was restarted and its features are gone; start the cluster anew and load the events again"

    async def lost() -> list[dict[str, Any]]:
        raise Unavailable(message, code="shard_lost", retry_after_ms=10_000)

    world = make_world(status=lost)
    reply = world.get("/readyz")
    refused(reply, 503, "shard_lost", message)
    assert reply.headers["retry-after"] == "10"
    assert world.get("/healthz").status == 200


@pytest.mark.parametrize(("ms", "seconds"), [(1, "1"), (100, "1"), (1_000, "1"), (1_001, "2")])
def test_retry_after_is_in_whole_seconds_and_never_0(ms: int, seconds: str) -> None:
    async def busy() -> list[dict[str, Any]]:
        raise Unavailable("busy", retry_after_ms=ms)

    assert make_world(status=busy).get("/readyz").headers["retry-after"] == seconds


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Bearer {TOKEN} ", f"Bearer x{TOKEN}", f"Basic {TOKEN}", "Bearer \xff", TOKEN,
     f" {TOKEN}", f"Bearer  {TOKEN}", f"Bearer Bearer {TOKEN}", f"bearer{TOKEN}"],
)  # fmt: skip
def test_the_status_needs_the_admin_token(world: World, authorization: str | None) -> None:
    reply = world.get("/v1/status", headers={} if authorization is None else {"authorization": authorization})
    message = (
        "this call needs the admin token of the cluster: `Authorization: Bearer ...`; it is in the file "
        "`admin_token` of the cluster's data directory"
    )
    refused(reply, 401, "unauthorized", message)


def test_a_cluster_without_a_token_lets_nobody_in() -> None:
    world = make_world(token="")
    for authorization in ("Bearer", "Bearer "):
        assert world.get("/v1/status", headers={"authorization": authorization}).status == 401


def test_the_status_shows_shards_and_models(world: World) -> None:
    world.post_events("purchases", TWO)
    status = world.get("/v1/status", headers={"authorization": f"Bearer {TOKEN}"}).json
    assert status["models"] == [
        {"model": "churn", "version": "3", "owner": "retention"}, {"model": "offer", "version": "3", "owner": "retention"},
    ]  # fmt: skip
    assert [s["shard"] for s in status["shards"]] == [0, 1]
    assert sum(s["events"]["purchases[user_id]"] for s in status["shards"]) == 2
    assert status["answering"] == {view.name: version_name(view) for view in VIEWS}


def test_no_call_but_status_needs_or_leaks_the_token(world: World) -> None:
    for target in ("/docs", "/openapi.json", "/readyz", "/healthz"):
        assert world.get(target).status == 200
        assert TOKEN.encode() not in world.get(target).body


# -- the description of the calls


@pytest.fixture
def openapi(world: World) -> dict[str, Any]:
    reply = world.get("/openapi.json")
    assert reply.headers["content-type"] == "application/json"
    document: dict[str, Any] = reply.json
    return document


def test_epoch_seconds_are_refused_unless_time_is_what_events_say() -> None:
    seconds = purchase("a", paid_at=NOW // 1_000)
    reply = make_world().post_events("purchases", seconds)
    refused(reply, 400, "invalid_events", "event of `purchases`: expected `timestamp[ms, UTC]`, got `1700000000`, "
            "which is 2023-11-14 in epoch seconds; allowed are milliseconds: send 1700000000000, or if it happened in "
            "1970 its time as ISO 8601", "$.paid_at")  # fmt: skip
    assert make_world(clock=EventClock()).post_events("purchases", seconds).json["accepted"] == 1


def test_openapi_describes_a_call_for_each_source_model_and_view(openapi: dict[str, Any]) -> None:
    assert openapi["openapi"] == "3.1.0"
    assert openapi["info"] == {"title": "Millpond: test", "version": "1"}
    assert {(path, *calls) for path, calls in openapi["paths"].items()} == {
        ("/v1/events/purchases", "post"), ("/v1/events/logins", "post"), ("/v1/score/churn", "post"), ("/v1/score/offer", "post"), ("/v1/score", "post"),
        *((f"/v1/features/{v.name}", "get") for v in VIEWS), ("/healthz", "get"), ("/readyz", "get"), ("/v1/status", "get"),
        ("/v1/explain/churn", "get"), ("/v1/explain/offer", "get"), ("/v1/forget", "post", "get"), ("/openapi.json", "get"), ("/docs", "get"),
    }  # fmt: skip
    for path, calls in openapi["paths"].items():
        for operation in calls.values():
            assert operation.get("security") == (
                [{"admin_token": []}] if path.startswith(("/v1/status", "/v1/explain", "/v1/forget")) else None
            )
    assert openapi["components"]["securitySchemes"] == {
        "admin_token": {
            "type": "http", "scheme": "bearer",
            "description": "Authorization: Bearer TOKEN; it is in the file `admin_token` of the cluster's data directory",
        }
    }  # fmt: skip


def test_every_call_that_is_served_is_described_and_no_other(world: World, openapi: dict[str, Any]) -> None:
    described = {(m.upper(), path) for path, calls in openapi["paths"].items() for m in calls}
    routes = [tuple(path.split(" ")) for app in (world.events, world.score) for path in app._paths]
    named = {route for route in routes if route[1].endswith("{name}")}
    prefixes = {(method, path.removesuffix("{name}")) for method, path in named}
    assert described >= set(routes) - named
    of_names = described - set(routes)
    assert {(method, path.rpartition("/")[0] + "/") for method, path in of_names} == prefixes
    # And none of them can be taken by a deployment of a team's own.
    for _, path in routes:
        with pytest.raises(DeclarationError, match="would take calls of"):
            Deployment("own", owner="shop", route_prefix=path.removesuffix("/{name}"), app=dict)


def test_openapi_is_well_formed(openapi: dict[str, Any]) -> None:
    operations = [o for calls in openapi["paths"].values() for o in calls.values()]
    assert len({o["operationId"] for o in operations}) == len(operations)
    schemas: list[Any] = [*openapi["components"]["schemas"].values()]
    for operation in operations:
        assert operation.keys() <= {"summary", "operationId", "responses", "requestBody", "parameters", "security"}
        assert operation["responses"].keys() - {"200", "202"} == {"4XX", "5XX"}
        for response in operation["responses"].values():
            assert response["description"]
            schemas += [media["schema"] for media in response["content"].values()]
        if "requestBody" in operation:
            schemas += [media["schema"] for media in operation["requestBody"]["content"].values()]
        parameters = operation.get("parameters", [])
        assert len({p["name"] for p in parameters}) == len(parameters)
        for parameter in parameters:
            assert parameter.keys() == {"name", "in", "required", "schema", "description"}
            assert parameter["in"] == "query"
            schemas.append(parameter["schema"])
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
    assert json.dumps(openapi).count("$ref") == json.dumps(openapi).count("#/components/schemas/Error")


def _valid(openapi: dict[str, Any], schema: Any, value: Any) -> bool:
    validator = jsonschema.Draft202012Validator({**schema, "components": openapi["components"]})
    return bool(validator.is_valid(value))


def test_openapi_says_what_the_calls_take_and_answer(world: World, openapi: dict[str, Any]) -> None:
    def schema(path: str, part: str, method: str = "post") -> Any:
        operation = openapi["paths"][path][method]
        content = operation["requestBody"] if part == "body" else operation["responses"][part]
        return content["content"]["application/json"]["schema"]

    bodies = [TWO, TWO[0], [], purchase("z", "42", paid_at="2023-11-14T22:00:00Z"), purchase("y", "x"), {**TWO[0], "more": 1}, {"order_id": "c"}, 5,
              purchase("w", price=None), purchase("u", user_id=None), purchase("v", user_id="042")]  # fmt: skip
    for body in bodies:
        reply = world.post_events("purchases", body)
        assert _valid(openapi, schema("/v1/events/purchases", "body"), body) == (reply.status == 200), body
        assert _valid(openapi, schema("/v1/events/purchases", "200" if reply.status == 200 else "4XX"), reply.json)
    ids = [
        {"user_id": 1},
        {"user_id": "1"},
        [{"user_id": 1}, {"user_id": 2}],
        [],
        {},
        {"user_id": "x"},
        {"user_id": 1, "a": 2},
        {"user_id": 1.5},
    ]
    for body in ids:
        reply = world.post_score("churn", body)
        assert _valid(openapi, schema("/v1/score/churn", "body"), body) == (reply.status == 200), body
        assert _valid(openapi, schema("/v1/score/churn", "200" if reply.status == 200 else "4XX"), reply.json), (
            reply.body
        )


def test_openapi_names_every_parameter_of_a_call(world: World, openapi: dict[str, Any]) -> None:
    names = {
        path: [p["name"] for p in o.get("parameters", [])]
        for path, calls in openapi["paths"].items()
        for o in calls.values()
    }
    assert names["/v1/events/purchases"] == ["arrival"]
    assert names["/v1/score/offer"] == ["as_of", "features"]
    assert names["/v1/features/user_book"] == ["user_id", "book_id", "as_of"]
    assert openapi["paths"]["/v1/score/offer"]["post"]["parameters"][0]["description"] == (
        "for replays: ISO 8601 with a zone, or milliseconds; not before the clock nor before what has been applied, "
        "but where all features read are exact"
    )


def test_the_page_shows_every_source_model_and_view_and_escapes_them(world: World) -> None:
    reply = world.get("/docs")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    page = reply.body.decode()
    for path in (
        "events/purchases",
        "events/logins",
        "score/churn",
        "score/offer",
        *(f"features/{v.name}" for v in VIEWS),
    ):
        assert f"/v1/{path}<" in page
        assert f'curl -s "http://127.0.0.1/v1/{path}' in page
    for view in VIEWS:
        for feature in view:
            assert f"<code>{feature.name}</code>" in page
    for name in (*purchases.fields, *offer.features):
        assert f"<code>{getattr(name, 'full_name', name)}</code>" in page
    assert "One row per &lt;b&gt;paid&lt;/b&gt; order line." in page
    assert "<b>" not in page


def test_openapi_and_the_page_tell_how_each_feature_is_made() -> None:
    world = make_world([model("m", list(taste))], layout=TASTES)
    schema = world.get("/openapi.json").json["paths"]["/v1/features/taste"]["get"]["responses"]["200"]["content"]
    features = schema["application/json"]["schema"]["properties"]["features"]["properties"]
    number, text = {"type": ["number", "null"]}, {"type": ["string", "null"]}
    priced, dear = "(price >= 0)", "((price >= 0) and (price > 5))"
    assert features == {
        "n": {**number, "description": f"Count(), 30d, where {priced}"},
        "dear": {**number, "description": f'Sum("price"), 30d, exact, where {dear}'},
        "mean": {**number, "description": 'Ratio("dear", "n")'},
        "first_book": {**text, "description": f'First("book_id"), lifetime, ttl 90d, where {priced}'},
        "books": {"type": "array", "items": text, "description": f'LastN("book_id", n=3), lifetime, where {priced}'},
        "prices": {"type": "array", "items": number, "description": f'LastN("price", n=2), 30d, where {priced}'},
        "swing": {**number, "description": 'Derived(swing, "prices")'},
        "wide": {**number, "description": f'Std("price"), lifetime, where {priced}'},
    }
    answer = world.get("/v1/features/taste?user_id=1").json
    jsonschema.Draft202012Validator(schema["application/json"]["schema"]).validate(answer)
    page = html.unescape(world.get("/docs").body.decode())
    rows = [re.sub(r"\s*<[^>]+>\s*", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    rows = [re.sub(r"\|+", "|", row).strip("|") for row in rows]
    for row in (
        "feature|aggregation|window|where",
        f"n|Count()|30d|{priced}",
        f'dear|Sum("price")|30d, exact|{dear}',
        'mean|Ratio("dear", "n")',
        f'first_book|First("book_id")|lifetime, ttl 90d|{priced}',
        f'books|LastN("book_id", n=3)|lifetime|{priced}',
        'swing|Derived(swing, "prices")',
    ):
        assert row in rows, rows
    assert "<p>Reads 8 features: <code>taste.n</code> " in page
    assert "<code>taste.books</code>" in page


def test_what_an_aggregation_is_told_besides_its_field_is_told_to_whoever_reads_its_answers() -> None:
    view = FeatureView(
        "runs", owner="ml", source=purchases, key=["user_id"],
        features={"dear": Streak(of=pc.field("price") > 5), "visits": Sessions(gap="1h", window="30d"),
                  "spent": SumBy("price", by="book_id", categories=["b1", "b7"])},
    )  # fmt: skip
    world = make_world([], layout=compile_layout([], [view]))
    schema = world.get("/openapi.json").json["paths"]["/v1/features/runs"]["get"]["responses"]["200"]["content"]
    features = schema["application/json"]["schema"]["properties"]["features"]["properties"]
    assert {name: feature["description"] for name, feature in features.items()} == {
        "dear": "Streak(of=(price > 5), n=32), lifetime", "visits": 'Sessions(gap="1h", n=8), 30d',
        "spent": 'SumBy("price", by="book_id", categories=["b1", "b7"]), lifetime',
    }  # fmt: skip


def test_the_page_of_a_cluster_of_hostile_words_holds_no_markup_of_theirs() -> None:
    evil = "<script>alert(1)</script>'\"&{{ 7*7 }}"
    source = Source("s", owner=evil, about=evil, fields={"k": "string", "at": "timestamp[ms, UTC]"}, event_time="at")
    view = FeatureView("v", owner=evil, about=evil, source=source, key=["k"], features={"n": Count(window="1h")})
    page = make_world([], layout=compile_layout([source], [view]), cluster_name=evil).get("/docs").body.decode()
    assert "<script" not in page
    assert "49" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 6  # the name twice, owner and about of both


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("mill.example:8000", "http://mill.example:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("10.0.0.7", "http://10.0.0.7"),
        (None, "http://127.0.0.1"),
        ("", "http://127.0.0.1"),
        ("x:port", "http://127.0.0.1"),
        ("<script>alert(1)</script>", "http://127.0.0.1"),
        ('"; rm -rf ~; "', "http://127.0.0.1"),
        ("$(reboot)", "http://127.0.0.1"),
        ("a.example\n", "http://127.0.0.1"),
    ],
)
def test_the_lines_of_the_page_call_the_host_that_was_asked(world: World, host: str | None, url: str) -> None:
    page = world.get("/docs", headers={} if host is None else {"host": host}).body.decode()
    assert set(re.findall(r'curl -s "(.*?)/(?:v1/|healthz|readyz)', page)) == {url}


def test_the_examples_of_the_page_work_as_they_stand() -> None:
    import shlex

    world = make_world(clock=EventClock())  # the example event is of 2024
    page = html.unescape(world.get("/docs").body.decode())
    lines = re.findall(r"<pre>(curl .*?)</pre>", page)
    assert len(lines) == 2 + 2 + 4 + 4
    for line in sorted(lines, key=lambda text: "events" not in text):
        _, _, url, *rest = shlex.split(line)
        target = url.removeprefix("http://127.0.0.1")
        app = world.events if "/events/" in target else world.score
        body = rest[rest.index("-d") + 1].encode() if "-d" in rest else b""
        name, _, value = (rest[rest.index("-H") + 1] if "-H" in rest else "").partition(": ")
        headers = {name: value.replace("$(cat admin_token)", TOKEN)} if name else {}
        reply = call(app, "POST" if body else "GET", target, body, headers=headers)
        if "/forget" in target:  # which needs shards in processes of their own; the token was right
            assert reply.error["message"] == "forget: this replica does not reach the shards"
            continue
        assert reply.status == 200, (line, reply.body)
        assert reply.json.get("unknown") in (None, [], False)


# -- attacks: a clear refusal each, nothing applied, and the next request works


def _garbage(n: int = 2**20) -> bytes:
    return random.Random(5).randbytes(n)


def _deep(n: int = 10_000) -> list[bytes]:
    return [b"[" * n, b"[" * n + b"]" * n, b'{"user_id":' * n, b'{"user_id":' * n + b"1" + b"}" * n]


@pytest.mark.parametrize("content_type", [None, NDJSON, ARROW])
def test_a_megabyte_of_garbage(world: World, content_type: str | None) -> None:
    reply = world.post_events("purchases", _garbage(), content_type)
    assert (reply.status, reply.error["code"]) == (400, "invalid_events")
    assert len(reply.body) < 4_000
    reply = world.post_score("churn", _garbage())
    assert (reply.status, reply.error["code"]) == (400, "bad_json")
    still_serves(world)


def test_an_arrow_stream_cut_off_anywhere(world: World) -> None:
    whole = arrow(purchases, TWO)
    for size in range(len(whole) - 4):
        reply = world.post_events("purchases", whole[:size], ARROW)
        assert (reply.status, reply.error["code"]) == (400, "invalid_events"), size
    still_serves(world)


def test_an_arrow_stream_with_any_byte_changed_is_refused_or_read(world: World) -> None:
    whole = bytearray(arrow(purchases, TWO))
    rng = random.Random(7)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= rng.randrange(1, 256)
        assert world.post_events("purchases", bytes(damaged), ARROW).status in (200, 400, 413), at
    assert [s.check() for s in world.shards] == [[], []]


@pytest.mark.parametrize("body", _deep(), ids=["arrays", "closed-arrays", "objects", "closed-objects"])
def test_json_nested_ten_thousand_deep(world: World, body: bytes) -> None:
    for content_type in (None, NDJSON):
        reply = world.post_events("purchases", body, content_type)
        assert (reply.status, reply.error["code"]) == (400, "invalid_events")
    refused(world.post_score("churn", body), 400, "bad_json", "body: JSON is nested too deep", "$")
    still_serves(world)


def test_json_nested_as_deep_as_python_just_takes(world: World) -> None:
    # Wherever the limit lies, no value just below it may break what writes the error.
    for depth in range(1, 1_100):
        body = b'{"user_id":' + b"[" * depth + b"]" * depth + b"}"
        assert world.post_score("churn", body).status == 400
        assert world.post_events("purchases", body).status == 400
    still_serves(world)


@pytest.mark.parametrize("body", [b"", b" ", b"\0", b"{", b"}", b"[1", b"nul", b'{"user_id": 1} x', b"\xef\xbb\xbf{}"])
def test_what_is_no_json(world: World, body: bytes) -> None:
    reply = world.post_score("churn", body)
    assert (reply.status, reply.error["code"], reply.error["path"]) == (400, "bad_json", "$")
    reply = world.post_events("purchases", body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_events")
    still_serves(world)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400])
def test_numbers_that_are_not_finite_in_json(world: World, number: str) -> None:
    event = json.dumps(TWO[0]).replace("10.0", number).encode()
    assert number.encode() in event
    for body, content_type in ((event, None), (b"[" + event + b"]", None), (event, NDJSON)):
        reply = world.post_events("purchases", body, content_type)
        assert (reply.status, reply.error["code"]) == (400, "invalid_events")
        assert reply.error["path"] in ("$.price", "$[0].price")
    reply = world.post_score("churn", f'{{"user_id": {number}}}'.encode())
    assert (reply.status, reply.error["code"]) in ((400, "bad_json"), (400, "bad_id"))
    still_serves(world)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_in_arrow(world: World, number: float) -> None:
    reply = world.post_events("purchases", arrow(purchases, [TWO[0], {**TWO[1], "price": number}]), ARROW)
    assert (reply.status, reply.error["code"], reply.error["path"]) == (400, "invalid_events", "$[1].price")
    still_serves(world)


@pytest.mark.parametrize("field", ["order_id", "user_id", "price", "paid_at"])
def test_null_in_a_field_that_is_not_optional(world: World, field: str) -> None:
    event = {**TWO[0], field: None}
    nullable = pa.schema([f.with_nullable(True) for f in purchases.schema])
    for body, content_type in (
        (event, None), ([TWO[1], event], None), (json.dumps(event).encode(), NDJSON), (arrow(purchases, [event], nullable), ARROW),
    ):  # fmt: skip
        reply = world.post_events("purchases", body, content_type)
        assert (reply.status, reply.error["code"]) == (400, "invalid_events")
        assert reply.error["path"].endswith(f".{field}")
        assert reply.error["message"].endswith("got `null`")
    missing = {k: v for k, v in TWO[0].items() if k != field}
    reply = world.post_events("purchases", missing)
    assert (reply.status, reply.error["path"]) == (400, f"$.{field}")
    still_serves(world)


@pytest.mark.parametrize("length", ["honest", "absent", "lying", "no-number"])
def test_a_body_over_the_limit(length: str) -> None:
    world = make_world(bodies=BodyLimits(body_bytes_max=1_000), scores=ScoreLimits(body_bytes_max=1_000))
    chunks = [b" " * 100] * 11
    told = {"honest": {}, "absent": {}, "lying": {"content-length": "5"}, "no-number": {"content-length": "-1"}}[length]
    for app, path in ((world.events, "/v1/events/purchases"), (world.score, "/v1/score/churn")):
        reply = call(app, "POST", path, chunks=chunks, headers=told, content_length=length == "honest")
        refused(reply, 413, "too_large", "body: larger than 1000 bytes; send it in several requests")
    still_serves(world)


def test_a_body_over_the_limit_is_not_read_to_its_end() -> None:
    world = make_world(bodies=BodyLimits(body_bytes_max=1_000))
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    async def statuses(headers: list[tuple[bytes, bytes]]) -> int:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/events/purchases",
            "query_string": b"",
            "headers": headers,
        }
        await world.events(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(statuses([(b"content-length", b"100000000")])) == 413
    assert read == 0
    assert asyncio.run(statuses([])) == 413
    assert read == 11


def test_more_events_than_the_limit() -> None:
    world = make_world(bodies=BodyLimits(rows_max=2))
    for body, content_type in (
        (json.dumps([*TWO, purchase("c")]).encode(), None),
        (arrow(purchases, [*TWO, purchase("c")]), ARROW),
    ):
        reply = world.post_events("purchases", body, content_type)
        refused(
            reply,
            413,
            "too_large",
            "body of `purchases`: more than 2 events; `rows_max` is 2; send fewer events at a time",
        )
    still_serves(world)


@pytest.mark.parametrize("text", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\\udc00x", b"\\ud83d\\u0041"])
def test_what_is_no_unicode_in_keys_values_and_names(world: World, text: bytes) -> None:
    event = json.dumps(purchase("a", book_id="HERE")).encode()
    for body in (event.replace(b"HERE", text), event.replace(b'"a"', b'"%s"' % text), event.replace(b"book_id", text)):
        reply = world.post_events("purchases", body)
        assert (reply.status, reply.error["code"]) == (400, "invalid_events")
    for body in (b'{"user_id": 1, "book_id": "%s"}' % text, b'{"user_id": 1, "%s": "x"}' % text):
        assert world.post_score("offer", body).status == 400
    still_serves(world)


def test_text_that_is_no_unicode_in_arrow(world: World) -> None:
    whole = arrow(purchases, [purchase("a", book_id="HERE")])
    for bad in (b"\xff\xff\xff\xff", b"x\xed\xa0\x80"):
        reply = world.post_events("purchases", whole.replace(b"HERE", bad), ARROW)
        assert (reply.status, reply.error["code"]) == (400, "invalid_events")
    still_serves(world)


@pytest.mark.parametrize("user_id", [2**63, -(2**63) - 1, 2**64, 10**30, str(2**63), "1.0", "1e3", "0x1", " 1", "１"])
def test_ids_beyond_int64(world: World, user_id: Any) -> None:
    reply = world.post_events("purchases", purchase("a", user_id))
    assert (reply.status, reply.error["code"], reply.error["path"]) == (400, "invalid_events", "$.user_id")
    reply = world.post_score("churn", {"user_id": user_id})
    assert (reply.status, reply.error["code"], reply.error["path"]) == (400, "bad_id", "$.user_id")
    still_serves(world)


@pytest.mark.parametrize("n", [4_301, 100_000])
def test_numbers_of_more_digits_than_python_reads(world: World, n: int) -> None:
    digits = "1" * n
    reply = world.post_events(
        "purchases", f'{{"order_id": "a", "user_id": {digits}, "price": 1, "paid_at": 1}}'.encode()
    )
    assert (reply.status, reply.error["path"]) == (400, "$.user_id")
    assert world.post_score("churn", f'{{"user_id": {digits}}}'.encode()).status == 400
    assert world.post_score("churn", {"user_id": digits}).status == 400
    still_serves(world)


@pytest.mark.parametrize(
    ("field", "size"), [("order_id", 1_025), ("book_id", 1_025), ("order_id", 600_000), ("book_id", 600_000)]
)
def test_huge_ids(world: World, field: str, size: int) -> None:
    for text in ("x" * size, "é" * (size // 2 + 1)):
        reply = world.post_events("purchases", [{**TWO[0], field: text}])
        assert (reply.status, reply.error["path"]) == (400, f"$[0].{field}")
        assert (
            reply.error["message"]
            == f"event of `purchases`: expected `string`, got {len(text.encode())} bytes; allowed are 1024"
        )
        reply = world.post_score("offer", {"user_id": 1, "book_id": text})
        assert (reply.status, reply.error["code"], reply.error["path"]) == (400, "bad_id", "$.book_id")
        assert len(reply.body) < 1_000
    still_serves(world)


def test_huge_names_are_cut_in_the_answer(world: World) -> None:
    huge = "x" * 100_000
    replies = [
        world.post_events(huge, TWO), world.post_score(huge, {"user_id": 1}), world.get(f"/v1/features/{huge}?user_id=1"),
        world.get(f"/{huge}"), world.post_score("churn", {"user_id": 1, huge: 1}), world.post_events("purchases", {huge: 1}),
        world.post_score(f"churn?as_of={huge}", {"user_id": 1}), world.post_score(f"churn?{huge}", {"user_id": 1}),
        world.post_score("churn", {"user_id": 1}, huge), world.post_events("purchases", TWO, huge),
        call(world.score, "GET", f"/v1/score/{huge}"), world.get(f"/v1/features/user_spend?{huge}=1"),
    ]  # fmt: skip
    assert [r.status for r in replies] == [404, 404, 404, 404, 400, 400, 400, 400, 415, 415, 405, 400]
    assert max(len(r.body) for r in replies) < 4_000
    still_serves(world)


def test_of_a_hundred_thousand_unknown_fields_ten_are_named(world: World) -> None:
    many = {f"user_spend{i}": i for i in range(100_000)}
    for reply in (world.post_events("purchases", many), world.post_score("churn", many)):
        assert (reply.status, len(reply.error["problems"])) == (400, 10)


def test_a_feature_among_thousands_of_unknown_fields_is_still_told_why(world: World) -> None:
    many = {f"field{i}": i for i in range(5_000)} | {"spend_30d": 1.0}
    reply = world.post_score("churn", many)
    assert (reply.status, reply.error["code"]) == (400, "features_in_request")
    assert reply.error["path"] == "$.spend_30d"


def test_a_client_that_goes_away_has_applied_nothing(world: World) -> None:
    body = json.dumps(TWO).encode()
    assert world.post_events("purchases", b"", chunks=[body, b""], disconnect=True).status == 0
    still_serves(world)


def test_random_bytes_never_break_it(world: World) -> None:
    rng = random.Random(11)
    alphabet = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"user_id",
        b"order_id",
        b"1",
        b"-",
        b"e",
        b".",
        b"null",
        b" ",
        b"\n",
        b"\\u",
        b"d800",
        b"\xff",
    ]
    for _ in range(3_000):
        body = b"".join(rng.choices(alphabet, k=rng.randrange(1, 30)))
        reply = world.post_events("purchases", body, rng.choice([None, NDJSON]))
        assert reply.status == 400 or (reply.status, reply.json) == (200, ACK), body  # blank lines are no events
        reply = world.post_score("churn", body)
        assert reply.status == 400 or (reply.status, reply.json) == (200, []), body
    still_serves(world)


# -- the application itself


def test_an_error_of_ours_is_one_answer_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(request: Request) -> Response:
        raise RuntimeError("secret")

    app = App([Route("GET", "/fails", fails)])
    refused(call(app, "GET", "/fails"), 500, "internal", "an error of ours; it is in the log of the deployment")
    assert "secret" in caplog.text


def test_a_path_cannot_forge_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(request: Request) -> Response:
        raise RuntimeError

    async def busy(request: Request) -> Response:
        raise Unavailable("busy")

    app = App([Route("GET", "/fails/", fails), Route("GET", "/busy/", busy)])
    for path in ("/fails/a%0AERROR forged", "/busy/a%0AERROR forged"):
        assert call(app, "GET", path).status >= 500
    assert [r.getMessage() for r in caplog.records] == [
        "GET '/fails/a\\nERROR forged' failed", "GET '/busy/a\\nERROR forged': busy",
    ]  # fmt: skip


def test_json_of_a_number_that_is_not_finite_is_null() -> None:
    assert json_response({"a": math.nan, "b": [math.inf]}).body == b'{"a":null,"b":[null]}'


def test_the_server_starts_and_stops_the_app() -> None:
    messages = iter(["lifespan.startup", "lifespan.shutdown"])
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": next(messages)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])

    asyncio.run(make_world().score({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_it_is_asgi_to_others_too(world: World) -> None:
    async def talk() -> None:
        for app, path, body, status in (
            (world.events, "/v1/events/purchases", TWO, 200),
            (world.score, "/v1/score/churn?features=true", {"user_id": 1}, 200),
            (world.score, "/v1/score/churm", {"user_id": 1}, 404),
        ):
            transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                reply = await client.post(path, json=body)
                assert reply.status_code == status
                assert msgspec.json.decode(reply.content) == reply.json()

    asyncio.run(talk())


def test_results_do_not_depend_on_the_number_of_shards() -> None:
    rng = random.Random(3)
    events = [
        purchase(str(rng.randrange(900)), rng.randrange(40), rng.uniform(-9, 9), NOW - rng.randrange(10 * 24 * HOUR), book_id=f"b{rng.randrange(20)}")
        for _ in range(1_000)
    ]  # fmt: skip
    ids = [{"user_id": u, "book_id": f"b{b}"} for u in range(42) for b in range(21)]
    answers = []
    for n_shards in (1, 2, 7):
        world = make_world(n_shards=n_shards)
        acks = [world.post_events("purchases", events[i : i + 137]).json for i in range(0, len(events), 137)]
        got = world.post_score("offer?features=true", ids).json
        answers.append((acks, [{k: v for k, v in a.items() if k != "id"} for a in got]))
    assert answers[0] == answers[1] == answers[2]


def test_every_view_has_a_plan(world: World) -> None:
    for view in VIEWS:
        assert ReadPlan(LAYOUT, list(view), "x").names == tuple(f"{view.name}.{n}" for n in view.features)


def test_a_body_that_never_ends_is_given_up(world: World) -> None:
    async def ask() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        first = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive() -> dict[str, Any]:
            return first.pop() if first else await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/score/churn", "query_string": b"", "headers": []}
        await world.score(scope, receive, send)
        return sent

    world.score.body_timeout_s = 0.01
    start, body = asyncio.run(ask())
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (408, "body_timeout")
    still_serves(world)


def test_a_websocket_is_closed(world: World) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(world.score({"type": "websocket", "path": "/healthz"}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1003}]


def test_a_query_that_is_not_utf8_names_nobody(world: World) -> None:
    assert world.get("/v1/features/user_spend?user_id=%ff").status == 400
