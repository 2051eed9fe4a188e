"""Renders the results of an experiment as one HTML file with tables and plots, without scripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Final

from deepsquare_chain.job import DAY
from deepsquare_chain.metascheduler.simulation.experiment import (
    Experiment,
    Measures,
    ResultRow,
    ResultSeries,
)

_COLOURS: Final = (
    *("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#0a7ea4", "#57606a"),
)
#: Styles of lines, for as many schedulers as have a colour each.
_DASHES: Final = (("solid", ""), ("dashed", "6 4"), ("dotted", "2 3"))
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 920, 220, 64, 22
_STYLE: Final = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25rem .4rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap }
th { white-space: normal; vertical-align: bottom }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
svg { width: 100%; height: auto } text { fill: currentColor; font: 12px system-ui, sans-serif }
figure { margin: 1.5rem 0 } figcaption { font-weight: 600 }
.key { display: inline-block; margin-right: 1rem } .key i { display: inline-block; width: 1.4rem; margin-right: .3rem; vertical-align: middle; border-top: .2rem solid }
"""

#: Title of a plot, and its values.
_PLOTS: Final[tuple[tuple[str, Callable[[ResultSeries], Sequence[float]]], ...]] = (
    ("Busy CPUs, part of the grid", lambda series: series.busy),
    ("Waiting jobs", lambda series: series.queued),
    ("Mean wait by time of submission, seconds", lambda series: series.wait),
    ("Mean bounded slowdown by time of submission", lambda series: series.slowdown),
    ("Money, credits per hour", lambda series: series.money),
    ("Power of busy CPUs, watts", lambda series: series.power),
)

#: Title of a column, and its text.
COLUMNS: Final[tuple[tuple[str, Callable[[ResultRow], str]], ...]] = (
    ("scheduler", lambda row: row.scheduler.value),
    ("objective", lambda row: row.mix or "-"),
    ("load", lambda row: f"{row.load:g}"),
    ("block s", lambda row: f"{row.block:g}"),
    ("slowdown", lambda row: f"{row.slowdown:.2f}"),
    ("x SAF", lambda row: number(row.vs_merged_saf)),
    ("x better than least loaded", lambda row: number(row.better_than_least_loaded, 1)),
    ("mean wait s", lambda row: f"{row.wait_mean:.0f}"),
    ("p99 wait x FCFS", lambda row: number(row.wait_p99_vs_fcfs)),
    ("longest wait h", lambda row: f"{row.wait_longest / 3_600:.1f}"),
    ("longest wait x FCFS", lambda row: number(row.wait_longest_vs_fcfs, 1)),
    ("busy", lambda row: f"{row.utilisation:.0%}"),
    ("money of COST", lambda row: change(row.money)),
    ("energy of ENERGY", lambda row: change(row.energy)),
    ("worst / median customer", lambda row: number(row.unfairness, 1)),
)


def number(value: float | None, digits: int = 2) -> str:
    """Format a ratio."""
    return "-" if value is None else f"{value:.{digits}f}"


def change(ratio: float | None) -> str:
    """Format a ratio as a change in per cent."""
    return "-" if ratio is None else f"{ratio - 1:+.1%}"


def render(experiment: Experiment, rows: Sequence[ResultRow], measures: Sequence[Measures]) -> str:
    """Render the page; names from files are escaped."""
    grid, trace = experiment.grid, experiment.trace
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>Simulation of {escape(trace.name)}</title><style>{_STYLE}</style>",
        f"<h1>Simulation of {escape(trace.name)}</h1>",
        (
            f"<p>{len(trace.jobs)} jobs on {len(grid.providers)} clusters with {grid.cpus} CPUs; "
            f"means over seeds (number: {experiment.seeds}), the first 5 % of the jobs left out. "
            "“x SAF” is the bounded slowdown as a multiple of one merged cluster under smallest area "
            "first with EASY backfilling, “x FCFS” of the same under first come, first served. "
            "Money and energy are compared with a choice that is blind to prices and watts.</p>"
        ),
        _table(rows),
    ]
    for load in sorted({row.load for row in rows}):
        parts.append(f"<h2>Load {load:g}, seed 0</h2>")
        named_series = [
            (_name(result), result.series)
            for result in measures
            if result.series is not None and result.case.load == load
        ]
        parts.append(_keys([name for name, _ in named_series]))
        parts += [
            _plot(title, [(name, series.width, pick(series)) for name, series in named_series])
            for title, pick in _PLOTS
        ]
    return "\n".join([*parts, "</html>", ""])


def _name(measures: Measures) -> str:
    case = measures.case
    mix = f", {case.mix}" if case.mix else ""
    return f"{case.scheduler.value}{mix}" + (f", {case.block:g} s blocks" if case.block else "")


def _table(rows: Sequence[ResultRow]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title, _ in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(show(row))}</td>" for _, show in COLUMNS) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _line_style(index: int) -> tuple[str, str, str]:
    """Return colour, CSS line style and dashes of a scheduler's lines."""
    return _COLOURS[index % len(_COLOURS)], *_DASHES[index // len(_COLOURS) % len(_DASHES)]


def _axis_value(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _keys(names: Sequence[str]) -> str:
    keys = []
    for i, name in enumerate(names):
        colour, line_style, _ = _line_style(i)
        keys.append(
            f'<span class="key"><i style="border-top-color:{colour};border-top-style:{line_style}">'
            f"</i>{escape(name)}</span>"
        )
    return f"<p>{''.join(keys)}</p>"


def _plot(title: str, lines: Sequence[tuple[str, float, Sequence[float]]]) -> str:
    """Render a figure with a line for each scheduler and days on the x-axis."""
    maximum = max((max(values) for _, _, values in lines), default=0.0) or 1.0
    days = max((width * len(values) for _, width, values in lines), default=0.0) / DAY or 1.0
    polylines = []
    for i, (name, width, values) in enumerate(lines):
        points = " ".join(
            f"{_LEFT + (_WIDTH - _LEFT) * (at + 0.5) * width / (days * DAY):.1f},"
            f"{_HEIGHT - _HEIGHT * value / maximum:.1f}"
            for at, value in enumerate(values)
        )
        colour, _, dashes = _line_style(i)
        polylines.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dashes}" '
            f'points="{points}"><title>{escape(name)}</title></polyline>'
        )
    marks = "".join(
        f'<text x="{_LEFT - 6}" y="{_HEIGHT - _HEIGHT * part + (12 if part else 0):.0f}" '
        f'text-anchor="end">{_axis_value(maximum * part)}</text>'
        for part in (0.0, 0.5, 1.0)
    )
    times = "".join(
        f'<text x="{_LEFT + (_WIDTH - _LEFT) * part:.0f}" y="{_HEIGHT + 16}" '
        f'text-anchor="{anchor}">day {_axis_value(days * part)}</text>'
        for part, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    )
    axis = (
        f'<path d="M{_LEFT} 0V{_HEIGHT}H{_WIDTH}" fill="none" stroke="currentColor" opacity=".4"/>'
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _BOTTOM}" role="img" aria-label="{escape(title)}">'
        f"{axis}{''.join(polylines)}{marks}{times}</svg></figure>"
    )
