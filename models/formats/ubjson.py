"""UBJSON (draft 12), as XGBoost writes it: values behind their types and lengths, read with every length checked."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["read_ubjson"]

_INTEGERS = {b"i": ">i1", b"U": ">u1", b"I": ">i2", b"l": ">i4", b"L": ">i8"}
_NUMBERS = {**_INTEGERS, b"d": ">f4", b"D": ">f8"}
_CONSTANTS = {b"Z": None, b"T": True, b"F": False}


def read_ubjson(content: bytes) -> Any:
    """Return the one value of a file. Raises `ValueError` if it is cut off, or is more or something else."""
    reader = _Reader(content)
    value = reader.value(reader.take(1))
    if reader.at != len(content):
        raise ValueError(f"UBJSON: {len(content) - reader.at} bytes too many")
    return value


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, n: int) -> bytes:
        taken = self.content[self.at : self.at + n]
        if n < 0 or len(taken) != n:
            raise ValueError(f"UBJSON: {n} bytes expected at {self.at}, {len(taken)} are there")
        self.at += n
        return taken

    def numbers(self, kind: bytes, n: int) -> list[Any]:
        dtype = np.dtype(_NUMBERS[kind])
        values: list[Any] = np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist()
        return values

    def length(self) -> int:
        kind = self.take(1)
        if kind not in _INTEGERS:
            raise ValueError(f"UBJSON: {kind!r} at {self.at} is no type of a length")
        return int(self.numbers(kind, 1)[0])

    def value(self, kind: bytes) -> Any:
        if kind in _NUMBERS:
            return self.numbers(kind, 1)[0]
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        if kind == b"S":
            return self.take(self.length()).decode()
        if kind == b"{":
            return self.object()
        if kind == b"[":
            return self.array()
        raise ValueError(f"UBJSON: {kind!r} at {self.at} is no type")

    def object(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        while self.content[self.at : self.at + 1] != b"}":
            name = self.take(self.length()).decode()
            fields[name] = self.value(self.take(1))
        self.at += 1
        return fields

    def array(self) -> list[Any]:
        head = self.content[self.at : self.at + 1]
        if head == b"$":  # all of one type
            kind = self.take(2)[1:]
            if kind not in _NUMBERS or self.take(1) != b"#":
                raise ValueError(f"UBJSON: an array at {self.at} is not of numbers")
            return self.numbers(kind, self.length())
        if head == b"#":
            self.at += 1
            return [self.value(self.take(1)) for _ in range(self.length())]
        values = []
        while (kind := self.take(1)) != b"]":
            values.append(self.value(kind))
        return values
