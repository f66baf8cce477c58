"""The score app: scores and features by id, health, and the page that documents the calls."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from millpond.deployments.http import App, Request, Response, Route, decode_json, json_response
from millpond.deployments.openapi import docs_page, openapi_document
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.errors import (
    BadRequest,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    did_you_mean,
)
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.models.model import LoadedModel

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
        models: Mapping[str, LoadedModel],
        status: Status,
        limits: ScoreLimits,
        admin_token_sha256: str,
        cluster_name: str,
    ) -> None:
        super().__init__(
            [
                Route("POST", "/v1/score/", self.post_score),
                Route("GET", "/v1/features/", self.get_features),
                Route("GET", "/healthz", self.get_healthz),
                Route("GET", "/readyz", self.get_readyz),
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
        layout = client.layout
        self._view_plans = {name: ReadPlan(layout, list(view), f"view `{name}`") for name, view in layout.views.items()}
        # Ids of answers: unique over replicas by the random half, in order within one.
        self._id_prefix = secrets.token_hex(6)
        self._id_numbers = itertools.count(1)
        self._openapi = openapi_document(layout, models, cluster_name)
        self._docs = docs_page(layout, models, cluster_name)

    # -- the score journey

    async def post_score(self, request: Request) -> Response:
        # 1. Decode the ids.
        loaded = self._model(request.name)
        request.allow_query("as_of", "features")
        check_json(request)
        body = decode_json(await request.body(self._limits.body_bytes_max))
        ids, batch = self._ids(body, loaded.plan)
        keys = loaded.plan.key_columns(ids, batch=batch)
        # 2. Read the plan's features and assemble one matrix.
        rows = await self._client.read(loaded.plan, keys, len(ids), _as_of(request))
        # A predictor may write into its matrix: the answer has what was read.
        values_read = loaded.plan.named_values(rows) if request.flag("features") else None
        # 3. Predict.
        results = loaded.predict(rows) if ids else []
        # 4. Answer, one per id.
        answers = self._answers(loaded, rows, results)
        if values_read is not None:
            for answer, values in zip(answers, values_read, strict=True):
                answer["features"] = values
        return json_response(answers if batch else answers[0])

    def _model(self, name: str) -> LoadedModel:
        loaded = self._models.get(name)
        if loaded is None:
            raise NotFound(f"no model `{name[:80]}`" + did_you_mean(name[:80], self._models))
        return loaded

    def _ids(self, body: Any, plan: ReadPlan) -> tuple[list[dict[str, Any]], bool]:
        """Return the ids of a request and whether it is a batch."""
        batch = isinstance(body, list)
        ids = body if batch else [body]
        if len(ids) > self._limits.ids_max:
            raise TooLarge(f"body: {len(ids)} ids; allowed are {self._limits.ids_max} in a request")
        for i, one in enumerate(ids):
            if not isinstance(one, dict):
                key = ", ".join(f"`{n}`" for n in plan.key_fields)
                raise BadRequest(
                    f"{plan.subject}: an id is an object with {key}, got {type(one).__name__}",
                    path=f"$[{i}]" if batch else "$",
                    code="bad_id",
                )
        return ids, batch

    def _answers(self, loaded: LoadedModel, rows: FeatureRows, results: list[Any]) -> list[dict[str, Any]]:
        return [
            {
                "id": f"{self._id_prefix}{next(self._id_numbers):010x}",
                "model": loaded.model.name,
                "version": loaded.model.version,
                "result": result,
                "as_of": _iso(as_of),
                "unknown": unknown,
            }
            for result, as_of, unknown in zip(results, rows.as_of.tolist(), rows.unknown, strict=True)
        ]

    # -- features of one entity

    async def get_features(self, request: Request) -> Response:
        view = self._client.layout.view(request.name)
        plan = self._view_plans[view.name]
        ids = {name: value for name, value in request.query.items() if name != "as_of"}
        keys = plan.key_columns([ids], batch=False)
        rows = await self._client.read(plan, keys, 1, _as_of(request))
        (values,) = plan.named_values(rows)
        return json_response(
            {
                "view": view.name,
                "key": {name: values[0] for name, values in keys.items()},
                "features": {f.name: values[f.full_name] for f in view},
                "as_of": _iso(int(rows.as_of[0])),
                "unknown": bool(rows.unknown[0]),
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
        return json_response({"status": "ready", "shards": len(shards), "models": sorted(self._models)})

    async def get_status(self, request: Request) -> Response:
        scheme, _, given = (request.header(b"authorization") or "").partition(" ")
        digest = hashlib.sha256(given.encode()).hexdigest()
        if not hmac.compare_digest(digest, self._admin_token_sha256) or scheme != "Bearer":
            raise Unauthorized(
                "this call needs the admin token of the cluster: `Authorization: Bearer ...`; it is in the file "
                "`admin_token` of the cluster's data directory"
            )
        models = [
            {"model": m.model.name, "version": m.model.version, "owner": m.model.owner} for m in self._models.values()
        ]
        return json_response({"shards": await self._status(), "models": models})

    async def get_openapi(self, request: Request) -> Response:
        return json_response(self._openapi)

    async def get_docs(self, request: Request) -> Response:
        return Response(200, self._docs(_base_url(request)).encode(), "text/html; charset=utf-8")


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


def _as_of(request: Request) -> int | None:
    """Return `?as_of=` in milliseconds since the epoch: ISO 8601 with a zone, or milliseconds."""
    text = request.query.get("as_of")
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
            "query: `as_of` is a time of 1970 to 2200, ISO 8601 with a zone or milliseconds since the epoch, "
            f"got {text[:80]!r}",
            path="?as_of",
        )
    return ms


def _iso(ms: int) -> str | None:
    """Return a time as ISO 8601 UTC; None for "no event ever" of an event clock."""
    if ms < 0:
        return None
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
