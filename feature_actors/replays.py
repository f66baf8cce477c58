"""Snapshots against a replay: a stopped shard recovered from its newest snapshot, and once more without it.

Both are to hold the same. What is compared is what a read can see: all that is out of sight of one as of the newest
arrival is left out, as is which row of its record the last event of an entity was, for the history numbers them anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.check import DirectoryCheck, ShardCheck, Snapshot, never_had
from millpond.feature_actors.durable import DurableShard, ShardFolder, SnapshotLacks
from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.image import shard_chunks
from millpond.feature_actors.layout import Layout, Table
from millpond.feature_actors.log.folder import Folder
from millpond.feature_actors.log.history_reader import whole_from
from millpond.feature_actors.log.part import expired
from millpond.feature_actors.log.snapshot import Ids
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.program import FOR_EVER
from millpond.feature_actors.tiles.shape import SeriesShape, shape_of
from millpond.feature_actors.tiles.structure import ROW_HEADER_WORDS, ROW_SEQUENCE, SEQUENCE_ROW_BITS

__all__ = ["ReplayOptions", "check_replays", "differences"]

Ints = npt.NDArray[np.int64]

_NAMED_MAX = 3
_NEVER = -(2**63)


@dataclass(frozen=True)
class ReplayOptions:
    """Settings of the cluster that a replay depends on."""

    dedupe_horizon_ms: int = 86_400_000
    strings_max: int = 1_000_000
    reclaim_margin_ms: int = 660_000


def check_replays(check: DirectoryCheck, layout: Layout, options: ReplayOptions) -> None:
    """Recover each shard twice and add what differs to the problems of `check`.

    Without the newest snapshot a shard is replayed from the beginning of its log, or of its history; or, where neither
    has it, from an older snapshot. Where nothing else is left it is said to be left out.
    """
    for shard in check.shards:
        _check_had(check, layout, shard)
        if not shard.snapshots:
            if shard.records:
                check.left_out.append(f"shard {shard.number}: snapshots against a replay: it has no snapshot")
            continue
        newest, *older = shard.snapshots
        why = _cannot_replay(check, shard, newest)
        other = None if why else _other_way(check, layout, shard, older)
        if other is None:
            why = why or "what was before the log is in no history and no older snapshot"
            check.left_out.append(f"shard {shard.number}: snapshots against a replay: {why}")
            continue
        try:
            one = _recovered(check, layout, options, shard, [newest.path])
            two = _recovered(check, layout, options, shard, other)
        except SnapshotLacks as error:
            check.left_out.append(f"shard {shard.number}: snapshots against a replay: {error.message}")
            continue
        except MillpondError as error:
            check.found(f"cannot be recovered: {error.message}", "restore it from a copy", shard=shard.number)
            continue
        from_history = not other and shard.log.first > 0
        for what in differences(one.shard, two.shard, layout, options, from_history=from_history):
            check.found(
                f"with the log it is not what a replay makes: {what}",
                "move it away and start the cluster, which replays then; and report this, for every checksum holds",
                newest.path,
                shard.number,
            )


def _check_had(check: DirectoryCheck, layout: Layout, shard: ShardCheck) -> None:
    """Hold what other shards say is applied everywhere against what a shard has had."""
    if check.manifest is None or shard.bad or shard.log_damaged or shard.lost:
        return
    for home in check.shards:
        lacking = [] if home is shard else [offset for offset, _ in never_had(check, shard, home, layout)]
        if lacking:
            check.found(
                f"it has had nothing of the records at {_some(lacking)} of shard {home.number}, which are applied "
                "everywhere: what did that is lost", "restore both shards from one copy", shard=shard.number
            )  # fmt: skip


def _cannot_replay(check: DirectoryCheck, shard: ShardCheck, newest: Snapshot) -> str:
    if check.manifest is None:
        return "the manifest is damaged"
    if shard.bad or shard.log_damaged or shard.damaged_schemas:
        return "its log is damaged"
    if shard.lost:
        return "records of its log are lost since an earlier --fix"
    if shard.history_damaged:
        return "its history.json is damaged"
    return ""


def _other_way(check: DirectoryCheck, layout: Layout, shard: ShardCheck, older: list[Snapshot]) -> list[Path] | None:
    """Return the snapshots for a recovery without the newest: none for a replay of everything; None if it cannot be."""
    if shard.log.first == 0:
        return []
    if check.history_uri is not None and shard.history_done_to >= shard.log.first and not _misses(check, layout, shard):
        return []
    return [older[0].path] if older and older[0].header.begin >= shard.log.first else None


def _misses(check: DirectoryCheck, layout: Layout, shard: ShardCheck) -> bool:
    """Return whether something of the history is not there any more, or never was."""
    assert check.history_uri is not None
    folder = Folder(check.history_uri)
    if any(str(p.what).startswith("history: ") for p in check.problems) or whole_from(folder, shard.number) != 0:
        return True
    return any(expired(folder, name).before_day > _NEVER for name in layout.sources)


def _recovered(
    check: DirectoryCheck, layout: Layout, options: ReplayOptions, of: ShardCheck, snapshots: list[Path]
) -> DurableShard:
    assert check.manifest is not None
    folder = ShardFolder(of.path, check.manifest.cluster_id, of.epoch or 0, check.history_uri)
    # Only those that it is to look at.
    folder.snapshots = check.scratch / f"{of.number}" / f"of-{'-'.join(p.stem for p in snapshots) or 'none'}"
    folder.snapshots.mkdir()
    for path in snapshots:
        (folder.snapshots / path.name).symlink_to(path.absolute())
    shard = Shard(
        layout,
        ShardMap.even(check.manifest.n_slots, check.n_shards),
        of.number,
        seed=check.manifest.hash_seed,
        dedupe_horizon_ms=options.dedupe_horizon_ms,
        strings_max=options.strings_max,
        reclaim_margin_ms=options.reclaim_margin_ms,
    )
    durable = DurableShard(layout, shard, of.log, folder)
    durable.recover()
    return durable


# -- what two shards hold


def differences(
    one: Shard, other: Shard, layout: Layout, options: ReplayOptions, *, from_history: bool = False
) -> list[str]:
    """Return what differs in what two shards hold; both are reclaimed as of one time.

    from_history: the other was replayed from the history, which has not the keys by which requests are told apart.
    """
    problems = []
    stores = [shard.parts.store for shard in (one, other)]
    newest = max(store.newest_arrival_ms for store in stores), max(store.newest_received_ms for store in stores)
    for shard in (one, other):
        shard.parts.store.hear_of(*newest)
        shard.reclaim()
        problems += shard.check()
    for name, counted in one.parts.events.items():
        if (replayed := other.parts.events[name]) != counted:
            problems.append(f"table {name}: {counted} events were applied, by the replay {replayed}")
    strings = _strings(one), _strings(other)
    floor = newest[0] - options.reclaim_margin_ms
    for table in layout.tables:
        problems += _table_differences(one, other, layout, table, strings, floor)
    sources = {name for name, of in layout.sources.items() if of.event_id is not None or not from_history}
    problems += _ids_differences(one, other, sources, options.dedupe_horizon_ms)
    owed = set(one.deliveries.owed) - set(other.deliveries.owed)
    if owed:
        problems.append(f"it owes other shards the records at {_some(sorted(owed))}, which are settled by the replay")
    return problems


def _table_differences(
    one: Shard, other: Shard, layout: Layout, table: Table, strings: tuple[Mapping[float, str], ...], floor: int
) -> list[str]:
    rows = [{key: hash(row) for key, row in _rows(shard, table, None)} for shard in (one, other)]
    suspects = {key for key in {*rows[0], *rows[1]} if rows[0].get(key) != rows[1].get(key)}
    has_texts = any(column.texts for series in shape_of(table).series for column in series.columns)
    if not suspects and not has_texts:
        return []
    if has_texts:  # named by addresses, which may be the same and stand for others
        suspects = {*rows[0], *rows[1]}
    seen: list[dict[tuple[int, int], int]] = []
    for shard, of in zip((one, other), strings, strict=True):
        seen.append({
            key: hash(repr(_visible(np.frombuffer(row, np.int64), table, of, floor)))
            for key, row in _rows(shard, table, suspects)
        })  # fmt: skip
    different = sorted(key for key in suspects if seen[0].get(key) != seen[1].get(key))
    if not different:
        return []
    views = ", ".join(f"`{view.name}`" for view in layout.kept_views.values() if layout.table_of(view) is table)
    hashes = _some([f"{lo & (2**64 - 1):016x}{hi & (2**64 - 1):016x}" for lo, hi in different])
    return [f"views {views}: {len(different)} entities differ, with key hashes {hashes}"]


def _rows(shard: Shard, table: Table, keys: set[tuple[int, int]] | None) -> Any:
    """Yield key and words of the rows of a table, or of some; of the sequence the record alone."""
    for _, _, image in shard.parts.store.image(table):
        at = 0
        while at < len(image):
            length = int(image[at])
            key = int(image[at + 1]), int(image[at + 2])
            if keys is None or key in keys:
                row = image[at : at + length]
                row[1 + ROW_SEQUENCE] >>= SEQUENCE_ROW_BITS
                yield key, row.tobytes()
            at += length


def _visible(row: Ints, table: Table, strings: Mapping[float, str], floor: int) -> list[Any]:
    """Return what a read may see of the image of a row, strings spelled out."""
    shape = shape_of(table)
    at = 1 + ROW_HEADER_WORDS + len(shape.wheres)
    times = row[1 + ROW_HEADER_WORDS : at].tolist()
    seen: list[Any] = [int(row[1 + ROW_SEQUENCE]), times]
    as_of = max(times[0], floor)

    def partial(series: SeriesShape) -> list[Any]:
        nonlocal at
        words: list[Any] = row[at : at + series.words].tolist()
        before = 0
        for column in series.columns:
            for text in column.texts:
                address = float(row[at + before + text : at + before + text + 1].view(np.float64)[0])
                words[before + text] = strings.get(address, "none" if np.isnan(address) else address)
            before += column.words
        at += series.words
        return words

    for series in shape.series:
        if series.lifetime:
            if series.keep_ms == FOR_EVER:
                seen.append(partial(series))
                continue
            newest = int(row[at])
            at += 1
            of_series = partial(series)
            seen.append([newest, of_series] if newest >= as_of - 2 * series.keep_ms else None)
            continue
        tiles = []
        count = int(row[at])
        at += 1
        for _ in range(count):
            number = int(row[at])
            at += 1
            if series.exact:
                fines = int(row[at])
                at += 1
            tile = [number, partial(series)]
            if series.exact:
                for _ in range(fines):
                    at += 1
                    tile.append([int(row[at - 1]), partial(series)])
            if number >= (as_of - series.keep_ms) // series.width_ms:
                tiles.append(tile)
        seen.append(tiles)
    assert at == len(row)
    return seen


def _strings(shard: Shard) -> dict[float, str]:
    strings: dict[float, str] = {}
    for addresses, texts in shard.parts.strings.image():
        strings.update(zip(np.asarray(addresses).tolist(), texts, strict=True))
    return strings


def _ids_differences(one: Shard, other: Shard, sources: set[str], horizon_ms: int) -> list[str]:
    """Return what differs in the event ids that are remembered, of those that both still have to know."""
    filters: list[dict[str, list[Ints]]] = []
    oldest: dict[str, int] = defaultdict(lambda: _NEVER)
    for shard in (one, other):
        of: dict[str, list[Ints]] = defaultdict(list)
        for chunk in shard_chunks(shard, cluster_id="", epoch=0, begin=0):
            if isinstance(chunk.header, Ids):
                header = chunk.header
                of[header.source].append(chunk.words.reshape(-1, 4))
                oldest[header.source] = max(oldest[header.source], header.newest_ms - horizon_ms, header.cutoff_ms)
        filters.append(of)
    problems = []
    for source in sorted(sources & {*filters[0], *filters[1]}):
        known = []
        for of in filters:
            ids = np.concatenate([np.empty((0, 4), np.int64), *of[source]])
            known.append({tuple(entry) for entry in ids[ids[:, 2] >= oldest[source]].tolist()})
        if n := len(known[0] ^ known[1]):
            problems.append(
                f"source `{source}`: {n} event ids are remembered by one and not by the other, or otherwise"
            )
    return problems


def _some(names: list[Any]) -> str:
    shown = ", ".join(map(str, names[:_NAMED_MAX]))
    return shown + (f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else "")
