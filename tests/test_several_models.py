# ruff: noqa: E501
"""`POST /v1/score`: several models about the same ids, in one request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apps import NOW, Returns, World, call, churn, make_world, mean_price, model, offer, purchase, user_spend
from lanes import client_over, definition, run, shards_with_spend, version_in

from millpond.deployments.host import HostLimits, ModelHost
from millpond.deployments.lane import LaneLimits
from millpond.deployments.score import ScoreApp, ScoreLimits
from millpond.deployments.served import Served
from millpond.models.registry import Registry


class Broken:
    def predict(self, features: Any) -> Any:
        raise ValueError("no luck")


class Poisoned:
    """Fails for one user, whoever is scored with it."""

    def predict(self, features: Any) -> Any:
        if 2 in features.keys["user_id"]:
            raise ValueError("user 2")
        return np.ones(len(features.matrix))


@pytest.fixture
def world() -> World:
    models = [
        churn,
        offer,
        model("broken", [user_spend["orders_30d"]], Broken),
        model("poisoned", list(user_spend), Poisoned),
    ]
    world = make_world(models, scores=ScoreLimits(ids_max=8))
    world.post_events("purchases", [purchase("a", 1, 10.0, NOW, book_id="x"), purchase("b", 2, 5.0, NOW, book_id="y")])
    return world


def ask(world: World, models: Any, ids: Any, query: str = "") -> Any:
    return call(world.score, "POST", f"/v1/score{query}", {"models": models, "ids": ids}, "application/json")


def but_the_id(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "id"}


def test_each_model_answers_each_id_as_it_does_alone(world: World) -> None:
    ids = [{"user_id": 1, "book_id": "x"}, {"user_id": 2, "book_id": "x"}, {"user_id": 9, "book_id": "z"}]
    answers = ask(world, ["offer", "churn"], ids).json
    assert [list(answer) for answer in answers] == [["offer", "churn"]] * 3
    for one, answer in zip(ids, answers, strict=True):
        assert but_the_id(answer["offer"]) == but_the_id(world.post_score("offer", one).json)
        assert but_the_id(answer["churn"]) == but_the_id(world.post_score("churn", {"user_id": one["user_id"]}).json)
    assert len({answer[name]["id"] for answer in answers for name in answer}) == 6
    assert ask(world, ["churn"], []).json == []


def test_a_broken_model_breaks_only_itself(world: World) -> None:
    answers = ask(world, ["broken", "churn", "poisoned"], [{"user_id": 1}, {"user_id": 2}]).json
    for answer in answers:
        assert answer["broken"]["error"]["code"] == answer["poisoned"]["error"]["code"] == "prediction_failed"
        assert answer["broken"]["error"]["status"] == 500
        assert (
            answer["churn"]["result"]
            == world.post_score("churn", {"user_id": answers.index(answer) + 1}).json["result"]
        )
    (alone,) = ask(world, ["poisoned"], [{"user_id": 1}]).json
    assert alone["poisoned"]["result"] == 1.0


def test_an_id_that_a_model_has_no_result_for_breaks_only_itself() -> None:
    world = make_world([churn, model("mean", list(user_spend), lambda: Returns(mean_price))])
    world.post_events("purchases", [purchase("a", 1, 10.0)])
    good, bad = ask(world, ["mean", "churn"], [{"user_id": 1}, {"user_id": 2}]).json
    assert (good["mean"]["result"], bad["churn"]["result"]) == (10.0, 0.0)
    error = bad["mean"]["error"]
    assert (error["code"], error["path"], error["status"]) == ("prediction_failed", "$.ids[1]", 500)


def test_a_model_that_does_not_load_breaks_only_itself(tmp_path: Path) -> None:
    registry, client = Registry(tmp_path / "registry"), client_over(shards_with_spend())[0]
    for made in (definition("well", "1"), definition("ill", "1", load="raise ValueError")):
        registry.deploy([version_in(registry, made)])
    host = ModelHost(registry, client, "replica")
    app = ScoreApp(client, host, make_world().score._status, ScoreLimits(), "", "test")

    async def start() -> None:
        await host.start()

    run(start)
    body = {"models": ["ill", "well"], "ids": [{"user_id": 1}, {"user_id": 2}]}
    answers = call(app, "POST", "/v1/score", body, "application/json").json
    alone = call(app, "POST", "/v1/score/ill", {"user_id": 1}, "application/json")
    for answer in answers:
        assert answer["well"]["result"] == "1"
        assert answer["ill"] == {"error": {**alone.error, "status": alone.status}}
    assert (alone.status, alone.error["code"]) == (503, "model_broken")
    only = call(app, "POST", "/v1/score", {"models": ["ill"], "ids": [{"user_id": 1}]}, "application/json").json
    assert only == [{"ill": answers[0]["ill"]}]
    wrong = call(app, "POST", "/v1/score", {**body, "ids": [{"user_id": 1, "book_id": "x"}]}, "application/json")
    assert wrong.error["path"] == "$.ids[0].book_id"
    registry.close()


def test_a_model_that_too_many_wait_for_fails_alone(tmp_path: Path) -> None:
    registry, client = Registry(tmp_path / "registry"), client_over(shards_with_spend())[0]
    for made in (definition("here", "1"), definition("there", "1")):
        registry.deploy([version_in(registry, made, memory_bytes=4 << 20)])
    host = ModelHost(registry, client, "replica", limits=HostLimits(5 << 20, LaneLimits(requests_max=0)))
    app = ScoreApp(client, host, make_world().score._status, ScoreLimits(), "", "test")

    async def start() -> None:
        await host.start()

    run(start)
    ((here, served),) = host.served.items()
    (there,) = {"here", "there"} - {here}
    body = {"models": [there, here], "ids": [{"user_id": 1}]}
    (answer,) = call(app, "POST", "/v1/score", body, "application/json").json
    assert answer[here]["result"] == served.champion.loaded.model.version
    assert (answer[there]["error"]["code"], answer[there]["error"]["status"]) == ("model_busy", 429)
    alone = call(app, "POST", f"/v1/score/{there}", {"user_id": 1}, "application/json")
    assert (alone.status, alone.error["code"]) == (429, "model_busy")
    registry.close()


@pytest.mark.parametrize(
    ("body", "status", "code", "path"),
    [
        ([], 400, "bad_request", "$"),
        ({"models": ["churn"]}, 400, "bad_request", "$"),
        ({"models": ["churn"], "ids": [], "as_of": 1}, 400, "bad_request", "$"),
        ({"models": "churn", "ids": []}, 400, "bad_request", "$.models"),
        ({"models": [], "ids": []}, 400, "bad_request", "$.models"),
        ({"models": ["churn", "churn"], "ids": []}, 400, "bad_request", "$.models"),
        ({"models": ["churn", 1], "ids": []}, 400, "bad_request", "$.models"),
        ({"models": ["churn"], "ids": {"user_id": 1}}, 400, "bad_request", "$.ids"),
        ({"models": ["churn"], "ids": [1]}, 400, "bad_id", "$.ids[0]"),
        ({"models": ["churn"], "ids": [{"user_id": 1}, {}]}, 400, "bad_id", "$.ids[1].user_id"),
        ({"models": ["churn", "offer"], "ids": [{"user_id": 1}]}, 400, "bad_id", "$.ids[0].book_id"),
        ({"models": ["churn", "offer"], "ids": [{"user_id": 1, "book_id": 3}]}, 400, "bad_id", "$.ids[0].book_id"),
        ({"models": ["churn"], "ids": [{"user_id": 1, "book_id": "x"}]}, 400, "bad_id", "$.ids[0].book_id"),
        ({"models": ["churn"], "ids": [{"user_id": 1, "orders_30d": 3}]}, 400, "features_in_request", "$.ids[0].orders_30d"),
        ({"models": ["churn", "chrun"], "ids": [{"user_id": 1}]}, 404, "not_found", None),
        ({"models": ["churn", "broken"], "ids": [{"user_id": 1}] * 5}, 413, "too_large", None),
        ({"models": [f"m{i}" for i in range(9)], "ids": []}, 413, "too_large", None),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_whole(world: World, body: Any, status: int, code: str, path: str | None) -> None:
    reply = call(world.score, "POST", "/v1/score", body, "application/json")
    assert (reply.status, reply.error["code"], reply.error["path"]) == (status, code, path)


def test_the_first_of_unknown_models_is_refused_and_none_is_looked_for(tmp_path: Path) -> None:
    looked_for: list[str] = []

    class Host(ModelHost):
        async def find(self, name: str) -> Served:
            looked_for.append(name)
            return await super().find(name)

    registry, client = Registry(tmp_path / "registry"), client_over(shards_with_spend())[0]
    registry.deploy([version_in(registry, definition("well", "1"))])
    host = Host(registry, client, "replica")
    app = ScoreApp(client, host, make_world().score._status, ScoreLimits(ids_max=1_000), "", "test")
    run(host.start)
    body = {"models": ["well", *(f"wel{i}" for i in range(999))], "ids": []}
    reply = call(app, "POST", "/v1/score", body, "application/json")
    assert (reply.status, reply.error["message"]) == (
        404, "no model `wel0`; known: `well`; did you mean `well`?"
    )  # fmt: skip
    assert looked_for == []
    reply = call(app, "POST", "/v1/score", {**body, "models": ["well", *body["models"]]}, "application/json")
    assert (reply.status, reply.error["path"]) == (400, "$.models")
    host.served = {}  # what is known and not in memory is looked for
    reply = call(app, "POST", "/v1/score", {"models": ["well"], "ids": [{"user_id": 1}]}, "application/json")
    assert (reply.json[0]["well"]["result"], looked_for) == ("1", ["well"])
    registry.close()


def test_all_models_answer_as_of_the_time_that_is_asked_for(world: World) -> None:
    asked = ask(world, ["churn", "offer"], [{"user_id": 1, "book_id": "x"}], f"?as_of={NOW + 5_000}").json
    assert {answer["as_of"] for answer in asked[0].values()} == {asked[0]["churn"]["as_of"]}
    reply = ask(world, ["churn"], [{"user_id": 1}], f"?as_of={NOW - 50_000}")
    assert (reply.status, reply.error["code"]) == (409, "as_of_in_past")
