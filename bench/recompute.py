"""Scores of a sample, computed anew from what `GET /v1/features` says of the ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np

from millpond.feature_actors.view import FeatureView
from millpond.models import Features, Model

__all__ = ["features_of", "recomputed_scores", "soon_ms"]


def soon_ms() -> int:
    """Return a time a little ahead, to read everything as of: otherwise windows slide from answer to answer."""
    return int(time.time() * 1000) + 60_000


def features_of(http: httpx.Client, view: FeatureView, key: dict[str, Any], as_of_ms: int) -> dict[str, Any]:
    """Return the features of an entity by name. Raises `httpx.HTTPError`."""
    query = {"as_of": str(as_of_ms), **key}
    answer = http.get(f"/v1/features/{view.name}", params=query).raise_for_status().json()
    return dict(answer["features"])


def recomputed_scores(
    url: str, model: Model, predictor: Any, keys: Sequence[dict[str, Any]], done: Callable[[int], None] = lambda n: None
) -> list[str]:
    """Score the keys one by one and in a batch, and compare with the predictor on their features; return what is wrong.

    predictor: the model's, made here. Keys are known entities of every view that the model reads.
    """
    as_of_ms, path, wrong = soon_ms(), f"/v1/score/{model.name}", list[str]()
    views = {f.view.name: f.view for f in model.features}
    names = tuple(f.full_name for f in model.features)
    query = {"as_of": str(as_of_ms)}
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
        try:
            batch = http.post(path, params=query, json=list(keys)).raise_for_status().json()
            for key, in_batch in zip(keys, batch, strict=True):
                answer = http.post(path, params=query, json=key).raise_for_status().json()
                found = {
                    f"{view.name}.{name}": value
                    for view in views.values()
                    for name, value in features_of(http, view, {k: key[k] for k in view.key}, as_of_ms).items()
                }
                row = [np.nan if found[name] is None else found[name] for name in names]
                expected = float(predictor.predict(Features(np.array([row]), names))[0])
                if not answer["result"] == in_batch["result"] == expected:
                    wrong.append(
                        f"the score of {key} by `{model.name}` is what its features give: expected {expected!r}, got "
                        f"{answer['result']!r}, in a batch {in_batch['result']!r}"
                    )
                if answer["model"] != model.name or answer["unknown"]:
                    wrong.append(f"{key} is known and scored by `{model.name}`: got {answer}")
                done(1)
        except httpx.HTTPError as error:
            wrong.append(f"every answer is good: {error}")
    return wrong
