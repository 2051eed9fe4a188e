"""Waits until a provider in maintenance has no jobs left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.client.job_list import newest
from deepsquare_chain.errors import EndpointError, WaitTimeoutError
from deepsquare_chain.job import JobStatus

#: Poll interval in seconds.
_INTERVAL: Final = 2.0
#: Maximum number of jobs per poll; further jobs are read once these have ended.
_LIMIT: Final = 500


async def wait_until_empty(
    contracts: Contracts,
    provider_id: int,
    *,
    timeout: float | None,
    report: Callable[[str], None],
    interval: float = _INTERVAL,
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
            jobs = await newest(contracts, limit=_LIMIT, provider_id=provider_id, statuses=assigned)
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
