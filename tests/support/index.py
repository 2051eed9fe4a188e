"""An index filled from recorded events, and its tables as they can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eth_utils import keccak, to_checksum_address
from sqlalchemy import select

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.event_types import Event
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

SENDER = "0x" + "5e" * 20


def facts_of(
    events: Iterable[Event],
    times: Mapping[int, int],
    sender: str = SENDER,
    sent: Mapping[str, tuple[str, str, bytes]] | None = None,
) -> BlockData:
    """Headers and transactions that could have made these events, or did, as far as `sent` knows."""
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
            before = [each for each in transactions.values() if each.block == number]
            guess = (sender, event.address, bytes.fromhex("2e340823") + bytes(3))
            who, to, data = (sent or {}).get(event.tx_hash, guess)
            calls = signed_calls(data)
            transactions[event.tx_hash] = Transaction(
                hash=event.tx_hash,
                block=number,
                position=len(before),
                sender=to_checksum_address(who),
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
    """A database with a writer whose chain is a list of events."""

    def __init__(
        self,
        deployment: Deployment,
        events: Sequence[Event],
        times: Mapping[int, int],
        where: Any = None,
        sender: str = SENDER,
        sent: Mapping[str, tuple[str, str, bytes]] | None = None,
    ) -> None:
        self.events = list(events)
        self.times = times
        self.database = IndexDatabase.open(where, deployment)
        self.index = Index(self.database, deployment)
        self._writer = IndexWriter(deployment)
        self._facts = facts_of(events, times, sender, sent)
        self.last = max((event.block_number for event in events), default=0)

    def read(self, first: int, last: int) -> None:
        """A batch of blocks."""
        found = tuple(e for e in self.events if first <= e.block_number <= last)
        time = max((at for number, at in self.times.items() if number <= last), default=0)
        with self.database.begin() as connection:
            batch = Batch(found, first, last, time=time)
            self._writer.apply(batch, connection, self._facts)

    def read_all(self, size: int = 10**9) -> None:
        """Everything in batches of so many blocks."""
        for first in range(0, self.last + 1, size):
            self.read(first, min(first + size - 1, self.last))

    def pass_time(self, now: int) -> None:
        """A block without events, at a chain time in seconds."""
        number = self.index.status().block
        with self.database.begin() as connection:
            self._writer.apply(Batch((), number, number, time=now), connection, BlockData())

    def roll_back(self, number: int) -> None:
        """Everything after a block did not happen."""
        with self.database.begin() as connection:
            batch = Batch((), number + 1, self.last, rolled_back_to=number)
            self._writer.apply(batch, connection, BlockData())

    def close(self) -> None:
        """Close the database."""
        self.database.close()


def dump(database: IndexDatabase) -> dict[str, list[tuple[Any, ...]]]:
    """All rows that follow from the chain, by table, in the order of their keys."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    with database.read() as connection:
        for table in schema.DERIVED:
            query = select(table).order_by(*table.primary_key.columns)
            found[table.name] = [tuple(row) for row in connection.execute(query)]
    return found
