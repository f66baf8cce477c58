"""The oracle: every feature recomputed from the list of raw events, slowly and obviously.

It judges the engine, so it shares no code with it; of the project it knows only the declarations, the ladder of tile
widths, and of each aggregation its definition in plain Python (`plain`, and `slack`: how far off a value may be). An
event is a mapping of the source's fields (as decoded: defaults filled in, null is `None`, times are int milliseconds or
`datetime`) and may carry `arrival_ms`, without which it arrived when it happened. Events stand in the order of the log.

    log = distinct(purchases, events)
    features(user_spend, log, key=(42,), as_of_ms=1_700_000_000_000)    # {"orders_30d": 3.0, ...}

Not held to be quick: a call looks at every event that it is given. Give it those of one entity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.aggregations import Aggregation, Derived, Input
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import FeatureView
from millpond.feature_actors.windows import LADDER_MS

__all__ = [
    "agrees", "distinct", "features", "known", "knows", "live_as_of_ms", "matching", "past_ms", "right", "seen_by",
    "sees",
]  # fmt: skip

Event = Mapping[str, Any]

_HOUR_MS = 3_600_000


# -- the core: which events a feature sees


def sees(aggregation: Aggregation, source: Source, mine: Iterable[Event], as_of_ms: int) -> list[Event]:
    """Return the events that a feature sees of `mine`: an entity's that satisfy its conditions."""
    seen: list[Event] = []
    for event in mine:
        time, arrival = _time(source, event), _arrival(source, event)
        if aggregation.window_ms is not None:
            width = _width_ms(aggregation)
            kept = aggregation.window_ms + (min(aggregation.window_ms, _HOUR_MS) if aggregation.exact else 0)
            too_late = time // width < (arrival - kept) // width
            if not too_late and _start(aggregation, as_of_ms) <= time <= as_of_ms:
                seen.append(event)
        elif aggregation.ttl_ms is None:
            seen.append(event)
        elif time >= arrival - aggregation.ttl_ms:  # else it is too late
            if all(_time(source, e) < arrival - aggregation.ttl_ms for e in seen):
                seen = []  # forgotten before this one came
            seen.append(event)
    if aggregation.ttl_ms is not None and all(_time(source, e) < as_of_ms - aggregation.ttl_ms for e in seen):
        seen = []
    return seen


def knows(view: FeatureView, mine: Iterable[Event], as_of_ms: int) -> bool:
    """Return whether a view knows an entity by `mine`, its events that satisfy the view's condition."""
    kept = [a for a in view.features.values() if isinstance(a, Aggregation)]
    times = [_time(view.source, e) for e in mine]
    if max(times, default=as_of_ms) > as_of_ms:  # in the past only what is exact can tell
        kept = [a for a in kept if a.exact]
    longest = max((a.window_ms or 0 for a in kept if not a.exact), default=0)
    kept = [a for a in kept if a.window_ms is None or a.exact or a.window_ms == longest]
    return any(_start(a, as_of_ms) <= time <= as_of_ms for a in kept for time in times)


def _start(aggregation: Aggregation, as_of_ms: int) -> float:
    """Return the first millisecond that an aggregation looks back to."""
    if aggregation.window_ms is None:
        return -math.inf if aggregation.ttl_ms is None else as_of_ms - aggregation.ttl_ms
    start, width = as_of_ms - aggregation.window_ms, _width_ms(aggregation)
    return start + 1 if aggregation.exact else start // width * width


def _width_ms(aggregation: Aggregation) -> int:
    return max(width for width in LADDER_MS if aggregation.tiles_min * width <= (aggregation.window_ms or 0))


# -- questions


def features(view: FeatureView, events: Iterable[Event], key: tuple[Any, ...], as_of_ms: int) -> dict[str, Any]:
    """Compute all features of one entity of a view as of a time: numbers and strings, NaN where empty."""
    mine, values = _of_key(view, events, key), dict[str, Any]()
    for name, aggregation in view.features.items():
        if isinstance(aggregation, Derived):
            values[name] = _derived(aggregation, values)
        else:
            values[name] = _value_of(aggregation, seen_by(view, name, mine, key, as_of_ms), as_of_ms)
    return values


def seen_by(
    view: FeatureView, name: str, events: Iterable[Event], key: tuple[Any, ...], as_of_ms: int
) -> list[tuple[int, Any]]:
    """Return the time and value of the events that feature `name`, not a derived one, of an entity sees."""
    mine = matching(view, name, _of_key(view, events, key))
    return _values(view, name, sees(_kept(view, name), view.source, mine, as_of_ms))


def known(view: FeatureView, events: Iterable[Event], key: tuple[Any, ...], as_of_ms: int) -> bool:
    """Return whether the entity has an event of the view inside its longest window or ttl."""
    return knows(view, matching(view, None, _of_key(view, events, key)), as_of_ms)


def past_ms(view: FeatureView, names: Iterable[str]) -> int:
    """Return how long before the live as-of some features of a view may be read together: 0 unless all are exact."""
    past = [0]
    for name in names:
        aggregation = view.features[name]
        if isinstance(aggregation, Derived):
            past.append(past_ms(view, aggregation.of))
        else:
            past.append(min(aggregation.window_ms or 0, _HOUR_MS) if aggregation.exact else 0)
    return min(past[1:], default=0)


def matching(view: FeatureView, name: str | None, events: Sequence[Event]) -> Sequence[Event]:
    """Return the events that satisfy the conditions of a view and, unless `name` is None, of its feature."""
    mine = _where(view.where, view.source, events)
    return mine if name is None else _where(_kept(view, name).where, view.source, mine)


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
    view: FeatureView,
    name: str,
    events: Iterable[Event],
    key: tuple[Any, ...],
    as_of_ms: int,
    got: Any,
    given: Mapping[str, Any] | None = None,
) -> bool:
    """Return whether the engine's value of a feature is right: as far from the definition as that allows.

    given: the engine's values of the view's features by name. A derived feature is right if it is what its function
    makes of these; what is not among them is computed here.
    """
    if isinstance(view.features[name], Derived):
        return right(view, name, [], as_of_ms, got, {**features(view, events, key, as_of_ms), **(given or {})})
    mine = matching(view, name, _of_key(view, events, key))
    return right(view, name, sees(_kept(view, name), view.source, mine, as_of_ms), as_of_ms, got)


def right(
    view: FeatureView,
    name: str,
    seen: Iterable[Event],
    as_of_ms: int,
    got: Any,
    given: Mapping[str, Any] | None = None,
) -> bool:
    """As `agrees`, of the events that the feature `sees`; all that a derived one is computed from is given."""
    aggregation = view.features[name]
    if isinstance(aggregation, Derived):
        assert given is not None
        return _close(_derived(aggregation, given), got, 0.0)
    values = _values(view, name, seen)
    want, slack = _value_of(aggregation, values, as_of_ms), aggregation.slack(values, as_of_ms)
    if slack:
        want, got = _worth(aggregation, want, values), _worth(aggregation, got, values)
    return _close(want, got, slack)


def _worth(aggregation: Aggregation, value: Any, values: Sequence[tuple[int, Any]]) -> Any:
    if isinstance(value, list | tuple):
        return [aggregation.worth(one, values) for one in value]
    return aggregation.worth(value, values)


def _close(want: Any, got: Any, slack: float) -> bool:
    if isinstance(want, list):
        return (
            isinstance(got, list | tuple)
            and len(want) == len(got)
            and all(_close(w, g, slack) for w, g in zip(want, got, strict=True))
        )
    if isinstance(want, str) or isinstance(got, str) or got is None:
        return bool(want == got) or (got is None and want != want)
    both_empty = math.isnan(want) and math.isnan(got)
    return both_empty or slack == math.inf or want == got or abs(want - got) <= slack


def _value_of(aggregation: Aggregation, values: Sequence[tuple[int, Any]], as_of_ms: int) -> Any:
    value = aggregation.plain(values, as_of_ms)
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _derived(derived: Derived, values: Mapping[str, Any]) -> float:
    """Call the function for one row."""
    with np.errstate(all="ignore"):
        return float(derived.function(*(np.array([values[name]], np.float64) for name in derived.of))[0])


# -- reading an event


def _kept(view: FeatureView, name: str) -> Aggregation:
    aggregation = view.features[name]
    assert isinstance(aggregation, Aggregation)
    return aggregation


def _values(view: FeatureView, name: str, seen: Iterable[Event]) -> list[tuple[int, Any]]:
    """Return time and value of events, without nulls; the value is None for an aggregation of events, a tuple for one
    that looks at several things of each."""
    inputs, events = _kept(view, name).inputs, list(seen)
    if not inputs:
        return [(_time(view.source, e), None) for e in events]
    looked_at = zip(*(_looked_at(one, view.source, events) for one in inputs), strict=True)
    return [
        (_time(view.source, e), x if len(x) > 1 else x[0])
        for e, x in zip(events, looked_at, strict=True)
        if None not in x
    ]


def _looked_at(of: Input, source: Source, events: Sequence[Event]) -> list[Any]:
    """Return what an input is of each event, None for null: a number, a string or a bool."""
    if of.condition is not None:
        holds = {id(event) for event in _where(of.condition, source, events)}
        return [id(event) in holds for event in events]
    values = [event.get(of.field) for event in events]
    if of.kind != "value":
        return values
    return [value if value is None or isinstance(value, str) else float(value) for value in values]


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
    try:
        rows = table.append_column("row of the oracle", pa.array(range(len(events)))).filter(where)
    except pa.ArrowException:  # it does not hold where it cannot be computed
        return [] if len(events) == 1 else [e for event in events for e in _where(where, source, [event])]
    return [events[i] for i in rows["row of the oracle"].to_pylist()]
