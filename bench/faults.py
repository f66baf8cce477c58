"""`millpond bench faults`: processes are killed while events are written, and every acknowledged one counts once.

1. Start `millpond up` as a child process on a directory of its own: two shards, views of two keys, synced. Probes
   write to and score keys of each shard from now on, see `probes`.
2. For each kill: send a burst of events in bodies of any size over several connections, each body again and again
   until it is acknowledged; when a random share of the burst is, kill a process with SIGKILL. Go on when another is in
   its place, the burst is acknowledged, and every probe has been answered several times in a row. Where the cluster
   cannot recover by itself (its raylet is killed, or all of it), start `millpond up` again on the same directory.
   The last kill is of the whole cluster.
3. Check: the accounts of every user and item, number and sum, are what was acknowledged, and so they are when some
   bodies of any time of the run have been sent once more, each of whose events is a duplicate; no score missed an event
   that had been acknowledged before it was asked for; a clean stop ends well.

Everything is drawn from a seed, which is printed; only the moments differ from run to run.

recovery: from a kill until a write and a score of the shards concerned (the one whose process was killed, or all) were
answered again, both begun after the kill, and stayed so.
availability: the share of the time from the first kill to the last recovery in which keys were served, writes and
scores of each shard alike. availability_other_shards: the same of the shards that were not killed, within the
recoveries of those that were.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millpond.bench.accounts import activity
from millpond.bench.events import EventBodies, arrow_body, json_bodies
from millpond.bench.home import make_home
from millpond.bench.ledger import Floats, Ints, Ledger, differences, read_accounts
from millpond.bench.load import quantile
from millpond.bench.options import Options
from millpond.bench.probes import Log, ReadProber, WriteProber, available_share, failures_within, ids_on
from millpond.bench.retry import Connection, send_until_answered
from millpond.bench.up import KINDS, NEEDS_NEW_START, Up, Victim, until
from millpond.bench.workload import Evidence, Steps
from millpond.cluster.config import Config
from millpond.cluster.demo.session import ARROW_STREAM
from millpond.feature_actors.errors import BadRequest, MillpondError, Unavailable
from millpond.feature_actors.shard_map import ShardMap

__all__ = ["FaultsWorkload", "Strike", "make", "schedule"]

KILLS, EVENTS = 100, 1_000_000
#: Of each kind, if there are enough for all.
KILLS_OF_EACH_MIN = 10
SHARDS = 2
USERS, ITEMS = 20_000, 1_000
_WRITERS = 4
_BODY_EVENTS_MAX = 1_000
_SPAN_MS = 86_400_000
_PATH = f"/v1/events/{activity.name}"
_IN_A_ROW = 5
_REQUEST_S_MAX = 15.0
_RECOVERY_S_MAX = 180.0
_END_S_MAX = 60.0
#: One of so many bodies is sent again at the end, and no more than so many.
_AGAIN_EVERY, _AGAIN_MAX = 10, 100
_SHOWN_MAX = 5

MEANINGS = {
    "kills": "processes killed with SIGKILL, or whole clusters",
    "kills_by_kind": "",
    "acked_events": "acknowledged, of probes too",
    "retries": "requests sent again",
    "retries_by_cause": "status of the answer, or what came instead",
    "lost_events": "acknowledged and not counted, over all users and items",
    "double_counted_events": "",
    "stale_reads": "scores that missed an event acknowledged before",
    "resent_events": "sent once more at the end, all of them duplicates",
    "recovery_p50_s": "from a kill until writes and scores of the shards concerned were answered, and stayed so",
    "recovery_max_s": "",
    "recovery_p50_s_by_kind": "",
    "recovery_max_s_by_kind": "",
    "availability": "share of the time in which keys were served, writes and scores alike",
    "availability_writes": "",
    "availability_scores": "",
    "availability_without_restarts": "the same, but for the recoveries that take a new start of the cluster",
    "availability_other_shards": "the same of the other shards while one recovers",
    "other_shards_failures": "what came of probes of the other shards instead, and how often",
    "probes": "writes and scores of one shard each",
    "starts": "of `millpond up`",
    "durability": "",
    "shards": "",
    "replicas": "",
}


def schedule(kills: int, draw: random.Random) -> list[str]:
    """Return which kind is killed, one after the other, the whole cluster at last.

    Each kind up to ten times, the rest goes to kinds from which the cluster recovers by itself. Of fewer kills than
    there are kinds, one is of a shard and one of the raylet.
    """
    if kills < 1:
        raise BadRequest(f"bench faults: {kills} kills; there is one at least, of the whole cluster")
    if kills < len(KINDS):
        first = ["shard", "raylet"]
        others = [kind for kind in KINDS if kind not in (*first, "cluster")]
        order = [*first, *draw.sample(others, len(others))][: kills - 1]
    else:
        each = min(KILLS_OF_EACH_MIN, kills // len(KINDS))
        cheap = [kind for kind in KINDS if kind not in NEEDS_NEW_START]
        order = [kind for kind in KINDS for _ in range(each)]
        order += [cheap[i % len(cheap)] for i in range(kills - len(order))]
        order.remove("cluster")
    draw.shuffle(order)
    return [*order, "cluster"]


@dataclass(frozen=True)
class Strike:
    """One kill: when, of the monotonic clock, and when everything concerned was served again."""

    kind: str
    shard: int | None
    at: float
    recovered_at: float
    actor: str = ""

    @property
    def what(self) -> str:
        return self.actor if self.kind == "worker" else self.kind

    @property
    def recovery_s(self) -> float:
        return self.recovered_at - self.at


@dataclass(frozen=True)
class Batch:
    """A body, and what it adds to the ledger."""

    body: bytes
    content_type: str
    users: Ints
    items: Ints
    amounts: Floats


class _Writer(threading.Thread):
    """Takes batches from the queue and sends each until it is acknowledged."""

    def __init__(self, traffic: Traffic, up: Up) -> None:
        super().__init__(name="writer")
        self._traffic = traffic
        self._connection = Connection(lambda: up.url, _REQUEST_S_MAX)
        self.causes = Counter[str]()

    def run(self) -> None:
        traffic = self._traffic
        try:
            while not traffic.over.is_set():
                try:
                    batch = traffic.waiting.get(timeout=0.1)
                except queue.Empty:
                    continue
                answer = send_until_answered(
                    self._connection, _PATH, batch.body, batch.content_type, self.causes, traffic.over
                )
                if answer is not None:
                    traffic.acknowledged(batch, answer.json)
        except Exception as error:
            traffic.wrong.append(f"writer: {error!r}")
            traffic.over.set()
        finally:
            self._connection.close()


class Traffic:
    """Batches that wait to be sent, and the writers that send them; keeps the ledger."""

    def __init__(self, up: Up, ledger: Ledger, draw: random.Random, made: EventBodies) -> None:
        self._ledger, self._draw, self._made = ledger, draw, made
        self.waiting: queue.Queue[Batch] = queue.Queue()
        self.over = threading.Event()
        self.wrong: list[str] = []
        self.again: list[Batch] = []
        self._batches = 0
        self.sent = self.acked = 0
        self._progress = threading.Condition()
        self._writers = [_Writer(self, up) for _ in range(_WRITERS)]

    def start(self) -> None:
        for writer in self._writers:
            writer.start()

    def send(self, events: int) -> None:
        """Put a burst of so many events in the queue, in bodies of 1 to 1,000."""
        while events > 0:
            n = min(events, int(_BODY_EVENTS_MAX ** self._draw.random()))
            events -= n
            self.sent += n
            self.waiting.put(self._batch(n))

    def _batch(self, n: int) -> Batch:
        table = self._made.table(n)
        arrow = self._draw.random() < 0.5
        (body,) = [arrow_body(table)] if arrow else json_bodies(table, n)
        items = pc.replace_substring(table["item_id"], "item-", "").cast(pa.int64())
        return Batch(
            body,
            ARROW_STREAM if arrow else "application/json",
            table["user_id"].to_numpy(),
            items.to_numpy(),
            table["amount"].to_numpy(),
        )

    def acknowledged(self, batch: Batch, ack: Mapping[str, int]) -> None:
        n = len(batch.users)
        if (ack["accepted"] + ack["duplicates"], ack["conflicts"]) != (n, 0):
            self.wrong.append(f"every event of a body is accepted or a duplicate: of {n}, got {ack}")
        self._ledger.acknowledge(batch.users, batch.items, batch.amounts)
        with self._progress:
            self._batches += 1
            if self._batches % _AGAIN_EVERY == 1 and len(self.again) < _AGAIN_MAX:
                self.again.append(batch)
            self.acked += n
            self._progress.notify_all()

    def wait_for(self, acked: int, timeout_s: float) -> bool:
        """Return whether so many events have been acknowledged in time."""
        with self._progress:
            return self._progress.wait_for(lambda: self.acked >= acked or self.over.is_set(), timeout_s)

    @property
    def causes(self) -> Counter[str]:
        return sum((writer.causes for writer in self._writers), Counter[str]())

    def stop(self) -> None:
        self.over.set()
        for writer in self._writers:
            if writer.ident is not None:
                writer.join()


class FaultsWorkload:
    """Writes with known totals, and kills."""

    name = "faults"
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, *, kills: int = KILLS, events: int = EVENTS, seed: int | None = None) -> None:
        self.seed = random.randrange(2**31) if seed is None else seed
        self._draw = random.Random(self.seed)
        self.schedule = schedule(kills, self._draw)
        self._home = make_home(config.data_dir)
        config = replace(config, name="faults", data_dir=str(self._home.path), port=0, clock="wall", shards=SHARDS)
        self._config, self._events = config, events
        self._up = Up(config, self._home.path)
        self._map = ShardMap.even(config.slots, SHARDS)
        made = EventBodies(self.seed, int(time.time() * 1000), users=USERS, items=ITEMS, span_ms=_SPAN_MS)
        self.ledger = Ledger(USERS + SHARDS, ITEMS + SHARDS)
        self._traffic = Traffic(self._up, self.ledger, self._draw, made)
        self._over = threading.Event()
        self._probe_causes = [Counter[str]() for _ in range(SHARDS)]
        self._writers: list[WriteProber] = []
        self._readers: list[ReadProber] = []
        self.strikes: list[Strike] = []
        self._settled_at = 0.0
        #: What is waited for just now, for the message if it does not come.
        self._missing = ""
        self._wrong: list[str] = []
        self._figures: dict[str, Any] = {
            "durability": config.durability,
            "shards": SHARDS,
            "replicas": config.replicas,
        }

    @property
    def _logs(self) -> list[Log]:
        return [prober.log for prober in (*self._writers, *self._readers)]

    # -- setup

    def setup(self, steps: Steps) -> None:
        steps.console.print(f"  seed {self.seed}", highlight=False)
        with steps.step("start `millpond up`") as advance:
            self._up.start()
            advance(1, self._up.url)
        self._traffic.start()
        for shard in range(SHARDS):
            self._probe(shard)
        with steps.step("wait for the probes"):
            until(lambda: self._served_since(0.0), "the first probes to be answered", _RECOVERY_S_MAX)

    def _probe(self, shard: int) -> None:
        """Begin to write to, and to score, a user and an item of a shard that are nobody else's."""
        user = next(ids_on(self._map, shard, iter(range(USERS, 2**31))))
        item = next(ids_on(self._map, shard, (f"probe-{n}" for n in range(2**31))))
        event_ids = ids_on(self._map, shard, (f"{self.seed}-probe-{shard}-{n}" for n in range(2**31)))
        writer = WriteProber(
            Log("write", shard), lambda: self._up.url, self._over, _PATH, user, item, (USERS + shard, ITEMS + shard),
            event_ids, self.ledger, self._probe_causes[shard],
        )  # fmt: skip
        reader = ReadProber(Log("score", shard), lambda: self._up.url, self._over, writer)
        self._writers.append(writer)
        self._readers.append(reader)
        writer.start()
        reader.start()

    def _served_since(self, at: float) -> bool:
        self._raise_what_threads_found()
        return all(log.good_since(at, _IN_A_ROW) is not None for log in self._logs)

    def _raise_what_threads_found(self) -> None:
        for prober in (*self._writers, *self._readers):
            if not prober.is_alive():
                raise Unavailable(f"bench faults: a probe has ended: {prober.wrong}")
        if self._traffic.over.is_set():
            raise Unavailable(f"bench faults: a writer has ended: {self._traffic.wrong}")

    # -- start

    def start(self, steps: Steps) -> None:
        kills = len(self.schedule)
        with steps.step("kill", kills) as advance:
            for number, kind in enumerate(self.schedule):
                advance(0, f"{kind} ...")
                burst = self._events * (number + 1) // kills - self._events * number // kills
                try:
                    strike = self._strike(kind, burst)
                except MillpondError as error:
                    raise Unavailable(
                        f"kill {number + 1}, of {kind}: {error}; missing: {self._missing}; {self._up.errors()}"
                    ) from None
                self.strikes.append(strike)
                what = strike.what if strike.shard is None else f"{strike.what} {strike.shard}"
                advance(1, f"{what} {strike.recovery_s:.2f} s")
                steps.console.print(
                    f"  {number + 1:3} {what:20} {strike.recovery_s:7.2f} s  {self._traffic.acked:9,} acknowledged",
                    highlight=False,
                )

    def _strike(self, kind: str, burst: int) -> Strike:
        """Send a burst, kill in the middle of it, and return when all is well again."""
        # 1. Send, and wait for a random share of it.
        share = self._traffic.acked + int(burst * self._draw.random())
        self._traffic.send(burst)
        if not self._traffic.wait_for(share, _RECOVERY_S_MAX):
            raise Unavailable(f"{share} events were not acknowledged within {_RECOVERY_S_MAX:g} s")
        # 2. Kill.
        victim = self._choose(kind)
        at = self._up.kill(victim)
        # 3. Start anew what cannot recover by itself.
        if kind in NEEDS_NEW_START:
            until(lambda: self._up.ended, f"`millpond up` to end without its {kind}", _END_S_MAX)
            self._up.start()
        # 4. Wait until all is well.
        until(lambda: self._recovered(victim, at), "the cluster to recover", _RECOVERY_S_MAX)
        self._settled_at = time.monotonic()
        concerned = [log for log in self._logs if victim.shard in (None, log.shard)]
        ends = [end for log in concerned if (end := log.good_since(at, _IN_A_ROW)) is not None]
        return Strike(kind, victim.shard, at, max(ends, default=self._settled_at), victim.actor)

    def _choose(self, kind: str) -> Victim:
        if kind == "cluster":
            return Victim(0, "cluster", "")
        found: list[Victim] = until(
            lambda: [v for v in self._up.victims() if v.kind == kind], f"a process to kill: {kind}", _RECOVERY_S_MAX
        )
        return self._draw.choice(sorted(found, key=lambda v: v.title))

    def _recovered(self, victim: Victim, at: float) -> bool:
        if self._up.ended:
            self._wrong.append(
                f"`millpond up` goes on when a `{victim.title[:40]}` is killed: it ended: {self._up.errors()}"
            )
            self._up.start()
        self._missing = "writes and scores of every shard"
        if not self._served_since(at):
            return False
        self._missing = f"{self._traffic.sent - self._traffic.acked} events to be acknowledged"
        if self._traffic.acked < self._traffic.sent:
            return False
        self._missing = f"another process in the place of {victim}"
        return victim.kind in NEEDS_NEW_START or not victim.missed or any(map(victim.replaced_by, self._up.victims()))

    # -- check

    def check(self, steps: Steps) -> list[str]:
        with steps.step("check") as advance:
            self._end_traffic()
            advance(0, "accounts ...")
            lost, double = self._compare_accounts()
            self._send_again()
            # What was lost has come again with the bodies that were sent once more: it stays lost.
            double = max(double, self._compare_accounts()[1])
            self._figures |= {
                "acked_events": self.ledger.events,
                "lost_events": lost,
                "double_counted_events": double,
                "stale_reads": sum(reader.stale for reader in self._readers),
            }
            for prober in (*self._writers, *self._readers):
                self._wrong += prober.wrong
            self._wrong += self._traffic.wrong
            advance(0, "clean stop ...")
            if (status := self._up.stop()) != 0:
                self._wrong.append(f"a clean stop ends with status 0: got {status}; {self._up.errors()}")
        return list(dict.fromkeys(self._wrong))  # accounts are compared twice

    def _end_traffic(self) -> None:
        self._over.set()
        for writer in self._writers:
            writer.finish_by(time.monotonic() + _END_S_MAX)
        for prober in (*self._writers, *self._readers):
            prober.join()
        self._traffic.stop()
        for writer in self._writers:
            if writer.acked != writer.sent:
                self._wrong.append(f"every probe is acknowledged in the end: {writer.acked} of {writer.sent} were")

    def _send_again(self) -> None:
        connection = Connection(lambda: self._up.url, _REQUEST_S_MAX)
        resent = 0
        for batch in self._traffic.again:
            answer = connection.call("POST", _PATH, batch.body, batch.content_type)
            n = len(batch.users)
            if not answer.good:
                self._wrong.append(f"a body is answered when it is sent once more: got {answer.why}")
            elif (answer.json["accepted"], answer.json["duplicates"]) != (0, n):
                self._wrong.append(f"{n} events that are sent once more are duplicates: got {answer.json}")
            resent += n
        connection.close()
        self._figures["resent_events"] = resent

    def _compare_accounts(self) -> tuple[int, int]:
        """Return how many events were lost and counted twice, over all accounts."""
        users = [*range(USERS), *(writer.user for writer in self._writers)]
        items = [*(f"item-{i}" for i in range(ITEMS)), *(writer.item for writer in self._writers)]
        lost = double = 0
        for model, key, ids, expected in (
            ("user_account", "user_id", users, self.ledger.users),
            ("item_account", "item_id", items, self.ledger.items),
        ):
            wrong = differences(expected, read_accounts(self._up.url, model, key, ids))
            lost += sum(d.lost for d in wrong)
            double += sum(d.double for d in wrong)
            self._wrong += [
                f"every acknowledged event is counted once: {key} {ids[d.account]} has {d.found} events and amount, "
                f"acknowledged were {d.expected}"
                for d in wrong[:_SHOWN_MAX]
            ]
        return lost, double

    # -- metrics and end

    def metrics(self) -> dict[str, Any]:
        recoveries: dict[str, list[float]] = {}
        for strike in self.strikes:
            recoveries.setdefault(strike.kind, []).append(strike.recovery_s)
        causes = sum(self._probe_causes, self._traffic.causes)
        figures = {
            **self._figures,
            **recovery_figures(recoveries),
            "retries": causes.total(),
            "retries_by_cause": dict(sorted(causes.items())),
            "probes": sum(len(log.probes) for log in self._logs),
            "starts": self._up.starts,
            **availability_figures(self._logs, self.strikes, self._settled_at),
            "other_shards_failures": dict(other_shards_failures(self._logs, self.strikes).most_common(_SHOWN_MAX)),
        }
        return {name: figures[name] for name in MEANINGS if name in figures}

    @property
    def evidence(self) -> Evidence:
        return Evidence()

    def close(self) -> None:
        try:
            self._over.set()
            for writer in self._writers:
                writer.finish_by(0.0)
            self._traffic.stop()
            self._up.close()
        finally:
            self._home.remove()


def recovery_figures(recoveries: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return how long it took; the keys are kinds."""
    every = [s for of_kind in recoveries.values() for s in of_kind]
    if not every:
        return {"kills": 0}
    return {
        "kills": len(every),
        "kills_by_kind": {kind: len(of_kind) for kind, of_kind in sorted(recoveries.items())},
        "recovery_p50_s": round(quantile(every, 0.5), 2),
        "recovery_max_s": round(max(every), 2),
        "recovery_p50_s_by_kind": {k: round(quantile(of_kind, 0.5), 2) for k, of_kind in sorted(recoveries.items())},
        "recovery_max_s_by_kind": {k: round(max(of_kind), 2) for k, of_kind in sorted(recoveries.items())},
    }


def other_shards_failures(logs: list[Log], strikes: list[Strike]) -> Counter[str]:
    """Return what came of the probes of other shards that failed while one recovered."""
    found = Counter[str]()
    for strike in strikes:
        if strike.shard is not None:
            others = [log for log in logs if log.shard != strike.shard]
            found += failures_within(others, [(strike.at, strike.recovered_at)])
    return found


def availability_figures(logs: list[Log], strikes: list[Strike], end: float) -> dict[str, float]:
    """Return the shares of the time from the first strike to `end` in which keys were served."""
    if not strikes:
        return {}
    whole = [(strikes[0].at, end)]
    stays, at = [], strikes[0].at
    for strike in strikes:
        if strike.kind in NEEDS_NEW_START:
            stays.append((at, strike.at))
            at = strike.recovered_at
    stays.append((at, max(at, end)))
    shares = {
        "availability": available_share(logs, whole),
        "availability_writes": available_share([log for log in logs if log.kind == "write"], whole),
        "availability_scores": available_share([log for log in logs if log.kind == "score"], whole),
        "availability_without_restarts": available_share(logs, stays),
    }
    windows: dict[int, list[tuple[float, float]]] = {}
    for strike in strikes:
        if strike.shard is not None:
            windows.setdefault(strike.shard, []).append((strike.at, strike.recovered_at))
    shares["availability_other_shards"] = None
    if windows:
        others = [
            (sum(last - first for first, last in windows[shard]), share)
            for shard in windows
            if (share := available_share([log for log in logs if log.shard != shard], windows[shard])) is not None
        ]
        if total := sum(length for length, _ in others):
            shares["availability_other_shards"] = sum(length * share for length, share in others) / total
    return {name: round(share, 5) for name, share in shares.items() if share is not None}


def make(config: Config, options: Options) -> FaultsWorkload:
    kills, events = (3, 5_000) if options.quick else (options.kills, options.events)
    return FaultsWorkload(config, kills=kills, events=events, seed=options.seed)
