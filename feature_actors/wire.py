"""Events, questions and answers as they cross to a shard's process: names and raw bytes.

The in-memory forms (`plan.ShardQuestion`, `plan.ShardAnswer`) are made of many small arrays, and Ray
pickles each of them at three microseconds a side; a question about one id over eight tables would
spend a millisecond on that alone. On the wire a program is the names of its features, which the shard
compiles once, and numbers are bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.keys import Hashes
from millpond.feature_actors.layout import Layout, ReadProgram
from millpond.feature_actors.plan import Part, ShardAnswer, ShardQuestion
from millpond.feature_actors.view import Feature

__all__ = [
    "QuestionDecoder",
    "WireAnswer",
    "WireEvents",
    "WireIds",
    "WireQuestion",
    "decode_answer",
    "decode_events",
    "decode_ids",
    "encode_answer",
    "encode_events",
    "encode_ids",
    "encode_question",
]

Ints = npt.NDArray[np.int64]

#: Source, hashes of the event ids and of the contents, when they were received.
WireIds = tuple[str, bytes, bytes, int]
#: Source, a record batch without its schema, arrival stamps (one number if they are all the same),
#: how many, when they were received.
WireEvents = tuple[str, bytes, Any, int, int]
#: n; per part the names of its features and its rows (None: all); hashes of those rows, part after
#: part; clock and as-of, each None, one number for all ids, or bytes.
WireQuestion = tuple[int, tuple[tuple[tuple[str, ...], bytes | None], ...], bytes, Any, Any]
#: as-of of the ids; values, part after part; knowns, part after part.
WireAnswer = tuple[bytes, bytes, bytes]


def encode_ids(source: str, ids: Hashes, contents: Ints, received_ms: int) -> WireIds:
    return source, ids.tobytes(), contents.tobytes(), received_ms


def decode_ids(wire: WireIds) -> tuple[str, Hashes, Ints, int]:
    source, ids, contents, received_ms = wire
    # Copies, here and below: what frombuffer gives is read-only, and kernels are compiled for writable arrays.
    return (
        source,
        np.frombuffer(ids, np.uint64).reshape(-1, 2).copy(),
        np.frombuffer(contents, np.int64).copy(),
        received_ms,
    )


def encode_events(source: str, batch: pa.RecordBatch, arrivals: Ints, received_ms: int) -> WireEvents:
    return source, batch.serialize().to_pybytes(), _encode_times(arrivals), len(arrivals), received_ms


def decode_events(wire: WireEvents, layout: Layout) -> tuple[str, pa.RecordBatch, Ints, int]:
    source, batch, arrivals, n, received_ms = wire
    schema = layout.source(source).schema
    stamps = _decode_times(arrivals, n)
    return source, pa.ipc.read_record_batch(pa.py_buffer(batch), schema), stamps, received_ms


def encode_question(question: ShardQuestion) -> WireQuestion:
    parts, hashes = [], []
    for part in question.parts:
        every = len(part.which) == question.n
        parts.append((part.program.wire_names, None if every else part.which.tobytes()))
        hashes.append((part.hashes if every else part.hashes[part.which]).tobytes())
    return question.n, tuple(parts), b"".join(hashes), _encode_times(question.clock), _encode_times(question.as_of)


class QuestionDecoder:
    """Decode questions on the side of the shard; keeps the programs that it compiled."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._programs: dict[tuple[str, ...], ReadProgram] = {}

    def decode(self, wire: WireQuestion) -> ShardQuestion:
        n, wire_parts, hash_bytes, clock, as_of = wire
        hashes = np.frombuffer(hash_bytes, np.uint64).reshape(-1, 2).copy()
        parts, at = [], 0
        for names, which_bytes in wire_parts:
            if which_bytes is None:
                which, of_part = np.arange(n), hashes[at : at + n]
                at += n
            else:
                which = np.frombuffer(which_bytes, np.int64).copy()
                of_part = np.zeros((n, 2), np.uint64)
                of_part[which] = hashes[at : at + len(which)]
                at += len(which)
            parts.append(Part(self._program(names), of_part, which))
        return ShardQuestion(
            n,
            tuple(parts),
            None if clock is None else _decode_times(clock, n),
            None if as_of is None else _decode_times(as_of, n),
        )

    def _program(self, names: tuple[str, ...]) -> ReadProgram:
        program = self._programs.get(names)
        if program is None:
            features = [self._feature(name) for name in names]
            program = self._layout.read_program(self._layout.table_of(features[0].view), features)
            self._programs[names] = program
        return program

    def _feature(self, name: str) -> Feature:
        """Return a feature by its name and identity, `view.feature#id`."""
        view, feature = name.partition("#")[0].split(".")
        known = self._layout.views.get(view)
        if known is None or feature not in known.features or known[feature].wire_name != name:
            raise Unavailable(f"feature `{view}.{feature}` is defined otherwise on the shard", retry_after_ms=1_000)
        return known[feature]


def encode_answer(answer: ShardAnswer) -> WireAnswer:
    return (
        answer.as_of.tobytes(),
        b"".join(m.tobytes() for m in answer.matrices),
        b"".join(k.tobytes() for k in answer.knowns),
    )


def decode_answer(wire: WireAnswer, question: ShardQuestion) -> ShardAnswer:
    """Decode the answer to a question."""
    as_of, values, knowns = wire
    all_values, all_knowns = np.frombuffer(values, np.float64), np.frombuffer(knowns, np.bool_)
    matrices, masks, v, k = [], [], 0, 0
    for part in question.parts:
        rows, features, views = len(part.which), len(part.program.features), len(part.program.views)
        matrices.append(all_values[v : v + rows * features].reshape(rows, features))
        masks.append(all_knowns[k : k + rows * views].reshape(rows, views))
        v, k = v + rows * features, k + rows * views
    return ShardAnswer(np.frombuffer(as_of, np.int64), tuple(matrices), tuple(masks))


def _encode_times(times: Ints | None) -> int | bytes | None:
    if times is None:
        return None
    return int(times[0]) if len(times) and (times == times[0]).all() else times.tobytes()


def _decode_times(times: int | bytes, n: int) -> Ints:
    return np.full(n, times, np.int64) if isinstance(times, int) else np.frombuffer(times, np.int64).copy()
