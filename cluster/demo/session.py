"""An HTTP session that times its requests and counts those that fail.

The standard library's parser over a socket, because it adds the least to what is timed.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pyarrow as pa

__all__ = ["ARROW_STREAM", "Session", "arrow_stream", "percentile"]

ARROW_STREAM = "application/vnd.apache.arrow.stream"


def arrow_stream(table: pa.Table) -> bytes:
    """Return a table as one Arrow IPC stream."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


class Session:
    """One connection to a cluster; not for two threads at once."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._address = (address.hostname, address.port)
        self._socket: socket.socket | None = None
        self.requests = 0
        self.failed = 0
        #: The first answer or error that was a failure, for the message at the end.
        self.first_failure: str | None = None

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> Any:
        """Post and return the decoded answer, or None if the request failed."""
        self.requests += 1
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {self._address[0]}:{self._address[1]}\r\n"
            f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, timeout=60)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Head and body in one piece: http.client sends two, and the server would wake up twice.
            self._socket.sendall(head.encode() + body)
            answer = http.client.HTTPResponse(self._socket, method="POST")
            answer.begin()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return self._fail(f"{path}: {error!r}")
        if answer.will_close:
            self.close()
        if answer.status != 200:
            return self._fail(f"{path}: {answer.status} {content[:500].decode(errors='replace')}")
        return msgspec.json.decode(content)

    def post_events(self, source: str, events: list[dict[str, Any]]) -> Any:
        return self.post(f"/v1/events/{source}", json.dumps(events).encode())

    def timed_score(self, model: str, body: Any, query: str = "") -> tuple[Any, float]:
        """Return the answer of a score and the milliseconds that it took."""
        content = json.dumps(body).encode()
        start = time.perf_counter()
        answer = self.post(f"/v1/score/{model}{query}", content)
        return answer, (time.perf_counter() - start) * 1e3

    def _fail(self, what: str) -> None:
        self.failed += 1
        self.first_failure = self.first_failure or what

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def percentile(values: list[float], q: float) -> float:
    return round(float(np.percentile(values, q)), 3)
