"""Scores of production are found again in staging, whose shards are others; what differs there is found, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from check_directory import LAYOUT
from folders import folder
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from verified_world import FILE, MINUTE, VerifiedWorld, payment, random_world

from millpond.bench.staging import differences, found_again
from millpond.feature_actors.event_order import EventOrder
from millpond.feature_actors.past import Past
from millpond.feature_actors.ports import complete
from millpond.models.score_log import read_scores

NOW = 1_700_000_000_000
MODELS = {model.name: model for model in FILE.declared().models}


def staged(past: Past, folder: Path, n_shards: int, together: int) -> tuple[VerifiedWorld, int]:
    """A cluster that has had the events of another one, so many in a request; and of how many two shards of that, one
    of which had crashed, did not agree on the order."""
    world, runs = VerifiedWorld(folder, n_shards=n_shards), EventOrder(past, LAYOUT.sources)
    rows = [
        (run.batch.slice(row, 1), at) for run in runs.runs() for row, at in zip(run.rows, run.arrivals, strict=True)
    ]
    world.cluster.clock.ms = NOW
    for start in range(0, len(rows), together):
        some = rows[start : start + together]
        world.cluster.clock.ms = max(world.cluster.clock.ms, *(at for _, at in some))
        batch, arrivals = pa.concat_batches([one for one, _ in some]), np.array([at for _, at in some], np.int64)
        ack = complete(world.cluster.client.ingest("payments", batch, arrivals=arrivals))
        assert ack.accepted == len(some)
    return world, runs.disputed


@given(
    seed=st.integers(0, 10**6), shards=st.sampled_from([(1, 3), (2, 3), (3, 2)]), together=st.sampled_from([1, 5, 99])
)
@settings(max_examples=4)
def test_every_logged_score_is_found_again_and_no_other(seed: int, shards: tuple[int, int], together: int) -> None:
    with folder() as path:
        world = random_world(path / "a", seed, n_shards=shards[0])
        production = world.lay_out()
        other, disputed = staged(production, path / "b", shards[1], together)
        assume(not disputed)  # there is no order in which all scores could be found again
        staging, scores = other.lay_out(), list(read_scores(str(world.path / "history")))
        assert found_again(production, staging, LAYOUT, MODELS, scores) == (sum(map(len, scores)), [])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_score_that_was_read_within_a_request_is_found_again_and_one_of_another_event_is_not(
    tmp_path: Path, k: int
) -> None:
    world = VerifiedWorld(tmp_path / "a", n_shards=2)
    world.send([payment(0, NOW, cents=5)], NOW)
    for n in range(1, k + 1):  # what a read between two events of the request would have been
        world.send([payment(n, NOW + MINUTE, cents=n)], NOW + MINUTE)
    world.score("user", [{"user": 1}])
    for n in range(k + 1, 4):
        world.send([payment(n, NOW + MINUTE, cents=n)], NOW + MINUTE)
    whole = VerifiedWorld(tmp_path / "whole", n_shards=2)
    whole.send([payment(0, NOW, cents=5)], NOW)
    whole.send([payment(n, NOW + MINUTE, cents=n) for n in range(1, 4)], NOW + MINUTE)
    whole.score("user", [{"user": 1}])
    production = whole.lay_out()
    world.lay_out()
    # The features of the one, with the place in the log of the other.
    (inner,), (logged,) = (list(read_scores(str(w.path / "history"))) for w in (world, whole))
    logged = logged.set_column(logged.column_names.index("features"), "features", inner["features"])
    other, _ = staged(production, tmp_path / "b", 3, 4)
    staging = other.lay_out()
    assert found_again(production, staging, LAYOUT, MODELS, [logged]) == (1, [])
    other.change_event("p1", lambda event: {**event, "cents": 99})
    assert found_again(production, other.past, LAYOUT, MODELS, [logged]) == (1, ["0"])
    score, was, now, parting = differences(production, other.past, LAYOUT, MODELS, [logged], ["0"])
    assert score.startswith("score 0 of {'user': 1} as of ")
    assert was.startswith("    had read {'by_user.n': ")
    assert now.startswith("    staging  {'by_user.n': ")
    assert "read after 4 of 4 events, 4 in staging; event 1 was [{'id': 'p1', " in parting
    assert "'cents': 1, " in parting.partition(", and is ")[0]
    assert "'cents': 99, " in parting.partition(", and is ")[2]
