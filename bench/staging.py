"""A staging cluster that a pack was played into: are the scores that production served found again there?

A score was read off rows, and each of these had had so many events of its entity. The same entity has had the same
events there, in the same order, whatever the number of shards: so the row is recalled from the past of the staging
cluster after as many of them, as of the same time, and compared with what was logged, bit by bit. Of what differs it
can be told what was read, and where the events of its entities part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.layout import Layout, PlanProgram
from millpond.feature_actors.past import Past
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.recall import NO_EVENT, NOT_ASKED, EntityEvents, events_of, recall
from millpond.feature_actors.shard_map import ShardMap
from millpond.models.model import Model
from millpond.models.score_rows import ScoreRows

__all__ = ["differences", "found_again"]

Ints = npt.NDArray[np.int64]


def found_again(
    production: Past, staging: Past, layout: Layout, models: Mapping[str, Model], scores: Iterable[pa.Table]
) -> tuple[int, list[str]]:
    """Compare logged scores of production; return how many were, and of those that are not found again the ids of the
    answers.

    models: by name, of one version each.
    """
    table, different = pa.concat_tables(scores), list[str]()
    for sought in _by_model(production, staging, layout, models, table):
        different += [sought.logged.ids[i] for i in sought.missing().tolist()]
    return len(table), different


def differences(
    production: Past,
    staging: Past,
    layout: Layout,
    models: Mapping[str, Model],
    scores: Iterable[pa.Table],
    ids: Collection[str],
) -> Iterator[str]:
    """Yield of some scores what they had read and what is read in staging, and of each of their entities the first
    events that are not the same in the logs of the two clusters, in words."""
    table = pa.concat_tables(scores)
    table = table.filter(pc.is_in(table["id"], pa.array(list(ids), pa.string())))
    for sought in _by_model(production, staging, layout, models, table):
        yield from sought.in_words()


def _by_model(
    production: Past, staging: Past, layout: Layout, models: Mapping[str, Model], table: pa.Table
) -> Iterator[_Sought]:
    for name in table["model"].unique().to_pylist():
        plan = ReadPlan(layout, models[name].features, models[name].subject)
        logged = ScoreRows.of(plan, table.filter(pc.equal(table["model"], name)))
        yield _Sought(production, staging, layout, logged)


class _Sought:
    """Scores of one model. most, least int64 [n, parts]: how many events of its entity a row had had: as many as up to
    the end of the last request that it saw of, and at least one of that."""

    def __init__(self, production: Past, staging: Past, layout: Layout, logged: ScoreRows) -> None:
        self._staging, self._layout, self.logged = staging, layout, logged
        self._reads = reads = logged.reads()
        self._program: PlanProgram = reads.program
        self._map = ShardMap.even(staging.manifest.n_slots, staging.shards)
        #: By part, of each score: which of its entities, and the events of those in the two clusters.
        self._entity: list[Ints] = []
        self._had: list[list[EntityEvents]] = []
        self._has: list[list[EntityEvents]] = []
        self.most, self.least = np.zeros_like(reads.offsets), np.zeros_like(reads.offsets)
        for part, table in enumerate(self._program.tables):
            hashes, entity = np.unique(reads.hashes[self._program.key_of_part[part]], axis=0, return_inverse=True)
            keys = [(table, key) for key in hashes]
            had = events_of(production, layout, keys)
            self._entity.append(entity.ravel())
            self._had.append(had)
            self._has.append(events_of(staging, layout, keys))
            for i, (of, offset) in enumerate(
                zip(entity.ravel().tolist(), reads.offsets[:, part].tolist(), strict=True)
            ):
                if offset != NO_EVENT:
                    self.most[i, part] = np.searchsorted(had[of].offsets, offset, "right")
                    self.least[i, part] = np.searchsorted(had[of].offsets, offset, "left") + 1

    def missing(self) -> Ints:
        """Return which scores are not found again, int64 [m]."""
        n, parts = self.most.shape
        agrees = self._agree(np.arange(n), self.most)
        # It may have been read between two events of a request.
        tries = [
            (i, part, k)
            for i, part in np.argwhere(~agrees).tolist()
            for k in range(self.least[i, part], self.most[i, part])
        ]
        if tries:
            counts = np.full((len(tries), parts), NOT_ASKED)
            for row, (_, part, k) in enumerate(tries):
                counts[row, part] = k
            found = self._agree(np.array([i for i, _, _ in tries]), counts)
            for row, (i, part, _) in enumerate(tries):
                agrees[i, part] |= found[row, part]
        return np.flatnonzero(~agrees.all(axis=1))

    def _agree(self, of: Ints, counts: Ints) -> npt.NDArray[np.bool_]:
        """Return which parts of some scores are as logged after so many events of their entity, bool [m, parts]."""
        logged = self.logged.take(of)
        views = logged.agreement(self._read(logged, of, counts)).views
        return np.stack([views[:, own].all(axis=1) for own in self._program.views_of_part], axis=1)

    def _read(self, logged: ScoreRows, of: Ints, counts: Ints) -> FeatureRows:
        """Return what is read in staging for some scores, after so many events of their entities."""
        reads = logged.reads()
        shards, offsets, kth = np.zeros_like(counts), counts.copy(), np.zeros_like(counts)
        for part in range(counts.shape[1]):
            key = self._program.key_of_part[part]
            shards[:, part] = self._map.shards_of(reads.hashes[key].view(np.uint64))
            for row in np.flatnonzero(counts[:, part] != NOT_ASKED).tolist():
                has, k = self._has[part][self._entity[part][of[row]]].offsets, counts[row, part]
                offsets[row, part] = NO_EVENT if k == 0 else has[k - 1] if k <= len(has) else NOT_ASKED
                kth[row, part] = 0 if not 0 < k <= len(has) else k - np.searchsorted(has, has[k - 1], "left")
        placed = replace(reads, shards=shards, offsets=offsets, kth=kth)
        (found,) = recall(self._staging, self._layout, [placed])
        return logged.plan.rows(found.answer)

    def in_words(self) -> Iterator[str]:
        """Yield of each score what it had read, what is read in staging, and where the events of its entities part."""
        logged = self.logged
        read = self._read(logged, np.arange(logged.n), self.most)
        was, now = logged.plan.named_values(logged.rows), logged.plan.named_values(read)
        for i in range(logged.n):
            yield f"score {logged.ids[i]} of {logged.key(i)} as of {logged.rows.as_of[i]} ms"
            yield f"    had read {was[i]}"
            yield f"    staging  {now[i]}"
            for part, table in enumerate(self._program.tables):
                entity, most = self._entity[part][i], int(self.most[i, part])
                yield f"    {table.name}: {_parting(self._had[part][entity], self._has[part][entity], most)}"


def _parting(had: EntityEvents, has: EntityEvents, most: int) -> str:
    """Say where the events of an entity part, which a score had read so many of."""
    one, other = ([events.plain(i) for i in range(events.n)] for events in (had, has))
    of = f"read after {most} of {had.n} events, {has.n} in staging"
    for i in range(max(had.n, has.n)):
        there = [events[i : i + 1] for events in (one, other)]
        contents = [[{**event, "_offset": 0} for event in events] for events in there]
        if contents[0] != contents[1]:
            return f"{of}; event {i} was {there[0]}, and is {there[1]}"
    return f"{of}, which are the same"
