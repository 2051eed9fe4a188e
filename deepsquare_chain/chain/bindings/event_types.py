"""Events of the contracts as frozen dataclasses, with the contracts' fields in their order.

All code works with these classes instead of raw logs. `before` and `after` are the contracts'
`from` and `to`. Amounts are in credit-wei, times in seconds of chain time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepsquare_chain.chain.bindings.reverts import selector_name
from deepsquare_chain.job import Hardware, JobStatus, Offer, Prices, Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Position of an event on the chain; `address` is the contract that emitted it."""

    block_number: int = 0
    block_hash: str = ""
    tx_hash: str = ""
    log_index: int = 0
    address: str = ""

    @property
    def position(self) -> tuple[int, int]:
        """Block number and log index, the sort key in chain order."""
        return self.block_number, self.log_index


# -- MetaScheduler: jobs


@dataclass(frozen=True, slots=True)
class JobSubmitted(Event):
    """A customer submitted a job and paid `terms.amount` into escrow.

    The terms' `name` and `uses` are contained in this event only.
    """

    job_id: int
    customer: str
    definition: bytes
    terms: Terms


@dataclass(frozen=True, slots=True)
class JobTransition(Event):
    """A job changed its status; `provider` is the zero address while none is assigned."""

    job_id: int
    customer: str
    provider: str
    before: JobStatus
    after: JobStatus


@dataclass(frozen=True, slots=True)
class JobPriced(Event):
    """The rate and the fee of a job were fixed at its assignment."""

    job_id: int
    provider: str
    rate: int
    fee_bps: int


@dataclass(frozen=True, slots=True)
class JobToppedUp(Event):
    """The escrow of a job was raised; `escrow` and `time_limit` are the new values."""

    job_id: int
    payer: str
    amount: int
    escrow: int
    time_limit: int


@dataclass(frozen=True, slots=True)
class JobSettled(Event):
    """A job was settled: `paid` to the provider, `fee` to the treasury, the rest refunded."""

    job_id: int
    provider: str
    customer: str
    billed_seconds: int
    paid: int
    fee: int
    refunded: int


@dataclass(frozen=True, slots=True)
class JobCollected(Event):
    """An interim payment of a running job; `escrow` and `time_limit` are what remains."""

    job_id: int
    provider: str
    customer: str
    billed_seconds: int
    paid: int
    fee: int
    escrow: int
    time_limit: int


@dataclass(frozen=True, slots=True)
class JobRetried(Event):
    """A job is retried: its escrow moved to a successor job, without payment or refund."""

    job_id: int
    successor: int
    escrow: int


@dataclass(frozen=True, slots=True)
class JobResult(Event):
    """A provider's report of a job's end."""

    job_id: int
    exit_code: int
    result: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class JobRequeued(Event):
    """A job was returned to PENDING."""

    job_id: int
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class JobPanicked(Event):
    """A job was moved to PANICKED."""

    job_id: int
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class TransitionSkipped(Event):
    """An item of a batch was skipped; `reason` is the selector of an error."""

    job_id: int
    status: JobStatus
    reason: bytes

    @property
    def reason_name(self) -> str:
        """Name of the error, or its selector in hex if unknown."""
        return selector_name(self.reason)


# -- MetaScheduler: providers, payments, parameters


@dataclass(frozen=True, slots=True)
class ProviderChallenged(Event):
    """A provider was challenged because of a job; it must answer by `answer_by`."""

    job_id: int
    provider: str
    by: str
    answer_by: int


@dataclass(frozen=True, slots=True)
class ProviderAnswered(Event):
    """A provider answered a challenge."""

    provider: str


@dataclass(frozen=True, slots=True)
class PaymentParked(Event):
    """A payment failed and was parked for its recipient."""

    recipient: str
    amount: int


@dataclass(frozen=True, slots=True)
class PaymentWithdrawn(Event):
    """Parked credits were withdrawn."""

    recipient: str
    to: str
    amount: int


@dataclass(frozen=True, slots=True)
class FeeChanged(Event):
    """The fee for jobs assigned from now on was changed."""

    fee_bps: int


@dataclass(frozen=True, slots=True)
class SubmissionsChanged(Event):
    """New submissions were opened or closed."""

    open: bool


# -- ERC2771Forwarder


@dataclass(frozen=True, slots=True)
class ExecutedForwardRequest(Event):
    """A signed request was executed; `success` is whether the inner call succeeded.

    Emitted after the events of the inner call.
    """

    signer: str
    nonce: int
    success: bool


# -- ProviderRegistry


@dataclass(frozen=True, slots=True)
class ProviderRegistered(Event):
    """A provider was approved for the first time and got its ID."""

    id: int
    provider: str


@dataclass(frozen=True, slots=True)
class HardwareProposed(Event):
    """A provider proposed hardware, which needs approval."""

    provider: str
    version: int
    hardware: Hardware


@dataclass(frozen=True, slots=True)
class ProviderApproved(Event):
    """A version of a provider's hardware was approved."""

    provider: str
    version: int
    hardware: Hardware
    approved_until: int


@dataclass(frozen=True, slots=True)
class OfferChanged(Event):
    """A provider changed the resources that it offers."""

    provider: str
    offer: Offer


@dataclass(frozen=True, slots=True)
class PricesChanged(Event):
    """A provider changed its prices for jobs assigned from now on."""

    provider: str
    prices: Prices


@dataclass(frozen=True, slots=True)
class LabelsChanged(Event):
    """A provider replaced its labels; `labels` holds all of them."""

    provider: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DrainingChanged(Event):
    """Maintenance began or ended."""

    provider: str
    draining: bool


@dataclass(frozen=True, slots=True)
class BanChanged(Event):
    """An approver banned a provider, or lifted the ban."""

    provider: str
    banned: bool
    reason: str


# -- Credit, and the roles of all three


@dataclass(frozen=True, slots=True)
class Transfer(Event):
    """Credits were transferred; from the zero address if minted, to it if burned."""

    sender: str
    recipient: str
    amount: int


@dataclass(frozen=True, slots=True)
class Approval(Event):
    """An owner allowed a spender to transfer up to `amount`."""

    owner: str
    spender: str
    amount: int


@dataclass(frozen=True, slots=True)
class RoleGranted(Event):
    """A role was granted to an account."""

    role: bytes
    account: str
    sender: str


@dataclass(frozen=True, slots=True)
class RoleRevoked(Event):
    """A role was revoked from an account."""

    role: bytes
    account: str
    sender: str
