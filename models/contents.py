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
from millpond.models.definition import ARTIFACTS_DIR, TEXT_FILE, Definition, digest_of
from millpond.models.version import Version

__all__ = ["Contents", "VersionDamaged"]

#: Contents, and what is on its way to become one.
_OURS = re.compile(r"(\.new-)?[0-9a-f]{64}")
#: So much of an artifact is in memory as it is copied.
_PIECE_BYTES = 1 << 20


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
        return self._definition(version, version.files)

    def text(self, version: Version) -> Definition:
        """Return the content of a version without its artifacts, compared with its hash. Raises `VersionDamaged`."""
        return self._definition(version, [TEXT_FILE])

    def copy(self, version: Version, artifact: str, to: Path) -> None:
        """Copy an artifact of a version into a file that is not there yet, compared with its hash as it is copied: a
        piece at a time, however large it is. Raises `VersionDamaged`, or `OSError` if it cannot be written."""
        path, hashed = f"{ARTIFACTS_DIR}/{artifact}", hashlib.sha256()
        try:
            source = (self._place(version) / path).open("rb")
        except OSError:
            self._check(version, path, None)
            raise
        with source, os.fdopen(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            while piece := source.read(_PIECE_BYTES):
                hashed.update(piece)
                file.write(piece)
        self._check(version, path, hashed.hexdigest())

    def _definition(self, version: Version, paths: Iterable[str]) -> Definition:
        place, files = self._place(version), {}
        for path in paths:
            content = _content(place / path)
            self._check(version, path, None if content is None else hashlib.sha256(content).hexdigest())
            assert content is not None
            files[path] = content
        return Definition.of_files(version.file_name, files)

    def _place(self, version: Version) -> Path:
        if digest_of(version.files) != version.digest:
            raise VersionDamaged(
                f"{version.subject}: its list of files has the digest {digest_of(version.files)}, expected "
                f"{version.digest}; restore the registry from a copy"
            )
        return self._folder / version.digest

    def _check(self, version: Version, path: str, found: str | None) -> None:
        """Compare the hash of a file, None if it cannot be read, with that of a version."""
        if found != (expected := version.files[path]):
            raise VersionDamaged(
                f"{version.subject}: the file `{self._folder / version.digest / path}` is damaged: expected the "
                f"SHA-256 {expected}, found {found or 'no such file'}; deploy the same content again, or restore the "
                "file from a copy"
            )

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
