"""Backfill: views that come while the cluster runs are computed from history and log, beside what goes on.

1. Every process extends its layout by a table for the view (`Layout.extended`); nothing reads it yet.
2. Each shard gives its table all that it has applied before, slice by slice between commits; a thread reads ahead.
3. Events are prepared for the table, too, and queue for it. When all that was prepared before is in the log, the rest
   of the log up to there is applied, then what queued. From then on the table is whole, and commits apply to it.
4. When every shard says that its table is whole, the view is live, and models may read it.

A shard writes down that a table is whole before it says so: its successor does not let readers in before it is whole
again. What was not whole yet is begun anew.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from millpond.feature_actors.layout import Table
from millpond.feature_actors.log.record import EventsRecord
from millpond.feature_actors.manifest import write_json
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.view import FeatureView

__all__ = [
    "AddedView",
    "Slice",
    "ViewState",
    "ViewsPort",
    "apply_slices",
    "forget_whole",
    "note_whole",
    "slices_of",
    "whole_tables",
]

#: A view with a key of its own begins as `added`, see `spread`; the others are backfilled at once.
ViewState = Literal["added", "routing", "backfilling", "live", "failed"]

_WHOLE = "views.json"


@dataclass(frozen=True)
class AddedView:
    """A view that came while the cluster ran."""

    view: FeatureView
    state: ViewState


class ViewsPort(Protocol):
    """Where a shard hears of views. Both may be asked in any thread, but in one."""

    def generation(self) -> int:
        """Return a number that changes when there is something new."""

    def added(self) -> list[AddedView]:
        """Return all in the order in which they came, those that failed, too: each keeps the place of its table."""


class Slice(NamedTuple):
    """Events `start` to `end` of a record at an offset."""

    offset: int
    record: EventsRecord
    start: int
    end: int


def slices_of(records: Iterable[tuple[int, EventsRecord]], events_max: int, records_max: int) -> Iterator[list[Slice]]:
    """Yield records in slices of bounded size, small ones together."""
    together: list[Slice] = []
    events = 0
    for offset, record in records:
        n = len(record.arrivals)
        for start in range(0, n, events_max):
            one = Slice(offset, record, start, min(start + events_max, n))
            if together and (events + one.end - one.start > events_max or len(together) == records_max):
                yield together
                together, events = [], 0
            together.append(one)
            events += one.end - one.start
    if together:
        yield together


def apply_slices(shard: Shard, tables: Sequence[Table], slices: Sequence[Slice]) -> None:
    """Apply slices to tables that are behind. Raises `MemoryFull`."""
    for offset, record, start, end in slices:
        for table in tables:
            shard.catch_up(table, record, offset, start, end)


def whole_tables(folder: Path) -> set[str]:
    """Return which added tables of the shard in a folder have been whole, by the identities of their views."""
    with contextlib.suppress(FileNotFoundError):
        return set(json.loads((folder / _WHOLE).read_bytes())["whole"])
    return set()


def note_whole(folder: Path, tables: Iterable[Table]) -> None:
    """Write down that tables are whole."""
    write_json(folder / _WHOLE, {"whole": sorted(whole_tables(folder) | {table.added for table in tables})})


def forget_whole(folder: Path, kept: Collection[str]) -> None:
    """Forget that tables were whole but for those kept: events pass the others by, and when one comes again it is
    behind."""
    if not (whole := whole_tables(folder)) <= set(kept):
        write_json(folder / _WHOLE, {"whole": sorted(whole & set(kept))})
