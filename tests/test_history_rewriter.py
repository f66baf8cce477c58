"""A history in which somebody was forgotten is read as it was, or with tokens, whatever ends while it is rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_history import ORDERS, Crash, content, crashing, day, parquet_of, story, write

from millpond.feature_actors.erasure import Erasure
from millpond.feature_actors.log.folder import Folder, HistoryUnavailable
from millpond.feature_actors.log.history_reader import check_history, is_there, read_history, scan_history
from millpond.feature_actors.log.history_rewriter import rewrite_history
from millpond.feature_actors.log.part import parts_of, read_part
from millpond.feature_actors.log.record import EventsRecord
from millpond.feature_actors.tombstones import Tombstones, tombstone_of


def erasure() -> Erasure:
    """User 0, up to the second record."""
    tombstones = Tombstones(None, (7, 9))
    tombstones.take([tombstone_of((7, 9), "user", 0, day(2, 6))])
    return Erasure(tombstones, {"orders": ORDERS})


def erased(of: Erasure) -> list[Any]:
    records: list[Any] = []
    for offset, record in story():
        assert isinstance(record, EventsRecord)
        records.append((offset, of.record(record, of.forgotten("orders", record.batch, record.arrivals))))
    return content(records)


@pytest.mark.parametrize("crash_at", range(13))
def test_after_a_crash_it_is_as_it_was_or_as_it_is_to_be(crash_at: int, tmp_path: Path) -> None:
    base, of = str(tmp_path / "h"), erasure()
    write(base, story(), ends=[2])
    steps = len(parquet_of(tmp_path / "h"))
    try:
        with crashing(crash_at):
            assert rewrite_history(base, 0, of, tmp_path) == 3  # two events, one of them in the files of two routes
    except Crash:
        assert content(read_history(base, 0)) in (content(story()), erased(of))
        assert sum(map(len, scan_history(base, ORDERS))) == 6
        rewrite_history(base, 0, of, tmp_path)
    assert content(read_history(base, 0)) == erased(of)
    assert sum(map(len, scan_history(base, ORDERS))) == 6
    assert check_history(base, 0, 4) == []
    # What was there before has gone; the part in which nothing was forgotten is what it was.
    assert len(parquet_of(tmp_path / "h")) < steps
    assert [p.name for p in sorted((tmp_path / "h" / "_parts" / "000").iterdir())] == [
        "000-1-00000000000000000000-00000000000000000002-r1.json",
        "000-1-00000000000000000002-00000000000000000004.json",
    ]  # fmt: skip
    assert rewrite_history(base, 0, of, tmp_path) == 0
    assert content(read_history(base, 0)) == erased(of)


def test_a_reader_under_whom_it_is_rewritten_is_told_to_read_again(tmp_path: Path) -> None:
    base, of = str(tmp_path / "h"), erasure()
    write(base, story(), ends=[2])
    folder = Folder(base)
    before = read_part(folder, parts_of(folder, 0)[0])  # as a reader has it that has begun
    assert all(is_there(folder, before, file, {}) for file in before.files)
    rewrite_history(base, 0, of, tmp_path)
    replaced = [file for file in before.files if not (tmp_path / "h" / before.path(file)).exists()]
    assert replaced
    for file in replaced:
        with pytest.raises(HistoryUnavailable, match="has just been rewritten"):
            is_there(folder, before, file, {})


def test_what_an_attempt_at_a_part_has_left_goes_too(tmp_path: Path) -> None:
    base, of = tmp_path / "h", erasure()
    write(str(base), story())
    folder = parquet_of(base)[0].parent
    left = [
        folder / ".000-1-00000000000000000004-00000000000000000009.parquet.1",
        folder / "000-1-00000000000000000004-00000000000000000009.parquet",
    ]
    others = folder / "001-1-00000000000000000004-00000000000000000009.parquet"
    for path in (*left, others):
        path.write_bytes(b"of a part without a marker")
    rewrite_history(str(base), 0, of, tmp_path)
    assert [path.exists() for path in (*left, others)] == [False, False, True]
