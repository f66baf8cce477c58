# ruff: noqa: E501  (messages stand whole)
"""Boosted trees: they predict what scikit-learn does, and a file that would lead the kernel astray is refused."""

from __future__ import annotations

import itertools
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.models import Features
from millpond.models.formats import ModelFileRefused
from millpond.models.trees import BoostedTrees, save_trees


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, BoostedTrees]:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(1)
    matrix = random_matrix(rng, 3_000)
    label = (np.nansum(matrix[:, :3], axis=1) + rng.normal(size=3_000) > 0) ^ np.isnan(matrix[:, 4])
    with threadpool_limits(1, user_api="openmp"):  # for matrices this small more threads only wait for each other
        learner = HistGradientBoostingClassifier(max_iter=40, max_leaf_nodes=9, early_stopping=False).fit(matrix, label)
    path = tmp_path_factory.mktemp("trees") / "trees.npz"
    save_trees(learner, str(path))
    return learner, BoostedTrees(str(path))


def random_matrix(rng: np.random.Generator, n: int) -> npt.NDArray[np.float64]:
    matrix = rng.normal(size=(n, 5)) * [1, 10, 0.1, 1e6, 1]
    matrix[:, 1] = np.round(matrix[:, 1])
    matrix[rng.random((n, 5)) < 0.15] = np.nan
    return matrix


def test_trees_predict_what_scikit_learn_does(forest: tuple[Any, BoostedTrees]) -> None:
    learner, trees = forest
    matrix = random_matrix(np.random.default_rng(2), 20_000)
    matrix[:50] = np.nan
    matrix[50:60] = np.finfo(float).max
    want = learner.predict_proba(matrix)[:, 1]
    np.testing.assert_allclose(trees.predict(Features(matrix, ())), want, rtol=0, atol=1e-12)
    assert want.std() > 0.1


def test_trees_go_the_same_way_on_the_thresholds_themselves(forest: tuple[Any, BoostedTrees]) -> None:
    learner, trees = forest
    rows = []
    for (tree,) in learner._predictors:
        for node in tree.nodes:
            if not node["is_leaf"]:
                for value in (
                    node["num_threshold"],
                    np.nextafter(node["num_threshold"], np.inf),
                    np.nextafter(node["num_threshold"], -np.inf),
                ):
                    row = np.zeros(5)
                    row[node["feature_idx"]] = value
                    rows.append(row)
    matrix = np.array(rows)
    np.testing.assert_allclose(
        trees.predict(Features(matrix, ())), learner.predict_proba(matrix)[:, 1], rtol=0, atol=1e-12
    )


def test_a_rows_score_does_not_depend_on_the_other_rows(forest: tuple[Any, BoostedTrees]) -> None:
    _, trees = forest
    matrix = random_matrix(np.random.default_rng(3), 257)
    together = trees.predict(Features(matrix, ()))
    alone = np.concatenate([trees.predict(Features(matrix[i : i + 1], ())) for i in range(len(matrix))])
    assert together.tobytes() == alone.tobytes()


# -- what is refused


def test_a_matrix_with_another_number_of_columns_is_refused(forest: tuple[Any, BoostedTrees]) -> None:
    for columns in (0, 4, 6):
        with pytest.raises(ValueError, match=f"^features: got {columns} columns; the trees were trained with 5$"):
            forest[1].predict(Features(np.zeros((2, columns)), ()))


def three_trees(**changed: Any) -> dict[str, Any]:
    """Arrays of three trees: of a root and two leaves, of a leaf, of five nodes."""
    arrays = {
        "field": [[1, -1, -1, 0, 0], [-1, 0, 0, 0, 0], [2, 0, -1, -1, -1]],
        "left": [[1, 0, 0, 0, 0], [0] * 5, [1, 2, 0, 0, 0]], "right": [[2, 0, 0, 0, 0], [0] * 5, [4, 3, 0, 0, 0]],
    }  # fmt: skip
    made: dict[str, Any] = {name: np.array(rows, np.int32) for name, rows in arrays.items()}
    made |= {"threshold": np.full((3, 5), 0.5), "null_left": np.zeros((3, 5), np.bool_)}
    made |= {"value": np.arange(15.0).reshape(3, 5), "base": np.float64(0.5), "columns": np.int64(3)}
    return made | changed


def put(name: str, tree: int, node: int, value: Any) -> dict[str, Any]:
    """Return three trees of which one value is another."""
    arrays = three_trees()
    arrays[name][tree, node] = value
    return arrays


def trees_in(path: Path, arrays: dict[str, Any]) -> BoostedTrees:
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return BoostedTrees(str(path))


def test_trees_of_different_sizes_are_followed_each_to_its_end(tmp_path: Path) -> None:
    matrix = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [np.nan, np.nan, np.nan]])
    margins = 0.5 + np.array([1 + 5 + 12, 1 + 5 + 13, 2 + 5 + 14, 2 + 5 + 14])
    trees = trees_in(tmp_path / "trees.npz", three_trees())
    np.testing.assert_allclose(trees.predict(Features(matrix, ())), 1 / (1 + np.exp(-margins)), rtol=1e-12)
    # A file of a former version does not say how many columns it was trained with.
    former = three_trees()
    del former["columns"]
    trees = trees_in(tmp_path / "former.npz", former)
    assert (
        trees.predict(Features(np.hstack([matrix, matrix]), ())).tolist()
        == trees.predict(Features(matrix, ())).tolist()
    )
    with pytest.raises(ValueError, match=r"^features: got 2 columns; the trees look at 3$"):
        trees.predict(Features(matrix[:, :2], ()))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (put("left", 0, 0, 5), "tree 0, node 0: it leads to node 5; expected one after it, of 5"),
        (put("right", 2, 1, -1), "tree 2, node 1: it leads to node -1; expected one after it, of 5"),
        (put("left", 0, 0, 0), "tree 0, node 0: it leads to node 0; expected one after it, of 5"),
        (put("right", 2, 1, 1), "tree 2, node 1: it leads to node 1; expected one after it, of 5"),
        (put("right", 2, 1, 0), "tree 2, node 1: it leads to node 0; expected one after it, of 5"),
        (put("field", 1, 0, 0), "tree 1, node 0: it leads to node 0; expected one after it, of 5"),
        (put("right", 2, 1, 4), "tree 2, node 3: 0 nodes lead to it; expected one, and none to the root and what is no node"),
        (put("right", 2, 1, 2), "tree 2, node 2: 2 nodes lead to it; expected one, and none to the root"),
        (put("right", 0, 0, 3), "tree 0, node 2: 0 nodes lead to it; expected one"),
        (put("field", 0, 2, 0), "tree 0, node 2: 1 nodes lead to it; expected one, and none to the root and what is no node"),
        (put("field", 0, 3, -1), "tree 0, node 3: 0 nodes lead to it; expected one"),
        (put("field", 2, 0, -2), "tree 2, node 0: it looks at column -2; expected 0 and on, or -1 in a leaf"),
        (put("field", 2, 0, 3), "`columns` is array(3); expected one int64, 4 at least, as trees look at so many"),
        (put("threshold", 2, 1, np.nan), "tree 2, node 1: its threshold is nan; expected a number"),
        (put("value", 1, 0, np.inf), "tree 1, node 0: its value is inf; expected a finite number"),
        (three_trees(base=np.float64(np.nan)), "`base` is array(nan); expected one finite float64"),
        (three_trees(base=np.zeros(2)), "`base` is array([0., 0.]); expected one finite float64"),
        (three_trees(columns=np.float64(3)), "`columns` is array(3.); expected one int64, 3 at least"),
        (three_trees(left=np.zeros((3, 5))), "`left` is float64 [3, 5]; expected int32 [trees, nodes], one each at least"),
        (three_trees(right=np.zeros((2, 5), np.int32)), "`right` is int32 [2, 5]; expected int32 [trees, nodes]"),
        (three_trees(field=np.zeros(5, np.int32)), "`field` is int32 [5]; expected int32 [trees, nodes]"),
        (three_trees(field=np.zeros((0, 5), np.int32)), "`field` is int32 [0, 5]; expected int32 [trees, nodes]"),
        (three_trees(value=np.zeros((3, 5), np.dtype(">f8"))), "`value` is >f8 [3, 5]; expected float64 [trees, nodes]"),
        ({"field": np.zeros((1, 1), np.int32)}, "broken file of trees: KeyError: "),
        (three_trees(value=np.full((3, 5), None)), "broken file of trees: ValueError: Object arrays cannot be loaded"),
    ],
)  # fmt: skip
def test_a_file_of_trees_that_breaks_a_rule_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileRefused) as refused:
        trees_in(tmp_path / "late.npz", arrays)
    assert str(refused.value).startswith(f"artifact `late.npz`: {message}")


@given(st.data())
def test_what_is_loaded_of_trees_that_were_tampered_with_ends_within_bounds(data: st.DataObject) -> None:
    """Followed in Python, which checks each step, they say what the kernel does."""
    arrays = three_trees()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(["field", "left", "right"]))
        at = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 4)))
        arrays[name][at] = data.draw(st.integers(-2, 6))
    arrays["columns"] = np.int64(data.draw(st.integers(0, 7)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            trees = trees_in(Path(folder) / "trees.npz", arrays)
        except ModelFileRefused:
            return
    matrix = np.random.default_rng(0).uniform(size=(8, int(arrays["columns"])))
    margins = np.full(8, arrays["base"])
    for row, tree in itertools.product(range(8), range(3)):
        node, steps = 0, 0
        while (column := arrays["field"][tree, node]) >= 0:
            go_left = matrix[row, column] <= arrays["threshold"][tree, node]
            node, steps = arrays["left" if go_left else "right"][tree, node], steps + 1
            assert node < 5
            assert steps < 5
        margins[row] += arrays["value"][tree, node]
    np.testing.assert_allclose(trees.predict(Features(matrix, ())), 1 / (1 + np.exp(-margins)), rtol=1e-12)


@pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps([1]), b"no trees"])
def test_what_is_no_file_of_trees_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "late.npz").write_bytes(content)
    with pytest.raises(
        ModelFileRefused, match=r"^artifact `late.npz`: (got an empty|got a pickle|broken file of trees)"
    ):
        BoostedTrees(str(tmp_path / "late.npz"))
