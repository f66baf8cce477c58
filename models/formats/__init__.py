"""Model formats: predictors that load a file which is data, in one line of a declaration.

    Model(..., predictor=OnnxPredictor, artifacts={"model": "churn.onnx"})
    Model(..., predictor=partial(LightGBMPredictor, all_classes=True), artifacts={"model": "next.txt"})

Each takes the features of numbers in the order of the declaration, NaN where there is none, and returns float64 [n]: of
a classifier of two classes the probability of the second, of a regression its output. `all_classes=True` returns
float64 [n, k] of a model with k outputs. Each runs in one thread unless `threads` says more. No file is unpickled; one
that breaks a rule of its format raises `ModelFileRefused` before anything of it is predicted with. A library is
imported when its class is first used.
"""

from millpond.models.formats.lightgbm import LightGBMPredictor
from millpond.models.formats.model_file import ExtraMissing, ModelFileRefused
from millpond.models.formats.onnx import OnnxPredictor, save_onnx
from millpond.models.formats.sklearn import TRUSTED_TYPES, SklearnPredictor
from millpond.models.formats.xgboost import XGBoostPredictor

__all__ = [
    "TRUSTED_TYPES",
    "ExtraMissing",
    "LightGBMPredictor",
    "ModelFileRefused",
    "OnnxPredictor",
    "SklearnPredictor",
    "XGBoostPredictor",
    "save_onnx",
]
