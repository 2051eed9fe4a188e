"""Runs the scenario of the demo on a running grid, tracks its jobs, and prints their progress."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil
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
from deepsquare_chain.chain.transactions.fees import GWEI
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.client.gasless import RelayedSender
from deepsquare_chain.client.gateways import read_log
from deepsquare_chain.client.jobs import History, inherit, replay
from deepsquare_chain.client.submission import Request, submit
from deepsquare_chain.client.transactions import Preview
from deepsquare_chain.credits import credit_count, format_credits
from deepsquare_chain.daemon.loop import cancelled
from deepsquare_chain.demo.scenario import (
    SCENARIO,
    DemoAction,
    JobChain,
    ScenarioJob,
    job_chains,
    problems,
)
from deepsquare_chain.devnet.grid import CUSTOMER_WITHOUT_COIN, PROVIDERS, LocalGrid
from deepsquare_chain.errors import GridError, WaitTimeoutError
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.observability.redaction import plain
from deepsquare_chain.provider.outputs import find_run
from deepsquare_chain.store.gateway_client import GatewayClient, GatewayDefinitionStore
from deepsquare_chain.workflow import load_job_file

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
        Text(f"{row.gas_wei // GWEI:,}"),
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

    `jobs` and `histories` are keyed by job ID, `scenario_jobs` by the ID of the first job of each.
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
        """All scenario jobs with their jobs and successors."""
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
        # Last, so that `jobs` has every job.
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


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return processes with the folder as working folder or in their arguments, except this one."""
    root = os.path.realpath(folder)
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and _is_in_folder(process, root):
                processes.append(process)
    return processes


def end_processes_of(folder: Path, grace: float = 3.0) -> list[int]:
    """Kill the processes of a folder; return the PIDs of those that survive for `grace` seconds."""
    processes = processes_of(folder)
    while processes:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, alive = psutil.wait_procs(processes, timeout=grace)
        if alive:
            return [process.pid for process in alive]
        # They may have started new processes in the meantime.
        processes = processes_of(folder)
    return []


def _is_in_folder(process: psutil.Process, root: str) -> bool:
    if process.status() == psutil.STATUS_ZOMBIE:
        return False
    paths = [*process.cmdline(), process.cwd()]
    return any(path == root or path.startswith(root + os.sep) for path in paths)


def is_alive(process: psutil.Process) -> bool:
    """Whether this process (not a later one with its PID) still runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


POLL_INTERVAL: Final = 0.3  # poll interval in seconds
TIMEOUT: Final = 150.0  # timeout of the whole scenario in seconds
_RESTART_TIMEOUT: Final = 30.0  # timeout for a restarted daemon to end its orphaned processes
_CANCEL_AFTER: Final = 2  # lines of output after which the customer cancels the job


class DemoRunner:
    """Runs the scenario, and holds its progress."""

    def __init__(self, grid: LocalGrid, display: DemoDisplay, examples: Path) -> None:
        self.tracker = DemoTracker(grid, display)
        self._grid = grid
        self._display = display
        self._examples = examples
        #: Number of requests signed by the customer without coins.
        self.signed = 0
        self._relayed: RelayedSender | None = None
        self._problems: list[str] = []
        self._cancelled = False
        self._killed = ""
        self._orphans: list[psutil.Process] = []
        self._restarted = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def problems(self) -> list[str]:
        """Differences from the scenario."""
        tracker = self.tracker
        return self._problems + problems(
            SCENARIO, tracker.job_chains, tracker.jobs, tracker.histories
        )

    async def run(self) -> None:
        """Run the scenario to the end.

        Raises:
            WaitTimeoutError: The scenario exceeded its timeout.
            GridError: A step failed.
        """
        self._display.step("starting the meta-scheduler and two providers, each in its own process")
        for role in ("scheduler", *PROVIDERS):
            child = await self._grid.start_service(role)
            self._display.print_line(f"  {role}: process {child.pid}, log {self._grid.log(role)}")
        await self._submit([scenario_job for scenario_job in SCENARIO if not scenario_job.late])
        deadline = time.monotonic() + TIMEOUT
        try:
            while not self._ended():
                if time.monotonic() > deadline:
                    raise WaitTimeoutError(
                        f"The scenario did not end within {TIMEOUT:.0f} seconds",
                        hint=f"See the logs: {self._grid.log('scheduler').parent}",
                    )
                await self.tracker.poll()
                await self._run_actions()
                await asyncio.sleep(POLL_INTERVAL)
            # `poll` reads records after events, so the last records may be newer than the events.
            await self.tracker.poll()
        finally:
            await self._cancel_tasks()
            await self.tracker.close()

    def _ended(self) -> bool:
        all_submitted = len(self.tracker.scenario_jobs) == len(SCENARIO)
        return all_submitted and not self._tasks and self.tracker.all_ended

    # -- customers

    async def _submit(self, scenario_jobs: Sequence[ScenarioJob]) -> None:
        customers = dict.fromkeys(scenario_job.customer for scenario_job in scenario_jobs)
        await asyncio.gather(
            *(
                self._submit_for(customer, [p for p in scenario_jobs if p.customer == customer])
                for customer in customers
            )
        )

    async def _submit_for(self, customer: str, scenario_jobs: Sequence[ScenarioJob]) -> None:
        permit = self._grid.accounts[customer] if len(scenario_jobs) == 1 else None
        method = "with a signed permit" if permit else "in one transaction"
        if customer == CUSTOMER_WITHOUT_COIN:
            method = "in one signed request: it has credits but no coin, so a relay pays the gas"
        self._display.step(
            f"{customer} submits {', '.join(scenario_job.name for scenario_job in scenario_jobs)} {method}"
        )
        submission = await submit(
            self._grid.contracts,
            await self._sender_for(customer),
            GatewayDefinitionStore(await self.tracker.gateways(customer)),
            [self._request(scenario_job) for scenario_job in scenario_jobs],
            permit=permit,
        )
        await self.tracker.add_jobs(dict(zip(submission.job_ids, scenario_jobs, strict=True)))

    async def _sender_for(self, customer: str) -> Sender | RelayedSender:
        """Return a customer's sender: its wallet, or the relay for the customer without coins."""
        if customer != CUSTOMER_WITHOUT_COIN:
            return self._grid.senders[customer]
        if self._relayed is None:
            self._relayed = await self._grid.relayed(customer, self._confirm)
        return self._relayed

    def _confirm(self, preview: Preview) -> bool:
        """Print the call to be signed; always confirm it."""
        self.signed += 1
        preview_rows = dict(preview.rows)
        for name in ("function", "amount", "allowance", "valid until", "gas"):
            if name in preview_rows:
                self._display.print_line(
                    f"  {CUSTOMER_WITHOUT_COIN} signs: {name} {preview_rows[name]}"
                )
        return True

    def _request(self, scenario_job: ScenarioJob) -> Request:
        job_file = load_job_file(self._examples / scenario_job.file)
        terms = job_file.terms()
        if scenario_job.objective is not None:
            terms = replace(terms, objective=scenario_job.objective)
        return Request(terms, (job_file.definition.to_bytes(),))

    async def _cancel(self, job_id: int, scenario_job: ScenarioJob) -> None:
        self._display.step(
            f"{scenario_job.customer} cancels {scenario_job.name} while it is RUNNING"
        )
        call = self._grid.contracts.scheduler.cancel([job_id])
        sender = await self._sender_for(scenario_job.customer)
        await sender.send(call, timeout=30)

    # -- actions

    async def _run_actions(self) -> None:
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.discard(task)
            task.result()
        for job_id, scenario_job in list(self.tracker.scenario_jobs.items()):
            running = self.tracker.jobs[job_id].status is JobStatus.RUNNING
            printed = self.tracker.printed.get(job_id, 0)
            if scenario_job.action is DemoAction.CANCEL and not self._cancelled:
                if running and printed >= _CANCEL_AFTER:
                    self._cancelled = True
                    self._begin(self._cancel(job_id, scenario_job))
            elif scenario_job.action is DemoAction.KILL and not self._restarted:
                if running and printed and not self._killed and self._is_only_live_job(job_id):
                    self._kill(job_id)
                elif self.tracker.jobs[job_id].status.is_final:
                    self._restarted = True
                    self._begin(self._restart_and_submit_late())

    def _is_only_live_job(self, job_id: int) -> bool:
        """Whether the job is the only live one at its provider, so that a kill affects no other."""
        jobs = self.tracker.jobs
        host = jobs[job_id].provider_id
        return not any(
            job.status.is_live and job.provider_id == host and job.id != job_id
            for job in jobs.values()
        )

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _kill(self, job_id: int) -> None:
        """Kill only the daemon with SIGKILL; the run continues without it."""
        role = self._grid.providers[self.tracker.jobs[job_id].provider_id]
        child = self._grid.services[role]
        os.kill(child.pid, signal.SIGKILL)
        self._killed = role
        run = self.tracker.run_folder(job_id)
        self._orphans = processes_of(run) if run is not None else []
        pids = [process.pid for process in self._orphans]
        self._display.step(
            f"SIGKILL to {role}'s daemon (process {child.pid}) while job {job_id} is RUNNING: "
            f"its processes {pids} are now orphaned"
        )

    async def _restart_and_submit_late(self) -> None:
        """Restart the killed daemon, which must end its orphaned processes; submit the late jobs."""
        if not self._killed:
            self._problems.append("the job ended before its daemon was killed")
        else:
            await self._restart_daemon()
        await self._submit([scenario_job for scenario_job in SCENARIO if scenario_job.late])

    async def _restart_daemon(self) -> None:
        orphans = [process for process in self._orphans if is_alive(process)]
        if not orphans:
            self._problems.append("the orphaned run ended before its daemon was restarted")
        child = await self._grid.start_service(self._killed)
        self._display.step(f"{self._killed}'s daemon was restarted as process {child.pid}")
        pids = [process.pid for process in orphans]
        if not await self._wait_for(lambda: not any(is_alive(process) for process in orphans)):
            self._problems.append(f"the orphaned processes {pids} were not ended")
            return
        self._display.step(f"{self._killed}'s daemon has ended the orphaned processes {pids}")
        if not await self._wait_for(self._has_answered):
            self._problems.append(f"{self._killed} did not answer its challenge after the restart")

    def _has_answered(self) -> bool:
        """Whether the restarted provider has answered its challenge."""
        account = self._grid.accounts[self._killed].address
        answers = (e for e in self.tracker.reader.events if isinstance(e, ProviderAnswered))
        return any(event.provider == account for event in answers)

    async def _wait_for(self, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _RESTART_TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.1)
        return True
