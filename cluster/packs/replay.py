"""`millpond replay`: the events of a pack, sent to a cluster in their order, with the stamps at which they arrived.

A replay can be broken off and begun again: what the cluster has had by then are duplicates. Events without ids of their
own are known by which of their source they are, as long as the cluster remembers ids.

Order: that of the pack, of each source. Between sources it is kept to the width of a tick, at full speed to that of a
window; no answer depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.cluster.packs.pack import PLACE, Pack
from millpond.deployments import Ack, Client, ClientError
from millpond.feature_actors.decode import ARRIVAL_COLUMN
from millpond.feature_actors.errors import BadRequest, MillpondError

__all__ = ["Pace", "ReplayFailed", "replay", "speed_of"]

Ints = npt.NDArray[np.int64]

_REQUEST_EVENTS, _REQUEST_BYTES = 10_000, 8 << 20
#: Events that are due within so long go together.
_TICK_S = 0.05


class ReplayFailed(MillpondError):
    """A replay did not come to its end, or the cluster has not taken all events."""

    code, status = "replay_failed", 502


class Pace:
    """When events are due. speed: how much quicker than they arrived, None for at once."""

    def __init__(
        self,
        speed: float | None,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.speed, self._now_s, self._sleep = speed, now_s, sleep
        self._begun: tuple[float, int] | None = None

    def wait_for(self, arrival_ms: int) -> None:
        """Return when an event that arrived at a time is due; the first is at once."""
        if self.speed is None:
            return
        if self._begun is None:
            self._begun = self._now_s(), arrival_ms
        begun_s, first_ms = self._begun
        wait_s = begun_s + (arrival_ms - first_ms) / 1_000 / self.speed - self._now_s()
        if wait_s > 0:
            self._sleep(wait_s)


def speed_of(text: str) -> float | None:
    """Return a speed, `100x`, or `max`.

    >>> speed_of("2.5x"), speed_of("max")
    (2.5, None)
    """
    if text == "max":
        return None
    try:
        speed = float(text.removesuffix("x"))
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise BadRequest(f"--speed: got {text!r}; allowed is `max`, or how much quicker than it was, such as `100x`")
    return speed


@dataclass(frozen=True)
class _Request:
    """Events of one source that go together: due when the last of them is. place: in the pack, of the first; row: which
    one of its source that is."""

    source: str
    due_ms: int
    place: int
    row: int
    events: pa.Table


def replay(
    pack: Pack,
    client: Client,
    pace: Pace,
    arrival: Literal["given", "event"] = "given",
    progress: Callable[[int], None] = lambda events: None,
) -> Ack:
    """Send the events of a pack and return what became of them.

    arrival: as the pack says, or when they happened. progress: told how many events have been sent. Raises
    `ReplayFailed` if the cluster refuses or does not answer, or has in the end not had each event.
    """
    total, sent = Ack(), 0
    for request in _requests(pack, pace.speed):
        pace.wait_for(request.due_ms)
        events = request.events.drop_columns([PLACE])
        if arrival == "event":
            events = events.drop_columns([ARRIVAL_COLUMN])
        try:
            total += client.send(
                request.source, events, arrival=arrival, idempotency_key=pack.manifest.id, first_row=request.row
            )
        except ClientError as error:
            raise ReplayFailed(
                f"replay: of {pack.manifest.events} events {sent} have been sent, then: {error}; run it again to go "
                "on, what is there already counts as duplicates"
            ) from error
        sent += len(events)
        progress(sent)
    if total.accepted + total.duplicates + total.forgotten != pack.manifest.events:
        raise ReplayFailed(
            f"replay: the pack has {pack.manifest.events} events; the cluster has accepted {total.accepted}, "
            f"{total.duplicates} were there already, {total.conflicts} were refused, because it has had their ids with "
            "other content; replay into a cluster of its own"
        )
    return total


def _requests(pack: Pack, speed: float | None) -> Iterator[_Request]:
    """Yield the requests in the order of the time that they are due at, a window of the pack after the other."""
    tick_ms = max(1, int(speed * _TICK_S * 1_000)) if speed is not None else pack.manifest.ttl_ms_min
    newest, begun = 0, dict.fromkeys(pack.manifest.sources, 0)
    for window in pack.windows():
        requests: list[_Request] = []
        dues = _dues(window, newest)
        for source, events in window.items():
            due = dues[source]
            newest = max(newest, int(due[-1]))
            cuts = [] if tick_ms is None else (np.flatnonzero(np.diff(due // tick_ms)) + 1).tolist()
            for begin, end in zip([0, *cuts], [*cuts, len(due)], strict=True):
                piece = events.slice(begin, end - begin)
                requests += _pieces(source, int(due[end - 1]), begun[source] + begin, piece)
            begun[source] += len(events)
        requests.sort(key=lambda request: (request.due_ms, request.place))
        yield from requests


def _dues(window: dict[str, pa.Table], newest: int) -> dict[str, Ints]:
    """Return of each event the newest arrival stamp up to it, over all sources: time does not run back."""
    places = np.concatenate([events[PLACE].to_numpy() for events in window.values()])
    arrivals = np.concatenate([events[ARRIVAL_COLUMN].to_numpy() for events in window.values()])
    order = np.argsort(places)
    dues = np.empty_like(arrivals)
    dues[order] = np.maximum(np.maximum.accumulate(arrivals[order]), newest)
    ends = np.cumsum([len(events) for events in window.values()])[:-1]
    return dict(zip(window, np.split(dues, ends), strict=True))


def _pieces(source: str, due_ms: int, row: int, events: pa.Table) -> Iterator[_Request]:
    """Yield events in as many requests as they need."""
    n = len(events)
    if n > 1 and (n > _REQUEST_EVENTS or events.nbytes > _REQUEST_BYTES):
        yield from _pieces(source, due_ms, row, events.slice(0, n // 2))
        yield from _pieces(source, due_ms, row + n // 2, events.slice(n // 2))
    else:
        yield _Request(source, due_ms, events[PLACE][0].as_py(), row, events)
