"""Pools: Serve apps for the models that have replicas of their own, kept as the registry wants them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from millpond.deployments.serving import ServingSpec, pool_application, pool_target
from millpond.models.pool import Pool
from millpond.models.registry import Registry

__all__ = ["PoolKeeper"]

logger = logging.getLogger("millpond.pools")

_POLL_S = 0.2


class PoolKeeper:
    """Start and stop pools, in a thread of its own, as long as the cluster runs.

    Until a pool has started, the replicas of all models answer its model: it has no route before, on which requests
    would wait for it. Nothing waits for one that cannot start; it is tried again when the registry changes.
    """

    def __init__(self, spec: ServingSpec) -> None:
        self._spec = spec
        self._running: dict[str, Pool] = {}
        #: Those that requests go to, and those that could not start.
        self._routed: set[str] = set()
        self._failed: set[str] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="pools", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Keep them no longer; they end with the cluster."""
        self._stopping.set()
        self._thread.join()

    def _keep(self) -> None:
        registry, seen = Registry(Path(self._spec.registry_dir)), -1
        while not self._stopping.wait(_POLL_S):
            generation = seen
            try:
                generation = registry.generation()
                if generation != seen:
                    self._change({name: r.pool for name, r in registry.rollouts().items() if r.pool is not None})
                    seen = generation
                if waiting := self._running.keys() - self._routed - self._failed:
                    self._route(waiting)
            except Exception:  # the replicas of all models answer meanwhile
                logger.exception("the pools cannot be changed")
                seen = -1 if self._stopping.wait(5) else generation
        registry.close()

    def _change(self, wanted: dict[str, Pool]) -> None:
        from ray import serve

        for model in self._running.keys() - wanted.keys():
            name, _ = pool_target(self._spec.cluster_name, model)
            serve.delete(name)
            del self._running[model]
            self._routed.discard(model)
        again, self._failed = self._failed, set()
        for model, pool in wanted.items():
            if self._running.get(model) != pool or model in again:
                self._run(model, pool)

    def _run(self, model: str, pool: Pool) -> None:
        """Have a pool started, or changed, without waiting for it."""
        from ray import serve

        name, prefix = pool_target(self._spec.cluster_name, model)
        route = prefix if model in self._routed else None
        app = serve.RunTarget(pool_application(self._spec, model, pool), name=name, route_prefix=route)
        serve.run_many([app], wait_for_applications_running=False)
        self._running[model] = pool

    def _route(self, models: set[str]) -> None:
        """Send requests to those pools that have started."""
        from ray import serve

        applications = serve.status().applications
        for model in models:
            status = applications[pool_target(self._spec.cluster_name, model)[0]]
            if status.status == "RUNNING":
                self._routed.add(model)
                self._run(model, self._running[model])
            elif status.status == "DEPLOY_FAILED":
                self._failed.add(model)
                logger.error("the pool of model `%s` cannot start: %s", model, status.message)
