"""One page about a run: what was asked of it, its figures beside their bars, and plots. It needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from millpond.bench.bars import BARS
from millpond.bench.history import SETTINGS, Comparison
from millpond.bench.plots import COLOURS, latency_plot, legend, rounds_plot, time_plot
from millpond.bench.workload import Evidence, Workload

__all__ = ["html_page"]

_OF_THE_RUN = ("commit", "machine", "seconds", *SETTINGS)
_LINES_MAX = COLOURS


def html_page(
    workload: Workload, figures: Mapping[str, Any], wrong: Sequence[str], comparison: Comparison | None
) -> str:
    """Return the page of a run."""
    bars = BARS.get(workload.name, {})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    rows = []
    for name, meaning in workload.meanings.items():
        if name in figures and name not in SETTINGS:
            bar = bars.get(name)
            holds = None if bar is None else bar.holds(figures[name])
            moved = None if comparison is None else comparison.figures.get(name)
            rows.append(
                {
                    "name": name, "value": _text(figures[name]), "meaning": meaning, "holds": holds,
                    "bar": "" if bar is None else str(bar), "was": "" if moved is None else _text(moved.old),
                    "ratio": "" if moved is None or moved.ratio is None else f"{moved.ratio:g}",
                    "verdict": "" if moved is None else moved.verdict,
                }
            )  # fmt: skip
    return template.render(
        name=workload.name,
        about=(type(workload).__doc__ or "").partition("\n")[0],
        at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        run={name.replace("_", " "): _text(figures[name]) for name in _OF_THE_RUN if name in figures},
        rows=rows,
        held=[row for row in rows if row["bar"]],
        wrong=list(wrong),
        comparison=comparison,
        plots=_plots(workload.evidence),
    )


def _plots(evidence: Evidence) -> list[dict[str, Any]]:
    """Return plots, each with its title and legend."""
    plots = []
    for group, names in _groups(evidence).items():
        pooled = {n: [ns / 1e6 for o in evidence.outcomes[n] for ns in o.latencies_ns] for n in names}
        pooled = {n: values for n, values in pooled.items() if values}
        if pooled:
            title = f"Latency: {group}" if group else "Latency"
            plots.append(_plot(title, latency_plot(title, pooled), legend(list(pooled))))
        rates = {n: [o.requests_per_s for o in evidence.outcomes[n]] for n in names}
        if any(len(values) > 1 for values in rates.values()):
            title = f"Requests a second, by round: {group}" if group else "Requests a second, by round"
            plots.append(_plot(title, rounds_plot(title, rates, "requests/s"), legend(list(rates))))
    for title, one in evidence.series.items():
        names = [title] if one.slope_per_h is None else [title, f"line through it: {one.slope_per_h:+.2f} {one.unit}/h"]
        svg = time_plot(title, one.times_s, one.values, one.unit, one.slope_per_h)
        plots.append(_plot(title, svg, legend(names)))
    return plots


def _groups(evidence: Evidence) -> dict[str, list[str]]:
    """Return which measurements stand in one plot: as the workload says, the others together, no more than can be told
    apart."""
    grouped = {title: [n for n in names if n in evidence.outcomes] for title, names in evidence.groups.items()}
    others = [n for n in evidence.outcomes if not any(n in names for names in grouped.values())]
    for at in range(0, len(others), _LINES_MAX):
        title = "others" if evidence.groups else ""
        grouped[title if at == 0 else f"{title}, {1 + at // _LINES_MAX}"] = others[at : at + _LINES_MAX]
    return {title: names for title, names in grouped.items() if names}


def _plot(title: str, svg: str, its_legend: str) -> dict[str, Any]:
    return {"title": title, "svg": Markup(svg), "legend": Markup(its_legend)}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
