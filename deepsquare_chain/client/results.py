"""What an ended job left, held against what its provider reported on chain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.client.gateways import remote_results
from deepsquare_chain.client.history import reported_digest
from deepsquare_chain.errors import AuditError, NotFoundError, UsageError
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.provider.outputs import (
    ResultFile,
    closed_folder,
    find_run,
    has_ended,
    result_files,
)
from deepsquare_chain.store.gateway_client import GatewayClient


@dataclass(frozen=True, slots=True)
class Result:
    """A file that a job left.

    Attributes:
        name: `output`, or `work/...` for a file of its working folder.
        size: Bytes.
        digest: SHA-256 in hexadecimal; empty where it was not read to its end.
        on_chain: Whether that is the digest its provider reported; None where it reported none
            of this file, or the file was not read.
        problem: Why it was not read or copied, in words; empty where it was.
        special: Whether it is a link, a pipe, a socket or a device, which is never read.
    """

    name: str
    size: int
    digest: str
    on_chain: bool | None
    problem: str = ""
    special: bool = False


async def job_results(
    contracts: Contracts,
    root: Path,
    job_id: int,
    to: Path | None = None,
    *,
    gateways: Sequence[GatewayClient] = (),
    report: Callable[[str], None] = lambda _: None,
    key_file: Path | None = None,
) -> list[Result]:
    """The output and the files of a job that has ended, from a gateway, else from this machine.

    Args:
        contracts: The deployment.
        root: A provider's state folder, or the folder that holds several; where no gateway is set.
        job_id: The job.
        to: A new folder to copy them into, once the output is known to be the reported one.
        gateways: Where they are looked for.
        report: Called when a download resumes after it was cut off, and when results are decrypted.
        key_file: File of the age key for results that are encrypted at a gateway.

    Raises:
        NotFoundError: There is no such job, or no provider below `root` has run it, or none has
            delivered its results to a gateway.
        UsageError: It has not ended, or the folder is there already.
        AuditError: The output is other than the chain says; nothing was copied.
        GridError: No gateway answers, or none lets this account read it.
    """
    if gateways:
        files, reported = await remote_results(
            contracts, gateways, job_id, to, report=report, key_file=key_file
        )
        return _compared(files, reported, job_id, gateways[0].place)
    job = await contracts.scheduler.get_job(job_id)
    grid = contracts.deployment.chain_id, contracts.scheduler.address
    run = await asyncio.to_thread(find_run, root, *grid, job_id)
    if run is None:
        raise no_run(job, root)
    if not job.status.is_final or not has_ended(run):
        raise UsageError(
            f"Job {job_id} has not ended: it is {job.status.name}",
            hint=f"Wait for it with `deepsquare job watch {job_id}`.",
        )
    on_chain = await reported_digest(contracts, job_id)
    place = f"below {run}"
    found = _compared(await asyncio.to_thread(result_files, run), on_chain, job_id, place)
    if to is not None:
        files = await asyncio.to_thread(result_files, run, to)
        found = _compared(files, on_chain, job_id, place)
    return found


def no_run(job: Job, root: Path) -> NotFoundError:
    """That no provider of this machine has kept a run of the job."""
    hint = "Output is read from a provider of this machine: give its state_dir (--state-dir)."
    closed = closed_folder(root)
    if closed is not None:
        hint = f"{closed} can't be read by this user: ask its owner, or give another --state-dir."
    elif job.status.is_live and job.status is not JobStatus.RUNNING:
        hint = f"It has not started: `deepsquare job why {job.id}` tells why."
    return NotFoundError(
        f"No run of job {job.id} ({job.status.name}) is kept below {root}", hint=hint
    )


def _compared(files: Sequence[ResultFile], reported: str, job_id: int, place: str) -> list[Result]:
    output = files[0] if files and files[0].name == "output" else None
    unreadable = output is not None and not output.digest
    if reported and not unreadable and (output is None or output.digest != reported):
        raise AuditError(
            f"The output of job {job_id} {place} is not the one that its provider reported",
            hint="It was changed since, or is another run's; ask the provider.",
        )
    # The chain tells the digest of the output alone.
    return [
        Result(
            each.name,
            each.size,
            each.digest,
            True if reported and each is output and each.digest else None,
            each.problem,
            each.special,
        )
        for each in files
    ]
