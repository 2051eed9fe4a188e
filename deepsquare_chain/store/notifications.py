"""Tables of notifications: those requested in job files, and the state of their delivery."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from pydantic_core import from_json, to_json
from sqlalchemy import (
    Column,
    Connection,
    Integer,
    Row,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as insert_or

from deepsquare_chain.job import JobStatus
from deepsquare_chain.notification import JobEvent, Notify, Occasion
from deepsquare_chain.store.base import Database, metadata

# In the database of a wallet: requests in submitted job files, by digest of the definition.
requests: Final = Table(
    "notify_requests",
    metadata,
    Column("definition", String, primary_key=True),
    Column("targets", Text, nullable=False),
    Column("occasions", Text, nullable=False),
)

# In the database of the service.
events: Final = Table(
    "notify_events",
    metadata,
    Column("id", String, primary_key=True),
    Column("job_id", Integer, nullable=False),
    Column("before", Integer, nullable=False),
    Column("after", Integer, nullable=False),
    Column("block", Integer, nullable=False),
    Column("time", Integer, nullable=False),
    Column("is_open", Integer, nullable=False),
)
deliveries: Final = Table(
    "notify_deliveries",
    metadata,
    Column("event_id", String, primary_key=True),
    Column("target", String, primary_key=True),
    Column("message", Text, nullable=False),
    Column("state", String, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due", Integer, nullable=False),
    Column("note", Text, nullable=False),
)


class DeliveryState(StrEnum):
    """State of the delivery of a notification."""

    DUE = "due"  # not sent yet, or to be retried
    SENDING = "sending"  # being sent
    SENT = "sent"  # accepted by the recipient's server
    FAILED = "failed"  # refused permanently
    UNKNOWN = "unknown"  # interrupted while being sent; never retried, as it may have arrived


@dataclass(frozen=True, slots=True)
class Delivery:
    """One notification to one recipient; `due` is the local time in epoch seconds."""

    event_id: str
    target: str
    message: str
    state: DeliveryState = DeliveryState.DUE
    attempts: int = 0
    due: int = 0
    note: str = ""


def remember_notify(store: Database, definitions: Iterable[str], notify: Notify) -> None:
    """Store a job file's request for notifications of its definitions (hexadecimal digests).

    It replaces earlier requests for them; without recipients, they are only removed.
    """
    digests = list(dict.fromkeys(definitions))
    rows = [
        {
            "definition": digest,
            "targets": to_json(notify.to).decode(),
            "occasions": to_json(notify.on).decode(),
        }
        for digest in digests
    ]
    with store.begin() as connection:
        connection.execute(delete(requests).where(requests.c.definition.in_(digests)))
        if notify.to:
            connection.execute(insert(requests), rows)


def requested_notify(store: Database, definition: str) -> Notify:
    """Return the request for notifications of a definition; without recipients if there is none."""
    for row in store.rows(select(requests).where(requests.c.definition == definition)):
        occasions = tuple(Occasion(occasion) for occasion in from_json(row.occasions))
        return Notify(tuple(from_json(row.targets)), occasions)
    return Notify()


class NotificationTables:
    """Tables of events and deliveries in the service's database."""

    def __init__(self, store: Database) -> None:
        self._store = store

    def add(self, transaction: Connection, job_events: Iterable[JobEvent]) -> None:
        """Store events; existing ones, e.g. from before a reorg, are not changed."""
        for event in job_events:
            values = insert_or(events).values(is_open=1, **asdict(event))
            transaction.execute(values.on_conflict_do_nothing())

    def open_events(self) -> list[JobEvent]:
        """Return the events without planned deliveries, oldest first."""
        query = select(events).where(events.c.is_open == 1).order_by(events.c.block, events.c.id)
        return [_event(row) for row in self._store.rows(query)]

    def plan(self, event_id: str, planned: Sequence[Delivery]) -> None:
        """Store the deliveries of an event, and close the event."""
        with self._store.begin() as connection:
            for delivery in planned:
                values = insert_or(deliveries).values(asdict(delivery) | {"event_id": event_id})
                connection.execute(values.on_conflict_do_nothing())
            connection.execute(update(events).where(events.c.id == event_id).values(is_open=0))

    def due(self, now: int, limit: int) -> list[Delivery]:
        """Return the deliveries that are due, the longest due first."""
        query = (
            select(deliveries)
            .where(deliveries.c.state == DeliveryState.DUE.value, deliveries.c.due <= now)
            .order_by(deliveries.c.due, deliveries.c.event_id)
            .limit(limit)
        )
        return [_delivery(row) for row in self._store.rows(query)]

    def latest(self, limit: int, customer: str = "") -> list[tuple[JobEvent, Delivery]]:
        """Return the latest events with their deliveries, newest first; of one customer if given."""
        query = (
            select(events, deliveries)
            .join(deliveries, deliveries.c.event_id == events.c.id)
            .order_by(events.c.block.desc(), events.c.id, deliveries.c.target)
            .limit(limit)
        )
        if customer:
            owner = func.json_extract(deliveries.c.message, "$.job.customer")
            query = query.where(func.lower(owner) == customer.lower())
        return [(_event(row), _delivery(row)) for row in self._store.rows(query)]

    def counts(self) -> dict[DeliveryState, int]:
        """Return the number of deliveries by state."""
        query = select(deliveries.c.state, func.count()).group_by(deliveries.c.state)
        count_by_state = {DeliveryState(state): count for state, count in self._store.rows(query)}
        return {member: count_by_state.get(member, 0) for member in DeliveryState}

    def drop(self, before: int) -> None:
        """Remove events of chain times before `before`, and their deliveries that are not due."""
        old = select(events.c.id).where(events.c.time < before, events.c.is_open == 0)
        settled = deliveries.c.state.not_in([DeliveryState.DUE.value, DeliveryState.SENDING.value])
        left = select(deliveries.c.event_id)
        self._store.write(
            delete(deliveries).where(deliveries.c.event_id.in_(old), settled),
            delete(events).where(events.c.id.in_(old), events.c.id.not_in(left)),
            durable=False,
        )

    def begin(self, delivery: Delivery) -> None:
        """Record the intent to send, before the first byte is sent."""
        self._set(delivery, state=DeliveryState.SENDING.value, attempts=delivery.attempts + 1)

    def end(self, delivery: Delivery, state: DeliveryState, note: str = "", due: int = 0) -> None:
        """Record the result of a delivery."""
        self._set(delivery, state=state.value, note=note[:300], due=due)

    def give_up_unclear(self) -> int:
        """Mark deliveries that a crash interrupted as UNKNOWN; returns their number."""
        interrupted = update(deliveries).where(deliveries.c.state == DeliveryState.SENDING.value)
        note = "the service ended before the response"
        with self._store.begin() as connection:
            result = connection.execute(
                interrupted.values(state=DeliveryState.UNKNOWN.value, note=note)
            )
            return int(result.rowcount)

    def _set(self, delivery: Delivery, **values: object) -> None:
        key = deliveries.c.event_id == delivery.event_id, deliveries.c.target == delivery.target
        self._store.write(update(deliveries).where(*key).values(**values))


def _event(row: Row[Any]) -> JobEvent:
    before, after = JobStatus(row.before), JobStatus(row.after)
    return JobEvent(row.id, row.job_id, before, after, row.block, row.time)


def _delivery(row: Row[Any]) -> Delivery:
    state = DeliveryState(row.state)
    return Delivery(row.event_id, row.target, row.message, state, row.attempts, row.due, row.note)
