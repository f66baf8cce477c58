"""A sample of entities, of whose events a pack is made: the rows of a CSV file, whose columns are key fields."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pcsv

from millpond.feature_actors.errors import BadRequest, did_you_mean
from millpond.feature_actors.keys import Hashes, hash_columns
from millpond.feature_actors.routes import key_validity
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import KEY_TYPES

__all__ = ["Sample"]


@dataclass(frozen=True)
class Sample:
    """fields: the columns. size: distinct entities. hashes uint64 [size, 2] of them, ascending by the first half."""

    fields: tuple[str, ...]
    size: int
    hashes: Hashes

    @classmethod
    def read(cls, path: Path, sources: Iterable[Source]) -> Sample:
        """Read a CSV file with a head of key fields of `sources`. Raises `BadRequest` that says what does not fit."""
        sources = list(sources)
        fields = {name: field for source in sources for name, field in source.fields.items() if field.type in KEY_TYPES}
        types = {n: pa.string() if field.type == "string" else pa.int64() for n, field in fields.items()}
        options = pcsv.ConvertOptions(column_types=types, strings_can_be_null=False)
        try:
            table = pcsv.read_csv(path, convert_options=options)
        except (OSError, pa.ArrowException) as error:
            raise BadRequest(f"entities: `{path}` cannot be read: {str(error).splitlines()[0]}") from None
        head = table.column_names
        for name in head:
            if name not in types:
                shown = f"entities: `{path}`: column `{name[:80]}` is no field that can be in a key"
                raise BadRequest(shown + did_you_mean(name[:80], types))
            if head.count(name) > 1:
                raise BadRequest(f"entities: `{path}`: column `{name}` comes twice")
        if not any(set(head) <= source.fields.keys() for source in sources):
            raise BadRequest(f"entities: `{path}` has the columns {head}; no source has all of these fields")
        if not len(table):
            raise BadRequest(f"entities: `{path}` names no entity")
        arrays = [column.combine_chunks() for column in table.columns]
        if not key_validity(arrays, len(table)).all():
            raise BadRequest(f"entities: `{path}` has a row without a value")
        hashes = np.unique(hash_columns(arrays, len(table)), axis=0)
        return cls(tuple(head), len(hashes), hashes)

    def concerns(self, source: Source) -> bool:
        """Return whether events of a source can be of an entity of the sample."""
        return set(self.fields) <= source.fields.keys()

    def rows(self, source: Source, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """Return which events are of an entity of the sample, bool [n]."""
        n = batch.num_rows
        if not self.concerns(source):
            return np.zeros(n, np.bool_)
        columns = [batch.column(name) for name in self.fields]
        hashes = hash_columns(columns, n)
        places = np.minimum(np.searchsorted(self.hashes[:, 0], hashes[:, 0]), self.size - 1)
        found: npt.NDArray[np.bool_] = (self.hashes[places] == hashes).all(axis=1)
        return found & key_validity(columns, n)
