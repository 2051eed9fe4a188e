"""Lists of jobs, the newest first."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.client.history import histories
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import Job, JobStatus

#: Records read in one go, from the newest backwards.
_PAGE = 500


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
            raise UsageError(f"{name[:40]!r} is no status", hint=f"Use one of {', '.join(known)}.")
        found.add(known[key])
    return found or set(known.values())


async def newest(
    contracts: Contracts,
    *,
    limit: int,
    customer: str | None = None,
    provider_id: int | None = None,
    statuses: Collection[JobStatus],
) -> list[tuple[Job, str]]:
    """The newest jobs that meet all conditions, with their names.

    Raises:
        EndpointError: The node did not answer.
    """
    found: list[Job] = []
    top = await contracts.scheduler.job_count()
    while top > 0 and len(found) < limit:
        bottom = max(1, top - _PAGE + 1)
        page = await contracts.scheduler.get_jobs(range(top, bottom - 1, -1))
        found += [
            job for job in page if _wanted(job, customer, provider_id) and job.status in statuses
        ]
        top = bottom - 1
    found = found[:limit]
    names = await histories(contracts, [job.id for job in found])
    return [(job, names[job.id].name) for job in found]


def _wanted(job: Job, customer: str | None, provider_id: int | None) -> bool:
    mine = customer is None or job.customer == customer
    return mine and (provider_id is None or job.provider_id == provider_id)
