"""The history of figures, a line of JSON for each run, and how a run compares with an earlier line.

The same code on the same machine gives other figures from run to run. So a figure has moved only if it differs by more
than a band: 1.1 times for ratios of two things measured in one run in turns, 1.3 times for all else, which is by how
much these machines differ from start to start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from millpond.bench.bars import BARS
from millpond.feature_actors.errors import BadRequest, NotFound

__all__ = ["BAND", "HISTORY", "RATIO_BAND", "SETTINGS", "Comparison", "Moved", "compare", "earlier_line", "record"]

HISTORY = Path(__file__).parent / "history.jsonl"
BAND, RATIO_BAND = 1.3, 1.1
_NUMBER_MAX = 9_999
#: What a run was told, and not what it found.
SETTINGS = (
    "measured_seconds", "rounds", "seed", "ids", "arrivals", "durability", "proxy", "shards", "replicas", "slots",
    "worker_niceness", "load_niceness", "load_generator",
)  # fmt: skip
_NOT_COMPARED = {*SETTINGS, "seconds", "minutes", "samples"}
_HIGHER_IS_BETTER, _LOWER_IS_BETTER = ("_per_s", "_per_s_"), ("_ms", "_us", "_s", "_mb", "_bytes", "_mb_per_h")


def record(name: str, figures: Mapping[str, Any], path: Path) -> None:
    """Append a line to the history."""
    line = {"bench": name, "at": datetime.now(UTC).isoformat(timespec="seconds"), **figures}
    with path.open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")


def earlier_line(name: str, which: str, history: Path) -> dict[str, Any]:
    """Return a line of a bench: `1` is the last of the history, `2` the one before it; or the last of a commit, by its
    first characters; or the last of another file, which may be the output of `--json`.

    Raises `BadRequest` if the file cannot be read, `NotFound` if there is no such line.
    """
    path = Path(which)
    if path.is_file():
        lines = [line for line in _read(path) if line.get("bench", name) == name]
        if not lines:
            raise NotFound(f"--against: `{which}` has no line of bench `{name}`")
        return lines[-1]
    lines = [line for line in _read(history) if line.get("bench") == name]
    if which.isdigit() and int(which) <= _NUMBER_MAX:
        if not 1 <= int(which) <= len(lines):
            raise NotFound(
                f"--against {which}: `{history.name}` has {len(lines)} lines of bench `{name}`; 1 is the last of them"
            )
        return lines[-int(which)]
    of_commit = [line for line in lines if str(line.get("commit", "")).startswith(which)]
    if not of_commit:
        commits = ", ".join(f"`{c}`" for c in dict.fromkeys(str(line.get("commit")) for line in lines[-5:])) or "none"
        raise NotFound(
            f"--against: `{which}` is no file, and no line of bench `{name}` is of such a commit; the last: {commits}"
        )
    return of_commit[-1]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        if text.strip():
            try:
                lines.append(msgspec.json.decode(text, type=dict[str, Any]))
            except msgspec.DecodeError as error:
                raise BadRequest(
                    f"--against: line {number} of `{path}` is no JSON object ({error}); a line of the history or the "
                    "output of `millpond bench NAME --json` is expected"
                ) from None
    return lines


@dataclass(frozen=True)
class Moved:
    """A figure, then and now. verdict: "" within the band, else "better", "worse" or "moved" if neither can be said."""

    old: float
    new: float
    verdict: str

    @property
    def ratio(self) -> float | None:
        """new / old; None if old is 0."""
        return round(self.new / self.old, 3) if self.old else None

    @property
    def text(self) -> str:
        return f"{'' if self.ratio is None else self.ratio} {self.verdict}".strip()


@dataclass(frozen=True)
class Comparison:
    """A run beside an earlier line. settings: those that differ, then and now."""

    what: str
    at: str
    figures: Mapping[str, Moved]
    settings: Mapping[str, tuple[Any, Any]]

    @property
    def about(self) -> str:
        told = "".join(f"; {name}: {old} then, {new} now" for name, (old, new) in self.settings.items())
        return (
            f"against {self.what} of {self.at}: marked is what moved by more than {RATIO_BAND} times (ratios within a "
            f"run), {BAND} times (all else){told}"
        )

    def as_json(self) -> dict[str, Any]:
        figures = {
            name: {"old": m.old, "new": m.new, "ratio": m.ratio, "moved": m.verdict} for name, m in self.figures.items()
        }
        settings = {name: list(pair) for name, pair in self.settings.items()}
        bands = {"ratio": RATIO_BAND, "other": BAND}
        return {"commit": self.what, "at": self.at, "bands": bands, "settings": settings, "figures": figures}


def compare(name: str, line: Mapping[str, Any], figures: Mapping[str, Any]) -> Comparison:
    """Compare the numbers that both have."""
    moved = {
        figure: _moved(name, figure, line[figure], value)
        for figure, value in figures.items()
        if figure not in _NOT_COMPARED and _is_number(value) and _is_number(line.get(figure))
    }
    differ = {s: (line[s], figures[s]) for s in SETTINGS if s in line and s in figures and line[s] != figures[s]}
    return Comparison(str(line.get("commit", "unknown")), str(line.get("at", "an unknown time")), moved, differ)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _moved(name: str, figure: str, old: float, new: float) -> Moved:
    band = RATIO_BAND if figure.endswith("_ratio") else BAND
    within = old == new or (old > 0 and new > 0 and 1 / band <= new / old <= band)
    if within:
        return Moved(old, new, "")
    bar = BARS.get(name, {}).get(figure)
    if bar is not None:
        higher: bool | None = bar.how == ">="
    elif any(part in figure for part in _HIGHER_IS_BETTER):
        higher = True
    else:
        higher = False if figure.endswith(_LOWER_IS_BETTER) else None
    return Moved(old, new, "moved" if higher is None else "better" if higher == (new > old) else "worse")
