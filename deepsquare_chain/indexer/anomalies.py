"""Queries for anomalies. The rules are those of the audit."""

from __future__ import annotations

from typing import Any, Final, cast

from sqlalchemy import Connection, Row, Select, and_, func, or_, select

from deepsquare_chain.audit.anomalies import (
    SUBJECTS,
    Anomaly,
    AnomalyRules,
    ReplayContext,
    Code,
    Subject,
)
from deepsquare_chain.audit.entries import from_attributes
from deepsquare_chain.audit.ledger import normalised
from deepsquare_chain.chain.bindings.event_types import ProviderChallenged
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer import read_models as rows
from deepsquare_chain.indexer.pagination import (
    DEFAULT_LIMIT,
    MAX_DETAIL_ROWS,
    IndexSnapshot,
    Reader,
    with_position,
)
from deepsquare_chain.indexer.records import event_of, job_entry
from deepsquare_chain.indexer.schema import anomalies, events, jobs, providers, transitions
from deepsquare_chain.job import JobStatus

_NO_BLOCK: Final = 2**63 - 1
KINDS: Final = (*(subject.value for subject in Subject), *(code.value for code in Code))


class AnomalyQueries(Reader):
    """Queries for anomalies: those caused by transactions, and open conditions."""

    def anomalies(
        self,
        cursor: str | int | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        kind: str | None = None,
        setup: bool | None = None,
    ) -> rows.Page[rows.AnomalyRow]:
        """Return the anomalies that transactions caused, latest first.

        Args:
            cursor: `next` of the previous page, or a page number.
            limit: Rows per page.
            kind: A code or a subject; all by default.
            setup: True for only the anomalies of the deployment's set-up (administration before
                the first job), False for only the others; all by default.

        Raises:
            UsageError: The kind is unknown, or the cursor or limit is invalid.
        """
        query = with_position(anomalies)
        if kind is not None:
            if kind not in KINDS:
                raise UsageError(
                    f"{kind[:40]!r} is not a kind of anomaly", hint=f"There are {', '.join(KINDS)}."
                )
            column = anomalies.c.subject if kind in list(Subject) else anomalies.c.code
            query = query.where(column == kind)
        if setup is not None:
            first_job_block = select(
                func.coalesce(func.min(transitions.c.block), _NO_BLOCK)
            ).scalar_subquery()
            is_setup = and_(
                anomalies.c.subject == Subject.ADMINISTRATION, anomalies.c.block < first_job_block
            )
            query = query.where(is_setup if setup else ~is_setup)
        return self._page(anomalies, query, _anomaly_row, cursor, limit)

    def open_anomalies(self) -> rows.OpenAnomalies:
        """Return the conditions that are open at the last indexed block, latest job first."""
        with self._read() as (connection, snapshot):
            entries = {
                row.id: job_entry(row) for row in connection.execute(_candidates(snapshot)).all()
            }
            challenged = select(providers.c.account).where(providers.c.answer_by != 0)
            accounts = list(connection.execute(challenged).scalars())
            challenges = [last_challenge(connection, account) for account in accounts]
        rules = AnomalyRules(normalised(self.deployment))
        rules.resume(entries.values(), challenges)
        context = ReplayContext(snapshot.number("block"), snapshot.number("time", 0))
        anomalies = rules.all_anomalies(entries, context)
        anomalies.sort(key=lambda row: -row.job_id)
        at = snapshot.at(context.block, context.time, "", None)
        return rows.OpenAnomalies(
            tuple(
                rows.AnomalyRow(at=at, **_columns(anomaly))
                for anomaly in anomalies[:MAX_DETAIL_ROWS]
            ),
            len(anomalies) > MAX_DETAIL_ROWS,
        )


def anomaly_values(row: Anomaly, *, block: int, number: int, position: int) -> dict[str, Any]:
    """Return the values of a row of `anomalies`."""
    return {"block": block, "number": number, "position": position, **_columns(row)}


def _columns(row: Anomaly) -> dict[str, Any]:
    """Return the columns of an anomaly, without its position."""
    return {
        "code": row.code.value,
        "subject": SUBJECTS[row.code].value,
        "severity": row.severity.value,
        "job_id": row.job_id or None,
        "account": row.account or None,
        "message": row.message,
    }


def last_challenge(connection: Connection, account: str) -> ProviderChallenged:
    """Return the latest challenge of a provider, which must have one."""
    query = select(events.c.block, events.c.log_index, events.c.body).where(
        events.c.account == account, events.c.name == ProviderChallenged.__name__
    )
    row = connection.execute(
        query.order_by(events.c.block.desc(), events.c.log_index.desc()).limit(1)
    ).one()
    event = event_of(
        ProviderChallenged.__name__, row.body, block_number=row.block, log_index=row.log_index
    )
    return cast("ProviderChallenged", event)


def _candidates(snapshot: IndexSnapshot) -> Select[Any]:
    """Select the jobs that may have an open condition: claimed ones, and runs past their limit.

    An allotment is never shorter than the time limit, because the contract assigns a job only if
    its escrow covers the limit.
    """
    # While a job runs, `since` is the time up to which it is billed.
    past_limit = jobs.c.since + jobs.c.time_limit < snapshot.number("time", 0)
    overdue = and_(jobs.c.status == JobStatus.RUNNING, past_limit)
    return select(jobs).where(or_(jobs.c.status == JobStatus.SCHEDULED, overdue))


def _anomaly_row(row: Row[Any], snapshot: IndexSnapshot) -> rows.AnomalyRow:
    return from_attributes(rows.AnomalyRow, row, at=snapshot.place(row, None))
