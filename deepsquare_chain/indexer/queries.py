"""All queries of the index, for the web pages and the JSON API.

Every method is synchronous and reads one snapshot of the database; services call it in a thread.
Lists are paginated with opaque cursors, which stay valid when rows are added or removed by a reorg.
Unknown objects raise `NotFoundError`, invalid arguments `UsageError`.
"""

from __future__ import annotations

import re
from typing import Any, Final

from eth_utils.address import is_address
from sqlalchemy import Connection, Row, Select, Table, func, select

from deepsquare_chain.audit.entries import from_attributes
from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.indexer.accounts import AccountQueries, RegistryQueries
from deepsquare_chain.indexer.anomalies import AnomalyQueries
from deepsquare_chain.indexer.jobs import JobQueries
from deepsquare_chain.indexer.pagination import (
    DEFAULT_LIMIT,
    MAX_DETAIL_ROWS,
    IndexSnapshot,
    Reader,
    address,
    event_row,
    first_rows,
    movement_row,
    with_position,
)
from deepsquare_chain.indexer.read_models import (
    BlockDetail,
    BlockRow,
    Change,
    Changes,
    ForwardedRow,
    Hit,
    Page,
    Status,
    TransactionDetail,
    TransactionRow,
)
from deepsquare_chain.indexer.schema import (
    changes,
    events,
    forwarded,
    headers,
    jobs,
    movements,
    providers,
    transactions,
)
from deepsquare_chain.indexer.series import SeriesQueries
from deepsquare_chain.store.base import blocks

# -- queries for blocks and transactions, and the search

#: Patterns of hashes and numbers in a search; the group contains only the digits.
HASH: Final = re.compile(r"(?:0x)?([0-9a-f]{64})")
NUMBER: Final = re.compile(r"#?([0-9]{1,18})")
_MAX_BLOCK: Final = 2**63 - 1
#: Maximum number of jobs in a search result.
MAX_HITS: Final = 20
_TRANSACTIONS: Final = select(transactions, headers.c.time).join(
    headers, headers.c.number == transactions.c.block
)


class BlockQueries(Reader):
    """Queries for blocks and transactions with events of the grid. Others are not indexed."""

    def blocks(self, cursor: str | int | None = None, limit: int = DEFAULT_LIMIT) -> Page[BlockRow]:
        """Return blocks, latest first.

        Raises:
            UsageError: The cursor or the limit is invalid.
        """
        return self._page(headers, select(headers), _block, cursor, limit)

    def block(self, number_or_hash: int | str) -> BlockDetail:
        """Return a block by its number or hash.

        Raises:
            NotFoundError: The block does not exist, or has no events of the grid.
        """
        if isinstance(number_or_hash, int):
            key = headers.c.number == min(number_or_hash, _MAX_BLOCK)
        else:
            key = headers.c.hash == number_or_hash.lower()
        with self._read() as (connection, snapshot):
            row = connection.execute(select(headers).where(key)).one_or_none()
            if row is None:
                raise NotFoundError(
                    f"Block {str(number_or_hash)[:80]} has no event of this grid, or is not indexed yet"
                )
            query = _TRANSACTIONS.where(transactions.c.block == row.number)
            rows, more = first_rows(connection, query, transactions.c.position)
            items = tuple(_transaction(row, snapshot) for row in rows)
            return BlockDetail(_block(row, snapshot), items, more)

    def transactions(
        self,
        cursor: str | int | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        sender: str | None = None,
        signer: str | None = None,
        block: int | None = None,
    ) -> Page[TransactionRow]:
        """Return transactions, latest first. Raises the errors of `blocks`.

        Args:
            cursor: `next` of the previous page, or a page number.
            limit: Rows per page.
            sender: Address that sent the transactions and paid their gas.
            signer: Address that signed requests which relayers submitted in the transactions.
            block: Block number.
        """
        query = _TRANSACTIONS
        if sender is not None:
            query = query.where(transactions.c.sender == address(sender))
        if signer is not None:
            signed_requests = select(forwarded.c.number).where(
                forwarded.c.signer == address(signer),
                forwarded.c.block == transactions.c.block,
                forwarded.c.position == transactions.c.position,
            )
            query = query.where(signed_requests.exists())
        if block is not None:
            query = query.where(transactions.c.block == min(block, _MAX_BLOCK))
        return self._page(transactions, query, _transaction, cursor, limit)

    def transaction(self, tx_hash: str) -> TransactionDetail:
        """Return a transaction with its events and movements of credits.

        Raises:
            NotFoundError: The transaction does not exist, or has no events of the grid.
        """
        with self._read() as (connection, snapshot):
            query = _TRANSACTIONS.where(transactions.c.hash == tx_hash.lower())
            row = connection.execute(query).one_or_none()
            if row is None:
                raise NotFoundError(
                    f"Transaction {tx_hash[:80]} has no event of this grid, or is not indexed yet"
                )
            return _transaction_detail(connection, row, snapshot)

    def search(self, text: str) -> tuple[Hit, ...]:
        """Search for a job ID or name, an address, a hash, a block number or a provider ID."""
        query = text.strip()[:200]
        if not query:
            return ()
        with self._read() as (connection, _):
            if is_address(query):
                return _address_hits(connection, address(query.lower()))
            if match := HASH.fullmatch(query.lower()):
                return _hash_hits(connection, match[1])
            return (*_number_hits(connection, query), *_name_hits(connection, query))


def _address_hits(connection: Connection, account: str) -> tuple[Hit, ...]:
    row = connection.execute(
        select(providers.c.id).where(providers.c.account == account)
    ).one_or_none()
    hits = [Hit("account", account, account)]
    if row is not None:
        hits.insert(0, Hit("provider", account, f"provider {row.id or account}"))
    return tuple(hits)


def _hash_hits(connection: Connection, digits: str) -> tuple[Hit, ...]:
    key = "0x" + digits
    hits = []
    if connection.execute(select(headers.c.number).where(headers.c.hash == key)).first():
        hits.append(Hit("block", key, key))
    if connection.execute(select(transactions.c.block).where(transactions.c.hash == key)).first():
        hits.append(Hit("transaction", key, key))
    query = select(jobs.c.id, jobs.c.name).where(jobs.c.definition == digits)
    rows = connection.execute(query.order_by(jobs.c.id.desc()).limit(MAX_HITS))
    return (*hits, *(Hit("job", str(row.id), row.name) for row in rows))


def _number_hits(connection: Connection, query: str) -> list[Hit]:
    match = NUMBER.fullmatch(query)
    if match is None:
        return []
    number, hits = int(match[1]), []
    job = connection.execute(select(jobs.c.name).where(jobs.c.id == number)).one_or_none()
    if job is not None:
        hits.append(Hit("job", str(number), job.name))
    if connection.execute(select(headers.c.number).where(headers.c.number == number)).first():
        hits.append(Hit("block", str(number), f"block {number}"))
    row = connection.execute(
        select(providers.c.account).where(providers.c.id == number)
    ).one_or_none()
    if row is not None:
        hits.append(Hit("provider", row.account, f"provider {number}"))
    return hits


def _name_hits(connection: Connection, text: str) -> list[Hit]:
    query = (
        select(jobs.c.id, jobs.c.name)
        .where(jobs.c.name_key.contains(text.casefold(), autoescape=True))
        .order_by(jobs.c.id.desc())
        .limit(MAX_HITS)
    )
    return [Hit("job", str(row.id), row.name) for row in connection.execute(query)]


def _block(row: Row[Any], snapshot: IndexSnapshot) -> BlockRow:
    return from_attributes(BlockRow, row, finalized=row.number <= snapshot.finalized)


def _transaction(row: Row[Any], snapshot: IndexSnapshot) -> TransactionRow:
    return from_attributes(TransactionRow, row, at=snapshot.place(row, None))


def _transaction_detail(
    connection: Connection, row: Row[Any], snapshot: IndexSnapshot
) -> TransactionDetail:
    def of_transaction(table: Table, query: Select[Any]) -> Select[Any]:
        return query.where(table.c.block == row.block, table.c.position == row.position)

    event_query = of_transaction(events, with_position(events))
    event_rows, more_events = first_rows(connection, event_query, events.c.log_index)
    movement_query = of_transaction(movements, with_position(movements)).order_by(
        movements.c.number
    )
    movement_rows = connection.execute(movement_query.limit(2 * MAX_DETAIL_ROWS))
    request_query = of_transaction(forwarded, select(forwarded)).order_by(forwarded.c.number)
    request_rows = connection.execute(request_query)
    return from_attributes(
        TransactionDetail,
        row,
        row=_transaction(row, snapshot),
        input="0x" + row.input.hex(),
        forwarded=tuple(from_attributes(ForwardedRow, request) for request in request_rows),
        events=tuple(event_row(event, snapshot) for event in event_rows),
        more_events=more_events,
        movements=tuple(movement_row(movement, snapshot) for movement in movement_rows),
    )


MAX_CHANGES: Final = 200
#: Name of the follower that writes the tables.
CURSOR: Final = "index"


class Index(
    JobQueries, AccountQueries, RegistryQueries, BlockQueries, SeriesQueries, AnomalyQueries
):
    """All queries of the index. The database must be opened by `IndexDatabase.open`."""

    def status(self) -> Status:
        """Return the progress and the grid of the index."""
        blocks_query = select(blocks.c.number, blocks.c.hash).where(blocks.c.name == CURSOR)
        with self._read() as (connection, snapshot):
            deployment = self.deployment
            query = blocks_query.order_by(blocks.c.number.desc()).limit(1)
            cursor = connection.execute(query).one_or_none()
            return Status(
                chain_id=deployment.chain_id,
                scheduler=deployment.scheduler,
                registry=deployment.registry,
                credit=deployment.credit,
                treasury=deployment.treasury,
                genesis=snapshot.values.get("genesis", ""),
                start_block=deployment.block,
                block=snapshot.number("block"),
                block_hash=cursor.hash if cursor is not None else "",
                time=snapshot.number("time", 0),
                finalized=snapshot.finalized,
                head=snapshot.number("head"),
                head_time=snapshot.number("head_time", 0),
                change=snapshot.number("change", 0),
                built_since=float(snapshot.values.get("built_since", 0)),
            )

    def changes(self, since: int, limit: int = MAX_CHANGES) -> Changes:
        """Return the changes after the given change number, for live pages."""
        with self._read() as (connection, snapshot):
            latest = snapshot.number("change", 0)
            query = select(changes).where(changes.c.number > since).order_by(changes.c.number)
            rows = connection.execute(query.limit(limit)).all()
            oldest = connection.execute(select(func.min(changes.c.number))).scalar()
        items = tuple(from_attributes(Change, row, jobs=tuple(row.jobs)) for row in rows)
        missed = since > latest or (since < latest and (oldest is None or oldest > since + 1))
        return Changes(items[-1].number if items else latest, items, missed)
