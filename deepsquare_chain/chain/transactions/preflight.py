"""Checks before signing: simulation, gas limit, fees, and the account's balance.

Unused gas costs nothing, so gas limits are generous: time passes between the estimate and the
block, in which a payment may begin or a timeout of an item of a batch may end.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass
from typing import Any, Final

import structlog
from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, Web3RPCError
from web3.types import BlockIdentifier

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.reverts import decode_revert, revert_data
from deepsquare_chain.chain.rpc.heads import next_block_counts
from deepsquare_chain.chain.rpc.responses import NodeError, classify, node_message
from deepsquare_chain.chain.transactions.fees import Fees, Market, market
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    InsufficientFundsError,
    WaitTimeoutError,
)

#: Margin on a gas estimate: one half more, plus the gas of two transfers to new accounts.
_MARGIN: Final = (3, 2)
_EXTRA: Final = 100_000
#: Range of the random gas that is subtracted from the limit. It makes equal calls differ: two state
#: folders that send the same call from one wallet at the same nonce would otherwise sign the same
#: bytes, and each would take the one transaction for its own.
_SPREAD: Final = 1_000
#: Gas limit of one transaction on chains since the Fusaka upgrade.
_MAX_GAS: Final = 2**24
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _PricesAndBalance:
    """Inputs that do not depend on the call: gas prices, and the account's coin in wei."""

    market: Market
    balance: int
    at: float


def request(sender: str, call: Call) -> Any:
    """Return the parameters of eth_call and eth_estimateGas for a call."""
    body = {"from": sender, "data": HexBytes(call.data), "value": call.value}
    return body | ({"to": to_checksum_address(call.to)} if call.to else {})


class Preflight:
    """Checks the calls of one account before they are signed.

    `ceiling` is the highest fee in wei per gas; it can be changed at any time.
    """

    def __init__(self, w3: AsyncWeb3[Any], address: str, *, ceiling: int, poll: float) -> None:
        self._w3 = w3
        self._address = address
        self.ceiling = ceiling
        self._poll_interval = poll
        self._cached: _PricesAndBalance | None = None
        self._lock = asyncio.Lock()

    async def simulate(self, call: Call) -> None:
        """Simulate a call on the latest block, or on the pending one if the chain mines on demand.

        Raises:
            RevertedError: The call would revert.
            EndpointError: The node rejected it for another reason.
        """
        try:
            await self._w3.eth.call(request(self._address, call), await self._block())
        except ContractLogicError as error:
            raise decode_revert(error) from None
        except Web3RPCError as error:
            raise self.rejection(call, error) from None

    async def _block(self) -> BlockIdentifier:
        """Return the block to simulate on: "pending" if only this call causes the next block."""
        return "pending" if await next_block_counts(self._w3) else "latest"

    async def gas_limit(self, call: Call) -> int:
        """Return the gas limit for a call; raises the errors of `simulate`."""
        block = await self._block()
        try:
            estimate, account_state = await asyncio.gather(
                self._w3.eth.estimate_gas(request(self._address, call), block),
                self._prices_and_balance(),
            )
        except (ContractLogicError, Web3RPCError) as error:
            if revert_data(error) is None:
                await self.simulate(call)  # some nodes give a revert reason for eth_call only
            if isinstance(error, ContractLogicError):
                raise decode_revert(error) from None
            raise self.rejection(call, error) from None
        factor, divisor = _MARGIN
        cap = min(account_state.market.block_gas, _MAX_GAS)
        limit = min(int(estimate) * factor // divisor + _EXTRA, cap) - secrets.randbelow(_SPREAD)
        return max(int(estimate), limit)

    async def fees(self, call: Call, gas: int, deadline: float) -> Fees:
        """Return fees below the ceiling that the account can pay; wait while gas costs more.

        Raises:
            WaitTimeoutError: Gas still costs more than the ceiling at `deadline` (monotonic
                seconds).
            InsufficientFundsError: The account can't pay the fees.
        """
        while True:
            account_state = await self._prices_and_balance()
            minimum = account_state.market.minimum
            if minimum <= self.ceiling:
                break
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"{call.label!r} was not sent: the gas price is {minimum} wei, the ceiling is "
                    f"{self.ceiling} wei",
                    hint="Raise the ceiling (max_fee_gwei) or wait until gas is cheaper.",
                )
            _log.warning(
                "gas price exceeded ceiling", label=call.label, wei=minimum, ceiling=self.ceiling
            )
            await asyncio.sleep(self._poll_interval)
        fees = account_state.market.fees.within(self.ceiling)
        needed = gas * fees.max_fee + call.value
        if account_state.balance < needed:
            self._cached = None  # the account may be funded at once
            raise self.insufficient_funds(
                f"for {call.label!r}: it has {format_credits(account_state.balance)} of the chain's coin, "
                f"up to {format_credits(needed)} may be needed"
            )
        return fees

    async def _prices_and_balance(self) -> _PricesAndBalance:
        """Return prices and balance, requested once per poll interval for concurrent calls."""
        async with self._lock:
            if self._cached is None or time.monotonic() - self._cached.at >= self._poll_interval:
                account = to_checksum_address(self._address)
                prices, balance = await asyncio.gather(
                    market(self._w3), self._w3.eth.get_balance(account, "latest")
                )
                # The age counts from the response; otherwise each caller would ask a slow node.
                self._cached = _PricesAndBalance(prices, int(balance), time.monotonic())
            return self._cached

    def rejection(self, call: Call, error: Web3RPCError) -> GridError:
        """Convert a node's rejection to a readable error."""
        if classify(error) is NodeError.INSUFFICIENT_FUNDS:
            return self.insufficient_funds(f"for {call.label!r}: {node_message(error)}")
        if revert_data(error):
            return decode_revert(error)
        return EndpointError(f"The node rejected {call.label!r}: {node_message(error)}")

    def insufficient_funds(self, detail: str) -> InsufficientFundsError:
        """Return the error for an account that can't pay its gas."""
        return InsufficientFundsError(
            f"The account {self._address} can't pay the gas {detail}",
            hint="Send coins of the chain to it, or use a devnet's faucet.",
        )
