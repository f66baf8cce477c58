"""Forgetting an entity by a call: what is asked for, and how far the shards are with it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from millpond.deployments.answers import iso
from millpond.feature_actors.calls import CallRead
from millpond.feature_actors.client import FeatureClient
from millpond.feature_actors.errors import BadRequest, NotFound, did_you_mean
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.plan import key_value

__all__ = ["Forgetter", "key_kinds"]


@dataclass
class Forgetter:
    """Forget entities by the keys of a client's views, also of those that came while the cluster runs. wall_clock:
    whether time is the machine's, or the newest arrival stamp."""

    shards: CallRead
    client: FeatureClient
    wall_clock: bool

    async def forget(self, key: Any) -> dict[str, Any]:
        """Begin to forget an entity, or say how far that is; key: a JSON object of one key field.

        What happened up to now is refused from now on. Raises `BadRequest`, `NotFound`, `Unavailable`.
        """
        field, value = self._entity(key)
        await self.shards.forget(field, value, await self._now_ms())
        return await self.status(key)

    async def status(self, key: Any) -> dict[str, Any]:
        """Return how far it is: `state` is `unknown`, `under way` or `done`, and what has been removed."""
        field, value = self._entity(key)
        shards = await self.shards.forgotten(field, value)
        there = [one for one in shards if one is not None]
        done = len(there) == len(shards) and all(one["state"] == "done" for one in there)
        removed: dict[str, int] = {}
        for one in there if done else ():
            for what, n in one["removed"].items():
                removed[what] = removed.get(what, 0) + n
        return {
            "key": {field: value},
            "state": "done" if done else "under way" if there else "unknown",
            "up_to": iso(max(one["at_ms"] for one in there)) if there else None,
            "removed": {"rows": 0, "events": 0, "scores": 0, **removed} if done else None,
            "shards": [{"shard": one["shard"], "state": one["state"]} for one in there],
        }

    async def _now_ms(self) -> int:
        newest = [one.get("newest_arrival_ms") or 0 for one in await self.shards.status()]
        return max([*newest, time.time_ns() // 1_000_000 if self.wall_clock else 0])

    def _entity(self, key: Any) -> tuple[str, int | str]:
        kinds = key_kinds(self.client.layout)
        if not isinstance(key, Mapping) or not key:
            raise BadRequest('forget: expected an object of one key field, such as {"user_id": 42}', path="$")
        for name in key:
            if name not in kinds:
                raise NotFound(f"forget: no view has `{name[:80]}` in its key" + did_you_mean(name[:80], kinds))
        if len(key) > 1:
            names = ", ".join(f"`{name}`" for name in key)
            raise BadRequest(
                f"forget: got {names}; an entity is forgotten by one field, with all rows of composite keys that it is "
                "part of; name one",
                path="$",
            )
        ((name, given),) = key.items()
        value = key_value(given, kinds[name])
        if value is None:
            raise BadRequest(f"forget: expected `{name}` as {kinds[name]}, got {given!r:.80}", path=f"$.{name}")
        return name, value


def key_kinds(layout: Layout) -> dict[str, str]:
    """Return the key fields of all views, and whether they are int64 or string."""
    return {
        name: "string" if table.source.fields[name].type == "string" else "int64"
        for table in layout.tables
        for name in table.key
    }
