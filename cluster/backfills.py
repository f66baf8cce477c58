"""Backfills of views that come while the cluster runs: watched until every shard has them whole.

Promises: a view is live when all shards have said so, and not before; one that fails on a shard has failed, and says
why. Whoever deploys may go away meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millpond.deployments.host import is_alive
from millpond.deployments.serving import ServingSpec
from millpond.feature_actors.backfill import ViewState
from millpond.feature_actors.errors import DeclarationError, MillpondError, Unavailable
from millpond.feature_actors.layout import Layout, identity_of
from millpond.feature_actors.socket_calls import SocketCalls
from millpond.models.added_views import AddedViewRecord, Progress
from millpond.models.registry import Registry
from millpond.models.registry_views import declared_view, extended_layout

__all__ = ["BackfillKeeper", "Verdict", "kept_layout", "layout_now", "verdict_of", "wait_until_whole"]

logger = logging.getLogger("millpond.backfills")

_POLL_S, _AGAIN_S = 0.2, 5.0
#: How long a stop waits for what it does just now, which may hang with what it asks.
_STOP_S = 30.0
#: How often it is said how far a backfill is.
_SAY_EVERY_S = 2.0


def kept_layout(registry: Registry, layout: Layout) -> Layout:
    """Return what a cluster keeps that starts with a layout: the added views of its registry behind it.

    Dropped are those that the layout has by now, those of a name of which there is a newer version and that no model
    reads, and, which is said in the log, those that failed, or that cannot stand behind it.
    Raises `DeclarationError` if the layout has a key to which only a part of what was before has been brought.
    """
    gone: list[str] = []
    records = registry.views.all()
    _check_whole(records, layout)
    newest = {one.name: one.identity for one in records if one.state != "failed"}
    extended = layout
    for one in records:
        try:
            if one.state == "failed":
                raise DeclarationError(f"its backfill had failed ({one.why}); deploy it again to have it tried again")
            superseded = one.name in layout.views or newest[one.name] != one.identity
            if one.identity in layout.kept_views or (superseded and not _is_read(registry, one)):
                gone.append(one.identity)
                continue
            extended = extended_layout(extended, [one])
            if superseded and not one.superseded:
                registry.views.supersede(one.identity)
        except MillpondError as error:
            gone.append(one.identity)
            logger.warning("view `%s`, which was deployed, is not kept any more: %s", one.name, error)
    if gone:
        registry.views.drop(gone)
    return extended_layout(layout, registry.views.all())


def _check_whole(records: Sequence[AddedViewRecord], layout: Layout) -> None:
    keys = {(table.source.name, table.key) for table in layout.tables}
    for one in (one for one in records if one.new_key and one.state != "live"):
        view = declared_view(one)
        if (view.source.name, tuple(view.key)) in keys:
            raise DeclarationError(
                f"view `{one.name}`: it was deployed, and only a part of what was before has been brought to its key "
                f"({', '.join(view.key)}) yet; start with the definitions of before, deploy it, and when it is live "
                "start with these"
            )


def _is_read(registry: Registry, record: AddedViewRecord) -> bool:
    """Return whether a version that has not been retired was made with this version of a view."""
    for model in registry.models():
        for version in registry.versions(model):
            reads = any(name.startswith(f"{record.name}.") for name in version.features)
            if reads and registry.state_of(version) != "retired":
                views = registry.definition(version).declared().views
                if record.identity in map(identity_of, views):
                    return True
    return False


@dataclass(frozen=True)
class Verdict:
    """What the shards together say of a view; see `AddedViewRecord`."""

    state: ViewState
    progress: Progress
    why: str = ""
    history_since_ms: int | None = None


def verdict_of(identity: str, shards: Sequence[Mapping[str, Any]]) -> Verdict:
    """Return how far a view is by what each shard says of itself: whole when all have it, failed when one has."""
    said = [shard.get("views", {}).get(identity) for shard in shards]
    there = [one for one in said if one is not None]
    failed = [f"shard {shard['shard']}: {one['why']}" for shard, one in zip(shards, said, strict=True)
              if one is not None and one["state"] == "failed"]  # fmt: skip
    whole = sum(one["state"] == "whole" for one in there)
    read, of = (sum(int(one[name]) for one in there) for name in ("read", "of"))
    since = [one["history_since_ms"] for one in there if one["history_since_ms"] is not None]
    waits = [
        (s["shard"], s.get("views_failure") or (one or {}).get("why")) for s, one in zip(shards, said, strict=True)
    ]
    stuck = "; ".join(f"shard {shard}: {why}" for shard, why in waits if why)
    state: ViewState = "failed" if failed else "live" if whole == len(shards) else "backfilling"
    return Verdict(state, Progress(read, of, whole, len(shards), stuck), "; ".join(failed), max(since, default=None))


class BackfillKeeper:
    """Ask the shards how far they are, in a thread of its own, as long as the cluster runs."""

    def __init__(self, spec: ServingSpec) -> None:
        self._spec = spec
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="backfills", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer; what is under way goes on at the next start."""
        self._stopping.set()
        self._thread.join(_STOP_S)  # then it ends with this process

    def _keep(self) -> None:
        registry: Registry | None = None
        seen, waiting = -1, []
        with asyncio.Runner() as runner:
            while not self._stopping.wait(_POLL_S):
                try:
                    registry = registry or Registry(Path(self._spec.registry_dir))
                    if (generation := registry.generation()) != seen:
                        waiting = [one for one in registry.views.all() if not one.settled]
                        seen = generation
                    if waiting:
                        self._look(registry, waiting, runner.run(self._said()), seen)
                except Exception:  # a shard that is being restarted, a registry that cannot be written
                    logger.exception("it cannot be said how far the backfills are")
                    self._stopping.wait(_AGAIN_S)
        if registry is not None:
            registry.close()

    def _look(
        self, registry: Registry, waiting: Sequence[AddedViewRecord], shards: Sequence[Mapping[str, Any]], seen: int
    ) -> None:
        # A key after the other: who knows one knows those before.
        keys = [one for one in waiting if one.state in ("added", "routing")][:1]
        for one in waiting:
            verdict = verdict_of(one.identity, shards)
            if verdict.state == "failed" or (one.state == "backfilling" and verdict.state == "live"):
                registry.views.settle(one.identity, verdict.state, verdict.why, verdict.history_since_ms)
                logger.info("view `%s` is %s %s", one.identity, verdict.state, verdict.why)
            elif one in keys and one.state == "added" and all(one.identity in s.get("views", {}) for s in shards):
                registry.views.advance(one.identity, "routing")
            elif one in keys and one.state == "routing" and _known_by_all(registry, seen):
                registry.views.advance(one.identity, "backfilling")
            else:
                registry.views.note(one.identity, verdict.progress)

    async def _said(self) -> list[Mapping[str, Any]]:
        calls = SocketCalls(Path(self._spec.memory_dir), self._spec.shard_map.n_shards, self._spec.shard_timeout_s)
        try:
            return [await calls.call(shard, "status") for shard in range(calls.n_shards)]
        finally:
            await calls.close()


def _known_by_all(registry: Registry, generation: int) -> bool:
    """Return whether all who take events in go by a generation of the views."""
    known = [one.generation for one in registry.views.ingresses().values() if is_alive(asdict(one))]
    return bool(known) and min(known) >= generation


def wait_until_whole(
    registry: Registry,
    identities: Collection[str],
    lives: Callable[[], bool],
    say: Callable[[str], None] | None = None,
) -> None:
    """Return when added views are live.

    lives: whether the cluster still runs. say: is told now and then how far they are.
    Raises `Unavailable` if one has failed, or the cluster has ended.
    """
    said_s = time.monotonic()
    while True:
        records = [one for one in registry.views.all() if one.identity in identities]
        if failed := [one for one in records if one.state == "failed"]:
            whys = "; ".join(f"view `{one.name}`: its backfill failed: {one.why}" for one in failed)
            raise Unavailable(f"{whys}; mend that, and start the cluster anew to have it tried again")
        if all(one.state == "live" for one in records):
            return
        if not lives():
            raise Unavailable("the cluster has ended; the backfill goes on when it is started again")
        if say is not None and time.monotonic() - said_s >= _SAY_EVERY_S:
            said_s, progress = time.monotonic(), registry.views.progress()
            for one in records:
                if not one.settled:
                    say(f"view {one.name}: {one.state}, {progress.get(one.identity, 'about to begin')}")
        time.sleep(_POLL_S / 4)


def layout_now(layout: Layout, registry_dir: Path) -> Layout:
    """Return the layout of a cluster that runs: what it started with, and the added views of its registry."""
    registry = Registry(registry_dir)
    try:
        return extended_layout(layout, registry.views.all())
    finally:
        registry.close()
