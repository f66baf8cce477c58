"""The image of a shard: all that a snapshot keeps of it, taken in short steps while it goes on, and loaded again.

The steps are taken on the shard's own thread, each between two commits; encoding and writing are somebody else's, see
`log/snapshot.py`. What a step finds is as of then, so the image as a whole is of no one moment. That it is right
together with the log from `begin` on has three reasons: a row says by its sequence which events of the log it has;
what comes to be after the beginning, an entity, an id, a string, is made again by the replay; and an id or a string
that is there already is not changed by coming again. Time, and what is counted, is as of the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.keys import KEY_HASH_VERSION
from millpond.feature_actors.layout import Table
from millpond.feature_actors.log.snapshot import (
    Chunk,
    Ids,
    Rows,
    ShardHeader,
    SnapshotDamaged,
    StringsHeader,
    decode_strings,
    encode_strings,
    read_snapshot,
)
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.tiles.image import Texts
from millpond.feature_actors.tiles.shape import Fit, fit_of, lacking, shape_of
from millpond.feature_actors.tiles.structure import SEQUENCE_ROW_BITS

__all__ = ["ForeignSnapshot", "Loaded", "load_shard", "shard_chunks"]

Ints = npt.NDArray[np.int64]

#: Words of an entry of a filter, see `IdFilter.image`.
_ID_WORDS = 4


class ForeignSnapshot(MillpondError):
    """A snapshot is of another cluster or shard, or of the same with other slots or keys."""

    code, status = "foreign_snapshot", 500


# -- taking it


def shard_chunks(
    shard: Shard, *, cluster_id: str, epoch: int, begin: int, state: Mapping[str, Any] | None = None
) -> Iterator[Chunk]:
    """Yield the chunks of a snapshot of a shard. Each `next` is a step of a millisecond or so, between two commits.

    begin: offset of the log; what is before it has been committed when the first step is taken, and nothing behind it.
    state: more to keep, as of the beginning, of what MessagePack has.

    The caller makes sure of one thing: what had been *prepared* by the last step is in the log, and synced, before the
    snapshot gets its name; the image may have its ids. If any of that is undone, the snapshot is to be abandoned.
    """
    _, whole, store, strings, homes, events = shard.parts
    yield Chunk(
        ShardHeader(
            cluster_id=cluster_id,
            shard=shard.number,
            epoch=epoch,
            begin=begin,
            n_slots=shard.shard_map.n_slots,
            key_hash_version=KEY_HASH_VERSION,
            newest_arrival_ms=store.newest_arrival_ms,
            newest_received_ms=store.newest_received_ms,
            events=dict(events),
            strings_refused=strings.refused,
            tables=tuple(shape_of(table) for table in whole),
            state=dict(state or {}),
        )
    )
    for number, table in enumerate(whole):
        for slot, rows, image in store.image(table):
            yield Chunk(Rows(number, slot, rows), image)
    for source, seen in homes.items():
        for slot, entries in seen.image():
            yield Chunk(Ids(source, slot, seen.memory.newest_ms, seen.memory.cutoff_ms), entries.reshape(-1))
    # The last, because rows that have been taken may name strings that are new.
    for addresses, texts in strings.image():
        yield encode_strings(addresses, texts)


# -- loading it


@dataclass(frozen=True)
class Loaded:
    """What was loaded. begin: the offset from which the log is to be replayed. newest_offset: of the newest record that
    a row has anything of, -1 if there is none; a log that ends before it has lost what was acknowledged. lacks: tables
    of which it has nothing, which are empty: of views that came since, or of keys. incomplete: tables without some of
    their features, which are empty, too; with the names of these."""

    begin: int
    epoch: int
    newest_offset: int
    state: dict[str, Any]
    lacks: tuple[Table, ...] = ()
    incomplete: Mapping[Table, Sequence[str]] = field(default_factory=dict)


def load_shard(
    shard: Shard, path: Path, *, cluster_id: str, progress: Callable[[int, int], None] = lambda done, of: None
) -> Loaded:
    """Load a snapshot into a shard that is empty; tables and features that are not declared any more are passed over.

    A table that has features which the snapshot knows nothing of stays empty, and is said to be incomplete.
    progress: called with bytes of the file loaded, and how many there are. Raises `SnapshotDamaged`, `SnapshotTooNew`,
    `ForeignSnapshot`, of which but the first nothing has been loaded; and `MemoryFull`. After those two the shard is
    not to be used.
    """
    # The strings are the last in the file and needed first; on the way to them everything is checked.
    header: ShardHeader | None = None
    strings: list[Chunk] = []
    for chunk in read_snapshot(path, (ShardHeader, StringsHeader)):
        if isinstance(chunk.header, ShardHeader):
            header = chunk.header
            fits, incomplete = _fits(shard, path, header, cluster_id)
        else:
            strings.append(chunk)
    assert header is not None, "a snapshot begins with its shard"
    newest, size = -1, path.stat().st_size
    try:
        texts = _load_strings(shard, strings)
        for chunk in read_snapshot(path, (Rows, Ids)):
            newest = max(newest, _load(shard, header, fits, chunk, texts))
            progress(chunk.end, size)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    parts = shard.parts
    parts.store.hear_of(header.newest_arrival_ms, header.newest_received_ms)
    parts.strings.refused = header.strings_refused
    counted = parts.events.keys() - {table.name for table in incomplete}
    parts.events.update({name: n for name, n in header.events.items() if name in counted})
    shard.next_offset = header.begin
    has = {(shape.source, shape.key, shape.added) for shape in header.tables}
    lacks = tuple(table for table in parts.layout.tables if (table.source.name, table.key, table.added) not in has)
    return Loaded(header.begin, header.epoch, newest >> SEQUENCE_ROW_BITS, header.state, lacks, incomplete)


def _damaged(path: Path, what: str) -> SnapshotDamaged:
    return SnapshotDamaged(
        f"snapshot: `{path}` is not what was taken of a shard: {what}; an older one has to do", path=str(path)
    )


def _fits(
    shard: Shard, path: Path, header: ShardHeader, cluster_id: str
) -> tuple[list[tuple[Table, Fit] | None], dict[Table, list[str]]]:
    """Return for each table of a snapshot which of the shard's it is, and how its rows fit, None to pass over; and what
    is lacking of tables."""
    for what, its, ours in (
        ("cluster", header.cluster_id, cluster_id),
        ("shard", header.shard, shard.number),
        ("number of slots", header.n_slots, shard.shard_map.n_slots),
        ("key hash version", header.key_hash_version, KEY_HASH_VERSION),
    ):
        if its != ours:
            raise ForeignSnapshot(
                f"snapshot: `{path}` is of {what} {its!r}, this is {ours!r}; take the file away", path=str(path)
            )
    layout = shard.parts.layout
    tables = {(table.source.name, table.key, table.added): table for table in layout.tables}
    shapes = {(shape.source, shape.key, shape.added): shape for shape in header.tables}
    if len(shapes) < len(header.tables):
        raise _damaged(path, "two tables have one source and key")
    lacks = {table: lacking(shapes[of], table, layout) for of, table in tables.items() if of in shapes}
    incomplete = {table: names for table, names in lacks.items() if names}
    loaded = {of: table for of, table in tables.items() if table not in incomplete}
    fits = [(loaded[of], fit_of(shape, loaded[of])) if of in loaded else None for of, shape in shapes.items()]
    return fits, incomplete


def _load_strings(shard: Shard, chunks: list[Chunk]) -> Texts:
    before, now = [np.empty(0)], [np.empty(0)]
    for chunk in chunks:
        addresses, texts = decode_strings(chunk)
        before.append(addresses)
        now.append(shard.parts.strings.load(texts))
    of_all = np.concatenate(before)
    order = np.argsort(of_all, kind="stable")
    return Texts(of_all[order], np.concatenate(now)[order])


def _load(shard: Shard, header: ShardHeader, fits: list[tuple[Table, Fit] | None], chunk: Chunk, texts: Texts) -> int:
    """Load rows or ids; return the newest sequence among them. Raises `ValueError` if they cannot be of this shard."""
    of, words, parts = chunk.header, chunk.words, shard.parts
    assert isinstance(of, Rows | Ids)
    if of.slot >= header.n_slots:
        raise ValueError(f"it has something of slot {of.slot} of {header.n_slots}")
    if isinstance(of, Rows):
        if of.table >= len(fits):
            raise ValueError(f"it has rows of table {of.table} of {len(fits)}")
        if (fit := fits[of.table]) is None:
            return -1
        return parts.store.load(fit[0], fit[1], of.slot, of.rows, words, texts)
    _load_ids(shard, of, words)
    return -1


def _load_ids(shard: Shard, of: Ids, words: Ints) -> None:
    if len(words) % _ID_WORDS:
        raise ValueError(f"{len(words)} words are no ids")
    seen = shard.parts.homes.get(of.source)
    if seen is not None:
        seen.load(of.slot, words.reshape(-1, _ID_WORDS), of.newest_ms, of.cutoff_ms)
