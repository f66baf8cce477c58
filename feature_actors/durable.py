"""A shard with its log: what is acknowledged is on disk first, and is there again after whatever happened.

Pure: no Ray, no threads. The actor gathers what waits, appends it at once, and commits it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from millpond.feature_actors.layout import Layout
from millpond.feature_actors.log.log import Log
from millpond.feature_actors.log.record import Record, SchemaRecord
from millpond.feature_actors.shard import Prepared, Shard

__all__ = ["DurableShard"]

#: Called with the offset that was replayed and the one where the log ends.
Progress = Callable[[int, int], None]

_PROGRESS_S = 0.1


class DurableShard:
    """A shard whose `Prepared` goes to a log before it is committed. `recover` comes before all else."""

    def __init__(self, layout: Layout, shard: Shard, log: Log) -> None:
        self.shard = shard
        self.log = log
        self._schemas = {(s.name, s.version): s.schema for s in layout.sources.values()}

    def recover(self, progress: Progress = lambda at, end: None) -> None:
        """Replay the log into the shard, which is empty. Raises `LogDamaged`, `MemoryFull`."""
        told = time.monotonic()
        for offset, record in self.log.read():
            if not isinstance(record, SchemaRecord):
                self.shard.replay(record)
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                progress(offset, self.log.next)
        progress(self.log.next, self.log.next)

    def append(self, prepared: Sequence[Prepared]) -> None:
        """Write what is new of it to the log and sync, in one transaction. Raises `LogFull`: then the shard has
        to undo it, and all that was prepared since, which may have been judged by it."""
        records: list[Record] = [p.record for p in prepared if p.record is not None]
        if records:
            self.log.append(records, self._schemas)
