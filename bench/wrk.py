"""wrk, if it is installed: a cross-check of the closed loop by a load generator that is not ours.

Source: https://github.com/wg/wrk
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from millpond.bench.load import LoadFailed

__all__ = ["run_wrk", "wrk_figures"]

_SCRIPT = """\
local bodies = {}
for line in io.lines("%s") do bodies[#bodies + 1] = line end
local at = 0
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
function request()
  at = at %% #bodies + 1
  return wrk.format(nil, nil, nil, bodies[at])
end
"""
_UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3}


def run_wrk(url: str, bodies: Sequence[bytes], connections: int, seconds: float) -> dict[str, float] | None:
    """Post the bodies in turn from one thread; return the figures of `wrk_figures`, or None if there is no wrk.

    Raises `LoadFailed` with what it said if it failed.
    """
    program = shutil.which("wrk")
    if program is None:
        return None
    with tempfile.TemporaryDirectory(prefix="millpond-bench-") as folder:
        lines, script = Path(folder) / "bodies.txt", Path(folder) / "post.lua"
        lines.write_bytes(b"\n".join(bodies) + b"\n")
        script.write_text(_SCRIPT % lines)
        done = subprocess.run(
            [program, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency", "-s", str(script), url],
            capture_output=True, text=True, timeout=seconds + 60,
        )  # fmt: skip
    if done.returncode != 0:
        raise LoadFailed(f"wrk: {(done.stderr or done.stdout).strip()[-500:]}")
    return wrk_figures(done.stdout)


def wrk_figures(output: str) -> dict[str, float]:
    """Return requests/s, p50 and p99 in ms, and the number of answers that were not good.

    >>> wrk_figures("  50%  1.50ms\\n  99%  950.00us\\nNon-2xx or 3xx responses: 7\\nRequests/sec:  6543.21\\n")
    {'requests_per_s': 6543.21, 'p50_ms': 1.5, 'p99_ms': 0.95, 'failed': 7}
    """
    rate = re.search(r"^Requests/sec:\s+([\d.]+)", output, re.MULTILINE)
    shares = dict(re.findall(r"^\s+(50|99)%\s+([\d.]+(?:us|ms|s|m))\s*$", output, re.MULTILINE))
    if rate is None or set(shares) != {"50", "99"}:
        raise LoadFailed(f"wrk said something else than expected: {output[-500:]}")
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    socket = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", output)
    figures: dict[str, float] = {"requests_per_s": float(rate[1])}
    for share, text in sorted(shares.items()):
        number, unit = re.fullmatch(r"([\d.]+)(\w+)", text).groups()  # type: ignore[union-attr]
        figures[f"p{share}_ms"] = round(float(number) * _UNITS_MS[unit], 3)
    figures["failed"] = (int(failed[1]) if failed else 0) + sum(map(int, socket.groups() if socket else ()))
    return figures
