"""The ratings of MovieLens 100k as a source of events, and as questions to a recommender of films.

943 users of a web site gave 100,000 ratings to 1,682 films from September 1997 to April 1998, most of them at one
sitting. Times are of whole seconds. A film has one to six genres, and each rating is an event for each of them.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from millpond.cluster.demo.datasets import RECBOLE, fetch

__all__ = ["QUESTIONS", "RATINGS", "load_ratings", "next_films"]

_TIME = pa.timestamp("ms", tz="UTC")

#: rating_id: user, film and genre. year: of the film's release, null for 10 films that the file has none of.
RATINGS = pa.schema(
    [
        pa.field("rating_id", pa.string(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("film_id", pa.int64(), nullable=False),
        pa.field("genre", pa.string(), nullable=False),
        pa.field("stars", pa.float64(), nullable=False),
        pa.field("year", pa.float64()),
        pa.field("rated_at", _TIME, nullable=False),
    ]
)

QUESTIONS = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("genre", pa.string(), nullable=False),
        pa.field("as_of", _TIME, nullable=False),
        pa.field("film_id", pa.int64(), nullable=False),
    ]
)


def load_ratings() -> pa.Table:
    """Fetch and read the ratings, one row per genre of the film, ordered by time; ties are in the order of the file.

    Raises `DatasetError` if the data cannot be fetched.
    """
    folder = fetch(RECBOLE) / "recbole" / "dataset_example" / "ml-100k"
    lines = [line.split("\t") for line in (folder / "ml-100k.item").read_text("utf-8").splitlines()[1:]]
    years = {int(film): float(year) if year.isdigit() else None for film, _, year, _ in lines}
    genres = {int(film): names.split(" ") for film, _, _, names in lines}
    given = np.loadtxt(folder / "ml-100k.inter", dtype=np.int64, skiprows=1)
    given = given[np.argsort(given[:, 3], kind="stable")]
    rows = [
        (f"{user}-{film}-{genre}", user, film, genre, float(stars), years[film], at * 1_000)
        for user, film, stars, at in given.tolist()
        for genre in genres[film]
    ]
    columns = (pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), RATINGS, strict=True))
    return pa.table(list(columns), schema=RATINGS)


def next_films(ratings: pa.Table, start: str, stop: str) -> pa.Table:
    """Return a question for each user and genre: which film is rated next?

    start, stop: dates, `"1998-03-07"`. A user is asked about once, at the middle of the ratings that they give from
    start to before stop: as of the time of the last of the first half, for each genre that they rate after that. The
    answer, `film_id`, is the first film of the genre after that. Questions are in the order of time.
    """
    times = ratings["rated_at"].to_numpy()
    first, last = np.searchsorted(times, np.array([start, stop], times.dtype))
    ratings, times = ratings.slice(int(first), int(last - first)), times[first:last]
    users, films = ratings["user_id"].to_numpy(), ratings["film_id"].to_numpy()
    genres = ratings["genre"].to_pylist()
    rows = []
    for user in np.unique(users).tolist():
        mine = np.flatnonzero(users == user)
        one_each = mine[np.append(True, np.diff(films[mine]) != 0)]  # of the rows of a rating
        as_of = times[one_each[max(len(one_each) // 2 - 1, 0)]]
        next_of: dict[str, int] = {}
        for i in mine[times[mine] > as_of].tolist():
            next_of.setdefault(genres[i], int(films[i]))
        rows += [(user, genre, as_of, film) for genre, film in next_of.items()]
    rows.sort(key=lambda row: row[2])
    columns = zip(*rows, strict=True) if rows else [()] * len(QUESTIONS)
    arrays = [
        pa.array(np.array(column, times.dtype)).cast(_TIME) if field.type == _TIME else pa.array(column, field.type)
        for column, field in zip(columns, QUESTIONS, strict=True)
    ]
    return pa.table(arrays, schema=QUESTIONS)
