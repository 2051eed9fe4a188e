"""What all pages share: their site, their arguments, and the way to the database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from deepsquare_chain.client.periods import parse_period
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.indexer.pagination import TimeRange
from deepsquare_chain.web.render import Renderer
from deepsquare_chain.web.site import Site

T = TypeVar("T")
MAX_NUMBER: Final = 2**63 - 1
#: Ranges of charts by what their links say, in seconds; zero is everything.
RANGES: Final = {"hour": 3_600, "day": 86_400, "week": 7 * 86_400, "all": 0}


def site_of(request: Request) -> Site:
    """The site that answers."""
    found: Site = request.app.state.site
    return found


async def ask(question: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Ask the index, in a thread."""
    return await run_in_threadpool(question, *arguments, **options)


async def show(
    request: Request, template: str, *, status_code: int = 200, **context: Any
) -> Response:
    """Render a page, in a thread: it asks the index for names."""
    render: Renderer = request.app.state.render
    return await run_in_threadpool(render, request, template, status_code=status_code, **context)


def page_of(request: Request) -> int:
    """The number of a list's page; 1 is the first.

    Raises:
        UsageError: It is no number.
    """
    text = request.query_params.get("page", "1")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UsageError(f"{text[:40]!r} is not the number of a page", hint="Write page=1.")
    return int(text)


def text_of(request: Request, name: str, most: int = 64) -> str:
    """A text of the address, at most so long; empty where there is none."""
    return request.query_params.get(name, "").strip()[:most]


def period_of(request: Request) -> TimeRange | None:
    """The days `from` and `to`, both included, in UTC; None where neither is given.

    Raises:
        UsageError: One is no date, or the second is before the first.
    """
    since, until = text_of(request, "from"), text_of(request, "to")
    if not since and not until:
        return None
    for text in (since, until):
        if text.isdigit():
            raise UsageError(f"{text!r} is not a date", hint="Write 2026-11-27.")
    found = parse_period(None, since or None, until or None)
    return TimeRange(found.start, found.end)


def number_of(text: str, what: str) -> int:
    """A number in an address.

    Raises:
        NotFoundError: It is none that a thing could have.
    """
    if not text.isascii() or not text.isdigit() or int(text[:20]) > MAX_NUMBER:
        raise NotFoundError(
            f"{text[:80]!r} is no {what}", hint="Use the search for anything that you have."
        )
    return int(text[:20])


def range_of(request: Request, first: str = "all") -> tuple[str, int]:
    """The chosen range of charts and its seconds.

    Raises:
        UsageError: There is no such range.
    """
    name = request.query_params.get("range", first)
    if name not in RANGES:
        raise UsageError(f"{name[:40]!r} is no range", hint=f"There are {', '.join(RANGES)}.")
    return name, RANGES[name]
