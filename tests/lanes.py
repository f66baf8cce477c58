"""Lanes over plain shards, predictors that a test holds up, and a read port whose answers have to be waited for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from apps import DEFINITION, LAYOUT, NOW, make_world, purchase, user_spend

from millpond.deployments.lane import Lane, LaneLimits, Scored
from millpond.deployments.turns import Turns
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.plan import Answer, Question
from millpond.feature_actors.ports import LocalIngest, LocalRead, ReadPort
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.models import Features, Model
from millpond.models.definition import Definition, forget_module
from millpond.models.model import LoadedModel
from millpond.models.registry import Registry
from millpond.models.version import Version, version_of

#: Nothing that a test waits for takes so long.
PATIENCE_S = 20.0
USERS = range(1, 41)
SPEND = [user_spend["orders_30d"], user_spend["spend_30d"], user_spend["recency_s"]]
#: Threads for predictions, of all tests.
THREADS = ThreadPoolExecutor(8, "tested")
LIMITS = LaneLimits()
#: For definitions, which are run in this process: what holds up the loading of a version, how often each was loaded.
HOLDS: dict[str, Held] = {}
LOADS: Counter[str] = Counter()


class WaitedRead:
    """A read port to shards whose answers come in a later turn of the event loop, when `gate` is open.

    failures: raised by the reads that come next, one each. now: whether there are answers at once after all.
    """

    def __init__(self, port: ReadPort) -> None:
        self.port = port
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: list[Exception] = []
        self.now = False
        #: The ids of each read that was waited for.
        self.reads: list[int] = []

    def read_now(self, question: Question) -> Answer | None:
        return self.port.read_now(question) if self.now else None

    async def read(self, question: Question) -> Answer:
        self.reads.append(question.n)
        failure = self.failures.pop(0) if self.failures else None
        await asyncio.sleep(0)
        await self.gate.wait()
        if failure is not None:
            raise failure
        return await self.port.read(question)


def shards_with_spend() -> tuple[ShardMap, list[Shard]]:
    """Two shards that know `USERS`: user i has i orders of price i, the last of them i seconds ago."""
    world = make_world()
    orders = [purchase(f"{u}-{k}", u, float(u), NOW - 1_000 * u, book_id="b") for u in USERS for k in range(u)]
    assert world.post_events("purchases", orders).json["accepted"] == len(orders)
    return world.shards[0].shard_map, world.shards


def client_over(shards: tuple[ShardMap, list[Shard]], waited: bool = False) -> tuple[FeatureClient, Any]:
    """A client of shards and its read port, which has to be waited for or not."""
    shard_map, of_map = shards
    port: Any = WaitedRead(LocalRead(of_map)) if waited else LocalRead(of_map)
    return FeatureClient(LAYOUT, shard_map, LocalIngest(of_map), port, ManualClock(NOW)), port


class Predicts:
    """A predictor that notes the ids of each call, is never called twice at once, and fails on ids that it is told.

    before: called in each prediction, with its ids.
    """

    def __init__(self, before: Callable[[list[Any]], Any] = lambda ids: None, bad: Sequence[Any] = ()) -> None:
        self.before = before
        self.bad = frozenset(bad)
        self.calls: list[list[Any]] = []
        self.threads: set[str] = set()
        self._alone = threading.Lock()

    def predict(self, features: Features) -> Any:
        assert self._alone.acquire(blocking=False), "predict is called twice at once"
        try:
            ids = list(features.keys["user_id"])
            self.calls.append(ids)
            self.threads.add(threading.current_thread().name.partition("_")[0])
            self.before(ids)
            if self.bad & set(ids):
                raise ValueError("a bad id")
            return [[*row, one] for row, one in zip(features.matrix.tolist(), ids, strict=True)]
        finally:
            self._alone.release()


def result_of(user: Any, ago_ms: int = 0) -> list[Any]:
    """What `Predicts` returns for a user of `shards_with_spend` as of `ago_ms` later than now."""
    if user in USERS:
        return [float(user), float(user * user), user + ago_ms / 1_000, user]
    raise AssertionError(user)


class Held:
    """Holds up whoever calls it until it is let go; tells when the first one has come."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, *_: Any) -> None:
        self.begun.set()
        assert self.go.wait(PATIENCE_S)

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, PATIENCE_S)


def busy(seconds: float) -> None:
    """Use a core for so long, however often others have it meanwhile."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def lane_of(
    predictor: Any,
    client: FeatureClient,
    *,
    limits: LaneLimits = LIMITS,
    predict_s: float = 0.0,
    features: Sequence[Any] = SPEND,
    reads: Sequence[Any] = (),
    name: str = "m",
    version: str = "1",
    threads: Executor = THREADS,
    turns: Turns | None = None,
) -> Lane:
    model = Model(
        name, version=version, owner="tests", features=features, predictor=lambda: predictor, reads=reads
    )  # fmt: skip
    return Lane(LoadedModel(model, client.layout, Path()), client, threads, limits, predict_s, turns)


def ask(lane: Lane, *users: Any, **options: Any) -> asyncio.Future[tuple[Scored, int]]:
    return lane.ask({"user_id": list(users)}, len(users), **options)


async def results(answer: asyncio.Future[tuple[Scored, int]], n: int = 1) -> list[Any]:
    """The results of a request of n ids."""
    scored, first = await asyncio.wait_for(answer, PATIENCE_S)
    return scored.results[first : first + n]


async def turn() -> None:
    """Let the event loop take one turn, and what that has brought."""
    await asyncio.sleep(0)


async def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        await asyncio.sleep(0.001)


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a story in an event loop; what goes wrong in a callback of it fails it."""
    wrong: list[Any] = []

    async def told() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        await asyncio.wait_for(story(), PATIENCE_S)
        await turn()

    asyncio.run(told())
    assert wrong == []


#: What `definition` puts in for the views of `apps.DEFINITION`, which a model reads.
_VIEWS = DEFINITION.partition("class Total")[0]


def definition(
    model: str, version: str, result: str | None = None, *, load: str = "", pool: str = "None", artifact: bytes = b""
) -> Definition:
    """A definition of one model of `user_id`.

    result: the text of what each row gets, its version if there is none. load: lines that are run when it is loaded.
    """
    label = f"{model}@{version}"
    text = f"""{_VIEWS}
from lanes import HOLDS, LOADS
from millpond.models import Pool

class Predictor:
    def __init__(self, weights=None):
        LOADS[{label!r}] += 1
        if {label!r} in HOLDS:
            HOLDS[{label!r}]()
        {load}
    def predict(self, features):
        return [{result or repr(version)} for row in features.matrix.tolist()]

{model} = Model({model!r}, version={version!r}, owner="tests", about="For tests.", predictor=Predictor, pool={pool},
                features=[user_spend["orders_30d"]], artifacts={{"weights": "weights.npy"}})
"""
    return Definition(f"{model}.py", text, {"weights.npy": artifact})


def version_in(registry: Registry, made: Definition, *, memory_bytes: int = 0, predict_us: float = 5.0) -> Version:
    """Add the one version of a definition to a registry."""
    (model,) = made.declared().models
    version = version_of(made, model, {"user_id": "int64"}, memory_bytes=memory_bytes, predict_us=predict_us)
    registry.add(made, [version])
    forget_module(made.module_name)  # who loads it is another process, which has not run it yet
    return version
