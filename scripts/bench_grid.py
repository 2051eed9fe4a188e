#!/usr/bin/env python3
"""Measure a whole grid on a real node (anvil, a block a second): throughput, latency, gas, load.

A customer submits jobs that do nothing, a meta-scheduler and providers, each a process of its own
as an operator runs it, bring them to their end. What the node alone can take is measured in the
same run, on the same machine, so that the figures say how much of it the grid uses.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
from eth_account import Account
from eth_account.signers.local import LocalAccount
from rich.console import Console
from rich.progress import Progress
from web3 import AsyncWeb3

from deepsquare_chain.chain.contracts import UNLIMITED, Contracts
from deepsquare_chain.chain.deploying import GridParams, deploy_grid
from deepsquare_chain.chain.events import JobSubmitted, JobTransition, decode_logs
from deepsquare_chain.chain.rpc import close, connect
from deepsquare_chain.chain.sender import Sender
from deepsquare_chain.chain.wallet import import_key
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.devnet.anvil import Anvil
from deepsquare_chain.devnet.process import ChildProcess
from deepsquare_chain.errors import GridError
from deepsquare_chain.job import Hardware, JobStatus, Objective, Prices, Resources, Terms
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import FolderDefinitionStore
from deepsquare_chain.workflow import Definition, Step

SMALL: Final = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=64, gpus=0)
PRICES: Final = Prices(cpu=10**12, gpu=0, mem=10**8)
BATCH: Final = 50
PASSWORD: Final = "a bench has no secrets"  # noqa: S105 - of keys that hold nothing


@dataclass
class Yard:
    """A grid in a folder: a node, contracts, a customer, one scheduler and some providers."""

    folder: Path
    providers: int
    confirmations: int = 1
    poll_interval: float = 0.25
    cpus: int = 64
    log_level: str = "warning"
    node: Anvil = field(default_factory=Anvil)
    services: dict[str, ChildProcess] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.roles = ["admin", "customer", "scheduler", *self.provider_roles]
        self.accounts: dict[str, LocalAccount] = {
            role: Account.from_key((number + 1).to_bytes(32, "big"))
            for number, role in enumerate(self.roles)
        }
        self.stack = contextlib.AsyncExitStack()
        self.senders: dict[str, Sender] = {}
        self.definitions = FolderDefinitionStore(self.folder / "definitions")

    @property
    def provider_roles(self) -> list[str]:
        return [f"p{number}" for number in range(self.providers)]

    async def __aenter__(self) -> Yard:
        try:
            await self._build()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(child.end() for child in self.services.values()))
        await self.stack.aclose()
        await self.node.close()

    async def _build(self) -> None:
        await self.node.start()
        self.w3: AsyncWeb3[Any] = await connect(self.node.url, chain_id=self.node.chain_id)
        self.stack.push_async_callback(close, self.w3)
        for role, account in self.accounts.items():
            await self.node.rpc("anvil_setBalance", account.address, hex(10**24))
            store = self.stack.enter_context(
                Store.open(None, chain_id=self.node.chain_id, contract="", account=account.address)
            )
            self.senders[role] = Sender(
                self.w3, account, store, chain_id=self.node.chain_id, poll_interval=0.1
            )
            import_key(self._keystore(role), bytes(account.key), PASSWORD, light=True)
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o600)
        params = GridParams(admin_delay=0, schedulers=[self.accounts["scheduler"].address])
        self.deployment = await deploy_grid(self.w3, self.senders["admin"], params)
        self.deployment.save(self.folder / "deployment.json")
        self.contracts = Contracts(self.w3, self.deployment)
        await self._settle_people()

    async def _settle_people(self) -> None:
        credit, registry = self.contracts.credit, self.contracts.registry
        memory = self.cpus * SMALL.mem_per_cpu
        hardware = Hardware(1, cpus_per_node=self.cpus, mem_per_node=memory, gpus_per_node=0)
        customer = self.accounts["customer"].address
        await asyncio.gather(
            self.send("admin", credit.mint(customer, 10**9 * CREDIT)),
            self.send("customer", credit.approve(self.deployment.scheduler, UNLIMITED)),
            *(
                self.send(role, registry.register(hardware, PRICES, {"name": role}))
                for role in self.provider_roles
            ),
        )
        await asyncio.gather(
            *(
                self.send("admin", registry.approve(self.accounts[role].address, 1))
                for role in self.provider_roles
            )
        )

    def _keystore(self, role: str) -> Path:
        return self.folder / f"{role}.wallet.json"

    async def send(self, role: str, call: Any) -> Any:
        """Send a call as somebody and wait for it."""
        return await self.senders[role].send(call)

    async def submit(self, count: int, command: str = "true", **changes: Any) -> list[int]:
        """Jobs of the same command, in one transaction; their ids."""
        made = Definition(resources=SMALL, env={}, steps=(Step("only", command),))
        digest = await self.definitions.put(made.to_bytes())
        usual: dict[str, Any] = {
            "amount": CREDIT,
            "time_limit": 600,
            "resources": SMALL,
            "retries": 0,
            "until_spent": False,
            "objective": Objective.COST,
            "name": "",
            "uses": "",
        }
        terms = Terms(**(usual | changes))
        call = self.contracts.scheduler.submit_jobs([(terms, [digest] * count)])
        receipt = await self.send("customer", call)
        return [each.job_id for each in receipt.events if isinstance(each, JobSubmitted)]

    # -- daemons

    def state(self, role: str) -> Path:
        """State folder of a daemon."""
        kind = "metascheduler" if role.startswith("scheduler") else "provider"
        account = self.accounts[role.partition("@")[0]].address[:10].lower()
        return self.folder / f"state-{role}" / f"{kind}-{account}"

    def log(self, role: str) -> Path:
        """Log of a daemon."""
        return self.folder / f"{role}.log"

    async def start(self, role: str) -> ChildProcess:
        """Run a daemon as an operator does; `role@word` has an empty state folder of its own."""
        account = role.partition("@")[0]
        words = ["metascheduler" if account == "scheduler" else "provider", "run"]
        clean = {key: value for key, value in os.environ.items() if "DEEPSQUARE" not in key}
        env = {
            "DEEPSQUARE_ENDPOINT": self.node.url,
            "DEEPSQUARE_DEPLOYMENT": str(self.folder / "deployment.json"),
            "DEEPSQUARE_STORE": str(self.folder / "definitions"),
            "DEEPSQUARE_KEYSTORE": str(self._keystore(account)),
            "DEEPSQUARE_PASSWORD_FILE": str(self.folder / "password"),
            "DEEPSQUARE_STATE_DIR": str(self.folder / f"state-{role}"),
            "DEEPSQUARE_CONFIRMATIONS": str(self.confirmations),
            "DEEPSQUARE_POLL_INTERVAL": str(self.poll_interval),
            "DEEPSQUARE_LOG_LEVEL": self.log_level,
            "DEEPSQUARE_LOG_FORMAT": "json",
        }
        with self.log(role).open("ab") as log:
            child = await ChildProcess.spawn(
                [sys.executable, "-m", "deepsquare_chain.cli", *words],
                stdout=log,
                stderr=log,
                env={**clean, **env},
            )
        self.services[role] = child
        return child

    async def ready(self, role: str, timeout: float = 600.0) -> None:
        """Wait for a daemon's first good cycle."""
        deadline = time.monotonic() + timeout
        while self.status(role).get("state") != "running":
            if self.services[role].returncode is not None or time.monotonic() > deadline:
                raise GridError(f"{role} does not run", hint=self.log(role).read_text()[-2_000:])
            await asyncio.sleep(0.05)

    def status(self, role: str) -> dict[str, Any]:
        """The status file of a daemon; empty before its first cycle."""
        place = self.state(role)
        found = place / f"{place.name.partition('-')[0]}.json"
        try:
            read: dict[str, Any] = json.loads(found.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return read


# ------------------------------------------------------------------------------ measuring


class Blocks:
    """When each block was first seen, in seconds of the monotonic clock."""

    def __init__(self, w3: AsyncWeb3[Any]) -> None:
        self._w3 = w3
        self.seen: dict[int, float] = {}

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Blocks]:
        task = asyncio.create_task(self._watch())
        try:
            yield self
        finally:
            task.cancel()

    async def _watch(self) -> None:
        last = int(await self._w3.eth.block_number)
        while True:
            head = int(await self._w3.eth.block_number)
            for number in range(last, head + 1):
                self.seen.setdefault(number, time.monotonic())
            last = head
            await asyncio.sleep(0.03)


@dataclass(frozen=True)
class Load:
    """Of one process at one moment."""

    at: float
    cpu: float
    memory: int


def load_of(child: ChildProcess) -> Load:
    """CPU seconds and resident MB of a daemon itself, without the jobs that it started."""
    process = psutil.Process(child.pid)
    times = process.cpu_times()
    return Load(time.monotonic(), times.user + times.system, process.memory_info().rss >> 20)


def between(before: Load, after: Load) -> dict[str, float]:
    """CPU in percent of one core, memory in MB."""
    share = (after.cpu - before.cpu) / max(after.at - before.at, 1e-6)
    return {"cpu_percent": round(100 * share, 1), "memory_mb": after.memory}


async def loads(yard: Yard, work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Do something and say what the daemons took meanwhile."""
    before = {role: load_of(child) for role, child in yard.services.items()}
    result = await work()
    found = {role: between(before[role], load_of(yard.services[role])) for role in before}
    providers = [found[role] for role in yard.provider_roles if role in found]
    mean = {
        key: round(statistics.fmean(each[key] for each in providers), 1)
        for key in ("cpu_percent", "memory_mb")
    }
    return result, {"scheduler": found["scheduler"], "provider_mean": mean}


async def node_limit(node: Anvil, seconds: float = 4.0) -> dict[str, float]:
    """Plain payments a second that the node takes and mines, sent in batches by eight accounts."""
    people = [Account.from_key((10_000 + number).to_bytes(32, "big")) for number in range(8)]
    for person in people:
        await node.rpc("anvil_setBalance", person.address, hex(10**24))
    queues = [_payments(node.chain_id, person, 600) for person in people]
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=node.url, timeout=60, trust_env=False) as client:

        async def pour(mine: list[str]) -> int:
            sent = 0
            while sent < len(mine) and time.monotonic() - began < seconds:
                some = mine[sent : sent + 25]
                await client.post("/", json=[_request(each) for each in some])
                sent += len(some)
            return sent

        counts = await asyncio.gather(*(pour(mine) for mine in queues))
    for person, count in zip(people, counts, strict=True):
        while int(await node.rpc("eth_getTransactionCount", person.address, "latest"), 16) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return {"transactions_per_second": round(sum(counts) / (time.monotonic() - began), 1)}


def _payments(chain_id: int, person: LocalAccount, count: int) -> list[str]:
    fields = {"type": 2, "chainId": chain_id, "to": person.address, "value": 1, "gas": 21_000}
    fields |= {"maxFeePerGas": 10**12, "maxPriorityFeePerGas": 10**9}
    signed = (person.sign_transaction({**fields, "nonce": nonce}) for nonce in range(count))
    return ["0x" + bytes(each.raw_transaction).hex() for each in signed]


def _request(raw: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": "eth_sendRawTransaction", "params": [raw]}


@dataclass
class Story:
    """What the chain says of the jobs: block of each step, transactions and gas by sender."""

    steps: dict[int, dict[JobStatus, int]]
    sent: Counter[str]
    gas: Counter[str]
    first: int
    last: int


async def read_story(yard: Yard, first: int) -> Story:
    """Everything that happened from a block on."""
    last = int(await yard.w3.eth.block_number)
    logs = await yard.w3.eth.get_logs(
        {"address": yard.deployment.scheduler, "fromBlock": hex(first), "toBlock": hex(last)}
    )
    steps: dict[int, dict[JobStatus, int]] = defaultdict(dict)
    for event in decode_logs(logs):
        if isinstance(event, JobTransition):
            steps[event.job_id][event.after] = event.block_number
    names = {account.address.lower(): role for role, account in yard.accounts.items()}
    sent: Counter[str] = Counter()
    gas: Counter[str] = Counter()
    for number in range(first, last + 1):
        for receipt in await yard.node.rpc("eth_getBlockReceipts", hex(number)):
            role = names.get(receipt["from"], "others")
            kind = "providers" if role.startswith("p") else role
            sent[kind] += 1
            gas[kind] += int(receipt["gasUsed"], 16)
    return Story(dict(steps), sent, gas, first, last)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    ordered = sorted(values)
    if not ordered:
        return {}
    at = min(len(ordered) - 1, int(0.95 * len(ordered)))
    return {"median": round(statistics.median(ordered), 1), "p95": round(ordered[at], 1)}


def latency(
    story: Story, blocks: Blocks, before: JobStatus, after: JobStatus
) -> dict[str, dict[str, float]]:
    """From one step to another, in blocks and in milliseconds between the blocks' arrivals."""
    pairs = [
        (steps[before], steps[after])
        for steps in story.steps.values()
        if before in steps and after in steps
    ]
    arrivals = [
        1_000 * (blocks.seen[late] - blocks.seen[early])
        for early, late in pairs
        if early in blocks.seen and late in blocks.seen
    ]
    return {"blocks": spread(late - early for early, late in pairs), "ms": spread(arrivals)}


# ---------------------------------------------------------------------------------- running


async def work_off(yard: Yard, jobs: int, told: Callable[[int], None]) -> dict[str, Any]:
    """Submit all jobs as fast as they are taken and wait until the last has ended."""
    began, ids = time.monotonic(), list[int]()
    while len(ids) < jobs:
        ids += await yard.submit(min(BATCH, jobs - len(ids)))
    submitted = time.monotonic() - began
    waiting = set(ids)
    while waiting:
        some = sorted(waiting)[: 8 * BATCH]
        found = await yard.contracts.scheduler.get_jobs(some)
        waiting -= {job.id for job in found if job.status.is_final}
        told(jobs - len(waiting))
        await asyncio.sleep(0.25)
    return {"submitted": submitted, "seconds": time.monotonic() - began, "ids": ids}


async def catch_up(yard: Yard, role: str) -> float:
    """Seconds from starting a daemon with an empty state folder to its first good cycle."""
    began = time.monotonic()
    await yard.start(role)
    await yard.ready(role)
    taken = time.monotonic() - began
    await yard.services.pop(role).end()
    return round(taken, 2)


async def history(yard: Yard, jobs: int, told: Callable[[int], None]) -> None:
    """Events without work: jobs that are submitted and cancelled, eight batches at a time."""
    sizes = [min(BATCH, jobs - done) for done in range(0, jobs, BATCH)]
    gate, done = asyncio.Semaphore(8), 0

    async def one(size: int) -> None:
        nonlocal done
        async with gate:
            ids = await yard.submit(size)
            await yard.send("customer", yard.contracts.scheduler.cancel(ids))
        done += size
        told(done)

    await asyncio.gather(*(one(size) for size in sizes))


async def bench(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """The whole measurement; seconds unless a name says otherwise."""
    with tempfile.TemporaryDirectory(prefix="deepsquare-bench-") as place:
        folder = Path(options.keep or place)
        async with Yard(
            folder,
            options.providers,
            options.confirmations,
            options.poll,
            options.cpus,
            options.log_level,
        ) as yard:
            return await _bench(yard, options, progress)


async def _bench(yard: Yard, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    jobs: int = options.jobs
    bar = progress.add_task("the node alone", total=None)
    limit = await node_limit(yard.node)
    progress.update(bar, description="starting daemons")
    fresh = {"scheduler": await catch_up(yard, "scheduler@empty")}
    fresh["provider"] = await catch_up(yard, "p0@empty")
    for role in ["scheduler", *yard.provider_roles]:
        await yard.start(role)
    await asyncio.gather(*(yard.ready(role) for role in list(yard.services)))
    progress.update(bar, description="idle")
    _, idle = await loads(yard, lambda: asyncio.sleep(options.idle))
    progress.update(bar, description="working off", total=jobs, completed=0)
    first = int(await yard.w3.eth.block_number) + 1
    async with Blocks(yard.w3).watching() as blocks:
        done, busy = await loads(
            yard,
            lambda: work_off(yard, jobs, lambda count: progress.update(bar, completed=count)),
        )
    story = await read_story(yard, first)
    ends = Counter(max(story.steps[job_id]).name for job_id in done["ids"])
    for role in list(yard.services):
        await yard.services.pop(role).end()
    if options.history:
        progress.update(bar, description="history", total=options.history, completed=0)
        await history(yard, options.history, lambda count: progress.update(bar, completed=count))
    progress.update(bar, description="catching up", total=None)
    late = {"scheduler": await catch_up(yard, "scheduler@late")}
    late["provider"] = await catch_up(yard, "p0@late")
    return _report(yard, options, limit, done, story, blocks) | {
        "ends": dict(ends),
        "idle": idle,
        "busy": busy,
        "catch_up": {
            "jobs": jobs + options.history,
            "seconds": late,
            "seconds_on_an_empty_grid": fresh,
        },
    }


def _report(  # noqa: PLR0917
    yard: Yard,
    options: argparse.Namespace,
    limit: Mapping[str, float],
    done: Mapping[str, Any],
    story: Story,
    blocks: Blocks,
) -> dict[str, Any]:
    jobs, seconds = options.jobs, done["seconds"]
    rate = story.sent.total() / seconds
    status = JobStatus
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "load_average": [round(each, 1) for each in os.getloadavg()],
            "python": platform.python_version(),
        },
        "jobs": jobs,
        "providers": yard.providers,
        "confirmations": yard.confirmations,
        "seconds": round(seconds, 1),
        "seconds_of_submission": round(done["submitted"], 1),
        "jobs_per_minute": round(60 * jobs / seconds, 1),
        "latency": {
            "submitted_to_claim": latency(story, blocks, status.PENDING, status.SCHEDULED),
            "submitted_to_assigned": latency(story, blocks, status.PENDING, status.META_SCHEDULED),
            "assigned_to_claim": latency(story, blocks, status.META_SCHEDULED, status.SCHEDULED),
            "claim_to_start": latency(story, blocks, status.SCHEDULED, status.RUNNING),
            "start_to_end": latency(story, blocks, status.RUNNING, status.FINISHED),
        },
        "transactions_per_job": {
            **{role: round(count / jobs, 3) for role, count in story.sent.items()},
            "all": round(story.sent.total() / jobs, 3),
        },
        "gas_per_job": {
            **{role: round(count / jobs) for role, count in story.gas.items()},
            "all": round(story.gas.total() / jobs),
        },
        "node": {
            **limit,
            "grid_transactions_per_second": round(rate, 2),
            "share_of_its_limit": round(rate / limit["transactions_per_second"], 4),
            "share_of_block_gas": round(
                story.gas.total() / (60e6 * (story.last - story.first + 1)), 4
            ),
        },
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested figures as lines."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--providers", type=int, default=4)
    parser.add_argument("--cpus", type=int, default=64, help="of each provider")
    parser.add_argument("--confirmations", type=int, default=1)
    parser.add_argument("--poll", type=float, default=0.25, help="seconds between idle cycles")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds of watching idle daemons")
    parser.add_argument("--history", type=int, default=0, help="more jobs, only for catching up")
    parser.add_argument("--log-level", default="warning", help="of the daemons")
    parser.add_argument("--keep", help="folder that keeps states and logs")
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    options = parser.parse_args()
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            found = asyncio.run(bench(options, progress))
    except GridError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in flat(found):
            print(f"{name:45} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
