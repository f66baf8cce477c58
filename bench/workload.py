"""A workload is `setup, start, check, metrics`; `run_workload` runs one and reports its figures.

The report: one JSON object or a table on standard output, everything else on standard error; an HTML page and a line of
the history if asked. A figure that was not measured is absent. A broken invariant is named and makes the exit status 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from millpond.bench.bars import BARS
from millpond.bench.history import HISTORY, Comparison, compare, earlier_line, record
from millpond.bench.load import Outcome
from millpond.bench.machine import commit, machine

__all__ = ["Advance", "Evidence", "Series", "Steps", "Workload", "median_of", "ratio", "run_workload"]

#: Where there is no terminal, or a narrow one, the table is rather cut off than wrapped beyond recognition.
_WIDTH_MIN = 160

#: Moves a bar on and shows a note beside it.
Advance = Callable[[float, str], None]


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
            self._progress.update(task, advance=n, note=note or self._progress.tasks[task].fields["note"])

        yield advance
        done = self._progress.tasks[task].completed or 1
        self._progress.update(task, total=done, completed=done)


@dataclass(frozen=True)
class Series:
    """Values over time: of one line of a plot. unit: of the values. slope_per_h: of a line through them."""

    times_s: Sequence[float]
    values: Sequence[float]
    unit: str
    slope_per_h: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What figures were made from, for plots.

    outcomes: by measurement, one for each round. groups: titles to the measurements that stand in one plot; those that
    are in none stand together. series: by title.
    """

    outcomes: Mapping[str, Sequence[Outcome]] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)


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

    @property
    def evidence(self) -> Evidence:
        """What the figures were made from."""

    def close(self) -> None:
        """Stop what was started."""


def run_workload(
    workload: Workload,
    *,
    as_json: bool,
    record_to: Path | None = None,
    html: Path | None = None,
    against: str | None = None,
    history: Path = HISTORY,
) -> int:
    """Run a workload to its end and report; return 0, or 1 if an invariant did not hold.

    record_to: the history that gets a line. html: the page to write. against: an earlier line of `history` to compare
    with, see `earlier_line`; if there is none, that is said before anything runs.
    """
    try:
        line = None if against is None else earlier_line(workload.name, against, history)
    except BaseException:
        workload.close()
        raise
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
    comparison = None if line is None else compare(workload.name, line, figures)
    if as_json:
        printed = figures if comparison is None else {**figures, "against": comparison.as_json()}
        Console(soft_wrap=True).print_json(msgspec.json.encode(printed).decode(), indent=None)
    else:
        _print_table(workload, figures, comparison)
    for broken in wrong:
        steps.console.print(f"[red]invariant broken:[/red] {broken}", highlight=False, soft_wrap=True)
    if record_to is not None and not wrong:
        record(workload.name, figures, record_to)
    if html is not None:
        from millpond.bench.report import html_page

        html.write_text(html_page(workload, figures, wrong, comparison), encoding="utf-8")
        steps.console.print(f"report: {html}", highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def _print_table(workload: Workload, figures: Mapping[str, Any], comparison: Comparison | None) -> None:
    table = Table(title=f"bench {workload.name}", title_justify="left")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", max_width=40)
    table.add_column("bar", no_wrap=True)
    if comparison is not None:
        table.add_column(f"was\n{comparison.what}", max_width=20)
        table.add_column("ratio", no_wrap=True)
    table.add_column("meaning")
    bars = BARS.get(workload.name, {})
    meanings = {**workload.meanings, "seconds": "the whole run", "seed": "of events and ids", "commit": ""}
    for name, meaning in meanings.items():
        if name not in figures:
            continue
        bar = "" if name not in bars else bars[name].judged(figures[name])
        cells = [name, _text(figures[name]), bar]
        if comparison is not None:
            moved = comparison.figures.get(name)
            cells += ["", ""] if moved is None else [_text(moved.old), moved.text]
        table.add_row(*cells, meaning)
    console = Console()
    if console.width < _WIDTH_MIN:
        console = Console(width=_WIDTH_MIN)
    console.print(table)
    if comparison is not None:
        console.print(comparison.about, highlight=False, soft_wrap=True)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {_text(one)}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def median_of(values: list[float], digits: int) -> float:
    return round(median(values), digits)


def ratio(figures: Mapping[str, Any], above: str, below: str) -> float:
    """Return one figure over another; both are of the same run, alternating."""
    return round(float(figures[above]) / float(figures[below]), 3)
