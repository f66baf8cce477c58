"""Calls of shards on the same node, over a Unix socket of each: a tenth of the cost of an actor call.

The socket lies in the folder of the cluster's memory, which only its user can enter. A message is its length (4 bytes,
little-endian) and MessagePack: `[number, method, arguments]` one way, `[number, answer, error]` back, in any order.
Nothing is unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import msgspec

from millpond.feature_actors.errors import MillpondError, Unavailable, error_from_wire, error_to_wire

__all__ = ["SOCKET_PATH_BYTES_MAX", "Caller", "SocketCalls", "caller", "serve_socket", "socket_path"]

logger = logging.getLogger("millpond.shard")

#: A longer path cannot be bound: the kernel's limit is 107 bytes.
SOCKET_PATH_BYTES_MAX = 107
_HEAD_BYTES = 4
_MESSAGE_BYTES_MAX = 1 << 31
_BUFFER_BYTES = 4 << 20

#: What answers a call: a method's name and its arguments.
Answerer = Callable[[str, list[Any]], Awaitable[Any]]


class Caller:
    """Who calls over one connection. gone: it has ended, or closed that."""

    def __init__(self) -> None:
        self.gone = False


#: Who has made the call that is being answered; None if it came another way.
caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def socket_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:03d}.socket"


def _encode(message: Any) -> tuple[bytes, bytes]:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_HEAD_BYTES, "little"), body


async def _messages(reader: asyncio.StreamReader) -> Any:
    """Yield what comes until the other side closes."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            length = int.from_bytes(await reader.readexactly(_HEAD_BYTES), "little")
            if length > _MESSAGE_BYTES_MAX:
                return
            yield msgspec.msgpack.decode(await reader.readexactly(length))


async def serve_socket(path: Path, answer: Answerer) -> asyncio.AbstractServer:
    """Answer calls at a socket, which is made anew; calls of a connection are answered side by side."""
    path.unlink(missing_ok=True)

    async def one(number: int, method: str, arguments: list[Any], writer: asyncio.StreamWriter) -> None:
        try:
            message = [number, await answer(method, arguments), None]
        except MillpondError as error:
            message = [number, None, error_to_wire(error)]
        except Exception:
            logger.exception("call of %s failed", method)
            message = [number, None, error_to_wire(MillpondError("an error of ours; it is in the log of the shard"))]
        if not writer.is_closing():
            writer.writelines(_encode(message))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: set[asyncio.Task[None]] = set()
        who = Caller()
        caller.set(who)
        try:
            async for number, method, arguments in _messages(reader):
                task = asyncio.ensure_future(one(number, method, arguments, writer))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except asyncio.CancelledError:  # the server closes; asyncio would print it as a failure
            pass
        finally:
            who.gone = True
            writer.close()

    server = await asyncio.start_unix_server(connected, path, limit=_BUFFER_BYTES)
    path.chmod(0o600)
    return server


class _Connection:
    """A connection to one shard, and the calls that wait for their answers on it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.waiting: dict[int, asyncio.Future[Any]] = {}

    async def receive(self, reader: asyncio.StreamReader, where: str) -> None:
        try:
            async for number, answer, error in _messages(reader):
                waits = self.waiting.pop(number, None)
                if waits is None or waits.done():  # it has given up
                    continue
                if error is None:
                    waits.set_result(answer)
                else:
                    waits.set_exception(error_from_wire(error))
        finally:
            self.writer.close()
            for waits in self.waiting.values():
                if not waits.done():
                    waits.set_exception(_gone(where))
            self.waiting.clear()


def _gone(where: str) -> Unavailable:
    return Unavailable(f"{where} is not running; it is being restarted", retry_after_ms=1_000)


class SocketCalls:
    """A transport to the shards whose sockets lie in a folder; for one event loop.

    timeout_s: longest wait for an answer. calls_max: that wait for one shard; more are refused.
    """

    def __init__(self, folder: Path, n_shards: int, timeout_s: float = 30.0, calls_max: int = 1_024) -> None:
        self.n_shards = n_shards
        self._folder = folder
        self._timeout_s = timeout_s
        self._calls_max = calls_max
        self._connections: dict[int, asyncio.Task[_Connection]] = {}
        self._receivers: set[asyncio.Task[None]] = set()
        self._number = 0

    def call(self, shard: int, method: str, *arguments: Any) -> Awaitable[Any]:
        return asyncio.ensure_future(self._call(shard, method, arguments))

    async def _call(self, shard: int, method: str, arguments: tuple[Any, ...]) -> Any:
        where = f"shard {shard} of {self.n_shards}"
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection(shard, where)
                if len(connection.waiting) >= self._calls_max:
                    raise Unavailable(f"{where} has {self._calls_max} calls waiting already", retry_after_ms=1_000)
                self._number += 1
                number, answer = self._number, asyncio.get_running_loop().create_future()
                connection.waiting[number] = answer
                try:
                    connection.writer.writelines(_encode([number, method, arguments]))
                    return await answer
                finally:
                    connection.waiting.pop(number, None)
        except TimeoutError:
            raise Unavailable(f"{where} did not answer within {self._timeout_s:g} s", retry_after_ms=1_000) from None

    async def _connection(self, shard: int, where: str) -> _Connection:
        """Return the connection to a shard; all calls that come while it is made wait for the same."""
        known = self._connections.get(shard)
        if known is None or (known.done() and (known.exception() is not None or known.result().writer.is_closing())):
            known = self._connections[shard] = asyncio.ensure_future(self._connect(shard, where))
        return await asyncio.shield(known)

    async def _connect(self, shard: int, where: str) -> _Connection:
        try:
            reader, writer = await asyncio.open_unix_connection(socket_path(self._folder, shard), limit=_BUFFER_BYTES)
        except OSError as error:
            raise _gone(where) from error
        connection = _Connection(writer)
        task = asyncio.ensure_future(connection.receive(reader, where))
        self._receivers.add(task)
        task.add_done_callback(self._receivers.discard)
        return connection

    async def close(self) -> None:
        for receiver in self._receivers:
            receiver.cancel()
        await asyncio.gather(*self._receivers, return_exceptions=True)
        self._connections.clear()
