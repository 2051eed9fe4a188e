"""The wallet's side of the explorer: the form, and JSON that says what to sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pydantic_core
from hexbytes import HexBytes
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from web3.exceptions import TransactionNotFound, Web3Exception

from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.events import JobSubmitted, decode_logs
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
from deepsquare_chain.web.jobform import form_as_file, problems, read_form
from deepsquare_chain.web.lookup import look_up
from deepsquare_chain.web.pages.common import MAX_NUMBER, ask, show, site_of
from deepsquare_chain.web.security import client_of, is_own
from deepsquare_chain.web.site import Name, Site
from deepsquare_chain.workflow.schema import job_file_schema

MAX_BODY: Final = 160_000


class Refused(GridError):  # noqa: N818 - it is an answer, with its own status
    """A post that is not even looked at; `status` is what it is answered with."""

    def __init__(self, message: str, status: int, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


async def form(request: Request) -> Response:
    """The job form, with what things cost."""
    site = site_of(request)
    providers = await ask(site.index.providers)
    return await show(
        request,
        "submit.html",
        providers=[each for each in providers if each.active],
        storing=site.storing,
        relay=bool(site.relay),
    )


async def grid(request: Request) -> Response:
    """Which chain a wallet must be on, where its gateway is, and its address with the checksum."""
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
    """Check a job of the form or the editor, and say what each provider would take for it.

    A job with mistakes is an answer too: `problems` names them. No wallet is needed.
    """
    site, given = await _posted(request)
    file = {} if given.get("mode") == "file" else {"file": form_as_file(given)}
    try:
        job_file = await ask(read_form, given)
        terms = job_file.terms()
    except JobFileError as error:
        found = [{"line": line, "text": text} for line, text in problems(error)]
        return JSONResponse({"problems": found, "hint": error.hint, **file})
    offers = await site.offers(terms)
    names = await ask(_names, site)
    return JSONResponse(
        {
            "problems": [],
            "warnings": list(job_file.warnings),
            "summary": f"{size_of(terms.resources)}, {runtime(terms)}, "
            f"{exact(terms.amount)} {'credit' if terms.amount == CREDIT else 'credits'} at most.",
            "verdict": offers_in_words(offers),
            "offers": [
                {
                    "provider": visible(names[each.account].text if each.account in names else ""),
                    "account": each.account,
                    "cost": "".join(amount(each.cost)) if each.cost else "",
                    "start": each.start,
                    "refusal": visible(each.refusal),
                }
                for each in offers
            ],
            **file,
        }
    )


def _names(site: Site) -> Mapping[str, Name]:
    return site.names(site.index.status().change)


async def submit(request: Request) -> Response:
    """Say what submitting the form's job does.

    Its definition is kept here once it can be sent, or goes to the gateway from the browser, which
    the wallet signs in to.
    """
    site, given = await _posted(request)
    if not site.storing:
        raise UsageError(
            "This explorer keeps no definitions, so that no job can be submitted here",
            hint="Use `deepsquare submit FILE`.",
        )
    job_file = await ask(read_form, given)
    account = checked_address(_account(given))
    jobs = request_of(
        job_file.definition,
        job_file.terms(),
        after=await parse_depends(site.contracts, job_file.depends_on, lambda: account),
        wishes=job_file.conditions(await submission_time(site.contracts)),
    )
    terms = jobs.terms
    data, digest = job_file.definition.to_bytes(), job_file.definition.digest
    offers = await site.offers(terms)
    plan = await _planner(site).submit(account, terms, digest, offers, given)
    if site.store is not None:
        if plan.is_payable:
            await site.store.put(data)
        return _answer(site, plan)
    return _answer(site, plan, definition=data.decode(), digest=digest.hex())


async def top_up(request: Request) -> Response:
    """Say what a top-up does."""
    site, given = await _posted(request)
    return _answer(site, await _planner(site).top_up(_account(given), _job(given), given))


async def cancel(request: Request) -> Response:
    """Say what a cancellation does."""
    site, given = await _posted(request)
    return _answer(site, await _planner(site).cancel(_account(given), _job(given), given))


async def relay(request: Request) -> Response:
    """Hand a signed request over to the relay; `digest` names it from then on."""
    site, given = await _posted(request)
    signature = signature_of(given.get("signature"))
    signed = SignedRequest.from_wire({**_mapping(given.get("message")), "signature": "0x"})
    signed = SignedRequest(signed.request, signature)
    domain = await own_domain(site.contracts)
    signed.check_signer(domain)
    digest = "0x" + signed.request.digest(domain).hex()
    async with _relay(site) as client:
        found = await client.hand_over(signed, digest)
    return JSONResponse({"digest": digest, "state": found.state})


async def relayed(request: Request) -> Response:
    """What the relay says of a request; the transaction is looked at with `outcome`."""
    async with _relay(site_of(request)) as client:
        found = await client.state(request.path_params["digest"].lower())
    return JSONResponse(
        {"state": found.state, "transaction": found.transaction, "reason": visible(found.detail)}
    )


def _relay(site: Site) -> RelayClient:
    if not site.relay:
        raise NotFoundError("This explorer knows no relay")
    return RelayClient(site.relay)


def _planner(site: Site) -> CallPlanner:
    return CallPlanner(site.contracts, site.relay)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError("The request is no JSON object")
    return value


async def outcome(request: Request) -> Response:
    """What became of a transaction: waiting, done (with the jobs that it made) or refused.

    `indexed` says whether pages know of it already. A transaction of a relay carries calls of
    several customers: with `account`, only that customer's jobs are named.
    """
    site = site_of(request)
    tx_hash = request.path_params["hash"].lower()
    try:
        await ask(site.index.transaction, tx_hash)
        indexed = True
    except NotFoundError:
        indexed = False
    found = await look_up(site.contracts, tx_hash)
    if found is None or found.ok is None:
        return JSONResponse({"state": "waiting", "jobs": [], "indexed": indexed, "reason": ""})
    account = request.query_params.get("account", "")
    jobs = await _born(site, tx_hash, account) if found.ok else []
    state = "done" if found.ok else "refused"
    return JSONResponse({"state": state, "jobs": jobs, "indexed": indexed, "reason": found.reason})


async def _born(site: Site, tx_hash: str, account: str) -> list[int]:
    try:
        receipt: Any = await site.contracts.w3.eth.get_transaction_receipt(HexBytes(tx_hash))
    except (TransactionNotFound, Web3Exception, GridError):
        return []
    return [
        each.job_id
        for each in decode_logs(receipt["logs"])
        if isinstance(each, JobSubmitted)
        and (not account or each.customer.lower() == account.lower())
    ]


def _answer(site: Site, plan: CallPlan, **more: str) -> Response:
    return JSONResponse(
        {**plan.to_wire(site.contracts.deployment.chain_id), **more},
        headers={"Cache-Control": "no-store"},
    )


async def _posted(request: Request) -> tuple[Site, Mapping[str, Any]]:
    """The body of a post from one of these pages.

    Raises:
        Refused: It comes from elsewhere, is too large, or one of too many.
        UsageError: It is no JSON object.
    """
    if not is_own(request):
        raise Refused("Only this explorer's own pages may ask for this", 403)
    limit: RateLimit = request.app.state.post_limit
    if limit.wait(client_of(request)):
        raise Refused("Too many requests", 429, hint="Wait a minute.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refused(f"More than {MAX_BODY:,} bytes", 413)
    try:
        given = pydantic_core.from_json(body)
    except ValueError:
        raise UsageError("The body is no JSON") from None
    if not isinstance(given, dict):
        raise UsageError("The body is no JSON object")
    return site_of(request), given


def _account(given: Mapping[str, Any]) -> str:
    return str(given.get("account", ""))


def _job(given: Mapping[str, Any]) -> int:
    found = given.get("job")
    if not isinstance(found, int) or not 0 < found <= MAX_NUMBER:
        raise UsageError("A job is named by its number")
    return found
