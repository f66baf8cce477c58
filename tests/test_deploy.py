# ruff: noqa: E501  (messages stand whole)
"""Deploying: what is refused, in which words, and that nothing has changed then; what is measured; who is waited for."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apps import DEFINITION, NOW, VIEWS, make_world, purchase, purchases
from lanes import HOLDS, LOADS, definition, until, version_in
from port_contract import in_files

from millpond.cluster import deploy as deploy_module
from millpond.cluster.config import Config
from millpond.cluster.deploy import check_models, nobody, publish, roll_back, share_of, wait_until_live
from millpond.cluster.model_commands import deploy_file, describe_models, ids_of
from millpond.deployments import host as host_module
from millpond.deployments.host import ModelHost
from millpond.feature_actors.errors import BadRequest, DeclarationError, MillpondError, NotFound, Unavailable
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import started_ticks
from millpond.models.definition import Definition
from millpond.models.registry import Registry, VersionExists
from millpond.models.rollout import RolloutRefused
from millpond.models.version import Version

LAYOUT = compile_layout([], [v for v in VIEWS if v.source is purchases])
HEAD = DEFINITION.partition("class Total")[0]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    HOLDS.clear()
    LOADS.clear()
    registry = Registry(tmp_path / "registry")
    yield registry
    assert registry.check() == []
    registry.close()


def defined(body: str, **artifacts: bytes) -> Definition:
    """A definition with the views of `apps.DEFINITION`."""
    return Definition(
        "mine.py", HEAD + body, {name.replace("_", ".", 1): content for name, content in artifacts.items()}
    )


def predicting(line: str, *, init: str = "pass", features: str = "user_spend", arguments: str = "") -> Definition:
    """A definition of the model `m`; line: the body of its `predict`."""
    return defined(
        f"class P:\n    def __init__(self, **artifacts): {init}\n    def predict(self, features): {line}\n"
        f'm = Model("m", version="1", owner="ml", features=list({features}), predictor=P{arguments})\n'
    )


def checked(made: Definition, **options: Any) -> list[Version]:
    with nobody(LAYOUT) as client:
        return check_models(made, LAYOUT, client, **options)


def array(n: int) -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(float(n)))
    return out.getvalue()


def trees(columns: int) -> bytes:
    """The file of one tree of one leaf that was trained with so many columns."""
    out, one = io.BytesIO(), np.zeros((1, 1))
    whole = {name: one.astype(np.int32) for name in ("left", "right")}
    np.savez(
        out, field=np.full((1, 1), -1, np.int32), threshold=one, **whole, null_left=one.astype(np.bool_), value=one,
        base=np.float64(0.0), columns=np.int64(columns),
    )  # fmt: skip
    return out.getvalue()


# -- what is refused

ROWS = "return features.matrix[:, 0]"
TWICE = 'm = [Model("m", owner="ml", features=list(user_spend), predictor=dict) for _ in range(2)]\n'
OTHER_VIEW = (
    'other = FeatureView("other", owner="ml", source=purchases, key=["user_id"], features={"n": Count(window="7d")})\n'
)
OTHER_FEATURE = 'other = FeatureView("user_spend", owner="ml", source=purchases, key=["user_id"], features={"orders_30d": Count(window="7d")})\n'
OF_TREES = (
    "from millpond.models.trees import BoostedTrees\n"
    'm = Model("m", owner="ml", features=list(user_spend), predictor=BoostedTrees, artifacts={"trees": "t.npz"})\n'
)
TWO_STAGES = (
    'class P:\n    def predict(self, features, reader):\n        return reader.read([user_spend["spend_30d"]], features.keys).matrix[:, 0]\n'
    'm = Model("m", owner="ml", features=[user_spend["orders_30d"]], predictor=P, reads=[%s])\n'
)
REFUSED: list[tuple[Any, dict[str, Any], type[MillpondError], str, str | None]] = [
    (defined(""), {}, DeclarationError, "definition `mine.py`: declares no model", None),
    (predicting(ROWS), {"only": ["n"]}, NotFound, "definition `mine.py`: no model `n`; known: `m`", None),
    (defined(TWICE), {}, DeclarationError, "two models are named `m`", None),
    (
        defined(OTHER_VIEW + 'm = Model("m", owner="ml", features=list(other), predictor=dict)\n'), {}, DeclarationError,
        "model `m`: reads `other.n`, which the cluster does not keep; start it with the definition", None,
    ),
    (
        defined(OTHER_FEATURE + 'm = Model("m", owner="ml", features=list(other), predictor=dict)\n'), {}, DeclarationError,
        "model `m`: reads `user_spend.orders_30d`, which the cluster does not keep; start it with the definition", None,
    ),
    (
        defined(OTHER_VIEW + TWO_STAGES % 'other["n"]'), {}, DeclarationError,
        "model `m`: reads `other.n`, which the cluster does not keep; start it with the definition", None,
    ),
    (
        predicting(ROWS, arguments=', artifacts={"weights": "w.npy"}'), {}, DeclarationError,
        "model `m`: artifact `weights` is `w.npy`, which does not lie beside `mine.py`; train the model first", None,
    ),
    (predicting(ROWS, init="1 / 0"), {}, DeclarationError, "model `m`: its predictor does not load: ZeroDivisionError: division by zero", None),
    (predicting(ROWS, init="raise SystemExit(3)"), {}, DeclarationError, "model `m`: its predictor does not load: SystemExit: 3", None),
    (
        defined('m = Model("m", owner="ml", features=list(user_spend), predictor=dict)\n'), {}, DeclarationError,
        "model `m`: its predictor does not load: AttributeError: 'dict' object has no attribute 'predict'", None,
    ),
    (predicting("raise KeyError('age')"), {}, DeclarationError, "model `m`: predict fails on {'user_id': 0}: KeyError: 'age'", None),
    (predicting("raise SystemExit"), {}, DeclarationError, "model `m`: predict fails on {'user_id': 0}: SystemExit: ", None),
    (
        defined(OF_TREES, t_npz=trees(3)), {}, DeclarationError,
        "model `m`: predict fails on {'user_id': 0}: ValueError: features: got 4 columns; the trees were trained with 3", None,
    ),
    (predicting("return None"), {}, DeclarationError, "model `m`: predict fails on {'user_id': 0}: TypeError: 'NoneType' object is not iterable", None),
    (predicting("return features.matrix[:, 2]"), {}, MillpondError, "model `m`: predict returned the number nan, which JSON cannot hold", None),
    (predicting("return [1.0]"), {}, MillpondError, "model `m`: predict returned 1 results for 2 rows", None),
    (predicting("return {'score': 1}"), {}, MillpondError, "model `m`: predict returned a `dict`; expected a list or an array of one result per row", None),
    (predicting("return [{1, 2} for _ in features.matrix]"), {}, MillpondError, "model `m`: predict returned a value of type `set`, which JSON cannot hold", None),
    (predicting("return [{1: 2} for _ in features.matrix]"), {}, MillpondError, "model `m`: predict returned an object with the key 1, which JSON cannot hold", None),
    (predicting("return [object() for _ in features.matrix]"), {}, MillpondError, "model `m`: predict returned a value of type `object`, which JSON cannot hold", None),
    (
        predicting(ROWS, features="book_sales"), {"ids": [{"user_id": 1}]}, BadRequest,
        "model `m`: none of the ids to try it on has its key (`book_id`) and nothing else", None,
    ),
    (predicting(ROWS), {"ids": [{"user_id": 1, "book_id": "b"}]}, BadRequest, "model `m`: none of the ids to try it on has its key (`user_id`) and nothing else", None),
    (predicting(ROWS), {"ids": [{"user_id": "x"}]}, BadRequest, "model `m`: expected `user_id` as int64, got 'x'", "$[0].user_id"),
    (
        defined(TWO_STAGES % ""), {}, DeclarationError,
        "model `m`: predict fails on {'user_id': 0}: DeclarationError: model `m`: predict reads `user_spend.spend_30d`, which is not among its `reads`; declared: none", None,
    ),
    (defined("1 / 0\n"), {}, DeclarationError, "definition `mine.py`: does not run: ZeroDivisionError: division by zero", "mine.py:22"),
]  # fmt: skip


@pytest.mark.parametrize(("made", "options", "kind", "message", "path"), REFUSED, ids=[r[3][:60] for r in REFUSED])
def test_what_a_check_refuses_says_why(
    made: Definition, options: dict[str, Any], kind: type[MillpondError], message: str, path: str | None
) -> None:
    with pytest.raises(kind) as refused:
        checked(made, **options)
    assert (refused.value.message.partition(" (<")[0], refused.value.path) == (message, path)


def test_a_feature_that_fails_is_named_and_not_the_model() -> None:
    made = defined(
        "from millpond.feature_actors import Derived\n"
        'broken = FeatureView("broken", owner="ml", source=purchases, key=["user_id"],\n'
        '                     features={"n": Count(window="7d"), "bad": Derived(lambda n: n[:0], "n")})\n'
        "class Ones:\n    def predict(self, features): return [1.0] * len(features.matrix)\n"
        'm = Model("m", owner="ml", features=[broken["bad"]], predictor=Ones)\n'
    )
    layout = compile_layout([], made.declared().views)
    with nobody(layout) as client, pytest.raises(MillpondError) as refused:
        check_models(made, layout, client)
    assert refused.value.message.startswith("model `m`: the function of feature `broken.bad` raised TypeError")


# -- what is checked


def test_trees_that_were_trained_with_the_features_of_the_model_are_not_refused() -> None:
    assert [one.model for one in checked(defined(OF_TREES, t_npz=trees(4)))] == ["m"]


def test_a_model_is_tried_on_the_ids_that_have_its_key() -> None:
    """Of a file with models of several ids, each on its own; on real features."""
    world = make_world(only_purchases=True)
    world.post_events("purchases", [purchase("a", 1, 4.0, NOW, book_id="x"), purchase("b", 7, 6.0, NOW, book_id="x")])
    made = defined(
        "SEEN = {}\n"
        "class P:\n"
        "    def __init__(self, name): self.name = name\n"
        "    def predict(self, features):\n"
        "        SEEN.setdefault(self.name, []).append((dict(features.keys), features.matrix.tolist()))\n"
        "        return [0] * len(features.matrix)\n"
        'a = Model("a", owner="ml", features=[user_spend["last_price"]], predictor=lambda: P("a"))\n'
        'b = Model("b", owner="ml", features=[book_sales["sold_7d"]], predictor=lambda: P("b"))\n'
    )
    ids = [{"user_id": 1}, {"book_id": "x"}, {"user_id": 7}]
    a, b = check_models(made, LAYOUT, world.client, ids)
    seen = made._module().SEEN
    assert seen["a"][0] == ({"user_id": [1, 7, 1]}, [[4.0], [6.0], [4.0]])  # several, as in a request of several
    assert seen["b"][0] == ({"book_id": ["x", "x"]}, [[2.0], [2.0]])
    assert all(call == ({"user_id": [1]}, [[4.0]]) for call in seen["a"] if len(call[1]) == 1)
    assert [(v.model, v.key_fields, v.features) for v in (a, b)] == [
        ("a", {"user_id": "int64"}, ("user_spend.last_price",)), ("b", {"book_id": "string"}, ("book_sales.sold_7d",)),
    ]  # fmt: skip
    assert a.version == b.version == made.digest[:12]
    assert [v.model for v in check_models(made, LAYOUT, world.client, ids[:1], only=["a"])] == ["a"]


@pytest.mark.parametrize("made", [
    predicting("return features.matrix[:, 2]"),
    predicting("return features.matrix[:, 1]", features="book_sales"),
    defined(
        'recent = FeatureView("recent", owner="ml", source=purchases, key=["user_id"], features={"n": Count(window="7d")})\n'
        "class P:\n    def predict(self, features, reader):\n"
        '        return reader.read([user_spend["last_price"]], features.keys).matrix[:, 0]\n'
        'm = Model("m", owner="ml", features=[recent["n"]], predictor=P, reads=[user_spend["last_price"]])\n'
    ),
], ids=["int64", "string", "of what is read"])  # fmt: skip
def test_a_model_is_tried_on_an_unknown_entity_although_zero_is_somebody(made: Definition) -> None:
    layout = compile_layout([], made.declared().views)
    world = make_world((), layout=layout)
    events = [purchase("a", 0, 4.0, NOW - 10 * 86_400_000, book_id="x"), purchase("b", 1, 4.0, NOW, book_id="")]
    assert world.post_events("purchases", events).json["accepted"] == 2
    check_models(made, layout, world.client, [{"user_id": 0}, {"book_id": ""}])
    with pytest.raises(MillpondError, match="predict returned the number nan, which JSON cannot hold"):
        check_models(made, layout, world.client)


def test_a_model_of_two_stages_is_tried_with_a_reader() -> None:
    (version,) = checked(defined(TWO_STAGES % 'user_spend["spend_30d"]'))
    assert version.features == ("user_spend.orders_30d",)


MODEL = 'Model("{0}", version="1", owner="ml", features=list(user_spend)[:3], predictor=P, artifacts={1})'
KEEPS = "class P:\n    def __init__(self, weights=None): self.w = None if weights is None else np.load(weights)\n    def predict(self, features): return features.matrix[:, 0]\n"


def test_what_a_model_takes_of_memory_is_its_own() -> None:
    """Not what the first model of all brings, such as kernels and libraries; nor is less left for the second large one."""
    big = {"w_npy": array(2_500_000)}
    models = "".join(
        f"{name} = {MODEL.format(name, {'weights': 'w.npy'} if big else {})}\n"
        for name, big in (("one", 0), ("two", 1), ("three", 1))
    )
    one, two, three = checked(defined(KEEPS + models, **big))
    assert one.memory_bytes < 3_000_000
    for version in (two, three):
        assert 19_000_000 < version.memory_bytes < 24_000_000
    brings = "LIBRARY = []\n" + KEEPS.replace("self.w =", "LIBRARY or LIBRARY.append(np.ones(4_000_000)); self.w =")
    (version,) = checked(defined(f"{brings}one = {MODEL.format('one', {})}\n"))
    assert version.memory_bytes < 1_000_000


def test_what_a_prediction_takes_is_measured() -> None:
    (quick,) = checked(predicting(ROWS))
    slow = "import time; end = time.perf_counter() + 0.002\n        while time.perf_counter() < end: pass\n        return features.matrix[:, 0]"
    (busy,) = checked(predicting("\n        " + slow))
    assert 1 < quick.predict_us < 1_000
    assert 2_000 <= busy.predict_us < 20_000


# -- the registry


def everything(registry: Registry) -> Any:
    """All that the registry has but reports, in bytes."""
    folder = registry._folder
    with sqlite3.connect(f"file:{folder / 'index' / 'cache.db'}?mode=ro", uri=True) as index:
        rows = index.execute("SELECT key, value FROM Cache WHERE key NOT LIKE 'report/%' ORDER BY key").fetchall()
    return rows, sorted(str(p) for p in (folder / "versions").glob("*/*"))


def test_what_cannot_be_published_leaves_nothing(registry: Registry) -> None:
    one, two = definition("churn", "1"), definition("churn", "2")
    (of_one,), (of_two,) = (checked(made) for made in (one, two))
    before = everything(registry)
    for role, share, kind in (
        ("canary", 0.5, RolloutRefused), ("shadow", None, RolloutRefused), ("canary", None, BadRequest),
        ("champion", 0.5, BadRequest), ("canary", 1.5, BadRequest),
    ):  # fmt: skip
        for refuses in (partial(publish, registry, one), registry.check_publish):
            with pytest.raises(kind):
                refuses([of_one], role, share)  # type: ignore[arg-type]
        assert everything(registry)[0] == before[0]
    generation = publish(registry, one, [of_one])
    assert generation == registry.generation()
    before = everything(registry)
    other = definition("churn", "1", artifact=b"other")
    (of_other,), by_name = checked(other), replace(of_two, key_fields={"name": "string"})
    for made, version, role, kind, why in (
        (other, of_other, "champion", VersionExists, "its content"), (one, of_one, "shadow", RolloutRefused, "champion"),
        (two, by_name, "champion", RolloutRefused, "its id is"),
    ):  # fmt: skip
        for refuses in (partial(publish, registry, made), registry.check_publish):
            with pytest.raises(kind, match=why):
                refuses([version], role)  # type: ignore[arg-type]
            assert everything(registry)[0] == before[0]
    registry.check_publish([of_two])
    assert everything(registry)[0] == before[0]
    # The name is not taken by what was refused.
    again = definition("churn", "2", artifact=b"another content")
    publish(registry, again, checked(again), "canary", 0.5)
    assert registry.rollouts()["churn"].canary is not None


@contextmanager
def seemingly_running(config: Config) -> Iterator[None]:
    """What a process finds of a cluster that runs, for half a minute at most: the memory of its shard."""
    config.directory.mkdir(parents=True)
    in_files(config.directory, LAYOUT, ShardMap.even(1, 1), 0)
    with subprocess.Popen(["sleep", "30"]) as process:
        state = {
            "pid": process.pid, "started_ticks": started_ticks(process.pid), "url": "", "cpus": 2,
            "definitions": [["apps.py", DEFINITION]], "slots": 1, "shards": 1, "clock": "wall", "durability": "safe",
            "memory_dir": str(config.directory),
        }  # fmt: skip
        (config.directory / "cluster.json").write_text(json.dumps(state))
        try:
            yield
        finally:
            process.kill()


def test_what_the_registry_refuses_adds_no_view(tmp_path: Path) -> None:
    """They cannot be taken back."""
    config = Config(name="seems", data_dir=str(tmp_path))
    path = tmp_path / "mine.py"
    path.write_text(
        HEAD + OTHER_VIEW + "class P:\n    def predict(self, features): return [1.0] * len(features.matrix)\n"
        'm = Model("m", version="1", owner="ml", features=list(other), predictor=P)\n'
    )
    with seemingly_running(config):
        registry = Registry(config.directory / "registry")
        taken = definition("m", "1")
        publish(registry, taken, checked(taken))
        before = everything(registry)
        with pytest.raises(VersionExists, match="model `m` version `1`: its content"):
            deploy_file(config, path)
        path.write_text(path.read_text().replace('version="1"', 'version="3"'))
        with pytest.raises(BadRequest, match="share: got"):
            deploy_file(config, path, as_="canary", share=2.0)
        assert (registry.views.all(), everything(registry)) == ([], before)
        registry.close()


# -- who is waited for


@contextmanager
def replica(registry: Registry, monkeypatch: pytest.MonkeyPatch, name: str = "one") -> Iterator[ModelHost]:
    """A replica's host that follows the registry, in a thread with an event loop of its own."""
    monkeypatch.setattr(host_module, "POLL_S", 0.005)
    loop = asyncio.new_event_loop()
    host = ModelHost(Registry(registry._folder), make_world().client, name)
    started = threading.Event()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(host.start())
        started.set()
        task = loop.create_task(host.follow())
        loop.run_forever()
        task.cancel()

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(20)
    try:
        yield host
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_deploy_waits_until_every_replica_has_it(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with replica(registry, monkeypatch) as one, replica(registry, monkeypatch, "two") as two:
        made = definition("churn", "1")
        versions = checked(made)
        assert wait_until_live(registry, publish(registry, made, versions), versions) == 2
        assert [set(host.served) for host in (one, two)] == [{"churn"}] * 2
        # One that has died is not waited for.
        registry.report("dead", {**registry.reports()["one"], "generation": 0, "started_ticks": 1})
        assert wait_until_live(registry, registry.generation()) == 2
        # One that lives and does not follow is.
        registry.report("stuck", {**registry.reports()["one"], "generation": 0})
        monkeypatch.setattr(deploy_module, "_LIVE_S_MAX", 0.1)
        with pytest.raises(Unavailable) as late:
            wait_until_live(registry, registry.generation())
        assert (
            late.value.message == "generation 1 of the registry is not live after 0.1 s: replicas ['stuck'] are behind"
        )


def test_a_version_that_no_replica_can_load_is_rolled_back(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with replica(registry, monkeypatch) as host:
        one = definition("churn", "1")
        wait_until_live(registry, publish(registry, one, checked(one)))
        before = registry.rollouts()
        broken = definition("churn", "2", load="raise OSError('of this machine only')")
        version = version_in(registry, broken)
        with pytest.raises(Unavailable) as failed:
            wait_until_live(registry, publish(registry, broken, [version]), [version])
        assert failed.value.message == "model `churn` version `2` does not load: OSError('of this machine only')"
        after = registry.rollouts()
        # What somebody else has made of it meanwhile is not undone.
        registry.deploy([version_in(registry, definition("churn", "3"))])
        others = registry.rollouts()
        assert roll_back(registry, before, after, [version]) == (
            "changed by somebody else since, and so left as they are: churn"
        )
        assert registry.rollouts() == others
        registry.rollback("churn")
        assert roll_back(registry, before, after, [version]) == "rolled back"
        assert registry.rollouts() == before
        # What was live already is not undone by the deploy of it again.
        assert roll_back(registry, before, before, [version]) == "nothing was changed: it was live already"
        assert registry.rollouts() == before
        # Of a new model there is nothing to go back to.
        fresh = version_in(registry, definition("fresh", "1"))
        registry.deploy([fresh])
        assert roll_back(registry, before, registry.rollouts(), [fresh]) == (
            "nothing to roll back to, and so still broken: fresh; deploy what loads, or retire it"
        )
        assert wait_until_live(registry, registry.generation(), [fresh]) == 1
        assert set(host.served) == {"churn", "fresh"}


def test_a_report_from_before_does_not_say_that_a_version_fails(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replica(registry, monkeypatch):
        one = version_in(registry, definition("churn", "1"))
        wait_until_live(registry, registry.deploy([one]))
        told: list[Any] = []
        reports = registry.reports

        def stale() -> Any:
            """As they were before the replica had looked."""
            got = reports()
            if not told:
                told.append(1)
                return {
                    name: {**r, "generation": 0, "failed": {"churn@1": "could not be read"}} for name, r in got.items()
                }
            return got

        monkeypatch.setattr(registry, "reports", stale)
        assert wait_until_live(registry, registry.generation(), [one]) == 1


def test_a_version_may_load_nowhere_but_in_its_pool(registry: Registry) -> None:
    version = version_in(registry, definition("churn", "1", pool="Pool()"))
    generation = registry.deploy([version])
    pid = os.getpid()
    alive = {"pid": pid, "started_ticks": started_ticks(pid), "generation": generation, "loading": [], "failed": {}}
    failed = {"churn@1": "no module named lightgbm"}
    registry.report("one", {**alive, "pool": None, "failed": failed})
    registry.report("churn-one", {**alive, "pool": "churn"})
    assert wait_until_live(registry, generation, [version]) == 2
    registry.report("churn-one", {**alive, "pool": "churn", "failed": failed})
    with pytest.raises(Unavailable, match="no module named lightgbm"):
        wait_until_live(registry, generation, [version])


# -- the commands


def test_shares_and_ids_as_they_are_written() -> None:
    assert [share_of(text) for text in ("5%", "0.05", "12.5%")] == [0.05, 0.05, 0.125]
    with pytest.raises(BadRequest, match=r"^share: got 'half'; expected such as `5%` or `0.05`$"):
        share_of("half")
    assert ids_of(['{"user_id": 42}']) == [{"user_id": 42}]
    for wrong in ("42", "user_id=42", "[1]"):
        with pytest.raises(BadRequest, match=r"^--try: got "):
            ids_of([wrong])


def test_models_adds_up_what_the_replicas_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(name="told", data_dir=str(tmp_path))
    with pytest.raises(Unavailable, match="no cluster `told` has models"):
        describe_models(config)
    registry = Registry(config.directory / "registry")
    one, two = (version_in(registry, definition("churn", v), memory_bytes=1_000) for v in "12")
    registry.deploy([one])
    registry.deploy([two], "shadow")
    version_in(registry, definition("churn", "3"))
    with replica(registry, monkeypatch, "one"), replica(registry, monkeypatch, "two"):
        asyncio.run(until(lambda: len(registry.reports()) == 2, "the reports"))
        true = registry.reports()
    for name, differences in (("one", [1.0, 5.0, 2.0]), ("two", [9.0, *[0.5] * 9])):
        counts = dict.fromkeys(("requests", "ids", "calls"), 3) | dict.fromkeys(("failed", "timeouts", "refused"), 1)
        lane = {**counts, "call_us": 7.0, "in_threads": name == "two"}
        examples = [{"id": {"user_id": i}, "champion": 0.0, "shadow": d} for i, d in enumerate(differences)]
        seen = {
            "champion": "1", "shadow": "2", "compared": 20, "different": len(differences), "missed": 1, "failed": 2,
            "numbers": 20, "abs_sum": sum(differences), "abs_max": max(differences), "examples": examples,
        }  # fmt: skip
        registry.report(
            name, {**true[name], "versions": {"churn@1": lane, "churn@2": lane}, "shadows": {"churn": seen}}
        )
    champion, shadow, added = describe_models(config)
    assert [(d["version"], d["state"], d["replicas"]) for d in (champion, shadow, added)] == [
        ("1", "champion", 2), ("2", "shadow", 2), ("3", "registered", 0),
    ]  # fmt: skip
    assert [champion[c] for c in ("requests", "failed", "timeouts", "refused", "call_us", "in_threads")] == [
        6,
        2,
        2,
        2,
        7.0,
        True,
    ]
    assert champion["disagreement"] is None
    told = shadow["disagreement"]
    assert (told["compared"], told["different"], told["missed"], told["failed"]) == (40, 13, 2, 4)
    assert (told["abs_mean"], told["abs_max"]) == (21.5 / 40, 9.0)
    assert [e["shadow"] for e in told["examples"]] == [9.0, 5.0, 2.0, 1.0, *[0.5] * 6]
    with pytest.raises(NotFound, match="no model `chum`"):
        describe_models(config, "chum")
    registry.close()
