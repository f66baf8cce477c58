"""Is the payment that this card has just made a fraud? Asked of a card, after the payment has been sent.

The fourth example: what is unusual for a card, told by sketches: how many merchants in an hour, how the payment lies
among those of a month, what was spent lately with the older fading out, how many small payments in a row. Beside it
`fraud_plain`, the same learner with counts, sums, means and deviations alone: what the sketches have to beat.
"""

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from millpond.feature_actors import (
    Count,
    DecayedCount,
    DecayedSum,
    Distinct,
    Entropy,
    FeatureView,
    Last,
    Max,
    Mean,
    Median,
    Quantile,
    Ratio,
    Source,
    Std,
    Streak,
    Sum,
)
from millpond.models import Model
from millpond.models.trees import BoostedTrees, save_trees

OWNER = "card-risk"
KINDS = ["grocery", "restaurant", "fuel", "clothes", "online", "travel"]
SMALL = pc.field("amount") < 3.0

payments = Source(
    "payments",
    owner="authorisation",
    about="One event per payment with a card.",
    fields={
        "payment_id": "string",
        "card_id": "int64",
        "merchant": "string",
        "kind": "string",  # of the merchant
        "amount": "float64",  # dollars
        "paid_at": "timestamp[ms, UTC]",
    },
    event_id="payment_id",
    event_time="paid_at",
)

card_payments = FeatureView(
    "card_payments",
    owner=OWNER,
    source=payments,
    key=["card_id"],
    features={
        "last_amount": Last("amount"),
        "payments_1h": Count(window="1h"),
        "payments_24h": Count(window="24h"),
        "payments_30d": Count(window="30d"),
        "spend_1h": Sum("amount", window="1h"),
        "spend_24h": Sum("amount", window="24h"),
        "mean_30d": Mean("amount", window="30d"),
        "std_30d": Std("amount", window="30d"),
        "max_30d": Max("amount", window="30d"),
        "to_mean": Ratio("last_amount", "mean_30d"),
    },
)

card_habits = FeatureView(
    "card_habits",
    owner=OWNER,
    source=payments,
    key=["card_id"],
    features={
        "merchants_1h": Distinct("merchant", window="1h", m=16),
        "merchants_24h": Distinct("merchant", window="24h", m=32),
        "merchants_30d": Distinct("merchant", window="30d", m=64),
        "median_30d": Median("amount", window="30d"),
        "dear_30d": Quantile("amount", q=0.95, window="30d"),
        "spend_fading": DecayedSum("amount", half_life="3h"),
        "payments_fading": DecayedCount(half_life="3h"),
        "usual_spend": DecayedSum("amount", half_life="7d"),
        "small_in_a_row": Streak(of=SMALL, n=8),
        "mixture_24h": Entropy("kind", categories=KINDS, window="24h"),
        "lately": Ratio("spend_fading", "usual_spend"),
        "spread": Ratio("merchants_24h", "merchants_30d"),
        # The same as those of `card_payments`, and kept once: ratios are of features of one view.
        "last_amount": Last("amount"),
        "payments_24h": Count(window="24h"),
        "to_median": Ratio("last_amount", "median_30d"),
        "to_dear": Ratio("last_amount", "dear_30d"),
        "new_places": Ratio("merchants_24h", "payments_24h"),
    },
)
#: What the model knows besides, in the order of its inputs.
HABITS = [f for f in card_habits if f.name not in card_payments.features]


def train(matrix: npt.NDArray[np.float64], fraud: npt.NDArray[np.bool_], path: str) -> None:
    """Train on float64 [payments, features], as the shards served them, and write the artifact."""
    from sklearn.ensemble import HistGradientBoostingClassifier as Boosting

    learner = Boosting(
        max_iter=200, learning_rate=0.05, max_leaf_nodes=8, min_samples_leaf=50, early_stopping=False, random_state=0
    )
    save_trees(learner.fit(matrix, fraud), path)


fraud = Model(
    "fraud",
    version="1",
    owner=OWNER,
    about="Probability that the newest payment of the card is a fraud.",
    features=[*card_payments, *HABITS],
    predictor=BoostedTrees,
    artifacts={"trees": "fraud.npz"},
)

fraud_plain = Model(
    "fraud_plain",
    version="1",
    owner=OWNER,
    about="The same, of counts, sums and means alone.",
    features=list(card_payments),
    predictor=BoostedTrees,
    artifacts={"trees": "fraud_plain.npz"},
)
