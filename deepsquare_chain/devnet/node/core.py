"""The core of the embedded node: EVM, transaction pool and index. Used by one thread only.

The EVM is py-evm as configured by eth-tester, with one pending block, which keeps one state open
for all its transactions, so that a state root is computed once per block instead of once per
transaction.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from eth.exceptions import OutOfGas, Revert, UnrecognizedTransactionType, VMError
from eth.vm.forks.cancun import CancunVM
from eth.vm.spoof import SpoofTransaction
from eth_bloom.bloom import BloomFilter
from eth_tester.backends.pyevm.main import PyEVMBackend
from eth_utils.exceptions import ValidationError
from rlp.exceptions import RLPException  # type: ignore[import-untyped]

from deepsquare_chain.chain.deploying import CREATE2_PROXY, CREATE2_PROXY_CODE
from deepsquare_chain.devnet.node.wire import (
    INTERNAL_ERROR,
    CallRequest,
    RpcError,
    Wire,
    block_fields,
    block_size,
    data,
    invalid_params,
    receipt_fields,
    revert_error,
    server_error,
    transaction_fields,
    transaction_type,
)

BASE_GAS = 21_000
CALL_STIPEND = 2_300
_READERS = 4  # cached states: the head, and a few earlier blocks


@dataclass(slots=True)
class Pending:
    """The pending block."""

    vm: Any
    header: Any
    transactions: list[Any] = field(default_factory=list)
    receipts: list[Any] = field(default_factory=list)

    @property
    def gas_left(self) -> int:
        return int(self.header.gas_limit - self.header.gas_used)


@dataclass(frozen=True, slots=True)
class SealedBlock:
    """A mined block: py-evm's block, and the receipts of its transactions in order."""

    block: Any
    receipts: tuple[Any, ...]


class Engine:
    """State, execution and blocks. Raises ``RpcError`` with the messages of geth."""

    def __init__(
        self, chain_id: int, balances: Mapping[bytes, int], *, gas_limit: int, timestamp: int
    ) -> None:
        """Create the genesis block; ``balances`` in wei by address, ``timestamp`` in seconds.

        As with anvil, the deterministic deployment proxy exists from the beginning.
        """
        empty: dict[str, Any] = {"nonce": 0, "code": b"", "storage": {}}
        self._backend = PyEVMBackend(
            genesis_parameters=PyEVMBackend.generate_genesis_params(
                {"gas_limit": gas_limit, "timestamp": timestamp}
            ),
            genesis_state={
                bytes.fromhex(CREATE2_PROXY[2:]): {
                    **empty,
                    "balance": 0,
                    "code": CREATE2_PROXY_CODE,
                },
                **{address: {**empty, "balance": wei} for address, wei in balances.items()},
            },
            vm_configuration=((0, CancunVM),),
        )
        self._chain = self._backend.chain
        self._chain.chain_id = chain_id
        self.chain_id = chain_id
        self.gas_limit = gas_limit
        self.builder: Any = CancunVM.get_transaction_builder()
        self._pending: Pending | None = None
        self._readers: OrderedDict[bytes, Any] = OrderedDict()

    @property
    def head(self) -> Any:
        """Header of the newest sealed block."""
        return self._chain.get_canonical_head()

    def header(self, number: int) -> Any:
        """Header of a sealed block."""
        return self._chain.get_canonical_block_header_by_number(number)

    @property
    def genesis(self) -> SealedBlock:
        return SealedBlock(self._chain.get_canonical_block_by_number(0), ())

    @property
    def next_base_fee(self) -> int:
        """Base fee of the pending block, in wei per gas."""
        return int(self._chain.header.base_fee_per_gas)

    @property
    def pending(self) -> Pending | None:
        return self._pending

    def open_block(self, timestamp: int) -> Pending:
        """Return the pending block; a new one gets ``timestamp`` (seconds)."""
        if self._pending is None:
            # All transactions execute with the header with which the block is sealed.
            header = self._chain.header.copy(timestamp=timestamp, mix_hash=os.urandom(32))
            self._pending = Pending(self._chain.get_vm(header), header)
        return self._pending

    def drop_block(self) -> list[Any]:
        """Discard the pending block, and return its transactions for another attempt."""
        dropped = self._pending.transactions if self._pending else []
        self._pending = None
        return dropped

    def apply(self, transaction: Any, timestamp: int) -> None:
        """Execute in the pending block. A revert gives a receipt; invalid ones raise ``RpcError``."""
        pending = self.open_block(timestamp)
        try:
            receipt, _ = pending.vm.apply_transaction(pending.header, transaction)
        except ValidationError as error:
            raise server_error(str(error)) from error
        bloom = BloomFilter(pending.header.bloom) | BloomFilter(receipt.bloom)
        pending.header = pending.header.copy(bloom=int(bloom), gas_used=receipt.gas_used)
        pending.transactions.append(transaction)
        pending.receipts.append(receipt)

    def seal(self, timestamp: int) -> SealedBlock:
        """Mine the pending block, or an empty one with ``timestamp`` if there is none."""
        pending = self.open_block(timestamp)
        block = pending.vm.set_block_transactions_and_withdrawals(
            pending.vm.get_block(),
            pending.header,
            tuple(pending.transactions),
            tuple(pending.receipts),
        )
        mined = pending.vm.mine_block(block).block
        self._chain.chaindb.persist_block(mined)
        self._chain.header = self._chain.create_header_from_parent(mined.header)
        self._pending = None
        return SealedBlock(mined, tuple(pending.receipts))

    @contextmanager
    def state_at(self, header: Any | None, timestamp: int | None = None) -> Iterator[Any]:
        """Provide the state after ``header``'s block (None: pending); changes to it are reverted.

        ``timestamp`` (seconds) is the result of the TIMESTAMP opcode; None for the block's own.
        """
        if header is None and self._pending is None:
            header = self.head  # without a pending block, its state is that of the head
        vm = self._reader(header) if header is not None else self._pending.vm  # type: ignore[union-attr]
        header_seen = vm.get_header()
        free_header = header_seen.copy(
            base_fee_per_gas=0, timestamp=timestamp or header_seen.timestamp
        )
        state = vm.state
        saved_context = state.execution_context
        state.lock_changes()  # slots start cold, and "original" values are those before this call
        snapshot = state.snapshot()
        state.execution_context = vm.create_execution_context(
            free_header, vm.previous_hashes, vm.chain_context
        )
        try:
            yield state
        finally:
            state.revert(snapshot)
            state.execution_context = saved_context

    def call(self, request: CallRequest, header: Any | None, timestamp: int | None) -> bytes:
        """Return the data of a call that leaves no changes; a revert raises ``RpcError`` 3."""
        gas = min(request.gas or self.gas_limit, self.gas_limit)
        computation = self._try(request, gas, header, timestamp)
        if computation.is_error:
            raise _failure(computation, gas)
        return bytes(computation.output)

    def estimate_gas(self, request: CallRequest, header: Any | None, timestamp: int | None) -> int:
        """Return a gas limit with which the call succeeds, at most a few percent too high."""
        cap = self._gas_cap(request, header)
        first = self._try(request, cap, header, timestamp)
        if first.is_error:
            raise _failure(first, cap)
        gas_used = cap - first.get_gas_remaining()
        if gas_used == BASE_GAS:
            return BASE_GAS
        # EIP-150: each inner call gets at most 63/64 of the gas, so the spent gas may not suffice.
        guess = min(cap, (gas_used + CALL_STIPEND) * 64 // 63)
        while guess < cap and self._try(request, guess, header, timestamp).is_error:
            guess = min(cap, guess + max((cap - guess) // 4, guess // 50))
        return int(guess)

    def _gas_cap(self, request: CallRequest, header: Any | None) -> int:
        """Return the maximum gas that the sender can pay for, within the block's gas limit."""
        cap = min(request.gas or self.gas_limit, self.gas_limit)
        if request.max_fee:
            with self.state_at(header) as state:
                balance = state.get_balance(request.sender)
            cap = min(cap, max(0, balance - request.value) // request.max_fee)
        return cap

    def _try(
        self, request: CallRequest, gas: int, header: Any | None, timestamp: int | None
    ) -> Any:
        with self.state_at(header, timestamp) as state:
            return self._execute(state, request, gas)

    def _execute(self, state: Any, request: CallRequest, gas: int) -> Any:
        unsigned = self.builder.new_unsigned_dynamic_fee_transaction(
            chain_id=self.chain_id,
            nonce=state.get_nonce(request.sender),
            max_priority_fee_per_gas=0,
            max_fee_per_gas=0,
            gas=gas,
            to=request.to,
            value=request.value,
            data=request.data,
            access_list=(),
        )
        if unsigned.intrinsic_gas > gas:
            raise server_error(
                f"intrinsic gas too low: gas {gas}, minimum needed {unsigned.intrinsic_gas}"
            )
        try:
            return state.apply_transaction(SpoofTransaction(unsigned, from_=request.sender))
        except ValidationError as error:
            balance = state.get_balance(request.sender)
            if balance < request.value:
                raise server_error(
                    "insufficient funds for gas * price + value: "
                    f"address 0x{request.sender.hex()} have {balance} want {request.value}"
                ) from error
            raise server_error(str(error)) from error

    def _reader(self, header: Any) -> Any:
        """Return a VM on a sealed block's state; it is cached, to keep its caches between calls."""
        vm = self._readers.get(header.hash)
        if vm is None:
            vm = self._chain.get_vm(header)
            self._readers[header.hash] = vm
            if len(self._readers) > _READERS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(header.hash)
        return vm


def _failure(computation: Any, gas: int) -> RpcError:
    error: VMError = computation.error
    if isinstance(error, Revert):
        return revert_error(bytes(computation.output))
    if isinstance(error, OutOfGas):
        return server_error(f"gas required exceeds allowance ({gas})")
    return server_error(f"{_words(type(error).__name__)}: {error}")


def _words(name: str) -> str:
    """``InvalidInstruction`` -> ``invalid instruction``."""
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()


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


# -- the transaction pool: admission checks in geth's order with its messages, and the queue
#
# A transaction with a nonce gap stays in the pool until the gap is filled.

MAX_RAW = 128 * 1024
MAX_INITCODE = 2 * 24_576
MAX_POOLED = 8_192
MAX_POOLED_PER_SENDER = 1_024
BUMP_PERCENT = 10


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
        raise server_error(f"oversized data: transaction size {len(raw)}, limit {MAX_RAW}")
    if raw[:1] and 2 < raw[0] < 0x80:
        raise server_error(f"transaction type not supported: {raw[0]}")
    try:
        tx = builder.decode(raw)
        sender, tx_hash = tx.sender, tx.hash
    except (RLPException, UnrecognizedTransactionType, ValidationError, ValueError) as error:
        raise server_error(f"rlp: can't decode the transaction: {str(error)[:200]}") from error
    except Exception as error:  # a bad signature raises errors of several libraries
        raise server_error("invalid sender: the signature doesn't recover to an address") from error
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
        raise server_error("only replay-protected (EIP-155) transactions allowed over RPC")
    if tx.chain_id != chain_id:
        raise server_error(f"invalid chain id for signer: have {tx.chain_id} want {chain_id}")


def _check_limits(pooled: PooledTransaction, gas_limit: int) -> None:
    if not pooled.tx.to and len(pooled.tx.data) > MAX_INITCODE:
        raise server_error(
            f"max initcode size exceeded: code size {len(pooled.tx.data)}, limit {MAX_INITCODE}"
        )
    if pooled.gas > gas_limit:
        raise server_error(f"exceeds block gas limit: gas {pooled.gas}, limit {gas_limit}")
    if pooled.tip > pooled.max_fee:
        raise server_error(
            "max priority fee per gas higher than max fee per gas: "
            f"maxPriorityFeePerGas: {pooled.tip}, maxFeePerGas: {pooled.max_fee}"
        )
    if pooled.tx.intrinsic_gas > pooled.gas:
        raise server_error(
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
            raise server_error("txpool is full")
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
        raise server_error("replacement transaction underpriced")


GAS_LIMIT = 60_000_000
_MAX_CATCH_UP = 50  # transactions; takes about a tenth of a second
Tag = str | int | bytes


class ChainClock:
    """Chain time in seconds: wall time plus an offset, or a clock that advances only on request."""

    def __init__(self, *, frozen: bool) -> None:
        self._frozen = int(time.time()) if frozen else None
        self._offset = 0
        self.exact: int | None = None  # requested timestamp of the next block

    @property
    def offset(self) -> int:
        return self._offset

    def now(self) -> int:
        return self.at(int(time.time()))

    def at(self, wall: int) -> int:
        """Return chain time at ``wall`` seconds; a frozen clock ignores wall time."""
        return self._frozen if self._frozen is not None else wall + self._offset

    def advance(self, seconds: int) -> None:
        if self._frozen is not None:
            self._frozen += seconds
        self._offset += seconds

    def sealed(self, timestamp: int) -> None:
        """Update the clock after a block at ``timestamp``; a requested time continues from it."""
        if self._frozen is not None:
            self._frozen = max(self._frozen, timestamp)
        elif self.exact is not None:
            self._offset = timestamp - int(time.time())
        self.exact = None


class Core:
    """The operations of the worker thread, one at a time. Refused requests raise ``RpcError``."""

    def __init__(
        self,
        chain_id: int,
        balances: Mapping[bytes, int],
        *,
        frozen: bool = False,
        gas_limit: int = GAS_LIMIT,
    ) -> None:
        self.clock = ChainClock(frozen=frozen)
        self.engine = Engine(chain_id, balances, gas_limit=gas_limit, timestamp=self.clock.now())
        self.index = ChainIndex()
        self.index.append(self.engine.genesis, self.engine.next_base_fee)
        self._pool = TransactionPool()
        self._executed: dict[bytes, PooledTransaction] = {}
        self.plan: int | None = None  # wall second of the next block, set by the worker

    @property
    def has_executed(self) -> bool:
        """Whether the pending block contains transactions."""
        return bool(self._executed)

    # -- transactions and blocks

    def send_raw(self, raw: bytes) -> str:
        """Add a signed transaction to the pool, and return its hash."""
        pooled = decode_transaction(
            raw, self.engine.builder, chain_id=self.engine.chain_id, gas_limit=self.engine.gas_limit
        )
        if pooled.hash in self._executed or self._pool.get(pooled.hash):
            raise server_error("already known")
        self._check_account(pooled)
        self._pool.add(pooled)
        return data(pooled.hash)

    def step(self) -> bool:
        """Execute one queued transaction in the pending block; return False if none is ready."""
        if not self._pool:
            return False
        pending = self.engine.open_block(self._next_timestamp())
        pooled = self._pool.take(
            pending.vm.state.get_nonce,
            base_fee=pending.header.base_fee_per_gas,
            gas_left=pending.gas_left,
        )
        if pooled is None:
            return False
        try:
            self.engine.apply(pooled.tx, pending.header.timestamp)
        except RpcError:
            return True  # its sender can no longer pay: dropped, as by other nodes
        self._executed[pooled.hash] = pooled
        return True

    def seal(self) -> int:
        """Mine the pending block, or an empty one, and return its number."""
        sealed = self.engine.seal(self._next_timestamp())
        self._executed.clear()
        self.clock.sealed(sealed.block.header.timestamp)
        return self.index.append(sealed, self.engine.next_base_fee).number

    def mine(self) -> int:
        """Mine a block with all ready transactions that fit, and return its number."""
        while self.step():
            pass
        return self.seal()

    def increase_time(self, seconds: int) -> int:
        """Advance the clock, and return its total offset in seconds."""
        # Many instant blocks can move the head ahead of the clock; users count from the head.
        ahead = max(0, int(self.engine.head.timestamp) - self.clock.now())
        self.clock.advance(seconds + ahead)
        self._requeue_pending()
        return self.clock.offset

    def set_next_timestamp(self, timestamp: int) -> None:
        """Set the timestamp of the next block, in seconds, later than the head's."""
        if timestamp <= self.engine.head.timestamp:
            raise invalid_params(
                f"timestamp {timestamp} is not later than the head's {self.engine.head.timestamp}"
            )
        self.clock.exact = timestamp
        self._requeue_pending()

    # -- state

    def call(self, request: CallRequest, tag: Tag) -> str:
        if request.gas and request.max_fee:
            self._check_price(request, tag)
        return data(self.engine.call(request, *self._block_and_time(tag)))

    def estimate_gas(self, request: CallRequest, tag: Tag) -> int:
        return self.engine.estimate_gas(request, *self._block_and_time(tag))

    def balance(self, address: bytes, tag: Tag) -> int:
        with self.engine.state_at(self._block_and_time(tag)[0]) as state:
            return int(state.get_balance(address))

    def nonce(self, address: bytes, tag: Tag) -> int:
        if tag == "pending":
            with self.engine.state_at(None) as state:
                return self._pool.next_nonce(address, int(state.get_nonce(address)))
        with self.engine.state_at(self._block_and_time(tag)[0]) as state:
            return int(state.get_nonce(address))

    def code(self, address: bytes, tag: Tag) -> str:
        with self.engine.state_at(self._block_and_time(tag)[0]) as state:
            return data(state.get_code(address))

    def storage(self, address: bytes, slot: int, tag: Tag) -> str:
        with self.engine.state_at(self._block_and_time(tag)[0]) as state:
            return f"0x{state.get_storage(address, slot):064x}"

    def waiting_transaction(self, tx_hash: bytes) -> Wire | None:
        pooled = self._executed.get(tx_hash) or self._pool.get(tx_hash)
        return transaction_fields(pooled.tx, None, None) if pooled else None

    def pending_block(self, full: bool) -> Wire:
        """Return the pending block without a hash, in the form of other nodes."""
        self._catch_up()
        pending = self.engine.open_block(self._next_timestamp())
        hidden = {"hash": None, "nonce": None, "logsBloom": None, "miner": None}
        shown = [
            transaction_fields(tx, None, None) if full else data(tx.hash)
            for tx in pending.transactions
        ]
        return {**block_fields(pending.header, 0), **hidden, "transactions": shown}

    # -- private

    def _next_timestamp(self) -> int:
        """Return the timestamp of the pending block: requested, planned or now; after the head's."""
        planned = self.clock.exact
        if planned is None:
            planned = self.clock.now() if self.plan is None else self.clock.at(self.plan)
        return max(planned, int(self.engine.head.timestamp) + 1)

    def _requeue_pending(self) -> None:
        """Return the pending block's transactions to the pool, to execute them at the new time."""
        self.engine.drop_block()
        for pooled in self._executed.values():
            self._pool.put(pooled)
        self._executed.clear()

    def _block_and_time(self, tag: Tag) -> tuple[Any | None, int | None]:
        """Return header (None: pending) and TIMESTAMP for a call; ``latest`` uses the current time."""
        head = self.engine.head
        if tag == "pending":
            self._catch_up()
            stamp = None if self.engine.pending else max(int(head.timestamp), self.clock.now())
            return None, stamp
        if tag in ("latest", "safe", "finalized"):
            return head, max(int(head.timestamp), self.clock.now())
        if isinstance(tag, bytes):
            record = self.index.by_hash(data(tag))
            number = -1 if record is None else record.number
        else:
            number = 0 if tag == "earliest" else int(tag)
        if not 0 <= number <= head.block_number:
            raise server_error("header not found")
        return self.engine.header(number), None

    def _catch_up(self) -> None:
        """Execute queued transactions, so that they count as pending; limited, to not delay blocks."""
        for _ in range(_MAX_CATCH_UP):
            if not self.step():
                return

    def _check_account(self, pooled: PooledTransaction) -> None:
        nonce = self.nonce(pooled.sender, "latest")
        if pooled.nonce < nonce:
            raise server_error(f"nonce too low: next nonce {nonce}, tx nonce {pooled.nonce}")
        for executed in self._executed.values():
            if (executed.sender, executed.nonce) == (pooled.sender, pooled.nonce):
                check_bump(executed, pooled)
                raise server_error("replacement transaction underpriced")  # it is already executed
        queued_cost = sum(
            tx.cost for tx in self._pool.of(pooled.sender) if tx.nonce != pooled.nonce
        )
        with self.engine.state_at(None) as state:
            balance = int(state.get_balance(pooled.sender))
        if balance < queued_cost + pooled.cost:
            raise server_error(
                f"insufficient funds for gas * price + value: balance {balance}, "
                f"queued cost {queued_cost}, tx cost {pooled.cost}, "
                f"overshot {queued_cost + pooled.cost - balance}"
            )

    def _check_price(self, request: CallRequest, tag: Tag) -> None:
        needed = (request.gas or 0) * (request.max_fee or 0) + request.value
        balance = self.balance(request.sender, tag)
        if balance < needed:
            raise server_error(
                "insufficient funds for gas * price + value: "
                f"address 0x{request.sender.hex()} have {balance} want {needed}"
            )


# -- the worker thread of the embedded chain: seals blocks on time, and runs requests in between

log = logging.getLogger(__name__)
T = TypeVar("T")
_Job = tuple[Future[Any], Callable[[], Any]]

INSTANT = 0
_READS_PER_TRANSACTION = 4  # prevents starvation of calls and of transactions
_NEVER = float("inf")


class Worker(threading.Thread):
    """Runs a ``Core`` in a thread.

    ``block_time`` is in whole seconds: blocks, also empty ones, are sealed at full seconds of the
    wall clock. ``INSTANT`` seals when no transaction is left to execute; None seals on request only.
    """

    def __init__(self, core: Core, block_time: int | None) -> None:
        super().__init__(name="embedded-chain", daemon=True)
        self.core = core
        self.failure: BaseException | None = None
        self._block_time = block_time
        self._urgent: deque[_Job] = deque()
        self._reads: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._reads_run = 0
        self._deadline = _NEVER

    def submit(self, work: Callable[[], T], *, urgent: bool = False) -> Future[T]:
        """Run ``work`` on the thread; urgent work (new transactions) takes precedence over reads."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping or self.failure:
                future.set_exception(_stopped(self.failure))
                return future
            (self._urgent if urgent else self._reads).append((future, work))
            self._wake.notify()
        return future

    def stop(self, timeout: float = 10.0) -> None:
        """Stop the thread after its current work; wait at most ``timeout`` seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self.is_alive():
            self.join(timeout)

    def run(self) -> None:
        try:
            self._plan()
            while not self._stopping:
                self._turn()
        except BaseException as error:
            # Requests must fail, or a stopped chain would look like a slow one.
            log.exception("embedded chain stopped")
            self.failure = error
        finally:
            self._refuse_rest()

    def _turn(self) -> None:
        if time.monotonic() >= self._deadline:
            self.core.seal()
            self._plan()
        elif self._urgent:
            _settle(*self._urgent.popleft())
        elif self._reads and self._reads_run < _READS_PER_TRANSACTION:
            self._reads_run += 1
            _settle(*self._reads.popleft())
        elif self._step():
            self._reads_run = 0
        elif self._reads:
            _settle(*self._reads.popleft())
        else:
            self._wait()

    def _step(self) -> bool:
        """Execute a transaction if one is ready; in instant mode, seal a block after the last one."""
        if self.core.step():
            return True
        if self._block_time == INSTANT and self.core.has_executed:
            self.core.seal()
            return True
        return False

    def _plan(self) -> None:
        """Plan the next block: its wall second, and its deadline on the monotonic clock."""
        if not self._block_time:
            return
        wall = time.time()
        # At most one block time ahead, even if the wall clock is changed.
        self.core.plan = int(wall) + self._block_time
        self._deadline = time.monotonic() + self.core.plan - wall

    def _wait(self) -> None:
        with self._wake:
            if self._urgent or self._reads or self._stopping:
                return
            remaining = self._deadline - time.monotonic()
            self._wake.wait(None if remaining == _NEVER else max(0.0, remaining))

    def _refuse_rest(self) -> None:
        with self._wake:
            self._stopping = True
            queued = [*self._urgent, *self._reads]
            self._urgent.clear()
            self._reads.clear()
        for future, _ in queued:
            if future.set_running_or_notify_cancel():
                future.set_exception(_stopped(self.failure))


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except RpcError as error:
        future.set_exception(error)
    except Exception as error:
        log.exception("request failed")
        future.set_exception(
            RpcError(INTERNAL_ERROR, f"internal error: {type(error).__name__}: {error}")
        )


def _stopped(failure: BaseException | None) -> RpcError:
    reason = f": {type(failure).__name__}: {failure}" if failure else ""
    return RpcError(INTERNAL_ERROR, f"the embedded chain has stopped{reason}")
