"""Pages and JSON endpoints for wallets: the job form, and plans of calls to sign."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import pydantic_core
import yaml
from hexbytes import HexBytes
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from web3.exceptions import TransactionNotFound, Web3Exception

from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.event_types import JobSubmitted
from deepsquare_chain.chain.bindings.events import decode_logs
from deepsquare_chain.chain.bindings.forwarder import SignedRequest
from deepsquare_chain.client.gasless import own_domain
from deepsquare_chain.client.relay_client import RelayClient
from deepsquare_chain.client.submission import parse_depends, request_of, submission_time
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import GridError, JobFileError, NotFoundError, UsageError
from deepsquare_chain.observability.serving import RateLimit
from deepsquare_chain.web.calls import (
    CallPlan,
    CallPlanner,
    offers_in_words,
    runtime,
    signature_of,
)
from deepsquare_chain.web.formats import amount, exact, size_of, visible
from deepsquare_chain.web.lookup import read_transaction
from deepsquare_chain.web.pages.common import MAX_NUMBER, render_page, run_query, site_of
from deepsquare_chain.web.security import client_address, is_same_origin
from deepsquare_chain.web.site import Name, Site
from deepsquare_chain.workflow import JobFile, parse_job_file
from deepsquare_chain.workflow.schema import job_file_schema

MAX_BODY: Final = 160_000


class PostRefusedError(GridError):
    """A POST request that is refused before it is parsed; `status` is the HTTP status."""

    def __init__(self, message: str, status: int, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


async def form(request: Request) -> Response:
    """The job form, with the prices of providers."""
    site = site_of(request)
    providers = await run_query(site.index.providers)
    return await render_page(
        request,
        "submit.html",
        providers=[provider for provider in providers if provider.active],
        accepts_jobs=site.accepts_jobs,
        relay=bool(site.relay),
    )


async def grid(request: Request) -> Response:
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


async def schema(_: Request) -> Response:
    """JSON schema of job files, for the editor."""
    return JSONResponse(job_file_schema(), headers={"Cache-Control": "max-age=3600"})


async def quote(request: Request) -> Response:
    """Validate a job of the form or the editor, and return each provider's price for it.

    An invalid job is not an HTTP error: `problems` lists its mistakes. No wallet is needed.
    """
    site, payload = await _read_post(request)
    file = {} if payload.get("mode") == "file" else {"file": form_as_file(payload)}
    try:
        job_file = await run_query(read_job, payload)
        terms = job_file.terms()
    except JobFileError as error:
        mistakes = [{"line": line, "text": text} for line, text in problems(error)]
        return JSONResponse({"problems": mistakes, "hint": error.hint, **file})
    offers = await site.offers(terms)
    names = await run_query(_names, site)
    return JSONResponse(
        {
            "problems": [],
            "warnings": list(job_file.warnings),
            "summary": f"{size_of(terms.resources)}, {runtime(terms)}, "
            f"{exact(terms.amount)} {'credit' if terms.amount == CREDIT else 'credits'} at most.",
            "verdict": offers_in_words(offers),
            "offers": [
                {
                    "provider": visible(
                        names[offer.account].text if offer.account in names else ""
                    ),
                    "account": offer.account,
                    "cost": "".join(amount(offer.cost)) if offer.cost else "",
                    "start": offer.start,
                    "refusal": visible(offer.refusal),
                }
                for offer in offers
            ],
            **file,
        }
    )


def _names(site: Site) -> Mapping[str, Name]:
    return site.names(site.index.status().change)


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
    job_file = await run_query(read_job, payload)
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
    plan = await _planner(site).submit(account, terms, digest, offers, payload)
    if site.store is not None:
        if plan.is_payable:
            await site.store.put(data)
        return _plan_response(site, plan)
    return _plan_response(site, plan, definition=data.decode(), digest=digest.hex())


async def top_up(request: Request) -> Response:
    """Plan a top-up."""
    site, payload = await _read_post(request)
    return _plan_response(
        site, await _planner(site).top_up(_account(payload), _job(payload), payload)
    )


async def cancel(request: Request) -> Response:
    """Plan a cancellation."""
    site, payload = await _read_post(request)
    return _plan_response(
        site, await _planner(site).cancel(_account(payload), _job(payload), payload)
    )


async def relay(request: Request) -> Response:
    """Send a signed request to the relay; the returned `digest` identifies it."""
    site, payload = await _read_post(request)
    signature = signature_of(payload.get("signature"))
    signed = SignedRequest.from_wire({**_mapping(payload.get("message")), "signature": "0x"})
    signed = SignedRequest(signed.request, signature)
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
        {
            "state": status.state,
            "transaction": status.transaction,
            "reason": visible(status.detail),
        }
    )


def _relay(site: Site) -> RelayClient:
    if not site.relay:
        raise NotFoundError("This explorer has no relay")
    return RelayClient(site.relay)


def _planner(site: Site) -> CallPlanner:
    return CallPlanner(site.contracts, site.relay)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError("The request is not a JSON object")
    return value


async def outcome(request: Request) -> Response:
    """Return the state of a transaction: waiting, done (with its submitted jobs) or refused.

    `indexed` is true when the index contains it. A relay's transaction carries calls of several
    customers: with `account`, only the jobs of that customer are returned.
    """
    site = site_of(request)
    tx_hash = request.path_params["hash"].lower()
    try:
        await run_query(site.index.transaction, tx_hash)
        indexed = True
    except NotFoundError:
        indexed = False
    transaction = await read_transaction(site.contracts, tx_hash)
    if transaction is None or transaction.ok is None:
        return JSONResponse({"state": "waiting", "jobs": [], "indexed": indexed, "reason": ""})
    account = request.query_params.get("account", "")
    jobs = await _submitted_jobs(site, tx_hash, account) if transaction.ok else []
    state = "done" if transaction.ok else "refused"
    return JSONResponse(
        {"state": state, "jobs": jobs, "indexed": indexed, "reason": transaction.reason}
    )


async def _submitted_jobs(site: Site, tx_hash: str, account: str) -> list[int]:
    try:
        receipt: Any = await site.contracts.w3.eth.get_transaction_receipt(HexBytes(tx_hash))
    except (TransactionNotFound, Web3Exception, GridError):
        return []
    return [
        event.job_id
        for event in decode_logs(receipt["logs"])
        if isinstance(event, JobSubmitted)
        and (not account or event.customer.lower() == account.lower())
    ]


def _plan_response(site: Site, plan: CallPlan, **more: str) -> Response:
    return JSONResponse(
        {**plan.to_wire(site.contracts.deployment.chain_id), **more},
        headers={"Cache-Control": "no-store"},
    )


async def _read_post(request: Request) -> tuple[Site, Mapping[str, Any]]:
    """Return the site and the JSON body of a POST request from a page of this explorer.

    Raises:
        PostRefusedError: It comes from another site, is too large, or exceeds the rate limit.
        UsageError: The body is not a JSON object.
    """
    if not is_same_origin(request):
        raise PostRefusedError("Only pages of this explorer may send this request", 403)
    limit: RateLimit = request.app.state.post_limit
    if limit.wait(client_address(request)):
        raise PostRefusedError("Too many requests", 429, hint="Wait a minute.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise PostRefusedError(f"More than {MAX_BODY:,} bytes", 413)
    try:
        payload = pydantic_core.from_json(body)
    except ValueError:
        raise UsageError("The body is not JSON") from None
    if not isinstance(payload, dict):
        raise UsageError("The body is not a JSON object")
    return site_of(request), payload


def _account(payload: Mapping[str, Any]) -> str:
    return str(payload.get("account", ""))


def _job(payload: Mapping[str, Any]) -> int:
    job_id = payload.get("job")
    if type(job_id) is not int or not 0 < job_id <= MAX_NUMBER:
        raise UsageError("A job is given by its number")
    return job_id


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

    Raises:
        JobFileError: The job is invalid; the message uses the labels of the form.
    """
    file = _has_file(payload)
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
    return yaml.dump(_document(payload), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def problems(error: JobFileError) -> list[tuple[int | None, str]]:
    """Split an error into problems, each with its line number or None."""
    result = []
    for line in error.message.splitlines():
        match = _LOCATION.match(line)
        text = line[match.end() :] if match else line
        if text:
            result.append((int(match[2]) if match and match[2] else None, text))
    return result


def _has_file(payload: Mapping[str, Any]) -> bool:
    return payload.get("mode") == "file" or ("mode" not in payload and bool(payload.get("file")))


class _Dumper(yaml.SafeDumper):
    """Writes multi-line strings, such as scripts, as block scalars."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)


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
