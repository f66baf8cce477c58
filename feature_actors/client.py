"""The client: takes events to the shards and features back. One function per journey.

It speaks to ports, so the same client serves N plain shards in a test and N actors on a cluster.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.clock import Clock
from millpond.feature_actors.decode import ARRIVAL_COLUMN
from millpond.feature_actors.dedupe import CONFLICT, DUPLICATE, NEW
from millpond.feature_actors.errors import BadRequest, MillpondError, Problem
from millpond.feature_actors.events import ELSEWHERE, FORGOTTEN, Events, Receipt
from millpond.feature_actors.keys import Hashes, hash_columns
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.log.record import HomeRecord
from millpond.feature_actors.plan import FeatureRows, Question, ReadPlan
from millpond.feature_actors.plan_set import PlanSet
from millpond.feature_actors.ports import IngestPort, ReadPort, all_of, each_of
from millpond.feature_actors.routes import shards_of_keys
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import mask_of

__all__ = ["Ack", "EventsRequest", "FeatureClient", "Ingested", "TimeLimits"]

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

    arrival_is_event_time: a bulk load. arrivals: the arrival stamps int64 [rows], of a replay; None if they are made
    here. idempotency_key: says that two requests are the same, where the events have no id. first_row: of what the key
    names these events begin so far on; however that is cut into requests, an event is the same.
    """

    rows: int
    arrival_is_event_time: bool = False
    idempotency_key: str | None = None
    arrivals: Ints | None = None
    first_row: int = 0


@dataclass(frozen=True)
class Ack:
    """What became of the events of a request. Late, too late and unkeyed are of the accepted ones; forgotten ones were
    not taken, for their entity was forgotten after they had happened."""

    accepted: int = 0
    duplicates: int = 0
    conflicts: int = 0
    late: int = 0
    too_late: int = 0
    unkeyed: int = 0
    forgotten: int = 0


@dataclass(frozen=True)
class Ingested:
    """What became of several requests: an ack; `BadRequest` if an event is ahead of its time or a condition fails; or
    what the shard said that has failed, then of all its events one cannot say.

    wait_before: by shard, see `Receipt`: what duplicates have to wait for.
    """

    outcomes: list[Ack | MillpondError]
    wait_before: dict[int, int]


@dataclass(slots=True)
class _Offered:
    """What was offered: under which name; the homes' verdicts uint8 [n], `ELSEWHERE` where the home has failed; which
    rows each shard got, None for all; what the shards answered, and which have failed."""

    request: bytes
    verdicts: npt.NDArray[np.uint8]
    parts: dict[int, Ints | None] = field(default_factory=dict)
    receipts: dict[int, Receipt] = field(default_factory=dict)
    failures: dict[int, MillpondError] = field(default_factory=dict)


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
        #: May be replaced by an extended one while requests are under way.
        self.layout = layout
        self._under_way: Counter[Layout] = Counter()
        self._map = shard_map
        self._ingest = ingest
        self._read = read
        self._clock = clock
        self._limits = limits
        #: Records of the shards that have been applied everywhere, and those that are left to them, since another shard
        #: has failed; which the shards have not been told yet.
        self._settled: dict[int, list[int]] = {}
        self._left: dict[int, list[int]] = {}

    async def ingest(
        self,
        source_name: str,
        batch: pa.RecordBatch,
        *,
        arrival_is_event_time: bool = False,
        idempotency_key: str | None = None,
        arrivals: Ints | None = None,
    ) -> Ack:
        """Bring validated events of a source to every shard that keeps something of them; see `ingest_all`."""
        request = EventsRequest(batch.num_rows, arrival_is_event_time, idempotency_key, arrivals)
        ingested = await self.ingest_all(source_name, batch, [request])
        (outcome,) = ingested.outcomes
        if isinstance(outcome, MillpondError):
            raise outcome
        await self.wait_for_originals(ingested)
        return outcome

    async def ingest_all(self, source_name: str, batch: pa.RecordBatch, requests: Sequence[EventsRequest]) -> Ingested:
        """Bring the events of several requests, one after the other in the batch, to the shards together.

        Returns when each shard has applied its part. A request that failed can be sent again: what was applied by then
        is not applied again (events with ids, or an idempotency key), nor is it if the request is not sent again.
        """
        layout = self._begin()
        try:
            return await self._ingest_all(layout, source_name, batch, requests)
        finally:
            self._end(layout)

    def _begin(self) -> Layout:
        """Count a request by the layout that it goes by: one that was replaced before it was counted is not gone by."""
        while True:
            layout = self.layout
            self._under_way[layout] += 1
            if layout is self.layout:
                return layout
            self._end(layout)

    def _end(self, layout: Layout) -> None:
        self._under_way[layout] -= 1
        if not self._under_way[layout]:
            del self._under_way[layout]

    def has_under_way(self, layout: Layout) -> bool:
        """Return whether events are under way that were routed by a layout."""
        return layout in self._under_way

    async def _ingest_all(
        self, layout: Layout, source_name: str, batch: pa.RecordBatch, requests: Sequence[EventsRequest]
    ) -> Ingested:
        source = layout.source(source_name)
        # 1. Stamp the arrival, once for all shards; judge time and conditions before anything is logged.
        received_ms = self._received_ms()
        if refused := self._refused(source, batch, requests, received_ms):
            return await self._ingest_others(layout, source_name, batch, requests, refused)
        if batch.num_rows == 0:
            return Ingested([Ack()] * len(requests), {})
        arrivals = self._stamps(source, batch, requests, received_ms)
        # 2. Every shard that is the home of an id or has a key logs its part; the homes say what is new.
        events = self._events(layout, source, batch, requests, arrivals, received_ms)
        concerned, unkeyed = self._concerned(layout, source, events)
        offered = await self._offer(events, concerned)
        # 3. The shards of the keys apply what is new.
        await self._take(offered)
        # 4. Count what was accepted, request by request; those of which a shard has failed have failed.
        acks = self._acks(source, batch, requests, arrivals, offered.verdicts, unkeyed)
        failed = self._failed(requests, concerned, offered.failures)
        outcomes = [failed.get(i, ack) for i, ack in enumerate(acks)]
        return Ingested(outcomes, {s: r.wait_before for s, r in offered.receipts.items() if r.wait_before})

    async def wait_for_originals(self, ingested: Ingested) -> None:
        """Return when all that the duplicates of some requests are duplicates of can be seen: they may have been under
        way. Raises `Unavailable` if that takes too long."""
        if ingested.wait_before and any(isinstance(o, Ack) and o.duplicates for o in ingested.outcomes):
            await all_of({shard: self._settle(shard, before) for shard, before in ingested.wait_before.items()})

    async def _ingest_others(
        self,
        layout: Layout,
        source_name: str,
        batch: pa.RecordBatch,
        requests: Sequence[EventsRequest],
        refused: dict[int, BadRequest],
    ) -> Ingested:
        """Go on with those requests that are not refused."""
        ends = _ends(requests)
        good = [i for i in range(len(requests)) if i not in refused]
        outcomes: dict[int, Ack | MillpondError] = dict(refused)
        wait_before: dict[int, int] = {}
        if good:
            rows = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in good])
            others = await self._ingest_all(
                layout, source_name, batch.take(pa.array(rows)), [requests[i] for i in good]
            )
            outcomes |= dict(zip(good, others.outcomes, strict=True))
            wait_before = others.wait_before
        return Ingested([outcomes[i] for i in range(len(requests))], wait_before)

    async def settle(self) -> None:
        """Tell the homes of what was applied everywhere, if that did not travel with other events already."""
        await all_of({shard: self._settle(shard) for shard in {*self._settled, *self._left}})

    async def _settle(self, shard: int, wait_before: int = 0) -> None:
        """Tell a home what was applied everywhere, and what is left to it; again another time, if that fails."""
        settled, left = self._settled.pop(shard, []), self._left.pop(shard, [])
        try:
            await self._ingest.settle(shard, settled, wait_before, left)
        except MillpondError:
            self._settled.setdefault(shard, []).extend(settled)
            self._left.setdefault(shard, []).extend(left)
            raise

    async def read(
        self, plan: ReadPlan, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None = None
    ) -> FeatureRows:
        """Read the plan's features of n ids, `keys` as `ReadPlan.key_columns` returns them.

        All features of an id are as of one time. Raises `AsOfInPast`; `Unavailable` if a shard is.
        """
        if not n:
            return plan.no_rows()
        return plan.rows(await self._read.read(self._question(plan, keys, n, as_of_ms)))

    def read_now(
        self, plan: ReadPlan, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None = None
    ) -> FeatureRows | None:
        """Read as `read` does, but without waiting: return None if one has to wait for an answer.

        Only for the thread that the read port belongs to: the event loop's.
        """
        if not n:
            return plan.no_rows()
        if as_of_ms is None and plan.is_of_words:
            answer = self._read.read_now(plan.question_of_words(keys, n, self._clock.now_ms()))
        else:
            answer = self._read.read_now(self._question(plan, keys, n, as_of_ms))
        return None if answer is None else plan.rows(answer)

    def plan_set(self, plans: Sequence[ReadPlan]) -> PlanSet:
        """Return a set of those plans that can be read together. For hundreds it takes some ms; in any thread."""
        return PlanSet(plans, self._map.n_slots)

    def read_together_now(
        self, plans: PlanSet, asked: Sequence[tuple[ReadPlan, Sequence[int]]]
    ) -> list[FeatureRows] | None:
        """Read for ids of several plans of a set in one go, as of now; return None if one has to wait for an answer."""
        numbers = [number for plan, keys in asked for number in [plans.numbers[plan]] * len(keys)]
        words = [word for _, keys in asked for word in keys]
        answer = self._read.read_now(plans.question(numbers, words, self._clock.now_ms()))
        if answer is None:
            return None
        rows, start = [], 0
        for plan, keys in asked:
            rows.append(plans.rows(answer, plan, start, start + len(keys)))
            start += len(keys)
        return rows

    def _question(self, plan: ReadPlan, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None) -> Question:
        as_of = None if as_of_ms is None else np.full(n, as_of_ms, np.int64)
        return plan.question(keys, n, self._clock.now_ms(), as_of)

    # -- steps of ingest

    def _refused(
        self, source: Source, batch: pa.RecordBatch, requests: Sequence[EventsRequest], received_ms: int
    ) -> dict[int, BadRequest]:
        """Return which requests have an event that is ahead of its time, or for which a condition fails, and why."""
        try:
            self._check_ahead(source, batch, requests, received_ms)
            self._check_conditions(source, batch)
            return {}
        except BadRequest as error:
            if len(requests) == 1:
                return {0: error}
        refused = {}
        for i, (start, end) in enumerate(itertools.pairwise(_ends(requests))):
            try:
                self._check_ahead(source, batch.slice(start, end - start), requests[i : i + 1], received_ms)
                self._check_conditions(source, batch.slice(start, end - start))
            except BadRequest as error:
                refused[i] = error
        return refused

    def _check_ahead(
        self, source: Source, batch: pa.RecordBatch, requests: Sequence[EventsRequest], received_ms: int
    ) -> None:
        """Refuse events that are ahead of the time they came, and arrival stamps that are ahead of now."""
        times, came = source.times_ms(batch), _given_stamps(requests, received_ms)
        self._check_not_ahead(source, source.event_time, times, came, "its arrival")
        if isinstance(came, np.ndarray):
            self._check_not_ahead(source, ARRIVAL_COLUMN, came, received_ms, "now")

    def _check_not_ahead(self, source: Source, name: str, times: Ints, of: Ints | int, what: str) -> None:
        ahead = np.flatnonzero(times > of + self._limits.ahead_ms_max)
        if ahead.size:
            by = times - of
            problems: list[Problem] = [
                (
                    f"event of `{source.name}`: {name} {times[i]} lies {by[i]} ms ahead of {what}; allowed is "
                    f"{self._limits.ahead_ms_max} ms",
                    f"$[{i}].{name}",
                )
                for i in ahead[:_PROBLEMS_MAX].tolist()
            ]
            raise BadRequest(problems[0][0], path=problems[0][1], code="event_ahead", problems=tuple(problems))

    def _stamps(
        self, source: Source, batch: pa.RecordBatch, requests: Sequence[EventsRequest], received_ms: int
    ) -> Ints:
        """Return the arrival stamps, int64 [n]."""
        given = _given_stamps(requests, received_ms)
        stamps = np.full(batch.num_rows, given, np.int64) if isinstance(given, int) else given
        # Where time stands at the newest stamp, an event arrives when it happens.
        on_event_clock = self._clock.now_ms() is None
        at_event_time = [r.arrivals is None and (on_event_clock or r.arrival_is_event_time) for r in requests]
        if not any(at_event_time):
            return stamps
        return np.where(np.repeat(at_event_time, [r.rows for r in requests]), source.times_ms(batch), stamps)

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
        layout: Layout,
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
            ids = np.concatenate([_ids_of_rows(r.idempotency_key, r.first_row, r.rows) for r in requests])
            given = any(r.idempotency_key is not None for r in requests)
        contents = hash_columns(batch.columns, n)[:, 0].view(np.int64) if given else np.zeros(n, np.int64)
        return Events(source.name, batch, ids, contents, given, arrivals, received_ms, len(layout.added_keys))

    def _concerned(self, layout: Layout, source: Source, events: Events) -> tuple[Bools, Bools]:
        """Return which shards have a part of which events, bool [shards, n], as home or by a key, and which events lack
        a key, bool [n]."""
        concerned, unkeyed = shards_of_keys(layout.tables_of(source.name), self._map, events.batch)
        concerned[self._map.shards_of(events.ids), np.arange(events.n)] = True
        return concerned, unkeyed

    async def _offer(self, events: Events, concerned: Bools) -> _Offered:
        """Send each shard its part. Where one shard has a part of everything and no other of anything, it applies it at
        once."""
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
        offered = _Offered(secrets.token_bytes(16), np.full(n, ELSEWHERE, np.uint8))
        settled: dict[int, list[int]] = {}
        for shard in shards:
            # A shard passes over what is not its own, quicker than it is cut out here.
            rows = offered.parts[shard] = None if counts[shard] * 2 > n else np.flatnonzero(concerned[shard])
            part = events.of_rows(rows, clock) if rows is not None else events.with_clock(clock)
            settled[shard] = self._settled.pop(shard, [])
            if len(shards) == 1:
                started[shard] = self._ingest.ingest(shard, part, settled[shard])
            else:
                started[shard] = self._ingest.offer(shard, offered.request, part, settled[shard])
        receipts, offered.failures = await each_of(started)
        for shard in settled.keys() & offered.failures:  # it may not have heard of them
            self._settled.setdefault(shard, []).extend(settled[shard])
        offered.receipts = {shard: receipts[shard] for shard in shards if shard in receipts}
        for shard, receipt in offered.receipts.items():
            rows, here = offered.parts[shard], np.flatnonzero(receipt.verdicts != ELSEWHERE)
            offered.verdicts[here if rows is None else rows[here]] = receipt.verdicts[here]
        return offered

    async def _take(self, offered: _Offered) -> None:
        """Have the shards apply what is new by what its home says. All of it, also of requests that have failed because
        another shard has: it is in the log of its home, which will bring the others their part when it is told that
        nobody else does."""
        accepted = offered.verdicts == NEW
        homes = [HomeRecord(shard, r.offset, r.settled) for shard, r in offered.receipts.items() if r.offset >= 0]
        takes: dict[int, Awaitable[None]] = {}
        for shard, receipt in offered.receipts.items():
            if receipt.waits:
                rows = offered.parts[shard]
                part = accepted if rows is None else accepted[rows]
                takes[shard] = self._ingest.take(shard, offered.request, part, homes)
        _, failures = await each_of(takes)
        offered.failures |= failures
        if len(offered.parts) > 1:
            untold = self._left if offered.failures else self._settled
            for home in homes:
                untold.setdefault(home.shard, []).append(home.offset)
        if offered.failures:
            await each_of({home.shard: self._settle(home.shard) for home in homes if home.shard not in failures})

    def _acks(
        self,
        source: Source,
        batch: pa.RecordBatch,
        requests: Sequence[EventsRequest],
        arrivals: Ints,
        verdicts: npt.NDArray[np.uint8],
        unkeyed: Bools,
    ) -> list[Ack]:
        accepted, times = verdicts == NEW, source.times_ms(batch)
        too_late = accepted & self.layout.too_late(source.name, times, arrivals)
        late = accepted & (times < arrivals - self._limits.late_after_ms) & ~too_late
        duplicates, conflicts, forgotten = (verdicts == one for one in (DUPLICATE, CONFLICT, FORGOTTEN))
        masks = [accepted, duplicates, conflicts, late, too_late, accepted & unkeyed, forgotten]
        if len(requests) == 1:
            return [Ack(*(int(np.count_nonzero(mask)) for mask in masks))]
        sums = np.zeros((len(masks), batch.num_rows + 1), np.int64)
        np.cumsum(masks, axis=1, out=sums[:, 1:])
        return [Ack(*counts) for counts in np.diff(sums[:, _ends(requests)], axis=1).T.tolist()]

    def _failed(
        self, requests: Sequence[EventsRequest], concerned: Bools, failures: Mapping[int, MillpondError]
    ) -> dict[int, MillpondError]:
        """Return which requests have events of a shard that has failed; all, if that one only had to hear of time."""
        failed: dict[int, MillpondError] = {}
        for shard, error in failures.items():
            heard_only = not concerned[shard].any()
            for i, (start, end) in enumerate(itertools.pairwise(_ends(requests))):
                if heard_only or concerned[shard, start:end].any():
                    failed.setdefault(i, error)
        return failed


def _given_stamps(requests: Sequence[EventsRequest], received_ms: int) -> Ints | int:
    """Return when events came: int64 [n] with the stamps that requests carry, or one time for all."""
    if all(r.arrivals is None for r in requests):
        return received_ms
    return np.concatenate([np.full(r.rows, received_ms) if r.arrivals is None else r.arrivals for r in requests])


def _ends(requests: Sequence[EventsRequest]) -> list[int]:
    """Return where each request begins in the batch of all, and where the last one ends."""
    return list(itertools.accumulate((r.rows for r in requests), initial=0))


def _ids_of_rows(key: str | None, first: int, n: int) -> Hashes:
    """Return ids for the rows of a request: the same for the same key and row, else ones that no other request has."""
    if key is None:
        return hash_columns([pa.repeat(pa.scalar(secrets.randbits(63), pa.int64()), n), pa.array(range(n))], n)
    return hash_columns([pa.repeat(pa.scalar(key), n), pa.array(range(first, first + n))], n)


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
