"""Geometry of the pages' charts. Pure: converts numbers to points and texts; a template draws them.

Drawings are 1000 wide and 100 high, and are stretched to their box. Labels are text of the page, so
that they stay readable on a phone. Colours are CSS classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
class LegendEntry:
    """An entry of the legend."""

    css: str
    text: str
    value: str


@dataclass(frozen=True, slots=True)
class TooltipColumn:
    """A column with a tooltip."""

    x: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart over time with its table; `summary` describes it in words."""

    summary: str
    shapes: tuple[Shape, ...]
    legend: tuple[LegendEntry, ...]
    tooltips: tuple[TooltipColumn, ...]
    ticks: tuple[str, ...]
    times: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One line or layer: its name, its CSS class, and a value at each time."""

    name: str
    css: str
    values: Sequence[float]


def layers(
    summary: str,
    times: Sequence[int],
    series: Sequence[Series],
    format_value: Formatter = lambda v: f"{v:.0f}",
) -> Chart:
    """Return a stacked chart, the first series at the bottom, in steps: values are counts."""
    floor = [0.0] * len(times)
    shapes = []
    xs = _xs(times)
    tops = [sum(layer.values[index] for layer in series) for index in range(len(times))]
    scale = axis_end(max(tops, default=0.0))
    for layer in series:
        top = [below + value for below, value in zip(floor, layer.values, strict=True)]
        if any(layer.values):
            shapes.append(Shape(layer.css, _ribbon(xs, floor, top, scale)))
        floor = top
    return _chart(summary, times, series, shapes, scale=scale, format_value=format_value)


def lines(
    summary: str,
    times: Sequence[int],
    series: Sequence[Series],
    format_value: Formatter = lambda v: f"{v:.0f}",
    *,
    minimum: float = 0.0,
) -> Chart:
    """Return a chart of step lines; the axis starts at zero and ends at `minimum` or above."""
    maximum = max((max(line.values, default=0.0) for line in series), default=0.0)
    scale = minimum if maximum <= minimum and minimum else axis_end(maximum)
    xs = _xs(times)
    shapes = [Shape(line.css, _steps(xs, line.values, scale)) for line in series if line.values]
    if len(series) == 1 and times:
        zero = [0.0] * len(times)
        shapes.insert(0, Shape("fill", _ribbon(xs, zero, series[0].values, scale)))
    return _chart(summary, times, series, shapes, scale=scale, format_value=format_value)


def axis_end(maximum: float) -> float:
    """Return the end of an axis: 1, 2, 2.5 or 5 times a power of ten, not below `maximum`."""
    if maximum <= _EPSILON:
        return 1.0
    power = 1.0
    while power * 10 <= maximum:
        power *= 10
    while power > maximum:
        power /= 10
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
    """A step of a waterfall chart, from `start` to `end` in credit-wei; `css` is its colour class.

    Sums start at zero.
    """

    name: str
    css: str
    amount: int
    start: int
    end: int
    maximum: int

    @property
    def x(self) -> float:
        """Left edge in units of the drawing."""
        return round(min(self.start, self.end) * WIDTH / self.maximum, 1) if self.maximum else 0.0

    @property
    def width(self) -> float:
        """Width in units of the drawing, with a visible minimum for nonzero values."""
        if not self.maximum or self.start == self.end:
            return 0.0
        return round(max(abs(self.end - self.start) * WIDTH / self.maximum, 3.0), 1)


def waterfall(flows: Sequence[tuple[str, str, int]]) -> tuple[WaterfallStep, ...]:
    """Return a step per signed amount (name, class, credit-wei), each from the end of the last."""
    level, peak = 0, 0
    edges = []
    for name, css, amount in flows:
        edges.append((name, css, amount, level, level + amount))
        level += amount
        peak = max(peak, level)
    return tuple(WaterfallStep(*edge, maximum=peak) for edge in edges)


@dataclass(frozen=True, slots=True)
class TimelineSegment:
    """A segment of a strip: its start, width and text."""

    css: str
    x: float
    width: float
    text: str


def timeline(
    segments: Sequence[tuple[str, int, str]], minimum: float = 14.0
) -> tuple[TimelineSegment, ...]:
    """Return a strip of (class, seconds, text) segments, wide enough to be visible."""
    total = sum(max(0, seconds) for _, seconds, _ in segments)
    free_width = WIDTH - minimum * len(segments)
    spans, x = [], 0.0
    for css, seconds, text in segments:
        share = max(0, seconds) / total if total else 1 / len(segments)
        width = minimum + free_width * share
        spans.append(TimelineSegment(css, round(x, 1), round(width, 1), text))
        x += width
    return tuple(spans)


def _chart(
    summary: str,
    times: Sequence[int],
    series: Sequence[Series],
    shapes: Sequence[Shape],
    *,
    scale: float,
    format_value: Formatter,
) -> Chart:
    span = times[-1] - times[0] if times else 0
    legend = [
        LegendEntry(curve.css, curve.name, format_value(curve.values[-1]) if curve.values else "")
        for curve in series
    ]
    texts = [format_value(scale * step / (_TICKS - 1)) for step in range(_TICKS - 1, -1, -1)]
    return Chart(
        summary=summary,
        shapes=tuple(shapes),
        legend=tuple(legend),
        tooltips=_tooltips(times, series, format_value, span),
        # Omit ticks that repeat a text, such as `1` for half a CPU.
        ticks=tuple(mark if mark not in texts[:index] else "" for index, mark in enumerate(texts)),
        times=_time_ticks(times, span),
        columns=("time", *(curve.name for curve in series)),
        rows=_rows(times, series, format_value, span),
    )


def _tooltips(
    times: Sequence[int], series: Sequence[Series], format_value: Formatter, span: int
) -> tuple[TooltipColumn, ...]:
    xs = _xs(times)
    tooltips = []
    for index, time in enumerate(times):
        left = xs[index]
        right = xs[index + 1] if index + 1 < len(xs) else float(WIDTH)
        texts = [
            f"{curve.name} {format_value(curve.values[index])}"
            for curve in series
            if curve.values[index]
        ]
        text = f"{axis_time(time, min(span, DAY))}: {', '.join(texts) or 'nothing'}"
        tooltips.append(TooltipColumn(left, round(max(right - left, 1.0), 1), text))
    return tuple(tooltips)


def _rows(
    times: Sequence[int], series: Sequence[Series], format_value: Formatter, span: int
) -> tuple[tuple[str, ...], ...]:
    step = max(1, -(-len(times) // _ROWS))
    indexes = sorted({*range(0, len(times), step), *([len(times) - 1] if times else [])})
    return tuple(
        (
            axis_time(times[index], min(span, DAY)),
            *(format_value(curve.values[index]) for curve in series),
        )
        for index in indexes
    )


def _time_ticks(times: Sequence[int], span: int) -> tuple[str, ...]:
    if not times:
        return ()
    texts = [
        axis_time(times[0] + span * step // (_TIME_TICKS - 1), span) for step in range(_TIME_TICKS)
    ]
    return tuple(texts) if len(set(texts)) == len(texts) else (texts[0], texts[-1])


def _xs(times: Sequence[int]) -> list[float]:
    if not times:
        return []
    span = times[-1] - times[0]
    if not span:
        return [0.0] * len(times)
    return [round((time - times[0]) * WIDTH / span, 1) for time in times]


def _y(value: float, scale: float) -> float:
    return round(HEIGHT - value * HEIGHT / scale, 2)


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


def _steps(xs: Sequence[float], values: Sequence[float], scale: float) -> str:
    points = (f"{x:g} {_y(value, scale):g}" for x, value in _corners(xs, values))
    return "M" + "L".join(points)


def _ribbon(xs: Sequence[float], floor: Sequence[float], top: Sequence[float], scale: float) -> str:
    upper = [f"{x:g} {_y(value, scale):g}" for x, value in _corners(xs, top)]
    lower = [f"{x:g} {_y(value, scale):g}" for x, value in reversed(_corners(xs, floor))]
    return "M" + "L".join([*upper, *lower]) + "Z"
