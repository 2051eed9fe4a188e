"""The HTTP client of a relay. Relays are untrusted: callers verify responses on chain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Final

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.forwarder import SignedRequest
from deepsquare_chain.errors import EndpointError, NotFoundError
from deepsquare_chain.observability.redaction import plain
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.gateway_client import ServiceClient

#: HTTP statuses of temporary refusals: a retry may succeed.
_TEMPORARY: Final = frozenset({408, 425, 429, 503})
_OTHER_RELAY_HINT: Final = (
    "Give another relay with --relay, or pay the gas yourself: without --gasless."
)


class RelayRefusedError(EndpointError):
    """The relay refused a request.

    `code` is the relay's code for the reason; `next_nonce` is the nonce that it expects, after a
    nonce conflict. `temporary` is True if a retry of the same request may succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        code: str = "",
        next_nonce: int | None = None,
        temporary: bool = False,
    ) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.next_nonce = next_nonce
        self.temporary = temporary


@dataclass(frozen=True, slots=True)
class RelayTerms:
    """The terms of a relay; amounts in credit-wei, times in seconds."""

    chain_id: int
    forwarder: str
    scheduler: str
    wallet: str
    is_open: bool
    functions: tuple[str, ...]
    min_amount: int
    max_gas: int
    max_lead: int
    per_hour: int
    per_customer: int


@dataclass(frozen=True, slots=True)
class RelayResponse:
    """A relay's response about a request: its `state`; `transaction` may be empty."""

    state: str
    transaction: str
    detail: str


def known_relay(settings: Settings, deployment: Deployment) -> str:
    """Return the URL of the relay of the settings, or of a devnet's record; empty without one."""
    url = settings.relay or deployment.extra.get("relay")
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return ""
    return url.rstrip("/")


def relay_url(settings: Settings, deployment: Deployment) -> str:
    """Return the URL of the relay, as `known_relay`.

    Raises:
        NotFoundError: No relay is set or recorded.
    """
    if url := known_relay(settings, deployment):
        return url
    raise NotFoundError(
        "No relay is configured, and the deployment record has none",
        hint="Give one with --relay or DEEPSQUARE_RELAY; `deepsquare relay serve` runs one.",
    )


class RelayClient(ServiceClient):
    """Client of one relay; an async context manager.

    Args:
        url: URL of the relay.
        way: Certificates and headers for remote addresses.
        transport: HTTP transport instead of the network, for tests.

    Raises:
        UsageError: The proxy in the environment is invalid.
    """

    service: ClassVar[str] = "relay"
    advice: ClassVar[str] = _OTHER_RELAY_HINT
    max_response_bytes: ClassVar[int] = 65_536

    async def terms(self) -> RelayTerms:
        """Return the relay's terms.

        Raises:
            EndpointError: The relay does not answer, or its response is invalid.
        """
        body = await self._request("GET", "/v1/relay")
        try:
            return RelayTerms(
                chain_id=int(body["chain_id"]),
                forwarder=str(body["forwarder"]),
                scheduler=str(body["scheduler"]),
                wallet=plain(str(body["wallet"]))[:60],
                is_open=body["open"] is True,
                functions=tuple(plain(str(function))[:60] for function in body["functions"]),
                min_amount=int(body["min_amount"]),
                max_gas=int(body["max_gas"]),
                max_lead=int(body["max_lead_seconds"]),
                per_hour=int(body["requests_per_hour"]),
                per_customer=int(body["requests_per_customer_per_hour"]),
            )
        except (KeyError, TypeError, ValueError):
            raise self._invalid_response() from None

    async def terms_for(self, deployment: Deployment) -> RelayTerms:
        """Return the relay's terms after checking its deployment.

        Raises:
            RelayRefusedError: The relay accepts no requests at the moment.
            EndpointError: The relay serves another grid; other errors as `terms`.
        """
        terms = await self.terms()
        expected = (deployment.chain_id, deployment.forwarder.lower(), deployment.scheduler.lower())
        if (terms.chain_id, terms.forwarder.lower(), terms.scheduler.lower()) != expected:
            raise EndpointError(
                f"The relay at {self.display_url} serves another grid: chain {terms.chain_id}",
                hint="Give a relay of this deployment with --relay.",
            )
        if not terms.is_open:
            raise RelayRefusedError(
                f"The relay at {self.display_url} does not accept requests: it has too little coin",
                hint="Try again later, or give another relay with --relay.",
                code="relay-out-of-coin",
                temporary=True,
            )
        return terms

    async def submit_request(self, signed: SignedRequest, digest: str) -> RelayResponse:
        """Send a request to the relay; idempotent.

        Raises:
            RelayRefusedError: The relay refuses the request.
            EndpointError: The relay does not answer, or its response is invalid. It may have
                received the request.
        """
        return self._parse_response(
            await self._request("POST", "/v1/requests", signed.to_wire()), digest
        )

    async def state(self, digest: str) -> RelayResponse:
        """Return the relay's state of a request; errors as `submit_request`."""
        return self._parse_response(await self._request("GET", f"/v1/requests/{digest}"), digest)

    def _parse_response(self, body: Mapping[str, Any], digest: str) -> RelayResponse:
        if body.get("digest") != digest or not isinstance(body.get("state"), str):
            raise self._invalid_response()
        return RelayResponse(
            plain(body["state"])[:20],
            plain(str(body.get("transaction") or ""))[:66],
            plain(str(body.get("detail") or ""))[:500],
        )

    async def _request(self, method: str, path: str, body: Any = None) -> Mapping[str, Any]:
        response = await self._send(method, path, json=body)
        response_body = response.body()
        if response.is_success and response_body is not None:
            return response_body
        raise self._refused_error(response.status, response_body)

    def _refused_error(self, status: int, body: Mapping[str, Any] | None) -> EndpointError:
        detail = body.get("detail") if body is not None else None
        temporary = status in _TEMPORARY
        is_server_error = status >= HTTPStatus.INTERNAL_SERVER_ERROR and not temporary
        if body is None or not isinstance(detail, str) or is_server_error:
            return self._invalid_response(f"status {status}")
        nonce, hint = body.get("next_nonce"), body.get("hint")
        code = body.get("code")
        return RelayRefusedError(
            f"The relay at {self.display_url} refused: {plain(detail)[:500]}",
            hint=plain(hint)[:300] if isinstance(hint, str) else _OTHER_RELAY_HINT,
            code=code[:40] if isinstance(code, str) else "",
            next_nonce=nonce if type(nonce) is int and nonce >= 0 else None,
            temporary=temporary,
        )
