"""An index of sealed blocks in JSON form, by number, hash, transaction and log.

The worker thread writes it and the server's thread reads it: it is append-only, and a block becomes
visible in the last step of ``append``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepsquare_chain.devnet.node.engine import SealedBlock
from deepsquare_chain.devnet.node.wire import (
    Wire,
    block_fields,
    block_size,
    receipt_fields,
    transaction_fields,
)


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One block; ``next_base_fee`` (wei per gas) is the base fee of the block after it."""

    number: int
    timestamp: int
    next_base_fee: int
    fields: Wire
    transactions: tuple[Wire, ...]
    receipts: tuple[Wire, ...]
    logs: tuple[Wire, ...]

    def to_wire(self, full: bool) -> Wire:
        """Return the block with full transactions, or with their hashes."""
        shown = list(self.transactions) if full else [tx["hash"] for tx in self.transactions]
        return {**self.fields, "transactions": shown}


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Addresses and topics in lower-case hex; an empty set, or None, matches everything."""

    addresses: frozenset[str]
    topics: tuple[frozenset[str] | None, ...]

    def matches(self, log: Wire) -> bool:
        if self.addresses and log["address"] not in self.addresses:
            return False
        topics = log["topics"]
        if len(self.topics) > len(topics):
            return False
        return all(
            allowed is None or topic in allowed
            for allowed, topic in zip(self.topics, topics, strict=False)
        )


class ChainIndex:
    """All sealed blocks of the embedded chain."""

    def __init__(self) -> None:
        self._blocks: list[BlockRecord] = []
        self._numbers: dict[str, int] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._with_logs: list[int] = []

    @property
    def head(self) -> BlockRecord:
        return self._blocks[-1]

    def append(self, sealed: SealedBlock, next_base_fee: int) -> BlockRecord:
        """Add the next block."""
        record = _record(sealed, next_base_fee)
        for position, transaction in enumerate(record.transactions):
            self._places[transaction["hash"]] = (record.number, position)
        self._numbers[record.fields["hash"]] = record.number
        if record.logs:
            self._with_logs.append(record.number)
        self._blocks.append(record)
        return record

    def by_number(self, number: int) -> BlockRecord | None:
        return self._blocks[number] if 0 <= number < len(self._blocks) else None

    def by_hash(self, block_hash: str) -> BlockRecord | None:
        number = self._numbers.get(block_hash)
        return None if number is None else self.by_number(number)

    def transaction(self, tx_hash: str) -> Wire | None:
        entry = self._find(tx_hash)
        return None if entry is None else entry[0].transactions[entry[1]]

    def receipt(self, tx_hash: str) -> Wire | None:
        entry = self._find(tx_hash)
        return None if entry is None else entry[0].receipts[entry[1]]

    def logs(self, first: int, last: int, wanted: LogFilter) -> Iterator[Wire]:
        """Yield the matching logs of the blocks ``first`` to ``last`` inclusive, in chain order."""
        last = min(last, self.head.number)
        start = bisect_left(self._with_logs, first)
        end = bisect_right(self._with_logs, last)
        for number in self._with_logs[start:end]:
            yield from filter(wanted.matches, self._blocks[number].logs)

    def _find(self, tx_hash: str) -> tuple[BlockRecord, int] | None:
        position = self._places.get(tx_hash)
        record = None if position is None else self.by_number(position[0])
        return None if position is None or record is None else (record, position[1])


def _record(sealed: SealedBlock, next_base_fee: int) -> BlockRecord:
    block = sealed.block
    header = block.header
    receipts: list[Wire] = []
    logs: list[Any] = []
    gas_before = 0
    for index, (transaction, receipt) in enumerate(
        zip(block.transactions, sealed.receipts, strict=True)
    ):
        fields = receipt_fields(
            transaction, receipt, header, index, gas_before=gas_before, first_log=len(logs)
        )
        receipts.append(fields)
        logs.extend(fields["logs"])
        gas_before = receipt.gas_used
    return BlockRecord(
        number=header.block_number,
        timestamp=header.timestamp,
        next_base_fee=next_base_fee,
        fields=block_fields(header, block_size(block)),
        transactions=tuple(
            transaction_fields(tx, header, index) for index, tx in enumerate(block.transactions)
        ),
        receipts=tuple(receipts),
        logs=tuple(logs),
    )
