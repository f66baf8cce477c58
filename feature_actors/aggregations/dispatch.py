"""The four verbs, each as one compiled function that is told which part or aggregation by its number.

That is what lets a view be data: kernels call `update(kind, ...)`, LLVM makes a jump table of it, and nothing is
compiled when a view is declared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba as nb

from millpond.feature_actors.aggregations.aggregation import AGGREGATIONS, PARTS

__all__ = ["TAKES_INPUT", "finalize", "init", "merge", "update"]


def _one_of(verb: str, arguments: str, functions: Sequence[Callable[..., Any]], otherwise: str = "None") -> Any:
    """Return a compiled `verb(kind, arguments)` that calls functions[kind]."""
    names: dict[str, Any] = {
        f"{verb}_{i}": nb.njit(nogil=True, error_model="numpy", _nrt=False)(f) for i, f in enumerate(functions)
    }
    lines = [f"def {verb}(kind, {arguments}):"]
    for kind, name in enumerate(names):
        lines += [f"    if kind == {kind}:", f"        return {name}({arguments})"]
    lines.append(f"    return {otherwise}")
    exec("\n".join(lines), names)  # of nothing but the names of our own functions
    return nb.njit(nogil=True, error_model="numpy", _nrt=False, forceinline=True)(names[verb])


init = _one_of("init", "p, f, at, n", [part.init for part in PARTS])
update = _one_of("update", "p, f, at, n, s, value, by, time", [part.update for part in PARTS])
merge = _one_of("merge", "p, f, at, n, s, newer_p, newer_f, newer", [part.merge for part in PARTS])
finalize = _one_of(
    "finalize", "p, f, a, b, n, s, k, as_of, window", [one.finalize for one in AGGREGATIONS], otherwise='float("nan")'
)

#: Which parts look at an input.
TAKES_INPUT = tuple(part.takes_input for part in PARTS)
