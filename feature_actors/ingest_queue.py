"""Requests that wait together travel together: one call of each shard, one sync of its log.

What comes while nothing is under way leaves at once. What comes meanwhile gathers, and leaves together when the way is
free, or sooner once it is a large load that may as well be decoded beside. When the answers of a load have gone out,
its clients' next requests are on their way: the first of them wait a moment for others, else they would travel alone
and all others wait for them. So under load two halves take turns, and a single client never waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from millpond.feature_actors.client import Ack, EventsRequest, FeatureClient, Ingested
from millpond.feature_actors.decode import Decoder, Parsed
from millpond.feature_actors.errors import MillpondError, TooMany

__all__ = ["IngestQueue", "QueueLimits"]

#: Loads under way at once, of a source; a second one if it has so many rows.
_UNDER_WAY_MAX, _LARGE_ROWS = 2, 4_096
#: Rows of a load at most, unless one request has more.
_LOAD_ROWS_MAX = 20_000
#: How long requests wait for others, if some were answered together just now.
_GATHER_S = 0.002
#: What was applied everywhere is told to its homes after so long, if it did not travel with other events.
_SETTLE_AFTER_S = 0.25


@dataclass(frozen=True)
class QueueLimits:
    """What may wait or be under way in one replica; more is answered 429."""

    events_max: int = 2_000_000
    bytes_max: int = 256 << 20


@dataclass(slots=True)
class _Waiting:
    parsed: Parsed
    request: EventsRequest
    done: asyncio.Future[Ack]


@dataclass(slots=True)
class _Lane:
    """What waits of one source, and how much is under way."""

    waiting: list[_Waiting] = field(default_factory=list)
    waiting_rows: int = 0
    under_way: int = 0
    #: How many go together at least, for now, and until when.
    gather: int = 0
    gather_until_s: float = 0.0
    gathering: asyncio.TimerHandle | None = None


class IngestQueue:
    """Takes decoded requests to the client, each source in a lane of its own."""

    def __init__(self, client: FeatureClient, decoders: dict[str, Decoder], limits: QueueLimits) -> None:
        self._client = client
        #: By source; they may be replaced.
        self._decoders = decoders
        self._lanes = {name: _Lane() for name in decoders}
        self._limits = limits
        self._events = self._bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._settling = False

    async def ingest(self, source: str, parsed: Parsed, request: EventsRequest) -> Ack:
        """Bring a request's events to the shards; see `FeatureClient.ingest`. Raises `TooMany`."""
        events, size = self._events + parsed.rows, self._bytes + len(parsed.body)
        # One request is always taken when nothing else is there.
        if self._events and (events > self._limits.events_max or size > self._limits.bytes_max):
            raise TooMany(
                f"events of `{source}`: {self._events} events and {self._bytes} bytes are waiting; allowed are "
                f"{self._limits.events_max} and {self._limits.bytes_max}; send again later",
                code="queue_full",
                retry_after_ms=1_000,
            )
        self._events, self._bytes = events, size
        lane = self._lanes[source]
        waiting = _Waiting(parsed, request, asyncio.get_running_loop().create_future())
        lane.waiting.append(waiting)
        lane.waiting_rows += parsed.rows
        self._send(source, lane)
        return await waiting.done

    def _send(self, source: str, lane: _Lane) -> None:
        """Send what waits, if it may go."""
        if lane.under_way == 0 and 0 < len(lane.waiting) < lane.gather:
            loop = asyncio.get_running_loop()
            if loop.time() < lane.gather_until_s:
                lane.gathering = lane.gathering or loop.call_at(lane.gather_until_s, self._gathered, source, lane)
                return
        if lane.gathering is not None:
            lane.gathering.cancel()
            lane.gathering = None
        while lane.waiting and (
            lane.under_way == 0 or (lane.under_way < _UNDER_WAY_MAX and lane.waiting_rows >= _LARGE_ROWS)
        ):
            load = [lane.waiting.pop(0)]
            rows = load[0].parsed.rows
            while lane.waiting and rows + lane.waiting[0].parsed.rows <= _LOAD_ROWS_MAX:
                load.append(lane.waiting.pop(0))
                rows += load[-1].parsed.rows
            lane.waiting_rows -= rows
            lane.under_way += 1
            self._spawn(self._travel(source, lane, load))

    def _gathered(self, source: str, lane: _Lane) -> None:
        lane.gathering, lane.gather = None, 0
        self._send(source, lane)

    async def _travel(self, source: str, lane: _Lane, load: list[_Waiting]) -> None:
        ingested: Ingested | None = None
        try:
            ingested = await self._ingest(source, self._decoders[source], load)
            outcomes: Sequence[Ack | Exception] = ingested.outcomes
        except Exception as error:
            outcomes = [error] * len(load)
        lane.under_way -= 1
        lane.gather = (len(load) + len(lane.waiting)) // 2
        lane.gather_until_s = asyncio.get_running_loop().time() + _GATHER_S
        answers = list(zip(load, outcomes, strict=True))
        if ingested is not None and ingested.wait_before:
            # What they are duplicates of may have to wait for a shard that is away; nobody else has to.
            duplicates = [(w, o) for w, o in answers if isinstance(o, Ack) and o.duplicates]
            answers = [(w, o) for w, o in answers if not (isinstance(o, Ack) and o.duplicates)]
            self._spawn(self._answer_later(ingested, duplicates))
        for waiting, outcome in answers:
            self._answer(waiting, outcome)
        self._send(source, lane)
        if not self._settling:
            self._settling = True
            asyncio.get_running_loop().call_later(_SETTLE_AFTER_S, lambda: self._spawn(self._settle()))

    async def _answer_later(self, ingested: Ingested, duplicates: Sequence[tuple[_Waiting, Ack]]) -> None:
        failed: Exception | None = None
        try:
            await self._client.wait_for_originals(ingested)
        except Exception as error:
            failed = error
        for waiting, outcome in duplicates:
            self._answer(waiting, failed or outcome)

    def _answer(self, waiting: _Waiting, outcome: Ack | Exception) -> None:
        # Until now it has counted, also if its client has gone meanwhile.
        self._events -= waiting.parsed.rows
        self._bytes -= len(waiting.parsed.body)
        if waiting.done.done():
            return
        if isinstance(outcome, Exception):
            waiting.done.set_exception(outcome)
        else:
            waiting.done.set_result(outcome)

    async def _ingest(self, source: str, decoder: Decoder, load: list[_Waiting]) -> Ingested:
        batch, refused = decoder.join([w.parsed for w in load])
        good = [w.request for i, w in enumerate(load) if i not in refused]
        if not good:
            return Ingested(list(refused.values()), {})
        ingested = await self._client.ingest_all(source, batch, good)
        if not refused:
            return ingested
        others = iter(ingested.outcomes)
        return Ingested([refused[i] if i in refused else next(others) for i in range(len(load))], ingested.wait_before)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self) -> None:
        self._settling = False
        with suppress(MillpondError):  # the homes deliver again what they do not hear of
            await self._client.settle()
