"""Results of an ended job, verified by the digest that its provider reported on chain."""

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
    """A result file of a job.

    Attributes:
        name: `output`, or `work/...` for a file of the working folder.
        size: Size in bytes.
        digest: SHA-256 in hexadecimal; empty if the file was not read to its end.
        on_chain: True if the digest matches the one reported on chain; None if none was reported
            for this file, or the file was not read.
        problem: Why the file was not read or copied; empty on success.
        special: Whether it is a link, pipe, socket or device, which are never read.
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
    """Return the output and files of an ended job, from a gateway or else from this machine.

    Args:
        contracts: Contracts of the deployment.
        root: A provider's state folder, or a folder of several; used if there are no gateways.
        job_id: The job.
        to: A new folder for copies, written after the output was verified.
        gateways: Gateways to read from.
        report: Called when a download resumes after a failure, and when results are decrypted.
        key_file: File of the age key for encrypted results at a gateway.

    Raises:
        NotFoundError: The job does not exist, no provider below `root` has run it, or its provider
            has not uploaded its results to a gateway.
        UsageError: The job has not ended, or the folder exists.
        AuditError: The output does not match the digest on chain; nothing was copied.
        GridError: No gateway answers, or none permits this account to read it.
    """
    if gateways:
        files, reported = await remote_results(
            contracts, gateways, job_id, to, report=report, key_file=key_file
        )
        return _compare_digest(files, reported, job_id, gateways[0].place)
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
    results = _compare_digest(await asyncio.to_thread(result_files, run), on_chain, job_id, place)
    if to is not None:
        files = await asyncio.to_thread(result_files, run, to)
        results = _compare_digest(files, on_chain, job_id, place)
    return results


def no_run(job: Job, root: Path) -> NotFoundError:
    """Return the error for a job without a run folder on this machine."""
    hint = "Output is read from a provider on this machine: give its state_dir (--state-dir)."
    unreadable_folder = closed_folder(root)
    if unreadable_folder is not None:
        hint = f"{unreadable_folder} can't be read by this user: ask its owner, or give another --state-dir."
    elif job.status.is_live and job.status is not JobStatus.RUNNING:
        hint = f"It has not started; see `deepsquare job why {job.id}`."
    return NotFoundError(
        f"No run of job {job.id} ({job.status.name}) is kept below {root}", hint=hint
    )


def _compare_digest(
    files: Sequence[ResultFile], reported: str, job_id: int, place: str
) -> list[Result]:
    output = files[0] if files and files[0].name == "output" else None
    unreadable = output is not None and not output.digest
    if reported and not unreadable and (output is None or output.digest != reported):
        raise AuditError(
            f"The output of job {job_id} {place} does not match the digest that its provider reported",
            hint="It was changed since, or belongs to another run; ask the provider.",
        )
    # Only the digest of the output is on chain.
    return [
        Result(
            file.name,
            file.size,
            file.digest,
            True if reported and file is output and file.digest else None,
            file.problem,
            file.special,
        )
        for file in files
    ]
