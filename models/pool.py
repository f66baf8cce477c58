"""A pool: replicas of their own for the models that ask for them, written as one line of a declaration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from millpond.feature_actors.errors import DeclarationError

__all__ = ["Pool"]

_REPLICAS_MAX, _CPUS_MAX, _PIP_MAX, _REQUIREMENT_CHARS_MAX = 1_000, 1_024, 100, 200


@dataclass(frozen=True)
class Pool:
    """Declare the Serve deployment that hosts a model beside the others.

    replicas: how many, or with `replicas_max` the fewest of as many as the load asks for.
    cpus: of each replica, which may be a part of one.
    pip: what is installed for its replicas only, one requirement each.

    Raises `DeclarationError` that names what does not fit.

    >>> Pool(replicas=2, pip=["lightgbm>=4"])
    Pool(replicas=2, cpus=1.0, replicas_max=None, pip=('lightgbm>=4',))
    """

    replicas: int = 1
    cpus: float = 1.0
    replicas_max: int | None = None
    pip: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not _whole(self.replicas, 1):
            raise DeclarationError(f"pool: replicas is {self.replicas!r}; allowed are 1 to {_REPLICAS_MAX}")
        if not (type(self.cpus) in (int, float) and math.isfinite(self.cpus) and 0 < self.cpus <= _CPUS_MAX):
            raise DeclarationError(f"pool: cpus is {self.cpus!r}; allowed are numbers above 0 and up to {_CPUS_MAX}")
        if self.replicas_max is not None and not _whole(self.replicas_max, self.replicas):
            raise DeclarationError(
                f"pool: replicas_max is {self.replicas_max!r}; allowed are {self.replicas} (its replicas) to "
                f"{_REPLICAS_MAX}, or None for a fixed number"
            )
        if not isinstance(self.pip, list | tuple) or len(self.pip) > _PIP_MAX:
            raise DeclarationError(
                f"pool: pip is {self.pip!r:.80}; allowed is a list of at most {_PIP_MAX} requirements"
            )
        for one in self.pip:
            # An option such as `-r` or `--index-url` would name what is not there on another node.
            if (
                not isinstance(one, str)
                or not one.strip()
                or one.strip().startswith("-")
                or not one.isprintable()
                or len(one) > _REQUIREMENT_CHARS_MAX
            ):
                raise DeclarationError(
                    f"pool: pip has {one!r:.80}; allowed are requirements of at most {_REQUIREMENT_CHARS_MAX} "
                    "characters such as `lightgbm>=4`, without options"
                )
        object.__setattr__(self, "cpus", float(self.cpus))
        object.__setattr__(self, "pip", tuple(self.pip))


def _whole(number: object, least: int) -> bool:
    return type(number) is int and least <= number <= _REPLICAS_MAX
