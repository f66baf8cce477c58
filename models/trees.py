"""Boosted trees as plain arrays: a model format that is data, read without unpickling.

`save_trees` writes a trained scikit-learn HistGradientBoostingClassifier, `BoostedTrees` predicts from
the file what `predict_proba(...)[:, 1]` would. The sum over trees is made tree by tree, so a row's
score does not depend on which other rows are asked with it.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from millpond.models.features import Features

__all__ = ["BoostedTrees", "save_trees"]


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

    Arrays are [trees, nodes]; `field` is -1 in a leaf. scikit-learn publishes no access to its trees:
    the private attributes are those of the version that this project pins.
    """
    trees = [one.nodes for (one,) in classifier._predictors]
    arrays: dict[str, Any] = {}
    for name, of, kind in (
        ("threshold", "num_threshold", np.float64),
        ("left", "left", np.int32),
        ("right", "right", np.int32),
        ("null_left", "missing_go_to_left", np.bool_),
        ("value", "value", np.float64),
        ("field", "feature_idx", np.int32),
    ):
        arrays[name] = np.zeros((len(trees), max(map(len, trees))), kind)
        for t, nodes in enumerate(trees):
            arrays[name][t, : len(nodes)] = nodes[of]
            if name == "field":
                arrays[name][t, : len(nodes)][nodes["is_leaf"].astype(bool)] = -1
    with open(path, "wb") as file:
        arrays["base"] = np.float64(classifier._baseline_prediction.item())
        np.savez(file, **arrays)


class BoostedTrees:
    """Predict the probability of the positive class: float64 [n] for float64 [n, features]."""

    def __init__(self, trees: str) -> None:
        with np.load(trees, allow_pickle=False) as arrays:
            self._base = float(arrays["base"])
            self._arrays = tuple(arrays[name] for name in ("field", "threshold", "left", "right", "null_left", "value"))

    def predict(self, features: Features) -> npt.NDArray[np.float64]:
        margins = _margins(np.ascontiguousarray(features.matrix), *self._arrays, self._base)
        return 1.0 / (1.0 + np.exp(-margins))  # type: ignore[no-any-return]
