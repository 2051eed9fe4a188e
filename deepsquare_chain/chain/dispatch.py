"""Owns an account's nonce: signs, records, broadcasts, and keeps what is recorded alive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final

import structlog
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import TransactionNotFound, Web3RPCError

from deepsquare_chain.chain.broadcast import Outcome, broadcast, refusal
from deepsquare_chain.chain.calls import Call
from deepsquare_chain.chain.fees import Fees, market
from deepsquare_chain.chain.outbox import Attempt, Entry, Outbox, TxState
from deepsquare_chain.chain.preflight import Preflight
from deepsquare_chain.chain.receipts import hash_of
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.faults import crash_point

#: Looks for an own receipt before a nonce counts as used by somebody else.
_OWN_LOOKS: Final = 5
_log = structlog.get_logger(__name__)


class Dispatcher:
    """The one place where nonces are given out; a lock around nonce, signature and broadcast."""

    def __init__(
        self,
        w3: AsyncWeb3[Any],
        account: LocalAccount,
        outbox: Outbox,
        preflight: Preflight,
        *,
        chain_id: int,
        ceiling: int,
        poll: float,
    ) -> None:
        self._w3 = w3
        self._account = account
        self._outbox = outbox
        self._preflight = preflight
        self._chain_id = chain_id
        self._ceiling = ceiling
        self._poll = poll
        self._lock = asyncio.Lock()

    async def submit(self, call: Call, gas: int, key: str | None, deadline: float) -> Entry:
        """Record and broadcast; what is returned the node has, or may have.

        Raises:
            InsufficientFundsError: The account can't pay the gas.
            EndpointError: The node turned it down; the nonce is free again.
            WaitTimeoutError: Gas is dearer than the ceiling until `deadline`.
        """
        async with self._lock:
            while True:
                fees = await self._preflight.fees(call, gas, deadline)
                floor = await self._tend()
                head = await self._w3.eth.block_number

                def sign(nonce: int, fees: Fees = fees, head: int = head) -> Attempt:
                    return self._sign(call, nonce, gas, fees, head)

                entry = self._outbox.append(call, gas, floor, sign, key)
                crash_point("sender.recorded")
                outcome, error = await broadcast(self._w3, entry.latest)
                crash_point("sender.broadcast")
                if outcome is Outcome.UNDERPRICED:
                    outcome, error = await self._replace(entry)
                if outcome in (Outcome.TAKEN, Outcome.UNCLEAR, Outcome.GAP):
                    return entry
                if outcome is Outcome.NONCE_USED and await self._is_mined(entry.id):
                    return self._outbox.entry(entry.id)
                self._give_up(entry, outcome, error, deadline)
                await asyncio.sleep(self._poll)

    def _give_up(
        self, entry: Entry, outcome: Outcome, error: Web3RPCError | None, deadline: float
    ) -> None:
        """The node has not got it, so that its nonce is free again; raises unless it may later."""
        words = refusal(error)
        self._outbox.set_state(entry.id, TxState.ABANDONED, note=words)
        if outcome is Outcome.NO_MONEY:
            raise self._preflight.no_money(f"for {entry.call.label!r}: {words}")
        if outcome is Outcome.REFUSED or time.monotonic() > deadline:
            raise EndpointError(f"The node turned down {entry.call.label!r}: {words}")

    async def _is_mined(self, entry_id: int) -> bool:
        """Whether the nonce was used by these very bytes: who waits for others resends them too.

        Asked a few times, for a node may tell of a transaction later than of its nonce.
        """
        for _ in range(_OWN_LOOKS):
            if await self.receipt(self._outbox.entry(entry_id).attempts) is not None:
                return True
            await asyncio.sleep(self._poll)
        return False

    async def replace(self, entry: Entry) -> None:
        """Raise the fees of a transaction, unless somebody did so meanwhile."""
        async with self._lock:
            now = self._outbox.entry(entry.id)
            if now.state is TxState.OPEN and now.latest == entry.latest:
                await self._replace(now)

    async def fill(self, nonce: int) -> None:
        """Use up a nonce that nobody has and later transactions wait for: pay oneself nothing."""
        async with self._lock:
            if any(each.nonce == nonce for each in self._outbox.entries_from(nonce)):
                return
            call = Call(to=self._account.address, data=b"", label=f"fill nonce {nonce}")
            fees = await self._preflight.fees(call, 21_000, time.monotonic())
            head = await self._w3.eth.block_number
            entry = self._outbox.append(
                call, 21_000, nonce, lambda free: self._sign(call, free, 21_000, fees, head), None
            )
            _log.warning("nonce_filled", nonce=entry.nonce)
            await broadcast(self._w3, entry.latest)

    async def resend(self, entry: Entry) -> None:
        """Broadcast the stored bytes again where the node does not know them."""
        try:
            await self._w3.eth.get_transaction(HexBytes(entry.latest.tx_hash))
        except TransactionNotFound:
            await broadcast(self._w3, entry.latest)

    async def tend(self) -> None:
        """Resend what the chain lost, settle what it mined."""
        async with self._lock:
            await self._tend()

    async def receipt(self, attempts: Sequence[Attempt]) -> Any | None:
        """The receipt of whichever attempt was mined."""
        for attempt in reversed(attempts):
            try:
                return await self._w3.eth.get_transaction_receipt(HexBytes(attempt.tx_hash))
            except TransactionNotFound:
                continue
        return None

    def settle(self, entry: Entry, receipt: Any) -> None:
        """Record what became of a mined transaction."""
        state = TxState.MINED if receipt["status"] == 1 else TxState.FAILED
        self._outbox.set_state(entry.id, state, mined_hash=hash_of(receipt))

    # -- with the lock held

    async def _tend(self) -> int:
        """As `tend`; the account's next nonce on the chain."""
        address = to_checksum_address(self._account.address)
        count = int(await self._w3.eth.get_transaction_count(address, "latest"))
        for entry in self._outbox.entries_from(count):
            if entry.state is not TxState.OPEN:
                # A reorganisation took it back, and with it the nonce.
                _log.warning("transaction_taken_back", label=entry.call.label, nonce=entry.nonce)
                self._outbox.set_state(entry.id, TxState.OPEN, note="taken back by the chain")
            await self.resend(entry)
        for entry in self._outbox.open_entries():
            if entry.nonce < count and (receipt := await self.receipt(entry.attempts)):
                self.settle(entry, receipt)
        return count

    async def _replace(self, entry: Entry) -> tuple[Outcome, Web3RPCError | None]:
        """Broadcast the same call and nonce with both fees at least 12.5 % higher."""
        last = entry.latest
        now = await market(self._w3)
        fees = Fees(last.max_fee, last.priority_fee).bumped(now.fees)
        if fees.max_fee > self._ceiling:
            # A smaller step is refused by every pool: hold until the chain is cheaper.
            _log.warning("fee_ceiling_reached", label=entry.call.label, max_fee=last.max_fee)
            return Outcome.UNCLEAR, None
        head = await self._w3.eth.block_number
        attempt = self._sign(entry.call, entry.nonce, entry.gas, fees, head)
        self._outbox.add_attempt(entry.id, attempt)
        crash_point("sender.replaced")
        _log.info("fee_raised", label=entry.call.label, nonce=entry.nonce, max_fee=fees.max_fee)
        return await broadcast(self._w3, attempt)

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
            tx_hash="0x" + bytes(signed.hash).hex(),
            raw=bytes(signed.raw_transaction),
            max_fee=fees.max_fee,
            priority_fee=fees.priority_fee,
            sent_block=head,
        )
