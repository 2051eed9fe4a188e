"""Anomalies in a grid's history: events that are allowed but unusual. Pure.

A finding means that the ledger is wrong. An anomaly means that an operator should look into the
matter. The two are kept separate: only findings make an audit fail. The command line and the exports
call anomalies "exceptions".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Final

from deepsquare_chain.audit.entries import (
    MIN_REPORT_GRACE,
    ZERO_ADDRESS,
    JobEntry,
    TransactionContext,
)
from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.bindings.deployment import ADMIN_ROLE, Deployment, Timeouts, role_name
from deepsquare_chain.credits import CREDIT, credit_count
from deepsquare_chain.job import JobFlags, JobStatus

#: Part of a message that applies until the sender of the assignment is known.
MAY_BE_SELF_SCHEDULED: Final = "its provider may have taken it itself"


class Severity(StrEnum):
    """How urgent an anomaly is."""

    NOTICE = "notice"
    WARNING = "warning"


class Code(StrEnum):
    """Kinds of anomalies."""

    OVERRUN = "overrun"
    REQUEUE = "requeue"
    PANIC = "panic"
    LATE_ASSIGNMENT = "late-assignment"
    SELF_SCHEDULED = "self-scheduled"
    EXPIRED = "expired"
    IDLE_CLAIM = "idle-claim"
    UNANSWERED = "unanswered-challenge"
    LATE_ANSWER = "late-answer"
    PARKED = "parked-payment"
    GIFT = "gift"
    MINT = "mint"
    FEE = "fee-change"
    SUBMISSIONS = "submissions"
    ROLE = "role-change"
    BAN = "ban"
    APPROVAL = "approval"


class Subject(StrEnum):
    """Subject area of an anomaly."""

    JOBS = "jobs"
    PROVIDERS = "providers"
    CREDITS = "credits"
    ADMINISTRATION = "administration"


SUBJECTS: Final[Mapping[Code, Subject]] = {
    **dict.fromkeys(
        (
            *(Code.OVERRUN, Code.REQUEUE, Code.PANIC, Code.LATE_ASSIGNMENT),
            *(Code.SELF_SCHEDULED, Code.IDLE_CLAIM, Code.EXPIRED),
        ),
        Subject.JOBS,
    ),
    **dict.fromkeys((Code.UNANSWERED, Code.LATE_ANSWER), Subject.PROVIDERS),
    **dict.fromkeys((Code.PARKED, Code.GIFT, Code.MINT), Subject.CREDITS),
    **dict.fromkeys(
        (Code.FEE, Code.SUBMISSIONS, Code.ROLE, Code.BAN, Code.APPROVAL), Subject.ADMINISTRATION
    ),
}


#: Kinds that are always warnings.
_WARNINGS: Final = frozenset(
    {Code.PANIC, Code.UNANSWERED, Code.LATE_ANSWER, Code.PARKED, Code.GIFT, Code.BAN}
)


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One anomaly. The job is zero and the account empty if none applies.

    `tx_hash` is empty for a condition at the end of the replay that no transaction caused.
    """

    code: Code
    severity: Severity
    message: str
    job_id: int
    account: str
    block: int
    time: int
    tx_hash: str


def name_self_scheduled(rows: Iterable[Anomaly], senders: Mapping[str, str]) -> list[Anomaly]:
    """Mark the late assignments that providers made themselves.

    `senders` are the senders of transactions by hash, which events do not contain.
    """
    return [_named(row, senders.get(row.tx_hash)) for row in rows]


def _named(row: Anomaly, sender: str | None) -> Anomaly:
    if row.code is not Code.LATE_ASSIGNMENT or row.account != sender:
        return row
    message = row.message.replace(MAY_BE_SELF_SCHEDULED, "its provider took it itself")
    return replace(row, code=Code.SELF_SCHEDULED, message=message)


# -- the rules that find anomalies in events, given the ledgers


class AnomalyRules:
    """Reads events along with the ledgers, and records anomalies.

    Its thresholds are the recorded timeouts of the deployment, or the defaults.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.rows: list[Anomaly] = []
        self._context = TransactionContext(0, 0)
        self._scheduler = deployment.scheduler
        self._names = deployment.contract_names
        times = asdict(Timeouts()) | deployment.timeouts
        self._idle_after = times["claim_timeout"]
        self._pending_timeout = times["pending_timeout"]
        self._pending_expiry = times["pending_expiry"]
        self._pending: dict[int, int] = {}
        self._claims: dict[int, tuple[int, str]] = {}
        self._running: dict[int, str] = {}
        self._providers: dict[int, str] = {}
        self._challenges: dict[str, ev.ProviderChallenged] = {}

    def resume(
        self, jobs: Iterable[JobEntry], challenges: Iterable[ev.ProviderChallenged] = ()
    ) -> None:
        """Restore the state after all earlier events, in order to continue from there.

        `jobs` are all jobs that further events may concern, `challenges` the open challenges.
        """
        for job in jobs:
            if job.status is JobStatus.PENDING:
                self._pending[job.id] = job.since
            elif job.status is JobStatus.SCHEDULED:
                self._claims[job.id] = job.since, job.provider
            elif job.status is JobStatus.RUNNING:
                self._running[job.id] = job.provider
        self._challenges.update({challenge.provider: challenge for challenge in challenges})

    def take(self) -> list[Anomaly]:
        """Return and clear the recorded anomalies, oldest first."""
        anomalies, self.rows = self.rows, []
        return anomalies

    def read(
        self, events: Sequence[ev.Event], jobs: Mapping[int, JobEntry], context: TransactionContext
    ) -> None:
        """Examine one transaction. The ledgers must already include it."""
        self._context = context
        payers = {event.customer for event in events if isinstance(event, ev.JobSubmitted)}
        payers |= {event.payer for event in events if isinstance(event, ev.JobToppedUp)}
        for event in events:
            match event:
                case ev.JobTransition():
                    self._moved(event, jobs.get(event.job_id))
                case ev.Transfer():
                    self._transferred(event, payers)
                case ev.JobRequeued():
                    self._requeued(event)
                case ev.JobPanicked():
                    self._panicked(event, jobs.get(event.job_id))
                case ev.ProviderChallenged():
                    self._challenges[event.provider] = event
                case ev.ProviderAnswered():
                    self._answered(event)
                case _:
                    self._administrative(event)

    def all_anomalies(
        self, jobs: Mapping[int, JobEntry], context: TransactionContext
    ) -> list[Anomaly]:
        """Return all anomalies, including the conditions that are open at a block; oldest first."""
        recorded, self.rows, self._context = self.rows, list(self.rows), context
        for job_id, account in sorted(self._running.items()):
            if (job := jobs.get(job_id)) is not None:
                self._overrun(job, account, "runs")
        for job_id, (since, account) in sorted(self._claims.items()):
            if (idle := context.time - since) > self._idle_after:
                message = f"job {job_id} was claimed {idle} s ago and has not started"
                self._note(Code.IDLE_CLAIM, message, account, job_id, warn=True)
        for account, event in sorted(self._challenges.items()):
            if (late := context.time - event.answer_by) > 0:
                challenge = f"a challenge over job {event.job_id}"
                message = f"{account} has not answered {challenge}, {late} s after the deadline"
                self._note(Code.UNANSWERED, message, account, event.job_id)
        anomalies, self.rows = self.rows, recorded
        return anomalies

    def _note(
        self, code: Code, message: str, account: str = "", job_id: int = 0, *, warn: bool = False
    ) -> None:
        """Record an anomaly of the current transaction or block."""
        severity = Severity.WARNING if warn or code in _WARNINGS else Severity.NOTICE
        context = (self._context.block, self._context.time, self._context.tx_hash)
        self.rows.append(Anomaly(code, severity, message, job_id, account, *context))

    def _moved(self, event: ev.JobTransition, job: JobEntry | None) -> None:
        job_id, account, after, now = event.job_id, event.provider, event.after, self._context.time
        self._providers[job_id] = account
        if (claim := self._claims.pop(job_id, None)) and now - claim[0] > self._idle_after:
            message = f"job {job_id} was claimed and became {after.name} {now - claim[0]} s later"
            self._note(Code.IDLE_CLAIM, message, account, job_id)
        if after is JobStatus.PENDING:
            self._pending[job_id] = now
        elif after is JobStatus.META_SCHEDULED:
            waited = now - self._pending.pop(job_id, now)
            if waited >= self._pending_timeout:
                # If providers can't assign the job to themselves, the scheduler was late.
                forbidden = job is not None and JobFlags.NO_SELF_SCHEDULING in job.terms.flags
                cause = "" if forbidden else f": {MAY_BE_SELF_SCHEDULED}"
                message = f"job {job_id} waited {waited} s{cause}"
                self._note(Code.LATE_ASSIGNMENT, message, account, job_id)
        elif after is JobStatus.SCHEDULED:
            self._claims[job_id] = now, account
        elif after is JobStatus.RUNNING:
            self._running[job_id] = account
        if after.is_final:
            waited = now - self._pending.pop(job_id, now)
            if waited >= self._pending_expiry:
                message = f"job {job_id} was cancelled after {waited} s without a provider, when "
                message += "anyone may cancel it; its credits were refunded to its customer"
                self._note(Code.EXPIRED, message, job_id=job_id)
            if self._running.pop(job_id, None) is not None and job is not None:
                self._overrun(job, account, "ran")

    def _overrun(self, job: JobEntry, account: str, verb: str) -> None:
        overrun = self._context.time - job.billed_until - job.allotment
        if overrun > 0:
            granted = job.collected_seconds + job.allotment
            message = f"job {job.id} {verb} {overrun} s past its {granted} s, by the chain's clock"
            self._note(Code.OVERRUN, message, account, job.id, warn=overrun > MIN_REPORT_GRACE)

    def _requeued(self, event: ev.JobRequeued) -> None:
        provider = self._providers.get(event.job_id, ZERO_ADDRESS)
        by_provider = event.by == provider
        verb = "refused by" if by_provider else f"taken by {event.by} from"
        message = f"job {event.job_id} was {verb} {provider}{_reason(event)}"
        self._note(Code.REQUEUE, message, provider, event.job_id, warn=not by_provider)

    def _panicked(self, event: ev.JobPanicked, job: JobEntry | None) -> None:
        provider = self._providers.get(event.job_id, ZERO_ADDRESS)
        successor = job.successor if job is not None else 0
        escrow = f", its escrow moved to job {successor}" if successor else ""
        message = f"job {event.job_id} was given up by {event.by}{escrow}{_reason(event)}"
        self._note(Code.PANIC, message, provider, event.job_id)

    def _answered(self, event: ev.ProviderAnswered) -> None:
        account = event.provider
        challenge = self._challenges.pop(account, None)
        if challenge is not None and (late := self._context.time - challenge.answer_by) > 0:
            job_id = challenge.job_id
            message = f"{account} answered a challenge over job {job_id} {late} s too late"
            self._note(Code.LATE_ANSWER, message, account, job_id)

    def _transferred(self, event: ev.Transfer, payers: set[str]) -> None:
        amount = credit_count(event.amount)
        verb = "was" if event.amount == CREDIT else "were"
        if event.sender == ZERO_ADDRESS:
            message = f"{amount} {verb} minted for {event.recipient}"
            self._note(Code.MINT, message, event.recipient)
        if event.recipient == self._scheduler and event.sender not in payers:
            message = (
                f"{amount} {verb} sent to the scheduler without a job; they can't be recovered"
            )
            self._note(Code.GIFT, message, event.sender)

    def _administrative(self, event: ev.Event) -> None:
        """Note an administrative event or a parked payment."""
        match event:
            case ev.PaymentParked():
                payment = f"{credit_count(event.amount)} for {event.recipient}"
                message = f"{payment} could not be paid and can be withdrawn"
                self._note(Code.PARKED, message, event.recipient)
            case ev.FeeChanged():
                self._note(Code.FEE, f"the fee became {event.fee_bps} basis points")
            case ev.SubmissionsChanged():
                verb = "opened" if event.open else "closed"
                self._note(Code.SUBMISSIONS, f"new submissions were {verb}")
            case ev.RoleGranted() | ev.RoleRevoked():
                contract = self._names.get(event.address, event.address)
                verb = "granted to" if isinstance(event, ev.RoleGranted) else "taken from"
                role = "administrator" if event.role == ADMIN_ROLE else role_name(event.role)
                message = f"role {role} of {contract} was {verb} {event.account} by {event.sender}"
                self._note(Code.ROLE, message, event.account)
            case ev.BanChanged():
                verb = "banned" if event.banned else "unbanned"
                message = f"{event.provider} was {verb}{_reason(event)}"
                self._note(Code.BAN, message, event.provider)
            case ev.ProviderApproved():
                message = f"version {event.version} of {event.provider} was approved"
                self._note(Code.APPROVAL, message, event.provider)
            case _:
                pass


def _reason(event: ev.JobRequeued | ev.JobPanicked | ev.BanChanged) -> str:
    return f": {event.reason}" if event.reason else ""
