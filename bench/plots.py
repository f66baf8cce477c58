"""Plots as SVG text that stands in a page: colours and fonts come from the page's style, so light and dark both work.

Nothing is drawn that needs a legend inside: `legend` gives it as HTML, which wraps by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

__all__ = ["COLOURS", "latency_plot", "legend", "rounds_plot", "time_plot"]

#: So many colours the page's style has, `.c0` and on; more lines than that repeat them, dashed.
COLOURS = 8
_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 32, 12, 48
_PERCENTILES = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)

Place = Callable[[float], float]


class _Axes:
    """A frame, with the places of values in it."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], *, log_y: bool = False) -> None:
        self.parts: list[str] = []
        (x0, x1), (y0, y1) = x, (math.log10(y[0]), math.log10(y[1])) if log_y else y
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        self.x: Place = lambda v: _LEFT + (v - x0) / (x1 - x0) * width
        scale: Place = math.log10 if log_y else float
        self.y: Place = lambda v: _TOP + (1 - (scale(v) - y0) / (y1 - y0)) * height

    def ticks(self, xs: Sequence[tuple[float, str]], ys: Sequence[tuple[float, str]], x_name: str, y_name: str) -> None:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        for at, text in xs:
            x = self.x(at)
            self.parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>')
            self.parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>')
        for at, text in ys:
            y = self.y(at)
            self.parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            self.parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        middle_x, middle_y = (_LEFT + right) / 2, (_TOP + bottom) / 2
        self.parts.append(
            f'<text class="axis" x="{middle_x}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>'
            f'<text class="axis" transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_name)}</text>"
        )

    def line(self, number: int, points: Sequence[tuple[float, float]], *, extra: str = "") -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{_classes(number)} {extra}" points="{path}"/>')

    def dots(self, number: int, points: Sequence[tuple[float, float]]) -> None:
        for x, y in points:
            self.parts.append(f'<circle class="{_classes(number)}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3"/>')

    def svg(self, title: str) -> str:
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>{''.join(self.parts)}</svg>"
        )


def _classes(number: int) -> str:
    return f"c{number % COLOURS}" + (" dashed" if number >= COLOURS else "")


def legend(names: Sequence[str]) -> str:
    """Return the legend of lines in their order."""
    items = "".join(
        f'<li><svg viewBox="0 0 24 10" aria-hidden="true"><line class="{_classes(i)}" x1="0" y1="5" x2="24" y2="5"/>'
        f"</svg>{escape(name)}</li>"
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def latency_plot(title: str, latencies_ms: Mapping[str, Sequence[float]]) -> str:
    """Draw each latency over the share of requests that took at most that; both scales logarithmic, the shares' so that
    each nine takes as much room."""
    lines = {name: np.sort(np.maximum(np.asarray(values, np.float64), 1e-6)) for name, values in latencies_ms.items()}
    most = max(len(v) for v in lines.values())
    x_max = max(1.0, math.log10(most))
    low, high = min(v[0] for v in lines.values()), max(v[-1] for v in lines.values())
    axes = _Axes((0.0, x_max), (low / 1.15, high * 1.15), log_y=True)
    xs = [(-math.log10(1 - q), f"{q * 100:.10g} %") for q in _PERCENTILES if -math.log10(1 - q) <= x_max]
    axes.ticks(xs, log_ticks(low / 1.15, high * 1.15), "share of the requests that took at most that", "ms")
    for number, values in enumerate(lines.values()):
        n = len(values)
        places = np.linspace(0.0, math.log10(n), 240) if n > 1 else np.zeros(1)
        ranks = np.clip(np.ceil((1 - 10.0**-places) * n).astype(int) - 1, 0, n - 1)
        axes.line(number, list(zip(places.tolist(), values[ranks].tolist(), strict=True)))
    return axes.svg(title)


def rounds_plot(title: str, values: Mapping[str, Sequence[float]], unit: str) -> str:
    """Draw a value of each round, a line for each measurement."""
    rounds = max(map(len, values.values()))
    top = max(max(v) for v in values.values()) * 1.08 or 1.0
    axes = _Axes((0.75, rounds + 0.25), (0.0, top))
    axes.ticks([(r, str(r)) for r in _few(1, rounds)], linear_ticks(0.0, top), "round", unit)
    for number, line in enumerate(values.values()):
        points = list(enumerate(line, start=1))
        axes.line(number, points)
        axes.dots(number, points)
    return axes.svg(title)


def time_plot(
    title: str, times_s: Sequence[float], values: Sequence[float], unit: str, slope_per_h: float | None = None
) -> str:
    """Draw values over time, and the line through them. The scale of the values does not begin at 0."""
    minutes = [t / 60 for t in times_s]
    low, high = min(values), max(values)
    room = max((high - low) * 0.15, abs(high) * 0.005, 1e-9)
    end = max(minutes[-1], 1e-9)
    axes = _Axes((0.0, end), (low - room, high + room))
    axes.ticks(linear_ticks(0.0, end), linear_ticks(low - room, high + room), "minutes", unit)
    axes.line(0, list(zip(minutes, values, strict=True)))
    if slope_per_h is not None:
        middle, mean = sum(minutes) / len(minutes), sum(values) / len(values)
        ends = [(m, mean + (m - middle) / 60 * slope_per_h) for m in (0.0, end)]
        if all(low - room <= y <= high + room for _, y in ends):
            axes.line(1, ends, extra="dashed")
    return axes.svg(title)


def _few(first: int, last: int, most: int = 12) -> list[int]:
    return list(range(first, last + 1, max(1, math.ceil((last - first + 1) / most))))


def linear_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return about five round numbers within bounds.

    >>> linear_ticks(0, 9)
    [(0.0, '0'), (2.0, '2'), (4.0, '4'), (6.0, '6'), (8.0, '8')]
    """
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return [(n * step, f"{n * step:,.10g}") for n in range(first, math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return 1, 2 and 5 of each decade within bounds; only 1 of many decades.

    >>> [text for _, text in log_ticks(0.3, 20)]
    ['0.5', '1', '2', '5', '10', '20']
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 4 else (1,)
    # By division: 3 * 10.0 ** -1 is not 0.3.
    ticks = [step * 10**d if d >= 0 else step / 10**-d for d in decades for step in steps]
    return [(float(t), f"{t:,.10g}") for t in ticks if low <= t <= high]
