"""Looks at everything a provider needs to get jobs, and says what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil

from deepsquare_chain.chain.rpc import chain_time
from deepsquare_chain.client.doctor import FAULT_HINT, Check, examine
from deepsquare_chain.client.network import open_grid
from deepsquare_chain.daemon.status import read_status, service_folder
from deepsquare_chain.errors import GridError
from deepsquare_chain.job import Provider, ProviderStatus
from deepsquare_chain.settings import Settings

#: An approval that ends within this many seconds is told.
_SOON = 7 * 86_400
_MB = 1_000_000


async def examine_provider(settings: Settings, account: str) -> list[Check]:
    """The checks of every command, and then the provider's own; nothing is changed."""
    found = [*await examine(settings), _starts(settings, account)]
    try:
        async with open_grid(settings) as contracts:
            provider = await contracts.registry.provider_of(account)
            silent = await contracts.scheduler.is_silent(provider.id)
            now = await chain_time(contracts.w3)
    except GridError as error:
        return [*found, Check("registration", ok=False, text=error.message, hint=error.hint)]
    return [*found, *standing(provider, silent=silent, now=now)]


def standing(provider: Provider, *, silent: bool, now: int) -> Iterator[Check]:
    """What the chain says of a provider at chain time `now`, and whether this machine holds it."""
    yield Check("registration", ok=True, text=f"provider {provider.id}, {provider.account}")
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


def _starts(settings: Settings, account: str) -> Check:
    """Whether this provider's daemon runs on this machine, and can start jobs."""
    status = read_status(service_folder(settings.state_dir, "provider", account), "provider")
    if status is None:
        return Check("starting jobs", ok=True, text="not known: its daemon does not run here")
    if status.get("fault"):
        return Check("starting jobs", ok=False, text=str(status["fault"])[:300], hint=FAULT_HINT)
    return Check("starting jobs", ok=True, text="a test script ran")


def _status(provider: Provider) -> Check:
    words = {
        ProviderStatus.WAITING_APPROVAL: "Ask the grid's approver.",
        ProviderStatus.DRAINING: "End the maintenance with `deepsquare provider resume`.",
        ProviderStatus.BANNED: "Ask the grid's approver why.",
    }
    active = provider.status is ProviderStatus.ACTIVE
    return Check("status", active, provider.status.name, words.get(provider.status, ""))


def _approval(provider: Provider, now: int) -> Check:
    left = provider.approved_until - now
    if left <= 0:
        return Check("approval", ok=False, text="run out", hint="Ask the approver to renew it.")
    hint = "Ask the approver to renew it soon." if left < _SOON else ""
    return Check("approval", ok=True, text=f"for {left // 86_400} more days", hint=hint)


def _offer(provider: Provider) -> Check:
    """Only a provider of one node runs jobs on this machine itself."""
    offer = provider.offer
    text = f"{offer.cpus} cpus, {offer.memory} MB, {offer.gpus} gpus"
    cpus, memory = os.cpu_count() or 1, psutil.virtual_memory().total // _MB
    if provider.hardware.nodes == 1 and (offer.cpus > cpus or offer.memory > memory):
        return Check(
            "offer",
            ok=False,
            text=f"{text}; this machine has {cpus} cpus and {memory} MB",
            hint="Offer less with `deepsquare provider offer`, or run the daemon where they are.",
        )
    empty = not offer.cpus
    return Check("offer", not empty, text, "Offer something: `provider offer`." if empty else "")
