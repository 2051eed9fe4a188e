"""EIP-1559 fees in wei per gas, and the time that a wallet's coin for gas lasts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import structlog
from eth_utils.address import to_checksum_address
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError
from web3.types import RPCEndpoint

from deepsquare_chain.chain.transactions.outbox import Outbox
from deepsquare_chain.credits import format_credits
from deepsquare_chain.job import DAY

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics


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
    """Estimate the gas budget from a balance and recent fees.

    Args:
        balance: Coin of the account in wei.
        spent: Time of sending (seconds) and fee (wei) of each of the latest transactions.
        now: Current time in seconds on the same clock.
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
