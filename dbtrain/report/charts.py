"""Charts as SVG coordinates and labels, computed from numbers. One template draws all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

SMALL, LARGE = (340, 150), (620, 240)
"""Sizes of a chart. Texts have the same size in both."""
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 8, 24
POINTS = 400
"""Most points of a line. A longer line is averaged to this number."""

Point = tuple[float, float]


@dataclass
class Chart:
    """A drawing of width x height units: its bars, lines and ticks, and a sentence that says what it shows."""

    title: str
    summary: str
    y_label: str = ""
    bars: list[dict[str, float | str]] = field(default_factory=list)
    lines: list[dict[str, str]] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    size: tuple[int, int] = SMALL
    left: int = LEFT

    @property
    def right(self) -> int:
        """The right end of the drawing area."""
        return self.size[0] - RIGHT

    @property
    def base(self) -> int:
        """The distance of the horizontal axis from the top."""
        return self.size[1] - BOTTOM

    def x(self, share: float) -> float:
        """The coordinate of a share in [0, 1] of the horizontal axis."""
        return round(LEFT + share * (self.right - LEFT), 1)

    def y(self, share: float) -> float:
        """The coordinate of a share in [0, 1] of the vertical axis, which begins at the bottom."""
        return round(self.base - share * (self.base - TOP), 1)

    def mark(self, low: float, high: float, x_labels: Mapping[float, str], y_low: float, y_high: float) -> Chart:
        """Put ticks at `x_labels` of [low, high] and at round numbers of [y_low, y_high], and return the chart."""
        self.x_ticks = [(self.x((at - low) / ((high - low) or 1)), label) for at, label in x_labels.items()]
        self.y_ticks = [(self.y((at - y_low) / ((y_high - y_low) or 1)), short(at)) for at in nice(y_low, y_high, 5)]
        return self


def bars(
    title: str, edges: Sequence[float], counts: Sequence[float], labels: Mapping[float, str], summary: str, y_label: str
) -> Chart:
    """A histogram: the bar of `counts[i]` goes from `edges[i]` to `edges[i + 1]`; `labels` are the ticks below."""
    top = max([*counts, 1e-12])
    chart = Chart(title, summary, y_label)
    span = edges[-1] - edges[0] or 1.0
    for (low, high), count in zip(pairwise(edges), counts):
        x, end, y = chart.x((low - edges[0]) / span), chart.x((high - edges[0]) / span), chart.y(count / top)
        chart.bars.append({"x": x, "y": y, "w": round(max(end - x - 1, 0.5), 1), "h": round(chart.base - y, 1)})
    chart.mark(edges[0], edges[-1], labels, 0, top)
    chart.y_ticks = [tick for tick in chart.y_ticks if "." not in tick[1]]  # counts are whole numbers
    return chart


def lines(
    title: str,
    series: Mapping[str, Sequence[Point]],
    summary: str,
    y_label: str = "",
    x_labels: Mapping[float, str] | None = None,
    zero: bool = False,
    size: tuple[int, int] = SMALL,
) -> Chart:
    """One line for each named series of finite (x, y), x ascending, all on one scale.

    x_labels: ticks below; None is round numbers. zero: begin the vertical axis at 0.
    """
    points = [point for line in series.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1 = min(xs), max(xs)
    y0, y1 = (0.0 if zero else min(ys)), max(ys)
    pad = (y1 - y0) * 0.06 or abs(y1) * 0.1 or 1.0
    y0, y1 = (y0 if zero else y0 - pad), y1 + pad
    chart = Chart(title, summary, y_label, size=size)
    for name, line in series.items():
        placed = [(chart.x((x - x0) / ((x1 - x0) or 1)), chart.y((y - y0) / (y1 - y0))) for x, y in thin(line, POINTS)]
        path = "M" + "L".join(f"{x:g},{y:g}" for x, y in placed)
        chart.lines.append({"name": name, "path": path if len(placed) > 1 else f"{path}h3"})
    return chart.mark(x0, x1, x_labels if x_labels is not None else {at: short(at) for at in nice(x0, x1, 6)}, y0, y1)


def thin(line: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points, each the mean of an equal part of the line."""
    if len(line) <= most:
        return list(line)
    edges = [i * len(line) // most for i in range(most + 1)]
    parts = [line[low:high] for low, high in pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def nice(low: float, high: float, most: int) -> list[float]:
    """Round numbers in [low, high], about `most`, in steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * digit for digit in (1, 2, 5, 10, 20, 50) if span / (power * digit) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters: 0.25, 40, 12k."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.4g}"
