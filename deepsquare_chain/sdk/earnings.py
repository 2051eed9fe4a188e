"""What a provider earned, by day."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.explorer.books import JobEntry
from deepsquare_chain.explorer.reader import read_ledger


@dataclass(frozen=True, slots=True)
class Day:
    """One day with settlements: jobs, billed seconds, and credit-wei paid without the fee.

    `sum` is all that was earned up to its end.
    """

    day: str
    jobs: int
    seconds: int
    paid: int
    sum: int


async def earnings_by_day(contracts: Contracts, account: str) -> list[Day]:
    """Days on which a provider's jobs were settled, oldest first.

    Raises:
        EndpointError: The node does not answer.
    """
    ledger, _ = await read_ledger(contracts)
    return by_day(job for job in ledger.jobs.values() if job.provider == account)


def by_day(jobs: Iterable[JobEntry]) -> list[Day]:
    """The same from a provider's jobs; those that were not settled are left out."""
    settled = sorted((job for job in jobs if job.settled), key=lambda job: job.ended_at)
    found, total = [], 0
    for day, some in groupby(settled, key=_day):
        of_day = list(some)
        paid = sum(job.paid for job in of_day)
        total += paid
        seconds = sum(job.billed_seconds for job in of_day)
        found.append(Day(day, len(of_day), seconds, paid, total))
    return found


def _day(job: JobEntry) -> str:
    return datetime.fromtimestamp(job.ended_at, UTC).strftime("%Y-%m-%d")
