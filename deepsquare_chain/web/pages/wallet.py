"""Pages and JSON endpoints for wallets: the job form, and plans of calls to sign."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from hexbytes import HexBytes
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from web3.exceptions import ContractLogicError, Web3RPCError

from deepsquare_chain.chain.bindings.calls import Call, checked_address
from deepsquare_chain.chain.bindings.contracts import Permit
from deepsquare_chain.chain.bindings.events import JobSubmitted, decode_logs
from deepsquare_chain.chain.bindings.forwarder import ForwardRequest, SignedRequest
from deepsquare_chain.chain.bindings.reverts import decode_revert
from deepsquare_chain.chain.rpc.heads import next_block_time
from deepsquare_chain.chain.rpc.responses import node_message
from deepsquare_chain.client.gasless import DEADLINE_SECONDS, RelayClient, own_domain
from deepsquare_chain.client.offers import PricedOffer
from deepsquare_chain.client.submission import parse_depends, request_of, submission_time
from deepsquare_chain.credits import credit_count, format_credits, parse_credits
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    InsufficientFundsError,
    JobFileError,
    NotFoundError,
    UsageError,
)
from deepsquare_chain.indexer.schema import MAX_INT
from deepsquare_chain.job import Job, JobFlags, JobStatus, Terms
from deepsquare_chain.observability.serving import RateLimit, json_body, read_body
from deepsquare_chain.web.formats import count, duration, plain_amount, size_of, visible
from deepsquare_chain.web.lookup import read_transaction
from deepsquare_chain.web.security import is_same_origin
from deepsquare_chain.web.site import PageRequest, Site, site_of
from deepsquare_chain.workflow import JobFile, parse_job_file
from deepsquare_chain.workflow.jobfile import dump
from deepsquare_chain.workflow.schema import job_file_schema

#: Validity of a permit in seconds: enough time for a person to read and sign it.
PERMIT_SECONDS: Final = 900
#: Upper bounds of gas, to check the wallet's balance beforehand; wallets make their own estimates.
_GAS: Final = {"submit": 250_000, "topup": 150_000, "cancel": 150_000}
_GAS_APPROVE: Final = 60_000
_SIGNATURE: Final = re.compile(r"0x[0-9a-fA-F]{130}")


@dataclass(frozen=True, slots=True)
class CallPlan:
    """The effects of a call in words, and the next thing for the wallet to sign.

    Exactly one of the last four is set: the call itself, the approval or permit (EIP-712) that must
    come first, or the request for a relay (EIP-712). They have their JSON form.
    """

    title: str
    action: str
    effects: tuple[str, ...]
    call: Mapping[str, Any] | None = None
    approval: Mapping[str, Any] | None = None
    permit: Mapping[str, Any] | None = None
    request: Mapping[str, Any] | None = None

    @property
    def is_payable(self) -> bool:
        """Whether only the wallet's final signature is missing: no approval or permit."""
        return self.call is not None or self.request is not None


def call_json(call: Call, chain_id: int) -> dict[str, str]:
    """Return the JSON form of a call; numbers that a browser could round are strings."""
    return {
        "to": call.to,
        "data": "0x" + call.data.hex(),
        "value": str(call.value),
        "chainId": hex(chain_id),
        "label": call.label,
    }


def _typed_data_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON form of EIP-712 data; numbers of the message are strings, as in calls."""
    message = {
        key: "0x" + value.hex() if isinstance(value, bytes) else str(value)
        for key, value in data["message"].items()
    }
    return {**data, "message": message}


@dataclass(frozen=True, slots=True)
class Payer:
    """An account that pays, amounts in credit-wei; `relayed` if a relay pays its gas."""

    account: str
    balance: int
    allowance: int
    relayed: bool


class CallPlanner:
    """Plans the call that the body of a POST request asks for.

    Its plans raise UsageError if a member of the body is invalid, InsufficientFundsError if the
    account has too few credits or no coin for gas, and RevertedError if the contract would revert.

    Args:
        site: The grid, and its relay, which pays the gas on request or if there is no coin.
        payload: Body of the request: the `account` that pays and signs, the `payment` (permit,
            approve or relay), and the signed `permit`, if any.
    """

    def __init__(self, site: Site, payload: Mapping[str, Any]) -> None:
        self._contracts = site.contracts
        self._chain_id = site.contracts.deployment.chain_id
        self._relay = site.relay
        self._payload = payload

    async def submit(
        self, terms: Terms, definition: bytes, offers: Sequence[PricedOffer]
    ) -> CallPlan:
        """Plan the submission of one job; `definition` is the SHA-256 of its definition."""
        scheduler = self._contracts.scheduler
        payer = await self._payer("submit", terms.amount)
        rows = [(terms, [definition])]
        effects = (
            _escrow_effect(payer, terms.amount),
            f"One job, {size_of(terms.resources)}, {runtime(terms)}.",
            *_flag_effects(terms),
            offers_in_words(offers),
            "Unused credits are refunded in the transaction that ends it.",
        )
        permit = self._permit(terms.amount)
        if permit is None:
            call = scheduler.submit_jobs(rows)
        else:
            call = scheduler.submit_jobs_with_permit(rows, permit)
        plan = CallPlan(f"Submit {terms.name or 'a job'}", "Submit", effects)
        return await self._next_step(plan, call, payer, terms.amount, permit)

    async def top_up(self) -> CallPlan:
        """Plan a top-up of a live job. Raises NotFoundError if there is no such job."""
        job_id, amount = self._job_id(), _amount(self._payload.get("credits"))
        scheduler = self._contracts.scheduler
        job = await scheduler.get_job(job_id)
        payer = await self._payer("topup", amount)
        effects = (
            _escrow_effect(payer, amount),
            f"The escrow of job {job_id} grows to {credit_count(job.escrow + amount)}.",
            _runtime_gain(job, amount, own=payer.account == job.customer),
            "Unused credits are refunded to the customer, also if another account paid.",
        )
        permit = self._permit(amount)
        if permit is None:
            call = scheduler.top_up(job_id, job.customer, amount)
        else:
            call = scheduler.top_up_with_permit(job_id, job.customer, amount, permit)
        plan = CallPlan(f"Top up job {job_id}", "Top up", effects)
        return await self._next_step(plan, call, payer, amount, permit)

    async def cancel(self) -> CallPlan:
        """Plan the cancellation of the account's own job. Raises the errors of `top_up`."""
        job_id = self._job_id()
        job = await self._contracts.scheduler.get_job(job_id)
        payer = await self._payer("cancel", 0)
        effects = (f"Job {job_id} ends as CANCELLED; that can't be undone.", _refund_effect(job))
        plan = CallPlan(f"Cancel job {job_id}", "Cancel the job", effects)
        return await self._next_step(plan, self._contracts.scheduler.cancel([job_id]), payer)

    async def _next_step(
        self,
        plan: CallPlan,
        call: Call,
        payer: Payer,
        amount: int = 0,
        permit: Permit | None = None,
    ) -> CallPlan:
        """Return the plan with the next thing to sign, and its effects."""
        effects, credits = plan.effects, credit_count(amount)
        if payer.relayed:
            effects += ("A relay pays the gas: your wallet signs a request and needs no coin.",)
        if permit is not None or payer.allowance >= amount:
            if payer.relayed:
                request = await self._request(payer.account, call)
                return replace(plan, effects=effects, request=request)
            await self._simulate(payer.account, call)
            return replace(plan, effects=effects, call=call_json(call, self._chain_id))
        if self._payload.get("payment") == "approve" and not payer.relayed:
            effects += (f"First an approval of exactly {credits}, then the call.",)
            approval = self._contracts.credit.approve(self._contracts.scheduler.address, amount)
            return replace(plan, effects=effects, approval=call_json(approval, self._chain_id))
        permit_step = (
            f"First your signature under a permit of exactly {credits}, good for "
            f"{PERMIT_SECONDS // 60} minutes; it costs nothing."
        )
        data = await self._permit_data(payer.account, amount)
        return replace(plan, effects=(*effects, permit_step), permit=data)

    def _job_id(self) -> int:
        job_id = self._payload.get("job")
        if type(job_id) is not int or not 0 < job_id <= MAX_INT:
            raise UsageError("A job is given by its number")
        return job_id

    def _permit(self, amount: int) -> Permit | None:
        """Return the permit that the wallet signed; None if there is none."""
        body = self._payload.get("permit")
        if not body:
            return None
        raw = signature_of(body.get("signature") if isinstance(body, Mapping) else "")
        try:
            value, deadline = int(str(body.get("value"))), int(str(body.get("deadline")))
        except ValueError:
            raise UsageError("The permit's value and deadline must be numbers") from None
        if value != amount or not 0 <= deadline < 2**64:
            raise UsageError(
                "The permit was signed for another amount or contract", hint="Start again."
            )
        return Permit(value, deadline, raw[64], raw[:32], raw[32:64])

    async def _permit_data(self, account: str, amount: int) -> dict[str, Any]:
        deadline = await next_block_time(self._contracts.w3) + PERMIT_SECONDS
        credit, spender = self._contracts.credit, self._contracts.scheduler.address
        return _typed_data_json(await credit.permit_data(account, spender, amount, deadline))

    async def _request(self, account: str, call: Call) -> dict[str, Any]:
        """Return the typed data that the wallet signs for the relay.

        Raises UsageError if the call takes more gas than the relay pays.
        """
        forwarder = self._contracts.forwarder
        async with RelayClient(self._relay) as relay:
            terms = await relay.terms_for(self._contracts.deployment)
        gas, nonce, now, domain = await asyncio.gather(
            forwarder.estimate_gas(account, call),
            forwarder.nonce_of(account),
            next_block_time(self._contracts.w3),
            own_domain(self._contracts),
        )
        if gas > terms.max_gas:
            raise UsageError(f"This may take {gas:,} gas, the relay pays {terms.max_gas:,} at most")
        deadline = now + min(DEADLINE_SECONDS, terms.max_lead)
        request = ForwardRequest(account, call.to, 0, gas, nonce, deadline, call.data)
        return _typed_data_json(request.typed_data(domain))

    async def _payer(self, kind: str, amount: int) -> Payer:
        address = checked_address(_account(self._payload))
        credit, w3 = self._contracts.credit, self._contracts.w3
        balance, allowance, coin, price = await asyncio.gather(
            credit.balance_of(address),
            credit.allowance(address, self._contracts.scheduler.address),
            w3.eth.get_balance(address),
            w3.eth.gas_price,
        )
        gas = (_GAS[kind] + (_GAS_APPROVE if allowance < amount else 0)) * int(price)
        relayed = bool(self._relay) and (self._payload.get("payment") == "relay" or coin < gas)
        if balance < amount:
            raise InsufficientFundsError(
                f"The wallet has {credit_count(balance)}, less than the {credit_count(amount)} needed",
                hint="Lower the credits, or get some: `deepsquare credit faucet` on a devnet.",
            )
        if coin < gas and not relayed:
            raise InsufficientFundsError(
                f"The wallet has {format_credits(coin)} of the chain's coin, the gas of "
                f"this may take {format_credits(gas)}",
                hint="Send coin to it; on a devnet use `deepsquare credit faucet`.",
            )
        return Payer(address, balance, allowance, relayed)

    async def _simulate(self, account: str, call: Call) -> None:
        body: Any = {"from": account, "to": call.to, "data": HexBytes(call.data)}
        try:
            await self._contracts.w3.eth.call(body, "latest")
        except ContractLogicError as error:
            raise decode_revert(error) from None
        except Web3RPCError as error:
            raise EndpointError(
                f"The node rejected {call.label!r}: {node_message(error)}"
            ) from None


def _escrow_effect(payer: Payer, amount: int) -> str:
    remaining = format_credits(payer.balance - amount)
    transfer = f"{credit_count(amount)} go from your wallet into escrow at the MetaScheduler"
    return f"{transfer}; {remaining} stay in the wallet."


def offers_in_words(offers: Sequence[PricedOffer]) -> str:
    """Describe in a sentence or two who could run a job, and for how much."""
    eligible = [offer for offer in offers if offer.eligible]
    if eligible:
        starting = [offer for offer in eligible if offer.starts_in is not None]
        first = min(starting, key=lambda offer: offer.starts_in or 0, default=None)
        start = f" It could start {first.start}." if first else ""
        return (
            f"{count(len(eligible), 'provider')} could run it; the whole time limit costs "
            f"{credit_count(eligible[0].cost)} at the cheapest.{start}"
        )
    if costs_over_budget := [offer.cost for offer in offers if offer.is_over_budget]:
        return (
            f"Its credits are not sufficient for its time limit: the cheapest provider would take "
            f"{format_credits(min(costs_over_budget))}. It would wait."
        )
    return "No provider is eligible now: it would wait, and can be cancelled for a full refund."


def runtime(terms: Terms) -> str:
    """Describe how long a job may run."""
    limit = duration(terms.time_limit)
    if terms.until_spent:
        return f"until its credits are spent, which must pay for at least {limit}"
    return f"for at most {limit}"


def _flag_effects(terms: Terms) -> Iterator[str]:
    if JobFlags.INTERIM_PAYMENTS in terms.flags:
        yield "Its provider may collect interim payments while it runs."
    if JobFlags.NO_SELF_SCHEDULING in terms.flags:
        yield "Only the meta-scheduler assigns it, because it has requirements on labels."


def _runtime_gain(job: Job, amount: int, *, own: bool) -> str:
    if not job.rate:
        return "Its rate is fixed when it is assigned."
    if job.until_spent:
        return f"It may run {duration(amount // job.rate)} longer."
    if own:
        return f"At its rate that buys {duration(amount // job.rate)} more."
    return "Its time limit stays the same: only credits of its customer extend it."


def _refund_effect(job: Job) -> str:
    escrow = format_credits(job.escrow)
    if job.status is JobStatus.RUNNING:
        return (
            f"The seconds that it ran and that are not billed yet are billed; the rest of {escrow} "
            "credits is refunded."
        )
    return f"All {escrow} credits are refunded."


def _amount(text: Any) -> int:
    try:
        amount = parse_credits(str(text or ""))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not 0 < amount < 2**128:
        raise UsageError("Give more than zero credits, and no more than there are")
    return amount


def signature_of(text: Any) -> bytes:
    """Parse a wallet's signature: r, s and v, 65 bytes. Raises UsageError if it is malformed."""
    if not _SIGNATURE.fullmatch(str(text)):
        raise UsageError("The wallet's signature has an invalid format")
    raw = bytes.fromhex(str(text)[2:])
    # Some wallets return a recovery ID of 0 or 1 instead of 27 or 28.
    return raw if raw[64] >= 27 else raw[:64] + bytes([raw[64] + 27])


# -- endpoints

#: Largest body of a POST request in bytes.
MAX_BODY: Final = 160_000


class PostRefusedError(GridError):
    """A POST request that is refused before it is parsed; `status` is the HTTP status."""

    def __init__(self, message: str, status: int, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


def form(request: Request) -> Response:
    """The job form, with the prices of providers."""
    page = PageRequest(request)
    providers = [provider for provider in page.index.providers() if provider.active]
    return page.render("submit.html", providers=providers)


def grid(request: Request) -> Response:
    """Chain ID, scheduler, gateway URL and checksum address of an account, for its wallet."""
    site = site_of(request)
    account = request.query_params.get("account", "")
    return JSONResponse(
        {
            "chain_id": site.contracts.deployment.chain_id,
            "contract": site.contracts.scheduler.address.lower(),
            "gateway": site.gateway,
            "account": checked_address(account) if account else "",
        }
    )


def schema(_: Request) -> Response:
    """JSON schema of job files, for the editor."""
    return JSONResponse(job_file_schema(), headers={"Cache-Control": "max-age=3600"})


async def quote(request: Request) -> Response:
    """Validate a job of the form or the editor, and return each provider's price for it.

    An invalid job is not an HTTP error: `problems` lists its mistakes. No wallet is needed.
    """
    site, payload = await _read_post(request)
    file = {} if payload.get("mode") == "file" else {"file": form_as_file(payload)}
    try:
        job_file = await run_in_threadpool(read_job, payload)
        terms = job_file.terms()
    except JobFileError as error:
        mistakes = [{"line": line, "text": text} for line, text in problems(error)]
        return JSONResponse({"problems": mistakes, "hint": error.hint, **file})
    offers = await site.offers(terms)
    page = PageRequest(request)
    names = await run_in_threadpool(lambda: [page.name_of(offer.account) for offer in offers])
    offer_rows = [
        {
            "provider": visible(name.text),
            "account": offer.account,
            "cost": plain_amount(offer.cost) if offer.cost else "",
            "start": offer.start,
            "refusal": visible(offer.refusal),
        }
        for offer, name in zip(offers, names, strict=True)
    ]
    limits = f"{runtime(terms)}, {credit_count(terms.amount)} at most."
    return JSONResponse(
        {
            "problems": [],
            "warnings": list(job_file.warnings),
            "summary": f"{size_of(terms.resources)}, {limits}",
            "verdict": offers_in_words(offers),
            "offers": offer_rows,
            **file,
        }
    )


async def submit(request: Request) -> Response:
    """Plan the submission of the form's job.

    The explorer stores the definition when the call is ready to sign. Without a store, the browser
    uploads it to the gateway, where the wallet signs in.
    """
    site, payload = await _read_post(request)
    if not site.accepts_jobs:
        raise UsageError(
            "This explorer has no store of definitions, so that jobs can't be submitted here",
            hint="Use `deepsquare submit FILE`.",
        )
    job_file = await run_in_threadpool(read_job, payload)
    account = checked_address(_account(payload))
    jobs = request_of(
        job_file.definition,
        job_file.terms(),
        after=await parse_depends(site.contracts, job_file.depends_on, lambda: account),
        job_conditions=job_file.conditions(await submission_time(site.contracts)),
    )
    terms = jobs.terms
    data, digest = job_file.definition.to_bytes(), job_file.definition.digest
    offers = await site.offers(terms)
    plan = await CallPlanner(site, payload).submit(terms, digest, offers)
    if site.store is None:
        return _plan_response(plan, definition=data.decode(), digest=digest.hex())
    if plan.is_payable:
        await site.store.put(data)
    return _plan_response(plan)


async def top_up(request: Request) -> Response:
    """Plan a top-up."""
    site, payload = await _read_post(request)
    return _plan_response(await CallPlanner(site, payload).top_up())


async def cancel(request: Request) -> Response:
    """Plan a cancellation."""
    site, payload = await _read_post(request)
    return _plan_response(await CallPlanner(site, payload).cancel())


async def relay(request: Request) -> Response:
    """Send a signed request to the relay; the returned `digest` identifies it."""
    site, payload = await _read_post(request)
    signature, message = signature_of(payload.get("signature")), payload.get("message")
    if not isinstance(message, Mapping):
        raise UsageError("The request is not a JSON object")
    signed = SignedRequest.from_wire({**message, "signature": "0x" + signature.hex()})
    domain = await own_domain(site.contracts)
    signed.check_signer(domain)
    digest = "0x" + signed.request.digest(domain).hex()
    async with _relay(site) as client:
        status = await client.submit_request(signed, digest)
    return JSONResponse({"digest": digest, "state": status.state})


async def relayed(request: Request) -> Response:
    """Return the relay's state of a request; `outcome` follows its transaction."""
    async with _relay(site_of(request)) as client:
        status = await client.state(request.path_params["digest"].lower())
    return JSONResponse(
        {"state": status.state, "transaction": status.transaction, "reason": visible(status.detail)}
    )


def _relay(site: Site) -> RelayClient:
    if not site.relay:
        raise NotFoundError("This explorer has no relay")
    return RelayClient(site.relay)


async def outcome(request: Request) -> Response:
    """Return the state of a transaction: waiting, done (with its submitted jobs) or refused.

    `indexed` is true when the index contains it. A relay's transaction carries calls of several
    customers: with `account`, only the jobs of that customer are returned.
    """
    site = site_of(request)
    tx_hash = request.path_params["hash"].lower()
    account = request.query_params.get("account", "").lower()
    try:
        await run_in_threadpool(site.index.transaction, tx_hash)
        indexed = True
    except NotFoundError:
        indexed = False
    state, jobs, reason = "waiting", [], ""
    transaction = await read_transaction(site.contracts, tx_hash)
    if transaction is not None and transaction.ok is not None:
        state = "done" if transaction.ok else "refused"
        reason = transaction.failure.message if transaction.failure else ""
        jobs = [
            event.job_id
            for event in decode_logs(transaction.logs)
            if isinstance(event, JobSubmitted) and account in {"", event.customer.lower()}
        ]
    return JSONResponse({"state": state, "jobs": jobs, "indexed": indexed, "reason": reason})


def _plan_response(plan: CallPlan, **more: str) -> Response:
    return JSONResponse({**asdict(plan), **more}, headers={"Cache-Control": "no-store"})


async def _read_post(request: Request) -> tuple[Site, Mapping[str, Any]]:
    """Return the site and the JSON body of a POST request from a page of this explorer.

    Raises:
        PostRefusedError: It comes from another site, is too large, or exceeds the rate limit.
        UsageError: The body is not a JSON object.
    """
    if not is_same_origin(request):
        raise PostRefusedError("Only pages of this explorer may send this request", 403)
    limit: RateLimit = request.app.state.post_limit
    if limit.wait(request.client.host if request.client else "?"):
        raise PostRefusedError("Too many requests", 429, hint="Wait a minute.")
    body = await read_body(request, MAX_BODY)
    if body is None:
        raise PostRefusedError(f"More than {MAX_BODY:,} bytes", 413)
    return site_of(request), json_body(body)


def _account(payload: Mapping[str, Any]) -> str:
    return str(payload.get("account", ""))


# -- the job form: converts its fields to a job file, which is validated as usual

#: Largest definition in bytes; larger ones are submitted with the command line.
MAX_DEFINITION: Final = 64_000
#: Name of the editor's job file in messages.
SOURCE: Final = "job file"
_FORM: Final = "form"
_LOCATION: Final = re.compile(rf"^(?:{SOURCE}|{_FORM})(:(\d+))?: ", re.MULTILINE)
_NUMBERS: Final = {
    "tasks": "tasks",
    "cpus_per_task": "cpusPerTask",
    "mem_per_cpu": "memPerCpu",
    "gpus": "gpus",
}
_LABELS: Final = {
    "resources.memPerCpu": "memory per CPU",
    "resources.cpusPerTask": "CPUs per task",
    "resources.tasks": "tasks",
    "resources.gpus": "GPUs",
    "steps[0].run.command": "script",
    "timeLimit": "time limit",
}


def read_job(payload: Mapping[str, Any]) -> JobFile:
    """Return the job of a form: its fields, or a whole job file in `file`.

    Raises JobFileError if it is invalid; the message uses the labels of the form.
    """
    file = payload.get("mode") == "file" or ("mode" not in payload and bool(payload.get("file")))
    text = str(payload.get("file") or "") if file else form_as_file(payload)
    if len(text.encode("utf-8", "replace")) > MAX_DEFINITION:
        raise JobFileError(
            f"The job is larger than {MAX_DEFINITION:,} bytes",
            hint="Submit it with `deepsquare submit FILE`.",
        )
    try:
        job = parse_job_file(text.encode("utf-8", "replace"), SOURCE if file else _FORM)
    except JobFileError as error:
        if file:
            raise
        raise JobFileError(_with_form_labels(error.message), hint="Correct it above.") from None
    return job


def form_as_file(payload: Mapping[str, Any]) -> str:
    """Convert the fields of the form to a job file (YAML)."""
    return dump(_document(payload), "")


def problems(error: JobFileError) -> list[tuple[int | None, str]]:
    """Split an error into problems, each with its line number or None."""
    result = []
    for line in error.message.splitlines():
        match = _LOCATION.match(line)
        text = line[match.end() :] if match else line
        if text:
            result.append((int(match[2]) if match and match[2] else None, text))
    return result


def _document(payload: Mapping[str, Any]) -> dict[str, Any]:
    def text(name: str) -> str:
        return str(payload.get(name) or "").strip()

    document = {
        "name": text("name"),
        "credits": text("credits"),
        "timeLimit": text("time_limit"),
        "objective": text("objective").upper() or "COST",
        "retries": _number(text("retries") or "0"),
        "untilSpent": _is_checked(payload.get("until_spent")),
        "interimPayments": _is_checked(payload.get("interim_payments")),
        "uses": [use for use in re.split(r"[\s,]+", text("uses")) if use],
        "resources": {key: _number(text(name)) for name, key in _NUMBERS.items()},
        # Browsers submit CRLF line ends; shells need LF.
        "steps": [{"run": {"command": str(payload.get("script") or "").replace("\r\n", "\n")}}],
    }
    defaults = {"name": "", "retries": 0, "untilSpent": False, "interimPayments": False, "uses": []}
    return {key: value for key, value in document.items() if defaults.get(key) != value}


def _is_checked(value: Any) -> bool:
    return value is True or value in ("on", "true")  # JSON bodies hold unhashable values too


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def _with_form_labels(message: str) -> str:
    text = _LOCATION.sub("", message)
    for key, label in _LABELS.items():
        text = text.replace(key, label)
    return "\n".join(line[:1].upper() + line[1:] for line in text.splitlines())
