# ruff: noqa: E501  (messages stand whole)
"""The manifest: a data directory belongs to one cluster, and a shard that was restarted knows it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from millpond.feature_actors import manifest as module
from millpond.feature_actors.keys import KEY_HASH_VERSION
from millpond.feature_actors.manifest import (
    Manifest,
    ManifestError,
    Opening,
    check_logs,
    open_shard,
    shard_dir,
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
    refused(tmp_path, f"data directory: `{tmp_path / 'manifest.json'}` has format {version!r}; this version reads 1")


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
    change(tmp_path, hash_seed=1, more=2)
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
    Manifest.open(tmp_path, "dev", 64)
    open_shard(tmp_path, 0, "run")
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


def test_each_opening_of_a_shard_is_counted(tmp_path: Path) -> None:
    openings = [open_shard(tmp_path, 3, run) for run in ("a", "b", "c")]
    assert openings == [Opening(1, False), Opening(2, False), Opening(3, False)]
    assert json.loads((tmp_path / "shards" / "003" / "epoch.json").read_text()) == {"epoch": 3, "run": "c"}


def test_a_shard_that_its_own_run_opens_again_is_told(tmp_path: Path) -> None:
    assert open_shard(tmp_path, 0, "a") == Opening(1, False)
    assert open_shard(tmp_path, 0, "a") == Opening(2, True)
    assert open_shard(tmp_path, 0, "a") == Opening(3, True)  # and again, after a second restart
    assert open_shard(tmp_path, 1, "a") == Opening(1, False)  # another shard is not
    assert open_shard(tmp_path, 0, "b") == Opening(4, False)  # a new run starts empty and knows it


def test_a_damaged_epoch_is_an_error_and_never_a_first_opening(tmp_path: Path) -> None:
    open_shard(tmp_path, 0, "a")
    path = tmp_path / "shards" / "000" / "epoch.json"
    for damage in ("", "{", "[]", "{}", '{"epoch": "x", "run": "a"}', '{"epoch": null, "run": "a"}', '{"run": "a"}'):
        path.write_text(damage)
        with pytest.raises(ManifestError, match=re.escape(str(path))):
            open_shard(tmp_path, 0, "a")
        assert path.read_text() == damage


def test_logs_are_opened_by_as_many_shards_as_wrote_them_and_never_passed_over(tmp_path: Path) -> None:
    check_logs(tmp_path, 3, logged=False)
    for n_shards in (3, 2):  # until there is a log, the number can be another
        check_logs(tmp_path, n_shards, logged=True)
    (shard_dir(tmp_path, 0) / "log").mkdir(parents=True)  # a start that was killed may have made one of them
    check_logs(tmp_path, 2, logged=True)
    with pytest.raises(ManifestError, match="holds logs of 2 shards, the configuration says 3"):
        check_logs(tmp_path, 3, logged=True)
    with pytest.raises(ManifestError, match="holds logs, and `durability` is `none`, which would begin without"):
        check_logs(tmp_path, 2, logged=False)
