"""The Ray edge: a shard as an actor, and the ports that call it.

The actor adds a process and a queue to the plain `Shard`, nothing else. It is detached and named, is
restarted by Ray without end, and never retried by Ray: a write may be sent twice only by us, who
know that it is safe. Batches cross as Arrow IPC bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from millpond.feature_actors.errors import MillpondError, Unavailable
from millpond.feature_actors.keys import Hashes
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.manifest import open_shard
from millpond.feature_actors.plan import ShardAnswer, ShardQuestion
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import FeatureView
from millpond.feature_actors.wire import (
    QuestionDecoder,
    WireAnswer,
    WireQuestion,
    decode_answer,
    encode_answer,
    encode_question,
)

__all__ = [
    "ActorIngest",
    "ActorRead",
    "FeatureActor",
    "ShardSpec",
    "actor_name",
    "find_actors",
    "start_actors",
]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardSpec:
    """What every shard actor of a cluster is made from."""

    cluster_name: str
    run_id: str
    data_dir: str
    sources: tuple[Source, ...]
    views: tuple[FeatureView, ...]
    shard_map: ShardMap
    hash_seed: int
    dedupe_horizon_ms: int


def actor_name(cluster_name: str, shard: int) -> str:
    return f"millpond-{cluster_name}-shard-{shard:03d}"


class FeatureActor:
    """One shard in a process of its own; methods as of `Shard`."""

    def __init__(self, spec: ShardSpec, number: int) -> None:
        self._number, self._of = number, spec.shard_map.n_shards
        # State is in memory only. A restarted actor would answer with empty features, as if nobody had
        # ever done anything: it refuses instead.
        self._lost = open_shard(Path(spec.data_dir), number, spec.run_id).again
        layout = compile_layout(spec.sources, spec.views)
        self._decoder = QuestionDecoder(layout)
        self._shard = Shard(
            layout,
            spec.shard_map,
            number,
            seed=spec.hash_seed,
            dedupe_horizon_ms=spec.dedupe_horizon_ms,
        )

    def _check_lost(self) -> None:
        if self._lost:
            raise Unavailable(
                f"shard {self._number} of {self._of} was restarted and its features are gone; start the cluster "
                "anew and load the events again",
                code="shard_lost",
                retry_after_ms=10_000,
            )

    def admit(self, source: str, ids: Hashes, contents: Ints, received_ms: int) -> npt.NDArray[np.uint8]:
        self._check_lost()
        return self._shard.admit(source, ids, contents, received_ms)

    def apply(self, source: str, ipc: bytes, arrivals: Ints, received_ms: int) -> None:
        self._check_lost()
        with pa.ipc.open_stream(ipc) as reader:
            self._shard.apply(source, reader.read_next_batch(), arrivals, received_ms)

    def read(self, question: WireQuestion) -> WireAnswer:
        self._check_lost()
        return encode_answer(self._shard.read(self._decoder.decode(question)))

    def status(self) -> dict[str, Any]:
        self._check_lost()
        return asdict(self._shard.status())

    def check(self) -> list[str]:
        self._check_lost()
        return self._shard.check()


def start_actors(spec: ShardSpec, namespace: str, num_cpus: float) -> list[Any]:
    """Start an actor per shard, detached and named, and wait until each has opened its directory."""
    remote = ray.remote(FeatureActor)
    actors = [
        remote.options(
            name=actor_name(spec.cluster_name, shard),
            namespace=namespace,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            num_cpus=num_cpus,
        ).remote(spec, shard)
        for shard in range(spec.shard_map.n_shards)
    ]
    ray.get([a.status.remote() for a in actors], timeout=120)
    return actors


def find_actors(cluster_name: str, n_shards: int, namespace: str) -> list[Any]:
    """Return the handles of a cluster's shard actors, by name."""
    return [ray.get_actor(actor_name(cluster_name, shard), namespace) for shard in range(n_shards)]


class _Calls:
    """Calls to shard actors: each with a time limit, errors as they were raised there."""

    def __init__(self, actors: Sequence[Any], timeout_s: float = 30.0) -> None:
        self._actors = actors
        self._timeout_s = timeout_s

    def _where(self, shard: int) -> str:
        return f"shard {shard} of {len(self._actors)}"

    async def _answer(self, shard: int, call: Any) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except TimeoutError:
            raise Unavailable(
                f"{self._where(shard)} did not answer within {self._timeout_s:g} s", retry_after_ms=1_000
            ) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MillpondError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise Unavailable(
                f"{self._where(shard)} is not running; it is being restarted", retry_after_ms=1_000
            ) from error


class ActorIngest(_Calls):
    """Ingest port to shard actors."""

    def admit(
        self, shard: int, source: str, ids: Hashes, contents: Ints, received_ms: int
    ) -> Awaitable[npt.NDArray[np.uint8]]:
        return self._answer(shard, self._actors[shard].admit.remote(source, ids, contents, received_ms))

    def apply(self, shard: int, source: str, batch: pa.RecordBatch, arrivals: Ints, received_ms: int) -> Awaitable[None]:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return self._answer(
            shard, self._actors[shard].apply.remote(source, sink.getvalue().to_pybytes(), arrivals, received_ms)
        )


class ActorRead(_Calls):
    """Read port to shard actors."""

    def read(self, shard: int, question: ShardQuestion) -> Awaitable[ShardAnswer]:
        return self._read(shard, question, self._actors[shard].read.remote(encode_question(question)))

    async def _read(self, shard: int, question: ShardQuestion, call: Any) -> ShardAnswer:
        return decode_answer(await self._answer(shard, call), question)

    async def status(self) -> list[dict[str, Any]]:
        """Return what every shard says of itself."""
        calls = [self._answer(i, a.status.remote()) for i, a in enumerate(self._actors)]
        return [await call for call in calls]
