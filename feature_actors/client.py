"""The client: takes events to the shards and features back. One function per journey.

It speaks to ports, so the same client serves N plain shards in a test and N actors on a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.clock import Clock
from millpond.feature_actors.dedupe import CONFLICT, DUPLICATE, NEW
from millpond.feature_actors.errors import BadRequest, Problem
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.ports import IngestPort, ReadPort, all_of
from millpond.feature_actors.shard import key_validity
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import mask_of

__all__ = ["Ack", "FeatureClient", "TimeLimits"]

T = TypeVar("T")
K = TypeVar("K")
Ints = npt.NDArray[np.int64]

_PROBLEMS_MAX = 10


@dataclass(frozen=True)
class TimeLimits:
    """late_after_ms: an event further behind its arrival stamp is counted late.
    ahead_ms_max: an event further ahead of its arrival stamp is refused."""

    late_after_ms: int = 3_600_000
    ahead_ms_max: int = 600_000


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

    async def ingest(self, source_name: str, batch: pa.RecordBatch, *, arrival_is_event_time: bool = False) -> Ack:
        """Bring validated events of a source to every shard that keeps something of them.

        Returns when each of them has applied its part. A request that failed can be repeated:
        what was applied by then is not applied again (sources with an `event_id`).

        Raises `BadRequest` if an event is ahead of its arrival; `Unavailable` if a shard is.
        """
        source = self.layout.source(source_name)
        # 1. Stamp the arrival, once for all shards; judge time before anything is applied.
        received_ms = self._received_ms()
        arrivals = self._stamp(source, batch, received_ms, arrival_is_event_time)
        self._check_conditions(source, batch)
        # 2. The home of each event id says what is new; where all have one home, it applies its part at once.
        verdicts, done = await self._admit(source, batch, arrivals, received_ms)
        # 3. Everything but conflicts goes on: a duplicate may come from a request that failed halfway.
        if (conflicts := verdicts == CONFLICT).any():
            kept = np.flatnonzero(~conflicts)
            batch, arrivals = batch.take(pa.array(kept)), arrivals[kept]
        # 4. Every other shard that owns one of the keys applies its part.
        unkeyed = await self._apply(source, batch, arrivals, received_ms, done)
        # 5. Count what was accepted.
        new = verdicts[~conflicts] == NEW
        times: Ints = batch.column(source.event_time).cast(pa.int64()).to_numpy()
        times, arrivals = times[new], arrivals[new]
        too_late = self.layout.too_late(source.name, times, arrivals)
        late = (times < arrivals - self._limits.late_after_ms) & ~too_late
        return Ack(
            accepted=int(new.sum()),
            duplicates=int((verdicts == DUPLICATE).sum()),
            conflicts=int(conflicts.sum()),
            late=int(late.sum()),
            too_late=int(too_late.sum()),
            unkeyed=int(unkeyed[new].sum()),
        )

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

    def _stamp(self, source: Source, batch: pa.RecordBatch, received_ms: int, arrival_is_event_time: bool) -> Ints:
        """Return the arrival stamps, int64 [n]; refuse events that are ahead of the time they came."""
        times: Ints = batch.column(source.event_time).cast(pa.int64()).to_numpy()
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
        # Where time stands at the newest stamp, an event arrives when it happens.
        if arrival_is_event_time or self._clock.now_ms() is None:
            return times
        return np.full(len(times), received_ms, np.int64)

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

    async def _admit(
        self, source: Source, batch: pa.RecordBatch, arrivals: Ints, received_ms: int
    ) -> tuple[npt.NDArray[np.uint8], int | None]:
        """Return a verdict per event, uint8 [n], and the shard that has applied its part already, if any.

        Only a home of the whole batch may apply at once: otherwise the events of an entity would be
        applied in another order on another number of shards.
        """
        n = batch.num_rows
        if source.event_id is None or n == 0:
            return np.full(n, NEW, np.uint8), None
        ids = hash_columns([batch.column(source.event_id)], n)
        contents = hash_columns(batch.columns, n)[:, 0].view(np.int64)
        homes = self._map.rows_by_shard(ids)
        if len(homes) == 1:
            home = homes[0][0]
            return await self._ingest.ingest(home, source.name, ids, contents, batch, arrivals, received_ms), home
        verdicts = np.full(n, NEW, np.uint8)
        answers = await all_of(
            {s: self._ingest.admit(s, source.name, ids[rows], contents[rows], received_ms) for s, rows in homes}
        )
        for shard, rows in homes:
            verdicts[rows] = answers[shard]
        return verdicts, None

    async def _apply(
        self, source: Source, batch: pa.RecordBatch, arrivals: Ints, received_ms: int, done: int | None
    ) -> npt.NDArray[np.bool_]:
        """Send each shard but `done` the events of its keys; return which events lack a key, bool [n]."""
        n = batch.num_rows
        unkeyed = np.zeros(n, np.bool_)
        wanted = np.zeros((self._map.n_shards, n), np.bool_)
        for table in self.layout.tables_of(source.name):
            keys = [batch.column(name) for name in table.key]
            valid = key_validity(keys, n)
            unkeyed |= ~valid
            rows = np.flatnonzero(valid)
            wanted[self._map.shards_of(hash_columns(keys, n))[rows], rows] = True
        # Where time is the newest stamp, every shard has to hear of it, else it would stand still on
        # the shards that do not get the newest event and a read would depend on the number of shards.
        clock = arrivals.max(keepdims=True) if self._clock.now_ms() is None and n > 0 else arrivals[:0]
        started: dict[int, Awaitable[None]] = {}
        for shard, mask in enumerate(wanted):
            count = int(np.count_nonzero(mask))
            if shard == done:
                continue
            if count * 2 > n:  # a shard passes over what is not its own, quicker than it is cut out here
                started[shard] = self._ingest.apply(shard, source.name, batch, arrivals, received_ms)
            elif count:
                rows = np.flatnonzero(mask)
                stamps = np.concatenate([arrivals[rows], clock])
                part = batch.take(pa.array(rows))
                started[shard] = self._ingest.apply(shard, source.name, part, stamps, received_ms)
            elif len(clock):
                started[shard] = self._ingest.apply(shard, source.name, batch.slice(0, 0), clock, received_ms)
        await all_of(started)
        return unkeyed


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
