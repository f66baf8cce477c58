"""The Ray edge: a shard as an actor, and the ports that call it.

The actor adds a process, a queue and group commit to the plain shard and its log. It is detached and named, is
restarted by Ray without end, and never retried by Ray: a write may be sent twice only by us, who
know that it is safe. What crosses is described in `wire`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import ray

from millpond.feature_actors.durable import DurableShard, VolatileLog
from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.events import Events, Receipt
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.log.log import Durability, Log, LogFull
from millpond.feature_actors.log.record import HomeRecord, LogDamaged
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
    WireQuestion,
    WireReceipt,
    decode_answer,
    decode_events,
    decode_receipt,
    encode_answer,
    encode_events,
    encode_question,
    encode_receipt,
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
Bools = npt.NDArray[np.bool_]

#: Calls that wait for one shard, from one replica; more are answered 503.
PENDING_CALLS_MAX = 1_024
#: How often shards are asked until they read as of one time.
_READS_MAX = 8
_READY_POLL_S = 0.01
#: What is owed for so long is delivered by its home; sooner if someone waits for it; and again after so long.
_DELIVER_AFTER_S, _DELIVER_SOON_S, _DELIVER_AGAIN_S, _DELIVER_S_MAX = 2.0, 0.2, 0.5, 10.0
_SETTLE_POLL_S = 0.05
#: How long an offer waits to be taken.
OFFER_S_MAX = 60.0

logger = logging.getLogger("millpond.shard")


@dataclass(frozen=True)
class ShardSpec:
    """What every shard actor of a cluster is made from."""

    cluster_name: str
    namespace: str
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
        self._spec, self._number, self._of = spec, number, spec.shard_map.n_shards
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
        self._waiting: list[tuple[Prepared, asyncio.Future[Receipt]]] = []
        self._committer: asyncio.Task[None] | None = None
        self._deliverer: asyncio.Task[None] | None = None
        self._deliver_soon = False
        if spec.durability == "none":
            if opening.again:
                # It would answer with empty features, as if nobody had ever done anything. Readers of this node go on
                # with the memory that its predecessor left.
                self._refuse(
                    "was restarted and its features are gone; start the cluster anew and load the events again"
                )
            else:
                self._durable = DurableShard(layout, self._shard, VolatileLog())
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
        if self._deliverer is None and not self._refuses:
            self._deliverer = asyncio.ensure_future(self._deliver_forever())
        if self._refuses:
            retry = f"; retry after {self._retry_after_ms} ms" if self._code == "recovering" else ""
            raise Unavailable(
                f"shard {self._number} of {self._of} {self._refuses}{retry}",
                code=self._code,
                retry_after_ms=self._retry_after_ms,
            )

    # -- writes

    async def ingest(self, events: WireEvents, settled: Sequence[int]) -> WireReceipt:
        self._check()
        self._shard.deliveries.settle(settled)
        return encode_receipt(await self._written(self._shard.prepare_ingest(decode_events(events, self._layout))))

    async def offer(self, request: bytes, events: WireEvents, settled: Sequence[int]) -> WireReceipt:
        self._check()
        self._shard.deliveries.settle(settled)
        decoded = decode_events(events, self._layout)
        return encode_receipt(await self._written(self._shard.prepare_offer(request, decoded, time.monotonic())))

    async def take(self, request: bytes, accepted: bytes, homes: Sequence[tuple[int, int, int]]) -> None:
        self._check()
        records = [HomeRecord(*home) for home in homes]
        await self._written(self._shard.prepare_take(request, np.frombuffer(accepted, np.bool_), records))

    async def deliver(self, home: tuple[int, int, int], events: WireEvents) -> None:
        self._check()
        await self._written(self._shard.prepare_deliver(HomeRecord(*home), decode_events(events, self._layout)))

    async def settle(self, settled: Sequence[int], wait_before: int) -> None:
        """Return when what is owed of records before an offset has been applied everywhere."""
        self._check()
        owed = self._shard.deliveries
        owed.settle(settled)
        while any(offset < wait_before for offset in owed.owed):
            self._deliver_soon = True
            await asyncio.sleep(_SETTLE_POLL_S)
            self._check()

    async def _written(self, prepared: Prepared) -> Receipt:
        """Wait until what was prepared is in the log and applied. What has nothing new waits for what came before it,
        by which it may have been judged."""
        done: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._waiting.append((prepared, done))
        if self._committer is None:
            self._committer = asyncio.ensure_future(self._commit_waiting())
        return await done

    async def _commit_waiting(self) -> None:
        """Write what waits, group after group, until nothing waits."""
        durable = self._durable
        assert durable is not None
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                prepared = [p for p, _ in group]
                offsets: list[int | None] = [None] * len(prepared)
                try:
                    if any(p.record is not None for p in prepared):
                        settled = self._shard.deliveries.settled(durable.log.next)
                        offsets = await asyncio.get_running_loop().run_in_executor(
                            self._thread, durable.append, prepared, settled
                        )
                except LogFull as full:
                    group, self._waiting = group + self._waiting, []
                    for p, _ in reversed(group):
                        self._shard.undo(p)
                    for _, done in group:
                        if not done.done():  # its caller has not gone
                            done.set_exception(full)
                    continue
                now_s = time.monotonic()
                receipts = [self._shard.commit(p, at, now_s) for p, at in zip(prepared, offsets, strict=True)]
                for (_, done), receipt in zip(group, receipts, strict=True):
                    if not done.done():
                        done.set_result(receipt)
        except BaseException:
            # What is on disk, or in the tiles, is not known: a new process finds out.
            logger.exception("shard %d failed while it wrote; its process ends and recovers", self._number)
            os._exit(70)
        finally:
            self._committer = None

    # -- what is owed

    async def _deliver_forever(self) -> None:
        """Bring to the other shards what they have not had of this one's records; forget offers nobody takes."""
        while True:
            await asyncio.sleep(_SETTLE_POLL_S)
            try:
                now_s = time.monotonic()
                self._shard.drop_offers(now_s - OFFER_S_MAX)
                patience_s = _DELIVER_SOON_S if self._deliver_soon else _DELIVER_AFTER_S
                self._deliver_soon = False
                owed = self._shard.deliveries.owed
                for offset in [o for o, since_s in owed.items() if since_s < now_s - patience_s]:
                    if offset in owed:
                        await self._deliver(offset)
            except (Unavailable, LogDamaged) as error:
                logger.warning("shard %d cannot deliver yet: %s", self._number, error)
                await asyncio.sleep(_DELIVER_AGAIN_S)

    async def _deliver(self, offset: int) -> None:
        assert self._durable is not None
        home, events, concerned = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._durable.owed_events, offset
        )
        peers = _Calls(find_actors(self._spec.cluster_name, self._of, self._spec.namespace), _DELIVER_S_MAX)
        calls = {}
        for shard in np.flatnonzero(concerned.any(axis=1)).tolist():
            part = events.of_rows(np.flatnonzero(concerned[shard]), events.arrivals[:0])
            if shard == self._number:
                calls[shard] = self._deliver_here(home, part)
            else:
                calls[shard] = peers.call(shard, "deliver", tuple(home), encode_events(part))
        await all_of(calls)
        self._shard.deliveries.settle([offset])

    async def _deliver_here(self, home: HomeRecord, events: Events) -> None:
        await self._written(self._shard.prepare_deliver(home, events))

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

    def call(self, shard: int, method: str, *message: Any) -> Coroutine[Any, Any, Any]:
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

    def ingest(self, shard: int, events: Events, settled: Sequence[int]) -> Awaitable[Receipt]:
        return _receipt(self.call(shard, "ingest", encode_events(events), settled))

    def offer(self, shard: int, request: bytes, events: Events, settled: Sequence[int]) -> Awaitable[Receipt]:
        return _receipt(self.call(shard, "offer", request, encode_events(events), settled))

    def take(self, shard: int, request: bytes, accepted: Bools, homes: Sequence[HomeRecord]) -> Awaitable[None]:
        return self.call(shard, "take", request, accepted.tobytes(), [tuple(home) for home in homes])

    def settle(self, shard: int, settled: Sequence[int], wait_before: int) -> Awaitable[None]:
        return self.call(shard, "settle", settled, wait_before)


async def _receipt(answer: Coroutine[Any, Any, WireReceipt]) -> Receipt:
    return decode_receipt(await answer)


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
        return decode_answer(await self.call(shard, "read", encode_question(question)), question)

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
        answers = await all_of({shard: self.call(shard, "status") for shard in range(len(self._actors))})
        return list(answers.values())
