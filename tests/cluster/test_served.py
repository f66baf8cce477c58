"""The whole product over real HTTP: HAProxy, replicas, shard actors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import LOOPBACK, listening, processes_of, shard_pids, shelter_of
from served_contract import Served, ServedContract


class TestHaproxy(ServedContract):
    """The fixture `served` is the session's."""


def test_it_is_haproxy_that_answers(served: Served) -> None:
    from urllib.parse import urlsplit

    port = f"{urlsplit(served.url).port:04X}"
    shelter = shelter_of(served.directory)
    behind = {c for a, cs in listening(list(processes_of(shelter))).items() if a.endswith(f":{port}") for c in cs}
    assert behind
    assert all("haproxy" in command for command in behind)


def test_every_socket_of_every_process_is_on_the_loopback_interface(served: Served) -> None:
    pids = [os.getpid(), *processes_of(shelter_of(served.directory))]
    addresses = listening(pids)
    assert len(addresses) > 5
    assert {a: c for a, c in addresses.items() if a.split(":")[0] not in LOOPBACK} == {}


def test_servers_that_nobody_asks_are_not_there_and_no_port_is_one_that_every_cluster_wants(served: Served) -> None:
    processes = processes_of(shelter_of(served.directory))
    idle = ("/autoscaler/_private/monitor.py", "/_private/log_monitor.py", "/dashboard/dashboard.py")
    assert [c for c in processes.values() if any(name in c for name in idle)] == []
    default_of_rays_agent = f":{52_365:04X}"
    assert not [a for a in listening(list(processes)) if a.endswith(default_of_rays_agent)]


def test_a_shard_is_a_process(served: Served) -> None:
    assert len(shard_pids(shelter_of(served.directory))) == 3


def test_shards_and_replicas_are_told_how_to_take_memory_before_arrow_is_there(served: Served) -> None:
    """Arrow looks at it once, when a process first asks for some."""
    processes = processes_of(shelter_of(served.directory))
    ours = [pid for pid, line in processes.items() if line.startswith(("ray::FeatureActor", "ray::ServeReplica"))]
    assert len(ours) >= 5
    for pid in ours:
        assert "ARROW_DEFAULT_MEMORY_POOL=system" in Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_what_the_cluster_writes_is_for_its_user_only(served: Served) -> None:
    shelter = shelter_of(served.directory)
    for path in (served.directory, served.directory / "run", shelter):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_second_cluster_in_the_same_process_is_refused(served: Served, tmp_path: Path) -> None:
    from apps import DEFINITION

    from millpond.cluster.cluster import Cluster
    from millpond.cluster.config import Config
    from millpond.feature_actors.errors import MillpondError
    from millpond.models.definition import Definition

    other = Cluster(Config(name="other", data_dir=str(tmp_path), port=0), [Definition("apps.py", DEFINITION)])
    with pytest.raises(MillpondError, match=r"^embedded cluster: this process is in a Ray cluster already"):
        other.start()
    assert served.call("GET", "/readyz")[0] == 200
