# ruff: noqa: E501  (messages stand whole)
"""Deployments of a team's own: what is refused at declaration, and the example, over shards in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from apps import call

from millpond.deployments import Deployment
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import EventClock
from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.ports import LocalIngest, LocalRead, complete
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.models.definition import Definition

GOOD: dict[str, Any] = {"name": "badges", "owner": "shop", "route_prefix": "/v1/badges", "app": dict}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "Badges"}, "deployment 'Badges': a name is lower-case letters, digits and `_`, starts with a letter and has at most 63 characters"),
        ({"owner": ""}, 'deployment `badges`: no owner; say which team owns it with `owner="..."`'),
        ({"route_prefix": "badges"}, "deployment `badges`: route_prefix is a path such as `/v1/badges`, got 'badges'"),
        ({"route_prefix": "/"}, "deployment `badges`: route_prefix is a path such as `/v1/badges`, got '/'"),
        ({"route_prefix": "/v1"}, "deployment `badges`: route_prefix `/v1` would take calls of `/v1/events`; choose another"),
        ({"route_prefix": "/v1/score/churn"}, "deployment `badges`: route_prefix `/v1/score/churn` would take calls of `/v1/score`; choose another"),
        ({"app": 5}, "deployment `badges`: app must be a class or a function, got 5"),
        ({"replicas": 0}, "deployment `badges`: replicas 0 and cpus 0.1; allowed are 1 or more and more than 0"),
    ],
)  # fmt: skip
def test_a_wrong_deployment_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        Deployment(**{**GOOD, **wrong})
    assert str(caught.value) == message


def test_the_example_answers_from_the_features_of_its_cluster() -> None:
    definition = Definition.read(Path(__file__).parents[1] / "deployments" / "badges.py")
    (badges,) = definition.instances(Deployment)
    (view,) = definition.declared().views
    layout, shard_map = compile_layout([], [view]), ShardMap.even(16, 1)
    shard = Shard(layout, shard_map, 0)
    client = FeatureClient(layout, shard_map, LocalIngest([shard]), LocalRead([shard]), EventClock())
    orders = [(1, 60.0), (1, 70.0), (2, 1.0), (2, 1.0), (2, 1.0), (3, 1.0)]
    events = [
        {
            "purchase_id": str(i),
            "customer_id": customer,
            "cds": 1.0,
            "amount": amount,
            "bought_at": 1_700_000_000_000 + i,
        }
        for i, (customer, amount) in enumerate(orders)
    ]
    complete(client.ingest("purchases", pa.RecordBatch.from_pylist(events, schema=view.source.schema)))
    app = badges.app(client)
    shown = [call(app, "GET", f"/v1/badges/{customer}").json for customer in (1, 2, 3, 4)]
    assert shown == [{"badge": "gold"}, {"badge": "silver"}, {"badge": "none"}, {"badge": "none"}]
    assert call(app, "GET", "/v1/badges/x").status == 400
