"""What `millpond status` shows: shards, events, entities, models and memory of the running cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from millpond.cluster.cluster import admin_token
from millpond.feature_actors.errors import Unavailable

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
    return {**state, **answer.json()}


def print_status(status: dict[str, Any]) -> None:
    console = Console()
    console.print(f"cluster [bold]{status['name']}[/bold] at {status['url']} (process {status['pid']})")
    shards = Table(
        "shard", "slots", "tiles", "tile memory", "id memory", "strings", title="Shards", title_justify="left"
    )
    for s in status["shards"]:
        shards.add_row(
            str(s["shard"]),
            str(s["slots"]),
            f"{s['tiles']:,}",
            _megabytes(s["tile_bytes"]),
            _megabytes(s["filter_bytes"]),
            f"{s['strings']:,}" + (f" ({s['strings_refused']:,} refused)" if s["strings_refused"] else ""),
        )
    console.print(shards)
    tables = Table("source [key]", "events", "entities", title="Features", title_justify="left")
    for name in status["shards"][0]["entities"] if status["shards"] else ():
        events = sum(s["events"][name] for s in status["shards"])
        entities = sum(s["entities"][name] for s in status["shards"])
        tables.add_row(name.replace("[", r"\["), f"{events:,}", f"{entities:,}")
    console.print(tables)
    models = Table("model", "version", "owner", title="Models", title_justify="left")
    for m in status["models"]:
        models.add_row(m["model"], m["version"], m["owner"])
    console.print(models)


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"
