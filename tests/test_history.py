"""The history: what was in the log comes back from Parquet as it was, whatever happened while it was written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.dataset as dataset
import pyarrow.parquet as pq
import pytest
import worlds
from folders import folder
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from millpond.feature_actors import Field, Source
from millpond.feature_actors.log import folder as folder_module
from millpond.feature_actors.log import history
from millpond.feature_actors.log.folder import Folder, HistoryUnavailable, public_uri
from millpond.feature_actors.log.history import History, HistoryDamaged, delete_expired
from millpond.feature_actors.log.history_reader import check_history, read_history, scan_history
from millpond.feature_actors.log.part import DAY_MS
from millpond.feature_actors.log.record import EventsRecord, Record, TakeRecord

Records = list[tuple[int, Record]]

NOON_MS = 1_700_000_000_000  # 2023-11-14
KEYS = (("user",), ("code", "small", "user"), ("home",), tuple(f"{'k' * 60}{i}" for i in range(9)))
DAYS = (0, -1, 19_675, 19_676, 84_005, -800_000)  # 1970, 1969, two of 2023, 2199, and one long before all


def evolved(name: str, schema: int) -> Source:
    """A source as it was declared first, with a field more, and with another one more under the same version."""
    of = worlds.source(name, "id", version=1 + (schema > 0))
    more = {"more": Field("string", default="none"), "again": Field("uint8", optional=True)}
    return dataclasses.replace(of, fields={**of.fields, **dict(list(more.items())[:schema])})


def day(of: int, after_ms: int = 0) -> int:
    return of * DAY_MS + after_ms


# -- an oracle: what of the log is in the history, and how it is compared


def rows_of(record: EventsRecord) -> list[Any]:
    """All of a record, row by row, by which two records can be compared: -0.0 is not 0.0."""
    columns = [c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c for c in record.batch.columns]
    values = zip(*(c.to_pylist() for c in columns), strict=True)
    return [repr(r) for r in zip(record.arrivals.tolist(), record.routes.tolist(), values, strict=True)]


def content(records: Iterator[tuple[int, EventsRecord]] | Records) -> list[Any]:
    """What of records the history keeps: events that went anywhere."""
    kept = []
    for offset, record in records:
        if isinstance(record, EventsRecord) and record.routes.any():
            rows = [r for r, routes in zip(rows_of(record), record.routes, strict=True) if routes]
            head = (offset, record.source, record.version, record.received_ms, record.tables)
            assert record.arrivals.dtype == np.int64
            assert record.routes.dtype == np.uint32
            kept.append((*head, record.batch.schema.to_string(), rows))
    return kept


# -- random logs


@st.composite
def logs(draw: st.DrawFn) -> Records:
    records: Records = []
    for offset in range(draw(st.integers(1, 10))):
        if draw(st.integers(0, 5)) == 0:
            records.append((offset, TakeRecord(0, np.arange(2), ())))
            continue
        of = evolved(draw(st.sampled_from(["first", "second"])), draw(st.integers(0, 2)))
        tables = draw(st.sampled_from([(), KEYS[:1], KEYS[:1], KEYS, KEYS[::-1]]))
        width = len(worlds._CHOICES)
        drawn = draw(st.binary(min_size=width + 2, max_size=8 * (width + 2)))
        points = [drawn[i : i + width + 2] for i in range(0, len(drawn) - width - 1, width + 2)]
        sent: list[dict[str, Any]] = []
        events = [worlds._event(p[:width], NOON_MS, sent) for p in points]
        for event, point in zip(events, points, strict=True):
            event |= {"more": ("x", "", "ü🐟")[point[1] % 3], "again": (None, 0, 255)[point[2] % 3]}
        days = [DAYS[p[width] % len(DAYS)] if draw(st.booleans()) else DAYS[0] for p in points]
        arrivals = np.array([day(d, p[3] * 337_500) for d, p in zip(days, points, strict=True)], np.int64)
        routes = np.array([p[width + 1] % (2 << len(tables)) for p in points], np.uint32)
        received_ms = draw(st.sampled_from([-1, 0, NOON_MS]))
        batch = worlds.batch(of, events)
        records.append((offset, EventsRecord(of.name, of.version, received_ms, tables, arrivals, routes, batch)))
    return records


class Crash(Exception):
    """The process ends here."""


@contextmanager
def crashing(at: int | None) -> Iterator[None]:
    """Crash at the step of that number: before or after anything is written or deleted, or when half of it is there."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps - 1 == at:
            raise Crash

    write, delete, write_json = Folder.write, Folder.delete, history.write_json

    def write_or_crash(self: Folder, path: str, content: Any, tag: str) -> Any:
        step()
        try:
            step()
        except Crash:
            part, _, name = path.rpartition("/")
            write(self, f"{part}/.{name}.{tag}", content, "half")
            raise
        done = write(self, path, content, tag)
        step()
        return done

    def delete_or_crash(self: Folder, path: str) -> None:
        step()
        delete(self, path)

    def write_json_or_crash(*args: Any) -> None:
        step()
        write_json(*args)
        step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "write", write_or_crash)
        patch.setattr(Folder, "delete", delete_or_crash)
        patch.setattr(history, "write_json", write_json_or_crash)
        yield


def write(base: Path | str, records: Records, shard: int = 0, ends: Sequence[int] = ()) -> History:
    """Write records as parts, which end at offsets."""
    shard_dir = Path(tempfile.mkdtemp())
    of = History(str(base), shard, shard_dir, epoch=1)
    for end in (*ends, records[-1][0] + 1):
        of.write_part(end, records)
    shutil.rmtree(shard_dir)
    return of


@given(log=logs(), data=st.data())
def test_after_crashes_at_any_step_all_is_read_back_as_it_was_written_once(log: Records, data: st.DataObject) -> None:
    with folder() as base, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)  # for the time it takes
        patch.setattr(history, "_RECORD_BYTES", history._GATHERED_BYTES // data.draw(st.integers(1, 5)))
        patch.setattr(history, "_GROUP_ROWS", data.draw(st.integers(1, 30)))
        (base / "shard").mkdir()
        epoch, done_to = 0, 0
        writer = History(str(base / "h"), 7, base / "shard", epoch)
        while done_to < len(log):
            to_offset = data.draw(st.integers(done_to + 1, len(log)))
            crash_at = data.draw(st.none() | st.integers(0, 40))
            before = writer.planned_to
            try:
                with crashing(crash_at):
                    writer.write_part(to_offset, log if data.draw(st.booleans()) else log[done_to:])
                assert writer.done_to == (before or to_offset)
            except Crash:
                epoch += 1
                writer = History(str(base / "h"), 7, base / "shard", epoch)
                assert done_to <= writer.done_to
                assert before is None or before in (writer.planned_to, writer.done_to)
            done_to = writer.done_to
            if writer.planned_to is None:
                assert check_history(str(base / "h"), 7, done_to) == []
            assert content(read_history(str(base / "h"), 7, 0, done_to)) == content(log[:done_to])
        left = [p for p in (base / "h").rglob("*") if p.name.startswith(".")]
        assert left == []
        at = data.draw(st.integers(0, len(log)))
        assert content(read_history(str(base / "h"), 7, at)) == content(log[at:])


@given(log=logs(), other=logs(), data=st.data())
def test_the_events_of_a_source_are_scanned_over_shards_by_arrival_as_it_is_declared_now(
    log: Records, other: Records, data: st.DataObject
) -> None:
    with folder() as base, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        for shard, records in enumerate((log, other)):
            write(base, records, shard, data.draw(st.lists(st.integers(1, len(records)), max_size=3).map(sorted)))
            assert check_history(str(base), shard) == []
            assert content(read_history(str(base), shard)) == content(records)
        now = evolved("first", 2)
        route = data.draw(st.sampled_from([None, *KEYS]))
        since, until = sorted(data.draw(st.tuples(*[st.sampled_from([day(d, 7) for d in DAYS])] * 2)))
        got = list(scan_history(str(base), now, route, since, until))
        expected = []
        for offset, record in [*log, *other]:
            if isinstance(record, EventsRecord) and record.source == "first":
                bit = 1 if route is None else 2 << record.tables.index(route) if route in record.tables else 0
                rows = ((record.routes & bit) > 0) & (since <= record.arrivals) & (record.arrivals < until)
                for values, arrival in zip(
                    now.upgraded(record.batch).filter(pa.array(rows)).cast(now.schema).to_pylist(),
                    record.arrivals[rows].tolist(),
                    strict=True,
                ):
                    own = {"_arrival_ms": arrival, "_received_ms": record.received_ms, "_offset": offset}
                    expected.append({**values, **own})
        rows = [row for batch in got for row in batch.to_pylist()]
        assert sorted(map(repr, rows)) == sorted(map(repr, expected))
        assert all(batch.schema.names == [*now.fields, "_arrival_ms", "_received_ms", "_offset"] for batch in got)
        days = [row["_arrival_ms"] // DAY_MS for row in rows]
        assert days == sorted(days)


# -- the layout, and URIs


ORDERS = Source(
    "orders",
    owner="tests",
    fields={"id": "string", "user": "int64", "at": "timestamp[ms, UTC]", "note": Field("string", optional=True)},
    event_id="id",
    event_time="at",
    retention="2d",
)


def order(*arrivals: int, routes: int = 3, source: str = "orders", received_ms: int = 9) -> EventsRecord:
    columns = [
        pa.array([f"e{a}" for a in arrivals]),
        pa.array(range(len(arrivals)), pa.int64()),
        pa.array(arrivals, pa.timestamp("ms", "UTC")),
        pa.array(["ü", None] * len(arrivals))[: len(arrivals)],
    ]
    n = len(arrivals)
    batch = pa.RecordBatch.from_arrays(columns, schema=ORDERS.schema)
    bits = np.full(n, routes, np.uint32)
    return EventsRecord(source, 1, received_ms, (("user",),), np.array(arrivals, np.int64), bits, batch)


def story() -> Records:
    return list(enumerate([order(day(1), day(2, 5)), order(day(2, 6), routes=1), order(day(3)), order(day(9), day(3))]))


def parquet_of(base: Path) -> list[Path]:
    return sorted(base.rglob("*.parquet"))


def test_the_layout_is_as_documented(tmp_path: Path) -> None:
    write(tmp_path / "h", story()[:3], shard=12, ends=[2])
    first, second = "012-1-00000000000000000000-00000000000000000002", "012-1-00000000000000000002-00000000000000000003"
    assert sorted(str(p.relative_to(tmp_path / "h")) for p in (tmp_path / "h").rglob("*") if p.is_file()) == [
        f"_parts/012/{first}.json",
        f"_parts/012/{second}.json",
        f"source=orders/route=home/date=1970-01-02/{first}.parquet",
        f"source=orders/route=home/date=1970-01-03/{first}.parquet",
        f"source=orders/route=home/date=1970-01-04/{second}.parquet",
        f"source=orders/route=user/date=1970-01-02/{first}.parquet",
        f"source=orders/route=user/date=1970-01-03/{first}.parquet",
        f"source=orders/route=user/date=1970-01-04/{second}.parquet",
    ]
    of_home = tmp_path / "h/source=orders/route=home/date=1970-01-03" / f"{first}.parquet"
    table = pq.ParquetFile(of_home).read()
    assert table.select(["id", "_offset", "_row", "_arrival_ms", "_received_ms", "_version"]).to_pylist() == [
        {"id": f"e{at}", "_offset": o, "_row": row, "_arrival_ms": at, "_received_ms": 9, "_version": 1}
        for o, row, at in ((0, 1, day(2, 5)), (1, 0, day(2, 6)))
    ]
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "h").rglob("*")} == {0o600, 0o700}


def test_small_records_come_together_in_row_groups_of_a_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_RECORD_BYTES", history._GATHERED_BYTES // 3)  # two records are split at a time
    monkeypatch.setattr(history, "_GROUP_ROWS", 8)
    log: Records = [(offset, order(*[day(1, offset)] * (1 + offset % 3))) for offset in range(30)]
    write(tmp_path / "h", log)
    for path in parquet_of(tmp_path / "h"):
        metadata = pq.ParquetFile(path).metadata
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert sum(rows) == 60
        assert max(rows) <= 8
        assert min(rows[:-1]) > 3
    assert content(read_history(str(tmp_path / "h"), 0, 11, 23)) == content(log[11:23])


def test_other_tools_read_the_files_too(tmp_path: Path) -> None:
    """What is not of a source is hidden by an underscore: readers of Hive layouts pass over it."""
    write(tmp_path / "h", story())
    found = dataset.dataset(tmp_path / "h" / "source=orders" / "route=home", format="parquet", partitioning="hive")
    assert found.count_rows() == 6


@pytest.mark.parametrize("form", ["{}", "file://{}", "relative", "mock://{}"])
def test_any_uri_will_do(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if form.startswith("mock"):  # an object store, as far as we are concerned; one for all who name it
        shared = fs.FileSystem.from_uri("mock:///")[0]
        names = {name: getattr(fs, name) for name in ("LocalFileSystem", "FileSelector", "FileType")}
        filesystem = SimpleNamespace(from_uri=lambda uri: (shared, urlsplit(uri).path.lstrip("/")))
        monkeypatch.setattr(folder_module, "fs", SimpleNamespace(FileSystem=filesystem, **names))
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "h%20 ü#")
    base = form.format(quote(path) if "://" in form else path)
    write(base, story(), ends=[1, 2])
    assert content(read_history(base, 0, 0, 4)) == content(story())
    assert sum(map(len, scan_history(base, ORDERS))) == 6
    assert check_history(base, 0, 4) == []
    assert [p.rpartition("=")[2] for p in delete_expired(base, [ORDERS], day(5))] == ["1970-01-02"] * 2 + [
        "1970-01-03"
    ] * 2
    assert check_history(base, 0, 4) == []
    here = {"{}": "h%20 ü#", "file://{}": "h%20 ü#", "relative": "relative", "mock://{}": None}[form]
    assert [p.name for p in tmp_path.iterdir()] == [here] * (here is not None)


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("/data/history", "/data/history"),
        ("file:///data/a@b?c", "file:///data/a@b?c"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("s3://key:s3cr3t@bucket/x?region=eu&token=s3cr3t", "s3://bucket/x"),
        ("s3://key:s3/cr3t@bucket/x", "s3://bucket/x"),
        ("s3://key:s?3cr3t@bucket", "s3://..."),
        ("s3://bucket/x?password=s3@cr3t", "s3://..."),
    ],
)
def test_a_uri_is_named_without_its_secrets(uri: str, public: str) -> None:
    assert public_uri(uri) == public


@pytest.mark.parametrize("secret", ["hidden-p4ss", "hidden%2Fp4ss", "h", "hidden@p4ss?x"])
def test_no_error_says_a_secret(secret: str) -> None:
    for uri in (f"nosuch://hidden-key:{secret}@host/x?token={secret}", f"nosuch://host?password={secret}"):
        with pytest.raises(HistoryUnavailable, match=r"^history: `nosuch://[.hostx/]+` cannot be opened: ") as caught:
            list(read_history(uri, 0))
        assert "hidden" not in str(caught.value)
        assert "p4ss" not in str(caught.value)
        assert caught.value.__cause__ is None


# -- without a history, without events, without a place


def test_without_a_history_and_without_events_the_log_may_be_cut_too(tmp_path: Path) -> None:
    none = History(None, 0, tmp_path, 1)
    assert none.write_part(4, story()) is None
    assert (none.done_to, none.planned_to, none.write_part(4, [])) == (4, None, None)
    again = History(str(tmp_path / "h"), 0, tmp_path, 2)
    ids = TakeRecord(0, np.arange(2), ())
    part = again.write_part(6, [(4, ids), (5, order(day(1), routes=0)), (6, order(day(1)))])
    assert part is not None
    assert (part.files, again.done_to) == ((), 6)
    again.write_part(7, [(6, order(day(1)))])
    assert content(read_history(str(tmp_path / "h"), 0, 0, 7)) == content([(6, order(day(1)))])
    assert check_history(str(tmp_path / "h"), 0, 7) == []


def test_a_place_that_is_lost_is_an_error_and_the_part_is_written_when_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "place").write_text("a file, no folder")
    writer = History(str(tmp_path / "place" / "h"), 0, tmp_path, 1)
    for _ in range(2):
        with pytest.raises(HistoryUnavailable, match=r"place/h` cannot be written: `source=orders/.*Error: "):
            writer.write_part(3, story())
        assert (writer.done_to, writer.planned_to) == (0, 3)
    (tmp_path / "place").unlink()
    writer.write_part(4, story())
    assert writer.done_to == 3
    assert content(read_history(str(tmp_path / "place" / "h"), 0, 0, 3)) == content(story()[:3])
    shutil.rmtree(tmp_path / "place")
    with pytest.raises(HistoryUnavailable, match="holds nothing of shard 0, which has written up to offset 3"):
        list(read_history(str(tmp_path / "place" / "h"), 0, 0, 3))
    assert len(check_history(str(tmp_path / "place" / "h"), 0, 3)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir(mode=0o500)
    with pytest.raises(HistoryUnavailable, match=r"/h` cannot be written: .*Permission denied"):
        History(str(tmp_path / "h"), 0, tmp_path, 1).write_part(4, story())


def test_a_failed_write_leaves_only_what_nobody_reads_and_the_next_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    writer = History(str(tmp_path / "h"), 0, tmp_path, 1)
    writer.write_part(1, story())
    with monkeypatch.context() as patch:
        patch.setattr("millpond.feature_actors.log.folder.os.fsync", full)
        patch.setattr(history, "write_json", lambda path, content: path.write_text(json.dumps(content)))
        with pytest.raises(HistoryUnavailable, match=r"cannot be written: `source=.*No space left on device"):
            writer.write_part(3, story())
    assert [p for p in (tmp_path / "h").rglob("*") if p.name.startswith(".")]
    assert content(read_history(str(tmp_path / "h"), 0)) == content(story()[:1])
    writer.write_part(4, story())
    assert check_history(str(tmp_path / "h"), 0, writer.done_to) == []
    assert not [p for p in (tmp_path / "h").rglob("*") if p.name.startswith(".")]


# -- damage


def test_a_changed_byte_anywhere_is_told_and_the_file_named(tmp_path: Path) -> None:
    write(tmp_path / "h", story(), ends=[2])
    base = str(tmp_path / "h")
    for path in [*parquet_of(tmp_path / "h"), *(tmp_path / "h").rglob("*.json")]:
        whole = path.read_bytes()
        for at in sorted({0, 3, 4, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 5, len(whole) - 2}):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
            with pytest.raises(HistoryDamaged, match=path.name):
                list(read_history(base, 0))
            assert [p for p in check_history(base, 0) if path.name in p]
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(HistoryDamaged, match=path.name):
            list(read_history(base, 0))
        path.write_bytes(whole)
    assert check_history(base, 0) == []


def test_what_is_missing_twice_there_or_foreign_is_told(tmp_path: Path) -> None:
    write(tmp_path / "h", story(), ends=[1, 2])
    base, files = str(tmp_path / "h"), parquet_of(tmp_path / "h")
    markers = sorted((tmp_path / "h").rglob("*.json"))
    whole = files[0].read_bytes()
    files[0].unlink()
    with pytest.raises(HistoryDamaged, match=f"{files[0].name}` is missing"):
        list(read_history(base, 0))
    assert len(check_history(base, 0)) == 1
    pq.write_table(pa.table({"id": ["x"]}), files[0])
    with pytest.raises(HistoryDamaged, match=r"\.parquet` is no file of a history: its columns are others"):
        list(scan_history(base, ORDERS))
    files[0].write_text("no Parquet")
    with pytest.raises(HistoryDamaged, match=r"\.parquet` cannot be read: "):
        list(scan_history(base, ORDERS))
    files[0].write_bytes(whole)
    extra = files[0].with_name(files[0].name.replace(".parquet", ".5.parquet"))
    extra.write_bytes(whole)
    assert check_history(base, 0) == [f"`{extra.relative_to(base)}` is of no part, nothing reads it"]
    extra.unlink()

    other = markers[1].with_name("000-2-00000000000000000000-00000000000000000002.json")
    shutil.copy(markers[1], other)
    with pytest.raises(HistoryDamaged, match="overlap"):
        list(read_history(base, 0))
    other.unlink()
    markers[1].unlink()
    with pytest.raises(HistoryDamaged, match="shard 0 has no part of offsets 1 to 2"):
        list(read_history(base, 0))
    assert sum(map(len, scan_history(base, ORDERS))) == 5
    lost = [
        p
        for p in check_history(base, 0, 9)
        if p.endswith(f"{markers[1].stem}.parquet` is of no part, nothing reads it")
    ]
    assert len(lost) == 1
    assert [p for p in check_history(base, 0, 9) if p not in lost] == [
        "shard 0 has no part of offsets 1 to 2",
        f"history: shard 0 has written up to offset 9, `{base}` ends at 4; restore it from a copy",
    ]


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text('{"epoch": 1}')
    with pytest.raises(HistoryDamaged, match=r"history.json` cannot be read: .*missing required field"):
        History(None, 0, tmp_path, 1)


# -- retention


def test_whole_dates_expire_and_nothing_younger(tmp_path: Path) -> None:
    write(tmp_path / "h", [*story(), (4, order(day(1), source="kept"))])
    base = str(tmp_path / "h")
    kept = dataclasses.replace(ORDERS, name="kept", retention=None)
    none = dataclasses.replace(ORDERS, name="never_sent")
    assert delete_expired(base, [ORDERS, kept, none], day(4) - 1) == []
    assert delete_expired(base, [ORDERS, kept, none], day(4)) == [
        "source=orders/route=home/date=1970-01-02",
        "source=orders/route=user/date=1970-01-02",
    ]
    assert delete_expired(base, [ORDERS, kept, none], day(4)) == []
    delete_expired(base, [ORDERS], day(5) + 5)
    assert {p.parent.name for p in parquet_of(tmp_path / "h" / "source=orders")} == {
        "date=1970-01-04",
        "date=1970-01-10",
    }
    assert check_history(base, 0, 5) == []
    first, second, third = read_history(base, 0)
    assert (first[0], second[0], third[0]) == (2, 3, 4)
    assert content([first, second]) == content(story()[2:])
    assert sum(map(len, scan_history(base, kept))) == 1


@pytest.mark.parametrize("crash_at", range(10))
def test_after_a_crash_nothing_is_half_expired(crash_at: int, tmp_path: Path) -> None:
    write(tmp_path / "h", story())
    base = str(tmp_path / "h")
    try:
        with crashing(crash_at):
            delete_expired(base, [ORDERS], day(5))
    except Crash:
        seen = content(read_history(base, 0))
        assert (seen, sum(map(len, scan_history(base, ORDERS)))) in ((content(story()), 6), (expired_story(), 3))
        assert check_history(base, 0, 4) == []
        longer = dataclasses.replace(ORDERS, retention="3d")
        delete_expired(base, [longer], day(5))
        assert content(read_history(base, 0)) in (content(story()[1:]), expired_story(), first_day_expired())
        delete_expired(base, [ORDERS], day(5))
    assert content(read_history(base, 0)) == expired_story()
    assert sum(map(len, scan_history(base, ORDERS))) == 3
    assert {p.parent.name for p in parquet_of(tmp_path / "h")} == {"date=1970-01-04", "date=1970-01-10"}


def first_day_expired() -> list[Any]:
    left = content(story())
    left[0] = (*left[0][:-1], left[0][-1][1:])
    return left


def expired_story() -> list[Any]:
    return content(story()[2:])


def test_what_comes_with_an_old_stamp_after_its_date_expired_is_kept_until_it_expires_again(tmp_path: Path) -> None:
    write(tmp_path / "h", story())
    delete_expired(str(tmp_path / "h"), [ORDERS], day(5))
    write(tmp_path / "h", [(0, order(day(1)))], shard=1)
    assert content(read_history(str(tmp_path / "h"), 1)) == content([(0, order(day(1)))])
    assert len(delete_expired(str(tmp_path / "h"), [ORDERS], day(5))) == 2
    assert content(read_history(str(tmp_path / "h"), 1)) == []
