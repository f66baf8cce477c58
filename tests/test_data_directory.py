# ruff: noqa: E501  (messages stand whole)
"""A start on a data directory that is not as it was left: refused before anything runs, nothing in it changed, and
taken again when it is mended. Ray is not started: up to there it does not matter."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from apps import DEFINITION
from test_manifest import content, held_by_another_process, swap

from millpond.cluster import cluster as module
from millpond.cluster.cluster import Cluster
from millpond.cluster.config import Config
from millpond.feature_actors import manifest
from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.manifest import shard_dir
from millpond.feature_actors.memory_folder import MemoryFolder
from millpond.feature_actors.server import ShardServer, ShardSpec
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.socket_calls import socket_path
from millpond.models.definition import Definition


class Started(BaseException):
    """Everything that could be refused has been taken."""


@pytest.fixture(autouse=True, scope="module")
def without_ray() -> Iterator[None]:
    def start(self: Any) -> None:
        raise Started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.EmbeddedCluster, "start", start)
        patch.setattr(module, "warm_kernels", lambda: None)
        patch.setattr(manifest, "SHARD_WAIT_S", 0.1)
        patch.setattr(manifest, "_DIRECTORY_WAIT_S", 0.1)
        yield


def started(config: Config, definition: str = DEFINITION) -> None:
    with pytest.raises(Started):
        Cluster(config, [Definition("apps.py", definition)]).start(models=False)


def refused(config: Config, message: str, definition: str = DEFINITION) -> None:
    """The start is refused with that message, and the directory is as before."""
    before = content(config.directory)
    with pytest.raises(MillpondError, match=message) as caught:
        Cluster(config, [Definition("apps.py", definition)]).start(models=False)
    assert type(caught.value).__reduce__ is MillpondError.__reduce__
    assert content(config.directory) == before


@pytest.fixture
def config(left: Path, tmp_path: Path) -> Config:
    shutil.copytree(left, tmp_path / "dev")
    return Config(name="dev", data_dir=str(tmp_path), shards=2, slots=16, port=0)


@pytest.fixture(scope="module")
def left(without_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of a cluster of two shards that have run, each with a snapshot."""
    config = Config(name="dev", data_dir=str(tmp_path_factory.mktemp("left")), shards=2, slots=16, port=0)
    started(config)
    cluster = Cluster(config, [Definition("apps.py", DEFINITION)])
    layout = cluster.layout
    made = manifest.Manifest.open(config.directory, config.name, config.slots)
    memory = Path(tempfile.mkdtemp(prefix="mp-"))  # short: a socket's path is
    spec = ShardSpec(
        cluster_name=config.name, namespace="none", run_id=uuid.uuid4().hex, data_dir=str(config.directory),
        sources=tuple(layout.sources.values()), views=tuple(layout.views.values()), shard_map=ShardMap.even(16, 2),
        hash_seed=made.hash_seed, dedupe_horizon_ms=86_400_000, memory_dir=str(memory), memory_bytes_max=1 << 28,
        strings_max=1_000, reclaim_margin_ms=660_000, durability="sync", cluster_id=made.cluster_id, history_uri=None,
        history_part_bytes=1 << 30, snapshot_bytes=1 << 30, disk_free_bytes_min=0, queue_bytes_max=1 << 30,
    )  # fmt: skip
    for shard in range(2):
        server = ShardServer(spec, shard, lambda: pytest.fail("no peers"))  # type: ignore[arg-type]
        server.called("ready", []).result(30)
        server.called("drain", []).result(30)
        server.close()
    del server
    gc.collect()
    deadline = time.monotonic() + 30
    while any(config.directory.glob("shards/*/log/*-wal")):  # until its threads have closed the logs
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shutil.rmtree(memory)
    return config.directory


def test_what_a_start_leaves_is_taken_by_the_next(config: Config) -> None:
    assert sorted(p.name for p in config.directory.iterdir()) == [
        "admin_token", "forget.key", "manifest.json", "registry", "shards", "sources.json",
    ]  # fmt: skip

    def but_the_registry() -> dict[str, Any]:  # its database notes that it was opened
        return {name: one for name, one in content(config.directory).items() if not name.startswith("registry")}

    before = but_the_registry()
    started(config)
    assert but_the_registry() == before


ATTACKS: list[tuple[str, Any, str]] = [
    ("all shards deleted", lambda d: shutil.rmtree(d / "shards"), "`{d}/shards/000/epoch.json` is missing, and shard 0 has a log; is the right disk there?"),
    ("a shard deleted", lambda d: shutil.rmtree(shard_dir(d, 1)), "`{d}/shards/001/epoch.json` is missing, and shard 1 has a log; is the right disk there?"),
    ("a log deleted, its snapshots left", lambda d: shutil.rmtree(shard_dir(d, 1) / "log"), "the log `{d}/shards/001/log/cache.db` is missing or empty, and `{d}/shards/001/snapshots` is there; is the right disk there?"),
    ("shards swapped", swap, "`{d}/shards/000` is that of shard 1; folders of shards are not to be renamed; put each in its place"),
    ("a shard of another cluster", lambda d: edit(shard_dir(d, 0) / "epoch.json", cluster_id="f00"), "`{d}/shards/000` is of the cluster with id `f00`, this one has id "),
    ("manifest of another cluster", lambda d: edit(d / "manifest.json", cluster_name="staging"), "`{d}/manifest.json` has cluster_name 'staging', the configuration says 'dev'; it is fixed when the directory is made"),
    ("manifest of a later format", lambda d: edit(d / "manifest.json", format=2), "`{d}/manifest.json` has format 2; this version reads 1; start the version that wrote it"),
    ("manifest deleted", lambda d: (d / "manifest.json").unlink(), "`{d}` has no manifest but holds `admin_token`; name an empty directory"),
    ("manifest damaged", lambda d: (d / "manifest.json").write_bytes(b"\0" * 99), "`{d}/manifest.json` cannot be read: "),
    ("sources of a later format", lambda d: edit(d / "sources.json", format=2), "`{d}/sources.json` has format 2; this version reads 1; start the version that wrote it"),
    ("sources damaged", lambda d: (d / "sources.json").write_text("{"), "`{d}/sources.json` cannot be read: "),
    ("an epoch damaged", lambda d: (shard_dir(d, 1) / "epoch.json").write_text("{}"), "`{d}/shards/001/epoch.json` is damaged: its `cluster_id` is missing or wrong"),
    ("a file in place of a folder", lambda d: (shutil.rmtree(shard_dir(d, 1)), shard_dir(d, 1).write_text("")), "`{d}/shards/001/epoch.json` is missing, and shard 1 has a log; is the right disk there?"),
    ("no lock can be made", lambda d: (d / "lock").mkdir(), "`{d}` cannot be written: Is a directory; make it writable, or name another with `data_dir`"),
]  # fmt: skip


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(("attack", "message"), [a[1:] for a in ATTACKS], ids=[a[0] for a in ATTACKS])
def test_a_directory_that_is_not_as_it_was_left_is_refused_until_it_is(
    attack: Any, message: str, config: Config, tmp_path: Path
) -> None:
    directory, copy = config.directory, tmp_path / "copy"
    shutil.copytree(directory, copy)
    attack(directory)
    refused(config, f"^data directory: {re.escape(message.format(d=directory))}")
    shutil.rmtree(directory)
    shutil.copytree(copy, directory)
    started(config)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    config = Config(name="dev", data_dir=str(tmp_path), port=0)
    config.directory.write_text("x")
    with pytest.raises(MillpondError, match=f"^data directory: `{config.directory}` cannot be made: File exists; "):
        Cluster(config, [Definition("apps.py", DEFINITION)]).start(models=False)
    assert config.directory.read_text() == "x"
    config.directory.unlink()
    started(config)


def test_another_configuration_is_refused(config: Config) -> None:
    refused(dataclasses.replace(config, slots=32), "has n_slots 16, the configuration says 32")
    refused(dataclasses.replace(config, shards=3), "holds logs of 2 shards, the configuration says 3")
    refused(dataclasses.replace(config, durability="none"), "holds logs, and `durability` is `none`, which would begin")
    started(config)


def test_a_source_that_old_events_cannot_be_read_by_is_refused(config: Config) -> None:
    assert '"price": "float64"' in DEFINITION
    refused(
        config,
        "^source `purchases`: field `price` was `float64` and is `int64`; that is a new source: give it another name$",
        DEFINITION.replace('"price": "float64"', '"price": "int64"'),
    )
    started(config)


def test_without_a_log_sources_may_change_as_they_like(tmp_path: Path) -> None:
    config = Config(name="dev", data_dir=str(tmp_path), port=0, durability="none")
    for kind in ("float64", "int64"):
        started(config, DEFINITION.replace('"price": "float64"', f'"price": "{kind}"'))
    assert not (config.directory / "sources.json").exists()


@pytest.mark.parametrize("url", [(), ("http://127.0.0.1:8000",)])
def test_a_second_start_is_refused_and_names_the_first(url: tuple[str, ...], config: Config) -> None:
    runs = f"runs on {config.directory} already, at {url[0]}" if url else f"is starting on {config.directory} just now"
    with held_by_another_process(config.directory, "cluster", *url) as first:
        refused(config, rf"^cluster `dev` {runs} \(process {first.pid}, since 2.* UTC\); ")
    started(config)


def test_a_shard_process_that_outlives_its_killed_cluster_keeps_the_next_from_starting(config: Config) -> None:
    with held_by_another_process(config.directory, "1") as survivor:
        refused(
            config, rf"^shard 001: `{shard_dir(config.directory, 1)}` is still in use by cluster `dev` \(process {survivor.pid}, since "
        )  # fmt: skip
    started(config)


def test_a_cluster_that_is_started_twice_goes_on(config: Config) -> None:
    """The second start of the same object is refused as any other; it does not stop the first."""
    cluster = Cluster(config, [Definition("apps.py", DEFINITION)])
    with pytest.MonkeyPatch.context() as runs:
        runs.setattr(module.EmbeddedCluster, "start", lambda self: None)
        runs.setattr(Cluster, "_start_shards", lambda *_: None)
        runs.setattr(Cluster, "_run_apps", lambda *_: None)
        runs.setattr(Cluster, "_state", lambda *_: {})
        cluster.start(models=False)
        before = content(config.directory)
        assert json.loads((config.directory / "lock").read_text())["url"] == cluster.url
        with pytest.raises(Unavailable, match=r"^cluster `dev` runs on .* already, at http"):
            cluster.start(models=False)
        assert content(config.directory) == before
    cluster.stop()
    assert "lock" not in content(config.directory)
    started(config)


def test_an_admin_token_that_was_never_written_is_made_anew_and_one_that_was_stays(config: Config) -> None:
    path = config.directory / "admin_token"
    before = path.read_text()
    started(config)
    assert path.read_text() == before
    path.write_text("")  # by a loss of power, or on a full disk
    started(config)
    assert len(path.read_text()) == len(before)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_stop_that_fails_at_one_thing_does_the_others(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any) -> None:
        raise RuntimeError("Ray does not end")

    monkeypatch.setattr(module.EmbeddedCluster, "stop", stop)
    cluster = Cluster(config, [Definition("apps.py", DEFINITION)])
    with pytest.raises(RuntimeError, match="Ray does not end"):
        cluster.start(models=False)
    assert cluster.registry is None
    monkeypatch.undo()
    started(config)  # the lock is let go


def test_a_stop_that_is_asked_for_again_waits_for_no_snapshot(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(config, [Definition("apps.py", DEFINITION)])
    asked: list[int] = []
    with tempfile.TemporaryDirectory(prefix="mp-") as folder, socket.socket(socket.AF_UNIX) as shard:
        memory = MemoryFolder(uuid.uuid4().hex, config.directory, folder)
        shard.bind(str(socket_path(memory.path, 0)))  # one that never answers
        shard.listen()
        shard.settimeout(30)
        cluster._memory, cluster.spec = memory, SimpleNamespace(shard_map=ShardMap.even(16, 1))  # type: ignore[assignment]
        stopping = threading.Thread(target=cluster._drain_shards, args=(asked,))
        stopping.start()
        connection, _ = shard.accept()
        asked.append(signal.SIGINT)
        stopping.join(30)
        assert not stopping.is_alive()
        connection.close()
        memory.remove()
    assert "stopping without a snapshot: asked to end a second time" in caplog.text
