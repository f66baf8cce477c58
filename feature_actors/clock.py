"""Clocks: what time it is for arrival stamps and live reads."""

from __future__ import annotations

import time
from typing import Literal, Protocol

__all__ = ["Clock", "ClockKind", "EventClock", "ManualClock", "WallClock"]

ClockKind = Literal["wall", "event"]


class Clock(Protocol):
    def now_ms(self) -> int | None:
        """Return milliseconds since the epoch, UTC; None if time is the newest arrival stamp."""


class WallClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000


class EventClock:
    """Time stands at the newest arrival stamp: for demos, replays and staging."""

    def now_ms(self) -> None:
        return None


class ManualClock:
    """A clock that a test sets."""

    def __init__(self, now_ms: int) -> None:
        self.ms = now_ms

    def now_ms(self) -> int:
        return self.ms
