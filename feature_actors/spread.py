"""Spread: for a key that comes while the cluster runs, the events of before are brought to the shards of that key.

1. Every shard has a table with the key; nobody brings it events yet (`added`).
2. Whoever takes events in learns of the key, and brings them there, too; it says so with the events (`routing`). What
   is told so, is written down with them at their home and wherever else: the key is among `tables` of the record.
3. When all have learnt it, each shard refuses events of who has not, and says from which offset of its log on all of
   its records have the key (its cut). Each reads the logs of all up to there, and writes into its own what is of its
   keys and has been brought to nobody: exactly the events of records that lack the key.
4. From then on the past of a shard has all events of the key, and the view is filled as any other, see `backfill`.

A record of what was brought says up to where it had been read: a successor goes on from there.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.record import BROUGHT_LATER, Brought, EventsRecord, Record
from millpond.feature_actors.manifest import write_json

__all__ = [
    "BroughtBefore",
    "Key",
    "Lacking",
    "batched",
    "brought_before",
    "brought_keys",
    "is_brought",
    "lacking",
    "note_brought",
    "take_down",
]

#: A source and a key of it.
Key = tuple[str, tuple[str, ...]]
#: By key, up to which offset of which home's log all that lacked it has been brought.
BroughtBefore = dict[Key, dict[int, int]]

_BROUGHT = "brought.json"


class Lacking(NamedTuple):
    """A record of a home that lacks a key; brought: what of the home has been when this has."""

    record: EventsRecord
    brought: Brought


def is_brought(record: EventsRecord) -> bool:
    """Return whether the events of a record were logged at their homes before, so that they are not counted again."""
    return BROUGHT_LATER in record.tables


def lacking(records: Iterable[tuple[int, EventsRecord]], home: int, key: Key) -> Iterator[Lacking]:
    """Yield what was not meant for a key, of what is at home in a shard, in its order."""
    source, fields = key
    for offset, record in records:
        if record.source == source and fields not in record.tables:
            yield Lacking(record, Brought(home, offset + 1))


def batched(lacks: Iterator[Lacking], records_max: int) -> Iterator[list[Lacking]]:
    """Yield them a few together, which are written together."""
    while some := list(itertools.islice(lacks, records_max)):
        yield some


def brought_before(folder: Path, log: Log, keys: Iterable[Key]) -> BroughtBefore:
    """Return what has been brought to the shard in a folder, of some keys and of those that are written down there."""
    noted, end = _noted(folder)
    found: BroughtBefore = {**{key: {} for key in keys}, **noted}
    for _, (record, _) in log.read(max(log.first, end)) if found else ():
        take_down(found, record)
    return found


def brought_keys(folder: Path) -> set[Key]:
    """Return the keys to which something has been brought, or was about to be, in the shard in a folder."""
    return set(_noted(folder)[0])


def _noted(folder: Path) -> tuple[BroughtBefore, int]:
    """Return what is written down, and where the log ended then."""
    try:
        told = json.loads((folder / _BROUGHT).read_bytes())
    except FileNotFoundError:
        return {}, 0
    return {(source, tuple(fields)): dict(of) for source, fields, of in told["brought"]}, told["log_end"]


def take_down(brought: BroughtBefore, record: Record | None) -> None:
    """Take down what a record that is in the log says has been brought with it, if it says so."""
    if isinstance(record, EventsRecord) and record.brought is not None:
        of = brought.setdefault((record.source, record.tables[0]), {})
        of[record.brought.home] = max(record.brought.before, of.get(record.brought.home, 0))


def note_brought(folder: Path, brought: BroughtBefore, log_end: int) -> None:
    """Write down what has been brought when the log ends at an offset: what says so before that may be truncated.

    To be called before the first record of a key is written, too: else a start without that key would not look for any.
    """
    if brought:
        told = [[source, list(fields), sorted(of.items())] for (source, fields), of in sorted(brought.items())]
        write_json(folder / _BROUGHT, {"brought": told, "log_end": log_end})
