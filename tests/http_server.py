"""Apps behind real sockets, in this process: an HTTP server in a thread, on a port of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from apps import World

Asgi = Callable[[Mapping[str, Any], Any, Any], Awaitable[None]]


@contextmanager
def listen(port: int = 0) -> Iterator[tuple[str, socket.socket]]:
    """Listen on a free port, or on this one; yield its URL and the socket."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", listening


@contextmanager
def serve(app: Asgi, port: int = 0, *, keep_alive_s: int = 5) -> Iterator[str]:
    """Serve an ASGI application; yield its URL."""
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        lifespan="off",
        log_level="critical",
        access_log=False,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=1,
    )
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

    server = Server(config)
    with listen(port) as (url, listening):
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert started.wait(10)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


@dataclass
class Behind:
    """Both apps of a world behind one port, and what goes wrong on the way there and back.

    faults: for each request in turn what becomes of it, then all go well: "ok"; "torn", it is done and half of the
    answer is sent before the connection is closed; a status, or one with a time for Retry-After, answered instead of
    doing it.
    seen: what was asked: method, path, headers and body.
    """

    world: World
    faults: list[Any] = field(default_factory=list)
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        query = scope["query_string"].decode()
        self.seen.append((scope["method"], scope["path"] + ("?" + query if query else ""), headers, body))
        fault = self.faults.pop(0) if self.faults else "ok"
        if fault not in ("ok", "torn"):
            status, after = fault if isinstance(fault, tuple) else (fault, None)
            content = b'{"error": {"code": "made_up", "message": "for the test", "path": null}}'
            extra = [(b"retry-after", str(after).encode())] if after is not None else []
            head = [(b"content-length", str(len(content)).encode()), *extra]
            await send({"type": "http.response.start", "status": status, "headers": head})
            await send({"type": "http.response.body", "body": content})
            return
        whole = [{"type": "http.request", "body": body}]

        async def receive_whole() -> Any:
            return whole.pop()

        async def send_half(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":  # and the server closes what was not completed
                message = message | {"body": message["body"][: len(message["body"]) // 2], "more_body": True}
            await send(message)

        app = self.world.events if scope["path"].startswith("/v1/events/") else self.world.score
        await app(scope, receive_whole, send_half if fault == "torn" else send)
