"""`millpond train-set`: labels of a file in, features of a model beside them out, from a cluster or from files."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from check_directory import DEFINITION, PAYMENTS, Stopped, events

from millpond.cluster.cli import main
from millpond.cluster.ray_workers import JoinWorker, Order
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.layout import compile_layout
from millpond.models.definition import Definition

MODELS = """
from millpond.models import Model
class Nothing:
    def predict(self, features):
        return features.matrix[:, 0]
spender = Model("spender", version="3", owner="tests", features=[BY_USER["n"], BY_USER["sum"]], predictor=Nothing)
"""
SHOPS = """
shops = Model("shops", owner="tests", features=[BY_SHOP["n"], BY_SHOP["last"]], predictor=Nothing)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with definitions, labels, and the past of a stopped cluster `dev`, from which commands are run."""
    monkeypatch.chdir(tmp_path)
    stopped = Stopped(tmp_path, n_shards=2, snapshots=(4,), history=True)
    (tmp_path / ".millpond").mkdir()
    stopped.path.rename(tmp_path / ".millpond" / "dev")
    (tmp_path / "one.py").write_text(DEFINITION + MODELS)
    (tmp_path / "two.py").write_text(DEFINITION + MODELS + SHOPS)
    at = pa.array([60_000, 600_000, 0], pa.timestamp("ms", "UTC"))
    pq.write_table(pa.table({"user": [1, 1, 5], "late": [True, False, None], "when": at}), "labels.parquet")
    sent = [event for number in range(10) for event in events(number)]
    pq.write_table(pa.Table.from_pylist(sent, PAYMENTS.schema), "payments.parquet")
    return tmp_path


def train_set(*arguments: str, file: str = "one.py") -> int:
    return main(["train-set", file, "--labels", "labels.parquet", "-o", "out.parquet", "--as-of", "when", *arguments])


def test_the_past_of_the_cluster_or_files_make_the_same_training_set(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_set() == 0
    assert capsys.readouterr().out == (
        "out.parquet: 3 labels with 2 features of `spender`, by event time\n  60 events of `payments`\n"
    )
    of_cluster = pq.read_table("out.parquet")
    assert of_cluster.column_names == ["user", "late", "when", "features_as_of", "by_user.n", "by_user.sum", "unknown"]
    assert of_cluster["by_user.n"].to_pylist() == [2, 8, 1]
    assert train_set("--events", "payments=payments.parquet", "--threads", "3") == 0
    assert pq.read_table("out.parquet").equals(of_cluster)


def test_it_says_where_a_training_set_comes_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_set("--knowledge", "arrival", "--model", "shops", "--json", file="two.py") == 1
    assert "labels have no column `shop`" in capsys.readouterr().err
    assert train_set("--knowledge", "arrival", "--model", "spender", "--json", file="two.py") == 0
    made = json.loads(capsys.readouterr().out)
    assert json.loads(pq.read_schema("out.parquet").metadata[b"millpond"]) == made
    assert made["definition"] == {"file": "two.py", "digest": Definition.read(folder / "two.py").digest}
    assert made["model"] == {"name": "spender", "version": "3"}
    assert made["cluster"] == {"name": "dev", "id": "tests"}
    assert (made["knowledge"], made["as_of"], made["labels"]) == ("arrival", "when", 3)
    # All of a minute came at its end.
    assert pq.read_table("out.parquet")["by_user.n"].to_pylist() == [1, 8, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "prod"], "data directory: `FOLDER/.millpond/prod` is none of a cluster; it has no `manifest.json`"),
        (["--events", "payments"], "--events: got 'payments'; expected SOURCE=FILE.parquet"),
        (["--events", "payments=a", "--events", "payments=b"],
         "--events: source `payments` is given twice; put its events into one file"),
        (["--events", "payment=payments.parquet"],
         "training set: no events of source `payments`; given are ['payment']"),
        (["--threads", "0"], "--threads: got 0; allowed is 1 to 64"),
        (["--ray", "up"], "--ray up: no cluster `dev` runs on FOLDER/.millpond/dev; start one with `millpond up`, "
         "or leave `--ray` out for threads"),
        (["--ray", "ray://there:10001"], "--ray: got 'ray://there:10001'; allowed is HOST:PORT, or `up`"),
        (["--ray", "127.0.0.1:1"], "--ray: nobody listens at `127.0.0.1:1` ([Errno 111] Connection refused); start "
         "Ray, or leave `--ray` out for threads"),
        (["--as-of", "at"], "training set: labels have no column `at`; they have ['user', 'late', 'when']"),
        (["--model", "spendr"],
         "no model `spendr` in `one.py`; known: `spender`; did you mean `spender`?"),
        (["--history", "off"], None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str | None
) -> None:
    status, said = train_set(*arguments), capsys.readouterr().err
    if message is None:  # the logs of these shards begin at their beginning
        assert status == 0
        return
    assert status == 1
    assert said.splitlines()[-1] == f"millpond: {message.replace('FOLDER', str(folder))}"
    assert not (folder / "out.parquet").exists()


def test_a_worker_of_another_millpond_or_of_other_views_is_refused(folder: Path) -> None:
    text = DEFINITION + MODELS
    (model,) = Definition("one.py", text).declared().models
    layout = compile_layout([], [feature.view for feature in model.features])
    order = Order("one.py", text, "spender", version("millpond"), layout.digest, nice=0)
    JoinWorker().open(order, 0, 1)
    for other in (order._replace(version="0.0.1"), order._replace(layout_digest=7)):
        with pytest.raises(Unavailable, match=r"a worker of Ray has millpond .*; install the same on all"):
            JoinWorker().open(other, 0, 1)


def test_one_of_several_models_has_to_be_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_set(file="two.py") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "millpond: definition `two.py` has 2 models; name one with `--model`: spender, shops"
    )
