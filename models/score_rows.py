"""Logged scores of one version, decoded: what was read for each, where its rows stood, and what came out."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.recall import RowReads
from millpond.feature_actors.view import FeatureView

__all__ = ["Agreement", "CannotRead", "ScoreRows", "added_views", "layout_with", "rows_at"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_decode = msgspec.json.Decoder().decode


class CannotRead(MillpondError):
    """Logged scores do not fit the version that they say they are of."""


@dataclass(frozen=True)
class Agreement:
    """Where n rows agree with what was logged: features bool [n, features of the plan], bit by bit but for NaNs, which
    all mean "empty"; known bool [n, views of the program], whether a view knows the id; views: both, by view."""

    features: Bools
    known: Bools
    views: Bools


@dataclass(frozen=True)
class ScoreRows:
    """n scores, with where each row stood: shards and offsets int64 [n, parts], as of `RowReads`. results: JSON."""

    plan: ReadPlan
    ids: list[str]
    served_ms: Ints
    keys: dict[str, list[Any]]
    rows: FeatureRows
    shards: Ints
    offsets: Ints
    results: list[str]

    @classmethod
    def of(cls, plan: ReadPlan, scores: pa.Table) -> ScoreRows:
        """Decode scores, in `score_log.SCHEMA`, of the version that the plan is of. Raises `CannotRead`."""
        n, width, parts = len(scores), len(plan.names), plan.program.parts
        features, read = scores["features"].combine_chunks(), scores["rows"].combine_chunks()
        tables, shards, offsets, _ = read.flatten().flatten()
        fits = all(
            pc.all(pc.equal(pc.list_value_length(lists), length)).as_py()
            for lists, length in ((features, width), (read, parts))
        )
        names = [name.partition("] ")[0].removesuffix("]") for name in tables.to_pylist()]
        if not fits or names != [table.name.partition("] ")[0].removesuffix("]") for table in plan.program.tables] * n:
            raise CannotRead("it was logged with other features or tables than its version reads")
        keys = [_decode(text) for text in scores["key"].to_pylist()]
        texts = [_decode(text) for text in scores["texts"].to_pylist()]
        rows = FeatureRows(
            features.flatten().to_numpy().reshape(n, width),
            scores["as_of_ms"].to_numpy(),
            scores["unknown"].to_pylist(),
            {f.full_name: [one[f.full_name] for one in texts] for f in plan.features if f.is_text},
        )
        return cls(
            plan,
            scores["id"].to_pylist(),
            scores["served_ms"].to_numpy(),
            {name: [one[name] for one in keys] for name in plan.key_fields},
            rows,
            shards.to_numpy().astype(np.int64).reshape(n, parts),
            offsets.to_numpy().reshape(n, parts),
            scores["result"].to_pylist(),
        )

    @property
    def n(self) -> int:
        return len(self.ids)

    def take(self, at: Ints) -> ScoreRows:
        chosen = at.tolist()
        return replace(
            self,
            ids=[self.ids[i] for i in chosen],
            served_ms=self.served_ms[at],
            keys={name: [column[i] for i in chosen] for name, column in self.keys.items()},
            rows=rows_at(self.rows, at),
            shards=self.shards[at],
            offsets=self.offsets[at],
            results=[self.results[i] for i in chosen],
        )

    def key(self, i: int) -> dict[str, Any]:
        return {name: column[i] for name, column in self.keys.items()}

    def reads(self) -> RowReads:
        """Return what was read, to be recalled."""
        hashes = self.plan.question(self.keys, self.n, None, None).hashes
        return RowReads(
            self.plan.program, hashes, self.rows.as_of, self.shards, self.offsets, np.zeros_like(self.offsets)
        )

    def agreement(self, rows: FeatureRows) -> Agreement:
        """Compare with n rows of the same plan."""
        logged, names = self.rows, self.plan.program.view_names
        same = logged.matrix.view(np.int64) == rows.matrix.view(np.int64)
        same |= np.isnan(logged.matrix) & np.isnan(rows.matrix)
        features = np.ones((self.n, len(self.plan.features)), np.bool_)
        known = np.ones((self.n, len(names)), np.bool_)
        column = 0
        for number, feature in enumerate(self.plan.features):
            if feature.is_text:
                pairs = zip(logged.texts[feature.full_name], rows.texts[feature.full_name], strict=True)
                features[:, number] = [
                    one == (list(other) if isinstance(other, tuple) else other) for one, other in pairs
                ]
            else:
                features[:, number] = same[:, column : column + feature.width].all(axis=1)
                column += feature.width
        for i, (one, other) in enumerate(zip(logged.unknown, rows.unknown, strict=True)):
            for name in set(one) ^ set(other):
                known[i, names.index(name)] = False
        views = known.copy()
        for number, feature in enumerate(self.plan.features):
            views[:, names.index(feature.view.name)] &= features[:, number]
        return Agreement(features, known, views)


def added_views(scores: pa.Table) -> list[tuple[str, ...]]:
    """Return of each score which of its views had come while the cluster ran: those have tables of their own, which
    are named after them."""
    read = scores["rows"].combine_chunks()
    names = [name.partition("] ")[2].partition("#")[0] for name in pc.struct_field(read.flatten(), "table").to_pylist()]
    ends = np.cumsum([0, *pc.list_value_length(read).to_pylist()]).tolist()
    return [tuple(filter(None, names[a:b])) for a, b in itertools.pairwise(ends)]


def layout_with(views: Collection[FeatureView], added: Collection[str]) -> Layout:
    """Compile views as a cluster has them to which those of the names `added` came while it ran.

    Raises `DeclarationError` if they cannot stand side by side.
    """
    first: list[FeatureView] = []
    later: dict[str, FeatureView] = {}
    for view in sorted(views, key=lambda view: view.name in added):
        if view.name in added and any(one.source == view.source and one.key == view.key for one in first):
            later.setdefault(view.name, view)
        else:
            first.append(view)
    compile_layout([], views)  # where two of one name are one view
    return compile_layout([], first).extended(later.values())


def rows_at(rows: FeatureRows, at: Ints) -> FeatureRows:
    """Return some of the rows, copied."""
    chosen = at.tolist()
    texts = {name: [column[i] for i in chosen] for name, column in rows.texts.items()}
    return FeatureRows(rows.matrix[at], rows.as_of[at], [rows.unknown[i] for i in chosen], texts)
