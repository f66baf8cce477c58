"""The models of a replica: as the registry has them, loaded off the event loop, within a budget of memory.

Promises:
- A change of the registry is live within `POLL_S` and the time of a load; until all of it is loaded, what was live
  answers. Requests see the rollout before or after a change, nothing between.
- A version that does not load leaves its model as it was, if that answered, and other models alone; the replica's
  report says why. So does a view that came and whose text does not run here: the others stay as they were.
- A version that has ended two processes that loaded it, one of them with nothing beside, is loaded no more, until it is
  deployed again; one that does not give the event loop back ends its process and is called in a thread by the next.
- Over the budget those asked longest ago leave the memory, when nothing of them is under way; they are loaded again
  when they are asked for. What is new is loaded once, whatever has to leave for it.
- The replica reports to the registry what it has, so that whoever deploys knows when every replica has it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from millpond.deployments.lane import Lane, LaneLimits, ModelBusy
from millpond.deployments.score_log import ScoreLog
from millpond.deployments.served import Disagreement, ModelEntry, Models, Served, Shadow
from millpond.deployments.turns import Turns
from millpond.deployments.watchdog import Watchdog
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.layout import Layout, identity_of
from millpond.feature_actors.tiles.memory import started_ticks
from millpond.feature_actors.view import FeatureView
from millpond.models.added_views import AddedViewRecord
from millpond.models.attempts import Attempt
from millpond.models.definition import forget_module, module_name_of
from millpond.models.erasures import ForgottenScores
from millpond.models.model import LoadedModel
from millpond.models.registry import Registry
from millpond.models.registry_views import declared_view, extended_layout
from millpond.models.rollout import Role, Rollout
from millpond.models.version import Version

__all__ = ["HostLimits", "ModelHost", "is_alive"]

logger = logging.getLogger("millpond.host")

#: How often the registry is asked whether something has changed.
POLL_S = 0.1
#: How often the replica says how its models do.
_REPORT_S = 1.0
#: How often a version is tried again that the registry could not give.
_AGAIN_S = 5.0
_LOADS_AT_ONCE = 8
#: A load that hangs keeps its thread; the others go on in further ones.
_LOAD_THREADS_MAX = 256
#: For so long a version that did not load is not tried again, however often it is asked for.
_BROKEN_S = 10.0
#: One process may die of chance, or of another version that it loads.
_DEATHS_MAX = 2
#: So many changes that came together are followed each by itself.
_TASKS_MAX = 32
#: What a model takes besides what was measured: a plan, a lane.
_MODEL_BYTES = 65_536

Id = tuple[str, str]


@dataclass(frozen=True)
class HostLimits:
    """memory_bytes_max: of all models of a replica together, as each was measured when it was deployed. threads: in
    which slow models are called. load_s: how long a version may take to load, once it has begun to."""

    memory_bytes_max: int = 4 << 30
    lanes: LaneLimits = field(default_factory=LaneLimits)
    threads: int = 64
    load_s: float = 60.0


@dataclass(frozen=True)
class _Loaded:
    version: Version
    lane: Lane
    #: Of the definition's code.
    module_name: str


@dataclass(frozen=True)
class _NotLoaded:
    """unread: the registry could not give it."""

    error: BaseException
    unread: bool


@dataclass(frozen=True)
class _Failure:
    """Why a version does not load, and when that was seen last."""

    why: str
    at_s: float


class ModelHost(Models):
    """Answer what is live in a registry.

    replica: its name in the reports. pool: the model that this replica is a pool for; None for those of no pool.
    The others of a pool are loaded when they are asked for nevertheless: a pool may be on its way.
    score_log: what takes a sample of the scores; None for none.
    """

    def __init__(
        self,
        registry: Registry,
        client: FeatureClient,
        replica: str,
        pool: str | None = None,
        limits: HostLimits = HostLimits(),
        score_log: ScoreLog | None = None,
    ) -> None:
        super().__init__()
        self._score_log = score_log
        self._registry = registry
        self._client = client
        self._layout_at_start = client.layout
        #: That came while the cluster runs; by identity.
        self._views: dict[str, AddedViewRecord] = {}
        #: What makes the layout with them; and why it does not, by definition.
        self._extending: asyncio.Future[Layout | dict[str, str]] | None = None
        self._failed_views: dict[str, str] = {}
        self._replica = replica
        self._pool = pool
        self._limits = limits
        self._loads = ThreadPoolExecutor(_LOAD_THREADS_MAX, "load")
        self._load_places = asyncio.Semaphore(_LOADS_AT_ONCE)
        self._predictions = ThreadPoolExecutor(limits.threads, "predict")
        # One thread asks the registry, which keeps a connection for each.
        self._asks = ThreadPoolExecutor(1, "registry")
        self._turns = Turns(client)
        #: Whether `_turns` knows the plans of all that is loaded.
        self._planned = True
        self._generation = -1
        self._rollouts: dict[str, Rollout] = {}
        self._loaded: dict[Id, _Loaded] = {}
        self._failed: dict[Id, _Failure] = {}
        #: How many loads are under way of each module; and the versions whose load has not returned in time.
        self._running: Counter[str] = Counter()
        self._hanging: set[Id] = set()
        #: Of those that failed, what the registry could not give; and when all was looked at last.
        self._unread: set[Id] = set()
        self._followed_s = 0.0
        #: Those that are not loaded because processes have died of it, and those that have held up a replica.
        self._barred: set[Id] = set()
        self._hung: set[Id] = set()
        #: Suspects are loaded one at a time, when the others answer.
        self._one_suspect = asyncio.Lock()
        self._answering = asyncio.Event()
        #: So is what does not fit.
        self._one_over = asyncio.Lock()
        self._finding: dict[str, asyncio.Task[None]] = {}
        #: How many requests wait for each model.
        self._waiting: Counter[str] = Counter()
        #: The changes that are under way, with the models that they are of.
        self._bringing: dict[asyncio.Task[None], list[str]] = {}
        self._reported_s = 0.0
        #: Scores as of then or before were of an entity, perhaps, that has been forgotten.
        self._forgotten_to_ms = Disagreement.examples_after_ms
        #: By which notices nothing is here any more, and how many logged scores it was; as it was reported.
        self._heeded: dict[str, int] = {}

    # -- what is asked

    @property
    def names(self) -> Collection[str]:
        return self._rollouts.keys()

    async def find(self, name: str) -> Served:
        """Load a model that is live and not in memory; wait as long as for a slow one, which the load may outlast.

        Raises `NotFound`; `Unavailable` if it does not load, or not in that time; `ModelBusy`.
        """
        limits = self._limits.lanes
        if self._waiting[name] >= limits.requests_max:
            raise ModelBusy(
                f"model `{name}`: {limits.requests_max} requests wait for it to be loaded; allowed are no more "
                "(setting `model_requests_max`); retry",
                retry_after_ms=1_000,
            )
        self._waiting[name] += 1
        try:
            async with asyncio.timeout(limits.predict_s):
                return await self._find(name)
        except TimeoutError:
            raise Unavailable(
                f"model `{name}`: it is being loaded still after {limits.predict_s:g} s (setting `predict_timeout_s`); "
                "retry",
                code="model_loading", retry_after_ms=1_000,
            ) from None  # fmt: skip
        finally:
            self._waiting[name] -= 1
            if self._waiting[name] == 0:
                del self._waiting[name]

    async def _find(self, name: str) -> Served:
        while (served := self.served.get(name)) is None:
            self.check(name)
            rollout = self._rollouts[name]
            assert rollout.champion is not None
            if (why := self._broken(rollout.champion)) is not None:
                raise Unavailable(f"{why}; deploy a version that does, or roll back", code="model_broken",
                                  retry_after_ms=10_000)  # fmt: skip
            if loading := [task for task, models in self._bringing.items() if name in models]:
                await asyncio.wait(loading)
                continue
            if name not in self._finding:
                self._finding[name] = asyncio.create_task(self._bring([rollout], asked=True))
                self._finding[name].add_done_callback(lambda _: self._finding.pop(name, None))
            await asyncio.shield(self._finding[name])
        return served

    async def history_since(self, view: FeatureView) -> int | None:
        one = self._views.get(identity_of(view)) if self._views else None
        if one is None:
            return None
        if one.state == "live":
            return one.history_since_ms
        progress = (await self._ask(self._registry.views.progress)).get(one.identity)
        raise Unavailable(
            f"view `{one.name}`: is being computed from what was before ({progress or 'about to begin'}); retry later",
            code="backfilling", retry_after_ms=1_000,
        )  # fmt: skip

    def broken(self) -> dict[str, str]:
        champions = {name: _id(r.champion) for name, r in self._rollouts.items() if r.champion is not None}
        return {n: self._failed[i].why for n, i in champions.items() if i in self._failed and n not in self.served}

    def _broken(self, version: Version) -> str | None:
        """Return why a version does not load; None if it does, for all that is known, or is to be tried again."""
        failure = self._failed.get(_id(version))
        if failure is None or (_id(version) not in self._barred and time.monotonic() - failure.at_s >= _BROKEN_S):
            return None
        return failure.why

    def entries(self) -> list[ModelEntry]:
        versions = [r.champion for r in self._rollouts.values() if r.champion is not None]
        return [ModelEntry(v.model, v.version, v.owner, v.about, v.key_fields, v.features) for v in versions]

    # -- following the registry

    async def start(self) -> None:
        """Load what is live, as far as it fits in memory."""
        await self._follow_change()
        await asyncio.gather(*self._bringing)
        await self._plan_together()
        try:
            await self._report()
        except MillpondError:  # as on a full disk, on which scores are answered all the same
            logger.exception("the registry takes no report")

    async def follow(self) -> None:
        """Follow the registry for ever."""
        while True:
            await asyncio.sleep(POLL_S)
            self._answering.set()
            try:
                generation, notices = await self._ask(self._news)
                again = (self._unread or self._failed_views) and time.monotonic() - self._followed_s >= _AGAIN_S
                if generation != self._generation or again:
                    await self._follow_change()
                    self._reported_s = 0.0
                if not self._planned:
                    await self._plan_together()
                if time.monotonic() - self._reported_s >= _REPORT_S or notices.keys() != self._heeded.keys():
                    await self._report(notices)
            except Exception:  # what is live goes on; the next turn tries again
                logger.exception("the registry cannot be followed")
                await asyncio.sleep(_REPORT_S)

    def _news(self) -> tuple[int, dict[str, ForgottenScores]]:
        return self._registry.generation(), self._registry.erasures.notices()

    async def _follow_change(self) -> None:
        generation = await self._ask(self._registry.generation)  # before the rollouts, which may be newer then
        rollouts = await self._ask(self._registry.rollouts)
        await self._follow_views()  # after the rollouts: a model is live later than the views that it reads
        before, self._rollouts = self._rollouts, rollouts
        again, self._unread = self._unread, set()
        changed = [
            r for name, r in rollouts.items() if before.get(name) != r or any(_id(v) in again for v in r.versions)
        ]
        live = {_id(version) for rollout in rollouts.values() for version in rollout.versions}
        self._failed = {i: failure for i, failure in self._failed.items() if i in live}
        again |= await self._given_another_chance()
        mine = [r for r in changed if r.model in self.served or self._is_mine(r)]
        mine.sort(key=lambda r: r.model not in self.served)
        at_once = [r for r in mine if all(_id(v) in self._loaded for v in r.versions)]
        await self._bring(at_once)
        self.served = {name: served for name, served in self.served.items() if name in rollouts}
        self._forget_unused()
        # What has to be loaded holds up nothing else: each model by itself, unless they are many.
        rest = [r for r in mine if r not in at_once]
        loads = self._fitting(rest)
        for group in [[r] for r in loads] if len(loads) <= _TASKS_MAX else [loads]:
            self._start(self._bring(group), [r.model for r in group])
        # What came while this replica runs is loaded once all the same: who deploys it hears whether that can be done.
        fitting = {r.model for r in loads}
        for rollout in rest if self._generation >= 0 else ():
            if rollout.model not in fitting and _brings_a_version(rollout, before.get(rollout.model)):
                self._start(self._bring_over(rollout), [rollout.model])
        self._generation, self._followed_s = generation, time.monotonic()

    async def _follow_views(self) -> None:
        """Have the layout by which plans are made from now on as it is with the views that came, if their texts run."""
        views = {one.identity: one for one in await self._ask(self._registry.views.all)}
        if views == self._views:
            self._failed_views = {}
        elif self._extending is None or self._extending.done():
            # A text that does not run here, or does not end, is no reason not to follow the rollouts.
            work = partial(_extended, self._layout_at_start, list(views.values()))
            self._extending = asyncio.get_running_loop().run_in_executor(self._loads, work)
            await asyncio.wait([self._extending], timeout=self._limits.load_s)
            if not self._extending.done():
                why = f"it takes longer than {self._limits.load_s:g} s (setting `load_timeout_s`)"
                self._failed_views = {_of_file(one): why for i, one in views.items() if i not in self._views}
            elif isinstance(layout := self._extending.result(), Layout):
                if self._failed_views:  # of which these may have read
                    self._unread |= set(self._failed)
                self._client.layout, self._views, self._failed_views = layout, views, {}
            else:
                self._failed_views = layout
            if self._failed_views:
                logger.warning("the views stay as they were: %s", self._failed_views)

    def _brought(self, task: asyncio.Task[None]) -> None:
        del self._bringing[task]
        self._reported_s = 0.0
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a change of the registry cannot be followed", exc_info=error)

    async def _given_another_chance(self) -> set[Id]:
        """Return which of those that were not loaded because processes had died of them may be loaded again."""
        attempts = (
            {(a.model, a.version) for a in await self._ask(self._registry.attempts.all)} if self._barred else set()
        )
        back = self._barred - attempts
        self._barred -= back
        for version in back:
            self._failed.pop(version, None)
        return back

    def _is_mine(self, rollout: Rollout) -> bool:
        return rollout.model == self._pool if self._pool is not None else rollout.pool is None

    def _fitting(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        """Return those that fit in memory besides what is there, or that answer already: then others go."""
        used, fitting = self.memory_bytes, []
        for rollout in rollouts:
            more = sum(_bytes(v) for v in rollout.versions if _id(v) not in self._loaded)
            if rollout.model in self.served or used + more <= self._limits.memory_bytes_max:
                used += more
                fitting.append(rollout)
        return fitting

    async def _bring(self, rollouts: Sequence[Rollout], *, asked: bool = False) -> None:
        """Load what rollouts need and have it answer from then on. asked: they have to fit, whatever else has to go."""
        missing = [v for rollout in rollouts for v in rollout.versions if _id(v) not in self._loaded]
        suspects = await self._suspects(missing)
        while missing := [v for v in missing if v not in suspects]:
            await self._load_all(missing)
            # What was there may have had to go meanwhile, for another model.
            wanted = [v for r in rollouts if self._rollouts.get(r.model) == r for v in r.versions]
            missing = [v for v in wanted if _id(v) not in self._loaded and _id(v) not in self._failed]
        if suspects:
            self._start(self._bring_suspects(rollouts, suspects), [v.model for v in suspects])
        self._answer_with(rollouts, asked=asked)

    async def _bring_over(self, rollout: Rollout) -> None:
        """Bring what does not fit besides what is in memory; one by one, so that it is no more than that too much."""
        async with self._one_over:
            await self._bring([rollout], asked=True)

    def _answer_with(self, rollouts: Sequence[Rollout], *, asked: bool = False) -> None:
        """Have rollouts answer from now on, as far as they are loaded."""
        served = dict(self.served)
        for rollout in rollouts:
            # If it has changed once more meanwhile, whoever saw that brings it.
            if self._rollouts.get(rollout.model) == rollout and (one := self._serve(rollout)) is not None:
                served[rollout.model] = one
        self.served = served
        self._evict({rollout.model for rollout in rollouts} if asked else set())
        self._planned = False

    async def _plan_together(self) -> None:
        """Have what is loaded read together; until then what is new is read by itself. Once for many changes: of 500
        models it takes 5 ms."""
        self._planned = True
        plans = [one.lane.loaded.plan for one in self._loaded.values()]
        self._turns.plans = await self._ask(lambda: self._client.plan_set(plans))

    async def _suspects(self, versions: Sequence[Version]) -> list[Version]:
        """Return which of some versions were being loaded when a process died; not to load those that did so twice."""
        if not versions:
            return []
        attempts = await self._ask(self._registry.attempts.all)
        deaths = [a for a in attempts if not a.hung and not is_alive(asdict(a))]
        died = Counter((a.model, a.version) for a in deaths)
        died_alone = {(a.model, a.version) for a in deaths if a.alone}
        self._hung = {(a.model, a.version) for a in attempts if a.hung}
        for version in versions:
            if died[_id(version)] >= _DEATHS_MAX and _id(version) in died_alone:
                self._barred.add(_id(version))
                why = f"{died[_id(version)]} processes have died as they loaded it"
                self._fail(version, f"{why}; deploy it again to have it tried again")
        return [version for version in versions if died[_id(version)]]

    async def _bring_suspects(self, rollouts: Sequence[Rollout], suspects: Sequence[Version]) -> None:
        """Load those one by one: if the process dies, it is known by which; the others answer meanwhile."""
        await self._answering.wait()
        for version in suspects:
            async with self._one_suspect:
                if _id(version) not in self._loaded and self._broken(version) is None:
                    await self._load_all([version])
                    self._answer_with([r for r in rollouts if r.model == version.model])
                    if _id(version) in self._loaded:
                        await self._clear(version)

    async def _clear(self, version: Version) -> None:
        """Take back the notes of processes that died as they loaded a version, which this one has survived."""
        attempts = self._registry.attempts
        try:
            of_version = [a for a in await self._ask(attempts.all) if (a.model, a.version) == _id(version)]
            deaths = [a for a in of_version if not a.hung and not is_alive(asdict(a))]
            await self._ask(lambda: attempts.take_back(deaths))
        except MillpondError:
            logger.exception("the registry takes no note of loads")

    def _start(self, bringing: Coroutine[Any, Any, None], models: list[str]) -> None:
        task = asyncio.create_task(bringing)
        self._bringing[task] = models
        task.add_done_callback(self._brought)

    def _serve(self, rollout: Rollout) -> Served | None:
        """Return a rollout as far as its versions are loaded; None if its champion is not."""
        assert rollout.champion is not None
        champion = self._loaded.get(_id(rollout.champion))
        if champion is None:
            return None
        canary = self._loaded.get(_id(rollout.canary)) if rollout.canary else None
        shadow = self._loaded.get(_id(rollout.shadow)) if rollout.shadow else None
        before = self.served.get(rollout.model)
        if before is not None:
            champion.lane.asked_s = max(champion.lane.asked_s, before.champion.asked_s)
        compare = None
        if shadow is not None:
            same = before is not None and before.shadow is not None
            if same and before.champion is champion.lane and before.shadow.lane is shadow.lane:  # type: ignore[union-attr]
                compare = before.shadow  # type: ignore[union-attr]
            else:
                compare = Shadow(champion.lane, shadow.lane, self._client)
                compare.disagreement.forget_examples(self._forgotten_to_ms)
        roles: tuple[tuple[Role, _Loaded | None], ...] = (
            ("champion", champion), ("canary", canary), ("shadow", shadow),
        )  # fmt: skip
        for role, one in roles:  # each may have been another before
            if one is not None:
                one.lane.role = role
                one.lane.compare = compare if one is champion else None
        if canary is None:
            return Served(rollout.model, champion.lane, shadow=compare)
        return Served(rollout.model, champion.lane, canary.lane, rollout.share, compare)

    # -- loading

    async def _load_all(self, versions: Sequence[Version]) -> None:
        """Load versions, several at once, with a note for those who come after this process if it dies of it."""
        if not versions:
            return
        pid, attempts = os.getpid(), self._registry.attempts
        begun = [Attempt(v.model, v.version, pid, started_ticks(pid)) for v in versions]
        try:
            await self._ask(lambda: attempts.begin(self._replica, begun))
        except MillpondError:  # as on a full disk, on which scores are answered all the same
            logger.exception("the registry takes no note of loads")
        await asyncio.gather(*map(self._load, versions))
        try:
            await self._ask(lambda: attempts.end(self._replica, begun))
        except MillpondError:
            logger.exception("the registry takes no note of loads")

    async def _load(self, version: Version) -> None:
        if _id(version) in self._hanging:
            why = "an earlier load of it took too long (setting `load_timeout_s`) and has not ended yet"
            return self._fail(version, why)
        name = module_name_of(version.files)
        self._running[name] += 1
        async with self._load_places:
            loading = asyncio.get_running_loop().run_in_executor(self._loads, self._load_now, version)
            await asyncio.wait([loading], timeout=self._limits.load_s)
        if not loading.done():  # its thread is lost if it hangs, but not who follows the registry
            self._hanging.add(_id(version))
            loading.add_done_callback(lambda _: self._returned(version))
            return self._fail(version, f"it takes longer than {self._limits.load_s:g} s (setting `load_timeout_s`)")
        self._running[name] -= 1
        loaded = loading.result()
        if isinstance(loaded, _NotLoaded):
            error = loaded.error
            self._fail(version, error if isinstance(error, MillpondError) else repr(error), error)
            if loaded.unread:
                self._unread.add(_id(version))
            self._forget_module(name)
            return None
        self._failed.pop(_id(version), None)
        if _id(version) not in self._loaded:
            predict_s = version.predict_us / 1e6
            lane = Lane(
                loaded, self._client, self._predictions, self._limits.lanes, predict_s, self._turns,
                in_threads=_id(version) in self._hung, digest=version.digest,
            )  # fmt: skip
            lane.score_log = self._score_log
            self._loaded[_id(version)] = _Loaded(version, lane, name)
        return None

    def _fail(self, version: Version, why: object, error: BaseException | None = None) -> None:
        failure = _Failure(f"{version.subject} does not load: {why}", time.monotonic())
        logger.warning("%s", failure.why, exc_info=None if isinstance(error, MillpondError) else error)
        self._failed[_id(version)] = failure

    def _returned(self, version: Version) -> None:
        """Have a version tried again whose load has come to an end after all."""
        self._hanging.discard(_id(version))
        name = module_name_of(version.files)
        self._running[name] -= 1
        self._forget_module(name)

    def _load_now(self, version: Version) -> LoadedModel | _NotLoaded:
        reading = True
        try:
            definition = self._registry.text(version)
            reading = False
            (model,) = (m for m in definition.declared().models if m.name == version.model)
            named = replace(model, version=version.version)
            reading = True
            with self._registry.artifacts(version, model.artifacts.values()) as folder:
                reading = False
                return LoadedModel(named, self._client.layout, folder)
        except BaseException as error:  # what is no `Exception` would end who follows the registry
            return _NotLoaded(error, unread=reading)

    @property
    def memory_bytes(self) -> int:
        """What the models in memory take, as each was measured."""
        return sum(_bytes(one.version) for one in self._loaded.values())

    def _evict(self, keep: set[str]) -> None:
        """Let those go that nothing answers with, then those that were asked longest ago, until the rest fits."""
        self._forget_unused()
        served = dict(self.served)
        for name in sorted(served, key=lambda name: served[name].champion.asked_s):
            if self.memory_bytes <= self._limits.memory_bytes_max:
                break
            of = [one for one in self._loaded.values() if one.version.model == name]
            rollout = self._rollouts.get(name)
            if rollout is not None and rollout.champion is not None and _id(rollout.champion) in self._failed:
                continue  # it answers with a former version, which could not be found again
            if name not in keep and all(one.lane.idle for one in of):
                del served[name]
                for one in of:
                    self._drop(one)
        self.served = served

    def _forget_unused(self) -> None:
        """Let go of the versions that nothing answers with; of each model one is kept, to roll back to at once."""
        answering = {id(lane) for served in self.served.values() for lane in served.lanes}
        # These may be about to answer: others of their rollout are still being loaded.
        live = {_id(version) for rollout in self._rollouts.values() for version in rollout.versions}
        spare: dict[str, _Loaded] = {}
        used = self.memory_bytes
        # Asked last; of those that were not, loaded last.
        loaded = [*self._loaded.values()][::-1]
        for one in sorted(loaded, key=lambda one: one.lane.asked_s, reverse=True):
            if id(one.lane) in answering or _id(one.version) in live:
                continue
            one.lane.compare = None  # which would keep a shadow that is gone in memory
            fits = used <= self._limits.memory_bytes_max and one.version.model in self.served
            if (spare.setdefault(one.version.model, one) is not one or not fits) and one.lane.idle:
                used -= _bytes(one.version)
                self._drop(one)

    def _drop(self, one: _Loaded) -> None:
        del self._loaded[_id(one.version)]
        self._forget_module(one.module_name)

    def _forget_module(self, name: str) -> None:
        """Let go of a module, unless a version in memory is of it, or it may be running."""
        if self._running[name] == 0 and all(one.module_name != name for one in self._loaded.values()):
            del self._running[name]
            forget_module(name)

    def watch(self, hang_s: float) -> None:
        """End this process if a prediction holds up its event loop for so long; the next calls it in a thread."""

        def note(model: str, version: str) -> None:
            pid = os.getpid()
            hung = Attempt(model, version, pid, started_ticks(pid), hung=True)
            self._registry.attempts.begin(self._replica, [hung])

        Watchdog(self._turns, hang_s, note).start()

    # -- reports

    async def _report(self, notices: Mapping[str, ForgottenScores] = {}) -> None:
        self._heeded = self._heed(notices)
        report = {**self.report(), "heeded": self._heeded}
        await self._ask(lambda: self._registry.report(self._replica, report))
        self._reported_s = time.monotonic()

    def _heed(self, notices: Mapping[str, ForgottenScores]) -> dict[str, int]:
        """Have nothing any more of entities that are to be forgotten, see `erased_scores`; return of which that is
        so."""
        if notices:
            self._forgotten_to_ms = max(self._forgotten_to_ms, *(one.as_of_ms for one in notices.values()))
            for served in self.served.values():
                if served.shadow is not None:
                    served.shadow.disagreement.forget_examples(self._forgotten_to_ms)
        return dict.fromkeys(notices, 0) if self._score_log is None else self._score_log.heed(notices)

    def report(self) -> dict[str, Any]:
        """Return how this replica's models do: what `millpond models` adds up over the replicas."""
        return {
            "pid": os.getpid(),
            "started_ticks": started_ticks(os.getpid()),
            "pool": self._pool,
            "generation": self._generation,
            "loading": sorted({model for models in self._bringing.values() for model in models}),
            "at_ms": time.time_ns() // 1_000_000,
            "memory_bytes": self.memory_bytes,
            "score_log": None if self._score_log is None else self._score_log.counts,
            "failed": {
                **{f"{model}@{version}": failure.why for (model, version), failure in self._failed.items()},
                **self._failed_views,
            },
            "versions": {
                f"{model}@{version}": {
                    **one.lane.counts.as_json(),
                    "call_us": round(one.lane.call_s * 1e6, 1),
                    "in_threads": one.lane.in_threads,
                }
                for (model, version), one in self._loaded.items()
            },
            "shadows": {
                name: {
                    "champion": served.champion.loaded.model.version,
                    "shadow": served.shadow.lane.loaded.model.version,
                    **served.shadow.disagreement.as_json(),
                }
                for name, served in self.served.items()
                if served.shadow is not None
            },
        }

    async def _ask(self, question: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._asks, question)


def _extended(layout: Layout, views: Sequence[AddedViewRecord]) -> Layout | dict[str, str]:
    """Return a layout with added views, or which of their definitions are the reason that there is none, and why."""
    failed: dict[str, str] = {}
    for one in views:
        try:
            declared_view(one)
        except BaseException as error:  # what is no `Exception` would end who follows the registry
            failed[_of_file(one)] = str(error) if isinstance(error, MillpondError) else repr(error)
    try:
        return failed or extended_layout(layout, views)
    except MillpondError as error:
        return {_of_file(views[-1]): str(error)}


def _of_file(view: AddedViewRecord) -> str:
    return f"definition `{view.file_name}`"


def is_alive(report: Mapping[str, Any]) -> bool:
    """Return whether the replica that reported still runs."""
    try:
        return bool(started_ticks(report["pid"]) == report["started_ticks"])
    except OSError:
        return False


def _id(version: Version) -> Id:
    return version.model, version.version


def _brings_a_version(rollout: Rollout, before: Rollout | None) -> bool:
    return before is None or any(version not in before.versions for version in rollout.versions)


def _bytes(version: Version) -> int:
    return version.memory_bytes + _MODEL_BYTES
