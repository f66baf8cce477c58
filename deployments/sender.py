"""Send single events together: the buffer between an application and `Client.send`."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from millpond.deployments.client_answers import Ack, ClientError, NotSent

__all__ = ["Sender"]

Event = Mapping[str, Any]


class Sender:
    """Collects events and sends them from a thread of its own; `Client.sender` makes it. For any number of threads.

    Events go when `batch_rows` are waiting or the first has waited for `linger_ms`, in the order of `add`. What could
    not be sent is raised, once, by the next `add`, `flush` or `close`, with the events: none is lost silently. (One
    bad event refuses those that travel with it; `path` of the error counts in `events`.) At the end of the program
    what is left is sent.

    ack: the sum of what became of the events so far.
    """

    def __init__(
        self,
        send: Callable[[list[Event]], Ack],
        *,
        batch_rows: int = 500,
        linger_ms: float = 20.0,
        buffer_rows: int = 10_000,
    ) -> None:
        if min(batch_rows, buffer_rows) < 1 or linger_ms < 0:
            raise ValueError("sender: batch_rows and buffer_rows are 1 or more, linger_ms is 0 or more")
        self.ack = Ack()
        self._send = send
        self._batch_rows, self._linger_s, self._buffer_rows = batch_rows, linger_ms / 1_000, buffer_rows
        self._changed = threading.Condition()
        self._waiting: list[Event] = []
        #: How many were added, are settled (sent or failed), and are to be settled without lingering.
        self._added = self._settled = self._urgent = 0
        self._oldest_s = 0.0
        self._unsent: list[Event] = []
        self._error: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="millpond-sender", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def add(self, event: Event) -> None:
        """Take an event to be sent; wait only while `buffer_rows` are not settled.

        Raises `NotSent` if sending has failed meanwhile: this event is then among its `events`, and is not sent.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._unsent or self._closed or self._added - self._settled < self._buffer_rows
            )
            if self._closed:
                raise RuntimeError("sender: add after close")
            self._raise_unsent(event)
            if not self._waiting:
                self._oldest_s = time.monotonic()
            self._waiting.append(event)
            self._added += 1
            if len(self._waiting) in (1, self._batch_rows):
                self._changed.notify_all()

    def flush(self) -> None:
        """Send what was added so far, and wait until it is settled. Raises `NotSent`."""
        with self._changed:
            until = self._urgent = self._added
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._settled >= until)
            self._raise_unsent()

    def close(self) -> None:
        """Send what is left, wait until it is settled, and end the thread. Raises `NotSent`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)
        with self._changed:
            self._raise_unsent()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _raise_unsent(self, *more: Event) -> None:
        if not self._unsent:
            return
        events, error = [*self._unsent, *more], self._error
        self._unsent, self._error = [], None
        given = {n: getattr(error, n) for n in ("code", "status", "path", "problems") if isinstance(error, ClientError)}
        not_sent = NotSent(f"{len(events)} events were not acknowledged: {error}", events=events, **given)
        if isinstance(error, ClientError):
            not_sent.at_row(-error.first_row)
        raise not_sent from error

    def _work(self) -> None:
        while batch := self._next_batch():
            ack, unsent, failed = Ack(), [], None
            try:
                ack = self._send(batch)
            except Exception as error:
                failed = error
                ack, sent = (error.ack, error.first_row) if isinstance(error, ClientError) else (ack, 0)
                unsent = batch[sent:]
            with self._changed:
                self._settled += len(batch)
                self.ack += ack
                self._unsent += unsent
                self._error = self._error or failed
                self._changed.notify_all()

    def _next_batch(self) -> list[Event]:
        """Wait until events have to go, and return them; none when it is closed and all have gone."""
        with self._changed:
            while True:
                rest_s = self._oldest_s + self._linger_s - time.monotonic()
                due = self._closed or self._settled < self._urgent or rest_s <= 0
                if len(self._waiting) >= self._batch_rows or (due and self._waiting):
                    batch, self._waiting = self._waiting[: self._batch_rows], self._waiting[self._batch_rows :]
                    self._oldest_s = time.monotonic()
                    return batch
                if self._closed:
                    return []
                self._changed.wait(rest_s if self._waiting else None)
