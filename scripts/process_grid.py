"""A whole grid on a real node; each daemon is a separate process, as in production."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from eth_account import Account
from eth_account.signers.local import LocalAccount
from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.contracts import UNLIMITED, Contracts
from deepsquare_chain.chain.bindings.events import JobSubmitted
from deepsquare_chain.chain.deploying import GridParams, deploy_grid
from deepsquare_chain.chain.rpc.pool import close, connect
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.chain.wallet import import_key
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.devnet.node.base import Anvil, ChildProcess, Node
from deepsquare_chain.errors import GridError
from deepsquare_chain.executors.isolation import machine_isolation
from deepsquare_chain.job import Hardware, JobFlags, Objective, Prices, Resources, Terms
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import FolderDefinitionStore
from deepsquare_chain.workflow import Definition, Step

SMALL: Final = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=64, gpus=0)
PRICES: Final = Prices(cpu=10**12, gpu=0, mem=10**8)
COINS: Final = 10**22  # wei per account, for gas
PASSWORD: Final = "a bench has no secrets"  # noqa: S105 - keys without value


@dataclass
class ProcessGrid:
    """A grid in a folder: a node, contracts, a customer, one scheduler and several providers."""

    folder: Path
    providers: int
    confirmations: int = 1
    poll_interval: float = 0.25
    cpus: int = 64
    log_level: str = "warning"
    settings: dict[str, str] = field(
        default_factory=dict
    )  # additional environment variables of the daemons
    node: Node = field(default_factory=Anvil)
    endpoints: dict[str, str] = field(
        default_factory=dict
    )  # endpoints of roles that do not use the node directly
    websocket: bool = False
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
    def password_file(self) -> Path:
        """Password file of all wallets of this grid."""
        return self.folder / "password"

    @property
    def provider_roles(self) -> list[str]:
        return [f"p{number}" for number in range(self.providers)]

    async def __aenter__(self) -> ProcessGrid:
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
        await asyncio.gather(
            *(self.node.fund(account.address, COINS) for account in self.accounts.values())
        )
        for role, account in self.accounts.items():
            store = self.stack.enter_context(
                Store.open(None, chain_id=self.node.chain_id, contract="", account=account.address)
            )
            self.senders[role] = Sender(
                self.w3, account, store, chain_id=self.node.chain_id, poll_interval=0.1
            )
            import_key(self.keystore(role), bytes(account.key), PASSWORD, light=True)
        self.password_file.write_text(PASSWORD)
        self.password_file.chmod(0o600)
        params = GridParams(admin_delay=0, schedulers=[self.accounts["scheduler"].address])
        self.deployment = await deploy_grid(self.w3, self.senders["admin"], params)
        self.deployment.save(self.folder / "deployment.json")
        self.contracts = Contracts(self.w3, self.deployment)
        await self._fund_accounts()

    async def _fund_accounts(self) -> None:
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

    def keystore(self, role: str) -> Path:
        """Encrypted wallet of a role."""
        return self.folder / f"{role}.wallet.json"

    async def send(self, role: str, call: Any) -> Any:
        """Send a call with a role's account, and wait for its receipt."""
        return await self.senders[role].send(call)

    async def submit(self, count: int, command: str = "true", **changes: Any) -> list[int]:
        """Submit jobs with the same command in one transaction, and return their IDs."""
        definition = Definition(resources=SMALL, env={}, steps=(Step.simple("only", command),))
        digest = await self.definitions.put(definition.to_bytes())
        defaults: dict[str, Any] = {
            "amount": CREDIT,
            "time_limit": 600,
            "resources": SMALL,
            "retries": 0,
            "flags": JobFlags.NONE,
            "objective": Objective.COST,
            "name": "",
            "uses": "",
        }
        terms = Terms(**(defaults | changes))
        call = self.contracts.scheduler.submit_jobs([(terms, [digest] * count)])
        receipt = await self.send("customer", call)
        return [event.job_id for event in receipt.events if isinstance(event, JobSubmitted)]

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
        """Start a daemon as an operator does; `role@word` has a separate, empty state folder."""
        account = role.partition("@")[0]
        command = ["metascheduler" if account == "scheduler" else "provider", "run"]
        clean = {key: value for key, value in os.environ.items() if "DEEPSQUARE" not in key}
        allowances = machine_isolation().allowances
        env = {
            **{f"DEEPSQUARE_{name.upper()}": "1" for name in allowances},
            "DEEPSQUARE_ENDPOINT": self.endpoints.get(account, self.node.url),
            "DEEPSQUARE_DEPLOYMENT": str(self.folder / "deployment.json"),
            "DEEPSQUARE_STORE": str(self.folder / "definitions"),
            "DEEPSQUARE_KEYSTORE": str(self.keystore(account)),
            "DEEPSQUARE_PASSWORD_FILE": str(self.password_file),
            "DEEPSQUARE_STATE_DIR": str(self.folder / f"state-{role}"),
            "DEEPSQUARE_CONFIRMATIONS": str(self.confirmations),
            "DEEPSQUARE_POLL_INTERVAL": str(self.poll_interval),
            "DEEPSQUARE_LOG_LEVEL": self.log_level,
            "DEEPSQUARE_LOG_FORMAT": "json",
        }
        if self.websocket:
            env["DEEPSQUARE_WEBSOCKET"] = self.node.url.replace("http://", "ws://")
        with self.log(role).open("ab") as log:
            child = await ChildProcess.spawn(
                [sys.executable, "-m", "deepsquare_chain.cli", *command],
                stdout=log,
                stderr=log,
                env={**clean, **env, **self.settings},
            )
        self.services[role] = child
        return child

    async def ready(self, role: str, timeout: float = 600.0) -> None:
        """Wait for a daemon's first successful cycle."""
        deadline = time.monotonic() + timeout
        while self.status(role).get("state") != "running":
            if self.services[role].returncode is not None or time.monotonic() > deadline:
                raise GridError(f"{role} does not run", hint=self.log(role).read_text()[-2_000:])
            await asyncio.sleep(0.05)

    def status(self, role: str) -> dict[str, Any]:
        """Read the status file of a daemon; empty before its first cycle."""
        state_dir = self.state(role)
        path = state_dir / f"{state_dir.name.partition('-')[0]}.json"
        try:
            document: dict[str, Any] = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return document
