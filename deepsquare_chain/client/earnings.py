"""What a provider has earned by day, and what its runs have earned and not billed yet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.events import (
    JobCollected,
    JobSettled,
    decode_logs,
    event_filter,
)
from deepsquare_chain.chain.rpc.log_reader import read_logs
from deepsquare_chain.client.job_list import newest
from deepsquare_chain.credits import unbilled_revenue
from deepsquare_chain.job import Job, JobStatus

#: Block headers asked for at once.
_AT_ONCE: Final = 50
_MOST_RUNS: Final = 10_000

Payment = JobCollected | JobSettled


@dataclass(frozen=True, slots=True)
class Day:
    """One day, month or year with payments: jobs that paid, billed seconds, and credit-wei without the fee.

    `sum` is all that was earned up to its end.
    """

    day: str
    jobs: int
    seconds: int
    paid: int
    sum: int


@dataclass(frozen=True, slots=True)
class Accrued:
    """Revenue of RUNNING jobs that nobody has billed yet, in credit-wei without the fee.

    `at_risk` is the largest part of it that one lost run would forfeit now, `job_id` that run
    (zero without any).
    """

    runs: int = 0
    amount: int = 0
    at_risk: int = 0
    job_id: int = 0


async def earnings_by(
    contracts: Contracts,
    account: str,
    *,
    span: str = "%Y-%m-%d",
    first: int = 0,
    last: int | None = None,
) -> list[Day]:
    """Periods in which jobs paid a provider, interim payments included, oldest first.

    Args:
        contracts: The deployment.
        account: The provider.
        span: How a moment of a period is written (strftime): the same text, the same period.
        first: First block that counts.
        last: Last block that counts; the newest by default.

    Raises:
        EndpointError: The node does not answer.
    """
    topics = event_filter(JobSettled, JobCollected, provider=account)
    start = max(first, contracts.deployment.block)
    logs = await read_logs(contracts.w3, [contracts.scheduler.address], topics, start, last)
    payments = [event for event in decode_logs(logs) if isinstance(event, Payment)]
    times = await _times(contracts, {each.block_number for each in payments})
    return by_period(payments, times, span)


def by_period(
    payments: Iterable[Payment], times: Mapping[int, int], span: str = "%Y-%m-%d"
) -> list[Day]:
    """The same from the events of a provider and the chain times of their blocks."""
    paid = [each for each in payments if each.billed_seconds]
    paid.sort(key=lambda each: each.place)
    found, total = [], 0
    for day, some in groupby(paid, key=lambda each: _written(times[each.block_number], span)):
        of_day = list(some)
        amount = sum(each.paid for each in of_day)
        total += amount
        seconds = sum(each.billed_seconds for each in of_day)
        found.append(Day(day, len({each.job_id for each in of_day}), seconds, amount, total))
    return found


async def accrued_now(contracts: Contracts, provider_id: int) -> Accrued:
    """What the RUNNING jobs of a provider have earned by the latest block's time.

    Raises:
        EndpointError: The node does not answer.
    """
    block = await contracts.w3.eth.get_block("latest")
    running = await newest(
        contracts, limit=_MOST_RUNS, provider_id=provider_id, statuses={JobStatus.RUNNING}
    )
    return accrued([job for job, _ in running], int(block["timestamp"]))


def accrued(jobs: Iterable[Job], now: int) -> Accrued:
    """The same from the records, at chain time `now`."""
    amounts = {job.id: unbilled_revenue(job, now) for job in jobs}
    if not amounts:
        return Accrued()
    worst = max(amounts, key=lambda job_id: amounts[job_id])
    return Accrued(len(amounts), sum(amounts.values()), amounts[worst], worst)


async def _times(contracts: Contracts, blocks: Iterable[int]) -> dict[int, int]:
    wanted = sorted(blocks)
    times: dict[int, int] = {}
    for at in range(0, len(wanted), _AT_ONCE):
        part = wanted[at : at + _AT_ONCE]
        headers = await asyncio.gather(*(contracts.w3.eth.get_block(number) for number in part))
        times |= {
            number: int(each["timestamp"]) for number, each in zip(part, headers, strict=True)
        }
    return times


def _written(time: int, span: str) -> str:
    return datetime.fromtimestamp(time, UTC).strftime(span)
