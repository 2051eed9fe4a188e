"""Inputs and outputs of the MetaScheduler, and conversion between its tuples and our types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any, Final

from deepsquare_chain.chain.bindings.abi import AbiError, decode_values, interface
from deepsquare_chain.job import Job, JobFlags, JobStatus, Objective, Resources, Terms

MAX_REASON_BYTES: Final = 256
_WORD: Final = 32
#: Minimum and maximum number of decoded job records that are kept.
_KEPT_RECORDS: Final = (1_000, 20_000)


@dataclass(frozen=True, slots=True)
class Report:
    """The end of a run; `seconds_used` is the billed time, `result` a SHA-256 or zeros.

    Only the first 32 bytes of `reason` are stored on chain.
    """

    job_id: int
    seconds_used: int
    exit_code: int
    result: bytes = bytes(32)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Clock:
    """A provider's challenge clock; chain times in seconds, 0 if not set."""

    account: str
    challenged_at: int
    challenged_block: int
    answered_at: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of a deployment; times are in seconds, `response_blocks` in blocks."""

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


def truncated_reason(reason: str) -> str:
    """Truncate a reason to the contract's limit, at a character boundary."""
    return reason.encode("utf-8", "replace")[:MAX_REASON_BYTES].decode("utf-8", "ignore")


def to_word(text: str) -> bytes:
    """Encode text as bytes32: UTF-8, truncated at a character boundary, padded with zeros."""
    encoded = text.encode("utf-8", "replace")[:32].decode("utf-8", "ignore").encode()
    return encoded.ljust(32, b"\0")


def from_word(word: bytes) -> str:
    """Decode text from bytes32; the inverse of `to_word`."""
    return word.rstrip(b"\0").decode("utf-8", "replace")


def request_values(requests: Sequence[tuple[Terms, Sequence[bytes]]]) -> list[Any]:
    """Convert requests to the tuples that the contract takes."""
    return [
        (term_values(terms), [bytes(digest) for digest in digests]) for terms, digests in requests
    ]


def term_values(terms: Terms) -> tuple[Any, ...]:
    """Convert terms to a tuple in the order of the contract's fields."""
    return (
        terms.amount,
        terms.time_limit,
        *astuple(terms.resources),
        terms.retries,
        int(terms.flags),
        int(terms.objective),
        terms.name,
        terms.uses,
    )


def read_job(number: int, record: tuple[Any, ...]) -> Job:
    """Convert a job record of the contract to a `Job`."""
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


class JobDecoder:
    """Decodes results of `getJobs`, and each unchanged record only once.

    Daemons read the same jobs at every block, and decoding a record takes some 60 microseconds. The
    most recently used records are kept: 1,000, or twice the size of the largest read up to 20,000, so
    that an audit, which reads every job once, does not keep them all.
    """

    def __init__(self) -> None:
        self._parameters = interface("MetaScheduler").function("getJob").outputs
        self._size = _WORD * len(self._parameters[0]["components"])
        self._limit = _KEPT_RECORDS[0]
        self._jobs: dict[tuple[int, bytes], Job] = {}

    def reserve(self, count: int) -> None:
        """Keep enough records for reads of `count` jobs at two blocks, up to the maximum."""
        self._limit = min(max(self._limit, 2 * count), _KEPT_RECORDS[1])

    def decode(self, job_ids: Sequence[int], data: bytes) -> list[Job]:
        """Decode the ABI-encoded result of `getJobs` for these IDs.

        Raises:
            AbiError: The data is not such an array of as many records.
        """
        count = len(job_ids)
        head = _WORD.to_bytes(_WORD, "big") + count.to_bytes(_WORD, "big")
        if not data.startswith(head) or len(data) != len(head) + count * self._size:
            raise AbiError(f"undecodable data of {len(data)} bytes: not {count} job records")
        starts = range(len(head), len(data), self._size)
        jobs = [
            self._decode_one(number, data[start : start + self._size])
            for number, start in zip(job_ids, starts, strict=True)
        ]
        for key in list(islice(self._jobs, max(0, len(self._jobs) - self._limit))):
            del self._jobs[key]
        return jobs

    def _decode_one(self, number: int, record: bytes) -> Job:
        key = (number, record)
        job = self._jobs.pop(key, None)
        if job is None:
            job = read_job(number, decode_values(self._parameters, record)[0])
        self._jobs[key] = job  # the last key is the most recently used
        return job


def read_terms(values: tuple[Any, ...]) -> Terms:
    """Convert the terms of a `JobSubmitted` event."""
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


def parse_labels(labels: tuple[str, ...]) -> dict[str, str]:
    """Return labels by key; they are split at the first `=`, and the last of a key counts."""
    return {key: value for key, _, value in (label.partition("=") for label in labels)}
