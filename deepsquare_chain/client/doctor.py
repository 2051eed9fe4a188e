"""Checks everything that commands need, and reports problems with hints."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.deploying import check_rules, verify_deployment
from deepsquare_chain.chain.rpc.block_time import mines_on_demand
from deepsquare_chain.chain.rpc.connection import chain_time
from deepsquare_chain.chain.transactions.fees import gas_budget, is_gas_free
from deepsquare_chain.client.accounts import balances
from deepsquare_chain.client.gateways import gateways_of
from deepsquare_chain.client.network import no_keystore, open_account, open_grid, own_address
from deepsquare_chain.credits import format_credits
from deepsquare_chain.daemon.loop import running_services
from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.observability.probe import Check
from deepsquare_chain.settings import Settings, safe_url
from deepsquare_chain.store.database import FOLDER, open_wallet_store
from deepsquare_chain.store.definitions import FolderDefinitionStore

_MAX_SKEW: Final = 30  # seconds between this clock and the chain's
#: Hint if no provider reads the definition store.
NO_READER_HINT: Final = (
    "A provider reads definitions in its own setting store. Share the folder with providers, and "
    "have their daemons running."
)
#: Hint if a provider's daemon can't start jobs.
FAULT_HINT: Final = (
    "It claims nothing until a test script runs, and tries again by itself. Look at the machine: "
    "is there a bash, a free process, free memory and disk?"
)


async def examine(settings: Settings) -> list[Check]:
    """Run all checks and return their results; nothing is changed."""
    checks: list[tuple[str, _Examine, str]] = [
        ("python", _python, ""),
        ("deployment and endpoint", _endpoint, "endpoint, chain_id, deployment"),
        ("rules", _rules, "endpoint"),
        ("contracts", _contracts, "deployment"),
        ("clock", _clock, ""),
        ("wallet", _wallet, "keystore"),
        ("password file", _password_file, "password_file"),
        ("balance", _balance, "keystore"),
        ("definition store", _store, "gateway, store"),
        ("disk", _disk, "state_dir, disk_floor"),
        ("providers here", _providers, "state_dir"),
    ]
    return [await run_check(name, check, settings, setting) for name, check, setting in checks]


_Examine = Callable[[Settings], Awaitable["str | tuple[str, str]"]]


async def run_check(name: str, check: _Examine, settings: Settings, setting: str = "") -> Check:
    """Run a check that returns a text, or a text and a hint; a GridError is a failed check."""
    try:
        result = await check(settings)
    except GridError as error:
        return Check(name, ok=False, text=error.message, hint=error.hint, setting=setting)
    text, hint = result if isinstance(result, tuple) else (result, "")
    return Check(name, ok=True, text=text, hint=hint, setting=setting)


async def _python(_: Settings) -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"


async def _endpoint(settings: Settings) -> str:
    async with open_grid(settings) as contracts:
        block = await contracts.w3.eth.block_number
        chain = contracts.deployment.chain_id
        return f"{safe_url(settings.endpoint)}: chain {chain}, block {block}"


async def _rules(settings: Settings) -> str:
    async with open_grid(settings) as contracts:
        await check_rules(contracts.w3)
    return "the chain has the Cancun rules"


async def _contracts(settings: Settings) -> str:
    async with open_grid(settings) as contracts:
        findings = await verify_deployment(contracts.w3, contracts.deployment)
    problems = [f"{finding.what}: {finding.detail}" for finding in findings if not finding.ok]
    if problems:
        raise GridError("; ".join(problems), hint="See `deepsquare contracts verify`.")
    return "code and parameters on chain are as recorded"


async def _clock(settings: Settings) -> str:
    async with open_grid(settings) as contracts:
        age = await mines_on_demand(contracts.w3)
        if age is not None:
            return (
                "can't be compared: this chain makes a block only when somebody sends, its latest "
                f"is {age} s old"
            )
        skew = round(time.time() - await chain_time(contracts.w3))
    if abs(skew) > _MAX_SKEW:
        raise GridError(
            f"the chain's latest block is {skew} s away from this machine's clock",
            hint="Does the chain make blocks, and is this machine's clock right?",
        )
    return f"within {abs(skew)} s of the chain's"


async def _wallet(settings: Settings) -> str:
    if settings.keystore is None:
        raise no_keystore()
    address = await asyncio.to_thread(own_address, settings, None)
    _private(settings.keystore)
    return f"{address} in {settings.keystore}"


async def _password_file(settings: Settings) -> str:
    if settings.password_file is None:
        return "none: the terminal is asked"
    if not settings.password_file.is_file():
        raise UsageError(
            f"there is no file {settings.password_file}",
            hint="Name the right one with --password-file, or none to be asked.",
        )
    _private(settings.password_file)
    if settings.keystore is None or not await _is_wallet(settings):
        return str(settings.password_file)
    await open_account(settings)
    return f"{settings.password_file} opens the wallet"


async def _is_wallet(settings: Settings) -> bool:
    """Return whether the wallet check succeeds, so that its failure is reported only once."""
    return (await run_check("wallet", _wallet, settings)).ok


async def _balance(settings: Settings) -> str:
    address = await asyncio.to_thread(own_address, settings, None)
    async with open_grid(settings) as contracts:
        account_balances = await balances(contracts, address)
        folder = settings.state_dir / FOLDER
        with await open_wallet_store(contracts.w3, contracts.deployment, address, folder) as store:
            budget = gas_budget(account_balances.gas, store.spent(), time.time())
        if budget.low and await is_gas_free(contracts.w3):
            budget = replace(budget, free=True)
    if budget.low:
        raise GridError(
            budget.describe(), hint="Send it some; `deepsquare credit faucet` does on a devnet."
        )
    return f"{format_credits(account_balances.credits)} credits, {budget.describe()}"


async def _store(settings: Settings) -> tuple[str, str]:
    deployment = Deployment.load(settings.deployment)
    async with gateways_of(settings, deployment, None) as gateways:
        for gateway in gateways:
            await gateway.terms()
        if gateways:
            return f"answered by {', '.join(gateway.place for gateway in gateways)}", ""
    writable = _writable(settings.store)
    readers = await asyncio.to_thread(FolderDefinitionStore(settings.store).readers)
    if not readers:
        return f"{writable}; no provider is known to read it", NO_READER_HINT
    return f"{writable}; providers that read it: {len(readers)}", ""


async def _disk(settings: Settings) -> str:
    folder = _existing(settings.state_dir)
    free = shutil.disk_usage(folder).free
    if free < settings.disk_floor * 1024**2:
        raise GridError(
            f"{free // 1024**2} MB are free in {folder}, less than the {settings.disk_floor} MB of "
            "disk_floor",
            hint="A provider claims no job there. Free some, or lower disk_floor or keep_runs_mb.",
        )
    return f"{free // 1024**2} MB free in {folder}; {_writable(settings.state_dir)}"


async def _providers(settings: Settings) -> str:
    """Check that the provider daemons of this machine can start jobs."""
    running = list(running_services(settings.state_dir, "provider"))
    faulty = [(folder, status["fault"]) for folder, status in running if status.get("fault")]
    if faulty:
        raise GridError(
            "; ".join(
                f"{folder.name} can't start jobs: {str(fault)[:300]}" for folder, fault in faulty
            ),
            hint=FAULT_HINT,
        )
    return f"{len(running)} running, each can start jobs" if running else "none is running"


def _private(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise UsageError(f"{path} is readable by other users", hint=f"chmod 600 {path}")


def _writable(folder: Path) -> str:
    existing = _existing(folder)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"{existing} can't be written to", hint="Change its rights, or the setting."
        )
    return f"{folder} can be written to"


def _existing(folder: Path) -> Path:
    ancestor = folder.absolute()
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    return ancestor
