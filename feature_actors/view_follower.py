"""Views that come while a shard runs: it learns of them, has tables for them, and backfills those that are not whole.

Views come through a port; see `backfill` and `spread` for what becomes of them, and `filling` for the steps of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from millpond.feature_actors.backfill import AddedView, forget_whole, whole_tables
from millpond.feature_actors.calls import Calls
from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.filling import AddedTable, Filling
from millpond.feature_actors.layout import Layout, identity_of
from millpond.feature_actors.past import Past
from millpond.feature_actors.shard import Prepared
from millpond.feature_actors.shard_past import NoPast
from millpond.feature_actors.tiles.memory import MemoryFull
from millpond.feature_actors.wire import QuestionDecoder
from millpond.feature_actors.workshop import Workshop

__all__ = ["ViewFollower"]

#: How often it is asked whether views have come.
_VIEWS_S = 0.2
#: What fails is tried again.
_AGAIN_S = 5.0
#: How long it is waited for another shard to say up to where events are to be brought to a key.
_CUT_S_MAX = 60.0

logger = logging.getLogger("millpond.shard")


class ViewFollower:
    """Follow the views of a shard's workshop. layout: of what the cluster started with. peers: the other shards."""

    def __init__(self, workshop: Workshop, layout: Layout, peers: Callable[[], Calls]) -> None:
        self._at, self._peers = workshop, peers
        self._layout_at_start = layout
        self.layout, self.decoder = layout, QuestionDecoder(layout)
        #: By the identities of their views.
        self.added: dict[str, AddedTable] = {}
        #: Keys up to this number are known by all who send events, see `spread`; from which offsets on each has been.
        self.keys_required = 0
        self.cuts: dict[int, int] = {}
        self._generation = -1
        #: Why it cannot take in views that came, "" if it can.
        self.failure = ""
        self.backfilling: asyncio.Task[None] | None = None

    def add_views(self) -> None:
        """Have tables for all views that came while a cluster ran, before anything is recovered. What has been whole is
        to be whole again; without a log, nothing was before."""
        if (port := self._at.spec.added_views) is None:
            return
        self._generation, views = port.generation(), port.added()
        folder = self._at.folder
        forget_whole(folder, {identity_of(one.view) for one in views})
        whole = whole_tables(folder)
        failed = {identity_of(one.view) for one in views if one.state == "failed"}
        layout = self._layout_at_start.extended([one.view for one in views], failed)
        self.added = {}
        self.keys_required = _required(layout, views)
        for table, one in zip(self._at.shard.extend(layout), views, strict=True):
            self.added[table.added] = AddedTable(table, one.state)
            was_whole = one.state == "live" or table.added in whole or self._at.spec.durability == "none"
            if was_whole and one.state != "failed":
                self._at.shard.keep_up(table)
                self.added[table.added].state = "whole"
        self.layout, self.decoder = layout, QuestionDecoder(layout)

    async def follow(self) -> None:
        """Take in views that come, and backfill those that are not whole, for ever."""
        if (port := self._at.spec.added_views) is None:
            return
        while True:
            try:
                generation = await self._at.in_thread("views", port.generation)
                if generation != self._generation and not self._at.refuses:
                    views = await self._at.in_thread("views", port.added)
                    new = views[len(self.added) :]
                    layout = self.layout.extended([one.view for one in new])
                    for table, one in zip(self._at.shard.extend(layout), new, strict=True):
                        self.added[table.added] = AddedTable(table, one.state)
                    self.layout, self.decoder = layout, QuestionDecoder(layout)
                    await self._follow_states(views)
                    self._generation, self.failure = generation, ""
                waiting = [
                    one
                    for one in self.added.values()
                    if one.state == "backfilling" and one.table.key_number <= self.keys_required
                ]
                if waiting and not self._at.refuses:
                    self.backfilling = asyncio.ensure_future(self._backfill(waiting))
                    await asyncio.wait([self.backfilling])
            except Exception as error:  # a registry that cannot be read now
                logger.exception("shard %d cannot follow the views", self._at.number)
                self.failure = error.message if isinstance(error, MillpondError) else repr(error)
                await asyncio.sleep(_AGAIN_S)
            await asyncio.sleep(_VIEWS_S)

    async def _follow_states(self, views: Sequence[AddedView]) -> None:
        """Take down who knows of keys that came by now."""
        for mine, one in zip(self.added.values(), views, strict=True):
            if mine.state in ("added", "routing"):
                mine.state = one.state
        self.keys_required = max(self.keys_required, _required(self.layout, views))
        if new := range(len(self.cuts) + 1, self.keys_required + 1):
            await self._at.written(Prepared(0))  # what was taken of others gets into the log
            self.cuts |= dict.fromkeys(new, self._at.shard.next_offset)

    async def cut(self, key_number: int) -> int:
        """Return an offset: in this shard's log all from there on is of who knows a key. Raises `Unavailable`."""
        self._at.check()
        if key_number not in self.cuts:
            raise Unavailable(
                f"shard {self._at.number} of {self._at.of} has not heard yet that all know of key {key_number}",
                code="key_unknown", retry_after_ms=200,
            )  # fmt: skip
        return self.cuts[key_number]

    async def _cut_of(self, home: int, key_number: int) -> int:
        until_s = time.monotonic() + _CUT_S_MAX
        while True:
            try:
                if home == self._at.number:
                    return await self.cut(key_number)
                return int(await self._peers().call(home, "cut", key_number))
            except Unavailable as error:  # it will have heard, or is being restarted
                if time.monotonic() > until_s:
                    raise Unavailable(
                        f"shard {home} of {self._at.of} has not said within {_CUT_S_MAX:g} s up to where events are to "
                        f"be brought to key {key_number}: {error.message}"
                    ) from None
                await asyncio.sleep(_VIEWS_S)

    async def _backfill(self, added: Sequence[AddedTable]) -> None:
        """Bring tables to where the others are. What cannot be for now is said, and tried again after a while; what
        cannot be at all is said to have failed, and events pass it by."""
        tables = [one.table for one in added]
        try:
            async with self._at.housekeeping:
                try:
                    await self._fill(added)
                except Exception:
                    for table in tables:
                        for _ in self._at.shard.give_up(table):
                            await asyncio.sleep(0)
                    raise
        except Exception as error:
            why = error.message if isinstance(error, MillpondError) else f"{type(error).__name__}: {error}"
            logger.warning("shard %d cannot backfill: %s", self._at.number, why, exc_info=error)
            # A disk that is full, a history or a shard that is away; with tiles it would fill the memory once more.
            again = isinstance(error, Unavailable) and not isinstance(error, NoPast | MemoryFull)
            for one in added:
                one.why = f"{why}; it is tried again" if again else why
                one.state = one.state if again else "failed"
            if again:
                await asyncio.sleep(_AGAIN_S)

    async def _fill(self, added: Sequence[AddedTable]) -> None:
        at, begun = self._at, time.monotonic()
        assert at.durable is not None
        past = Past(Path(at.spec.data_dir), at.spec.history_uri) if at.spec.durability != "none" else None
        await at.take(Filling(at.durable, past, at.of, at.brought, added).steps(), self._cut_of)
        at.snapshot_wanted = True
        logger.info("shard %d: %d views in %.1f s", at.number, len(added), time.monotonic() - begun)


def _required(layout: Layout, views: Sequence[AddedView]) -> int:
    """Return up to which number all who send events know the keys that came: the first view of a key says it."""
    states = {identity_of(one.view): one.state for one in views}
    known = ("backfilling", "live", "failed")
    return max(
        (t.key_number for t in layout.tables if t.added and t.routed and states.get(t.added) in known), default=0
    )
