"""A grid with a history: jobs with all final statuses, price changes, challenges and retries."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from deepsquare_chain.chain.bindings.events import JobRetried, JobSubmitted
from deepsquare_chain.chain.bindings.records import Report
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.job import JobFlags, JobStatus, Objective, Offer, Prices, Resources, Terms
from tests.support.livegrid import LiveGrid, digest

NAMES = (
    *("protein fold", "render frames", "monte carlo pi", "train resnet50", "wordcount"),
    *("climate ensemble", "genome align", "raytrace dragon", "sweep lr", "nightly tests"),
)
#: Hostile texts: markup, scripts, templates, formulas, and reversed reading direction.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "{{7*7}}${7*7}<%= 7*7 %>",
    "</textarea></title><svg onload=alert(3)>",
    "javascript:alert(4)//",
    '=HYPERLINK("http://evil.example")',
    "\u202egnp.exe\u200b\x07",
    "<a href=//evil.example>click</a>",
)
#: CPUs that each provider offers; as with a real scheduler, no more are assigned.
CPUS = {1: 64, 2: 48}
GPU_LABELS = {"site": "jura", "gpu.model": "h100", "compute.gflops": "45"}


def some_terms(chance: random.Random, name: str, **changes: object) -> Terms:
    """Return random terms of a typical job."""
    values: dict[str, object] = {
        "amount": chance.choice([1, 2, 5, 8]) * CREDIT // 2,
        "time_limit": chance.choice([300, 900, 1_800, 3_600]),
        "resources": Resources(
            tasks=chance.choice([1, 1, 2]),
            cpus_per_task=chance.choice([1, 2, 4]),
            mem_per_cpu=chance.choice([500, 1_000, 2_000]),
            gpus=chance.choice([0, 0, 0, 1]),
        ),
        "retries": chance.choice([0, 1]),
        "flags": JobFlags.NONE,
        "objective": chance.choice(list(Objective)),
        "name": name,
        "uses": "",
    } | changes
    return Terms(**values)  # type: ignore[arg-type]


class BusyGrid:
    """Creates the history of a grid; deterministic for a seed."""

    def __init__(self, grid: LiveGrid, seed: int = 7) -> None:
        self.grid = grid
        self.chance = random.Random(seed)
        self.running: dict[int, list[int]] = {1: [], 2: []}
        self.waiting: list[int] = []
        self.submitted = 0
        self._cpus: dict[int, int] = {}

    async def play(self, rounds: int = 12, jobs: int = 5, step: int = 420) -> None:
        """Submit, assign, run and end jobs in several rounds."""
        await self._dress()
        for round_number in range(rounds):
            await self._advance(self.chance.randrange(step // 2, step))
            await self.submit(jobs, customer=round_number % 2)
            await self._assign()
            await self._advance(self.chance.randrange(20, 200))
            await self._end()
            if round_number % 4 == 1:
                await self._reprice(round_number)
            if round_number % 5 == 3:
                await self._panic()
        await self._cancel_and_time_out()
        await self._leave_live_jobs()

    async def submit(self, count: int, customer: int = 0, **changes: object) -> list[int]:
        """Submit jobs of one customer, and return their IDs."""
        rows: list[tuple[Terms, Sequence[bytes]]] = []
        for _ in range(count):
            self.submitted += 1
            name = str(changes.pop("name", "") or self.chance.choice(NAMES))
            definition: Any = changes.pop("definition", digest(f"definition {self.submitted}"))
            terms = some_terms(self.chance, name, **changes)
            rows.append((terms, [bytes(definition)]))
        call = self.grid.contracts.scheduler.submit_jobs(rows)
        receipt = await self.grid.send(self.grid.customers[customer], call)
        ids = [
            submitted_id.job_id
            for submitted_id in receipt.events
            if isinstance(submitted_id, JobSubmitted)
        ]
        self.waiting += ids
        self._cpus |= {
            submitted_id: terms.resources.cpus
            for submitted_id, (terms, _) in zip(ids, rows, strict=True)
        }
        return ids

    async def _dress(self) -> None:
        registry = self.grid.contracts.registry
        first, second = self.grid.providers
        await self.grid.send(
            first, registry.set_prices(Prices(CREDIT // 4_000, CREDIT // 500, CREDIT // 10**8))
        )
        await self.grid.send(
            second, registry.set_prices(Prices(CREDIT // 2_500, CREDIT // 300, CREDIT // 10**8))
        )
        await self.grid.send(second, registry.set_labels(GPU_LABELS))
        await self.grid.send(second, registry.set_offer(Offer(CPUS[2], 200_000, 6)))

    async def _assign(self) -> None:
        scheduler = self.grid.contracts.scheduler
        selected = [job for job in self.waiting if self.chance.random() < 0.85]
        plan: dict[int, list[int]] = {1: [], 2: []}
        free = {p: CPUS[p] - sum(self._cpus[item] for item in self.running[p]) for p in CPUS}
        for job_id in selected:
            cpus = self._cpus[job_id]
            fitting = [
                p for p in CPUS if free[p] >= cpus and (await scheduler.is_eligible(job_id, p))[0]
            ]
            if fitting:
                chosen = self.chance.choice(fitting)
                free[chosen] -= cpus
                plan[chosen].append(job_id)
        plan = {provider: ids for provider, ids in plan.items() if ids}
        if not plan:
            return
        await self.grid.assign(plan)
        for provider, ids in plan.items():
            account = self.grid.providers[provider - 1]
            await self.grid.send(account, scheduler.claim(ids))
            await self._advance(5)
            await self.grid.send(account, scheduler.start(ids))
            self.running[provider] += ids
            self.waiting = [job for job in self.waiting if job not in ids]

    async def _end(self) -> None:
        """End running jobs: some finish, fail, reach their time limit, or are cancelled."""
        scheduler = self.grid.contracts.scheduler
        for provider, ids in self.running.items():
            reports: list[Report] = []
            for job_id in list(ids):
                rng = self.chance.random()
                if rng < 0.55:
                    seconds = self.chance.randrange(20, 400)
                    code = 0 if rng < 0.42 else self.chance.choice([1, 2, 137])
                    reason = "" if code == 0 else "a step failed"
                    reports.append(Report(job_id, seconds, code, digest(f"{job_id}"), reason))
                elif rng < 0.65:
                    reports.append(Report(job_id, 10**6, 124, bytes(32), "time is up"))
                elif rng < 0.72:
                    await self._cancel(job_id)
                    ids.remove(job_id)
            if reports:
                account = self.grid.providers[provider - 1]
                await self.grid.send(account, scheduler.finish(reports))
                for report in reports:
                    ids.remove(report.job_id)

    async def _cancel(self, job_id: int) -> None:
        job = await self.grid.contracts.scheduler.get_job(job_id)
        owner = next(c for c in self.grid.customers if c.address == job.customer)
        await self.grid.send(owner, self.grid.contracts.scheduler.cancel([job_id]))

    async def _reprice(self, at: int) -> None:
        registry = self.grid.contracts.registry
        price = CREDIT // (3_000 + 200 * at)
        call = registry.set_prices(Prices(price, CREDIT // 500, CREDIT // 10**8))
        await self.grid.send(self.grid.providers[at % 2], call)

    async def _panic(self) -> None:
        """Challenge providers, which answer and then panic a job."""
        scheduler = self.grid.contracts.scheduler
        for provider, ids in self.running.items():
            if not ids:
                continue
            account = self.grid.providers[provider - 1]
            await self.grid.send(self.grid.stranger, scheduler.challenge(ids[0]))
            await self.grid.send(account, scheduler.answer())
            job_id = ids.pop()
            receipt = await self.grid.send(account, scheduler.panic([job_id], "node went down"))
            self.waiting += [e.successor for e in receipt.events if isinstance(e, JobRetried)]

    async def _cancel_and_time_out(self) -> None:
        """Cancel one job while it runs, and let another reach its time limit."""
        scheduler, host = self.grid.contracts.scheduler, self.grid.providers[0]
        small = {"resources": Resources(1, 1, 500, 0), "amount": CREDIT, "time_limit": 300}
        ids = await self.submit(2, **small)
        await self.grid.assign({1: ids})
        await self.grid.send(host, scheduler.claim(ids))
        await self.grid.send(host, scheduler.start(ids))
        await self._advance(301)
        await self.grid.send(host, scheduler.finish([Report(ids[0], 10**6, 124)]))
        await self._cancel(ids[1])
        self.waiting = [job_id for job_id in self.waiting if job_id not in ids]

    async def _leave_live_jobs(self) -> None:
        """Leave one job in each live status, and one for which no provider is eligible."""
        scheduler = self.grid.contracts.scheduler
        fresh = await self.submit(4, resources=Resources(1, 1, 500, 0), amount=4 * CREDIT)
        await self.grid.assign({1: fresh[:3]})
        await self.grid.send(self.grid.providers[0], scheduler.claim(fresh[1:3]))
        await self.grid.send(self.grid.providers[0], scheduler.start(fresh[2:3]))
        await self.submit(1, resources=Resources(1, 1, 500, 0), uses="gpu.model=b200")

    async def _advance(self, seconds: int) -> None:
        await self.grid.node.rpc("evm_increaseTime", seconds)
        await self.grid.node.rpc("evm_mine")

    async def statuses(self) -> set[JobStatus]:
        """Return the statuses that occur among all jobs."""
        scheduler = self.grid.contracts.scheduler
        ids = range(1, await scheduler.job_count() + 1)
        return {job.status for job in await scheduler.get_jobs(list(ids))}
