"""The contents of versions: a folder for each, named by its digest, and never changed.

It is written beside, synced and renamed into place, so what has its name is whole; its files are read-only. Whoever
calls `add` or `sweep` holds the registry's lock. What is read is compared with the hashes that the index has.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

from millpond.feature_actors.errors import DeclarationError, MillpondError, Unavailable
from millpond.models.definition import ARTIFACTS_DIR, Definition, digest_of
from millpond.models.version import Version

__all__ = ["Contents", "VersionDamaged"]

#: Contents, and what is on its way to become one.
_OURS = re.compile(r"(\.new-)?[0-9a-f]{64}")


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

    def add(self, definition: Definition) -> None:
        """Put a content in its place and sync it, also over a damaged one.

        Raises `Unavailable` if it cannot be written, `DeclarationError` if an artifact has no name for a file.
        """
        for name in definition.artifacts:
            if not _is_file_name(name):
                raise DeclarationError(f"definition `{definition.file_name}`: artifact {name!r} is no file name")
        files, place = definition.files, self._folder / definition.digest
        if all(_content(place / path) == content for path, content in files.items()):
            return
        new = self._folder / f".new-{definition.digest}"
        try:
            _write_all(new, files)
            if place.exists():  # a damaged one, maybe of a version that is live: file by file, so that none is away
                _move_all(new, place, files)
            else:
                new.rename(place)
            _sync(self._folder)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise Unavailable(
                f"registry: `{self._folder}` cannot be written: {error.strerror}; nothing has been changed; mend that "
                "and try again",
                retry_after_ms=10_000,
            ) from None

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
        """Remove the contents that are not of these digests, and what was left half made."""
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


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files that are only to be read into a new folder, and sync it."""
    for one in _folders(folder, files):
        one.mkdir(mode=0o700)
    for path, content in files.items():
        descriptor = os.open(folder / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for one in _folders(folder, files):
        _sync(one)


def _move_all(folder: Path, to: Path, files: Iterable[str]) -> None:
    """Move files into another folder, over what is there of the same name, and remove the first."""
    for one in _folders(to, files):
        one.mkdir(mode=0o700, exist_ok=True)
    for path in files:
        (folder / path).rename(to / path)
    for one in _folders(to, files):
        _sync(one)
    shutil.rmtree(folder)


def _folders(folder: Path, files: Iterable[str]) -> list[Path]:
    """Return a folder and those in it that have some of the files, parents first."""
    return sorted({folder, *((folder / path).parent for path in files)})


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
