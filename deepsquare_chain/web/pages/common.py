"""What all pages share: their site, their arguments, and the way to the database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from deepsquare_chain.errors import NotFoundError, UsageError
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


def cursor_of(request: Request) -> str | None:
    """Where a list goes on; None for its beginning."""
    return request.query_params.get("cursor") or None


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
