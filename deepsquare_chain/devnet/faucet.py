"""A faucet for the devnet: sends coins for gas from its account, and mints credits.

``POST /`` with ``{"address": "0x..."}`` returns ``{"address", "gas_wei", "credit_wei",
"transactions"}`` when both transactions are mined. Errors return ``{"error", "hint"}``.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Protocol

from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deepsquare_chain.chain.bindings.calls import Call, checked_address
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.observability.serving import LOOPBACK_ONLY, read_body, sends_json

GAS_WEI = 10 * 10**18
CREDIT_WEI = 1_000 * CREDIT
_MAX_BODY = 1_024
_HINT = 'Send {"address": "0x..."} as application/json.'


class Receipt(Protocol):
    """The fields of a transaction receipt that the faucet reads."""

    @property
    def hash(self) -> str: ...


class CallSender(Protocol):
    """A sender whose account has the minter role."""

    async def send(self, call: Call, *, key: str) -> Receipt: ...


class Minter(Protocol):
    """The mint function of the credit contract."""

    def mint(self, to: str, amount: int) -> Call: ...


class FaucetLimitError(GridError):
    """The address was paid within the interval."""


@dataclass(frozen=True, slots=True)
class FaucetPayment:
    """One payment; amounts in wei and credit-wei."""

    address: str
    gas_wei: int
    credit_wei: int
    transactions: tuple[str, ...]

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON form; amounts are strings, as everywhere in JSON."""
        return {
            "address": self.address,
            "gas_wei": str(self.gas_wei),
            "credit_wei": str(self.credit_wei),
            "transactions": list(self.transactions),
        }


class Faucet:
    """Pays each address at most once per ``interval`` seconds.

    If one of the two transactions fails, the next request for the address sends only that one: the
    idempotency keys of an incomplete payment are used again.
    """

    def __init__(
        self,
        sender: CallSender,
        credit: Minter,
        *,
        gas_wei: int = GAS_WEI,
        credit_wei: int = CREDIT_WEI,
        interval: float = 10.0,
    ) -> None:
        self._sender = sender
        self._credit = credit
        self._gas_wei = gas_wei
        self._credit_wei = credit_wei
        self._interval = interval
        self._paid: dict[str, float] = {}
        self._incomplete: dict[str, str] = {}

    async def pay(self, address: str) -> FaucetPayment:
        """Send gas and credits; return when both transactions are mined.

        Raises:
            UsageError: The text is not an address.
            FaucetLimitError: The address was paid within the interval.
            GridError: The sender failed.
        """
        receiver = checked_address(address)
        self._check_interval(receiver)
        payment = self._incomplete.setdefault(receiver, token_hex(8))
        gas = Call(receiver, b"", f"gas for {receiver}", self._gas_wei)
        mint = self._credit.mint(receiver, self._credit_wei)
        try:
            # Both are awaited, so that neither is still being sent when a retry begins.
            results = await asyncio.gather(
                self._sender.send(gas, key=f"gas {payment}"),
                self._sender.send(mint, key=f"credits {payment}"),
                return_exceptions=True,
            )
            hashes = tuple(_receipt(result).hash for result in results)
        except BaseException:
            self._paid.pop(receiver, None)  # allow an immediate retry
            raise
        del self._incomplete[receiver]
        return FaucetPayment(receiver, self._gas_wei, self._credit_wei, hashes)

    def _check_interval(self, receiver: str) -> None:
        now = time.monotonic()
        self._paid = {
            address: paid_at
            for address, paid_at in self._paid.items()
            if now - paid_at < self._interval
        }
        if receiver in self._paid:
            raise FaucetLimitError(
                f"The faucet has recently paid {receiver}.",
                hint=f"Try again in {self._interval:.0f} seconds.",
            )
        self._paid[receiver] = now


def _receipt(result: Receipt | BaseException) -> Receipt:
    if isinstance(result, BaseException):
        raise result
    return result


def faucet_app(faucet: Faucet) -> Starlette:
    """Return the HTTP application of the faucet, for ``LoopbackServer``."""

    async def pay(request: Request) -> Response:
        try:
            return JSONResponse((await faucet.pay(await _address(request))).to_wire())
        except GridError as error:
            status = 400 if isinstance(error, UsageError) else 503
            if isinstance(error, FaucetLimitError):
                status = 429
            return JSONResponse({"error": error.message, "hint": error.hint}, status)

    return Starlette(routes=[Route("/", pay, methods=["POST"])], middleware=[LOOPBACK_ONLY])


async def _address(request: Request) -> str:
    body = await read_body(request, _MAX_BODY) if sends_json(request) else None
    try:
        document = from_json(body or b"")
    except ValueError:
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("address"), str):
        raise UsageError("The request has no address.", hint=_HINT)
    return str(document["address"])
