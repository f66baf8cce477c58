"""The definition that `bench events` and `bench faults` run: views of two keys in which every event counts for ever.

The reference view by user; a smaller one by item; and beside each an account, number and sum of all its entity's
events since the beginning: what was acknowledged can be counted again there. Each has a model that answers it whole.
The file is a definition, so it travels to the cluster as text like any team's own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from millpond.bench.reference import activity, user_activity
from millpond.feature_actors import Count, FeatureView, Sum
from millpond.models import Features, Model

__all__ = ["activity", "item_activity", "item_model", "pair_model", "user_account", "user_activity", "user_model"]

user_account = FeatureView(
    "user_account",
    owner="bench",
    source=activity,
    key=["user_id"],
    features={"events": Count(), "amount": Sum("amount")},
)

item_activity = FeatureView(
    "item_activity",
    owner="bench",
    source=activity,
    key=["item_id"],
    features={
        "count_1h": Count(window="1h"),
        "count_24h": Count(window="24h"),
        "sum_1h": Sum("amount", window="1h"),
        "sum_24h": Sum("amount", window="24h"),
        "events": Count(),
        "amount": Sum("amount"),
    },
)


class AsRead:
    """Answer the features as they are, a list an id."""

    def predict(self, features: Features) -> npt.NDArray[np.float64]:
        return features.matrix


user_model = Model(
    "user_account",
    version="1",
    owner="bench",
    about="Number and sum of all events of a user.",
    features=[user_account["events"], user_account["amount"]],
    predictor=AsRead,
)

item_model = Model(
    "item_account",
    version="1",
    owner="bench",
    about="Number and sum of all events of an item.",
    features=[item_activity["events"], item_activity["amount"]],
    predictor=AsRead,
)

pair_model = Model(
    "pair_account",
    version="1",
    owner="bench",
    about="Number of all events of a user and of an item, which may lie on two shards.",
    features=[user_account["events"], item_activity["events"]],
    predictor=AsRead,
)
