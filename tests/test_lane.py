"""A lane: requests get together what they would get alone, no model holds up another, nobody waits for ever."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pytest
from apps import NOW, make_world, purchases, user_spend
from hypothesis import given
from hypothesis import strategies as st
from lanes import (
    PATIENCE_S,
    SPEND,
    Held,
    Predicts,
    ask,
    busy,
    client_over,
    lane_of,
    result_of,
    results,
    run,
    shards_with_spend,
    turn,
    until,
)

from millpond.deployments.lane import Lane, LaneLimits, ModelBusy, PredictTimeout
from millpond.deployments.stopwatch import Stopwatch
from millpond.deployments.turns import Turns
from millpond.feature_actors import Count, FeatureView
from millpond.feature_actors.errors import AsOfInPast, Unavailable
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import FeatureRows
from millpond.models.model import PredictionFailed

SLOW_S = 0.01
SHORT = LaneLimits(predict_s=0.05, requests_max=3)


@pytest.fixture(scope="module")
def shards() -> Any:
    return shards_with_spend()


def counts(lane: Lane) -> dict[str, int]:
    return asdict(lane.counts)


async def all_come_together(lane: Lane) -> None:
    """Have the lane see a turn of several requests: it waits for the end of the next one then."""
    await asyncio.gather(ask(lane, 1), ask(lane, 2), ask(lane, 3))


# -- together


def test_a_request_that_is_alone_in_its_turn_is_scored_at_once(shards: Any) -> None:
    async def story() -> None:
        predictor = Predicts()
        lane = lane_of(predictor, client_over(shards)[0])
        for user in (1, 2, 3):
            answer = ask(lane, user)
            assert answer.done()
            assert await results(answer) == [result_of(user)]
            await turn()
        assert predictor.calls == [[1], [2], [3]]
        assert counts(lane) == {"requests": 3, "ids": 3, "calls": 3, "failed": 0, "timeouts": 0, "refused": 0}
        assert lane.idle

    run(story)


def at_once(lane: Lane, user: int) -> Any:
    """Return the result of one id if it can be had at once, and answer it; else None."""
    scored = lane.score_at_once({"user_id": [user]})
    if scored is None:
        return None
    lane.answered(scored)
    return scored.results[0]


def test_one_id_that_comes_alone_needs_no_future(shards: Any) -> None:
    async def story() -> None:
        predictor = Predicts(bad=[9])
        lane = lane_of(predictor, client_over(shards)[0])
        assert at_once(lane, 3) == result_of(3)
        assert at_once(lane, 4) is None  # another has come in this turn
        assert await results(ask(lane, 4)) == [result_of(4)]
        await turn()
        await results(ask(lane, 5))  # the last turn brought two
        await turn()
        assert at_once(lane, 6) == result_of(6)
        await turn()
        with pytest.raises(PredictionFailed, match="predict raised ValueError"):
            at_once(lane, 9)
        await turn()
        assert at_once(lane, 7) == result_of(7)
        assert predictor.calls == [[3], [4], [5], [6], [9], [7]]
        assert counts(lane) == {"requests": 6, "ids": 6, "calls": 6, "failed": 1, "timeouts": 0, "refused": 0}
        assert lane.idle

    run(story)


def test_a_request_that_comes_before_the_answer_of_one_alone_has_gone_waits_for_the_end_of_its_turn(
    shards: Any,
) -> None:
    async def story() -> None:
        lane = lane_of(Predicts(), client_over(shards)[0])
        for others in (1, 2):
            scored = lane.score_at_once({"user_id": [3]})
            assert scored is not None
            await turn()  # its answer is held up
            assert [at_once(lane, 4)] * others == [None] * others
            answers = [ask(lane, 4) for _ in range(others)]
            assert [await results(answer) for answer in answers] == [[result_of(4)]] * others
            lane.answered(scored)
            await turn()
            await results(ask(lane, 5))
            await turn()
            assert at_once(lane, 6) == result_of(6)
            await turn()
        assert counts(lane) == {"requests": 9, "ids": 9, "calls": 8, "failed": 0, "timeouts": 0, "refused": 0}

    run(story)


def test_of_several_whose_answers_are_held_up_each_call_is_learned_from(shards: Any) -> None:
    async def story() -> None:
        lane = lane_of(Predicts(), client_over(shards)[0])
        held = [lane.score_at_once({"user_id": [1]})]
        await turn()
        for user in (2, 3):  # they end the turn, and are alone again
            assert await results(ask(lane, user)) == [result_of(user)]
            await turn()
        held.append(lane.score_at_once({"user_id": [4]}))
        for scored in held:
            assert scored is not None
            lane.answered(scored)
        assert counts(lane) == {"requests": 4, "ids": 4, "calls": 4, "failed": 0, "timeouts": 0, "refused": 0}

    run(story)


def test_a_read_that_fails_at_once_is_counted_as_any_other(shards: Any) -> None:
    async def story() -> None:
        counted = []
        for way in (at_once, lambda lane, user: ask(lane, user).result()):
            client, port = client_over(shards)
            lane = lane_of(Predicts(), client)

            def fails(question: Any) -> Any:
                raise Unavailable("away")

            port.read_now = fails
            for user in (1, 2):
                with pytest.raises(Unavailable):
                    way(lane, user)
                await turn()
            assert lane.asked_s > 0
            counted.append(counts(lane))
        assert counted[0] == counted[1]
        assert counted[0]["requests"] == 2

    run(story)


def test_nothing_is_scored_at_once_that_something_is_in_the_way_of(shards: Any) -> None:
    class Compared:
        def before(self, *_: Any) -> None: ...
        def after(self, *_: Any) -> None: ...

    async def story() -> None:
        client, waited = client_over(shards)[0], client_over(shards, waited=True)[0]
        held = Held()
        slow, compared = lane_of(Predicts(held), client, predict_s=SLOW_S), lane_of(Predicts(), client)
        compared.compare = Compared()  # type: ignore[assignment]
        two_stages = lane_of(Neighbours(), client, reads=[user_spend["orders_30d"]])
        for lane in (slow, compared, two_stages, lane_of(Predicts(), waited)):
            assert at_once(lane, 1) is None
            assert lane.idle
            assert counts(lane)["requests"] == 0
            await turn()
        first = ask(slow, 1)
        await held.has_begun()
        slow.in_threads = False  # found quick while it runs
        assert at_once(slow, 2) is None
        held.go.set()
        assert await results(first) == [result_of(1)]

    run(story)


def test_the_requests_of_a_turn_are_scored_in_one_call_in_their_order(shards: Any) -> None:
    async def story() -> None:
        predictor = Predicts()
        lane = lane_of(predictor, client_over(shards)[0])
        first, *others = [ask(lane, 1), ask(lane, 2, 3), ask(lane), ask(lane, 4)]
        assert [a.done() for a in (first, *others)] == [True, False, False, False]  # nobody had been waiting with it
        assert not lane.idle
        got = [await results(a, n) for a, n in zip([first, *others], (1, 2, 0, 1), strict=True)]
        assert got == [[result_of(1)], [result_of(2), result_of(3)], [], [result_of(4)]]
        assert predictor.calls == [[1], [2, 3, 4]]
        answers = [ask(lane, user) for user in (7, 8, 7)]  # the last turn brought several: this one is waited for
        assert not any(a.done() for a in answers)
        assert [await results(a) for a in answers] == [[result_of(u)] for u in (7, 8, 7)]
        assert predictor.calls[2:] == [[7, 8, 7]]
        assert await results(ask(lane, 9)) == [result_of(9)]
        assert ask(lane, 9).done()  # the last turn brought one
        assert counts(lane)["requests"] == 9
        assert counts(lane)["ids"] == 9

    run(story)


def test_turns_of_two_are_scored_by_two(shards: Any) -> None:
    async def story() -> None:
        predictor = Predicts()
        lane = lane_of(predictor, client_over(shards)[0])
        for turns in range(4):
            answers = [ask(lane, 2 * turns + 1), ask(lane, 2 * turns + 2)]
            assert [await results(a) for a in answers] == [[result_of(2 * turns + 1)], [result_of(2 * turns + 2)]]
        assert predictor.calls == [[1], [2], [3, 4], [5, 6], [7, 8]]

    run(story)


def test_what_comes_while_a_call_runs_is_scored_together_after_it(shards: Any) -> None:
    async def story() -> None:
        held = Held()
        predictor = Predicts(held)
        lane = lane_of(predictor, client_over(shards)[0], predict_s=SLOW_S)
        answers = [ask(lane, 1)]
        await held.has_begun()
        for user in (2, 3, 4):
            answers.append(ask(lane, user))
            await turn()
        assert lane.under_way == 4
        held.go.set()
        assert [await results(a) for a in answers] == [[result_of(u)] for u in (1, 2, 3, 4)]
        assert predictor.calls == [[1], [2, 3, 4]]

    run(story)


def test_requests_are_joined_up_to_a_number_of_rows(shards: Any) -> None:
    async def story() -> None:
        predictor = Predicts()
        lane = lane_of(predictor, client_over(shards)[0])
        await all_come_together(lane)
        many = [1] * 500
        answers = [ask(lane, *many), ask(lane, *many), ask(lane, *many), ask(lane, *many * 5), ask(lane, 3)]
        for answer, n in zip(answers, (500, 500, 500, 2_500, 1), strict=True):
            assert len(await results(answer, n)) == n
        assert [len(ids) for ids in predictor.calls[2:]] == [1_000, 500, 2_500, 1]

    run(story)


def test_a_request_as_of_a_time_is_not_joined(shards: Any) -> None:
    async def story() -> None:
        predictor = Predicts()
        lane = lane_of(predictor, client_over(shards)[0])
        await all_come_together(lane)
        answers = [ask(lane, 1), ask(lane, 2, as_of_ms=NOW + 500), ask(lane, 3, as_of_ms=NOW + 500), ask(lane, 4)]
        got = [await results(a) for a in answers]
        assert got == [[result_of(1)], [result_of(2, 500)], [result_of(3, 500)], [result_of(4)]]
        assert predictor.calls[2:] == [[1], [2], [3], [4]]
        with pytest.raises(AsOfInPast):
            await ask(lane, 5, as_of_ms=NOW - 3_600_000)
        assert counts(lane)["failed"] == 0

    run(story)


def test_only_who_asks_for_the_features_gets_them(shards: Any) -> None:
    async def story() -> None:
        lane = lane_of(Predicts(), client_over(shards)[0])
        await all_come_together(lane)
        answers = [ask(lane, 1), ask(lane, 2, 3, values=True), ask(lane, 4)]
        got = [(await a) for a in answers]
        assert [scored.values is None for scored, _ in got] == [True, False, True]
        scored, first = got[1]
        assert [v["user_spend.orders_30d"] for v in scored.values[first : first + 2]] == [2.0, 3.0]

    run(story)


# -- a model that fails


@pytest.mark.parametrize("predict_s", [0.0, SLOW_S], ids=["inline", "threads"])
def test_a_request_that_the_model_fails_on_fails_alone(shards: Any, predict_s: float) -> None:
    async def story() -> None:
        predictor = Predicts(bad=[33])
        lane = lane_of(predictor, client_over(shards)[0], predict_s=predict_s)
        await all_come_together(lane)
        answers = [ask(lane, 2), ask(lane, 4, 33), ask(lane, 5), ask(lane, 6)]
        got = await asyncio.gather(*answers, return_exceptions=True)
        assert [type(g) for g in got] == [tuple, PredictionFailed, tuple, tuple]
        assert str(got[1]) == "model `m`: predict raised ValueError; its text is in the log of the deployment"
        assert [await results(a) for i, a in enumerate(answers) if i != 1] == [[result_of(u)] for u in (2, 5, 6)]
        assert counts(lane)["failed"] == 1
        assert await results(ask(lane, 7)) == [result_of(7)]

    run(story)


@pytest.mark.parametrize("predict_s", [0.0, SLOW_S], ids=["inline", "threads"])
def test_an_id_without_a_result_fails_alone_and_nobody_is_asked_again(shards: Any, predict_s: float) -> None:
    class Some(Predicts):
        def predict(self, features: Any) -> Any:
            return [math.nan if one[-1] > 20 else one for one in super().predict(features)]

    async def story() -> None:
        predictor = Some()
        lane = lane_of(predictor, client_over(shards)[0], predict_s=predict_s)
        await all_come_together(lane)
        predictor.calls.clear()
        asked = [(2,), (33, 4, 34), (5, 6), (35,)]
        got = [await results(answer, len(ids)) for answer, ids in [(ask(lane, *ids), ids) for ids in asked]]
        users = list(itertools.chain(*asked))
        assert sorted(itertools.chain(*predictor.calls)) == sorted(users)
        for result, user in zip(itertools.chain(*got), users, strict=True):
            if user <= 20:
                assert result == result_of(user)
            else:
                assert str(result) == "model `m`: predict returned the number nan, which JSON cannot hold"
        assert (counts(lane)["failed"], lane.idle) == (2, True)

    run(story)


@pytest.mark.parametrize("predict_s", [0.0, SLOW_S], ids=["inline", "threads"])
def test_a_model_that_fails_for_all_fails_each(shards: Any, predict_s: float) -> None:
    async def story() -> None:
        predictor = Predicts(bad=range(100))
        lane = lane_of(predictor, client_over(shards)[0], predict_s=predict_s)
        got = await asyncio.gather(*(ask(lane, user) for user in range(5)), return_exceptions=True)
        assert [type(g) for g in got] == [PredictionFailed] * 5
        assert counts(lane) | {"calls": 0} == {
            "requests": 5,
            "ids": 5,
            "calls": 0,
            "failed": 5,
            "timeouts": 0,
            "refused": 0,
        }
        assert lane.idle

    run(story)


class Panic(BaseException):
    """What a library in Rust raises."""


@pytest.mark.parametrize("predict_s", [0.0, SLOW_S], ids=["inline", "threads"])
@pytest.mark.parametrize("way_out", [SystemExit, Panic, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
def test_a_model_that_would_end_the_process_fails(shards: Any, way_out: type[BaseException], predict_s: float) -> None:
    def leave(ids: list[Any]) -> None:
        if 3 in ids:
            raise way_out("the model has had enough")

    async def story() -> None:
        client, _ = client_over(shards)
        turns = Turns(client)
        lane = lane_of(Predicts(leave), client, predict_s=predict_s, turns=turns)
        beside = lane_of(Predicts(), client, turns=turns)
        for _ in range(2):  # in the first turn, the first is scored at once
            answers = [ask(lane, 3), ask(lane, 4), ask(beside, 5)]
            failed, *others = await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), PATIENCE_S)
            assert isinstance(failed, PredictionFailed)
            assert f"predict raised {way_out.__name__}" in str(failed)
            assert [scored.results[row] for scored, row in others] == [result_of(4), result_of(5)]

    run(story)


@pytest.mark.parametrize("predict_s", [0.0, SLOW_S], ids=["inline", "threads"])
def test_a_bug_of_ours_leaves_nobody_waiting(shards: Any, predict_s: float) -> None:
    async def story() -> None:
        lane = lane_of(Predicts(), client_over(shards)[0], predict_s=predict_s)
        wrong = {"book_id": ["b"]}  # of another plan
        for _ in range(2):  # in the first turn, the first is scored at once
            answers = [lane.ask(wrong, 1), ask(lane, 1), lane.ask(wrong, 1), ask(lane, 2)]
            got = await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), PATIENCE_S)
            assert [type(g) for g in got] == [KeyError, tuple, KeyError, tuple]

        class Breaks:
            """Compares, and has a bug."""

            def before(self, keys: Any, rows: FeatureRows) -> FeatureRows | None:
                raise ZeroDivisionError

            def after(self, keys: Any, rows: FeatureRows, results: Any) -> None:
                raise AssertionError("there was nothing to compare")

        lane.compare = Breaks()
        got = await asyncio.wait_for(
            asyncio.gather(*(ask(lane, u) for u in (1, 2)), return_exceptions=True), PATIENCE_S
        )
        assert [type(g) for g in got] == [ZeroDivisionError] * 2
        lane.compare = None
        assert await results(ask(lane, 2)) == [result_of(2)]
        assert lane.idle

    run(story)


class NoThreads(Executor):
    """Threads that cannot be had until `there`: then those of another pool."""

    def __init__(self, pool: Executor) -> None:
        self.pool, self.there = pool, False

    def submit(self, fn: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        if not self.there:
            raise RuntimeError("can't start new thread")
        return self.pool.submit(fn, *arguments, **named)


def test_a_thread_that_cannot_be_had_fails_the_request_and_not_the_lane(shards: Any) -> None:
    async def story() -> None:
        with ThreadPoolExecutor(1) as pool:
            threads = NoThreads(pool)
            lane = lane_of(Predicts(), client_over(shards)[0], predict_s=SLOW_S, threads=threads)
            got = await asyncio.gather(ask(lane, 1), ask(lane, 2), ask(lane, 3), return_exceptions=True)
            assert [type(g) for g in got] == [RuntimeError] * 3
            assert (lane.idle, lane.under_way) == (True, 0)
            threads.there = True
            assert await results(ask(lane, 2)) == [result_of(2)]

    run(story)


def test_requests_at_the_end_of_a_replica_are_told_to_try_another(shards: Any) -> None:
    async def story() -> None:
        held, other = Held(), Held()
        with ThreadPoolExecutor(1) as threads:
            client, _ = client_over(shards)
            first = lane_of(Predicts(held), client, predict_s=SLOW_S, threads=threads)
            lane = lane_of(Predicts(other), client, predict_s=SLOW_S, threads=threads)
            begun = ask(first, 1)
            await held.has_begun()
            await all_turn(lane)
            answers = [ask(lane, 2), ask(lane, 3)]
            await turn()
            threads.shutdown(wait=False, cancel_futures=True)
            held.go.set()
            assert await results(begun) == [result_of(1)]
            got = await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), PATIENCE_S)
            assert all(isinstance(g, Unavailable | RuntimeError) for g in got)
            assert not other.begun.is_set()

    async def all_turn(lane: Lane) -> None:
        lane._turns._alone = False  # as if the last turn had brought several

    run(story)


# -- where it is called


def test_predict_is_never_called_twice_at_once(shards: Any) -> None:
    """`Predicts` checks it: a large batch in a thread, small ones meanwhile, all answered."""

    async def story() -> None:
        held = Held()
        predictor = Predicts(lambda ids: held() if len(ids) > 900 else busy(0.0002 * len(ids)))
        lane = lane_of(predictor, client_over(shards)[0])
        await results(ask(lane, *[1] * 100), 100)  # by which it is known what a row takes
        assert not lane.in_threads
        large = ask(lane, *[2] * 1_000)
        await held.has_begun()
        small = [ask(lane, user) for user in (3, 4)]
        await turn()
        small.append(ask(lane, 5))
        await turn()
        assert (lane.under_way, any(a.done() for a in small)) == (4, False)
        held.go.set()
        assert await results(large, 1_000) == [result_of(2)] * 1_000
        assert [await results(a) for a in small] == [[result_of(u)] for u in (3, 4, 5)]
        assert predictor.calls[2:] == [[3, 4, 5]]
        assert not lane.in_threads  # it is a quick model all the same

    run(story)


def test_a_large_batch_is_not_scored_on_the_loop_before_it_is_known_what_a_row_takes(shards: Any) -> None:
    async def story() -> None:
        held = Held()
        predictor = Predicts(lambda ids: held() if len(ids) > 100 else busy(0.0003))
        lane = lane_of(predictor, client_over(shards)[0], predict_s=0.0003)
        answer = ask(lane, *[2] * 1_000)  # a predictor that goes row by row would take 0.3 s
        assert not answer.done()
        await held.has_begun()
        held.go.set()
        assert await results(answer, 1_000) == [result_of(2)] * 1_000

    run(story)


def test_a_slow_model_is_called_in_a_thread_while_a_quick_one_beside_it_answers(shards: Any) -> None:
    async def story() -> None:
        held = Held()
        client, _ = client_over(shards)
        slow, quick = Predicts(held), Predicts()
        slow_lane, quick_lane = lane_of(slow, client, predict_s=SLOW_S), lane_of(quick, client)
        waiting = ask(slow_lane, 1)
        await held.has_begun()
        for user in range(1, 31):
            assert await results(ask(quick_lane, user)) == [result_of(user)]
        assert not waiting.done()
        held.go.set()
        assert await results(waiting) == [result_of(1)]
        assert (slow.threads, quick.threads) == ({"tested"}, {"MainThread"})

    run(story)


def test_a_model_is_found_slow_by_its_calls_and_quick_again(shards: Any) -> None:
    async def story() -> None:
        seconds = 0.002
        predictor = Predicts(lambda ids: busy(seconds))
        lane = lane_of(predictor, client_over(shards)[0])
        assert not lane.in_threads
        for _ in range(9):  # the first may have waited for a processor
            await results(ask(lane, 1))
        assert lane.in_threads
        assert predictor.threads == {"MainThread", "tested"}
        assert 0.0004 < lane.call_s < 0.1
        seconds = 0.0
        quick = 0
        while lane.in_threads:
            await results(ask(lane, 1))
            quick += 1
            assert quick < 2_000
        assert quick >= 9
        predictor.threads.clear()
        assert await results(ask(lane, 1)) == [result_of(1)]
        assert predictor.threads == {"MainThread"}

    run(story)


@pytest.mark.parametrize(
    ("calls_ms", "slow"),
    [
        ([0.6] * 5, True),  # most of nine
        ([0.6] * 4, False),
        ([50.0], False),  # which may be the machine's fault
        ([1.0, 0.0, 0.0] * 20, False),
        ([20.0, 20.0, 20.0, 20.0, 0.0, 0.0, 0.0, 0.0, 0.0] * 5, True),  # less than half, and yet 9 ms a call
        ([3.0, 0.0, 0.0, 3.0], True),
    ],
)
def test_a_model_is_slow_if_most_calls_are_or_all_are_on_average(
    shards: Any, calls_ms: list[float], slow: bool
) -> None:
    lane = lane_of(Predicts(), client_over(shards)[0])
    for ms in calls_ms:
        lane._note(ms / 1_000, 1)
        lane._note(0.1, 1_000)  # of many rows, which tells nothing of few
    assert lane.in_threads == slow


def test_many_rows_may_take_longer_than_few(shards: Any) -> None:
    async def story() -> None:
        lane = lane_of(Predicts(lambda ids: busy(2e-6 * len(ids))), client_over(shards)[0])
        for _ in range(9):
            await results(ask(lane, *[1] * 1_000), 1_000)
        assert not lane.in_threads

    run(story)


# -- limits


def test_a_hung_model_times_out_keeps_its_place_and_refuses_who_is_too_many(shards: Any) -> None:
    async def story() -> None:
        held = Held()
        predictor = Predicts(held)
        lane = lane_of(
            predictor, client_over(shards)[0], limits=LaneLimits(predict_s=1.0, requests_max=3), predict_s=SLOW_S
        )
        hung = ask(lane, 1)
        await held.has_begun()
        waiting = [ask(lane, 2), ask(lane, 3)]
        with pytest.raises(ModelBusy) as refused:
            ask(lane, 4)
        assert (refused.value.status, refused.value.code, refused.value.retry_after_ms) == (429, "model_busy", 1_000)
        assert str(refused.value) == (
            "model `m`: 3 requests wait for it or are under way; allowed are no more (setting `model_requests_max`); "
            "retry, or give the model a pool of its own"
        )
        got = await asyncio.gather(hung, *waiting, return_exceptions=True)
        assert [type(g) for g in got] == [PredictTimeout] * 3
        assert (got[0].status, got[0].code) == (504, "predict_timeout")  # type: ignore[union-attr]
        assert str(got[0]) == (
            "model `m`: no result within 1 s (setting `predict_timeout_s`); the model's owner has to look, or give "
            "it a pool of its own"
        )
        assert lane.under_way == 1  # what has begun cannot be stopped
        assert not lane.idle
        late = [ask(lane, 5), ask(lane, 6)]
        with pytest.raises(ModelBusy):
            ask(lane, 7)
        held.go.set()
        assert [await results(a) for a in late] == [[result_of(5)], [result_of(6)]]
        assert predictor.calls == [[1], [5, 6]]  # who was told already is not predicted
        assert counts(lane) == {"requests": 7, "ids": 7, "calls": 2, "failed": 0, "timeouts": 3, "refused": 2}
        assert lane.idle

    run(story)


@pytest.mark.parametrize("waited", [False, True], ids=["now", "waited"])
def test_who_waited_already_when_a_call_hangs_times_out_too(shards: Any, waited: bool) -> None:
    async def story() -> None:
        held = Held()
        client, port = client_over(shards, waited=True)
        port.now = not waited
        predictor = Predicts(lambda ids: held() if len(ids) > 900 else busy(0.0001 * len(ids)))
        lane = lane_of(predictor, client, limits=SHORT)
        await results(ask(lane, *[1] * 100), 100)
        await all_come_together(lane)
        calls = len(predictor.calls)
        # Of one turn, and none is joined with another: when they came, no thread was busy.
        hung, *behind = [ask(lane, *[2] * 1_000, as_of_ms=NOW), ask(lane, 3, as_of_ms=NOW), ask(lane, 4)]
        await held.has_begun()
        got = await asyncio.wait_for(asyncio.gather(hung, *behind, return_exceptions=True), PATIENCE_S)
        assert [type(g) for g in got] == [PredictTimeout] * 3
        held.go.set()
        await until(lambda: lane.idle, "the hung call to end")
        assert [len(ids) for ids in predictor.calls[calls:]] == [1_000]

    run(story)


def test_places_of_who_has_gone_are_free(shards: Any) -> None:
    async def story() -> None:
        held = Held()
        lane = lane_of(Predicts(held), client_over(shards)[0], limits=SHORT, predict_s=SLOW_S)
        hung = ask(lane, 1)
        await held.has_begun()
        for _ in range(5):  # more than there are places
            gone = ask(lane, 2)
            gone.cancel()
            await until(lambda: lane.under_way == 1, "the time limit of who has gone")
        with pytest.raises(PredictTimeout):
            await hung
        held.go.set()
        await until(lambda: lane.idle, "the hung call to end")

    run(story)


def test_a_quick_model_has_no_limit(shards: Any) -> None:
    async def story() -> None:
        lane = lane_of(Predicts(), client_over(shards)[0], limits=SHORT)
        answers = [ask(lane, 1) for _ in range(100)]
        assert [await results(a) for a in answers] == [[result_of(1)]] * 100
        assert counts(lane)["refused"] == 0

    run(story)


# -- reads that have to be waited for


@pytest.mark.parametrize("predict_s", [0.0, SLOW_S], ids=["inline", "threads"])
def test_a_read_that_is_waited_for_is_joined(shards: Any, predict_s: float) -> None:
    async def story() -> None:
        client, port = client_over(shards, waited=True)
        predictor = Predicts()
        lane = lane_of(predictor, client, predict_s=predict_s)
        await all_come_together(lane)
        port.reads.clear()
        predictor.calls.clear()
        answers = [ask(lane, user) for user in (4, 5, 6)]
        assert [await results(a) for a in answers] == [[result_of(u)] for u in (4, 5, 6)]
        assert port.reads == [3]
        assert predictor.calls == [[4, 5, 6]]

    run(story)


def test_who_waits_for_a_read_is_under_way(shards: Any) -> None:
    async def story() -> None:
        client, port = client_over(shards, waited=True)
        lane = lane_of(Predicts(), client)
        port.gate.clear()
        answer = ask(lane, 1)
        await turn()
        await turn()
        assert (lane.idle, lane.under_way) == (False, 1)  # else it would be taken out of memory as it is
        port.gate.set()
        assert await results(answer) == [result_of(1)]
        assert (lane.idle, lane.under_way) == (True, 0)

    run(story)


def test_a_read_that_fails_is_not_the_models_fault(shards: Any) -> None:
    async def story() -> None:
        client, port = client_over(shards, waited=True)
        predictor = Predicts()
        lane = lane_of(predictor, client)
        port.failures.append(Unavailable("shard 1 is away"))
        with pytest.raises(Unavailable, match="shard 1 is away"):
            await ask(lane, 1)
        # Together, each is asked for again by itself: only the second one's shard is still away.
        await all_come_together(lane)
        predictor.calls.clear()
        port.failures += [Unavailable("shard 1 is away"), None, Unavailable("shard 1 is away")]
        got = await asyncio.gather(*(ask(lane, u) for u in (1, 2, 3)), return_exceptions=True)
        assert [type(g) for g in got] == [tuple, Unavailable, tuple]
        assert sorted(predictor.calls) == [[1], [3]]
        assert counts(lane)["failed"] == 0

    run(story)


# -- two stages


class Neighbours:
    """Reads the orders of the next two users of each, while it predicts."""

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def predict(self, features: Any, reader: Any) -> Any:
        self.threads.add(threading.current_thread().name.partition("_")[0])
        ids = features.keys["user_id"]
        mine = features.matrix[:, 0].copy()
        features.matrix[:] = -1.0  # it is its own to write into
        near = reader.read([user_spend["orders_30d"]], {"user_id": [u + k for u in ids for k in (1, 2)]})
        return [[m, *row] for m, row in zip(mine.tolist(), near.matrix.reshape(-1, 2).tolist(), strict=True)]


@pytest.mark.parametrize("waited", [False, True], ids=["now", "waited"])
@pytest.mark.parametrize("predict_s", [0.0, SLOW_S], ids=["inline", "threads"])
def test_a_model_of_two_stages_reads_while_it_predicts(shards: Any, predict_s: float, waited: bool) -> None:
    async def story() -> None:
        client, _ = client_over(shards, waited=waited)
        predictor = Neighbours()
        lane = lane_of(predictor, client, predict_s=predict_s, reads=[user_spend["orders_30d"]])
        assert await results(ask(lane, 5)) == [[5.0, 6.0, 7.0]]
        answers = [ask(lane, u) for u in (1, 2, 3)]
        assert [await results(a) for a in answers] == [[[u, u + 1.0, u + 2.0]] for u in (1.0, 2.0, 3.0)]
        assert counts(lane)["failed"] == 0
        for _ in range(2):
            predictor.threads.clear()
            for _ in range(20):
                assert await results(ask(lane, 1)) == [[1.0, 2.0, 3.0]]
        if waited and not predict_s:  # a quick one, too, stays there: it would hold up the event loop again and again
            assert predictor.threads == {"tested"}

    run(story)


def test_a_second_stage_that_cannot_be_read_is_not_the_models_fault(shards: Any) -> None:
    async def story() -> None:
        client, port = client_over(shards, waited=True)
        lane = lane_of(Neighbours(), client, predict_s=SLOW_S, reads=[user_spend["orders_30d"]])
        port.failures += [None, Unavailable("shard 1 is away")]
        with pytest.raises(Unavailable, match="shard 1 is away"):
            await ask(lane, 1)
        assert counts(lane)["failed"] == 0
        assert await results(ask(lane, 1)) == [[1.0, 2.0, 3.0]]

    run(story)


def test_the_second_stage_is_as_of_the_request(shards: Any) -> None:
    class Ages:
        def predict(self, features: Any, reader: Any) -> Any:
            again = reader.read([user_spend["recency_s"]], features.keys)
            return (again.matrix[:, 0] - features.matrix[:, 2]).tolist()

    async def story() -> None:
        for predict_s in (0.0, SLOW_S):
            lane = lane_of(Ages(), client_over(shards)[0], predict_s=predict_s, reads=[user_spend["recency_s"]])
            for as_of_ms in (None, NOW + 5_000):
                assert await results(ask(lane, 5, as_of_ms=as_of_ms)) == [0.0]

    run(story)


@pytest.mark.parametrize("predict_s", [0.0, SLOW_S], ids=["inline", "threads"])
def test_a_time_that_the_second_stage_cannot_be_read_as_of_is_not_the_models_fault(predict_s: float) -> None:
    exact = FeatureView(
        "exact", owner="tests", source=purchases, key=["user_id"], features={"orders": Count(window="30d", exact=True)}
    )

    class Again:
        def predict(self, features: Any, reader: Any) -> Any:
            return reader.read([user_spend["orders_30d"]], features.keys).matrix[:, 0]

    async def story() -> None:
        world = make_world([], layout=compile_layout([], [exact, user_spend]))
        lane = lane_of(
            Again(), world.client, predict_s=predict_s, features=list(exact), reads=[user_spend["orders_30d"]]
        )
        with pytest.raises(AsOfInPast):
            await ask(lane, 1, as_of_ms=NOW - 1_000)
        assert counts(lane)["failed"] == 0
        assert await results(ask(lane, 1, as_of_ms=NOW)) == [0.0]

    run(story)


# -- clients that go


@pytest.mark.parametrize("waited", [False, True], ids=["now", "waited"])
@pytest.mark.parametrize("predict_s", [0.0, SLOW_S], ids=["inline", "threads"])
def test_a_client_that_goes_disturbs_nobody(shards: Any, predict_s: float, waited: bool) -> None:
    async def story() -> None:
        client, _ = client_over(shards, waited=waited)
        predictor = Predicts()
        lane = lane_of(predictor, client, predict_s=predict_s)
        await all_come_together(lane)
        predictor.calls.clear()
        answers = [ask(lane, u) for u in (1, 2, 3)]
        answers[0].cancel()
        answers[1].cancel()
        assert await results(answers[2]) == [result_of(3)]
        assert predictor.calls == [[3]]  # nobody waited for the others
        answers = [ask(lane, u) for u in (1, 2)]
        await turn()
        answers[0].cancel()  # now it is being read or predicted
        assert await results(answers[1]) == [result_of(2)]
        alone = ask(lane, 4)
        alone.cancel()
        await until(lambda: lane.idle, "the lane to be done")
        assert await results(ask(lane, 5)) == [result_of(5)]

    run(story)


# -- all of it: together is alone


Asks = st.tuples(
    st.lists(st.integers(1, 40), max_size=4), st.sampled_from((None, None, 0, 500)), st.booleans(), st.booleans()
)


@given(
    turns=st.lists(st.lists(Asks, max_size=5), max_size=5),
    bad=st.sets(st.integers(1, 40), max_size=3),
    predict_s=st.sampled_from((0.0, SLOW_S)),
    waited=st.booleans(),
)
def test_requests_get_together_what_they_get_alone(
    shards: Any, turns: list[list[Any]], bad: set[int], predict_s: float, waited: bool
) -> None:
    """Turns of requests: ids, as of so much later, whether features are wanted, whether the client goes."""

    async def story() -> None:
        predictor = Predicts(bad=sorted(bad))
        lane = lane_of(predictor, client_over(shards, waited=waited)[0], predict_s=predict_s)
        asked = []
        for requests in turns:
            for users, later_ms, values, goes in requests:
                answer = ask(lane, *users, as_of_ms=None if later_ms is None else NOW + later_ms, values=values)
                if goes:
                    answer.cancel()
                asked.append((answer, users, later_ms or 0, values))
            await turn()
        failed = 0
        for answer, users, later_ms, values in asked:
            if answer.cancelled():
                continue
            if bad & set(users):
                failed += 1
                with pytest.raises(PredictionFailed):
                    await answer
                continue
            scored, first = await asyncio.wait_for(answer, PATIENCE_S)
            assert scored.results[first : first + len(users)] == [result_of(u, later_ms) for u in users]
            assert (scored.values is not None) == values
            if scored.values is not None:
                orders = [v["user_spend.orders_30d"] for v in scored.values[first : first + len(users)]]
                assert orders == [float(u) for u in users]
        await until(lambda: lane.idle, "the lane to be done")
        assert lane.under_way == 0
        assert (lane.counts.requests, lane.counts.ids) == (len(asked), sum(len(users) for _, users, _, _ in asked))
        assert failed <= lane.counts.failed <= sum(bool(bad & set(users)) for _, users, _, _ in asked)

    run(story)


#: Features of lanes that share turns, and what `Predicts` returns of them for a user.
OF_LANES: list[tuple[list[Any], Callable[[int, float], list[Any]]]] = [
    (SPEND, lambda u, late_s: [u, u * u, u + late_s, u]),
    (SPEND[::-1], lambda u, late_s: [u + late_s, u * u, u, u]),
    ([user_spend["last_price"]], lambda u, late_s: [u, u]),
    ([user_spend["last_price"], *SPEND], lambda u, late_s: [u, u, u * u, u + late_s, u]),
]


def test_what_a_turn_brings_to_many_lanes_is_read_in_one_go(shards: Any) -> None:
    async def story() -> None:
        client, port = client_over(shards)
        together = Turns(client)
        lanes = [
            lane_of(Predicts(), client, name=f"m{i}", features=features, turns=together)
            for i, (features, _) in enumerate(OF_LANES)
        ]
        together.plans = client.plan_set([lane.loaded.plan for lane in lanes])
        reads = []
        read_now = port.read_now
        port.read_now = lambda question: reads.append(question.n) or read_now(question)
        for turns in range(3):
            answers = [ask(lane, 3 + i, 9) for i, lane in enumerate(lanes)]
            for i, answer in enumerate(answers):
                assert await results(answer, 2) == [OF_LANES[i][1](3 + i, 0), OF_LANES[i][1](9, 0)]
            assert reads == ([2, 6] if turns == 0 else [8])  # the very first is alone as far as one knows
            reads.clear()

    run(story)


@pytest.mark.parametrize("values", [False, True])
def test_a_request_as_of_a_time_is_not_read_with_others_if_who_waited_before_it_has_gone(
    shards: Any, values: bool
) -> None:
    async def story() -> None:
        client, _ = client_over(shards)
        together = Turns(client)
        lanes = [lane_of(Predicts(), client, name=f"m{i}", turns=together) for i in range(3)]
        together.plans = client.plan_set([lane.loaded.plan for lane in lanes])
        await asyncio.gather(*(ask(lane, 1) for lane in lanes))  # from now on they wait for the end of a turn
        gone = ask(lanes[0], 2)
        answers = [
            ask(lanes[0], 3, as_of_ms=NOW + 500, values=values),
            ask(lanes[0], 4),
            *(ask(lane, 5) for lane in lanes[1:]),
        ]
        gone.cancel()
        assert [await results(a) for a in answers] == [
            [result_of(3, 500)], [result_of(4)], [result_of(5)], [result_of(5)]
        ]  # fmt: skip
        assert (await answers[0])[0].rows.as_of.tolist() == [NOW + 500]

    run(story)


@given(
    turns=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 40), max_size=3), st.booleans()), max_size=8),
        max_size=5,
    ),
    in_set=st.one_of(st.just({0, 1, 2, 3}), st.sets(st.integers(0, 3))),
    threads=st.sets(st.integers(0, 3), max_size=2),
    bad=st.sets(st.integers(1, 40), max_size=2),
    waited=st.booleans(),
)
def test_lanes_that_share_their_turns_answer_as_each_would_alone(
    shards: Any, turns: list[list[Any]], in_set: set[int], threads: set[int], bad: set[int], waited: bool
) -> None:
    """Turns of requests: of which lane, ids, whether as of a later time. in_set: lanes that can be read together."""

    async def story() -> None:
        client, _ = client_over(shards, waited=waited)
        together = Turns(client)
        lanes = [
            lane_of(
                Predicts(bad=sorted(bad)), client, name=f"m{i}", features=features, turns=together,
                predict_s=SLOW_S if i in threads else 0.0,
            )
            for i, (features, _) in enumerate(OF_LANES)
        ]  # fmt: skip
        together.plans = client.plan_set([lanes[i].loaded.plan for i in sorted(in_set)])
        asked = []
        for requests in turns:
            for i, users, late in requests:
                asked.append((ask(lanes[i], *users, as_of_ms=NOW + 500 if late else None), i, users, late))
            await turn()
        for answer, i, users, late in asked:
            if bad & set(users):
                with pytest.raises(PredictionFailed, match=f"model `m{i}`"):
                    await answer
            else:
                assert await results(answer, len(users)) == [OF_LANES[i][1](u, 0.5 * late) for u in users]
        await until(lambda: all(lane.idle for lane in lanes), "the lanes to be done")

    run(story)


def test_a_stopwatch_leaves_out_what_others_had_the_processor_for_and_nothing_else() -> None:
    """Four busy threads hold up a fifth, which works for 20 ms and then sleeps for as long."""

    def work(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            hashlib.sha256(b"x" * 4_096)  # holds the interpreter: of a lock one would have to wait

    children = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        shares = []
        for _ in range(5):
            watch, begun = Stopwatch(), time.perf_counter()
            work(0.02)
            shares.append((watch.seconds, time.perf_counter() - begun))
        assert min(own for own, _ in shares) < 0.03
        assert any(own < 0.7 * passed for own, passed in shares), shares
    finally:
        for child in children:
            child.kill()
            child.wait()
    watch = Stopwatch()
    time.sleep(0.02)
    assert watch.seconds >= 0.02
