"""Logistic regression as plain arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from millpond.models import Features
from millpond.models.logistic import Logistic


def test_it_predicts_what_scikit_learn_does(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(5)
    matrix = draw.normal(size=(1_000, 7))
    learner = LogisticRegression().fit(matrix, matrix @ draw.normal(size=7) + draw.normal(size=1_000) > 0.3)
    Logistic(learner.coef_[0], learner.intercept_[0]).save(str(tmp_path / "weights.npz"))
    loaded = Logistic.load(str(tmp_path / "weights.npz"))
    want = learner.predict_proba(matrix)[:, 1]
    np.testing.assert_allclose(loaded.predict(Features(matrix, ())), want, rtol=1e-12)


def test_a_missing_feature_counts_as_zero_and_a_row_is_alike_alone_and_among_others() -> None:
    draw = np.random.default_rng(6)
    matrix = draw.normal(size=(301, 5))
    matrix[draw.random(matrix.shape) < 0.3] = np.nan
    model = Logistic(draw.normal(size=5), -0.5)
    together = model.probabilities(matrix)
    assert together.tolist() == [model.probabilities(row[np.newaxis])[0] for row in matrix]
    assert together.tolist() == [one for row in matrix for one in model.predict(Features(row[np.newaxis], ()))]
    assert together.tolist() == model.predict(Features(matrix, ()))
    assert together.tolist() == model.probabilities(np.asfortranarray(matrix)).tolist()
    assert together.tolist() == model.probabilities(np.where(np.isnan(matrix), 0.0, matrix)).tolist()
    assert model.probabilities(np.full((1, 5), np.nan))[0] == pytest.approx(1 / (1 + np.exp(0.5)))


def test_where_none_can_be_missing_a_nan_is_no_result() -> None:
    model = Logistic([0.5, -2.0], 0.25, missing=np.nan)
    got = model.probabilities(np.array([[1.0, 2.0], [np.nan, 2.0], [1.0, np.nan]]))
    assert np.isnan(got).tolist() == [False, True, True]
    assert got[0] == pytest.approx(1 / (1 + np.exp(3.25)))
    of_one = Logistic([0.5, -2.0], 0.25, missing=1.0).probabilities(np.array([[np.nan, 2.0]]))
    assert of_one.tolist() == [got[0]]


def test_margins_beyond_what_exp_can_tell_are_certain() -> None:
    assert Logistic([1.0]).probabilities(np.array([[1e6], [-1e6], [np.inf], [-np.inf]])).tolist() == [1, 0, 1, 0]


def test_another_number_of_columns_is_an_error_not_another_result() -> None:
    model = Logistic([1.0, 2.0])
    for columns in (0, 1, 3):
        with pytest.raises(ValueError, match=f"got {columns} columns; the model has 2 weights"):
            model.probabilities(np.zeros((4, columns)))
        with pytest.raises(ValueError, match=f"got {columns} columns; the model has 2 weights"):
            model.predict(Features(np.zeros((1, columns)), ()))
    with pytest.raises(ValueError, match="expected one per column"):
        Logistic([[1.0], [2.0]])
    assert Logistic([1.0, 2.0]).probabilities(np.zeros((0, 2))).tolist() == []
