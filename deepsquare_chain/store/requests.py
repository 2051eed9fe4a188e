"""Requests that a wallet signed for a relay; recorded before they are sent, so that none is lost.

Each nonce is used once among the requests that may still be executed, across all processes of
this state folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
    delete,
    insert,
    select,
)
from sqlalchemy import update as update_rows

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.forwarder import ForwardRequest, SignedRequest
from deepsquare_chain.store.base import Amount, Database, metadata


class RequestState(StrEnum):
    """State of a signed request."""

    OPEN = "open"  # signed; it may still be executed
    EXECUTED = "executed"  # executed successfully
    FAILED = "failed"  # its nonce is used, but the call reverted
    # The relay refused it, and its nonce is free for another request. Until its deadline a relay
    # that kept it may still execute it.
    REFUSED = "refused"
    EXPIRED = "expired"  # its deadline passed before it was executed
    REPLACED = "replaced"  # another request of this wallet used its nonce


_LIVE_STATES: Final = (RequestState.OPEN.value, RequestState.EXECUTED.value)

signed_requests: Final = Table(
    "signed_requests",
    metadata,
    Column("digest", String, primary_key=True),
    Column("sender", String, nullable=False),
    Column("nonce", Integer, nullable=False),
    Column("to", String, nullable=False),
    Column("value", Amount, nullable=False),
    Column("gas", Integer, nullable=False),
    Column("deadline", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("label", Text, nullable=False),
    Column("key", String, nullable=True),
    Column("state", String, nullable=False),
    Column("block", Integer, nullable=False),
    Column("tx_hash", String, nullable=False, default=""),
    Column("note", Text, nullable=False, default=""),
    Column("created", Integer, nullable=False),
)
# The key and the nonce of a request without effect are free for the next one.
Index(
    "signed_requests_key",
    signed_requests.c.key,
    unique=True,
    sqlite_where=signed_requests.c.state.in_(_LIVE_STATES),
)
Index(
    "signed_requests_nonce",
    signed_requests.c.nonce,
    unique=True,
    sqlite_where=signed_requests.c.state == RequestState.OPEN.value,
)


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A signed request of this wallet.

    `digest` is 0x-hexadecimal; `block` is the block after which it can be executed; `created`
    is the local time in epoch seconds; `key` is the caller's idempotency key.
    """

    digest: str
    signed: SignedRequest
    label: str
    key: str | None
    state: RequestState
    block: int
    tx_hash: str
    note: str
    created: int

    @property
    def call(self) -> Call:
        """The inner call."""
        request = self.signed.request
        return Call(request.to, request.data, self.label, request.value)


class RequestTables(Database):
    """The signed requests of one wallet."""

    def append_request(
        self,
        floor: int,
        sign: Callable[[int], tuple[str, SignedRequest]],
        *,
        label: str,
        block: int,
        key: str | None,
    ) -> RecordedRequest:
        """Allocate the lowest free nonce from `floor` on, sign and record, in one transaction.

        Args:
            floor: Nonce of the wallet's next request on chain.
            sign: Returns digest and signed request for a nonce.
            label: Description of the call, for display.
            block: Number of the head block.
            key: Idempotency key; unique among requests that are OPEN or EXECUTED.
        """
        table = signed_requests
        with self.begin() as connection:
            used_nonces = set(
                connection.execute(
                    select(table.c.nonce).where(
                        table.c.state == RequestState.OPEN.value, table.c.nonce >= floor
                    )
                ).scalars()
            )
            nonce = next(
                candidate
                for candidate in range(floor, floor + len(used_nonces) + 1)
                if candidate not in used_nonces
            )
            digest, signed = sign(nonce)
            request, created = signed.request, int(time.time())
            # A refused request that is signed again within the same second has the same digest.
            connection.execute(delete(table).where(table.c.digest == digest))
            connection.execute(
                insert(table).values(
                    digest=digest,
                    sender=request.sender,
                    nonce=nonce,
                    to=request.to,
                    value=request.value,
                    gas=request.gas,
                    deadline=request.deadline,
                    data=request.data,
                    signature=signed.signature,
                    label=label,
                    key=key,
                    state=RequestState.OPEN.value,
                    block=block,
                    created=created,
                )
            )
        return RecordedRequest(
            digest, signed, label, key, RequestState.OPEN, block, "", "", created
        )

    def settle_request(
        self, digest: str, state: RequestState, *, tx_hash: str = "", note: str = ""
    ) -> None:
        """Record the final state of a request."""
        # Not durable: a lost update is read from the chain again.
        with self.begin(durable=False) as connection:
            connection.execute(
                update_rows(signed_requests)
                .where(signed_requests.c.digest == digest)
                .values(state=state.value, tx_hash=tx_hash, note=note[:1_000])
            )

    def request_by_key(self, key: str) -> RecordedRequest | None:
        """Return the OPEN or EXECUTED request of an idempotency key."""
        table = signed_requests
        requests = self._requests(table.c.key == key, table.c.state.in_(_LIVE_STATES))
        return requests[0] if requests else None

    def requests_with_nonce(self, nonce: int) -> Sequence[RecordedRequest]:
        """Return all requests signed with a nonce, in any state."""
        return self._requests(signed_requests.c.nonce == nonce)

    def open_requests(self) -> Sequence[RecordedRequest]:
        """Return all OPEN requests by nonce."""
        return self._requests(signed_requests.c.state == RequestState.OPEN.value)

    def refused_requests(self) -> Sequence[RecordedRequest]:
        """Return all REFUSED requests by nonce; see `RequestState`."""
        return self._requests(signed_requests.c.state == RequestState.REFUSED.value)

    def recent_requests(self, limit: int = 50) -> Sequence[RecordedRequest]:
        """Return the latest requests of every state, newest first."""
        table = signed_requests
        return self._requests(order=(table.c.created.desc(), table.c.nonce.desc()), limit=limit)

    def _requests(
        self, *conditions: Any, order: Sequence[Any] = (), limit: int | None = None
    ) -> list[RecordedRequest]:
        query = select(signed_requests).where(*conditions)
        query = query.order_by(*(order or (signed_requests.c.nonce,))).limit(limit)
        with self.read() as connection:
            return [_recorded(row) for row in connection.execute(query)]


def _recorded(row: Any) -> RecordedRequest:
    request = ForwardRequest(
        row.sender, row.to, row.value, row.gas, row.nonce, row.deadline, row.data
    )
    return RecordedRequest(
        row.digest,
        SignedRequest(request, row.signature),
        row.label,
        row.key,
        RequestState(row.state),
        row.block,
        row.tx_hash,
        row.note,
        row.created,
    )
