"""Geometry of the pages' charts. Pure: numbers in, points and texts out; a template draws them.

Drawings are 1000 wide and 100 high and are stretched to their box, so that labels are text of the
page and stay readable on a phone. Colours are classes of the stylesheet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from deepsquare_chain.web.formats import axis_time

WIDTH: Final = 1_000
HEIGHT: Final = 100
_TICKS: Final = 3
#: What is smaller draws as nothing.
_LEAST: Final = 1e-9
_TIME_TICKS: Final = 4
#: Rows of the table that stands for a chart.
_ROWS: Final = 24
Text = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Shape:
    """A path of one class; `points` is the `d` of an SVG path."""

    css: str
    points: str


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of the legend."""

    css: str
    text: str
    value: str


@dataclass(frozen=True, slots=True)
class Band:
    """A column that answers to the pointer with a text."""

    x: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing over time with its table; `summary` says in words what it shows."""

    summary: str
    shapes: tuple[Shape, ...]
    keys: tuple[Key, ...]
    bands: tuple[Band, ...]
    ticks: tuple[str, ...]
    times: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One line or layer: a name for people, a class, and a value at each time."""

    name: str
    css: str
    values: Sequence[float]


def layers(
    summary: str, times: Sequence[int], series: Sequence[Series], show: Text = lambda v: f"{v:.0f}"
) -> Chart:
    """Layers on top of each other, the first at the bottom; steps, since counts do not glide."""
    floor = [0.0] * len(times)
    shapes = []
    xs = _xs(times)
    tops = [sum(each.values[at] for each in series) for at in range(len(times))]
    scale = nice(max(tops, default=0.0))
    for each in series:
        top = [below + value for below, value in zip(floor, each.values, strict=True)]
        if any(each.values):
            shapes.append(Shape(each.css, _ribbon(xs, floor, top, scale)))
        floor = top
    return _chart(summary, times, series, shapes, scale=scale, show=show)


def lines(
    summary: str,
    times: Sequence[int],
    series: Sequence[Series],
    show: Text = lambda v: f"{v:.0f}",
    *,
    least: float = 0.0,
) -> Chart:
    """Lines in steps, each over the same scale from zero, which ends at `least` or above."""
    most = max((max(each.values, default=0.0) for each in series), default=0.0)
    scale = least if most <= least and least else nice(most)
    xs = _xs(times)
    shapes = [Shape(each.css, _steps(xs, each.values, scale)) for each in series if each.values]
    if len(series) == 1 and times:
        zero = [0.0] * len(times)
        shapes.insert(0, Shape("fill", _ribbon(xs, zero, series[0].values, scale)))
    return _chart(summary, times, series, shapes, scale=scale, show=show)


def nice(most: float) -> float:
    """The end of an axis: 1, 2, 2.5 or 5 times a power of ten, not below `most`."""
    if most <= _LEAST:
        return 1.0
    power = 1.0
    while power * 10 <= most:
        power *= 10
    while power > most:
        power /= 10
    steps = (power * step for step in (1, 2, 2.5, 5))
    return next((step for step in steps if step >= most), power * 10)


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of horizontal bars: `share` of the track between zero and one."""

    name: str
    share: float
    text: str
    href: str = ""

    @property
    def width(self) -> float:
        """In units of the drawing; a sliver where there is something at all."""
        share = min(1.0, max(0.0, self.share))
        return round(max(share * WIDTH, 4.0 if share > 0 else 0.0), 1)


@dataclass(frozen=True, slots=True)
class WaterfallStep:
    """A step of a waterfall, from one height to another, in credit-wei; `css` is its colour.

    Sums stand on the ground.
    """

    name: str
    css: str
    amount: int
    start: int
    end: int
    most: int

    @property
    def x(self) -> float:
        """Left edge in units of the drawing."""
        return round(min(self.start, self.end) * WIDTH / self.most, 1) if self.most else 0.0

    @property
    def width(self) -> float:
        """In units of the drawing; a sliver where there is something at all."""
        if not self.most or self.start == self.end:
            return 0.0
        return round(max(abs(self.end - self.start) * WIDTH / self.most, 3.0), 1)


def waterfall(flows: Sequence[tuple[str, str, int]]) -> tuple[WaterfallStep, ...]:
    """Steps of signed amounts (name, class, credit-wei), each where the one before ended."""
    level, reached = 0, 0
    edges = []
    for name, css, amount in flows:
        edges.append((name, css, amount, level, level + amount))
        level += amount
        reached = max(reached, level)
    return tuple(WaterfallStep(*each, most=reached) for each in edges)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a strip: where it begins and how wide it is, and what it says."""

    css: str
    x: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Strip:
    """Stretches of time one after the other; every one stays visible, however short."""

    spans: tuple[Span, ...] = field(default=())


def strip(stretches: Sequence[tuple[str, int, str]], least: float = 14.0) -> Strip:
    """A strip of (class, seconds, text)."""
    total = sum(max(0, seconds) for _, seconds, _ in stretches)
    if not stretches:
        return Strip()
    room = WIDTH - least * len(stretches)
    spans, x = [], 0.0
    for css, seconds, text in stretches:
        share = max(0, seconds) / total if total else 1 / len(stretches)
        width = least + room * share
        spans.append(Span(css, round(x, 1), round(width, 1), text))
        x += width
    return Strip(tuple(spans))


def _chart(
    summary: str,
    times: Sequence[int],
    series: Sequence[Series],
    shapes: Sequence[Shape],
    *,
    scale: float,
    show: Text,
) -> Chart:
    span = times[-1] - times[0] if times else 0
    keys = [
        Key(each.css, each.name, show(each.values[-1]) if each.values else "") for each in series
    ]
    marks = [show(scale * step / (_TICKS - 1)) for step in range(_TICKS - 1, -1, -1)]
    return Chart(
        summary=summary,
        shapes=tuple(shapes),
        keys=tuple(keys),
        bands=_bands(times, series, show, span),
        # Two ticks of the same text would say nothing: one cpu has no half.
        ticks=tuple(mark if mark not in marks[:at] else "" for at, mark in enumerate(marks)),
        times=_time_ticks(times, span),
        columns=("time", *(each.name for each in series)),
        rows=_rows(times, series, show, span),
    )


def _bands(
    times: Sequence[int], series: Sequence[Series], show: Text, span: int
) -> tuple[Band, ...]:
    xs = _xs(times)
    found = []
    for at, time in enumerate(times):
        left = xs[at]
        right = xs[at + 1] if at + 1 < len(xs) else float(WIDTH)
        told = [f"{each.name} {show(each.values[at])}" for each in series if each.values[at]]
        text = f"{axis_time(time, min(span, 86_400))}: {', '.join(told) or 'nothing'}"
        found.append(Band(left, round(max(right - left, 1.0), 1), text))
    return tuple(found)


def _rows(
    times: Sequence[int], series: Sequence[Series], show: Text, span: int
) -> tuple[tuple[str, ...], ...]:
    step = max(1, -(-len(times) // _ROWS))
    picked = sorted({*range(0, len(times), step), *([len(times) - 1] if times else [])})
    return tuple(
        (axis_time(times[at], min(span, 86_400)), *(show(each.values[at]) for each in series))
        for at in picked
    )


def _time_ticks(times: Sequence[int], span: int) -> tuple[str, ...]:
    if not times:
        return ()
    marks = [
        axis_time(times[0] + span * step // (_TIME_TICKS - 1), span) for step in range(_TIME_TICKS)
    ]
    return tuple(marks) if len(set(marks)) == len(marks) else (marks[0], marks[-1])


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
    """A value holds until the next time."""
    found: list[tuple[float, float]] = []
    for at, (x, value) in enumerate(zip(xs, values, strict=True)):
        if at:
            found.append((x, values[at - 1]))
        found.append((x, value))
    if len(xs) == 1 or (xs and xs[0] == xs[-1]):
        found.append((float(WIDTH), values[-1]))
    return found


def _steps(xs: Sequence[float], values: Sequence[float], scale: float) -> str:
    points = (f"{x:g} {_y(value, scale):g}" for x, value in _corners(xs, values))
    return "M" + "L".join(points)


def _ribbon(xs: Sequence[float], floor: Sequence[float], top: Sequence[float], scale: float) -> str:
    there = [f"{x:g} {_y(value, scale):g}" for x, value in _corners(xs, top)]
    back = [f"{x:g} {_y(value, scale):g}" for x, value in reversed(_corners(xs, floor))]
    return "M" + "L".join([*there, *back]) + "Z"
