"""Files mapped where huge pages fit."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import numpy as np
import pytest

from millpond.feature_actors.tiles.mapping import HUGE_BYTES, Mapping
from millpond.feature_actors.tiles.memory import Memory

MB = 1 << 20


def descriptor(length: int) -> int:
    made = os.memfd_create("test-mapping")
    os.ftruncate(made, length)
    return made


def maps_of(address: int) -> str | None:
    """Return what the kernel says of the mapping that begins at an address."""
    found = re.search(rf"^{address:x}-.*?VmFlags", Path("/proc/self/smaps").read_text(), re.DOTALL | re.MULTILINE)
    return None if found is None else found.group()


def test_what_one_writes_the_other_reads_and_huge_pages_keep_what_was_there() -> None:
    file = descriptor(4 * HUGE_BYTES)
    writer, reader = Mapping(file, writable=True), Mapping(file, writable=False)
    os.close(file)
    assert writer.address % HUGE_BYTES == reader.address % HUGE_BYTES == 0
    every = np.arange(HUGE_BYTES // 8, dtype=np.int64)  # each word of the first, one of the second
    writer.words[: len(every)] = every
    writer.words[len(every) + 7] = 42
    had = writer.huge(0, 2 * HUGE_BYTES)
    assert np.array_equal(reader.words[: len(every)], every)
    assert reader.words[len(every) + 7] == 42
    assert not reader.words[len(every) + 8 : 4 * len(every)].any()
    writer.words[3] = -1
    assert reader.words[3] == -1
    assert not reader.words.flags.writeable
    told = maps_of(writer.address)
    assert told is not None
    assert had == bool(re.search(r"ShmemPmdMapped: +4096 kB", told))


def test_it_is_there_as_long_as_an_array_over_it_and_gone_then() -> None:
    file = descriptor(HUGE_BYTES)
    mapping = Mapping(file, writable=True)
    os.close(file)
    address, some = mapping.address, mapping.words.view(np.float64)[5:9]
    del mapping
    gc.collect()
    some[:] = 1.5
    assert maps_of(address) is not None
    del some
    gc.collect()
    assert maps_of(address) is None


def test_more_than_there_are_addresses_is_an_error_and_nothing_is_mapped() -> None:
    file = descriptor(1 << 50)
    before = len(Path("/proc/self/maps").read_text().splitlines())
    with pytest.raises(OSError, match="no address space for"):
        Mapping(file, writable=True)
    os.close(file)
    assert len(Path("/proc/self/maps").read_text().splitlines()) == before


@pytest.mark.parametrize("with_file", [True, False])
def test_a_memory_grows_by_huge_pages_from_the_first_on(with_file: bool, tmp_path: Path) -> None:
    memory = Memory.create(tmp_path / "tiles" if with_file else None, 64 * MB)
    memory.grow(10)
    assert memory.allocated_bytes < MB  # a small one stays small
    ends = []
    while memory.limit_words * 8 < 11 * MB:
        memory.grow(1_000)
        ends.append(memory.limit_words)
        memory.words[memory.limit_words - 1] = memory.limit_words
    assert memory.limit_words * 8 % HUGE_BYTES == 0
    # The file, and what a file system on a disk keeps of where it is.
    assert 0 <= memory.allocated_bytes - memory.limit_words * 8 <= MB // 8
    # What was written while it grew is still there.
    assert [int(memory.words[end - 1]) for end in ends] == ends
