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
from deepsquare_chain.store.definitions import DefinitionStore

#: Most jobs of one submission: what a block of 30 million gas holds with room to spare.
MAX_JOBS: Final = 250
# Gas by which a wallet is judged before it pays: above what the gas report measures.
_GAS_CALL: Final = 120_000
_GAS_JOB: Final = 90_000
_GAS_APPROVE: Final = 60_000
_PERMIT_SECONDS: Final = 900


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
        raise UsageError(f"{jobs} jobs can't go into one submission: 1 to {MAX_JOBS} can")
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
) -> Submitted:
    """Keep the definitions, allow exactly what is needed, and submit in one transaction.

    Args:
        contracts: The deployment.
        sender: Of the customer's wallet.
        store: Where the definitions are kept; providers read them there.
        requests: What to submit.
        permit: The customer's account, to sign a permit instead of sending an approval.
        timeout: Seconds to wait for each transaction.

    Raises:
        InsufficientFundsError: Too few credits, or no gas; nothing was paid.
        GridError: The store, the endpoint or a contract refused; nothing was paid.
    """
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
    receipts.append(await sender.send(call, timeout=timeout))
    born = [event for event in receipts[-1].events if isinstance(event, JobSubmitted)]
    return Submitted(tuple(event.job_id for event in born), tuple(receipts))
