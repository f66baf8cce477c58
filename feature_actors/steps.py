"""Steps: long work on a shard as a generator, which says before each step what is to be done, and where.

Between two steps everything else goes on: events, reads, other work. Whoever takes the steps does what they say: the
server of a shard in its threads (`workshop`), a test at once, with somebody who ends between any two. What the
generator does itself, between two steps, is done on the shard's own thread, between two commits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from millpond.feature_actors.shard import Prepared

__all__ = ["Cut", "In", "Rest", "Step", "Steps", "Where", "Write"]

T = TypeVar("T")
#: The thread that writes to the log; of snapshots; of the history; of views, which reads what was before.
Where = Literal["log", "house", "history", "views"]


class In(NamedTuple):
    """Call a function in a thread; the generator gets what it returns."""

    where: Where
    do: Callable[[], Any]


class Write(NamedTuple):
    """Have something in the log and applied, and all that was prepared before."""

    prepared: Sequence[Prepared] = ()


class Cut(NamedTuple):
    """Find from which offset on all records of a home are of who knows a key: the generator gets that."""

    home: int
    key_number: int


class Rest(NamedTuple):
    """Let others go on, for as long as there was work."""

    work_s: float = 0.0


Step = In | Write | Cut | Rest
#: With what the work returns in the end.
Steps = Generator[Step, Any, T]
