"""Gasless transactions: the wallet signs a request, and a relay sends it and pays the gas.

A relay is not trusted. It can drop a request or execute it late, but only as it was signed, once,
and before its deadline. Whether it was executed is read from the customer's own endpoint.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Final

import structlog
from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from web3.exceptions import TransactionNotFound

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.abi import AbiError
from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import Contracts, Permit
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import (
    Event,
    ExecutedForwardRequest,
    JobSubmitted,
    decode_logs,
    event_filter,
)
from deepsquare_chain.chain.bindings.forwarder import ForwardRequest, SignedRequest, forwarded_calls
from deepsquare_chain.chain.rpc.heads import next_block_time
from deepsquare_chain.chain.rpc.log_reader import read_range
from deepsquare_chain.chain.signers import Signer, SigningDomain, sign_and_record
from deepsquare_chain.chain.transactions.outbox import Entry, TxReceipt, hash_of, to_hex
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.client.network import WalletConnection, open_wallet, transport_of
from deepsquare_chain.client.transactions import Preview, describe_call
from deepsquare_chain.credits import credit_count
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    NotFoundError,
    RevertedError,
    StoreError,
    UsageError,
    WaitTimeoutError,
)
from deepsquare_chain.faults import crash_point
from deepsquare_chain.observability.redaction import plain
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.gateway_client import ServiceClient
from deepsquare_chain.store.outbox import RecordedRequest, RequestState, RequestTables

#: HTTP statuses of temporary refusals: a retry may succeed.
_TEMPORARY: Final = frozenset({408, 425, 429, 503})
_OTHER_RELAY_HINT: Final = (
    "Give another relay with --relay, or pay the gas yourself: without --gasless."
)


class RelayRefusedError(EndpointError):
    """The relay refused a request.

    `code` is the relay's code for the reason; `next_nonce` is the nonce that it expects, after a
    nonce conflict. `temporary` is True if a retry of the same request may succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        code: str = "",
        next_nonce: int | None = None,
        temporary: bool = False,
    ) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.next_nonce = next_nonce
        self.temporary = temporary


@dataclass(frozen=True, slots=True)
class RelayTerms:
    """The terms of a relay; amounts in credit-wei, times in seconds."""

    chain_id: int
    forwarder: str
    scheduler: str
    wallet: str
    is_open: bool
    functions: tuple[str, ...]
    min_amount: int
    max_gas: int
    max_lead: int
    per_hour: int
    per_customer: int


@dataclass(frozen=True, slots=True)
class RelayResponse:
    """A relay's response about a request: its `state`; `transaction` may be empty."""

    state: str
    transaction: str
    detail: str


def known_relay(settings: Settings, deployment: Deployment) -> str:
    """Return the URL of the relay of the settings, or of a devnet's record; empty without one."""
    url = settings.relay or deployment.extra.get("relay")
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return ""
    return url.rstrip("/")


def relay_url(settings: Settings, deployment: Deployment) -> str:
    """Return the URL of the relay, as `known_relay`.

    Raises:
        NotFoundError: No relay is set or recorded.
    """
    if url := known_relay(settings, deployment):
        return url
    raise NotFoundError(
        "No relay is configured, and the deployment record has none",
        hint="Give one with --relay or DEEPSQUARE_RELAY; `deepsquare relay serve` runs one.",
    )


class RelayClient(ServiceClient):
    """Client of one relay; an async context manager.

    `transport` replaces the network in tests; `transport_settings` are certificates and headers.

    Raises:
        UsageError: The proxy in the environment is invalid.
    """

    service: ClassVar[str] = "relay"
    advice: ClassVar[str] = _OTHER_RELAY_HINT
    max_response_bytes: ClassVar[int] = 65_536

    async def terms(self) -> RelayTerms:
        """Return the relay's terms.

        Raises:
            EndpointError: The relay does not answer, or its response is invalid.
        """
        body = await self._request("GET", "/v1/relay")
        try:
            return RelayTerms(
                chain_id=int(body["chain_id"]),
                forwarder=str(body["forwarder"]),
                scheduler=str(body["scheduler"]),
                wallet=plain(str(body["wallet"]))[:60],
                is_open=body["open"] is True,
                functions=tuple(plain(str(function))[:60] for function in body["functions"]),
                min_amount=int(body["min_amount"]),
                max_gas=int(body["max_gas"]),
                max_lead=int(body["max_lead_seconds"]),
                per_hour=int(body["requests_per_hour"]),
                per_customer=int(body["requests_per_customer_per_hour"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            raise self._invalid_response() from None

    async def terms_for(self, deployment: Deployment) -> RelayTerms:
        """Return the relay's terms after checking its deployment.

        Raises:
            RelayRefusedError: The relay accepts no requests at the moment.
            EndpointError: The relay serves another grid; other errors as `terms`.
        """
        terms = await self.terms()
        expected = (deployment.chain_id, deployment.forwarder.lower(), deployment.scheduler.lower())
        if (terms.chain_id, terms.forwarder.lower(), terms.scheduler.lower()) != expected:
            raise EndpointError(
                f"The relay at {self.display_url} serves another grid: chain {terms.chain_id}",
                hint="Give a relay of this deployment with --relay.",
            )
        if not terms.is_open:
            raise RelayRefusedError(
                f"The relay at {self.display_url} does not accept requests: it has too little coin",
                hint="Try again later, or give another relay with --relay.",
                code="relay-out-of-coin",
                temporary=True,
            )
        return terms

    async def submit_request(self, signed: SignedRequest, digest: str) -> RelayResponse:
        """Send a request to the relay; idempotent.

        Raises:
            RelayRefusedError: The relay refuses the request.
            EndpointError: The relay does not answer, or its response is invalid. It may have
                received the request.
        """
        return self._parse_response(
            await self._request("POST", "/v1/requests", signed.to_wire()), digest
        )

    async def state(self, digest: str) -> RelayResponse:
        """Return the relay's state of a request; errors as `submit_request`."""
        return self._parse_response(await self._request("GET", f"/v1/requests/{digest}"), digest)

    def _parse_response(self, body: Mapping[str, Any], digest: str) -> RelayResponse:
        if body.get("digest") != digest or not isinstance(body.get("state"), str):
            raise self._invalid_response()
        return RelayResponse(
            plain(body["state"])[:20],
            plain(str(body.get("transaction") or ""))[:66],
            plain(str(body.get("detail") or ""))[:500],
        )

    async def _request(self, method: str, path: str, body: Any = None) -> Mapping[str, Any]:
        response = await self._send(method, path, json=body)
        response_body = response.body()
        if response.is_success and response_body is not None:
            return response_body
        raise self._refused_error(response.status, response_body)

    def _refused_error(self, status: int, body: Mapping[str, Any] | None) -> EndpointError:
        detail = body.get("detail") if body is not None else None
        temporary = status in _TEMPORARY
        is_server_error = status >= HTTPStatus.INTERNAL_SERVER_ERROR and not temporary
        if body is None or not isinstance(detail, str) or is_server_error:
            return self._invalid_response(f"status {status}")
        nonce, hint = body.get("next_nonce"), body.get("hint")
        code = body.get("code")
        return RelayRefusedError(
            f"The relay at {self.display_url} refused: {plain(detail)[:500]}",
            hint=plain(hint)[:300] if isinstance(hint, str) else _OTHER_RELAY_HINT,
            code=code[:40] if isinstance(code, str) else "",
            next_nonce=nonce if type(nonce) is int and nonce >= 0 else None,
            temporary=temporary,
        )


#: Validity of a request and its permit in seconds of chain time.
DEADLINE_SECONDS: Final = 600
#: Seconds between two polls of the relay for the state of a request.
_POLL_SECONDS: Final = 2.0
#: Maximum distance of a relay's next nonce from the nonce on chain.
_MAX_NONCE_DISTANCE: Final = 32
#: Maximum number of signatures of one call after a nonce conflict or a used allowance.
_MAX_SIGNATURES: Final = 5

_log = structlog.get_logger(__name__)

#: Shows a preview of the request before it is signed; returns False to decline.
Confirm = Callable[[Preview], bool]


class NotConfirmedError(GridError):
    """The user declined; nothing was signed."""


class RefusedButExecutedError(GridError):
    """A relay executed a request that it had refused; the new call was not signed."""


class RequestReplacedError(GridError):
    """Another request of the same wallet used the nonce; this request has no effect."""


@dataclass(frozen=True, slots=True)
class PermitPlan:
    """An allowance by permit inside the same request.

    `value` is in credit-wei; `call` builds the call with the signed permit.
    """

    value: int
    call: Callable[[Permit], Call]


async def own_domain(contracts: Contracts) -> SigningDomain:
    """Return the EIP-712 domain of a deployment's forwarder.

    Chain ID and address are taken from the deployment record, not from the endpoint.
    """
    domain = await contracts.forwarder.domain()
    return dataclasses.replace(
        domain, chain_id=contracts.deployment.chain_id, contract=contracts.forwarder.address
    )


class RelayedSender:
    """Sends an account's calls through a relay, with the interface of `Sender`.

    Args:
        contracts: Contracts of the deployment, through the customer's own endpoint.
        account: Signer of the requests.
        store: The wallet's database; each request is recorded before it is sent.
        relay: Relay that pays the gas.
        direct: Sender of the same wallet, for idempotency keys that were used without a relay.
        confirm: Called before each call is signed.
        poll_interval: Seconds between two reads of the chain.
    """

    #: The relay pays the gas.
    pays_gas = False

    def __init__(
        self,
        contracts: Contracts,
        account: Signer,
        store: RequestTables,
        relay: RelayClient,
        *,
        direct: Sender,
        confirm: Confirm,
        poll_interval: float = 0.5,
    ) -> None:
        self.address = to_checksum_address(account.address)
        self._contracts = contracts
        self._account = account
        self._store = store
        self._relay = relay
        self._direct = direct
        self._confirm = confirm
        self._poll = poll_interval
        self._domain: SigningDomain | None = None

    def sent(self, key: str) -> RecordedRequest | Entry | None:
        """Return the request or transaction with this idempotency key that has or may have effect."""
        return self._store.request_by_key(key) or self._direct.sent(key)

    async def send(
        self,
        call: Call,
        *,
        timeout: float = 120.0,
        key: str | None = None,
        permit: PermitPlan | None = None,
    ) -> TxReceipt:
        """Confirm and sign a call, send it to the relay, and wait for its execution.

        Args:
            call: The call; with a permit, the same call without it.
            timeout: Seconds to wait; the request stays recorded afterwards.
            key: Idempotency key: a second send with the same key only waits for the first.
            permit: Permit for the credits of the call.

        Returns:
            The receipt of the transaction, with the events of this call alone and a fee of zero.

        Raises:
            RevertedError: The contract refuses the call, as a typed error of the contract.
            NotConfirmedError: The user declined.
            RelayRefusedError: The relay refuses the request.
            EndpointError: The relay or the endpoint does not answer; nothing was signed.
            WaitTimeoutError: The request was sent and is not executed yet.
            RequestReplacedError: Another request used the nonce.
            RefusedButExecutedError: A relay executed an earlier request that it had refused; nothing was
                signed.
        """
        deadline = time.monotonic() + timeout
        if key is not None:
            recorded = self._store.request_by_key(key)
            if recorded is not None:
                return await self._finish(recorded, deadline)
            if (entry := self._direct.sent(key)) is not None:
                return await self._direct.wait(entry, timeout=timeout)
        terms = await self._relay.terms_for(self._contracts.deployment)
        executed = await self.reconcile()
        if key is not None and (recorded := self._store.request_by_key(key)) is not None:
            return await self._finish(recorded, deadline)  # executed after a refusal
        if executed:
            labels = ", ".join(f"{request.label!r}" for request in executed)
            raise RefusedButExecutedError(
                f"A relay refused {labels} but executed it; nothing new was signed",
                hint="See `deepsquare relay requests` and `deepsquare job list`, and repeat the "
                "command if you want this call as well.",
            )
        return await self._sign_and_finish(call, permit, terms, key, deadline)

    @asynccontextmanager
    async def spending(self, timeout: float) -> AsyncIterator[None]:
        """Hold the wallet's lock for an allowance and the call that uses it; see `Sender.spending`."""
        async with self._direct.spending(timeout):
            yield

    async def reconcile(self) -> list[RecordedRequest]:
        """Reconcile open requests of an earlier process: settle them, or send them again.

        Returns:
            Requests that were executed although a relay had refused them, and that were not
            recorded as executed before.

        Raises:
            EndpointError: The endpoint does not answer.
        """
        for recorded in self._store.open_requests():
            try:
                if await self._find_receipt(recorded) is None:
                    await self._send_to_relay(recorded)
            except RelayRefusedError as error:
                if error.code != "expired" and not error.temporary:
                    self._record_outcome(recorded.digest, RequestState.REFUSED, note=error.message)
            except GridError:
                continue  # settled, or the relay is down: the caller's own request reports it
        # A relay that refused a request still has its signature, and may execute it.
        executed = []
        for recorded in self._store.refused_requests():
            with suppress(GridError):
                if await self._find_receipt(recorded) is not None:
                    executed.append(recorded)
        return executed

    # -- signing

    async def _sign_and_finish(
        self,
        call: Call,
        permit: PermitPlan | None,
        terms: RelayTerms,
        key: str | None,
        until: float,
    ) -> TxReceipt:
        """Confirm once and send; sign again after a nonce conflict or a used allowance."""
        if permit is None:
            await self._contracts.forwarder.simulate(self.address, call)
        lead = min(DEADLINE_SECONDS, terms.max_lead)
        deadline = await next_block_time(self._contracts.w3) + lead
        await self._confirm_with_user(call, permit, terms, deadline)
        floor = 0
        for attempt in range(1, _MAX_SIGNATURES + 1):
            deadline = await next_block_time(self._contracts.w3) + lead
            final_call = call
            if permit is not None:
                scheduler, credit = self._contracts.scheduler.address, self._contracts.credit
                final_call = permit.call(
                    await credit.sign_permit(self._account, scheduler, permit.value, deadline)
                )
            recorded = await self._sign(final_call, deadline, terms, key, floor)
            try:
                return await self._finish(recorded, until)
            except RelayRefusedError as error:
                if error.code != "nonce" or attempt == _MAX_SIGNATURES:
                    raise
                floor = await self._plausible_nonce(error.next_nonce)
            except reverts.ERC20InsufficientAllowance:
                # Another request of this wallet used the permit's nonce or the allowance.
                if permit is None or attempt == _MAX_SIGNATURES:
                    raise
            await asyncio.sleep(self._poll)
        raise AssertionError("the last attempt returns or raises")

    async def _sign(
        self, call: Call, deadline: int, terms: RelayTerms, key: str | None, floor: int
    ) -> RecordedRequest:
        forwarder, w3 = self._contracts.forwarder, self._contracts.w3
        gas, nonce, block, domain = await asyncio.gather(
            forwarder.estimate_gas(self.address, call),
            forwarder.nonce_of(self.address),
            w3.eth.block_number,
            self._own_domain(),
        )
        if gas > terms.max_gas:
            raise UsageError(
                f"{call.label!r} may take {gas:,} gas, this relay pays for at most {terms.max_gas:,}",
                hint="Submit fewer jobs at once with a smaller --array.",
            )

        def sign(free: int) -> tuple[str, SignedRequest]:
            request = ForwardRequest(self.address, call.to, 0, gas, free, deadline, call.data)
            return to_hex(request.digest(domain)), request.sign(self._account, domain)

        recorded = await sign_and_record(
            self._account,
            sign,
            lambda sign_within: self._store.append_request(
                max(nonce, floor), sign_within, label=call.label, block=int(block), key=key
            ),
        )
        crash_point("gasless.recorded")
        return recorded

    async def _own_domain(self) -> SigningDomain:
        if self._domain is None:
            self._domain = await own_domain(self._contracts)
        return self._domain

    async def _plausible_nonce(self, wanted: int | None) -> int:
        """Return the nonce that a relay asks for if it is plausible, else the nonce on chain."""
        nonce = await self._contracts.forwarder.nonce_of(self.address)
        return (
            wanted
            if wanted is not None and nonce <= wanted <= nonce + _MAX_NONCE_DISTANCE
            else nonce
        )

    async def _confirm_with_user(
        self, call: Call, permit: PermitPlan | None, terms: RelayTerms, deadline: int
    ) -> None:
        deadline_text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(deadline))
        rows: list[tuple[str, str]] = [("signed by", self.address)]
        if permit is not None:
            allowance = f"a permit for {credit_count(permit.value)} to the MetaScheduler"
            rows.append(("allowance", f"{allowance}, which this call uses completely"))
        rows += [
            ("valid until", f"{deadline_text} (chain time)"),
            ("gas", f"paid by the relay at {self._relay.display_url}, wallet {terms.wallet}"),
        ]
        preview = Preview(describe_call(call), tuple(rows))
        # In this thread: Ctrl-C would not end a prompt in another one.
        if not self._confirm(preview):
            raise NotConfirmedError("Nothing was signed and nothing was sent")

    # -- waiting for the execution

    async def _finish(self, recorded: RecordedRequest, until: float) -> TxReceipt:
        """Send a request to the relay, retry until it is accepted, and wait for its execution."""
        is_accepted, tries, asked_at, last_message = False, 0, 0.0, ""
        while True:
            try:
                receipt = await self._find_receipt(recorded)
                if receipt is not None:
                    return receipt
                if not is_accepted:
                    tries += 1
                    await self._send_to_relay(recorded)
                    crash_point("gasless.handed")
                    is_accepted = True
                elif time.monotonic() - asked_at >= _POLL_SECONDS:
                    asked_at = time.monotonic()
                    last_message = await self._poll_relay(recorded)
            except RelayRefusedError as error:
                # It may have been executed already, after an earlier attempt.
                if (receipt := await self._find_receipt(recorded)) is not None:
                    return receipt
                if not self._is_refusal(error, handed=is_accepted, unclear=tries > 1):
                    # Send it again if the relay does not have the request.
                    last_message, is_accepted = error.message, is_accepted and error.temporary
                else:
                    self._record_outcome(recorded.digest, RequestState.REFUSED, note=error.message)
                    raise
            except EndpointError as error:
                last_message = error.message  # retry: the relay or the endpoint may recover
            if time.monotonic() > until:
                raise self._late(recorded, last_message)
            await asyncio.sleep(self._poll)

    @staticmethod
    def _is_refusal(error: RelayRefusedError, *, handed: bool, unclear: bool) -> bool:
        """Return whether a refusal is final, so that the relay does not execute the request.

        `handed` tells whether the relay had accepted the request, so that only its state was
        polled; `unclear` whether it may have the request from an earlier attempt.
        """
        if error.code in {"dropped", "expired"}:
            return True
        return not handed and not (unclear and error.temporary)

    def _late(self, recorded: RecordedRequest, last: str) -> WaitTimeoutError:
        request = recorded.signed.request
        deadline = time.strftime("%H:%M:%S UTC", time.gmtime(request.deadline))
        command = (
            "the same command with its --key" if recorded.key else "`deepsquare relay requests`"
        )
        return WaitTimeoutError(
            f"{recorded.label!r} was not executed in time"
            + (f"; {last}" if last else f"; the relay at {self._relay.display_url} has it"),
            hint=f"It is signed and may still be executed until {deadline} (chain time): look "
            f"again with {command} before you sign another.",
        )

    async def _send_to_relay(self, recorded: RecordedRequest) -> None:
        answer = await self._relay.submit_request(recorded.signed, recorded.digest)
        self._refuse_dropped(answer.state, answer.detail)

    async def _poll_relay(self, recorded: RecordedRequest) -> str:
        answer = await self._relay.state(recorded.digest)
        self._refuse_dropped(answer.state, answer.detail)
        if answer.state in {"executed", "failed"}:
            return (
                f"the relay reports that {answer.transaction} executed it, but this endpoint "
                "does not have it"
            )
        return f"the relay reports that it is {answer.state} {answer.transaction}".strip()

    def _refuse_dropped(self, state: str, detail: str) -> None:
        if state == "dropped":
            raise RelayRefusedError(
                f"The relay at {self._relay.display_url} does not execute the request: {detail}",
                hint="Try again.",
                code="dropped",
            )

    async def _find_receipt(self, recorded: RecordedRequest) -> TxReceipt | None:
        """Return the receipt of a request from the chain; None if it was not executed yet.

        Raises:
            RevertedError: The request was executed, and the contract refused its call.
            RequestReplacedError: Another request used its nonce.
            RelayRefusedError: Its deadline has passed.
            EndpointError: The endpoint does not answer.
        """
        w3, request = self._contracts.w3, recorded.signed.request
        if recorded.tx_hash:
            with suppress(TransactionNotFound):
                receipt = await w3.eth.get_transaction_receipt(HexBytes(recorded.tx_hash))
                executed = self._own_event(receipt["logs"], request.nonce)
                if executed is not None:
                    return await self._settle(recorded, executed)
        latest = await w3.eth.get_block("latest")
        head = int(latest["number"])
        nonce = await self._contracts.forwarder.nonce_of(self.address, block=head)
        if nonce > request.nonce:
            return await self._settle(recorded, await self._executed(recorded, head))
        if int(latest["timestamp"]) > request.deadline:
            note = "its deadline passed before it was executed"
            if recorded.state is RequestState.REFUSED:
                note = f"{recorded.note}; {note}"
            self._record_outcome(recorded.digest, RequestState.EXPIRED, note=note)
            raise RelayRefusedError(
                f"{recorded.label!r} has no effect: {note}",
                hint="Nothing was paid. Try again, or use another relay if this one is slow.",
                code="expired",
            )
        return None

    async def _executed(self, recorded: RecordedRequest, head: int) -> ExecutedForwardRequest:
        """Return the event of the transaction that used a request's nonce, up to block `head`.

        Raises:
            EndpointError: The endpoint does not return the event, or does not answer.
        """
        topics = event_filter(ExecutedForwardRequest, signer=self.address)
        forwarder, first_block = self._contracts.forwarder.address, recorded.block
        while first_block <= head:
            log_range = await read_range(
                self._contracts.w3, [forwarder], [topics], first_block, head
            )
            if log_range is None or log_range.after is None:
                break
            event = self._own_event(log_range.logs, recorded.signed.request.nonce)
            if event is not None:
                return event
            first_block = log_range.last + 1
        raise EndpointError(
            f"The nonce of {recorded.label!r} is used, but the endpoint does not show by which "
            "transaction",
            hint="Try again, or give another endpoint.",
        )

    def _own_event(self, logs: Any, nonce: int) -> ExecutedForwardRequest | None:
        executed_events = (
            event for event in decode_logs(logs) if isinstance(event, ExecutedForwardRequest)
        )
        identity = (self._contracts.forwarder.address, self.address, nonce)
        return next(
            (
                event
                for event in executed_events
                if (event.address, event.signer, event.nonce) == identity
            ),
            None,
        )

    async def _settle(self, recorded: RecordedRequest, event: ExecutedForwardRequest) -> TxReceipt:
        w3 = self._contracts.w3
        try:
            receipt = await w3.eth.get_transaction_receipt(HexBytes(event.tx_hash))
            transaction = await w3.eth.get_transaction(HexBytes(event.tx_hash))
        except TransactionNotFound:
            raise EndpointError(f"The endpoint no longer returns {event.tx_hash}") from None
        executed = self._executed_request(recorded, transaction)
        new_state = RequestState.EXECUTED if event.success else RequestState.FAILED
        if executed is None or executed.digest != recorded.digest:
            self._record_outcome(recorded.digest, RequestState.REPLACED, tx_hash=event.tx_hash)
        if executed is not None:
            self._record_outcome(executed.digest, new_state, tx_hash=event.tx_hash)
        if executed is None or executed.call.data != recorded.call.data:
            raise RequestReplacedError(
                f"{recorded.label!r} has no effect: another request of {self.address} used its "
                f"nonce {event.nonce} ({event.tx_hash})",
                hint="See `deepsquare relay requests` and `deepsquare job list`.",
            )
        if not event.success:
            raise await self._revert_reason(recorded, event)
        return TxReceipt(
            hash=hash_of(receipt),
            block_number=int(receipt["blockNumber"]),
            block_hash=to_hex(receipt["blockHash"]),
            gas_used=int(receipt["gasUsed"]),
            fee_wei=0,
            events=self._own_events(decode_logs(receipt["logs"]), event),
            label=recorded.label,
        )

    def _record_outcome(
        self, digest: str, state: RequestState, *, tx_hash: str = "", note: str = ""
    ) -> None:
        """Record the outcome of a request; if that fails, it is read from the chain next time."""
        try:
            self._store.settle_request(digest, state, tx_hash=tx_hash, note=note)
        except StoreError as error:
            _log.warning("request not recorded", request=digest, error=error.message)

    def _executed_request(
        self, recorded: RecordedRequest, transaction: Any
    ) -> RecordedRequest | None:
        """Return the recorded request that a transaction executed; None for an unknown request."""
        candidates = [
            recorded,
            *(
                candidate
                for candidate in self._store.requests_with_nonce(recorded.signed.request.nonce)
                if candidate.digest != recorded.digest
            ),
        ]
        try:
            calls = forwarded_calls(bytes(transaction["input"]))
        except AbiError:
            # Called through another contract: only this wallet can sign for this nonce.
            return recorded if len({candidate.call.data for candidate in candidates}) == 1 else None
        ours = {
            (candidate.to, candidate.gas, candidate.deadline, candidate.data)
            for candidate in calls
            if candidate.sender == self.address
        }
        for candidate in candidates:
            request = candidate.signed.request
            if (request.to, request.gas, request.deadline, request.data) in ours:
                return candidate
        return None

    def _own_events(self, events: list[Event], own: ExecutedForwardRequest) -> tuple[Event, ...]:
        """Return the events of the inner call: those after the previous request of the batch."""
        own_events: list[Event] = []
        addresses = self._contracts.addresses
        for event in events:
            if event.log_index == own.log_index:
                break
            if isinstance(event, ExecutedForwardRequest) and event.address == own.address:
                own_events = []
            elif event.address in addresses:
                own_events.append(event)
        return tuple(
            event
            for event in own_events
            if not isinstance(event, JobSubmitted) or event.customer == self.address
        )

    async def _revert_reason(
        self, recorded: RecordedRequest, event: ExecutedForwardRequest
    ) -> RevertedError:
        """Return the revert reason of a call by simulating it on the state after its block."""
        try:
            await self._contracts.forwarder.simulate(
                self.address, recorded.call, block=event.block_number
            )
        except RevertedError as error:
            return error
        except EndpointError:
            pass
        return RevertedError(
            f"{recorded.label!r} was rejected by the contract ({event.tx_hash})",
            hint="The state may have changed meanwhile; check it and try again.",
        )


@dataclass(frozen=True, slots=True)
class GaslessWallet:
    """A wallet that sends through a relay; fields as in `client.network.WalletConnection`."""

    contracts: Contracts
    account: Signer
    sender: RelayedSender
    store: RequestTables
    timeout: float

    @property
    def address(self) -> str:
        """Return the address of the account."""
        return self.account.address

    async def send(self, call: Call, *, permit: PermitPlan | None = None) -> TxReceipt:
        """Send a call and wait for its execution; errors as `RelayedSender.send`."""
        return await self.sender.send(call, timeout=self.timeout, permit=permit)


@asynccontextmanager
async def open_gasless(settings: Settings, confirm: Confirm) -> AsyncIterator[GaslessWallet]:
    """Open the wallet of the settings with the relay of the settings or the deployment record.

    Raises:
        NotFoundError: No relay is set; other errors as `open_wallet`.
    """
    async with open_wallet(settings) as wallet:
        url = relay_url(settings, wallet.contracts.deployment)
        async with RelayClient(url, transport_of(settings)) as relay:
            yield gasless_wallet(
                wallet, relay, confirm, poll_interval=min(0.5, settings.poll_interval)
            )


def gasless_wallet(
    wallet: WalletConnection, relay: RelayClient, confirm: Confirm, *, poll_interval: float = 0.5
) -> GaslessWallet:
    """Return the same wallet, with a sender through a relay."""
    sender = RelayedSender(
        wallet.contracts,
        wallet.account,
        wallet.store,
        relay,
        direct=wallet.sender,
        confirm=confirm,
        poll_interval=poll_interval,
    )
    return GaslessWallet(wallet.contracts, wallet.account, sender, wallet.store, wallet.timeout)
