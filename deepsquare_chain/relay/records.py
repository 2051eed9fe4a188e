"""The relay's records of requests: crash-safe, no request is lost or executed twice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import (
    Column,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    func,
    insert,
    select,
)
from sqlalchemy import delete as delete_rows
from sqlalchemy import update as update_rows

from deepsquare_chain.chain.bindings.forwarder import ForwardRequest, SignedRequest
from deepsquare_chain.job import DAY
from deepsquare_chain.store.database import Database, metadata

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

requests: Final = Table(
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
Index("relay_requests_state", requests.c.state)
Index("relay_requests_sender", requests.c.sender, requests.c.received)
Index("relay_requests_received", requests.c.received)


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
            dropped = requests.c.state == State.DROPPED.value
            connection.execute(delete_rows(requests).where(requests.c.digest == digest, dropped))
            number = connection.execute(
                insert(requests)
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
                .returning(requests.c.number)
            ).scalar_one()
            connection.execute(
                delete_rows(requests).where(
                    requests.c.received < received - KEPT_SECONDS,
                    requests.c.state.not_in([state.value for state in PENDING]),
                )
            )
        return RelayedRequest(
            int(number), digest, signed, function, received, State.QUEUED, "", 0, "", ""
        )

    def get(self, digest: str) -> RelayedRequest | None:
        """Return a request by its digest; None if it was never accepted or is deleted."""
        rows = self._read(requests.c.digest == digest.lower())
        return rows[0] if rows else None

    def assign(self, numbers: Sequence[int], batch: str) -> None:
        """Assign queued requests to a batch, before its transaction is created."""
        with self._store.begin() as connection:
            connection.execute(
                update_rows(requests)
                .where(requests.c.number.in_(numbers))
                .values(state=State.SENT.value, batch=batch)
            )

    def requeue(self, numbers: Sequence[int]) -> None:
        """Return requests that a batch skipped to the queue."""
        with self._store.begin() as connection:
            connection.execute(
                update_rows(requests)
                .where(requests.c.number.in_(numbers))
                .values(state=State.QUEUED.value, batch="", tries=requests.c.tries + 1)
            )

    def settle(self, number: int, state: State, *, tx_hash: str = "", detail: str = "") -> None:
        """Record the final state of a request."""
        with self._store.begin() as connection:
            connection.execute(
                update_rows(requests)
                .where(requests.c.number == number)
                .values(state=state.value, tx_hash=tx_hash, detail=detail[:1_000])
            )

    def queued(self) -> list[RelayedRequest]:
        """Return the queued requests, in the order of acceptance."""
        return self._read(requests.c.state == State.QUEUED.value)

    def batches(self) -> list[str]:
        """Return the keys of unsettled batches."""
        query = select(requests.c.batch).where(requests.c.state == State.SENT.value).distinct()
        with self._store.read() as connection:
            return [str(key) for key in connection.execute(query).scalars()]

    def in_batch(self, batch: str) -> list[RelayedRequest]:
        """Return the unsettled requests of a batch, in the order of acceptance."""
        return self._read(requests.c.batch == batch, requests.c.state == State.SENT.value)

    def pending_of(self, sender: str) -> list[RelayedRequest]:
        """Return a customer's requests that may still be executed."""
        states = [state.value for state in PENDING]
        return self._read(requests.c.sender == sender, requests.c.state.in_(states))

    def count_since(self, since: int, sender: str | None = None) -> int:
        """Count requests received after `since` (local clock, seconds), of one customer or all."""
        query = select(func.count()).where(requests.c.received > since)
        if sender is not None:
            query = query.where(requests.c.sender == sender)
        with self._store.read() as connection:
            return int(connection.execute(query).scalar_one())

    def _read(self, *conditions: Any) -> list[RelayedRequest]:
        query = select(requests).where(*conditions).order_by(requests.c.number)
        with self._store.read() as connection:
            return [_request(row) for row in connection.execute(query)]


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
