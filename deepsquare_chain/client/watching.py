"""Watches a job and its successors until they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.rpc.connection import WrongEndpointError
from deepsquare_chain.client.history import History, histories
from deepsquare_chain.errors import EndpointError, WaitTimeoutError
from deepsquare_chain.job import Job, JobStatus

#: Exit code for jobs without one: cancelled, panicked, or ended by the grid.
NO_EXIT_CODE = 1
#: Shortest and longest backoff in seconds while the endpoint fails.
_PAUSES: Final = (0.5, 10.0)
#: Number of polls after which an unchanged job is explained to the user.
PATIENCE = 5


T = TypeVar("T")
#: Called with the first error of each outage of the endpoint, and with None when it ends.
OnTrouble = Callable[[EndpointError | None], None]


async def until_answered(
    ask: Callable[[], Awaitable[T]],
    *,
    deadline: float | None = None,
    on_trouble: OnTrouble | None = None,
) -> T:
    """Send a request and retry with backoff while the endpoint fails.

    Args:
        ask: Sends the request.
        deadline: Monotonic seconds after which a failure is raised; None for no limit.
        on_trouble: Called with the first failure, and with None after the first success.

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
            if on_trouble is not None and not is_failing:
                on_trouble(error)
            is_failing = True
            if deadline is not None and time.monotonic() + pause >= deadline:
                raise
        else:
            if on_trouble is not None and is_failing:
                on_trouble(None)
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
    on_rest: Callable[[Job], None] | None = None,
    on_trouble: OnTrouble | None = None,
) -> Ended:
    """Wait until a job and all its successors have ended; retries while the endpoint fails.

    Args:
        contracts: Contracts of the deployment.
        job_id: The job.
        interval: Poll interval in seconds.
        timeout: Maximum seconds to wait; None for no limit.
        on_change: Called with the job at the start, and after every change of its status.
        on_rest: Called with a job that is not RUNNING and whose status has not changed for
            `PATIENCE` polls, and again after each further `PATIENCE` polls.
        on_trouble: Called when the endpoint does not answer, and with None when it recovers.

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
        return until_answered(question, deadline=deadline, on_trouble=on_trouble)

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
        if on_rest is not None and polls == PATIENCE and job.status is not JobStatus.RUNNING:
            polls = 0
            on_rest(job)
        polls += 1
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimeoutError(
                f"Job {job.id} is still {job.status.name}: the {timeout:.3g} seconds to wait are over",
                hint=f"`deepsquare job why {job.id}` tells what it waits for; go on with "
                f"`deepsquare job watch {job.id}`.",
            )
        await asyncio.sleep(interval)
