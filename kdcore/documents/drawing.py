"""The geometry of the report's drawings: plain numbers, of which the template makes SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from base.wire import ReliabilityBin

WIDTH, HEIGHT = 270, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 26
"""Margins around the plotted area, in pixels."""
SIDE = 190
"""Of a reliability diagram."""
LARGEST_DOT = 11
"""The radius of a bin that has all images."""
SPAN_WIDTH = 360
TICKS = 4

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    at: float
    """In pixels."""
    label: str


@dataclass(frozen=True)
class Line:
    name: str
    points: str
    """As an SVG polyline has them."""
    marks: Sequence[Point]
    """The points themselves, where there are so few that a line alone would not show them."""


@dataclass(frozen=True)
class Chart:
    """Lines over steps, or whatever else `x` counts."""

    title: str
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP


Dot = tuple[float, float, float]
"""A bin's mean confidence and accuracy as the centre of a circle, and its radius: the area is its share of the
images."""


@dataclass(frozen=True)
class Reliability:
    """Accuracy over confidence; the diagonal is perfect calibration."""

    bars: Sequence[tuple[float, float, float, float]]
    """Left, top, width and height of each bin's accuracy."""
    before: Sequence[Dot]
    after: Sequence[Dot]
    """With the fitted temperature; empty without one."""
    side: int = SIDE


@dataclass(frozen=True)
class Span:
    """A value with its interval, on a line that has zero on it."""

    low: float
    value: float
    high: float
    zero: float
    ticks: Sequence[Tick]
    width: int = SPAN_WIDTH


def line_chart(title: str, series: Mapping[str, Sequence[Point]], unit: str = "") -> Chart | None:
    """Return a chart of series by name; None if they have no points. `unit`: "%" for values of 0 to 1."""
    points = [point for one in series.values() for point in one]
    if not points:
        return None
    x_low, x_high = _range(x for x, _ in points)
    y_low, y_high = _range(y for _, y in points)
    x_ticks, y_ticks = ticks(x_low, x_high), ticks(y_low, y_high)
    y_low, y_high = min(y_low, *y_ticks), max(y_high, *y_ticks)

    def place(point: Point) -> Point:
        across = (point[0] - x_low) / (x_high - x_low)
        up = (point[1] - y_low) / (y_high - y_low)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1
        )

    lines = []
    for name, one in series.items():
        placed = [place(point) for point in one]
        lines.append(Line(name, " ".join(f"{x},{y}" for x, y in placed), placed if len(placed) <= 30 else ()))
    return Chart(
        title,
        lines,
        [Tick(place((x, y_low))[0], f"{x:,.10g}") for x in x_ticks],
        [Tick(place((x_low, y))[1], f"{100 * y:.6g} %" if unit == "%" else f"{y:.6g}") for y in y_ticks],
    )


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Return round numbers between two bounds, about so many: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.75 * rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def reliability(before: Sequence[ReliabilityBin], after: Sequence[ReliabilityBin] | None) -> Reliability:
    """Return a reliability diagram of bins of equal width."""
    width = SIDE / len(before)
    bars = [
        (
            round(number * width, 1),
            round(SIDE - one["accuracy"] * SIDE, 1),
            round(width, 1),
            round(one["accuracy"] * SIDE, 1),
        )
        for number, one in enumerate(before)
        if one["accuracy"] is not None
    ]
    return Reliability(bars, _dots(before), _dots(after or ()))


def _dots(bins: Sequence[ReliabilityBin]) -> list[Dot]:
    images = sum(one["images"] for one in bins)
    return [
        (
            round(one["confidence"] * SIDE, 1),
            round(SIDE - one["accuracy"] * SIDE, 1),
            round(max(1.5, LARGEST_DOT * math.sqrt(one["images"] / images)), 1),
        )
        for one in bins
        if one["accuracy"] is not None and one["confidence"] is not None
    ]


def span(low: float, value: float, high: float, bounds: Point) -> Span:
    """Return an interval on a line from a bound to another one, both widened to what the interval needs."""
    least, most = min(bounds[0], low), max(bounds[1], high)

    def place(number: float) -> float:
        return round(10 + (number - least) / (most - least) * (SPAN_WIDTH - 20), 1)

    marks = [Tick(place(at), f"{100 * at:.6g}") for at in ticks(least, most)]
    return Span(place(low), place(value), place(high), place(0.0), marks)


def _range(values: Iterable[float]) -> Point:
    listed = [value for value in values if math.isfinite(value)]
    low, high = min(listed), max(listed)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
