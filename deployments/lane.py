"""A lane: the requests for one model version, scored together where they wait anyway.

Promises:
- No request waits for company. What one turn of the event loop brings (see `turns`) is predicted in one go; so is
  what comes while an earlier prediction of the model runs.
- `predict` of a model is never called twice at once.
- A quick model (half a millisecond a call, by the last nine) is called on the event loop: a thread would cost more. A
  slower one is called in a thread, and the models beside it go on. Its requests have a time limit (504), and their
  number is limited (429); what has begun keeps its place until `predict` returns, for nothing can stop it.
- A request that a model fails on fails alone: a batch that fails is asked again request by request. Where a result is
  none that JSON can hold, its id fails alone.
- What a model of two stages reads is there at once, or the model is asked again in a thread, which can wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from millpond.deployments.stopwatch import Stopwatch
from millpond.deployments.turns import NOBODY, Turns
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.errors import MillpondError, TooMany, Unavailable
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.models.model import LoadedModel
from millpond.models.rollout import Role

if TYPE_CHECKING:
    from millpond.deployments.score_log import Sampled, ScoreLog

__all__ = ["Batch", "Lane", "LaneCounts", "LaneLimits", "ModelBusy", "PredictTimeout", "Scored"]

logger = logging.getLogger("millpond.lane")

#: A call of `predict` with few rows that takes longer is slow.
INLINE_S_MAX = 0.0005
#: So many of the last calls tell whether a model is slow: most of them, or two and all together.
_CALLS = 9
#: Rows up to which a call is taken to cost the same.
_FEW_ROWS = 32
#: A prediction of many rows that is expected to take longer than this runs in a thread, whatever the model.
_LOOP_S_MAX = 0.005
#: Requests are joined up to so many rows.
_JOINED_ROWS_MAX = 1_024
_ENDS = Unavailable("the replica ends; retry", retry_after_ms=100)
_BUSY_TRIES, _BUSY_WAIT_S = 25, 0.0002


class _ReadWaits(Unavailable):
    """What a model reads while it is called on the event loop cannot be had at once."""


class ModelBusy(TooMany):
    """As many requests as its limit allows wait for a slow model, or are under way in it."""

    code = "model_busy"


class PredictTimeout(MillpondError):
    """The model did not answer within its time limit."""

    code, status = "predict_timeout", 504


@dataclass(frozen=True)
class LaneLimits:
    """predict_s: how long a request of a slow model may take. requests_max: how many of them may be under way."""

    predict_s: float = 2.0
    requests_max: int = 128


@dataclass(slots=True)
class LaneCounts:
    """What became of a lane's requests: `failed` by the model, over its time limit, over the limit of their number."""

    requests: int = 0
    ids: int = 0
    calls: int = 0
    failed: int = 0
    timeouts: int = 0
    refused: int = 0

    def as_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Scored:
    """What requests that were scored together got: their rows, one result a row, or the `PredictionFailed` of this row
    alone, and each row's features if asked. sampled: those rows that are to be logged when they are served. took_s: of
    one that was scored at once, what its prediction took, see `Lane._note_inline`."""

    rows: FeatureRows
    results: list[Any]
    values: list[dict[str, Any]] | None
    sampled: Sampled | None = None
    took_s: tuple[float, float | None] | None = None


@dataclass(slots=True, eq=False)
class _Ask:
    keys: Mapping[str, Sequence[Any]]
    n: int
    as_of_ms: int | None
    values: bool
    rows: FeatureRows | None
    answer: asyncio.Future[tuple[Scored, int]]
    #: Whether it is scored by itself: nothing else is as of its time, or it has made others fail.
    alone: bool
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True, eq=False)
class Batch:
    """Requests that are scored together."""

    asks: list[_Ask]
    keys: Mapping[str, Sequence[Any]]
    n: int
    rows: FeatureRows | None = None
    #: Whether somebody asks for the features, too.
    wants_values: bool = False
    values: list[dict[str, Any]] | None = None
    #: Who compares it, and by which rows.
    compared: tuple[Compare, FeatureRows] | None = None
    sampled: Sampled | None = None
    _joined: bool = False

    def join_keys(self) -> bool:
        """Make one column of each key field's of the requests; return whether that could be done."""
        if not self._joined and len(self.asks) > 1:
            try:
                self.keys = {name: [v for ask in self.asks for v in ask.keys[name]] for name in self.keys}
            except KeyError:
                return False
        self._joined = True
        return True


class Compare(Protocol):
    """What is done with a batch beside answering it; neither method may raise. See `rollout.Shadow`."""

    def before(self, keys: Mapping[str, Sequence[Any]], rows: FeatureRows) -> FeatureRows | None:
        """Return the rows to compare by, taken before `predict` may write into the batch's; None not to compare."""

    def after(self, keys: Mapping[str, Sequence[Any]], rows: FeatureRows, results: list[Any]) -> None:
        """Go on when the answer is on its way."""


class Lane:
    """Score requests for one loaded model.

    threads: where slow models are called. predict_s: what a call took when the model was checked.
    compare: told of every live batch. turns: those that it shares with the other lanes of the replica.
    in_threads: call it in threads, however quick it is. digest: of the version's content.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        client: FeatureClient,
        threads: Executor,
        limits: LaneLimits = LaneLimits(),
        predict_s: float = 0.0,
        turns: Turns | None = None,
        in_threads: bool = False,
        digest: str = "",
    ) -> None:
        self.loaded = loaded
        self.digest = digest
        #: As what it is asked.
        self.role: Role = "champion"
        self.score_log: ScoreLog | None = None
        #: What stands in each of its answers.
        self.label = _label(loaded.model.name, loaded.model.version)
        self.counts = LaneCounts()
        #: When it was asked last, by `time.monotonic`.
        self.asked_s = 0.0
        self.compare: Compare | None = None
        self._client = client
        self._threads = threads
        self._limits = limits
        #: So many calls on the event loop are still timed precisely.
        self._precise_calls = 0
        #: What the last calls with few rows took.
        self._last_s: deque[float] = deque([predict_s] * _CALLS, _CALLS)
        self._row_s = 0.0
        self.call_s = predict_s
        self.in_threads = in_threads or predict_s > INLINE_S_MAX
        #: Whether it hung on the event loop before, or what it reads while it predicts has had to be waited for.
        self._in_threads_for_good = in_threads
        self._waiting: deque[_Ask] = deque()
        #: Batches that are being read, and those that have been. (The event loop itself would let go of a task that
        #: nobody holds.)
        self._reading: dict[Batch, asyncio.Task[FeatureRows]] = {}
        self._ready: deque[Batch] = deque()
        self._turns = turns or Turns(client)
        #: The batch that a thread is busy with.
        self._running: Batch | None = None

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._reading or self._ready or self._running)

    @property
    def under_way(self) -> int:
        """How many requests wait or are being predicted."""
        return len(self._asks())

    def _asks(self) -> list[_Ask]:
        batches = [*self._reading, *self._ready, *([] if self._running is None else [self._running])]
        return [*self._waiting, *(ask for batch in batches for ask in batch.asks)]

    def ask(
        self,
        keys: Mapping[str, Sequence[Any]],
        n: int,
        as_of_ms: int | None = None,
        values: bool = False,
        rows: FeatureRows | None = None,
    ) -> asyncio.Future[tuple[Scored, int]]:
        """Ask for scores of n ids; return a future of what was scored together, and the first row of this request.

        keys: as `ReadPlan.key_columns` returns them. values: whether the features read are wanted, too. rows: the
        features, if they have been read.
        Raises `ModelBusy`. The future raises `PredictionFailed`, `PredictTimeout`, and what a read does.
        """
        counts = self.counts
        counts.requests += 1
        counts.ids += n
        self.asked_s = time.monotonic()
        alone = as_of_ms is not None or rows is not None
        ask = _Ask(keys, n, as_of_ms, values, rows, asyncio.get_running_loop().create_future(), alone)
        if self.in_threads or self._running is not None:
            if self.under_way >= self._limits.requests_max:
                counts.refused += 1
                raise ModelBusy(
                    f"{self.loaded.model.subject}: {self._limits.requests_max} requests wait for it or are under way; "
                    "allowed are no more (setting `model_requests_max`); retry, or give the model a pool of its own",
                    retry_after_ms=1_000,
                )
            self._limit(ask)
        self._waiting.append(ask)
        self._turns.ask(self)
        return ask.answer

    def score_at_once(self, keys: Mapping[str, Sequence[Any]]) -> Scored | None:
        """Score one id as of now, if nothing is in the way of that: no other request, nobody to compare, no thread, no
        slot that is being written. None if something is: `ask`.

        When the answer has been sent, say so by `answered`: what need not be done before is done then. Raises
        `PredictionFailed`, and what a read does; there is no more to say then.
        """
        if (
            self.in_threads or self._waiting or self._ready or self._running is not None or self.compare is not None
            or self.loaded.two_stage or self.call_s > _LOOP_S_MAX or not self._turns.come_alone()
        ):  # fmt: skip
            return None
        scored = None
        try:
            rows = self._client.read_now(self.loaded.plan, keys, 1)
            if rows is None:
                return None  # `ask` comes next, and ends this turn
            sampled = None if self.score_log is None else self.score_log.take(keys, rows)
            scored = Scored(rows, [], None, sampled)
            watch = Stopwatch() if self._precise_calls else None
            begun_s = time.perf_counter()
            self._turns.predicting = self, begun_s
            try:
                scored.results, failed = self.loaded.predict_each(rows, keys)
            finally:
                self._turns.predicting = NOBODY
                scored.took_s = time.perf_counter() - begun_s, None if watch is None else watch.seconds
            if failed:
                raise scored.results[0]
            return scored
        except BaseException as error:
            if isinstance(error, Exception):
                self._count_failure(error)
            self.answered(scored)
            raise

    def answered(self, scored: Scored | None) -> None:
        """Count a request that was scored at once, learn from it, and let its turn end. scored: None if it could not be
        read."""
        self.counts.requests += 1
        self.counts.ids += 1
        self.asked_s = time.monotonic()
        self._turns.gone()
        if scored is not None and scored.took_s is not None:
            self._note_inline(*scored.took_s, 1)

    # -- a turn: read and predict what waits

    def begin(self) -> Batch | None:
        """Return what a turn begins with, to be given its rows before `take_turn`; None if the lane reads by itself."""
        if self._running is not None or self._ready or not self._waiting:
            return None
        batch = self._join()
        if batch is not None:
            self._ready.append(batch)
            # The first that waited may have gone, and one that is as of a time of its own be the next.
            if not batch.asks[0].alone and batch.n <= _FEW_ROWS and batch.join_keys():
                return batch
        return None

    def take_turn(self) -> None:
        """Read and predict what waits, until nothing does, or a thread is busy with it."""
        while self._running is None and (self._ready or self._waiting):
            batch = self._ready.popleft() if self._ready else self._join()
            if batch is None or (batch.asks[0].answer.done() and all(ask.answer.done() for ask in batch.asks)):
                continue  # nobody waits for it any more
            self._score(batch)

    def _join(self) -> Batch | None:
        """Take the oldest request that waits, and what can be scored with it."""
        if len(self._waiting) == 1:  # as of most models, where there are hundreds
            ask = self._waiting.popleft()
            return None if ask.answer.done() else Batch([ask], ask.keys, ask.n, ask.rows, ask.values)
        asks: list[_Ask] = []
        n, wants_values = 0, False
        while self._waiting:
            ask = self._waiting[0]
            if not ask.answer.done():  # else nobody waits for it any more
                if asks and (ask.alone or n + ask.n > _JOINED_ROWS_MAX):
                    break
                asks.append(ask)
                n += ask.n
                wants_values = wants_values or ask.values
            self._waiting.popleft()
            if ask.alone and asks:
                break
        if not asks:
            return None
        return Batch(asks, asks[0].keys, n, asks[0].rows, wants_values)

    def _score(self, batch: Batch) -> None:
        """Read a batch, and predict it if that has not to be waited for."""
        try:
            if batch.rows is None:
                batch.join_keys()
                batch.rows = self._client.read_now(self.loaded.plan, batch.keys, batch.n, batch.asks[0].as_of_ms)
            if batch.rows is None:
                self._wait_for_rows(batch)
            else:
                self._predict(batch, batch.rows)
        except Exception as error:
            self._fail(batch, error)

    def _wait_for_rows(self, batch: Batch) -> None:
        reading = self._client.read(self.loaded.plan, batch.keys, batch.n, batch.asks[0].as_of_ms)
        self._reading[batch] = task = asyncio.get_running_loop().create_task(reading)
        task.add_done_callback(lambda done: self._has_rows(batch, done))

    def _has_rows(self, batch: Batch, done: asyncio.Task[FeatureRows]) -> None:
        del self._reading[batch]
        if done.cancelled():
            self._fail(batch, _ENDS)
        elif (error := done.exception()) is not None:
            self._fail(batch, error)
        else:
            batch.rows = done.result()
            self._ready.append(batch)
        self.take_turn()

    def _predict(self, batch: Batch, rows: FeatureRows) -> None:
        if batch.wants_values:  # a predictor may write into its matrix: the answer has what was read
            batch.values = self.loaded.plan.named_values(rows)
        if self.compare is not None and batch.asks[0].as_of_ms is None:
            copied = self.compare.before(batch.keys, rows)
            batch.compared = None if copied is None else (self.compare, copied)
        if self.score_log is not None:
            batch.sampled = self.score_log.take(batch.keys, rows)
        if batch.n == 0:
            return self._answer(batch, rows, [], [])
        # Until it has been seen what a row takes, one may take as long as a call.
        if self.in_threads or (self._row_s or self.call_s) * batch.n > _LOOP_S_MAX:
            return self._predict_in_thread(batch, rows)
        return self._answer(batch, rows, *self._predict_inline(rows, batch.keys, batch.n, batch.asks[0].as_of_ms))

    def _predict_inline(
        self, rows: FeatureRows, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None
    ) -> tuple[list[Any], list[int]]:
        watch = Stopwatch() if self._precise_calls else None
        begun_s = time.perf_counter()
        self._turns.predicting = self, begun_s
        try:
            return self.loaded.predict_each(rows, keys, self._read_here, as_of_ms)
        finally:
            self._turns.predicting = NOBODY
            self._note_inline(time.perf_counter() - begun_s, None if watch is None else watch.seconds, n)

    def _predict_in_thread(self, batch: Batch, rows: FeatureRows) -> None:
        loop = asyncio.get_running_loop()

        def read(plan: ReadPlan, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None) -> FeatureRows:
            # The memories are the event loop's: it may map a successor's at any moment.
            return asyncio.run_coroutine_threadsafe(self._client.read(plan, keys, n, as_of_ms), loop).result()

        def predict() -> tuple[tuple[list[Any], list[int]] | Exception, float]:
            watch = Stopwatch()
            try:
                return self.loaded.predict_each(rows, batch.keys, read, batch.asks[0].as_of_ms), watch.seconds
            except Exception as error:
                return error, watch.seconds

        def returned(done: asyncio.Future[tuple[tuple[list[Any], list[int]] | Exception, float]]) -> None:
            self._running = None
            if done.cancelled():
                self._fail(batch, _ENDS)
            else:
                outcome, seconds = done.result()
                self._note(seconds, batch.n)
                if isinstance(outcome, Exception):
                    self._fail(batch, outcome)
                else:
                    self._answer(batch, rows, *outcome)
            self.take_turn()

        call = loop.run_in_executor(self._threads, predict)  # fails if there is no thread to be had
        self._running = batch
        for ask in self._asks():  # those behind it have to wait for it, too
            self._limit(ask)
        call.add_done_callback(returned)

    def _read_here(
        self, plan: ReadPlan, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None
    ) -> FeatureRows:
        """Read for a model that is called on the event loop, which must not wait for long."""
        for _ in range(_BUSY_TRIES):
            rows = self._client.read_now(plan, keys, n, as_of_ms)
            if rows is not None:
                return rows
            time.sleep(_BUSY_WAIT_S)
        # What cannot be read at once is called for: this model's place is in a thread from now on.
        self.in_threads = self._in_threads_for_good = True
        raise _ReadWaits(f"{plan.subject}: a slot of an entity is being written; retry", retry_after_ms=100)

    # -- answers

    def _answer(self, batch: Batch, rows: FeatureRows, results: list[Any], failed: list[int]) -> None:
        if failed:
            self._note_failed(batch, results, failed)
        scored, first = Scored(rows, results, None, batch.sampled), 0
        with_values = scored if batch.values is None else Scored(rows, results, batch.values, batch.sampled)
        for ask in batch.asks:
            if not ask.answer.done():
                ask.answer.set_result((with_values if ask.values else scored, first))
            if ask.timer is not None:
                ask.timer.cancel()
            first += ask.n
        if batch.compared is not None:  # by the shadow that was there then, of whose features the rows are
            compare, copied = batch.compared
            compare.after(batch.keys, copied, results)

    def _note_failed(self, batch: Batch, results: list[Any], failed: list[int]) -> None:
        """Say that the model failed on some rows, count their requests, and have none of these rows logged."""
        logger.warning("%d of %d ids failed, the first: %s", len(failed), batch.n, results[failed[0]])
        if batch.sampled is not None:
            for row in failed:
                batch.sampled.places.pop(row, None)
        ends = np.cumsum([ask.n for ask in batch.asks])
        self.counts.failed += len(np.unique(np.searchsorted(ends, failed, side="right")))

    def _fail(self, batch: Batch, error: BaseException) -> None:
        # It may be the fault of one; or nobody's, and a thread can wait for it (with rows that no predictor has had).
        if len(batch.asks) > 1 or (isinstance(error, _ReadWaits) and batch.asks[0].rows is None):
            for ask in reversed(batch.asks):
                ask.alone = True
                self._waiting.appendleft(ask)
            return
        (ask,) = batch.asks
        self._count_failure(error)
        if ask.timer is not None:
            ask.timer.cancel()
        if not ask.answer.done():
            ask.answer.set_exception(error)

    def _count_failure(self, error: BaseException) -> None:
        # What is no `MillpondError` is a bug of ours: it is raised where the request is answered.
        self.counts.failed += not isinstance(error, MillpondError) or error.status == 500

    # -- limits

    def _limit(self, ask: _Ask) -> None:
        if ask.timer is None:
            ask.timer = asyncio.get_running_loop().call_later(self._limits.predict_s, self._expire, ask)

    def _expire(self, ask: _Ask) -> None:
        if ask in self._waiting:
            self._waiting.remove(ask)
        if ask.answer.done():  # whoever asked has gone
            return
        self.counts.timeouts += 1
        ask.answer.set_exception(
            PredictTimeout(
                f"{self.loaded.model.subject}: no result within {self._limits.predict_s:g} s (setting "
                "`predict_timeout_s`); the model's owner has to look, or give it a pool of its own"
            )
        )

    def _note_inline(self, seconds: float, precise_s: float | None, n: int) -> None:
        """Learn from a call on the event loop. One that took long may have waited for a processor: the next are timed
        precisely."""
        if precise_s is not None:
            seconds = precise_s
            self._precise_calls = max(0, self._precise_calls - 1)  # others may have been timed meanwhile
        if seconds > INLINE_S_MAX and n <= _FEW_ROWS:
            self._precise_calls = _CALLS
            if precise_s is None:
                seconds = INLINE_S_MAX
        self._note(seconds, n)

    def _note(self, seconds: float, n: int) -> None:
        """Learn from a call how long the model takes, and where it is to be called."""
        counts = self.counts
        counts.calls += 1
        if n > _FEW_ROWS:  # what many rows take tells nothing of a call with few
            row_s = seconds / n
            self._row_s = row_s if self._row_s == 0 else self._row_s + 0.2 * (row_s - self._row_s)
            return
        self.call_s += 0.2 * (seconds - self.call_s)
        self._last_s.append(seconds)
        if self.in_threads:
            if max(self._last_s) <= INLINE_S_MAX and not self._in_threads_for_good:
                self.in_threads = False
                logger.info("%s: quick again, called on the event loop", self.loaded.model.subject)
        elif seconds > INLINE_S_MAX and self._is_slow():
            self.in_threads = True
            logger.warning(
                "%s: predict takes %.1f ms, called in a thread", self.loaded.model.subject, self.call_s * 1_000
            )

    def _is_slow(self) -> bool:
        """Return whether most of the last calls were slow; or some, and long enough to make all slow on average.

        One may have been the machine's fault.
        """
        slow = sum(one > INLINE_S_MAX for one in self._last_s)
        return slow > _CALLS // 2 or (slow > 1 and sum(self._last_s) > _CALLS * INLINE_S_MAX)


def _label(model: str, version: str) -> bytes:
    """Return what stands in an answer between its id and its result, as JSON."""
    return b'","model":%b,"version":%b,"result":' % (msgspec.json.encode(model), msgspec.json.encode(version))
