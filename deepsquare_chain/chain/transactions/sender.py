"""Sends the transactions of one account, crash-safe.

Each transaction is simulated, signed, recorded in the outbox, broadcast and confirmed. A recorded
transaction is rebroadcast until its nonce is mined, so that a crash between any two steps neither
repeats nor loses an effect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog
from eth_utils.address import to_checksum_address
from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, Web3Exception, Web3RPCError

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.reverts import UnknownRevertError, decode_revert
from deepsquare_chain.chain.rpc.batching import gather_all, merged
from deepsquare_chain.chain.rpc.endpoint import WrongEndpointError
from deepsquare_chain.chain.rpc.heads import block_time_of
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.transactions.fees import GWEI, GasMonitor, Preflight, call_parameters
from deepsquare_chain.chain.transactions.nonce_manager import (
    NonceManager,
    Spender,
    describe_spender,
    find_spender,
    outcome_of,
)
from deepsquare_chain.chain.transactions.outbox import (
    Entry,
    Outbox,
    TxReceipt,
    TxState,
    hash_of,
    read_receipt,
)
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    RevertedError,
    StoreError,
    WaitTimeoutError,
)
from deepsquare_chain.faults import crash_point

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics

__all__ = ["NonceTakenError", "OutOfGasError", "Sender", "TransactionCancelledError", "TxReceipt"]

#: A nonce conflict is reported only after this many checks without a receipt of our own, and, on a
#: chain that mines no blocks meanwhile, only after this many seconds.
_MIN_MISSES: Final = 6
_MIN_MISSING_SECONDS: Final = 30.0
#: Seconds after which a used nonce counts as a conflict although no node returns its transaction.
_SPENDER_TIMEOUT: Final = 600.0
#: Blocks of unclassified rejections after which the nonce is used up by a cancelling transaction.
_CANCEL_AFTER_BLOCKS: Final = 16
#: Backoff in seconds while the endpoint fails: first and maximum delay.
_BACKOFF: Final = (0.25, 5.0)
#: Polls with an unchanged head after which the receipt is requested anyway.
_IDLE_POLLS: Final = 8
_log = structlog.get_logger(__name__)


class OutOfGasError(RevertedError):
    """The gas limit was too low: the state changed between the estimate and the block."""


class NonceTakenError(GridError):
    """Another program used this wallet's nonce; the call had no effect (a nonce conflict)."""


class TransactionCancelledError(GridError):
    """The transaction was cancelled; the call had no effect."""


@dataclass(frozen=True, slots=True)
class _Poll:
    """Head and account nonce at one time (monotonic seconds), shared by all waiting tasks."""

    head: int
    count: int
    at: float


@dataclass
class _PollState:
    """Polling state of one open entry."""

    head: int = -1
    polls: int = 0
    misses: int = 0
    missed_at: tuple[int, float] = (0, 0.0)
    mined_in: int | None = None
    gap_since: int | None = None


class Sender:
    """Sends the transactions of one account.

    Args:
        outbox: Durable record of the transactions of this account on this chain.
        max_fee_per_gas: Fee ceiling in wei; transactions wait while gas costs more. It can be
            changed later.
        poll_interval: Seconds between two polls for a receipt.
        stuck_blocks: Blocks after which a replacement transaction with higher fees is sent.
        confirmations: Blocks required on top of the receipt's block.
        metrics: Receives the gas budget and the nonce conflicts of the wallet.
    """

    #: Whether the account pays the gas of its transactions.
    pays_gas = True

    def __init__(
        self,
        w3: AsyncWeb3[Any],
        account: Signer,
        outbox: Outbox,
        *,
        chain_id: int,
        max_fee_per_gas: int = 500 * GWEI,
        poll_interval: float = 0.25,
        stuck_blocks: int = 4,
        confirmations: int = 0,
        metrics: Metrics | None = None,
    ) -> None:
        self.w3 = w3
        self.account = account
        self.address = to_checksum_address(account.address)
        self.chain_id = chain_id
        self._outbox = outbox
        self._poll_interval = poll_interval
        self._stuck_blocks = stuck_blocks
        self._confirmations = confirmations
        self._preflight = Preflight(w3, self.address, ceiling=max_fee_per_gas, poll=poll_interval)
        self._nonce_manager = NonceManager(
            w3,
            account,
            outbox,
            self._preflight,
            chain_id=chain_id,
            poll=poll_interval,
            metrics=metrics,
        )
        self._gas_monitor = GasMonitor(w3, self.address, outbox, metrics)
        self._poll_states: dict[int, _PollState] = {}  # by entry ID, while the entry is open
        self._last_poll: _Poll | None = None
        self._poll_lock = asyncio.Lock()

    @property
    def max_fee_per_gas(self) -> int:
        """Fee ceiling in wei per gas; a change also applies to waiting and stuck transactions."""
        return self._preflight.ceiling

    @max_fee_per_gas.setter
    def max_fee_per_gas(self, ceiling: int) -> None:
        self._preflight.ceiling = ceiling

    async def send(
        self,
        call: Call,
        *,
        timeout: float = 120.0,
        simulate: bool = True,
        gas: int | None = None,
        key: str | None = None,
    ) -> TxReceipt:
        """Send a call and wait until it is mined.

        Args:
            timeout: Seconds to wait; the transaction stays recorded afterwards.
            simulate: Simulate the call on the node first, and do not send it if it reverts.
            gas: Gas limit instead of an estimate (an estimate also fails if the call reverts).
            key: Idempotency key: a second send with the same key only waits for the first.

        Raises:
            RevertedError: The contract reverts; raised as the matching subclass.
            InsufficientFundsError: The account can't pay the gas.
            EndpointError: The node was down before anything was sent, or rejected it.
            WaitTimeoutError: Not mined in time; it is still in `pending()`.
            NonceTakenError: Another program used the nonce.
            TransactionCancelledError: The transaction was cancelled.
        """
        deadline = time.monotonic() + timeout
        entry = self._outbox.by_key(key) if key is not None else None
        if entry is None:
            if gas is None:
                gas = await self._preflight.gas_limit(call)
            elif simulate:
                await self._preflight.simulate(call)
            crash_point("sender.intent")
            entry = await self._nonce_manager.submit(call, gas, key, deadline)
        try:
            return await self._confirm(entry, deadline)
        except OutOfGasError:
            # Mined without effect because the state changed: retry once with a new estimate.
            gas = max(2 * entry.gas, await self._preflight.gas_limit(call))
            retried = await self._nonce_manager.submit(call, gas, key, deadline)
            return await self._confirm(retried, deadline)

    @asynccontextmanager
    async def spending(self, timeout: float) -> AsyncIterator[None]:
        """Hold the wallet's lock while an allowance is set and used.

        Waits up to `timeout` seconds for the lock and for pending transactions, which may set or
        use an allowance that the chain does not show before they are mined.

        Raises:
            WaitTimeoutError: The lock or a pending transaction took longer; nothing was sent.
            EndpointError: The node does not answer.
        """
        deadline = time.monotonic() + timeout
        async with self._outbox.spending(timeout):
            await self._nonce_manager.reconcile()
            for entry in self.pending():
                try:
                    await self._confirm(entry, deadline)
                except WaitTimeoutError as error:
                    raise WaitTimeoutError(
                        f"An earlier transaction of this wallet is not mined yet, so that nothing "
                        f"new was paid: {error.message}",
                        hint=error.hint,
                    ) from None
                except WrongEndpointError:
                    raise
                except GridError as error:
                    _log.warning("earlier transaction failed", error=error.message)
            yield

    async def simulate(self, call: Call) -> None:
        """Simulate a call on the latest block.

        Raises:
            RevertedError: The call would revert.
        """
        await self._preflight.simulate(call)

    def sent(self, key: str) -> Entry | None:
        """Return the entry of an idempotency key that is mined or still open, or None."""
        return self._outbox.by_key(key)

    def pending(self) -> list[Entry]:
        """Return the transactions that are not known to be mined, ordered by nonce."""
        return list(self._outbox.open_entries())

    def unattended(self) -> list[Entry]:
        """Return the pending transactions that no `send` or `wait` of this sender waits for."""
        attended = self._nonce_manager.attended
        return [entry for entry in self.pending() if entry.id not in attended]

    def nonce_conflicts(self) -> list[Spender]:
        """Return the latest transactions of this account that another program sent.

        Only transactions since the start of this sender are included.
        """
        return list(self._nonce_manager.conflicts)

    async def speed_up(self, entry: Entry) -> None:
        """Replace a pending transaction at once, with both fees at least 12.5 % higher.

        Raises:
            UsageError: It is not pending, or the fees would exceed the ceiling.
            EndpointError: The node is down, or rejected the replacement.
            InsufficientFundsError: The account can't pay the fees.
        """
        await self._nonce_manager.replace_now(entry, cancel=False)

    async def cancel(self, entry: Entry) -> None:
        """Replace a pending transaction with an empty transfer to the account itself.

        Whichever of the two is mined first takes effect. Raises the errors of `speed_up`.
        """
        await self._nonce_manager.replace_now(entry, cancel=True)

    async def wait(self, entry: Entry, *, timeout: float = 120.0) -> TxReceipt:
        """Wait until a recorded transaction is mined; resend and replace it as needed.

        Raises the errors of `send`.
        """
        return await self._confirm(entry, time.monotonic() + timeout)

    async def reconcile(self) -> Mapping[str, Any]:
        """Reconcile the outbox with the chain: resend lost transactions, settle mined ones.

        Takes one request when there is nothing to do. Services call it for each block.

        Returns:
            The header of the latest block, in JSON-RPC form, read with or after the account's
            nonce.
        """
        with merged(self.w3):
            await gather_all(self._nonce_manager.reconcile(), self._gas_monitor.check_balance())
        return self._nonce_manager.latest

    async def recover(self, *, timeout: float = 60.0) -> list[TxReceipt]:
        """Finish the transactions of an earlier process; call it before anything else is sent.

        Transactions that are not mined within `timeout` seconds stay in `pending()`.
        """
        entries = self.unattended()
        await self.reconcile()
        deadline = time.monotonic() + timeout
        receipts = []
        for entry in entries:
            try:
                receipts.append(await self._confirm(entry, deadline))
            except WrongEndpointError:
                raise
            except GridError as error:
                _log.warning("transaction recovered", label=entry.call.label, error=error.message)
        return receipts

    # -- waiting for the receipt

    async def _confirm(self, entry: Entry, deadline: float) -> TxReceipt:
        self._nonce_manager.attended.add(entry.id)
        try:
            return await self._wait_for_receipt(entry, deadline)
        finally:
            self._nonce_manager.attended.discard(entry.id)

    async def _wait_for_receipt(self, entry: Entry, deadline: float) -> TxReceipt:
        # The polling state of an earlier wait that timed out is reused.
        poll_state = self._poll_states.setdefault(entry.id, _PollState())
        poll_state.head, pause = -1, max(self._poll_interval, _BACKOFF[0])
        while True:
            try:
                receipt = await self._check_receipt(entry, poll_state)
                pause = max(self._poll_interval, _BACKOFF[0])
            except WrongEndpointError:
                raise
            except (EndpointError, StoreError, Web3Exception) as error:
                # A failed request does not mean that the transaction is lost: it may be mined
                # although the node does not answer or the outcome can't be recorded.
                _log.warning("endpoint failed", label=entry.call.label, error=str(error)[:300])
                receipt = None
                await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(_BACKOFF[1], 2 * pause)
            if receipt is not None:
                return await self._settle(entry, receipt)
            if time.monotonic() > deadline:
                raise self._timeout_error(entry)
            await self._wait_for_poll(deadline)

    def _timeout_error(self, entry: Entry) -> WaitTimeoutError:
        latest = self._outbox.entry(entry.id).latest
        message = self._nonce_manager.node_errors.get(entry.id)
        reason = f"; the node reports: {message}" if message else ""
        return WaitTimeoutError(
            f"{entry.call.label!r} was sent and was not mined in time ({latest.tx_hash}){reason}",
            hint="It stays recorded and may still be mined. Sending the same again may therefore pay "
            f"twice: see `deepsquare tx show {entry.id}`, and `deepsquare tx cancel {entry.id}` "
            "to end it.",
        )

    async def _settle(self, entry: Entry, receipt: Any) -> TxReceipt:
        crash_point("sender.receipt")
        entry = self._outbox.entry(entry.id)
        state = outcome_of(entry, receipt)
        try:
            self._nonce_manager.settle(entry, receipt)
        except StoreError as error:
            # It is mined, so the caller gets the receipt. The next poll settles the entry again.
            _log.warning("receipt not recorded", label=entry.call.label, error=error.message)
        self._poll_states.pop(entry.id, None)
        crash_point("sender.settled")
        if state is TxState.CANCELLED:
            raise TransactionCancelledError(
                f"{entry.call.label!r} was cancelled and had no effect "
                f"({hash_of(receipt)} used its nonce {entry.nonce})"
            )
        if receipt["status"] != 1:
            raise await _revert_reason(self.w3, self.address, entry, receipt)
        return read_receipt(entry, receipt)

    async def _check_receipt(self, entry: Entry, poll_state: _PollState) -> Any | None:
        """Return the receipt if it has enough confirmations.

        Otherwise resend, replace or fill as needed, once per block, and return None.
        """
        poll = await self._head_and_nonce()
        poll_state.polls += 1
        if (
            poll.head == poll_state.head
            and poll.count <= entry.nonce
            and poll_state.polls % _IDLE_POLLS
        ):
            return None
        if (
            poll_state.mined_in is not None
            and poll.count > entry.nonce
            and poll.head < poll_state.mined_in + self._confirmations
        ):
            return None  # it is asked for again when it has its confirmations
        head_changed, poll_state.head = poll.head != poll_state.head, poll.head
        entry = self._outbox.entry(entry.id)  # it may have been replaced
        try:
            receipt = await self._nonce_manager.receipt(entry.attempts)
        except WrongEndpointError:
            raise
        except (EndpointError, Web3Exception) as error:
            if poll.count > entry.nonce:
                raise
            # The nonce is not used, so it is in no block: no receipt is needed to resend it.
            _log.debug("receipt not read", label=entry.call.label, error=str(error)[:300])
            receipt = None
        poll_state.mined_in = None if receipt is None else receipt["blockNumber"]
        if receipt is not None:
            confirmed = poll.head >= receipt["blockNumber"] + self._confirmations
            return receipt if confirmed or not self._confirmations else None
        if poll.count > entry.nonce:
            await self._handle_missing_receipt(entry, poll_state, poll)
        elif head_changed or not poll_state.polls % _IDLE_POLLS:
            # A chain that mines on demand makes no block until it has this transaction.
            await self._resend_or_replace(entry, poll_state, poll)
        return None

    async def _handle_missing_receipt(
        self, entry: Entry, poll_state: _PollState, poll: _Poll
    ) -> None:
        """Handle a used nonce without a receipt of our own.

        A node may lag, or return a mined transaction only later. A nonce conflict is therefore
        raised only when the transaction that used the nonce is found, or after a long timeout.

        Raises:
            NonceTakenError: Another program used the nonce.
        """
        if poll_state.misses == 0:
            poll_state.missed_at = (poll.head, poll.at)
        poll_state.misses += 1
        first_head, first_seen = poll_state.missed_at
        overdue = (
            poll.head - first_head >= self._stuck_blocks
            or poll.at - first_seen >= _MIN_MISSING_SECONDS
        )
        if poll_state.misses % _MIN_MISSES or not overdue:
            return
        spender = await find_spender(self.w3, self.address, entry.nonce)
        if spender is None and poll.at - first_seen < _SPENDER_TIMEOUT:
            return
        if spender is not None:
            if spender.tx_hash in {attempt.tx_hash for attempt in entry.attempts}:
                return  # it is our own transaction, and its receipt will follow
            self._nonce_manager.record_conflict(spender)
        used_where = describe_spender(spender)
        self._outbox.set_state(
            entry.id, TxState.ABANDONED, note=f"nonce used by another transaction, {used_where}"
        )
        self._poll_states.pop(entry.id, None)
        raise NonceTakenError(
            f"{entry.call.label!r} had no effect: another program used nonce "
            f"{entry.nonce} of {self.address}, {used_where}",
            hint="Use a wallet from one program only (or with one --state-dir), then try again.",
        )

    async def _resend_or_replace(self, entry: Entry, poll_state: _PollState, poll: _Poll) -> None:
        """Resend a transaction; raise its fees if it is the next to be mined; fill a nonce gap."""
        poll_state.misses = 0
        await self._nonce_manager.resend(entry)
        if entry.nonce == poll.count:
            poll_state.gap_since = None
            refused = entry.id in self._nonce_manager.node_errors
            if refused and poll.head - entry.attempts[0].sent_block >= _CANCEL_AFTER_BLOCKS:
                await self._nonce_manager.cancel_rejected(entry)
            elif poll.head - entry.latest.sent_block >= self._stuck_blocks:
                await self._nonce_manager.replace(entry)
            return
        first = self._outbox.entries_from(poll.count)[0]
        if first.nonce == poll.count:
            poll_state.gap_since = None
            await self._nonce_manager.resend(first)
        elif poll_state.gap_since is None:
            poll_state.gap_since = poll.head
        elif poll.head - poll_state.gap_since >= self._stuck_blocks:
            await self._nonce_manager.fill_gap(poll.count)

    async def _wait_for_poll(self, deadline: float) -> None:
        """Wait until the next poll is due, which is the same time for all waiting tasks.

        The poll is due when the next block is expected, or another task has seen it.
        """
        last_poll = self._last_poll or _Poll(head=-1, count=0, at=0.0)
        await asyncio.sleep(max(0.0, last_poll.at + self._poll_interval - time.monotonic()))
        block_time = block_time_of(self.w3)
        while block_time is not None and block_time.head <= last_poll.head:
            left = min(block_time.due_at(self._poll_interval), deadline) - time.monotonic()
            if left <= 0:
                return
            await block_time.wait_for_change(left)

    async def _head_and_nonce(self) -> _Poll:
        """Return head and nonce, requested once per poll interval for all waiting tasks."""
        async with self._poll_lock:
            if (
                self._last_poll is None
                or time.monotonic() - self._last_poll.at >= self._poll_interval
            ):
                self._last_poll = _Poll(
                    *await self._nonce_manager.head_and_nonce(), time.monotonic()
                )
            return self._last_poll


async def _revert_reason(
    w3: AsyncWeb3[Any], sender: str, entry: Entry, receipt: Any
) -> RevertedError:
    """Return the reason of a failed transaction, by repeating the call on its block's state."""
    tx_hash = hash_of(receipt)
    if int(receipt["gasUsed"]) >= entry.gas:
        return OutOfGasError(f"{entry.call.label!r} ran out of gas ({tx_hash})")
    try:
        await w3.eth.call(call_parameters(sender, entry.call), receipt["blockNumber"])
    except ContractLogicError as error:
        return decode_revert(error)
    except (Web3RPCError, EndpointError):
        pass
    return UnknownRevertError(
        f"{entry.call.label!r} was rejected by the contract ({tx_hash})",
        hint="The state may have changed meanwhile; check it and try again.",
    )
