"""The registry: every version of every model, and what is live of it. A folder that several processes open at once.

FORMAT.md says what lies in it. The promises:

1. A version is never changed: its content lies in a folder named by its digest, its record is written once.
2. A change is one transaction of the index: others see all of it or nothing, and each change makes the generation
   one larger, so that who polls that misses none.
3. Whoever is killed leaves what was there before, at most with a folder that nothing names, which the next one that
   adds or retires removes: a content is written and synced before the index names it, and removed after it does not
   any more. Both are done by one process at a time, which holds the lock; all else needs no lock but SQLite's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from millpond.feature_actors.errors import MillpondError, NotFound, Unavailable, did_you_mean
from millpond.feature_actors.lock import FileLock, LockHeld
from millpond.models.added_views import AddedViews
from millpond.models.attempts import Attempts
from millpond.models.contents import Contents, VersionDamaged
from millpond.models.definition import Definition, artifacts_of
from millpond.models.erasures import Erasures
from millpond.models.index import Change, Index, RegistryDamaged
from millpond.models.pool import Pool
from millpond.models.rollout import Course, Role, Roles, Rollout, RolloutRefused, check_share, deployed, promoted
from millpond.models.version import Version

__all__ = ["Registry", "State", "VersionExists", "VersionRetired", "check_registry"]

State = Literal["registered", "champion", "canary", "shadow", "retired"]

FORMAT_VERSION = 1
_WAIT_S = 60.0


class VersionExists(MillpondError):
    """The version is there already with another content: give the new content another version."""

    code, status = "version_exists", 409


class VersionRetired(MillpondError):
    """The version has been retired, for ever."""

    code, status = "version_retired", 409


class _TakenBack(Exception):
    """A change was only tried: nothing of it stays."""


@dataclass(frozen=True)
class _Record:
    """What the index has of a version. added: the generation that brought it, which orders those of a model."""

    version: Version
    added: int
    retired: bool = False


class Registry:
    """Open the registry in a folder, or make it, for its owner only.

    Methods that change something return the generation after it, which is the former one if all was so already. They
    wait up to a minute for each other and sync to disk: not for an event loop. Safe in threads and processes.
    Raises `RegistryDamaged`, or `Unavailable` if it cannot be opened now; so do all methods.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._contents = Contents(folder / "versions")
            self._index = Index(folder / "index", _WAIT_S)
            #: What processes are about to do with versions.
            self.attempts = Attempts(self._index)
            #: That came while the cluster ran.
            self.views = AddedViews(self._index)
            #: Whose scores replicas are to forget.
            self.erasures = Erasures(self._index)
        except OSError as error:
            raise Unavailable(
                f"registry: `{folder}` cannot be opened: {error.strerror}; make it writable", retry_after_ms=10_000
            ) from None
        found = self._index.get("format", int)
        if found is None:
            with self._index.change():
                self._index.set("format", FORMAT_VERSION)
        elif found != FORMAT_VERSION:
            self.close()
            raise RegistryDamaged(
                f"registry: `{folder}` has format {found}; this version reads {FORMAT_VERSION}; start the version that "
                "wrote it"
            )

    def close(self) -> None:
        """Close what this thread has open."""
        self._index.close()

    # -- what is there

    def generation(self) -> int:
        """Return the number of changes so far; a report is none. Takes tens of microseconds."""
        return self._index.generation()

    def rollouts(self) -> dict[str, Rollout]:
        """Return what is live, by model, as of one moment."""
        with self._index.moment():
            courses = self._index.under("rollout/", Course)
            return {model: self._rollout(model, course.now) for model, course in courses.items()}

    def models(self) -> list[str]:
        """Return the names of all models that ever had a version, sorted."""
        return sorted({record.version.model for record in self._records().values()})

    def versions(self, model: str) -> list[Version]:
        """Return the versions of a model, retired ones too, in the order of their adding. Raises `NotFound`."""
        with self._index.moment():
            return [record.version for record in self._of_model(model)]

    def version(self, model: str, version: str) -> Version:
        """Return a version, also if it is retired. Raises `NotFound`."""
        with self._index.moment():
            return self._record(model, version).version

    def state_of(self, version: Version) -> State:
        """Return what a version is at the moment. Raises `NotFound`."""
        with self._index.moment():
            if self._record(version.model, version.version).retired:
                return "retired"
            course = self._course(version.model)
            return (course and course.now.role_of(version.version)) or "registered"

    def definition(self, version: Version) -> Definition:
        """Return the definition that a version was made of, each of its files compared with its hash.

        Raises `NotFound`, `VersionRetired`, or `VersionDamaged` that names the file.
        """
        with self._reading(version):
            return self._contents.read(self._usable(version.model, version.version).version)

    def text(self, version: Version) -> Definition:
        """Return the definition that a version was made of without its artifacts. Raises what `definition` does."""
        with self._reading(version):
            return self._contents.text(version)

    @contextmanager
    def artifacts(self, version: Version, names: Iterable[str]) -> Iterator[Path]:
        """Copy some artifacts of a version, as far as it has them, into a private folder, which lives as long as this
        context: whoever opens them there has what was compared with its hash.

        Raises what `definition` does, or `Unavailable` if they cannot be written.
        """
        with tempfile.TemporaryDirectory(prefix="millpond-", ignore_cleanup_errors=True) as folder:
            with self._reading(version):
                for name in sorted({*names} & artifacts_of(version.files)):
                    try:
                        self._contents.copy(version, name, Path(folder) / name)
                    except OSError as error:
                        raise Unavailable(
                            f"{version.subject}: its artifact `{name}` cannot be copied into `{folder}`: "
                            f"{error.strerror}; mend that",
                            retry_after_ms=10_000,
                        ) from None
            yield Path(folder)

    @contextmanager
    def _reading(self, version: Version) -> Iterator[None]:
        """Say of files that are away why, if that is because their version has been retired."""
        try:
            yield
        except VersionDamaged:
            self._usable(version.model, version.version)
            raise

    def artifacts_dir(self, version: Version) -> Path:
        """Return where the artifacts of a version lie by name. Only `definition` and `artifacts` compare them with
        their hashes."""
        return self._contents.artifacts_dir(version.digest)

    # -- changes

    def add(self, definition: Definition, versions: Sequence[Version]) -> int:
        """Add versions that `version_of` made of a definition; what is there already stays as it is.

        A content that was damaged since is put right, which is no change. Raises `VersionExists` if one is there with
        another content, `VersionRetired`, `DeclarationError`, `Unavailable` if the disk is full; nothing has been
        added then.
        """
        with self._adding(definition, versions) as change:
            pass
        return change.generation

    def publish(
        self, definition: Definition, versions: Sequence[Version], as_: Role = "champion", share: float | None = None
    ) -> int:
        """Add versions and give them a role, in one change: if it is refused, they have not been added either.

        See `add` and `deploy`, and what they raise.
        """
        share = check_share(as_, share)
        with self._adding(definition, versions) as change:
            self._deploy(change, versions, as_, share)
        return change.generation

    def check_publish(self, versions: Sequence[Version], as_: Role = "champion", share: float | None = None) -> None:
        """Raise what `publish` would now raise of the versions and of their role; change nothing.

        For who has something to do before: another process may still come between.
        """
        share = check_share(as_, share)
        with suppress(_TakenBack), self._index.change() as change:
            for version in versions:
                self._check_same(version)
            self._add_records(change, versions)
            self._deploy(change, versions, as_, share)
            raise _TakenBack

    def deploy(self, versions: Sequence[Version], as_: Role = "champion", share: float | None = None) -> int:
        """Give versions of different models a role, all or none of them; other versions keep theirs.

        share: of a canary. Raises `BadRequest` if that does not fit, `NotFound`, `VersionRetired`, `VersionExists` if
        the content is another, `RolloutRefused` if there is no champion beside or the id is another.
        """
        share = check_share(as_, share)
        with self._index.change() as change:
            self._deploy(change, versions, as_, share)
        return change.generation

    def promote(self, model: str, version: str | None = None) -> int:
        """Make the canary, or else the shadow, or else the version that is named the champion.

        Raises `NotFound`, `VersionRetired`, or `RolloutRefused` if it does not say which.
        """

        with self._index.change() as change:
            course = self._live(model)
            if version is not None:
                self._usable(model, version)
            change.set(f"rollout/{model}", self._moved(model, course, promoted(model, course.now, version)))
        return change.generation

    def rollback(self, model: str, expected: Rollout | None = None) -> int:
        """Make all of a model's rollout as it was before the last change of it; again, as before the one before.

        expected: what has to be live, unless None: nobody else's change is rolled back then.
        Raises `NotFound`, or `RolloutRefused` if nothing is known of what was before, or something else is live.
        """
        with self._index.change() as change:
            course = self._live(model)
            if expected is not None and self._rollout(model, course.now) != expected:
                raise RolloutRefused(f"model `{model}`: somebody has changed it since; it is left as it is")
            back = course.back()
            if back is None:
                raise RolloutRefused(
                    f"model `{model}`: there is nothing to roll back to; name a version to promote, or retire the model"
                )
            change.set(f"rollout/{model}", back)
        return change.generation

    def set_pool(self, model: str, pool: Pool | None) -> int:
        """Move a model into a pool, whatever its versions ask for, or with None to where they ask to be.

        Raises `NotFound`, or `RolloutRefused` if nothing of it is live.
        """
        with self._index.change() as change:
            course = self._live(model)
            change.set(f"rollout/{model}", course.changed(replace(course.now, pool=pool)))
        return change.generation

    def retire(self, model: str, version: str | None = None) -> int:
        """Take a version, or a model with all of its versions, out of service for ever, and remove its files.

        Raises `NotFound`, or `RolloutRefused` if the version is the champion: another has to be that first.
        """
        with self._alone():
            with self._index.change() as change:
                records = self._of_model(model) if version is None else [self._record(model, version)]
                course = self._course(model)
                if course is not None and version is None:
                    change.delete(f"rollout/{model}")
                elif course is not None and version is not None:
                    change.set(f"rollout/{model}", course.retiring(model, version))
                for record in records:
                    change.set(_key(record.version), replace(record, retired=True))
                self.attempts.forget(change, [record.version for record in records])
            self._sweep()
        return change.generation

    # -- reports

    def report(self, replica: str, report: Mapping[str, Any]) -> None:
        """Keep what a replica says of itself, instead of what it said before: anything that JSON holds."""
        self._index.set(f"report/{replica}", dict(report))

    def reports(self) -> dict[str, dict[str, Any]]:
        """Return the last report of each replica."""
        return self._index.under("report/", dict[str, Any])

    def forget_report(self, replica: str) -> None:
        """Forget what a replica said, if it did."""
        self._index.delete(f"report/{replica}")

    def scrub(self) -> bool:
        """Have no file any more that has what reports and erasures said before. Returns False if that could not be done
        just now."""
        return self._index.scrub()

    def check(self) -> list[str]:
        """Return what is wrong: files that are missing or damaged, rollouts of versions that cannot be."""
        wrong: list[str] = []
        with self._index.moment():
            keys = self._index.keys()
            wrong += [f"registry: `{k}` is no key" for k in keys if k.split("/")[0] not in _KEYS]
            wrong += self.views.check()
            records, courses = self._records(), self._index.under("rollout/", Course)
            generation = self.generation()
        for name, record in records.items():
            if name != f"{record.version.model}/{record.version.version}" or not 0 < record.added <= generation:
                wrong.append(f"{record.version.subject}: its record is that of `{name}`, added at {record.added}")
            if not record.retired:
                try:
                    self._contents.read(record.version)
                except VersionDamaged as error:
                    wrong.append(str(error))
        for model, course in courses.items():
            stack = (*course.former, course.now)
            for roles in stack:
                live = list(roles.live.values())
                of = [records.get(f"{model}/{name}") for name in live]
                if any(record is None or record.retired for record in of):
                    wrong.append(f"model `{model}`: a rollout has versions {live}, of which one is not there")
                elif len({tuple(sorted(record.version.key_fields.items())) for record in of if record}) != 1:
                    wrong.append(f"model `{model}`: a rollout has versions {live} of different ids")
                if len(set(live)) != len(live) or (roles.canary is not None) != (0 < roles.share < 1):
                    wrong.append(f"model `{model}`: a rollout is {roles}")
            if any(one == other for one, other in pairwise(stack)):
                wrong.append(f"model `{model}`: a change of its rollout changed nothing")
        return wrong

    # -- how

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only one that adds or removes contents."""
        try:
            lock = FileLock(self._folder / "lock", _WAIT_S)
        except LockHeld as held:
            raise Unavailable(
                f"registry: {held.who}, adds or retires versions; nothing has been changed; try again",
                retry_after_ms=1_000,
            ) from None
        except OSError as error:
            raise Unavailable(
                f"registry: `{self._folder}` cannot be written: {error.strerror}; make it writable",
                retry_after_ms=10_000,
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _adding(self, definition: Definition, versions: Sequence[Version]) -> Iterator[Change]:
        """Add versions, in a change that may go on; what it was refused after has its content removed by the next."""
        assert all(v.digest == definition.digest and v.files == definition.hashes for v in versions)
        with self._alone():
            for version in versions:
                self._check_same(version)
            self._sweep()
            self._contents.add(definition)
            with self._index.change() as change:
                self._add_records(change, versions)
                yield change

    def _add_records(self, change: Change, versions: Sequence[Version]) -> None:
        for version in versions:
            if self._index.get(_key(version), _Record) is None:
                change.set(_key(version), _Record(version, change.next_generation))

    def _deploy(self, change: Change, versions: Sequence[Version], as_: Role, share: float) -> None:
        assert len({v.model for v in versions}) == len(versions)
        for version in versions:
            self._usable(version.model, version.version)
            self._check_same(version)
            course = self._course(version.model)
            now = None if course is None else course.now
            to = deployed(version.model, now, version.version, as_, share)
            change.set(f"rollout/{version.model}", self._moved(version.model, course, to))
        self.attempts.forget(change, versions)

    def _sweep(self) -> None:
        self._contents.sweep({r.version.digest for r in self._records().values() if not r.retired})

    def _records(self) -> dict[str, _Record]:
        """Return the records of all versions by `model/version`."""
        return self._index.under("version/", _Record)

    def _of_model(self, model: str) -> list[_Record]:
        """Return the records of a model in the order in which they were added. Raises `NotFound`."""
        records = self._index.under(f"version/{model}/", _Record)
        if not records:
            raise NotFound(f"no model `{model[:80]}`" + did_you_mean(model[:80], self.models()))
        return sorted(records.values(), key=lambda record: record.added)

    def _record(self, model: str, version: str) -> _Record:
        """Return the record of a version. Raises `NotFound`."""
        record = self._index.get(f"version/{model}/{version}", _Record)
        if record is None:
            known = [one.version.version for one in self._of_model(model)]
            raise NotFound(f"no version `{version[:80]}` of model `{model}`" + did_you_mean(version[:80], known))
        return record

    def _usable(self, model: str, version: str) -> _Record:
        """Return the record of a version that may be live. Raises `NotFound`, `VersionRetired`."""
        record = self._record(model, version)
        if record.retired:
            raise _retired(record.version)
        return record

    def _check_same(self, version: Version) -> None:
        """Raise `VersionExists` or `VersionRetired` if the version is there and must not be added or deployed so."""
        record = self._index.get(_key(version), _Record)
        if record is None:
            return
        if record.version.digest != version.digest:
            raise VersionExists(
                f"{version.subject}: its content (the whole file and its artifacts) is {version.digest[:12]}, and "
                f"since {record.version.created} there is one with the content {record.version.digest[:12]}; a version "
                "never changes; give this content another, or none to be named by it"
            )
        if record.retired:
            raise _retired(version)

    def _course(self, model: str) -> Course | None:
        return self._index.get(f"rollout/{model}", Course)

    def _live(self, model: str) -> Course:
        """Return the course of a model. Raises `NotFound`, or `RolloutRefused` if nothing of it is live."""
        course = self._course(model)
        if course is None:
            self._of_model(model)
            raise RolloutRefused(f"model `{model}`: no version of it is live; deploy one first")
        return course

    def _moved(self, model: str, course: Course | None, to: Roles) -> Course:
        """Return the course of a model with the next rollout. Raises `RolloutRefused` if that asks for another id."""
        if course is None:
            return Course(to)
        champion = self._record(model, course.now.champion).version
        for name in to.live.values():
            new = self._record(model, name).version
            if new.key_fields != champion.key_fields:
                raise RolloutRefused(
                    f"{new.subject}: its id is {_shown(new.key_fields)}, that of the live version `{champion.version}` "
                    f"is {_shown(champion.key_fields)}; another id is another model: give it another name"
                )
        return course.changed(to)

    def _rollout(self, model: str, roles: Roles) -> Rollout:
        live = {role: self._record(model, name).version for role, name in roles.live.items()}
        champion = live["champion"]
        pool = roles.pool if roles.pool is not None else champion.pool
        return Rollout(model, champion, live.get("canary"), roles.share, live.get("shadow"), pool)


#: The first part of every key.
_KEYS = frozenset(
    {"format", "generation", "version", "rollout", "report", "attempt", "view", "backfill", "ingress", "forget"}
)


def _key(version: Version) -> str:
    return f"version/{version.model}/{version.version}"


def _retired(version: Version) -> VersionRetired:
    return VersionRetired(
        f"{version.subject}: it has been retired, and is never served again; give the content another version"
    )


def _shown(key_fields: Mapping[str, str]) -> str:
    return ", ".join(f"`{name}` ({kind})" for name, kind in key_fields.items())


def check_registry(folder: Path) -> list[str]:
    """Return what `Registry.check` says of a registry that nobody has open, and change nothing of it: SQLite writes
    beside what it reads, so its index is looked at in a copy."""
    with tempfile.TemporaryDirectory(prefix="millpond-") as name:
        copy = Path(name)
        shutil.copytree(folder / "index", copy / "index")
        (copy / "versions").symlink_to(folder.absolute() / "versions")
        try:
            registry = Registry(copy)
            try:
                wrong = registry.check()
            finally:
                registry.close()
        except MillpondError as error:
            wrong = [error.message]
    return [line.replace(name, str(folder)) for line in wrong]
