"""Accounts with their statements, and providers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from deepsquare_chain.audit.entries import (
    STATEMENT_COLUMNS,
    MovementKind,
    StatementRow,
    from_attributes,
    statement_cells,
)
from deepsquare_chain.audit.export import csv_header, csv_line
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.queries import Index, TimeRange
from deepsquare_chain.indexer.read_models import MovementRow, Place, ProviderChange, ProviderRow
from deepsquare_chain.job import HOUR, Hardware, Offer
from deepsquare_chain.metascheduler.provider_labels import (
    SpeedEvidence,
    relative_speeds,
    speed_evidence,
)
from deepsquare_chain.web import charts
from deepsquare_chain.web.formats import capacity, clock, count, grouped, hardware, memory, words
from deepsquare_chain.web.lookup import Field, fields
from deepsquare_chain.web.pages.grid import utilisation_chart
from deepsquare_chain.web.site import PageRequest

_CHUNK: Final = 200
_JOBS: Final = 8
#: Shortest run of alike lines that is shown as one line.
_MIN_COMBINED: Final = 4
#: Columns of the CSV: those of `audit statement -o csv`, and two more.
COLUMNS: Final = (*STATEMENT_COLUMNS, "time_utc", "final")


class CombinedMovements(MovementRow):
    """A run of `count` statement lines of one kind and counterparty: the sums, the final balance.

    `at` is the place of the latest line, `first` that of the earliest.
    """

    count: int
    first: Place


def combine_movements(rows: Sequence[MovementRow]) -> list[MovementRow | CombinedMovements]:
    """Combine each run of rows of one kind and counterparty, given latest first."""
    result: list[MovementRow | CombinedMovements] = []
    for _, run in itertools.groupby(rows, lambda r: (r.kind, r.counterparty)):
        run_rows = list(run)
        if len(run_rows) < _MIN_COMBINED:
            result += run_rows
            continue
        result.append(
            from_attributes(
                CombinedMovements,
                run_rows[0],
                count=len(run_rows),
                first=run_rows[-1].at,
                job_id=None,
                debit=sum(row.debit for row in run_rows),
                credit=sum(row.credit for row in run_rows),
            )
        )
    return result


def account(request: Request) -> Response:
    """The page of one account."""
    page = PageRequest(request)
    row = page.index.account(page.argument("account"))
    kind = _kind_of(page)
    listing = page.index.statement(row.address, page.number, period=page.period, kind=kind)
    combined = not kind and page.text("lines") != "all"
    return page.render(
        "account.html",
        row=row,
        listing=listing,
        lines=combine_movements(listing.items) if combined else listing.items,
        jobs=page.index.jobs(limit=_JOBS, customer=row.address),
        kind=kind,
        kinds=list(MovementKind),
    )


def _kind_of(page: PageRequest) -> str | None:
    """Return the chosen kind of movements, None for all. Raises UsageError for an unknown one."""
    return page.choice("kind", list(MovementKind), "kind of movement", "") or None


def statement(request: Request) -> Response:
    """The statement as CSV, oldest first; amounts in credit-wei and in credits.

    The filters of the page apply; without filters, it has all lines.
    """
    page = PageRequest(request)
    account = page.index.account(page.argument("account")).address
    return StreamingResponse(
        _csv_lines(page.index, account, page.period, _kind_of(page)),
        media_type="text/csv; charset=utf-8",
        headers={
            "Content-Disposition": f'attachment; filename="statement-{account}.csv"',
            "Cache-Control": "no-cache",
        },
    )


def _csv_lines(
    index: Index, account: str, period: TimeRange | None, kind: str | None
) -> Iterator[bytes]:
    """Yield the CSV page by page: a statement may be too large for memory."""
    yield csv_header(COLUMNS)
    cursor: str | None = None
    while True:
        page = index.statement(account, cursor, _CHUNK, oldest_first=True, period=period, kind=kind)
        names = index.job_names({row.job_id for row in page.items if row.job_id is not None})
        for row in page.items:
            at, job_id = row.at, row.job_id or 0
            entry = from_attributes(
                StatementRow,
                row,
                **{name: getattr(at, name) for name in ("block", "time", "tx_hash", "log_index")},
                kind=MovementKind(row.kind),
                job_id=job_id,
            )
            cells = statement_cells(entry, names.get(job_id, ""))
            final = "yes" if at.finalized else "no"
            yield csv_line(COLUMNS, (*cells, clock(at.time), final))
        cursor = page.next
        if cursor is None:
            return


# -- providers

_POINTS: Final = 80
_ROWS: Final = 10
#: Sort keys of the list by column.
SORTS: Final[Mapping[str, Callable[[ProviderRow], Any]]] = {
    "provider": lambda row: (row.id is None, row.id or 0),
    "status": lambda row: (not row.active, row.status),
    "used": lambda row: row.figures.cpus_busy,
    "memory": lambda row: row.offer.memory,
    "gpus": lambda row: row.offer.gpus,
    "cpu-price": lambda row: row.prices.cpu,
    "memory-price": lambda row: row.prices.mem,
    "running": lambda row: row.figures.running,
    "ended": lambda row: row.figures.ended,
    "success": lambda row: row.figures.success_rate or 0,
    "earned": lambda row: row.figures.earned,
}


def providers(request: Request) -> Response:
    """The list of all providers."""
    page = PageRequest(request)
    rows = page.index.providers()
    if page.order:
        key = SORTS.get(page.order.removeprefix("-"))
        if key is None:
            raise UsageError(
                f"{page.order!r} is not a sort key of providers",
                hint=f"There are {', '.join(SORTS)}.",
            )
        rows = tuple(sorted(rows, key=key, reverse=page.order.startswith("-")))
    return page.render("providers.html", rows=rows)


def provider(request: Request) -> Response:
    """The page of one provider, by account or ID."""
    page = PageRequest(request)
    index, status, text = page.index, page.status, page.argument("provider")
    is_account = text.startswith("0x")
    detail = index.provider(text if is_account else page.argument_number("provider", "provider"))
    account = detail.row.account
    utilisation = index.utilisation(_POINTS, account=account, since=page.range_start)
    history, challenges = provider_history(detail.history)
    evidence = page.site.cached("speeds", status.change, partial(_speed_evidence, index))
    return page.render(
        "provider.html",
        detail=detail,
        load_bars=load_bars(detail.row),
        utilisation_chart=utilisation_chart(utilisation, {account: "in use"})
        if utilisation
        else None,
        price_chart=price_chart(detail.history, status.time),
        jobs=index.jobs(limit=_ROWS, provider=account),
        settlements=index.settlements(limit=_ROWS, provider=account),
        history=history,
        challenges=challenges,
        evidence=evidence.get(account),
    )


def _speed_evidence(index: Index) -> Mapping[str, SpeedEvidence]:
    """Return measured run times against claimed speeds, by account of the provider."""
    rows = index.providers()
    speeds = relative_speeds([row.labels for row in rows])
    claimed = {row.account: speed for row, speed in zip(rows, speeds, strict=True)}
    return speed_evidence(index.measured_runs(), claimed)


# -- load, prices and history of a provider


def load_bars(row: ProviderRow) -> tuple[charts.Bar, ...]:
    """Return the shares of a provider's offer that its live assigned jobs use."""
    load, offer = row.load, row.offer
    amounts = (
        ("CPUs", load.cpus, offer.cpus, grouped),
        ("Memory", load.memory, offer.memory, memory),
        ("GPUs", load.gpus, offer.gpus, grouped),
    )
    return tuple(
        charts.Bar(
            name, assigned / offered if offered else 0.0, f"{text(assigned)} of {text(offered)}"
        )
        for name, assigned, offered, text in amounts
        if offered or assigned
    )


def price_chart(history: Sequence[ProviderChange], now: int) -> charts.Chart | None:
    """Return a chart of CPU and GPU prices in credits per hour; None before the first price."""
    price_changes = [change for change in reversed(history) if change.kind == "prices"]
    if not price_changes:
        return None
    rows = [(change.at.time, change.values["prices"]) for change in price_changes]
    rows.append((max(now, rows[-1][0]), rows[-1][1]))
    series = [
        charts.Series(
            f"1 {name.upper()}", css, [prices[name] * HOUR / CREDIT for _, prices in rows]
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


_CHALLENGES: Final = frozenset({"challenged", "answered"})
#: Titles of changes whose kind does not say enough.
_CHANGES: Final[Mapping[str, str]] = {
    "hardware": "Proposed its hardware",
    "approved": "Hardware approved",
    "offer": "Changed its offer",
    "prices": "Changed its prices",
    "labels": "Changed its labels",
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
    history: list[ProviderHistoryLine] = []
    challenges: list[ProviderHistoryLine] = []
    for change in changes:
        title = _CHANGES.get(change.kind, words(change.kind).capitalize())
        line = ProviderHistoryLine(change.at, title, tuple(_named_values(change.values)))
        (challenges if change.kind in _CHALLENGES else history).append(line)
    return tuple(history), tuple(challenges)


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
