"""Will this customer buy nothing in the next 90 days? Asked of any customer at any time.

The second example: one source, one view, a logistic regression whose weights are an array on disk.
"""

import numpy as np
import numpy.typing as npt

from millpond.feature_actors import Count, FeatureView, Last, Max, Mean, SecondsSince, Source, Sum
from millpond.models import Features, Model
from millpond.models.logistic import Logistic

purchases = Source(
    "purchases",
    owner="checkout",
    about="One event per order of CDs.",
    fields={
        "purchase_id": "string",
        "customer_id": "int64",
        "cds": "float64",
        "amount": "float64",  # dollars
        "bought_at": "timestamp[ms, UTC]",
    },
    event_id="purchase_id",
    event_time="bought_at",
)

customer_orders = FeatureView(
    "customer_orders",
    owner="retention",
    source=purchases,
    key=["customer_id"],
    features={
        "last_amount": Last("amount"),
        "last_cds": Last("cds"),
        "orders": Count(),
        "orders_90d": Count(window="90d"),
        "orders_180d": Count(window="180d"),
        "spend_180d": Sum("amount", window="180d"),
        "mean_amount": Mean("amount"),
        "largest_amount": Max("amount"),
        "recency_s": SecondsSince(),
    },
)


def _inputs(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Counts, amounts and seconds all have long tails: take logarithms; an unknown customer is 0."""
    return np.log1p(np.nan_to_num(matrix))


class Churn:
    """Logistic regression over the logarithms of the features."""

    def __init__(self, weights: str) -> None:
        # What is missing is 0 by now: a NaN is the logarithm of what has none, and no result.
        self._logistic = Logistic.load(weights, missing=np.nan)

    def predict(self, features: Features) -> npt.NDArray[np.float64]:
        return self._logistic.probabilities(_inputs(features.matrix))


churn = Model(
    "churn",
    version="1",
    owner="retention",
    about="Probability that the customer buys nothing in the next 90 days.",
    features=list(customer_orders),
    predictor=Churn,
    artifacts={"weights": "churn.npz"},
)


def train(matrix: npt.NDArray[np.float64], churned: npt.NDArray[np.bool_], path: str) -> None:
    """Train on float64 [customers, features], as the shards served them, and write the artifact."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(_inputs(matrix))
    learner = LogisticRegression(max_iter=1_000).fit(scaler.transform(_inputs(matrix)), churned)
    weights = learner.coef_[0] / scaler.scale_
    Logistic(weights, learner.intercept_[0] - weights @ scaler.mean_).save(path)
