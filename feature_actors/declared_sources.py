"""The sources that a data directory has events of, as they were declared last: `sources.json`.

Records stay readable as long as their source changes only in ways that older records can be read by: fields are added
that may be lacking, or may be lacking from now on. Anything else is a new source. Owner, about and retention are no
part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

import msgspec
import pyarrow as pa

from millpond.feature_actors.errors import DeclarationError, NotFound, did_you_mean
from millpond.feature_actors.manifest import ManifestError, write_json
from millpond.feature_actors.source import FIELD_TYPES, Field, Source

__all__ = ["DeclaredField", "DeclaredSource", "DeclaredSources"]

FORMAT_VERSION = 1

logger = logging.getLogger("millpond.sources")


class DeclaredField(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A field; `type` is the first of its names in `FIELD_TYPES`, `default` as older records are read by it."""

    type: str
    optional: bool
    default: str | int | float | bool | None
    personal: bool

    @classmethod
    def of(cls, field: Field) -> DeclaredField:
        name = next(name for name, arrow_type in FIELD_TYPES.items() if arrow_type == field.arrow_type)
        # That of a float may be declared as an integer, that of a time as a number.
        default = pa.scalar(field.default, field.arrow_type).as_py()
        if isinstance(default, datetime):
            default = default.isoformat()
        return cls(name, field.optional, default, field.personal)

    @property
    def may_lack(self) -> bool:
        return self.optional or self.default is not None


class DeclaredSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a declaration its records were written by."""

    version: int
    event_id: str | None
    event_time: str
    fields: dict[str, DeclaredField]

    @classmethod
    def of(cls, source: Source) -> DeclaredSource:
        fields = {name: DeclaredField.of(field) for name, field in source.fields.items()}
        return cls(source.version, source.event_id, source.event_time, fields)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    sources: dict[str, DeclaredSource]


class DeclaredSources:
    """Read `sources.json` of a data directory, where it is there.

    Raises `ManifestError` if it is damaged, or of a later format.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "sources.json"
        self.sources: Mapping[str, DeclaredSource] = {}
        if self._path.exists():
            self.sources = self._read()

    def _read(self) -> Mapping[str, DeclaredSource]:
        try:
            content = msgspec.json.decode(self._path.read_bytes())
            if isinstance(content, dict) and content.get("format") not in (None, FORMAT_VERSION):
                raise ManifestError(
                    f"data directory: `{self._path}` has format {content['format']!r}; this version reads "
                    f"{FORMAT_VERSION}; start the version that wrote it"
                )
            return msgspec.convert(content, _File).sources
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ManifestError(
                f"data directory: `{self._path}` cannot be read: {error}; restore it from a copy"
            ) from None

    def check(self, sources: Iterable[Source]) -> dict[str, DeclaredSource]:
        """Return what is to be kept of these declarations and of those before.

        Raises `DeclarationError` for the first that old records could not be read by, or whose version does not say
        that it has changed.
        """
        kept = dict(self.sources)
        declared = {source.name: DeclaredSource.of(source) for source in sources}
        for name, after in declared.items():
            if name in kept:
                _check_change(name, kept[name], after)
        for name in sorted(kept.keys() - declared.keys()):
            logger.warning(
                "source `%s` is not declared any more; its events stay, and are read again when it is declared", name
            )
        return kept | declared

    def check_readable(self, sources: Iterable[Source]) -> None:
        """Raise unless the events of these sources that the directory has can be read as they are declared here.

        Raises `DeclarationError`, and `NotFound` for a source that it has never had.
        """
        for source in sources:
            if source.name in self.sources:
                _check_change(source.name, self.sources[source.name], DeclaredSource.of(source))
            elif self.sources:
                raise NotFound(
                    f"source `{source.name}` is not of the cluster in `{self._path.parent}`"
                    + did_you_mean(source.name, self.sources)
                )

    def keep(self, sources: Mapping[str, DeclaredSource]) -> None:
        """Write down what `check` has returned."""
        if sources != self.sources:
            write_json(self._path, msgspec.to_builtins(_File(FORMAT_VERSION, dict(sources))))
            self.sources = sources


def _check_change(name: str, before: DeclaredSource, after: DeclaredSource) -> None:
    """Raise unless records written by `before` can be read by `after`, and the versions say so."""
    subject = f"source `{name}`"
    for role in ("event_id", "event_time"):
        old, new = getattr(before, role), getattr(after, role)
        if old != new:
            raise DeclarationError(f"{subject}: {role} was {_shown(old)} and is {_shown(new)}; {_NEW_SOURCE}")
    for field, old_field in before.fields.items():
        if field not in after.fields:
            raise DeclarationError(f"{subject}: field `{field}` was removed; {_NEW_SOURCE}")
        _check_field(f"{subject}: field `{field}`", old_field, after.fields[field])
    for field in after.fields:
        if field not in before.fields and not after.fields[field].may_lack:
            raise DeclarationError(
                f"{subject}: field `{field}` was added, and older events lack it; make it optional, give it a default, "
                "or give the source another name"
            )
    if after.version < before.version:
        raise DeclarationError(
            f"{subject}: version was {before.version} and is {after.version}; a version is never lowered: declare "
            f"{before.version} or more, or give the source another name"
        )
    if after.version == before.version and after.fields != before.fields:
        changed = [f for f in after.fields if after.fields[f] != before.fields.get(f)]
        raise DeclarationError(
            f"{subject}: field `{changed[0]}` {'was added' if changed[0] not in before.fields else 'has changed'}, and "
            f"version is {after.version} still; declare the source with `version={before.version + 1}`"
        )


def _check_field(subject: str, before: DeclaredField, after: DeclaredField) -> None:
    if after.type != before.type:
        raise DeclarationError(f"{subject} was `{before.type}` and is `{after.type}`; {_NEW_SOURCE}")
    if before.optional and not after.optional:
        raise DeclarationError(f"{subject} was optional and is not, and older events may lack it; {_NEW_SOURCE}")
    # Older events that lack the field are read by its default, whenever they are read.
    if before.may_lack and after.default != before.default:
        raise DeclarationError(
            f"{subject} had the default {before.default!r} and has {after.default!r}, and older events that lack it "
            f"would be read otherwise; {_NEW_SOURCE}"
        )


_NEW_SOURCE = "that is a new source: give it another name"


def _shown(field: str | None) -> str:
    return "none" if field is None else f"`{field}`"
