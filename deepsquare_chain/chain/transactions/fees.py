"""EIP-1559 fees, all in wei per gas."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError
from web3.types import RPCEndpoint

GWEI: Final = 10**9
#: Mempools accept a replacement transaction with fees 10 % higher; some require 12.5 %.
_BUMP: Final = (9, 8)
_MIN_PRIORITY: Final = 10**6


@dataclass(frozen=True, slots=True)
class Fees:
    """Fee limits of a transaction per gas: the total, and the part that is the builder's tip."""

    max_fee: int
    priority_fee: int

    def bumped(self, fresh: Fees) -> Fees:
        """Return both fees raised by at least 12.5 %, and to at least the `fresh` fees."""
        return Fees(
            max_fee=max(_raise(self.max_fee), fresh.max_fee),
            priority_fee=max(_raise(self.priority_fee), fresh.priority_fee),
        )

    def within(self, ceiling: int) -> Fees:
        """Return these fees with the total limited to the ceiling."""
        max_fee = min(self.max_fee, ceiling)
        return Fees(max_fee, min(self.priority_fee, max_fee))


def _raise(fee: int) -> int:
    numerator, denominator = _BUMP
    return -(-fee * numerator // denominator)


@dataclass(frozen=True, slots=True)
class Market:
    """Current gas prices and block size.

    Attributes:
        minimum: Minimum fee for the next block.
        fees: Fees that stay sufficient for several full blocks.
        block_gas: Gas limit of a block.
    """

    minimum: int
    fees: Fees
    block_gas: int


async def market(w3: AsyncWeb3[Any]) -> Market:
    """Read the base fee and the usual tip from the node; both may be 0 on a private chain."""
    block, tip = await asyncio.gather(w3.eth.get_block("latest"), _tip(w3))
    base, block_gas = block.get("baseFeePerGas"), int(block["gasLimit"])
    if not base:
        # Without a base fee the gas price is the tip that the node requires; 0 on free chains.
        price = int(await w3.eth.gas_price)
        return Market(price, Fees(price, price), block_gas)
    # Twice the base fee is sufficient for up to six full blocks in a row.
    return Market(int(base) + 1, Fees(max_fee=2 * int(base) + tip, priority_fee=tip), block_gas)


async def is_gas_free(w3: AsyncWeb3[Any]) -> bool:
    """Return whether gas is free, so that an account without coin can send transactions.

    Raises:
        EndpointError: The node does not answer.
    """
    return (await market(w3)).fees.max_fee == 0


async def _tip(w3: AsyncWeb3[Any]) -> int:
    try:
        # web3's own property prints a warning on stderr if the node lacks the method.
        result = await w3.manager.coro_request(RPCEndpoint("eth_maxPriorityFeePerGas"), [])
        tip = int(result, 16) if isinstance(result, str) else int(result)
    except Web3RPCError:
        tip = GWEI
    return max(tip, _MIN_PRIORITY)
