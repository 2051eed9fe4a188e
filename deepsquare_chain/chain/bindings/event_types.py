"""Events of the three contracts as frozen dataclasses, in the order of the contracts' fields.

Inside the grid nobody sees a log dict. `before` and `after` are the `from` and `to` of the
contracts. Amounts are credit-wei, times seconds of chain time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepsquare_chain.chain.bindings.reverts import selector_name
from deepsquare_chain.job import Hardware, JobStatus, Offer, Prices, Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Where an event stands; `address` is the contract that spoke."""

    block_number: int = 0
    block_hash: str = ""
    tx_hash: str = ""
    log_index: int = 0
    address: str = ""

    @property
    def place(self) -> tuple[int, int]:
        """Order on the chain."""
        return self.block_number, self.log_index


# -- MetaScheduler: jobs


@dataclass(frozen=True, slots=True)
class JobSubmitted(Event):
    """A customer paid `terms.amount` into escrow; the only place that holds name and uses."""

    job_id: int
    customer: str
    definition: bytes
    terms: Terms


@dataclass(frozen=True, slots=True)
class JobTransition(Event):
    """The one event of every status change; `provider` is the zero address while there is none."""

    job_id: int
    customer: str
    provider: str
    before: JobStatus
    after: JobStatus


@dataclass(frozen=True, slots=True)
class JobPriced(Event):
    """Rate and fee of a job were fixed at its assignment."""

    job_id: int
    provider: str
    rate: int
    fee_bps: int


@dataclass(frozen=True, slots=True)
class JobToppedUp(Event):
    """Escrow and limit are the new ones."""

    job_id: int
    payer: str
    amount: int
    escrow: int
    time_limit: int


@dataclass(frozen=True, slots=True)
class JobSettled(Event):
    """The escrow was divided: `paid` to the provider, `fee` to the treasury, the rest back."""

    job_id: int
    provider: str
    customer: str
    billed_seconds: int
    paid: int
    fee: int
    refunded: int


@dataclass(frozen=True, slots=True)
class JobCollected(Event):
    """A run was billed while it goes on; escrow and limit are what is left."""

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
    """A successor carries the escrow; neither payment nor refund."""

    job_id: int
    successor: int
    escrow: int


@dataclass(frozen=True, slots=True)
class JobResult(Event):
    """What a provider says of a job's end."""

    job_id: int
    exit_code: int
    result: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class JobRequeued(Event):
    """A job went back to PENDING."""

    job_id: int
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class JobPanicked(Event):
    """A job was given up."""

    job_id: int
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class TransitionSkipped(Event):
    """An item of a batch was left out; `reason` is the selector of an error."""

    job_id: int
    status: JobStatus
    reason: bytes

    @property
    def reason_name(self) -> str:
        """Name of the error."""
        return selector_name(self.reason)


# -- MetaScheduler: providers, payments, parameters


@dataclass(frozen=True, slots=True)
class ProviderChallenged(Event):
    """A provider's clock was started over a job; it has until `answer_by`."""

    job_id: int
    provider: str
    by: str
    answer_by: int


@dataclass(frozen=True, slots=True)
class ProviderAnswered(Event):
    """A provider showed that it is there."""

    provider: str


@dataclass(frozen=True, slots=True)
class PaymentParked(Event):
    """A recipient could not be paid."""

    recipient: str
    amount: int


@dataclass(frozen=True, slots=True)
class PaymentWithdrawn(Event):
    """Parked credits were taken out."""

    recipient: str
    to: str
    amount: int


@dataclass(frozen=True, slots=True)
class FeeChanged(Event):
    """The fee for jobs assigned from now on."""

    fee_bps: int


@dataclass(frozen=True, slots=True)
class SubmissionsChanged(Event):
    """New submissions were opened or closed."""

    open: bool


# -- ERC2771Forwarder


@dataclass(frozen=True, slots=True)
class ExecutedForwardRequest(Event):
    """A signed request was carried out; `success` says whether the inner call was accepted.

    Logged after the events of the inner call.
    """

    signer: str
    nonce: int
    success: bool


# -- ProviderRegistry


@dataclass(frozen=True, slots=True)
class ProviderRegistered(Event):
    """A provider was approved for the first time and got its id."""

    id: int
    provider: str


@dataclass(frozen=True, slots=True)
class HardwareProposed(Event):
    """Hardware awaits approval."""

    provider: str
    version: int
    hardware: Hardware


@dataclass(frozen=True, slots=True)
class ProviderApproved(Event):
    """A version came into force."""

    provider: str
    version: int
    hardware: Hardware
    approved_until: int


@dataclass(frozen=True, slots=True)
class OfferChanged(Event):
    """What the provider gives to the grid."""

    provider: str
    offer: Offer


@dataclass(frozen=True, slots=True)
class PricesChanged(Event):
    """Prices for jobs assigned from now on."""

    provider: str
    prices: Prices


@dataclass(frozen=True, slots=True)
class LabelsChanged(Event):
    """All labels of the provider."""

    provider: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DrainingChanged(Event):
    """Maintenance began or ended."""

    provider: str
    draining: bool


@dataclass(frozen=True, slots=True)
class BanChanged(Event):
    """The approver shut the provider out, or let it in."""

    provider: str
    banned: bool
    reason: str


# -- Credit, and the roles of all three


@dataclass(frozen=True, slots=True)
class Transfer(Event):
    """Credits moved; minted from, burned to the zero address."""

    sender: str
    recipient: str
    amount: int


@dataclass(frozen=True, slots=True)
class Approval(Event):
    """A spender may take up to `amount`."""

    owner: str
    spender: str
    amount: int


@dataclass(frozen=True, slots=True)
class RoleGranted(Event):
    """An account got a role."""

    role: bytes
    account: str
    sender: str


@dataclass(frozen=True, slots=True)
class RoleRevoked(Event):
    """An account lost a role."""

    role: bytes
    account: str
    sender: str
