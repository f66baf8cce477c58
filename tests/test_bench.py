"""The bench measures what it says: its load, its turns, its figures, and the generator's judgement.

No test here asks how fast anything is.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from millpond.bench import accounts, events, faults, four_models, mixed_load, populations, reference, twenty_views
from millpond.bench.connection import content_length
from millpond.bench.events import KINDS as EVENT_KINDS
from millpond.bench.events import EventBodies
from millpond.bench.faults import Strike, availability_figures, other_shards_failures, recovery_figures, schedule
from millpond.bench.ledger import Ledger, differences
from millpond.bench.load import Load, LoadFailed, Outcome, quantile, run_load
from millpond.bench.loops import drive, requests_of
from millpond.bench.many_models import draw_models, mean_shape, write_model
from millpond.bench.noop import ANSWER, BareApp, NoopApp
from millpond.bench.poster import Poster
from millpond.bench.probes import Log, Probe, available_share, ids_on
from millpond.bench.processes import MemorySamples, cpu_seconds, memory_mb
from millpond.bench.program import error_of
from millpond.bench.retry import Connection, Refused, send_until_answered
from millpond.bench.run_programs import programs
from millpond.bench.score import Measurement, figures_of, four_models_figures, open_loop_figures, turns
from millpond.bench.sketch_programs import Judged
from millpond.bench.sketch_programs import Program as SketchProgram
from millpond.bench.soak import filling_times_ms
from millpond.bench.store import (
    FULL,
    QUICK,
    Events,
    Sizes,
    Store,
    StoreWorkload,
    agree,
    expected_features,
    layout_of,
    meanings,
    turned,
)
from millpond.bench.testbed import id_bodies
from millpond.bench.up import KINDS, NEEDS_NEW_START, Victim, kind_of
from millpond.bench.users import events_of_each
from millpond.bench.workload import Evidence, Steps, run_workload
from millpond.cluster.config import Config
from millpond.feature_actors.decode import Decoder
from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import FeatureRows
from millpond.feature_actors.shard_map import ShardMap
from millpond.models import Features
from millpond.models.definition import Definition, load_models

NOW_MS = 1_700_000_000_000
TEXTS = [(b'"model":"reference"', 1), (b'"unknown":[]', 1)]


# -- the reference load


def test_reference_view_has_the_eleven_features_and_the_model_reads_them_all() -> None:
    definition = Definition.read(Path(reference.__file__))
    declared = definition.declared()
    assert [s.name for s in declared.sources] == ["activity"]
    assert [v.name for v in declared.views] == ["user_activity"]
    assert len(reference.user_activity.features) == 11
    layout = compile_layout(declared.sources, declared.views)
    loaded = load_models([definition], layout)["reference"]
    assert loaded.plan.names == tuple(f"user_activity.{name}" for name in reference.user_activity.features)
    assert dict(loaded.plan.key_fields) == {"user_id": "int64"}


def test_model_scores_missing_features_as_zero_and_a_row_alike_alone_and_in_a_batch() -> None:
    model = reference.reference.predictor()
    matrix = np.random.default_rng(0).exponential(1, (50, 11))
    matrix[::3, 6] = np.nan
    names = tuple(reference.user_activity.features)
    together = model.predict(Features(matrix, names))
    alone = [model.predict(Features(row[None, :], names))[0] for row in matrix]
    assert together == alone
    assert all(0 < one < 1 for one in together)
    zero = np.where(np.isnan(matrix), 0, matrix)
    assert model.predict(Features(zero, names)) == together


def test_reference_events_are_seeded_in_order_within_seven_days_and_of_every_user() -> None:
    events = reference.reference_events(3, NOW_MS, users=500, events=4_000)
    times = events["event_time"].cast(pa.int64()).to_numpy()
    assert (np.diff(times) >= 0).all()
    assert times.min() >= NOW_MS - reference.SPAN_MS
    assert times.max() <= NOW_MS - reference.GAP_MS
    assert pc.count_distinct(events["event_id"]).as_py() == 4_000
    assert sorted(set(events["user_id"].to_pylist())) == list(range(500))
    assert events.column_names == list(reference.activity.fields)
    assert events.equals(reference.reference_events(3, NOW_MS, users=500, events=4_000))
    assert not events.equals(reference.reference_events(4, NOW_MS, users=500, events=4_000))


def test_bodies_hold_the_ids_in_their_order() -> None:
    ids = np.arange(7)
    assert [json.loads(body) for body in id_bodies(ids)] == [{"user_id": u} for u in range(7)]
    assert [json.loads(body) for body in id_bodies(ids, 3)] == [
        [{"user_id": u} for u in part] for part in ([0, 1, 2], [3, 4, 5], [6])
    ]


# -- turns and figures


def test_every_round_measures_the_same_and_another_endpoint_comes_first() -> None:
    rounds = turns(3)
    assert {frozenset(r) for r in rounds} == {frozenset(rounds[0])}
    assert {r[0].name for r in rounds} == {"noop_32", "score_32", "bare_32"}
    for r in rounds:  # what is compared stands side by side
        assert {m.name for m in r[:3]} == {"noop_32", "score_32", "bare_32"}
        assert {m.name for m in r[3:5]} == {"noop_1", "score_1"}


def _outcome(answers: int, latency_ms: float, seconds: float = 1.0) -> Outcome:
    return Outcome(answers, seconds, [round(latency_ms * 1e6)] * answers, answers, 0, None, 0.1, seconds)


def test_figures_are_medians_of_the_rounds_and_ratios_of_the_medians() -> None:
    figures = figures_of(
        {
            "noop_32": [_outcome(4_000, 8.0), _outcome(5_000, 6.0), _outcome(100, 99.0)],
            "bare_32": [_outcome(5_000, 6.0)] * 3,
            "score_32": [_outcome(2_000, 16.0), _outcome(9_000, 1.0), _outcome(1_000, 32.0)],
            "noop_1": [_outcome(100, 0.25)] * 3,
            "score_1": [_outcome(100, 0.5)] * 3,
            "batch_1000": [_outcome(50, 80.0, seconds=2.0)] * 3,
        },
        {
            "noop_32": [0.4, 0.5, 0.1],
            "bare_32": [0.5, 0.5, 0.5],
            "score_32": [1.0, 9.0, 0.1],
        },
    )
    assert figures["noop_32_requests_per_s"] == 4_000
    assert figures["score_32_requests_per_s"] == 2_000
    assert figures["score_vs_noop_ratio"] == 0.5
    assert figures["score_vs_bare_ratio"] == 0.4
    assert figures["score_cost_us"] == 250.0
    assert figures["score_32_p50_ms"] == 16.0
    assert figures["score_32_cpu_us"] == 500.0
    assert figures["noop_32_cpu_us"] == 100.0
    assert figures["p50_vs_noop_ratio"] == 2.0
    assert figures["batch_1000_ids_per_s"] == 25_000
    assert figures["score_32_p999_ms"] == figures["score_32_max_ms"] == 16.0


def test_quantile_is_a_value_that_was_measured() -> None:
    values = list(range(1, 101))
    assert [quantile(values, q) for q in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert np.isnan(quantile([], 0.5))


def test_cpu_seconds_are_of_our_descendants_of_that_title() -> None:
    burn = "import time\nwhile time.process_time() < 0.1: pass\nprint('done', flush=True)\ninput()"
    command = [sys.executable, "-c", burn, "millpond-test-burn"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert cpu_seconds([f"{sys.executable} -c import time"]) >= 0.05
        assert cpu_seconds(["no such title"]) == 0.0
        child.communicate(b"\n")


# -- the report


class _Fake:
    name = "fake"
    seed = 7
    meanings = {"speed_per_s": "how fast"}

    def __init__(self, wrong: list[str]) -> None:
        self.wrong = wrong
        self.calls: list[str] = []

    def setup(self, steps: Steps) -> None:
        self.calls.append("setup")

    def start(self, steps: Steps) -> None:
        self.calls.append("start")

    def check(self, steps: Steps) -> list[str]:
        self.calls.append("check")
        return self.wrong

    def metrics(self) -> dict[str, Any]:
        return {"speed_per_s": 12.5}

    @property
    def evidence(self) -> Evidence:
        return Evidence()

    def close(self) -> None:
        self.calls.append("close")


def test_report_is_one_json_object_and_a_line_of_the_history(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = _Fake([])
    history = tmp_path / "history.jsonl"
    for _ in range(2):
        assert run_workload(fake, as_json=True, record_to=history) == 0
    assert fake.calls == ["setup", "start", "check", "close"] * 2
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["speed_per_s"] == 12.5
    assert {"commit", "machine", "seconds", "seed"} < first.keys()
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["bench"] for line in lines] == ["fake", "fake"]
    assert lines[0]["speed_per_s"] == 12.5


def test_broken_invariant_is_named_and_fails_and_is_not_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = tmp_path / "history.jsonl"
    assert run_workload(_Fake(["scores add up"]), as_json=False, record_to=history) == 1
    printed = capsys.readouterr()
    assert "invariant broken: scores add up" in printed.err
    assert "speed_per_s" in printed.out
    assert not history.exists()


def test_workload_is_closed_when_it_fails() -> None:
    fake = _Fake([])
    fake.start = lambda steps: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    with pytest.raises(ZeroDivisionError):
        run_workload(fake, as_json=True)
    assert fake.calls == ["setup", "close"]


# -- the load generator


@contextmanager
def server(answer: bytes, *, pieces: int = 1, answers_max: int = 10**9) -> Iterator[tuple[int, list[bytes]]]:
    """Serve a constant answer on loopback, in so many pieces; collect what was asked."""
    asked: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        data = b""
        with connection:
            for _ in range(answers_max):
                while b"\r\n\r\n" not in data or len(data) < _end(data):
                    more = connection.recv(65_536)
                    if not more:
                        return
                    data += more
                asked.append(data[: _end(data)])
                data = data[_end(data) :]
                size = max(1, -(-len(answer) // pieces))
                for at in range(0, len(answer), size):
                    connection.sendall(answer[at : at + size])

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], asked
        listener.shutdown(socket.SHUT_RDWR)


def _end(data: bytes) -> int:
    head = data.find(b"\r\n\r\n")
    return head + 4 + content_length(data[: head + 2])


def _http(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _load(port: int, **changes: Any) -> Load:
    settings: dict[str, Any] = {
        "bodies": [b'{"user_id":1}', b'{"user_id":22}'],
        "connections": 3,
        "seconds": 0.1,
        "warm_seconds": 0.02,
        "texts": TEXTS,
        "answer_seconds_max": 5.0,
    }
    return Load("127.0.0.1", port, "/v1/score/reference", **{**settings, **changes})


@pytest.mark.parametrize("pieces", [1, 5])
def test_load_sends_the_bodies_in_turn_and_times_every_good_answer(pieces: int) -> None:
    with server(_http(ANSWER), pieces=pieces) as (port, asked):
        outcome = drive(_load(port, connections=1, seconds=0.5))
        assert outcome.failed == 0
        assert outcome.answers == len(outcome.latencies_ns)
        assert 0 < outcome.answers <= outcome.checked == len(asked)
        assert asked[:4] == requests_of(_load(port)) * 2
        assert 0 < outcome.latency_ms(0.5) <= outcome.latency_ms(0.99)


def test_load_runs_in_a_process_of_its_own() -> None:
    with server(_http(ANSWER)) as (port, asked):
        outcome = run_load(_load(port))
        assert outcome.failed == 0
        assert 0 < outcome.checked == len(asked)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (_http(b'{"error":{"code":"x"}}', "503 Service Unavailable"), 'status 503: {"error":{"code":"x"}}'),
        (_http(ANSWER.replace(b"reference", b"other")), '\'"model":"reference"\' stands 0 times, expected 1'),
        (_http(ANSWER.replace(b"[]", b'["user_activity"]')), "'\"unknown\":[]' stands 0 times, expected 1"),
        (_http(ANSWER + ANSWER), '\'"model":"reference"\' stands 2 times, expected 1'),
        (b"HTTP/1.1 500 Broken\r\n\r\n", "status 500"),
    ],
)
def test_load_judges_every_answer_and_gives_up_after_enough_failures(answer: bytes, why: str) -> None:
    with server(answer) as (port, _):
        outcome = drive(_load(port, seconds=10.0, connections=2, failures_max=5))
    assert 5 <= outcome.failed <= 6
    assert outcome.answers == 0
    assert outcome.first_failure is not None
    assert outcome.first_failure.startswith(why)


def test_load_counts_a_connection_that_the_other_side_closes() -> None:
    with server(_http(ANSWER), answers_max=2) as (port, _):
        outcome = drive(_load(port, seconds=10.0, connections=2))
    assert outcome.failed == 2
    assert outcome.first_failure == "the connection was closed"


def test_load_counts_a_connection_that_the_other_side_resets() -> None:
    """As a server does that closes with a request unread; it is a race which of the two is seen."""

    def answer_once(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(2**16)
        connection.sendall(_http(ANSWER))
        connection.recv(2**16)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_once, args=(listener,))
        thread.start()
        outcome = drive(_load(listener.getsockname()[1], seconds=10.0, connections=1))
        thread.join(10)
    assert (outcome.failed, outcome.first_failure) == (1, "the connection was closed")


def test_load_is_bounded_in_answers_and_in_waiting() -> None:
    with server(_http(ANSWER)) as (port, _):
        assert drive(_load(port, seconds=10.0, connections=1, answers_max=7)).checked == 7
    with server(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n") as (port, _):
        outcome = drive(_load(port, seconds=10.0, answer_seconds_max=0.05))
    assert (outcome.failed, outcome.first_failure) == (1, "no answer within 0.05 s")


def test_load_says_when_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LoadFailed, match=r"load of /v1/score/reference: ConnectionRefusedError"):
        run_load(_load(port))


# -- the endpoints that do nothing


def _post(app: Any, path: str, body: bytes, root_path: str = "") -> tuple[int, bytes]:
    """Post in two chunks to an ASGI application; return status and body."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "root_path": root_path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    chunks = [
        {"type": "http.request", "body": body[:3], "more_body": True},
        {"type": "http.request", "body": body[3:], "more_body": False},
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return chunks.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert not chunks or sent[0]["status"] != 200
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize(
    ("app", "prefix"), [(NoopApp(), "/bench/noop"), (BareApp(), "/bench/bare")], ids=["noop", "bare"]
)
def test_noop_and_bare_read_the_whole_body_and_answer_what_the_load_takes_for_a_score(app: Any, prefix: str) -> None:
    status, body = _post(app, f"{prefix}/reference", b'{"user_id":42}', root_path=prefix)
    assert (status, body) == (200, ANSWER)
    assert all(body.count(text) == times for text, times in TEXTS)
    assert json.loads(body).keys() == {"id", "model", "version", "result", "as_of", "unknown"}


def test_noop_decodes_as_the_score_app_does() -> None:
    status, body = _post(NoopApp(), "/bench/noop/reference", b"no JSON")
    assert status == 400
    assert json.loads(body)["error"]["code"] == "bad_json"


def test_names_of_measurements_are_the_names_of_figures() -> None:
    assert Measurement("score", "/x", 32).name == "score_32"
    assert Measurement("score", "/x", 4, ids=1_000).name == "batch_1000"


# -- the store

#: What the figures are called by those who compare: a store of each size, and the bars.
STORE_FIGURES = {
    "ingest_events_per_s_10k", "ingest_events_per_s_1m", "ingest_events_per_s_10m", "ingest_new_events_per_s_10m",
    "ingest_deduped_events_per_s_1m", "bytes_per_entity_10m", "filter_bytes_per_id", "read_1_p50_us", "read_1_p99_us",
    "read_1000_p50_us", "read_vs_actor_call_ratio", "read_p99_busy_ratio", "read_10m_vs_10k_ratio",
}  # fmt: skip
TINY = Sizes(small=50, middle=200, large=500, growth_events=2_000, events=1_000)
OF_RAY = {"actor_read_1_p50_us", "read_vs_actor_call_ratio"}


def test_store_figures_bear_their_size_so_those_of_a_quick_run_are_others() -> None:
    assert set(meanings(FULL)) >= STORE_FIGURES
    sized = {name for name in STORE_FIGURES if "10" in name.removeprefix("read_1000") or "_1m" in name}
    assert len(sized) == 7
    assert not sized & set(meanings(QUICK))


def test_store_bench_measures_every_figure_and_finds_every_value_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(memory_dir=str(tmp_path / "memory"), data_dir=str(tmp_path / "data"), slots=8)
    bench = StoreWorkload(config, TINY, seconds=0.02, ray=False)
    assert run_workload(bench, as_json=True) == 0, capsys.readouterr().err
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == set(meanings(TINY)) - OF_RAY | {"commit", "machine", "seconds", "seed"}
    numbers = {name: figures[name] for name in meanings(TINY) if name not in {*OF_RAY, "entities"}}
    assert all(isinstance(value, (int, float)) and value > 0 for value in numbers.values()), numbers
    assert figures["entities"] == {"50": 50, "200": 200, "500": 500}
    assert figures["events"] > 3 * TINY.growth_events + 2 * (TINY.large + TINY.small) + 12 * TINY.events
    assert figures["values_checked"] % 11 == 0
    assert figures["values_checked"] > 5 * 10 * 11
    assert list((tmp_path / "memory").iterdir()) == []


def test_store_bench_clears_its_memory_away_when_it_fails(tmp_path: Path) -> None:
    bench = StoreWorkload(
        Config(memory_dir=str(tmp_path / "memory"), data_dir=str(tmp_path / "data"), slots=8), TINY, seconds=0.01
    )
    bench._grow_two_tiles = lambda name, steps: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        run_workload(bench, as_json=True)
    assert list((tmp_path / "memory").iterdir()) == []


def test_expected_features_are_those_of_the_definition() -> None:
    hour, day = 3_600_000, 86_400_000
    as_of = NOW_MS // day * day + 1_000
    # In a window by its tile only; in it by a day's tile; the newest.
    times = np.array([as_of - 7 * day - 500, as_of - day, as_of - hour, as_of - 250])
    amounts = np.array([8.0, 4.0, 2.0, 1.0])
    expected = [2, 3, 4, 3, 7, 15, 2, 4, 8, 1, 0.25]
    assert expected_features(times, amounts, as_of).tolist() == expected
    old = expected_features(times[:1], amounts[:1], as_of).tolist()
    assert old[:6] == [0, 0, 1, 0, 0, 8]
    assert np.isnan(old[6:8]).all()
    assert agree(np.array(old), expected_features(times[:1], amounts[:1], as_of))
    right = np.array(expected, float)
    assert agree(right + 1e-12 * np.eye(11)[5], right)
    assert not any(agree(right + 1e-6 * one, right) for one in np.eye(11))


def test_store_names_a_feature_that_is_wrong_and_an_event_that_counts_twice(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 40, 4)
    store.apply(store.events.everyone(), NOW_MS, NOW_MS + 1_000)
    sample, as_of = store.events.sample, store.events.newest_ms
    right = FeatureRows(np.array(store.events.expected()), np.full(len(sample), as_of), [[]] * len(sample))
    assert store.problems(right) == []
    right.matrix[3, 0] += 1
    (problem,) = store.problems(right)
    assert problem.startswith(f"features of user {sample[3]} in the store of 40 are what its events say: expected [")
    right.matrix[3, 0] -= 1
    store.apply_again()
    (problem,) = store.problems(right)
    assert problem.startswith("the store of 40 has applied each of 40 events once: got {")


def test_events_of_the_store_are_seeded_and_spread_over_the_time() -> None:
    one, other = (Events(layout_of(deduped=True), 100) for _ in range(2))
    made, again = (list(e.batches(e.everyone(), NOW_MS, NOW_MS + 1_000)) for e in (one, other))
    assert [b.events for b in made] == [b.events for b in again]
    assert sorted(made[0].events["user_id"].to_pylist()) == list(range(100))
    assert made[0].arrivals.tolist() == list(range(NOW_MS, NOW_MS + 1_000, 10))
    assert made[0].ids.shape == (100, 2)
    more = next(one.batches(one.anyone(7), NOW_MS, NOW_MS + 1))
    assert more.events["event_id"].to_pylist() == [str(n) for n in range(100, 107)]


def test_in_each_round_another_comes_first() -> None:
    assert [turned(["a", "b", "c"], r)[0] for r in range(4)] == ["a", "b", "c", "a"]
    assert sorted(turned(["a", "b", "c"], 2)) == ["a", "b", "c"]


# -- bodies that are sent once


def test_load_sends_each_body_once_and_ends_when_they_are_over() -> None:
    sent = [b'{"user_id":%d}' % n for n in range(40)]
    with server(_http(ANSWER)) as (port, asked):
        load = _load(port, seconds=10.0, warm_seconds=0.0, bodies=sent, once=True, content_type="x/y")
        outcome = drive(load)
    assert (outcome.checked, outcome.answers, outcome.failed) == (40, 40, 0)
    assert sorted(asked) == sorted(requests_of(load))
    assert all(b"content-type: x/y\r\n" in request for request in asked)
    assert outcome.seconds < 5


def test_load_with_fewer_bodies_than_connections_sends_what_there_is() -> None:
    with server(_http(ANSWER)) as (port, asked):
        assert drive(_load(port, seconds=10.0, bodies=[b"{}"], once=True)).checked == 1
    assert len(asked) == 1


def test_load_sends_bodies_larger_than_any_buffer() -> None:
    large = [bytes([n]) * 12_000_000 for n in b"abcd"]
    with server(_http(ANSWER)) as (port, asked):
        outcome = drive(_load(port, seconds=10.0, warm_seconds=0.0, bodies=large, once=True, connections=2))
    assert (outcome.checked, outcome.failed) == (4, 0)
    assert sorted(request.partition(b"\r\n\r\n")[2] for request in asked) == large


# -- the events bench


def test_bodies_of_events_hold_the_same_events_in_every_form_and_no_id_twice() -> None:
    made, again = EventBodies(5, NOW_MS, users=50, items=7), EventBodies(5, NOW_MS, users=50, items=7)
    decode = Decoder(accounts.activity, key_fields=("user_id", "item_id")).decode
    ids: list[str] = []
    for kind in EVENT_KINDS:
        bodies = made.bodies(kind, 20_000)
        assert bodies == again.bodies(kind, 20_000)
        rows = [decode(body, kind.content_type) for body in bodies]
        assert {batch.num_rows for batch in rows} == {kind.events}
        assert sum(batch.num_rows for batch in rows) == 20_000
        ids += [name for batch in rows for name in batch["event_id"].to_pylist()]
    assert len(set(ids)) == len(ids) == made.count == 60_000
    table = made.table(1_000)
    (as_json,), as_arrow = events.json_bodies(table, 1_000), events.arrow_body(table)
    assert decode(as_json, "application/json") == decode(as_arrow, EVENT_KINDS[0].content_type)
    times = table["event_time"].cast(pa.int64()).to_numpy()
    assert NOW_MS - reference.SPAN_MS <= times.min() <= times.max() <= NOW_MS - reference.GAP_MS


def test_bodies_of_events_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_BODY_BYTES_MAX", 2_000_000)
    for kind in EVENT_KINDS:
        assert 2_000_000 < sum(map(len, EventBodies(0, NOW_MS).bodies(kind, 10**9))) < 4_000_000


def test_accounts_are_of_two_keys_of_one_source_and_count_for_ever() -> None:
    definition = Definition.read(Path(accounts.__file__))
    declared = definition.declared()
    assert [s.name for s in declared.sources] == ["activity"]
    assert {v.name: v.key for v in declared.views} == {
        "user_activity": ["user_id"], "user_account": ["user_id"], "item_activity": ["item_id"],
    }  # fmt: skip
    loaded = load_models([definition], compile_layout(declared.sources, declared.views))
    assert set(loaded) == {"user_account", "item_account", "pair_account"}
    for model in loaded.values():
        assert all(f.kept.window is None and f.kept.ttl is None for f in model.model.features)


def test_events_figures_are_medians_of_the_rounds() -> None:
    figures = events.figures_of(
        {
            "arrow_10000": [_outcome(10, 80.0), _outcome(40, 20.0), _outcome(30, 30.0)],
            "json_1000": [_outcome(100, 9.0)] * 3,
            "single_32": [_outcome(2_000, 8.0), _outcome(4_000, 6.0), _outcome(9_000, 4.0)],
        },
        {"arrow_10000": [(0.3, 0.6)] * 3, "json_1000": [(0.2, 0.4)] * 3, "single_32": [(0.4, 0.8)] * 3},
    )
    assert figures["arrow_10000_events_per_s"] == 300_000
    assert figures["json_1000_events_per_s"] == 100_000
    assert (figures["single_32_requests_per_s"], figures["single_32_p99_ms"]) == (4_000, 6.0)
    assert (figures["arrow_10000_replica_cpu_us"], figures["arrow_10000_shards_cpu_us"]) == (1.0, 2.0)
    assert {"arrow_10000_p50_ms", "json_1000_replica_cpu_us", "single_32_load_cores"} <= set(figures)


# -- the faults bench: kills, retries, and what is counted


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kills", [1, 2, 5, len(KINDS), 50, 100, 130])
def test_schedule_kills_every_kind_often_enough_and_the_whole_cluster_at_last(kills: int, seed: int) -> None:
    order = schedule(kills, random.Random(seed))
    of_each = Counter(order)
    assert len(order) == kills
    assert order[-1] == "cluster"
    assert set(order) <= set(KINDS)
    assert order == schedule(kills, random.Random(seed))
    if kills >= 100:
        assert min(of_each[kind] for kind in KINDS) == 10
        assert all(of_each[kind] == 10 for kind in NEEDS_NEW_START)
    elif kills >= len(KINDS):
        assert min(of_each[kind] for kind in KINDS) >= kills // len(KINDS)
    elif kills >= 3:
        assert {"shard", "raylet", "cluster"} <= set(order)


def test_schedule_is_another_for_another_seed_and_refuses_no_kills() -> None:
    assert schedule(100, random.Random(1)) != schedule(100, random.Random(2))
    with pytest.raises(BadRequest, match="0 kills; there is one at least"):
        schedule(0, random.Random(1))


def test_ledger_keeps_an_account_of_each_user_and_item() -> None:
    ledger = Ledger(3, 2)
    ledger.acknowledge(np.array([0, 2, 2]), np.array([1, 1, 0]), np.array([5.0, 7.0, 9.0]))
    ledger.acknowledge(np.array([2]), np.array([1]), np.array([1.0]))
    assert ledger.events == 4
    assert ledger.users.tolist() == [[1, 5], [0, 0], [3, 17]]
    assert ledger.items.tolist() == [[1, 9], [3, 13]]


def test_what_one_account_lacks_and_another_has_too_much_does_not_cancel_out() -> None:
    expected = np.array([[3, 30.0], [3, 30.0], [2, 9.0], [0, 0.0]])
    assert differences(expected, expected.copy()) == []
    found = np.array([[2, 20.0], [4, 40.0], [2, 10.0], [1, 1.0]])
    wrong = differences(expected, found)
    assert [(d.account, d.lost, d.double) for d in wrong] == [(0, 1, 0), (1, 0, 1), (2, 1, 1), (3, 0, 1)]
    assert (wrong[0].expected, wrong[0].found) == ((3, 30), (2, 20))


def test_processes_are_told_apart_by_their_titles() -> None:
    for title, program, kind in (
        ("ray::FeatureActor", "python3.11", "shard"),
        ("ray::FeatureActor.apply", "python3.11", "shard"),
        ("ray::ServeReplica:dev-events:Events", "python3.11", "events_replica"),
        ("ray::ServeReplica:dev-score:Score", "python3.11", "score_replica"),
        ("ray::HAProxyManager", "python3.11", "haproxy_manager"),
        ("/x/haproxy -db -f /tmp/y", "haproxy", "haproxy"),
        ("ray::ServeController", "python3.11", "worker"),
        ("ray::IDLE", "python3.11", "worker"),
        ("/x/raylet --raylet_socket_name=/tmp/y", "raylet", "raylet"),
        ("ray::RuntimeEnvAgent", "python3.11", None),
        ("python -m millpond.cluster.cli up raylet", "python3.11", None),
    ):
        assert kind_of(title, program, "dev") == kind


def test_a_process_is_replaced_by_another_of_its_kind_shard_and_actor_whatever_it_is_doing() -> None:
    controller = Victim(1, "worker", "ray::ServeController")
    assert controller.replaced_by(Victim(2, "worker", "ray::ServeController.listen_for_change   "))
    assert not controller.replaced_by(controller)
    assert not controller.replaced_by(Victim(2, "worker", "ray::ProxyActor"))
    shard = Victim(1, "shard", "ray::FeatureActor.apply", 0)
    assert shard.replaced_by(Victim(2, "shard", "ray::FeatureActor", 0))
    assert not shard.replaced_by(Victim(2, "shard", "ray::FeatureActor", 1))
    assert controller.missed
    assert shard.missed
    assert not Victim(1, "worker", "ray::IDLE").missed


def _log(*goods: bool, kind: str = "write", shard: int = 0) -> Log:
    """A probe each second, which takes half a second."""
    return Log(kind, shard, [Probe(float(i), i + 0.5, good) for i, good in enumerate(goods)])


def test_keys_are_served_again_from_the_first_good_probe_after_the_last_bad_one() -> None:
    log = _log(True, True, False, True, False, True, True, True)
    assert log.good_since(0.5, 3) == 5.5
    assert log.good_since(0.5, 4) is None
    assert log.good_since(5.0, 2) == 6.5  # only what began after it
    assert _log(True, True, True).good_since(0.5, 2) == 1.5
    assert _log().good_since(0.0, 1) is None


def test_availability_counts_time_and_not_requests() -> None:
    hangs = Log("write", 0, [Probe(0, 0.1, True), Probe(1, 8, False), Probe(9, 9.1, True), Probe(10, 10.1, True)])
    assert available_share([hangs], [(0, 10)]) == pytest.approx(0.2)
    assert available_share([hangs, _log(*[True] * 11, shard=1)], [(0, 10)]) == pytest.approx(0.6)
    assert available_share([hangs], [(0, 2), (8.5, 9.5)]) == pytest.approx(1.5 / 3)
    assert available_share([], [(0, 10)]) is None


def test_other_shards_are_judged_while_one_recovers_and_restarts_of_all_stand_apart() -> None:
    goods = [t not in (2, 3) for t in range(21)]
    mine, other = _log(*goods), _log(*(t not in (3, 12) for t in range(21)), kind="score", shard=1)
    strikes = [Strike("shard", 0, 2.0, 4.0), Strike("cluster", None, 10.0, 14.0)]
    figures = availability_figures([mine, other], strikes, 20.0)
    assert figures["availability_other_shards"] == 0.5
    assert figures["availability"] == pytest.approx(1 - 4 / 36, abs=1e-5)
    assert figures["availability_writes"] == pytest.approx(1 - 2 / 18, abs=1e-5)
    assert figures["availability_without_restarts"] == pytest.approx(1 - 3 / 28, abs=1e-5)
    assert "availability_other_shards" not in availability_figures([mine, other], strikes[1:], 20.0)
    assert availability_figures([mine], [], 20.0) == {}
    other.probes[3] = Probe(3.0, 3.5, False, "503 not running")
    assert other_shards_failures([mine, other], strikes) == {"503 not running": 1}


def test_recoveries_are_counted_by_kind() -> None:
    figures = recovery_figures({"shard": [1.0, 3.0, 2.0], "cluster": [18.0]})
    assert (figures["kills"], figures["kills_by_kind"]) == (4, {"cluster": 1, "shard": 3})
    assert (figures["recovery_p50_s"], figures["recovery_max_s"]) == (2.0, 18.0)
    assert figures["recovery_p50_s_by_kind"] == {"cluster": 18.0, "shard": 2.0}
    assert set(figures) <= set(faults.MEANINGS)


def test_ids_lie_on_the_shard_that_they_were_asked_for() -> None:
    shard_map = ShardMap.even(16, 2)
    on = [set(next_few(ids_on(shard_map, shard, iter(range(1_000))), 50)) for shard in range(2)]
    assert not on[0] & on[1]
    names = next_few(ids_on(shard_map, 1, (f"probe-{n}" for n in range(1_000))), 50)
    hashes = hash_columns([pa.array(names)], len(names))
    assert set(shard_map.shards_of(hashes).tolist()) == {1}


def next_few(values: Iterator[Any], n: int) -> list[Any]:
    return [next(values) for _ in range(n)]


@contextmanager
def scripted(*answers: bytes | None) -> Iterator[tuple[int, list[bytes]]]:
    """Answer one request after the other, each on a connection of its own; None closes without an answer."""
    asked: list[bytes] = []

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                data = b""
                while b"\r\n\r\n" not in data or len(data) < _end(data):
                    data += connection.recv(65_536)
                asked.append(data)
                if answer is not None:
                    connection.sendall(answer.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], asked
        thread.join(10)


def test_a_body_is_sent_until_it_is_answered_and_the_causes_are_counted() -> None:
    busy = _http(b"{}", "503 Service Unavailable").replace(b"Content", b"Retry-After: 0\r\nContent", 1)
    good = _http(b'{"accepted":1}')
    causes = Counter[str]()
    with scripted(busy, None, _http(b"{}", "500 Broken"), busy, good) as (port, asked):
        connection = Connection(lambda: f"http://127.0.0.1:{port}", 5.0)
        answer = send_until_answered(connection, "/v1/events/x", b"[1]", "x/y", causes, threading.Event())
    assert answer is not None
    assert answer.json == {"accepted": 1}
    assert causes == {"503": 2, "closed": 1, "500": 1}
    assert len(asked) == 5
    assert {request.partition(b"\r\n\r\n")[2] for request in asked} == {b"[1]"}


def test_a_body_that_is_wrong_is_not_sent_again_and_nothing_is_when_all_is_over() -> None:
    with scripted(_http(b'{"error":{}}', "400 Bad Request")) as (port, _):
        connection = Connection(lambda: f"http://127.0.0.1:{port}", 5.0)
        with pytest.raises(Refused, match=r"/x: 400"):
            send_until_answered(connection, "/x", b"", "x/y", Counter(), threading.Event())
    over = threading.Event()
    over.set()
    assert send_until_answered(connection, "/x", b"", "x/y", Counter(), over) is None


def test_benches_report_the_figures_that_the_bars_are_about() -> None:
    assert {
        "arrow_10000_events_per_s", "json_1000_events_per_s", "single_32_requests_per_s", "single_32_p99_ms",
        "stale_reads", "write_read_pairs",
    } <= set(events.MEANINGS)  # fmt: skip
    assert {
        "kills", "kills_by_kind", "acked_events", "retries", "lost_events", "double_counted_events", "recovery_p50_s",
        "recovery_max_s", "availability", "availability_other_shards",
    } <= set(faults.MEANINGS)  # fmt: skip


# -- many models, many users, and the state of a soak


def test_models_are_small_and_many_and_the_first_two_are_like_the_mean_of_all() -> None:
    drawn = draw_models(500, 0)
    assert [m.name for m in drawn] == [f"model_{n:03d}" for n in range(500)]
    assert {len(m.features) for m in drawn} == set(range(5, 21))
    assert {view for m in drawn for view, _ in m.features} == set(twenty_views.views)
    assert {m.views for m in drawn} == {1, 2, 3, 4}
    assert len({m.features for m in drawn}) > 480  # those of a whole view are alike
    assert drawn == draw_models(500, 0) != draw_models(500, 1)
    two, all_of_them = mean_shape(drawn[:2]), mean_shape(drawn)
    assert two == pytest.approx(all_of_them, rel=0.1)


def test_versions_of_a_model_are_definitions_of_their_own_with_other_weights(tmp_path: Path) -> None:
    model = draw_models(10, 0)[3]
    views = Definition.read(Path(twenty_views.__file__)).declared()
    assert (len(views.sources), len(views.views), len(views.models)) == (4, 20, 0)
    results = []
    for version in ("1", "2"):
        definition = Definition.read(write_model(tmp_path, model, version))
        loaded = load_models([definition], compile_layout(views.sources, views.views))[model.name]
        assert loaded.model.version == version
        assert len(loaded.plan.names) == len(model.features)
        rows = np.ones((1, len(model.features)))
        results.append(loaded.predict(FeatureRows(rows, np.zeros(1, np.int64), [[]])))
    assert results[0] != results[1]


def test_populations_are_the_reference_view_over_sources_of_their_own() -> None:
    declared = Definition.read(Path(populations.__file__)).declared()
    assert [s.name for s in declared.sources] == [f"users_{size}" for size in ("10k", "100k", "1m", "10m")]
    assert [len(m.features) for m in declared.models] == [11] * 4
    layout = compile_layout(declared.sources, declared.views)
    assert len(layout.tables) == 4
    shapes = {(t.row_words, t.slot_words, tuple(sorted(t.pool_items))) for t in layout.tables}
    assert len(shapes) == 1  # they differ in their users only


def test_each_user_has_as_many_events_in_time_order_within_the_window() -> None:
    tables = list(events_of_each(120_000, 2, 0, NOW_MS))
    assert len(tables) == 6
    users = np.concatenate([t["user_id"].to_numpy() for t in tables])
    assert set(np.bincount(users)) == {2}
    assert len(set(users[:120_000])) == 120_000
    times = np.concatenate([t["event_time"].cast(pa.int64()).to_numpy() for t in tables])
    assert (np.diff(times) >= 0).all()
    assert NOW_MS - reference.SPAN_MS <= times.min() <= times.max() < NOW_MS
    assert tables[0].column_names == list(reference.activity.fields)


def test_before_a_soak_every_tile_of_every_window_has_a_time() -> None:
    times = np.array(filling_times_ms(NOW_MS))
    assert (np.diff(times) > 0).all()
    assert times[-1] <= NOW_MS
    for window_ms, width_ms in ((3_600_000, 60_000), (86_400_000, 1_200_000), (7 * 86_400_000, 7_200_000)):
        tiles = set((times // width_ms).tolist())
        assert set(range((NOW_MS - window_ms) // width_ms, NOW_MS // width_ms + 1)) <= tiles


def test_accounts_and_the_reference_model_stand_together_in_the_mixed_load() -> None:
    declared = Definition.read(Path(mixed_load.__file__)).declared()
    assert [s.name for s in declared.sources] == ["activity"]
    assert {m.name for m in declared.models} == {"reference", "user_account", "item_account"}
    compile_layout(declared.sources, declared.views)


def test_four_models_read_the_same_and_say_different_things() -> None:
    four = Definition.read(Path(four_models.__file__)).declared().models
    assert [m.name for m in four] == [m.name for m in four_models.FOUR]
    assert len({tuple(f.full_name for f in m.features) for m in four}) == 1
    features = Features(np.ones((1, 11)), tuple(reference.user_activity.features))
    assert len({float(m.predictor().predict(features)[0]) for m in four}) == 4


def test_memory_is_of_processes_of_that_title_and_is_seen_to_grow() -> None:
    grow = "x = bytearray(b'1' * 30_000_000)\nprint('done', flush=True)\ninput()"
    titles = [f"{sys.executable} -c x"]
    with subprocess.Popen([sys.executable, "-c", grow], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (pid, mb), *others = memory_mb(titles).items()
        samples = MemorySamples({"it": titles, "none": ["no such title"]}, 0.01)
        samples.start()
        while len(samples.times_s) < 3:
            pass
        samples.stop()
        anonymous = memory_mb(titles, "Pss_Anon")[pid]
        child.communicate(b"\n")
    assert (pid, others) == (child.pid, [])
    assert 30 < anonymous <= mb < 100
    assert samples.processes == {"it": {child.pid}, "none": set()}
    assert all(one > 30 for one in samples.mb["it"])
    assert set(samples.mb["none"]) == {0}
    assert memory_mb(["no such title"]) == {}


def test_events_are_posted_one_body_after_the_other_and_outcomes_are_added_up() -> None:
    ack = b'{"accepted":2,"duplicates":1,"late":0}'
    with server(_http(ack)) as (port, asked):
        poster = Poster(f"http://127.0.0.1:{port}", "/v1/events/x", [b"one", b"two", b"three"], content_type="x/y")
        poster.start()
        poster.join()
        assert [request.partition(b"\r\n\r\n")[2] for request in asked] == [b"one", b"two", b"three"]
    assert (poster.accepted, poster.failed, len(poster.took_ms)) == (6, 0, 3)
    (problem,) = poster.problems
    assert problem.startswith("every event that is posted once is accepted, and none is late: got {'accepted': 6, 'dup")
    with server(_http(b"{}", "500 Broken")) as (port, _):
        broken = Poster(f"http://127.0.0.1:{port}", "/v1/events/x", [b"one"], content_type="x/y")
        broken.start()
        broken.join()
    assert (broken.failed, broken.accepted) == (1, 0)
    assert "the first: /v1/events/x: 500 {}" in broken.problems[0]


def test_events_posted_at_a_rate_count_from_when_they_were_due() -> None:
    with server(_http(b'{"accepted":1}')) as (port, _):
        bodies = itertools.repeat(b"one")
        poster = Poster(f"http://127.0.0.1:{port}", "/v1/events/x", bodies, content_type="x/y", per_s=100.0)
        begun = time.monotonic()
        poster.start()
        while len(poster.took_ms) < 11:
            assert poster.is_alive()
        assert time.monotonic() - begun >= 0.1
        poster.stop()
    assert poster.problems == []


def test_four_models_cost_what_the_worse_of_the_two_ways_says() -> None:
    figures = four_models_figures(
        {
            "one_model_32": [_outcome(4_000, 8.0)] * 3, "four_models_32": [_outcome(2_500, 8.0)] * 3,
            "one_model_1": [_outcome(100, 0.4)] * 3, "four_models_1": [_outcome(100, 0.5)] * 3,
        }
    )  # fmt: skip
    assert figures["four_models_32_cost_ratio"] == figures["four_models_cost_ratio"] == 1.6
    assert figures["four_models_1_cost_ratio"] == 1.25


def test_scores_beside_posts_are_compared_by_their_p99() -> None:
    outcomes = {
        "idle": [_outcome(100, ms) for ms in (2.0, 9.0, 1.0)], "busy": [_outcome(100, 5.0)] * 3,
        "open": [_outcome(100, 3.0)] * 3,
    }  # fmt: skip
    figures = open_loop_figures(outcomes)
    assert figures["score_p99_during_8mb_posts_ratio"] == 2.5
    assert figures["open_max_ms"] == 3.0


# -- random programs


def test_programs_of_runs_are_within_the_stated_error_and_some_of_them_need_it() -> None:
    first = list(itertools.islice(programs(np.random.default_rng(3)), 45))
    again = list(itertools.islice(programs(np.random.default_rng(3)), 45))
    assert [(p.seen, p.as_of_ms) for p in first] == [(p.seen, p.as_of_ms) for p in again]
    errors = [error_of(program) for program in first]
    assert [program for program, (error, bound) in zip(first, errors, strict=True) if error > bound] == []
    assert any(error > 0 for error, _ in errors)
    assert sum(bound == 0 for _, bound in errors) > 30


def test_a_sketch_that_answers_no_number_is_wrong() -> None:
    """As a share of what is stated NaN is not above 1, and is counted as a program for which nothing is stated."""
    program = SketchProgram("constant", [np.ones(3)])
    assert [Judged(program, got, 1.0, 0.5).share for got in (1.0, 1.25, math.nan)] == [0, 0.5, math.inf]
