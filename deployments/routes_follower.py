"""Follows the keys that come while the cluster runs, in a process that takes events in: it brings them there, too.

Promises: from when it has said that it knows a key, no request is under way that was routed without it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.tiles.memory import started_ticks
from millpond.models.added_views import AddedViewRecord, routed_by_now
from millpond.models.registry import Registry
from millpond.models.registry_views import extended_layout

__all__ = ["RoutesFollower"]

logger = logging.getLogger("millpond.routes")

_POLL_S, _AGAIN_S = 0.1, 5.0
_DRAIN_S = 0.005


class RoutesFollower:
    """Have a client route by the views of a registry, from now on and in a thread of its own.

    ingress: the name of this process in the registry. changed: called, in that thread, when the client's layout has.
    """

    def __init__(
        self, registry_dir: Path, client: FeatureClient, ingress: str, changed: Callable[[], None] = lambda: None
    ) -> None:
        self._registry_dir, self._client, self._ingress, self._changed = registry_dir, client, ingress, changed
        self._start, self._seen = client.layout, -1
        self._known: list[AddedViewRecord] = []
        registry = Registry(registry_dir)
        try:
            self._follow(registry)  # before the first request comes
        finally:
            registry.close()
        threading.Thread(target=self._keep, name="routes", daemon=True).start()

    def _keep(self) -> None:
        wait = threading.Event()
        registry: Registry | None = None
        while not wait.wait(_POLL_S):
            try:
                registry = registry or Registry(self._registry_dir)
                if registry.generation() != self._seen:
                    self._follow(registry)
            except Exception:  # a registry that cannot be read now: shards refuse what is routed by old views
                logger.exception("the registry cannot be asked for views")
                wait.wait(_AGAIN_S)

    def _follow(self, registry: Registry) -> None:
        generation = registry.generation()  # before the views, which may be newer then
        known = list(routed_by_now(registry.views.all()))
        if known != self._known:
            before = self._client.layout
            self._client.layout = extended_layout(self._start, known)
            self._known = known
            self._changed()
            while self._client.has_under_way(before):
                time.sleep(_DRAIN_S)
        self._seen = generation
        pid = os.getpid()
        registry.views.say_known(self._ingress, pid, started_ticks(pid), generation)
