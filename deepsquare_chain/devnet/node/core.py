"""The core of the embedded node: transaction pool, engine and index. Used by one thread only."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from eth.exceptions import UnrecognizedTransactionType
from eth_utils.exceptions import ValidationError
from rlp.exceptions import RLPException  # type: ignore[import-untyped]

from deepsquare_chain.devnet.node.engine import Engine, SealedBlock
from deepsquare_chain.devnet.node.wire import (
    INTERNAL_ERROR,
    CallRequest,
    RpcError,
    Wire,
    bad_params,
    block_fields,
    block_size,
    data,
    receipt_fields,
    refused,
    transaction_fields,
    transaction_type,
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


# -- the transaction pool: admission checks in geth's order with its messages, and the queue
#
# A transaction with a nonce gap stays in the pool until the gap is filled.

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
            raw,
            self.engine.builder,
            chain_id=self.engine.chain_id,
            gas_limit=self.engine.gas_limit,
        )
        if pooled.hash in self._executed or self._pool.get(pooled.hash):
            raise refused("already known")
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
            raise bad_params(
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
            raise refused("header not found")
        return self.engine.header(number), None

    def _catch_up(self) -> None:
        """Execute queued transactions, so that they count as pending; limited, to not delay blocks."""
        for _ in range(_MAX_CATCH_UP):
            if not self.step():
                return

    def _check_account(self, pooled: PooledTransaction) -> None:
        nonce = self.nonce(pooled.sender, "latest")
        if pooled.nonce < nonce:
            raise refused(f"nonce too low: next nonce {nonce}, tx nonce {pooled.nonce}")
        for executed in self._executed.values():
            if (executed.sender, executed.nonce) == (pooled.sender, pooled.nonce):
                check_bump(executed, pooled)
                raise refused("replacement transaction underpriced")  # it is already executed
        queued_cost = sum(
            tx.cost for tx in self._pool.of(pooled.sender) if tx.nonce != pooled.nonce
        )
        with self.engine.state_at(None) as state:
            balance = int(state.get_balance(pooled.sender))
        if balance < queued_cost + pooled.cost:
            raise refused(
                f"insufficient funds for gas * price + value: balance {balance}, "
                f"queued cost {queued_cost}, tx cost {pooled.cost}, "
                f"overshot {queued_cost + pooled.cost - balance}"
            )

    def _check_price(self, request: CallRequest, tag: Tag) -> None:
        needed = (request.gas or 0) * (request.max_fee or 0) + request.value
        balance = self.balance(request.sender, tag)
        if balance < needed:
            raise refused(
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
