"""Reading more features while a model predicts: the second stage of a model that finds candidates first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from millpond.feature_actors.errors import AsOfInPast, DeclarationError, MillpondError, Unavailable
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.view import Feature
from millpond.models.features import Features

__all__ = ["FeatureReader", "Read", "Reads"]

#: Reads a plan's features of n ids, `keys` as `ReadPlan.key_columns` returns them, as of a time (None: now).
Read = Callable[[ReadPlan, Mapping[str, Sequence[Any]], int, int | None], FeatureRows]


class Reads:
    """What a model may read besides its features: compiled when it is first read, and kept."""

    def __init__(self, layout: Layout, features: Sequence[Feature], subject: str) -> None:
        self.subject = subject
        self._layout = layout
        self._features = {f.full_name: f for f in features}
        self._plans: dict[tuple[str, ...], ReadPlan] = {}
        if features:
            self.plan(features)  # a feature that the cluster has not is found when the model is loaded

    def plan(self, features: Sequence[Feature]) -> ReadPlan:
        """Return the plan that reads features; raise `DeclarationError` if one was not declared in `reads`."""
        names = tuple(f.full_name for f in features)
        if names not in self._plans:
            for name in names:
                if name not in self._features:
                    declared = ", ".join(f"`{n}`" for n in self._features) or "none"
                    raise DeclarationError(
                        f"{self.subject}: predict reads `{name}`, which is not among its `reads`; declared: {declared}"
                    )
            self._plans[names] = ReadPlan(self._layout, [self._features[n] for n in names], self.subject)
        return self._plans[names]


class FeatureReader:
    """Given to `predict(features, reader)`: reads features of any ids, as of the time of the request."""

    def __init__(self, reads: Reads, read: Read | None, as_of_ms: int | None) -> None:
        self._reads = reads
        self._read = read
        self._as_of_ms = as_of_ms
        #: Why the last read found no answer: the fault of a shard or of the request, not the model's.
        self.failure: MillpondError | None = None

    def read(self, features: Sequence[Feature], keys: Mapping[str, Sequence[Any]]) -> Features:
        """Return features of n ids.

        features: among the model's `reads`. keys: for each key field of their views n values, int64 or strings.
        Raises `BadRequest` if a key is missing or of another type, `DeclarationError` if a feature was not declared,
        `Unavailable` if a shard cannot be read, `AsOfInPast` if these features cannot be had as of the request's time.
        """
        if self._read is None:
            raise DeclarationError(f"{self._reads.subject}: nothing to read with; this prediction is from rows alone")
        plan = self._reads.plan(features)
        columns = {name: values.tolist() if isinstance(values, np.ndarray) else list(values)
                   for name, values in keys.items()}  # fmt: skip
        lengths = {len(values) for values in columns.values()}
        if len(lengths) != 1:
            got = {name: len(values) for name, values in columns.items()}
            raise DeclarationError(f"{self._reads.subject}: the key columns are of several lengths: {got}")
        (n,) = lengths
        ids = [dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=True)]
        checked = plan.key_columns(ids, batch=True)
        try:
            rows = self._read(plan, checked, n, self._as_of_ms)
        except (Unavailable, AsOfInPast) as error:
            self.failure = error
            raise
        return Features(rows.matrix, plan.names, rows.texts, checked)
