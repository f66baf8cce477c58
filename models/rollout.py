"""A rollout: which versions of a model are live, and as what; and how one follows from another.

The champion answers; the canary answers a share of the ids; the shadow computes and never answers. A version has one
of these roles at a time, and canary and shadow stand beside a champion. These are functions of what is there and what
is wanted: nothing here is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from millpond.feature_actors.errors import BadRequest, MillpondError
from millpond.models.pool import Pool
from millpond.models.version import Version

__all__ = ["FORMER_MAX", "Course", "Role", "Roles", "Rollout", "RolloutRefused", "check_share", "deployed", "promoted"]

Role = Literal["champion", "canary", "shadow"]

#: How many changes of a model can be rolled back, one after the other.
FORMER_MAX = 32


class RolloutRefused(MillpondError):
    """What is live does not allow this change; nothing has been changed."""

    code, status = "rollout_refused", 409


@dataclass(frozen=True)
class Rollout:
    """What is live of a model.

    share: of the ids, that the canary answers: between 0 and 1, or 0 without a canary.
    pool: what the operator has set, else what the champion's declaration asks for.
    """

    model: str
    champion: Version | None
    canary: Version | None = None
    share: float = 0.0
    shadow: Version | None = None
    pool: Pool | None = None

    @property
    def versions(self) -> list[Version]:
        """Those that are live: the champion first."""
        return [v for v in (self.champion, self.canary, self.shadow) if v is not None]


@dataclass(frozen=True)
class Roles:
    """A rollout by the names of its versions. pool: what the operator has set, or None."""

    champion: str
    canary: str | None = None
    share: float = 0.0
    shadow: str | None = None
    pool: Pool | None = None

    @property
    def live(self) -> dict[Role, str]:
        """The versions by role."""
        roles: dict[Role, str | None] = {"champion": self.champion, "canary": self.canary, "shadow": self.shadow}
        return {role: name for role, name in roles.items() if name is not None}

    def role_of(self, version: str) -> Role | None:
        return next((role for role, name in self.live.items() if name == version), None)

    def without(self, version: str) -> Roles:
        """Return what is left when a version is neither canary nor shadow any more."""
        left = self
        if left.canary == version:
            left = replace(left, canary=None, share=0.0)
        if left.shadow == version:
            left = replace(left, shadow=None)
        return left


@dataclass(frozen=True)
class Course:
    """What is live of a model, and what was before each change of it, the newest last. Neighbours differ."""

    now: Roles
    former: tuple[Roles, ...] = ()

    def changed(self, to: Roles) -> Course:
        return self if to == self.now else Course(to, (*self.former, self.now)[-FORMER_MAX:])

    def back(self) -> Course | None:
        """Return the course as it was before the last change, or None if that is not known."""
        return Course(self.former[-1], self.former[:-1]) if self.former else None

    def retiring(self, model: str, version: str) -> Course:
        """Return the course without a version, and without what it had a part in before.

        Raises `RolloutRefused` if it is the champion.
        """
        if self.now.champion == version:
            beside = "".join(f", and `{name}` the {role}" for role, name in self.now.live.items() if role != "champion")
            raise RolloutRefused(
                f"model `{model}` version `{version}`: it is the champion{beside}; promote another version first, or "
                "retire the whole model"
            )
        now = self.now.without(version)
        kept: list[Roles] = []
        for roles in (*self.former, self.now, now):
            # Without what lay between them, neighbours may be the same.
            if roles.role_of(version) is None and (not kept or roles != kept[-1]):
                kept.append(roles)
        return Course(now, tuple(kept[:-1]))


def check_share(as_: Role, share: float | None) -> float:
    """Return the share that a role answers. Raises `BadRequest`."""
    if as_ != "canary":
        if share is not None:
            raise BadRequest(f"share: got {share!r} for the {as_}; only a canary has one; leave it out")
        return 0.0
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise BadRequest(
            f"share: got {share!r}; a canary answers a share of the ids above 0 and below 1, such as 0.05; name one"
        )
    return float(share)


def deployed(model: str, now: Roles | None, version: str, as_: Role, share: float) -> Roles:
    """Return the roles when a version has been given one; others keep theirs.

    Raises `RolloutRefused` if there is no champion beside which it could stand, or it is the champion.
    """
    subject = f"model `{model}` version `{version}`"
    if as_ == "champion":
        return Roles(version) if now is None else replace(now.without(version), champion=version)
    if now is None:
        raise RolloutRefused(f"{subject}: a {as_} stands beside a champion, and there is none; deploy a champion first")
    if now.champion == version:
        raise RolloutRefused(f"{subject}: it is the champion, and cannot be the {as_} too; deploy another version")
    left = now.without(version)
    return replace(left, canary=version, share=share) if as_ == "canary" else replace(left, shadow=version)


def promoted(model: str, now: Roles, version: str | None) -> Roles:
    """Return the roles when a version, or the only one that is canary or shadow, has become champion.

    Raises `RolloutRefused` if no version is named and there are none or two of those.
    """
    if version is None:
        candidates = {role: name for role, name in now.live.items() if role != "champion"}
        if len(candidates) != 1:
            shown = " and ".join(f"{role} `{name}`" for role, name in candidates.items())
            raise RolloutRefused(
                f"model `{model}`: there are {shown}; name the version to promote"
                if candidates
                else f"model `{model}`: there is neither a canary nor a shadow; name the version to promote"
            )
        (version,) = candidates.values()
    return deployed(model, now, version, "champion", 0.0)
