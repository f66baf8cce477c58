"""Logistic regression as plain arrays: weights and an intercept, compiled.

Written with NumPy it takes nine calls, which for one id cost more than reading its features. Here it is one, and a row
is added up column by column: its score does not depend on which other rows are asked with it, as that of a matrix
product may.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from millpond.models.features import Features

__all__ = ["Logistic"]

Floats = npt.NDArray[np.float64]


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _probability(matrix: Any, row: Any, weights: Any, intercept: Any, missing: Any) -> Any:
    margin = intercept
    for column in range(weights.shape[0]):
        x = matrix[row, column]
        margin += weights[column] * (missing if np.isnan(x) else x)
    return 1.0 / (1.0 + np.exp(-margin))


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _probabilities(matrix: Any, weights: Any, intercept: Any, missing: Any, out: Any) -> None:
    for row in range(matrix.shape[0]):
        out[row] = _probability(matrix, row, weights, intercept, missing)


class Logistic:
    """A predictor: the probability of the positive class, n numbers for float64 [n, columns].

    weights: float64 [columns]. missing: what a feature that is missing (NaN) counts as; NaN, so that the result is NaN,
    where none can be.
    """

    def __init__(self, weights: npt.ArrayLike, intercept: float = 0.0, missing: float = 0.0) -> None:
        self.weights: Floats = np.array(weights, np.float64)
        self.intercept, self.missing = float(intercept), float(missing)
        if self.weights.ndim != 1:
            raise ValueError(f"weights: got an array of the shape {self.weights.shape}; expected one per column")
        zeros = np.zeros((1, len(self.weights)))  # compiled now, not by the first request
        self.probabilities(zeros)
        for one in (zeros, np.zeros((1, 2 * len(self.weights)))[:, ::2]):  # of a wrapper that picks columns, too
            _probability(one, 0, self.weights, self.intercept, self.missing)

    @classmethod
    def load(cls, weights: str, missing: float = 0.0) -> Logistic:
        """Make it from the file at a path that `save` wrote: the predictor of a model with an artifact `weights`."""
        with np.load(weights, allow_pickle=False) as arrays:
            return cls(arrays["weights"], float(arrays["intercept"]), missing)

    def save(self, path: str) -> None:
        """Write weights and intercept to an .npz file."""
        with open(path, "wb") as file:
            np.savez(file, weights=self.weights, intercept=self.intercept)

    def probabilities(self, matrix: Floats) -> Floats:
        """Return the probability of each row. Raises `ValueError` if the matrix has another number of columns."""
        if matrix.shape[1] != len(self.weights):
            raise ValueError(f"features: got {matrix.shape[1]} columns; the model has {len(self.weights)} weights")
        out = np.empty(len(matrix))  # made here: to make Python's array of its own costs a kernel as much as the rest
        _probabilities(np.ascontiguousarray(matrix), self.weights, self.intercept, self.missing, out)
        return out

    def predict(self, features: Features) -> list[float]:
        """Return the probability of each row, as plain numbers: of one row it takes no array."""
        matrix = features.matrix
        if len(matrix) == 1 and matrix.shape[1] == len(self.weights):
            return [_probability(matrix, 0, self.weights, self.intercept, self.missing)]
        return self.probabilities(matrix).tolist()  # type: ignore[no-any-return]
