"""The scheduler's database: data of jobs, strikes and last signs of providers, from events.

The database can be deleted: the scheduler rebuilds it from the deployment's block on.

Strikes are failures of a provider that another account had to resolve. Two transitions count. The
contract allows both only if the provider failed, so that nobody can forge a strike:

- a META_SCHEDULED job requeued by another account: the claim timeout had passed;
- a RUNNING job panicked by another account: the provider was silent, or its report overdue.

A job that the provider returns itself is no strike, and neither is a claimed job that is requeued:
a cluster is allowed to queue jobs. Failures within a minute (`Watch.strike_gap`) are one strike,
however many jobs an outage affects.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.job import JobStatus, Objective
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.past_starts import PastStarts
from deepsquare_chain.metascheduler.runs import FOLLOWED as RUN_EVENTS
from deepsquare_chain.metascheduler.runs import ObservedRuns
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

_STRIKE_EVENTS: Final = (ev.JobTransition, ev.JobRequeued, ev.JobPanicked)
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

#: Each return of a job from a provider to PENDING.
returns: Final = Table(
    "scheduler_returns",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", Integer, nullable=False, index=True),
    Column("provider", String, nullable=False),
    Column("at", Integer, nullable=False),
    Column("block", Integer, nullable=False),
)

#: The last sign of each provider: an action that only the provider can take.
signs: Final = Table(
    "scheduler_signs",
    metadata,
    Column("provider", String, primary_key=True),
    Column("at", Integer, nullable=False),
    Column("block", Integer, nullable=False),
)

#: Statuses that only the provider of a job can set.
_SET_BY_PROVIDER: Final = frozenset(status for status in JobStatus if status.is_reported) | {
    JobStatus.SCHEDULED,
    JobStatus.RUNNING,
}
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
_PROVIDER_ACTIONS: Final = (
    ev.PricesChanged,
    ev.LabelsChanged,
    ev.DrainingChanged,
    ev.HardwareProposed,
    ev.ProviderAnswered,
    ev.JobCollected,
)

#: Most ids in one statement.
_CHUNK: Final = 500

#: Events that the scheduler follows.
FOLLOWED: Final = (
    ev.JobSubmitted,
    ev.JobTransition,
    ev.JobRetried,
    ev.JobToppedUp,
    ev.JobCollected,
    ev.ProviderAnswered,
    *_REGISTRY,
    *_STRIKE_EVENTS,
    *RUN_EVENTS,
)
#: Name of the cursor of the scheduler's follower.
CURSOR: Final = "metascheduler"


@dataclass(frozen=True, slots=True)
class Known:
    """Data of a live job from events.

    `queued_at` is the chain time at which the job, or the first job of its retries, was submitted.
    `returned` maps provider accounts to the number of returns to PENDING and the last one's time.
    """

    job_id: int
    objective: Objective
    uses: str
    name: str
    retry_of: int
    queued_at: int
    returned: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(slots=True)
class _Effects:
    """The changes of a batch of events, collected to be written in a few statements."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)
    returned: list[dict[str, Any]] = field(default_factory=list)
    signs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, connection: Connection) -> None:
        """Write all changes. Existing rows are replaced."""
        _replace(connection, jobs, jobs.c.job_id, self.rows)
        _replace(connection, signs, signs.c.provider, self.signs)
        if self.returned:
            connection.execute(insert(returns), self.returned)
        if self.ended:
            query = update(jobs).where(jobs.c.job_id == bindparam("which"))
            values = [{"which": job_id, "at": block} for job_id, block in self.ended.items()]
            connection.execute(query.values(ended_block=bindparam("at")), values)


class SchedulerState:
    """Tables of one scheduler in its store, which must be opened after this module is imported."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.strikes = Strikes(store)
        self.runs = ObservedRuns(store)
        #: Set by a reader that shows forecasts; a scheduler does not spend time and memory on it.
        self.past_starts: PastStarts | None = None
        #: Set by registry events; cleared by the reader of the provider records.
        self.registry_changed = True
        #: Jobs whose records changed, and whether any record may have; cleared by their reader.
        self.touched: set[int] = set()
        self.all_touched = True
        self._live: dict[int, Known] | None = None
        self._stale: set[int] = set()
        if self.runs.is_new():
            self._begin()

    def _begin(self) -> None:
        """Clear all tables and rewind the cursor: a database of an earlier version lacks runs."""
        with self._store.begin() as connection:
            for table in (jobs, returns, signs, strikes):
                connection.execute(delete(table))
            self.runs.begin(connection)
            self._store.rewind(connection, CURSOR, -1)

    def history(self) -> RunHistory:
        """Return the history of finished runs, used to estimate run times."""
        return self.runs.history()

    def apply(self, batch: Batch, connection: Connection) -> None:
        """Apply a follower's batch in the database transaction that moves the cursor."""
        if batch.rolled_back_to is not None:
            self._roll_back(batch.rolled_back_to, connection)
        effects = _Effects()
        for event in batch.events:
            if isinstance(event, _REGISTRY):
                self.registry_changed = True
            self._apply(event, batch.time, effects, connection)
        effects.write(connection)
        self.strikes.apply(batch, connection)
        self.runs.apply(batch, connection)
        if self.past_starts is not None:
            self.past_starts.apply(batch)

    def live(self) -> Mapping[int, Known]:
        """Return all jobs that have not ended, by id."""
        if self._live is None:
            self._live = dict(sorted(self._read(None).items()))
        elif self._stale:
            stale = sorted(self._stale)
            for job_id in stale:
                self._live.pop(job_id, None)
            for at in range(0, len(stale), _CHUNK):
                self._live |= self._read(stale[at : at + _CHUNK])
        self._stale.clear()
        return self._live

    def highest(self) -> int:
        """Return the highest job id seen in events, zero before the first."""
        with self._store.read() as connection:
            return int(connection.execute(select(func.max(jobs.c.job_id))).scalar() or 0)

    def successors(self, job_ids: Iterable[int]) -> dict[int, int]:
        """Return the successor of each of these jobs that was retried."""
        ids = list(job_ids)
        successors: dict[int, int] = {}
        with self._store.read() as connection:
            for at in range(0, len(ids), _CHUNK):
                query = select(jobs).where(jobs.c.retry_of.in_(ids[at : at + _CHUNK]))
                successors |= {row.retry_of: row.job_id for row in connection.execute(query)}
        return successors

    def last_signs(self) -> dict[str, int]:
        """Return the chain time of the last sign of each provider, by account."""
        with self._store.read() as connection:
            return {row.provider: row.at for row in connection.execute(select(signs))}

    def _read(self, some: Sequence[int] | None) -> dict[int, Known]:
        """Return the live jobs among these ids, or all live jobs for None."""
        conditions = [jobs.c.ended_block.is_(None)]
        if some is not None:
            conditions.append(jobs.c.job_id.in_(some))
        ids = select(jobs.c.job_id).where(*conditions)
        return_rows = select(returns).where(returns.c.job_id.in_(ids))
        with self._store.read() as connection:
            rows = connection.execute(select(jobs).where(*conditions))
            known = {row.job_id: _known(row) for row in rows}
            times: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
            for row in connection.execute(return_rows):
                times[row.job_id, row.provider].append(row.at)
        for (job_id, provider), return_times in times.items():
            known[job_id].returned[provider] = len(return_times), max(return_times)
        return known

    # -- events

    def _apply(self, event: ev.Event, time: int, effects: _Effects, connection: Connection) -> None:
        if isinstance(event, ev.JobTransition | ev.JobToppedUp):
            self.touched.add(event.job_id)
        if isinstance(event, ev.JobSubmitted):
            terms = event.terms
            self._stale.add(event.job_id)
            effects.rows[event.job_id] = {
                "job_id": event.job_id,
                "objective": int(terms.objective),
                "uses": terms.uses,
                "name": terms.name,
                "retry_of": 0,
                "queued_at": time,
                "block": event.block_number,
            }
        elif isinstance(event, ev.JobRetried):
            self._inherit(event, effects, connection)
        elif isinstance(event, ev.JobTransition):
            self._moved(event, time, effects)
        elif isinstance(event, _PROVIDER_ACTIONS):
            _record_sign(effects, event.provider, time, event.block_number)

    def _inherit(self, event: ev.JobRetried, effects: _Effects, connection: Connection) -> None:
        """Copy objective, uses, name and `queued_at` of a retried job to its successor."""
        row = effects.rows.get(event.job_id)
        if row is None:
            query = select(jobs).where(jobs.c.job_id == event.job_id)
            predecessor = connection.execute(query).one_or_none()
            if predecessor is None:
                return
            row = predecessor._asdict()
            del row["ended_block"]
        self._stale.add(event.successor)
        effects.rows[event.successor] = {
            **row,
            "job_id": event.successor,
            "retry_of": event.job_id,
            "block": event.block_number,
        }

    def _moved(self, event: ev.JobTransition, time: int, effects: _Effects) -> None:
        block = event.block_number
        if event.after in _SET_BY_PROVIDER:
            _record_sign(effects, event.provider, time, block)
        if event.after.is_final:
            effects.ended[event.job_id] = block
            self._stale.add(event.job_id)
        elif event.after == JobStatus.PENDING and event.before != JobStatus.NONE:
            values = {"job_id": event.job_id, "provider": event.provider, "at": time}
            effects.returned.append({**values, "block": block})
            self._stale.add(event.job_id)

    def _roll_back(self, block: int, connection: Connection) -> None:
        connection.execute(delete(jobs).where(jobs.c.block > block))
        query = update(jobs).where(jobs.c.ended_block > block)
        connection.execute(query.values(ended_block=None))
        connection.execute(delete(returns).where(returns.c.block > block))
        connection.execute(delete(signs).where(signs.c.block > block))
        self.registry_changed = self.all_touched = True
        self._live = None


def _record_sign(effects: _Effects, provider: str, time: int, block: int) -> None:
    effects.signs[provider] = {"provider": provider, "at": time, "block": block}


def _replace(
    connection: Connection, table: Table, key: Column[Any], rows: Mapping[Any, Mapping[str, Any]]
) -> None:
    if rows:
        query = delete(table).where(key == bindparam("which"))
        connection.execute(query, [{"which": key_value} for key_value in rows])
        connection.execute(insert(table), list(rows.values()))


def _known(row: Any) -> Known:
    objective = Objective(row.objective)
    return Known(row.job_id, objective, row.uses, row.name, row.retry_of, row.queued_at)
