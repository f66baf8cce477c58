"""The definition of `bench score`: the reference model and three more over the same view, with other weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from millpond.bench.reference import Logistic, reference, user_activity

__all__ = ["FOUR", "reference", "three_more", "user_activity"]


class Weighted(Logistic):
    """The reference model with its weights times a number."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.weights = self.weights * times


three_more = [
    replace(reference, name=f"reference_{n}", about="", predictor=partial(Weighted, 1 + n / 10)) for n in (2, 3, 4)
]

FOUR = [reference, *three_more]
