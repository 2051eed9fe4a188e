#!/usr/bin/env python3
"""Soak test: run a grid, kill a random daemon every minute, and check for losses and leaks.

Jobs with all final statuses are submitted continuously. The scheduler and all providers but the last
are killed with SIGKILL and restarted; the last one runs all the time, and its memory growth is checked.
At the end, events, contract storage, databases and the number of executions must agree to the wei.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Final

import psutil
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from process_grid import PRICES, SMALL, ProcessGrid

from deepsquare_chain.chain.bindings.events import decode_logs
from deepsquare_chain.credits import CREDIT, job_rate
from deepsquare_chain.errors import GridError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.observability import configure_logging
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.store.database import Store
from tests.support.customers import is_settled
from tests.support.oracle import check_executions, check_ledger, check_provider, replay
from tests.support.rundaemon import until

#: Maximum growth of the steady daemon's memory.
MOST_GROWTH: Final = 0.05
#: Warm-up time of a daemon in seconds.
WARM: Final = 45
ENDS: Final = {
    "true": JobStatus.FINISHED,
    "sleep 2": JobStatus.FINISHED,
    "exit 3": JobStatus.FAILED,
    "sleep 500": JobStatus.CANCELLED,
    "sleep 600": JobStatus.OUT_OF_CREDITS,
}


class Soak:
    """One run: customers, kills, samples and findings."""

    def __init__(self, grid: ProcessGrid, options: argparse.Namespace) -> None:
        self.grid = grid
        self.rng = random.Random(options.seed)  # noqa: S311
        self.seconds = 60.0 * options.minutes
        self.kill_every: float = options.kill_every
        self.tally = grid.folder / "tally"
        self.tally.mkdir()
        # Jobs record their executions in this folder; their sandbox makes it writable.
        grid.settings["DEEPSQUARE_EXECUTOR_OPTIONS"] = f"writable={self.tally}"
        self.expected: dict[int, JobStatus] = {}
        self.surprises: dict[int, str] = {}
        self.kills: Counter[str] = Counter()
        self.samples: defaultdict[str, list[tuple[float, int, int]]] = defaultdict(list)
        self.findings: list[str] = []
        self.began = time.monotonic()

    @property
    def steady(self) -> str:
        """The daemon that is never killed."""
        return self.grid.provider_roles[-1]

    @property
    def passed(self) -> float:
        return time.monotonic() - self.began

    async def customers(self) -> None:
        """Submit a few jobs of one kind at a time."""
        while self.passed < self.seconds:
            command = self.rng.choice(list(ENDS))
            ending = ENDS[command]
            limit = 5 if ending is JobStatus.OUT_OF_CREDITS else 600
            mark = f'echo ran >> "{self.tally}/$DEEPSQUARE_JOB_ID"; {command}'
            amount = max(CREDIT // 100, 700 * job_rate(PRICES, SMALL))
            ids = await self.grid.submit(
                self.rng.randint(1, 4), mark, time_limit=limit, amount=amount
            )
            self.expected |= dict.fromkeys(ids, ending)
            await asyncio.sleep(self.rng.uniform(1, 4))
            if ending is JobStatus.CANCELLED:
                await self.grid.send("customer", self.grid.contracts.scheduler.cancel(ids))

    async def killer(self) -> None:
        """Kill random daemons, and restart each some seconds later."""
        victims = [role for role in self.grid.services if role != self.steady]
        while True:
            pause = self.kill_every * self.rng.uniform(0.8, 1.2)
            if self.passed + pause > self.seconds - 10:
                return
            await asyncio.sleep(pause)
            role = self.rng.choice(victims)
            child = self.grid.services[role]
            psutil.Process(child.pid).kill()
            await child.end()
            self.kills[role] += 1
            await asyncio.sleep(self.rng.uniform(0, 5))
            await self.grid.start(role)

    async def watch(self) -> None:
        """Sample memory and file descriptors of all daemons."""
        while True:
            for role, child in list(self.grid.services.items()):
                try:
                    process = psutil.Process(child.pid)
                    rss, files = process.memory_info().rss, process.num_fds()
                    self.samples[role].append((self.passed, rss, files))
                except psutil.Error:
                    continue  # just killed
            await asyncio.sleep(2)

    async def finish(self) -> None:
        """Wait for the last jobs, stop the daemons gracefully, and compare all records."""
        waiting, deadline = set(self.expected), time.monotonic() + 180
        while waiting and time.monotonic() < deadline:
            jobs = await self.grid.contracts.scheduler.get_jobs(sorted(waiting)[:400])
            waiting -= {job.id for job in jobs if job.status.is_final}
            await asyncio.sleep(0.5)
        if waiting:
            self.findings.append(f"jobs without an end: {sorted(waiting)[:20]}")
        try:
            head = await self.grid.w3.eth.block_number
            await until(lambda: self._all_applied(head), timeout=120)
        except AssertionError:
            self.findings.append("a provider did not apply the last events")
        for role, child in self.grid.services.items():
            if child.returncode is not None:
                self.findings.append(f"{role} ended by itself with {child.returncode}")
            await child.end(grace=20)
            if child.returncode != 0:
                self.findings.append(f"{role} ended with {child.returncode}")
        try:
            await self.compare()
        except AssertionError as error:
            self.findings.append(f"the ledgers disagree: {error}")
        self.findings += [
            f"process still runs: {line}" for line in remaining_processes(self.grid.folder)
        ]

    def _open_table(self, role: str) -> tuple[RunTable, Store]:
        grid = self.grid
        grid_key = {"chain_id": grid.node.chain_id, "contract": grid.deployment.scheduler}
        account = grid.accounts[role].address
        store = Store.open(grid.state(role) / "provider.db", account=account, **grid_key)
        return RunTable(store, account, **grid_key), store

    def _all_applied(self, block: int) -> bool:
        return all(is_settled(*self._open_table(role), block) for role in self.grid.provider_roles)

    async def compare(self) -> None:
        """Compare events, storage, databases and executions."""
        grid = self.grid
        logs = await grid.w3.eth.get_logs(
            {"address": grid.deployment.scheduler, "fromBlock": hex(grid.deployment.block)}
        )
        ledger = replay(decode_logs(logs))
        jobs = await grid.contracts.scheduler.get_jobs(list(ledger))
        by_id = {job.id: job for job in jobs}
        # A job that was cancelled late, or whose provider was down for long, may end differently.
        self.surprises = {
            job_id: by_id[job_id].status.name
            for job_id, ending in self.expected.items()
            if by_id[job_id].status is not ending
        }
        check_ledger(ledger, jobs)
        check_executions(
            ledger,
            {int(mark.name): len(mark.read_text().splitlines()) for mark in self.tally.iterdir()},
        )
        for role in grid.provider_roles:
            table, store = self._open_table(role)
            with store:
                account = grid.accounts[role].address
                check_provider(account, ledger, by_id, table.all(), table.earned())

    def report(self) -> dict[str, Any]:
        """Return the results of the run; memory is in MB."""
        growth = self._growth()
        return {
            "minutes": round(self.seconds / 60, 1),
            "jobs": len(self.expected),
            "kills": dict(self.kills),
            "other_ends": self.surprises,
            "watched": growth,
            "memory_mb": {
                role: round(max(sample[1] for sample in role_samples) / 2**20)
                for role, role_samples in self.samples.items()
            },
            "descriptors": {
                role: max(sample[2] for sample in role_samples)
                for role, role_samples in self.samples.items()
            },
            "load_average": [round(sample, 1) for sample in os.getloadavg()],
            "findings": self.findings,
        }

    def _growth(self) -> dict[str, Any]:
        warm = [sample for sample in self.samples[self.steady] if sample[0] > WARM]
        if len(warm) < 20:
            return {"too_short": True}
        part = max(5, len(warm) // 10)
        first, last = warm[:part], warm[-part:]
        before, after = (
            statistics.median(sample[1] for sample in samples) for samples in (first, last)
        )
        # The number of descriptors varies with runs; the minimum of a period shows leaks.
        files = tuple(min(sample[2] for sample in samples) for samples in (first, last))
        if after > before * (1 + MOST_GROWTH):
            self.findings.append(f"{self.steady} grew from {before:.0f} to {after:.0f} bytes")
        if files[1] > files[0] + 2:
            self.findings.append(f"{self.steady} kept descriptors: {files[0]} to {files[1]}")
        tenths = [
            warm[len(warm) * index // 10 : len(warm) * (index + 1) // 10] for index in range(10)
        ]
        return {
            "role": self.steady,
            # A leak grows all the time; caches stop growing.
            "tenths_mb": [
                round(statistics.median(sample[1] for sample in samples) / 2**20, 1)
                for samples in tenths
            ],
            "first_mb": round(before / 2**20, 1),
            "last_mb": round(after / 2**20, 1),
            "growth_percent": round(100 * (after / before - 1), 2),
            "descriptors": files,
        }


def remaining_processes(folder: Path) -> list[str]:
    """Return the command lines of processes that still use this folder."""
    command_lines = []
    for process in psutil.process_iter(["cmdline", "cwd", "pid"]):
        command_line = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if process.pid != os.getpid() and any(str(folder) in word for word in command_line):
            command_lines.append(" ".join(command_line)[:200])
    return command_lines


async def soak(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Run the whole soak test."""
    with tempfile.TemporaryDirectory(prefix="deepsquare-soak-") as temporary:
        async with ProcessGrid(Path(temporary), options.providers) as grid:
            run = Soak(grid, options)
            for role in ["scheduler", *grid.provider_roles]:
                await grid.start(role)
            await asyncio.gather(*(grid.ready(role) for role in list(grid.services)))
            run.began = time.monotonic()
            bar = progress.add_task("soaking", total=run.seconds)
            background_tasks = [asyncio.create_task(run.watch()), asyncio.create_task(run.killer())]
            work = asyncio.create_task(run.customers())
            while not work.done():
                progress.update(
                    bar,
                    completed=min(run.passed, run.seconds),
                    description=f"{len(run.expected)} jobs, {run.kills.total()} kills",
                )
                await asyncio.wait({work}, timeout=1)
            await work
            await background_tasks[1]
            background_tasks[0].cancel()
            progress.update(
                bar, description="waiting for the last jobs, comparing the ledgers", total=None
            )
            await run.finish()
            return run.report()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--providers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    configure_logging("error", "console")  # quiet, because stdout is JSON
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            results = asyncio.run(soak(options, progress))
    except GridError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(results, indent=2))
    return 1 if results["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
