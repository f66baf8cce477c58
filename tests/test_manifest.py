# ruff: noqa: E501  (messages stand whole)
"""The manifest: a data directory belongs to one cluster, and a shard that was restarted knows it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from millpond.feature_actors import lock as lock_module
from millpond.feature_actors import manifest as module
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.keys import KEY_HASH_VERSION
from millpond.feature_actors.lock import FileLock, LockHeld
from millpond.feature_actors.manifest import (
    Manifest,
    ManifestError,
    Opening,
    begin_anew,
    check_shards,
    lock_directory,
    lock_shard,
    make_shards,
    note_log,
    open_shard,
    shard_dir,
    wait_for_shards,
    write_json,
)


def refused(directory: Path, message: str, name: str = "dev", slots: int = 64) -> None:
    with pytest.raises(ManifestError, match=f"^{re.escape(message)}"):
        Manifest.open(directory, name, slots)


def change(directory: Path, **values: Any) -> None:
    path = directory / "manifest.json"
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_new_directory_gets_a_manifest_and_keeps_it(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    made = Manifest.open(directory, "dev", 64)
    assert (made.cluster_name, made.n_slots, made.key_hash_version, made.format) == ("dev", 64, KEY_HASH_VERSION, 1)
    assert re.fullmatch("[0-9a-f]{32}", made.cluster_id)
    assert Manifest.open(directory, "dev", 64) == made
    assert (directory.stat().st_mode & 0o777, (directory / "manifest.json").stat().st_mode & 0o777) == (0o700, 0o600)
    assert [p.name for p in directory.iterdir()] == ["manifest.json"]


def test_two_clusters_have_ids_and_seeds_of_their_own(tmp_path: Path) -> None:
    one, two = (Manifest.open(tmp_path / name, "dev", 64) for name in ("one", "two"))
    assert one.cluster_id != two.cluster_id
    assert one.hash_seed != two.hash_seed
    assert 0 <= one.hash_seed < 2**64


def test_a_directory_of_another_cluster_or_with_other_slots_is_refused(tmp_path: Path) -> None:
    Manifest.open(tmp_path, "dev", 64)
    fixed = "it is fixed when the directory is made"
    path = tmp_path / "manifest.json"
    refused(
        tmp_path,
        f"data directory: `{path}` has cluster_name 'dev', the configuration says 'staging'; {fixed}",
        "staging",
    )
    refused(tmp_path, f"data directory: `{path}` has n_slots 64, the configuration says 32; {fixed}", slots=32)
    change(tmp_path, key_hash_version=KEY_HASH_VERSION + 1)
    refused(
        tmp_path,
        f"data directory: `{path}` has key_hash_version {KEY_HASH_VERSION + 1}, the configuration says {KEY_HASH_VERSION}; {fixed}",
    )


@pytest.mark.parametrize("version", [2, "1", 0])
def test_a_manifest_of_another_format_is_refused_before_its_fields_are_read(tmp_path: Path, version: Any) -> None:
    Manifest.open(tmp_path, "dev", 64)
    change(tmp_path, format=version, cluster_name=None, something="new")
    refused(
        tmp_path,
        f"data directory: `{tmp_path / 'manifest.json'}` has format {version!r}; this version reads 1; start the version that wrote it",
    )


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"format": 1', b"\0" * 200])
def test_a_damaged_manifest_is_refused_and_left_as_it_is(tmp_path: Path, damage: bytes) -> None:
    Manifest.open(tmp_path, "dev", 64)
    path = tmp_path / "manifest.json"
    path.write_bytes(damage)
    refused(tmp_path, f"data directory: `{path}` cannot be read: ")
    assert path.read_bytes() == damage


def test_a_manifest_that_is_no_object_or_has_other_fields_is_refused(tmp_path: Path) -> None:
    Manifest.open(tmp_path, "dev", 64)
    change(tmp_path, hash_seed=None)
    refused(tmp_path, f"data directory: `{tmp_path / 'manifest.json'}` is damaged: ")
    change(tmp_path, hash_seed=1, log_shards="2")
    refused(tmp_path, f"data directory: `{tmp_path / 'manifest.json'}` is damaged: `log_shards` is '2'")
    change(tmp_path, log_shards=0, more=2)
    refused(tmp_path, f"data directory: `{tmp_path / 'manifest.json'}` is damaged: ")
    (tmp_path / "manifest.json").write_text("[1]")
    refused(tmp_path, f"data directory: `{tmp_path / 'manifest.json'}` is damaged: expected an object")


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    refused(tmp_path, f"data directory: `{tmp_path}` has no manifest but holds `thesis.tex`; name an empty directory")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("below", [".", "a/b"])
def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    directory = tmp_path / "file" / below
    refused(directory, f"data directory: `{directory}` cannot be made: ")


def test_shards_without_a_manifest_are_refused(tmp_path: Path) -> None:
    logged_cluster(tmp_path)
    (tmp_path / "manifest.json").unlink()
    refused(tmp_path, f"data directory: `{tmp_path}` has no manifest but holds `shards`; name an empty directory")


@pytest.mark.parametrize("name", ["run", "datasets", "demo"])
def test_what_a_start_makes_before_the_manifest_may_be_there(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert Manifest.open(tmp_path, "dev", 64).n_slots == 64


def test_what_a_start_that_was_killed_left_of_a_manifest_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".manifest.json.4711").write_text("half of i")
    assert Manifest.open(tmp_path, "dev", 64).n_slots == 64
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("name", [".manifest.json.bak", "manifest.json.1", ".other.json.1", "kernels"])
def test_what_only_looks_like_a_start_of_ours_is_not_touched(tmp_path: Path, name: str) -> None:
    for one in (name, ".manifest.json.4711"):
        (tmp_path / one).write_text("x")
    tmp_path.chmod(0o755)
    refused(tmp_path, f"data directory: `{tmp_path}` has no manifest but holds `{name}`; name an empty directory")
    assert {p.name for p in tmp_path.iterdir()} == {name, ".manifest.json.4711"}
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_a_directory_that_was_made_as_the_parent_of_another_is_made_private(tmp_path: Path) -> None:
    directory = tmp_path / "dev"
    (directory / "run").mkdir(parents=True)
    directory.chmod(0o755)
    Manifest.open(directory, "dev", 64)
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_private_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    refused(
        tmp_path,
        f"data directory: `{tmp_path}` cannot be made private: Operation not permitted; name another with `data_dir`",
    )


def test_a_manifest_that_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash at any step leaves the old file or the new one, whole."""
    path = tmp_path / "x.json"
    write_json(path, {"n": 1})

    def crash(*_: Any) -> None:
        raise OSError("no space left on device")

    for step in ("fsync", "fdopen"):
        with monkeypatch.context() as broken:
            broken.setattr(module.os, step, crash)
            with pytest.raises(OSError, match="no space"):
                write_json(path, {"n": 2})
        assert json.loads(path.read_text()) == {"n": 1}
    write_json(path, {"n": 3})
    assert json.loads(path.read_text()) == {"n": 3}


def test_a_file_is_synced_before_it_takes_its_name_and_then_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def spy_fsync(fd: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        fsync(fd)

    def spy_rename(self: Path, target: Any) -> Any:
        steps.append(f"rename {self.name} to {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(module.os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    write_json(tmp_path / "x.json", {})
    beside = f".x.json.{os.getpid()}"
    assert steps == [f"sync {beside}", f"rename {beside} to x.json", f"sync {tmp_path.name}"]


def test_what_an_earlier_crash_left_beside_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / f".x.json.{os.getpid()}").write_text("half of i" * 100)
    write_json(tmp_path / "x.json", {"n": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


# -- epochs


def opened(directory: Path, shard: int, run: str, *, logged: bool = False) -> Opening:
    return open_shard(directory, shard, run, "c1", logged=logged)


def epoch_of(directory: Path, shard: int = 0) -> dict[str, Any]:
    return json.loads((shard_dir(directory, shard) / "epoch.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A directory whose shards have no logs: their folders are made as they are locked."""
    for shard in (0, 1, 3):
        lock_shard(tmp_path, shard, "dev", logged=False).release()
    return tmp_path


def test_each_opening_of_a_shard_is_counted(shards: Path) -> None:
    openings = [opened(shards, 3, run) for run in ("a", "b", "c")]
    assert openings == [Opening(1, False), Opening(2, False), Opening(3, False)]
    assert epoch_of(shards, 3) == {"cluster_id": "c1", "shard": 3, "epoch": 3, "run": "c", "log_end": None}


def test_a_shard_that_its_own_run_opens_again_is_told(shards: Path) -> None:
    assert opened(shards, 0, "a") == Opening(1, False)
    assert opened(shards, 0, "a") == Opening(2, True)
    assert opened(shards, 0, "a") == Opening(3, True)  # and again, after a second restart
    assert opened(shards, 1, "a") == Opening(1, False)  # another shard is not
    assert opened(shards, 0, "b") == Opening(4, False)  # a new run starts empty and knows it


def test_a_damaged_epoch_is_an_error_and_never_a_first_opening(shards: Path) -> None:
    opened(shards, 0, "a")
    path = shards / "shards" / "000" / "epoch.json"
    whole = epoch_of(shards)
    wrong = [{"epoch": "x"}, {"epoch": None}, {"epoch": True}, {"run": 1}, {"log_end": "0"}, {"shard": None}]
    lacking = [{k: v for k, v in whole.items() if k != name} for name in whole]
    for damage in ("", "{", "[]", "{}", *map(json.dumps, [*({**whole, **w} for w in wrong), *lacking])):
        path.write_text(damage)
        with pytest.raises(ManifestError, match=re.escape(str(path))):
            opened(shards, 0, "a")
        assert path.read_text() == damage


# -- a shard never begins empty where data was

RESTORE = "restore the directory from a copy, or begin anew in another (setting `name` or `data_dir`)"


def content(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory."""
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*"))
    }


def logged_cluster(directory: Path, n_shards: int = 2) -> Manifest:
    """A data directory whose shards have logs of 10 records, as two runs have left it."""
    made = Manifest.open(directory, "dev", 64)
    make_shards(directory, made, n_shards)
    for end in (0, 10):
        for shard in range(n_shards):
            open_shard(directory, shard, "run", made.cluster_id, logged=True)
            log = shard_dir(directory, shard) / "log"
            log.mkdir(exist_ok=True)
            (log / "cache.db").write_text("records")
            note_log(directory, shard, made.cluster_id, end)
    return Manifest.open(directory, "dev", 64)


def test_the_number_of_logs_is_counted_when_their_folders_are_there_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that is killed at any step leaves what the next one goes on with, also with another number."""
    made = Manifest.open(tmp_path, "dev", 64)
    written: list[Path] = []

    class Killed(BaseException):
        pass

    def kill_at(step: int) -> Any:
        def write(path: Path, content: Any, mode: int = 0o600) -> None:
            if len(written) == step:
                raise Killed
            written.append(path)
            write_json(path, content, mode)

        return write

    for step in range(3):
        written.clear()
        with monkeypatch.context() as killed:
            killed.setattr(module, "write_json", kill_at(step))
            with pytest.raises(Killed):
                make_shards(tmp_path, made, 3)
        assert Manifest.open(tmp_path, "dev", 64).log_shards == 0
        check_shards(tmp_path, made, 2, logged=True)
        check_shards(tmp_path, made, 2, logged=False)
    make_shards(tmp_path, made, 3)
    counted = Manifest.open(tmp_path, "dev", 64)
    assert (counted.log_shards, counted.cluster_id, counted.hash_seed) == (3, made.cluster_id, made.hash_seed)
    check_shards(tmp_path, counted, 3, logged=True)
    before = content(tmp_path)
    make_shards(tmp_path, counted, 3)
    assert content(tmp_path) == before


def test_logs_are_opened_by_as_many_shards_as_wrote_them_and_never_passed_over(tmp_path: Path) -> None:
    manifest = logged_cluster(tmp_path)
    check_shards(tmp_path, manifest, 2, logged=True)
    with pytest.raises(ManifestError, match="holds logs of 2 shards, the configuration says 3"):
        check_shards(tmp_path, manifest, 3, logged=True)
    with pytest.raises(ManifestError, match="holds logs, and `durability` is `none`, which would begin without"):
        check_shards(tmp_path, manifest, 2, logged=False)


def swap(directory: Path) -> None:
    one, two = shard_dir(directory, 0), shard_dir(directory, 1)
    aside = directory / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def of_another_cluster(directory: Path) -> None:
    shutil.rmtree(shard_dir(directory, 1))
    logged_cluster(directory.parent / "other")
    shutil.copytree(shard_dir(directory.parent / "other", 1), shard_dir(directory, 1))


def without_log(directory: Path) -> None:
    """As a first start that was killed leaves it; but there is a snapshot."""
    folder = shard_dir(directory, 1)
    shutil.rmtree(folder / "log")
    write_json(folder / "epoch.json", epoch_of(directory, 1) | {"log_end": None})
    (folder / "snapshots").mkdir()


LOSSES: list[tuple[str, Any, str]] = [
    ("all folders of shards deleted", lambda d: shutil.rmtree(d / "shards"), "`{d}/shards/000/epoch.json` is missing, and shard 0 has a log; is the right disk there? Otherwise " + RESTORE),
    ("a folder deleted", lambda d: shutil.rmtree(shard_dir(d, 1)), "`{d}/shards/001/epoch.json` is missing, and shard 1 has a log; is the right disk there? Otherwise " + RESTORE),
    ("an empty disk in its place", lambda d: (shutil.rmtree(shard_dir(d, 1)), shard_dir(d, 1).mkdir()), "`{d}/shards/001/epoch.json` is missing, and shard 1 has a log; is the right disk there? Otherwise " + RESTORE),
    ("swapped", swap, "`{d}/shards/000` is that of shard 1; folders of shards are not to be renamed; put each in its place"),
    ("of another cluster", of_another_cluster, "`{d}/shards/001` is of the cluster with id `"),
    ("log deleted", lambda d: shutil.rmtree(shard_dir(d, 1) / "log"), "the log `{d}/shards/001/log/cache.db` is missing or empty, and it had been made; is the right disk there? Otherwise " + RESTORE),
    ("log emptied", lambda d: (shard_dir(d, 0) / "log" / "cache.db").write_text(""), "the log `{d}/shards/000/log/cache.db` is missing or empty, and it had been made; "),
    ("log deleted, snapshots left", without_log, "the log `{d}/shards/001/log/cache.db` is missing or empty, and `{d}/shards/001/snapshots` is there; "),
]  # fmt: skip


@pytest.mark.parametrize(("lose", "message"), [x[1:] for x in LOSSES], ids=[x[0] for x in LOSSES])
def test_what_was_lost_is_refused_by_the_start_and_by_the_shard_until_it_is_back(
    lose: Any, message: str, tmp_path: Path
) -> None:
    directory = tmp_path / "dev"
    manifest = logged_cluster(directory)
    shutil.copytree(directory, tmp_path / "copy")
    lose(directory)
    before = content(directory)
    message = f"^{re.escape('data directory: ' + message.format(d=directory))}"
    with pytest.raises(ManifestError, match=message):
        check_shards(directory, manifest, 2, logged=True)

    def open_all() -> None:
        for shard in range(2):
            open_shard(directory, shard, "next", manifest.cluster_id, logged=True)

    with pytest.raises(ManifestError, match=message):
        open_all()
    after = content(directory)
    fine = "shards/000/epoch.json"  # shard 0 may have been
    assert {**after, fine: None} == {**before, fine: None}
    shutil.rmtree(directory)
    shutil.copytree(tmp_path / "copy", directory)
    check_shards(directory, manifest, 2, logged=True)
    open_all()


def test_logs_that_the_manifest_does_not_know_are_refused(tmp_path: Path) -> None:
    logged_cluster(tmp_path)
    change(tmp_path, log_shards=0)
    with pytest.raises(ManifestError, match="holds logs, and its manifest says that no shard has one"):
        check_shards(tmp_path, Manifest.open(tmp_path, "dev", 64), 2, logged=True)


def test_a_log_that_ends_before_where_it_went_is_refused(tmp_path: Path) -> None:
    manifest = logged_cluster(tmp_path)
    message = f"the log in `{shard_dir(tmp_path, 0)}` ends at offset 9, and it went to 10 at least; {RESTORE}"
    with pytest.raises(ManifestError, match=re.escape(message)):
        note_log(tmp_path, 0, manifest.cluster_id, 9)
    note_log(tmp_path, 0, manifest.cluster_id, 12, sure_to=0)  # what is not synced may go with the power
    note_log(tmp_path, 0, manifest.cluster_id, 3)


def test_a_start_that_was_killed_before_the_log_was_noted_is_gone_on_with(tmp_path: Path) -> None:
    manifest = Manifest.open(tmp_path, "dev", 64)
    make_shards(tmp_path, manifest, 1)
    opened_by = [open_shard(tmp_path, 0, run, manifest.cluster_id, logged=True).epoch for run in "ab"]
    (shard_dir(tmp_path, 0) / "log").mkdir()
    (shard_dir(tmp_path, 0) / "log" / "cache.db").write_text("made")
    opened_by.append(open_shard(tmp_path, 0, "c", manifest.cluster_id, logged=True).epoch)
    assert opened_by == [1, 2, 3]


def test_what_is_begun_anew_is_as_new_and_keeps_its_identity(tmp_path: Path) -> None:
    begin_anew(tmp_path)
    assert content(tmp_path) == {}
    manifest = logged_cluster(tmp_path)
    (tmp_path / "history").mkdir()
    (tmp_path / "sources.json").write_text("{}")
    (tmp_path / "demo").mkdir()
    begin_anew(tmp_path)
    assert sorted(content(tmp_path)) == ["demo", "manifest.json"]
    assert Manifest.open(tmp_path, "dev", 64) == dataclasses.replace(manifest, log_shards=0)
    assert logged_cluster(tmp_path, 3).log_shards == 3


# -- locks

SINCE = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"

HOLDER = """
import sys, pathlib
from millpond.feature_actors import manifest
directory, what = pathlib.Path(sys.argv[1]), sys.argv[2]
lock = (
    manifest.lock_directory(directory, "dev") if what == "cluster"
    else manifest.lock_shard(directory, int(what), "dev", logged=True)
)
if len(sys.argv) > 3:
    lock.say(url=sys.argv[3])
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another_process(directory: Path, what: str, *url: str) -> Iterator[subprocess.Popen[str]]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), what, *url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def test_a_directory_that_is_held_names_its_holder_until_that_is_killed(tmp_path: Path) -> None:
    directory = tmp_path / "dev"
    with held_by_another_process(directory, "cluster") as holder:
        before = content(directory)
        starting = (
            f"^cluster `dev` is starting on {directory} just now \\(process {holder.pid}, {SINCE}\\); wait for it, end "
            "that process, or give this one another name$"
        )
        with pytest.raises(Unavailable, match=starting):
            lock_directory(directory, "dev", wait_s=0.1)
        assert content(directory) == before
    with held_by_another_process(directory, "cluster", "http://127.0.0.1:8000") as holder:
        runs = (
            f"^cluster `dev` runs on {directory} already, at http://127.0.0.1:8000 \\(process {holder.pid}, {SINCE}\\); "
            "stop it with `millpond down`, or give this one another name$"
        )
        with pytest.raises(Unavailable, match=runs):
            lock_directory(directory, "dev", wait_s=0)
    assert (directory / "lock").exists()  # it was killed
    lock_directory(directory, "dev").release()
    assert content(directory) == {}


def test_of_many_that_start_at_once_one_holds_the_directory(tmp_path: Path) -> None:
    """Each that gets it gives it back at once, and takes the file away: none of the others may hold a file that is gone."""
    inside: list[int] = []
    most = []

    def start(number: int) -> None:
        for _ in range(50):
            lock = FileLock(tmp_path / "lock", wait_s=30)
            inside.append(number)
            most.append(len(inside))
            inside.remove(number)
            lock.release()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start, range(8)))
    assert (len(most), max(most)) == (400, 1)
    assert content(tmp_path) == {}


def test_a_file_that_was_taken_away_as_it_was_locked_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder releases it after the next one has opened the file, and before that one locks it."""
    first = FileLock(tmp_path / "lock")
    flock = lock_module.fcntl.flock

    def released_meanwhile(fd: int, operation: int) -> None:
        first.release()
        flock(fd, operation)

    monkeypatch.setattr(lock_module.fcntl, "flock", released_meanwhile)
    second = FileLock(tmp_path / "lock", wait_s=30)
    with pytest.raises(LockHeld):
        FileLock(tmp_path / "lock")
    second.release()


def test_a_shard_waits_for_its_predecessor_and_names_it_if_it_does_not_end(tmp_path: Path) -> None:
    logged_cluster(tmp_path)
    with held_by_another_process(tmp_path, "1") as holder:
        before = content(tmp_path)
        message = (
            f"^shard 001: `{shard_dir(tmp_path, 1)}` is still in use by cluster `dev` \\(process {holder.pid}, {SINCE}\\); "
            "one process at a time writes to a shard; wait until that one has ended, or end it, and start again$"
        )
        for wait in (
            lambda: lock_shard(tmp_path, 1, "dev", logged=True, wait_s=0.1),
            lambda: wait_for_shards(tmp_path, "dev", wait_s=0.1),
        ):
            with pytest.raises(Unavailable, match=message):
                wait()
        lock_shard(tmp_path, 0, "dev", logged=True, wait_s=0).release()
        assert content(tmp_path) == before
        with ThreadPoolExecutor(2) as pool:
            waiting = [
                pool.submit(wait_for_shards, tmp_path, "dev", 60),
                pool.submit(lock_shard, tmp_path, 1, "dev", logged=True, wait_s=60),
            ]
            assert not any(w.done() for w in waiting)
            holder.kill()
            waiting[1].result(60).release()
            waiting[0].result(60)


def test_a_holder_that_does_not_say_who_it_is_is_an_error_all_the_same(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    for text in ("", "half of i", "[]", "{}"):
        (tmp_path / "lock").write_text(text)
        with pytest.raises(LockHeld) as held:
            FileLock(tmp_path / "lock")
        assert (held.value.holder, held.value.who) == ({}, "a process that does not say which")
    lock.release()
    lock.release()


def test_a_directory_of_something_else_is_not_even_locked(tmp_path: Path) -> None:
    for name, text in (("lock", "of another program"), ("thesis.tex", "x")):
        directory = tmp_path / f"of-{name}"
        directory.mkdir()
        (directory / name).write_text(text)
        with pytest.raises(ManifestError, match=f"has no manifest but holds `{name}`; name an empty directory"):
            lock_directory(directory, "dev")
        assert content(directory) == {name: text.encode()}


def test_what_a_start_that_was_killed_left_of_a_lock_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(json.dumps({"pid": 4711, "since": "then", "name": "dev"}))
    lock = lock_directory(tmp_path, "dev")
    Manifest.open(tmp_path, "dev", 64)
    lock.release()
    assert list(content(tmp_path)) == ["manifest.json"]


def test_a_directory_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    logged_cluster(tmp_path)
    (tmp_path / "lock").mkdir()  # no file can be made there
    message = f"data directory: `{tmp_path}` cannot be written: Is a directory; make it writable, or name another with `data_dir`"
    with pytest.raises(ManifestError, match=f"^{re.escape(message)}$"):
        lock_directory(tmp_path, "dev")
    (shard_dir(tmp_path, 0) / "lock").mkdir()
    message = f"data directory: `{shard_dir(tmp_path, 0)}` cannot be written: Is a directory; {RESTORE}"
    for wait in (
        lambda: lock_shard(tmp_path, 0, "dev", logged=True),
        lambda: wait_for_shards(tmp_path, "dev"),
    ):
        with pytest.raises(ManifestError, match=f"^{re.escape(message)}$"):
            wait()


def test_a_manifest_that_finds_no_room_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    refused(tmp_path, f"data directory: `{tmp_path}` cannot be written: No space left on device; make it writable, or ")


@pytest.mark.skipif(os.geteuid() == 0, reason="everything can be written by root")
def test_a_read_only_directory_is_an_error_and_unchanged(tmp_path: Path) -> None:
    logged_cluster(tmp_path)
    before = content(tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(ManifestError, match="cannot be written: Permission denied"):
        lock_directory(tmp_path, "dev")
    assert content(tmp_path) == before
    tmp_path.chmod(0o700)
    lock_directory(tmp_path, "dev").release()
