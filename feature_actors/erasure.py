"""Erasure: events of forgotten entities as they are kept. Pure: from batches and records to such.

Of such an event the key becomes a token, the same one in every event of the entity, so that it goes on counting as one
in what is kept of other entities. Personal fields become tokens, too; what can be none (a float, a time) becomes null,
or zero. The event's time stays, and so does its id, unless it is personal: then another is made of it, each time the
same. Where the entity's own rows were is not told any more (`routes`), so that no replay makes them again.

Doing it again changes nothing: what has a token is not found any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.log.record import EventsRecord, OfferRecord
from millpond.feature_actors.source import Source
from millpond.feature_actors.tokens import token_of
from millpond.feature_actors.tombstones import Forgotten, Tombstone, Tombstones

__all__ = ["Erasure", "replaced_fields"]

Ints = npt.NDArray[np.int64]
R = TypeVar("R", bound=EventsRecord | OfferRecord)


def replaced_fields(source: Source | None, field: str) -> list[str]:
    """Return the fields that are replaced in events of an entity that is forgotten by a key field. source: None if it
    is not declared any more."""
    if source is None:
        return [field]
    own = [field] if field in source.fields else []
    return own + [n for n, f in source.fields.items() if f.personal and n not in (field, source.event_time)]


class Erasure:
    """What some tombstones say of events. sources: by name, those that are declared."""

    def __init__(self, tombstones: Tombstones, sources: Mapping[str, Source]) -> None:
        self._tombstones, self._sources = tombstones, sources

    def looks_at(self, source: str) -> set[str]:
        """Return the fields by which it is told what is forgotten."""
        declared = self._sources.get(source)
        return self._tombstones.fields | ({declared.event_time} if declared is not None else set())

    def forgotten(self, source: str, batch: pa.RecordBatch, arrivals: Ints, *, later: bool = False) -> list[Forgotten]:
        """Return which events of a batch, of any version of a source, are forgotten; later: which are of the same
        entities and came after. arrivals int64 [n]: stamps."""
        if not self._tombstones.fields.intersection(batch.schema.names):
            return []
        declared = self._sources.get(source)
        times = None if declared is None else batch.column(declared.event_time).view(pa.int64()).to_numpy()
        return self._tombstones.of(batch, arrivals, times, later=later)

    def batch(self, source: str, batch: pa.RecordBatch, forgotten: Sequence[Forgotten]) -> pa.RecordBatch:
        """Return a batch in which forgotten events show tokens."""
        declared = self._sources.get(source)
        for one in forgotten:
            columns = list(batch.columns)
            for name in replaced_fields(declared, one.tombstone.field):
                if name in batch.schema.names:
                    place = batch.schema.get_field_index(name)
                    is_id = declared is not None and name == declared.event_id and name != one.tombstone.field
                    columns[place] = _replaced(batch.schema.field(place), columns[place], one, is_id=is_id)
            batch = pa.RecordBatch.from_arrays(columns, schema=batch.schema)
        return batch

    def record(self, record: R, forgotten: Sequence[Forgotten]) -> R:
        """Return a record in which forgotten events show tokens, and do not go to tables that have them in their key;
        but for offers, which somebody may have taken: of those no entity is made either, for a token is no key."""
        routes = record.routes.copy()
        for one in forgotten:
            for number, key in enumerate(record.tables):
                if one.tombstone.field in key and isinstance(record, EventsRecord):
                    routes[one.rows] &= ~np.uint32(2 << number)
        return replace(record, routes=routes, batch=self.batch(record.source, record.batch, forgotten))


def _replaced(field: pa.Field, column: pa.Array, one: Forgotten, *, is_id: bool) -> pa.Array:
    kind, mask = field.type, pa.array(one.rows)
    if is_id:
        others = [_other_id(kind, value, one.tombstone) for value in column.filter(mask).to_pylist()]
        return pc.replace_with_mask(column, mask, pa.array(others, kind))
    token = token_of(kind, one.tombstone.token)
    if token is None and not field.nullable:
        token = False if pa.types.is_boolean(kind) else 0
    value = pa.scalar(token, pa.int64()).cast(kind) if pa.types.is_timestamp(kind) else pa.scalar(token, kind)
    there = pc.and_(mask, column.is_valid())  # what was null says nothing
    return pc.if_else(there, value, column)


def _other_id(kind: pa.DataType, value: Any, tombstone: Tombstone) -> Any:
    """Return what stands for an event id: events stay as many as they were."""
    key = f"{tombstone.token:08x}{tombstone.mark}".encode()
    digest = hashlib.blake2b(str(value).encode(), key=key, digest_size=8).digest()
    text = token_of(pa.string(), tombstone.token)
    return f"{text}-{digest.hex()}" if pa.types.is_string(kind) else int.from_bytes(digest, "little", signed=True)
