"""Strikes: what a provider neglected and others had to clean up, as the chain tells it.

Two things count, both lawful only when the provider failed, so that nobody can make one up:

- a META_SCHEDULED job that somebody else requeued: its time to claim ran out;
- a RUNNING job that somebody else panicked: the provider was silent, or its report overdue.

What a provider gives back by itself is none, and neither is a claimed job that is taken back: a
cluster may queue lawfully. What comes within a minute (`Watch.strike_gap`) is one strike, however
many jobs a breakdown takes along. All of it is read from events again if the database is lost.
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

from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.job import JobStatus
from deepsquare_chain.store.database import Store, metadata

#: `at` is the chain time of the end of what was read at once: the block's own, or later.
#: `dated` says that it is the block's own.
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
_NEGLECTED: Final = {
    ev.JobRequeued: (JobStatus.META_SCHEDULED, JobStatus.PENDING),
    ev.JobPanicked: (JobStatus.RUNNING, JobStatus.PANICKED),
}


class Strikes:
    """The strikes in a scheduler's database, which is opened after this module's import."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def apply(self, batch: Batch, connection: Connection) -> None:
        """Take in what a follower read."""
        if batch.rolled_back_to is not None:
            connection.execute(delete(strikes).where(strikes.c.block > batch.rolled_back_to))
        found = _found(batch)
        if found:
            connection.execute(insert(strikes), found)

    def undated(self, since: int) -> list[int]:
        """Blocks after chain time `since` whose own time is not known."""
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
        """Chain times after `since`, in order, by account of the provider."""
        query = select(strikes).where(strikes.c.at > since).order_by(strikes.c.at)
        found: defaultdict[str, list[int]] = defaultdict(list)
        with self._store.read() as connection:
            for row in connection.execute(query):
                found[row.provider].append(row.at)
        return dict(found)


def _found(batch: Batch) -> list[dict[str, Any]]:
    """Rows of a batch: who did it stands in the event that follows the transition."""
    last: dict[int, ev.JobTransition] = {}
    found = []
    for event in batch.events:
        if isinstance(event, ev.JobTransition):
            last[event.job_id] = event
        elif isinstance(event, ev.JobRequeued | ev.JobPanicked):
            left = last.get(event.job_id)
            if left is None or event.by == left.provider:
                continue
            if (left.before, left.after) == _NEGLECTED[type(event)]:
                found.append(
                    {
                        "provider": left.provider,
                        "job_id": event.job_id,
                        "at": batch.time,
                        "dated": int(batch.from_block == batch.to_block),
                        "block": event.block_number,
                    }
                )
    return found
