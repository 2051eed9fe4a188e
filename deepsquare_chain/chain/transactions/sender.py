"""Sends transactions of one account: it owns the nonce and forgets nothing.

Simulate, sign, record, broadcast, confirm. Whatever is recorded is resent until its nonce is
mined, so that a crash between any two steps neither repeats nor loses an effect.
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
from web3.exceptions import Web3Exception

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.rpc.batching import gather_all, merged
from deepsquare_chain.chain.rpc.endpoint import WrongEndpointError
from deepsquare_chain.chain.rpc.on_demand import block_time_of
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.transactions.fees import GWEI
from deepsquare_chain.chain.transactions.gas_budget import GasMonitor
from deepsquare_chain.chain.transactions.nonce_manager import (
    NonceManager,
    Spender,
    find_spender,
    outcome_of,
    used_by,
)
from deepsquare_chain.chain.transactions.outbox import Entry, Outbox, TxState
from deepsquare_chain.chain.transactions.preflight import Preflight
from deepsquare_chain.chain.transactions.receipts import (
    OutOfGasError,
    TxReceipt,
    hash_of,
    read_receipt,
    why_failed,
)
from deepsquare_chain.errors import EndpointError, GridError, StoreError, WaitTimeoutError
from deepsquare_chain.faults import crash_point

__all__ = [
    "NonceTakenError",
    "OutOfGasError",
    "Sender",
    "TransactionCancelledError",
    "TxReceipt",
]

#: Looks at a used nonce without a receipt of ours before somebody else is said to have used it,
#: and seconds after which this is said on a chain that stands still.
_MISSES: Final = 6
_MISSED_SECONDS: Final = 30.0
#: Seconds after which a used nonce whose transaction no node can show counts as somebody else's.
_UNSHOWN_SECONDS: Final = 600.0
#: Blocks of refusals in unknown words after which a nonce is spent by a transaction that does nothing.
_DOOMED_BLOCKS: Final = 16
#: Seconds between two looks while the endpoint fails: at first, and at most.
_FAILING: Final = (0.25, 5.0)
#: Looks at an unchanged head after which everything is looked at again.
_IDLE_LOOKS: Final = 8
if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics

_log = structlog.get_logger(__name__)


class NonceTakenError(GridError):
    """Another program used this wallet's nonce; the call had no effect."""


class TransactionCancelledError(GridError):
    """Somebody cancelled the transaction; the call had no effect."""


@dataclass(frozen=True, slots=True)
class _Pulse:
    """Where the chain and the account's nonce stand, shared by all who wait."""

    head: int
    count: int
    at: float


@dataclass
class _Watch:
    """What one wait has seen so far."""

    head: int = -1
    looks: int = 0
    misses: int = 0
    missed_at: tuple[int, float] = (0, 0.0)
    gap_since: int | None = None


class Sender:
    """The one who sends for an account.

    Args:
        w3: Connection made by `connect`.
        account: Who signs.
        outbox: Its durable memory, of this account and chain.
        chain_id: Goes into every signature.
        max_fee_per_gas: Ceiling in wei; above it transactions wait. It may be changed later.
        poll_interval: Seconds between two looks for a receipt.
        stuck_blocks: Blocks after which fees are raised.
        confirmations: Blocks on top of a receipt's before it is believed.
        metrics: Where the figures of the wallet's gas and nonces go.
    """

    #: Whether the account pays for what is sent.
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
        self._poll = poll_interval
        self._stuck_blocks = stuck_blocks
        self._confirmations = confirmations
        options = {"ceiling": max_fee_per_gas, "poll": poll_interval}
        self._preflight = Preflight(w3, self.address, **options)  # type: ignore[arg-type]
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
        self._watches: dict[int, _Watch] = {}  # by entry, for as long as it is open
        self._pulse: _Pulse | None = None
        self._pulse_lock = asyncio.Lock()

    @property
    def max_fee_per_gas(self) -> int:
        """Ceiling in wei; a change applies to transactions that wait for it or are stuck too."""
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
        """Send and wait until it is mined.

        Args:
            call: What to send.
            timeout: Seconds to wait; the transaction stays recorded afterwards.
            simulate: Try it on the node first, and refuse what would revert.
            gas: Gas limit instead of an estimate (which also refuses what would revert).
            key: The caller's own name of this effect: a second send of it only waits.

        Raises:
            RevertedError: The contract refuses it, as its own typed error.
            InsufficientFundsError: The account can't pay the gas.
            EndpointError: The node is down before anything was sent, or turned it down.
            WaitTimeoutError: Not mined in time; `pending()` still holds it.
            NonceTakenError: Another program used the nonce.
            TransactionCancelledError: A person cancelled it.
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
            # Mined without effect; the state had moved, so that a fresh estimate is due, once.
            gas = max(2 * entry.gas, await self._preflight.gas_limit(call))
            again = await self._nonce_manager.submit(call, gas, key, deadline)
            return await self._confirm(again, deadline)

    @asynccontextmanager
    async def spending(self, timeout: float) -> AsyncIterator[None]:
        """The wallet's lock around an allowance and what uses it.

        What was sent before is mined first: an allowance that it sets or uses is not what the
        chain shows.

        Args:
            timeout: Seconds to wait for those who have it, one after the other, and for what
                they sent.

        Raises:
            WaitTimeoutError: Others are under way for longer; nothing was sent.
            EndpointError: The node does not answer.
        """
        deadline = time.monotonic() + timeout
        async with self._outbox.spending(timeout):
            await self._nonce_manager.tend()
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
                    _log.warning("earlier_transaction", error=error.message)
            yield

    async def simulate(self, call: Call) -> None:
        """Try a call on the latest block.

        Raises:
            RevertedError: It would be refused.
        """
        await self._preflight.simulate(call)

    def sent(self, key: str) -> Entry | None:
        """What was sent under a caller's key and is mined or may still be."""
        return self._outbox.by_key(key)

    def pending(self) -> list[Entry]:
        """Transactions that are not known to be mined, by nonce."""
        return list(self._outbox.open_entries())

    def unattended(self) -> list[Entry]:
        """Those of them that no `send` or `wait` of this sender waits for."""
        attended = self._nonce_manager.attended
        return [entry for entry in self.pending() if entry.id not in attended]

    def nonce_conflicts(self) -> list[Spender]:
        """The latest transactions of this account that others sent while this sender was there."""
        return list(self._nonce_manager.conflicts)

    async def speed_up(self, entry: Entry) -> None:
        """Raise both fees of a pending transaction by at least 12.5 %, now.

        Raises:
            UsageError: It is not pending, or the ceiling forbids it.
            EndpointError: The node is down, or turned it down.
            InsufficientFundsError: The account can't pay it.
        """
        await self._nonce_manager.outbid(entry, cancel=False)

    async def cancel(self, entry: Entry) -> None:
        """Offer a transfer of nothing to oneself in its place; the first to be mined wins.

        Errors as `speed_up`.
        """
        await self._nonce_manager.outbid(entry, cancel=True)

    async def wait(self, entry: Entry, *, timeout: float = 120.0) -> TxReceipt:
        """Wait until a recorded transaction is mined, resent and outbid as need be.

        Errors as `send`.
        """
        return await self._confirm(entry, time.monotonic() + timeout)

    async def tend(self) -> Mapping[str, Any]:
        """Look after what is recorded: resend what the chain lost, settle what it mined.

        One request when there is nothing to do. Services call it for each block, and go by the
        header that it returns: of the latest block, as JSON-RPC gives it, seen with or after the
        account's nonce.
        """
        with merged(self.w3):
            await gather_all(self._nonce_manager.tend(), self._gas_monitor.look())
        return self._nonce_manager.latest

    async def recover(self, *, timeout: float = 60.0) -> list[TxReceipt]:
        """Finish what an earlier process began; before anything else is sent.

        What is not mined within `timeout` seconds stays in `pending()`.
        """
        found = self.unattended()
        await self.tend()
        deadline = time.monotonic() + timeout
        receipts = []
        for entry in found:
            try:
                receipts.append(await self._confirm(entry, deadline))
            except WrongEndpointError:
                raise
            except GridError as error:
                _log.warning("transaction_recovered", label=entry.call.label, error=error.message)
        return receipts

    # -- until it is mined

    async def _confirm(self, entry: Entry, deadline: float) -> TxReceipt:
        self._nonce_manager.attended.add(entry.id)
        try:
            return await self._attend(entry, deadline)
        finally:
            self._nonce_manager.attended.discard(entry.id)

    async def _attend(self, entry: Entry, deadline: float) -> TxReceipt:
        # What a shorter wait has seen counts for the next one.
        watch = self._watches.setdefault(entry.id, _Watch())
        watch.head, pause = -1, max(self._poll, _FAILING[0])
        while True:
            try:
                receipt = await self._look(entry, watch)
                pause = max(self._poll, _FAILING[0])
            except WrongEndpointError:
                raise
            except (EndpointError, StoreError, Web3Exception) as error:
                # Unknown is not gone: it is on its way, whether the node answers or not, and
                # whether there is space to record its outcome.
                _log.warning("endpoint_failed", label=entry.call.label, error=str(error)[:300])
                receipt = None
                await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(_FAILING[1], 2 * pause)
            if receipt is not None:
                return await self._settle(entry, receipt)
            if time.monotonic() > deadline:
                raise self._too_late(entry)
            await self._pulse_due(deadline)

    def _too_late(self, entry: Entry) -> WaitTimeoutError:
        latest = self._outbox.entry(entry.id).latest
        words = self._nonce_manager.refusals.get(entry.id)
        said = f"; the node says of it: {words}" if words else ""
        return WaitTimeoutError(
            f"{entry.call.label!r} was sent and was not mined in time ({latest.tx_hash}){said}",
            hint="It stays recorded and may still be mined, so that sending the same again may pay "
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
            # It is mined, and its sender must learn of it. The chain reports it again next time.
            _log.warning("receipt_not_recorded", label=entry.call.label, error=error.message)
        self._watches.pop(entry.id, None)
        crash_point("sender.settled")
        if state is TxState.CANCELLED:
            raise TransactionCancelledError(
                f"{entry.call.label!r} was cancelled: nothing of it was carried out "
                f"({hash_of(receipt)} took its nonce {entry.nonce})"
            )
        if receipt["status"] != 1:
            raise await why_failed(self.w3, self.address, entry, receipt)
        return read_receipt(entry, receipt)

    async def _look(self, entry: Entry, watch: _Watch) -> Any | None:
        """The receipt if it is there and deep enough; else see what can be done, once a block."""
        pulse = await self._feel()
        watch.looks += 1
        if pulse.head == watch.head and pulse.count <= entry.nonce and watch.looks % _IDLE_LOOKS:
            return None
        moved, watch.head = pulse.head != watch.head, pulse.head
        entry = self._outbox.entry(entry.id)  # it may have been outbid
        try:
            receipt = await self._nonce_manager.receipt(entry.attempts)
        except WrongEndpointError:
            raise
        except (EndpointError, Web3Exception) as error:
            if pulse.count > entry.nonce:
                raise
            # By its nonce it is in no block: what can be done for it needs no receipt.
            _log.debug("no_receipt", label=entry.call.label, error=str(error)[:300])
            receipt = None
        if receipt is not None:
            deep = pulse.head >= receipt["blockNumber"] + self._confirmations
            return receipt if deep or not self._confirmations else None
        if pulse.count > entry.nonce:
            await self._missed(entry, watch, pulse)
        elif moved or not watch.looks % _IDLE_LOOKS:
            # A chain that mines only on demand stands still until it has this transaction.
            await self._nudge(entry, watch, pulse)
        return None

    async def _missed(self, entry: Entry, watch: _Watch, pulse: _Pulse) -> None:
        """The nonce is used, and no receipt of ours is there: believed only of a known transaction.

        Nodes may lag, or take a while until they show what they have mined.
        """
        if watch.misses == 0:
            watch.missed_at = (pulse.head, pulse.at)
        watch.misses += 1
        head, at = watch.missed_at
        late = pulse.head - head >= self._stuck_blocks or pulse.at - at >= _MISSED_SECONDS
        if watch.misses % _MISSES or not late:
            return
        spender = await find_spender(self.w3, self.address, entry.nonce)
        if spender is None and pulse.at - at < _UNSHOWN_SECONDS:
            return
        if spender is not None and spender.tx_hash in {each.tx_hash for each in entry.attempts}:
            return  # it is ours, and its receipt will be shown
        if spender is not None:
            self._nonce_manager.note_foreign(spender)
        used = used_by(spender)
        self._outbox.set_state(entry.id, TxState.ABANDONED, note=f"nonce used by another, {used}")
        self._watches.pop(entry.id, None)
        raise NonceTakenError(
            f"{entry.call.label!r} was not carried out: another program used nonce "
            f"{entry.nonce} of {self.address}, {used}",
            hint="Let only one program (or one --state-dir) use a wallet, then try again.",
        )

    async def _nudge(self, entry: Entry, watch: _Watch, pulse: _Pulse) -> None:
        """Resend; raise fees when it is our turn; close a gap before it."""
        watch.misses = 0
        await self._nonce_manager.resend(entry)
        if entry.nonce == pulse.count:
            watch.gap_since = None
            refused = entry.id in self._nonce_manager.refusals
            if refused and pulse.head - entry.attempts[0].sent_block >= _DOOMED_BLOCKS:
                await self._nonce_manager.give_up(entry)
            elif pulse.head - entry.latest.sent_block >= self._stuck_blocks:
                await self._nonce_manager.replace(entry)
            return
        first = self._outbox.entries_from(pulse.count)[0]
        if first.nonce == pulse.count:
            watch.gap_since = None
            await self._nonce_manager.resend(first)
        elif watch.gap_since is None:
            watch.gap_since = pulse.head
        elif pulse.head - watch.gap_since >= self._stuck_blocks:
            await self._nonce_manager.fill(pulse.count)

    async def _pulse_due(self, deadline: float) -> None:
        """Wait until the next look is due, at the same moment for all who wait.

        That is when the next block should be there, or somebody has seen it.
        """
        felt, head = (self._pulse.at, self._pulse.head) if self._pulse is not None else (0.0, -1)
        await asyncio.sleep(max(0.0, felt + self._poll - time.monotonic()))
        block_time = block_time_of(self.w3)
        while block_time is not None and block_time.head <= head:
            left = min(block_time.due_at(self._poll), deadline) - time.monotonic()
            if left <= 0:
                return
            await block_time.news(left)

    async def _feel(self) -> _Pulse:
        """Head and nonce, asked once for all who wait."""
        async with self._pulse_lock:
            if self._pulse is None or time.monotonic() - self._pulse.at >= self._poll:
                self._pulse = _Pulse(*await self._nonce_manager.stand(), time.monotonic())
            return self._pulse
