"""The description of the calls: an OpenAPI document, and a page for people made from the same facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import msgspec

from millpond.deployments.forgetter import key_kinds
from millpond.deployments.served import ModelEntry
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.source import Field, Source
from millpond.feature_actors.view import Feature, FeatureView

__all__ = ["docs_page", "openapi_document"]

_JSON_TYPES: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "bool": {"type": "boolean"},
    "timestamp[ms, UTC]": {
        "oneOf": [{"type": "string", "format": "date-time"}, {"type": "integer", "format": "int64"}],
        "description": "ISO 8601 with a zone, or milliseconds since the epoch",
    },
}
#: JavaScript holds no int64: its digits may come as a string.
_INT64 = {"type": ["integer", "string"], "format": "int64", "pattern": "^(0|-?[1-9][0-9]*)$"}
_EXAMPLES: dict[str, Any] = {"string": "abc", "bool": True, "timestamp[ms, UTC]": "2024-05-01T12:00:00Z"}

_ARRIVAL = (
    "when events arrive. event: when they happen, a bulk load; given: at the `_arrival_ms` (int64) that an Arrow body "
    "has beside the fields, a replay: needs the admin token unless the cluster's clock is that of its events"
)
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ARROW = {"application/vnd.apache.arrow.stream": _BINARY}

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "path": {"type": ["string", "null"]},
                "problems": {"type": "array", "items": {"type": "object"}},
            },
            "required": ["code", "message", "path"],
        }
    },
}
_ACK = {
    "type": "object",
    "properties": {
        name: {"type": "integer", "description": about}
        for name, about in {
            "accepted": "applied by every shard concerned",
            "duplicates": "seen before with the same content: dropped",
            "conflicts": "seen before with another content: dropped",
            "late": "of the accepted, behind their arrival by more than the limit: still merged",
            "too_late": "of the accepted, older than anything kept",
            "unkeyed": "of the accepted, without a key for some view",
            "forgotten": "of an entity that was forgotten after they had happened: dropped",
        }.items()
    },
}

_FORGOTTEN = {
    "type": "object",
    "properties": {
        "key": {"type": "object"},
        "state": {"enum": ["unknown", "under way", "done"]},
        "up_to": {"type": ["string", "null"], "format": "date-time", "description": "what happened later is kept"},
        "removed": {"type": ["object", "null"], "description": "how many rows, events and scores, when it is done"},
        "shards": {"type": "array", "items": {"type": "object"}},
    },
}
_FOR_ADMINS: dict[str, Any] = {"security": [{"admin_token": []}]}


def openapi_document(layout: Layout, models: Sequence[ModelEntry], cluster_name: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of this cluster: every call, with a path for each source, model and view."""
    paths: dict[str, Any] = {}
    for source in layout.sources.values():
        event = _event_schema(source)
        forms: dict[str, Any] = {"application/json": {"schema": {"oneOf": [event, {"type": "array", "items": event}]}}}
        forms |= {"application/x-ndjson": _BINARY, **_ARROW}
        paths[f"/v1/events/{source.name}"] = {
            "post": _call(
                source.about or f"Events of {source.name}",
                f"events_{source.name}",
                _ACK,
                body=forms,
                parameters=[_parameter("arrival", {"enum": ["now", "event", "given"]}, _ARRIVAL)],
            )
        }
    for model in models:
        one = _id_schema(model.key_fields)
        paths[f"/v1/score/{model.model}"] = {
            "post": _call(
                model.about or f"Scores of {model.model}",
                f"score_{model.model}",
                {"oneOf": [_answer_schema(), {"type": "array", "items": _answer_or_error_schema()}]},
                body={"application/json": {"schema": {"oneOf": [one, {"type": "array", "items": one}]}}, **_ARROW},
                parameters=[
                    _AS_OF,
                    _parameter("features", {"enum": ["true", "false"]}, "answer with the features read, too"),
                ],
            )
        }
    for name, view in layout.views.items():
        plan = ReadPlan(layout, list(view), f"view `{name}`")
        key = [_parameter(k, _key_schema(kind), "key field", required=True) for k, kind in plan.key_fields.items()]
        key.append(_AS_OF)
        paths[f"/v1/features/{name}"] = {
            "get": _call(view.about or f"Features of {name}", f"features_{name}", _view_schema(view), parameters=key)
        }
    if models:
        ids = {"type": "array", "items": {"type": "object", "description": "the key fields of all models asked"}}
        names = {"type": "array", "items": {"enum": [m.model for m in models]}}
        several = {"type": "object", "properties": {"models": names, "ids": ids}, "required": ["models", "ids"]}
        answer = {"type": "object", "additionalProperties": _answer_or_error_schema()}
        paths["/v1/score"] = {
            "post": _call(
                "Scores of several models",
                "score",
                {"type": "array", "items": answer},
                body={"application/json": {"schema": several}},
                parameters=[_AS_OF],
            )
        }
    for path, about in (
        ("/healthz", "Liveness of this replica"),
        ("/readyz", "Every shard is ready; which models answer, and which do not"),
    ):
        paths[path] = {"get": _call(about, path.strip("/"), {"type": "object"})}
    for model in models:
        key = [_parameter(k, _key_schema(kind), "key field", required=True) for k, kind in model.key_fields.items()]
        key.append(_parameter("at", {"type": "string"}, "of the newest logged score up to then: ISO 8601, or ms"))
        key.append(_parameter("events", _INT64, "how many events of a feature are shown"))
        explain = _call(f"What made a score of {model.model}", f"explain_{model.model}", {"type": "object"},
                        parameters=key)  # fmt: skip
        paths[f"/v1/explain/{model.model}"] = {"get": explain | _FOR_ADMINS}
    status = _call("What every shard holds, and the models", "status", {"type": "object"})
    paths["/v1/status"] = {"get": status | _FOR_ADMINS}
    paths["/v1/forget"] = _forget_calls(key_kinds(layout))
    paths["/openapi.json"] = {"get": _call("This document", "openapi", {"type": "object"})}
    page = {"text/html": {"schema": {"type": "string"}}}
    paths["/docs"] = {"get": _call("The same for people, with a line for the terminal each", "docs", page)}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"Millpond: {cluster_name}", "version": "1"},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}, "securitySchemes": {"admin_token": _ADMIN_TOKEN}},
    }


def _forget_calls(key_fields: Mapping[str, str]) -> dict[str, Any]:
    kinds = {name: _key_schema(kind) for name, kind in key_fields.items()}
    key = {**_id_schema(key_fields), "required": [], "minProperties": 1, "maxProperties": 1}
    named = [_parameter(name, kind, "key field; name one") for name, kind in kinds.items()]
    begin = _call("Forget an entity, in the background", "forget", _FORGOTTEN,
                  body={"application/json": {"schema": key}}, status="202")  # fmt: skip
    look = _call("How far the forgetting of an entity is", "forgotten", _FORGOTTEN, parameters=named)
    return {"post": begin | _FOR_ADMINS, "get": look | _FOR_ADMINS}


def _call(
    about: str,
    operation: str,
    answer: dict[str, Any],
    body: dict[str, Any] | None = None,
    parameters: list[dict[str, Any]] | None = None,
    status: str = "200",
) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    content = answer if "text/html" in answer else {"application/json": {"schema": answer}}
    call: dict[str, Any] = {
        "summary": about,
        "operationId": operation,
        "responses": {
            status: {"description": "OK", "content": content},
            "4XX": {"description": "The request is wrong", "content": error},
            "5XX": {"description": "Try again after Retry-After", "content": error},
        },
    }
    if body:
        call["requestBody"] = {"required": True, "content": body}
    if parameters:
        call["parameters"] = parameters
    return call


def _parameter(name: str, schema: dict[str, Any], about: str, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": required, "schema": schema, "description": about}


def _event_schema(source: Source) -> dict[str, Any]:
    fields: dict[str, Field] = source.fields
    return {
        "type": "object",
        "properties": {name: _field_schema(f) for name, f in fields.items()},
        "required": [name for name, f in fields.items() if not f.optional and f.default is None],
        "additionalProperties": False,
    }


_AS_OF = _parameter(
    "as_of",
    {"type": "string"},
    "for replays: ISO 8601 with a zone, or milliseconds; not before the clock nor before what has been applied, "
    "but where all features read are exact",
)
#: OpenAPI's own way to say `Authorization: Bearer TOKEN`; it ignores a parameter of that name.
_ADMIN_TOKEN = {
    "type": "http",
    "scheme": "bearer",
    "description": "Authorization: Bearer TOKEN; it is in the file `admin_token` of the cluster's data directory",
}


def _field_schema(field: Field) -> dict[str, Any]:
    schema = _value_schema(field)
    return {"anyOf": [schema, {"type": "null"}]} if field.optional or field.default is not None else schema


def _value_schema(field: Field) -> dict[str, Any]:
    if field.type in _JSON_TYPES:
        return dict(_JSON_TYPES[field.type])
    if field.type == "int64":
        return dict(_INT64)
    return {"type": "number"} if field.type in ("float32", "float64", "double") else {"type": "integer"}


def _key_schema(kind: str) -> dict[str, Any]:
    return {"type": "string"} if kind == "string" else dict(_INT64)


def _id_schema(key_fields: Mapping[str, str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: _key_schema(kind) for name, kind in key_fields.items()},
        "required": list(key_fields),
        "additionalProperties": False,
    }


def _answer_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "id": {"type": "string", "description": "of this answer: joins labels and explanations to it"},
            "model": {"type": "string"},
            "version": {"type": "string"},
            "result": {"description": "what the model returned: a number or any JSON"},
            "as_of": {"type": ["string", "null"], "format": "date-time"},
            "unknown": {
                "type": "array",
                "items": {"type": "string"},
                "description": "views without the entity",
            },
        },
    }


def _answer_or_error_schema() -> dict[str, Any]:
    """Of one id among several: what fails there fails alone."""
    failed = {
        "description": "in place of the answer, if the model failed on this id; the error has its `status`, too",
        "required": ["error"],
        **_ERROR,
    }
    return {"oneOf": [{**_answer_schema(), "required": ["id", "result"]}, failed]}


def _view_schema(view: FeatureView) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "view": {"type": "string"},
            "key": {"type": "object"},
            "features": {"type": "object", "properties": {f.name: _feature_schema(f) for f in view}},
            "as_of": {"type": ["string", "null"], "format": "date-time"},
            "unknown": {"type": "boolean", "description": "whether the view has no event of the entity"},
        },
    }


def _feature_schema(feature: Feature) -> dict[str, Any]:
    value = {"type": ["string" if feature.is_text else "number", "null"]}
    schema: dict[str, Any] = value if feature.width == 1 else {"type": "array", "items": value}
    facts = _feature_facts(feature)
    window = f", {facts['window']}" if facts["window"] else ""
    where = f", where {facts['where']}" if facts["where"] else ""
    return {**schema, "description": f"{facts['made_by']}{window}{where}"}


def _feature_facts(feature: Feature) -> dict[str, str]:
    """Return what people want to know of a feature: the parts of its definition as texts."""
    facts = {"name": feature.name, "made_by": feature.made_by}
    if feature.derived is not None:
        return {**facts, "window": "", "where": ""}
    kept = feature.kept
    window = kept.window or ("lifetime" if kept.ttl is None else f"lifetime, ttl {kept.ttl}")
    return {
        **facts,
        "window": f"{window}, exact" if kept.exact else window,
        "where": "" if feature.where is None else str(feature.where),
    }


def docs_page(layout: Layout, models: Sequence[ModelEntry], cluster_name: str) -> Callable[[str], str]:
    """Return what makes the page at `/docs` for the URL that it is asked at: every call with a line
    that can be pasted into a terminal.

    A page of our own, not Swagger's: that one loads its program from elsewhere.
    """
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("millpond.deployments").joinpath("docs.html").read_text(encoding="utf-8")
    )
    facts: dict[str, Any] = {
        "cluster": cluster_name,
        "sources": [
            {"source": s, "example": _json({n: _example(f.type) for n, f in s.fields.items()})}
            for s in layout.sources.values()
        ],
        "models": [
            {
                "model": m,
                "example": _json({n: _example(k) for n, k in m.key_fields.items()}),
            }
            for m in models
        ],
        "views": [
            {
                "view": v,
                "query": "&".join(f"{k}={_example(v.source.fields[k].type)}" for k in v.key),
                "features": [_feature_facts(f) for f in v],
            }
            for v in layout.views.values()
        ],
    }
    facts["forget"] = next((f"{name}={_example(kind)}" for name, kind in key_kinds(layout).items()), None)
    return lambda url: template.render(url=url, **facts)


def _example(kind: str) -> Any:
    return _EXAMPLES.get(kind, 42 if "int" in kind else 12.5)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
