"""A folder on any filesystem of `pyarrow.fs`: files appear whole or not at all, and no error says a credential.

A local file is synced, and so are the folders that name it, before `write` returns. Elsewhere a file is there when the
store says so. What has begun and did not end is a file whose name begins with a dot; nobody reads those.
"""

from __future__ import annotations

import os
import re
import urllib.parse
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from pyarrow import fs

from millpond.feature_actors.errors import Unavailable

__all__ = ["Folder", "HistoryUnavailable", "public_uri", "sync_folder"]

_BLOCK_BYTES = 4 << 20
_RETRY_AFTER_MS = 60_000


class HistoryUnavailable(Unavailable):
    """The place of the history cannot be reached, read or written."""

    code = "history_unavailable"


def public_uri(uri: str) -> str:
    """Return a URI without what may be secret: user, password, query.

    >>> public_uri("s3://key:secret@bucket/history?region=eu-west-1"), public_uri("/data/a@b")
    ('s3://bucket/history', '/data/a@b')
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return uri
    if "?" in rest and "@" in rest[rest.index("?") :]:
        return f"{scheme}://..."  # which of it is the secret cannot be told
    return f"{scheme}://{re.split('[?#]', rest, maxsplit=1)[0].rpartition('@')[2]}"


class Folder:
    """The folder that `uri` names; a text without a scheme is a local path. Raises `HistoryUnavailable`, as all of its
    methods do."""

    def __init__(self, uri: str) -> None:
        #: What an error may call it.
        self.name = public_uri(uri)
        self._secrets = _secrets(uri)
        with self._telling("opened"):
            if "://" in uri:
                self._fs, root = fs.FileSystem.from_uri(uri)
            else:
                self._fs, root = fs.LocalFileSystem(), str(Path(uri).absolute())
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, fs.LocalFileSystem)

    def write(self, path: str, content: BinaryIO, tag: str) -> tuple[int, int]:
        """Write a file, or replace it; return its length in bytes and its CRC-32. tag: of the writer, names the file
        until it is whole."""
        folder, _, name = path.rpartition("/")
        beside = f"{folder}/.{name}.{tag}"
        size = crc = 0
        with self._telling(f"written: `{path}`"):
            if self._local:
                _make(Path(self._root, folder))
            else:
                self._fs.create_dir(self._at(folder))
            with self._new(beside) as file:
                while block := content.read(_BLOCK_BYTES):
                    file.write(block)
                    size, crc = size + len(block), zlib.crc32(block, crc)
                if self._local:
                    file.flush()
                    os.fsync(file.fileno())
            self._fs.move(self._at(beside), self._at(path))
            if self._local:
                sync_folder(Path(self._root, folder))
        return size, crc

    def open(self, path: str) -> pa.NativeFile:
        with self._telling(f"read: `{path}`"):
            return self._fs.open_input_file(self._at(path))

    def read(self, path: str) -> bytes:
        with self._telling(f"read: `{path}`"), self._fs.open_input_file(self._at(path)) as file:
            return bytes(file.read())

    def checksum(self, path: str) -> tuple[int, int]:
        """Return the length of a file in bytes and its CRC-32."""
        size = crc = 0
        with self._telling(f"read: `{path}`"), self._fs.open_input_stream(self._at(path)) as file:
            while block := file.read(_BLOCK_BYTES):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return size, crc

    def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        with self._telling(f"read: `{path}`"):
            return bool(self._fs.get_file_info(self._at(path)).type == fs.FileType.File)

    def files(self, path: str = "", *, recursive: bool = False) -> list[str]:
        """Return the paths of the files in a folder, sorted; none if there is no such folder."""
        return [p for p, kind in self._listed(path, recursive) if kind == fs.FileType.File]

    def folders(self, path: str = "") -> list[str]:
        """Return the paths of the folders in a folder, sorted."""
        return [p for p, kind in self._listed(path, False) if kind == fs.FileType.Directory]

    def delete(self, path: str) -> None:
        """Delete a file or a folder, which may be gone already."""
        with self._telling(f"deleted: `{path}`"):
            kind = self._fs.get_file_info(self._at(path)).type
            if kind == fs.FileType.Directory:
                self._fs.delete_dir(self._at(path))
            elif kind == fs.FileType.File:
                self._fs.delete_file(self._at(path))

    # -- steps

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _new(self, path: str) -> BinaryIO:
        if not self._local:
            return self._fs.open_output_stream(self._at(path))  # type: ignore[no-any-return]
        return os.fdopen(os.open(self._at(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")

    def _listed(self, path: str, recursive: bool) -> list[tuple[str, fs.FileType]]:
        with self._telling(f"listed: `{path}`" if path else "listed"):
            selector = fs.FileSelector(self._at(path), recursive=recursive, allow_not_found=True)
            return sorted((f.path[len(self._root) :].lstrip("/"), f.type) for f in self._fs.get_file_info(selector))

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            text = str(error).partition("\n")[0][:300]
            if any(len(secret) < 4 for secret in self._secrets):
                text = ""  # taking so little out would leave nothing that can be read
            for secret in self._secrets:
                text = text.replace(secret, "...")
            raise HistoryUnavailable(
                f"history: `{self.name}` cannot be {what}: {type(error).__name__}: {text or 'no more may be said'}; "
                "see that it is there and that this process may use it",
                retry_after_ms=_RETRY_AFTER_MS,
            ) from None


def _secrets(uri: str) -> list[str]:
    """Return the parts of a URI that `public_uri` leaves out, as they stand and decoded, the longest first."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return []
    authority, _, query = rest.partition("?")
    user = authority.rpartition("@")[0]
    pairs = [pair.partition("=")[2] for pair in query.split("&")]
    parts = {uri if user or query else "", user, *user.split(":"), query, *pairs}
    return sorted({s for part in parts for s in (part, urllib.parse.unquote(part)) if s}, key=len, reverse=True)


def _make(folder: Path) -> None:
    """Make a local folder and those above it, and sync the ones that got a new name in them."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names in a local folder."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
