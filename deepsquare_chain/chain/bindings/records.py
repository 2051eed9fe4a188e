"""What the MetaScheduler takes and gives, and how its tuples become the grid's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from deepsquare_chain.job import Job, JobFlags, JobStatus, Objective, Resources, Terms

MAX_REASON_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Report:
    """How a run ended; `seconds_used` is what to bill, `result` a SHA-256 or zeros.

    Of `reason`, 32 bytes reach the chain.
    """

    job_id: int
    seconds_used: int
    exit_code: int
    result: bytes = bytes(32)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Clock:
    """A provider's challenge clock; times in seconds, zero where there is none."""

    account: str
    challenged_at: int
    challenged_block: int
    answered_at: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """What rules all jobs of a deployment; seconds, but for `response_blocks`."""

    claim_timeout: int
    pending_timeout: int
    pending_expiry: int
    response_timeout: int
    response_blocks: int
    lost_timeout: int
    report_grace: int
    top_up_notice: int
    collect_interval: int
    fee_bps: int
    submissions_open: bool
    credit: str
    registry: str
    treasury: str
    forwarder: str


def short(reason: str) -> str:
    """A reason cut to what the contract takes, between characters."""
    return reason.encode("utf-8", "replace")[:MAX_REASON_BYTES].decode("utf-8", "ignore")


def to_word(text: str) -> bytes:
    """A few words as the contract keeps them: UTF-8, cut between characters, padded with zeros."""
    kept = text.encode("utf-8", "replace")[:32].decode("utf-8", "ignore").encode()
    return kept.ljust(32, b"\0")


def from_word(word: bytes) -> str:
    """The words again."""
    return word.rstrip(b"\0").decode("utf-8", "replace")


def request_values(requests: Sequence[tuple[Terms, Sequence[bytes]]]) -> list[Any]:
    """Requests as the contract takes them."""
    return [
        (term_values(terms), [bytes(digest) for digest in digests]) for terms, digests in requests
    ]


def term_values(terms: Terms) -> tuple[Any, ...]:
    """Terms in the order of the contract's fields."""
    size = terms.resources
    return (
        terms.amount,
        terms.time_limit,
        size.tasks,
        size.cpus_per_task,
        size.mem_per_cpu,
        size.gpus,
        terms.retries,
        int(terms.flags),
        int(terms.objective),
        terms.name,
        terms.uses,
    )


def read_job(number: int, record: tuple[Any, ...]) -> Job:
    """A record as the contract gives it."""
    (customer, status, since, provider_id, memory, retries, flags, escrow) = record[:8]
    (rate, limit, tasks, cpus, gpus, fee, definition, retry_of) = record[8:]
    return Job(
        id=number,
        customer=customer,
        status=JobStatus(status),
        since=since,
        provider_id=provider_id,
        resources=Resources(tasks, cpus, memory, gpus),
        retries_left=retries,
        flags=JobFlags(flags),
        escrow=escrow,
        rate=rate,
        time_limit=limit,
        fee_bps=fee,
        definition=definition,
        retry_of=retry_of,
    )


def read_terms(values: tuple[Any, ...]) -> Terms:
    """Terms as `JobSubmitted` holds them."""
    amount, limit, tasks, cpus, memory, gpus, retries, flags, objective, name, uses = values
    return Terms(
        amount=amount,
        time_limit=limit,
        resources=Resources(tasks, cpus, memory, gpus),
        retries=retries,
        flags=JobFlags(flags),
        objective=Objective(objective),
        name=name,
        uses=uses,
    )
