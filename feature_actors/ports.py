"""The seam between the client and the shards: an ingest port and a read port.

A call of a port starts at once and returns an awaitable, so that a caller can start one call per
shard and then wait for all of them. Here are the ports to shards in the same process, which are
done before they return; the ports to Ray actors are in `actor`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine, Generator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.events import Events, Receipt
from millpond.feature_actors.log.record import HomeRecord
from millpond.feature_actors.plan import Answer, Question
from millpond.feature_actors.reader import MemoryReader
from millpond.feature_actors.shard import Shard

__all__ = ["IngestPort", "LocalIngest", "LocalRead", "ReadPort", "all_of", "complete", "each_of"]

T = TypeVar("T")
K = TypeVar("K")
Bools = npt.NDArray[np.bool_]


class IngestPort(Protocol):
    """Writes to shards, by their number; see the methods of `Shard` of the same names.

    settled: offsets of the shard's records of which the caller knows that they have been applied everywhere. left:
    those that it will not have taken any more, as a shard has failed; their home is to deliver them.
    """

    def ingest(self, shard: int, events: Events, settled: Sequence[int]) -> Awaitable[Receipt]: ...

    def offer(self, shard: int, request: bytes, events: Events, settled: Sequence[int]) -> Awaitable[Receipt]: ...

    def take(self, shard: int, request: bytes, accepted: Bools, homes: Sequence[HomeRecord]) -> Awaitable[None]: ...

    def settle(self, shard: int, settled: Sequence[int], wait_before: int, left: Sequence[int] = ()) -> Awaitable[None]:
        """Return when all that the shard owes of records before an offset has been applied everywhere."""


class ReadPort(Protocol):
    """Reads from whatever shards a question concerns."""

    def read(self, question: Question) -> Awaitable[Answer]: ...

    def read_now(self, question: Question) -> Answer | None:
        """Return the answer, or None if one has to wait for it: `read` does."""


class _Done(Generic[T]):
    """An awaitable that is done already."""

    def __init__(self, value: T) -> None:
        self._value = value

    def __await__(self) -> Generator[Any, None, T]:
        return self._value
        yield


class LocalIngest:
    """Ingest port to shards in this process."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards

    def ingest(self, shard: int, events: Events, settled: Sequence[int]) -> Awaitable[Receipt]:
        self._shards[shard].deliveries.settle(settled)
        return _Done(self._shards[shard].ingest(events))

    def offer(self, shard: int, request: bytes, events: Events, settled: Sequence[int]) -> Awaitable[Receipt]:
        self._shards[shard].deliveries.settle(settled)
        return _Done(self._shards[shard].offer(request, events))

    def take(self, shard: int, request: bytes, accepted: Bools, homes: Sequence[HomeRecord]) -> Awaitable[None]:
        self._shards[shard].take(request, accepted, homes)
        return _Done(None)

    def settle(self, shard: int, settled: Sequence[int], wait_before: int, left: Sequence[int] = ()) -> Awaitable[None]:
        self._shards[shard].deliveries.settle(settled)
        return _Done(None)


class LocalRead:
    """Read port to shards in this process."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._reader = MemoryReader(shards[0].shard_map, [s.number for s in shards])
        for shard in shards:
            self._reader.attach(shard.number, shard.memory)

    def read(self, question: Question) -> Awaitable[Answer]:
        return _Done(self._reader.read(question))

    def read_now(self, question: Question) -> Answer | None:
        return self._reader.read(question)


def complete(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits, as all over the ports of this file are, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    coroutine.close()
    raise AssertionError("the coroutine waits; run it in an event loop")


async def all_of(started: Mapping[K, Awaitable[T]]) -> dict[K, T]:
    """Wait for every call, also when one fails, so that none is still under way at the answer.

    Raises the first failure.
    """
    done: dict[K, T] = {}
    failed: Exception | None = None
    for name, call in started.items():
        try:
            done[name] = await call
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return done


async def each_of(started: Mapping[K, Awaitable[T]]) -> tuple[dict[K, T], dict[K, MillpondError]]:
    """Wait for every call; return what those gave that succeeded, and why the others failed."""
    done: dict[K, T] = {}
    failed: dict[K, MillpondError] = {}
    bug: Exception | None = None
    for name, call in started.items():
        try:
            done[name] = await call
        except MillpondError as error:
            failed[name] = error
        except Exception as error:
            bug = bug or error
    if bug is not None:
        raise bug
    return done, failed
