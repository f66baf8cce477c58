"""Where a training set comes from: what its file says of the definitions and events that it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.view import Feature, FeatureView
from millpond.models.model import Model
from millpond.models.training.labels import LaterLabels

__all__ = ["provenance", "time_text"]

FORMAT = 1


def provenance(
    model: Model | Sequence[Feature],
    plan: ReadPlan,
    knowledge: str,
    as_of: str,
    labels: int,
    events: Mapping[str, int],
    since: Mapping[str, int | None],
    ahead: LaterLabels | None = None,
) -> dict[str, Any]:
    """Return what is to be known of a training set, as JSON has it.

    views: each with its owner, a digest of all its features, and the identities of those that are read; what computes
        other values has another digest. events, since: by source, how many there were, and from which arrival stamp on
        there are any (null: from the beginning). ahead: labels that are later than the cluster's clock: events of
        before them may come still.
    """
    features: dict[str, dict[str, str]] = {}
    for feature in plan.features:
        features.setdefault(feature.view.name, {})[feature.name] = feature.id
    return {
        "format": FORMAT,
        "millpond": version("millpond"),
        "model": {"name": model.name, "version": model.version} if isinstance(model, Model) else None,
        "knowledge": knowledge,
        "as_of": as_of,
        "labels": labels,
        "ahead": None
        if ahead is None
        else {
            "labels": ahead.labels,
            "now": time_text(ahead.than_ms),
            "first": {"row": ahead.row, "as_of": time_text(ahead.at_ms)},
        },
        "views": {
            name: {"owner": view.owner, "digest": _digest(view), "features": features[name]}
            for name, view in plan.views.items()
        },
        "sources": {
            source.name: {
                "version": source.version,
                "events": events[source.name],
                "since": None if (since_ms := since[source.name]) is None else time_text(since_ms),
            }
            for source in {v.source.name: v.source for v in plan.views.values()}.values()
        },
    }


def _digest(view: FeatureView) -> str:
    identities = {feature.name: feature.id for feature in view}
    return hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()[:16]


def time_text(time_ms: int) -> str:
    """
    >>> time_text(1_700_000_000_007), time_text(10**15)
    ('2023-11-14T22:13:20.007Z', '1000000000000000 ms')
    """
    try:
        time = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=time_ms)
    except OverflowError:
        return f"{time_ms} ms"
    return f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1_000:03}Z"
