"""Batches of events become tables, and what a reorganisation undid leaves them again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import pydantic_core
from sqlalchemy import Connection, Table, delete, func, insert, select, update

from deepsquare_chain.audit.entries import JobEntry
from deepsquare_chain.audit.ledger import GridLedgers, normalised
from deepsquare_chain.audit.transaction import TransactionContext
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.event_types import Event, JobCollected, JobTransition
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.indexer import schema
from deepsquare_chain.indexer.accounts import parked_of
from deepsquare_chain.indexer.anomalies import last_challenge
from deepsquare_chain.indexer.block_data import BlockData
from deepsquare_chain.indexer.codec import event_of
from deepsquare_chain.indexer.projection import Folded, Folding, Held, touched
from deepsquare_chain.indexer.provider_totals import ProviderTotals
from deepsquare_chain.indexer.records import (
    Spot,
    job_entry,
    job_values,
    provider_entry,
    provider_values,
)

#: Changes that live pages can still ask for.
KEPT_CHANGES: Final = 1_000
_TOLD_JOBS: Final = 100
#: Values in one IN list: far below what either database takes.
_SLICE: Final = 5_000
#: Tables whose rows belong to one block and are never changed.
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
    schema.exceptions,
)


class IndexWriter:
    """Writes the tables of one deployment; callers give the transaction."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = normalised(deployment)
        self._names = {
            "Credit": self._deployment.credit,
            "ProviderRegistry": self._deployment.registry,
            "MetaScheduler": self._deployment.scheduler,
        }

    def apply(self, batch: Batch, connection: Connection, facts: BlockData) -> None:
        """Write a batch of the follower, or undo what it says did not happen."""
        if batch.rolled_back_to is not None:
            self._roll_back(connection, batch.rolled_back_to)
            return
        if batch.events:
            held = self._held(connection, batch.events)
            folded = Folding(self._deployment, held, facts).fold(batch.events)
            _write(connection, folded)
            note(connection, "blocks", batch.from_block, batch.to_block, sorted(folded.jobs))
        put_state(connection, block=batch.to_block, time=batch.time)

    # -- what the database holds of it

    def _held(self, connection: Connection, events: Sequence[Event]) -> Held:
        job_ids, accounts, recipients = touched(events)
        jobs: dict[int, JobEntry] = {}
        spots: dict[int, Spot] = {}
        for row in _rows(connection, schema.jobs, "id", job_ids):
            jobs[row.id] = job_entry(row)
            spots[row.id] = row.block, row.position, row.log_index
        rows = _rows(connection, schema.providers, "account", accounts)
        last = select(schema.totals).order_by(schema.totals.c.block.desc()).limit(1)
        sums = connection.execute(last).mappings().one_or_none()
        open_to = [row.account for row in rows if row.answer_by]
        return Held(
            jobs=jobs,
            spots=spots,
            providers={row.account: provider_entry(row) for row in rows},
            parked={each: parked_of(connection, each) for each in recipients},
            sums={} if sums is None else {k: v for k, v in sums.items() if k not in _PLACE},
            line=lambda account: _line(connection, account),
            figures=lambda account: _figures(connection, account),
            challenges=[last_challenge(connection, account) for account in open_to],
        )

    # -- undoing

    def _roll_back(self, connection: Connection, number: int) -> None:
        """Everything as it was after a block: what changed since is replayed from its events."""
        gone = schema.events.c.block > number
        job_ids = set(_column(connection, schema.events.c.job_id, gone))
        later = schema.transitions.c.block > number
        job_ids |= set(_column(connection, schema.transitions.c.job_id, later))
        accounts = set(_column(connection, schema.events.c.account, gone))
        line = _with_predecessors(connection, job_ids - {None})
        for table in _BY_BLOCK:
            connection.execute(delete(table).where(table.c.block > number))
        connection.execute(delete(schema.headers).where(schema.headers.c.number > number))
        restored = self._replay(connection, line, accounts - {None})
        for table, key, keys in (
            (schema.jobs, "id", line),
            (schema.providers, "account", accounts),
        ):
            for some in _slices(sorted(keys - {None})):
                connection.execute(delete(table).where(table.c[key].in_(some)))
        _insert(connection, schema.jobs, _job_rows(restored))
        _insert(connection, schema.providers, map(provider_values, restored.providers.values()))
        last = connection.execute(select(func.max(schema.headers.c.time))).scalar() or 0
        note(connection, "reorg", number + 1, number + 1, sorted(line))
        put_state(connection, block=number, time=last)

    def _replay(self, connection: Connection, job_ids: set[int], accounts: set[str]) -> Folded:
        """Jobs and providers as their remaining events tell them."""
        books = GridLedgers(self._deployment)
        restored = Folded()
        found = [
            *_rows(connection, _TOLD, "job_id", job_ids),
            *_rows(connection, _TOLD, "account", accounts),
        ]
        rows = {(row.block, row.log_index): row for row in found}
        ordered = [rows[place] for place in sorted(rows)]
        for _, run in groupby(ordered, key=lambda row: (row.block, row.position)):
            own = list(run)
            page = TransactionContext(own[0].block, own[0].time, "", [], [])
            events = [self._event(row) for row in own]
            books.read(page, events)
            for row, event in zip(own, events, strict=True):
                if isinstance(event, JobTransition | JobCollected):
                    restored.spots[event.job_id] = row.block, row.position, row.log_index
        restored.jobs = {each: job for each, job in books.jobs.jobs.items() if each in job_ids}
        restored.providers = {
            each: entry for each, entry in books.registry.providers.items() if each in accounts
        }
        return restored

    def _event(self, row: Any) -> Event:
        return event_of(
            row.name,
            pydantic_core.from_json(row.body),
            block_number=row.block,
            log_index=row.log_index,
            address=self._names[row.contract],
        )


_TOLD: Final = (
    select(schema.events, schema.headers.c.time)
    .join(schema.headers, schema.headers.c.number == schema.events.c.block)
    .subquery()
)
_PLACE: Final = frozenset({"block", "time"})
#: Of a job without any transition, which no lawful chain has.
_NOWHERE: Final[Spot] = (0, 0, 0)


def clear(connection: Connection) -> None:
    """Forget everything that follows from the chain."""
    for table in schema.DERIVED:
        connection.execute(delete(table))
    note(connection, "rebuilt", 0, 0, ())
    put_state(connection, block=-1, time=0, finalized=-1, built_since=round(time.time(), 3))


def note(connection: Connection, kind: str, first: int, last: int, job_ids: Sequence[int]) -> None:
    """Tell live pages of a change; its number is greater than all before."""
    number = int(get_state(connection).get("change", 0)) + 1
    jobs = pydantic_core.to_json(list(job_ids)[-_TOLD_JOBS:]).decode()
    row = {"number": number, "kind": kind, "first_block": first, "last_block": last, "jobs": jobs}
    connection.execute(insert(schema.changes).values(row))
    old = schema.changes.c.number <= number - KEPT_CHANGES
    connection.execute(delete(schema.changes).where(old))
    put_state(connection, change=number)


def get_state(connection: Connection) -> dict[str, str]:
    """What the index knows of itself."""
    return {row.key: row.value for row in connection.execute(select(schema.state))}


def put_state(connection: Connection, **values: Any) -> None:
    """Change some of it."""
    for key, value in values.items():
        own = schema.state.c.key == key
        done = connection.execute(update(schema.state).where(own).values(value=str(value)))
        if not done.rowcount:
            connection.execute(insert(schema.state).values(key=key, value=str(value)))


def _write(connection: Connection, folded: Folded) -> None:
    for table, rows in folded.rows.items():
        _insert(connection, table, rows)
    for some in _slices(sorted(folded.jobs)):
        connection.execute(delete(schema.jobs).where(schema.jobs.c.id.in_(some)))
    _insert(connection, schema.jobs, _job_rows(folded))
    for some in _slices(sorted(folded.providers)):
        connection.execute(delete(schema.providers).where(schema.providers.c.account.in_(some)))
    _insert(connection, schema.providers, map(provider_values, folded.providers.values()))


def _job_rows(folded: Folded) -> Iterator[dict[str, Any]]:
    return (job_values(job, folded.spots.get(job.id, _NOWHERE)) for job in folded.jobs.values())


def _insert(connection: Connection, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
    if found := list(rows):
        connection.execute(insert(table), found)


def _line(connection: Connection, account: str) -> tuple[int, int]:
    table = schema.movements
    query = select(table.c.line, table.c.balance).where(table.c.account == account)
    row = connection.execute(query.order_by(table.c.line.desc()).limit(1)).one_or_none()
    return (0, 0) if row is None else (row.line, row.balance)


def _figures(connection: Connection, account: str) -> ProviderTotals:
    table = schema.provider_figures
    query = select(table).where(table.c.account == account)
    row = connection.execute(query.order_by(table.c.block.desc()).limit(1)).mappings().one_or_none()
    return (
        ProviderTotals()
        if row is None
        else ProviderTotals.of({str(key): value for key, value in row.items()})
    )


def _with_predecessors(connection: Connection, job_ids: set[int]) -> set[int]:
    """Those too whose events tell how a job of a line of retries began."""
    found, wanted = set(job_ids), set(job_ids)
    while wanted:
        rows = _rows(connection, schema.jobs, "id", wanted)
        wanted = {row.retry_of for row in rows if row.retry_of is not None} - found
        found |= wanted
    return found


def _column(connection: Connection, column: Any, where: Any) -> Iterable[Any]:
    return connection.execute(select(column).where(where).distinct()).scalars()


def _rows(connection: Connection, table: Any, key: str, keys: Iterable[Any]) -> list[Any]:
    return [
        row
        for some in _slices(sorted(keys))
        for row in connection.execute(select(table).where(table.c[key].in_(some)))
    ]


def _slices(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[at : at + _SLICE] for at in range(0, len(items), _SLICE))
