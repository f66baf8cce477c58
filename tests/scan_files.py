"""A process of its own that looks for values in every file of some folders: `python scan_files.py '{...}' FOLDER ...`.

Looked for are the bytes as they are, in files and in what they hold: values of SQLite, columns of Parquet, chunks of
snapshots, which are packed. It knows nothing of what is to be found but the values that it is given: `words` (integers
of 64 bits, in both byte orders) and `texts`. It prints where it found what, as JSON: `[[file, what], ...]`.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def needles(wanted: dict[str, list[Any]]) -> dict[bytes, str]:
    found = {}
    for word in wanted["words"]:
        unsigned = word % 2**64
        found[unsigned.to_bytes(8, "little")] = found[unsigned.to_bytes(8, "big")] = f"word {word}"
        found[str(word).encode()] = f"digits of {word}"
    for text in wanted["texts"]:
        found[text.encode()] = f"text {text}"
    return found


def contents(path: Path) -> Iterator[bytes]:
    """Yield what a file is and what it holds, as bytes."""
    raw = written(path)
    yield raw
    if raw[:4] == b"PAR1" and raw[-4:] == b"PAR1":
        # In this thread alone: one of Arrow's that still holds an object of Python when this process ends aborts it.
        table = pq.ParquetFile(pa.BufferReader(raw), pre_buffer=False).read(use_threads=False)
        for column in table.combine_chunks().columns:
            yield from buffers(column)
    if raw[:6] == b"MPSNAP":
        yield from unpacked(raw)
    if raw[:15] == b"SQLite format 3":
        with sqlite3.connect(path) as database:
            for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for row in database.execute(f'SELECT * FROM "{name}"'):
                    for value in row:
                        yield value if isinstance(value, bytes) else str(value).encode()


def written(path: Path) -> bytes:
    """Return what is in a file, without its holes."""
    parts, end = [], path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                break
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            parts.append(os.pread(file.fileno(), hole - at, at))
            at = hole
    return b"".join(parts)


def buffers(column: pa.ChunkedArray) -> Iterator[bytes]:
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        yield from (buffer.to_pybytes() for buffer in chunk.buffers() if buffer is not None)
        if pa.types.is_dictionary(chunk.type):
            yield from buffers(chunk.dictionary)


def unpacked(raw: bytes) -> Iterator[bytes]:
    """Yield the bodies of the chunks of a snapshot, by what FORMAT.md says of them."""
    at = 8
    while at < len(raw):
        head = int.from_bytes(raw[at + 4 : at + 8], "little")
        packed, size = (int.from_bytes(raw[at + i : at + i + 8], "little") for i in (16, 24))
        at += 32 + (head + 7) // 8 * 8
        if packed:
            yield pa.decompress(raw[at : at + packed], size, "lz4_raw", asbytes=True)
        at += (packed + 7) // 8 * 8


def main() -> None:
    wanted = needles(json.loads(sys.argv[1]))
    found = set()
    for folder in sys.argv[2:]:
        for path in sorted(Path(folder).rglob("*")):
            if stat.S_ISREG(path.lstat().st_mode):
                for content in contents(path):
                    found |= {(str(path), what) for needle, what in wanted.items() if needle in content}
    sys.stdout.write(json.dumps(sorted(found)))


if __name__ == "__main__":
    main()
