"""The explorer as an ASGI application: pages, live streams, JSON for wallets, errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from deepsquare_chain.client.gasless import RelayRefusedError
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
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import CONTENT_TYPE, Health, Metrics
from deepsquare_chain.observability.serving import RateLimit
from deepsquare_chain.web.live import Feed, live
from deepsquare_chain.web.pages import accounts, chain, grid, jobs, wallet
from deepsquare_chain.web.security import SecurityHeaders
from deepsquare_chain.web.site import FOLDER, TEMPLATES, Site

LOOPBACK: Final = ("127.0.0.1", "localhost", "::1", "[::1]")
#: POST requests per minute of one client.
POSTS_PER_MINUTE: Final = 120
_STATUS: Final[tuple[tuple[int, tuple[type[GridError], ...]], ...]] = (
    (404, (NotFoundError,)),
    (409, (InsufficientFundsError, RevertedError, RelayRefusedError)),
    (403, (NotAuthorisedError,)),
    (400, (JobFileError, UsageError)),
    (502, (EndpointError,)),
)
_TITLES: Final = {
    400: "Bad request",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    409: "Not possible at present",
    413: "Too large",
    429: "Too many requests",
    502: "The node does not answer",
}
_log = get_logger(__name__)

PAGES: Final[Sequence[BaseRoute]] = (
    Route("/", grid.home),
    Route("/search", grid.search),
    Route("/jobs", jobs.jobs),
    Route("/jobs/{job}", jobs.job),
    Route("/jobs/{job}/invoice", jobs.invoice),
    Route("/accounts/{account}", accounts.account),
    Route("/accounts/{account}/statement.csv", accounts.statement),
    Route("/providers", accounts.providers),
    Route("/providers/{provider}", accounts.provider),
    Route("/transactions", chain.transactions),
    Route("/transactions/{hash}", chain.transaction),
    Route("/blocks", chain.blocks),
    Route("/blocks/{block}", chain.block),
    Route("/audit", grid.audit),
    Route("/contracts", chain.contracts),
    Route("/contracts/{contract}", chain.contract),
    Route("/contracts/{contract}/abi.json", chain.abi),
    Route("/submit", wallet.form),
    Route("/submit/schema.json", wallet.schema),
    Route("/live", live),
    Route("/wallet/grid", wallet.grid),
    Route("/wallet/quote", wallet.quote, methods=["POST"]),
    Route("/wallet/submit", wallet.submit, methods=["POST"]),
    Route("/wallet/relay", wallet.relay, methods=["POST"]),
    Route("/wallet/relay/{digest}", wallet.relayed),
    Route("/wallet/topup", wallet.top_up, methods=["POST"]),
    Route("/wallet/cancel", wallet.cancel, methods=["POST"]),
    Route("/wallet/outcome/{hash}", wallet.outcome),
)


def explorer_app(
    site: Site,
    *,
    hosts: Sequence[str] = LOOPBACK,
    more_routes: Sequence[BaseRoute] = (),
    probe: Callable[[], Health] = lambda: Health(live=True, ready=True),
    metrics: Metrics | None = None,
) -> Starlette:
    """Build the explorer of one site, with `more_routes` besides the pages, such as the JSON API.

    Requests for other host names than `hosts` are refused, which prevents DNS rebinding. `probe`
    returns the health of the indexer.
    """

    app = Starlette(
        routes=[
            *PAGES,
            *more_routes,
            *_service_routes(probe, metrics),
            Mount("/static", RevalidatedFiles(directory=FOLDER / "static"), name="static"),
        ],
        middleware=[
            Middleware(GZipMiddleware, minimum_size=1_000, compresslevel=6),
            Middleware(SecurityHeaders, gateway=site.gateway),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        ],
        exception_handlers={GridError: _on_error, HTTPException: _on_error, Exception: _on_error},
    )
    app.state.site = site
    app.state.feed = Feed(site.index)
    app.state.post_limit = RateLimit(POSTS_PER_MINUTE / 60, POSTS_PER_MINUTE)
    return app


def _service_routes(probe: Callable[[], Health], metrics: Metrics | None) -> list[Route]:
    def healthz(_: Request) -> Response:
        health = probe()
        body = {"live": health.live, "ready": health.ready}
        return JSONResponse(body, status_code=200 if health.ready else 503)

    def metrics_page(_: Request) -> Response:
        if metrics is None:
            raise NotFoundError("This explorer has no metrics")
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    return [Route("/healthz", healthz), Route("/metrics", metrics_page)]


class RevalidatedFiles(StaticFiles):
    """Static files that browsers cache but revalidate, so that an upgrade takes effect at once."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        """Return the file, or 304 if it has not changed."""
        response = super().file_response(*arguments, **options)
        response.headers["Cache-Control"] = "no-cache"
        return response


def status_of(error: Exception) -> int:
    """Return the HTTP status for an error."""
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, wallet.PostRefusedError):
        return error.status
    return next((code for code, kinds in _STATUS if isinstance(error, kinds)), 500)


def _on_error(request: Request, error: Exception) -> Response:
    """Return an error as a page, or as JSON for `/wallet/` and `/api/`; no internal details."""
    code, hint, path = status_of(error), "", request.url.path
    title = _TITLES.get(code, "An unexpected error occurred")
    if isinstance(error, GridError):
        message, hint = error.message, error.hint
    elif not isinstance(error, HTTPException):
        _log.error("page failed", path=path[:200], exc_info=error)
        message = "The explorer could not create this page and has logged the reason. Try again."
    elif code == 404:
        title, message = "Page not found", f"There is no page at {path[:120]}."
    else:
        message = "Pages are read-only." if code == 405 else str(error.detail)[:200]
    if path.startswith(("/wallet/", "/api/")):
        body = {"status": code, "title": title, "detail": message, "hint": hint}
        return JSONResponse(body, status_code=code)
    template = TEMPLATES.get_template("error.html")
    page = template.render(code=code, title=title, message=message, hint=hint)
    return HTMLResponse(page, status_code=code, headers={"Cache-Control": "no-cache"})
