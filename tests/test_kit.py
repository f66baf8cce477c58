"""The test kit answers what a cluster answers, and its parity check finds what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from apps import (
    DEFINITION,
    NOW,
    VIEWS,
    Reply,
    Returns,
    arrow,
    churn,
    logins,
    make_world,
    model,
    offer,
    purchase,
    purchases,
    taste,
    user_book,
    user_spend,
)
from hypothesis import given
from hypothesis import strategies as st

from millpond.feature_actors import Count, Derived, FeatureView, Source
from millpond.feature_actors.clock import ManualClock
from millpond.feature_actors.errors import AsOfInPast, BadRequest, DeclarationError, MillpondError, NotFound
from millpond.feature_actors.judge import Judge
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.testing import Ack, TestCluster, assert_parity
from millpond.models.definition import Definition
from millpond.models.model import PredictionFailed

HOUR, DAY = 3_600_000, 86_400_000


def moment(ms: int) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms)


def error_of(call: Any) -> tuple[str, str, str | None]:
    with pytest.raises(MillpondError) as caught:
        call()
    return caught.value.code, caught.value.message, caught.value.path


# -- the same as over HTTP

PURCHASES = st.lists(
    st.builds(
        purchase,
        st.integers(0, 30).map(str),
        st.sampled_from([1, 2, 2, -7, "3"]),
        st.sampled_from([0.1, 3, -5.5, 1e300]),
        st.sampled_from([NOW, NOW - 1, NOW - HOUR - 1, NOW - 31 * DAY, NOW - 200 * DAY, NOW + 599_999]),
        book_id=st.sampled_from(["a", "ü", None]),
        gift=st.sampled_from([True, None]),
    ),
    max_size=12,
)
WRONG: list[Any] = [
    purchase("x", 1, float("nan")), purchase("x", 1.5), purchase("x", paid_at="2023-11-14"), {"order_id": "x"},
    purchase("x", paid_at=NOW + 600_001), purchase("x", paid_at=NOW // 1_000), {**purchase("x"), "colour": "red"},
    purchase("x", book_id=4), "x",
]  # fmt: skip


@given(sent=st.lists(PURCHASES, max_size=3), wrong=st.sampled_from(WRONG), shards=st.integers(1, 3))
def test_it_answers_and_refuses_as_both_apps_do(sent: list[list[dict[str, Any]]], wrong: Any, shards: int) -> None:
    models, layout = [churn, offer, model("likes", list(taste))], compile_layout([logins], [*VIEWS, taste])
    world = make_world(models, clock=ManualClock(NOW), layout=layout)
    with TestCluster([logins, *VIEWS, taste], models, shards=shards).at(NOW) as c:
        for events in [*sent, [*(sent[0] if sent else []), wrong]]:
            over_http = world.post_events("purchases", events)
            assert outcome(lambda events=events: c.send(purchases, events)) == told(over_http)
        ids: list[Any] = [{"user_id": user} for user in (1, 2, "3", -7, 99)]
        for name in ("churn", "likes"):
            over_http = world.post_score(f"{name}?features=true", ids)
            assert outcome(lambda name=name: c.score(name, ids, features=True)) == told(over_http)
        for key in ({"user_id": 2, "book_id": "a"}, {"user_id": 1.5}, {"user": 1}, {"user_id": 1, "sold_7d": 2.0}):
            over_http = world.post_score("offer", key)
            assert outcome(lambda key=key: c.score(offer, **key)) == told(over_http)
        for view, key in ((user_spend, {"user_id": 2}), (user_book, {"user_id": 2, "book_id": "ü"})):
            query = "&".join(f"{k}={v}" for k, v in key.items())
            over_http = world.get(f"/v1/features/{view.name}?{query}&as_of={NOW + DAY}")
            assert outcome(lambda view=view, key=key: c.features(view, as_of=NOW + DAY, **key)) == told(over_http)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call of the kit gives, as the cluster would write it: an answer or an error."""
    try:
        found = call()
    except MillpondError as error:
        return {"error": error.as_json()["error"]}
    return [as_told(one) for one in found] if isinstance(found, list) else as_told(found)


def as_told(found: Any) -> dict[str, Any]:
    if isinstance(found, PredictionFailed):
        return {"error": {**found.as_json()["error"], "status": found.status}}
    answer = {k: v for k, v in vars(found).items() if k != "id" and not (k == "features" and v is None)}
    if "as_of" in answer:
        answer["as_of"] = answer["as_of"].strftime("%Y-%m-%dT%H:%M:%S.") + f"{found.as_of.microsecond // 1000:03}Z"
    return answer


def told(reply: Reply) -> Any:
    if reply.status != 200:
        return {"error": reply.error}
    answers = reply.json if isinstance(reply.json, list) else [reply.json]
    without_ids = [{k: v for k, v in one.items() if k != "id"} for one in answers]
    return without_ids if isinstance(reply.json, list) else without_ids[0]


# -- events


def test_events_are_sent_in_any_form_and_count_the_same() -> None:
    rows = [purchase(f"o{n}", n % 2, float(n), NOW + n, book_id="b", gift=None) for n in range(4)]
    table = pa.Table.from_pylist(rows, purchases.schema)
    times = [{**row, "paid_at": moment(row["paid_at"])} for row in rows]
    numbers = [{**row, "user_id": np.int64(row["user_id"]), "price": np.float32(row["price"])} for row in rows]
    texts = [{**row, "user_id": str(row["user_id"]), "paid_at": moment(row["paid_at"]).isoformat()} for row in rows]
    answers = []
    for events in (rows, iter(rows), table, table.to_batches()[0], pa.concat_tables([table[:1], table[1:]]), times,
                   numbers, texts):  # fmt: skip
        with TestCluster(VIEWS) as c:
            assert c.send("purchases", events) == Ack(accepted=4)
            answers.append((c.features(user_spend, user_id=1), c.features("book_sales", book_id="b"), c.now))
    assert answers == [answers[0]] * len(answers)
    assert answers[0][0].features["last_price"] == 3.0


def test_one_event_is_sent_as_it_is_and_none_is_none() -> None:
    with TestCluster(user_spend) as c:
        assert c.send(purchases, []) == Ack()
        assert c.now is None
        assert c.send(purchases, purchase("a")) == Ack(accepted=1)
        assert c.send(purchases, purchase("a")) == Ack(duplicates=1)
        assert c.send(purchases, purchase("a", price=3.0)) == Ack(conflicts=1)


def test_a_table_with_a_column_that_is_no_field_is_refused_as_over_http() -> None:
    table = pa.Table.from_pylist([{**purchase("a"), "colour": "red"}])
    with TestCluster(user_spend) as c:
        code, message, path = error_of(lambda: c.send(purchases, table))
    error = make_world().post_events("purchases", arrow(purchases, table.to_pylist(), table.schema),
                                     "application/vnd.apache.arrow.stream").error  # fmt: skip
    assert (code, message, path) == (error["code"], error["message"], error["path"])


def test_what_cannot_be_sent_is_told_and_changes_nothing() -> None:
    other = Source("purchases", owner="checkout", fields={"at": "timestamp[ms, UTC]"}, event_time="at")
    with TestCluster(user_spend) as c:
        c.send(purchases, purchase("a"))
        with pytest.raises(NotFound, match="no source `purchase`; known: `purchases`; did you mean `purchases`"):
            c.send("purchase", [])
        with pytest.raises(DeclarationError, match="source `purchases`: this is not the one"):
            c.send(other, [])
        with pytest.raises(BadRequest, match=r"cannot be written as JSON: a value of type `object`"):
            c.send(purchases, [purchase("b", user_id=object())])
        with pytest.raises(BadRequest, match="`arrival` is now or event, got 'later'"):
            c.send(purchases, [], arrival="later")  # type: ignore[arg-type]
        with pytest.raises(BadRequest, match="expected `float64`, got `null`"):
            c.send(purchases, [purchase("b", paid_at=NOW + DAY), purchase("c", price=None)])
        assert (c.now, c.features(user_spend, user_id=1).features["orders_30d"]) == (moment(NOW), 1)


# -- time


def test_time_stands_at_the_newest_event_until_it_is_set() -> None:
    with TestCluster(user_spend) as c:
        assert c.now is None
        assert c.features(user_spend, user_id=1).as_of is None
        c.send(purchases, purchase("a", paid_at=NOW - 40 * DAY))
        c.send(purchases, purchase("b"))
        c.send(purchases, purchase("c", paid_at=NOW - DAY))
        assert c.now == moment(NOW) == c.features(user_spend, user_id=1).as_of
        assert c.features(user_spend, user_id=1).features["orders_30d"] == 2
        c.at(NOW + 30 * DAY - HOUR)
        assert c.features(user_spend, user_id=1).features["orders_30d"] == 1
        c.at(NOW + 40 * DAY)
        found = c.features(user_spend, user_id=1)
        assert found.features == {"orders_30d": 0, "spend_30d": 0, "last_price": 10, "recency_s": 40 * DAY / 1000}
        assert found.as_of == moment(NOW + 40 * DAY)


def test_events_arrive_at_the_time_that_was_set() -> None:
    with TestCluster(user_spend).at(NOW) as c:
        late, too_late = purchase("a", paid_at=NOW - HOUR - 1), purchase("b", paid_at=NOW - 99 * DAY)
        assert c.send(purchases, [late, too_late]) == Ack(accepted=2, late=2)
        assert c.send(purchases, purchase("c", paid_at=NOW - 99 * DAY), arrival="event") == Ack(accepted=1)
        assert error_of(lambda: c.send(purchases, purchase("d", paid_at=NOW + DAY)))[0] == "event_ahead"
        assert c.now == moment(NOW)


@pytest.mark.parametrize("time", ["2023-11-14T22:13:20Z", "2023-11-14T23:13:20+01:00", moment(NOW), NOW])
def test_a_time_is_text_a_datetime_or_milliseconds(time: Any) -> None:
    with TestCluster(user_spend) as c:
        assert c.at(time).now == moment(NOW)
        assert c.features(user_spend, user_id=1, as_of=time).as_of == moment(NOW)


@pytest.mark.parametrize("time", ["2023-11-14", "soon", datetime(2023, 11, 14), -1, 1.5, True, None])
def test_what_is_no_time_is_refused(time: Any) -> None:
    with TestCluster(user_spend) as c, pytest.raises(BadRequest, match=r"clock: a time of 1970 to 2200 is ISO 8601"):
        c.at(time)


def test_time_does_not_run_back() -> None:
    with TestCluster(user_spend, churn) as c:
        c.send(purchases, purchase("a"))
        with pytest.raises(BadRequest, match=r"clock: got 2023-11-14T22:13:19.999.*but it is 2023-11-14T22:13:20"):
            c.at(NOW - 1)
        with pytest.raises(AsOfInPast):
            c.score("churn", user_id=1, as_of=NOW - 1)
        assert c.score("churn", user_id=1, as_of=NOW + 1).as_of == moment(NOW + 1)


# -- models


def test_what_predict_raises_is_the_cause_of_the_error_of_the_cluster() -> None:
    with TestCluster(models=model("fails", list(user_spend), lambda: Returns(ValueError("no")))) as c:
        with pytest.raises(PredictionFailed, match="predict raised ValueError") as caught:
            c.score("fails", user_id=1)
        assert repr(caught.value.__cause__) == "ValueError('no')"


@pytest.mark.parametrize("result", [float("nan"), {1: 2}, object()])
def test_a_result_is_checked_as_in_serving(result: Any) -> None:
    c = TestCluster(models=model("m", list(user_spend), lambda: Returns(result)))
    with pytest.raises(PredictionFailed, match="which JSON cannot hold"):
        c.score("m", user_id=1)


def test_a_result_is_what_a_caller_has_of_it() -> None:
    given = {"a": (1, np.float32(0.5)), "b": None}
    with TestCluster(models=model("m", list(user_spend), lambda: Returns(given))) as c:
        assert c.score("m", {"user_id": np.int64(1)}).result == {"a": [1, 0.5], "b": None}
        assert c.score("m", []) == []


def test_a_model_or_view_that_is_not_there_is_told_with_its_neighbour() -> None:
    with TestCluster(user_spend, [churn]) as c:
        with pytest.raises(NotFound, match="no model `chum`; known: `churn`; did you mean `churn`"):
            c.score("chum", user_id=1)
        with pytest.raises(NotFound, match="no view `user_spent`"):
            c.features("user_spent", user_id=1)
        with pytest.raises(BadRequest, match="an id comes as a mapping or as its fields, not as both"):
            c.score("churn", {"user_id": 1}, user_id=1)
        with pytest.raises(BadRequest, match="an id is a mapping of key fields, got 1"):
            c.score("churn", [1])  # type: ignore[list-item]


def test_a_model_or_view_of_the_same_name_that_is_declared_otherwise_is_refused() -> None:
    other = FeatureView("user_spend", owner="x", source=purchases, key=["user_id"], features={"n": Count(window="1d")})
    with TestCluster(VIEWS, [churn]) as c:
        assert c.features(user_spend, user_id=1).unknown
        with pytest.raises(DeclarationError, match="view `user_spend`: this is not the one of the cluster"):
            c.features(other, user_id=1)
        with pytest.raises(DeclarationError, match="model `churn`: this is not the one of the cluster"):
            c.score(replace(churn, features=churn.features[1:]), user_id=1)


def test_what_is_no_declaration_is_refused() -> None:
    with pytest.raises(DeclarationError, match="expected `FeatureView` or `Source`, got"):
        TestCluster([churn])  # type: ignore[list-item]
    with pytest.raises(DeclarationError, match="expected `Model`, got"):
        TestCluster(user_spend, [user_spend])  # type: ignore[list-item]
    with pytest.raises(DeclarationError, match="two models are named `churn`"):
        TestCluster(user_spend, [churn, model("churn", list(user_spend))])


WITH_WEIGHTS = DEFINITION.replace('version="3", ', "", 1).replace("artifacts={}", 'artifacts={"weights": "w.npy"}')


def test_definition_files_are_taken_as_a_start_takes_them(tmp_path: Path) -> None:
    (tmp_path / "defs.py").write_text(WITH_WEIGHTS)
    (tmp_path / "more.py").write_text(DEFINITION.split("class Total")[0] + "views = [user_spend]\n")
    with TestCluster.of_file(tmp_path / "defs.py", str(tmp_path / "more.py")) as c:
        c.send("purchases", purchase("a"))
        assert c.score("offer", user_id=1, book_id="b").version == "3"
        with pytest.raises(
            DeclarationError, match=r"artifact `weights` is `w.npy`, which does not lie beside `defs.py`"
        ):
            c.score("churn", user_id=1)
    for folder in (tmp_path, tmp_path / "trained"):
        folder.mkdir(exist_ok=True)
        np.save(folder / "w.npy", np.array([2.0]))
        with TestCluster.of_file(tmp_path / "defs.py", artifacts=folder) as c:
            c.send("purchases", purchase("a"))
            score = c.score("churn", user_id=1)
            assert score.result == 2.0 * (1 + 10 + 10)
            assert score.version == Definition.read(tmp_path / "defs.py", folder).digest[:12]


def test_artifacts_of_models_that_are_given_lie_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "defs.py").write_text(WITH_WEIGHTS)
    (weighted, _) = Definition.read(tmp_path / "defs.py").declared().models
    with TestCluster(models=weighted) as c, pytest.raises(DeclarationError, match="say where: `TestCluster"):
        c.score("churn", user_id=1)
    c = TestCluster(models=weighted, artifacts=tmp_path)
    with pytest.raises(DeclarationError, match=r"`w.npy`, which does not lie beside .*; train the model first"):
        c.score("churn", user_id=1)
    np.save(tmp_path / "w.npy", np.array([2.0]))
    with TestCluster(models=weighted, artifacts=tmp_path) as c:
        assert c.score("churn", user_id=1).result == 0


# -- parity

SOME = [purchase(f"o{n % 40}", n % 5, float(n % 11), NOW + n * HOUR, book_id="ab"[n % 2]) for n in range(60)]


@given(events=PURCHASES, shards=st.integers(1, 3), arrive=st.booleans())
def test_views_of_all_kinds_are_what_the_oracle_says(events: list[Any], shards: int, arrive: bool) -> None:
    if arrive:
        events = [{**event, "arrival_ms": NOW + n // 3} for n, event in enumerate(events)]
    compared = assert_parity([taste, user_spend, user_book], events, shards=shards)
    users = len({int(event["user_id"]) for event in events})
    assert compared >= (users + 1) * len(taste.features) if events else compared == 0


def test_events_for_parity_come_in_any_form_and_order_and_may_say_when_they_arrived() -> None:
    table = pa.Table.from_pylist([{**e, "gift": None} for e in SOME], purchases.schema)
    late = table.append_column("arrival_ms", pa.array([e["paid_at"] + n % 3 * DAY for n, e in enumerate(SOME)]))
    counts = {assert_parity(user_spend, events) for events in (SOME, SOME[::-1], table, table.to_batches()[0])}
    assert len(counts) == 1
    assert assert_parity(user_spend, late) > 0
    assert assert_parity(user_spend, SOME, times=1, entities_max=2) < max(counts)


def test_a_derived_feature_that_looks_at_other_rows_is_found() -> None:
    view = FeatureView(
        "v", owner="x", source=purchases, key=["user_id"],
        features={"n": Count(window="30d"), "n_above_mean": Derived(lambda n: n - n.mean(), "n")},
    )  # fmt: skip
    with pytest.raises(AssertionError) as caught:
        assert_parity(view, SOME)
    head, first, *events = str(caught.value).splitlines()
    assert head.endswith("values are not what the oracle says:")
    assert first.startswith("`v.n_above_mean` of user_id=")
    assert "the oracle says 0.0" in first
    assert "'order_id': 'o" in events[0]


def test_a_difference_names_the_feature_the_entity_and_its_events() -> None:
    some = SOME[:40]
    with TestCluster([user_spend]) as c:
        c.send(purchases, some)
        plan, keys = c._plan(user_spend), [(1,), (2,)]
        rows = c._read_ms(plan, {"user_id": [1, 2]}, 2, None)
    log = [e for e in some if e["order_id"] != "o36"]
    assert [str(d) for d in Judge(user_spend, some).differences(keys, plan, rows)] == []
    wrong = list(Judge(user_spend, log).differences(keys, plan, rows))
    assert {(d.feature, d.key["user_id"]) for d in wrong} >= {("orders_30d", 1), ("spend_30d", 1)}
    (count,) = (d for d in wrong if d.feature == "orders_30d")
    assert (count.got, count.want, len(count.events)) == (8, 7, 7)
    assert str(count).startswith("`user_spend.orders_30d` of user_id=1 as of 2023-11-1")
    unknown = list(Judge(user_spend, []).differences(keys, plan, rows))
    assert [(d.got, d.want) for d in unknown if d.feature is None] == [(True, False)] * 2


@pytest.mark.parametrize("nothing", [{"times": 0}, {"entities_max": 0}])
def test_parity_that_would_compare_nothing_is_refused(nothing: dict[str, int]) -> None:
    with pytest.raises(DeclarationError, match="times and entities_max are 1 or more"):
        assert_parity(user_spend, [], **nothing)


def test_parity_of_views_of_two_sources_is_refused() -> None:
    views = [user_spend, next(view for view in VIEWS if view.source is logins)]
    with pytest.raises(
        DeclarationError, match=r"views of one source at a time, got those of \['logins', 'purchases'\]"
    ):
        assert_parity(views, SOME)


# -- pytest

TESTS = """
from apps_of_a_team import purchases, user_spend
from millpond.feature_actors.testing import TestCluster, assert_parity

class TestOrders:
    def test_orders_are_counted(self, millpond_cluster):
        c = millpond_cluster([user_spend])
        c.send(purchases, {"order_id": "a", "user_id": 1, "price": 2.0, "paid_at": 1_700_000_000_000})
        assert c.features(user_spend, user_id=1).features["orders_30d"] == 1

def test_a_file(millpond_cluster):
    c = millpond_cluster("apps_of_a_team.py")
    assert c.score("churn", user_id=1).unknown == ["user_spend"]
"""


def test_the_fixture_is_there_and_nothing_of_the_kit_is_taken_for_a_test(tmp_path: Path) -> None:
    (tmp_path / "apps_of_a_team.py").write_text(DEFINITION)
    (tmp_path / "test_team.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", "."]
    done = subprocess.run([*command, "test_team.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("2 passed in ")


def test_who_tests_something_else_imports_nothing_of_the_kit(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\ndef test_it():\n    assert not {'numpy', 'millpond.feature_actors'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "test_other.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
