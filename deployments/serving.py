"""The Serve edge: the events app and the score app as Ray Serve deployments.

Two deployments, so that decoding a large body of events does not hold the process that scores; the
shard that applies it is still one for both. Models live in the score app's replicas: no call from one
deployment to another lies on the way of a request. Ray is imported late, because Serve reads its
settings from the environment when it is imported.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millpond.deployments.deployment import Deployment
from millpond.deployments.events import EventsApp
from millpond.deployments.explainer import Explainer
from millpond.deployments.forgetter import Forgetter
from millpond.deployments.heap import keep_what_is_there
from millpond.deployments.host import HostLimits, ModelHost
from millpond.deployments.routes_follower import RoutesFollower
from millpond.deployments.score import ScoreApp, ScoreLimits
from millpond.deployments.score_log import ScoreLog, ScoreLogSettings
from millpond.feature_actors.calls import CallIngest, CallRead
from millpond.feature_actors.client import FeatureClient, TimeLimits
from millpond.feature_actors.clock import ClockKind, EventClock, WallClock
from millpond.feature_actors.decode import BodyLimits
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.ingest_queue import QueueLimits
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.ports import ReadPort
from millpond.feature_actors.reader import MemoryRead
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import FeatureView
from millpond.models.definition import Definition
from millpond.models.pool import Pool
from millpond.models.registry import Registry

logger = logging.getLogger("millpond.serving")

__all__ = [
    "EVENTS_PREFIX",
    "PastPlace",
    "SCORE_PREFIX",
    "ServingSpec",
    "app_names",
    "custom_application",
    "deployment",
    "events_application",
    "pool_application",
    "pool_target",
    "score_application",
    "stay_on_loopback",
]

EVENTS_PREFIX = "/v1/events"
SCORE_PREFIX = "/"
_SWITCH_INTERVAL_S = 0.0005


@dataclass(frozen=True)
class PastPlace:
    """Where the past of the cluster is: its data directory, and its history."""

    directory: str
    history_uri: str
    explain_timeout_s: float


@dataclass(frozen=True)
class ServingSpec:
    """What a replica is made from; it finds the shard actors by name."""

    cluster_name: str
    namespace: str
    sources: tuple[Source, ...]
    views: tuple[FeatureView, ...]
    shard_map: ShardMap
    memory_dir: str
    clock: ClockKind
    times: TimeLimits
    bodies: BodyLimits
    queue: QueueLimits
    scores: ScoreLimits
    shard_timeout_s: float
    body_timeout_s: float
    admin_token_sha256: str
    replicas: int
    requests_ongoing_max: int
    requests_queued_max: int
    registry_dir: str
    models: HostLimits
    hang_timeout_s: float
    #: None if no score is logged.
    score_log: ScoreLogSettings | None = None
    #: None if there is none: then nothing can be explained.
    past: PastPlace | None = None


def app_names(cluster_name: str) -> tuple[str, str]:
    """Return the names of the events app and the score app."""
    return f"{cluster_name}-events", f"{cluster_name}-score"


def pool_target(cluster_name: str, model: str) -> tuple[str, str]:
    """Return the name and the route prefix of the app of a model's pool: callers do not notice where it answers."""
    return f"{cluster_name}-pool-{model}", f"{SCORE_PREFIX.rstrip('/')}/v1/score/{model}"


def _connect(spec: ServingSpec) -> tuple[FeatureClient, Any]:
    """Return a client over the cluster's shards, and the port that asks them how they are."""
    stay_on_loopback()
    from millpond.feature_actors.actor import NearestCalls, find_actors

    actors = find_actors(spec.cluster_name, spec.shard_map.n_shards, spec.namespace)
    calls = NearestCalls(Path(spec.memory_dir), actors, spec.shard_timeout_s)
    reads = CallRead(calls, spec.shard_map)
    client = FeatureClient(
        compile_layout(spec.sources, spec.views),
        spec.shard_map,
        CallIngest(calls),
        _memory_or(reads, spec),
        WallClock() if spec.clock == "wall" else EventClock(),
        spec.times,
    )
    return client, reads


def _follow_routes(
    spec: ServingSpec, client: FeatureClient, name: str, changed: Callable[[], None] = lambda: None
) -> None:
    RoutesFollower(Path(spec.registry_dir), client, f"{name}-{secrets.token_hex(4)}", changed)


def _memory_or(calls: ReadPort, spec: ServingSpec) -> ReadPort:
    """Return the port that reads the shards' memory, if they are all on this node; else the one that calls them."""
    try:
        return MemoryRead(spec.shard_map, Path(spec.memory_dir))
    except (Unavailable, OSError) as error:
        logger.warning("reading features by calls of the shards, a hundred times slower than from memory: %s", error)
        return calls


def stay_on_loopback() -> None:
    """Bind the replica's own gRPC server to loopback, where the node's address is loopback.

    Serve binds it to every interface and has no setting for it; Ray's token guards it all the same.
    """
    import ray
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() == "127.0.0.1":
        bind = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


class EventsReplica:
    """A process that takes events in."""

    def __init__(self, spec: ServingSpec) -> None:
        client, _ = _connect(spec)
        self._app = EventsApp(
            client, spec.bodies, spec.queue, clock=spec.clock, admin_token_sha256=spec.admin_token_sha256
        )
        self._app.body_timeout_s = spec.body_timeout_s
        _follow_routes(spec, client, "events", self._app.renew_decoders)
        keep_what_is_there()

    def __serve_build_asgi_app__(self) -> EventsApp:
        return self._app


class ScoreReplica:
    """A process that answers scores, with the models of the registry in memory: those of a pool, or of none."""

    async def __init__(self, spec: ServingSpec, pool: str | None = None) -> None:  # type: ignore[misc]  # Serve awaits it
        # A model in a thread must not keep the event loop waiting for the interpreter: 5 ms is Python's default.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        client, read = _connect(spec)
        replica = f"{pool or 'models'}-{secrets.token_hex(4)}"
        self._score_log = None if spec.score_log is None else ScoreLog(spec.score_log, spec.shard_map, replica)
        registry = Registry(Path(spec.registry_dir))
        self._host = ModelHost(registry, client, replica, pool, spec.models, self._score_log)
        self._host.watch(spec.hang_timeout_s)
        await self._host.start()
        self._following = asyncio.get_running_loop().create_task(self._host.follow())
        explainer = None
        if (past := spec.past) is not None:
            explainer = Explainer(past.directory, past.history_uri, spec.shard_map, past.explain_timeout_s)
        self._app = ScoreApp(
            client, self._host, read.status, spec.scores, spec.admin_token_sha256, spec.cluster_name, self._score_log,
            explainer, Forgetter(read, client, spec.clock == "wall"),
        )  # fmt: skip
        self._app.body_timeout_s = spec.body_timeout_s
        keep_what_is_there()

    def __serve_build_asgi_app__(self) -> ScoreApp:
        return self._app

    def __del__(self) -> None:
        """Called by Serve at a clean stop: what was sampled is written."""
        if (score_log := getattr(self, "_score_log", None)) is not None:
            score_log.close()


class CustomReplica:
    """A process that holds a deployment of a team's own, made anew from the text of its definition."""

    def __init__(self, spec: ServingSpec, definition: Definition, name: str) -> None:
        client, _ = _connect(spec)
        _follow_routes(spec, client, name)  # it may send events, too
        (declared,) = (d for d in definition.instances(Deployment) if d.name == name)
        self._app = declared.app(client)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def deployment(replica: Callable[..., Any], name: str, spec: ServingSpec) -> Any:
    """Return a replica class as a Serve deployment with the cluster's limits."""
    from ray import serve

    return serve.deployment(serve.ingress()(replica)).options(
        name=name,
        num_replicas=spec.replicas,
        max_ongoing_requests=spec.requests_ongoing_max,
        max_queued_requests=spec.requests_queued_max,
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
        # A new version answers before the old one goes: a redeploy has no gap.
        max_surge_percent=100,
        # An access-log line per request would cost a third of a no-op, and `serve.start` is not asked.
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def events_application(spec: ServingSpec) -> Any:
    """Return the Serve application that takes events."""
    return deployment(EventsReplica, "Events", spec).bind(spec)


def score_application(spec: ServingSpec) -> Any:
    """Return the Serve application that scores the models of no pool."""
    return deployment(ScoreReplica, "Score", spec).bind(spec)


def pool_application(spec: ServingSpec, model: str, pool: Pool) -> Any:
    """Return the Serve application that scores one model in replicas of its own."""
    # With the same version, replicas stay when nothing but the app's route changes.
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": pool.cpus}, "version": "1", "_internal": True}
    if pool.pip:
        options["ray_actor_options"]["runtime_env"] = {"pip": list(pool.pip)}
    if pool.replicas_max is None:
        options["num_replicas"] = pool.replicas
    else:
        options["num_replicas"] = None
        options["autoscaling_config"] = {"min_replicas": pool.replicas, "max_replicas": pool.replicas_max}
    return deployment(ScoreReplica, "Pool", spec).options(**options).bind(spec, model)


def custom_application(spec: ServingSpec, definition: Definition, declared: Deployment) -> Any:
    """Return the Serve application of a deployment of a team's own."""
    options = {"num_replicas": declared.replicas, "ray_actor_options": {"num_cpus": declared.cpus}}
    return deployment(CustomReplica, "Custom", spec).options(**options).bind(spec, definition, declared.name)
