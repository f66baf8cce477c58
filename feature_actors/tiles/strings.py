"""Strings in a memory: each distinct one once, named by its address, which stands for it in partials.

A string is never taken away, so there is a limit; beyond it a string is kept as "one of too many", which reads as
None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.tiles.memory import M_LIMIT, M_USED, WORD_BYTES, Memory
from millpond.feature_actors.tiles.structure import LINE_WORDS

__all__ = ["ONE_OF_TOO_MANY", "StringReader", "Strings"]

#: A step of an image of all strings has so many at most, of so many characters but for the last: about a millisecond.
IMAGE_STRINGS_MAX, IMAGE_CHARACTERS_MAX = 4_096, 1 << 20
#: In place of the address of a string for which there was no room; no string lies in a memory's header.
ONE_OF_TOO_MANY = 1.0


class Strings:
    """The strings of a memory, for its writer."""

    def __init__(self, memory: Memory, strings_max: int) -> None:
        self._memory = memory
        self._max = strings_max
        self._addresses: dict[str, float] = {}
        self._in_order: list[str] = []
        #: How often a string was one of too many.
        self.refused = 0

    def __len__(self) -> int:
        return len(self._addresses)

    @staticmethod
    def words_for(column: pa.Array) -> int:
        """Return how many words the strings of a column may need at most."""
        return int(column.nbytes) // WORD_BYTES + 2 * len(column) + LINE_WORDS

    def addresses(self, column: pa.Array) -> npt.NDArray[np.float64]:
        """Return the address of each string of a column, float64 [n], NaN for null. Raises `MemoryFull`."""
        encoded = column.dictionary_encode()
        distinct = encoded.dictionary.to_pylist()
        self._keep([text for text in distinct if text not in self._addresses])
        known = np.array([self._addresses.get(text, ONE_OF_TOO_MANY) for text in distinct], np.float64)
        places = encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)
        addresses: npt.NDArray[np.float64] = np.append(known, np.nan)[places]
        self.refused += int(np.count_nonzero(addresses == ONE_OF_TOO_MANY))
        return addresses

    def _keep(self, texts: list[str]) -> None:
        """Write new strings into the memory, as many as are allowed: the length in bytes, then the bytes."""
        contents = [text.encode() for text in texts[: max(self._max - len(self._addresses), 0)]]
        lengths = [1 + (len(content) + WORD_BYTES - 1) // WORD_BYTES for content in contents]
        wanted = (sum(lengths) + LINE_WORDS - 1) // LINE_WORDS * LINE_WORDS
        words = self._memory.words
        if words[M_LIMIT] - words[M_USED] < wanted:
            self._memory.grow(wanted)
        at = int(words[M_USED])
        words[M_USED] = at + wanted
        for text, content, length in zip(texts, contents, lengths, strict=False):
            words[at] = len(content)
            words[at + 1 : at + length] = np.frombuffer(content.ljust((length - 1) * WORD_BYTES, b"\0"), np.int64)
            self._addresses[text] = float(at)
            self._in_order.append(text)
            at += length

    def image(self) -> Iterator[tuple[npt.NDArray[np.float64], list[str]]]:
        """Yield addresses, float64 [n], and strings in steps of bounded size, all of them up to the last step."""
        start, size = 0, 0
        while start < len(self._in_order):
            texts = []
            for text in self._in_order[start : start + IMAGE_STRINGS_MAX]:
                texts.append(text)
                size += len(text)
                if size >= IMAGE_CHARACTERS_MAX:
                    break
            start, size = start + len(texts), 0
            yield np.array([self._addresses[text] for text in texts], np.float64), texts

    def __contains__(self, text: str) -> bool:
        return text in self._addresses

    def addresses_of(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return the addresses of strings that are kept, float64 [n]."""
        return np.array([self._addresses[text] for text in texts], np.float64)

    def remove(self, texts: Sequence[str]) -> None:
        """Remove strings that nothing names any more, and overwrite them."""
        for text in texts:
            at = int(self._addresses.pop(text))
            self._memory.words[at : at + 2 + len(text.encode()) // WORD_BYTES] = 0
        gone = set(texts)
        self._in_order = [text for text in self._in_order if text not in gone]

    def load(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Keep the strings of an image; return the address of each now, float64 [n]. Raises `MemoryFull`."""
        return self.addresses(pa.array(texts, pa.string()))


class StringReader:
    """The strings of a memory, for its readers."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._texts: dict[float, str] = {}

    def text(self, address: float) -> str | None:
        """Return the string at an address that was read from the memory; None for NaN and for one of too many."""
        if address != address or address == ONE_OF_TOO_MANY:
            return None
        text = self._texts.get(address)
        if text is None:
            text = self._texts[address] = self._read(address)
        return text

    def _read(self, address: float) -> str:
        words = self._memory.words
        limit = int(words[M_LIMIT])
        try:
            at = int(address)
            length = int(words[at]) if 0 < at < limit else -1
            if 0 <= length < (limit - at) * WORD_BYTES:
                return words[at + 1 : at + 2 + length // WORD_BYTES].tobytes()[:length].decode()
        except (OverflowError, UnicodeDecodeError):
            pass
        raise Unavailable(f"memory `{self._memory.name}` is damaged: no string at {address}", retry_after_ms=10_000)
