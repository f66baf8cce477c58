"""Tables that are behind: those that were added while a shard ran, until they are where the others are.

    passed by   commits pass by the table, and it is given what the others have had already, out of history and log
    queueing    events are prepared for it, too, and commits of that queue; it is given the log up to where that began
    caught up   the queue is applied, oldest first; when nothing queues any more it is as any other table

One that fails gives up its rows, and is passed by again. Nobody reads a table that is behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.layout import Table
from millpond.feature_actors.prepared import Queued
from millpond.feature_actors.tiles.image import keys_of
from millpond.feature_actors.tiles.read import NO_CLOCK
from millpond.feature_actors.tiles.store import TileStore

__all__ = ["Behind"]

Ints = npt.NDArray[np.int64]


class Behind:
    """Of one shard. store: its tiles."""

    def __init__(self, store: TileStore) -> None:
        self._store = store
        self._tables: dict[int, Table] = {}
        #: By number of the table, what is to be applied after all that was before it; none while it is passed by.
        self._queues: dict[int, deque[Queued]] = {}

    def __contains__(self, table: Table) -> bool:
        return table.number in self._tables

    @property
    def tables(self) -> list[Table]:
        return list(self._tables.values())

    def add(self, table: Table) -> None:
        """Pass by a table, which is empty."""
        self._tables[table.number] = table
        self._queues.pop(table.number, None)
        self._store.hear_for(table, NO_CLOCK)

    def remove(self, table: Table) -> None:
        """Have a table that is not behind any more."""
        del self._tables[table.number]
        self._queues.pop(table.number, None)
        self._store.hear_for(table, None)

    def hear_for(self, table: Table, arrivals: Ints) -> None:
        """Have time go on for a table, which is given events with these stamps next."""
        assert table in self
        if len(arrivals):
            self._store.hear_for(table, int(arrivals.max()))

    # -- what is committed meanwhile

    def passes_by(self, table: Table) -> bool:
        """Return whether a table takes nothing of what is committed, now or later."""
        return table in self and table.number not in self._queues

    def has_put_off(self, one: Queued) -> bool:
        """Return whether something of a commit is for a table that is behind: then it queues, or is passed over."""
        number = one.route.table.number
        if (queue := self._queues.get(number)) is not None:
            queue.append(one)
        return number in self._tables

    def queue_for(self, table: Table) -> None:
        """Have commits queue for a table from now on."""
        self._queues[table.number] = deque()

    def catch_up_queued(self, table: Table, apply: Callable[[Queued], None]) -> bool:
        """Apply the oldest that queues; if nothing does, have the table not behind any more, and return True. Raises
        `MemoryFull`."""
        if not (queue := self._queues[table.number]):
            self.remove(table)
            return True
        oldest = queue.popleft()
        self.hear_for(table, oldest.arrivals)
        words = self._store.promise_room([(table, oldest.route.slots[oldest.rows])])
        apply(oldest)
        self._store.keep_promise(words)
        return False

    def begin_anew(self, table: Table) -> Iterator[None]:
        """Pass by a table again, at once, and remove its rows step by step."""
        self._store.hear_for(table, None)  # else what is old when it is begun anew would be out of its sight
        self.add(table)
        return self._emptied(table)

    def _emptied(self, table: Table) -> Iterator[None]:
        for _, _, image in self._store.image(table):
            self._store.remove(table, keys_of(image))
            yield
