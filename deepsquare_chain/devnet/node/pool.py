"""The transaction pool: admission checks in geth's order with its messages, and the queue.

A transaction with a nonce gap stays in the pool until the gap is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from eth.exceptions import UnrecognizedTransactionType
from eth_utils.exceptions import ValidationError
from rlp.exceptions import RLPException  # type: ignore[import-untyped]

from deepsquare_chain.devnet.node.rpcerrors import refused
from deepsquare_chain.devnet.node.wire import transaction_type

MAX_RAW = 128 * 1024
MAX_INITCODE = 2 * 24_576
MAX_POOLED = 8_192
MAX_POOLED_PER_SENDER = 1_024
BUMP_PERCENT = 10
_DECODED_TYPES = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class PooledTransaction:
    """A decoded transaction; fees are in wei per gas, ``cost`` is its maximum cost in wei."""

    tx: Any
    hash: bytes
    sender: bytes
    nonce: int
    gas: int
    max_fee: int
    tip: int
    cost: int


def decode_transaction(
    raw: bytes, builder: Any, *, chain_id: int, gas_limit: int
) -> PooledTransaction:
    """Decode a transaction and check it without the state; raises ``RpcError``."""
    if len(raw) > MAX_RAW:
        raise refused(f"oversized data: transaction size {len(raw)}, limit {MAX_RAW}")
    if raw[:1] and 2 < raw[0] < 0x80:
        raise refused(f"transaction type not supported: {raw[0]}")
    try:
        tx = builder.decode(raw)
        sender, tx_hash = tx.sender, tx.hash
    except (RLPException, UnrecognizedTransactionType, ValidationError, ValueError) as error:
        raise refused(f"rlp: can't decode the transaction: {str(error)[:200]}") from error
    except Exception as error:  # a bad signature raises errors of several libraries
        raise refused("invalid sender: the signature doesn't recover to an address") from error
    _check_envelope(tx, chain_id)
    dynamic = transaction_type(tx) >= 2
    max_fee = int(tx.max_fee_per_gas if dynamic else tx.gas_price)
    pooled = PooledTransaction(
        tx=tx,
        hash=bytes(tx_hash),
        sender=bytes(sender),
        nonce=int(tx.nonce),
        gas=int(tx.gas),
        max_fee=max_fee,
        tip=int(tx.max_priority_fee_per_gas) if dynamic else max_fee,
        cost=int(tx.gas) * max_fee + int(tx.value),
    )
    _check_limits(pooled, gas_limit)
    return pooled


def _check_envelope(tx: Any, chain_id: int) -> None:
    if tx.chain_id is None:
        raise refused("only replay-protected (EIP-155) transactions allowed over RPC")
    if tx.chain_id != chain_id:
        raise refused(f"invalid chain id for signer: have {tx.chain_id} want {chain_id}")


def _check_limits(pooled: PooledTransaction, gas_limit: int) -> None:
    if not pooled.tx.to and len(pooled.tx.data) > MAX_INITCODE:
        raise refused(
            f"max initcode size exceeded: code size {len(pooled.tx.data)}, limit {MAX_INITCODE}"
        )
    if pooled.gas > gas_limit:
        raise refused(f"exceeds block gas limit: gas {pooled.gas}, limit {gas_limit}")
    if pooled.tip > pooled.max_fee:
        raise refused(
            "max priority fee per gas higher than max fee per gas: "
            f"maxPriorityFeePerGas: {pooled.tip}, maxFeePerGas: {pooled.max_fee}"
        )
    if pooled.tx.intrinsic_gas > pooled.gas:
        raise refused(
            f"intrinsic gas too low: gas {pooled.gas}, minimum needed {pooled.tx.intrinsic_gas}"
        )


class TransactionPool:
    """Queued transactions by sender and nonce; senders take turns."""

    def __init__(self) -> None:
        self._senders: dict[bytes, dict[int, PooledTransaction]] = {}
        self._by_hash: dict[bytes, PooledTransaction] = {}

    def __len__(self) -> int:
        return len(self._by_hash)

    def get(self, tx_hash: bytes) -> PooledTransaction | None:
        return self._by_hash.get(tx_hash)

    def add(self, pooled: PooledTransaction) -> None:
        """Add a transaction, or replace one with the same nonce if both fees are 10 % higher.

        Raises ``RpcError`` if the fees are too low for a replacement, or the pool is full.
        """
        waiting = self._senders.get(pooled.sender, {})
        old = waiting.get(pooled.nonce)
        if old is not None:
            check_bump(old, pooled)
            del self._by_hash[old.hash]
        elif len(self._by_hash) >= MAX_POOLED or len(waiting) >= MAX_POOLED_PER_SENDER:
            raise refused("txpool is full")
        self.put(pooled)

    def put(self, pooled: PooledTransaction) -> None:
        """Add a transaction without checks."""
        self._senders.setdefault(pooled.sender, {})[pooled.nonce] = pooled
        self._by_hash[pooled.hash] = pooled

    def take(
        self, nonce_of: Callable[[bytes], int], *, base_fee: int, gas_left: int
    ) -> PooledTransaction | None:
        """Remove and return the next transaction that fits into the block, or None."""
        for sender, waiting in self._senders.items():
            pooled = waiting.get(nonce_of(sender))
            if pooled is None or pooled.max_fee < base_fee or pooled.gas > gas_left:
                continue
            self.remove(pooled)
            if waiting:  # move the sender to the end, so that it can't starve the others
                self._senders[sender] = self._senders.pop(sender)
            return pooled
        return None

    def remove(self, pooled: PooledTransaction) -> None:
        waiting = self._senders[pooled.sender]
        del waiting[pooled.nonce], self._by_hash[pooled.hash]
        if not waiting:
            del self._senders[pooled.sender]

    def of(self, sender: bytes) -> Iterator[PooledTransaction]:
        """Return an iterator over the queued transactions of a sender, in no order."""
        return iter(self._senders.get(sender, {}).values())

    def next_nonce(self, sender: bytes, start: int) -> int:
        """Return the first nonce from ``start`` without a queued transaction."""
        waiting = self._senders.get(sender, {})
        while start in waiting:
            start += 1
        return start


def check_bump(old: PooledTransaction, new: PooledTransaction) -> None:
    """Raise ``RpcError`` unless both fees are at least 10 % above the old ones."""
    factor = 100 + BUMP_PERCENT
    if new.max_fee * 100 < old.max_fee * factor or new.tip * 100 < old.tip * factor:
        raise refused("replacement transaction underpriced")
