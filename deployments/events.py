"""The events app: `POST /v1/events/{source}`."""

from __future__ import annotations

import re

import msgspec

from millpond.deployments.http import App, Request, Response, Route
from millpond.feature_actors.client import EventsRequest, FeatureClient
from millpond.feature_actors.clock import ClockKind
from millpond.feature_actors.decode import BodyLimits, Decoder
from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.ingest_queue import IngestQueue, QueueLimits
from millpond.feature_actors.source import Source

__all__ = ["EventsApp"]

#: Visible ASCII, as the header's draft has it; quotation marks around it are part of it.
_KEY = re.compile(r"[!-~]{1,255}")
_ROW = re.compile(r"[0-9]{1,15}")
_encode_ack = msgspec.json.Encoder().encode


class EventsApp(App):
    """Take raw events in.

    A request is validated as a whole: one bad row refuses it and nothing is applied. The answer
    comes when every shard concerned has applied it, so whoever scores after it sees it.

    clock: of the cluster. admin_token_sha256: the digest of the token that some calls need; None if nobody has it.
    """

    def __init__(
        self,
        client: FeatureClient,
        limits: BodyLimits,
        queue: QueueLimits | None = None,
        *,
        clock: ClockKind = "wall",
        admin_token_sha256: str | None = None,
    ) -> None:
        super().__init__([Route("POST", "/v1/events/", self.post_events)])
        self._limits = limits
        self._clock = clock
        self._admin_token_sha256 = admin_token_sha256
        self._client = client
        self._decoders: dict[str, Decoder] = {}
        self.renew_decoders()
        self._queue = IngestQueue(client, self._decoders, queue or QueueLimits())

    def renew_decoders(self) -> None:
        """Decode by the views that the client has now: their keys have limits of their own."""
        layout = self._client.layout
        for name, source in layout.sources.items():
            keys = {k for t in layout.tables_of(name) for k in t.key}
            # On an event clock time may begin with what is made up, at 0 for instance.
            self._decoders[name] = Decoder(source, self._limits, keys, refuse_seconds=self._clock == "wall")

    async def post_events(self, request: Request) -> Response:
        source = self._client.layout.source(request.name)
        arrival = _arrival(request)
        if arrival == "given" and self._clock == "wall":
            # On an event clock time is what events say, whoever sends them.
            request.check_admin(self._admin_token_sha256, '`?arrival=given` on a cluster with `clock = "wall"`')
        key, first_row = _idempotency_key(request, source)
        body = await request.body(self._limits.body_bytes_max)
        decoder = self._decoders[source.name]
        parsed = decoder.parse(body, request.header(b"content-type"), arrivals=arrival == "given")
        events = EventsRequest(parsed.rows, arrival == "event", key, parsed.arrivals, first_row)
        ack = await self._queue.ingest(source.name, parsed, events)
        return Response(200, _encode_ack(ack))


def _arrival(request: Request) -> str:
    """`?arrival=event`: a bulk load, in which each event arrives at its event time; `given`: a replay, in which each
    says when it arrived."""
    request.allow_query("arrival")
    value = request.query.get("arrival", "now")
    if value not in ("now", "event", "given"):
        raise BadRequest(f"query: `arrival` is now, event or given, got {value!r}", path="?arrival")
    return value


def _idempotency_key(request: Request, source: Source) -> tuple[str | None, int]:
    """Return the `Idempotency-Key`, by which a request of events without ids is known when it is sent again, and the
    `Idempotency-Row`, with which row of what the key names it begins."""
    key, row = request.header(b"idempotency-key"), request.header(b"idempotency-row") or "0"
    if key is None or source.event_id is not None:
        return None, 0
    if not _KEY.fullmatch(key):
        raise BadRequest(
            f"header Idempotency-Key: got {key[:80]!r}; allowed are 1 to 255 visible ASCII characters",
            path="Idempotency-Key",
        )
    if not _ROW.fullmatch(row):
        raise BadRequest(
            f"header Idempotency-Row: got {row[:80]!r}; allowed is a whole number of up to 15 digits",
            path="Idempotency-Row",
        )
    return key, int(row)
