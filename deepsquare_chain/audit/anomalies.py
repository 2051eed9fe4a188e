"""What is lawful in a grid's history but worth a look: the kinds and their rows. Pure.

A finding says that the books are wrong; an exception says that somebody should ask why. Both are
kept apart everywhere: only findings make an audit fail. `watch` has the rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

#: What nobody but the sender of an assignment can tell.
MAY_HAVE_TAKEN: Final = "its provider may have taken it itself"


class Severity(StrEnum):
    """How soon somebody should look."""

    NOTICE = "notice"
    WARNING = "warning"


class Code(StrEnum):
    """Kinds of exceptions."""

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
    """What an exception is about."""

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
    """One exception; job zero and an empty account or transaction where none is meant.

    `tx_hash` is empty for what is so at the end of the replay without anybody having acted.
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
    """A transaction, or the end of a replay: block, chain time in seconds, hash."""

    block: int
    time: int
    tx_hash: str = ""


def name_self_scheduled(rows: Iterable[Anomaly], senders: Mapping[str, str]) -> list[Anomaly]:
    """Say which late assignments providers made themselves, as only their transactions tell.

    Args:
        rows: Of a replay.
        senders: Who sent a transaction, by its hash; the others stay as they are.
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
