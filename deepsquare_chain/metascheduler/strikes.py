"""Strikes: failures of a provider that another account had to resolve, from events.

Two transitions count. The contract allows both only if the provider failed, so that nobody can
forge a strike:

- a META_SCHEDULED job requeued by another account: the claim timeout had passed;
- a RUNNING job panicked by another account: the provider was silent, or its report overdue.

A job that the provider returns itself is no strike, and neither is a claimed job that is requeued:
a cluster is allowed to queue jobs. Failures within a minute (`Watch.strike_gap`) are one strike,
however many jobs an outage affects. If the database is lost, strikes are read from events again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import (
    Column,
    Connection,
    Integer,
    String,
    Table,
    bindparam,
    delete,
    insert,
    select,
    update,
)

from deepsquare_chain.chain.bindings import event_types as ev
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.job import JobStatus
from deepsquare_chain.store.database import Store, metadata

#: `at` is the chain time of the last block of the batch: the event's block, or a later one.
#: `dated` is 1 if it is the time of the event's block.
strikes: Final = Table(
    "scheduler_strikes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("provider", String, nullable=False),
    Column("job_id", Integer, nullable=False),
    Column("at", Integer, nullable=False, index=True),
    Column("dated", Integer, nullable=False),
    Column("block", Integer, nullable=False, index=True),
)

FOLLOWED: Final = (ev.JobTransition, ev.JobRequeued, ev.JobPanicked)
_NEGLECTED_STATUSES: Final = {
    ev.JobRequeued: (JobStatus.META_SCHEDULED, JobStatus.PENDING),
    ev.JobPanicked: (JobStatus.RUNNING, JobStatus.PANICKED),
}


class Strikes:
    """The strikes in a scheduler's database, which is opened after this module is imported."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def apply(self, batch: Batch, connection: Connection) -> None:
        """Apply a follower's batch."""
        if batch.rolled_back_to is not None:
            connection.execute(delete(strikes).where(strikes.c.block > batch.rolled_back_to))
        rows = _strikes_of(batch)
        if rows:
            connection.execute(insert(strikes), rows)

    def undated(self, since: int) -> list[int]:
        """Return the blocks of strikes after chain time `since` whose own time is unknown."""
        query = select(strikes.c.block).where(strikes.c.at > since, strikes.c.dated == 0)
        with self._store.read() as connection:
            return sorted({row.block for row in connection.execute(query)})

    def date(self, times: Mapping[int, int]) -> None:
        """Set the chain times of blocks."""
        if not times:
            return
        values = [{"which": block, "time": time} for block, time in times.items()]
        query = update(strikes).where(strikes.c.block == bindparam("which"))
        with self._store.begin() as connection:
            connection.execute(query.values(at=bindparam("time"), dated=1), values)

    def since(self, since: int) -> dict[str, list[int]]:
        """Return the chain times of strikes after `since`, in order, by provider account."""
        query = select(strikes).where(strikes.c.at > since).order_by(strikes.c.at)
        times: defaultdict[str, list[int]] = defaultdict(list)
        with self._store.read() as connection:
            for row in connection.execute(query):
                times[row.provider].append(row.at)
        return dict(times)


def _strikes_of(batch: Batch) -> list[dict[str, Any]]:
    """Return the strikes of a batch. The event after a transition names the sending account."""
    last_transitions: dict[int, ev.JobTransition] = {}
    rows = []
    for event in batch.events:
        if isinstance(event, ev.JobTransition):
            last_transitions[event.job_id] = event
        elif isinstance(event, ev.JobRequeued | ev.JobPanicked):
            transition = last_transitions.get(event.job_id)
            if transition is None or event.by == transition.provider:
                continue
            if (transition.before, transition.after) == _NEGLECTED_STATUSES[type(event)]:
                rows.append(
                    {
                        "provider": transition.provider,
                        "job_id": event.job_id,
                        "at": batch.time,
                        "dated": int(batch.from_block == batch.to_block),
                        "block": event.block_number,
                    }
                )
    return rows
