"""`millpond bench store`: what the feature store does by itself, without HTTP and but for one figure without Ray.

1. Grow stores of three sizes in shared memory, each of one shard: events of seven days for the smaller ones; for the
   largest two events per entity, in two tiles of each width. One more has the duplicate filter, and one more is as
   small as the smallest and otherwise as the largest, to compare reads with.
2. Three rounds, in each of which the stores take turns: events of the days that follow, in batches of 10,000 Arrow
   rows made beforehand, applied on one core.
3. Three rounds of reads by another process, plan included: of one id and of 1,000, from each size, idle and while
   events are applied at full speed.
4. Three rounds of reads by that process and by calls of a shard actor, in turns.
5. Check: every entity is there, and what is read of a sample is what NumPy makes of its events.
6. Report medians of the rounds, and ratios of the medians.

Figures bear the size of their store in their names, so those of a `--quick` run are others.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.bench import reference
from millpond.bench.home import make_home
from millpond.bench.options import Options
from millpond.bench.workload import Advance, Evidence, Steps, median_of, ratio
from millpond.cluster.config import Config
from millpond.cluster.embedded import NAMESPACE, EmbeddedCluster, EmbeddedSettings
from millpond.feature_actors.calls import CallIngest, CallRead
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.events import Events as ShardEvents
from millpond.feature_actors.keys import Hashes, hash_columns
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.memory_folder import MemoryFolder
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.ports import ReadPort
from millpond.feature_actors.reader import MemoryRead
from millpond.feature_actors.server import ShardSpec
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import Control, Memory

__all__ = [
    "FULL",
    "QUICK",
    "Events",
    "Sizes",
    "Store",
    "StoreWorkload",
    "agree",
    "expected_features",
    "layout_of",
    "make",
    "meanings",
    "size_text",
    "turned",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SEED = 0
ROUNDS = 3
BATCH_ROWS = 10_000
_BATCHES_AT_ONCE = 100
_SOURCE = reference.activity.name
_HOUR_MS, _DAY_MS = 3_600_000, 86_400_000
#: Events grow the stores until then: a start of tiles of every width.
START_MS = 1_700_006_400_000 // _DAY_MS * _DAY_MS
#: The two events of each entity of the largest store lie so long before and after, within the shortest window.
_AROUND_MS = 20 * 60_000
#: Window and tile width of the reference view, for the check.
_WINDOWS_MS = ((_HOUR_MS, 60_000), (_DAY_MS, 1_200_000), (7 * _DAY_MS, 2 * _HOUR_MS))
_TILES_OF_TWO_EVENTS = 2 * len(_WINDOWS_MS)
#: Of a user, in the reference load: reads of the store of middle size find so many.
_EVENTS_A_WEEK = 10
#: Time goes on so far with a batch while the store is busy: a million events in two days.
_BUSY_STEP_MS = 30 * 60_000
_SAMPLE = 32
_BATCH_IDS = 1_000
_READS_DRAWN = 10_000
_MEMORY_BYTES_MAX = 1 << 34
#: Two more stores: of the middle size with the duplicate filter; of the small size, and otherwise as the large one.
_DEDUPED, _SPARSE = "deduped", "sparse"


@dataclass(frozen=True)
class Sizes:
    """Entities of the three stores; events that the smaller ones are grown by, and of one measurement."""

    small: int
    middle: int
    large: int
    growth_events: int
    events: int


FULL = Sizes(small=10_000, middle=1_000_000, large=10_000_000, growth_events=3_000_000, events=1_000_000)
QUICK = Sizes(small=100, middle=2_000, large=5_000, growth_events=20_000, events=20_000)


def size_text(n: int) -> str:
    """Return a number as names of figures have it.

    >>> size_text(10_000), size_text(1_000_000), size_text(100)
    ('10k', '1m', '100')
    """
    for unit, text in ((1_000_000, "m"), (1_000, "k")):
        if n % unit == 0:
            return f"{n // unit}{text}"
    return str(n)


def meanings(sizes: Sizes) -> dict[str, str]:
    """Return what each figure says, in the order of the table."""
    small, middle, large = map(size_text, (sizes.small, sizes.middle, sizes.large))
    return {
        f"ingest_events_per_s_{small}": "events of seven days on, one core, by entities that are there",
        f"ingest_events_per_s_{middle}": "",
        f"ingest_events_per_s_{large}": "",
        f"ingest_{large}_vs_{middle}_ratio": "",
        f"ingest_new_events_per_s_{large}": "the first event of each, growing from empty",
        f"ingest_deduped_events_per_s_{middle}": "with the duplicate filter: ids admitted at their home, then applied",
        f"bytes_per_entity_{large}": "all allocated, index and slack too, grown from empty: two tiles of each width",
        "filter_bytes_per_id": "of the duplicate filter: an id is kept at its home and in its entity's slot",
        "read_1_p50_us": f"11 features of one of {middle} entities, from another process, plan included",
        "read_1_p99_us": "",
        "read_1000_p50_us": "of 1,000 entities in one read",
        "read_1000_p99_us": "",
        f"read_1_p50_us_{large}": f"of one of {large} entities",
        f"read_1_p50_us_{small}": f"of one of {small} with as many events each",
        f"read_1_p50_us_{small}_dense": f"of one of {small} with as many events in all as the {middle}",
        f"read_{large}_vs_{small}_ratio": "p50 of one entity",
        "read_1_p99_busy_us": "while the writer applies events at full speed",
        "read_p99_busy_ratio": "p99 of one entity, busy / idle",
        "busy_ingest_events_per_s": "what the writer applied meanwhile, making batches included",
        "actor_read_1_p50_us": "the same read by a call of a shard actor",
        "read_vs_actor_call_ratio": "p50, actor call / shared memory, in turns",
        "entities": "",
        "events": "applied to all the stores",
        "values_checked": "of a sample, against NumPy",
        "measured_seconds": "length of each measurement of reads",
        "rounds": "medians of so many",
        "slots": "of each store",
    }


def layout_of(*, deduped: bool = False) -> Layout:
    """Compile the reference view; its source has an event id only for the duplicate filter."""
    source = reference.activity if deduped else replace(reference.activity, event_id=None)
    return compile_layout([source], [replace(reference.user_activity, source=source)])


def plan_of(layout: Layout) -> ReadPlan:
    return ReadPlan(layout, list(layout.views[reference.user_activity.name]), "bench store")


# -- events


@dataclass(frozen=True)
class Batch:
    """Events as a shard gets them; ids and contents are for the duplicate filter."""

    events: pa.RecordBatch
    arrivals: Ints
    ids: Hashes
    contents: Ints


class Events:
    """Events of `entities` users, seeded; those of a sample of the users are remembered. Each arrives when it happens.

    count, newest_ms: of the events made so far.
    """

    def __init__(self, layout: Layout, entities: int) -> None:
        self.layout, self.entities = layout, entities
        self.count, self.newest_ms = 0, 0
        source = layout.source(_SOURCE)
        self._schema, self._has_ids = source.schema, source.event_id is not None
        self.draw = np.random.default_rng([SEED, entities, self._has_ids])
        self.sample = np.unique(self.draw.integers(0, entities, _SAMPLE))
        self._sampled: list[tuple[Ints, Ints, Floats]] = []
        # Fields that no feature looks at come with the events all the same.
        items = self.draw.integers(0, 10_000, BATCH_ROWS)
        self._unread = [pa.array([f"{name}-{i}" for i in items]) for name in ("item", "category")]

    def everyone(self) -> Ints:
        """Return each user once, in a random order."""
        return self.draw.permutation(self.entities)

    def anyone(self, n: int) -> Ints:
        """Return n users, drawn uniformly."""
        return self.draw.integers(0, self.entities, n)

    def batches(self, users: Ints, first_ms: int, end_ms: int) -> Iterator[Batch]:
        """Make an event of each user, at times spread evenly."""
        for at in range(0, len(users), BATCH_ROWS):
            its_users = users[at : at + BATCH_ROWS]
            times = first_ms + np.arange(at, at + len(its_users)) * (end_ms - first_ms) // len(users)
            amounts = self.draw.integers(1, 10_000, len(times)) / 100
            mine = np.isin(its_users, self.sample)
            self._sampled.append((its_users[mine], times[mine], amounts[mine]))
            yield self._batch(its_users, times, amounts)
            self.count += len(times)
            self.newest_ms = int(times[-1])

    def _batch(self, users: Ints, times: Ints, amounts: Floats) -> Batch:
        n = len(users)
        ids = pc.cast(pa.array(np.arange(self.count, self.count + n)), pa.string())
        item, category = (c[:n] for c in self._unread)
        at = pa.array(times).cast(pa.timestamp("ms", tz="UTC"))
        columns = [ids, pa.array(users), item, category, pa.array(amounts), at]
        events = pa.RecordBatch.from_arrays(columns, schema=self._schema)
        if not self._has_ids:
            return Batch(events, times, np.empty((0, 2), np.uint64), times[:0])
        return Batch(events, times, hash_columns([ids], n), hash_columns(columns, n)[:, 0].view(np.int64))

    def expected(self) -> list[Floats]:
        """Return the features of each user of the sample, as of the newest event."""
        users, times, amounts = (np.concatenate(c) for c in zip(*self._sampled, strict=True))
        return [expected_features(times[users == u], amounts[users == u], self.newest_ms) for u in self.sample]


def expected_features(times: Ints, amounts: Floats, as_of_ms: int) -> Floats:
    """Return the features of one user from its events, by NumPy and the definition of a window."""
    seen = [amounts[times >= (as_of_ms - window) // width * width] for window, width in _WINDOWS_MS]
    counts = [float(len(a)) for a in seen]
    largest = [a.max() if len(a) else np.nan for a in seen]
    return np.array([*counts, *(a.sum() for a in seen), *largest, amounts[-1], (as_of_ms - times[-1]) / 1000])


def agree(row: Floats, expected: Floats) -> bool:
    """Say whether features are equal, sums but for rounding."""
    sums = slice(len(_WINDOWS_MS), 2 * len(_WINDOWS_MS))
    exact = np.delete(np.arange(len(expected)), sums)
    return bool(
        np.array_equal(row[exact], expected[exact], equal_nan=True)
        and np.allclose(row[sums], expected[sums], rtol=1e-12, atol=0)
    )


# -- a store


class Store:
    """One shard that keeps the reference view of `entities` users, in a memory that is published in `folder`."""

    def __init__(self, folder: Path, entities: int, n_slots: int, *, deduped: bool = False) -> None:
        folder.mkdir(mode=0o700)
        self.folder, self.entities, self.deduped = folder, entities, deduped
        layout = layout_of(deduped=deduped)
        self.events = Events(layout, entities)
        control = Control(folder, 0, writable=True)
        self._tiles = control.tiles_path(1)
        memory = Memory.create(self._tiles, _MEMORY_BYTES_MAX)
        self.shard = Shard(layout, ShardMap.even(n_slots, 1), 0, seed=SEED, memory=memory)
        control.publish(1)

    def apply(self, users: Ints, first_ms: int, end_ms: int, advance: Advance | None = None) -> float:
        """Apply an event of each user, at times spread evenly; return the seconds that applying took.

        Batches are made before the clock runs, a hundred at once.
        """
        seconds, batches = 0.0, self.events.batches(users, first_ms, end_ms)
        while made := list(islice(batches, _BATCHES_AT_ONCE)):
            begun = time.perf_counter()
            for batch in made:
                self._apply(batch)
            seconds += time.perf_counter() - begun
            if advance is not None:
                advance(sum(b.events.num_rows for b in made), "")
        return seconds

    def apply_while(self, busy: Callable[[], bool]) -> float:
        """Apply events of users drawn uniformly for as long as `busy` says; return events/s, batches made included."""
        begun, before = time.perf_counter(), self.events.count
        while busy():
            first_ms = self.events.newest_ms
            for batch in self.events.batches(self.events.anyone(BATCH_ROWS), first_ms, first_ms + _BUSY_STEP_MS):
                self._apply(batch)
        return (self.events.count - before) / (time.perf_counter() - begun)

    def _apply(self, batch: Batch) -> None:
        if self.deduped:
            self.shard.ingest(
                ShardEvents(_SOURCE, batch.events, batch.ids, batch.contents, True, batch.arrivals, START_MS)
            )
        else:
            self.shard.apply(_SOURCE, batch.events, batch.arrivals, START_MS)
        self._last = batch

    def apply_again(self) -> None:
        """Send the last batch once more."""
        self._apply(self._last)

    @property
    def allocated_bytes(self) -> int:
        """What the file of the memory takes of its file system."""
        return os.stat(self._tiles).st_blocks * 512

    def problems(self, rows: FeatureRows) -> list[str]:
        """Return what is wrong: with the number of entities and events, and with `rows`, the features of the sample."""
        status, events, name = self.shard.status(), self.events, f"the store of {size_text(self.entities)}"
        wrong = []
        if list(status.entities.values()) != [self.entities]:
            wrong.append(f"{name} has each of its {self.entities} entities: got {status.entities}")
        if list(status.events.values()) != [events.count]:
            wrong.append(f"{name} has applied each of {events.count} events once: got {status.events}")
        for i, expected in enumerate(events.expected()):
            row, as_of, unknown = rows.matrix[i], int(rows.as_of[i]), rows.unknown[i]
            if as_of != events.newest_ms or unknown or not agree(row, expected):
                wrong.append(
                    f"features of user {events.sample[i]} in {name} are what its events say: expected "
                    f"{expected.tolist()} as of {events.newest_ms}, got {row.tolist()} as of {as_of}, {unknown}"
                )
        return wrong


# -- reading, in another process


async def time_reads(
    port: ReadPort, plan: ReadPlan, entities: int, ids: int, clock_ms: int, seconds: float, seed: int
) -> Ints:
    """Read so many ids at a time, drawn uniformly, for some seconds; return what each took in ns, int64 [reads]."""
    draw, clock = np.random.default_rng(seed), time.perf_counter_ns
    took: list[int] = []
    end = clock() + int(seconds * 1e9)
    while clock() < end:
        # Between reads, so that no read waits for it.
        drawn = draw.integers(0, entities, (max(_READS_DRAWN // ids, 1), ids)).tolist()
        for users in drawn:
            begun = clock()
            # As the score endpoint asks.
            plan.rows(await port.read(plan.question_of_words({"user_id": users}, ids, clock_ms)))
            took.append(clock() - begun)
            if begun > end:
                break
    return np.array(took)


class _Reading:
    """What the reading process does when it is asked to; it shares nothing with the writer but the memory."""

    def __init__(self) -> None:
        self._plans: dict[bool, ReadPlan] = {}
        self._ports: dict[str, tuple[MemoryRead, ReadPlan]] = {}

    def open(self, name: str, folder: str, n_slots: int, deduped: bool) -> None:
        plan = plan_of(layout_of(deduped=deduped))
        self._ports[name] = MemoryRead(ShardMap.even(n_slots, 1), Path(folder)), plan

    def rows(self, name: str, users: list[int], clock_ms: int) -> FeatureRows:
        port, plan = self._ports[name]
        question = plan.question({"user_id": users}, len(users), clock_ms, None)
        return plan.rows(asyncio.run(_answer(port, question)))

    def time_reads(self, name: str, *arguments: Any) -> Ints:
        return asyncio.run(time_reads(*self._ports[name], *arguments))


async def _answer(port: ReadPort, question: Any) -> Any:
    return await port.read(question)


def _serve(connection: Any) -> None:
    """Do what is asked through the connection until it closes."""
    reading = _Reading()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            method, arguments = connection.recv()
            try:
                connection.send((getattr(reading, method)(*arguments), None))
            except Exception as error:
                connection.send((None, f"{type(error).__name__}: {error}"))


class ReadingProcess:
    """A process that reads."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,), name="millpond-bench-reader", daemon=True)
        self._process.start()
        theirs.close()

    def start(self, method: str, *arguments: Any) -> None:
        self._connection.send((method, arguments))

    @property
    def busy(self) -> bool:
        return not self._connection.poll()

    def result(self) -> Any:
        """Return what was started last. Raises `Unavailable` if it failed."""
        try:
            result, problem = self._connection.recv()
        except (EOFError, ConnectionError):
            result, problem = None, "it has ended"
        if problem is not None:
            raise Unavailable(f"bench store: the reading process failed: {problem}")
        return result

    def call(self, method: str, *arguments: Any) -> Any:
        self.start(method, *arguments)
        return self.result()

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


# -- the workload


class StoreWorkload:
    """Events into the store and features out of it, see the module.

    seconds: length of each measurement of reads. ray: whether to measure reads by actor call.
    """

    name = "store"
    seed = SEED

    def __init__(self, config: Config, sizes: Sizes, seconds: float, *, ray: bool = True) -> None:
        self.meanings: Mapping[str, str] = meanings(sizes)
        self._sizes, self._seconds, self._ray = sizes, seconds, ray
        self._slots = config.slots
        self._home = make_home(config.data_dir)
        self._folder = MemoryFolder(uuid.uuid4().hex, self._home.path, config.memory_dir)
        self._stores: dict[str, Store] = {}
        self._reader: ReadingProcess | None = None
        self._cluster: EmbeddedCluster | None = None
        self._wrong: list[str] = []
        self._runs: dict[str, list[float]] = {}
        self._figures: dict[str, Any] = {
            "entities": {size_text(n): n for n in (sizes.small, sizes.middle, sizes.large)},
            "measured_seconds": seconds,
            "rounds": ROUNDS,
            "slots": self._slots,
        }

    @property
    def _names(self) -> tuple[str, str, str]:
        return size_text(self._sizes.small), size_text(self._sizes.middle), size_text(self._sizes.large)

    def _note(self, name: str, value: float) -> None:
        self._runs.setdefault(name, []).append(value)

    # -- setup

    def setup(self, steps: Steps) -> None:
        sizes = self._sizes
        with steps.step("start the reading process"):
            self._reader = ReadingProcess()
        small, middle, large = self._names
        self._open(small, sizes.small)
        self._open(middle, sizes.middle)
        self._open(_DEDUPED, sizes.middle, deduped=True)
        for name in (small, middle, _DEDUPED):
            store = self._stores[name]
            growth = _EVENTS_A_WEEK * store.entities if name == middle else sizes.growth_events
            with steps.step(f"grow {name}", growth) as advance:
                rounds = growth // store.entities
                users = np.concatenate([store.events.everyone() for _ in range(rounds)])
                store.apply(users, START_MS - 7 * _DAY_MS, START_MS, advance)
        self._open(_SPARSE, sizes.small)
        self._grow_two_tiles(_SPARSE, steps)
        self._open(large, sizes.large)
        rate = self._grow_two_tiles(large, steps)
        self._figures[f"ingest_new_events_per_s_{large}"] = round(rate)
        self._figures[f"bytes_per_entity_{large}"] = round(self._stores[large].allocated_bytes / sizes.large, 1)

    def _open(self, name: str, entities: int, *, deduped: bool = False) -> None:
        assert self._reader is not None
        store = self._stores[name] = Store(self._folder.path / name, entities, self._slots, deduped=deduped)
        self._reader.call("open", name, str(store.folder), self._slots, deduped)

    def _grow_two_tiles(self, name: str, steps: Steps) -> float:
        """Apply two rounds over all ids: each entity has two tiles of each width then.

        Return events/s of the first, in which all the entities are new.
        """
        store = self._stores[name]
        with steps.step(f"grow {name}", 2 * store.entities) as advance:
            seconds = store.apply(store.events.everyone(), START_MS - _AROUND_MS, START_MS, advance)
            store.apply(store.events.everyone(), START_MS, START_MS + _AROUND_MS, advance)
        if (tiles := store.shard.status().tiles) != _TILES_OF_TWO_EVENTS * store.entities:
            self._wrong.append(f"each of {store.entities} entities has two tiles of each width: got {tiles} tiles")
        return store.entities / seconds

    # -- start

    def start(self, steps: Steps) -> None:
        self._ingest(steps)
        self._figures["filter_bytes_per_id"] = round(
            self._stores[_DEDUPED].shard.status().filter_bytes / self._stores[_DEDUPED].events.count, 1
        )
        self._read(steps)
        if self._ray:
            self._call_actors(steps)

    def _ingest(self, steps: Steps) -> None:
        """Time goes by in the rounds at the pace of the reference load, with as many events in each store."""
        step_ms = 7 * _DAY_MS * self._sizes.events // (_EVENTS_A_WEEK * self._sizes.middle)
        first_ms = START_MS + _AROUND_MS
        with steps.step("ingest", ROUNDS * len(self._stores)) as advance:
            for r in range(ROUNDS):
                for name in turned(list(self._stores), r):
                    store = self._stores[name]
                    # As many events each as in the largest store, or as many in all.
                    n = (
                        self._sizes.events * self._sizes.small // self._sizes.large
                        if name == _SPARSE
                        else self._sizes.events
                    )
                    begin_ms, users = first_ms + r * step_ms, store.events.anyone(n)
                    rate = n / store.apply(users, begin_ms, begin_ms + step_ms)
                    self._note(f"ingest {name}", rate)
                    advance(1, f"{name} {rate:,.0f} events/s")

    def _read(self, steps: Steps) -> None:
        small, middle, large = self._names
        idle = [(name, 1, "") for name in (middle, _SPARSE, large, small)] + [(middle, _BATCH_IDS, "")]
        # The busy store comes last: it grows as long as it is busy.
        busy = [(middle, 1, " beside"), (middle, 1, " busy")]
        for name, ids, _ in idle:
            self._time_reads(name, ids, min(self._seconds, 0.5))  # warm
        with steps.step("read", ROUNDS * (len(idle) + len(busy))) as advance:
            for r, kinds in [(r, kinds) for kinds in (idle, busy) for r in range(ROUNDS)]:
                for name, ids, how in turned(kinds, r):
                    took = self._time_reads(name, ids, self._seconds, busy=how == " busy")
                    what = f"{name} {ids}{how}"
                    p50, p99 = quantile_us(took, 0.5), quantile_us(took, 0.99)
                    self._note(f"p50 {what}", p50)
                    self._note(f"p99 {what}", p99)
                    advance(1, f"{what}: p50 {p50:,.1f} us, p99 {p99:,.1f} us")

    def _time_reads(self, name: str, ids: int, seconds: float, *, busy: bool = False) -> Ints:
        """Let the other process read; meanwhile apply events to the store, if `busy`."""
        assert self._reader is not None
        store, reader = self._stores[name], self._reader
        seed = int(store.events.draw.integers(1 << 30))  # each measurement reads other ids
        reader.start("time_reads", name, store.entities, ids, store.events.newest_ms, seconds, seed)
        if busy:
            self._note("busy ingest", store.apply_while(lambda: reader.busy))
        took: Ints = reader.result()
        return took

    def _call_actors(self, steps: Steps) -> None:
        """Read by actor call from this process, in turns with the reading process."""
        with steps.step("start Ray and an actor"):
            port, plan, newest_ms = self._start_actor()
        name, entities = self._names[1], self._sizes.middle
        with steps.step("read by actor call", ROUNDS) as advance:
            for r in range(ROUNDS):
                self._note("p50 beside calls", quantile_us(self._time_reads(name, 1, self._seconds), 0.5))
                took = asyncio.run(time_reads(port, plan, entities, 1, newest_ms, self._seconds, SEED + r))
                self._note("p50 call", quantile_us(took, 0.5))
                advance(1, f"p50 {quantile_us(took, 0.5):,.0f} us")

    def _start_actor(self) -> tuple[ReadPort, ReadPlan, int]:
        """Start an actor that keeps an event of each entity of the store of middle size."""
        from millpond.feature_actors.actor import ActorCalls, start_actors, wait_for_actors

        home, memory = self._home.path, self._folder.path / "actor"
        memory.mkdir(mode=0o700)
        settings = EmbeddedSettings(run_dir=home / "run", port=0, num_cpus=4, draining_period_s=0)
        self._cluster = EmbeddedCluster(settings).start()
        layout, shard_map = layout_of(), ShardMap.even(self._slots, 1)
        spec = ShardSpec(
            cluster_name="bench-store",
            namespace=NAMESPACE,
            run_id=uuid.uuid4().hex,
            data_dir=str(home / "data"),
            sources=tuple(layout.sources.values()),
            views=tuple(layout.views.values()),
            shard_map=shard_map,
            hash_seed=SEED,
            dedupe_horizon_ms=_DAY_MS,
            memory_dir=str(memory),
            memory_bytes_max=_MEMORY_BYTES_MAX,
            strings_max=0,
            reclaim_margin_ms=_HOUR_MS,
            durability="none",
            cluster_id="bench",
            history_uri=None,
            history_part_bytes=1 << 30,
            snapshot_bytes=1 << 30,
            disk_free_bytes_min=0,
            queue_bytes_max=1 << 30,
        )
        actors = start_actors(spec, NAMESPACE, num_cpus=0.1)
        wait_for_actors(actors)
        newest_ms = asyncio.run(self._load_actor(CallIngest(ActorCalls(actors)), layout))
        return CallRead(ActorCalls(actors), shard_map), plan_of(layout), newest_ms

    async def _load_actor(self, ingest: Any, layout: Layout) -> int:
        events = Events(layout, self._sizes.middle)
        for batch in events.batches(events.everyone(), START_MS, START_MS + _HOUR_MS):
            await ingest.ingest(0, ShardEvents.judged(_SOURCE, batch.events, batch.arrivals, START_MS), ())
        return events.newest_ms

    # -- check

    def check(self, steps: Steps) -> list[str]:
        assert self._reader is not None
        with steps.step("check", len(self._stores)) as advance:
            for name, store in self._stores.items():
                if name == _DEDUPED:
                    store.apply_again()  # and nothing changes
                rows: FeatureRows = self._reader.call(
                    "rows", name, store.events.sample.tolist(), store.events.newest_ms
                )
                self._wrong += store.problems(rows)
                self._figures["values_checked"] = self._figures.get("values_checked", 0) + rows.matrix.size
                advance(1, name)
        return self._wrong

    # -- metrics and end

    def metrics(self) -> dict[str, Any]:
        (small, middle, large), runs = self._names, self._runs
        figures = dict(self._figures)
        for name in self._names:
            figures[f"ingest_events_per_s_{name}"] = round(median_of(runs[f"ingest {name}"], 0))
        figures[f"ingest_deduped_events_per_s_{middle}"] = round(median_of(runs[f"ingest {_DEDUPED}"], 0))
        figures["busy_ingest_events_per_s"] = round(median_of(runs["busy ingest"], 0))
        for figure, run in {
            "read_1_p50_us": f"p50 {middle} 1",
            "read_1_p99_us": f"p99 {middle} 1",
            "read_1_p99_busy_us": f"p99 {middle} 1 busy",
            f"read_1_p50_us_{small}": f"p50 {_SPARSE} 1",
            f"read_1_p50_us_{small}_dense": f"p50 {small} 1",
            f"read_1_p50_us_{large}": f"p50 {large} 1",
            "read_1000_p50_us": f"p50 {middle} {_BATCH_IDS}",
            "read_1000_p99_us": f"p99 {middle} {_BATCH_IDS}",
        }.items():
            figures[figure] = median_of(runs[run], 2)
        figures[f"ingest_{large}_vs_{middle}_ratio"] = ratio(
            figures, f"ingest_events_per_s_{large}", f"ingest_events_per_s_{middle}"
        )
        figures[f"read_{large}_vs_{small}_ratio"] = ratio(figures, f"read_1_p50_us_{large}", f"read_1_p50_us_{small}")
        figures["read_p99_busy_ratio"] = ratio(figures, "read_1_p99_busy_us", "read_1_p99_us")
        if "p50 call" in runs:
            figures["actor_read_1_p50_us"] = median_of(runs["p50 call"], 1)
            beside = {"beside": median_of(runs["p50 beside calls"], 2), **figures}
            figures["read_vs_actor_call_ratio"] = ratio(beside, "actor_read_1_p50_us", "beside")
        figures["events"] = sum(store.events.count for store in self._stores.values())
        return {name: figures[name] for name in self.meanings if name in figures}

    @property
    def evidence(self) -> Evidence:
        return Evidence()

    def close(self) -> None:
        try:
            if self._cluster is not None:
                self._cluster.stop()
            if self._reader is not None:
                self._reader.close()
        finally:
            self._folder.remove()
            self._home.remove()


def turned(kinds: list[Any], r: int) -> list[Any]:
    """Return the kinds in their order, beginning with another in each round."""
    return kinds[r % len(kinds) :] + kinds[: r % len(kinds)]


def quantile_us(took_ns: Ints, q: float) -> float:
    """Return a quantile that was measured, in us."""
    return float(np.quantile(took_ns, q, method="inverted_cdf")) / 1_000


def make(config: Config, options: Options) -> StoreWorkload:
    return StoreWorkload(config, QUICK if options.quick else FULL, options.measured_seconds, ray=options.ray)
