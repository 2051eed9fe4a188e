"""Reverts of the contracts as typed exceptions: one class per custom error of our ABIs.

`from deepsquare_chain.chain.bindings.reverts import TooEarly` works for every error; its fields are
attributes in snake case (`error.job_id`). Errors about money are also `InsufficientFundsError`,
those about roles also `NotAuthorisedError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, ClassVar, Final

from eth_utils.crypto import keccak

from deepsquare_chain.chain.bindings.abi import (
    AbiError,
    decode_values,
    interfaces,
    signature_of,
    snake_case,
)
from deepsquare_chain.chain.bindings.deployment import role_name
from deepsquare_chain.credits import credit_count, format_credits
from deepsquare_chain.errors import (
    GridError,
    InsufficientFundsError,
    NotAuthorisedError,
    RevertedError,
)
from deepsquare_chain.job import JobStatus

# -- readable messages and hints for the contracts' custom errors

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


#: Formats of fields in messages, by their name; other fields are shown as they are.
_FORMATS: Final[Mapping[str, Callable[[Any], str]]] = MappingProxyType(
    {
        **dict.fromkeys(("allowance", "amount", "balance", "needed"), credit_count),
        **dict.fromkeys(("cap", "price"), format_credits),
        **dict.fromkeys(("field", "parameter"), _text),
        "needed_role": role_name,
        "status": status_name,
    }
)

#: Templates with the error's fields in braces, or functions of all fields.
_SENTENCES: Final[Mapping[str, str | Callable[[Fields], str]]] = MappingProxyType(
    {
        "InvalidTransition": lambda f: (
            f"Job {f['job_id']} does not exist"
            if f["from"] == 0
            else f"Job {f['job_id']} is {status_name(f['to'])} already"
            if f["from"] == f["to"]
            else f"Job {f['job_id']} is {status_name(f['from'])} and can't become "
            f"{status_name(f['to'])}"
        ),
        "NotCustomer": "Job {job_id} belongs to another customer",
        "NotAssignedProvider": "Job {job_id} is not assigned to this provider",
        "TooEarly": "It is too early for this action on job {job_id}",
        "NotLost": "Job {job_id} is not lost; only its provider can return it",
        "SelfSchedulingForbidden": "The customer of job {job_id} does not let providers assign it to themselves",
        "PriceRaised": "The provider's price for job {job_id} rose after the assignment was decided",
        "InterimPaymentsForbidden": "The customer of job {job_id} does not allow interim payments",
        "AllotmentUsedUp": "The allotment of job {job_id} is used up",
        "RunLost": "The run of job {job_id} is lost, so that nothing can be collected",
        "ERC2771ForwarderExpiredRequest": "The signed request has expired",
        "ERC2771ForwarderInvalidSigner": "The request is signed by {signer}, but its sender is {from}; or its nonce was used",
        "ERC2771UntrustfulTarget": "{target} does not accept calls through the forwarder {forwarder}",
        "ProviderNotActive": "The provider for job {job_id} is not active, or its approval has expired",
        "ProviderSilent": "The provider for job {job_id} has an unanswered challenge",
        "ProviderExcluded": "The provider can't get job {job_id} again",
        "DoesNotFit": "Job {job_id} does not fit the provider's hardware, or its offer less its load",
        "RateOutOfRange": "The provider's prices give no valid rate for job {job_id}",
        "OverBudget": "The credits of job {job_id} do not buy its time limit at the provider's prices",
        "EmptyBatch": "The batch is empty",
        "SubmissionsClosed": "This deployment does not accept new jobs",
        "InvalidTerms": "The job's {field} is out of bounds",
        "WrongStatus": "Job {job_id} is {status}, which does not allow this",
        "TopUpTooSmall": lambda f: (
            f"A top-up of {credit_count(f['amount'])} is too small for job "
            f"{f['job_id']}: at least {format_credits(f['min'])}"
        ),
        "TopUpTooLarge": "The escrow of job {job_id} can't be that large",
        "TopUpTooLate": "Job {job_id} is about to end, so that its end can't change any more",
        "ChallengeRefused": "The provider of job {job_id} is already challenged, or answered a challenge recently",
        "NothingToAnswer": "This provider has no open challenge",
        "NothingParked": "This account has no credits to withdraw",
        "OutOfBounds": "{parameter} is {value}, allowed are {min} to {max}",
        "InvalidAddress": "The address for {parameter} is not usable",
        "NotRegistered": "{account} is not registered as a provider",
        "ProviderBanned": "The provider {provider} is banned",
        "NotApproved": "The provider {provider} was never approved",
        "InvalidHardware": "Hardware needs nodes, CPUs and memory, within the bounds",
        "OfferTooLarge": "An offer of {cpus} CPUs, {memory_mb} MB and {gpus} GPUs is more than the approved hardware",
        "PriceTooHigh": "A price of {price} credits per second is above the cap of {cap}",
        "TooManyLabels": "{count} labels are too many, {max} are allowed",
        "InvalidLabel": lambda f: f"Label number {f['index'] + 1} is too long or not key=value",
        "VersionMismatch": "Version {version} of {provider} can't be approved, its proposal is version {pending}",
        "ERC20InsufficientBalance": "{sender} has {balance}, less than the {needed} needed",
        "ERC20InsufficientAllowance": "The contract may take {allowance}, less than the {needed} needed",
        "AccessControlUnauthorizedAccount": "{account} does not have {needed_role}, which this needs",
        "ERC20InvalidReceiver": "{receiver} can't receive credits",
        "ERC2612ExpiredSignature": "The permit has expired",
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
        "TopUpTooLate": "Submit a new job.",
        "NotRegistered": "Check the address; an account joins by `deepsquare provider register`.",
        "NotApproved": "Wait for the approver.",
        "ProviderBanned": "Ask the approver of this deployment.",
        "OfferTooLarge": "Offer less, or register more hardware and wait for its approval.",
        "ERC20InsufficientBalance": "Get credits from a holder or the grid's minter; on a devnet with `deepsquare credit faucet`.",
        "ERC20InsufficientAllowance": "Allow more with `deepsquare credit approve`.",
        "AccessControlUnauthorizedAccount": "Use a wallet with that role, or ask the administrator to grant it.",
        "ERC20InvalidReceiver": "Check the address.",
        "ERC2612ExpiredSignature": "Sign again.",
        "NotAssignedProvider": "Use the wallet of the job's provider; `deepsquare job get` shows it.",
        "SelfSchedulingForbidden": "Leave the job to the grid's scheduler.",
        "InterimPaymentsForbidden": "Report the end of the run; that bills it.",
        "RunLost": "Nothing can be done: the customer gets the credits back.",
        "ERC2771UntrustfulTarget": "Use a relay of this deployment, or pay the gas yourself.",
        "ProviderNotActive": "`deepsquare provider status --all` shows which providers are active.",
        "ProviderSilent": "It gets jobs again when it answers.",
        "ProviderExcluded": "Choose another provider.",
        "RateOutOfRange": "Choose another provider, or ask this one to correct its prices.",
        "EmptyBatch": "Name at least one job.",
        "TopUpTooLarge": "Give fewer credits.",
        "ChallengeRefused": "Try again after the response timeout, which `deepsquare admin params` shows.",
        "NothingToAnswer": "Nothing needs to be done.",
        "NothingParked": "Nothing needs to be done: payments arrive in `deepsquare credit balance`.",
        "OutOfBounds": "Give a value within these bounds.",
        "InvalidAddress": "Check the address of the contract, or of the treasury.",
        "InvalidHardware": "Correct the hardware options of `deepsquare provider register`.",
        "PriceTooHigh": "Set a lower price; prices are per hour in `deepsquare provider price`.",
        "TooManyLabels": "Remove some with `deepsquare provider labels`.",
        "InvalidLabel": "Write key=value, in at most 128 bytes.",
        "VersionMismatch": "Approve the proposed version, after looking at its hardware.",
    }
)


def sentence(name: str, fields: Fields) -> str:
    """Return a readable message for a custom error; never raises, for any values of the fields."""
    template = _SENTENCES.get(name)
    with suppress(KeyError, TypeError, ValueError):
        if isinstance(template, str):
            shown = {key: _FORMATS.get(key, str)(value) for key, value in fields.items()}
            return template.format_map(shown)
        if template is not None:
            return template(fields)
    values = ", ".join(f"{key} {_shown(value)}" for key, value in fields.items())
    return f"The contract rejected the call: {name}" + (f" ({values})" if values else "")


def _shown(value: Any) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)[:100]


_ERROR_STRING: Final = keccak(text="Error(string)")[:4]
_PANIC: Final = keccak(text="Panic(uint256)")[:4]


class ContractError(RevertedError):
    """A custom error of a contract; `fields` holds its values by name."""

    signature: ClassVar[str] = ""
    selector: ClassVar[bytes] = b""
    inputs: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __init__(
        self, message: str = "", *, hint: str = "", fields: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message or type(self).__name__, hint=hint)
        self.fields = dict(fields or {})

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    @classmethod
    def from_data(cls, data: bytes) -> ContractError:
        """Decode revert data of this error.

        Raises:
            AbiError: The data does not hold the error's fields.
        """
        values = decode_values(cls.inputs, data[4:])
        names = (snake_case(part["name"]) for part in cls.inputs)
        fields = dict(zip(names, values, strict=True))
        name = cls.__name__
        return cls(sentence(name, fields), hint=HINTS.get(name, ""), fields=fields)


class UnknownRevertError(RevertedError):
    """A revert with no custom error of our contracts; `data` is the revert data."""

    def __init__(self, message: str, *, hint: str = "", data: bytes = b"") -> None:
        super().__init__(message, hint=hint)
        self.data = data


def _build() -> dict[bytes, type[ContractError]]:
    classes: dict[bytes, type[ContractError]] = {}
    names: set[str] = set()
    # The scheduler's errors keep their names; an error of the same name elsewhere gets a prefix.
    for contract in sorted(interfaces(), key=lambda interface: interface.name != "MetaScheduler"):
        for entry in contract.entries("error"):
            signature = signature_of(entry)
            selector = keccak(text=signature)[:4]
            if selector in classes:
                continue
            name = entry["name"]
            if name in names:
                name = f"{contract.name.removeprefix('Provider')}{name}"
            names.add(name)
            base = KINDS.get(name)
            bases = (ContractError,) if base is None else (ContractError, base)
            body: dict[str, Any] = {
                "__module__": __name__,
                "__doc__": f"`{signature}`",
                "signature": signature,
                "selector": selector,
                "inputs": tuple(entry["inputs"]),
            }
            if base is not None:
                body["exit_code"] = base.exit_code
            classes[selector] = type(name, bases, body)
    return classes


#: All custom errors by their selector.
ERRORS: Final[Mapping[bytes, type[ContractError]]] = _build()
_BY_NAME: Final = {error.__name__: error for error in ERRORS.values()}


def __getattr__(name: str) -> type[ContractError]:
    try:
        return _BY_NAME[name]
    except KeyError:
        raise AttributeError(f"no contract has an error {name}") from None


def selector_name(selector: bytes) -> str:
    """Return the name of the error with this selector (`TransitionSkipped.reason`), or its hex."""
    error = ERRORS.get(bytes(selector[:4]))
    return error.__name__ if error else "0x" + bytes(selector).hex()


def decode_revert(source: object) -> RevertedError:
    """Convert a revert to the typed exception.

    Args:
        source: Bytes, hex text, or an exception: web3's ContractCustomError, ContractLogicError
            and Web3RPCError, eth-tester's TransactionFailed. A RevertedError is returned as it is.
    """
    if isinstance(source, RevertedError):
        return source
    data = revert_data(source)
    if data is None:
        message = str(getattr(source, "message", None) or source)[:300]
        return UnknownRevertError(f"The contract rejected the call: {message}")
    try:
        return _decode(data)
    except AbiError:
        return UnknownRevertError(
            f"The contract rejected the call with 0x{data[:36].hex()}", data=data
        )


def _decode(data: bytes) -> RevertedError:
    selector, encoded = data[:4], data[4:]
    error = ERRORS.get(selector)
    if error is not None:
        return error.from_data(data)
    if not data:
        return UnknownRevertError("The contract rejected the call without a reason")
    if selector == _ERROR_STRING:
        (text,) = decode_values(({"type": "string"},), encoded)
        return UnknownRevertError(f"The contract rejected the call: {text[:300]}", data=data)
    if selector == _PANIC:
        (code,) = decode_values(({"type": "uint256"},), encoded)
        return UnknownRevertError(f"The contract failed with panic 0x{code:02x}", data=data)
    raise AbiError("it is not a known error")


_HEX: Final = re.compile(r"0x([0-9a-fA-F]{8}(?:[0-9a-fA-F]{2})*)")


def revert_data(source: object) -> bytes | None:
    """Return the revert data of an exception or error object; None if there is none."""
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if isinstance(source, str):
        return _from_text(source)
    if isinstance(source, Mapping):
        return revert_data(source.get("data"))
    if not isinstance(source, BaseException):
        return None
    response = getattr(source, "rpc_response", None)
    body = response.get("error") if isinstance(response, Mapping) else None
    candidates = (getattr(source, "data", None), body, *source.args)
    return next(
        (data for candidate in candidates if (data := revert_data(candidate)) is not None), None
    )


def _from_text(text: str) -> bytes | None:
    """Decode hex, or a bytes literal as in eth-tester's messages; None for other text."""
    if match := _HEX.fullmatch(text.strip().removeprefix("Reverted ")):
        return bytes.fromhex(match[1])
    if text[:2] in ("b'", 'b"') and text[-1:] == text[1]:
        with suppress(UnicodeDecodeError, UnicodeEncodeError):
            return text[2:-1].encode("latin-1").decode("unicode_escape").encode("latin-1")
    return None
