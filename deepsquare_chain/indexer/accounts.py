"""Queries for accounts and their movements of credits."""

from __future__ import annotations

from sqlalchemy import Connection, func, select

from deepsquare_chain.indexer.pagination import (
    DEFAULT_LIMIT,
    Reader,
    TimeRange,
    address,
    movement_row,
    paged,
    placed,
    within,
)
from deepsquare_chain.indexer.read_models import AccountRow, MovementRow, Page
from deepsquare_chain.indexer.registry import held_roles, role_rows
from deepsquare_chain.indexer.schema import jobs, movements, parkings, providers
from deepsquare_chain.job import JobStatus

_LIVE = [int(each) for each in JobStatus if each.is_live]


class AccountQueries(Reader):
    """Queries for balances and statements."""

    def account(self, account: str) -> AccountRow:
        """Return an account. An unknown address has zero balances and counts.

        Raises:
            UsageError: The address is invalid.
        """
        key = address(account)
        with self._read() as (connection, snapshot):
            submitted = jobs.c.customer == key
            last_line = connection.execute(
                select(movements.c.line, movements.c.balance)
                .where(movements.c.account == key)
                .order_by(movements.c.line.desc())
                .limit(1)
            ).one_or_none()
            return AccountRow(
                address=key,
                alias=self._aliases.get(key, ""),
                balance=last_line.balance if last_line is not None else 0,
                parked=parked_of(connection, key),
                jobs=_count(connection, submitted),
                jobs_live=_count(connection, submitted & jobs.c.status.in_(_LIVE)),
                movements=last_line.line if last_line is not None else 0,
                provider_id=connection.execute(
                    select(providers.c.id).where(providers.c.account == key)
                ).scalar(),
                roles=held_roles(role_rows(connection, snapshot, key)),
            )

    def statement(
        self,
        account: str,
        cursor: str | int | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        oldest_first: bool = False,
        period: TimeRange | None = None,
        kind: str | None = None,
    ) -> Page[MovementRow]:
        """Return the movements of an account with the balance after each, latest first.

        The latest balance equals the account's `balanceOf` at the last indexed block.

        Raises:
            UsageError: The address, the cursor or the limit is invalid.
        """
        query = placed(movements).where(movements.c.account == address(account))
        if period is not None:
            query = query.where(*within(movements.c.time, period))
        if kind is not None:
            query = query.where(movements.c.kind == kind)
        with self._read() as (connection, snapshot):
            return paged(
                connection,
                query,
                [movements.c.line],
                lambda row: movement_row(row, snapshot),
                kind="statement" + "+" * oldest_first,
                cursor=cursor,
                limit=limit,
                oldest_first=oldest_first,
            )

    def movements(
        self, cursor: str | int | None = None, limit: int = DEFAULT_LIMIT
    ) -> Page[MovementRow]:
        """Return the lines of all statements, latest first. Raises the errors of `statement`."""
        with self._read() as (connection, snapshot):
            return paged(
                connection,
                placed(movements),
                [movements.c.block, movements.c.number],
                lambda row: movement_row(row, snapshot),
                kind="movements",
                cursor=cursor,
                limit=limit,
            )


def parked_of(connection: Connection, account: str) -> int:
    """Return the parked credit-wei that the account can withdraw."""
    parked = connection.execute(
        select(parkings.c.held)
        .where(parkings.c.recipient == account)
        .order_by(parkings.c.block.desc(), parkings.c.log_index.desc())
        .limit(1)
    ).scalar()
    return parked or 0


def _count(connection: Connection, which: object) -> int:
    query = select(func.count()).select_from(jobs).where(which)  # type: ignore[arg-type]
    return int(connection.execute(query).scalar_one())
