"""The audit: does it add up now, and what was out of the ordinary."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from deepsquare_chain.audit.anomalies import Subject
from deepsquare_chain.web import views
from deepsquare_chain.web.conservation import equations
from deepsquare_chain.web.pages.common import ask, cursor_of, show, site_of

_ALL: Final = "all"


async def audit(request: Request) -> Response:
    """Conservation, how far the index is, and exceptions."""
    site = site_of(request)
    chosen = request.query_params.get("of", _ALL)
    kind = None if chosen == _ALL else chosen
    found = await ask(site.index.exceptions, cursor_of(request), kind=kind)
    overview = await ask(site.index.overview)
    return await show(
        request,
        "audit.html",
        overview=overview,
        equations=await equations(site.contracts, overview),
        standing=await ask(site.index.open_exceptions),
        found=found,
        chosen=chosen,
        kinds=[_ALL, *Subject],
        phrases=views.phrases,
    )
