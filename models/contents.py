"""The contents of versions: a folder for each, named by its digest, and never changed.

It is written beside, synced and renamed into place, so what has its name is whole; its files are read-only. Whoever
calls `add` or `sweep` holds the registry's lock. What is read is compared with the hashes that the index has.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Set
from pathlib import Path

from millpond.feature_actors.errors import DeclarationError, MillpondError, Unavailable
from millpond.models.definition import ARTIFACTS_DIR, Definition, digest_of
from millpond.models.version import Version

__all__ = ["Contents", "VersionDamaged"]

#: Contents, and what is on its way to become one, or to go.
_OURS = re.compile(r"[0-9a-f]{64}|\.(new|old)-[0-9a-f]{64}")


class VersionDamaged(MillpondError):
    """A file of a version is not what was added: restore it, or add the same content again."""

    code, status = "version_damaged", 500


class Contents:
    """The contents in a folder, which is made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)

    def artifacts_dir(self, digest: str) -> Path:
        """Return where the artifacts of a content lie, by their names; if it has any."""
        return self._folder / digest / ARTIFACTS_DIR

    def add(self, definition: Definition) -> bool:
        """Put a content in its place and sync it, also instead of a damaged one; return whether there was none.

        Raises `Unavailable` if it cannot be written, `DeclarationError` if an artifact has no name for a file.
        """
        for name in definition.artifacts:
            if not _is_file_name(name):
                raise DeclarationError(f"definition `{definition.file_name}`: artifact {name!r} is no file name")
        files, place = definition.files, self._folder / definition.digest
        if all(_content(place / path) == content for path, content in files.items()):
            return False
        new, old = (self._folder / f".{what}-{definition.digest}" for what in ("new", "old"))
        try:
            new.mkdir(mode=0o700)
            for folder in {(new / path).parent for path in files} - {new}:
                folder.mkdir(mode=0o700)
            for path, content in files.items():
                _write(new / path, content)
            for folder in {(new / path).parent for path in files} | {new}:
                _sync(folder)
            if place.exists():
                place.rename(old)
            new.rename(place)
            _sync(self._folder)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise Unavailable(
                f"registry: `{self._folder}` cannot be written: {error.strerror}; nothing has been changed; mend that "
                "and try again",
                retry_after_ms=10_000,
            ) from None
        return True

    def read(self, version: Version) -> Definition:
        """Return the content of a version, each file compared with its hash. Raises `VersionDamaged`."""
        place = self._folder / version.digest
        if digest_of(version.files) != version.digest:
            raise VersionDamaged(
                f"{version.subject}: its list of files has the digest {digest_of(version.files)}, expected "
                f"{version.digest}; restore the registry from a copy"
            )
        files: dict[str, bytes] = {}
        for path, expected in version.files.items():
            content = _content(place / path)
            found = "no such file" if content is None else hashlib.sha256(content).hexdigest()
            if content is None or found != expected:
                raise VersionDamaged(
                    f"{version.subject}: the file `{place / path}` is damaged: expected the SHA-256 {expected}, found "
                    f"{found}; deploy the same content again, or restore the file from a copy"
                )
            files[path] = content
        return Definition.of_files(version.file_name, files)

    def sweep(self, digests: Set[str]) -> None:
        """Remove the contents that are not of these digests, and what was left half made or half removed."""
        for folder in self._folder.iterdir():
            if folder.name not in digests and _OURS.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)  # the next one tries again


def _is_file_name(name: str) -> bool:
    return name not in ("", "..") and Path(name).name == name and name.isprintable()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
