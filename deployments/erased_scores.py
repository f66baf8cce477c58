"""Removing logged scores while others are being logged: a notice in the history, which every writer heeds.

    1. a notice is written, `_scores/_forget/<name>.json`: whose scores are not to be there
    2. every writer that lives takes them out of the file that it fills, and of what waits, and notes that it has
    3. all files are rewritten that have some
    4. the notice goes, and the notes

A writer goes on leaving them out until it ends. Who begins later has none: the features are gone by then.
"""

from __future__ import annotations

import io
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.log.folder import Folder, HistoryUnavailable

if TYPE_CHECKING:
    from millpond.models.score_log import ForgottenScores

__all__ = ["ScoreEraser", "forgotten_by", "heeded", "noticed"]

_NOTICES = "_scores/_forget"
_LOOK_S = 0.05


@dataclass(frozen=True)
class ScoreEraser:
    """See `feature_actors.server.ScoreEraser`. registry_dir: where the writers, which are replicas, report that they
    live. logged: whether any replica logs scores now. wait_s_max: how long a call waits for them."""

    history_uri: str
    registry_dir: str
    logged: bool
    wait_s_max: float = 60.0

    def forget(self, name: str, field: str, hash: tuple[int, int], as_of_ms: int) -> int:
        # Imported here, for a shard's process needs none of it before.
        from millpond.models.score_log import ForgottenScores, erase_scores

        folder, until_s = Folder(self.history_uri), time.monotonic() + self.wait_s_max
        forgotten = ForgottenScores(field, hash, as_of_ms)
        if name not in noticed(folder):
            folder.write(f"{_NOTICES}/{name}.json", io.BytesIO(msgspec.json.encode(forgotten)), "new")
        waited_for = self._writers()
        while left := waited_for & self._writers() - _heeded_by(folder, name):
            if time.monotonic() > until_s:
                who = ", ".join(f"`{writer}`" for writer in sorted(left))
                raise Unavailable(
                    f"logged scores: {who} may log scores still of an entity that is to be forgotten: no note that it "
                    f"does not came within {self.wait_s_max:g} s; see what it does, or end it"
                )
            time.sleep(_LOOK_S)
        n = erase_scores(self.history_uri, [forgotten], waited_for)
        n += sum(int(folder.read(f"{_NOTICES}/{name}.{writer}")) for writer in _heeded_by(folder, name))
        for path in folder.files(_NOTICES):
            folder.delete(path)
        return n

    def _writers(self) -> set[str]:
        """Return the writers that live."""
        from millpond.deployments.host import is_alive
        from millpond.models.registry import Registry

        if not self.logged:
            return set()
        with closing(Registry(Path(self.registry_dir))) as registry:
            return {name for name, report in registry.reports().items() if is_alive(report)}


# -- what a writer does


def noticed(folder: Folder) -> set[str]:
    """Return the names of the notices that there are."""
    return {path.rpartition("/")[2].removesuffix(".json") for path in folder.files(_NOTICES) if path.endswith(".json")}


def forgotten_by(folder: Folder, name: str) -> ForgottenScores | None:
    """Return what a notice says, None if it has gone."""
    from millpond.models.score_log import ForgottenScores

    try:
        return msgspec.json.decode(folder.read(f"{_NOTICES}/{name}.json"), type=ForgottenScores)
    except HistoryUnavailable:
        if folder.exists(f"{_NOTICES}/{name}.json"):
            raise
        return None


def heeded(folder: Folder, name: str, writer: str, scores: int) -> None:
    """Note that a writer does what a notice says, and of how many scores it has rid its file."""
    folder.write(f"{_NOTICES}/{name}.{writer}", io.BytesIO(str(scores).encode()), "new")


def _heeded_by(folder: Folder, name: str) -> set[str]:
    names = [path.rpartition("/")[2] for path in folder.files(_NOTICES)]
    return {one.removeprefix(f"{name}.") for one in names if one.startswith(f"{name}.") and not one.endswith(".json")}
