"""Customers with jobs of all final statuses on a grid of real daemons, and the final checks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from deepsquare_chain.chain.bindings.deployment import Timeouts
from deepsquare_chain.chain.bindings.events import Event, JobSubmitted, JobTransition
from deepsquare_chain.chain.bindings.reverts import InvalidTransition
from deepsquare_chain.chain.deploying import GridParams
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.job import Job, JobFlags, JobStatus, Resources
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import FolderDefinitionStore
from deepsquare_chain.workflow import Definition, Step
from tests.support.livegrid import WEALTH, LiveGrid, terms
from tests.support.oracle import LedgerLine, check_executions, check_ledger, check_provider, replay
from tests.support.provider import all_events

T = TypeVar("T")
SMALL = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=64, gpus=0)
# Timeouts long enough for daemons that restart within seconds.
PARAMS = GridParams(
    admin_delay=0,
    timeouts=Timeouts(
        claim_timeout=60,
        pending_timeout=300,
        response_timeout=60,
        response_blocks=10,
        report_grace=3_600,
        top_up_notice=10,
        collect_interval=5,
    ),
)


@dataclass(frozen=True)
class PlannedJob:
    """A job to submit: its command, and the expected status of its last successor."""

    command: str
    ending: JobStatus
    limit: int = 60
    resources: Resources = SMALL
    definition_resources: Resources | None = None  # resources in the definition, if different
    flags: JobFlags = JobFlags.NONE


FINISHES = PlannedJob("true", JobStatus.FINISHED)
FAILS = PlannedJob("exit 3", JobStatus.FAILED)
RUNS_OUT = PlannedJob("sleep 600", JobStatus.OUT_OF_CREDITS, limit=3)
IS_COLLECTED = PlannedJob("sleep 17", JobStatus.FINISHED, flags=JobFlags.INTERIM_PAYMENTS)
IS_CANCELLED = PlannedJob("sleep 500", JobStatus.CANCELLED, limit=600)


class Customers:
    """Submits jobs that record each run in a file; each job has a unique definition.

    Jobs are identified by their definition, because a reorg may give their ID to another job.
    """

    def __init__(self, grid: LiveGrid, folder: Path) -> None:
        self.grid = grid
        self.definitions_folder = folder / "definitions"
        self.store = FolderDefinitionStore(self.definitions_folder)
        self.expected: dict[bytes, JobStatus] = {}
        self._numbers = itertools.count()
        self._tally = folder / "tally"
        self._tally.mkdir()

    async def submit(
        self,
        *planned_jobs: PlannedJob,
        provider: str = "",
        customer: int | None = None,
        **changes: Any,
    ) -> list[bytes]:
        """Submit jobs in one transaction, and return the digests of their definitions.

        If `provider` is given, only the provider with this label is eligible.
        """
        orders, digests = [], []
        for planned_job in planned_jobs:
            # A counter, because concurrent submissions must not share a definition.
            run_file = self._tally / str(next(self._numbers))
            command = f'echo "$DEEPSQUARE_JOB_ID" >> "{run_file}"; {planned_job.command}'
            resources = planned_job.definition_resources or planned_job.resources
            definition = Definition(
                resources=resources, env={}, steps=(Step.simple("only", command),)
            )
            digests.append(await self.store.put(definition.to_bytes()))
            defaults = {
                "time_limit": planned_job.limit,
                "uses": f"place={provider}" if provider else "",
                "flags": planned_job.flags,
            }
            job_terms = terms(resources=planned_job.resources, **(defaults | changes))
            orders.append((job_terms, [digests[-1]]))
        assert self.expected.keys().isdisjoint(digests), "two jobs share a definition"
        self.expected |= {
            digest: planned_job.ending
            for digest, planned_job in zip(digests, planned_jobs, strict=True)
        }
        index = len(self.expected) % 2 if customer is None else customer
        call = self.grid.contracts.scheduler.submit_jobs(orders)
        key = digests[0].hex()  # idempotency key: a retry does not pay twice
        await with_retries(lambda: self.grid.send(self.grid.customers[index], call, key=key))
        return digests

    async def jobs(self) -> list[Job]:
        """Return all jobs of the grid."""
        contract = self.grid.contracts.scheduler

        async def read() -> list[Job]:
            return await contract.get_jobs(list(range(1, await contract.job_count() + 1)))

        return await with_retries(read)

    async def lines(self) -> dict[bytes, list[Job]]:
        """Return the jobs of each definition, successors last."""
        jobs_by_definition: defaultdict[bytes, list[Job]] = defaultdict(list)
        for job in await self.jobs():
            jobs_by_definition[job.definition].append(job)
        return jobs_by_definition

    async def cancel(self, digests: Iterable[bytes]) -> None:
        """Cancel the live jobs of these definitions."""
        lines = await self.lines()
        live_jobs = [job for digest in digests for job in lines[digest] if job.status.is_live]
        for account in self.grid.customers:
            job_ids = [job.id for job in live_jobs if job.customer == account.address]
            if job_ids:
                call = self.grid.contracts.scheduler.cancel(job_ids)
                # After a reorganisation an earlier cancel may be sent again before this one.
                with contextlib.suppress(InvalidTransition):
                    await with_retries(lambda a=account, c=call: self.grid.send(a, c))

    async def live_jobs(self) -> list[Job]:
        """Return the jobs that have not ended."""
        return [job for job in await self.jobs() if job.status.is_live]

    async def all_final(self) -> bool:
        """Whether all jobs have ended; cancels those that must end as CANCELLED."""
        live_jobs = await self.live_jobs()
        await self.cancel(
            {job.definition for job in live_jobs}
            & {digest for digest, ending in self.expected.items() if ending is JobStatus.CANCELLED}
        )
        return not live_jobs

    def executions(self) -> dict[int, int]:
        """Return how often each job was executed."""
        counts: Counter[int] = Counter()
        for run_file in self._tally.iterdir():
            counts.update(int(line) for line in run_file.read_text().splitlines())
        return dict(counts)


async def with_retries(call: Callable[[], Awaitable[T]], attempts: int = 5) -> T:
    """Retry after node errors, which occur during reorgs."""
    for attempts_left in reversed(range(attempts)):
        try:
            return await call()
        except EndpointError:
            if not attempts_left:
                raise
        await asyncio.sleep(1)
    raise AssertionError("no attempt at all")


async def submit_in_turns(
    customers: Customers, busy: Callable[[], bool], *, limit: int = 14, pause: float = 1.5
) -> None:
    """Submit jobs with all final statuses to each provider in turn, while `busy` returns True."""
    number, to_cancel = 0, []
    while busy():
        if len(await customers.live_jobs()) < limit:
            planned_jobs = [FINISHES, IS_COLLECTED, FAILS, IS_CANCELLED] + [RUNS_OUT] * (
                number % 4 < 2
            )
            digests = await customers.submit(*planned_jobs, provider=f"p{number % 2}")
            to_cancel.append(digests[3])
            number += 1
        await asyncio.sleep(pause)
        if len(to_cancel) > 3:  # by then, the oldest of them is running
            await customers.cancel([to_cancel.pop(0)])
    await customers.cancel(to_cancel)


# ---------------------------------------------------------------------------- final checks


async def check_all_ledgers(
    customers: Customers,
    folder: Path,
    *,
    database_reset: bool = False,
    timestamps_changed: bool = False,
) -> Mapping[int, LedgerLine]:
    """Check that events, storage, databases, balances and executions agree; return the ledger.

    A database that was `database_reset` has recovered the earnings, but not the ends of runs. If blocks
    were `timestamps_changed`, less chain time may lie between start and report than when it was sent.
    """
    grid = customers.grid
    events = await all_events(grid)
    ledger = replay(events)
    jobs = await customers.jobs()
    by_id = {job.id: job for job in jobs}
    check_submissions(customers, events)
    final_statuses = {digest: line[-1].status for digest, line in (await customers.lines()).items()}
    wrong = {
        digest.hex()[:8]: (final_statuses[digest].name, ending.name)
        for digest, ending in customers.expected.items()
        if final_statuses[digest] is not ending
    }
    assert not wrong, f"ended, should have ended: {wrong}"
    check_ledger(ledger, jobs)
    elapsed = await seconds_on_chain(grid, events) if timestamps_changed else None
    check_executions(ledger, customers.executions())
    for number, account in enumerate(grid.providers):
        table, store = open_table(grid, folder, number)
        with store:
            rows = [] if database_reset else table.all()
            check_provider(account.address, ledger, by_id, rows, table.earned(), elapsed)
    await check_balances(grid, ledger)
    return ledger


async def seconds_on_chain(grid: LiveGrid, events: Iterable[Event]) -> dict[int, int]:
    """Return the chain time from start to end of each job that has both, in seconds."""
    times: dict[int, int] = {}
    started: dict[int, int] = {}
    durations: dict[int, int] = {}
    for event in events:
        if isinstance(event, JobTransition):
            number = event.block_number
            if number not in times:
                times[number] = int((await grid.w3.eth.get_block(number))["timestamp"])
            if event.after is JobStatus.RUNNING:
                started[event.job_id] = times[number]
            elif event.job_id in started:
                durations[event.job_id] = times[number] - started[event.job_id]
    return durations


def check_submissions(customers: Customers, events: Iterable[Event]) -> None:
    """Check that each job was paid for exactly once."""
    paid = Counter(event.definition for event in events if isinstance(event, JobSubmitted))
    wrong = {
        digest.hex()[:8]: (paid[digest], customers.expected.get(digest))
        for digest in {*paid, *customers.expected}
        if paid[digest] != 1 or digest not in customers.expected
    }
    assert not wrong, f"paid so often, and should have ended: {wrong}"


async def check_balances(grid: LiveGrid, ledger: Mapping[int, LedgerLine]) -> None:
    """Check that all balances match the ledger, and that the contract holds no credits."""
    balance = grid.contracts.credit.balance_of
    for account in grid.providers:
        earned = sum(line.paid for line in ledger.values() if line.provider == account.address)
        assert await balance(account.address) == earned
    for account in grid.customers:
        spent = sum(
            line.paid + line.fee for line in ledger.values() if line.customer == account.address
        )
        assert await balance(account.address) == WEALTH - spent
    fees = sum(line.fee for line in ledger.values())
    assert await balance(grid.deployment.treasury) == fees
    assert await balance(grid.deployment.scheduler) == 0


def open_table(grid: LiveGrid, folder: Path, number: int) -> tuple[RunTable, Store]:
    """Open the run records of the provider whose state folder is `p<number>`."""
    account = grid.providers[number].address
    grid_key = {"chain_id": grid.deployment.chain_id, "contract": grid.deployment.scheduler}
    store = Store.open(folder / f"p{number}" / "provider.db", account=account, **grid_key)
    return RunTable(store, account, **grid_key), store


def all_applied(grid: LiveGrid, folder: Path, block: int) -> bool:
    """Whether every provider has applied the events up to `block` and has no open run record.

    A record may be closed before the event of the job's end is applied: the record follows the job's
    state on chain, and the events follow in the next cycle if an endpoint did not return them.
    """
    return all(
        is_settled(*open_table(grid, folder, number), block)
        for number in range(len(grid.providers))
    )


def is_settled(table: RunTable, store: Store, block: int) -> bool:
    """Whether a provider has applied the events up to `block` and has no open run record.

    Closes the store. See `all_applied`.
    """
    with store:
        applied = store.recent_blocks("main")
        return bool(applied) and applied[0].number >= block and not table.open()


def kill_remaining_processes(folder: Path) -> list[str]:
    """Kill the processes that still use this test's folders; return their command lines."""
    killed = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command_line = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if any(str(folder) in word for word in command_line):
            killed.append(" ".join(command_line))
            process.kill()
    return killed
