"""The EVM of the embedded node: py-evm as configured by eth-tester, with one pending block.

Used by one thread only. The pending block keeps one state open for all its transactions, so that
a state root is computed once per block instead of once per transaction.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from eth.exceptions import OutOfGas, Revert, VMError
from eth.vm.forks.cancun import CancunVM
from eth.vm.spoof import SpoofTransaction
from eth_bloom.bloom import BloomFilter
from eth_tester.backends.pyevm.main import PyEVMBackend
from eth_utils.exceptions import ValidationError

from deepsquare_chain.chain.deploying import CREATE2_PROXY, CREATE2_PROXY_CODE
from deepsquare_chain.devnet.node.wire import CallRequest, RpcError, refused, reverted

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
            raise refused(str(error)) from error
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
            raise refused(
                f"intrinsic gas too low: gas {gas}, minimum needed {unsigned.intrinsic_gas}"
            )
        try:
            return state.apply_transaction(SpoofTransaction(unsigned, from_=request.sender))
        except ValidationError as error:
            balance = state.get_balance(request.sender)
            if balance < request.value:
                raise refused(
                    "insufficient funds for gas * price + value: "
                    f"address 0x{request.sender.hex()} have {balance} want {request.value}"
                ) from error
            raise refused(str(error)) from error

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
        return reverted(bytes(computation.output))
    if isinstance(error, OutOfGas):
        return refused(f"gas required exceeds allowance ({gas})")
    return refused(f"{_words(type(error).__name__)}: {error}")


def _words(name: str) -> str:
    """``InvalidInstruction`` -> ``invalid instruction``."""
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()
