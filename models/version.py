"""A version: what one content of a definition says of one of its models. It is never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from millpond.models.definition import Definition
from millpond.models.model import Model
from millpond.models.pool import Pool

__all__ = ["Version", "version_of"]

_DIGITS = 12


@dataclass(frozen=True)
class Version:
    """One version of one model.

    digest: of the content, see `Definition.digest`. The models of one definition have it in common, so that
        their files are kept once; adding a model to a file is another content for all of its models.
    file_name: what the file of the definition was called. created: ISO 8601, UTC.
    key_fields: name to type, `int64` or `string`: the id that a request carries. features: full names, `view.feature`.
    memory_bytes, predict_us: what one copy takes, and one call for a single id, as measured when it was checked.
    pool: what its declaration asks for. files: path in its folder to SHA-256 in hex digits.
    """

    model: str
    version: str
    digest: str
    file_name: str
    owner: str
    about: str
    created: str
    key_fields: dict[str, str]
    features: tuple[str, ...]
    memory_bytes: int
    predict_us: float
    pool: Pool | None
    files: dict[str, str]

    @property
    def subject(self) -> str:
        return f"model `{self.model}` version `{self.version}`"


def version_of(
    definition: Definition,
    model: Model,
    key_fields: Mapping[str, str],
    *,
    memory_bytes: int = 0,
    predict_us: float = 0.0,
    created: datetime | None = None,
) -> Version:
    """Return the version that a definition makes of one of its models.

    A model that names no version is called after its content, by the first 12 hex digits of the digest.
    key_fields: of the plan that the model compiles to. created: now, if it is not said.
    """
    name = model.version or definition.digest[:_DIGITS]
    time = (created or datetime.now(UTC)).astimezone(UTC)
    return Version(
        model=model.name,
        version=name,
        digest=definition.digest,
        file_name=definition.file_name,
        owner=model.owner,
        about=model.about,
        created=f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1_000:03}Z",
        key_fields=dict(key_fields),
        features=tuple(f.full_name for f in model.features),
        memory_bytes=memory_bytes,
        predict_us=predict_us,
        pool=model.pool,
        files=definition.hashes,
    )
