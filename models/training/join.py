"""The point-in-time join: labels and events in one order of time, through shards that also serve.

1. Labels are sorted by their time, events by when they became known; what does not fit into memory lies in a file.
2. Piece by piece, in the order of time, shards apply the events of a piece and are asked on the way for its labels.
   Each shard has its own slots; who computes them is said by `Workers`.

A label sees every event that was known at its time, and none after. By event time an event is known when it happens,
and read as of the label's time. By arrival it is known when it has arrived, and read as a live read then was: as of the
label's time, or of the newest event of the rows read if that lies ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.events import PastEvents
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Layout, PlanProgram
from millpond.feature_actors.plan import FeatureRows, Question, ReadPlan
from millpond.feature_actors.routes import key_validity
from millpond.models.training.events import EventsBySource
from millpond.models.training.labels import AT, ROW, Labels
from millpond.models.training.runs import Room, bounds
from millpond.models.training.workers import Piece, Workers

__all__ = ["join"]

Ints = npt.NDArray[np.int64]

_NEVER = np.iinfo(np.int64).min


def join(
    layout: Layout,
    plan: ReadPlan,
    labels: Labels,
    events: EventsBySource,
    *,
    workers: Workers,
    room: Room,
    told: Callable[[int], None] = lambda n: None,
) -> Iterator[tuple[Ints, FeatureRows]]:
    """Yield the features of labels and the places of these among all, int64 [n], in the order of time.

    told: called with how many more labels and events have been gone through.
    """
    runs = [labels.runs, *events.runs]

    def pieces() -> Iterator[Piece]:
        live = _LiveAsOf(layout, plan.program) if events.knowledge == "arrival" else None
        for one in runs:
            one.rewind()
        for bound in bounds(runs, room):
            asked, past = labels.runs.take_until(bound), events.take_until(bound)
            question = _question(plan, asked)
            if live is not None:
                question.as_of = live.of(question, past, bound)
            yield Piece(asked.column(ROW).to_numpy(), question, past)

    for piece, answer in workers.answers(layout, pieces):
        told(piece.size)
        if len(piece.rows):
            yield piece.rows, plan.rows(answer)


def _question(plan: ReadPlan, asked: pa.RecordBatch) -> Question:
    times = asked.column(AT).to_numpy()
    question = plan.question({name: asked.column(name) for name in plan.key_fields}, len(times), None, times.copy())
    question.clock = times.copy()
    return question


class _LiveAsOf:
    """What live reads of a plan are as of. Only an event that is ahead of when it became known can move that."""

    def __init__(self, layout: Layout, program: PlanProgram) -> None:
        self._layout, self._program = layout, program
        #: By table, what is still ahead: hashes int64 [m, 2], known and times int64 [m].
        self._ahead = [(np.empty((0, 2), np.int64), np.empty(0, np.int64), np.empty(0, np.int64))] * len(program.tables)

    def of(self, question: Question, past: Mapping[str, PastEvents], bound: int | None) -> Ints:
        """Return as of when each id of a question is read at question.clock, int64 [n], if these events come next; the
        piece after begins at `bound`."""
        as_of = question.clock.copy()
        for part, table in enumerate(self._program.tables):
            events = past[table.source.name]
            place = self._layout.tables_of(table.source.name).index(table)
            times = table.source.times_ms(events.batch)
            routed = events.routes >> np.uint32(place) & np.uint32(1) != 0
            rows = np.flatnonzero((times > events.known) & routed)
            ahead = events.batch.take(pa.array(rows))
            keys = [ahead.column(name) for name in table.key]
            valid = key_validity(keys, len(rows))
            found = hash_columns(keys, len(rows)).view(np.int64)[valid], events.known[rows][valid], times[rows][valid]
            hashes, known, newest = map(np.concatenate, zip(self._ahead[part], found, strict=True))
            asked = question.hashes[self._program.keys.index(table.key)]
            as_of = np.maximum(as_of, _newest(hashes, known, newest, asked, question.clock))
            kept = newest >= (_NEVER if bound is None else bound)
            self._ahead[part] = hashes[kept], known[kept], newest[kept]
        return as_of


def _newest(hashes: Ints, known: Ints, times: Ints, asked: Ints, moments: Ints) -> Ints:
    """Return the newest of the times of each asked key that were known at its moment, int64 [n], or the least int64.

    hashes int64 [m, 2], known and times int64 [m]; asked int64 [n, 2], moments int64 [n].
    """
    newest = np.full(len(moments), _NEVER)
    likely = np.flatnonzero(np.isin(asked[:, 0], hashes[:, 0]))
    if not len(likely):
        return newest
    m = len(known)
    keys = np.concatenate([hashes, asked[likely]])
    # By key and moment, an event before the question of its very moment.
    is_question = np.arange(len(keys)) >= m
    order = np.lexsort((is_question, np.concatenate([known, moments[likely]]), keys[:, 0], keys[:, 1]))
    key_changes = (np.diff(keys[order], axis=0, prepend=keys[order[:1]]) != 0).any(axis=1)
    group = key_changes.cumsum()
    # The largest so far within a group: groups ascend, so a rank above all of those before it begins each.
    values, ranks = np.unique(np.concatenate([times, np.full(len(likely), _NEVER)]), return_inverse=True)
    best = np.maximum.accumulate(group * len(values) + ranks[order]) - group * len(values)
    of_question = order >= m
    newest[likely[order[of_question] - m]] = values[best[of_question]]
    return newest
