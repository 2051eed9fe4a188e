"""A provider's service over a live grid and real processes, driven cycle by cycle."""

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
from deepsquare_chain.provider.service import ProviderService, ProviderSettings, look_up
from deepsquare_chain.store.definitions import FolderDefinitionStore
from deepsquare_chain.store.gateway_client import GatewayDefinitionStore, open_gateways
from deepsquare_chain.workflow import Definition, Step
from tests.support.livegrid import LiveGrid, terms

SMALL = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=64, gpus=0)
OFFER = Offer(cpus=8, memory=4096, gpus=0)


def definition(command: str, resources: Resources = SMALL, **more: Any) -> Definition:
    """A definition of one step; `more` as `Definition` has it."""
    steps = (Step.simple("only", command),)
    return Definition(resources=resources, env={}, steps=steps, **more)


@dataclass
class Bench:
    """One provider of a grid, with its folder and its service."""

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
        """Submit one job for each command and assign all of them to this provider."""
        digests = []
        for command in commands:
            data = definition(command, resources).to_bytes()
            made = definition(command, resources).digest
            digests.append(await self.definitions.put(data) if keep else made)
        return await self.submit_digests(digests, resources, customer, **changes)

    async def submit_digests(
        self, digests: list[bytes], resources: Resources = SMALL, customer: int = 0, **changes: Any
    ) -> list[int]:
        """The same for definitions that stand, or do not stand, in the store already."""
        asked = terms(resources=resources, **changes)
        call = self.grid.contracts.scheduler.submit_jobs([(asked, digests)])
        receipt = await self.grid.send(self.grid.customers[customer], call)
        ids = [event.job_id for event in receipt.events if isinstance(event, JobSubmitted)]
        await self.assign(ids)
        return ids

    async def assign(self, ids: list[int]) -> None:
        """Give PENDING jobs to this provider."""
        await self.grid.assign({self.service.provider_id: ids})

    async def job(self, job_id: int) -> Job:
        return await self.grid.contracts.scheduler.get_job(job_id)

    def row(self, job_id: int) -> Run:
        found = self.service.table.get(job_id)
        assert found is not None
        return found

    def phase(self, job_id: int) -> Phase | None:
        found = self.service.table.get(job_id)
        return found.phase if found else None

    async def drive(self, done: Callable[[], Any], *, timeout: float = 40.0) -> None:
        """Cycle until `done()`, which may be a coroutine function, holds."""
        deadline = time.monotonic() + timeout
        while True:
            self.service.heads.hint()  # others mine without its knowledge
            moved = await self.service.cycle()
            answer = done()
            if await answer if asyncio.iscoroutine(answer) else answer:
                return
            assert time.monotonic() < deadline, [str(run) for run in self.service.table.all()]
            await asyncio.sleep(0.0 if moved else 0.15)

    async def until(self, ids: list[int], *statuses: JobStatus, timeout: float = 40.0) -> None:
        """Cycle until every job has one of the statuses, any final one by default."""

        async def reached() -> bool:
            jobs = await self.grid.contracts.scheduler.get_jobs(ids)
            wanted = statuses or tuple(each for each in JobStatus if each.is_final)
            return all(job.status in wanted for job in jobs)

        await self.drive(reached, timeout=timeout)

    async def events(self, kind: type[Event], job_id: int) -> list[Any]:
        """Events of one kind that name a job."""
        return [
            event
            for event in await all_events(self.grid)
            if isinstance(event, kind) and getattr(event, "job_id", None) == job_id
        ]

    async def result(self, job_id: int) -> JobResult:
        [found] = await self.events(JobResult, job_id)
        return found

    async def settled(self, job_id: int) -> JobSettled:
        [found] = await self.events(JobSettled, job_id)
        return found


async def all_events(grid: LiveGrid) -> list[Event]:
    """Every event of the scheduler."""
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
    """A provider's service in this process, with the local executor unless another is given."""
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
            standing=await look_up(grid.contracts, account.address),
            gateways=clients,
        )
        try:
            yield Bench(grid, folder, number, service, executor, definition_store)
        finally:
            await service.close()
            for handle in await executor.keys():
                await executor.cancel(handle)
            store.close()
