"""Plans read together: each id gets what it gets when its plan is read alone."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import USERS, World, batch, cluster, worlds

from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.ports import complete


@settings(max_examples=60)
@given(world=worlds(), n_shards=st.sampled_from([1, 3]), seed=st.integers(0, 2**32))
def test_ids_of_many_plans_get_what_each_plan_gets_alone(world: World, n_shards: int, seed: int) -> None:
    layout, draw = world.layout, random.Random(seed)
    clock = ManualClock(0)
    client, _ = cluster(layout, n_shards, clock, n_slots=world.n_slots)
    for source_name, now_ms, events in world.batches:
        clock.ms = now_ms
        if events:
            complete(client.ingest(source_name, batch(layout.sources[source_name], events)))
    plans = []
    for number in range(draw.randrange(1, 6)):
        view = draw.choice(world.views)
        features = draw.sample(list(view), draw.randrange(1, len(list(view)) + 1))
        plans.append(ReadPlan(layout, features, f"plan {number}"))
    together = client.plan_set(plans)
    assert set(together.numbers) == {
        p for p in plans if list(p.key_fields.values()) == ["int64"] and not p.program.texts
    }
    taken = list(together.numbers)
    if not taken:
        return
    users = [user for user in USERS if user is not None]
    asked = [(draw.choice(taken), draw.choices(users, k=draw.randrange(1, 4))) for _ in range(draw.randrange(1, 40))]
    answers = client.read_together_now(together, asked)
    assert answers is not None
    for (plan, keys), rows in zip(asked, answers, strict=True):
        (name,) = plan.key_fields
        alone = client.read_now(plan, {name: keys}, len(keys))
        assert alone is not None
        np.testing.assert_array_equal(rows.matrix, alone.matrix)
        assert rows.matrix.flags.c_contiguous
        assert (rows.as_of.tolist(), rows.unknown) == (alone.as_of.tolist(), alone.unknown)
        assert rows.trace.tolist() == alone.trace.tolist()
