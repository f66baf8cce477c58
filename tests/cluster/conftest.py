"""One real cluster for the whole session, on HAProxy, in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from apps import DEFINITION
from served_contract import Served

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test below this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from processes import processes_of, shared_memory, shelter_of, unheld
    from terminal import until

    from millpond.cluster.cluster import Cluster
    from millpond.cluster.config import Config
    from millpond.models.definition import Definition

    config = Config(
        name="tested",
        data_dir=str(tmp_path_factory.mktemp("data")),
        port=0,
        shards=3,
        clock="event",
        draining_period_s=0,
        score_log_share=1.0,
        score_log_flush_s=0.2,
    )
    before = set(shared_memory())
    cluster = Cluster(config, [Definition("apps.py", DEFINITION)])
    with cluster:
        shelter = shelter_of(config.directory)
        assert len(processes_of(shelter)) > 5
        yield Served(cluster.url, config.directory)
    # Nothing is left behind.
    assert processes_of(shelter) == {}
    assert not shelter.exists()
    until(lambda: not unheld(set(shared_memory()) - before), "shared memory that nobody holds to go")
    assert sorted(p.name for p in (config.directory / "run").iterdir()) == ["lock"]
    assert not (config.directory / "cluster.json").exists()
