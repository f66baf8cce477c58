"""An example of a deployment of a team's own: which badge the shop's page shows beside a customer's name.

No model and no score: a rule of the team over features that the churn model reads too, at a path of its own. After
`millpond up deployments/badges.py`, `GET /v1/badges/42` answers `{"badge": "none"}`: nobody has bought yet.
"""

from __future__ import annotations

from millpond.deployments.deployment import Deployment
from millpond.deployments.http import App, Request, Response, Route, json_response
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.plan import ReadPlan
from millpond.models.churn import customer_orders


class Badges(App):
    """Answer the badge of one customer."""

    def __init__(self, client: FeatureClient) -> None:
        super().__init__([Route("GET", "/v1/badges/", self.get_badge)])
        self._client = client
        features = [customer_orders["orders"], customer_orders["spend_180d"]]
        self._plan = ReadPlan(client.layout, features, "badge")

    async def get_badge(self, request: Request) -> Response:
        keys = self._plan.key_columns([{"customer_id": request.name}], batch=False)
        rows = await self._client.read(self._plan, keys, 1)
        orders, spend_180d = rows.matrix[0]
        badge = "gold" if spend_180d > 100 else "silver" if orders >= 3 else "none"
        return json_response({"badge": badge})


badges = Deployment("badges", owner="shop", route_prefix="/v1/badges", app=Badges)
