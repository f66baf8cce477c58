"""The judge: what the engine answers about the entities of a view, held against what the oracle recomputes.

It looks through the log of the view once, so that judging an entity costs no more than the events of that entity. Like
the oracle it knows declarations and raw events, and of the engine only its answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from millpond.feature_actors import oracle
from millpond.feature_actors.aggregations import Aggregation
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.view import FeatureView

__all__ = ["Difference", "Judge"]

Key = tuple[Any, ...]
Event = Mapping[str, Any]

_SHOWN_EVENTS_MAX = 10


@dataclass(frozen=True)
class Difference:
    """A value that is not what the oracle says. feature: None if it is whether the view knows the entity.

    events: those that the feature sees, in the order of the log.
    """

    view: str
    feature: str | None
    key: Mapping[str, Any]
    as_of_ms: int
    got: Any
    want: Any
    events: Sequence[Event]

    def __str__(self) -> str:
        entity = ", ".join(f"{name}={value!r}" for name, value in self.key.items())
        as_of = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=self.as_of_ms)
        subject = f"`{self.view}.{self.feature}`" if self.feature else f"`{self.view}` knows the entity"
        lines = [
            f"{subject} of {entity} as of {as_of.isoformat(timespec='milliseconds')}: got {self.got!r}, the oracle "
            f"says {self.want!r}, of {len(self.events)} events",
            *(f"    {_shown(event)}" for event in self.events[:_SHOWN_EVENTS_MAX]),
        ]
        if len(self.events) > _SHOWN_EVENTS_MAX:
            lines.append(f"    and {len(self.events) - _SHOWN_EVENTS_MAX} more")
        return "\n".join(lines)


def _shown(event: Event) -> str:
    values = {name: v.isoformat() if isinstance(v, datetime) else v for name, v in event.items()}
    return repr({name: value for name, value in values.items() if name != "received_ms"})


class Judge:
    """Judge answers about a view by `events`, mappings as of `oracle`, in the order in which they were sent."""

    def __init__(self, view: FeatureView, events: Iterable[Event]) -> None:
        self.view = view
        self.log = oracle.distinct(view.source, events)
        self._all = self._by_key(self.log)
        #: By feature, None for the view itself: the events that satisfy its conditions.
        self._mine: dict[str | None, dict[Key, list[Event]]] = {
            name: self._by_key(oracle.matching(view, name, self.log))
            for name in (None, *(name for name, a in view.features.items() if isinstance(a, Aggregation)))
        }

    def _by_key(self, events: Iterable[Event]) -> dict[Key, list[Event]]:
        of_keys: dict[Key, list[Event]] = {}
        for event in events:
            of_keys.setdefault(tuple(event.get(field) for field in self.view.key), []).append(event)
        return of_keys

    def live_as_of(self, key: Key, now_ms: int) -> int:
        """Return the as-of of a live read of an entity."""
        return oracle.live_as_of_ms([(self.view, key)], self._all.get(key, []), now_ms)

    def wrong_times(self, keys: Sequence[Key], rows: FeatureRows, now_ms: int) -> Iterator[Difference]:
        """Yield the entities of this view alone that were read live as of another time than the oracle says."""
        for key, as_of in zip(keys, rows.as_of.tolist(), strict=True):
            if as_of != (want := self.live_as_of(key, now_ms)):
                yield self._difference("as_of", key, as_of, as_of, want, self._all.get(key, []))

    def differences(self, keys: Sequence[Key], plan: ReadPlan, rows: FeatureRows) -> Iterator[Difference]:
        """Yield what is wrong of what was read of some entities: of the features of the plan that are of this view.

        A derived feature is judged where all that it is computed from was read beside it, and by that.
        """
        view, named = self.view, plan.named_values(rows)
        for key, values, as_of, unknown in zip(keys, named, rows.as_of.tolist(), rows.unknown, strict=True):
            got = {full.partition(".")[2]: v for full, v in values.items() if full.startswith(f"{view.name}.")}
            for name, value in got.items():
                aggregation, seen = view.features[name], list[Event]()
                if isinstance(aggregation, Aggregation):
                    seen = oracle.sees(aggregation, view.source, self._mine[name].get(key, []), as_of)
                elif not set(aggregation.of) <= got.keys():
                    continue
                if not oracle.right(view, name, seen, as_of, value, got):
                    want = oracle.features(view, self.log, key, as_of)[name]
                    yield self._difference(name, key, as_of, value, want, seen)
            mine = self._mine[None].get(key, [])
            known, knows = view.name not in unknown, oracle.knows(view, mine, as_of)
            if known != knows:
                yield self._difference(None, key, as_of, known, knows, mine)

    def _difference(
        self, name: str | None, key: Key, as_of: int, got: Any, want: Any, seen: Sequence[Event]
    ) -> Difference:
        entity = dict(zip(self.view.key, key, strict=True))
        return Difference(self.view.name, name, entity, as_of, got, want, seen or self._all.get(key, []))
