"""The folder in which a benchmark keeps all that it writes: gone with it, and if it was killed, with the next one."""

from __future__ import annotations

from pathlib import Path

from millpond.cluster.scratch import Scratch, remove_abandoned
from millpond.feature_actors.lock import is_held

__all__ = ["make_home"]

_PREFIX = "millpond-bench-"


def make_home(root: str) -> Scratch:
    """Make one in a folder, after taking away what killed benchmarks have left there; `remove` it at the end."""
    Path(root).mkdir(parents=True, exist_ok=True)
    remove_abandoned(Path(root), _PREFIX, is_wanted=_has_running_cluster)
    return Scratch(_PREFIX, Path(root))


def _has_running_cluster(home: Path) -> bool:
    """Whether a cluster that a benchmark started as a program has outlived it: `millpond down --data-dir` ends it."""
    return any(is_held(lock) for lock in home.glob("*/lock"))
