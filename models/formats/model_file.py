"""What the formats have in common: a file that is refused, a library that is missing, results of one per row."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ExtraMissing", "ModelFileRefused", "is_tree", "library", "one_per_row", "read_file"]


class ModelFileRefused(ValueError):
    """A model's file is not what its format allows: the text names the artifact and the rule."""

    def __init__(self, path: str, found: str, rule: str) -> None:
        super().__init__(f"artifact `{Path(path).name}`: {found}; {rule}")


class ExtraMissing(ImportError):
    """The library of a model format is not installed."""


def library(module: str, model_format: str, extra: str) -> Any:
    """Import the library of a format. Raises `ExtraMissing` that says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ExtraMissing(
            f"model format {model_format} needs the extra: pip install 'millpond[{extra}]' ({error})"
        ) from error


def read_file(path: str, model_format: str) -> bytes:
    """Return the content of a model's file. Raises `ModelFileRefused` if it is a pickle or empty."""
    content = Path(path).read_bytes()
    # A pickle of any protocol that has a header: 0x80 and the number of the protocol.
    if content[:1] == b"\x80" and content[1:2] <= b"\x05":
        raise ModelFileRefused(path, "got a pickle, which may run any code", f"expected {model_format}")
    if not content:
        raise ModelFileRefused(path, "got an empty file", f"expected {model_format}")
    return content


def is_tree(children: npt.NDArray[np.int64], n: int) -> bool:
    """Tell whether n nodes, 0 the root, stay in bounds and have no circle: no child is the root, or is one twice."""
    return bool(((children > 0) & (children < n)).all() and len(np.unique(children)) == len(children))


def one_per_row(predicted: Any, all_classes: bool) -> npt.NDArray[np.float64]:
    """Return what a library predicted as float64 [n], or [n, k] if all classes are asked for and there are several.

    Of two columns the second is taken, the positive class. Raises `ValueError` if there are more.
    """
    results = np.asarray(predicted, np.float64)
    if results.ndim == 2 and results.shape[1] == 1:
        return results[:, 0]
    if results.ndim == 1 or (results.ndim == 2 and all_classes):
        return results
    if results.ndim != 2 or results.shape[1] != 2:
        raise ValueError(
            f"the model's output has the shape {list(results.shape)}; expected [n], [n, 1] or [n, 2]; "
            "functools.partial(..., all_classes=True) returns all k columns of [n, k]"
        )
    return results[:, 1]
