"""Lists jobs, the newest first, and resolves jobs that are named on the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from eth_typing import HexStr
from web3.exceptions import TransactionNotFound

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.event_types import JobSubmitted
from deepsquare_chain.chain.bindings.events import decode_logs
from deepsquare_chain.client.history import History, histories
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.job import (
    MAX_LISTED_JOBS,
    SUBMISSION_ID,
    Job,
    JobStatus,
    parse_conditions,
    parse_ids,
)

#: Page size of job records, read from the newest backwards.
_PAGE = 500


class ListedJob(NamedTuple):
    """A job record with its history from events."""

    job: Job
    history: History

    def elapsed(self, now: int) -> int | None:
        """Return the run time in seconds at chain time `now`, billed or not; None before the start."""
        billed = self.history.billed_seconds
        if self.job.status is JobStatus.RUNNING:
            return (billed or 0) + max(0, now - self.job.since)
        return billed


def parse_statuses(names: Iterable[str]) -> set[JobStatus]:
    """Return statuses by name; all statuses if no name is given.

    Raises:
        UsageError: A name is not a status.
    """
    status_by_name: dict[str, JobStatus] = {status.name: status for status in list(JobStatus)[1:]}
    statuses: set[JobStatus] = set()
    for name in names:
        key = name.upper().replace("-", "_")
        if key not in status_by_name:
            raise UsageError(
                f"{name[:40]!r} is not a status", hint=f"Use one of {', '.join(status_by_name)}."
            )
        statuses.add(status_by_name[key])
    return statuses or set(status_by_name.values())


async def newest(
    contracts: Contracts,
    *,
    limit: int,
    customer: str | None = None,
    provider_id: int | None = None,
    statuses: Collection[JobStatus],
    names: Sequence[str] = (),
    submission: str = "",
) -> list[ListedJob]:
    """Return the newest jobs that meet all conditions.

    Args:
        contracts: Contracts of the deployment.
        limit: Maximum number of jobs.
        customer: Only jobs of this account.
        provider_id: Only jobs of this provider.
        statuses: Only jobs with one of these statuses.
        names: Only jobs with one of these names; `*`, `?` and `[...]` are wildcards.
        submission: Only jobs of this submission.

    Raises:
        EndpointError: The endpoint does not answer.
    """
    listed: list[ListedJob] = []
    top = await contracts.scheduler.job_count()
    while top > 0 and len(listed) < limit:
        bottom = max(1, top - _PAGE + 1)
        page = await contracts.scheduler.get_jobs(range(top, bottom - 1, -1))
        candidates = [
            job for job in page if _matches(job, customer, provider_id) and job.status in statuses
        ]
        if not (names or submission):
            candidates = candidates[: limit - len(listed)]
        history_of = (
            await histories(contracts, [job.id for job in candidates]) if candidates else {}
        )
        listed += [
            ListedJob(job, history_of[job.id])
            for job in candidates
            if (not names or any(fnmatchcase(history_of[job.id].name, name) for name in names))
            and (not submission or _submission(history_of[job.id].uses) == submission)
        ]
        top = bottom - 1
    return listed[:limit]


def _matches(job: Job, customer: str | None, provider_id: int | None) -> bool:
    mine = customer is None or job.customer == customer
    return mine and (provider_id is None or job.provider_id == provider_id)


def _submission(uses: str) -> str:
    try:
        return parse_conditions(uses).array
    except ValueError:
        return ""


async def select(
    contracts: Contracts, words: Iterable[str], customer: Callable[[], str]
) -> list[int]:
    """Return the IDs of jobs named on the command line, in order and without duplicates.

    Args:
        contracts: Contracts of the deployment.
        words: IDs and ranges (`7`, `3-5`, `3,7-9`), the ID of a submission (`sub-1f3a9c04`), its
            transaction, or names (`train-*`) of the customer's own jobs.
        customer: Returns the customer for names and submissions; called only if needed.

    Raises:
        NotFoundError: A word matches no job.
        UsageError: A word is invalid, or a range is too long.
        EndpointError: The endpoint does not answer.
    """
    job_ids: dict[int, None] = {}
    for word in words:
        job_ids |= dict.fromkeys(await _select(contracts, word.strip(), customer))
    return list(job_ids)


async def _select(contracts: Contracts, word: str, customer: Callable[[], str]) -> list[int]:
    if re.fullmatch(r"[0-9][0-9,\- ]*", word):
        try:
            return parse_ids(word)
        except ValueError as error:
            raise UsageError(str(error), hint="Write IDs such as 7, 3-5 or 3,7-9.") from None
    if re.fullmatch(r"0x[0-9a-fA-F]{64}", word):
        return await _jobs_of_transaction(contracts, word)
    if not word:
        raise UsageError("An empty argument selects no job", hint="Write an ID, a range or a name.")
    of_submission = SUBMISSION_ID.fullmatch(word) is not None
    jobs = await newest(
        contracts,
        limit=MAX_LISTED_JOBS,
        customer=customer(),
        statuses=set(JobStatus),
        names=() if of_submission else (word,),
        submission=word if of_submission else "",
    )
    if not jobs:
        relation = "is of submission" if of_submission else "is named"
        raise NotFoundError(
            f"No job of this wallet {relation} {word[:80]!r}",
            hint="`deepsquare job list` shows IDs and names; a name may contain * and ?.",
        )
    return sorted(job.id for job, _ in jobs)


async def _jobs_of_transaction(contracts: Contracts, tx_hash: str) -> list[int]:
    try:
        receipt = await contracts.w3.eth.get_transaction_receipt(HexStr(tx_hash))
    except TransactionNotFound:
        receipt = None
    logs = receipt["logs"] if receipt else []
    scheduler_logs = [entry for entry in logs if entry["address"] == contracts.scheduler.address]
    job_ids = [
        entry.job_id for entry in decode_logs(scheduler_logs) if isinstance(entry, JobSubmitted)
    ]
    if not job_ids:
        raise NotFoundError(
            f"No job was submitted in transaction {tx_hash}",
            hint="`deepsquare tx list` shows the transactions of this wallet.",
        )
    return job_ids
