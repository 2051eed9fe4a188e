"""Anomalies in a grid's history: events that are allowed but unusual. Pure.

A finding means that the ledger is wrong. An anomaly means that an operator should look into the
matter. The two are kept separate: only findings make an audit fail. The rules are in
`anomaly_rules`. The command line and the exports call anomalies "exceptions".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

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
