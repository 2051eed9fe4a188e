"""A complete local grid in one folder: chain, contracts, wallets, providers and faucet."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from eth_account import Account
from eth_account.signers.local import LocalAccount
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.calls import Call, checked_address
from deepsquare_chain.chain.bindings.contracts import Contracts, CreditContract
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.deploying import DEMO_PARAMS, GridParams, deploy_grid
from deepsquare_chain.chain.rpc.pool import close, connect
from deepsquare_chain.chain.transactions.sender import Sender, TxReceipt
from deepsquare_chain.chain.wallet import import_key
from deepsquare_chain.client.gasless import Confirm, RelayClient, RelayedSender
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.daemon.loop import stopped_by_signals, until_stopped
from deepsquare_chain.devnet.node.base import Anvil, ChildProcess, Node, StartedContext
from deepsquare_chain.devnet.node.embedded import ChainProcess
from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.executors.isolation import MachineIsolation, machine_isolation
from deepsquare_chain.job import Hardware, Prices
from deepsquare_chain.observability.serving import (
    LOOPBACK_ONLY,
    LoopbackServer,
    open_listener,
    read_body,
    sends_json,
)
from deepsquare_chain.settings import ENV_PREFIX, PROJECT_FILE
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.gateway_client import GatewayClient, open_gateways

#: Start timeout of a service that serves a URL, in seconds.
_START_TIMEOUT: Final = 60.0
#: Environment variables removed for services without a wallet.
_SECRETS: Final = frozenset({"DEEPSQUARE_KEYSTORE", "DEEPSQUARE_PASSWORD_FILE"})
#: Seconds without activity after which a provider with jobs is challenged; short for the demo.
_CHALLENGE_AFTER_SECONDS: Final = 4
ChainKind = Literal["embedded", "anvil"]
#: Initial credits of each example customer, in credit-wei.
CUSTOMER_CREDITS: Final = 1_000 * CREDIT
#: Roles of the node's funded accounts, in the order of the accounts.
FUNDED: Final = ("admin", "treasury", "scheduler", "alpine", "jura", "alice", "relay", "faucet")
#: A customer with a new account that has credits but no coins for gas.
CUSTOMER_WITHOUT_COIN: Final = "bob"
ROLES: Final = (*FUNDED, CUSTOMER_WITHOUT_COIN)
CUSTOMERS: Final = ("alice", CUSTOMER_WITHOUT_COIN)

GAS_WEI = 10 * 10**18
CREDIT_WEI = 1_000 * CREDIT
_MAX_BODY = 1_024
_HINT = 'Send {"address": "0x..."} as application/json.'


@dataclass(frozen=True, slots=True)
class ProviderPlan:
    """A provider of the local grid; prices are in credit-wei per second."""

    hardware: Hardware
    prices: Prices
    labels: Mapping[str, str]


#: A small, cheap provider and a larger, faster, more expensive one.
PROVIDERS: Final[Mapping[str, ProviderPlan]] = {
    "alpine": ProviderPlan(
        Hardware(nodes=1, cpus_per_node=4, mem_per_node=2_048, gpus_per_node=0),
        Prices(cpu=CREDIT // 1_000, gpu=0, mem=CREDIT // 1_000_000),
        {"site": "alpine", "compute.gflops": "20", "energy.watts_per_cpu": "4"},
    ),
    "jura": ProviderPlan(
        Hardware(nodes=1, cpus_per_node=8, mem_per_node=4_096, gpus_per_node=0),
        Prices(cpu=3 * CREDIT // 1_000, gpu=0, mem=2 * CREDIT // 1_000_000),
        {"site": "jura", "compute.gflops": "45", "energy.watts_per_cpu": "9"},
    ),
}


class LocalGrid(StartedContext):
    """A local grid, used as an async context manager.

    Args:
        folder: Folder of the grid: deployment.json, wallets/, logs/, and a folder for each role
            with the files of its programs.
        chain: The embedded chain, or anvil.
        port: Port of the chain on 127.0.0.1; 0 chooses a free one.
        faucet_port: Port of the faucet; None for no faucet.
        relay_port: Port of the relay; None for no relay.
        gateway_port: Port of the gateway; 0 chooses a free one.
        provider_settings: Additional environment variables of the providers' daemons.
        report: Called with a message for each step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        chain: ChainKind = "embedded",
        port: int = 0,
        faucet_port: int | None = None,
        relay_port: int | None = None,
        gateway_port: int = 0,
        provider_settings: Mapping[str, str] | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.node: Node = Anvil(port=port) if chain == "anvil" else ChainProcess(port=port)
        self.accounts: dict[str, LocalAccount] = {}
        self.senders: dict[str, Sender] = {}
        self.services: dict[str, ChildProcess] = {}
        self.providers: dict[int, str] = {}
        #: How this machine isolates jobs; set when the grid has started.
        self.isolation = MachineIsolation("not known yet", {})
        self.faucet_url = ""
        self.explorer_url = ""
        self.relay_url = ""
        self.gateway_url = ""
        self._gateway_port = gateway_port
        self._port = port
        self._faucet_port = faucet_port
        self._relay_port = relay_port
        self._provider_settings = dict(provider_settings or {})
        self._report = report
        self._stack = contextlib.AsyncExitStack()
        self._contracts: Contracts | None = None

    # -- paths

    @property
    def deployment_file(self) -> Path:
        """Record of the deployed contracts."""
        return self.folder / "deployment.json"

    @property
    def password_file(self) -> Path:
        """Password of all keystores of this grid."""
        return self.folder / "wallets" / "password"

    def keystore(self, role: str) -> Path:
        """Encrypted wallet of a role."""
        return self.folder / "wallets" / f"{role}.json"

    def state(self, role: str) -> Path:
        """State folder of a role's services and wallet; other roles do not read it."""
        return self.folder / role / "state"

    def log(self, role: str) -> Path:
        """Log of a service."""
        return self.folder / "logs" / f"{role}.log"

    @property
    def contracts(self) -> Contracts:
        """The deployed contracts; available when the grid has started."""
        assert self._contracts is not None  # noqa: S101 - used inside the context only
        return self._contracts

    def name_of(self, address: str) -> str:
        """Return the role of an address, or the address if it has none."""
        return next(
            (role for role, account in self.accounts.items() if account.address == address), address
        )

    def environment(self, role: str) -> dict[str, str]:
        """Return the environment variables of a program that acts as a role on this grid."""
        return {
            "DEEPSQUARE_ENDPOINT": self.node.url,
            "DEEPSQUARE_DEPLOYMENT": str(self.deployment_file),
            "DEEPSQUARE_GATEWAY": self.gateway_url,
            "DEEPSQUARE_KEYSTORE": str(self.keystore(role)),
            "DEEPSQUARE_PASSWORD_FILE": str(self.password_file),
            "DEEPSQUARE_STATE_DIR": str(self.state(role or "explorer")),
            "DEEPSQUARE_CONFIRMATIONS": "0",
            "DEEPSQUARE_POLL_INTERVAL": "0.4",
            **{f"{ENV_PREFIX}{name.upper()}": "1" for name in self.isolation.allowances},
        }

    # -- services

    async def start_service(self, role: str) -> ChildProcess:
        """Start the daemon of the meta-scheduler or of a provider as a child process."""
        environment = self.environment(role)
        if role == "scheduler":
            command = ["metascheduler", "run", "--challenge-after", str(_CHALLENGE_AFTER_SECONDS)]
            return await self._spawn(role, command, environment)
        return await self._spawn(
            role, ["provider", "run"], {**environment, **self._provider_settings}
        )

    async def start_explorer(self, port: int) -> str:
        """Start the explorer as a child process without a wallet, and return its URL.

        Raises:
            UsageError: The port is in use.
            GridError: The explorer did not start.
        """
        open_listener(port).close()
        environment = self._environment_without_wallet()
        self.explorer_url = await self._serve("explorer", port, environment)
        return self.explorer_url

    async def gateways(self, role: str) -> tuple[GatewayClient, ...]:
        """Open clients of the grid's gateway with a role's wallet."""
        return await self._stack.enter_async_context(
            open_gateways([self.gateway_url], self.accounts[role], self.contracts.deployment)
        )

    def _environment_without_wallet(self) -> dict[str, str]:
        """Return the environment variables of a program without a wallet."""
        return {key: text for key, text in self.environment("").items() if key not in _SECRETS}

    async def relayed(self, role: str, confirm: Confirm) -> RelayedSender:
        """Return a sender for a role's wallet; the grid's relay pays the gas.

        `confirm` is called with the preview of each call before it is signed.
        """
        relay = await self._stack.enter_async_context(RelayClient(self.relay_url))
        return RelayedSender(
            self.contracts,
            self.accounts[role],
            self._store(role),
            relay,
            direct=self.senders[role],
            confirm=confirm,
            poll_interval=0.2,
        )

    async def _serve(self, service: str, port: int, environment: Mapping[str, str]) -> str:
        """Start an explorer, gateway or relay, and return the URL that it prints when it is ready.

        Raises:
            GridError: The service did not start within the timeout.
        """
        command = [service, "serve", "--port", str(port), "-o", "json"]
        child = await self._spawn(service, command, environment, stdout=asyncio.subprocess.PIPE)
        if not (line := await child.first_line(_START_TIMEOUT)):
            raise GridError(
                f"The {service} did not start", hint=f"See its log: {self.log(service)}"
            )
        return str(json.loads(line)["url"])

    async def _spawn(
        self,
        role: str,
        arguments: list[str],
        environment: Mapping[str, str],
        *,
        stdout: int | None = None,
    ) -> ChildProcess:
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith("DEEPSQUARE_")
        }
        self.log(role).parent.mkdir(parents=True, exist_ok=True)
        with self.log(role).open("ab") as log:
            child = await ChildProcess.spawn(
                [sys.executable, "-m", "deepsquare_chain.cli", *arguments],
                stdout=log if stdout is None else stdout,
                stderr=log,
                env={**inherited, **environment, "DEEPSQUARE_LOG_FORMAT": "json"},
            )
        self.services[role] = child
        return child

    async def end_services(self) -> None:
        """Stop all services gracefully."""
        services, self.services = self.services, {}
        await asyncio.gather(*(child.end() for child in services.values()))

    async def close(self) -> None:
        """Stop everything that was started; idempotent."""
        await self.end_services()
        await self._stack.aclose()
        await self.node.close()

    # -- start

    async def start(self) -> None:
        """Start the chain, deploy the contracts, and fund the accounts; services start on request."""
        ports = self._port, self._faucet_port or 0, self._relay_port or 0, self._gateway_port
        for port in ports:
            # Report a port in use before the chain is set up.
            if port:
                open_listener(port).close()
        self.isolation = await asyncio.to_thread(machine_isolation)
        self._report(f"isolation of jobs: {self.isolation.words}")
        self._report("starting the chain")
        _, _ = await asyncio.gather(self.node.start(), asyncio.to_thread(self._make_wallets))
        w3 = await connect(self.node.url, chain_id=self.node.chain_id)
        self._stack.push_async_callback(close, w3)
        for role in ROLES:
            self.senders[role] = self._sender(w3, role)
        self._report("deploying the contracts")
        names = {account.address: role for role, account in self.accounts.items()}
        extra = {"endpoint": self.node.url, "devnet": True, "names": names}
        deployment = await deploy_grid(
            w3, self.senders["admin"], self._params(), extra=extra, timeout=60
        )
        self._contracts = Contracts(w3, deployment)
        if self._faucet_port is not None:
            await self._serve_faucet(self._faucet_port)
            deployment = _with(deployment, faucet=self.faucet_url)
        self._report("funding customers, registering and approving providers")
        await asyncio.gather(
            *(self._mint(role) for role in CUSTOMERS), *(self._register(role) for role in PROVIDERS)
        )
        for number, role in enumerate(PROVIDERS, start=1):
            await self._approve(role)
            self.providers[number] = role
        # The record is written last, so that it exists only for a working grid.
        deployment.save(self.deployment_file)
        self._report("starting the gateway")
        environment = self._environment_without_wallet()
        environment["DEEPSQUARE_STATE_DIR"] = str(self.state("gateway"))
        self.gateway_url = await self._serve("gateway", self._gateway_port, environment)
        deployment = _with(deployment, gateway=self.gateway_url)
        deployment.save(self.deployment_file)
        if self._relay_port is not None:
            self._report("starting the relay")
            self.relay_url = await self._serve("relay", self._relay_port, self.environment("relay"))
            deployment = _with(deployment, relay=self.relay_url)
            deployment.save(self.deployment_file)

    def _make_wallets(self) -> None:
        """Write encrypted keystores of all accounts, with one random password."""
        self.password_file.parent.mkdir(parents=True, mode=0o700)
        password = secrets.token_urlsafe(24)
        handle = os.open(self.password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(password + "\n")
        self.accounts = dict(zip(FUNDED, self.node.accounts, strict=False))
        self.accounts[CUSTOMER_WITHOUT_COIN] = Account.from_key(secrets.token_bytes(32))
        for role, account in self.accounts.items():
            import_key(self.keystore(role), bytes(account.key), password, light=True)

    def _sender(self, w3: AsyncWeb3[Any], role: str) -> Sender:
        """Return a sender that keeps no state: no other process uses the wallet meanwhile."""
        account, store = self.accounts[role], self._store(role)
        return Sender(w3, account, store, chain_id=self.node.chain_id, poll_interval=0.1)

    def _store(self, role: str) -> Store:
        """Open an in-memory database for a role's wallet."""
        address = self.accounts[role].address
        store = Store.open(None, chain_id=self.node.chain_id, contract="", account=address)
        self._stack.callback(store.close)
        return store

    def _params(self) -> GridParams:
        addresses = {role: account.address for role, account in self.accounts.items()}
        return dataclasses.replace(
            DEMO_PARAMS,
            treasury=addresses["treasury"],
            schedulers=(addresses["scheduler"],),
            minters=(addresses["admin"], addresses["faucet"]),
        )

    async def _mint(self, role: str) -> None:
        call = self.contracts.credit.mint(self.accounts[role].address, CUSTOMER_CREDITS)
        await self.senders["admin"].send(call, timeout=60)

    async def _register(self, role: str) -> None:
        plan = PROVIDERS[role]
        call = self.contracts.registry.register(plan.hardware, plan.prices, plan.labels)
        await self.senders[role].send(call, timeout=60)

    async def _approve(self, role: str) -> None:
        """Approve a provider. Call it sequentially: the first approval assigns the provider ID."""
        call = self.contracts.registry.approve(self.accounts[role].address, 1)
        await self.senders["admin"].send(call, timeout=60)

    async def _serve_faucet(self, port: int) -> None:
        faucet = Faucet(self.senders["faucet"], self.contracts.credit)
        server = LoopbackServer(faucet_app(faucet), port)
        await server.start()
        self._stack.push_async_callback(server.stop)
        self.faucet_url = server.url


def _with(deployment: Deployment, **extra: str) -> Deployment:
    """Return a copy of a record with additional fields."""
    return dataclasses.replace(deployment, extra={**deployment.extra, **extra})


class FaucetLimitError(GridError):
    """The address was paid within the interval."""


@dataclass(frozen=True, slots=True)
class FaucetPayment:
    """One payment; amounts in wei and credit-wei."""

    address: str
    gas_wei: int
    credit_wei: int
    transactions: tuple[str, ...]

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON form; amounts are strings, as everywhere in JSON."""
        return {
            "address": self.address,
            "gas_wei": str(self.gas_wei),
            "credit_wei": str(self.credit_wei),
            "transactions": list(self.transactions),
        }


class Faucet:
    """Pays each address at most once per ``interval`` seconds.

    If one of the two transactions fails, the next request for the address sends only that one: the
    idempotency keys of an incomplete payment are used again.
    """

    def __init__(
        self,
        sender: Sender,
        credit: CreditContract,
        *,
        gas_wei: int = GAS_WEI,
        credit_wei: int = CREDIT_WEI,
        interval: float = 10.0,
    ) -> None:
        self._sender = sender
        self._credit = credit
        self._gas_wei = gas_wei
        self._credit_wei = credit_wei
        self._interval = interval
        self._paid: dict[str, float] = {}
        self._incomplete: dict[str, str] = {}

    async def pay(self, address: str) -> FaucetPayment:
        """Send gas and credits; return when both transactions are mined.

        Raises:
            UsageError: The text is not an address.
            FaucetLimitError: The address was paid within the interval.
            GridError: The sender failed.
        """
        receiver = checked_address(address)
        self._check_interval(receiver)
        payment = self._incomplete.setdefault(receiver, secrets.token_hex(8))
        gas = Call(receiver, b"", f"gas for {receiver}", self._gas_wei)
        mint = self._credit.mint(receiver, self._credit_wei)
        try:
            # Both are awaited, so that neither is still being sent when a retry begins.
            results = await asyncio.gather(
                self._sender.send(gas, key=f"gas {payment}"),
                self._sender.send(mint, key=f"credits {payment}"),
                return_exceptions=True,
            )
            hashes = tuple(_receipt(result).hash for result in results)
        except BaseException:
            self._paid.pop(receiver, None)  # allow an immediate retry
            raise
        del self._incomplete[receiver]
        return FaucetPayment(receiver, self._gas_wei, self._credit_wei, hashes)

    def _check_interval(self, receiver: str) -> None:
        now = time.monotonic()
        self._paid = {
            address: paid_at
            for address, paid_at in self._paid.items()
            if now - paid_at < self._interval
        }
        if receiver in self._paid:
            raise FaucetLimitError(
                f"The faucet has recently paid {receiver}.",
                hint=f"Try again in {self._interval:.0f} seconds.",
            )
        self._paid[receiver] = now


def _receipt(result: TxReceipt | BaseException) -> TxReceipt:
    if isinstance(result, BaseException):
        raise result
    return result


def faucet_app(faucet: Faucet) -> Starlette:
    """Return the HTTP application of the faucet, for ``LoopbackServer``."""

    async def pay(request: Request) -> Response:
        try:
            return JSONResponse((await faucet.pay(await _address(request))).to_wire())
        except GridError as error:
            status = 400 if isinstance(error, UsageError) else 503
            if isinstance(error, FaucetLimitError):
                status = 429
            return JSONResponse({"error": error.message, "hint": error.hint}, status)

    return Starlette(routes=[Route("/", pay, methods=["POST"])], middleware=[LOOPBACK_ONLY])


async def _address(request: Request) -> str:
    body = await read_body(request, _MAX_BODY) if sends_json(request) else None
    try:
        document = from_json(body or b"")
    except ValueError:
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("address"), str):
        raise UsageError("The request has no address.", hint=_HINT)
    return str(document["address"])


_PROVIDER_OPTIONS: Final = "\n[executor_options]\nnamespaces = true\n"
_HEADER: Final = "# Written by `deepsquare devnet up`; replaced at its next start."
#: Roles whose programs users run by hand, each from its own folder.
_USER_ROLES: Final = ("scheduler", *PROVIDERS, *CUSTOMERS)
_GRID_FILES: Final = (
    *("deployment.json", "definitions", "wallets", "state", "logs"),
    *("admin", "explorer", "gateway", "relay", *_USER_ROLES),
)


async def run_devnet(
    folder: Path,
    *,
    chain: ChainKind,
    port: int,
    faucet_port: int,
    explorer_port: int | None,
    relay_port: int | None,
    gateway_port: int,
    report: Callable[[str], None],
) -> None:
    """Run a grid in a folder until SIGINT or SIGTERM.

    Arguments are those of `LocalGrid`; with `explorer_port` None no explorer is started.

    Raises:
        UsageError: A port is in use, another devnet runs in the folder, or the folder belongs to
            a real deployment.
    """
    path = _absolute(folder)
    with _locked(path), stopped_by_signals() as stop:
        _archive_old_files(path)
        grid = LocalGrid(
            path,
            chain=chain,
            port=port,
            faucet_port=faucet_port,
            relay_port=relay_port,
            gateway_port=gateway_port,
            report=report,
        )
        if await until_stopped(stop, asyncio.create_task(_serve(grid, explorer_port, report))):
            report("Stopped: the chain and its state are gone.")


async def _serve(grid: LocalGrid, explorer_port: int | None, report: Callable[[str], None]) -> None:
    if explorer_port:
        open_listener(explorer_port).close()  # reports a port in use before the chain is set up
    async with grid:
        if explorer_port is not None:
            report("starting the explorer")
            await grid.start_explorer(explorer_port)
        _create_role_folders(grid)
        for line in _overview(grid, _write_settings(grid)):
            report(line)
        while True:
            await asyncio.sleep(2.0)
            await grid.node.rpc("eth_blockNumber")  # raises if the chain has stopped


def _absolute(folder: Path) -> Path:
    return Path(os.path.abspath(folder))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "devnet.lock").open("ab")
    except OSError as error:
        raise UsageError(f"{folder} can't be used: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"A devnet is already running in {folder}",
                hint="Stop it, or give another --folder.",
            ) from None
        yield


def _archive_old_files(folder: Path) -> None:
    """Move the files of an earlier devnet to a subfolder: they belong to a chain that is gone."""
    record = folder / "deployment.json"
    if record.exists() and not Deployment.load(record).extra.get("devnet"):
        raise UsageError(
            f"{record} is the record of a deployment that is not a devnet",
            hint="Give another --folder, to keep this record.",
        )
    old_files = [folder / name for name in _GRID_FILES if (folder / name).exists()]
    if old_files:
        archive = folder / f"ended-{time.strftime('%Y%m%d-%H%M%S')}"
        archive.mkdir(exist_ok=True)
        for path in old_files:
            shutil.move(path, archive / path.name)


def _create_role_folders(grid: LocalGrid) -> None:
    """Create a folder with wallet, password and settings for each role that users run by hand.

    Roles do not read each other's folders: they communicate through the chain and the gateway.
    """
    for role in _USER_ROLES:
        home = grid.folder / role
        try:
            home.mkdir(mode=0o700, exist_ok=True)
            for name, source in {
                "wallet.json": grid.keystore(role),
                "password": grid.password_file,
                "deployment.json": grid.deployment_file,
            }.items():
                shutil.copy(source, home / name)
            # Jobs on a devnet are those of its user: containers and networks of steps may run.
            options = _PROVIDER_OPTIONS if role in PROVIDERS else ""
            (home / PROJECT_FILE).write_text(_settings(grid, home) + options)
        except OSError as error:
            raise GridError(f"{home} can't be written: {error.strerror}") from None


def _settings(grid: LocalGrid, home: Path) -> str:
    """Return the settings file of a role: addresses of the grid and paths of the role's files."""
    values = {
        "endpoint": grid.node.url,
        "deployment": str(home / "deployment.json"),
        "gateway": grid.gateway_url,
        "keystore": str(home / "wallet.json"),
        "password_file": str(home / "password"),
        "state_dir": str(home / "state"),
    }
    lines = [f"{key} = {_quoted(value)}" for key, value in values.items()]
    # Providers need these on machines without isolation, or as root.
    lines += [f"{key} = true" for key in grid.isolation.allowances]
    return "\n".join([_HEADER, *lines, "confirmations = 0", "poll_interval = 0.5", ""])


def _write_settings(grid: LocalGrid) -> Path | None:
    """Write `.deepsquare.toml` for alice to the working folder, unless the user has one there."""
    path = Path.cwd() / PROJECT_FILE
    if path.exists() and not path.read_text(errors="replace").startswith(_HEADER):
        return None
    try:
        path.write_text(_settings(grid, grid.folder / "alice"))
    except OSError as error:
        raise GridError(f"{path} can't be written: {error.strerror}") from None
    return path


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _overview(grid: LocalGrid, settings: Path | None) -> list[str]:
    """Return the lines that list all services and the next commands."""
    wallets = os.path.relpath(grid.folder / "wallets")
    lines = [
        "",
        f"chain       {grid.node.url} (chain {grid.node.chain_id}, process {grid.node.pid})",
        f"faucet      {grid.faucet_url}",
        *([f"explorer    {grid.explorer_url}"] if grid.explorer_url else []),
        f"gateway     {grid.gateway_url}",
        *([f"relay       {grid.relay_url}"] if grid.relay_url else []),
        f"deployment  {os.path.relpath(grid.deployment_file)}",
        f"isolation   {grid.isolation.words}",
        f"wallets     {wallets}/, password in {wallets}/password",
    ]
    lines += [
        f"            {role:<10} {grid.accounts[role].address} {_role_note(role)}" for role in ROLES
    ]
    if settings is None:
        lines += [
            "",
            f"{PROJECT_FILE} here was not written by a devnet and is not changed; set these variables instead:",
        ]
        variables = grid.environment("alice").items()
        lines += [f"  export {key}={shlex.quote(value)}" for key, value in variables]
    else:
        lines += [
            "",
            f"{os.path.relpath(settings)} makes commands in this folder use alice's wallet.",
        ]
    homes = {role: os.path.relpath(grid.folder / role) for role in _USER_ROLES}
    lines += ["", "In other terminals, one folder each:"]
    lines += [f"  cd {homes['scheduler']} && deepsquare metascheduler run"]
    lines += [f"  cd {homes[role]} && deepsquare provider run" for role in PROVIDERS]
    lines += ["", "In another one, in this folder, as alice:"]
    job = Path("examples/hello.yaml")
    if not job.is_file():  # not in a checkout
        job = Path("job.yaml")
        lines += [f"  deepsquare init {job}"] * (not job.exists())
    lines += [f"  deepsquare submit {job} --wait"]
    if grid.relay_url:
        wallet = f"--keystore {homes[CUSTOMER_WITHOUT_COIN]}/wallet.json"
        lines += [f"  deepsquare submit {job} --gasless {wallet}"]
    # Programs that start a devnet wait for this line: it stays as it is.
    lines += ["", "Ctrl-C ends it."]
    return lines


def _role_note(role: str) -> str:
    if role in CUSTOMERS:
        return "customer without coin" if role == CUSTOMER_WITHOUT_COIN else "customer"
    if role in PROVIDERS:
        hardware = PROVIDERS[role].hardware
        return f"provider of {hardware.nodes * hardware.cpus_per_node} CPUs"
    notes = {
        "admin": "administrator, approver, minter",
        "scheduler": "meta-scheduler",
        "relay": "pays the gas of --gasless",
    }
    return notes.get(role, "")
