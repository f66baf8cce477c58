"""Posts bodies of events, one after the other or at a rate, while something else is measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from millpond.bench.load import quantile
from millpond.cluster.demo.session import ARROW_STREAM, Session, arrow_stream

__all__ = ["Poster", "post_tables"]


class Poster(threading.Thread):
    """Posts the bodies on one connection until `stop`, or until they are over.

    per_s: bodies a second, evenly; what it is late by counts as latency. None: the next when the last is answered.
    took_ms: of each body that was acknowledged. counts: the acknowledgements, added up.
    """

    def __init__(
        self, url: str, path: str, bodies: Iterable[bytes], *, content_type: str, per_s: float | None = None
    ) -> None:
        super().__init__(name="poster", daemon=True)
        self._session, self._path = Session(url), path
        self._bodies: Iterator[bytes] = iter(bodies)
        self._content_type, self._per_s = content_type, per_s
        self._over = threading.Event()
        self.took_ms: list[float] = []
        self.counts: dict[str, int] = {}
        self.failed = 0
        self.first_failure: str | None = None

    def run(self) -> None:
        due = time.perf_counter()
        while not self._over.is_set():
            body = next(self._bodies, None)
            if body is None:
                break
            if self._per_s is None:
                due = time.perf_counter()
            elif self._over.wait(max(0.0, due - time.perf_counter())):
                break
            self._post(body, due)
            due += 0.0 if self._per_s is None else 1 / self._per_s
        self._session.close()

    def _post(self, body: bytes, due: float) -> None:
        ack: dict[str, Any] | None = self._session.post(self._path, body, self._content_type)
        if ack is None:
            self.failed += 1
            self.first_failure = self._session.first_failure
            self._over.wait(0.05)
            return
        self.took_ms.append((time.perf_counter() - due) * 1e3)
        for outcome, n in ack.items():
            self.counts[outcome] = self.counts.get(outcome, 0) + n

    def stop(self) -> None:
        """Post nothing more, and wait for what is under way."""
        self._over.set()
        if self.ident is not None:
            self.join()

    @property
    def accepted(self) -> int:
        return self.counts.get("accepted", 0)

    @property
    def other_outcomes(self) -> dict[str, int]:
        """What was not simply accepted: duplicates, late events."""
        return {outcome: n for outcome, n in self.counts.items() if n and outcome != "accepted"}

    @property
    def problems(self) -> list[str]:
        """Return what is wrong, in words: every body is acknowledged, and every event of it simply accepted."""
        wrong = []
        if self.failed:
            wrong.append(
                f"every body of events is acknowledged: {self.failed} were not, the first: {self.first_failure}"
            )
        if self.other_outcomes:
            wrong.append(f"every event that is posted once is accepted, and none is late: got {self.counts}")
        return wrong

    def ms(self, q: float) -> float:
        return quantile(self.took_ms, q)


def post_tables(
    url: str, source: str, tables: Iterable[pa.Table], connections: int, done: Any = lambda n: None
) -> dict[str, int]:
    """Post tables of events as Arrow streams, arrival = event time, over so many connections.

    Return the outcomes, added up. Tables of several connections are not applied in their order.
    Raises `OSError` with the first failure.
    """
    source_of, lock, counts, failures = iter(tables), threading.Lock(), dict[str, int](), list[str]()

    def post() -> None:
        session = Session(url)
        while not failures:
            with lock:
                table = next(source_of, None)
            if table is None:
                break
            ack = session.post(f"/v1/events/{source}?arrival=event", arrow_stream(table), ARROW_STREAM)
            with lock:
                if ack is None:
                    failures.append(str(session.first_failure))
                    break
                for outcome, n in ack.items():
                    counts[outcome] = counts.get(outcome, 0) + n
                done(len(table))
        session.close()

    with ThreadPoolExecutor(connections) as pool:
        for future in [pool.submit(post) for _ in range(connections)]:
            future.result()
    if failures:
        raise OSError(failures[0])
    return counts
