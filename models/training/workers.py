"""Who computes the pieces of a join: shards in threads of this process, or workers elsewhere that have one shard each.

Whoever it is, the bits of the answers are the same: a shard applies what is of its slots in the order of the pieces.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.events import PastEvents
from millpond.feature_actors.keys import owned
from millpond.feature_actors.layout import Layout, PlanProgram
from millpond.feature_actors.plan import Answer, Question
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap

__all__ = ["JoinShard", "Piece", "SentPiece", "Share", "Threads", "Workers", "put_share"]

Ints = npt.NDArray[np.int64]

_SLOTS = 256
#: Memory decides how many strings there can be: a label must not lack one that was served.
_STRINGS_MAX = 10**9


@dataclass(frozen=True, slots=True)
class Piece:
    """Labels that ask and the events that come meanwhile. rows int64 [n]: the places of the labels among all."""

    rows: Ints
    question: Question
    events: Mapping[str, PastEvents]

    @property
    def size(self) -> int:
        return len(self.rows) + sum(len(past.known) for past in self.events.values())


class Workers(Protocol):
    """Who computes a join."""

    def answers(self, layout: Layout, pieces: Callable[[], Iterator[Piece]]) -> Iterator[tuple[Piece, Answer]]:
        """Yield the pieces in their order, each once, with what all shards together answer.

        pieces: yields them from the first one on, however often it is called; only the last call's go on.
        """
        ...


class Threads:
    """n shards, by default one for each core, each with a thread of its own: compiled code lets the others run."""

    def __init__(self, n: int | None = None) -> None:
        self._n = n or len(os.sched_getaffinity(0))

    def answers(self, layout: Layout, pieces: Callable[[], Iterator[Piece]]) -> Iterator[tuple[Piece, Answer]]:
        shards = [_shard(layout, number, self._n) for number in range(self._n)]
        with ThreadPoolExecutor(self._n, "millpond-join") as pool:
            for piece in pieces():
                answer = Answer.empty(piece.question)
                for done in [pool.submit(shard.join, piece.question, piece.events, answer) for shard in shards]:
                    done.result()
                yield piece, answer


def _shard_map(n: int) -> ShardMap:
    return ShardMap.even(max(_SLOTS, n), n)


def _shard(layout: Layout, number: int, of: int) -> Shard:
    return Shard(layout, _shard_map(of), number, strings_max=_STRINGS_MAX)


# -- elsewhere


class Share(NamedTuple):
    """What one shard answers of a piece: by part of the program, of the rows that are its own, values float64
    [m, columns of the part] and known bool [m, views of the part]; the strings of columns that are of strings."""

    values: list[npt.NDArray[np.float64]]
    known: list[npt.NDArray[np.bool_]]
    texts: dict[int, list[str | None]]


class SentPiece(NamedTuple):
    """A piece on its way to a worker, which knows the program: arrays as of `Question`, and by source its events as
    Arrow IPC, with the arrays of `PastEvents`."""

    hashes: Ints
    clock: Ints
    as_of: Ints
    events: dict[str, tuple[pa.Buffer, Ints, Ints, npt.NDArray[np.uint32]]]

    @classmethod
    def of(cls, piece: Piece) -> SentPiece:
        question = piece.question
        assert question.as_of is not None
        events = {}
        for name, past in piece.events.items():
            content = pa.BufferOutputStream()
            with pa.ipc.new_stream(content, past.batch.schema) as writer:
                writer.write_batch(past.batch)
            events[name] = content.getvalue(), past.known, past.arrivals, past.routes
        return cls(question.hashes, question.clock, question.as_of, events)

    def question(self, program: PlanProgram) -> Question:
        # What is sent may arrive read-only, and to compiled code that is another type.
        return Question(program, owned(self.hashes), owned(self.clock), False, owned(self.as_of))

    def past(self) -> dict[str, PastEvents]:
        return {
            name: PastEvents(pa.ipc.open_stream(content).read_next_batch(), known, arrivals, routes)
            for name, (content, known, arrivals, routes) in self.events.items()
        }


class JoinShard:
    """The shard of one worker: of the pieces, which come in their order, it answers what is its own."""

    def __init__(self, layout: Layout, program: PlanProgram, number: int, of: int) -> None:
        self._shard, self._program = _shard(layout, number, of), program
        self._number, self._of = number, of

    def share(self, sent: SentPiece) -> Share:
        question, program = sent.question(self._program), self._program
        answer = Answer.empty(question)
        self._shard.join(question, sent.past(), answer)
        rows = _rows_of(question, self._number, self._of)
        return Share(
            [answer.values[np.ix_(rows[key], own)] for key, own in _each(program.key_of_part, program.columns_of_part)],
            [answer.known[np.ix_(rows[key], own)] for key, own in _each(program.key_of_part, program.views_of_part)],
            {column: [answer.texts[column][row] for row in rows[key].tolist()] for column, key in program.texts},
        )


def put_share(share: Share, question: Question, answer: Answer, number: int, of: int) -> None:
    """Put what shard `number` of so many answers into the answer to the whole question."""
    program = question.program
    rows = _rows_of(question, number, of)
    for values, (key, own) in zip(share.values, _each(program.key_of_part, program.columns_of_part), strict=True):
        answer.values[np.ix_(rows[key], own)] = values
    for known, (key, own) in zip(share.known, _each(program.key_of_part, program.views_of_part), strict=True):
        answer.known[np.ix_(rows[key], own)] = known
    for column, key in program.texts:
        texts = answer.texts.setdefault(column, [None] * question.n)
        for row, text in zip(rows[key].tolist(), share.texts[column], strict=True):
            texts[row] = text


def _rows_of(question: Question, number: int, of: int) -> list[Ints]:
    """Return by key of the program which rows are of a shard, int64 [m]."""
    shards = _shard_map(of)
    return [np.flatnonzero(shards.shards_of(hashes.view(np.uint64)) == number) for hashes in question.hashes]


def _each(keys: tuple[int, ...], own: tuple[Ints, ...]) -> Iterator[tuple[int, Ints]]:
    return zip(keys, own, strict=True)
