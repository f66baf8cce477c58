"""The load generator: closed loop over keep-alive connections, in a process of its own.

Promises to take as little of the machine as Python can, so that what it measures is the other side:
plain sockets and epoll, requests built beforehand, no event loop and no HTTP library; about 12 us of
processor time a request. Bounded in time and in answers. It judges every answer while it runs.

`drive` is the loop; `run_load` runs it in a process of its own, so that it shares no interpreter lock
with the caller.
"""

from __future__ import annotations

import gc
import itertools
import math
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import msgspec

__all__ = ["Load", "LoadFailed", "Outcome", "content_length", "drive", "quantile", "requests_of", "run_load"]

_RECEIVE_BYTES = 256 * 1024
_BOTH = select.EPOLLIN | select.EPOLLOUT
#: A process that starts and connections that are opened take no longer.
_STARTUP_S = 20.0


class LoadFailed(Exception):
    """The load generator itself could not run; its output is the message."""


class Load(msgspec.Struct, frozen=True):
    """What to send, and for how long.

    bodies: sent one after the other, over and over, whichever connection is free.
    once: each body is sent once, and the run ends when they are over, if not before.
    texts: how often each text stands in a good answer's body; an answer of another status than 200 is
        never good.
    warm_seconds: under load before anything is counted.
    answer_seconds_max: how long one answer may take before the run is given up.
    answers_max, failures_max: the run ends there.
    """

    host: str
    port: int
    path: str
    bodies: list[bytes]
    connections: int
    seconds: float
    texts: list[tuple[bytes, int]]
    warm_seconds: float = 0.5
    answer_seconds_max: float = 30.0
    answers_max: int = 5_000_000
    failures_max: int = 100
    content_type: str = "application/json"
    once: bool = False


class Outcome(msgspec.Struct, frozen=True):
    """What came back: `answers` good ones within `seconds`, each with its latency in `latencies_ns`.

    checked, failed: of all answers, those of the warm-up too.
    cpu_seconds: what the generator itself took of the machine, warm-up included.
    """

    answers: int
    seconds: float
    latencies_ns: list[int]
    checked: int
    failed: int
    first_failure: str | None
    cpu_seconds: float
    wall_seconds: float

    @property
    def requests_per_s(self) -> float:
        return self.answers / self.seconds

    def latency_ms(self, q: float) -> float:
        """Return the latency that a share `q` of the requests did not exceed; NaN if there was none."""
        return quantile(self.latencies_ns, q) / 1e6


def quantile(values: Sequence[float], q: float) -> float:
    """Return the smallest of `values` that a share `q` of them does not exceed; NaN of none.

    >>> quantile([4, 1, 3, 2], 0.5), quantile([4, 1, 3, 2], 0.99)
    (2, 4)
    """
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def requests_of(load: Load) -> list[bytes]:
    """Return the requests byte for byte.

    >>> load = Load("127.0.0.1", 80, "/x", [b"{}"], connections=1, seconds=1, texts=[])
    >>> print(requests_of(load)[0].decode().replace("\\r", ""))
    POST /x HTTP/1.1
    host: 127.0.0.1:80
    content-type: application/json
    content-length: 2
    <BLANKLINE>
    {}
    """
    return [head + body for head, body in zip(_heads(load), load.bodies, strict=True)]


def _heads(load: Load) -> Iterator[bytes]:
    head = f"POST {load.path} HTTP/1.1\r\nhost: {load.host}:{load.port}\r\ncontent-type: {load.content_type}\r\n"
    for body in load.bodies:
        yield f"{head}content-length: {len(body)}\r\n\r\n".encode()


def _source_of(load: Load) -> Iterator[bytes]:
    """Yield the requests to send: without end, or each once."""
    if load.once:  # joined when it is sent: the bodies of a bulk load do not fit in memory twice
        return (head + body for head, body in zip(_heads(load), load.bodies, strict=True))
    return itertools.cycle(requests_of(load))


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


class _Connection:
    """One connection, on which one request is under way."""

    __slots__ = ("parts", "sent_ns", "socket", "unsent", "wanted")

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.sent_ns = 0
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


def drive(load: Load) -> Outcome:
    """Send the load from this process and thread, and return what came back.

    1. Open the connections; send one request on each.
    2. Whenever an answer is whole: judge it, note its latency, send the next request.
    3. At the end of the time, or of the bodies, send nothing more, and wait for what is under way.
    """
    texts, requests = list(load.texts), _source_of(load)
    clock = time.perf_counter_ns
    latencies: list[int] = []
    checked = failed = 0
    first_failure: str | None = None
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    poll = select.epoll()
    connections: dict[int, _Connection] = {}
    try:
        for _ in range(load.connections):
            opened = _Connection(load.host, load.port)
            connections[opened.socket.fileno()] = opened
            poll.register(opened.socket, select.EPOLLIN)
        begin_ns = clock() + int(load.warm_seconds * 1e9)
        end_ns = begin_ns + int(load.seconds * 1e9)
        for number, connection in list(connections.items()):
            if (request := next(requests, None)) is None:
                connections.pop(number).socket.close()
                continue
            connection.sent_ns = clock()
            if not connection.send(request):
                poll.modify(number, _BOTH)
        while connections:
            ready = poll.poll(load.answer_seconds_max)
            if not ready:
                failed += 1
                first_failure = first_failure or f"no answer within {load.answer_seconds_max:g} s"
                break
            for number, event in ready:
                connection = connections[number]
                if event & select.EPOLLOUT and connection.send(connection.unsent):
                    poll.modify(number, select.EPOLLIN)
                if event == select.EPOLLOUT:
                    continue
                answer = connection.receive()
                if answer is None:
                    continue
                now_ns = clock()
                checked += 1
                why = _wrong(answer, texts)
                if why is not None:
                    failed += 1
                    first_failure = first_failure or why
                elif begin_ns <= now_ns < end_ns:
                    latencies.append(now_ns - connection.sent_ns)
                over = answer == b"" or now_ns >= end_ns or checked >= load.answers_max or failed >= load.failures_max
                over = over or bool(connection.unsent)  # answered before it was read to its end
                if over or (request := next(requests, None)) is None:
                    del connections[number]
                    poll.unregister(number)
                    connection.socket.close()
                    continue
                connection.sent_ns = clock()
                if not connection.send(request):
                    poll.modify(number, _BOTH)
        ended_ns = min(clock(), end_ns)
    except OSError as error:
        raise LoadFailed(f"load of {load.path}: {error!r}") from error
    finally:
        poll.close()
        for connection in connections.values():
            connection.socket.close()
    return Outcome(
        answers=len(latencies),
        seconds=max(1e-9, (ended_ns - begin_ns) / 1e9),
        latencies_ns=latencies,
        checked=checked,
        failed=failed,
        first_failure=first_failure,
        cpu_seconds=time.process_time() - cpu_s,
        wall_seconds=time.perf_counter() - wall_s,
    )


def _wrong(answer: bytes, texts: list[tuple[bytes, int]]) -> str | None:
    """Return what is wrong with an answer, or None."""
    if not answer.startswith(b"HTTP/1.1 200 "):
        if answer == b"":
            return "the connection was closed"
        return f"status {answer[9:12].decode(errors='replace')}: {_excerpt(answer)}"
    for text, times in texts:
        if (found := answer.count(text)) != times:
            return f"{text.decode()!r} stands {found} times, expected {times}: {_excerpt(answer)}"
    return None


def _excerpt(answer: bytes) -> str:
    return answer.partition(b"\r\n\r\n")[2][:400].decode(errors="replace")


def run_load(load: Load) -> Outcome:
    """Send the load from a process of its own; raise `LoadFailed` if that does not work out."""
    limit_s = load.warm_seconds + load.seconds + load.answer_seconds_max + _STARTUP_S
    try:
        done = subprocess.run(
            [sys.executable, "-m", "millpond.bench.load"],
            input=msgspec.msgpack.encode(load),
            capture_output=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"load of {load.path}: did not end within {limit_s:g} s") from None
    if done.returncode != 0:
        raise LoadFailed(f"load of {load.path}: {done.stderr.decode(errors='replace').strip()[-1000:]}")
    return msgspec.msgpack.decode(done.stdout, type=Outcome)


def main() -> int:
    """Read a load from standard input, drive it, write the outcome to standard output."""
    load = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Load)
    gc.disable()  # a collection would be a latency of ours; nothing here makes cycles
    try:
        outcome = drive(load)
    except LoadFailed as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.buffer.write(msgspec.msgpack.encode(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
