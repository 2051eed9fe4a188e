"""What protects readers and wallets: headers of every answer, and who may post what.

The pages hold no secret and set no cookie. What has to be kept out is markup in strangers' texts,
a foreign page that frames or scripts these, and a foreign page that posts.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_POLICY: Final = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data:",
    "connect-src 'self'",
    "form-action 'self'",
    "frame-ancestors 'none'",
    "base-uri 'none'",
)
CONTENT_SECURITY_POLICY: Final = "; ".join(_POLICY)
HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class SecurityHeaders:
    """Adds the headers to every answer, streams included.

    Args:
        app: What answers.
        gateway: URL of the gateway that scripts of these pages may ask; empty for none.
    """

    def __init__(self, app: ASGIApp, gateway: str = "") -> None:
        self._app = app
        self._headers = dict(HEADERS)
        if gateway:
            policy = CONTENT_SECURITY_POLICY.replace(
                "connect-src 'self'", f"connect-src 'self' {gateway}"
            )
            self._headers["Content-Security-Policy"] = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, sent)


def is_own(request: Request) -> bool:
    """Whether a post comes from one of these pages, or from no browser at all.

    JSON is what no form of a foreign page can send unasked; browsers also say where they are.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != "application/json":
        return False
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return False
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host", "")


def client_of(request: Request) -> str:
    """Who asks, as far as the connection tells."""
    return request.client.host if request.client else "?"
