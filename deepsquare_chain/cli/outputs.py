"""Printing a job's output as it grows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.cli.frame import Desk
from deepsquare_chain.client.history import reported_digest
from deepsquare_chain.errors import AuditError, NotFoundError, UsageError
from deepsquare_chain.job import Job
from deepsquare_chain.provider.outputs import find_run, has_ended, read_output, result_files

_CHUNK: Final = 65_536
_INTERVAL: Final = 0.5


@dataclass(frozen=True, slots=True)
class Result:
    """A file that a job left; `on_chain` compares it with the digest that the provider reported."""

    name: str
    size: int
    digest: str
    on_chain: bool | None


async def fetch(desk: Desk, contracts: Contracts, job_id: int, to: Path | None) -> list[Result]:
    """The output and the files of a job that has ended; with `to` copied there.

    Raises:
        NotFoundError: There is no such job, or no provider on this machine has run it.
        UsageError: It has not ended, or the folder is there already.
        AuditError: The output is other than the chain says.
    """
    job = await contracts.scheduler.get_job(job_id)
    run = _run(desk, contracts, job)
    if run is None:
        raise _no_run(desk, job)
    if not job.status.is_final or not has_ended(run):
        raise UsageError(
            f"Job {job_id} has not ended: it is {job.status.name}",
            hint=f"Wait for it with `deepsquare job watch {job_id}`.",
        )
    told = await reported_digest(contracts, job_id)
    found = await asyncio.to_thread(result_files, run, to)
    if told and (not found or found[0].digest != told):
        raise AuditError(
            f"The output of job {job_id} below {run} is not the one that its provider reported",
            hint="It was changed since, or is another run's; ask the provider.",
        )
    return [
        Result(each.name, each.size, each.digest, (each.digest == told) if not i and told else None)
        for i, each in enumerate(found)
    ]


async def stream(desk: Desk, contracts: Contracts, job_id: int, *, follow: bool) -> None:
    """Print the output from its beginning; with `follow` until the run has ended.

    Raises:
        NotFoundError: There is no such job, or no provider on this machine has run it.
    """
    offset = 0
    while True:
        job = await contracts.scheduler.get_job(job_id)
        run = _run(desk, contracts, job)
        if run is None and (not follow or job.status.is_final):
            raise _no_run(desk, job)
        ended = job.status.is_final or (run is not None and has_ended(run))
        while run is not None and (part := read_output(run, offset, _CHUNK)):
            desk.printer.raw(part)
            offset += len(part)
        if ended or not follow:
            return
        await asyncio.sleep(_INTERVAL)


def _run(desk: Desk, contracts: Contracts, job: Job) -> Path | None:
    grid = contracts.deployment.chain_id, contracts.scheduler.address
    return find_run(desk.settings.state_dir, *grid, job.id)


def _no_run(desk: Desk, job: Job) -> NotFoundError:
    return NotFoundError(
        f"No run of job {job.id} ({job.status.name}) is kept below {desk.settings.state_dir}",
        hint="Output is read from a provider of this machine: give its --state-dir.",
    )
