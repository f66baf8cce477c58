"""The events app: `POST /v1/events/{source}`."""

from __future__ import annotations

from dataclasses import asdict

from millpond.deployments.http import App, Request, Response, Route, json_response
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.decode import BodyLimits, Decoder
from millpond.feature_actors.errors import BadRequest

__all__ = ["EventsApp"]


class EventsApp(App):
    """Take raw events in.

    A request is validated as a whole: one bad row refuses it and nothing is applied. The answer
    comes when every shard concerned has applied it, so whoever scores after it sees it.
    """

    def __init__(self, client: FeatureClient, limits: BodyLimits) -> None:
        super().__init__([Route("POST", "/v1/events/", self.post_events)])
        self._client = client
        self._limits = limits
        layout = client.layout
        self._decoders = {
            name: Decoder(source, limits, {k for t in layout.tables_of(name) for k in t.key})
            for name, source in layout.sources.items()
        }

    async def post_events(self, request: Request) -> Response:
        source = self._client.layout.source(request.name)
        arrival_is_event_time = _arrival(request)
        body = await request.body(self._limits.body_bytes_max)
        batch = self._decoders[source.name].decode(body, request.header(b"content-type"))
        ack = await self._client.ingest(source.name, batch, arrival_is_event_time=arrival_is_event_time)
        return json_response(asdict(ack))


def _arrival(request: Request) -> bool:
    """`?arrival=event`: a bulk load or replay, in which each event arrives at its event time."""
    request.allow_query("arrival")
    value = request.query.get("arrival", "now")
    if value not in ("now", "event"):
        raise BadRequest(f"query: `arrival` is now or event, got {value!r}", path="?arrival")
    return value == "event"
