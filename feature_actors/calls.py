"""Calls of shards in other processes: what a transport offers, and the ports made of it.

A call is the name of a method of `server.ShardServer` and arguments that MessagePack can hold: names, numbers and
bytes, see `wire`. Transports: `socket_calls` on one node, and Ray's actor calls, in `actor`, between nodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.events import Events, Receipt
from millpond.feature_actors.log.record import HomeRecord
from millpond.feature_actors.plan import Answer, Question
from millpond.feature_actors.ports import all_of
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.wire import (
    decode_answer,
    decode_receipt,
    encode_events,
    encode_question,
)

__all__ = ["CallIngest", "CallRead", "Calls"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

#: How often shards are asked until they read as of one time.
_READS_MAX = 8


class Calls(Protocol):
    """A transport: calls of shards by number."""

    n_shards: int

    def call(self, shard: int, method: str, *arguments: Any) -> Awaitable[Any]:
        """Start a call and return what waits for its answer.

        Raises what the shard raised; `Unavailable` if it cannot be reached, or does not answer in time.
        """


class CallIngest:
    """Ingest port over a transport."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def ingest(self, shard: int, events: Events, settled: Sequence[int]) -> Awaitable[Receipt]:
        return _receipt(self._calls.call(shard, "ingest", encode_events(events), list(settled)))

    def offer(self, shard: int, request: bytes, events: Events, settled: Sequence[int]) -> Awaitable[Receipt]:
        return _receipt(self._calls.call(shard, "offer", request, encode_events(events), list(settled)))

    def take(self, shard: int, request: bytes, accepted: Bools, homes: Sequence[HomeRecord]) -> Awaitable[None]:
        return self._calls.call(shard, "take", request, accepted.tobytes(), [list(home) for home in homes])

    def deliver(self, shard: int, home: HomeRecord, events: Events) -> Awaitable[None]:
        """Bring a shard its part of a record that its home owes."""
        return self._calls.call(shard, "deliver", list(home), encode_events(events))

    def settle(self, shard: int, settled: Sequence[int], wait_before: int, left: Sequence[int] = ()) -> Awaitable[None]:
        return self._calls.call(shard, "settle", list(settled), wait_before, list(left))


async def _receipt(answer: Awaitable[Any]) -> Receipt:
    return decode_receipt(await answer)


class CallRead:
    """Read port over a transport, and what else the shards can be asked."""

    def __init__(self, calls: Calls, shard_map: ShardMap) -> None:
        self._calls = calls
        self._map = shard_map

    async def read(self, question: Question) -> Answer:
        """Ask each shard for its part and put the parts together.

        All features of an id are as of one time. The shards do not know each other's, so each reads as of its own
        first; those that lag behind the newest are asked again for that time.
        """
        question = question.hashed()
        n, keys = question.n, range(len(question.program.keys))
        shards = np.stack([self._map.shards_of(question.hashes[key].view(np.uint64)) for key in keys])
        concerned = {s: np.flatnonzero((shards == s).any(axis=0)) for s in np.unique(shards).tolist()}
        answers: dict[int, Answer] = {}
        asking, clock = list(concerned), question.clock
        for _ in range(_READS_MAX):
            questions = {s: question.of_rows(concerned[s], clock) for s in asking}
            started = {s: asyncio.ensure_future(self._ask(s, q)) for s, q in questions.items()}
            answers |= await all_of(started)
            as_of = np.full(n, np.iinfo(np.int64).min, np.int64)
            for shard, answer in answers.items():
                as_of[concerned[shard]] = np.maximum(as_of[concerned[shard]], answer.as_of)
            asking = [s for s, answer in answers.items() if (answer.as_of < as_of[concerned[s]]).any()]
            if not asking:
                return self._together(question, as_of, shards, concerned, answers)
            clock = as_of
        raise Unavailable("events of the entity arrive faster than it can be read", retry_after_ms=100)

    def read_now(self, question: Question) -> Answer | None:
        """Return None: a call is always waited for."""
        return None

    async def _ask(self, shard: int, question: Question) -> Answer:
        return decode_answer(await self._calls.call(shard, "read", encode_question(question)), question)

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
            whole.trace[rows, 0] = answer.trace[:, 0]
            for part, key in enumerate(program.key_of_part):
                mine = np.flatnonzero(shards[key, rows] == shard)
                columns, views = program.columns_of_part[part], program.views_of_part[part]
                whole.values[np.ix_(rows[mine], columns)] = answer.values[np.ix_(mine, columns)]
                whole.known[np.ix_(rows[mine], views)] = answer.known[np.ix_(mine, views)]
                whole.trace[rows[mine], 1 + part] = answer.trace[mine, 1 + part]
            for column, key in program.texts:
                for i in np.flatnonzero(shards[key, rows] == shard).tolist():
                    whole.texts[column][int(rows[i])] = answer.texts[column][i]
        return whole

    # -- entities that are to be forgotten

    async def forget(self, field: str, value: int | str, at_ms: int) -> None:
        """Have tombstones of an entity on all shards: from then on nothing that is before is taken any more, and what
        there is goes in the background. Raises `Unavailable` if a shard is: the others see to it that it has one."""
        tombstone = await self._calls.call(0, "forget", field, value, at_ms)
        await all_of({n: self._calls.call(n, "entomb", tombstone) for n in range(1, self._calls.n_shards)})

    async def forgotten(self, field: str, value: int | str) -> list[dict[str, Any] | None]:
        """Return how far each shard is with an entity, None if it has no tombstone of it."""
        answers: dict[int, Any] = await all_of(
            {n: self._calls.call(n, "forgotten", field, value) for n in range(self._calls.n_shards)}
        )
        return [answers[n] for n in sorted(answers)]

    async def status(self) -> list[dict[str, Any]]:
        """Return what every shard says of itself, also one that is still recovering, or cannot be reached."""
        started = {shard: self._calls.call(shard, "status") for shard in range(self._calls.n_shards)}
        answers: list[dict[str, Any]] = []
        for shard, answer in started.items():
            try:
                answers.append(await answer)
            except Unavailable as error:
                answers.append({"shard": shard, "state": "unreachable", "why": error.message})
        return answers
