"""Probes: writes and scores of one shard each, sent all the time, that say when the shard's keys were served.

A probe's user, item and event ids all lie on its shard, so that no other shard is concerned. Time is counted, not
requests: from one probe's start to the next one's, the keys were served or not, as the first was answered well within
`PROBE_S_MAX` or not. A request that hangs counts for as long as it hangs.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from millpond.bench.ledger import Ledger
from millpond.bench.retry import Answer, Connection, Refused
from millpond.feature_actors.keys import hash_values
from millpond.feature_actors.shard_map import ShardMap

__all__ = ["PROBE_S_MAX", "Log", "Probe", "ReadProber", "WriteProber", "available_share", "failures_within", "ids_on"]

#: A probe that is answered later was not answered.
PROBE_S_MAX = 2.0
PROBE_EVERY_S = 0.05


@dataclass(frozen=True)
class Probe:
    """One probe: when it began and ended, of the monotonic clock, and whether it was answered well, or what came."""

    begin: float
    end: float
    good: bool
    why: str = ""


@dataclass
class Log:
    """All probes of one kind and shard, in order."""

    kind: str
    shard: int
    probes: list[Probe] = field(default_factory=list)

    def good_since(self, at: float, in_a_row: int) -> float | None:
        """Return when the keys were served again after `at`: the end of the first good probe after the last bad one,
        if `in_a_row` have been good since; of those only that began after `at`."""
        since = list(itertools.takewhile(lambda p: p.begin > at, reversed(self.probes.copy())))
        good = list(itertools.takewhile(lambda p: p.good, since))
        return good[-1].end if len(good) >= in_a_row else None

    def spans(self) -> Iterator[tuple[float, float, bool]]:
        """Yield from when to when the keys were served or not."""
        for one, after in itertools.pairwise(self.probes):
            yield one.begin, after.begin, one.good


def available_share(logs: Sequence[Log], windows: Sequence[tuple[float, float]]) -> float | None:
    """Return the share of the time within any of the windows in which keys were served, the mean of all logs; None if
    nothing was probed in them. Windows do not overlap.

    >>> log = Log("write", 0, [Probe(0, 1, True), Probe(1, 3, False), Probe(4, 5, True), Probe(5, 6, True)])
    >>> available_share([log], [(0, 5)]), available_share([log], [(2, 3)]), available_share([log], [(7, 8)])
    (0.4, 0.0, None)
    """
    good = total = 0.0
    for log in logs:
        for begin, end, served in log.spans():
            for first, last in windows:
                overlap = max(0.0, min(end, last) - max(begin, first))
                total += overlap
                good += overlap * served
    return good / total if total else None


def failures_within(logs: Sequence[Log], windows: Sequence[tuple[float, float]]) -> Counter[str]:
    """Return what came of the probes that began within any of the windows and were not answered well."""
    bad = [probe for log in logs for probe in log.probes if not probe.good]
    return Counter(p.why for p in bad if any(first <= p.begin <= last for first, last in windows))


def ids_on(shard_map: ShardMap, shard: int, names: Iterator[Any]) -> Iterator[Any]:
    """Yield those of the names (all int, or all str) whose hash lies on a shard."""
    return (name for name in names if int(shard_map.shards_of(hash_values([[name]], 1))[0]) == shard)


class _Prober(threading.Thread):
    """Sends probes, one every `PROBE_EVERY_S`, or as soon as the one before it has ended."""

    def __init__(self, log: Log, url: Callable[[], str], over: threading.Event) -> None:
        super().__init__(name=f"{log.kind} probe of shard {log.shard}")
        self.log = log
        self._connection = Connection(url, PROBE_S_MAX)
        self._over = over
        #: What must never happen, in words.
        self.wrong: list[str] = []

    def run(self) -> None:
        try:
            while not self._over.is_set() or self.unfinished:
                begin = time.monotonic()
                answer = self.probe()
                end = time.monotonic()
                self.log.probes.append(Probe(begin, end, answer.good, answer.text))
                time.sleep(max(0.001, PROBE_EVERY_S - (end - begin)))
        except Exception as error:  # a thread's error would pass unseen
            self.wrong.append(f"{self.name}: {error!r}")
        finally:
            self._connection.close()

    @property
    def unfinished(self) -> bool:
        return False

    def probe(self) -> Answer:
        raise NotImplementedError


class WriteProber(_Prober):
    """Writes events of one user and one item, one by one; each is sent again until it is acknowledged.

    rows: the user's and the item's accounts in the ledger.
    """

    def __init__(
        self, log: Log, url: Callable[[], str], over: threading.Event, path: str, user: int, item: str,
        rows: tuple[int, int], event_ids: Iterator[str], ledger: Ledger, causes: Counter[str],
    ) -> None:  # fmt: skip
        super().__init__(log, url, over)
        self._path, self.user, self.item = path, user, item
        self._rows = np.array([rows[0]]), np.array([rows[1]])
        self._ids, self._ledger, self._causes = event_ids, ledger, causes
        self._body = b""
        #: Events sent, answered or not; and those acknowledged.
        self.sent = self.acked = 0
        self._give_up_at = float("inf")

    def finish_by(self, at: float) -> None:
        """Do not go on sending the last event after this time."""
        self._give_up_at = at

    @property
    def unfinished(self) -> bool:
        return bool(self._body) and time.monotonic() < self._give_up_at

    def probe(self) -> Answer:
        if not self._body:
            event = {
                "event_id": next(self._ids),
                "user_id": self.user,
                "item_id": self.item,
                "category": "probe",
                "amount": 1.0,
                "event_time": int(time.time() * 1000) - 1,
            }
            self._body = msgspec.json.encode(event)
            self.sent += 1
        answer = self._connection.call("POST", self._path, self._body)
        if not answer.good:
            if 400 <= answer.status < 500 and answer.status not in (408, 429):
                raise Refused(f"{answer.status} {answer.content[:500].decode(errors='replace')}")
            self._causes[answer.why] += 1
            return answer
        ack = answer.json
        if (ack["accepted"] + ack["duplicates"], ack["conflicts"]) != (1, 0):
            self.wrong.append(f"an event is accepted or a duplicate: got {ack}")
        self._ledger.acknowledge(*self._rows, np.ones(1))
        self.acked += 1
        self._body = b""
        return answer


class ReadProber(_Prober):
    """Scores the user and item of a write prober: what was acknowledged before is there, and no more than was sent."""

    def __init__(self, log: Log, url: Callable[[], str], over: threading.Event, writer: WriteProber) -> None:
        super().__init__(log, url, over)
        self._writer = writer
        self._body = msgspec.json.encode({"user_id": writer.user, "item_id": writer.item})
        self.stale = 0

    def probe(self) -> Answer:
        acked = self._writer.acked
        answer = self._connection.call("POST", "/v1/score/pair_account", self._body)
        if not answer.good:
            return answer
        counts = answer.json["result"]
        sent = self._writer.sent
        if min(counts) < acked:
            self.stale += 1
            if self.stale == 1:
                self.wrong.append(f"a score has every event acknowledged before: {acked} were, it counts {counts}")
        if max(counts) > sent and not any("sent" in w for w in self.wrong):
            self.wrong.append(f"a score has no event twice: {sent} were sent, it counts {counts}")
        return answer
