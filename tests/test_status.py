"""What `millpond status` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from millpond.cluster.status import _views, print_status
from millpond.models.registry import Registry

_SHARD: dict[str, Any] = {
    "shard": 0, "state": "ready", "epoch": 1, "slots": 4, "events": {"first[user]": 5}, "entities": {"first[user]": 2},
    "tiles": 3, "tile_bytes": 4_000_000, "filter_bytes": 56_000_000, "ids": 1_000_000, "dedupe_horizon_ms": 86_400_000,
    "dedupe_held_ms": 86_400_000, "strings": 7, "strings_refused": 0, "log_first": 0, "log_end": 9, "history_to": 0,
    "owed": 0,
}  # fmt: skip


def printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *shards: dict[str, Any], views: Any = ()
) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    status = {"name": "dev", "url": "http://x", "pid": 1, "logs": "/logs", "models": [], "score_log": None}
    print_status({**status, "shards": list(shards), "views": views})
    return capsys.readouterr().out


def test_of_several_versions_of_a_view_the_one_that_answers_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "registry")
    registry.views.add("spend.py", "", ["spend#b2", "spend#c3", "other#d4", "first#e5"])
    for identity in ("spend#b2", "spend#c3", "other#d4"):
        registry.views.settle(identity, "live")
    # What a replica says: `first` is not live yet, and the versions of `other` and `spend` came one after the other.
    views = _views(registry, {"spend": "c3", "other": "d4", "first": "a1", "alone": "f6"})
    registry.close()
    assert [(one["view"], one["version"], one["state"], one["answers"]) for one in views] == [
        ("spend", "b2", "live", False), ("spend", "c3", "live", True), ("other", "d4", "live", True),
        ("first", "e5", "backfilling", False), ("first", "a1", "live", True),
    ]  # fmt: skip
    rows = [line.split() for line in printed(capsys, monkeypatch, _SHARD, views=views).splitlines()]
    marked = [[cell for cell in row if cell != "\u2502"] for row in rows if "answers" in row]
    assert marked == [
        ["spend", "c3", "live", "answers", "all", "events"], ["other", "d4", "live", "answers", "all", "events"],
        ["first", "a1", "live", "answers", "came", "with", "the", "start"],
    ]  # fmt: skip


def test_the_horizon_that_is_held_is_shown_and_no_warning_while_it_is_the_configured_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = printed(capsys, monkeypatch, _SHARD)
    row = next(line for line in out.splitlines() if "ready" in line)
    assert [cell.strip() for cell in row.split("\u2502")][1:-1] == [
        "0", "ready", "4", "3", "4.0 MB", "1,000,000", "56.0 MB", "24h 0m", "7",
    ]  # fmt: skip
    assert "warning" not in out


def test_a_shorter_horizon_is_a_warning_and_a_shard_that_recovers_has_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrunk = {**_SHARD, "shard": 1, "dedupe_held_ms": 5_399_999}
    recovers = {"shard": 2, "state": "recovering", "why": "is replaying its log"}
    out = printed(capsys, monkeypatch, _SHARD, shrunk, recovers)
    assert [line for line in out.splitlines() if "warning" in line] == [
        "warning: shard 1 remembers event ids for 1h 29m instead of 24h 0m (`dedupe_horizon`): their memory is full; "
        "raise `dedupe_mb_max`, or add shards"
    ]
