"""A source: a named stream of raw events with a schema and an owner.

The schema is written in Arrow type names and checked when the source is declared. Events of a
source travel as Arrow record batches of exactly `Source.schema`; `decode` makes them from what an
application sends, and nothing behind it validates again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.errors import DeclarationError, did_you_mean
from millpond.feature_actors.windows import parse_length_ms

__all__ = ["Field", "Source", "check_name", "check_owner"]

#: History is deleted by whole days.
RETENTION_MIN_MS = 86_400_000

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")

#: Arrow type names that a field may have, and what they become.
FIELD_TYPES: dict[str, pa.DataType] = {
    **{f"{sign}int{bits}": getattr(pa, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float32": pa.float32(),
    "float64": pa.float64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
    "timestamp[ms, UTC]": pa.timestamp("ms", tz="UTC"),
}


def check_name(kind: str, name: Any) -> str:
    """Return `name` if it can name something (`[a-z][a-z0-9_]{0,62}`), or raise `DeclarationError`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DeclarationError(
            f"{kind} {name!r}: a name is lower-case letters, digits and `_`, starts with a letter and has "
            "at most 63 characters"
        )
    return name


def check_owner(kind: str, name: str, owner: Any) -> str:
    """Return `owner` if it names a team, or raise `DeclarationError`."""
    if not isinstance(owner, str) or not owner.strip():
        raise DeclarationError(f'{kind} `{name}`: no owner; say which team owns it with `owner="..."`')
    return owner


@dataclass(frozen=True)
class Field:
    """One field of a source.

    type: an Arrow type name of `FIELD_TYPES`.
    optional: may be null or absent; aggregations skip nulls.
    default: stands in for an absent or null value.
    personal: erasure and masking act on it.
    """

    type: str
    optional: bool = False
    default: Any = None
    personal: bool = False

    @property
    def arrow_type(self) -> pa.DataType:
        return FIELD_TYPES[self.type]


@dataclass(frozen=True)
class Source:
    """Declare a named stream of raw events.

    fields: name to Arrow type name, or to a `Field` where more is to be said.
    event_id: the field that tells two events apart (the duplicate check); without it every row counts.
    event_time: the field that says when it happened; int64 milliseconds since the epoch, UTC.
    retention: how long its history is kept, by arrival stamp, such as "365d"; None for ever.

    Raises `DeclarationError` that names the source and the field if anything does not fit.
    """

    name: str
    owner: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    event_time: str = ""
    event_id: str | None = None
    about: str = ""
    version: int = 1
    retention: str | None = None

    def __post_init__(self) -> None:
        check_name("source", self.name)
        check_owner("source", self.name, self.owner)
        if type(self.version) is not int or self.version < 1:
            raise DeclarationError(f"source `{self.name}`: version is a whole number from 1 on, got {self.version!r}")
        if self.retention is not None and (parse_length_ms(self.retention) or 0) < RETENTION_MIN_MS:
            raise DeclarationError(
                f"source `{self.name}`: retention is a length of a day or more such as `365d`, or None for ever, got "
                f"{self.retention!r}"
            )
        if not isinstance(self.fields, Mapping):
            raise DeclarationError(
                f"source `{self.name}`: fields is a mapping of name to type such as "
                f'{{"amount": "float64"}}, got {self.fields!r}'
            )
        if not self.fields:
            raise DeclarationError(f"source `{self.name}`: no fields")
        fields = {n: f if isinstance(f, Field) else Field(f) for n, f in self.fields.items()}
        object.__setattr__(self, "fields", fields)
        for name, spec in fields.items():
            self._check_field(name, spec)
        self._check_role("event_time", self.event_time, ("timestamp[ms, UTC]",))
        if self.event_id is not None:
            self._check_role("event_id", self.event_id, ("string", "int64"))

    def _check_field(self, name: str, spec: Field) -> None:
        check_name(f"source `{self.name}`: field", name)
        if not isinstance(spec.type, str) or spec.type not in FIELD_TYPES:
            raise DeclarationError(
                f"source `{self.name}`: field `{name}` has unknown type {spec.type!r}"
                + did_you_mean(str(spec.type), FIELD_TYPES)
            )
        if spec.default is not None:
            try:
                pa.scalar(spec.default, spec.arrow_type)
                if isinstance(spec.default, float) and not math.isfinite(spec.default):
                    raise ValueError
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                raise DeclarationError(
                    f"source `{self.name}`: field `{name}` is `{spec.type}`, its default {spec.default!r} is not"
                ) from None

    def _check_role(self, role: str, name: str, types: tuple[str, ...]) -> None:
        if not isinstance(name, str) or name not in self.fields:
            raise DeclarationError(
                f"source `{self.name}`: {role} is {name!r}, which is not a field" + did_you_mean(str(name), self.fields)
            )
        spec: Field = self.fields[name]
        if spec.type not in types:
            raise DeclarationError(
                f"source `{self.name}`: {role} `{name}` is `{spec.type}`; allowed is {' or '.join(types)}"
            )
        if spec.optional or spec.default is not None:
            raise DeclarationError(f"source `{self.name}`: {role} `{name}` can be neither optional nor defaulted")

    def upgraded(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return a batch of an older version of the schema as one of this: a field that it lacks is null, or its
        default."""
        schema = self.schema
        if batch.schema.equals(schema):
            return batch
        columns = []
        for name, spec in self.fields.items():
            if name in batch.schema.names:
                columns.append(batch.column(name).cast(spec.arrow_type))
            else:
                columns.append(pa.repeat(pa.scalar(spec.default, spec.arrow_type), batch.num_rows))
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def times_ms(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Return the event times of a batch, int64 [n], not to be written to."""
        times: npt.NDArray[np.int64] = batch.column(self.event_time).view(pa.int64()).to_numpy()
        return times

    @property
    def retention_ms(self) -> int | None:
        """How long the history is kept, None for ever."""
        return parse_length_ms(self.retention)

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema of a validated batch; a field that is not optional is not nullable."""
        return pa.schema([pa.field(n, f.arrow_type, nullable=f.optional) for n, f in self.fields.items()])
