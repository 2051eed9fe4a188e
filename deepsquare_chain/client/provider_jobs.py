"""Jobs of a provider: earnings by period, unbilled revenue, and the wait for the last of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
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
from deepsquare_chain.client.jobs import newest
from deepsquare_chain.credits import unbilled_revenue
from deepsquare_chain.errors import EndpointError, WaitTimeoutError
from deepsquare_chain.job import Job, JobStatus

#: Concurrent requests for block headers.
_MAX_REQUESTS: Final = 50
_MAX_RUNS: Final = 10_000

Payment = JobCollected | JobSettled

#: Poll interval in seconds.
_DRAIN_POLL_SECONDS: Final = 2.0
#: Maximum number of jobs per poll; further jobs are read once these have ended.
_JOBS_PER_POLL: Final = 500


@dataclass(frozen=True, slots=True)
class Day:
    """A period with payments: number of jobs, billed seconds, and credit-wei without the fee.

    The period is a day, month or year. `sum` is the cumulative amount up to its end.
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
    """Return the periods with payments to a provider, interim payments included, oldest first.

    Args:
        contracts: Contracts of the deployment.
        account: Address of the provider.
        span: Format of a period (strftime); payments with the same text are in the same period.
        first: First block to read.
        last: Last block to read; the newest by default.

    Raises:
        EndpointError: The endpoint does not answer.
    """
    topics = event_filter(JobSettled, JobCollected, provider=account)
    start = max(first, contracts.deployment.block)
    logs = await read_logs(contracts.w3, [contracts.scheduler.address], topics, start, last)
    payments = [event for event in decode_logs(logs) if isinstance(event, Payment)]
    times = await _times(contracts, {payment.block_number for payment in payments})
    return by_period(payments, times, span)


def by_period(
    payments: Iterable[Payment], times: Mapping[int, int], span: str = "%Y-%m-%d"
) -> list[Day]:
    """Return the periods of payments, given the chain time of each block number."""
    paid = [payment for payment in payments if payment.billed_seconds]
    paid.sort(key=lambda payment: payment.position)
    days, total = [], 0
    for day, payments_of_day in groupby(
        paid, key=lambda payment: _format_period(times[payment.block_number], span)
    ):
        of_day = list(payments_of_day)
        amount = sum(payment.paid for payment in of_day)
        total += amount
        seconds = sum(payment.billed_seconds for payment in of_day)
        days.append(Day(day, len({payment.job_id for payment in of_day}), seconds, amount, total))
    return days


async def accrued_now(contracts: Contracts, provider_id: int) -> Accrued:
    """Return the unbilled revenue of a provider's RUNNING jobs at the time of the latest block.

    Raises:
        EndpointError: The endpoint does not answer.
    """
    block = await contracts.w3.eth.get_block("latest")
    running = await newest(
        contracts, limit=_MAX_RUNS, provider_id=provider_id, statuses={JobStatus.RUNNING}
    )
    return accrued([job for job, _ in running], int(block["timestamp"]))


def accrued(jobs: Iterable[Job], now: int) -> Accrued:
    """Return the unbilled revenue of RUNNING jobs at chain time `now`."""
    amounts = {job.id: unbilled_revenue(job, now) for job in jobs}
    if not amounts:
        return Accrued()
    worst = max(amounts, key=lambda job_id: amounts[job_id])
    return Accrued(len(amounts), sum(amounts.values()), amounts[worst], worst)


async def _times(contracts: Contracts, blocks: Iterable[int]) -> dict[int, int]:
    block_numbers = sorted(blocks)
    times: dict[int, int] = {}
    for start in range(0, len(block_numbers), _MAX_REQUESTS):
        batch = block_numbers[start : start + _MAX_REQUESTS]
        headers = await asyncio.gather(*(contracts.w3.eth.get_block(number) for number in batch))
        times |= {
            number: int(header["timestamp"]) for number, header in zip(batch, headers, strict=True)
        }
    return times


def _format_period(time: int, span: str) -> str:
    return datetime.fromtimestamp(time, UTC).strftime(span)


async def wait_until_empty(
    contracts: Contracts,
    provider_id: int,
    *,
    timeout: float | None,
    report: Callable[[str], None],
    interval: float = _DRAIN_POLL_SECONDS,
) -> None:
    """Wait until no job is assigned to a provider; retries while the endpoint is down.

    Args:
        contracts: Contracts of the grid.
        provider_id: The provider.
        timeout: Maximum seconds to wait; None for no limit.
        report: Called with a line whenever the number of jobs changes.
        interval: Poll interval in seconds.

    Raises:
        WaitTimeoutError: Jobs were left at the timeout.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    assigned = {status for status in JobStatus if status.is_assigned}
    last_count, is_endpoint_down = -1, False
    while True:
        try:
            jobs = await newest(
                contracts, limit=_JOBS_PER_POLL, provider_id=provider_id, statuses=assigned
            )
        except EndpointError as error:
            if not is_endpoint_down:
                report(f"Waiting for the endpoint: {error.message}")
            is_endpoint_down = True
        else:
            is_endpoint_down = False
            if not jobs:
                report("No job is assigned to this provider any more.")
                return
            if len(jobs) != last_count:
                last_count = len(jobs)
                running = sum(job.status is JobStatus.RUNNING for job, _ in jobs)
                report(f"Jobs left: {last_count}, of which {running} are running.")
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimeoutError(
                f"Jobs were still assigned after the timeout of {timeout:.3g} s",
                hint="The maintenance continues; `deepsquare provider jobs` lists them.",
            )
        await asyncio.sleep(interval)
