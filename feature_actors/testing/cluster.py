"""A cluster in the process of a test, for teams that test their features and models.

    with TestCluster([user_spend], [churn], artifacts="models") as c:
        c.send(purchases, [{"order_id": "a1", "user_id": 42, "price": 12.5, "paid_at": "2024-01-01T09:00:00Z"}])
        c.at("2024-01-01T12:00Z")
        assert c.features(user_spend, user_id=42).features["orders_30d"] == 1
        assert 0 < c.score("churn", user_id=42).result < 1

What it promises: it is the code of a cluster, with its checks and its errors, from the body of a request to the answer;
only processes, network and disk are left out. Nothing waits, and time is what the test says. After the first test of a
process, which loads the kernels, one takes some milliseconds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, overload

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.deployments.client_answers import Ack, Score, ViewFeatures
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.decode import TIME_MAX_MS, TIME_MIN_MS, BodyLimits, Decoder
from millpond.feature_actors.errors import BadRequest, DeclarationError, NotFound, did_you_mean
from millpond.feature_actors.layout import compile_layout, same_view
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.ports import LocalIngest, LocalRead, complete
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import FeatureView
from millpond.models.definition import Definition, load_model
from millpond.models.model import LoadedModel, Model, PredictionFailed
from millpond.models.version import version_of

__all__ = ["Ack", "Event", "Events", "Score", "TestCluster", "Time", "ViewFeatures", "several", "time_ms"]

T = TypeVar("T")
Ints = npt.NDArray[np.int64]
Time = datetime | int | str
Event = Mapping[str, Any]
Events: TypeAlias = Event | Iterable[Event] | pa.Table | pa.RecordBatch
Id = Mapping[str, Any]
Arrival = Literal["now", "event"]

_JSON, _ARROW = "application/json", "application/vnd.apache.arrow.stream"
#: What a test sends may be as large as it likes; its strings and keys may not.
_ANY_SIZE = BodyLimits(1 << 62, 1 << 62, arrow_bytes_max=1 << 62, batches_max=1 << 62)
_EPOCH = datetime.fromtimestamp(0, UTC)


class TestCluster:
    """A cluster of plain shards in this process; a context manager.

    views: feature views, and sources that no view is of. models: their views need not be named. Each may be one or
    several. artifacts: the folder of the models' artifacts. A model is loaded when it is asked for first, so features
    can be tested before there are any weights. shards: answers do not depend on it.

    Time stands at the newest event sent, and events arrive when they happen, until `at` sets it: then it stands there,
    and events arrive at that time. It never runs back.
    """

    __test__ = False  # pytest takes what is called `Test...` for tests

    def __init__(
        self,
        views: FeatureView | Source | Iterable[FeatureView | Source] = (),
        models: Model | Iterable[Model] = (),
        *,
        artifacts: str | PathLike[str] | None = None,
        shards: int = 1,
    ) -> None:
        declared, all_models = several(views, (FeatureView, Source)), several(models, (Model,))
        features = [f for model in all_models for f in (*model.features, *model.reads)]
        self._layout = compile_layout(
            [one for one in declared if isinstance(one, Source)],
            [*(one for one in declared if isinstance(one, FeatureView)), *(f.view for f in features)],
        )
        self._models: dict[str, Model] = {}
        for model in all_models:
            if self._models.setdefault(model.name, model) is not model:
                raise DeclarationError(f"two models are named `{model.name}`")
        self._artifacts = None if artifacts is None else Path(artifacts)
        self._definitions: dict[str, Definition] = {}
        self._loaded: dict[str, LoadedModel] = {}
        shard_map = ShardMap.even(max(16, shards), shards)
        self._shards = [Shard(self._layout, shard_map, number) for number in range(shards)]
        self._clock = _TestClock()
        ports = LocalIngest(self._shards), LocalRead(self._shards)
        self._client = FeatureClient(self._layout, shard_map, *ports, self._clock)
        self._decoders: dict[str, Decoder] = {}
        self._plans: dict[str, ReadPlan] = {}
        self._answers = 0

    @classmethod
    def of_file(
        cls, *files: str | PathLike[str], artifacts: str | PathLike[str] | None = None, shards: int = 1
    ) -> TestCluster:
        """Return a cluster of what definition files declare, as `millpond up` takes them.

        artifacts: where those of the models lie, if not beside their file. Raises `DeclarationError`.
        """
        folder = None if artifacts is None else Path(artifacts)
        definitions = [Definition.read(Path(file), folder) for file in files]
        declared = [definition.declared() for definition in definitions]
        views: list[FeatureView | Source] = []
        for one in declared:
            views += [*one.sources, *one.views]
        cluster = cls(views, [model for one in declared for model in one.models], shards=shards)
        cluster._definitions = {m.name: d for d, one in zip(definitions, declared, strict=True) for m in one.models}
        return cluster

    # -- time

    def at(self, time: Time) -> TestCluster:
        """Set the time: ISO 8601 with a zone, a `datetime` with one, or milliseconds. Return the cluster."""
        ms, now_ms = time_ms(time, "clock"), self._clock.ms
        if now_ms is not None and ms < now_ms:
            raise BadRequest(
                f"clock: got {_moment(ms).isoformat()}, but it is {_moment(now_ms).isoformat()} already; time does not "
                "run back: take a new cluster, or send later events after it"
            )
        self._clock.ms, self._clock.is_set = ms, True
        return self

    @property
    def now(self) -> datetime | None:
        """What time it is; None before the first event."""
        return None if self._clock.ms is None else _moment(self._clock.ms)

    # -- events

    def send(self, source: Source | str, events: Events, *, arrival: Arrival = "now") -> Ack:
        """Send events, all or none of them, as one request: a mapping, any number of them, or an Arrow table.

        A time is ISO 8601 with a zone, a `datetime` with one, or milliseconds. arrival: "event" for a bulk load, in
        which an event arrives when it happens. Raises `BadRequest` as the cluster does, with the path of what is wrong.
        """
        batch = self._decoded(source, events)
        if arrival not in ("now", "event"):
            raise BadRequest(f"send: `arrival` is now or event, got {arrival!r}")
        return self._ingest(batch, self._source(source), bulk=arrival == "event" or not self._clock.is_set)

    def _decoded(self, source: Source | str, events: Events) -> pa.RecordBatch:
        """Return events as the events app decodes the body that an application sends."""
        source = self._source(source)
        if source.name not in self._decoders:
            keys = {name for table in self._layout.tables_of(source.name) for name in table.key}
            self._decoders[source.name] = Decoder(source, _ANY_SIZE, keys, refuse_seconds=True)
        if isinstance(events, pa.Table | pa.RecordBatch):
            return self._decoders[source.name].decode(_stream(events), _ARROW)
        rows = [events] if isinstance(events, Mapping) else list(events)
        return self._decoders[source.name].decode(_encode(rows, f"events of `{source.name}`"), _JSON)

    def _ingest(
        self, batch: pa.RecordBatch, source: Source, *, bulk: bool = False, arrivals: Ints | None = None
    ) -> Ack:
        before = self._clock.ms
        if batch.num_rows and not self._clock.is_set:
            self._clock.ms = max(before or 0, int((source.times_ms(batch) if arrivals is None else arrivals).max()))
        try:
            ack = complete(self._client.ingest(source.name, batch, arrival_is_event_time=bulk, arrivals=arrivals))
        except BaseException:
            self._clock.ms = before
            raise
        return Ack(**vars(ack))

    def _source(self, source: Source | str) -> Source:
        name = source.name if isinstance(source, Source) else source
        found = self._layout.source(name)
        if isinstance(source, Source) and source != found:
            raise DeclarationError(f"source `{name}`: this is not the one that the views of the cluster are of")
        return found

    # -- answers

    def features(self, view: FeatureView | str, /, *, as_of: Time | None = None, **key: Any) -> ViewFeatures:
        """Return the features of a view for one entity, whose key is given by the names of its fields.

        as_of: see `score`. Raises `NotFound`, `BadRequest`.
        """
        found = self._view(view)
        plan = self._plan(found)
        keys = plan.key_columns([_plain_id(key)], batch=False)
        rows = self._read(plan, keys, 1, as_of)
        (values,) = plan.named_values(rows)
        return ViewFeatures(
            found.name,
            {name: column[0] for name, column in keys.items()},
            _as_answered({f.name: values[f.full_name] for f in found}),
            _answered_time(rows, 0),
            bool(rows.unknown[0]),
        )

    @overload
    def score(
        self, model: Model | str, ids: Id | None = None, /, *, features: bool = False, as_of: Time | None = None,
        **key: Any,
    ) -> Score: ...  # fmt: skip
    @overload
    def score(
        self, model: Model | str, ids: Sequence[Id], /, *, features: bool = False, as_of: Time | None = None
    ) -> list[Score | PredictionFailed]: ...
    def score(
        self,
        model: Model | str,
        ids: Id | Sequence[Id] | None = None,
        /,
        *,
        features: bool = False,
        as_of: Time | None = None,
        **key: Any,
    ) -> Score | list[Score | PredictionFailed]:
        """Return a model's answer for an id, `score("churn", user_id=42)`, or for each of a list of ids.

        features: with those that were read, by full name. as_of: neither before `now` nor before the newest event of
        the entity, unless all features are exact. Raises what the cluster answers: `NotFound`, `BadRequest`,
        `AsOfInPast`, `PredictionFailed` (whose cause is what `predict` raised), `DeclarationError` if it does not load.
        An id of a list whose result JSON has no word for has its `PredictionFailed` there instead of a `Score`.
        """
        loaded = self._model(model)
        plan, several = loaded.plan, ids is not None and not isinstance(ids, Mapping)
        if ids is not None and key:
            raise BadRequest(f"{plan.subject}: an id comes as a mapping or as its fields, not as both")
        asked = [_plain_id(one) for one in (ids if several else [key if ids is None else ids])]  # type: ignore[union-attr]
        keys = plan.key_columns(asked, batch=several)
        rows = self._read(plan, keys, len(asked), as_of)
        # A predictor may write into its matrix: the answer has what was read.
        values = plan.named_values(rows) if features else None
        as_of_ms = None if as_of is None else time_ms(as_of, "as_of")
        results = loaded.predict_each(rows, keys, self._read_ms, as_of_ms)[0] if asked else []
        scores = [
            PredictionFailed(result.message, path=f"$[{row}]")
            if isinstance(result, PredictionFailed)
            else Score(
                self._next_id(),
                loaded.model.name,
                loaded.model.version,
                _as_answered(result),
                _answered_time(rows, row),
                list(rows.unknown[row]),
                None if values is None else _as_answered(values[row]),
            )
            for row, result in enumerate(results)
        ]
        if several:
            return scores
        (score,) = scores
        if isinstance(score, PredictionFailed):
            raise PredictionFailed(score.message)
        return score

    def _next_id(self) -> str:
        self._answers += 1
        return f"test-{self._answers}"

    def _view(self, view: FeatureView | str) -> FeatureView:
        found = self._layout.view(view.name if isinstance(view, FeatureView) else view)
        if isinstance(view, FeatureView) and not same_view(view, found):
            raise DeclarationError(
                f"view `{view.name}`: this is not the one of the cluster, which is declared otherwise"
            )
        return found

    def _plan(self, view: FeatureView) -> ReadPlan:
        if view.name not in self._plans:
            self._plans[view.name] = ReadPlan(self._layout, list(view), f"view `{view.name}`")
        return self._plans[view.name]

    def _model(self, model: Model | str) -> LoadedModel:
        name = model.name if isinstance(model, Model) else model
        if name not in self._models:
            raise NotFound(f"no model `{name[:80]}`" + did_you_mean(name[:80], self._models))
        if isinstance(model, Model) and _content(model) != _content(self._models[name]):
            raise DeclarationError(f"model `{name}`: this is not the one of the cluster, which is declared otherwise")
        if name not in self._loaded:
            self._loaded[name] = self._load(self._models[name])
        return self._loaded[name]

    def _load(self, model: Model) -> LoadedModel:
        definition = self._definitions.get(model.name)
        if definition is not None:
            plan = ReadPlan(self._layout, model.features, model.subject)
            model = replace(model, version=version_of(definition, model, plan.key_fields).version)
            return load_model(model, self._layout, definition.artifacts, f"`{definition.file_name}`")
        if self._artifacts is None and model.artifacts:
            raise DeclarationError(f"{model.subject}: has artifacts; say where: `TestCluster(..., artifacts=FOLDER)`")
        files = [] if self._artifacts is None else [self._artifacts / file for file in model.artifacts.values()]
        contents = {path.name: path.read_bytes() for path in files if path.is_file()}
        return load_model(model, self._layout, contents, f"each other in `{self._artifacts}`")

    def _read(self, plan: ReadPlan, keys: Mapping[str, Sequence[Any]], n: int, as_of: Time | None) -> FeatureRows:
        return self._read_ms(plan, keys, n, None if as_of is None else time_ms(as_of, "as_of"))

    def _read_ms(self, plan: ReadPlan, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None) -> FeatureRows:
        return complete(self._client.read(plan, keys, n, as_of_ms))

    # -- its end

    def check(self) -> None:
        """Assert that the shards keep their invariants: what fails here is a bug of Millpond."""
        problems = [problem for shard in self._shards for problem in shard.check()]
        assert not problems, "\n".join(problems)

    def close(self) -> None:
        """Let go of its memory."""
        self._shards.clear()
        self._loaded.clear()

    def __enter__(self) -> TestCluster:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.check()
        self.close()


class _TestClock:
    """What time it is, None before the first event; whether a test has set it."""

    ms: int | None = None
    is_set = False

    def now_ms(self) -> int | None:
        return self.ms


# -- times, ids, bodies and answers


def time_ms(time: Time, subject: str) -> int:
    """Return a time in milliseconds since the epoch: ISO 8601 with a zone, a `datetime` with one, or milliseconds."""
    moment = time
    if isinstance(time, str):
        with contextlib.suppress(ValueError):
            moment = datetime.fromisoformat(time)
    if isinstance(moment, datetime) and moment.tzinfo is not None:
        moment = (moment - _EPOCH) // timedelta(milliseconds=1)
    if type(moment) is not int or not TIME_MIN_MS <= moment <= TIME_MAX_MS:
        raise BadRequest(
            f"{subject}: a time of 1970 to 2200 is ISO 8601 with a zone, a `datetime` with one, or milliseconds since "
            f"the epoch, got {time!r:.80}"
        )
    return moment


def _moment(ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=ms)


def several(given: T | Iterable[T], kinds: tuple[type[T], ...]) -> list[T]:
    """Return what was given as one, or as any number of them."""
    each = [given] if isinstance(given, kinds) else list(given)  # type: ignore[arg-type]
    for one in each:
        if not isinstance(one, kinds):
            allowed = " or ".join(f"`{kind.__name__}`" for kind in kinds)
            raise DeclarationError(f"test cluster: expected {allowed}, got {one!r:.80}")
    return each


def _encode(rows: Sequence[Any], subject: str) -> bytes:
    """Return rows as a client writes them in JSON; numbers that are not finite are for the cluster to refuse."""
    try:
        return json.dumps(rows, default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"{subject}: cannot be written as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a value of type `{type(value).__name__}`")


def _content(model: Model) -> list[Any]:
    return [model.version, *([feature.wire_name for feature in of] for of in (model.features, model.reads))]


def _plain_id(one: Any) -> dict[str, Any]:
    if not isinstance(one, Mapping):
        raise BadRequest(f"an id is a mapping of key fields, got {one!r:.80}", code="bad_id")
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in one.items()}


def _stream(rows: pa.Table | pa.RecordBatch) -> bytes:
    table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _as_answered(value: Any) -> Any:
    """Return a value as whoever asked over HTTP has it: NaN is None."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _answered_time(rows: FeatureRows, row: int) -> datetime | None:
    ms = int(rows.as_of[row])
    return None if ms < 0 else _moment(ms)
