"""A keep-alive connection as the load generator uses it: plain bytes, one request under way, never waiting."""

from __future__ import annotations

import socket

__all__ = ["RawConnection", "content_length"]

_RECEIVE_BYTES = 256 * 1024


def content_length(head: bytes) -> int:
    """Return the length of the body that an answer's head announces; -1 if it does not.

    >>> content_length(b"HTTP/1.1 200 OK\\r\\nContent-Length: 12\\r\\n")
    12
    >>> content_length(b"HTTP/1.1 200 OK\\r\\n")
    -1
    """
    at = head.find(b"content-length:")
    if at < 0:
        at = head.lower().find(b"content-length:")
        if at < 0:
            return -1
    stop = head.find(b"\r\n", at)
    return int(head[at + 15 : stop if stop >= 0 else len(head)])


class RawConnection:
    """One connection, on which one request is under way, if it is `busy`.

    since_ns: from when that request's latency counts. own_text: what its answer has to hold.
    """

    __slots__ = ("busy", "own_text", "parts", "since_ns", "socket", "unsent", "wanted")

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.busy = False
        self.since_ns = 0
        self.own_text = b""
        self.unsent = memoryview(b"")
        self.parts = b""
        self.wanted = -1

    def send(self, request: bytes | memoryview) -> bool:
        """Send what the socket takes, and keep the rest; return whether that was all.

        Waiting for a large body to go out would leave the answers on other connections lying.
        """
        try:
            sent = self.socket.send(request)
        except BlockingIOError:
            sent = 0
        except ConnectionError:  # closed meanwhile: the next `receive` finds that
            sent = len(request)
        self.unsent = memoryview(request)[sent:]
        return not self.unsent

    def receive(self) -> bytes | None:
        """Take what has come; return the answer when it is whole, b"" if the other side closed."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except ConnectionError:  # closed with our request unread
            return b""
        if not data:
            return b""
        if self.parts:
            data = self.parts + data
        if self.wanted < 0:
            head_end = data.find(b"\r\n\r\n")
            if head_end >= 0:
                length = content_length(data[: head_end + 2])
                # Without a length the end of the answer cannot be seen; it is judged as it stands.
                self.wanted = head_end + 4 + length if length >= 0 else len(data)
        if 0 <= self.wanted <= len(data):
            self.parts, self.wanted = b"", -1
            return data
        self.parts = data
        return None
