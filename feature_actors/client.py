"""The client: takes events to the shards and features back. One function per journey.

It speaks to ports, so the same client serves N plain shards in a test and N actors on a cluster.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.clock import Clock
from millpond.feature_actors.dedupe import CONFLICT, DUPLICATE, NEW
from millpond.feature_actors.errors import BadRequest, MillpondError, Problem
from millpond.feature_actors.events import ELSEWHERE, Events, Receipt
from millpond.feature_actors.keys import Hashes, hash_columns
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.log.record import HomeRecord
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.ports import IngestPort, ReadPort, all_of
from millpond.feature_actors.routes import shards_of_keys
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import mask_of

__all__ = ["Ack", "EventsRequest", "FeatureClient", "TimeLimits"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_NO_ROWS = np.empty(0, np.int64)

_PROBLEMS_MAX = 10


@dataclass(frozen=True)
class TimeLimits:
    """late_after_ms: an event further behind its arrival stamp is counted late.
    ahead_ms_max: an event further ahead of its arrival stamp is refused."""

    late_after_ms: int = 3_600_000
    ahead_ms_max: int = 600_000


@dataclass(frozen=True)
class EventsRequest:
    """How many events came together, and how.

    arrival_is_event_time: a bulk load or replay. idempotency_key: says that two requests are the same, where the events
    have no id.
    """

    rows: int
    arrival_is_event_time: bool = False
    idempotency_key: str | None = None


@dataclass(frozen=True)
class Ack:
    """What became of the events of a request. Late, too late and unkeyed are of the accepted ones."""

    accepted: int = 0
    duplicates: int = 0
    conflicts: int = 0
    late: int = 0
    too_late: int = 0
    unkeyed: int = 0


class FeatureClient:
    """Events in, features out, over the shards of one cluster."""

    def __init__(
        self,
        layout: Layout,
        shard_map: ShardMap,
        ingest: IngestPort,
        read: ReadPort,
        clock: Clock,
        limits: TimeLimits = TimeLimits(),
    ) -> None:
        self.layout = layout
        self._map = shard_map
        self._ingest = ingest
        self._read = read
        self._clock = clock
        self._limits = limits
        #: Records of the shards that have been applied everywhere, which the shards have not been told yet.
        self._settled: dict[int, list[int]] = {}

    async def ingest(
        self,
        source_name: str,
        batch: pa.RecordBatch,
        *,
        arrival_is_event_time: bool = False,
        idempotency_key: str | None = None,
    ) -> Ack:
        """Bring validated events of a source to every shard that keeps something of them; see `ingest_all`."""
        request = EventsRequest(batch.num_rows, arrival_is_event_time, idempotency_key)
        (outcome,) = await self.ingest_all(source_name, batch, [request])
        if isinstance(outcome, MillpondError):
            raise outcome
        return outcome

    async def ingest_all(
        self, source_name: str, batch: pa.RecordBatch, requests: Sequence[EventsRequest]
    ) -> list[Ack | BadRequest]:
        """Bring the events of several requests, one after the other in the batch, to the shards together.

        Returns when each shard has applied its part. A request that failed can be sent again: what was applied by then
        is not applied again (events with ids, or an idempotency key), nor is it if the request is not sent again.

        Returns per request what became of it: `BadRequest` if an event is ahead of its arrival, or a condition fails.
        Raises `Unavailable` if a shard is; then of all that one cannot say.
        """
        source = self.layout.source(source_name)
        # 1. Stamp the arrival, once for all shards; judge time and conditions before anything is logged.
        received_ms = self._received_ms()
        if refused := self._refused(source, batch, requests, received_ms):
            return await self._ingest_others(source_name, batch, requests, refused)
        if batch.num_rows == 0:
            return [Ack()] * len(requests)
        arrivals = self._stamps(source, batch, requests, received_ms)
        # 2. Every shard that is the home of an id or has a key logs its part; the homes say what is new.
        events = self._events(source, batch, requests, arrivals, received_ms)
        concerned, unkeyed = self._concerned(source, events)
        verdicts, receipts, parts, offer = await self._offer(events, concerned)
        # 3. The shards of the keys apply what is new.
        accepted = verdicts == NEW
        await self._take(offer, accepted, receipts, parts)
        # 4. What a duplicate is a duplicate of has to be seen, too.
        await self._wait_for_originals(receipts)
        # 5. Count what was accepted, request by request.
        times = source.times_ms(batch)
        too_late = accepted & self.layout.too_late(source.name, times, arrivals)
        late = accepted & (times < arrivals - self._limits.late_after_ms) & ~too_late
        masks = [accepted, verdicts == DUPLICATE, verdicts == CONFLICT, late, too_late, accepted & unkeyed]
        if len(requests) == 1:
            return [Ack(*(int(np.count_nonzero(mask)) for mask in masks))]
        sums = np.zeros((len(masks), batch.num_rows + 1), np.int64)
        np.cumsum(masks, axis=1, out=sums[:, 1:])
        return [Ack(*counts) for counts in np.diff(sums[:, _ends(requests)], axis=1).T.tolist()]

    async def _ingest_others(
        self,
        source_name: str,
        batch: pa.RecordBatch,
        requests: Sequence[EventsRequest],
        refused: dict[int, BadRequest],
    ) -> list[Ack | BadRequest]:
        """Go on with those requests that are not refused."""
        ends = _ends(requests)
        good = [i for i in range(len(requests)) if i not in refused]
        outcomes: dict[int, Ack | BadRequest] = dict(refused)
        if good:
            rows = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in good])
            others = await self.ingest_all(source_name, batch.take(pa.array(rows)), [requests[i] for i in good])
            outcomes |= dict(zip(good, others, strict=True))
        return [outcomes[i] for i in range(len(requests))]

    async def settle(self) -> None:
        """Tell the homes of what was applied everywhere, if that did not travel with other events already."""
        unsaid, self._settled = self._settled, {}
        await all_of({shard: self._ingest.settle(shard, offsets, 0) for shard, offsets in unsaid.items()})

    async def read(
        self, plan: ReadPlan, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None = None
    ) -> FeatureRows:
        """Read the plan's features of n ids, `keys` as `ReadPlan.key_columns` returns them.

        All features of an id are as of one time. Raises `AsOfInPast`; `Unavailable` if a shard is.
        """
        if n == 0:
            return FeatureRows(np.empty((0, len(plan.names))), np.empty(0, np.int64), [])
        as_of = None if as_of_ms is None else np.full(n, as_of_ms, np.int64)
        return plan.rows(await self._read.read(plan.question(keys, n, self._clock.now_ms(), as_of)))

    # -- steps of ingest

    def _refused(
        self, source: Source, batch: pa.RecordBatch, requests: Sequence[EventsRequest], received_ms: int
    ) -> dict[int, BadRequest]:
        """Return which requests have an event that is ahead of its time, or for which a condition fails, and why."""
        try:
            self._check_ahead(source, batch, received_ms)
            self._check_conditions(source, batch)
            return {}
        except BadRequest as error:
            if len(requests) == 1:
                return {0: error}
        refused = {}
        for i, (start, end) in enumerate(itertools.pairwise(_ends(requests))):
            try:
                self._check_ahead(source, batch.slice(start, end - start), received_ms)
                self._check_conditions(source, batch.slice(start, end - start))
            except BadRequest as error:
                refused[i] = error
        return refused

    def _check_ahead(self, source: Source, batch: pa.RecordBatch, received_ms: int) -> None:
        """Refuse events that are ahead of the time they came."""
        times = source.times_ms(batch)
        ahead = np.flatnonzero(times > received_ms + self._limits.ahead_ms_max)
        if ahead.size:
            allowed = f"its arrival; allowed is {self._limits.ahead_ms_max} ms"
            problems: list[Problem] = [
                (
                    f"event of `{source.name}`: {source.event_time} {times[i]} lies {times[i] - received_ms} ms ahead "
                    f"of {allowed}",
                    f"$[{i}].{source.event_time}",
                )
                for i in ahead[:_PROBLEMS_MAX].tolist()
            ]
            raise BadRequest(problems[0][0], path=problems[0][1], code="event_ahead", problems=tuple(problems))

    def _stamps(
        self, source: Source, batch: pa.RecordBatch, requests: Sequence[EventsRequest], received_ms: int
    ) -> Ints:
        """Return the arrival stamps, int64 [n]."""
        # Where time stands at the newest stamp, an event arrives when it happens.
        on_event_clock = self._clock.now_ms() is None
        if not on_event_clock and not any(r.arrival_is_event_time for r in requests):
            return np.full(batch.num_rows, received_ms, np.int64)
        times = source.times_ms(batch)
        of_events = [on_event_clock or r.arrival_is_event_time for r in requests]
        return np.where(np.repeat(of_events, [r.rows for r in requests]), times, received_ms)

    def _received_ms(self) -> int:
        """Return when the request came, for the duplicate filter, whatever its events' arrival stamps say:
        a bulk load that is sent again must find its ids, however long the time that it covers."""
        now_ms = self._clock.now_ms()
        return time.time_ns() // 1_000_000 if now_ms is None else now_ms

    def _check_conditions(self, source: Source, batch: pa.RecordBatch) -> None:
        """Refuse events for which a view's condition cannot be computed, such as a division by zero."""
        for text, where in self.layout.conditions(source.name).items():
            try:
                mask_of(where, batch)
            except pa.ArrowException as error:
                row = _first_failing(where, batch)
                raise BadRequest(
                    f"event of `{source.name}`: the condition {text} of a view fails: {str(error).splitlines()[0]}",
                    path=f"$[{row}]",
                    code="invalid_events",
                ) from None

    def _events(
        self,
        source: Source,
        batch: pa.RecordBatch,
        requests: Sequence[EventsRequest],
        arrivals: Ints,
        received_ms: int,
    ) -> Events:
        n = batch.num_rows
        if source.event_id is not None:
            ids, given = hash_columns([batch.column(source.event_id)], n), True
        else:
            ids = np.concatenate([_ids_of_rows(r.idempotency_key, r.rows) for r in requests])
            given = any(r.idempotency_key is not None for r in requests)
        contents = hash_columns(batch.columns, n)[:, 0].view(np.int64) if given else np.zeros(n, np.int64)
        return Events(source.name, batch, ids, contents, given, arrivals, received_ms)

    def _concerned(self, source: Source, events: Events) -> tuple[Bools, Bools]:
        """Return which shards have a part of which events, bool [shards, n], as home or by a key, and which events lack
        a key, bool [n]."""
        concerned, unkeyed = shards_of_keys(self.layout, self._map, source.name, events.batch)
        concerned[self._map.shards_of(events.ids), np.arange(events.n)] = True
        return concerned, unkeyed

    async def _offer(
        self, events: Events, concerned: Bools
    ) -> tuple[npt.NDArray[np.uint8], dict[int, Receipt], dict[int, Ints | None], bytes]:
        """Send each shard its part; return the homes' verdicts, uint8 [n], the receipts, which rows each shard got
        (None for all), and the name of the offer.

        Where one shard has a part of everything and no other of anything, it applies it at once.
        """
        n = events.n
        counts = np.count_nonzero(concerned, axis=1).tolist()
        shards = [shard for shard, count in enumerate(counts) if count]
        # Where time is the newest stamp, every shard has to hear of it, else it would stand still on
        # the shards that do not get the newest event and a read would depend on the number of shards.
        clock = events.arrivals.max(keepdims=True) if self._clock.now_ms() is None else events.arrivals[:0]
        hear = [] if len(clock) == 0 else [shard for shard, count in enumerate(counts) if not count]
        started: dict[int, Awaitable[Receipt]] = {
            shard: self._ingest.ingest(shard, events.of_rows(_NO_ROWS, clock), ()) for shard in hear
        }
        parts: dict[int, Ints | None] = {}
        request = secrets.token_bytes(16)
        for shard in shards:
            # A shard passes over what is not its own, quicker than it is cut out here.
            parts[shard] = None if counts[shard] * 2 > n else np.flatnonzero(concerned[shard])
            part = events if parts[shard] is None else events.of_rows(np.flatnonzero(concerned[shard]), clock)
            settled = self._settled.pop(shard, ())
            if len(shards) == 1:
                started[shard] = self._ingest.ingest(shard, part, settled)
            else:
                started[shard] = self._ingest.offer(shard, request, part, settled)
        receipts = await all_of(started)
        verdicts = np.full(n, ELSEWHERE, np.uint8)
        for shard, rows in parts.items():
            judged = receipts[shard].verdicts
            here = np.flatnonzero(judged != ELSEWHERE)
            verdicts[here if rows is None else rows[here]] = judged[here]
        return verdicts, {shard: receipts[shard] for shard in shards}, parts, request

    async def _take(
        self, request: bytes, accepted: Bools, receipts: Mapping[int, Receipt], parts: Mapping[int, Ints | None]
    ) -> None:
        homes = [HomeRecord(shard, r.offset, r.settled) for shard, r in receipts.items() if r.offset >= 0]
        takes: dict[int, Awaitable[None]] = {}
        for shard, receipt in receipts.items():
            if receipt.waits:
                rows = parts[shard]
                takes[shard] = self._ingest.take(shard, request, accepted if rows is None else accepted[rows], homes)
        await all_of(takes)
        if len(receipts) > 1:
            for home in homes:
                self._settled.setdefault(home.shard, []).append(home.offset)

    async def _wait_for_originals(self, receipts: Mapping[int, Receipt]) -> None:
        await all_of({
            shard: self._ingest.settle(shard, self._settled.pop(shard, ()), receipt.wait_before)
            for shard, receipt in receipts.items()
            if receipt.wait_before
        })  # fmt: skip


def _ends(requests: Sequence[EventsRequest]) -> list[int]:
    """Return where each request begins in the batch of all, and where the last one ends."""
    return list(itertools.accumulate((r.rows for r in requests), initial=0))


def _ids_of_rows(key: str | None, n: int) -> Hashes:
    """Return ids for the rows of a request: the same for the same key, else ones that no other request has."""
    if key is None:
        return hash_columns([pa.repeat(pa.scalar(secrets.randbits(63), pa.int64()), n), pa.array(range(n))], n)
    return hash_columns([pa.repeat(pa.scalar(key), n), pa.array(range(n))], n)


def _first_failing(where: pc.Expression, batch: pa.RecordBatch) -> int:
    """Return the first row for which a condition cannot be computed: the end of the shortest failing head."""
    low, high = 0, batch.num_rows
    while high - low > 1:
        middle = (low + high) // 2
        try:
            mask_of(where, batch.slice(0, middle))
            low = middle
        except pa.ArrowException:
            high = middle
    return low
