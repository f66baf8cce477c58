# ruff: noqa: E501  (messages stand whole)
"""What a cluster owes whoever calls it over HTTP, behind whichever proxy. Subclass it and define the fixture `served`."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from apps import ARROW, NDJSON, TWO_DAYS, arrow, make_world, purchase, purchases

from millpond.feature_actors.clock import EventClock

ACK = {"accepted": 0, "duplicates": 0, "conflicts": 0, "late": 0, "too_late": 0, "unkeyed": 0, "forgotten": 0}
#: After every event of any other test on the same cluster: on its event clock, time goes one way.
START = 1_710_000_000_000
_numbers = itertools.count()


@dataclass(frozen=True)
class Served:
    """A cluster that answers at `url`, on the event clock, with the sources and models of `apps.DEFINITION`."""

    url: str
    directory: Path

    def call(
        self,
        method: str,
        target: str,
        body: Any = None,
        content_type: str = "application/json",
        headers: Mapping[str, str] = {},
    ) -> tuple[int, dict[str, str], Any]:
        """Make one request on a connection of its own; return status, headers and the decoded answer."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        try:
            content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            sent = dict(headers) | ({} if content is None else {"content-type": content_type})
            connection.request(method, target, content, sent)
            answer = connection.getresponse()
            content = answer.read()
            got = {k.lower(): v for k, v in answer.getheaders()}
            return answer.status, got, json.loads(content) if got.get("content-type") == "application/json" else content
        finally:
            connection.close()

    def post_events(self, events: Any, content_type: str = "application/json", query: str = "") -> Any:
        status, _, answer = self.call("POST", f"/v1/events/purchases{query}", events, content_type)
        assert status == 200, answer
        return answer

    def score(self, model: str, ids: Any, query: str = "?features=true") -> Any:
        status, _, answer = self.call("POST", f"/v1/score/{model}{query}", ids)
        assert status == 200, answer
        return answer


def fresh() -> int:
    """A user that no other test knows."""
    return 1_000_000 + next(_numbers)


class ServedContract:
    def test_each_body_form_is_taken_and_the_next_score_sees_it(self, served: Served) -> None:
        bodies = [
            (lambda e: e[0], "application/json"),
            (lambda e: e, "application/json"),
            (lambda e: b"\n".join(json.dumps(x).encode() for x in e), NDJSON),
            (lambda e: arrow(purchases, e), ARROW),
        ]
        for make, content_type in bodies:
            user = fresh()
            event = purchase(f"form-{user}", user, 2.5, START, book_id="form")
            assert served.post_events(make([event]), content_type) == {**ACK, "accepted": 1}  # type: ignore[no-untyped-call]
            answer = served.score("churn", {"user_id": user})
            assert answer["features"] == {
                "user_spend.orders_30d": 1.0, "user_spend.spend_30d": 2.5, "user_spend.last_price": 2.5, "user_spend.recency_s": 0.0,
            }  # fmt: skip
            assert served.post_events(make([event]), content_type) == {**ACK, "duplicates": 1}  # type: ignore[no-untyped-call]

    def test_read_your_writes(self, served: Served) -> None:
        user = fresh()
        for n in range(1, 51):
            served.post_events(purchase(f"ryw-{user}-{n}", user, 1.0, START))
            assert served.score("churn", {"user_id": user})["features"]["user_spend.orders_30d"] == n

    def test_a_batch_of_ids_over_views_of_different_keys(self, served: Served) -> None:
        user, other = fresh(), fresh()
        served.post_events(
            [
                purchase(f"k-{user}", user, 4.0, START, book_id=f"k{user}"),
                purchase(f"k-{other}", other, 6.0, START, book_id=f"k{user}"),
            ]
        )
        ids = [{"user_id": user, "book_id": f"k{user}"}, {"user_id": other, "book_id": "nowhere"}]
        answers = served.score("offer", ids)
        assert [list(a["features"].values()) for a in answers] == [[2.0, 6.0, 4.0, 1.0], [0.0, None, 6.0, 0.0]]
        assert [a["unknown"] for a in answers] == [[], ["book_sales", "user_book"]]
        assert served.score("offer", []) == []

    def test_features_of_one_entity(self, served: Served) -> None:
        user = fresh()
        served.post_events(purchase(f"f-{user}", user, 4.0, START, book_id="a b&c"))
        status, _, answer = served.call("GET", f"/v1/features/user_book?user_id={user}&book_id=a+b%26c")
        assert (status, answer["features"], answer["unknown"]) == (200, {"bought": 1.0}, False)

    def test_what_is_wrong_is_told_as_the_application_tells_it(self, served: Served) -> None:
        calls = [
            ("POST", "/v1/score/churn", {}, 400), ("POST", "/v1/score/churn", {"user_id": 1, "orders_30d": 1}, 400),
            ("POST", "/v1/score/churn?as_of=2023-01-01T00:00:00", {"user_id": 1}, 400),             ("POST", "/v1/events/purchases", {"order_id": 5}, 400), ("GET", "/v1/events/purchases", None, 405), ("GET", "/v1/score/churn", None, 405),
            ("GET", "/nope", None, 404), ("GET", "/v1/status", None, 401),
        ]  # fmt: skip
        from apps import call

        world = make_world(clock=EventClock(), only_purchases=True)
        for method, target, body, status in calls:
            got, headers, answer = served.call(method, target, body)
            app = world.events if "/events/" in target else world.score
            want = call(app, method, target, b"" if body is None else body)
            assert (got, answer) == (status, want.json), target
            assert headers["content-type"] == "application/json"
        # (What else there is depends on the cluster.)
        for method, target, near in (
            ("POST", "/v1/score/churm", "churn"), ("POST", "/v1/events/purchase", "purchases"), ("GET", "/v1/features/user_spent", "user_spend"),
        ):  # fmt: skip
            got, _, answer = served.call(method, target, None if method == "GET" else {})
            assert (got, answer["error"]["code"]) == (404, "not_found")
            assert answer["error"]["message"].endswith(f"; did you mean `{near}`?")

    def test_an_as_of_in_the_past_is_a_conflict(self, served: Served) -> None:
        served.post_events(purchase(f"past-{fresh()}", fresh(), 1.0, START))
        status, _, answer = served.call("POST", f"/v1/score/churn?as_of={START - 1}", {"user_id": 1})
        assert (status, answer["error"]["code"]) == (409, "as_of_in_past")
        assert (
            served.score("churn", {"user_id": 1}, "?as_of=2100-01-01T00:00:00%2B00:00")["as_of"]
            == "2100-01-01T00:00:00.000Z"
        )

    def test_garbage_is_refused_and_the_next_request_works(self, served: Served) -> None:
        garbage = random.Random(5).randbytes(2**20)
        attacks = [
            ("/v1/events/purchases", garbage, "application/json"), ("/v1/events/purchases", garbage, ARROW), ("/v1/events/purchases", garbage, NDJSON),
            ("/v1/events/purchases", arrow(purchases, [purchase("a")])[:-50], ARROW), ("/v1/events/purchases", b"[" * 10_000, "application/json"),
            ("/v1/score/churn", garbage, "application/json"), ("/v1/score/churn", b'{"user_id":' * 10_000, "application/json"),
            ("/v1/score/churn", b'{"user_id": NaN}', "application/json"), ("/v1/score/churn", b'{"user_id": 99999999999999999999}', "application/json"),
        ]  # fmt: skip
        for target, body, content_type in attacks:
            status, _, answer = served.call("POST", target, body, content_type)
            assert (status, answer["error"]["code"] in ("invalid_events", "bad_json", "bad_id")) == (400, True), answer
            assert served.call("GET", "/healthz")[0] == 200
        assert served.call("POST", "/v1/events/purchases", b"a,b", "text/csv")[0] == 415
        assert served.call("POST", "/v1/score/churn", [{"user_id": 1}] * 10_001)[0] == 413
        assert served.score("churn", {"user_id": 10**12})["unknown"] == ["user_spend"]

    def test_a_body_of_100_mb_is_refused_and_the_next_request_works(self, served: Served) -> None:
        for target in ("/v1/events/purchases", "/v1/score/churn"):
            for chunked in (False, True):
                status = post_endlessly(served.url, target, 100 * 2**20, chunked)
                assert status == 413, (target, chunked)
                assert served.score("churn", {"user_id": 1}, "")["model"] == "churn"
                assert served.post_events([]) == ACK

    def test_the_answers_are_those_of_one_shard_in_one_process(self, served: Served) -> None:
        """N shard actors behind HTTP == 1 plain shard, bit for bit."""
        rng = random.Random(8)
        base = fresh() * 1_000
        events = [
            purchase(f"same-{base}-{rng.randrange(900)}", base + rng.randrange(40), rng.uniform(-9, 9), START + i * 60_000 - rng.randrange(TWO_DAYS),
                     book_id=f"same{base}-{rng.randrange(20)}")
            for i in range(1_000)
        ]  # fmt: skip
        ids = [{"user_id": base + u, "book_id": f"same{base}-{b}"} for u in range(42) for b in range(21)]
        world = make_world(clock=EventClock(), n_shards=1)
        for i in range(0, len(events), 97):
            part = events[i : i + 97]
            assert served.post_events(part) == world.post_events("purchases", part).json
        as_of = START + 10 * TWO_DAYS
        query = f"?features=true&as_of={as_of}"
        for model in ("offer", "churn"):
            asked = ids if model == "offer" else [{"user_id": i["user_id"]} for i in ids]
            got, want = served.score(model, asked, query), world.post_score(f"{model}{query}", asked).json
            for answer in (*got, *want):
                answer.pop("id")
            assert got == want
        assert sum(not a["unknown"] for a in got) > 500

    def test_ready_documented_and_closed_to_those_without_the_token(self, served: Served) -> None:
        status, _, answer = served.call("GET", "/readyz")
        assert (status, answer["status"]) == (200, "ready")
        assert {"churn", "offer"} <= set(answer["models"])
        assert served.call("GET", "/docs")[1]["content-type"] == "text/html; charset=utf-8"
        assert "/v1/score/churn" in served.call("GET", "/openapi.json")[2]["paths"]
        token = (served.directory / "admin_token").read_text()
        assert (served.directory / "admin_token").stat().st_mode & 0o777 == 0o600
        assert served.call("GET", "/v1/status", headers={"authorization": f"Bearer {token[:-1]}"})[0] == 401
        status, _, answer = served.call("GET", "/v1/status", headers={"authorization": f"Bearer {token}"})
        assert (status, [s["shard"] for s in answer["shards"]]) == (200, list(range(len(answer["shards"]))))


def post_endlessly(url: str, target: str, size: int, chunked: bool) -> int:
    """Send a body of `size` bytes, as far as it is taken, and return the status of the answer."""
    host, port = urlsplit(url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        connection.sendall(
            f"POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()
        )
        block = b" " * 2**16
        if chunked:
            block = b"10000\r\n" + block + b"\r\n"
        sent = 0
        connection.settimeout(30)
        try:
            while sent < size:
                connection.sendall(block)
                sent += 2**16
            if chunked:
                connection.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was told to stop; the answer is there to be read
        answer = b""
        while b"\r\n" not in answer and (part := connection.recv(2**16)):
            answer += part
    return int(answer.split()[1])
