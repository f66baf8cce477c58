"""The client: events to a cluster, scores and features from it, for programs in Python.

Promises: a request is tried again while that may help and is allowed, and never counts twice; what was not
acknowledged is named; only errors of `client_answers` are raised, never one of the HTTP library.

How: a call is a generator that yields what to send and how long to wait, and is sent what came of it (`_Calls`). So
what a request is, and how an answer is judged, is written once; `Client` and `AsyncClient` only send and wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import random
import re
import secrets
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload
from urllib.parse import quote, urlencode

import httpx
import msgspec

from millpond.deployments.client_answers import (
    Ack,
    ClientError,
    NotSent,
    RequestFailed,
    RequestRefused,
    Score,
    TryAgainLater,
    ViewFeatures,
    error_of_answer,
    error_of_model,
)
from millpond.deployments.sender import Sender

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Ack",
    "AsyncClient",
    "Client",
    "ClientError",
    "NotSent",
    "RequestFailed",
    "RequestRefused",
    "Score",
    "Sender",
    "TryAgainLater",
    "ViewFeatures",
]

T = TypeVar("T")
Id = Mapping[str, Any]
Event = Mapping[str, Any]
AsOf = datetime | int | str | None
Arrival = Literal["now", "event", "given"]

_JSON = "application/json"
_ARROW = "application/vnd.apache.arrow.stream"

#: Waits between tries: drawn from up to so long, doubled with each try.
_WAIT_S, _WAIT_S_MAX = 0.05, 2.0
#: A host that does not take a connection so long will not.
_CONNECT_S_MAX = 5.0
_KEY = re.compile(r"[!-~]{1,200}")


class _Request(NamedTuple):
    method: str
    target: str
    content: bytes = b""
    content_type: str = ""
    accept: str = _JSON
    idempotency_key: str = ""
    first_row: int = 0


class _Body(NamedTuple):
    """Some rows of a call: which is the first, how many, and the content of a request with them."""

    first_row: int
    rows: int
    content: bytes
    content_type: str


_Outcome = httpx.Response | Exception | None
#: Yields a request, to be sent its outcome, or seconds to wait; returns what the call returns.
_Call = Generator[_Request | float, _Outcome, T]


class Client:
    """Talk to a cluster. For any number of threads; connections are kept and used again.

    url: where the cluster serves. timeout_s: how long one try may wait for its answer. retry_s: no try begins later
    than so long after the first one; 0 is a single try. batch_rows: rows of a request at most; what has more goes in
    several, one after the other. admin_token: for `status`, and for events with given arrivals. connections_max: at
    once. Proxies of the environment are not used.

    A request is tried again after 429 and 503, and if there was no answer: after what `Retry-After` says, and a random
    time that doubles. That counts no event twice: they have ids, or the request has an idempotency key.

    >>> client = Client(url)
    >>> client.send("purchases", {"order_id": "a1", "user_id": 42, "price": 12.5, "paid_at": now})
    Ack(accepted=1, duplicates=0, conflicts=0, late=0, too_late=0, unkeyed=1, forgotten=0)
    >>> client.score("churn", {"user_id": 42}).result
    26.0
    >>> client.features("user_spend", user_id=42).features["spend_30d"]
    12.5
    >>> client.close()
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 10.0,
        retry_s: float = 30.0,
        batch_rows: int = 10_000,
        admin_token: str | None = None,
        connections_max: int = 100,
    ) -> None:
        self._calls = _Calls(url, timeout_s, retry_s, batch_rows, admin_token)
        self._http = httpx.HTTPTransport(**_transport(url, connections_max))
        self._senders: list[Sender] = []

    def send(
        self,
        source: str,
        events: Event | Iterable[Event] | pa.Table | pa.RecordBatch,
        *,
        arrival: Arrival = "now",
        idempotency_key: str | None = None,
        first_row: int | None = None,
    ) -> Ack:
        """Send events, and return when all are acknowledged: every score asked for afterwards reflects them.

        The ack is the sum over the requests. Of a request that was sent again, what an earlier try had already brought
        in is among the `duplicates`.

        events: one, any number (an iterator is not read ahead), or an Arrow table, which is sent as such. A time is a
        `datetime` with a zone, ISO 8601 with a zone, or milliseconds since the epoch. arrival: "event" for a bulk load,
        in which an event arrives when it happens; "given" for a replay of a table with a column `_arrival_ms`, which
        needs the admin token where the clock is the wall's. idempotency_key: names this call, so that a later call
        with the same key, events and `batch_rows` changes nothing that this one has changed; only sources without an
        `event_id` need it. first_row: the key names more than this call, which begins so far on; then that may be cut
        into calls and requests in any way.

        Raises `ClientError`; its `ack` and `first_row` say what was acknowledged before.
        """
        return self._run(self._calls.send(source, events, arrival, idempotency_key, first_row))

    def sender(
        self, source: str, *, batch_rows: int = 500, linger_ms: float = 20.0, buffer_rows: int = 10_000
    ) -> Sender:
        """Return a `Sender` of single events, which sends them together from a thread of its own.

        >>> with Client(url) as client, client.sender("purchases") as sender:
        ...     for n in range(3):
        ...         sender.add({"order_id": f"s{n}", "user_id": n, "price": 1.0, "paid_at": now})
        >>> sender.ack.accepted
        3
        """
        sender = Sender(
            lambda events: self.send(source, events),
            batch_rows=batch_rows,
            linger_ms=linger_ms,
            buffer_rows=buffer_rows,
        )
        self._senders.append(sender)
        return sender

    @overload
    def score(self, model: str, ids: Id, *, features: bool = False, as_of: AsOf = None) -> Score: ...
    @overload
    def score(
        self, model: str, ids: Sequence[Id], *, features: bool = False, as_of: AsOf = None
    ) -> list[Score | ClientError]: ...
    @overload
    def score(
        self, model: str, ids: pa.Table | pa.RecordBatch, *, features: bool = False, as_of: AsOf = None
    ) -> pa.Table: ...
    def score(self, model: str, ids: Any, *, features: bool = False, as_of: AsOf = None) -> Any:
        """Score an id, a list of ids, or an Arrow table of ids (its columns are the key fields).

        Returns a `Score`, a list of them, or for a table a table with the columns `id`, `version`, `result`, `as_of`,
        `unknown` and `error` in the order of its rows; `result` is float64, or where results are not all numbers a
        string, the JSON of the result.

        An id of several whose result JSON has no word for, such as NaN, has its `RequestFailed` in the list instead of
        a `Score`, or in the table a text as `error` and null as `result`; it is not raised, and the others are scored.

        features: return the features that were read, too; in a table as columns. as_of: for replays, see `/docs`.

        Raises `ClientError`: `RequestRefused` for wrong ids, `RequestFailed` if the model fails, `TryAgainLater`.
        """
        return self._run(self._calls.score(model, ids, features, as_of))

    def score_many(
        self, models: Sequence[str], ids: Sequence[Id], *, as_of: AsOf = None
    ) -> list[dict[str, Score | ClientError]]:
        """Ask several models about the same ids: return for each id what each model answers.

        ids: with the key fields of all the models. A model that fails has its error there instead of a `Score`;
        it is not raised, and the others answer. A request has at most `batch_rows` ids times models.
        """
        return self._run(self._calls.score_many(models, ids, as_of))

    def features(self, view: str, /, *, as_of: AsOf = None, **key: Any) -> ViewFeatures:
        """Return the features of a view for one entity, whose key is given by the names of its fields."""
        return self._run(self._calls.features(view, key, as_of))

    def status(self) -> dict[str, Any]:
        """Return what every shard holds, and the models. Needs the admin token."""
        return self._run(self._calls.status())

    def close(self) -> None:
        """Close its senders, and the connections. Raises `NotSent` if a sender could not send everything."""
        with contextlib.ExitStack() as stack:  # each is closed, whatever another raises
            stack.callback(self._http.close)
            for sender in self._senders:
                stack.callback(sender.close)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, call: _Call[T]) -> T:
        outcome: _Outcome = None
        while True:
            try:
                step = call.send(outcome)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            outcome = None
            if isinstance(step, float):
                time.sleep(step)
                continue
            try:
                outcome = self._http.handle_request(self._calls.http_request(step))
                try:
                    outcome.read()
                finally:
                    outcome.close()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                outcome = error


class AsyncClient:
    """As `Client`, for programs with an event loop; it belongs to the loop that it is first used in.

    >>> async def main() -> list[float]:
    ...     async with AsyncClient(url) as client:
    ...         await client.send("purchases", {"order_id": "a1", "user_id": 42, "price": 12.5, "paid_at": now})
    ...         scores = await asyncio.gather(*(client.score("churn", {"user_id": n}) for n in (42, 43)))
    ...         return [score.result for score in scores]
    >>> asyncio.run(main())
    [26.0, 0.0]
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 10.0,
        retry_s: float = 30.0,
        batch_rows: int = 10_000,
        admin_token: str | None = None,
        connections_max: int = 100,
    ) -> None:
        self._calls = _Calls(url, timeout_s, retry_s, batch_rows, admin_token)
        self._http = httpx.AsyncHTTPTransport(**_transport(url, connections_max))

    async def send(
        self,
        source: str,
        events: Event | Iterable[Event] | pa.Table | pa.RecordBatch,
        *,
        arrival: Arrival = "now",
        idempotency_key: str | None = None,
        first_row: int | None = None,
    ) -> Ack:
        """Send events; see `Client.send`."""
        return await self._run(self._calls.send(source, events, arrival, idempotency_key, first_row))

    @overload
    async def score(self, model: str, ids: Id, *, features: bool = False, as_of: AsOf = None) -> Score: ...
    @overload
    async def score(
        self, model: str, ids: Sequence[Id], *, features: bool = False, as_of: AsOf = None
    ) -> list[Score | ClientError]: ...
    @overload
    async def score(
        self, model: str, ids: pa.Table | pa.RecordBatch, *, features: bool = False, as_of: AsOf = None
    ) -> pa.Table: ...
    async def score(self, model: str, ids: Any, *, features: bool = False, as_of: AsOf = None) -> Any:
        """Score an id, a list of ids, or an Arrow table of ids; see `Client.score`."""
        return await self._run(self._calls.score(model, ids, features, as_of))

    async def score_many(
        self, models: Sequence[str], ids: Sequence[Id], *, as_of: AsOf = None
    ) -> list[dict[str, Score | ClientError]]:
        """Ask several models about the same ids; see `Client.score_many`."""
        return await self._run(self._calls.score_many(models, ids, as_of))

    async def features(self, view: str, /, *, as_of: AsOf = None, **key: Any) -> ViewFeatures:
        """Return the features of a view for one entity; see `Client.features`."""
        return await self._run(self._calls.features(view, key, as_of))

    async def status(self) -> dict[str, Any]:
        """Return what every shard holds, and the models. Needs the admin token."""
        return await self._run(self._calls.status())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, call: _Call[T]) -> T:
        outcome: _Outcome = None
        while True:
            try:
                step = call.send(outcome)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            outcome = None
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            try:
                outcome = await self._http.handle_async_request(self._calls.http_request(step))
                try:
                    await outcome.aread()
                finally:
                    await outcome.aclose()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                outcome = error


class _Calls:
    """What each call sends, and what it makes of the answers. Sends nothing itself."""

    def __init__(self, url: str, timeout_s: float, retry_s: float, batch_rows: int, admin_token: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"client: url {url!r}; allowed is http://HOST:PORT or https://HOST:PORT")
        if batch_rows < 1 or not timeout_s > 0 or not retry_s >= 0:
            raise ValueError("client: batch_rows is 1 or more, timeout_s is more than 0, retry_s is 0 or more")
        self._url = url.rstrip("/")
        self._retry_s, self._batch_rows = retry_s, batch_rows
        connect_s = min(timeout_s, _CONNECT_S_MAX)
        timeout = {"connect": connect_s, "read": timeout_s, "write": timeout_s, "pool": timeout_s}
        self._extensions = {"timeout": timeout}
        self._admin = {"authorization": f"Bearer {admin_token}"} if admin_token else {}

    def http_request(self, request: _Request) -> httpx.Request:
        headers = {"accept": request.accept, "user-agent": "millpond"}
        if request.content_type:
            headers["content-type"] = request.content_type
        if request.idempotency_key:
            headers["idempotency-key"] = request.idempotency_key
        if request.first_row:
            headers["idempotency-row"] = str(request.first_row)
        if request.target == "/v1/status" or request.target.endswith("?arrival=given"):
            headers |= self._admin
        return httpx.Request(
            request.method,
            self._url + request.target,
            headers=headers,
            content=request.content,
            extensions=self._extensions,
        )

    # -- calls

    def send(self, source: str, events: Any, arrival: Arrival, key: str | None, begins: int | None) -> _Call[Ack]:
        target = _target("/v1/events/", source, arrival=None if arrival == "now" else arrival)
        key = secrets.token_hex(16) if key is None else key
        if not _KEY.fullmatch(key):
            raise ValueError(f"idempotency_key: got {key[:80]!r}; allowed are 1 to 200 visible ASCII characters")
        ack, first_row = Ack(), 0
        try:
            for number, body in enumerate(_bodies(events, self._batch_rows)):
                named, row = (f"{key}/{number}", 0) if begins is None else (key, begins + body.first_row)
                request = _Request(
                    "POST", target, body.content, body.content_type, idempotency_key=named, first_row=row
                )
                ack += yield from self._part(request, body, _decode_ack)
                first_row = body.first_row + body.rows
        except ClientError as error:
            error.ack, error.first_row, error.idempotency_key = ack, first_row, key
            raise
        return ack

    def score(self, model: str, ids: Any, features: bool, as_of: AsOf) -> _Call[Any]:
        target = _target("/v1/score/", model, features="true" if features else None, as_of=_time(as_of))
        if isinstance(ids, Mapping):
            return (yield from self._answered(_Request("POST", target, _json(ids), _JSON), _decode_score))
        if _is_arrow(ids):
            tables: list[pa.Table] = []
            for body in _bodies(ids, self._batch_rows):
                request = _Request("POST", target, body.content, body.content_type, _ARROW)
                tables.append((yield from self._part(request, body, _decode_table)))
            return _joined(tables)
        scores: list[Score | ClientError] = []
        for body in _bodies(ids, self._batch_rows):
            request = _Request("POST", target, body.content, body.content_type)
            scores += _at_rows((yield from self._part(request, body, _decode_scores)), body)
        return scores

    def score_many(
        self, models: Sequence[str], ids: Sequence[Id], as_of: AsOf
    ) -> _Call[list[dict[str, Score | ClientError]]]:
        if isinstance(models, str):  # its letters would be taken for models
            raise TypeError(f"models: got {models!r}; expected a list of names, such as [{models!r}]")
        target = _target("/v1/score", "", as_of=_time(as_of))
        answers: list[dict[str, Score | ClientError]] = []
        for first_row, rows in _parts(ids, max(1, self._batch_rows // max(1, len(models)))):
            body = _Body(first_row, len(rows), _json({"models": list(models), "ids": rows}), _JSON)
            request = _Request("POST", target, body.content, body.content_type)
            part = yield from self._part(request, body, _decode_many)
            answers += part
            for of_models in part:
                _at_rows(of_models.values(), body)
        return answers

    def features(self, view: str, key: Mapping[str, Any], as_of: AsOf) -> _Call[ViewFeatures]:
        target = _target("/v1/features/", view, **key, as_of=_time(as_of))
        return (yield from self._answered(_Request("GET", target), _decode_view))

    def status(self) -> _Call[dict[str, Any]]:
        return (yield from self._answered(_Request("GET", "/v1/status"), _decode_object))

    # -- a request and its answer

    def _part(self, request: _Request, body: _Body, decode: Callable[[bytes], T]) -> _Call[T]:
        try:
            return (yield from self._answered(request, decode))
        except ClientError as error:
            error.at_row(body.first_row)
            raise

    def _answered(self, request: _Request, decode: Callable[[bytes], T]) -> _Call[T]:
        """Send a request until it is answered, for good or ill, or the time is over; return the answer, decoded."""
        last_s = time.monotonic() + self._retry_s
        named = f"{request.method} {self._url}{request.target}"
        for tries in itertools.count(1):
            outcome = yield request
            if isinstance(outcome, httpx.Response) and outcome.status_code == 200:
                try:
                    return decode(outcome.content)
                except (msgspec.MsgspecError, ValueError) as unread:
                    why = f"{named}: an answer that cannot be read: {unread}"
                    raise RequestFailed(why, code="unexpected_answer", status=200) from unread
            error, wait_s = _judged(named, outcome)
            error.tries = tries
            wait_s += random.uniform(0, min(_WAIT_S_MAX, _WAIT_S * 2 ** min(tries, 10)))
            if not isinstance(error, TryAgainLater) or time.monotonic() + wait_s > last_s:
                raise error from (outcome if isinstance(outcome, Exception) else None)
            yield wait_s
        raise AssertionError("counted to the end")


def _judged(named: str, outcome: _Outcome) -> tuple[ClientError, float]:
    """Return the error that an outcome is, and how long it asks to wait."""
    if isinstance(outcome, httpx.Response):
        after = outcome.headers.get("retry-after", "")
        return error_of_answer(named, outcome.status_code, outcome.content), float(after) if after.isdigit() else 0.0
    why = f"{named}: {type(outcome).__name__}: {outcome}"
    if isinstance(outcome, httpx.InvalidURL | httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return RequestRefused(why, code="bad_request"), 0.0
    return TryAgainLater(f"no answer to {why}", code="no_answer"), 0.0


def _transport(url: str, connections_max: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=connections_max, max_keepalive_connections=connections_max)
    # Certificates take 30 ms to read; a transport goes nowhere but to its URL.
    return {"limits": limits, "verify": not url.startswith("http://")}


def _target(prefix: str, name: str, /, **query: Any) -> str:
    given = {field: value for field, value in query.items() if value is not None}
    return f"{prefix}{quote(name, safe='')}{'?' if given else ''}{urlencode(given)}"


def _time(as_of: AsOf) -> str | None:
    return as_of.isoformat() if isinstance(as_of, datetime) else None if as_of is None else str(as_of)


# -- bodies


def _is_arrow(rows: Any) -> bool:
    # Whoever has a table has imported PyArrow; for others it would double the time that this module takes to import.
    arrow = sys.modules.get("pyarrow")
    return arrow is not None and isinstance(rows, arrow.Table | arrow.RecordBatch)


def _parts(rows: Iterable[T], batch_rows: int) -> Iterator[tuple[int, list[T]]]:
    """Yield the rows in parts, each with the number of its first."""
    unread = iter(rows)
    first_row = 0
    while part := list(itertools.islice(unread, batch_rows)):
        yield first_row, part
        first_row += len(part)


def _bodies(rows: Any, batch_rows: int) -> Iterator[_Body]:
    """Yield the content of the requests that rows (of events or ids) go in; of a table one at least."""
    if _is_arrow(rows):
        for first_row in range(0, max(1, rows.num_rows), batch_rows):
            part = rows.slice(first_row, batch_rows)
            yield _Body(first_row, part.num_rows, _stream(part), _ARROW)
    elif isinstance(rows, Mapping):
        yield _Body(0, 1, _json(rows), _JSON)
    else:
        for first_row, rows_of_part in _parts(rows, batch_rows):
            yield _Body(first_row, len(rows_of_part), _json(rows_of_part), _JSON)


def _stream(rows: pa.Table | pa.RecordBatch) -> bytes:
    import pyarrow as pa

    table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        # As one batch: a table may have a chunk for every row, and the cluster takes 1,000.
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


class _NotFinite(ValueError):
    pass


def _json(value: Any) -> bytes:
    """Encode as JSON. Raises `RequestRefused` for what JSON has no word for.

    Numbers that are not finite go as such, for the cluster to refuse them and say where: msgspec would make them null.
    """
    try:
        rows = value if isinstance(value, list) else [value]
        if not any(
            type(v) is float and not math.isfinite(v) for row in rows if type(row) is dict for v in row.values()
        ):
            with contextlib.suppress(_NotFinite):
                return msgspec.json.encode(value, enc_hook=_plain_finite)
        return json.dumps(value, default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestRefused(f"body: cannot be written as JSON: {error}", code="bad_json") from error


def _plain(value: Any) -> Any:
    """Return a value that JSON has no word for as one that it has: of NumPy, times, and what behaves as a `dict`."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(f"a value of type `{type(value).__name__}`")


def _plain_finite(value: Any) -> Any:
    plain = _plain(value)
    if isinstance(plain, float) and not math.isfinite(plain):
        raise _NotFinite
    return plain


# -- answers

_decode_ack = msgspec.json.Decoder(Ack).decode
_decode_score = msgspec.json.Decoder(Score).decode
_decode_good_scores = msgspec.json.Decoder(list[Score]).decode
_decode_each = msgspec.json.Decoder(list[dict[str, Any]]).decode
_decode_view = msgspec.json.Decoder(ViewFeatures).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode
_decode_objects = msgspec.json.Decoder(list[dict[str, dict[str, Any]]]).decode


def _decode_scores(content: bytes) -> Sequence[Score | ClientError]:
    try:
        return _decode_good_scores(content)
    except msgspec.ValidationError:  # of some ids there is no score, perhaps
        return [_score_or_error(answer) for answer in _decode_each(content)]


def _decode_many(content: bytes) -> list[dict[str, Score | ClientError]]:
    return [{model: _score_or_error(a) for model, a in answers.items()} for answers in _decode_objects(content)]


def _score_or_error(answer: dict[str, Any]) -> Score | ClientError:
    return error_of_model(answer) if "error" in answer else msgspec.convert(answer, Score)


def _at_rows(answers: Iterable[Score | ClientError], body: _Body) -> Iterable[Score | ClientError]:
    """Have the errors among the answers to a part count the caller's rows."""
    for answer in answers:
        if isinstance(answer, ClientError):
            answer.at_row(body.first_row)
    return answers


def _decode_table(content: bytes) -> pa.Table:
    import pyarrow as pa

    return pa.ipc.open_stream(content).read_all()


def _joined(tables: list[pa.Table]) -> pa.Table:
    """Join the answers to the parts of a table; if the results of some are JSON, those of all are."""
    import pyarrow as pa

    if len({table.schema.field("result").type for table in tables}) > 1:
        tables = [_with_json_results(table) for table in tables]
    return pa.concat_tables(tables)


def _with_json_results(table: pa.Table) -> pa.Table:
    import pyarrow as pa

    results = table.column("result")
    if pa.types.is_string(results.type):
        return table
    pairs = zip(results.to_pylist(), table.column("error").is_valid().to_pylist(), strict=True)
    texts = pa.array([None if failed else msgspec.json.encode(one).decode() for one, failed in pairs], pa.string())
    at = table.schema.get_field_index("result")
    return table.set_column(at, "result", texts).replace_schema_metadata({**table.schema.metadata, b"result": b"json"})
