"""Before anything is signed: would it be accepted, how much gas, at which fees, and can it be paid.

Gas that is not used costs nothing, so that limits are generous: between the estimate and the
block a second passes, and with it a payment may begin or a timeout of a batch's item may end.
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
from deepsquare_chain.chain.rpc.node_errors import NodeError, classify, node_message
from deepsquare_chain.chain.rpc.on_demand import next_block_counts
from deepsquare_chain.chain.transactions.fees import Fees, Market, market
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    InsufficientFundsError,
    WaitTimeoutError,
)

#: An estimate is raised by a half and by two transfers to new accounts.
_MARGIN: Final = (3, 2)
_EXTRA: Final = 100_000
#: Gas by which equal calls differ: two folders that pay the same with one wallet at the same nonce
#: would sign the same bytes, and each would take the one transaction for its own.
_SPREAD: Final = 1_000
#: The most that chains since Fusaka take in one transaction.
_MAX_GAS: Final = 2**24
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Ground:
    """What does not depend on the call: what blocks cost, and the account's coin in wei."""

    market: Market
    balance: int
    at: float


def request(sender: str, call: Call) -> Any:
    """A call as eth_call and eth_estimateGas take it."""
    body = {"from": sender, "data": HexBytes(call.data), "value": call.value}
    return body | ({"to": to_checksum_address(call.to)} if call.to else {})


class Preflight:
    """Looks before the jump, for one account.

    `ceiling` is the highest fee in wei per gas; it may be changed any time.
    """

    def __init__(self, w3: AsyncWeb3[Any], address: str, *, ceiling: int, poll: float) -> None:
        self._w3 = w3
        self._address = address
        self.ceiling = ceiling
        self._poll = poll
        self._ground: _Ground | None = None
        self._looking = asyncio.Lock()

    async def simulate(self, call: Call) -> None:
        """Try a call on the latest block, or on the next of a chain that mines only on demand.

        Raises:
            RevertedError: It would be refused.
            EndpointError: The node turned it down for another reason.
        """
        try:
            await self._w3.eth.call(request(self._address, call), await self._block())
        except ContractLogicError as error:
            raise decode_revert(error) from None
        except Web3RPCError as error:
            raise self.turned_down(call, error) from None

    async def _block(self) -> BlockIdentifier:
        """The block to simulate on: the next, with its time, where this call brings it about."""
        return "pending" if await next_block_counts(self._w3) else "latest"

    async def gas_limit(self, call: Call) -> int:
        """Gas for a call; errors as `simulate`."""
        block = await self._block()
        try:
            estimate, ground = await asyncio.gather(
                self._w3.eth.estimate_gas(request(self._address, call), block),
                self._look(),
            )
        except (ContractLogicError, Web3RPCError) as error:
            if revert_data(error) is None:
                await self.simulate(call)  # some nodes give the reason to a call only
            if isinstance(error, ContractLogicError):
                raise decode_revert(error) from None
            raise self.turned_down(call, error) from None
        over, under = _MARGIN
        most = min(ground.market.block_gas, _MAX_GAS)
        limit = min(int(estimate) * over // under + _EXTRA, most) - secrets.randbelow(_SPREAD)
        return max(int(estimate), limit)

    async def fees(self, call: Call, gas: int, deadline: float) -> Fees:
        """Fees under the ceiling that the account can pay; waits while the chain is too dear.

        Raises:
            WaitTimeoutError: Still too dear at `deadline` (monotonic seconds).
            InsufficientFundsError: The account can't pay them.
        """
        while True:
            ground = await self._look()
            least = ground.market.least
            if least <= self.ceiling:
                break
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"{call.label!r} was not sent: gas costs {least} wei, the ceiling is "
                    f"{self.ceiling} wei",
                    hint="Raise the ceiling (max_fee_gwei) or wait for a cheaper hour.",
                )
            _log.warning("gas_too_dear", label=call.label, wei=least, ceiling=self.ceiling)
            await asyncio.sleep(self._poll)
        fees = ground.market.fees.within(self.ceiling)
        needed = gas * fees.max_fee + call.value
        if ground.balance < needed:
            self._ground = None  # somebody may fill it up at once
            raise self.no_money(
                f"for {call.label!r}: it has {format_credits(ground.balance)} of the chain's coin, "
                f"up to {format_credits(needed)} may be needed"
            )
        return fees

    async def _look(self) -> _Ground:
        """Asked once for all that are about to be sent together."""
        async with self._looking:
            if self._ground is None or time.monotonic() - self._ground.at >= self._poll:
                account = to_checksum_address(self._address)
                costs, balance = await asyncio.gather(
                    market(self._w3), self._w3.eth.get_balance(account, "latest")
                )
                # Its age counts from the answer: a slow node would else be asked by each in turn.
                self._ground = _Ground(costs, int(balance), time.monotonic())
            return self._ground

    def turned_down(self, call: Call, error: Web3RPCError) -> GridError:
        """An error for people from what the node said."""
        if classify(error) is NodeError.NO_GAS_MONEY:
            return self.no_money(f"for {call.label!r}: {node_message(error)}")
        if revert_data(error):
            return decode_revert(error)
        return EndpointError(f"The node turned down {call.label!r}: {node_message(error)}")

    def no_money(self, detail: str) -> InsufficientFundsError:
        """The account is too poor for its gas."""
        return InsufficientFundsError(
            f"The account {self._address} can't pay the gas {detail}",
            hint="Send coins of the chain to it, or use a devnet's faucet.",
        )
