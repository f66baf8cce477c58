"""The definition of `bench score`: the reference model and three more over the same view, with other weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from millpond.bench.reference import INTERCEPT, WEIGHTS, reference, user_activity
from millpond.models.logistic import Logistic

__all__ = ["FOUR", "reference", "three_more", "user_activity"]


def _weighted(n: int) -> partial[Logistic]:
    """Return what makes the reference model with its weights times a number."""
    return partial(Logistic, [weight * (1 + n / 10) for weight in WEIGHTS], INTERCEPT)


three_more = [replace(reference, name=f"reference_{n}", about="", predictor=_weighted(n)) for n in (2, 3, 4)]

FOUR = [reference, *three_more]
