"""Tracks the jobs of the demo, their histories and their output, by polling."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.events import (
    Event,
    JobCollected,
    JobRetried,
    JobSubmitted,
    ProviderAnswered,
    ProviderChallenged,
    decode_logs,
)
from deepsquare_chain.client.gateways import read_log
from deepsquare_chain.client.jobs import History, inherit, replay
from deepsquare_chain.credits import credit_count, format_credits
from deepsquare_chain.daemon.loop import cancelled
from deepsquare_chain.demo.scenario import JobChain, ScenarioJob, job_chains
from deepsquare_chain.devnet.grid import LocalGrid
from deepsquare_chain.errors import GridError
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.observability.redaction import plain
from deepsquare_chain.provider.outputs import find_run
from deepsquare_chain.store.gateway_client import GatewayClient

# -- output of the demo: a live table on a terminal, plain lines otherwise

_STYLES: Final[Mapping[JobStatus, str]] = {
    JobStatus.PENDING: "dim",
    JobStatus.RUNNING: "bold cyan",
    JobStatus.FINISHED: "green",
    JobStatus.CANCELLED: "yellow",
    JobStatus.FAILED: "red",
    JobStatus.OUT_OF_CREDITS: "magenta",
    JobStatus.PANICKED: "bold red",
}
_GWEI: Final = 10**9


@dataclass(frozen=True, slots=True)
class Row:
    """A job in the table; amounts are in credit-wei, `gas_wei` is the cost of its transactions.

    `used` is the amount that a final job consumed, None while it is live.
    """

    job_id: int
    name: str
    customer: str
    status: JobStatus
    provider: str
    escrow: int
    used: int | None
    gas_wei: int
    retry_of: int | None = None


class DemoDisplay:
    """Shows a table of jobs, and prints lines; used as a context manager."""

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self._title = title
        self._rows: tuple[Row, ...] = ()
        self._note = ""
        self._seen: dict[int, tuple[JobStatus, str]] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(
                self._render(), console=self.console, refresh_per_second=4, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def print_line(self, text: str, style: str = "") -> None:
        """Print a line above the table."""
        self.console.print(Text(plain(text), style=style), soft_wrap=True)

    def step(self, text: str) -> None:
        """Print the current step of the demo."""
        self._note = text
        self.print_line(f"* {text}", "bold")
        self._refresh()

    def print_output(self, name: str, job_id: int, line: str) -> None:
        """Print an output line of a job; control characters are escaped."""
        text = Text(f"  {name}#{job_id} | ", style="dim")
        text.append(plain(line), style="default")
        self.console.print(text, soft_wrap=True)

    def show(self, rows: Iterable[Row]) -> None:
        """Show these rows; without a terminal, print only changes."""
        self._rows = tuple(rows)
        if self._live is not None:
            self._refresh()
            return
        for row in self._rows:
            state = row.status, row.provider
            if self._seen.get(row.job_id) != state:
                self._seen[row.job_id] = state
                self.print_line(f"  job {row.job_id} {row.name}: {_describe(row)}")

    def table(self) -> Table:
        """Return the rows as a table."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("job", justify="right")
        for title in ("name", "customer", "status", "provider"):
            table.add_column(title)
        for title in ("credits", "used", "gas (gwei)"):
            table.add_column(title, justify="right")
        for row in self._rows:
            table.add_row(*_cells(row))
        return table

    def _render(self) -> RenderableType:
        return Group(Text(self._title, style="bold"), self.table(), Text(self._note, style="dim"))

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)


def _cells(row: Row) -> list[Text]:
    name = row.name if row.retry_of is None else f"{row.name} (continues {row.retry_of})"
    used = "" if row.used is None else format_credits(row.used)
    return [
        Text(str(row.job_id)),
        Text(plain(name)),
        Text(row.customer),
        Text(row.status.name, style=_STYLES.get(row.status, "")),
        Text(row.provider),
        Text(format_credits(row.escrow)),
        Text(used),
        Text(f"{row.gas_wei // _GWEI:,}"),
    ]


def _describe(row: Row) -> str:
    location = f" at {row.provider}" if row.provider else ""
    used = "" if row.used is None else f", used {credit_count(row.used)}"
    again = "" if row.retry_of is None else f" (continues job {row.retry_of})"
    return f"{row.status.name}{location}{used}{again}"


#: Seconds to wait for the rest of the jobs' output at the end.
_OUTPUT_TIMEOUT: Final = 5.0


@dataclass(slots=True)
class Gas:
    """Transactions of an account, with the gas used and the wei paid."""

    transactions: int = 0
    used: int = 0
    wei: int = 0


class BlockReader:
    """Reads a chain without reorgs, from its first block.

    `by_account` sums all transactions. `by_job` divides the wei of each transaction equally among
    the jobs that its events name. `events` holds all events so far.
    """

    def __init__(self, w3: AsyncWeb3[Any]) -> None:
        self._w3 = w3
        self._next = 0
        self.by_account: dict[str, Gas] = defaultdict(Gas)
        self.by_job: dict[int, int] = defaultdict(int)
        self.events: list[Event] = []

    async def poll(self) -> list[Event]:
        """Return the events of all new blocks, in order."""
        head = await self._w3.eth.block_number
        events: list[Event] = []
        while self._next <= head:
            block = await self._w3.eth.get_block(self._next)
            hashes = block.get("transactions", [])
            receipts = await asyncio.gather(
                *(self._w3.eth.get_transaction_receipt(tx_hash) for tx_hash in hashes)  # type: ignore[arg-type]
            )
            for receipt in receipts:
                events += self._read(dict(receipt))
            self._next += 1
        self.events += events
        return events

    def _read(self, receipt: dict[str, Any]) -> list[Event]:
        wei = int(receipt["gasUsed"]) * int(receipt["effectiveGasPrice"])
        paid = self.by_account[str(receipt["from"])]
        paid.transactions += 1
        paid.used += int(receipt["gasUsed"])
        paid.wei += wei
        events = decode_logs(receipt["logs"])
        jobs = {event.job_id for event in events if hasattr(event, "job_id")}
        for job_id in jobs:
            self.by_job[job_id] += wei // len(jobs)
        return events


class DemoTracker:
    """Tracks jobs and their output.

    `jobs` and `histories` are keyed by job ID, `scenario_jobs` by the ID of a part's first job.
    """

    def __init__(self, grid: LocalGrid, display: DemoDisplay) -> None:
        self.reader = BlockReader(grid.contracts.w3)
        self.scenario_jobs: dict[int, ScenarioJob] = {}
        self.jobs: dict[int, Job] = {}
        self.histories: dict[int, History] = {}
        self.printed: dict[int, int] = {}
        self._grid = grid
        self._display = display
        self._gateways: dict[str, tuple[GatewayClient, ...]] = {}
        self._log_tasks: dict[int, asyncio.Task[None]] = {}
        self._unfinished_lines: dict[int, bytes] = {}

    @property
    def job_chains(self) -> list[JobChain]:
        """All parts with their jobs and successors."""
        return job_chains(self.scenario_jobs, self.histories)

    @property
    def all_ended(self) -> bool:
        """Whether all jobs have ended, and all their successors are known."""
        all_known = all(
            history.successor is None or history.successor in self.jobs
            for history in self.histories.values()
        )
        return all_known and all(job.status.is_final for job in self.jobs.values())

    def run_folder(self, job_id: int) -> Path | None:
        """Return the folder of a job's latest run at its provider."""
        role = self._grid.providers.get(self.jobs[job_id].provider_id)
        if role is None:
            return None
        deployment = self._grid.contracts.deployment
        return find_run(self._grid.state(role), deployment.chain_id, deployment.scheduler, job_id)

    async def gateways(self, customer: str) -> tuple[GatewayClient, ...]:
        """Return the gateway clients of a customer."""
        if customer not in self._gateways:
            self._gateways[customer] = await self._grid.gateways(customer)
        return self._gateways[customer]

    async def close(self) -> None:
        """Show the rest of the jobs' output until a short timeout, and stop following it."""
        if self._log_tasks:
            await asyncio.wait(self._log_tasks.values(), timeout=_OUTPUT_TIMEOUT)
        for task in self._log_tasks.values():
            await cancelled(task)

    async def add_jobs(self, scenario_jobs: dict[int, ScenarioJob]) -> None:
        """Add newly submitted jobs."""
        for job_id in scenario_jobs:
            self.histories.setdefault(job_id, History(job_id))
        await self._update(tuple(scenario_jobs))
        # Last, so that `jobs` has the job of every part.
        self.scenario_jobs |= scenario_jobs

    async def poll(self) -> None:
        """Read new events and job records, and show the changes."""
        events = await self.reader.poll()
        for event in events:
            if isinstance(event, JobSubmitted):
                self.histories[event.job_id] = History(event.job_id)
            if isinstance(event, JobRetried):
                self.histories.setdefault(event.successor, History(event.successor))
        replay(self.histories, events)
        inherit(self.histories)
        await self._update(tuple(self.histories))
        self.show()
        for event in events:
            self._show_event(event)
        for job in self.jobs.values():
            began = job.status is JobStatus.RUNNING or (job.status.is_final and job.rate)
            if began and job.id not in self._log_tasks:
                self._log_tasks[job.id] = asyncio.create_task(self._follow(job))

    def show(self) -> None:
        """Show all jobs in the table."""
        self._display.show(self._row(self.jobs[number]) for number in sorted(self.jobs))

    async def _update(self, numbers: Sequence[int]) -> None:
        jobs = await self._grid.contracts.scheduler.get_jobs(numbers)
        self.jobs |= {job.id: job for job in jobs}

    def _row(self, job: Job) -> Row:
        history = self.histories[job.id]
        return Row(
            job_id=job.id,
            name=history.name,
            customer=self._grid.name_of(job.customer),
            status=job.status,
            provider=self._grid.providers.get(job.provider_id, ""),
            escrow=history.funded + history.carried_in,
            used=job.escrow + history.collected if job.status.is_final else None,
            gas_wei=self.reader.by_job[job.id],
            retry_of=history.retry_of,
        )

    def _show_event(self, event: Event) -> None:
        match event:
            case ProviderChallenged():
                provider = self._grid.name_of(event.provider)
                self._display.step(f"{provider} is challenged to prove that it is alive")
            case ProviderAnswered():
                self._display.step(
                    f"{self._grid.name_of(event.provider)} has answered the challenge"
                )
            case JobCollected():
                provider, paid = self._grid.name_of(event.provider), format_credits(event.paid)
                self._display.step(
                    f"{provider} collects {paid} credits for {event.billed_seconds} s of job "
                    f"{event.job_id}, which continues"
                )
            case JobRetried():
                self._display.step(
                    f"job {event.job_id} is given up; its escrow moves to job {event.successor}"
                )
            case _:
                pass

    async def _follow(self, job: Job) -> None:
        """Show the output of a job, read from the gateway with the customer's wallet."""
        gateways = await self.gateways(self._grid.name_of(job.customer))
        try:
            async for data in read_log(self._grid.contracts, gateways, job.id, follow=True):
                self._print_output(job.id, data)
        except GridError as error:
            self._display.step(f"the output of job {job.id} can't be shown: {error.message}")

    def _print_output(self, job_id: int, data: bytes) -> None:
        *complete_lines, rest = (self._unfinished_lines.get(job_id, b"") + data).split(b"\n")
        self._unfinished_lines[job_id] = rest
        self.printed[job_id] = self.printed.get(job_id, 0) + len(complete_lines)
        for line in complete_lines:
            text = line.decode("utf-8", "replace")
            self._display.print_output(self.histories[job_id].name, job_id, text)
