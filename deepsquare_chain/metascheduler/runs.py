"""The history of finished runs in a scheduler's database, built from events.

A run's length is its billed time: the sum over `JobCollected` and `JobSettled`. Runs that ended
FINISHED, FAILED or OUT_OF_CREDITS count. Cancelled and panicked runs do not show how long the job
would have run, but the payments for them count as use. Jobs that a provider gave up (panicked,
requeued, or let time out) count as its faults. Seconds are scaled to the grid's median speed by the
labels that the provider had at the end.

Runs of the last blocks are kept as single rows, so that a reorg can roll them back. Older runs are
merged into one stored history. All schedulers that have read the same chain have the same history,
bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    Column,
    Connection,
    Float,
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

from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.follower import KEPT_BLOCKS, Batch
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.job import JobStatus
from deepsquare_chain.metascheduler.history import FinishedRun, RunHistory
from deepsquare_chain.metascheduler.provider_labels import relative_speeds
from deepsquare_chain.store.database import Store, metadata

#: Customer, resources and time limit of each job, kept until some blocks after its end.
shapes: Final = Table(
    "scheduler_shapes",
    metadata,
    Column("job_id", Integer, primary_key=True),
    Column("customer", String, nullable=False),
    Column("cpus", Integer, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("time_limit", Integer, nullable=False),
    Column("block", Integer, nullable=False),
    Column("ended_block", Integer, nullable=True, index=True),
)

#: Interim payments of runs that have not ended.
collected: Final = Table(
    "scheduler_collected",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", Integer, nullable=False, index=True),
    Column("seconds", Integer, nullable=False),
    Column("paid", Float, nullable=False),
    Column("block", Integer, nullable=False, index=True),
)

#: Ends of jobs that the stored history does not include yet, in chain order. A job that a provider
#: gave up has no customer; a run that its customer stopped has no seconds.
finished: Final = Table(
    "scheduler_finished",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("customer", String, nullable=False),
    Column("cpus", Integer, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("time_limit", Integer, nullable=False),
    Column("seconds", Float, nullable=True),
    Column("paid", Float, nullable=False),
    Column("provider", String, nullable=False),
    Column("given_up", Integer, nullable=False),
    Column("block", Integer, nullable=False, index=True),
    sqlite_autoincrement=True,  # ids are never reused: new rows have ids above the last one read
)

#: The stored history, a single row: its sums, as JSON, over all runs up to a block.
histories: Final = Table(
    "scheduler_history",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("block", Integer, nullable=False),
    Column("sums", Text, nullable=False),
)

#: Labels of providers, with earlier versions that a reorg may restore.
labels: Final = Table(
    "scheduler_labels",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("provider", String, nullable=False, index=True),
    Column("labels", Text, nullable=False),
    Column("block", Integer, nullable=False),
)

FOLLOWED: Final = (
    ev.JobSubmitted,
    ev.JobRetried,
    ev.JobTransition,
    ev.JobCollected,
    ev.JobSettled,
    ev.LabelsChanged,
)
_TABLES: Final = (shapes, collected, finished, histories, labels)
#: Transitions by which a provider gave a job up: it lost the run, or returned a job that it had
#: claimed or that was assigned to it.
_GIVEN_UP: Final = frozenset(
    {
        (JobStatus.RUNNING, JobStatus.PANICKED),
        (JobStatus.SCHEDULED, JobStatus.PANICKED),
        (JobStatus.META_SCHEDULED, JobStatus.PANICKED),
        (JobStatus.SCHEDULED, JobStatus.PENDING),
        (JobStatus.META_SCHEDULED, JobStatus.PENDING),
    }
)
#: Fewest runs that are merged into the stored history at once.
_FOLDED: Final = 512


class ObservedRuns:
    """Finished runs in a scheduler's database, which is opened after this module is imported."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._history: RunHistory | None = None
        self._last = 0
        self._labels: dict[str, dict[str, str]] | None = None
        self._speeds: dict[str, float] = {}

    def is_new(self) -> bool:
        """Return whether the database has no history yet, as one of an earlier version."""
        with self._store.begin() as connection:
            return connection.execute(select(histories.c.id)).first() is None

    def begin(self, connection: Connection) -> None:
        """Clear all tables, to start from the first block."""
        for table in _TABLES:
            connection.execute(delete(table))
        connection.execute(insert(histories), {"id": 1, "block": -1, "sums": "{}"})
        self._forget()

    def history(self) -> RunHistory:
        """Return the history of all finished runs; the same object each time, updated in place."""
        with self._store.read() as connection:
            if self._history is None:
                row = connection.execute(select(histories)).one_or_none()
                self._history = RunHistory.of_rows(json.loads(row.sums) if row else {})
                self._last = 0
            query = select(finished).where(finished.c.id > self._last).order_by(finished.c.id)
            for row in connection.execute(query):
                _record(self._history, row)
                self._last = row.id
        return self._history

    def apply(self, batch: Batch, connection: Connection) -> None:
        """Apply a follower's batch."""
        if batch.rolled_back_to is not None:
            self._roll_back(batch.rolled_back_to, connection)
        ends = {
            event.job_id: event.after
            for event in batch.events
            if isinstance(event, ev.JobTransition) and event.after.is_final
        }
        for event in batch.events:
            if isinstance(event, ev.JobSubmitted):
                _submitted(event, connection)
            elif isinstance(event, ev.JobRetried):
                _inherit(event, connection)
            elif isinstance(event, ev.LabelsChanged):
                self._relabel(event, connection)
            elif isinstance(event, ev.JobCollected):
                values = {
                    "job_id": event.job_id,
                    "seconds": event.billed_seconds,
                    "paid": (event.paid + event.fee) / CREDIT,
                }
                connection.execute(insert(collected), {**values, "block": event.block_number})
            elif isinstance(event, ev.JobTransition) and (event.before, event.after) in _GIVEN_UP:
                _given_up(event, connection)
            elif isinstance(event, ev.JobSettled):
                self._finished(event, ends.get(event.job_id), connection)
        if ends:
            _ended(ends, batch, connection)
        self._fold(batch.to_block - KEPT_BLOCKS, connection)

    def _finished(
        self, event: ev.JobSettled, end: JobStatus | None, connection: Connection
    ) -> None:
        """Record a settled run. For one that its customer stopped, only the payment counts."""
        query = select(shapes).where(shapes.c.job_id == event.job_id)
        shape = connection.execute(query).one_or_none()
        counts = end is not None and end.is_reported
        if shape is None or not (counts or event.billed_seconds):
            return
        totals = select(func.sum(collected.c.seconds), func.sum(collected.c.paid))
        job_totals = totals.where(collected.c.job_id == event.job_id)
        seconds, paid = connection.execute(job_totals).one()
        billed = event.billed_seconds + (seconds or 0)
        speed = self._speed(event.provider, connection)
        values = {
            **{name: getattr(shape, name) for name in ("customer", "cpus", "gpus", "time_limit")},
            "seconds": billed * speed if counts else None,
            "paid": (event.paid + event.fee) / CREDIT + (paid or 0.0),
            "provider": event.provider if counts else "",
            "given_up": 0,
            "block": event.block_number,
        }
        connection.execute(insert(finished), values)

    # -- speeds

    def _relabel(self, event: ev.LabelsChanged, connection: Connection) -> None:
        values = {"provider": event.provider, "labels": json.dumps(dict(event.labels))}
        connection.execute(insert(labels), {**values, "block": event.block_number})
        self._labels = None

    def _speed(self, provider: str, connection: Connection) -> float:
        """Return the relative speed of a provider by its current labels."""
        if self._labels is None:
            rows = connection.execute(select(labels).order_by(labels.c.id))
            self._labels = {row.provider: json.loads(row.labels) for row in rows}
            speeds = relative_speeds(list(self._labels.values()))
            self._speeds = dict(zip(self._labels, speeds, strict=True))
        return self._speeds.get(provider, min(self._speeds.values(), default=1.0))

    # -- pruning and reorgs

    def _fold(self, until: int, connection: Connection) -> None:
        """Merge runs that are too old for a reorg into the stored history."""
        old_runs = select(func.count()).select_from(finished).where(finished.c.block <= until)
        if (connection.execute(old_runs).scalar() or 0) < _FOLDED:
            return
        row = connection.execute(select(histories)).one()
        history = RunHistory.of_rows(json.loads(row.sums))
        query = select(finished).where(finished.c.block <= until).order_by(finished.c.id)
        for run in connection.execute(query):
            _record(history, run)
        sums = json.dumps(history.rows(), separators=(",", ":"))
        connection.execute(update(histories).values(block=until, sums=sums))
        connection.execute(delete(finished).where(finished.c.block <= until))
        ended_ids = select(shapes.c.job_id).where(shapes.c.ended_block <= until)
        connection.execute(delete(collected).where(collected.c.job_id.in_(ended_ids)))
        connection.execute(delete(shapes).where(shapes.c.ended_block <= until))
        latest = select(func.max(labels.c.id)).where(labels.c.block <= until)
        latest_ids = latest.group_by(labels.c.provider)
        old_labels = (labels.c.block <= until) & labels.c.id.not_in(latest_ids)
        connection.execute(delete(labels).where(old_labels))

    def _roll_back(self, block: int, connection: Connection) -> None:
        for table in (shapes, collected, finished, labels):
            connection.execute(delete(table).where(table.c.block > block))
        reopened = update(shapes).where(shapes.c.ended_block > block)
        connection.execute(reopened.values(ended_block=None))
        self._forget()

    def _forget(self) -> None:
        self._history, self._labels, self._last = None, None, 0


def _submitted(event: ev.JobSubmitted, connection: Connection) -> None:
    resources = event.terms.resources
    values = {
        "job_id": event.job_id,
        "customer": event.customer,
        "cpus": resources.cpus,
        "gpus": resources.gpus,
        "time_limit": event.terms.time_limit,
        "block": event.block_number,
    }
    connection.execute(delete(shapes).where(shapes.c.job_id == event.job_id))
    connection.execute(insert(shapes), values)


def _inherit(event: ev.JobRetried, connection: Connection) -> None:
    """Copy the shape of a retried job to its successor."""
    row = connection.execute(select(shapes).where(shapes.c.job_id == event.job_id)).one_or_none()
    if row is not None:
        changes = {"job_id": event.successor, "block": event.block_number, "ended_block": None}
        connection.execute(delete(shapes).where(shapes.c.job_id == event.successor))
        connection.execute(insert(shapes), {**row._asdict(), **changes})


def _ended(ends: dict[int, JobStatus], batch: Batch, connection: Connection) -> None:
    ids: Sequence[int] = list(ends)
    for first in range(0, len(ids), _FOLDED):
        query = update(shapes).where(shapes.c.job_id.in_(ids[first : first + _FOLDED]))
        connection.execute(query.values(ended_block=batch.to_block))


def _given_up(event: ev.JobTransition, connection: Connection) -> None:
    empty_run: dict[str, Any] = {"customer": "", "cpus": 0, "gpus": 0, "time_limit": 0, "paid": 0.0}
    values = {"seconds": None, "provider": event.provider, "given_up": 1}
    connection.execute(insert(finished), {**empty_run, **values, "block": event.block_number})


def _record(history: RunHistory, row: Any) -> None:
    if row.customer:
        history.record(
            FinishedRun(row.customer, row.cpus, row.gpus, row.time_limit, row.seconds, row.paid)
        )
    if row.provider:
        history.record_end(row.provider, given_up=bool(row.given_up))
