"""A training set: for each label the features exactly as the cluster would have served them at its time.

From tables in memory to features in memory (`training_set`), or from a Parquet file of labels to another with the
features beside (`write_training_set`), in bounded memory. Either way by the shards that also serve, see `join`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.clock import ClockKind
from millpond.feature_actors.declared_sources import DeclaredSources
from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.past import Past
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.view import Feature
from millpond.models.model import Model
from millpond.models.training.events import EventsBySource, Knowledge, read_past, read_tables
from millpond.models.training.file import LabelFile, TrainingSetFile
from millpond.models.training.join import join
from millpond.models.training.labels import Labels, LaterLabels
from millpond.models.training.provenance import provenance, time_text
from millpond.models.training.runs import Room
from millpond.models.training.workers import Threads, Workers

__all__ = ["EventsOf", "Progress", "training_set", "write_training_set"]

Ints = npt.NDArray[np.int64]

#: Raw events: of a cluster, or by source as tables or Parquet files in the order of arrival.
EventsOf = Past | Mapping[str, pa.Table | Path]
Stage = Literal["labels", "events", "features", "file"]
#: Called with what is being done, how many rows of it are, and of how many, None if that is not known.
Progress = Callable[[Stage, int, int | None], None]


def training_set(
    model: Model | Sequence[Feature],
    labels: pa.Table,
    events: EventsOf,
    *,
    as_of: str = "as_of",
    knowledge: Knowledge = "event-time",
    clock: ClockKind = "wall",
    incomplete: bool = False,
    workers: Workers | None = None,
    room: Room | None = None,
    progress: Progress = lambda stage, done, of: None,
) -> FeatureRows:
    """Return the features of each label row as the cluster would have served them at its time, in the order of labels.

    model: or the features that one would read. labels: the key fields of the features and the column `as_of`, a
        timestamp; any order, any other columns.
    events: the past of a cluster, `Past(directory, history_uri)`; or raw events by source, tables or Parquet files in
        the order of arrival. These are taken as the events app takes them: checked, defaults filled, duplicates and
        conflicts dropped. By arrival they need a column `_arrival_ms`, int64, that says when each arrived.
    knowledge: by "event-time" a label sees the events that had happened by its time, as if each had arrived when it
        happened. By "arrival" it sees those that had arrived by then, and is read as of `FeatureRows.as_of`: its time,
        or that of the newest event of the rows read if that lies ahead of it. So it was served.
    clock: of the cluster; on an event clock an event arrives at its stamp, whenever it was received.
    incomplete: take labels, too, whose windows reach back to what the cluster's history has lost.
    workers: who computes it, by default a thread for each core. room: how much is in memory at once. Neither changes
        an answer.

    Raises `BadRequest` if a column is missing, a value does not fit, or a label is too old; what `Past.records` raises.
    """
    making = _Making(model, as_of, knowledge, clock, incomplete, workers or Threads(), room or Room(), progress)
    making.labels.check_columns(labels.column_names)
    for batch in labels.select(making.labels.columns).to_batches(making.room.piece_rows):
        making.labels.add(batch)
    if not labels.num_rows:
        return making.plan.no_rows()
    matrix = np.empty((labels.num_rows, len(making.plan.names)))
    served = np.empty(labels.num_rows, np.int64)
    texts: dict[str, list[Any]] = {f.full_name: [None] * labels.num_rows for f in making.plan.features if f.is_text}
    unknown: list[list[str]] = [[]] * labels.num_rows
    for rows, part in making.features(events):
        matrix[rows], served[rows] = part.matrix, part.as_of
        for i, row in enumerate(rows.tolist()):
            unknown[row] = part.unknown[i]
            for name, column in part.texts.items():
                texts[name][row] = column[i]
    return FeatureRows(matrix, served, unknown, texts)


def write_training_set(
    model: Model | Sequence[Feature],
    labels: Path,
    events: EventsOf,
    out: Path,
    *,
    as_of: str = "as_of",
    knowledge: Knowledge = "event-time",
    clock: ClockKind = "wall",
    incomplete: bool = False,
    workers: Workers | None = None,
    room: Room | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress = lambda stage, done, of: None,
) -> dict[str, Any]:
    """Write a Parquet file of labels with their features beside; return what its metadata say of where it comes from.

    Memory does not grow with labels or events, but for what the shards keep of each entity; what does not fit lies
    beside `out`, in files without a name. The columns of the labels come first, then `features_as_of`, the features by
    full name (a `LastN` of strings as a list), and `unknown`, the views that do not know the entity. `out` appears
    whole or not at all, mode 0600. Under the key `millpond` its schema has JSON, see `provenance`.
    about: goes there, too. The others, and what is raised, as of `training_set`.
    """
    folder = out.absolute().parent
    if not folder.is_dir():
        raise BadRequest(f"training set: `{out}`: there is no folder `{folder}`; make it first")
    room = room or Room(folder=folder)
    making = _Making(model, as_of, knowledge, clock, incomplete, workers or Threads(), room, progress)
    with LabelFile(labels) as given:
        making.labels.check_columns(given.schema.names)
        file = TrainingSetFile(making.plan, given.schema, out, room)
        for batch in given.batches(making.labels.columns):
            making.labels.add(batch)
            progress("labels", making.labels.runs.rows, given.rows)
        for rows, part in making.features(events):
            file.add(rows, part)
        made = {**(about or {}), **making.provenance()}
        for done in file.write(given, made):
            progress("file", done, given.rows)
    return made


@dataclass
class _Making:
    """One training set that is being made: first the labels, then the features."""

    model: Model | Sequence[Feature]
    as_of: str
    knowledge: Knowledge
    clock: ClockKind
    incomplete: bool
    workers: Workers
    room: Room
    progress: Progress

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("knowledge", self.knowledge, get_args(Knowledge)),
            ("clock", self.clock, get_args(ClockKind)),
        ):
            if value not in allowed:
                shown = " or ".join(f"`{one}`" for one in allowed)
                raise BadRequest(f"training set: `{name}` is {value!r:.80}; allowed is {shown}")
        features = self.model.features if isinstance(self.model, Model) else self.model
        self.layout = compile_layout([], [f.view for f in features])
        self.plan = ReadPlan(self.layout, features, "training set")
        self.labels = Labels(self.plan.key_fields, self.as_of, self.room)
        #: By source, when the arrival stamps begin that there are events of; None is the beginning.
        self.since: dict[str, int | None] = dict.fromkeys(self.layout.sources)
        self.events: EventsBySource | None = None
        #: Labels of which nothing is true yet.
        self.ahead: LaterLabels | None = None

    def features(self, events: EventsOf) -> Iterator[tuple[Ints, FeatureRows]]:
        """Yield the features of labels and their places, as of `join`."""
        newest_ms = self.labels.newest_ms
        if newest_ms is None:
            return
        self.events = kept = EventsBySource(self.layout, self.knowledge, newest_ms, self.room)

        def told(n: int) -> None:
            self.progress("events", n, None)

        if isinstance(events, Past):
            DeclaredSources(events.directory).check_readable(self.layout.sources.values())
            self._check_since(events)
            read_past(events, kept, self.clock, told)
            self._check_since(events)  # retention goes on meanwhile
        else:
            read_tables(events, kept, told)
        now_ms = kept.newest_ms if self.clock == "event" else time.time_ns() // 1_000_000
        self.ahead = None if now_ms is None else self.labels.later_than(now_ms)
        total, done = self.labels.runs.rows + sum(runs.rows for runs in kept.runs), 0

        def joined(n: int) -> None:
            nonlocal done
            done += n
            self.progress("features", done, total)

        yield from join(self.layout, self.plan, self.labels, kept, workers=self.workers, room=self.room, told=joined)

    def provenance(self) -> dict[str, Any]:
        n = dict.fromkeys(self.layout.sources, 0) if self.events is None else self.events.events
        return provenance(
            self.model, self.plan, self.knowledge, self.as_of, self.labels.runs.rows, n, self.since, self.ahead
        )

    def _check_since(self, past: Past) -> None:
        """Refuse labels one of whose windows reaches back to what arrived before there are events of."""
        self.since = {name: past.since_ms(name) for name in self.layout.sources}
        if self.incomplete or self.labels.oldest is None:
            return
        (oldest_ms, row), first = self.labels.oldest, None
        for feature in self.plan.kept:
            since_ms = self.since[feature.view.source.name]
            back_ms = feature.reach_ms or feature.kept.ttl_ms or 0  # what has neither begins there
            if since_ms is not None and (first is None or since_ms + back_ms > first[0]):
                first = since_ms + back_ms, since_ms, back_ms, feature
        if first is not None and oldest_ms < first[0]:
            complete_ms, since_ms, back_ms, feature = first
            raise BadRequest(
                f"training set: label as of {time_text(oldest_ms)}, but events of `{feature.view.source.name}` are "
                f"kept since {time_text(since_ms)} only, and `{feature.full_name}` sees what arrived {back_ms} ms "
                f"before; leave labels before {time_text(complete_ms)} out, or take them as they are (`incomplete`)",
                path=f"$[{row}].{self.as_of}",
            )
