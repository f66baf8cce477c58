"""`millpond demo recommend`: ratings of films in, ten films of a genre out.

1. Train on the ratings up to the cut, asked as the cluster will be: a user and a genre, at the middle of what the user
   rates.
2. Start a cluster, load the ratings up to the cut in bulk, deploy the model and what it has to beat: the films of the
   genre that most have rated in the last 30 days, without those that the user has rated.
3. Replay the weeks after the cut. In the middle of each user's ratings ask both for every genre that the user goes on
   to rate; a hit is a list with the film of the genre that the user rates next. Nothing has been chosen by these weeks.
4. Compute all lists again from the raw file, on another number of shards, and compare; let the oracle recompute a
   sample of the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from millpond.cluster.cluster import Cluster
from millpond.cluster.config import Config
from millpond.cluster.demo.movielens import load_ratings, next_films
from millpond.cluster.demo.session import ARROW_STREAM, Session, arrow_stream, percentile
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
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.view import Feature
from millpond.models import Features, Model, training_set
from millpond.models import recommend as example
from millpond.models.training import Threads

__all__ = ["Past", "run_recommend", "train_recommend"]

SEED = 0
#: All times, of which four fifths of the ratings lie before the cut.
BEGIN, CUT, END = "1997-09-01", "1998-03-07", "1998-05-01"
TRAINED_QUESTIONS = 3_000
ORACLE_ROWS = 60

MEANINGS = {
    "events": "events sent",
    "events_per_s": "of the bulk load",
    "questions": "of a user and a genre, asked of both models in the weeks after the cut",
    "score_p50_ms": "half of the lists of the model took at most",
    "score_p99_ms": "99 of 100 took at most",
    "hit_rate_at_10": "of the model: the film of the genre that the user rated next is among the ten",
    "hit_rate_at_10_popular": "of the most rated of the last 30 days, without those that the user has rated",
    "parity_equal": "lists of both models that equal the offline ones, scores and features bit for bit ...",
    "parity_total": "... of so many",
    "oracle_equal": "rows in which the plain-Python oracle finds every feature right ...",
    "oracle_total": "... of so many",
    "failed_requests": "requests without a good answer",
    "seconds": "the whole demo",
}

#: The answers of both models to each question, in their order, by the model's name; None for one that failed.
Answers = dict[str, list[dict[str, Any] | None]]


@dataclass(frozen=True)
class Past:
    """What the cluster would have answered: features from the raw ratings, as of the time at which a user was asked.

    questions: as of `next_films`, with one time a user.
    """

    ratings: pa.Table
    questions: pa.Table
    n_shards: int = 1

    def features(self) -> tuple[FeatureRows, dict[str, list[Any]]]:
        """Return what the models read of each question, and its key."""
        key = {name: self.questions[name].to_pylist() for name in ("user_id", "genre")}
        return self._features(example.FEATURES, key), key

    def read(self, plan: ReadPlan, keys: Mapping[str, Sequence[Any]], n: int, as_of_ms: int | None) -> FeatureRows:
        """Read on as a model does."""
        return self._features(plan.features, keys)

    def candidates(self) -> tuple[Features, Any, dict[str, list[Any]], Features]:
        """Return the features of the questions, which of them each candidate is of, its key and its features."""
        rows, key = self.features()
        features = Features(rows.matrix, (), rows.texts, key)
        of, candidate_key = example.candidates(features)
        return features, of, candidate_key, Features(self._features(example.READS, candidate_key).matrix, ())

    def _features(self, features: Sequence[Feature], keys: Mapping[str, Sequence[Any]]) -> FeatureRows:
        asked_at = dict(
            zip(self.questions["user_id"].to_pylist(), epoch_ms(self.questions, "as_of").tolist(), strict=True)
        )
        as_of = pa.array([asked_at[user] for user in keys["user_id"]], pa.timestamp("ms", "UTC"))
        fields = {name: self.ratings.schema.field(name).type for name in keys}
        columns = {name: pa.array(values, fields[name]) for name, values in keys.items()}
        return training_set(
            features, pa.table({**columns, "as_of": as_of}), {"ratings": self.ratings}, workers=Threads(self.n_shards)
        )


def train_recommend(ratings: pa.Table, start: str, stop: str, path: str) -> int:
    """Train on questions from start to before stop, dates, and on nothing after; return of how many candidates.

    A candidate is right if the user has rated it by then.
    """
    ratings = _between(ratings, BEGIN, stop)
    questions = next_films(ratings, start, stop)
    questions = questions.take(pa.array(sample(len(questions), TRAINED_QUESTIONS, SEED)))
    features, of, key, more = Past(ratings, questions).candidates()
    rated = set(zip(ratings["user_id"].to_pylist(), ratings["film_id"].to_pylist(), strict=True))
    right = np.array([pair in rated for pair in zip(key["user_id"], key["film_id"], strict=True)])
    new = example.is_new(more)
    example.train(example.inputs(features, of, more)[new], right[new], path)
    return int(new.sum())


def run_recommend(config: Config, origins: dict[str, str], *, as_json: bool, keep: bool) -> int:
    """Run the demo; return the exit status."""
    check_scikit_learn()
    stage = Stage(config, origins, "recommend")
    with stage:
        with stage.step("read the ratings of 1997-98"):
            ratings = load_ratings()
            questions = next_films(ratings, CUT, END)
        with stage.step("train up to the cut") as advance:
            trained = train_recommend(ratings, BEGIN, CUT, str(stage.artifacts_dir / "recommend.npz"))
            advance(note=f"{trained:,} candidates")
        with stage.step("start the cluster") as advance:
            cluster, definition = stage.cluster(Path(example.__file__))
            advance(note=cluster.url)
        try:
            past = _between(ratings, BEGIN, CUT)
            with stage.step("load the past in bulk", len(past)) as advance:
                stage.load(cluster.url, {"ratings": past}, advance)
            with stage.step("deploy the models"):
                cluster.deploy([definition])
            with stage.step("replay and ask", len(questions)) as advance:
                answers = _replay(stage, cluster, _between(ratings, CUT, END), questions, advance)
            for name, figure in (("recommend", "hit_rate_at_10"), ("popular", "hit_rate_at_10_popular")):
                stage.figures[figure] = _hit_rate(answers[name], questions["film_id"].to_pylist())
            with stage.step("find every list again"):
                _compare(stage, ratings, questions, answers)
            with stage.step("ask the oracle", ORACLE_ROWS) as advance:
                _ask_oracle(stage, ratings, questions, answers["recommend"], advance)
            status = stage.finish(as_json, MEANINGS, SEED)
            if keep:
                keep_serving(stage, cluster, "recommend", _ids(questions.slice(len(questions) - 1))[0])
            return status
        finally:
            cluster.stop()


def _between(ratings: pa.Table, start: str, stop: str) -> pa.Table:
    first, last = np.searchsorted(instants(ratings, "rated_at"), np.array([start, stop], "datetime64[ms]"))
    return ratings.slice(int(first), int(last - first))


def _ids(questions: pa.Table) -> list[dict[str, Any]]:
    return questions.select(["user_id", "genre"]).to_pylist()  # type: ignore[no-any-return]


def _replay(stage: Stage, cluster: Cluster, ratings: pa.Table, questions: pa.Table, advance: Any) -> Answers:
    """Send the ratings in the order of time, up to each question before it is asked."""
    session = Session(cluster.url)
    rated_at, sent = epoch_ms(ratings, "rated_at"), 0
    answers: Answers = {"recommend": [], "popular": []}
    times_ms: list[float] = []
    for key, as_of in zip(_ids(questions), epoch_ms(questions, "as_of").tolist(), strict=True):
        until = int(np.searchsorted(rated_at, as_of, side="right"))
        if until > sent:
            session.post("/v1/events/ratings", arrow_stream(ratings.slice(sent, until - sent)), ARROW_STREAM)
            stage.count("events", until - sent)
            sent = until
        for name, of_model in answers.items():
            answer, took_ms = session.timed_score(name, key, f"?as_of={as_of}&features=true")
            of_model.append(answer)
            if name == "recommend":
                times_ms.append(took_ms)
        advance(1, f"p50 {percentile(times_ms, 50):.1f} ms")
    stage.add_requests(session)
    stage.figures |= {
        "questions": len(questions),
        "score_p50_ms": percentile(times_ms, 50),
        "score_p99_ms": percentile(times_ms, 99),
    }
    return answers


def _hit_rate(answers: Sequence[Mapping[str, Any] | None], films: Sequence[int]) -> float:
    """Return the share of the lists that have the film; one that failed has not."""
    hits = [
        answer is not None and film in [shown["film_id"] for shown in answer["result"]]
        for answer, film in zip(answers, films, strict=True)
    ]
    return round(sum(hits) / len(hits), 4)


def _compare(stage: Stage, ratings: pa.Table, questions: pa.Table, answers: Answers) -> None:
    """Compute the lists again, from the raw file and on another number of shards."""
    past = Past(ratings, questions, stage.config.shards + 1)
    rows, key = past.features()
    models: dict[str, Model] = {"recommend": example.recommend, "popular": example.popular}
    stage.figures |= {"parity_equal": 0, "parity_total": 0}
    for name, model in models.items():
        results = offline_model(stage, model).predict(rows, key, past.read)
        stage.figures["parity_equal"] += parity(answers[name], model, rows, results)
        stage.figures["parity_total"] += len(results)


def _ask_oracle(
    stage: Stage, ratings: pa.Table, questions: pa.Table, answers: Sequence[dict[str, Any] | None], advance: Any
) -> None:
    """Let the oracle recompute the features of a sample of the live answers."""
    keys, as_of = _ids(questions), epoch_ms(questions, "as_of").tolist()
    rows = [
        (keys[i], as_of[i], answer["features"], answer["unknown"])
        for i in sample(len(answers), ORACLE_ROWS, SEED)
        if (answer := answers[i]) is not None
    ]
    views = [example.genre_films, example.user_taste, example.user_genre]
    stage.figures["oracle_equal"] = judge(views, {"ratings": ratings}, rows, advance)
    stage.figures["oracle_total"] = len(rows)
