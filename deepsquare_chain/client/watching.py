"""Watching a job until it ends, through every successor."""

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

#: Exit code of a program whose job left none: cancelled, panicked, ended by the grid.
NO_EXIT_CODE = 1
#: Seconds between two questions to an endpoint that fails: at first, and at most.
_PAUSES: Final = (0.5, 10.0)
#: Looks after which a job that has not gone on is worth an explanation.
PATIENCE = 5


T = TypeVar("T")
#: Called once for each outage of the endpoint, and with None when it answers again.
OnTrouble = Callable[[EndpointError | None], None]


async def until_answered(
    ask: Callable[[], Awaitable[T]],
    *,
    deadline: float | None = None,
    on_trouble: OnTrouble | None = None,
) -> T:
    """Ask the chain until it answers, for one who waits anyhow.

    Args:
        ask: The question; asked again after growing pauses while the endpoint fails.
        deadline: Monotonic seconds after which its failure is raised; None for never.
        on_trouble: Called with the first failure, and with None when it is over.

    Raises:
        WrongEndpointError: The endpoint serves another chain: waiting won't help.
        EndpointError: The endpoint still fails at the deadline.
    """
    pause, longest = _PAUSES
    troubled = False
    while True:
        try:
            found = await ask()
        except WrongEndpointError:
            raise
        except EndpointError as error:
            if on_trouble is not None and not troubled:
                on_trouble(error)
            troubled = True
            if deadline is not None and time.monotonic() + pause >= deadline:
                raise
        else:
            if on_trouble is not None and troubled:
                on_trouble(None)
            return found
        await asyncio.sleep(pause)
        pause = min(longest, 2 * pause)


@dataclass(frozen=True, slots=True)
class Ended:
    """The last job of a line, final."""

    job: Job
    history: History

    @property
    def exit_code(self) -> int:
        """The job's own exit code as a program can return it."""
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
    """Wait until a job and all its successors have ended, through failures of the endpoint.

    Args:
        contracts: The deployment.
        job_id: The job.
        interval: Seconds between two looks.
        timeout: Seconds to wait at most; None waits for ever.
        on_change: Called with the job as found first, and after every change of its status.
        on_rest: Called with a job that still has the status, short of RUNNING, that it had
            `PATIENCE` looks ago, and again after each further so many.
        on_trouble: Called when an endpoint does not answer, and with None when it does again.

    Raises:
        NotFoundError: There is no such job.
        WaitTimeoutError: It has not ended in time.
        WrongEndpointError: The endpoint serves another chain now.
        EndpointError: The endpoint does not answer when the time is over.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    seen: tuple[int, JobStatus] | None = None
    looks = 0

    def ask(question: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        return until_answered(question, deadline=deadline, on_trouble=on_trouble)

    while True:
        job = await ask(partial(contracts.scheduler.get_job, job_id))
        if (job.id, job.status) != seen:
            seen = job.id, job.status
            looks = 0
            if on_change is not None:
                on_change(job)
        if job.status.is_final:
            history = (await ask(partial(histories, contracts, [job.id])))[job.id]
            if history.successor is None:
                return Ended(job, history)
            job_id = history.successor
            continue
        if on_rest is not None and looks == PATIENCE and job.status is not JobStatus.RUNNING:
            looks = 0
            on_rest(job)
        looks += 1
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimeoutError(
                f"Job {job.id} is still {job.status.name}: the {timeout:.3g} seconds to wait are over",
                hint=f"`deepsquare job why {job.id}` tells what it waits for; go on with "
                f"`deepsquare job watch {job.id}`.",
            )
        await asyncio.sleep(interval)
