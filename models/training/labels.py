"""Labels: whose features a training set holds, as of when; checked as they come, and sorted by time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.decode import TIME_MAX_MS
from millpond.feature_actors.errors import BadRequest
from millpond.models.training.runs import Room, Runs, bounds

__all__ = ["AT", "ROW", "Labels", "LaterLabels"]

Ints = npt.NDArray[np.int64]

#: Columns beside the key fields: the as-of of a label in milliseconds, and its place among all labels.
AT, ROW = "_at", "_row"
#: No event is later than the latest; what is as of a time before the first one is not known yet.
_EARLIEST_MS, _LATEST_MS = -TIME_MAX_MS, TIME_MAX_MS


@dataclass(frozen=True)
class LaterLabels:
    """Labels later than a time: how many, and the first of them, its row and time."""

    than_ms: int
    labels: int
    row: int
    at_ms: int


class Labels:
    """The ids and times of labels.

    key_fields: name to "int64" or "string". as_of: the column that holds the time.
    """

    def __init__(self, key_fields: Mapping[str, str], as_of: str, room: Room) -> None:
        self._key_fields, self._as_of, self._room = key_fields, as_of, room
        kinds = {name: pa.string() if kind == "string" else pa.int64() for name, kind in key_fields.items()}
        own = {AT: pa.int64(), ROW: pa.int64()}
        self.runs = Runs(pa.schema([*kinds.items(), *own.items()]), AT, room)
        #: The time of the oldest label and its row, and the time of the newest; None before the first.
        self.oldest: tuple[int, int] | None = None
        self.newest_ms: int | None = None

    @property
    def columns(self) -> list[str]:
        return [*self._key_fields, self._as_of]

    def check_columns(self, names: Sequence[str]) -> None:
        """Raise `BadRequest` if labels with columns of these names lack one, or have two."""
        if self._as_of in self._key_fields:
            raise BadRequest(
                f"training set: column `{self._as_of}` of the labels is a key field; name another for times"
            )
        for name in self.columns:
            if (times := list(names).count(name)) != 1:
                have = "have no" if not times else f"have {times} times a"
                raise BadRequest(f"training set: labels {have} column `{name}`; they have {list(names)}")

    def add(self, labels: pa.RecordBatch) -> None:
        """Add labels that stand behind those before. Raises `BadRequest` that names the row and the column."""
        first, n = self.runs.rows, labels.num_rows
        if not n:
            return
        columns = {name: _plain(labels.column(name)) for name in self.columns}
        for name, column in columns.items():
            if column.null_count:
                row = pc.index(column.is_null(), True).as_py()
                raise BadRequest(f"training set: label without `{name}`", path=f"$[{first + row}].{name}")
        times = _times(columns[self._as_of], self._as_of, first)
        keys = [_keys(columns[name], name, kind) for name, kind in self._key_fields.items()]
        own = [pa.array(times), pa.array(np.arange(first, first + n))]
        self.runs.add(pa.RecordBatch.from_arrays([*keys, *own], schema=self.runs.schema))
        oldest = int(times.argmin())
        if self.oldest is None or times[oldest] < self.oldest[0]:
            self.oldest = int(times[oldest]), first + oldest
        newest = int(times.max())
        self.newest_ms = newest if self.newest_ms is None else max(self.newest_ms, newest)

    def later_than(self, ms: int) -> LaterLabels | None:
        """Return which labels are later than a time, None if there are none; after the last one was added."""
        if self.newest_ms is None or self.newest_ms <= ms:
            return None
        n, first = 0, (self.runs.rows, ms)
        for bound in bounds([self.runs], self._room):
            batch = self.runs.take_until(bound)
            times, rows = batch.column(AT).to_numpy(), batch.column(ROW).to_numpy()
            later = np.flatnonzero(times > ms)
            n += len(later)
            first = min([first, *zip(rows[later].tolist(), times[later].tolist(), strict=True)])
        self.runs.rewind()
        return LaterLabels(ms, n, *first)


def _plain(column: pa.Array) -> pa.Array:
    """Return a column without a dictionary, whose values may be null, too."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _times(given: pa.Array, name: str, first: int) -> Ints:
    """Return the as-of of labels, int64 [n] milliseconds; refuse what is none, of no zone, or would be cut."""
    if not pa.types.is_timestamp(given.type) or given.type.tz is None:
        raise BadRequest(
            f"training set: column `{name}` of the labels is `{given.type}`; expected a timestamp with a time zone, "
            "such as `timestamp[ms, UTC]`: hours decide what a label knows"
        )
    earliest, latest = (
        pa.scalar(ms, pa.timestamp("ms", given.type.tz)).cast(given.type) for ms in (_EARLIEST_MS, _LATEST_MS)
    )
    if (row := pc.index(pc.or_(pc.less(given, earliest), pc.greater(given, latest)), True).as_py()) >= 0:
        raise BadRequest(
            f"training set: label with `{name}` {given[row].value} {given.type.unit}; a time is of 1740 to 2200",
            path=f"$[{first + row}].{name}",
        )
    try:
        times = given.cast(pa.timestamp("ms", given.type.tz))
    except pa.ArrowInvalid:
        cut = given.cast(pa.timestamp("ms", given.type.tz), safe=False).cast(given.type, safe=False)
        row = pc.index(pc.equal(cut, given), False).as_py()
        raise BadRequest(
            f"training set: label with `{name}` {given[row].value} {given.type.unit}, which is not of whole "
            "milliseconds; round it",
            path=f"$[{first + row}].{name}",
        ) from None
    return times.cast(pa.int64()).to_numpy()  # type: ignore[no-any-return]


def _keys(column: pa.Array, name: str, kind: str) -> pa.Array:
    """Return a key field of labels as the type that it has in the events."""
    given = column.type
    texts = pa.types.is_string(given) or pa.types.is_large_string(given) or pa.types.is_string_view(given)
    if not (texts if kind == "string" else pa.types.is_integer(given)):
        raise BadRequest(f"training set: column `{name}` of the labels is `{column.type}`; expected `{kind}`")
    try:
        return column.cast(pa.string() if kind == "string" else pa.int64())
    except pa.ArrowInvalid as error:
        raise BadRequest(f"training set: column `{name}` of the labels does not fit `{kind}`: {error}") from None
