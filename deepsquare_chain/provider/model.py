"""What a provider knows of one job, and what it may do next; pure.

Times are seconds of chain time unless they are an executor's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from deepsquare_chain.credits import allotment as allotment_of
from deepsquare_chain.executors.base import Exit, RunStatus
from deepsquare_chain.job import Job, JobStatus, Offer

#: Bounds of the contract: reasons in bytes, reported seconds as an unsigned 32-bit number.
MAX_REASON_BYTES: Final = 256
MAX_SECONDS: Final = 2**32 - 1


class Phase(StrEnum):
    """How far a provider got with a job, as its database remembers it."""

    WATCHED = "watched"
    """An event named the job; the executor was never asked to run it."""
    STARTING = "starting"
    """The meter is about to be started; the executor was never asked to run it."""
    SUBMITTING = "submitting"
    """The intent is written; whether the executor took the run is not known yet."""
    SUBMITTED = "submitted"
    """The executor took the run."""
    ENDED = "ended"
    """The run is over; its exit and the digest of its output are written."""
    REFUSED = "refused"
    """The executor can't run what the definition asks for."""
    CLOSED = "closed"
    """Final on chain, and nothing of it runs here."""


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the provider's database.

    Attributes:
        attempt: How often the job came back after a run of an earlier assignment was given up;
            part of the run's key, because a key runs at most once.
        allotment: Seconds of allotment, from the start, that was last sent to the run; 0 when not
            known.
        lead: Seconds of the allotment that had passed when the run was submitted.
        exit: How it ended, once ENDED.
        result: SHA-256 of the output that was kept, once ENDED.
        note: Why the executor refused it, or the last message about it.
    """

    job_id: int
    key: str
    phase: Phase = Phase.WATCHED
    attempt: int = 0
    handle: str | None = None
    allotment: int = 0
    lead: int = 0
    exit: Exit | None = None
    result: bytes = b""
    note: str = ""

    @property
    def began(self) -> bool:
        """Whether the executor has, or may have, a run of this row."""
        return self.phase in {Phase.SUBMITTING, Phase.SUBMITTED, Phase.ENDED}


class DefinitionState(StrEnum):
    """What is known about a job's definition."""

    READY = "ready"
    PENDING = "pending"
    MISSING = "missing"
    """The store answers that it has none, or has other bytes under this digest."""
    UNREACHABLE = "unreachable"
    """The store does not answer."""
    INVALID = "invalid"
    """The bytes are the right ones, and no provider could ever run them."""


@dataclass(frozen=True, slots=True)
class CachedDefinition:
    """State of a definition, with the reason in plain words where it is not READY."""

    state: DefinitionState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Lookup:
    """The executor's answer to "do you know this key"; None: it surely never began here."""

    handle: str | None


@dataclass(frozen=True, slots=True)
class View:
    """Everything that decides about one job.

    Attributes:
        mine: The chain says that the job is assigned to this provider.
        settled: Enough blocks confirm what the chain says; nothing irreversible before.
        status: The executor's word about the run, None when it has not answered.
        lookup: Its answer about the key, None when it was not asked or has not answered.
        misses: How many answers in a row did not know a run that was submitted.
        placed: The executor counts it in what is not free, whether its start has ended or not.
        collected: Seconds of the run that interim payments have billed, so those between its start
            and the record's `since`; None when the events that say so are not read yet.
    """

    job: Job
    run: Run
    mine: bool
    settled: bool = True
    status: RunStatus | None = None
    lookup: Lookup | None = None
    material: CachedDefinition = CachedDefinition(DefinitionState.PENDING)
    misses: int = 0
    placed: bool = False
    collected: int | None = 0

    @property
    def allotment(self) -> int:
        """Seconds that the run may last in all, from its start; what was billed counts as well."""
        job = self.job
        left = allotment_of(job.time_limit, job.until_spent, job.escrow, job.rate)
        return left + (self.collected or 0)

    @property
    def chain(self) -> JobStatus:
        """Status on chain."""
        return self.job.status


@dataclass(frozen=True, slots=True)
class Collecting:
    """When an interim payment is worth its transaction.

    Attributes:
        interval: Least seconds since the start or the last interim payment.
        least: Least payment to the provider, in credit-wei.
    """

    interval: int
    least: int = 0


@dataclass(frozen=True, slots=True)
class Situation:
    """What all jobs of one cycle share.

    Attributes:
        now: Time of the block that the jobs were read at.
        queues: The executor has a queue of its own.
        free: What is free now, None when the executor has not answered.
        fault: Why the executor can't start anything, in words; empty when it can.
        draining: The provider is in maintenance: what has not begun goes back to the queue.
        room_to_write: There is enough free disk for new work.
        assignment_timeout: Seconds that an assigned job may wait for its definition or for free capacity.
        start_grace: Seconds after its start on chain within which a run is begun in any case.
        max_misses: Unknown answers in a row that make a submitted run vanished.
        collecting: When interim payments are collected; None for never.
    """

    now: int
    queues: bool
    free: Offer | None
    fault: str = ""
    draining: bool = False
    room_to_write: bool = True
    assignment_timeout: int = 150
    start_grace: int = 60
    max_misses: int = 3
    collecting: Collecting | None = None


# ------------------------------------------------------------------ what may be done next


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing now."""

    why: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Take the job on chain."""


@dataclass(frozen=True, slots=True)
class ClaimAndStart:
    """Take the job and start the meter in one transaction: the executor has no queue."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start the meter on chain."""


@dataclass(frozen=True, slots=True)
class Collect:
    """Have a run billed up to now while it goes on."""


@dataclass(frozen=True, slots=True)
class Requeue:
    """Give the job back, so that another provider can take it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Panic:
    """Give the job up: a refund, or a successor elsewhere when it was running."""

    reason: str


@dataclass(frozen=True, slots=True)
class RunReport:
    """Tell the chain how the run ended; the contract bills and names the end."""

    seconds: int
    exit_code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Hand the job to the executor, with `walltime` seconds to run."""

    walltime: int
    allotment: int
    lead: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """Remember the handle of a run that the executor already has."""

    handle: str


@dataclass(frozen=True, slots=True)
class Extend:
    """Give the run `walltime` seconds in all, because its allotment changed."""

    walltime: int
    allotment: int


@dataclass(frozen=True, slots=True)
class RecordEnd:
    """Write down how the run ended, with the digest of its output."""

    exit: Exit


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a run that has no business here any more."""

    why: str


@dataclass(frozen=True, slots=True)
class Release:
    """Forget the run of an earlier assignment; the job may come back."""


@dataclass(frozen=True, slots=True)
class Close:
    """Nothing is left to do for this job, ever."""


Action = (
    Wait
    | Claim
    | ClaimAndStart
    | Start
    | Collect
    | Requeue
    | Panic
    | RunReport
    | Submit
    | Adopt
    | Extend
    | RecordEnd
    | Cancel
    | Release
    | Close
)


def run_key(chain_id: int, contract: str, job_id: int, attempt: int = 0) -> str:
    """Name of a run for ever, such as `31337-5fbdb231-42`, and `...-42.1` when the job came back."""
    base = f"{_prefix(chain_id, contract)}{job_id}"
    return f"{base}.{attempt}" if attempt else base


def parse_key(chain_id: int, contract: str, key: str) -> tuple[int, int] | None:
    """Job id and attempt in a key; None for keys of another chain, contract or program."""
    prefix = _prefix(chain_id, contract)
    if not key.startswith(prefix):
        return None
    job, _, attempt = key.removeprefix(prefix).partition(".")
    numbers = (job, attempt or "0")
    if not all(part.isascii() and part.isdigit() and len(part) <= 20 for part in numbers):
        return None
    found = int(job), int(numbers[1])
    return found if run_key(chain_id, contract, *found) == key else None


def _prefix(chain_id: int, contract: str) -> str:
    return f"{chain_id}-{contract.removeprefix('0x')[:8].lower()}-"
