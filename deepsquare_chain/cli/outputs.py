"""Printing a job's output as it grows."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Self

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.cli.frame import CommandContext
from deepsquare_chain.cli.job import tell_trouble
from deepsquare_chain.cli.output import Format
from deepsquare_chain.client.gateways import gateways_of, read_log
from deepsquare_chain.client.network import open_account
from deepsquare_chain.client.results import no_run
from deepsquare_chain.client.watching import OnTrouble, until_answered
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
    """Print the output from its beginning; with `follow` until the run has ended.

    It comes from a gateway, or from a provider of this machine where no gateway is set. An
    endpoint or a gateway that fails meanwhile does not end the following.

    Raises:
        NotFoundError: There is no such job, or its output is nowhere.
        NotAuthorisedError: The wallet may not read it.
        EndpointError: No gateway answers.
    """
    trouble = partial(tell_trouble, context, f"following job {job_id} goes on")
    async for data in log_of(
        context.settings, contracts, job_id, follow=follow, on_trouble=trouble
    ):
        context.printer.raw(data)


async def log_of(
    settings: Settings,
    contracts: Contracts,
    job_id: int,
    *,
    follow: bool,
    on_trouble: OnTrouble | None = None,
) -> AsyncIterator[bytes]:
    """The output as `stream` prints it, in pieces; errors as there."""
    if gateway_urls(settings, contracts.deployment):
        account = await open_account(settings)
        async with gateways_of(settings, contracts.deployment, account) as gateways:
            async for data in read_log(
                *(contracts, gateways, job_id),
                follow=follow,
                key_file=settings.result_key_file,
                on_trouble=on_trouble,
            ):
                yield data
        return
    position = 0
    while True:
        ask = partial(contracts.scheduler.get_job, job_id)
        job = await (until_answered(ask, on_trouble=on_trouble) if follow else ask())
        run = _run(settings, contracts, job)
        if run is None and (not follow or job.status.is_final):
            raise no_run(job, settings.state_dir)
        ended = job.status.is_final or (run is not None and has_ended(run))
        while run is not None and (part := read_output(run, position, _CHUNK)).data:
            yield part.data
            position = part.position
        if ended or not follow:
            return
        await asyncio.sleep(_INTERVAL)


async def print_log(
    context: CommandContext,
    contracts: Contracts,
    gateways: Sequence[GatewayClient],
    job_id: int,
    *,
    follow: bool,
    write: Callable[[bytes], None] | None = None,
) -> None:
    """Print a job's log from a gateway; errors as `read_log`."""
    trouble = partial(tell_trouble, context, f"following job {job_id} goes on")
    log = read_log(
        *(contracts, gateways, job_id),
        follow=follow,
        key_file=context.settings.result_key_file,
        on_trouble=trouble,
    )
    async for data in log:
        (write or context.printer.raw)(data)


class LogPrinter:
    """Shows what the jobs of a line print while somebody waits for its end; nothing without gateways.

    A log that can't be shown is reported and does not affect the wait.
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

    def saw(self, job: Job) -> None:
        """A job that has begun to run is followed."""
        began = job.status is JobStatus.RUNNING or (job.status.is_final and bool(job.rate))
        if self._gateways and began and job.id not in self._tasks:
            self._tasks[job.id] = asyncio.create_task(self._show(job.id))

    async def finish(self) -> None:
        """Wait until all that was printed is shown."""
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    async def _show(self, job_id: int) -> None:
        printer = self._context.printer
        write = printer.raw if printer.style is Format.TABLE else _to_stderr
        try:
            await print_log(
                self._context, self._contracts, self._gateways, job_id, follow=True, write=write
            )
        except GridError as error:
            printer.note(f"The output of job {job_id} can't be shown: {error.message}")


def _to_stderr(data: bytes) -> None:
    sys.stderr.write(plain(data.decode("utf-8", "replace"), keep="\n\t"))
    sys.stderr.flush()


def _run(settings: Settings, contracts: Contracts, job: Job) -> Path | None:
    grid = contracts.deployment.chain_id, contracts.scheduler.address
    return find_run(settings.state_dir, *grid, job.id)
