"""Jobs of customers and providers, read from the chain.

For customers: selection and lists, histories from events, waiting for the end. For providers:
earnings by period, unbilled revenue, waiting until no job is assigned.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby
from typing import Final, NamedTuple, TypeVar

from eth_typing import HexStr
from web3.exceptions import TransactionNotFound

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.events import (
    Event,
    JobCollected,
    JobPanicked,
    JobResult,
    JobRetried,
    JobSettled,
    JobSubmitted,
    JobToppedUp,
    JobTransition,
    decode_logs,
    event_filter,
    event_topics,
)
from deepsquare_chain.chain.rpc.endpoint import WrongEndpointError
from deepsquare_chain.chain.rpc.log_reader import read_logs
from deepsquare_chain.credits import unbilled_revenue
from deepsquare_chain.errors import EndpointError, NotFoundError, UsageError, WaitTimeoutError
from deepsquare_chain.job import (
    MAX_LISTED_JOBS,
    SUBMISSION_ID,
    Job,
    JobStatus,
    Objective,
    parse_conditions,
    parse_ids,
)

_KINDS = (
    *(JobSubmitted, JobToppedUp, JobCollected, JobSettled, JobRetried),
    *(JobResult, JobPanicked, JobTransition),
)

#: Page size of job records, read from the newest backwards.
_PAGE = 500


@dataclass(slots=True)
class History:
    """The history of a job from its events; amounts are in credit-wei.

    `funded` was paid into this job's escrow, `carried_in` is the escrow of its predecessor. `paid`,
    `fee` and `billed_seconds` include interim payments; `collected` is the sum of interim payments
    with their fees. `billed_seconds` is None until something is billed, `exit_code` until the
    provider has reported.
    """

    job_id: int
    name: str = ""
    uses: str = ""
    objective: Objective = Objective.COST
    funded: int = 0
    carried_in: int = 0
    paid: int = 0
    fee: int = 0
    refunded: int = 0
    collected: int = 0
    billed_seconds: int | None = None
    exit_code: int | None = None
    reason: str = ""
    successor: int | None = None
    retry_of: int | None = None
    provider: str = ""
    events: list[Event] = field(default_factory=list)


async def histories(contracts: Contracts, job_ids: Sequence[int]) -> dict[int, History]:
    """Return histories by job ID; a successor inherits name, uses and objective.

    Raises:
        EndpointError: The endpoint does not answer.
    """
    history_by_id: dict[int, History] = {}
    missing_ids = set(job_ids)
    while missing_ids:
        for job_id in missing_ids:
            history_by_id[job_id] = History(job_id)
        replay(history_by_id, await _events(contracts, sorted(missing_ids)))
        predecessors = {
            history.retry_of for history in history_by_id.values() if history.retry_of is not None
        }
        missing_ids = predecessors - set(history_by_id)
    inherit(history_by_id)
    return {job_id: history_by_id[job_id] for job_id in job_ids}


async def reported_digest(contracts: Contracts, job_id: int) -> str:
    """Return the SHA-256 (hexadecimal) of a job's output that its provider reported, or ""."""
    history = (await histories(contracts, [job_id]))[job_id]
    results = [event for event in history.events if isinstance(event, JobResult)]
    return results[-1].result.hex() if results and any(results[-1].result) else ""


def replay(histories: dict[int, History], events: Iterable[Event]) -> None:
    """Apply events to the histories; events of other jobs are ignored."""
    for event in events:
        job_id = getattr(event, "job_id", None)
        if job_id in histories:
            histories[job_id].events.append(event)
            _apply(histories[job_id], event)
        if isinstance(event, JobRetried) and event.successor in histories:
            successor = histories[event.successor]
            successor.carried_in, successor.retry_of = event.escrow, event.job_id


def _apply(history: History, event: Event) -> None:
    match event:
        case JobSubmitted():
            history.name, history.uses = event.terms.name, event.terms.uses
            history.objective = event.terms.objective
            history.funded += event.terms.amount
        case JobToppedUp():
            history.funded += event.amount
        case JobCollected() | JobSettled():
            history.paid += event.paid
            history.fee += event.fee
            history.billed_seconds = (history.billed_seconds or 0) + event.billed_seconds
            if isinstance(event, JobSettled):
                history.refunded = event.refunded
            else:
                history.collected += event.paid + event.fee
        case JobRetried():
            history.successor = event.successor
        case JobResult():
            history.exit_code, history.reason = event.exit_code, event.reason
        case JobPanicked():
            history.reason = event.reason
        case JobTransition():
            if event.after.is_assigned:
                history.provider = event.provider
        case _:
            pass


def inherit(histories: dict[int, History]) -> None:
    """Copy name, uses and objective from each job to its successor.

    Only the first job of a chain of retries was submitted with them.
    """
    for job_id in sorted(histories):
        history = histories[job_id]
        predecessor = histories.get(history.retry_of) if history.retry_of is not None else None
        if predecessor is not None:
            history.name, history.uses, history.objective = (
                predecessor.name,
                predecessor.uses,
                predecessor.objective,
            )


async def _events(contracts: Contracts, job_ids: list[int]) -> list[Event]:
    """Return the events of these jobs, and the JobRetried events of their predecessors."""
    kinds = event_topics(*_KINDS)
    job_id_topics = [f"0x{job_id:064x}" for job_id in job_ids]
    address = contracts.scheduler.address
    start = contracts.deployment.block
    job_logs = await read_logs(contracts.w3, [address], [kinds, job_id_topics], start)
    # The carried escrow is in the predecessor's event, with the successor as second indexed topic.
    retry_logs = await read_logs(
        contracts.w3, [address], [event_topics(JobRetried), None, job_id_topics], start
    )
    # If predecessor and successor are both requested, the same event is read twice.
    return list({event.position: event for event in decode_logs([*job_logs, *retry_logs])}.values())


# -- watches of a job and its successors until they end

#: Exit code for jobs without one: cancelled, panicked, or ended by the grid.
NO_EXIT_CODE = 1
#: Shortest and longest backoff in seconds while the endpoint fails.
RETRY_PAUSES: Final = (0.5, 10.0)
#: Number of polls after which an unchanged job is explained to the user.
POLLS_BEFORE_EXPLANATION = 5


T = TypeVar("T")
#: Called with the first error of each outage of the endpoint, and with None when it ends.
OnOutage = Callable[[EndpointError | None], None]


async def with_endpoint_retries(
    send: Callable[[], Awaitable[T]],
    *,
    deadline: float | None = None,
    on_outage: OnOutage | None = None,
) -> T:
    """Send a request and retry with backoff while the endpoint fails.

    `deadline` is the monotonic time in seconds after which a failure is raised; None for no limit.
    `on_outage` is called with the first failure, and with None after the first success.

    Raises:
        WrongEndpointError: The endpoint serves another chain; not retried.
        EndpointError: The endpoint still fails at the deadline.
    """
    pause, longest = RETRY_PAUSES
    is_failing = False
    while True:
        try:
            result = await send()
        except WrongEndpointError:
            raise
        except EndpointError as error:
            if on_outage is not None and not is_failing:
                on_outage(error)
            is_failing = True
            if deadline is not None and time.monotonic() + pause >= deadline:
                raise
        else:
            if on_outage is not None and is_failing:
                on_outage(None)
            return result
        await asyncio.sleep(pause)
        pause = min(longest, 2 * pause)


@dataclass(frozen=True, slots=True)
class Ended:
    """The last job of a chain of retries, after its end."""

    job: Job
    history: History

    @property
    def exit_code(self) -> int:
        """Return the exit code of the job, in the range of process exit codes."""
        if self.job.status is JobStatus.FINISHED:
            return 0
        code = self.history.exit_code
        return code if code is not None and 1 <= code <= 255 else NO_EXIT_CODE


async def watch(
    contracts: Contracts,
    job_id: int,
    *,
    interval: float = 1.0,
    timeout: float | None = None,
    on_change: Callable[[Job], None] | None = None,
    on_waiting: Callable[[Job], None] | None = None,
    on_outage: OnOutage | None = None,
) -> Ended:
    """Wait until a job and all its successors have ended; retries while the endpoint fails.

    `interval` is the time in seconds between polls; `timeout` is in seconds, None for no limit.
    `on_change` is called with the job at the start, and after every change of its status.
    `on_waiting` is called after each `POLLS_BEFORE_EXPLANATION` polls without a change with a job
    that is not RUNNING; `on_outage` when the endpoint does not answer, and with None when it
    recovers.

    Raises:
        NotFoundError: The job does not exist.
        WaitTimeoutError: The job has not ended in time.
        WrongEndpointError: The endpoint serves another chain.
        EndpointError: The endpoint does not answer at the timeout.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    last_seen: tuple[int, JobStatus] | None = None
    polls = 0

    def retried(send: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        return with_endpoint_retries(send, deadline=deadline, on_outage=on_outage)

    while True:
        job = await retried(partial(contracts.scheduler.get_job, job_id))
        if (job.id, job.status) != last_seen:
            last_seen = job.id, job.status
            polls = 0
            if on_change is not None:
                on_change(job)
        if job.status.is_final:
            history = (await retried(partial(histories, contracts, [job.id])))[job.id]
            if history.successor is None:
                return Ended(job, history)
            job_id = history.successor
            continue
        if (
            on_waiting is not None
            and polls == POLLS_BEFORE_EXPLANATION
            and job.status is not JobStatus.RUNNING
        ):
            polls = 0
            on_waiting(job)
        polls += 1
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimeoutError(
                f"Job {job.id} is still {job.status.name} after {timeout:.3g} seconds",
                hint=f"`deepsquare job why {job.id}` shows what it waits for; continue with "
                f"`deepsquare job watch {job.id}`.",
            )
        await asyncio.sleep(interval)


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

    In `names`, `*`, `?` and `[...]` are wildcards; `submission` is the ID of a submission.

    Raises:
        EndpointError: The endpoint does not answer.
    """
    listed: list[ListedJob] = []
    top = await contracts.scheduler.job_count()
    while top > 0 and len(listed) < limit:
        bottom = max(1, top - _PAGE + 1)
        jobs_page = await contracts.scheduler.get_jobs(range(top, bottom - 1, -1))
        candidates = [
            job
            for job in jobs_page
            if _matches(job, customer, provider_id) and job.status in statuses
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

    `account` is the provider's address. Payments with the same text in the format `span` (strftime)
    are in the same period. `first` and `last` are blocks; the last is the newest by default.

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
        paid,
        key=lambda payment: datetime.fromtimestamp(times[payment.block_number], UTC).strftime(span),
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


async def wait_until_empty(
    contracts: Contracts, provider_id: int, *, timeout: float | None, report: Callable[[str], None]
) -> None:
    """Wait until no job is assigned to a provider; retries while the endpoint is down.

    `timeout` is in seconds, None for no limit; `report` is called with a line whenever the number
    of jobs changes.

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
        await asyncio.sleep(_DRAIN_POLL_SECONDS)
