"""An HTTP session that times its requests and counts those that fail.

The standard library's client, because it adds the least to what is timed.
"""

from __future__ import annotations

import http.client
import io
import json
import time
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pyarrow as pa

__all__ = ["ARROW_STREAM", "Session", "arrow_stream"]

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
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        self.requests = 0
        self.failed = 0
        #: The first answer or error that was a failure, for the message at the end.
        self.first_failure: str | None = None

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> Any:
        """Post and return the decoded answer, or None if the request failed."""
        self.requests += 1
        try:
            self._connection.request("POST", path, body, {"content-type": content_type})
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return self._fail(f"{path}: {error!r}")
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
        self._connection.close()


def percentile(values: list[float], q: float) -> float:
    return round(float(np.percentile(values, q)), 3)
