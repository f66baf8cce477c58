"""The manifest of a data directory: whose it is, and what was fixed when it was made.

    manifest.json            format, cluster id and name, number of slots, seed, key hash version
    shards/count.json        how many shards wrote the logs
    shards/NNN/epoch.json    how often shard NNN was opened, and by which run of the cluster
    shards/NNN/log/          what it has acknowledged, see log/FORMAT.md

Written beside and renamed, synced. A shard that finds its own run in `epoch.json` has been
restarted within the run: its memory is gone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.keys import KEY_HASH_VERSION

__all__ = ["FORMAT_VERSION", "Manifest", "ManifestError", "Opening", "check_logs", "open_shard", "shard_dir"]

FORMAT_VERSION = 1


class ManifestError(MillpondError):
    """A data directory is not what the configuration says, or is damaged."""

    code, status = "manifest", 500


@dataclass(frozen=True)
class Manifest:
    """What is fixed for the life of a data directory; hash_seed is the index's, 64 bits."""

    cluster_name: str
    cluster_id: str
    n_slots: int
    hash_seed: int
    key_hash_version: int = KEY_HASH_VERSION
    format: int = FORMAT_VERSION

    @classmethod
    def open(cls, directory: Path, cluster_name: str, n_slots: int) -> Manifest:
        """Read the manifest of a directory, or make one in a new or empty directory.

        Raises `ManifestError` if the directory is of another cluster, of a later format, has another
        number of slots, or holds other things.
        """
        path = directory / "manifest.json"
        if not path.exists():
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ManifestError(
                    f"data directory: `{directory}` cannot be made: {error.strerror}; name another with `data_dir`"
                ) from None
            names = sorted(p.name for p in directory.iterdir() if p.name not in _OWN)
            left_over = [name for name in names if _TEMPORARY.fullmatch(name)]
            if found := [name for name in names if name not in left_over]:
                raise ManifestError(
                    f"data directory: `{directory}` has no manifest but holds `{found[0]}`; name an empty directory"
                )
            for name in left_over:
                (directory / name).unlink(missing_ok=True)
            try:
                directory.chmod(0o700)  # it may have been made before, as the parent of something
            except OSError as error:
                raise ManifestError(
                    f"data directory: `{directory}` cannot be made private: {error.strerror}; name another with "
                    "`data_dir`"
                ) from None
            manifest = cls(cluster_name, uuid.uuid4().hex, n_slots, secrets.randbits(64))
            write_json(path, asdict(manifest))
            return manifest
        content = _read_json(path)
        if content.get("format") != FORMAT_VERSION:
            raise ManifestError(
                f"data directory: `{path}` has format {content.get('format')!r}; this version reads {FORMAT_VERSION}"
            )
        try:
            manifest = cls(**content)
        except TypeError as error:
            raise ManifestError(f"data directory: `{path}` is damaged: {error}") from None
        for name, want in (
            ("cluster_name", cluster_name),
            ("n_slots", n_slots),
            ("key_hash_version", KEY_HASH_VERSION),
        ):
            if (have := getattr(manifest, name)) != want:
                raise ManifestError(
                    f"data directory: `{path}` has {name} {have!r}, the configuration says {want!r}; it is fixed "
                    "when the directory is made"
                )
        return manifest


#: What may lie in a directory before its manifest: made by the start that also writes the manifest.
_OWN = frozenset({"run", "datasets", "demo"})
#: What a start that was killed as it wrote the manifest has left, see `write_json`.
_TEMPORARY = re.compile(r"\.manifest\.json\.[0-9]+")


@dataclass(frozen=True)
class Opening:
    """epoch: how often the shard was opened. again: whether this run had opened it before."""

    epoch: int
    again: bool


def check_logs(directory: Path, n_shards: int, *, logged: bool) -> None:
    """Refuse to start on logs that would not be replayed, or not by the shards that wrote them.

    logged: whether the shards will have logs; then their number is written down. Raises `ManifestError`.
    """
    path = directory / "shards" / "count.json"
    found = any(directory.glob("shards/*/log"))
    if found and not logged:
        raise ManifestError(
            f"data directory: `{directory}` holds logs, and `durability` is `none`, which would begin without what is "
            "in them; set another, or name another directory"
        )
    wrote = _read_json(path).get("shards") if found and path.exists() else n_shards
    if wrote != n_shards:
        raise ManifestError(
            f"data directory: `{directory}` holds logs of {wrote} shards, the configuration says {n_shards}; moving "
            "slots between shards is not possible yet"
        )
    if logged:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, {"shards": n_shards})


def shard_dir(directory: Path, shard: int) -> Path:
    return directory / "shards" / f"{shard:03d}"


def open_shard(directory: Path, shard: int, run_id: str) -> Opening:
    """Count an opening of a shard's directory by a run of the cluster."""
    path = shard_dir(directory, shard) / "epoch.json"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    before: dict[str, Any] = _read_json(path) if path.exists() else {"epoch": 0, "run": None}
    if type(before.get("epoch")) is not int or "run" not in before:
        raise ManifestError(f"data directory: `{path}` is damaged: expected an epoch and a run")
    opening = Opening(before["epoch"] + 1, before["run"] == run_id)
    write_json(path, {"epoch": opening.epoch, "run": run_id})
    return opening


def write_json(path: Path, content: dict[str, Any], mode: int = 0o600) -> None:
    """Write a file beside, sync it and rename it into place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ManifestError(f"data directory: `{path}` cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ManifestError(f"data directory: `{path}` is damaged: expected an object")
    return content
