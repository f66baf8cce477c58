"""The processes of the stress test of shared memory: one writer, several readers, and the events they agree on.

    memory_stress.py writer FOLDER PAGE SEED EPOCH      writes until it is killed or told to stop
    memory_stress.py reader FOLDER PAGE SEED NUMBER     reads and checks until it is told to stop

Event j is a function of j, so whoever knows how many events were applied knows what a read must answer. Each second
of the script 1,000 events come, ten of each shop; a sixth of them are the first of a new user, who is gone after 24 s.
The script runs as fast as the writer can: a user is born, dies and is reclaimed within a second or so.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors import Count, FeatureView, Last, LastN, Max, Mean, Min, Source, Std, Sum, TopK, TopKCounts
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.reader import MemoryRead, SlotBusy
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import Control, Memory
from millpond.feature_actors.tiles.read import EPOCH

Ints = npt.NDArray[np.int64]

# Words of the page that all processes share: how many events a writer has acknowledged and begun, the epoch whose
# writer is ready and the one whose turn it is, whether to stop; and per reader the epoch that it reads and how often
# it has read.
ACKED, BEGUN, READY, GO, STOP, READERS = range(6)
PAGE_WORDS = 64

SLOTS = ShardMap.even(32, 1)
MEMORY_BYTES_MAX = 8 << 30
RECLAIM_MARGIN_MS = 10_000
BATCH_MAX, REPLAY_BATCH = 2_000, 16_000
#: No read may take more processor time (a loaded machine may take its time): the process is ended then, wherever it is.
READ_S_MAX = 2.0

T0 = 1_700_000_000_000
SHOPS, STRIDE = 100, 7
#: New users come every so many blocks of an event per shop; a user's events are spread over so many times that.
BLOCKS, SPREAD = 6, 40
#: A user has some six events, and never as many as this.
_EVENTS_MAX = 32
#: Beyond every event.
_NEVER = 1 << 60

payments = Source(
    "payments",
    owner="tests",
    fields={
        "user_id": "int64",
        "shop_id": "int64",
        "tag": "string",
        "amount": "float64",
        "at": "timestamp[ms, UTC]",
    },
    event_time="at",
)
users = FeatureView(  # they die
    "users", owner="tests", source=payments, key=["user_id"],
    features={
        "n_2s": Count(window="2s"), "n_10s": Count(window="10s"), "n_60s": Count(window="60s"),
        "n_exact": Count(window="60s", exact=True), "n_ttl": Count(ttl="20s"),
        "n_dear": Count(window="60s", where=pc.field("amount") > 50),
        "sum_2s": Sum("amount", window="2s"), "sum_10s": Sum("amount", window="10s"),
        "sum_60s": Sum("amount", window="60s"), "sum_exact": Sum("amount", window="60s", exact=True),
        "sum_ttl": Sum("amount", ttl="20s"),
        "min_60s": Min("amount", window="60s"), "max_60s": Max("amount", window="60s"),
        "mean_60s": Mean("amount", window="60s"), "std_60s": Std("amount", window="60s"),
        "last_60s": Last("amount", window="60s"), "text_60s": Last("tag", window="60s"),
        "recent_60s": LastN("amount", window="60s", n=3),
        "last_exact": Last("amount", window="60s", exact=True), "text_exact": Last("tag", window="60s", exact=True),
    },
)  # fmt: skip
shops = FeatureView(  # few and busy
    "shops", owner="tests", source=payments, key=["shop_id"],
    features={
        "n": Count(), "sum": Sum("amount"), "min": Min("amount"), "max": Max("amount"), "mean": Mean("amount"),
        "std": Std("amount"), "last": Last("amount"), "text": Last("tag"), "recent": LastN("amount", n=5),
        "n_2s": Count(window="2s"), "sum_2s": Sum("amount", window="2s"), "n_10s": Count(window="10s"),
        "top": TopK("amount", k=2, m=4), "tops": TopKCounts("amount", k=2, m=4),
    },
)  # fmt: skip
ever = FeatureView(  # more and more
    "ever", owner="tests", source=payments, key=["user_id", "tag"],
    features={"n": Count(), "sum": Sum("amount"), "last": Last("amount"), "text": Last("tag")},
)  # fmt: skip
VIEWS = [users, shops, ever]
LAYOUT = compile_layout([payments], VIEWS)
_TAGS = np.array([f"t{shop}" for shop in range(SHOPS)])
TAGS = pa.array(_TAGS)


class Script:
    """The events, by their number, and what they amount to."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._ages = random.integers(0, SPREAD, 1_009)
        self._blocks_of: dict[int, Ints] = {}
        self._lags = random.choice([0, 0, 0, 1, 100, 400], 1_013)

    def times(self, events: Ints) -> Ints:
        return T0 + events - self._lags[events % len(self._lags)]

    def users_of(self, events: Ints) -> Ints:
        block = events // SHOPS
        born = block // BLOCKS - self._ages[block % len(self._ages)] + SPREAD
        return born * SHOPS + events * STRIDE % SHOPS

    def batch(self, start: int, end: int) -> tuple[pa.RecordBatch, Ints]:
        """Return the events from start to end, and their arrival stamps."""
        events = np.arange(start, end)
        user = self.users_of(events)
        shop = user % SHOPS
        columns = [user, shop, TAGS.take(pa.array(shop)), amount_of(user), self.times(events)]
        arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, payments.schema, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=payments.schema), T0 + events

    def events_of_users(self, user: Ints) -> Ints:
        """Return the numbers of the events of each user, int64 [n, most], ascending and filled up by `_NEVER`."""
        return np.array([self._blocks(born) for born in (user // SHOPS).tolist()]) + _place(user)[:, np.newaxis]

    def _blocks(self, born: int) -> Ints:
        """Return the numbers at which the blocks begin in which the users born together have an event."""
        if born not in self._blocks_of:
            block = max(born - SPREAD, 0) * BLOCKS + np.arange(SPREAD * BLOCKS)
            block = block[block // BLOCKS - self._ages[block % len(self._ages)] + SPREAD == born]
            self._blocks_of[born] = np.pad(block * SHOPS, (0, _EVENTS_MAX - len(block)), constant_values=_NEVER)
        return self._blocks_of[born]

    def events_of_shops(self, shop: Ints, end: int) -> Ints:
        """Return how many of the first `end` events are of each shop."""
        return (end - _place(shop) + SHOPS - 1) // SHOPS

    def some_users(self, random: np.random.Generator, n: int, acked: int, begun: int) -> Ints:
        """Return users of whom some are long gone and some not born yet, or those who are being written just now."""
        if random.random() < 0.5:
            return self.users_of(random.integers(acked, max(begun, acked + 1), n))
        newest = begun // (SHOPS * BLOCKS) + SPREAD
        return random.integers(max(newest - SPREAD - 130, 0), newest + 2, n) * SHOPS + random.integers(0, SHOPS, n)


def _place(shop: Ints) -> Ints:
    """Return the place of a shop in every block."""
    return shop % SHOPS * pow(STRIDE, -1, SHOPS) % SHOPS


def amount_of(user: Ints) -> npt.NDArray[np.float64]:
    """Return the amount of all events of a user, and of a shop: small whole numbers, whose sums are exact."""
    return (1 + user % SHOPS % 97).astype(np.float64)


def open_page(path: Path) -> Ints:
    return np.memmap(path, np.int64, "r+", shape=(PAGE_WORDS,))


# -- the writer


def write(folder: Path, page: Ints, seed: int, epoch: int) -> dict[str, Any]:
    """Wait for the turn of this epoch, replay what was acknowledged, publish it, and go on until told to stop."""
    parent, random, script = os.getppid(), np.random.default_rng([seed, epoch]), Script(seed)
    events, arrivals = script.batch(0, 1)
    Shard(LAYOUT, SLOTS, 0).apply("payments", events, arrivals, T0)  # loads the kernels
    page[READY] = epoch
    while page[GO] < epoch:
        if page[STOP] or os.getppid() != parent:
            return {}
        time.sleep(0.005)
    control = Control(folder, 0, writable=True)
    memory = Memory.create(control.tiles_path(epoch), MEMORY_BYTES_MAX)
    shard = Shard(LAYOUT, SLOTS, 0, seed=seed, memory=memory, reclaim_margin_ms=RECLAIM_MARGIN_MS)

    def apply(start: int, end: int) -> None:
        events, arrivals = script.batch(start, end)
        shard.apply("payments", events, arrivals, int(arrivals[-1]))

    acked = replayed = max(int(page[ACKED]), 1)  # before the first event there is no as-of
    page[BEGUN] = max(page[BEGUN], acked)
    for start in range(0, acked, REPLAY_BATCH):
        apply(start, min(start + REPLAY_BATCH, acked))
    control.publish(epoch)
    while not page[STOP] and os.getppid() == parent:
        end = acked + int(random.integers(1, BATCH_MAX))
        page[BEGUN] = max(page[BEGUN], end)  # of a predecessor's last batch more may be seen
        apply(acked, end)
        page[ACKED] = acked = end
        if random.random() < 0.005:
            shard.reclaim()
    return {
        "events": acked,
        "written": acked - replayed,
        "entities": shard.status().entities,
        "problems": shard.check(),
    }


# -- the readers


class Reader:
    """One reader process: what it has read, and what it holds against it."""

    def __init__(self, folder: Path, page: Ints, seed: int, number: int) -> None:
        self._page, self._number = page, number
        self._random, self._script = np.random.default_rng([seed, 1_000 + number]), Script(seed)
        self._control = Control(folder, 0)
        self._port = MemoryRead(SLOTS, folder)
        self._plans = {v.name: ReadPlan(LAYOUT, list(v), "stress") for v in VIEWS}
        self._all = ReadPlan(LAYOUT, [f for v in VIEWS for f in v], "stress")
        self._totals = Counter[str]()
        self._epochs: dict[int, None] = {}
        self._slowest_s, self._slowest_of = 0.0, ""
        self._dead_busy_s: list[float] = []
        self._stuck: dict[int, set[tuple[str, int]]] = {}
        self._seen = {name: Seen() for name in ("shops", "ever")}

    async def run(self) -> dict[str, Any]:
        parent = os.getppid()
        await self._port.read(self._all.question({"user_id": [0], "shop_id": [0], "tag": [""]}, 1, None, None))  # loads
        while not self._page[STOP] and os.getppid() == parent:
            n = (1, 50, 1, 50, 500)[self._random.integers(0, 5)]
            user = self._script.some_users(self._random, n, int(self._page[ACKED]), int(self._page[BEGUN]))
            plan = [self._all, *self._plans.values()][self._random.integers(0, 4)]
            dead = not self._control.writer_lives
            if not await self.read(plan, user, dead) and dead:
                await self.pinpoint(user[:50])
            self._page[READERS + 2 * self._number] = self._epoch
            self._page[READERS + 2 * self._number + 1] = self._totals["reads"]
        busy_s = statistics.median(self._dead_busy_s or [0.0])
        assert busy_s < 0.05, f"a half-written slot of a dead writer took {busy_s} s to answer"
        return {
            **self._totals,
            "epochs": list(self._epochs),
            "stuck_slots": sum(map(len, self._stuck.values())),
            "slowest_ms": round(1e3 * self._slowest_s, 1),
            "slowest_of": self._slowest_of,
            "busy_dead_ms": round(1e3 * busy_s, 2),
        }

    @property
    def _epoch(self) -> int:
        return int(self._port._reader.shards[EPOCH, 0])

    async def read(self, plan: ReadPlan, user: Ints, dead: bool) -> bool:
        """Read once and check the answer; return whether there was one."""
        n = len(user)
        keys = {"user_id": pa.array(user), "shop_id": pa.array(user % SHOPS), "tag": TAGS.take(pa.array(user % SHOPS))}
        question = plan.question({name: keys[name] for name in plan.key_fields}, n, None, None)
        acked, start, busy = int(self._page[ACKED]), time.perf_counter(), False
        signal.setitimer(signal.ITIMER_PROF, READ_S_MAX)
        try:
            answer = await self._port.read(question)
        except SlotBusy:
            busy = True
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        took = time.perf_counter() - start
        begun = int(self._page[BEGUN])
        if took > self._slowest_s:
            self._slowest_s = took
            self._slowest_of = f"{n} ids, epoch {self._epoch}, {'dead' if dead else 'live'}, {busy=}"
        self._totals["reads"] += 1
        self._totals["ids"] += n
        self._totals["dead_reads"] += dead
        if busy:
            self._totals["busy_live" if self._control.writer_lives else "busy_dead"] += 1
            if dead:
                self._dead_busy_s.append(took)
            return False
        self._epochs.setdefault(self._epoch)
        self.check(plan, plan.rows(answer), user, acked, begun)
        return True

    async def pinpoint(self, user: Ints) -> None:
        """Ask one by one: of a writer that died, one slot at most is half-written, and all others answer."""
        epoch = self._epoch
        for name, plan in self._plans.items():
            for i in range(len(user)):
                answered = await self.read(plan, user[i : i + 1], True)
                if self._control.epoch != epoch or self._control.writer_lives:
                    return  # a successor is there
                if not answered:
                    one = int(user[i])
                    key = {"user_id": [one], "shop_id": [one % SHOPS], "tag": [f"t{one % SHOPS}"]}
                    hashes = plan.question({k: key[k] for k in plan.key_fields}, 1, None, None).hashes
                    stuck = self._stuck.setdefault(epoch, set())
                    stuck.add((name, int(hashes[0, 0, 1].view(np.uint64)) % SLOTS.n_slots))
                    assert len(stuck) <= 1, f"epoch {epoch}: more than one slot is half-written: {stuck}"

    def check(self, plan: ReadPlan, rows: FeatureRows, user: Ints, acked: int, begun: int) -> None:
        """Hold an answer against the script: no less than the `acked` first events, and no more than those begun."""
        of = {name: rows.matrix[:, i] for i, name in enumerate(plan.names)} | {
            name: np.array([text or "" for text in texts]) for name, texts in rows.texts.items()
        }
        c, as_of = amount_of(user), rows.as_of
        tags = _TAGS[user % SHOPS]
        # Wrong where True.
        wrong = {"as_of is of the events applied": (as_of < T0 + acked - 1) | (as_of >= T0 + max(begun, 1))}

        def same(view: str, n: Any, suffix: str = "") -> None:
            """All values of an entity are c."""
            some, none = n > 0, n == 0
            for kind in ("min", "max", "mean", "last", "std", *(f"recent[{k}]" for k in range(5))):
                name, bracket, place = kind.partition("[")
                if (got := of.get(f"{view}.{name}{suffix}{bracket}{place}")) is not None:
                    there = n > int(place[:-1]) if bracket else some
                    wrong[f"{kind}{suffix}"] = np.where(there, got != (0.0 if kind == "std" else c), ~np.isnan(got))
            if (got := of.get(f"{view}.sum{suffix}")) is not None:
                wrong[f"sum{suffix} == count x c"] = got != n * c
            if (got := of.get(f"{view}.text{suffix}")) is not None:
                wrong[f"text{suffix}"] = (some & (got != tags)) | (none & (got != ""))

        def between(name: str, least: Any, got: Any, most: Any) -> None:
            wrong[f"least <= {name} <= most"] = (got < least) | (got > most)

        for view in plan.views:
            known = np.array([view not in names for names in rows.unknown])
            if view == "users":
                n = {w: of[f"users.n_{w}"] for w in ("2s", "10s", "60s", "exact", "ttl")}
                for w in n:
                    same(view, n[w], f"_{w}")
                wrong["2s <= 10s <= 60s"] = (n["2s"] > n["10s"]) | (n["10s"] > n["60s"])
                wrong["exact <= tiles"] = n["exact"] > n["60s"]
                wrong["where"] = of["users.n_dear"] != n["60s"] * (c > 50)
                wrong["known"] = known != ((n["60s"] > 0) | (n["ttl"] > 0))
                events = self._script.events_of_users(user)
                times = np.where(events < _NEVER, self._script.times(events % _NEVER), 0)
                # What is applied later may take away what a window as of then does not see.
                for w, window, width in (("2s", 2_000, 10), ("10s", 10_000, 100), ("60s", 60_000, 1_000)):
                    first, surely = ((at - window) // width * width for at in (as_of, T0 + begun))
                    least = ((events < acked) & (times >= surely)).sum(1)
                    between(w, least, n[w], ((events < begun) & (times >= first[:, np.newaxis])).sum(1))
                least = ((events < acked) & (times > T0 + begun - 60_000)).sum(1)
                most = ((events < begun) & (times > as_of[:, np.newaxis] - 60_000)).sum(1)
                between("exact", least, n["exact"], most)
                continue
            n = of[f"{view}.n"]
            same(view, n)
            wrong[f"{view} known"] = known != (n > 0)
            if view == "shops":
                same(view, of["shops.n_2s"], "_2s")
                wrong["top"] = (n > 0) & (of["shops.top[0]"] != of["shops.last"]) | (of["shops.tops[0]"] != n)
                wrong["one top"] = ~np.isnan(of["shops.top[1]"]) | (of["shops.tops[1]"] != 0)
                wrong["shops 2s <= 10s <= ever"] = (of["shops.n_2s"] > of["shops.n_10s"]) | (of["shops.n_10s"] > n)
                least, most = (self._script.events_of_shops(user, end) for end in (acked, begun))
            else:
                events = self._script.events_of_users(user)
                least, most = ((events < end).sum(1) for end in (acked, begun))
            between(f"{view} count", least, n, most)
            key = user % SHOPS if view == "shops" else user
            wrong[f"{view} never goes back"] = self._seen[view].goes_back(self._epoch, key, as_of, n)
        for what, which in wrong.items():
            if which.any():
                i = int(np.flatnonzero(which)[0])
                values = {name: column[i].item() for name, column in of.items()}
                sys.exit(
                    f"WRONG ({int(which.sum())} of {len(user)} rows): {what}: user {user[i]} (c = {c[i]}), {values}, "
                    f"epoch {self._epoch}, as_of {as_of[i]} = T0 + {as_of[i] - T0}, {acked=}, {begun=}, "
                    f"unknown {rows.unknown[i]}"
                )


class Seen:
    """The as-of and count of the entities read lately, within an epoch."""

    _SIZE = 1 << 16

    def __init__(self) -> None:
        self._epoch = 0
        self._lines = np.zeros((self._SIZE, 3), np.int64)

    def goes_back(self, epoch: int, keys: Ints, as_of: Ints, counts: Any) -> npt.NDArray[np.bool_]:
        if epoch != self._epoch:
            self._epoch, self._lines[:, 0] = epoch, -1
        at = keys % self._SIZE
        key, old_as_of, old_count = self._lines[at].T
        back: npt.NDArray[np.bool_] = (key == keys) & ((as_of < old_as_of) | (counts < old_count))
        self._lines[at] = np.column_stack([keys, as_of, counts])
        return back


def read(folder: Path, page: Ints, seed: int, number: int) -> dict[str, Any]:
    faulthandler.register(signal.SIGPROF, chain=True)  # a read that spins is ended even in a kernel, and says where
    while Control(folder, 0).epoch == 0:  # nothing has been published yet
        time.sleep(0.01)
    return asyncio.run(Reader(folder, page, seed, number).run())


if __name__ == "__main__":
    role, folder, page, seed, number = sys.argv[1:]
    run = {"writer": write, "reader": read}[role]
    sys.stdout.write(json.dumps(run(Path(folder), open_page(Path(page)), int(seed), int(number))))
