"""The provider's model: the view of a job, and the actions that may follow; pure.

Times are chain times in seconds, except those of an executor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from deepsquare_chain.credits import allotment as allotment_of
from deepsquare_chain.executors.base import Exit, RunStatus
from deepsquare_chain.job import Job, JobStatus, Offer

#: Limits of the contract: length of reasons in bytes; reported seconds are a uint32.
MAX_REASON_BYTES: Final = 256
MAX_SECONDS: Final = 2**32 - 1


class Phase(StrEnum):
    """Progress of a provider with a job, as recorded in its database."""

    WATCHED = "watched"
    """An event mentioned the job; it was never submitted to the executor."""
    STARTING = "starting"
    """The start of billing is about to be sent; the job was never submitted to the executor."""
    SUBMITTING = "submitting"
    """The intent is recorded; whether the executor accepted the run is not known yet."""
    SUBMITTED = "submitted"
    """The executor accepted the run."""
    ENDED = "ended"
    """The run has ended; its exit status and the digest of its output are recorded."""
    REFUSED = "refused"
    """The executor can't run the definition."""
    CLOSED = "closed"
    """Final on chain, and no run of it is alive here."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run record of the provider's database.

    Attributes:
        attempt: Number of earlier assignments to this provider whose run was released; part of
            the run's key, because a key runs at most once.
        allotment: Allotment in seconds, from the start, last sent to the run; 0 when unknown.
        lead: Seconds of the allotment that had passed when the run was submitted.
        exit: Exit status of the run, once ENDED.
        result: SHA-256 of the kept output, once ENDED.
        note: Why the executor refused the run, or the last message about it.
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
        """Whether the executor has, or may have, a run of this record."""
        return self.phase in {Phase.SUBMITTING, Phase.SUBMITTED, Phase.ENDED}

    # -- run transitions: how each step changes a run record

    def starting(self) -> Run:
        """Record the intent to start on chain.

        A RUNNING job without it was started without this database, so that its record was lost.
        """
        return replace(self, phase=Phase.STARTING) if self.phase is Phase.WATCHED else self

    def submitting(self, action: Submit) -> Run:
        """Record the intent to submit, before the executor is called."""
        return replace(self, phase=Phase.SUBMITTING, allotment=action.allotment, lead=action.lead)

    def submitted(self, handle: str) -> Run:
        """Record that the executor has the run."""
        return replace(self, phase=Phase.SUBMITTED, handle=handle)

    def refused(self, reason: str) -> Run:
        """Record that the executor can never execute the run."""
        return replace(self, phase=Phase.REFUSED, note=reason)

    def extended(self, allotment: int) -> Run:
        """Record the new allotment that was sent to the run, in seconds."""
        return replace(self, allotment=allotment)

    def ended(self, exit: Exit, result: bytes) -> Run:  # noqa: A002 - the executor's term
        """Record the end of the run; `result` is the SHA-256 of the kept output."""
        return replace(self, phase=Phase.ENDED, exit=exit, result=result)

    def released(self, key: str) -> Run:
        """Return a new record for later assignments, with another key; the earlier run is over."""
        return Run(job_id=self.job_id, key=key, attempt=self.attempt + 1)

    def closed(self) -> Run:
        """Close the record; the data of the run is kept."""
        return replace(self, phase=Phase.CLOSED)

    def reopened(self) -> Run:
        """Reopen a record after a reorg removed the job's end; the phase follows from its fields."""
        if self.phase is not Phase.CLOSED:
            return self
        if self.exit is not None:
            return replace(self, phase=Phase.ENDED)
        return replace(self, phase=Phase.SUBMITTED if self.handle else Phase.WATCHED)


class DefinitionState(StrEnum):
    """State of a job's definition in the definition cache."""

    READY = "ready"
    PENDING = "pending"
    MISSING = "missing"
    """The store does not have it, or has other bytes under this digest."""
    UNREACHABLE = "unreachable"
    """The store does not answer."""
    INVALID = "invalid"
    """The bytes match the digest, but no provider can ever run them."""


@dataclass(frozen=True, slots=True)
class CachedDefinition:
    """State of a definition, with the reason where it is not READY."""

    state: DefinitionState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Lookup:
    """Result of a lookup by run key; without a handle, the run certainly never began here."""

    handle: str | None


@dataclass(frozen=True, slots=True)
class View:
    """Everything that the plan of one job depends on.

    Attributes:
        mine: The job is assigned to this provider on chain.
        settled: The state on chain has enough confirmations for irreversible actions.
        status: Status of the run at the executor; None when the executor has not answered.
        lookup: Result of the lookup by key; None when not requested or not answered.
        misses: Number of consecutive lookups that did not find a submitted run.
        placed: The executor counts the run as used capacity, even while it is being launched.
        collected: Seconds of the run billed by interim payments, between its start and the
            record's `since`; None when the events of these payments are not read yet.
    """

    job: Job
    run: Run
    mine: bool
    settled: bool = True
    status: RunStatus | None = None
    lookup: Lookup | None = None
    cached_definition: CachedDefinition = CachedDefinition(DefinitionState.PENDING)
    misses: int = 0
    placed: bool = False
    collected: int | None = 0

    @property
    def allotment(self) -> int:
        """Total seconds that the run may last, from its start; billed seconds are included."""
        job = self.job
        remaining = allotment_of(job.time_limit, job.until_spent, job.escrow, job.rate)
        return remaining + (self.collected or 0)

    @property
    def chain(self) -> JobStatus:
        """Status on chain."""
        return self.job.status


@dataclass(frozen=True, slots=True)
class Collecting:
    """Conditions under which an interim payment is worth its transaction.

    Attributes:
        interval: Minimum seconds since the start or the last interim payment.
        min_unbilled: Minimum payment to the provider, in credit-wei.
    """

    interval: int
    min_unbilled: int = 0


@dataclass(frozen=True, slots=True)
class Situation:
    """The state that all jobs of one cycle share.

    Attributes:
        now: Timestamp of the block at which the jobs were read.
        queues: The executor has its own queue.
        free: Free capacity now; None when the executor has not answered.
        fault: Why the executor can't start runs; empty when it can.
        draining: The provider is in maintenance: jobs without a run are requeued.
        has_disk_space: There is enough free disk for new jobs.
        assignment_timeout: Seconds for which an assigned job may wait for its definition or for
            free capacity.
        start_grace: Seconds after the start on chain during which a run is always launched.
        max_misses: Consecutive failed lookups after which a submitted run counts as vanished.
        collecting: When interim payments are collected; None for never.
    """

    now: int
    queues: bool
    free: Offer | None
    fault: str = ""
    draining: bool = False
    has_disk_space: bool = True
    assignment_timeout: int = 150
    start_grace: int = 60
    max_misses: int = 3
    collecting: Collecting | None = None


# ------------------------------------------------------------------ actions


class Action:
    """The next step for a job."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Wait(Action):
    """Do nothing in this cycle."""

    why: str


@dataclass(frozen=True, slots=True)
class Claim(Action):
    """Claim the job on chain."""


@dataclass(frozen=True, slots=True)
class ClaimAndStart(Action):
    """Claim the job and start its billing in one transaction: the executor has no queue."""


@dataclass(frozen=True, slots=True)
class Start(Action):
    """Start the job on chain, and with it its billing."""


@dataclass(frozen=True, slots=True)
class Collect(Action):
    """Collect an interim payment: bill the run up to now while it continues."""


@dataclass(frozen=True, slots=True)
class Requeue(Action):
    """Return the job to the queue, so that another provider can claim it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Panic(Action):
    """Give up the job: a refund, or a successor elsewhere when it was running."""

    reason: str


@dataclass(frozen=True, slots=True)
class RunReport(Action):
    """Report the end of the run on chain; the contract bills it and derives the final status."""

    seconds: int
    exit_code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Submit(Action):
    """Submit the job to the executor, with a time limit of `walltime` seconds."""

    walltime: int
    allotment: int
    lead: int


@dataclass(frozen=True, slots=True)
class Adopt(Action):
    """Record the handle of a run that the executor already has."""

    handle: str


@dataclass(frozen=True, slots=True)
class Extend(Action):
    """Set the total time limit of the run to `walltime` seconds: its allotment changed."""

    walltime: int
    allotment: int


@dataclass(frozen=True, slots=True)
class RecordEnd(Action):
    """Record the exit status of the run, with the digest of its output."""

    exit: Exit


@dataclass(frozen=True, slots=True)
class Cancel(Action):
    """Cancel a run that this provider no longer has to execute."""

    why: str


@dataclass(frozen=True, slots=True)
class Release(Action):
    """Forget the run of an earlier assignment; the job may be assigned here again."""


@dataclass(frozen=True, slots=True)
class Close(Action):
    """Close the record: nothing is left to do for this job."""


def run_key(chain_id: int, contract: str, job_id: int, attempt: int = 0) -> str:
    """Return the permanent key of a run: `31337-5fbdb231-42`, `...-42.1` for a second attempt."""
    base = f"{_prefix(chain_id, contract)}{job_id}"
    return f"{base}.{attempt}" if attempt else base


def parse_key(chain_id: int, contract: str, key: str) -> tuple[int, int] | None:
    """Return job ID and attempt of a key; None for keys of another chain, contract or program."""
    prefix = _prefix(chain_id, contract)
    if not key.startswith(prefix):
        return None
    job, _, attempt = key.removeprefix(prefix).partition(".")
    numbers = (job, attempt or "0")
    if not all(part.isascii() and part.isdigit() and len(part) <= 20 for part in numbers):
        return None
    parsed = int(job), int(numbers[1])
    return parsed if run_key(chain_id, contract, *parsed) == key else None


def _prefix(chain_id: int, contract: str) -> str:
    return f"{chain_id}-{contract.removeprefix('0x')[:8].lower()}-"
