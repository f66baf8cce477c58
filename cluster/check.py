"""`millpond check`: the directory of a stopped cluster is looked at, and mended where there is a copy of it.

Nobody may start the cluster meanwhile: the locks of its directory are held.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from millpond.cluster.config import Config
from millpond.feature_actors.check import CannotCheck, DirectoryCheck, Problem
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.lock import FileLock, LockHeld
from millpond.feature_actors.mend import Mended, finish_logs, mend, mend_schemas
from millpond.feature_actors.replays import ReplayOptions, check_replays
from millpond.models.definition import Definition
from millpond.models.registry import check_registry

__all__ = ["CheckReport", "check_directory"]

#: How far the clocks of the processes that stamp arrivals may be apart, as the shards have it.
_CLOCKS_APART_MS_MAX = 60_000
_LOCKS = ("lock", "run/lock", "shards/*/lock")
#: Not of the data: what a running cluster needs, and what it says of itself.
_NOT_COPIED = frozenset({"run", "memory"})
_BLOCK_BYTES = 1 << 20
_IDS_SHOWN_MAX = 20
_OF_REGISTRY = "restore `registry` from a copy, or move it away: `millpond up` with the definition files makes another"


@dataclass
class CheckReport:
    """What a check has found, and what has been done. problems: those that are left."""

    directory: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    mended: Mended | None = None
    copy: str | None = None

    @property
    def status(self) -> int:
        """The exit status: 0 if all is well, 1 if something is wrong."""
        return 1 if self.problems else 0

    def as_json(self) -> dict[str, Any]:
        content = {k: v for k, v in asdict(self).items() if k not in ("lines", "mended")}
        return {**content, "mended": None if self.mended is None else self.mended.as_json(), "status": self.status}

    def text(self) -> Iterator[str]:
        """Yield the lines to print."""
        for shard in self.shards:
            yield (
                f"shard {shard['shard']}: {shard['records']} records, offsets {shard['first']} to {shard['next']}; "
                f"{shard['snapshots']} snapshots; history up to {shard['history_to']}"
            )
        if self.mended is not None:
            yield from (f"done: {line}" for line in self.mended.done)
            for lost in self.mended.lost:
                yield f"lost: {lost}"
                if lost.ids:
                    more = f" and {len(lost.ids) - _IDS_SHOWN_MAX} more (--json names all)"
                    yield (
                        f"  known from {', '.join(lost.known_from)}: `{lost.source}` "
                        + ", ".join(lost.ids[:_IDS_SHOWN_MAX])
                        + more * (len(lost.ids) > _IDS_SHOWN_MAX)
                    )
                if not lost.in_snapshot:
                    yield f"  views affected: {', '.join(lost.views) or 'not known'}"
            yield from (f"not mended: {line}" for line in self.mended.left)
        yield from (f"problem: {line}" for line in self.lines)
        yield from (f"note: {line}" for line in self.notes)
        yield from (f"left out: {line}" for line in self.left_out)
        yield "all is well" if not self.problems else f"{len(self.problems)} problems"


def check_directory(
    directory: Path,
    config: Config,
    definitions: Sequence[Definition] = (),
    *,
    fix: bool = False,
    copy: Path | None = None,
) -> CheckReport:
    """Check the directory of a stopped cluster; with `fix` mend it, if `copy` is, or has just been made, a whole copy.

    Raises `CannotCheck`: it is running, no data directory, of a later format, or there is no such copy.
    """
    directory = directory.absolute()
    if not directory.is_dir():
        raise CannotCheck(f"data directory: there is no directory `{directory}`; name that of a cluster")
    if fix and copy is None:
        raise CannotCheck(
            "--fix changes the directory, and refuses to without a copy of it; name with --copy where there is one, or "
            "where one is to be made"
        )
    layout = None
    if definitions:
        declared = [d.declared() for d in definitions]
        layout = compile_layout([s for d in declared for s in d.sources], [v for d in declared for v in d.views])
    with _stopped(directory):
        report = _checked(directory, config, layout)
        if not fix or not report.problems:
            return report
        assert copy is not None
        _make_copy(directory, copy.absolute())
        done = finish_logs(directory)
        with _directory_check(directory, config, layout) as check:
            done += mend_schemas(check, layout)
        with _directory_check(directory, config, layout) as check:
            mended = mend(check, layout)
        mended.done[:0] = done
        report = _checked(directory, config, layout)
        report.mended, report.copy = mended, str(copy.absolute())
        return report


def _directory_check(directory: Path, config: Config, layout: Layout | None) -> DirectoryCheck:
    history = {"off": None, "auto": str(directory / "history")}.get(config.history, config.history)
    of_sources = layout.sources.values() if layout is not None else ()
    event_ids = {source.name: source.event_id for source in of_sources if source.event_id is not None}
    return DirectoryCheck(directory, history, event_ids)


def _checked(directory: Path, config: Config, layout: Layout | None) -> CheckReport:
    with _directory_check(directory, config, layout) as check:
        if layout is None:
            check.left_out.append("snapshots against a replay: name the definition files")
        else:
            options = ReplayOptions(
                config.dedupe_horizon_ms, config.strings_max, config.ahead_ms_max + _CLOCKS_APART_MS_MAX
            )
            check_replays(check, layout, options)
        if (directory / "registry" / "index").is_dir():
            for line in check_registry(directory / "registry"):
                what, _, do = line.rpartition("; ")
                check.problems.append(Problem(what or line, do if what else _OF_REGISTRY))
        shards = [
            {
                "shard": shard.number,
                "first": shard.log.first,
                "next": shard.log.next,
                "records": shard.records,
                "snapshots": len(shard.snapshots),
                "history_to": shard.history_done_to,
            }
            for shard in check.shards
        ]
        return CheckReport(
            str(directory),
            shards,
            [asdict(problem) for problem in check.problems],
            [str(problem) for problem in check.problems],
            check.notes,
            check.left_out,
        )


# -- nobody else


@contextmanager
def _stopped(directory: Path) -> Iterator[None]:
    """Hold the locks of a directory. Raises `CannotCheck` if a cluster runs on it."""
    from millpond.cluster.cluster import running

    if (state := running(directory)) is not None:
        raise CannotCheck(
            f"data directory: cluster `{state.get('name')}` runs on `{directory}` (process {state['pid']}); stop it "
            "with `millpond down`"
        )
    held: list[int] = []
    lock: FileLock | None = None
    try:
        for path in sorted({path for pattern in _LOCKS for path in directory.glob(pattern) if path.is_file()}):
            held.append(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
            try:
                fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CannotCheck(
                    f"data directory: `{path}` is held by a process that uses the directory; stop its cluster"
                ) from None
        if not (directory / "lock").exists():
            with suppress(OSError):  # it cannot be written, and no cluster starts on it
                lock = FileLock(directory / "lock", name="millpond check")
        yield
    except LockHeld as error:
        raise CannotCheck(f"data directory: `{directory}` is in use by {error.who}; stop its cluster") from None
    finally:
        if lock is not None:
            lock.release()
        for descriptor in held:
            os.close(descriptor)


# -- the copy


def _make_copy(directory: Path, copy: Path) -> None:
    """Copy the directory if there is no copy yet; compare what is there, byte for byte. Raises `CannotCheck`."""
    ours, theirs = directory.resolve(), copy.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise CannotCheck(f"copy: `{copy}` is not apart from `{directory}`; name another directory")
    if not copy.exists():
        beside = copy.with_name(f".{copy.name}.{os.getpid()}")
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            beside.mkdir(mode=0o700)
            for path in _files(directory):
                target = beside / path.relative_to(directory)
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.copy2(path, target)
                _sync(target)
            for folder in [beside, *(p for p in beside.rglob("*") if p.is_dir())]:
                _sync(folder)
            beside.rename(copy)
            _sync(copy.parent)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise CannotCheck(f"copy: `{copy}` cannot be made: {error}; nothing was changed") from None
    for path in _files(directory):
        other = copy / path.relative_to(directory)
        if not other.is_file():
            raise CannotCheck(f"copy: `{copy}` has no `{path.relative_to(directory)}`; nothing was changed")
        if os.path.samefile(path, other):
            raise CannotCheck(f"copy: `{other}` is the very file of `{directory}`; nothing was changed")
        if path.stat().st_size != other.stat().st_size or _digest(path) != _digest(other):
            raise CannotCheck(f"copy: `{other}` has another content than `{path}`; nothing was changed")


def _files(directory: Path) -> list[Path]:
    """Return the files of a directory that are data."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file()
        and not path.is_symlink()
        and path.name != "lock"
        and path.relative_to(directory).parts[0] not in _NOT_COPIED
    )


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
