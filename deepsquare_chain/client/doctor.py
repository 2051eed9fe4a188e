"""Checks everything that commands need, and reports problems with hints."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.deploying import check_rules, verify_deployment
from deepsquare_chain.chain.rpc.heads import mines_on_demand
from deepsquare_chain.chain.rpc.pool import chain_time
from deepsquare_chain.chain.transactions.fees import gas_budget, is_gas_free
from deepsquare_chain.client.accounts import balances
from deepsquare_chain.client.deploy import connect
from deepsquare_chain.client.gateways import gateways_of
from deepsquare_chain.client.jobs import newest
from deepsquare_chain.client.network import find_own_address, no_keystore, open_account, open_grid
from deepsquare_chain.client.registration import machine
from deepsquare_chain.credits import credit_count
from deepsquare_chain.daemon.loop import read_status, running_services, service_folder
from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.job import DAY, JobStatus, Provider, ProviderStatus
from deepsquare_chain.observability.metrics import Check
from deepsquare_chain.settings import Settings, safe_url
from deepsquare_chain.store.database import FOLDER, open_wallet_store
from deepsquare_chain.store.definitions import FolderDefinitionStore
from deepsquare_chain.store.gateway_client import gateway_urls

_MAX_SKEW: Final = 30  # seconds between this clock and the chain's
#: Hint if no provider reads the definition store.
NO_READER_HINT: Final = (
    "A provider reads definitions in its own setting store. Share the folder with providers, and "
    "have their daemons running."
)
#: Hint if a provider's daemon can't start jobs.
FAULT_HINT: Final = (
    "It claims no job until a test script runs, and retries automatically. Check that the machine has "
    "bash, free processes, memory and disk."
)


async def examine(settings: Settings) -> list[Check]:
    """Run all checks and return their results; nothing is changed."""
    checks: list[tuple[str, _Examine, str]] = [
        ("python", _python, ""),
        ("deployment and endpoint", _endpoint, "endpoint, chain_id, deployment"),
        ("rules", _rules, "endpoint"),
        ("contracts", _contracts, "deployment"),
        ("clock", _clock, ""),
        ("wallet", _wallet, "keystore, signer"),
        ("password file", _password_file, "password_file"),
        ("balance", _balance, "keystore"),
        ("definition store", _store, "gateway, store"),
        ("disk", _disk, "state_dir, disk_floor"),
        ("local providers", _providers, "state_dir"),
    ]
    return [await run_check(name, check, settings, setting) for name, check, setting in checks]


_Examine = Callable[[Settings], Awaitable["str | tuple[str, str]"]]


async def run_check(name: str, check: _Examine, settings: Settings, setting: str = "") -> Check:
    """Run a check that returns a text, or a text and a hint; a GridError is a failed check."""
    try:
        result = await check(settings)
    except GridError as error:
        return failed_check(name, error, setting)
    text, hint = result if isinstance(result, tuple) else (result, "")
    return Check(name, ok=True, text=text, hint=hint, setting=setting)


def failed_check(name: str, error: GridError, setting: str) -> Check:
    """Return the failed check of an error."""
    return Check(name, ok=False, text=error.message, hint=error.hint, setting=setting)


async def _python(_: Settings) -> str:
    return platform.python_version()


async def _endpoint(settings: Settings) -> str:
    async with open_grid(settings) as contracts:
        block = await contracts.w3.eth.block_number
        chain = contracts.deployment.chain_id
        return f"{safe_url(settings.endpoint)}: chain {chain}, block {block}"


async def _rules(settings: Settings) -> str:
    # Without a deployment, so that a chain can be checked before anything is deployed.
    async with connect(settings) as w3:
        await check_rules(w3)
    return "the chain has the Cancun rules"


async def _contracts(settings: Settings) -> str:
    async with open_grid(settings) as contracts:
        findings = await verify_deployment(contracts.w3, contracts.deployment)
    problems = [f"{finding.subject}: {finding.detail}" for finding in findings if not finding.ok]
    if problems:
        raise GridError("; ".join(problems), hint="See `deepsquare contracts verify`.")
    return "code and parameters on chain match the record"


async def _clock(settings: Settings) -> str:
    async with open_grid(settings) as contracts:
        age = await mines_on_demand(contracts.w3)
        if age is not None:
            return f"can't be compared: this chain mines on demand, its latest block is {age} s old"
        skew = round(time.time() - await chain_time(contracts.w3))
    if abs(skew) > _MAX_SKEW:
        raise GridError(
            f"the time of the latest block differs by {skew} s from this machine's clock",
            hint="Check that the chain makes blocks, and this machine's clock.",
        )
    return f"within {abs(skew)} s of the chain's"


async def _wallet(settings: Settings) -> str:
    if settings.signer:
        account = await open_account(settings)
        return f"{account.address} at the signer {safe_url(settings.signer)}"
    if settings.keystore is None:
        raise no_keystore()
    address = await find_own_address(settings, None)
    _private(settings.keystore)
    return f"{address} in {settings.keystore}"


async def _password_file(settings: Settings) -> str:
    if settings.signer:
        return "not needed: the signer holds the key"
    if settings.password_file is None:
        return "none: the password is prompted for"
    if not settings.password_file.is_file():
        raise UsageError(
            f"there is no file {settings.password_file}",
            hint="Give the right one with --password-file, or none to be prompted.",
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
    address = await find_own_address(settings, None)
    async with open_grid(settings) as contracts:
        account_balances = await balances(contracts, address)
        folder = settings.state_dir / FOLDER
        with await open_wallet_store(contracts.w3, contracts.deployment, address, folder) as store:
            budget = gas_budget(account_balances.gas, store.spent(), time.time())
        if budget.low and await is_gas_free(contracts.w3):
            budget = replace(budget, free=True)
    if budget.low:
        raise GridError(
            budget.describe(), hint="Send coin to it; on a devnet use `deepsquare credit faucet`."
        )
    return f"{credit_count(account_balances.credits)}, {budget.describe()}"


async def _store(settings: Settings) -> tuple[str, str]:
    deployment = Deployment.load(settings.deployment)
    async with gateways_of(settings, deployment, None) as gateways:
        for gateway in gateways:
            await gateway.terms()
        if gateways:
            return f"reachable: {', '.join(gateway.display_url for gateway in gateways)}", ""
    writable = _writable(settings.store)
    readers = await asyncio.to_thread(FolderDefinitionStore(settings.store).readers)
    if not readers:
        return f"{writable}; no provider reads it", NO_READER_HINT
    return f"{writable}; providers that read it: {len(readers)}", ""


async def _disk(settings: Settings) -> str:
    folder = _existing(settings.state_dir)
    free = shutil.disk_usage(folder).free
    if free < settings.disk_floor * 1024**2:
        raise GridError(
            f"{free // 1024**2} MB are free in {folder}, less than the {settings.disk_floor} MB of "
            "disk_floor",
            hint="A provider does not claim jobs. Free some disk, or lower disk_floor or keep_runs_mb.",
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
            f"{existing} can't be written to", hint="Change its permissions, or the setting."
        )
    return f"{folder} can be written to"


def _existing(folder: Path) -> Path:
    ancestor = folder.absolute()
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    return ancestor


# -- checks of everything that a provider needs to get jobs

#: An approval that expires within this many seconds is reported.
_EXPIRY_WARNING_SECONDS = 7 * DAY
#: Number of jobs whose definitions are checked.
_CHECKED_JOBS = 20


async def examine_provider(settings: Settings, account: str) -> list[Check]:
    """Run the general checks and then those for providers; nothing is changed."""
    contract = ""
    with suppress(GridError):  # the check of the deployment reports it
        contract = Deployment.load(settings.deployment).scheduler
    folder = service_folder(settings.state_dir, "provider", account, contract)
    status = read_status(folder, "provider")
    checks = [*await examine(settings), _start_check(status), _abilities(status)]
    try:
        async with open_grid(settings) as contracts:
            checks.append(await _definitions(settings, contracts))
            provider = await contracts.registry.provider_of(account)
            silent = await contracts.scheduler.is_silent(provider.id)
            now = await chain_time(contracts.w3)
    except GridError as error:
        return [*checks, failed_check("registration", error, "keystore")]
    return [*checks, *standing(provider, silent=silent, now=now)]


def standing(provider: Provider, *, silent: bool, now: int) -> Iterator[Check]:
    """Check a provider's state on chain at chain time `now`, and its offer on this machine."""
    text = f"provider {provider.id}, {provider.account}"
    yield Check("registration", ok=True, text=text, setting="keystore")
    yield _status(provider)
    yield _approval(provider, now)
    yield Check(
        "challenges",
        ok=not silent,
        text="silent: a challenge is unanswered" if silent else "none is overdue",
        hint="Start the daemon: it answers in its next cycle." if silent else "",
    )
    if provider.prices.cpu or provider.prices.gpu or provider.prices.mem:
        yield Check("prices", ok=True, text="set")
    else:
        hint = "Set them with `deepsquare provider price`: providers without a price get no jobs."
        yield Check("prices", ok=False, text="all are zero", hint=hint)
    yield _offer(provider)


async def _definitions(settings: Settings, contracts: Contracts) -> Check:
    """Check that the store has the definitions of the newest jobs, preferably of live jobs."""
    if gateway_urls(settings, contracts.deployment):
        # A gateway returns a definition only to the job's provider, so nothing is checked here.
        text = "come from the gateways, see the check of the definition store"
        return Check("definitions", True, text, "", "gateway")
    setting, store = "store", FolderDefinitionStore(settings.store)
    live = {status for status in JobStatus if status.is_live}
    jobs = await newest(contracts, limit=_CHECKED_JOBS, statuses=live)
    jobs = jobs or await newest(contracts, limit=_CHECKED_JOBS, statuses=set(JobStatus))
    name = "definitions"
    if not jobs:
        return Check(name, True, "there is no job yet to check it with", "", setting)
    missing = 0
    for job, _ in jobs:
        try:
            await store.get(job.definition)
        except GridError:
            missing += 1
    text = f"{len(jobs) - missing} of the newest {len(jobs)} jobs' definitions are in {store.path}"
    if not missing:
        return Check(name, True, text, "", setting)
    hint = (
        "Jobs without a definition end PANICKED and are not paid. Point store at the folder that the grid's "
        "customers write to."
    )
    return Check(name, missing < len(jobs), text, hint, setting)


def _abilities(status: Mapping[str, Any] | None) -> Check:
    """Report which optional abilities the daemon has tested for jobs, and which ones failed."""
    name, setting = "abilities", "publish_abilities"
    abilities = status.get("abilities") if status else None
    if not isinstance(abilities, Mapping) or not abilities:
        text = "not known: the daemon does not run on this machine, or has not tested them yet"
        return Check(name, True, text, "", setting)
    usable = sorted(str(ability) for ability, state in abilities.items() if state == "yes")
    missing = [
        f"{ability}: {state}" for ability, state in sorted(abilities.items()) if state != "yes"
    ]
    text = f"{', '.join(usable) or 'none'}; not {'; '.join(missing)}"
    return Check(name, True, text[:2_000], "", setting)


def _start_check(status: Mapping[str, Any] | None) -> Check:
    """Check that this provider's daemon runs on this machine and can start jobs."""
    name, setting = "starting jobs", "state_dir, executor"
    if status is None:
        text = "not known: its daemon does not run on this machine"
        return Check(name, True, text, "Start it with `deepsquare provider run`.", setting)
    problems = (
        ("fault", FAULT_HINT, setting),
        ("shortage", "Free some disk space.", "disk_floor"),
        ("unready", "Check the endpoint, and this machine's clock.", "endpoint"),
    )
    for key, hint, problem_setting in problems:
        if status.get(key):
            return Check(name, False, str(status[key])[:300], hint, problem_setting)
    return Check(name, True, "a test script ran", "", setting)


def _status(provider: Provider) -> Check:
    hints = {
        ProviderStatus.WAITING_APPROVAL: "Ask the grid's approver.",
        ProviderStatus.DRAINING: "End the maintenance with `deepsquare provider resume`.",
        ProviderStatus.BANNED: "Ask the grid's approver why.",
    }
    active = provider.status is ProviderStatus.ACTIVE
    return Check("status", active, provider.status.name, hints.get(provider.status, ""))


def _approval(provider: Provider, now: int) -> Check:
    left = provider.approved_until - now
    if left <= 0:
        return Check("approval", ok=False, text="expired", hint="Ask the approver to renew it.")
    hint = "Ask the approver to renew it soon." if left < _EXPIRY_WARNING_SECONDS else ""
    return Check("approval", ok=True, text=f"for {left // DAY} more days", hint=hint)


def _offer(provider: Provider) -> Check:
    """Check the offer; compared with this machine only for a provider of one node."""
    offer = provider.offer
    text = f"{offer.cpus} CPUs, {offer.memory} MB, {offer.gpus} GPUs"
    this_machine = machine()
    cpus, memory = this_machine.cpus_per_node, this_machine.mem_per_node
    if provider.hardware.nodes == 1 and (offer.cpus > cpus or offer.memory > memory):
        return Check(
            "offer",
            setting="follow_offer",
            ok=False,
            text=f"{text}; this machine has {cpus} CPUs and {memory} MB",
            hint="Offer less with `deepsquare provider offer`, or run the daemon on the machine that has them.",
        )
    empty = not offer.cpus
    hint = "Offer resources with `deepsquare provider offer`." if empty else ""
    return Check("offer", not empty, text, hint, "follow_offer")
