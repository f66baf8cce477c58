"""An entity of a real cluster is forgotten by the command, with its logged scores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from apps import purchase
from served_contract import START, Served
from terminal import run
from test_score_log import logged

from millpond.feature_actors.keys import hash_values
from millpond.models.score_log import read_scores

WHO, OTHER, BOOK = 8_800_880_088_008_801, 8_800_880_088_008_802, "forgotten-book"


def scan(served: Served) -> list[list[str]]:
    low, high = hash_values([[WHO]], 1).view("int64")[0].tolist()
    script = Path(__file__).parents[1] / "scan_files.py"
    wanted = json.dumps({"words": [WHO, low, high], "texts": []})
    done = subprocess.run(
        [sys.executable, str(script), wanted, str(served.directory)], capture_output=True, text=True, check=True
    )
    found: list[list[str]] = json.loads(done.stdout)
    return found


def test_an_entity_is_forgotten_by_the_command_and_others_notice_nothing(served: Served) -> None:
    own = [purchase(f"forget-{n}", WHO, float(n), START, book_id=BOOK) for n in range(5)]
    served.post_events([*own, *(purchase(f"kept-{n}", OTHER, float(n), START, book_id=BOOK) for n in range(3))])
    answers = [served.score("churn", {"user_id": user}) for user in (WHO, OTHER)]
    for answer in answers:
        logged(served, answer["id"])
    before = served.score("offer", {"book_id": BOOK, "user_id": OTHER})
    found = scan(served)
    assert any("cache.db" in file for file, _ in found)
    assert any("_scores" in file for file, _ in found)
    name, where = ("--name", served.directory.name), ("--data-dir", str(served.directory.parent))
    looked = run(served.directory, "forget", "--user-id", str(WHO), "--status", *name, *where)
    assert (looked.returncode, looked.stdout) == (1, f"user_id {WHO}: nobody has asked to forget it\n")
    done = run(served.directory, "forget", "--user-id", str(WHO), "--json", *name, *where)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["state"], told["removed"]) == ("done", {"rows": 2, "events": 5, "scores": 1})
    assert scan(served) == []
    after = served.score("offer", {"book_id": BOOK, "user_id": OTHER})
    assert (after["features"], after["result"]) == (before["features"], before["result"])
    assert served.score("churn", {"user_id": WHO})["unknown"] == ["user_spend"]
    status, _, ack = served.call("POST", "/v1/events/purchases", own)
    assert (status, ack["forgotten"], ack["accepted"]) == (200, 5, 0)
    ids = [one["id"] for table in read_scores(str(served.directory / "history")) for one in table.to_pylist()]
    assert answers[1]["id"] in ids
    assert answers[0]["id"] not in ids
    # What others were served is still found equal; a key of several fields, or one of nobody, is refused.
    verified = run(served.directory, "verify", "--model", "offer", "--json", *name, *where)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    several = run(served.directory, "forget", "--user-id", "1", "--book-id", "x", *name, *where)
    assert several.returncode == 1
    assert "an entity is forgotten by one field" in several.stderr
    status, _, refused = served.call("POST", "/v1/forget", {"user_id": WHO})
    assert (status, refused["error"]["code"]) == (401, "unauthorized")
