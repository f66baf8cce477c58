"""What `millpond status` shows: shards, events, entities, views, models and the score log of the running cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from millpond.cluster.cluster import admin_token
from millpond.deployments.answers import iso
from millpond.deployments.host import is_alive
from millpond.feature_actors.errors import Unavailable
from millpond.models.registry import Registry

__all__ = ["fetch_status", "print_status"]


def fetch_status(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Ask the running cluster; raise `Unavailable` with its own message if it cannot answer."""
    headers = {"authorization": f"Bearer {admin_token(directory)}"}
    try:
        answer = httpx.get(f"{state['url']}/v1/status", headers=headers, timeout=30)
    except httpx.HTTPError as error:
        raise Unavailable(f"cluster at {state['url']} does not answer: {error}") from None
    if answer.status_code != 200:
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = answer.text[:200]
        raise Unavailable(f"cluster at {state['url']} answers {answer.status_code}: {message}")
    registry = Registry(directory / "registry")
    told = answer.json()
    try:
        return {**state, **told, "score_log": _score_log(registry), "views": _views(registry, told["answering"])}
    finally:
        registry.close()


def _score_log(registry: Registry) -> dict[str, int] | None:
    """Return what the replicas that live have logged and dropped, together; None if scores are not logged."""
    counts = [r["score_log"] for r in registry.reports().values() if is_alive(r) and r["score_log"] is not None]
    return {name: sum(one[name] for one in counts) for name in counts[0]} if counts else None


def _views(registry: Registry, answering: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the views that came while the cluster ran, and how far those are that are being computed; then those that
    came with the start and are still asked for by the name of one of them. answering: versions by name."""
    progress, added = registry.views.progress(), registry.views.all()
    views = [
        {"view": one.name, "version": one.version, "state": one.state, "why": one.why,
         "answers": one.version == answering.get(one.name),
         "progress": str(progress[one.identity]) if one.identity in progress else None,
         "history_since_ms": one.history_since_ms}
        for one in added
    ]  # fmt: skip
    for name in dict.fromkeys(one.name for one in added):
        if name in answering and not any(one["answers"] for one in views if one["view"] == name):
            views.append({"view": name, "version": answering[name], "state": "live", "why": "came with the start",
                          "answers": True, "progress": None, "history_since_ms": None})  # fmt: skip
    return views


def print_status(status: dict[str, Any]) -> None:
    console = Console()
    console.print(f"cluster [bold]{status['name']}[/bold] at {status['url']} (process {status['pid']})")
    console.print(f"logs of its processes: {status['logs']}", soft_wrap=True)
    shards = Table(
        "shard", "state", "slots", "tiles", "tile memory", "ids", "id memory", "ids known for", "strings",
        title="Shards", title_justify="left",
    )  # fmt: skip
    for s in status["shards"]:
        if s["state"] != "ready":
            shards.add_row(str(s["shard"]), s["state"], s["why"])
            continue
        shards.add_row(
            str(s["shard"]),
            s["state"],
            str(s["slots"]),
            f"{s['tiles']:,}",
            _megabytes(s["tile_bytes"]),
            f"{s['ids']:,}",
            _megabytes(s["filter_bytes"]),
            _duration(s["dedupe_held_ms"]),
            f"{s['strings']:,}" + (f" ({s['strings_refused']:,} refused)" if s["strings_refused"] else ""),
        )
    console.print(shards)
    ready = [s for s in status["shards"] if s["state"] == "ready"]
    for s in ready:
        if s["dedupe_held_ms"] < s["dedupe_horizon_ms"]:
            console.print(
                f"[bold]warning[/bold]: shard {s['shard']} remembers event ids for {_duration(s['dedupe_held_ms'])} "
                f"instead of {_duration(s['dedupe_horizon_ms'])} (`dedupe_horizon`): their memory is full; raise "
                "`dedupe_mb_max`, or add shards",
                soft_wrap=True,
            )
    logs = Table("shard", "epoch", "log", "snapshot at", "history to", "owed", title="Logs", title_justify="left")
    for s in ready:
        taken = f"{s['snapshot_offset']:,} ({s['snapshot_s']:.1f} s)" if "snapshot_offset" in s else ""
        log = f"{s['log_first']:,} to {s['log_end']:,}"
        logs.add_row(str(s["shard"]), str(s["epoch"]), log, taken, f"{s['history_to']:,}", f"{s['owed']:,}")
    console.print(logs)
    tables = Table("source [key]", "events", "entities", title="Features", title_justify="left")
    for name in ready[0]["entities"] if ready else ():
        events = sum(s["events"][name] for s in ready)
        entities = sum(s["entities"][name] for s in ready)
        tables.add_row(name.replace("[", r"\["), f"{events:,}", f"{entities:,}")
    console.print(tables)
    if status["views"]:
        views = Table("view", "version", "state", "/v1/features", "has", title="Views that were deployed",
                      title_justify="left")  # fmt: skip
        for v in status["views"]:
            since = "all events" if v["history_since_ms"] is None else f"events since {iso(v['history_since_ms'])}"
            answers = "answers" if v["answers"] else ""
            views.add_row(v["view"], v["version"], v["state"], answers, v["why"] or v["progress"] or since)
        console.print(views)
    models = Table("model", "version", "owner", title="Models", title_justify="left")
    for m in status["models"]:
        models.add_row(m["model"], m["version"], m["owner"])
    console.print(models)
    if (logged := status["score_log"]) is not None:
        console.print(
            f"score log: {logged['written']:,} scores written since the replicas started, {logged['waiting']:,} wait"
        )
        if logged["dropped"]:
            console.print(
                f"[bold]warning[/bold]: {logged['dropped']:,} scores that were to be logged have been dropped; see the "
                "log of the replicas, raise `score_log_waiting_max` or lower `score_log_share`",
                soft_wrap=True,
            )


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"


def _duration(ms: int) -> str:
    """Return a length of time for people, rounded down.

    >>> _duration(86_400_000), _duration(5_399_999), _duration(59_999)
    ('24h 0m', '1h 29m', '59s')
    """
    if ms < 60_000:
        return f"{ms // 1000}s"
    return f"{ms // 3_600_000}h {ms // 60_000 % 60}m"
