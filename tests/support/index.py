"""An index filled from recorded events, and dumps of its tables for comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eth_utils import keccak, to_checksum_address
from sqlalchemy import select

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import Event
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.indexer import schema
from deepsquare_chain.indexer.block_data import (
    BlockData,
    Header,
    Transaction,
    outcomes,
    signed_calls,
)
from deepsquare_chain.indexer.database import IndexDatabase
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.indexer.writer import IndexWriter
from tests.support.recorded import RecordedGrid

SENDER = "0x" + "5e" * 20


def facts_of(
    events: Iterable[Event],
    times: Mapping[int, int],
    sender: str = SENDER,
    sent: Mapping[str, tuple[str, str, bytes]] | None = None,
) -> BlockData:
    """Return headers and transactions for these events; from `sent` if known, else made up."""
    headers: dict[int, Header] = {}
    transactions: dict[str, Transaction] = {}
    for event in events:
        number = event.block_number
        headers[number] = Header(
            number=number,
            hash=event.block_hash,
            parent="0x" + keccak(text=str(number - 1)).hex(),
            time=times[number],
            gas_used=21_000,
            gas_limit=2**64 - 1,
            base_fee=7,
            transactions=1,
        )
        if event.tx_hash not in transactions:
            earlier = [
                transaction for transaction in transactions.values() if transaction.block == number
            ]
            default = (sender, event.address, bytes.fromhex("2e340823") + bytes(3))
            from_address, to, data = (sent or {}).get(event.tx_hash, default)
            calls = signed_calls(data)
            transactions[event.tx_hash] = Transaction(
                hash=event.tx_hash,
                block=number,
                position=len(earlier),
                sender=to_checksum_address(from_address),
                to=to_checksum_address(to) if len(to) > 2 else None,
                ok=True,
                gas_used=21_000,
                gas_price=10**30,
                nonce=len(transactions),
                value=0,
                input=data,
                forwarded=outcomes(calls, [(call.sender, True) for call in calls]),
            )
    return BlockData(headers, transactions)


class Indexed:
    """An index database with a writer that reads from a list of events."""

    def __init__(
        self,
        deployment: Deployment,
        events: Sequence[Event],
        times: Mapping[int, int],
        database: Any = None,
        sender: str = SENDER,
        sent: Mapping[str, tuple[str, str, bytes]] | None = None,
    ) -> None:
        self.events = list(events)
        self.times = times
        self.database = IndexDatabase.open(database, deployment)
        self.index = Index(self.database, deployment)
        self._writer = IndexWriter(deployment)
        self._facts = facts_of(events, times, sender, sent)
        self.last = max((event.block_number for event in events), default=0)

    @classmethod
    def of_grid(cls, grid: RecordedGrid) -> Indexed:
        """Return an empty index of a recorded grid, with the transactions that were sent."""
        return cls(grid.deployment, grid.events, grid.chain.block_times, sent=grid.chain.sent)

    def read(self, first: int, last: int) -> None:
        """Index a batch of blocks."""
        events = tuple(e for e in self.events if first <= e.block_number <= last)
        time = max(
            (block_time for number, block_time in self.times.items() if number <= last), default=0
        )
        with self.database.begin() as connection:
            batch = Batch(events, first, last, time=time)
            self._writer.apply(batch, connection, self._facts)

    def read_all(self, size: int = 10**9) -> None:
        """Index all blocks in batches of `size`."""
        for first in range(0, self.last + 1, size):
            self.read(first, min(first + size - 1, self.last))

    def pass_time(self, now: int) -> None:
        """Index a block without events, at a chain time in seconds."""
        number = self.index.status().block
        with self.database.begin() as connection:
            self._writer.apply(Batch((), number, number, time=now), connection, BlockData())

    def roll_back(self, number: int) -> None:
        """Roll back all blocks after `number`."""
        with self.database.begin() as connection:
            batch = Batch((), number + 1, self.last, rolled_back_to=number)
            self._writer.apply(batch, connection, BlockData())

    def close(self) -> None:
        """Close the database."""
        self.database.close()


def dump(database: IndexDatabase) -> dict[str, list[tuple[Any, ...]]]:
    """Return all rows derived from the chain, by table, ordered by primary key."""
    rows_by_table: dict[str, list[tuple[Any, ...]]] = {}
    with database.read() as connection:
        for table in schema.DERIVED:
            query = select(table).order_by(*table.primary_key.columns)
            rows_by_table[table.name] = [tuple(row) for row in connection.execute(query)]
    return rows_by_table
