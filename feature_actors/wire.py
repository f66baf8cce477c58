"""Events, questions and answers as they cross to a shard's process: names and raw bytes.

The in-memory forms (`plan.Question`, `plan.Answer`) are made of several arrays, and Ray pickles each
of them at three microseconds a side. On the wire a program is the names of its features, which the shard
compiles once, and numbers are bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.events import Events, Receipt
from millpond.feature_actors.layout import Layout, PlanProgram
from millpond.feature_actors.plan import Answer, Question

__all__ = [
    "QuestionDecoder",
    "WireAnswer",
    "WireEvents",
    "WireQuestion",
    "WireReceipt",
    "decode_answer",
    "decode_events",
    "decode_receipt",
    "encode_answer",
    "encode_events",
    "encode_question",
    "encode_receipt",
]

Ints = npt.NDArray[np.int64]

#: Source, a record batch without its schema, hashes of the event ids, whether they were given, hashes of the contents,
#: arrival stamps (one number if they are all the same), how many, when they were received, which keys were known, which
#: alone they go to.
WireEvents = tuple[str, bytes, bytes, bool, bytes, Any, int, int, int, Any]
#: As `Receipt`.
WireReceipt = tuple[bytes, int, int, int, bool]
#: Names of the features; n; hashes of their keys; clock, one number for all ids or bytes; whether time is the newest
#: arrival stamp; as-of, as the clock, None for a live read.
WireQuestion = tuple[tuple[str, ...], int, bytes, Any, bool, Any]
#: as-of of the ids; values; knowns; traces; strings by column.
WireAnswer = tuple[bytes, bytes, bytes, bytes, dict[int, list[str | None]]]


def encode_events(events: Events) -> WireEvents:
    return (
        events.source,
        events.batch.serialize().to_pybytes(),
        events.ids.tobytes(),
        events.ids_given,
        events.contents.tobytes() if events.ids_given else b"",
        _encode_times(events.arrivals),
        len(events.arrivals),
        events.received_ms,
        events.keys_known,
        events.keys,
    )


def decode_events(wire: WireEvents, layout: Layout) -> Events:
    source, batch, ids, given, contents, arrivals, n, received_ms, keys_known, keys = wire
    decoded = pa.ipc.read_record_batch(pa.py_buffer(batch), layout.source(source).schema)
    # Copies, here and below: what frombuffer gives is read-only, and kernels are compiled for writable arrays.
    return Events(
        source,
        decoded,
        np.frombuffer(ids, np.uint64).reshape(-1, 2).copy(),
        np.frombuffer(contents, np.int64).copy() if given else np.zeros(decoded.num_rows, np.int64),
        given,
        _decode_times(arrivals, n),
        received_ms,
        keys_known,
        None if keys is None else tuple(tuple(key) for key in keys),
    )


def encode_receipt(receipt: Receipt) -> WireReceipt:
    return receipt.verdicts.tobytes(), *receipt[1:]


def decode_receipt(wire: WireReceipt) -> Receipt:
    return Receipt(np.frombuffer(wire[0], np.uint8), *wire[1:])


def encode_question(question: Question) -> WireQuestion:
    return (
        question.program.wire_names,
        question.n,
        question.hashes.tobytes(),
        _encode_times(question.clock),
        question.event_clock,
        _encode_times(question.as_of),
    )


class QuestionDecoder:
    """Decode questions on the side of the shard; keeps the programs that it compiled."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._programs: dict[tuple[str, ...], PlanProgram] = {}

    def decode(self, wire: WireQuestion) -> Question:
        names, n, hash_bytes, clock, event_clock, as_of = wire
        program = self._program(tuple(names))
        return Question(
            program,
            np.frombuffer(hash_bytes, np.int64).reshape(len(program.keys), n, 2).copy(),
            _decode_times(clock, n),
            event_clock,
            None if as_of is None else _decode_times(as_of, n),
        )

    def _program(self, names: tuple[str, ...]) -> PlanProgram:
        program = self._programs.get(names)
        if program is None:
            program = self._programs[names] = self._layout.plan_program([*map(self._layout.wire_feature, names)])
        return program


def encode_answer(answer: Answer) -> WireAnswer:
    return answer.as_of.tobytes(), answer.values.tobytes(), answer.known.tobytes(), answer.trace.tobytes(), answer.texts


def decode_answer(wire: WireAnswer, question: Question) -> Answer:
    """Decode the answer to a question."""
    as_of, values, known, trace, texts = wire
    program, n = question.program, question.n
    return Answer(
        np.frombuffer(as_of, np.int64),
        np.frombuffer(values, np.float64).reshape(n, program.width).copy(),  # a predictor may write into its matrix
        np.frombuffer(known, np.bool_).reshape(n, len(program.view_names)),
        np.frombuffer(trace, np.int64).reshape(n, 1 + program.parts),
        texts,
    )


def _encode_times(times: Ints | None) -> int | bytes | None:
    if times is None:
        return None
    return int(times[0]) if len(times) and (times == times[0]).all() else times.tobytes()


def _decode_times(times: int | bytes, n: int) -> Ints:
    return np.full(n, times, np.int64) if isinstance(times, int) else np.frombuffer(times, np.int64).copy()
