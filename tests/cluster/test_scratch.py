"""Temporary folders: kept while the process that made them lives, and taken away by the next one when it was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from millpond.cluster import embedded
from millpond.cluster.embedded import EmbeddedCluster, EmbeddedSettings
from millpond.cluster.scratch import Scratch, remove_abandoned

_KILLED = """
import os, signal, sys
from pathlib import Path
from millpond.cluster.scratch import Scratch
path = Scratch("mp-", Path(sys.argv[1])).path
if len(sys.argv) > 2:
    (path / "run_dir").symlink_to(sys.argv[2])
print(path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path: Path) -> Callable[..., Path]:
    """What a process that was killed has left."""

    def killed(*run_dir: Path) -> Path:
        ran = subprocess.run([sys.executable, "-c", _KILLED, tmp_path, *run_dir], stdout=subprocess.PIPE, check=False)
        assert ran.returncode < 0
        return Path(ran.stdout.decode().strip())

    return killed


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path, killed: Callable[..., Path]) -> None:
    left, wanted, alive = killed(), killed(), Scratch("mp-", tmp_path)
    (left / "data").mkdir()
    elsewhere, of_others, linked = tmp_path / "x", tmp_path / "mp-others", tmp_path / "mp-linked"
    for folder in (elsewhere, of_others):
        folder.mkdir()
    (elsewhere / ".millpond-lock").touch()
    linked.symlink_to(elsewhere)
    told: list[Path] = []
    remove_abandoned(tmp_path, "mp-", lambda folder: folder == wanted, told.append)
    assert told == [left]
    assert sorted(tmp_path.iterdir()) == sorted([wanted, alive.path, elsewhere, of_others, linked])
    assert (elsewhere / ".millpond-lock").exists()
    assert (wanted / ".millpond-lock").exists()
    alive.remove()
    remove_abandoned(tmp_path, "mp-")
    assert sorted(tmp_path.iterdir()) == sorted([elsewhere, of_others, linked])


def test_a_folder_is_private_and_gone_after_its_end(tmp_path: Path) -> None:
    scratch = Scratch("mp-", tmp_path)
    assert scratch.path.stat().st_mode & 0o777 == 0o700
    scratch.remove()
    scratch.remove()
    assert os.listdir(tmp_path) == []


def test_a_start_clears_away_shelters_whose_clusters_nobody_can_start_again(
    tmp_path: Path, killed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_shelter_roots", lambda: [tmp_path])
    here = tmp_path / "run"
    here.mkdir()
    of_none, of_another = killed(tmp_path / "gone"), killed(here)
    cluster = EmbeddedCluster(EmbeddedSettings(run_dir=tmp_path / "mine"))
    cluster._clear_predecessor()
    assert not of_none.exists()
    assert of_another.exists()
