#!/usr/bin/env python3
"""Measure one provider on a real node (anvil, a block per second): throughput, overhead, load.

For each executor, the provider is measured idle and then busy with jobs that do nothing, compared
with the same jobs without a grid. With the local executor, the CPU time of a job's start is measured
by itself, with and without sandbox and control groups. With Slurm, also with a full queue. The Slurm cluster is started
by `scripts/local_slurm.sh` on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import psutil
from bench_grid import flat, work_off
from grid_measurements import Blocks, between, cpu_seconds, latency, load_of, read_timings
from process_grid import ProcessGrid

from deepsquare_chain.errors import GridError
from deepsquare_chain.executors.base import RunSpec
from deepsquare_chain.executors.cgroups import CgroupParent, find_cgroups
from deepsquare_chain.executors.isolation import machine_isolation
from deepsquare_chain.executors.launch import ForkServer, make_run
from deepsquare_chain.executors.sandbox import (
    EtcCopy,
    Isolation,
    Sandbox,
    SandboxOptions,
    probe_sandbox,
)
from deepsquare_chain.job import JobStatus, Resources

ROLE: Final = "p0"
STEPS: Final = (
    JobStatus.PENDING,
    JobStatus.META_SCHEDULED,
    JobStatus.SCHEDULED,
    JobStatus.RUNNING,
    JobStatus.FINISHED,
)
BATCH: Final = 250
#: Concurrent `sbatch` commands in the measurement without a grid; the same as a provider's.
AT_ONCE: Final = 2
#: Seconds without a new job after which a queue counts as stuck.
_STUCK: Final = 300.0
SCRIPT: Final = Path(__file__).with_name("local_slurm.sh")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Slurm cluster started by the benchmark."""

    folder: Path

    @property
    def settings(self) -> dict[str, str]:
        """Settings of a provider that runs its jobs on this cluster."""
        return {
            "DEEPSQUARE_EXECUTOR": "slurm",
            "DEEPSQUARE_EXECUTOR_OPTIONS": f"conf={self.folder}/slurm.conf",
        }

    def run(self, *arguments: str) -> str:
        """Run a Slurm command, and return its output."""
        env = {**os.environ, "SLURM_CONF": f"{self.folder}/slurm.conf"}
        return subprocess.run(
            arguments, env=env, capture_output=True, text=True, check=True, timeout=120
        ).stdout

    def queued(self) -> int:
        """Return the number of jobs that have not ended."""
        return len(self.run("squeue", "--noheader", "--format=%i").split())


@contextmanager
def slurm_cluster(cpus: int) -> Iterator[Cluster]:
    """Run a cluster of one node with this number of CPUs."""
    folder = Path(tempfile.mkdtemp(prefix="bench-slurm-"))
    size = ("--nodes", "1", "--cpus", str(cpus), "--memory", str(64 * cpus), "--gpus", "0")
    try:
        subprocess.run([str(SCRIPT), "up", str(folder), *size], check=True, capture_output=True)
        yield Cluster(folder)
    finally:
        subprocess.run([str(SCRIPT), "down", str(folder)], check=False)
        subprocess.run(["rm", "-rf", str(folder)], check=False)


async def idle(grid: ProcessGrid, seconds: float) -> dict[str, float]:
    """Measure CPU (percent of one core) and memory (MB) of the idle provider."""
    child = grid.services[ROLE]
    before = load_of(child)
    await asyncio.sleep(seconds)
    return between(before, load_of(child))


async def busy(grid: ProcessGrid, jobs: int) -> dict[str, Any]:
    """Measure throughput and cost per job with jobs that do nothing, all submitted at once."""
    child = grid.services[ROLE]
    before, cpu_before = load_of(child), cpu_seconds(grid)
    first = int(await grid.w3.eth.block_number) + 1
    async with Blocks(grid.w3).watching() as blocks:
        job_timings = await work_off(grid, jobs, lambda _: None)
    await asyncio.sleep(1)  # for the last supervisors to end
    load, after = between(before, load_of(child)), cpu_seconds(grid)
    timings = await read_timings(grid, first)
    return {
        "jobs": jobs,
        "ends": dict(Counter(max(timings.steps[job_id]).name for job_id in job_timings["ids"])),
        "latency": {
            f"{before.name}_to_{after.name}".lower(): latency(timings, blocks, before, after)
            for before, after in pairwise(STEPS)
        },
        "seconds": round(job_timings["seconds"], 1),
        "jobs_per_minute": round(60 * jobs / job_timings["seconds"], 1),
        **load,
        "provider_cpu_ms_per_job": per_job(cpu_before, after, "providers", jobs),
        "children_cpu_ms_per_job": per_job(cpu_before, after, "jobs", jobs),
    }


def per_job(
    before: Mapping[str, float], after: Mapping[str, float], process: str, jobs: int
) -> float:
    """Return the CPU milliseconds per job."""
    return round(1000 * (after[process] - before[process]) / jobs, 1)


def bare_shell(jobs: int) -> dict[str, float]:
    """Measure the same jobs as local shells, one after the other."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    for _ in range(jobs):
        subprocess.run(["/bin/bash", "-c", "true"], check=True)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "ms_per_job": round(1000 * seconds / jobs, 1),
        "cpu_ms_per_job": round(1000 * cpu / jobs, 1),
    }


def starts(jobs: int) -> dict[str, float]:
    """Measure the CPU milliseconds of supervisor, sandbox and shell for a script that does nothing.

    The time of the fork server's own start is subtracted. Only what this machine has is measured.
    """
    sandbox, cgroups = probe_sandbox().sandbox, find_cgroups(enable=False)
    kinds = {"plain": (None, CgroupParent(1, {})), "cgroups": (None, cgroups)}
    if sandbox is not None:
        kinds |= {"sandbox": (sandbox, CgroupParent(1, {})), "both": (sandbox, cgroups)}
    milliseconds = {}
    for name, parts in kinds.items():
        seconds = _cpu_of_starts(jobs + 1, *parts) - _cpu_of_starts(1, *parts)
        milliseconds[name] = round(1000 * seconds / jobs, 1)
    return milliseconds


def _cpu_of_starts(jobs: int, sandbox: Sandbox | None, cgroups: CgroupParent) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory(prefix="bench-provider-") as temporary:
        runs = Path(temporary, "runs")
        runs.mkdir()
        etc = EtcCopy(runs.with_name("etc"))
        isolation = Isolation(sandbox, SandboxOptions(), cgroups, etc=etc)
        server = ForkServer(runs)
        for number in range(jobs):
            spec = RunSpec(f"start-{number}", b"", Resources(1, 1, 512, 0), 60, {})
            supervisor = server.start(make_run(runs, spec, isolation=isolation))
            while not supervisor.ended:
                time.sleep(0.005)
            supervisor.release()
        server.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


async def bare_sbatch(cluster: Cluster, jobs: int) -> dict[str, float]:
    """Measure the same jobs submitted with sbatch, until the last one has left the queue."""
    gate, start = asyncio.Semaphore(AT_ONCE), time.monotonic()

    async def one() -> None:
        async with gate:
            await asyncio.to_thread(
                cluster.run, "sbatch", "--mem=64", "--output=/dev/null", "--wrap=true"
            )

    await asyncio.gather(*(one() for _ in range(jobs)))
    submitted = time.monotonic() - start
    while await asyncio.to_thread(cluster.queued):  # noqa: ASYNC110 - Slurm has no notifications
        await asyncio.sleep(0.2)
    seconds = time.monotonic() - start
    return {
        "jobs_per_minute": round(60 * jobs / seconds, 1),
        "ms_per_job": round(1000 * seconds / jobs, 1),
        "submission_ms_per_job": round(1000 * submitted / jobs, 1),
    }


async def full_queue(cluster: Cluster, jobs: int, confirmations: int) -> dict[str, Any]:
    """Measure with `jobs` jobs in Slurm's queue, behind a job that occupies the whole cluster."""
    cluster.run("sbatch", "--exclusive", "--output=/dev/null", "--wrap=sleep 86400")
    with tempfile.TemporaryDirectory(prefix="bench-provider-") as temporary:
        grid = ProcessGrid(
            Path(temporary), 1, confirmations, cpus=2 * jobs, settings=cluster.settings
        )
        async with grid:
            await start(grid)
            child = grid.services[ROLE]
            before, cpu_before, started_at = load_of(child), cpu_seconds(grid), time.monotonic()
            ids: list[int] = []
            while len(ids) < jobs:
                ids += await grid.submit(min(BATCH, jobs - len(ids)))
            await filled(cluster, jobs)
            seconds = time.monotonic() - started_at
            filling, after = between(before, load_of(child)), cpu_seconds(grid)
            steady = await idle(grid, 20)
            return {
                "jobs": jobs,
                "seconds_until_all_are_queued": round(seconds, 1),
                "filling": filling,
                "provider_cpu_ms_per_job": per_job(cpu_before, after, "providers", jobs),
                "children_cpu_ms_per_job": per_job(cpu_before, after, "jobs", jobs),
                "waiting": steady,
            }


async def filled(cluster: Cluster, jobs: int) -> None:
    """Wait until `jobs` jobs are queued behind the one that occupies the cluster.

    Raises:
        GridError: No new job was queued for five minutes.
    """
    queued, last_change = 0, time.monotonic()
    while queued <= jobs:
        count = await asyncio.to_thread(cluster.queued)
        if count > queued:
            queued, last_change = count, time.monotonic()
            print(f"{queued - 1} of {jobs} jobs are queued", file=sys.stderr)
        elif time.monotonic() - last_change > _STUCK:
            raise GridError(f"The queue stays at {queued - 1} of {jobs} jobs", hint="See squeue.")
        await asyncio.sleep(5)


async def start(grid: ProcessGrid) -> None:
    """Start the daemons, and wait until they are ready."""
    for role in ("scheduler", ROLE):
        await grid.start(role)
    for role in ("scheduler", ROLE):
        await grid.ready(role)


async def measure(options: argparse.Namespace, cluster: Cluster | None) -> dict[str, Any]:
    """Measure one executor, idle and busy."""
    settings = cluster.settings if cluster else {}
    with tempfile.TemporaryDirectory(prefix="bench-provider-") as temporary:
        grid = ProcessGrid(
            Path(temporary),
            1,
            options.confirmations,
            options.poll,
            cpus=options.cpus,
            settings=settings,
        )
        async with grid:
            await start(grid)
            await asyncio.sleep(3)  # for the rest of the start-up work
            return {
                "idle": await idle(grid, options.idle),
                "busy": await busy(grid, options.jobs),
            }


async def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements."""
    cpu_percent = psutil.cpu_percent(interval=3)
    results: dict[str, Any] = {
        "machine": {
            "cpus": os.cpu_count(),
            "load_average": [round(value, 1) for value in os.getloadavg()],
            "cpu_percent_before": cpu_percent,
            "python": platform.python_version(),
            "isolation": machine_isolation().words,
        }
    }
    if "local" in options.executors:
        results["local"] = {
            "start_cpu_ms": starts(options.jobs),
            **await measure(options, None),
            "bare_shell": bare_shell(options.jobs),
        }
    if "slurm" in options.executors:
        with slurm_cluster(options.cpus) as cluster:
            bare = await bare_sbatch(cluster, options.jobs)
            results["slurm"] = {**await measure(options, cluster), "bare_sbatch": bare}
            ms = 60_000 / results["slurm"]["busy"]["jobs_per_minute"]
            results["slurm"]["overhead_ms_per_job"] = round(ms - bare["ms_per_job"], 1)
    if options.queue and "slurm" in options.executors:
        # A new cluster, because jobs of this grid have the same names as those of the last one.
        with slurm_cluster(options.cpus) as cluster:
            results["slurm_queue"] = await full_queue(cluster, options.queue, options.confirmations)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--executors", nargs="+", default=["local", "slurm"])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--cpus", type=int, default=64, help="that the provider offers")
    parser.add_argument("--queue", type=int, default=5_000, help="jobs in Slurm's queue, or 0")
    parser.add_argument("--confirmations", type=int, default=1)
    parser.add_argument("--poll", type=float, default=0.25, help="seconds between idle cycles")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of watching it idle")
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    options = parser.parse_args()
    # So that SIGTERM also stops the cluster and the daemons.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = asyncio.run(bench(options))
    except GridError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for name, value in flat(results):
            print(f"{name:45} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
