"""The relay: accepts signed requests, and executes them in batches from its own wallet.

Also its HTTP API, and its daemon.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from eth_utils.address import to_checksum_address
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import ExecutedForwardRequest
from deepsquare_chain.chain.bindings.forwarder import SignedRequest
from deepsquare_chain.chain.rpc.heads import next_block_time
from deepsquare_chain.chain.signers import Signer, SigningDomain
from deepsquare_chain.chain.transactions.fees import market
from deepsquare_chain.chain.transactions.sender import Sender, TransactionCancelledError, TxReceipt
from deepsquare_chain.credits import CREDIT, format_credits
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.loop import cancelled
from deepsquare_chain.daemon.service import (
    ServiceSettings,
    open_contracts,
    open_daemon,
    open_sender,
    open_store,
    serve,
)
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    NotAuthorisedError,
    RevertedError,
    UsageError,
)
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import HOUR
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Health, Metrics
from deepsquare_chain.observability.serving import (
    DeferredApp,
    LoopbackServer,
    RequestRefusedError,
    failure_response,
    forbidden,
    json_body,
    probe_routes,
    problem,
    read_body,
    sends_json,
    too_large,
)
from deepsquare_chain.relay.requests import (
    FUNCTIONS,
    PENDING,
    RelayedRequest,
    RelayRules,
    Requests,
    State,
    check,
    check_deadline,
    gas_of,
)
from deepsquare_chain.store.database import Store

#: Gas of a batch before its first request.
_BATCH_GAS: Final = 60_000
#: Batches that may skip a request before it is dropped.
_MAX_TRIES: Final = 3
#: Requests that are checked against the chain concurrently.
_LOOKUPS: Final = 8
#: Seconds between two polls of the outbox, and of the wallet and the gas price.
_POLL_SECONDS: Final = 15.0
_RETRY_SECONDS: Final = 30
#: Backoff in seconds after a batch could not be settled.
_PAUSE: Final = 2.0
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RelaySettings(ServiceSettings):
    """Settings of a relay."""

    rules: RelayRules = field(default_factory=RelayRules)  # rules for requests
    collect_seconds: float = 0.3  # seconds to wait for more requests before a batch is sent
    batch_gas: int = 10_000_000  # maximum gas of one transaction
    min_balance: int = 0  # balance in wei below which the relay refuses requests


@dataclass(frozen=True, slots=True)
class _Wallet:
    """The relay's balance and gas price (`max_fee`) in wei; `at` is monotonic, in seconds."""

    balance: int
    max_fee: int
    at: float


class RelayService:
    """One relay of one deployment; a daemon calls `cycle`, the HTTP API calls `accept`."""

    def __init__(
        self,
        contracts: Contracts,
        sender: Sender,
        store: Store,
        *,
        domain: SigningDomain,
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
        self._reconciled_at = -math.inf
        self._batches: dict[str, asyncio.Task[None]] = {}
        self._accepting = asyncio.Lock()
        self._lookups = asyncio.Semaphore(_LOOKUPS)
        #: Called to start the next cycle before it is due.
        self.wake: Callable[[], None] = lambda: None
        self._metrics = metrics
        self._responses = metrics.counter(
            "relay_requests", "Requests by response.", answer=("taken", "same", "refused")
        )
        self._settled = metrics.counter(
            "relay_settled",
            "Requests by result.",
            end=(State.EXECUTED.value, State.FAILED.value, State.DROPPED.value),
        )
        self._gas = metrics.counter("relay_gas", "Gas of the relay's transactions.")
        self._size = metrics.histogram(
            "relay_batch_requests", "Requests per transaction.", (1, 2, 5, 10, 20, 50, 100)
        )
        self._seconds = metrics.histogram(
            "relay_seconds", "Seconds from accepting a request to the receipt of its transaction."
        )
        self._waiting = metrics.gauge(
            "relay_pending_requests", "Requests that are not executed yet."
        )
        self._open = metrics.gauge("relay_open", "Whether the wallet can pay for requests.")
        self._balance = metrics.gauge("gas_balance_coins", "Balance of the chain's coin, for gas.")

    def terms(self) -> dict[str, Any]:
        """Return the terms of this relay, as in `GET /v1/relay`; amounts are strings."""
        rules = self.rules
        return {
            "chain_id": self._domain.chain_id,
            "forwarder": self.contracts.forwarder.address,
            "scheduler": self.contracts.scheduler.address,
            "wallet": self.address,
            "open": self._can_pay_largest(),
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

    # -- accepting requests

    async def accept(self, signed: SignedRequest) -> RelayedRequest:
        """Accept a request. Idempotent: a repeated one returns the record of the first.

        Raises:
            RequestRefusedError: The request is refused; nothing is recorded.
            EndpointError: The node does not answer.
        """
        try:
            return await self._accept(signed)
        except GridError:
            self._metrics.add(self._responses, "refused")
            raise

    async def _accept(self, signed: SignedRequest) -> RelayedRequest:
        digest = "0x" + signed.request.digest(self._domain).hex()
        _check_signature(signed, self._domain)
        if (existing := self._find_known(digest)) is not None:
            return existing
        allowed = check(signed, self.contracts.scheduler.address, self.rules)
        self._check_open()
        self._check_limits(signed.request.sender)
        try:
            async with self._lookups:
                await self._look_up(signed, allowed.function)
        except RequestRefusedError:
            # The same request, sent twice concurrently, may have been executed in the meantime.
            if (existing := self._find_known(digest)) is not None:
                return existing
            raise
        async with self._accepting:
            if (existing := self._find_known(digest)) is not None:
                return existing
            await self._check_nonce(signed)
            record = self._requests.add(digest, signed, allowed.function)
        crash_point("relay.taken")
        self._metrics.add(self._responses, "taken")
        _log.info("request accepted", digest=digest, function=allowed.function)
        self.wake()
        return record

    def find(self, digest: str) -> RelayedRequest | None:
        """Return an accepted request by its digest (0x-hexadecimal), or None."""
        return self._requests.get(digest)

    def transaction_of(self, request: RelayedRequest) -> str:
        """Return the transaction hash of a request; empty while there is none."""
        if request.tx_hash or not request.batch:
            return request.tx_hash
        entry = self._sender.sent(request.batch)
        return "" if entry is None else entry.mined_hash or entry.latest.tx_hash

    def _find_known(self, digest: str) -> RelayedRequest | None:
        existing = self._requests.get(digest)
        if existing is None or existing.state is State.DROPPED:
            return None
        self._metrics.add(self._responses, "same")
        return existing

    def _check_open(self) -> None:
        if not self._can_pay_largest():
            raise RequestRefusedError(
                "This relay has too little coin for gas",
                code="relay-out-of-coin",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
                hint="Try again later, use another relay, or send the transaction yourself.",
                retry=_RETRY_SECONDS,
            )

    def _can_pay_largest(self) -> bool:
        """Whether the wallet can pay for the largest request that the rules allow."""
        wallet = self._wallet
        if wallet is None:
            return False
        needed = 2 * wallet.max_fee * (self.rules.max_gas + _BATCH_GAS)
        return wallet.balance >= max(needed, self._settings.min_balance)

    def _check_limits(self, sender: str) -> None:
        rules, since = self.rules, int(time.time()) - HOUR
        for limit, customer in ((rules.per_customer, sender), (rules.per_hour, None)):
            if self._requests.count_since(since, customer) >= limit:
                whose = "this wallet" if customer else "all customers together"
                raise RequestRefusedError(
                    f"This relay accepts {limit} requests per hour of {whose}; the limit is reached",
                    code="too-many-requests",
                    status=HTTPStatus.TOO_MANY_REQUESTS,
                    hint="Try again later, put several jobs into one request, or use another relay.",
                    retry=_RETRY_SECONDS,
                )

    async def _look_up(self, signed: SignedRequest, function: str) -> None:
        """Check the deadline against chain time, and simulate the inner call.

        Raises:
            RequestRefusedError: The deadline is out of range, or the call reverts.
        """
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
        """Check that the nonce follows the customer's pending requests, and limit their number."""
        request = signed.request
        due = await self.contracts.forwarder.nonce_of(request.sender)
        pending = sorted(self._requests.pending_of(request.sender), key=_nonce)
        for record in pending:
            due += _nonce(record) == due
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
                f"{len(pending)} requests of {request.sender} are already pending",
                code="too-many-pending",
                status=HTTPStatus.TOO_MANY_REQUESTS,
                hint="Wait until they are executed.",
                retry=_RETRY_SECONDS,
            )

    # -- executing requests

    async def cycle(self) -> bool:
        """Follow the pending batches, and send a new one if requests are queued.

        Returns:
            Whether more requests are queued.
        """
        await self._reconcile()
        await self.poll_wallet()
        for batch in self._requests.batches():
            self._follow(batch)
        queued = self._requests.queued()
        if not queued:
            return False
        await asyncio.sleep(self._settings.collect_seconds)
        queued = self._requests.queued()
        chosen = self._select_for_batch(queued)
        if not chosen:
            return False
        batch = f"relay:{secrets.token_hex(16)}"
        self._requests.assign([record.number for record in chosen], batch)
        crash_point("relay.assigned")
        self._follow(batch)
        return len(chosen) < len(queued)

    async def close(self) -> None:
        """Stop following batches; the outbox keeps them, and they are followed after a restart."""
        for task in self._batches.values():
            await cancelled(task)
        self._batches.clear()

    async def _reconcile(self) -> None:
        """Reconcile the outbox: in each cycle with pending transactions, else every 15 seconds."""
        now = time.monotonic()
        if self._sender.pending() or now - self._reconciled_at >= _POLL_SECONDS:
            await self._sender.reconcile()
            self._reconciled_at = now

    def _select_for_batch(self, queued: Sequence[RelayedRequest]) -> list[RelayedRequest]:
        """Select the first queued requests that fit one transaction and the wallet's balance."""
        wallet = self._wallet
        if wallet is None:
            return []
        max_gas = self._settings.batch_gas
        if wallet.max_fee:
            max_gas = min(max_gas, wallet.balance // wallet.max_fee)
        chosen: list[RelayedRequest] = []
        gas = _BATCH_GAS
        for record in queued[: self._settings.batch_size]:
            gas += gas_of(record.signed)
            if gas > max_gas:
                break
            chosen.append(record)
        if not chosen:
            _log.warning("wallet balance too low", account=self.address, requests=len(queued))
        return chosen

    def _follow(self, batch: str) -> None:
        task = self._batches.get(batch)
        if task is None or task.done():
            self._batches[batch] = asyncio.create_task(self._execute_batch(batch))

    async def _execute_batch(self, batch: str) -> None:
        """Send a batch, or wait for an earlier process's transaction, and settle its requests."""
        try:
            members = self._requests.in_batch(batch)
            if self._sender.sent(batch) is None:
                members = await self._drop_expired(members)
            if members:
                await self._send(batch, members)
        except GridError as error:
            # A later cycle retries.
            _log.warning("batch not settled", batch=batch, error=error.message)
            self._wallet = None
            await asyncio.sleep(_PAUSE)
        except Exception as error:  # noqa: BLE001 - a background task: nothing else reports it
            _log.error("batch failed", batch=batch, exc_info=error)
            await asyncio.sleep(_PAUSE)
        else:
            self.wake()

    async def _drop_expired(self, members: Sequence[RelayedRequest]) -> list[RelayedRequest]:
        """Drop expired requests, and return the others."""
        now = await next_block_time(self.contracts.w3)
        unexpired = [member for member in members if member.signed.request.deadline >= now]
        for member in members:
            if member not in unexpired:
                self._settle(member, State.DROPPED, detail="it expired before it was sent")
        return unexpired

    async def _send(self, batch: str, members: Sequence[RelayedRequest]) -> None:
        signed = [member.signed for member in members]
        call = self.contracts.forwarder.execute_batch(signed, self.address)
        gas = _BATCH_GAS + sum(gas_of(member) for member in signed)
        try:
            # No simulation: it would skip requests whose predecessors are still in the mempool.
            # Each inner call was simulated when its request was accepted.
            receipt = await self._sender.send(
                call, key=batch, gas=gas, simulate=False, timeout=self._settings.send_timeout
            )
        except (RevertedError, TransactionCancelledError) as error:
            _log.warning("batch not executed", batch=batch, error=error.message)
            await self._requeue_or_drop(members)
            return
        crash_point("relay.mined")
        await self._settle_all(members, receipt)

    async def _settle_all(self, members: Sequence[RelayedRequest], receipt: TxReceipt) -> None:
        self._size.observe(len(members))
        self._metrics.add(self._gas, amount=receipt.gas_used)
        forwarder = self.contracts.forwarder.address
        success_by_nonce = {
            (event.signer, event.nonce): event.success
            for event in receipt.events
            if isinstance(event, ExecutedForwardRequest) and event.address == forwarder
        }
        skipped = []
        for member in members:
            success = success_by_nonce.get((member.signed.request.sender, _nonce(member)))
            if success is None:
                skipped.append(member)
            elif success:
                self._settle(member, State.EXECUTED, tx_hash=receipt.hash)
            else:
                detail = await self._revert_reason(member, receipt.block_number)
                self._settle(member, State.FAILED, tx_hash=receipt.hash, detail=detail)
        if skipped:
            await self._requeue_or_drop(skipped)

    async def _requeue_or_drop(self, members: Sequence[RelayedRequest]) -> None:
        """Requeue the requests that may still be executed, and drop the others."""
        numbers = []
        for entry in await self._drop_expired(members):
            if await self.contracts.forwarder.nonce_of(entry.signed.request.sender) > _nonce(entry):
                self._settle(entry, State.DROPPED, detail="another transaction used its nonce")
            elif entry.tries + 1 >= _MAX_TRIES:
                self._settle(entry, State.DROPPED, detail="several transactions skipped it")
            else:
                numbers.append(entry.number)
        if numbers:
            self._requests.requeue(numbers)

    async def _revert_reason(self, request: RelayedRequest, block: int) -> str:
        """Return why the contract reverted a call: simulate it on the state after its block."""
        inner = request.signed.request
        call = Call(inner.to, inner.data, request.function)
        try:
            await self.contracts.forwarder.simulate(inner.sender, call, gas=inner.gas, block=block)
        except RevertedError as error:
            return error.message
        except EndpointError:
            pass
        return "the contract rejected the call"

    def _settle(
        self, request: RelayedRequest, state: State, *, tx_hash: str = "", detail: str = ""
    ) -> None:
        self._requests.settle(request.number, state, tx_hash=tx_hash, detail=detail)
        self._metrics.add(self._settled, state.value)
        self._seconds.observe(max(0.0, time.time() - request.received))
        _log.info("request settled", digest=request.digest, state=state.value, transaction=tx_hash)

    async def poll_wallet(self) -> None:
        """Poll balance and gas price every 15 seconds; refuse requests if the balance is too low.

        Raises:
            EndpointError: The node does not answer.
        """
        self._waiting.set(
            len(self._requests.queued())
            + sum(len(self._requests.in_batch(batch)) for batch in self._requests.batches())
        )
        now = time.monotonic()
        if self._wallet is not None and now - self._wallet.at < _POLL_SECONDS:
            return
        w3 = self.contracts.w3
        balance, costs = await asyncio.gather(
            w3.eth.get_balance(to_checksum_address(self.address)), market(w3)
        )
        was_open = self._can_pay_largest()
        self._wallet = _Wallet(int(balance), costs.fees.max_fee, now)
        self._balance.set(int(balance) / CREDIT)
        self._open.set(self._can_pay_largest())
        if was_open and not self._can_pay_largest():
            _log.warning(
                "relay stopped accepting requests",
                account=self.address,
                left=f"{format_credits(int(balance))} coin",
                hint="Send coin to the relay's wallet; it then continues automatically.",
            )


def _nonce(request: RelayedRequest) -> int:
    return request.signed.request.nonce


def _check_signature(signed: SignedRequest, domain: SigningDomain) -> None:
    try:
        signed.check_signer(domain)
    except NotAuthorisedError as error:
        raise forbidden(error.message, code="wrong-signer", hint=error.hint) from None


# -- the HTTP API of the relay
#
# `GET /v1/relay` returns its terms, `POST /v1/requests` submits a signed request, and
# `GET /v1/requests/DIGEST` returns the state of one. Submission is idempotent: a repeated request
# returns the state of the first. Errors are problem details (RFC 9457) with a `code` for programs.
# `/live` and `/ready` return 200 or 503.

Endpoint = Callable[[Request], Awaitable[Response]]


#: Paths of the API.
PATHS: Final = ("/v1/relay", "/v1/requests", "/v1/requests/{digest}")


def relay_app(relay: RelayService, probe: Callable[[], Health]) -> Starlette:
    """Build the HTTP application of a relay."""

    async def terms(_: Request) -> Response:
        return JSONResponse(relay.terms())

    async def take(request: Request) -> Response:
        relayed = await relay.accept(await _read(request, relay.rules.max_bytes))
        status = HTTPStatus.ACCEPTED if relayed.state in PENDING else HTTPStatus.OK
        headers = {"Location": f"/v1/requests/{relayed.digest}"}
        return JSONResponse(_wire(relay, relayed), status, headers=headers)

    async def find(request: Request) -> Response:
        relayed = relay.find(request.path_params["digest"])
        if relayed is None:
            return problem(HTTPStatus.NOT_FOUND, "This relay has not accepted this request")
        return JSONResponse(_wire(relay, relayed))

    return Starlette(
        routes=[
            Route(PATHS[0], guarded(terms)),
            Route(PATHS[1], guarded(take), methods=["POST"]),
            Route(PATHS[2], guarded(find)),
            *probe_routes(probe),
        ],
        exception_handlers={HTTPException: _http_problem},
    )


def guarded(endpoint: Endpoint) -> Endpoint:
    """Wrap an endpoint to return errors as problem details, never tracebacks."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:  # noqa: BLE001 - clients must not see internal errors
            return failure_response(error, "relay", request.url.path)

    return answer


async def _read(request: Request, limit: int) -> SignedRequest:
    if not sends_json(request):
        raise UsageError("Requests must be sent as application/json")
    body = await read_body(request, limit)
    if body is None:
        raise too_large(limit, "Split it into several requests.")
    return SignedRequest.from_wire(json_body(body))


def _wire(relay: RelayService, request: RelayedRequest) -> dict[str, Any]:
    return {
        "digest": request.digest,
        "state": request.state.value,
        "function": request.function,
        "transaction": relay.transaction_of(request) or None,
        "detail": request.detail or None,
    }


async def _http_problem(request: Request, error: Exception) -> Response:
    return failure_response(error, "relay", request.url.path)


NAME: Final = "relay"


async def run_relay(
    url: str,
    deployment: Deployment,
    account: Signer,
    settings: RelaySettings,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None] = lambda _: None,
    stop: asyncio.Event | None = None,
    served_by: DeferredApp | None = None,
) -> None:
    """Run a relay until SIGINT, SIGTERM or `stop`.

    Args:
        account: The relay's own wallet, which pays the gas.
        ready: Called with the relay's URL when it accepts requests.
        served_by: Serves the application instead of an own server. Host and port are then unused,
            and `ready` gets an empty string.

    Raises:
        UsageError: The deployment has no forwarder, the address can't be used, or the database is
            in use or belongs to another account or grid.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. If an
            endpoint is down, the relay waits for it.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        trusted = (await contracts.scheduler.parameters()).forwarder
        if int(trusted, 16) == 0 or trusted != contracts.forwarder.address:
            raise UsageError(
                f"The MetaScheduler at {contracts.scheduler.address} accepts no calls through the "
                f"forwarder {contracts.forwarder.address} of the deployment record",
                hint="Give the record of a deployment whose contracts trust its forwarder.",
            )
        store = parts.enter_context(await open_store(NAME, contracts, account.address, settings))
        sender = await open_sender(
            parts, contracts, account, store=store, settings=settings, metrics=metrics
        )
        service = RelayService(
            contracts,
            sender,
            store,
            domain=await contracts.forwarder.domain(),
            settings=settings,
            metrics=metrics,
        )
        parts.push_async_callback(service.close)
        daemon = await open_daemon(
            NAME, service.cycle, settings, chain_id=deployment.chain_id, metrics=metrics, stop=stop
        )
        service.wake = daemon.wake
        await service.poll_wallet()
        app = relay_app(service, daemon.health)
        if served_by is not None:
            served_by.app = app
            parts.callback(setattr, served_by, "app", None)
            ready("")
            return daemon
        server = LoopbackServer(app, port, host, metrics)
        await server.start()
        parts.push_async_callback(server.stop)
        ready(server.url)
        return daemon

    await serve(NAME, open_once, stop)
