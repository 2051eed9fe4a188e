"""Printing of job output while it is written."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Final, Self

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.cli.frame import CommandContext
from deepsquare_chain.cli.job import continuing, print_outage
from deepsquare_chain.cli.output import Format
from deepsquare_chain.client.gateways import gateways_of, no_run, read_log
from deepsquare_chain.client.jobs import OnOutage, with_endpoint_retries
from deepsquare_chain.client.network import open_account
from deepsquare_chain.daemon.loop import cancelled
from deepsquare_chain.errors import GridError
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.observability.redaction import plain
from deepsquare_chain.provider.outputs import find_run, has_ended, read_output
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.gateway_client import GatewayClient, gateway_urls

_CHUNK: Final = 65_536
_INTERVAL: Final = 0.5


async def stream(
    context: CommandContext, contracts: Contracts, job_id: int, *, follow: bool
) -> None:
    """Print a job's output from its beginning; with `follow` until the run has ended.

    The output is read from a gateway, or from a provider on this machine if no gateway is set.
    While following, failures of an endpoint or a gateway are retried.

    Raises:
        NotFoundError: The job does not exist, or no output of it exists.
        NotAuthorisedError: The wallet may not read the output.
        EndpointError: No gateway responds.
    """
    if follow and (await contracts.scheduler.get_existing_jobs([job_id]))[0].status.is_live:
        context.continues = continuing(job_id)
    on_outage = partial(print_outage, context, f"continuing to follow job {job_id}")
    async for data in log_of(
        context.settings, contracts, job_id, follow=follow, on_outage=on_outage
    ):
        context.printer.raw(data)


async def log_of(
    settings: Settings,
    contracts: Contracts,
    job_id: int,
    *,
    follow: bool,
    on_outage: OnOutage | None = None,
) -> AsyncIterator[bytes]:
    """Yield a job's output in chunks; source and errors as for `stream`."""
    if gateway_urls(settings, contracts.deployment):
        account = await open_account(settings)
        async with gateways_of(settings, contracts.deployment, account) as gateways:
            async for data in read_log(
                *(contracts, gateways, job_id),
                follow=follow,
                key_file=settings.result_key_file,
                on_outage=on_outage,
            ):
                yield data
        return
    position, grid = 0, (contracts.deployment.chain_id, contracts.scheduler.address)
    while True:
        get_job = partial(contracts.scheduler.get_job, job_id)
        job = await (with_endpoint_retries(get_job, on_outage=on_outage) if follow else get_job())
        run = find_run(settings.state_dir, *grid, job.id)
        if run is None and (not follow or job.status.is_final):
            raise no_run(job, settings.state_dir)
        ended = job.status.is_final or (run is not None and has_ended(run))
        while run is not None and (part := read_output(run, position, _CHUNK)).data:
            yield part.data
            position = part.position
        if ended or not follow:
            return
        await asyncio.sleep(_INTERVAL)


class LogPrinter:
    """Prints the output of a job and its successors during a wait; does nothing without gateways.

    A log that can't be read is reported and does not end the wait.
    """

    def __init__(
        self, context: CommandContext, contracts: Contracts, gateways: Sequence[GatewayClient]
    ) -> None:
        self._context = context
        self._contracts = contracts
        self._gateways = gateways
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks.values():
            await cancelled(task)

    def on_job_change(self, job: Job) -> None:
        """Start printing the job's log if it has started to run."""
        has_started = job.status is JobStatus.RUNNING or (job.status.is_final and bool(job.rate))
        if self._gateways and has_started and job.id not in self._tasks:
            self._tasks[job.id] = asyncio.create_task(self._show(job.id))

    async def finish(self) -> None:
        """Wait until all logs are printed to their end."""
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    async def _show(self, job_id: int) -> None:
        context, printer = self._context, self._context.printer
        write = printer.raw if printer.style is Format.TABLE else _to_stderr
        log = read_log(
            *(self._contracts, self._gateways, job_id),
            follow=True,
            key_file=context.settings.result_key_file,
            on_outage=partial(print_outage, context, f"continuing to follow job {job_id}"),
        )
        try:
            async for data in log:
                write(data)
        except GridError as error:
            printer.note(f"The output of job {job_id} can't be shown: {error.message}")


def _to_stderr(data: bytes) -> None:
    sys.stderr.write(plain(data.decode("utf-8", "replace"), keep="\n\t"))
    sys.stderr.flush()
