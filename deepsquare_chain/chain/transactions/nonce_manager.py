"""Manages an account's nonces: signs, records and broadcasts transactions, and resends them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final

import structlog
from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import TransactionNotFound, Web3Exception, Web3RPCError
from web3.types import BlockIdentifier

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.endpoint import WrongEndpointError
from deepsquare_chain.chain.rpc.responses import (
    NodeError,
    classify,
    error_body,
    is_unsupported,
    node_message,
)
from deepsquare_chain.chain.signers import Signer, sign_and_record, signed_by
from deepsquare_chain.chain.transactions.fees import GWEI, Fees, Preflight, market
from deepsquare_chain.chain.transactions.outbox import (
    Attempt,
    Entry,
    Outbox,
    TxState,
    fee_of,
    hash_of,
    to_hex,
)
from deepsquare_chain.errors import (
    EndpointError,
    InsufficientFundsError,
    UsageError,
    WaitTimeoutError,
)
from deepsquare_chain.faults import crash_point

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics

# -- the transaction that used a nonce, to recognise nonce conflicts

#: Blocks that are searched backwards; most nodes prune older states.
_DEPTH: Final = 8_192


@dataclass(frozen=True, slots=True)
class Spender:
    """The mined transaction that used a nonce; `to` and `data` are its call."""

    tx_hash: str
    block: int
    to: str
    data: bytes

    def __str__(self) -> str:
        return f"in transaction {self.tx_hash} of block {self.block}"


async def find_spender(w3: AsyncWeb3[Any], address: str, nonce: int) -> Spender | None:
    """Return the transaction of an account that used a nonce; None if the node can't return it."""
    try:
        return await _find_by_nonce(w3, to_checksum_address(address), nonce)
    except WrongEndpointError:
        raise
    except (EndpointError, Web3Exception, KeyError, TypeError, ValueError):
        return None


def describe_spender(spender: Spender | None) -> str:
    """Describe the transaction that used a nonce, or that it was not found."""
    return "in a transaction that the node does not return" if spender is None else str(spender)


async def _find_by_nonce(w3: AsyncWeb3[Any], address: Any, nonce: int) -> Spender | None:
    """Find the block that used the nonce by binary search over the account's transaction count."""
    high = int(await w3.eth.block_number)
    low, step = high, 1
    while low >= 0 and await w3.eth.get_transaction_count(address, low) > nonce:
        high, low, step = low, low - step, 2 * step
        if step > _DEPTH:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if await w3.eth.get_transaction_count(address, middle) > nonce:
            high = middle
        else:
            low = middle
    block: Any = await w3.eth.get_block(high, True)
    for transaction in block["transactions"]:
        if (
            str(transaction["from"]).lower() == address.lower()
            and int(transaction["nonce"]) == nonce
        ):
            data = transaction.get("input") or transaction.get("data") or b""
            return Spender(
                to_hex(transaction["hash"]), high, str(transaction.get("to") or ""), bytes(data)
            )
    return None


# -- broadcasts and their outcome


class BroadcastOutcome(Enum):
    """Result of a broadcast."""

    ACCEPTED = auto()  # the node has it, from this broadcast or an earlier one
    UNCLEAR = auto()  # no valid response, or an unclassified error: the node may have it
    NONCE_GAP = auto()  # the node lacks a transaction with an earlier nonce
    UNDERPRICED = auto()  # rejected at this fee
    NONCE_USED = auto()  # the nonce is used on the chain or by another transaction
    INSUFFICIENT_FUNDS = auto()  # the account can't pay the gas
    MEMPOOL_FULL = auto()  # the node's mempool is full
    REJECTED = auto()  # rejected permanently


#: Outcomes after which the node has the transaction, or may have it.
_SENT: Final = (BroadcastOutcome.ACCEPTED, BroadcastOutcome.UNCLEAR, BroadcastOutcome.NONCE_GAP)
_OUTCOMES: Final = {
    NodeError.ALREADY_KNOWN: BroadcastOutcome.ACCEPTED,
    NodeError.NONCE_TOO_LOW: BroadcastOutcome.NONCE_USED,
    NodeError.NONCE_TOO_HIGH: BroadcastOutcome.NONCE_GAP,
    NodeError.UNDERPRICED: BroadcastOutcome.UNDERPRICED,
    NodeError.REPLACEMENT_UNDERPRICED: BroadcastOutcome.NONCE_USED,
    NodeError.INSUFFICIENT_FUNDS: BroadcastOutcome.INSUFFICIENT_FUNDS,
    NodeError.POOL_FULL: BroadcastOutcome.MEMPOOL_FULL,
    NodeError.INVALID: BroadcastOutcome.REJECTED,
}
#: JSON-RPC error code of a request that could not be parsed, so that no transaction was accepted.
_PARSE_ERROR: Final = -32700


async def broadcast(
    w3: AsyncWeb3[Any], attempt: Attempt
) -> tuple[BroadcastOutcome, Web3RPCError | None]:
    """Broadcast a signed transaction once; failures of the node or network are not raised.

    Raises:
        WrongEndpointError: The endpoint serves another chain; nothing was sent.
    """
    try:
        await w3.eth.send_raw_transaction(HexBytes(attempt.raw))
    except Web3RPCError as error:
        body = error_body(error)
        if body.get("code") == _PARSE_ERROR or is_unsupported(body):
            return BroadcastOutcome.REJECTED, error
        outcome = _OUTCOMES.get(classify(error), BroadcastOutcome.UNCLEAR)
        if outcome is BroadcastOutcome.REJECTED:
            outcome = await look_up(w3, attempt)
        return outcome, error
    except WrongEndpointError:
        raise
    except EndpointError:
        return BroadcastOutcome.UNCLEAR, None
    return BroadcastOutcome.ACCEPTED, None


async def look_up(w3: AsyncWeb3[Any], attempt: Attempt) -> BroadcastOutcome:
    """Look a transaction up at the node, independently of the response to its broadcast."""
    try:
        await w3.eth.get_transaction(HexBytes(attempt.tx_hash))
    except TransactionNotFound:
        return BroadcastOutcome.REJECTED
    except (Web3RPCError, EndpointError):
        return BroadcastOutcome.UNCLEAR
    return BroadcastOutcome.ACCEPTED


def error_text(error: Web3RPCError | None) -> str:
    """Return the node's error message, or "no answer"."""
    return "no answer" if error is None else node_message(error)


# -- the nonce manager

#: Lookups of our own transaction before a used nonce counts as a conflict.
_OWN_LOOKUPS: Final = 5
#: Number of nonce conflicts whose transactions are looked up and kept.
_MAX_CONFLICTS: Final = 4
#: Blocks after the first head in which transactions sent before this program's start may be mined.
_OLD_BLOCKS: Final = 8
#: Seconds for which a lower head means that the node lags, and not that the chain became shorter.
_LAG_SECONDS: Final = 30.0
_log = structlog.get_logger(__name__)


class NonceManager:
    """Assigns the nonces of an account, with a lock around assignment, signature and broadcast."""

    def __init__(
        self,
        w3: AsyncWeb3[Any],
        account: Signer,
        outbox: Outbox,
        preflight: Preflight,
        *,
        chain_id: int,
        poll: float,
        metrics: Metrics | None = None,
    ) -> None:
        self._w3 = w3
        self._account = account
        self._outbox = outbox
        #: IDs of entries that a task of this process waits for, from the time they are recorded.
        self.attended: set[int] = set()
        self._preflight = preflight
        self._chain_id = chain_id
        self._poll_interval = poll
        self._lock = asyncio.Lock()
        self._floor = 0  # minimum nonce of the next transaction, after a nonce conflict
        self._chain_nonce: int | None = None  # the account's nonce on the chain at the last poll
        self._highest_head = (-1, 0.0)  # highest head that was reported, and when
        self._first_head = -1  # head at the first poll
        #: Head, nonce and time of the last poll.
        self._last_poll: tuple[int, int, float] | None = None
        #: Header of the latest block at the last poll, in JSON-RPC form.
        self.latest: Mapping[str, Any] = {}
        #: The node's error message by entry ID, for rejections that could not be classified.
        self.node_errors: dict[int, str] = {}
        #: The latest transactions of this account that another program sent after the start of
        #: this one.
        self.conflicts: list[Spender] = []
        self._metrics = metrics
        if metrics is not None:
            description = "Nonces of the wallet that another program used."
            self._conflict_counter = metrics.counter("nonce_conflicts", description)

    async def submit(self, call: Call, gas: int, key: str | None, deadline: float) -> Entry:
        """Record and broadcast a call; the node has the returned entry, or may have it.

        Raises:
            InsufficientFundsError: The account can't pay the gas.
            EndpointError: The node rejected it; the nonce is free again.
            WaitTimeoutError: Gas costs more than the ceiling until `deadline`.
        """
        async with self._lock:
            while True:
                fees = await self._preflight.fees(call, gas, deadline)
                head, floor = await self._recent_head_and_nonce()
                floor, self._floor = max(floor, self._floor), 0
                entry = await self._append(call, gas, floor, fees, head, key=key)
                with self._attending(entry):
                    crash_point("sender.recorded")
                    outcome, error = await self._broadcast_entry(entry)
                    if outcome in _SENT:
                        return self._outbox.entry(entry.id)
                    self._last_poll = None
                    self._abandon(entry, outcome, error, deadline)
                    if outcome is BroadcastOutcome.NONCE_USED:
                        # After the pending transactions of another program: it may send
                        # continuously, so that waiting for a free nonce could starve.
                        self._floor = await self._nonce("pending")
                await asyncio.sleep(self._poll_interval)

    @contextmanager
    def _attending(self, entry: Entry) -> Iterator[None]:
        """Mark an entry as attended; undo this if the block raises."""
        self.attended.add(entry.id)
        try:
            yield
        except BaseException:
            self.attended.discard(entry.id)
            raise

    async def _broadcast_entry(self, entry: Entry) -> tuple[BroadcastOutcome, Web3RPCError | None]:
        """Broadcast a recorded entry and return the outcome for its nonce."""
        outcome, error = await self._broadcast(entry.id, entry.latest)
        crash_point("sender.broadcast")
        if outcome is BroadcastOutcome.UNDERPRICED:
            outcome, error = await self._replace(entry)
        if outcome is BroadcastOutcome.NONCE_USED:
            outcome = await self._resolve_used_nonce(entry)
        return outcome, error

    async def _resolve_used_nonce(self, entry: Entry) -> BroadcastOutcome:
        """Determine whether our own transaction or another one has the nonce.

        It is our own if another task of this outbox broadcast it first. The lookup is repeated,
        because a node may return a transaction later than it counts its nonce.
        """
        for _ in range(_OWN_LOOKUPS):
            for attempt in self._outbox.entry(entry.id).attempts:
                outcome = await look_up(self._w3, attempt)
                if outcome is not BroadcastOutcome.REJECTED:
                    return outcome
            await asyncio.sleep(self._poll_interval)
        if await self._nonce() <= entry.nonce:
            # The mempool holds another transaction with this nonce.
            return BroadcastOutcome.NONCE_USED
        # A node may return a transaction only later: give up only if another one is found.
        spender = await find_spender(self._w3, self._account.address, entry.nonce)
        if spender is None:
            return BroadcastOutcome.UNCLEAR
        own_hashes = {attempt.tx_hash for attempt in self._outbox.entry(entry.id).attempts}
        if spender.tx_hash in own_hashes:
            return BroadcastOutcome.ACCEPTED
        self.record_conflict(spender)
        return BroadcastOutcome.NONCE_USED

    async def _nonce(self, block: BlockIdentifier = "latest") -> int:
        """Return the account's next nonce at a block."""
        address = to_checksum_address(self._account.address)
        return int(await self._w3.eth.get_transaction_count(address, block))

    def _abandon(
        self, entry: Entry, outcome: BroadcastOutcome, error: Web3RPCError | None, deadline: float
    ) -> None:
        """Abandon an entry that the node does not have, which frees its nonce.

        Raises:
            InsufficientFundsError: The account can't pay the gas.
            EndpointError: It was rejected permanently, or `deadline` has passed.
        """
        message = error_text(error)
        self._outbox.set_state(entry.id, TxState.ABANDONED, note=message)
        if outcome is BroadcastOutcome.INSUFFICIENT_FUNDS:
            raise self._preflight.insufficient_funds(f"for {entry.call.label!r}: {message}")
        if outcome is BroadcastOutcome.REJECTED or time.monotonic() > deadline:
            raise EndpointError(f"The node rejected {entry.call.label!r}: {message}")

    async def replace(self, entry: Entry) -> None:
        """Replace a transaction with higher fees, unless it was replaced meanwhile."""
        async with self._lock:
            tx = self._outbox.entry(entry.id)
            if tx.state is TxState.OPEN and tx.latest == entry.latest:
                await self._replace(tx)

    async def replace_now(self, entry: Entry, *, cancel: bool) -> None:
        """Replace a transaction on request: the same call with higher fees, or a cancellation.

        Raises:
            UsageError: It is not pending, or the replacement would pay more than the ceiling.
            EndpointError: The node rejected the replacement.
            InsufficientFundsError: The account can't pay it.
        """
        async with self._lock:
            await self._reconcile()
            tx = self._outbox.entry(entry.id)
            if tx.state is not TxState.OPEN or await self.receipt(tx.attempts) is not None:
                raise UsageError(
                    f"{tx.call.label!r} (nonce {tx.nonce}) is not pending: there is nothing to "
                    "replace",
                    hint=f"See `deepsquare tx show {tx.id}`.",
                )
            fees = await self._raised_fees(tx)
            if fees.max_fee > self._preflight.ceiling:
                raise UsageError(
                    f"A replacement of {tx.call.label!r} must offer {fees.max_fee / GWEI:.3f} "
                    f"gwei, the ceiling is {self._preflight.ceiling / GWEI:.3f} gwei",
                    hint="Raise the ceiling with --max-fee-gwei, or wait until it is mined.",
                )
            outcome, error = await self._replace(tx, cancel=cancel or tx.latest.cancels)
            if outcome is BroadcastOutcome.INSUFFICIENT_FUNDS:
                raise self._preflight.insufficient_funds(f"for a replacement: {error_text(error)}")
            if outcome not in _SENT:
                raise EndpointError(f"The node rejected the replacement: {error_text(error)}")

    async def cancel_rejected(self, entry: Entry) -> None:
        """Cancel a transaction that nodes reject, by using up its nonce with an empty transfer."""
        async with self._lock:
            tx = self._outbox.entry(entry.id)
            if tx.state is TxState.OPEN and not tx.latest.cancels:
                message = self.node_errors.get(entry.id, "")
                _log.error("transaction refused", label=entry.call.label, error=message)
                await self._replace(tx, cancel=True)

    async def fill_gap(self, nonce: int) -> None:
        """Fill a nonce gap that blocks later transactions, with an empty transfer to itself."""
        async with self._lock:
            if any(recorded.nonce == nonce for recorded in self._outbox.entries_from(nonce)):
                return
            call = Call(to=self._account.address, data=b"", label=f"fill nonce {nonce}")
            try:
                fees = await self._preflight.fees(call, 21_000, time.monotonic())
            except (WaitTimeoutError, InsufficientFundsError) as error:
                # The wait for the later transaction goes on, and tries this again.
                _log.warning("nonce gap not filled", nonce=nonce, error=error.message)
                return
            head = await self._w3.eth.block_number
            entry = await self._append(call, 21_000, nonce, fees, head, key=None)
            _log.warning("nonce gap filled", nonce=entry.nonce)
            await broadcast(self._w3, entry.latest)

    async def resend(self, entry: Entry) -> None:
        """Rebroadcast the stored bytes, unless the node returns the transaction."""
        try:
            await self._w3.eth.get_transaction(HexBytes(entry.latest.tx_hash))
        except WrongEndpointError:
            raise
        except (TransactionNotFound, Web3RPCError, EndpointError):
            await self._broadcast(entry.id, entry.latest)
        else:
            self.node_errors.pop(entry.id, None)

    async def _broadcast(
        self, entry_id: int, attempt: Attempt
    ) -> tuple[BroadcastOutcome, Web3RPCError | None]:
        """Broadcast an attempt, and keep the node's error message if it is unclassified."""
        outcome, error = await broadcast(self._w3, attempt)
        if outcome is BroadcastOutcome.UNCLEAR and error is not None:
            self.node_errors[entry_id] = error_text(error)
        elif outcome is BroadcastOutcome.ACCEPTED:
            self.node_errors.pop(entry_id, None)
        return outcome, error

    async def reconcile(self) -> None:
        """Reconcile the outbox with the chain: resend lost transactions, settle mined ones."""
        async with self._lock:
            await self._reconcile()

    async def receipt(self, attempts: Sequence[Attempt]) -> Any | None:
        """Return the receipt of the attempt that was mined, or None."""
        for attempt in reversed(attempts):
            try:
                return await self._w3.eth.get_transaction_receipt(HexBytes(attempt.tx_hash))
            except TransactionNotFound:
                continue
        return None

    def settle(self, entry: Entry, receipt: Any) -> None:
        """Record the final state and the fee of a mined transaction."""
        state = outcome_of(entry, receipt)
        self._outbox.set_state(entry.id, state, mined_hash=hash_of(receipt), fee=fee_of(receipt))
        self.node_errors.pop(entry.id, None)

    # -- with the lock held

    async def _recent_head_and_nonce(self) -> tuple[int, int]:
        """Return the result of `_reconcile`, run once per poll interval for concurrent sends."""
        if (
            self._last_poll is not None
            and time.monotonic() - self._last_poll[2] < self._poll_interval
        ):
            return self._last_poll[:2]
        return await self._reconcile()

    async def _reconcile(self) -> tuple[int, int]:
        """Run `reconcile`; return the head and the account's next nonce on the chain."""
        self._last_poll = None
        head, count = await self._latest_header_and_nonce()
        polled_at = time.monotonic()
        lags = self._lags(head)
        if not lags:
            await self._check_conflicts(head, count)
        recorded = self._outbox.entries_from(count)
        if any(entry.state is not TxState.OPEN for entry in recorded) and not lags:
            # If the chain was restarted, the old bytes would be valid there as well.
            await self._verify_chain()
        for entry in recorded:
            if entry.state is not TxState.OPEN:
                if lags:
                    continue  # the node has not seen its block yet
                # A reorg removed the transaction, so that its nonce is unused again.
                _log.warning("transaction reopened", label=entry.call.label, nonce=entry.nonce)
                self._outbox.set_state(entry.id, TxState.OPEN, note="removed by a reorg")
            await self.resend(entry)
        for entry in self._outbox.open_entries():
            if entry.nonce < count and (receipt := await self.receipt(entry.attempts)):
                self.settle(entry, receipt)
        self._last_poll = (head, count, polled_at)
        return head, count

    async def _verify_chain(self) -> None:
        """Verify that this is the chain on which the nonces were used.

        Raises:
            WrongEndpointError: It is another chain.
        """
        recheck_chain = getattr(self._w3.provider, "recheck_chain", None)
        if recheck_chain is not None:
            recheck_chain()
            await self.head_and_nonce()

    async def head_and_nonce(self) -> tuple[int, int]:
        """Return the head and the account's next nonce on the chain, both from one node.

        Raises:
            EndpointError: The node does not answer, or gives an invalid response.
        """
        head, count = await self._request_with_nonce("eth_blockNumber", [])
        return int(head, 16), count

    async def _latest_header_and_nonce(self) -> tuple[int, int]:
        """Return head and nonce as `head_and_nonce` does, and store the header in `latest`."""
        self.latest, count = await self._request_with_nonce(
            "eth_getBlockByNumber", ["latest", False]
        )
        return int(self.latest["number"], 16), count

    async def _request_with_nonce(self, method: str, params: list[Any]) -> tuple[Any, int]:
        """Return the result of a request and the account's next nonce, read just before it."""
        address = to_checksum_address(self._account.address)
        requests = [("eth_getTransactionCount", [address, "latest"]), (method, params)]
        try:
            count, result = await ask_all(self._w3, requests)
            return result, int(count, 16)
        except (TypeError, ValueError, Web3RPCError) as error:
            raise EndpointError(f"The node returned an invalid nonce: {str(error)[:200]}") from None

    def _lags(self, head: int) -> bool:
        """Return whether the node lags behind a higher head that was reported before.

        The higher head expires after `_LAG_SECONDS`, because a chain may become shorter.
        """
        highest, seen_at = self._highest_head
        now = time.monotonic()
        if head < highest and now - seen_at < _LAG_SECONDS:
            return True
        self._highest_head = (head, now)
        return False

    async def _check_conflicts(self, head: int, count: int) -> None:
        """Log the nonces that another program used since the last poll (nonce conflicts)."""
        if self._first_head < 0:
            self._first_head = head
        before, self._chain_nonce = self._chain_nonce, count
        if before is None or before >= count:
            return
        own_nonces = {entry.nonce for entry in self._outbox.entries_from(before)}
        conflicts = [nonce for nonce in range(before, count) if nonce not in own_nonces]
        if conflicts:
            spender = None
            for nonce in conflicts[:_MAX_CONFLICTS]:
                candidate = await find_spender(self._w3, self._account.address, nonce)
                spender = spender or candidate
                if candidate is not None:
                    self.record_conflict(candidate)
            _log.warning(
                "nonce conflict detected",
                account=self._account.address,
                nonces=conflicts[:10],
                used=describe_spender(spender),
                hint="Another program uses this wallet. Use one wallet per program, or a common --state-dir.",
            )
            if self._metrics is not None:
                self._metrics.add(self._conflict_counter, amount=len(conflicts))

    def record_conflict(self, spender: Spender) -> None:
        """Keep a conflicting transaction, unless it may be older than this program's start."""
        if spender not in self.conflicts and 0 <= self._first_head < spender.block - _OLD_BLOCKS:
            self.conflicts = [*self.conflicts, spender][-_MAX_CONFLICTS:]

    async def _raised_fees(self, entry: Entry) -> Fees:
        """Return the fees of the next attempt, both at least 12.5 % higher."""
        current = await market(self._w3)
        return Fees(entry.latest.max_fee, entry.latest.priority_fee).bumped(current.fees)

    async def _replace(
        self, entry: Entry, *, cancel: bool = False
    ) -> tuple[BroadcastOutcome, Web3RPCError | None]:
        """Broadcast a replacement transaction with higher fees.

        It has the same call, or is an empty transfer if the entry is or was cancelled.
        """
        last = entry.latest
        fees = await self._raised_fees(entry)
        if fees.max_fee > self._preflight.ceiling:
            # Mempools reject a smaller raise: wait until gas is cheaper.
            _log.warning("fee ceiling reached", label=entry.call.label, max_fee=last.max_fee)
            return BroadcastOutcome.UNCLEAR, None
        cancel = cancel or last.cancels
        if fees == Fees(last.max_fee, last.priority_fee) and cancel is last.cancels:
            # If gas is free the fees do not rise: broadcast the same bytes again.
            return await broadcast(self._w3, last)
        head = await self._w3.eth.block_number
        empty_transfer = Call(
            to=self._account.address, data=b"", label=f"cancel {entry.call.label}"
        )
        call = empty_transfer if cancel else entry.call
        signed = await signed_by(
            self._account, lambda: self._sign(call, entry.nonce, entry.gas, fees, head)
        )
        attempt = dataclasses.replace(signed, cancels=cancel)
        self._outbox.add_attempt(entry.id, attempt)
        crash_point("sender.replaced")
        _log.info("fee raised", label=entry.call.label, nonce=entry.nonce, max_fee=fees.max_fee)
        return await self._broadcast(entry.id, attempt)

    async def _append(
        self, call: Call, gas: int, floor: int, fees: Fees, head: int, *, key: str | None
    ) -> Entry:
        """Record a signed call under the next free nonce."""
        return await sign_and_record(
            self._account,
            lambda nonce: self._sign(call, nonce, gas, fees, head),
            lambda sign: self._outbox.append(call, gas, floor, sign, key),
        )

    def _sign(self, call: Call, nonce: int, gas: int, fees: Fees, head: int) -> Attempt:
        signed = self._account.sign_transaction(
            {
                "type": 2,
                "chainId": self._chain_id,
                "nonce": nonce,
                "to": to_checksum_address(call.to) if call.to else b"",
                "value": call.value,
                "data": HexBytes(call.data),
                "gas": gas,
                "maxFeePerGas": fees.max_fee,
                "maxPriorityFeePerGas": fees.priority_fee,
            }
        )
        crash_point("sender.signed")
        return Attempt(
            tx_hash=to_hex(signed.hash),
            raw=bytes(signed.raw_transaction),
            max_fee=fees.max_fee,
            priority_fee=fees.priority_fee,
            sent_block=head,
        )


def outcome_of(entry: Entry, receipt: Any) -> TxState:
    """Return the final state of a mined transaction: MINED, FAILED or CANCELLED."""
    tx_hash = hash_of(receipt)
    if any(attempt.cancels for attempt in entry.attempts if attempt.tx_hash == tx_hash):
        return TxState.CANCELLED
    return TxState.MINED if receipt["status"] == 1 else TxState.FAILED
