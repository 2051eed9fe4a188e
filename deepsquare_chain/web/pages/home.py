"""The home page with a summary of the grid, and the search."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from deepsquare_chain.indexer.queries import HASH, MAX_HITS, NUMBER
from deepsquare_chain.indexer.read_models import Hit, Overview
from deepsquare_chain.web import views
from deepsquare_chain.web.lookup import look_up, look_up_block
from deepsquare_chain.web.pages.common import RANGES, ask, range_of, show, site_of
from deepsquare_chain.web.site import Site, provider_name

_POINTS = 80
_LATEST = 8
_PLACES = {
    "job": "/jobs",
    "account": "/accounts",
    "provider": "/providers",
    "transaction": "/transactions",
    "block": "/blocks",
}


async def home(request: Request) -> Response:
    """The home page."""
    site = site_of(request)
    name, seconds = range_of(request)
    overview = await ask(site.index.overview)
    status = await ask(site.index.status)
    # Cached: after a change, all open pages reload at the same time.
    charts = await ask(
        site.once,
        f"home {name}",
        (status.change, status.block),
        lambda: _charts(site, overview, seconds),
    )
    jobs = await ask(site.index.jobs, limit=_LATEST)
    settlements = await ask(site.index.settlements, limit=_LATEST)
    return await show(
        request,
        "home.html",
        overview=overview,
        **charts,
        jobs=jobs.items,
        settlements=settlements.items,
        ranges=list(RANGES),
        chosen=name,
    )


def _charts(site: Site, overview: Overview, seconds: int) -> dict[str, Any]:
    index = site.index
    since = max(0, overview.time - seconds) if seconds else None
    recorded_names = site.given_names
    names = {row.account: provider_name(row, recorded_names) for row in index.providers()}
    use = index.utilisation(_POINTS // 2, since=since)
    points = index.jobs_by_status_over_time(_POINTS, since=since)
    return {
        "live_chart": views.status_chart(points),
        "ends_chart": views.ends_chart(points),
        "escrow_chart": views.escrow_chart(index.escrow_over_time(_POINTS, since=since)),
        "use_chart": views.use_lines(use, names),
        "use_bars": views.use_bars(use, names),
    }


async def search(request: Request) -> Response:
    """Search results for a text; a single result redirects to its page."""
    text = request.query_params.get("q", "").strip()[:200]
    hits = await ask(site_of(request).index.search, text)
    if not hits:
        hits = await _at_the_node(site_of(request), text.lower())
    if len(hits) == 1:
        return RedirectResponse(place_of(hits[0]), status_code=303)
    rows = await ask(site_of(request).index.jobs, limit=MAX_HITS, name=text[:64])
    statuses = {str(row.id): row.status for row in rows.items}
    results = [(hit, place_of(hit), statuses.get(hit.key)) for hit in hits]
    return await show(request, "search.html", text=text, hits=results, most=MAX_HITS)


async def _at_the_node(site: Site, text: str) -> tuple[Hit, ...]:
    """Search the node for blocks and transactions without events of this grid."""
    if match := NUMBER.fullmatch(text):
        number = match[1]
        block = await look_up_block(site.contracts, int(number))
        return () if block is None else (Hit("block", number, f"block {number}"),)
    match = HASH.fullmatch(text)
    if match is None:
        return ()
    key = "0x" + match[1]
    if await look_up(site.contracts, key) is not None:
        return (Hit("transaction", key, key),)
    block = await look_up_block(site.contracts, key)
    return () if block is None else (Hit("block", key, key),)


def place_of(hit: Hit) -> str:
    """Return the URL of the page of a search result."""
    return f"{_PLACES[hit.kind]}/{hit.key}"
