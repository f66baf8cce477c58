"""A pack of a running cluster, written and played back from a terminal: everything in it is there already."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from apps import purchase
from served_contract import START, Served, fresh
from terminal import run

from millpond.cluster.packs.pack import Pack


@pytest.fixture
def told(served: Served, tmp_path: Path) -> Path:
    """A working directory whose configuration names the cluster."""
    (tmp_path / "millpond.toml").write_text(f'name = "tested"\ndata_dir = "{served.directory.parent}"\n')
    return tmp_path


def test_a_running_cluster_is_exported_and_a_replay_finds_each_event_there(served: Served, told: Path) -> None:
    users = [fresh() for _ in range(7)]
    served.post_events([purchase(f"pack-{n}", users[n % 7], 1.0 + n, START, book_id="pack") for n in range(50)])
    (told / "sample.csv").write_text("\n".join(["user_id", *map(str, users)]))
    done = run(told, "export", "-o", "pack", "--entities", "sample.csv", "--json")
    assert done.returncode == 0, done.stderr
    exported = json.loads(done.stdout)
    assert (exported["events"], exported["sources"]) == (50, {"purchases": 50})
    assert {"churn@3 (champion)", "offer@3 (champion)"} <= set(exported["models"])
    before = served.score("churn", {"user_id": users[3]})
    done = run(told, "replay", "pack", "--deploy", "--json")
    assert done.returncode == 0, done.stderr
    replayed = json.loads(done.stdout)
    assert (replayed["to"], replayed["accepted"], replayed["duplicates"]) == (served.url, 0, 50)
    assert set(replayed["deployed"]) == set(exported["models"])
    assert {**served.score("churn", {"user_id": users[3]}), "id": ""} == {**before, "id": ""}
    assert Pack(told / "pack").manifest.cluster == "tested"
