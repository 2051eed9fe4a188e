"""Which requests a relay takes: contract, functions, amounts, gas and times; no look at the chain."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.forwarder import CALLDATA_GAS, ForwardRequest, SignedRequest
from deepsquare_chain.credits import CREDIT, format_credits
from deepsquare_chain.observability.serving import RequestRefusedError

#: Functions of the MetaScheduler that a relay may carry.
FUNCTIONS: Final = (
    "submitJobs",
    "submitJobsWithPermit",
    "topUp",
    "topUpWithPermit",
    "cancel",
    "withdraw",
)
#: Least escrow of a job and least top-up by default, in credit-wei.
MIN_AMOUNT: Final = CREDIT // 100
#: Gas that the forwarder spends on one request around its inner call, calldata apart.
REQUEST_GAS: Final = 60_000


@dataclass(frozen=True, slots=True)
class RelayRules:
    """Limits of a relay.

    Attributes:
        min_amount: Least escrow of each submitted job, and least top-up, in credit-wei.
        max_gas: Most gas of one inner call.
        max_bytes: Longest body of an HTTP request.
        min_lead: Seconds of chain time that a deadline must at least be away.
        max_lead: Seconds of chain time that it may at most be away.
        per_customer: Requests of one customer in an hour.
        per_hour: Requests of all customers in an hour.
        pending: Requests of one customer that are not carried out yet.
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
    """A call that the rules allow; `amount` is in credit-wei, of the smallest job or of the top-up."""

    function: str
    amount: int


def check(signed: SignedRequest, scheduler: str, rules: RelayRules) -> AllowedCall:
    """Judge a request by itself; its signature, nonce and deadline apart.

    Raises:
        RequestRefusedError: It calls something else, pays too little, or is too large.
    """
    request = signed.request
    if request.to != scheduler:
        raise _forbidden(
            f"This relay carries no calls to {request.to}",
            "wrong-contract",
            f"It carries calls to the MetaScheduler at {scheduler}.",
        )
    if request.value != 0:
        raise _forbidden("This relay sends no coin with a call", "value", "Sign a value of 0.")
    _check_gas(request, rules)
    allowed = _allowed(request.data)
    least = min_amount_of(allowed.function, rules)
    if least and allowed.amount < least:
        raise _forbidden(
            f"{format_credits(allowed.amount)} credits are too few: this relay pays gas from "
            f"{format_credits(least)} credits per job or top-up",
            "amount-too-small",
            "Give more credits, or send the transaction yourself.",
        )
    return allowed


def min_amount_of(function: str, rules: RelayRules) -> int:
    """The least amount of a function's call, in credit-wei; zero where it pays none in."""
    return rules.min_amount if function.startswith(("submitJobs", "topUp")) else 0


def check_deadline(request: ForwardRequest, now: int, rules: RelayRules) -> None:
    """Judge the deadline at a chain time in seconds.

    Raises:
        RequestRefusedError: It has passed or is too near, or it is too far away.
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
            f"The request's deadline is {left} s away, this relay takes {rules.max_lead} s at most",
            code="deadline-too-far",
            status=HTTPStatus.BAD_REQUEST,
            hint="Sign a nearer deadline.",
        )


def gas_of(signed: SignedRequest) -> int:
    """Gas that a request may take within a batch: the inner call's limit and what is around it."""
    size = len(signed.request.data) + len(signed.signature) + 12 * 32
    # A call leaves a 64th of the gas behind, which the forwarder checks.
    inner = signed.request.gas * 64 // 63
    # The data is sent as calldata, and copied once for the inner call.
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
            f"The request's data is no call of the MetaScheduler: {str(error)[:200]}",
            code="not-a-call",
            status=HTTPStatus.BAD_REQUEST,
            hint=f"This relay carries {', '.join(FUNCTIONS)}.",
        ) from None
    if function.name not in FUNCTIONS:
        raise _forbidden(
            f"This relay carries no {function.name}",
            "function-not-allowed",
            f"It carries {', '.join(FUNCTIONS)}.",
        )
    return AllowedCall(function.name, _amount(function.name, values))


def _amount(function: str, values: tuple[Any, ...]) -> int:
    """The least amount among the jobs of a submission, or the amount of a top-up."""
    if function.startswith("submitJobs"):
        return min((int(terms[0]) for terms, _ in values[0]), default=0)
    return int(values[2]) if function.startswith("topUp") else 0


def _forbidden(message: str, code: str, hint: str) -> RequestRefusedError:
    return RequestRefusedError(message, code=code, status=HTTPStatus.FORBIDDEN, hint=hint)
