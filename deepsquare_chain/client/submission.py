"""Submitting: everything is checked before anything is paid."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from eth_account.signers.local import LocalAccount

from deepsquare_chain.chain.calls import checked_address
from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.chain.eventtypes import JobSubmitted
from deepsquare_chain.chain.rpc import chain_time
from deepsquare_chain.chain.sender import Sender, TxReceipt
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import InsufficientFundsError, RevertedError, UsageError
from deepsquare_chain.job import Terms
from deepsquare_chain.store.base import StoreError
from deepsquare_chain.store.definitions import DefinitionStore
from deepsquare_chain.workflow import digest

#: Most jobs of one submission: what a block of 30 million gas holds with room to spare.
MAX_JOBS: Final = 250
# Gas by which a wallet is judged before it pays: above what the gas report measures.
_GAS_CALL: Final = 120_000
_GAS_JOB: Final = 90_000
_GAS_APPROVE: Final = 60_000
_PERMIT_SECONDS: Final = 900
#: Characters of a submission's key.
MAX_KEY: Final = 120
_PREFIX: Final = "submit:"


@dataclass(frozen=True, slots=True)
class Request:
    """Jobs of the same terms, one for each definition (canonical bytes)."""

    terms: Terms
    definitions: tuple[bytes, ...]

    @property
    def total(self) -> int:
        """Credit-wei that its jobs take."""
        return self.terms.amount * len(self.definitions)


@dataclass(frozen=True, slots=True)
class Bill:
    """What a submission takes, and what its wallet has: credit-wei, and wei for gas."""

    customer: str
    jobs: int
    total: int
    balance: int
    allowance: int
    gas_wei: int
    gas_balance: int

    @property
    def approval(self) -> bool:
        """Whether the scheduler's allowance is too small."""
        return self.allowance < self.total

    def check(self) -> None:
        """Refuse what the wallet can't pay.

        Raises:
            InsufficientFundsError: Too few credits, or no gas.
        """
        if self.balance < self.total:
            raise InsufficientFundsError(
                f"{self.customer} has {format_credits(self.balance)} credits, the submission "
                f"takes {format_credits(self.total)}",
                hint="Lower --credits, or get some: `deepsquare credit faucet` on a devnet.",
            )
        if self.gas_balance < self.gas_wei:
            raise InsufficientFundsError(
                f"{self.customer} has {format_credits(self.gas_balance)} of the chain's own coin, "
                f"the gas of this may take {format_credits(self.gas_wei)}",
                hint="Send it some for gas; `deepsquare credit faucet` does on a devnet.",
            )


async def bill(contracts: Contracts, customer: str, requests: Sequence[Request]) -> Bill:
    """Look at the wallet, the gas price and the deployment; nothing is sent.

    Raises:
        UsageError: The number of jobs is out of bounds.
        RevertedError: The deployment takes no new jobs.
    """
    jobs = sum(len(request.definitions) for request in requests)
    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError(
            f"{jobs} jobs can't go into one submission: 1 to {MAX_JOBS} can",
            hint="Lower --array, and submit the rest in further submissions.",
        )
    w3, credit, scheduler = contracts.w3, contracts.credit, contracts.scheduler
    address = checked_address(customer)
    is_open, balance, allowance, gas_price, gas_balance = await asyncio.gather(
        scheduler.submissions_open(),
        credit.balance_of(address),
        credit.allowance(address, scheduler.address),
        w3.eth.gas_price,
        w3.eth.get_balance(address),
    )
    if not is_open:
        raise RevertedError(
            "This deployment takes no new jobs",
            hint="Use the record of the deployment that follows it.",
        )
    total = sum(request.total for request in requests)
    gas = _GAS_CALL + _GAS_JOB * jobs + (_GAS_APPROVE if allowance < total else 0)
    return Bill(address, jobs, total, balance, allowance, gas * gas_price, gas_balance)


@dataclass(frozen=True, slots=True)
class Submitted:
    """Ids of new jobs in the order asked for, and the receipts of what was sent for them."""

    job_ids: tuple[int, ...]
    receipts: tuple[TxReceipt, ...]


async def submit(
    contracts: Contracts,
    sender: Sender,
    store: DefinitionStore,
    requests: Sequence[Request],
    *,
    permit: LocalAccount | None = None,
    timeout: float = 60.0,
    key: str | None = None,
) -> Submitted:
    """Keep the definitions, allow exactly what is needed, and submit in one transaction.

    Args:
        contracts: The deployment.
        sender: Of the customer's wallet.
        store: Where the definitions are kept; providers read them there.
        requests: What to submit.
        permit: The customer's account, to sign a permit instead of sending an approval.
        timeout: Seconds to wait for each transaction.
        key: The caller's own name of this submission, kept in the wallet's outbox: a second one
            of that name waits for the first and gives its jobs.

    Raises:
        InsufficientFundsError: Too few credits, or no gas; nothing was paid.
        UsageError: The key stands for another submission, or is no key.
        GridError: The store, the endpoint or a contract refused; nothing was paid.
    """
    found = await repeated(contracts, sender, requests, key, timeout)
    if found is not None:
        return found
    try:
        return await _pay(
            contracts, sender, store, requests, permit=permit, timeout=timeout, key=key
        )
    except (StoreError, InsufficientFundsError, RevertedError):
        # The same command beside this one may have been quicker with its key, credits or permit.
        found = await repeated(contracts, sender, requests, key, timeout)
        if found is None:
            raise
        return found


async def _pay(
    contracts: Contracts,
    sender: Sender,
    store: DefinitionStore,
    requests: Sequence[Request],
    *,
    permit: LocalAccount | None,
    timeout: float,
    key: str | None,
) -> Submitted:
    """See `submit`, for what was not submitted before."""
    due = await bill(contracts, sender.address, requests)
    due.check()
    rows = [
        (request.terms, [await store.put(data) for data in request.definitions])
        for request in requests
    ]
    scheduler, receipts = contracts.scheduler, []
    call = scheduler.submit_jobs(rows)
    if due.approval and permit is not None:
        deadline = await chain_time(contracts.w3) + _PERMIT_SECONDS
        signed = await contracts.credit.sign_permit(permit, scheduler.address, due.total, deadline)
        call = scheduler.submit_jobs_with_permit(rows, signed)
    elif due.approval:
        approval = contracts.credit.approve(scheduler.address, due.total)
        receipts.append(await sender.send(approval, timeout=timeout))
    outbox_key = None if key is None else _PREFIX + key
    receipts.append(await sender.send(call, timeout=timeout, key=outbox_key))
    return _born(receipts)


def _born(receipts: Sequence[TxReceipt]) -> Submitted:
    born = [event for event in receipts[-1].events if isinstance(event, JobSubmitted)]
    return Submitted(tuple(event.job_id for event in born), tuple(receipts))


async def repeated(
    contracts: Contracts,
    sender: Sender,
    requests: Sequence[Request],
    key: str | None,
    timeout: float,
) -> Submitted | None:
    """The jobs of an earlier submission of this name, None where there was none.

    One that was refused or never reached a block has paid nothing and is none.

    Raises:
        UsageError: The key stands for another submission, or is no key.
        WaitTimeoutError: The earlier one is not in a block yet.
    """
    if key is None:
        return None
    entry = sender.sent(_PREFIX + _checked(key))
    if entry is None:
        return None
    scheduler = contracts.scheduler
    rows = [(request.terms, [digest(data) for data in request.definitions]) for request in requests]
    if scheduler.submitted(entry.call) != scheduler.submitted(scheduler.submit_jobs(rows)):
        raise UsageError(
            f"The key {key!r} was used for another submission",
            hint="Give each submission a key of its own; the same key means the same jobs.",
        )
    return _born([await sender.send(entry.call, timeout=timeout, key=_PREFIX + key)])


def _checked(key: str) -> str:
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise UsageError(f"A key has 1 to {MAX_KEY} printable characters, not {key[:40]!r}")
    return key
