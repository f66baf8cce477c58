"""The score log: a sample of what was served, in the cluster's history. FORMAT.md says what lies where.

Promises: a file is there as a whole or not; a score that was written is read by every call after it, once. What was
read for it is there bit by bit, with how far the log had been applied to each row, so that it can be computed again.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millpond.feature_actors.keys import hash_keys
from millpond.feature_actors.log.folder import Folder, HistoryUnavailable
from millpond.feature_actors.log.part import DAY_MS, HistoryDamaged, day_of, day_text
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.structure import SEQUENCE_ROW_BITS
from millpond.models.erasures import ForgottenScores

__all__ = [
    "SCHEMA",
    "ScoreFiles",
    "Scorer",
    "erase_scores",
    "forgotten_scores",
    "read_scores",
    "scores_table",
]

Ints = npt.NDArray[np.int64]

#: Each time a file is replaced it is read and written as a whole, for a few scores where there are few in all.
_WRITES_MAX = 100

_ROW = pa.struct([("table", pa.string()), ("shard", pa.int32()), ("offset", pa.int64()), ("row", pa.int32())])
SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("id", pa.string()),
            ("served_ms", pa.int64()),
            ("as_of_ms", pa.int64()),
            ("model", pa.string()),
            ("version", pa.string()),
            ("digest", pa.string()),
            ("role", pa.string()),
            ("key", pa.string()),
            ("features", pa.list_(pa.float64())),
            ("texts", pa.string()),
            ("unknown", pa.list_(pa.string())),
            ("result", pa.string()),
            ("rows", pa.list_(_ROW)),
        )
    ]
)
_FOLDER = "_scores"
#: Features as they are, bit by bit: a dictionary would make one of all NaNs.
_BY_DICTIONARY = ["model", "version", "digest", "role", "unknown.list.element", "rows.list.element.table"]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True)
class Scorer:
    """Who served: a version, and what it was then (`champion`, `canary` or `shadow`)."""

    model: str
    version: str
    digest: str
    role: str


def forgotten_scores(scores: pa.Table, forgotten: Sequence[ForgottenScores]) -> npt.NDArray[np.bool_]:
    """Return which scores, in `SCHEMA`, are not to be there, bool [n]."""
    found = np.zeros(len(scores), np.bool_)
    keys = [_decode(text) for text in scores["key"].to_pylist()] if forgotten and len(scores) else []
    for field in {one.field for one in forgotten}:
        rows = np.array([i for i, key in enumerate(keys) if field in key], np.int64)
        for kind in (int, str):
            of = rows[[type(keys[i][field]) is kind for i in rows.tolist()]] if len(rows) else rows
            if not len(of):
                continue
            hashes = hash_keys([[keys[i][field] for i in of.tolist()]], len(of)).view(np.int64)
            as_of = scores["as_of_ms"].to_numpy()[of]
            for one in forgotten:
                if one.field == field:
                    found[of] |= (hashes == np.array(one.hash, np.int64)).all(axis=1) & (as_of <= one.as_of_ms)
    return found


def scores_table(
    scorer: Scorer,
    plan: ReadPlan,
    shard_map: ShardMap,
    ids: Sequence[str],
    served_ms: Sequence[int],
    keys: Mapping[str, Sequence[Any]],
    rows: FeatureRows,
    results: Sequence[Any],
) -> pa.Table:
    """Return n scores of one version in `SCHEMA`.

    plan: by which `rows` were read. ids: of the answers. keys: per key field n values.
    """
    n, parts = len(ids), plan.program.parts
    shards = np.stack([shard_map.shards_of(hash_keys([keys[f] for f in key], n)) for key in plan.program.keys])
    sequences = rows.trace[:, 1:]
    there = sequences >= 0
    read = pa.StructArray.from_arrays(
        [
            pa.array([table.name for table in plan.program.tables] * n, pa.string()),
            pa.array(shards[list(plan.program.key_of_part)].T.astype(np.int32).ravel()),
            pa.array(np.where(there, sequences >> SEQUENCE_ROW_BITS, -1).ravel()),
            pa.array(np.where(there, sequences & ((1 << SEQUENCE_ROW_BITS) - 1), -1).astype(np.int32).ravel()),
        ],
        fields=list(_ROW),
    )
    key_rows = zip(*keys.values(), strict=True)
    texts = zip(*rows.texts.values(), strict=True) if rows.texts else [()] * n
    columns = [
        pa.array(ids, pa.string()),
        pa.array(served_ms, pa.int64()),
        pa.array(rows.as_of, pa.int64()),
        *(pa.repeat(text, n) for text in (scorer.model, scorer.version, scorer.digest, scorer.role)),
        pa.array([_encode(dict(zip(keys, one, strict=True))).decode() for one in key_rows], pa.string()),
        _lists(pa.array(rows.matrix.ravel()), rows.matrix.shape[1], n),
        pa.array([_encode(dict(zip(rows.texts, one, strict=True))).decode() for one in texts], pa.string()),
        pa.array(rows.unknown, pa.list_(pa.string())),
        pa.array([_encode(result).decode() for result in results], pa.string()),
        _lists(read, parts, n),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _lists(values: pa.Array, width: int, n: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * width), values)


class ScoreFiles:
    """The files of one writer, below the base of a history.

    writer: its name, no other's. rows_max: scores after which a file is full. A file grows by being replaced, so that
    there are few of them however often something is written; but not more than `_WRITES_MAX` times.
    Methods raise `HistoryUnavailable`; what was to be written is not there then.
    """

    def __init__(self, base_uri: str, writer: str, rows_max: int) -> None:
        self.folder = Folder(base_uri)
        self._writer, self._rows_max = writer, rows_max
        self._number, self._day = -1, -1
        # As it was written, a tenth of what its rows would take: it is there all the time, and grows all the time.
        self._content, self._rows = b"", 0
        self._writes = 0

    def write(self, scores: pa.Table) -> None:
        """Write scores, synced."""
        days = scores["served_ms"].to_numpy() // DAY_MS
        for day in np.unique(days).tolist():
            of_day = scores.filter(pa.array(days == day))
            for start in range(0, len(of_day), self._rows_max):
                self._write(day, of_day.slice(start, self._rows_max))

    def _write(self, day: int, scores: pa.Table) -> None:
        begins = day != self._day or self._rows + len(scores) > self._rows_max or self._writes >= _WRITES_MAX
        number = self._number + begins
        grown = scores if begins else pa.concat_tables([self._open(), scores])
        content = _write_file(self.folder, self._path(day, number), grown)
        self._number, self._day, self._content, self._rows = number, day, content, len(grown)
        self._writes = 1 if begins else self._writes + 1

    def _open(self) -> pa.Table:
        """Return what is in the file that is being filled."""
        return _decoded(self._content).cast(SCHEMA) if self._rows else SCHEMA.empty_table()

    def _path(self, day: int, number: int) -> str:
        return f"{_FOLDER}/date={day_text(day)}/{self._writer}-{number:08d}.parquet"

    def erase(self, forgotten: Sequence[ForgottenScores]) -> int:
        """Take scores out of the file that is being filled, and of this writer's memory; return how many there were.
        The other files are for whoever calls `erase_scores`."""
        scores = self._open()
        gone = forgotten_scores(scores, forgotten)
        if gone.any():
            kept = scores.filter(pa.array(~gone))
            self._content = _write_file(self.folder, self._path(self._day, self._number), kept)
            self._rows = len(kept)
        return int(np.count_nonzero(gone))

    def delete_before(self, ms: int) -> list[str]:
        """Delete the dates that lie wholly before a time; return their folders. Any writer may do so."""
        before = ms // DAY_MS
        old = [path for day, path in _dates(self.folder) if day < before]
        for path in old:
            self.folder.delete(path)
        return old


def _write_file(folder: Folder, path: str, scores: pa.Table) -> bytes:
    """Write a file, and return what is in it."""
    content = io.BytesIO()
    pq.write_table(scores, content, compression="zstd", use_dictionary=_BY_DICTIONARY, write_page_checksum=True)
    content.seek(0)
    folder.write(path, content, "new")
    return content.getvalue()


def _decoded(content: bytes) -> pa.Table:
    # In this thread alone: one of Arrow's that still holds an object of Python when a process ends aborts it.
    with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False, page_checksum_verification=True) as file:
        return file.read(use_threads=False)


def erase_scores(base_uri: str, forgotten: Sequence[ForgottenScores], writers: Collection[str]) -> int:
    """Take scores out of all files, and remove what writers that have ended have left; return how many they were.

    writers: those that live, each of which has no such score in the file that it fills, nor will have: see
    `ScoreFiles.erase`. Raises `HistoryUnavailable`, `HistoryDamaged`.
    """
    folder, n = Folder(base_uri), 0
    for _, date in _dates(folder):
        for path in folder.files(date):
            name = path.rpartition("/")[2]
            if name.startswith("."):
                if name[1:].rpartition("-")[0] not in writers:
                    folder.delete(path)
            elif name.endswith(".parquet") and (scores := _scores(folder, path)) is not None:
                gone = forgotten_scores(scores, forgotten)
                if gone.any():
                    _write_file(folder, path, scores.filter(pa.array(~gone)))
                    n += int(np.count_nonzero(gone))
    return n


def read_scores(
    base_uri: str,
    *,
    model: str | None = None,
    version: str | None = None,
    since_ms: int | None = None,
    until_ms: int | None = None,
    newest_first: bool = False,
) -> Iterator[pa.Table]:
    """Yield logged scores, a file at a time, by date: those of a model, of a version, served in [since_ms, until_ms).

    Raises `HistoryUnavailable`, `HistoryDamaged`.
    """
    folder = Folder(base_uri)
    since, until = -(2**63) if since_ms is None else since_ms, 2**63 - 1 if until_ms is None else until_ms
    for day, date in sorted(_dates(folder), reverse=newest_first):
        if (day + 1) * DAY_MS <= since or day * DAY_MS >= until:
            continue
        for path in sorted(folder.files(date), reverse=newest_first):
            if path.endswith(".parquet") and not path.rpartition("/")[2].startswith("."):
                scores = _scores(folder, path)
                if scores is None:
                    continue
                # A mask, not an expression: that would be run by threads, and keep no order.
                served = scores["served_ms"]
                wanted = pc.and_(pc.greater_equal(served, since), pc.less(served, until))
                for name, text in (("model", model), ("version", version)):
                    if text is not None:
                        wanted = pc.and_(wanted, pc.equal(scores[name], text))
                if len(found := scores.filter(wanted)):
                    yield found


def _dates(folder: Folder) -> list[tuple[int, str]]:
    return [(day, path) for path in folder.folders(_FOLDER) if (day := day_of(path)) is not None]


def _scores(folder: Folder, path: str) -> pa.Table | None:
    """Return what is in a file, None if it has been deleted meanwhile."""
    try:
        content = folder.read(path)
    except HistoryUnavailable:
        if folder.exists(path):
            raise
        return None
    try:
        table = _decoded(content)
    except (OSError, pa.ArrowException) as error:
        text = str(error).partition("\n")[0][:300]
        raise HistoryDamaged(f"history: `{path}` cannot be read: {text}; restore it from a copy") from None
    # Whatever the names of the items of lists are.
    if table.schema.names != SCHEMA.names or any(
        not field.type.equals(SCHEMA.field(field.name).type) for field in table.schema
    ):
        raise HistoryDamaged(f"history: `{path}` is no file of a score log: its columns are others; remove it")
    return table.cast(SCHEMA)
