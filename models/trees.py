"""Boosted trees as plain arrays: a model format that is data, read without unpickling.

`save_trees` writes a trained scikit-learn HistGradientBoostingClassifier, `BoostedTrees` predicts from
the file what `predict_proba(...)[:, 1]` would. The sum over trees is made tree by tree, so a row's
score does not depend on which other rows are asked with it.

The kernel follows the trees without a check, so a file is checked as a whole when it is loaded: no step leads out of
its tree or back, and a row has the columns that are looked at.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from millpond.models.features import Features
from millpond.models.formats.model_file import ModelFileRefused, read_file

__all__ = ["BoostedTrees", "save_trees"]

#: The arrays [trees, nodes] in the order in which the kernel takes them: what scikit-learn calls them, and their type.
_ARRAYS: dict[str, tuple[str, Any]] = {
    "field": ("feature_idx", np.int32),
    "threshold": ("num_threshold", np.float64),
    "left": ("left", np.int32),
    "right": ("right", np.int32),
    "null_left": ("missing_go_to_left", np.bool_),
    "value": ("value", np.float64),
}


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _margins(
    matrix: Any, field: Any, threshold: Any, left: Any, right: Any, null_left: Any, value: Any, base: Any
) -> Any:
    out = np.empty(matrix.shape[0])
    for row in range(matrix.shape[0]):
        total = base
        for tree in range(field.shape[0]):
            node = 0
            while field[tree, node] >= 0:
                x = matrix[row, field[tree, node]]
                go_left = null_left[tree, node] if np.isnan(x) else x <= threshold[tree, node]
                node = left[tree, node] if go_left else right[tree, node]
            total += value[tree, node]
        out[row] = total
    return out


def save_trees(classifier: Any, path: str) -> None:
    """Write a trained binary HistGradientBoostingClassifier without categorical features to an .npz file.

    Arrays are [trees, nodes]; `field` is -1 in a leaf, and a tree with fewer nodes is filled up with zeros. `columns`
    is how many it was trained with. scikit-learn publishes no access to its trees: the private attributes are those
    of the version that this project pins.
    """
    trees = [one.nodes for (one,) in classifier._predictors]
    arrays: dict[str, Any] = {}
    for name, (of, kind) in _ARRAYS.items():
        arrays[name] = np.zeros((len(trees), max(map(len, trees))), kind)
        for t, nodes in enumerate(trees):
            arrays[name][t, : len(nodes)] = nodes[of]
            if name == "field":
                arrays[name][t, : len(nodes)][nodes["is_leaf"].astype(bool)] = -1
    arrays["base"] = np.float64(classifier._baseline_prediction.item())
    arrays["columns"] = np.int64(classifier.n_features_in_)
    with open(path, "wb") as file:
        np.savez(file, **arrays)


class BoostedTrees:
    """Predict the probability of the positive class: float64 [n] for float64 [n, features].

    Raises `ModelFileRefused` if the file breaks a rule.
    """

    def __init__(self, trees: str) -> None:
        content = read_file(trees, "trees as `save_trees` writes them")
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                read = {name: np.ascontiguousarray(file[name]) for name in _ARRAYS}
                base = file["base"]
                columns = file.get("columns")  # which a file of a former version has not
        except Exception as error:
            raise ModelFileRefused(
                trees,
                f"broken file of trees: {type(error).__name__}: {error}",
                "expected one as `save_trees` writes it",
            ) from error
        if base.dtype != np.float64 or base.shape != () or not np.isfinite(base):
            raise ModelFileRefused(trees, f"`base` is {base!r}", "expected one finite float64")
        needed = _check(trees, read)
        if columns is not None and (columns.dtype != np.int64 or columns.shape != () or columns < needed):
            raise ModelFileRefused(
                trees, f"`columns` is {columns!r}", f"expected one int64, {needed} at least, as trees look at so many"
            )
        self._base, self._arrays = float(base), tuple(read.values())
        #: How many a matrix must have: exactly, or at least where the file does not say what it was trained with.
        self._columns, self._exactly = needed if columns is None else int(columns), columns is not None

    def predict(self, features: Features) -> npt.NDArray[np.float64]:
        """Raises `ValueError` if the matrix has another number of columns than the trees were trained with."""
        columns = features.matrix.shape[1]
        is_wrong = columns != self._columns if self._exactly else columns < self._columns
        if is_wrong:  # it would read past the end of a row, or of other columns
            allowed = "were trained with" if self._exactly else "look at"
            raise ValueError(f"features: got {columns} columns; the trees {allowed} {self._columns}")
        margins = _margins(np.ascontiguousarray(features.matrix), *self._arrays, self._base)
        return 1.0 / (1.0 + np.exp(-margins))  # type: ignore[no-any-return]


def _check(path: str, arrays: Mapping[str, npt.NDArray[Any]]) -> int:
    """Return how many columns trees look at. Raises `ModelFileRefused` that names array or node, and the rule."""
    field, threshold, left, right, _, value = arrays.values()
    for name, (_, kind) in _ARRAYS.items():
        one = arrays[name]
        if one.dtype != kind or one.ndim != 2 or one.shape != field.shape or 0 in one.shape:
            raise ModelFileRefused(
                path, f"`{name}` is {one.dtype} {list(one.shape)}",
                f"expected {np.dtype(kind)} [trees, nodes], one each at least, and the same for all arrays",
            )  # fmt: skip

    def refuse(wrong: npt.NDArray[np.bool_], found: str, rule: str, *of: npt.NDArray[Any]) -> None:
        if wrong.any():
            tree, node = np.argwhere(wrong)[0]
            values = [one[tree, node] for one in of]
            raise ModelFileRefused(path, f"tree {tree}, node {node}: {found.format(*values)}", f"expected {rule}")

    nodes = np.arange(field.shape[1])
    filling = (field == 0) & (left == 0) & (right == 0) & (nodes > 0)
    split = (field >= 0) & ~filling
    refuse(field < -1, "it looks at column {}", "0 and on, or -1 in a leaf", field)
    parents = np.zeros(field.shape, np.int64)
    for child in (left, right):
        wrong = split & ((child <= nodes) | (child >= len(nodes)))
        refuse(wrong, "it leads to node {}", f"one after it, of {len(nodes)}", child)
        np.add.at(parents, (np.nonzero(split)[0], child[split]), 1)
    refuse(
        parents != (~filling & (nodes > 0)),
        "{} nodes lead to it",
        "one, and none to the root and what is no node",
        parents,
    )
    refuse(split & np.isnan(threshold), "its threshold is {}", "a number", threshold)
    refuse((field < 0) & ~np.isfinite(value), "its value is {}", "a finite number", value)
    return int(field.max(initial=-1, where=split)) + 1
