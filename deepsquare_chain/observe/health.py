"""A small web page of one service's health, on loopback only.

`/live` and `/ready` answer 200 or 503, `/status` shows all, `/metrics` is for Prometheus.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deepsquare_chain.errors import UsageError
from deepsquare_chain.observe.metrics import CONTENT_TYPE, Metrics
from deepsquare_chain.observe.probe import Health


def health_app(probe: Callable[[], Health], metrics: Metrics | None = None) -> Starlette:
    """The pages of one service."""

    def answer(good: bool) -> JSONResponse:
        return JSONResponse({"ok": good}, status_code=200 if good else 503)

    async def live(_: Request) -> Response:
        return answer(probe().live)

    async def ready(_: Request) -> Response:
        return answer(probe().ready)

    async def status(_: Request) -> Response:
        health = probe()
        return JSONResponse({"live": health.live, "ready": health.ready, **health.details})

    async def figures(_: Request) -> Response:
        if metrics is None:
            return JSONResponse({"ok": False}, status_code=404)
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    # A foreign page must not read this by pointing its own name at loopback.
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    routes = [
        Route("/live", live),
        Route("/ready", ready),
        Route("/status", status),
        Route("/metrics", figures),
    ]
    return Starlette(routes=routes, middleware=[guard])


class HealthServer:
    """Serves an application on loopback within the running loop.

    Args:
        app: See `health_app`.
        port: 0 takes a free one.
        host: A loopback address.

    Raises:
        UsageError: The host is not loopback.
    """

    def __init__(self, app: Starlette, *, port: int = 0, host: str = "127.0.0.1") -> None:
        if not ipaddress.ip_address(host).is_loopback:
            raise UsageError(f"Health is served on loopback only, not on {host}")
        self._app, self._host, self._port = app, host, port
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Serve, and return the base URL.

        Raises:
            UsageError: The port is in use or not allowed.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._host, self._port))
            listener.listen(64)
        except OSError as error:
            listener.close()
            raise UsageError(
                f"Port {self._port} on {self._host} can't be used: {error.strerror}",
                hint="Choose another port, or 0 for any free one.",
            ) from None
        port = listener.getsockname()[1]
        config = uvicorn.Config(self._app, log_config=None, access_log=False, lifespan="off")
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="health")
        # The socket listens already; a request of now waits until the server turns.
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{port}"

    async def stop(self) -> None:
        """End serving; harmless when it never began."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        # A client that keeps its connection open must not hold up the service's end.
        self._server.force_exit = True
        await self._task
        self._server = self._task = None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the daemon."""
        yield
