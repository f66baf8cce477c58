"""The Ray edge: a shard as an actor, and the ports that call it.

The actor adds a process, a queue and group commit to the plain shard and its log. It is detached and named, is
restarted by Ray without end, and never retried by Ray: a write may be sent twice only by us, who
know that it is safe. What crosses is described in `wire`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from millpond.feature_actors.durable import DurableShard
from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.keys import Hashes
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.log.log import Durability, Log, LogFull
from millpond.feature_actors.manifest import open_shard, shard_dir
from millpond.feature_actors.plan import Answer, Question
from millpond.feature_actors.ports import all_of
from millpond.feature_actors.shard import Prepared, Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.tiles.memory import Control, Memory
from millpond.feature_actors.view import FeatureView
from millpond.feature_actors.wire import (
    QuestionDecoder,
    WireAnswer,
    WireEvents,
    WireIds,
    WireQuestion,
    decode_answer,
    decode_events,
    decode_ids,
    encode_answer,
    encode_events,
    encode_ids,
    encode_question,
)

__all__ = [
    "ActorIngest",
    "ActorRead",
    "FeatureActor",
    "ShardSpec",
    "actor_name",
    "find_actors",
    "start_actors",
]

Ints = npt.NDArray[np.int64]

#: Calls that wait for one shard, from one replica; more are answered 503.
PENDING_CALLS_MAX = 1_024
#: How often shards are asked until they read as of one time.
_READS_MAX = 8
_READY_POLL_S = 0.01

logger = logging.getLogger("millpond.shard")


@dataclass(frozen=True)
class ShardSpec:
    """What every shard actor of a cluster is made from."""

    cluster_name: str
    run_id: str
    data_dir: str
    sources: tuple[Source, ...]
    views: tuple[FeatureView, ...]
    shard_map: ShardMap
    hash_seed: int
    dedupe_horizon_ms: int
    memory_dir: str
    memory_bytes_max: int
    strings_max: int
    reclaim_margin_ms: int
    durability: Durability


def actor_name(cluster_name: str, shard: int) -> str:
    return f"millpond-{cluster_name}-shard-{shard:03d}"


class FeatureActor:
    """One shard in a process of its own; methods as of `Shard`.

    Writes that wait together travel to the log together: while one group is being synced, in a thread, the next one
    gathers. All else happens on the actor's event loop, one thing at a time.
    """

    def __init__(self, spec: ShardSpec, number: int) -> None:
        self._number, self._of = number, spec.shard_map.n_shards
        layout = self._layout = compile_layout(spec.sources, spec.views)
        self._decoder = QuestionDecoder(layout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        opening = open_shard(Path(spec.data_dir), number, spec.run_id)
        control = Control(Path(spec.memory_dir), number, writable=True)
        self._shard = Shard(
            layout,
            spec.shard_map,
            number,
            seed=spec.hash_seed,
            dedupe_horizon_ms=spec.dedupe_horizon_ms,
            memory=Memory.create(control.tiles_path(opening.epoch), spec.memory_bytes_max),
            strings_max=spec.strings_max,
            reclaim_margin_ms=spec.reclaim_margin_ms,
        )
        self._durable: DurableShard | None = None
        #: Why it refuses everything, for now or for good; "" if it does not.
        self._refuses, self._code, self._retry_after_ms = "", "", 0
        self._waiting: list[tuple[Prepared, asyncio.Future[None]]] = []
        self._committer: asyncio.Task[None] | None = None
        if spec.durability == "none":
            if opening.again:
                # It would answer with empty features, as if nobody had ever done anything. Readers of this node go on
                # with the memory that its predecessor left.
                self._refuse(
                    "was restarted and its features are gone; start the cluster anew and load the events again"
                )
            else:
                control.publish(opening.epoch)
            return
        self._refuse("is about to replay its log", "recovering", 200)
        log_dir = shard_dir(Path(spec.data_dir), number) / "log"
        Thread(
            target=self._recover, args=(layout, log_dir, spec.durability, control, opening.epoch), daemon=True
        ).start()

    def _recover(
        self, layout: Layout, log_dir: Path, durability: Literal["sync", "process"], control: Control, epoch: int
    ) -> None:
        """Replay the log; then let readers and writers in. What cannot be recovered is refused, not begun anew."""
        try:
            # Opened in the thread that writes to it: SQLite's connections are of a thread.
            log = self._thread.submit(Log, log_dir, durability).result()
            durable = DurableShard(layout, self._shard, log)
            durable.recover(
                lambda at, end: self._refuse(f"is replaying its log (offset {at} of {end})", "recovering", 200)
            )
            control.publish(epoch)
            self._durable, self._refuses = durable, ""
        except BaseException as error:
            logger.exception("shard %d cannot recover", self._number)
            self._refuse(f"cannot recover: {error}")

    def _refuse(self, why: str, code: str = "shard_lost", retry_after_ms: int = 10_000) -> None:
        self._code, self._retry_after_ms, self._refuses = code, retry_after_ms, why

    def _check(self) -> None:
        if self._refuses:
            retry = f"; retry after {self._retry_after_ms} ms" if self._code == "recovering" else ""
            raise Unavailable(
                f"shard {self._number} of {self._of} {self._refuses}{retry}",
                code=self._code,
                retry_after_ms=self._retry_after_ms,
            )

    # -- writes

    async def admit(self, ids: WireIds) -> bytes:
        self._check()
        prepared = self._shard.prepare_admit(*decode_ids(ids))
        await self._written(prepared)
        return prepared.verdicts.tobytes()

    async def apply(self, events: WireEvents) -> None:
        self._check()
        await self._written(self._shard.prepare_apply(*decode_events(events, self._layout)))

    async def ingest(self, ids: WireIds, events: WireEvents) -> bytes:
        self._check()
        source, hashes, contents, _ = decode_ids(ids)
        _, *rest = decode_events(events, self._layout)
        prepared = self._shard.prepare_ingest(source, hashes, contents, *rest)
        await self._written(prepared)
        return prepared.verdicts.tobytes()

    async def _written(self, prepared: Prepared) -> None:
        """Wait until what was prepared is in the log and applied. What has nothing new waits for what came before it,
        by which it may have been judged."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((prepared, done))
        if self._committer is None:
            self._committer = asyncio.ensure_future(self._commit_waiting())
        await done

    async def _commit_waiting(self) -> None:
        """Write what waits, group after group, until nothing waits."""
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                prepared = [p for p, _ in group]
                try:
                    if self._durable is not None and any(p.record is not None for p in prepared):
                        await asyncio.get_running_loop().run_in_executor(self._thread, self._durable.append, prepared)
                except LogFull as full:
                    group, self._waiting = group + self._waiting, []
                    for p, _ in reversed(group):
                        self._shard.undo(p)
                    for _, done in group:
                        if not done.done():  # its caller has not gone
                            done.set_exception(full)
                    continue
                for p in prepared:
                    self._shard.commit(p)
                for _, done in group:
                    if not done.done():
                        done.set_result(None)
        except BaseException:
            # What is on disk, or in the tiles, is not known: a new process finds out.
            logger.exception("shard %d failed while it wrote; its process ends and recovers", self._number)
            os._exit(70)
        finally:
            self._committer = None

    # -- the rest

    async def ready(self) -> None:
        """Return when it has recovered. Raises `Unavailable` if it cannot."""
        while self._code == "recovering" and self._refuses:
            await asyncio.sleep(_READY_POLL_S)
        self._check()

    def read(self, question: WireQuestion) -> WireAnswer:
        self._check()
        return encode_answer(self._shard.read(self._decoder.decode(question)))

    def status(self) -> dict[str, Any]:
        self._check()
        return asdict(self._shard.status())

    def check(self) -> list[str]:
        self._check()
        return self._shard.check()


def start_actors(spec: ShardSpec, namespace: str, num_cpus: float) -> list[Any]:
    """Start an actor per shard, detached and named, and wait until each has recovered."""
    remote = ray.remote(FeatureActor)
    actors = [
        remote.options(
            name=actor_name(spec.cluster_name, shard),
            namespace=namespace,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            max_pending_calls=PENDING_CALLS_MAX,
            num_cpus=num_cpus,
        ).remote(spec, shard)
        for shard in range(spec.shard_map.n_shards)
    ]
    ray.get([a.ready.remote() for a in actors])
    return actors


def find_actors(cluster_name: str, n_shards: int, namespace: str) -> list[Any]:
    """Return the handles of a cluster's shard actors, by name."""
    return [ray.get_actor(actor_name(cluster_name, shard), namespace) for shard in range(n_shards)]


class _Calls:
    """Calls to shard actors: each with a time limit from its start, errors as they were raised there."""

    def __init__(self, actors: Sequence[Any], timeout_s: float = 30.0) -> None:
        self._actors = actors
        self._timeout_s = timeout_s

    def _call(self, shard: int, method: str, *message: Any) -> Coroutine[Any, Any, Any]:
        """Start a call and return what waits for its answer.

        A message is one argument, a tuple of bytes and numbers: Ray serializes each argument by itself.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            call = getattr(self._actors[shard], method).remote(*message)
        except ray.exceptions.PendingCallsLimitExceeded:
            call = None
        return self._answer(shard, call, deadline)

    async def _answer(self, shard: int, call: Any, deadline: float) -> Any:
        where = f"shard {shard} of {len(self._actors)}"
        if call is None:
            raise Unavailable(f"{where} has {PENDING_CALLS_MAX} calls waiting already", retry_after_ms=1_000)
        try:
            async with asyncio.timeout_at(deadline):
                return await call
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MillpondError):
                raise error.cause from None
            raise
        except TimeoutError:
            message = f"{where} did not answer within {self._timeout_s:g} s"
            raise Unavailable(message, retry_after_ms=1_000) from None
        except ray.exceptions.RayActorError as error:
            raise Unavailable(f"{where} is not running; it is being restarted", retry_after_ms=1_000) from error
        except ray.exceptions.RayError as error:
            message = f"{where} could not be called: {type(error).__name__}"
            raise Unavailable(message, retry_after_ms=1_000) from error


class ActorIngest(_Calls):
    """Ingest port to shard actors."""

    def admit(
        self, shard: int, source: str, ids: Hashes, contents: Ints, received_ms: int
    ) -> Awaitable[npt.NDArray[np.uint8]]:
        return self._verdicts(self._call(shard, "admit", encode_ids(source, ids, contents, received_ms)))

    async def _verdicts(self, answer: Coroutine[Any, Any, bytes]) -> npt.NDArray[np.uint8]:
        return np.frombuffer(await answer, np.uint8)

    def apply(
        self, shard: int, source: str, batch: pa.RecordBatch, arrivals: Ints, received_ms: int
    ) -> Awaitable[None]:
        return self._call(shard, "apply", encode_events(source, batch, arrivals, received_ms))

    def ingest(
        self,
        shard: int,
        source: str,
        ids: Hashes,
        contents: Ints,
        batch: pa.RecordBatch,
        arrivals: Ints,
        received_ms: int,
    ) -> Awaitable[npt.NDArray[np.uint8]]:
        wire_ids = encode_ids(source, ids, contents, received_ms)
        return self._verdicts(
            self._call(shard, "ingest", wire_ids, encode_events(source, batch, arrivals, received_ms))
        )


class ActorRead(_Calls):
    """Read port to shard actors, on whatever node they are."""

    def __init__(self, actors: Sequence[Any], shard_map: ShardMap, timeout_s: float = 30.0) -> None:
        super().__init__(actors, timeout_s)
        self._map = shard_map

    async def read(self, question: Question) -> Answer:
        """Ask each shard for its part and put the parts together.

        All features of an id are as of one time. The shards do not know each other's, so each reads as of its own
        first; those that lag behind the newest are asked again for that time.
        """
        n, keys = question.n, range(len(question.program.keys))
        shards = np.stack([self._map.shards_of(question.hashes[key].view(np.uint64)) for key in keys])
        concerned = {s: np.flatnonzero((shards == s).any(axis=0)) for s in np.unique(shards).tolist()}
        answers: dict[int, Answer] = {}
        asking, clock = list(concerned), question.clock
        for _ in range(_READS_MAX):
            questions = {s: question.of_rows(concerned[s], clock) for s in asking}
            answers |= await all_of({s: self._ask(s, q) for s, q in questions.items()})
            as_of = np.full(n, np.iinfo(np.int64).min, np.int64)
            for shard, answer in answers.items():
                as_of[concerned[shard]] = np.maximum(as_of[concerned[shard]], answer.as_of)
            asking = [s for s, answer in answers.items() if (answer.as_of < as_of[concerned[s]]).any()]
            if not asking:
                return self._together(question, as_of, shards, concerned, answers)
            clock = as_of
        raise Unavailable("events of the entity arrive faster than it can be read", retry_after_ms=100)

    async def _ask(self, shard: int, question: Question) -> Answer:
        return decode_answer(await self._call(shard, "read", encode_question(question)), question)

    def _together(
        self, question: Question, as_of: Ints, shards: Ints, concerned: dict[int, Ints], answers: dict[int, Answer]
    ) -> Answer:
        if len(answers) == 1:
            return next(iter(answers.values()))
        whole, program = Answer.empty(question), question.program
        whole.as_of[:] = as_of
        for column, _ in program.texts:
            whole.texts[column] = [None] * question.n
        for shard, answer in answers.items():
            rows = concerned[shard]
            for key, (columns, views) in enumerate(zip(program.columns_of_key, program.views_of_key, strict=True)):
                mine = np.flatnonzero(shards[key, rows] == shard)
                whole.values[np.ix_(rows[mine], columns)] = answer.values[np.ix_(mine, columns)]
                whole.known[np.ix_(rows[mine], views)] = answer.known[np.ix_(mine, views)]
            for column, key in program.texts:
                for i in np.flatnonzero(shards[key, rows] == shard).tolist():
                    whole.texts[column][int(rows[i])] = answer.texts[column][i]
        return whole

    async def status(self) -> list[dict[str, Any]]:
        """Return what every shard says of itself."""
        answers = await all_of({shard: self._call(shard, "status") for shard in range(len(self._actors))})
        return list(answers.values())
