"""An explanation has the values that were served, and the events that made them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from apps import TOKEN, call
from check_directory import BY_USER
from folders import folder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_vs_oracle import keys_of
from verified_world import FILE, MINUTE, VerifiedWorld, payment, random_world
from worlds import World, batch, worlds

from millpond.cluster import cli
from millpond.deployments.explainer import Explainer, ExplainTimeout
from millpond.deployments.lane import Lane
from millpond.deployments.score import ScoreApp, ScoreLimits
from millpond.deployments.served import Models, Served
from millpond.feature_actors import oracle
from millpond.feature_actors.errors import NotFound, TooLarge, TooMany
from millpond.feature_actors.ports import complete
from millpond.models import explanation
from millpond.models.explanation import ExplainRequest, explain, logged_score, seen_by
from millpond.models.score_log import SCHEMA

NOW = 1_700_000_000_000


def explained(world: VerifiedWorld, model: str, key: dict[str, Any], **options: Any) -> dict[str, Any]:
    return explain(world.past, world.registry, model, "1", key, **options)


def of_feature(told: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = (one for one in told["features"] if one["feature"] == name)
    return one  # type: ignore[no-any-return]


@settings(max_examples=40)
@given(world=worlds(events_max=60), lag=st.sampled_from([0, 1, 1_000, 3_600_000, 86_400_000]))
def test_the_events_that_a_feature_saw_are_those_of_its_definition(world: World, lag: int) -> None:
    for view in world.views:
        events = oracle.distinct(view.source, world.events(view.source.name))
        for key in keys_of(view, events, most=4):
            mine = [event for event in events if tuple(event[name] for name in view.key) == key]
            as_of_ms = max([world.now_ms, *(event["at"] for event in mine)]) + lag
            arrivals = np.array([event["arrival_ms"] for event in mine], np.int64)
            for feature in view:
                if feature.derived is None:
                    saw = seen_by(feature, batch(view.source, mine), arrivals, as_of_ms)
                    matching = oracle.matching(view, feature.name, mine)
                    wanted = oracle.sees(feature.kept, view.source, matching, as_of_ms)
                    assert [mine[i]["num"] for i in np.flatnonzero(saw)] == [event["num"] for event in wanted]


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32), history=st.booleans())
def test_an_explanation_of_a_logged_score_has_the_values_that_were_served(seed: int, history: bool) -> None:
    with folder() as path:
        world = random_world(path, seed, n_shards=2, history=history)
        world.lay_out()
        for table in world.tables[:: max(1, len(world.tables) // 6)]:
            one = table.slice(len(table) - 1).to_pylist()[0]
            told = explained(
                world, one["model"], json.loads(one["key"]), served=table.slice(len(table) - 1)
            )  # fmt: skip
            assert told["equal"] is True
            assert (told["id"], told["as_of_ms"], told["unknown"]) == (one["id"], one["as_of_ms"], one["unknown"])
            assert told["result"] == json.loads(one["result"])
            values = [v for f in told["features"] if f["feature"] != "by_shop.last" for v in [f["value"]]]
            np.testing.assert_array_equal(values, one["features"])
            for feature in told["features"]:
                if feature["definition"].startswith("Count("):
                    assert feature["events"] == feature["value"]
                assert len(feature["newest"]) == min(5, feature["events"])


@pytest.fixture
def world(tmp_path: Path) -> VerifiedWorld:
    world = VerifiedWorld(tmp_path)
    for i in range(10):
        now_ms = NOW + i * MINUTE
        world.send([payment(i, now_ms - 5, 1, "a", i)], now_ms)
        world.score("user", [{"user": 1}])
    world.lay_out()
    return world


def test_it_names_definitions_owners_and_the_newest_events(world: VerifiedWorld) -> None:
    told = explained(world, "user", {"user": "1"}, served=world.tables[3], events_max=2)
    assert (told["version"], told["owner"], told["served_ms"]) == ("1", "tests", NOW + 3 * MINUTE)
    of_sum = of_feature(told, "by_user.sum")
    newest = of_sum.pop("newest")
    assert of_sum == {
        "feature": "by_user.sum", "value": 6.0, "definition": 'Sum("cents")', "derived_from": [], "owner": "tests",
        "events": 4,
    }  # fmt: skip
    assert [(one["id"], one["at"], one["cents"], one["_arrival_ms"]) for one in newest] == [
        (f"p{i}", NOW + i * MINUTE - 5, i, NOW + i * MINUTE) for i in (3, 2)
    ]
    assert of_feature(told, "by_user.max_1h")["definition"] == 'Max("cents", window="1h")'


def test_what_was_not_served_so_is_said(world: VerifiedWorld) -> None:
    changed = world.tables[3].to_pylist()
    changed[0]["features"][1] = 7.0
    told = explained(world, "user", {"user": 1}, served=pa.Table.from_pylist(changed, schema=SCHEMA))
    assert (told["equal"], of_feature(told, "by_user.sum")["value"]) == (False, 6.0)


def test_of_a_time_it_is_what_had_arrived_by_then(world: VerifiedWorld) -> None:
    events = [payment(i, NOW + i * MINUTE - 5, 1, "a", i) | {"arrival_ms": NOW + i * MINUTE} for i in range(10)]
    for at_ms in (NOW - 1, NOW, NOW + 4 * MINUTE + 30_000, NOW + 65 * MINUTE, NOW + 500 * MINUTE):
        told = explained(world, "user", {"user": 1}, at_ms=at_ms)
        known = [event for event in events if event["arrival_ms"] <= at_ms]
        wanted = oracle.features(BY_USER, known, (1,), at_ms)
        for name in ("n", "sum", "max_1h"):
            np.testing.assert_equal(of_feature(told, f"by_user.{name}")["value"], wanted[name])
        assert (told["served_ms"], told["equal"], told["as_of_ms"]) == (None, None, at_ms)
        assert told["unknown"] == ([] if known else ["by_user"])
    newest = explained(world, "user", {"user": 1})
    assert (newest["as_of_ms"], of_feature(newest, "by_user.n")["value"]) == (NOW + 9 * MINUTE, 10)


def test_the_newest_logged_score_up_to_a_time_is_found(world: VerifiedWorld) -> None:
    history = str(world.path / "history")
    for at_ms, answer_id in ((NOW, "0"), (NOW + 5 * MINUTE + 3, "5"), (NOW + 10**10, "9")):
        found = logged_score(history, "user", None, {"user": 1}, at_ms)
        assert found is not None
        assert found["id"].to_pylist() == [answer_id]
    assert logged_score(history, "user", None, {"user": 1}, NOW - 1) is None
    assert logged_score(history, "user", None, {"user": 2}, NOW + 10**10) is None
    assert logged_score(history, "user", "2", {"user": 1}, NOW + 10**10) is None


def test_a_score_of_a_shadow_is_not_taken_for_the_one_that_was_answered(tmp_path: Path) -> None:
    world = VerifiedWorld(tmp_path)
    world.send([payment(0, NOW, 1, "a", 5)], NOW)
    world.score("user", [{"user": 1}])
    plan = world.loaded["user"].plan
    keys = plan.key_columns([{"user": 1}], batch=False)
    world.cluster.clock.ms += 1  # a shadow takes its turn after the answer
    world.log("user", keys, complete(world.cluster.client.read(plan, keys, 1)), role="shadow")
    world.lay_out()
    for version, answer_id in ((None, "0"), ("1", "1")):
        found = logged_score(str(world.path / "history"), "user", version, {"user": 1}, NOW + 5)
        assert found is not None
        assert found["id"].to_pylist() == [answer_id]


def test_a_logged_score_is_found_in_whatever_order_the_fields_of_its_id_are(tmp_path: Path) -> None:
    world = VerifiedWorld(tmp_path)
    world.send([payment(0, NOW, 1, "ü", 5)], NOW)
    world.score("both", [{"user": 1, "shop": "ü"}, {"user": 11, "shop": ""}])
    world.lay_out()
    for fields in ({"user": 1, "shop": "ü"}, {"shop": "ü", "user": 1}):
        found = logged_score(str(world.path / "history"), "both", None, fields, NOW)
        assert found is not None
        assert found["id"].to_pylist() == ["0"]


# -- the command


def command(world: VerifiedWorld, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["explain", *arguments, "--data-dir", str(world.path.parent)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command(world: VerifiedWorld, capsys: pytest.CaptureFixture[str]) -> None:
    world.registry.deploy([world.versions["user"]])
    status, out, _ = command(world, capsys, "user", "--user", "1", "--at", str(NOW + 2 * MINUTE + 7), "--json")
    told = json.loads(out)
    assert (status, told["id"], told["equal"], told["result"]) == (0, "2", True, told["recomputed"])
    status, out, _ = command(world, capsys, "user", "--user=1", "--at", str(NOW + 2 * MINUTE + 7), "--events", "1")
    lines = out.splitlines()
    assert lines[0] == "user version 1 (owner tests) for user 1"
    assert lines[2] == "served 2023-11-14T22:15:20.000Z, answer 2; computed again it is the same"
    at = lines.index("by_user.max_1h = 2.0  owner tests")
    assert lines[at + 1 : at + 3] == ['  Max("cents", window="1h")', "  3 events, the newest:"]
    assert lines[at + 3].startswith("    id=p2, at=1700000119995, user=1, shop=a, cents=2, _arrival_ms=1700000120000")
    status, out, _ = command(world, capsys, "user", "--key", '{"user": 1}', "--json")
    assert (status, json.loads(out)["served_ms"], json.loads(out)["as_of_ms"]) == (0, None, NOW + 9 * MINUTE)
    assert command(world, capsys, "user", "--user", "7", "--json")[0] == 0


def test_what_looks_like_markup_is_shown_as_it_is(world: VerifiedWorld, capsys: pytest.CaptureFixture[str]) -> None:
    for shop in ("[/a]", "[bold]"):
        status, out, _ = command(world, capsys, "both", "--user=1", f"--shop={shop}", "--model-version", "1")
        assert (status, out.splitlines()[0]) == (0, f"both version 1 (owner tests) for user 1, shop {shop}")


@pytest.mark.parametrize("key", ['{"user": "x"}', '{"user": [1]}', '{"user": null}'])
def test_a_key_that_is_none_is_said_beside_a_canary_too(
    world: VerifiedWorld, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    champion = world.versions["user"]
    canary = replace(champion, version="2")
    world.registry.add(FILE, [canary])
    world.registry.deploy([champion])
    world.registry.deploy([canary], "canary", 0.5)
    status, _, err = command(world, capsys, "user", "--key", key)
    assert (status, "expected `user` as int64" in err) == (1, True), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["user"], "model `user`: key field `user` is missing; an id is `user`"),
        (
            ["user", "--user", "1", "--usr", "1"],
            "explain: `--usr` is no key field of model `user`; known: `--user`; did you mean `--user`?",
        ),
        (
            ["both", "--users=1", "--shop-id=2", "--model-version=1"],
            "explain: `--users` is no key field of model `both`; known: `--shop`, `--user`; did you mean `--user`?",
        ),
        (["user", "--user", "x"], "expected `user` as int64, got 'x'"),
        (["user", "--user"], "'--user' has no value; name a key field and its value, `--user-id 42`"),
        (["user", "user", "1"], "expected a key field as a flag, such as `--user-id 42`"),
        (["nobody", "--user", "1"], "no model `nobody`"),
        (["both", "--user", "1"], "model `both`: no version of it is live; name one with --model-version"),
        (["user", "--user", "1", "--events", "-1"], "--events: got -1; allowed is 0 or more"),
        (["user", "--user", "1", "--user", "1"], "explain: `--user` is given twice; one entity at a time"),
        (["both", "--key", '{"user": 1, "shop": "a"}', "--shop=b"], "explain: `--shop` is given twice; one entity"),
        (["user", "--key", '{"user": 1, "user": 2}'], "explain: `--user` is given twice; one entity at a time"),
        (["user", "--key", "[]"], "--key: got '[]'; expected an id as a JSON object"),
        (["user", "--user", "1", "--at", "noon"], "--at: got 'noon'; a time is ISO 8601"),
        (["user", "--user", "1", "--history", "off"], "keeps no history (setting `history`)"),
    ],
)
def test_what_cannot_be_explained_is_said(
    world: VerifiedWorld, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    world.registry.deploy([world.versions["user"]])
    status, _, err = command(world, capsys, *arguments)
    assert (status, message in err) == (1, True), err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--user-id", "42", "--user-id", "43"],
        ["--user-id=42", "--user_id=43"],
        ["--key", '{"user_id": 42}', "--user-id", "43"],
        ["--key", '{"user_id": 42, "user_id": 43}'],
    ],
)
def test_of_two_entities_none_is_forgotten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    status = cli.main(["forget", *arguments, "--data-dir", str(tmp_path)])
    assert (status, capsys.readouterr().err) == (
        1,
        "millpond: forget: `--user-id` is given twice; one entity at a time\n",
    )


# -- the call


def served_of(world: VerifiedWorld, explainer: Explainer | None) -> ScoreApp:
    client, threads = world.cluster.client, ThreadPoolExecutor(1)
    lane = Lane(world.loaded["both"], client, threads, digest=world.versions["both"].digest)

    async def status() -> list[dict[str, Any]]:
        return []

    return ScoreApp(
        client, Models({"both": Served("both", lane)}), status, ScoreLimits(),
        hashlib.sha256(TOKEN.encode()).hexdigest(), "test", None, explainer,
    )  # fmt: skip


def test_the_call_explains_what_is_served_now_and_what_was(world: VerifiedWorld) -> None:
    explainer = Explainer(str(world.path), str(world.path / "history"), world.cluster.shard_map)
    app, admin = served_of(world, explainer), {"authorization": f"Bearer {TOKEN}"}
    target = "/v1/explain/both?user=1&shop=a"
    assert call(app, "GET", target).status == 401
    answer = call(app, "GET", f"{target}&events=1", headers=admin)
    assert answer.status == 200, answer.body
    served = call(app, "POST", "/v1/score/both?features=true", {"user": 1, "shop": "a"}).json
    told = answer.json
    assert told["equal"] is True
    assert {one["feature"]: one["value"] for one in told["features"]} == served["features"]
    assert (told["result"], told["unknown"]) == (served["result"], served["unknown"])
    assert {len(one["newest"]) for one in told["features"]} <= {0, 1}
    for query, path in (("user=1", "$.shop"), ("user=1&shop=a&at=x", "?at"), ("user=1&shop=a&events=-1", "?events")):
        wrong = call(app, "GET", f"/v1/explain/both?{query}", headers=admin)
        assert (wrong.status, wrong.error["path"]) == (400, path)
    assert call(served_of(world, None), "GET", target, headers=admin).status == 503


def test_an_answer_that_is_too_large_is_refused(world: VerifiedWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ExplainRequest(str(world.path), str(world.path / "history"), "user", "1", {"user": 1}, at_ms=NOW)
    answer = explanation._answer(request)
    monkeypatch.setattr(explanation, "ANSWER_BYTES_MAX", len(answer))
    assert explanation._answer(request) == answer
    monkeypatch.setattr(explanation, "ANSWER_BYTES_MAX", len(answer) - 1)
    with pytest.raises(TooLarge, match="ask for fewer events"):
        explanation._answer(request)


def test_one_is_explained_at_a_time_and_not_for_ever(world: VerifiedWorld) -> None:
    place = str(world.path), str(world.path / "history"), world.cluster.shard_map
    asked = {"model": "user", "version": "1", "key": {"user": 1}, "at_ms": NOW}

    async def story() -> None:
        with pytest.raises(ExplainTimeout):
            await Explainer(*place, 0.01).explain(**asked)
        explainer = Explainer(*place)
        first = asyncio.create_task(explainer.explain(**asked))
        await asyncio.sleep(0)
        with pytest.raises(TooMany):
            await explainer.explain(**asked)
        assert json.loads(await first)["id"] == "0"
        with pytest.raises(NotFound, match="no version `2`"):
            await explainer.explain(**{**asked, "version": "2"})

    asyncio.run(story())
