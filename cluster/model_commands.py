"""The commands about models: deploy, promote, rollback, retire, pool, models. They change the registry and wait."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from millpond.cluster.backfills import wait_until_whole
from millpond.cluster.cluster import or_another, running, running_cluster
from millpond.cluster.config import Config
from millpond.cluster.deploy import (
    Running,
    check_models,
    check_pool,
    new_keys_of,
    publish,
    roll_back,
    versions_of,
    wait_until_live,
)
from millpond.cluster.trial import in_trial
from millpond.cluster.verify import check_verified
from millpond.deployments.answers import iso
from millpond.deployments.host import is_alive
from millpond.deployments.served import EXAMPLES_MAX, difference_of
from millpond.feature_actors.errors import BadRequest, MillpondError, Unavailable
from millpond.feature_actors.layout import identity_of, version_name
from millpond.models.definition import Definition
from millpond.models.pool import Pool
from millpond.models.registry import Registry
from millpond.models.rollout import Role
from millpond.models.version import Version

__all__ = ["change_model", "deploy_file", "describe_models", "ids_of", "print_deployed", "print_model", "print_models"]

#: Where there is no terminal, or a narrow one, a table is cut off less readily than it would be.
_SECONDS_MAX = 86_400
_WIDTH_MIN = 160
_TEXTS = frozenset({"model", "version", "state", "owner", "where"})


@contextmanager
def open_registry(config: Config) -> Iterator[Registry]:
    """Open the registry of a cluster, running or not."""
    folder = config.directory / "registry"
    if not folder.is_dir():
        to_do = or_another(config, "start one with `millpond up`")
        raise Unavailable(f"no cluster `{config.name}` has models in {config.directory}; {to_do}")
    registry = Registry(folder)
    try:
        yield registry
    finally:
        registry.close()


def ids_of(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return ids given as JSON objects."""
    ids = []
    for text in texts:
        try:
            one = json.loads(text)
        except ValueError:
            one = None
        if not isinstance(one, dict):
            raise BadRequest(f"--try: got {text!r:.80}; expected an id as a JSON object, such as '{{\"user_id\": 42}}'")
        ids.append(one)
    return ids


class _Tried(msgspec.Struct):
    """What comes of a trial: the definition as it was read, the versions that it makes, the identities of the views
    that it reads, of those that the cluster has not, and of those whose key it keeps nothing by. older: those of the
    views that are not asked for by their name, and the version that is."""

    file_name: str
    text: str
    artifacts: dict[str, bytes]
    versions: list[Version]
    views: list[str]
    new_views: list[str]
    new_keys: list[str]
    older: dict[str, str]


def deploy_file(
    config: Config,
    path: Path,
    *,
    artifacts_dir: Path | None = None,
    only: Sequence[str] = (),
    as_: Role = "champion",
    share: float | None = None,
    ids: Sequence[Mapping[str, Any]] = (),
    seconds_max: float = 60.0,
) -> dict[str, Any]:
    """Deploy the views and models of a file to the running cluster and return what has become of it, when every replica
    has it. Views that are new are computed from what was before; models wait for them.

    seconds_max: how long the check may take. Raises what a check finds, and then nothing has changed; `Unavailable` if
    a view could not be computed, and then no model has changed, or if a replica cannot load it, and then the rollout
    is what it was before.
    """
    begun = time.perf_counter()
    if not 0 < seconds_max <= _SECONDS_MAX:
        raise BadRequest(f"--seconds-max: got {seconds_max:g}; more than 0 and at most {_SECONDS_MAX:g} s")
    state = running_cluster(config)

    def try_out() -> bytes:
        definition = Definition.read(path, artifacts_dir)
        before = Running.of(state, config.directory / "registry")
        cluster = before.with_views(definition)
        views = versions_of(definition, cluster.layout)
        new = [one for one in views if one not in before.layout.kept_views]
        # A file of views alone is deployed, too.
        models = bool(definition.declared().models) or not views or bool(only)
        checked = check_models(definition, cluster.layout, cluster.client, ids, only) if models else []
        for model in definition.declared().models:
            if model.pool is not None:
                check_pool(model.name, model.pool, state["cpus"])
        keys = new_keys_of(cluster.layout, before.layout)
        named = {one: cluster.layout.views[one.partition("#")[0]] for one in views}
        older = {one: version_name(view) for one, view in named.items() if identity_of(view) != one}
        tried = _Tried(definition.file_name, definition.text, definition.artifacts, checked, views, new, keys, older)
        return msgspec.msgpack.encode(tried)

    tried = msgspec.msgpack.decode(in_trial(f"definition `{path.name}`", try_out, seconds_max), type=_Tried)
    definition, versions = Definition(tried.file_name, tried.text, tried.artifacts), tried.versions
    with open_registry(config) as registry:
        if versions:
            registry.check_publish(versions, as_, share)  # a view that has been added cannot be taken back
        added, views_s = _add_views(config, registry, tried)
        before = registry.rollouts()
        generation = publish(registry, definition, versions, as_, share) if versions else registry.generation()
        after = registry.rollouts()
        published_s = time.perf_counter() - begun
        try:
            replicas = wait_until_live(registry, generation, versions, _say)
        except MillpondError as error:
            done = roll_back(registry, before, after, versions)
            raise Unavailable(f"{error.message}; {done}", code=error.code) from error
    return {
        "models": [
            {"model": v.model, "version": v.version, "as": as_, "predict_us": round(v.predict_us, 1),
             "memory_bytes": v.memory_bytes, "url": f"{state['url']}/v1/score/{v.model}"}
            for v in versions
        ],
        "views": added,
        "older_views": [
            {"view": name, "version": version, "answering": tried.older[one]}
            for one in tried.older for name, _, version in [one.partition("#")]
            if (name, version) not in [(a["view"], a["version"]) for a in added]
        ],
        "replicas": replicas,
        "checked_s": round(published_s - views_s, 3),
        "backfill_s": round(views_s, 3),
        "live_s": round(time.perf_counter() - begun - published_s, 3),
    }  # fmt: skip


def _add_views(config: Config, registry: Registry, tried: _Tried) -> tuple[list[dict[str, Any]], float]:
    """Add the views of a definition that the cluster has not. Return what has become of those that had to be waited
    for, when they are live, and how many seconds that took."""
    begun = time.perf_counter()
    if tried.new_views:
        registry.views.add(tried.file_name, tried.text, tried.new_views, tried.new_keys)
    waited = {one.identity for one in registry.views.all() if one.identity in tried.views and one.state != "live"}
    if not waited:
        return [], 0.0
    wait_until_whole(registry, waited, lambda: running(config.directory) is not None, _say)
    told = [
        {"view": one.name, "version": one.version, "history_since_ms": one.history_since_ms}
        for one in registry.views.all()
        if one.identity in waited
    ]
    return told, time.perf_counter() - begun


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


def print_deployed(deployed: Mapping[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for view in deployed["views"]:
        since = view["history_since_ms"]
        has = "all events" if since is None else f"the events since {iso(since)}: what was before has been deleted"
        console.print(f"view {view['view']} is live with {has}; backfilled in {deployed['backfill_s']:.1f} s")
    for view in deployed["older_views"]:
        console.print(
            f"view {view['view']} is kept as version {view['version']} for models; `/v1/features/{view['view']}` goes "
            f"on answering with version {view['answering']}, which came later"
        )
    if not deployed["views"] and not deployed["models"]:
        console.print("nothing to deploy: the cluster keeps these views already")
    for one in deployed["models"]:
        slow = ", slow: called in a thread; `millpond pool` gives it replicas of its own"
        console.print(
            f"{one['model']} version {one['version']} is live as {one['as']} on {deployed['replicas']} replica(s): "
            f"{one['url']}\n  predict takes {one['predict_us']:,.0f} us"
            + (slow if one["predict_us"] > 500 else "")
            + f"; checked in {deployed['checked_s']:.2f} s, live {deployed['live_s']:.2f} s later"
        )


def change_model(
    config: Config,
    change: str,
    model: str,
    version: str | None = None,
    pool: Pool | None = None,
    verified: int | None = None,
) -> str:
    """Promote, roll back, retire a model or move it to a pool; return what is live then, when every replica has it.

    verified: so many logged scores of what is promoted have to be found equal, and none different.
    """
    state = running(config.directory)
    if pool is not None and state is not None:
        check_pool(model, pool, state["cpus"])
    with open_registry(config) as registry:
        before = registry.rollouts()
        if change == "promote":
            if verified is not None:
                version = check_verified(config, before.get(model), model, version, verified)
            generation = registry.promote(model, version)
        elif change == "rollback":
            generation = registry.rollback(model)
        elif change == "retire":
            generation = registry.retire(model, version)
        else:
            assert change == "pool"
            generation = registry.set_pool(model, pool)
        after = registry.rollouts()
        rollout = after.get(model)
        live = [] if rollout is None else rollout.versions
        if state is not None:
            try:
                wait_until_live(registry, generation, live, _say)
            except MillpondError as error:
                if change not in ("promote", "pool"):
                    raise
                done = roll_back(registry, before, after, live[:1])
                raise Unavailable(f"{error.message}; {done}", code=error.code) from error
    if rollout is None:
        return f"{model}: nothing is live"
    roles = [f"champion {rollout.champion.version}"] if rollout.champion else []
    roles += [f"canary {rollout.canary.version} ({rollout.share:.3g} of the ids)"] if rollout.canary else []
    roles += [f"shadow {rollout.shadow.version}"] if rollout.shadow else []
    return f"{model}: {', '.join(roles)}" + (f", in a pool of {rollout.pool.replicas}" if rollout.pool else "")


# -- what there is


def describe_models(config: Config, model: str | None = None) -> list[dict[str, Any]]:
    """Return every version of every model, or of one: its state, and what the replicas that live say of it."""
    with open_registry(config) as registry:
        reports = [one for one in registry.reports().values() if is_alive(one)]
        rollouts = registry.rollouts()
        names = registry.models()
        if model is not None:
            registry.versions(model)  # raises if there is none
            names = [model]
        return [
            _describe(registry, version, rollouts, reports) for name in names for version in registry.versions(name)
        ]


def _describe(
    registry: Registry, version: Version, rollouts: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    name = f"{version.model}@{version.version}"
    lanes = [one["versions"][name] for one in reports if name in one["versions"]]
    state = registry.state_of(version)
    rollout = rollouts.get(version.model)
    shadows = [
        one["shadows"][version.model]
        for one in reports
        if state == "shadow" and one["shadows"].get(version.model, {}).get("shadow") == version.version
    ]
    return {
        "model": version.model,
        "version": version.version,
        "state": state,
        "share": rollout.share if rollout is not None and state == "canary" else None,
        "pool": None if rollout is None or rollout.pool is None else rollout.pool.replicas,
        "pool_running": sum(one["pool"] == version.model for one in reports),
        "owner": version.owner,
        "about": version.about,
        "created": version.created,
        "digest": version.digest,
        "key_fields": version.key_fields,
        "features": list(version.features),
        "memory_bytes": version.memory_bytes,
        "predict_us": round(version.predict_us, 1),
        "replicas": len(lanes),
        "failures": sorted({one["failed"][name] for one in reports if name in one["failed"]}),
        **{c: sum(lane[c] for lane in lanes) for c in ("requests", "ids", "calls", "failed", "timeouts", "refused")},
        "call_us": max((lane["call_us"] for lane in lanes), default=None),
        "in_threads": any(lane["in_threads"] for lane in lanes),
        "disagreement": _together(shadows) if shadows else None,
    }


def _together(shadows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the shadow's replicas have seen, together."""
    counts = {c: sum(s[c] for s in shadows) for c in ("compared", "different", "missed", "failed", "numbers")}
    examples = [example for s in shadows for example in s["examples"]]
    examples.sort(key=lambda one: difference_of(one["champion"], one["shadow"]), reverse=True)
    return {
        "champion": shadows[0]["champion"],
        **counts,
        "abs_mean": sum(s["abs_sum"] for s in shadows) / counts["numbers"] if counts["numbers"] else None,
        "abs_max": max(s["abs_max"] for s in shadows) if counts["numbers"] else None,
        "examples": examples[:EXAMPLES_MAX],
    }


def print_models(described: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("model", "version", "state", "owner", "requests", "failed", "504", "429", "call us", "where"):
        table.add_column(name, no_wrap=True, justify="left" if name in _TEXTS else "right")
    for one in described:
        if one["state"] == "retired":
            continue
        state = f"canary {one['share']:.3g}" if one["state"] == "canary" else one["state"]
        where = "-" if not one["replicas"] else "thread" if one["in_threads"] else "loop"
        where = where if one["pool"] is None else f"{where}, {one['pool_running']} of its pool of {one['pool']}"
        call = "-" if one["call_us"] is None else f"{one['call_us']:,.0f}"
        counts = (f"{one[c]:,}" for c in ("requests", "failed", "timeouts", "refused"))
        state = "BROKEN" if one["failures"] else state
        table.add_row(one["model"], one["version"], state, one["owner"], *counts, call, where)
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, _WIDTH_MIN))
    console.print(table)
    for one in described:
        for why in one["failures"]:
            console.print(why, style="red", markup=False)
        if one["timeouts"] or one["refused"]:
            console.print(
                f"{one['model']} version {one['version']} has not answered {one['timeouts']:,} requests in time and "
                f"refused {one['refused']:,}: `millpond pool {one['model']}` would give it replicas of its own"
            )


def print_model(described: Sequence[Mapping[str, Any]]) -> None:
    """Print all that is known of one model."""
    print_models(described)
    console = Console(highlight=False, soft_wrap=True, markup=False)  # ids and answers may look like markup
    for one in described:
        console.print(
            f"version {one['version']}  {one['state']}, created {one['created']}, digest {one['digest'][:12]}\n"
            f"  id {', '.join(f'{k} ({t})' for k, t in one['key_fields'].items())}; reads {len(one['features'])} "
            f"features; when it was checked it took {one['memory_bytes'] / 1e6:,.1f} MB, and predict "
            f"{one['predict_us']:,.0f} us"
        )
        if (seen := one["disagreement"]) is not None:
            line = f"  shadow of {seen['champion']}: {seen['compared']:,} compared, {seen['different']:,} different"
            if seen["abs_max"] is not None:
                line += f", absolute difference mean {seen['abs_mean']:.6g}, max {seen['abs_max']:.6g}"
            console.print(line + f"; {seen['missed']:,} missed, {seen['failed']:,} failed")
            for example in seen["examples"]:
                console.print(f"    {json.dumps(example['id'])}: {example['champion']} -> {example['shadow']}")
