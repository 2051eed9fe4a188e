"""What every answer carries and what no request may do: nothing foreign in, nothing out."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Pages load from their own origin alone; no inline script or style, no frame, no form elsewhere.
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=()",
}
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class SecurityHeaders:
    """Adds the headers to every answer, and turns away writes that another site's page sends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["method"] not in _SAFE and _is_foreign(Headers(scope=scope)):
            refusal = JSONResponse({"title": "Another site's page may not do this."}, 403)
            await refusal(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)


def _is_foreign(headers: Headers) -> bool:
    """Whether a browser says that another site asks; programs without these headers are no page."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in {"same-origin", "none"}
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host", "")


class Tokens:
    """A token bucket for each client, with bounded memory.

    Args:
        rate: Tokens a second.
        burst: Tokens at the most.
        clients: Clients that are remembered; the one that was quiet the longest is forgotten.
    """

    def __init__(self, rate: float, burst: float, clients: int = 4_096) -> None:
        self._rate, self._burst, self._clients = rate, burst, clients
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float | None = None) -> float:
        """Take one; zero if there was one, else the seconds until there is."""
        now = time.monotonic() if now is None else now
        left, at = self._left.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        self._left[client] = (left - 1 if wait == 0 else left, now)
        while len(self._left) > self._clients:
            self._left.popitem(last=False)
        return wait
