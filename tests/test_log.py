"""The log: records come back as they were written, in order, and what is not as it was written is refused."""

from __future__ import annotations

import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millpond.feature_actors.log.log import Log, LogFull
from millpond.feature_actors.log.reader import LogReader
from millpond.feature_actors.log.record import (
    EventsRecord,
    HomeRecord,
    LogDamaged,
    OfferRecord,
    Record,
    TakeRecord,
    decode,
    encode,
)

SCHEMA = pa.schema([("user", pa.int64()), ("code", pa.string())])


def events(n: int, first: int = 0) -> EventsRecord:
    columns = [pa.array(range(first, first + n), pa.int64()), pa.array([f"ü{i}" if i % 3 else None for i in range(n)])]
    batch = pa.record_batch(columns, schema=SCHEMA)
    routes = np.arange(n, dtype=np.uint32) % 4
    return EventsRecord("orders", 1, 1_700_000_000_123, (("user",), ("user", "code")), np.arange(n) - 5, routes, batch)


def offer(n: int) -> OfferRecord:
    of = events(n)
    ids = np.arange(2 * n, dtype=np.uint64).reshape(n, 2) << np.uint64(60)
    return OfferRecord("visits", 2, -1, (), of.arrivals, of.routes, of.batch, ids)


def take(n: int) -> TakeRecord:
    return TakeRecord(0, np.arange(n) * 3, (HomeRecord(0, 5, 4), HomeRecord(7, 2**40, 0)))


def same(one: Any, other: Any) -> bool:
    """Whether two records are the same, arrays and batches compared by content."""
    return type(one) is type(other) and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        for a, b in ((getattr(one, name), getattr(other, name)) for name in one.__slots__)
    )


def filled(folder: Path, records: Sequence[Record]) -> Log:
    log = Log(folder, "process")
    for record in records:
        log.append([record])
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
    delivered = events(n, 9)
    delivered.homes = (HomeRecord(3, 4, 1),)
    written: list[Record] = [events(n), offer(n), take(n), delivered]
    assert log.append(written[:2]) == [0, 1]
    assert log.append(written[2:], settled=2) == [2, 3]
    log.close()
    again = Log(tmp_path)
    read = list(again.read())
    assert [(offset, settled) for offset, (_, settled) in read] == [(0, 0), (1, 0), (2, 2), (3, 2)]
    assert all(same(one, other) for one, (_, (other, _)) in zip(written, read, strict=True))
    assert [offset for offset, _ in again.read(2)] == [2, 3]
    assert again.append([events(2)]) == [4]


def test_numbers_are_read_where_they_lie(tmp_path: Path) -> None:
    log = filled(tmp_path, [offer(5)])
    record = log.get(0).record
    assert isinstance(record, OfferRecord)
    assert record.ids is not None
    assert all(a.flags.aligned and not a.flags.owndata for a in (record.arrivals, record.routes, record.ids))


def test_a_record_can_be_read_without_those_before_it(tmp_path: Path) -> None:
    filled(tmp_path, [events(3), events(4)]).close()
    assert same(Log(tmp_path).get(1).record, events(4))


def test_a_schema_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, [events(3)]).close()
    (schema,) = (tmp_path / "schemas").iterdir()
    schema.write_bytes(b"x" + schema.read_bytes()[1:])
    with pytest.raises(LogDamaged, match=r"^log: the schema `.*\.arrow` cannot be read: it is not what its name says"):
        list(Log(tmp_path).read())
    schema.unlink()
    with pytest.raises(LogDamaged, match=r"cannot be read: \[Errno 2\]"):
        list(Log(tmp_path).read())


def test_what_was_appended_is_there_without_a_close(tmp_path: Path) -> None:
    log = filled(tmp_path, [events(3), take(2)])
    assert [offset for offset, _ in Log(tmp_path).read()] == [0, 1]
    log.close()


@pytest.mark.parametrize("at", [0, 3, 4, 8, 15, 16, 21, 60, -1])
def test_a_changed_byte_anywhere_is_refused_and_the_offset_named(at: int, tmp_path: Path) -> None:
    filled(tmp_path, [take(1), events(5), offer(4), events(5)]).close()

    def flip(value: bytes) -> bytes:
        changed = bytearray(value)
        changed[at] ^= 0x40
        return bytes(changed)

    rewrite(tmp_path, 2, flip)
    read = Log(tmp_path).read()
    assert [next(read)[0], next(read)[0]] == [0, 1]
    with pytest.raises(LogDamaged, match=r"^log: the record at offset 2 (fails its checksum|begins with b'.*'; this)"):
        next(read)


def test_a_record_in_another_place_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, [take(1), take(2)]).close()
    rewrite(tmp_path, 1, lambda _: encode(take(2), 7, 0, ""))
    with pytest.raises(LogDamaged, match="the record at offset 1 says that it is at offset 7"):
        list(Log(tmp_path).read())


def test_a_gap_is_refused_when_the_log_is_opened(tmp_path: Path) -> None:
    filled(tmp_path, [take(1), take(2), take(3)]).close()
    with sqlite3.connect(tmp_path / "cache.db") as database:
        database.execute("DELETE FROM Cache WHERE key = 1")
    database.close()
    with pytest.raises(LogDamaged, match="holds 2 records between offsets 0 and 2"):
        Log(tmp_path)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('unpickled')",))

    filled(tmp_path, [take(1)]).close()
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
    with pytest.raises(LogDamaged, match="begins with b'MPL3'; this version reads b'MPL2'"):
        decode(b"MPL3" + encode(take(1), 0, 0, "")[4:], 0, lambda name: SCHEMA)
    (tmp_path / "cache.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(LogDamaged, match="cannot be opened"):
        Log(tmp_path)


def test_on_a_full_disk_nothing_is_written_and_all_is_as_before(tmp_path: Path) -> None:
    log = filled(tmp_path, [take(3)])
    pages = log._cache._sql("PRAGMA page_count").fetchone()[0]
    log._cache._sql(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(LogFull, match="no room on the disk"):
        log.append([take(2), events(20_000)])
    assert log.next == 1
    assert [offset for offset, _ in log.read()] == [0]
    log._cache._sql(f"PRAGMA max_page_count = {2**30}")
    assert log.append([events(20_000)]) == [1]
    assert [type(record) for _, (record, _) in log.read()] == [TakeRecord, EventsRecord]


_FULL_DISK = """
import sys
from pathlib import Path
from millpond.feature_actors.log.log import Log, LogFull
from test_log import events, take

log = Log(Path(sys.argv[1]))
log.append([take(3)])
try:
    log.append([events(200_000)])
except LogFull as full:
    assert sys.argv[1] in full.message, full.message
else:
    raise AssertionError("there was room")
assert log.next == 1
assert log.append([take(2)]) == [1]
log.close()
assert [offset for offset, _ in Log(Path(sys.argv[1])).read()] == [0, 1]
"""


def test_a_transaction_that_outgrows_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    """Larger than SQLite's cache, it meets the full disk before its end, and SQLite takes it back itself."""
    try:
        subprocess.run(["unshare", "-m", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a disk of 2 MB")
    mount = 'mount -t tmpfs -o size=2m tmpfs "$2" && exec "$0" -c "$1" "$2"'
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, sys.executable, _FULL_DISK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_who_reads_is_not_waited_for_when_the_write_ahead_file_is_emptied(tmp_path: Path) -> None:
    """Appends would have to wait as long; the reader is here until the call comes back."""
    log = filled(tmp_path, [events(3)])
    with closing(LogReader(tmp_path)) as reader, ThreadPoolExecutor(1) as thread:
        log.append([events(3)])
        emptied = thread.submit(log.empty_write_ahead)
        try:
            assert emptied.result(timeout=20) is False
        finally:
            reader.close()
    assert log.empty_write_ahead()
    assert (tmp_path / "cache.db-wal").stat().st_size == 0
    assert log._cache._sql("PRAGMA busy_timeout").fetchall() == [(60_000,)]  # else a reader would fail an append
    log.close()
