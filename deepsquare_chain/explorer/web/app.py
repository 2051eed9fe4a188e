"""The explorer as an ASGI application."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from web3.exceptions import Web3Exception

from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    InsufficientFundsError,
    JobFileError,
    NotAuthorisedError,
    NotFoundError,
    RevertedError,
    UsageError,
)
from deepsquare_chain.explorer.web import chainpages, lists, things, wallet
from deepsquare_chain.explorer.web.live import Live
from deepsquare_chain.explorer.web.security import SecurityHeaders, Tokens
from deepsquare_chain.explorer.web.site import Site, static_files
from deepsquare_chain.observe import get_logger

Page = Callable[[Site, Request], Awaitable[Response]]

#: Requests a second of one client, and at once, that make the explorer work.
RATE: Final = 20.0
BURST: Final = 80.0
_MEDIA: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_STATUS: Final[Sequence[tuple[type[GridError], int]]] = (
    (NotFoundError, 404),
    (UsageError, 400),
    (JobFileError, 400),
    (InsufficientFundsError, 409),
    (RevertedError, 409),
    (NotAuthorisedError, 403),
    (EndpointError, 502),
)
_log = get_logger(__name__)


def explorer_app(
    site: Site, *, hosts: Sequence[str] = (), more_routes: Sequence[BaseRoute] = ()
) -> Starlette:
    """All pages of a site.

    Args:
        site: What they show.
        hosts: Names under which it may be asked; any where the list is empty. A page that points
            its own name at loopback must not read a private explorer.
        more_routes: Further routes, such as the JSON API's.
    """
    live, auditor = Live(site), chainpages.Auditor(site)
    tokens = Tokens(RATE, BURST)

    def page(path: str, handler: Page, methods: Sequence[str] = ("GET",)) -> Route:
        @functools.wraps(handler)
        async def answer(request: Request) -> Response:
            wait = tokens.take(request.client.host if request.client else "")
            if wait:
                raise HTTPException(429, headers={"Retry-After": str(int(wait) + 1)})
            return await handler(site, request)

        return Route(path, answer, methods=list(methods))

    async def audited(site: Site, request: Request) -> Response:
        return await chainpages.audit(site, auditor, request)

    async def submit_form(site: Site, request: Request) -> Response:
        rows = [row for row in await site.ask(site.index.providers) if row.active]
        return await site.page(
            request, "submit.html", rows=rows, storing=site.store is not None
        )

    async def refused(request: Request, error: Exception) -> Response:
        return await _refused(site, request, error)

    routes: list[BaseRoute] = [
        page("/", lists.home),
        page("/jobs", lists.jobs),
        page("/jobs/{id}", things.job),
        page("/providers", lists.providers),
        page("/providers/{key}", things.provider),
        page("/accounts/{address}", things.account),
        page("/accounts/{address}/statement.csv", things.statement_csv),
        page("/transactions", lists.transactions),
        page("/transactions/{hash}", chainpages.transaction),
        page("/blocks", lists.blocks),
        page("/blocks/{which}", lists.block),
        page("/audit", audited),
        page("/contracts", chainpages.contracts),
        page("/contracts/{name}", chainpages.contract),
        page("/search", lists.search),
        page("/submit", submit_form),
        page("/wallet/grid", wallet.grid),
        page("/wallet/submit", wallet.submit, ("POST",)),
        page("/wallet/topup", wallet.topup, ("POST",)),
        page("/wallet/cancel", wallet.cancel, ("POST",)),
        Route("/live", live),
        Route("/static/{hash}/{name}", _static),
        Route("/favicon.ico", _icon),
        Route("/robots.txt", _robots),
        *more_routes,
    ]
    middleware = [Middleware(SecurityHeaders), Middleware(GZipMiddleware, minimum_size=1_000)]
    if hosts:
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)))
    handlers: dict[Any, Any] = {
        GridError: refused,
        HTTPException: refused,
        Web3Exception: refused,
        Exception: refused,
    }
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def _static(request: Request) -> Response:
    name = str(request.path_params["name"])
    found = static_files().get(name)
    if found is None:
        raise HTTPException(404)
    data, version = found
    kept = "public, max-age=31536000, immutable"
    fresh = request.path_params["hash"] == version
    media = _MEDIA.get(name.rpartition(".")[2], "application/octet-stream")
    return Response(
        data, media_type=media, headers={"Cache-Control": kept if fresh else "no-store"}
    )


async def _icon(_: Request) -> Response:
    return RedirectResponse(f"/static/{static_files()['icon.svg'][1]}/icon.svg")


async def _robots(_: Request) -> Response:
    return Response("User-agent: *\nDisallow: /\n", media_type="text/plain")


async def _refused(site: Site, request: Request, error: Exception) -> Response:
    """An error as a page for people, or as a problem document for scripts."""
    code, title, message, hint = _told(error)
    if code == 500:
        _log.error("page failed", path=request.url.path, exc_info=error)
    headers = dict(getattr(error, "headers", None) or {})
    if request.url.path.startswith("/wallet/"):
        body = {"title": title, "status": code, "detail": message, "hint": hint}
        return JSONResponse(body, code, headers, media_type="application/problem+json")
    kind = "bad" if code >= 500 else "warn"
    answer = await site.page(
        request, "error.html", status_code=code, title=title, kind=kind, message=message, hint=hint
    )
    answer.headers.update(headers)
    return answer


def _told(error: Exception) -> tuple[int, str, str, str]:
    """Status, title, message and hint of an error; a fault of ours tells nothing of itself."""
    if isinstance(error, GridError):
        code = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
        title = {404: "Not found", 400: "That can't be meant"}.get(code, "Not possible now")
        return code, title, error.message, error.hint
    if isinstance(error, Web3Exception):
        return 502, "Not possible now", "The node did not answer as a node does.", "Try again."
    if isinstance(error, HTTPException):
        titles = {404: "Not found", 405: "Not allowed", 429: "Too many requests"}
        messages = {
            404: "There is no such page.",
            429: "This client asks faster than the explorer answers. Wait a moment.",
        }
        title = titles.get(error.status_code, "Refused")
        return error.status_code, title, messages.get(error.status_code, title), ""
    return 500, "Something went wrong here", "The page could not be made; it is in the log.", ""
