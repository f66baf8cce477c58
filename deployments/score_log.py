"""What a replica takes down of the scores that it serves: a sample, written by a thread of its own.

Whose scores are taken is a matter of the id alone (the fixed hash of its keys), so it is the same on every replica and
at any time. On the event loop a score that is not taken costs one comparison, one that is taken a copy of its features
before the model may write into them, and a place in a queue. The queue has a limit: what comes above it, or cannot be
written, is counted as dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.plan import FeatureRows
from millpond.feature_actors.shard_map import ShardMap
from millpond.models.erasures import ForgottenScores
from millpond.models.score_log import ScoreFiles, Scorer, forgotten_scores, scores_table

if TYPE_CHECKING:
    from millpond.deployments.lane import Lane, Scored

__all__ = ["Sampled", "ScoreLog", "ScoreLogSettings"]

logger = logging.getLogger("millpond.score_log")

_UNSIGNED = 2**64 - 1
#: Up to so many are looked at one by one: NumPy takes longer, to begin with.
_FEW_ROWS = 16
#: How often what is older than is kept is looked for.
_DELETE_EVERY_S = 3_600.0


@dataclass(frozen=True)
class ScoreLogSettings:
    """history_uri: where it is written. share: of all ids, 0 to 1. flush_s, flush_rows: it is written so often, and
    when so many scores wait. file_rows_max: scores in a file. waiting_max: scores that may wait; more are dropped.
    keep_ms: how long it is kept, None for ever."""

    history_uri: str
    share: float = 0.01
    flush_s: float = 5.0
    flush_rows: int = 1_000
    file_rows_max: int = 10_000
    waiting_max: int = 100_000
    keep_ms: int | None = None


@dataclass(slots=True)
class Sampled:
    """Rows of a batch as they were before the model was called. places: where a row of the batch is among `rows`."""

    places: dict[int, int]
    keys: Mapping[str, Sequence[Any]]
    rows: FeatureRows


class _Waiting(NamedTuple):
    lane: Lane
    role: str
    served_ms: int
    answer_id: str
    sampled: Sampled
    place: int
    result: Any


class ScoreLog:
    """Take down scores until `close`. writer: the name of the replica."""

    def __init__(self, settings: ScoreLogSettings, shard_map: ShardMap, writer: str) -> None:
        self.settings = settings
        self._map, self._writer = shard_map, writer
        self._below = int(settings.share * 2.0**64)
        self._waiting: deque[_Waiting] = deque()
        self._files: ScoreFiles | None = None
        self._deleted_s = -_DELETE_EVERY_S
        #: The notices that there are of what is to be forgotten, by name. Replaced, never written to.
        self._notices: Mapping[str, ForgottenScores] = {}
        #: What is not to be logged any more, by the names of the notices that said so.
        self._forgotten: dict[str, ForgottenScores] = {}
        #: How many scores were taken out of the file here for each; those of which it failed are tried again.
        self._heeded: dict[str, int] = {}
        #: What became of the scores that were taken.
        self.written = self.dropped = 0
        self._wake, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._live, name="score-log", daemon=True)
        self._thread.start()

    # -- on the event loop

    def take(self, keys: Mapping[str, Sequence[Any]], rows: FeatureRows) -> Sampled | None:
        """Return a copy of those rows that are to be logged, or None; before the model is called."""
        trace = rows.trace
        if len(trace) == 1:
            if trace.item(0) & _UNSIGNED >= self._below:
                return None
            chosen = [0]
        elif len(trace) <= _FEW_ROWS:
            chosen = [row for row, hashed in enumerate(trace[:, 0].tolist()) if hashed & _UNSIGNED < self._below]
        else:
            chosen = np.flatnonzero(trace[:, 0].view(np.uint64) < self._below).tolist()
        if not chosen:
            return None
        taken = FeatureRows(
            rows.matrix[chosen],
            rows.as_of[chosen],
            [rows.unknown[i] for i in chosen],
            {name: [column[i] for i in chosen] for name, column in rows.texts.items()},
            trace[chosen],
        )
        places = {row: place for place, row in enumerate(chosen)}
        return Sampled(places, {name: [column[i] for i in chosen] for name, column in keys.items()}, taken)

    def add(self, lane: Lane, scored: Scored, row: int, answer_id: str) -> None:
        """Have a row that was taken written down, when it is served. answer_id: "" if it is no answer."""
        assert scored.sampled is not None
        waiting = self._waiting
        if len(waiting) >= self.settings.waiting_max:
            self.dropped += 1
            return
        place = scored.sampled.places[row]
        served_ms = time.time_ns() // 1_000_000
        waiting.append(_Waiting(lane, lane.role, served_ms, answer_id, scored.sampled, place, scored.results[row]))
        if len(waiting) >= self.settings.flush_rows:
            self._wake.set()

    def heed(self, notices: Mapping[str, ForgottenScores]) -> dict[str, int]:
        """Have what notices say taken out; return of which of them that is done, and how many scores it were."""
        before, self._notices = self._notices, notices
        if notices.keys() - before.keys():  # those of which it failed wait for the next time that it writes
            self._wake.set()
        return {name: self._heeded[name] for name in notices if name in self._heeded}

    @property
    def counts(self) -> dict[str, int]:
        return {"written": self.written, "dropped": self.dropped, "waiting": len(self._waiting)}

    def close(self) -> None:
        """Write what waits, and stop. Takes as long as that takes."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    # -- in the thread

    def _live(self) -> None:
        while not self._closed:
            self._wake.wait(self.settings.flush_s)
            self._wake.clear()
            self._heed()
            self._flush()
            self._delete_old()
        self._flush()

    def _flush(self) -> None:
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not taken:
            return
        try:
            table = self._table(taken)
            if self._forgotten:
                table = table.filter(pa.array(~forgotten_scores(table, list(self._forgotten.values()))))
            self._opened().write(table)
            self.written += len(taken)
        except MillpondError as error:
            self.dropped += len(taken)
            logger.warning("%d scores are not logged: %s", len(taken), error)
        except Exception:  # of ours; what is served goes on
            self.dropped += len(taken)
            logger.exception("%d scores are not logged", len(taken))

    def _heed(self) -> None:
        """Take out what is to be forgotten; what comes of it later is not logged."""
        try:
            for name, forgotten in self._notices.items():
                if name not in self._heeded:
                    self._forgotten[name] = forgotten
                    self._heeded[name] = self._opened().erase([forgotten])
        except MillpondError as error:
            logger.warning("logged scores cannot be forgotten yet: %s", error)

    def _opened(self) -> ScoreFiles:
        if self._files is None:
            self._files = ScoreFiles(self.settings.history_uri, self._writer, self.settings.file_rows_max)
        return self._files

    def _table(self, taken: Sequence[_Waiting]) -> pa.Table:
        groups: dict[tuple[int, str], list[_Waiting]] = {}
        for one in taken:
            groups.setdefault((id(one.lane), one.role), []).append(one)
        return pa.concat_tables([self._table_of(of) for of in groups.values()])

    def _table_of(self, of: Sequence[_Waiting]) -> pa.Table:
        """Return scores of one lane in one role."""
        lane, role = of[0].lane, of[0].role
        model = lane.loaded.model
        first = of[0].sampled
        rows = FeatureRows(
            np.stack([one.sampled.rows.matrix[one.place] for one in of]),
            np.array([one.sampled.rows.as_of[one.place] for one in of], np.int64),
            [one.sampled.rows.unknown[one.place] for one in of],
            {name: [one.sampled.rows.texts[name][one.place] for one in of] for name in first.rows.texts},
            np.stack([one.sampled.rows.trace[one.place] for one in of]),
        )
        keys = {name: [one.sampled.keys[name][one.place] for one in of] for name in first.keys}
        return scores_table(
            Scorer(model.name, model.version, lane.digest, role), lane.loaded.plan, self._map,
            [one.answer_id for one in of], [one.served_ms for one in of], keys, rows, [one.result for one in of],
        )  # fmt: skip

    def _delete_old(self) -> None:
        keep_ms, now_s = self.settings.keep_ms, time.monotonic()
        if keep_ms is None or now_s < self._deleted_s + _DELETE_EVERY_S:
            return
        self._deleted_s = now_s
        try:
            for path in self._opened().delete_before(time.time_ns() // 1_000_000 - keep_ms):
                logger.info("deleted `%s`", path)
        except MillpondError as error:
            logger.warning("old scores cannot be deleted: %s", error)
