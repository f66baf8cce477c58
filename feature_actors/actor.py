"""The Ray edge: a shard as an actor, and the transport that calls actors.

The actor adds process life to a `ShardServer`: it is detached and named, restarted by Ray without end, and never
retried by Ray: a write may be sent twice only by us, who know that it is safe.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import ray

from millpond.feature_actors.calls import Calls
from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.server import ShardServer, ShardSpec
from millpond.feature_actors.socket_calls import SocketCalls, socket_path

__all__ = ["ActorCalls", "FeatureActor", "NearestCalls", "actor_name", "find_actors", "start_actors", "wait_for_actors"]

#: Calls that wait for one shard, from one replica; more are answered 503.
PENDING_CALLS_MAX = 1_024
#: How often a shard that cannot be opened is tried again.
_OPEN_AGAIN_S = 2.0

logger = logging.getLogger("millpond.shard")


def actor_name(cluster_name: str, shard: int) -> str:
    return f"millpond-{cluster_name}-shard-{shard:03d}"


class FeatureActor:
    """One shard in a process of its own."""

    def __init__(self, spec: ShardSpec, number: int) -> None:
        calls: list[Calls] = []

        def peers() -> Calls:
            if not calls:
                actors = find_actors(spec.cluster_name, spec.shard_map.n_shards, spec.namespace)
                calls.append(NearestCalls(Path(spec.memory_dir), actors))
            return calls[0]

        try:
            self.server = ShardServer(spec, number, peers)
        except (MillpondError, OSError):
            if ray.get_runtime_context().was_current_actor_reconstructed:
                # Ray gives up an actor whose restart raises; but the disk may come back, or the predecessor end.
                logger.exception("shard %d cannot be opened; its process ends and another one tries again", number)
                time.sleep(_OPEN_AGAIN_S)
                os._exit(70)
            raise

    async def call(self, method: str, arguments: Sequence[Any]) -> Any:
        return await asyncio.wrap_future(self.server.called(method, arguments))


def start_actors(spec: ShardSpec, namespace: str, num_cpus: float) -> list[Any]:
    """Begin to start an actor per shard, detached and named; `wait_for_actors` returns when they are there."""
    remote = ray.remote(FeatureActor)
    return [
        remote.options(
            name=actor_name(spec.cluster_name, shard),
            namespace=namespace,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            max_pending_calls=PENDING_CALLS_MAX,
            num_cpus=num_cpus,
        ).remote(spec, shard)
        for shard in range(spec.shard_map.n_shards)
    ]


def wait_for_actors(actors: Sequence[Any]) -> None:
    """Return when each shard has recovered. Raises the `MillpondError` of one that cannot be opened."""
    try:
        ray.get([a.call.remote("ready", []) for a in actors])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MillpondError):
            raise error.cause from None
        raise


def find_actors(cluster_name: str, n_shards: int, namespace: str) -> list[Any]:
    """Return the handles of a cluster's shard actors, by name."""
    return [ray.get_actor(actor_name(cluster_name, shard), namespace) for shard in range(n_shards)]


class NearestCalls:
    """A transport that calls a shard over its socket where that is on this node, else its actor."""

    def __init__(self, folder: Path, actors: Sequence[Any], timeout_s: float = 30.0) -> None:
        self.n_shards = len(actors)
        self._paths = [socket_path(folder, shard) for shard in range(len(actors))]
        self._sockets = SocketCalls(folder, len(actors), timeout_s, PENDING_CALLS_MAX)
        self._actors = ActorCalls(actors, timeout_s)

    def call(self, shard: int, method: str, *arguments: Any) -> Awaitable[Any]:
        # The socket of a shard that was killed is still there, and refuses connections until its successor's.
        near = self._paths[shard].exists()
        return (self._sockets if near else self._actors).call(shard, method, *arguments)


class ActorCalls:
    """A transport to shard actors, on whatever node: each call with a time limit, errors as they were raised there."""

    def __init__(self, actors: Sequence[Any], timeout_s: float = 30.0) -> None:
        self.n_shards = len(actors)
        self._actors = actors
        self._timeout_s = timeout_s

    def call(self, shard: int, method: str, *arguments: Any) -> Awaitable[Any]:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            answer = self._actors[shard].call.remote(method, arguments)
        except ray.exceptions.PendingCallsLimitExceeded:
            answer = None
        return _answered(f"shard {shard} of {self.n_shards}", answer, deadline, self._timeout_s)


async def _answered(where: str, answer: Any, deadline: float, timeout_s: float) -> Any:
    if answer is None:
        raise Unavailable(f"{where} has {PENDING_CALLS_MAX} calls waiting already", retry_after_ms=1_000)
    try:
        async with asyncio.timeout_at(deadline):
            return await answer
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MillpondError):
            raise error.cause from None
        raise
    except TimeoutError:
        raise Unavailable(f"{where} did not answer within {timeout_s:g} s", retry_after_ms=1_000) from None
    except ray.exceptions.RayActorError as error:
        raise Unavailable(f"{where} is not running; it is being restarted", retry_after_ms=1_000) from error
    except ray.exceptions.RayError as error:
        raise Unavailable(f"{where} could not be called: {type(error).__name__}", retry_after_ms=1_000) from error
