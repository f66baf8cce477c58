"""A set of plans that are read together: ids of many models in one compiled call, each by the plan of its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from millpond.feature_actors.layout import PlanProgram
from millpond.feature_actors.plan import (
    Answer,
    FeatureRows,
    Ints,
    Question,
    ReadPlan,
    blank_question,
)
from millpond.feature_actors.tiles.program import F_SCAN, P_FEATURE, P_SCAN, P_VIEW, PackedProgram, ReadProgram
from millpond.feature_actors.tiles.read import NO_CLOCK

__all__ = ["PlanSet"]


#: As of a plan; of sets a replica has one.
_RECURRING_MAX = 32


@dataclass(frozen=True, eq=False)
class _Programs(PlanProgram):
    """The programs of several plans, one after the other."""

    of: tuple[PlanProgram, ...] = ()

    @cached_property
    def parts(self) -> int:
        return max(program.parts for program in self.of)

    def packed(self, n_slots: int) -> PackedProgram:
        if n_slots not in self._programs:
            self._programs[n_slots] = PackedProgram(_joined([program.packed(n_slots).program for program in self.of]))
        return self._programs[n_slots]


def _joined(programs: Sequence[ReadProgram]) -> ReadProgram:
    parts, features = [], []
    before = np.zeros(3, np.int64)
    for one in programs:
        parts.append(one.parts.copy())
        parts[-1][:, [P_SCAN, P_FEATURE, P_VIEW]] += before
        features.append(one.features.copy())
        features[-1][:, F_SCAN] += before[0]
        before += len(one.scans), len(one.features), len(one.views)
    # Layouts that were extended meanwhile: the longest has the series of all, each where it was.
    longest = max(programs, key=lambda one: len(one.series))
    return ReadProgram(
        np.concatenate(parts),
        longest.series,
        longest.columns,
        np.concatenate([one.scans for one in programs]),
        np.concatenate(features),
        np.concatenate([one.views for one in programs]),
        0,
        max(one.words for one in programs),
        max(one.parts_max for one in programs),
        max(one.scans_max for one in programs),
    )


class PlanSet:
    """Plans of one layout whose ids are one int64 field, and which read no strings: the others are not taken in."""

    def __init__(self, plans: Sequence[ReadPlan], n_slots: int) -> None:
        taken = [p for p in plans if p.is_of_words and not p.program.texts]
        #: The number of each plan in the set.
        self.numbers: dict[ReadPlan, int] = {plan: number for number, plan in enumerate(taken)}
        if not taken:
            return
        programs = tuple(plan.program for plan in taken)
        lines = np.cumsum([0, *(p.plans[0, 1] + 1 for p in programs)])
        self._plans: Ints = np.stack([lines[:-1], lines[1:] - 1], axis=1)
        views = max((p.view_names for p in programs), key=len)
        first = programs[0]
        self._program = _Programs(
            max(p.width for p in programs), (), (), (), (), 0, first.keys, (), views, (), first.layout_digest,
            first._parts, first._rest, of=programs,
        )  # fmt: skip
        self._recurring: dict[int, Question] = {}
        self._program.packed(n_slots)  # made now, not by the first read

    def question(self, numbers: Sequence[int], keys: Sequence[int], clock_ms: int | None) -> Question:
        """Return the question about n ids as of now, for who reads from memory. About a few ids it is the same object
        each time, so it is asked by one thread.

        numbers: n numbers of plans; keys: n values, int64.
        """
        n = len(keys)
        question = self._recurring.get(n)
        if question is None:
            plans = np.empty((n, 2), np.int64)
            question = blank_question(self._program, n, self._recurring, _RECURRING_MAX, plans)
        assert question.plans is not None
        question.plans[:] = self._plans[numbers]
        question.ids[:] = keys
        question.clock[:] = NO_CLOCK if clock_ms is None else clock_ms
        question.event_clock = clock_ms is None
        return question

    def rows(self, answer: Answer, plan: ReadPlan, start: int, end: int) -> FeatureRows:
        """Return the features of a plan's ids, which stand together from start to end. Raises `FeatureFailed`."""
        program = plan.program
        values = answer.values[start:end, : program.width]
        if end - start > 1:
            values = np.ascontiguousarray(values)
        as_of, trace = answer.as_of[start:end], answer.trace[start:end, : 1 + program.parts]
        if answer.all_known and plan.is_matrix:  # as they nearly always are
            return FeatureRows(values, as_of, [[] for _ in range(start, end)], {}, trace)
        known = answer.known[start:end, : len(program.view_names)]
        return plan.rows(Answer(as_of, values, known, trace, {}, answer.all_known))
