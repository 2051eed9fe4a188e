"""Providers: the list, and one with its record."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from deepsquare_chain.web import views
from deepsquare_chain.web.pages.common import (
    RANGES,
    ask,
    cursor_of,
    number_of,
    range_of,
    show,
    site_of,
)

_POINTS = 80
_ROWS = 10


async def providers(request: Request) -> Response:
    """All providers."""
    found = await ask(site_of(request).index.providers)
    return await show(request, "providers.html", found=found)


async def provider(request: Request) -> Response:
    """One provider, by its account or id."""
    index = site_of(request).index
    which = request.path_params["provider"]
    key = which if which.startswith("0x") else number_of(which, "provider")
    detail = await ask(index.provider, key)
    row = detail.row
    name, seconds = range_of(request)
    status = await ask(index.status)
    since = max(0, status.time - seconds) if seconds else None
    used = await ask(index.utilisation, _POINTS, account=row.account, since=since)
    jobs = await ask(index.jobs, cursor_of(request), _ROWS, provider=row.account)
    settled = await ask(index.settlements, limit=_ROWS, provider=row.account)
    return await show(
        request,
        "provider.html",
        detail=detail,
        row=row,
        figures=row.figures,
        load_bars=views.load_bars(row),
        use_chart=views.use_chart(used[0]) if used else None,
        price_chart=views.price_chart(detail.history, status.time),
        jobs=jobs,
        settlements=settled.items,
        fields=views.fields,
        ranges=list(RANGES),
        chosen=name,
    )
