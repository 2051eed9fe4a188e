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

from deepsquare_chain.chain.bindings.event_types import ProviderAnswered
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.client.gasless import RelayedSender
from deepsquare_chain.client.preview import Preview
from deepsquare_chain.client.submission import Request, submit
from deepsquare_chain.demo.scenario import STORY, Deed, Part, problems
from deepsquare_chain.demo.tracker import Board, DemoTracker
from deepsquare_chain.devnet.grid import COINLESS, PROVIDERS, LocalGrid
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
            if process.pid != os.getpid() and _belongs(process, root):
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


def _belongs(process: psutil.Process, root: str) -> bool:
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


TICK: Final = 0.3  # poll interval in seconds
PATIENCE: Final = 150.0  # timeout of the whole scenario in seconds
_RETURN_SECONDS: Final = 30.0  # timeout for a restarted daemon to end its orphaned processes
_CANCEL_AFTER: Final = 2  # lines of output after which the customer cancels the job


class DemoRunner:
    """Runs the scenario, and holds its progress."""

    def __init__(self, grid: LocalGrid, board: Board, examples: Path) -> None:
        self.scene = DemoTracker(grid, board)
        self._grid = grid
        self._board = board
        self._examples = examples
        #: Number of requests signed by the customer without coins.
        self.signed = 0
        self._relayed: RelayedSender | None = None
        self._problems: list[str] = []
        self._cancelled = False
        self._killed = ""
        self._orphans: list[psutil.Process] = []
        self._returned = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def problems(self) -> list[str]:
        """Differences from the scenario."""
        scene = self.scene
        return self._problems + problems(STORY, scene.lines, scene.jobs, scene.histories)

    async def perform(self) -> None:
        """Run the scenario to the end.

        Raises:
            WaitTimeoutError: The scenario exceeded its timeout.
            GridError: A step failed.
        """
        self._board.step("starting the meta-scheduler and two providers, each its own process")
        for role in ("scheduler", *PROVIDERS):
            child = await self._grid.start_service(role)
            self._board.say(f"  {role}: process {child.pid}, log {self._grid.log(role)}")
        await self._submit([part for part in STORY if not part.late])
        deadline = time.monotonic() + PATIENCE
        try:
            while not self._ended():
                if time.monotonic() > deadline:
                    raise WaitTimeoutError(
                        f"The story did not end in {PATIENCE:.0f} seconds",
                        hint=f"Look into the logs: {self._grid.log('scheduler').parent}",
                    )
                await self.scene.look()
                await self._act()
                await asyncio.sleep(TICK)
            # `look` reads records after events, so the last records may be newer than the events.
            await self.scene.look()
        finally:
            await self._settle_tasks()
            await self.scene.close()

    def _ended(self) -> bool:
        all_submitted = len(self.scene.parts) == len(STORY)
        return all_submitted and not self._tasks and self.scene.at_rest

    # -- customers

    async def _submit(self, parts: Sequence[Part]) -> None:
        customers = dict.fromkeys(part.customer for part in parts)
        await asyncio.gather(
            *(
                self._submit_for(customer, [p for p in parts if p.customer == customer])
                for customer in customers
            )
        )

    async def _submit_for(self, customer: str, parts: Sequence[Part]) -> None:
        permit = self._grid.accounts[customer] if len(parts) == 1 else None
        method = "with a signed permit" if permit else "in one transaction"
        if customer == COINLESS:
            method = "in one signed request: it holds credits and no coin, a relay pays the gas"
        self._board.step(f"{customer} submits {', '.join(part.name for part in parts)} {method}")
        submission = await submit(
            self._grid.contracts,
            await self._sender_of(customer),
            GatewayDefinitionStore(await self.scene.gateways(customer)),
            [self._request(part) for part in parts],
            permit=permit,
        )
        await self.scene.enter(dict(zip(submission.job_ids, parts, strict=True)))

    async def _sender_of(self, customer: str) -> Sender | RelayedSender:
        """Return a customer's sender: its wallet, or the relay for the customer without coins."""
        if customer != COINLESS:
            return self._grid.senders[customer]
        if self._relayed is None:
            self._relayed = await self._grid.relayed(customer, self._show)
        return self._relayed

    def _show(self, preview: Preview) -> bool:
        """Print the call to be signed; always confirm it."""
        self.signed += 1
        preview_rows = dict(preview.rows)
        for name in ("function", "amount", "allowance", "good until", "gas"):
            if name in preview_rows:
                self._board.say(f"  {COINLESS} signs: {name} {preview_rows[name]}")
        return True

    def _request(self, part: Part) -> Request:
        job_file = load_job_file(self._examples / part.file)
        terms = job_file.terms()
        if part.objective is not None:
            terms = replace(terms, objective=part.objective)
        return Request(terms, (job_file.definition.to_bytes(),))

    async def _cancel(self, job_id: int, part: Part) -> None:
        self._board.step(f"{part.customer} cancels {part.name} while it is RUNNING")
        call = self._grid.contracts.scheduler.cancel([job_id])
        sender = await self._sender_of(part.customer)
        await sender.send(call, timeout=30)

    # -- actions

    async def _act(self) -> None:
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.discard(task)
            task.result()
        for job_id, part in list(self.scene.parts.items()):
            running = self.scene.jobs[job_id].status is JobStatus.RUNNING
            printed = self.scene.printed.get(job_id, 0)
            if part.deed is Deed.CANCEL and not self._cancelled:
                if running and printed >= _CANCEL_AFTER:
                    self._cancelled = True
                    self._begin(self._cancel(job_id, part))
            elif part.deed is Deed.KILL and not self._returned:
                if running and printed and not self._killed and self._runs_alone(job_id):
                    self._kill(job_id)
                elif self.scene.jobs[job_id].status.is_final:
                    self._returned = True
                    self._begin(self._return())

    def _runs_alone(self, job_id: int) -> bool:
        """Whether the job is the only live one at its provider, so that a kill affects no other."""
        jobs = self.scene.jobs
        host = jobs[job_id].provider_id
        return not any(
            job.status.is_live and job.provider_id == host and job.id != job_id
            for job in jobs.values()
        )

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _settle_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _kill(self, job_id: int) -> None:
        """Kill only the daemon with SIGKILL; the run continues without it."""
        role = self._grid.providers[self.scene.jobs[job_id].provider_id]
        child = self._grid.services[role]
        os.kill(child.pid, signal.SIGKILL)
        self._killed = role
        run = self.scene.run_folder(job_id)
        self._orphans = processes_of(run) if run is not None else []
        pids = [process.pid for process in self._orphans]
        self._board.step(
            f"SIGKILL to {role}'s daemon (process {child.pid}) while job {job_id} is RUNNING: "
            f"its processes {pids} are orphans now"
        )

    async def _return(self) -> None:
        """Restart the killed daemon, which must end its orphaned processes; submit the late jobs."""
        if not self._killed:
            self._problems.append("the job whose daemon is to be killed ended before that")
        else:
            await self._come_back()
        await self._submit([part for part in STORY if part.late])

    async def _come_back(self) -> None:
        orphans = [process for process in self._orphans if is_alive(process)]
        if not orphans:
            self._problems.append("the orphaned run had ended before its daemon came back")
        child = await self._grid.start_service(self._killed)
        self._board.step(f"{self._killed}'s daemon comes back as process {child.pid}")
        pids = [process.pid for process in orphans]
        if not await self._within(lambda: not any(is_alive(each) for each in orphans)):
            self._problems.append(f"the orphaned processes {pids} were not ended")
            return
        self._board.step(f"{self._killed}'s daemon has ended the orphaned processes {pids}")
        if not await self._within(self._is_heard):
            self._problems.append(f"{self._killed} did not answer after it came back")

    def _is_heard(self) -> bool:
        """Whether the restarted provider has answered its challenge."""
        account = self._grid.accounts[self._killed].address
        answers = (e for e in self.scene.reader.events if isinstance(e, ProviderAnswered))
        return any(event.provider == account for event in answers)

    async def _within(self, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _RETURN_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.1)
        return True
