"""Runs the scenario of the demo on a running grid."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psutil

from deepsquare_chain.chain.bindings.events import ProviderAnswered
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.client.gasless import RelayedSender
from deepsquare_chain.client.submission import Request, submit
from deepsquare_chain.client.transactions import Preview
from deepsquare_chain.demo.scenario import SCENARIO, DemoAction, ScenarioJob, problems
from deepsquare_chain.demo.tracker import DemoDisplay, DemoTracker
from deepsquare_chain.devnet.grid import CUSTOMER_WITHOUT_COIN, PROVIDERS, LocalGrid
from deepsquare_chain.errors import WaitTimeoutError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.store.gateway_client import GatewayDefinitionStore
from deepsquare_chain.workflow import load_job_file


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
