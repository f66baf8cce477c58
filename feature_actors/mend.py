"""What `millpond check --fix` does to the directory of a stopped cluster, and what it says is lost.

It takes away what is proven damaged, and nothing that is intact: a damaged snapshot is moved away if something else can
do, a log is written anew of the records that can be read, as they are, with a `LostRecord` wherever one cannot. What is
known of those from elsewhere is listed. The caller has made sure that there is a copy.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from millpond.feature_actors.check import DirectoryCheck, ShardCheck, homes_of, intact, never_had
from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.keys import hash_columns
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.log.folder import sync_folder
from millpond.feature_actors.log.history_reader import read_history
from millpond.feature_actors.log.log import mended_log, write_log
from millpond.feature_actors.log.record import (
    MAGIC,
    EventsRecord,
    LogDamaged,
    LostRecord,
    OfferRecord,
    TakeRecord,
    decode,
    encode,
)
from millpond.feature_actors.log.schemas import Schemas, write_synced
from millpond.feature_actors.manifest import write_json
from millpond.feature_actors.shard_map import ShardMap

__all__ = ["Lost", "Mended", "finish_logs", "mend", "mend_schemas"]


#: Each lost record stands in the log.
_LOST_MAX = 1_000_000


@dataclass
class Lost:
    """A record that is lost, and what is known of it.

    size: its bytes, 0 if there was nothing. why: what was wrong with it. source: of its events, None if not known.
    ids: event ids that are known from elsewhere, `known_from`. in_snapshot: whether a snapshot that stays has what the
    record did, so that features have it still. views: those that it may have been applied to, or keys of tables if no
    definitions were given.
    """

    shard: int
    offset: int
    size: int
    why: str
    in_snapshot: bool
    source: str | None = None
    ids: list[str] = field(default_factory=list)
    events: int | None = None
    known_from: list[str] = field(default_factory=list)
    views: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        what = f"{self.events} events of `{self.source}`" if self.events else f"`{self.source}`" if self.source else ""
        of = f", {what}" if what else ""
        kept = "; a snapshot has them, features are as they were" if self.in_snapshot else ""
        return f"shard {self.shard}, offset {self.offset}: {self.size} bytes{of} ({self.why}){kept}"


@dataclass
class Mended:
    """What was done, what is lost, and what could not be mended."""

    done: list[str] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def mend(check: DirectoryCheck, layout: Layout | None) -> Mended:
    """Mend what can be of what `check` has found, shard by shard, after `mend_schemas`.

    The log is written anew, with what is lost listed; damaged snapshots are moved away, if something else can do;
    history.json and epoch.json are written anew of what else is there.
    layout: of the definitions, None if there are none; it tells keys, ids and views.
    """
    mended = Mended()
    for shard in check.shards:
        if not shard.path.is_dir():
            mended.left.append(f"shard {shard.number}: `{check.name(shard.path)}` is missing; restore it from a copy")
            continue
        if not shard.snapshots and not check.begins(shard):
            if shard.damaged_snapshots or shard.log_damaged or shard.bad:
                mended.left.append(
                    f"shard {shard.number}: no snapshot of it can be read, and what was before its log is in no "
                    "history; restore it from a copy"
                )
            continue
        _mend_log(check, shard, layout, mended)
        for path in shard.damaged_snapshots:
            path.rename(path.with_name(f"{path.name}.damaged"))
            mended.done.append(f"`{check.name(path)}` is moved away, to the same name with `.damaged` added")
        if shard.history_damaged:
            _mend_history(check, shard, mended)
        if shard.epoch is None and check.manifest is not None and not _is_foreign(check, shard):
            _mend_epoch(check, shard, mended)
    return mended


# -- schemas


def mend_schemas(check: DirectoryCheck, layout: Layout | None) -> list[str]:
    """Put schemas that are damaged or missing back in their place, from another shard or the definitions: their names
    say whether it is they. What cannot be had is moved away. Returns what was done.

    Whatever the records are is known anew then: check again.
    """
    done = []
    for shard in check.shards:
        folder = shard.path / "log" / "schemas"
        damaged = {path.stem for path in shard.damaged_schemas}
        for name in sorted(damaged | set(_schemas_named(shard))):
            path = folder / f"{name}.arrow"
            content = _schema(check, name, layout)
            if name in damaged:
                path.rename(path.with_name(f"{path.name}.damaged"))
                done.append(f"`{check.name(path)}` is moved away, to the same name with `.damaged` added")
            if content is not None:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_synced(path, content)
                done.append(f"`{check.name(path)}` is there again: it was known from elsewhere")
    return done


def _schemas_named(shard: ShardCheck) -> Iterator[str]:
    """Yield the schemas that records name which are whole and cannot be read for want of one."""
    for offset, why in shard.bad.items():
        if "schema" in why:
            header = _header(_content(shard, offset))
            if isinstance(name := header.get("schema"), str) and name.isalnum():
                yield name


def _schema(check: DirectoryCheck, name: str, layout: Layout | None) -> bytes | None:
    for shard in check.shards:
        folder = shard.path / "log" / "schemas"
        try:
            Schemas(folder).get(name)
        except LogDamaged:
            continue
        return (folder / f"{name}.arrow").read_bytes()
    for source in layout.sources.values() if layout is not None else ():
        there = Schemas(check.scratch / "schemas")
        if there.name_of(source.schema) == name:
            return (check.scratch / "schemas" / f"{name}.arrow").read_bytes()
    return None


# -- logs


def _mend_log(check: DirectoryCheck, shard: ShardCheck, layout: Layout | None, mended: Mended) -> None:
    if not shard.bad and not shard.log_damaged:
        return
    log = shard.log
    carved = _carved(shard) if shard.log_damaged else {}
    there = [*log.offsets, *carved] if not log.misplaced else [*range(log.first, log.next), *carved]
    first, end = min(there, default=0), max([log.next, shard.known_end, *(at + 1 for at in there)])
    if shard.snapshots:
        if not log.offsets:  # what is left of a log that was cut may be older than the cut
            first = shard.needs_from
        first = min([first, shard.needs_from, *_named_by_snapshots(shard)])
    if first == end:  # nothing is known of it but where the next record goes
        first = max(end - 1, 0)
    if (n := end - first - len(log.offsets)) > _LOST_MAX:
        mended.left.append(
            f"shard {shard.number}: {n} records are lost by what is known of its log, too many to make up for; "
            "restore it from a copy"
        )
        return
    lost: list[Lost] = []
    newest = max((s.header.begin for s in shard.snapshots), default=0)

    def contents() -> Iterator[tuple[int, bytes]]:
        for offset in range(first, end):
            content = _intact(shard, offset, carved)
            if content is None:
                why = shard.bad.get(offset, "is missing")
                size = len(_content(shard, offset))
                lost.append(Lost(shard.number, offset, size, why, offset < newest))
                content = encode(LostRecord(size, why), offset, 0, "")
            yield offset, content

    beside, folder = shard.path / "log.new", shard.path / "log"
    shutil.rmtree(beside, ignore_errors=True)
    if end > 0:
        write_log(beside, contents())
    _learn(check, shard, lost, layout)
    log.close()
    if end > 0:
        # Until it has this name the old one is as it was, and the new one can be made again; then that is the log.
        sync_folder(beside)
        beside.rename(mended_log(folder))
        sync_folder(shard.path)
        _put_in_place(folder)
    else:
        _remove_write_ahead(folder)
    mended.lost += lost
    mended.done.append(
        f"`{check.name(folder / 'cache.db')}` is written anew: {end - first - len(lost)} records as they were, "
        f"{len(lost)} lost"
    )


def finish_logs(directory: Path) -> list[str]:
    """Put logs in place that were written anew before, when `mend` was broken off. Returns what was done; check, and
    mend what there is, after it."""
    done = []
    for waiting in sorted(directory.glob(f"shards/*/{mended_log(Path('log'))}")):
        folder = waiting.with_name("log")
        if (waiting / "cache.db").exists():
            _put_in_place(folder)
            done.append(f"`{folder.relative_to(directory) / 'cache.db'}` is the one that an earlier --fix has written")
        shutil.rmtree(waiting, ignore_errors=True)
    return done


def _put_in_place(folder: Path) -> None:
    """Put the log that waits for it in the place of that in a folder; may be done again after any of its steps."""
    folder.mkdir(mode=0o700, exist_ok=True)
    _remove_write_ahead(folder)  # what is in it would be taken for that of the new one
    (mended_log(folder) / "cache.db").replace(folder / "cache.db")
    sync_folder(folder)
    shutil.rmtree(mended_log(folder), ignore_errors=True)


def _remove_write_ahead(folder: Path) -> None:
    for name in ("cache.db-wal", "cache.db-shm"):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir():
        sync_folder(folder)


def _named_by_snapshots(shard: ShardCheck) -> list[int]:
    """Return the offsets that the newest snapshot needs of the log."""
    state: dict[str, Any] = shard.snapshots[0].header.state if shard.snapshots else {}
    return [*state.get("offers", []), *state.get("deliveries", {}).get("owed", [])]


def _intact(shard: ShardCheck, offset: int, carved: dict[int, bytes]) -> bytes | None:
    """Return the bytes of a record if nothing is wrong with it."""
    if offset not in shard.bad and shard.log.first <= offset < shard.log.next:
        return shard.log.content(offset)
    return carved.get(offset)


def _carved(shard: ShardCheck) -> dict[int, bytes]:
    """Return the records that are whole and nothing leads to, by the offset that they say; not those that were cut
    away before the log begins."""
    schemas = Schemas(shard.path / "log" / "schemas")
    begins = shard.log.first if shard.log.offsets else shard.needs_from
    found: dict[int, bytes] = {}
    for content in shard.log.carved():
        offset = int.from_bytes(content[8:16], "little", signed=True)
        if offset < begins or (offset not in shard.bad and offset < shard.log.next):
            continue
        try:
            decode(content, offset, schemas.get)
        except LogDamaged:
            continue
        found[offset] = content
    return found


def _content(shard: ShardCheck, offset: int) -> bytes:
    try:
        return shard.log.content(offset)
    except LogDamaged:
        return b""


def _header(content: bytes) -> dict[str, Any]:
    """Return the header of a record whose checksum holds, else nothing."""
    if content[:4] != MAGIC or zlib.crc32(content[8:]) != int.from_bytes(content[4:8], "little"):
        return {}
    try:
        header = msgspec.msgpack.decode(content[20 : 20 + int.from_bytes(content[16:20], "little")])
    except msgspec.DecodeError:
        return {}
    return header if isinstance(header, dict) else {}


# -- what is known of what is lost


def _learn(check: DirectoryCheck, shard: ShardCheck, lost: list[Lost], layout: Layout | None) -> None:
    """Find out what events the lost records had: from the history, and from what other shards had of them."""
    if not lost:
        return
    by_offset = {one.offset: one for one in lost}
    if check.history_uri is not None:
        _learn_from_history(check, shard, by_offset)
    for other in check.shards:
        if other is not shard:
            _learn_from(check, shard, other, by_offset)
            if layout is not None:
                _learn_what_was_applied(check, shard, other, by_offset, layout)
    known_sources = {
        r.source for of in check.shards for _, r in intact(of) if isinstance(r, EventsRecord | OfferRecord)
    }
    tables: dict[str, set[str]] = {}
    for of in check.shards:
        for _, record in intact(of):
            if isinstance(record, EventsRecord | OfferRecord):
                tables.setdefault(record.source, set()).update("+".join(key) for key in record.tables)
    for one in lost:
        sources = {one.source} if one.source is not None else known_sources | set(layout.sources if layout else ())
        if layout is not None:
            one.views = sorted(name for name, view in layout.views.items() if view.source.name in sources)
        else:
            one.views = sorted(f"{source}[{key}]" for source in sources for key in tables.get(source, ()))


def _learn_from_history(check: DirectoryCheck, shard: ShardCheck, lost: dict[int, Lost]) -> None:
    assert check.history_uri is not None
    try:
        for offset, record in read_history(check.history_uri, shard.number, min(lost), max(lost) + 1):
            if offset in lost:
                _note(check, lost[offset], record.source, record.batch, "the history")
    except MillpondError:
        return


def _learn_from(check: DirectoryCheck, shard: ShardCheck, other: ShardCheck, lost: dict[int, Lost]) -> None:
    """Take what another shard has applied of lost records whose home was here."""
    where = f"the log of shard {other.number}"
    for _, record in intact(other):
        for home in homes_of(record):
            if home.shard != shard.number or home.offset not in lost:
                continue
            if isinstance(record, EventsRecord):
                _note(check, lost[home.offset], record.source, record.batch, where)
            elif isinstance(record, TakeRecord):
                offer = _offer(other, record)
                rows = None if offer is None else _rows_at_home(check, offer, record, shard.number)
                if offer is not None and rows is not None:
                    _note(check, lost[home.offset], offer.source, offer.batch.take(pa.array(rows)), where)


def _offer(shard: ShardCheck, take: TakeRecord) -> OfferRecord | None:
    if take.offer < shard.log.first or take.offer in shard.bad:
        return None
    offer = shard.log.get(take.offer).record
    return offer if isinstance(offer, OfferRecord) else None


def _rows_at_home(check: DirectoryCheck, offer: OfferRecord, take: TakeRecord, home: int) -> Any:
    """Return which of the events taken have their home at a shard; None if that cannot be told."""
    if len(take.homes) == 1:
        return take.rows
    name = check.event_ids.get(offer.source)
    if check.manifest is None or (offer.ids is None and name not in offer.batch.schema.names):
        return None
    ids = offer.ids if offer.ids is not None else hash_columns([offer.batch.column(name)], offer.batch.num_rows)
    shards = ShardMap.even(check.manifest.n_slots, check.n_shards).shards_of(ids)
    return take.rows[shards[take.rows] == home]


def _learn_what_was_applied(
    check: DirectoryCheck, shard: ShardCheck, home: ShardCheck, lost: dict[int, Lost], layout: Layout
) -> None:
    """Take what has its home at another shard, is settled there, and was applied here by nothing that is left: by one
    of the lost records, then."""
    if check.manifest is None:
        return
    candidates = [one for one in lost.values() if not one.in_snapshot]
    if not candidates:
        return
    one, where = candidates[0], f"the log of shard {home.number}"
    if len(candidates) > 1:
        where += " (applied by this record or by another that is lost)"
    for _, record in never_had(check, shard, home, layout):
        _note(check, one, record.source, record.batch, where)


def _note(check: DirectoryCheck, one: Lost, source: str, batch: pa.RecordBatch, where: str) -> None:
    name = check.event_ids.get(source)
    if where not in one.known_from:
        one.known_from.append(where)
    one.source = source
    if name in batch.schema.names:
        one.ids = sorted({*one.ids, *map(str, batch.column(name).to_pylist())})
        one.events = len(one.ids)
    else:
        one.events = max(one.events or 0, batch.num_rows)


# -- small files


def _mend_history(check: DirectoryCheck, shard: ShardCheck, mended: Mended) -> None:
    """Write `history.json` by what parts there are."""
    path = shard.path / "history.json"
    try:
        parts = check.parts(shard)
    except MillpondError as error:
        mended.left.append(f"`{check.name(path)}`: {error.message}")
        return
    if parts:
        last = parts[-1]
        content = (last.epoch, last.from_offset, last.to_offset, last.to_offset)
    else:
        content = (0, shard.log.first, shard.log.first, shard.log.first)
    write_json(path, dict(zip(("epoch", "from_offset", "to_offset", "done_to"), content, strict=True)))
    mended.done.append(f"`{check.name(path)}` is written anew by the parts that there are, up to offset {content[3]}")


def _is_foreign(check: DirectoryCheck, shard: ShardCheck) -> bool:
    """Return whether a folder says that it is that of another shard or cluster."""
    path = check.name(shard.path / "epoch.json")
    return any(p.file == path and p.what.startswith("says that it is of") for p in check.problems)


def _mend_epoch(check: DirectoryCheck, shard: ShardCheck, mended: Mended) -> None:
    """Write `epoch.json` by the newest opening that anything is known of."""
    path = shard.path / "epoch.json"
    known = [s.header.epoch for s in shard.snapshots] + [(shard.history or {}).get("epoch", 0)]
    for other in check.shards:
        known += [other.epoch or 0]
    assert check.manifest is not None
    end = max(shard.log.next, shard.known_end)
    content = {"cluster_id": check.manifest.cluster_id, "shard": shard.number, "epoch": max(known) + 1, "run": None}
    write_json(path, {**content, "log_end": end if end else None})
    mended.done.append(f"`{check.name(path)}` is written anew: it has been opened {max(known) + 1} times at most")
