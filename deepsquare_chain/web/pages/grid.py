"""The pages of the whole grid: home with its charts, search, audit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from web3.exceptions import Web3Exception

from deepsquare_chain.audit.anomalies import Subject
from deepsquare_chain.audit.conservation import NodeRequest, Side, call, owed_terms
from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import GridError
from deepsquare_chain.indexer.queries import HASH, LIVE, MAX_HITS, NUMBER
from deepsquare_chain.indexer.read_models import (
    EscrowPoint,
    Hit,
    Overview,
    StatusPoint,
    UsePoint,
    Utilisation,
)
from deepsquare_chain.job import JobStatus
from deepsquare_chain.web import charts
from deepsquare_chain.web.formats import count, plain_amount
from deepsquare_chain.web.lookup import read_block, read_transaction
from deepsquare_chain.web.site import PageRequest

_POINTS = 80
_LATEST = 8


def home(request: Request) -> Response:
    """The home page."""
    page = PageRequest(request)
    index, status = page.index, page.status
    # Cached: after a change, all open pages reload at the same time.
    charts = page.site.cached(
        f"home {page.time_range}", (status.change, status.block), lambda: _charts(page)
    )
    return page.render(
        "home.html",
        overview=index.overview(),
        **charts,
        jobs=index.jobs(limit=_LATEST),
        settlements=index.settlements(limit=_LATEST),
    )


def _charts(page: PageRequest) -> dict[str, Any]:
    index, since = page.index, page.range_start
    names = {account: name.text for account, name in page.site.names(page.status.change).items()}
    use = index.utilisation(_POINTS // 2, since=since)
    points = index.jobs_by_status_over_time(_POINTS, since=since)
    return {
        "live_chart": status_chart(points),
        "ends_chart": ends_chart(points),
        "escrow_chart": escrow_chart(index.escrow_over_time(_POINTS, since=since)),
        "utilisation_chart": utilisation_chart(use, names),
        "utilisation_bars": utilisation_bars(use, names),
    }


async def search(request: Request) -> Response:
    """Search results for a text; a single result redirects to its page."""
    page = PageRequest(request)
    text = page.query.get("q", "").strip()[:200]
    hits = await run_in_threadpool(page.index.search, text)
    hits = hits or await _search_node(page.site.contracts, text.lower())
    if len(hits) == 1:
        return RedirectResponse(url_of(hits[0]), status_code=303)
    rows = await run_in_threadpool(page.index.jobs, limit=MAX_HITS, name=text[:64])
    statuses = {str(row.id): row.status for row in rows.items}
    results = [(hit, url_of(hit), statuses.get(hit.key)) for hit in hits]
    return await run_in_threadpool(
        page.render, "search.html", text=text, hits=results, max_hits=MAX_HITS
    )


async def _search_node(contracts: Contracts, text: str) -> tuple[Hit, ...]:
    """Search the node for blocks and transactions without events of this grid."""
    number, digits = NUMBER.fullmatch(text), HASH.fullmatch(text)
    if number and await read_block(contracts, int(number[1])):
        return (Hit("block", number[1], f"block {number[1]}"),)
    if not digits:
        return ()
    key = "0x" + digits[1]
    if await read_transaction(contracts, key) is not None:
        return (Hit("transaction", key, key),)
    block = await read_block(contracts, key)
    return () if block is None else (Hit("block", key, key),)


def url_of(hit: Hit) -> str:
    """Return the URL of the page of a search result."""
    return f"/{hit.kind}s/{hit.key}"


_ALL: Final = "all"
_SETUP: Final = 200


async def audit(request: Request) -> Response:
    """The audit page: conservation, index status and anomalies."""
    page = PageRequest(request)
    index, chosen = page.index, page.query.get("of", _ALL)
    if chosen == _ALL:
        # List anomalies of the set-up separately: they would fill the first page.
        setup = (await run_in_threadpool(index.anomalies, limit=_SETUP, setup=True)).items
        listing = await run_in_threadpool(index.anomalies, page.number, setup=False)
    else:
        setup = ()
        listing = await run_in_threadpool(index.anomalies, page.number, kind=chosen)
    overview = await run_in_threadpool(index.overview)
    return await run_in_threadpool(
        page.render,
        "audit.html",
        overview=overview,
        equations=await equations(page.site.contracts, overview),
        open_anomalies=await run_in_threadpool(index.open_anomalies),
        listing=listing,
        setup=setup,
        chosen=chosen,
        kinds=[_ALL, *Subject],
    )


@dataclass(frozen=True, slots=True)
class Equation:
    """The sum of events (`expected`) and the value in a contract (`actual`); amounts in credit-wei.

    `actual` is None if the node can't read it, for instance because the state of the block is pruned.
    """

    title: str
    expected: Side
    actual: int | None
    repeat: NodeRequest

    @property
    def difference(self) -> int | None:
        """`actual` minus the sum of events; nonzero means an inconsistency."""
        return None if self.actual is None else self.actual - self.expected.amount


async def equations(contracts: Contracts, overview: Overview) -> Sequence[Equation]:
    """Compare the supply and the scheduler's balance with the events, at the overview's block."""
    supply = (("minted", overview.minted), ("burned", -overview.burned))
    owed = owed_terms(overview.escrow, overview.parked, overview.donated)
    block, scheduler = max(overview.block, 0), contracts.scheduler.address
    return await asyncio.gather(
        _equation(contracts, "Supply of credits", supply, block, "totalSupply"),
        _equation(contracts, "Balance of the MetaScheduler", owed, block, "balanceOf", scheduler),
    )


async def _equation(
    contracts: Contracts,
    title: str,
    expected: tuple[tuple[str, int], ...],
    block: int,
    name: str,
    *arguments: Any,
) -> Equation:
    repeat = call(contracts.deployment, "Credit", block, name, *arguments)
    try:
        result = await contracts.w3.eth.call(repeat.params[0], block)
        (value,) = interface("Credit").function(name).decode(bytes(result))
    except (GridError, Web3Exception, AbiError):
        value = None
    return Equation(title, Side("events", expected), value, repeat)


# -- charts of the whole grid

ENDS: Final = (
    JobStatus.FINISHED,
    JobStatus.FAILED,
    JobStatus.OUT_OF_CREDITS,
    JobStatus.CANCELLED,
    JobStatus.PANICKED,
)
_LINE_CLASSES: Final = ("line", "line-2", "line-3", "line-4")


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
    now = plain_amount(points[-1].escrow) if points else "0"
    series = [charts.Series("in escrow", "line", [point.escrow / CREDIT for point in points])]
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
