"""A read plan: which columns of which tables make one feature matrix, compiled once.

A model version has a plan over its features; a view has one over its own. A plan turns ids into a
question to the shards, and their answer into a matrix: float64 [ids, columns], with strings beside it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.errors import AsOfInPast, BadRequest, MillpondError, Problem, did_you_mean
from millpond.feature_actors.keys import hash_keys
from millpond.feature_actors.layout import Layout, PlanProgram
from millpond.feature_actors.tiles.read import NO_CLOCK
from millpond.feature_actors.view import Feature, FeatureView

if TYPE_CHECKING:
    from millpond.feature_actors.reader import KernelCall

__all__ = [
    "Answer",
    "FeatureFailed",
    "FeatureRows",
    "Question",
    "ReadPlan",
    "as_of_in_past",
    "blank_question",
    "key_value",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

logger = logging.getLogger("millpond.features")

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
#: An int64 as text, in its one spelling: `"042"` and `"-0"` are somebody's strings.
_INT64_TEXT = re.compile(r"0|-?[1-9][0-9]{0,18}")
KEY_BYTES_MAX = 1_024
_FEATURE_VALUES = "feature values"
_PROBLEMS_MAX = 10
#: Questions about so many ids at most are kept to be asked again: by each plan, and there may be hundreds.
_RECURRING_MAX = 8
_NO_TRACE = np.empty((0, 1), np.int64)
_NO_IDS = np.empty(0, np.int64)


class FeatureFailed(MillpondError):
    """The function of a derived feature failed: the view's owner has to look."""

    code, status = "feature_failed", 500


@dataclass(slots=True)
class Question:
    """What shards are asked about n ids.

    hashes int64 [keys, n, 2], for the keys of the program; clock int64 [n], the reader's clock, `NO_CLOCK` if it has
    none; event_clock: whether the shards' time is their newest arrival stamp, rather than when they last received
    something; as_of int64 [n], or None for a live read: the largest of both times and of the newest event applied.
    plans: of which plan of the program each id is, see `read_rows`; None if it has one. ids int64 [n]: of one key,
    where `hashes` is still to be filled; else [0].
    """

    program: PlanProgram
    hashes: Ints
    clock: Ints
    event_clock: bool
    as_of: Ints | None
    plans: Ints | None = None
    ids: Ints = field(default_factory=lambda: _NO_IDS)
    #: Whether it is asked again and again, about other ids: then who reads from memory keeps what it calls with.
    recurs: bool = False
    call: KernelCall | None = None

    @property
    def n(self) -> int:
        return len(self.clock)

    def hashed(self) -> Question:
        """Return it with its hashes, for who does not read from memory."""
        if len(self.ids):
            self.hashes[0] = hash_keys([self.ids.tolist()], self.n).view(np.int64)
        return self

    def of_rows(self, rows: Ints, clock: Ints) -> Question:
        """Return the question about some of its ids, with another clock for them all."""
        as_of = None if self.as_of is None else self.as_of[rows]
        return Question(self.program, np.ascontiguousarray(self.hashes[:, rows]), clock[rows], self.event_clock, as_of)


def blank_question(
    program: PlanProgram, n: int, kept: dict[int, Question], n_max: int, plans: Ints | None = None
) -> Question:
    """Return a question about n ids of one int64 field, which are still to be put into `ids`, as of `clock`. kept: has
    it from now on, to be asked again, if n is n_max at most."""
    hashes, (clock, ids) = np.empty((1, n, 2), np.int64), np.empty((2, n), np.int64)
    question = Question(program, hashes, clock, False, None, plans, ids, recurs=n <= n_max)
    if question.recurs:
        kept[n] = question
    return question


@dataclass(slots=True)
class Answer:
    """What shards know about n ids: as_of int64 [n] that they were read at, values float64 [n, width of the program],
    known bool [n, views of the program] (all_known: whether it is known that all are true), and the strings of the
    columns that are of strings. trace int64 [n, 1 + parts of the program]: see `read_rows`."""

    as_of: Ints
    values: Floats
    known: npt.NDArray[np.bool_]
    trace: Ints
    texts: dict[int, list[str | None]] = field(default_factory=dict)
    all_known: bool = False

    @classmethod
    def empty(cls, question: Question) -> Answer:
        n, (columns, views, traced) = len(question.clock), question.program.widths
        as_of = np.empty(n, np.int64) if question.as_of is None else question.as_of.copy()
        return cls(as_of, np.empty((n, columns)), np.empty((n, views), np.bool_), np.empty((n, traced), np.int64))


@dataclass(slots=True)
class FeatureRows:
    """Features of n ids: matrix float64 [n, columns], as_of int64 [n], per id the names of the views that do not know
    it, and the features of strings by name: n strings (None where empty), or n tuples of them. trace int64 [n, 1 +
    parts of the plan]: up to which event each row has been brought that was read, see `read_rows`; of no rows if nobody
    can tell."""

    matrix: Floats
    as_of: Ints
    unknown: list[list[str]]
    texts: dict[str, list[Any]] = field(default_factory=dict)
    trace: Ints = field(default_factory=lambda: _NO_TRACE)


def as_of_in_past(as_of_ms: int, newest_ms: int, past_ms: int = 0) -> AsOfInPast:
    if past_ms:
        why = f"and exact features of these windows are kept for as_of up to {past_ms} ms before that"
    else:
        why = "and an open tile cannot be cut in two (exact features can)"
    return AsOfInPast(
        f"as_of {as_of_ms} lies before {newest_ms}, up to which events have been applied, {why}: ask as of a later "
        "time, or leave as_of out",
        path="as_of",
    )


class ReadPlan:
    """Compile the reading of `features`, in the order of the matrix's columns.

    Strings stand beside the matrix; a derived feature is computed from others, which are read for it.

    subject: how errors about the request name it, such as "model `churn`".
    """

    def __init__(self, layout: Layout, features: Sequence[Feature], subject: str) -> None:
        self.subject = subject
        self.features = tuple(features)
        self.views: dict[str, FeatureView] = {f.view.name: f.view for f in features}
        #: Key field to "int64" or "string": the union over the views, in order of first use.
        self.key_fields: dict[str, str] = {
            name: "string" if v.source.fields[name].type == "string" else "int64"
            for v in self.views.values()
            for name in v.key
        }
        #: The columns of the matrix: a feature's name, with the place for those that have several.
        self.names = tuple(name for f in features if not f.is_text for name in _column_names(f))
        read: dict[str, Feature] = {}
        for feature in features:
            _add_kept_for(feature, read, set())
        #: What is read of the shards: the features themselves, and what those that are derived are computed from.
        self.kept = tuple(read.values())
        self.program = layout.plan_program(list(self.kept))
        ends = np.cumsum([0, *(f.width for f in read.values())]).tolist()
        self._columns = {name: slice(a, b) for name, a, b in zip(read, ends, ends[1:], strict=False)}
        #: Whether what is read is the matrix, as it is.
        self.is_matrix = len(read) == len(features) and not any(f.is_text or f.derived for f in features)
        self._numbers = [f for f in features if not f.is_text]
        self._text_features = [f for f in features if f.is_text]
        self._one_key = self.program.keys[0] if len(self.program.keys) == 1 else None
        #: Whether an id is one int64 field: most are, and take a shorter way. And which.
        self.is_of_words = list(self.key_fields.values()) == ["int64"]
        self._word = next(iter(self.key_fields)) if self.is_of_words else ""
        #: About so many ids of that field.
        self._recurring: dict[int, Question] = {}

    # -- ids

    def key_columns(self, ids: Sequence[Mapping[str, Any]], *, batch: bool, root: str = "$") -> dict[str, list[Any]]:
        """Return the ids as one checked Python list per key field. root: where in the request they stand.

        Raises `BadRequest` with the path of each wrong field (up to ten): missing, of another type,
        or more than the key; feature values in a request are refused by a message that says why.
        """
        if (plain := self._plain_columns(ids)) is not None:
            return plain
        columns: dict[str, list[Any]] = {name: [] for name in self.key_fields}
        problems: list[Problem] = []
        for i, one in enumerate(ids):
            path = f"{root}[{i}]" if batch else root
            if len(one) != len(columns) or one.keys() != columns.keys():
                problems += self._wrong_fields(one, path)
            for name, kind in self.key_fields.items():
                if name in one:
                    value = key_value(one[name], kind)
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

    def plain_key(self, one: Any) -> dict[str, list[Any]] | None:
        """Return what `key_columns` does of one id, if it is one int64 field and plainly right, as most are."""
        if self.is_of_words and type(one) is dict and len(one) == 1:
            name = self._word
            value = one.get(name)
            if type(value) is int and _INT64_MIN <= value <= _INT64_MAX:
                return {name: [value]}
        return None

    def _plain_columns(self, ids: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]] | None:
        """Return the key columns of ids that are plainly right, as nearly all are; None if one has to be looked at."""
        columns: dict[str, list[Any]] = {}
        width = len(self.key_fields)
        for one in ids:
            if len(one) != width:
                return None
        for name, kind in self.key_fields.items():
            try:
                column = [one[name] for one in ids]
            except KeyError:
                return None
            if kind == "int64":
                for value in column:
                    if type(value) is not int or not _INT64_MIN <= value <= _INT64_MAX:
                        return None
            else:
                for value in column:
                    if type(value) is not str or len(value) > KEY_BYTES_MAX or not value.isascii():
                        return None
            columns[name] = column
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

    def question(self, keys: Mapping[str, Sequence[Any]], n: int, clock_ms: int | None, as_of: Ints | None) -> Question:
        """Return the question about n ids.

        keys: per key field n checked values, a Python list or an Arrow array. clock_ms: None for the newest arrival.
        """
        if self._one_key is not None:
            hashes = hash_keys([keys[name] for name in self._one_key], n).reshape(1, n, 2)
        else:
            hashes = np.stack([hash_keys([keys[name] for name in key], n) for key in self.program.keys])
        clock = np.empty(n, np.int64)
        clock[:] = NO_CLOCK if clock_ms is None else clock_ms
        return Question(self.program, hashes.view(np.int64), clock, clock_ms is None, as_of)

    def question_of_words(self, keys: Mapping[str, Sequence[Any]], n: int, clock_ms: int | None) -> Question:
        """Return the question about n ids of one int64 field as of now, for who reads from memory at once.

        About a few ids it is the same object each time, so it is asked by one thread.
        """
        question = self._recurring.get(n) or blank_question(self.program, n, self._recurring, _RECURRING_MAX)
        if n == 1:  # one element is set faster than all
            question.ids[0] = keys[self._word][0]
            question.clock[0] = NO_CLOCK if clock_ms is None else clock_ms
        else:
            question.ids[:] = keys[self._word]
            question.clock[:] = NO_CLOCK if clock_ms is None else clock_ms
        question.event_clock = clock_ms is None
        return question

    def no_rows(self) -> FeatureRows:
        """Return the features of no ids."""
        texts: dict[str, list[Any]] = {f.full_name: [] for f in self._text_features}
        return FeatureRows(np.empty((0, len(self.names))), np.empty(0, np.int64), [], texts)

    def rows(self, answer: Answer) -> FeatureRows:
        """Return the features of an answer: the matrix, with what is derived, and the strings beside it.

        Raises `FeatureFailed` if a derived feature's function fails.
        """
        values, known = answer.values, answer.known
        unknown: list[list[str]] = [[]] if len(values) == 1 else [[] for _ in range(len(values))]
        if not answer.all_known:
            names = self.program.view_names
            if len(values) == 1:
                unknown[0] += [name for name, is_known in zip(names, known[0].tolist(), strict=True) if not is_known]
            else:
                for row, view in zip(*np.nonzero(~known), strict=True):
                    unknown[row].append(names[view])
        if self.is_matrix:
            return FeatureRows(values, answer.as_of, unknown, {}, answer.trace)
        columns: dict[str, Floats] = {}
        parts = [self._compute(feature, values, columns) for feature in self._numbers]
        matrix = np.concatenate(parts, axis=1) if parts else np.empty((len(values), 0))
        texts = {f.full_name: self._texts(f, answer) for f in self._text_features}
        return FeatureRows(matrix, answer.as_of, unknown, texts, answer.trace)

    def _compute(self, feature: Feature, values: Floats, columns: dict[str, Floats]) -> Floats:
        """Return the columns of a feature, float64 [n, width], computed first what it is derived from."""
        name = feature.full_name
        if name not in columns:
            if feature.derived is None:
                columns[name] = values[:, self._columns[name]]
            else:
                given = [self._compute(one, values, columns) for one in feature.of]
                one_each = [c[:, 0] if c.shape[1] == 1 else c for c in given]
                try:
                    columns[name] = feature.derived.compute(one_each, name)[:, np.newaxis]
                except Exception as error:
                    # Its text may hold paths or values that are not the client's to see.
                    logger.exception("%s: the function of feature `%s` raised", self.subject, name)
                    raise FeatureFailed(
                        f"{self.subject}: the function of feature `{name}` raised {type(error).__name__}; its text is "
                        "in the log of the deployment"
                    ) from error
        return columns[name]

    def _texts(self, feature: Feature, answer: Answer) -> list[Any]:
        columns = self._columns[feature.full_name]
        if feature.width == 1:
            return answer.texts[columns.start]
        return list(zip(*(answer.texts[c] for c in range(columns.start, columns.stop)), strict=True))

    def named_values(self, rows: FeatureRows) -> list[dict[str, Any]]:
        """Return per id each feature's value by its full name: a number, a string, None, or a list of such."""
        named: list[dict[str, Any]] = [{} for _ in range(len(rows.matrix))]
        lists = rows.matrix.tolist()
        column = 0
        for feature in self.features:
            name, width = feature.full_name, feature.width
            for i, one in enumerate(named):
                if feature.is_text:
                    one[name] = rows.texts[name][i]
                else:
                    one[name] = lists[i][column] if width == 1 else lists[i][column : column + width]
            column += 0 if feature.is_text else width
        return named


def _column_names(feature: Feature) -> list[str]:
    if feature.width == 1:
        return [feature.full_name]
    return [f"{feature.full_name}[{k}]" for k in range(feature.width)]


def _add_kept_for(feature: Feature, read: dict[str, Feature], seen: set[str]) -> None:
    """Add to `read` the features that are kept and read for a feature: itself, or what it is derived from."""
    if feature.full_name in seen:
        return
    seen.add(feature.full_name)
    if feature.derived is None:
        read.setdefault(feature.full_name, feature)
    for one in feature.of:
        _add_kept_for(one, read, seen)


def key_value(value: Any, kind: str) -> int | str | None:
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
