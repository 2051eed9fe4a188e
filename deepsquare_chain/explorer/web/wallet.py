"""What a customer's own wallet is asked to sign: calls, encoded and told in words. No key is here.

Each answer is a plan: `effects` in words, the `call`, and where the scheduler's allowance is too
small either a `permit` to sign (EIP-2612) or an `approval` to send first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import pydantic_core
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deepsquare_chain.chain.calls import Call, checked_address
from deepsquare_chain.chain.credit import Permit
from deepsquare_chain.chain.rpc import chain_time
from deepsquare_chain.credits import format_credits, parse_credits
from deepsquare_chain.errors import (
    InsufficientFundsError,
    NotAuthorisedError,
    UsageError,
)
from deepsquare_chain.explorer.web.site import Site
from deepsquare_chain.job import Job
from deepsquare_chain.workflow import JobFile, parse_job_file

MAX_BODY: Final = 100_000
_PERMIT_SECONDS: Final = 3_600
_SIGNATURE_BYTES: Final = 65


async def grid(site: Site, _: Request) -> Response:
    """Which chain the wallet must be on."""
    return JSONResponse(
        {
            "chain_id": site.contracts.deployment.chain_id,
            "scheduler": site.contracts.scheduler.address,
            "credit": site.contracts.credit.address,
        }
    )


async def submit(site: Site, request: Request) -> Response:
    """A plan to submit the job of a form; its definition is kept for providers."""
    body = await _body(request)
    if site.store is None:
        raise UsageError(
            "This explorer keeps no job definitions", hint="Use `deepsquare submit` instead."
        )
    job_file = _job_file(body)
    terms = job_file.terms()
    if not await site.contracts.scheduler.submissions_open():
        raise UsageError("This deployment takes no new jobs")
    digest = await site.store.put(job_file.definition.to_bytes())
    scheduler, rows = site.contracts.scheduler, [(terms, [digest])]
    permit = _permit(body)
    call = scheduler.submit_jobs(rows)
    if permit is not None:
        call = scheduler.submit_jobs_with_permit(rows, permit)
    size = terms.resources
    effects = [
        f"{format_credits(terms.amount)} credits go from your account into the escrow of the job.",
        f"It asks for {size.cpus} cpus, {size.memory} MB and {size.gpus} gpus for at most "
        f"{terms.time_limit} seconds.",
        "Until it starts you can cancel it for a full refund; what it does not use comes back.",
    ]
    title = f"Submit the job {terms.name!r}" if terms.name else "Submit a job"
    return await _plan(site, body, call, title, "Submit", effects, terms.amount, permit)


async def topup(site: Site, request: Request) -> Response:
    """A plan to add credits to a live job."""
    body = await _body(request)
    job, amount = await _job(site, body), _credits(body)
    customer = checked_address(str(body.get("customer", job.customer)))
    if customer != job.customer:
        raise UsageError(f"Job {job.id} is not of customer {customer}; read the page again")
    permit = _permit(body)
    scheduler = site.contracts.scheduler
    call = scheduler.top_up(job.id, customer, amount)
    if permit is not None:
        call = scheduler.top_up_with_permit(job.id, customer, amount, permit)
    effects = [f"{format_credits(amount)} credits go from your account into job {job.id}'s escrow."]
    if job.rate and not job.until_spent:
        effects.append(f"Its time limit grows by {amount // job.rate} seconds.")
    if checked_address(str(body.get("account", ""))) != customer:
        effects.append("The job is another customer's: what is left over goes to them, not to you.")
    return await _plan(
        site, body, call, f"Top up job {job.id}", "Top up", effects, amount, permit
    )  # fmt: skip


async def cancel(site: Site, request: Request) -> Response:
    """A plan to cancel a live job."""
    body = await _body(request)
    job = await _job(site, body)
    if checked_address(str(body.get("account", ""))) != job.customer:
        raise NotAuthorisedError(
            f"Job {job.id} belongs to {job.customer}", hint="Use the wallet that submitted it."
        )
    effects = [f"Job {job.id} ends CANCELLED."]
    if job.status.name == "RUNNING":
        effects.append("The time used so far is paid to the provider, the rest is refunded.")
    else:
        effects.append(f"All {format_credits(job.escrow)} credits come back to you.")
    call = site.contracts.scheduler.cancel([job.id])
    return await _plan(site, body, call, f"Cancel job {job.id}", "Cancel the job", effects, 0, None)


async def _plan(
    site: Site,
    body: Mapping[str, Any],
    call: Call,
    title: str,
    action: str,
    effects: list[str],
    amount: int,
    permit: Permit | None,
) -> Response:
    owner = checked_address(str(body.get("account", "")))
    plan: dict[str, Any] = {"title": title, "action": action, "call": _wire(call)}
    if amount and permit is None:
        plan |= await _allowance(site, owner, amount, str(body.get("way", "permit")), effects)
    plan["effects"] = [
        *effects,
        f"On chain {site.contracts.deployment.chain_id}, to the contract {call.to}.",
    ]
    plan["amount_wei"], plan["amount"] = str(amount), format_credits(amount)
    return JSONResponse(plan, headers={"Cache-Control": "no-store"})


async def _allowance(
    site: Site, owner: str, amount: int, way: str, effects: list[str]
) -> dict[str, Any]:
    """What must be signed or sent first; nothing where the allowance is large enough."""
    credit, spender = site.contracts.credit, site.contracts.scheduler.address
    balance = await credit.balance_of(owner)
    if balance < amount:
        raise InsufficientFundsError(
            f"Your account has {format_credits(balance)} credits, {format_credits(amount)} are "
            "needed",
            hint="Ask for less, or get some: the faucet of a devnet gives them.",
        )
    if await credit.allowance(owner, spender) >= amount:
        return {}
    if way == "approve":
        effects.append("First an approval of exactly that amount is sent, in its own transaction.")
        return {"approval": _wire(credit.approve(spender, amount))}
    effects.append("First you sign a permit for exactly that amount; signing costs nothing.")
    deadline = await chain_time(site.contracts.w3) + _PERMIT_SECONDS
    typed = dict(await credit.permit_data(owner, spender, amount, deadline))
    # Numbers above 2^53 would lose digits in a browser.
    typed["message"] = {
        key: str(value) if isinstance(value, int) else value
        for key, value in typed["message"].items()
    }
    return {"permit": typed}


def _wire(call: Call) -> dict[str, str]:
    return {"to": call.to, "data": "0x" + call.data.hex(), "value": str(call.value)}


def _permit(body: Mapping[str, Any]) -> Permit | None:
    """The signed permit of a second request.

    Raises:
        UsageError: What stands there is none.
    """
    given = body.get("permit")
    if given is None:
        return None
    try:
        raw = bytes.fromhex(str(given["signature"]).removeprefix("0x"))
        value, deadline = int(given["value"]), int(given["deadline"])
    except (KeyError, TypeError, ValueError):
        raise UsageError("The wallet's signature can't be read") from None
    if len(raw) != _SIGNATURE_BYTES or not 0 <= value < 2**256 or not 0 <= deadline < 2**256:
        raise UsageError("The wallet's signature can't be read")
    recovery = raw[64] + 27 if raw[64] < 27 else raw[64]
    return Permit(value, deadline, recovery, raw[:32], raw[32:64])


def _job_file(body: Mapping[str, Any]) -> JobFile:
    """The form as a job file, so that one set of rules holds for both."""
    uses = [each.strip() for each in str(body.get("uses", "")).split(",")]
    document = {
        "name": str(body.get("name", "")),
        "resources": {
            "tasks": _whole(body, "tasks"),
            "cpusPerTask": _whole(body, "cpus_per_task"),
            "memPerCpu": _whole(body, "mem_per_cpu"),
            "gpus": _whole(body, "gpus"),
        },
        "timeLimit": str(body.get("time_limit", "")),
        "credits": str(body.get("credits", "")),
        "objective": str(body.get("objective", "cost")),
        "retries": _whole(body, "retries"),
        "uses": [each for each in uses if each],
        "steps": [{"name": "main", "run": {"command": str(body.get("script", ""))}}],
    }
    # JSON is YAML as well.
    return parse_job_file(json.dumps(document, ensure_ascii=False).encode(), "the form")


def _whole(body: Mapping[str, Any], key: str) -> int:
    text = str(body.get(key, ""))
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise UsageError(f"{key.replace('_', ' ')}: {text[:40]!r} is no whole number")
    return int(text)


def _credits(body: Mapping[str, Any]) -> int:
    try:
        amount = parse_credits(str(body.get("credits", "")))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if amount == 0:
        raise UsageError("Give more than nothing")
    return amount


async def _job(site: Site, body: Mapping[str, Any]) -> Job:
    number = body.get("job")
    if type(number) is not int or not 0 < number < 2**63:
        raise UsageError("The number of the job is missing")
    found = await site.contracts.scheduler.get_job(number)
    if found.status.is_final:
        raise UsageError(f"Job {found.id} has ended {found.status.name}")
    return found


async def _body(request: Request) -> Mapping[str, Any]:
    """The JSON object of a request.

    Raises:
        UsageError: It is none, or is too large.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parts: list[bytes] = []
    async for part in request.stream():
        parts.append(part)
        if sum(len(each) for each in parts) > MAX_BODY:
            raise UsageError(f"The form is larger than {MAX_BODY:,} bytes")
    try:
        found = pydantic_core.from_json(b"".join(parts)) if declared == "application/json" else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError("The request is no JSON object")
    return found


