"""The pools of models, over a real registry, beside a Serve that starts what it is told to when a test says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lanes import PATIENCE_S, definition, version_in

from millpond.cluster import pools as pools_module
from millpond.cluster.pools import PoolKeeper
from millpond.models import Pool
from millpond.models.registry import Registry


class Serve:
    """Notes what it is told. comes_up: by model, Serve's word for how its app does; refused: what it cannot run."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.comes_up: dict[str, str] = {}
        self.refused: set[str] = set()
        self.asked: list[str] = []

    def run(self, model: str, pool: Pool, *, routed: bool) -> None:
        if model in self.refused:
            raise RuntimeError("no such thing")
        self.told.append((model, pool.replicas, routed))

    def status(self, model: str) -> str:
        self.asked.append(model)
        return self.comes_up.get(model, "DEPLOYING")

    def delete(self, model: str) -> None:
        self.told.append((model, "deleted"))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setattr(pools_module, "_POLL_S", 0.001)
    monkeypatch.setattr(pools_module, "_AGAIN_S", 0.001)
    registry = Registry(tmp_path / "registry")
    for name in ("a", "b", "c"):
        registry.deploy([version_in(registry, definition(name, "1"))])
    yield registry
    registry.close()


@contextmanager
def kept(registry: Registry) -> Iterator[Serve]:
    serve = Serve()
    spec: Any = SimpleNamespace(registry_dir=str(registry._folder))
    keeper = PoolKeeper(spec, serve)
    try:
        yield serve
    finally:
        keeper.stop()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.001)


def told(serve: Serve, *what: Any) -> None:
    wait_for(lambda: serve.told[-len(what) :] == list(what), f"{what}; it was {serve.told}")


def test_a_models_path_leads_to_its_pool_when_that_runs_and_not_before(registry: Registry) -> None:
    with kept(registry) as serve:
        registry.set_pool("a", Pool(2))
        told(serve, ("a", 2, False))
        serve.comes_up["a"] = "RUNNING"
        told(serve, ("a", 2, False), ("a", 2, True))
        registry.set_pool("a", Pool(3))  # the replicas that there are answer meanwhile
        told(serve, ("a", 2, True), ("a", 3, True))
        registry.set_pool("a", None)
        told(serve, ("a", 3, True), ("a", "deleted"))


def test_a_pool_that_does_not_start_holds_up_no_other(registry: Registry) -> None:
    with kept(registry) as serve:
        serve.refused.add("a")
        serve.comes_up |= {"b": "DEPLOYING", "c": "RUNNING"}  # the first cannot be run, the second never gets its cores
        for name in "abc":
            registry.set_pool(name, Pool())
        told(serve, ("c", 1, True))
        registry.set_pool("b", None)
        told(serve, ("b", "deleted"))
        serve.refused.clear()
        told(serve, ("a", 1, False))


def test_a_pool_that_has_failed_is_tried_again_when_the_registry_changes(registry: Registry) -> None:
    with kept(registry) as serve:
        serve.comes_up["a"] = "DEPLOY_FAILED"
        registry.set_pool("a", Pool())
        wait_for(lambda: "a" in serve.asked, "how it does")
        registry.set_pool("b", Pool())
        wait_for(lambda: serve.told.count(("a", 1, False)) == 2, "the second try")
