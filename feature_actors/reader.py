"""Reading features straight from shards' memories: one compiled call, whatever the number of views and shards.

`MemoryReader` reads memories that are mapped in this process: a shard's own, those of shards in one process, or
those of the shard processes of this node (`MemoryRead`, the read port of model replicas).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.plan import Answer, Question, as_of_in_past
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import Control, Memory
from millpond.feature_actors.tiles.read import (
    A_DETAIL,
    A_ROW,
    BASE,
    BUSY,
    CONTROL,
    EPOCH,
    FOREIGN,
    MOVED,
    PAST,
    read_rows,
)
from millpond.feature_actors.tiles.strings import StringReader

__all__ = ["KernelCall", "MemoryRead", "MemoryReader", "SlotBusy"]

Ints = npt.NDArray[np.int64]


class SlotBusy(Unavailable):
    """A slot was being written all the while, or was left half-written by a process that died."""

    code = "slot_busy"


class _Busy(Exception):
    """A slot is being written; the ids before `row` have been read."""

    def __init__(self, shard: int, row: int) -> None:
        self.shard, self.row = shard, row


class _Moved(Exception):
    """A shard has published another epoch."""

    def __init__(self, shard: int) -> None:
        self.shard = shard


class KernelCall:
    """What `read_rows` is told, in one piece of memory, at `address`: a kernel takes over a number faster than ten
    arrays, by more than it takes to read an entity.

    start: the first id to read. The arrays whose addresses it tells are the question's, the answer's and the reader's,
    which are to live as long. reader: stands for that, without keeping it. given: what is returned of a question that
    recurs, each time with copies of the answer's arrays.
    """

    __slots__ = ("_words", "address", "answer", "event_clock", "given", "reader")

    def __init__(self, reader: MemoryReader, question: Question, answer: Answer, start: int) -> None:
        self.reader, self.answer, self.event_clock = reader.name, answer, question.event_clock
        self.given = Answer(answer.as_of, answer.values, answer.known, answer.trace, {})
        program, (columns, views, traced) = question.program, question.program.widths
        shards, owners = reader.shards, reader.owners
        plans = program.plans if question.plans is None else question.plans
        # In the order of the words `A_...`.
        words = [
            _at(shards), shards.shape[1], _at(owners), len(owners), program.layout_digest,
            program.packed(len(owners)).address, _at(plans), len(plans), _at(question.ids), len(question.ids),
            _at(question.hashes), len(question.hashes), question.n, start, _at(question.clock),
            question.event_clock, question.as_of is not None, _at(answer.as_of), _at(answer.values, np.float64),
            columns, _at(answer.known, np.bool_), views, _at(answer.trace), traced, 0, 0,
        ]  # fmt: skip
        assert len(words) == A_DETAIL + 1
        self._words = np.array(words, np.int64)
        self.address = _at(self._words)

    @property
    def stopped_at(self) -> tuple[int, int]:
        """Return with which id something was wrong, and with which shard, or since which time."""
        return int(self._words[A_ROW]), int(self._words[A_DETAIL])


def _at(array: npt.NDArray[Any], dtype: Any = np.int64) -> int:
    """Return where an array lies; a kernel hears no more of it. Raises `TypeError` if it is not what that takes."""
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise TypeError(f"kernel: expected a contiguous array of {np.dtype(dtype)}, got {array.dtype} {array.strides}")
    return array.__array_interface__["data"][0]  # type: ignore[no-any-return]  # quicker than `ctypes.data`


class MemoryReader:
    """Read the memories of some shards of a cluster; slots of the others are left out.

    shards: whose slots are read; `attach` their memories before the first read.
    """

    def __init__(self, shard_map: ShardMap, shards: list[int]) -> None:
        mine = set(shards)
        self._n_shards = shard_map.n_shards
        #: By which it is known without being kept.
        self.name = object()
        #: What `read_rows` is told of the shards.
        self.owners: Ints = np.array([owner if owner in mine else -1 for owner in shard_map.owners], np.int64)
        self.shards: Ints = np.zeros((3, self._n_shards), np.int64)
        # Their addresses are in the arrays, so they must live as long.
        self._memories: dict[int, tuple[Memory, Control | None]] = {}
        self._strings: dict[int, StringReader] = {}

    def attach(self, shard: int, memory: Memory, control: Control | None = None, epoch: int = 0) -> None:
        """Read a shard from this memory from now on."""
        self.shards[BASE, shard], self.shards[EPOCH, shard] = memory.address, epoch
        self.shards[CONTROL, shard] = 0 if control is None else control.address
        self._memories[shard] = memory, control
        self._strings[shard] = StringReader(memory)

    def read(self, question: Question) -> Answer:
        """Answer a question; all of it, or nothing. If it recurs the answer is the same object each time, with new
        arrays.

        Raises `AsOfInPast`; `_Busy` and `_Moved` if it has to be tried again, where others write to the memories.
        """
        if not question.recurs:
            answer = Answer.empty(question)
            self.attempt(question, answer, 0)
            return answer
        call = question.call
        if call is None or call.reader is not self.name or call.event_clock != question.event_clock:
            call = question.call = KernelCall(self, question, Answer.empty(question), 0)
        unknown = read_rows(call.address)
        if unknown < 0:
            self._raise(question, call, unknown)
        found, answer = call.answer, call.given
        answer.as_of, answer.values = found.as_of.copy(), found.values.copy()
        answer.known, answer.trace = found.known.copy(), found.trace.copy()
        answer.all_known = unknown == 0
        if question.program.texts:
            answer.texts = {}
            self.read_texts(question, answer)
        return answer

    def attempt(self, question: Question, answer: Answer, start: int) -> None:
        """Read the ids from `start` on into an answer made for the question. Raises as `read`."""
        call = KernelCall(self, question, answer, start)
        unknown = read_rows(call.address)
        if unknown < 0:
            self._raise(question, call, unknown)
        answer.all_known = start == 0 and unknown == 0
        if question.program.texts:
            self.read_texts(question, answer)

    def _raise(self, question: Question, call: KernelCall, code: int) -> None:
        row, detail, code = *call.stopped_at, -code
        if code == PAST:
            assert question.as_of is not None
            raise as_of_in_past(int(question.as_of[row]), detail, question.program.past_ms)
        if code == MOVED:
            raise _Moved(detail)
        if code == FOREIGN:
            raise Unavailable(
                f"shard {detail} of {self._n_shards} keeps other features than this process reads", retry_after_ms=1_000
            )
        assert code == BUSY
        raise _Busy(detail, row)

    def read_texts(self, question: Question, answer: Answer) -> None:
        """Look up the strings whose addresses are in the answer."""
        for column, key in question.program.texts:
            slots = question.hashes[key, :, 1].view(np.uint64) % np.uint64(len(self.owners))
            owners = self.owners[slots.astype(np.int64)].tolist()
            texts = answer.texts.setdefault(column, [None] * question.n)
            for i, (owner, address) in enumerate(zip(owners, answer.values[:, column].tolist(), strict=True)):
                if owner >= 0:
                    texts[i] = self._strings[owner].text(address)

    def populate(self) -> None:
        """Map what the shards have allocated since the last call, so that no read waits for a page."""
        for memory, _ in self._memories.values():
            memory.populate()

    def writer_lives(self, shard: int) -> bool:
        control = self._memories[shard][1]
        return control is None or control.writer_lives


#: How long a slot may be written before the read gives up, if its writer lives: it may not have a core just now.
_BUSY_S_MAX = 0.25
_BUSY_WAIT_S = 0.001
_ATTACH_TRIES = 100
_POPULATE_EVERY = 256


class MemoryRead:
    """Read port to the shard processes of this node, through the files that they write.

    folder: of the control pages and tiles, see `tiles.memory`. Goes on with the memory of a process that died, and
    moves to its successor's when that is published.

    Raises `Unavailable` if a shard has not published its memory yet.
    """

    def __init__(self, shard_map: ShardMap, folder: Path) -> None:
        self._n_shards = shard_map.n_shards
        self._folder = folder
        self._reader = MemoryReader(shard_map, list(range(self._n_shards)))
        self._reads = 0
        self._moves = 0
        for shard in range(self._n_shards):
            self._attach(shard)

    def _attach(self, shard: int) -> None:
        for _ in range(_ATTACH_TRIES):
            try:
                control = Control(self._folder, shard)
                epoch = control.epoch
                if epoch == 0:
                    break
                memory = Memory.open(control.tiles_path(epoch))
                memory.populate()
                self._reader.attach(shard, memory, control, epoch)
                self._moves += 1
                return
            except FileNotFoundError:  # taken away by a successor in this very moment, or never there
                continue
        raise Unavailable(
            f"shard {shard} of {self._n_shards} has not published its memory yet; retry", retry_after_ms=1_000
        )

    def read_now(self, question: Question) -> Answer | None:
        """Answer a question, or return None if a slot of it is being written, or a shard has moved."""
        self._reads += 1
        if self._reads % _POPULATE_EVERY == 0:
            self._reader.populate()
        try:
            return self._reader.read(question)
        except (_Moved, _Busy):
            return None

    async def read(self, question: Question) -> Answer:
        """Answer a question; waits only while a slot of it is being written. One that recurs is not to be asked again
        meanwhile.

        Raises `SlotBusy` when that takes too long, at once if the process that writes has died.
        """
        self._reader.populate()
        if question.recurs:
            with contextlib.suppress(_Moved, _Busy):
                return self._reader.read(question)
        answer = Answer.empty(question)
        start, deadline = 0, 0.0
        while True:
            try:
                self._reader.attempt(question, answer, start)
                return answer
            except _Moved as moved:
                self._attach(moved.shard)
                start = 0  # an answer is of one epoch of a shard
            except _Busy as busy:
                start, now = busy.row, time.monotonic()
                deadline = deadline or now + _BUSY_S_MAX
                if now > deadline or not self._reader.writer_lives(busy.shard):
                    raise SlotBusy(
                        f"shard {busy.shard} of {self._n_shards}: the slot of an entity is half-written; retry when "
                        "the shard has recovered",
                        retry_after_ms=1_000,
                    ) from None
                moves = self._moves
                await asyncio.sleep(_BUSY_WAIT_S)
                if self._moves != moves:  # another read has moved to a successor meanwhile
                    start = 0
