"""What answers HTTP: the events app and the score app, and the Ray Serve deployments that hold them; and the client."""

from __future__ import annotations

from importlib import import_module
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
    """Import what is asked for, and only then: an application needs no models, a replica no client."""
    if name not in __all__:
        raise AttributeError(f"module `millpond.deployments` has no `{name}`")
    module = import_module(f"millpond.deployments.{'deployment' if name == 'Deployment' else 'client'}")
    return getattr(module, name)
