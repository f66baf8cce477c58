"""Models on a running cluster: deployed, rolled out and back, moved to a pool, killed and started anew, while a client
asks for scores all the time.

The tests stand in the order of the story; each goes on with what the one before has left.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from apps import DEFINITION, purchase
from processes import processes_of, shelter_of
from served_contract import START, Served
from terminal import Up, run, until

from millpond.cluster import deploy as deploy_module
from millpond.cluster.config import Config
from millpond.cluster.model_commands import change_model, deploy_file, describe_models
from millpond.feature_actors.errors import BadRequest, DeclarationError, MillpondError, Unavailable
from millpond.models import Pool
from millpond.models.registry import Registry, VersionExists
from millpond.models.rollout import RolloutRefused

HEAD = DEFINITION.partition("class Total")[0]
USERS = range(1, 31)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "apps.py").write_text(DEFINITION)
    # With the default `draining_period_s`: a pool that ended at once would break off requests on their way to it.
    (folder / "millpond.toml").write_text('name = "told"\nport = 0\nshards = 1\nclock = "event"\n')
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return Config(name="told", data_dir=str(folder / ".millpond"))


@pytest.fixture(scope="module")
def up(folder: Path) -> Iterator[Up]:
    up = Up(folder, "apps.py")
    yield up
    up.end()


@pytest.fixture(scope="module")
def served(up: Up, config: Config) -> Served:
    served = Served(up.url, config.directory)
    served.post_events([purchase(f"{u}-{k}", u, 1.0, START, book_id="b") for u in USERS for k in range(u)])
    return served


def write(folder: Path, model: str, version: str, result: str, *, head: str = "", load: str = "pass") -> Path:
    """Write a definition of a model; result: what each row gets, `n` being the orders of its user."""
    path = folder / f"{model}_{version}.py"
    path.write_text(
        f"{HEAD}\nimport sys\n{head}\n"
        f"class P:\n    def __init__(self): {load}\n"
        f"    def predict(self, features): return [{result} for (n,) in features.matrix.tolist()]\n"
        f'm = Model({model!r}, version={version!r}, owner="ml", features=[user_spend["orders_30d"]], predictor=P)\n'
    )
    return path


class Asking:
    """A client that asks for scores of some models all the time, on a connection that it keeps."""

    def __init__(self, url: str, *models: str) -> None:
        self.url, self.models = url, list(models)
        self.failures: list[Any] = []
        #: How often each version of each model has answered.
        self.answers: Counter[tuple[str, str]] = Counter()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        rng = random.Random(1)
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        while not self._ends.is_set():
            model, user = rng.choice(self.models), rng.choice(USERS)
            try:
                body = json.dumps({"user_id": user}).encode()
                connection.request("POST", f"/v1/score/{model}", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                got = json.loads(answer.read())
                if answer.status != 200:
                    self.failures.append((model, answer.status, got))
                else:
                    self.answers[model, got["version"]] += 1
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.failures.append((model, repr(error)))
                connection.close()
        connection.close()

    def answered(self, model: str) -> int:
        return sum(n for (name, _), n in list(self.answers.items()) if name == model)

    def end(self) -> None:
        self._ends.set()
        self._thread.join()


@contextmanager
def asking(served: Served, *models: str) -> Iterator[Asking]:
    """Ask all the while; no request may fail."""
    client = Asking(served.url, *models)
    try:
        yield client
    finally:
        client.end()
    assert client.failures == []


def versions_of(served: Served, model: str, n: int = 1) -> dict[str, set[Any]]:
    """What answers n times for every user: version to results."""
    seen: dict[str, set[Any]] = {}
    for _ in range(n):
        for answer in served.score(model, [{"user_id": u} for u in USERS], ""):
            seen.setdefault(answer["version"], set()).add(answer["result"])
    return seen


def replicas(served: Served, app: str) -> list[int]:
    """The processes of the replicas of an app, or of those whose names begin so."""
    lines = processes_of(shelter_of(served.directory)).items()
    return [pid for pid, line in lines if line.startswith(f"ray::ServeReplica:{app}")]


def everything(config: Config) -> Any:
    registry = Registry(config.directory / "registry")
    try:
        return registry.generation(), registry.rollouts(), [registry.versions(m) for m in registry.models()]
    finally:
        registry.close()


def test_models_and_versions_go_live_and_no_request_fails(folder: Path, config: Config, served: Served) -> None:
    with asking(served, "churn") as client:
        for version in ("1", "2", "3"):
            deployed = deploy_file(config, write(folder, "fresh", version, f"{version} * n"))
            assert versions_of(served, "fresh", 3) == {version: {float(version) * u for u in USERS}}  # at once
            client.models.append("fresh")
            (one,) = deployed["models"]
            assert (one["model"], one["version"], one["as"], deployed["replicas"]) == ("fresh", version, "champion", 1)
            assert one["url"] == f"{served.url}/v1/score/fresh"
            until(lambda v=version: client.answers["fresh", v] > 20, "answers of the new version")
    assert {v for model, v in client.answers if model == "fresh"} == {"1", "2", "3"}
    assert served.call("GET", "/readyz")[2]["models"] == ["churn", "fresh", "offer"]
    assert "/v1/score/fresh" in served.call("GET", "/openapi.json")[2]["paths"]


def test_a_canary_a_shadow_and_back(folder: Path, config: Config, served: Served) -> None:
    with asking(served, "churn", "fresh"):
        done = run(folder, "deploy", str(write(folder, "fresh", "4", "-n")), "--as", "canary", "--share", "50%")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(
            f"fresh version 4 is live as canary on 1 replica(s): {served.url}/v1/score/fresh\n"
        )
        seen = versions_of(served, "fresh", 2)
        assert seen.keys() == {"3", "4"}
        assert len(seen["3"]) + len(seen["4"]) == len(USERS)  # each user has one of them, always the same
        assert change_model(config, "rollback", "fresh") == "fresh: champion 3"
        assert versions_of(served, "fresh").keys() == {"3"}

        deploy_file(config, write(folder, "fresh", "5", "3 * n + (n > 29)"), as_="shadow")
        (before,) = (m for m in describe_models(config, "fresh") if m["state"] == "shadow")
        assert versions_of(served, "fresh").keys() == {"3"}

        def seen_all() -> Any:
            (shadow,) = (m for m in describe_models(config, "fresh") if m["state"] == "shadow")
            return shadow["disagreement"]["compared"] >= before["disagreement"]["compared"] + len(USERS) and shadow

        told = until(seen_all, "the comparison to be reported")["disagreement"]
        assert (told["champion"], told["abs_max"], told["missed"], told["failed"]) == ("3", 1.0, 0, 0)
        assert 0 < told["different"] < told["compared"]
        assert all(e == {"id": {"user_id": 30}, "champion": 90.0, "shadow": 91.0} for e in told["examples"])
        done = run(folder, "models", "fresh")
        assert done.returncode == 0, done.stderr
        assert "shadow of 3: " in done.stdout
        assert '    {"user_id": 30}: 90.0 -> 91.0\n' in done.stdout

        assert change_model(config, "promote", "fresh") == "fresh: champion 5"
        assert versions_of(served, "fresh") == {"5": {3.0 * u + (u > 29) for u in USERS}}
        assert change_model(config, "rollback", "fresh") == "fresh: champion 3, shadow 5"
        assert versions_of(served, "fresh").keys() == {"3"}
        assert change_model(config, "retire", "fresh", "5") == "fresh: champion 3"
        with pytest.raises(RolloutRefused, match="it is the champion"):
            change_model(config, "retire", "fresh", "3")


def test_a_model_that_is_retired_is_gone(folder: Path, config: Config, served: Served) -> None:
    deploy_file(config, write(folder, "brief", "1", "n"))
    assert versions_of(served, "brief").keys() == {"1"}
    assert change_model(config, "retire", "brief") == "brief: nothing is live"
    assert served.call("POST", "/v1/score/brief", {"user_id": 1})[0] == 404


def test_what_a_model_prints_and_why_it_fails_is_in_the_logs(folder: Path, config: Config, served: Served) -> None:
    """At once, not when a buffer is full: the answer tells the class of the error only."""
    deploy_file(config, write(folder, "loud", "1", '(print("seven events", n), {7.0: 0}.get(n) or 1 / (n != 7))[1]'))
    status, _, answer = served.call("POST", "/v1/score/loud", {"user_id": 7})
    assert (status, answer["error"]["code"]) == (500, "prediction_failed"), answer
    logs = shelter_of(served.directory) / "r" / "session_latest" / "logs"
    for ending, text in (("out", "seven events 7.0"), ("err", "ZeroDivisionError: division by zero")):
        assert any(text in log.read_text() for log in logs.glob(f"worker-*.{ending}")), text
    change_model(config, "retire", "loud", None)


def test_a_broken_deploy_changes_nothing(folder: Path, config: Config, served: Served) -> None:
    with asking(served, "churn", "fresh"):
        before = everything(config)
        with pytest.raises(DeclarationError, match=r"^model `fresh`: predict fails on {'user_id': 0}: ZeroDiv"):
            deploy_file(config, write(folder, "fresh", "6", "1 / n"))
        with pytest.raises(MillpondError, match=r"^model `fresh`: predict returned the number nan, which JSON cannot"):
            deploy_file(config, write(folder, "fresh", "7", "float('nan')"))
        with pytest.raises(RolloutRefused):
            deploy_file(config, write(folder, "new", "1", "n"), as_="shadow")
        assert everything(config) == before
        # One that the replicas cannot load, although it could be loaded here.
        here = "b'ray::' not in open('/proc/self/cmdline', 'rb').read() or print(1 / 0)"
        with pytest.raises(Unavailable) as failed:
            deploy_file(config, write(folder, "fresh", "8", "n", load=here))
        assert (
            failed.value.message
            == "model `fresh` version `8` does not load: ZeroDivisionError('division by zero'); rolled back"
        )
        assert everything(config)[1] == before[1]
        assert versions_of(served, "fresh").keys() == {"3"}


def hosts(config: Config, model: str) -> dict[str | None, int]:
    """How many requests for a model the replicas of each pool (None: of all models) have had that report now."""
    registry = Registry(config.directory / "registry")
    try:
        had: Counter[str | None] = Counter()
        for report in registry.reports().values():
            for name, counts in report["versions"].items():
                if name.startswith(f"{model}@") and Path(f"/proc/{report['pid']}").exists():
                    had[report["pool"]] += counts["requests"]
        return had
    finally:
        registry.close()


def with_view(folder: Path, view: str, version: str, features: str) -> Path:
    """Write a definition of a view of users and a model that returns all its features."""
    path = folder / f"{view}.py"
    path.write_text(
        f"{HEAD}\nimport numpy as np\nfrom millpond.feature_actors import Mean\n"
        f'v = FeatureView({view!r}, owner="ml", source=purchases, key=["user_id"], features={{{features}}})\n'
        "class P:\n    def predict(self, features): return np.nan_to_num(features.matrix).tolist()\n"
        f'm = Model("of_{view}", version={version!r}, owner="ml", features=[*v], predictor=P)\n'
    )
    return path


def test_a_new_view_is_computed_from_what_was_before_while_events_and_scores_go_on(
    folder: Path, config: Config, served: Served
) -> None:
    def send(name: str, user: int) -> None:
        served.post_events([purchase(f"{name}-{user}-{k}", user, 2.0, START, book_id="b") for k in range(3)])

    users = range(101, 131)  # of this test alone
    served.post_events([purchase(f"{u}-{k}", u, 1.0, START, book_id="b") for u in users for k in range(u - 100)])
    with asking(served, "churn", "fresh") as client, ThreadPoolExecutor(1) as aside:
        sending = aside.submit(lambda: [send("beside", u) for u in users])
        done = run(folder, "deploy", str(with_view(folder, "later", "1", '"n": Count(), "mean": Mean("price")')))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("view later is live with all events; backfilled in ")
        assert f"of_later version 1 is live as champion on 1 replica(s): {served.url}/v1/score/of_later" in done.stdout
        sending.result()
        expected = {u: [u - 97.0, (u - 94.0) / (u - 97)] for u in users}
        answers = served.score("of_later", [{"user_id": u} for u in users])
        assert {u: one["result"] for u, one in zip(users, answers, strict=True)} == expected
        status, _, features = served.call("GET", "/v1/features/later?user_id=107")
        assert (status, features["features"]) == (200, {"n": 10.0, "mean": 1.3})

        # It changes: a version beside, from now on what is asked for by its name; the shard is killed meanwhile.
        client.models.append("of_later")
        (shard,) = shards(served)
        path = with_view(folder, "later", "2", '"n": Count(), "spent": Sum("price"), "mean": Mean("price")')
        changing = aside.submit(run, folder, "deploy", str(path), "--json")
        until(lambda: len(views(config)) == 2, "the view to be added")
        os.kill(shard, signal.SIGKILL)
        assert changing.result().returncode == 0, changing.result().stderr
        (told,) = json.loads(changing.result().stdout)["views"]
        assert (told["view"], told["history_since_ms"]) == ("later", None)
        assert shards(served) != [shard]
        (one,) = served.score("of_later", [{"user_id": 107}])
        assert (one["version"], one["result"]) == ("2", [10, 13, 1.3])
        assert served.call("GET", "/v1/features/later?user_id=107")[2]["features"]["spent"] == 13
        older, newer = (one.version for one in views(config))
        again = run(folder, "deploy", str(with_view(folder, "later", "1", '"n": Count(), "mean": Mean("price")')))
        assert again.stdout.startswith(
            f"view later is kept as version {older} for models; `/v1/features/later` goes on answering with version "
            f"{newer}, which came later\nof_later version 1 is live as champion"
        ), again.stderr
        assert served.call("GET", "/v1/features/later?user_id=107")[2]["features"]["spent"] == 13
        told = json.loads(run(folder, "status", "--json").stdout)["views"]
        assert [(one["version"], one["state"], one["answers"]) for one in told] == [
            (older, "live", False), (newer, "live", True)
        ]  # fmt: skip
        send("after", 107)
        (one,) = served.score("of_later", [{"user_id": 107}])
        assert (one["version"], one["result"]) == ("1", [13, 19 / 13])
        # One with a key by which nothing has been kept: events were not even brought there.
        sending = aside.submit(lambda: [send("meanwhile", u) for u in users])
        path = folder / "reads.py"
        path.write_text(
            f'{HEAD}\nv = FeatureView("reads", owner="ml", source=purchases, key=["book_id", "user_id"], '
            'features={"n": Count()})\n'
        )
        done = run(folder, "deploy", str(path))
        assert done.stdout.startswith("view reads is live with all events; backfilled in "), done.stderr
        sending.result()
        for user in (101, 107, 130):
            found = served.call("GET", f"/v1/features/reads?user_id={user}&book_id=b")[2]["features"]
            assert found == {"n": user - 94.0 + 3 * (user == 107)}
    assert [one.state for one in views(config)] == ["live", "live", "live"]
    # Of both versions the table, and what is said of it; and the model.
    assert run(folder, "status").stdout.count("later") == 5
    # What cannot be added changes nothing.
    before = everything(config)
    refused = with_view(folder, "refused", "1", '"n": Count()')
    refused.write_text(refused.read_text().replace('key=["user_id"]', 'key=["gift_of"]').replace('"user_id": "int64"',
                       '"user_id": "int64", "gift_of": Field("int64", optional=True)'))  # fmt: skip
    with pytest.raises(DeclarationError, match="source `purchases` is declared otherwise than the cluster has it"):
        deploy_file(config, refused)
    taken = with_view(folder, "beside", "1", '"n": Count()')
    taken.write_text(taken.read_text().replace("of_beside", "of_later"))
    with pytest.raises(VersionExists):
        deploy_file(config, taken)
    assert everything(config) == before
    same = with_view(folder, "later", "1", '"n": Count(), "mean": Mean("price")')
    same.write_text(same.read_text().partition("class P")[0])
    done = run(folder, "deploy", str(same))
    assert done.stdout.startswith("view later is kept as version ")
    assert done.stdout.endswith("\nnothing to deploy: the cluster keeps these views already\n")


def shards(served: Served) -> list[int]:
    lines = processes_of(shelter_of(served.directory)).items()
    return [pid for pid, line in lines if line.startswith("ray::FeatureActor")]


def views(config: Config) -> Any:
    registry = Registry(config.directory / "registry")
    try:
        return registry.views.all()
    finally:
        registry.close()


def test_a_model_moves_into_a_pool_and_back_and_no_caller_notices(
    folder: Path, config: Config, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("heavy", "heavy2"):
        deploy_file(config, write(folder, model, "1", f"{len(model)} * n"))
    with asking(served, "churn", "heavy", "heavy2", "fresh") as client:
        # A pool that can never start is refused; one that cannot now is waited for by who has asked for it alone.
        with pytest.raises(BadRequest, match=r"1 replica\(s\) with 1000 CPU each; the cluster has \d+ in all"):
            change_model(config, "pool", "heavy2", pool=Pool(1, 1_000.0))
        cpus = max(4, os.cpu_count() or 1)
        with monkeypatch.context() as impatient:
            impatient.setattr(deploy_module, "_POOL_S_MAX", 1.0)
            with pytest.raises(Unavailable, match=r"the pools \['heavy2'\] have not started"):
                change_model(config, "pool", "heavy2", pool=Pool(1, float(cpus)))
        (heavy2,) = describe_models(config, "heavy2")
        assert (heavy2["pool"], heavy2["pool_running"]) == (None, 0)  # it has been taken back

        assert change_model(config, "pool", "heavy", pool=Pool(1, 0.1)) == "heavy: champion 1, in a pool of 1"
        until(lambda: hosts(config, "heavy")["heavy"] > 50, "the pool to answer")
        assert [(one["pool"], one["pool_running"]) for one in describe_models(config, "heavy")] == [(1, 1)]
        assert versions_of(served, "heavy") == {"1": {5.0 * u for u in USERS}}
        assert versions_of(served, "heavy2") == {"1": {6.0 * u for u in USERS}}
        # A new version goes live there, too.
        deploy_file(config, write(folder, "heavy", "2", "7 * n"))
        assert versions_of(served, "heavy") == {"2": {7.0 * u for u in USERS}}
        assert len(replicas(served, "told-pool-heavy:")) == 1
        for model in ("heavy", "heavy2"):
            assert change_model(config, "pool", model, pool=None).startswith(f"{model}: champion ")
        until(lambda: not replicas(served, "told-pool"), "the pools to end")
        for model in ("heavy", "heavy2"):
            seen = client.answered(model)
            until(lambda m=model, n=seen: client.answered(m) > n + 20, "more answers")
        assert versions_of(served, "heavy") == {"2": {7.0 * u for u in USERS}}


def test_after_a_replica_was_killed_all_is_live_again(folder: Path, config: Config, served: Served) -> None:
    deploy_file(config, write(folder, "fresh", "9", "9 * n"), as_="canary", share=0.5)
    before = {model: versions_of(served, model) for model in ("churn", "fresh", "heavy", "heavy2")}
    (pid,) = replicas(served, "told-score")
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the replica")

    def answers() -> bool:
        return all(served.call("POST", f"/v1/score/{m}", {"user_id": 1})[0] == 200 for m in before)

    until(answers, "the replica to be back")
    assert {model: versions_of(served, model) for model in before} == before
    deploy_file(config, write(folder, "fresh", "10", "10 * n"))
    assert versions_of(served, "fresh").keys() == {"9", "10"}


def test_what_was_deployed_is_live_after_a_restart(folder: Path, config: Config, served: Served, up: Up) -> None:
    models = ("churn", "fresh", "heavy", "heavy2")
    before = {model: versions_of(served, model) for model in models}
    of_view = served.score("of_later", [{"user_id": u} for u in range(101, 131)], "")
    up.process.terminate()
    assert up.wait() == 0
    with pytest.raises(MillpondError, match="no cluster `told` runs"):
        deploy_file(config, folder / "fresh_10.py")
    again = Up(folder, "apps.py")
    try:
        anew = Served(again.url, config.directory)
        assert {model: versions_of(anew, model) for model in models} == before
        again_of_view = anew.score("of_later", [{"user_id": u} for u in range(101, 131)], "")
        assert [one["result"] for one in again_of_view] == [one["result"] for one in of_view]
        assert anew.call("POST", "/v1/score/brief", {"user_id": 1})[0] == 404
        assert change_model(config, "promote", "fresh") == "fresh: champion 9"
        assert versions_of(anew, "fresh").keys() == {"9"}
    finally:
        again.end()
