"""A workload is `setup, start, check, metrics`; `run_workload` runs one and reports its figures.

The report: one JSON object or a table on standard output, everything else on standard error. A figure
that was not measured is absent. A broken invariant is named and makes the exit status 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from millpond.bench.machine import commit, machine

__all__ = ["HISTORY", "Advance", "Steps", "Workload", "median_of", "ratio", "record", "run_workload"]

#: Moves a bar on and shows a note beside it.
Advance = Callable[[float, str], None]

HISTORY = Path(__file__).parent / "history.jsonl"


class Steps:
    """Shows on standard error what is going on."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:28}"),
            BarColumn(24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextmanager
    def step(self, what: str, total: float | None = None) -> Iterator[Advance]:
        """Show a bar while the body runs; it calls `advance(n, note)`."""
        task = self._progress.add_task(what, total=total, note="")

        def advance(n: float, note: str) -> None:
            self._progress.update(task, advance=n, note=note)

        yield advance
        done = self._progress.tasks[task].completed or 1
        self._progress.update(task, total=done, completed=done)


class Workload(Protocol):
    """One thing to measure. `close` is called at the end, whatever happened."""

    name: str
    seed: int
    #: Figure to what it says, in the order of the table.
    meanings: Mapping[str, str]

    def setup(self, steps: Steps) -> None:
        """Start what is measured and load it."""

    def start(self, steps: Steps) -> None:
        """Measure."""

    def check(self, steps: Steps) -> list[str]:
        """Return the invariants that do not hold, each in words; an empty list if all do."""

    def metrics(self) -> dict[str, Any]:
        """Return the figures, by the names of `meanings`."""

    def close(self) -> None:
        """Stop what was started."""


def run_workload(workload: Workload, *, as_json: bool, record_to: Path | None = None) -> int:
    """Run a workload to its end and report; return 0, or 1 if an invariant did not hold."""
    begun = time.perf_counter()
    with Steps() as steps:
        try:
            workload.setup(steps)
            workload.start(steps)
            wrong = workload.check(steps)
        finally:
            with steps.step("stop"):
                workload.close()
    figures = {
        **workload.metrics(),
        "commit": commit(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - begun, 1),
        "seed": workload.seed,
    }
    if as_json:
        Console(soft_wrap=True).print_json(msgspec.json.encode(figures).decode(), indent=None)
    else:
        _print_table(workload, figures)
    for line in wrong:
        steps.console.print(f"[red]invariant broken:[/red] {line}", highlight=False, soft_wrap=True)
    if record_to is not None and not wrong:
        record(workload.name, figures, record_to)
    return 1 if wrong else 0


def _print_table(workload: Workload, figures: Mapping[str, Any]) -> None:
    table = Table("figure", "value", "meaning", title=f"bench {workload.name}", title_justify="left")
    meanings = {**workload.meanings, "seconds": "the whole run", "seed": "of events and ids", "commit": ""}
    for name, meaning in meanings.items():
        if name in figures:
            value = figures[name]
            table.add_row(name, f"{value:,}" if isinstance(value, (int, float)) else str(value), meaning)
    Console().print(table)


def record(name: str, figures: Mapping[str, Any], path: Path) -> None:
    """Append a line to the history."""
    line = {"bench": name, "at": datetime.now(UTC).isoformat(timespec="seconds"), **figures}
    with path.open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")


def median_of(values: list[float], digits: int) -> float:
    return round(median(values), digits)


def ratio(figures: Mapping[str, Any], above: str, below: str) -> float:
    """Return one figure over another; both are of the same run, alternating."""
    return round(float(figures[above]) / float(figures[below]), 3)
