"""A model: a name, a version, an owner, the features it reads and the predictor behind it."""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from millpond.feature_actors.errors import DeclarationError, MillpondError
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.source import check_name, check_owner
from millpond.feature_actors.view import Feature
from millpond.models.features import Features
from millpond.models.pool import Pool
from millpond.models.reader import FeatureReader, Read, Reads

__all__ = ["Features", "LoadedModel", "Model", "PredictionFailed", "Predictor"]

logger = logging.getLogger("millpond.models")

_FLOATS = {float}
#: Or none: then its content names it.
_VERSION = re.compile(r"([A-Za-z0-9][A-Za-z0-9._+-]{0,62})?")


class OneStage(Protocol):
    """Anything with `predict`: n rows in, n results out (numbers, or anything that JSON holds).

    It is never called twice at once. Rows may be of several requests: a result must be of its own row only.
    """

    def predict(self, features: Features, /) -> Any: ...


class TwoStage(Protocol):
    """The same, for a model that reads more features while it predicts."""

    def predict(self, features: Features, reader: FeatureReader, /) -> Any: ...


Predictor = OneStage | TwoStage


class PredictionFailed(MillpondError):
    """The model's own code failed on these features: its owner has to look."""

    code, status = "prediction_failed", 500


@dataclass(frozen=True, eq=False)
class Model:
    """Declare a model.

    version: names one immutable content; another content is another version. Without one, the content names it.
    features: what it reads, `view["name"]`, possibly of views with different keys.
    predictor: called with the path of each artifact to make the thing that predicts. It reads them then: when
        every model is made their folder is removed.
    artifacts: name to file name, beside the file of the definition.
    reads: further features that `predict(features, reader)` reads of whatever ids it likes.
    pool: `Pool(...)` gives the model replicas of its own; without, it shares those of all models.

    Raises `DeclarationError` that names the model and what does not fit.
    """

    name: str
    version: str = ""
    owner: str = ""
    features: Sequence[Feature] = ()
    predictor: Callable[..., Predictor] = None  # type: ignore[assignment]
    artifacts: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    reads: Sequence[Feature] = ()
    pool: Pool | None = None

    def __post_init__(self) -> None:
        check_name("model", self.name)
        check_owner("model", self.name, self.owner)
        if not isinstance(self.version, str) or not _VERSION.fullmatch(self.version):
            raise DeclarationError(
                f"model `{self.name}`: version is a text of at most 63 letters, digits and `._+-`, got {self.version!r}"
            )
        if not self.features:
            raise DeclarationError(f"model `{self.name}`: no features")
        for features in (self.features, self.reads):
            for one in features:
                if not isinstance(one, Feature):
                    raise DeclarationError(f'model `{self.name}`: expected features such as view["name"], got {one!r}')
            names = [f.full_name for f in features]
            if len(set(names)) != len(names):
                twice = next(n for n in names if names.count(n) > 1)
                raise DeclarationError(f"model `{self.name}`: feature `{twice}` is named twice")
        if not callable(self.predictor):
            raise DeclarationError(
                f"model `{self.name}`: predictor must be a class or a function, got {self.predictor!r}"
            )
        if self.pool is not None and not isinstance(self.pool, Pool):
            raise DeclarationError(f"model `{self.name}`: pool must be a `Pool`, got {self.pool!r}")
        for artifact, file in self.artifacts.items():
            if not file or file == ".." or Path(file).name != file:
                raise DeclarationError(
                    f"model `{self.name}`: artifact `{artifact}` must be a file name without folders, got {file!r}"
                )

    @property
    def subject(self) -> str:
        return f"model `{self.name}`"


class LoadedModel:
    """A model version in memory: its plan over the cluster's layout, and its predictor."""

    def __init__(self, model: Model, layout: Layout, artifacts_dir: Path) -> None:
        self.model, self._subject = model, model.subject
        self.plan = ReadPlan(layout, model.features, self._subject)
        self._reads = Reads(layout, model.reads, self._subject)
        self._predictor: Any = model.predictor(
            **{name: str(artifacts_dir / file) for name, file in model.artifacts.items()}
        )
        #: Whether it reads more features while it predicts.
        self.two_stage = _takes_a_reader(self._predictor.predict)

    def predict(
        self,
        rows: FeatureRows,
        keys: Mapping[str, Sequence[Any]] | None = None,
        read: Read | None = None,
        as_of_ms: int | None = None,
    ) -> list[Any]:
        """Return one result per row, as plain Python values that JSON can hold.

        keys: the ids of the rows by key field. read: what the predictor reads more features with, as of a time.
        Raises `PredictionFailed` if the predictor fails (its exception goes to the log only), returns
        another number of results, or something that JSON has no word for, such as NaN; and what `read` raises.
        """
        results, failed = self.predict_each(rows, keys, read, as_of_ms)
        if failed:
            raise results[failed[0]]
        return results

    def predict_each(
        self,
        rows: FeatureRows,
        keys: Mapping[str, Sequence[Any]] | None = None,
        read: Read | None = None,
        as_of_ms: int | None = None,
    ) -> tuple[list[Any], list[int]]:
        """Return what `predict` does, and which rows have a `PredictionFailed` instead, since their own result is
        something that JSON has no word for."""
        n = len(rows.matrix)
        features = Features(rows.matrix, self.plan.names, rows.texts, keys or {})
        reader = FeatureReader(self._reads, read, as_of_ms) if self.two_stage else None
        try:
            results = self._predictor.predict(features) if reader is None else self._predictor.predict(features, reader)
            single = False
            if isinstance(results, np.ndarray):
                results = results.tolist()
            elif type(results) is list:
                results = results.copy()  # it may be the model's to use again
            else:
                # These have a length too, which is of something else.
                single = isinstance(results, Mapping | Set | str | bytes | bytearray)
                results = results if single else list(results)
            count = len(results)
        # A model that calls `exit`, or a library in Rust that panics, ends nobody else; of a Ctrl-C whoever waits for
        # the prediction hears that it failed.
        except BaseException as error:
            if reader is not None and error is reader.failure:  # not the model is to blame
                raise
            # Its text may hold paths or values that are not the client's to see.
            name = type(error).__name__
            logger.exception("%s: predict raised %s", self._subject, name)
            raise PredictionFailed(
                f"{self._subject}: predict raised {name}; its text is in the log of the deployment"
            ) from error
        if single:
            raise PredictionFailed(
                f"{self._subject}: predict returned a `{type(results).__name__}`; expected a list or an array of one "
                "result per row"
            )
        if count != n:
            raise PredictionFailed(f"{self._subject}: predict returned {count} results for {n} rows")
        if n == 1 and type(results[0]) is float and math.isfinite(results[0]):
            return results, []
        if set(map(type, results)) == _FLOATS and all(map(math.isfinite, results)):
            return results, []
        plain, failed = [], []
        for row, result in enumerate(results):
            try:
                plain.append(_plain_json(result))
            except (ValueError, RecursionError) as error:
                plain.append(PredictionFailed(f"{self._subject}: predict returned {error}, which JSON cannot hold"))
                failed.append(row)
        return plain, failed


def _takes_a_reader(predict: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(predict).parameters.values()
    except (TypeError, ValueError):  # of compiled code, which does not tell
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 2


def _plain_json(value: Any) -> Any:
    """Return a result as JSON's own types, NumPy's converted; raise `ValueError` that names what is none."""
    kind = type(value)
    if kind is float:
        if not math.isfinite(value):
            raise ValueError(f"the number {value}")
        return value
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the text {value[:60]!r}") from None
        return value
    if value is None or kind is bool:
        return value
    if kind is int:
        if not -(2**63) <= value < 2**64:
            raise ValueError("an integer of more than 64 bits")
        return value
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"an object with the key {name!r:.60}")
        return {_plain_json(str(name)): _plain_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(one) for one in value]
    if isinstance(value, np.generic | np.ndarray) and type(plain := value.tolist()) is not kind:
        return _plain_json(plain)
    raise ValueError(f"a value of type `{kind.__name__}`")
