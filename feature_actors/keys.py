"""Entity keys as 128-bit hashes, computed over Arrow buffers.

The hash of a key is SipHash-2-4 with 128 bits of output and a fixed, published key over the key's
canonical encoding, so the same key has the same hash on every cluster, for ever (`KEY_HASH_VERSION`):

    int64    1 word, two's complement
    string   1 word for the length in bytes, then its UTF-8 bytes in words, padded with zero bytes
    null     the word 0x6c6c756e ("null"); only content hashes have nulls, keys never do

Words are 64-bit little-endian, one field after the other in the order of the view's key. Slots
come from the high half of the hash; the place within a slot's index comes from the low half mixed
with the cluster's own seed, so that nobody can prepare keys that fall on one place.

SipHash, not a faster mixer, because keys come from outside: for the fast mixers, sets of colliding
strings are published, and two entities with one hash would be one entity.
Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF" (2012), and its 128-bit variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["KEY_HASH_VERSION", "Hashes", "hash_columns", "hash_keys", "hash_values", "hash_word", "slots_of"]

KEY_HASH_VERSION = 1

#: uint64 [n, 2]: low and high half of n hashes.
Hashes = npt.NDArray[np.uint64]

_KEY_LO, _KEY_HI = np.uint64(0x6D696C6C706F6E64), np.uint64(0x7374696C6C776174)  # "millpond", "stillwat"
_NULL = np.uint64(0x6C6C756E)


@nb.njit(cache=True, nogil=True, inline="always")
def _rotl(x: Any, b: Any) -> Any:
    return (x << np.uint64(b)) | (x >> np.uint64(64 - b))


@nb.njit(cache=True, nogil=True)
def _sip_round(v0: Any, v1: Any, v2: Any, v3: Any) -> Any:
    v0 += v1
    v1 = _rotl(v1, 13) ^ v0
    v0 = _rotl(v0, 32)
    v2 += v3
    v3 = _rotl(v3, 16) ^ v2
    v0 += v3
    v3 = _rotl(v3, 21) ^ v0
    v2 += v1
    v1 = _rotl(v1, 17) ^ v2
    v2 = _rotl(v2, 32)
    return v0, v1, v2, v3


@nb.njit(cache=True, nogil=True)
def _absorb(state: Any, i: Any, word: Any) -> None:
    v0, v1, v2, v3 = state[i, 0], state[i, 1], state[i, 2], state[i, 3] ^ word
    v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
    v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
    state[i, 0], state[i, 1], state[i, 2], state[i, 3] = v0 ^ word, v1, v2, v3
    state[i, 4] += np.uint64(8)


@nb.njit(cache=True, nogil=True)
def begin(n: Any, key_lo: Any, key_hi: Any) -> Any:
    """Return n fresh SipHash states, uint64 [n, 5]: four words and the number of bytes absorbed."""
    state = np.empty((n, 5), np.uint64)
    for i in range(n):
        state[i, 0] = key_lo ^ np.uint64(0x736F6D6570736575)
        state[i, 1] = key_hi ^ np.uint64(0x646F72616E646F6D) ^ np.uint64(0xEE)
        state[i, 2] = key_lo ^ np.uint64(0x6C7967656E657261)
        state[i, 3] = key_hi ^ np.uint64(0x7465646279746573)
        state[i, 4] = np.uint64(0)
    return state


@nb.njit(cache=True, nogil=True)
def absorb_words(state: Any, words: Any, valid: Any) -> None:
    """Absorb one 64-bit word per row; `valid` is bool [n], or bool [0] for "all valid"."""
    for i in range(words.shape[0]):
        if valid.shape[0] == 0 or valid[i]:
            _absorb(state, i, words[i])
        else:
            _absorb(state, i, _NULL)


@nb.njit(cache=True, nogil=True)
def absorb_strings(state: Any, offsets: Any, payload: Any, valid: Any) -> None:
    """Absorb one string per row: `payload[offsets[i]:offsets[i + 1]]`, uint8."""
    for i in range(offsets.shape[0] - 1):
        if valid.shape[0] != 0 and not valid[i]:
            _absorb(state, i, _NULL)
            continue
        start, stop = np.int64(offsets[i]), np.int64(offsets[i + 1])
        _absorb(state, i, np.uint64(stop - start))
        at = start
        while at < stop:
            word = np.uint64(0)
            for b in range(min(np.int64(8), stop - at)):
                word |= np.uint64(payload[at + b]) << np.uint64(8 * b)
            _absorb(state, i, word)
            at += 8


@nb.njit(cache=True, nogil=True)
def finish(state: Any) -> Any:
    """Return the hashes of the absorbed words, uint64 [n, 2]."""
    n = state.shape[0]
    out = np.empty((n, 2), np.uint64)
    for i in range(n):
        last = (state[i, 4] & np.uint64(0xFF)) << np.uint64(56)
        _absorb(state, i, last)
        v0, v1, v2, v3 = state[i, 0], state[i, 1], state[i, 2] ^ np.uint64(0xEE), state[i, 3]
        for _ in range(4):
            v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
        out[i, 0] = v0 ^ v1 ^ v2 ^ v3
        v1 ^= np.uint64(0xDD)
        for _ in range(4):
            v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
        out[i, 1] = v0 ^ v1 ^ v2 ^ v3
    return out


_NO_MASK = np.zeros(0, np.bool_)


def owned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array, or a copy if it is read-only, as what comes from Arrow or Ray may be.

    To Numba a read-only array is another type: a kernel would be compiled anew for each mixture.
    """
    return array if array.flags.writeable else array.copy()


def _valid(column: pa.Array) -> npt.NDArray[np.bool_]:
    if column.null_count == 0:
        return _NO_MASK
    return owned(column.is_valid().to_numpy(zero_copy_only=False))


def _absorb_column(state: Any, column: pa.Array) -> None:
    if pa.types.is_string(column.type):
        _, offsets_buffer, payload_buffer = column.buffers()
        if offsets_buffer is None:
            offsets = np.zeros(1, np.int32)
        else:
            offsets = np.frombuffer(offsets_buffer, np.int32)[column.offset : column.offset + len(column) + 1]
        payload = (
            np.frombuffer(payload_buffer, np.uint8)
            if payload_buffer is not None and payload_buffer.size
            else np.zeros(1, np.uint8)
        )
        absorb_strings(state, owned(offsets), owned(payload), _valid(column))
    else:
        absorb_words(state, _words(column), _valid(column))


def _words(column: pa.Array) -> npt.NDArray[np.uint64]:
    """Return a fixed-width column as one uint64 word per row (nulls as 0)."""
    if pa.types.is_timestamp(column.type):
        column = column.view(pa.int64())
    if column.null_count:
        column = column.fill_null(False if pa.types.is_boolean(column.type) else 0)
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "f":
        return values.astype(np.float64).view(np.uint64)  # type: ignore[no-any-return]
    return values.astype(np.int64).view(np.uint64)  # type: ignore[no-any-return]


def hash_columns(columns: Sequence[pa.Array], n: int, key: tuple[int, int] | None = None) -> Hashes:
    """Hash n rows of one or more Arrow columns (integers, floats, bool, timestamp, string).

    key: two words of 64 bits, a secret: then nobody without it can tell what has which hash.
    """
    lo, hi = (_KEY_LO, _KEY_HI) if key is None else (np.uint64(key[0]), np.uint64(key[1]))
    state = begin(n, lo, hi)
    for column in columns:
        _absorb_column(state, column)
    return finish(state)  # type: ignore[no-any-return]


@nb.njit(cache=True, nogil=True)
def hash_words(words: Any) -> Any:
    """Hash n keys of k words each, uint64 [k, n]."""
    state = begin(words.shape[1], _KEY_LO, _KEY_HI)
    for column in range(words.shape[0]):
        for i in range(words.shape[1]):
            _absorb(state, i, words[column, i])
    return finish(state)


@nb.njit(nogil=True, error_model="numpy", forceinline=True, _nrt=False)
def hash_word(word: Any) -> Any:
    """Return both halves of the hash of a key of one word, for a kernel that reads by it: no arrays, no call."""
    v0 = _KEY_LO ^ np.uint64(0x736F6D6570736575)
    v1 = _KEY_HI ^ np.uint64(0x646F72616E646F6D) ^ np.uint64(0xEE)
    v2 = _KEY_LO ^ np.uint64(0x6C7967656E657261)
    v3 = _KEY_HI ^ np.uint64(0x7465646279746573)
    for absorbed in (np.uint64(word), np.uint64(8) << np.uint64(56)):  # the word, then how long it was
        v3 ^= absorbed
        v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
        v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
        v0 ^= absorbed
    v2 ^= np.uint64(0xEE)
    for _ in range(4):
        v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
    low = v0 ^ v1 ^ v2 ^ v3
    v1 ^= np.uint64(0xDD)
    for _ in range(4):
        v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
    return low, v0 ^ v1 ^ v2 ^ v3


def hash_values(columns: Sequence[Sequence[int] | Sequence[str]], n: int) -> Hashes:
    """Hash n keys given as Python columns, without the detour through Arrow (a score asks for few)."""
    if not any(isinstance(column[0], str) for column in columns):
        return hash_words(np.array(columns, np.int64).view(np.uint64))  # type: ignore[no-any-return]
    state = begin(n, _KEY_LO, _KEY_HI)
    for column in columns:
        if isinstance(column[0], str):
            encoded = [v.encode() for v in column]  # type: ignore[union-attr]
            offsets = np.zeros(n + 1, np.int32)
            np.cumsum([len(e) for e in encoded], out=offsets[1:])
            payload = np.frombuffer(b"".join(encoded) or b"\0", np.uint8)
            absorb_strings(state, offsets, owned(payload), _NO_MASK)
        else:
            absorb_words(state, np.array(column, np.int64).view(np.uint64), _NO_MASK)
    return finish(state)  # type: ignore[no-any-return]


def hash_keys(columns: Sequence[Any], n: int) -> Hashes:
    """Hash n keys, given as Arrow arrays or as Python lists."""
    return hash_columns(columns, n) if isinstance(columns[0], pa.Array) else hash_values(columns, n)


def slots_of(hashes: Hashes, n_slots: int) -> npt.NDArray[np.int64]:
    """Return the slot of each hash, int64 [n] in `[0, n_slots)`."""
    return (hashes[:, 1] % np.uint64(n_slots)).astype(np.int64)
