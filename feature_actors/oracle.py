"""The oracle: every feature recomputed from the list of raw events, slowly and obviously.

It judges the engine, so it shares no code with it; of the project it knows only the declarations and
the ladder of tile widths. An event is a mapping of the source's fields (as decoded: defaults filled
in, null is `None`, times are int milliseconds or `datetime`) and may carry `arrival_ms`, without
which it arrived when it happened. Events stand in the order of the log.

    log = distinct(purchases, events)
    features(user_spend, log, key=(42,), as_of_ms=1_700_000_000_000)    # {"orders_30d": 3.0, ...}

Not held to be quick: a call looks at every event that it is given. Give it those of one entity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.source import Source
from millpond.feature_actors.view import FeatureView
from millpond.feature_actors.windows import LADDER_MS

__all__ = ["agrees", "distinct", "features", "known", "live_as_of_ms", "seen_by"]

Event = Mapping[str, Any]
#: Time and value (None for null) of the events that a feature sees, in the order of the log.
Seen = Sequence[tuple[int, float | None]]


def features(view: FeatureView, events: Iterable[Event], key: tuple[Any, ...], as_of_ms: int) -> dict[str, float]:
    """Compute all features of one entity of a view as of a time that is not before its events."""
    mine = _of_key(view, events, key)
    return {
        name: _VALUE[type(aggregation).__name__](seen_by(view, name, mine, key, as_of_ms), as_of_ms)
        for name, aggregation in view.features.items()
    }


def seen_by(view: FeatureView, name: str, events: Iterable[Event], key: tuple[Any, ...], as_of_ms: int) -> Seen:
    """Return the time and value of the events that feature `name` of an entity sees as of a time."""
    aggregation = view.features[name]
    mine = _where(aggregation.where, view.source, _where(view.where, view.source, _of_key(view, events, key)))
    # A window sees [start of the tile that as_of - window falls into, as_of].
    width = max((w for w in LADDER_MS if 60 * w <= (aggregation.window_ms or 0)), default=1)
    seen: list[Event] = []
    for event in mine:
        time, arrival = _time(view.source, event), _arrival(view.source, event)
        if aggregation.window_ms is not None:
            too_late = time // width < (arrival - aggregation.window_ms) // width
            if not too_late and (as_of_ms - aggregation.window_ms) // width * width <= time <= as_of_ms:
                seen.append(event)
        elif aggregation.ttl_ms is None:
            seen.append(event)
        elif time >= arrival - aggregation.ttl_ms:  # else it is too late
            if all(_time(view.source, e) < arrival - aggregation.ttl_ms for e in seen):
                seen = []  # forgotten before this one came
            seen.append(event)
    if aggregation.ttl_ms is not None and all(_time(view.source, e) < as_of_ms - aggregation.ttl_ms for e in seen):
        seen = []
    field = aggregation.field
    return [(_time(view.source, e), None if field is None or e.get(field) is None else float(e[field])) for e in seen]


def known(view: FeatureView, events: Iterable[Event], key: tuple[Any, ...], as_of_ms: int) -> bool:
    """Return whether the entity has an event of the view inside the longest window or ttl."""
    starts: list[float] = []
    for aggregation in view.features.values():
        if aggregation.window_ms is not None:
            width = max(w for w in LADDER_MS if 60 * w <= aggregation.window_ms)
            starts.append((as_of_ms - aggregation.window_ms) // width * width)
        else:
            starts.append(-math.inf if aggregation.ttl_ms is None else as_of_ms - aggregation.ttl_ms)
    mine = _where(view.where, view.source, _of_key(view, events, key))
    return any(_time(view.source, e) >= min(starts) for e in mine)


# -- one function per aggregation: the value of what a feature sees


def _values(seen: Seen) -> list[float]:
    return [value for _, value in seen if value is not None]


def _count(seen: Seen, as_of_ms: int) -> float:
    return float(len(seen))


def _sum(seen: Seen, as_of_ms: int) -> float:
    return math.fsum(_values(seen))


def _mean(seen: Seen, as_of_ms: int) -> float:
    return math.fsum(_values(seen)) / len(_values(seen)) if _values(seen) else math.nan


def _min(seen: Seen, as_of_ms: int) -> float:
    return min(_values(seen), default=math.nan)


def _max(seen: Seen, as_of_ms: int) -> float:
    return max(_values(seen), default=math.nan)


def _last(seen: Seen, as_of_ms: int) -> float:
    newest = max((time for time, value in seen if value is not None), default=None)
    return next((v for t, v in reversed(seen) if t == newest and v is not None), math.nan)


def _seconds_since(seen: Seen, as_of_ms: int) -> float:
    return (as_of_ms - max(time for time, _ in seen)) / 1000 if seen else math.nan


_VALUE: dict[str, Callable[[Seen, int], float]] = {
    "Count": _count,
    "Sum": _sum,
    "Mean": _mean,
    "Min": _min,
    "Max": _max,
    "Last": _last,
    "SecondsSince": _seconds_since,
}


# -- the log


def distinct(source: Source, events: Iterable[Event], horizon_ms: int = 86_400_000) -> list[Event]:
    """Return the events without duplicates and conflicts: ids received within the horizon.

    An event may carry `received_ms`, without which it was received when it arrived.
    """
    if source.event_id is None:
        return list(events)
    seen: dict[Any, int] = {}
    log: list[Event] = []
    newest = -math.inf
    for event in events:
        received, event_id = event.get("received_ms", _arrival(source, event)), event[source.event_id]
        newest = max(newest, received)
        if event_id not in seen or seen[event_id] < newest - horizon_ms:
            seen[event_id] = received
            log.append(event)
    return log


def live_as_of_ms(keys: Iterable[tuple[FeatureView, tuple[Any, ...]]], events: Sequence[Event], now_ms: int) -> int:
    """Return the as-of of a live read: the clock, or the newest event of the entities if that is later."""
    newest = (_time(view.source, e) for view, key in keys for e in _of_key(view, events, key))
    return max(now_ms, max(newest, default=now_ms))


# -- the judgement


def agrees(
    view: FeatureView, name: str, events: Iterable[Event], key: tuple[Any, ...], as_of_ms: int, got: float
) -> bool:
    """Return whether the engine's value is right: equal, but Sum and Mean to 1e-12 of their terms' size."""
    seen = seen_by(view, name, events, key, as_of_ms)
    kind = type(view.features[name]).__name__
    want = _VALUE[kind](seen, as_of_ms)
    if math.isnan(want) or math.isnan(got):
        return math.isnan(want) and math.isnan(got)
    size = math.fsum(map(abs, _values(seen))) / (max(len(_values(seen)), 1) if kind == "Mean" else 1)
    return abs(want - got) <= 1e-12 * size if kind in ("Sum", "Mean") else want == got


# -- reading an event


def _ms(value: int | datetime) -> int:
    return value if isinstance(value, int) else (value - datetime.fromtimestamp(0, UTC)) // timedelta(milliseconds=1)


def _time(source: Source, event: Event) -> int:
    return _ms(event[source.event_time])


def _arrival(source: Source, event: Event) -> int:
    return _ms(event.get("arrival_ms", event[source.event_time]))


def _of_key(view: FeatureView, events: Iterable[Event], key: tuple[Any, ...]) -> list[Event]:
    return [e for e in events if tuple(e.get(field) for field in view.key) == key]


def _where(where: pc.Expression | None, source: Source, events: Sequence[Event]) -> Sequence[Event]:
    if where is None or not events:
        return events
    table = pa.Table.from_pylist([{f: e.get(f) for f in source.fields} for e in events], source.schema)
    rows = table.append_column("row of the oracle", pa.array(range(len(events)))).filter(where)
    return [events[i] for i in rows["row of the oracle"].to_pylist()]
