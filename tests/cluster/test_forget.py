"""An entity of a real cluster is forgotten by the command, with its logged scores and as an example of a shadow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from apps import DEFINITION, purchase
from served_contract import START, Served
from terminal import run, until
from test_score_log import logged

from millpond.cluster.config import Config
from millpond.cluster.model_commands import change_model, deploy_file, describe_models
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


def with_a_shadow(config: Config, folder: Path) -> None:
    """Have a model `shown` whose shadow differs for everybody who has an order."""
    for version, role in (("1", "champion"), ("2", "shadow")):
        path = folder / f"shown_{version}.py"
        path.write_text(
            f"{DEFINITION.partition('class Total')[0]}\nclass P:\n"
            f"    def predict(self, features): return features.matrix[:, 0] * {version}\n"
            f'm = Model("shown", version="{version}", owner="ml", features=[user_spend["orders_30d"]], predictor=P)\n'
        )
        deploy_file(config, path, as_=role)


def examples(config: Config) -> list[int]:
    """Return whom the shadow of `shown` has as examples."""
    (shadow,) = (one for one in describe_models(config, "shown") if one["state"] == "shadow")
    return [one["id"]["user_id"] for one in shadow["disagreement"]["examples"]]


def test_an_entity_is_forgotten_by_the_command_and_others_notice_nothing(served: Served, tmp_path: Path) -> None:
    config = Config(name=served.directory.name, data_dir=str(served.directory.parent))
    with_a_shadow(config, tmp_path)
    own = [purchase(f"forget-{n}", WHO, float(n), START, book_id=BOOK) for n in range(5)]
    served.post_events([*own, *(purchase(f"kept-{n}", OTHER, float(n), START, book_id=BOOK) for n in range(3))])
    answers = [served.score("churn", {"user_id": user}) for user in (WHO, OTHER)]
    for answer in answers:
        logged(served, answer["id"])
    before = served.score("offer", {"book_id": BOOK, "user_id": OTHER})
    shown = served.score("shown", {"user_id": WHO})
    logged(served, shown["id"])
    until(lambda: examples(config) == [WHO], "the example to be reported")
    found = scan(served)
    assert any("registry/index" in file for file, _ in found)
    assert any("cache.db" in file for file, _ in found)
    assert any("_scores" in file for file, _ in found)
    name, where = ("--name", served.directory.name), ("--data-dir", str(served.directory.parent))
    looked = run(served.directory, "forget", "--user-id", str(WHO), "--status", *name, *where)
    assert (looked.returncode, looked.stdout) == (1, f"user_id {WHO}: nobody has asked to forget it\n")
    done = run(served.directory, "forget", "--user-id", str(WHO), "--json", *name, *where)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["removed"].pop("scores") in (2, 3)  # the shadow's may not have been in a file yet
    assert (told["state"], told["removed"]) == ("done", {"rows": 2, "events": 5})
    assert (scan(served), examples(config)) == ([], [])
    change_model(config, "retire", "shown")
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
