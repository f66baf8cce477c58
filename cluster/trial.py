"""A trial: the code of a definition is run in a process of its own, which may end, crash or hang of it.

A fork, since it has all that is imported already: a new process would take longer than all that is tried out.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from millpond.feature_actors.errors import DeclarationError, MillpondError, error_from_wire, error_to_wire

__all__ = ["in_trial"]

_READ_BYTES = 1 << 20


def in_trial(subject: str, work: Callable[[], bytes], limit_s: float) -> bytes:
    """Return what `work` returns, called in a process of its own.

    Raises the `MillpondError` that it raises; `DeclarationError` if the process ends otherwise than by returning, or
    takes longer than `limit_s`.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # What it leaves behind when it is ended lies in here.
    with tempfile.TemporaryDirectory(prefix="millpond-", ignore_cleanup_errors=True) as scratch:
        child = os.fork()
        if child == 0:
            os.close(reader)
            tempfile.tempdir = scratch
            _answer(writer, work)
        os.close(writer)
        try:
            content = _read(reader, time.monotonic() + limit_s)
        finally:
            os.close(reader)
            os.kill(child, signal.SIGKILL)  # it has said all that it had to say, or has had its time
            os.waitpid(child, 0)
    if content is None:
        raise DeclarationError(
            f"{subject}: took longer than {limit_s:g} s to be tried out; nothing has been changed; does it wait for "
            "something when it is loaded, or predicts? (`--seconds-max` allows more)"
        )
    try:
        kind, value = msgspec.msgpack.decode(content)
    except (msgspec.DecodeError, ValueError):
        raise DeclarationError(
            f"{subject}: its code ended the process that tried it out; nothing has been changed; look at what it "
            "printed, for an exit, or a library that crashes"
        ) from None
    if kind == "error":
        raise error_from_wire(value)
    return bytes(value)


def _answer(writer: int, work: Callable[[], bytes]) -> None:
    """In the child: work, write what came of it, and end."""
    try:
        answer: tuple[str, Any] = "done", work()
    except MillpondError as error:
        answer = "error", error_to_wire(error)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    with os.fdopen(writer, "wb") as file:
        file.write(msgspec.msgpack.encode(answer))
    sys.stdout.flush()
    os._exit(0)


def _read(reader: int, end_s: float) -> bytes | None:
    """Return what comes until the other side closes; None if that is not by `end_s` (`time.monotonic`)."""
    chunks: list[bytes] = []
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, end_s - time.monotonic()))
        if not ready:
            return None
        chunk = os.read(reader, _READ_BYTES)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
