"""Requests to a relay: its rules for accepting them, and its crash-safe records of them.

The rules are checked without the chain. No request is lost or executed twice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Final

from sqlalchemy import (
    Column,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)

from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.forwarder import CALLDATA_GAS, ForwardRequest, SignedRequest
from deepsquare_chain.credits import CREDIT, credit_count, format_credits
from deepsquare_chain.job import DAY
from deepsquare_chain.observability.serving import RequestRefusedError, forbidden
from deepsquare_chain.store.database import Database, metadata

# -- the rules

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
    """Limits of a relay."""

    #: Minimum escrow of each submitted job, and minimum top-up, in credit-wei.
    min_amount: int = MIN_AMOUNT
    max_gas: int = 3_000_000  # maximum gas of one inner call
    max_bytes: int = 131_072  # maximum size of the body of an HTTP request
    min_lead: int = 15  # minimum time to the deadline, in seconds of chain time
    max_lead: int = 3_600  # maximum time to the deadline, in seconds of chain time
    per_customer: int = 60  # maximum requests per hour of one customer
    per_hour: int = 2_000  # maximum requests per hour of all customers
    pending: int = 8  # maximum pending requests of one customer


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
        raise forbidden(
            f"This relay does not forward calls to {request.to}",
            code="wrong-contract",
            hint=f"It forwards calls to the MetaScheduler at {scheduler}.",
        )
    if request.value != 0:
        raise forbidden(
            "This relay does not send coin with a call", code="value", hint="Sign a value of 0."
        )
    _check_gas(request, rules)
    allowed = _allowed(request.data)
    min_amount = min_amount_of(allowed.function, rules)
    if min_amount and allowed.amount < min_amount:
        raise forbidden(
            f"{credit_count(allowed.amount)} are too few: this relay pays gas from "
            f"{format_credits(min_amount)} credits per job or top-up",
            code="amount-too-small",
            hint="Give more credits, or send the transaction yourself.",
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
        raise forbidden(
            f"The request may use {request.gas:,} gas, this relay pays {rules.max_gas:,} at most",
            code="too-much-gas",
            hint="Split it into several requests, for instance a smaller --array.",
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
        raise forbidden(
            f"This relay does not forward {function.name}",
            code="function-not-allowed",
            hint=f"It forwards {', '.join(FUNCTIONS)}.",
        )
    return AllowedCall(function.name, _amount(function.name, values))


def _amount(function: str, values: tuple[Any, ...]) -> int:
    """Return the smallest amount of the submitted jobs, or the amount of a top-up."""
    if function.startswith("submitJobs"):
        return min((int(terms[0]) for terms, _ in values[0]), default=0)
    return int(values[2]) if function.startswith("topUp") else 0


# -- the records

#: Seconds after which a settled request is deleted; its deadline has long passed.
KEPT_SECONDS: Final = 7 * DAY


class State(StrEnum):
    """State of a request."""

    QUEUED = "queued"  # accepted; not in a batch yet
    SENT = "sent"  # in a batch whose transaction is, or may be, sent
    EXECUTED = "executed"  # executed with success
    FAILED = "failed"  # executed, but the inner call reverted, without effect
    DROPPED = "dropped"  # not executed, and not retried


#: States of requests that this relay may still execute.
PENDING: Final = (State.QUEUED, State.SENT)

relay_requests: Final = Table(
    "relay_requests",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("digest", String, nullable=False, unique=True),
    Column("sender", String, nullable=False),
    Column("to", String, nullable=False),
    Column("gas", Integer, nullable=False),
    Column("nonce", String, nullable=False),
    Column("deadline", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("function", String, nullable=False),
    Column("received", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("batch", String, nullable=False, default=""),
    Column("tries", Integer, nullable=False, default=0),
    Column("tx_hash", String, nullable=False, default=""),
    Column("detail", Text, nullable=False, default=""),
)
Index("relay_requests_state", relay_requests.c.state)
Index("relay_requests_sender", relay_requests.c.sender, relay_requests.c.received)
Index("relay_requests_received", relay_requests.c.received)


@dataclass(frozen=True, slots=True)
class RelayedRequest:
    """A request that the relay accepted.

    `digest` is 0x-hexadecimal, `received` is in seconds of the local clock, `batch` is the outbox
    key (idempotency key) of its transaction, `tries` counts the transactions that skipped it.
    """

    number: int
    digest: str
    signed: SignedRequest
    function: str
    received: int
    state: State
    batch: str
    tries: int
    tx_hash: str
    detail: str


class Requests:
    """Table of the requests of one relay, in the service's own database."""

    def __init__(self, store: Database) -> None:
        self._store = store

    def add(self, digest: str, signed: SignedRequest, function: str) -> RelayedRequest:
        """Insert a request as QUEUED, durably, and delete old settled ones.

        A DROPPED request of the same digest is replaced.
        """
        request, received = signed.request, int(time.time())
        with self._store.begin() as connection:
            dropped = relay_requests.c.state == State.DROPPED.value
            connection.execute(
                delete(relay_requests).where(relay_requests.c.digest == digest, dropped)
            )
            number = connection.execute(
                insert(relay_requests)
                .values(
                    digest=digest,
                    sender=request.sender,
                    to=request.to,
                    gas=request.gas,
                    nonce=str(request.nonce),
                    deadline=request.deadline,
                    data=request.data,
                    signature=signed.signature,
                    function=function,
                    received=received,
                    state=State.QUEUED.value,
                )
                .returning(relay_requests.c.number)
            ).scalar_one()
            connection.execute(
                delete(relay_requests).where(
                    relay_requests.c.received < received - KEPT_SECONDS,
                    relay_requests.c.state.not_in([state.value for state in PENDING]),
                )
            )
        return RelayedRequest(
            int(number), digest, signed, function, received, State.QUEUED, "", 0, "", ""
        )

    def get(self, digest: str) -> RelayedRequest | None:
        """Return a request by its digest; None if it was never accepted or is deleted."""
        rows = self._read(relay_requests.c.digest == digest.lower())
        return rows[0] if rows else None

    def assign(self, numbers: Sequence[int], batch: str) -> None:
        """Assign queued requests to a batch, before its transaction is created."""
        self._update(numbers, state=State.SENT.value, batch=batch)

    def requeue(self, numbers: Sequence[int]) -> None:
        """Return requests that a batch skipped to the queue."""
        tries = relay_requests.c.tries + 1
        self._update(numbers, state=State.QUEUED.value, batch="", tries=tries)

    def settle(self, number: int, state: State, *, tx_hash: str = "", detail: str = "") -> None:
        """Record the final state of a request."""
        self._update([number], state=state.value, tx_hash=tx_hash, detail=detail[:1_000])

    def queued(self) -> list[RelayedRequest]:
        """Return the queued requests, in the order of acceptance."""
        return self._read(relay_requests.c.state == State.QUEUED.value)

    def batches(self) -> list[str]:
        """Return the keys of unsettled batches."""
        batch, state = relay_requests.c.batch, relay_requests.c.state
        query = select(batch).where(state == State.SENT.value).distinct()
        return [str(row.batch) for row in self._store.rows(query)]

    def in_batch(self, batch: str) -> list[RelayedRequest]:
        """Return the unsettled requests of a batch, in the order of acceptance."""
        return self._read(
            relay_requests.c.batch == batch, relay_requests.c.state == State.SENT.value
        )

    def pending_of(self, sender: str) -> list[RelayedRequest]:
        """Return a customer's requests that may still be executed."""
        states = [state.value for state in PENDING]
        return self._read(relay_requests.c.sender == sender, relay_requests.c.state.in_(states))

    def count_since(self, since: int, sender: str | None = None) -> int:
        """Count requests received after `since` (local clock, seconds), of one customer or all."""
        query = select(func.count()).where(relay_requests.c.received > since)
        if sender is not None:
            query = query.where(relay_requests.c.sender == sender)
        return int(self._store.scalar(query))

    def _read(self, *conditions: Any) -> list[RelayedRequest]:
        query = select(relay_requests).where(*conditions).order_by(relay_requests.c.number)
        return [_request(row) for row in self._store.rows(query)]

    def _update(self, numbers: Sequence[int], **values: Any) -> None:
        query = update(relay_requests).where(relay_requests.c.number.in_(numbers))
        self._store.write(query.values(**values))


def _request(row: Any) -> RelayedRequest:
    request = ForwardRequest(row.sender, row.to, 0, row.gas, int(row.nonce), row.deadline, row.data)
    return RelayedRequest(
        row.number,
        row.digest,
        SignedRequest(request, row.signature),
        row.function,
        row.received,
        State(row.state),
        row.batch,
        row.tries,
        row.tx_hash,
        row.detail,
    )
