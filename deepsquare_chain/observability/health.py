"""HTTP health endpoints of one service, on loopback only.

`/live` and `/ready` return 200 or 503, `/status` returns all details, `/metrics` is for Prometheus.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deepsquare_chain.errors import UsageError
from deepsquare_chain.observability.metrics import CONTENT_TYPE, Metrics
from deepsquare_chain.observability.probe import Health
from deepsquare_chain.observability.serving import HOST, LoopbackServer


def health_app(probe: Callable[[], Health], metrics: Metrics | None = None) -> Starlette:
    """Return the ASGI application with the health endpoints of one service."""

    def answer(good: bool) -> JSONResponse:
        return JSONResponse({"ok": good}, status_code=200 if good else 503)

    async def live(_: Request) -> Response:
        return answer(probe().live)

    async def ready(_: Request) -> Response:
        return answer(probe().ready)

    async def status(_: Request) -> Response:
        health = probe()
        return JSONResponse({"live": health.live, "ready": health.ready, **health.details})

    async def metrics_page(_: Request) -> Response:
        if metrics is None:
            return JSONResponse({"ok": False}, status_code=404)
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    # Checks the Host header to prevent DNS rebinding: a foreign site could otherwise resolve its
    # own name to loopback and read these endpoints.
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    routes = [
        Route("/live", live),
        Route("/ready", ready),
        Route("/status", status),
        Route("/metrics", metrics_page),
    ]
    return Starlette(routes=routes, middleware=[guard])


def health_server(app: Starlette, *, port: int = 0, host: str = HOST) -> LoopbackServer:
    """Return a server for the health endpoints, on loopback only.

    Args:
        app: See `health_app`.
        port: Port to listen on once started; 0 selects a free port.
        host: A loopback address.

    Raises:
        UsageError: The host is not loopback.
    """
    if not ipaddress.ip_address(host).is_loopback:
        raise UsageError(f"Health is served on loopback only, not on {host}")
    return LoopbackServer(app, port, host)
