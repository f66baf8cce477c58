"""scikit-learn through skops: a zip of arrays and the names of types, of which only those on a list are made.

What of skops' own list may fail on numbers that were made up (trees and support vectors, which C code follows without a
check) or is not needed to predict from numbers is not on this one.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.models.features import Features
from millpond.models.formats.model_file import ModelFileRefused, library, one_per_row, read_file

__all__ = ["TRUSTED_TYPES", "SklearnPredictor"]

_TRUSTED = {
    "builtins": "bool dict float int list slice str tuple",
    "numpy": "bool dtype float32 float64 int32 int64 ndarray exp expm1 log log10 log1p log2 sqrt square",
    "numpy.random.mtrand": "RandomState",  # that a model was trained with
    "sklearn._loss._loss": "CyHalfBinomialLoss CyHalfGammaLoss CyHalfPoissonLoss CyHalfTweedieLoss "
    "CyHalfTweedieLossIdentity",
    "sklearn._loss.link": "IdentityLink Interval LogLink LogitLink",
    "sklearn._loss.loss": "HalfGammaLoss HalfPoissonLoss HalfTweedieLoss HalfTweedieLossIdentity",
    "sklearn.calibration": "CalibratedClassifierCV _CalibratedClassifier _SigmoidCalibration",
    "sklearn.compose._column_transformer": "ColumnTransformer",
    "sklearn.compose._target": "TransformedTargetRegressor",
    "sklearn.discriminant_analysis": "LinearDiscriminantAnalysis QuadraticDiscriminantAnalysis",
    "sklearn.impute._base": "MissingIndicator SimpleImputer",
    "sklearn.linear_model._base": "LinearRegression",
    "sklearn.linear_model._bayes": "ARDRegression BayesianRidge",
    "sklearn.linear_model._coordinate_descent": "ElasticNet ElasticNetCV Lasso LassoCV",
    "sklearn.linear_model._glm.glm": "GammaRegressor PoissonRegressor TweedieRegressor",
    "sklearn.linear_model._huber": "HuberRegressor",
    "sklearn.linear_model._logistic": "LogisticRegression LogisticRegressionCV",
    "sklearn.linear_model._quantile": "QuantileRegressor",
    "sklearn.linear_model._ridge": "Ridge RidgeCV",
    "sklearn.linear_model._stochastic_gradient": "SGDClassifier SGDRegressor",
    "sklearn.naive_bayes": "GaussianNB",
    "sklearn.neural_network._multilayer_perceptron": "MLPClassifier MLPRegressor",
    "sklearn.neural_network._stochastic_optimizers": "AdamOptimizer SGDOptimizer",
    "sklearn.pipeline": "FeatureUnion Pipeline",
    "sklearn.preprocessing._data": "MaxAbsScaler MinMaxScaler Normalizer PowerTransformer "
    "QuantileTransformer RobustScaler StandardScaler",
    "sklearn.preprocessing._function_transformer": "FunctionTransformer",
    "sklearn.preprocessing._label": "LabelBinarizer LabelEncoder",
    "sklearn.preprocessing._polynomial": "PolynomialFeatures",
}

#: What a file may be made of unless a team trusts more.
TRUSTED_TYPES = frozenset(f"{module}.{name}" for module, names in _TRUSTED.items() for name in names.split())


class SklearnPredictor:
    """Predict with a scikit-learn model that skops.io.dump wrote: `predict_proba` if it has that, else `predict`.

    trusted: full names of types besides `TRUSTED_TYPES`. Of trees, `sklearn.tree._tree.Tree`: a file that was tampered
        with may then end the process that predicts, so it is for files of one's own; `save_onnx` needs no such trust.
    The file must be of the scikit-learn that is installed, since its state has no format of its own.
    """

    def __init__(
        self, model: str, *, trusted: Collection[str] = (), all_classes: bool = False, threads: int = 1
    ) -> None:
        skops_io, sklearn = (library(name, "scikit-learn", "sklearn") for name in ("skops.io", "sklearn"))
        content = read_file(model, "a skops file")
        allowed = TRUSTED_TYPES | set(trusted)
        try:
            types, versions = _seen(content)
            untrusted = set(skops_io.get_untrusted_types(data=content))  # what skops finds besides names, methods say
        except Exception as error:
            raise ModelFileRefused(
                model, f"broken skops file: {error}", "expected one that skops.io.dump wrote"
            ) from error
        if refused := sorted((types | untrusted) - allowed):
            raise ModelFileRefused(
                model, f"has the types {refused}",
                "only TRUSTED_TYPES are made; export the model otherwise or, if you know them to be harmless, trust "
                "them by name: functools.partial(SklearnPredictor, trusted=[...])",
            )  # fmt: skip
        if versions != {sklearn.__version__}:
            raise ModelFileRefused(
                model, f"is of scikit-learn {', '.join(sorted(versions)) or 'no version'}",
                f"expected {sklearn.__version__}, which is installed; train it again",
            )  # fmt: skip
        try:
            estimator = skops_io.loads(content, trusted=sorted(untrusted))
            jobs = [name for name in estimator.get_params() if name.split("__")[-1] == "n_jobs"]
            estimator.set_params(**dict.fromkeys(jobs, threads))
            self._predict = estimator.predict_proba if hasattr(estimator, "predict_proba") else estimator.predict
        except Exception as error:
            raise ModelFileRefused(model, f"skops: {str(error).strip()}", "expected a model that it loads") from error
        self._all_classes = all_classes

    def predict(self, features: Features) -> npt.NDArray[np.float64]:
        return one_per_row(self._predict(features.matrix), self._all_classes)


def _seen(content: bytes) -> tuple[set[str], set[str]]:
    """Return the full names of all types that a file names, and the versions of scikit-learn."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        nodes = list(_nodes(json.loads(file.read("schema.json"))))
    # JSON in JSON, and what stands elsewhere already.
    types = {f"{n['__module__']}.{n['__class__']}" for n in nodes if n["__loader__"] not in ("JsonNode", "CachedNode")}
    states = [n["content"] for n in nodes if isinstance(n.get("content"), dict)]
    return types, {json.loads(s["_sklearn_version"]["content"]) for s in states if "_sklearn_version" in s}


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "__loader__" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _nodes(one)
