"""The flights of some days, with events that come late, twice or early: every feature that was served is found again.

The whole year, in steps of ten minutes, takes ten minutes:

    MILLPOND_PARITY=year pytest -q tests/test_training_flights.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from durable_cluster import DurableCluster
from worlds import cluster as cluster_in_memory

from millpond.cluster.demo.flights import Flights, load_flights
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.ports import complete
from millpond.feature_actors.view import FeatureView
from millpond.models import flight_delay as example
from millpond.models import training_set

WHOLE_YEAR = os.environ.get("MILLPOND_PARITY") == "year"
DAYS = ("2013-01-01", "2014-01-02") if WHOLE_YEAR else ("2013-01-01", "2013-01-03")
STEP_MS = 600_000 if WHOLE_YEAR else 60_000
SEED, LATE, TWICE, EARLY = 7, 0.05, 0.01, 0.01
KEY = ("tailnum", "carrier", "origin", "dest")
VIEWS = [view for view in vars(example).values() if isinstance(view, FeatureView)]
FEATURES = [feature for view in VIEWS for feature in view]
TIMES = {"departures": "departed_at", "arrivals": "arrived_at"}

Ints = npt.NDArray[np.int64]


def ms(table: pa.Table, column: str) -> Ints:
    return table[column].cast(pa.int64()).to_numpy()  # type: ignore[no-any-return]


def on_step(times: Ints) -> Ints:
    return -(-times // STEP_MS) * STEP_MS


def steps(
    flights: Flights, arrivals_of: dict[str, tuple[Ints, Ints]]
) -> Iterator[tuple[int, dict[str, pa.RecordBatch]]]:
    """Yield each time at which something arrives, and what; arrivals_of: by source, rows and when each arrives."""
    tables = {"departures": flights.departures, "arrivals": flights.arrivals}
    due = {}
    for name, (rows, at) in arrivals_of.items():
        order = np.argsort(on_step(at), kind="stable")
        due[name] = rows[order], on_step(at)[order]
    for now in np.unique(np.concatenate([at for _, at in due.values()])).tolist():
        batches = {}
        for name, (rows, at) in due.items():
            these = rows[np.searchsorted(at, now) : np.searchsorted(at, now, "right")]
            if len(these):
                schema = getattr(example, name).schema
                table = tables[name].take(pa.array(these)).select(schema.names).cast(schema)
                (batches[name],) = table.combine_chunks().to_batches()
        yield now, batches


class Served:
    """What is served of each departure, asked for at the first step after it: matrix, as-of, unknown views."""

    def __init__(self, client: FeatureClient, plan: ReadPlan, flights: Flights) -> None:
        self._client, self._plan = client, plan
        self.moments = on_step(ms(flights.departures, "departed_at"))
        self.labels = flights.departures.select(KEY).append_column(
            "as_of", pa.array(self.moments, pa.timestamp("ms", "UTC"))
        )
        n = len(self.moments)
        self.matrix = np.full((n, len(plan.names)), -1.0)
        self.as_of, self.unknown = np.zeros(n, np.int64), [["not asked"]] * n
        self._done = 0

    def ask_until(self, now_ms: int, clock: ManualClock) -> None:
        """Ask for the departures whose moment comes before a time: nothing has arrived since."""
        while self._done < len(self.moments) and self.moments[self._done] < now_ms:
            end = int(np.searchsorted(self.moments, self.moments[self._done], "right"))
            clock.ms = int(self.moments[self._done])
            asked = self.labels.slice(self._done, end - self._done)
            rows = complete(self._client.read(self._plan, {k: asked[k].to_pylist() for k in KEY}, len(asked)))
            self.matrix[self._done : end], self.as_of[self._done : end] = rows.matrix, rows.as_of
            self.unknown[self._done : end] = rows.unknown
            self._done = end


def _accepted(acks: list[Any], name: str) -> int:
    return sum(getattr(ack, name) for ack in acks)


def test_what_was_served_of_late_double_and_early_events_is_found_again_and_what_would_have_been(
    tmp_path: Path,
) -> None:
    flights = load_flights().between(*DAYS)
    layout = compile_layout([], VIEWS)
    plan = ReadPlan(layout, FEATURES, "test")
    rng = np.random.default_rng(SEED)
    on_time, troubled = {}, {}
    for name, table in (("departures", flights.departures), ("arrivals", flights.arrivals)):
        times, n = ms(table, TIMES[name]), len(table)
        lag = np.where(rng.random(n) < LATE, rng.exponential(3 * 3_600_000, n).astype(np.int64) + STEP_MS, 0)
        early = rng.random(n) < EARLY
        lag[early] = -rng.integers(60_000, 500_000, early.sum())
        again = np.flatnonzero(rng.random(n) < TWICE)
        second = times[again] + lag[again].clip(0) + rng.exponential(3_600_000, len(again)).astype(np.int64)
        # Of one millisecond, such as a clock that shows minutes has many, the log says which came first.
        in_time = np.lexsort((np.arange(n), on_step(times + lag), times))
        on_time[name] = in_time, times[in_time]
        troubled[name] = np.concatenate([np.arange(n), again]), np.concatenate([times + lag, second])

    # Served on the way, by a cluster with logs to which events come as they come.
    lived = DurableCluster(layout, 2, tmp_path, 64, history=True)
    served, acks = Served(lived.client, plan, flights), []
    for number, (now, batches) in enumerate(steps(flights, troubled)):
        served.ask_until(now, lived.clock)
        lived.clock.ms = now
        acks += [complete(lived.client.ingest(name, batch)) for name, batch in batches.items()]
        if number == 500:
            for shard in range(2):
                lived.write_history(shard)
    served.ask_until(2**62, lived.clock)
    n_events = len(flights.departures) + len(flights.arrivals)
    assert _accepted(acks, "accepted") == n_events
    assert _accepted(acks, "duplicates") > 0.8 * TWICE * n_events
    assert _accepted(acks, "late") > 0.02 * n_events
    past = lived.past()
    found = training_set(FEATURES, served.labels, past, knowledge="arrival")
    np.testing.assert_array_equal(found.as_of, served.as_of)
    assert (served.as_of > served.moments).any()
    np.testing.assert_array_equal(found.matrix.view(np.int64), served.matrix.view(np.int64))
    assert found.unknown == served.unknown

    # Served by a cluster to which everything comes when it happens.
    client, _ = cluster_in_memory(layout, 1, clock := ManualClock(0), n_slots=64)
    ideal = Served(client, plan, flights)
    for now, batches in steps(flights, on_time):
        ideal.ask_until(now, clock)
        clock.ms = now
        for name, batch in batches.items():
            complete(client.ingest(name, batch, arrival_is_event_time=True))
    ideal.ask_until(2**62, clock)
    by_event_time = training_set(FEATURES, served.labels, past)
    np.testing.assert_array_equal(by_event_time.as_of, ideal.moments)
    scale = np.maximum(1.0, np.abs(ideal.matrix))
    same = (np.abs(by_event_time.matrix - ideal.matrix) <= 1e-12 * scale) | (
        np.isnan(by_event_time.matrix) & np.isnan(ideal.matrix)
    )
    assert np.count_nonzero(~same) == 0
    assert by_event_time.unknown == ideal.unknown
    # What came late was missed indeed.
    assert np.count_nonzero((by_event_time.matrix != found.matrix).any(axis=1)) > len(served.moments) // 10
