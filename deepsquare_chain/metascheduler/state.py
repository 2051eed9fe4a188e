"""What the scheduler remembers: what only events tell about jobs, and signs of providers.

Everything can be lost: it is read again from the deployment's block on.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import (
    Column,
    Connection,
    Index,
    Integer,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)

from deepsquare_chain.chain import events as ev
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.job import JobStatus, Objective
from deepsquare_chain.store.database import Store, metadata

jobs: Final = Table(
    "scheduler_jobs",
    metadata,
    Column("job_id", Integer, primary_key=True),
    Column("objective", Integer, nullable=False),
    Column("uses", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("retry_of", Integer, nullable=False),
    Column("queued_at", Integer, nullable=False),
    Column("block", Integer, nullable=False),
    Column("ended_block", Integer, nullable=True),
)
Index("scheduler_jobs_live", jobs.c.ended_block)

#: Each time that a job came back from a provider's hands.
returns: Final = Table(
    "scheduler_returns",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", Integer, nullable=False, index=True),
    Column("provider", String, nullable=False),
    Column("at", Integer, nullable=False),
    Column("block", Integer, nullable=False),
)

#: The last act of a provider that nobody else could have done.
signs: Final = Table(
    "scheduler_signs",
    metadata,
    Column("provider", String, primary_key=True),
    Column("at", Integer, nullable=False),
    Column("block", Integer, nullable=False),
)

_OWN_ACTS: Final = frozenset(
    {
        JobStatus.SCHEDULED,
        JobStatus.RUNNING,
        JobStatus.FINISHED,
        JobStatus.FAILED,
        JobStatus.OUT_OF_CREDITS,
    }
)
_REGISTRY: Final = (
    ev.ProviderRegistered,
    ev.ProviderApproved,
    ev.OfferChanged,
    ev.PricesChanged,
    ev.LabelsChanged,
    ev.DrainingChanged,
    ev.BanChanged,
    ev.HardwareProposed,
)
_SELF_TOLD: Final = (
    ev.PricesChanged,
    ev.LabelsChanged,
    ev.DrainingChanged,
    ev.HardwareProposed,
    ev.ProviderAnswered,
)

#: Events that the scheduler follows.
FOLLOWED: Final = (
    ev.JobSubmitted,
    ev.JobTransition,
    ev.JobRetried,
    ev.JobToppedUp,
    ev.ProviderAnswered,
    *_REGISTRY,
)


@dataclass(frozen=True, slots=True)
class Known:
    """What events told about a job; `queued_at` is chain time, of the first of its line.

    `returned` holds, by provider account, how often and when last the job came back from it.
    """

    job_id: int
    objective: Objective
    uses: str
    name: str
    retry_of: int
    queued_at: int
    returned: dict[str, tuple[int, int]] = field(default_factory=dict)


class SchedulerState:
    """Tables of one scheduler in its store, which must be opened after this module's import."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: Set by registry events; whoever reads the providers again clears it.
        self.registry_changed = True
        #: Jobs whose records have changed, and whether any may have; cleared likewise.
        self.touched: set[int] = set()
        self.all_touched = True

    def apply(self, batch: Batch, connection: Connection) -> None:
        """Take in what a follower read; its cursor moves in the same transaction."""
        if batch.rolled_back_to is not None:
            self._roll_back(batch.rolled_back_to, connection)
        for event in batch.events:
            if isinstance(event, _REGISTRY):
                self.registry_changed = True
            if isinstance(event, ev.JobTransition | ev.JobToppedUp):
                self.touched.add(event.job_id)
            self._apply(event, batch.time, connection)

    def live(self) -> dict[int, Known]:
        """All jobs that have not ended, by id."""
        query = select(jobs).where(jobs.c.ended_block.is_(None)).order_by(jobs.c.job_id)
        back = select(returns).where(
            returns.c.job_id.in_(select(jobs.c.job_id).where(jobs.c.ended_block.is_(None)))
        )
        with self._store.read() as connection:
            known = {row.job_id: _known(row) for row in connection.execute(query)}
            counted: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
            for row in connection.execute(back):
                counted[row.job_id, row.provider].append(row.at)
        for (job_id, provider), times in counted.items():
            if job_id in known:
                known[job_id].returned[provider] = len(times), max(times)
        return known

    def highest(self) -> int:
        """The highest job id that events told, zero before the first."""
        with self._store.read() as connection:
            return int(connection.execute(select(func.max(jobs.c.job_id))).scalar() or 0)

    def last_signs(self) -> dict[str, int]:
        """Chain time of the last sign of each provider, by account."""
        with self._store.read() as connection:
            return {row.provider: row.at for row in connection.execute(select(signs))}

    # -- events

    def _apply(self, event: ev.Event, time: int, connection: Connection) -> None:
        if isinstance(event, ev.JobSubmitted):
            terms = event.terms
            self._know(
                connection,
                event.job_id,
                objective=int(terms.objective),
                uses=terms.uses,
                name=terms.name,
                retry_of=0,
                queued_at=time,
                block=event.block_number,
            )
        elif isinstance(event, ev.JobRetried):
            self._inherit(event, connection)
        elif isinstance(event, ev.JobTransition):
            self._moved(event, time, connection)
        elif isinstance(event, _SELF_TOLD):
            self._saw(event.provider, time, event.block_number, connection)

    def _know(self, connection: Connection, job_id: int, **values: Any) -> None:
        connection.execute(delete(jobs).where(jobs.c.job_id == job_id))
        connection.execute(insert(jobs).values(job_id=job_id, **values))

    def _inherit(self, event: ev.JobRetried, connection: Connection) -> None:
        """A successor wants what its predecessor wanted, and has waited as long."""
        row = connection.execute(select(jobs).where(jobs.c.job_id == event.job_id)).one_or_none()
        if row is None:
            return
        self._know(
            connection,
            event.successor,
            objective=row.objective,
            uses=row.uses,
            name=row.name,
            retry_of=event.job_id,
            queued_at=row.queued_at,
            block=event.block_number,
        )

    def _moved(self, event: ev.JobTransition, time: int, connection: Connection) -> None:
        block = event.block_number
        if event.after in _OWN_ACTS:
            self._saw(event.provider, time, block, connection)
        if event.after.is_final:
            query = update(jobs).where(jobs.c.job_id == event.job_id)
            connection.execute(query.values(ended_block=block))
        elif event.after == JobStatus.PENDING and event.before != JobStatus.NONE:
            values = {"job_id": event.job_id, "provider": event.provider, "at": time}
            connection.execute(insert(returns).values(block=block, **values))

    def _saw(self, provider: str, time: int, block: int, connection: Connection) -> None:
        connection.execute(delete(signs).where(signs.c.provider == provider))
        connection.execute(insert(signs).values(provider=provider, at=time, block=block))

    def _roll_back(self, block: int, connection: Connection) -> None:
        connection.execute(delete(jobs).where(jobs.c.block > block))
        query = update(jobs).where(jobs.c.ended_block > block)
        connection.execute(query.values(ended_block=None))
        connection.execute(delete(returns).where(returns.c.block > block))
        connection.execute(delete(signs).where(signs.c.block > block))
        self.registry_changed = self.all_touched = True


def _known(row: Any) -> Known:
    return Known(
        job_id=row.job_id,
        objective=Objective(row.objective),
        uses=row.uses,
        name=row.name,
        retry_of=row.retry_of,
        queued_at=row.queued_at,
    )
