"""Checks everything that a provider needs to get jobs, and reports problems with hints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.rpc.connection import chain_time
from deepsquare_chain.client.doctor import FAULT_HINT, examine
from deepsquare_chain.client.job_list import newest
from deepsquare_chain.client.network import open_grid
from deepsquare_chain.client.registration import machine
from deepsquare_chain.daemon.loop import read_status, service_folder
from deepsquare_chain.errors import GridError
from deepsquare_chain.job import JobStatus, Provider, ProviderStatus
from deepsquare_chain.observability.probe import Check
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.definitions import FolderDefinitionStore
from deepsquare_chain.store.gateway_client import gateway_urls

#: An approval that expires within this many seconds is reported.
_SOON = 7 * 86_400
#: Number of jobs whose definitions are checked.
_LOOKED_AT = 20


async def examine_provider(settings: Settings, account: str) -> list[Check]:
    """Run the general checks and then those for providers; nothing is changed."""
    status = read_status(service_folder(settings.state_dir, "provider", account), "provider")
    checks = [*await examine(settings), _starts(status), _abilities(status)]
    try:
        async with open_grid(settings) as contracts:
            checks.append(await _definitions(settings, contracts))
            provider = await contracts.registry.provider_of(account)
            silent = await contracts.scheduler.is_silent(provider.id)
            now = await chain_time(contracts.w3)
    except GridError as error:
        failed = Check("registration", False, error.message, error.hint, "keystore")
        return [*checks, failed]
    return [*checks, *standing(provider, silent=silent, now=now)]


def standing(provider: Provider, *, silent: bool, now: int) -> Iterator[Check]:
    """Check a provider's state on chain at chain time `now`, and its offer on this machine."""
    yield Check(
        "registration",
        ok=True,
        text=f"provider {provider.id}, {provider.account}",
        setting="keystore",
    )
    yield _status(provider)
    yield _approval(provider, now)
    yield Check(
        "challenges",
        ok=not silent,
        text="silent: a challenge is unanswered" if silent else "none is overdue",
        hint="Run the daemon: it answers in its next cycle." if silent else "",
    )
    priced = provider.prices.cpu or provider.prices.gpu or provider.prices.mem
    yield Check(
        "prices",
        ok=bool(priced),
        text="set" if priced else "all are zero",
        hint=""
        if priced
        else "Set them with `deepsquare provider price`: no job goes for nothing.",
    )
    yield _offer(provider)


async def _definitions(settings: Settings, contracts: Contracts) -> Check:
    """Check that the store has the definitions of the newest jobs, preferably of live jobs."""
    if gateway_urls(settings, contracts.deployment):
        # A gateway returns a definition only to the job's provider, so nothing is checked here.
        text = "come from the gateways, see the check of the definition store"
        return Check("definitions", True, text, "", "gateway")
    setting, store = "store", FolderDefinitionStore(settings.store)
    live = {status for status in JobStatus if status.is_live}
    jobs = await newest(contracts, limit=_LOOKED_AT, statuses=live)
    jobs = jobs or await newest(contracts, limit=_LOOKED_AT, statuses=set(JobStatus))
    name = "definitions"
    if not jobs:
        return Check(name, True, "there is no job yet by which it could be checked", "", setting)
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
        text = "not known: the daemon does not run here, or has not tested them yet"
        return Check(name, True, text, "", setting)
    usable = sorted(str(ability) for ability, state in abilities.items() if state == "yes")
    missing = [
        f"{ability}: {state}" for ability, state in sorted(abilities.items()) if state != "yes"
    ]
    text = f"{', '.join(usable) or 'none'}; not {'; '.join(missing)}"
    return Check(name, True, text[:2_000], "", setting)


def _starts(status: Mapping[str, Any] | None) -> Check:
    """Check that this provider's daemon runs on this machine and can start jobs."""
    name, setting = "starting jobs", "state_dir, executor"
    if status is None:
        text = "not known: its daemon does not run here"
        return Check(name, True, text, "Start it with `deepsquare provider run`.", setting)
    if status.get("fault"):
        return Check(name, False, str(status["fault"])[:300], FAULT_HINT, setting)
    if status.get("shortage"):
        return Check(name, False, str(status["shortage"])[:300], "Free some disk.", "disk_floor")
    if status.get("unready"):
        hint = "Look at the endpoint, or at this machine's clock."
        return Check(name, False, str(status["unready"])[:300], hint, "endpoint")
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
        return Check("approval", ok=False, text="run out", hint="Ask the approver to renew it.")
    hint = "Ask the approver to renew it soon." if left < _SOON else ""
    return Check("approval", ok=True, text=f"for {left // 86_400} more days", hint=hint)


def _offer(provider: Provider) -> Check:
    """Check the offer; compared with this machine only for a provider of one node."""
    offer = provider.offer
    text = f"{offer.cpus} cpus, {offer.memory} MB, {offer.gpus} gpus"
    this_machine = machine()
    cpus, memory = this_machine.cpus_per_node, this_machine.mem_per_node
    if provider.hardware.nodes == 1 and (offer.cpus > cpus or offer.memory > memory):
        return Check(
            "offer",
            setting="follow_offer",
            ok=False,
            text=f"{text}; this machine has {cpus} cpus and {memory} MB",
            hint="Offer less with `deepsquare provider offer`, or run the daemon where they are.",
        )
    empty = not offer.cpus
    hint = "Offer something: `provider offer`." if empty else ""
    return Check("offer", not empty, text, hint, "follow_offer")
