"""A cluster on this machine: shards, the events app and the score app, from start to stop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from millpond.cluster.backfills import BackfillKeeper, kept_layout
from millpond.cluster.config import Config
from millpond.cluster.deploy import check_models, client_of, nobody, publish, wait_until_live
from millpond.cluster.embedded import NAMESPACE, EmbeddedCluster, EmbeddedSettings, signals_deferred
from millpond.cluster.pools import PoolKeeper
from millpond.deployments.deployment import Deployment
from millpond.deployments.erased_scores import ScoreEraser
from millpond.deployments.host import HostLimits, is_alive
from millpond.deployments.lane import LaneLimits
from millpond.deployments.score import ScoreLimits
from millpond.deployments.score_log import ScoreLogSettings
from millpond.deployments.serving import (
    EVENTS_PREFIX,
    SCORE_PREFIX,
    PastPlace,
    ServingSpec,
    app_names,
    custom_application,
    events_application,
    score_application,
)
from millpond.feature_actors.client import TimeLimits
from millpond.feature_actors.declared_sources import DeclaredSources
from millpond.feature_actors.decode import BodyLimits
from millpond.feature_actors.errors import DeclarationError, MillpondError, NotFound, Unavailable
from millpond.feature_actors.ingest_queue import QueueLimits
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.lock import FileLock
from millpond.feature_actors.manifest import (
    Manifest,
    check_shards,
    lock_directory,
    make_shards,
    wait_for_shards,
    write_json,
    write_text,
)
from millpond.feature_actors.memory_folder import MemoryFolder
from millpond.feature_actors.ports import all_of
from millpond.feature_actors.server import ShardSpec
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.socket_calls import SocketCalls
from millpond.feature_actors.tiles.memory import started_ticks
from millpond.feature_actors.warm import warm_kernels
from millpond.models.attempts import Attempt
from millpond.models.definition import Definition
from millpond.models.registry import Registry
from millpond.models.registry_views import RegistryViews
from millpond.models.version import Version

__all__ = ["Cluster", "admin_token", "running"]

logger = logging.getLogger("millpond.cluster")

#: How far the clocks of the processes that stamp arrivals may be apart.
_CLOCKS_APART_MS_MAX = 60_000
#: How long a stop takes at most beside the last snapshots; and how often it is looked whether it is asked for again.
_STOP_S, _POLL_S = 60.0, 0.05


class Cluster:
    """Run a cluster from this process; it ends with the process at the latest.

    `with Cluster(config, definitions) as cluster: ...` starts shards and both apps. The sources are those of the
    definitions at the start; views and models can be deployed later, too. What was deployed is in the registry, and
    is live again at the next start.
    """

    def __init__(self, config: Config, definitions: Sequence[Definition]) -> None:
        self.config = config
        self._definitions = tuple(definitions)
        declared = [d.declared() for d in self._definitions]
        self.layout = compile_layout([s for d in declared for s in d.sources], [v for d in declared for v in d.views])
        self._deployments = [(d, own) for d in self._definitions for own in d.instances(Deployment)]
        for what in ("name", "route_prefix"):
            of_each = [getattr(own, what) for _, own in self._deployments]
            if twice := [one for one in of_each if of_each.count(one) > 1]:
                raise DeclarationError(f"two deployments have the {what} `{twice[0]}`")
        if not self.layout.views:
            raise DeclarationError("the definitions declare no feature view")
        #: What actors and replicas may reserve. Millpond's own reserve little and share the cores; Serve's need some.
        self.cpus = max(4, os.cpu_count() or 1, config.shards)
        self._embedded = EmbeddedCluster(
            EmbeddedSettings(
                run_dir=config.directory / "run",
                host=config.host,
                port=config.port,
                proxy=config.proxy,
                num_cpus=self.cpus,
                object_store_mb=config.object_store_mb,
                draining_period_s=config.draining_period_s,
            )
        )
        self._state_file = config.directory / "cluster.json"
        self._state_written = False
        self._lock: FileLock | None = None
        self._memory: MemoryFolder | None = None
        self._pools: PoolKeeper | None = None
        self._backfills: BackfillKeeper | None = None
        #: The versions of models, while the cluster runs.
        self.registry: Registry | None = None
        #: What the replicas are made from, once the shards run.
        self.spec: ServingSpec | None = None

    @property
    def url(self) -> str:
        return self._embedded.http_url

    @property
    def registry_dir(self) -> Path:
        return self.config.directory / "registry"

    @property
    def admin_token(self) -> str:
        return admin_token(self.config.directory)

    def start(self, *, models: bool = True) -> Cluster:
        """Start everything and return when requests are answered.

        models: whether to deploy the definitions' models now; `deploy` does so later.

        1. Check the definitions and load the models once here: a mistake shows before anything runs.
        2. Hold the data directory: nothing of a cluster that runs on it is touched.
        3. Open the data directory: if anything of it is refused, nothing in it has changed.
        4. Drop what is not needed any more of the views that came while it ran before; put the definitions' models into
           the registry, as champions if their versions are new to it.
        5. Warm the kernels; start Ray.
        6. Start the shards, and Serve beside them; then the apps, while Serve's proxies start; then the pools.
        """
        config = self.config
        checked = self._check_models() if models else []
        self._lock = lock_directory(config.directory, config.name)
        try:
            manifest = self._open_directory()
            self.registry = Registry(self.registry_dir)
            self.registry.views.forget_ingresses()  # of a cluster that was killed
            kept_layout(self.registry, self.layout)
            for definition, versions in checked:
                self._publish_new(definition, versions)
            token = admin_token(config.directory, make=True)
            warm_kernels()
            self._embedded.start()
            spec = self._start_shards(manifest, token)
            self._run_apps(spec)
            self._lock.say(url=self.url)
            write_json(self._state_file, self._state(spec))
            self._state_written = True
        except BaseException:
            self.stop()
            raise
        return self

    def _open_directory(self) -> Manifest:
        """Check the data directory against this configuration and these sources, then write down what is new."""
        config, directory, logged = self.config, self.config.directory, self.config.durability != "none"
        manifest = Manifest.open(directory, config.name, config.slots)
        check_shards(directory, manifest, config.shards, logged=logged)
        declared = DeclaredSources(directory)
        sources = declared.check(self.layout.sources.values()) if logged else declared.sources
        wait_for_shards(directory, config.name)
        if logged:
            declared.keep(sources)
            make_shards(directory, manifest, config.shards)
        return manifest

    def _start_shards(self, manifest: Manifest, token: str) -> ServingSpec:
        """Start the shards, and Serve while they recover."""
        from millpond.feature_actors.actor import start_actors, wait_for_actors

        config, layout = self.config, self.layout
        self._memory = MemoryFolder(manifest.cluster_id, config.directory, config.memory_dir)
        shard_map = ShardMap.even(manifest.n_slots, config.shards)
        sources, views = tuple(layout.sources.values()), tuple(layout.views.values())
        actors = start_actors(
            ShardSpec(
                cluster_name=config.name,
                namespace=NAMESPACE,
                run_id=uuid.uuid4().hex,
                data_dir=str(config.directory),
                sources=sources,
                views=views,
                shard_map=shard_map,
                hash_seed=manifest.hash_seed,
                dedupe_horizon_ms=config.dedupe_horizon_ms,
                memory_dir=str(self._memory.path),
                memory_bytes_max=config.memory_mb_max << 20,
                strings_max=config.strings_max,
                reclaim_margin_ms=config.ahead_ms_max + _CLOCKS_APART_MS_MAX,
                durability=config.durability,
                cluster_id=manifest.cluster_id,
                history_uri=self.config.history_uri,
                history_part_bytes=config.history_part_mb << 20,
                snapshot_bytes=config.snapshot_mb << 20,
                disk_free_bytes_min=config.disk_free_mb_min << 20,
                queue_bytes_max=config.queue_mb_max << 20,
                dedupe_horizon_ms_min=config.dedupe_horizon_ms_min,
                dedupe_bytes_max=config.dedupe_mb_max << 20,
                wall_clock=config.clock == "wall",
                scores=self._score_eraser(),
                added_views=RegistryViews(str(self.registry_dir)),
            ),
            NAMESPACE,
            num_cpus=0.1,
        )
        self._embedded.start_serve()
        wait_for_actors(actors)
        self.spec = ServingSpec(
            cluster_name=config.name,
            namespace=NAMESPACE,
            sources=sources,
            views=views,
            shard_map=shard_map,
            memory_dir=str(self._memory.path),
            clock=config.clock,
            times=TimeLimits(config.late_after_ms, config.ahead_ms_max),
            queue=QueueLimits(config.queue_events_max, config.queue_mb_max << 20),
            bodies=BodyLimits(body_bytes_max=config.event_body_bytes_max, rows_max=config.event_rows_max),
            scores=ScoreLimits(config.score_body_bytes_max, config.score_ids_max),
            shard_timeout_s=config.shard_timeout_s,
            body_timeout_s=config.body_timeout_s,
            admin_token_sha256=hashlib.sha256(token.encode()).hexdigest(),
            replicas=config.replicas,
            requests_ongoing_max=config.requests_ongoing_max,
            requests_queued_max=config.requests_queued_max,
            registry_dir=str(self.registry_dir),
            models=HostLimits(
                config.models_mb_max << 20,
                LaneLimits(config.predict_timeout_s, config.model_requests_max),
                config.predict_threads,
                config.load_timeout_s,
            ),
            hang_timeout_s=config.hang_timeout_s,
            score_log=self._score_log_settings(),
            past=self._past_place(),
        )
        return self.spec

    def _score_eraser(self) -> ScoreEraser | None:
        """Return what removes what is kept of scores, whether any are logged or not."""
        if self.config.durability == "none":
            return None
        return ScoreEraser(self.config.history_uri, str(self.registry_dir))

    def _past_place(self) -> PastPlace | None:
        """Return where scores are explained from; None if the cluster has no past."""
        config = self.config
        if config.history_uri is None or config.durability == "none":
            return None
        return PastPlace(str(config.directory), config.history_uri, config.explain_timeout_s)

    def _score_log_settings(self) -> ScoreLogSettings | None:
        """Return what of the scores is logged; nothing where there is no log of events to compare them with."""
        config, uri = self.config, self.config.history_uri
        if uri is None or config.durability == "none" or config.score_log_share == 0:
            return None
        return ScoreLogSettings(
            uri,
            share=config.score_log_share,
            flush_s=config.score_log_flush_s,
            flush_rows=config.score_log_flush_rows,
            waiting_max=config.score_log_waiting_max,
            keep_ms=config.score_log_retention_ms,
        )

    def _check_models(self) -> list[tuple[Definition, list[Version]]]:
        with nobody(self.layout) as client:
            of_each = [(d, check_models(d, self.layout, client)) for d in self._definitions if d.declared().models]
        names = [v.model for _, versions in of_each for v in versions]
        if twice := [n for n in names if names.count(n) > 1]:
            raise DeclarationError(f"two models are named `{twice[0]}`")
        return of_each

    def _publish_new(self, definition: Definition, versions: Sequence[Version]) -> None:
        """Make champions of the versions that the registry has not; those it has stay what they are there."""
        assert self.registry is not None
        known = {(model, v.version) for model in self.registry.models() for v in self.registry.versions(model)}
        self.registry.add(definition, [v for v in versions if not self._is_retired(v)])
        publish(self.registry, definition, [v for v in versions if (v.model, v.version) not in known])

    def _is_retired(self, version: Version) -> bool:
        assert self.registry is not None
        try:
            retired = self.registry.state_of(version) == "retired"
        except NotFound:
            return False
        if retired:
            logger.warning("%s has been retired, and is not deployed again", version.subject)
        return retired

    def _run_apps(self, spec: ServingSpec) -> None:
        """Run both apps and the teams' own, and the pools from now on."""
        from ray import serve

        events_name, score_name = app_names(self.config.name)
        targets = [
            serve.RunTarget(score_application(spec), name=score_name, route_prefix=SCORE_PREFIX),
            serve.RunTarget(events_application(spec), name=events_name, route_prefix=EVENTS_PREFIX),
        ]
        for definition, own in self._deployments:
            name = f"{self.config.name}-own-{own.name}"
            app = custom_application(spec, definition, own)
            targets.append(serve.RunTarget(app, name=name, route_prefix=own.route_prefix))
        self._embedded.run(targets)
        self._pools = PoolKeeper(spec)
        self._backfills = BackfillKeeper(spec)

    def _state(self, spec: ServingSpec) -> dict[str, Any]:
        """Return what other processes have to know of a running cluster, see `deploy.Running`."""
        pid = os.getpid()
        return {
            "pid": pid,
            "started_ticks": started_ticks(pid),
            "url": self.url,
            "name": self.config.name,
            "slots": spec.shard_map.n_slots,
            "shards": spec.shard_map.n_shards,
            "memory_dir": spec.memory_dir,
            "clock": spec.clock,
            "cpus": self.cpus,
            "logs": str(self._embedded.logs_dir),
            "ray": {"address": self._embedded.address, "shelter": str(self._embedded.shelter)},
            "durability": self.config.durability,
            "stop_s_max": self.config.drain_timeout_s + _STOP_S,
            "definitions": [[d.file_name, d.text] for d in self._definitions],
        }

    def deploy(self, definitions: Sequence[Definition]) -> None:
        """Score the models of `definitions` from now on, too; they read the views of the start.

        Raises `DeclarationError` if a model does not load or reads a view that the cluster has not, and what
        `Registry.add` does; nothing changes then.
        """
        assert self.registry is not None
        assert self.spec is not None
        client = client_of(self.layout, self.spec.shard_map, Path(self.spec.memory_dir), self.spec.clock)
        checked = [(d, check_models(d, self.layout, client)) for d in definitions]
        for definition, versions in checked:
            wait_until_live(self.registry, publish(self.registry, definition, versions), versions)

    def broken_models(self) -> dict[str, str]:
        """Return the models whose champion a replica that lives could not load, and why."""
        assert self.registry is not None
        failed = {
            name: why
            for one in self.registry.reports().values()
            if is_alive(one)
            for name, why in one["failed"].items()
        }
        champions = {name: r.champion for name, r in self.registry.rollouts().items() if r.champion is not None}
        named = {name: f"{name}@{version.version}" for name, version in champions.items()}
        return {name: failed[version] for name, version in named.items() if version in failed}

    def wait(self) -> None:
        """Block until Ctrl-C, SIGTERM or `millpond down`."""
        self._embedded.wait()

    def stop(self) -> None:
        """Drain: the shards finish what is under way and take a snapshot, so that a start after it replays nothing;
        then everything ends, whatever fails of it. A second Ctrl-C or SIGTERM breaks off the snapshot, nothing else."""
        died: list[Attempt] = []
        with signals_deferred() as arrived, contextlib.ExitStack() as steps:  # the last of them first
            steps.callback(self._let_go)
            steps.callback(self._close_registry, died)
            steps.callback(self._embedded.stop)
            steps.callback(lambda: died.extend(self._deaths()))
            steps.callback(self._drain_shards, arrived)
            for keeper in (self._backfills, self._pools):
                if keeper is not None:
                    steps.callback(keeper.stop)
            self._backfills = self._pools = None

    def _close_registry(self, died: Sequence[Attempt]) -> None:
        if self.registry is not None:
            # What was being loaded did not end its process: this did.
            self.registry.attempts.take_back([a for a in self.registry.attempts.all() if not a.hung and a not in died])
            for replica in self.registry.reports():
                self.registry.forget_report(replica)
            self.registry.views.forget_ingresses()
            self.registry.close()
            self.registry = None

    def _let_go(self) -> None:
        if self._memory is not None:
            self._memory.remove()
            self._memory = None
        if self._state_written:  # else it may be of another cluster, on whose directory this one did not start
            self._state_file.unlink(missing_ok=True)
            self._state_written = False
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _deaths(self) -> list[Attempt]:
        """Return the notes of loads that processes have died in."""
        try:
            attempts = [] if self.registry is None else self.registry.attempts.all()
        except MillpondError:  # everything is to end all the same
            return []
        return [a for a in attempts if not a.hung and not is_alive(asdict(a))]

    def _drain_shards(self, asked_again: Sequence[int]) -> None:
        """asked_again: signals to end that have arrived since; with one, the shards are not waited for any longer."""
        if self.spec is None or self._memory is None:
            return
        calls = SocketCalls(self._memory.path, self.spec.shard_map.n_shards, timeout_s=self.config.drain_timeout_s)

        async def drain() -> None:
            draining = asyncio.ensure_future(
                all_of({shard: calls.call(shard, "drain") for shard in range(calls.n_shards)})
            )
            try:
                while not draining.done():
                    if asked_again:
                        raise Unavailable("asked to end a second time")
                    await asyncio.wait([draining], timeout=_POLL_S)
                draining.result()
            finally:
                draining.cancel()
                await calls.close()

        try:
            asyncio.run(drain())
        except Exception as error:  # what was acknowledged is in the log all the same, and everything is to end
            logger.warning("stopping without a snapshot: %s", error)
        self.spec = None

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def admin_token(directory: Path, *, make: bool = False) -> str:
    """Return the admin token of a cluster, 256 bits; `make` it (mode 0600) if there is none."""
    path = directory / "admin_token"
    if make and (not path.exists() or not path.read_text().strip()):
        write_text(path, secrets.token_urlsafe(32))
    return path.read_text().strip()


def running(directory: Path) -> dict[str, Any] | None:
    """Return pid and url of the cluster that runs on a data directory, or None."""
    try:
        state = json.loads((directory / "cluster.json").read_bytes())
        alive = started_ticks(state["pid"]) == state["started_ticks"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(state) if alive else None


def running_cluster(config: Config, subject: str = "", to_do: str = "start one with `millpond up`") -> dict[str, Any]:
    """Return what `running` does of the cluster that a configuration names.

    Raises `Unavailable`; it begins with the `subject`, says what is `to_do`, and names others of the data directory.
    """
    state = running(config.directory)
    if state is None:
        prefix = f"{subject}: " if subject else ""
        raise Unavailable(f"{prefix}no cluster `{config.name}` runs on {config.directory}; {or_another(config, to_do)}")
    return state


def or_another(config: Config, to_do: str) -> str:
    """Return what is to do where the cluster that a configuration names does not run: perhaps to ask another."""
    there = sorted(path.parent for path in config.directory.parent.glob("*/cluster.json"))
    others = [f"`{path.name}` at {state['url']}" for path in there if (state := running(path)) is not None]
    if not others:
        return to_do
    return f"running here: {', '.join(others)}; say which with `--name`, or {to_do}"
