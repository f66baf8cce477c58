"""A client as it should be: it sends a request again and again, with the same event ids, until it is answered well."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

__all__ = ["Answer", "Connection", "Refused", "send_until_answered"]

#: Longest wait between two tries, whatever Retry-After says.
_WAIT_S_MAX = 1.0
_WAIT_S = 0.05
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class Refused(Exception):
    """An answer that says that the request is wrong; the same request would be refused again."""


@dataclass(frozen=True)
class Answer:
    """What came of one try. status: of HTTP, 0 if there was no answer. why: "503", "closed", "timeout"."""

    status: int
    content: bytes = b""
    retry_after_s: float | None = None
    why: str = ""

    @property
    def good(self) -> bool:
        return self.status == 200

    @property
    def text(self) -> str:
        """What came, in short; nothing of a good answer."""
        return "" if self.good else f"{self.why} {self.content[:200].decode(errors='replace')}".strip()

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.content)


class Connection:
    """A keep-alive connection to wherever the cluster is just now. Not for two threads at once."""

    def __init__(self, url: Callable[[], str], timeout_s: float) -> None:
        self._url, self._timeout_s = url, timeout_s
        self._to = ""
        self._http: http.client.HTTPConnection | None = None

    def call(self, method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> Answer:
        """Try once."""
        if self._to != (url := self._url()):
            self.close()
            self._to = url
        if self._http is None:
            address = urlsplit(url)
            assert address.hostname is not None
            self._http = http.client.HTTPConnection(address.hostname, address.port, timeout=self._timeout_s)
        try:
            self._http.request(method, path, body, {"content-type": content_type})
            answer = self._http.getresponse()
            content = answer.read()
        except TimeoutError:
            self.close()
            return Answer(0, why="timeout")
        except ConnectionRefusedError:
            self.close()
            return Answer(0, why="refused")
        except (OSError, http.client.HTTPException):
            self.close()
            return Answer(0, why="closed")
        if answer.will_close:
            self.close()
        after = answer.getheader("retry-after", "")
        return Answer(answer.status, content, float(after) if after.isdigit() else None, str(answer.status))

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None


def send_until_answered(
    connection: Connection, path: str, body: bytes, content_type: str, causes: Counter[str], over: threading.Event
) -> Answer | None:
    """Post a body until it is answered 200, and return that answer; None if it is all `over` before.

    causes: why it was sent again, counted. Waits as Retry-After says, but no longer than a second.
    Raises `Refused`.
    """
    while not over.is_set():
        answer = connection.call("POST", path, body, content_type)
        if answer.good:
            return answer
        if answer.status and answer.status not in _AGAIN:
            raise Refused(f"{path}: {answer.status} {answer.content[:500].decode(errors='replace')}")
        causes[answer.why] += 1
        over.wait(_WAIT_S if answer.retry_after_s is None else min(answer.retry_after_s, _WAIT_S_MAX))
    return None
