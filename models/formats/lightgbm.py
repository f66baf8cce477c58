"""LightGBM: the text file of `Booster.save_model`.

LightGBM follows the sizes and node numbers of a file without a check, and ends the process where they lead out of
bounds. So all of them are checked before it sees the file, and it is given no more of it than the trees.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.models.features import Features
from millpond.models.formats.model_file import ModelFileRefused, is_tree, library, one_per_row, read_file

__all__ = ["LightGBMPredictor"]

#: Fields of a tree by how many values each has, for L leaves: L, or L - 1 nodes.
_OF_LEAVES = ("leaf_value", "leaf_weight", "leaf_count")
_OF_NODES = (
    "split_feature", "split_gain", "threshold", "decision_type", "left_child", "right_child", "internal_value",
    "internal_weight", "internal_count",
)  # fmt: skip
_NUMBER = r"-?(?:\d{1,20}(?:\.\d{1,20})?(?:e[-+]\d{1,3})?|inf|nan)"
_NUMBERS = re.compile(rf"(?:{_NUMBER}(?: {_NUMBER})*)?", re.ASCII)
_END = b"end of trees\n"
_TAIL = re.compile(rb"\nfeature_importances:\n.*\nend of parameters\n\npandas_categorical:[^\n]+\n", re.DOTALL)


class LightGBMPredictor:
    """Predict with a LightGBM booster of numeric splits, saved as text. Its objective is applied."""

    def __init__(self, model: str, *, all_classes: bool = False, threads: int = 1) -> None:
        lightgbm = library("lightgbm", "LightGBM", "lightgbm")
        content = read_file(model, "a LightGBM text file")
        try:
            trees = _checked(content)
        except (KeyError, ValueError) as error:
            raise ModelFileRefused(
                model,
                f"broken LightGBM file: {error}",
                "expected one whole, as Booster.save_model writes it, of numbers",
            ) from error
        try:
            self._booster = lightgbm.Booster(model_str=trees)
        except Exception as error:
            raise ModelFileRefused(
                model, f"lightgbm: {str(error).strip()}", "expected a model that it loads"
            ) from error
        self._all_classes, self._threads = all_classes, threads

    def predict(self, features: Features) -> npt.NDArray[np.float64]:
        return one_per_row(self._booster.predict(features.matrix, num_threads=self._threads), self._all_classes)


def _checked(content: bytes) -> str:
    """Return a file up to the end of its trees. Raises `ValueError` or `KeyError` for what breaks a rule."""
    start = content.find(b"\n\nTree=0\n") + 2
    if not content.startswith(b"tree\nversion=v4\n") or start < 2:
        raise ValueError("it does not begin as version 4 does")
    head = _fields(content[:start].decode().removeprefix("tree\n").replace("\naverage_output\n", "\n"))
    features, classes = int(head["max_feature_idx"]) + 1, int(head["num_class"])
    sizes = _integers(head["tree_sizes"])
    end = start + int(sizes.sum())
    if (sizes <= 0).any() or content[end : end + len(_END)] != _END or not _TAIL.fullmatch(content, end + len(_END)):
        raise ValueError("trees do not end where it says, or it is cut off")
    objective = re.search(r" num_class:(\d+)", head.get("objective", ""))
    if not 0 < classes <= len(sizes) or len(sizes) % classes or head["num_tree_per_iteration"] != head["num_class"]:
        raise ValueError(f"{len(sizes)} trees are not of {classes} classes")
    if objective and int(objective[1]) != classes:
        raise ValueError("objective and trees are of other numbers of classes")
    for number, stop in enumerate(start + np.cumsum(sizes)):
        tree = content[stop - sizes[number] : stop].decode()
        if not tree.startswith(f"Tree={number}\n"):
            raise ValueError(f"tree {number} is not where it should be")
        _check_tree(_fields(tree), number, features)
    return content[: end + len(_END)].decode()


def _check_tree(tree: dict[str, str], number: int, features: int) -> None:
    leaves = int(tree["num_leaves"])
    if int(tree["num_cat"]) or int(tree.get("is_linear", "0")):
        raise ValueError(f"tree {number} has categorical splits or linear leaves")
    for names, n in ((_OF_LEAVES, leaves), (_OF_NODES, leaves - 1)):
        for name in names:
            values = tree[name]
            # A tree of one leaf may say nothing of it but its value.
            allowed = {n, 0} if leaves == 1 and name != "leaf_value" else {n}
            if not _NUMBERS.fullmatch(values) or len(values.split()) not in allowed:
                raise ValueError(f"tree {number} has another number of `{name}` than {n}")
    if leaves == 1:
        return
    children = np.concatenate([_integers(tree["left_child"]), _integers(tree["right_child"])])
    tips, split, decision = ~children[children < 0], _integers(tree["split_feature"]), _integers(tree["decision_type"])
    if (
        not is_tree(children[children >= 0], leaves - 1)
        or sorted(tips.tolist()) != list(range(leaves))
        or not ((split >= 0) & (split < features)).all()
        or not np.isin(decision, (0, 2, 4, 6, 8, 10)).all()
    ):
        raise ValueError(f"tree {number} has nodes that lead nowhere")


def _fields(text: str) -> dict[str, str]:
    lines = [line.partition("=") for line in text.split("\n") if line]
    fields = {name: value for name, equals, value in lines if equals}
    if len(fields) != len(lines):
        raise ValueError("a line is no field, or a field is there twice")
    return fields


def _integers(text: str) -> Any:
    if not re.fullmatch(r"-?\d{1,9}( -?\d{1,9})*", text, re.ASCII):
        raise ValueError(f"{text[:40]!r} are no integers")
    return np.array(text.split(" "), np.int64)
