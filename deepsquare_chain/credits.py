"""Exact integer money: the same arithmetic as the contract's `Billing`, to the wei.

Units: credit-wei, seconds, MB. No float, and no division on the way to a bill but the fee, which
is floored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.job import NO_LOAD, Hardware, Job, Load, Offer, Prices, Resources

DECIMALS: Final = 18
CREDIT: Final = 10**DECIMALS
BASIS_POINTS: Final = 10_000
SECONDS_PER_HOUR: Final = 3_600
_RATE_PRECISION: Final = 10**9
#: Digits up to which an hourly price is shown exactly.
_SHORT: Final = 9

# Sixty digits hold any uint256 of credit-wei; more is a mistake or an attack.
_AMOUNT: Final = re.compile(r"(?P<whole>[0-9]{1,60})(?:\.(?P<part>[0-9]{1,60}))?")


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an escrow was split at the end of a job, in credit-wei.

    `paid` goes to the provider and excludes `fee`, which goes to the treasury.
    """

    billed_seconds: int
    paid: int
    fee: int
    refunded: int


def parse_credits(text: str) -> int:
    """Credit-wei of a decimal amount of credits such as `1.5`.

    Raises:
        ValueError: No plain decimal number, negative, or finer than 18 decimals.
    """
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"{text[:80]!r} is not a valid amount of credits: write a number such as 1.5"
        )
    part = (found["part"] or "").rstrip("0")
    if len(part) > DECIMALS:
        raise ValueError(f"{text[:80]!r} is finer than {DECIMALS} decimals")
    return int(found["whole"]) * CREDIT + int(part.ljust(DECIMALS, "0"))


def format_credits(amount: int) -> str:
    """The exact decimal of an amount in credit-wei, without trailing zeros."""
    whole, part = divmod(abs(amount), CREDIT)
    sign = "-" if amount < 0 else ""
    decimals = f"{part:0{DECIMALS}d}".rstrip("0")
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


def hourly(wei_per_second: int) -> str:
    """A price per second in credit-wei as decimal credits per hour, as it was entered.

    A price that a person enters per hour is kept per second, rounded down to the wei. Shown is the
    shortest decimal that gives the same price again; a sum of such prices (a job's rate) is rounded
    up within one part in 10^9.
    """
    least = wei_per_second * SECONDS_PER_HOUR
    if len(str(least).rstrip("0")) <= _SHORT:
        return format_credits(least)
    most = least + max(SECONDS_PER_HOUR - 1, least // _RATE_PRECISION)
    unit = 10 ** len(str(most))
    while (shortest := -(-least // unit) * unit) > most:
        unit //= 10
    return format_credits(shortest)


def job_rate(prices: Prices, resources: Resources) -> int:
    """Price of a job in credit-wei a second."""
    return resources.cpus * prices.cpu + resources.gpus * prices.gpu + resources.memory * prices.mem


def cost(rate: int, seconds: int) -> int:
    """Price of a run in credit-wei, the fee included."""
    return rate * seconds


def fee(cost: int, bps: int) -> int:
    """The treasury's share of a cost, in credit-wei, floored."""
    return cost * bps // BASIS_POINTS


def allotment(time_limit: int, until_spent: bool, escrow: int, rate: int) -> int:
    """Seconds that a run may last: its limit, or until the escrow is spent; zero without a rate."""
    if rate == 0:
        return 0
    return escrow // rate if until_spent else time_limit


def billed_seconds(reported: int, elapsed: int, allotment: int) -> int:
    """Seconds that are billed: never more than passed on chain, never more than allotted."""
    return min(reported, elapsed, allotment)


def unbilled_revenue(job: Job, now: int) -> int:
    """What a RUNNING job has earned for its provider at chain time `now` and nobody has billed yet.

    Credit-wei, without the fee; by chain time since the start or the last interim payment, and never
    more than the allotment. A run that is lost forfeits it.
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

    Args:
        escrow: Credit-wei held for the job.
        rate: Credit-wei a second, fixed at assignment.
        fee_bps: Fee in basis points, fixed at assignment.
        time_limit: Walltime in seconds.
        until_spent: Whether the run lasts until the escrow is spent.
        reported: Seconds that the provider reports.
        elapsed: Seconds of chain time since the start.

    Raises:
        ValueError: The terms bill more than the escrow holds, which no record on chain does.
    """
    billed = billed_seconds(reported, elapsed, allotment(time_limit, until_spent, escrow, rate))
    consumed = cost(rate, billed)
    if consumed > escrow:
        raise ValueError(f"{billed} s at {rate} wei cost more than the escrow of {escrow} wei")
    share = fee(consumed, fee_bps)
    return Settlement(billed, consumed - share, share, escrow - consumed)


def fits(hardware: Hardware, offer: Offer, resources: Resources, load: Load = NO_LOAD) -> bool:
    """Whether the tasks fit node by node, and the whole fits the offer less the load."""
    memory_per_task = resources.cpus_per_task * resources.mem_per_cpu
    if resources.cpus_per_task < 1 or memory_per_task < 1:
        return False
    per_node = min(
        hardware.cpus_per_node // resources.cpus_per_task,
        hardware.mem_per_node // memory_per_task,
    )
    return (
        resources.tasks <= hardware.nodes * per_node
        and load.cpus + resources.cpus <= offer.cpus
        and load.memory + resources.memory <= offer.memory
        and load.gpus + resources.gpus <= offer.gpus
    )
