"""The four verbs, each as one compiled function that is told which part or aggregation by its number.

That is what lets a view be data: kernels call `update(kind, ...)`, LLVM makes a jump table of it, and nothing is
compiled when a view is declared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba as nb

from millpond.feature_actors.aggregations.aggregation import AGGREGATIONS, PARTS, Aggregation, Part

__all__ = ["TAKES_INPUT", "finalize", "init", "merge", "update"]

#: As `tiles.compiled.inner`: kernels call these, nobody else.
_OPTIONS = {
    "nogil": True, "error_model": "numpy", "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip


def _one_of(verb: str, arguments: str, kinds: Sequence[type[Part] | type[Aggregation]], otherwise: str = "None") -> Any:
    """Return a compiled `verb(kind, arguments)` that calls that verb of kinds[kind]."""
    # What is called by a function that is inlined would be so too, if it did not say otherwise.
    names: dict[str, Any] = {
        f"{verb}_{i}": nb.njit(**_OPTIONS, forceinline=not kind.is_large)(getattr(kind, verb))
        for i, kind in enumerate(kinds)
    }
    lines = [f"def {verb}(kind, {arguments}):"]
    for i, name in enumerate(names):
        lines += [f"    if kind == {i}:", f"        return {name}({arguments})"]
    lines.append(f"    return {otherwise}")
    exec("\n".join(lines), names)  # of nothing but the names of our own functions
    return nb.njit(**_OPTIONS, forceinline=True)(names[verb])


init = _one_of("init", "p, f, at, n", PARTS)
update = _one_of("update", "p, f, at, n, s, value, by, time", PARTS)
merge = _one_of("merge", "p, f, at, n, s, newer_p, newer_f, newer", PARTS)
finalize = _one_of("finalize", "p, f, a, b, n, s, k, as_of, window", AGGREGATIONS, otherwise='float("nan")')

#: Which parts look at an input.
TAKES_INPUT = tuple(part.takes_input for part in PARTS)
