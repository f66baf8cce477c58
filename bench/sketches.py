"""`millpond bench sketches`: the aggregations that are large or near: how fast, and how near.

1. Grow two stores of 100,000 entities in shared memory, each of one shard, by events of 24 hours: one keeps `Distinct`,
   `Quantile` and `TopK` over 24 hours, the other `Count`, `Sum` and `Max`, to compare with.
2. Three rounds, in which the stores take turns: events of the hours that follow, in batches of 10,000 Arrow rows made
   beforehand, applied on one core; then reads of one entity, plan included.
3. 1,000 random programs of each aggregation that states an error, see `programs`: how far its value is from the exact
   one, as a share of what is stated.
4. Check: no value is further away than it may be, of the programs and of a sample of the first store's entities.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.bench.home import make_home
from millpond.bench.options import Options
from millpond.bench.programs import Worst, judged_programs
from millpond.bench.store import quantile_us, turned
from millpond.bench.workload import Evidence, Steps, median_of, ratio
from millpond.cluster.config import Config
from millpond.feature_actors import Count, Distinct, FeatureView, Max, Quantile, Source, Sum, TopK
from millpond.feature_actors.judge import Judge
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.memory_folder import MemoryFolder
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.reader import MemoryRead
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import Control, Memory

__all__ = ["SketchWorkload", "make"]

Ints = npt.NDArray[np.int64]

ROUNDS = 3
BATCH_ROWS = 10_000
_BATCHES_AT_ONCE = 20
_HOUR_MS, _DAY_MS = 3_600_000, 86_400_000
START_MS = 1_700_006_400_000 // _DAY_MS * _DAY_MS
MERCHANTS = 5_000
#: Of a card in 24 hours, when the stores are grown.
EVENTS_A_DAY = 10
_SAMPLE = 50
_MEMORY_BYTES_MAX = 1 << 34

payments = Source(
    "payments",
    owner="bench",
    about="One event per payment with a card.",
    fields={"card_id": "int64", "merchant": "string", "amount": "float64", "paid_at": "timestamp[ms, UTC]"},
    event_time="paid_at",
)
sketched = FeatureView(
    "sketched",
    owner="bench",
    source=payments,
    key=["card_id"],
    features={
        "merchants": Distinct("merchant", window="24h"),
        "dear": Quantile("amount", q=0.95, window="24h"),
        "most": TopK("merchant", window="24h"),
    },
)
plain = FeatureView(
    "plain",
    owner="bench",
    source=payments,
    key=["card_id"],
    features={
        "payments": Count(window="24h"),
        "spend": Sum("amount", window="24h"),
        "largest": Max("amount", window="24h"),
    },
)


@dataclass(frozen=True)
class Sizes:
    """Entities of a store, events of a measurement, programs of an aggregation."""

    entities: int
    events: int
    programs: int


FULL = Sizes(entities=100_000, events=300_000, programs=1_000)
QUICK = Sizes(entities=1_000, events=20_000, programs=20)


class _Store:
    """One shard that keeps one view, in a memory that is published in `folder`."""

    def __init__(self, folder: Path, view: FeatureView, entities: int, n_slots: int, seed: int) -> None:
        folder.mkdir(mode=0o700)
        self.entities = entities
        layout, shard_map = compile_layout([], [view]), ShardMap.even(n_slots, 1)
        control = Control(folder, 0, writable=True)
        memory = Memory.create(control.tiles_path(1), _MEMORY_BYTES_MAX)
        self.shard = Shard(layout, shard_map, 0, seed=0, memory=memory)
        control.publish(1)
        self._draw = np.random.default_rng(seed)
        self._merchants = pa.array([f"m{i}" for i in range(MERCHANTS)])
        self.view, self.newest_ms = view, START_MS
        self.plan = ReadPlan(layout, list(view), "bench sketches")
        self._port = MemoryRead(shard_map, folder)
        self.sample = np.unique(self._draw.integers(0, entities, _SAMPLE))
        self.sampled: list[dict[str, Any]] = []

    def apply(self, n: int, length_ms: int) -> float:
        """Apply n events of entities drawn uniformly, spread evenly; return the seconds that applying took."""
        times = self.newest_ms + np.arange(n) * length_ms // n
        seconds, batches = 0.0, (self._batch(times[at : at + BATCH_ROWS]) for at in range(0, n, BATCH_ROWS))
        while made := list(islice(batches, _BATCHES_AT_ONCE)):
            begun = time.perf_counter()
            for batch, arrivals in made:
                self.shard.apply(payments.name, batch, arrivals, START_MS)
            seconds += time.perf_counter() - begun
        self.newest_ms = int(times[-1])
        return seconds

    def _batch(self, times: Ints) -> tuple[pa.RecordBatch, Ints]:
        draw, n = self._draw, len(times)
        cards = draw.integers(0, self.entities, n)
        merchants = self._merchants.take(pa.array((MERCHANTS * draw.random(n) ** 2).astype(np.int64)))
        at = pa.array(times).cast(pa.timestamp("ms", tz="UTC"))
        columns = [pa.array(cards), merchants, pa.array(np.round(draw.lognormal(3.0, 1.0, n), 2)), at]
        batch = pa.RecordBatch.from_arrays(columns, schema=payments.schema)
        self.sampled += batch.filter(pa.array(np.isin(cards, self.sample))).to_pylist()
        return batch, times

    def time_reads(self, seconds: float) -> Ints:
        """Read one entity at a time for some seconds; return what each read took in ns, int64 [reads]."""
        return asyncio.run(self._time_reads(seconds))

    async def _time_reads(self, seconds: float) -> Ints:
        clock, took = time.perf_counter_ns, list[int]()
        end = clock() + int(seconds * 1e9)
        while clock() < end:
            for card in self._draw.integers(0, self.entities, 1_000).tolist():
                begun = clock()
                question = self.plan.question_of_words({"card_id": [card]}, 1, self.newest_ms)
                self.plan.rows(await self._port.read(question))
                took.append(clock() - begun)
        return np.array(took)

    def problems(self) -> list[str]:
        """Return which features of the sample are not what the oracle says."""
        keys = [(card,) for card in self.sample.tolist()]
        question = self.plan.question({"card_id": self.sample.tolist()}, len(keys), self.newest_ms, None)
        rows = self.plan.rows(asyncio.run(_answer(self._port, question)))
        return [str(wrong) for wrong in Judge(self.view, self.sampled).differences(keys, self.plan, rows)]


async def _answer(port: MemoryRead, question: Any) -> Any:
    return await port.read(question)


class SketchWorkload:
    """Speed and error of the larger aggregations, see the module."""

    name = "sketches"
    meanings: Mapping[str, str] = {
        "ingest_events_per_s": "`Distinct`, `Quantile` and `TopK` over 24 h of 100,000 entities, one core",
        "ingest_plain_events_per_s": "`Count`, `Sum` and `Max` over 24 h of as many, in turns",
        "ingest_vs_plain_ratio": "",
        "read_1_p50_us": "the three of one entity, from shared memory, plan included",
        "read_1_p99_us": "",
        "read_1_plain_p50_us": "of the plain store, in turns",
        "bytes_per_entity": "of the store with sketches, all allocated",
        "programs": "random programs, of all aggregations together",
        "worst_error_share": "by aggregation: the largest distance from the exact value, as a share of what is stated",
        "worst_program": "by aggregation: the program of that distance",
        "oracle_checked": "values of a sample of entities, held against the oracle",
    }

    def __init__(self, config: Config, options: Options) -> None:
        self.seed = options.seed or 0
        self._sizes = QUICK if options.quick else FULL
        self._seconds = options.measured_seconds
        self._slots = config.slots
        self._home = make_home(config.data_dir)
        self._folder = MemoryFolder(uuid.uuid4().hex, self._home.path, config.memory_dir)
        self._stores: dict[str, _Store] = {}
        self._runs: dict[str, list[float]] = {}
        self._worst: dict[str, Worst] = {}
        self._checked = 0

    def setup(self, steps: Steps) -> None:
        for name, view in (("sketched", sketched), ("plain", plain)):
            entities = self._sizes.entities
            store = self._stores[name] = _Store(self._folder.path / name, view, entities, self._slots, self.seed)
            with steps.step(f"grow the {name} store"):
                store.apply(EVENTS_A_DAY * entities, _DAY_MS)

    def start(self, steps: Steps) -> None:
        length_ms = _DAY_MS * self._sizes.events // (EVENTS_A_DAY * self._sizes.entities)
        with steps.step("ingest and read", ROUNDS * len(self._stores)) as advance:
            for r in range(ROUNDS):
                for name in turned(list(self._stores), r):
                    store = self._stores[name]
                    rate = self._sizes.events / store.apply(self._sizes.events, length_ms)
                    took = store.time_reads(min(self._seconds, 2.0))
                    for what, value in (
                        ("ingest", rate), ("p50", quantile_us(took, 0.5)), ("p99", quantile_us(took, 0.99)),
                    ):  # fmt: skip
                        self._runs.setdefault(f"{what} {name}", []).append(value)
                    advance(1, f"{name} {rate:,.0f} events/s, read {quantile_us(took, 0.5):.1f} us")
        with steps.step("random programs") as advance:
            for name, worst in judged_programs(self._sizes.programs, self.seed):
                self._worst[name] = worst
                advance(worst.programs, f"{name}: {worst.share:.2g} of what is stated")

    def check(self, steps: Steps) -> list[str]:
        with steps.step("check"):
            wrong = self._stores["sketched"].problems()
            self._checked = len(self._stores["sketched"].sample) * len(sketched.features)
        wrong += [f"{name} is within its error: {worst.program}" for name, worst in self._worst.items() if worst.wrong]
        return wrong

    def metrics(self) -> dict[str, Any]:
        runs, figures = self._runs, dict[str, Any]()
        figures["ingest_events_per_s"] = round(median_of(runs["ingest sketched"], 0))
        figures["ingest_plain_events_per_s"] = round(median_of(runs["ingest plain"], 0))
        figures["ingest_vs_plain_ratio"] = ratio(figures, "ingest_events_per_s", "ingest_plain_events_per_s")
        figures["read_1_p50_us"] = median_of(runs["p50 sketched"], 2)
        figures["read_1_p99_us"] = median_of(runs["p99 sketched"], 2)
        figures["read_1_plain_p50_us"] = median_of(runs["p50 plain"], 2)
        allocated = self._stores["sketched"].shard.memory.allocated_bytes
        figures["bytes_per_entity"] = round(allocated / self._sizes.entities)
        figures["programs"] = sum(worst.programs for worst in self._worst.values())
        figures["worst_error_share"] = {name: float(f"{w.share:.3g}") for name, w in self._worst.items()}
        figures["worst_program"] = {name: w.program for name, w in self._worst.items()}
        figures["oracle_checked"] = self._checked
        return {name: figures[name] for name in self.meanings}

    @property
    def evidence(self) -> Evidence:
        return Evidence()

    def close(self) -> None:
        self._folder.remove()
        self._home.remove()


def make(config: Config, options: Options) -> SketchWorkload:
    return SketchWorkload(config, options)
