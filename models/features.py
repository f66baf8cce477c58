"""What `predict` gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Features"]


@dataclass(slots=True)
class Features:
    """What `predict` gets, in the order in which the model declares its features.

    matrix: float64 [n, columns], the features of numbers. names: of its columns, `view.feature`; a feature with
    several columns has `view.feature[0]` and on.
    texts: the features of strings by name: n strings, None where there is none, or n tuples of them (of a `LastN`).
    keys: the ids of the rows: key field to n values.
    """

    matrix: npt.NDArray[np.float64]
    names: tuple[str, ...]
    texts: Mapping[str, list[Any]] = field(default_factory=dict)
    keys: Mapping[str, Sequence[Any]] = field(default_factory=dict)
