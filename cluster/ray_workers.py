"""Workers of a join on a Ray cluster: each is an actor that has one shard, and answers piece after piece.

Promises:
- The bits of the answers are those of threads. A worker that is lost loses its shard: then the join begins again with
  new workers, some times at most, and what has been answered is not answered twice.
- So many pieces are under way at most, in the memory of this process and in Ray's.
- Whoever breaks off, by Ctrl-C, too, ends the workers; they end by themselves if this process is killed.
- Workers need the package and the definition's text, which is sent to them; no file of this machine. Pieces and answers
  go through Ray's memory as Arrow IPC and arrays.

Never starts a Ray cluster: there is one, or that is an error.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from millpond.cluster.config import Config
from millpond.cluster.embedded import log_of_ray
from millpond.cluster.serve_env import ray_environment
from millpond.feature_actors.errors import BadRequest, MillpondError, Unavailable
from millpond.feature_actors.layout import Layout, compile_layout
from millpond.feature_actors.plan import Answer, ReadPlan
from millpond.models.definition import Definition
from millpond.models.training.workers import JoinShard, Piece, SentPiece, Share, put_share

__all__ = ["OWN", "WORKERS_MAX", "JoinWorker", "Order", "RayWorkers", "connected"]

#: Instead of an address: the Ray of the cluster that the configuration names, as `millpond up` has started it.
OWN = "up"
#: How many threads or workers there may be.
WORKERS_MAX = 64
#: So many pieces at most: one is computed while the next is read.
_PIECES_MAX = 2
#: How often a join begins, and how long all workers may take to come up, on a cluster that has to grow, too.
_BEGINNINGS_MAX, _START_S_MAX = 3, 120.0
_CONNECT_S = 5.0
#: A worker that has not answered a piece for so long is lost.
_PIECE_S_MAX = 600.0

_VERSION = version("millpond")

logger = logging.getLogger("millpond.training")


class Order(NamedTuple):
    """What workers are to compute: the features of a model of a definition, as the command has compiled them."""

    file_name: str
    text: str
    model: str
    version: str
    layout_digest: int
    nice: int


class JoinWorker:
    """The actor: one shard of so many, for the features of a model of a definition's text."""

    def open(self, order: Order, number: int, of: int) -> None:
        """Make the shard. Raises `Unavailable` if it is not the one that the command means.

        (What `__init__` raises would be the death of an actor.)
        """
        os.nice(order.nice)
        models = {one.name: one for one in Definition(order.file_name, order.text).declared().models}
        features = models[order.model].features
        layout = compile_layout([], [feature.view for feature in features])
        if (_VERSION, layout.digest) != (order.version, order.layout_digest):
            raise Unavailable(
                f"training set: a worker of Ray has millpond {_VERSION}, the command {order.version}, and "
                f"`{order.file_name}` is to declare the same views by both; install the same on all of Ray's nodes"
            )
        program = ReadPlan(layout, features, "training set").program
        self._shard = JoinShard(layout, program, number, of)

    def share(self, sent: SentPiece) -> Share:
        return self._shard.share(sent)


class RayWorkers:
    """n workers on the cluster that this process is connected to, see `Workers`. They start at once, to be there when
    there is something to join; `close` ends them.

    n: None is one for each free CPU. nice: how far behind other processes of its machine each stands.
    `answers` raises `Unavailable` if they do not come up or are lost again and again, and the `MillpondError` of one.
    """

    def __init__(self, definition: Definition, model: str, n: int | None = None, *, nice: int = 0) -> None:
        self._definition, self._model, self._nice = definition, model, nice
        self._n = n or min(WORKERS_MAX, max(1, _free_cpus()))
        self._actors: list[Any] = []
        self._start()

    def answers(self, layout: Layout, pieces: Callable[[], Iterator[Piece]]) -> Iterator[tuple[Piece, Answer]]:
        import ray

        answered = 0
        for left in reversed(range(_BEGINNINGS_MAX)):
            try:
                self._start()
                self._open(layout)
                for one in islice(self._once(pieces), answered, None):
                    answered += 1
                    yield one
                return
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, MillpondError):
                    raise error.cause from None
                raise Unavailable(f"training set: a worker of Ray failed: {_last_line(error)}") from error
            except ray.exceptions.RayError as error:
                if not left:
                    raise Unavailable(
                        f"training set: a worker of Ray was lost, in each of {_BEGINNINGS_MAX} tries: "
                        f"{_last_line(error)}; see Ray's logs, or leave `--ray` out for threads"
                    ) from error
                logger.warning("a worker of Ray was lost; the join begins again, %d more times at most", left)
            finally:
                self.close()

    def close(self) -> None:
        """End the workers, whatever they do."""
        import ray

        while self._actors:
            ray.kill(self._actors.pop())

    def _start(self) -> None:
        import ray

        worker = ray.remote(JoinWorker).options(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")
        for _ in range(len(self._actors), self._n):
            self._actors.append(worker.remote())

    def _open(self, layout: Layout) -> None:
        import ray

        definition, n = self._definition, self._n
        order = Order(definition.file_name, definition.text, self._model, _VERSION, layout.digest, self._nice)
        starting = [actor.open.remote(order, number, n) for number, actor in enumerate(self._actors)]
        _, late = ray.wait(starting, num_returns=n, timeout=_START_S_MAX)
        if late:
            raise Unavailable(
                f"training set: {len(late)} of {n} workers have not come up within {_START_S_MAX:g} s; each takes "
                f"a CPU, and Ray has {_free_cpus()} more; ask for fewer (`--threads`)"
            )
        try:
            ray.get(starting)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise Unavailable(
                f"training set: a worker of Ray does not start: {_last_line(error)}; each of Ray's nodes needs "
                f"millpond {_VERSION} and what the definition imports"
            ) from error

    def _once(self, pieces: Callable[[], Iterator[Piece]]) -> Iterator[tuple[Piece, Answer]]:
        import ray

        under_way: deque[tuple[Piece, list[Any]]] = deque()
        for piece in pieces():
            sent = ray.put(SentPiece.of(piece))
            under_way.append((piece, [actor.share.remote(sent) for actor in self._actors]))
            if len(under_way) == _PIECES_MAX:
                yield self._answered(*under_way.popleft())
        while under_way:
            yield self._answered(*under_way.popleft())

    def _answered(self, piece: Piece, shares: list[Any]) -> tuple[Piece, Answer]:
        import ray

        answer = Answer.empty(piece.question)
        for number, share in enumerate(shares):
            put_share(ray.get(share, timeout=_PIECE_S_MAX), piece.question, answer, number, len(shares))
        return piece, answer


def _free_cpus() -> int:
    import ray

    return int(ray.available_resources().get("CPU", 0))


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


@contextmanager
def connected(address: str, config: Config) -> Iterator[None]:
    """Connect this process to a Ray cluster at `HOST:PORT`, or `OWN`; to leave it after.

    A process that is in a cluster already stays in that. Raises `Unavailable` if there is no such cluster.
    """
    environment = {}
    if address == OWN:
        ray_of = _ray_of(config)
        address, environment = ray_of["address"], ray_environment(Path(ray_of["shelter"]))
    _check_listens(address)
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    os.environ.update(environment)  # before Ray is imported, which reads it then
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # one try, which takes 40 s in vain; not twenty

    import ray
    from ray._private import worker

    worker.print_to_stdstream = log_of_ray  # else it says on standard output that a worker died
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unavailable(
            f"--ray: `{address}` is no Ray cluster that this machine is a node of, or it wants a token (RAY_AUTH_MODE, "
            f"RAY_AUTH_TOKEN_PATH): {_last_line(error)}"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray's own prints a stack and dies
    try:
        yield
    finally:
        ray.shutdown()


def _ray_of(config: Config) -> dict[str, str]:
    from millpond.cluster.cluster import running_cluster

    to_do = "start one with `millpond up`, or leave `--ray` out for threads"
    ray_of: dict[str, str] = running_cluster(config, f"--ray {OWN}", to_do)["ray"]
    return ray_of


def _check_listens(address: str) -> None:
    """Refuse an address that nobody listens at: Ray would try for a while."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or "/" in host or not port.isdigit():
        raise BadRequest(f"--ray: got {address!r:.80}; allowed is HOST:PORT, or `{OWN}`")
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise Unavailable(
            f"--ray: nobody listens at `{address}` ({error}); start Ray, or leave `--ray` out for threads"
        ) from None
