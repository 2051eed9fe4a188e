"""Anomalies in a grid's history: events that are allowed but unusual. Pure.

A finding means that the ledger is wrong. An anomaly means that an operator should look into the
matter. The two are kept separate: only findings make an audit fail. The command line and the exports
call anomalies "exceptions".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Final

from deepsquare_chain.audit.entries import MIN_REPORT_GRACE, ZERO_ADDRESS, JobEntry
from deepsquare_chain.chain.bindings import event_types as ev
from deepsquare_chain.chain.bindings.deployment import ADMIN_ROLE, Deployment, Timeouts, role_name
from deepsquare_chain.credits import format_credits
from deepsquare_chain.job import JobFlags, JobStatus

#: Part of a message that applies until the sender of the assignment is known.
MAY_HAVE_TAKEN: Final = "its provider may have taken it itself"


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


@dataclass(frozen=True, slots=True)
class Spot:
    """A transaction, or the end of a replay: block, chain time in seconds, transaction hash."""

    block: int
    time: int
    tx_hash: str = ""


def name_self_scheduled(rows: Iterable[Anomaly], senders: Mapping[str, str]) -> list[Anomaly]:
    """Mark the late assignments that providers made themselves.

    Events do not name the sender of an assignment, so the senders must be given.

    Args:
        rows: Anomalies of a replay.
        senders: Sender of each transaction, by its hash. Other rows stay unchanged.
    """
    return [
        replace(
            row,
            code=Code.SELF_SCHEDULED,
            message=row.message.replace(MAY_HAVE_TAKEN, "its provider took it itself"),
        )
        if row.code is Code.LATE_ASSIGNMENT and senders.get(row.tx_hash) == row.account
        else row
        for row in rows
    ]


# -- the rules that find anomalies in events, given the ledgers


class AnomalyRules:
    """Reads events along with the ledgers, and records anomalies.

    Args:
        deployment: Provides the thresholds: its recorded timeouts, or the defaults. Its addresses
            must be checksummed, as in events.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.rows: list[Anomaly] = []
        self._scheduler = deployment.scheduler
        names = ("Credit", "ProviderRegistry", "MetaScheduler")
        self._names = dict(zip(deployment.addresses, names, strict=True))
        times = asdict(Timeouts()) | deployment.timeouts
        self._idle_after = times["claim_timeout"]
        self._pending_timeout = times["pending_timeout"]
        self._pending_expiry = times["pending_expiry"]
        self._pending: dict[int, int] = {}
        self._claims: dict[int, tuple[int, str]] = {}
        self._running: dict[int, str] = {}
        self._holders: dict[int, str] = {}
        self._challenges: dict[str, ev.ProviderChallenged] = {}

    def resume(
        self, jobs: Iterable[JobEntry], challenges: Iterable[ev.ProviderChallenged] = ()
    ) -> None:
        """Restore the state after all earlier events, in order to continue from there.

        Args:
            jobs: Entries of all jobs that further events may concern.
            challenges: Open challenges.
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

    def read(self, events: Iterable[ev.Event], jobs: Mapping[int, JobEntry], spot: Spot) -> None:
        """Examine one transaction. The ledgers must already include it."""
        payers: set[str] = set()
        transaction_events = list(events)
        for event in transaction_events:
            if isinstance(event, ev.JobSubmitted):
                payers.add(event.customer)
            elif isinstance(event, ev.JobToppedUp):
                payers.add(event.payer)
        for event in transaction_events:
            if isinstance(event, ev.JobTransition):
                self._moved(event, jobs.get(event.job_id), spot)
            elif isinstance(event, ev.Transfer):
                self._transferred(event, payers, spot)
            elif isinstance(event, ev.JobRequeued | ev.JobPanicked):
                self._gave_up(event, jobs.get(event.job_id), spot)
            elif isinstance(event, ev.ProviderChallenged | ev.ProviderAnswered):
                self._asked(event, spot)
            else:
                self._acted(event, spot)

    def so_far(self, jobs: Mapping[int, JobEntry], spot: Spot) -> list[Anomaly]:
        """Return all anomalies, including the open conditions at a spot; oldest first."""
        recorded, self.rows = self.rows, list(self.rows)
        for job_id, account in sorted(self._running.items()):
            if (job := jobs.get(job_id)) is not None:
                self._overrun(job, account, spot, "runs")
        for job_id, (since, account) in sorted(self._claims.items()):
            if (idle := spot.time - since) > self._idle_after:
                message = f"job {job_id} was claimed {idle} s ago and does not run"
                self._note(
                    Code.IDLE_CLAIM, Severity.WARNING, message, spot, account=account, job_id=job_id
                )
        for account, event in sorted(self._challenges.items()):
            if (late := spot.time - event.answer_by) > 0:
                message = f"{account} has not answered a challenge over job {event.job_id}, "
                message += f"{late} s after it had to"
                self._note(
                    Code.UNANSWERED,
                    Severity.WARNING,
                    message,
                    spot,
                    account=account,
                    job_id=event.job_id,
                )
        anomalies, self.rows = self.rows, recorded
        return anomalies

    def _note(
        self,
        code: Code,
        severity: Severity,
        message: str,
        spot: Spot,
        *,
        account: str = "",
        job_id: int = 0,
    ) -> None:
        location = (spot.block, spot.time, spot.tx_hash)
        self.rows.append(Anomaly(code, severity, message, job_id, account, *location))

    def _moved(self, event: ev.JobTransition, job: JobEntry | None, spot: Spot) -> None:
        job_id, account, after = event.job_id, event.provider, event.after
        self._holders[job_id] = account
        if (claim := self._claims.pop(job_id, None)) and spot.time - claim[0] > self._idle_after:
            message = (
                f"job {job_id} was claimed and became {after.name} {spot.time - claim[0]} s later"
            )
            self._note(
                Code.IDLE_CLAIM, Severity.NOTICE, message, spot, account=account, job_id=job_id
            )
        if after is JobStatus.PENDING:
            self._pending[job_id] = spot.time
        elif after is JobStatus.META_SCHEDULED:
            waited = spot.time - self._pending.pop(job_id, spot.time)
            if waited >= self._pending_timeout:
                forbidden = job is not None and JobFlags.NO_SELF_SCHEDULING in job.terms.flags
                message = f"job {job_id} waited {waited} s"
                # Providers can't assign such a job to themselves, so the scheduler was late.
                message += "" if forbidden else f": {MAY_HAVE_TAKEN}"
                self._note(
                    Code.LATE_ASSIGNMENT,
                    Severity.NOTICE,
                    message,
                    spot,
                    account=account,
                    job_id=job_id,
                )
        elif after is JobStatus.SCHEDULED:
            self._claims[job_id] = spot.time, account
        elif after is JobStatus.RUNNING:
            self._running[job_id] = account
        if after.is_final:
            waited = spot.time - self._pending.pop(job_id, spot.time)
            if waited >= self._pending_expiry:
                message = f"job {job_id} was cancelled after {waited} s without a provider, when "
                message += "anyone may; its credits went back to its customer"
                self._note(Code.EXPIRED, Severity.NOTICE, message, spot, job_id=job_id)
            if self._running.pop(job_id, None) is not None and job is not None:
                self._overrun(job, account, spot, "ran")

    def _overrun(self, job: JobEntry, account: str, spot: Spot, verb: str) -> None:
        overrun = spot.time - job.billed_until - job.allotment
        if overrun > 0:
            severity = Severity.WARNING if overrun > MIN_REPORT_GRACE else Severity.NOTICE
            granted = job.collected_seconds + job.allotment
            message = f"job {job.id} {verb} {overrun} s past its {granted} s, by the chain's clock"
            self._note(Code.OVERRUN, severity, message, spot, account=account, job_id=job.id)

    def _gave_up(
        self, event: ev.JobRequeued | ev.JobPanicked, job: JobEntry | None, spot: Spot
    ) -> None:
        holder = self._holders.get(event.job_id, ZERO_ADDRESS)
        reason = f": {event.reason}" if event.reason else ""
        if isinstance(event, ev.JobRequeued):
            own_provider = event.by == holder
            verb = "refused by" if own_provider else f"taken by {event.by} from"
            message = f"job {event.job_id} was {verb} {holder}{reason}"
            severity = Severity.NOTICE if own_provider else Severity.WARNING
            self._note(Code.REQUEUE, severity, message, spot, account=holder, job_id=event.job_id)
            return
        successor = f", job {job.successor} goes on" if job is not None and job.successor else ""
        message = f"job {event.job_id} was given up by {event.by}{successor}{reason}"
        self._note(Code.PANIC, Severity.WARNING, message, spot, account=holder, job_id=event.job_id)

    def _asked(self, event: ev.ProviderChallenged | ev.ProviderAnswered, spot: Spot) -> None:
        account = event.provider
        if isinstance(event, ev.ProviderChallenged):
            self._challenges[account] = event
            return
        challenge = self._challenges.pop(account, None)
        if challenge is not None and spot.time > challenge.answer_by:
            late = spot.time - challenge.answer_by
            message = (
                f"{account} answered a challenge over job {challenge.job_id} {late} s too late"
            )
            self._note(
                Code.LATE_ANSWER,
                Severity.WARNING,
                message,
                spot,
                account=account,
                job_id=challenge.job_id,
            )

    def _transferred(self, event: ev.Transfer, owed: set[str], spot: Spot) -> None:
        amount = format_credits(event.amount)
        if event.sender == ZERO_ADDRESS:
            message = f"{amount} credits were minted for {event.recipient}"
            self._note(Code.MINT, Severity.NOTICE, message, spot, account=event.recipient)
        if event.recipient == self._scheduler and event.sender not in owed:
            message = f"{amount} credits went to the scheduler for no job; nobody gets them back"
            self._note(Code.GIFT, Severity.WARNING, message, spot, account=event.sender)

    def _acted(self, event: ev.Event, spot: Spot) -> None:
        anomaly = _acts(event, self._names.get(event.address, event.address))
        if anomaly is not None:
            code, severity, account, message = anomaly
            self._note(code, severity, message, spot, account=account)


def _acts(event: Any, contract: str) -> tuple[Code, Severity, str, str] | None:
    """Return code, severity, account and message of an administrative event or parked payment."""
    notice, warning = Severity.NOTICE, Severity.WARNING
    anomaly: tuple[Code, Severity, str, str] | None = None
    match event:
        case ev.PaymentParked():
            message = f"{format_credits(event.amount)} credits for {event.recipient} could not be paid and can be withdrawn"
            anomaly = Code.PARKED, warning, event.recipient, message
        case ev.FeeChanged():
            message = f"the fee became {event.fee_bps} basis points"
            anomaly = Code.FEE, notice, "", message
        case ev.SubmissionsChanged():
            message = f"new submissions were {'opened' if event.open else 'closed'}"
            anomaly = Code.SUBMISSIONS, notice, "", message
        case ev.RoleGranted() | ev.RoleRevoked():
            verb = "granted to" if isinstance(event, ev.RoleGranted) else "taken from"
            role = "administrator" if event.role == ADMIN_ROLE else role_name(event.role)
            message = f"role {role} of {contract} was {verb} {event.account} by {event.sender}"
            anomaly = Code.ROLE, notice, event.account, message
        case ev.BanChanged():
            verb = "banned" if event.banned else "let in again"
            reason = f": {event.reason}" if event.reason else ""
            anomaly = Code.BAN, warning, event.provider, f"{event.provider} was {verb}{reason}"
        case ev.ProviderApproved():
            message = f"version {event.version} of {event.provider} was approved"
            anomaly = Code.APPROVAL, notice, event.provider, message
    return anomaly
