"""Queries for accounts, movements of credits, providers, roles and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, Row, Select, String, column, func, select, values

from deepsquare_chain.audit.entries import from_attributes
from deepsquare_chain.chain.bindings.deployment import ROLE_NAMES
from deepsquare_chain.chain.rpc.batching import chunks
from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.indexer.pagination import (
    DEFAULT_LIMIT,
    IndexSnapshot,
    Reader,
    TimeRange,
    address,
    first_rows,
    in_period,
    movement_row,
    with_position,
)
from deepsquare_chain.indexer.read_models import (
    AccountRow,
    ChallengeRow,
    MovementRow,
    Page,
    ParameterHistory,
    ParameterRow,
    ProviderChange,
    ProviderDetail,
    ProviderFigures,
    ProviderRow,
    RoleRow,
    Roles,
)
from deepsquare_chain.indexer.records import offering
from deepsquare_chain.indexer.schema import (
    Int,
    constants,
    events,
    jobs,
    movements,
    parameters,
    parkings,
    provider_figures,
    providers,
    roles,
)
from deepsquare_chain.job import NO_LOAD, JobStatus, Load, ProviderStatus

_LIVE = [status for status in JobStatus if status.is_live]


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
                roles=roles_in_force(role_rows(connection, snapshot, key)),
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
        query = with_position(movements).where(movements.c.account == address(account))
        if period is not None:
            query = query.where(*in_period(movements.c.time, period))
        if kind is not None:
            query = query.where(movements.c.kind == kind)
        return self._page(
            movements,
            query,
            movement_row,
            cursor,
            limit,
            kind="statement" + "+" * oldest_first,
            keys=[movements.c.line],
            oldest_first=oldest_first,
        )

    def movements(
        self, cursor: str | int | None = None, limit: int = DEFAULT_LIMIT
    ) -> Page[MovementRow]:
        """Return the lines of all statements, latest first. Raises the errors of `statement`."""
        return self._page(movements, with_position(movements), movement_row, cursor, limit)


def parked_of(connection: Connection, account: str) -> int:
    """Return the parked credit-wei that the account can withdraw."""
    parked = connection.execute(
        select(parkings.c.held)
        .where(parkings.c.recipient == account)
        .order_by(parkings.c.block.desc(), parkings.c.log_index.desc())
        .limit(1)
    ).scalar()
    return parked or 0


def _count(connection: Connection, condition: object) -> int:
    query = select(func.count()).select_from(jobs).where(condition)  # type: ignore[arg-type]
    return int(connection.execute(query).scalar_one())


# -- queries for providers, roles and parameters

#: Kinds of provider changes, by event name.
KINDS: Final[Mapping[str, str]] = {
    "ProviderRegistered": "registered",
    "HardwareProposed": "hardware",
    "ProviderApproved": "approved",
    "OfferChanged": "offer",
    "PricesChanged": "prices",
    "LabelsChanged": "labels",
    "DrainingChanged": "draining",
    "BanChanged": "ban",
    "ProviderChallenged": "challenged",
    "ProviderAnswered": "answered",
}
_SLICE: Final = 5_000
_NO_FIGURES: Final = ProviderFigures(*[0] * 15)


class RegistryQueries(Reader):
    """Queries for providers and their histories, roles, and parameters."""

    def providers(self) -> tuple[ProviderRow, ...]:
        """Return all providers ordered by ID; those that were never approved come last."""
        with self._read() as (connection, snapshot):
            figures = latest_figures(connection)
            rows = connection.execute(select(providers)).all()
        provider_rows = [_provider_row(row, figures.get(row.account), snapshot) for row in rows]
        return tuple(
            sorted(provider_rows, key=lambda row: (row.id is None, row.id or 0, row.account))
        )

    def provider(self, account: str | int) -> ProviderDetail:
        """Return a provider by its account or ID.

        Raises:
            NotFoundError: The provider never registered.
            UsageError: The address is invalid.
        """
        by_id = isinstance(account, int)
        key = providers.c.id == account if by_id else providers.c.account == address(str(account))
        with self._read() as (connection, snapshot):
            row = connection.execute(select(providers).where(key)).one_or_none()
            if row is None:
                raise NotFoundError(f"There is no provider {account}")
            latest_first = (events.c.block.desc(), events.c.log_index.desc())
            changes, more = first_rows(connection, _changes(row.account), *latest_first)
            figures = latest_figures(connection, row.account)
            return ProviderDetail(
                row=_provider_row(row, figures.get(row.account), snapshot),
                history=tuple(_change(change, snapshot) for change in changes),
                more_history=more,
                challenge=open_challenge(connection, row.account, snapshot),
            )

    def provider_history(
        self,
        account: str,
        cursor: str | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        kind: str | None = None,
    ) -> Page[ProviderChange]:
        """Return changes of a provider, latest first; `kind` as in `ProviderChange`."""
        query = _changes(address(account))
        if kind is not None:
            query = query.where(events.c.name.in_([n for n, k in KINDS.items() if k == kind]))
        return self._page(events, query, _change, cursor, limit, kind="provider")

    def roles(self) -> Roles:
        """Return the roles in force, and all grants and revocations, latest first."""
        with self._read() as (connection, snapshot):
            history = role_rows(connection, snapshot)
        return Roles(held=roles_in_force(history), history=tuple(reversed(history)))

    def parameters(self) -> ParameterHistory:
        """Return fee, timeouts and addresses, with the history of those that can change."""
        with self._read() as (connection, snapshot):
            fixed = connection.execute(select(constants).order_by(constants.c.name)).all()
            query = with_position(parameters).order_by(
                parameters.c.block.desc(), parameters.c.log_index.desc()
            )
            history = tuple(
                ParameterRow(row.name, row.value, snapshot.place(row, row.log_index))
                for row in connection.execute(query)
            )
        latest = {row.name: row for row in reversed(history)}
        now = [*latest.values(), *(ParameterRow(row.name, row.value, None) for row in fixed)]
        return ParameterHistory(tuple(sorted(now, key=lambda row: row.name)), history)


def role_rows(
    connection: Connection, snapshot: IndexSnapshot, account: str | None = None
) -> tuple[RoleRow, ...]:
    """Return grants and revocations of roles, oldest first."""
    query = with_position(roles).order_by(roles.c.block, roles.c.log_index)
    if account is not None:
        query = query.where(roles.c.account == account)
    return tuple(
        from_attributes(
            RoleRow,
            row,
            at=snapshot.place(row, row.log_index),
            name=ROLE_NAMES.get(row.role, row.role),
        )
        for row in connection.execute(query)
    )


def roles_in_force(history: tuple[RoleRow, ...]) -> tuple[RoleRow, ...]:
    """Return the grants in force; `history` must be oldest first."""
    grants: dict[tuple[str, str, str], RoleRow] = {}
    for row in history:
        key = (row.contract, row.role, row.account)
        if row.granted:
            grants.setdefault(key, row)
        else:
            grants.pop(key, None)
    return tuple(grants.values())


def open_challenge(
    connection: Connection, account: str, snapshot: IndexSnapshot
) -> ChallengeRow | None:
    """Return the open challenge of a provider, or None."""
    row = connection.execute(
        with_position(events)
        .where(
            events.c.account == account,
            events.c.name.in_(["ProviderChallenged", "ProviderAnswered"]),
        )
        .order_by(events.c.block.desc(), events.c.log_index.desc())
        .limit(1)
    ).one_or_none()
    if row is None or row.name == "ProviderAnswered":
        return None
    return ChallengeRow(at=snapshot.place(row, row.log_index), **row.body)


def is_active(row: Row[Any], now: int) -> bool:
    """Return whether a provider could be assigned a job at chain time `now`."""
    silent = row.answer_by != 0 and now > row.answer_by
    approved = row.status == ProviderStatus.ACTIVE and row.approved_until >= now
    return bool(approved and not silent)


def _changes(account: str) -> Select[Any]:
    return with_position(events).where(events.c.account == account, events.c.name.in_(list(KINDS)))


def _change(row: Row[Any], snapshot: IndexSnapshot) -> ProviderChange:
    values = {name: value for name, value in row.body.items() if name != "provider"}
    return ProviderChange(snapshot.place(row, row.log_index), KINDS[row.name], values)


def latest_figures(connection: Connection, account: str | None = None) -> dict[str, Row[Any]]:
    """Return the latest row of `provider_figures` of each provider, or of one."""
    table = provider_figures
    last_block = select(func.max(table.c.block)).where(table.c.account == providers.c.account)
    query = select(
        providers.c.account, last_block.correlate(providers).scalar_subquery().label("block")
    )
    if account is not None:
        query = query.where(providers.c.account == account)
    row_keys = [
        (row.account, row.block) for row in connection.execute(query) if row.block is not None
    ]
    latest: dict[str, Row[Any]] = {}
    # Rows are selected separately from their keys: in a single query, both databases compute the
    # key for each row of the table. Keys are joined as a table, because SQLite scans the whole
    # table for an IN list of keys.
    for some_keys in chunks(row_keys, _SLICE):
        keys = values(column("account", String), column("block", Int), name="keys")
        key_table = keys.data(some_keys).cte()
        same_key = (table.c.account == key_table.c.account) & (table.c.block == key_table.c.block)
        rows = connection.execute(select(table).join_from(key_table, table, same_key))
        latest |= {row.account: row for row in rows}
    return latest


def _figures(row: Row[Any], now: int) -> ProviderFigures:
    cpu_seconds = row.cpu_seconds + row.cpus_busy * max(0, now - row.time)
    return from_attributes(ProviderFigures, row, cpu_seconds=cpu_seconds)


def _load(row: Row[Any]) -> Load:
    return Load(row.cpus_assigned, row.memory_assigned, row.gpus_assigned)


def _provider_row(row: Row[Any], figures: Row[Any] | None, snapshot: IndexSnapshot) -> ProviderRow:
    now = snapshot.number("time", 0)
    return from_attributes(
        ProviderRow,
        row,
        active=is_active(row, now),
        **offering(row),
        load=NO_LOAD if figures is None else _load(figures),
        figures=_NO_FIGURES if figures is None else _figures(figures, now),
    )
