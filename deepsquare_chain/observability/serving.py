"""The HTTP server shared by all local services, and a per-client rate limit."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from http import HTTPStatus
from typing import Any, Final

import uvicorn
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepsquare_chain.errors import EndpointError, GridError, StoreError, UsageError
from deepsquare_chain.observability.logs import get_logger
from deepsquare_chain.observability.metrics import CONTENT_TYPE, Health, Metrics

_RETRY_SECONDS: Final = 5
_STATUS_CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")
_log = get_logger(__name__)
HOST = "127.0.0.1"
PROBLEM: Final = "application/problem+json"
# Prevents DNS rebinding: a page whose name was re-bound to loopback sends its own host name.
LOOPBACK_ONLY: Final = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])


class LoopbackServer:
    """Serves an ASGI application, by default on 127.0.0.1 only. Signals are left to the caller.

    Port 0 selects a free port. With `metrics`, requests are counted.
    """

    def __init__(
        self, app: Any, port: int = 0, host: str = HOST, metrics: Metrics | None = None
    ) -> None:
        self._app = app if metrics is None else _CountedRequests(app, metrics)
        self._wanted = port
        self._host = host
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Start listening; returns once the server accepts requests.

        Raises:
            UsageError: The port is not available.
        """
        listener = open_listener(self._wanted, self._host)
        self.port = int(listener.getsockname()[1])
        self._server = _Server(
            uvicorn.Config(
                self._app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=60,
                timeout_graceful_shutdown=3,
            )
        )
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Stop listening, finish open requests (within 3 seconds), and close."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        await self._task
        self._server = self._task = None


class _CountedRequests:
    """Counts the requests to an ASGI application, and the seconds until each response begins."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._requests = metrics.counter(
            "http_requests", "HTTP requests by class of the status.", code=_STATUS_CLASSES
        )
        self._seconds = metrics.histogram(
            "http_response_seconds", "Seconds until the response to an HTTP request began."
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = time.monotonic()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._seconds.observe(time.monotonic() - begin)
                self._metrics.add(self._requests, f"{message['status'] // 100}xx")
            await send(message)

        await self._app(scope, receive, counted)


class _Server(uvicorn.Server):
    """A uvicorn server without signal handlers, so that several servers can share one process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def problem(
    status: HTTPStatus,
    detail: str,
    *,
    hint: str = "",
    code: str = "",
    retry: int | None = None,
    **more: int,
) -> Response:
    """Return a problem response (RFC 9457).

    `code` is a short name, `retry` is Retry-After in seconds, `more` are further fields.
    """
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
    }
    body |= {name: text for name, text in (("hint", hint), ("code", code)) if text} | more
    headers = {"Cache-Control": "no-store"}
    if retry is not None:
        headers["Retry-After"] = str(retry)
    return JSONResponse(body, status, headers, media_type=PROBLEM)


class RequestRefusedError(GridError):
    """A service refuses a request.

    Args:
        code: Short name of the reason, for programs.
        hint: What the client should do.
        retry: Seconds after which the client may retry; None if a retry is useless.
        fields: Further numbers for programs, such as the offset at which to resume an upload.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: HTTPStatus,
        hint: str = "",
        retry: int | None = None,
        **fields: int,
    ) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.status = status
        self.retry = retry
        self.fields = fields


def forbidden(message: str, *, code: str, hint: str = "") -> RequestRefusedError:
    """Return the refusal of a request that the client may not make (403)."""
    return RequestRefusedError(message, code=code, status=HTTPStatus.FORBIDDEN, hint=hint)


def too_large(limit: int, hint: str) -> RequestRefusedError:
    """Return the refusal of a request whose body has more than `limit` bytes (413)."""
    return RequestRefusedError(
        f"The body is longer than {limit:,} bytes",
        code="too-large",
        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        hint=hint,
    )


def failure_response(error: Exception, service: str, path: str) -> Response:
    """Return the response of a service for an exception, without internal details."""
    match error:
        case RequestRefusedError():
            response = problem(
                error.status,
                error.message,
                hint=error.hint,
                code=error.code,
                retry=error.retry,
                **error.fields,
            )
            if error.status == HTTPStatus.UNAUTHORIZED:
                response.headers["WWW-Authenticate"] = "Bearer"
        case UsageError():
            response = problem(
                HTTPStatus.BAD_REQUEST, error.message, hint=error.hint, code="bad-request"
            )
        case HTTPException():
            response = problem(HTTPStatus(error.status_code), str(error.detail))
            response.headers.update(error.headers or {})
        case EndpointError() | StoreError():
            _log.warning("request not answered", service=service, error=error.message)
            unavailable = "the chain" if isinstance(error, EndpointError) else "its store"
            response = problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"This {service} can't reach {unavailable}",
                code="unavailable",
                retry=_RETRY_SECONDS,
            )
        case ClientDisconnect():
            response = problem(HTTPStatus.BAD_REQUEST, "The request was cut off", code="cut-off")
        case _:
            _log.error("request failed", service=service, path=path[:200], exc_info=error)
            response = problem(
                HTTPStatus.INTERNAL_SERVER_ERROR, "An unexpected error occurred", code="internal"
            )
    return response


class DeferredApp:
    """An ASGI application that is mounted before it is ready; returns 503 until `app` is set."""

    def __init__(self, service: str) -> None:
        self._service = service
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
            return
        response = problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"The {self._service} is still starting",
            code="unavailable",
            retry=_RETRY_SECONDS,
        )
        await response(scope, receive, send)


def probe_routes(probe: Callable[[], Health]) -> list[Route]:
    """Return the routes `/live` and `/ready`, which respond with 200 or 503."""

    def answer(ok: bool) -> Response:
        return JSONResponse({"ok": ok}, HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE)

    async def live(_: Request) -> Response:
        return answer(probe().live)

    async def ready(_: Request) -> Response:
        return answer(probe().ready)

    return [Route("/live", live), Route("/ready", ready)]


def sends_json(request: Request) -> bool:
    """Return whether the body is declared as JSON.

    Browsers do not send JSON to another origin without a CORS preflight.
    """
    declared = request.headers.get("content-type", "").partition(";")[0]
    return declared.strip().lower() == "application/json"


async def read_body(request: Request, limit: int) -> bytes | None:
    """Return the body, or None if it is longer than `limit` bytes."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
    return b"".join(parts)


def json_body(body: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object.

    Raises:
        UsageError: It is something else.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError:
        raise UsageError("The body is not JSON") from None
    if not isinstance(value, dict):
        raise UsageError("The body is not a JSON object")
    return value


def open_listener(port: int, host: str = HOST) -> socket.socket:
    """Return a listening socket, on 127.0.0.1 by default.

    Raises:
        UsageError: The port is not available.
    """
    if not 0 <= port <= 65_535:
        raise UsageError(f"{port} is not a port.", hint="Ports go from 0 (any free one) to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol must be explicit: asyncio sets TCP_NODELAY only then, and without it each
    # response waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # Reserves the port at once; uvicorn calls listen again with its own backlog.
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise _listen_error(host, port, error) from error
    return listener


def _listen_error(host: str, port: int, error: OSError) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"Port {port} on {host} is in use.",
            hint="Stop the program that listens there, or choose another port (0 chooses a free one).",
        )
    if error.errno == errno.EACCES:
        return UsageError(
            f"Port {port} on {host} requires administrator rights.",
            hint="Choose a port from 1024 on, or 0 for a free one.",
        )
    return UsageError(
        f"Can't listen on {host}:{port}: {error.strerror or error}.",
        hint="Choose another port (0 chooses a free one).",
    )


#: Number of clients whose buckets are kept. The least recently seen client is evicted; its next
#: request starts with a full bucket.
MAX_CLIENTS: Final = 10_000


class RateLimit:
    """A rate limit with a token bucket per client.

    Args:
        rate: Sustained requests per second; zero disables the limit.
        burst: Size of the bucket: requests that are allowed at once.
        clients: Maximum number of buckets that are kept.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self,
        rate: float,
        burst: int,
        *,
        clients: int = MAX_CLIENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._clients = clients
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """Count a request. Return zero if it is allowed, else the seconds to wait."""
        if self._rate <= 0:
            return 0.0
        now, key = self._clock(), network_of(client)
        tokens, last_seen = self._buckets.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - last_seen) * self._rate)
        allowed = tokens >= 1.0
        self._buckets[key] = (tokens - 1.0 if allowed else tokens, now)
        if len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self._rate

    def has_tokens(self, client: str) -> bool:
        """Whether this client may make a request now; nothing is counted."""
        tokens, seen = self._buckets.get(network_of(client), (self._burst, 0.0))
        return self._rate <= 0 or tokens + (self._clock() - seen) * self._rate >= 1.0

    def __len__(self) -> int:
        """Return the number of clients with a bucket."""
        return len(self._buckets)


def network_of(client: str) -> str:
    """Return an IPv4 address as it is, and the /64 network of an IPv6 address.

    One IPv6 client usually has a whole /64 network.
    """
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((client, 64), strict=False))
    return client


# -- HTTP health endpoints of one service, on loopback only
#
# `/live` and `/ready` return 200 or 503, `/status` returns all details, `/metrics` is for Prometheus.


def health_app(probe: Callable[[], Health], metrics: Metrics | None = None) -> Starlette:
    """Return the ASGI application with the health endpoints of one service."""

    async def status(_: Request) -> Response:
        health = probe()
        return JSONResponse({"live": health.live, "ready": health.ready, **health.details})

    async def metrics_page(_: Request) -> Response:
        if metrics is None:
            return JSONResponse({"ok": False}, status_code=404)
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    # Checks the Host header to prevent DNS rebinding: another site could otherwise resolve its
    # own name to loopback and read these endpoints.
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    routes = [*probe_routes(probe), Route("/status", status), Route("/metrics", metrics_page)]
    return Starlette(routes=routes, middleware=[guard])


def health_server(app: Starlette, *, port: int = 0, host: str = HOST) -> LoopbackServer:
    """Return a server for the health endpoints, on loopback only.

    Raises:
        UsageError: The host is not a loopback address.
    """
    if not ipaddress.ip_address(host).is_loopback:
        raise UsageError(f"Health is served on loopback only, not on {host}")
    return LoopbackServer(app, port, host)
