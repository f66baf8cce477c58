"""Derived features: computed from other features of the view when they are read; nothing is kept for them."""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.errors import DeclarationError

__all__ = ["Derived", "Ratio"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, init=False)
class Derived:
    """A vectorised function of other features of the view: `Derived(np.log1p, "orders_30d")`.

    function: called with one array per feature named, float64 [n] (or [n, width] of a feature that has several
        columns); returns float64 [n]. It must be pure: the same columns give the same answer, in a batch or alone.
    of: the features, which stand before this one in the view and are of numbers.
    """

    function: Callable[..., Any]
    of: tuple[str, ...]

    formula: ClassVar[str] = "function(features)"
    empty: ClassVar[str] = "what the function makes of the empty features"
    error: ClassVar[str] = "of the function"

    def __init__(self, function: Callable[..., Any], *of: str) -> None:
        name = type(self).__name__
        if not callable(function):
            raise DeclarationError(f"{name}: takes a function of arrays and names of features, got {function!r}")
        if not of or not all(isinstance(one, str) for one in of):
            raise DeclarationError(f'{name}: of which features? say Derived(np.log1p, "orders_30d"), got {of!r}')
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "of", of)

    def compute(self, columns: list[Floats], name: str) -> Floats:
        """Return the feature's column, float64 [n]; name: of the feature, for errors.

        Raises `TypeError` if the function does not return one number per row.
        """
        n = len(columns[0])
        with np.errstate(all="ignore"):
            result = np.asarray(self.function(*columns))
        if result.shape != (n,) or result.dtype.kind not in "fiub":
            raise TypeError(f"feature `{name}`: expected float64 [{n}], got {result.dtype} {list(result.shape)}")
        return result.astype(np.float64)

    def identity(self) -> dict[str, Any]:
        """What makes two derived features the same one, but for the features that they are of."""
        return {"derived": type(self).__name__, "function": _function_text(self.function)}


class Ratio(Derived):
    """One feature divided by another: `Ratio("dear_30d", "orders_30d")`. NaN where the divisor is 0 or empty."""

    formula, empty, error = "a / b", "NaN", "one rounding"

    def __init__(self, dividend: str, divisor: str) -> None:
        super().__init__(_ratio, dividend, divisor)


def _ratio(dividend: Floats, divisor: Floats) -> Floats:
    return np.where(divisor == 0, np.nan, dividend / divisor)


def _function_text(function: Any) -> str:
    """Return a text that two functions share only if they compute the same, as far as their code tells."""
    if isinstance(function, np.ufunc):
        return f"numpy.{function.__name__}"
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
    cells = [repr(cell.cell_contents) for cell in function.__closure__ or ()]
    content = [_code_text(code), repr(function.__defaults__), repr(function.__kwdefaults__), *cells]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


def _code_text(code: CodeType) -> str:
    # Not the names of file and function, nor line numbers: moving a function does not change it.
    constants = [_code_text(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return repr((marshal.dumps(code.co_code).hex(), constants, code.co_names, code.co_varnames))
