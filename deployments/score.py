"""The score app: scores and features by id, health, and the page that documents the calls."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import msgspec
import pyarrow as pa

from millpond.deployments.answers import Answers, iso, told
from millpond.deployments.arrow_scores import ARROW_TYPE, arrow_answer, keys_of, wants_arrow
from millpond.deployments.explainer import Explainer
from millpond.deployments.forgetter import Forgetter
from millpond.deployments.http import App, Request, Response, Route, decode_json, json_response
from millpond.deployments.lane import Lane
from millpond.deployments.openapi import docs_page, openapi_document
from millpond.deployments.score_log import ScoreLog
from millpond.deployments.served import Models, Served
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.errors import (
    BadRequest,
    MillpondError,
    TooLarge,
    TooMany,
    Unavailable,
    UnsupportedMediaType,
)
from millpond.feature_actors.layout import version_name
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.view import FeatureView
from millpond.models.model import PredictionFailed
from millpond.models.score_log import Scorer, scores_table

__all__ = ["ScoreApp", "ScoreLimits"]

_AS_OF_MAX_MS = 7_258_118_400_000  # 2200-01-01
#: A name, an IPv4 or an IPv6 address, with or without a port.
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")

#: Returns what every shard says of itself; raises `Unavailable` if one does not answer.
Status = Callable[[], Awaitable[list[dict[str, Any]]]]


@dataclass(frozen=True)
class ScoreLimits:
    body_bytes_max: int = 4 * 1024 * 1024
    ids_max: int = 10_000


class ScoreApp(App):
    """Answer scores. A request carries ids and nothing else; the features come from the shards."""

    def __init__(
        self,
        client: FeatureClient,
        models: Models,
        status: Status,
        limits: ScoreLimits,
        admin_token_sha256: str,
        cluster_name: str,
        score_log: ScoreLog | None = None,
        explainer: Explainer | None = None,
        forgetter: Forgetter | None = None,
    ) -> None:
        super().__init__(
            [
                Route("POST", "/v1/score/", self.post_score),
                Route("POST", "/v1/score", self.post_scores),
                Route("GET", "/v1/features/", self.get_features),
                Route("GET", "/healthz", self.get_healthz),
                Route("GET", "/readyz", self.get_readyz),
                Route("GET", "/v1/explain/", self.get_explain),
                Route("POST", "/v1/forget", self.post_forget),
                Route("GET", "/v1/forget", self.get_forget),
                Route("GET", "/v1/status", self.get_status),
                Route("GET", "/openapi.json", self.get_openapi),
                Route("GET", "/docs", self.get_docs),
            ]
        )
        self._client = client
        self._models = models
        self._status = status
        self._limits = limits
        self._admin_token_sha256 = admin_token_sha256
        self._view_plans: dict[FeatureView, ReadPlan] = {}
        for view in client.layout.views.values():
            self._view_plan(view)
        self._answers = Answers(score_log)
        self._explainer, self._forgetter = explainer, forgetter
        self._cluster_name = cluster_name

    # -- the score journey

    async def post_score(self, request: Request) -> Response:
        # 1. Decode the ids.
        served = self._models.served.get(request.name) or await self._models.find(request.name)
        plan = served.champion.loaded.plan
        as_of_ms, values = None, False
        if request.scope.get("query_string"):
            request.allow_query("as_of", "features")
            as_of_ms, values = _as_of(request), request.flag("features")
        if _is_arrow(request):
            return await self._score_arrow(request, served, as_of_ms, values)
        body = decode_json(await request.body(self._limits.body_bytes_max))
        batch, ids, keys = False, [body], plan.plain_key(body)
        if keys is None:
            batch = isinstance(body, list)
            ids = self._ids(body, plan, "$[%d]") if batch else [body]
            if not (batch or isinstance(body, dict)):
                self._ids(ids, plan, "$")
            keys = plan.key_columns(ids, batch=batch)
        # 2. Read the features, assemble a matrix, predict: together with the requests that wait with this one.
        if served.canary is None and not batch:
            lane = served.champion
            if as_of_ms is None and not values and (at_once := lane.score_at_once(keys)) is not None:
                then = partial(lane.answered, at_once)
                try:
                    return Response(200, self._answers.one(lane, at_once, 0), then=then)
                except BaseException:
                    then()
                    raise
            scored, row = await lane.ask(keys, 1, as_of_ms, values)
            return Response(200, self._answers.one(lane, scored, row))
        answered = await served.ask(keys, len(ids), as_of_ms, values)
        # 3. Answer, one per id.
        if batch and wants_arrow(None, request.header(b"accept")):
            return arrow_answer(served.model, answered, self._answers.ids(answered))
        return Response(200, self._answers.list(answered) if batch else self._answers.one(*answered[0]))

    async def _score_arrow(self, request: Request, served: Served, as_of_ms: int | None, values: bool) -> Response:
        """Answer ids that come as Arrow, in Arrow where JSON is not asked for."""
        body = await request.body(self._limits.body_bytes_max)
        keys, n = keys_of(served.champion.loaded.plan, body, self._limits.ids_max)
        answered = await served.ask(keys, n, as_of_ms, values)
        if wants_arrow(ARROW_TYPE, request.header(b"accept")):
            return arrow_answer(served.model, answered, self._answers.ids(answered))
        return Response(200, self._answers.list(answered))

    async def post_scores(self, request: Request) -> Response:
        """Score each of some ids with each of some models: a list of objects, model to answer."""
        request.allow_query("as_of")
        as_of_ms = _as_of(request)
        check_json(request)
        body = decode_json(await request.body(self._limits.body_bytes_max))
        names, ids = self._several(body)
        found: list[Served | MillpondError | None] = [self._models.served.get(name) for name in names]
        if None in found:
            for name, one in zip(names, found, strict=True):
                if one is None:
                    self._models.check(name)  # before a task is made for each
            found = await asyncio.gather(*map(self._find, names))
        fields = {field for name, one in zip(names, found, strict=True) for field in self._key_fields(name, one)}
        # All are asked before one is waited for: what reads the same is read together.
        columns = await asyncio.gather(*(self._score_each(one, ids, fields, as_of_ms) for one in found))
        heads = [msgspec.json.encode(name) + b":" for name in names]
        objects = [
            b"{%b}" % b",".join([head + answer for head, answer in zip(heads, row, strict=True)])
            for row in zip(*columns, strict=True)
        ]
        return Response(200, b"[%b]" % b",".join(objects))

    async def _find(self, name: str) -> Served | MillpondError:
        """Return a model, or why it is not there, which is no fault of the request."""
        try:
            return self._models.served.get(name) or await self._models.find(name)
        except MillpondError as error:
            if error.status < 500 and not isinstance(error, TooMany):
                raise
            return error

    def _key_fields(self, name: str, found: Served | MillpondError | None) -> Iterable[str]:
        if isinstance(found, Served):
            return found.champion.loaded.plan.key_fields
        return next((m.key_fields for m in self._models.entries() if m.model == name), ())

    async def _score_each(
        self, served: Served | MillpondError | None, ids: list[dict[str, Any]], fields: set[str], as_of_ms: int | None
    ) -> Sequence[bytes]:
        """Return a model's answer for each id, which has the key `fields` of all models; where it fails, its error."""
        if not isinstance(served, Served):
            assert served is not None
            return [told(served)] * len(ids)
        plan = served.champion.loaded.plan
        if len(plan.key_fields) != len(fields):
            # Its own fields, and those that are no model's, to be refused.
            ids = [{k: v for k, v in one.items() if k in plan.key_fields or k not in fields} for one in ids]
        keys = plan.key_columns(ids, batch=True, root="$.ids")
        try:
            answered = await served.ask(keys, len(ids), as_of_ms)
        except MillpondError as error:
            if error.status < 500 and not isinstance(error, TooMany):
                raise
            return [told(error)] * len(ids)
        return self._answers.each(answered, "$.ids[%d]")

    def _several(self, body: Any) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the models and the ids of a request for several models."""
        if not isinstance(body, dict) or body.keys() != {"models", "ids"}:
            raise BadRequest('body: expected {"models": [...], "ids": [...]} and nothing else', path="$")
        names, ids = body["models"], body["ids"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise BadRequest("body: expected `models` as a list of names, one at least", path="$.models")
        if len(set(names)) != len(names):
            raise BadRequest("body: a model is named twice", path="$.models")
        if not isinstance(ids, list):
            raise BadRequest(f"body: expected `ids` as a list of objects, got {type(ids).__name__}", path="$.ids")
        if len(names) * max(1, len(ids)) > self._limits.ids_max:
            raise TooLarge(
                f"body: {len(ids)} ids for {len(names)} models; allowed are {self._limits.ids_max} scores in a request"
            )
        return names, self._objects(ids, "an id", "$.ids[%d]")

    def _ids(self, body: list[Any], plan: ReadPlan, path: str) -> list[dict[str, Any]]:
        if len(body) > self._limits.ids_max:
            raise TooLarge(f"body: {len(body)} ids; allowed are {self._limits.ids_max} in a request")
        key = ", ".join(f"`{n}`" for n in plan.key_fields)
        return self._objects(body, f"{plan.subject}: an id", path, f" with {key}")

    def _objects(self, ids: list[Any], subject: str, path: str, with_key: str = "") -> list[dict[str, Any]]:
        for i, one in enumerate(ids):
            if not isinstance(one, dict):
                raise BadRequest(
                    f"{subject} is an object{with_key}, got {type(one).__name__}",
                    path=path % i if "%" in path else path,
                    code="bad_id",
                )
        return ids

    # -- features of one entity

    def _view_plan(self, view: FeatureView) -> ReadPlan:
        if view not in self._view_plans:
            self._view_plans[view] = ReadPlan(self._client.layout, list(view), f"view `{view.name}`")
        return self._view_plans[view]

    async def get_features(self, request: Request) -> Response:
        view = self._client.layout.view(request.name)
        since_ms = await self._models.history_since(view)
        plan = self._view_plan(view)
        ids = {name: value for name, value in request.query.items() if name != "as_of"}
        keys = plan.key_columns([ids], batch=False)
        rows = await self._client.read(plan, keys, 1, _as_of(request))
        (values,) = plan.named_values(rows)
        return json_response(
            {
                "view": view.name,
                "key": {name: values[0] for name, values in keys.items()},
                "features": {f.name: values[f.full_name] for f in view},
                "as_of": iso(int(rows.as_of[0])),
                "unknown": bool(rows.unknown[0]),
                **({} if since_ms is None else {"history_since": iso(since_ms)}),
            }
        )

    # -- health and documentation

    async def get_healthz(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def get_readyz(self, request: Request) -> Response:
        shards = await self._status()
        if waiting := [shard for shard in shards if shard.get("state", "ready") != "ready"]:
            progress = ", ".join(f"shard {s['shard']} {s.get('why', s['state'])}" for s in waiting)
            code = waiting[0]["state"]
            raise Unavailable(
                f"{len(waiting)} of {len(shards)} shards are not ready: {progress}", code=code, retry_after_ms=200
            )
        # A broken model is its own: it does not make the cluster unready.
        broken = self._models.broken()
        models = sorted(m.model for m in self._models.entries() if m.model not in broken)
        return json_response({"status": "ready", "shards": len(shards), "models": models, "broken": broken})

    # -- for those who run the cluster

    async def get_explain(self, request: Request) -> Response:
        """Say what made a score: one that is served now, or was at a time."""
        request.check_admin(self._admin_token_sha256, "this call")
        if self._explainer is None:
            raise Unavailable("explain: the cluster keeps no past (settings `history` and `durability`)")
        served = self._models.served.get(request.name) or await self._models.find(request.name)
        plan, query = served.champion.loaded.plan, dict(request.query)
        at_ms = None if "at" in plan.key_fields else _time(query.pop("at", None), "at")
        events = "5" if "events" in plan.key_fields else query.pop("events", "5")
        if not (events.isascii() and events.isdigit() and len(events) < 5):
            raise BadRequest(f"query: `events` is a whole number below 10,000, got {events[:80]!r}", path="?events")
        keys = plan.key_columns([query], batch=False)
        lane = served.lane_of(keys)
        now = None if at_ms is not None else await self._served_now(lane, keys, self._explainer.shard_map)
        told = await self._explainer.explain(
            model=served.model,
            version=lane.loaded.model.version,
            key={name: values[0] for name, values in keys.items()},
            served=now,
            at_ms=at_ms,
            events_max=int(events),
        )
        return Response(200, told)

    async def _served_now(self, lane: Lane, keys: Mapping[str, Sequence[Any]], shard_map: ShardMap) -> bytes:
        """Score an id, and return that as the score log would have it, an Arrow IPC stream."""
        model, plan = lane.loaded.model, lane.loaded.plan
        rows = await self._client.read(plan, keys, 1)
        read = FeatureRows(rows.matrix.copy(), rows.as_of, rows.unknown, rows.texts, rows.trace)
        scored, row = await lane.ask(keys, 1, rows=rows)
        if isinstance(scored.results[row], PredictionFailed):
            raise scored.results[row]
        table = scores_table(
            Scorer(model.name, model.version, lane.digest, lane.role), plan, shard_map, [""],
            [time.time_ns() // 1_000_000], keys, read, [scored.results[row]],
        )  # fmt: skip
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]

    async def post_forget(self, request: Request) -> Response:
        """Begin to forget an entity; what happened to it up to now is refused when this returns."""
        request.check_admin(self._admin_token_sha256, "this call")
        request.allow_query()
        check_json(request)
        key = decode_json(await request.body(self._limits.body_bytes_max))
        return json_response(await self._forgets().forget(key), 202)

    async def get_forget(self, request: Request) -> Response:
        """Say how far that is."""
        request.check_admin(self._admin_token_sha256, "this call")
        return json_response(await self._forgets().status(dict(request.query)))

    def _forgets(self) -> Forgetter:
        if self._forgetter is None:
            raise Unavailable("forget: this replica does not reach the shards")
        return self._forgetter

    async def get_status(self, request: Request) -> Response:
        request.check_admin(self._admin_token_sha256, "this call")
        models = [{"model": m.model, "version": m.version, "owner": m.owner} for m in self._models.entries()]
        # Of a view that has changed there may be several versions; plans are made of this one.
        answering = {name: version_name(view) for name, view in self._client.layout.views.items()}
        return json_response({"shards": await self._status(), "models": models, "answering": answering})

    async def get_openapi(self, request: Request) -> Response:
        return json_response(openapi_document(self._client.layout, self._models.entries(), self._cluster_name))

    async def get_docs(self, request: Request) -> Response:
        page = docs_page(self._client.layout, self._models.entries(), self._cluster_name)
        return Response(200, page(_base_url(request)).encode(), "text/html; charset=utf-8")


def _base_url(request: Request) -> str:
    """Return the URL that the request was sent to, without its path; this machine's if it does not say."""
    host = request.header(b"host") or ""
    # It is pasted into a terminal: nothing that a shell or a page could take for more than a name.
    if not _HOST.fullmatch(host):
        return "http://127.0.0.1"
    return f"{'https' if request.scope.get('scheme') == 'https' else 'http'}://{host}"


def check_json(request: Request) -> None:
    content_type = request.header(b"content-type")
    if content_type is not None and content_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(f"body: content type {content_type[:80]!r}; allowed is `application/json`")


def _is_arrow(request: Request) -> bool:
    """Return whether the body is Arrow rather than JSON. Raises `UnsupportedMediaType` if it is neither."""
    content_type = request.header(b"content-type")
    if content_type is None or content_type == "application/json":
        return False
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in ("application/json", ARROW_TYPE):
        raise UnsupportedMediaType(
            f"body: content type {content_type[:80]!r}; allowed are `application/json` and `{ARROW_TYPE}`"
        )
    return media_type == ARROW_TYPE


def _as_of(request: Request) -> int | None:
    """Return `?as_of=` in milliseconds since the epoch: ISO 8601 with a zone, or milliseconds."""
    return _time(request.query.get("as_of"), "as_of")


def _time(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    ms = -1
    if text.isascii() and text.isdigit() and len(text) <= 15:
        ms = int(text)
    else:
        try:
            # A `+` of a zone that was not escaped in the query arrives as a blank.
            moment = datetime.fromisoformat(text.replace(" ", "+"))
            if moment.tzinfo is not None:
                ms = int(moment.timestamp() * 1000 + 0.5)
        except (ValueError, OverflowError):
            pass
    if not 0 <= ms < _AS_OF_MAX_MS:
        raise BadRequest(
            f"query: `{name}` is a time of 1970 to 2200, ISO 8601 with a zone or milliseconds since the epoch, "
            f"got {text[:80]!r}",
            path=f"?{name}",
        )
    return ms
