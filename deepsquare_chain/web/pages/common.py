"""Helpers of all pages: site, query parameters, queries of the index, rendering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from deepsquare_chain.client.periods import parse_period
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.indexer.pagination import TimeRange
from deepsquare_chain.web.site import Renderer, Site

T = TypeVar("T")
MAX_NUMBER: Final = 2**63 - 1
#: Time ranges of charts by link text, in seconds; zero is unlimited.
RANGES: Final = {"hour": 3_600, "day": 86_400, "week": 7 * 86_400, "all": 0}


def site_of(request: Request) -> Site:
    """Return the site of the application."""
    site: Site = request.app.state.site
    return site


async def run_query(query: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call a blocking function, such as a query of the index, in a thread."""
    return await run_in_threadpool(query, *arguments, **options)


async def render_page(
    request: Request, template: str, *, status_code: int = 200, **context: Any
) -> Response:
    """Render a page in a thread: templates query the index for names."""
    render: Renderer = request.app.state.render
    return await run_in_threadpool(render, request, template, status_code=status_code, **context)


def page_of(request: Request) -> int:
    """Return the page number of a list; 1 is the first.

    Raises:
        UsageError: It is not a number.
    """
    text = request.query_params.get("page", "1")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UsageError(f"{text[:40]!r} is not the number of a page", hint="Use page=1.")
    return int(text)


def text_of(request: Request, name: str, maximum: int = 64) -> str:
    """Return a query parameter, cut to `maximum` characters; empty if absent."""
    return request.query_params.get(name, "").strip()[:maximum]


def period_of(request: Request) -> TimeRange | None:
    """Return the period from day `from` to day `to` inclusive, in UTC; None if neither is given.

    Raises:
        UsageError: One is not a date, or `to` is before `from`.
    """
    since, until = text_of(request, "from"), text_of(request, "to")
    if not since and not until:
        return None
    for text in (since, until):
        if text.isdigit():
            raise UsageError(f"{text!r} is not a date", hint="Write 2026-11-27.")
    period = parse_period(None, since or None, until or None)
    return TimeRange(period.start, period.end)


def number_of(text: str, noun: str) -> int:
    """Parse a number in a URL.

    Raises:
        NotFoundError: It is not a valid number of an object.
    """
    if not text.isascii() or not text.isdigit() or int(text[:20]) > MAX_NUMBER:
        raise NotFoundError(f"{text[:80]!r} is not a {noun}", hint="Use the search to find it.")
    return int(text[:20])


def range_of(request: Request, first: str = "all") -> tuple[str, int]:
    """Return the chosen time range of charts and its seconds.

    Raises:
        UsageError: There is no such range.
    """
    name = request.query_params.get("range", first)
    if name not in RANGES:
        raise UsageError(f"{name[:40]!r} is not a range", hint=f"There are {', '.join(RANGES)}.")
    return name, RANGES[name]
