"""Deploying: models are checked here, written to the registry, and waited for until every replica has them.

1. Check, in this process: nothing that goes wrong in a model's code can harm one that serves. Its features are kept by
   the cluster, or can be; it loads; it predicts from real features (of the ids given, else of an entity that nobody
   knows), and what it returns is JSON. How long a prediction takes and what the model takes of memory is measured.
   What the registry would refuse of the versions is refused now, too.
2. Views that the cluster has not are added to it and waited for, see `backfills`.
3. Publish, in one transaction of the registry. What fails in 1 has changed nothing.
4. Wait until each replica that lives has reported it live. If one cannot load it, the rollout is rolled back.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from millpond.cluster.backfills import layout_now
from millpond.deployments.host import is_alive
from millpond.feature_actors.allocators import give_back
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import EventClock, WallClock
from millpond.feature_actors.errors import (
    BadRequest,
    DeclarationError,
    MillpondError,
    NotFound,
    Unavailable,
    did_you_mean,
)
from millpond.feature_actors.layout import Layout, compile_layout, identity_of
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.ports import LocalIngest, LocalRead, ReadPort
from millpond.feature_actors.reader import MemoryRead
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.store import SPARE_SLOT_WORDS
from millpond.models.definition import Definition
from millpond.models.model import LoadedModel, Model, PredictionFailed
from millpond.models.pool import Pool
from millpond.models.registry import Registry
from millpond.models.rollout import Role, Rollout, RolloutRefused
from millpond.models.version import Version, version_of

__all__ = [
    "Running",
    "check_models",
    "check_pool",
    "client_of",
    "new_keys_of",
    "nobody",
    "publish",
    "roll_back",
    "share_of",
    "versions_of",
    "wait_until_live",
]

_CALLS, _CALLS_S_MAX = 9, 1.0
#: A replica polls ten times a second; a load takes what it takes. The replicas of a pool may have to be installed.
_LIVE_S_MAX, _POOL_S_MAX = 90.0, 600.0
_POLL_S = 0.01
#: Among so many one is of nobody.
_RANDOM_IDS = 3
#: How long something is waited for without a word.
_SAY_AFTER_S = 5.0


@dataclass(frozen=True)
class Running:
    """A running cluster, as a process beside it sees it: its views, and its shards' memory to read from.

    spare_words: how much room the shards have for tables that are added.
    """

    url: str
    layout: Layout
    client: FeatureClient
    spare_words: int

    @classmethod
    def of(cls, state: Mapping[str, Any], registry_dir: Path) -> Running:
        """Return the cluster that `cluster.running` found."""
        declared = [Definition(name, text).declared() for name, text in state["definitions"]]
        start = compile_layout([s for d in declared for s in d.sources], [v for d in declared for v in d.views])
        layout = layout_now(start, registry_dir)
        shard_map = ShardMap.even(state["slots"], state["shards"])
        client = client_of(layout, shard_map, Path(state["memory_dir"]), state["clock"])
        spare = 0 if state["durability"] == "none" else SPARE_SLOT_WORDS - (layout.slot_words - start.slot_words)
        return cls(state["url"], layout, client, spare)

    def with_views(self, definition: Definition) -> Running:
        """Return the cluster as it will be with the views of a definition that it has not, which nobody knows yet.

        Raises `DeclarationError` if one cannot be added, or a source is another: no start could be with both then.
        """
        declared = definition.declared()
        compile_layout(declared.sources, declared.views)  # raises if two of them have one name
        for source in declared.sources:
            self.layout.check_alike(source, f"definition `{definition.file_name}`")
        new = [view for view in declared.views if self.layout.version_of(view, view) is None]
        if not new:
            return self
        layout = self.layout.extended(new)
        if (more := layout.slot_words - self.layout.slot_words) > self.spare_words:
            names = ", ".join(f"`{view.name}`" for view in new)
            why = (
                "has no log (`durability`)" if self.spare_words == 0 else f"has room for {self.spare_words} words more"
            )
            raise DeclarationError(
                f"views {names}: a cluster that runs {why}, and these take {more} in each slot; start the cluster with "
                "the definition"
            )
        with nobody(layout) as client:
            return replace(self, layout=layout, client=client, spare_words=self.spare_words - more)


def client_of(layout: Layout, shard_map: ShardMap, memory_dir: Path, clock: str) -> FeatureClient:
    """Return a client that reads the shards' memory, and cannot write."""
    read = MemoryRead(shard_map, memory_dir)
    return FeatureClient(layout, shard_map, LocalIngest([]), read, WallClock() if clock == "wall" else EventClock())


def versions_of(definition: Definition, layout: Layout) -> list[str]:
    """Return the identities of the views that a layout has for those of a definition."""
    kept = (layout.version_of(view, view) for view in definition.declared().views)
    return [identity_of(view) for view in kept if view is not None]


def new_keys_of(layout: Layout, before: Layout) -> list[str]:
    """Return the identities of the views that a layout has for the sake of keys that nothing was kept by before."""
    return [t.added for t in layout.tables[len(before.tables) :] if t.routed]


@contextmanager
def nobody(layout: Layout) -> Iterator[FeatureClient]:
    """Give a client of a shard without events: what is read of it are the features of entities that nobody knows."""
    shard_map = ShardMap.even(1, 1)
    shard = Shard(layout, shard_map, 0)
    reads: ReadPort = LocalRead([shard])
    yield FeatureClient(layout, shard_map, LocalIngest([shard]), reads, WallClock())


# -- 1. check


def check_models(
    definition: Definition,
    layout: Layout,
    client: FeatureClient,
    ids: Sequence[Mapping[str, Any]] = (),
    only: Sequence[str] = (),
) -> list[Version]:
    """Return the versions that a definition makes of its models, each tried out.

    ids: to predict for; of each model those that have its key fields. only: the names of models, of all if empty.
    Raises `DeclarationError` that names the model and what is wrong with it.
    """
    models = definition.declared().models
    if not models:
        raise DeclarationError(f"definition `{definition.file_name}`: declares no model")
    names = [m.name for m in models]
    for name in only:
        if name not in names:
            raise NotFound(f"definition `{definition.file_name}`: no model `{name}`" + did_you_mean(name, names))
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise DeclarationError(f"two models are named `{twice}`")
    with tempfile.TemporaryDirectory(prefix="millpond-") as name:
        folder = Path(name)
        try:
            for artifact, content in definition.artifacts.items():
                (folder / artifact).write_bytes(content)
        except OSError as error:
            raise Unavailable(
                f"the artifacts of `{definition.file_name}` cannot be written to `{folder.parent}`: {error.strerror}; "
                "make room there, or set TMPDIR"
            ) from None
        return [
            _check(definition, model, layout, client, ids, folder) for model in models if not only or model.name in only
        ]


def _check(
    definition: Definition,
    model: Model,
    layout: Layout,
    client: FeatureClient,
    ids: Sequence[Mapping[str, Any]],
    artifacts_dir: Path,
) -> Version:
    _check_features(model, layout)
    for artifact, file in model.artifacts.items():
        if file not in definition.artifacts:
            raise DeclarationError(
                f"model `{model.name}`: artifact `{artifact}` is `{file}`, which does not lie beside "
                f"`{definition.file_name}`; train the model first"
            )
    plan = ReadPlan(layout, model.features, model.subject)
    tried = _ids_for(plan, ids) or [_unknown_id(model, layout, client, plan)]
    first = _load(model, layout, artifacts_dir)
    asyncio.run(_try(first, client, tried))
    # Measured of a second copy: what the first one brought into memory, such as a library, is not each model's own.
    before = _resident_bytes()
    second = _load(model, layout, artifacts_dir)
    call_s = asyncio.run(_try(second, client, tried))
    memory_bytes = max(0, _resident_bytes() - before)
    return version_of(definition, model, plan.key_fields, memory_bytes=memory_bytes, predict_us=call_s * 1e6)


def _load(model: Model, layout: Layout, artifacts_dir: Path) -> LoadedModel:
    try:
        return LoadedModel(model, layout, artifacts_dir)
    except MillpondError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as an exit, or the panic of a library
        raise DeclarationError(
            f"model `{model.name}`: its predictor does not load: {type(error).__name__}: {error}"
        ) from error


def _ids_for(plan: ReadPlan, ids: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return those of `ids` that have the key fields of a plan. Raises `BadRequest` if there are others only."""
    own = [one for one in ids if one.keys() == plan.key_fields.keys()]
    if ids and not own:
        key = ", ".join(f"`{n}`" for n in plan.key_fields)
        raise BadRequest(f"{plan.subject}: none of the ids to try it on has its key ({key}) and nothing else")
    return own


def _unknown_id(model: Model, layout: Layout, client: FeatureClient, plan: ReadPlan) -> Mapping[str, Any]:
    """Return an id that none of the views of a model knows, those neither that it reads while it predicts: of zeros, or
    else, since that may be somebody, a random one."""
    kept = ReadPlan(layout, (*model.features, *model.reads), model.subject).kept
    of_views = ReadPlan(layout, kept, model.subject)  # no function of a derived feature is called for this
    ids: list[Mapping[str, Any]] = [{n: 0 if kind == "int64" else "" for n, kind in of_views.key_fields.items()}]
    for _ in range(_RANDOM_IDS):
        ids.append({
            n: secrets.randbits(63) if kind == "int64" else secrets.token_hex(16)
            for n, kind in of_views.key_fields.items()
        })  # fmt: skip
    rows = asyncio.run(client.read(of_views, of_views.key_columns(ids, batch=True), len(ids)))
    strangest = max(range(len(ids)), key=lambda i: len(rows.unknown[i]))  # the first of them
    return {name: ids[strangest][name] for name in plan.key_fields}


def _check_features(model: Model, layout: Layout) -> None:
    for feature in (*model.features, *model.reads):
        if layout.version_of(feature.view, [feature]) is None:
            raise DeclarationError(
                f"model `{model.name}`: reads `{feature.full_name}`, which the cluster does not keep; "
                "start it with the definition"
            )


async def _try(loaded: LoadedModel, client: FeatureClient, ids: Sequence[Mapping[str, Any]]) -> float:
    """Predict for all ids together, then for the first alone, again and again; return the median of the seconds."""
    loop = asyncio.get_running_loop()

    def read(plan: ReadPlan, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None) -> FeatureRows:
        return asyncio.run_coroutine_threadsafe(client.read(plan, keys, n, as_of_ms), loop).result()

    async def predict(some: Sequence[Mapping[str, Any]]) -> float:
        keys = loaded.plan.key_columns(some, batch=True)
        rows = await client.read(loaded.plan, keys, len(some))

        def call() -> float:
            begun = time.perf_counter()
            loaded.predict(rows, keys, read)
            return time.perf_counter() - begun

        return await asyncio.to_thread(call)

    try:
        await predict([*ids, ids[0]])
        begun, taken = time.perf_counter(), [await predict(ids[:1])]
        while len(taken) < _CALLS and time.perf_counter() - begun < _CALLS_S_MAX:
            taken.append(await predict(ids[:1]))
    except PredictionFailed as error:
        if (cause := error.__cause__) is None:
            raise
        # Here, unlike in an answer, its author is the one who reads it.
        raise DeclarationError(
            f"{loaded.model.subject}: predict fails on {dict(ids[0])}: {type(cause).__name__}: {cause}"
        ) from error
    return statistics.median(taken)


def _resident_bytes() -> int:
    gc.collect()
    give_back()  # what is free is not to be used for what is measured next
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def check_pool(model: str, pool: Pool, cpus: float) -> None:
    """Raise `BadRequest` if the replicas of a pool cannot all run on a cluster with so many CPUs to reserve."""
    if pool.replicas * pool.cpus > cpus:
        raise BadRequest(
            f"model `{model}`: its pool is of {pool.replicas} replica(s) with {pool.cpus:g} CPU each; the cluster has "
            f"{cpus:g} in all"
        )


# -- 2. publish


def publish(
    registry: Registry,
    definition: Definition,
    versions: Sequence[Version],
    as_: Role = "champion",
    share: float | None = None,
) -> int:
    """Write versions to the registry and make them live, all or none; return the generation."""
    return registry.publish(definition, versions, as_, share)


# -- 3. wait


def wait_until_live(
    registry: Registry,
    generation: int,
    versions: Sequence[Version] = (),
    say: Callable[[str], None] | None = None,
) -> int:
    """Return how many replicas have a generation, and have loaded what it has of `versions`, when all that live have.

    say: is told once what is waited for, if that takes long.
    Raises `Unavailable` if one does not have it in time, or cannot load one of `versions`.
    """
    pools = {v.model for v in versions} & {name for name, r in registry.rollouts().items() if r.pool is not None}
    concerned = {v.model for v in versions}
    begun = time.monotonic()
    while True:
        reports = {name: one for name, one in registry.reports().items() if is_alive(one)}
        behind = []
        for name, one in reports.items():
            if one["generation"] < generation or (concerned & set(one["loading"])):
                behind.append(name)
                continue
            for version in versions:
                if version.model in pools and one["pool"] != version.model:
                    continue  # which may not have what its pool installs, and goes on with what it had
                if (why := one["failed"].get(f"{version.model}@{version.version}")) is not None:
                    raise Unavailable(why, code="model_broken")
        hosted = {one["pool"] for one in reports.values()}
        missing = sorted(pools - hosted)
        if reports and not behind and not missing:
            return len(reports)
        limit_s = _POOL_S_MAX if missing else _LIVE_S_MAX
        waited_s = time.monotonic() - begun
        what = (
            f"the pools {missing} have not started"
            if missing
            else f"replicas {sorted(behind)} are behind"
            if behind
            else "no replica lives"
        )
        if say is not None and waited_s > _SAY_AFTER_S:
            say(f"{what}; this waits for up to {limit_s:g} s")
            say = None
        if waited_s > limit_s:
            raise Unavailable(f"generation {generation} of the registry is not live after {limit_s:g} s: {what}")
        time.sleep(_POLL_S)


def roll_back(
    registry: Registry, before: Mapping[str, Rollout], after: Mapping[str, Rollout], versions: Sequence[Version]
) -> str:
    """Undo what a change did with the models of versions, and say so; before and after it: the rollouts.

    A model of which nothing was live has nothing to go back to; one that somebody has changed since is left alone.
    """
    changed = [v.model for v in versions if after.get(v.model) != before.get(v.model)]
    new = [m for m in changed if m not in before]
    back: list[str] = []
    others: list[str] = []
    for model in changed:
        if model in before:
            try:
                registry.rollback(model, after.get(model))
                back.append(model)
            except (RolloutRefused, NotFound):
                others.append(model)
    said = ["rolled back" if back == changed else f"rolled back: {', '.join(back)}"] if back else []
    if others:
        said.append(f"changed by somebody else since, and so left as they are: {', '.join(others)}")
    if new:
        said.append(f"nothing to roll back to, and so still broken: {', '.join(new)}; deploy what loads, or retire it")
    return "; ".join(said) or "nothing was changed: it was live already"


def share_of(text: str) -> float:
    """Return a share such as `5%` or `0.05`. Raises `BadRequest`."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise BadRequest(f"share: got {text!r}; expected such as `5%` or `0.05`") from None
