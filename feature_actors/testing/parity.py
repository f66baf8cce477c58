"""Parity: a team's own views in a cluster, against the oracle that recomputes every feature from the raw events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.aggregations import Aggregation
from millpond.feature_actors.decode import TIME_MAX_MS
from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.judge import Difference, Judge
from millpond.feature_actors.source import Source
from millpond.feature_actors.testing.cluster import Event, Events, TestCluster, several, time_ms
from millpond.feature_actors.view import FeatureView

__all__ = ["assert_parity"]

Ints = npt.NDArray[np.int64]

_ARRIVAL = "arrival_ms"
_SHOWN_MAX = 10
#: So many events tell at which later times to read.
_TELLING_MAX = 500


def assert_parity(
    views: FeatureView | Iterable[FeatureView],
    events: Events,
    *,
    times: int = 4,
    entities_max: int = 100,
    shards: int = 1,
) -> int:
    """Assert that a cluster gives what the oracle recomputes from the raw events; return how many values were compared.

    events: of the source of the views, as `send` takes them. They are sent in the order in which they arrive: at their
    `arrival_ms`, if they carry that besides their fields, else when they happen. times: after so many parts of them
    features are read, as of then and as of later times, when windows have passed over events. entities_max: so many
    entities are read, and one that has no events.

    Raises `AssertionError` that says which feature of which entity differs, with the events that it is made of; what
    the cluster refuses is raised as it is.
    """
    if times < 1 or entities_max < 1:
        raise DeclarationError(f"assert_parity: times and entities_max are 1 or more, got {times} and {entities_max}")
    judged = several(views, (FeatureView,))
    sources = {view.source.name for view in judged}
    if len(sources) != 1:
        raise DeclarationError(f"assert_parity: takes views of one source at a time, got those of {sorted(sources)}")
    cluster = TestCluster(judged, shards=shards)
    (name,) = sources
    arrived = _Arrivals.of(cluster, name, events)
    compared, differences = 0, list[Difference]()
    for end in sorted({arrived.n * part // times for part in range(1, times + 1)} - {0}):
        log = arrived.send_until(end)
        for view in judged:
            judge, plan = Judge(view, log), cluster._plan(view)
            keys = _entities(view, log, entities_max)
            for as_of in (None, *_telling_times(view, log, cluster._clock.ms or 0)):
                columns = plan.key_columns([dict(zip(view.key, key, strict=True)) for key in keys], batch=True)
                rows = cluster._read_ms(plan, columns, len(keys), as_of)
                if as_of is None:
                    differences += judge.wrong_times(keys, rows, cluster._clock.ms or 0)
                differences += judge.differences(keys, plan, rows)
                compared += len(keys) * (len(view.features) + 1)
    cluster.check()
    if differences:
        shown = "\n".join(map(str, differences[:_SHOWN_MAX]))
        raise AssertionError(f"{len(differences)} of {compared} values are not what the oracle says:\n{shown}")
    return compared


class _Arrivals:
    """Events on their way to a cluster, in the order in which they arrive: `batch` and `arrivals` int64 [n]."""

    def __init__(self, cluster: TestCluster, source: Source, batch: pa.RecordBatch, arrivals: Ints) -> None:
        order = np.argsort(arrivals, kind="stable")
        self.n = len(order)
        self._cluster, self._source = cluster, source
        self._batch, self._arrivals = batch.take(pa.array(order)), arrivals[order]
        self._log: list[Event] = []

    @classmethod
    def of(cls, cluster: TestCluster, name: str, events: Events) -> _Arrivals:
        source = cluster._source(name)
        if isinstance(events, pa.Table | pa.RecordBatch):
            names = [n for n in events.schema.names if n != _ARRIVAL]
            given = events[_ARRIVAL].to_pylist() if _ARRIVAL in events.schema.names else [None] * events.num_rows
            batch = cluster._decoded(source, events.select(names))
        else:
            rows = [dict(one) for one in ([events] if isinstance(events, Mapping) else events)]
            given = [row.pop(_ARRIVAL, None) for row in rows]
            batch = cluster._decoded(source, rows)
        times = source.times_ms(batch).tolist()
        stamps = [time if one is None else time_ms(one, _ARRIVAL) for one, time in zip(given, times, strict=True)]
        return cls(cluster, source, batch, np.array(stamps, np.int64))

    def send_until(self, end: int) -> list[Event]:
        """Send those before the `end`th that have not been; return the log by then, as the oracle takes it."""
        start = len(self._log)
        part, arrivals = self._batch.slice(start, end - start), self._arrivals[start:end]
        self._cluster._ingest(part, self._source, arrivals=arrivals)
        for event, arrival in zip(part.to_pylist(), arrivals.tolist(), strict=True):
            self._log.append({**event, _ARRIVAL: arrival, "received_ms": self._cluster._clock.ms})
        return self._log


def _entities(view: FeatureView, log: Sequence[Event], most: int) -> list[tuple[Any, ...]]:
    """Return keys of entities that have events, spread over all of them, and one that nobody has."""
    keys = [key for key in dict.fromkeys(tuple(e[field] for field in view.key) for e in log) if None not in key]
    chosen = keys if len(keys) <= most else [keys[i * len(keys) // most] for i in range(most)]
    field = view.key[0]
    taken = {key[0] for key in keys}
    fresh: Any = "nobody" if view.source.fields[field].type == "string" else len(taken)
    while fresh in taken:
        fresh += "-" if isinstance(fresh, str) else 1
    return [*chosen, (fresh, *((0, "")[view.source.fields[f].type == "string"] for f in view.key[1:]))]


def _telling_times(view: FeatureView, log: Sequence[Event], now_ms: int) -> list[int]:
    """Return a few times later than all events: when windows or ttls are about to leave some behind, or just have."""
    times_ms = [time_ms(e[view.source.event_time], "event") for e in log]
    newest = max([now_ms, *times_ms])
    some = times_ms[:: len(times_ms) // _TELLING_MAX + 1]
    edges: set[int] = set()
    for aggregation in view.features.values():
        if isinstance(aggregation, Aggregation) and (length := aggregation.window_ms or aggregation.ttl_ms):
            edges |= {t + length + more for t in some for more in (0, 1, length // aggregation.tiles_min)}
    later = sorted(edge for edge in edges if newest < edge <= TIME_MAX_MS)
    return [later[i * (len(later) - 1) // 2] for i in range(3)] if len(later) > 2 else later
