"""What a load sends and what came of it, and the process of its own in which it runs.

`Load` says what to send: in a closed loop (each connection sends its next request when the answer to the one before has
come), or in an open loop at a rate that does not depend on the answers. `run_load` sends it from another process, so
that it shares no interpreter lock with the caller; `RunningLoad` lets the caller do something meanwhile. The loops
themselves are `loops`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

import msgspec

__all__ = ["Arrivals", "Load", "LoadFailed", "Outcome", "RunningLoad", "quantile", "run_load"]

#: A process that starts and connections that are opened take no longer.
_STARTUP_S = 20.0
#: An open loop that sends one of a hundred requests later than this did not keep its rate.
LATE_MS_MAX = 1.0
_BEGUN = b"begun\n"

Arrivals = Literal["poisson", "fixed"]


class LoadFailed(Exception):
    """The load generator itself could not run; its output is the message."""


class Load(msgspec.Struct, frozen=True):
    """What to send, and for how long.

    bodies: sent one after the other, over and over, whichever connection is free.
    paths: one for each body, if they do not all go to `path`.
    once: each body is sent once, and the run ends when they are over, if not before.
    texts: how often each text stands in a good answer's body; an answer of another status than 200 is
        never good. own_texts: one for each body, which stands once in a good answer to it.
    rate: requests a second that are sent whatever comes back, `arrivals` apart: at random with that mean (a seeded
        Poisson process), or evenly. A request's latency counts from when it was to be sent. 0: a closed loop.
    connections: all of a closed loop; those that an open one begins with. It opens more, up to `connections_max`, when
        a request is due and none is free.
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
    paths: list[str] = []
    own_texts: list[bytes] = []
    rate: float = 0.0
    arrivals: Arrivals = "poisson"
    seed: int = 0
    connections_max: int = 512


class Outcome(msgspec.Struct, frozen=True):
    """What came back: `answers` good ones within `seconds`, each with its latency in `latencies_ns`.

    checked, failed: of all answers, those of the warm-up too.
    cpu_seconds: what the generator itself took of the machine, warm-up included.
    rate, lateness_ns: of an open loop: requests/s that were to be sent, and how much later each of them was sent.
    connections: opened in all. begun_s: when, of the monotonic clock.
    """

    answers: int
    seconds: float
    latencies_ns: list[int]
    checked: int
    failed: int
    first_failure: str | None
    cpu_seconds: float
    wall_seconds: float
    rate: float = 0.0
    lateness_ns: list[int] = []
    connections: int = 0
    begun_s: float = 0.0

    @property
    def requests_per_s(self) -> float:
        return self.answers / self.seconds

    def latency_ms(self, q: float) -> float:
        """Return the latency that a share `q` of the requests did not exceed; NaN if there was none."""
        return quantile(self.latencies_ns, q) / 1e6

    def late_ms(self, q: float) -> float:
        """Return how much later than it was to be sent a share `q` of the requests was sent at most."""
        return quantile(self.lateness_ns, q) / 1e6

    @property
    def kept_rate(self) -> bool:
        """Whether an open loop sent 99 of 100 requests within a millisecond of their time, and all of them."""
        return not self.lateness_ns or (self.late_ms(0.99) <= LATE_MS_MAX and self.failed == 0)


def quantile(values: Sequence[float], q: float) -> float:
    """Return the smallest of `values` that a share `q` of them does not exceed; NaN of none.

    >>> quantile([4, 1, 3, 2], 0.5), quantile([4, 1, 3, 2], 0.99)
    (2, 4)
    """
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


class RunningLoad:
    """A load that is being sent by another process. Raises `LoadFailed` if that does not work out."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._child = subprocess.Popen(
            [sys.executable, "-m", "millpond.bench.load"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self._child.stdin is not None
        assert self._child.stderr is not None
        with contextlib.suppress(BrokenPipeError):  # it says why on its standard error
            self._child.stdin.write(msgspec.msgpack.encode(load))
            self._child.stdin.close()
        self._child.stdin = None
        line = self._child.stderr.readline()
        if line != _BEGUN:
            rest = self._child.stderr.read()
            self._child.communicate()
            raise LoadFailed(f"load of {load.path}: {(line + rest).decode(errors='replace').strip()[-1000:]}")

    def stop(self) -> None:
        """Let it end before its time: nothing more is sent, and what is under way is waited for."""
        self._child.send_signal(signal.SIGTERM)

    def result(self) -> Outcome:
        """Wait for its end and return what came back."""
        load = self._load
        limit_s = load.warm_seconds + load.seconds + load.answer_seconds_max + _STARTUP_S
        try:
            out, err = self._child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.communicate()
            raise LoadFailed(f"load of {load.path}: did not end within {limit_s:g} s") from None
        if self._child.returncode != 0:
            raise LoadFailed(f"load of {load.path}: {err.decode(errors='replace').strip()[-1000:]}")
        return msgspec.msgpack.decode(out, type=Outcome)


def run_load(load: Load) -> Outcome:
    """Send the load from a process of its own; raise `LoadFailed` if that does not work out."""
    return RunningLoad(load).result()


def main() -> int:
    """Read a load from standard input, drive it, write the outcome to standard output.

    Says on standard error when it has begun; ends before its time on SIGTERM.
    """
    from millpond.bench.loops import Ending, drive

    ending = Ending()
    signal.signal(signal.SIGTERM, lambda number, frame: ending.ask())
    load = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Load)
    gc.disable()  # a collection would be a latency of ours; nothing here makes cycles

    def begun() -> None:
        sys.stderr.buffer.write(_BEGUN)
        sys.stderr.flush()

    try:
        outcome = drive(load, begun=begun, ending=ending)
    except LoadFailed as error:
        sys.stderr.write(f"{error}\n")
        return 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has ended: being asked to, now, must not lose the outcome
    sys.stdout.buffer.write(msgspec.msgpack.encode(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
