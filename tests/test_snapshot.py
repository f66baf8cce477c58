"""The snapshot file: chunks come back as they were written, a file is whole or refused, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.feature_actors.log import snapshot
from millpond.feature_actors.log.snapshot import (
    Chunk,
    Ids,
    Rows,
    ShardHeader,
    SnapshotDamaged,
    SnapshotFull,
    SnapshotTooNew,
    SnapshotWriter,
    StringsHeader,
    decode_strings,
    encode_strings,
    newest_snapshots,
    read_snapshot,
    remove_old_snapshots,
    write_snapshot,
)
from millpond.feature_actors.tiles.shape import ColumnShape, SeriesShape, TableShape

COLUMNS = (ColumnShape("Counted", None, 1, 1, ()), ColumnShape("Recent", "code", 3, 6, (1, 3, 5)))
TABLE = TableShape("first", ("user", "code"), ("", "(v > 1)"), (SeriesShape("", False, 60_000, True, 7, COLUMNS),))
SHARD = ShardHeader(
    cluster_id="c1", shard=3, epoch=7, begin=123, n_slots=16, key_hash_version=1, newest_arrival_ms=-(2**63),
    newest_received_ms=2**63 - 1, events={"first[user]": 5}, strings_refused=0, tables=(TABLE,),
    state={"a": [1, None, "ü", b"\0\0"]},
)  # fmt: skip


def chunks(n: int = 5) -> list[Chunk]:
    words = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 50 * n)
    texts = ["", "a", "ü", "日本語🐟", "x" * 100, "\0"]
    return [
        Chunk(SHARD),
        *(Chunk(Rows(0, slot, 0), words[: 40 * slot]) for slot in range(n)),
        Chunk(Ids("first", 1, -(2**63)), words[:8]),
        Chunk(Ids("first", 0, 0), np.zeros(4_000, np.int64)),
        encode_strings(np.arange(6.0), texts),
        encode_strings(np.empty(0), []),
    ]


def content(of: list[Chunk]) -> list[tuple[object, list[int]]]:
    return [(chunk.header, chunk.words.tolist()) for chunk in of]


def test_chunks_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path / "snapshots", iter(chunks()))
    assert path == tmp_path / "snapshots" / "00000000000000000123-7.snapshot"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    back = list(read_snapshot(path))
    assert content(back) == content(chunks())
    assert all(chunk.words.flags.writeable for chunk in back)
    assert back[-1].end < path.stat().st_size
    assert content(list(read_snapshot(path, (Ids,)))) == [c for c in content(chunks()) if isinstance(c[0], Ids)]
    assert path.stat().st_size < sum(c.words.nbytes for c in chunks()), "zeros are packed"


def test_a_snapshot_has_the_same_bytes_for_ever(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, [Chunk(ShardHeader("c", 0, 1, 2, 1, 1, 3, 4, {}, 0, (), {})), Chunk(Rows(0, 0, 1))])
    shard = msgspec.msgpack.encode(
        {"kind": "shard", "cluster_id": "c", "shard": 0, "epoch": 1, "begin": 2, "n_slots": 1, "key_hash_version": 1,
         "newest_arrival_ms": 3, "newest_received_ms": 4, "events": {}, "strings_refused": 0, "tables": [],
         "state": {}}
    )  # fmt: skip
    rows = msgspec.msgpack.encode({"kind": "rows", "table": 0, "slot": 0, "rows": 1})
    want, crcs = b"MPSNAP\1\0", b""

    def added(number: int, head: bytes) -> bytes:
        lengths = len(head).to_bytes(4, "little") + number.to_bytes(8, "little") + bytes(16)
        return lengths + head + bytes(-len(head) % 8)

    for number, head in enumerate((shard, rows)):
        crc = zlib.crc32(added(number, head)).to_bytes(4, "little")
        crcs, want = crcs + crc, want + crc + added(number, head)
    end = added(2, msgspec.msgpack.encode({"kind": "end", "chunks": 2, "crc": zlib.crc32(crcs)}))
    assert path.read_bytes() == want + zlib.crc32(end).to_bytes(4, "little") + end


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20)))
def test_strings_come_back_with_their_addresses(texts: list[str]) -> None:
    addresses = np.arange(len(texts)) * 8.0 + 1000
    back, of = decode_strings(encode_strings(addresses, texts))
    assert (back.tolist(), of) == (addresses.tolist(), texts)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (StringsHeader(1, 1), [0, 1]),
        (StringsHeader(1, 1), [0, 2, 65]),
        (StringsHeader(2, 1), [0, 0, -1, 2, 65]),
        (StringsHeader(2, 4), [0, 0, 2**62, 2**62, 65]),
        (StringsHeader(1, 1), [0, 1, 0xFF]),
        (StringsHeader(2**62, 0), []),
        (StringsHeader(2, 2), [0, 0, 1, 1, 0xA4C3]),  # both halves of a character, apart
    ],
)
def test_what_are_no_strings_is_refused(header: StringsHeader, words: list[int]) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_strings(Chunk(header, np.array(words, np.int64)))


# -- damage


def refused(path: Path, damaged: bytes) -> str:
    path.write_bytes(damaged)
    with pytest.raises((SnapshotDamaged, SnapshotTooNew)) as caught:
        list(read_snapshot(path))
    with pytest.raises((SnapshotDamaged, SnapshotTooNew)):
        list(read_snapshot(path, ()))
    assert caught.value.path == str(path)
    return caught.value.message


def test_a_changed_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, chunks(2))
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << int(random.integers(8))
        refused(path, bytes(changed))
    path.write_bytes(whole)
    assert content(list(read_snapshot(path))) == content(chunks(2))


def test_a_file_that_is_cut_or_goes_on_is_found(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, chunks(2))
    whole = path.read_bytes()
    for at in range(len(whole)):
        refused(path, whole[:at])
    refused(path, whole + b"\0")
    refused(path, whole + whole)
    assert "before chunk 1" in refused(path, whole[: list(starts(whole))[1]])


def starts(whole: bytes) -> Iterator[int]:
    at = 8
    while at < len(whole):
        yield at
        head = int.from_bytes(whole[at + 4 : at + 8], "little")
        body = int.from_bytes(whole[at + 16 : at + 24], "little")
        at += 32 + (head + 7) // 8 * 8 + (body + 7) // 8 * 8


def test_chunks_in_another_order_left_out_or_of_another_file_are_found(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, chunks())
    whole = path.read_bytes()
    at = [*starts(whole), len(whole)]
    parts = [whole[a:b] for a, b in pairwise(at)]
    assert "says that it is chunk 2" in refused(path, whole[:8] + b"".join([parts[0], parts[2], parts[1], *parts[3:]]))
    refused(path, whole[:8] + b"".join([*parts[:-2], parts[-1]]))
    refused(path, whole[:8] + b"".join(parts[1:]))
    other = [*chunks()[:3], Chunk(Rows(0, 2, 1), np.arange(80)), *chunks()[4:]]
    of_other = write_snapshot(tmp_path, other).read_bytes()
    at = [*starts(of_other), len(of_other)]
    mixed = [*parts[:3], of_other[at[3] : at[4]], *parts[4:]]
    assert "end of other chunks" in refused(path, whole[:8] + b"".join(mixed))


@pytest.mark.parametrize(
    ("header", "body", "nbytes"),
    [
        (b"", b"", 0),
        (b"\xc1", b"", 0),
        (msgspec.msgpack.encode([1]), b"", 0),
        (msgspec.msgpack.encode({"kind": "rows", "table": -1, "slot": 0, "rows": 0}), b"", 0),
        (msgspec.msgpack.encode({"kind": "rows", "table": 2**64 - 1, "slot": 0, "rows": 0}), b"", 0),
        (msgspec.msgpack.encode({"kind": "other"}), b"", 0),
        (msgspec.msgpack.encode({"kind": "end", "chunks": 1, "crc": 0}), b"", 0),
        (b"\x81\xa4kind" + b"\x91" * 100_000, b"", 0),
        (msgspec.msgpack.encode(Rows(0, 0, 0)), b"\xf0garbage", 8),
        (msgspec.msgpack.encode(Rows(0, 0, 0)), b"", 1 << 20),
        (msgspec.msgpack.encode(Rows(0, 0, 0)), b"\x80" + b"12345678", 7),
        (msgspec.msgpack.encode(Rows(0, 0, 0)), b"\x80" + b"12345678", 1 << 40),
        (msgspec.msgpack.encode(SHARD), b"", 0),
    ],
)
def test_a_chunk_with_a_good_checksum_is_not_trusted_either(
    header: bytes, body: bytes, nbytes: int, tmp_path: Path
) -> None:
    path = write_snapshot(tmp_path, [Chunk(SHARD)])
    whole = path.read_bytes()
    first = whole[: list(starts(whole))[1]]
    lengths = len(header).to_bytes(4, "little") + b"".join(n.to_bytes(8, "little") for n in (1, len(body), nbytes))
    rest = lengths + b"".join(part + bytes(-len(part) % 8) for part in (header, body))
    path.write_bytes(first + zlib.crc32(rest).to_bytes(4, "little") + rest)
    with pytest.raises(SnapshotDamaged, match="chunk 1, at byte"):
        list(read_snapshot(path))


def test_another_format_is_named(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, chunks())
    whole = path.read_bytes()
    path.write_bytes(b"MPSNAP\2\0" + whole[8:])
    with pytest.raises(SnapshotTooNew, match="is of format 2; this version reads 1"):
        list(read_snapshot(path))
    assert "is of format 0" in refused(path, b"MPSNAP\0\0" + whole[8:])
    assert "begins with" in refused(path, b"SQLite format 3\0")
    assert "begins with" in refused(path, b"")
    path.unlink()
    with pytest.raises(SnapshotDamaged, match="cannot be read: No such file"):
        list(read_snapshot(path))


# -- the directory


def test_only_what_is_finished_has_its_name(tmp_path: Path) -> None:
    with SnapshotWriter(tmp_path) as writer:
        for chunk in chunks():
            writer.write(chunk)
        assert newest_snapshots(tmp_path) == []
    assert list(tmp_path.iterdir()) == []

    def failing() -> Iterator[Chunk]:
        yield from chunks()
        raise RuntimeError("the shard has failed")

    with pytest.raises(RuntimeError, match="the shard has failed"):
        write_snapshot(tmp_path, failing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, 100, 5_000, 300_000])
def test_a_full_disk_is_an_error_and_leaves_nothing(limit: int, tmp_path: Path) -> None:
    """The limit is of the process, but the error is that of a full disk: no room for a byte more."""
    large = [*chunks(), Chunk(Rows(0, 0, 1), np.random.default_rng(2).integers(-(2**63), 2**63 - 1, 100_000))]
    older = write_snapshot(tmp_path, [Chunk(msgspec.structs.replace(SHARD, begin=1))])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(SnapshotFull, match=r"^snapshot: no room in `.*`: File too large; free some") as caught:
            write_snapshot(tmp_path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.status, caught.value.retry_after_ms) == (503, 10_000)
    assert list(tmp_path.iterdir()) == [older]
    assert newest_snapshots(tmp_path)[0] == older
    write_snapshot(tmp_path, large)
    assert len(newest_snapshots(tmp_path)) == 2


def test_the_newest_come_first_and_the_old_ones_go(tmp_path: Path) -> None:
    assert newest_snapshots(tmp_path / "none") == []
    remove_old_snapshots(tmp_path / "none")
    for begin, epoch in ((9, 1), (100, 1), (100, 2), (100, 10), (20, 3)):
        write_snapshot(tmp_path, [Chunk(msgspec.structs.replace(SHARD, begin=begin, epoch=epoch))])
    (tmp_path / "00000000000000000500-1.snapshot.tmp").touch()
    (tmp_path / "notes.snapshot").touch()
    newest = [(snapshot.begin_of(path), int(path.stem.partition("-")[2])) for path in newest_snapshots(tmp_path)]
    assert newest == [(100, 10), (100, 2), (100, 1), (20, 3), (9, 1)]
    remove_old_snapshots(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "00000000000000000100-10.snapshot", "00000000000000000100-2.snapshot", "notes.snapshot",
    ]  # fmt: skip


def test_a_large_snapshot_is_synced_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody who syncs meanwhile waits for all of it."""
    synced, whole = list[int](), os.fdatasync

    def spy(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        whole(descriptor)

    monkeypatch.setattr(os, "fdatasync", spy)
    monkeypatch.setattr(snapshot, "_BEGIN_BYTES", 1 << 17)
    monkeypatch.setattr(snapshot, "_SYNC_BYTES", 1 << 19)
    words = np.random.default_rng(2).integers(-(2**63), 2**63 - 1, 1 << 13)
    path = write_snapshot(tmp_path, [Chunk(SHARD), *(Chunk(Rows(0, slot, 1), words) for slot in range(64))])
    gaps = np.diff([0, *synced, path.stat().st_size])
    assert len(synced) >= 6
    assert gaps.max() <= (1 << 19) + (1 << 17)
    assert sum(1 for _ in read_snapshot(path)) == 65
