# ruff: noqa: E501  (messages stand whole)
"""Model formats: predictions are the library's own; a file that was tampered with is refused, and nothing of it runs."""

from __future__ import annotations

import ast
import io
import json
import pickle
import random
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.clock import EventClock
from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.ports import LocalIngest, LocalRead, complete
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.models.contents import VersionDamaged
from millpond.models.definition import Definition, load_models
from millpond.models.features import Features
from millpond.models.formats import save_onnx
from millpond.models.formats.ubjson import read_ubjson
from millpond.models.registry import Registry
from millpond.models.version import version_of

ROOT = Path(__file__).parents[1]
NOW, DAY, USERS = 1_700_000_000_000, 86_400_000, 1_600
Matrix = npt.NDArray[np.float64]

DEFINITION = """
from functools import partial

from millpond.feature_actors import Count, FeatureView, Field, Last, Max, Mean, Min, Source, Std
from millpond.models import Model
from millpond.models.formats import LightGBMPredictor, OnnxPredictor, SklearnPredictor, XGBoostPredictor

visits = Source(
    "visits", owner="web", event_time="at",
    fields={{"user_id": "int64", "seconds": Field("float64", optional=True), "at": "timestamp[ms, UTC]"}},
)
habits = FeatureView(
    "habits", owner="retention", source=visits, key=["user_id"],
    features={{
        "visits_30d": Count(window="30d"), "visits": Count(), "mean": Mean("seconds"), "std": Std("seconds"),
        "least": Min("seconds", window="30d"), "most": Max("seconds", window="30d"), "last": Last("seconds"),
    }},
)
churn = Model(
    "churn", version="1", owner="retention", features={features}, predictor={predictor}, artifacts={{"model": "{file}"}}
)
"""
ALL, COUNTS = "list(habits)", '[habits["visits_30d"], habits["visits"]]'
FOREST = (
    "partial(SklearnPredictor, trusted=['sklearn.tree._tree.Tree', 'sklearn.ensemble._forest.RandomForestClassifier', "
    "'sklearn.tree._classes.DecisionTreeClassifier'])"
)


@dataclass(frozen=True)
class Case:
    """A format and a kind of model. train: from features and classes 0, 1, 2 writes the file, returns what predicts."""

    file: str
    predictor: str
    train: Callable[[Matrix, npt.NDArray[np.int64], Path], Callable[[Matrix], Any]]
    features: str = ALL
    #: How far a row's prediction may be from that of the same row alone: 0 where sums have one order.
    alone: float = 0.0

    @property
    def text(self) -> str:
        return DEFINITION.format(features=self.features, predictor=self.predictor, file=self.file)


def pipeline(*steps: Any) -> Any:
    from sklearn.pipeline import make_pipeline

    return make_pipeline(*steps)


def positive(estimator: Any) -> Callable[[Matrix], Any]:
    return lambda matrix: estimator.predict_proba(matrix)[:, 1]


def onnx_logistic(matrix: Matrix, label: Any, path: Path) -> Callable[[Matrix], Any]:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    learner = pipeline(SimpleImputer(), StandardScaler(), LogisticRegression()).fit(matrix, label > 0)
    save_onnx(learner, matrix, str(path))
    return positive(learner)


def onnx_regression(matrix: Matrix, label: Any, path: Path) -> Callable[[Matrix], Any]:
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    learner = pipeline(StandardScaler(), Ridge()).fit(matrix, label)
    save_onnx(learner, matrix, str(path), float64=True)
    return learner.predict  # type: ignore[no-any-return]


def onnx_forest(matrix: Matrix, label: Any, path: Path) -> Callable[[Matrix], Any]:
    from sklearn.ensemble import RandomForestClassifier

    learner = RandomForestClassifier(20, max_depth=5, random_state=1).fit(matrix, label)
    save_onnx(learner, matrix, str(path))
    return learner.predict_proba  # type: ignore[no-any-return]


def lightgbm(objective: str, classes: int = 1) -> Callable[[Matrix, Any, Path], Callable[[Matrix], Any]]:
    def train(matrix: Matrix, label: Any, path: Path) -> Callable[[Matrix], Any]:
        import lightgbm

        settings = {
            "objective": objective, "num_class": classes, "num_leaves": 15, "num_threads": 1, "verbosity": -1, "seed": 1,
        }  # fmt: skip
        wanted = label if objective != "binary" else label > 0
        learner = lightgbm.train(settings, lightgbm.Dataset(matrix, wanted), 30)
        learner.save_model(path)
        return lambda matrix: learner.predict(matrix, num_threads=1)

    return train


def xgboost(objective: str, **more: Any) -> Callable[[Matrix, Any, Path], Callable[[Matrix], Any]]:
    def train(matrix: Matrix, label: Any, path: Path) -> Callable[[Matrix], Any]:
        import xgboost

        settings = {"objective": objective, "max_depth": 4, "nthread": 1, "seed": 1, **more}
        wanted = label if not objective.startswith("binary") else label > 0
        learner = xgboost.train(settings, xgboost.DMatrix(matrix, wanted), 30)
        learner.save_model(path)
        return lambda matrix: learner.predict(xgboost.DMatrix(matrix))

    return train


def xgboost_stopped(matrix: Matrix, label: Any, path: Path) -> Callable[[Matrix], Any]:
    from xgboost import XGBClassifier

    learner = XGBClassifier(n_estimators=200, early_stopping_rounds=3, n_jobs=1, learning_rate=0.6, random_state=1)
    learner.fit(matrix[::2], label[::2] > 0, eval_set=[(matrix[1::2], label[1::2] > 0)], verbose=False)
    assert learner.best_iteration < learner.get_booster().num_boosted_rounds() - 1
    learner.save_model(path)
    return positive(learner)


def skops(estimator: Callable[[], Any], *, regression: bool = False) -> Callable[..., Callable[[Matrix], Any]]:
    def train(matrix: Matrix, label: Any, path: Path) -> Callable[[Matrix], Any]:
        import skops.io

        learner = estimator().fit(matrix, label if regression else label > 0)
        skops.io.dump(learner, path)
        return learner.predict if regression else positive(learner)

    return train


def skops_logistic() -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    steps = SimpleImputer(add_indicator=True), FunctionTransformer(np.log1p), StandardScaler(), LogisticRegression()
    return pipeline(*steps)


def skops_columns() -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import PoissonRegressor
    from sklearn.preprocessing import QuantileTransformer

    columns = ColumnTransformer([("counts", QuantileTransformer(n_quantiles=50), [0, 1])], remainder="drop")
    return pipeline(SimpleImputer(), columns, PoissonRegressor(alpha=0))


def skops_network() -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    return pipeline(SimpleImputer(), StandardScaler(), MLPClassifier((8,), tol=0.01, random_state=1))


def skops_forest() -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(20, max_depth=5, random_state=1, n_jobs=2)


CASES = {
    "onnx": Case("m.onnx", "OnnxPredictor", onnx_logistic, alone=1e-6),
    "onnx of float64": Case("m.onnx", "OnnxPredictor", onnx_regression, COUNTS, alone=1e-14),
    "onnx of classes": Case("m.onnx", "partial(OnnxPredictor, all_classes=True)", onnx_forest, COUNTS),
    "lightgbm": Case("m.txt", "LightGBMPredictor", lightgbm("binary")),
    "lightgbm of classes": Case(
        "m.txt", "partial(LightGBMPredictor, all_classes=True)", lightgbm("multiclass", 3)
    ),
    "xgboost": Case("m.json", "XGBoostPredictor", xgboost("binary:logistic")),
    "xgboost ubj": Case("m.ubj", "XGBoostPredictor", xgboost("binary:logistic")),
    "xgboost of classes": Case(
        "m.ubj", "partial(XGBoostPredictor, all_classes=True)", xgboost("multi:softprob", num_class=3)
    ),
    "xgboost dart": Case(
        "m.json", "XGBoostPredictor", xgboost("reg:squarederror", booster="dart", rate_drop=0.1)
    ),
    "xgboost stopped": Case("m.ubj", "XGBoostPredictor", xgboost_stopped),
    "sklearn": Case("m.skops", "SklearnPredictor", skops(skops_logistic), alone=1e-14),
    "sklearn columns": Case("m.skops", "SklearnPredictor", skops(skops_columns, regression=True), alone=1e-14),
    "sklearn network": Case("m.skops", "SklearnPredictor", skops(skops_network), alone=1e-14),
    "sklearn forest": Case("m.skops", FOREST, skops(skops_forest)),
}  # fmt: skip
#: A case per way of reading a file.
FORMATS = ("onnx", "lightgbm", "xgboost", "xgboost ubj", "sklearn")


@dataclass(frozen=True)
class Trained:
    """A case with its file, the rows that are predicted, and what the trained model itself predicts of them."""

    case: Case
    content: bytes
    rows: FeatureRows
    want: Matrix

    def definition(self, content: bytes | None = None) -> Definition:
        artifact = self.content if content is None else content
        return Definition("defs.py", self.case.text, {self.case.file: artifact})


@cache
def served(features: str) -> FeatureRows:
    """What the shards serve of users of whom some never came and some left no number."""
    text = DEFINITION.format(features=features, predictor="OnnxPredictor", file="m")
    declared = Definition("defs.py", text).declared()
    layout = compile_layout(declared.sources, declared.views)
    rng = np.random.default_rng(5)
    n = 6_000
    batch = pa.RecordBatch.from_pydict(
        {
            "user_id": rng.zipf(1.3, n) % USERS,
            "seconds": pa.array(rng.gamma(2, 60, n), mask=rng.random(n) < 0.2),
            "at": np.sort(NOW - rng.integers(0, 90 * DAY, n)),
        },
        schema=declared.sources[0].schema,
    )
    shard_map = ShardMap.even(16, 2)
    shards = [Shard(layout, shard_map, number) for number in range(2)]
    client = FeatureClient(layout, shard_map, LocalIngest(shards), LocalRead(shards), EventClock())
    complete(client.ingest("visits", batch))
    plan = ReadPlan(layout, declared.models[0].features, "test")
    return complete(client.read(plan, {"user_id": list(range(USERS))}, USERS))


def part(rows: FeatureRows, of: slice) -> FeatureRows:
    return FeatureRows(rows.matrix[of], rows.as_of[of], rows.unknown[of])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    @cache
    def train(name: str) -> Trained:
        case = CASES[name]
        rows = served(case.features)
        rng = np.random.default_rng(9)
        score = np.log1p(rows.matrix[:, 1]) + 0.5 * np.isnan(rows.matrix[:, -1]) + rng.normal(0, 0.3, USERS)
        label = np.searchsorted(np.quantile(score, [0.4, 0.8]), score)
        path = tmp_path_factory.mktemp("trained") / case.file
        predict = case.train(rows.matrix, label, path)
        thousand = part(rows, slice(0, 1_000))
        return Trained(case, path.read_bytes(), thousand, np.asarray(predict(thousand.matrix), np.float64))

    return train


def load(definition: Definition) -> Any:
    declared = definition.declared()
    return load_models([definition], compile_layout(declared.sources, declared.views))["churn"]


# -- what is predicted


@pytest.mark.parametrize("name", CASES)
def test_a_thousand_rows_are_predicted_as_the_trained_model_itself_does(
    name: str, trained: Callable[[str], Trained]
) -> None:
    model = trained(name)
    got = np.array(load(model.definition()).predict(model.rows))
    assert got.shape == model.want.shape
    assert got.shape == ((1_000, 3) if "classes" in name else (1_000,))
    np.testing.assert_allclose(got, model.want, rtol=0, atol=1e-6)
    # The oracle can fail: models have learnt something, of rows of which some lack numbers.
    assert np.ptp(got, axis=0).min() > 0.3
    assert np.isnan(model.rows.matrix).any() == (model.case.features == ALL)


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_predicted_alike_whatever_is_asked_with_it(name: str, trained: Callable[[str], Trained]) -> None:
    model = trained(name)
    loaded = load(model.definition())
    whole = np.array(loaded.predict(model.rows))
    assert np.array_equal(whole, np.array(loaded.predict(model.rows)))
    alone = np.array([loaded.predict(part(model.rows, slice(i, i + 1)))[0] for i in range(60)])
    some = np.concatenate([loaded.predict(part(model.rows, slice(i, i + 7))) for i in range(0, 63, 7)])
    np.testing.assert_allclose(alone, whole[:60], rtol=0, atol=model.case.alone)
    np.testing.assert_allclose(some, whole[:63], rtol=0, atol=model.case.alone)


def test_of_two_classes_the_second_is_returned_and_of_more_all_if_asked_for(
    trained: Callable[[str], Trained], caplog: pytest.LogCaptureFixture
) -> None:
    model = trained("onnx")
    both = replaced(model, "OnnxPredictor", "partial(OnnxPredictor, all_classes=True)")
    got = np.array(load(both).predict(model.rows))
    assert got.shape == (1_000, 2)
    np.testing.assert_allclose(got[:, 1], model.want, rtol=0, atol=1e-6)
    three = trained("lightgbm of classes")
    with pytest.raises(Exception, match="predict raised ValueError"):
        load(replaced(three, "partial(LightGBMPredictor, all_classes=True)", "LightGBMPredictor")).predict(three.rows)
    assert (
        "the model's output has the shape [1000, 3]; expected [n], [n, 1] or [n, 2]; functools.partial" in caplog.text
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_of_other_features_fails_and_reads_no_further(name: str, trained: Callable[[str], Trained]) -> None:
    model = trained(name)
    predictor = load(model.definition())._predictor
    for matrix in (model.rows.matrix[:, :-1], np.hstack([model.rows.matrix, model.rows.matrix])):
        with pytest.raises(Exception, match=r"features|dimensions"):
            predictor.predict(Features(matrix, ()))


def replaced(model: Trained, old: str, new: str) -> Definition:
    assert old in model.case.text
    return Definition(
        "defs.py", model.case.text.replace(f"predictor={old}", f"predictor={new}"), model.definition().artifacts
    )


def test_an_export_that_predicts_something_else_is_not_left_behind(tmp_path: Path) -> None:
    """skl2onnx 1.20 converts a forest as if NaN went right at every split."""
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(500, 4))
    matrix[rng.random(matrix.shape) < 0.2] = np.nan
    learner = RandomForestClassifier(10, max_depth=5, random_state=1).fit(matrix, np.nansum(matrix, axis=1) > 0)
    with pytest.raises(
        ValueError, match=r"^ONNX model `m.onnx`: its predictions differ by 0\.\d+ from the model's own; "
    ):
        save_onnx(learner, matrix, str(tmp_path / "m.onnx"))
    assert list(tmp_path.iterdir()) == []


# -- libraries


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("onnx", "onnxruntime", "model format ONNX needs the extra: pip install 'millpond[onnx]'"),
        ("lightgbm", "lightgbm", "model format LightGBM needs the extra: pip install 'millpond[lightgbm]'"),
        ("xgboost", "xgboost", "model format XGBoost needs the extra: pip install 'millpond[xgboost]'"),
        ("sklearn", "skops.io", "model format scikit-learn needs the extra: pip install 'millpond[sklearn]'"),
    ],
)
def test_a_missing_library_names_its_extra(
    name: str, module: str, message: str, trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = trained(name).definition()
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(DeclarationError) as caught:
        load(definition)
    assert str(caught.value).startswith(f"model `churn`: its predictor does not load: ExtraMissing: {message} (")


def test_no_library_is_imported_before_its_predictor_is_made() -> None:
    libraries = {"onnxruntime", "lightgbm", "xgboost", "skops", "sklearn", "skl2onnx", "onnx", "google"}
    code = f"import sys, millpond.models.formats; print(sorted({libraries} & {{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- files that were tampered with

Outcomes = dict[str, dict[str, Any]]


def outcomes(folder: Path, model: Trained, files: dict[str, bytes]) -> Outcomes:
    """Load each file in a process beside, as an artifact of the model; return what came of each by its name."""
    (folder / "defs.py").write_text(model.case.text)
    np.save(folder / "matrix.npy", model.rows.matrix[:50])
    for name, content in files.items():
        (folder / name).write_bytes(content)
    command = [sys.executable, str(ROOT / "tests" / "load_tampered.py"), "defs.py", ".", *files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    came = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    last = came[-1]["name"] if came else None
    assert done.returncode == 0, f"the process ended with {done.returncode} after {last}: {done.stderr[-2_000:]}"
    return {one.pop("name"): one for one in came}


def refused_by_name(model: Trained, outcome: dict[str, Any]) -> None:
    """The error names model, artifact and rule; nothing ran."""
    assert re.match(
        rf"DeclarationError: model `churn`: its predictor does not load: ModelFileRefused: artifact `{model.case.file}`: "
        r".+; .+",
        outcome.get("refused", "it was loaded"),
        re.DOTALL,
    ), outcome
    assert outcome["forbidden"] == []


def cuts_of(model: Trained) -> dict[str, bytes]:
    rng = random.Random(3)
    size = len(model.content)
    cuts = {0, 1, 2, size // 2, size - 1, size - 3, size - 6, size - 12, *(rng.randrange(size) for _ in range(15))}
    if model.case is CASES["onnx"]:
        # skl2onnx writes the opset of ONNX twice at the end, and this model has no operator of it: a file without is whole.
        cuts -= {size - 6, size - 12}
    return {f"cut{cut}": model.content[:cut] for cut in cuts}


def flips_of(model: Trained) -> dict[str, bytes]:
    rng = random.Random(7)
    files = {"whole": model.content}
    for number in range(40):
        flipped = bytearray(model.content)
        for _ in range(rng.choice([1, 1, 1, 4])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        files[f"flipped{number}"] = bytes(flipped)
    return files


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.path}",)


def pickles(ran: Path) -> dict[str, bytes]:
    files = {f"protocol{n}": pickle.dumps(Runs(str(ran)), n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}
    arrays = io.BytesIO()
    np.save(arrays, np.array([Runs(str(ran))]), allow_pickle=True)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("schema.json", files["protocol4"])
    return {**files, "array": arrays.getvalue(), "zip": zipped.getvalue()}


@dataclass(frozen=True)
class Tampered:
    """What came of the files made of one model's; ran: the file that a pickle makes when it is loaded."""

    cut: Outcomes
    flipped: Outcomes
    pickled: Outcomes
    ran: Path


@pytest.fixture(scope="session")
def tampered(trained: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tampered]:
    """All that is made of a model is loaded in one process: most of the time it imports the library."""

    @cache
    def load_all(name: str) -> Tampered:
        model, folder = trained(name), tmp_path_factory.mktemp("tampered")
        kinds = [cuts_of(model), flips_of(model), pickles(folder / "ran")]
        came = outcomes(folder, model, {name: content for files in kinds for name, content in files.items()})
        cut, flipped, pickled = ({name: came[name] for name in files} for files in kinds)
        return Tampered(cut, flipped, pickled, folder / "ran")

    return load_all


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_off_is_refused(
    name: str, trained: Callable[[str], Trained], tampered: Callable[[str], Tampered]
) -> None:
    cut = tampered(name).cut
    assert len(cut) > 15
    for outcome in cut.values():
        refused_by_name(trained(name), outcome)


@pytest.mark.parametrize("name", [*FORMATS, "lightgbm of classes", "xgboost of classes"])
def test_a_file_with_flipped_bits_is_refused_or_predicts_within_bounds(
    name: str, trained: Callable[[str], Trained], tampered: Callable[[str], Tampered]
) -> None:
    """A flipped digit of a number leaves a file that its format allows: only the registry's SHA-256 can tell."""
    model = trained(name)
    came = dict(tampered(name).flipped)
    whole = came.pop("whole")
    np.testing.assert_allclose(whole["results"], model.want[:50], rtol=0, atol=1e-6)
    assert whole["forbidden"] == []
    refused = [one for one in came.values() if "results" not in one]
    for outcome in refused:
        assert outcome["forbidden"] == []
        if "PredictionFailed" not in outcome["refused"]:
            refused_by_name(model, outcome)
    assert len(refused) > 10, "some of the flips are seen"


@pytest.mark.parametrize("name", FORMATS)
def test_flips_that_no_format_sees_are_seen_by_the_registry(
    name: str, tmp_path: Path, trained: Callable[[str], Trained]
) -> None:
    definition = trained(name).definition()
    (model,) = definition.declared().models
    registry = Registry(tmp_path / "registry")
    version = version_of(definition, model, {"user_id": "int64"})
    registry.add(definition, [version])
    path = registry.artifacts_dir(version) / trained(name).case.file
    content = bytearray(path.read_bytes())
    rng = random.Random(11)
    path.chmod(0o600)
    for _ in range(30):
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        content[place] ^= bit
        path.write_bytes(content)
        with pytest.raises(VersionDamaged, match=re.escape(path.name)):
            registry.definition(version)
        content[place] ^= bit
    for end in (0, 6, 12):
        path.write_bytes(content[: len(content) - end] + b"." * (end == 0))
        with pytest.raises(VersionDamaged, match=re.escape(path.name)):
            registry.definition(version)
    path.write_bytes(content)
    np.testing.assert_allclose(
        load(registry.definition(version)).predict(trained(name).rows), trained(name).want, rtol=0, atol=1e-6
    )
    registry.close()


@pytest.mark.parametrize("name", FORMATS)
def test_a_pickle_in_its_place_is_refused_and_does_not_run(
    name: str, trained: Callable[[str], Trained], tampered: Callable[[str], Tampered]
) -> None:
    came = tampered(name)
    for outcome in came.pickled.values():
        refused_by_name(trained(name), outcome)
    assert "got a pickle, which may run any code" in came.pickled["protocol4"]["refused"]
    assert not came.ran.exists()


def of_types(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return a skops file with another schema."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        for name in old.namelist():
            schema = old.read(name)
            if name == "schema.json":
                tree = json.loads(schema)
                change(tree)
                schema = json.dumps(tree).encode()
            new.writestr(name, schema)
    return written.getvalue()


def node(loader: str, full_name: str, **more: Any) -> dict[str, Any]:
    module, _, name = full_name.rpartition(".")
    return {"__loader__": loader, "__module__": module, "__class__": name, "__id__": 10**9 + len(full_name), **more}


def constant(value: Any) -> dict[str, Any]:
    return node("JsonNode", "builtins.str", content=json.dumps(value), is_json=True)


def called(*arguments: Any) -> dict[str, Any]:
    return node("TupleNode", "builtins.tuple", content=[constant(a) for a in arguments])


def hostile_nodes(command: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Nodes that would run a command, or make what is not on the list, and the type that they are refused for."""
    empty = node("DictNode", "builtins.dict", content={}, key_types=node("ListNode", "builtins.list", content=[]))
    system = node("FunctionNode", "os.system")
    return {
        "constructor": (node("ConstructorFromReduceNode", "os.system", content=called(command)), "os.system"),
        "eval": (node("ConstructorFromReduceNode", "builtins.eval", content=called("1")), "builtins.eval"),
        "popen": (node("ConstructorFromReduceNode", "subprocess.Popen", content=called(command)), "subprocess.Popen"),
        "function": (system, "os.system"),
        "type": (node("TypeNode", "posix.system"), "posix.system"),
        "object": (node("ObjectNode", "sklearn.svm._classes.SVC", content=empty), "sklearn.svm._classes.SVC"),
        "estimator": (node("ObjectNode", "their.own.Estimator", content=empty), "their.own.Estimator"),
        "partial": (
            node("PartialNode", "functools.partial", content={
                "func": system, "args": called(command), "kwds": empty, "namespace": empty,
            }),
            "functools.partial",
        ),
        "method": (
            node("MethodNode", "builtins.dict", content={"obj": empty, "func": "__class__"}), "builtins.dict.__class__",
        ),
        "operator": (
            node("OperatorFuncNode", "operator.methodcaller", attrs=called("system", command)), "operator.methodcaller",
        ),
        "generator": (
            node("RandomGeneratorNode", "numpy.random._generator.Generator", content={
                "seed_seq": empty,
                "bit_generator": {**empty, "content": {"bit_generator": constant("seed")}},
            }),
            "numpy.random.seed",
        ),
        "loss": (
            node("LossNode", "os.system", __reduce__={"args": called(command)}, content=empty), "os.system",
        ),
        "tree": (
            node("TreeNode", "sklearn.tree._tree.Tree", __reduce__={"args": called(1, 1, 1)}, content=empty),
            "sklearn.tree._tree.Tree",
        ),
        "keys": ({**empty, "key_types": node("ListNode", "builtins.list", content=[system])}, "os.system"),
    }  # fmt: skip


def test_a_skops_file_of_other_types_is_refused_with_their_names_and_makes_none(
    tmp_path: Path, trained: Callable[[str], Trained]
) -> None:
    model = trained("sklearn")
    ran = tmp_path / "ran"
    hostile = hostile_nodes(f"touch {ran}")

    def in_its_place(tree: dict[str, Any], of: dict[str, Any]) -> None:
        rest = {key: tree[key] for key in ("protocol", "_skops_version")}
        tree.clear()
        tree.update(of, **rest)

    def within(tree: dict[str, Any], of: dict[str, Any]) -> None:
        tree["content"]["content"]["memory"] = of

    files, types = {}, {}
    for change in (in_its_place, within):
        for name, (one, type_name) in hostile.items():
            file = f"{name}-{change.__name__}"
            files[file] = of_types(model.content, lambda tree, change=change, one=one: change(tree, one))
            types[file] = type_name
    came = outcomes(tmp_path, model, files)
    assert came.keys() == files.keys()
    for file, outcome in came.items():
        refused_by_name(model, outcome)
        listed = re.search(r"has the types (\[.*\]); only TRUSTED_TYPES are made", outcome["refused"])
        assert listed, outcome
        assert types[file] in ast.literal_eval(listed[1])
    assert not ran.exists()


def test_a_model_that_a_class_of_ones_own_is_part_of_is_loaded_when_that_is_trusted_by_name(
    trained: Callable[[str], Trained],
) -> None:
    forest = trained("sklearn forest")
    with pytest.raises(DeclarationError, match=re.escape("has the types ['sklearn.ensemble._forest.RandomForestClassifier', 'sklearn.tree._classes.DecisionTreeClassifier', 'sklearn.tree._tree.Tree']; only")):  # fmt: skip
        load(replaced(forest, FOREST, "SklearnPredictor"))
    only = "partial(SklearnPredictor, trusted=['sklearn.tree._tree.Tree'])"
    with pytest.raises(DeclarationError, match=re.escape("has the types ['sklearn.ensemble._forest.RandomForestClassifier', 'sklearn.tree._classes.DecisionTreeClassifier']; only")):  # fmt: skip
        load(replaced(forest, FOREST, only))


@pytest.mark.parametrize("version", ["1.5.0", None])
def test_a_model_of_another_scikit_learn_is_refused(version: str | None, trained: Callable[[str], Trained]) -> None:
    model = trained("sklearn")

    def of(value: Any) -> None:
        if isinstance(value, dict):
            if "_sklearn_version" in value and version:
                value["_sklearn_version"] = constant(version)
            elif "_sklearn_version" in value:
                del value["_sklearn_version"]
            value = list(value.values())
        for one in value if isinstance(value, list) else ():
            of(one)

    with pytest.raises(
        DeclarationError, match=rf"artifact `m.skops`: is of scikit-learn {version or 'no version'}; expected 1.9"
    ):
        load(model.definition(of_types(model.content, of)))


def external(where: str, location: str) -> bytes:
    """An ONNX model whose weights lie at another place, told in one of the places where it can be."""
    from onnx import TensorProto as Tensor
    from onnx import helper, numpy_helper

    weights = Tensor(name="w", data_type=Tensor.DOUBLE, dims=[7, 1], data_location=Tensor.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "56")):
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    if where == "unsaid":
        weights.data_location = Tensor.DEFAULT
    if where == "nowhere":
        weights.ClearField("external_data")
    inputs = [helper.make_tensor_value_info("x", Tensor.DOUBLE, [None, 7])]
    outputs = [helper.make_tensor_value_info("y", Tensor.DOUBLE, [None, 1])]
    given, nodes, functions = [], [helper.make_node("MatMul", ["x", "w"], ["y"])], []
    made = helper.make_node("Constant", [], ["w"], value=weights)
    if where == "constant":
        nodes.insert(0, made)
    elif where == "branch":
        then = helper.make_graph([made], "then", [], [helper.make_tensor_value_info("w", Tensor.DOUBLE, [7, 1])])
        given.append(numpy_helper.from_array(np.array(True), "yes"))
        nodes.insert(0, helper.make_node("If", ["yes"], ["w"], then_branch=then, else_branch=then))
    elif where == "function":
        opset = [helper.make_opsetid("", 17)]
        functions.append(helper.make_function("own", "weights", [], ["w"], [made], opset))
        nodes.insert(0, helper.make_node("weights", [], ["w"], domain="own"))
    elif where == "sparse":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=helper.make_sparse_tensor(
            weights, numpy_helper.from_array(np.arange(7), "i"), [7, 1])))  # fmt: skip
    else:
        given.append(weights)
    graph = helper.make_graph(nodes, "g", inputs, outputs, given)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9).SerializeToString()  # type: ignore[no-any-return]


def test_an_onnx_model_with_weights_elsewhere_is_refused(tmp_path: Path, trained: Callable[[str], Trained]) -> None:
    model = trained("onnx")
    (tmp_path / "weights.bin").write_bytes(np.ones(7).tobytes())
    places = {
        "absolute": str(tmp_path / "weights.bin"), "beside": "weights.bin", "above": f"../{tmp_path.name}/weights.bin",
        "memory": "*/_ORT_MEM_ADDR_/*",
    }  # fmt: skip
    kinds = ("initializer", "unsaid", "nowhere", "constant", "branch", "function", "sparse")
    files = {f"{kind}-{name}": external(kind, place) for kind in kinds for name, place in places.items()}
    for outcome in outcomes(tmp_path, model, files).values():
        refused_by_name(model, outcome)
        assert "has weights outside of it (external data); one file holds the whole model" in outcome["refused"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("two inputs", "has the inputs `a` tensor(double), `b` tensor(double); expected one, tensor(float) or tensor(double)"),
        ("integers", "has the inputs `a` tensor(int64); expected one, tensor(float) or tensor(double)"),
        ("two outputs", "has the outputs `y` tensor(double), `z` tensor(double), and no output was named; expected a tensor of floats"),
        ("unknown", "has the outputs `y` tensor(double), `z` tensor(double), and `x` was asked for; expected a tensor of floats"),
    ],
)  # fmt: skip
def test_an_onnx_model_says_what_goes_in_and_out(kind: str, message: str, trained: Callable[[str], Trained]) -> None:
    model = trained("onnx")
    definition = model.definition(small_onnx(kind))
    if kind == "unknown":
        definition = Definition(
            "defs.py",
            model.case.text.replace("=OnnxPredictor", "=partial(OnnxPredictor, output='x')"),
            definition.artifacts,
        )
    with pytest.raises(DeclarationError, match=re.escape(message)):
        load(definition)


def small_onnx(kind: str) -> bytes:
    from onnx import TensorProto as Tensor
    from onnx import helper

    kinds = {"two inputs": ["a", "b"]}.get(kind, ["a"])
    of = Tensor.INT64 if kind == "integers" else Tensor.DOUBLE
    inputs = [helper.make_tensor_value_info(name, of, [None, 7]) for name in kinds]
    outputs = [helper.make_tensor_value_info(name, of, [None, 7]) for name in ("y", "z")]
    nodes = [helper.make_node("Add", ["a", kinds[-1]], ["y"]), helper.make_node("Sub", ["a", kinds[-1]], ["z"])]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()  # type: ignore[no-any-return]


def test_an_output_is_returned_by_its_name(trained: Callable[[str], Trained]) -> None:
    model = trained("onnx")
    text = model.case.text.replace("=OnnxPredictor", "=partial(OnnxPredictor, output='y', all_classes=True)")
    loaded = load(Definition("defs.py", text, {"m.onnx": small_onnx("two outputs")}))
    got = np.array(loaded._predictor.predict(Features(model.rows.matrix, ())))
    assert np.array_equal(got, 2 * model.rows.matrix, equal_nan=True)


def test_a_zipmap_is_told_how_to_leave_it_out(trained: Callable[[str], Trained]) -> None:
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    model = trained("onnx")
    rng = np.random.default_rng(1)
    learner = LogisticRegression().fit(rng.normal(size=(50, 7)), rng.random(50) > 0.5)
    written = to_onnx(learner, np.zeros((1, 7), np.float32)).SerializeToString()
    with pytest.raises(DeclarationError, match=r"seq\(map.* skl2onnx writes one with options=\{'zipmap': False\}"):
        load(model.definition(written))


# -- files that a format allows and its library would follow out of bounds, or for ever


@pytest.mark.parametrize("wrong", ["itself", "the first", "another's child", "nothing", "a number twice", "two trees"])
def test_onnxruntime_is_given_no_tree_with_a_circle(wrong: str, trained: Callable[[str], Trained]) -> None:
    import onnx

    model = trained("onnx of classes")
    graph = onnx.load_from_string(model.content)
    (ensemble,) = (node for node in graph.graph.node if node.op_type == "TreeEnsembleClassifier")
    of = {one.name.removeprefix("nodes_"): one for one in ensemble.attribute}
    trees, ids, true, false = (of[name].ints for name in ("treeids", "nodeids", "truenodeids", "falsenodeids"))
    first, inner, *_ = (i for i, mode in enumerate(of["modes"].strings) if mode != b"LEAF")
    assert (first, trees[inner]) == (0, trees[first])
    if wrong == "itself":
        true[inner] = ids[inner]
    elif wrong == "the first":
        true[inner] = ids[first]
    elif wrong == "another's child":
        true[inner] = false[first]
    elif wrong == "nothing":
        true[inner] = 99_999
    elif wrong == "a number twice":
        ids[3] = ids[2]
    else:
        trees[3] = trees[-1]
    with pytest.raises(DeclarationError, match=r"artifact `m.onnx`: has trees with nodes that lead nowhere; expected"):
        load(model.definition(graph.SerializeToString()))


def lightgbm_lines(content: bytes, name: str, change: Callable[[str], str]) -> bytes:
    """Return the file with the first line of a name changed, and sizes that fit."""
    text = content.decode()
    old = re.search(rf"^{name}=(.*)$", text, re.MULTILINE)
    assert old
    new = text[: old.start(1)] + change(old[1]) + text[old.end(1) :]
    sizes = [
        len(tree) for tree in re.split(r"(?=^Tree=\d+\n)", new.partition("end of trees\n")[0], flags=re.MULTILINE)[1:]
    ]
    return re.sub(r"^tree_sizes=.*$", "tree_sizes=" + " ".join(map(str, sizes)), new, flags=re.MULTILINE).encode()


LIGHTGBM_LINES: dict[str, tuple[str, Callable[[str], str]]] = {
    "feature": ("split_feature", lambda v: re.sub(r"^\d+", "7", v)),
    "negative feature": ("split_feature", lambda v: re.sub(r"^\d+", "-1", v)),
    "child": ("left_child", lambda v: re.sub(r"(?<![-\d])\d+", "99999", v, count=1)),
    "circle": ("left_child", lambda v: re.sub(r"(?<![-\d])\d+", "0", v, count=1)),
    "leaf": ("right_child", lambda v: re.sub(r"-\d+", "-999", v, count=1)),
    "leaves": ("num_leaves", lambda v: "9999"),
    "no leaves": ("num_leaves", lambda v: "0"),
    "few thresholds": ("threshold", lambda v: v.rpartition(" ")[0]),
    "few values": ("leaf_value", lambda v: v.rpartition(" ")[0]),
    "categories": ("num_cat", lambda v: "1"),
    "decision": ("decision_type", lambda v: re.sub(r"^\d+", "1", v)),
    "classes": ("num_class", lambda v: "7"),
    "no class": ("num_tree_per_iteration", lambda v: "0"),
    "classes of the objective": ("objective", lambda v: "multiclass num_class:99"),
    "features": ("max_feature_idx", lambda v: "0"),
    "many features": ("max_feature_idx", lambda v: "1000000000"),
}


def test_lightgbm_is_given_no_tree_that_leads_out_of_bounds(tmp_path: Path, trained: Callable[[str], Trained]) -> None:
    model = trained("lightgbm")
    files = {
        name.replace(" ", "_"): lightgbm_lines(model.content, line, change)
        for name, (line, change) in LIGHTGBM_LINES.items()
    }
    same = outcomes(tmp_path, model, {"same": lightgbm_lines(model.content, "num_cat", str)})["same"]
    np.testing.assert_allclose(same["results"], model.want[:50], rtol=0, atol=1e-6)
    for outcome in outcomes(tmp_path, model, files).values():
        refused_by_name(model, outcome)


def xgboost_changes() -> Iterator[tuple[str, Callable[[Any], None]]]:
    def in_tree(name: str, value: Any) -> Callable[[Any], None]:
        def change(learner: Any) -> None:
            learner["gradient_booster"]["model"]["trees"][0][name][0] = value

        return change

    yield "child", in_tree("left_children", 99_999)
    yield "circle", in_tree("left_children", 0)
    yield "half", in_tree("left_children", -1)
    yield "negative", in_tree("left_children", -7)
    yield "feature", in_tree("split_indices", 7)
    yield "category", in_tree("split_type", 1)
    yield "parent", in_tree("parents", 10**6)
    yield "place", lambda learner: learner["gradient_booster"]["model"]["trees"][0].update(id=1)
    yield "lengths", lambda learner: learner["gradient_booster"]["model"]["trees"][0]["base_weights"].pop()
    yield "trees", lambda learner: learner["gradient_booster"]["model"]["trees"].pop()
    yield "groups", lambda learner: learner["gradient_booster"]["model"]["tree_info"].__setitem__(0, 9)
    yield "steps", lambda learner: learner["gradient_booster"]["model"]["iteration_indptr"].__setitem__(-1, 99)
    yield "classes", lambda learner: learner["learner_model_param"].update(num_class="1000000000")
    yield (
        "nodes",
        lambda learner: learner["gradient_booster"]["model"]["trees"][0]["tree_param"].update(num_nodes="5000"),
    )
    yield "linear", lambda learner: learner["gradient_booster"].update(name="gblinear")
    yield "objective", lambda learner: learner["objective"].update(name="no:such")


def test_xgboost_is_given_no_tree_that_leads_out_of_bounds(tmp_path: Path, trained: Callable[[str], Trained]) -> None:
    model = trained("xgboost")
    files = {}
    for name, change in xgboost_changes():
        document = json.loads(model.content)
        change(document["learner"])
        files[name] = json.dumps(document).encode()
    for outcome in outcomes(tmp_path, model, files).values():
        refused_by_name(model, outcome)


def test_ubjson_is_read_as_the_json_that_the_library_writes_of_the_same_model(
    trained: Callable[[str], Trained],
) -> None:
    import xgboost

    content = trained("xgboost ubj").content
    booster = xgboost.Booster()
    booster.load_model(bytearray(content))
    close = pytest.approx

    def same(a: Any, b: Any) -> None:
        assert type(a) is type(b) or {type(a), type(b)} <= {int, float, bool}
        if isinstance(a, dict):
            assert a.keys() == b.keys()
        if isinstance(a, dict | list):
            assert len(a) == len(b)
            for key in a if isinstance(a, dict) else range(len(a)):
                same(a[key], b[key])
        else:
            assert a == (close(b, rel=1e-6) if isinstance(b, float) else b)

    same(read_ubjson(content), json.loads(booster.save_raw("json")))


def cpu_ns() -> dict[str, int]:
    """What each thread of this process has run."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in Path("/proc/self/task").iterdir()}


def share_of_others(predictor: Any, features: Features, calls: int) -> float:
    """The share of what this process runs meanwhile that other threads than this one do."""
    before, me = cpu_ns(), str(threading.get_native_id())
    for _ in range(calls):
        predictor.predict(features)
    ran = {task: ns - before.get(task, 0) for task, ns in cpu_ns().items()}
    return 1 - ran[me] / sum(ran.values())


@pytest.mark.parametrize("name", ["onnx of classes", "lightgbm", "xgboost"])
def test_a_predictor_takes_one_thread_unless_told_otherwise(name: str, trained: Callable[[str], Trained]) -> None:
    model = trained(name)
    features = Features(np.tile(model.rows.matrix, (40, 1)), ())
    one, two = load(model.definition())._predictor, with_threads(model, 2)
    for predictor in (one, two):
        predictor.predict(features)  # whatever threads there will be are there
    calls = 5
    # On a busy machine one thread may do the work of both for a while, and threads of others, such as Ray's, do a little
    # of something meanwhile: the longer it is looked at, the less.
    while True:
        of_one, of_two = (share_of_others(predictor, features, calls) for predictor in (one, two))
        if of_two >= 0.2 and of_one < of_two / 2:
            return
        calls *= 2
        assert calls < 1_000, (of_one, of_two)


def with_threads(model: Trained, threads: int) -> Any:
    case = replace(model.case, predictor=f"partial({model.case.predictor}, threads={threads})")
    return load(replace(model, case=case).definition())._predictor


def test_a_model_that_was_trained_in_several_processes_predicts_in_one(trained: Callable[[str], Trained]) -> None:
    predictor = load(trained("sklearn forest").definition())._predictor
    assert predictor._predict.__self__.n_jobs == 1
    assert skops_forest().n_jobs == 2


# -- no unpickling


PICKLES = {"pickle", "_pickle", "cPickle", "joblib", "cloudpickle", "marshal", "dill", "shelve", "torch", "jsonpickle"}
CALLS = {"read_pickle", "to_pickle", "Unpickler"}


def unpickling(tree: ast.AST) -> Iterator[int]:
    """The lines of what imports or calls something that unpickles."""
    for one in ast.walk(tree):
        if isinstance(one, ast.Import) and {a.name.split(".")[0] for a in one.names} & PICKLES:
            yield one.lineno
        elif isinstance(one, ast.ImportFrom):
            if (one.module or "").split(".")[0] in PICKLES or {a.name for a in one.names} & (PICKLES | CALLS):
                yield one.lineno
        elif isinstance(one, ast.Call):
            name = one.func.attr if isinstance(one.func, ast.Attribute) else getattr(one.func, "id", "")
            first = one.args[0].value if one.args and isinstance(one.args[0], ast.Constant) else None
            imports = name in ("import_module", "__import__", "library") and str(first).split(".")[0] in PICKLES
            allows = [k.value for k in one.keywords if k.arg == "allow_pickle"]
            if name in CALLS or imports or any(not isinstance(v, ast.Constant) or v.value is not False for v in allows):
                yield one.lineno


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import pickle", True), ("import os, joblib.memory", True), ("from cloudpickle import load", True),
        ("from sklearn.externals import joblib", True), ("import torch", True), ("pd.read_pickle(p)", True),
        ("importlib.import_module('pickle')", True), ("__import__('marshal')", True),
        ("np.load(p, allow_pickle=True)", True), ("np.load(p, allow_pickle=yes)", True),
        ("np.load(p, allow_pickle=False)", False), ("np.load(p)", False), ("import numpy", False), ("load('x')", False),
    ],
)  # fmt: skip
def test_unpickling_is_found_where_it_is(code: str, found: bool) -> None:
    assert any(unpickling(ast.parse(code))) == found


def test_nothing_that_serves_unpickles() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("feature_actors", "models", "deployments", "cluster")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in unpickling(ast.parse(path.read_text(), str(path)))
    ]
    assert found == []
