"""Writes batches of events to the tables, and rolls the tables back after a reorg."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from sqlalchemy import Column, Connection, Table, delete, func, insert, select, update

from deepsquare_chain.audit.entries import JobEntry, TransactionContext, from_attributes
from deepsquare_chain.audit.ledger import GridLedgers
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import Event, JobCollected, JobTransition
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.chain.rpc.batching import chunks
from deepsquare_chain.indexer import schema
from deepsquare_chain.indexer.block_data import BlockData
from deepsquare_chain.indexer.projection import (
    ProjectedRows,
    Projection,
    ProviderTotals,
    StoredState,
    affected,
)
from deepsquare_chain.indexer.queries import (
    get_state,
    last_challenge,
    last_line,
    last_row,
    parked_of,
)
from deepsquare_chain.indexer.records import (
    LogPosition,
    event_of,
    job_entry,
    job_values,
    provider_entry,
    provider_values,
    row_values,
)

#: Number of changes that are kept for live pages.
KEPT_CHANGES: Final = 1_000
_LISTED_JOBS: Final = 100
#: Tables whose rows belong to one block and are never updated.
_BY_BLOCK: Final = (
    schema.transactions,
    schema.forwarded,
    schema.events,
    schema.transitions,
    schema.movements,
    schema.settlements,
    schema.provider_figures,
    schema.totals,
    schema.parkings,
    schema.roles,
    schema.parameters,
    schema.anomalies,
)


class IndexWriter:
    """Writes the tables of one deployment, within the caller's transaction."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    def apply(self, batch: Batch, connection: Connection, block_data: BlockData) -> None:
        """Write a batch of the follower, or roll back the blocks that a reorg undid."""
        if batch.rolled_back_to is not None:
            self._roll_back(connection, batch.rolled_back_to)
            return
        if batch.events:
            stored = self._stored_state(connection, batch.events)
            projected = Projection(self._deployment, stored, block_data).project(batch.events)
            _write(connection, projected)
            job_ids = sorted(projected.jobs)
            record_change(connection, "blocks", batch.from_block, batch.to_block, job_ids)
        put_state(connection, block=batch.to_block, time=batch.time)

    # -- state before a batch

    def _stored_state(self, connection: Connection, events: Sequence[Event]) -> StoredState:
        job_ids, accounts, recipients = affected(events)
        jobs: dict[int, JobEntry] = {}
        positions: dict[int, LogPosition] = {}
        for row in _rows(connection, schema.jobs, "id", job_ids):
            jobs[row.id] = job_entry(row)
            positions[row.id] = row.block, row.position, row.log_index
        rows = _rows(connection, schema.providers, "account", accounts)
        totals = last_row(connection, select(schema.totals), schema.totals.c.block)
        challenged = [row.account for row in rows if row.answer_by]
        return StoredState(
            jobs=jobs,
            positions=positions,
            providers={row.account: provider_entry(row) for row in rows},
            parked={recipient: parked_of(connection, recipient) for recipient in recipients},
            totals={} if totals is None else row_values(totals, schema.totals),
            last_line=lambda account: last_line(connection, account),
            figures=lambda account: _figures(connection, account),
            challenges=[last_challenge(connection, account) for account in challenged],
        )

    # -- rollback

    def _roll_back(self, connection: Connection, number: int) -> None:
        """Restore the state after a block. Jobs and providers that changed since are replayed."""
        subjects = select(schema.events.c.job_id, schema.events.c.account)
        undone = connection.execute(subjects.where(schema.events.c.block > number).distinct()).all()
        accounts = {row.account for row in undone if row.account is not None}
        job_ids = {row.job_id for row in undone if row.job_id is not None}
        chain = _with_predecessors(connection, job_ids)
        for table in _BY_BLOCK:
            connection.execute(delete(table).where(table.c.block > number))
        connection.execute(delete(schema.headers).where(schema.headers.c.number > number))
        restored = self._replay(connection, chain, accounts)
        _replace_entries(connection, restored, chain, accounts)
        last_time = connection.execute(select(func.max(schema.headers.c.time))).scalar() or 0
        record_change(connection, "reorg", number + 1, number + 1, sorted(chain))
        put_state(connection, block=number, time=last_time)

    def _replay(
        self, connection: Connection, job_ids: set[int], accounts: set[str]
    ) -> ProjectedRows:
        """Rebuild jobs and providers from their remaining events."""
        ledgers = GridLedgers(self._deployment)
        positions: dict[int, LogPosition] = {}
        event_rows = [
            *_rows(connection, _TIMED_EVENTS, "job_id", job_ids),
            *_rows(connection, _TIMED_EVENTS, "account", accounts),
        ]
        rows = {(row.block, row.log_index): row for row in event_rows}
        ordered = [rows[position] for position in sorted(rows)]
        for _, group in groupby(ordered, key=lambda row: (row.block, row.position)):
            transaction_rows = list(group)
            context = TransactionContext(transaction_rows[0].block, transaction_rows[0].time)
            events = [self._event(row) for row in transaction_rows]
            ledgers.read(context, events)
            for row, event in zip(transaction_rows, events, strict=True):
                if isinstance(event, JobTransition | JobCollected):
                    positions[event.job_id] = row.block, row.position, row.log_index
        jobs, providers = ledgers.jobs.jobs, ledgers.registry.providers
        return ProjectedRows(
            jobs={job_id: job for job_id, job in jobs.items() if job_id in job_ids},
            positions=positions,
            providers={key: entry for key, entry in providers.items() if key in accounts},
        )

    def _event(self, row: Any) -> Event:
        return event_of(
            row.name,
            row.body,
            block_number=row.block,
            log_index=row.log_index,
            address=self._deployment.contracts[row.contract],
        )


_TIMED_EVENTS: Final = (
    select(schema.events, schema.headers.c.time)
    .join(schema.headers, schema.headers.c.number == schema.events.c.block)
    .subquery()
)
#: Position of a job without transitions, which a valid chain never contains.
_NO_POSITION: Final[LogPosition] = (0, 0, 0)


def clear(connection: Connection) -> None:
    """Delete all data that is derived from the chain."""
    for table in schema.DERIVED:
        connection.execute(delete(table))
    record_change(connection, "rebuilt", 0, 0, ())
    put_state(connection, block=-1, time=0, finalized=-1, built_since=round(time.time(), 3))


def record_change(
    connection: Connection, kind: str, first: int, last: int, job_ids: Sequence[int]
) -> None:
    """Record a change for live pages. Numbers of changes increase."""
    number = int(get_state(connection).get("change", 0)) + 1
    row = {"number": number, "kind": kind, "first_block": first, "last_block": last}
    connection.execute(insert(schema.changes), row | {"jobs": job_ids[-_LISTED_JOBS:]})
    expired = schema.changes.c.number <= number - KEPT_CHANGES
    connection.execute(delete(schema.changes).where(expired))
    put_state(connection, change=number)


def put_state(connection: Connection, **values: Any) -> None:
    """Update values of the state of the index."""
    for key, value in values.items():
        same_key = schema.state.c.key == key
        result = connection.execute(update(schema.state).where(same_key).values(value=str(value)))
        if not result.rowcount:
            connection.execute(insert(schema.state).values(key=key, value=str(value)))


def _write(connection: Connection, projected: ProjectedRows) -> None:
    for table, rows in projected.rows.items():
        _insert(connection, table, rows)
    _replace_entries(connection, projected, set(projected.jobs), set(projected.providers))


def _replace_entries(
    connection: Connection, projected: ProjectedRows, job_ids: set[int], accounts: set[str]
) -> None:
    """Replace the rows of jobs and providers by those of the projection that have them."""
    _delete(connection, schema.jobs.c.id, job_ids)
    _delete(connection, schema.providers.c.account, accounts)
    job_rows = (
        job_values(job, projected.positions.get(job.id, _NO_POSITION))
        for job in projected.jobs.values()
    )
    _insert(connection, schema.jobs, job_rows)
    _insert(connection, schema.providers, map(provider_values, projected.providers.values()))


def _delete(connection: Connection, key: Column[Any], keys: Iterable[Any]) -> None:
    for some_keys in chunks(sorted(keys), schema.MAX_KEYS):
        connection.execute(delete(key.table).where(key.in_(some_keys)))


def _insert(connection: Connection, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
    if values := list(rows):
        connection.execute(insert(table), values)


def _figures(connection: Connection, account: str) -> ProviderTotals:
    table = schema.provider_figures
    row = last_row(connection, select(table).where(table.c.account == account), table.c.block)
    return ProviderTotals() if row is None else from_attributes(ProviderTotals, row)


def _with_predecessors(connection: Connection, job_ids: set[int]) -> set[int]:
    """Add all predecessors of retries, whose events are needed to replay their successors."""
    chain_ids, new_ids = set(job_ids), set(job_ids)
    while new_ids:
        rows = _rows(connection, schema.jobs, "id", new_ids)
        new_ids = {row.retry_of for row in rows if row.retry_of is not None} - chain_ids
        chain_ids |= new_ids
    return chain_ids


def _rows(connection: Connection, table: Any, key: str, keys: Iterable[Any]) -> list[Any]:
    return [
        row
        for key_batch in chunks(sorted(keys), schema.MAX_KEYS)
        for row in connection.execute(select(table).where(table.c[key].in_(key_batch)))
    ]
