"""Sends transactions of one account: it owns the nonce and forgets nothing.

Simulate, sign, record, broadcast, confirm. Whatever is recorded is resent until its nonce is
mined, so that a crash between any two steps neither repeats nor loses an effect.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, TransactionNotFound, Web3RPCError

from deepsquare_chain.chain.broadcast import Outcome, broadcast, refusal
from deepsquare_chain.chain.calls import Call
from deepsquare_chain.chain.events import Event, decode_logs
from deepsquare_chain.chain.fees import GWEI, Fees, Market, market
from deepsquare_chain.chain.nodeerrors import NodeError, classify, node_message
from deepsquare_chain.chain.outbox import Attempt, Entry, Outbox, TxState
from deepsquare_chain.chain.reverts import UnknownRevertError, decode_revert, revert_data
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    InsufficientFundsError,
    RevertedError,
    WaitTimeoutError,
)
from deepsquare_chain.observe.faults import crash_point

_GAS_MARGIN: Final = (6, 5)
#: Looks at a used nonce without a receipt of ours before somebody else is said to have used it.
_MISSES: Final = 6
_log = structlog.get_logger(__name__)


class NonceTakenError(GridError):
    """Another program used this wallet's nonce; the call had no effect."""


@dataclass(frozen=True, slots=True)
class TxReceipt:
    """A mined transaction; `fee_wei` is what it cost, in wei of the chain's own coin."""

    hash: str
    block_number: int
    block_hash: str
    gas_used: int
    fee_wei: int
    events: tuple[Event, ...] = field(repr=False)
    label: str = ""
    contract: str = ""  # address of a contract that this deployed


@dataclass
class _Watch:
    """What one wait has seen so far."""

    head: int = -1
    misses: int = 0


class Sender:
    """The one who sends for an account.

    Args:
        w3: Connection made by `connect`.
        account: Who signs.
        outbox: Its durable memory, of this account and chain.
        chain_id: Goes into every signature.
        max_fee_per_gas: Ceiling in wei; above it transactions wait.
        poll_interval: Seconds between two looks for a receipt.
        stuck_blocks: Blocks after which fees are raised.
        confirmations: Blocks on top of a receipt's before it is believed.
    """

    def __init__(
        self,
        w3: AsyncWeb3[Any],
        account: LocalAccount,
        outbox: Outbox,
        *,
        chain_id: int,
        max_fee_per_gas: int = 500 * GWEI,
        poll_interval: float = 0.25,
        stuck_blocks: int = 4,
        confirmations: int = 0,
    ) -> None:
        self.w3 = w3
        self.account = account
        self.address = account.address
        self.chain_id = chain_id
        self._outbox = outbox
        self._ceiling = max_fee_per_gas
        self._poll = poll_interval
        self._stuck_blocks = stuck_blocks
        self._confirmations = confirmations
        self._lock = asyncio.Lock()

    # -- public

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
        """
        deadline = time.monotonic() + timeout
        entry = self._outbox.by_key(key) if key is not None else None
        if entry is None:
            limit = await self._gas_limit(call, simulate=simulate, gas=gas)
            crash_point("sender.intent")
            entry = await self._submit(call, limit, key, deadline)
        return await self._confirm(entry, deadline)

    async def simulate(self, call: Call) -> None:
        """Try a call on the latest block.

        Raises:
            RevertedError: It would be refused.
        """
        try:
            await self.w3.eth.call(self._request(call), "latest")
        except ContractLogicError as error:
            raise decode_revert(error) from None
        except Web3RPCError as error:
            raise self._turned_down(call, error) from None

    def pending(self) -> list[Entry]:
        """Transactions that are not known to be mined, by nonce."""
        return list(self._outbox.open_entries())

    async def tend(self) -> None:
        """Look after what is recorded: resend what the chain lost, settle what it mined.

        Cheap when there is nothing to do; services call it each cycle.
        """
        async with self._lock:
            await self._tend()

    async def recover(self, *, timeout: float = 60.0) -> list[TxReceipt]:
        """Finish what an earlier process began; before anything else is sent.

        What is not mined within `timeout` seconds stays in `pending()`.
        """
        await self.tend()
        deadline = time.monotonic() + timeout
        receipts = []
        for entry in self.pending():
            try:
                receipts.append(await self._confirm(entry, deadline))
            except GridError as error:
                _log.warning("transaction_recovered", label=entry.call.label, error=error.message)
        return receipts

    # -- before the nonce

    def _request(self, call: Call) -> Any:
        body = {"from": self.address, "data": HexBytes(call.data), "value": call.value}
        return body | ({"to": to_checksum_address(call.to)} if call.to else {})

    async def _gas_limit(self, call: Call, *, simulate: bool, gas: int | None) -> int:
        if simulate and gas is not None:
            await self.simulate(call)
        if gas is not None:
            return gas
        try:
            estimate = await self.w3.eth.estimate_gas(self._request(call), "latest")
        except (ContractLogicError, Web3RPCError) as error:
            # Some nodes give the reason to a call only.
            if revert_data(error) is None:
                await self.simulate(call)
            if isinstance(error, ContractLogicError):
                raise decode_revert(error) from None
            raise self._turned_down(call, error) from None
        block = await self.w3.eth.get_block("latest")
        over, under = _GAS_MARGIN
        # A batch at the block's limit gets no margin, but is not refused for wanting one.
        return max(int(estimate), min(int(estimate) * over // under, int(block["gasLimit"])))

    def _turned_down(self, call: Call, error: Web3RPCError) -> GridError:
        if classify(error) is NodeError.NO_GAS_MONEY:
            return self._no_money(f"for {call.label}")
        data = revert_data(error)
        if data:
            return decode_revert(error)
        return EndpointError(f"The node turned down {call.label!r}: {node_message(error)}")

    def _no_money(self, detail: str) -> InsufficientFundsError:
        return InsufficientFundsError(
            f"The account {self.address} can't pay the gas {detail}",
            hint="Send coins of the chain to it, or use a devnet's faucet.",
        )

    async def _price(self, call: Call, gas: int, deadline: float) -> Fees:
        """Fees under the ceiling that the account can pay; waits while the chain is too dear."""
        while True:
            now: Market = await market(self.w3)
            if now.least <= self._ceiling:
                break
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"{call.label!r} was not sent: gas costs {now.least} wei, the ceiling is "
                    f"{self._ceiling} wei",
                    hint="Raise the ceiling (--max-fee-gwei) or wait for a cheaper hour.",
                )
            await asyncio.sleep(self._poll)
        fees = now.fees.within(self._ceiling)
        balance = await self.w3.eth.get_balance(self.address, "latest")
        needed = gas * fees.max_fee + call.value
        if balance < needed:
            raise self._no_money(
                f"for {call.label!r}: it has {format_credits(int(balance))}, up to "
                f"{format_credits(needed)} may be needed"
            )
        return fees

    # -- nonce, signature, record, broadcast

    async def _submit(self, call: Call, gas: int, key: str | None, deadline: float) -> Entry:
        """Record and broadcast; only what the node may have taken is returned."""
        async with self._lock:
            await self._tend()
            while True:
                fees = await self._price(call, gas, deadline)
                head = await self.w3.eth.block_number
                floor = await self.w3.eth.get_transaction_count(self.address, "latest")

                def sign(nonce: int, fees: Fees = fees, head: int = head) -> Attempt:
                    return self._sign(call, nonce, gas, fees, head)

                entry = self._outbox.append(call, gas, floor, sign, key)
                crash_point("sender.recorded")
                outcome, error = await broadcast(self.w3, entry.latest)
                crash_point("sender.broadcast")
                if outcome is Outcome.UNDERPRICED:
                    outcome, error = await self._replace(entry)
                if outcome in (Outcome.TAKEN, Outcome.UNCLEAR, Outcome.GAP):
                    return entry
                # The node has not got it: the nonce is free again.
                self._outbox.set_state(entry.id, TxState.ABANDONED, note=refusal(error))
                if outcome is Outcome.NO_MONEY:
                    raise self._no_money(f"for {call.label!r}: {refusal(error)}")
                if outcome is Outcome.REFUSED or time.monotonic() > deadline:
                    raise EndpointError(f"The node turned down {call.label!r}: {refusal(error)}")
                await asyncio.sleep(self._poll)

    def _sign(self, call: Call, nonce: int, gas: int, fees: Fees, head: int) -> Attempt:
        signed = self.account.sign_transaction(
            {
                "type": 2,
                "chainId": self.chain_id,
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
            tx_hash="0x" + bytes(signed.hash).hex(),
            raw=bytes(signed.raw_transaction),
            max_fee=fees.max_fee,
            priority_fee=fees.priority_fee,
            sent_block=head,
        )

    async def _replace(self, entry: Entry) -> tuple[Outcome, Web3RPCError | None]:
        """Broadcast the same call and nonce with fees at least 12.5 % higher."""
        last = entry.latest
        now = await market(self.w3)
        fees = Fees(last.max_fee, last.priority_fee).bumped(now.fees).within(self._ceiling)
        if fees.max_fee <= last.max_fee:
            _log.warning("fee_ceiling_reached", label=entry.call.label, max_fee=last.max_fee)
            return Outcome.UNCLEAR, None
        head = await self.w3.eth.block_number
        attempt = self._sign(entry.call, entry.nonce, entry.gas, fees, head)
        self._outbox.add_attempt(entry.id, attempt)
        crash_point("sender.replaced")
        return await broadcast(self.w3, attempt)

    # -- until it is mined

    async def _confirm(self, entry: Entry, deadline: float) -> TxReceipt:
        watch = _Watch()
        while True:
            try:
                receipt = await self._receipt(entry)
                if receipt is not None:
                    return await self._settle(entry, receipt)
                await self._nudge(entry, watch)
            except EndpointError as error:
                # Unknown is not gone: it is on its way, whether the node answers or not.
                _log.warning("endpoint_silent", label=entry.call.label, error=error.message)
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"{entry.call.label!r} was not mined in time ({entry.latest.tx_hash})",
                    hint="It stays recorded and may still be mined: look at it with "
                    "`deepsquare tx list`.",
                )
            await asyncio.sleep(self._poll)
            entry = self._outbox.entry(entry.id)

    async def _receipt(self, entry: Entry) -> Any | None:
        """The receipt of whichever attempt was mined, deep enough."""
        for attempt in reversed(entry.attempts):
            try:
                receipt = await self.w3.eth.get_transaction_receipt(HexBytes(attempt.tx_hash))
            except TransactionNotFound:
                continue
            if self._confirmations:
                head = await self.w3.eth.block_number
                if head < receipt["blockNumber"] + self._confirmations:
                    return None
            return receipt
        return None

    async def _nudge(self, entry: Entry, watch: _Watch) -> None:
        """Resend, raise fees, or give up on a transaction without a receipt, once a block."""
        count = await self.w3.eth.get_transaction_count(self.address, "latest")
        if count > entry.nonce:
            watch.misses += 1
            if watch.misses >= _MISSES and await self._receipt_anywhere(entry) is None:
                self._outbox.set_state(entry.id, TxState.ABANDONED, note="nonce used by another")
                raise NonceTakenError(
                    f"{entry.call.label!r} was not carried out: another program used nonce "
                    f"{entry.nonce} of {self.address}",
                    hint="Let only one program use a wallet, then try again.",
                )
            return
        watch.misses = 0
        head = await self.w3.eth.block_number
        if head == watch.head:
            return
        watch.head = head
        await self._resend(entry)
        if entry.nonce == count and head - entry.latest.sent_block >= self._stuck_blocks:
            async with self._lock:
                if self._outbox.entry(entry.id).latest == entry.latest:
                    await self._replace(entry)

    async def _receipt_anywhere(self, entry: Entry) -> Any | None:
        for attempt in entry.attempts:
            try:
                return await self.w3.eth.get_transaction_receipt(HexBytes(attempt.tx_hash))
            except TransactionNotFound:
                continue
        return None

    async def _resend(self, entry: Entry) -> None:
        """Broadcast the stored bytes again where the node does not know them."""
        try:
            await self.w3.eth.get_transaction(HexBytes(entry.latest.tx_hash))
        except TransactionNotFound:
            await broadcast(self.w3, entry.latest)

    async def _settle(self, entry: Entry, receipt: Any) -> TxReceipt:
        tx_hash = "0x" + bytes(receipt["transactionHash"]).hex()
        crash_point("sender.receipt")
        self._outbox.set_state(entry.id, TxState.MINED, mined_hash=tx_hash)
        crash_point("sender.settled")
        if receipt["status"] != 1:
            raise await self._why_failed(entry, receipt, tx_hash)
        price = int(receipt.get("effectiveGasPrice") or 0)
        return TxReceipt(
            hash=tx_hash,
            block_number=int(receipt["blockNumber"]),
            block_hash="0x" + bytes(receipt["blockHash"]).hex(),
            gas_used=int(receipt["gasUsed"]),
            fee_wei=int(receipt["gasUsed"]) * price + _rollup_fee(receipt),
            events=tuple(decode_logs(receipt["logs"])),
            label=entry.call.label,
            contract=str(receipt["contractAddress"] or ""),
        )

    async def _why_failed(self, entry: Entry, receipt: Any, tx_hash: str) -> RevertedError:
        """The reason of a mined failure: the same call on the state that it left behind."""
        if int(receipt["gasUsed"]) >= entry.gas:
            return UnknownRevertError(f"{entry.call.label!r} ran out of gas ({tx_hash})")
        try:
            await self.w3.eth.call(self._request(entry.call), receipt["blockNumber"])
        except ContractLogicError as error:
            return decode_revert(error)
        except (Web3RPCError, EndpointError):
            pass
        return UnknownRevertError(
            f"{entry.call.label!r} was refused by the contract ({tx_hash})",
            hint="The state has moved on since; look at it and try again.",
        )

    # -- housekeeping

    async def _tend(self) -> None:
        count = await self.w3.eth.get_transaction_count(self.address, "latest")
        for entry in self._outbox.entries_from(count):
            if entry.state is TxState.MINED:
                # A reorganisation took it back, and with it the nonce.
                self._outbox.set_state(entry.id, TxState.OPEN, note="taken back by the chain")
            await self._resend(entry)
        for entry in self._outbox.open_entries():
            if entry.nonce < count and (receipt := await self._receipt_anywhere(entry)):
                tx_hash = "0x" + bytes(receipt["transactionHash"]).hex()
                self._outbox.set_state(entry.id, TxState.MINED, mined_hash=tx_hash)


def _rollup_fee(receipt: Any) -> int:
    """What a rollup adds for its data on another chain."""
    fee = receipt.get("l1Fee")
    if fee is None:
        return 0
    return int(fee, 16) if isinstance(fee, str) else int(fee)
