"""What was served is found equal when it is computed again; what was tampered with is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from check_directory import LAYOUT, PAYMENTS
from folders import folder
from hypothesis import given, settings
from hypothesis import strategies as st
from verified_world import FILE, MINUTE, VerifiedWorld, payment, random_world

from millpond.cluster import cli
from millpond.feature_actors.log.history import delete_expired
from millpond.feature_actors.log.part import DAY_MS
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.shard import Shard
from millpond.models.definition import Definition
from millpond.models.explanation import explain
from millpond.models.model import LoadedModel
from millpond.models.score_log import SCHEMA, ScoreFiles, read_scores
from millpond.models.verification import Counts, Verification
from millpond.models.version import version_of

NOW = 1_700_000_000_000


@settings(max_examples=max(1, settings().max_examples // 5))
@given(
    seed=st.integers(0, 2**32), n_shards=st.sampled_from([1, 3]), history=st.booleans(), crashed=st.booleans(),
    chunk=st.sampled_from([1, 7, 1_000]),
)  # fmt: skip
def test_what_was_served_is_verified_equal(seed: int, n_shards: int, history: bool, crashed: bool, chunk: int) -> None:
    with folder() as path:
        world = random_world(path, seed, n_shards=n_shards, history=history)
        world.lay_out(crashed=crashed)
        found = world.verify(chunk=chunk)
        n = sum(map(len, world.tables))
        assert found.differences == []
        assert (found.scores, found.why_missing) == (Counts(equal=n), {})
        of_model = {name: sum(len(t) for t in world.tables if t["model"][0].as_py() == name) for name in world.loaded}
        assert found.models == {f"{name}@1": Counts(equal=k) for name, k in of_model.items()}
        assert found.views == {"by_user": Counts(equal=n), "by_shop": Counts(equal=of_model["both"])}


# -- what is planted


@pytest.fixture
def world(tmp_path: Path) -> VerifiedWorld:
    """Ten payments of user 1 and as many of user 2; each of them is scored after each, and the shops once."""
    world = VerifiedWorld(tmp_path)
    for i in range(10):
        now_ms = NOW + i * MINUTE
        world.send([payment(2 * i, now_ms - 5, 1, "a", i), payment(2 * i + 1, now_ms, 2, "b", -i)], now_ms)
        world.score("user", [{"user": 1}])
        world.score("user", [{"user": 2}])
    world.score("both", [{"user": 1, "shop": "a"}, {"user": 99, "shop": "b"}])
    world.lay_out()
    return world


def scores_of(world: VerifiedWorld) -> list[dict[str, Any]]:
    return [one for table in read_scores(str(world.path / "history")) for one in table.to_pylist()]


def with_changed(world: VerifiedWorld, answer_id: str, change: Callable[[dict[str, Any]], None]) -> list[pa.Table]:
    scores = scores_of(world)
    for one in scores:
        if one["id"] == answer_id:
            change(one)
    return [pa.Table.from_pylist(scores, schema=SCHEMA)]


def only_difference(found: Verification) -> Any:
    assert (found.scores.different, found.scores.missing) == (1, 0)
    assert found.scores.equal == 21
    (difference,) = found.differences
    return difference


def test_a_changed_feature_is_found_and_named_with_its_events(world: VerifiedWorld) -> None:
    def change(one: dict[str, Any]) -> None:
        assert one["features"] == [3.0, 3.0, 2.0]
        one["features"][1] = np.nextafter(3.0, 4.0)

    found = world.verify(with_changed(world, "4", change))
    difference = only_difference(found)
    assert (difference.id, difference.model, difference.version) == ("4", "user", "1")
    assert (difference.key, difference.as_of_ms) == ({"user": 1}, NOW + 2 * MINUTE)
    assert difference.what == ["`by_user.sum`: logged 3.0000000000000004, recomputed 3.0"]
    (row,) = difference.rows
    assert (row["table"], row["events"]) == ("payments[user]", 3)
    assert [(event["id"], event["cents"], event["at"]) for event in row["newest"]] == [
        ("p0", 0, NOW - 5), ("p2", 1, NOW + MINUTE - 5), ("p4", 2, NOW + 2 * MINUTE - 5)
    ]  # fmt: skip
    assert row["newest"][-1]["_offset"] == row["offset"]
    assert found.views["by_user"] == Counts(21, 1, 0)
    assert found.models["user@1"] == Counts(19, 1, 0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda one: one["features"].__setitem__(1, -0.0), "`by_user.sum`: logged -0.0, recomputed 0.0"),
        (lambda one: one["features"].__setitem__(2, float("nan")), "`by_user.max_1h`: logged nan, recomputed 0.0"),
        (lambda one: one["unknown"].append("by_user"), "view `by_user`: it did not know the id, recomputed otherwise"),
        (lambda one: one.update(result="1.001"), "result: logged 1.001, recomputed 1.0000000000001"),
        (lambda one: one.update(result='{"a": 1}'), 'result: logged {"a": 1}, recomputed 1.0000000000001'),
        (
            lambda one: one["rows"][0].update(offset=77),
            "payments[user]: at offset 77 is no event of the key",
        ),
        (
            lambda one: one.update(as_of_ms=NOW - 1_000),
            "payments[user]: at offset 1 the row is later than the time it was read as of",
        ),
    ],
)  # fmt: skip
def test_whatever_is_changed_of_a_score_is_found(
    world: VerifiedWorld, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    difference = only_difference(world.verify(with_changed(world, "0", change)))
    assert difference.what[0] == what
    assert difference.id == "0"


def test_a_changed_text_is_found(world: VerifiedWorld) -> None:
    def change(one: dict[str, Any]) -> None:
        assert one["texts"] == '{"by_shop.last":"a"}'
        one["texts"] = '{"by_shop.last":"b"}'

    difference = only_difference(world.verify(with_changed(world, "20", change)))
    assert difference.what == ["`by_shop.last`: logged 'b', recomputed 'a'"]
    assert [row["table"] for row in difference.rows] == ["payments[shop]"]


def test_a_changed_event_in_the_log_is_found_where_it_was_seen(world: VerifiedWorld) -> None:
    world.change_event("p4", lambda event: {**event, "cents": event["cents"] + 1})
    found = world.verify(differences_max=3)
    # It was the third of user 1, who was scored eight times from then on, and for the last time with the shop.
    assert found.models == {"user@1": Counts(12, 8, 0), "both@1": Counts(1, 1, 0)}
    assert found.views["by_shop"] == Counts(equal=2)
    assert [(one.id, one.what[0]) for one in found.differences] == [
        ("4", "`by_user.sum`: logged 3.0, recomputed 4.0"), ("6", "`by_user.sum`: logged 6.0, recomputed 7.0"),
        ("8", "`by_user.sum`: logged 10.0, recomputed 11.0"),
    ]  # fmt: skip
    assert found.differences[0].rows[0]["newest"][-1]["cents"] == 3


def test_an_event_moved_to_another_entity_is_missed_at_the_one_and_found_at_the_other(world: VerifiedWorld) -> None:
    world.change_event("p4", lambda event: {**event, "cents": 2, "user": None})
    found = world.verify()
    assert found.models["user@1"] == Counts(12, 8, 0)


def test_versions_that_declare_a_view_otherwise_are_verified_side_by_side(tmp_path: Path) -> None:
    world = VerifiedWorld(tmp_path)
    text = FILE.text.replace('"sum": Sum("cents"), "max_1h"', '"max_1h"').partition("both = Model")[0]
    text += 'user = Model("user", version="2", owner="tests", features=[*BY_USER], predictor=Product)\n'
    other = Definition("other.py", text)
    (model,) = other.declared().models
    version = version_of(other, model, {"user": "int64"})
    world.registry.add(other, [version])
    world.send([payment(i, NOW, i, "a", 5) for i in range(4)], NOW)
    world.score("user", [{"user": 1}, {"user": 2}])
    world.loaded["user"], world.versions["user"] = LoadedModel(model, LAYOUT, tmp_path), version
    world.score("user", [{"user": 2}])
    world.lay_out()
    scores = [one for table in world.tables for one in table.to_pylist()]
    for order in (scores, scores[::-1]):
        served = [{**one, "served_ms": place} for place, one in enumerate(order)]
        found = world.verify([pa.Table.from_pylist(served, schema=SCHEMA)])
        assert found.models == {"user@1": Counts(equal=2), "user@2": Counts(equal=1)}


WIDE = """
AGAIN = FeatureView("again", owner="tests", source=PAYMENTS, key=["user"],
                    features={"last": Last("cents"), "n_1h": Count(window="1h")})
TWICE = FeatureView("twice", owner="tests", source=PAYMENTS, key=["user"], features={"min": Min("cents")})
wide = Model("wide", version="1", owner="tests", features=[*AGAIN, *BY_USER, *TWICE], predictor=Product)
apart = Model("apart", version="1", owner="tests", features=[*AGAIN, *TWICE], predictor=Product)
"""


@pytest.mark.parametrize("n_shards", [1, 2])
def test_views_that_came_while_the_cluster_ran_are_verified_and_explained(tmp_path: Path, n_shards: int) -> None:
    world = VerifiedWorld(tmp_path, n_shards=n_shards, history=True)
    text = FILE.text.replace("import Count,", "import Count, Min,").partition("both = Model")[0] + WIDE
    definition = Definition("wide.py", text)
    models = {model.name: model for model in definition.declared().models}
    world.versions |= {name: version_of(definition, model, {"user": "int64"}) for name, model in models.items()}
    world.registry.add(definition, [world.versions[name] for name in models])
    views = {feature.view.name: feature.view for feature in models["apart"].features}
    for i in range(12):
        now_ms = NOW + i * 20 * MINUTE
        world.send([payment(3 * i + k, now_ms - k, k % 2, "a", 10 * i + k) for k in range(3)], now_ms)
        if i == 4:
            for view in views.values():
                world.cluster.add_view(view)
            for number in range(n_shards):
                while not world.cluster.backfill_steps(number, 1_000):
                    pass
            world.loaded |= {
                name: LoadedModel(model, world.cluster.client.layout, tmp_path) for name, model in models.items()
            }
            assert world.loaded["wide"].plan.program.parts == 3
        world.score("user", [{"user": 0}])
        if i >= 4:
            world.score("wide", [{"user": 0}, {"user": 1}, {"user": 7}])
            world.score("apart", [{"user": 1}])
    world.lay_out()
    found = world.verify()
    assert (found.differences, found.why_missing) == ([], {})
    assert found.models == {
        "user@1": Counts(equal=12), "wide@1": Counts(equal=24), "apart@1": Counts(equal=8)
    }  # fmt: skip
    told = explain(world.past, world.registry, "wide", "1", {"user": 1}, served=world.tables[-2].slice(1, 1))
    assert told["equal"] is True


# -- within a request, rounding, two stages


@pytest.mark.parametrize("k", range(1, 5))
def test_a_score_read_within_a_request_is_equal_and_counted(tmp_path: Path, k: int) -> None:
    world = VerifiedWorld(tmp_path, n_shards=1)
    world.send([payment(0, NOW, 1, "a", 5)], NOW)
    world.send([payment(1 + i, NOW + i, u, "b", 10 + i) for i, u in enumerate([1, 2, 1, 1, 3, 1])], NOW + MINUTE)
    (durable,) = world.cluster.shards
    *before, (offset, (last, _)) = durable.log.read()  # type: ignore[attr-defined]
    halfway = Shard(LAYOUT, world.cluster.shard_map, 0)
    for at, (record, _) in before:
        halfway.replay_events(record, at)
    steps = halfway.replay_in_steps(last, offset, [1, 3, 4, 6])
    for _ in range(k):
        next(steps)
    plan: ReadPlan = world.loaded["user"].plan
    rows = plan.rows(halfway.read(plan.question({"user": [1]}, 1, NOW + MINUTE, None)))
    assert rows.matrix[0, 0] == 1 + k
    world.log("user", {"user": [1]}, rows)
    world.lay_out()
    found = world.verify()
    assert (found.scores, found.within_request) == (Counts(equal=1), int(k < 4))
    # Of a row that is like none of these states, too.
    table = world.tables[0].to_pylist()
    table[0]["features"][0] = 99.0
    found = world.verify([pa.Table.from_pylist(table, schema=SCHEMA)])
    assert (found.scores, found.within_request) == (Counts(different=1), 0)


def test_results_that_differ_in_rounding_are_equal_and_counted(tmp_path: Path) -> None:
    world = VerifiedWorld(tmp_path)
    world.send([payment(i, NOW, i, "a", 5) for i in range(4)], NOW)
    world.score("user", [{"user": 1}])  # alone, as it is predicted again at last
    world.score("user", [{"user": 1}, {"user": 2}])
    world.lay_out()
    found = world.verify()
    assert (found.scores, found.rounded) == (Counts(equal=3), 2)


def test_the_results_of_a_model_that_read_more_are_not_compared(tmp_path: Path) -> None:
    world = VerifiedWorld(tmp_path)
    world.send([payment(0, NOW)], NOW)
    world.score("looks", [{"user": 1}])
    world.lay_out()

    def change(one: dict[str, Any]) -> None:
        one["result"] = "7"

    assert world.verify(with_changed(world, "0", change)).scores == Counts(equal=1)


# -- what is missing


def test_a_score_whose_events_have_expired_is_missing_where_they_may_have_been_seen(tmp_path: Path) -> None:
    world = VerifiedWorld(tmp_path, n_shards=1, history=True)
    days = NOW // DAY_MS
    for day in range(6):
        now_ms = (days + day) * DAY_MS + 5
        world.send([payment(day, now_ms, 1, "a", day)], now_ms)
        world.score("user", [{"user": 1}])
        world.cluster.write_history(0)
        world.cluster.snapshot_steps(0, 1_000)
    world.lay_out()
    assert world.verify().scores == Counts(equal=6)
    delete_expired(str(world.path / "history"), [replace(PAYMENTS, retention="2d")], (days + 5) * DAY_MS)
    found = world.verify()
    assert found.scores == Counts(missing=6)
    assert found.why_missing == {"events that it saw have expired": 6}
    assert found.views["by_user"] == Counts(missing=6)


def test_a_score_whose_version_is_gone_is_missing(world: VerifiedWorld) -> None:
    world.registry.retire("user", "1")
    found = world.verify()
    assert found.models == {"user@1": Counts(missing=20), "both@1": Counts(equal=2)}
    assert found.why_missing == {"its version has been retired": 20}

    def other(one: dict[str, Any]) -> None:
        one["digest"] = "0" * 64

    found = world.verify(with_changed(world, "20", other))
    assert found.why_missing["its version has another content in the registry than the one that served"] == 1

    def unknown(one: dict[str, Any]) -> None:
        one["model"] = "nobody"

    found = world.verify(with_changed(world, "20", unknown))
    assert found.models["nobody@1"] == Counts(missing=1)
    assert "no model `nobody`" in str(found.why_missing)

    def narrow(one: dict[str, Any]) -> None:
        one["features"].pop()

    found = world.verify(with_changed(world, "20", narrow))
    assert found.models["both@1"] == Counts(missing=2)


def test_without_scores_nothing_is_found(world: VerifiedWorld) -> None:
    nothing = {"equal": 0, "different": 0, "missing": 0}
    assert world.verify([]).as_json() == {
        "scores": nothing, "views": {}, "models": {}, "within_request": 0, "rounded": 0, "why_missing": {},
        "differences": [],
    }  # fmt: skip


# -- the command, and the gate


def command(world: VerifiedWorld, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main([*arguments, "--data-dir", str(world.path.parent)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def replace_scores(world: VerifiedWorld, tables: list[pa.Table]) -> None:
    shutil.rmtree(world.path / "history" / "_scores")
    files = ScoreFiles(str(world.path / "history"), "changed", 1_000)
    for table in tables:
        files.write(table)


def double(one: dict[str, Any]) -> None:
    one["features"][1] *= 2


def test_the_command_says_what_differs_and_ends_with_1(
    world: VerifiedWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = command(world, capsys, "verify", "--json")
    assert (status, json.loads(out)["scores"]) == (0, {"equal": 22, "different": 0, "missing": 0})
    replace_scores(world, with_changed(world, "4", double))
    status, out, _ = command(world, capsys, "verify")
    assert status == 1
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "model user@1 19 1 0" in lines
    assert "view by_shop 2 0 0" in lines
    at = lines.index(f"different: user version 1 for {{'user': 1}}, served at {NOW + 2 * MINUTE} as of "
                     f"{NOW + 2 * MINUTE} (answer 4)")  # fmt: skip
    assert lines[at + 1] == "`by_user.sum`: logged 6.0, recomputed 3.0"
    assert lines[at + 2].startswith("payments[user] on shard ")
    assert lines[at + 5].startswith("id='p4', at=1700000119995, user=1, shop='a', cents=2, _arrival_ms=1700000120000,")
    assert command(world, capsys, "verify", "--model", "both")[0] == 0
    assert command(world, capsys, "verify", "--model", "user", "--model-version", "1")[0] == 1
    status, out, _ = command(world, capsys, "verify", "--json", "--limit", "3")
    assert (status, json.loads(out)["scores"]["equal"]) == (0, 3)
    status, out, _ = command(world, capsys, "verify", "--json", "--since", str(NOW + 9 * MINUTE))
    assert (status, json.loads(out)["scores"]["equal"]) == (0, 4)
    status, out, _ = command(world, capsys, "verify", "--json", "--since", "2023-11-14T22:15:20+00:00")
    assert (status, json.loads(out)["scores"]) == (1, {"equal": 17, "different": 1, "missing": 0})


def test_what_cannot_be_verified_is_said(world: VerifiedWorld, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = command(world, capsys, "verify", "--since", "yesterday")
    assert (status, "--since: got 'yesterday'; a time is ISO 8601" in err) == (1, True)
    status, _, err = command(world, capsys, "verify", "--history", "off")
    assert (status, "keeps no history (setting `history`)" in err) == (1, True)
    for unknown in (("--model", "usre"), ("--model", "user", "--model-version", "9")):
        status, _, err = command(world, capsys, "verify", *unknown)
        assert (status, "; known: " in err) == (1, True)
    for none in ("0", "-5"):
        status, _, err = command(world, capsys, "verify", "--limit", none)
        assert (status, f"--limit: got {none}; allowed is 1 or more" in err) == (1, True)
        status, _, err = command(world, capsys, "promote", "user", "1", "--verified", "--verified-min", none)
        assert (status, f"--verified-min: got {none}; allowed is 1 or more" in err) == (1, True)
    assert command(world, capsys, "verify", "--verified-min", "22")[0] == 0
    status, _, err = command(world, capsys, "verify", "--verified-min", "23")
    assert (status, "22 scores are equal, 23 are needed" in err) == (1, True)
    shutil.rmtree(world.path / "history" / "_scores")
    status, out, _ = command(world, capsys, "verify")
    assert (status, "no score has been logged" in out) == (0, True)
    assert command(world, capsys, "verify", "--verified-min", "1")[0] == 1


def test_only_what_is_verified_is_promoted_if_that_is_asked(
    world: VerifiedWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world.registry.deploy([world.versions["user"]])
    second = Definition(FILE.file_name, FILE.text.replace('Model("user", version="1"', 'Model("user", version="2"'))
    (model,) = (m for m in second.declared().models if m.name == "user")
    version = version_of(second, model, {"user": "int64"})
    world.registry.add(second, [version])
    world.registry.deploy([version], "canary", 0.5)

    def promoted(*arguments: str) -> tuple[int, str]:
        status, _, err = command(world, capsys, "promote", *arguments)
        rollout = world.registry.rollouts()["user"]
        assert rollout.champion is not None
        assert (status == 0) == (rollout.champion.version == "2")
        return status, err

    assert promoted("user", "--verified")[1] == (
        "millpond: model `user` version `2`: 0 of its logged scores are verified, 100 are needed (--verified-min); let "
        "it answer more as canary or shadow, or log a larger share (`score_log_share`); nothing has been changed\n"
    )

    def of_second(one: dict[str, Any]) -> None:
        if one["model"] == "user":
            one.update(version="2", digest=second.digest, role="canary")

    scores = scores_of(world)
    for one in scores:
        of_second(one)
    bad = [dict(one) for one in scores]
    place = next(i for i, one in enumerate(bad) if one["model"] == "user")
    first, *rest = bad[place]["features"]
    bad[place] = {**bad[place], "features": [(first or 0.0) + 1.0, *rest]}
    replace_scores(world, [pa.Table.from_pylist(bad, schema=SCHEMA)])
    assert (
        "1 of its logged scores differ when they are computed again; `millpond verify --model user` names them"
        in (promoted("user", "--verified", "--verified-min", "5")[1])
    )
    replace_scores(world, [pa.Table.from_pylist(scores, schema=SCHEMA)])
    assert "20 of its logged scores are verified, 21 are needed" in promoted(
        "user", "2", "--verified", "--verified-min", "21"
    )[1]  # fmt: skip
    assert promoted("user", "--verified", "--verified-min", "20") == (0, "")
