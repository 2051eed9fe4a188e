"""Billing in exact integers: the same arithmetic as the contract's `Billing`, to the wei.

Units: credit-wei, seconds, MB. No floats. The only division in a bill is the fee, which is floored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.job import HOUR, NO_LOAD, Hardware, Job, Load, Offer, Prices, Resources

DECIMALS: Final = 18
CREDIT: Final = 10**DECIMALS
BASIS_POINTS: Final = 10_000
_RATE_PRECISION: Final = 10**9
#: Prices per hour of up to this many digits are shown exactly.
_SHORT: Final = 9

# Sixty digits hold any uint256 of credit-wei; longer numbers are a mistake or an attack.
_AMOUNT: Final = re.compile(r"(?P<whole>[0-9]{1,60})(?:\.(?P<part>[0-9]{1,60}))?")


@dataclass(frozen=True, slots=True)
class Settlement:
    """The split of an escrow at the end of a job, in credit-wei.

    `paid` goes to the provider and excludes `fee`, which goes to the treasury.
    """

    billed_seconds: int
    paid: int
    fee: int
    refunded: int


def parse_credits(text: str) -> int:
    """Convert a decimal amount of credits, such as `1.5`, to credit-wei.

    Raises:
        ValueError: Not a plain decimal number, negative, or with more than 18 decimals.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text[:80]!r} is not a valid amount of credits: write a number such as 1.5"
        )
    part = (match["part"] or "").rstrip("0")
    if len(part) > DECIMALS:
        raise ValueError(f"{text[:80]!r} has more than {DECIMALS} decimals")
    return int(match["whole"]) * CREDIT + int(part.ljust(DECIMALS, "0"))


def credit_count(amount: int) -> str:
    """Format an amount in credit-wei with its unit: `1 credit`, `2.5 credits`."""
    return f"{format_credits(amount)} credit{'s' * (amount != CREDIT)}"


def format_credits(amount: int) -> str:
    """Format an amount in credit-wei as exact decimal credits, without trailing zeros."""
    whole, part = divmod(abs(amount), CREDIT)
    sign = "-" if amount < 0 else ""
    decimals = f"{part:0{DECIMALS}d}".rstrip("0")
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


def hourly(wei_per_second: int) -> str:
    """Format a price in credit-wei per second as credits per hour, as it was entered.

    Prices are entered per hour and stored per second, rounded down to the wei. The result is the
    shortest decimal that gives the same price again. A sum of such prices (a job's rate) is rounded
    up by at most one part in 10^9.
    """
    least = wei_per_second * HOUR
    if len(str(least).rstrip("0")) <= _SHORT:
        return format_credits(least)
    most = least + max(HOUR - 1, least // _RATE_PRECISION)
    unit = 10 ** len(str(most))
    while (shortest := -(-least // unit) * unit) > most:
        unit //= 10
    return format_credits(shortest)


def job_rate(prices: Prices, resources: Resources) -> int:
    """Return the price of a job in credit-wei per second."""
    return resources.cpus * prices.cpu + resources.gpus * prices.gpu + resources.memory * prices.mem


def cost(rate: int, seconds: int) -> int:
    """Return the price of a run in credit-wei, including the fee."""
    return rate * seconds


def fee(cost: int, bps: int) -> int:
    """Return the treasury's share of a cost in credit-wei, floored."""
    return cost * bps // BASIS_POINTS


def allotment(time_limit: int, until_spent: bool, escrow: int, rate: int) -> int:
    """Return the maximum length of a run in seconds; zero without a rate.

    It is the time limit, or the time until the escrow is spent.
    """
    if rate == 0:
        return 0
    return escrow // rate if until_spent else time_limit


def billed_seconds(reported: int, elapsed: int, allotment: int) -> int:
    """Return the seconds to bill: at most the elapsed chain time and at most the allotment."""
    return min(reported, elapsed, allotment)


def unbilled_revenue(job: Job, now: int) -> int:
    """Return the unbilled earnings of a RUNNING job's provider at chain time `now`, in credit-wei.

    The fee is excluded. The time counts from the start or the last interim payment, and is at most
    the allotment. If the run is lost, the provider forfeits this amount.
    """
    allotted = allotment(job.time_limit, job.until_spent, job.escrow, job.rate)
    consumed = cost(job.rate, billed_seconds(allotted, max(0, now - job.since), allotted))
    return consumed - fee(consumed, job.fee_bps)


def settle(
    *,
    escrow: int,
    rate: int,
    fee_bps: int,
    time_limit: int,
    until_spent: bool,
    reported: int,
    elapsed: int,
) -> Settlement:
    """Split an escrow as the contract does when a run ends.

    `reported` is the provider's claim, `elapsed` the chain time since the start, both in seconds.
    `rate` and `fee_bps` (basis points) were fixed at the assignment.

    Raises:
        ValueError: The bill exceeds the escrow, which does not happen with records on chain.
    """
    billed = billed_seconds(reported, elapsed, allotment(time_limit, until_spent, escrow, rate))
    consumed = cost(rate, billed)
    if consumed > escrow:
        raise ValueError(f"{billed} s at {rate} wei costs more than the escrow of {escrow} wei")
    share = fee(consumed, fee_bps)
    return Settlement(billed, consumed - share, share, escrow - consumed)


def fits(hardware: Hardware, offer: Offer, resources: Resources, load: Load = NO_LOAD) -> bool:
    """Whether each task fits on a node, and the whole job fits the offer less the load."""
    memory_per_task = resources.cpus_per_task * resources.mem_per_cpu
    if resources.cpus_per_task < 1 or memory_per_task < 1:
        return False
    per_node = min(
        hardware.cpus_per_node // resources.cpus_per_task, hardware.mem_per_node // memory_per_task
    )
    return (
        resources.tasks <= hardware.nodes * per_node
        and load.cpus + resources.cpus <= offer.cpus
        and load.memory + resources.memory <= offer.memory
        and load.gpus + resources.gpus <= offer.gpus
    )
