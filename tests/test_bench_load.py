"""The load generator in its open loop: when requests are due, and what their latency counts from."""

from __future__ import annotations

import itertools
import select
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_bench import _http, _load, server

from millpond.bench.load import LoadFailed, Outcome, RunningLoad, run_load
from millpond.bench.loops import Ending, drive, due_times_ns, requests_of
from millpond.bench.noop import ANSWER
from millpond.bench.options import Ids, Options
from millpond.bench.wrk import wrk_figures
from millpond.feature_actors.errors import BadRequest


class Stalling:
    """An answer that is held back while the server stalls: it is made when it is asked for."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def stall(self, seconds: float) -> None:
        threading.Timer(seconds, self.gate.set).start()

    def __len__(self) -> int:
        return len(_http(ANSWER))

    def __getitem__(self, part: slice) -> bytes:
        assert self.gate.wait(10)
        return _http(ANSWER)[part]


@pytest.fixture
def stalling() -> Iterator[Stalling]:
    one = Stalling()
    yield one
    one.gate.set()


def _open(port: int, **changes: Any) -> Any:
    return _load(port, **{"rate": 200.0, "seconds": 0.5, "warm_seconds": 0.0, "connections": 1, **changes})


# -- when requests are due


def test_requests_of_a_fixed_schedule_are_evenly_apart_and_fill_the_time() -> None:
    due = due_times_ns(_load(1, rate=250.0, arrivals="fixed", warm_seconds=1.0, seconds=3.0))
    assert len(due) == 1_000
    assert set(np.diff(due)) == {4_000_000}
    assert due[0] == 0


def test_requests_of_a_poisson_process_have_gaps_without_memory_and_come_back_with_their_seed() -> None:
    load = _load(1, rate=1_000.0, warm_seconds=0.0, seconds=50.0, seed=3)
    due = due_times_ns(load)
    gaps_ms = np.diff(due) / 1e6
    assert due[-1] < 50e9
    assert len(due) == pytest.approx(50_000, rel=0.02)
    # Mean and deviation of an exponential are one; so many gaps are longer than the mean.
    assert gaps_ms.mean() == pytest.approx(1.0, rel=0.02)
    assert gaps_ms.std() == pytest.approx(1.0, rel=0.03)
    assert (gaps_ms > 1.0).mean() == pytest.approx(np.exp(-1), abs=0.01)
    assert (due == due_times_ns(load)).all()
    assert len(due) != len(due_times_ns(_load(1, rate=1_000.0, warm_seconds=0.0, seconds=50.0, seed=4)))


def test_bodies_that_are_sent_once_end_the_schedule() -> None:
    assert len(due_times_ns(_load(1, rate=100.0, seconds=10.0, once=True))) == 2


# -- what latency counts from


@pytest.mark.parametrize("arrivals", ["poisson", "fixed"])
def test_every_request_that_is_due_is_sent_and_timed(arrivals: str) -> None:
    with server(_http(ANSWER)) as (port, asked):
        load = _open(port, arrivals=arrivals, connections=4, warm_seconds=0.1, rate=400.0)
        outcome = drive(load)
    due = due_times_ns(load)
    assert (outcome.failed, outcome.checked, len(asked)) == (0, len(due), len(due))
    assert outcome.answers == len(outcome.latencies_ns) == len(outcome.lateness_ns) == (due >= 100_000_000).sum()
    assert sorted(asked) == sorted(request for request, _ in zip(itertools.cycle(requests_of(load)), due, strict=False))
    assert outcome.rate == 400.0
    assert outcome.seconds >= 0.5  # longer if the last answers came later


def test_requests_that_were_due_while_the_other_side_stalled_count_the_whole_stall(stalling: Stalling) -> None:
    """A closed loop would have one slow answer a connection, and none for the requests that it did not send."""
    with server(stalling) as (port, _):  # type: ignore[arg-type]
        stalling.stall(0.4)
        outcome = drive(_open(port, arrivals="fixed"))
    assert (outcome.failed, outcome.answers) == (0, 100)
    # One was due every 5 ms: those of the first half of the stall took more than half of it.
    longest_ns = max(outcome.latencies_ns)
    assert longest_ns >= 350_000_000
    assert sum(ns > longest_ns / 2 for ns in outcome.latencies_ns) >= 0.6 * longest_ns / 2 / 5_000_000
    assert outcome.connections > 20  # it opened one for each that was under way


def test_a_request_without_a_free_connection_waits_and_is_late_and_that_counts(stalling: Stalling) -> None:
    with server(stalling) as (port, _):  # type: ignore[arg-type]
        stalling.stall(0.4)
        outcome = drive(_open(port, arrivals="fixed", connections_max=2))
    assert (outcome.failed, outcome.answers, outcome.connections) == (0, 100, 2)
    assert sum(ns > 200_000_000 for ns in outcome.latencies_ns) > 10
    assert outcome.late_ms(1.0) > 200
    assert not outcome.kept_rate


def test_rate_is_kept_if_hardly_any_request_is_late() -> None:
    def outcome(late_ms: list[float], failed: int = 0) -> Outcome:
        late = [round(ms * 1e6) for ms in late_ms]
        return Outcome(len(late), 1.0, late, len(late), failed, None, 0.1, 1.0, rate=1.0, lateness_ns=late)

    assert outcome([0.1] * 99 + [50.0]).kept_rate
    assert not outcome([0.1] * 97 + [2.0] * 3).kept_rate
    assert not outcome([0.1] * 99, failed=1).kept_rate
    assert outcome([]).kept_rate  # a closed loop has none


# -- what goes wrong


def test_connections_that_are_closed_while_nothing_is_under_way_are_no_failures_and_others_are_opened() -> None:
    with server(_http(ANSWER), answers_max=5) as (port, asked):
        outcome = drive(_open(port, arrivals="fixed", rate=20.0, seconds=1.0))
    assert outcome.answers + outcome.failed == 20
    assert outcome.failed <= 1  # one may be sent in the very moment in which its connection is closed
    assert len(asked) >= 19
    assert outcome.connections >= 4


def test_open_loop_counts_what_is_closed_with_a_request_under_way_and_gives_up_after_enough() -> None:
    with server(b"", answers_max=1) as (port, _):  # takes the request, and closes without an answer
        outcome = drive(_open(port, arrivals="fixed", failures_max=5, connections_max=8))
    assert 5 <= outcome.failed < 5 + 8  # each connection may have one under way when it is enough
    assert outcome.first_failure == "the connection was closed"
    assert outcome.connections >= 5


def test_open_loop_counts_each_request_that_is_not_answered() -> None:
    with server(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n") as (port, _):
        outcome = drive(_open(port, arrivals="fixed", seconds=0.05, answer_seconds_max=0.1))
    assert (outcome.failed, outcome.answers, outcome.first_failure) == (10, 0, "no answer within 0.1 s")


def test_each_body_goes_to_its_path_and_its_answer_has_to_hold_its_text() -> None:
    with server(_http(ANSWER)) as (port, asked):
        own_texts = [b'"model":"reference"', b'"unknown":[]']
        good = _load(port, paths=["/one", "/two"], own_texts=own_texts, connections=1, seconds=30.0, once=True)
        assert drive(good).failed == 0
        assert [request.split()[1] for request in asked] == [b"/one", b"/two"]
        outcome = drive(_load(port, own_texts=[b'"model":"reference"', b'"model":"x"'], seconds=5.0, failures_max=3))
    assert outcome.failed >= 3
    assert outcome.first_failure is not None
    assert outcome.first_failure.startswith('\'"model":"x"\' does not stand in the answer once')


# -- a process of its own


def test_load_in_another_process_is_stopped_before_its_time() -> None:
    with server(_http(ANSWER)) as (port, asked):
        for rate in (0.0, 200.0):
            running = RunningLoad(_load(port, seconds=60.0, rate=rate))
            before = len(asked)
            while len(asked) == before:
                assert running._child.poll() is None
            running.stop()
            outcome = running.result()
            assert outcome.failed == 0
            assert outcome.wall_seconds < 30
            assert outcome.checked >= 1


def test_load_that_is_stopped_just_when_it_ends_has_its_outcome_all_the_same() -> None:
    with server(_http(ANSWER)) as (port, _):
        for _ in range(5):
            running = RunningLoad(_load(port, seconds=0.02, connections=1))
            select.select([running._child.stdout], [], [], 30)  # it is writing its outcome
            running.stop()
            assert running.result().failed == 0


def test_ending_that_was_asked_for_ends_both_loops_at_once() -> None:
    ending = Ending()
    ending.ask()
    with server(_http(ANSWER)) as (port, _):
        assert drive(_load(port, seconds=60.0), ending=ending).checked == 3  # one on each connection is under way
        assert drive(_load(port, seconds=60.0, rate=100.0), ending=ending).checked == 0


def test_open_loop_runs_in_a_process_of_its_own() -> None:
    with server(_http(ANSWER)) as (port, asked):
        outcome = run_load(_open(port))
        assert outcome.failed == 0
        assert outcome.checked == len(asked) > 50
    with pytest.raises(LoadFailed, match="ConnectionRefusedError"):
        run_load(_open(port))


# -- ids


def test_uniform_ids_are_drawn_alike() -> None:
    drawn = np.bincount(Ids().draw(1, 10, 100_000), minlength=10)
    assert len(drawn) == 10
    assert drawn.min() > 9_500


@pytest.mark.parametrize("exponent", [0.5, 1.1, 2.0])
def test_zipf_ids_are_wanted_as_their_rank_says_and_of_two_seeds_the_same_are_hot(exponent: float) -> None:
    n, ids = 1_000, Ids("zipf", exponent)
    counts = np.bincount(ids.draw(1, n, 400_000), minlength=n)
    again = np.bincount(ids.draw(2, n, 400_000), minlength=n)
    hot = np.argsort(-counts)[:3]
    if exponent > 1:
        assert hot.tolist() == np.argsort(-again)[:3].tolist()
    expected = np.arange(1, n + 1) ** -exponent
    expected /= expected.sum()
    found = np.sort(counts)[::-1] / counts.sum()
    assert found[:5] == pytest.approx(expected[:5], rel=0.25)
    assert len(counts) == n
    assert str(ids) == f"zipf {exponent:g}"


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(BadRequest, match="Zipf exponent 0; allowed is more than 0"):
        Ids("zipf", 0.0)
    for settings in ({"seconds": 0.0}, {"rounds": 0}, {"rate": -1.0}, {"minutes": 0.0}):
        with pytest.raises(BadRequest, match="it is more than 0"):
            Options(**settings)  # type: ignore[arg-type]


def test_wrk_is_understood_and_what_it_could_not_do_counts() -> None:
    said = (
        "Running 1s test @ http://127.0.0.1:1/\n  1 threads and 2 connections\n  Latency Distribution\n"
        "     50%  291.00us\n     75%  330.00us\n     90%    1.20ms\n     99%    1.02s\n"
        "  6000 requests in 1.00s, 1.00MB read\n  Socket errors: connect 0, read 2, write 0, timeout 1\n"
        "  Non-2xx or 3xx responses: 4\nRequests/sec:   5998.10\nTransfer/sec:      1.00MB\n"
    )
    assert wrk_figures(said) == {"requests_per_s": 5998.1, "p50_ms": 0.291, "p99_ms": 1020.0, "failed": 7}
    with pytest.raises(LoadFailed, match="something else than expected: unable"):
        wrk_figures("unable to connect")
