"""Which film of a genre should this user be shown? The ten that fit the user best, of those that many rate.

The third example, in two stages: candidates are the films of the genre that are rated most, and what they are ranked by
is read when they are known. `popular` is what the ranking has to beat.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.feature_actors import Count, FeatureView, Field, Last, Mean, Source, Std, TopK, TopKCounts
from millpond.models import FeatureReader, Features, Model
from millpond.models.logistic import Logistic

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CANDIDATES, SHOWN = 100, 10

ratings = Source(
    "ratings",
    owner="catalogue",
    about="One event per rating and genre of the film.",
    fields={
        "rating_id": "string",  # of user, film and genre
        "user_id": "int64",
        "film_id": "int64",
        "genre": "string",
        "stars": "float64",  # 1 to 5
        "year": Field("float64", optional=True),  # in which the film came out
        "rated_at": "timestamp[ms, UTC]",
    },
    event_id="rating_id",
    event_time="rated_at",
)


def view(name: str, key: list[str], features: dict[str, Any]) -> FeatureView:
    return FeatureView(name, owner="recommendations", source=ratings, key=key, features=features)


_top: dict[str, Any] = {"k": CANDIDATES, "m": 512}
genre_films = view(
    "genre_films", ["genre"], {"films": TopK("film_id", **_top), "counts": TopKCounts("film_id", **_top)}
)
user_taste = view("user_taste", ["user_id"], {"ratings": Count(), "year": Mean("year"), "spread_years": Std("year")})
user_genre = view("user_genre", ["user_id", "genre"], {"ratings": Count(), "year": Mean("year")})
_film = {"ratings_30d": Count(window="30d"), "mean_stars": Mean("stars"), "year": Last("year")}
genre_film = view("genre_film", ["genre", "film_id"], _film)
user_film = view("user_film", ["user_id", "film_id"], {"ratings": Count()})

#: What is read of the user and genre of a request; and then of each candidate.
FEATURES = [*genre_films, *user_taste, *user_genre]
READS = [*genre_film, *user_film]


def candidates(features: Features) -> tuple[Ints, dict[str, Any]]:
    """Return of which row each of m candidates is, int64 [m], and what it is read by: m users, genres and films."""
    films = features.matrix[:, :CANDIDATES]
    rows, places = np.nonzero(films == films)
    key = {name: [values[row] for row in rows.tolist()] for name, values in features.keys.items()}
    return rows, {**key, "film_id": films[rows, places].astype(np.int64).tolist()}


def is_new(more: Features) -> npt.NDArray[np.bool_]:
    """Return which candidates their users have not rated yet, bool [m]."""
    return more.matrix[:, 3] == 0  # type: ignore[no-any-return]


def inputs(features: Features, rows: Ints, more: Features) -> Floats:
    """Return what candidates are ranked by, float64 [m, 7]: how often and how well each is rated, and how far its year
    is from those of the films that the user rates."""
    films, counts = features.matrix[:, :CANDIDATES], features.matrix[:, CANDIDATES : 2 * CANDIDATES]
    rated, year, spread, rated_in_genre, year_in_genre = features.matrix[rows, 2 * CANDIDATES :].T
    rated_30d, stars, film_year, _ = more.matrix.T
    film_year, year = np.nan_to_num(film_year, nan=1990.0), np.nan_to_num(year, nan=1990.0)
    spread = np.nan_to_num(spread, nan=8.0) + 3
    # A few ratings in a genre say less than all that the user rates.
    year_in_genre = (rated_in_genre * np.nan_to_num(year_in_genre) + 3 * year) / (rated_in_genre + 3)
    return np.column_stack([
        np.log1p(counts[films == films]),
        np.log1p(rated_30d),
        np.minimum(np.abs(film_year - year) / spread, 4),
        np.minimum(np.abs(film_year - year_in_genre) / spread, 4),
        film_year / 10 - 199,
        stars,
        stars * np.log1p(rated),
    ])  # fmt: skip


class Popular:
    """What the ranking has to beat: the films of the genre that are rated most these 30 days."""

    def predict(self, features: Features, reader: FeatureReader) -> list[list[dict[str, Any]]]:
        """Return for each row the films to show, the best first: `[{"film_id", "score"}, ...]`."""
        rows, key = candidates(features)
        more = reader.read(READS, key)
        scores = self.scores(features, rows, more)
        shown: list[list[dict[str, Any]]] = [[] for _ in features.matrix]
        new = np.flatnonzero(is_new(more))
        for i in new[np.lexsort((-scores[new], rows[new]))].tolist():  # ties: the more rated in all
            if len(shown[rows[i]]) < SHOWN:
                shown[rows[i]].append({"film_id": key["film_id"][i], "score": float(scores[i])})
        return shown

    def scores(self, features: Features, rows: Ints, more: Features) -> Floats:
        return more.matrix[:, 0]


class Recommend(Popular):
    """Logistic regression: the chance that the user goes on to rate the film."""

    def __init__(self, weights: str) -> None:
        self._logistic = Logistic.load(weights, missing=np.nan)  # none can be, after `inputs`

    def scores(self, features: Features, rows: Ints, more: Features) -> Floats:
        return self._logistic.probabilities(inputs(features, rows, more))


recommend = Model(
    "recommend",
    owner="recommendations",
    about="Ten films of a genre for a user who has not rated them, the best first.",
    features=FEATURES,
    reads=READS,
    predictor=Recommend,
    artifacts={"weights": "recommend.npz"},
)
popular = Model(
    "popular",
    owner="recommendations",
    about="Ten films of a genre that the user has not rated, those that most rated in the last 30 days.",
    features=FEATURES,
    reads=READS,
    predictor=Popular,
)


def train(given: Floats, rated: npt.NDArray[np.bool_], path: str) -> None:
    """Train on `inputs`, float64 [m, 7], and whether the user has rated each since, and write the artifact."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(given)
    learner = LogisticRegression(max_iter=1_000).fit(scaler.transform(given), rated)
    weights = learner.coef_[0] / scaler.scale_
    Logistic(weights, learner.intercept_[0] - weights @ scaler.mean_).save(path)
