"""`millpond export`: a pack of a cluster, running or stopped. What is there goes on; nothing of it is changed.

1. what may leave: every personal field is masked or dropped, or was allowed to go as it is
2. the events, in one order (`event_order`), a window at a time: masked, written, forgotten
3. the definitions, and the contents of the live versions from the registry
4. the manifest, with checksums; then the folder gets its name
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from millpond.cluster.packs.masking import Mask, can_mask
from millpond.cluster.packs.pack import (
    FORMAT_VERSION,
    MANIFEST,
    PLACE,
    WINDOW_EVENTS,
    PackManifest,
    PackModel,
    PackSource,
    checksum_of,
    sha256_of,
)
from millpond.cluster.packs.sample import Sample
from millpond.feature_actors.aggregations import Derived
from millpond.feature_actors.decode import ARRIVAL_COLUMN
from millpond.feature_actors.errors import BadRequest, did_you_mean
from millpond.feature_actors.event_order import EventOrder, Run
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.past import Past
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import FeatureView
from millpond.models.definition import Definition
from millpond.models.registry import Registry

__all__ = ["What", "export_pack"]

#: A window ends when it has so many bytes of events.
_WINDOW_BYTES = 64 << 20


@dataclass(frozen=True)
class What:
    """What is to be in a pack: events that arrived in [since_ms, until_ms), of the entities of a CSV file.

    mask, drop: names of fields, of whatever sources have them. mask_key: by which values are masked; another each time
    if it is empty. allow_personal: personal fields may leave as they are.
    """

    since_ms: int | None = None
    until_ms: int | None = None
    entities: Path | None = None
    mask: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    mask_key: bytes = b""
    allow_personal: bool = False


def export_pack(
    past: Past,
    definitions: Sequence[Definition],
    registry: Registry | None,
    folder: Path,
    what: What = What(),
    progress: Callable[[int], None] = lambda events: None,
) -> PackManifest:
    """Write a pack to `folder`, which must not exist, and return its manifest.

    registry: of which the live versions are taken. progress: told of how many events have been written.
    Raises `BadRequest` and `DeclarationError` for what is not to be had, and what `Past.records` does; then there is no
    such folder.
    """
    declared = [definition.declared() for definition in definitions]
    layout = compile_layout([s for d in declared for s in d.sources], [v for d in declared for v in d.views])
    sources = layout.sources
    views = [*layout.views.values(), *_deployed_views(registry)]
    _check_fields(sources.values(), what)
    sample = None if what.entities is None else Sample.read(what.entities, sources.values())
    if folder.exists():
        raise BadRequest(f"export: `{folder}` is there already; name a folder that is not")
    beside: Path | None = None
    try:
        folder.absolute().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A name that nobody else writes to, mode 0700; a number of a process may be that of another container's.
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        order = EventOrder(past, sources, what.since_ms, what.until_ms, None if sample is None else sample.rows)
        left_out = (
            set() if sample is None else {name for name, source in sources.items() if not sample.concerns(source)}
        )
        with _EventFiles(beside, sources.values(), what) as files:
            for run in order.runs():
                files.add(run, progress)
            files.end_window(progress)
        contents = _Contents(beside)
        cluster_files = [contents.add("definitions", _with_artifacts(one, registry)) for one in definitions]
        models = list(_live_models(registry, contents))
        manifest = PackManifest(
            format=FORMAT_VERSION,
            id=secrets.token_hex(16),
            made_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            cluster=past.manifest.cluster_name,
            since_ms=what.since_ms,
            until_ms=what.until_ms,
            entities=None if sample is None else {"fields": list(sample.fields), "size": sample.size},
            masked=sorted(what.mask),
            dropped=sorted(what.drop),
            changed_features=sorted({*_changed(views, {*what.mask, *what.drop})}),
            left_out=sorted(left_out | order.undeclared),
            events=files.events,
            disputed=order.disputed,
            windows=files.windows,
            ttl_ms_min=min((a.ttl_ms for a in _kept(views) if a.ttl_ms is not None), default=None),
            sources=files.sources(),
            definitions=cluster_files,
            models=models,
            files={str(p.relative_to(beside)): (p.stat().st_size, sha256_of(p)) for p in _files(beside)},
        )
        content = msgspec.to_builtins(manifest)
        _write(beside / MANIFEST, json.dumps({**content, "checksum": checksum_of(content)}, indent=1).encode())
        beside.rename(folder)
    except OSError as error:
        raise BadRequest(f"export: `{folder}` cannot be written: {error.strerror}") from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
    return manifest


# -- what may leave


def _check_fields(sources: Iterable[Source], what: What) -> None:
    """Raise `BadRequest` for what contradicts itself, and unless every personal field is masked or dropped, and can
    be."""
    if what.since_ms is not None and what.until_ms is not None and what.since_ms >= what.until_ms:
        raise BadRequest("export: `since` is not before `until`; nothing can have arrived then")
    if both := sorted({*what.mask} & {*what.drop}):
        raise BadRequest(f"export: field `{both[0]}` is to be masked and to be dropped; say one of the two")
    fields: dict[str, list[tuple[Source, Any]]] = {}
    for source in sources:
        for name, spec in source.fields.items():
            fields.setdefault(name, []).append((source, spec))
    for name in (*what.mask, *what.drop):
        if name not in fields:
            raise BadRequest(f"export: no source has a field `{name}`" + did_you_mean(name, fields))
    for name in what.mask:
        types = {spec.arrow_type: source.name for source, spec in fields[name]}
        if len(types) > 1:
            shown = " and ".join(f"`{kind}` in `{of}`" for kind, of in types.items())
            raise BadRequest(f"export: field `{name}` is {shown}: their masks would not be the same; drop it")
        for kind, of in types.items():
            if not can_mask(kind):
                raise BadRequest(
                    f"export: field `{name}` of `{of}` is `{kind}`; masks are of integers and strings; drop it"
                )
    for name in what.drop:
        for source, spec in fields[name]:
            if name in (source.event_time, source.event_id) or (not spec.optional and spec.default is None):
                raise BadRequest(
                    f"export: field `{name}` of `{source.name}` can be neither null nor a default, so it cannot be "
                    "dropped; mask it"
                )
    left = sorted(
        f"`{source.name}.{name}`"
        for name, declared in fields.items()
        for source, spec in declared
        if spec.personal and name not in (*what.mask, *what.drop)
    )
    if left and not what.allow_personal:
        raise BadRequest(
            f"export: {', '.join(left)} are personal; mask them (--mask), drop them (--drop), or let them leave as "
            "they are (--allow-personal)"
        )


def _kept(views: Iterable[FeatureView]) -> Iterator[Any]:
    return (a for view in views for a in view.features.values() if not isinstance(a, Derived))


def _changed(views: Iterable[FeatureView], fields: set[str]) -> Iterator[str]:
    """Yield the features that read one of some fields: their values are others in the pack."""
    for view in views:
        names: set[str] = set()
        for feature in view:
            if feature.derived is not None:
                reads = not names.isdisjoint(feature.derived.of)
            else:
                reads = not fields.isdisjoint(feature.reads)
            if reads:
                names.add(feature.name)
                yield feature.full_name


# -- events


class _EventFiles:
    """The files of events that are being written: a window is gathered, then goes to them, a row group in each."""

    def __init__(self, folder: Path, sources: Iterable[Source], what: What) -> None:
        self._sources = {source.name: source for source in sources}
        self._mask = Mask(what.mask_key or secrets.token_bytes(32))
        self._masked, self._dropped = set(what.mask), set(what.drop)
        self._stack = ExitStack()
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._counts = dict.fromkeys(self._sources, 0)
        self._gathered: dict[str, _Gathered] = {}
        self._bytes = 0
        self.events = 0
        self.windows: list[int] = []
        (folder / "events").mkdir(mode=0o700)
        for source in self._sources.values():
            file = self._stack.enter_context(_opened(folder / _file_of(source)))
            schema = pa.schema([*source.schema, pa.field(PLACE, pa.int64()), pa.field(ARRIVAL_COLUMN, pa.int64())])
            writer = pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)
            self._writers[source.name] = self._stack.enter_context(writer)

    def __enter__(self) -> _EventFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, run: Run, progress: Callable[[int], None]) -> None:
        start = 0
        while start < len(run.rows):
            room = WINDOW_EVENTS - (self.events - (self.windows[-1] if self.windows else 0))
            end = min(len(run.rows), start + room)
            gathered = self._gathered.setdefault(run.source, _Gathered())
            self._bytes += gathered.add(run.batch, run.rows[start:end], run.arrivals[start:end], self.events)
            self.events += end - start
            if end - start == room or self._bytes >= _WINDOW_BYTES:
                self.end_window(progress)
            start = end

    def end_window(self, progress: Callable[[int], None]) -> None:
        for name, gathered in self._gathered.items():
            table = self._left_out(self._sources[name], gathered.table())
            self._writers[name].write_table(table, row_group_size=len(table))
            self._counts[name] += len(table)
        if self._gathered:
            self.windows.append(self.events)
        self._gathered, self._bytes = {}, 0
        progress(self.events)

    def _left_out(self, source: Source, table: pa.Table) -> pa.Table:
        """Return the events as they may leave."""
        for place, (name, spec) in enumerate(source.fields.items()):
            column = None
            if name in self._masked:
                column = self._mask.column(table[name].combine_chunks())
            elif name in self._dropped:
                column = pa.repeat(pa.scalar(spec.default, spec.arrow_type), len(table))
            if column is not None:
                table = table.set_column(place, table.schema.field(name), column)
        return table

    def sources(self) -> dict[str, PackSource]:
        return {name: PackSource(_file_of(source), self._counts[name]) for name, source in self._sources.items()}


@dataclass
class _Gathered:
    """Events of one source in a window: of which batches, which of their rows, and what they have beside."""

    batches: list[pa.RecordBatch] = field(default_factory=list)
    begins: dict[int, int] = field(default_factory=dict)
    end: int = 0
    rows: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    arrivals: list[int] = field(default_factory=list)

    def add(self, batch: pa.RecordBatch, rows: list[int], arrivals: list[int], place: int) -> int:
        """Add rows of a batch; return how many bytes more are held."""
        begin, more = self.begins.get(id(batch)), 0
        if begin is None:
            begin = self.begins[id(batch)] = self.end
            self.batches.append(batch)
            self.end += batch.num_rows
            more = batch.nbytes
        self.rows += [begin + row for row in rows]
        self.places += range(place, place + len(rows))
        self.arrivals += arrivals
        return more

    def table(self) -> pa.Table:
        table = pa.Table.from_batches([pa.concat_batches(self.batches).take(pa.array(self.rows))])
        table = table.append_column(pa.field(PLACE, pa.int64()), pa.array(self.places))
        return table.append_column(pa.field(ARRIVAL_COLUMN, pa.int64()), pa.array(self.arrivals))


def _file_of(source: Source) -> str:
    return f"events/{source.name}.parquet"


# -- definitions and models


class _Contents:
    """The contents of definitions in a pack: a folder for each, with the file and its artifacts beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[str, str] = {}

    def add(self, kind: str, definition: Definition) -> str:
        """Write a content, unless it is there of another kind, and return where its file lies."""
        path = self._paths.get(definition.digest)
        if path is None:
            path = self._paths[definition.digest] = f"{kind}/{definition.digest[:12]}/{definition.file_name}"
            folder = (self._folder / path).parent
            for one in (folder.parent, folder):
                one.mkdir(mode=0o700, exist_ok=True)
            _write(self._folder / path, definition.text.encode())
            for name, content in definition.artifacts.items():
                _write(folder / name, content)
        return path


def _with_artifacts(definition: Definition, registry: Registry | None) -> Definition:
    """Return a definition with the artifacts that the registry has of the newest content with this text."""
    if definition.artifacts or registry is None:
        return definition
    for model in definition.declared().models:
        if model.artifacts and model.name in registry.models():
            for version in reversed(registry.versions(model.name)):
                if registry.state_of(version) != "retired":
                    known = registry.definition(version)
                    if known.text == definition.text:
                        return Definition(definition.file_name, known.text, known.artifacts)
    return definition


def _deployed_views(registry: Registry | None) -> list[FeatureView]:
    """Return the views that definitions of live versions declare: some may have come while the cluster ran."""
    if registry is None:
        return []
    versions = {version.digest: version for rollout in registry.rollouts().values() for version in rollout.versions}
    return [view for one in versions.values() for view in registry.definition(one).declared().views]


def _live_models(registry: Registry | None, contents: _Contents) -> Iterator[PackModel]:
    for rollout in [] if registry is None else registry.rollouts().values():
        for role, version in (("champion", rollout.champion), ("canary", rollout.canary), ("shadow", rollout.shadow)):
            if version is not None:
                assert registry is not None
                share = rollout.share if role == "canary" else 0.0
                path = contents.add("models", registry.definition(version))
                yield PackModel(version.model, version.version, role, share, path)  # type: ignore[arg-type]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _opened(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _write(path: Path, content: bytes) -> None:
    with _opened(path) as file:
        file.write(content)
