"""A deployed grid on a running node, with the accounts of its roles, customers and providers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from eth_account.signers.local import LocalAccount
from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.contracts import UNLIMITED, Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import JobSubmitted
from deepsquare_chain.chain.bindings.records import Report
from deepsquare_chain.chain.deploying import DEMO_PARAMS, GridParams, deploy_grid
from deepsquare_chain.chain.rpc.pool import close, connect
from deepsquare_chain.chain.transactions.sender import Sender, TxReceipt
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.devnet.node.base import Node, dev_accounts
from deepsquare_chain.job import Hardware, JobFlags, Objective, Prices, Resources, Terms
from deepsquare_chain.store.database import Store

HARDWARE = Hardware(nodes=4, cpus_per_node=16, mem_per_node=64_000, gpus_per_node=2)
CHEAP = Prices(cpu=10**12, gpu=10**13, mem=10**8)
DEAR = Prices(cpu=3 * 10**12, gpu=3 * 10**13, mem=3 * 10**8)
WEALTH = 10_000 * CREDIT
#: Timeouts of the demo, but with a longer lost timeout for silent providers.
PARAMS = replace(DEMO_PARAMS, timeouts=replace(DEMO_PARAMS.timeouts, lost_timeout=20))


def terms(**changes: Any) -> Terms:
    """Return the terms of a small job; `changes` replace fields."""
    defaults: dict[str, Any] = {
        "amount": CREDIT,
        "time_limit": 60,
        "resources": Resources(tasks=1, cpus_per_task=1, mem_per_cpu=100, gpus=0),
        "retries": 1,
        "flags": JobFlags.NONE,
        "objective": Objective.COST,
        "name": "a job",
        "uses": "",
    }
    return Terms(**(defaults | changes))


def digest(text: str) -> bytes:
    """Return the digest of a made-up definition."""
    return hashlib.sha256(text.encode()).digest()


class BorrowedNode(Node):
    """A node that is started and stopped elsewhere."""

    def __init__(self, url: str, chain_id: int) -> None:
        super().__init__(chain_id)
        self.url = url

    async def start(self) -> None:
        """Do nothing: the node is running."""

    async def stop(self) -> None:
        """Do nothing: its owner stops it."""


@dataclass
class LiveGrid:
    """Contracts and funded accounts; the `Sender` of an account is created on first use."""

    node: Node
    w3: AsyncWeb3[Any]
    deployment: Deployment
    senders: dict[str, Sender] = field(default_factory=dict)
    stores: list[Store] = field(default_factory=list)

    admin: LocalAccount = field(default_factory=lambda: dev_accounts()[0])
    scheduler: LocalAccount = field(default_factory=lambda: dev_accounts()[1])
    customers: tuple[LocalAccount, ...] = field(default_factory=lambda: dev_accounts()[2:4])
    providers: tuple[LocalAccount, ...] = field(default_factory=lambda: dev_accounts()[4:6])
    stranger: LocalAccount = field(default_factory=lambda: dev_accounts()[6])

    def __post_init__(self) -> None:
        self.contracts = Contracts(self.w3, self.deployment)

    def store(self, account: LocalAccount, path: Any = None) -> Store:
        """Open a database for this grid and account, in memory unless a path is given."""
        store = Store.open(
            path,
            chain_id=self.deployment.chain_id,
            contract=self.deployment.scheduler,
            account=account.address,
        )
        self.stores.append(store)
        return store

    def sender(self, account: LocalAccount, **options: Any) -> Sender:
        """Return the sender of an account; a new one if there are options."""
        if account.address not in self.senders or options:
            store = options.pop("store", None) or self.store(account)
            settings = {"poll_interval": 0.05, **options}
            self.senders[account.address] = Sender(
                self.w3, account, store, chain_id=self.deployment.chain_id, **settings
            )
        return self.senders[account.address]

    async def send(self, account: LocalAccount, call: Any, **options: Any) -> TxReceipt:
        """Send a call, and wait for its receipt."""
        return await self.sender(account).send(call, **options)

    async def submit(self, count: int = 1, customer: int = 0, **changes: Any) -> list[int]:
        """Submit jobs with the same terms, and return their IDs."""
        account = self.customers[customer]
        digests = [digest(f"{changes} {number}") for number in range(count)]
        call = self.contracts.scheduler.submit_jobs([(terms(**changes), digests)])
        receipt = await self.send(account, call)
        return [event.job_id for event in receipt.events if isinstance(event, JobSubmitted)]

    async def assign(self, groups: dict[int, list[int]]) -> TxReceipt:
        """Assign PENDING jobs, keyed by provider ID, at the current prices of the registry."""
        registered = {
            provider.id: provider for provider in await self.contracts.registry.providers()
        }
        priced = {(number, registered[number].prices): ids for number, ids in groups.items()}
        return await self.send(self.scheduler, self.contracts.scheduler.meta_schedule(priced))

    async def run(self, job_ids: list[int], provider: int = 0) -> None:
        """Assign, claim and start PENDING jobs at a provider."""
        scheduler, account = self.contracts.scheduler, self.providers[provider]
        assigned = await self.contracts.registry.provider_of(account.address)
        await self.assign({assigned.id: job_ids})
        await self.send(account, scheduler.claim(job_ids))
        await self.send(account, scheduler.start(job_ids))

    async def end_some_jobs(self) -> list[int]:
        """Run jobs to different final statuses, one stays PENDING; return their IDs."""
        scheduler = self.contracts.scheduler
        ids = await self.submit(4)
        await self.run(ids[:3])
        await self.send(self.providers[0], scheduler.finish([Report(ids[0], 1, 0)]))
        await self.send(self.customers[0], scheduler.cancel([ids[1]]))
        await self.send(self.providers[0], scheduler.panic([ids[2]], "broken"))
        return ids

    async def close(self) -> None:
        """Close connections and databases."""
        for store in self.stores:
            store.close()
        await close(self.w3)


async def deploy(node: Node, params: GridParams = PARAMS) -> Deployment:
    """Deploy a grid with two approved providers, and two customers with credits and allowance."""
    accounts = dev_accounts()
    params = GridParams(
        fee_bps=params.fee_bps,
        admin_delay=params.admin_delay,
        approval_period=params.approval_period,
        timeouts=params.timeouts,
        treasury=accounts[9].address,
        schedulers=(accounts[1].address,),
    )
    w3 = await connect(node.url, chain_id=node.chain_id)
    blank = Deployment(node.chain_id, *[accounts[0].address] * 5, block=0)
    grid = LiveGrid(node, w3, blank)
    try:
        grid.deployment = await deploy_grid(w3, grid.sender(grid.admin), params)
        grid.contracts = Contracts(w3, grid.deployment)
        registry, credit = grid.contracts.registry, grid.contracts.credit
        offers = zip(grid.providers, (CHEAP, DEAR), strict=True)
        await asyncio.gather(
            *(
                grid.send(account, registry.register(HARDWARE, prices, {"place": f"p{number}"}))
                for number, (account, prices) in enumerate(offers)
            ),
            *(
                grid.send(grid.admin, credit.mint(account.address, WEALTH))
                for account in grid.customers
            ),
            *(
                grid.send(account, credit.approve(grid.contracts.scheduler.address, UNLIMITED))
                for account in grid.customers
            ),
        )
        for account in grid.providers:
            await grid.send(grid.admin, registry.approve(account.address, 1))
    finally:
        await grid.close()
    return grid.deployment


@asynccontextmanager
async def live_grid(node: Node, deployment: Deployment | None = None) -> AsyncIterator[LiveGrid]:
    """Provide a grid on a node; deploys it if no deployment is given."""
    deployed = deployment or await deploy(node)
    grid = LiveGrid(node, await connect(node.url, chain_id=node.chain_id), deployed)
    try:
        yield grid
    finally:
        await grid.close()
