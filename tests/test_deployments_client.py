# ruff: noqa: E501  (messages stand whole)
"""The client, over real sockets: what it sends, what it returns, and that whatever happens on the way nothing counts twice."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import doctest
import json
import math
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from apps import (
    NOW,
    TOKEN,
    Returns,
    churn,
    logins,
    make_world,
    mean_price,
    model,
    offer,
    purchase,
    purchases,
    user_spend,
)
from http_server import Behind, listen, serve
from hypothesis import given
from hypothesis import strategies as st

from millpond.deployments import (
    Ack,
    AsyncClient,
    Client,
    ClientError,
    NotSent,
    RequestFailed,
    RequestRefused,
    Score,
    TryAgainLater,
    arrow_scores,
    client,
    client_answers,
)
from millpond.feature_actors.client import Ack as ServerAck

NOW_TIME = dt.datetime.fromtimestamp(NOW / 1000, dt.UTC)


@dataclass
class Scene:
    """A world that is served, and a client of it."""

    behind: Behind
    url: str
    client: Client

    @property
    def requests(self) -> int:
        return len(self.behind.seen)

    def orders(self, user_id: int) -> float:
        """How many orders of a user count, asked without the client."""
        reply = self.behind.world.post_score("churn?features=true", {"user_id": user_id})
        return reply.json["features"]["user_spend.orders_30d"]  # type: ignore[no-any-return]

    def logins(self, device: str) -> float:
        return self.behind.world.get(f"/v1/features/device_logins?device={device}").json["features"]["logins_1h"]  # type: ignore[no-any-return]


class Lane:
    """Runs the calls of an `AsyncClient` as if they were those of a `Client`, so that one test is of both."""

    def __init__(self, url: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(url, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *given, **named: self._loop.run_until_complete(method(*given, **named))

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._loop.close()


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """Have the kernels compiled: that takes longer than a client waits."""
    world = make_world()
    assert world.post_events("purchases", purchase("a", book_id="b")).status == 200
    assert world.post_events("logins", login("phone")).status == 200
    assert world.post_score("offer", {"user_id": 1, "book_id": "b"}).status == 200


class Stage:
    """What one server plays: the world of the test that runs."""

    url: str
    behind: Behind

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.behind(scope, receive, send)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage()
    with serve(stage) as stage.url:
        yield stage


def mixed(features: Any) -> list[Any]:
    """Numbers, but for customers who spent more, and none for who spent 99."""
    spent = [math.nan if row[1] == 99 else row[1] for row in features.matrix.tolist()]
    return [{"spent": one} if one > 10 else one for one in spent]


@pytest.fixture
def behind(stage: Stage) -> Behind:
    broken = model("broken", list(user_spend), lambda: Returns(RuntimeError("no")))
    more = [model(name, list(user_spend), lambda what=what: Returns(what)) for name, what in (("mixed", mixed), ("mean", mean_price))]  # fmt: skip
    stage.behind = Behind(make_world([churn, offer, broken, *more]))
    return stage.behind


@pytest.fixture(params=[Client, Lane], ids=["sync", "async"])
def scene(request: pytest.FixtureRequest, stage: Stage, behind: Behind) -> Iterator[Scene]:
    with request.param(stage.url, batch_rows=3, admin_token=TOKEN) as client:
        yield Scene(behind, stage.url, client)


assert logins.event_id is None, "some tests are of events without ids"


def login(device: str, user_id: int = 1) -> dict[str, Any]:
    return {"user_id": user_id, "device": device, "at": NOW}


# -- events


def table(events: list[dict[str, Any]], chunk: int = 1) -> pa.Table:
    """Events as a table of small chunks."""
    batches = [pa.RecordBatch.from_pylist(events[i : i + chunk], schema=purchases.schema) for i in range(0, len(events), chunk)]  # fmt: skip
    return pa.Table.from_batches(batches, purchases.schema)


FORMS = {
    "list": lambda events: events,
    "tuple": tuple,
    "iterator": iter,
    "mappings": lambda events: (MappingProxyType(e) for e in events),
    "table": table,
    "batch": lambda events: table(events).combine_chunks().to_batches()[0],
    "dictionaries": lambda events: table(events, 2).set_column(2, "book_id", table(events, 2).column("book_id").dictionary_encode()),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_events_gives_the_same(scene: Scene, form: str) -> None:
    events = [purchase(f"o{i}", i % 2, 10.0 + i, NOW, book_id=f"b{i}" if i else None) for i in range(7)]
    assert scene.client.send("purchases", FORMS[form](events)) == Ack(accepted=7, unkeyed=1)
    assert scene.requests == 3  # of 3, 3 and 1
    assert scene.client.send("purchases", events) == Ack(duplicates=7)
    assert [scene.orders(0), scene.orders(1)] == [4, 3]


def test_a_table_of_many_small_chunks_is_one_batch(served: tuple[Behind, Client]) -> None:
    """The cluster takes 1,000 batches in a request."""
    behind, one = served
    assert one.send("purchases", table([purchase(f"o{i}", 5, book_id="b") for i in range(1_200)])).accepted == 1_200
    assert len(behind.seen) == 1


def test_one_event_and_none(scene: Scene) -> None:
    assert scene.client.send("purchases", purchase("a")) == Ack(accepted=1, unkeyed=1)
    assert scene.client.send("purchases", []) == Ack()
    assert scene.client.send("purchases", table([])) == Ack()


def test_values_that_json_has_no_word_for(scene: Scene) -> None:
    event = purchase("a", np.int64(7), np.float64(2.5), NOW_TIME, gift=np.bool_(True))
    assert scene.client.send("purchases", [event, purchase("a", 7, 2.5, NOW, gift=True)]) == Ack(accepted=1, duplicates=1, unkeyed=1)  # fmt: skip
    for bad in (float("nan"), np.float64("inf"), np.float32("nan")):
        with pytest.raises(RequestRefused) as caught:
            scene.client.send("purchases", [purchase("b"), purchase("c"), purchase("d"), purchase("e", price=bad)])
        assert (caught.value.code, caught.value.path) == ("invalid_events", "$[3].price")
        assert f"expected `float64`, got `{json.dumps(float(bad))}`" in caught.value.message
    before = scene.requests
    with pytest.raises(RequestRefused, match="body: cannot be written as JSON: a value of type `object`"):
        scene.client.send("purchases", purchase("b", object()))
    assert scene.requests == before


def test_a_bulk_load_arrives_when_it_happened(scene: Scene) -> None:
    old = NOW - 3 * 3_600_000
    assert scene.client.send("purchases", purchase("a", paid_at=old)) == Ack(accepted=1, late=1, unkeyed=1)
    assert scene.client.send("purchases", purchase("b", paid_at=old), arrival="event") == Ack(accepted=1, unkeyed=1)


def test_a_replay_of_a_table_says_when_events_arrived(scene: Scene) -> None:
    old = NOW - 3 * 3_600_000
    table = pa.Table.from_pylist([purchase("a", paid_at=old), purchase("b", paid_at=old)])
    table = table.append_column("_arrival_ms", pa.array([old, NOW]))
    with Client(scene.url) as client, pytest.raises(RequestRefused, match="needs the admin token"):
        client.send("purchases", table, arrival="given")
    assert scene.client.send("purchases", table, arrival="given") == Ack(accepted=2, late=1, unkeyed=2)


def test_an_error_says_what_was_acknowledged_before_and_which_row_is_bad(scene: Scene) -> None:
    events = [purchase(f"o{i}", 5) for i in range(8)]
    events[7]["price"] = "dear"
    with pytest.raises(RequestRefused) as caught:
        scene.client.send("purchases", iter(events))
    error = caught.value
    assert (error.ack, error.first_row) == (Ack(accepted=6, unkeyed=6), 6)
    assert (error.code, error.status, error.path) == ("invalid_events", 400, "$[7].price")
    assert str(error) == 'event of `purchases`: expected `float64`, got `"dear"` - at `$[7].price`; rows before 6 are acknowledged'  # fmt: skip
    events[7]["price"] = 1.0
    assert scene.client.send("purchases", events[error.first_row :]) == Ack(accepted=2, unkeyed=2)
    assert scene.orders(5) == 8


def test_problems_name_rows_of_the_caller(scene: Scene) -> None:
    events = [purchase(f"o{i}", "x" if i in (3, 5) else 5) for i in range(6)]
    with pytest.raises(RequestRefused) as caught:
        scene.client.send("purchases", events)
    assert [path for _, path in caught.value.problems] == ["$[3].user_id", "$[5].user_id"]
    assert caught.value.path == "$[3].user_id"


# -- retries


@pytest.mark.parametrize("fault", ["torn", 503, (429, 0), 502])
def test_events_are_sent_again_and_count_once(scene: Scene, fault: Any) -> None:
    """Of a source with ids, and of one without."""
    scene.behind.faults = ["ok", fault, fault, "ok", fault]
    done = fault == "torn"
    events = [purchase(f"o{i}", 5, book_id="b") for i in range(8)]
    ack = scene.client.send("purchases", events)
    assert ack == (Ack(accepted=3, duplicates=5) if done else Ack(accepted=8))
    assert (scene.orders(5), scene.requests) == (8, 6)
    scene.behind.faults = ["ok", fault, fault, "ok", fault]
    ack = scene.client.send("logins", [login("phone") for _ in range(8)])
    assert ack == (Ack(accepted=3, duplicates=5) if done else Ack(accepted=8))
    assert scene.logins("phone") == 8
    # The same events again are others: they have no ids.
    assert scene.client.send("logins", [login("phone")]) == Ack(accepted=1)


def test_a_send_that_failed_half_way_is_completed_under_its_key(scene: Scene) -> None:
    events = [login("phone", i) for i in range(8)]
    scene.behind.faults = ["ok", "torn", 400]
    with pytest.raises(RequestRefused) as caught:
        scene.client.send("logins", events)
    assert (caught.value.first_row, caught.value.ack) == (3, Ack(accepted=3))
    assert scene.logins("phone") == 6  # three more were applied than are known to be
    key = caught.value.idempotency_key
    assert scene.client.send("logins", events, idempotency_key=key) == Ack(accepted=2, duplicates=6)
    assert scene.logins("phone") == 8


@pytest.mark.parametrize("cuts", [(0, 20), (0, 1, 20), (0, 7, 8, 15, 20), (0, 10, 5, 20)])
def test_events_under_a_key_are_the_same_however_they_are_cut(scene: Scene, cuts: tuple[int, ...]) -> None:
    events = [login("phone", i) for i in range(20)]
    assert scene.client.send("logins", events, idempotency_key="all", first_row=0) == Ack(accepted=20)
    for begin, end in pairwise(cuts):
        if begin < end:
            ack = scene.client.send("logins", events[begin:end], idempotency_key="all", first_row=begin)
            assert ack == Ack(duplicates=end - begin)
    assert scene.client.send("logins", events[:2], idempotency_key="all", first_row=20) == Ack(accepted=2)
    assert scene.client.send("logins", events[:1], idempotency_key="all", first_row=1) == Ack(conflicts=1)
    assert scene.logins("phone") == 22
    for row in ("-1", "x", "1.5", "9" * 16):
        headers = {"idempotency-key": "all", "idempotency-row": row}
        answer = scene.behind.world.post_events("logins", login("phone"), headers=headers)
        assert (answer.status, answer.error["path"]) == (400, "Idempotency-Row")


def test_keys_that_the_cluster_would_not_take_are_refused(scene: Scene) -> None:
    for key in ("", "a b", "ü", "a\n", "x" * 201):
        with pytest.raises(ValueError, match="idempotency_key"):
            scene.client.send("logins", login("phone"), idempotency_key=key)
    assert scene.client.send("logins", login("phone"), idempotency_key="x" * 200) == Ack(accepted=1)


def test_scores_and_features_are_asked_for_again(scene: Scene) -> None:
    scene.behind.faults = ["torn", 503, "ok", "torn"]
    assert scene.client.score("churn", {"user_id": 1}).version == "3"
    assert scene.client.features("user_spend", user_id=1).unknown
    assert scene.requests == 5


def test_retry_after_is_waited_for(scene: Scene) -> None:
    scene.behind.faults = [(503, 1)]
    start = dt.datetime.now()
    scene.client.score("churn", {"user_id": 1})
    assert dt.datetime.now() - start >= dt.timedelta(seconds=1)


def test_a_wait_that_would_take_too_long_is_not_begun(scene: Scene) -> None:
    scene.behind.faults = [(503, 3_600)]
    with pytest.raises(TryAgainLater) as caught:
        scene.client.score("churn", {"user_id": 1})
    assert (caught.value.status, caught.value.code, caught.value.tries) == (503, "made_up", 1)


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 415, 500, 504])
def test_an_answer_that_would_be_the_same_again_is_not_asked_for_again(scene: Scene, status: int) -> None:
    scene.behind.faults = [status]
    with pytest.raises(RequestRefused if status < 500 else RequestFailed) as caught:
        scene.client.score("churn", {"user_id": 1})
    assert (caught.value.status, caught.value.message, scene.requests) == (status, "for the test", 1)


def test_a_server_that_comes_back_is_found(scene: Scene) -> None:
    with listen() as (url, _):
        port = int(url.rsplit(":", 1)[1])
    waiting = threading.Event()
    with type(scene.client)(url, retry_s=20) as late:

        def come() -> None:
            waiting.wait(10)
            with serve(scene.behind, port):
                done.wait(20)

        done = threading.Event()
        thread = threading.Thread(target=come)
        thread.start()
        waiting.set()
        assert late.score("churn", {"user_id": 1}).model == "churn"
        done.set()
        thread.join()


def test_nobody_there_is_an_error_of_ours_that_says_so(scene: Scene) -> None:
    with listen() as (url, _):
        pass
    with type(scene.client)(url, retry_s=0.2) as alone, pytest.raises(TryAgainLater) as caught:
        alone.send("purchases", [purchase(f"o{i}") for i in range(3)])
    error = caught.value
    assert error.message.startswith(f"no answer to POST {url}/v1/events/purchases: ConnectError: ")
    assert (error.code, error.status, error.ack, error.first_row) == ("no_answer", None, Ack(), 0)
    assert isinstance(error.__cause__, httpx.ConnectError)
    assert error.tries > 1
    assert str(error).endswith(f" (tried {error.tries} times)")


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (b"", TryAgainLater, "no_answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", TryAgainLater, "no_answer"),
        (b"nonsense\r\n\r\n", TryAgainLater, "no_answer"),
        (None, TryAgainLater, "no_answer"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 6\r\n\r\n<html>", TryAgainLater, "unexpected_answer"),
        (b"HTTP/1.1 302 No\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n", RequestFailed, "unexpected_answer"),
        (b"HTTP/1.1 404 No\r\ncontent-length: 2\r\n\r\n{}", RequestRefused, "unexpected_answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", RequestFailed, "unexpected_answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}", TryAgainLater, "no_answer"),
    ],
    ids=["closed", "torn", "nonsense", "silence", "500-of-a-proxy", "redirect", "404-of-others", "200-of-others", "gzip"],
)  # fmt: skip
def test_whatever_is_answered_only_errors_of_ours_are_raised(answer: bytes | None, kind: type, code: str) -> None:
    with listen() as (url, listening):
        over = threading.Event()

        def answer_one() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(2**16)
                over.wait(10) if answer is None else connection.sendall(answer)
                connection.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=answer_one, daemon=True)
        thread.start()
        with Client(url, timeout_s=0.2, retry_s=0) as one, pytest.raises(kind) as caught:
            one.score("churn", {"user_id": 1})
        over.set()
        thread.join(10)
    assert isinstance(caught.value, ClientError)
    assert (caught.value.code, caught.value.tries or 1) == (code, 1)


def test_a_connection_is_used_again_and_one_that_was_closed_meanwhile_is_not() -> None:
    behind = Behind(make_world())
    opened = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        opened.append(scope["client"])
        await behind(scope, receive, send)

    with serve(app) as url, Client(url) as one:
        for _ in range(5):
            one.score("churn", {"user_id": 1})
        assert len(set(opened)) == 1
        port = int(url.rsplit(":", 1)[1])
    with serve(app, port) as url, Client(url) as one:
        one.score("churn", {"user_id": 1})
    with Client(url, retry_s=10) as one:
        for _ in range(3):  # the server ends between two calls
            with serve(app, port):
                assert one.score("churn", {"user_id": 1}).model == "churn"


@given(st.lists(st.tuples(st.sampled_from([429, 503]), st.none() | st.integers(0, 20)), min_size=1, max_size=20))
def test_waits_grow_and_are_never_shorter_than_retry_after(answers: list[tuple[int, int | None]]) -> None:
    calls = client._Calls("http://x", 1.0, 1e6, 10, None)
    call = calls.features("user_spend", {"user_id": 1}, None)
    step = call.send(None)
    for tries, (status, after) in enumerate(answers, 1):
        assert isinstance(step, client._Request)
        headers = {} if after is None else {"retry-after": str(after)}
        wait_s = call.send(httpx.Response(status, headers=headers, content=b"{}"))
        assert isinstance(wait_s, float)
        assert (after or 0) <= wait_s <= (after or 0) + min(2.0, 0.05 * 2**tries)
        step = call.send(None)


# -- scores


def test_one_score_a_list_and_none(scene: Scene) -> None:
    scene.client.send("purchases", [purchase(f"o{i}", i, book_id="b") for i in range(7)])
    one = scene.client.score("churn", {"user_id": 3})
    assert one == Score(one.id, "churn", "3", 21.0, NOW_TIME, [])
    ids = [{"user_id": i} for i in range(6, -2, -1)]
    scores = scene.client.score("churn", ids)
    assert [s.result for s in scores] == [21.0] * 7 + [0.0]
    assert [s.unknown for s in scores] == [[]] * 7 + [["user_spend"]]
    assert len({s.id for s in scores}) == 8
    assert scene.client.score("churn", []) == []
    (many,) = scene.client.score("offer", [{"user_id": 3, "book_id": "b"}], features=True)
    assert many.features == {"book_sales.sold_7d": 7.0, "book_sales.top_price": 10.0, "user_spend.spend_30d": 10.0, "user_book.bought": 1.0}  # fmt: skip


@pytest.mark.parametrize("as_of", [NOW + 60_000, str(NOW + 60_000), NOW_TIME + dt.timedelta(minutes=1), "2023-11-14T22:14:20Z"])  # fmt: skip
def test_as_of_is_a_time_in_any_form(scene: Scene, as_of: Any) -> None:
    scene.client.send("purchases", purchase("a", 5))
    score = scene.client.score("churn", {"user_id": 5}, features=True, as_of=as_of)
    assert (score.features["user_spend.recency_s"], score.as_of) == (60.0, NOW_TIME + dt.timedelta(minutes=1))
    assert scene.client.features("user_spend", user_id=5, as_of=as_of).features["recency_s"] == 60.0


def test_what_is_wrong_with_a_score_is_told(scene: Scene) -> None:
    with pytest.raises(RequestRefused) as caught:
        scene.client.score("churn", [{"user_id": 1}] * 4 + [{"user_id": "x"}])
    assert (caught.value.code, caught.value.path) == ("bad_id", "$[4].user_id")
    with pytest.raises(RequestRefused, match="no model `a/b ü\\?`; known: `broken`"):
        scene.client.score("a/b ü?", {"user_id": 1})
    with pytest.raises(RequestFailed) as failed:
        scene.client.score("broken", {"user_id": 1})
    assert (failed.value.code, failed.value.status, failed.value.tries) == ("prediction_failed", 500, 1)
    with pytest.raises(RequestRefused) as past:
        scene.client.score("churn", {"user_id": 1}, as_of=NOW - 10**9)
    assert past.value.code == "as_of_in_past"


def test_a_table_of_ids_gives_a_table_of_the_same_answers(scene: Scene) -> None:
    scene.client.send("purchases", [purchase(f"o{i}", i, 10.0, book_id=f"b{i % 2}") for i in range(7)])
    ids = [{"user_id": i % 9, "book_id": f"b{i % 3}"} for i in range(8)]
    want = scene.client.score("offer", ids, features=True)
    before = scene.requests
    got = scene.client.score("offer", pa.Table.from_pylist(ids), features=True)
    assert scene.requests == before + 3
    assert got.column("result").to_pylist() == [s.result for s in want]
    assert got.column("as_of").to_pylist() == [s.as_of for s in want]
    assert got.column("unknown").to_pylist() == [s.unknown for s in want]
    assert [{f: row[f] for f in want[0].features or {}} for row in got.to_pylist()] == [s.features for s in want]
    assert got.schema.metadata == {b"model": b"offer", b"result": b"number"}
    batch = pa.RecordBatch.from_pydict({"user_id": pa.array([3], pa.int16())})
    assert scene.client.score("churn", batch).column("result").to_pylist() == [21.0]
    none = scene.client.score("churn", batch.slice(0, 0))
    assert (none.num_rows, none.schema.names) == (0, ["id", "version", "result", "as_of", "unknown", "error"])
    with pytest.raises(RequestRefused) as caught:
        scene.client.score("churn", pa.table({"user_id": [1, 2, 3, 4, None]}))
    assert (caught.value.code, caught.value.path) == ("bad_id", "$[4].user_id")


def test_results_of_a_table_are_all_of_one_form(scene: Scene) -> None:
    """Those of one request are numbers, those of the next are not."""
    scene.client.send("purchases", [purchase(f"o{i}", i, 10.0 + (i == 5)) for i in range(7)])
    got = scene.client.score("mixed", pa.table({"user_id": range(7)}))
    assert [json.loads(text) for text in got.column("result").to_pylist()] == [10.0] * 5 + [{"spent": 11.0}, 10.0]
    assert got.schema.metadata[b"result"] == b"json"
    only = scene.client.score("mixed", pa.table({"user_id": range(5)}))
    assert (only.column("result").to_pylist(), only.schema.metadata[b"result"]) == ([10.0] * 5, b"number")


def test_an_id_without_a_result_fails_alone(scene: Scene) -> None:
    """In whichever request of a call it is, and whatever the results of the others are."""
    scene.client.send("purchases", [purchase(f"o{i}", i, 12.0) for i in range(6)])
    ids = [{"user_id": i} for i in (0, 1, 2, 3, 9, 5)]
    scores = scene.client.score("mean", ids)
    failed = scores.pop(4)
    assert isinstance(failed, RequestFailed)
    assert (failed.code, failed.status, failed.path) == ("prediction_failed", 500, "$[4]")
    assert [s.result for s in scores] == [12.0] * 5
    table = scene.client.score("mean", pa.Table.from_pylist(ids))
    assert table.column("result").to_pylist() == [12.0] * 4 + [None, 12.0]
    assert table.column("error").to_pylist() == [None] * 4 + [failed.message, None]
    several = scene.client.score_many(["mean", "churn"], ids)
    assert (several[4]["mean"].path, several[4]["churn"].result) == ("$.ids[4]", 0.0)
    with pytest.raises(RequestFailed):
        scene.client.score("mean", ids[4])


def test_results_keep_their_form_where_one_is_none(scene: Scene) -> None:
    """The first request has numbers and one that is none, the next other results."""
    scene.client.send("purchases", [purchase(f"o{i}", i, 9.0 if i != 1 else 99.0) for i in range(5)])
    scene.client.send("purchases", purchase("o5", 5, 11.0))
    got = scene.client.score("mixed", pa.table({"user_id": [0, 1, 2, 3, 5]}))
    assert got.column("result").to_pylist() == ["9.0", None, "9.0", "9.0", '{"spent":11.0}']
    assert got.column("error").is_valid().to_pylist() == [False, True, False, False, False]


def test_several_models_are_asked_about_the_same_ids(scene: Scene) -> None:
    scene.client.send("purchases", [purchase(f"o{i}", i, book_id="b") for i in range(4)])
    ids = [{"user_id": i, "book_id": "b"} for i in range(5)]
    before = scene.requests
    answers = scene.client.score_many(["offer", "broken"], ids)
    assert scene.requests == before + 5
    assert [a["offer"].result for a in answers] == [s.result for s in scene.client.score("offer", ids)]
    assert {type(a["broken"]) for a in answers} == {RequestFailed}
    assert (answers[0]["broken"].code, answers[0]["broken"].status) == ("prediction_failed", 500)
    assert isinstance(answers[4]["offer"], Score)
    assert answers[4]["offer"].as_of == NOW_TIME
    assert scene.client.score_many(["offer"], []) == []
    with pytest.raises(TypeError, match=r"got 'offer'; expected a list of names, such as \['offer'\]"):
        scene.client.score_many("offer", ids)
    with pytest.raises(RequestRefused) as caught:
        scene.client.score_many(["offer"], [*ids, {"user_id": None, "book_id": "b"}])
    assert caught.value.path == "$.ids[5].user_id"
    with pytest.raises(RequestRefused, match="`models` as a list of names, one at least"):
        scene.client.score_many([], ids)


def test_features_of_a_view_whose_key_is_any_field(scene: Scene) -> None:
    scene.client.send("purchases", purchase("a", 5, book_id="a b&c=ü/?"))
    got = scene.client.features("user_book", user_id=5, book_id="a b&c=ü/?")
    assert (got.view, got.key, got.features, got.as_of, got.unknown) == ("user_book", {"user_id": 5, "book_id": "a b&c=ü/?"}, {"bought": 1.0}, NOW_TIME, False)  # fmt: skip
    with pytest.raises(RequestRefused, match="key field `book_id` is missing"):
        scene.client.features("user_book", user_id=5)
    with pytest.raises(RequestRefused, match="unknown field `name`"):
        scene.client.features("user_spend", user_id=5, name="x", prefix="y")


def test_status_needs_the_token_and_nothing_else_is_given_it(scene: Scene) -> None:
    assert [shard["shard"] for shard in scene.client.status()["shards"]] == [0, 1]
    scene.client.score("churn", {"user_id": 1})
    assert ["authorization" in headers for _, _, headers, _ in scene.behind.seen] == [True, False]
    with type(scene.client)(scene.url) as stranger, pytest.raises(RequestRefused, match="admin token"):
        stranger.status()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "", "/x"])
def test_a_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="allowed is http://HOST:PORT"):
        Client(url)


def test_a_host_that_is_none_is_an_error_of_ours() -> None:
    for url in ("http://a:b:c", "http://[", "http://x:99999999"):
        with Client(url, retry_s=0) as one, pytest.raises(ClientError):
            one.score("churn", {"user_id": 1})


# -- threads and tasks


def test_a_client_is_for_many_threads(stage: Stage, behind: Behind) -> None:
    with Client(stage.url) as one:
        threads = [threading.Thread(target=lambda t=t: [one.send("purchases", purchase(f"{t}-{i}", t)) for i in range(20)]) for t in range(8)]  # type: ignore[misc] # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [s.result for s in one.score("churn", [{"user_id": t} for t in range(8)])] == [20 + 200 + 10.0] * 8


def test_an_async_client_sends_at_once(stage: Stage, behind: Behind) -> None:
    async def talk(url: str) -> list[Any]:
        async with AsyncClient(url, connections_max=10) as one:
            acks = await asyncio.gather(*(one.send("purchases", purchase(f"o{i}", 5)) for i in range(100)))
            return [sum(a.accepted for a in acks), (await one.score("churn", {"user_id": 5})).result]

    assert asyncio.run(talk(stage.url)) == [100, 100 + 1_000 + 10.0]


# -- the sender of single events


@pytest.fixture
def served(stage: Stage, behind: Behind) -> Iterator[tuple[Behind, Client]]:
    with Client(stage.url, retry_s=5) as one:
        yield behind, one


def test_a_sender_sends_together(served: tuple[Behind, Client]) -> None:
    behind, one = served
    with one.sender("purchases", batch_rows=50, linger_ms=60_000) as sender:
        for i in range(120):
            sender.add(purchase(f"o{i}", 5))
        sender.flush()
        assert sender.ack == Ack(accepted=120, unkeyed=120)
        assert [len(json.loads(body)) for *_, body in behind.seen] == [50, 50, 20]
        sender.flush()
        sender.add(purchase("last", 5))
    assert sender.ack.accepted == 121
    assert len(behind.seen) == 4
    with pytest.raises(RuntimeError, match="add after close"):
        sender.add(purchase("x"))
    sender.close()


def test_an_event_does_not_linger_longer_than_it_may(served: tuple[Behind, Client]) -> None:
    _, one = served
    with one.sender("purchases", batch_rows=10_000, linger_ms=1) as sender:
        sender.add(purchase("a", 5))
        with sender._changed:
            assert sender._changed.wait_for(lambda: sender.ack.accepted == 1, timeout=10)


def test_a_full_buffer_holds_the_application_back(served: tuple[Behind, Client]) -> None:
    _, one = served
    held, gone = threading.Event(), threading.Event()
    sent: list[int] = []

    def send(events: Any) -> Ack:
        held.wait(10)
        sent.append(len(events))
        return one.send("purchases", events)

    sender = client.Sender(send, batch_rows=2, buffer_rows=4)

    def add() -> None:
        for i in range(20):
            sender.add(purchase(f"o{i}", 5))
        gone.set()

    thread = threading.Thread(target=add)
    thread.start()
    with sender._changed:
        assert sender._changed.wait_for(lambda: sender._added == 4, timeout=10)
    assert not gone.wait(0.1)
    assert sender._added == 4
    held.set()
    thread.join(10)
    sender.close()
    assert (sum(sent), max(sent), sender.ack.accepted) == (20, 2, 20)


def test_what_a_sender_could_not_send_is_raised_with_its_events(served: tuple[Behind, Client]) -> None:
    behind, one = served
    sender = one.sender("purchases", batch_rows=2, linger_ms=60_000)
    good = [purchase(f"o{i}", 5) for i in range(4)]
    bad = purchase("bad", 5, price="dear")
    for event in (good[0], good[1], bad, good[2], good[3]):
        sender.add(event)
    with pytest.raises(NotSent) as caught:
        sender.flush()
    error = caught.value
    assert error.events == [bad, good[2]]
    assert (error.code, error.path, error.status) == ("invalid_events", "$[0].price", 400)
    assert isinstance(error.__cause__, RequestRefused)
    assert sender.ack == Ack(accepted=3, unkeyed=3)
    sender.flush()  # it is raised once
    # Held back by a failure, `add` gives its event back too.
    behind.faults = [400]
    sender.add(good[2])
    sender.add(bad)
    with sender._changed:
        assert sender._changed.wait_for(lambda: sender._unsent, timeout=10)
    with pytest.raises(NotSent) as caught:
        sender.add(good[3])
    assert caught.value.events == [good[2], bad, good[3]]
    sender.add(good[2])
    sender.close()
    assert sender.ack.accepted == 4


def test_a_sender_gives_back_only_what_was_not_acknowledged(stage: Stage, behind: Behind) -> None:
    """The client sends what it is given in parts, and one of them fails."""
    events = [purchase(f"o{i}", 5) for i in range(3)] + [purchase("bad", "x")]
    with Client(stage.url, batch_rows=2) as one:
        sender = one.sender("purchases", batch_rows=4, linger_ms=60_000)
        for event in events:
            sender.add(event)
        with pytest.raises(NotSent) as caught:
            sender.close()
    assert (caught.value.events, caught.value.path, sender.ack.accepted) == (events[2:], "$[1].user_id", 2)


def test_a_sender_of_events_without_ids_counts_each_once_whatever_fails_on_the_way(served: tuple[Behind, Client]) -> None:  # fmt: skip
    behind, one = served
    behind.faults = ["torn", 503, "ok", "torn", (429, 0), "torn"]
    with one.sender("logins", batch_rows=7) as sender:
        for i in range(100):
            sender.add(login("phone", i))
    assert sender.ack.accepted + sender.ack.duplicates == 100
    assert behind.world.get("/v1/features/device_logins?device=phone").json["features"]["logins_1h"] == 100


def test_closing_the_client_closes_its_senders(stage: Stage, behind: Behind) -> None:
    with Client(stage.url) as one:
        sender = one.sender("purchases", linger_ms=60_000)
        sender.add(purchase("a", 5))
    assert sender.ack.accepted == 1
    with pytest.raises(NotSent), Client(stage.url) as one:
        one.sender("purchases", linger_ms=60_000).add({})


def test_what_a_program_that_ends_has_left_is_sent(stage: Stage, behind: Behind) -> None:
    code = (
        "import sys; from millpond.deployments import Client\n"
        "sender = Client(sys.argv[1]).sender('purchases', linger_ms=60_000)\n"
        f"sender.add({purchase('a', 5)!r})"
    )
    subprocess.run([sys.executable, "-c", code, stage.url], check=True, timeout=60)
    assert len(behind.seen) == 1


# -- what is promised of the module


def test_the_ack_is_the_cluster_s() -> None:
    assert [f.name for f in dataclasses.fields(Ack)] == [f.name for f in dataclasses.fields(ServerAck)]


def test_an_error_crosses_a_process_boundary_whole() -> None:
    error = RequestRefused("no", code="bad", status=400, path="$[1].a", problems=(("no", "$[1].a"),))
    error.first_row, error.ack = 1, Ack(accepted=1)
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (RequestRefused, str(error), vars(error))


def test_the_client_is_light_and_replicas_do_not_load_it() -> None:
    code = (
        "import sys, millpond.deployments; before = set(sys.modules); from millpond.deployments import Client; "
        "heavy = {'httpx', 'pyarrow', 'numpy', 'numba', 'ray'}; print(sorted(heavy & before), sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] ['httpx']\n"


@pytest.mark.parametrize("module", [client, client_answers, arrow_scores], ids=lambda m: m.__name__)
def test_the_examples_are_true(module: Any, stage: Stage) -> None:
    for test in doctest.DocTestFinder().find(module):
        stage.behind = Behind(make_world())
        test.globs |= {"url": stage.url, "now": NOW}
        assert doctest.DocTestRunner().run(test).failed == 0
