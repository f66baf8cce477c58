"""Champion, canary and shadow: who answers which ids, in which order, and what a shadow is told and tells."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from apps import DEFINITION, NOW, Returns, make_world, purchase, taste, user_spend
from hypothesis import given
from hypothesis import strategies as st
from lanes import (
    PATIENCE_S,
    SPEND,
    USERS,
    Held,
    Predicts,
    client_over,
    lane_of,
    result_of,
    run,
    shards_with_spend,
    turn,
    until,
)

from millpond.deployments.lane import Lane, LaneLimits, ModelBusy
from millpond.deployments.served import Disagreement, Served, Shadow, is_canary
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.layout import compile_layout
from millpond.models.definition import Definition
from millpond.models.model import PredictionFailed

SHARES = st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)
INTS, TEXTS = st.integers(-(2**63), 2**63 - 1), st.text("ab0é", max_size=9)


@pytest.fixture(scope="module")
def shards() -> Any:
    return shards_with_spend()


# -- which ids


def chosen(model: str, share: float, **keys: Any) -> list[bool]:
    return is_canary(model, keys, len(next(iter(keys.values()))), share).tolist()


@given(ids=st.lists(st.tuples(INTS, TEXTS), min_size=1, max_size=20), share=SHARES, model=st.text("abc_", min_size=1))
def test_a_canarys_ids_are_the_same_in_every_request_and_whatever_the_order_of_the_fields(
    ids: list[tuple[int, str]], share: float, model: str
) -> None:
    users, books = [list(column) for column in zip(*ids, strict=True)]
    together = chosen(model, share, user_id=users, book_id=books)
    assert chosen(model, share, book_id=books, user_id=users) == together
    assert [chosen(model, share, user_id=[u], book_id=[b]) for u, b in ids] == [[one] for one in together]
    assert [chosen(model, share, user_id=[u])[0] for u in users] == chosen(model, share, user_id=users)


@given(ids=st.lists(INTS, min_size=1, max_size=50), shares=st.tuples(SHARES, SHARES))
def test_who_is_the_canarys_stays_so_when_its_share_grows(ids: list[int], shares: tuple[float, float]) -> None:
    small, large = (chosen("m", share, user_id=ids) for share in sorted(shares))
    assert all(after for before, after in zip(small, large, strict=True) if before)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("keys", [{"user_id": range(10_000)}, {"name": [f"user-{i}" for i in range(10_000)]}])
def test_a_canary_has_about_its_share_of_the_ids(share: float, keys: dict[str, Any]) -> None:
    got = sum(chosen("m", share, **{name: list(ids) for name, ids in keys.items()})) / 10_000
    assert abs(got - share) < 5 * math.sqrt(share * (1 - share) / 10_000)


def test_the_ids_of_two_models_canaries_have_nothing_to_do_with_each_other() -> None:
    ids = list(range(10_000))
    one, two = (np.array(chosen(name, 0.2, user_id=ids)) for name in ("churn", "offer"))
    assert abs((one & two).mean() - 0.04) < 5 * math.sqrt(0.04 * 0.96 / 10_000)


def test_every_release_gives_a_canary_the_same_ids() -> None:
    assert [i for i in range(60) if chosen("churn", 0.1, user_id=[i])[0]] == [5, 6, 9, 16, 20, 33, 50]
    assert [i for i in range(60) if chosen("churn", 0.1, user_id=[i], name=[f"u{i}"])[0]] == [4, 6, 16, 19, 43]


# -- who answers


def pair(client: Any, share: float, champion: Any = None, canary: Any = None, **options: Any) -> Served:
    lanes = [
        lane_of(predictor or Predicts(), client, version=version, **options)
        for predictor, version in ((champion, "1"), (canary, "2"))
    ]
    return Served("m", lanes[0], lanes[1], share)


async def answers_of(served: Served, users: list[int], **options: Any) -> list[tuple[str, Any]]:
    """The version that answers and its result for each id."""
    answered = await asyncio.wait_for(served.ask({"user_id": users}, len(users), **options), PATIENCE_S)
    return [(lane.loaded.model.version, scored.results[row]) for lane, scored, row in answered]


@given(batches=st.lists(st.lists(st.sampled_from(list(USERS)), max_size=12), min_size=1, max_size=6), share=SHARES)
def test_a_batch_keeps_its_order_across_champion_and_canary(
    shards: Any, batches: list[list[int]], share: float
) -> None:
    async def story() -> None:
        served = pair(client_over(shards)[0], share)
        got = await asyncio.gather(*(answers_of(served, users) for users in batches))
        for users, answers in zip(batches, got, strict=True):
            assert answers == [("2" if chosen("m", share, user_id=[u])[0] else "1", result_of(u)) for u in users]
        assert served.canary is not None
        asked = served.champion.counts.ids + served.canary.counts.ids
        assert asked == sum(map(len, batches))

    run(story)


def test_who_asks_for_features_gets_those_of_the_version_that_answers(shards: Any) -> None:
    async def story() -> None:
        client, _ = client_over(shards)
        served = Served("m", lane_of(Predicts(), client), lane_of(Predicts(), client, features=SPEND[:2]), 0.5)
        answered = await served.ask({"user_id": [1, 2, 3, 4]}, 4, values=True)
        for user, (lane, scored, row) in zip((1, 2, 3, 4), answered, strict=True):
            assert scored.values is not None
            assert len(scored.values[row]) == (2 if lane is served.canary else 3)
            assert scored.values[row]["user_spend.orders_30d"] == user

    run(story)


def test_a_canary_that_fails_or_is_busy_fails_who_has_ids_of_it_and_nobody_else(shards: Any) -> None:
    async def story() -> None:
        client, _ = client_over(shards)
        served = pair(client, 0.5, canary=Predicts(bad=USERS))
        mine = [u for u in USERS if chosen("m", 0.5, user_id=[u])[0]]
        others = [u for u in USERS if u not in mine]
        got = await asyncio.gather(
            answers_of(served, [*others, *mine]), answers_of(served, others), return_exceptions=True
        )
        assert isinstance(got[0], PredictionFailed)
        assert got[1] == [("1", result_of(u)) for u in others]

        held = Held()
        canary = lane_of(Predicts(held), client, version="2", limits=LaneLimits(requests_max=1), predict_s=0.01)
        served = Served("m", lane_of(Predicts(), client, predict_s=0.01), canary, 0.5)
        first = asyncio.ensure_future(answers_of(served, mine))
        await held.has_begun()
        with pytest.raises(ModelBusy):
            await answers_of(served, [*others, *mine])
        assert await answers_of(served, others) == [("1", result_of(u)) for u in others]
        held.go.set()
        assert len(await first) == len(mine)
        await until(lambda: served.champion.idle and canary.idle, "the lanes")

    run(story)


# -- the shadow


def shadowed(champion: Lane, lane: Lane, client: Any) -> Shadow:
    champion.compare = shadow = Shadow(champion, lane, client)
    return shadow


class Scaled:
    """Predicts the orders times a factor; writes into what it was given."""

    def __init__(self, factor: float, column: int = 0, held: Any = None) -> None:
        self.factor, self.column, self.held = factor, column, held
        self.matrices: list[Any] = []

    def predict(self, features: Any) -> Any:
        if self.held is not None:
            self.held()
        self.matrices.append(features.matrix.copy())
        got = self.factor * features.matrix[:, self.column]
        features.matrix[:] = -7.0
        for texts in features.texts.values():
            texts[:] = ["overwritten"] * len(texts)
        return got


async def score(lane: Lane, *users: int) -> list[Any]:
    scored, first = await asyncio.wait_for(lane.ask({"user_id": list(users)}, len(users)), PATIENCE_S)
    return scored.results[first : first + len(users)]


def test_a_shadow_is_asked_after_the_answer(shards: Any) -> None:
    """What a request does next comes first: it sends the answer."""

    async def story() -> None:
        client, _ = client_over(shards)
        predictor = Scaled(2.0)
        champion, lane = lane_of(Scaled(1.0), client), lane_of(predictor, client, version="2")
        shadow = shadowed(champion, lane, client)
        calls_when_answered = []

        async def request(user: int) -> None:
            scored, row = await champion.ask({"user_id": [user]}, 1)
            assert scored.results[row] == user
            calls_when_answered.append(len(predictor.matrices))

        await request(5)  # scored at once
        await until(lambda: shadow.disagreement.compared == 1, "the shadow")
        await asyncio.gather(*(request(user) for user in (1, 2, 3)))
        await until(lambda: shadow.disagreement.compared == 4, "the shadow")
        await asyncio.gather(*(request(user) for user in (1, 2, 3)))  # scored together
        await until(lambda: shadow.disagreement.compared == 7, "the shadow")
        # (Of requests that are scored one after the other, the first one's shadow may come before the second.)
        assert calls_when_answered[0] == 0
        assert calls_when_answered[1] == 1
        assert calls_when_answered[4:] == [len(predictor.matrices) - 1] * 3

    run(story)


@pytest.mark.parametrize("predict_s", [0.0, 0.01], ids=["inline", "threads"])
@pytest.mark.parametrize("features", ["same", "of another definition", "other"])
def test_a_shadow_compares_the_same_rows(shards: Any, features: str, predict_s: float) -> None:
    async def story() -> None:
        client, port = client_over(shards)
        theirs = SPEND
        if features == "of another definition":  # its text was run again: all objects are others, and mean the same
            views = Definition("again.py", DEFINITION + "# again\n").declared().views
            (view,) = (v for v in views if v.name == "user_spend")
            theirs = [view[f.name] for f in SPEND]
        elif features == "other":
            theirs = [user_spend["last_price"], *SPEND]
        champion = lane_of(Scaled(1.0), client, predict_s=predict_s)
        predictor = Scaled(1.5, column=len(theirs) - 3)
        lane = lane_of(predictor, client, version="2", features=theirs, predict_s=predict_s)
        shadow = shadowed(champion, lane, client)
        reads = []
        read_now = port.read_now
        port.read_now = lambda question: reads.append(question.n) or read_now(question)
        answers = await asyncio.gather(*(score(champion, u) for u in (1, 2, 3)), score(champion, 4, 5))
        assert answers == [[1.0], [2.0], [3.0], [4.0, 5.0]]
        await until(lambda: shadow.disagreement.compared == 5, "the shadow")
        assert sum(reads) == (10 if features == "other" else 5)
        assert sorted(np.concatenate(predictor.matrices)[:, len(theirs) - 3].tolist()) == [1.0, 2.0, 3.0, 4.0, 5.0]
        seen = shadow.disagreement.as_json()
        assert {name: seen[name] for name in ("compared", "different", "missed", "failed", "numbers")} == {
            "compared": 5, "different": 5, "missed": 0, "failed": 0, "numbers": 5,
        }  # fmt: skip
        assert (seen["abs_sum"], seen["abs_max"]) == (7.5, 2.5)
        assert [e["id"]["user_id"] for e in seen["examples"]] == [5, 4, 3, 2, 1]
        assert seen["examples"][0] == {"id": {"user_id": 5}, "champion": 5.0, "shadow": 7.5}

    run(story)


def test_a_shadow_that_takes_the_place_of_another_gets_no_rows_of_its(shards: Any) -> None:
    async def story() -> None:
        client, _ = client_over(shards)
        held = Held()
        champion = lane_of(Predicts(held), client, predict_s=0.01)
        one, two = Scaled(1.0), Scaled(1.0)
        before = shadowed(champion, lane_of(one, client, version="2"), client)
        answer = champion.ask({"user_id": [3]}, 1)
        await held.has_begun()
        after = shadowed(champion, lane_of(two, client, version="3", features=SPEND[:1]), client)
        held.go.set()
        await answer
        await until(lambda: before.disagreement.compared == 1, "the shadow that was there")
        assert (len(one.matrices), two.matrices) == (1, [])
        assert after.disagreement.as_json()["compared"] == 0

    run(story)


def test_a_predictor_that_writes_into_what_it_gets_disturbs_neither_shadow_nor_features() -> None:
    """Matrix and strings, in the features that the client asked for and in those that the shadow gets."""
    world = make_world([], layout=compile_layout([], [taste, user_spend]))
    world.post_events("purchases", [purchase("a", 1, 4.0, NOW, book_id="x"), purchase("b", 1, 6.0, NOW, book_id="y")])

    class Reads:
        def predict(self, features: Any) -> Any:
            got = [
                f"{row[0]:g} {book}"
                for row, book in zip(features.matrix, features.texts["taste.first_book"], strict=True)
            ]
            features.matrix[:] = -7.0
            features.texts["taste.first_book"][:] = ["overwritten"]
            return got

    async def story() -> None:
        features = [taste["n"], taste["first_book"]]
        champion, lane = (lane_of(Reads(), world.client, features=features, version=v) for v in "12")
        shadow = shadowed(champion, lane, world.client)
        scored, row = await champion.ask({"user_id": [1]}, 1, values=True)
        assert scored.values is not None
        assert (scored.results[row], scored.values[row]) == ("2 x", {"taste.n": 2.0, "taste.first_book": "x"})
        await until(lambda: shadow.disagreement.compared, "the shadow")
        assert shadow.disagreement.as_json()["examples"] == []

    run(story)


def test_a_shadow_that_fails_or_is_busy_is_counted_and_nobody_notices(shards: Any) -> None:
    async def story() -> None:
        client, port = client_over(shards)
        champion = lane_of(Predicts(), client)
        failing = lane_of(Predicts(bad=[2]), client, version="2")
        shadow = shadowed(champion, failing, client)
        assert await asyncio.gather(*(score(champion, u) for u in (1, 2, 3))) == [[result_of(u)] for u in (1, 2, 3)]
        await until(lambda: failing.idle and failing.counts.requests == 2, "the shadow")
        await turn()
        # The first was scored by itself; the others together, and so they fail together.
        assert (shadow.disagreement.compared, shadow.disagreement.failed) == (1, 2)

        # Of an id that has no result, that one is not compared; nor is one that the champion has none of.
        champions = lane_of(Returns(lambda f: [math.nan if u == 2 else 1.0 for u in f.keys["user_id"]]), client)
        picky = lane_of(Returns(lambda f: [math.nan if u < 4 else 2.0 for u in f.keys["user_id"]]), client, version="2")
        shadow = shadowed(champions, picky, client)
        await score(champions, 1, 2, 3, 4, 5)
        await until(lambda: shadow.disagreement.compared, "the shadow")
        assert (shadow.disagreement.compared, shadow.disagreement.failed) == (2, 2)

        held = Held()
        slow = lane_of(Predicts(held), client, version="3", predict_s=0.01, limits=LaneLimits(requests_max=2))
        shadow = shadowed(champion, slow, client)
        assert await score(champion, 1) == [result_of(1)]
        await held.has_begun()
        for users in ([2], [3, 4], [5, 6, 7]):
            assert await score(champion, *users) == [result_of(u) for u in users]
            await turn()
        assert shadow.disagreement.missed == 5
        held.go.set()
        await until(lambda: shadow.disagreement.compared == 2, "the shadow")
        assert (shadow.disagreement.failed, shadow.disagreement.different) == (0, 0)

        unread = lane_of(Predicts(), client, version="4", features=[*SPEND, user_spend["last_price"]])
        shadow = shadowed(champion, unread, client)
        read_now = port.read_now

        def away(question: Any) -> Any:
            if question.program is unread.loaded.plan.program:
                raise Unavailable("shard 1 is away")
            return read_now(question)

        port.read_now = away
        assert await score(champion, 1, 2) == [result_of(1), result_of(2)]
        port.read_now = lambda question: None if question.program is unread.loaded.plan.program else read_now(question)
        assert await score(champion, 3) == [result_of(3)]
        assert (shadow.disagreement.missed, unread.counts.requests) == (3, 0)

    run(story)


def test_what_is_as_of_a_time_is_not_compared(shards: Any) -> None:
    async def story() -> None:
        client, _ = client_over(shards)
        champion, lane = lane_of(Predicts(), client), lane_of(Predicts(), client, version="2")
        shadowed(champion, lane, client)
        await champion.ask({"user_id": [1]}, 1, as_of_ms=NOW + 1_000)
        await turn()
        await turn()
        assert lane.counts.requests == 0

    run(story)


@given(turns=st.lists(st.lists(st.lists(st.sampled_from(list(USERS)), max_size=4), max_size=4), max_size=5))
def test_the_counts_are_exact_however_requests_are_joined(shards: Any, turns: list[list[list[int]]]) -> None:
    async def story() -> None:
        client, _ = client_over(shards)
        champion, lane = lane_of(Scaled(1.0), client), lane_of(Scaled(3.0), client, version="2")
        shadow = shadowed(champion, lane, client)
        asked = []
        for requests in turns:
            asked += [asyncio.ensure_future(score(champion, *users)) for users in requests]
            await turn()
        await asyncio.gather(*asked)
        users = [u for requests in turns for some in requests for u in some]
        await until(lambda: shadow.disagreement.compared == len(users), "the shadow")
        assert (champion.counts.requests, champion.counts.ids) == (len(asked), len(users))
        seen = shadow.disagreement.as_json()
        assert (seen["different"], seen["numbers"], seen["missed"], seen["failed"]) == (len(users), len(users), 0, 0)
        assert seen["abs_sum"] == sum(2.0 * u for u in users)
        assert seen["abs_max"] == max((2.0 * u for u in users), default=0.0)
        worst = sorted((2.0 * u for u in users), reverse=True)[:10]
        assert [abs(e["champion"] - e["shadow"]) for e in seen["examples"]] == worst

    run(story)


# -- what a disagreement remembers


RESULTS = st.one_of(
    st.integers(-3, 3),
    st.floats(-3, 3),
    st.booleans(),
    st.none(),
    st.text("ab", max_size=2),
    st.lists(st.integers(0, 1), max_size=2),
)


@given(pairs=st.lists(st.tuples(RESULTS, RESULTS), max_size=60))
def test_a_disagreement_is_what_a_list_of_all_would_say(pairs: list[tuple[Any, Any]]) -> None:
    disagreement = Disagreement()
    for i, (champion, shadow) in enumerate(pairs):
        disagreement.add({"user_id": i}, champion, shadow, NOW)
    seen = disagreement.as_json()

    def number(value: Any) -> bool:
        return type(value) in (int, float)

    of_numbers = [abs(c - s) for c, s in pairs if number(c) and number(s)]
    assert seen["compared"] == len(pairs)
    assert seen["different"] == sum(c != s for c, s in pairs)
    assert seen["numbers"] == len(of_numbers)
    assert seen["abs_max"] == max(of_numbers, default=0.0)
    assert math.isclose(seen["abs_sum"], math.fsum(of_numbers), abs_tol=1e-9)
    different = [abs(c - s) if number(c) and number(s) else math.inf for c, s in pairs if c != s]
    kept = [
        abs(e["champion"] - e["shadow"]) if number(e["champion"]) and number(e["shadow"]) else math.inf
        for e in seen["examples"]
    ]
    assert kept == sorted(different, reverse=True)[:10]


def test_examples_begin_afresh_with_what_is_read_later_and_counts_go_on() -> None:
    disagreement = Disagreement()
    disagreement.add({"user_id": 1}, 1.0, 5.0, -(2**63))  # of a cluster that has had no event
    disagreement.add({"user_id": 2}, 1.0, 2.0, NOW + 9)
    assert len(disagreement.as_json()["examples"]) == 2
    disagreement.forget_examples(NOW)
    assert disagreement.as_json()["examples"] == []
    for user, as_of_ms in ((3, NOW - 1), (4, NOW), (5, NOW + 1)):
        disagreement.add({"user_id": user}, 1.0, 2.0, as_of_ms)
        disagreement.forget_examples(NOW)  # once more is harmless
    seen = disagreement.as_json()
    assert [one["id"]["user_id"] for one in seen["examples"]] == [5]
    assert (seen["compared"], seen["different"], seen["abs_max"]) == (5, 5, 4.0)


def test_a_disagreement_of_any_size_can_be_reported() -> None:
    disagreement = Disagreement()
    rng = random.Random(3)
    for i in range(40):
        disagreement.add(
            {"user_id": i}, rng.choice((1e308, -1e308, 10**400, 2**70)), rng.choice((-1e308, 0.5, -(10**400))), NOW
        )
    seen = msgspec.json.decode(msgspec.json.encode(disagreement.as_json()))
    assert seen["compared"] == 40
    assert all(isinstance(seen[name], int | float) and math.isfinite(seen[name]) for name in ("abs_sum", "abs_max"))
