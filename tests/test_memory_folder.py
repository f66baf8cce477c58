"""The folder of a cluster's memory: held by a lock, removed by the next start when its cluster was killed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from millpond.feature_actors import memory_folder
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.memory_folder import MemoryFolder

HOLDER = """
import sys
from pathlib import Path
from millpond.feature_actors.memory_folder import MemoryFolder
folder = MemoryFolder(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
(folder.path / "000-1.tiles").write_bytes(b"x" * 4096)
print(folder.path, flush=True)
sys.stdin.read()
"""


def killed(cluster_id: str, where: Path) -> Path:
    """Return the folder of a process that held one and was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, cluster_id, str(where), str(where)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    with pytest.raises(Unavailable, match="in use by a running cluster"):
        MemoryFolder(cluster_id, where, str(where))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return folder


def test_the_folder_is_private_and_goes_with_its_cluster(tmp_path: Path) -> None:
    folder = MemoryFolder("abc", tmp_path, str(tmp_path))
    assert folder.path == tmp_path / f"millpond-{os.getuid()}-abc"
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_two_clusters_live_side_by_side(tmp_path: Path) -> None:
    one, other = (MemoryFolder(name, tmp_path, str(tmp_path)) for name in ("one", "other"))
    assert one.path.exists()
    with pytest.raises(Unavailable, match="in use by a running cluster"):
        MemoryFolder("one", tmp_path, str(tmp_path))
    assert one.path.exists()
    one.remove()
    other.remove()


@pytest.mark.parametrize("cluster_id", ["same", "another"])
def test_what_a_killed_cluster_left_is_removed_by_the_next_start_of_any(
    cluster_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = killed("same", tmp_path)
    assert (left / "000-1.tiles").exists()
    with caplog.at_level(logging.WARNING):
        folder = MemoryFolder(cluster_id, tmp_path, str(tmp_path))
    assert "removing the memory that a killed cluster left" in caplog.text
    assert [p.name for p in folder.path.iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == [folder.path]
    folder.remove()


def test_where_shared_memory_is_small_it_lies_in_the_data_directory_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory_folder, "SHARED_FREE_BYTES_MIN", 1 << 60)
    with caplog.at_level(logging.WARNING):
        folder = MemoryFolder("abc", tmp_path / "data")
    assert folder.path.parent == tmp_path / "data" / "memory"
    assert "features go to files in" in caplog.text
    folder.remove()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"millpond-{os.getuid()}-abc").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable):
        MemoryFolder("abc", tmp_path, str(tmp_path))
    assert list((tmp_path / "elsewhere").iterdir()) == []
