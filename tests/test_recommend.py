"""The two-stage example: what is shown to whom, what it is trained on, and the ratings that it is measured by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.cluster.demo import movielens
from millpond.cluster.demo.datasets import RECBOLE, fetch
from millpond.cluster.demo.recommend import CUT, Past, train_recommend
from millpond.feature_actors import FeatureView, Source
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.testing import TestCluster, assert_parity
from millpond.models import Model, recommend
from millpond.models.logistic import Logistic
from millpond.models.model import LoadedModel

SECOND, DAY = 1_000, 86_400_000
T = 1_700_000_000_000
VIEWS = {f.view.name: f.view for f in (*recommend.FEATURES, *recommend.READS)}
#: A film has the same year in every rating, and one genre or two.
GENRES = {film: ["comedy", "drama"][film % 2 : 1 + (film % 3 > 0)] or ["drama"] for film in range(30)}
YEARS = {film: None if film == 5 else 1940.0 + 2 * film for film in range(30)}

Rating = tuple[int, int, int, int]


def events(ratings: Iterable[Rating]) -> pa.Table:
    """Ratings by (user, film, stars, seconds since T), the time ascending, as rows of the source."""
    rows = [
        {
            "rating_id": f"{user}-{film}-{genre}", "user_id": user, "film_id": film, "genre": genre,
            "stars": float(stars), "year": YEARS[film], "rated_at": T + at * SECOND,
        }
        for user, film, stars, at in ratings
        for genre in GENRES[film]
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, movielens.RATINGS)


def cluster(folder: Path, ratings: pa.Table, shards: int = 2) -> TestCluster:
    """The models over some ratings."""
    made = TestCluster(models=[recommend.recommend, recommend.popular], artifacts=folder, shards=shards)
    made.send(recommend.ratings, ratings)
    return made


def ask(made: TestCluster, name: str, ids: Sequence[tuple[int, str]]) -> list[Any]:
    return [score.result for score in made.score(name, [{"user_id": user, "genre": genre} for user, genre in ids])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    Logistic([0.4, 0.7, -0.6, -0.2, -0.3, -1.2, 0.3], -4.6).save(str(folder / "recommend.npz"))
    return folder


# -- the models


ratings_of = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 29), st.integers(1, 5), st.integers(0, 60 * 24 * 3600)),
    max_size=80, unique_by=lambda rating: rating[:2],
).map(lambda ratings: sorted(ratings, key=lambda rating: rating[3]))  # fmt: skip
ASKED = [(user, genre) for user in (1, 2, 99) for genre in ("comedy", "drama", "western")]


@given(ratings=ratings_of)
def test_popular_shows_the_most_rated_of_the_genre_that_the_user_has_not_rated(
    folder: Path, ratings: list[Rating]
) -> None:
    answers = ask(cluster(folder, events(ratings)), "popular", ASKED)
    newest = max((at for *_, at in ratings), default=0)
    # A window of 30 days begins with a tile of twelve hours.
    start = (T + newest * SECOND - 30 * DAY) // (DAY // 2) * (DAY // 2)
    for (user, genre), shown in zip(ASKED, answers, strict=True):
        of_genre = [rating for rating in ratings if genre in GENRES[rating[1]]]
        lately = Counter(film for _, film, _, at in of_genre if T + at * SECOND >= start)
        seen = {film for by, film, _, _ in ratings if by == user}
        candidates = {film for _, film, _, _ in of_genre} - seen
        assert [one["score"] for one in shown] == sorted((float(lately[f]) for f in candidates), reverse=True)[:10]
        assert all(one["score"] == lately[one["film_id"]] for one in shown)
        assert len({one["film_id"] for one in shown} & candidates) == len(shown)


@given(ratings=ratings_of)
def test_a_list_is_of_new_films_the_best_first_and_the_same_in_a_batch_and_alone(
    folder: Path, ratings: list[Rating]
) -> None:
    made = cluster(folder, events(ratings))
    answers = ask(made, "recommend", ASKED)
    assert answers == [ask(made, "recommend", [one])[0] for one in ASKED]
    popular = ask(made, "popular", ASKED)
    for shown, others in zip(answers, popular, strict=True):
        scores = [one["score"] for one in shown]
        assert scores == sorted(scores, reverse=True)
        assert all(0 < score < 1 for score in scores)
        assert len(shown) == len(others)
        if len(shown) < 10:  # all candidates: the ranking changes their order only
            assert {one["film_id"] for one in shown} == {one["film_id"] for one in others}


@given(ratings=ratings_of, n_shards=st.integers(1, 3))
def test_a_list_is_the_one_that_is_found_again_from_the_raw_ratings(
    folder: Path, ratings: list[Rating], n_shards: int
) -> None:
    """The features of both stages as of a user's time, which the demo trains on and compares with."""
    table = events(ratings)
    middle = len(ratings) // 2
    as_of = T + (ratings[middle - 1][3] if middle else 0) * SECOND
    until = table.filter(pa.compute.less_equal(table["rated_at"].cast(pa.int64()), as_of))
    if not len(until):
        return
    ids = [(user, genre) for user in (1, 2, 3) for genre in ("comedy", "drama")]
    questions = pa.table(
        {
            "user_id": pa.array([user for user, _ in ids], pa.int64()),
            "genre": [genre for _, genre in ids],
            "as_of": pa.array([as_of] * len(ids), pa.timestamp("ms", "UTC")),
        }
    )
    made = cluster(folder, until, n_shards)
    past = Past(table, questions, 2)
    rows, keys = past.features()
    layout = compile_layout([], VIEWS.values())
    for model in (recommend.recommend, recommend.popular):
        assert LoadedModel(model, layout, folder).predict(rows, keys, past.read) == ask(made, model.name, ids)


def test_the_inputs_of_a_candidate_computed_by_hand(folder: Path) -> None:
    ratings = [
        (1, 2, 4, 0),
        (1, 4, 2, 1),
        (2, 8, 5, 40 * 24 * 3600),
        (3, 8, 3, 41 * 24 * 3600),
        (1, 0, 1, 41 * 24 * 3600),
    ]
    made = cluster(folder, events(ratings))
    assert made.score("popular", user_id=1, genre="comedy").result == [{"film_id": 8, "score": 2.0}]
    shown = made.score("recommend", user_id=1, genre="comedy").result
    # The user has rated films of 1944, 1948 and 1940, a rating counts for each genre; film 8 is of 1956.
    years = [1944.0] * len(GENRES[2]) + [1948.0] * len(GENRES[4]) + [1940.0] * len(GENRES[0])
    mean, spread = np.mean(years), np.std(years) + 3
    in_comedy = [YEARS[film] for film in (2, 4, 0) if "comedy" in GENRES[film]]
    mean_in = (sum(in_comedy) + 3 * mean) / (len(in_comedy) + 3)
    given = [
        math.log(3), math.log(3), min((1956 - mean) / spread, 4), min((1956 - mean_in) / spread, 4), -3.4, 4.0,
        4.0 * math.log(1 + len(years)),
    ]  # fmt: skip
    with np.load(folder / "recommend.npz") as arrays:
        want = 1 / (1 + math.exp(-(np.dot(given, arrays["weights"]) + arrays["intercept"])))
    assert [(one["film_id"], one["score"]) for one in shown] == [(8, pytest.approx(want, rel=1e-12))]


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_every_view_is_what_the_oracle_says(view: FeatureView) -> None:
    seconds = 60 * 24 * 3600 // 200
    rated = [(n % 7, n * 11 % 30, 1 + n % 5, n * seconds) for n in range(200)]
    assert assert_parity(view, events(dict.fromkeys(rated)), times=2, entities_max=20)


def test_a_model_may_read_of_its_candidates_what_it_declares_and_nothing_else(folder: Path) -> None:
    model: Model = recommend.popular
    assert [f.full_name for f in model.reads] == [
        "genre_film.ratings_30d", "genre_film.mean_stars", "genre_film.year", "user_film.ratings",
    ]  # fmt: skip
    assert [f.width for f in model.features] == [recommend.CANDIDATES] * 2 + [1] * 5


# -- the ratings


@pytest.fixture(scope="module")
def ratings() -> pa.Table:
    return movielens.load_ratings()


@pytest.fixture(scope="module")
def lines() -> dict[str, list[list[str]]]:
    """The files, read line by line."""
    folder = fetch(RECBOLE) / "recbole/dataset_example/ml-100k"
    return {
        kind: [line.split("\t") for line in (folder / f"ml-100k.{kind}").read_text("utf-8").splitlines()[1:]]
        for kind in ("inter", "item")
    }


def test_an_event_is_a_rating_and_a_genre_of_the_film(ratings: pa.Table, lines: dict[str, list[list[str]]]) -> None:
    genres = {film: names.split(" ") for film, _, _, names in lines["item"]}
    assert len(lines["inter"]) == 100_000
    expected = {
        (f"{user}-{film}-{genre}", int(user), int(film), genre, float(stars), int(at) * 1_000)
        for user, film, stars, at in lines["inter"]
        for genre in genres[film]
    }
    names = ["rating_id", "user_id", "film_id", "genre", "stars"]
    at = ratings["rated_at"].cast(pa.int64()).to_pylist()
    found = list(zip(*(ratings[name].to_pylist() for name in names), at, strict=True))
    assert set(found) == expected
    assert len(found) == len(expected) == len(set(ratings["rating_id"].to_pylist())) == 212_595


def test_ratings_stand_in_the_order_of_time_and_ties_in_that_of_the_file(
    ratings: pa.Table, lines: dict[str, list[list[str]]]
) -> None:
    place = {(user, film): i for i, (user, film, _, _) in enumerate(lines["inter"])}
    in_file = [place[tuple(one.split("-", 2)[:2])] for one in ratings["rating_id"].to_pylist()]
    order = list(zip(ratings["rated_at"].cast(pa.int64()).to_pylist(), in_file, strict=True))
    assert order == sorted(order)


def test_two_films_have_no_year_and_the_source_takes_every_row(ratings: pa.Table) -> None:
    source: Source = recommend.ratings
    assert source.schema == ratings.schema
    ratings.validate(full=True)
    without = ratings.filter(pa.compute.is_null(ratings["year"]))
    assert set(without["film_id"].to_pylist()) == {267, 1412}
    assert pa.compute.min_max(ratings["year"]).as_py() == {"min": 1922, "max": 1998}


def test_a_question_is_asked_in_the_middle_of_what_a_user_rates_and_answered_by_what_comes_next(
    ratings: pa.Table,
) -> None:
    start, stop = "1998-03-07", "1998-05-01"
    questions = movielens.next_films(ratings, start, stop)
    assert questions.schema == movielens.QUESTIONS
    of_user: dict[int, list[dict[str, Any]]] = {}
    for row in ratings.to_pylist():
        if start <= row["rated_at"].isoformat() < stop:
            of_user.setdefault(row["user_id"], []).append(row)
    asked: dict[int, dict[str, Any]] = {}
    for question in questions.to_pylist():
        asked.setdefault(question["user_id"], {})[question["genre"]] = (question["as_of"], question["film_id"])
    assert len(asked) == 291
    for user, rows in of_user.items():
        times = [row["rated_at"] for row in {row["film_id"]: row for row in reversed(rows)}.values()][::-1]
        as_of = times[max(len(times) // 2 - 1, 0)]
        later: dict[str, Any] = {}
        for row in rows:
            if row["rated_at"] > as_of:
                later.setdefault(row["genre"], (as_of, row["film_id"]))
        assert asked.get(user, {}) == later
    as_of = questions["as_of"].to_pylist()
    assert as_of == sorted(as_of)


def test_nobody_is_asked_where_nothing_is_rated(ratings: pa.Table) -> None:
    nothing = movielens.next_films(ratings, "2001-01-01", "2002-01-01")
    assert (len(nothing), nothing.schema) == (0, movielens.QUESTIONS)


# -- training


def test_nothing_after_the_cut_is_trained_on(ratings: pa.Table, tmp_path: Path) -> None:
    cut = int(np.datetime64(CUT, "ms").astype(np.int64))
    before = ratings.filter(pa.compute.less(ratings["rated_at"].cast(pa.int64()), cut))
    assert 0.79 < len(before) / len(ratings) < 0.81
    start = "1998-02-01"  # fewer questions are enough to tell
    n = [
        train_recommend(table, start, CUT, str(tmp_path / name))
        for table, name in ((before, "a.npy"), (ratings, "b.npy"))
    ]
    assert n[0] == n[1] > 10_000
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
