"""Strings in a memory: each distinct one once, named by its address, which stands for it in partials.

A string is never taken away, so there is a limit; beyond it a string is kept as "one of too many", which reads as
None.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.tiles.memory import M_LIMIT, M_USED, WORD_BYTES, Memory
from millpond.feature_actors.tiles.structure import LINE_WORDS

__all__ = ["ONE_OF_TOO_MANY", "StringReader", "Strings"]

#: In place of the address of a string for which there was no room; no string lies in a memory's header.
ONE_OF_TOO_MANY = 1.0


class Strings:
    """The strings of a memory, for its writer."""

    def __init__(self, memory: Memory, strings_max: int) -> None:
        self._memory = memory
        self._max = strings_max
        self._addresses: dict[str, float] = {}
        #: How often a string was one of too many.
        self.refused = 0

    def __len__(self) -> int:
        return len(self._addresses)

    def words_for(self, column: pa.Array) -> int:
        """Return how many words the strings of a column may need at most."""
        return int(column.nbytes) // WORD_BYTES + 2 * len(column) + LINE_WORDS

    def addresses(self, column: pa.Array) -> npt.NDArray[np.float64]:
        """Return the address of each string of a column, float64 [n], NaN for null; there must be room."""
        encoded = column.dictionary_encode()
        distinct = encoded.dictionary.to_pylist()
        known = np.array([self._address(text) for text in distinct], np.float64)
        self._memory.words[M_USED] = (self._memory.words[M_USED] + LINE_WORDS - 1) // LINE_WORDS * LINE_WORDS
        places = encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)
        addresses: npt.NDArray[np.float64] = np.append(known, np.nan)[places]
        self.refused += int(np.count_nonzero(addresses == ONE_OF_TOO_MANY))
        return addresses

    def _address(self, text: str) -> float:
        address = self._addresses.get(text)
        if address is None:
            if len(self._addresses) >= self._max:
                return ONE_OF_TOO_MANY
            content = text.encode()
            words, at = self._memory.words, int(self._memory.words[M_USED])
            length = (len(content) + WORD_BYTES - 1) // WORD_BYTES
            words[at] = len(content)
            words[at + 1 : at + 1 + length] = np.frombuffer(content.ljust(length * WORD_BYTES, b"\0"), np.int64)
            words[M_USED] = at + 1 + length
            address = self._addresses[text] = float(at)
        return address


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
            at, words = int(address), self._memory.words
            length = int(words[at])
            assert 0 < at < words[M_LIMIT]
            assert 0 <= length <= (words[M_LIMIT] - at) * WORD_BYTES
            text = words[at + 1 : at + 2 + length // WORD_BYTES].tobytes()[:length].decode()
            self._texts[address] = text
        return text
