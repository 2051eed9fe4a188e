"""Waiting until a provider in maintenance has no job left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.client.job_list import newest
from deepsquare_chain.errors import EndpointError, WaitTimeoutError
from deepsquare_chain.job import JobStatus

#: Seconds between two looks.
_INTERVAL: Final = 2.0
#: Jobs that are looked at; a provider that holds more is looked at again when these have ended.
_LIMIT: Final = 500


async def wait_until_empty(
    contracts: Contracts,
    provider_id: int,
    *,
    timeout: float | None,
    report: Callable[[str], None],
    interval: float = _INTERVAL,
) -> None:
    """Wait until no job is assigned to a provider; an endpoint that is away is waited for.

    Args:
        contracts: Of the grid.
        provider_id: The provider.
        timeout: Seconds to wait at most; None for any time.
        report: Called with a line whenever the number of jobs has changed.
        interval: Seconds between two looks.

    Raises:
        WaitTimeoutError: Jobs were left when the time was up.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    assigned = {each for each in JobStatus if each.is_assigned}
    before, away = -1, False
    while True:
        try:
            jobs = await newest(contracts, limit=_LIMIT, provider_id=provider_id, statuses=assigned)
        except EndpointError as error:
            if not away:
                report(f"Waiting for the endpoint: {error.message}")
            away = True
        else:
            away = False
            if not jobs:
                report("No job is left with this provider.")
                return
            if len(jobs) != before:
                before = len(jobs)
                running = sum(job.status is JobStatus.RUNNING for job, _ in jobs)
                report(f"Jobs left: {before}, of which {running} are running.")
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimeoutError(
                f"Jobs were left when the {timeout:.3g} s were up",
                hint="The maintenance stands; `deepsquare provider jobs` lists them.",
            )
        await asyncio.sleep(interval)
