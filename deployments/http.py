"""HTTP for the hot path: a plain ASGI application with a table of routes.

Errors become responses in one place, `App.__call__`. No framework: routing and decoding by FastAPI
and pydantic would cost more than reading the features and running the model.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from millpond.feature_actors.errors import BadRequest, MillpondError, NotFound, TooLarge, Unauthorized, did_you_mean

__all__ = ["App", "Request", "Response", "Route", "decode_json", "json_response"]

logger = logging.getLogger("millpond.http")

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_encode_json = msgspec.json.Encoder().encode


class MethodNotAllowed(MillpondError):
    code, status = "method_not_allowed", 405

    def __init__(self, method: str, path: str, allowed: str) -> None:
        super().__init__(f"{method} {path[:200]}: allowed is {allowed}")
        self.allowed = allowed


class BodyTimeout(MillpondError):
    code, status = "body_timeout", 408


class ClientGone(Exception):
    """The client closed the connection before its body was read: nobody is left to answer."""


@dataclass(frozen=True)
class Response:
    """An answer. then: what is done when it has been sent, or could not be, which the client does not wait for; it must
    not raise."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    then: Callable[[], None] | None = None


def json_response(value: Any, status: int = 200) -> Response:
    """Encode a value as JSON; a float that is not finite becomes null."""
    return Response(status, _encode_json(value))


def decode_json(body: bytes) -> Any:
    """Decode JSON of any shape; raise `BadRequest` if it is none, or is nested too deep."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"body: not JSON: {error}", code="bad_json", path="$") from None
    except RecursionError:
        raise BadRequest("body: JSON is nested too deep", code="bad_json", path="$") from None


@dataclass
class Request:
    """One request; `name` is what stands behind the route's prefix."""

    method: str
    path: str
    scope: Scope
    receive: Receive
    body_timeout_s: float
    name: str = ""
    _query: dict[str, str] | None = field(default=None, repr=False)

    @property
    def query(self) -> dict[str, str]:
        """The query parameters; `BadRequest` if one is repeated: neither value could be taken for the one meant."""
        if self._query is None:
            query: dict[str, str] = {}
            try:
                text = self.scope.get("query_string", b"").decode()
                pairs = parse_qsl(text, keep_blank_values=True, errors="strict")
            except (UnicodeDecodeError, ValueError):
                raise BadRequest("query: not UTF-8, or too many parameters", path="?") from None
            for name, value in pairs:
                if name in query:
                    raise BadRequest(f"query: `{name[:80]}` comes twice; allowed is once", path=f"?{name[:80]}")
                query[name] = value
            self._query = query
        return self._query

    def allow_query(self, *names: str) -> None:
        """Refuse a misspelt query parameter: `?asof=` would be answered as of now."""
        for name in self.query:
            if name not in names:
                raise BadRequest(
                    f"query: no parameter `{name[:80]}`" + did_you_mean(name[:80], names),
                    path=f"?{name[:80]}",
                )

    def flag(self, name: str) -> bool:
        """Return a yes/no query parameter; absent is no."""
        value = self.query.get(name, "false")
        if value not in ("true", "false"):
            raise BadRequest(f"query: `{name}` is true or false, got {value!r}", path=f"?{name}")
        return value == "true"

    def header(self, name: bytes) -> str | None:
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value).decode("latin-1")
        return None

    def check_admin(self, token_sha256: str | None, what: str) -> None:
        """Raise `Unauthorized` unless the request carries the admin token of this digest. what: it is needed for."""
        scheme, _, given = (self.header(b"authorization") or "").partition(" ")
        digest = hashlib.sha256(given.encode()).hexdigest()
        is_it = bool(given) and token_sha256 is not None and hmac.compare_digest(digest, token_sha256)
        if not is_it or scheme != "Bearer":
            raise Unauthorized(
                f"{what} needs the admin token of the cluster: `Authorization: Bearer ...`; it is in the file "
                "`admin_token` of the cluster's data directory"
            )

    async def body(self, bytes_max: int) -> bytes:
        """Read the body; stop and raise `TooLarge` as soon as it is over `bytes_max`.

        Raises `BodyTimeout` if it takes too long: a replica works on so many requests and no more, and
        bodies that never end would take all the places.
        """
        try:
            async with asyncio.timeout(self.body_timeout_s):
                return await self._read_body(bytes_max)
        except TimeoutError:
            raise BodyTimeout(f"body: did not arrive whole within {self.body_timeout_s:g} s") from None

    async def _read_body(self, bytes_max: int) -> bytes:
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > bytes_max:
            raise self._too_large(bytes_max)
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > bytes_max:
                raise self._too_large(bytes_max)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self, bytes_max: int) -> TooLarge:
        return TooLarge(f"body: larger than {bytes_max} bytes; send it in several requests")


@dataclass(frozen=True)
class Route:
    """One call. A path that ends in `/` takes a name behind it."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]


class App:
    """An ASGI application over a table of routes."""

    #: How long a request's body may take to arrive.
    body_timeout_s = 30.0

    def __init__(self, routes: list[Route]) -> None:
        self._exact = {(r.method, r.path): r.handler for r in routes if not r.path.endswith("/")}
        self._named = [(r.method, r.path, r.handler) for r in routes if r.path.endswith("/")]
        self._paths = [f"{r.method} {r.path}{'{name}' if r.path.endswith('/') else ''}" for r in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _live(receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1003})
        root, path = scope.get("root_path", ""), scope["path"]
        # Serve mounts an app below its route prefix; some servers leave the prefix in the path.
        path = path if path.startswith(root) else root + path
        request = Request(scope["method"], path, scope, receive, self.body_timeout_s)
        try:
            response = await self._handler(request)(request)
        except ClientGone:
            return None
        except MillpondError as error:
            if error.status >= 500:
                logger.warning("%s %r: %s", request.method, request.path, error)
            response = _error_response(error)
        except Exception:
            logger.exception("%s %r failed", request.method, request.path)
            response = _error_response(
                MillpondError("an error of ours; it is in the log of the deployment", code="internal")
            )
        headers = [
            (b"content-type", response.content_type.encode()),
            (b"content-length", str(len(response.body)).encode()),
            *((k.encode(), v.encode()) for k, v in response.headers),
        ]
        try:
            await send({"type": "http.response.start", "status": response.status, "headers": headers})
            await send({"type": "http.response.body", "body": response.body})
        finally:
            if response.then is not None:
                response.then()
        return None

    def _handler(self, request: Request) -> Callable[[Request], Awaitable[Response]]:
        method, path = request.method, request.path
        for route_method, prefix, handler in self._named:
            if path.startswith(prefix) and len(path) > len(prefix):
                if route_method != method:
                    raise MethodNotAllowed(method, path, route_method)
                request.name = path[len(prefix) :]
                return handler
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact
        allowed = [m for m, p in self._exact if p == path]
        if allowed:
            raise MethodNotAllowed(method, path, ", ".join(allowed))
        raise NotFound(f"no call {method} {path[:200]}; there are {', '.join(self._paths)}")


async def _live(receive: Receive, send: Send) -> None:
    """Answer the server's start and stop; there is nothing to do at either."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def _error_response(error: MillpondError) -> Response:
    headers: tuple[tuple[str, str], ...] = ()
    if error.retry_after_ms is not None:
        headers = (("retry-after", str(max(1, -(-error.retry_after_ms // 1000)))),)
    if isinstance(error, MethodNotAllowed):
        headers = (*headers, ("allow", error.allowed))
    return Response(error.status, _encode_json(error.as_json()), headers=headers)
