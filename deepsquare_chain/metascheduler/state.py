"""What the scheduler remembers: what only events tell about jobs, and signs of providers.

Everything can be lost: it is read again from the deployment's block on.
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
from deepsquare_chain.metascheduler.runs import FOLLOWED as RUN_EVENTS
from deepsquare_chain.metascheduler.runs import ObservedRuns
from deepsquare_chain.metascheduler.strikes import FOLLOWED as STRIKE_EVENTS
from deepsquare_chain.metascheduler.strikes import Strikes, strikes
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
    ev.JobCollected,
)

#: Rows asked for in one statement.
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
    *STRIKE_EVENTS,
    *RUN_EVENTS,
)
#: Name of the cursor of the scheduler's follower.
CURSOR: Final = "metascheduler"


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


@dataclass(slots=True)
class _Effects:
    """What a batch of events changes, gathered so that it is written in a few statements."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)
    returned: list[dict[str, Any]] = field(default_factory=list)
    signs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, connection: Connection) -> None:
        """Write everything; what is there already is replaced."""
        _replace(connection, jobs, jobs.c.job_id, self.rows)
        _replace(connection, signs, signs.c.provider, self.signs)
        if self.returned:
            connection.execute(insert(returns), self.returned)
        if self.ended:
            query = update(jobs).where(jobs.c.job_id == bindparam("which"))
            values = [{"which": job_id, "at": block} for job_id, block in self.ended.items()]
            connection.execute(query.values(ended_block=bindparam("at")), values)


class SchedulerState:
    """Tables of one scheduler in its store, which must be opened after this module's import."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.strikes = Strikes(store)
        self.runs = ObservedRuns(store)
        #: Set by registry events; whoever reads the providers again clears it.
        self.registry_changed = True
        #: Jobs whose records have changed, and whether any may have; cleared likewise.
        self.touched: set[int] = set()
        self.all_touched = True
        self._live: dict[int, Known] | None = None
        self._stale: set[int] = set()
        if self.runs.is_new():
            self._begin()

    def _begin(self) -> None:
        """Read everything from the first block on: a database of an earlier version lacks runs."""
        with self._store.begin() as connection:
            for table in (jobs, returns, signs, strikes):
                connection.execute(delete(table))
            self.runs.begin(connection)
            self._store.rewind(connection, CURSOR, -1)

    def history(self) -> RunHistory:
        """What finished runs tell about those to come."""
        return self.runs.history()

    def apply(self, batch: Batch, connection: Connection) -> None:
        """Take in what a follower read; its cursor moves in the same transaction."""
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

    def live(self) -> Mapping[int, Known]:
        """All jobs that have not ended, by id."""
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
        """The highest job id that events told, zero before the first."""
        with self._store.read() as connection:
            return int(connection.execute(select(func.max(jobs.c.job_id))).scalar() or 0)

    def successors(self, job_ids: Iterable[int]) -> dict[int, int]:
        """The job that goes on for each of these that was retried."""
        wanted = list(job_ids)
        found: dict[int, int] = {}
        with self._store.read() as connection:
            for at in range(0, len(wanted), _CHUNK):
                query = select(jobs).where(jobs.c.retry_of.in_(wanted[at : at + _CHUNK]))
                found |= {row.retry_of: row.job_id for row in connection.execute(query)}
        return found

    def last_signs(self) -> dict[str, int]:
        """Chain time of the last sign of each provider, by account."""
        with self._store.read() as connection:
            return {row.provider: row.at for row in connection.execute(select(signs))}

    def _read(self, some: Sequence[int] | None) -> dict[int, Known]:
        """Live jobs among these, or all."""
        among = [jobs.c.ended_block.is_(None)]
        if some is not None:
            among.append(jobs.c.job_id.in_(some))
        back = select(returns).where(returns.c.job_id.in_(select(jobs.c.job_id).where(*among)))
        with self._store.read() as connection:
            known = {
                row.job_id: _known(row) for row in connection.execute(select(jobs).where(*among))
            }
            times: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
            for row in connection.execute(back):
                times[row.job_id, row.provider].append(row.at)
        for (job_id, provider), each in times.items():
            known[job_id].returned[provider] = len(each), max(each)
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
        elif isinstance(event, _SELF_TOLD):
            _saw(effects, event.provider, time, event.block_number)

    def _inherit(self, event: ev.JobRetried, effects: _Effects, connection: Connection) -> None:
        """A successor wants what its predecessor wanted, and has waited as long."""
        row = effects.rows.get(event.job_id)
        if row is None:
            query = select(jobs).where(jobs.c.job_id == event.job_id)
            found = connection.execute(query).one_or_none()
            if found is None:
                return
            row = {name: value for name, value in found._asdict().items() if name != "ended_block"}
        self._stale.add(event.successor)
        effects.rows[event.successor] = {
            **row,
            "job_id": event.successor,
            "retry_of": event.job_id,
            "block": event.block_number,
        }

    def _moved(self, event: ev.JobTransition, time: int, effects: _Effects) -> None:
        block = event.block_number
        if event.after in _OWN_ACTS:
            _saw(effects, event.provider, time, block)
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


def _saw(effects: _Effects, provider: str, time: int, block: int) -> None:
    effects.signs[provider] = {"provider": provider, "at": time, "block": block}


def _replace(
    connection: Connection, table: Table, key: Column[Any], rows: Mapping[Any, Mapping[str, Any]]
) -> None:
    if rows:
        query = delete(table).where(key == bindparam("which"))
        connection.execute(query, [{"which": each} for each in rows])
        connection.execute(insert(table), list(rows.values()))


def _known(row: Any) -> Known:
    return Known(
        job_id=row.job_id,
        objective=Objective(row.objective),
        uses=row.uses,
        name=row.name,
        retry_of=row.retry_of,
        queued_at=row.queued_at,
    )
