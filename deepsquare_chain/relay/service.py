"""Takes signed requests, and carries them out in batches from the relay's own wallet."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from eth_utils.address import to_checksum_address

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.event_types import ExecutedForwardRequest
from deepsquare_chain.chain.bindings.forwarder import ForwarderDomain, SignedRequest
from deepsquare_chain.chain.rpc.on_demand import next_block_time
from deepsquare_chain.chain.transactions.fees import market
from deepsquare_chain.chain.transactions.sender import Sender, TransactionCancelledError, TxReceipt
from deepsquare_chain.credits import CREDIT, format_credits
from deepsquare_chain.daemon.loop import cancelled
from deepsquare_chain.daemon.service import ServiceSettings
from deepsquare_chain.errors import EndpointError, GridError, NotAuthorisedError, RevertedError
from deepsquare_chain.faults import crash_point
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.observability.serving import RequestRefusedError
from deepsquare_chain.relay.records import RelayedRequest, Requests, State
from deepsquare_chain.relay.rules import (
    FUNCTIONS,
    RelayRules,
    check,
    check_deadline,
    gas_of,
)
from deepsquare_chain.store.database import Store

HOUR: Final = 3_600
#: Gas of a batch before its first request.
_BATCH_GAS: Final = 60_000
#: Batches that may pass a request over before it is dropped.
_MAX_TRIES: Final = 3
#: Requests that are looked up on the chain at once; the others wait for their turn.
_LOOKUPS: Final = 8
#: Seconds between two looks at the wallet and the price of gas.
_LOOK_EVERY: Final = 15.0
_RETRY_SECONDS: Final = 30
#: Seconds before a batch that could not be settled is followed again.
_PAUSE: Final = 2.0
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RelaySettings(ServiceSettings):
    """How a relay runs.

    Attributes:
        rules: What it takes.
        collect_seconds: How long requests wait for others to share their transaction.
        batch_gas: Most gas of one transaction.
        min_balance: Wei of coin below which the wallet counts as empty.
    """

    rules: RelayRules = field(default_factory=RelayRules)
    collect_seconds: float = 0.3
    batch_gas: int = 10_000_000
    min_balance: int = 0


@dataclass(frozen=True, slots=True)
class _Wallet:
    """The relay's coin and what gas costs, in wei; `at` in monotonic seconds."""

    balance: int
    max_fee: int
    at: float


class RelayService:
    """One relay of one deployment; `cycle` is run by a daemon, `accept` by the HTTP side.

    Args:
        contracts: The deployment.
        sender: Of the relay's wallet.
        store: The service's own database.
        domain: EIP-712 domain of the forwarder.
        settings: How it runs.
        metrics: Where its metrics go.
    """

    def __init__(
        self,
        contracts: Contracts,
        sender: Sender,
        store: Store,
        *,
        domain: ForwarderDomain,
        settings: RelaySettings,
        metrics: Metrics,
    ) -> None:
        self.contracts = contracts
        self.rules = settings.rules
        self.address = sender.address
        self._sender = sender
        self._requests = Requests(store)
        self._domain = domain
        self._settings = settings
        self._wallet: _Wallet | None = None
        self._tended = -math.inf
        self._batches: dict[str, asyncio.Task[None]] = {}
        self._accepting = asyncio.Lock()
        self._lookups = asyncio.Semaphore(_LOOKUPS)
        #: Called when there is something to do before the next cycle is due.
        self.wake: Callable[[], None] = lambda: None
        self._metrics = metrics
        self._taken = metrics.counter(
            "relay_requests", "Requests by what was answered.", answer=("taken", "same", "refused")
        )
        self._settled = metrics.counter(
            "relay_settled",
            "Requests by how they ended.",
            end=(State.EXECUTED.value, State.FAILED.value, State.DROPPED.value),
        )
        self._gas = metrics.counter("relay_gas", "Gas of the relay's transactions.")
        self._size = metrics.histogram(
            "relay_batch_requests", "Requests of a transaction.", (1, 2, 5, 10, 20, 50, 100)
        )
        self._seconds = metrics.histogram(
            "relay_seconds", "Seconds from taking a request to its transaction's receipt."
        )
        self._waiting = metrics.gauge("relay_pending_requests", "Requests not carried out yet.")
        self._open = metrics.gauge("relay_open", "Whether the wallet can pay for requests.")
        self._balance = metrics.gauge("gas_balance_coins", "Coins of the chain for gas.")

    def terms(self) -> dict[str, Any]:
        """What this relay takes, as `GET /v1/relay` answers it; amounts as text."""
        rules = self.rules
        return {
            "chain_id": self._domain.chain_id,
            "forwarder": self.contracts.forwarder.address,
            "scheduler": self.contracts.scheduler.address,
            "wallet": self.address,
            "open": self._can_pay(),
            "functions": list(FUNCTIONS),
            "min_amount": str(rules.min_amount),
            "max_gas": rules.max_gas,
            "max_bytes": rules.max_bytes,
            "min_lead_seconds": rules.min_lead,
            "max_lead_seconds": rules.max_lead,
            "requests_per_hour": rules.per_hour,
            "requests_per_customer_per_hour": rules.per_customer,
            "pending_per_customer": rules.pending,
        }

    # -- taking requests

    async def accept(self, signed: SignedRequest) -> RelayedRequest:
        """Take a request, or answer a repeated one with what became of it.

        Raises:
            RequestRefusedError: It is not taken; nothing of it is recorded.
            EndpointError: The chain does not answer now.
        """
        try:
            return await self._accept(signed)
        except GridError:
            self._metrics.add(self._taken, "refused")
            raise

    async def _accept(self, signed: SignedRequest) -> RelayedRequest:
        digest = "0x" + signed.request.digest(self._domain).hex()
        _check_signature(signed, self._domain)
        if (known := self._known(digest)) is not None:
            return known
        allowed = check(signed, self.contracts.scheduler.address, self.rules)
        self._check_open()
        self._check_limits(signed.request.sender)
        try:
            async with self._lookups:
                await self._look_up(signed, allowed.function)
        except RequestRefusedError:
            # The same request, sent twice at once, may have been taken and carried out meanwhile.
            if (known := self._known(digest)) is not None:
                return known
            raise
        async with self._accepting:
            if (known := self._known(digest)) is not None:
                return known
            await self._check_nonce(signed)
            taken = self._requests.add(digest, signed, allowed.function)
        crash_point("relay.taken")
        self._metrics.add(self._taken, "taken")
        _log.info("request taken", digest=digest, function=allowed.function)
        self.wake()
        return taken

    def find(self, digest: str) -> RelayedRequest | None:
        """A request that was taken, by its digest (0x-hexadecimal)."""
        return self._requests.get(digest)

    def transaction_of(self, request: RelayedRequest) -> str:
        """Hash of the transaction of a request; empty while there is none."""
        if request.tx_hash or not request.batch:
            return request.tx_hash
        entry = self._sender.sent(request.batch)
        return "" if entry is None else entry.mined_hash or entry.latest.tx_hash

    def _known(self, digest: str) -> RelayedRequest | None:
        known = self._requests.get(digest)
        if known is None or known.state is State.DROPPED:
            return None
        self._metrics.add(self._taken, "same")
        return known

    def _check_open(self) -> None:
        if not self._can_pay():
            raise RequestRefusedError(
                "This relay has too little coin for gas now",
                code="relay-out-of-coin",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
                hint="Try again later, use another relay, or send the transaction yourself.",
                retry=_RETRY_SECONDS,
            )

    def _can_pay(self) -> bool:
        """Whether the wallet can pay for the largest request that the rules allow."""
        wallet = self._wallet
        if wallet is None:
            return False
        needed = 2 * wallet.max_fee * (self.rules.max_gas + _BATCH_GAS)
        return wallet.balance >= max(needed, self._settings.min_balance)

    def _check_limits(self, sender: str) -> None:
        rules, since = self.rules, int(time.time()) - HOUR
        for limit, who in ((rules.per_customer, sender), (rules.per_hour, None)):
            if self._requests.count_since(since, who) >= limit:
                whose = "this wallet" if who else "all customers together"
                raise RequestRefusedError(
                    f"This relay takes {limit} requests per hour of {whose}; they are used up",
                    code="too-many-requests",
                    status=HTTPStatus.TOO_MANY_REQUESTS,
                    hint="Try again later, put several jobs into one request, or use another relay.",
                    retry=_RETRY_SECONDS,
                )

    async def _look_up(self, signed: SignedRequest, function: str) -> None:
        """Deadline and inner call against the chain."""
        request, forwarder = signed.request, self.contracts.forwarder
        check_deadline(request, await next_block_time(self.contracts.w3), self.rules)
        call = Call(request.to, request.data, function)
        try:
            await forwarder.simulate(request.sender, call, gas=request.gas)
        except RevertedError as error:
            raise RequestRefusedError(
                error.message,
                code="reverted",
                status=HTTPStatus.UNPROCESSABLE_ENTITY,
                hint=error.hint,
            ) from None

    async def _check_nonce(self, signed: SignedRequest) -> None:
        """The nonce must be the next one after those that wait here."""
        request = signed.request
        due = await self.contracts.forwarder.nonce_of(request.sender)
        pending = sorted(self._requests.pending_of(request.sender), key=_nonce)
        for each in pending:
            due += _nonce(each) == due
        if request.nonce != due:
            raise RequestRefusedError(
                f"The request has nonce {request.nonce}, the next one of {request.sender} is {due}",
                code="nonce",
                status=HTTPStatus.CONFLICT,
                hint="Sign it again with that nonce.",
                next_nonce=due,
            )
        if len(pending) >= self.rules.pending:
            raise RequestRefusedError(
                f"{len(pending)} requests of {request.sender} wait already",
                code="too-many-pending",
                status=HTTPStatus.TOO_MANY_REQUESTS,
                hint="Wait until they are carried out.",
                retry=_RETRY_SECONDS,
            )

    # -- carrying them out

    async def cycle(self) -> bool:
        """Follow the batches that are on their way, and send a new one where requests wait.

        True when more requests wait.
        """
        await self._tend()
        await self.look_at_wallet()
        for batch in self._requests.batches():
            self._follow(batch)
        queued = self._requests.queued()
        if not queued:
            return False
        await asyncio.sleep(self._settings.collect_seconds)
        queued = self._requests.queued()
        chosen = self._choose(queued)
        if not chosen:
            return False
        batch = f"relay:{secrets.token_hex(16)}"
        self._requests.assign([each.number for each in chosen], batch)
        crash_point("relay.assigned")
        self._follow(batch)
        return len(chosen) < len(queued)

    async def close(self) -> None:
        """Stop following; what is on its way is in the outbox and is followed again later."""
        for task in self._batches.values():
            await cancelled(task)
        self._batches.clear()

    async def _tend(self) -> None:
        """Look after the outbox: each cycle while something is on its way, else now and then."""
        now = time.monotonic()
        if self._sender.pending() or now - self._tended >= _LOOK_EVERY:
            await self._sender.tend()
            self._tended = now

    def _choose(self, queued: Sequence[RelayedRequest]) -> list[RelayedRequest]:
        """The first requests that a transaction holds and the wallet can pay for."""
        wallet = self._wallet
        if wallet is None:
            return []
        most = self._settings.batch_gas
        if wallet.max_fee:
            most = min(most, wallet.balance // wallet.max_fee)
        chosen: list[RelayedRequest] = []
        gas = _BATCH_GAS
        for each in queued[: self._settings.batch_size]:
            gas += gas_of(each.signed)
            if gas > most:
                break
            chosen.append(each)
        if not chosen:
            _log.warning("wallet too poor", account=self.address, requests=len(queued))
        return chosen

    def _follow(self, batch: str) -> None:
        task = self._batches.get(batch)
        if task is None or task.done():
            self._batches[batch] = asyncio.create_task(self._carry_out(batch))

    async def _carry_out(self, batch: str) -> None:
        """Send a batch, or wait for what an earlier process sent, and settle its requests."""
        try:
            members = self._requests.in_batch(batch)
            if self._sender.sent(batch) is None:
                members = await self._unexpired(members)
            if members:
                await self._send(batch, members)
        except GridError as error:
            # A later cycle follows it again.
            _log.warning("batch not settled", batch=batch, error=error.message)
            self._wallet = None
            await asyncio.sleep(_PAUSE)
        except Exception as error:  # noqa: BLE001 - a task of its own: nobody else tells of it
            _log.error("batch failed", batch=batch, exc_info=error)
            await asyncio.sleep(_PAUSE)
        else:
            self.wake()

    async def _unexpired(self, members: Sequence[RelayedRequest]) -> list[RelayedRequest]:
        """Drop what can't be carried out any more."""
        now = await next_block_time(self.contracts.w3)
        found = [each for each in members if each.signed.request.deadline >= now]
        for each in members:
            if each not in found:
                self._settle(each, State.DROPPED, detail="it expired before it was sent")
        return found

    async def _send(self, batch: str, members: Sequence[RelayedRequest]) -> None:
        signed = [each.signed for each in members]
        call = self.contracts.forwarder.execute_batch(signed, self.address)
        gas = _BATCH_GAS + sum(gas_of(each) for each in signed)
        try:
            # No estimate: a request whose predecessor is still on its way would be passed over
            # in it. Each inner call was tried when its request was taken.
            receipt = await self._sender.send(
                call, key=batch, gas=gas, simulate=False, timeout=self._settings.send_timeout
            )
        except (RevertedError, TransactionCancelledError) as error:
            _log.warning("batch not carried out", batch=batch, error=error.message)
            await self._put_back(members)
            return
        crash_point("relay.mined")
        await self._settle_all(members, receipt)

    async def _settle_all(self, members: Sequence[RelayedRequest], receipt: TxReceipt) -> None:
        self._size.observe(len(members))
        self._metrics.add(self._gas, amount=receipt.gas_used)
        forwarder = self.contracts.forwarder.address
        carried_out = {
            (event.signer, event.nonce): event.success
            for event in receipt.events
            if isinstance(event, ExecutedForwardRequest) and event.address == forwarder
        }
        passed_over = []
        for each in members:
            success = carried_out.get((each.signed.request.sender, _nonce(each)))
            if success is None:
                passed_over.append(each)
            elif success:
                self._settle(each, State.EXECUTED, tx_hash=receipt.hash)
            else:
                detail = await self._why(each, receipt.block_number)
                self._settle(each, State.FAILED, tx_hash=receipt.hash, detail=detail)
        if passed_over:
            await self._put_back(passed_over)

    async def _put_back(self, members: Sequence[RelayedRequest]) -> None:
        """Queue again what may still be carried out, drop the rest."""
        again = []
        for each in await self._unexpired(members):
            if await self.contracts.forwarder.nonce_of(each.signed.request.sender) > _nonce(each):
                self._settle(each, State.DROPPED, detail="another transaction used its nonce")
            elif each.tries + 1 >= _MAX_TRIES:
                self._settle(each, State.DROPPED, detail="several transactions passed it over")
            else:
                again.append(each.number)
        if again:
            self._requests.requeue(again)

    async def _why(self, request: RelayedRequest, block: int) -> str:
        """Why the contract refused a call: the same call on the state that its block left."""
        inner = request.signed.request
        call = Call(inner.to, inner.data, request.function)
        try:
            await self.contracts.forwarder.simulate(
                inner.sender, call, gas=inner.gas, block_identifier=block
            )
        except RevertedError as error:
            return error.message
        except EndpointError:
            pass
        return "the contract refused the call"

    def _settle(
        self, request: RelayedRequest, state: State, *, tx_hash: str = "", detail: str = ""
    ) -> None:
        self._requests.settle(request.number, state, tx_hash=tx_hash, detail=detail)
        self._metrics.add(self._settled, state.value)
        self._seconds.observe(max(0.0, time.time() - request.received))
        _log.info("request settled", digest=request.digest, state=state.value, transaction=tx_hash)

    async def look_at_wallet(self) -> None:
        """Read balance and gas price now and then; stop taking requests where coin runs out.

        Raises:
            EndpointError: The node does not answer.
        """
        self._waiting.set(
            len(self._requests.queued())
            + sum(len(self._requests.in_batch(batch)) for batch in self._requests.batches())
        )
        now = time.monotonic()
        if self._wallet is not None and now - self._wallet.at < _LOOK_EVERY:
            return
        w3 = self.contracts.w3
        balance, costs = await asyncio.gather(
            w3.eth.get_balance(to_checksum_address(self.address)), market(w3)
        )
        was_open = self._can_pay()
        self._wallet = _Wallet(int(balance), costs.fees.max_fee, now)
        self._balance.set(int(balance) / CREDIT)
        self._open.set(self._can_pay())
        if was_open and not self._can_pay():
            _log.warning(
                "relay stops taking requests",
                account=self.address,
                left=f"{format_credits(int(balance))} coin",
                hint="Send coin to the relay's wallet; it goes on by itself.",
            )


def _nonce(request: RelayedRequest) -> int:
    return request.signed.request.nonce


def _check_signature(signed: SignedRequest, domain: ForwarderDomain) -> None:
    try:
        signed.check_signer(domain)
    except NotAuthorisedError as error:
        raise RequestRefusedError(
            error.message, code="wrong-signer", status=HTTPStatus.FORBIDDEN, hint=error.hint
        ) from None
