"""Derived features: computed from other features of the view when they are read; nothing is kept for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, ModuleType
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
    error_text: ClassVar[str] = "of the function"

    def __init__(self, function: Callable[..., Any], *of: str) -> None:
        name = type(self).__name__
        if not callable(function):
            raise DeclarationError(f"{name}: takes a function of arrays and names of features, got {function!r}")
        if not of or not all(isinstance(one, str) for one in of):
            raise DeclarationError(f'{name}: of which features? say Derived(np.log1p, "orders_30d"), got {of!r}')
        _function_text(function)  # refuses what has no identity
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

    formula, empty, error_text = "a / b", "NaN", "one rounding"

    def __init__(self, dividend: str, divisor: str) -> None:
        super().__init__(_ratio, dividend, divisor)


def _ratio(dividend: Floats, divisor: Floats) -> Floats:
    return np.where(divisor == 0, np.nan, dividend / divisor)


def _function_text(function: Any, within: tuple[Any, ...] = ()) -> str:
    """Return a text that two functions share only if they compute the same, in any process: their code, and the values
    that it takes from around it.

    within: the functions that use it. Raises `DeclarationError` for what cannot be told apart, such as an object with
    `__call__`.
    """
    if function in within:
        return "itself"
    if isinstance(function, np.ufunc):
        return f"numpy.{function.__name__}"
    if isinstance(function, BuiltinFunctionType | type(np.nan_to_num)):
        return f"{function.__module__}.{function.__qualname__}"
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        raise DeclarationError(f"Derived: takes a NumPy function or a plain function, got {function!r:.80}")
    cells = zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    globals_used = {name: function.__globals__[name] for name in sorted(_names(code)) if name in function.__globals__}
    around = [dict(cells), function.__defaults__, function.__kwdefaults__, globals_used]
    uses = _value_text(around, (*within, function))
    return hashlib.sha256(repr((_code_text(code), uses)).encode()).hexdigest()[:16]


def _names(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in a code and those within it."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _code_text(code: CodeType) -> str:
    # Not the names of file and function, nor line numbers: moving a function does not change it.
    constants = [_code_text(c) if isinstance(c, CodeType) else _value_text(c) for c in code.co_consts]
    return repr((code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars))


def _value_text(value: Any, within: tuple[Any, ...] = ()) -> str:
    """Return a text for a value that a function uses."""
    if value is None or value is ... or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({[_value_text(one, within) for one in value]})"
    if isinstance(value, frozenset | set):
        return f"set({sorted(map(_value_text, value))})"
    if isinstance(value, dict):
        return f"dict({[(_value_text(k), _value_text(v, within)) for k, v in value.items()]})"
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufSU":
        array = np.ascontiguousarray(value)
        return f"array({array.dtype.str}, {array.shape}, {hashlib.sha256(array.tobytes()).hexdigest()})"
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, type | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if callable(value):
        return _function_text(value, within)
    raise DeclarationError(
        f"Derived: the function uses a {type(value).__name__}; it may use numbers, strings, arrays, functions, modules"
    )
