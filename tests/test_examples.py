"""The example models that have one stage, as a team would test them: with the test kit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millpond.cluster.demo.cards import made_up_payments
from millpond.feature_actors import FeatureView
from millpond.feature_actors.testing import TestCluster, assert_parity
from millpond.models import churn, flight_delay, fraud
from millpond.models.model import PredictionFailed

HOUR, DAY = 3_600_000, 86_400_000
T = 1_700_000_000_000
EXAMPLES = Path(churn.__file__).parent


def order(n: int, customer_id: int, at: int, cds: float = 1.0, amount: float = 10.0) -> dict[str, Any]:
    return {"purchase_id": f"p{n}", "customer_id": customer_id, "cds": cds, "amount": amount, "bought_at": at}


def flight(n: int, at: int, **more: Any) -> dict[str, Any]:
    origin, dest = [("EWR", "ORD"), ("JFK", "LAX"), ("EWR", "LAX")][n % 3]
    return {"flight_id": f"f{n}", "tailnum": f"N{n % 4}", "carrier": ("UA", "DL")[n % 2], "origin": origin,
            "dest": dest, **more}  # fmt: skip


def departure(n: int, at: int) -> dict[str, Any]:
    return flight(n, at, flight=n, distance=700.0 + n, sched_dep_hour=float(n % 24), weekday=float(n % 7),
                  dep_delay=float(n * 7 % 90 - 10), departed_at=at)  # fmt: skip


def arrival(n: int, at: int) -> dict[str, Any]:
    diverted = n % 9 == 0
    return flight(n, at, arr_delay=None if diverted else float(n * 5 % 120 - 20),
                  air_time=None if diverted else 60.0 + n % 30, arrived_at=at)  # fmt: skip


def payment(n: int, at: int, amount: float, merchant: str = "m1", kind: str = "grocery") -> dict[str, Any]:
    return {"payment_id": f"p{n}", "card_id": 7, "merchant": merchant, "kind": kind, "amount": amount, "paid_at": at}


ORDERS = [order(n, n % 6, T + n * n * HOUR, 1.0 + n % 3, float(n * 13 % 50)) for n in range(60)]
DEPARTURES = [departure(n, T + n * HOUR // 2) for n in range(120)]
ARRIVALS = [arrival(n, T + n * HOUR // 2 + 2 * HOUR) for n in range(120)]


# -- churn


@pytest.fixture
def customers(tmp_path: Path) -> Iterator[TestCluster]:
    np.savez(tmp_path / "churn.npz", weights=np.array([0, 0, 0.5, -1, 0, 0, 0, 0, 0.25]), intercept=-1.0)
    with TestCluster.of_file(EXAMPLES / "churn.py", artifacts=tmp_path) as cluster:
        yield cluster


def test_churn_of_a_customer_computed_by_hand(customers: TestCluster) -> None:
    customers.send("purchases", [order(0, 7, T, amount=20.0), order(1, 7, T + 100 * DAY)])
    customers.at(T + 120 * DAY)
    found = customers.features("customer_orders", customer_id=7).features
    assert (found["orders"], found["orders_90d"], found["spend_180d"], found["mean_amount"]) == (2, 1, 30, 15)
    margin = 0.5 * np.log(3) - np.log(2) + 0.25 * np.log1p(20 * DAY / 1000) - 1
    assert customers.score("churn", customer_id=7).result == pytest.approx(1 / (1 + np.exp(-margin)), rel=1e-12)


def test_a_customer_without_orders_is_unknown_and_has_the_score_of_zeros(customers: TestCluster) -> None:
    customers.send("purchases", ORDERS)
    score = customers.score("churn", customer_id=99)
    assert (score.unknown, score.result) == (["customer_orders"], pytest.approx(1 / (1 + np.e), rel=1e-12))


def test_of_amounts_that_have_no_logarithm_there_is_no_score(customers: TestCluster) -> None:
    customers.send("purchases", [order(0, 7, T, amount=-50.0), order(1, 8, T)])
    with pytest.raises(PredictionFailed, match="nan"):
        customers.score("churn", customer_id=7)
    bad, good = customers.score("churn", [{"customer_id": 7}, {"customer_id": 8}])
    assert isinstance(bad, PredictionFailed)
    assert not isinstance(good, PredictionFailed)
    assert 0 < good.result < 1


def test_who_orders_again_is_less_likely_to_leave(customers: TestCluster) -> None:
    customers.send("purchases", [order(0, 1, T), order(1, 2, T)])
    customers.at(T + 80 * DAY).send("purchases", order(2, 2, T + 80 * DAY))
    stays, leaves = (customers.score("churn", customer_id=customer).result for customer in (2, 1))
    assert stays < leaves


# -- flight_delay


def test_a_late_aircraft_and_its_route_are_what_a_delay_is_predicted_from(
    tmp_path: Path, millpond_cluster: Callable[..., TestCluster]
) -> None:
    features = flight_delay.flight_delay.features
    random = np.random.default_rng(1)
    matrix = random.normal(size=(1_200, len(features)))
    late_by = [f.full_name for f in features].index("aircraft_arrivals.last_arr_delay")
    flight_delay.train(matrix, matrix[:, late_by] > 0, str(tmp_path / "flight_delay.npz"))
    c = millpond_cluster(EXAMPLES / "flight_delay.py", artifacts=tmp_path)
    c.send("departures", DEPARTURES)
    key = {name: DEPARTURES[-1][name] for name in ("tailnum", "origin", "carrier", "dest")}
    results = []
    for n, delay in ((1_000, -30.0), (2_000, 45.0)):
        c.send("arrivals", {**arrival(n, T + 60 * HOUR), **key, "arr_delay": delay})
        answer = c.score("flight_delay", key, features=True)
        assert answer.features is not None
        assert answer.features["aircraft_arrivals.last_arr_delay"] == delay
        results.append(answer.result)
    assert results[0] < 0.5 < results[1]
    assert answer.unknown == []


# -- fraud


@pytest.fixture
def cards(tmp_path: Path, millpond_cluster: Callable[..., TestCluster]) -> TestCluster:
    random = np.random.default_rng(1)
    for model in (fraud.fraud, fraud.fraud_plain):
        names = [f.full_name for f in model.features]
        matrix = random.normal(5, 4, size=(1_200, len(names)))
        tells = matrix[:, names.index("card_habits.merchants_1h" if model is fraud.fraud else names[0])] > 5
        fraud.train(matrix, tells, str(tmp_path / f"{model.name}.npz"))
    return millpond_cluster(EXAMPLES / "fraud.py", artifacts=tmp_path)


def test_what_is_unusual_of_a_card_computed_by_hand(cards: TestCluster) -> None:
    usual = [payment(n, T + n * DAY, 20.0 + n) for n in range(10)]
    cards.send("payments", usual)
    burst = [payment(100 + n, T + 9 * DAY + 2 * HOUR + n * 60_000, 1.0, f"new{n}", "online") for n in range(1, 7)]
    cards.send("payments", burst)
    found = cards.at(T + 9 * DAY + 2 * HOUR + 6 * 60_000).features("card_habits", card_id=7).features
    assert (found["merchants_1h"], found["merchants_30d"], found["small_in_a_row"]) == (6, 7, 6)
    assert found["median_30d"] == pytest.approx((21 + 22) / 2, rel=0.01)
    assert found["mixture_24h"] == pytest.approx(-(1 / 7 * np.log2(1 / 7) + 6 / 7 * np.log2(6 / 7)), abs=1e-12)
    assert found["new_places"] == 1


def test_many_merchants_in_an_hour_tell_a_fraud(cards: TestCluster) -> None:
    cards.send("payments", [payment(n, T + n * 60_000, 20.0) for n in range(12)])
    before = cards.score("fraud", card_id=7).result
    cards.send("payments", [payment(100 + n, T + n * 60_000, 20.0, f"new{n}") for n in range(12, 24)])
    assert before < 0.5 < cards.score("fraud", card_id=7).result


def test_the_stream_of_payments_is_the_same_for_the_same_seed_and_has_few_frauds() -> None:
    some = made_up_payments(3, cards=40)
    assert some.equals(made_up_payments(3, cards=40))
    assert not some.equals(made_up_payments(4, cards=40))
    assert 0 < some["fraud"].to_numpy().mean() < 0.1
    assert (np.diff(some["paid_at"].to_numpy()) >= np.timedelta64(0)).all()


# -- parity

VIEWS = {
    view.name: view
    for model in (churn.churn, flight_delay.flight_delay, fraud.fraud)
    for view in (f.view for f in model.features)
}
OF_SOURCE = {
    "purchases": ORDERS, "departures": DEPARTURES, "arrivals": ARRIVALS,
    "payments": made_up_payments(0, cards=4).drop(["fraud"]).slice(0, 300).to_pylist(),
}  # fmt: skip


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_every_view_is_what_the_oracle_says(view: FeatureView) -> None:
    assert assert_parity(view, OF_SOURCE[view.source.name], times=3, shards=2)
