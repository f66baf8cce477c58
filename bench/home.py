"""The folder in which a benchmark keeps all that it writes: gone with it, and if it was killed, with the next one."""

from __future__ import annotations

import tempfile
from pathlib import Path

from millpond.cluster.scratch import Scratch, remove_abandoned

__all__ = ["make_home"]

_PREFIX = "millpond-bench-"


def make_home() -> Scratch:
    """Make one, after taking away what killed benchmarks have left; `remove` it at the end."""
    remove_abandoned(Path(tempfile.gettempdir()), _PREFIX)
    return Scratch(_PREFIX)
