"""Tombstones: what is left of entities that were forgotten, of one shard, in `tombstones.json` beside its log.

A tombstone says that an entity was forgotten and until when: nothing that happened, or arrived, up to then is taken any
more; what happens later begins afresh. It does not say which entity: it has a keyed hash (SipHash-2-4, 128 bits) of the
key, with a secret of the cluster (`forget.key`, mode 0600). Whoever has both can of course try keys.

One is written and synced before the shard says that it has it, so it is there after any crash, before anything is
replayed. While the shard is at work on it, it also has the key's own hash, by which rows are found; then that is taken
out.
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.manifest import ManifestError, write_json

__all__ = ["Forgotten", "Secret", "Tombstone", "Tombstones", "forget_secret", "tombstone_of"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

Secret = tuple[int, int]
_FORMAT = 1


class Tombstone(msgspec.Struct, frozen=True):
    """An entity of one key field that was forgotten.

    mark: the keyed hash of its key, 32 hex digits. at_ms: what happened or arrived up to then is forgotten. token: the
    number by which its events show it, see `tokens`. hash: of its key, two words, while something is left to be done.
    removed: what was removed, when that is done; None before. done_ms: when that was, by the cluster's clock.
    """

    field: str
    mark: str
    at_ms: int
    token: int
    hash: tuple[int, int] | None = None
    removed: dict[str, int] | None = None
    done_ms: int = 0

    @property
    def done(self) -> bool:
        return self.removed is not None

    @property
    def name(self) -> tuple[str, str]:
        """By which it is told from others."""
        return self.field, self.mark


class Forgotten(msgspec.Struct, frozen=True):
    """Rows of a batch that are of one forgotten entity, bool [n]."""

    tombstone: Tombstone
    rows: Bools


class _File(msgspec.Struct, frozen=True):
    format: int
    #: The mark of nobody, by which it is known that the secret is the one that the others were made with.
    nobody: str
    tombstones: list[Tombstone]


def forget_secret(directory: Path) -> Secret:
    """Return the secret of a cluster, made (mode 0600) if there is none."""
    path = directory / "forget.key"
    if not path.exists():
        beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(16))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(beside, path)
        beside.unlink()
    content = path.read_bytes()
    if len(content) != 16:
        raise ManifestError(f"data directory: `{path}` has {len(content)} bytes, not 16; restore it from a copy")
    return int.from_bytes(content[:8], "little"), int.from_bytes(content[8:], "little")


def tombstone_of(secret: Secret, field: str, value: int | str, at_ms: int) -> Tombstone:
    """Return a new tombstone of an entity, with a token that nobody can guess."""
    column = pa.array([value], pa.string() if isinstance(value, str) else pa.int64())
    low, high = hash_columns([column], 1).view(np.int64)[0].tolist()
    return Tombstone(field, _marks(column, secret)[0], at_ms, secrets.randbits(32), (low, high))


def _marks(column: pa.Array, secret: Secret) -> list[str]:
    return [f"{lo:016x}{hi:016x}" for lo, hi in hash_columns([column], len(column), secret).tolist()]


class Tombstones:
    """The tombstones of a shard. path: of their file, None to keep them in memory. secret: None to read only what they
    say. Raises `ManifestError`, also if they were made with another secret."""

    def __init__(self, path: Path | None = None, secret: Secret | None = None) -> None:
        self._path, self._secret = path, secret
        self._all: dict[tuple[str, str], Tombstone] = {}
        #: By field: low halves of the marks uint64 [k], ascending, and whose they are.
        self._of_field: dict[str, tuple[npt.NDArray[np.uint64], list[Tombstone]]] = {}
        if path is not None and path.exists():
            try:
                file = msgspec.json.decode(path.read_bytes(), type=_File)
            except (OSError, msgspec.DecodeError) as error:
                raise ManifestError(
                    f"data directory: `{path}` cannot be read: {error}; restore it from a copy"
                ) from None
            if file.format != _FORMAT:
                raise ManifestError(f"data directory: `{path}` has format {file.format}; this version reads {_FORMAT}")
            if secret is not None and file.nobody != self._nobody:
                raise ManifestError(
                    f"data directory: `{path}` was written with another `forget.key` than there is, so nobody in it "
                    "would be known again; restore that from a copy"
                )
            self._take(file.tombstones)

    @property
    def _nobody(self) -> str:
        assert self._secret is not None
        return _marks(pa.array([""]), self._secret)[0]

    def get(self, name: tuple[str, str]) -> Tombstone | None:
        return self._all.get(name)

    @property
    def fields(self) -> set[str]:
        """The key fields by which something was forgotten."""
        return set(self._of_field)

    @property
    def every(self) -> list[Tombstone]:
        return list(self._all.values())

    @property
    def waiting(self) -> list[Tombstone]:
        """Those of which something is left to be done."""
        return [one for one in self._all.values() if not one.done]

    def as_of_now(self) -> Tombstones:
        """Return those that there are, to go by whatever comes."""
        return copy.copy(self)  # what comes is taken into others of what this holds

    def write(self, some: Iterable[Tombstone]) -> None:
        """Write tombstones, each in place of one of the same entity, and sync; they hold from `take` on."""
        if self._path is not None:
            every = {**self._all, **{one.name: one for one in some}}
            write_json(self._path, msgspec.to_builtins(_File(_FORMAT, self._nobody, list(every.values()))))

    def take(self, some: Iterable[Tombstone]) -> None:
        """Go by tombstones, which have been written."""
        self._take([*self._all.values(), *some])

    def _take(self, every: Sequence[Tombstone]) -> None:
        self._all = {one.name: one for one in every}
        fields: dict[str, list[Tombstone]] = {}
        for one in sorted(self._all.values(), key=lambda one: one.mark):
            fields.setdefault(one.field, []).append(one)
        self._of_field = {
            field: (np.array([int(one.mark[:16], 16) for one in of], np.uint64), of) for field, of in fields.items()
        }

    def of(self, batch: pa.RecordBatch, arrivals: Ints, times: Ints | None, *, later: bool = False) -> list[Forgotten]:
        """Return which events of a batch are forgotten: those that happened, or arrived, up to the time of a tombstone.

        arrivals, times int64 [n]: stamps and event times; no times if the source is not declared any more. later:
        return instead those of the same entities that came after it.
        """
        found: list[Forgotten] = []
        for field in sorted(self._of_field.keys() & set(batch.schema.names)):
            assert self._secret is not None
            column = batch.column(field)
            lows, tombstones = self._of_field[field]
            marks = hash_columns([column], len(column), self._secret)
            places = np.searchsorted(lows[:-1], marks[:, 0])
            hits = np.flatnonzero(lows[places] == marks[:, 0])
            for place in np.unique(places[hits]).tolist():
                one = tombstones[place]
                rows = np.zeros(len(column), np.bool_)
                of = hits[places[hits] == place]
                rows[of] = marks[of, 1] == np.uint64(int(one.mark[16:], 16))
                rows &= ((arrivals if times is None else np.minimum(arrivals, times)) <= one.at_ms) != later
                if rows.any():
                    found.append(Forgotten(one, rows))
        return found
