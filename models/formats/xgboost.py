"""XGBoost: the JSON or UBJSON file of `Booster.save_model`.

XGBoost follows the lengths and node numbers of a file without a check of all of them. So the file is read here and
checked, and XGBoost is given the JSON of what has been checked.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.models.features import Features
from millpond.models.formats.model_file import ModelFileRefused, is_tree, library, one_per_row, read_file
from millpond.models.formats.ubjson import read_ubjson

__all__ = ["XGBoostPredictor"]

_OF_NODES = (
    "left_children", "right_children", "parents", "split_indices", "split_type", "split_conditions", "default_left",
    "base_weights", "loss_changes", "sum_hessian",
)  # fmt: skip
#: Of the root.
_NO_PARENT = 2**31 - 1


class XGBoostPredictor:
    """Predict with an XGBoost booster of numeric splits, saved as .json or .ubj. Its objective is applied.

    A model that stopped early predicts with the trees up to its best iteration, as its scikit-learn wrapper does.
    """

    def __init__(self, model: str, *, all_classes: bool = False, threads: int = 1) -> None:
        xgboost = library("xgboost", "XGBoost", "xgboost")
        content = read_file(model, "an XGBoost JSON or UBJSON file")
        try:
            if content[:1] != b"{":
                raise ValueError("it does not begin with {")
            # After a brace JSON has a quote, or white space before it; UBJSON the type of a length.
            document = json.loads(content) if content[1:2] in b'"\t\n\r ' else read_ubjson(content)
            self._features = _check(document)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ModelFileRefused(
                model, f"broken XGBoost file: {type(error).__name__}: {error}",
                "expected one whole, as Booster.save_model writes it, of trees with numeric splits",
            ) from error  # fmt: skip
        try:
            self._booster = xgboost.Booster({"nthread": threads, "device": "cpu"})
            self._booster.load_model(bytearray(json.dumps(document).encode()))
            self._booster.set_param({"nthread": threads, "device": "cpu"})
            best = self._booster.attr("best_iteration")
            self._iterations = (0, 0 if best is None else int(best) + 1)
        except Exception as error:
            raise ModelFileRefused(model, f"xgboost: {str(error).strip()}", "expected a model that it loads") from error
        self._all_classes = all_classes

    def predict(self, features: Features) -> npt.NDArray[np.float64]:
        matrix = features.matrix
        if matrix.shape[1] != self._features:  # it would read past the end of a row
            raise ValueError(f"the model takes {self._features} features, got {matrix.shape[1]}")
        predicted = self._booster.inplace_predict(matrix, iteration_range=self._iterations, validate_features=False)
        return one_per_row(predicted, self._all_classes)


def _check(document: Any) -> int:
    """Return the number of features. Raises `ValueError`, `KeyError` or `TypeError` for what breaks a rule."""
    learner = document["learner"]
    of_learner, booster = learner["learner_model_param"], learner["gradient_booster"]
    if booster["name"] == "dart":
        booster = {**booster["gbtree"], "weight_drop": booster["weight_drop"]}
    elif booster["name"] != "gbtree":
        raise ValueError(f"booster `{booster['name']}` is neither `gbtree` nor `dart`")
    model = booster["model"]
    features, trees, groups = int(of_learner["num_feature"]), model["trees"], model["tree_info"]
    n_groups = max(int(of_learner["num_class"]), int(of_learner.get("num_target", 1)), 1)
    if not trees or int(model["gbtree_model_param"]["num_trees"]) != len(trees) or len(groups) != len(trees):
        raise ValueError("another number of trees than it says")
    if (
        n_groups > len(trees)
        or set(groups) != set(range(n_groups))
        or len(booster.get("weight_drop", trees)) != len(trees)
    ):
        raise ValueError(f"trees are not of {n_groups} classes")
    steps = np.array(model.get("iteration_indptr", [0, len(trees)]))
    if steps[0] != 0 or steps[-1] != len(trees) or (np.diff(steps) < 0).any():
        raise ValueError("iterations are not of its trees")
    if model.get("cats", {}).get("enc"):
        raise ValueError("it has categories")
    for number, tree in enumerate(trees):
        _check_tree(tree, number, features)
    return features


def _check_tree(tree: Any, number: int, features: int) -> None:
    n = int(tree["tree_param"]["num_nodes"])
    if any(len(tree[name]) != n for name in _OF_NODES) or n < 1 or tree["id"] != number:
        raise ValueError(f"tree {number} has not {n} nodes, or not its place")
    if any(tree["split_type"]) or tree["categories"] or int(tree["tree_param"]["size_leaf_vector"]) > 1:
        raise ValueError(f"tree {number} has categorical splits or leaves of several values")
    left, right, split = (
        np.array(tree[name], np.int64) for name in ("left_children", "right_children", "split_indices")
    )
    nodes = np.flatnonzero(left != -1)
    children, parents = np.concatenate([left[nodes], right[nodes]]), np.array(tree["parents"], np.int64)
    if (
        not np.array_equal(nodes, np.flatnonzero(right != -1))
        or not is_tree(children, n)
        or not np.array_equal(parents[children], np.tile(nodes, 2))
        or not (((parents >= 0) & (parents < n)) | (parents == _NO_PARENT)).all()
        or not ((split[nodes] >= 0) & (split[nodes] < features)).all()
    ):
        raise ValueError(f"tree {number} has nodes that lead nowhere")
