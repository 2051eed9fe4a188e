"""What a relay remembers of each request, so that a crash neither repeats nor loses one."""

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
from deepsquare_chain.store.database import Database, metadata

#: Seconds after which a settled request is forgotten: its deadline is long past.
KEPT_SECONDS: Final = 7 * 86_400


class State(StrEnum):
    """Where a request stands."""

    QUEUED = "queued"  # taken; not in a transaction yet
    SENT = "sent"  # part of a batch that is, or may be, on its way
    EXECUTED = "executed"  # carried out, with its effect
    FAILED = "failed"  # carried out, but the contract refused the call: nothing of it happened
    DROPPED = "dropped"  # not carried out, and not going to be


#: Requests that may still be carried out by this relay.
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
    """A request that the relay took.

    `digest` is 0x-hexadecimal, `received` this machine's clock in seconds, `batch` the outbox key
    of its transaction, `tries` the number of transactions that passed it over.
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
    """The requests of one relay, in the service's own database."""

    def __init__(self, store: Database) -> None:
        self._store = store

    def add(self, digest: str, signed: SignedRequest, function: str) -> RelayedRequest:
        """Take a request; it survives a power cut from here on."""
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
                    requests.c.state.not_in([each.value for each in PENDING]),
                )
            )
        return RelayedRequest(
            int(number), digest, signed, function, received, State.QUEUED, "", 0, "", ""
        )

    def get(self, digest: str) -> RelayedRequest | None:
        """A request by its digest; None for one that was never taken, or is forgotten."""
        found = self._read(requests.c.digest == digest.lower())
        return found[0] if found else None

    def assign(self, numbers: Sequence[int], batch: str) -> None:
        """Make queued requests part of a batch, before its transaction is made."""
        with self._store.begin() as connection:
            connection.execute(
                update_rows(requests)
                .where(requests.c.number.in_(numbers))
                .values(state=State.SENT.value, batch=batch)
            )

    def requeue(self, numbers: Sequence[int]) -> None:
        """Give requests that a batch passed over back to the queue."""
        with self._store.begin() as connection:
            connection.execute(
                update_rows(requests)
                .where(requests.c.number.in_(numbers))
                .values(state=State.QUEUED.value, batch="", tries=requests.c.tries + 1)
            )

    def settle(self, number: int, state: State, *, tx_hash: str = "", detail: str = "") -> None:
        """Record how a request ended."""
        with self._store.begin() as connection:
            connection.execute(
                update_rows(requests)
                .where(requests.c.number == number)
                .values(state=state.value, tx_hash=tx_hash, detail=detail[:1_000])
            )

    def queued(self) -> list[RelayedRequest]:
        """All that wait for a batch, in the order in which they were taken."""
        return self._read(requests.c.state == State.QUEUED.value)

    def batches(self) -> list[str]:
        """Keys of the batches that are not settled."""
        query = select(requests.c.batch).where(requests.c.state == State.SENT.value).distinct()
        with self._store.read() as connection:
            return [str(each) for each in connection.execute(query).scalars()]

    def in_batch(self, batch: str) -> list[RelayedRequest]:
        """The unsettled requests of a batch, in order."""
        return self._read(requests.c.batch == batch, requests.c.state == State.SENT.value)

    def pending_of(self, sender: str) -> list[RelayedRequest]:
        """A customer's requests that may still be carried out."""
        states = [each.value for each in PENDING]
        return self._read(requests.c.sender == sender, requests.c.state.in_(states))

    def count_since(self, since: int, sender: str | None = None) -> int:
        """Requests taken since a moment of this machine's clock, of one customer or of all."""
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
