"""The check of a stopped cluster's directory: every checksum, offsets without gaps, and what refers to what.

It changes no file. What is wrong is a `Problem`; `DirectoryCheck` and the `ShardCheck`s keep what was found besides,
for `mend`, which takes away what is damaged, and for `replays`, which compares snapshots with what a replay makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from millpond.feature_actors.declared_sources import DeclaredSources
from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.keys import KEY_HASH_VERSION
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.log.folder import Folder
from millpond.feature_actors.log.history_reader import check_history, whole_from
from millpond.feature_actors.log.log import mended_log
from millpond.feature_actors.log.part import Part, parts_of
from millpond.feature_actors.log.record import (
    MAGIC,
    EventsRecord,
    HomeRecord,
    LogDamaged,
    LostRecord,
    OfferRecord,
    Record,
    TakeRecord,
)
from millpond.feature_actors.log.schemas import Schemas
from millpond.feature_actors.log.snapshot import (
    Rows,
    ShardHeader,
    SnapshotDamaged,
    SnapshotTooNew,
    StringsHeader,
    begin_of,
    decode_strings,
    newest_snapshots,
    read_snapshot,
)
from millpond.feature_actors.log.stopped import StoppedLog, read_write_ahead
from millpond.feature_actors.manifest import FORMAT_VERSION, Manifest, ManifestError, shard_dir
from millpond.feature_actors.routes import shards_of_keys
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.structure import ROW_SEQUENCE, SEQUENCE_ROW_BITS

__all__ = ["CannotCheck", "DirectoryCheck", "Problem", "ShardCheck"]

_RESTORE = "restore it from a copy"
_FIX = "restore it from a copy, or run this with --fix, which lists what is lost"
_FIX_SAFELY = "run this with --fix; nothing is lost by it"
_TEMPORARY = re.compile(r"\..+\.(json|arrow)\.[0-9]+|.+\.snapshot\.tmp|\.[0-9]{3,}-.+\.(parquet|json)\.[0-9]+")
_MOVED_AWAY = ".damaged"


class CannotCheck(MillpondError):
    """There is nothing to check, or not by this version, or not now."""

    code = "cannot_check"


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written. file: below the directory. do: what to do about it."""

    what: str
    do: str
    file: str = ""
    shard: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        where = [] if self.shard is None else [f"shard {self.shard}"]
        where += [f"`{self.file}`"] * bool(self.file)
        where += [] if self.offset is None else [f"offset {self.offset}"]
        return f"{', '.join(where)}: {self.what}; {self.do}" if where else f"{self.what}; {self.do}"


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that is as it was written. newest: offset of the newest record that a row of it has anything of."""

    path: Path
    header: ShardHeader
    newest: int


@dataclass
class Offer:
    """An offer of a log: how many events it has, and who has taken it."""

    rows: int
    taken_at: int | None = None


class ShardCheck:
    """What was found in the directory of a shard."""

    def __init__(self, number: int, path: Path, log: StoppedLog) -> None:
        self.number, self.path, self.log = number, path, log
        #: Records that cannot be read or used, and why.
        self.bad: dict[int, str] = {}
        #: Records that an earlier --fix has put where something was lost.
        self.lost: dict[int, LostRecord] = {}
        #: Whether the log has to be written anew, though perhaps all of its records are there.
        self.log_damaged = False
        self.damaged_schemas: list[Path] = []
        #: Snapshots that are whole, the newest first, and those that are not.
        self.snapshots: list[Snapshot] = []
        self.damaged_snapshots: list[Path] = []
        self.history: dict[str, int] | None = {"epoch": 0, "from_offset": 0, "to_offset": 0, "done_to": 0}
        self.history_damaged = False
        self.epoch: int | None = None
        #: Where the log has to end at least, by all that is known of it elsewhere.
        self.known_end = 0
        self.records = 0
        #: All of its own records before that have been applied everywhere, by what it says itself.
        self.settled = 0

    @property
    def needs_from(self) -> int:
        """Where the log has to begin at the latest."""
        return min((s.header.begin for s in self.snapshots[:1]), default=self.log.first)

    @property
    def history_done_to(self) -> int:
        return 0 if self.history is None else self.history["done_to"]


@dataclass
class DirectoryCheck:
    """What was found in a directory; `check` fills it.

    history_uri: base of the history, None if there is none. event_ids: of sources, which field is the event id.
    """

    directory: Path
    history_uri: str | None
    event_ids: dict[str, str] = field(default_factory=dict)
    manifest: Manifest | None = None
    n_shards: int = 0
    shards: list[ShardCheck] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    #: What is worth saying and no problem.
    notes: list[str] = field(default_factory=list)
    #: What was not checked, and why.
    left_out: list[str] = field(default_factory=list)
    _scratch: TemporaryDirectory[str] | None = None

    def __enter__(self) -> DirectoryCheck:
        """Check everything.

        1. the manifest, and how many shards there are
        2. each shard by itself: its log, snapshots, history
        3. what shards know of each other

        Raises `CannotCheck`.
        """
        self._scratch = TemporaryDirectory(prefix="millpond-check-")
        try:
            self._check_manifest()
            self._find_event_ids()
            for number in range(self.n_shards):
                self._check_shard(number)
            self._check_ends()
            self._find_temporaries()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for shard in self.shards:
            shard.log.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    @property
    def scratch(self) -> Path:
        assert self._scratch is not None
        return Path(self._scratch.name)

    def name(self, path: Path) -> str:
        """Return what a path is called below the directory."""
        return str(path.relative_to(self.directory))

    def found(
        self, what: str, do: str, path: Path | None = None, shard: int | None = None, offset: int | None = None
    ) -> None:
        self.problems.append(Problem(what, do, "" if path is None else self.name(path), shard, offset))

    # -- the directory

    def _check_manifest(self) -> None:
        path = self.directory / "manifest.json"
        if not path.is_file():
            raise CannotCheck(
                f"data directory: `{self.directory}` has no manifest.json; name the directory of a cluster, which is "
                "its `data_dir` and its name"
            )
        content = _json(path)
        if content is None:
            self.found("cannot be read", _RESTORE, path)
        elif type(content.get("format")) is int and content["format"] > FORMAT_VERSION:
            raise CannotCheck(
                f"data directory: `{path}` has format {content['format']}; this version reads {FORMAT_VERSION}; check "
                "it with the version that wrote it"
            )
        else:
            try:
                self.manifest = msgspec.convert(content, Manifest)
                if self.manifest.key_hash_version != KEY_HASH_VERSION or self.manifest.format != FORMAT_VERSION:
                    raise ValueError("its format or key hash version is none that there has been")
                if not 1 <= self.manifest.n_slots <= 1 << 24:
                    raise ValueError(f"it says that there are {self.manifest.n_slots} slots")
            except (msgspec.ValidationError, ValueError) as error:
                self.manifest = None
                self.found(f"is damaged: {error}", _RESTORE, path)
        self._count_shards()

    def _count_shards(self) -> None:
        """Find how many shards there are: as many as the manifest says have logs, and whatever else is there."""
        path = self.directory / "manifest.json"
        there = [int(p.name) for p in (self.directory / "shards").glob("*") if p.name.isdecimal() and p.is_dir()]
        logs = [n for n in there if (shard_dir(self.directory, n) / "log").is_dir()]
        said = max(self.manifest.log_shards, 0) if self.manifest is not None else max(logs, default=-1) + 1
        if any(number >= said for number in logs):
            self.found(f"says that {said} shards have logs; there is one of shard {max(logs)}", _RESTORE, path)
        self.n_shards = max([said, *(number + 1 for number in logs)])
        if not self.n_shards:
            self.notes.append("there is no log: nothing that was acknowledged is kept in this directory")

    def _find_event_ids(self) -> None:
        """Take from `sources.json`, where it is, which fields are event ids; what was declared wins."""
        path = self.directory / "sources.json"
        content = _json(path)
        if content is not None and type(content.get("format")) is int and content["format"] > FORMAT_VERSION:
            raise CannotCheck(
                f"data directory: `{path}` has format {content['format']}; this version reads {FORMAT_VERSION}; check "
                "it with the version that wrote it"
            )
        try:
            for name, declared in DeclaredSources(self.directory).sources.items():
                if declared.event_id is not None:
                    self.event_ids.setdefault(name, declared.event_id)
        except ManifestError:
            self.found("cannot be read", _RESTORE, path)

    def _find_temporaries(self) -> None:
        for path in sorted(self.directory.rglob("*")):
            if "run" in path.relative_to(self.directory).parts[:1]:
                continue
            if _TEMPORARY.fullmatch(path.name):
                self.notes.append(f"`{self.name(path)}` was left by a crash and is harmless")
            elif path.name.endswith(f".snapshot{_MOVED_AWAY}"):
                self.notes.append(
                    f"`{self.name(path)}` was moved away by --fix; delete it when it is not wanted any more"
                )

    # -- a shard

    def _check_shard(self, number: int) -> None:
        path = shard_dir(self.directory, number)
        scratch = self.scratch / f"{number}"
        scratch.mkdir()
        shard = ShardCheck(number, path, StoppedLog(path / "log", scratch))
        self.shards.append(shard)
        if not path.is_dir():
            shard.log_damaged = True
            self.found("is missing", _RESTORE, path, number)
            return
        if (mended := mended_log(path / "log") / "cache.db").exists():
            self.found("was written anew by a --fix that was broken off", "run that again", mended, number)
        self._check_schemas(shard)
        self._check_database(shard)
        self._check_records(shard)
        self._check_snapshots(shard)
        self._check_history(shard)
        self._check_epoch(shard)
        self._check_begin(shard)

    def _check_schemas(self, shard: ShardCheck) -> None:
        schemas = Schemas(shard.path / "log" / "schemas")
        for path in sorted((shard.path / "log" / "schemas").glob("*.arrow")):
            try:
                schemas.get(path.stem)
            except LogDamaged:
                shard.damaged_schemas.append(path)
                self.found("is not the schema that its name says", _FIX, path, shard.number)

    def _check_database(self, shard: ShardCheck) -> None:
        log, path = shard.log, shard.path / "log" / "cache.db"
        said = (_json(shard.path / "epoch.json") or {}).get("log_end")
        if not path.exists() and said is None and not list(shard.path.glob("snapshots/*.snapshot")):
            log.problems.clear()  # it has not been opened yet
        for problem in log.problems:
            self.found(problem, _FIX, path, shard.number)
        for key, problem in log.misplaced.items():
            self.found(f"key {key!r} {problem}", _FIX, path, shard.number)
        ahead = read_write_ahead(path.with_name("cache.db-wal"))
        if ahead.problem:
            self.found(
                f"{ahead.problem}; if the power went away during the last append, it was that one, and nothing "
                "acknowledged is lost", _FIX, path.with_name("cache.db-wal"), shard.number
            )  # fmt: skip
        if ahead.unfinished:
            self.notes.append(f"shard {shard.number}: its last append was cut off by a crash; it was not acknowledged")
        shard.log_damaged = bool(log.problems or log.misplaced or ahead.problem)

    def _check_records(self, shard: ShardCheck) -> None:
        """Read every record: it decodes, there is none missing, and it fits those before it."""
        log, settled = shard.log, 0
        offers: dict[int, Offer] = {}
        later = 0
        for offset in range(log.first, log.next):
            try:
                record, says = log.get(offset)
                if isinstance(record, LostRecord):
                    shard.lost[offset] = record
                    continue
                _check_record(record, offset, log.first, offers)
                if not settled <= says <= offset:
                    raise LogDamaged(f"says that all before {says} is settled, after {settled}")
                settled = shard.settled = says
            except LogDamaged as error:
                shard.bad[offset] = _wrong(error, offset)
                later = later + 1 if _is_later(log, offset) else 0
                if later and offset == log.next - 1:
                    raise CannotCheck(
                        f"shard {shard.number}: its log goes on in a later format from offset {offset + 1 - later} on; "
                        f"this version reads {MAGIC!r}; check it with the version that wrote it"
                    ) from None
                continue
            shard.records += 1
            later = 0
        for offset, why in shard.bad.items():
            self.found(why, _FIX, shard.path / "log" / "cache.db", shard.number, offset)
        if shard.lost:
            self.notes.append(f"shard {shard.number}: {len(shard.lost)} records are lost since an earlier --fix")

    def _check_snapshots(self, shard: ShardCheck) -> None:
        for path in newest_snapshots(shard.path / "snapshots"):
            try:
                snapshot = _read_whole(path)
                self._check_fits(shard, snapshot)
            except SnapshotTooNew as error:
                raise CannotCheck(error.message) from None
            except SnapshotDamaged as error:
                shard.damaged_snapshots.append(path)
                what = error.message.removeprefix(f"snapshot: `{path}` ").removesuffix("; an older one has to do")
                self.found(
                    what, "run this with --fix, which moves it away if something else can do", path, shard.number
                )
            else:
                shard.snapshots.append(snapshot)
        for path in sorted((shard.path / "snapshots").glob("*.snapshot")):
            if path not in shard.damaged_snapshots and path not in [s.path for s in shard.snapshots]:
                shard.damaged_snapshots.append(path)
                self.found("has a name that is none of a snapshot", _FIX_SAFELY, path, shard.number)

    def _check_fits(self, shard: ShardCheck, snapshot: Snapshot) -> None:
        """Raise `SnapshotDamaged` unless a snapshot is of this shard; whether the log fits it is said otherwise."""
        path, header, log = snapshot.path, snapshot.header, shard.log
        wanted = {"shard": shard.number, "begin": begin_of(path), "epoch": int(path.stem.rpartition("-")[2])}
        if self.manifest is not None:
            wanted["n_slots"] = self.manifest.n_slots
            if header.cluster_id != self.manifest.cluster_id:
                raise _no_snapshot(path, f"is of cluster {header.cluster_id!r}, not of {self.manifest.cluster_id!r}")
        for name, value in wanted.items():
            if (says := getattr(header, name)) != value:
                raise _no_snapshot(path, f"says that its {name} is {says!r}, not {value!r}")
        try:
            deliveries = header.state["deliveries"]
            named = [*header.state["offers"], *deliveries["owed"]]
            dict(deliveries["had"]), dict(deliveries["settled"])
        except (KeyError, TypeError, ValueError):
            raise _no_snapshot(path, "has no state of the shard's deliveries") from None
        for offset in sorted({at for at in named if log.first <= at < log.next and at not in shard.bad}):
            if not isinstance(log.get(offset).record, OfferRecord | LostRecord):
                raise _no_snapshot(path, f"says that offset {offset} of the log is an offer, which it is not")
        if header.begin < log.first or (gone := [at for at in named if at < log.first]):
            needs = header.begin if header.begin < log.first else gone[0]
            self.found(f"needs the log from offset {needs} on, which begins at {log.first}", _FIX, path, shard.number)
            shard.log_damaged = True
        shard.known_end = max(shard.known_end, header.begin, snapshot.newest + 1)

    def _check_history(self, shard: ShardCheck) -> None:
        path = shard.path / "history.json"
        content = _json(path) if path.exists() else shard.history
        names = ("epoch", "from_offset", "to_offset", "done_to")
        if content is None or sorted(content) != sorted(names) or any(type(v) is not int for v in content.values()):
            shard.history, shard.history_damaged = None, True
            self.found("cannot be read", _FIX_SAFELY, path, shard.number)
        else:
            shard.history = progress = content
            if not (0 <= progress["from_offset"] <= progress["to_offset"] and
                    progress["done_to"] in (progress["from_offset"], progress["to_offset"])):  # fmt: skip
                shard.history_damaged = True
                self.found("says what cannot be of the part that was planned last", _FIX_SAFELY, path, shard.number)
            elif progress["done_to"] > shard.log.next:
                shard.known_end = max(shard.known_end, progress["done_to"])
        if self.history_uri is None:
            if shard.history_done_to or shard.history_damaged:
                self.left_out.append(f"shard {shard.number}: the history, which is switched off")
            return
        try:
            if not shard.history_damaged and shard.history is not None:
                known = [(p.epoch, p.from_offset, p.to_offset) for p in self.parts(shard)]
                plan = (shard.history["epoch"], shard.history["from_offset"], shard.history["to_offset"])
                if shard.history["done_to"] == plan[2] > plan[1] and known and plan not in known:
                    shard.history_damaged = True
                    self.found("names a part as done that the history has not", _FIX_SAFELY, path, shard.number)
            until = None if shard.history_damaged else shard.history_done_to
            for problem in check_history(self.history_uri, shard.number, until):
                what, _, do = problem.removeprefix("history: ").rpartition("; ")
                what, do = (what, do) if what and do.startswith("r") else (problem.removeprefix("history: "), _RESTORE)
                self.found(f"history: {what}", do, shard=shard.number)
        except MillpondError as error:
            what, _, do = error.message.partition("; ")
            self.found(what, do or _RESTORE, shard=shard.number)

    def parts(self, shard: ShardCheck) -> list[Part]:
        """Return the parts of the history that a shard has. Raises `HistoryUnavailable`."""
        return parts_of(Folder(self.history_uri), shard.number) if self.history_uri is not None else []

    def begins(self, shard: ShardCheck) -> bool:
        """Return whether a shard can be recovered without a snapshot."""
        if shard.log.first == 0:
            return True
        try:
            parts = self.parts(shard)
            return (
                bool(parts)
                and parts[-1].to_offset >= shard.log.first
                and whole_from(Folder(self.history_uri or ""), shard.number) == 0
            )
        except MillpondError:
            return False

    def _check_begin(self, shard: ShardCheck) -> None:
        if not shard.snapshots and not self.begins(shard):
            self.found(
                f"begins at offset {shard.log.first}, and what was before is in no snapshot that can be read, nor in a "
                "history", _RESTORE, shard.path / "log" / "cache.db", shard.number
            )  # fmt: skip

    def _check_epoch(self, shard: ShardCheck) -> None:
        path = shard.path / "epoch.json"
        content = _json(path) or {}
        end = content.get("log_end")
        if type(content.get("epoch")) is not int or "run" not in content or not (end is None or type(end) is int):
            self.found("cannot be read", _FIX_SAFELY, path, shard.number)
            return
        wanted: dict[str, Any] = {"shard": shard.number}
        if self.manifest is not None:
            wanted["cluster_id"] = self.manifest.cluster_id
        for name, value in wanted.items():
            if (says := content.get(name)) != value:
                self.found(f"says that it is of {name} {says!r}, not {value!r}", _RESTORE, path, shard.number)
                return
        newest = max([s.header.epoch for s in shard.snapshots] + [(shard.history or {}).get("epoch", 0)])
        if content["epoch"] < newest:
            self.found(f"says that the shard was opened {content['epoch']} times; it was {newest} times at least",
                       _FIX_SAFELY, path, shard.number)  # fmt: skip
            return
        shard.epoch = content["epoch"]
        shard.known_end = max(shard.known_end, end or 0)

    # -- what shards know of each other

    def _check_ends(self) -> None:
        """Hold the ends of the logs against what snapshots and other shards know of them."""
        for shard in self.shards:
            for home, end in known_ends(shard).items():
                if home < len(self.shards):
                    self.shards[home].known_end = max(self.shards[home].known_end, end)
                else:
                    self.found(f"has records of shard {home}, which is not there", _RESTORE, shard=shard.number)
        for shard in self.shards:
            if shard.known_end > shard.log.next:
                shard.log_damaged = True
                self.found(
                    f"ends at offset {shard.log.next}, and had records up to {shard.known_end} at least",
                    _FIX, shard.path / "log" / "cache.db", shard.number,
                )  # fmt: skip


def homes_of(record: Record) -> tuple[HomeRecord, ...]:
    """Return of whose records what a record applied is."""
    return record.homes if isinstance(record, EventsRecord | TakeRecord) else ()


def intact(shard: ShardCheck, first: int = 0) -> Iterator[tuple[int, Record]]:
    """Yield the records of a log that can be read, with their offsets."""
    for offset in range(max(first, shard.log.first), shard.log.next):
        if offset not in shard.bad and offset not in shard.lost:
            yield offset, shard.log.get(offset).record


def known_ends(shard: ShardCheck) -> dict[int, int]:
    """Return where the logs of other shards end at least, by what a shard has had of them."""
    ends: dict[int, int] = {}
    for _, record in intact(shard):
        for home in homes_of(record):
            ends[home.shard] = max(ends.get(home.shard, 0), home.offset + 1, home.settled)
    for snapshot in shard.snapshots:
        deliveries = snapshot.header.state["deliveries"]
        for home, had in deliveries["had"]:
            ends[home] = max([ends.get(home, 0), *(at + 1 for at in had)])
        for home, settled in deliveries["settled"]:
            ends[home] = max(ends.get(home, 0), settled)
    return ends


def never_had(
    check: DirectoryCheck, shard: ShardCheck, home: ShardCheck, layout: Layout
) -> Iterator[tuple[int, OfferRecord]]:
    """Yield records of another home that are settled there, and that a shard has had nothing of, though some of their
    events are its own: their offsets there, and those events."""
    assert check.manifest is not None
    had: set[int] = set()
    settled = 0
    for snapshot in shard.snapshots:
        deliveries = snapshot.header.state["deliveries"]
        for number, offsets in deliveries["had"]:
            had.update(offsets if number == home.number else ())
        settled = max([settled, *(at for number, at in deliveries["settled"] if number == home.number)])
    for _, record in intact(shard):
        had.update(of.offset for of in homes_of(record) if of.shard == home.number)
    shard_map = ShardMap.even(check.manifest.n_slots, check.n_shards)
    for offset, record in intact(home, settled):
        if offset >= home.settled:  # it is owed still, and will be delivered
            return
        if not isinstance(record, OfferRecord) or offset in had or record.source not in layout.sources:
            continue
        batch = layout.source(record.source).upgraded(record.batch)
        tables = [table for table in layout.tables_of(record.source) if table.key in record.tables]
        concerned, _ = shards_of_keys(tables, shard_map, batch)
        rows = np.flatnonzero(concerned[shard.number] & (record.routes & 1).astype(bool))
        if len(rows):
            events = record.batch.take(pa.array(rows))
            yield offset, replace(record, arrivals=record.arrivals[rows], routes=record.routes[rows], batch=events)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _wrong(error: LogDamaged, offset: int) -> str:
    text = error.message.removeprefix("log: ").removeprefix(f"the record at offset {offset} ")
    return text.removesuffix("; run `millpond check` on the stopped cluster's directory").removesuffix(f"; {_RESTORE}")


def _is_later(log: StoppedLog, offset: int) -> bool:
    try:
        magic = log.content(offset)[:4]
    except LogDamaged:
        return False
    return magic[:3] == MAGIC[:3] and magic[3:].isdigit() and magic > MAGIC


def _check_record(record: Record, offset: int, first: int, offers: dict[int, Offer]) -> None:
    """Raise `LogDamaged` unless a record fits together, and with the offers before it."""
    if isinstance(record, TakeRecord):
        if record.offer < first:
            return
        offer = offers.get(record.offer)
        if offer is None:
            raise LogDamaged(f"takes an offer at offset {record.offer}, which is not there")
        if offer.taken_at is not None:
            raise LogDamaged(f"takes the offer at offset {record.offer}, which offset {offer.taken_at} has taken")
        if len(record.rows) and not 0 <= record.rows.min() <= record.rows.max() < offer.rows:
            raise LogDamaged(f"takes events that the offer at offset {record.offer} has not")
        offer.taken_at = offset
        return
    assert isinstance(record, EventsRecord | OfferRecord)
    n = record.batch.num_rows
    if {len(record.arrivals), len(record.routes), n if record.ids is None else len(record.ids)} != {n}:
        raise LogDamaged("has columns of several lengths")
    if (record.routes >= np.uint64(2) << np.uint64(len(record.tables))).any():
        raise LogDamaged("has events of tables that it does not name")
    if isinstance(record, OfferRecord):
        offers[offset] = Offer(n)


def _no_snapshot(path: Path, what: str) -> SnapshotDamaged:
    return SnapshotDamaged(f"snapshot: `{path}` {what}; an older one has to do", path=str(path))


def _read_whole(path: Path) -> Snapshot:
    """Read every chunk of a snapshot. Raises `SnapshotDamaged`, `SnapshotTooNew`."""
    header, newest = None, -1
    for chunk in read_snapshot(path):
        if isinstance(chunk.header, ShardHeader):
            header = chunk.header
        elif isinstance(chunk.header, Rows):
            for at in _rows(chunk.words, path):
                newest = max(newest, int(chunk.words[at + 1 + ROW_SEQUENCE]))
        elif isinstance(chunk.header, StringsHeader):
            try:
                decode_strings(chunk)
            except ValueError as error:
                raise _no_snapshot(path, f"has no strings where it should: {error}") from None
    assert header is not None
    return Snapshot(path, header, newest >> SEQUENCE_ROW_BITS)


def _rows(words: Any, path: Path) -> Iterator[int]:
    at = 0
    while at < len(words):
        yield at
        length = int(words[at])
        if not ROW_SEQUENCE + 1 < length <= len(words) - at:
            raise _no_snapshot(path, "has rows that are not as long as they say")
        at += length
