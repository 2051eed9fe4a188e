"""The contract classes: views return our types, methods that change state return a `Call`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, Final

from web3 import AsyncWeb3
from web3.types import BlockIdentifier

from deepsquare_chain.chain.bindings.abi import decode_values
from deepsquare_chain.chain.bindings.calls import (
    LATEST,
    Call,
    ContractBase,
    checked_address,
    plural,
)
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.forwarder import ForwarderContract
from deepsquare_chain.chain.bindings.records import (
    Clock,
    JobDecoder,
    Parameters,
    Report,
    parse_labels,
    request_values,
    to_word,
    truncated_reason,
)
from deepsquare_chain.chain.bindings.reverts import HINTS, selector_name
from deepsquare_chain.chain.rpc.batching import chunks
from deepsquare_chain.chain.signers import Signer, signed_by
from deepsquare_chain.credits import credit_count
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.job import (
    Hardware,
    Job,
    JobStatus,
    Load,
    Offer,
    Prices,
    Provider,
    ProviderStatus,
    Terms,
)

# -- the Credit token: balances, allowances and permits

UNLIMITED = 2**256 - 1
_PERMIT_FIELDS: Final = {
    "owner": "address",
    "spender": "address",
    "value": "uint256",
    "nonce": "uint256",
    "deadline": "uint256",
}


@dataclass(frozen=True, slots=True)
class Permit:
    """A signed EIP-2612 permit; `value` in credit-wei, `deadline` in chain time."""

    value: int
    deadline: int
    v: int
    r: bytes
    s: bytes


class CreditContract(ContractBase):
    """The ERC-20 token that jobs are paid in. All amounts are credit-wei."""

    artifact = "Credit"

    async def balance_of(self, account: str, *, block: BlockIdentifier = LATEST) -> int:
        """Return the credits of an account."""
        account = checked_address(account)
        return int(await self._one("balanceOf", account, block=block))

    async def total_supply(self, *, block: BlockIdentifier = LATEST) -> int:
        """Return the total number of credits."""
        return int(await self._one("totalSupply", block=block))

    async def allowance(self, owner: str, spender: str, *, block: BlockIdentifier = LATEST) -> int:
        """Return the amount that a spender may transfer from an owner."""
        accounts = (checked_address(owner), checked_address(spender))
        return int(await self._one("allowance", *accounts, block=block))

    async def permit_nonce(self, owner: str, *, block: BlockIdentifier = LATEST) -> int:
        """Return the nonce of the owner's next permit."""
        return int(await self._one("nonces", checked_address(owner), block=block))

    def approve(self, spender: str, amount: int) -> Call:
        """Allow a spender to transfer up to `amount`; `UNLIMITED` is not used up by transfers."""
        allowed = "unlimited credits" if amount == UNLIMITED else credit_count(amount)
        label = f"approve {allowed} for {spender}"
        return self._call("approve", checked_address(spender), amount, label=label)

    def transfer(self, to: str, amount: int) -> Call:
        """Transfer credits to an account."""
        label = f"transfer {credit_count(amount)} to {to}"
        return self._call("transfer", checked_address(to), amount, label=label)

    def mint(self, to: str, amount: int) -> Call:
        """Create credits; for a holder of MINTER_ROLE."""
        label = f"mint {credit_count(amount)} for {to}"
        return self._call("mint", checked_address(to), amount, label=label)

    def burn(self, amount: int) -> Call:
        """Destroy credits of the sender."""
        return self._call("burn", amount, label=f"burn {credit_count(amount)}")

    async def permit_data(
        self, owner: str, spender: str, value: int, deadline: int
    ) -> dict[str, Any]:
        """Return the EIP-712 data of a permit over `value` credit-wei until `deadline`.

        The owner signs it to allow the spender the transfer.
        """
        domain = await self.domain()
        message = {
            "owner": checked_address(owner),
            "spender": checked_address(spender),
            "value": value,
            "nonce": await self.permit_nonce(owner),
            "deadline": deadline,
        }
        return domain.typed_data("Permit", _PERMIT_FIELDS, message)

    async def sign_permit(self, account: Signer, spender: str, value: int, deadline: int) -> Permit:
        """Sign a permit; `deadline` is chain time in seconds."""
        data = await self.permit_data(account.address, spender, value, deadline)
        signed = await signed_by(account, lambda: account.sign_typed_data(full_message=data))
        return Permit(
            value=value,
            deadline=deadline,
            v=signed.v,
            r=signed.r.to_bytes(32, "big"),
            s=signed.s.to_bytes(32, "big"),
        )


# -- the ProviderRegistry contract: approved providers, their hardware and their prices

MAX_CACHED = 10_000


class RegistryContract(ContractBase):
    """The contract of the providers. Memory is in MB, prices are in credit-wei per second."""

    artifact = "ProviderRegistry"

    def __init__(self, w3: AsyncWeb3[Any], address: str) -> None:
        super().__init__(w3, address)
        self._accounts: dict[int, str] = {}

    async def provider_count(self, *, block: BlockIdentifier = LATEST) -> int:
        """Return the number of providers ever approved; provider IDs are 1 to this number."""
        return int(await self._one("providerCount", block=block))

    async def account_of(self, provider_id: int, *, block: BlockIdentifier = LATEST) -> str | None:
        """Return the account of a provider; None for an unknown ID."""
        account = self._accounts.get(provider_id)
        if account is None:
            address = str(await self._one("accountOf", provider_id, block=block))
            if int(address, 16) == 0:
                return None
            self._accounts[provider_id] = account = address
            if len(self._accounts) > MAX_CACHED:
                self._accounts.clear()
        return account

    async def get_provider(
        self, provider_id: int, *, block: BlockIdentifier = LATEST
    ) -> Provider | None:
        """Return a provider; None for an unknown ID. IDs are assigned at the first approval."""
        account = await self.account_of(provider_id, block=block)
        if account is None:
            return None
        provider = await self.find(account, block=block)
        if provider is None or provider.id != provider_id:
            self._accounts.pop(provider_id, None)
            return None
        return provider

    async def find(self, account: str, *, block: BlockIdentifier = LATEST) -> Provider | None:
        """Return the provider of an account; None if it never registered.

        A provider that was never approved has the ID 0.
        """
        account = checked_address(account)
        provider = _provider(await self._one("getProvider", account, block=block))
        return None if provider.status is ProviderStatus.NONE else provider

    async def provider_of(self, account: str, *, block: BlockIdentifier = LATEST) -> Provider:
        """Return the provider of an account, approved or not.

        Raises:
            NotFoundError: The account never registered.
        """
        provider = await self.find(account, block=block)
        if provider is None:
            raise NotFoundError(
                f"{account} is not registered as a provider", hint=HINTS["NotRegistered"]
            )
        return provider

    async def registered_hardware(self, account: str) -> Hardware:
        """Return the hardware of an account's latest registration, whether it is approved or not.

        Raises:
            EndpointError: The endpoint does not answer.
        """
        record = await self._one("getProvider", checked_address(account))
        version, pending_version, approved, pending = record[4:8]
        return Hardware(*(approved if version == pending_version else pending))

    async def providers(self, *, block: BlockIdentifier = LATEST) -> list[Provider]:
        """Return all providers that were ever approved, ordered by ID."""
        count = await self.provider_count(block=block)
        providers = await asyncio.gather(
            *(self.get_provider(provider_id, block=block) for provider_id in range(1, count + 1))
        )
        return [provider for provider in providers if provider is not None]

    async def approval_period(self, *, block: BlockIdentifier = LATEST) -> int:
        """Return the seconds that an approval lasts."""
        return int(await self._one("approvalPeriod", block=block))

    def register(
        self, hardware: Hardware, prices: Prices, labels: Mapping[str, str] | None = None
    ) -> Call:
        """Register the sender, or propose its new hardware; both need approval."""
        arguments = (astuple(hardware), astuple(prices), _labels(labels or {}))
        return self._call("register", *arguments)

    def approve(self, account: str, version: int) -> Call:
        """Approve exactly this version of a provider; for a holder of APPROVER_ROLE."""
        label = f"approve version {version} of {account}"
        return self._call("approve", checked_address(account), version, label=label)

    def set_offer(self, offer: Offer) -> Call:
        """Set the resources that the sender offers to the grid, up to its hardware."""
        label = f"offer {plural(offer.cpus, 'CPU')}, {offer.memory} MB, {plural(offer.gpus, 'GPU')}"
        return self._call("setOffer", astuple(offer), label=label)

    def set_prices(self, prices: Prices) -> Call:
        """Change the sender's prices for jobs assigned from now on."""
        return self._call("setPrices", astuple(prices), label="set prices")

    def set_labels(self, labels: Mapping[str, str]) -> Call:
        """Replace the sender's labels."""
        return self._call("setLabels", _labels(labels), label="set labels")

    def set_draining(self, draining: bool) -> Call:
        """Start or end maintenance (draining) of the sender."""
        label = "start maintenance" if draining else "end maintenance"
        return self._call("setDraining", draining, label=label)

    def ban(self, account: str, reason: str = "") -> Call:
        """Ban a provider; for a holder of APPROVER_ROLE. The reason has at most 256 bytes."""
        return self._call("ban", checked_address(account), reason, label=f"ban {account}")

    def unban(self, account: str) -> Call:
        """Lift the ban of a provider; for a holder of APPROVER_ROLE."""
        return self._call("unban", checked_address(account), label=f"unban {account}")


def _labels(labels: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in sorted(labels.items())]


def _provider(record: tuple[Any, ...]) -> Provider:
    number, account, status, until, version, pending, hardware, _, offer, prices, labels = record
    return Provider(
        id=number,
        account=account,
        status=ProviderStatus(status),
        approved_until=until,
        version=version,
        pending_version=pending,
        hardware=Hardware(*hardware),
        offer=Offer(*offer),
        prices=Prices(*prices),
        labels=parse_labels(labels),
    )


# -- the MetaScheduler contract: job records, their state machine and their escrow

#: Number of records read in one call, far below any node's gas limit for eth_call.
READ_CHUNK: Final = 500


class MetaSchedulerContract(ContractBase):
    """The contract of the jobs. Job IDs are 1 to `job_count`; amounts in credit-wei, times in s."""

    artifact = "MetaScheduler"

    def __init__(self, w3: AsyncWeb3[Any], address: str) -> None:
        super().__init__(w3, address)
        self._job_decoder = JobDecoder()

    async def job_count(self, *, block: BlockIdentifier = LATEST) -> int:
        """Return the number of jobs ever submitted."""
        return int(await self._one("jobCount", block=block))

    async def get_job(self, job_id: int, *, block: BlockIdentifier = LATEST) -> Job:
        """Return one job record.

        Raises:
            NotFoundError: The job does not exist.
        """
        return (await self.get_existing_jobs([job_id], block=block))[0]

    async def get_existing_jobs(
        self, job_ids: Sequence[int], *, block: BlockIdentifier = LATEST
    ) -> list[Job]:
        """Return job records in the order of the IDs.

        Raises:
            NotFoundError: A job does not exist.
        """
        jobs = await self.get_jobs(job_ids, block=block)
        for job in jobs:
            if job.status is JobStatus.NONE:
                raise NotFoundError(
                    f"Job {job.id} does not exist", hint="List jobs with `deepsquare job list`."
                )
        return jobs

    async def get_jobs(
        self, job_ids: Sequence[int], *, block: BlockIdentifier = LATEST
    ) -> list[Job]:
        """Return job records in the order of the IDs; unknown jobs have the status NONE."""
        self._job_decoder.reserve(len(job_ids))
        job_chunks = await asyncio.gather(
            *(
                self._decoded_view(
                    "getJobs",
                    list(id_chunk),
                    block=block,
                    decode=partial(self._job_decoder.decode, id_chunk),
                )
                for id_chunk in chunks(list(job_ids), READ_CHUNK)
            )
        )
        return [job for job_chunk in job_chunks for job in job_chunk]

    async def allotment(self, job_id: int, *, block: BlockIdentifier = LATEST) -> int:
        """Return the seconds that a job may run from its start; 0 until it is assigned."""
        return int(await self._one("allotment", job_id, block=block))

    async def deadline(self, job_id: int, *, block: BlockIdentifier = LATEST) -> int:
        """Return the chain time at which a RUNNING job has used up its allotment, else 0."""
        return int(await self._one("deadline", job_id, block=block))

    async def is_lost(self, job_id: int, *, block: BlockIdentifier = LATEST) -> bool:
        """Return whether a RUNNING job is lost: provider silent (lost timeout), or job overdue."""
        return bool(await self._one("isLost", job_id, block=block))

    async def is_eligible(
        self, job_id: int, provider_id: int, *, block: BlockIdentifier = LATEST
    ) -> tuple[bool, str]:
        """Return whether a PENDING job can be assigned to a provider now, or the error's name."""
        eligible, reason = await self._view("isEligible", job_id, provider_id, block=block)
        return bool(eligible), "" if eligible else selector_name(reason)

    async def is_silent(self, provider_id: int, *, block: BlockIdentifier = LATEST) -> bool:
        """Return whether a provider has an unanswered challenge within the response timeout."""
        return bool(await self._one("isSilent", provider_id, block=block))

    async def clock_of(self, provider_id: int, *, block: BlockIdentifier = LATEST) -> Clock:
        """Return a provider's challenge clock."""
        return Clock(*await self._one("clockOf", provider_id, block=block))

    async def load_of(self, provider_id: int, *, block: BlockIdentifier = LATEST) -> Load:
        """Return the resources that the assigned live jobs of a provider occupy."""
        return Load(*await self._one("loadOf", provider_id, block=block))

    async def parked_of(self, account: str, *, block: BlockIdentifier = LATEST) -> int:
        """Return the parked payments of an account in credit-wei, which it can `withdraw`."""
        return int(await self._one("parkedOf", checked_address(account), block=block))

    async def submissions_open(self, *, block: BlockIdentifier = LATEST) -> bool:
        """Return whether new jobs are accepted."""
        return bool(await self._one("submissionsOpen", block=block))

    async def parameters(self, *, block: BlockIdentifier = LATEST) -> Parameters:
        """Return the timeouts, the fee and the addresses of the deployment."""
        settings = ("timeouts", "feeBps", "submissionsOpen")
        addresses = ("credit", "registry", "treasury", "trustedForwarder")
        times, *others = await asyncio.gather(
            *(self._one(name, block=block) for name in (*settings, *addresses))
        )
        return Parameters(*times, *others)

    # -- customers

    def submit_jobs(self, requests: Sequence[tuple[Terms, Sequence[bytes]]]) -> Call:
        """Submit one job per definition digest; the escrow comes from the sender's allowance."""
        return self._call("submitJobs", request_values(requests), label=_submit_label(requests))

    def submit_jobs_with_permit(
        self, requests: Sequence[tuple[Terms, Sequence[bytes]]], permit: Permit
    ) -> Call:
        """Submit jobs as `submit_jobs` does, with a permit in the same transaction."""
        arguments = (request_values(requests), astuple(permit))
        return self._call("submitJobsWithPermit", *arguments, label=_submit_label(requests))

    def submitted(self, call: Call) -> Any:
        """Decode the requests of a `submitJobs` call, with or without a permit, for comparison.

        Raises:
            UsageError: The call submits no jobs.
        """
        for name in ("submitJobs", "submitJobsWithPermit"):
            function = self._interface.function(name)
            if call.data[:4] == function.selector:
                return decode_values(function.inputs, call.data[4:])[0]
        raise UsageError(f"{call.label!r} does not submit jobs")

    def cancel(self, job_ids: Sequence[int]) -> Call:
        """Cancel jobs of the sender."""
        return self._batch("cancel", job_ids)

    def top_up(self, job_id: int, customer: str, amount: int) -> Call:
        """Raise the escrow of a live job; `customer` is the job's."""
        label = f"top up job {job_id} by {credit_count(amount)}"
        return self._call("topUp", job_id, checked_address(customer), amount, label=label)

    def top_up_with_permit(self, job_id: int, customer: str, amount: int, permit: Permit) -> Call:
        """Top up a job as `top_up` does, with a permit in the same transaction."""
        arguments = (job_id, checked_address(customer), amount, astuple(permit))
        label = f"top up job {job_id} by {credit_count(amount)}"
        return self._call("topUpWithPermit", *arguments, label=label)

    def withdraw(self, to: str) -> Call:
        """Withdraw the sender's parked payments, which could not be paid out before."""
        return self._call("withdraw", checked_address(to), label="withdraw parked credits")

    # -- scheduler and providers

    def meta_schedule(self, assignments: Mapping[tuple[int, Prices], Sequence[int]]) -> Call:
        """Assign PENDING jobs; for a holder of METASCHEDULER_ROLE.

        Args:
            assignments: Job IDs by provider ID and the prices that the decision was based on; jobs
                are rejected if the provider's prices are higher by now.
        """
        groups = [
            (provider, astuple(prices), list(ids))
            for (provider, prices), ids in assignments.items()
        ]
        label = f"assign {plural(sum(len(ids) for *_, ids in groups), 'job')}"
        return self._call("metaSchedule", groups, label=label)

    def self_schedule(self, job_ids: Sequence[int]) -> Call:
        """Assign jobs to the sender that were PENDING for the pending timeout."""
        return self._batch("selfSchedule", job_ids)

    def claim(self, job_ids: Sequence[int]) -> Call:
        """Move jobs from META_SCHEDULED to SCHEDULED; for the assigned provider."""
        return self._batch("claim", job_ids)

    def start(self, job_ids: Sequence[int]) -> Call:
        """Move jobs from SCHEDULED to RUNNING, which starts billing; for the assigned provider."""
        return self._batch("start", job_ids)

    def claim_and_start(self, job_ids: Sequence[int]) -> Call:
        """Move jobs from META_SCHEDULED to RUNNING in one call; for the assigned provider."""
        return self._batch("claimAndStart", job_ids)

    def collect(self, job_ids: Sequence[int]) -> Call:
        """Bill RUNNING jobs up to now; for the assigned provider, if the jobs allow it."""
        return self._batch("collect", job_ids)

    def finish(self, reports: Sequence[Report]) -> Call:
        """End RUNNING jobs and settle them; for the assigned provider."""
        values = [(*astuple(report)[:-1], to_word(report.reason)) for report in reports]
        label = _label("finish", [report.job_id for report in reports])
        return self._call("finish", values, label=label)

    def answer(self) -> Call:
        """Answer a challenge, which stops the sender's challenge clock."""
        return self._call("answer", label="answer a challenge")

    # -- customers, providers and others

    def requeue(self, job_ids: Sequence[int], reason: str = "") -> Call:
        """Move jobs from META_SCHEDULED or SCHEDULED back to PENDING."""
        return self._batch("requeue", job_ids, truncated_reason(reason))

    def panic(self, job_ids: Sequence[int], reason: str = "") -> Call:
        """Move jobs to PANICKED; for their provider, or for anyone once they are lost."""
        return self._batch("panic", job_ids, truncated_reason(reason))

    def challenge(self, job_id: int) -> Call:
        """Challenge the provider of an assigned job, which starts its challenge clock."""
        return self._call("challenge", job_id, label=f"challenge the provider of job {job_id}")

    # -- administrator

    def set_fee(self, fee_bps: int) -> Call:
        """Set the fee in basis points for jobs assigned from now on; at most 2,000."""
        return self._call("setFee", fee_bps, label=f"set the fee to {fee_bps} basis points")

    def set_submissions_open(self, is_open: bool) -> Call:
        """Open or close new submissions."""
        label = "open submissions" if is_open else "close submissions"
        return self._call("setSubmissionsOpen", is_open, label=label)

    def _batch(self, name: str, job_ids: Sequence[int], *more: Any) -> Call:
        return self._call(name, list(job_ids), *more, label=_label(name, job_ids))


def _label(verb: str, job_ids: Sequence[int]) -> str:
    return f"{verb} job {job_ids[0]}" if len(job_ids) == 1 else f"{verb} {len(job_ids)} jobs"


def _submit_label(requests: Sequence[tuple[Terms, Sequence[bytes]]]) -> str:
    return f"submit {plural(sum(len(digests) for _, digests in requests), 'job')}"


class Contracts:
    """The contracts of a deployment."""

    def __init__(self, w3: AsyncWeb3[Any], deployment: Deployment) -> None:
        self.w3 = w3
        self.deployment = deployment
        self.credit = CreditContract(w3, deployment.credit)
        self.registry = RegistryContract(w3, deployment.registry)
        self.scheduler = MetaSchedulerContract(w3, deployment.scheduler)
        self.forwarder = ForwarderContract(w3, deployment.forwarder)

    @property
    def addresses(self) -> tuple[str, str, str]:
        """Contracts whose events are read: credit, registry, scheduler."""
        return (self.credit.address, self.registry.address, self.scheduler.address)
