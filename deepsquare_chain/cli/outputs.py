"""Printing a job's output as it grows."""

from __future__ import annotations

import asyncio
from typing import Final

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.cli.frame import Desk
from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.provider.outputs import find_run, has_ended, read_output

_CHUNK: Final = 65_536
_INTERVAL: Final = 0.5


async def stream(desk: Desk, contracts: Contracts, job_id: int, *, follow: bool) -> None:
    """Print the output from its beginning; with `follow` until the run has ended.

    Raises:
        NotFoundError: There is no such job, or no provider on this machine has run it.
    """
    place = desk.settings.state_dir
    offset = 0
    while True:
        job = await contracts.scheduler.get_job(job_id)
        run = find_run(place, contracts.deployment.chain_id, contracts.scheduler.address, job_id)
        if run is None and (not follow or job.status.is_final):
            raise NotFoundError(
                f"No run of job {job_id} ({job.status.name}) is kept below {place}",
                hint="Output is read from a provider of this machine: give its --state-dir.",
            )
        ended = job.status.is_final or (run is not None and has_ended(run))
        while run is not None and (part := read_output(run, offset, _CHUNK)):
            desk.printer.raw(part)
            offset += len(part)
        if ended or not follow:
            return
        await asyncio.sleep(_INTERVAL)
