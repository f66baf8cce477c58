"""A key has one hash for ever: SipHash-2-4-128 over the canonical encoding, whatever it came in."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numba as nb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.feature_actors import keys
from millpond.feature_actors.keys import hash_columns, hash_values, hash_word, slots_of

MASK = 2**64 - 1


def siphash128(message: bytes, k0: int, k1: int) -> tuple[int, int]:
    """SipHash-2-4 with 128 bits of output, from the paper, sharing nothing with the kernels."""

    def rotl(x: int, b: int) -> int:
        return ((x << b) | (x >> (64 - b))) & MASK

    def rounds(v: list[int], n: int) -> None:
        for _ in range(n):
            v[0] = (v[0] + v[1]) & MASK
            v[1] = rotl(v[1], 13) ^ v[0]
            v[0] = rotl(v[0], 32)
            v[2] = (v[2] + v[3]) & MASK
            v[3] = rotl(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & MASK
            v[3] = rotl(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & MASK
            v[1] = rotl(v[1], 17) ^ v[2]
            v[2] = rotl(v[2], 32)

    v = [
        k0 ^ 0x736F6D6570736575,
        k1 ^ 0x646F72616E646F6D ^ 0xEE,
        k0 ^ 0x6C7967656E657261,
        k1 ^ 0x7465646279746573,
    ]
    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) & 0xFF])
    for (word,) in struct.iter_unpack("<Q", padded):
        v[3] ^= word
        rounds(v, 2)
        v[0] ^= word
    v[2] ^= 0xEE
    rounds(v, 4)
    low = v[0] ^ v[1] ^ v[2] ^ v[3]
    v[1] ^= 0xDD
    rounds(v, 4)
    return low, v[0] ^ v[1] ^ v[2] ^ v[3]


def encode(value: Any) -> bytes:
    """The canonical encoding of one field, from the docstring of `keys`."""
    if value is None:
        return struct.pack("<Q", 0x6C6C756E)
    if isinstance(value, str):
        text = value.encode()
        return struct.pack("<Q", len(text)) + text + bytes(-len(text) % 8)
    if isinstance(value, float):
        return struct.pack("<d", value)
    return struct.pack("<Q", int(value) & MASK)


def want(rows: Sequence[tuple[Any, ...]]) -> list[tuple[int, int]]:
    key = (int.from_bytes(b"millpond", "big"), int.from_bytes(b"stillwat", "big"))
    return [siphash128(b"".join(map(encode, row)), *key) for row in rows]


def got(hashes: Any) -> list[tuple[int, int]]:
    return [(int(lo), int(hi)) for lo, hi in hashes]


# The first and some later vectors of `vectors_sip128` in the reference implementation: key 00..0f,
# input 00, 01, 02, ... of that many bytes.
VECTORS = {0: "a3817f04ba25a8e66df67214c7550293", 8: "3b62a9ba6258f5610f83e264f31497b4"}


@pytest.mark.parametrize(("length", "vector"), VECTORS.items())
def test_published_vectors(length: int, vector: str) -> None:
    k0, k1 = struct.unpack("<QQ", bytes(range(16)))
    assert struct.pack("<QQ", *siphash128(bytes(range(length)), k0, k1)).hex() == vector
    state = keys.begin(1, np.uint64(k0), np.uint64(k1))
    for (word,) in struct.iter_unpack("<Q", bytes(range(length))):
        keys.absorb_words(state, np.array([word], np.uint64), np.zeros(0, np.bool_))
    assert keys.finish(state).astype("<u8").tobytes().hex() == vector


def test_hashes_of_keys_are_these_for_ever() -> None:
    """If this fails, every stored key is lost: do not change it, raise KEY_HASH_VERSION."""
    assert keys.KEY_HASH_VERSION == 1
    golden = {
        (0,): "058092a64713caf440f2e173c08ff6e0",
        (42,): "d03f1aa78be6990fe6dd2a527d54726f",
        (-1,): "22f06d2b20d76eae7a0c6ea1596b7df6",
        ("",): "058092a64713caf440f2e173c08ff6e0",
        ("millpond",): "1c4e334fdb7414e39b53bac3a97172bd",
        (42, "ü-book"): "79634522f02c20374c46004be6872b3a",
    }
    for row, hashed in golden.items():
        assert [f"{lo:016x}{hi:016x}" for lo, hi in got(hash_values([[v] for v in row], 1))] == [hashed]


INTS = st.integers(-(2**63), 2**63 - 1)
TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(["", "x" * 7, "x" * 8, "x" * 9, "ü" * 300]))
FIELDS = {
    "int64": (pa.int64(), INTS),
    "int8": (pa.int8(), st.integers(-128, 127)),
    "uint32": (pa.uint32(), st.integers(0, 2**32 - 1)),
    "string": (pa.string(), TEXTS),
    "bool": (pa.bool_(), st.booleans()),
    "float64": (pa.float64(), st.floats(allow_nan=False)),
    "float32": (pa.float32(), st.floats(allow_nan=False, width=32)),
    "timestamp": (pa.timestamp("ms", "UTC"), INTS),
}


@st.composite
def columns(draw: st.DrawFn, kinds: Sequence[str], *, null: bool) -> tuple[list[tuple[Any, ...]], list[pa.Array]]:
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    values = [st.one_of(FIELDS[k][1], st.none()) if null else FIELDS[k][1] for k in chosen]
    rows = draw(st.lists(st.tuples(*values), min_size=1, max_size=8))
    before, after = draw(st.integers(0, 9)), draw(st.integers(0, 3))
    arrays = []
    for number, kind in enumerate(chosen):
        column = [row[number] for row in rows]
        filler = [column[-1]] * before, [column[0]] * after  # seen only if the slice is not heeded
        whole = pa.array([*filler[0], *column, *filler[1]], FIELDS[kind][0])
        arrays.append(whole.slice(before, len(rows)))
    return rows, arrays


@given(columns(list(FIELDS), null=True))
def test_arrow_columns_hash_as_their_canonical_encoding(
    case: tuple[list[tuple[Any, ...]], list[pa.Array]],
) -> None:
    rows, arrays = case
    assert got(hash_columns(arrays, len(rows))) == want(rows)


@given(columns(["int64", "string"], null=False))
def test_python_values_hash_as_arrow_columns_do(case: tuple[list[tuple[Any, ...]], list[pa.Array]]) -> None:
    rows, arrays = case
    hashes = got(hash_values([list(c) for c in zip(*rows, strict=True)], len(rows)))
    assert hashes == want(rows) == got(hash_columns(arrays, len(rows)))


def test_a_timestamp_hashes_as_its_milliseconds() -> None:
    at = datetime(2013, 5, 7, 1, 2, 3, 4000, tzinfo=UTC)
    stamps = pa.array([at, None], pa.timestamp("ms", "UTC"))
    assert got(hash_columns([stamps], 2)) == want([(1367888523004,), (None,)])


def test_no_rows_have_no_hashes() -> None:
    empty = [pa.array([], pa.string()), pa.array([], pa.int64()), pa.array(["a"]).slice(0, 0)]
    assert hash_columns(empty, 0).shape == (0, 2)


def test_the_boundary_between_fields_counts() -> None:
    keys_ = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("abc\0", ""), ("abc", "\0")]
    hashes = got(hash_values([list(c) for c in zip(*keys_, strict=True)], len(keys_)))
    assert len(set(hashes)) == len(keys_)


@given(st.lists(INTS, min_size=1, max_size=50), st.sampled_from([1, 2, 3, 64, 1000]))
def test_slots_come_from_the_high_half(values: list[int], n_slots: int) -> None:
    assert slots_of(hash_values([values], len(values)), n_slots).tolist() == [
        hi % n_slots for _, hi in want([(v,) for v in values])
    ]


@nb.njit
def _hash_word(word: Any) -> Any:
    return hash_word(word)


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_word_hashed_inside_a_kernel_is_the_key_of_one_word(value: int) -> None:
    low, high = _hash_word(np.int64(value))
    assert [[low, high]] == hash_values([[value]], 1).tolist()
