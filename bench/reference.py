"""The reference view, model and load: what every figure of the score endpoint is measured on.

The file is a definition, so it travels to the cluster as text like any team's own. Changing anything
here makes new figures incomparable with older ones.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa

from millpond.feature_actors import Count, FeatureView, Last, Max, SecondsSince, Source, Sum
from millpond.models import Model
from millpond.models.logistic import Logistic

USERS = 100_000
EVENTS = 1_000_000
SPAN_MS = 7 * 86_400_000
#: The newest event is so old: `now` of another process may be a little behind ours.
GAP_MS = 1_000

activity = Source(
    "activity",
    owner="bench",
    about="One event per thing that a user did.",
    fields={
        "event_id": "string",
        "user_id": "int64",
        "item_id": "string",
        "category": "string",
        "amount": "float64",
        "event_time": "timestamp[ms, UTC]",
    },
    event_id="event_id",
    event_time="event_time",
)

user_activity = FeatureView(
    "user_activity",
    owner="bench",
    source=activity,
    key=["user_id"],
    features={
        "count_1h": Count(window="1h"),
        "count_24h": Count(window="24h"),
        "count_7d": Count(window="7d"),
        "sum_1h": Sum("amount", window="1h"),
        "sum_24h": Sum("amount", window="24h"),
        "sum_7d": Sum("amount", window="7d"),
        "max_1h": Max("amount", window="1h"),
        "max_24h": Max("amount", window="24h"),
        "max_7d": Max("amount", window="7d"),
        "last_amount": Last("amount"),
        "recency_s": SecondsSince(),
    },
)


#: Of the eleven features, as they are; and the intercept.
WEIGHTS = (0.9, 0.4, 0.1, 0.02, 0.005, 0.001, 0.03, 0.01, 0.004, 0.02, -2e-6)
INTERCEPT = -2.5


reference = Model(
    "reference",
    version="1",
    owner="bench",
    about="Logistic regression over eleven features of one view.",
    features=list(user_activity),
    predictor=partial(Logistic, WEIGHTS, INTERCEPT),
)


def reference_events(seed: int, now_ms: int, *, users: int = USERS, events: int = EVENTS) -> pa.Table:
    """Return the events of the last seven days, in time order; each user has one at least.

    The same seed gives the same users, items and amounts, at the same distances from `now_ms`.
    """
    assert users <= events
    draw = np.random.default_rng(seed)
    user = np.concatenate([np.arange(users), draw.integers(0, users, events - users)])
    draw.shuffle(user)
    age_ms = np.sort(draw.integers(GAP_MS, SPAN_MS, events))[::-1]
    item = draw.integers(0, 10_000, events)
    category = pa.array([f"category-{c:02d}" for c in range(20)])
    return pa.table(
        {
            "event_id": pa.array([f"{seed}-{n}" for n in range(events)]),
            "user_id": pa.array(user),
            "item_id": pa.array([f"item-{i}" for i in range(10_000)]).take(pa.array(item)),
            "category": category.take(pa.array(item % 20)),
            "amount": pa.array(np.round(draw.exponential(20.0, events), 2)),
            "event_time": pa.array(now_ms - age_ms).cast(pa.timestamp("ms", tz="UTC")),
        }
    )
