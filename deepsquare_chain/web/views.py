"""View models: convert results of the index for the page templates. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from deepsquare_chain.audit.bill import Invoice, InvoiceLine, make_invoice, recompute_bill
from deepsquare_chain.audit.entries import ZERO_ADDRESS, JobEntry
from deepsquare_chain.chain.bindings.deployment import ROLE_NAMES, Deployment
from deepsquare_chain.client.transactions import FLAG_TEXTS
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.read_models import (
    EscrowPoint,
    JobDetail,
    MovementRow,
    Place,
    ProviderChange,
    ProviderRow,
    StatusPoint,
    TransitionRow,
    UsePoint,
    Utilisation,
)
from deepsquare_chain.job import HOUR, Hardware, JobFlags, JobStatus, Offer
from deepsquare_chain.web import charts
from deepsquare_chain.web.formats import (
    capacity,
    count,
    duration,
    grouped,
    hardware,
    memory,
    plain_amount,
    words,
)

LIVE: Final = tuple(status for status in JobStatus if status.is_live)
ENDS: Final = (
    JobStatus.FINISHED,
    JobStatus.FAILED,
    JobStatus.OUT_OF_CREDITS,
    JobStatus.CANCELLED,
    JobStatus.PANICKED,
)
_CREDIT: Final = 10**18
_LINE_CLASSES: Final = ("line", "line-2", "line-3", "line-4")


@dataclass(frozen=True, slots=True)
class Stage:
    """A status change, and the seconds in that status; `ongoing` for the current live status."""

    row: TransitionRow
    seconds: int
    ongoing: bool


def stages(rows: Sequence[TransitionRow], now: int) -> tuple[Stage, ...]:
    """Return a job's status changes with durations; the last one is counted until `now`."""
    result = []
    for index, row in enumerate(rows):
        last = index + 1 == len(rows)
        ongoing = last and not row.after.is_final
        until = now if last else rows[index + 1].at.time
        result.append(Stage(row, max(0, until - row.at.time), ongoing))
    return tuple(result)


def timeline(stages: Sequence[Stage]) -> tuple[charts.ChartSegment, ...]:
    """Return the timeline of a job's live statuses as a strip."""
    return charts.timeline(
        [
            (f"f-{stage.row.after.name}", stage.seconds, f"{stage.row.after.name} {_long(stage)}")
            for stage in stages
            if stage.row.after.is_live
        ]
    )


def _long(stage: Stage) -> str:
    return duration(stage.seconds) + (" so far" if stage.ongoing else "")


def flows(detail: JobDetail) -> tuple[charts.WaterfallStep, ...]:
    """Return the credits into and out of the escrow as a waterfall, ending at its current value."""
    row = detail.row
    parts = [
        ("funded", "in", row.funded),
        ("carried in", "carried", detail.carried_in),
        ("paid", "paid", -row.paid),
        ("fee", "fee", -row.fee),
        ("refunded", "back", -row.refunded),
        ("carried out", "carried", -detail.carried_out),
    ]
    steps = charts.waterfall([part for part in parts if part[2]])
    maximum = steps[0].maximum if steps else 0
    # The remaining escrow is a sum: its bar starts at zero.
    return (*steps, charts.WaterfallStep("in escrow", "held", row.escrow, 0, row.escrow, maximum))


def invoice(
    job: JobEntry, movements: Iterable[MovementRow], deployment: Deployment, block: int
) -> Invoice:
    """Return the invoice of an ended job; `block` is the last indexed one.

    Raises:
        UsageError: The job has not ended.
    """
    if not job.status.is_final:
        raise UsageError(
            f"Job {job.id} has not ended, so that there is no invoice yet",
            hint=f"See /jobs/{job.id} for what it has cost so far.",
        )
    lines = (
        (row.account, InvoiceLine(row.at.time, row.kind, row.amount, row.at.tx_hash))
        for row in movements
    )
    return make_invoice(job, recompute_bill(job), deployment, block, lines)


def flags_in_words(flags: JobFlags) -> tuple[str, ...]:
    """Return the descriptions of a job's flags."""
    return tuple(words for flag, words in FLAG_TEXTS.items() if flag in flags)


def load_bars(row: ProviderRow) -> tuple[charts.Bar, ...]:
    """Return the shares of a provider's offer that its live assigned jobs use."""
    load, offer = row.load, row.offer
    return tuple(
        charts.Bar(
            name,
            min(1.0, assigned / offered) if offered else 0.0,
            f"{write(assigned)} of {write(offered)}",
            "",
        )
        for name, assigned, offered, write in (
            ("CPUs", load.cpus, offer.cpus, grouped),
            ("Memory", load.memory, offer.memory, memory),
            ("GPUs", load.gpus, offer.gpus, grouped),
        )
        if offered or assigned
    )


# -- charts of the whole grid


def status_chart(points: Sequence[StatusPoint]) -> charts.Chart:
    """Return a chart of live jobs by status."""
    counts = [sum(point.jobs[status] for status in LIVE) for point in points]
    summary = f"{counts[-1] if counts else 0} now, {max(counts, default=0)} at most"
    return _job_layers(f"Live jobs by status: {summary}.", points, LIVE[::-1])


def ends_chart(points: Sequence[StatusPoint]) -> charts.Chart:
    """Return a chart of all ended jobs by final status."""
    now = sum(points[-1].jobs[status] for status in ENDS) if points else 0
    return _job_layers(f"Ended jobs by result: {count(now, 'job')} so far.", points, ENDS)


def _job_layers(
    summary: str, points: Sequence[StatusPoint], statuses: Sequence[JobStatus]
) -> charts.Chart:
    series = [
        charts.Series(status.name, f"f-{status.name}", [point.jobs[status] for point in points])
        for status in statuses
    ]
    times = [point.time for point in points]
    return charts.time_chart(summary, times, series, _whole, stacked=True)


def _whole(value: float) -> str:
    """Format a count; empty for fractions, because an axis has no mark at half a job."""
    return f"{value:.0f}" if value == int(value) else ""


def escrow_chart(points: Sequence[EscrowPoint]) -> charts.Chart:
    """Return a chart of the credits in escrow."""
    values = [point.escrow / _CREDIT for point in points]
    now = plain_amount(points[-1].escrow) if points else "0"
    series = [charts.Series("in escrow", "line", values)]
    times = [point.time for point in points]
    return charts.time_chart(f"Credits in escrow: {now} now.", times, series, "{:.4g}".format)


def utilisation_chart(
    utilisations: Sequence[Utilisation], names: Mapping[str, str]
) -> charts.Chart:
    """Return a chart of the share of offered CPUs in use, for the busiest providers."""
    busiest = sorted(utilisations, key=lambda usage: -_share(usage.points))[: len(_LINE_CLASSES)]
    series = [
        charts.Series(
            names.get(usage.account, usage.account), css, [p.share * 100 for p in usage.points]
        )
        for usage, css in zip(busiest, _LINE_CLASSES, strict=False)
    ]
    total = _share([point for usage in utilisations for point in usage.points])
    return charts.time_chart(
        f"Offered CPUs in use: {total:.0%} of the time shown.",
        [point.time for point in busiest[0].points] if busiest else [],
        series,
        "{:.0f}\u2009%".format,
        minimum=100.0,
    )


def _share(points: Sequence[UsePoint]) -> float:
    offered = sum(point.offered_seconds for point in points)
    return sum(point.cpu_seconds for point in points) / offered if offered else 0.0


def utilisation_bars(
    utilisations: Sequence[Utilisation], names: Mapping[str, str]
) -> tuple[charts.Bar, ...]:
    """Return the utilisation of providers over the time shown, the busiest first."""
    bars = [
        charts.Bar(
            names.get(utilisation.account, utilisation.account),
            _share(utilisation.points),
            f"{_share(utilisation.points):.0%}",
            f"/providers/{utilisation.account}",
        )
        for utilisation in utilisations
    ]
    return tuple(sorted(bars, key=lambda bar: -bar.share))


def price_chart(history: Sequence[ProviderChange], now: int) -> charts.Chart | None:
    """Return a chart of CPU and GPU prices in credits per hour; None before the first price."""
    price_changes = [change for change in reversed(history) if change.kind == "prices"]
    if not price_changes:
        return None
    rows = [(change.at.time, change.values["prices"]) for change in price_changes]
    rows.append((max(now, rows[-1][0]), rows[-1][1]))
    series = [
        charts.Series(
            f"1 {name.upper()}", css, [prices[name] * HOUR / _CREDIT for _, prices in rows]
        )
        for name, css in (("cpu", "line"), ("gpu", "line-2"))
    ]
    if not any(series[1].values):
        series.pop()
    changes = count(len(price_changes) - 1, "change")
    times = [time for time, _ in rows]
    return charts.time_chart(
        f"Prices in credits per hour: {changes}.", times, series, "{:.4g}".format
    )


# -- a provider's history

_CHALLENGES: Final = frozenset({"challenged", "answered"})
_CHANGES: Final[Mapping[str, str]] = {
    "registered": "Registered",
    "hardware": "Proposed its hardware",
    "approved": "Hardware approved",
    "offer": "Changed its offer",
    "prices": "Changed its prices",
    "labels": "Changed its labels",
    "draining": "Draining",
    "ban": "Ban",
    "challenged": "Challenged",
    "answered": "Answered a challenge",
}


@dataclass(frozen=True, slots=True)
class ProviderHistoryLine:
    """A change of a provider, with the new values by name."""

    at: Place
    title: str
    values: tuple[Field, ...]


def provider_history(
    changes: Sequence[ProviderChange],
) -> tuple[tuple[ProviderHistoryLine, ...], tuple[ProviderHistoryLine, ...]]:
    """Return a provider's changes, and separately its challenges and answers."""
    lines: tuple[list[ProviderHistoryLine], list[ProviderHistoryLine]] = ([], [])
    for change in changes:
        title = _CHANGES.get(change.kind, words(change.kind).capitalize())
        line = ProviderHistoryLine(change.at, title, tuple(_named_values(change.values)))
        lines[change.kind in _CHALLENGES].append(line)
    return tuple(lines[0]), tuple(lines[1])


def _named_values(values: Mapping[str, Any]) -> Iterator[Field]:
    for key, value in values.items():
        match key, value:
            case "hardware", Mapping():
                yield Field("hardware", "text", hardware(Hardware(**value)))
            case "offer", Mapping():
                yield Field("offer", "text", capacity(Offer(**value)))
            case "prices", Mapping():
                yield Field("per CPU-hour", "rate", value["cpu"])
                yield Field("per GB-hour", "rate", value["mem"] * 1_024)
                yield Field("per GPU-hour", "rate", value["gpu"])
            case "labels", Mapping():
                yield from (Field(str(name), "text", text) for name, text in value.items())
            case _:
                yield from (
                    replace(field, path=words(field.path)) for field in fields({key: value})
                )


# -- values of events and calls


#: Kinds of numbers by the names of their fields in events and in the contracts.
_NUMBERS: Final[Sequence[tuple[frozenset[str], str]]] = (
    (frozenset({"amount", "escrow", "paid", "fee", "refunded", "value", "funded"}), "amount"),
    (frozenset({"rate", "cpu", "gpu", "mem"}), "rate"),
    (frozenset({"answer_by", "approved_until", "deadline", "approvedUntil", "since"}), "time"),
    (frozenset({"time_limit", "timeLimit", "billed_seconds", "secondsUsed"}), "seconds"),
    (frozenset({"job_id", "jobId", "job_ids", "jobIds", "successor"}), "job"),
)
_HEX: Final = re.compile(r"0x([0-9a-fA-F]{40}|[0-9a-fA-F]{64})")


_ADDRESS: Final = re.compile(r"\b(0x[0-9a-fA-F]{40})\b")


@dataclass(frozen=True, slots=True)
class Field:
    """A value of a nested structure, with its path.

    `kind` is amount, rate, time, seconds, account, nobody, hash, job, number, flag or text.
    """

    path: str
    kind: str
    value: Any


def link_addresses(text: str) -> tuple[Field, ...]:
    """Split a sentence into texts and addresses, so that pages can link the accounts."""
    parts = _ADDRESS.split(text)
    return tuple(
        Field("", "account" if index % 2 else "text", part)
        for index, part in enumerate(parts)
        if part
    )


def fields(values: Any, path: str = "", maximum: int = 120) -> tuple[Field, ...]:
    """Return the first `maximum` values of a nested structure, in order."""
    result: list[Field] = []
    _collect(values, path, "", result, maximum)
    return tuple(result)


def _collect(value: Any, path: str, name: str, collected: list[Field], maximum: int) -> None:
    if len(collected) >= maximum:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            _collect(item, f"{path}.{key}" if path else str(key), str(key), collected, maximum)
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            _collect(item, f"{path}[{index}]", name, collected, maximum)
    elif isinstance(value, list | tuple):
        collected.append(Field(path, "text", "none"))
    elif name == "role" and value in ROLE_NAMES:
        collected.append(Field(path, "text", ROLE_NAMES[value]))
    else:
        collected.append(Field(path, _kind(name, value), value))


def _kind(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, int):
        return next((kind for names, kind in _NUMBERS if name in names), "number")
    if isinstance(value, str) and (match := _HEX.fullmatch(value)):
        return "nobody" if value == ZERO_ADDRESS else {40: "account", 64: "hash"}[len(match[1])]
    return "text"
