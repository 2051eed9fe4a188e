"""Base of the clients of HTTP services: limited responses, and errors that name the service."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import httpx2
from pydantic_core import from_json

from deepsquare_chain.chain.rpc.transport import (
    CERTIFICATE_HINT,
    Transport,
    http_client,
    why_failed,
)
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.settings import safe_url

_TIMEOUT: Final = 15.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A response with its body, which has a size limit."""

    status: int
    headers: httpx2.Headers
    content: bytes

    @property
    def is_success(self) -> bool:
        """Return whether the request succeeded."""
        return 200 <= self.status < 300

    def body(self) -> dict[str, Any] | None:
        """Parse the content as a JSON object; None if it is something else."""
        return json_object(self.content)


class ServiceClient:
    """Client of one HTTP service; an async context manager.

    Args:
        url: URL of the service.
        way: Certificates and headers for remote addresses.
        transport: HTTP transport instead of the network, for tests.

    Raises:
        UsageError: The proxy in the environment is invalid.
    """

    #: Name of the service, and the hint of its errors.
    service: ClassVar[str]
    advice: ClassVar[str]
    #: Maximum size of a response in bytes.
    max_answer: ClassVar[int]

    def __init__(
        self,
        url: str,
        way: Transport | None = None,
        *,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.place = safe_url(url)
        self._client = http_client(self.url, way, timeout=_TIMEOUT, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _send(self, method: str, path: str, **request: Any) -> Answer:
        content = bytearray()
        try:
            async with self._client.stream(method, path, **request) as response:
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > self.max_answer:
                        raise self._nonsense("an answer without end")
                return Answer(response.status_code, response.headers, bytes(content))
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> EndpointError:
        why = why_failed(error)
        hint = CERTIFICATE_HINT if "certificate" in why else self.advice
        return EndpointError(
            f"The {self.service} at {self.place} can't be reached: {why}", hint=hint
        )

    def _nonsense(self, what: str = "") -> EndpointError:
        detail = f" ({what})" if what else ""
        return EndpointError(
            f"What answers at {self.place} is no {self.service} that works{detail}",
            hint=f"Check the URL. {self.advice}",
        )


def json_object(data: bytes) -> dict[str, Any] | None:
    """Parse bytes as a JSON object; None if they are something else."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
