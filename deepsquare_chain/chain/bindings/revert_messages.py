"""Readable messages and hints for the contracts' custom errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from deepsquare_chain.chain.bindings.roles import role_name
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import GridError, InsufficientFundsError, NotAuthorisedError
from deepsquare_chain.job import JobStatus

Fields = Mapping[str, Any]

#: Additional base classes of errors, so that callers and exit codes need no list of names.
KINDS: Final[Mapping[str, type[GridError]]] = MappingProxyType(
    {
        "ERC20InsufficientBalance": InsufficientFundsError,
        "ERC20InsufficientAllowance": InsufficientFundsError,
        "AccessControlUnauthorizedAccount": NotAuthorisedError,
        "NotCustomer": NotAuthorisedError,
        "NotAssignedProvider": NotAuthorisedError,
        "NotRegistered": NotAuthorisedError,
        "ProviderBanned": NotAuthorisedError,
    }
)


def status_name(value: Any) -> str:
    """Return the name of a status number, or the number if it is unknown."""
    try:
        return JobStatus(value).name
    except ValueError:
        return str(value)


def _text(value: Any) -> str:
    """Decode a short string from bytes32."""
    return bytes(value).rstrip(b"\0").decode("utf-8", "replace")


_SENTENCES: Final[Mapping[str, Callable[[Fields], str]]] = MappingProxyType(
    {
        "InvalidTransition": lambda f: (
            f"Job {f['job_id']} does not exist"
            if f["from"] == 0
            else f"Job {f['job_id']} is {status_name(f['to'])} already"
            if f["from"] == f["to"]
            else f"Job {f['job_id']} is {status_name(f['from'])} and can't become "
            f"{status_name(f['to'])}"
        ),
        "NotCustomer": lambda f: f"Job {f['job_id']} belongs to another customer",
        "NotAssignedProvider": lambda f: f"Job {f['job_id']} is not assigned to this provider",
        "TooEarly": lambda f: f"It is too early for this action on job {f['job_id']}",
        "NotLost": lambda f: f"Job {f['job_id']} is not lost; only its provider can return it",
        "SelfSchedulingForbidden": lambda f: (
            f"The customer of job {f['job_id']} does not let providers assign it to themselves"
        ),
        "PriceRaised": lambda f: (
            f"The provider's price for job {f['job_id']} rose after the assignment was decided"
        ),
        "InterimPaymentsForbidden": lambda f: (
            f"The customer of job {f['job_id']} does not allow interim payments"
        ),
        "AllotmentUsedUp": lambda f: f"The allotment of job {f['job_id']} is used up",
        "RunLost": lambda f: (
            f"The run of job {f['job_id']} is lost, so that nothing can be collected"
        ),
        "ERC2771ForwarderExpiredRequest": lambda _: "The signed request has expired",
        "ERC2771ForwarderInvalidSigner": lambda f: (
            f"The request is signed by {f['signer']} and says it is from {f['from']}; or its nonce "
            "is used up"
        ),
        "ERC2771UntrustfulTarget": lambda f: (
            f"{f['target']} does not accept calls through the forwarder {f['forwarder']}"
        ),
        "ProviderNotActive": lambda f: (
            f"The provider for job {f['job_id']} is not active, or its approval has expired"
        ),
        "ProviderSilent": lambda f: (
            f"The provider for job {f['job_id']} has an unanswered challenge"
        ),
        "ProviderExcluded": lambda f: f"The provider can't get job {f['job_id']} again",
        "DoesNotFit": lambda f: (
            f"Job {f['job_id']} does not fit the provider's hardware, or its offer less its load"
        ),
        "RateOutOfRange": lambda f: (
            f"The provider's prices give no valid rate for job {f['job_id']}"
        ),
        "OverBudget": lambda f: (
            f"The credits of job {f['job_id']} do not buy its time limit at the provider's prices"
        ),
        "EmptyBatch": lambda _: "The batch is empty",
        "SubmissionsClosed": lambda _: "This deployment takes no new jobs",
        "InvalidTerms": lambda f: f"The job's {_text(f['field'])} is out of bounds",
        "WrongStatus": lambda f: (
            f"Job {f['job_id']} is {status_name(f['status'])}, which does not allow this"
        ),
        "TopUpTooSmall": lambda f: (
            f"A top-up of {format_credits(f['amount'])} credits is too small for job "
            f"{f['job_id']}: at least {format_credits(f['min'])}"
        ),
        "TopUpTooLarge": lambda f: f"Job {f['job_id']} can't hold that many credits",
        "TopUpTooLate": lambda f: (
            f"Job {f['job_id']} is about to end, so that its end can't change any more"
        ),
        "ChallengeRefused": lambda f: (
            f"The provider of job {f['job_id']} is already challenged, or answered a challenge recently"
        ),
        "NothingToAnswer": lambda _: "This provider has no open challenge",
        "NothingParked": lambda _: "This account has no parked credits",
        "OutOfBounds": lambda f: (
            f"{_text(f['parameter'])} is {f['value']}, allowed are {f['min']} to {f['max']}"
        ),
        "InvalidAddress": lambda f: f"The address for {_text(f['parameter'])} is not usable",
        "NotRegistered": lambda f: f"{f['account']} is not registered as a provider",
        "ProviderBanned": lambda f: f"The provider {f['provider']} is banned",
        "NotApproved": lambda f: f"The provider {f['provider']} was never approved",
        "InvalidHardware": lambda _: "Hardware needs nodes, cpus and memory, within the bounds",
        "OfferTooLarge": lambda f: (
            f"An offer of {f['cpus']} cpus, {f['memory_mb']} MB and {f['gpus']} gpus is more than "
            "the approved hardware"
        ),
        "PriceTooHigh": lambda f: (
            f"A price of {format_credits(f['price'])} credits per second is above the cap of "
            f"{format_credits(f['cap'])}"
        ),
        "TooManyLabels": lambda f: f"{f['count']} labels are too many, {f['max']} are allowed",
        "InvalidLabel": lambda f: f"Label number {f['index'] + 1} is too long or not key=value",
        "VersionMismatch": lambda f: (
            f"Version {f['version']} of {f['provider']} can't be approved, its proposal is version "
            f"{f['pending']}"
        ),
        "ERC20InsufficientBalance": lambda f: (
            f"{f['sender']} has {format_credits(f['balance'])} credits, "
            f"{format_credits(f['needed'])} are needed"
        ),
        "ERC20InsufficientAllowance": lambda f: (
            f"The contract may take {format_credits(f['allowance'])} credits, "
            f"{format_credits(f['needed'])} are needed"
        ),
        "AccessControlUnauthorizedAccount": lambda f: (
            f"{f['account']} does not have {role_name(f['needed_role'])}, which this needs"
        ),
        "ERC20InvalidReceiver": lambda f: f"{f['receiver']} can't receive credits",
        "ERC2612ExpiredSignature": lambda _: "The permit has expired",
    }
)

HINTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "InvalidTransition": "See the job with `deepsquare job get`.",
        "WrongStatus": "See the job with `deepsquare job get`.",
        "NotCustomer": "Use the wallet that submitted the job.",
        "TooEarly": "Wait for the timeout, then try again.",
        "NotLost": "Challenge its provider first, and wait for the lost timeout.",
        "AllotmentUsedUp": "Report the end of the run; that bills it.",
        "PriceRaised": "Decide again at the current prices.",
        "ERC2771ForwarderExpiredRequest": "Sign again.",
        "ERC2771ForwarderInvalidSigner": "Sign again with the current nonce.",
        "OverBudget": "Give the job more credits or a shorter time limit.",
        "DoesNotFit": "Ask for fewer resources, or choose another provider.",
        "SubmissionsClosed": "Use the record of the deployment that replaced it.",
        "InvalidTerms": "Correct it in the job file.",
        "TopUpTooSmall": "Give more credits.",
        "TopUpTooLate": "Submit the rest as a new job.",
        "NotRegistered": "Check the address; an account joins by `deepsquare provider register`.",
        "NotApproved": "Wait for the approver.",
        "ProviderBanned": "Ask the approver of this deployment.",
        "OfferTooLarge": "Offer less, or register more hardware and wait for its approval.",
        "ERC20InsufficientBalance": "Get credits: `deepsquare credit faucet` on a devnet.",
        "ERC20InsufficientAllowance": "Allow more with `deepsquare credit approve`.",
        "AccessControlUnauthorizedAccount": "Use a wallet with that role, or ask the administrator to grant it.",
        "ERC20InvalidReceiver": "Check the address.",
        "ERC2612ExpiredSignature": "Sign again.",
    }
)


def sentence(name: str, fields: Fields) -> str:
    """Return a readable message for a custom error; never raises, for any values of the fields."""
    template = _SENTENCES.get(name)
    if template is not None:
        try:
            return template(fields)
        except (KeyError, TypeError, ValueError):
            pass
    values = ", ".join(f"{key} {_shown(value)}" for key, value in fields.items())
    return f"The contract rejected the call: {name}" + (f" ({values})" if values else "")


def _shown(value: Any) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)[:100]
