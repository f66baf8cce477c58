"""A deployment of a team's own: an ASGI application beside those of events and scores, on the same features."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.source import check_name, check_owner

__all__ = ["Deployment"]

_PREFIX = re.compile(r"(/[a-z0-9][a-z0-9._-]*)+")
#: What is answered already.
_TAKEN = (
    "/v1/events", "/v1/score", "/v1/features", "/v1/explain", "/v1/forget", "/v1/status", "/healthz", "/readyz",
    "/docs", "/openapi.json",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Deployment:
    """Declare an application that runs in replicas of its own, below a path of its own.

    app: called in each replica with its `FeatureClient`, which reads the features of the cluster, to make an ASGI
        application; `millpond.deployments.http.App` is one with a table of routes.
    route_prefix: the path that all of its calls begin with, such as `/v1/badges`.
    replicas, cpus: how many, and of each of them.

    Raises `DeclarationError` that names the deployment and what does not fit.
    """

    name: str
    owner: str
    route_prefix: str
    app: Callable[[FeatureClient], Any]
    about: str = ""
    replicas: int = 1
    cpus: float = 0.1

    def __post_init__(self) -> None:
        check_name("deployment", self.name)
        check_owner("deployment", self.name, self.owner)
        if not isinstance(self.route_prefix, str) or not _PREFIX.fullmatch(self.route_prefix):
            raise DeclarationError(
                f"deployment `{self.name}`: route_prefix is a path such as `/v1/badges`, got {self.route_prefix!r}"
            )
        for taken in _TAKEN:
            if (self.route_prefix + "/").startswith(taken + "/") or (taken + "/").startswith(self.route_prefix + "/"):
                raise DeclarationError(
                    f"deployment `{self.name}`: route_prefix `{self.route_prefix}` would take calls of `{taken}`; "
                    "choose another"
                )
        if not callable(self.app):
            raise DeclarationError(f"deployment `{self.name}`: app must be a class or a function, got {self.app!r}")
        if type(self.replicas) is not int or self.replicas < 1 or not 0 < self.cpus < 1_024:
            raise DeclarationError(
                f"deployment `{self.name}`: replicas {self.replicas!r} and cpus {self.cpus!r}; allowed are 1 or more "
                "and more than 0"
            )
