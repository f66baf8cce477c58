"""`millpond demo fraud`: card payments in, the risk that the newest is a fraud out. The stream is made up, see `cards`.

1. Train two models on the payments of ten days, each joined to features as of itself: one that knows habits by
   sketches, and one of counts, sums and means alone. On the four days after, choose for each the threshold with the
   best F1.
2. Start a cluster, load all payments before the last three days in bulk, deploy both models.
3. Replay the last three days: send payments in the order of time, and after each ask both models about its card. What
   is above the threshold is an alarm; precision and recall are of the alarms.
4. Compute all scores again from the raw stream, on another number of shards, and compare; let the oracle recompute a
   sample of the features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.cluster.cluster import Cluster
from millpond.cluster.config import Config
from millpond.cluster.demo.cards import DAYS, START, made_up_payments
from millpond.cluster.demo.session import ARROW_STREAM, Session, arrow_stream, percentile
from millpond.cluster.demo.stage import (
    Stage,
    check_scikit_learn,
    instants,
    judge,
    keep_serving,
    offline_model,
    parity,
    sample,
)
from millpond.models import Features, training_set
from millpond.models import fraud as example
from millpond.models.model import Model
from millpond.models.training import Threads
from millpond.models.trees import BoostedTrees

__all__ = ["run_fraud"]

SEED = 0
#: Days after the start: trained on from, thresholds chosen on from, replayed from. Before, there is too little past.
TRAINED, CHOSEN, REPLAYED = 18, 28, 32
#: Payments are sent so many at a time, of as many cards.
TOGETHER = 16
ORACLE_ROWS = 300
#: What the features are computed of; the label is not sent.
SENT = ["payment_id", "card_id", "merchant", "kind", "amount", "paid_at"]
MODELS: dict[str, Model] = {"fraud": example.fraud, "fraud_plain": example.fraud_plain}

MEANINGS = {
    "events": "events sent",
    "events_per_s": "of the bulk load",
    "scores": "payments of the last three days, each scored by both models",
    "frauds": "of them frauds",
    "score_p50_ms": "half of the scores of the model with sketches took at most",
    "score_p99_ms": "99 of 100 took at most",
    "precision": "of the model with sketches: share of its alarms that are frauds",
    "recall": "share of the frauds that it raises an alarm for",
    "precision_plain": "of the model without them, the same learner",
    "recall_plain": "share of the frauds that it raises an alarm for",
    "average_precision": "of the model with sketches, over all thresholds",
    "average_precision_plain": "of the model without them",
    "parity_equal": "live scores of both models that equal the offline ones, features and result bit for bit ...",
    "parity_total": "... of so many",
    "oracle_equal": "rows in which the plain-Python oracle finds every feature within its stated error ...",
    "oracle_total": "... of so many",
    "failed_requests": "requests without a good answer",
    "seconds": "the whole demo",
}

#: The answers of both models to each payment, in their order, by the model's name; None for one that failed.
Answers = dict[str, list[dict[str, Any] | None]]


def run_fraud(config: Config, origins: dict[str, str], *, as_json: bool, keep: bool) -> int:
    """Run the demo; return the exit status."""
    check_scikit_learn()
    stage = Stage(config, origins, "fraud")
    with stage:
        with stage.step("make up 35 days of payments"):
            payments = made_up_payments(SEED)
            asked = between(payments, REPLAYED, DAYS)
        with stage.step("train on ten days") as advance:
            thresholds = _train(stage, between(payments, 0, REPLAYED), advance)
        with stage.step("start the cluster") as advance:
            cluster, definition = stage.cluster(Path(example.__file__))
            advance(note=cluster.url)
        try:
            past = between(payments, 0, REPLAYED).select(SENT)
            with stage.step("load the past in bulk", len(past)) as advance:
                stage.load(cluster.url, {"payments": past}, advance)
            with stage.step("deploy the models"):
                cluster.deploy([definition])
            with stage.step("replay and ask", len(asked)) as advance:
                answers = _replay(stage, cluster, asked, advance)
            _note_alarms(stage, asked["fraud"].to_numpy(), answers, thresholds)
            with stage.step("find every score again"):
                _compare(stage, payments, asked, answers)
            with stage.step("ask the oracle", ORACLE_ROWS) as advance:
                _ask_oracle(stage, payments, asked, answers["fraud"], advance)
            status = stage.finish(as_json, MEANINGS, SEED)
            if keep:
                keep_serving(stage, cluster, "fraud", {"card_id": asked["card_id"][0].as_py()})
            return status
        finally:
            cluster.stop()


def between(payments: pa.Table, first_day: int, last_day: int) -> pa.Table:
    """Return the payments of some days after the start, the last not among them."""
    bounds = np.datetime64(START, "ms") + np.array([first_day, last_day], "timedelta64[D]")
    first, last = np.searchsorted(instants(payments, "paid_at"), bounds)
    return payments.slice(int(first), int(last - first))


def questions(payments: pa.Table) -> pa.Table:
    """Return the label rows of payments: the card, as of the payment."""
    return pa.table({"card_id": payments["card_id"], "as_of": payments["paid_at"]})


def _train(stage: Stage, payments: pa.Table, advance: Any) -> dict[str, float]:
    """Train both models; return the threshold of each."""
    known, choosing = between(payments, TRAINED, CHOSEN), between(payments, CHOSEN, REPLAYED)
    labels = pa.concat_tables([known, choosing])
    advance(note=f"{len(known):,} payments")
    rows = training_set(example.fraud.features, questions(labels), {"payments": payments.select(SENT)})
    fraud, thresholds = labels["fraud"].to_numpy(), {}
    for name, model in MODELS.items():
        matrix = rows.matrix[:, : sum(f.width for f in model.features)]  # those of the plain one come first
        path = str(stage.artifacts_dir / f"{name}.npz")
        example.train(matrix[: len(known)], fraud[: len(known)], path)
        scores = BoostedTrees(path).predict(Features(matrix[len(known) :], ()))
        thresholds[name] = _threshold(fraud[len(known) :], scores)
    return thresholds


def _threshold(fraud: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64]) -> float:
    """Return the threshold with the best F1."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(fraud, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[np.argmax(f1[:-1])])


def _together(payments: pa.Table) -> Iterator[pa.Table]:
    """Yield the payments in pieces in which each card has one at most."""
    start, cards = 0, set[int]()
    for row, card in enumerate(payments["card_id"].to_pylist()):
        if card in cards or len(cards) == TOGETHER:
            yield payments.slice(start, row - start)
            start, cards = row, set()
        cards.add(card)
    if cards:
        yield payments.slice(start)


def _replay(stage: Stage, cluster: Cluster, payments: pa.Table, advance: Any) -> Answers:
    session = Session(cluster.url)
    answers: Answers = {name: [] for name in MODELS}
    times_ms: list[float] = []
    for piece in _together(payments):
        session.post("/v1/events/payments", arrow_stream(piece.select(SENT)), ARROW_STREAM)
        stage.count("events", len(piece))
        for card in piece["card_id"].to_pylist():
            for name, of_model in answers.items():
                answer, took_ms = session.timed_score(name, {"card_id": card}, "?features=true")
                of_model.append(answer)
                if name == "fraud":
                    times_ms.append(took_ms)
        advance(len(piece), f"p50 {percentile(times_ms, 50):.1f} ms")
    stage.add_requests(session)
    stage.figures |= {
        "scores": len(payments),
        "score_p50_ms": percentile(times_ms, 50),
        "score_p99_ms": percentile(times_ms, 99),
    }
    return answers


def _note_alarms(stage: Stage, fraud: npt.NDArray[np.bool_], answers: Answers, thresholds: dict[str, float]) -> None:
    from sklearn.metrics import average_precision_score, precision_score, recall_score

    stage.figures["frauds"] = int(fraud.sum())
    for name, suffix in (("fraud", ""), ("fraud_plain", "_plain")):
        scores = np.array([0.0 if answer is None else answer["result"] for answer in answers[name]])
        alarms = scores >= thresholds[name]
        stage.figures |= {
            f"precision{suffix}": round(float(precision_score(fraud, alarms)), 4),
            f"recall{suffix}": round(float(recall_score(fraud, alarms)), 4),
            f"average_precision{suffix}": round(float(average_precision_score(fraud, scores)), 4),
        }


def _as_of_ms(answers: Sequence[dict[str, Any] | None]) -> list[int]:
    """Return the times that cards were asked as of; of one that was not answered, the start."""
    texts = [START if answer is None else answer["as_of"].removesuffix("Z") for answer in answers]
    return np.array(texts, "datetime64[ms]").astype(np.int64).tolist()  # type: ignore[no-any-return]


def _compare(stage: Stage, payments: pa.Table, asked: pa.Table, answers: Answers) -> None:
    """Compute the scores again, from the raw stream and on another number of shards."""
    stage.figures |= {"parity_equal": 0, "parity_total": 0}
    for name, model in MODELS.items():
        as_of = pa.array(_as_of_ms(answers[name]), pa.timestamp("ms", "UTC"))
        labels = pa.table({"card_id": asked["card_id"], "as_of": as_of})
        events = {"payments": payments.select(SENT)}
        threads = Threads(stage.config.shards + 1)
        offline = training_set(model.features, labels, events, workers=threads)
        results = offline_model(stage, model).predict(offline)
        stage.figures["parity_equal"] += parity(answers[name], model, offline, results)
        stage.figures["parity_total"] += len(labels)


def _ask_oracle(
    stage: Stage, payments: pa.Table, asked: pa.Table, answers: Sequence[dict[str, Any] | None], advance: Any
) -> None:
    """Let the oracle recompute the features of a sample of the live answers."""
    cards, as_of = asked["card_id"].to_pylist(), _as_of_ms(answers)
    rows = [
        ({"card_id": cards[i]}, as_of[i], answer["features"], answer["unknown"])
        for i in sample(len(answers), ORACLE_ROWS, SEED)
        if (answer := answers[i]) is not None
    ]
    views = [example.card_payments, example.card_habits]
    stage.figures["oracle_equal"] = judge(views, {"payments": payments.select(SENT)}, rows, advance)
    stage.figures["oracle_total"] = len(rows)
