"""Decode the body of `POST /v1/events/{source}` to one Arrow record batch, whole or not at all.

Promises: what `Decoder.decode` returns has exactly `source.schema`, and every row of it is valid, so
nothing behind it validates again; for any other bytes it raises an error of `errors`, and no other.
Does not: drop duplicates, judge lateness, stamp arrival.

How: a body is first taken on a fast path that works on whole columns and only learns *whether* all
fits. If it does not, a second path finds the first bad rows by halving, with the same checks, and
names them. So good bodies pay nothing for good messages, and both paths cannot disagree.

Where the forms leave room: of a key that an object repeats, the last value counts; an ISO time is cut
to milliseconds; an int64 may be a string of its digits, written as Millpond would write it (`"42"`,
not `"042"`), since JavaScript holds no int64; NDJSON values need white space between them only where
JSON does. Arrow columns must convert without loss.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, NamedTuple, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.arrow_stream import ArrowStream
from millpond.feature_actors.errors import BadRequest, Problem, TooLarge, UnsupportedMediaType, did_you_mean
from millpond.feature_actors.source import Field, Source

__all__ = ["ARRIVAL_COLUMN", "CONTENT_TYPES", "TIME_MAX_MS", "TIME_MIN_MS", "BodyLimits", "Decoder", "Parsed"]

#: Content type to body form.
CONTENT_TYPES = {
    "application/json": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "application/vnd.apache.arrow.stream": "arrow",
}

#: Beside the fields of an Arrow body: when each event arrived, int64 in milliseconds. No field can have such a name.
ARRIVAL_COLUMN = "_arrival_ms"

#: 1970-01-01 and 2200-01-01, both included: a time outside is a wrong unit or a broken clock.
TIME_MIN_MS, TIME_MAX_MS = 0, 7_258_118_400_000

#: Numbers that are epoch seconds, of 2001-09-09 to 2106, rather than milliseconds of 1970-01-12 to 1970-02-19.
_SECONDS_MIN, _SECONDS_END = 10**9, 2**32

#: What msgspec, Arrow and Python raise for a value that does not fit.
_MISFITS = (
    msgspec.MsgspecError,
    pa.ArrowException,
    ValueError,
    TypeError,
    OverflowError,
    OSError,
    RecursionError,
    struct.error,
)

_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")

#: So many JSON events are made columns at once; fewer wait for others.
_FEW_ROWS = 64

#: Rows that the slow path holds at a time.
_CHUNK_ROWS = 1_000


@dataclass(frozen=True)
class BodyLimits:
    """What one body may hold; above it a body is refused with `TooLarge`, a string with `BadRequest`.

    arrow_bytes_max: an Arrow body in memory: a dictionary counts with every batch, and its strings with
        every row that names them.
    batches_max: record batches and dictionaries of an Arrow body.
    problems_max: bad values named in one answer.
    """

    body_bytes_max: int = 16 * 1024 * 1024
    rows_max: int = 1_000_000
    string_bytes_max: int = 65_536
    event_id_bytes_max: int = 1_024
    arrow_bytes_max: int = 64 * 1024 * 1024
    batches_max: int = 1_000
    problems_max: int = 10


class Parsed(NamedTuple):
    """A body that was decoded: its events as structures, or as a batch already; with arrival stamps, if asked for."""

    body: bytes
    form: str
    rows: int
    events: list[Any] | None
    batch: pa.RecordBatch | None
    arrivals: npt.NDArray[np.int64] | None = None


class Decoder:
    """Decode bodies for one source. Build it once; it holds no state between bodies.

    key_fields: fields that some view has in its key; as strings they have at most `key_bytes_max` bytes.
    refuse_seconds: refuse a number as event time that reads as epoch seconds; the same time as text, or of an Arrow
        type that has a unit, is taken.

    >>> source = Source("clicks", owner="web", fields={"page": "string", "at": "timestamp[ms, UTC]"},
    ...                 event_time="at")
    >>> Decoder(source).decode(b'{"page": "home", "at": "2024-05-01T12:00:00Z"}', None).num_rows
    1
    """

    def __init__(
        self,
        source: Source,
        limits: BodyLimits = BodyLimits(),
        key_fields: Collection[str] = (),
        key_bytes_max: int = 1_024,
        refuse_seconds: bool = False,
    ) -> None:
        self.source = source
        self.limits = limits
        self._schema = source.schema
        self._columns: dict[str, _Column] = {}
        for name, spec in source.fields.items():
            bytes_max = limits.string_bytes_max
            if name in key_fields:
                bytes_max = min(bytes_max, key_bytes_max)
            if name == source.event_id:
                bytes_max = min(bytes_max, limits.event_id_bytes_max)
            self._columns[name] = _column(spec, bytes_max, refuse_seconds and name == source.event_time)
        # Attributes are numbered: a field may be named as a Python keyword.
        attributes = {f"f{i}": name for i, name in enumerate(self._columns)}
        event = msgspec.defstruct(
            "Event",
            [(a, *self._columns[name].json_field) for a, name in attributes.items()],
            rename=attributes,
            forbid_unknown_fields=True,
            kw_only=True,
            gc=False,
        )
        self._events_type: Any = list[event]  # type: ignore[valid-type]
        self._json = msgspec.json.Decoder(self._events_type | event)
        self._ndjson = msgspec.json.Decoder(event)
        self._struct_type = pa.struct(list(self._schema))
        #: The column whose numbers may not be seconds.
        self._refuses_seconds = next((i for i, c in enumerate(self._columns.values()) if c.refuses_seconds), None)

    def decode(self, body: bytes, content_type: str | None) -> pa.RecordBatch:
        """Decode one body; return its rows in the order of the body, as `source.schema`.

        A missing content type means JSON. The batch may be a view of `body`.

        Raises `UnsupportedMediaType`; `TooLarge` with the limit; `BadRequest` with code
        `invalid_events`, whose path is that of the first bad value and whose `problems` are the first ten.
        """
        parsed = self.parse(body, content_type)
        return parsed.batch if parsed.batch is not None else self._batch_of(parsed)

    def parse(self, body: bytes, content_type: str | None, *, arrivals: bool = False) -> Parsed:
        """Decode one body as far as pays alone: a few JSON events are made columns together with others, by `join`.

        arrivals: of Arrow, which has a column more, `ARRIVAL_COLUMN`. Raises as `decode`, but for what `join` says of
        it.
        """
        form = self._form(content_type)
        if len(body) > self.limits.body_bytes_max:
            self._too_large("body_bytes_max", f"{len(body)} bytes")
        if not body:
            raise self._invalid([(f"{self._body}: empty; allowed are events, or `[]`", "$")])
        if form == "arrow":
            return self._decode_arrow(body, arrivals)
        if arrivals:
            raise self._invalid([(f"{self._body}: arrival stamps come with Arrow only, as `{ARRIVAL_COLUMN}`", "$")])
        try:
            events: Any = self._json.decode(body) if form == "json" else self._ndjson.decode_lines(body)
        except _MISFITS as error:
            raise self._invalid(self._json_problems(body, form, str(error))) from None
        if not isinstance(events, list):
            events = [events]
        self._check_rows(len(events))
        parsed = Parsed(body, form, len(events), events, None)
        return parsed if len(events) < _FEW_ROWS else parsed._replace(batch=self._batch_of(parsed))

    def join(self, parsed: Sequence[Parsed]) -> tuple[pa.RecordBatch, dict[int, BadRequest]]:
        """Return the events of all bodies as one batch, but for those that are refused, and why those are."""
        if all(p.batch is None for p in parsed):
            with suppress(*_MISFITS):
                return self._from_events([event for p in parsed for event in p.events or ()]), {}
        batches, refused = [], {}
        for i, p in enumerate(parsed):
            try:
                batches.append(self._batch_of(p) if p.batch is None else p.batch)
            except BadRequest as error:
                refused[i] = error
        if len(batches) == 1:
            return batches[0], refused
        return pa.concat_batches(batches) if batches else pa.RecordBatch.from_pylist([], self._schema), refused

    def _batch_of(self, parsed: Parsed) -> pa.RecordBatch:
        assert parsed.events is not None
        try:
            return self._from_events(parsed.events)
        except _MISFITS as error:
            reason = str(error)
        raise self._invalid(self._json_problems(parsed.body, parsed.form, reason))

    def from_table(self, table: pa.Table) -> pa.RecordBatch:
        """Return a table's rows as `source.schema`, checked and filled as those of an Arrow body are.

        Columns that are no field are left out. Raises as `decode` does.
        """
        columns = [i for i, name in enumerate(table.column_names) if name in self._columns]
        self._check_columns(table.select(columns).schema)
        received = {table.column_names[i]: _joined(table.column(i)) for i in columns}
        return self._from_columns(received, table.num_rows)

    def arrivals_of(self, table: pa.Table) -> npt.NDArray[np.int64]:
        """Return the arrival stamps of a table's rows, int64 [n], checked as those of an Arrow body are."""
        self._without_arrivals(table.schema)
        return self._stamps(_joined(table.column(ARRIVAL_COLUMN)))

    # JSON and NDJSON.

    def _from_events(self, events: list[Any]) -> pa.RecordBatch:
        rows = list(map(msgspec.structs.astuple, events))
        columns = self._columns.values()
        try:
            # One struct array, taken apart: 11 us for one event of six fields, against 25 by column.
            arrays = pa.array(rows, self._struct_type).flatten()
        except pa.ArrowInvalid:
            # Integers that came as strings: converted by column.
            arrays = [c.from_json(v) for c, v in zip(columns, zip(*rows, strict=True), strict=True)]
        checked = [c.checked(a) for c, a in zip(columns, arrays, strict=True)]
        place = self._refuses_seconds
        if place is not None and rows:
            times_ms = checked[place].to_numpy().view(np.int64)
            # All times of a usual body lie behind: then none is looked at.
            if times_ms.min() < _SECONDS_END and _any_seconds(row[place] for row in rows):
                raise ValueError("epoch seconds")
        return pa.RecordBatch.from_arrays(checked, schema=self._schema)

    def _json_problems(self, body: bytes, form: str, reason: str) -> list[Problem]:
        """Find the first bad values of a body that the fast path refused; `reason` if there are none."""
        # Invalid UTF-8 becomes lone surrogates, which no string may hold: it is named where it stands.
        text = body.decode("utf-8", "surrogateescape")
        scan = _Scan(text, form)
        problems: list[Problem] = []
        start = 0
        unread = iter(scan)
        while chunk := list(islice(unread, _CHUNK_ROWS)):
            self._check_rows(start + len(chunk))
            for row in self._misfit_events(chunk, self._wanted(problems)):
                problems += self._row_problems(chunk[row], scan.path(start + row), reason)
            if not self._wanted(problems):
                return problems
            start += len(chunk)
        if scan.malformed:
            problems.append((f"{self._body}: {scan.malformed}", scan.path(start)))
        return problems or [(f"{self._body}: {_shown(reason, 200)}", "$")]

    def _misfit_events(self, events: list[Any], most: int) -> list[int]:
        def fit(start: int, stop: int) -> bool:
            try:
                self._from_events(msgspec.convert(events[start:stop], self._events_type))
            except _MISFITS:
                return False
            return True

        return _misfits(len(events), fit, most)

    def _row_problems(self, row: Any, path: str, reason: str) -> list[Problem]:
        """Return the problems of one bad row: of its values as they stand, then of what is missing."""
        if not isinstance(row, dict):
            return [(f"{self._event}: expected an object, got {_got(row)}", path)]
        problems = []
        for name, value in row.items():
            column = self._columns.get(name)
            if column is None:
                problems.append((self._unknown(name), _member(path, name)))
            elif not column.fits_json(value):
                problems.append((f"{self._event}: {column.expected(value)}", _member(path, name)))
            if not self._wanted(problems):
                return problems
        problems += self._missing(row, path)
        return problems or [(f"{self._event}: {_shown(reason, 200)}", path)]

    # Arrow.

    def _decode_arrow(self, body: bytes, arrivals: bool) -> Parsed:
        try:
            stream = ArrowStream(body, self.limits, "events", self._too_large)
            self._check_columns(self._without_arrivals(stream.schema) if arrivals else stream.schema)
            received, rows = stream.columns()
        except (*_MISFITS, MemoryError) as error:
            reason = _shown(str(error).partition("\n")[0], 200)
            problem = (f"{self._body}: not an Arrow IPC stream that can be read: {reason}", "$")
            raise self._invalid([problem]) from None
        stamps = self._stamps(received.pop(ARRIVAL_COLUMN)) if arrivals else None
        return Parsed(body, "arrow", rows, None, self._from_columns(received, rows), stamps)

    def _without_arrivals(self, schema: pa.Schema) -> pa.Schema:
        """Return the schema of the fields. Raises `BadRequest` if there is no column of arrival stamps beside them."""
        found = [field for field in schema if field.name == ARRIVAL_COLUMN]
        if [field.type for field in found] != [pa.int64()]:
            got = _shown(", ".join(str(field.type) for field in found) or "nothing")
            path = _member("$[*]", ARRIVAL_COLUMN)
            raise self._invalid(
                [(f"{self._event}: expected one column `{ARRIVAL_COLUMN}` of `int64`, got {got}", path)]
            )
        return pa.schema([field for field in schema if field.name != ARRIVAL_COLUMN])

    def _stamps(self, column: pa.Array) -> npt.NDArray[np.int64]:
        values: npt.NDArray[np.int64] = column.fill_null(-1).to_numpy()
        wrong = np.flatnonzero((values < TIME_MIN_MS) | (values > TIME_MAX_MS))[: self._wanted(())].tolist()
        if wrong:
            allowed = "allowed are epoch milliseconds from 1970-01-01 to 2200-01-01"
            got = [(i, "nothing" if column[i].as_py() is None else column[i].as_py()) for i in wrong]
            raise self._invalid(
                [
                    (f"{self._event}: got the arrival stamp {stamp}; {allowed}", _member(f"$[{i}]", ARRIVAL_COLUMN))
                    for i, stamp in got
                ]
            )
        return values

    def _from_columns(self, received: dict[str, pa.Array], rows: int) -> pa.RecordBatch:
        """Return columns of accepted types as `source.schema`."""
        arrays: list[pa.Array] = []
        problems: list[tuple[int, Problem]] = []
        for name, column in self._columns.items():
            array = received[name] if name in received else pa.nulls(rows, column.type)
            try:
                arrays.append(column.from_arrow(array))
            except _MISFITS as error:
                problems += self._column_problems(name, column, array, str(error))
        if problems:
            problems.sort(key=lambda p: p[0])
            raise self._invalid([problem for _, problem in problems])
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def _check_columns(self, schema: pa.Schema) -> None:
        problems: list[Problem] = []
        for name in dict.fromkeys(schema.names):
            column = self._columns.get(name)
            path = _member("$[*]", name)
            if column is None:
                problems.append((self._unknown(name), path))
            elif schema.names.count(name) > 1:
                problems.append((f"{self._event}: column `{name}` comes twice; allowed is once", path))
            elif not column.accepts(schema.field(name).type):
                got = _shown(str(schema.field(name).type))
                problems.append((f"{self._event}: expected `{column.name}`, got a column of `{got}`", path))
            if not self._wanted(problems):
                break
        problems += self._missing(schema.names, "$[*]")
        if problems:
            raise self._invalid(problems)

    def _column_problems(self, name: str, column: _Column, array: pa.Array, reason: str) -> list[tuple[int, Problem]]:
        """Return the first bad values of a column that does not fit, with their rows; never none."""
        rows = _misfits(len(array), lambda a, b: column.fits_arrow(array.slice(a, b - a)), self._wanted(()))
        return [
            (row, (f"{self._event}: {column.expected(_plain(array[row]))}", _member(f"$[{row}]", name))) for row in rows
        ] or [(0, (f"{self._event}: {_shown(reason, 200)}", _member("$[*]", name)))]

    # Refusals.

    @property
    def _event(self) -> str:
        return f"event of `{self.source.name}`"

    @property
    def _body(self) -> str:
        return f"body of `{self.source.name}`"

    def _form(self, content_type: str | None) -> str:
        media_type = (content_type or "application/json").partition(";")[0].strip().lower()
        form = CONTENT_TYPES.get(media_type)
        if form is None:
            allowed = ", ".join(f"`{t}`" for t in CONTENT_TYPES)
            raise UnsupportedMediaType(f"{self._body}: content type `{_shown(media_type)}`; allowed are {allowed}")
        return form

    def _missing(self, names: Collection[str], path: str) -> list[Problem]:
        return [
            (f"{self._event}: expected `{column.name}`, got nothing", _member(path, name))
            for name, column in self._columns.items()
            if column.required and name not in names
        ]

    def _unknown(self, name: str) -> str:
        return f"{self._event}: unknown field `{_shown(name)}`" + did_you_mean(name[:64], self._columns)

    def _wanted(self, problems: Sequence[Problem]) -> int:
        return max(0, self.limits.problems_max - len(problems))

    def _check_rows(self, rows: int) -> None:
        if rows > self.limits.rows_max:
            self._too_large("rows_max", f"more than {self.limits.rows_max} events")

    def _too_large(self, limit: str, got: str) -> NoReturn:
        allowed = getattr(self.limits, limit)
        raise TooLarge(f"{self._body}: {got}; `{limit}` is {allowed}; send fewer events at a time")

    def _invalid(self, problems: list[Problem]) -> BadRequest:
        message, path = problems[0]
        most = self.limits.problems_max
        return BadRequest(message, path=path, code="invalid_events", problems=tuple(problems[:most]))


@dataclass(frozen=True)
class _Column:
    """One field, compiled: what it takes from JSON and Arrow, and the checks that both share."""

    name: str
    type: pa.DataType
    required: bool
    default: pa.Scalar | None
    bytes_max: int
    json_type: Any
    check: Callable[[_Column, Any], bool] | None
    refuses_seconds: bool = False

    @property
    def json_field(self) -> tuple[Any, ...]:
        return (self.json_type,) if self.required else (self.json_type | None, None)

    def checked(self, array: pa.Array) -> pa.Array:
        """Return `array`, nulls replaced by the default. Raises `ValueError` if any value is not allowed."""
        present = array
        if array.null_count:
            if self.required:
                raise ValueError("null")
            present = array.drop_null()
        if self.check is not None and len(present) and not self.check(self, present):
            raise ValueError("not allowed")
        return array.fill_null(self.default) if self.default is not None and array.null_count else array

    def from_json(self, values: Sequence[Any]) -> pa.Array:
        """Return decoded JSON values as Arrow, not checked yet. Raises one of `_MISFITS`."""
        try:
            return pa.array(values, self.type)
        except pa.ArrowInvalid:
            if not pa.types.is_int64(self.type):
                raise
        texts = pa.array([v if type(v) is str else None for v in values], pa.string())
        numbers = pa.array([None if type(v) is str else v for v in values], self.type)
        parsed = texts.cast(self.type)
        if not parsed.cast(pa.string()).equals(texts):
            raise ValueError("not as Millpond writes it")
        return pc.coalesce(numbers, parsed)

    def fits_json(self, value: Any) -> bool:
        try:
            plain = msgspec.convert(value, self.json_field[0])
            self.checked(self.from_json([plain]))
        except _MISFITS:
            return False
        return not (self.refuses_seconds and _any_seconds([plain]))

    def accepts(self, given: pa.DataType) -> bool:
        """Return whether an Arrow column of type `given` may hold this field, its values yet to be seen."""
        is_ = pa.types
        if is_.is_null(given):
            return not self.required
        if is_.is_integer(self.type):
            return bool(is_.is_integer(given))
        if is_.is_floating(self.type):
            return bool(is_.is_integer(given) or is_.is_float32(given) or is_.is_float64(given))
        if is_.is_timestamp(self.type):
            return bool(is_.is_int64(given) or (is_.is_timestamp(given) and given.tz is not None))
        if is_.is_string(self.type):
            text = given.value_type if is_.is_dictionary(given) else given
            return bool(is_.is_string(text) or is_.is_large_string(text))
        return bool(given == self.type)

    def from_arrow(self, array: pa.Array) -> pa.Array:
        """Return a column of an accepted type as this field, checked. Raises one of `_MISFITS`."""
        if self.refuses_seconds and pa.types.is_int64(array.type):
            numbers = array.drop_null().to_numpy()
            if ((numbers >= _SECONDS_MIN) & (numbers < _SECONDS_END)).any():
                raise ValueError("epoch seconds")
        cast = array if array.type == self.type else array.cast(self.type)
        # Arrow checks every other conversion for loss.
        if pa.types.is_float64(array.type) and cast is not array and not cast.cast(array.type).equals(array):
            raise ValueError("loses digits")
        return self.checked(cast)

    def fits_arrow(self, array: pa.Array) -> bool:
        try:
            self.from_arrow(array)
        except _MISFITS:
            return False
        return True

    def expected(self, value: Any) -> str:
        """Return what to say of a value that does not fit."""
        said = f"expected `{self.name}`, got {_got(value)}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if pa.types.is_integer(self.type) and is_number and isinstance(value, int):
            low, high = _int_range(self.type)
            return f"{said}; allowed is {low} to {high}"
        if pa.types.is_floating(self.type) and is_number:
            return said + ("; it does not fit without loss" if math.isfinite(value) else "; allowed are finite numbers")
        seconds = int(value) if isinstance(value, float) and value.is_integer() else value
        if self.refuses_seconds and is_number and _any_seconds([seconds]):
            moment = datetime.fromtimestamp(value, UTC)
            return (
                f"{said}, which is {moment:%Y-%m-%d} in epoch seconds; allowed are milliseconds: send "
                f"{int(value) * 1_000}, or if it happened in 1970 its time as ISO 8601"
            )
        if pa.types.is_timestamp(self.type) and (is_number or isinstance(value, str | _Time)):
            return said + ("; allowed is ISO 8601 with a zone, or epoch milliseconds, from 1970-01-01 to 2200-01-01")
        if pa.types.is_string(self.type) and isinstance(value, str):
            size = len(value.encode("utf-8", "surrogatepass"))
            if size > self.bytes_max:
                return f"expected `{self.name}`, got {size} bytes; allowed are {self.bytes_max}"
            return f"{said}; allowed is valid UTF-8"
        return said


def _column(spec: Field, bytes_max: int, refuses_seconds: bool) -> _Column:
    arrow_type = spec.arrow_type
    check: Callable[[_Column, Any], bool] | None = None
    json_type: Any
    if pa.types.is_integer(arrow_type):
        json_type = int | str if pa.types.is_int64(arrow_type) else int
    elif pa.types.is_floating(arrow_type):
        json_type, check = float, _all_finite
    elif pa.types.is_timestamp(arrow_type):
        json_type, check = int | Annotated[datetime, msgspec.Meta(tz=True)], _all_in_time
    elif pa.types.is_string(arrow_type):
        json_type, check = str, _all_short
    else:
        json_type = bool
    return _Column(
        name=spec.type,
        type=arrow_type,
        required=not spec.optional and spec.default is None,
        default=None if spec.default is None else pa.scalar(spec.default, arrow_type),
        bytes_max=bytes_max,
        json_type=json_type,
        check=check,
        refuses_seconds=refuses_seconds,
    )


def _any_seconds(times: Iterable[Any]) -> bool:
    """Return whether a number among times is one of epoch seconds."""
    return any(type(time) is int and _SECONDS_MIN <= time < _SECONDS_END for time in times)


# The checks of values; an array given to them holds at least one row and no null.


def _all_finite(column: _Column, array: pa.Array) -> bool:
    return bool(np.isfinite(array.to_numpy()).all())


def _all_in_time(column: _Column, array: pa.Array) -> bool:
    times_ms = array.to_numpy().view(np.int64)
    return bool(times_ms.min() >= TIME_MIN_MS and times_ms.max() <= TIME_MAX_MS)


def _all_short(column: _Column, array: pa.Array) -> bool:
    # The first test costs nothing, and most batches pass it.
    return bool(array.nbytes <= column.bytes_max or pc.max(pc.binary_length(array)).as_py() <= column.bytes_max)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """Return a column of a table as one array, its dictionaries decoded."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.combine_chunks()


def _misfits(rows: int, fit: Callable[[int, int], bool], most: int) -> list[int]:
    """Return the first `most` rows that do not fit, by halving; `fit(a, b)` judges rows a to b - 1."""
    found: list[int] = []
    spans = [(0, rows)]
    while spans and len(found) < most:
        start, stop = spans.pop()
        if start == stop or fit(start, stop):
            continue
        if stop - start == 1:
            found.append(start)
        else:
            middle = (start + stop) // 2
            spans += [(middle, stop), (start, middle)]
    return found


class _Scan:
    """Iterate over the rows of a JSON or NDJSON text; it ends early at what is no JSON, see `malformed`.

    One row is held at a time. Accepts a little more than JSON (`NaN`), so that bad values get a path.
    """

    def __init__(self, text: str, form: str) -> None:
        self.malformed = ""
        self._text = text
        self._form = form
        self._position = self._after_space(0)
        self._single = form == "json" and not text.startswith("[", self._position)
        self._rows = self._lines() if form == "ndjson" else self._one() if self._single else self._array()

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._rows
        except json.JSONDecodeError as error:
            self.malformed = self._say(error.msg, error.pos)
        except RecursionError:
            self.malformed = self._say("nested too deeply", self._position)

    def path(self, row: int) -> str:
        return "$" if self._single else f"$[{row}]"

    def _lines(self) -> Iterator[Any]:
        while self._position < len(self._text):
            yield self._value()

    def _one(self) -> Iterator[Any]:
        yield self._value()
        self._end()

    def _array(self) -> Iterator[Any]:
        self._position = self._after_space(self._position + 1)
        if not self._skip("]"):
            yield self._value()
            while self._skip(","):
                yield self._value()
            if not self._skip("]"):
                raise json.JSONDecodeError("expected `,` or `]`", self._text, self._position)
        self._end()

    def _value(self) -> Any:
        value, end = _JSON.raw_decode(self._text, self._position)
        self._position = self._after_space(end)
        return value

    def _skip(self, character: str) -> bool:
        if not self._text.startswith(character, self._position):
            return False
        self._position = self._after_space(self._position + 1)
        return True

    def _end(self) -> None:
        if self._position < len(self._text):
            raise json.JSONDecodeError("bytes after the end", self._text, self._position)

    def _after_space(self, position: int) -> int:
        match = _JSON_SPACE.match(self._text, position)
        assert match is not None
        return match.end()

    def _say(self, reason: str, position: int) -> str:
        before = self._text[:position].encode("utf-8", "surrogateescape")
        reason = (reason[0].lower() + reason[1:]).removesuffix(" at")
        if self._form == "ndjson":
            start = before.rfind(b"\n") + 1
            line = before.count(b"\n") + 1
            return f"line {line} is not JSON: {reason} at its byte {len(before) - start}"
        return f"not JSON: {reason} at byte {len(before)}"


def _json_int(digits: str) -> int | float:
    # Python refuses to read more than 4,300 digits; 310 and more are infinite in every type.
    return int(digits) if len(digits) <= 310 else float(digits)


_JSON = json.JSONDecoder(parse_int=_json_int)


# How values and names are shown: short, and in valid UTF-8 whatever was sent.


@dataclass(frozen=True)
class _Time:
    """A time of an Arrow column, which Python's datetime may be too narrow for."""

    text: str


def _plain(scalar: pa.Scalar) -> Any:
    if pa.types.is_timestamp(scalar.type) and scalar.is_valid:
        return _Time(f"{scalar.value} {scalar.type.unit}")
    return scalar.as_py()


def _got(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, _Time):
        return f"`{value.text}`"
    if isinstance(value, str):
        return f"`{_shown(json.dumps(value[:60], ensure_ascii=False))}`"
    return f"`{_shown(json.dumps(value))}`"


def _shown(text: str, most: int = 60) -> str:
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return cut.encode("utf-8", "backslashreplace").decode()


def _member(path: str, name: str) -> str:
    return f"{path}.{name}" if _FIELD_NAME.fullmatch(name) else f"{path}[{_shown(json.dumps(name[:60]))}]"


def _int_range(int_type: pa.DataType) -> tuple[int, int]:
    bits = int_type.bit_width
    if pa.types.is_signed_integer(int_type):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1
