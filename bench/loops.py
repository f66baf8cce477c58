"""The two loops of the load generator, closed and open, over keep-alive connections.

Both promise to take as little of the machine as Python can, so that what they measure is the other side: plain sockets
and epoll, requests built beforehand, no event loop and no HTTP library; about 12 us of processor time a request (20 in
the open loop). Bounded in time and in answers. They judge every answer while they run.

The open loop does not wait for answers: when a request was due and could not be sent (no connection was free, or the
machine was busy), its latency still counts from when it was due, and by how much it was late is reported. Otherwise the
slower the other side were, the fewer requests would be there to see it ("coordinated omission"). Source: Gil Tene, "How
NOT to Measure Latency".
"""

from __future__ import annotations

import contextlib
import itertools
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from millpond.bench.connection import RawConnection
from millpond.bench.load import Load, LoadFailed, Outcome

__all__ = ["Ending", "drive", "due_times_ns", "requests_of"]

_BOTH = select.EPOLLIN | select.EPOLLOUT
#: A request, and what its answer has to hold.
Request = tuple[bytes, bytes]


class Ending:
    """Lets a loop end before its time."""

    asked = False

    def ask(self) -> None:
        self.asked = True


def drive(load: Load, *, begun: Callable[[], None] = lambda: None, ending: Ending | None = None) -> Outcome:
    """Send the load from this process and thread, and return what came back.

    begun: called when the connections are open, just before the first request.
    """
    run = _Run(load, begun, ending or Ending())
    try:
        run.open(load.connections)
        return run.open_loop() if load.rate else run.closed_loop()
    except OSError as error:
        raise LoadFailed(f"load of {load.path}: {error!r}") from error
    finally:
        run.close()


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
    return [request for request, _ in _requests(load)]


def _requests(load: Load) -> Iterator[Request]:
    paths = load.paths or itertools.repeat(load.path)
    own_texts = load.own_texts or itertools.repeat(b"")
    rest = f"HTTP/1.1\r\nhost: {load.host}:{load.port}\r\ncontent-type: {load.content_type}\r\n"
    for body, path, own_text in zip(load.bodies, paths, own_texts, strict=False):
        yield f"POST {path} {rest}content-length: {len(body)}\r\n\r\n".encode() + body, own_text


def due_times_ns(load: Load) -> npt.NDArray[np.int64]:
    """Return when each request of an open loop is due, in ns after its begin, int64 [requests], warm-up included."""
    length_s = load.warm_seconds + load.seconds
    if load.arrivals == "fixed":
        times_s = np.arange(int(length_s * load.rate)) / load.rate
    else:
        # That many gaps of that mean are longer than the whole, but for one run of very many.
        n = int(length_s * load.rate + 10 * (length_s * load.rate) ** 0.5 + 100)
        times_s = np.random.default_rng(load.seed).exponential(1 / load.rate, n).cumsum()
        times_s = times_s[times_s < length_s]
    if load.once:
        times_s = times_s[: len(load.bodies)]
    return (times_s * 1e9).astype(np.int64)


class _Run:
    """One run of either loop."""

    def __init__(self, load: Load, begun: Callable[[], None], ending: Ending) -> None:
        self._load, self._begun, self._ending = load, begun, ending
        self._texts = list(load.texts)
        # Joined when it is sent, if each is sent once: the bodies of a bulk load do not fit in memory twice.
        self._requests = _requests(load) if load.once else itertools.cycle(list(_requests(load)))
        self._poll = select.epoll()
        self._connections: dict[int, RawConnection] = {}
        self._latencies: list[int] = []
        self._lateness: list[int] = []
        self._checked = self._failed = self._opened = 0
        self._first_failure: str | None = None
        self._cpu_s, self._wall_s, self._monotonic_s = time.process_time(), time.perf_counter(), time.monotonic()

    def open(self, n: int) -> list[RawConnection]:
        opened = []
        for _ in range(n):
            connection = RawConnection(self._load.host, self._load.port)
            self._connections[connection.socket.fileno()] = connection
            self._poll.register(connection.socket, select.EPOLLIN)
            opened.append(connection)
        self._opened += n
        return opened

    def close(self) -> None:
        self._poll.close()
        for connection in self._connections.values():
            connection.socket.close()

    def _drop(self, connection: RawConnection) -> None:
        del self._connections[connection.socket.fileno()]
        self._poll.unregister(connection.socket)
        connection.socket.close()

    def _send(self, connection: RawConnection, request: Request, since_ns: int) -> None:
        connection.busy, connection.since_ns, connection.own_text = True, since_ns, request[1]
        if not connection.send(request[0]):
            self._poll.modify(connection.socket, _BOTH)

    def _answers(self, ready: list[tuple[int, int]]) -> Iterator[tuple[RawConnection, bytes]]:
        """Yield the connections on which an answer is whole (b"" on one that was closed); send what is unsent."""
        for number, event in ready:
            connection = self._connections[number]
            if event & select.EPOLLOUT and connection.send(connection.unsent):
                self._poll.modify(number, select.EPOLLIN)
            if event != select.EPOLLOUT and (answer := connection.receive()) is not None:
                yield connection, answer

    def _judge(self, connection: RawConnection, answer: bytes) -> bool:
        """Count an answer; return whether it is good."""
        self._checked += 1
        why = _wrong(answer, self._texts, connection.own_text)
        if why is not None:
            self._fail(why)
        return why is None

    def _fail(self, why: str, times: int = 1) -> None:
        self._failed += times
        self._first_failure = self._first_failure or why

    @property
    def _over(self) -> bool:
        load = self._load
        return self._ending.asked or self._checked >= load.answers_max or self._failed >= load.failures_max

    # -- the closed loop

    def closed_loop(self) -> Outcome:
        """1. Send one request on each connection.
        2. Whenever an answer is whole: judge it, note its latency, send the next request.
        3. At the end of the time, or of the bodies, send nothing more, and wait for what is under way.
        """
        load, clock, requests, latencies = self._load, time.perf_counter_ns, self._requests, self._latencies
        self._begun()
        begin_ns = clock() + int(load.warm_seconds * 1e9)
        end_ns = begin_ns + int(load.seconds * 1e9)
        for connection in list(self._connections.values()):
            if (request := next(requests, None)) is None:
                self._drop(connection)
            else:
                self._send(connection, request, clock())
        while self._connections:
            ready = self._poll.poll(load.answer_seconds_max)
            if not ready:
                self._fail(f"no answer within {load.answer_seconds_max:g} s")
                break
            for connection, answer in self._answers(ready):
                now_ns = clock()
                if self._judge(connection, answer) and begin_ns <= now_ns < end_ns:
                    latencies.append(now_ns - connection.since_ns)
                over = answer == b"" or now_ns >= end_ns or self._over
                over = over or bool(connection.unsent)  # answered before it was read to its end
                if over or (request := next(requests, None)) is None:
                    self._drop(connection)
                else:
                    self._send(connection, request, clock())
        return self._outcome((min(clock(), end_ns) - begin_ns) / 1e9)

    # -- the open loop

    def open_loop(self) -> Outcome:
        """1. Send every request that is due, each on a free connection; open one if none is free.
        2. Sleep until the next is due or something has come; judge what has come, note its latency since it was due.
        3. When all are sent, wait for what is under way.
        """
        load, clock, connections = self._load, time.perf_counter_ns, self._connections
        due = due_times_ns(load).tolist()
        warm_ns = int(load.warm_seconds * 1e9)
        free = list(connections.values())
        with contextlib.suppress(OSError):  # sleep to the microsecond; by default Linux adds up to 50
            Path("/proc/self/timerslack_ns").write_text("1000")
        self._begun()
        begin_ns = clock()
        at, ended_ns, count = 0, 0, len(due)
        while True:
            # 1.
            now_ns = clock()
            if self._over:
                count = at
            while at < count and begin_ns + due[at] <= now_ns:
                if not free:
                    if len(connections) >= load.connections_max:
                        break
                    free += self.open(1)
                self._send(free.pop(), next(self._requests), begin_ns + due[at])
                now_ns = clock()
                if due[at] >= warm_ns:
                    self._lateness.append(now_ns - begin_ns - due[at])
                at += 1
            if at >= count and len(free) == len(connections):
                break
            # 2.
            can_send = at < count and (free or len(connections) < load.connections_max)
            wait_s = max(0.0, (begin_ns + due[at] - now_ns) / 1e9) if can_send else load.answer_seconds_max
            # `select` sleeps to the microsecond, `epoll` to the millisecond.
            if not select.select([self._poll], [], [], wait_s)[0]:
                if not can_send:
                    self._fail(f"no answer within {load.answer_seconds_max:g} s", len(connections) - len(free))
                    break
                continue
            for connection, answer in self._answers(self._poll.poll(0)):
                now_ns = clock()
                if not connection.busy:  # closed by the other side, as it may when nothing is under way
                    free.remove(connection)
                    self._drop(connection)
                    continue
                connection.busy = False
                if self._judge(connection, answer) and connection.since_ns - begin_ns >= warm_ns:
                    self._latencies.append(now_ns - connection.since_ns)
                    ended_ns = now_ns
                if answer == b"" or connection.unsent:
                    self._drop(connection)
                else:
                    free.append(connection)
        # More answers than the time had room for came later: that is not the rate that was asked for.
        planned_s = load.seconds if at == len(due) and not load.once else 0.0
        return self._outcome(max(planned_s, (ended_ns - begin_ns - warm_ns) / 1e9))

    def _outcome(self, seconds: float) -> Outcome:
        return Outcome(
            answers=len(self._latencies),
            seconds=max(1e-9, seconds),
            latencies_ns=self._latencies,
            checked=self._checked,
            failed=self._failed,
            first_failure=self._first_failure,
            cpu_seconds=time.process_time() - self._cpu_s,
            wall_seconds=time.perf_counter() - self._wall_s,
            rate=self._load.rate,
            lateness_ns=self._lateness,
            connections=self._opened,
            begun_s=self._monotonic_s,
        )


def _wrong(answer: bytes, texts: list[tuple[bytes, int]], own_text: bytes) -> str | None:
    """Return what is wrong with an answer, or None."""
    if not answer.startswith(b"HTTP/1.1 200 "):
        if answer == b"":
            return "the connection was closed"
        return f"status {answer[9:12].decode(errors='replace')}: {_excerpt(answer)}"
    for text, times in texts:
        if (found := answer.count(text)) != times:
            return f"{text.decode()!r} stands {found} times, expected {times}: {_excerpt(answer)}"
    if own_text and answer.count(own_text) != 1:
        return f"{own_text.decode()!r} does not stand in the answer once: {_excerpt(answer)}"
    return None


def _excerpt(answer: bytes) -> str:
    return answer.partition(b"\r\n\r\n")[2][:400].decode(errors="replace")
