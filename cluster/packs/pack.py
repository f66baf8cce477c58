"""A pack: a folder with events of a cluster in one order, its definitions and its live models, as FORMAT.md has it.

Promises: a pack that opens is whole, each byte of it as it was written; nothing of it has been run or unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from millpond.feature_actors.decode import ARRIVAL_COLUMN
from millpond.feature_actors.errors import MillpondError

__all__ = ["FORMAT_VERSION", "MANIFEST", "PLACE", "WINDOW_EVENTS", "Pack", "PackDamaged", "PackManifest", "PackModel",
           "PackSource", "checksum_of", "sha256_of"]  # fmt: skip

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
#: Beside the fields of an event: which one of the pack it is.
PLACE = "_place"
#: A window has so many events at most: who reads a pack has one in memory.
WINDOW_EVENTS = 1 << 16
_BLOCK_BYTES = 1 << 20


class PackDamaged(MillpondError):
    """A file of a pack is not what was written, or is missing."""

    code, status = "pack_damaged", 500


class PackSource(msgspec.Struct, frozen=True):
    """Of a source: the file of its events, and how many they are."""

    file: str
    events: int


class PackModel(msgspec.Struct, frozen=True):
    """A version that was live: as what, and the file of its definition, beside which its artifacts lie."""

    model: str
    version: str
    role: Literal["champion", "canary", "shadow"]
    share: float
    definition: str


class PackManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a pack holds.

    changed_features: those that read a masked or dropped field. left_out: sources of which no event is in it.
    disputed: events whose order two shards did not agree on. windows: before which place each window of events ends.
    ttl_ms_min: the shortest ttl of a feature. definitions: files of the cluster. files: path to size and SHA-256 of
    each file but the manifest.
    """

    format: int
    id: str
    made_at: str
    cluster: str
    since_ms: int | None
    until_ms: int | None
    entities: dict[str, Any] | None
    masked: list[str]
    dropped: list[str]
    changed_features: list[str]
    left_out: list[str]
    events: int
    disputed: int
    windows: list[int]
    ttl_ms_min: Annotated[int, msgspec.Meta(ge=1)] | None
    sources: dict[str, PackSource]
    definitions: list[str]
    models: list[PackModel]
    files: dict[str, tuple[int, str]]


class Pack:
    """Open a pack, each file compared with its checksum. Raises `PackDamaged` that names the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = self._read_manifest()
        named = [*(s.file for s in self.manifest.sources.values()), *self.manifest.definitions]
        for name in (*named, *(model.definition for model in self.manifest.models)):
            if name not in self.manifest.files:
                raise PackDamaged(f"pack: the manifest names `{name}`, of which it has no checksum; do not use it")
        for name, (size, sha256) in self.manifest.files.items():
            self._check(name, size, sha256)

    def _read_manifest(self) -> PackManifest:
        path = self.folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            checksum = content.pop("checksum", None) if isinstance(content, dict) else None
            if checksum is None:
                raise ValueError("it is none of a pack")
            if content.get("format") != FORMAT_VERSION:
                raise PackDamaged(
                    f"pack: `{path}` has format {content.get('format')!r}; this version reads {FORMAT_VERSION}; use "
                    "the version that wrote it"
                )
            if checksum_of(content) != checksum:
                raise ValueError("it fails its checksum")
            return msgspec.convert(content, PackManifest)
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise PackDamaged(f"pack: `{path}` cannot be read: {why}; export it again, or copy it again") from None

    def _check(self, name: str, size: int, sha256: str) -> None:
        path = self.folder / name
        try:
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise PackDamaged(f"pack: the manifest names `{name}`, which does not lie in it; do not use it")
            found = path.stat().st_size
            if found != size:
                raise PackDamaged(f"pack: `{path}` has {found} bytes, {size} were written; copy it again")
            if sha256_of(path) != sha256:
                raise PackDamaged(f"pack: `{path}` fails its checksum; copy it again")
        except OSError as error:
            raise PackDamaged(f"pack: `{path}` cannot be read: {error.strerror}; copy it again") from None

    def windows(self) -> Iterator[dict[str, pa.Table]]:
        """Yield the events, window by window: of each source with events there a table of its fields, `PLACE` and
        `ARRIVAL_COLUMN`, in the order of the pack. Raises `PackDamaged` if the files are not as the manifest has it."""
        readers = {name: _row_groups(self.folder / source.file) for name, source in self.manifest.sources.items()}
        heads = {name: head for name, groups in readers.items() if (head := next(groups, None)) is not None}
        begin = 0
        for end in self.manifest.windows:
            window = {name: table for name, table in heads.items() if table[PLACE][0].as_py() < end}
            if not window or sum(map(len, window.values())) != end - begin:
                raise self._not_windows(begin, end)
            for name in window:
                after = next(readers[name], None)
                if after is None:
                    del heads[name]
                else:
                    heads[name] = after
            yield window
            begin = end
        if heads or begin != self.manifest.events:
            raise self._not_windows(begin, self.manifest.events)

    def _not_windows(self, begin: int, end: int) -> PackDamaged:
        return PackDamaged(
            f"pack: `{self.folder}`: its events from {begin} to {end} are no row group of each source; do not use it"
        )


def _row_groups(path: Path) -> Iterator[pa.Table]:
    """Yield the row groups of a file of events, none of them empty. What has its checksum may still be none."""
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            own = [schema.field(name).type for name in (PLACE, ARRIVAL_COLUMN) if name in schema.names]
            if own != [pa.int64(), pa.int64()]:
                raise pa.ArrowInvalid(f"there are no two columns `{PLACE}` and `{ARRIVAL_COLUMN}` of int64")
            for number in range(file.num_row_groups):
                if not 0 < metadata.row_group(number).num_rows <= WINDOW_EVENTS:
                    raise pa.ArrowInvalid(f"row group {number} has {metadata.row_group(number).num_rows} events")
                table = file.read_row_group(number)
                if table[PLACE].null_count or table[ARRIVAL_COLUMN].null_count:
                    raise pa.ArrowInvalid(f"row group {number} has events without place or stamp")
                yield table
    except (OSError, pa.ArrowException) as error:
        text = str(error).partition("\n")[0][:300]
        raise PackDamaged(f"pack: `{path}` has no events of a pack: {text}; do not use it") from None


def checksum_of(content: dict[str, Any]) -> str:
    """Return the checksum of a manifest, without its own."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
