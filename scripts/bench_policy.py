#!/usr/bin/env python3
"""Measure one decision of the policy: jobs x providers x load of the grid.

A grid of heterogeneous providers has running jobs up to a share of its CPUs, and a queue of jobs
with mixed sizes, limits, objectives, budgets and requirements. Tables are kept between cycles, as in
the service: before each measured decision, new jobs arrive, runs end, and the run history is updated.
`first_milliseconds` is a decision without kept tables, as after a start or a change of the registry.
Memory is the growth of the process by snapshot, tables and plan.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from deepsquare_chain.credits import CREDIT
from deepsquare_chain.job import (
    Hardware,
    Job,
    JobFlags,
    JobStatus,
    Objective,
    Offer,
    Prices,
    Provider,
    ProviderStatus,
    Resources,
)
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting
from deepsquare_chain.metascheduler.history import FinishedRun, RunHistory
from deepsquare_chain.metascheduler.policy import Planner, Rules, Snapshot

NOW = 1_800_000_000
LIMITS = (300, 600, 900, 1_800, 3_600, 7_200, 14_400, 43_200, 86_400)
SIZES = (1, 1, 1, 2, 2, 4, 4, 8, 8, 12, 16, 16, 24, 32, 48, 64)
CASES = (
    *((10_000, 1_000, busy) for busy in (0.0, 0.75, 0.95)),
    *((100_000, 1_000, busy) for busy in (0.0, 0.75, 0.95)),
)


@dataclass(frozen=True)
class Measured:
    """The result of one case.

    Milliseconds are medians over the decisions, of wall time and of CPU time; memory is in MB.
    """

    jobs: int
    providers: int
    busy: float
    milliseconds: float
    cpu_milliseconds: float
    slowest_milliseconds: float
    first_milliseconds: float
    memory_mb: float
    decisions: int


def grid(count: int, rng: random.Random) -> list[ProviderView]:
    """Return providers with 32 to 1024 CPUs, a quarter of them with GPUs."""
    views = []
    for number in range(1, count + 1):
        nodes, per_node = rng.choice((1, 2, 4, 8, 16)), rng.choice((32, 64))
        gpus = rng.choice((0, 0, 0, 4))
        speed = rng.uniform(0.7, 1.6)
        price = int(CREDIT / 3_600 * speed * rng.uniform(0.7, 1.3))
        memory = per_node * rng.choice((2_000, 4_000, 8_000))
        labels = {
            "cpu.speed": f"{speed:.3f}",
            "energy.watts_per_cpu": f"{10 * speed * rng.uniform(0.6, 1.4):.2f}",
            "region": rng.choice(("ch", "eu", "us")),
        }
        provider = Provider(
            id=number,
            account=f"0x{number:040x}",
            status=ProviderStatus.ACTIVE,
            approved_until=NOW + 10**8,
            version=1,
            pending_version=1,
            hardware=Hardware(nodes, per_node, memory, gpus),
            offer=Offer(nodes * per_node, nodes * memory, nodes * gpus),
            prices=Prices(price, 20 * price, 0),
            labels=labels,
        )
        views.append(ProviderView(provider))
    return views


def job(number: int, rng: random.Random) -> Job:
    """Return a PENDING job of one of 500 customers."""
    size = rng.choice(SIZES)
    gpus = rng.choice((0, 0, 0, 0, 0, 0, 0, 1, 2, 4))
    limit = rng.choice(LIMITS)
    budget = int(CREDIT / 3_600 * (size * 2 + gpus * 45) * rng.choice((0.5, 1, 1, 1, 2))) * limit
    return Job(
        id=number,
        customer=f"0x{1 + int(500 * rng.random() ** 2):040x}",
        status=JobStatus.PENDING,
        since=NOW - rng.randrange(3_600),
        provider_id=0,
        resources=Resources(size, 1, rng.choice((500, 1_000, 2_000)), gpus),
        retries_left=0,
        flags=JobFlags.NONE,
        escrow=max(budget, 1),
        rate=0,
        time_limit=limit,
        fee_bps=0,
        definition=b"",
        retry_of=0,
    )


def waiting(number: int, rng: random.Random) -> Waiting:
    record = job(number, rng)
    uses = rng.choice(("", "", "", "", "", "region=ch", "region:in:ch|eu", "cpu.speed>=1.2"))
    return Waiting(record, rng.choice(tuple(Objective)), uses, record.since)


def assigned(views: list[ProviderView], busy: float, first: int, rng: random.Random) -> list[Job]:
    """Return running jobs on every provider, up to a share of its CPUs."""
    running = []
    for view in views:
        free_cpus = int(view.provider.offer.cpus * busy)
        while free_cpus > 0:
            record = job(first + len(running), rng)
            cpus = min(record.resources.cpus, free_cpus)
            free_cpus -= cpus
            running.append(
                replace(
                    record,
                    status=JobStatus.RUNNING,
                    resources=Resources(cpus, 1, 500, 0),
                    since=NOW - rng.randrange(record.time_limit),
                    provider_id=view.provider.id,
                    rate=1,
                )
            )
    return running


def measure(jobs: int, providers: int, busy: float, cycles: int) -> Measured:
    rng = random.Random(f"{jobs} {providers} {busy}")  # noqa: S311 - the same in every run
    gc.collect()
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    views = tuple(grid(providers, rng))
    queue = {n: waiting(n, rng) for n in range(1, jobs + 1)}
    running = {candidate.id: candidate for candidate in assigned(list(views), busy, 10**6, rng)}
    history = RunHistory()
    for candidate in list(queue.values())[:20_000]:
        record_run(history, candidate.job, rng)
    planner, rules, times, cpu_times = Planner(), Rules(), [], []
    fresh = 10**7
    count = first = 0
    for cycle in range(cycles + 1):
        now = NOW + cycle
        snapshot = Snapshot(now, views, tuple(queue.values()), tuple(running.values()))
        start, cpu_start = time.perf_counter(), time.process_time()
        plan = planner.plan(snapshot, rules, history)
        times.append((time.perf_counter() - start) * 1_000)
        cpu_times.append((time.process_time() - cpu_start) * 1_000)
        count = max(count, len(plan.decisions))
        if cycle == 0:
            first, _ = times.pop(), cpu_times.pop()
        # 0.1 % of all jobs change, as from block to block.
        for number in rng.sample(sorted(queue), max(1, jobs // 1_000)):
            del queue[number]
            fresh += 1
            queue[fresh] = waiting(fresh, rng)
        for number in rng.sample(sorted(running), len(running) // 1_000):
            record_run(history, running.pop(number), rng)
    memory = (process.memory_info().rss - before) / 2**20
    return Measured(
        jobs,
        providers,
        busy,
        round(statistics.median(times), 1),
        round(statistics.median(cpu_times), 1),
        round(max(times), 1),
        round(first, 1),
        round(memory, 1),
        count,
    )


def record_run(history: RunHistory, job: Job, rng: random.Random) -> None:
    size = job.resources
    seconds = job.time_limit * rng.random()
    history.record(FinishedRun(job.customer, size.cpus, size.gpus, job.time_limit, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--cycles", type=int, default=7, help="decisions measured of each case")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for jobs, providers, busy in CASES:
        row = measure(jobs, providers, busy, options.cycles)
        rows.append(asdict(row))
        if not options.json:
            print(
                f"{row.jobs:7} jobs x {row.providers} providers, {row.busy:4.0%} busy: "
                f"{row.milliseconds:7.1f} ms (CPU {row.cpu_milliseconds:.1f}, slowest {row.slowest_milliseconds:.1f}, first "
                f"{row.first_milliseconds:.1f}), {row.memory_mb:6.1f} MB, "
                f"{row.decisions} jobs assigned"
            )
    if options.json:
        print(json.dumps({"decisions": rows}, indent=1))


if __name__ == "__main__":
    main()
