"""Content of notifications: JSON for webhooks, text for e-mail and desktop, signature of webhooks."""

from __future__ import annotations

import hashlib
import hmac
import html
import json
from collections.abc import Mapping
from email.message import EmailMessage
from email.utils import formatdate
from typing import Any, Final

from deepsquare_chain.credits import credit_count
from deepsquare_chain.job import JobStatus
from deepsquare_chain.notification import JobEvent
from deepsquare_chain.observability.redaction import plain

#: Header of a webhook's signature: `t=SECONDS,v1=HEX`.
SIGNATURE: Final = "DeepSquare-Signature"
#: Header of the event's ID, which is the same in every attempt.
EVENT_ID: Final = "DeepSquare-Event-Id"


def event_id(chain_id: int, contract: str, job_id: int, after: JobStatus, tx_hash: str) -> str:
    """Return the ID of an event; it depends on the transaction but not on its block (reorgs)."""
    text = f"{chain_id} {contract.lower()} {job_id} {after.name} {tx_hash}"
    return "evt_" + hashlib.sha256(text.encode()).hexdigest()[:32]


def payload(
    event: JobEvent,
    *,
    chain_id: int,
    contract: str,
    name: str,
    customer: str = "",
    provider_id: int = 0,
    provider: str = "",
    exit_code: int | None = None,
    reason: str = "",
    paid: int = 0,
    refunded: int = 0,
) -> str:
    """Return the JSON body of a webhook; amounts are credit-wei as strings, times are chain time."""
    body = {
        "id": event.id,
        "type": f"job.{event.after.name.lower()}",
        "time": event.time,
        "chain_id": chain_id,
        "contract": contract,
        "block": event.block,
        "job": {
            "id": event.job_id,
            "name": name,
            "status": event.after.name,
            "previous_status": event.before.name,
            "customer": customer,
            "provider_id": provider_id or None,
            "provider": provider or None,
            "exit_code": exit_code,
            "reason": reason,
            "paid": str(paid),
            "refunded": str(refunded),
        },
    }
    return json.dumps(body, ensure_ascii=True, separators=(",", ":"))


def signature(secret: bytes, body: bytes, now: int) -> str:
    """Return the value of the signature header: HMAC-SHA256 (RFC 2104) of `SECONDS.BODY`."""
    digest = hmac.new(secret, f"{now}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={now},v1={digest}"


def title(body: Mapping[str, Any]) -> str:
    """Return a notification in one line, without control codes."""
    job = body["job"]
    name = plain(str(job["name"]))[:80]
    return f"Job {job['id']}{f' ({name})' if name else ''}: {job['status']}"


def desktop_command(body: Mapping[str, Any]) -> list[str]:
    """Return the arguments of notify-send; the text is escaped, as desktops interpret markup."""
    text = html.escape("\n".join(_detail_lines(body["job"])), quote=False)
    return ["notify-send", "--app-name=DeepSquare", "--", title(body), text]


def _detail_lines(job: Mapping[str, Any]) -> list[str]:
    """Return exit code, reason, provider and amounts of a job, one per line."""
    lines = []
    if job["exit_code"] is not None:
        lines.append(f"Exit code: {job['exit_code']}")
    if job["reason"]:
        lines.append(f"Reason: {plain(str(job['reason']))[:300]}")
    if job["provider_id"]:
        lines.append(f"Provider: {job['provider_id']} ({job['provider']})")
    if JobStatus[job["status"]].is_final:
        lines.append(f"Paid: {credit_count(int(job['paid']))}")
        lines.append(f"Refunded: {credit_count(int(job['refunded']))}")
    return lines


def email(body: Mapping[str, Any], sender: str, recipient: str) -> EmailMessage:
    """Return a notification as e-mail; control codes are removed, so that names can't add headers."""
    job, subject = body["job"], title(body)
    lines = [
        f"{subject}.",
        "",
        *_detail_lines(job),
        f"Block: {body['block']} of chain {body['chain_id']}",
        "",
        f"deepsquare job get {job['id']}",
        f"deepsquare job logs {job['id']}",
    ]
    message = EmailMessage()
    message["From"] = sender
    message["To"] = recipient
    message["Subject"] = subject
    message["Date"] = formatdate()
    message["Message-ID"] = f"<{body['id']}@{sender.rpartition('@')[2] or 'localhost'}>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content("\n".join(lines) + "\n")
    return message
