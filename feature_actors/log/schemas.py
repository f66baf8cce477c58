"""Schemas of the events in a log: small files beside it, each named by the digest of what it holds and never changed.

A record names its schema, so any record can be read by itself, whatever stood before it and has been truncated since.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pyarrow as pa

from millpond.feature_actors.log.record import LogDamaged

__all__ = ["Schemas"]

_DIGITS = 32


class Schemas:
    """The schemas in a directory, which is made with the first of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names: list[tuple[pa.Schema, str]] = []
        self._read: dict[str, pa.Schema] = {}

    def name_of(self, schema: pa.Schema) -> str:
        """Return the name of a schema, which is on disk then."""
        for known, name in self._names:
            if known is schema or known.equals(schema):
                return name
        content = schema.serialize().to_pybytes()
        name = hashlib.sha256(content).hexdigest()[:_DIGITS]
        path = self._directory / f"{name}.arrow"
        if not path.exists():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_synced(path, content)
        self._names = [*self._names[-63:], (schema, name)]
        return name

    def get(self, name: str) -> pa.Schema:
        """Return the schema of a name. Raises `LogDamaged`."""
        if name not in self._read:
            path = self._directory / f"{name}.arrow"
            try:
                content = path.read_bytes() if name.isalnum() else b""
                if hashlib.sha256(content).hexdigest()[:_DIGITS] != name:
                    raise ValueError("it is not what its name says")
                self._read[name] = pa.ipc.read_schema(pa.py_buffer(content))
            except (OSError, ValueError, pa.ArrowException) as error:
                raise LogDamaged(f"log: the schema `{path}` cannot be read: {error}; restore it from a copy") from None
        return self._read[name]


def write_synced(path: Path, content: bytes) -> None:
    """Write a file beside, sync it and rename it into place; sync the directory too."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
