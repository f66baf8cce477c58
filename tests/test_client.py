# ruff: noqa: RUF043  (messages stand whole)
"""The client over plain shards in this process, and what it refuses."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from port_contract import (
    HOUR,
    LAYOUT,
    N_SLOTS,
    NOW,
    Cluster,
    PortContract,
    Run,
    by_book,
    by_both,
    by_user,
    in_files,
    order,
    orders,
)
from worlds import cluster as worlds_cluster

from millpond.feature_actors import Count, FeatureView, Streak, errors
from millpond.feature_actors.aggregations import Aggregation
from millpond.feature_actors.client import Ack, FeatureClient
from millpond.feature_actors.clock import EventClock, ManualClock, WallClock
from millpond.feature_actors.errors import BadRequest, MillpondError, NotFound
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.ports import IngestPort, LocalIngest, LocalRead, ReadPort, complete
from millpond.feature_actors.reader import MemoryRead
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap


class TestLocalPorts(PortContract):
    @pytest.fixture
    def make(self) -> Any:
        made: list[Shard] = []

        def make(layout: Layout, shard_map: ShardMap) -> tuple[IngestPort, ReadPort, Run]:
            shards = [Shard(layout, shard_map, number) for number in range(shard_map.n_shards)]
            made.extend(shards)
            return LocalIngest(shards), LocalRead(shards), complete

        yield make
        assert made
        assert [s.check() for s in made] == [[]] * len(made)


class TestMemoryPorts(PortContract):
    """Reads go straight to the files that the shards write."""

    @pytest.fixture
    def make(self, tmp_path: Path) -> Any:
        made: list[Shard] = []

        def make(layout: Layout, shard_map: ShardMap) -> tuple[IngestPort, ReadPort, Run]:
            shards = [in_files(tmp_path, layout, shard_map, number) for number in range(shard_map.n_shards)]
            made.extend(shards)
            return LocalIngest(shards), MemoryRead(shard_map, tmp_path), complete

        yield make
        assert made
        assert [s.check() for s in made] == [[]] * len(made)


def local(n_shards: int, clock: Any, ingest: Any = LocalIngest) -> Cluster:
    def make(layout: Layout, shard_map: ShardMap) -> tuple[IngestPort, ReadPort, Run]:
        shards = [Shard(layout, shard_map, number) for number in range(n_shards)]
        return ingest(shards), LocalRead(shards), complete

    return Cluster(make, n_shards, clock)


def test_on_the_wall_clock_time_is_that_of_the_machine() -> None:
    cluster = local(2, WallClock())
    before = time.time_ns() // 1_000_000
    assert cluster.ingest(order(at=before)) == Ack(accepted=1)
    as_of = cluster.read([by_user], {"user": 1}).as_of.tolist()[0]
    assert before <= as_of <= time.time_ns() // 1_000_000


def test_an_unknown_source_is_refused() -> None:
    client, _ = worlds_cluster(LAYOUT)
    batch = pa.RecordBatch.from_pylist([order()], schema=orders.schema)
    with pytest.raises(NotFound, match="^no source `order`; known: `orders`; did you mean `orders`\\?$"):
        complete(client.ingest("order", batch))


@pytest.mark.parametrize("n_shards", [1, 3])
def test_a_bulk_load_of_many_days_sent_twice_counts_once(n_shards: int) -> None:
    cluster = local(n_shards, EventClock())
    events = [order(at=NOW + hour * HOUR, user=1) for hour in range(100)]
    assert cluster.ingest(*events) == Ack(accepted=100)
    assert cluster.ingest(*events) == Ack(duplicates=100)
    assert cluster.read([by_both], {"user": 1, "book": "b"}).matrix.tolist() == [[100.0]]


DIVIDES = pc.scalar(10) / pc.field("user") > 0


@pytest.mark.parametrize("feature", [Count(where=DIVIDES), Streak(of=DIVIDES)], ids=["where", "of"])
def test_an_event_on_which_a_condition_fails_refuses_the_batch_and_nothing_is_applied(feature: Aggregation) -> None:
    divides = FeatureView("divides", owner="ml", source=orders, key=["user"], features={"n": feature})
    layout = compile_layout([], [divides, by_book])
    shards = [Shard(layout, ShardMap.even(N_SLOTS, 1), 0)]
    client = FeatureClient(layout, ShardMap.even(N_SLOTS, 1), LocalIngest(shards), LocalRead(shards), ManualClock(NOW))
    batch = pa.RecordBatch.from_pylist([order(user=1), order(user=0), order(user=2)], schema=orders.schema)
    with pytest.raises(
        BadRequest, match=r"event of `orders`: the condition .* of a view fails: divide by zero"
    ) as error:
        complete(client.ingest("orders", batch))
    assert error.value.path == "$[1]"
    assert set(shards[0].status().events.values()) == {0}
    good = batch.take(pa.array([0, 2]))
    assert complete(client.ingest("orders", good)) == Ack(accepted=2)


# -- ids


def refuse(*ids: Mapping[str, Any], batch: bool = False, plan: ReadPlan | None = None) -> BadRequest:
    plan = plan or ReadPlan(LAYOUT, [*by_user, *by_both], "model `churn`")
    with pytest.raises(BadRequest) as caught:
        plan.key_columns(ids, batch=batch)
    return caught.value


ONE = {"user": 1, "book": "b"}
AN_ID = "an id is `user`, `book`"
GOLDEN: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "missing": ({"user": 1}, f"model `churn`: key field `book` is missing; {AN_ID} - at `$.book`", "bad_id"),
    "unknown": (
        {**ONE, "usr": 2},
        f"model `churn`: unknown field `usr`; {AN_ID} and nothing else; known: `book`, `user`; "
        "did you mean `user`? - at `$.usr`",
        "bad_id",
    ),
    "feature": (
        {**ONE, "sum_1d": 2.0},
        "model `churn`: `sum_1d` is a feature, and feature values are not taken from a request: Millpond computes "
        "them from raw events, the same for training and serving; send the events to their source and only the id "
        "(`user`, `book`) here - at `$.sum_1d`",
        "features_in_request",
    ),
    "feature by its full name": (
        {**ONE, "by_both.n_7d": 2.0},
        "model `churn`: `by_both.n_7d` is a feature, and feature values are not taken from a request: Millpond "
        "computes them from raw events, the same for training and serving; send the events to their source and only "
        "the id (`user`, `book`) here - at `$.by_both.n_7d`",
        "features_in_request",
    ),
    "float": (
        {**ONE, "user": 1.0},
        "model `churn`: expected `user` as int64, got 1.0 - at `$.user`",
        "bad_id",
    ),
    "bool": (
        {**ONE, "user": True},
        "model `churn`: expected `user` as int64, got true - at `$.user`",
        "bad_id",
    ),
    "null": (
        {**ONE, "user": None},
        "model `churn`: expected `user` as int64, got None - at `$.user`",
        "bad_id",
    ),
    "text": (
        {**ONE, "user": "one"},
        "model `churn`: expected `user` as int64, got 'one' - at `$.user`",
        "bad_id",
    ),
    "number": (
        {**ONE, "book": 1},
        "model `churn`: expected `book` as string of at most 1024 bytes, got 1 - at `$.book`",
        "bad_id",
    ),
    "large": (
        {**ONE, "user": 2**63},
        f"model `churn`: expected `user` as int64, got {2**63} - at `$.user`",
        "bad_id",
    ),
    "small": (
        {**ONE, "user": -(2**63) - 1},
        f"model `churn`: expected `user` as int64, got {-(2**63) - 1} - at `$.user`",
        "bad_id",
    ),
    "large text": (
        {**ONE, "user": str(2**63)},
        f"model `churn`: expected `user` as int64, got '{2**63}' - at `$.user`",
        "bad_id",
    ),
    "other digits": (
        {**ONE, "user": "١"},
        "model `churn`: expected `user` as int64, got '١' - at `$.user`",
        "bad_id",
    ),
    "long key": (
        {**ONE, "book": "x" * 1025},
        f"model `churn`: expected `book` as string of at most 1024 bytes, got '{'x' * 79} - at `$.book`",
        "bad_id",
    ),
    "no text": (
        {**ONE, "book": "\ud800"},
        "model `churn`: expected `book` as string of at most 1024 bytes, got '\\ud800' - at `$.book`",
        "bad_id",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_an_id_that_does_not_fit_is_refused_by_this_message(case: str) -> None:
    one, message, code = GOLDEN[case]
    error = refuse(one)
    assert (str(error), error.code, error.status) == (message, code, 400)


def test_every_problem_of_a_batch_is_named_by_its_path_up_to_ten() -> None:
    error = refuse(ONE, {"user": "x", "bok": 1}, {**ONE, "mean_7d": 0}, batch=True)
    assert [path for _, path in error.problems] == ["$[2].mean_7d", "$[1].book", "$[1].bok", "$[1].user"]
    assert error.path == "$[2].mean_7d", "the misconception comes first"
    assert error.code == "features_in_request"
    assert len(refuse(*[{}] * 100, batch=True).problems) == 10


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (7, 7),
        ("7", 7),
        ("-7", -7),
        (2**63 - 1, 2**63 - 1),
        (-(2**63), -(2**63)),
        (str(-(2**63)), -(2**63)),
    ],
)
def test_an_int64_may_come_as_its_digits(given: Any, taken: int) -> None:
    columns = ReadPlan(LAYOUT, list(by_user), "test").key_columns([{"user": given}], batch=False)
    assert columns == {"user": [taken]}
    assert type(columns["user"][0]) is int


@pytest.mark.parametrize(
    "text", ["", "-", "-0", "007", "--1", "+1", " 1", "1 ", "1_0", "1.0", "1e3", "0x1", "²", "9" * 21]
)
def test_what_is_not_digits_is_not_an_int64(text: str) -> None:
    assert refuse({"user": text}, plan=ReadPlan(LAYOUT, list(by_user), "test")).code == "bad_id"


@pytest.mark.parametrize(
    ("one", "plain"),
    [
        ({"user": 7}, True),
        ({"user": 2**63 - 1}, True),
        ({"user": -(2**63)}, True),
        ({"user": 2**63}, False),
        ({"user": "7"}, False),
        ({"user": True}, False),
        ({"user": 7.0}, False),
        ({"user": None}, False),
        ({"user": 7, "book": "b"}, False),
        ({"usr": 7}, False),
        ({}, False),
        ([], False),
        ([{"user": 7}], False),
        (7, False),
        (None, False),
    ],
)
def test_one_id_that_is_plainly_right_is_seen_at_once_and_nothing_else(one: Any, plain: bool) -> None:
    plan = ReadPlan(LAYOUT, list(by_user), "test")
    assert plan.plain_key(one) == (plan.key_columns([one], batch=False) if plain else None)
    for other in ([*by_both], [*by_user, *by_both]):  # of several fields, one of them a string
        assert ReadPlan(LAYOUT, other, "test").plain_key(one) is None


def test_a_string_key_is_taken_as_it_is() -> None:
    books = ["", "1", "ü", "u\u0308", "x" * 1024, " b "]
    plan = ReadPlan(LAYOUT, list(by_both), "test")
    columns = plan.key_columns([{"user": 0, "book": b} for b in books], batch=True)
    assert columns == {"user": [0] * 6, "book": books}


# -- errors cross processes


@pytest.mark.parametrize("kind", [getattr(errors, n) for n in errors.__all__ if n[0].isupper() and n != "Problem"])
def test_an_error_pickles_whole(kind: type[MillpondError]) -> None:
    error = kind("what", path="$.x", code="special", problems=(("a", "$.a"), ("b", "$.b")), retry_after_ms=7)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) == str(error) == "what - at `$.x`"
    assert again.as_json() == {
        "error": {
            "code": "special", "message": "what", "path": "$.x",
            "problems": [{"message": "a", "path": "$.a"}, {"message": "b", "path": "$.b"}],
        }
    }  # fmt: skip
    assert kind("what").as_json()["error"] == {"code": kind.code, "message": "what", "path": None}
