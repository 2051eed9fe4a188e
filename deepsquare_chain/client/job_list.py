"""Lists of jobs, the newest first, and the jobs that people name on a command line."""

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
    submission: str = "",
) -> list[ListedJob]:
    """The newest jobs that meet all conditions.

    Args:
        contracts: The deployment.
        limit: How many at most.
        customer: Only jobs of this account.
        provider_id: Only jobs of this provider.
        statuses: Only jobs of these statuses.
        names: Only jobs of one of these names; `*`, `?` and `[...]` stand for other characters.
        submission: Only jobs of this submission.

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
        if not (names or submission):
            wanted = wanted[: limit - len(found)]
        history_of = await histories(contracts, [job.id for job in wanted]) if wanted else {}
        found += [
            ListedJob(job, history_of[job.id])
            for job in wanted
            if (not names or any(fnmatchcase(history_of[job.id].name, name) for name in names))
            and (not submission or _submission(history_of[job.id].uses) == submission)
        ]
        top = bottom - 1
    return found[:limit]


def _wanted(job: Job, customer: str | None, provider_id: int | None) -> bool:
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
    """Ids of the jobs that people name, in their order and each once.

    Args:
        contracts: The deployment.
        words: Ids and ranges (`7`, `3-5`, `3,7-9`), the id of a submission (`sub-1f3a9c04`), its
            transaction, or names (`train-*`) of the customer's own jobs.
        customer: Whose jobs names and submissions stand for; asked only when they are used.

    Raises:
        NotFoundError: A word stands for no job.
        UsageError: A range is too long.
        EndpointError: The node did not answer.
    """
    found: dict[int, None] = {}
    for word in words:
        found |= dict.fromkeys(await _select(contracts, word.strip(), customer))
    return list(found)


async def _select(contracts: Contracts, word: str, customer: Callable[[], str]) -> list[int]:
    if re.fullmatch(r"[0-9][0-9,\- ]*", word):
        try:
            return parse_ids(word)
        except ValueError as error:
            raise UsageError(str(error), hint="Write ids such as 7, 3-5 or 3,7-9.") from None
    if re.fullmatch(r"0x[0-9a-fA-F]{64}", word):
        return await _sent_in(contracts, word)
    if not word:
        raise UsageError("An empty word names no job", hint="Write an id, a range or a name.")
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
        what = "is of submission" if of_submission else "is named"
        raise NotFoundError(
            f"No job of this wallet {what} {word[:80]!r}",
            hint="`deepsquare job list` shows ids and names; a name may hold * and ?.",
        )
    return sorted(job.id for job, _ in jobs)


async def _sent_in(contracts: Contracts, tx_hash: str) -> list[int]:
    try:
        receipt = await contracts.w3.eth.get_transaction_receipt(HexStr(tx_hash))
    except TransactionNotFound:
        receipt = None
    logs = receipt["logs"] if receipt else []
    own = [each for each in logs if each["address"] == contracts.scheduler.address]
    found = [each.job_id for each in decode_logs(own) if isinstance(each, JobSubmitted)]
    if not found:
        raise NotFoundError(
            f"No job was submitted in transaction {tx_hash}",
            hint="`deepsquare tx list` shows the transactions of this wallet.",
        )
    return found
