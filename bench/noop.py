"""What the score endpoint is measured against: endpoints that do nothing, on the same Serve setup.

`NoopApp` is the score endpoint with the scoring taken out: the same ASGI class, the same kind of route,
the body read and decoded by the same code, and then a constant of the shape of a score. `BareApp` is
the least that an ASGI application can be. Each runs in a replica of its own, deployed with the very
options of the score app.
"""

from __future__ import annotations

from typing import Any

from millpond.deployments.heap import keep_what_is_there
from millpond.deployments.http import App, Receive, Request, Response, Route, Scope, Send, decode_json
from millpond.deployments.score import check_json
from millpond.deployments.serving import ServingSpec, deployment, stay_on_loopback

__all__ = ["ANSWER", "BARE_PREFIX", "NOOP_PREFIX", "BareApp", "NoopApp", "run_noops"]

NOOP_PREFIX = "/bench/noop"
BARE_PREFIX = "/bench/bare"

_BODY_BYTES_MAX = 4 * 1024 * 1024
#: As long as a score, and with the texts that the load generator looks for in one.
ANSWER = (
    b'{"id":"0123456789ab0000000001","model":"reference","version":"1","result":0.12345678901234567,'
    b'"as_of":"2026-01-01T00:00:00.000Z","unknown":[]}'
)


class NoopApp(App):
    """Decode the ids of a request as the score app does, and answer a constant."""

    def __init__(self) -> None:
        super().__init__([Route("POST", f"{NOOP_PREFIX}/", self.post_noop)])

    async def post_noop(self, request: Request) -> Response:
        check_json(request)
        decode_json(await request.body(_BODY_BYTES_MAX))
        return Response(200, ANSWER)


class BareApp:
    """Read the body to its end and answer a constant; no class, route or decoder of ours."""

    _HEAD = {
        "type": "http.response.start",
        "status": 200,
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(ANSWER)).encode()),
        ],
    }
    _BODY = {"type": "http.response.body", "body": ANSWER}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body", False):
            pass
        await send(dict(self._HEAD))
        await send(dict(self._BODY))


class NoopReplica:
    """A process that holds the no-op app."""

    def __init__(self) -> None:
        stay_on_loopback()
        self._app = NoopApp()
        keep_what_is_there()

    def __serve_build_asgi_app__(self) -> NoopApp:
        return self._app


class BareReplica:
    """A process that holds the bare app."""

    def __init__(self) -> None:
        stay_on_loopback()
        self._app = BareApp()
        keep_what_is_there()

    def __serve_build_asgi_app__(self) -> BareApp:
        return self._app


def run_noops(spec: ServingSpec) -> None:
    """Run both beside the apps of a running cluster, each as a Serve application of its own."""
    from ray import serve

    def target(replica: Any, name: str, prefix: str) -> Any:
        return serve.RunTarget(
            deployment(replica, name, spec).bind(),
            name=f"{spec.cluster_name}-{name.lower()}",
            route_prefix=prefix,
        )

    serve.run_many([target(NoopReplica, "Noop", NOOP_PREFIX), target(BareReplica, "Bare", BARE_PREFIX)])
