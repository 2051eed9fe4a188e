"""Providers: the list, and the page of one provider with its history."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.read_models import ProviderRow
from deepsquare_chain.web import views
from deepsquare_chain.web.pages.common import (
    RANGES,
    ask,
    number_of,
    range_of,
    show,
    site_of,
    text_of,
)

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


async def providers(request: Request) -> Response:
    """The list of all providers."""
    rows = await ask(site_of(request).index.providers)
    sort = text_of(request, "sort")
    key = SORTS.get(sort.removeprefix("-"))
    if sort and key is None:
        raise UsageError(
            f"{sort!r} is nothing to sort providers by", hint=f"There are {', '.join(SORTS)}."
        )
    if key is not None:
        rows = tuple(sorted(rows, key=key, reverse=sort.startswith("-")))
    return await show(request, "providers.html", found=rows)


async def provider(request: Request) -> Response:
    """The page of one provider, by account or ID."""
    index = site_of(request).index
    text = request.path_params["provider"]
    key = text if text.startswith("0x") else number_of(text, "provider")
    detail = await ask(index.provider, key)
    row = detail.row
    name, seconds = range_of(request)
    status = await ask(index.status)
    since = max(0, status.time - seconds) if seconds else None
    utilisation = await ask(index.utilisation, _POINTS, account=row.account, since=since)
    jobs = await ask(index.jobs, limit=_ROWS, provider=row.account)
    settlements = await ask(index.settlements, limit=_ROWS, provider=row.account)
    history, challenges = views.provider_history(detail.history)
    return await show(
        request,
        "provider.html",
        detail=detail,
        row=row,
        figures=row.figures,
        load_bars=views.load_bars(row),
        use_chart=views.use_chart(utilisation[0]) if utilisation else None,
        price_chart=views.price_chart(detail.history, status.time),
        jobs=jobs.items,
        more_jobs=jobs.next is not None,
        settlements=settlements.items,
        history=history,
        challenges=challenges,
        ranges=list(RANGES),
        chosen=name,
    )
