# ruff: noqa: E501, RUF043  (messages stand whole)
"""A declaration that does not fit is refused when it is made, by a message that names the place."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    Field,
    First,
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
    Sessions,
    SessionSeconds,
    Source,
    Std,
    Streak,
    StreakDays,
    Sum,
    SumBy,
    TopK,
    TopKCounts,
    Trend,
)
from millpond.feature_actors.aggregations import AGGREGATIONS, Aggregation
from millpond.feature_actors.errors import DeclarationError, NotFound
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.windows import (
    LADDER_MS,
    TILES_PER_WINDOW_MIN,
    parse_window_ms,
    tile_width_ms,
)

FIELDS = {
    "id": "string",
    "at": "timestamp[ms, UTC]",
    "user": "int64",
    "price": "float64",
    "paid": "bool",
    "big": "uint64",
}


def a_source(**changes: Any) -> Source:
    return Source(
        **{
            "name": "sales",
            "owner": "shop",
            "fields": FIELDS,
            "event_time": "at",
            "event_id": "id",
            **changes,
        }
    )


def a_view(**changes: Any) -> FeatureView:
    return FeatureView(
        **{
            "name": "spend",
            "owner": "ml",
            "source": a_source(),
            "key": ["user"],
            "features": {"n": Count()},
            **changes,
        }
    )


@pytest.mark.parametrize(
    "other",
    [
        {"owner": "shop"},
        {"key": ["user", "id"]},
        {"features": {"n": Count(window="1h")}},
        {"features": {"n": Count(), "m": Count()}},
        {"source": a_source(version=2)},
        {"where": pc.field("price") > 1},
    ],
)
def test_a_view_that_two_files_declare_alike_is_one_and_otherwise_two(other: dict[str, Any]) -> None:
    layout = compile_layout([], [a_view(), a_view()])
    assert list(layout.views) == ["spend"]
    assert len(layout.tables) == 1
    with pytest.raises(DeclarationError):
        compile_layout([], [a_view(), a_view(**other)])


def of(feature: Any) -> FeatureView:
    return a_view(features={"f": feature})


NAME = "a name is lower-case letters, digits and `_`, starts with a letter and has at most 63 characters"

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    # sources
    "source name": (lambda: a_source(name="Sales"), f"source 'Sales': {NAME}"),
    "source name too long": (lambda: a_source(name="s" * 64), f"source '{'s' * 64}': {NAME}"),
    "source name no text": (lambda: a_source(name=None), f"source None: {NAME}"),
    "source owner": (lambda: a_source(owner=" "), 'source `sales`: no owner; say which team owns it with `owner="..."`'),
    "no fields": (lambda: a_source(fields={}), "source `sales`: no fields"),
    "fields a list": (
        lambda: a_source(fields=["id", "at"]),
        "source `sales`: fields is a mapping of name to type such as {\"amount\": \"float64\"}, got ['id', 'at']",
    ),
    "version a text": (
        lambda: a_source(version="x"),
        "source `sales`: version is a whole number from 1 on, got 'x'",
    ),
    "version 0": (lambda: a_source(version=0), "source `sales`: version is a whole number from 1 on, got 0"),
    "version a bool": (lambda: a_source(version=True), "source `sales`: version is a whole number from 1 on, got True"),
    **{
        f"retention {given!r}": (
            lambda given=given: a_source(retention=given),  # type: ignore[misc]
            "source `sales`: retention is a length of a day or more such as `365d`, or None for ever, got " + repr(given),
        )
        for given in ("23h", "0d", "1 year", "", 86_400_000, 1.5)
    },
    "field name": (lambda: a_source(fields={"Id": "string"}), f"source `sales`: field 'Id': {NAME}"),
    "field type": (
        lambda: a_source(fields={**FIELDS, "id": "strin"}),
        "source `sales`: field `id` has unknown type 'strin'; known: `bool`, `double`, `float32`, `float64`, `int16`, "
        "`int32`, `int64`, `int8`, `string`, `timestamp[ms, UTC]`, `uint16`, `uint32`, `uint64`, `uint8`; "
        "did you mean `string`?",
    ),
    "field type a list": (
        lambda: a_source(fields={**FIELDS, "id": ["string"]}),
        "source `sales`: field `id` has unknown type ['string']; known: `bool`, `double`, `float32`, `float64`, `int16`, "
        "`int32`, `int64`, `int8`, `string`, `timestamp[ms, UTC]`, `uint16`, `uint32`, `uint64`, `uint8`; "
        "did you mean `string`?",
    ),
    "default": (
        lambda: a_source(fields={**FIELDS, "user": Field("int64", default="none")}),
        "source `sales`: field `user` is `int64`, its default 'none' is not",
    ),
    "default too large": (
        lambda: a_source(fields={**FIELDS, "user": Field("int8", default=128)}),
        "source `sales`: field `user` is `int8`, its default 128 is not",
    ),
    "default not finite": (
        lambda: a_source(fields={**FIELDS, "price": Field("float64", default=float("inf"))}),
        "source `sales`: field `price` is `float64`, its default inf is not",
    ),
    "event time unknown": (
        lambda: a_source(event_time="att"),
        "source `sales`: event_time is 'att', which is not a field; known: `at`, `big`, `id`, `paid`, `price`, `user`; "
        "did you mean `at`?",
    ),
    "event time a list": (
        lambda: a_source(event_time=["at"]),
        "source `sales`: event_time is ['at'], which is not a field; known: `at`, `big`, `id`, `paid`, `price`, `user`",
    ),
    "event id a list": (
        lambda: a_source(event_id=["id"]),
        "source `sales`: event_id is ['id'], which is not a field; known: `at`, `big`, `id`, `paid`, `price`, `user`",
    ),
    "event time type": (
        lambda: a_source(event_time="user"),
        "source `sales`: event_time `user` is `int64`; allowed is timestamp[ms, UTC]",
    ),
    "event time optional": (
        lambda: a_source(fields={**FIELDS, "at": Field("timestamp[ms, UTC]", optional=True)}),
        "source `sales`: event_time `at` can be neither optional nor defaulted",
    ),
    "event id type": (
        lambda: a_source(event_id="price"),
        "source `sales`: event_id `price` is `float64`; allowed is string or int64",
    ),
    "event id defaulted": (
        lambda: a_source(fields={**FIELDS, "id": Field("string", default="x")}),
        "source `sales`: event_id `id` can be neither optional nor defaulted",
    ),
    # views
    "view name": (lambda: a_view(name="1st"), f"view '1st': {NAME}"),
    "view owner": (lambda: a_view(owner=""), 'view `spend`: no owner; say which team owns it with `owner="..."`'),
    "view source": (lambda: a_view(source="sales"), "view `spend`: source must be a Source, got 'sales'"),
    "key is text": (lambda: a_view(key="user"), "view `spend`: key must be a list of fields, got 'user'"),
    "no key": (lambda: a_view(key=[]), "view `spend`: key must be a list of fields, got []"),
    "key a number": (lambda: a_view(key=5), "view `spend`: key must be a list of fields, got 5"),
    "key a set": (lambda: a_view(key={"user"}), "view `spend`: key must be a list of fields, got {'user'}"),
    "key in a key": (
        lambda: a_view(key=[["user"]]),
        "view `spend`: key field ['user'] is not a field of source `sales`; "
        "known: `at`, `big`, `id`, `paid`, `price`, `user`; did you mean `user`?",
    ),
    "key as_of": (
        lambda: a_view(key=["as_of"], source=a_source(fields={**FIELDS, "as_of": "int64"})),
        "view `spend`: key field `as_of` has the name of the time that features are asked for; give the field another name",
    ),
    "key unknown": (
        lambda: a_view(key=["usr"]),
        "view `spend`: key field 'usr' is not a field of source `sales`; "
        "known: `at`, `big`, `id`, `paid`, `price`, `user`; did you mean `user`?",
    ),
    "key float": (
        lambda: a_view(key=["price"]),
        "view `spend`: key field `price` is `float64`; a key is of integers (up to int64) and strings",
    ),
    "key bool": (
        lambda: a_view(key=["user", "paid"]),
        "view `spend`: key field `paid` is `bool`; a key is of integers (up to int64) and strings",
    ),
    "key uint64": (
        lambda: a_view(key=["big"]),
        "view `spend`: key field `big` is `uint64`; a key is of integers (up to int64) and strings",
    ),
    "key twice": (
        lambda: a_view(key=["user", "user"]),
        "view `spend`: a key field is named twice in ['user', 'user']",
    ),
    "no features": (lambda: a_view(features={}), "view `spend`: no features"),
    "features a list": (
        lambda: a_view(features=["n"]),
        "view `spend`: features is a mapping of name to aggregation such as {\"orders\": Count()}, got ['n']",
    ),
    "feature name": (lambda: a_view(features={"N": Count()}), f"view `spend`: feature 'N': {NAME}"),
    "feature named as key": (
        lambda: a_view(features={"user": Count()}),
        "view `spend`: feature `user` has the name of a key field",
    ),
    "not an aggregation": (
        lambda: of("count"),
        "view `spend`: feature `f` must be an aggregation such as Count(), got 'count'",
    ),
    "aggregation class": (
        lambda: of(Count),
        "view `spend`: feature `f` must be an aggregation such as Count(), "
        "got <class 'millpond.feature_actors.aggregations.count.Count'>",
    ),
    "field of feature unknown": (
        lambda: of(Sum("prise")),
        "view `spend`: feature `f`: Sum of 'prise', which is not a field of source `sales`; "
        "known: `at`, `big`, `id`, `paid`, `price`, `user`; did you mean `price`?",
    ),
    "no such feature": (lambda: a_view()["m"], "view `spend`: no feature 'm'; known: `n`"),
    # aggregations
    "aggregation itself": (
        lambda: of(Aggregation("user")),
        f"Aggregation: the base of all; say which: {', '.join(sorted(kind.__name__ for kind in AGGREGATIONS))}",
    ),
    "sum of nothing": (lambda: of(Sum()), 'Sum: of which field? say Sum("amount")'),
    "sum of a list": (
        lambda: Sum(["price"]),
        "Sum: takes the name of a field such as Sum(\"amount\"), got ['price']",
    ),
    "count of a field": (lambda: Count("price"), "Count: looks at no field"),
    "since of a field": (lambda: SecondsSince("price"), "SecondsSince: looks at no field"),
    "window and ttl": (lambda: Count(window="1h", ttl="1d"), "Count: a feature has a window or a ttl, not both"),
    "where as text": (
        lambda: Count(where="price > 0"),
        "Count: where= takes a pyarrow.compute expression such as `pc.field('amount') > 0`, got 'price > 0'",
    ),
    "window no length": (
        lambda: Count(window="1 hour"),
        "Count window: expected a length such as `90s`, `30m`, `24h` or `7d`, got '1 hour'",
    ),
    "window a number": (
        lambda: Count(window=3600),
        "Count window: expected a length such as `90s`, `30m`, `24h` or `7d`, got 3600",
    ),
    "window too short": (
        lambda: Max("price", window="999ms"),
        "Max window: window `999ms` is shorter than 60 tiles of the finest width (10 ms); allowed is `1s` and longer",
    ),
    "window too long": (
        lambda: Max("price", window="3661d"),
        "Max window: window `3661d` is longer than `3660d`; leave `window` out for a lifetime feature, with a `ttl` "
        "if it should be forgotten",
    ),
    "ttl no length": (
        lambda: Last("price", ttl="-1d"),
        "Last ttl: expected a length such as `90s`, `30m`, `24h` or `7d`, got '-1d'",
    ),
    "rate of a field": (lambda: Rate("price", window="1h"), "Rate: looks at no field"),
    "rate without a window": (lambda: Rate(), 'Rate: needs a window; say Rate(window="1h")'),
    "rate with a ttl": (lambda: Rate(ttl="1d"), 'Rate: needs a window; say Rate(window="1h")'),
    "last n of nothing": (lambda: LastN(n=3), 'LastN: of which field? say LastN("amount")'),
    "last 0": (lambda: LastN("price", n=0), "LastN: n is a number from 1 to 64, got 0"),
    "last 65": (lambda: LastN("price", n=65), "LastN: n is a number from 1 to 64, got 65"),
    "last true": (lambda: LastN("price", n=True), "LastN: n is a number from 1 to 64, got True"),
    "last text": (lambda: LastN("price", n="3"), "LastN: n is a number from 1 to 64, got '3'"),
    "top k of nothing": (lambda: TopK(k=3), 'TopK: of which field? say TopK("amount")'),
    "top 0": (lambda: TopK("price", k=0), "TopK: k is a number from 1 to 256, got 0"),
    "top 257": (lambda: TopKCounts("price", k=257, m=300), "TopKCounts: k is a number from 1 to 256, got 257"),
    "top true": (lambda: TopK("price", k=True), "TopK: k is a number from 1 to 256, got True"),
    **{
        f"top of {m!r}": (
            lambda m=m: TopK("price", k=10, m=m),  # type: ignore[misc]
            f"TopK: m, how many values are counted at a time, is a number from k = 10 to 1024, got {m!r}",
        )
        for m in (9, 1_025, 32.0)
    },
    **{
        f"distinct of {m!r}": (
            lambda m=m: Distinct("id", m=m),  # type: ignore[misc]
            f"Distinct: m, up to how many values it is exact, is a power of two from 8 to 4096, got {m!r}",
        )
        for m in (4, 100, 8_192, 64.0, True)
    },
    "quantile of nothing": (lambda: Quantile(q=0.5), 'Quantile: of which field? say Quantile("amount")'),
    **{
        f"quantile {q!r}": (
            lambda q=q: Quantile("price", q),  # type: ignore[misc]
            f"Quantile: q is a share from 0 to 1 with six decimals at most, got {q!r}",
        )
        for q in (float("nan"), -0.1, 1.1, "0.5", True, 1 / 3)
    },
    "quantile of no share": (
        lambda: Quantile("price"),
        "Quantile: q is a share from 0 to 1 with six decimals at most, got nan",
    ),
    **{
        f"error {error!r}": (
            lambda error=error: Median("price", error),  # type: ignore[misc]
            "Median: error, of a value, is a number from 0.0001 to 0.25 with six decimals at most, " f"got {error!r}",
        )
        for error in (0, 0.00005, 0.3, 0.0100001, "1 %")
    },
    **{
        f"quantile of {m!r}": (
            lambda m=m: Quantile("price", 0.5, m=m),  # type: ignore[misc]
            f"Quantile: m, how many buckets are kept, is a number from 8 to 4096, got {m!r}",
        )
        for m in (7, 4_097, 128.0, True)
    },
    "exact without a window": (
        lambda: Sum("price", exact=True),
        "Sum: exact=True is about the edge of a window; say which window, or leave it out",
    ),
    "exact with a ttl": (
        lambda: Sum("price", ttl="1d", exact=True),
        "Sum: exact=True is about the edge of a window; say which window, or leave it out",
    ),
    "exact a number": (lambda: Count(window="1h", exact=1), "Count: exact is True or False, got 1"),
    # categories
    "categories a text": (
        lambda: CountBy("user", categories="food"),
        'CountBy: categories are a list of the values to tell apart such as CountBy("user", '
        "categories=[\"food\", \"travel\"]), got 'food'",
    ),
    "a category twice": (
        lambda: CountBy("user", categories=["a", "b", "a"]),
        "CountBy: a category is named twice in ['a', 'b', 'a']",
    ),
    "a category a float": (
        lambda: CountBy("user", categories=[1.5]),
        "CountBy: a category is a string or an integer, got 1.5",
    ),
    "a category that is half a character": (
        lambda: Entropy("id", categories=["\ud800"]),
        "Entropy: category '\\ud800' is no text that an event can have: it is not UTF-8",
    ),
    "too many categories": (
        lambda: CountBy("user", categories=list(range(257))),
        "CountBy: 257 categories; allowed are 256",
    ),
    "a category of another type": (
        lambda: of(CountBy("id", categories=["a", 1])),
        "view `spend`: feature `f`: CountBy: category 1 is no value of field `id`, which is `string`",
    ),
    "sum by nothing": (
        lambda: SumBy("price", categories=["a"]),
        "SumBy: by is the field of the categories, such as by=\"kind\", got ''",
    ),
    "sum by an unknown field": (
        lambda: of(SumBy("price", by="kind", categories=["a"])),
        "view `spend`: feature `f`: SumBy of 'kind', which is not a field of source `sales`; known: `at`, `big`, `id`, `paid`, `price`, `user`; did you mean `id`?",
    ),
    "entropy of no categories": (
        lambda: Entropy("user"),
        'Entropy: categories are a list of the values to tell apart such as Entropy("user", '
        'categories=["food", "travel"]), got ()',
    ),
    # decays
    **{
        f"{kind.__name__} by {half_life!r}": (
            lambda kind=kind, field=field, half_life=half_life: kind(field, half_life=half_life),  # type: ignore[misc]
            f'{kind.__name__}: half_life, in which the past comes to count half, is a length from "1s" to "3660d" such as half_life="7d", got {half_life!r}',
        )
        for kind, field in ((DecayedSum, "price"), (DecayedCount, None), (DecayedMean, "price"))
        for half_life in ("", 7, "7", "999ms", "3661d")
    },
    "decayed sum of nothing": (
        lambda: DecayedSum(half_life="7d"),
        'DecayedSum: of which field? say DecayedSum("amount")',
    ),
    "decayed count of a field": (
        lambda: DecayedCount("price", half_life="7d"),
        "DecayedCount: looks at no field",
    ),
    "trend of strings": (
        lambda: of(Trend("id")),
        "view `spend`: feature `f`: Trend takes a number, `id` is `string`",
    ),
    # streaks and sessions
    "streak of a field": (lambda: Streak("price"), "Streak: looks at no field"),
    **{
        f"streak of {given!r}": (
            lambda given=given: Streak(of=given),  # type: ignore[misc]
            "Streak: of=, what the events of a streak satisfy, is a pyarrow.compute expression such as "
            f"`pc.field('amount') > 100`, got {given!r}",
        )
        for given in (None, "price > 100", True)
    },
    "streak of what does not fit": (
        lambda: of(Streak(of=pc.field("prise") > 9)),
        "view `spend`: feature `f`: of= `(prise > 9)` does not fit source `sales`: "
        "No match for FieldRef.Name(prise) in id: string not null",
    ),
    **{
        f"streak up to {n!r}": (
            lambda n=n: Streak(of=pc.field("paid"), n=n),  # type: ignore[misc]
            f"Streak: n, the longest streak that is told, is a number from 1 to 256, got {n!r}",
        )
        for n in (0, 257, True, 3.0)
    },
    "streak of days of a field": (lambda: StreakDays("price"), "StreakDays: looks at no field"),
    **{
        f"streak of {n!r} days": (
            lambda n=n: StreakDays(n=n),  # type: ignore[misc]
            f"StreakDays: n, the longest streak that is told, is a number of days from 1 to 3660, got {n!r}",
        )
        for n in (0, 3_661, "365d")
    },
    "sessions of a field": (lambda: Sessions("price"), "Sessions: looks at no field"),
    **{
        f"sessions apart by {gap!r}": (
            lambda gap=gap: SessionSeconds(gap=gap),  # type: ignore[misc]
            "SessionSeconds: gap, after how long without an event a session has ended, is a length such as `30m`, from "
            f"`1ms` to `3660d`, got {gap!r}",
        )
        for gap in ("half an hour", "0s", "3661d", 1_800, None)
    },
    **{
        f"{n!r} sessions": (
            lambda n=n: Sessions(n=n),  # type: ignore[misc]
            f"Sessions: n, how many sessions can be mended by late events, is a number from 1 to 64, got {n!r}",
        )
        for n in (0, 65, True)
    },
    # derived features
    "derived by no function": (
        lambda: Derived("n", "m"),
        "Derived: takes a function of arrays and names of features, got 'n'",
    ),
    "derived of nothing": (
        lambda: Derived(abs),
        'Derived: of which features? say Derived(np.log1p, "orders_30d"), got ()',
    ),
    "derived of a number": (
        lambda: Derived(abs, 3),
        'Derived: of which features? say Derived(np.log1p, "orders_30d"), got (3,)',
    ),
    "derived of an unknown feature": (
        lambda: a_view(features={"orders": Count(), "f": Derived(abs, "order")}),
        "view `spend`: feature `f`: Derived of 'order', which is not a feature that stands before it; known: `orders`; "
        "did you mean `orders`?",
    ),
    "derived of a later feature": (
        lambda: a_view(features={"f": Ratio("n", "m"), "n": Count(), "m": Count(window="1h")}),
        "view `spend`: feature `f`: Ratio of 'n', which is not a feature that stands before it; known: none",
    ),
    "derived of itself": (
        lambda: a_view(features={"n": Count(), "f": Ratio("n", "f")}),
        "view `spend`: feature `f`: Ratio of 'f', which is not a feature that stands before it; known: `n`",
    ),
    "derived of strings": (
        lambda: a_view(features={"who": Last("id"), "f": Derived(abs, "who")}),
        "view `spend`: feature `f`: Derived takes numbers, `who` is of strings",
    ),
    "view where as text": (
        lambda: a_view(where="paid"),
        "view `spend`: where= takes a pyarrow.compute expression, got 'paid'",
    ),
    # layouts
    "two sources of one name": (
        lambda: compile_layout([a_source(), a_source(version=2)], []),
        "two different sources are named `sales`",
    ),
    "two views of one name": (
        lambda: compile_layout([], [a_view(), a_view(features={"m": Count()})]),
        "two different views are named `spend`; files that share a view declare it word for word",
    ),
    "two key types": (
        lambda: compile_layout(
            [],
            [a_view(), a_view(name="other", source=a_source(name="logins", fields={**FIELDS, "user": "string"}))],
        ),
        "key field `user` is string in view `other` and int64 in view `spend`; a key field has one type in a cluster",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_this_message(case: str) -> None:
    declare, message = REFUSED[case]
    with pytest.raises(DeclarationError) as caught:
        declare()
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", [Sum, Mean, Std, Min, Max, Median, First, Last, LastN, TopK, TopKCounts, Distinct])
@pytest.mark.parametrize("field", ["id", "at"])
def test_an_aggregation_of_a_field_takes_a_number_and_some_a_string(kind: Any, field: str) -> None:
    of(kind("price")), of(kind("big")), of(kind("paid"))
    takes = "a number or a string" if kind in (First, Last, LastN, TopK, TopKCounts, Distinct) else "a number"
    if takes.endswith(FIELDS[field]):
        assert of(kind(field))["f"].is_text == (kind not in (TopKCounts, Distinct))
        return
    with pytest.raises(DeclarationError) as caught:
        of(kind(field))
    declared = FIELDS[field]
    assert str(caught.value) == f"view `spend`: feature `f`: {kind.__name__} takes {takes}, `{field}` is `{declared}`"


@pytest.mark.parametrize(
    ("where", "why"),
    [
        (pc.field("prise") > 0, "No match for FieldRef.Name(prise)"),
        (pc.field("id") > 0, "Function 'greater' has no kernel matching input types (string, int"),
        (pc.field("price") + 1, "the expression gives double, not bool"),
        (pc.field(2) > 0, "Serialization of non-name field_refs"),
    ],
)
def test_a_where_that_does_not_fit_its_source_is_refused(where: Any, why: str) -> None:
    for declare in (lambda: a_view(where=where), lambda: of(Count(where=where))):
        with pytest.raises(DeclarationError, match="view `spend`") as caught:
            declare()
        assert f"where= `{where}` does not fit source `sales`: " in str(caught.value)
        assert why in str(caught.value)


def test_unknown_names_of_a_layout_are_answered_with_the_nearest() -> None:
    layout = compile_layout([], [a_view()])
    with pytest.raises(NotFound, match="^no source `sale`; known: `sales`; did you mean `sales`\\?$"):
        layout.source("sale")
    with pytest.raises(NotFound, match="^no view `spent`; known: `spend`; did you mean `spend`\\?$"):
        layout.view("spent")


# -- identity


def id_of(feature: Any, **changes: Any) -> str:
    return a_view(features={"f": feature}, **changes)["f"].id


def test_a_feature_is_the_content_of_its_definition_whatever_it_is_called() -> None:
    one = a_view(features={"f": Sum("price", window="24h")})["f"]
    other = a_view(name="other", owner="others", about="x", features={"g": Sum("price", window="1d")})["g"]
    assert one.id == other.id
    assert one.full_name == "spend.f"
    layout = compile_layout([], [one.view, other.view])
    assert len(layout.tables) == len(layout.tables[0].series) == len(layout.tables[0].series[0].columns) == 1


def test_any_change_of_a_definition_makes_another_feature() -> None:
    some = [str(n) for n in range(30)]
    ids = {
        "sum": id_of(Sum("price", window="1d")),
        "window": id_of(Sum("price", window="2d")),
        "lifetime": id_of(Sum("price")),
        "ttl": id_of(Sum("price", ttl="1d")),
        "aggregation": id_of(Mean("price", window="1d")),
        "field": id_of(Sum("big", window="1d")),
        "where": id_of(Sum("price", window="1d", where=pc.field("paid"))),
        "source version": id_of(Sum("price", window="1d"), source=a_source(version=2)),
        "source": id_of(Sum("price", window="1d"), source=a_source(name="sales2")),
        "key": id_of(Sum("price", window="1d"), key=["id"]),
        "order of the key": id_of(Sum("price", window="1d"), key=["user", "id"]),
        "order of the key 2": id_of(Sum("price", window="1d"), key=["id", "user"]),
        # Texts of these are alike: integers divide as integers, and the middle of a long list is elided.
        "int": id_of(Count(where=pc.field("user") / 2 > 1)),
        "float": id_of(Count(where=pc.field("user") / 2.0 > 1)),
        "list": id_of(Count(where=pc.field("id").isin(some))),
        "another list": id_of(Count(where=pc.field("id").isin([*some[:15], "fifteen", *some[16:]]))),
        "precision": id_of(Count(where=pc.field("price") > 0.1)),
        "precision 2": id_of(Count(where=pc.field("price") > 0.1 + 2**-54)),
        "exact": id_of(Sum("price", window="1d", exact=True)),
        "n": id_of(LastN("price", window="1d")),
        "another n": id_of(LastN("price", window="1d", n=6)),
        "top": id_of(TopK("price", window="1d")),
        "its counts": id_of(TopKCounts("price", window="1d")),
        "another k": id_of(TopK("price", window="1d", k=6)),
        "another m": id_of(TopK("price", window="1d", m=33)),
        "streak": id_of(Streak(of=pc.field("user") / 2 > 1)),
        "streak of another": id_of(Streak(of=pc.field("user") / 2.0 > 1)),
        "shorter streak": id_of(Streak(of=pc.field("user") / 2 > 1, n=31)),
        "days": id_of(StreakDays()),
        "fewer days": id_of(StreakDays(n=365)),
        "sessions": id_of(Sessions()),
        "of another gap": id_of(Sessions(gap="31m")),
        "of another n": id_of(Sessions(n=7)),
        "their length": id_of(SessionSeconds()),
        "by category": id_of(CountBy("user", categories=[1, 2])),
        "in another order": id_of(CountBy("user", categories=[2, 1])),
        "one more": id_of(CountBy("user", categories=[1, 2, 3])),
        "of strings": id_of(CountBy("id", categories=["1", "2"])),
        "their entropy": id_of(Entropy("user", categories=[1, 2])),
        "sum by": id_of(SumBy("price", by="user", categories=[1, 2])),
        "sum by another": id_of(SumBy("price", by="id", categories=["1", "2"])),
        "decayed": id_of(DecayedSum("price", half_life="1d")),
        "decayed by another": id_of(DecayedSum("price", half_life="2d")),
        "decayed mean": id_of(DecayedMean("price", half_life="1d")),
        "decayed count": id_of(DecayedCount(half_life="1d")),
        "distinct": id_of(Distinct("price", window="1d")),
        "another m of distinct": id_of(Distinct("price", window="1d", m=64)),
        "quantile": id_of(Quantile("price", 0.5, window="1d")),
        "median": id_of(Median("price", window="1d")),
        "another q": id_of(Quantile("price", 0.25, window="1d")),
        "another error": id_of(Quantile("price", 0.5, 0.02, window="1d")),
        "another m of a quantile": id_of(Quantile("price", 0.5, m=64, window="1d")),
    }
    assert len(set(ids.values())) == len(ids), sorted(ids.items(), key=lambda item: item[1])


def test_a_derived_feature_is_its_function_and_what_it_is_of() -> None:
    def derived(made: Any, window: str = "1d") -> str:
        return a_view(features={"n": Count(window=window), "m": Sum("price", window=window), "f": made})["f"].id

    halves = [derived(Derived(lambda n, by=by: n / by, "n")) for by in (2, 2, 2.5)]
    assert halves[0] == halves[1], "the same function, written twice"
    ids = [
        *halves[1:],
        derived(Derived(lambda n: n / 2, "n")),
        derived(Derived(lambda n: n / 3, "n")),
        derived(Derived(lambda n: n / 2, "m")),
        derived(Derived(lambda n: n / 2, "n"), window="2d"),
        derived(Derived(np.log1p, "n")),
        derived(Derived(np.log, "n")),
        derived(Ratio("n", "m")),
        derived(Ratio("m", "n")),
    ]
    assert len(set(ids)) == len(ids)


def test_a_condition_of_the_view_and_of_the_feature_are_one() -> None:
    paid, dear = pc.field("paid"), pc.field("price") > 9
    assert id_of(Count(), where=paid) == id_of(Count(where=paid))
    assert id_of(Count(where=dear), where=paid) == id_of(Count(), where=paid & dear)


def test_a_gap_is_its_length_however_it_is_written() -> None:
    assert id_of(Sessions(gap="1h")) == id_of(Sessions(gap="60m"))


def test_a_feature_reads_the_fields_of_its_condition() -> None:
    """So that they are taken along when the past is read, and known to be gone when they are forgotten."""
    view = of(Streak(of=pc.field("price") > 9, where=pc.field("paid")))
    assert view["f"].reads == compile_layout([], [view]).tables[0].reads == {"price", "paid"}


def test_what_streaks_and_sessions_have_in_common_is_kept_once() -> None:
    for one, other, more in (
        (StreakDays(n=30), StreakDays(n=63), StreakDays(n=64)),
        (Sessions(), SessionSeconds(), SessionSeconds(gap="1h")),
        (Streak(of=pc.field("paid")), Streak(of=pc.field("paid")), Streak(of=~pc.field("paid"))),
    ):
        layout = compile_layout([], [a_view(features={"a": one, "b": other, "c": more})])
        assert len(layout.tables[0].series[0].columns) == 2


def test_identities_are_these_for_ever() -> None:
    """If this fails, every model's pinned features are lost."""
    assert id_of(Sum("price", window="1d", where=pc.field("price") > 9)) == "ca929ae68258e37a"
    assert id_of(Count()) == "7f7dda48e94dac36"
    assert id_of(LastN("price", window="1d", n=3, exact=True)) == "28d42b555c0c3b48"


def test_views_of_one_feature_but_other_conditions_are_read_from_one_layout() -> None:
    paid, dear = pc.field("paid"), pc.field("price") > 9
    one, other = (
        a_view(where=paid, features={"n": Count(where=dear)}),
        a_view(name="other", where=paid & dear),
    )
    for views in ([one, other], [other, one]):
        layout = compile_layout([], views)
        plan = ReadPlan(layout, [f for v in views for f in v], "test")
        assert len(plan.features) == 2
        assert [str(w) for w in layout.tables[0].wheres[1:]] == [str(paid & dear), str(paid)]


def test_a_layout_does_not_depend_on_the_order_of_declaration() -> None:
    views = [
        a_view(
            name=f"view{i}",
            key=key,
            where=where,
            features={"a": Sum("price", window=w), "b": Last("price"), "c": Count()},
        )
        for i, (key, where, w) in enumerate(
            [
                (["user"], None, "1h"),
                (["user"], pc.field("paid"), "1d"),
                (["id"], None, "7d"),
                (["user"], None, "2d"),
            ]
        )
    ]
    one, other = compile_layout([], views), compile_layout([], views[::-1])
    for table, same in zip(one.tables, other.tables, strict=True):
        assert (table.name, table.series, table.inputs) == (same.name, same.series, same.inputs)
        assert table.series_program.tolist() == same.series_program.tolist()
        assert table.column_program.tolist() == same.column_program.tolist()
        assert [str(w) for w in table.wheres] == [str(w) for w in same.wheres]


# -- windows

WINDOWS_MS = st.one_of(
    st.integers(1_000, 3_660 * 86_400_000),
    st.builds(
        lambda w, n, d: min(max(1_000, w * n + d), 3_660 * 86_400_000),
        st.sampled_from(LADDER_MS),
        st.sampled_from([60, 61, 300]),
        st.integers(-1, 1),
    ),
)


def test_each_width_of_the_ladder_is_a_multiple_of_the_next_finer() -> None:
    for finer, wider in itertools.pairwise(LADDER_MS):
        assert wider > finer
        assert wider % finer == 0


@given(WINDOWS_MS)
def test_a_tile_is_the_widest_of_the_ladder_that_is_a_sixtieth_of_its_window(window_ms: int) -> None:
    width = tile_width_ms(window_ms)
    assert width in LADDER_MS
    assert width * TILES_PER_WINDOW_MIN <= window_ms
    assert all(other <= width for other in LADDER_MS if other * TILES_PER_WINDOW_MIN <= window_ms)
    assert window_ms / width < 512 - 1, "more tiles than a read looks at"


def test_lengths() -> None:
    read = {
        "1s": 1_000,
        "1500ms": 1_500,
        "90s": 90_000,
        "2m": 120_000,
        "24h": 86_400_000,
        "1d": 86_400_000,
        "1w": 604_800_000,
    }
    assert {text: parse_window_ms(text, subject="test") for text in read} == read


# -- what has no place in the kernels, or no identity


def test_an_aggregation_outside_of_the_folder_is_refused() -> None:
    with pytest.raises(DeclarationError, match="^Clicks: an aggregation is a file of feature_actors/aggregations"):
        type("Clicks", (Count,), {"__module__": "users.own.file"})


FACTOR = 3
TABLE = np.arange(4)


def times(factor: float) -> Any:
    return lambda x: x * factor


def test_the_identity_of_a_derived_feature_is_of_its_code_and_of_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(function: Any) -> Any:
        return Derived(function, "n").identity()["function"]

    def scaled(x: Any) -> Any:
        return x * FACTOR + TABLE[1] + (0 if FACTOR in {1, 2} else 1)

    first = identity(scaled)
    assert identity(scaled) == first
    assert identity(times(2)) == identity(times(2)) != identity(times(3))
    monkeypatch.setitem(globals(), "FACTOR", 4)
    second = identity(scaled)
    monkeypatch.setitem(globals(), "TABLE", TABLE + 1)
    assert len({first, second, identity(scaled)}) == 3


def test_the_identity_of_a_derived_feature_is_the_same_in_every_process() -> None:
    code = """
import numpy as np
from millpond.feature_actors import Derived
print(Derived(lambda x: np.where(x > 2, [v in {"a", "b", "c", "d"} for v in "ab"][0], x), "n").identity()["function"])
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1


def test_a_function_without_an_identity_is_refused() -> None:
    for function in (functools.partial(np.add, 1), np.vectorize(abs)):
        with pytest.raises(DeclarationError, match="takes a NumPy function or a plain function"):
            Derived(function, "n")
    of_an_object = object()
    with pytest.raises(DeclarationError, match="the function uses a object"):
        Derived(lambda x: x + hash(of_an_object), "n")


def test_a_long_chain_of_derived_features_is_compiled_at_once() -> None:
    features: dict[str, Any] = {"f0": Count(window="1h")}
    for k in range(40):
        features[f"f{k + 1}"] = Ratio(f"f{k}", f"f{k}")
    chain = FeatureView("chain", owner="tests", source=a_source(), key=["user"], features=features)
    assert len({f.id for f in chain}) == 41
    assert len(ReadPlan(compile_layout([], [chain]), list(chain), "the test").names) == 41
