"""What answers HTTP: the events app and the score app, and the Ray Serve deployments that hold them; and the client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "millpond.deployments":
    raise ImportError(f"import millpond.deployments, not {__name__}: a second copy would double every class")

if TYPE_CHECKING:
    from millpond.deployments.client import (
        Ack,
        AsyncClient,
        Client,
        ClientError,
        NotSent,
        RequestFailed,
        RequestRefused,
        Score,
        Sender,
        TryAgainLater,
        ViewFeatures,
    )
    from millpond.deployments.deployment import Deployment

__all__ = [
    "Ack",
    "AsyncClient",
    "Client",
    "ClientError",
    "Deployment",
    "NotSent",
    "RequestFailed",
    "RequestRefused",
    "Score",
    "Sender",
    "TryAgainLater",
    "ViewFeatures",
]


def __getattr__(name: str) -> Any:
    """Import the client when it is asked for: replicas need none, nor its HTTP library."""
    if name not in __all__:
        raise AttributeError(f"module `millpond.deployments` has no `{name}`")
    from millpond.deployments import client, deployment

    return getattr(deployment if name == "Deployment" else client, name)
