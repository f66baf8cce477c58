"""How kernels are compiled and cached, and the few instructions that Numba has no word for.

Numba's cache looks at the file of a kernel only. A kernel here is also made of constants and functions of other
files (the aggregations above all), so its entry in the cache bears a digest of them all.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from millpond.feature_actors.tiles.program import ReadProgram

__all__ = [
    "bools_at",
    "fence_acquire",
    "fence_release",
    "floats_at",
    "inner",
    "kernel",
    "load_acquire",
    "prefetch",
    "prefetch_to_write",
    "store_release",
    "unpacked",
    "views_at",
    "words_at",
]


def _digest_of_sources() -> str:
    folder = Path(__file__).parent
    sources = [*folder.glob("*.py"), *(folder.parent / "aggregations").glob("*.py"), folder.parent / "keys.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()


_DIGEST = _digest_of_sources()


class _Cache(FunctionCache):  # type: ignore[misc]
    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return *super()._index_key(sig, codegen), _DIGEST


#: Compiles a function that is called by kernels only. Inlined, because Numba passes an array as seven arguments: calls
#: took more than half of the time of a read. Without Numba's memory management, because it counts how often an array is
#: referred to, with two locked instructions for each array of each call: without it a read takes a tenth of the time.
#: So it cannot make arrays, nor return any; those that it is given are the kernel's, which does count. Without the
#: entry points of Python and C, which took a fifth of the time of compiling.
inner = nb.njit(
    nogil=True, error_model="numpy", forceinline=True, _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True
)


def kernel(function: Any) -> Any:
    """Compile a function that Python calls, and keep it in Numba's cache."""
    compiled = nb.njit(nogil=True, error_model="numpy")(function)
    compiled._cache = _Cache(function)
    return compiled


def _place(context: Any, builder: Any, array_type: Any, array: Any, i: Any) -> Any:
    """Return the pointer to element i of an array."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [i])


@intrinsic
def load_acquire(typing_context: Any, array: Any, i: Any) -> Any:
    """array[i] of int64; what comes after is not read before it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_place(context, builder, signature.args[0], *args), "acquire", 8)

    return types.int64(array, types.intp), generate


@intrinsic
def store_release(typing_context: Any, array: Any, i: Any, value: Any) -> Any:
    """array[i] = value of int64; what came before is seen before it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _place(context, builder, signature.args[0], args[0], args[1])
        builder.store_atomic(args[2], at, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), generate


@intrinsic
def fence_acquire(typing_context: Any) -> Any:
    """What was read before is read before all that is read or written after."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def fence_release(typing_context: Any) -> Any:
    """What was read or written before is so before all that is written after."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), generate


def _prefetch(for_writing: int) -> Any:
    def of(typing_context: Any, array: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.bitcast(_place(context, builder, signature.args[0], *args), cgutils.voidptr_t)
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [pointer, number(for_writing), number(3), number(1)])
            return context.get_dummy_value()

        return types.void(array, types.intp), generate

    return intrinsic(of)


#: Ask for the cache line of array[i], to read it; to write it too. (A processor passes over the latter where the memory
#: is mapped for reading: 1,000 reads of another process then took 3 ms instead of 1.)
prefetch = _prefetch(0)
prefetch_to_write = _prefetch(1)


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@nb.njit(nogil=True, error_model="numpy", forceinline=True)  # not `inner`: it returns arrays
def views_at(address: Any) -> Any:
    """Return the words from an address on as int64, as float64 and as pairs of uint32 halves, the low one first.

    Nothing checks an index into them.
    """
    pointer = _pointer(address)
    words = nb.carray(pointer, (1,), np.int64)
    return words, nb.carray(pointer, (1,), np.float64), nb.carray(pointer, (1,), np.uint32)


@nb.njit(nogil=True, error_model="numpy", forceinline=True)  # as `views_at`
def unpacked(address: Any) -> Any:
    """Return the `ReadProgram` that is packed at an address."""
    words = nb.carray(_pointer(address), (1,), np.int64)
    return ReadProgram(
        nb.carray(_pointer(address + 8 * words[0]), (words[1], 7), np.int64),
        nb.carray(_pointer(address + 8 * words[2]), (words[3], 11), np.int64),
        nb.carray(_pointer(address + 8 * words[4]), (words[5], 7), np.int64),
        nb.carray(_pointer(address + 8 * words[6]), (words[7], 2), np.int64),
        nb.carray(_pointer(address + 8 * words[8]), (words[9], 8), np.int64),
        nb.carray(_pointer(address + 8 * words[10]), (words[11], 7), np.int64),
        words[12],
        words[13],
        words[14],
        words[15],
    )


def _array_at(dtype: Any) -> Any:
    # As `views_at`.
    @nb.njit(nogil=True, error_model="numpy", forceinline=True)
    def at(address: Any, shape: Any) -> Any:
        return nb.carray(_pointer(address), shape, dtype)

    return at


#: The array of a shape at an address.
words_at, floats_at, bools_at = _array_at(np.int64), _array_at(np.float64), _array_at(np.bool_)
