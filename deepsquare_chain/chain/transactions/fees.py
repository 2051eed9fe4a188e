"""Fees of EIP-1559, all in wei per gas."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError
from web3.types import RPCEndpoint

GWEI: Final = 10**9
#: What pools ask of a replacement is 10 %; some ask 12.5 %.
_BUMP: Final = (9, 8)
_MIN_PRIORITY: Final = 10**6


@dataclass(frozen=True, slots=True)
class Fees:
    """What a transaction may pay per gas: in all, and of it to the block's builder."""

    max_fee: int
    priority_fee: int

    def bumped(self, fresh: Fees) -> Fees:
        """At least 12.5 % more than these on both, and never less than the fresh ones."""
        return Fees(
            max_fee=max(_raise(self.max_fee), fresh.max_fee),
            priority_fee=max(_raise(self.priority_fee), fresh.priority_fee),
        )

    def within(self, ceiling: int) -> Fees:
        """These, with the whole fee cut to the ceiling."""
        max_fee = min(self.max_fee, ceiling)
        return Fees(max_fee, min(self.priority_fee, max_fee))


def _raise(fee: int) -> int:
    over, under = _BUMP
    return -(-fee * over // under)


@dataclass(frozen=True, slots=True)
class Market:
    """What blocks cost now and hold.

    Attributes:
        least: What the next block asks.
        fees: What lasts for a while.
        block_gas: Gas that a block holds.
    """

    least: int
    fees: Fees
    block_gas: int


async def market(w3: AsyncWeb3[Any]) -> Market:
    """Ask the node for the base fee and the usual tip; both may be 0 on a private chain."""
    block, tip = await asyncio.gather(w3.eth.get_block("latest"), _tip(w3))
    base, holds = block.get("baseFeePerGas"), int(block["gasLimit"])
    if not base:
        # Without a base fee the node's price is the tip that it asks, on free chains 0.
        price = int(await w3.eth.gas_price)
        return Market(price, Fees(price, price), holds)
    # Twice the base fee outlives six full blocks in a row.
    return Market(int(base) + 1, Fees(max_fee=2 * int(base) + tip, priority_fee=tip), holds)


async def is_gas_free(w3: AsyncWeb3[Any]) -> bool:
    """Whether the chain takes transactions for nothing, from accounts without coin.

    Raises:
        EndpointError: The node does not answer.
    """
    return (await market(w3)).fees.max_fee == 0


async def _tip(w3: AsyncWeb3[Any]) -> int:
    try:
        # web3's own property warns on stderr where a node lacks the method.
        answer = await w3.manager.coro_request(RPCEndpoint("eth_maxPriorityFeePerGas"), [])
        tip = int(answer, 16) if isinstance(answer, str) else int(answer)
    except Web3RPCError:
        tip = GWEI
    return max(tip, _MIN_PRIORITY)
