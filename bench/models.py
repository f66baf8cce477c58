"""`millpond bench models`: whether a score costs more among 500 models than among 2, and how models go live.

1. Start a cluster of its own with 20 views and no model; load five events of each user and source.
2. Deploy 2 models, measure, and take the memory of the score replica; deploy the others, ask each of them, and take it
   again. Every model has a definition file of its own, weights beside it, 5 to 20 features of up to 4 of the views.
3. Rounds, in which the numbers of models take turns: scores at 32 connections, ids drawn uniformly, models drawn
   uniformly of the first 2, 60 or 500. (How fast 2 were before the others came stands beside.)
4. Deploy new versions of a model one after another by the `millpond deploy` command, from a process of its own, while
   scores of all models go on in an open loop.
5. Check: no answer was wrong, of another model, or failed; scores of a sample of models are what their features give;
   the last version that was deployed answers.

Memory is the anonymous memory (PSS) of the replica: what it maps of the shards' memory is not the models'.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from millpond.bench import twenty_views
from millpond.bench.load import Load, Outcome
from millpond.bench.many_models import ModelFile, draw_models, mean_shape, write_model
from millpond.bench.mixed import event_table
from millpond.bench.options import Options
from millpond.bench.processes import memory_mb
from millpond.bench.recompute import recomputed_scores
from millpond.bench.store import turned
from millpond.bench.testbed import SETTING_MEANINGS, Testbed, id_bodies, latency_figures
from millpond.bench.workload import Evidence, Steps, median_of, ratio
from millpond.cluster.cluster import running
from millpond.cluster.config import Config
from millpond.cluster.demo.session import Session
from millpond.cluster.deploy import Running, check_models, publish, wait_until_live
from millpond.cluster.model_commands import open_registry
from millpond.feature_actors.errors import Unavailable
from millpond.models.definition import Definition

__all__ = ["ModelsWorkload", "make"]

#: Numbers of models by the names that figures bear.
_SIZES = {"2": 2, "60": 60, "500": 500}
_QUICK = {"2": 2, "60": 4, "500": 8}
_REPLICA = ("ray::ServeReplica:bench-score:",)
_EVENTS_EACH, _ROWS = 5, 20_000
_BODIES = 50_000
_SAMPLE_MODELS, _SAMPLE_USERS = 20, 5
_RATE, _DEPLOYS = 200.0, 5
_DEPLOY_S_MAX, _LIVE_S_MAX = 120.0, 30.0
_POLL_S = 0.005
#: A process gives memory back late, if ever: the least of some samples.
_MEMORY_SAMPLES = 5

MEANINGS = {
    **{f"models_{size}_requests_per_s": f"scores of {size} models, 32 connections" for size in _SIZES},
    "models_500_vs_2_ratio": "requests/s, of 500 models / of 2, in turns",
    "models_60_vs_2_ratio": "",
    "models_2_alone_requests_per_s": "before the others were deployed",
    **{f"models_{size}_{q}_ms": "" for size in _SIZES for q in ("p50", "p99")},
    "bytes_per_model": "anonymous memory (PSS) of the score replica with all models - with 2, for each model more",
    "replica_mb": "memory (PSS) of the score replica with all models",
    "deploy_to_live_s": "from the start of `millpond deploy` until its version answers, median",
    "deploy_to_live_max_s": "the longest",
    "deploy_published_to_live_s": "of that, from the registry's change until every replica had reported it",
    "deploys": "new versions, one after another, under load",
    "failed_during_deploys": "scores of all models meanwhile that were not answered well",
    "scores_during_deploys": "",
    "deploys_p99_ms": "of these scores, since they were due",
    "deploy_all_s": "deploying all models but 2 one after the other, in one process",
    "models": "by the name of the size",
    "features_of_2": "that a model reads, the mean",
    "features_of_500": "",
    "views_of_2": "",
    "views_of_500": "",
    "users": "",
    "answers_checked": "status, model and unknown views of each",
    "scores_recomputed": "from /v1/features",
    **SETTING_MEANINGS,
}


class ModelsWorkload:
    """Scores of 2, 60 and 500 models on one endpoint, and deploys under load."""

    name = "models"
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, options: Options) -> None:
        self._options, self.seed = options, options.seed or 0
        self._sizes = _QUICK if options.quick else _SIZES
        self._users = 200 if options.quick else 20_000
        self._bed = Testbed(config, [Path(twenty_views.__file__)])
        self._draws = itertools.count(self.seed * 1_000_003)
        self._models = draw_models(max(self._sizes.values()), self.seed)
        self._folder = self._bed.folder / "models"
        self._folder.mkdir()
        self._live: dict[str, Path] = {}
        self._to_live_s: list[float] = []
        self._published_to_live_s: list[float] = []
        self._figures: dict[str, Any] = {
            "models": dict(self._sizes),
            "users": self._users,
            "measured_seconds": options.measured_seconds,
            "rounds": options.measured_rounds,
            "ids": str(options.ids),
        }
        for size in ("2", "500"):
            features, views = mean_shape(self._models[: self._sizes[size]])
            self._figures |= {f"features_of_{size}": features, f"views_of_{size}": views}

    # -- setup

    def setup(self, steps: Steps) -> None:
        self._bed.start(steps)
        for source in twenty_views.sources:
            self._bed.post_tables(
                steps, f"load {source.name}", source.name, self._tables(source.name), self._users * _EVENTS_EACH
            )

    def _tables(self, source: str) -> Iterator[pa.Table]:
        """Yield events of one user after the other, within the shortest of the views' longest windows: every view knows
        every user."""
        draw, n = np.random.default_rng(self.seed), self._users * _EVENTS_EACH
        times_ms = np.sort(int(time.time() * 1000) - draw.integers(1_000, 20 * 3_600_000, n))
        for at in range(0, n, _ROWS):
            part = times_ms[at : at + _ROWS]
            ids = [f"{source}-{at + i}" for i in range(len(part))]
            table = event_table(draw, ids, self._users, 100, part)
            yield table.set_column(1, "user_id", pa.array(np.arange(at, at + len(part)) % self._users))

    # -- start

    def start(self, steps: Steps) -> None:
        options = self._options
        seconds, sizes = options.measured_seconds, self._sizes
        with steps.step("deploy 2 models"):
            self._deploy(self._models[:2])
        self._run("2", min(1.0, seconds))
        with steps.step("measure 2 alone", options.measured_rounds) as advance:
            for _ in range(options.measured_rounds):
                self._bed.say(steps, "2 models alone", self._run("2", seconds, "models_2_alone"))
                advance(1, "")
        before = self._memory()
        with steps.step(f"deploy {len(self._models) - 2} models more"):
            begun = time.perf_counter()
            self._deploy(self._models[2:])
            self._figures["deploy_all_s"] = round(time.perf_counter() - begun, 2)
        with steps.step("ask each of them", len(self._models)) as advance:
            self._ask_each(advance)
        for size in sizes:
            self._run(size, min(1.0, seconds))
        after = self._memory()
        more = len(self._models) - 2
        self._figures["bytes_per_model"] = round((after["Pss_Anon"] - before["Pss_Anon"]) * 1e6 / more)
        self._figures["replica_mb"] = round(after["Pss"], 1)
        with steps.step("measure", options.measured_rounds * len(sizes)) as advance:
            for r in range(options.measured_rounds):
                for size in turned(list(sizes), r):
                    outcome = self._run(size, seconds, f"models_{size}")
                    advance(1, f"{size} models")
                    self._bed.say(steps, f"{size} models", outcome)
        self._deploy_under_load(steps)

    def _deploy(self, models: Sequence[ModelFile]) -> None:
        """Deploy models one after the other as the command does, but for waiting: that is for the last of them."""
        config = self._bed.config
        state = running(config.directory)
        assert state is not None
        cluster = Running.of(state, config.directory / "registry")
        gc.freeze()  # each check collects garbage: what is here already need not be looked through 500 times
        try:
            with open_registry(config) as registry:
                for model in models:
                    path = self._live[model.name] = write_model(self._folder, model, "1")
                    definition = Definition.read(path)
                    versions = check_models(definition, cluster.layout, cluster.client)
                    generation = publish(registry, definition, versions)
                wait_until_live(registry, generation, versions)
        finally:
            gc.unfreeze()

    def _memory(self) -> dict[str, float]:
        samples = []
        for _ in range(_MEMORY_SAMPLES):
            samples.append({kind: sum(memory_mb(_REPLICA, kind).values()) for kind in ("Pss", "Pss_Anon")})
            time.sleep(0.2)
        return min(samples, key=lambda sample: sample["Pss_Anon"])

    def _load(self, models: Sequence[ModelFile], **settings: Any) -> Load:
        bodies = id_bodies(self._options.ids.draw(next(self._draws), self._users, _BODIES))
        drawn = np.random.default_rng(next(self._draws)).integers(0, len(models), len(bodies)).tolist()
        return self._bed.load(
            "/v1/score/", bodies, connections=32,
            paths=[f"/v1/score/{models[m].name}" for m in drawn],
            own_texts=[b'"model":"%s"' % models[m].name.encode() for m in drawn],
            texts=[(b'"unknown":[]', 1)], **settings,
        )  # fmt: skip

    def _run(self, size: str, seconds: float, name: str | None = None) -> Outcome:
        return self._bed.run(self._load(self._models[: self._sizes[size]], seconds=seconds), name)

    def _ask_each(self, advance: Any) -> None:
        """Score each model once: it is loaded then."""
        session = Session(self._bed.url)
        for model in self._models:
            if session.post(f"/v1/score/{model.name}", b'{"user_id":0}') is None:
                raise Unavailable(f"`{model.name}` does not answer: {session.first_failure}")
            advance(1, "")
        session.close()

    # -- deploys under load

    def _deploy_under_load(self, steps: Steps) -> None:
        deploys = 2 if self._options.quick else _DEPLOYS
        load = self._load(
            self._models, seconds=deploys * _DEPLOY_S_MAX, rate=self._options.rate or _RATE,
            arrivals=self._options.arrivals, seed=next(self._draws),
        )  # fmt: skip
        with steps.step("deploy under load", deploys) as advance, self._bed.running(load, "deploys") as outcomes:
            for number in range(deploys):
                model = self._models[number % 2]
                self._deploy_one(model, str(2 + number))
                advance(1, f"{model.name} live after {self._to_live_s[-1]:.2f} s")
        (outcome,) = outcomes
        self._bed.say(steps, "scores during deploys", outcome)
        self._figures |= {
            "deploys": deploys,
            "failed_during_deploys": outcome.failed,
            "scores_during_deploys": outcome.checked,
            "deploys_p99_ms": round(outcome.latency_ms(0.99), 3),
        }

    def _deploy_one(self, model: ModelFile, version: str) -> None:
        """Deploy a version by the command, and ask the model until that version answers."""
        config = self._bed.config
        path = write_model(self._folder, model, version)
        begun = time.perf_counter()
        command = subprocess.Popen(
            [sys.executable, "-m", "millpond.cluster.cli", "deploy", str(path), "--json", "--name", config.name,
             "--data-dir", str(config.data_dir)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        session, live_s = Session(self._bed.url), 0.0
        try:
            while not live_s:
                answer = session.post(f"/v1/score/{model.name}", b'{"user_id":0}')
                if answer is None:
                    raise Unavailable(f"`{model.name}` does not answer during a deploy: {session.first_failure}")
                if answer["version"] == version:
                    live_s = time.perf_counter() - begun
                elif command.poll() not in (None, 0) or time.perf_counter() - begun > _LIVE_S_MAX:
                    raise Unavailable(f"version {version} of `{model.name}` is not live: {self._end(command)[1]}")
                else:
                    time.sleep(_POLL_S)
        finally:
            session.close()
            if not live_s and command.poll() is None:
                command.kill()
        out, said = self._end(command)
        if command.returncode != 0:
            raise Unavailable(f"`millpond deploy` of `{model.name}` ended with {command.returncode}: {said}")
        self._to_live_s.append(live_s)
        self._published_to_live_s.append(msgspec.json.decode(out.splitlines()[-1])["live_s"])
        self._live[model.name] = path

    def _end(self, command: subprocess.Popen[bytes]) -> tuple[bytes, str]:
        try:
            out, said = command.communicate(timeout=_DEPLOY_S_MAX)
        except subprocess.TimeoutExpired:
            command.kill()
            out, said = command.communicate()
        return out, said.decode(errors="replace").strip()[-500:]

    # -- check

    def check(self, steps: Steps) -> list[str]:
        wrong = list(self._bed.wrong)
        draw = np.random.default_rng(next(self._draws))
        count = min(_SAMPLE_MODELS, len(self._models))
        sample = [self._models[0], *(self._models[m] for m in draw.choice(len(self._models), count - 1, replace=False))]
        with steps.step("check", count * _SAMPLE_USERS) as advance:
            session = Session(self._bed.url)
            for model in sample:
                path = self._live[model.name]
                (declared,) = Definition.read(path).declared().models
                predictor = declared.predictor(str(path.with_suffix(".npz")))
                keys = [{"user_id": u} for u in draw.integers(0, self._users, _SAMPLE_USERS).tolist()]
                wrong += recomputed_scores(self._bed.url, declared, predictor, keys, lambda n: advance(n, ""))
                answer = session.post(f"/v1/score/{model.name}", b'{"user_id":0}') or {}
                if answer.get("version") != declared.version:
                    wrong.append(f"the last version of `{model.name}` answers, {declared.version}: got {answer}")
            session.close()
        self._figures["scores_recomputed"] = count * _SAMPLE_USERS
        return wrong

    # -- metrics and end

    def metrics(self) -> dict[str, Any]:
        outcomes = self._bed.outcomes
        figures = {**self._figures, **self._bed.settings, "answers_checked": self._bed.checked}
        for name in ("models_2_alone", *(f"models_{size}" for size in self._sizes)):
            figures[f"{name}_requests_per_s"] = median_of([o.requests_per_s for o in outcomes[name]], 1)
            figures |= latency_figures(name, outcomes[name])
        for size in ("60", "500"):
            figures[f"models_{size}_vs_2_ratio"] = ratio(
                figures, f"models_{size}_requests_per_s", "models_2_requests_per_s"
            )
        figures["deploy_to_live_s"] = round(statistics.median(self._to_live_s), 3)
        figures["deploy_to_live_max_s"] = round(max(self._to_live_s), 3)
        figures["deploy_published_to_live_s"] = round(statistics.median(self._published_to_live_s), 3)
        return {name: figures[name] for name in MEANINGS if name in figures}

    @property
    def evidence(self) -> Evidence:
        sizes = [f"models_{size}" for size in self._sizes]
        return self._bed.evidence(
            {"by number of models": ["models_2_alone", *sizes], "during deploys, since due": ["deploys"]}
        )

    def close(self) -> None:
        self._bed.close()


def make(config: Config, options: Options) -> ModelsWorkload:
    return ModelsWorkload(config, options)
