"""`devnet up`: runs a local grid until a signal, and writes the settings for other terminals."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.daemon.loop import stopped_by_signals, until_stopped
from deepsquare_chain.devnet.grid import (
    CUSTOMER_WITHOUT_COIN,
    CUSTOMERS,
    PROVIDERS,
    ROLES,
    ChainKind,
    LocalGrid,
)
from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.observability.serving import open_listener
from deepsquare_chain.settings import PROJECT_FILE

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

    Args:
        folder: Folder of its state; files of an earlier devnet are moved to a subfolder.
        chain: The embedded chain, or anvil.
        port: Port of the chain; 0 chooses a free one.
        faucet_port: Port of the faucet; 0 chooses a free one.
        explorer_port: Port of the explorer; 0 chooses a free one, None starts no explorer.
        relay_port: Port of the relay; 0 chooses a free one, None starts no relay.
        gateway_port: Port of the gateway; 0 chooses a free one.
        report: Called with the lines of output for the user.

    Raises:
        UsageError: A port is in use, another devnet runs in the folder, or the folder belongs to
            a real deployment.
    """
    path = _absolute(folder)
    with _alone(path), stopped_by_signals() as stop:
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
def _alone(folder: Path) -> Iterator[None]:
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
    leftovers = [folder / name for name in _GRID_FILES if (folder / name).exists()]
    if leftovers:
        archive = folder / f"ended-{time.strftime('%Y%m%d-%H%M%S')}"
        archive.mkdir(exist_ok=True)
        for path in leftovers:
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
    lines += ["", "In this terminal, as alice:", "  deepsquare submit examples/hello.yaml --wait"]
    if grid.relay_url:
        wallet = f"--keystore {homes[CUSTOMER_WITHOUT_COIN]}/wallet.json"
        lines += [f"  deepsquare submit examples/hello.yaml --gasless {wallet}"]
    lines += ["", "Stop it with Ctrl-C."]
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
