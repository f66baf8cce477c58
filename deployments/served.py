"""How a replica answers a model: by its champion, for a share of the ids by a canary, with a shadow beside them.

Which ids are the canary's is a matter of the id and the model's name alone (the fixed hash of `keys`): the same on
every replica, for every request, and still the canary's when the share grows. The shadow is asked after the answer,
of the same rows as of the same time, and only compared.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.deployments.lane import Lane, ModelBusy, Scored
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.errors import MillpondError, NotFound, did_you_mean
from millpond.feature_actors.keys import hash_values
from millpond.feature_actors.plan import FeatureRows
from millpond.feature_actors.view import FeatureView
from millpond.models.model import PredictionFailed

__all__ = ["EXAMPLES_MAX", "Disagreement", "ModelEntry", "Models", "Served", "Shadow", "difference_of", "is_canary"]

EXAMPLES_MAX = 10
_LARGEST = sys.float_info.max
#: Before any time that rows can be as of.
_NEVER_MS = -(2**63) - 1


def is_canary(model: str, keys: Mapping[str, Sequence[Any]], n: int, share: float) -> npt.NDArray[np.bool_]:
    """Return which of n ids a canary answers, bool [n]: those whose hash lies in the first `share` of all hashes."""
    columns = [[model] * n, *(keys[name] for name in sorted(keys))]
    return hash_values(columns, n)[:, 0] < np.uint64(int(share * 2.0**64))


@dataclass
class Disagreement:
    """How a shadow's results differ from the champion's.

    compared: results; different: those not equal; missed: not computed, because the shadow was busy; failed: of the
    shadow alone. numbers: how many of the compared were both numbers, with the sum and the largest of the absolute
    differences. examples: of the largest differences, `{"id", "champion", "shadow"}`, read later than
    `examples_after_ms`.
    """

    compared: int = 0
    different: int = 0
    missed: int = 0
    failed: int = 0
    numbers: int = 0
    abs_sum: float = 0.0
    abs_max: float = 0.0
    examples_after_ms: int = _NEVER_MS
    _worst: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    _order: Any = field(default_factory=itertools.count)

    def add(self, key: Mapping[str, Any], champion: Any, shadow: Any, as_of_ms: int) -> None:
        self.compared += 1
        difference = difference_of(champion, shadow)
        if _is_number(champion) and _is_number(shadow):
            self.numbers += 1
            self.abs_sum = min(self.abs_sum + difference, _LARGEST)
            self.abs_max = max(self.abs_max, difference)
        if champion == shadow:
            return
        self.different += 1
        if as_of_ms <= self.examples_after_ms:
            return
        if len(self._worst) < EXAMPLES_MAX or difference > self._worst[0][0]:
            example = {"id": dict(key), "champion": champion, "shadow": shadow}
            heapq.heappush(self._worst, (difference, next(self._order), example))
            if len(self._worst) > EXAMPLES_MAX:
                heapq.heappop(self._worst)

    def forget_examples(self, as_of_ms: int) -> None:
        """Begin afresh with examples of what is read later: an entity is forgotten that may be in the others, as their
        id or in a result."""
        if as_of_ms > self.examples_after_ms:
            self.examples_after_ms = as_of_ms
            self._worst.clear()

    def as_json(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("compared", "different", "missed", "failed", "numbers")}
        return {
            **counts,
            "abs_sum": self.abs_sum,
            "abs_max": self.abs_max,
            "examples": [example for _, _, example in sorted(self._worst, key=lambda worst: worst[:2], reverse=True)],
        }


def difference_of(champion: Any, shadow: Any) -> float:
    """Return how far two results are apart, as far as a float can tell; infinity if they are not both numbers."""
    if not (_is_number(champion) and _is_number(shadow)):
        return 0.0 if champion == shadow else float("inf")
    try:
        return float(min(abs(champion - shadow), _LARGEST))
    except OverflowError:  # of an integer that is larger than any float
        return _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Shadow:
    """Ask a lane what another has answered, and compare. Hung on the champion's lane as its `compare`."""

    def __init__(self, champion: Lane, lane: Lane, client: FeatureClient) -> None:
        self.lane = lane
        self.disagreement = Disagreement()
        self._client = client
        # Of two definitions, the features are not the same objects.
        mine, theirs = ([f.wire_name for f in of.loaded.plan.features] for of in (lane, champion))
        self._same_features = mine == theirs

    def before(self, keys: Mapping[str, Sequence[Any]], rows: FeatureRows) -> FeatureRows | None:
        """Return rows of the shadow's features, as of the same moment as the champion's."""
        n = len(rows.matrix)
        if self._same_features:
            texts = {name: list(column) for name, column in rows.texts.items()}
            return FeatureRows(rows.matrix.copy(), rows.as_of, rows.unknown, texts, rows.trace)
        try:
            mine = self._client.read_now(self.lane.loaded.plan, keys, n)
        except MillpondError:
            mine = None
        if mine is None:
            self.disagreement.missed += n
        return mine

    def after(self, keys: Mapping[str, Sequence[Any]], rows: FeatureRows, results: list[Any]) -> None:
        """Ask the shadow, after the answers that are ready now have been sent."""
        asyncio.get_running_loop().call_soon(self._ask, keys, rows, results)

    def _ask(self, keys: Mapping[str, Sequence[Any]], rows: FeatureRows, results: list[Any]) -> None:
        try:
            answer = self.lane.ask(keys, len(results), rows=rows)
        except ModelBusy:
            self.disagreement.missed += len(results)
            return
        answer.add_done_callback(lambda done: self._compare(keys, results, done))

    def _compare(
        self, keys: Mapping[str, Sequence[Any]], results: list[Any], done: asyncio.Future[tuple[Scored, int]]
    ) -> None:
        if done.cancelled() or done.exception() is not None:
            self.disagreement.failed += len(results)
            return
        scored, _ = done.result()
        if scored.sampled is not None and self.lane.score_log is not None:
            for row in scored.sampled.places:
                self.lane.score_log.add(self.lane, scored, row, "")
        ids, as_of = zip(*keys.values(), strict=True), scored.rows.as_of.tolist()
        for one, champion, shadow, as_of_ms in zip(ids, results, scored.results, as_of, strict=True):
            if isinstance(champion, PredictionFailed):
                continue
            if isinstance(shadow, PredictionFailed):
                self.disagreement.failed += 1
            else:
                self.disagreement.add(dict(zip(keys, one, strict=True)), champion, shadow, as_of_ms)


@dataclass(frozen=True)
class Served:
    """A model as a replica answers it."""

    model: str
    champion: Lane
    canary: Lane | None = None
    share: float = 0.0
    shadow: Shadow | None = None

    @property
    def lanes(self) -> list[Lane]:
        of = (self.champion, self.canary, self.shadow.lane if self.shadow is not None else None)
        return [lane for lane in of if lane is not None]

    def lane_of(self, keys: Mapping[str, Sequence[Any]]) -> Lane:
        """Return the lane that answers one id."""
        canary = self.canary
        return canary if canary is not None and is_canary(self.model, keys, 1, self.share)[0] else self.champion

    async def ask(
        self, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None = None, values: bool = False
    ) -> list[tuple[Lane, Scored, int]]:
        """Return for each of n ids the lane that answers it, what it was scored with, and its row there."""
        if self.canary is None:
            scored, first = await self.champion.ask(keys, n, as_of_ms, values)
            return [(self.champion, scored, first + i) for i in range(n)]
        canary = is_canary(self.model, keys, n, self.share) if n else np.zeros(0, np.bool_)
        asked: list[tuple[Lane, list[int], asyncio.Future[tuple[Scored, int]]]] = []
        answers: list[Any] = [None] * n
        try:
            for lane, mine in ((self.champion, ~canary), (self.canary, canary)):
                if rows := np.flatnonzero(mine).tolist():
                    part = {name: [column[i] for i in rows] for name, column in keys.items()}
                    asked.append((lane, rows, lane.ask(part, len(rows), as_of_ms, values)))
            for lane, rows, answer in asked:
                scored, first = await answer
                for at, i in enumerate(rows):
                    answers[i] = (lane, scored, first + at)
        finally:
            for _, _, answer in asked:  # of one that failed nobody waits for the other
                answer.cancel()
        return answers


@dataclass(frozen=True)
class ModelEntry:
    """What is said of a model where the calls are listed, of its champion. key_fields: name to type."""

    model: str
    version: str
    owner: str
    about: str
    key_fields: Mapping[str, str]
    features: Sequence[str]


class Models:
    """The models that a replica answers, by name. `host.ModelHost` fills it from the registry."""

    def __init__(self, served: Mapping[str, Served] = {}) -> None:
        #: Those in memory. Replaced, never written to: who reads it sees one state.
        self.served: Mapping[str, Served] = dict(served)

    @property
    def names(self) -> Collection[str]:
        """Of every model that is answered, in memory or not."""
        return self.served.keys()

    def check(self, name: str) -> None:
        """Raises `NotFound` if no model of that name is answered."""
        if name not in self.names:
            raise NotFound(f"no model `{name[:80]}`" + did_you_mean(name[:80], self.names))

    async def find(self, name: str) -> Served:
        """Return a model, also if it is not among `served`. Raises `NotFound`."""
        self.check(name)
        return self.served[name]

    async def history_since(self, view: FeatureView) -> int | None:
        """Return since when a view has all events, in ms; None for ever. Raises `Unavailable` if it is not live yet."""
        return None

    def broken(self) -> dict[str, str]:
        """Return the models that are not answered, and why."""
        return {}

    def entries(self) -> list[ModelEntry]:
        """Return every model that is answered, in memory or not."""
        return [
            ModelEntry(m.name, m.version, m.owner, m.about, plan.key_fields, [f.full_name for f in m.features])
            for served in self.served.values()
            for m, plan in [(served.champion.loaded.model, served.champion.loaded.plan)]
        ]
