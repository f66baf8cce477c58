"""`millpond demo`: a year of flights in, delay scores out.

1. Train on January to November: labels joined to features as of each departure.
2. Start a cluster, load January to November in bulk, deploy the model.
3. Replay a December week minute by minute: post the minute's events, then score each departure of the
   minute as of it.
4. Post 1,000 more departures one by one, and see each in the score that follows its ack.
5. Compute the week's scores again from the raw files, on another number of shards, and compare; let
   the oracle recompute a sample of the features.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from millpond.cluster.cluster import Cluster
from millpond.cluster.config import Config
from millpond.cluster.demo.flights import Flights, load_flights
from millpond.cluster.demo.session import Session, percentile
from millpond.cluster.demo.stage import (
    Stage,
    check_scikit_learn,
    epoch_ms,
    judge,
    keep_serving,
    offline_model,
    parity,
    sample,
)
from millpond.feature_actors.errors import MillpondError
from millpond.models import Features
from millpond.models import flight_delay as example
from millpond.models.training import Threads, training_set
from millpond.models.trees import BoostedTrees

__all__ = ["run_flight_delay"]

SEED = 0
#: The week that is replayed, whole days UTC. The lift over the baseline differs from week to week.
WEEK = ("2013-12-09", "2013-12-16")
YEAR = "2013-01-01"
PAIRS = 1_000
ORACLE_ROWS = 1_000

_KEY = ("tailnum", "carrier", "origin", "dest")
_OF_THE_FLIGHT = ("distance", "sched_dep_hour", "weekday", "dep_delay")

MEANINGS = {
    "events": "events sent",
    "events_per_s": "of the bulk load, four views per event",
    "scores": "scores asked, one per departure of the week",
    "score_p50_ms": "half of the scores took at most",
    "score_p99_ms": "99 of 100 took at most",
    "event_to_score_p50_ms": "post an event, wait for the ack, score it and see it",
    "auc": "of the live scores: late by more than 15 minutes?",
    "auc_baseline": "the same learner without history features",
    "parity_equal": "live scores whose features and result equal the offline ones, bit for bit ...",
    "parity_total": "... of so many",
    "oracle_equal": "rows in which the plain-Python oracle finds every feature right ...",
    "oracle_total": "... of so many",
    "failed_requests": "requests without a good answer",
    "seconds": "the whole demo",
}


def run_flight_delay(config: Config, origins: dict[str, str], *, as_json: bool, keep: bool) -> int:
    """Run the demo; return the exit status."""
    check_scikit_learn()
    stage = Stage(config, origins, "flights")
    with stage:
        with stage.step("read the flights of 2013"):
            flights = load_flights()
        with stage.step("train on January-November") as advance:
            _train(stage, flights, advance)
        with stage.step("start the cluster") as advance:
            cluster, definition = stage.cluster(Path(example.__file__))
            advance(note=cluster.url)
        try:
            past = flights.between(YEAR, WEEK[0])
            with stage.step("load the past in bulk", len(past.departures) + len(past.arrivals)) as advance:
                stage.load(cluster.url, {"departures": past.departures, "arrivals": past.arrivals}, advance)
            with stage.step("deploy the model"):
                cluster.deploy([definition])
            week = flights.between(*WEEK)
            with stage.step("replay a December week", len(week.departures)) as advance:
                answers = _replay(stage, cluster, week, advance)
            with stage.step("event, ack, score, seen", PAIRS) as advance:
                _event_to_score(stage, cluster, flights, advance)
            with stage.step("find every score again"):
                _compare(stage, answers)
            with stage.step("ask the oracle", ORACLE_ROWS) as advance:
                _ask_oracle(stage, flights, week, answers, advance)
            status = stage.finish(as_json, MEANINGS, SEED)
            if keep:
                keep_serving(stage, cluster, "flight_delay", week.departures.select(_KEY).slice(0, 1).to_pylist()[0])
            return status
        finally:
            cluster.stop()


def _train(stage: Stage, flights: Flights, advance: Any) -> None:
    """Train the model and the baseline on all departures before December; note the baseline's AUC."""
    from sklearn.metrics import roc_auc_score
    from threadpoolctl import threadpool_limits

    rows = training_set(
        example.flight_delay.features,
        flights.labels,
        {"departures": flights.departures, "arrivals": flights.arrivals},
    )
    late = flights.labels["late"].to_numpy()
    times = rows.as_of.view("datetime64[ms]")
    train = times < np.datetime64("2013-12-01")
    week = (times >= np.datetime64(WEEK[0])) & (times < np.datetime64(WEEK[1]))
    # What a flight says of itself without any history, carrier and airports as numbers.
    codes = [flights.labels[c].combine_chunks().dictionary_encode().indices.to_numpy() for c in _KEY[1:]]
    static = np.column_stack([rows.matrix[:, :4], *codes])
    trained = stage.artifacts_dir / "flight_delay.npz"
    baseline = stage.artifacts_dir / "baseline.npz"
    # A second OpenMP thread gains little here and loses much when something else has the core.
    with threadpool_limits(1, user_api="openmp"):
        example.train(rows.matrix[train], late[train], str(trained))
        advance(note=f"{train.sum():,} flights")
        example.train(static[train], late[train], str(baseline))
    predictor = BoostedTrees(str(baseline))
    scores = predictor.predict(Features(static[week], ()))
    stage.figures["auc_baseline"] = round(float(roc_auc_score(late[week], scores)), 4)


def _minutes(table: pa.Table, column: str) -> dict[int, list[dict[str, Any]]]:
    """Return the events of each minute, times as milliseconds, in their order."""
    minutes: dict[int, list[dict[str, Any]]] = {}
    for time_ms, event in zip(epoch_ms(table, column).tolist(), table.to_pylist(), strict=True):
        minutes.setdefault(time_ms, []).append({**event, column: time_ms})
    return minutes


def _replay(stage: Stage, cluster: Cluster, week: Flights, advance: Any) -> list[dict[str, Any] | None]:
    """Play the week; return the answers, one per departure, in the order of the departures."""
    from sklearn.metrics import roc_auc_score

    departures, arrivals = _minutes(week.departures, "departed_at"), _minutes(week.arrivals, "arrived_at")
    session = Session(cluster.url)
    answers: list[dict[str, Any] | None] = []
    times_ms: list[float] = []
    for minute in sorted(departures.keys() | arrivals.keys()):
        for source, events in (("departures", departures.get(minute)), ("arrivals", arrivals.get(minute))):
            if events:
                session.post_events(source, events)
                stage.count("events", len(events))
        for flight in departures.get(minute, ()):
            key = {name: flight[name] for name in _KEY}
            answer, took_ms = session.timed_score("flight_delay", key, f"?as_of={minute}&features=true")
            answers.append(answer)
            if answer is not None:
                times_ms.append(took_ms)
        advance(len(departures.get(minute, ())), f"score p50 {percentile(times_ms or [0.0], 50):.1f} ms")
    stage.add_requests(session)
    stage.figures |= {
        "scores": len(times_ms),
        "score_p50_ms": percentile(times_ms, 50),
        "score_p99_ms": percentile(times_ms, 99),
    }
    late = dict(zip(week.labels["flight_id"].to_pylist(), week.labels["late"].to_pylist(), strict=True))
    judged = [
        (late[flight], answer["result"])
        for flight, answer in zip(week.departures["flight_id"].to_pylist(), answers, strict=True)
        if flight in late and answer is not None
    ]
    stage.figures["auc"] = round(float(roc_auc_score(*zip(*judged, strict=True))), 4)
    return answers


def _event_to_score(stage: Stage, cluster: Cluster, flights: Flights, advance: Any) -> None:
    """Post the departures after the week one by one; each score after an ack has to show its event."""
    session = Session(cluster.url)
    times_ms: list[float] = []
    following = flights.between(WEEK[1], "2014-01-02").departures.slice(0, PAIRS)
    for minute, events in _minutes(following, "departed_at").items():
        for event in events:
            start = time.perf_counter()
            ack = session.post_events("departures", [event])
            answer, _ = session.timed_score(
                "flight_delay", {n: event[n] for n in _KEY}, f"?as_of={minute}&features=true"
            )
            took_ms = (time.perf_counter() - start) * 1e3
            if ack is None or answer is None:
                continue
            seen = {n: answer["features"][f"this_departure.{n}"] for n in _OF_THE_FLIGHT}
            if seen != {n: event[n] for n in _OF_THE_FLIGHT}:
                raise MillpondError(f"the score after the ack of {event} does not see it: {answer}", code="stale_read")
            times_ms.append(took_ms)
            advance(1, f"p50 {percentile(times_ms, 50):.1f} ms")
    stage.count("events", len(times_ms))
    stage.figures["event_to_score_p50_ms"] = percentile(times_ms, 50)
    stage.add_requests(session)


def _compare(stage: Stage, answers: list[dict[str, Any] | None]) -> None:
    """Compute the week again, from the raw files and on another number of shards."""
    flights = load_flights()
    asked = flights.between(*WEEK).departures
    labels = asked.select(_KEY).append_column("as_of", asked["departed_at"])
    until = flights.between(YEAR, WEEK[1])
    offline = training_set(
        example.flight_delay.features,
        labels,
        {"departures": until.departures, "arrivals": until.arrivals},
        workers=Threads(stage.config.shards + 1),
    )
    results = offline_model(stage, example.flight_delay).predict(offline)
    stage.figures["parity_equal"] = parity(answers, example.flight_delay, offline, results)
    stage.figures["parity_total"] = len(answers)


def _ask_oracle(
    stage: Stage, flights: Flights, week: Flights, answers: list[dict[str, Any] | None], advance: Any
) -> None:
    """Let the oracle recompute the features of a sample of the live answers."""
    keys = week.departures.select(_KEY).to_pylist()
    as_of = epoch_ms(week.departures, "departed_at").tolist()
    rows = [
        (keys[i], as_of[i], answer["features"], answer["unknown"])
        for i in sample(len(answers), ORACLE_ROWS, SEED)
        if (answer := answers[i]) is not None
    ]
    views = list({f.view.name: f.view for f in example.flight_delay.features}.values())
    until = flights.between(YEAR, WEEK[1])
    events = {"departures": until.departures, "arrivals": until.arrivals}
    stage.figures["oracle_equal"] = judge(views, events, rows, advance)
    stage.figures["oracle_total"] = len(rows)
