"""Scenarios of `millpond bench` run in their tiny versions, all of their invariants hold, and they report every figure
that they name. Nothing here asks how fast anything is.

The suite has ten minutes: `score` and `soak` by default, all of them with `MILLPOND_EXAMPLES=2` or more.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millpond.bench import mixed, models, score, soak, users
from millpond.bench.history import HISTORY

OF_WRK = {"wrk_32_requests_per_s", "wrk_32_p50_ms", "wrk_32_p99_ms"}
ABOUT_THE_RUN = {"commit", "machine", "seconds", "seed"}
#: What each names and does not measure when it is quick.
NOT_MEASURED: dict[str, set[str]] = {"soak": {"measured_seconds", "rounds"}}
MEANINGS = {"score": score, "mixed": mixed, "scale-users": users, "scale-models": models, "soak": soak}


RUN = ["score", "soak"] if float(os.environ.get("MILLPOND_EXAMPLES", "1")) < 2 else list(MEANINGS)


@pytest.mark.parametrize("scenario", RUN)
def test_quick_run_holds_its_invariants_and_reports_every_figure(scenario: str, tmp_path: Path) -> None:
    recorded = HISTORY.read_bytes()
    page = tmp_path / "page.html"
    command = [
        sys.executable,
        "-m",
        "millpond.cluster.cli",
        "bench",
        scenario,
        "--quick",
        "--json",
        "--html",
        str(page),
    ]
    zipf = ["--ids", "zipf"] if scenario == "mixed" else []
    done = subprocess.run(
        [*command, *zipf, "--draining-period-s", "0"], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    meanings = set(MEANINGS[scenario].MEANINGS)
    assert set(figures) - OF_WRK == meanings - OF_WRK - NOT_MEASURED.get(scenario, set()) | ABOUT_THE_RUN
    assert figures["ids"] == ("zipf 1.1" if zipf else "uniform")
    if scenario in ("mixed", "soak"):
        assert figures["failed_requests"] == 0
        assert figures["acked_events"] > 20_000
    if scenario == "scale-models":
        assert (figures["failed_during_deploys"], figures["deploys"]) == (0, 2)
        assert figures["scores_during_deploys"] > 50
    assert figures["scores_recomputed"] > 0
    # Tiny runs are no figures: the history is as it was.
    assert HISTORY.read_bytes() == recorded
    text = page.read_text()
    assert f"millpond bench {MEANINGS[scenario].__name__.rpartition('.')[2]}" in text
    assert len(re.findall("<polyline", text)) >= 2
    assert not list((tmp_path).glob(".millpond*"))
