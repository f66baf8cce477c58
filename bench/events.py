"""`millpond bench events`: events a second, synced, over HTTP, and whether a score after an ack has them.

1. Start a cluster of its own in a temporary directory: two shards, a source, views of two keys.
2. Three rounds, in which three kinds of bodies take turns, each round beginning with another: Arrow bodies of 10,000
   events and JSON arrays of 1,000, over 4 connections; single events over 32. Bodies are prepared before the clock
   starts, and each event id is sent once in the whole run.
3. Pairs of a write and a score of what was written, each pair of a user and an item of its own.
4. Check: no request failed; no score was stale; the events of all users, and of all items, are in sum those
   acknowledged.

Beside them: how fast the same bodies are decoded in one process, and how fast the disk syncs. Client, proxy, replica
and shards share the cores of one machine.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millpond.bench import accounts, reference
from millpond.bench.ledger import read_accounts
from millpond.bench.load import Outcome, quantile
from millpond.bench.options import Options
from millpond.bench.processes import cpu_seconds
from millpond.bench.testbed import SHARDS as SHARD_TITLES
from millpond.bench.testbed import Testbed
from millpond.bench.workload import Advance, Evidence, Steps, median_of
from millpond.cluster.config import Config
from millpond.cluster.demo.session import ARROW_STREAM, Session
from millpond.feature_actors.decode import Decoder

__all__ = [
    "KINDS",
    "EventBodies",
    "EventsWorkload",
    "Kind",
    "arrow_body",
    "figures_of",
    "json_bodies",
    "make",
]

SEED = 0
ROUNDS = 3
SHARDS = 2
ITEMS = 10_000
PAIRS = 10_000
_PATH = f"/v1/events/{reference.activity.name}"
_PAIR_THREADS = 8
_JSON = "application/json"
#: So many events go through the span of time; those after them are of now. Neighbours are so far out of order.
_EVENTS_IN_SPAN, _JITTER_MS = 10_000_000, 5_000
#: Of the bodies of one measurement: they are in memory a few times while they go to the load generator.
_BODY_BYTES_MAX = 256 * 2**20
#: Prepared for a measurement, so many times what the one before it has used.
_SPARE = 1.5
_WARM_S = 0.5


@dataclass(frozen=True)
class Kind:
    """One kind of bodies. first_per_s: events that the first measurement is prepared for."""

    name: str
    content_type: str
    events: int
    connections: int
    first_per_s: int


KINDS = (
    Kind("arrow_10000", ARROW_STREAM, 10_000, 4, 600_000),
    Kind("json_1000", _JSON, 1_000, 4, 300_000),
    Kind("single_32", _JSON, 1, 32, 8_000),
)
_REPLICA = ("ray::ServeReplica:bench-events:",)

MEANINGS = {
    "arrow_10000_events_per_s": "Arrow bodies of 10,000 events, 4 connections, synced",
    "json_1000_events_per_s": "JSON arrays of 1,000 events, 4 connections, synced",
    "single_32_requests_per_s": "one event a request, 32 connections, synced",
    "single_32_p50_ms": "half of the acks took at most",
    "single_32_p99_ms": "99 of 100 took at most",
    "arrow_10000_p50_ms": "",
    "json_1000_p50_ms": "",
    "arrow_10000_decode_events_per_s": "the same bodies, only decoded, in one process",
    "json_1000_decode_events_per_s": "",
    "single_32_decode_events_per_s": "",
    "fdatasync_4kb_p50_ms": "append 4 KB to a file of the data directory and sync it",
    "fdatasync_1mb_p50_ms": "",
    "log_bytes_per_event": "what the shards' directories grew by, of all measurements",
    "arrow_10000_replica_cpu_us": "processor time an event, of the events replica",
    "arrow_10000_shards_cpu_us": "of the shards",
    "json_1000_replica_cpu_us": "",
    "json_1000_shards_cpu_us": "",
    "single_32_replica_cpu_us": "",
    "single_32_shards_cpu_us": "",
    "arrow_10000_load_cores": "cores that the load generator took",
    "json_1000_load_cores": "",
    "single_32_load_cores": "",
    "stale_reads": "scores sent after an ack that did not have the event",
    "write_read_pairs": f"writes, each followed by a score on another connection, {_PAIR_THREADS} threads",
    "write_read_p50_ms": "a write and its score",
    "acked_events": "all events of the run; as many are in the views of either key",
    "users": "",
    "items": "",
    "measured_seconds": "length of each measurement",
    "rounds": "medians of so many",
    "durability": "",
    "proxy": "ingress",
    "shards": "",
    "replicas": "",
}


class EventBodies:
    """Bodies of events of the reference load's kind, as many as are asked for, no event id twice.

    Users and items are drawn uniformly. Times go through the span before `now_ms`, in order but for some seconds, as
    those of the reference load do. Amounts are whole numbers, so that sums are exact.
    """

    def __init__(
        self,
        seed: int,
        now_ms: int,
        *,
        users: int = reference.USERS,
        items: int = ITEMS,
        span_ms: int = reference.SPAN_MS,
    ) -> None:
        self._seed, self._now_ms, self._span_ms = seed, now_ms, span_ms
        self.users, self.items = users, items
        self._draw = np.random.default_rng(seed)
        self._item_names = pa.array([f"item-{i}" for i in range(items)])
        self._categories = pa.array([f"category-{c:02d}" for c in range(20)])
        self.count = 0

    def table(self, n: int) -> pa.Table:
        """Return the next n events, as the columns of the source."""
        draw = self._draw
        places = np.arange(self.count, self.count + n)
        numbers = pa.array(places).cast(pa.string())
        self.count += n
        item = draw.integers(0, self.items, n)
        age_ms = self._span_ms - places * self._span_ms // _EVENTS_IN_SPAN - draw.integers(0, _JITTER_MS, n)
        times = self._now_ms - np.maximum(age_ms, reference.GAP_MS)
        return pa.table(
            {
                "event_id": pc.binary_join_element_wise(f"{self._seed}", numbers, "-"),
                "user_id": pa.array(draw.integers(0, self.users, n)),
                "item_id": self._item_names.take(pa.array(item)),
                "category": self._categories.take(pa.array(item % 20)),
                "amount": pa.array(draw.integers(1, 100, n).astype(np.float64)),
                "event_time": pa.array(times).cast(pa.timestamp("ms", tz="UTC")),
            }
        )

    def bodies(self, kind: Kind, events: int) -> list[bytes]:
        """Return bodies of at least one and at most so many events, and of no more than 256 MB."""
        bodies: list[bytes] = []
        size = 0
        for n in self._parts(kind, events):
            made = (
                [arrow_body(self.table(n))]
                if kind.content_type == ARROW_STREAM
                else json_bodies(self.table(n), kind.events)
            )
            bodies += made
            size += sum(map(len, made))
            if size > _BODY_BYTES_MAX:
                break
        return bodies

    def _parts(self, kind: Kind, events: int) -> Iterator[int]:
        whole = max(1, events // kind.events) * kind.events
        part = kind.events * max(1, 10_000 // kind.events)
        for at in range(0, whole, part):
            yield min(part, whole - at)


def arrow_body(table: pa.Table) -> bytes:
    """Return a table as one Arrow IPC stream of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def json_bodies(table: pa.Table, events: int) -> list[bytes]:
    """Return events as JSON, so many in an array, or each as an object. Column by column: 2 M events/s."""
    parts: list[Any] = []
    for name in table.column_names:
        column = table[name].combine_chunks()
        quote = '"' if pa.types.is_string(column.type) else ""
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.int64())
        text = column if quote else column.cast(pa.string())
        parts += [("," if parts else "{") + f'"{name}":{quote}', text, *([quote] if quote else [])]
    objects = pc.binary_join_element_wise(*parts, "}", "")
    if events == 1:
        return [text.encode() for text in objects.to_pylist()]
    offsets = pa.array(range(0, len(objects) + 1, events), pa.int32())
    arrays = pc.binary_join(pa.ListArray.from_arrays(offsets, objects), ",")
    return [b"[%s]" % text.encode() for text in arrays.to_pylist()]


def figures_of(
    outcomes: Mapping[str, list[Outcome]], cpu_of: Mapping[str, list[tuple[float, float]]]
) -> dict[str, Any]:
    """Return medians of the rounds. cpu_of: per kind and round, processor seconds of the replica and of the shards."""
    figures: dict[str, Any] = {}
    for kind in KINDS:
        runs = outcomes[kind.name]
        rate = median_of([o.requests_per_s * kind.events for o in runs], 1)
        if kind.events == 1:
            figures[f"{kind.name}_requests_per_s"] = rate
            figures[f"{kind.name}_p99_ms"] = median_of([o.latency_ms(0.99) for o in runs], 3)
        else:
            figures[f"{kind.name}_events_per_s"] = round(rate)
        figures[f"{kind.name}_p50_ms"] = median_of([o.latency_ms(0.5) for o in runs], 3)
        for i, part in enumerate(("replica", "shards")):
            each = [cpu[i] / (o.checked * kind.events) * 1e6 for cpu, o in zip(cpu_of[kind.name], runs, strict=True)]
            figures[f"{kind.name}_{part}_cpu_us"] = median_of(each, 2)
        figures[f"{kind.name}_load_cores"] = median_of([o.cpu_seconds / o.wall_seconds for o in runs], 2)
    return figures


class EventsWorkload:
    """The events endpoint, synced, into views of two keys."""

    name = "events"
    seed = SEED
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, seconds: float, *, rounds: int = ROUNDS, pairs: int = PAIRS) -> None:
        self._bed = Testbed(config, [Path(accounts.__file__)], shards=SHARDS)
        self._seconds, self._rounds, self._pairs = seconds, rounds, pairs
        self._made = EventBodies(SEED, int(time.time() * 1000))
        self._rates: dict[str, float] = {}
        self._cpu_of: dict[str, list[tuple[float, float]]] = {}
        self._acked = 0
        self._wrong = self._bed.wrong
        self._figures: dict[str, Any] = {
            "measured_seconds": seconds,
            "rounds": rounds,
            "users": self._made.users,
            "items": self._made.items,
        }

    # -- setup

    def setup(self, steps: Steps) -> None:
        self._bed.start(steps)
        with steps.step("beside: disk and decoder"):
            for name, size in (("4kb", 4_096), ("1mb", 2**20)):
                self._figures[f"fdatasync_{name}_p50_ms"] = fdatasync_p50_ms(self._bed.config.directory, size)
            for kind in KINDS:
                self._figures[f"{kind.name}_decode_events_per_s"] = decode_events_per_s(
                    self._made.bodies(kind, max(20_000, kind.events)), kind
                )

    # -- start

    def start(self, steps: Steps) -> None:
        for kind in KINDS:
            self._run(kind, min(1.0, self._seconds), warm=True)
        before = size_bytes(self._bed.config.directory / "shards"), self._acked
        with steps.step("measure", self._rounds * len(KINDS)) as advance:
            for r in range(self._rounds):
                for kind in KINDS[r % len(KINDS) :] + KINDS[: r % len(KINDS)]:
                    self._measure(kind, steps, advance)
        grown = size_bytes(self._bed.config.directory / "shards") - before[0]
        self._figures["log_bytes_per_event"] = round(grown / (self._acked - before[1]), 1)
        with steps.step("write and score", self._pairs) as advance:
            self._write_and_score(advance)

    def _measure(self, kind: Kind, steps: Steps, advance: Advance) -> None:
        advance(0, f"{kind.name} ...")
        before_s = cpu_seconds(_REPLICA), cpu_seconds(SHARD_TITLES)
        outcome = self._run(kind, self._seconds)
        after_s = cpu_seconds(_REPLICA), cpu_seconds(SHARD_TITLES)
        self._cpu_of.setdefault(kind.name, []).append((after_s[0] - before_s[0], after_s[1] - before_s[1]))
        advance(1, f"{kind.name} {outcome.requests_per_s * kind.events:,.0f} events/s")
        self._bed.say(steps, kind.name, outcome, "events/s", kind.events)

    def _run(self, kind: Kind, seconds: float, *, warm: bool = False) -> Outcome:
        per_s = max(self._rates.get(kind.name, 0.0) * _SPARE, kind.first_per_s)
        load = self._bed.load(
            _PATH,
            self._made.bodies(kind, int(per_s * (seconds + _WARM_S))),
            connections=kind.connections,
            seconds=seconds,
            warm_seconds=_WARM_S,
            texts=[(b'"accepted":%d,' % kind.events, 1), (b'"duplicates":0,', 1), (b'"conflicts":0,', 1)],
            content_type=kind.content_type,
            once=True,
        )
        outcome = self._bed.run(load, None if warm else kind.name, none_is_fine=warm)
        self._acked += (outcome.checked - outcome.failed) * kind.events
        self._rates[kind.name] = outcome.requests_per_s * kind.events
        return outcome

    def _write_and_score(self, advance: Advance) -> None:
        """Write an event of a user and an item that are nobody else's, and score both when it is acknowledged."""
        lock, done, stale, failures = threading.Lock(), [0.0] * 0, [0], list[str]()

        def pairs(thread: int) -> None:
            writer, reader = Session(self._bed.url), Session(self._bed.url)
            for number in range(thread, self._pairs, _PAIR_THREADS):
                user, item = self._made.users + number, f"pair-{number}"
                event = {
                    "event_id": item,
                    "user_id": user,
                    "item_id": item,
                    "category": "pair",
                    "amount": 1.0,
                    "event_time": int(time.time() * 1000) - 1,
                }
                begun = time.perf_counter()
                ack = writer.post(_PATH, msgspec.json.encode(event))
                score = ack and reader.post(
                    "/v1/score/pair_account", b'{"user_id":%d,"item_id":"%s"}' % (user, item.encode())
                )
                took = time.perf_counter() - begun
                with lock:
                    if not score or ack["accepted"] != 1:
                        failures.append(str(writer.first_failure or reader.first_failure or ack))
                        break
                    done.append(took)
                    stale[0] += score["result"] != [1.0, 1.0]
                    advance(1, "")
            writer.close()
            reader.close()

        threads = [threading.Thread(target=pairs, args=(t,)) for t in range(_PAIR_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._acked += len(done)
        self._figures |= {"stale_reads": stale[0], "write_read_pairs": len(done)}
        self._figures["write_read_p50_ms"] = round(quantile(done, 0.5) * 1e3, 3)
        if failures:
            self._wrong.append(f"every write and every score is answered: {failures[0]}")
        if stale[0]:
            self._wrong.append(f"a score after an ack has the event: {stale[0]} of {len(done)} had not")

    # -- check

    def check(self, steps: Steps) -> list[str]:
        users = list(range(self._made.users + self._pairs))
        items = [f"item-{i}" for i in range(self._made.items)] + [f"pair-{i}" for i in range(self._pairs)]
        with steps.step("check", len(users) + len(items)) as advance:
            for model, key, values in (("user_account", "user_id", users), ("item_account", "item_id", items)):
                found = read_accounts(self._bed.url, model, key, values, lambda n: advance(n, ""))
                events = int(found[:, 0].sum())
                if events != self._acked:
                    self._wrong.append(
                        f"every acknowledged event is counted once: {self._acked} were acknowledged, `{model}` counts "
                        f"{events}"
                    )
        self._figures["acked_events"] = self._acked
        return self._wrong

    # -- metrics and end

    def metrics(self) -> dict[str, Any]:
        figures = {**figures_of(self._bed.outcomes, self._cpu_of), **self._figures, **self._bed.settings}
        return {name: figures[name] for name in MEANINGS if name in figures}

    @property
    def evidence(self) -> Evidence:
        return self._bed.evidence()

    def close(self) -> None:
        self._bed.close()


def decode_events_per_s(bodies: list[bytes], kind: Kind, seconds: float = 0.5) -> int:
    """Return how many events a second one thread decodes of these bodies."""
    decode = Decoder(accounts.activity, key_fields=("user_id", "item_id")).decode
    decode(bodies[0], kind.content_type)
    events, begun = 0, time.perf_counter()
    while (took := time.perf_counter() - begun) < seconds:
        for body in bodies[: max(1, 1_000 // kind.events)]:
            events += decode(body, kind.content_type).num_rows
    return round(events / took)


def fdatasync_p50_ms(directory: Path, size: int, times: int = 50) -> float:
    """Return how long it takes to append so many bytes to a file and have them on the disk, the median."""
    took, block = [], os.urandom(size)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".sync-") as file:
        for _ in range(times):
            begun = time.perf_counter()
            os.write(file.fileno(), block)
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - begun) * 1e3)
    return round(quantile(took, 0.5), 3)


def size_bytes(directory: Path) -> int:
    """Return the bytes of all files below a directory; a file may go away meanwhile."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def make(config: Config, options: Options) -> EventsWorkload:
    pairs = 400 if options.quick else PAIRS
    return EventsWorkload(config, options.measured_seconds, rounds=options.measured_rounds, pairs=pairs)
