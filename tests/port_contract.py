"""What any pair of ports owes the client: the same tests for shards in this process and for Ray actors.

`make(layout, shard_map)` gives the ports and `run`, which drives a coroutine to its end. A test file
subclasses `PortContract` and defines the fixture `make`. Where the runtime is slow to start, keep
what `make` starts for as long as layout and map allow: the tests use other entities and event ids each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from millpond.feature_actors import Count, FeatureView, Field, Last, Max, Mean, Min, SecondsSince, Source, Sum
from millpond.feature_actors.client import Ack, FeatureClient
from millpond.feature_actors.clock import Clock, EventClock, ManualClock
from millpond.feature_actors.errors import AsOfInPast, BadRequest
from millpond.feature_actors.keys import hash_keys
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.ports import IngestPort, ReadPort
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import Control, Memory
from millpond.feature_actors.tiles.structure import SEQUENCE_ROW_BITS

NOW = 1_700_000_000_000
HOUR, DAY = 3_600_000, 86_400_000

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Make(Protocol):
    def __call__(self, layout: Layout, shard_map: ShardMap) -> tuple[IngestPort, ReadPort, Run]: ...


orders = Source(
    "orders",
    owner="shop",
    fields={
        "order": "string", "at": "timestamp[ms, UTC]", "user": Field("int64", optional=True),
        "book": Field("string", optional=True), "price": Field("float64", optional=True),
    },
    event_time="at",
    event_id="order",
)  # fmt: skip
by_user = FeatureView(
    "by_user", owner="ml", source=orders, key=["user"],
    features={"n_1h": Count(window="1h"), "sum_1d": Sum("price", window="1d"),
              "mean_7d": Mean("price", window="7d"), "last": Last("price", ttl="7d"),
              "since": SecondsSince(window="7d")},
)  # fmt: skip
by_book = FeatureView(
    "by_book", owner="ml", source=orders, key=["book"],
    features={"lo": Min("price", window="7d"), "hi": Max("price", window="7d")},
    where=pc.field("price") > 0,
)  # fmt: skip
by_both = FeatureView("by_both", owner="ml", source=orders, key=["user", "book"], features={"n_7d": Count(window="7d")})
VIEWS = (by_user, by_book, by_both)
LAYOUT = compile_layout([orders], VIEWS)
N_SLOTS = 16

_numbers = itertools.count()


def order(
    at: int = NOW,
    user: int | None = 1,
    book: str | None = "b",
    price: float | None = 1.0,
    order: str | None = None,
) -> dict[str, Any]:
    return {"order": order or f"order-{next(_numbers)}", "at": at, "user": user, "book": book, "price": price}


def in_files(
    folder: Path,
    layout: Layout,
    shard_map: ShardMap,
    number: int,
    *,
    epoch: int = 1,
    bytes_max: int = 1 << 28,
    **options: Any,
) -> Shard:
    """A shard that writes its tiles to a file of `folder`, published for readers."""
    control = Control(folder, number, writable=True)
    memory = Memory.create(control.tiles_path(epoch), bytes_max)
    shard = Shard(layout, shard_map, number, memory=memory, **options)
    control.publish(epoch)
    return shard


class Cluster:
    """A client over the ports under test."""

    def __init__(self, make: Make, n_shards: int, clock: Clock) -> None:
        shard_map = ShardMap.even(N_SLOTS, n_shards)
        ingest, read, self.run = make(LAYOUT, shard_map)
        self.client = FeatureClient(LAYOUT, shard_map, ingest, read, clock)

    def ingest(self, *events: dict[str, Any], **options: Any) -> Ack:
        batch = pa.RecordBatch.from_pylist(list(events), schema=orders.schema)
        return self.run(self.client.ingest("orders", batch, **options))  # type: ignore[no-any-return]

    def read(self, views: Sequence[FeatureView], *ids: dict[str, Any], as_of: int | None = None) -> FeatureRows:
        plan = ReadPlan(LAYOUT, [f for v in views for f in v], "model `m`")
        columns = plan.key_columns(ids, batch=True)
        return self.run(self.client.read(plan, columns, len(ids), as_of))  # type: ignore[no-any-return]


class PortContract:
    """Subclass it in a test file and give it the fixture `make`."""

    @pytest.fixture(params=[1, 2, 5])
    def n_shards(self, request: pytest.FixtureRequest) -> int:
        return request.param  # type: ignore[no-any-return]

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock(NOW)

    @pytest.fixture
    def cluster(self, make: Make, n_shards: int, clock: ManualClock) -> Cluster:
        return Cluster(make, n_shards, clock)

    # -- events

    def test_an_event_is_seen_by_every_view_once_acknowledged(self, cluster: Cluster) -> None:
        assert cluster.ingest(order(user=1, book="b", price=2.5)) == Ack(accepted=1)
        rows = cluster.read(VIEWS, {"user": 1, "book": "b"})
        assert rows.matrix.tolist() == [[1.0, 2.5, 2.5, 2.5, 0.0, 2.5, 2.5, 1.0]]
        assert (rows.as_of.tolist(), rows.unknown) == ([NOW], [[]])

    def test_a_batch_of_many_entities_reads_back_one_by_one(self, cluster: Cluster) -> None:
        n = 300
        assert cluster.ingest(*(order(user=i, book=f"b{i}", price=float(i + 1)) for i in range(n))) == Ack(accepted=n)
        rows = cluster.read(VIEWS, *({"user": i, "book": f"b{i}"} for i in range(n)))
        prices = np.arange(1.0, n + 1)
        np.testing.assert_array_equal(rows.matrix[:, 1], prices)
        np.testing.assert_array_equal(rows.matrix[:, 5:], np.column_stack([prices, prices, np.ones(n)]))
        assert rows.unknown == [[]] * n

    def test_late_too_late_and_unkeyed_events_are_counted_among_the_accepted(self, cluster: Cluster) -> None:
        assert cluster.ingest(
            order(at=NOW - HOUR),  # on time
            order(at=NOW - HOUR - 1),  # late
            order(at=NOW - 7 * DAY),  # late
            order(at=NOW - 9 * DAY),  # too late for each window and ttl
            order(at=NOW - 9 * DAY),
            order(user=None),
            order(book=None),
        ) == Ack(accepted=7, late=2, too_late=2, unkeyed=2)

    def test_too_late_is_counted_when_no_feature_takes_the_event_any_more(self, cluster: Cluster) -> None:
        width = 2 * HOUR  # of the tiles of 7 days
        oldest = (NOW - 7 * DAY) // width * width
        assert cluster.ingest(order(at=oldest), order(at=oldest - 1, user=2)) == Ack(accepted=2, late=1, too_late=1)
        assert cluster.read([by_both], {"user": 1, "book": "b"}, {"user": 2, "book": "b"}).matrix.tolist() == [[1], [0]]

    def test_an_event_without_a_key_is_in_the_views_that_it_has_keys_for(self, cluster: Cluster) -> None:
        cluster.ingest(order(user=None, book="alone", price=3.0), order(user=77, book=None, price=4.0))
        assert cluster.read([by_book], {"book": "alone"}).matrix.tolist() == [[3, 3]]
        assert cluster.read([by_user], {"user": 77}).matrix.tolist() == [[1, 4, 4, 4, 0]]
        assert cluster.read([by_both], {"user": 77, "book": "alone"}).unknown == [["by_both"]]

    def test_a_duplicate_changes_nothing_and_a_conflict_is_not_applied(self, cluster: Cluster) -> None:
        first = order(price=1.0)
        assert cluster.ingest(first, first) == Ack(accepted=1, duplicates=1)
        assert cluster.ingest(first, {**first, "price": 9.0}, order(price=2.0)) == Ack(
            accepted=1, duplicates=1, conflicts=1
        )
        assert cluster.read([by_user], {"user": 1}).matrix[0, :2].tolist() == [2.0, 3.0]

    def test_an_id_is_free_again_beyond_the_horizon(self, cluster: Cluster, clock: ManualClock) -> None:
        first = order()
        cluster.ingest(first)
        clock.ms += DAY
        assert cluster.ingest(first) == Ack(duplicates=1)
        clock.ms += 1
        assert cluster.ingest(first) == Ack(accepted=1, late=1)
        assert cluster.read([by_both], {"user": 1, "book": "b"}).matrix.tolist() == [[2]]

    def test_an_event_ahead_of_its_arrival_refuses_the_whole_batch(self, cluster: Cluster) -> None:
        cluster.ingest(order(at=NOW + 600_000, user=5))
        ahead = NOW + 600_001
        with pytest.raises(BadRequest) as caught:
            cluster.ingest(order(user=6), order(at=ahead, user=6), order(at=ahead + 1, user=6))
        message = f"event of `orders`: at {ahead} lies 600001 ms ahead of its arrival; allowed is 600000 ms"
        assert str(caught.value) == f"{message} - at `$[1].at`"
        assert [path for _, path in caught.value.problems] == ["$[1].at", "$[2].at"]
        assert caught.value.code == "event_ahead"
        assert cluster.read([by_user], {"user": 6}).unknown == [["by_user"]]

    def test_no_events_are_no_work(self, cluster: Cluster) -> None:
        assert cluster.ingest() == Ack()

    def test_a_bulk_load_arrives_when_it_happened(self, cluster: Cluster) -> None:
        old = [order(at=NOW - 30 * DAY), order(at=NOW - HOUR)]
        assert cluster.ingest(*old, arrival_is_event_time=True) == Ack(accepted=2)

    # -- as of

    def test_a_live_read_is_as_of_the_clock_or_the_newest_event_of_the_entity(
        self, cluster: Cluster, clock: ManualClock
    ) -> None:
        cluster.ingest(order(at=NOW + 5_000, user=1, book="x"), order(at=NOW - 5_000, user=2, book="y"))
        rows = cluster.read([by_user], {"user": 1}, {"user": 2}, {"user": 3})
        assert rows.as_of.tolist() == [NOW + 5_000, NOW, NOW]
        assert rows.matrix[:2, 4].tolist() == [0.0, 5.0]
        clock.ms = NOW + 60_000
        assert cluster.read([by_user], {"user": 1}).as_of.tolist() == [NOW + 60_000]

    def test_all_features_of_an_id_are_as_of_one_time_on_any_shards(self, cluster: Cluster) -> None:
        users, books = range(8), [f"book{i}" for i in range(8)]
        cluster.ingest(*(order(user=u, book="other", at=NOW) for u in users))
        cluster.ingest(*(order(user=99, book=b, at=NOW + 7_000) for b in books))
        ids = [{"user": u, "book": b} for u in users for b in books]
        rows = cluster.read(VIEWS, *ids)
        assert set(rows.as_of.tolist()) == {NOW + 7_000}
        assert set(rows.matrix[:, 4].tolist()) == {7.0}

    def test_an_explicit_as_of_lets_a_window_empty_itself(self, cluster: Cluster) -> None:
        cluster.ingest(order(price=2.0))
        at = NOW + HOUR + 60_000  # a window of an hour has tiles of a minute
        rows = cluster.read([by_user], {"user": 1}, as_of=at)
        assert rows.as_of.tolist() == [at]
        assert rows.matrix.tolist() == [[0.0, 2.0, 2.0, 2.0, 3660.0]]
        rows = cluster.read([by_user], {"user": 1}, as_of=NOW + 8 * DAY)
        np.testing.assert_array_equal(rows.matrix, [[0, 0, np.nan, np.nan, np.nan]])
        assert rows.unknown == [["by_user"]]

    def test_an_as_of_before_the_clock_or_an_applied_event_is_refused(self, cluster: Cluster) -> None:
        cluster.ingest(order(at=NOW + 5_000))
        for as_of, newest in ((NOW + 4_999, NOW + 5_000), (NOW - 1, NOW + 5_000)):
            with pytest.raises(AsOfInPast) as caught:
                cluster.read([by_user], {"user": 1}, as_of=as_of)
            assert str(caught.value) == (
                f"as_of {as_of} lies before {newest}, up to which events have been applied, and an open tile cannot "
                "be cut in two (exact features can): ask as of a later time, or leave as_of out - at `as_of`"
            )
        with pytest.raises(AsOfInPast):
            cluster.read([by_user], {"user": 424242}, as_of=NOW - 1)
        assert cluster.read([by_user], {"user": 1}, as_of=NOW + 5_000).as_of.tolist() == [NOW + 5_000]

    def test_on_the_event_clock_time_is_the_newest_stamp_on_every_shard(self, make: Make, n_shards: int) -> None:
        cluster = Cluster(make, n_shards, EventClock())
        quiet = [order(at=NOW, user=u, book=f"q{u}") for u in range(10)]
        newest = order(at=NOW + 5 * HOUR, user=1000, book="newest")
        cluster.ingest(*quiet, newest)
        rows = cluster.read(VIEWS, *({"user": u, "book": f"q{u}"} for u in range(10)))
        assert set(rows.as_of.tolist()) == {NOW + 5 * HOUR}
        assert set(rows.matrix[:, 0].tolist()) == {0.0}
        # An event that no view has a key for moves time as well; one that is older does not move it back.
        cluster.ingest(order(at=NOW + 6 * HOUR, user=None, book=None), order(at=NOW + HOUR, user=2000))
        cluster.ingest(order(at=NOW, user=2001))
        rows = cluster.read(VIEWS, *({"user": u, "book": f"q{u}"} for u in range(10)))
        assert set(rows.as_of.tolist()) == {NOW + 6 * HOUR}
        with pytest.raises(AsOfInPast):
            cluster.read([by_user], {"user": 0}, as_of=NOW + 6 * HOUR - 1)

    # -- reads

    def test_an_unknown_entity_has_counts_and_sums_of_0_and_no_other_values(self, cluster: Cluster) -> None:
        cluster.ingest(order(user=1, book="b"))
        rows = cluster.read(VIEWS, {"user": 2, "book": "none"}, {"user": 1, "book": "none"})
        nan = np.nan
        np.testing.assert_array_equal(rows.matrix, [[0, 0, nan, nan, nan, nan, nan, 0], [1, 1, 1, 1, 0, nan, nan, 0]])
        assert rows.unknown == [["by_user", "by_book", "by_both"], ["by_book", "by_both"]]

    def test_a_view_knows_an_entity_by_the_events_that_satisfy_its_where(self, cluster: Cluster) -> None:
        cluster.ingest(order(user=3, book="free", price=0.0), order(user=3, book="unpriced", price=None))
        rows = cluster.read(VIEWS, {"user": 3, "book": "free"}, {"user": 3, "book": "unpriced"})
        assert rows.unknown == [["by_book"], ["by_book"]]
        assert rows.matrix[:, 0].tolist() == [2.0, 2.0]

    def test_a_read_tells_up_to_which_event_each_row_has_been_brought(self, cluster: Cluster) -> None:
        ids = [{"user": 500 + i, "book": f"traced{i}"} for i in range(6)]
        before = cluster.read(VIEWS, *ids).trace
        hashes = [hash_keys([[one[f] for one in ids] for f in view.key], 6)[:, 0] for view in VIEWS]
        assert (before[:, 0].view(np.uint64) == hashes[0] + hashes[1] + hashes[2]).all()
        assert (before[:, 1:] == -1).all()
        cluster.ingest(*(order(user=one["user"], book=one["book"]) for one in ids[:3]))
        first = cluster.read(VIEWS, *ids).trace
        assert (first[:, 0] == before[:, 0]).all()
        assert (first[:3, 1:] >= 0).all()
        assert (first[3:, 1:] == -1).all()
        cluster.ingest(order(user=501, book="another"), order(user=501, book="another"))
        second = cluster.read(VIEWS, *ids).trace
        assert second[1, 1] >> SEQUENCE_ROW_BITS > first[1, 1] >> SEQUENCE_ROW_BITS
        same = np.ones(first.shape, np.bool_)
        same[1, 1] = False
        assert (second == first)[same].all()

    def test_the_same_id_twice_gives_the_same_row_twice(self, cluster: Cluster) -> None:
        cluster.ingest(order(user=1, book="b", price=4.0))
        rows = cluster.read(VIEWS, *[{"user": 1, "book": "b"}] * 3)
        assert rows.matrix.tolist() == [rows.matrix[0].tolist()] * 3

    def test_no_ids_are_no_rows(self, cluster: Cluster) -> None:
        rows = cluster.read(VIEWS)
        assert (rows.matrix.shape, rows.as_of.tolist(), rows.unknown) == ((0, 8), [], [])
