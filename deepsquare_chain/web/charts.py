"""Geometry of the pages' charts. Pure: converts numbers to points and texts; a template draws them.

Drawings are 1000 wide and 100 high, and are stretched to their box. Labels are text of the page, so
that they stay readable on a phone. Colours are CSS classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from deepsquare_chain.job import DAY
from deepsquare_chain.web.formats import axis_time

WIDTH: Final = 1_000
HEIGHT: Final = 100
_TICKS: Final = 3
#: Smaller values count as zero.
_EPSILON: Final = 1e-9
_TIME_TICKS: Final = 4
#: Most rows of a chart's table, its text alternative.
_ROWS: Final = 24
Formatter = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Shape:
    """An SVG path with its CSS class; `points` is its `d` attribute."""

    css: str
    points: str


@dataclass(frozen=True, slots=True)
class ChartSegment:
    """A part of the drawing's width, with its tooltip and CSS class."""

    x: float
    width: float
    text: str
    css: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """One line or layer: its name, its CSS class, and a value at each time."""

    name: str
    css: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart over time; `summary` describes it in words.

    `latest` are the last values of the series. `ticks` are the labels of the value axis from top to
    bottom, `times` those of the time axis. `rows` are the cells of its table.
    """

    summary: str
    series: tuple[Series, ...]
    latest: tuple[str, ...]
    shapes: tuple[Shape, ...]
    tooltips: tuple[ChartSegment, ...]
    ticks: tuple[str, ...]
    times: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def time_chart(
    summary: str,
    times: Sequence[int],
    series: Sequence[Series],
    format_value: Formatter = "{:.0f}".format,
    *,
    stacked: bool = False,
    minimum: float = 0.0,
) -> Chart:
    """Return a chart in steps: a value holds until the next time. Times are in seconds.

    If `stacked`, the series are layers, the first one at the bottom. The value axis goes from zero
    to `minimum`, or further if a value exceeds it.
    """
    span = times[-1] - times[0] if times else 0
    xs = [round((time - times[0]) * WIDTH / span, 1) if span else 0.0 for time in times]
    values = list(zip(*(one.values for one in series), strict=True))
    cells = [tuple(map(format_value, numbers)) for numbers in values]
    labels = [axis_time(time, min(span, DAY)) for time in times]
    peak = max((sum(numbers) if stacked else max(numbers) for numbers in values), default=0.0)
    scale = minimum if peak <= minimum and minimum else axis_end(peak)
    marks = [format_value(scale * step / (_TICKS - 1)) for step in range(_TICKS - 1, -1, -1)]
    tooltips = []
    for x, end, label, numbers, texts in zip(
        xs, [*xs[1:], float(WIDTH)], labels, values, cells, strict=False
    ):
        parts = [f"{series[i].name} {texts[i]}" for i, number in enumerate(numbers) if number]
        text = f"{label}: {', '.join(parts) or 'nothing'}"
        tooltips.append(ChartSegment(x, round(max(end - x, 1.0), 1), text))
    rows = [(label, *texts) for label, texts in zip(labels, cells, strict=True)]
    every = max(1, -(-len(rows) // _ROWS))
    return Chart(
        summary=summary,
        series=tuple(series),
        latest=cells[-1] if cells else ("",) * len(series),
        shapes=_layers(xs, series, scale) if stacked else _lines(xs, series, scale),
        tooltips=tuple(tooltips),
        # Omit ticks that repeat a text, such as `1` for half a CPU.
        ticks=tuple(mark if mark not in marks[:index] else "" for index, mark in enumerate(marks)),
        times=_time_ticks(times, span),
        rows=(*rows[:-1:every], *rows[-1:]),
    )


def _layers(xs: Sequence[float], series: Sequence[Series], scale: float) -> tuple[Shape, ...]:
    shapes, floor = [], [0.0] * len(xs)
    for layer in series:
        top = [below + value for below, value in zip(floor, layer.values, strict=True)]
        if any(layer.values):
            shapes.append(Shape(layer.css, _area(xs, floor, top, scale)))
        floor = top
    return tuple(shapes)


def _lines(xs: Sequence[float], series: Sequence[Series], scale: float) -> tuple[Shape, ...]:
    """Return the lines; a single one has a filled area below."""
    if not xs:
        return ()
    lines = [Shape(line.css, _path(_points(xs, line.values, scale))) for line in series]
    if len(series) == 1:
        lines.insert(0, Shape("fill", _area(xs, [0.0] * len(xs), series[0].values, scale)))
    return tuple(lines)


def axis_end(maximum: float) -> float:
    """Return the end of an axis: 1, 2, 2.5 or 5 times a power of ten, not below `maximum`."""
    if maximum <= _EPSILON:
        return 1.0
    power = 10.0 ** math.floor(math.log10(maximum))
    steps = (power * step for step in (1, 2, 2.5, 5))
    return next((step for step in steps if step >= maximum), power * 10)


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar; `share` is its length between zero and one."""

    name: str
    share: float
    text: str
    href: str = ""

    @property
    def width(self) -> float:
        """Width in units of the drawing, with a visible minimum for nonzero values."""
        share = min(1.0, max(0.0, self.share))
        return round(max(share * WIDTH, 4.0 if share > 0 else 0.0), 1)


@dataclass(frozen=True, slots=True)
class WaterfallStep:
    """A step of a waterfall chart with its colour class; `amount` is credit-wei.

    `x` and `width` are in units of the drawing. Nonzero steps have a visible minimum width.
    """

    name: str
    css: str
    amount: int
    x: float
    width: float


def waterfall(
    flows: Sequence[tuple[str, str, int]], total: tuple[str, str, int]
) -> tuple[WaterfallStep, ...]:
    """Return a step per signed amount (name, class, credit-wei), each from the end of the last.

    The total is the last step, from zero.
    """
    levels = [0, *accumulate(amount for _, _, amount in flows)]
    scale = WIDTH / max(1, total[2], *levels)
    starts = [min(pair) for pair in pairwise(levels)] + [0]
    return tuple(
        WaterfallStep(
            name,
            css,
            amount,
            x=round(start * scale, 1),
            width=round(max(abs(amount) * scale, 3.0), 1) if amount else 0.0,
        )
        for (name, css, amount), start in zip([*flows, total], starts, strict=True)
    )


def timeline(
    segments: Sequence[tuple[str, int, str]], minimum: float = 14.0
) -> tuple[ChartSegment, ...]:
    """Return a strip of (class, seconds, text) segments, wide enough to be visible."""
    total = sum(max(0, seconds) for _, seconds, _ in segments)
    free_width = WIDTH - minimum * len(segments)
    spans, x = [], 0.0
    for css, seconds, text in segments:
        share = max(0, seconds) / total if total else 1 / len(segments)
        width = minimum + free_width * share
        spans.append(ChartSegment(round(x, 1), round(width, 1), text, css))
        x += width
    return tuple(spans)


def _time_ticks(times: Sequence[int], span: int) -> tuple[str, ...]:
    if not times:
        return ()
    texts = [
        axis_time(times[0] + span * step // (_TIME_TICKS - 1), span) for step in range(_TIME_TICKS)
    ]
    return tuple(texts) if len(set(texts)) == len(texts) else (texts[0], texts[-1])


def _corners(xs: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """Return the corners of a step line: a value holds until the next time."""
    corners: list[tuple[float, float]] = []
    for index, (x, value) in enumerate(zip(xs, values, strict=True)):
        if index:
            corners.append((x, values[index - 1]))
        corners.append((x, value))
    if len(xs) == 1 or (xs and xs[0] == xs[-1]):
        corners.append((float(WIDTH), values[-1]))
    return corners


def _points(xs: Sequence[float], values: Sequence[float], scale: float) -> list[str]:
    return [
        f"{x:g} {round(HEIGHT - value * HEIGHT / scale, 2):g}" for x, value in _corners(xs, values)
    ]


def _path(points: Sequence[str]) -> str:
    return "M" + "L".join(points)


def _area(xs: Sequence[float], floor: Sequence[float], top: Sequence[float], scale: float) -> str:
    return _path([*_points(xs, top, scale), *reversed(_points(xs, floor, scale))]) + "Z"
