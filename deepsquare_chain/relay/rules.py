"""Rules for requests: contract, functions, amounts, gas and deadline. Checked without the chain."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.forwarder import CALLDATA_GAS, ForwardRequest, SignedRequest
from deepsquare_chain.credits import CREDIT, credit_count, format_credits
from deepsquare_chain.observability.serving import RequestRefusedError

#: Functions of the MetaScheduler that a relay may call.
FUNCTIONS: Final = (
    "submitJobs",
    "submitJobsWithPermit",
    "topUp",
    "topUpWithPermit",
    "cancel",
    "withdraw",
)
#: Default minimum of a job's escrow and of a top-up, in credit-wei.
MIN_AMOUNT: Final = CREDIT // 100
#: Gas overhead of the forwarder per request, without the inner call and calldata.
REQUEST_GAS: Final = 60_000


@dataclass(frozen=True, slots=True)
class RelayRules:
    """Limits of a relay.

    Attributes:
        min_amount: Minimum escrow of each submitted job, and minimum top-up, in credit-wei.
        max_gas: Maximum gas of one inner call.
        max_bytes: Maximum size of the body of an HTTP request.
        min_lead: Minimum time to the deadline, in seconds of chain time.
        max_lead: Maximum time to the deadline, in seconds of chain time.
        per_customer: Maximum requests per hour of one customer.
        per_hour: Maximum requests per hour of all customers.
        pending: Maximum pending requests of one customer.
    """

    min_amount: int = MIN_AMOUNT
    max_gas: int = 3_000_000
    max_bytes: int = 131_072
    min_lead: int = 15
    max_lead: int = 3_600
    per_customer: int = 60
    per_hour: int = 2_000
    pending: int = 8


@dataclass(frozen=True, slots=True)
class AllowedCall:
    """An allowed call; `amount` is that of the smallest job or of the top-up, in credit-wei."""

    function: str
    amount: int


def check(signed: SignedRequest, scheduler: str, rules: RelayRules) -> AllowedCall:
    """Check a request against the rules, except for its signature, nonce and deadline.

    Raises:
        RequestRefusedError: Its call is not allowed, its amount too small, or its gas too high.
    """
    request = signed.request
    if request.to != scheduler:
        raise _forbidden(
            f"This relay contains no calls to {request.to}",
            "wrong-contract",
            f"It forwards calls to the MetaScheduler at {scheduler}.",
        )
    if request.value != 0:
        raise _forbidden("This relay does not send coin with a call", "value", "Sign a value of 0.")
    _check_gas(request, rules)
    allowed = _allowed(request.data)
    min_amount = min_amount_of(allowed.function, rules)
    if min_amount and allowed.amount < min_amount:
        raise _forbidden(
            f"{credit_count(allowed.amount)} are too few: this relay pays gas from "
            f"{format_credits(min_amount)} credits per job or top-up",
            "amount-too-small",
            "Give more credits, or send the transaction yourself.",
        )
    return allowed


def min_amount_of(function: str, rules: RelayRules) -> int:
    """Return the minimum amount of a call, in credit-wei; zero for functions that do not pay."""
    return rules.min_amount if function.startswith(("submitJobs", "topUp")) else 0


def check_deadline(request: ForwardRequest, now: int, rules: RelayRules) -> None:
    """Check the deadline of a request against the chain time `now`, in seconds.

    Raises:
        RequestRefusedError: The deadline has passed, is too near, or is too far away.
    """
    left = request.deadline - now
    if left < rules.min_lead:
        raise RequestRefusedError(
            "The request has expired" if left < 0 else f"The request expires in {left} s",
            code="expired",
            status=HTTPStatus.BAD_REQUEST,
            hint=f"Sign a deadline at least {rules.min_lead} s away in chain time.",
        )
    if left > rules.max_lead:
        raise RequestRefusedError(
            f"The request's deadline is {left} s away, this relay accepts at most {rules.max_lead} s",
            code="deadline-too-far",
            status=HTTPStatus.BAD_REQUEST,
            hint="Sign an earlier deadline.",
        )


def gas_of(signed: SignedRequest) -> int:
    """Return the maximum gas of a request in a batch: the inner call's limit and the overhead."""
    size = len(signed.request.data) + len(signed.signature) + 12 * 32
    # A call can use at most 63/64 of the remaining gas (EIP-150), which the forwarder checks.
    inner = signed.request.gas * 64 // 63
    # The data is paid as calldata, and copied once for the inner call.
    return inner + REQUEST_GAS + (CALLDATA_GAS + 4) * size


def _check_gas(request: ForwardRequest, rules: RelayRules) -> None:
    if request.gas > rules.max_gas:
        raise _forbidden(
            f"The request may use {request.gas:,} gas, this relay pays {rules.max_gas:,} at most",
            "too-much-gas",
            "Split it into several requests, for instance a smaller --array.",
        )


def _allowed(data: bytes) -> AllowedCall:
    try:
        function, values = interface("MetaScheduler").read_call(data)
    except AbiError as error:
        raise RequestRefusedError(
            f"The request's data is not a call of the MetaScheduler: {str(error)[:200]}",
            code="not-a-call",
            status=HTTPStatus.BAD_REQUEST,
            hint=f"This relay forwards {', '.join(FUNCTIONS)}.",
        ) from None
    if function.name not in FUNCTIONS:
        raise _forbidden(
            f"This relay does not forward {function.name}",
            "function-not-allowed",
            f"It forwards {', '.join(FUNCTIONS)}.",
        )
    return AllowedCall(function.name, _amount(function.name, values))


def _amount(function: str, values: tuple[Any, ...]) -> int:
    """Return the smallest amount of the submitted jobs, or the amount of a top-up."""
    if function.startswith("submitJobs"):
        return min((int(terms[0]) for terms, _ in values[0]), default=0)
    return int(values[2]) if function.startswith("topUp") else 0


def _forbidden(message: str, code: str, hint: str) -> RequestRefusedError:
    return RequestRefusedError(message, code=code, status=HTTPStatus.FORBIDDEN, hint=hint)
