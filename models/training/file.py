"""The files of a training set: Parquet of labels in, the same with features beside out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.view import Feature
from millpond.models.training.labels import ROW
from millpond.models.training.runs import Room, Runs

__all__ = ["AS_OF", "METADATA", "UNKNOWN", "LabelFile", "TrainingSetFile"]

Ints = npt.NDArray[np.int64]

#: Columns beside the features: what they are as of, and the views that do not know the entity.
AS_OF, UNKNOWN = "features_as_of", "unknown"
#: The key of the schema's metadata.
METADATA = b"millpond"
#: So many rows are read at once, and written as a row group.
_ROWS = 65_536
_TIME = pa.timestamp("ms", "UTC")


class LabelFile:
    """A Parquet file of labels. Raises `BadRequest` if it cannot be read, as its methods do."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None
        self.schema: pa.Schema = self._file.schema_arrow
        self.rows: int = self._file.metadata.num_rows

    def __enter__(self) -> LabelFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows, of some columns in the order asked for, or of all."""
        try:
            for batch in self._file.iter_batches(_ROWS, columns=columns, use_threads=False):
                yield batch if columns is None else batch.select(columns)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> BadRequest:
        text = str(error).partition("\n")[0][:300]
        return BadRequest(f"training set: labels `{self._path}` cannot be read as Parquet: {text}")


class TrainingSetFile:
    """The file to be: `add` features in any order, then `write` them beside the labels.

    labels: the schema of the labels. Raises `BadRequest` if one of their columns has the name of one of ours.
    """

    def __init__(self, plan: ReadPlan, labels: pa.Schema, path: Path, room: Room) -> None:
        self._plan, self._labels, self._path = plan, labels, path
        self._schema = pa.schema(
            [
                pa.field(AS_OF, _TIME),
                *(field for feature in plan.features for field in _fields_of(feature)),
                pa.field(UNKNOWN, pa.list_(pa.string())),
            ]
        )
        for name in self._schema.names:
            if name in labels.names:
                raise BadRequest(f"training set: labels have a column `{name}` already; leave it out or rename it")
            if self._schema.names.count(name) > 1:
                raise BadRequest(f"training set: feature `{name}` is asked for twice; a file has one column of a name")
        self._features = Runs(self._schema.append(pa.field(ROW, pa.int64())), ROW, room)

    def add(self, rows: Ints, features: FeatureRows) -> None:
        """Add the features of some labels; rows int64 [n]: their places among all."""
        columns = [pa.array(features.as_of, _TIME)]
        for name in self._schema.names[1:-1]:
            if name in features.texts:
                columns.append(pa.array(features.texts[name], self._schema.field(name).type))
            else:
                columns.append(pa.array(np.ascontiguousarray(features.matrix[:, self._plan.names.index(name)])))
        columns += [pa.array(features.unknown, pa.list_(pa.string())), pa.array(rows)]
        self._features.add(pa.RecordBatch.from_arrays(columns, schema=self._features.schema))

    def write(self, labels: LabelFile, about: Mapping[str, Any]) -> Iterator[int]:
        """Write the file, which replaces what has its name; yield how many rows are written on the way.

        about: JSON, goes into its metadata.
        """
        metadata = {**(self._labels.metadata or {}), METADATA: json.dumps(about)}
        schema = pa.schema([*self._labels, *self._schema], metadata)
        beside: Path | None = None
        try:
            # A name that nobody else writes to, mode 0600; a number of a process may be that of another container's.
            number, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.absolute().parent)
            beside = Path(name)
            with os.fdopen(number, "wb") as content:
                with pq.ParquetWriter(content, schema, compression="zstd", compression_level=1) as writer:
                    done = 0
                    for batch in labels.batches():
                        done += batch.num_rows
                        features = self._features.take_until(done).select(self._schema.names)
                        columns = [*batch.columns, *features.columns]
                        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema), row_group_size=_ROWS)
                        yield done
                content.flush()
                os.fsync(content.fileno())
            beside.rename(self._path)
        except OSError as error:
            raise BadRequest(f"training set: `{self._path}` cannot be written: {error.strerror or error}") from None
        finally:
            if beside is not None:
                beside.unlink(missing_ok=True)


def _fields_of(feature: Feature) -> Iterator[pa.Field]:
    """Yield the columns of a feature: one for each place of numbers, one for its strings."""
    name = feature.full_name
    if feature.is_text:
        yield pa.field(name, pa.string() if feature.width == 1 else pa.list_(pa.string()))
    elif feature.width == 1:
        yield pa.field(name, pa.float64())
    else:
        for place in range(feature.width):
            yield pa.field(f"{name}[{place}]", pa.float64())
