"""Model formats: predictors that load a file which is data, in one line of a declaration.

    Model(..., predictor=OnnxPredictor, artifacts={"model": "churn.onnx"})
    Model(..., predictor=partial(LightGBMPredictor, all_classes=True), artifacts={"model": "next.txt"})

Each takes the features of numbers in the order of the declaration, NaN where there is none, and returns float64 [n]: of
a classifier of two classes the probability of the second, of a regression its output. `all_classes=True` returns
float64 [n, k] of a model with k outputs. Each runs in one thread unless `threads` says more. No file is unpickled; one
that breaks a rule of its format raises `ModelFileRefused` before anything of it is predicted with. A library is
imported when its class is first used.

========  =====================  ==================================  ==================================================
extra     file                   how to export                       checked before anything is predicted
========  =====================  ==================================  ==================================================
onnx      .onnx                  `save_onnx(model, matrix, path)`    all weights inside; an opset for each operator; one
                                 of scikit-learn, or any other       input and output of floats; trees have no circles;
                                 exporter, in one file               onnxruntime's own checks of the graph
lightgbm  text                   `booster.save_model(path)`          whole to its end; every size and node number; no
                                                                     categorical splits, no linear leaves
xgboost   .json or .ubj          `booster.save_model(path)`          whole; every length and node number; gbtree or
                                                                     dart; no categorical splits
sklearn   .skops                 `skops.io.dump(model, path)`        only `TRUSTED_TYPES` and what the team trusts by
                                                                     name; the scikit-learn that is installed; CRC-32
========  =====================  ==================================  ==================================================

A file that was changed within these rules, another digit of a number, is told by the registry's SHA-256 only.

Microseconds per `predict`, 8 features, best of 9 on a busy machine of 2 cores (order of magnitude; a lane measures its
own), and whether a row's result depends on the rows beside it:

============================================  =====  ==========  =====================================
model                                         1 row  1,000 rows  rows beside
============================================  =====  ==========  =====================================
ONNX, logistic regression, float32                7          43  float32 rounding, 1e-7
ONNX, forest of 50 trees of depth 6               7       2,700  none
LightGBM, 60 trees of 15 leaves                  22       3,000  none
XGBoost, 60 trees of depth 4                    300         940  none
scikit-learn, impute + scale + logistic         850         880  float64 rounding, 1e-15
============================================  =====  ==========  =====================================

A model of scikit-learn that is asked one row at a time is for ONNX, or for arrays of its own (see `models/trees.py`).
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
