"""Scores of a real cluster are logged, verified beside it, and explained."""

from __future__ import annotations

import json
import time
from typing import Any

from apps import purchase
from served_contract import START, Served, fresh
from terminal import run

from millpond.models.score_log import read_scores

PATIENCE_S = 60.0


def logged(served: Served, answer_id: str) -> dict[str, Any]:
    """Return a score when it has been logged."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for table in read_scores(str(served.directory / "history"), newest_first=True):
            for one in table.to_pylist():
                if one["id"] == answer_id:
                    return dict(one)
        time.sleep(0.1)
    raise AssertionError(f"answer {answer_id} was not logged within {PATIENCE_S} s")


def test_what_is_served_is_logged_verified_and_explained(served: Served) -> None:
    user = fresh()
    served.post_events([purchase(f"log-{user}-{n}", user, float(n), START, book_id=f"log{user}") for n in range(5)])
    answer = served.score("churn", {"user_id": user})
    one = logged(served, answer["id"])
    assert (one["features"], json.loads(one["result"])) == (list(answer["features"].values()), answer["result"])
    (row,) = one["rows"]
    assert row["table"] == "purchases[user_id]"
    # All that other tests have asked this cluster for, too.
    name, where = ("--name", served.directory.name), ("--data-dir", str(served.directory.parent))
    verified = run(served.directory, "verify", "--limit", "2000", "--json", *name, *where)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    scores = json.loads(verified.stdout)["scores"]
    assert (scores["different"], scores["missing"]) == (0, 0)
    assert scores["equal"] >= 1
    token = (served.directory / "admin_token").read_text()
    status, _, told = served.call(
        "GET", f"/v1/explain/churn?user_id={user}", headers={"authorization": f"Bearer {token}"}
    )  # fmt: skip
    assert status == 200, told
    assert told["equal"] is True
    assert {f["feature"]: (f["value"], f["events"]) for f in told["features"]} == {
        name: (value, 5) for name, value in answer["features"].items()
    }
    shown = run(served.directory, "explain", "churn", "--user-id", str(user), "--json", *name, *where)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["features"] == told["features"]
    before = run(served.directory, "explain", "churn", "--user-id", str(user), "--at", "0s", *name, *where)
    assert f"answer {answer['id']}; computed again it is the same" in before.stdout, before.stderr
