"""The models of a replica, over a real registry: a change is live when its versions are loaded, and nothing fails."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import linecache
import os
import random
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apps import NOW
from lanes import HOLDS, LOADS, PATIENCE_S, Held, client_over, definition, run, shards_with_spend, until, version_in

from millpond.cluster.cluster import Cluster
from millpond.cluster.config import Config
from millpond.cluster.deploy import wait_until_live
from millpond.deployments import host as host_module
from millpond.deployments.erased_scores import ScoreEraser
from millpond.deployments.host import HostLimits, ModelHost, is_alive
from millpond.deployments.lane import LaneLimits, ModelBusy
from millpond.deployments.score import ScoreApp, ScoreLimits
from millpond.deployments.watchdog import HUNG_STATUS
from millpond.feature_actors.errors import MillpondError, NotFound, Unavailable
from millpond.feature_actors.keys import hash_values
from millpond.feature_actors.layout import identity_of
from millpond.feature_actors.tiles.memory import started_ticks
from millpond.models import Pool
from millpond.models import registry as registry_module
from millpond.models.attempts import Attempt
from millpond.models.definition import Definition, forget_module
from millpond.models.erasures import ForgottenScores
from millpond.models.registry import Registry
from millpond.models.version import Version, version_of

MB = 1 << 20


@pytest.fixture(scope="module")
def shards() -> Any:
    return shards_with_spend()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setattr(host_module, "POLL_S", 0.005)
    HOLDS.clear()
    LOADS.clear()
    registry = Registry(tmp_path / "registry")
    yield registry
    registry.close()


def host_of(registry: Registry, shards: Any, *, budget: int = 1 << 40, pool: str | None = None) -> ModelHost:
    """A host with a registry of its own on the same folder, as another process has it."""
    limits = HostLimits(budget, LaneLimits(predict_s=PATIENCE_S))
    return ModelHost(Registry(registry._folder), client_over(shards)[0], f"replica-{pool}", pool, limits)


@asynccontextmanager
async def following(host: ModelHost) -> AsyncIterator[ModelHost]:
    await host.start()
    task = asyncio.create_task(host.follow())
    try:
        yield host
    finally:
        task.cancel()


async def live(host: ModelHost, generation: int) -> None:
    """Wait until the host has reported a generation, with all that it loads for it."""

    def reported() -> bool:
        report = host._registry.reports().get(host._replica)
        return report is not None and report["generation"] >= generation and not report["loading"]

    await until(reported, f"generation {generation}")


async def live_but(loading: str, host: ModelHost, generation: int) -> None:
    """Wait until the host has reported a generation, with all that it loads for it but one model."""

    def reported() -> bool:
        report = host._registry.reports().get(host._replica)
        return report is not None and report["generation"] >= generation and report["loading"] == [loading]

    await until(reported, f"generation {generation}")


async def score(host: ModelHost, model: str, user: int = 3) -> tuple[str, Any]:
    """The version that answers, and its result."""
    served = host.served.get(model) or await host.find(model)
    ((lane, scored, row),) = await asyncio.wait_for(served.ask({"user_id": [user]}, 1), PATIENCE_S)
    return lane.loaded.model.version, scored.results[row]


async def ready(host: ModelHost) -> Any:
    """What `/readyz` says of a replica with this host, and of no shards."""

    async def no_shards() -> list[dict[str, Any]]:
        return []

    app = ScoreApp(host._client, host, no_shards, ScoreLimits(), "", "test")
    return json.loads((await app.get_readyz(None)).body)  # type: ignore[arg-type]


# -- what is live


def test_what_is_live_is_loaded_at_the_start_as_far_as_it_fits(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        for name in ("one", "two", "three", "four"):
            registry.deploy([version_in(registry, definition(name, "1"), memory_bytes=3 * MB)])
        host = host_of(registry, shards, budget=10 * MB)
        await host.start()
        assert len(host.served) == 3
        assert sum(LOADS.values()) == 3
        assert host.memory_bytes <= 10 * MB
        assert {e.model for e in host.entries()} == {"one", "two", "three", "four"}
        (missing,) = {"one", "two", "three", "four"} - set(host.served)
        assert await score(host, missing) == ("1", "1")
        assert len(host.served) == 3

    run(story)


def test_what_is_loaded_is_planned_to_be_read_together(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition("one", "1"))])

        def planned() -> bool:
            return {one.lane.loaded.plan for one in host._loaded.values()} == set(host._turns.plans.numbers)

        host = host_of(registry, shards)
        await host.start()
        assert list(host.served) == ["one"]
        assert planned()
        async with following(host):
            for name in ("two", "three"):
                await live(host, registry.deploy([version_in(registry, definition(name, "1"))]))
            await until(lambda: len(host._loaded) == 3 and planned(), "the plans of all three")

    run(story)


def test_a_change_goes_live(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        async with following(host_of(registry, shards)) as host:
            with pytest.raises(NotFound, match=r"^no model `churn`; known: none$"):
                await score(host, "churn")
            await live(host, registry.deploy([version_in(registry, definition("churn", "1"))]))
            assert await score(host, "churn") == ("1", "1")
            with pytest.raises(NotFound, match=r"^no model `chum`; known: `churn`; did you mean `churn`"):
                await score(host, "chum")
            await live(host, registry.deploy([version_in(registry, definition("churn", "2", "row[0]"))]))
            assert await score(host, "churn") == ("2", 3.0)
            (entry,) = host.entries()
            assert (entry.model, entry.version, entry.owner, entry.about) == ("churn", "2", "tests", "For tests.")
            assert (entry.key_fields, list(entry.features)) == ({"user_id": "int64"}, ["user_spend.orders_30d"])

    run(story)


def test_while_a_version_loads_the_old_one_answers_and_the_loop_goes_on(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition("churn", "1"))])
        registry.deploy([version_in(registry, definition("offer", "1"))])
        HOLDS["churn@2"] = held = Held()
        async with following(host_of(registry, shards)) as host:
            registry.deploy([version_in(registry, definition("churn", "2"))])
            await held.has_begun()
            for _ in range(50):
                assert await score(host, "churn") == ("1", "1")
                assert await score(host, "offer") == ("1", "1")
            assert host.report()["loading"] == ["churn"]
            # Nothing else waits for it.
            await live_but("churn", host, registry.deploy([version_in(registry, definition("offer", "2"))]))
            assert (await score(host, "offer"))[0] == "2"
            await live_but("churn", host, registry.rollback("offer"))
            assert (await score(host, "offer"), await score(host, "churn")) == (("1", "1"), ("1", "1"))
            held.go.set()
            await live(host, registry.generation())
            assert await score(host, "churn") == ("2", "2")

    run(story)


@pytest.mark.parametrize(
    ("load", "why"),
    [
        ("raise ValueError('no weights')", "ValueError('no weights')"),
        ("raise SystemExit(3)", "SystemExit(3)"),
        ("raise BaseException('a panic')", "BaseException('a panic')"),
        ("import nowhere_at_all", "ModuleNotFoundError(\"No module named 'nowhere_at_all'\")"),
    ],
)
def test_a_version_that_does_not_load_leaves_all_as_it_was(
    registry: Registry, shards: Any, load: str, why: str
) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition("churn", "1"))])
        broken = version_in(registry, definition("churn", "2", load=load))
        other = version_in(registry, definition("offer", "2"))
        async with following(host_of(registry, shards)) as host:
            await live(host, registry.deploy([broken, other]))
            report = registry.reports()["replica-None"]
            assert report["failed"] == {"churn@2": f"model `churn` version `2` does not load: {why}"}
            assert await score(host, "churn") == ("1", "1")
            assert await score(host, "offer") == ("2", "2")
            assert host.broken() == {}
            # Where nothing answered before, the request says why, and so does `/readyz`.
            await live(host, registry.deploy([version_in(registry, definition("fresh", "1", load=load))]))
            with pytest.raises(Unavailable) as refused:
                await score(host, "fresh")
            assert refused.value.code == "model_broken"
            assert refused.value.message == (
                f"model `fresh` version `1` does not load: {why}; deploy a version that does, or roll back"
            )
            assert await ready(host) == {
                "status": "ready",
                "shards": 0,
                "models": ["churn", "offer"],
                "broken": {"fresh": f"model `fresh` version `1` does not load: {why}"},
            }
            # A canary or a shadow that does not load has no ids.
            for role, share in (("canary", 0.5), ("shadow", None)):
                await live(
                    host, registry.deploy([version_in(registry, definition("offer", role, load=load))], role, share)
                )  # type: ignore[arg-type]
                assert {await score(host, "offer", user) for user in range(1, 9)} == {("2", "2")}
            await live(host, registry.rollback("churn"))
            assert registry.reports()["replica-None"]["failed"].keys() == {"fresh@1", "offer@canary", "offer@shadow"}
            await live(host, registry.deploy([version_in(registry, definition("fresh", "2"))]))
            assert await score(host, "fresh") == ("2", "2")
            modules = {name for name in sys.modules if name.startswith("millpond_definition_")}
            assert definition("churn", "2", load=load).module_name not in modules

    run(story)


def held_at_the_top(model: str) -> Definition:
    """A definition whose text waits, as it is run, if there is something to wait for."""
    made = definition(model, "1")
    return Definition(made.file_name, f"{made.text}\nHOLDS.get({model!r}, lambda: None)()\n", made.artifacts)


def test_while_a_text_runs_all_else_is_loaded_and_forgotten(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition(name, "1")) for name in ("churn", "old")])
        slow = version_in(registry, held_at_the_top("slow"))
        async with following(host_of(registry, shards)) as host:
            HOLDS["slow"] = held = Held()
            registry.deploy([slow])
            await held.has_begun()
            await live_but("slow", host, registry.deploy([version_in(registry, definition("churn", "2"))]))
            broken = version_in(registry, definition("churn", "3", load="raise ValueError"))
            await live_but("slow", host, registry.deploy([broken]))
            await live_but("slow", host, registry.retire("old"))
            assert definition("old", "1").module_name not in sys.modules
            assert await score(host, "churn") == ("2", "2")
            assert not held.go.is_set()
            held.go.set()
            assert await score(host, "slow") == ("1", "1")

    run(story)


def impatient(host: ModelHost, load_s: float) -> None:
    """From now on, a load may take so long."""
    host._limits = dataclasses.replace(host._limits, load_s=load_s)


def test_a_text_that_does_not_end_holds_up_nobody_but_its_model(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition("churn", "1"))])
        endless = held_at_the_top("endless")
        version = version_in(registry, endless)
        async with following(host_of(registry, shards)) as host:
            HOLDS["endless"] = held = Held()
            impatient(host, 0.01)
            await live(host, registry.deploy([version]))
            impatient(host, PATIENCE_S)
            assert host.report()["failed"].keys() == {"endless@1"}
            with pytest.raises(
                Unavailable, match=r"^model `endless` version `1` does not load: it takes longer than 0\.01 s"
            ):
                await score(host, "endless")
            await live(host, registry.deploy([version_in(registry, definition("churn", "2"))]))
            assert await score(host, "churn") == ("2", "2")
            assert endless.module_name in sys.modules  # it still runs
            held.go.set()
            await until(lambda: endless.module_name not in sys.modules, "the text to end")

    run(story)


def test_a_retired_model_is_gone(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition("churn", "1"))])
        registry.deploy([version_in(registry, definition("offer", "1"))])
        async with following(host_of(registry, shards)) as host:
            served = host.served["churn"]
            await live(host, registry.retire("churn"))
            with pytest.raises(NotFound):
                await score(host, "churn")
            assert [e.model for e in host.entries()] == ["offer"]
            assert {model for model, _ in host._loaded} == {"offer"}
            scored, row = await served.champion.ask({"user_id": [1]}, 1)  # a request that had begun
            assert scored.results[row] == "1"

    run(story)


def test_a_rollback_loads_nothing(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        versions = [version_in(registry, definition("churn", v)) for v in ("1", "2", "3")]
        for asked in (True, False):
            registry.deploy(versions[:1])
            async with following(host_of(registry, shards)) as host:
                for version in versions[1:]:
                    if asked:
                        await score(host, "churn")
                    await live(host, registry.deploy([version]))
                LOADS.clear()
                await live(host, registry.rollback("churn"))
                assert await score(host, "churn") == ("2", "2")
                assert LOADS == {}
                # Of each model one version is kept, not all that ever were.
                assert len(host._loaded) == 2

    run(story)


def test_canary_shadow_and_promotion(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        versions = {v: version_in(registry, definition("churn", v, f"{v} * row[0]")) for v in ("1", "2", "3")}
        registry.deploy([versions["1"]])
        async with following(host_of(registry, shards)) as host:
            await live(host, registry.deploy([versions["2"]], "canary", 0.5))
            got = {user: await score(host, "churn", user) for user in range(1, 41)}
            assert {version for version, _ in got.values()} == {"1", "2"}
            assert all(result == int(version) * user for user, (version, result) in got.items())
            await live(host, registry.deploy([versions["3"]], "shadow"))
            assert {user: await score(host, "churn", user) for user in got} == got
            of_champion = sum(version == "1" for version, _ in got.values())
            shadow = host.served["churn"].shadow
            assert shadow is not None
            await until(lambda: shadow.disagreement.compared == of_champion, "the shadow")
            seen = host.report()["shadows"]["churn"]
            assert (seen["champion"], seen["shadow"], seen["different"]) == ("1", "3", of_champion)
            # What a change of the canary has to do with it: nothing.
            await live(host, registry.deploy([versions["2"]], "canary", 0.1))
            assert host.served["churn"].shadow is shadow
            await live(host, registry.promote("churn", "3"))
            assert host.served["churn"].shadow is None
            assert {await score(host, "churn", user) for user in got} <= {("3", 3.0 * u) for u in got} | {
                ("2", 2.0 * u) for u in got
            }

    run(story)


@pytest.mark.parametrize("seen", [True, False], ids=["in two steps", "at once"])
def test_a_champion_and_its_former_shadow_may_change_places(registry: Registry, shards: Any, seen: bool) -> None:
    """Each is asked once for a request: a former champion that is the shadow has no shadow itself."""

    async def story() -> None:
        one, two = (version_in(registry, definition("churn", v)) for v in ("1", "2"))
        registry.deploy([one])
        async with following(host_of(registry, shards)) as host:
            await live(host, registry.deploy([two], "shadow"))
            generation = registry.promote("churn")
            if seen:
                await live(host, generation)
            await live(host, registry.deploy([one], "shadow"))
            served = host.served["churn"]
            assert served.shadow is not None
            before = served.champion.counts.requests, served.shadow.lane.counts.requests
            for _ in range(5):
                assert await score(host, "churn") == ("2", "2")
            await until(lambda: served.shadow is not None and served.shadow.disagreement.compared == 5, "the shadow")
            for _ in range(20):
                await asyncio.sleep(0)
            after = served.champion.counts.requests, served.shadow.lane.counts.requests
            assert [b - a for a, b in zip(before, after, strict=True)] == [5, 5]

    run(story)


# -- the budget


def fill(registry: Registry, *names: str) -> None:
    for name in names:
        registry.deploy([version_in(registry, definition(name, "1"), memory_bytes=4 * MB)])


def test_over_the_budget_those_asked_longest_ago_go_and_come_back(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        fill(registry, "a", "b", "c", "d")
        host = host_of(registry, shards, budget=9 * MB)
        await host.start()
        for name in ("a", "b", "c", "d", "c", "a", "b"):
            assert await score(host, name) == ("1", "1")
            assert len(host.served) == 2
            assert host.memory_bytes <= 9 * MB
        assert set(host.served) == {"a", "b"}
        await score(host, "a")
        await score(host, "d")
        assert set(host.served) == {"a", "d"}
        modules = {name for name in sys.modules if name.startswith("millpond_definition_")}
        assert definition("b", "1").module_name not in modules

    run(story)


def test_requests_that_come_while_a_model_is_loaded_load_it_once(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        fill(registry, "a", "b")
        host = host_of(registry, shards, budget=5 * MB)
        await host.start()
        (out,) = {"a", "b"} - set(host.served)
        HOLDS[f"{out}@1"] = held = Held()
        asking = [asyncio.ensure_future(score(host, out)) for _ in range(20)]
        await held.has_begun()
        asking += [asyncio.ensure_future(score(host, out)) for _ in range(20)]
        asking[0].cancel()  # whoever it was loaded for first has gone
        held.go.set()
        assert set(await asyncio.gather(*asking[1:])) == {("1", "1")}
        assert LOADS[f"{out}@1"] == 1

    run(story)


def test_requests_wait_for_a_load_as_many_and_as_long_as_for_a_slow_model(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        fill(registry, "a", "b")
        host = host_of(registry, shards, budget=5 * MB)
        await host.start()
        (out,) = {"a", "b"} - set(host.served)
        HOLDS[f"{out}@1"] = held = Held()
        patient = host._limits
        host._limits = dataclasses.replace(patient, lanes=LaneLimits(predict_s=0.05, requests_max=3))
        *waited, refused = await asyncio.gather(*(host.find(out) for _ in range(4)), return_exceptions=True)
        assert isinstance(refused, ModelBusy)
        assert refused.message == (
            f"model `{out}`: 3 requests wait for it to be loaded; allowed are no more "
            "(setting `model_requests_max`); retry"
        )
        for one in waited:
            assert isinstance(one, Unavailable)
            assert (one.code, one.retry_after_ms) == ("model_loading", 1_000)
        assert len(host.served) == 1  # which answers beside
        await asyncio.gather(*(score(host, next(iter(host.served))) for _ in range(4)))
        with pytest.raises(Unavailable, match=r"being loaded still after 0\.05 s"):  # places are free again
            await host.find(out)
        host._limits = patient
        held.go.set()
        assert await score(host, out) == ("1", "1")
        assert LOADS[f"{out}@1"] == 1
        assert not host._waiting

    run(story)


def test_what_was_asked_for_before_a_change_does_not_undo_it(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        fill(registry, "a", "b")
        async with following(host_of(registry, shards, budget=5 * MB)) as host:
            (out,) = {"a", "b"} - set(host.served)
            HOLDS[f"{out}@1"] = held = Held()
            answer = asyncio.ensure_future(score(host, out))
            await held.has_begun()
            two = version_in(registry, definition(out, "2"))
            await live(host, registry.deploy([two]))
            second = asyncio.ensure_future(score(host, out))
            held.go.set()
            assert await asyncio.gather(answer, second) == [("2", "2")] * 2
            assert await score(host, out) == ("2", "2")

    run(story)


def test_a_model_that_is_predicting_stays(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        HOLDS["slow"] = held = Held()
        slow = definition("slow", "1", "HOLDS['slow']() or 'done'")
        registry.deploy([version_in(registry, slow, memory_bytes=4 * MB, predict_us=10_000.0)])
        host = host_of(registry, shards, budget=5 * MB)
        await host.start()
        answer = asyncio.ensure_future(score(host, "slow"))
        await held.has_begun()
        fill(registry, "b")
        await host._follow_change()
        assert await score(host, "b") == ("1", "1")
        assert set(host.served) == {"slow", "b"}
        held.go.set()
        assert await answer == ("1", "done")
        await score(host, "b")
        fill(registry, "c")
        await host._follow_change()
        await score(host, "c")
        assert set(host.served) == {"c"}

    run(story)


def test_a_model_that_is_asked_much_does_not_go_because_it_was_deployed_anew(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        fill(registry, "hot", "cold")
        async with following(host_of(registry, shards, budget=9 * MB)) as host:
            await score(host, "cold")
            await score(host, "hot")
            two = version_in(registry, definition("hot", "2"), memory_bytes=8 * MB)
            await live(host, registry.deploy([two]))
            assert set(host.served) == {"hot"}
            assert await score(host, "hot") == ("2", "2")
            assert LOADS["hot@2"] == 1

    run(story)


def test_what_is_new_is_loaded_once_over_the_budget_and_those_asked_longest_ago_go(
    registry: Registry, shards: Any
) -> None:
    async def story() -> None:
        fill(registry, "a", "b")
        async with following(host_of(registry, shards, budget=9 * MB)) as host:
            await score(host, "b")
            await score(host, "a")
            new = definition("new", "1")
            await live(host, registry.publish(new, [version_in(registry, new, memory_bytes=4 * MB)]))
            assert set(host.served) == {"a", "new"}
            # Who deploys what does not load hears of it.
            ill = version_in(registry, definition("ill", "1", load="raise ValueError"), memory_bytes=4 * MB)
            await live(host, registry.deploy([ill]))
            with pytest.raises(Unavailable, match=r"^model `ill` version `1` does not load: ValueError\(\)$"):
                wait_until_live(registry, registry.generation(), [ill])
            fill(registry, *(names := [f"n{i}" for i in range(4)]))
            await live(host, registry.generation())
            assert [LOADS[f"{name}@1"] for name in names] == [1] * 4
            assert host.memory_bytes <= 9 * MB
            assert "b" not in host.served

    run(story)


def test_what_is_only_kept_to_roll_back_to_goes_before_what_is_live(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        fill(registry, "a", "b")
        async with following(host_of(registry, shards, budget=9 * MB)) as host:
            await score(host, "b")
            await score(host, "a")
            await live(host, registry.deploy([version_in(registry, definition("a", "2"), memory_bytes=4 * MB)]))
            assert set(host.served) == {"a", "b"}
            assert set(host._loaded) == {("a", "2"), ("b", "1")}
            await live(host, registry.rollback("a"))
            assert await score(host, "a") == ("1", "1")

    run(story)


def test_what_answers_for_a_version_that_does_not_load_stays(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        fill(registry, "a", "b", "c")
        async with following(host_of(registry, shards, budget=9 * MB)) as host:
            await score(host, "a")
            await live(host, registry.deploy([version_in(registry, definition("a", "2", load="raise OSError"))]))
            for name in ("b", "c", "b", "c"):
                await score(host, name)
            assert await score(host, "a") == ("1", "1")

    run(story)


def test_a_former_champion_does_not_keep_the_shadow_that_it_had(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        one, two, three = (version_in(registry, definition("churn", version)) for version in "123")
        async with following(host_of(registry, shards)) as host:
            for version in (two, one):  # of the two, the one that is loaded last is kept
                await live(host, registry.deploy([version]))
            await live(host, registry.deploy([two], "shadow"))
            served = host.served["churn"].shadow
            assert served is not None
            shadow = weakref.ref(served.lane.loaded)
            del served
            await live(host, registry.deploy([three]))  # and the first is kept to roll back to
            await live(host, registry.retire("churn", "2"))
            gc.collect()
            assert shadow() is None
            assert await score(host, "churn") == ("3", "3")

    run(story)


# -- versions that do not load now

#: Lines that fail as a version is loaded, as long as a test wants that.
SHORT_OF_MEMORY = """if "no memory" in HOLDS:
            raise MemoryError"""


def test_a_version_that_did_not_load_is_tried_again_but_not_all_the_time(
    registry: Registry, shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        for name in ("a", "b"):
            made = definition(name, "1", load=SHORT_OF_MEMORY)
            registry.deploy([version_in(registry, made, memory_bytes=4 * MB)])
        host = host_of(registry, shards, budget=5 * MB)
        await host.start()
        (out,) = {"a", "b"} - set(host.served)
        HOLDS["no memory"] = Held()
        for _ in range(3):
            with pytest.raises(Unavailable, match=r"does not load: MemoryError\(\); deploy a version that does"):
                await score(host, out)
        assert LOADS[f"{out}@1"] == 1
        assert host.broken().keys() == {out}
        HOLDS.clear()
        monkeypatch.setattr(host_module, "_BROKEN_S", 0.001)
        await asyncio.sleep(0.001)
        assert await score(host, out) == ("1", "1")
        assert (host.broken(), host.report()["failed"]) == ({}, {})

    run(story)


def test_a_load_has_its_time_from_when_it_begins(
    registry: Registry, shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "_LOADS_AT_ONCE", 1)

    async def story() -> None:
        registry.deploy([version_in(registry, definition(name, "1")) for name in ("a", "b")])
        host = host_of(registry, shards)
        impatient(host, 1.0)
        HOLDS["a@1"] = HOLDS["b@1"] = held = Held()
        starting = asyncio.create_task(host.start())
        await held.has_begun()
        impatient(host, PATIENCE_S)  # whoever begins from now on
        first = next(iter(LOADS))
        HOLDS.clear()
        await starting
        # What hangs has a thread, but no place among those that are loaded at once.
        assert host.report()["failed"].keys() == {first}
        assert set(host.served) == {"a", "b"} - {first[0]}
        assert not held.go.is_set()
        held.go.set()

    run(story)


def test_a_load_that_hangs_is_not_begun_again_before_it_returns(
    registry: Registry, shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "_BROKEN_S", 0.05)

    async def story() -> None:
        registry.deploy([version_in(registry, definition("stuck", "1"))])
        HOLDS["stuck@1"] = held = Held()
        host = host_of(registry, shards)
        impatient(host, 0.5)
        await host.start()
        impatient(host, PATIENCE_S)
        await held.has_begun()
        while (why := host.report()["failed"]["stuck@1"]) is not None and "an earlier load" not in why:
            with pytest.raises(Unavailable, match="does not load"):
                await score(host, "stuck")
        assert LOADS["stuck@1"] == 1
        held.go.set()
        await until(lambda: not host._hanging, "the load to return")
        while "stuck" not in host.served:
            try:
                assert await score(host, "stuck") == ("1", "1")
            except Unavailable:
                await asyncio.sleep(0.001)
        assert LOADS["stuck@1"] == 2

    run(story)


# -- artifacts


def of_one_file(registry: Registry, artifacts: dict[str, bytes]) -> list[Version]:
    """Make the models of one definition live, one for each artifact, which is named as the model is."""
    text = definition("first", "1").text.rpartition("first = ")[0]
    for name in artifacts:
        text += (
            f'{name} = Model("{name}", version="1", owner="tests", predictor=Predictor, '
            f'features=[user_spend["orders_30d"]], artifacts={{"weights": "{name}"}})\n'
        )
    made = Definition("all.py", text, artifacts)
    versions = [version_of(made, model, {"user_id": "int64"}) for model in made.declared().models]
    registry.publish(made, versions)
    forget_module(made.module_name)
    return versions


def test_a_load_holds_no_artifact_in_memory_and_none_of_the_other_models(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        names = [f"m{i}" for i in range(8)]
        of_one_file(registry, {name: os.urandom(4 * MB) for name in names})
        host = host_of(registry, shards)
        tracemalloc.start()
        try:
            await host.start()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert set(host.served) == set(names)
        assert peak < 4 * MB * len(names)  # which each of the loads would take

    run(story)


def test_a_damaged_artifact_is_of_its_model_alone(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        versions = of_one_file(registry, {"good": b"1", "bad": b"2"})
        file = registry.artifacts_dir(versions[0]) / "bad"
        file.chmod(0o600)
        file.write_bytes(b"3")
        host = host_of(registry, shards)
        await host.start()
        assert set(host.served) == {"good"}
        with pytest.raises(Unavailable, match=r"`.*/artifacts/bad` is damaged"):
            await score(host, "bad")
        file.write_bytes(b"2")
        await host._follow_change()
        await asyncio.gather(*host._bringing)
        assert set(host.served) == {"good", "bad"}

    run(story)


def test_what_a_predictor_opens_is_what_was_compared_with_its_hash(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        load = "assert open(weights, 'rb').read() == b'true'"
        version = version_in(registry, definition("churn", "1", load=load, artifact=b"true"))
        registry.deploy([version])
        HOLDS["churn@1"] = held = Held()
        host = host_of(registry, shards)
        starting = asyncio.create_task(host.start())
        await held.has_begun()
        file = registry.artifacts_dir(version) / "weights.npy"
        file.chmod(0o600)
        file.write_bytes(b"false")
        held.go.set()
        await starting
        assert await score(host, "churn") == ("1", "1")

    run(story)


# -- modules


def test_the_code_of_a_version_that_has_gone_is_forgotten(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        one, two = definition("churn", "1"), definition("churn", "2")
        same_text = definition("churn", "1", artifact=b"other")  # a content of its own, of the same text
        assert same_text.module_name == one.module_name
        registry.deploy([version_in(registry, one)])
        async with following(host_of(registry, shards)) as host:
            assert one.module_name in sys.modules
            files = [f for f in linecache.cache if one.module_name[-8:] in f]
            assert files
            await live(host, registry.deploy([version_in(registry, two)]))
            await live(host, registry.retire("churn", "1"))
            await live(host, registry.deploy([version_in(registry, definition("churn", "3"))]))
            assert one.module_name not in sys.modules
            assert not set(files) & set(linecache.cache)
            assert two.module_name in sys.modules
            assert await score(host, "churn") == ("3", "3")

    run(story)


# -- a registry that cannot be read


def test_a_registry_that_cannot_be_read_for_a_while_is_followed_again(
    registry: Registry, shards: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_module, "_REPORT_S", 0.01)

    async def story() -> None:
        registry.deploy([version_in(registry, definition("churn", "1"))])
        two = version_in(registry, definition("churn", "2"))
        async with following(host_of(registry, shards)) as host:
            index = registry._folder / "index"
            host._registry.close()  # connections that are open would not notice
            await asyncio.get_running_loop().run_in_executor(host._asks, host._registry.close)
            index.rename(aside := registry._folder / "aside")
            index.write_text("not a folder")
            await until(lambda: "the registry cannot be followed" in caplog.text, "the registry to be missed")
            assert await score(host, "churn") == ("1", "1")
            index.unlink()
            aside.rename(index)
            await live(host, registry.deploy([two]))
            assert await score(host, "churn") == ("2", "2")

    run(story)


def test_a_registry_that_takes_no_report_is_read(
    registry: Registry, shards: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry_module, "_WAIT_S", 0.01)

    async def story() -> None:
        registry.deploy([version_in(registry, definition("churn", "1"))])
        host = host_of(registry, shards)
        with registry._index.change():  # nobody else can write
            await host.start()
            assert "the registry takes no report" in caplog.text
            assert await score(host, "churn") == ("1", "1")

    run(story)


def test_a_version_whose_files_are_away_for_a_while_goes_live_when_they_are_back(
    registry: Registry, shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "_REPORT_S", 0.01)
    monkeypatch.setattr(host_module, "_AGAIN_S", 0.05)

    async def story() -> None:
        registry.deploy([version_in(registry, definition("churn", "1"))])
        versions = registry._folder / "versions"
        async with following(host_of(registry, shards)) as host:
            two = version_in(registry, definition("churn", "2"))
            other = version_in(registry, definition("other", "1"))
            versions.rename(aside := registry._folder / "aside")
            await live(host, registry.deploy([two, other]))
            assert registry.reports()["replica-None"]["failed"].keys() == {"churn@2", "other@1"}
            assert await score(host, "churn") == ("1", "1")
            with pytest.raises(Unavailable):
                await score(host, "other")
            aside.rename(versions)
            await until(lambda: not registry.reports()["replica-None"]["failed"], "the versions to be loaded")
            assert await score(host, "churn") == ("2", "2")
            assert await score(host, "other") == ("1", "1")

    run(story)


# -- views that came


@pytest.mark.parametrize("ends", [True, False], ids=["fails", "hangs"])
def test_a_view_whose_text_does_not_run_here_holds_up_no_rollout(
    registry: Registry, shards: Any, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    monkeypatch.setattr(host_module, "_AGAIN_S", 0.05)
    imports = (
        "from apps import purchases\nfrom lanes import HOLDS\nfrom millpond.feature_actors import Count, FeatureView\n"
    )
    declares = """
late = FeatureView("late", owner="tests", source=purchases, key=["user_id"], features={"orders": Count()})
"""
    text = f"{imports}if 'here' in HOLDS:\n    HOLDS['here']()\n    assert {not ends}\n{declares}"
    made = Definition("late.py", text)
    (view,) = made.declared().views
    forget_module(made.module_name)
    reads = f"""{imports}{declares}
from millpond.models import Model
class Predictor:
    def predict(self, features):
        return ["read"] * len(features.matrix)

reader = Model("reader", version="1", owner="tests", predictor=Predictor, features=list(late))
"""

    async def story() -> None:
        registry.deploy([version_in(registry, definition("churn", "1"))])
        two, three = (version_in(registry, definition("churn", version)) for version in "23")
        reading = version_in(registry, Definition("reader.py", reads))
        held = Held()
        if ends:
            held.go.set()
        HOLDS["here"] = held
        async with following(host_of(registry, shards)) as host:
            impatient(host, PATIENCE_S if ends else 0.01)
            registry.views.add("late.py", text, [identity_of(view)])
            await held.has_begun()
            await until(lambda: host.report()["failed"], "the failure")
            assert host.report()["failed"].keys() == {"definition `late.py`"}
            impatient(host, PATIENCE_S)
            await live(host, registry.deploy([two]))
            assert await score(host, "churn") == ("2", "2")
            assert "late" not in host._client.layout.views
            await live(host, registry.deploy([reading]))
            with pytest.raises(Unavailable, match="`late`"):
                await score(host, "reader")
            other = host_of(registry, shards)  # which starts now
            if ends:
                await other.start()
                assert await score(other, "churn") == ("2", "2")
            HOLDS.clear()
            held.go.set()
            await until(lambda: "late" in host._client.layout.views, "the view")
            await live(host, registry.deploy([three]))
            assert await score(host, "churn") == ("3", "3")
            await until(lambda: host.report()["failed"] == {}, "what reads it")
            assert await score(host, "reader") == ("1", "read")

    run(story)


# -- pools


def test_a_pool_has_its_model_and_the_others_only_if_they_are_asked_for(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition("heavy", "1", pool="Pool(2)"))])
        registry.deploy([version_in(registry, definition("light", "1"))])
        async with (
            following(host_of(registry, shards, pool="heavy")) as pool,
            following(host_of(registry, shards)) as host,
        ):
            assert (set(pool.served), set(host.served)) == ({"heavy"}, {"light"})
            assert registry.reports()["replica-heavy"]["pool"] == "heavy"
            for one in (pool, host):  # on the way into a pool and back, either may be asked
                assert await score(one, "heavy") == ("1", "1")
                assert await score(one, "light") == ("1", "1")
            await live(host, registry.set_pool("light", Pool(1)))
            await live(host, registry.deploy([version_in(registry, definition("light", "2"))]))
            assert await score(host, "light") == ("2", "2")

    run(story)


# -- reports


def test_a_report_can_be_read_by_others(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition("churn", "1"), memory_bytes=MB)])
        async with following(host_of(registry, shards)) as host:
            await score(host, "churn")
            report = json.loads(json.dumps(host.report()))
            assert is_alive(report)
            assert not is_alive({**report, "started_ticks": 1})
            assert not is_alive({**report, "pid": 1 << 30})  # there are no such numbers
            assert report["versions"]["churn@1"]["requests"] == 1
            assert MB <= report["memory_bytes"] < 2 * MB

    run(story)


def digits_in(folder: Path, number: int) -> list[str]:
    """Return the names of the files below a folder that have the digits of a number."""
    return [p.name for p in folder.rglob("*") if p.is_file() and str(number).encode() in p.read_bytes()]


def test_who_is_forgotten_is_no_example_of_a_shadow_any_more(registry: Registry, shards: Any) -> None:
    """Where no scores are logged, too. Nobody knows the id: it is in the files because somebody asked with it."""
    who = 4_242_424_242_424_242
    eraser, key = ScoreEraser(None, str(registry._folder)), hash_values([[who]], 1).view(np.int64)[0].tolist()

    async def story() -> None:
        registry.deploy([version_in(registry, definition("churn", "1"))])
        example = {"id": {"user_id": who}, "champion": "1", "shadow": "2"}
        registry.erasures.begin("of one who ended", ForgottenScores("user_id", (1, 2), NOW - 1))
        dead = {"pid": os.getpid(), "started_ticks": -1, "shadows": {"churn": {"examples": [example]}}}
        registry.report("dead", dead)
        async with following(host_of(registry, shards)) as host:

            def examples() -> list[Any]:
                seen = registry.reports()[host._replica]["shadows"].get("churn", {"examples": []})
                return [one["id"]["user_id"] for one in seen["examples"]]

            async def compared(user: int) -> list[Any]:
                """Return the examples when one more has been compared."""
                shadow = host.served["churn"].shadow
                assert shadow is not None
                before = shadow.disagreement.compared
                await score(host, "churn", user)
                await until(lambda: shadow.disagreement.compared == before + 1, "the shadow")
                return [one["id"]["user_id"] for one in shadow.disagreement.as_json()["examples"]]

            await live(host, registry.deploy([version_in(registry, definition("churn", "2"))], "shadow"))
            assert sorted([await compared(user) for user in (who, 3)][-1]) == [3, who]
            await until(lambda: sorted(examples()) == [3, who], "a report")
            assert digits_in(registry._folder, who)
            assert await asyncio.to_thread(eraser.forget, "one", "user_id", tuple(key), NOW) == 0
            assert digits_in(registry._folder, who) == []
            assert (registry.reports().keys(), registry.erasures.notices()) == ({host._replica}, {})
            # What was read before is no example that is compared now, nor of the next shadow; what is read later is.
            assert await compared(who) == []
            await live(host, registry.deploy([version_in(registry, definition("churn", "3"))], "shadow"))
            assert await compared(who) == []
            host._client._clock.ms = NOW + 1  # type: ignore[attr-defined]
            assert await compared(3) == [3]
            await until(lambda: examples() == [3], "a report")
            assert digits_in(registry._folder, who) == []

    run(story)
    assert registry.check() == []


def test_who_keeps_a_registry_from_being_scrubbed_is_waited_for_and_said(registry: Registry) -> None:
    eraser = ScoreEraser(None, str(registry._folder), wait_s_max=0.2)
    reader = Registry(registry._folder)
    with reader._index.moment():
        assert reader.reports() == {}  # from here on it sees what was there then
        registry.report("ended", {"pid": os.getpid(), "started_ticks": -1, "seen": "4242424242"})
        with pytest.raises(Unavailable, match=r"^registry: .* its index has been read all the time for 0\.2 s"):
            eraser.forget("one", "user_id", (1, 2), NOW)
        assert digits_in(registry._folder, 4_242_424_242)
    assert eraser.forget("one", "user_id", (1, 2), NOW) == 0
    assert digits_in(registry._folder, 4_242_424_242) == []
    reader.close()


# -- any changes


@pytest.mark.parametrize(("seed", "budget"), [(1, 1 << 40), (2, 1 << 40), (3, 14 * MB)])
def test_after_any_changes_what_is_served_is_what_the_registry_has(
    registry: Registry, shards: Any, seed: int, budget: int
) -> None:
    """100 changes at random while requests come all the time: none of them fails."""
    rng = random.Random(seed)
    names, labels = ("a", "b", "c"), [str(n) for n in range(6)]
    versions = {
        (name, label): version_in(registry, definition(name, label), memory_bytes=2 * MB)
        for name in names
        for label in labels
    }

    def change() -> None:
        name, label = rng.choice(names), rng.choice(labels)
        try:
            match rng.randrange(10):
                case 0 | 1 | 2:
                    registry.deploy([versions[name, label]])
                case 3 | 4:
                    registry.deploy([versions[name, label]], "canary", rng.choice((0.1, 0.5)))
                case 5:
                    registry.deploy([versions[name, label]], "shadow")
                case 6:
                    registry.promote(name, rng.choice((None, label)))
                case 7:
                    registry.rollback(name)
                case 8:
                    registry.set_pool(name, rng.choice((None, Pool(1))))
                case 9:
                    if rng.random() < 0.2:
                        registry.retire(name, label)
        except MillpondError:
            pass  # it was refused, and has changed nothing

    async def story() -> None:
        for name in names:
            registry.deploy([versions[name, "0"]])
        async with following(host_of(registry, shards, budget=budget)) as host:
            ends = asyncio.Event()
            answered = 0

            async def ask(name: str) -> None:
                nonlocal answered
                while not ends.is_set():
                    version, result = await score(host, name, rng.randrange(1, 41))
                    assert result == version
                    answered += 1
                    await asyncio.sleep(0)

            asking = [asyncio.create_task(ask(name)) for name in names]
            for _ in range(100):
                await asyncio.to_thread(change)
                if rng.random() < 0.3:
                    await live(host, registry.generation())
            await live(host, registry.generation())
            ends.set()
            await asyncio.gather(*asking)
            assert answered > 100
            rollouts = registry.rollouts()
            assert set(rollouts) == set(names)
            for name, rollout in rollouts.items():
                assert rollout.champion is not None
                served = host.served.get(name) or await host.find(name)
                assert served.champion.loaded.model.version == rollout.champion.version
                canary = served.canary and served.canary.loaded.model.version
                shadow = served.shadow and served.shadow.lane.loaded.model.version
                assert canary == (rollout.canary and rollout.canary.version)
                assert (shadow, served.share) == (rollout.shadow and rollout.shadow.version, rollout.share)
                assert served.champion.compare is served.shadow
            assert host.memory_bytes <= budget
            assert host.report()["failed"] == {}

    run(story)
    assert registry.check() == []


# -- versions that end the process, or hold it up


def dead() -> list[int]:
    """The number and ticks of a process that has died."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    noted = [child.pid, started_ticks(child.pid)]
    child.kill()
    child.communicate()
    return noted


def died_loading(registry: Registry, replica: str, *models: str) -> None:
    registry.attempts.begin(replica, [Attempt(model, "1", *dead()) for model in models])


def test_what_a_process_died_of_is_loaded_alone_and_after_all_others_answer(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        for name in ("one", "two", "three"):
            registry.deploy([version_in(registry, definition(name, "1"))])
        died_loading(registry, "former", "two", "three")
        HOLDS["three@1"] = held = Held()
        async with following(host_of(registry, shards)) as host:
            assert set(host.served) == {"one"}
            await held.has_begun()
            assert LOADS["two@1"] == 0
            # Whoever comes after this process, should it die now, knows of what.
            noted = [a.model for a in registry.attempts.all() if is_alive(dataclasses.asdict(a))]
            assert noted == ["three"]
            asked = asyncio.create_task(score(host, "two"))
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(host._bringing) <= 2  # who asks waits for the load that is there
            assert not asked.done()
            held.go.set()
            assert await asked == ("1", "1")
            await live(host, registry.generation())
            assert set(host.served) == {"one", "two", "three"}
            assert [a for a in registry.attempts.all() if is_alive(dataclasses.asdict(a))] == []

    run(story)


def test_what_two_processes_died_of_is_not_loaded_until_it_is_deployed_again(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        one, two = (version_in(registry, definition(name, "1")) for name in ("one", "two"))
        registry.deploy([one, two])
        died_loading(registry, "first", "two")
        died_loading(registry, "second", "two")
        async with following(host_of(registry, shards)) as host:
            assert set(host.served) == {"one"}
            await live(host, registry.generation())
            assert host.report()["failed"] == {
                "two@1": "model `two` version `1` does not load: 2 processes have died as they loaded it; deploy it "
                "again to have it tried again"
            }
            with pytest.raises(Unavailable, match="2 processes have died"):
                await score(host, "two")
            assert LOADS["two@1"] == 0
            await live(host, registry.deploy([two]))
            assert await score(host, "two") == ("1", "1")
            assert host.report()["failed"] == {}

    run(story)


def test_what_a_process_died_of_that_another_has_loaded_since_was_not_the_reason(
    registry: Registry, shards: Any
) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition("one", "1"))])
        for replica in ("in spring", "in autumn"):
            died_loading(registry, replica, "one")
            async with following(host_of(registry, shards)) as host:
                await live(host, registry.generation())
                assert await score(host, "one") == ("1", "1")
            assert registry.attempts.all() == []

    run(story)


@pytest.mark.parametrize("at_once", [True, False])
def test_processes_that_died_of_something_else_as_they_loaded_many_versions_bar_none(
    registry: Registry, shards: Any, at_once: bool
) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition(name, "1")) for name in ("one", "two", "three")])
        for replica in ("first", "second"):
            for names in [("one", "two", "three")] if at_once else [("one",), ("two",), ("three",)]:
                died_loading(registry, replica, *names)
        async with following(host_of(registry, shards)) as host:
            assert host.served == {}
            await live(host, registry.generation())
            assert set(host.served) == {"one", "two", "three"}
            assert registry.attempts.all() == []
            # Of those of one process only what is noted alone is told to be.
            died_loading(registry, "third", "one")
            assert [a.alone for a in registry.attempts.all()] == [True]
            died_loading(registry, "third", "two")
            assert [a.alone for a in registry.attempts.all()] == [False, False]

    run(story)


def test_the_stop_of_a_cluster_is_no_death_of_what_was_being_loaded(registry: Registry, tmp_path: Path) -> None:
    died_loading(registry, "first", "one")
    registry.attempts.begin("second", [Attempt("one", "1", os.getpid(), started_ticks(os.getpid()))])
    cluster = Cluster(Config(data_dir=str(tmp_path)), [definition("one", "1")])
    cluster.registry = Registry(registry._folder)
    cluster.stop()
    assert [(a.model, is_alive(dataclasses.asdict(a))) for a in registry.attempts.all()] == [("one", False)]


def test_a_version_that_held_up_a_replica_is_called_in_a_thread_by_the_next(registry: Registry, shards: Any) -> None:
    async def story() -> None:
        version = version_in(registry, definition("one", "1"))
        registry.deploy([version])
        registry.attempts.begin("former", [Attempt("one", "1", *dead(), hung=True)])
        async with following(host_of(registry, shards)) as host:
            for _ in range(20):  # quick as it is
                assert await score(host, "one") == ("1", "1")
            assert host.served["one"].champion.in_threads
        registry.deploy([version])  # which forgets that
        async with following(host_of(registry, shards)) as host:
            assert not host.served["one"].champion.in_threads

    run(story)


def test_a_change_of_something_else_does_not_bring_what_held_up_a_replica_back_to_the_loop(
    registry: Registry, shards: Any
) -> None:
    async def story() -> None:
        registry.deploy([version_in(registry, definition(name, "1")) for name in ("one", "two")])
        registry.attempts.begin("former", [Attempt("one", "1", *dead(), hung=True)])
        HOLDS["one@1"] = held = Held()
        host = host_of(registry, shards)
        starting = asyncio.create_task(host.start())
        await held.has_begun()
        registry.set_pool("two", Pool(1))
        await host._follow_change()
        held.go.set()
        await starting
        assert host.served["one"].champion.in_threads

    run(story)


def test_a_prediction_that_does_not_give_the_loop_back_is_noted_and_ends_the_process(registry: Registry) -> None:
    """In a process of its own, which is what ends."""
    text = definition("stuck", "1", load="").text.replace("def predict(self, features):",
        "def predict(self, features):\n        import time\n        time.sleep(1e6)")  # fmt: skip
    registry.deploy([version_in(registry, Definition("stuck.py", text))])
    story = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from lanes import client_over, shards_with_spend
from millpond.deployments.host import ModelHost
from millpond.models.registry import Registry

client, _ = client_over(shards_with_spend())

async def main():
    host = ModelHost(Registry(Path(sys.argv[1])), client, "it")
    host.watch(0.2)
    await host.start()
    await host.served["stuck"].ask({"user_id": [1]}, 1)

asyncio.run(main())
"""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", story, str(registry._folder), here], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == HUNG_STATUS, done.stderr
    assert "model `stuck` version `1` has held up this replica for 0.2 s (setting `hang_timeout_s`)" in done.stderr
    (noted,) = registry.attempts.all()
    assert (noted.model, noted.version, noted.hung) == ("stuck", "1", True)


def test_a_version_that_ends_the_process_as_it_loads_leaves_a_note(registry: Registry) -> None:
    # In the first process `good` is still being loaded when the other ends it.
    slow = "import os, time; time.sleep(1e6 if os.environ['REPLICA'] == 'first' else 0)"
    registry.deploy([version_in(registry, definition("good", "1", load=slow))])
    deadly = """import os, time
        while os.environ['REPLICA'] == 'first' and not LOADS['good@1']:
            time.sleep(0.01)
        os._exit(9)"""
    registry.deploy([version_in(registry, definition("deadly", "1", load=deadly))])
    story = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from lanes import client_over, shards_with_spend
from millpond.deployments.host import ModelHost
from millpond.models.registry import Registry

client, _ = client_over(shards_with_spend())

async def main():
    host = ModelHost(Registry(Path(sys.argv[1])), client, os.environ["REPLICA"])
    await host.start()
    print(sorted(host.served), flush=True)
    following = asyncio.create_task(host.follow())
    while host._bringing:
        await asyncio.sleep(0.01)
    print(sorted(host.served), sorted(host.report()["failed"]), flush=True)

asyncio.run(main())
"""
    said = []
    for replica in ("first", "second", "third"):
        done = subprocess.run(
            [sys.executable, "-c", story, str(registry._folder), str(Path(__file__).parent)],
            capture_output=True, text=True, timeout=120, env={**os.environ, "REPLICA": replica},
        )  # fmt: skip
        said.append((done.returncode, done.stdout.split("\n")[:-1]))
    # All are suspects of the first that died, and loaded one by one when the second has started; then it is known.
    assert said[0] == (9, [])
    assert said[1] == (9, ["[]"])
    assert said[2] == (0, ["[]", "['good'] ['deadly@1']"])
