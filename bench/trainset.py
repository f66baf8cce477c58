"""`millpond bench trainset`: how quickly `millpond train-set` makes training sets, and in how much memory.

1. Load a year of flights into a shard with its log, and write the older half of that as history; likewise 1 M and 10 M
   events of the reference view, of 7 and of 70 days. No cluster runs: the command reads what one leaves behind.
2. Make the training set of 300,000 departures with every feature of the flights example, by the command in a process of
   its own: from its start to its end, and the most memory that it had. Then that of 100,000 labels from 1 M events, and
   that of 1 M labels from 10 M; and again, so that they take turns.
3. Check: every label has its row, and a sample of the rows is what the oracle computes from the raw events.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millpond.bench import all_flights, reference
from millpond.bench.home import make_home
from millpond.bench.logged_shard import LoggedShard
from millpond.bench.options import Options
from millpond.bench.workload import Advance, Evidence, Steps, median_of, ratio
from millpond.cluster.config import Config
from millpond.cluster.demo.flights import Flights, load_flights
from millpond.cluster.demo.stage import epoch_ms, judge, sample
from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.view import FeatureView
from millpond.feature_actors.warm import warm_kernels

__all__ = ["TrainsetWorkload", "make"]

SEED = 0
LABELS = 300_000
#: Events of the reference view, and one label for so many of them.
EVENTS, EVENTS_PER_LABEL = {"events_1m": 1_000_000, "events_10m": 10_000_000}, 10
_LOAD_ROWS = 10_000
_ORACLE_ROWS = 200
_SAMPLED_EVERY_S = 0.02
_KEY = ("tailnum", "carrier", "origin", "dest")
_END_MS = 1_700_000_000_000
_TIME = pa.timestamp("ms", "UTC")

MEANINGS = {
    "rows_per_s": "labels of flights, every feature of 8 views; of the whole command, its start included",
    "peak_mb": "the most memory that its process had, files that it maps included",
    "seconds_10m_vs_1m_ratio": "1 M labels from 10 M events of the reference view, against 100,000 from 1 M",
    "flights_s": "of the whole command",
    "events_1m_s": "",
    "events_10m_s": "",
    "peak_10m_mb": "",
    "labels": "of flights",
    "events": "of flights",
    "oracle_equal": "rows of flights in which the plain-Python oracle finds every feature right ...",
    "oracle_total": "... of so many",
    "rounds": "",
}


class TrainsetWorkload:
    """The command, on three data directories."""

    name = "trainset"
    seed = SEED
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, *, rounds: int, quick: bool = False) -> None:
        self._home = make_home(config.data_dir)
        self._folder = self._home.path
        self._slots, self._rounds, self._quick = config.slots, rounds, quick
        self._events = {size: n // 50 for size, n in EVENTS.items()} if quick else EVENTS
        self._users = 2_000 if quick else reference.USERS
        self._seconds: dict[str, list[float]] = {}
        self._peak_mb: dict[str, float] = {}
        self._figures: dict[str, Any] = {"rounds": rounds}
        self._wrong: list[str] = []

    # -- the workload

    def setup(self, steps: Steps) -> None:
        self._flights = load_flights()
        if self._quick:
            self._flights = self._flights.between("2013-01-01", "2013-01-15")
        with steps.step("compile"):
            warm_kernels()  # as the start of a cluster does, once a machine
        with steps.step("load flights") as advance:
            self._load_flights(self._flights, advance)
        for size, events in self._events.items():
            with steps.step(f"load {events:,} events", events) as advance:
                self._load_reference(size, events, advance)

    def _load_flights(self, flights: Flights, advance: Advance) -> None:
        tables = {"departures": flights.departures, "arrivals": flights.arrivals}
        views = list(all_flights.VIEWS.values())
        batches = [
            (name, batch)
            for name, table in tables.items()
            for batch in table.select(compile_layout([], views).sources[name].schema.names).to_batches(_LOAD_ROWS)
        ]
        batches.sort(key=lambda one: one[1].column(_TIMES[one[0]])[0].value)  # as they would have come
        self._load("flights", views, iter(batches), len(batches), advance)
        labels = flights.labels.slice(0, LABELS)
        pq.write_table(labels, self._labels("flights"))
        self._figures |= {"labels": len(labels), "events": sum(map(len, tables.values()))}

    def _load_reference(self, size: str, events: int, advance: Advance) -> None:
        smallest = min(self._events.values())
        weeks, source = events // smallest, reference.activity.name

        def batches() -> Iterator[tuple[str, pa.RecordBatch]]:
            for week in range(weeks):
                end_ms = _END_MS - (weeks - 1 - week) * reference.SPAN_MS
                table = reference.reference_events(week, end_ms, users=self._users, events=smallest)
                for batch in table.combine_chunks().to_batches(_LOAD_ROWS):
                    yield source, batch

        self._load(size, [reference.user_activity], batches(), weeks * -(-smallest // _LOAD_ROWS), advance)
        draw, n = np.random.default_rng(SEED), events // EVENTS_PER_LABEL
        times = _END_MS - draw.integers(0, weeks * reference.SPAN_MS, n)
        users = draw.integers(0, self._users, n)
        pq.write_table(pa.table({"user_id": users, "as_of": pa.array(times, _TIME)}), self._labels(size))

    def _load(
        self,
        name: str,
        views: list[FeatureView],
        batches: Iterator[tuple[str, pa.RecordBatch]],
        n_batches: int,
        advance: Advance,
    ) -> None:
        """Make the data directory of a name; the older half of the batches becomes history."""
        layout = compile_layout([], views)
        shard = LoggedShard(self._folder / name, name, layout, self._slots)
        for number, (source, batch) in enumerate(batches):
            if number == n_batches // 2:
                shard.write_history()
            (rows,) = pa.Table.from_batches([batch]).cast(layout.sources[source].schema).to_batches()
            new = shard.load(source, rows)
            if new != rows.num_rows:
                self._wrong.append(f"every event that is loaded is new: {new} of {rows.num_rows}")
            advance(rows.num_rows, "")
        shard.close()

    def start(self, steps: Steps) -> None:
        with steps.step("make training sets", self._rounds * 3) as advance:
            for _ in range(self._rounds):
                self._make("flights", all_flights.__file__)
                advance(1, f"flights {self._seconds['flights'][-1]:.1f} s")
                for size in self._events:
                    self._make(size, reference.__file__)
                    advance(1, f"{size} {self._seconds[size][-1]:.1f} s")

    def _make(self, name: str, definition: str) -> None:
        """Run the command on one of the directories; note how long it took and how much memory."""
        command = [
            sys.executable, "-m", "millpond.cluster.cli", "train-set", definition, "--name", name, "--data-dir",
            str(self._folder), "--labels", str(self._labels(name)), "--out", str(self._out(name)), "--json",
        ]  # fmt: skip
        said = self._folder / "said"
        begun = time.perf_counter()
        with said.open("wb") as output, (self._folder / "errors").open("wb") as errors:
            child = subprocess.Popen(command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
            peak_mb = 0.0
            while child.poll() is None:
                peak_mb = max(peak_mb, _peak_mb(child.pid))
                time.sleep(_SAMPLED_EVERY_S)
        seconds = time.perf_counter() - begun
        if child.returncode:
            raise MillpondError(
                f"bench: train-set ended with {child.returncode}: {(self._folder / 'errors').read_text()}"
            )
        made = json.loads(said.read_bytes())
        labels = pq.read_metadata(self._labels(name)).num_rows
        rows = pq.read_metadata(self._out(name)).num_rows
        if not made["labels"] == rows == labels:
            self._wrong.append(f"every label of {name} has its row: {rows} of {labels}")
        self._seconds.setdefault(name, []).append(seconds)
        self._peak_mb[name] = max(self._peak_mb.get(name, 0.0), peak_mb)

    def check(self, steps: Steps) -> list[str]:
        rows = pq.read_table(self._out("flights"))
        views = list(all_flights.VIEWS.values())
        names = [feature.full_name for view in views for feature in view]
        chosen = rows.take(pa.array(sample(len(rows), _ORACLE_ROWS, SEED)))
        as_of = epoch_ms(chosen, "as_of").tolist()
        asked = [
            ({k: row[k] for k in _KEY}, at, {n: row[n] for n in names}, row["unknown"])
            for row, at in zip(chosen.to_pylist(), as_of, strict=True)
        ]
        events = {"departures": self._flights.departures, "arrivals": self._flights.arrivals}
        with steps.step("ask the oracle", len(asked)) as advance:
            equal = judge(views, events, asked, lambda n=0, note=None: advance(n, note or ""))
        self._figures |= {"oracle_equal": equal, "oracle_total": len(asked)}
        if equal != len(asked):
            self._wrong.append(f"the oracle finds every feature right: {equal} of {len(asked)} rows")
        return self._wrong

    def metrics(self) -> dict[str, Any]:
        figures = self._figures
        figures["flights_s"] = median_of(self._seconds["flights"], 2)
        figures["rows_per_s"] = round(figures["labels"] / figures["flights_s"])
        figures["peak_mb"] = round(self._peak_mb["flights"])
        if not self._quick:  # else they are of other sizes than they say
            figures |= {f"{size}_s": median_of(self._seconds[size], 2) for size in EVENTS}
            figures["seconds_10m_vs_1m_ratio"] = ratio(figures, "events_10m_s", "events_1m_s")
            figures["peak_10m_mb"] = round(self._peak_mb["events_10m"])
        return figures

    @property
    def evidence(self) -> Evidence:
        return Evidence()

    def close(self) -> None:
        self._home.remove()

    # -- where it lies

    def _labels(self, name: str) -> Path:
        return self._folder / f"labels-{name}.parquet"

    def _out(self, name: str) -> Path:
        return self._folder / f"out-{name}.parquet"


def _peak_mb(pid: int) -> float:
    """Return the most memory that a process has had, in MB; not what the process that started it had then, as
    `ru_maxrss` does."""
    with contextlib.suppress(OSError):  # it has ended since
        if found := re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024 / 1e6
    return 0.0


_TIMES = {"departures": "departed_at", "arrivals": "arrived_at"}


def make(config: Config, options: Options) -> TrainsetWorkload:
    return TrainsetWorkload(config, rounds=options.measured_rounds, quick=options.quick)
