"""Fees and gas: EIP-1559 fees, checks before signing, and the time that a wallet's coin lasts.

Fees are in wei per gas. The checks are a simulation, the gas limit, the fees and the balance. Unused gas
costs nothing, so gas limits are generous: time passes between the estimate and the block, in which a
payment may begin or a timeout of an item of a batch may end.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import structlog
from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, Web3RPCError
from web3.types import BlockIdentifier, RPCEndpoint

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.reverts import decode_revert, revert_data
from deepsquare_chain.chain.rpc.heads import next_block_needs_transaction
from deepsquare_chain.chain.rpc.responses import NodeError, classify, node_message
from deepsquare_chain.chain.transactions.outbox import Outbox
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    InsufficientFundsError,
    WaitTimeoutError,
)
from deepsquare_chain.job import DAY

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics

GWEI: Final = 10**9
#: Mempools accept a replacement transaction with fees 10 % higher; some require 12.5 %.
_BUMP: Final = (9, 8)
_MIN_PRIORITY: Final = 10**6

#: Margin on a gas estimate: one half more, plus the gas of two transfers to new accounts.
_MARGIN: Final = (3, 2)
_EXTRA: Final = 100_000
#: Range of the random gas that is subtracted from the limit. It makes equal calls differ: two state
#: folders that send the same call from one wallet at the same nonce would otherwise sign the same
#: bytes, and each would take the one transaction for its own.
_SPREAD: Final = 1_000
#: Gas limit of one transaction on chains since the Fusaka upgrade.
_MAX_GAS: Final = 2**24


@dataclass(frozen=True, slots=True)
class Fees:
    """Fee limits of a transaction per gas: the total, and the part that is the builder's tip."""

    max_fee: int
    priority_fee: int

    def bumped(self, fresh: Fees) -> Fees:
        """Return both fees raised by at least 12.5 %, and to at least the `fresh` fees."""
        return Fees(
            max_fee=max(_bumped(self.max_fee), fresh.max_fee),
            priority_fee=max(_bumped(self.priority_fee), fresh.priority_fee),
        )

    def within(self, ceiling: int) -> Fees:
        """Return these fees with the total limited to the ceiling."""
        max_fee = min(self.max_fee, ceiling)
        return Fees(max_fee, min(self.priority_fee, max_fee))


def _bumped(fee: int) -> int:
    numerator, denominator = _BUMP
    return -(-fee * numerator // denominator)


@dataclass(frozen=True, slots=True)
class Market:
    """Current gas prices and block size."""

    minimum: int  # minimum fee for the next block
    fees: Fees  # fees that stay sufficient for several full blocks
    block_gas: int  # gas limit of a block


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


# -- estimates of how long a wallet's coin for gas lasts; amounts are in wei

#: A warning is logged if the balance falls below either of these.
LOW_TRANSACTIONS: Final = 50
LOW_DAYS: Final = 2.0
#: Seconds of history that are needed before a cost per day is estimated.
_MIN_SPAN: Final = 3_600
#: Seconds between two reads of the balance, and between two warnings.
_CHECK_INTERVAL: Final = 60.0
_WARN_INTERVAL: Final = 3_600.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GasBudget:
    """Balance, and estimated cost per transaction and per day in wei; None if not known.

    `free`: gas is free on this chain.
    """

    balance: int
    per_transaction: int | None = None
    per_day: int | None = None
    free: bool = False

    @property
    def transactions(self) -> int | None:
        """Number of transactions that the balance pays."""
        return self.balance // self.per_transaction if self.per_transaction else None

    @property
    def days(self) -> float | None:
        """Number of days that the balance lasts."""
        return self.balance / self.per_day if self.per_day else None

    @property
    def low(self) -> bool:
        """Whether the account needs more coin."""
        if self.free:
            return False
        few = self.transactions is not None and self.transactions < LOW_TRANSACTIONS
        return few or (self.days is not None and self.days < LOW_DAYS) or self.balance == 0

    def describe(self) -> str:
        """Return a readable description."""
        balance = f"{format_credits(self.balance)} coin for gas"
        if self.free:
            return f"{balance}, which is free on this chain"
        if self.transactions is None:
            return balance
        text = f"{balance}: enough for about {self.transactions:,} transactions"
        return text if self.days is None else f"{text}, or {self.days:,.1f} days at the recent rate"


def gas_budget(balance: int, spent: Sequence[tuple[int, int]], now: float) -> GasBudget:
    """Estimate the gas budget from a balance in wei and recent transactions.

    `spent` holds their times of sending (seconds, on the same clock as `now`) and fees (wei).
    """
    if not spent:
        return GasBudget(balance)
    per_transaction = -(-sum(fee for _, fee in spent) // len(spent))
    today = [(sent, fee) for sent, fee in spent if now - sent <= DAY]
    span = now - min((sent for sent, _ in today), default=now)
    if span < _MIN_SPAN:
        return GasBudget(balance, per_transaction)
    per_day = int(sum(fee for _, fee in today) * DAY / span)
    return GasBudget(balance, per_transaction, per_day)


class GasMonitor:
    """Checks the coin of one account periodically; with `metrics` None, exports no metrics."""

    def __init__(
        self, w3: AsyncWeb3[Any], address: str, outbox: Outbox, metrics: Metrics | None
    ) -> None:
        self._w3 = w3
        self._address = address
        self._outbox = outbox
        self._checked_at: float | None = None
        self._warned_at: float | None = None
        self._metrics = metrics
        if metrics is not None:
            self._count = metrics.gauge(
                "gas_runway_transactions", "Transactions that the coin for gas is sufficient for."
            )
            self._seconds = metrics.gauge(
                "gas_runway_seconds",
                "Seconds that the coin for gas lasts at the latest day's rate.",
            )

    async def check_balance(self) -> None:
        """Read the balance if a check is due, export it, and log a warning if it is low.

        Raises:
            EndpointError: The node does not answer.
        """
        now = time.monotonic()
        if self._checked_at is not None and now - self._checked_at < _CHECK_INTERVAL:
            return
        address = to_checksum_address(self._address)
        balance = int(await self._w3.eth.get_balance(address, "latest"))
        self._checked_at = now
        budget = gas_budget(balance, self._outbox.spent(), time.time())
        if budget.low and await is_gas_free(self._w3):
            budget = replace(budget, free=True)
        if self._metrics is not None:
            seconds = None if budget.days is None else budget.days * DAY
            for gauge, value in ((self._count, budget.transactions), (self._seconds, seconds)):
                gauge.set(float("nan") if value is None else value)
        if budget.low and (self._warned_at is None or now - self._warned_at >= _WARN_INTERVAL):
            self._warned_at = now
            _log.warning("gas ran low", account=self._address, left=budget.describe())


@dataclass(frozen=True, slots=True)
class _PricesAndBalance:
    """Inputs that do not depend on the call: gas prices, and the account's coin in wei."""

    market: Market
    balance: int
    at: float


def call_parameters(sender: str, call: Call) -> Any:
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
            await self._w3.eth.call(call_parameters(self._address, call), await self._block())
        except ContractLogicError as error:
            raise decode_revert(error) from None
        except Web3RPCError as error:
            raise self.rejection(call, error) from None

    async def _block(self) -> BlockIdentifier:
        """Return the block to simulate on: "pending" if only this call causes the next block."""
        return "pending" if await next_block_needs_transaction(self._w3) else "latest"

    async def gas_limit(self, call: Call) -> int:
        """Return the gas limit for a call; raises the errors of `simulate`."""
        block = await self._block()
        try:
            estimate, account_state = await asyncio.gather(
                self._w3.eth.estimate_gas(call_parameters(self._address, call), block),
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
