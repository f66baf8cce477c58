"""Pools: Serve apps for the models that have replicas of their own, kept as the registry wants them.

Promises: the path of a model leads to its pool when that can answer, not before; a pool that does not start, or waits
for cores that nobody has, keeps nothing from any other, nor from stopping.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from millpond.deployments.serving import ServingSpec, pool_application, pool_target
from millpond.models.pool import Pool
from millpond.models.registry import Registry

__all__ = ["PoolKeeper", "ServeApps"]

logger = logging.getLogger("millpond.pools")

_POLL_S = 0.2
#: How long a stop waits for what it does just now, which may hang with what it asks.
_STOP_S = 30.0
#: How long after something failed it is tried again.
_AGAIN_S = 5.0


class ServeApps(Protocol):
    """What is asked of Serve; nothing of it waits until an app runs."""

    def run(self, model: str, pool: Pool, *, routed: bool) -> None:
        """Run a model's pool, or change the one that runs; routed: whether the model's path leads to it."""

    def status(self, model: str) -> str:
        """Return Serve's word for how it goes: `RUNNING`, `DEPLOY_FAILED`, ..."""

    def delete(self, model: str) -> None:
        """Stop it."""


class _Serve:
    def __init__(self, spec: ServingSpec) -> None:
        self._spec = spec

    def run(self, model: str, pool: Pool, *, routed: bool) -> None:
        from ray import serve

        name, prefix = pool_target(self._spec.cluster_name, model)
        app = pool_application(self._spec, model, pool)
        target = serve.RunTarget(app, name=name, route_prefix=prefix if routed else None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def status(self, model: str) -> str:
        from ray import serve

        name, _ = pool_target(self._spec.cluster_name, model)
        app = serve.status().applications.get(name)
        return "NOT_STARTED" if app is None else str(app.status.value)

    def delete(self, model: str) -> None:
        from ray import serve

        serve.delete(pool_target(self._spec.cluster_name, model)[0])


@dataclass
class _Started:
    pool: Pool
    routed: bool = False
    failed: bool = False


class PoolKeeper:
    """Start and stop pools, in a thread of its own, as long as the cluster runs.

    Until a pool answers, the replicas of all models answer its model. A pool that cannot start is tried again when
    the registry changes.
    """

    def __init__(self, spec: ServingSpec, apps: ServeApps | None = None) -> None:
        self._registry_dir = Path(spec.registry_dir)
        self._apps = apps or _Serve(spec)
        self._started: dict[str, _Started] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="pools", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Keep them no longer; they end with the cluster."""
        self._stopping.set()
        self._thread.join(_STOP_S)  # then it ends with this process

    def _keep(self) -> None:
        registry: Registry | None = None
        wanted: dict[str, Pool] = {}
        seen = -1
        while not self._stopping.wait(_POLL_S):
            try:
                registry = registry or Registry(self._registry_dir)
                generation = registry.generation()
                changed = generation != seen
                if changed:
                    rollouts = registry.rollouts()
                    wanted = {name: r.pool for name, r in rollouts.items() if r.pool is not None}
                    seen = generation
            except Exception:  # the pools that there are go on meanwhile
                logger.exception("the registry cannot be asked for pools")
                self._stopping.wait(_AGAIN_S)
                continue
            for model in sorted(self._started.keys() | wanted.keys()):
                try:
                    self._bring(model, wanted.get(model), again=changed)
                except Exception:  # the replicas of all models answer meanwhile
                    logger.exception("the pool of model `%s` cannot be changed", model)
                    self._stopping.wait(_AGAIN_S)
        if registry is not None:
            registry.close()

    def _bring(self, model: str, pool: Pool | None, *, again: bool) -> None:
        """Take the next step to what is wanted of a model's pool. again: whether one that failed is tried again."""
        started = self._started.get(model)
        if pool is None:
            self._apps.delete(model)
            del self._started[model]
        elif started is None or started.pool != pool or (started.failed and again):
            routed = started is not None and started.routed  # then the replicas that there are answer until new ones do
            self._apps.run(model, pool, routed=routed)
            self._started[model] = _Started(pool, routed)
        elif not started.routed and not started.failed:
            status = self._apps.status(model)
            if status == "RUNNING":
                self._apps.run(model, pool, routed=True)
                started.routed = True
            elif status == "DEPLOY_FAILED":
                started.failed = True
                logger.warning(
                    "the pool of model `%s` does not start; it is tried again when the registry changes", model
                )
