"""Masks are permutations by a key, of the type and shape of what they stand for."""

from __future__ import annotations

import itertools
import stat
import string
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.cluster.packs.masking import Mask, can_mask, read_key
from millpond.feature_actors.errors import BadRequest

KEYS = st.binary(min_size=16, max_size=80)
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


def masked(mask: Mask, values: list[Any], kind: str) -> list[Any]:
    column = mask.column(pa.array(values, pa.type_for_alias(kind)))
    assert column.type == pa.type_for_alias(kind)
    return column.to_pylist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16"])
def test_of_a_small_type_every_value_is_the_mask_of_one(kind: str) -> None:
    limits = np.iinfo(kind)
    every = list(range(limits.min, limits.max + 1))
    masks = masked(Mask(b"some key of ours"), every, kind)
    assert sorted(masks) == every
    assert sum(a == b for a, b in zip(masks, every, strict=True)) < 10


@given(key=KEYS, data=st.data())
def test_two_integers_have_two_masks_the_same_ones_in_every_column(key: bytes, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(INTEGERS))
    limits = np.iinfo(kind)
    values = data.draw(st.lists(st.integers(limits.min, limits.max), unique=True, max_size=50))
    masks = masked(Mask(key), values, kind)
    assert len(set(masks)) == len(values)
    assert masked(Mask(key), [None, *reversed(values)], kind) == [None, *reversed(masks)]


def test_the_mask_of_a_range_of_ids_has_no_pattern() -> None:
    masks = np.array(masked(Mask(b"some key of ours"), list(range(100_000)), "int64"), np.int64).view(np.uint64)
    ones = [int(np.count_nonzero(masks >> np.uint64(bit) & np.uint64(1))) for bit in range(64)]
    assert 49_000 < min(ones) < max(ones) < 51_000  # six standard deviations
    steps = np.unique(np.diff(masks))
    assert len(steps) == 99_999


@given(key=KEYS, other=KEYS)
def test_another_key_gives_other_masks(key: bytes, other: bytes) -> None:
    values, texts = list(range(40)), [f"user-{n:08}@example.org" for n in range(40)]
    same = key == other
    assert (masked(Mask(key), values, "int64") == masked(Mask(other), values, "int64")) == same
    assert (masked(Mask(key), texts, "string") == masked(Mask(other), texts, "string")) == same


@given(key=KEYS, texts=st.lists(TEXTS, unique=True, max_size=30))
def test_two_strings_have_two_masks_of_their_shape(key: bytes, texts: list[str]) -> None:
    masks = masked(Mask(key), texts, "string")
    assert len(set(masks)) == len(texts)
    assert masked(Mask(key), [None, *reversed(texts)], "string") == [None, *reversed(masks)]
    for text, mask in zip(texts, masks, strict=True):
        assert len(mask) == len(text)
        assert len(mask.encode()) == len(text.encode())
        for a, b in zip(text, mask, strict=True):
            assert shape_of(a) == shape_of(b)


def shape_of(character: str) -> str:
    for kind in (string.digits, string.ascii_lowercase, string.ascii_uppercase):
        if character in kind:
            return kind
    return character if character.isascii() else f"{len(character.encode())} bytes"


@pytest.mark.parametrize("alphabets", [["0123456789"], [string.ascii_lowercase] * 2, ["01", "ab", "AB"], ["é"]])
def test_of_short_strings_every_one_is_the_mask_of_one(alphabets: list[str]) -> None:
    full = {string.digits[0]: string.digits, "a": string.ascii_lowercase, "A": string.ascii_uppercase}
    alphabets = [full.get(alphabet[0], alphabet) for alphabet in alphabets]
    if alphabets == ["é"]:
        alphabets = ["".join(map(chr, range(0x80, 0x800)))]
    every = ["".join(one) for one in itertools.product(*alphabets)]
    assert sorted(masked(Mask(b"some key of ours"), every, "string")) == sorted(every)


def test_nothing_is_left_of_a_name() -> None:
    mask = Mask(b"some key of ours")
    assert mask.text("@.-_ !") == "@.-_ !"
    assert mask.text("") == ""
    for text in ("anna.berg@example.org", "日本語🐟ü", "+43 660 1234567"):
        same = sum(a == b for a, b in zip(text, mask.text(text), strict=True) if shape_of(a) != a)
        assert same < len(text) / 2


def test_what_can_be_masked() -> None:
    assert [can_mask(kind) for kind in (pa.int8(), pa.uint64(), pa.string())] == [True] * 3
    assert not any(can_mask(kind) for kind in (pa.float64(), pa.bool_(), pa.timestamp("ms", "UTC")))


def test_a_key_file_is_made_once_for_its_owner_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = read_key(path)
    assert (len(key), stat.S_IMODE(path.stat().st_mode), read_key(path)) == (32, 0o600, key)
    path.write_bytes(b"too short")
    with pytest.raises(BadRequest, match=r"mask key: .* has 9 bytes; a key has 16 at least"):
        read_key(path)
    with pytest.raises(BadRequest, match=r"mask key: .* cannot be read or made"):
        read_key(tmp_path / "no" / "folder")
