"""`millpond demo churn`: orders of CDs in, the risk that a customer leaves out.

1. Train on six month ends of 1997: every customer of the time, joined to features as of then.
2. Start a cluster, load all orders up to the end of March 1998 in bulk, deploy the model.
3. Replay a week day by day: post the day's orders, then score each customer who ordered; at the end
   score every customer there is, in batches.
4. Post 1,000 more orders one by one, and see each in the score that follows its ack.
5. Compute all the scores again from the raw file, on another number of shards, and compare; let the
   oracle recompute a sample of the features.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from millpond.cluster.cluster import Cluster
from millpond.cluster.config import Config
from millpond.cluster.demo.cdnow import churn_labels, load_purchases
from millpond.cluster.demo.session import Session, percentile
from millpond.cluster.demo.stage import (
    Stage,
    check_scikit_learn,
    epoch_ms,
    instants,
    judge,
    keep_serving,
    offline_model,
    parity,
    sample,
)
from millpond.feature_actors.errors import MillpondError
from millpond.models import Features, training_set
from millpond.models import churn as example
from millpond.models.training import Threads

__all__ = ["run_churn"]

SEED = 0
TRAINED_AS_OF = [f"1997-{month:02d}-01" for month in range(7, 13)]
#: Days that are replayed; the last instant before the second is when every customer is scored.
WEEK = ("1998-03-26", "1998-04-02")
BATCH_IDS = 1_000
PAIRS = 1_000
ORACLE_ROWS = 1_000

MEANINGS = {
    "events": "events sent",
    "events_per_s": "of the bulk load",
    "scores": "scores asked: who ordered in the week, then every customer",
    "score_p50_ms": "half of the single scores took at most",
    "score_p99_ms": "99 of 100 took at most",
    "event_to_score_p50_ms": "post an event, wait for the ack, score it and see it",
    "auc": "of the live scores of every customer: no order in 90 days?",
    "auc_baseline": "the same learner, knowing the last order only",
    "parity_equal": "live scores whose features and result equal the offline ones, bit for bit ...",
    "parity_total": "... of so many",
    "oracle_equal": "rows in which the plain-Python oracle finds every feature right ...",
    "oracle_total": "... of so many",
    "failed_requests": "requests without a good answer",
    "seconds": "the whole demo",
}

#: A scored customer: id, as-of in milliseconds, the answer.
Scored = tuple[int, int, dict[str, Any]]


def run_churn(config: Config, origins: dict[str, str], *, as_json: bool, keep: bool) -> int:
    """Run the demo; return the exit status."""
    check_scikit_learn()
    stage = Stage(config, origins, "churn")
    with stage:
        with stage.step("read the orders of 1997-98"):
            purchases = load_purchases()
            labels = churn_labels(purchases, WEEK[1])
        with stage.step("train on 1997") as advance:
            _train(stage, purchases, labels, advance)
        with stage.step("start the cluster") as advance:
            cluster, definition = stage.cluster(Path(example.__file__))
            advance(note=cluster.url)
        try:
            past = _between(purchases, "1997-01-01", WEEK[0])
            with stage.step("load the past in bulk", len(past)) as advance:
                stage.load(cluster.url, {"purchases": past}, advance)
            with stage.step("deploy the model"):
                cluster.deploy([definition])
            with stage.step("replay a week") as advance:
                scored = _replay(stage, cluster, purchases, labels, advance)
            with stage.step("event, ack, score, seen", PAIRS) as advance:
                _event_to_score(stage, cluster, purchases, advance)
            with stage.step("find every score again"):
                _compare(stage, scored)
            with stage.step("ask the oracle", ORACLE_ROWS) as advance:
                _ask_oracle(stage, purchases, scored, advance)
            status = stage.finish(as_json, MEANINGS, SEED)
            if keep:
                keep_serving(stage, cluster, "churn", {"customer_id": scored[0][0]})
            return status
        finally:
            cluster.stop()


def _between(purchases: pa.Table, start: str, stop: str) -> pa.Table:
    times = instants(purchases, "bought_at")
    first, last = np.searchsorted(times, np.array([start, stop], "datetime64[ms]"))
    return purchases.slice(int(first), int(last - first))


def _train(stage: Stage, purchases: pa.Table, labels: pa.Table, advance: Any) -> None:
    """Train the model and the baseline; note the AUC of the baseline for the live labels."""
    from sklearn.metrics import roc_auc_score

    known = pa.concat_tables([churn_labels(purchases, day) for day in TRAINED_AS_OF])
    features = example.churn.features
    past = training_set(features, known, {"purchases": purchases})
    churned = known["churned"].to_numpy()
    example.train(past.matrix, churned, str(stage.artifacts_dir / "churn.npz"))
    advance(note=f"{len(known):,} labels")
    # The first two features are of the last order alone: what an application knows without history.
    baseline = str(stage.artifacts_dir / "baseline.npz")
    example.train(past.matrix[:, :2], churned, baseline)
    now = training_set(features, labels, {"purchases": purchases})
    scores = example.Churn(baseline).predict(Features(now.matrix[:, :2], ()))
    stage.figures["auc_baseline"] = round(float(roc_auc_score(labels["churned"].to_numpy(), scores)), 4)


def _replay(stage: Stage, cluster: Cluster, purchases: pa.Table, labels: pa.Table, advance: Any) -> list[Scored]:
    from sklearn.metrics import roc_auc_score

    session = Session(cluster.url)
    week = _between(purchases, *WEEK)
    scored: list[Scored] = []
    times_ms: list[float] = []
    for day in np.unique(epoch_ms(week, "bought_at")).tolist():
        orders = [
            {**o, "bought_at": day}
            for o, at in zip(week.to_pylist(), epoch_ms(week, "bought_at").tolist(), strict=True)
            if at == day
        ]
        session.post_events("purchases", orders)
        stage.count("events", len(orders))
        for customer in dict.fromkeys(o["customer_id"] for o in orders):
            answer, took_ms = session.timed_score("churn", {"customer_id": customer}, f"?as_of={day}&features=true")
            if answer is not None:
                scored.append((customer, day, answer))
                times_ms.append(took_ms)
                advance(note=f"score p50 {percentile(times_ms, 50):.1f} ms")
    # Everybody, at the last instant of the week.
    customers, as_of = labels["customer_id"].to_pylist(), epoch_ms(labels, "as_of").tolist()
    everybody: list[float] = []
    for at in range(0, len(customers), BATCH_IDS):
        ids = [{"customer_id": c} for c in customers[at : at + BATCH_IDS]]
        answers, _ = session.timed_score("churn", ids, f"?as_of={as_of[at]}&features=true")
        for customer, when, answer in zip(customers[at:], as_of[at:], answers or (), strict=False):
            scored.append((customer, when, answer))
            everybody.append(answer["result"])
    stage.add_requests(session)
    stage.figures |= {
        "scores": len(scored),
        "score_p50_ms": percentile(times_ms, 50),
        "score_p99_ms": percentile(times_ms, 99),
    }
    if len(everybody) == len(customers):
        stage.figures["auc"] = round(float(roc_auc_score(labels["churned"].to_numpy(), everybody)), 4)
    return scored


def _event_to_score(stage: Stage, cluster: Cluster, purchases: pa.Table, advance: Any) -> None:
    """Post the orders after the week one by one; each score after an ack has to show its order."""
    session = Session(cluster.url)
    times_ms: list[float] = []
    following = _between(purchases, WEEK[1], "1998-07-02").slice(0, PAIRS)
    for order, day in zip(following.to_pylist(), epoch_ms(following, "bought_at").tolist(), strict=True):
        start = time.perf_counter()
        ack = session.post_events("purchases", [{**order, "bought_at": day}])
        answer, _ = session.timed_score("churn", {"customer_id": order["customer_id"]}, f"?as_of={day}&features=true")
        took_ms = (time.perf_counter() - start) * 1e3
        if ack is None or answer is None:
            continue
        seen = (answer["features"]["customer_orders.last_amount"], answer["features"]["customer_orders.last_cds"])
        if seen != (order["amount"], order["cds"]):
            raise MillpondError(f"the score after the ack of {order} does not see it: {answer}", code="stale_read")
        times_ms.append(took_ms)
        advance(1, f"p50 {percentile(times_ms, 50):.1f} ms")
    stage.count("events", len(times_ms))
    stage.figures["event_to_score_p50_ms"] = percentile(times_ms, 50)
    stage.add_requests(session)


def _compare(stage: Stage, scored: list[Scored]) -> None:
    """Compute the scores again, from the raw file and on another number of shards."""
    labels = pa.table(
        {
            "customer_id": pa.array([c for c, _, _ in scored], pa.int64()),
            "as_of": pa.array([at for _, at, _ in scored], pa.timestamp("ms", "UTC")),
        }
    )
    until = _between(load_purchases(), "1997-01-01", WEEK[1])
    threads = Threads(stage.config.shards + 1)
    offline = training_set(example.churn.features, labels, {"purchases": until}, workers=threads)
    results = offline_model(stage, example.churn).predict(offline)
    answers = [answer for _, _, answer in scored]
    stage.figures["parity_equal"] = parity(answers, example.churn, offline, results)
    stage.figures["parity_total"] = len(scored)


def _ask_oracle(stage: Stage, purchases: pa.Table, scored: list[Scored], advance: Any) -> None:
    """Let the oracle recompute the features of a sample of the live answers."""
    rows = [
        ({"customer_id": scored[i][0]}, scored[i][1], scored[i][2]["features"], scored[i][2]["unknown"])
        for i in sample(len(scored), ORACLE_ROWS, SEED)
    ]
    until = _between(purchases, "1997-01-01", WEEK[1])
    stage.figures["oracle_equal"] = judge([example.customer_orders], {"purchases": until}, rows, advance)
    stage.figures["oracle_total"] = len(rows)
