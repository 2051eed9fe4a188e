"""Performs the demo's story on a running grid."""

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
from deepsquare_chain.demo.board import Board
from deepsquare_chain.demo.scenario import STORY, Deed, Part, problems
from deepsquare_chain.demo.tracker import DemoTracker
from deepsquare_chain.devnet.grid import COINLESS, PROVIDERS, LocalGrid
from deepsquare_chain.errors import WaitTimeoutError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.store.gateway_client import GatewayDefinitionStore
from deepsquare_chain.workflow import load_job_file


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that stand in the folder, or were started for it, without this one."""
    root = os.path.realpath(folder)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and _belongs(process, root):
                found.append(process)
    return found


def end_processes_of(folder: Path, grace: float = 3.0) -> list[int]:
    """Kill them, until none is left or `grace` seconds are over; the pids that still live."""
    doomed = processes_of(folder)
    while doomed:
        for process in doomed:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, alive = psutil.wait_procs(doomed, timeout=grace)
        if alive:
            return [process.pid for process in alive]
        # What they had started in the meantime.
        doomed = processes_of(folder)
    return []


def _belongs(process: psutil.Process, root: str) -> bool:
    if process.status() == psutil.STATUS_ZOMBIE:
        return False
    places = [*process.cmdline(), process.cwd()]
    return any(place == root or place.startswith(root + os.sep) for place in places)


def is_alive(process: psutil.Process) -> bool:
    """Whether that very process still runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


TICK: Final = 0.3  # seconds between two looks
PATIENCE: Final = 150.0  # seconds for the whole story
_RETURN_SECONDS: Final = 30.0  # for a daemon that comes back to end its orphans
_CANCEL_AFTER: Final = 2  # lines that the job prints before its customer cancels it


class DemoRunner:
    """The story as far as it has gone."""

    def __init__(self, grid: LocalGrid, board: Board, examples: Path) -> None:
        self.scene = DemoTracker(grid, board)
        self._grid = grid
        self._board = board
        self._examples = examples
        #: Requests that the customer without coin has signed.
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
        """What went otherwise than the story says."""
        scene = self.scene
        return self._problems + problems(STORY, scene.lines, scene.jobs, scene.histories)

    async def perform(self) -> None:
        """Play it to the end.

        Raises:
            WaitTimeoutError: It takes far too long.
            GridError: Something that the story needs failed.
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
            # Records are read after events: the last records may be ahead of them.
            await self.scene.look()
        finally:
            await self._settle_tasks()
            await self.scene.close()

    def _ended(self) -> bool:
        whole = len(self.scene.parts) == len(STORY)
        return whole and not self._tasks and self.scene.at_rest

    # -- customers

    async def _submit(self, parts: Sequence[Part]) -> None:
        customers = dict.fromkeys(part.customer for part in parts)
        await asyncio.gather(
            *(self._submit_for(who, [p for p in parts if p.customer == who]) for who in customers)
        )

    async def _submit_for(self, customer: str, parts: Sequence[Part]) -> None:
        permit = self._grid.accounts[customer] if len(parts) == 1 else None
        way = "with a signed permit" if permit else "in one transaction"
        if customer == COINLESS:
            way = "in one signed request: it holds credits and no coin, a relay pays the gas"
        self._board.step(f"{customer} submits {', '.join(part.name for part in parts)} {way}")
        done = await submit(
            self._grid.contracts,
            await self._sender_of(customer),
            GatewayDefinitionStore(await self.scene.gateways(customer)),
            [self._request(part) for part in parts],
            permit=permit,
        )
        await self.scene.enter(dict(zip(done.job_ids, parts, strict=True)))

    async def _sender_of(self, customer: str) -> Sender | RelayedSender:
        """Who sends for a customer: itself, or the relay for the one without coin."""
        if customer != COINLESS:
            return self._grid.senders[customer]
        if self._relayed is None:
            self._relayed = await self._grid.relayed(customer, self._show)
        return self._relayed

    def _show(self, preview: Preview) -> bool:
        """Tell what is signed; the demo's customers agree."""
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

    # -- deeds

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
        """Whether the job is the only live one at its provider: a kill concerns no other."""
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
        """SIGKILL to the daemon alone; the run goes on without it."""
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
        """Start the killed daemon again: it must end the orphans; then submit what is late."""
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
        """Whether the provider that came back has answered its challenge."""
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
