"""The provider's tables: a run record per job, and the earnings of each settled job."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    LargeBinary,
    Row,
    Select,
    String,
    Table,
    Text,
    bindparam,
    delete,
    insert,
    select,
    update,
)

from deepsquare_chain.chain.bindings.events import (
    Event,
    JobCollected,
    JobSettled,
    JobTransition,
)
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.executors.base import Exit
from deepsquare_chain.provider.model import Phase, Run, parse_key, run_key
from deepsquare_chain.store.database import Amount, Store, metadata

runs: Final = Table(
    "runs",
    metadata,
    Column("job_id", Integer, primary_key=True),
    Column("key", String, nullable=False),
    Column("phase", String, nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("handle", String),
    Column("allotment", Amount, nullable=False),
    Column("lead", Amount, nullable=False),
    Column("exit_code", Integer),
    Column("exit_reason", String),
    Column("exit_seconds", Integer),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("result", LargeBinary, nullable=False),
    Column("note", Text, nullable=False),
)

recipients: Final = Table(
    "run_recipients",
    metadata,
    Column("key", String, primary_key=True),
    Column("recipients", Text, nullable=False),
)

earnings: Final = Table(
    "earnings",
    metadata,
    Column("block", Integer, primary_key=True),
    Column("log_index", Integer, primary_key=True),
    Column("job_id", Integer, nullable=False, index=True),
    Column("interim", Boolean, nullable=False),
    Column("billed_seconds", Amount, nullable=False),
    Column("paid", Amount, nullable=False),
    Column("fee", Amount, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Earning:
    """Payments of a job in credit-wei, interim payments included; `fee` goes to the treasury."""

    job_id: int
    billed_seconds: int
    paid: int
    fee: int


class RunTable:
    """Run records and earnings of one provider on one chain.

    Args:
        store: Database of this provider, opened after this module was imported.
        account: Address of the provider, as it appears in events.
        chain_id: Chain of the jobs; part of each run's key.
        contract: Address of the MetaScheduler; part of each run's key.
    """

    def __init__(self, store: Store, account: str, *, chain_id: int, contract: str) -> None:
        self._store = store
        self._account = account.lower()
        self._chain_id = chain_id
        self._contract = contract

    def key(self, job_id: int, attempt: int = 0) -> str:
        """Return the permanent key of a job's run."""
        return run_key(self._chain_id, self._contract, job_id, attempt)

    def parse_key(self, key: str) -> tuple[int, int] | None:
        """Return job ID and attempt of a run's key; None for keys of other grids and programs."""
        return parse_key(self._chain_id, self._contract, key)

    def comment(self, job_id: int) -> str:
        """Return a comment that identifies the job to operators who read the executor's queue."""
        return f"deepsquare chain={self._chain_id} contract={self._contract} job={job_id}"

    # -- reading

    def get(self, job_id: int) -> Run | None:
        """Return the run record of a job, if there is one."""
        records = self._select(_ONE, number=job_id)
        return records[0] if records else None

    def open(self) -> list[Run]:
        """Return the run records that are not closed, by job ID."""
        return self._select(_OPEN, phase=Phase.CLOSED.value)

    def all(self) -> list[Run]:
        """Return every run record, by job ID."""
        return self._select(select(runs).order_by(runs.c.job_id))

    def earned(self) -> list[Earning]:
        """Return the earnings of every job that paid something or has ended, by job ID."""
        earnings_by_job: dict[int, Earning] = {}
        with self._store.read() as connection:
            for row in connection.execute(select(earnings).order_by(earnings.c.job_id)):
                previous = earnings_by_job.get(row.job_id, Earning(row.job_id, 0, 0, 0))
                earnings_by_job[row.job_id] = Earning(
                    row.job_id,
                    previous.billed_seconds + row.billed_seconds,
                    previous.paid + row.paid,
                    previous.fee + row.fee,
                )
        return list(earnings_by_job.values())

    def collected(self) -> dict[int, int]:
        """Return the seconds billed by interim payments, by ID of each job that is not closed."""
        seconds_by_job: defaultdict[int, int] = defaultdict(int)
        with self._store.read() as connection:
            for row in connection.execute(_COLLECTED, {"phase": Phase.CLOSED.value}):
                seconds_by_job[row.job_id] += row.billed_seconds
        return dict(seconds_by_job)

    def recipients(self, key: str) -> tuple[str, ...]:
        """Return the recipients that a run's output is encrypted to; empty for plain output."""
        with self._store.read() as connection:
            query = select(recipients.c.recipients).where(recipients.c.key == key)
            return tuple((connection.execute(query).scalar_one_or_none() or "").split())

    # -- writing

    def set_recipients(self, key: str, keys: Sequence[str]) -> None:
        """Record the recipients that a run's output is encrypted to, before the run exists."""
        with self._store.begin() as connection:
            connection.execute(delete(recipients).where(recipients.c.key == key))
            connection.execute(insert(recipients).values(key=key, recipients=" ".join(keys)))

    def put(self, *changed: Run, durable: bool = True) -> None:
        """Write run records.

        Without `durable`, for records that can be derived again, a power cut may undo the write.
        """
        if changed:
            with self._store.begin(durable=durable) as connection:
                for run in changed:
                    _put(connection, run)

    def watch(self, job_id: int, attempt: int = 0) -> None:
        """Add a run record for a job; an existing one is not changed."""
        with self._store.begin() as connection:
            self._watch(connection, job_id, attempt)

    def apply(self, batch: Batch, connection: Connection) -> None:
        """Apply a follower's batch of events, in the transaction that advances its cursor."""
        if batch.rolled_back_to is not None:
            connection.execute(delete(earnings).where(earnings.c.block > batch.rolled_back_to))
        for event in batch.events:
            self._apply(event, connection)

    def _apply(self, event: Event, connection: Connection) -> None:
        if not isinstance(event, JobTransition | JobSettled | JobCollected):
            return
        if event.provider.lower() != self._account:
            return
        if isinstance(event, JobTransition):
            self._watch(connection, event.job_id, 0, reopen=event.after.is_live)
        else:
            _record_earning(event, connection)

    def _watch(
        self, connection: Connection, job_id: int, attempt: int, *, reopen: bool = False
    ) -> None:
        row = connection.execute(_ONE, {"number": job_id}).one_or_none()
        if row is None:
            _put(connection, Run(job_id, self.key(job_id, attempt), attempt=attempt))
        elif reopen and row.phase == Phase.CLOSED.value:
            _put(connection, _run(row).reopened())

    def _select(self, query: Select[Any], **values: Any) -> list[Run]:
        with self._store.read() as connection:
            return [_run(row) for row in connection.execute(query, values)]


def _record_earning(event: JobSettled | JobCollected, connection: Connection) -> None:
    """Record a payment; one that is recorded already is replaced."""
    log = {"block": event.block_number, "log_index": event.log_index}
    values = {name: getattr(event, name) for name in ("job_id", "billed_seconds", "paid", "fee")}
    interim = isinstance(event, JobCollected)
    connection.execute(delete(earnings).filter_by(**log))
    connection.execute(insert(earnings).values(**log, **values, interim=interim))


# Built once: SQLAlchemy takes longer to build these statements than SQLite to execute them.
_OPEN: Final = select(runs).where(runs.c.phase != bindparam("phase")).order_by(runs.c.job_id)
_COLLECTED: Final = (
    select(earnings.c.job_id, earnings.c.billed_seconds)
    .join(runs, runs.c.job_id == earnings.c.job_id)
    .where(earnings.c.interim, runs.c.phase != bindparam("phase"))
)
_ONE: Final = select(runs).where(runs.c.job_id == bindparam("number"))
_CHANGE: Final = (
    update(runs)
    .where(runs.c.job_id == bindparam("number"))
    .values({column.name: bindparam(column.name) for column in runs.c if not column.primary_key})
)
_NEW: Final = insert(runs)


def _put(connection: Connection, run: Run) -> None:
    values = _values(run)
    if not connection.execute(_CHANGE, {"number": run.job_id, **values}).rowcount:
        connection.execute(_NEW, {"job_id": run.job_id, **values})


#: Columns with the same name and value as the field of a run record.
_FIELDS: Final = ("key", "attempt", "handle", "allotment", "lead", "result", "note")
#: Columns of the exit status, in the order of its fields.
_EXIT: Final = ("exit_code", "exit_reason", "exit_seconds", "started_at", "ended_at")


def _values(run: Run) -> dict[str, Any]:
    ended = (None,) * len(_EXIT) if run.exit is None else astuple(run.exit)
    fields = {name: getattr(run, name) for name in _FIELDS}
    return {"phase": run.phase.value, **fields, **dict(zip(_EXIT, ended, strict=True))}


def _run(row: Row[Any]) -> Run:
    fields = {name: getattr(row, name) for name in _FIELDS}
    ended = None
    if row.exit_reason is not None:
        ended = Exit(*(getattr(row, name) for name in _EXIT))
    return Run(job_id=row.job_id, phase=Phase(row.phase), exit=ended, **fields)
