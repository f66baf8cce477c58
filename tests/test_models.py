# ruff: noqa: E501  (messages stand whole)
"""Models: what is refused at declaration, how a definition is read and loaded, and what a training set promises."""

from __future__ import annotations

import json
import linecache
import pickle
import random
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from apps import DEFINITION, LAYOUT, NOW, VIEWS, Total, book_sales, purchase, purchases, taste, user_book, user_spend
from join_workers import Apart

from millpond.feature_actors import Count, FeatureView, Field, Last, Source, Sum
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import EventClock
from millpond.feature_actors.decode import Decoder
from millpond.feature_actors.errors import BadRequest, DeclarationError
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import ReadPlan
from millpond.feature_actors.ports import LocalIngest, LocalRead, complete
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.models import FeatureReader, Features, Model, training_set
from millpond.models.definition import Definition, load_models
from millpond.models.model import LoadedModel
from millpond.models.reader import Reads
from millpond.models.training import Threads

DAY = 86_400_000


def refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        make()
    assert str(caught.value) == message


# -- declarations


GOOD: dict[str, Any] = {
    "name": "m",
    "version": "1",
    "owner": "ml",
    "features": [user_spend["orders_30d"]],
    "predictor": Total,
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "M"}, "model 'M': a name is lower-case letters, digits and `_`, starts with a letter and has at most 63 characters"),
        ({"owner": " "}, 'model `m`: no owner; say which team owns it with `owner="..."`'),
        ({"version": 1}, "model `m`: version is a text of at most 63 letters, digits and `._+-`, got 1"),
        ({"version": " "}, "model `m`: version is a text of at most 63 letters, digits and `._+-`, got ' '"),
        ({"version": "a/b"}, "model `m`: version is a text of at most 63 letters, digits and `._+-`, got 'a/b'"),
        ({"features": []}, "model `m`: no features"),
        ({"features": ["orders_30d"]}, "model `m`: expected features such as view[\"name\"], got 'orders_30d'"),
        ({"features": [user_spend["orders_30d"], user_spend["orders_30d"]]}, "model `m`: feature `user_spend.orders_30d` is named twice"),
        ({"predictor": None}, "model `m`: predictor must be a class or a function, got None"),
        ({"predictor": 5}, "model `m`: predictor must be a class or a function, got 5"),
        ({"artifacts": {"weights": "../w.npy"}}, "model `m`: artifact `weights` must be a file name without folders, got '../w.npy'"),
        ({"artifacts": {"weights": "/etc/passwd"}}, "model `m`: artifact `weights` must be a file name without folders, got '/etc/passwd'"),
        ({"artifacts": {"weights": ""}}, "model `m`: artifact `weights` must be a file name without folders, got ''"),
        ({"artifacts": {"weights": ".."}}, "model `m`: artifact `weights` must be a file name without folders, got '..'"),
    ],
)  # fmt: skip
def test_a_wrong_model_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    refused(lambda: Model(**{**GOOD, **wrong}), message)


def test_an_unknown_feature_of_a_view_is_told_its_neighbour() -> None:
    with pytest.raises(DeclarationError, match="did you mean `orders_30d`"):
        user_spend["orders_30"]


def test_a_model_gives_its_predictor_the_columns_in_the_order_of_its_declaration() -> None:
    seen: list[Features] = []

    class Spy:
        def predict(self, features: Features) -> list[float]:
            seen.append(features)
            return [0.0] * len(features.matrix)

    features = [user_book["bought"], user_spend["last_price"], book_sales["sold_7d"]]
    loaded = LoadedModel(Model("m", version="1", owner="ml", features=features, predictor=Spy), LAYOUT, Path())
    shard = Shard(LAYOUT, ShardMap.even(16, 1), 0)
    client = FeatureClient(LAYOUT, ShardMap.even(16, 1), LocalIngest([shard]), LocalRead([shard]), EventClock())
    batch = pa.RecordBatch.from_pylist(
        [purchase("a", 1, 9.0, book_id="x"), purchase("b", 2, 7.0, book_id="x")], schema=purchases.schema
    )
    complete(client.ingest("purchases", batch))
    rows = complete(client.read(loaded.plan, {"user_id": [1], "book_id": ["x"]}, 1))
    assert loaded.predict(rows) == [0.0]
    assert seen[0].names == ("user_book.bought", "user_spend.last_price", "book_sales.sold_7d")
    assert (seen[0].matrix.tolist(), seen[0].matrix.dtype) == ([[1.0, 9.0, 2.0]], np.float64)
    assert seen[0].texts == {}


def test_a_model_gives_its_predictor_strings_beside_the_matrix_and_a_column_for_each_of_several_values() -> None:
    seen: list[Features] = []

    class Spy:
        def predict(self, features: Features) -> list[float]:
            seen.append(features)
            return [0.0] * len(features.matrix)

    features = [taste["books"], taste["prices"], taste["first_book"], taste["mean"]]
    layout = compile_layout([], [taste])
    loaded = LoadedModel(Model("m", version="1", owner="ml", features=features, predictor=Spy), layout, Path())
    shard = Shard(layout, ShardMap.even(16, 1), 0)
    client = FeatureClient(layout, ShardMap.even(16, 1), LocalIngest([shard]), LocalRead([shard]), EventClock())
    sold = [purchase("a", 1, 9.0, NOW, book_id="x"), purchase("b", 1, 7.0, NOW + 1, book_id="y"), purchase("c", 2, 8.0)]
    batch = pa.RecordBatch.from_pylist(sold, schema=purchases.schema)
    complete(client.ingest("purchases", batch))
    assert loaded.predict(complete(client.read(loaded.plan, {"user_id": [1, 2, 3]}, 3))) == [0.0] * 3
    assert seen[0].names == ("taste.prices[0]", "taste.prices[1]", "taste.mean")
    nan = np.nan
    np.testing.assert_array_equal(seen[0].matrix, [[7.0, 9.0, 8.0], [8.0, nan, 8.0], [nan, nan, nan]])
    assert seen[0].texts == {
        "taste.books": [("y", "x", None), (None,) * 3, (None,) * 3],
        "taste.first_book": ["x", None, None],
    }


# -- definitions


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "defs.py"
    path.write_text(DEFINITION)
    return path


def test_a_definition_declares_what_its_file_does_in_its_order(file: Path) -> None:
    declared = Definition.read(file).declared()
    assert [s.name for s in declared.sources] == ["purchases"]
    assert [v.name for v in declared.views] == ["user_spend", "book_sales", "user_book"]
    assert [m.name for m in declared.models] == ["churn", "offer"]


def test_what_a_model_reads_is_declared_with_it(tmp_path: Path) -> None:
    text = (
        DEFINITION
        + "\nviews = [user_spend, book_sales, user_book]\ndel purchases, user_spend, book_sales, user_book, views\n"
    )
    declared = Definition("defs.py", text).declared()
    assert [s.name for s in declared.sources] == ["purchases"]
    assert [v.name for v in declared.views] == ["user_spend", "book_sales", "user_book"]


def test_what_stands_in_a_list_a_tuple_or_a_dict_is_declared_too() -> None:
    text = (
        DEFINITION
        + "\nviews = {'a': user_spend, 'b': book_sales}\nmodels, sources = [churn, [offer]], (purchases,)"
        + "\ndel purchases, user_spend, book_sales, user_book, churn, offer\n"
    )
    declared = Definition("defs.py", text).declared()
    assert [s.name for s in declared.sources] == ["purchases"]
    assert [v.name for v in declared.views] == ["user_spend", "book_sales"]
    assert [m.name for m in declared.models] == ["churn"]  # one level


def test_a_definition_runs_once_a_process(tmp_path: Path) -> None:
    definition = Definition("defs.py", DEFINITION + "\n# once\n")
    one, two = definition.declared(), replace(definition).declared()
    assert [a is b for a, b in zip(one.models, two.models, strict=True)] == [True, True]


def test_a_definition_travels_between_processes(file: Path) -> None:
    definition = Definition.read(file)
    again = pickle.loads(pickle.dumps(definition))
    assert again == definition
    code = (
        "import pickle, sys; d = pickle.load(sys.stdin.buffer); from millpond.models.definition import load_models;"
        "from millpond.feature_actors.layout import compile_layout; x = d.declared();"
        "print(sorted(load_models([d], compile_layout(x.sources, x.views))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(definition), capture_output=True, check=True, cwd="/"
    )
    assert done.stdout.decode() == "['churn', 'offer']\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def", "definition `defs.py`: does not run: SyntaxError: invalid syntax - at `defs.py:1`"),
        (
            "\n\nimport no_such_module",
            "definition `defs.py`: does not run: ModuleNotFoundError: No module named 'no_such_module' - at `defs.py:3`",
        ),
        ("x = 1\nx / 0\n", "definition `defs.py`: does not run: ZeroDivisionError: division by zero - at `defs.py:2`"),
        (
            "def days(n):\n    return n * DAY\n\nd = days(1)\n",
            "definition `defs.py`: does not run: NameError: name 'DAY' is not defined - at `defs.py:2`",
        ),
        (
            "import json\njson.loads('')",
            "definition `defs.py`: does not run: JSONDecodeError: Expecting value: line 1 column 1 (char 0) - at `defs.py:2`",
        ),
        (
            "import json\n#\ncompile('(', 'other.py', 'exec')",
            "definition `defs.py`: does not run: SyntaxError: '(' was never closed (other.py, line 1) - at `defs.py:3`",
        ),
        (
            "from millpond.feature_actors import Source\nSource('s')",
            'source `s`: no owner; say which team owns it with `owner="..."` - at `defs.py:2`',
        ),
        ("raise SystemExit(3)", "definition `defs.py`: does not run: SystemExit: 3 - at `defs.py:1`"),
    ],
)
def test_a_file_that_does_not_run_is_refused_each_time(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "defs.py").write_text(text)
    for _ in range(2):
        refused(lambda: Definition.read(tmp_path / "defs.py"), message)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", "folder"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "defs.py"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(DeclarationError, match=f"^definition `{re.escape(str(path))}`: cannot be read: "):
        Definition.read(path)


def test_a_traceback_shows_the_lines_of_a_definition() -> None:
    definition = Definition("defs.py", "def fails():\n    return 1 / 0  # here\n")
    definition.declared()
    module = next(m for n, m in sys.modules.items() if n.startswith("millpond_definition_") and hasattr(m, "fails"))
    try:
        module.fails()
    except ZeroDivisionError:
        shown = traceback.format_exc()
    linecache.checkcache()
    assert re.search(r'File "<defs.py [0-9a-f]{8}>", line 2, in fails', shown)
    assert "return 1 / 0  # here" in shown


# -- loading


def layout_of(*definitions: Definition) -> Any:
    declared = [d.declared() for d in definitions]
    return compile_layout([s for d in declared for s in d.sources], [v for d in declared for v in d.views])


WITH_WEIGHTS = DEFINITION.replace("artifacts={}", 'artifacts={"weights": "weights.npy"}')


@pytest.mark.parametrize("elsewhere", [False, True])
def test_artifacts_are_read_from_beside_the_file_or_from_a_folder(tmp_path: Path, elsewhere: bool) -> None:
    (tmp_path / "defs.py").write_text(WITH_WEIGHTS)
    folder = tmp_path / "trained" if elsewhere else tmp_path
    folder.mkdir(exist_ok=True)
    np.save(folder / "weights.npy", np.array([3.0]))
    (folder / "unrelated.bin").write_bytes(b"x")
    definition = Definition.read(tmp_path / "defs.py", folder if elsewhere else None)
    assert definition.artifacts.keys() == {"weights.npy"}
    (folder / "weights.npy").unlink()  # what was read travels with the definition
    loaded = load_models([definition], layout_of(definition))["churn"]
    assert loaded._predictor.scale == 3.0  # type: ignore[attr-defined]


def test_a_definition_whose_artifact_is_missing_can_be_read_but_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "defs.py").write_text(WITH_WEIGHTS)
    definition = Definition.read(tmp_path / "defs.py")
    assert [m.name for m in definition.declared().models] == ["churn", "offer"]
    message = (
        "model `churn`: artifact `weights` is `weights.npy`, which does not lie beside `defs.py`; train the model first"
    )
    refused(lambda: load_models([definition], layout_of(definition)), message)


def test_a_predictor_that_does_not_load_is_named(tmp_path: Path) -> None:
    definition = Definition("defs.py", WITH_WEIGHTS, {"weights.npy": b"not an array"})
    with pytest.raises(DeclarationError, match=r"^model `churn`: its predictor does not load: ValueError: "):
        load_models([definition], layout_of(definition))
    definition = Definition(
        "defs.py",
        DEFINITION.replace("self.scale = 1.0", "raise RuntimeError('no')  # ").replace(
            "predictor=Total, a", "predictor=Total, a"
        ),
    )
    refused(
        lambda: load_models([definition], layout_of(definition)),
        "model `churn`: its predictor does not load: RuntimeError: no",
    )


def test_two_models_of_one_name_are_refused() -> None:
    definition = Definition("defs.py", DEFINITION)
    refused(lambda: load_models([definition, definition], layout_of(definition)), "two models are named `churn`")


def test_nothing_is_left_of_the_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    np.save(tmp_path / "w.npy", np.array([3.0]))
    definition = Definition("defs.py", WITH_WEIGHTS, {"weights.npy": (tmp_path / "w.npy").read_bytes()})
    load_models([definition], layout_of(definition))
    assert [p.name for p in tmp_path.iterdir()] == ["w.npy"]


# -- training sets


def world(n: int = 800, seed: int = 4) -> tuple[pa.Table, pa.Table]:
    """Return events in time order and labels, some at the very time of an event, some of strangers."""
    rng = random.Random(seed)
    times = sorted(NOW + rng.randrange(40 * DAY) // 60_000 * 60_000 for _ in range(n))
    events = [
        purchase(
            f"o{i}", rng.randrange(25), rng.choice([0.1, 2.5, -7.0, 1e9]), at, book_id=rng.choice(["x", "y", "", None])
        )
        for i, at in enumerate(times)
    ]
    labels = [
        {"user_id": rng.randrange(27), "book_id": rng.choice(["x", "y", "z", ""]), "as_of": rng.choice(times) + rng.choice([0, 0, 1, -1, DAY])}
        for _ in range(300)
    ]  # fmt: skip
    schema = pa.schema({"user_id": pa.int64(), "book_id": pa.string(), "as_of": pa.timestamp("ms", "UTC")})
    return pa.Table.from_pylist(events, schema=purchases.schema), pa.Table.from_pylist(labels, schema=schema)


FEATURES = [*user_spend, *book_sales, *user_book]
#: Strings, lists, exact and derived features, too.
EVERY_KIND = [*FEATURES, *taste]


def same(one: Any, two: Any) -> bool:
    return bool(
        one.matrix.tobytes() == two.matrix.tobytes()
        and one.as_of.tolist() == two.as_of.tolist()
        and one.unknown == two.unknown
        and one.texts == two.texts
    )


def test_a_training_set_is_what_the_cluster_would_have_served() -> None:
    """Serving == training: the same events and reads in the order of time, live, give the same bits."""
    events, labels = world()
    rows = training_set(EVERY_KIND, labels, {"purchases": events})
    shard_map = ShardMap.even(16, 3)
    layout = compile_layout([], [*VIEWS, taste])
    shards = [Shard(layout, shard_map, i) for i in range(3)]
    client = FeatureClient(layout, shard_map, LocalIngest(shards), LocalRead(shards), EventClock())
    plan = ReadPlan(layout, EVERY_KIND, "x")
    times = events["paid_at"].cast(pa.int64()).to_numpy()
    asked = labels.to_pylist()
    as_of = labels["as_of"].cast(pa.int64()).to_numpy()
    sent = 0
    for i in np.argsort(as_of, kind="stable").tolist():
        until = int(np.searchsorted(times, as_of[i], "right"))
        if until > sent:
            batch = events.slice(sent, until - sent).combine_chunks().to_batches()[0]
            complete(client.ingest("purchases", batch))
            sent = until
        keys = plan.key_columns([{k: asked[i][k] for k in ("user_id", "book_id")}], batch=False)
        live = complete(client.read(plan, keys, 1, int(as_of[i])))
        assert live.matrix.tobytes() == rows.matrix[i : i + 1].tobytes(), asked[i]
        assert (live.as_of[0], live.unknown[0]) == (rows.as_of[i], rows.unknown[i])
        assert {name: column[0] for name, column in live.texts.items()} == {n: c[i] for n, c in rows.texts.items()}
    assert {tuple(u) for u in rows.unknown} >= {(), ("user_spend", "user_book", "taste")}


def test_a_label_sees_the_event_at_its_very_time_and_none_after() -> None:
    events = pa.Table.from_pylist([purchase("a", 1, 5.0, NOW), purchase("b", 1, 7.0, NOW + 1)], schema=purchases.schema)
    labels = pa.table({"user_id": [1, 1, 1], "as_of": pa.array([NOW - 1, NOW, NOW + 1], pa.timestamp("ms", "UTC"))})
    rows = training_set(list(user_spend), labels, {"purchases": events})
    np.testing.assert_array_equal(rows.matrix, [[0, 0, np.nan, np.nan], [1, 5, 5, 0], [2, 12, 7, 0]])
    assert rows.unknown == [["user_spend"], [], []]


def test_the_number_of_shards_changes_nothing() -> None:
    events, labels = world()
    one = training_set(EVERY_KIND, labels, {"purchases": events})
    for workers in (Threads(2), Threads(3), Threads(64), Apart(1), Apart(3)):
        assert same(one, training_set(EVERY_KIND, labels, {"purchases": events}, workers=workers))


def test_the_order_of_the_labels_changes_nothing() -> None:
    events, labels = world()
    one = training_set(EVERY_KIND, labels, {"purchases": events})
    order = np.random.default_rng(0).permutation(len(labels))
    other = training_set(EVERY_KIND, labels.take(pa.array(order)), {"purchases": events})
    assert other.matrix.tobytes() == one.matrix[order].tobytes()
    assert other.as_of.tolist() == one.as_of[order].tolist()
    assert other.unknown == [one.unknown[i] for i in order]


def test_chunks_types_and_further_columns_change_nothing() -> None:
    events, labels = world()
    one = training_set(EVERY_KIND, labels, {"purchases": events})
    chunked = pa.concat_tables([events.slice(i, 97) for i in range(0, len(events), 97)])
    wide = labels.set_column(2, "as_of", labels["as_of"].cast(pa.timestamp("us", "UTC"))).append_column(
        "late", labels["user_id"]
    )
    wide = wide.set_column(1, "book_id", wide["book_id"].cast(pa.large_string())).set_column(
        0, "user_id", wide["user_id"].cast(pa.int8())
    )
    assert same(
        one,
        training_set(
            EVERY_KIND, pa.concat_tables([wide.slice(0, 5), wide.slice(5)]), {"purchases": chunked, "unused": labels}
        ),
    )


def test_events_that_come_twice_count_once() -> None:
    events, labels = world(100)
    twice = pa.concat_tables([t for i in range(len(events)) for t in [events.slice(i, 1)] * 2])
    assert same(
        training_set(EVERY_KIND, labels, {"purchases": events}), training_set(EVERY_KIND, labels, {"purchases": twice})
    )


def test_no_labels_are_no_rows_and_no_events_are_no_features() -> None:
    events, labels = world(50)
    assert training_set(FEATURES, labels.slice(0, 0), {"purchases": events}).matrix.shape == (0, len(FEATURES))
    rows = training_set(FEATURES, labels, {"purchases": events.slice(0, 0)})
    assert rows.unknown == [["user_spend", "book_sales", "user_book"]] * len(labels)


@pytest.mark.parametrize("column", ["user_id", "as_of"])
def test_a_missing_column_of_the_labels_is_named(column: str) -> None:
    events, labels = world(10)
    less = labels.drop_columns([column])
    with pytest.raises(BadRequest) as caught:
        training_set(FEATURES, less, {"purchases": events})
    assert str(caught.value) == f"training set: labels have no column `{column}`; they have {less.column_names}"


def test_missing_events_and_missing_fields_are_named() -> None:
    events, labels = world(10)
    with pytest.raises(BadRequest) as caught:
        training_set(FEATURES, labels, {"purchase": events})
    assert str(caught.value) == "training set: no events of source `purchases`; given are ['purchase']"
    with pytest.raises(BadRequest) as caught:
        training_set(FEATURES, labels, {"purchases": events.drop_columns(["price", "gift"])})
    assert str(caught.value) == (
        "training set: events of `purchases` have no column `price`; they have ['order_id', 'user_id', 'book_id', 'paid_at']"
    )


def test_the_order_of_events_changes_nothing_but_which_of_an_id_and_of_a_millisecond_is_first() -> None:
    events, labels = world()
    spread = np.arange(len(events)) * 1_000 + events["paid_at"].cast(pa.int64()).to_numpy()[0]
    place = events.column_names.index("paid_at")
    events = events.set_column(place, "paid_at", pa.array(spread, pa.timestamp("ms", "UTC")))
    one = training_set(EVERY_KIND, labels, {"purchases": events})
    order = np.random.default_rng(0).permutation(len(events))
    assert same(one, training_set(EVERY_KIND, labels, {"purchases": events.take(pa.array(order))}))


@pytest.mark.parametrize("column", ["user_id", "book_id", "as_of"])
def test_a_label_without_a_key_or_a_time_is_refused(column: str) -> None:
    events, labels = world(10)
    holed = labels.to_pylist()
    holed[7][column] = None
    with pytest.raises(BadRequest) as caught:
        training_set(FEATURES, pa.Table.from_pylist(holed, schema=labels.schema), {"purchases": events})
    assert str(caught.value) == f"training set: label without `{column}` - at `$[7].{column}`"


def test_a_null_in_a_field_of_an_event_that_is_not_optional_is_refused() -> None:
    events, labels = world(10)
    holed = events.to_pylist()
    holed[4]["price"] = None
    nullable = pa.schema([f.with_nullable(True) for f in purchases.schema])
    with pytest.raises(BadRequest) as caught:
        training_set(FEATURES, labels, {"purchases": pa.Table.from_pylist(holed, schema=nullable)})
    assert str(caught.value) == "event of `purchases`: expected `float64`, got `null` - at `$[4].price`"


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_of_an_event_that_is_not_finite_is_refused_as_when_served(number: float) -> None:
    events, labels = world(10)
    wrong = events.to_pylist()
    wrong[4]["price"] = number
    shown = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(number)]
    with pytest.raises(BadRequest) as caught:
        training_set(FEATURES, labels, {"purchases": pa.Table.from_pylist(wrong, schema=purchases.schema)})
    assert str(caught.value) == (
        f"event of `purchases`: expected `float64`, got `{shown}`; allowed are finite numbers - at `$[4].price`"
    )


def test_events_of_another_type_are_refused_as_when_served() -> None:
    events, labels = world(10)
    wrong = events.set_column(1, "user_id", events["user_id"].cast(pa.string()))
    with pytest.raises(BadRequest) as caught:
        training_set(FEATURES, labels, {"purchases": wrong})
    assert str(caught.value) == "event of `purchases`: expected `int64`, got a column of `string` - at `$[*].user_id`"


A_TIME = "expected a timestamp with a time zone, such as `timestamp[ms, UTC]`: hours decide what a label knows"


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("as_of", pa.array([NOW, NOW + 1], pa.timestamp("ms")), "training set: column `as_of` of the labels is `timestamp[ms]`; " + A_TIME),
        ("as_of", pa.array([NOW, NOW + 1]), "training set: column `as_of` of the labels is `int64`; " + A_TIME),
        ("as_of", pa.array(["2024-01-01", ""]), "training set: column `as_of` of the labels is `string`; " + A_TIME),
        ("as_of", pa.array([NOW * 1000, NOW * 1000 + 1], pa.timestamp("us", "UTC")), "training set: label with `as_of` 1700000000000001 us, which is not of whole milliseconds; round it - at `$[1].as_of`"),
        ("as_of", pa.array([NOW * 10**6 + 1, NOW * 10**6], pa.timestamp("ns", "UTC")), "training set: label with `as_of` 1700000000000000001 ns, which is not of whole milliseconds; round it - at `$[0].as_of`"),
        ("user_id", pa.array(["1", "2"]), "training set: column `user_id` of the labels is `string`; expected `int64`"),
        ("user_id", pa.array([1.0, 2.0]), "training set: column `user_id` of the labels is `double`; expected `int64`"),
        ("user_id", pa.array([1, 2**63], pa.uint64()), "training set: column `user_id` of the labels does not fit `int64`: Integer value 9223372036854775808 not in range: 0 to 9223372036854775807"),
        ("book_id", pa.array([1, 2]), "training set: column `book_id` of the labels is `int64`; expected `string`"),
    ],
)  # fmt: skip
def test_labels_of_a_wrong_type_are_refused_by_name(column: str, values: pa.Array, message: str) -> None:
    events, labels = world(10)
    wrong = labels.slice(0, 2).set_column(labels.column_names.index(column), column, values)
    with pytest.raises(BadRequest) as caught:
        training_set(FEATURES, wrong, {"purchases": events})
    assert str(caught.value) == message


def test_times_of_labels_in_other_units_and_keys_in_a_dictionary_are_read() -> None:
    events, labels = world(100)
    whole = labels["as_of"].cast(pa.int64()).to_numpy() // 1_000 * 1_000
    labels = labels.set_column(2, "as_of", pa.array(whole, pa.timestamp("ms", "UTC")))
    other = labels.set_column(1, "book_id", labels["book_id"].dictionary_encode())
    one = training_set(FEATURES, labels, {"purchases": events})
    encoded = events.set_column(2, "book_id", events["book_id"].dictionary_encode())
    for unit, zone in (("s", "America/New_York"), ("us", "Europe/Berlin"), ("ns", "UTC")):
        in_unit = other.set_column(2, "as_of", labels["as_of"].cast(pa.timestamp(unit, zone)))
        assert same(one, training_set(FEATURES, in_unit, {"purchases": encoded}))


BETS = Source(
    "bets",
    owner="odds",
    fields={
        "bet_id": "string", "user_id": "int64", "shop": Field("string", default="web"),
        "stake": Field("float64", default=2.5), "tip": Field("int64", optional=True), "at": "timestamp[ms, UTC]",
    },
    event_id="bet_id",
    event_time="at",
)  # fmt: skip
USER_BETS = FeatureView(
    "user_bets", owner="odds", source=BETS, key=["user_id"],
    features={"n": Count(), "stake": Sum("stake"), "last_stake": Last("stake"), "tips": Sum("tip", window="7d")},
)  # fmt: skip
SHOP_BETS = FeatureView("shop_bets", owner="odds", source=BETS, key=["shop"], features={"n": Count(window="7d")})


def bets(n: int = 400) -> list[dict[str, Any]]:
    """Return events in time order: nulls for defaults, every third one of an id that came before: the same
    event again, with another stake, or with another user."""
    rng = random.Random(8)
    log: list[dict[str, Any]] = []
    for i in range(n):
        event = {
            "bet_id": f"b{i}", "user_id": rng.randrange(9), "shop": rng.choice(["a", "web", None]),
            "stake": rng.choice([1.5, -4.0, None]), "tip": rng.choice([1, None]), "at": NOW + i // 4 * 60_000,
        }  # fmt: skip
        if i % 3 == 2:
            old = rng.choice(log[-3:])
            event = rng.choice([dict(old, at=max(old["at"], log[-1]["at"])), {**event, "bet_id": old["bet_id"]}])
        log.append(event)
    return log


@pytest.mark.parametrize("absent", [False, True])
def test_defaults_duplicates_and_conflicts_are_trained_on_as_they_are_served(absent: bool) -> None:
    log = bets()
    if absent:
        log = [{**e, "shop": None, "tip": None} for e in log]
    nullable = pa.schema([f.with_nullable(True) for f in BETS.schema])
    given = pa.Table.from_pylist(log, schema=nullable)
    if absent:
        given = given.drop_columns(["shop", "tip"])
    until = sorted({e["at"] for e in log})[::10]
    labels = [{"user_id": u, "shop": s, "as_of": t} for t in until for u in range(10) for s in ("a", "web")]
    layout = compile_layout([], [USER_BETS, SHOP_BETS])
    features = [*USER_BETS, *SHOP_BETS]
    shard_map = ShardMap.even(16, 3)
    shards = [Shard(layout, shard_map, i) for i in range(3)]
    client = FeatureClient(layout, shard_map, LocalIngest(shards), LocalRead(shards), EventClock())
    decoder, plan = Decoder(BETS), ReadPlan(layout, features, "x")
    served, duplicates, conflicts, sent = [], 0, 0, 0
    for time in until:
        body = [{k: v for k, v in e.items() if v is not None} for e in log[sent:] if e["at"] <= time]
        sent += len(body)
        ack = complete(client.ingest("bets", decoder.decode(json.dumps(body).encode(), None)))
        duplicates, conflicts = duplicates + ack.duplicates, conflicts + ack.conflicts
        asked = [label for label in labels if label["as_of"] == time]
        keys = {name: [label[name] for label in asked] for name in ("user_id", "shop")}
        served.append(complete(client.read(plan, keys, len(asked), time)).matrix)
    assert min(duplicates, conflicts) > 20
    schema = pa.schema({"user_id": pa.int64(), "shop": pa.string(), "as_of": pa.timestamp("ms", "UTC")})
    trained = training_set(features, pa.Table.from_pylist(labels, schema=schema), {"bets": given})
    assert trained.matrix.tobytes() == np.concatenate(served).tobytes()


def test_an_event_of_a_known_id_is_not_counted_for_another_key() -> None:
    log = [
        {"bet_id": "b", "user_id": 1, "stake": 3.0, "at": NOW},
        {"bet_id": "b", "user_id": 2, "stake": 3.0, "at": NOW + 1},
    ]
    given = pa.Table.from_pylist(log)
    given = given.set_column(3, "at", given["at"].cast(pa.timestamp("ms", "UTC")))
    labels = pa.table({"user_id": [1, 2], "as_of": pa.array([NOW + 2] * 2, pa.timestamp("ms", "UTC"))})
    rows = training_set([USER_BETS["n"], USER_BETS["stake"]], labels, {"bets": given})
    assert rows.matrix.tolist() == [[1, 3], [0, 0]]
    assert rows.unknown == [[], ["user_bets"]]


def test_views_are_of_the_layout() -> None:
    assert {v.name for v in VIEWS} >= {f.view.name for f in FEATURES}


# -- two-stage models


class Shelf:
    """Rank the books of the user's features by what is read of them."""

    def predict(self, features: Features, reader: FeatureReader) -> list[Any]:
        books = ["x", "y", "z"]
        sold = reader.read([book_sales["sold_7d"]], {"book_id": books})
        assert sold.names == ("book_sales.sold_7d",)
        ranked = sorted(books, key=lambda book: -sold.matrix[books.index(book), 0])
        return [[user, ranked] for user in features.keys["user_id"]]


def test_a_predictor_with_a_second_parameter_reads_more_features_as_of_the_request() -> None:
    model = Model("m", version="1", owner="ml", features=[user_spend["orders_30d"]], predictor=Shelf, reads=[book_sales["sold_7d"]])  # fmt: skip
    loaded = LoadedModel(model, LAYOUT, Path())
    shard = Shard(LAYOUT, ShardMap.even(16, 1), 0)
    client = FeatureClient(LAYOUT, ShardMap.even(16, 1), LocalIngest([shard]), LocalRead([shard]), EventClock())
    sold = [purchase("a", 1, book_id="y"), purchase("b", 1, book_id="y"), purchase("c", 2, book_id="z")]
    complete(client.ingest("purchases", pa.RecordBatch.from_pylist(sold, schema=purchases.schema)))
    asked: list[Any] = []

    def read(plan: ReadPlan, keys: Any, n: int, as_of_ms: int | None) -> Any:
        asked.append((n, as_of_ms))
        return complete(client.read(plan, keys, n, as_of_ms))

    rows = complete(client.read(loaded.plan, {"user_id": [1, 2]}, 2))
    assert loaded.predict(rows, {"user_id": [1, 2]}, read, NOW + 5) == [[1, ["y", "z", "x"]], [2, ["y", "z", "x"]]]
    assert asked == [(3, NOW + 5)]


@pytest.mark.parametrize(
    ("features", "keys", "message"),
    [
        ([user_spend["last_price"]], {"user_id": [1]}, "model `m`: predict reads `user_spend.last_price`, which is not among its `reads`; declared: `book_sales.sold_7d`"),
        ([book_sales["sold_7d"]], {"book_id": ["x"], "user_id": [1, 2]}, "model `m`: the key columns are of several lengths: {'book_id': 1, 'user_id': 2}"),
        ([book_sales["sold_7d"]], {"user_id": [1]}, "model `m`: key field `book_id` is missing; an id is `book_id` - at `$[0].book_id`"),
        ([book_sales["sold_7d"]], {"book_id": [1]}, "model `m`: expected `book_id` as string of at most 1024 bytes, got 1 - at `$[0].book_id`"),
    ],
)  # fmt: skip
def test_a_reader_reads_what_was_declared_and_by_whole_keys(features: Any, keys: Any, message: str) -> None:
    reads = Reads(LAYOUT, [book_sales["sold_7d"]], "model `m`")
    reader = FeatureReader(reads, lambda plan, keys, n, as_of_ms: plan.no_rows(), None)
    with pytest.raises((DeclarationError, BadRequest)) as caught:
        reader.read(features, keys)
    assert str(caught.value) == message
