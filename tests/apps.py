"""Both HTTP apps over plain shards in this process, and a caller of them. No Ray, no sockets, no event loop."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millpond.deployments.events import EventsApp
from millpond.deployments.http import App
from millpond.deployments.lane import Lane
from millpond.deployments.score import ScoreApp, ScoreLimits
from millpond.deployments.score_log import ScoreLog
from millpond.deployments.served import Models, Served
from millpond.feature_actors import (
    Count,
    Derived,
    FeatureView,
    Field,
    First,
    Last,
    LastN,
    Max,
    Ratio,
    SecondsSince,
    Source,
    Std,
    Sum,
)
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import Clock, ClockKind, ManualClock
from millpond.feature_actors.decode import BodyLimits
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.ports import LocalIngest, LocalRead
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.models import Features, Model
from millpond.models.model import LoadedModel

NOW = 1_700_000_000_000
TWO_DAYS = 2 * 86_400_000
NOW_ISO = "2023-11-14T22:13:20.000Z"
TOKEN = "the-admin-token"
ARROW = "application/vnd.apache.arrow.stream"
NDJSON = "application/x-ndjson"

purchases = Source(
    "purchases",
    owner="checkout",
    about="One row per <b>paid</b> order line.",
    fields={
        "order_id": "string", "user_id": "int64", "book_id": Field("string", optional=True),
        "price": "float64", "gift": Field("bool", optional=True), "paid_at": "timestamp[ms, UTC]",
    },
    event_id="order_id",
    event_time="paid_at",
)  # fmt: skip
logins = Source(
    "logins",
    owner="accounts",
    fields={"user_id": "int64", "device": "string", "at": "timestamp[ms, UTC]"},
    event_time="at",
)
user_spend = FeatureView(
    "user_spend", owner="retention", source=purchases, key=["user_id"],
    features={"orders_30d": Count(window="30d"), "spend_30d": Sum("price", window="30d"),
              "last_price": Last("price"), "recency_s": SecondsSince()},
)  # fmt: skip
book_sales = FeatureView(
    "book_sales", owner="shelf", source=purchases, key=["book_id"],
    features={"sold_7d": Count(window="7d"), "top_price": Max("price", window="7d")},
)  # fmt: skip
user_book = FeatureView(
    "user_book", owner="shelf", source=purchases, key=["user_id", "book_id"],
    features={"bought": Count(window="90d")},
)  # fmt: skip
device_logins = FeatureView(
    "device_logins", owner="fraud", source=logins, key=["device"], features={"logins_1h": Count(window="1h")}
)


def swing(prices: Any) -> Any:
    return prices[:, 0] - prices[:, 1]


VIEWS = (user_spend, book_sales, user_book, device_logins)
#: Every kind of feature there is: of numbers and strings, one value and several, exact, derived.
taste = FeatureView(
    "taste", owner="shelf", source=purchases, key=["user_id"], where=pc.field("price") >= 0,
    features={"n": Count(window="30d"), "dear": Sum("price", window="30d", exact=True, where=pc.field("price") > 5),
              "mean": Ratio("dear", "n"), "first_book": First("book_id", ttl="90d"), "books": LastN("book_id", n=3),
              "prices": LastN("price", n=2, window="30d"), "swing": Derived(swing, "prices"), "wide": Std("price")},
)  # fmt: skip
LAYOUT = compile_layout([purchases, logins], VIEWS)


class Total:
    """The sum of the features that are there."""

    def predict(self, features: Features) -> Any:
        return np.nansum(features.matrix, axis=1)


class Returns:
    """Whatever it is told to: an exception is raised, a function called, a value given for each row."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def predict(self, features: Features) -> Any:
        if isinstance(self.what, Exception):
            raise self.what
        return self.what(features) if callable(self.what) else [self.what] * len(features.matrix)


def mean_price(features: Features) -> Any:
    """Spend by orders, of `user_spend`: NaN for whoever has none."""
    with np.errstate(invalid="ignore"):
        return features.matrix[:, 1] / features.matrix[:, 0]


def model(name: str, features: Sequence[Any], predictor: Any = Total) -> Model:
    return Model(name, version="3", owner="retention", features=features, predictor=predictor)


churn = model("churn", list(user_spend))
offer = model("offer", [*book_sales, user_spend["spend_30d"], *user_book])


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, checked to be of the one form that all errors have."""
        assert self.headers["content-type"] == "application/json"
        assert self.json.keys() == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert error.keys() - {"problems"} == {"code", "message", "path"}
        return error


@dataclass
class World:
    """Both apps over the same shards."""

    clock: Any
    shards: list[Shard]
    client: FeatureClient
    events: EventsApp
    score: ScoreApp

    def post_events(self, source: str, body: Any, content_type: str | None = None, **options: Any) -> Reply:
        return call(self.events, "POST", f"/v1/events/{source}", body, content_type, **options)

    def post_score(self, name: str, body: Any, content_type: str | None = None, **options: Any) -> Reply:
        return call(self.score, "POST", f"/v1/score/{name}", body, content_type, **options)

    def get(self, target: str, **options: Any) -> Reply:
        return call(self.score, "GET", target, b"", **options)

    @property
    def applied(self) -> int:
        """How many events the tiles of all shards hold, and how many ids were seen: 0 if nothing came through."""
        return sum(sum(s.status().events.values()) + s.status().filter_bytes for s in self.shards)


def make_world(
    models: Sequence[Model] = (churn, offer),
    *,
    n_shards: int = 2,
    clock: Clock | None = None,
    bodies: BodyLimits | None = None,
    scores: ScoreLimits | None = None,
    layout: Any = LAYOUT,
    status: Any = None,
    cluster_name: str = "test",
    token: str = TOKEN,
    only_purchases: bool = False,
    score_log: Callable[[ShardMap], ScoreLog] | None = None,
) -> World:
    """Make both apps over new shards; `only_purchases`: with what `DEFINITION` declares."""
    if only_purchases:
        layout = compile_layout([], [v for v in VIEWS if v.source is purchases])
    shard_map = ShardMap.even(64, n_shards)
    shards = [Shard(layout, shard_map, i) for i in range(n_shards)]
    clock = clock or ManualClock(NOW)
    client = FeatureClient(layout, shard_map, LocalIngest(shards), LocalRead(shards), clock)

    async def shards_status() -> list[dict[str, Any]]:
        from dataclasses import asdict

        return [asdict(s.status()) for s in shards]

    threads = ThreadPoolExecutor(4, "predict")
    served = {m.name: Served(m.name, Lane(LoadedModel(m, layout, Path()), client, threads)) for m in models}
    digest = hashlib.sha256(token.encode()).hexdigest()
    log = None if score_log is None else score_log(shard_map)
    for one in served.values():
        one.champion.score_log = log
    score = ScoreApp(
        client, Models(served), status or shards_status, scores or ScoreLimits(), digest, cluster_name, log
    )
    kind: ClockKind = "event" if clock.now_ms() is None else "wall"
    events = EventsApp(client, bodies or BodyLimits(), clock=kind, admin_token_sha256=digest)
    return World(clock, shards, client, events, score)


def call(
    app: App,
    method: str,
    target: str,
    body: Any = b"",
    content_type: str | None = None,
    *,
    headers: Mapping[str, str] = {},
    chunks: Sequence[bytes] | None = None,
    content_length: bool = True,
    root_path: str = "",
    disconnect: bool = False,
) -> Reply:
    """Make one request as a server would; anything but bytes is sent as JSON."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    parts = [body] if chunks is None else list(chunks)
    path, _, query = target.partition("?")
    sent_headers = {name.lower(): value for name, value in headers.items()}
    if content_type is not None:
        sent_headers["content-type"] = content_type
    if content_length:
        sent_headers.setdefault("content-length", str(sum(map(len, parts))))
    scope = {
        "type": "http",
        "method": method,
        "path": unquote(path),
        "query_string": query.encode(),
        "root_path": root_path,
        "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in sent_headers.items()],
    }
    messages = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]
    if disconnect:
        messages[-1:] = [{"type": "http.disconnect"}]
    unread = iter(messages)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return next(unread)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    if not sent:
        return Reply(0, {}, b"")
    start, end = sent
    assert (start["type"], end["type"]) == ("http.response.start", "http.response.body")
    got = {k.decode(): v.decode() for k, v in start["headers"]}
    assert got["content-length"] == str(len(end["body"]))
    return Reply(start["status"], got, end["body"])


def purchase(order_id: str, user_id: Any = 1, price: Any = 10.0, paid_at: Any = NOW, **more: Any) -> dict[str, Any]:
    return {"order_id": order_id, "user_id": user_id, "price": price, "paid_at": paid_at, **more}


def arrow(source: Source, events: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None) -> bytes:
    """Events as an Arrow IPC stream."""
    schema = schema or source.schema
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([dict(e) for e in events], schema=schema))
    return bytes(sink.getvalue())


#: The same, as a file that an ML team would write.
DEFINITION = """
import numpy as np
from millpond.feature_actors import Count, FeatureView, Field, Last, Max, SecondsSince, Source, Sum
from millpond.models import Model

purchases = Source(
    "purchases", owner="checkout",
    fields={"order_id": "string", "user_id": "int64", "book_id": Field("string", optional=True),
            "price": "float64", "gift": Field("bool", optional=True), "paid_at": "timestamp[ms, UTC]"},
    event_id="order_id", event_time="paid_at")
user_spend = FeatureView(
    "user_spend", owner="retention", source=purchases, key=["user_id"],
    features={"orders_30d": Count(window="30d"), "spend_30d": Sum("price", window="30d"),
              "last_price": Last("price"), "recency_s": SecondsSince()})
book_sales = FeatureView(
    "book_sales", owner="shelf", source=purchases, key=["book_id"],
    features={"sold_7d": Count(window="7d"), "top_price": Max("price", window="7d")})
user_book = FeatureView(
    "user_book", owner="shelf", source=purchases, key=["user_id", "book_id"],
    features={"bought": Count(window="90d")})

class Total:
    def __init__(self, weights=None):
        self.scale = 1.0 if weights is None else float(np.load(weights)[0])
    def predict(self, features):
        return self.scale * np.nansum(features.matrix, axis=1)

churn = Model("churn", version="3", owner="retention", features=list(user_spend), predictor=Total, artifacts={})
offer = Model("offer", version="3", owner="retention",
              features=[*book_sales, user_spend["spend_30d"], *user_book], predictor=Total)
"""
