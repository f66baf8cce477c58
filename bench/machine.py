"""Where a figure was measured: the commit and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["commit", "machine"]


def commit() -> str:
    """Return the commit of the checkout that this runs from, with `-dirty` behind it if files differ
    from it; the installed version if it runs from no checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        describe = [*git, "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"v{version('millpond')}"


def machine() -> dict[str, Any]:
    """Return cores, memory and architecture of this machine."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(memory_bytes / 1e9, 1),
        "arch": platform.machine(),
        "python": platform.python_version(),
    }
