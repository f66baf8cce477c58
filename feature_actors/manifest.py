"""The manifest of a data directory: whose it is, and what was fixed when it was made; and that of each shard.

    lock                     held by the process that runs the cluster, while it lives
    manifest.json            format, cluster id and name, number of slots, seed, key hash version; how many shards have
                             logs, 0 until they do
    sources.json             see `declared_sources`
    forget.key               16 bytes, see `tombstones`
    shards/NNN/lock          held by the process that writes to the shard, while it lives
    shards/NNN/epoch.json    of which cluster and shard the folder is, how often it was opened and by which run of the
                             cluster, and up to where its log went at least
    shards/NNN/tombstones.json
                             what is left of entities that were forgotten
    shards/NNN/log/          what it has acknowledged, see log/FORMAT.md

Written beside and renamed, synced. A shard that finds its own run in `epoch.json` has been restarted within the run:
its memory is gone.

A shard never begins empty where data was. The folders of the shards are made by a start before the manifest counts them
(`make_shards`); from then on one that is not there has been lost. `log_end` is written after a log is made and before
anything is acknowledged: from then on a log that is not there, or ends before that, has been lost.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.keys import KEY_HASH_VERSION
from millpond.feature_actors.lock import FileLock, LockHeld, is_lock_text

__all__ = [
    "FORMAT_VERSION",
    "Manifest",
    "ManifestError",
    "Opening",
    "ShardEpoch",
    "begin_anew",
    "check_shards",
    "lock_directory",
    "lock_shard",
    "make_shards",
    "note_log",
    "open_shard",
    "read_epoch",
    "shard_dir",
    "wait_for_shards",
    "write_epoch",
    "write_json",
    "write_text",
]

FORMAT_VERSION = 1


class ManifestError(MillpondError):
    """A data directory is not what the configuration says, or is damaged."""

    code, status = "manifest", 500


@dataclass(frozen=True)
class Manifest:
    """What is fixed for the life of a data directory; hash_seed is the index's, 64 bits.

    log_shards: how many shards have logs, 0 if none ever had.
    """

    cluster_name: str
    cluster_id: str
    n_slots: int
    hash_seed: int
    key_hash_version: int = KEY_HASH_VERSION
    format: int = FORMAT_VERSION
    log_shards: int = 0

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a directory that a cluster has made.

        Raises `ManifestError` if there is none, it is of a later format or damaged.
        """
        path = directory / "manifest.json"
        if not path.exists():
            raise ManifestError(f"data directory: `{directory}` is none of a cluster; it has no `manifest.json`")
        content = _read_json(path)
        if content.get("format") != FORMAT_VERSION:
            raise ManifestError(
                f"data directory: `{path}` has format {content.get('format')!r}; this version reads {FORMAT_VERSION}; "
                "start the version that wrote it"
            )
        try:
            manifest = cls(**content)
        except TypeError as error:
            raise ManifestError(f"data directory: `{path}` is damaged: {error}") from None
        for name, kind in (("cluster_id", str), ("hash_seed", int), ("log_shards", int)):
            if type(value := getattr(manifest, name)) is not kind:
                raise ManifestError(f"data directory: `{path}` is damaged: `{name}` is {value!r}")
        return manifest

    @classmethod
    def open(cls, directory: Path, cluster_name: str, n_slots: int) -> Manifest:
        """Read the manifest of a directory, or make one in a new or empty directory.

        Raises `ManifestError` if the directory is of another cluster, of a later format, has another
        number of slots, or holds other things.
        """
        path = directory / "manifest.json"
        if not path.exists():
            _made(directory)
            for name in _foreign_names(directory)[1]:
                (directory / name).unlink(missing_ok=True)
            try:
                directory.chmod(0o700)  # it may have been made before, as the parent of something
            except OSError as error:
                raise ManifestError(
                    f"data directory: `{directory}` cannot be made private: {error.strerror}; name another with "
                    "`data_dir`"
                ) from None
            manifest = cls(cluster_name, uuid.uuid4().hex, n_slots, secrets.randbits(64))
            manifest.write(directory)
            return manifest
        manifest = cls.read(directory)
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

    def write(self, directory: Path) -> None:
        """Write it to a directory. Raises `ManifestError`."""
        try:
            write_json(directory / "manifest.json", asdict(self))
        except OSError as error:
            raise ManifestError(
                f"data directory: `{directory}` cannot be written: {error.strerror}; make it writable, or name another "
                "with `data_dir`"
            ) from None


#: What may lie in a directory before its manifest: made by the start that also writes the manifest.
_OWN = frozenset({"run", "datasets", "demo"})
#: What a start that was killed as it wrote the manifest has left, see `write_json`.
_TEMPORARY = re.compile(r"\.manifest\.json\.[0-9]+")


def _made(directory: Path) -> None:
    """Make a data directory where there is none. Raises `ManifestError`, also if it is something else's."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ManifestError(
            f"data directory: `{directory}` cannot be made: {error.strerror}; name another with `data_dir`"
        ) from None
    if not (directory / "manifest.json").exists() and (found := _foreign_names(directory)[0]):
        raise ManifestError(
            f"data directory: `{directory}` has no manifest but holds `{found[0]}`; name an empty directory"
        )


def _foreign_names(directory: Path) -> tuple[list[str], list[str]]:
    """Return what in a directory without manifest is not ours, and what a start that was killed has left."""
    names = sorted(p.name for p in directory.iterdir() if p.name not in _OWN)
    left_over = [name for name in names if _TEMPORARY.fullmatch(name)]
    lock = directory / "lock"
    ours = [*left_over, *(["lock"] if lock.is_file() and is_lock_text(lock.read_bytes()) else [])]
    return [name for name in names if name not in ours], left_over


# -- locks

#: How long who stops is waited for: `millpond down` and `millpond up` in one line.
_DIRECTORY_WAIT_S = 1.0
#: What runs a shard ends by itself, soon, when its cluster was killed.
SHARD_WAIT_S = 10.0


def lock_directory(directory: Path, cluster_name: str, wait_s: float = _DIRECTORY_WAIT_S) -> FileLock:
    """Hold a data directory, which is made if it is not there, before anything else in it is touched.

    Raises `Unavailable` that names who has it, `ManifestError` if it is something else's or cannot be written.
    """
    _made(directory)
    try:
        return FileLock(directory / "lock", wait_s, name=cluster_name)
    except LockHeld as held:
        name, url = held.holder.get("name", cluster_name), held.holder.get("url")
        if url is None:
            does = held.holder.get("does", "is starting")
            raise Unavailable(
                f"cluster `{name}` {does} on {directory} just now ({held.who}); wait for it, end that "
                "process, or give this one another name"
            ) from None
        raise Unavailable(
            f"cluster `{name}` runs on {directory} already, at {url} ({held.who}); stop it with `millpond down`, "
            "or give this one another name"
        ) from None
    except OSError as error:
        raise ManifestError(
            f"data directory: `{directory}` cannot be written: {error.strerror}; make it writable, or name another "
            "with `data_dir`"
        ) from None


def lock_shard(
    directory: Path, shard: int, cluster_name: str, *, logged: bool, wait_s: float | None = None
) -> FileLock:
    """Hold a shard's folder, so that no other process writes to it; wait for a predecessor to end.

    logged: whether the shard has a log; then the folder is there already.
    Raises `Unavailable` that names who has it, `ManifestError` if the folder is not there or cannot be written.
    """
    folder = shard_dir(directory, shard)
    if not logged:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif not folder.exists():
        raise _missing(folder, shard)
    return _lock_shard(folder, SHARD_WAIT_S if wait_s is None else wait_s, cluster_name)


def wait_for_shards(directory: Path, cluster_name: str, wait_s: float | None = None) -> None:
    """Return when no process holds a shard of a data directory: those of a killed cluster end by themselves.

    Raises `Unavailable` that names one that does.
    """
    deadline = time.monotonic() + (SHARD_WAIT_S if wait_s is None else wait_s)
    for lock in sorted(directory.glob("shards/*/lock")):
        _lock_shard(lock.parent, max(0.0, deadline - time.monotonic()), cluster_name).release()


def _lock_shard(folder: Path, wait_s: float, cluster_name: str) -> FileLock:
    try:
        return FileLock(folder / "lock", wait_s, name=cluster_name)
    except LockHeld as held:
        raise Unavailable(
            f"shard {folder.name}: `{folder}` is still in use by cluster `{held.holder.get('name', cluster_name)}` "
            f"({held.who}); one process at a time writes to a shard; wait until that one has ended, or end it, and "
            "start again",
            code="shard_held",
        ) from None
    except OSError as error:
        raise ManifestError(f"data directory: `{folder}` cannot be written: {error.strerror}; {_RESTORE}") from None


# -- shards

#: One shard cannot begin anew beside the others: they remember which of its records they have had.
_RESTORE = "restore the directory from a copy, or begin anew in another (setting `name` or `data_dir`)"


@dataclass(frozen=True)
class Opening:
    """epoch: how often the shard was opened. again: whether this run had opened it before."""

    epoch: int
    again: bool


@dataclass(frozen=True)
class ShardEpoch:
    """What `epoch.json` says. log_end: the shard has a log, and it went up to here at least; None: it has none yet."""

    cluster_id: str
    shard: int
    epoch: int = 0
    run: str | None = None
    log_end: int | None = None


def check_shards(directory: Path, manifest: Manifest, n_shards: int, *, logged: bool) -> None:
    """Refuse to start on shards that are not there as they were left, or would not be opened by those that wrote them.

    logged: whether the shards will have logs. Changes nothing. Raises `ManifestError`.
    """
    found = any(directory.glob("shards/*/log"))
    if not logged and (found or manifest.log_shards):
        raise ManifestError(
            f"data directory: `{directory}` holds logs, and `durability` is `none`, which would begin without what is "
            "in them; set another, or name another directory"
        )
    if found and not manifest.log_shards:
        raise ManifestError(
            f"data directory: `{directory}` holds logs, and its manifest says that no shard has one; {_RESTORE}"
        )
    if manifest.log_shards and manifest.log_shards != n_shards:
        raise ManifestError(
            f"data directory: `{directory}` holds logs of {manifest.log_shards} shards, the configuration says "
            f"{n_shards}; moving slots between shards is not possible yet"
        )
    for shard in range(manifest.log_shards):
        _checked(directory, shard, manifest.cluster_id)


def make_shards(directory: Path, manifest: Manifest, n_shards: int) -> None:
    """Make the folders of shards that have logs, once in the life of a directory; then the manifest counts them."""
    if manifest.log_shards == n_shards:
        return
    for shard in range(n_shards):
        folder = shard_dir(directory, shard)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (folder / "epoch.json").exists():
            write_epoch(directory, ShardEpoch(manifest.cluster_id, shard))
    replace(manifest, log_shards=n_shards).write(directory)


def begin_anew(directory: Path) -> None:
    """Take away everything that the shards of a data directory have acknowledged. Its lock is to be held.

    A crash on the way leaves a directory that is refused until it is begun anew again.
    """
    path = directory / "manifest.json"
    if not path.exists():
        return
    for name in ("shards", "history"):
        shutil.rmtree(directory / name, ignore_errors=True)
    (directory / "sources.json").unlink(missing_ok=True)
    write_json(path, _read_json(path) | {"log_shards": 0})


def shard_dir(directory: Path, shard: int) -> Path:
    return directory / "shards" / f"{shard:03d}"


def open_shard(directory: Path, shard: int, run_id: str, cluster_id: str, *, logged: bool) -> Opening:
    """Count an opening of a shard's folder, whose lock is held, by a run of the cluster.

    logged: whether the shard has a log; then the folder is there already. Raises `ManifestError` if it is not, if it is
    that of another shard or cluster, or if what it has acknowledged is not there.
    """
    folder = shard_dir(directory, shard)
    if logged or (folder / "epoch.json").exists():
        before = _checked(directory, shard, cluster_id)
    else:
        before = ShardEpoch(cluster_id, shard)
    write_epoch(directory, replace(before, epoch=before.epoch + 1, run=run_id))
    return Opening(before.epoch + 1, before.run == run_id)


def note_log(directory: Path, shard: int, cluster_id: str, end: int, *, sure_to: int | None = None) -> None:
    """Write down that a shard has a log, which ends at an offset; before anything is acknowledged.

    sure_to: the offset that it reaches whatever happens, `end` by default. Raises `ManifestError` if it reached further
    before.
    """
    before = _checked(directory, shard, cluster_id)
    if end < (before.log_end or 0):
        raise ManifestError(
            f"data directory: the log in `{shard_dir(directory, shard)}` ends at offset {end}, and it went to "
            f"{before.log_end} at least; {_RESTORE}"
        )
    write_epoch(directory, replace(before, log_end=end if sure_to is None else sure_to))


def _checked(directory: Path, shard: int, cluster_id: str) -> ShardEpoch:
    """Return what the folder of a shard says of itself, if it is the right one and nothing is missing."""
    folder = shard_dir(directory, shard)
    path = folder / "epoch.json"
    if not path.exists():
        raise _missing(path, shard)
    epoch = read_epoch(path)
    if epoch.cluster_id != cluster_id:
        raise ManifestError(
            f"data directory: `{folder}` is of the cluster with id `{epoch.cluster_id}`, this one has id "
            f"`{cluster_id}`; put this cluster's own folder there"
        )
    if epoch.shard != shard:
        raise ManifestError(
            f"data directory: `{folder}` is that of shard {epoch.shard}; folders of shards are not to be renamed; put "
            "each in its place"
        )
    log = folder / "log" / "cache.db"
    if not (log.exists() and log.stat().st_size):
        names = [name for name in ("snapshots", "history.json") if (folder / name).exists()]
        if epoch.log_end is not None or names:
            said = f"`{folder / names[0]}` is there" if names else "it had been made"
            raise ManifestError(
                f"data directory: the log `{log}` is missing or empty, and {said}; is the right disk there? Otherwise "
                f"{_RESTORE}"
            )
    return epoch


def _missing(path: Path, shard: int) -> ManifestError:
    return ManifestError(
        f"data directory: `{path}` is missing, and shard {shard} has a log; is the right disk there? "
        f"Otherwise {_RESTORE}"
    )


def read_epoch(path: Path) -> ShardEpoch:
    """Read an `epoch.json`. Raises `ManifestError` if it is damaged."""
    content = _read_json(path)
    types: dict[str, Any] = {"cluster_id": str, "shard": int, "epoch": int, "run": str | None, "log_end": int | None}
    for name, kind in types.items():
        if name not in content or not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise ManifestError(f"data directory: `{path}` is damaged: its `{name}` is missing or wrong; {_RESTORE}")
    return ShardEpoch(**{name: content[name] for name in types})


def write_epoch(directory: Path, epoch: ShardEpoch) -> None:
    write_json(shard_dir(directory, epoch.shard) / "epoch.json", asdict(epoch))


def write_json(path: Path, content: dict[str, Any], mode: int = 0o600) -> None:
    """Write a file whole or not at all, see `write_text`."""
    write_text(path, json.dumps(content, indent=1), mode)


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file beside, sync it and rename it into place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "w") as file:
        file.write(text)
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
