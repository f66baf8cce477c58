"""Each aggregation by itself: the laws of its algebra in plain Python, and examples computed by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import DAY, FLOATS, HOUR, WINDOWS, aggregations, batch, cluster, example, source

from millpond.bench import moment_programs
from millpond.feature_actors import (
    Count,
    CountBy,
    DecayedCount,
    DecayedMean,
    DecayedSum,
    Derived,
    Distinct,
    Entropy,
    FeatureView,
    First,
    Kurtosis,
    Last,
    LastN,
    Max,
    Mean,
    Median,
    Min,
    Quantile,
    Rate,
    Ratio,
    SecondsSince,
    SecondsSinceFirst,
    Sessions,
    SessionSeconds,
    Skew,
    Std,
    Streak,
    StreakDays,
    Sum,
    SumBy,
    TopK,
    TopKCounts,
    Trend,
)
from millpond.feature_actors.aggregations import AGGREGATIONS, PARTS, Aggregation, Column, Input, Part, dispatch
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.ports import complete
from millpond.feature_actors.windows import LADDER_MS, parse_window_ms, tile_width_ms

Event = tuple[int, float | None]

_GUARD = 0x5A5A_5A5A_5A5A_5A5A
_NAN = math.nan

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
every_aggregation = pytest.mark.parametrize("kind", AGGREGATIONS, ids=lambda kind: kind.__name__)


class Partial:
    """A partial of an aggregation in memory that holds other things before and after it."""

    def __init__(self, aggregation: Aggregation, garbage: int = _GUARD) -> None:
        self.aggregation = aggregation
        self.words = np.full(2 + sum(c.words for c in aggregation.columns), garbage, np.int64)
        self.words[[0, -1]] = _GUARD
        self.floats = self.words.view(np.float64)
        for column, at in self.columns():
            column.part.init(self.words, self.floats, at, column.n)

    def columns(self) -> list[tuple[Column, int]]:
        columns = self.aggregation.columns
        return [(column, 1 + sum(c.words for c in columns[:i])) for i, column in enumerate(columns)]

    def update(self, events: Sequence[Event]) -> Partial:
        for time, value in events:
            for column, at in self.columns():
                numbers = [number_of(one, value) for one in column.inputs]
                if not any(math.isnan(number) for number in numbers):
                    of, by, *_ = (*numbers, 0.0, 0.0)
                    column.part.update(self.words, self.floats, at, column.n, column.setting, of, by, time)
        return self

    def merge(self, newer: Partial) -> Partial:
        before = newer.words.copy()
        for column, at in self.columns():
            column.part.merge(self.words, self.floats, at, column.n, column.setting, newer.words, newer.floats, at)
        assert (newer.words == before).all(), "merging changes the older partial, not the newer"
        return self

    def value(self, as_of: int) -> list[float]:
        places = [at for _, at in self.columns()]
        value = [
            float(self.aggregation.finalize(
                self.words, self.floats, places[0], places[-1], self.aggregation.columns[0].n,
                self.aggregation.setting, k, as_of, self.aggregation.window_ms or 0,
            ))
            for k in range(self.aggregation.width)
        ]  # fmt: skip
        assert self.words[[0, -1]].tolist() == [_GUARD, _GUARD], "the verbs stay inside of the partial"
        return value


def looked_at(one: Input, value: float | None) -> Any:
    """What an input is of an event with such a value, None for null."""
    if one.kind == "truth":
        return value is not None and value > 0.5
    if one.kind == "category" and value is not None:
        if type(one.categories[0]) is int:
            return int(value)
        return (*one.categories, "another")[hash(value) % (len(one.categories) + 1)]
    return value


def number_of(one: Input, value: float | None) -> float:
    """The same, as kernels get it."""
    seen = looked_at(one, value)
    if one.kind == "truth":
        return float(seen)
    of = {str: pa.string(), int: pa.int64()}[type(one.categories[0])] if one.categories else pa.float64()
    return float(one.numbers(pa.array([seen], of))[0])


def seen_of(aggregation: Aggregation, events: Sequence[Event]) -> list[tuple[int, Any]]:
    inputs = aggregation.inputs
    if not inputs:
        return [(t, None) for t, _ in events]
    values = [(t, tuple(looked_at(one, v) for one in inputs)) for t, v in events]
    return [(t, x if len(x) > 1 else x[0]) for t, x in values if None not in x]


def plain(aggregation: Aggregation, events: Sequence[Event], as_of: int) -> tuple[list[float], float]:
    seen = seen_of(aggregation, events)
    value = aggregation.plain(seen, as_of)
    return value if isinstance(value, list) else [value], aggregation.slack(seen, as_of)


def is_right(aggregation: Aggregation, got: Sequence[float], events: Sequence[Event], as_of: int) -> bool:
    want, slack = plain(aggregation, events, as_of)
    if slack:
        seen = seen_of(aggregation, events)
        got, want = ([aggregation.worth(one, seen) for one in values] for values in (got, want))
    return len(got) == len(want) and all(
        slack == math.inf or (math.isnan(g) and math.isnan(w)) or g == w or abs(g - w) <= slack
        for g, w in zip(got, want, strict=True)
    )


#: What the times of events are multiplied by, so that gaps and days are among them.
UNITS_MS = (1, 20, 1_000, HOUR)
units = st.sampled_from(UNITS_MS)
events_of = st.lists(st.tuples(st.integers(-60, 60), st.sampled_from((*FLOATS, 2.0, 3.0, -7.5))), max_size=20)
settings_of = st.sampled_from(AGGREGATIONS).flatmap(aggregations)


# -- the algebra


@given(aggregation=settings_of, events=events_of, cuts=st.lists(st.integers(-61, 61), max_size=4), unit=units)
def test_tiles_merged_oldest_first_are_all_events_in_one(
    aggregation: Aggregation, events: list[Event], cuts: list[int], unit: int
) -> None:
    """Events come in any order, as late ones do; a tile holds all those of its time."""
    events, as_of = [(time * unit, value) for time, value in events], 61 * unit
    edges = [-61 * unit, *(cut * unit for cut in sorted(cuts)), as_of]
    merged = Partial(aggregation)
    for start, end in itertools.pairwise(edges):
        merged.merge(Partial(aggregation).update([e for e in events if start <= e[0] < end]))
    one = Partial(aggregation).update(events)
    assert is_right(aggregation, one.value(as_of), events, as_of)
    assert is_right(aggregation, merged.value(as_of), events, as_of)
    if aggregation.slack(seen_of(aggregation, events), as_of) == 0:
        np.testing.assert_array_equal(merged.value(as_of), one.value(as_of))  # of -0.0 and 0.0 either may be the larger


@given(aggregation=settings_of, events=events_of)
def test_merging_with_nothing_changes_nothing(aggregation: Aggregation, events: list[Event]) -> None:
    alone = Partial(aggregation).update(events)
    for merged in (
        Partial(aggregation).merge(Partial(aggregation).update(events)),
        Partial(aggregation).update(events).merge(Partial(aggregation)),
    ):
        assert np.array_equal(merged.words, alone.words)


@given(aggregation=settings_of)
def test_init_sets_every_word_to_the_value_of_nothing(aggregation: Aggregation) -> None:
    partial = Partial(aggregation)
    assert np.array_equal(partial.words, Partial(aggregation, garbage=-1).words)
    want, _ = plain(aggregation, [], 100)
    assert is_right(aggregation, partial.value(100), [], 100)
    assert aggregation.empty.startswith("0" if want[0] == 0 else "NaN")


@every_aggregation
def test_an_aggregation_says_what_it_is(kind: type[Aggregation]) -> None:
    assert len(vars(kind)["__doc__"]) > 20
    assert all(isinstance(text, str) and text for text in (kind.formula, kind.empty, kind.error_text))
    assert {k for k in AGGREGATIONS if k.__module__ == kind.__module__} == {kind}, "one file each"
    assert set(PARTS) >= set(kind.parts) > set()
    assert all(column.part.takes_input == bool(column.inputs) for column in example(kind, "1h").columns)


def test_the_compiled_verbs_have_one_entry_per_class() -> None:
    def entries(verb: Any) -> list[Callable[..., Any]]:
        name, names = verb.py_func.__name__, verb.py_func.__globals__
        n = sum(one.startswith(f"{name}_") for one in names)
        return [names[f"{name}_{i}"].py_func for i in range(n)]

    for verb in (dispatch.init, dispatch.update, dispatch.merge):
        assert entries(verb) == [getattr(part, verb.py_func.__name__) for part in PARTS]
    assert entries(dispatch.finalize) == [kind.finalize for kind in AGGREGATIONS]
    assert tuple(part.takes_input for part in PARTS) == dispatch.TAKES_INPUT
    assert len(set(PARTS)) == len(PARTS) == len(Part.__subclasses__())


# -- by hand, through the engine and by definition

T = 1_700_000_040_000
EVENTS: list[Event] = [(1_000, 4.0), (2_000, None), (2_000, 1.0), (5_000, 9.0), (5_000, 2.0)]
#: Over a window of 60 s: as of 10 s; of 65.999 s, when only what came at 5 s is left; of 66 s, when nothing is.
GOLDEN: dict[Aggregation, tuple[Any, Any, Any]] = {
    Count(window="60s"): (5, 2, 0),
    Sum("v", window="60s"): (16, 11, 0),
    Mean("v", window="60s"): (4, 5.5, _NAN),
    Min("v", window="60s"): (1, 2, _NAN),
    Max("v", window="60s"): (9, 9, _NAN),
    Std("v", window="60s"): (math.sqrt(9.5), 3.5, _NAN),
    First("v", window="60s"): (4, 9, _NAN),
    Last("v", window="60s"): (2, 2, _NAN),
    LastN("v", n=5, window="60s"): ([2, 9, 1, 4, _NAN], [2, 9, _NAN, _NAN, _NAN], [_NAN] * 5),
    LastN("v", n=2, window="60s"): ([2, 9], [2, 9], [_NAN] * 2),
    Rate(window="60s"): (5 / 60, 2 / 60, 0),
    CountBy("i", categories=[1, 9, 5], window="60s"): ([1, 1, 0, 2], [0, 1, 0, 1], [0] * 4),
    SumBy("v", by="i", categories=[1, 9], window="60s"): ([1, 9, 6], [0, 9, 2], [0] * 3),
    SecondsSince(window="60s"): (5, 60.999, _NAN),
    SecondsSinceFirst(window="60s"): (9, 60.999, _NAN),
    # The tiles of these are 5 s wide.
    Distinct("v", m=8, window="60s"): (4, 2, 2),
    Quantile("v", 0.75, window="60s"): (5.25, 7.25, 7.25),
    Median("v", window="60s"): (3, 5.5, 5.5),
    Streak(of=pc.field("v") > 0.5, window="60s"): (3, 2, 0),
    Streak(of=pc.field("v") > 0.5, n=2, window="60s"): (2, 2, 0),
    StreakDays(window="60s"): (1, 1, 0),
    Sessions(gap="2s", window="60s"): (2, 1, 0),
    SessionSeconds(gap="2s", window="60s"): (0.5, 0, _NAN),
    SessionSeconds(gap="1h", window="60s"): (4, 0, _NAN),
    # Their tiles are 5 s wide.
    TopK("v", k=3, window="60s"): ([2, 9, 1], [2, 9, _NAN], [2, 9, _NAN]),
    TopKCounts("v", k=3, window="60s"): ([1, 1, 1], [1, 1, 0], [1, 1, 0]),
    # Of half-lives: nine ago 4, eight ago 1 and null, five ago 9 and 2; then 60.999 ago 9 and 2.
    DecayedSum("v", half_life="1s", window="60s"): (182 / 512, 11 * 2**0.001 / 2**61, 0),
    DecayedCount(half_life="1s", window="60s"): (37 / 512, 2 * 2**0.001 / 2**61, 0),
    DecayedMean("v", half_life="1s", window="60s"): (182 / 35, 5.5, _NAN),
    # The times deviate by -2.25, -1.25, 1.75 and 1.75 s from their mean, the values by 0, -3, 5 and -2.
    Trend("v", window="60s"): (9 / 12.75 * 86_400, _NAN, _NAN),
    Skew("v", window="60s"): (22.5 / 9.5**1.5, 0, _NAN),
    Kurtosis("v", window="60s"): (180.5 / 9.5**2 - 3, -2, _NAN),
    Entropy("i", categories=[1, 9, 5], window="60s"): (1.5, 1, _NAN),
}


def read_at(features: dict[str, Any], events: Sequence[Event], times: Sequence[int]) -> list[list[Any]]:
    """Apply events of one user, each as it happens, and read a view of these features as of some later times."""
    view = FeatureView("v", owner="tests", source=source("first", None), key=["user"], features=features)
    client, (shard,) = cluster(compile_layout([], [view]), clock=ManualClock(min(times)))
    rest = {"id": "", "num": 0, "user": 1, "code": "a", "small": 0, "f32": 0.0, "flag": True}
    of_v = ({"v": v, "i": None if v is None or abs(v) > 1e9 else int(v)} for _, v in events)
    rows = batch(view.source, [{**rest, "at": at, **values} for (at, _), values in zip(events, of_v, strict=True)])
    complete(client.ingest("first", rows, arrival_is_event_time=True))
    plan = ReadPlan(client.layout, list(view), "the test")
    keys = plan.key_columns([{"user": 1}], batch=False)
    values = [plan.named_values(complete(client.read(plan, keys, 1, as_of)))[0] for as_of in times]
    assert shard.check() == []
    return [list(value.values()) for value in values]


def test_the_examples_are_of_every_aggregation_of_this_project() -> None:
    ours = {kind for kind in AGGREGATIONS if kind.__module__.startswith("millpond.")}
    assert {type(aggregation) for aggregation in GOLDEN} == ours


@pytest.mark.parametrize(("place", "as_of"), [(0, 10_000), (1, 65_999), (2, 66_000)])
def test_the_examples_computed_by_hand(place: int, as_of: int) -> None:
    (got,) = read_at({f"f{i}": a for i, a in enumerate(GOLDEN)}, [(T + t, v) for t, v in EVENTS], [T + as_of])
    for aggregation, value in zip(GOLDEN, got, strict=True):
        width = aggregation.tile_width_ms
        left = [e for e in EVENTS if e[0] >= (as_of - 60_000) // width * width]
        want = GOLDEN[aggregation][place]
        by_definition, slack = plain(aggregation, left, as_of)
        np.testing.assert_allclose(by_definition, np.atleast_1d(want), rtol=1e-15, err_msg=repr(aggregation))
        np.testing.assert_allclose(value, want, rtol=1e-15, atol=slack, err_msg=repr(aggregation))


def test_a_standard_deviation_of_huge_values_that_are_the_same_is_0() -> None:
    """The square of such a value overflows; their deviation is 0."""
    features = {"tiled": Std("v", window="60s"), "exact": Std("v", window="60s", exact=True), "ever": Std("v")}
    for n in (1, 2):
        assert read_at(features, [(T, 1e300)] * n, [T + 1]) == [[0, 0, 0]]


def test_derived_features_computed_by_hand() -> None:
    features = {
        "n": Count(window="60s"), "sum": Sum("v", window="60s"), "two": LastN("v", n=2, window="60s"),
        "each": Ratio("sum", "n"), "root": Derived(np.sqrt, "sum"), "of_both": Derived(np.subtract, "each", "root"),
        "apart": Derived(lambda two: two[:, 1] - two[:, 0], "two"),
    }  # fmt: skip
    got = read_at(features, [(T + t, v) for t, v in EVENTS], [T + 10_000, T + 66_000])
    np.testing.assert_array_equal([row[3:] for row in got], [[3.2, 4, 3.2 - 4, 7], [_NAN, 0, _NAN, _NAN]])


def test_strings_computed_by_hand() -> None:
    view = FeatureView(
        "v", owner="tests", source=source("first", None), key=["user"],
        features={
            "last": Last("code"), "first": First("code"), "three": LastN("code", n=3), "none": Last("id", window="1s"),
            "top": TopK("code", k=3), "counts": TopKCounts("code", k=3),
        },
    )  # fmt: skip
    client, _ = cluster(compile_layout([], [view]), clock=ManualClock(T + 2_000))
    rest = {"id": "", "num": 0, "user": 1, "small": 0, "v": 0.0, "i": 0, "f32": 0.0, "flag": True}
    complete(client.ingest("first", batch(view.source, [
        {**rest, "at": T + 1, "code": "b"}, {**rest, "at": T, "code": "日本語🐟"}, {**rest, "at": T + 2, "code": None},
        {**rest, "at": T, "code": "日本語🐟"},
    ])))  # fmt: skip
    plan = ReadPlan(client.layout, list(view), "the test")
    rows = complete(client.read(plan, plan.key_columns([{"user": 1}], batch=False), 1))
    (named,) = plan.named_values(rows)
    assert list(named.pop("v.three")) == ["b", "日本語🐟", "日本語🐟"]
    assert list(named.pop("v.top")) == ["日本語🐟", "b", None]
    assert named.pop("v.counts") == [2, 1, 0]
    assert named == {"v.last": "b", "v.first": "日本語🐟", "v.none": None}


# -- the most frequent


@given(
    events=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20).map(float)), max_size=150),
    m=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_counts_are_never_above_the_truth_nor_further_below_than_stated(
    events: list[tuple[int, float]], m: int, cuts: list[int]
) -> None:
    top, counts = TopK("v", k=m, m=m), TopKCounts("v", k=m, m=m)
    partials = [Partial(top), Partial(counts)]
    for start, end in itertools.pairwise([-1, *sorted(cuts), 100]):
        for partial in partials:
            partial.merge(Partial(top).update([e for e in events if start <= e[0] < end]))
    values, ns = (partial.value(100) for partial in partials)
    answer = {v: n for v, n in zip(values, ns, strict=True) if n}
    assert len(answer) == sum(not math.isnan(v) for v in values), "no value twice, none without a count"
    truth = Counter(v for _, v in events)
    assert all(n <= truth[v] for v, n in answer.items())
    assert all((m + 1) * (n - answer.get(v, 0)) <= len(events) for v, n in truth.items())
    if len(truth) <= m:
        assert answer == truth


def test_of_two_values_as_frequent_the_one_seen_more_recently_comes_first() -> None:
    features = {"top": TopK("v", k=4), "exact": TopK("v", k=4, window="60s", exact=True)}
    at = [T + 3, T + 1, T + 1, T + 2, T + 2]
    for values, want in (
        ([1, 2, 3, 4, 4], [4, 1, 3, 2]),
        ([1, 3, 2, 0.0, -0.0], [0, 1, 2, 3]),
        ([1, 3, 2, -0.0, 0.0], [0, 1, 2, 3]),
        ([1, 3, 2, -0.0, 4], [1, 4, 0, 2]),
    ):
        events = list(zip(at, values, strict=True))
        for order in (events, sorted(events, key=lambda event: event[0])):
            (got,) = read_at(features, order, [T + 10])
            assert str(got) == str([[float(one) for one in want]] * 2), "0.0 and -0.0 are one value"
    (got,) = read_at(features, [(T, 1.0), (T, 2.0), (T, 2.0), (T, 1.0)], [T + 10])
    assert str(got) == str([[1.0, 2.0, _NAN, _NAN]] * 2)


# -- decays and moments


def test_what_two_features_have_in_common_is_kept_once() -> None:
    """A sum, a decayed count and a mean of it; the moments; the categories."""
    events = {"categories": ["a", "b"], "window": "1h"}
    for one, other, words in (
        (DecayedSum("v", half_life="1d", window="1h"), DecayedMean("v", half_life="24h", window="1h"), 4),
        (DecayedSum("v", half_life="1d", window="1h"), DecayedMean("v", half_life="25h", window="1h"), 6),
        (Skew("v", window="1h"), Kurtosis("v", window="1h"), 5),
        (CountBy("code", **events), Entropy("code", **events), 3),  # type: ignore[arg-type]
    ):
        view = FeatureView(
            "v", owner="tests", source=source("first", None), key=["user"], features={"f": one, "g": other}
        )
        (series,) = compile_layout([], [view]).tables[0].series
        assert series.words == words


@given(seed=st.integers(0, 2**32), data=st.data())
def test_decays_and_moments_are_as_near_as_stated(seed: int, data: st.DataObject) -> None:
    """Of values and times that are hard on sums, in tiles cut anywhere."""
    for program, _ in zip(moment_programs.programs(np.random.default_rng(seed), 40), range(7), strict=False):
        cuts = data.draw(st.lists(st.sampled_from([t for t, _ in program[1]]), max_size=4))
        share = moment_programs.share_of_bound(program, cuts)
        assert math.isnan(share) or share <= 1


def test_a_decay_is_of_event_time_whatever_the_order_of_arrival() -> None:
    features = {
        "sum": DecayedSum("v", half_life="1h"), "n": DecayedCount(half_life="1h"),
        "mean": DecayedMean("v", half_life="1h"), "recent": DecayedSum("v", half_life="1h", window="90s"),
    }  # fmt: skip
    hour = T // HOUR * HOUR
    events = [(hour + 3 * HOUR, 8.0), (hour, 4.0), (hour + 2 * HOUR, 2.0), (hour - HOUR, 16.0)]
    as_of = hour + 4 * HOUR
    for order in itertools.permutations(events):
        assert read_at(features, order, [as_of]) == [[4 + 1 / 4 + 1 / 2 + 1 / 2, 27 / 32, 168 / 27, 0]]


def test_a_decayed_mean_is_there_when_the_decayed_sum_is_gone() -> None:
    features = {"sum": DecayedSum("v", half_life="1s"), "mean": DecayedMean("v", half_life="1s")}
    assert read_at(features, [(T, 1e300), (T, 5e299)], [T + 10, T + 3_000_000]) == [
        [pytest.approx(1.5e300 * 2**-0.01, rel=1e-14), 7.5e299], [0, 7.5e299],
    ]  # fmt: skip


def test_a_trend_of_events_a_millisecond_apart_is_right() -> None:
    features = {"tiled": Trend("v", window="30d"), "exact": Trend("v", window="30d", exact=True), "ever": Trend("v")}
    rising = [(T + k, 1e3 + k) for k in range(5)]
    for order in (rising, rising[::-1]):
        assert read_at(features, order, [T + 10]) == [[pytest.approx(86_400_000, rel=1e-12)] * 3]
    assert read_at(features, [(T, 1.0), (T, 2.0)], [T + 10])[0] == pytest.approx([_NAN] * 3, nan_ok=True)


@pytest.mark.parametrize("value", [0.1, -7.3, 1e300, 5e-324])
def test_values_that_are_all_the_same_have_no_skew(value: float) -> None:
    features = {
        f"{kind.__name__.lower()}{i}": kind("v", **window)
        for kind in (Skew, Kurtosis)
        for i, window in enumerate(({"window": "60s"}, {"window": "60s", "exact": True}, {}))
    }
    same = [(T + at, value) for at in (0, 0, 7, 5_000, 5_000)]
    (got,) = read_at(features, same, [T + 6_000])
    assert got == pytest.approx([_NAN] * 6, nan_ok=True)


def test_moments_of_neighbouring_doubles_are_numbers() -> None:
    """Their mean is one of them, but they are not the same."""
    apart = [(T, 1.0), (T, math.nextafter(1.0, 2.0)), (T + 1, 1.0)]
    (got,) = read_at({"skew": Skew("v"), "kurtosis": Kurtosis("v")}, apart, [T + 10])
    assert not any(map(math.isnan, got))


# -- streaks and sessions


@given(
    n=st.sampled_from((1, 62, 63, 64, 130)),
    holes=st.sets(st.integers(-70, 150), max_size=4),
    order=st.randoms(use_true_random=False),
    cuts=st.lists(st.integers(-70, 150), max_size=3),
    as_of=st.integers(148, 152),
)
def test_a_streak_of_days_is_as_long_as_its_days_whatever_their_order(
    n: int, holes: set[int], order: Random, cuts: list[int], as_of: int
) -> None:
    days = [day for day in range(-70, 151) if day not in holes]
    order.shuffle(days)
    merged = Partial(aggregation := StreakDays(n=n))
    for start, end in itertools.pairwise([-71, *sorted(cuts), 151]):
        merged.merge(Partial(aggregation).update([(day * DAY + order.randrange(DAY), 1.0) for day in days
                                                  if start <= day < end]))  # fmt: skip
    newest = max(days)
    streak = min(n, newest - max((hole for hole in holes if hole < newest), default=-71))
    assert merged.value(as_of * DAY) == [streak if newest >= as_of - 1 else 0]


def test_a_day_that_is_not_over_does_not_break_a_streak() -> None:
    midnight = T // DAY * DAY
    features = {"ever": StreakDays(), "two": StreakDays(n=2), "window": StreakDays(window="30d")}
    days = [(midnight - DAY, 1.0), (midnight - 3 * DAY, None), (midnight - 1, 1.0), (midnight - 2 * DAY, 1.0)]
    got = read_at(features, days, [midnight, midnight + DAY - 1, midnight + DAY])
    assert got == [[3, 2, 3], [3, 2, 3], [0, 0, 0]]
    (got_today,) = read_at(features, [*days, (midnight + 5, 1.0)], [midnight + DAY])
    assert got_today == [4, 2, 4]


def test_a_late_event_cuts_a_streak_where_it_belongs() -> None:
    features = {"ever": Streak(of=pc.field("v") > 0), "two": Streak(of=pc.field("v") > 0, n=2)}
    for values, want in (
        ({1: 1.0, 2: 1.0, 3: 1.0}, 3),
        ({3: 1.0, 2: 0.0, 1: 1.0}, 1),
        ({1: 1.0, 3: 1.0, 4: 1.0, 2: None}, 2),
        ({1: 1.0, 2: 1.0, 3: 0.0}, 0),
        ({5: 0.0, 1: 1.0, 2: 1.0}, 0),
    ):
        events = [(T + at, value) for at, value in values.items()]
        assert read_at(features, events, [T + 10]) == [[want, min(want, 2)]]
    for tied, want in (([1.0, 0.0], 0), ([0.0, 1.0], 1), ([1.0, 0.0, 1.0], 1)):
        assert read_at(features, [(T, value) for value in tied], [T + 10]) == [[want, want]]


@given(
    kind=st.sampled_from((Sessions, SessionSeconds)),
    n=st.sampled_from((1, 2, 3, 20)),
    times=st.lists(st.integers(0, 90), max_size=30),
    cuts=st.lists(st.integers(0, 90), max_size=4),
)
def test_sessions_are_those_of_all_tiles_but_for_events_that_came_too_late(
    kind: type[Sessions], n: int, times: list[int], cuts: list[int]
) -> None:
    aggregation, events = kind(gap="5ms", n=n), [(time, 1.0) for time in times]
    merged = Partial(aggregation)
    for start, end in itertools.pairwise([-1, *sorted(cuts), 100]):
        merged.merge(Partial(aggregation).update([e for e in events if start <= e[0] < end]))
    assert is_right(aggregation, merged.value(100), events, 100)
    for order in (sorted(events), sorted(events, reverse=True)):
        want, _ = plain(aggregation, order, 100)
        assert str(Partial(aggregation).update(order).value(100)) == str(want), "in time, or in reverse: exact"


@pytest.mark.parametrize(
    ("tiles", "want"),
    [
        ([[0], [10]], 1),
        ([[0], [11]], 2),
        ([[0, 20, 10]], 1),
        ([[0, 21, 10]], 2),
        ([[0, 21, 11]], 2),
        # Two that are kept become one; the one at 100 is closed all the same, and what is near it is not looked at.
        ([[100, 200, 230, 210, 220, 50, 120, 95]], 3),
    ],
)
def test_events_a_gap_apart_are_of_one_session(tiles: list[list[int]], want: int) -> None:
    merged = Partial(aggregation := Sessions(gap="10ms", n=2))
    for times in tiles:
        merged.merge(Partial(aggregation).update([(time, 1.0) for time in times]))
    assert merged.value(300) == [want]


def test_late_events_mend_the_newest_sessions() -> None:
    count, mean = Sessions(gap="10ms", n=2), SessionSeconds(gap="10ms", n=2)
    partial = Partial(mean)
    for time, n, total in (
        (100, 1, 0),
        (200, 2, 0),
        (205, 2, 5),
        (192, 2, 13),
        (150, 3, 13),  # the one at 100 is closed
        (105, 3, 13),  # it would have lengthened that
        (95, 3, 18),  # before all others
        (50, 4, 18),
        (170, 5, 18),  # the one at 150 is closed
        (182, 5, 28),
        (176, 4, 40),  # joins two
        (176, 4, 40),
        (120, 4, 40),  # it would have been one by itself
        (160, 4, 40),
        (216, 5, 40),
        (300, 6, 40),
    ):
        partial.update([(time, 1.0)])
        got = [float(kind.finalize(partial.words, partial.floats, 1, 1, 2, 10, 0, 0, 0)) for kind in (count, mean)]
        assert got == [n, total / n / 1000], time


@given(aggregation=settings_of, data=st.data())
def test_whatever_a_reader_finds_in_memory_that_is_being_written_it_ends_and_stays_inside(
    aggregation: Aggregation, data: st.DataObject
) -> None:
    merged, size = Partial(aggregation), sum(c.words for c in aggregation.columns)
    word = st.sampled_from((0, 1, -1, 3, 1_000, T, -T, 2**62, -(2**62), 2**63 - 1, -(2**63)))
    for _ in range(3):
        torn = Partial(aggregation)
        torn.words[1:-1] = data.draw(st.lists(word, min_size=size, max_size=size))
        merged.merge(torn)
    assert len(merged.value(T)) == aggregation.width


# -- windows


@pytest.mark.parametrize("exact", [False, True])
def test_a_maximum_leaves_with_its_window(exact: bool) -> None:
    """A well-known feature store answers 151 where the truth is 9: its tiles are subtracted to slide a window."""
    events = [(T + 90_000, 151.0), *((T + minute * 60_000, 9.0) for minute in range(3, 180))]
    times = [T + 180 * 60_000 + minute * 30_000 for minute in range(2 * 62)]
    got = read_at({"max": Max("v", window="3h", exact=exact), "n": Count(window="3h", exact=exact)}, events, times)
    for as_of, (largest, n) in zip(times, got, strict=True):
        start = as_of - 3 * HOUR + 1 if exact else (as_of - 3 * HOUR) // 60_000 * 60_000
        assert largest == (151 if start <= T + 90_000 else 9)
        assert n == sum(at >= start for at, _ in events)
    assert {largest for largest, _ in got} == {151, 9}


@pytest.mark.parametrize("window", [*WINDOWS, "61s", "119999ms", "11h", "3660d"])
@pytest.mark.parametrize("at", [T, T + 7_919, -5_000_000_007])
def test_a_window_is_never_too_short_and_at_most_a_sixtieth_too_long(window: str, at: int) -> None:
    features = {"tiled": Count(window=window), "exact": Count(window=window, exact=True)}
    length = parse_window_ms(window, subject="the test")
    times = [at + length - 1, at + length, at + length + length // 60]
    before, at_length, after = read_at(features, [(at, 1.0)], times)
    assert (before, at_length[1], after) == ([1, 1], 0, [0, 0])
    assert at_length[0] == 1, "as of a window's length later, what happened at its first millisecond is in it"


@given(window_ms=st.integers(1_000, 3_660 * 86_400_000), as_of=st.integers(-(2**45), 2**45))
def test_the_tiles_of_a_window_are_a_sixtieth_of_it_or_less(window_ms: int, as_of: int) -> None:
    width = tile_width_ms(window_ms)
    assert width in LADDER_MS
    start = (as_of - window_ms) // width * width
    assert window_ms <= as_of - start < window_ms + width <= window_ms * 61 / 60


@pytest.mark.parametrize("kind", [DecayedSum, DecayedMean])
def test_what_is_left_of_a_huge_value_when_its_weight_is_less_than_any_double(kind: type[DecayedSum]) -> None:
    decayed = kind("v", half_life="1h")
    events: list[Event] = [(0, -1e300), (62 * 24 * HOUR, 0.0)]
    got = Partial(decayed).update(events).value(events[-1][0])
    assert got[0] < 0
    assert is_right(decayed, got, events, events[-1][0])
    assert not is_right(decayed, [0.0], events, events[-1][0])
