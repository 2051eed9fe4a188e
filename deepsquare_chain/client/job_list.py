"""Lists of jobs, the newest first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.client.history import History, histories
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import Job, JobStatus

#: Records read in one go, from the newest backwards.
_PAGE = 500


class ListedJob(NamedTuple):
    """A job record with what the chain's events tell of it."""

    job: Job
    history: History

    def elapsed(self, now: int) -> int | None:
        """Seconds that it has run by chain time `now`, billed ones included; None before its start."""
        billed = self.history.billed_seconds
        if self.job.status is JobStatus.RUNNING:
            return (billed or 0) + max(0, now - self.job.since)
        return billed


def parse_statuses(names: Iterable[str]) -> set[JobStatus]:
    """Statuses by name; none given means all.

    Raises:
        UsageError: A name is no status.
    """
    known: dict[str, JobStatus] = {each.name: each for each in list(JobStatus)[1:]}
    found: set[JobStatus] = set()
    for name in names:
        key = name.upper().replace("-", "_")
        if key not in known:
            raise UsageError(
                f"{name[:40]!r} is not a status", hint=f"Use one of {', '.join(known)}."
            )
        found.add(known[key])
    return found or set(known.values())


async def newest(
    contracts: Contracts,
    *,
    limit: int,
    customer: str | None = None,
    provider_id: int | None = None,
    statuses: Collection[JobStatus],
    names: Sequence[str] = (),
) -> list[ListedJob]:
    """The newest jobs that meet all conditions.

    Args:
        contracts: The deployment.
        limit: How many at most.
        customer: Only jobs of this account.
        provider_id: Only jobs of this provider.
        statuses: Only jobs of these statuses.
        names: Only jobs of one of these names; `*`, `?` and `[...]` stand for other characters.

    Raises:
        EndpointError: The node did not answer.
    """
    found: list[ListedJob] = []
    top = await contracts.scheduler.job_count()
    while top > 0 and len(found) < limit:
        bottom = max(1, top - _PAGE + 1)
        page = await contracts.scheduler.get_jobs(range(top, bottom - 1, -1))
        wanted = [
            job for job in page if _wanted(job, customer, provider_id) and job.status in statuses
        ]
        if not names:
            wanted = wanted[: limit - len(found)]
        told = await histories(contracts, [job.id for job in wanted]) if wanted else {}
        found += [
            ListedJob(job, told[job.id])
            for job in wanted
            if not names or any(fnmatchcase(told[job.id].name, name) for name in names)
        ]
        top = bottom - 1
    return found[:limit]


def _wanted(job: Job, customer: str | None, provider_id: int | None) -> bool:
    mine = customer is None or job.customer == customer
    return mine and (provider_id is None or job.provider_id == provider_id)
