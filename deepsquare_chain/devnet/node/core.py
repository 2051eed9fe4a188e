"""The core of the embedded node: transaction pool, engine and index. Used by one thread only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from deepsquare_chain.devnet.node.engine import CallRequest, Engine
from deepsquare_chain.devnet.node.index import ChainIndex
from deepsquare_chain.devnet.node.pool import (
    PooledTransaction,
    TransactionPool,
    check_bump,
    decode_transaction,
)
from deepsquare_chain.devnet.node.rpcerrors import RpcError, bad_params, refused
from deepsquare_chain.devnet.node.wire import Wire, block_fields, data, transaction_fields

GAS_LIMIT = 60_000_000
_CATCH_UP = 50  # transactions; takes about a tenth of a second
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
        pending = self.engine.open_block(self._stamp())
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
        sealed = self.engine.seal(self._stamp())
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
        self._restamp()
        return self.clock.offset

    def set_next_timestamp(self, timestamp: int) -> None:
        """Set the timestamp of the next block, in seconds, later than the head's."""
        if timestamp <= self.engine.head.timestamp:
            raise bad_params(
                f"timestamp {timestamp} is not later than the head's {self.engine.head.timestamp}"
            )
        self.clock.exact = timestamp
        self._restamp()

    # -- state

    def call(self, request: CallRequest, tag: Tag) -> str:
        if request.gas and request.max_fee:
            self._check_price(request, tag)
        return data(self.engine.call(request, *self._moment(tag)))

    def estimate_gas(self, request: CallRequest, tag: Tag) -> int:
        return self.engine.estimate_gas(request, *self._moment(tag))

    def balance(self, address: bytes, tag: Tag) -> int:
        with self.engine.state_at(self._moment(tag)[0]) as state:
            return int(state.get_balance(address))

    def nonce(self, address: bytes, tag: Tag) -> int:
        if tag == "pending":
            with self.engine.state_at(None) as state:
                return self._pool.next_nonce(address, int(state.get_nonce(address)))
        with self.engine.state_at(self._moment(tag)[0]) as state:
            return int(state.get_nonce(address))

    def code(self, address: bytes, tag: Tag) -> str:
        with self.engine.state_at(self._moment(tag)[0]) as state:
            return data(state.get_code(address))

    def storage(self, address: bytes, slot: int, tag: Tag) -> str:
        with self.engine.state_at(self._moment(tag)[0]) as state:
            return f"0x{state.get_storage(address, slot):064x}"

    def waiting_transaction(self, tx_hash: bytes) -> Wire | None:
        pooled = self._executed.get(tx_hash) or self._pool.get(tx_hash)
        return transaction_fields(pooled.tx, None, None) if pooled else None

    def pending_block(self, full: bool) -> Wire:
        """Return the pending block without a hash, in the form of other nodes."""
        self._catch_up()
        pending = self.engine.open_block(self._stamp())
        hidden = {"hash": None, "nonce": None, "logsBloom": None, "miner": None}
        shown = [
            transaction_fields(tx, None, None) if full else data(tx.hash)
            for tx in pending.transactions
        ]
        return {**block_fields(pending.header, 0), **hidden, "transactions": shown}

    # -- private

    def _stamp(self) -> int:
        """Return the timestamp of the pending block: requested, planned or now; after the head's."""
        planned = self.clock.exact
        if planned is None:
            planned = self.clock.now() if self.plan is None else self.clock.at(self.plan)
        return max(planned, int(self.engine.head.timestamp) + 1)

    def _restamp(self) -> None:
        """Return the pending block's transactions to the pool, to execute them at the new time."""
        self.engine.drop_block()
        for pooled in self._executed.values():
            self._pool.put(pooled)
        self._executed.clear()

    def _moment(self, tag: Tag) -> tuple[Any | None, int | None]:
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
        for _ in range(_CATCH_UP):
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
