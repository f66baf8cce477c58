"""Masks: values that are personal, replaced by others of their type, the same for the same value and key.

A mask is a permutation: two values stay two, so entities stay apart, events stay as many, and joins go on working over
sources and fields. Without the key it cannot be told which value a mask stands for.

    integers   a Feistel network over the bits of the type, ten rounds; the round function is SipHash-2-4 with the key
    strings    the same over the characters that say something, so that the mask has the shape of the string: a digit
               becomes a digit, a letter one of its case, another character one of as many bytes in UTF-8; what else
               there is of ASCII (`@`, `.`, `-`, blanks) stays. Each half of the characters is a number, and each round
               adds to one what SHAKE-256 makes of key, shape and the other, modulo how many there are

So a mask tells the length and the shape of a string, and a string of one letter has 26 masks at most.

Source: Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions" (1988); ten rounds
and the modular addition as in NIST SP 800-38G (FF1).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.keys import absorb_words, begin, finish

__all__ = ["Mask", "can_mask", "read_key"]

Words = npt.NDArray[np.uint64]

_ROUNDS = 10
_KEY_BYTES, _KEY_BYTES_MIN = 32, 16
#: Masks of strings that are kept, so that those that come often are made once.
_KNOWN_MAX = 1_000_000
_ALL_VALID = np.zeros(0, np.bool_)

#: Characters that are replaced by each other: code points from, and before. Surrogates are no characters.
_KINDS = {
    "9": ((0x30, 0x3A),), "a": ((0x61, 0x7B),), "A": ((0x41, 0x5B),), "2": ((0x80, 0x800),),
    "3": ((0x800, 0xD800), (0xE000, 0x10000)), "4": ((0x10000, 0x110000),),
}  # fmt: skip
_SIZES = {kind: sum(end - begin for begin, end in ranges) for kind, ranges in _KINDS.items()}


def can_mask(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind))


def read_key(path: Path) -> bytes:
    """Return the key in a file, which is made (mode 0600) if it is not there. Raises `BadRequest`."""
    try:
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise BadRequest(f"mask key: `{path}` cannot be read or made: {error.strerror}") from None
    if len(key) < _KEY_BYTES_MIN:
        raise BadRequest(f"mask key: `{path}` has {len(key)} bytes; a key has {_KEY_BYTES_MIN} at least, of no pattern")
    return key


class Mask:
    """The mask of a key, `key` of any length.

    >>> mask = Mask(b"a key that nobody knows")
    >>> mask.text("Anna.B-7@x.org") == mask.text("Anna.B-7@x.org") != "Anna.B-7@x.org"
    True
    """

    def __init__(self, key: bytes) -> None:
        derived = hashlib.blake2b(key[64:], key=key[:64], digest_size=48, person=b"millpond-mask").digest()
        self._words = np.frombuffer(derived[:16], np.uint64)
        self._key = derived[16:]
        self._known: dict[str, str] = {}

    def column(self, column: pa.Array) -> pa.Array:
        """Return a column of integers or strings with each value masked; null stays null."""
        if pa.types.is_string(column.type):
            encoded = column.dictionary_encode()
            masks = pa.array([self.text(one) for one in encoded.dictionary.to_pylist()], column.type)
            return masks.take(encoded.indices)
        bits = column.type.bit_width
        unsigned = np.dtype(f"uint{bits}")
        values = column.fill_null(0).to_numpy(zero_copy_only=False).view(unsigned).astype(np.uint64)
        masked = self.words(values, bits).astype(unsigned).view(column.type.to_pandas_dtype())
        return pc.if_else(column.is_valid(), pa.array(masked, column.type), pa.scalar(None, column.type))

    def words(self, values: Words, bits: int) -> Words:
        """Return the permutation of values of so many bits (even), uint64 [n]."""
        half = np.uint64(bits // 2)
        low = np.uint64((1 << (bits // 2)) - 1)
        left, right = values >> half, values & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (self._round(number << 8 | bits, right) & low)
        return left << half | right

    def _round(self, number: int, half: Words) -> Words:
        state = begin(len(half), self._words[0], self._words[1])
        absorb_words(state, np.full(len(half), number, np.uint64), _ALL_VALID)
        absorb_words(state, np.ascontiguousarray(half), _ALL_VALID)
        hashes: Words = finish(state)
        return hashes[:, 0]

    def text(self, text: str) -> str:
        """Return the mask of a string."""
        mask = self._known.get(text)
        if mask is None:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            mask = self._known[text] = self._masked(text)
        return mask

    def _masked(self, text: str) -> str:
        kinds = [_kind(character) for character in text]
        places = [place for place, kind in enumerate(kinds) if kind is not None]
        if not places:
            return text
        shape = "".join(kind or f"'{character}" for kind, character in zip(kinds, text, strict=True)).encode()
        # Each half is one number, of as many values as its characters can have.
        halves = places[: len(places) // 2], places[len(places) // 2 :]
        numbers, sizes = [0, 0], [1, 1]
        for half, its_places in enumerate(halves):
            for place in its_places:
                size = _SIZES[kinds[place] or ""]
                numbers[half] = numbers[half] * size + _number(kinds[place], text[place])
                sizes[half] *= size
        widths = [(size.bit_length() + 7) // 8 for size in sizes]
        for number in range(_ROUNDS):
            one, other = 1 - number % 2, number % 2
            content = b"%b%d:%b:%b" % (self._key, number, shape, numbers[other].to_bytes(widths[other], "big"))
            added = hashlib.shake_256(content).digest(widths[one] + 8)  # so many more that no value is likelier
            numbers[one] = (numbers[one] + int.from_bytes(added, "big")) % sizes[one]
        masked = list(text)
        for half, its_places in enumerate(halves):
            for place in reversed(its_places):
                numbers[half], value = divmod(numbers[half], _SIZES[kinds[place] or ""])
                masked[place] = _character(kinds[place], value)
        return "".join(masked)


def _kind(character: str) -> str | None:
    """Return by what a character may be replaced, None if it stays."""
    code = ord(character)
    if code >= 0x80:
        return "2" if code < 0x800 else "3" if code < 0x10000 else "4"
    return "9" if character.isdigit() else "a" if character.islower() else "A" if character.isupper() else None


def _number(kind: str | None, character: str) -> int:
    """Return which one of its kind a character is."""
    code, before = ord(character), 0
    for first, end in _KINDS[kind or ""]:
        if code < end:
            return before + code - first
        before += end - first
    raise AssertionError(f"{character!r} is not of kind {kind}")


def _character(kind: str | None, number: int) -> str:
    for first, end in _KINDS[kind or ""]:
        if number < end - first:
            return chr(first + number)
        number -= end - first
    raise AssertionError(f"kind {kind} has no number {number}")
