"""Security headers of all responses, and the origin check of POST requests.

The pages hold no secrets and set no cookies. The threats are markup in untrusted texts, other sites
that frame or script the pages, and other sites that send POST requests (CSRF).
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepsquare_chain.observability.serving import sends_json

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
    """Middleware that adds the security headers to every response, streams included.

    Scripts of the pages may also connect to `gateway`, a URL or empty.
    """

    def __init__(self, app: ASGIApp, gateway: str = "") -> None:
        self._app = app
        self._headers = dict(HEADERS)
        if gateway:
            connect = f"connect-src 'self' {gateway}"
            policy = CONTENT_SECURITY_POLICY.replace("connect-src 'self'", connect)
            self._headers["Content-Security-Policy"] = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
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


def is_same_origin(request: Request) -> bool:
    """Whether a POST request comes from a page of this explorer, or not from a browser.

    A form of another site can't send JSON without a CORS preflight. Browsers also send
    `Sec-Fetch-Site` and `Origin`, which are checked.
    """
    if not sends_json(request):
        return False
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return False
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host", "")
