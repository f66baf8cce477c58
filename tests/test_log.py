"""The log: records come back as they were written, in order, and what is not as it was written is refused."""

from __future__ import annotations

import pickle
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millpond.feature_actors.log.log import Log, LogFull
from millpond.feature_actors.log.record import EventsRecord, IdsRecord, LogDamaged, Record, decode, encode

SCHEMA = pa.schema([("user", pa.int64()), ("code", pa.string())])
SCHEMAS = {("orders", 1): SCHEMA}


def events(n: int, first: int = 0) -> EventsRecord:
    columns = [pa.array(range(first, first + n), pa.int64()), pa.array([f"ü{i}" if i % 3 else None for i in range(n)])]
    batch = pa.record_batch(columns, schema=SCHEMA)
    routes = np.arange(n, dtype=np.uint32) % 4
    return EventsRecord("orders", 1, 1_700_000_000_123, (("user",), ("user", "code")), np.arange(n) - 5, routes, batch)


def ids(n: int) -> IdsRecord:
    return IdsRecord("orders", -1, np.arange(2 * n, dtype=np.uint64).reshape(n, 2) << np.uint64(60), np.arange(n) - 1)


def same(one: Any, other: Any) -> bool:
    """Whether two records are the same, arrays and batches compared by content."""
    return type(one) is type(other) and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        for a, b in ((getattr(one, name), getattr(other, name)) for name in one.__slots__)
    )


def filled(folder: Path, records: Sequence[Record]) -> Log:
    log = Log(folder, "process")
    for record in records:
        log.append([record], SCHEMAS)
    return log


def rewrite(folder: Path, key: int, change: Any) -> None:
    """Change the stored value at a key, as a fault of the disk or an attacker would."""
    with sqlite3.connect(folder / "cache.db") as database:
        ((value,),) = database.execute("SELECT value FROM Cache WHERE key = ?", (key,))
        database.execute("UPDATE Cache SET value = ? WHERE key = ?", (change(value), key))
    database.close()


@pytest.mark.parametrize("n", [0, 1, 7, 1_000])
def test_records_come_back_as_they_were_written(n: int, tmp_path: Path) -> None:
    log = Log(tmp_path)
    assert (log.first, log.next, list(log.read())) == (0, 0, [])
    written: list[Record] = [events(n), ids(n), events(n, 9)]
    assert log.append(written[:2], SCHEMAS) == 0
    assert log.append(written[2:], SCHEMAS) == 3  # after the schema, which was written once
    log.close()
    again = Log(tmp_path)
    read = list(again.read())
    assert [offset for offset, _ in read] == [1, 2, 3]
    assert all(same(one, other) for one, (_, other) in zip(written, read, strict=True))
    assert again.append([events(2)], SCHEMAS) == 4


def test_what_was_appended_is_there_without_a_close(tmp_path: Path) -> None:
    log = filled(tmp_path, [events(3), ids(2)])
    assert [offset for offset, _ in Log(tmp_path).read()] == [1, 2]
    log.close()


@pytest.mark.parametrize("at", [0, 3, 4, 8, 15, 16, 21, 60, -1])
def test_a_changed_byte_anywhere_is_refused_and_the_offset_named(at: int, tmp_path: Path) -> None:
    filled(tmp_path, [events(5), ids(4), events(5)]).close()

    def flip(value: bytes) -> bytes:
        changed = bytearray(value)
        changed[at] ^= 0x40
        return bytes(changed)

    rewrite(tmp_path, 2, flip)
    read = Log(tmp_path).read()
    assert next(read)[0] == 1
    with pytest.raises(LogDamaged, match=r"^log: the record at offset 2 (fails its checksum|begins with b'.*'; this)"):
        next(read)


def test_a_record_in_another_place_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, [ids(1), ids(2)]).close()
    rewrite(tmp_path, 1, lambda _: encode(ids(2), 7))
    with pytest.raises(LogDamaged, match="the record at offset 1 says that it is at offset 7"):
        list(Log(tmp_path).read())


def test_a_gap_is_refused_when_the_log_is_opened(tmp_path: Path) -> None:
    filled(tmp_path, [ids(1), ids(2), ids(3)]).close()
    with sqlite3.connect(tmp_path / "cache.db") as database:
        database.execute("DELETE FROM Cache WHERE key = 1")
    database.close()
    with pytest.raises(LogDamaged, match="holds 2 records between offsets 0 and 2"):
        Log(tmp_path)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('unpickled')",))

    filled(tmp_path, [ids(1)]).close()
    with sqlite3.connect(tmp_path / "cache.db") as database:
        database.execute("UPDATE Cache SET mode = 4, value = ?", (pickle.dumps(Bomb()),))
    database.close()
    with pytest.raises(LogDamaged, match="a value is not of raw bytes"):
        list(Log(tmp_path).read())
    with sqlite3.connect(tmp_path / "cache.db") as database:
        database.execute("UPDATE Cache SET raw = 0, key = ?", (pickle.dumps(Bomb()),))
    database.close()
    with pytest.raises(LogDamaged, match="a key is bytes"):
        Log(tmp_path)


def test_a_later_format_and_garbage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LogDamaged, match="begins with b'MPL2'; this version reads b'MPL1'"):
        decode(b"MPL2" + encode(ids(1), 0)[4:], 0, {})
    (tmp_path / "cache.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(LogDamaged, match="cannot be opened"):
        Log(tmp_path)


def test_on_a_full_disk_nothing_is_written_and_all_is_as_before(tmp_path: Path) -> None:
    log = filled(tmp_path, [ids(3)])
    pages = log._cache._sql("PRAGMA page_count").fetchone()[0]
    log._cache._sql(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(LogFull, match="no room on the disk"):
        log.append([ids(2), events(20_000)], SCHEMAS)
    assert log.next == 1
    assert [offset for offset, _ in log.read()] == [0]
    log._cache._sql(f"PRAGMA max_page_count = {2**30}")
    assert log.append([events(20_000)], SCHEMAS) == 1
    assert [type(record) for _, record in log.read()] == [IdsRecord, EventsRecord]
