"""Printing a job's output as it grows."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.cli.frame import CommandContext
from deepsquare_chain.cli.job import tell_trouble
from deepsquare_chain.client.results import no_run
from deepsquare_chain.client.watching import until_answered
from deepsquare_chain.job import Job
from deepsquare_chain.provider.outputs import find_run, has_ended, read_output

_CHUNK: Final = 65_536
_INTERVAL: Final = 0.5


async def stream(
    context: CommandContext, contracts: Contracts, job_id: int, *, follow: bool
) -> None:
    """Print the output from its beginning; with `follow` until the run has ended.

    An endpoint that fails meanwhile does not end the following.

    Raises:
        NotFoundError: There is no such job, or no provider on this machine has run it.
    """
    position = 0
    trouble = partial(tell_trouble, context, f"following job {job_id} goes on")
    while True:
        ask = partial(contracts.scheduler.get_job, job_id)
        job = await (until_answered(ask, on_trouble=trouble) if follow else ask())
        run = _run(context, contracts, job)
        if run is None and (not follow or job.status.is_final):
            raise no_run(job, context.settings.state_dir)
        ended = job.status.is_final or (run is not None and has_ended(run))
        while run is not None and (part := read_output(run, position, _CHUNK)).data:
            context.printer.raw(part.data)
            position = part.position
        if ended or not follow:
            return
        await asyncio.sleep(_INTERVAL)


def _run(context: CommandContext, contracts: Contracts, job: Job) -> Path | None:
    grid = contracts.deployment.chain_id, contracts.scheduler.address
    return find_run(context.settings.state_dir, *grid, job.id)
