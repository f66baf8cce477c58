"""A read plan: which columns of which tables make one feature matrix, compiled once.

A model version has a plan over its features; a view has one over its own. A plan turns ids into one
question per shard, and the shards' answers into a matrix: float64 [ids, features].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.errors import AsOfInPast, BadRequest, Problem, did_you_mean
from millpond.feature_actors.keys import Hashes, hash_keys
from millpond.feature_actors.layout import Layout, ReadProgram
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.view import Feature, FeatureView

__all__ = ["FeatureRows", "ReadPlan", "ShardAnswer", "ShardQuestion", "as_of_in_past"]

Ints = npt.NDArray[np.int64]

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
#: An int64 as text, in its one spelling: `"042"` and `"-0"` are somebody's strings.
_INT64_TEXT = re.compile(r"0|-?[1-9][0-9]{0,18}")
KEY_BYTES_MAX = 1_024
_FEATURE_VALUES = "feature values"
_PROBLEMS_MAX = 10


@dataclass(frozen=True)
class Part:
    """The part of a question about one table: rows `which` of `hashes`, uint64 [n, 2]."""

    program: ReadProgram
    hashes: Hashes
    which: Ints


@dataclass(frozen=True)
class ShardQuestion:
    """What one shard is asked about n ids.

    clock: int64 [n], the reader's clock, or None for the shard's newest arrival stamp.
    as_of: int64 [n], or None for a live read: the larger of clock and newest event applied.
    """

    n: int
    parts: tuple[Part, ...]
    clock: Ints | None
    as_of: Ints | None


@dataclass(frozen=True)
class ShardAnswer:
    """What a shard knows: as_of int64 [n] that it read at; per part the rows `which` that were asked:
    matrices float64 [rows, features of the program], knowns bool [rows, views of the program]."""

    as_of: Ints
    matrices: tuple[npt.NDArray[np.float64], ...]
    knowns: tuple[npt.NDArray[np.bool_], ...]


@dataclass(frozen=True)
class FeatureRows:
    """Features of n ids: matrix float64 [n, features], as_of int64 [n], and per id the names of the
    views that do not know it."""

    matrix: npt.NDArray[np.float64]
    as_of: Ints
    unknown: list[list[str]]


def as_of_in_past(as_of_ms: int, newest_ms: int) -> AsOfInPast:
    return AsOfInPast(
        f"as_of {as_of_ms} lies before {newest_ms}, up to which events have been applied; an open tile "
        "cannot be cut in two: ask as of that time or later, or leave as_of out",
        path="as_of",
    )


class ReadPlan:
    """Compile the reading of `features`, in the order of the matrix's columns.

    subject: how errors about the request name it, such as "model `churn`".
    """

    def __init__(self, layout: Layout, features: Sequence[Feature], subject: str) -> None:
        self.subject = subject
        self.features = tuple(features)
        self.names = tuple(f.full_name for f in features)
        self.views: dict[str, FeatureView] = {f.view.name: f.view for f in features}
        #: Key field to "int64" or "string": the union over the views, in order of first use.
        self.key_fields: dict[str, str] = {
            name: "string" if v.source.fields[name].type == "string" else "int64"
            for v in self.views.values()
            for name in v.key
        }
        by_table: dict[int, list[int]] = {}
        for column, feature in enumerate(features):
            by_table.setdefault(layout.table_of(feature.view).number, []).append(column)
        self._parts = [
            (
                layout.read_program(layout.tables[number], [features[c] for c in columns]),
                layout.tables[number].key,
                np.array(columns, np.int64),
            )
            for number, columns in by_table.items()
        ]

    # -- ids

    def key_columns(self, ids: Sequence[Mapping[str, Any]], *, batch: bool) -> dict[str, list[Any]]:
        """Return the ids as one checked Python list per key field.

        Raises `BadRequest` with the path of each wrong field (up to ten): missing, of another type,
        or more than the key; feature values in a request are refused by a message that says why.
        """
        columns: dict[str, list[Any]] = {name: [] for name in self.key_fields}
        problems: list[Problem] = []
        for i, one in enumerate(ids):
            path = f"$[{i}]" if batch else "$"
            if len(one) != len(columns) or one.keys() != columns.keys():
                problems += self._wrong_fields(one, path)
            for name, kind in self.key_fields.items():
                if name in one:
                    value = _key_value(one[name], kind)
                    if value is None:
                        got = "true" if one[name] is True else repr(one[name])[:80]
                        limit = f" of at most {KEY_BYTES_MAX} bytes" if kind == "string" else ""
                        message = f"{self.subject}: expected `{name}` as {kind}{limit}, got {got}"
                        problems.append((message, f"{path}.{name}"))
                    else:
                        columns[name].append(value)
            if len(problems) >= _PROBLEMS_MAX:
                break
        if problems:
            refused = any(_FEATURE_VALUES in text for text, _ in problems)
            problems.sort(key=lambda problem: _FEATURE_VALUES not in problem[0])  # the misconception first
            message, path = problems[0]
            raise BadRequest(
                message,
                path=path,
                code="features_in_request" if refused else "bad_id",
                problems=tuple(problems[:_PROBLEMS_MAX]),
            )
        return columns

    def _wrong_fields(self, one: Mapping[str, Any], path: str) -> list[Problem]:
        key = ", ".join(f"`{n}`" for n in self.key_fields)
        problems = [
            (f"{self.subject}: key field `{name}` is missing; an id is {key}", f"{path}.{name}")
            for name in self.key_fields
            if name not in one
        ]
        names = ({f.name for f in self.features} | {f.full_name for f in self.features}) - self.key_fields.keys()
        extras = (str(name)[:80] for name in one if name not in self.key_fields)
        # A feature among thousands of other fields is still found: looking is cheap, suggesting a name is not.
        for extra in [*islice((e for e in map(str, one) if e in names), 1), *islice(extras, _PROBLEMS_MAX)]:
            if extra in names:
                problems.append(
                    (
                        f"{self.subject}: `{extra}` is a feature, and {_FEATURE_VALUES} are not taken from a request: "
                        "Millpond computes them from raw events, the same for training and serving; send "
                        f"the events to their source and only the id ({key}) here",
                        f"{path}.{extra}",
                    )
                )
            else:
                problems.append(
                    (
                        f"{self.subject}: unknown field `{extra}`; an id is {key} and nothing else"
                        + did_you_mean(extra, self.key_fields),
                        f"{path}.{extra}",
                    )
                )
        return list(dict.fromkeys(problems))

    # -- questions and answers

    def questions(
        self,
        keys: Mapping[str, Sequence[Any]],
        n: int,
        shard_map: ShardMap,
        clock: Ints | None,
        as_of: Ints | None,
    ) -> dict[int, ShardQuestion]:
        """Return the question for each shard that has something of the n ids.

        keys: per key field n checked values, a Python list or an Arrow array.
        """
        parts: dict[int, list[Part]] = {}
        hashed: dict[tuple[str, ...], tuple[Hashes, list[tuple[int, Ints]]]] = {}
        for program, key, _ in self._parts:
            if key not in hashed:
                hashes = hash_keys([keys[name] for name in key], n)
                hashed[key] = hashes, shard_map.rows_by_shard(hashes)
            hashes, by_shard = hashed[key]
            for shard, rows in by_shard:
                parts.setdefault(shard, []).append(Part(program, hashes, rows))
        return {shard: ShardQuestion(n, tuple(ps), clock, as_of) for shard, ps in sorted(parts.items())}

    def assemble(
        self, n: int, questions: Mapping[int, ShardQuestion], answers: Mapping[int, ShardAnswer], as_of: Ints
    ) -> FeatureRows:
        """Put the shards' answers, all read at `as_of`, together to one matrix."""
        matrix = np.empty((n, len(self.features)), np.float64)
        columns_of = {program.table: columns for program, _, columns in self._parts}
        unknown: list[list[str]] = [[] for _ in range(n)]
        for shard, question in questions.items():
            answer = answers[shard]
            for part, values, known in zip(question.parts, answer.matrices, answer.knowns, strict=True):
                columns = columns_of[part.program.table]
                if len(part.which) == n:
                    matrix[:, columns] = values
                else:
                    matrix[part.which[:, None], columns] = values
                if not known.all():
                    for row, view in zip(*np.nonzero(~known), strict=True):
                        unknown[part.which[row]].append(part.program.view_names[view])
        order = {name: i for i, name in enumerate(self.views)}
        for names in unknown:
            names.sort(key=order.__getitem__)
        return FeatureRows(matrix, as_of, unknown)


def _key_value(value: Any, kind: str) -> int | str | None:
    """Return a key value as int64 or string, or None if it is neither; digits in a string are an int64."""
    if kind == "string":
        if not isinstance(value, str):
            return None
        try:
            return value if len(value.encode()) <= KEY_BYTES_MAX else None
        except UnicodeEncodeError:  # a lone surrogate is not text
            return None
    if isinstance(value, str) and _INT64_TEXT.fullmatch(value):
        value = int(value)
    if type(value) is not int or not _INT64_MIN <= value <= _INT64_MAX:
        return None
    return value
