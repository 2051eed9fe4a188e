"""A provider's service on a live grid with real processes, run cycle by cycle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepsquare_chain.chain.bindings.events import (
    Event,
    JobResult,
    JobSettled,
    JobSubmitted,
    decode_logs,
)
from deepsquare_chain.executors.base import Executor
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.job import Job, JobStatus, Offer, Resources
from deepsquare_chain.provider.model import Phase, Run
from deepsquare_chain.provider.service import ProviderService, ProviderSettings, look_up_provider
from deepsquare_chain.store.definitions import FolderDefinitionStore
from deepsquare_chain.store.gateway_client import GatewayDefinitionStore, open_gateways
from deepsquare_chain.workflow import Definition, Step
from tests.support.livegrid import LiveGrid, terms

SMALL = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=64, gpus=0)
OFFER = Offer(cpus=8, memory=4096, gpus=0)


def definition(command: str, resources: Resources = SMALL, **more: Any) -> Definition:
    """Return a definition with one step; `more` are other fields of `Definition`."""
    steps = (Step.simple("only", command),)
    return Definition(resources=resources, env={}, steps=steps, **more)


@dataclass
class Bench:
    """A provider of a grid, with its folder and its service."""

    grid: LiveGrid
    folder: Path
    number: int
    service: ProviderService
    executor: Executor
    definitions: FolderDefinitionStore

    @property
    def account(self) -> Any:
        return self.grid.providers[self.number]

    async def submit(
        self,
        *commands: str,
        resources: Resources = SMALL,
        keep: bool = True,
        customer: int = 0,
        **changes: Any,
    ) -> list[int]:
        """Submit one job per command, and assign all of them to this provider."""
        digests = []
        for command in commands:
            data = definition(command, resources).to_bytes()
            digest = definition(command, resources).digest
            digests.append(await self.definitions.put(data) if keep else digest)
        return await self.submit_digests(digests, resources, customer, **changes)

    async def submit_digests(
        self, digests: list[bytes], resources: Resources = SMALL, customer: int = 0, **changes: Any
    ) -> list[int]:
        """Submit and assign one job per digest; the definitions need not be in the store."""
        job_terms = terms(resources=resources, **changes)
        call = self.grid.contracts.scheduler.submit_jobs([(job_terms, digests)])
        receipt = await self.grid.send(self.grid.customers[customer], call)
        ids = [event.job_id for event in receipt.events if isinstance(event, JobSubmitted)]
        await self.assign(ids)
        return ids

    async def assign(self, ids: list[int]) -> None:
        """Assign PENDING jobs to this provider."""
        await self.grid.assign({self.service.provider_id: ids})

    async def job(self, job_id: int) -> Job:
        return await self.grid.contracts.scheduler.get_job(job_id)

    def row(self, job_id: int) -> Run:
        run = self.service.table.get(job_id)
        assert run is not None
        return run

    def phase(self, job_id: int) -> Phase | None:
        run = self.service.table.get(job_id)
        return run.phase if run else None

    async def drive(self, condition: Callable[[], Any], *, timeout: float = 120.0) -> None:
        """Run cycles until `condition()`, which may be a coroutine function, returns True.

        Chain time passes like the clock's: a run of some seconds is reported only after as many.
        """
        deadline = time.monotonic() + timeout
        next_block = time.monotonic() + 1
        while True:
            self.service.heads.hint()  # other accounts may have mined new blocks
            has_changed = await self.service.cycle()
            result = condition()
            if await result if asyncio.iscoroutine(result) else result:
                return
            assert time.monotonic() < deadline, [str(run) for run in self.service.table.all()]
            if time.monotonic() >= next_block:
                next_block = time.monotonic() + 1
                await self.grid.node.rpc("evm_mine")
            await asyncio.sleep(0.0 if has_changed else 0.15)

    async def until(self, ids: list[int], *statuses: JobStatus, timeout: float = 120.0) -> None:
        """Run cycles until all jobs have one of the statuses; by default, any final status."""

        async def reached() -> bool:
            jobs = await self.grid.contracts.scheduler.get_jobs(ids)
            expected = statuses or tuple(status for status in JobStatus if status.is_final)
            return all(job.status in expected for job in jobs)

        await self.drive(reached, timeout=timeout)

    async def events(self, kind: type[Event], job_id: int) -> list[Any]:
        """Return the events of one type for a job."""
        return [
            event
            for event in await all_events(self.grid)
            if isinstance(event, kind) and getattr(event, "job_id", None) == job_id
        ]

    async def result(self, job_id: int) -> JobResult:
        [event] = await self.events(JobResult, job_id)
        return event

    async def settled(self, job_id: int) -> JobSettled:
        [event] = await self.events(JobSettled, job_id)
        return event


async def all_events(grid: LiveGrid) -> list[Event]:
    """Return all events of the scheduler contract."""
    logs = await grid.w3.eth.get_logs(
        {
            "address": grid.deployment.scheduler,
            "fromBlock": hex(grid.deployment.block),
            "toBlock": "latest",
        }
    )
    return decode_logs(logs)


@asynccontextmanager
async def bench(
    grid: LiveGrid,
    folder: Path,
    number: int = 0,
    definitions: Path | None = None,
    executor: Executor | None = None,
    gateways: Sequence[str] = (),
    **settings: Any,
) -> AsyncIterator[Bench]:
    """Run a provider's service in this process; by default with the local executor."""
    options = {"capacity": OFFER, "poll_interval": 0.1, "confirmations": 0, **settings}
    account = grid.providers[number]
    store = grid.store(account, folder / "provider.db")
    executor = executor or LocalExecutor(folder, options["capacity"])
    definition_store = FolderDefinitionStore(definitions or folder / "definitions")
    async with open_gateways(gateways, account, grid.deployment) as clients:
        service = ProviderService(
            grid.contracts,
            grid.sender(account, store=store),
            store,
            executor=executor,
            definitions=GatewayDefinitionStore(clients) if clients else definition_store,
            settings=ProviderSettings(state_dir=folder, **options),
            registration=await look_up_provider(grid.contracts, account.address),
            gateways=clients,
        )
        try:
            yield Bench(grid, folder, number, service, executor, definition_store)
        finally:
            await service.close()
            for handle in await executor.keys():
                await executor.cancel(handle)
            store.close()
