"""What others were served is verified after an entity was forgotten, and nothing differs because of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import verified_world
from check_directory import DEFINITION, LAYOUT
from durable_cluster import SECRET
from verified_world import MODELS, VerifiedWorld, payment, random_world

from millpond.feature_actors.check import DirectoryCheck
from millpond.feature_actors.keys import hash_values
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.replays import ReplayOptions, check_replays
from millpond.feature_actors.tombstones import tombstone_of
from millpond.models.definition import Definition
from millpond.models.erasures import ForgottenScores
from millpond.models.score_log import erase_scores
from millpond.models.verification import Counts

NOW = 1_700_000_000_000
GONE = 1


def forget(world: VerifiedWorld) -> None:
    """Forget user 1 on all shards."""
    tombstone = tombstone_of(SECRET, "user", GONE, world.cluster.clock.ms)
    for shard in range(len(world.cluster.shards)):
        world.cluster.forget(shard, tombstone)
    for shard in range(len(world.cluster.shards)):
        while not world.cluster.erase_steps(shard, 1_000):
            pass


def erase_logged(world: VerifiedWorld) -> int:
    low, high = hash_values([[GONE]], 1).view(np.int64)[0].tolist()
    return erase_scores(str(world.path / "history"), [ForgottenScores("user", (low, high), 1 << 62)], ())


@pytest.mark.parametrize("n_shards", [1, 2])
def test_scores_of_others_are_equal_still(n_shards: int, tmp_path: Path) -> None:
    world = random_world(tmp_path, 7, n_shards=n_shards, history=True)
    world.cluster.deliver_owed()
    own = sum(
        f'"user":{GONE},' in key or f'"user":{GONE}}}' in key for t in world.tables for key in t["key"].to_pylist()
    )
    forget(world)
    world.lay_out()
    logged = sum(map(len, world.tables))
    assert erase_logged(world) == own > 0
    found = world.verify()
    assert found.scores == Counts(equal=logged - own), found.differences
    # Nor does `millpond check` find anything: snapshots are what a replay of what was rewritten makes.
    with DirectoryCheck(world.path, str(world.path / "history")) as check:
        check_replays(check, LAYOUT, ReplayOptions())
        assert (check.problems, check.left_out) == ([], [])


def test_a_score_that_had_read_what_was_forgotten_is_missing_and_not_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = DEFINITION.replace('Last("shop")', 'Last("user")') + MODELS.partition("both =")[0]
    text += 'seen = Model("seen", version="1", owner="tests", features=[BY_SHOP["last"]], predictor=Product)\n'
    text += 'counted = Model("counted", version="1", owner="tests", features=[BY_USER["n"]], predictor=Product)\n'
    file = Definition("payments.py", text)
    monkeypatch.setattr(verified_world, "FILE", file)
    monkeypatch.setattr(verified_world, "LAYOUT", compile_layout([], file.declared().views))
    world = VerifiedWorld(tmp_path, n_shards=1)
    world.send([payment(1, NOW, GONE, "a"), payment(2, NOW, 2, "b")], NOW)
    world.score("seen", [{"shop": "a"}, {"shop": "b"}])
    world.score("counted", [{"user": 2}])
    forget(world)
    world.cluster.clock.ms += 1
    world.score("seen", [{"shop": "a"}, {"shop": "b"}])
    world.lay_out()
    found = world.verify()
    assert (found.scores, found.why_missing) == (
        Counts(equal=4, missing=1), {"events that it saw do not show any more what has been forgotten": 1}
    )  # fmt: skip
