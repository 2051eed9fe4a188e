"""Tables of what a wallet signed, recorded before it is sent: transactions, and requests to a relay."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import (
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    Row,
    Select,
    String,
    Table,
    Text,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.forwarder import ForwardRequest, SignedRequest
from deepsquare_chain.chain.transactions.outbox import Attempt, Entry, TxState
from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.store.base import Amount, Database, attempts, metadata, outbox

#: Number of nonces after which settled transactions without an idempotency key are deleted.
KEPT_NONCES = 2_000
_LIST_HINT = "`deepsquare tx list` lists the sent transactions; each state folder has its own list."
# Built once: SQLAlchemy takes longer to build these statements than SQLite to execute them.
_ENTRIES: Final = select(outbox).order_by(outbox.c.nonce, outbox.c.id)
_ENTRY: Final = _ENTRIES.where(outbox.c.id == bindparam("entry_id"))
_OPEN: Final = _ENTRIES.where(outbox.c.state == TxState.OPEN.value)
_FROM_NONCE: Final = _ENTRIES.where(
    outbox.c.nonce >= bindparam("nonce"), outbox.c.state != TxState.ABANDONED.value
)
_BY_KEY: Final = _ENTRIES.where(
    outbox.c.key == bindparam("key"), outbox.c.state.in_((TxState.OPEN.value, TxState.MINED.value))
)
_BY_HASH: Final = _ENTRIES.where(
    outbox.c.id.in_(select(attempts.c.entry_id).where(attempts.c.tx_hash == bindparam("tx_hash")))
)
_RECENT: Final = select(outbox).order_by(outbox.c.id.desc()).limit(bindparam("limit"))
_ATTEMPTS: Final = (
    select(attempts)
    .where(attempts.c.entry_id.in_(bindparam("entry_ids", expanding=True)))
    .order_by(attempts.c.number)
)
_USED_NONCES: Final = select(outbox.c.nonce).where(
    outbox.c.nonce >= bindparam("floor"), outbox.c.state != TxState.ABANDONED.value
)
_SET_STATE: Final = (
    update(outbox)
    .where(outbox.c.id == bindparam("entry_id"))
    .values({name: bindparam(f"new_{name}") for name in ("state", "mined_hash", "note", "fee")})
)
_OLD_IDS: Final = select(outbox.c.id).where(
    outbox.c.nonce
    < select(outbox.c.nonce).where(outbox.c.id == bindparam("entry_id")).scalar_subquery()
    - bindparam("kept"),
    outbox.c.state != TxState.OPEN.value,
    outbox.c.key.is_(None),
)


class OutboxTables(Database):
    """Implements `deepsquare_chain.chain.transactions.outbox.Outbox`."""

    def append(
        self, call: Call, gas: int, floor: int, sign: Callable[[int], Attempt], key: str | None
    ) -> Entry:
        """Allocate the lowest free nonce from `floor` on, sign and record, in one transaction."""
        with self.begin() as connection:
            nonce, created = _free_nonce(connection, floor, _USED_NONCES), int(time.time())
            attempt = sign(nonce)
            values = {"nonce": nonce, "key": key, "gas": gas, "created": created, **asdict(call)}
            query = insert(outbox).values(state=TxState.OPEN.value, **values).returning(outbox.c.id)
            entry_id = int(connection.execute(query).scalar_one())
            _insert_attempt(connection, entry_id, 0, attempt)
        return Entry(entry_id, nonce, call, gas, TxState.OPEN, (attempt,), key=key, created=created)

    def add_attempt(self, entry_id: int, attempt: Attempt) -> None:
        """Record a replacement transaction."""
        with self.begin() as connection:
            count = connection.execute(
                select(func.count()).where(attempts.c.entry_id == entry_id)
            ).scalar_one()
            _insert_attempt(connection, entry_id, count, attempt)

    def set_state(
        self,
        entry_id: int,
        state: TxState,
        *,
        mined_hash: str = "",
        note: str = "",
        fee: int | None = None,
    ) -> None:
        """Record the state of an entry; old settled entries are deleted."""
        # Not durable: a lost update is read from the chain again.
        with self.begin(durable=False) as connection:
            connection.execute(
                _SET_STATE,
                {
                    "entry_id": entry_id,
                    "new_state": state.value,
                    "new_mined_hash": mined_hash,
                    "new_note": note[:1_000],
                    "new_fee": fee,
                },
            )
            if state in (TxState.MINED, TxState.FAILED, TxState.CANCELLED):
                _forget(connection, entry_id)

    def entry(self, entry_id: int) -> Entry:
        """Return an entry.

        Raises:
            NotFoundError: The entry was deleted, or never existed.
        """
        entries = self._entries(_ENTRY, entry_id=entry_id)
        if not entries:
            raise NotFoundError(
                f"This state folder has no transaction {entry_id} of this wallet", hint=_LIST_HINT
            )
        return entries[0]

    def by_key(self, key: str) -> Entry | None:
        """Return the OPEN or MINED entry of an idempotency key."""
        entries = self._entries(_BY_KEY, key=key)
        return entries[0] if entries else None

    def open_entries(self) -> Sequence[Entry]:
        """Return all OPEN entries by nonce."""
        return self._entries(_OPEN)

    def entries_from(self, nonce: int) -> Sequence[Entry]:
        """Return all entries from a nonce on, except ABANDONED ones."""
        return self._entries(_FROM_NONCE, nonce=nonce)

    def recent_entries(self, limit: int = 50) -> Sequence[Entry]:
        """Return the latest entries of every state, newest first, for display."""
        return sorted(self._entries(_RECENT, limit=limit), key=lambda entry: -entry.id)

    def by_hash(self, tx_hash: str) -> Entry:
        """Return the entry with an attempt of this hash.

        Raises:
            NotFoundError: There is none.
        """
        entries = self._entries(_BY_HASH, tx_hash=tx_hash.lower())
        if not entries:
            raise NotFoundError(
                f"This state folder has no transaction {tx_hash} of this wallet", hint=_LIST_HINT
            )
        return entries[-1]

    def spent(self) -> Sequence[tuple[int, int]]:
        """Return time recorded (epoch seconds) and fee (wei) of the latest paid transactions."""
        query = (
            select(outbox.c.created, outbox.c.fee)
            .where(outbox.c.fee.is_not(None), outbox.c.created.is_not(None))
            .order_by(outbox.c.id.desc())
            .limit(KEPT_NONCES)
        )
        return [(row.created, row.fee) for row in self.rows(query)]

    def _entries(self, query: Select[Any], **values: Any) -> list[Entry]:
        with self.read() as connection:
            rows = connection.execute(query, values).all()
            attempts_by_entry = _attempts(connection, [row.id for row in rows])
        return [_entry(row, attempts_by_entry[row.id]) for row in rows]


def _free_nonce(connection: Connection, floor: int, used: Select[Any]) -> int:
    """Return the lowest nonce from `floor` on that the query of used nonces does not return."""
    used_nonces = set(connection.execute(used, {"floor": floor}).scalars())
    return next(nonce for nonce in itertools.count(floor) if nonce not in used_nonces)


def _insert_attempt(connection: Connection, entry_id: int, number: int, attempt: Attempt) -> None:
    connection.execute(insert(attempts).values(entry_id=entry_id, number=number, **asdict(attempt)))


def _forget(connection: Connection, entry_id: int) -> None:
    old = connection.execute(_OLD_IDS, {"entry_id": entry_id, "kept": KEPT_NONCES}).scalars().all()
    if old:
        connection.execute(delete(attempts).where(attempts.c.entry_id.in_(old)))
        connection.execute(delete(outbox).where(outbox.c.id.in_(old)))


def _attempts(connection: Connection, ids: Sequence[int]) -> Mapping[int, list[Attempt]]:
    attempts_by_entry: dict[int, list[Attempt]] = {entry_id: [] for entry_id in ids}
    if not ids:
        return attempts_by_entry
    for row in connection.execute(_ATTEMPTS, {"entry_ids": ids}):
        fees = row.max_fee, row.priority_fee
        attempt = Attempt(row.tx_hash, row.raw, *fees, row.sent_block, bool(row.cancels))
        attempts_by_entry[row.entry_id].append(attempt)
    return attempts_by_entry


def _entry(row: Row[Any], tried: Sequence[Attempt]) -> Entry:
    return Entry(
        id=row.id,
        nonce=row.nonce,
        call=Call(to=row.to, data=row.data, label=row.label, value=row.value),
        gas=row.gas,
        state=TxState(row.state),
        attempts=tuple(tried),
        mined_hash=row.mined_hash,
        note=row.note,
        key=row.key,
        created=row.created or 0,
        fee=row.fee,
    )


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
_USED_REQUEST_NONCES: Final = select(signed_requests.c.nonce).where(
    signed_requests.c.nonce >= bindparam("floor"),
    signed_requests.c.state == RequestState.OPEN.value,
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
            key: Idempotency key; unique among requests that are OPEN or EXECUTED.
        """
        table = signed_requests
        with self.begin() as connection:
            nonce = _free_nonce(connection, floor, _USED_REQUEST_NONCES)
            digest, signed = sign(nonce)
            created = int(time.time())
            # A refused request that is signed again within the same second has the same digest.
            connection.execute(delete(table).where(table.c.digest == digest))
            connection.execute(
                insert(table).values(
                    digest=digest,
                    **asdict(signed.request),
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
        query = update(signed_requests).where(signed_requests.c.digest == digest)
        values = {"state": state.value, "tx_hash": tx_hash, "note": note[:1_000]}
        self.write(query.values(**values), durable=False)

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
        return [_recorded(row) for row in self.rows(query)]


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
