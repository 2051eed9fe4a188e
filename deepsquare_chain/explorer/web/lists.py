"""Home, lists and search."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote, urlencode

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import UsageError
from deepsquare_chain.explorer.index.rows import EscrowPoint, Hit, StatusPoint, Utilisation
from deepsquare_chain.explorer.web import charts, texts
from deepsquare_chain.explorer.web.site import Site
from deepsquare_chain.job import JobStatus

#: From the bottom of the chart to its top: what ended, then what lives.
DRAWN: Final = (
    JobStatus.FINISHED,
    JobStatus.FAILED,
    JobStatus.OUT_OF_CREDITS,
    JobStatus.CANCELLED,
    JobStatus.PANICKED,
    JobStatus.RUNNING,
    JobStatus.SCHEDULED,
    JobStatus.META_SCHEDULED,
    JobStatus.PENDING,
)
_LATEST: Final = 8
_TABLE_ROWS: Final = 13
_PATHS: Final = {
    "job": "/jobs/",
    "account": "/accounts/",
    "provider": "/providers/",
    "transaction": "/transactions/",
    "block": "/blocks/",
}


async def home(site: Site, request: Request) -> Response:
    """The grid at a glance."""
    index = site.index
    grid, by_status, escrow, use, jobs, settled = await asyncio.gather(
        site.ask(index.overview),
        site.ask(index.jobs_by_status_over_time, 72),
        site.ask(index.escrow_over_time, 72),
        site.ask(index.utilisation, 24),
        site.ask(index.jobs, limit=_LATEST),
        site.ask(index.latest_settlements, _LATEST),
    )
    legend = [(each.name, grid.jobs[each]) for each in DRAWN if grid.jobs[each]]
    return await site.page(
        request,
        "home.html",
        grid=grid,
        legend=legend,
        status_chart=_status_chart(by_status),
        **_status_table(by_status),
        use_chart=_use_chart(use, await _provider_names(site)),
        escrow_chart=_escrow_chart(escrow),
        escrow_rows=[
            (texts.moment(p.time), *(texts.credits(each) for each in (p.escrow, p.paid, p.fees)))
            for p in _thinned(escrow)
        ],
        jobs=jobs.items,
        settlements=settled,
    )


def _status_chart(points: Sequence[StatusPoint]) -> Markup:
    series = [
        charts.Series(each.name, [point.jobs.get(each, 0) for point in points], f"f-{each.name}")
        for each in DRAWN
    ]
    return charts.stacked([p.time for p in points], series, title="Jobs by status over time")


def _status_table(points: Sequence[StatusPoint]) -> dict[str, Any]:
    shown = [each for each in DRAWN if any(point.jobs.get(each) for point in points)]
    rows = [
        (texts.moment(point.time), *(point.jobs.get(each, 0) for each in shown))
        for point in _thinned(points)
    ]
    return {
        "status_rows": rows if shown else [],
        "status_head": ("Time (UTC)", *(each.name for each in shown)),
    }


def _escrow_chart(points: Sequence[EscrowPoint]) -> Markup:
    if not points:
        return Markup("")
    values = [point.escrow / CREDIT for point in points]  # for the eye alone
    series = [charts.Series("credits in escrow", values, "line")]
    return charts.lines([p.time for p in points], series, title="Credits in escrow over time")


def _use_chart(use: Sequence[Utilisation], names: dict[str, str]) -> Markup:
    rows = []
    for each in use:
        used = sum(point.cpu_seconds for point in each.points)
        offered = sum(point.offered_seconds for point in each.points)
        if offered:
            share = used / offered
            text = f"{texts.percent(share)} of {texts.duration(offered)}"
            rows.append((names.get(each.account, texts.short(each.account)), share, text))
    return charts.bars(rows, title="Utilisation by provider")


async def _provider_names(site: Site) -> dict[str, str]:
    rows = await site.ask(site.index.providers)
    return {row.account: f"provider {row.id}" for row in rows if row.id is not None}


def _thinned(points: Sequence[Any]) -> list[Any]:
    """Every few points and the last, for a table that people read."""
    step = max(1, len(points) // _TABLE_ROWS)
    return [*points[:-1:step], *points[-1:]]


async def jobs(site: Site, request: Request) -> Response:
    """Jobs by status, customer, provider or name."""
    asked = request.query_params
    known = {each.name: each for each in JobStatus if each is not JobStatus.NONE}
    chosen = asked.get("status", "")
    if chosen and chosen not in known:
        raise UsageError(f"{chosen[:40]!r} is no status of a job")
    page = await site.ask(
        site.index.jobs,
        asked.get("cursor"),
        statuses=[known[chosen]] if chosen else [],
        customer=asked.get("customer"),
        provider=asked.get("provider"),
        name=asked.get("name"),
    )
    kept = {key: value for key, value in asked.items() if key != "cursor" and value}
    return await site.page(
        request,
        "jobs.html",
        page=page,
        statuses=list(known.values()),
        chosen=chosen,
        cursor=asked.get("cursor"),
        base="/jobs" + (f"?{urlencode(kept)}" if kept else ""),
    )


async def providers(site: Site, request: Request) -> Response:
    """All providers."""
    return await site.page(request, "providers.html", rows=await site.ask(site.index.providers))


async def transactions(site: Site, request: Request) -> Response:
    """Transactions of the grid."""
    cursor = request.query_params.get("cursor")
    page = await site.ask(site.index.transactions, cursor)
    return await site.page(request, "transactions.html", page=page, cursor=cursor)


async def blocks(site: Site, request: Request) -> Response:
    """Blocks with events of the grid."""
    cursor = request.query_params.get("cursor")
    page = await site.ask(site.index.blocks, cursor)
    return await site.page(request, "blocks.html", page=page, cursor=cursor)


async def block(site: Site, request: Request) -> Response:
    """One block."""
    which = request.path_params["which"]
    plain = which.isascii() and which.isdigit() and len(which) < 16
    found = await site.ask(site.index.block, int(which) if plain else which)
    return await site.page(request, "block.html", block=found, row=found.row)


async def search(site: Site, request: Request) -> Response:
    """Leads straight to the one thing that was meant, else lists what may be."""
    query = request.query_params.get("q", "").strip()[:200]
    hits = await site.ask(site.index.search, query) if query else ()
    if len(hits) == 1:
        return RedirectResponse(path_of(hits[0]), 303)
    return await site.page(request, "search.html", query=query, hits=hits, path_of=path_of)


def path_of(hit: Hit) -> str:
    """The page of something that was found."""
    return _PATHS[hit.kind] + quote(hit.key, safe="")
