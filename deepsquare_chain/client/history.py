"""Histories of jobs from events on chain, and watches of jobs until they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.event_types import (
    Event,
    JobCollected,
    JobPanicked,
    JobResult,
    JobRetried,
    JobSettled,
    JobSubmitted,
    JobToppedUp,
    JobTransition,
)
from deepsquare_chain.chain.bindings.events import decode_logs, event_topics
from deepsquare_chain.chain.rpc.connection import WrongEndpointError
from deepsquare_chain.chain.rpc.log_reader import read_logs
from deepsquare_chain.errors import EndpointError, WaitTimeoutError
from deepsquare_chain.job import Job, JobStatus, Objective

_KINDS = (
    *(JobSubmitted, JobToppedUp, JobCollected, JobSettled, JobRetried),
    *(JobResult, JobPanicked, JobTransition),
)


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


def replay(found: dict[int, History], events: Iterable[Event]) -> None:
    """Apply events to the histories; events of other jobs are ignored."""
    for event in events:
        job_id = getattr(event, "job_id", None)
        if job_id in found:
            found[job_id].events.append(event)
            _apply(found[job_id], event)
        if isinstance(event, JobRetried) and event.successor in found:
            successor = found[event.successor]
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


def inherit(found: dict[int, History]) -> None:
    """Copy name, uses and objective from each job to its successor.

    Only the first job of a chain of retries was submitted with them.
    """
    for job_id in sorted(found):
        history = found[job_id]
        predecessor = found.get(history.retry_of) if history.retry_of is not None else None
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
    return list({event.place: event for event in decode_logs([*job_logs, *retry_logs])}.values())


# -- watches of a job and its successors until they end

#: Exit code for jobs without one: cancelled, panicked, or ended by the grid.
NO_EXIT_CODE = 1
#: Shortest and longest backoff in seconds while the endpoint fails.
_PAUSES: Final = (0.5, 10.0)
#: Number of polls after which an unchanged job is explained to the user.
POLLS_BEFORE_EXPLANATION = 5


T = TypeVar("T")
#: Called with the first error of each outage of the endpoint, and with None when it ends.
OnOutage = Callable[[EndpointError | None], None]


async def with_endpoint_retries(
    ask: Callable[[], Awaitable[T]],
    *,
    deadline: float | None = None,
    on_outage: OnOutage | None = None,
) -> T:
    """Send a request and retry with backoff while the endpoint fails.

    Args:
        ask: Sends the request.
        deadline: Monotonic seconds after which a failure is raised; None for no limit.
        on_outage: Called with the first failure, and with None after the first success.

    Raises:
        WrongEndpointError: The endpoint serves another chain; not retried.
        EndpointError: The endpoint still fails at the deadline.
    """
    pause, longest = _PAUSES
    is_failing = False
    while True:
        try:
            result = await ask()
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

    Args:
        contracts: Contracts of the deployment.
        job_id: The job.
        interval: Poll interval in seconds.
        timeout: Maximum seconds to wait; None for no limit.
        on_change: Called with the job at the start, and after every change of its status.
        on_waiting: Called with a job that is not RUNNING and whose status has not changed for
            `POLLS_BEFORE_EXPLANATION` polls, and again after each further `POLLS_BEFORE_EXPLANATION` polls.
        on_outage: Called when the endpoint does not answer, and with None when it recovers.

    Raises:
        NotFoundError: The job does not exist.
        WaitTimeoutError: The job has not ended in time.
        WrongEndpointError: The endpoint serves another chain.
        EndpointError: The endpoint does not answer at the timeout.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    last_seen: tuple[int, JobStatus] | None = None
    polls = 0

    def ask(question: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        return with_endpoint_retries(question, deadline=deadline, on_outage=on_outage)

    while True:
        job = await ask(partial(contracts.scheduler.get_job, job_id))
        if (job.id, job.status) != last_seen:
            last_seen = job.id, job.status
            polls = 0
            if on_change is not None:
                on_change(job)
        if job.status.is_final:
            history = (await ask(partial(histories, contracts, [job.id])))[job.id]
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
